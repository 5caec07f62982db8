"""The wheel and the sdist hold what they should, and the bundled policy is found however the package is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT
from learned_optim import Policy, __version__

FILES = ("model.safetensors", "config.json", "results.json", "README.md")
#: A new process that sees the standard library, then one folder, then this environment's other packages. ``-I -S``
#: keeps an installed learned_optim, editable or not, out of the way.
PROBE = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
import learned_optim
from learned_optim.optimizer import LearnedOptimizer
import torch
optimizer = LearnedOptimizer([torch.zeros(2, requires_grad=True)])
print(learned_optim.__file__)
print(optimizer.policy.source, optimizer.policy.fingerprint())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, so that nothing that lies about in the working tree can help or disturb."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("learned_optim", "pretrained", "tests", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(checkout: Path, target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


def install(wheel: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def probe(folder: Path, cwd: Path) -> list[str]:
    """Where learned_optim comes from with ``folder`` installed, and the default policy's source and fingerprint."""
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", PROBE, str(folder), sysconfig.get_path("purelib")]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_bundled_policy_the_type_marker_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for name in FILES:
        assert f"learned_optim/pretrained/default/{name}" in names
    assert "learned_optim/py.typed" in names
    assert {"learned_optim/engine/native.cpp", "learned_optim/engine/native_head.cpp"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    documents = {name.removeprefix("learned_optim/pretrained/") for name in names if name.endswith(".md")}
    policies = ("default", "pretraining", "reader", "recurrent")
    assert documents == {"RECIPE.md", *(f"{policy}/README.md" for policy in policies)}
    assert {name.split("/")[0] for name in names} == {"learned_optim", f"learned_optim-{__version__}.dist-info"}


def test_the_wheel_says_which_command_and_which_packages_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"learned_optim-{__version__}.dist-info"
    assert "learned-optim = learned_optim.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.6\n" in metadata, "no upper bound"
    assert "<" not in "".join(line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch"))


def test_the_default_policy_is_found_in_a_wheel_install(wheel: Path, tmp_path: Path) -> None:
    install(wheel, tmp_path / "site")
    where, policy = probe(tmp_path / "site", cwd=tmp_path)
    assert Path(where).is_relative_to(tmp_path / "site")
    assert policy == f"bundled:default {Policy.from_pretrained('default').fingerprint()}"


def test_the_default_policy_is_found_in_an_editable_install(checkout: Path, tmp_path: Path) -> None:
    install(build(checkout, "wheel:editable", tmp_path / "dist"), tmp_path / "site")
    where, policy = probe(tmp_path / "site", cwd=tmp_path)
    assert Path(where).is_relative_to(checkout), "an editable install runs the checkout's own files"
    assert policy == f"bundled:default {Policy.from_pretrained('default').fingerprint()}"


def test_the_sdist_holds_the_bundled_policy_and_makes_the_same_wheel(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    with tarfile.open(build(checkout, "sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"learned_optim-{__version__}"
    for name in FILES:
        assert (unpacked / "pretrained" / "default" / name).is_file()
    assert (unpacked / Path(__file__).relative_to(ROOT)).is_file()
    again = zipfile.ZipFile(build(unpacked, "wheel", tmp_path / "again"))
    assert sorted(again.namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
