"""Loading a policy executes nothing, writes nothing outside the cache, and speaks to nobody but the Hub."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.hub_clients import ROOT, Clients, Finished
from helpers.loopback_hub import Fault, LoopbackHub
from helpers.small_runs import final_bytes, settings, train
from learned_optim import LearnedOptimizer, Policy
from learned_optim.meta_train.checkpoint import CURRENT, PREVIOUS
from learned_optim.policy import files as policy_files
from learned_optim.policy.errors import InvalidPolicyError, PolicyNotFoundError
from learned_optim.policy.files import CONFIG, LIMITS, RESULTS, WEIGHTS, write_atomically

#: Loads twice under the eyes of an audit hook: what runs and what is written counts the second time only, when the
#: modules that are imported late are there; the connection to the Hub is made the first time and kept.
AUDITED = """
import json, os, sys
import torch
from learned_optim import LearnedOptimizer, Policy

def load(name):
    policy = Policy.from_pretrained(name, force_download={force})
    LearnedOptimizer([torch.zeros(3, requires_grad=True)], policy=policy, backend="eager")

seen, watching = [], [False]
CODE = ("exec", "compile", "marshal.", "pickle.", "code.", "function.", "ctypes.dl", "os.exec", "os.fork",
        "os.posix_sp", "os.spawn", "os.system", "subprocess.", "import", "sys.setprofile", "sys.settrace")
NET = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "urllib.")
FILES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown",
         "os.truncate", "os.utime", "shutil.")

def hook(event, arguments):
    if event.startswith(NET):
        seen.append(("net", repr(arguments[1] if event == "socket.connect" else arguments)))
    elif not watching[0]:
        return
    elif event == "open":
        path, mode, flags = arguments
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & writing:
            seen.append(("write", os.path.abspath(os.fsdecode(path))))
    elif event.startswith(CODE):
        seen.append(("code", event + " " + repr(arguments)[:100]))
    elif event.startswith(FILES):
        if event in ("os.symlink", "os.link"):  # the first is what the link says, no file that is touched
            arguments = arguments[1:]
        base = os.getcwd()
        if event in ("os.remove", "os.rmdir") and arguments[-1] >= 0:
            base = os.readlink(f"/proc/self/fd/{{arguments[-1]}}")
        for path in (a for a in arguments if isinstance(a, (str, bytes)) and a):
            seen.append(("write", os.path.normpath(os.path.join(base, os.fsdecode(path)))))

sys.addaudithook(hook)
load({first!r})
watching[0] = True
load({second!r})
honest = list(seen)
exec("1")
open(os.path.join({proof!r}, "proof"), "w").close()
watching[0] = False
print(json.dumps([honest, seen[len(honest):]]))
"""


def audited(output: str) -> list[list[str]]:
    """What was seen while a policy was loaded; and the hook is one that would have seen code and files."""
    honest, planted = json.loads(output)
    assert {"code", "write"} <= {kind for kind, _ in planted}
    return honest


def trained(seed: int) -> dict[str, bytes]:
    policy = Policy()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return policy_files.pack(policy.config, policy.weights(), {"training": {"method": "test"}})


def put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    running = Clients(tmp_path_factory.mktemp("clients"))
    yield running
    running.close()


def test_loading_from_a_folder_executes_nothing_connects_nowhere_and_writes_nothing(tmp_path):
    first, second = put(trained(0), tmp_path / "first"), put(trained(1), tmp_path / "second")
    code = AUDITED.format(first=str(first), second=str(second), force=False, proof=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert audited(done.stdout) == []


def test_loading_from_the_hub_executes_nothing_connects_to_it_alone_and_writes_in_the_cache_alone(
    hub, clients, tmp_path
):
    hub.add("alice/first", trained(0))
    hub.add("alice/second", trained(1))
    home = tmp_path / "home"
    code = AUDITED.format(first="alice/first", second="alice/second", force=True, proof=str(tmp_path))
    seen = audited(clients.run(code, hub.environment(home)).output())
    kinds = {kind for kind, _ in seen}
    assert "net" in kinds, "the hook saw no connection: it watches nothing"
    assert "write" in kinds
    host, port = hub.url.removeprefix("http://").split(":")
    for kind, what in seen:
        if kind == "net":
            assert host in what, what
            assert port in what, what
        elif kind == "write":
            assert Path(what).is_relative_to(home) or what == os.devnull, what
        else:
            raise AssertionError(f"loading ran code: {what}")


# --- a server that lies --------------------------------------------------------------------------------------------

PULL = """
from learned_optim import Policy
try:
    Policy.from_pretrained({name!r})
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ETag", '"../../../../escaped"'),
        ("ETag", '"../escaped"'),
        ("ETag", '".."'),
        ("ETag", '"a/../../../../../escaped"'),
        ("X-Linked-Etag", '"../../../../escaped"'),
        ("X-Repo-Commit", "../../../../escaped"),
        ("X-Repo-Commit", ".."),
    ],
)
def test_headers_that_lead_out_of_the_cache_are_refused_and_nothing_is_written(header, value, hub, clients, tmp_path):
    hub.add("alice/policy", trained(0))
    hub.faults.append(Fault(r"alice/policy/resolve", headers={header: value}))
    home = tmp_path / "deep" / "er" / "home"
    done: Finished = clients.run(PULL.format(name="alice/policy"), hub.environment(home))
    assert re.match(rf"InvalidPolicyError alice/policy is refused: the server's {header.replace('Linked-Etag', '')}"
                    if "Linked" not in header else "InvalidPolicyError alice/policy is refused: the server's ETag",
                    done.output())  # fmt: skip
    assert not list(tmp_path.rglob("*escaped*"))
    assert not list(home.rglob(WEIGHTS))


@pytest.mark.parametrize("name", ["../../alice/policy", "alice/../policy", "alice/policy/../..", "alice/.."])
def test_names_that_lead_elsewhere_are_no_repositories(name):
    with pytest.raises((PolicyNotFoundError, ValueError)):
        Policy.from_pretrained(name)


@pytest.mark.parametrize("other", ["../evil.py", "/etc/evil", "evil.py", "learned_optim.py", "model.bin"])
def test_other_files_of_a_repository_are_not_even_asked_for(other, hub, clients, tmp_path):
    hub.add("alice/policy", {**trained(0), other: b"raise SystemExit('executed')"})
    assert clients.run(PULL.format(name="alice/policy"), hub.environment(tmp_path / "home")).output() == ""
    asked = {request.rsplit("/", 1)[1] for request in hub.requests}
    assert asked <= {CONFIG, WEIGHTS, RESULTS}
    assert not list((tmp_path / "home").rglob("*evil*"))


# --- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, RESULTS])
def test_a_link_to_something_else_is_refused_without_repeating_what_it_holds(name, tmp_path):
    folder = put(trained(0), tmp_path / "policy")
    secret = tmp_path / "secret"
    secret.write_text("the secret of the house")
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(InvalidPolicyError) as caught:
        Policy.from_pretrained(folder)
    assert "secret of the house" not in str(caught.value)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices")
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_devices_and_pipes_are_not_read(name, tmp_path):
    for what in ("device", "pipe"):
        folder = put(trained(0), tmp_path / what)
        (folder / name).unlink()
        if what == "device":
            (folder / name).symlink_to("/dev/zero")
        else:
            os.mkfifo(folder / name)
        with pytest.raises(PolicyNotFoundError, match="holds no"):
            Policy.from_pretrained(folder)


def test_a_file_that_is_larger_than_any_policy_is_not_read_to_its_end(tmp_path):
    folder = put(trained(0), tmp_path / "policy")
    with open(folder / WEIGHTS, "r+b") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(InvalidPolicyError, match=f"larger than {LIMITS[WEIGHTS] // 1_000_000} MB"):
        Policy.from_pretrained(folder)


def test_saving_replaces_links_and_does_not_write_through_them(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.write_text("untouched")
    folder = tmp_path / "policy"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS, "README.md"):
        (folder / name).symlink_to(target)
    Policy().save_pretrained(folder)
    assert Policy.from_pretrained(folder)
    temporary = folder / ".checkpoint.pt.guessed.tmp"
    for path in (folder / "checkpoint.pt", temporary):
        path.symlink_to(target)
    with monkeypatch.context() as patched:
        patched.setattr(policy_files, "temporary_path", lambda path: temporary)
        with pytest.raises(FileExistsError):
            write_atomically(folder / "checkpoint.pt", b"new")
    write_atomically(folder / "checkpoint.pt", b"new")
    assert (folder / "checkpoint.pt").read_bytes() == b"new"
    assert not (folder / "checkpoint.pt").is_symlink()
    assert target.read_text() == "untouched"


# --- pickles -------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_the_checkpoint_of_a_run_cannot_execute_anything(tmp_path):
    config = settings(outer_steps=2)
    train(config, tmp_path / "run")
    state = torch.load(tmp_path / "run" / CURRENT, weights_only=True)  # holds nothing but tensors and plain values
    expected = final_bytes(tmp_path / "run")
    proof = tmp_path / "executed"
    torch.save({**state, "before": Malicious(proof)}, tmp_path / "run" / CURRENT)
    (tmp_path / "run" / PREVIOUS).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"no checkpoint can be read: .*UnpicklingError"):
        train(config, tmp_path / "run", resume=True)
    assert not proof.exists()
    (tmp_path / "run" / CURRENT).write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        train(config, tmp_path / "run", resume=True)
    assert not proof.exists()
    assert final_bytes(tmp_path / "run") == expected


def test_the_optimizers_state_loads_with_weights_only(tmp_path):
    p = torch.zeros(3, requires_grad=True)
    optimizer = LearnedOptimizer([p], backend="eager")
    p.grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))


def test_no_module_of_the_package_unpickles_or_evaluates():
    """Every place where torch.load is called is known to be safe; nothing else reads pickles."""
    loads = []
    for path in (ROOT / "learned_optim").rglob("*.py"):
        text = path.read_text()
        assert not re.search(
            r"(?<![\w.])(eval|exec)\(|pickle\.loads?\(|__import__\(|os\.system|allow_pickle=True", text
        ), path
        loads += re.findall(r"torch\.load\([^\n]*", text)
    assert loads
    assert all("weights_only=True" in call for call in loads)
