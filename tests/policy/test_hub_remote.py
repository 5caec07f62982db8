"""Push and pull with the real client against a Hub on 127.0.0.1, each client in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hub_clients import ROOT, Clients, Finished, command
from helpers.loopback_hub import OWNER, READER, Fault, LoopbackHub
from learned_optim import Policy
from learned_optim.policy import files as policy_files
from learned_optim.policy.files import CARD, CONFIG, RESULTS, WEIGHTS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="clients are forked")

Client = Callable[..., Finished]

#: Pulls a policy, makes five steps with it, and prints everything that must be the same everywhere.
STEPS = """
import hashlib, json, torch
from learned_optim import LearnedOptimizer
torch.manual_seed(0)
p = torch.nn.Parameter(torch.randn(40, 7))
opt = LearnedOptimizer([p], lr=1e-2, policy={name!r}, revision={revision!r}, backend="eager")
for _ in range(5):
    opt.zero_grad(); (p.cos() * torch.arange(7)).sum().backward(); opt.step()
print(json.dumps({{
    "weights": {{k: v.tolist() for k, v in opt.policy.weights().items()}},
    "fingerprint": opt.policy.fingerprint(), "source": opt.policy.source, "results": opt.policy.results,
    "group": opt.param_groups[0]["policy"],
    "parameters": hashlib.sha256(p.detach().numpy().tobytes()).hexdigest(),
}}))
"""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    running = Clients(tmp_path_factory.mktemp("clients"))
    yield running
    running.close()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path, clients: Clients) -> Client:
    """Run code, or a command given as a tuple, in a process whose cache is ``tmp_path / home``."""

    def run(what: str | tuple[str, ...], home: str, token: str | None = None, **environment: str) -> Finished:
        code = what if isinstance(what, str) else command(*what)
        return clients.run(code, hub.environment(tmp_path / home, token, **environment))

    return run


def trained(folder: Path, seed: int = 0, results: dict[str, Any] | None = None) -> Path:
    """A policy that is not the default one, saved in ``folder``."""
    generator = torch.Generator().manual_seed(seed)
    policy = Policy()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(std=0.1, generator=generator)
    policy.results = results
    policy.save_pretrained(folder)
    return folder


RESULT = {
    "training": {"method": "noise"},
    "evaluation": {"tasks": [{"task": "won", "speedup": 1.5}, {"task": "lost", "speedup": 0.5}]},
}


def test_what_was_pushed_is_what_another_process_pulls(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = trained(tmp_path / "policy", results=RESULT)
    push = ("push", str(folder), "alice/rule")
    first = client(push, "a", OWNER).output()
    commit = hub.repositories["alice/rule"].refs["main"]
    assert f"commit {commit}" in first

    # A branch and a pull request hold other weights; main must not move.
    trained(folder, seed=1)
    client((*push, "--revision", "v2"), "a", OWNER).output()
    trained(folder, seed=2, results=RESULT)
    text = client((*push, "--create-pr"), "a", "hf_other").output()
    assert f"{hub.url}/alice/rule/discussions/1" in text
    refs = hub.repositories["alice/rule"].refs
    assert refs["main"] == commit
    assert set(refs) == {"main", "v2", "refs/pr/1"}

    for number, (name, revision) in enumerate(
        [("alice/rule", "main"), ("alice/rule@v2", "v2"), ("alice/rule", "refs/pr/1"), (f"alice/rule@{commit}", "main")]
    ):
        seed = {"main": 0, "v2": 1, "refs/pr/1": 2}[revision]
        given = revision if name == "alice/rule" and revision != "main" else None
        trained(folder, seed, results=None if revision == "v2" else RESULT)
        wanted = json.loads(client(STEPS.format(name=str(folder), revision=None), "unused").output())
        pulled = json.loads(client(STEPS.format(name=name, revision=given), f"empty{number}").output())
        assert pulled.pop("source") == f"alice/rule@{refs[revision]}"
        assert pulled.pop("group") == f"{wanted['fingerprint']} (alice/rule@{refs[revision]})"
        assert pulled == {key: value for key, value in wanted.items() if key not in ("source", "group")}


def test_a_pull_to_a_folder_copies_the_published_files(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = trained(tmp_path / "policy", results=RESULT)
    client(("push", str(folder), "alice/rule"), "a", OWNER).output()
    out = tmp_path / "out"
    text = client(("pull", "alice/rule", "--out", str(out)), "b").output()
    assert f"policy={str(out)!r}" in text
    published = hub.repositories["alice/rule"].commits[hub.repositories["alice/rule"].refs["main"]]
    for name in (CARD, CONFIG, RESULTS, WEIGHTS):
        assert (out / name).read_bytes() == published[name]
    assert 'policy="alice/rule"' in published[CARD].decode()
    assert Policy.from_pretrained(out).fingerprint() == Policy.from_pretrained(folder).fingerprint()


def test_the_official_command_reads_what_is_pushed(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = trained(tmp_path / "policy", results=RESULT)
    client(("push", str(folder), "alice/rule"), "a", OWNER).output()
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run(
        [str(hf), "download", "alice/rule", "--local-dir", str(tmp_path / "raw")], capture_output=True, text=True,
        env=hub.environment(tmp_path / "c"), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Policy.from_pretrained(tmp_path / "raw").fingerprint() == Policy.from_pretrained(folder).fingerprint()


def test_what_the_raw_client_uploads_is_pulled(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    folder = trained(tmp_path / "policy")
    code = (
        "from huggingface_hub import HfApi; api = HfApi(); api.create_repo('alice/raw', private=True)\n"
        f"api.upload_folder(repo_id='alice/raw', folder_path={str(folder)!r})"
    )
    client(code, "a", OWNER).output()
    pull = ("pull", "alice/raw")
    assert Policy.from_pretrained(folder).fingerprint() in client(pull, "b", READER).output()
    refused = client(pull, "c", "hf_other")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "does not exist on the Hub or is private" in refused.stderr


def test_results_of_an_earlier_policy_do_not_stay(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    for results in (RESULT, None):
        folder = trained(tmp_path / "policy", results=results)
        client(("push", str(folder), "alice/rule"), "a", OWNER).output()
    client(("pull", "alice/rule"), "b").output()
    assert RESULTS not in hub.repositories["alice/rule"].commits[hub.repositories["alice/rule"].refs["main"]]


def test_a_pulled_policy_is_there_without_a_connection(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.add("alice/rule", policy_files.files_in(trained(tmp_path / "policy", results=RESULT)))
    info = ("info", "alice/rule")
    online = client(info, "a").output()
    asked = len(hub.requests)
    assert client(info, "a", HF_HUB_OFFLINE="1").output() == online
    local = (
        "from learned_optim import Policy; print(Policy.from_pretrained('alice/rule', local_files_only=True).source)"
    )
    assert client(local, "a").output().strip() in online
    pinned = online.splitlines()[0]
    assert client(("info", pinned), "a").output() == online
    assert len(hub.requests) == asked, "none of these may ask the Hub"

    # The Hub fails, or nobody answers: the cached copy is used, and that is said.
    hub.faults = [Fault("", status=503)]
    for environment in ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = client(info, "a", **environment)
        assert done.output() == online
        assert done.stderr.count("\n") == 1
        assert f"using the copy of alice/rule in the cache, commit {pinned.partition('@')[2]}" in done.stderr


def test_a_moved_branch_is_seen_and_a_pinned_commit_is_not(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    repository = hub.add("alice/rule", policy_files.files_in(trained(tmp_path / "policy", results=RESULT)))
    old = repository.refs["main"]
    pull = ("pull",)
    client((*pull, "alice/rule"), "a").output()
    repository.commit(policy_files.files_in(trained(tmp_path / "policy", seed=1, results=RESULT)))
    assert repository.refs["main"] in client((*pull, "alice/rule"), "a").output()
    assert old in client((*pull, f"alice/rule@{old}"), "a").output()


def test_a_wrong_etag_cannot_bring_back_old_weights(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    # Under the ETag of a file in the cache the client does not download: it takes the cached one.
    repository = hub.add("alice/rule", policy_files.files_in(trained(tmp_path / "policy", results=RESULT)))
    pull = ("pull", "alice/rule")
    hub.faults = [Fault(r"resolve/.*safetensors", headers={"ETag": '"0000"'})]
    client(pull, "a").output()
    repository.commit(policy_files.files_in(trained(tmp_path / "policy", seed=1, results=RESULT)))
    done = client(pull, "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.safetensors is damaged or was replaced" in done.stderr
    hub.faults = []
    assert repository.refs["main"] in client((*pull, "--force-download"), "a").output()


def test_a_connection_cut_once_is_resumed(hub: LoopbackHub, client: Client, tmp_path: Path) -> None:
    hub.add("alice/rule", policy_files.files_in(trained(tmp_path / "policy")))
    hub.faults = [Fault(r"GET .*safetensors", cut=500, times=1)]
    assert "pulled alice/rule@" in client(("pull", "alice/rule"), "a").output()
    assert sum(request.endswith("safetensors") and "GET" in request for request in hub.requests) == 2


def test_the_example_makes_the_round_trip(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "hub_roundtrip.py")], capture_output=True, text=True,
        env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the same bits" in done.stdout
