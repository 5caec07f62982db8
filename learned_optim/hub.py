"""Find a policy by name, folder or Hub repository; save it; publish it.

:func:`load_policy` tries in this order, and the first that fits wins:

1. a :class:`~learned_optim.policy.Policy`, returned as it is;
2. a folder, if the name is a ``pathlib.Path`` or starts (or ends) like one: ``./run``, ``../run``, ``/run``, ``~/run``;
3. a bundled policy: ``"default"``;
4. a folder that exists and holds a ``config.json``: ``"run/best"``. It wins over a Hub repository of that name;
5. a Hub repository: ``"owner/name"`` or ``"owner/name@revision"``.

``policy.source`` says which it was: ``bundled:default``, the folder as it was given, or ``owner/name@`` and the hash
of the commit. ``huggingface_hub`` is imported only for repositories: bundled policies and folders need no network.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from learned_optim import artefact, remote
from learned_optim.errors import PolicyError, PolicyNotFoundError, UnknownPolicyError
from learned_optim.filenames import CONFIG
from learned_optim.policy import Policy

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def bundled() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    # An editable install has them beside the package, a wheel within it.
    for root in (Path(str(files("learned_optim"))) / "pretrained", Path(__file__).parent.parent / "pretrained"):
        if root.is_dir():
            return {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG).is_file()}
    return {}


def load_policy(
    name_or_path: str | Path | Policy,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Policy:
    """Load a policy: bundled, from a folder, or from the Hub (see the module's docstring for the order).

    A repository is pinned to one commit, which ``policy.source`` names. If the Hub cannot be reached and the
    revision was pulled before, the copy in the cache is used, with a ``CachedPolicyWarning`` that names its commit.

    Args:
        name_or_path: what to load; a ``Policy`` is returned unchanged.
        revision: branch, tag or commit of a repository; ``None`` is its main branch. Nothing else has revisions.
        cache_dir: where downloads are kept; ``None`` is huggingface_hub's cache (``HF_HOME``).
        token: a Hub token; ``None`` is ``HF_TOKEN`` or the stored login, ``False`` sends none.
        local_files_only: use the cache, open no connection. ``HF_HUB_OFFLINE=1`` does the same.
        force_download: download again what is in the cache, in case it was damaged there.

    Raises:
        PolicyNotFoundError: no such folder, repository or revision, a file missing, or not in the cache.
        UnknownPolicyError: a name that is nothing of the above; the message lists the bundled policies.
        InvalidPolicyError: damaged, incomplete, foreign, or made for a newer version.
        HubPermissionError: gated or refused.
        HubConnectionError: not reachable, too slow, failing.
        ValueError: ``revision`` for what has none, or two different ones.
        TypeError: ``name_or_path`` is of another type.
    """
    if isinstance(name_or_path, Policy):
        _no_revision(revision, "a Policy object")
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"a policy is a name, a path or a Policy, found {type(name_or_path).__name__}")
    folder = find_folder(name_or_path)
    if folder is not None:
        path, source = folder
        _no_revision(revision, source)
        return artefact.read(path, source)
    repo_id, revision = _repository(str(name_or_path), revision)
    try:
        pulled = remote.fetch(
            repo_id, revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only,
            force_download=force_download,
        )  # fmt: skip
    except PolicyError as error:
        if not Path(name_or_path).is_dir():
            raise
        # `run/best` before anything was saved there looks like a repository.
        hint = f"{error}; and the folder {name_or_path} that exists here holds no {CONFIG}"
        raise type(error)(hint) from error.__cause__
    return artefact.read(pulled.folder, f"{repo_id}@{pulled.commit}")


def save_policy(policy: Policy, folder: str | Path, results: Mapping[str, Any] | None = None) -> None:
    """Write ``model.safetensors``, ``config.json``, ``README.md`` and, if there are any, ``results.json``.

    Every file is replaced atomically and the configuration, which holds the checksums of the others, comes after
    them: a folder whose writing was interrupted is refused on loading. Other files in the folder are left alone.

    Args:
        policy: what to save.
        folder: where to; made if it does not exist.
        results: what was measured (see :mod:`learned_optim.card`); ``policy.results`` if ``None``.

    Raises:
        ValueError: weights that are not finite float32 of the configuration's shapes, or results that are not plain
            JSON: they could not be loaded again.
        OSError: the folder cannot be written.
    """
    artefact.write(artefact.pack(policy, results), Path(folder).expanduser())


def push_policy(
    policy: Policy,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Publish ``policy`` in a Hub repository, in one commit; the repository is made if it does not exist.

    Args:
        policy: what to publish, with ``policy.results`` and a model card made from them.
        repo_id: ``owner/name``.
        private: whether a new repository is private; ``None`` is the owner's default. An existing one stays as it is.
        token: a Hub token with the right to write; ``None`` is ``HF_TOKEN`` or the stored login.
        commit_message: ``None`` names the policy's fingerprint.
        revision: branch to commit to, made if it does not exist; ``None`` is the main branch.
        create_pr: open a pull request against ``revision`` instead of committing to it.

    Returns:
        What ``huggingface_hub`` says about the commit: ``oid`` is its hash, ``pr_revision`` the pull request's.

    Raises:
        ValueError: ``repo_id`` is none, or the policy cannot be stored.
        HubPermissionError: not logged in, token refused, no right to write there.
        PolicyNotFoundError: no such repository or revision, and none could be made.
        HubConnectionError: offline, not reachable, failing.
    """
    return remote.publish(
        artefact.pack(policy, repo_id=repo_id), repo_id, private=private, token=token, revision=revision,
        commit_message=commit_message or f"learned-optim policy {policy.fingerprint()}", create_pr=create_pr,
    )  # fmt: skip


def find_folder(name_or_path: str | Path) -> tuple[Path, str] | None:
    """The folder that a name means and what to call it, or ``None`` if it can only be a Hub repository.

    Raises:
        PolicyNotFoundError: it is a path, and no folder is there.
    """
    path = Path(name_or_path).expanduser()
    known = bundled()
    if isinstance(name_or_path, Path) or _like_a_path(name_or_path):
        if path.is_dir():
            return path, str(name_or_path)
        found = "is a file, not a folder" if path.exists() else "does not exist"
        raise PolicyNotFoundError(f"{name_or_path} {found}: give the folder that holds the policy's {CONFIG}")
    if name_or_path in known:
        return known[name_or_path], f"bundled:{name_or_path}"
    return (path, name_or_path) if name_or_path and (path / CONFIG).is_file() else None


def _like_a_path(name: str) -> bool:
    ends = ("/",) if os.sep == "/" else ("/", os.sep)
    starts = tuple(dots + end for dots in ("", ".", "..") for end in ends)
    return name.startswith((*starts, "~")) or name in (".", "..") or name.endswith(ends) or os.path.isabs(name)


def _repository(name: str, revision: str | None) -> tuple[str, str | None]:
    try:
        return remote.parse_repository(name, revision)
    except UnknownPolicyError:
        if name and Path(name).is_dir():
            raise PolicyNotFoundError(f"{name} is not a learned-optim policy: it holds no {CONFIG}") from None
        known = bundled()
        near = difflib.get_close_matches(name, known, n=1)
        raise UnknownPolicyError(
            f"unknown policy {name!r}{f', did you mean {near[0]!r}?' if near else ':'} bundled policies are "
            f"{', '.join(map(repr, known)) or 'none'}; else give a folder (./name) or a Hub repository (owner/name)"
        ) from None


def _no_revision(revision: str | None, source: str) -> None:
    if revision is not None:
        raise ValueError(f"revision={revision!r} was given, but {source} is no Hub repository: nothing else has any")
