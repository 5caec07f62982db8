"""Policies as files: what is saved is what is loaded, names mean what the docstring says, and nothing else loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from learned_optim import LearnedOptimizer, Policy, PolicyConfig
from learned_optim.policy import files as policy_files
from learned_optim.policy.errors import InvalidPolicyError, PolicyNotFoundError, UnknownPolicyError
from learned_optim.policy.files import CARD, CONFIG, RESULTS, WEIGHTS
from learned_optim.policy.resolve import bundled

RESULT = {"training": {"method": "set by hand"}, "notes": ["a note"]}


def random_policy(config: PolicyConfig | None = None, seed: int = 0) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(config, generator=generator)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(generator=generator)
    return policy


def python(code: str, **environment: str) -> str:
    """Output of ``code`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("config", [PolicyConfig(), PolicyConfig.adamw(eps=1e-6), PolicyConfig.gru(hidden_size=3)])
def test_a_saved_policy_is_loaded_bit_by_bit(config: PolicyConfig, tmp_path: Path) -> None:
    policy = random_policy(config)
    policy.results = RESULT
    policy.save_pretrained(tmp_path / "new" / "folder")
    loaded = Policy.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == policy.config
    assert loaded.results == RESULT
    assert loaded.fingerprint() == policy.fingerprint()
    for name, weight in policy.weights().items():
        assert torch.equal(loaded.weights()[name], weight)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == [CARD, CONFIG, WEIGHTS, RESULTS]


def test_saving_what_was_loaded_gives_the_same_files(tmp_path: Path) -> None:
    random_policy().save_pretrained(tmp_path / "a", RESULT)
    Policy.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in (CARD, CONFIG, WEIGHTS, RESULTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_saving_over_a_policy_leaves_no_results_of_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("mine")
    random_policy().save_pretrained(tmp_path, RESULT)
    random_policy(seed=1).save_pretrained(tmp_path)
    assert Policy.from_pretrained(tmp_path).results is None
    assert (tmp_path / "train.log").read_text() == "mine"


@pytest.mark.parametrize("writes", range(4))
def test_an_interrupted_save_never_leaves_a_mixture_that_loads(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = random_policy(seed=1), random_policy(seed=2)
    old.save_pretrained(tmp_path, RESULT)
    left, replace = [writes], os.replace

    def fails_later(source: Path, target: Path) -> None:
        if not left[0]:
            raise OSError("the disk is full")
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails_later)
        with pytest.raises(OSError, match="disk is full"):
            new.save_pretrained(tmp_path, {"notes": ["new"]})
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    try:
        loaded = Policy.from_pretrained(tmp_path)
    except InvalidPolicyError:
        return
    assert (loaded.fingerprint(), loaded.results) in [
        (old.fingerprint(), RESULT), (new.fingerprint(), {"notes": ["new"]})
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: p.head.data.fill_(float("nan")), "not finite"),
    (lambda p: p.double(), "torch.float64"),
    (lambda p: setattr(p, "head", torch.nn.Parameter(torch.zeros(2))), "not those of the configuration"),
    (lambda p: setattr(p, "config", PolicyConfig(momentum_weight=1e30)), "'momentum_weight' holds 1e\\+30"),
    (lambda p: setattr(p, "results", {"x": float("inf")}), "not plain JSON"),
    (lambda p: setattr(p, "results", {"x": {1: 0, "1": 0}}), "results.json cannot be read"),
    (lambda p: setattr(p, "results", {"notes": "a"}), "results.notes must be a list of texts"),
])  # fmt: skip
def test_what_could_not_be_loaded_again_is_not_saved(change, message: str, tmp_path: Path) -> None:
    policy = Policy()
    change(policy)
    with pytest.raises(ValueError, match=message):
        policy.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What a name means


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with policies in it, whose ``caution`` tells which they are; the home folder as well."""
    folders = ["default", "mine", "run/best", "owner/name", "run/deep/er", "at@1"]
    for number, folder in enumerate(folders, start=1):
        Policy(PolicyConfig(caution=number / 10)).save_pretrained(tmp_path / folder)
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("name", "caution", "source"), [
    ("./default", 0.1, "./default"),
    ("mine", 0.2, "mine"),
    ("mine/", 0.2, "mine/"),
    ("~/mine", 0.2, "~/mine"),
    ("run/../mine", 0.2, "run/../mine"),
    (Path("mine"), 0.2, "mine"),
    (Path("default"), 0.1, "default"),
    ("run/best", 0.3, "run/best"),
    (Path("run/best"), 0.3, "run/best"),
    ("owner/name", 0.4, "owner/name"),
    ("run/deep/er", 0.5, "run/deep/er"),
    ("at@1", 0.6, "at@1"),
    ("default", PolicyConfig().caution, "bundled:default"),
])  # fmt: skip
def test_folders_and_bundled_names_are_found(work: Path, name: str | Path, caution: float, source: str) -> None:
    policy = Policy.from_pretrained(name)
    assert policy.source == source
    if name != "default":
        assert policy.config.caution == caution
    assert Policy.from_pretrained(str(work / "mine")).config.caution == 0.2


def test_a_policy_object_is_returned_as_it_is() -> None:
    policy = Policy()
    assert Policy.from_pretrained(policy) is policy


@pytest.mark.parametrize(("name", "error", "message"), [
    ("./nope", PolicyNotFoundError, r"\./nope does not exist: give the folder"),
    ("~/nope", PolicyNotFoundError, r"~/nope does not exist"),
    ("../nope/", PolicyNotFoundError, "does not exist"),
    (Path("nope"), PolicyNotFoundError, "nope does not exist"),
    ("./file", PolicyNotFoundError, "is a file, not a folder"),
    ("empty", PolicyNotFoundError, "empty is not a learned-optim policy: it holds no config.json"),
    ("./empty", PolicyNotFoundError, "empty is not a learned-optim policy: it holds no config.json"),
    ("defualt", UnknownPolicyError, r"unknown policy 'defualt', did you mean 'default'\? bundled policies are"),
    ("elementwise", UnknownPolicyError, r"'elementwise': bundled policies are 'default', .*, 'recurrent'; else"),
    ("a/b/c", UnknownPolicyError, "unknown policy 'a/b/c'"),
    ("", UnknownPolicyError, "unknown policy ''"),
    ("-a/b", UnknownPolicyError, "unknown policy '-a/b'"),
    ("a b/c", UnknownPolicyError, "unknown policy 'a b/c'"),
    (None, TypeError, "found NoneType"),
])  # fmt: skip
def test_what_is_not_there_is_said(work: Path, name, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        Policy.from_pretrained(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["default", "mine", Path("mine"), Policy()])
def test_only_repositories_have_revisions(work: Path, name) -> None:
    with pytest.raises(ValueError, match="revision='v1' was given"):
        Policy.from_pretrained(name, revision="v1")


def test_the_optimizer_takes_every_kind_of_name(work: Path) -> None:
    for policy in ("default", "run/best", "./mine", Path("mine"), Policy()):
        optimizer = LearnedOptimizer([torch.nn.Parameter(torch.ones(3))], policy=policy)
        text = optimizer.param_groups[0]["policy"]
        assert Policy.from_pretrained(policy).fingerprint() in text
        assert Policy.from_pretrained(policy).source in text


# What is refused


def rewrite(folder: Path, change, *, reseal: bool = True) -> None:
    """Edit ``config.json``; with ``reseal`` as a forger would, so that its checksum fits."""
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    if reseal:
        values.pop("config_sha256", None)
        values["config_sha256"] = policy_files._checksum(values)
    (folder / CONFIG).write_bytes(policy_files._render(values))


def reweigh(folder: Path, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """Replace the weights, and the checksum of the weights."""
    from safetensors.torch import save

    data = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / WEIGHTS).write_bytes(data)
    rewrite(folder, lambda values: values.update(weights_sha256=policy_files._sha256(data)))


def weights(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    changed = {**{name: weight.detach() for name, weight in Policy().weights().items()}, **changes}
    return {name: weight for name, weight in changed.items() if weight is not None}


REFUSED = {
    "edited": (lambda f: rewrite(f, lambda v: v.update(step_scale=9.0), reseal=False), "damaged or edited"),
    "reformatted": (lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace("\n", "")), "not laid out"),
    "newer": (lambda f: rewrite(f, lambda v: v.update(format_version=99, library_version="7.1"), reseal=False),
              r"made by learned-optim 7\.1 in policy format 99.*upgrade, in the clone with `git pull"),
    "foreign": (lambda f: (f / CONFIG).write_bytes(policy_files._render({"model_type": "bert"})), "not written by"),
    "unknown key": (lambda f: rewrite(f, lambda v: v.update(extra=1)), r"unknown keys \['extra'\]"),
    "missing key": (lambda f: rewrite(f, lambda v: v.pop("eps")), r"missing keys \['eps'\]"),
    "no checksum": (lambda f: rewrite(f, lambda v: v.pop("weights_sha256")), r"lacks the keys \['weights_sha256'\]"),
    "bad checksum": (lambda f: rewrite(f, lambda v: v.update(weights_sha256="x")), "64 hexadecimal digits"),
    "wrong type": (lambda f: rewrite(f, lambda v: v.update(eps="1")), "key 'eps' must hold float"),
    "out of range": (lambda f: rewrite(f, lambda v: v.update(eps=-1.0)), "eps must be 0 or more"),
    "beyond floats": (lambda f: rewrite(f, lambda v: v.update(eps=10**400)), r"'eps' holds 10+, beyond \+-1e\+09"),
    "NaN": (lambda f: (f / CONFIG).write_text('{"eps": NaN}'), "NaN is not a number"),
    "deep": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read"),
    "a list": (lambda f: (f / CONFIG).write_text("[]\n"), "does not hold an object"),
    "not UTF-8": (lambda f: (f / CONFIG).write_bytes(b"\xff{}"), "cannot be read"),
    "large config": (lambda f: (f / CONFIG).write_bytes(b" " * 1_000_001), "larger than 1 MB"),
    "large weights": (lambda f: os.truncate(f / WEIGHTS, 50_000_001), "larger than 50 MB"),
    "other weights": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "its sha256 is not the one in config.json"),
    "other results": (lambda f: (f / RESULTS).write_text("{}\n"), "results.json is damaged or was replaced"),
    "results from elsewhere": (lambda f: rewrite(f, lambda v: v.update(results_sha256=None)), "does not belong to it"),
    "not safetensors": (lambda f: reweigh(f, b"\x80\x04K\x01."), "not a readable safetensors file"),
    "huge header": (lambda f: reweigh(f, b"\xff" * 7 + b"\x7f{}"), "not a readable safetensors file"),
    "missing tensor": (lambda f: reweigh(f, weights(head=None)), r"lacks the tensors \['head'\]"),
    "extra tensor": (lambda f: reweigh(f, weights(x=torch.ones(1))), r"do not belong there: \['x'\]"),
    "misshapen": (lambda f: reweigh(f, weights(amplitude=torch.ones(7, 1))), r"'amplitude' is F32 \[7, 1\]"),
    "half precision": (lambda f: reweigh(f, weights(amplitude=torch.ones(7).half())), "'amplitude' is F16"),
    "not finite": (lambda f: reweigh(f, weights(amplitude=torch.full((7,), float("inf")))), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_artefact_that_is_not_exactly_one_is_refused(name: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[name]
    Policy().save_pretrained(tmp_path, RESULT)
    spoil(tmp_path)
    with pytest.raises(InvalidPolicyError, match=message) as caught:
        Policy.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, RESULTS])
def test_a_missing_file_is_said(name: str, tmp_path: Path) -> None:
    Policy().save_pretrained(tmp_path, RESULT)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"it holds no {name}"):
        Policy.from_pretrained(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    Policy().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin, and pickled weights are never loaded"):
        Policy.from_pretrained(tmp_path)


# What comes with the package


@pytest.mark.parametrize("name", bundled())
def test_a_bundled_card_is_the_generated_one(name: str, tmp_path: Path) -> None:
    Policy.from_pretrained(name).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text(encoding="utf-8") == (bundled()[name] / CARD).read_text(encoding="utf-8")


def test_the_default_policy_is_bundled() -> None:
    assert "default" in bundled()


def test_loading_a_bundled_policy_is_quick() -> None:
    Policy.from_pretrained("default")
    start = time.process_time()
    for _ in range(10):
        Policy.from_pretrained("default")
    assert time.process_time() - start < 10 * 0.02


def test_first_use_opens_no_socket_and_needs_no_hub() -> None:
    python(
        "import sys\n"
        "def refuse(event, args):\n"
        "    if event.startswith('socket.'): raise AssertionError(event)\n"
        "sys.addaudithook(refuse)\n"
        "import torch, learned_optim\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "opt = learned_optim.LearnedOptimizer([p])\n"
        "p.grad = torch.ones(3); opt.step()\n"
        "assert (p < 1).all()\n"
        "assert 'huggingface_hub' not in sys.modules",
        HF_ENDPOINT="http://127.0.0.1:9",
    )


def test_loading_does_not_move_the_global_generator(tmp_path: Path) -> None:
    random_policy(PolicyConfig.gru()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    Policy.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), wanted)
