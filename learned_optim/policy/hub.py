"""Files to and from the Hugging Face Hub. Needs no torch.

``huggingface_hub`` is imported within the functions: a policy that comes with the package or lies in a folder is
loaded without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from learned_optim.policy.errors import (
    CachedPolicyWarning,
    HubConnectionError,
    HubPermissionError,
    InvalidPolicyError,
    PolicyNotFoundError,
    UnknownPolicyError,
)
from learned_optim.policy.filenames import CARD, CONFIG, LIMITS, RESULTS, WEIGHTS
from learned_optim.policy.hub_errors import CLIENT, LOG_IN, translated

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

#: What may become a file's name in the cache: the client makes paths of these headers as they come.
_SAFE_NAME = re.compile(r"(?!\.\.?$)[\w.+=:-]{1,200}", re.ASCII)

_REPOSITORY = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?", re.ASCII)

#: Seconds before the first question to the Hub is asked again, after an answer that says to try later.
_WAITS = (1.0, 2.0)


@dataclasses.dataclass(frozen=True)
class PullOptions:
    """How to pull; the arguments of :meth:`learned_optim.Policy.from_pretrained` by these names."""

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False


class Pulled(NamedTuple):
    """A repository's policy files in the local cache."""

    folder: Path
    commit: str  #: hash of the commit that all of them are from


def parse_repository(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """``owner/name`` and revision, from ``owner/name`` or ``owner/name@revision``.

    Raises:
        UnknownPolicyError: ``name`` has another form.
        ValueError: ``revision`` is given as well and is not the same.
    """
    match = _REPOSITORY.fullmatch(name)
    if match is None:
        raise UnknownPolicyError(f"{name!r} is not a Hub repository: give owner/name, or owner/name@revision")
    if match["revision"] and revision and match["revision"] != revision:
        raise ValueError(f"two revisions were given, {revision!r} and the one in {name!r}: give one")
    return match["repo"], match["revision"] or revision


def fetch(repo_id: str, revision: str | None, options: PullOptions, *, with_card: bool = False) -> Pulled:
    """Bring the policy in a repository into the local cache, all files from one commit.

    Args:
        repo_id: ``owner/name``.
        revision: branch, tag or commit; ``None`` is the main branch.
        options: see there.
        with_card: bring the model card as well, which loading does not need.

    Raises:
        PolicyError: one of :mod:`learned_optim.policy.errors`; what the Hub's client raised is the ``__cause__``.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not options.local_files_only:
        options = dataclasses.replace(options, local_files_only=True)
        why = "HF_HUB_OFFLINE is set: unset it"
    else:
        why = "local_files_only is set: leave it out"
    if options.local_files_only and options.force_download:
        raise ValueError(f"force_download cannot be done while {why}")
    repository = _Repository(repo_id, revision, options)
    warning = None
    if not options.local_files_only:
        try:
            repository.check_headers(CONFIG, revision)
        except HubConnectionError as error:
            if options.force_download:
                raise
            # A cluster without network, or a Hub that is down, must not stop a run whose policy lies in the cache.
            warning = error
            repository = _Repository(repo_id, revision, dataclasses.replace(options, local_files_only=True))
    try:
        folder = repository.download(CONFIG, revision).parent
        commit = folder.name
        repository.download(WEIGHTS, commit)
        for name in (RESULTS, CARD) if with_card else (RESULTS,):
            with contextlib.suppress(PolicyNotFoundError):  # whether it may be missing, config.json says
                repository.download(name, commit)
    except _NotCachedError as error:
        if warning is not None:
            raise warning from warning.__cause__
        at = f" at revision {revision}" if revision else ""
        raise PolicyNotFoundError(
            f"{repo_id}{at} is not in the local cache, and {why} once, with a connection, to pull it"
        ) from error.__cause__
    if warning is not None:
        message = f"{warning}; using the copy of {repo_id} in the cache, commit {commit}"
        warnings.warn(message, CachedPolicyWarning, stacklevel=4)  # where from_pretrained was called
    return Pulled(folder, commit)


class _NotCachedError(PolicyNotFoundError):
    """The file is not in the cache, and the network was not to be used."""


@dataclasses.dataclass(frozen=True)
class _Repository:
    """A repository to pull from; every request is made with the same options."""

    repo_id: str
    revision: str | None
    options: PullOptions

    def check_headers(self, name: str, revision: str | None) -> None:
        """Refuse, before it is downloaded, a file that is too large or whose headers lead out of the cache.

        The first question that a pull asks the Hub.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if self._in_cache(name, revision):
            return
        url = hf_hub_url(self.repo_id, name, revision=revision)
        for wait in (*_WAITS, None):
            try:
                with self._translated():
                    metadata = get_hf_file_metadata(url, token=self.options.token, **CLIENT)
                break
            except HubConnectionError as error:
                status = getattr(getattr(error.__cause__, "response", None), "status_code", 0)
                if wait is None or (status != 429 and status < 500):
                    raise
                time.sleep(wait)
        for header, value in (("ETag", metadata.etag), ("X-Repo-Commit", metadata.commit_hash)):
            if value is not None and not _SAFE_NAME.fullmatch(value):
                raise InvalidPolicyError(
                    f"{self.repo_id} is refused: the server's {header} for {name} is no name of a file, {value!r:.80}"
                )
        size, limit = metadata.size, LIMITS[name]
        if size is not None and size > limit:
            raise InvalidPolicyError(
                f"{self.repo_id} is refused: {name} has {size} bytes, more than the limit, {limit}"
            )

    def download(self, name: str, revision: str | None) -> Path:
        """Path of the file in the cache, downloaded if it is not there."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        if self.options.force_download:
            # The client downloads, but leaves an entry of the cache that points to other contents as it is.
            cached = try_to_load_from_cache(self.repo_id, name, self.options.cache_dir, revision)
            if isinstance(cached, str):
                Path(cached).unlink()
        if name != CONFIG and not self.options.local_files_only:
            self.check_headers(name, revision)
        with self._translated():
            path = hf_hub_download(self.repo_id, name, revision=revision, **dataclasses.asdict(self.options), **CLIENT)
        return Path(path)

    def _in_cache(self, name: str, revision: str | None) -> bool:
        from huggingface_hub import try_to_load_from_cache

        if self.options.force_download or not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
            return False  # a branch or a tag may have moved
        return isinstance(try_to_load_from_cache(self.repo_id, name, self.options.cache_dir, revision), str)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            yield
        except LocalEntryNotFoundError as error:
            cause = error.__cause__
            if not isinstance(cause, Exception):
                raise _NotCachedError(str(error)) from error
            raise translated(cause, self.repo_id, self.revision, self.options.token) from cause
        except Exception as error:
            ours = translated(error, self.repo_id, self.revision, self.options.token)
            if ours is error:
                raise
            raise ours from error


def publish(
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Commit ``files`` to a repository; arguments and errors are those of :meth:`learned_optim.Policy.push_to_hub`.

    What the Hub's client raised is the ``__cause__``.
    """
    repo_id = check_can_push(repo_id, token)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, **CLIENT)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()
    ]
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if RESULTS not in files and api.file_exists(repo_id, RESULTS, revision=revision):
            operations.append(CommitOperationDelete(RESULTS))  # those of the policy published there before
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except Exception as error:
        ours = translated(error, repo_id, revision, token, push=True)
        if ours is error:
            raise
        raise ours from error


def check_can_push(repo_id: str, token: str | bool | None = None) -> str:
    """``repo_id``, if nothing that can be known without asking the Hub stands against a push.

    Raises:
        UnknownPolicyError: ``repo_id`` is not ``owner/name``.
        HubConnectionError: offline mode.
        HubPermissionError: no token.
    """
    name, revision = parse_repository(repo_id)
    if revision is not None:
        raise ValueError(f"to push to a branch of {name}, give it as revision, not in the repository's name")
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubConnectionError(f"cannot push to {name} while HF_HUB_OFFLINE is set: unset it")
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise HubPermissionError(f"not logged in, so {name} cannot be pushed to: {LOG_IN}")
    return name
