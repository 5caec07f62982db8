"""What the name of a policy means. The order is that of :meth:`learned_optim.Policy.from_pretrained`.

``huggingface_hub`` is imported only for repositories: bundled policies and folders need no network.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from learned_optim.policy.errors import PolicyError, PolicyNotFoundError, UnknownPolicyError
from learned_optim.policy.filenames import CONFIG
from learned_optim.policy.files import StoredPolicy, read
from learned_optim.policy.hub import PullOptions, fetch, parse_repository


def bundled() -> dict[str, Path]:
    """Folders of the policies that come with the package, by name."""
    # A wheel has them within the package, an editable install beside it.
    for parent in Path(__file__).parents[1:3]:
        if (parent / "pretrained").is_dir():
            return {p.name: p for p in sorted((parent / "pretrained").iterdir()) if (p / CONFIG).is_file()}
    return {}


def resolve(name_or_path: str | Path, revision: str | None, options: PullOptions) -> StoredPolicy:
    """What is stored under a name; arguments and errors are those of :meth:`learned_optim.Policy.from_pretrained`."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"a policy is a name, a path or a Policy, found {type(name_or_path).__name__}")
    folder = _folder(name_or_path)
    if folder is not None:
        path, source = folder
        refuse_revision(revision, source)
        return read(path, source)
    repo_id, revision = _repository(str(name_or_path), revision)
    try:
        pulled = fetch(repo_id, revision, options)
    except PolicyError as error:
        if not Path(name_or_path).is_dir():
            raise
        # `run/best` before anything was saved there looks like a repository.
        hint = f"{error}; and the folder {name_or_path} that exists here holds no {CONFIG}"
        raise type(error)(hint) from error.__cause__
    return read(pulled.folder, f"{repo_id}@{pulled.commit}")


def refuse_revision(revision: str | None, source: str) -> None:
    """Raise ``ValueError`` if a revision was given for what has none."""
    if revision is not None:
        raise ValueError(f"revision={revision!r} was given, but {source} is no Hub repository: nothing else has any")


def _folder(name_or_path: str | Path) -> tuple[Path, str] | None:
    """The folder that a name means and what to call it, or ``None`` if it can only be a Hub repository."""
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, Path) or _like_a_path(name_or_path):
        if path.is_dir():
            return path, str(name_or_path)
        problem = "is a file, not a folder" if path.exists() else "does not exist"
        raise PolicyNotFoundError(f"{name_or_path} {problem}: give the folder that holds the policy's {CONFIG}")
    known = bundled()
    if name_or_path in known:
        return known[name_or_path], f"bundled:{name_or_path}"
    return (path, name_or_path) if name_or_path and (path / CONFIG).is_file() else None


def _like_a_path(name: str) -> bool:
    ends = ("/",) if os.sep == "/" else ("/", os.sep)
    starts = tuple(dots + end for dots in ("", ".", "..") for end in ends)
    return name.startswith((*starts, "~")) or name in (".", "..") or name.endswith(ends) or os.path.isabs(name)


def _repository(name: str, revision: str | None) -> tuple[str, str | None]:
    try:
        return parse_repository(name, revision)
    except UnknownPolicyError:
        if name and Path(name).is_dir():
            raise PolicyNotFoundError(f"{name} is not a learned-optim policy: it holds no {CONFIG}") from None
        known = bundled()
        near = difflib.get_close_matches(name, known, n=1)
        raise UnknownPolicyError(
            f"unknown policy {name!r}{f', did you mean {near[0]!r}?' if near else ':'} bundled policies are "
            f"{', '.join(map(repr, known)) or 'none'}; else give a folder (./name) or a Hub repository (owner/name)"
        ) from None
