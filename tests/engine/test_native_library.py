"""Compilers, disks and other processes, as far as kernels on CPUs depend on them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import ROOT
from helpers.support import assert_same_bits, copies, give_gradients, leaves, make, run
from learned_optim.engine import auto, kernels, native_library

pytestmark = pytest.mark.skipif(kernels.find_compiler("cpu") is None, reason="needs a C++ compiler")

SHAPES = [(40, 130), (7,), (), (2, 3, 3, 3), (40_000,)]


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
    """An empty cache folder, and a process that has loaded nothing and said nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    for cached in (native_library.library, auto._warn_once):
        cached.cache_clear()
    yield tmp_path / "cache" / "learned_optim" / "kernels"
    for cached in (native_library.library, auto._warn_once):
        cached.cache_clear()


def steps(backend="compiled", steps=2, **options):
    params = leaves(*SHAPES)
    optimizer = make(params, backend=backend, **options)
    run(optimizer, params, steps)
    return params, optimizer.backend


def assert_compiled(params, backend):
    assert backend.startswith("compiled")
    for a, b in zip(params, steps("eager")[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def assert_eager_with_one_warning(match):
    with pytest.warns(RuntimeWarning, match=match) as caught:
        results = [steps("auto") for _ in range(2)]
    assert len(caught) == 1
    plain, _ = steps("eager")
    for params, backend in results:
        assert backend.startswith("eager (compilation failed: ")
        assert_same_bits(params, plain)


def a_program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)
    return folder


# --- compilers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.usefixtures("nothing_compiled")
def test_either_compiler_will_do_and_uses_the_threads_of_torch(compiler, monkeypatch):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    monkeypatch.setenv("CXX", compiler)
    assert_compiled(*steps())
    code = (
        "import os, torch; from helpers.support import leaves, make\n"
        "torch.set_num_threads(1); params = leaves((1 << 18,)); params[0].grad = params[0].detach() ** 2\n"
        "opt = make(params, backend='compiled'); opt.step()\n"
        "before = len(os.listdir('/proc/self/task')); torch.set_num_threads(3); opt.step()\n"
        "print(len(os.listdir('/proc/self/task')) - before, opt.backend)"
    )
    (said,) = in_new_processes([code])
    assert said == "2 compiled (262,144 parameters)\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("state_dtype", [None, torch.float16])
def test_a_processor_of_twenty_years_ago_will_do(monkeypatch, state_dtype):
    flags = ["-march=x86-64" if flag == "-march=native" else flag for flag in native_library._FLAGS]
    monkeypatch.setattr(native_library, "_FLAGS", flags)
    params, backend = steps(state_dtype=state_dtype)
    assert backend.startswith("compiled")
    for a, b in zip(params, steps("eager", state_dtype=state_dtype)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5 if state_dtype is None else 1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("echo 'g++: no more licences' >&2; echo more >&2; exit 1", "CalledProcessError: g\\+\\+: no more licences$"),
        ("exit 3", "returned non-zero exit status 3"),
        ("kill -9 $$", "died with .*SIGKILL"),
        ("exit 0", "FileNotFoundError"),
    ],
    ids=["speaks", "silent", "killed", "makes nothing"],
)
def test_a_compiler_that_fails_is_said_once_and_steps_are_eager(script, match, nothing_compiled, monkeypatch, tmp_path):
    folder = a_program(tmp_path / "bin", "g++", script)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert_eager_with_one_warning(match)
    assert not list(nothing_compiled.iterdir())


@pytest.mark.parametrize("name", ["", "no-such-compiler", "g++ -O2", "/", "/dev/null"])
def test_a_compiler_that_is_not_there_is_passed_over(name, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    expected = kernels.find_compiler("cpu")
    monkeypatch.setenv("CXX", name)
    assert kernels.find_compiler("cpu") == expected


def test_compiler_and_cache_may_lie_in_folders_with_blanks(nothing_compiled, monkeypatch, tmp_path):
    real = shutil.which(kernels.find_compiler("cpu"))
    folder = a_program(tmp_path / "my tools", "c plus plus", f'exec {real} "$@"')
    monkeypatch.setenv("CXX", str(folder / "c plus plus"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    assert_compiled(*steps())
    assert list((tmp_path / "my cache").rglob("*.so"))


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once_and_found_again(nothing_compiled, monkeypatch):
    first, backend = steps()
    assert_compiled(first, backend)
    (kernel,) = nothing_compiled.iterdir()
    native_library.library.cache_clear()
    monkeypatch.setattr(native_library, "_compile", lambda *args: pytest.fail("compiled again"))
    assert_same_bits(steps()[0], first)
    assert list(nothing_compiled.iterdir()) == [kernel]


def test_threads_that_make_their_first_step_together_are_all_compiled(nothing_compiled):
    """Tracing is of the whole process: two at once disturb each other."""
    both = threading.Barrier(2)

    def train(_):
        both.wait()
        return steps("auto")

    with ThreadPoolExecutor(2) as pool:
        for params, backend in pool.map(train, range(2)):
            assert_compiled(params, backend)


@pytest.mark.parametrize("damage", [b"", bytes(4096), b"#!/bin/sh\n"], ids=["empty", "zeros", "text"])
def test_a_damaged_kernel_is_compiled_again(damage, nothing_compiled):
    """As a full disk or a crash may leave it."""
    head = make(leaves((3,)))._backend.head
    kernel = nothing_compiled / f"{native_library._key(native_library.Kind(head.config, (torch.float32,) * 8))}.so"
    nothing_compiled.mkdir(parents=True)
    kernel.write_bytes(damage)
    assert_compiled(*steps())
    assert list(nothing_compiled.iterdir()) == [kernel]
    assert kernel.stat().st_size > len(damage)


def test_what_another_user_has_put_there_is_not_run(nothing_compiled, monkeypatch):
    first, _ = steps()
    (kernel,) = nothing_compiled.iterdir()
    before = kernel.stat()
    native_library.library.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: before.st_uid + 1)
    assert_same_bits(steps()[0], first)
    assert kernel.stat().st_ino != before.st_ino


@pytest.mark.usefixtures("nothing_compiled")
def test_where_nothing_can_be_kept_kernels_are_compiled_for_one_process(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    assert_compiled(*steps())
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.usefixtures("nothing_compiled")
def test_where_nothing_at_all_can_be_written_steps_are_eager(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert_eager_with_one_warning("NotADirectoryError")


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert native_library._cache_folder() == tmp_path / ".cache" / "learned_optim" / "kernels"


def test_keys_tell_machines_compilers_and_kinds_apart(monkeypatch, tmp_path):
    config = make(leaves((3,)))._backend.head.config
    kind = native_library.Kind(config, (torch.float32,) * 4)
    keys = [native_library._key(kind), native_library._key(kind._replace(dtypes=(torch.bfloat16,) * 4))]
    assert native_library._key(kind) == keys[0]
    for name in ("g++", "clang++"):
        monkeypatch.setenv("CXX", str(a_program(tmp_path / name, "c++", "exit 0") / "c++"))
        keys.append(native_library._key(kind))
    os.utime(tmp_path / "clang++" / "c++", (1, 1))  # another version of it
    keys.append(native_library._key(kind))
    for name, value in (("_FLAGS", ("-O0",)), ("_processor", lambda: "another one")):
        monkeypatch.setattr(native_library, name, value)
        keys.append(native_library._key(kind))
    monkeypatch.setattr(torch, "__version__", "3.0")
    keys.append(native_library._key(kind))
    assert len(set(keys)) == len(keys)


# --- processes ------------------------------------------------------------------------------------------------------


def in_new_processes(codes):
    """What they print, all of them started at once."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    started = [
        subprocess.Popen([sys.executable, "-W", "error::RuntimeWarning", "-c", code], env=env, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for code in codes
    ]  # fmt: skip
    said = []
    for process in started:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        said.append(out)
    return said


def test_processes_that_compile_the_same_kernel_at_once_do_not_disturb_each_other(nothing_compiled):
    code = (
        "import torch; from helpers.support import leaves, make, run\n"
        "params = leaves((40, 130), (7,)); opt = make(params, backend='compiled'); run(opt, params, 2)\n"
        "print(opt.backend, [p.double().sum().item() for p in params])"
    )
    first, other = in_new_processes([code] * 2)
    assert first.startswith("compiled (5,207 parameters)")
    assert other == first
    (kernel,) = nothing_compiled.iterdir()
    assert kernel.suffix == ".so"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("nothing_compiled")
def test_a_forked_process_goes_on_with_the_kernels_of_its_parent():
    params = leaves(*SHAPES)
    optimizer = make(params, backend="compiled")
    run(optimizer, params, 1)
    others = copies(params)
    read, write = os.pipe()
    give_gradients(params, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of threads
        child = os.fork()
    if child == 0:
        optimizer.step()
        os.write(write, repr([p.double().sum().item() for p in params]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert_same_bits(params, others)
    optimizer.step()
    assert os.read(read, 10_000).decode() == repr([p.double().sum().item() for p in params])
    for end in (read, write):
        os.close(end)
