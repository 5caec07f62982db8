"""Thousands of damaged artefacts: none loads, and each is refused in time, in words and in little memory."""

from __future__ import annotations

import json
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from learned_optim import Policy, PolicyConfig
from learned_optim.policy import files as policy_files
from learned_optim.policy.errors import InvalidPolicyError, PolicyNotFoundError
from learned_optim.policy.files import CONFIG, RESULTS, WEIGHTS

resource = pytest.importorskip("resource")
COUNT = 1000
Files = dict[str, bytes]


def packed(seed: int, config: PolicyConfig | None = None) -> Files:
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(config, generator=generator)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.normal_(generator=generator)
    results = {"training": {"method": "test", "seeds": [seed]}, "notes": ["measured"]}
    return policy_files.pack(policy.config, policy.weights(), results)


GOOD = packed(0)
OTHERS = [packed(1), packed(2, PolicyConfig.gru()), packed(3, PolicyConfig.adamw())]


def seal(files: Files, **changes: object) -> Files:
    """``files`` with checksums that fit: damage made on purpose, which only the strict reading can find."""
    values = {**json.loads(files[CONFIG]), **changes}
    sha256 = policy_files._sha256
    values |= {"weights_sha256": sha256(files[WEIGHTS]), "results_sha256": sha256(files[RESULTS])}
    values.pop("config_sha256")
    values["config_sha256"] = sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
    return {**files, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}


def header(files: Files) -> tuple[dict[str, dict], bytes]:
    size = struct.unpack("<Q", files[WEIGHTS][:8])[0]
    return json.loads(files[WEIGHTS][8 : 8 + size]), files[WEIGHTS][8 + size :]


def with_header(files: Files, values: object, data: bytes, length: int | None = None) -> Files:
    text = json.dumps(values).encode()
    return {**files, WEIGHTS: struct.pack("<Q", len(text) if length is None else length) + text + data}


def cut(files: Files, rng: random.Random) -> Files:
    name = rng.choice([CONFIG, WEIGHTS, RESULTS])
    return {**files, name: files[name][: rng.randrange(len(files[name]))]}


def flip_bits(files: Files, rng: random.Random) -> Files:
    name = rng.choice([CONFIG, WEIGHTS, WEIGHTS, RESULTS])
    data = bytearray(files[name])
    for i in rng.sample(range(len(data)), rng.choice([1, 1, 1, 2, 8])):
        data[i] ^= 1 << rng.randrange(8)
    return {**files, name: bytes(data)}


def flip_a_bit_of_the_header(files: Files, rng: random.Random) -> Files:
    size = struct.unpack("<Q", files[WEIGHTS][:8])[0]
    data = bytearray(files[WEIGHTS])
    # Bytes of the JSON text only: a flip in the weights' values, sealed, is another policy and loads, as it should.
    start = 8 + rng.randrange(len(files[WEIGHTS][8 : 8 + size].rstrip()))
    data[start] ^= 1 << rng.randrange(8)
    return seal({**files, WEIGHTS: bytes(data)})


def insert(files: Files, rng: random.Random) -> Files:
    name = rng.choice([CONFIG, WEIGHTS, RESULTS])
    start = rng.randrange(len(files[name]) + 1)
    return {**files, name: files[name][:start] + rng.randbytes(rng.randint(1, 9)) + files[name][start:]}


def noise(files: Files, rng: random.Random) -> Files:
    name = rng.choice([CONFIG, WEIGHTS])
    spoiled = {**files, name: rng.randbytes(rng.randrange(4000))}
    return seal(spoiled) if name == WEIGHTS else spoiled


def edit_config(files: Files, rng: random.Random) -> Files:
    values = json.loads(files[CONFIG])
    key = rng.choice([key for key in values if isinstance(values[key], float | int | list)])
    values[key] = rng.choice([0.25, -1.0, 7, [], [0.5], None, "x", True])
    return {**files, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}


def edit_config_and_seal(files: Files, rng: random.Random) -> Files:
    values = json.loads(files[CONFIG])
    keys = [key for key in values if "sha256" not in key and key != "library_version"]
    bad = [None, "x", {}, [[]], [None], -1e300, 10**400, True, [1e308] * 1000, "\x00"]
    return seal(files, **{rng.choice(keys): rng.choice(bad)})


def other_keys(files: Files, rng: random.Random) -> Files:
    values = json.loads(files[CONFIG])
    if rng.random() < 0.5:
        values.pop(rng.choice(list(values)))
        return {**files, CONFIG: (json.dumps(values, indent=2) + "\n").encode()}
    return seal(files, **{rng.choice(["__class__", "auto_map", "eval", "Eps", ""]): rng.choice([1, "os.system"])})


def wrong_dtypes(files: Files, rng: random.Random) -> Files:
    values, data = header(files)
    name = rng.choice(list(values))
    values[name]["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "BOOL", "C64", "pickle", "", 3])
    return seal(with_header(files, values, data))


def wrong_shapes(files: Files, rng: random.Random) -> Files:
    values, data = header(files)
    name = rng.choice(list(values))
    values[name]["shape"] = rng.choice([[], [0], [-1], [2**63], [2**32, 2**32], [1] * 1000, "x", [1.5], [191]])
    return seal(with_header(files, values, data))


def wrong_offsets(files: Files, rng: random.Random) -> Files:
    values, data = header(files)
    name = rng.choice(list(values))
    values[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**63], [8, 4], [-4, 0], [0], None, [0, len(data)]])
    return seal(with_header(files, values, data))


def wrong_names(files: Files, rng: random.Random) -> Files:
    values, data = header(files)
    name = rng.choice(list(values))
    values[rng.choice(["", "../head", "x" * 9999, "__metadata__"])] = values.pop(name)
    return seal(with_header(files, values, data))


def huge_header(files: Files, rng: random.Random) -> Files:
    length = rng.choice([2**63, 2**64 - 1, 2**40, 100_000_001, len(files[WEIGHTS]), 0, 1])
    return seal({**files, WEIGHTS: struct.pack("<Q", length) + files[WEIGHTS][8:]})


def not_finite(files: Files, rng: random.Random) -> Files:
    values, data = header(files)
    spoiled = bytearray(data)
    start = 4 * rng.randrange(len(data) // 4)
    spoiled[start : start + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")]))
    return seal(with_header(files, values, bytes(spoiled)))


def swapped(files: Files, rng: random.Random) -> Files:
    name = rng.choice([WEIGHTS, RESULTS, CONFIG])
    other = {**files, name: rng.choice(OTHERS)[name]}
    # Sealed, the weights of another architecture are still refused, those of the same one are simply another policy.
    return other if name != WEIGHTS or rng.random() < 0.5 else seal({**files, WEIGHTS: OTHERS[1][WEIGHTS]})


def missing(files: Files, rng: random.Random) -> Files:
    left_out = rng.choice([CONFIG, WEIGHTS, RESULTS])
    return {name: data for name, data in files.items() if name != left_out}


def too_large(files: Files, rng: random.Random) -> Files:
    name = rng.choice([CONFIG, RESULTS])
    filler = rng.choice([b"[", b'{"a":', b" ", b"[[],", b"9"])
    return {**files, name: filler * (rng.choice([200_000, 1_200_000]) // len(filler))}


DAMAGES: list[Callable[[Files, random.Random], Files]] = [
    cut, flip_bits, flip_bits, flip_a_bit_of_the_header, insert, noise, edit_config, edit_config_and_seal, other_keys,
    wrong_dtypes, wrong_shapes, wrong_offsets, wrong_names, huge_header, not_finite, swapped, missing, too_large,
]  # fmt: skip


def put(files: Files, folder: Path) -> Path:
    for name in (CONFIG, WEIGHTS, RESULTS):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def peak_memory() -> int:
    """Bytes; of the whole process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_the_undamaged_artefact_loads(tmp_path: Path) -> None:
    assert Policy.from_pretrained(put(GOOD, tmp_path)).results
    assert Policy.from_pretrained(put(seal(GOOD), tmp_path)).results


@pytest.mark.parametrize(
    "seeds", [range(COUNT), pytest.param(range(COUNT, 11 * COUNT), marks=pytest.mark.slow)], ids=["1000", "10000"]
)
def test_thousands_of_damaged_artefacts_are_refused(seeds: range, tmp_path: Path) -> None:
    Policy.from_pretrained(put(GOOD, tmp_path))
    before = peak_memory()
    for seed in seeds:
        rng = random.Random(seed)
        damage = DAMAGES[seed % len(DAMAGES)]
        folder = put(damage(GOOD, rng), tmp_path)
        start = time.process_time()
        with pytest.raises((InvalidPolicyError, PolicyNotFoundError)) as caught:
            Policy.from_pretrained(folder)
        took = time.process_time() - start
        assert took < 1.0, f"{damage.__name__}, seed {seed}: {took:.2f} s"
        assert len(str(caught.value)) < 1500, f"{damage.__name__}, seed {seed}"
    assert peak_memory() - before < 200e6


def test_values_too_large_for_the_arithmetic_are_refused(tmp_path: Path) -> None:
    assert Policy.from_pretrained(put(seal(GOOD, eps=1e9), tmp_path)).config.eps == 1e9
    with pytest.raises(InvalidPolicyError, match="key 'eps' holds"):
        Policy.from_pretrained(put(seal(GOOD, eps=1.001e9), tmp_path))


@pytest.mark.parametrize(("key", "value"), [("weights_sha256", None), ("results_sha256", 5), ("results_sha256", "ab")])
def test_checksums_that_are_none_are_refused_as_such(key: str, value: object, tmp_path: Path) -> None:
    values = {**json.loads(GOOD[CONFIG]), key: value}
    values.pop("config_sha256")
    values["config_sha256"] = policy_files._checksum(values)
    with pytest.raises(InvalidPolicyError, match=f"key '{key}' must hold 64 hexadecimal digits"):
        Policy.from_pretrained(put({**GOOD, CONFIG: policy_files._render(values)}, tmp_path))


def test_fifty_megabytes_of_weights_are_refused_in_time(tmp_path: Path) -> None:
    # As many bytes as are read at all, once under a checksum that fits and once not.
    values, data = header(GOOD)
    values["big"] = {"dtype": "F32", "shape": [12_000_000], "data_offsets": [len(data), len(data) + 48_000_000]}
    files = with_header(GOOD, values, data + bytes(48_000_000))
    before = peak_memory()
    for spoiled in (files, seal(files)):
        put(spoiled, tmp_path)
        start = time.process_time()
        with pytest.raises(InvalidPolicyError):
            Policy.from_pretrained(tmp_path)
        assert time.process_time() - start < 1.0
    assert peak_memory() - before < 200e6
