"""The Hub's errors, and those of its client, as our exceptions: one sentence that says what to do."""

from __future__ import annotations

import json
from typing import Any

from learned_optim import __version__
from learned_optim.policy.errors import (
    HubConnectionError,
    HubPermissionError,
    PolicyError,
    PolicyNotFoundError,
    UnknownPolicyError,
)
from learned_optim.policy.filenames import CARD, CONFIG, RESULTS, WEIGHTS, why_missing

#: How we introduce ourselves to the Hub.
CLIENT: dict[str, Any] = {"library_name": "learned-optim", "library_version": __version__}
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_CUT = "the connection was cut while {} was transferred: try again"


def translated(
    error: Exception, repo_id: str, revision: str | None, token: str | bool | None, *, push: bool = False
) -> Exception:
    """The exception to raise for ``error``; ``error`` itself if it does not come from the Hub or its client."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, PolicyError):
        return error
    page = f"{constants.ENDPOINT}/{repo_id}"
    doing = f"{'push to' if push else 'pull'} {repo_id}"
    logged_in = isinstance(token, str) or (token is not False and get_token() is not None)
    if isinstance(error, errors.GatedRepoError):  # before RepositoryNotFoundError, of which it is a subclass
        return HubPermissionError(f"{repo_id} is gated: ask for access at {page}, and {LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "see that the token may read it" if logged_in else LOG_IN
        return PolicyNotFoundError(
            f"{repo_id} does not exist on the Hub or is private: check the name, and if it is private {remedy}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        wanted = revision or "main"
        return PolicyNotFoundError(f"{repo_id} has no revision {wanted!r}: see {page}/tree/main for those it has")
    if isinstance(error, errors.EntryNotFoundError):
        missing = _missing_file(error)
        return PolicyNotFoundError(
            f"{repo_id} is not a learned-optim policy: {why_missing(missing, _listing(repo_id, revision, token))}"
        )
    if isinstance(error, errors.HFValidationError):
        return UnknownPolicyError(f"{repo_id!r} is not a Hub repository: {error}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubConnectionError(f"cannot {doing} while HF_HUB_OFFLINE is set: unset it")
    if isinstance(error, errors.FileMetadataError):
        return HubConnectionError(
            f"cannot {doing}: {constants.ENDPOINT} does not answer like a Hub (a header is missing), check HF_ENDPOINT "
            "and your proxy"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error, repo_id, doing, push)
    if isinstance(error, ValueError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        return translated(error.__cause__, repo_id, revision, token, push=push)  # the client's "forced" wrapper
    if isinstance(error, KeyError | json.JSONDecodeError):
        return HubConnectionError(
            f"cannot {doing}: {constants.ENDPOINT} does not answer like a Hub (its answer cannot be read), check "
            "HF_ENDPOINT and your proxy"
        )
    if isinstance(error, RuntimeError) or type(error).__module__ == "hf_xet":  # the transfer of binary files by hf_xet
        reason = " ".join(str(error).split())[:200]
        remedy = "try again, or set HF_HUB_DISABLE_XET=1"
        return HubConnectionError(f"cannot {doing}: the transfer failed ({reason}): {remedy}")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return HubConnectionError(f"damaged download: {_CUT.format(repo_id)}")
    return _transport(error, doing, repo_id)


def _status(error: Any, repo_id: str, doing: str, push: bool) -> Exception:
    """For an answer of the Hub that is an HTTP error without a code of the Hub's own."""
    status = error.response.status_code
    request = f"request id {error.request_id}" if error.request_id else "no request id"
    said = " ".join((error.server_message or "").split())[:200]
    if status == 401:
        return HubPermissionError(f"cannot {doing}: the Hub does not accept the token ({request}): {LOG_IN}")
    if status == 403:
        remedy = "use a token with the right to write there" if push else "use a token that may read it"
        return HubPermissionError(f"cannot {doing}: the Hub denies permission ({request}): {remedy}")
    if status == 404:
        return PolicyNotFoundError(f"cannot {doing}: not found on the Hub ({request}): check the name")
    if status == 429:
        return HubConnectionError(f"cannot {doing}: too many requests ({request}): wait some minutes and try again")
    if status in (409, 412):
        return HubConnectionError(f"cannot {doing}: it was changed at the same time ({request}): try again")
    if status >= 500:
        return HubConnectionError(f"cannot {doing}: the Hub failed with error {status} ({request}): try again later")
    detail = f": {said}" if said else ""
    return HubConnectionError(f"cannot {doing}: the Hub refused the request with error {status} ({request}){detail}")


def _transport(error: Exception, doing: str, repo_id: str) -> Exception:
    """For what the HTTP library raises; by class name, because the client's library is not the same in all versions."""
    from huggingface_hub import constants

    libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if not libraries & {"httpx", "httpx2", "requests", "urllib3"}:
        return error
    names = " ".join(cls.__name__ for cls in type(error).__mro__)
    if "Timeout" in names:
        return HubConnectionError(
            f"cannot {doing}: {constants.ENDPOINT} did not answer in time: try again, or allow more seconds with "
            "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if any(name in names for name in ("RemoteProtocolError", "ReadError", "ChunkedEncodingError", "ProtocolError")):
        return HubConnectionError(_CUT.format(repo_id))
    host = constants.ENDPOINT
    return HubConnectionError(f"cannot {doing}: {host} cannot be reached: check the connection and HF_ENDPOINT")


def _missing_file(error: Exception) -> str:
    path = str(getattr(getattr(error, "response", None), "url", ""))
    return next((name for name in (CONFIG, WEIGHTS, RESULTS, CARD) if path.endswith(name)), CONFIG)


def _listing(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    """Names of the files in the repository, for a better message; empty if the Hub does not say."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi(**CLIENT).model_info(repo_id, revision=revision, token=token, timeout=10)
    except errors.HfHubHTTPError:
        return []
    return [file.rfilename for file in info.siblings or []]
