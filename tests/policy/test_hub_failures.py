"""Every way in which a pull or a push fails: its own sentence, the right exception, one line from the command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers.hub_clients import Clients
from helpers.loopback_hub import OWNER, READER, Fault, LoopbackHub
from learned_optim import Policy
from learned_optim.policy import files as policy_files
from learned_optim.policy.files import CONFIG, WEIGHTS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="clients are forked")

GOOD = policy_files.pack(Policy().config, Policy().weights())
#: The command first, then the same from Python: the one must not print more than its line, the other must raise.
CLIENT = """
import json
import learned_optim.policy.hub
learned_optim.policy.hub._WAITS = (0.05, 0.05)
from learned_optim import Policy
from learned_optim.cli import main
status = main({arguments!r})
try:
    {call}
except Exception as error:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    print(json.dumps([status, kinds, str(error), type(error.__cause__).__name__]))
"""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is asked, who asks, and what is said.

    Args:
        kind: the built-in exception it must be.
        sentence: pattern of the whole message; ``REPO`` stands for the repository.
        files: of the repository; ``None`` for no repository.
        name: what is pulled, or pushed to.
        push: extra arguments of a push, or ``None`` for a pull.
        fault: what the Hub does wrong with requests for the repository.
        cause: name of the exception underneath; ``None`` if it does not matter.
    """

    kind: type[Exception]
    sentence: str
    files: dict[str, bytes] | None = dataclasses.field(default_factory=lambda: GOOD)
    name: str = "REPO"
    push: tuple[str, ...] | None = None
    token: str | None = None
    fault: Fault | None = None
    private: bool = False
    gated: bool = False
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    cause: str | None = None
    pull: tuple[str, ...] = ()


def forged(tensors: Callable[[dict[str, torch.Tensor]], object]) -> dict[str, bytes]:
    """Weights that were changed, under a checksum that fits."""
    from safetensors.torch import save

    weights = {name: weight.detach().clone() for name, weight in Policy().weights().items()}
    tensors(weights)
    return resealed({**GOOD, WEIGHTS: save(weights)})


def resealed(files: dict[str, bytes], **changes: object) -> dict[str, bytes]:
    values = {**json.loads(files[CONFIG]), "weights_sha256": policy_files._sha256(files[WEIGHTS]), **changes}
    values.pop("config_sha256")
    return {**files, CONFIG: policy_files._render({**values, "config_sha256": policy_files._checksum(values)})}


def changed(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


ID = r"\(request id Root=\d+\)"
URL = r"http://127\.0\.0\.1:\d+"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
MISSING = "REPO does not exist on the Hub or is private: check the name, and if it is private "
FAILURES = {
    "no repository": Failure(
        FileNotFoundError, f"{MISSING}{LOG_IN}", files=None, cause="RepositoryNotFoundError",
    ),
    "private": Failure(
        FileNotFoundError, f"{MISSING}see that the token may read it", private=True, token="hf_other",
        cause="RepositoryNotFoundError",
    ),
    "gated": Failure(
        PermissionError, f"REPO is gated: ask for access at {URL}/REPO, and {LOG_IN}", gated=True,
        cause="GatedRepoError",
    ),
    "no revision": Failure(
        FileNotFoundError, f"REPO has no revision 'v9': see {URL}/REPO/tree/main for those it has", name="REPO@v9",
        cause="RevisionNotFoundError",
    ),
    "two revisions": Failure(
        ValueError, "two revisions were given, 'v1' and the one in 'REPO@v2': give one", name="REPO@v2",
        pull=("--revision", "v1"),
    ),
    "no config": Failure(
        FileNotFoundError, "REPO is not a learned-optim policy: it holds no config.json", files={"x": b""},
        cause="RemoteEntryNotFoundError",
    ),
    "no weights": Failure(
        FileNotFoundError, "REPO is not a learned-optim policy: it holds no model.safetensors",
        files={CONFIG: GOOD[CONFIG]}, cause="RemoteEntryNotFoundError",
    ),
    "only pickles": Failure(
        FileNotFoundError, "REPO is not a learned-optim policy: it holds no model.safetensors, only pytorch_model.bin, "
        "and pickled weights are never loaded: they can run code",
        files={CONFIG: GOOD[CONFIG], "pytorch_model.bin": b""}, cause="RemoteEntryNotFoundError",
    ),
    "foreign model": Failure(
        ValueError, r'REPO@\w{40} is refused: config.json was not written by learned-optim \(no "library": '
        r'"learned_optim" in it\)', files={**GOOD, CONFIG: policy_files._render({"model_type": "bert"})},
    ),
    "newer": Failure(
        ValueError, r"REPO@\w{40} is refused: made by learned-optim 9\.0 in policy format 99, and this is "
        r"learned-optim [\d.]+, which reads formats up to 1: upgrade, in the clone with `git pull && pip install \.`",
        files=resealed(GOOD, format_version=99, library_version="9.0"),
    ),
    "edited": Failure(
        ValueError, r"REPO@\w{40} is refused: config.json was damaged or edited after it was written .*",
        files={**GOOD, CONFIG: GOOD[CONFIG].replace(b"4.5", b"4.6")},
    ),
    "unknown key": Failure(
        ValueError, r"REPO@\w{40} is refused: config.json: missing keys \[\], unknown keys \['auto_map'\]",
        files=resealed(GOOD, auto_map="x"),
    ),
    "out of range": Failure(
        ValueError, r"REPO@\w{40} is refused: config.json: PolicyConfig.caution must be in \[0, 1\], found 2.0",
        files=resealed(GOOD, caution=2.0),
    ),
    "tensor missing": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors lacks the tensors \['head'\]",
        files=forged(lambda w: w.pop("head")),
    ),
    "tensor too many": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors holds tensors that do not belong there: \['x'\]",
        files=forged(lambda w: w.update(x=torch.ones(1))),
    ),
    "misshapen": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors: tensor 'amplitude' is F32 \[3\], expected F32 \[7\]",
        files=forged(lambda w: w.update(amplitude=torch.ones(3))),
    ),
    "other dtype": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors: tensor 'amplitude' is F64 \[7\], expected F32 \[7\]",
        files=forged(lambda w: w.update(amplitude=torch.ones(7).double())),
    ),
    "not finite": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors: tensor 'head' holds values that are not finite",
        files=forged(lambda w: w["head"].fill_(float("nan"))),
    ),
    "too large": Failure(
        ValueError, "REPO is refused: model.safetensors has 50000001 bytes, more than the limit, 50000000",
        fault=Fault("safetensors", headers={"X-Linked-Size": "50000001"}),
    ),
    "damaged on the way": Failure(
        ValueError, r"REPO@\w{40} is refused: model.safetensors is damaged or was replaced \(its sha256 is not the one "
        r"in config.json\): get it again with force_download=True", fault=Fault("GET .*safetensors", body=changed),
    ),
    "shorter than announced": Failure(
        ConnectionError, "damaged download: the connection was cut while REPO was transferred: try again",
        fault=Fault("GET .*safetensors", body=lambda data: data[:-9],
                    headers={"Content-Length": str(len(GOOD[WEIGHTS]) - 9)}),
    ),
    "cut, always": Failure(
        ConnectionError, "the connection was cut while REPO was transferred: try again",
        fault=Fault("GET .*safetensors", cut=500), cause="RemoteProtocolError",
    ),
    "error 500": Failure(
        ConnectionError, f"cannot pull REPO: the Hub failed with error 500 {ID}: try again later",
        fault=Fault("", status=500), cause="HfHubHTTPError",
    ),
    "error 503": Failure(
        ConnectionError, f"cannot pull REPO: the Hub failed with error 503 {ID}: try again later",
        fault=Fault("", status=503), cause="HfHubHTTPError",
    ),
    "error 429": Failure(
        ConnectionError, f"cannot pull REPO: too many requests {ID}: wait some minutes and try again",
        fault=Fault("", status=429), cause="HfHubHTTPError",
    ),
    "error 403": Failure(
        PermissionError, f"cannot pull REPO: the Hub denies permission {ID}: use a token that may read it",
        fault=Fault("", status=403), cause="HfHubHTTPError",
    ),
    "error 404": Failure(
        FileNotFoundError, f"cannot pull REPO: not found on the Hub {ID}: check the name",
        fault=Fault("", status=404), cause="HfHubHTTPError",
    ),
    "error 418": Failure(
        ConnectionError, f"cannot pull REPO: the Hub refused the request with error 418 {ID}: I am a teapot",
        fault=Fault("", status=418, headers={"X-Error-Message": "I am\ta teapot"}), cause="HfHubHTTPError",
    ),
    "wrong token": Failure(
        PermissionError, f"cannot pull REPO: the Hub does not accept the token {ID}: {LOG_IN}", token="hf_wrong",
        cause="HfHubHTTPError",
    ),
    "slow": Failure(
        ConnectionError, f"cannot pull REPO: {URL} did not answer in time: try again, or allow more seconds with "
        "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT", fault=Fault("", wait=3.0), cause="ReadTimeout",
        environment={"HF_HUB_ETAG_TIMEOUT": "1"},
    ),
    "not a Hub": Failure(
        ConnectionError, rf"cannot pull REPO: {URL} does not answer like a Hub \(a header is missing\), check "
        "HF_ENDPOINT and your proxy", fault=Fault("HEAD", headers={"X-Repo-Commit": None}), cause="FileMetadataError",
    ),
    "nobody there": Failure(
        ConnectionError, r"cannot pull REPO: http://127\.0\.0\.1:9 cannot be reached: check the connection and "
        "HF_ENDPOINT", environment={"HF_ENDPOINT": "http://127.0.0.1:9"}, cause="ConnectError",
    ),
    "offline": Failure(
        FileNotFoundError, "REPO is not in the local cache, and HF_HUB_OFFLINE is set: unset it once, with a "
        "connection, to pull it", environment={"HF_HUB_OFFLINE": "1"},
    ),
    "offline and forced": Failure(
        ValueError, "force_download cannot be done while HF_HUB_OFFLINE is set: unset it", pull=("--force-download",),
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    "no repository's name": Failure(
        ValueError, "'REPO/x' is not a Hub repository: give owner/name, or owner/name@revision", name="REPO/x",
        pull=("--pull-only",),
    ),
    "push offline": Failure(
        ConnectionError, "cannot push to REPO while HF_HUB_OFFLINE is set: unset it", push=(), token=OWNER,
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    "push without login": Failure(
        PermissionError, f"not logged in, so REPO cannot be pushed to: {LOG_IN}", push=(),
    ),
    "push with a wrong token": Failure(
        PermissionError, f"cannot push to REPO: the Hub does not accept the token {ID}: {LOG_IN}", push=(),
        token="hf_wrong", cause="HfHubHTTPError",
    ),
    "push without permission": Failure(
        PermissionError, f"cannot push to REPO: the Hub denies permission {ID}: use a token with the right to write "
        "there", push=(), token=READER, cause="HfHubHTTPError",
    ),
    "push to a missing revision": Failure(
        FileNotFoundError, f"REPO has no revision 'refs/pr/7': see {URL}/REPO/tree/main for those it has",
        push=("--revision", "refs/pr/7"), token=OWNER, cause="RevisionNotFoundError",
    ),
    "push at the same time": Failure(
        ConnectionError, f"cannot push to REPO: it was changed at the same time {ID}: try again", push=(), token=OWNER,
        fault=Fault("/commit/", status=412), cause="HfHubHTTPError",
    ),
    "push and error 500": Failure(
        ConnectionError, f"cannot push to REPO: the Hub failed with error 500 {ID}: try again later", push=(),
        token=OWNER, fault=Fault("/commit/", status=500), cause="HfHubHTTPError",
    ),
    "push and nonsense": Failure(
        ConnectionError, rf"cannot push to REPO: {URL} does not answer like a Hub \(its answer cannot be read\), check "
        "HF_ENDPOINT and your proxy", push=(), token=OWNER, fault=Fault("/preupload/", status=200),
        cause="JSONDecodeError",
    ),
    "push and nobody there": Failure(
        ConnectionError, r"cannot push to REPO: http://127\.0\.0\.1:9 cannot be reached: check the connection and "
        "HF_ENDPOINT", push=(), token=OWNER, environment={"HF_ENDPOINT": "http://127.0.0.1:9"}, cause="ConnectError",
    ),
    "push to a name with a revision": Failure(
        ValueError, "to push to a branch of REPO, give it as revision, not in the repository's name", push=(),
        token=OWNER, name="REPO@v1",
    ),
}  # fmt: skip


Outcome = tuple[str, list, str]


@pytest.fixture(scope="module")
def fail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Outcome]]:
    """Make a failure happen; returns what the command printed, what Python raised, and the repository's name."""
    folder = tmp_path_factory.mktemp("failures")
    Policy().save_pretrained(folder / "policy")
    clients = Clients(folder)
    with LoopbackHub() as hub:

        def run(case: str) -> Outcome:
            failure, number = FAILURES[case], list(FAILURES).index(case)
            repo = f"alice/rule{number:02d}"
            if failure.files is not None:
                hub.add(repo, failure.files, private=failure.private, gated=failure.gated)
            hub.faults = [failure.fault] if failure.fault else []
            code = CLIENT.format(arguments=arguments(failure, repo, folder), call=call(failure, repo))
            home = hub.environment(folder / f"home{number}", failure.token, **failure.environment)
            finished = clients.run(code, home)
            return finished.stderr.replace(repo, "REPO"), json.loads(finished.output()), repo

        yield run
    clients.close()


def arguments(failure: Failure, repo: str, folder: Path) -> list[str]:
    name = failure.name.replace("REPO", repo)
    if failure.push is not None:
        return ["push", str(folder / "policy"), name, *failure.push]
    return ["pull", name, *(flag for flag in failure.pull if flag != "--pull-only")]


def call(failure: Failure, repo: str) -> str:
    name = failure.name.replace("REPO", repo)
    flags = failure.pull if failure.push is None else failure.push
    options = ["force_download=True"] if "--force-download" in flags else []
    if "--revision" in flags:
        options.append(f"revision={flags[flags.index('--revision') + 1]!r}")
    if "--pull-only" in flags:
        return f"learned_optim.policy.hub.parse_repository({name!r})"
    if failure.push is not None:
        return f"Policy.from_pretrained('default').push_to_hub({', '.join([repr(name), *options])})"
    return f"Policy.from_pretrained({', '.join([repr(name), *options])})"


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_has_its_sentence_its_exception_and_its_exit_code(case: str, fail: Callable[[str], Outcome]) -> None:
    failure = FAILURES[case]
    printed, (status, kinds, message, cause), repo = fail(case)
    assert status == 1
    assert printed.count("\n") == 1, printed
    assert re.fullmatch(f"learned-optim: {failure.sentence}\n", printed), printed
    assert re.fullmatch(failure.sentence, message.replace(repo, "REPO")), message
    assert failure.kind.__name__ in kinds
    assert failure.cause in (None, cause)


def test_the_sentences_differ() -> None:
    assert len(FAILURES) >= 20
    assert len({failure.sentence for failure in FAILURES.values()}) == len(FAILURES)
