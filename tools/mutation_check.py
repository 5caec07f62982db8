"""Would the tests notice? Plants small faults in a copy of the repository and runs, for each, the tests of that module.

    python tools/mutation_check.py --out docs/results/mutations.json [--faults 67] [--only resolve.py] [--list]

A fault is one comparison, sign, number, condition or statement changed. Which ones is drawn from a seed, a number of
each module fixed in ``MODULES``; faults that no test notices are listed, with the reason where one is known.
The working tree is not touched. Faults in messages, docstrings, annotations, joined paths and zip's ``strict`` are not
planted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info", ".ruff_cache", "demo")

#: Module: its part of all faults, and the tests that cover it, the quickest first.
MODULES: dict[str, tuple[int, tuple[str, ...]]] = {
    "rule/update.py": (12, ("tests/rule/test_update.py", "tests/optimizer/test_properties.py",
                            "tests/optimizer/test_step.py", "tests/meta_train/test_unroll.py")),
    "optimizer.py": (12, ("tests/optimizer/test_construction.py", "tests/optimizer/test_step.py",
                          "tests/optimizer/test_pickling.py", "tests/optimizer/test_checkpoints.py",
                          "tests/optimizer/test_dtypes_and_layouts.py", "tests/optimizer/test_life.py",
                          "tests/engine/test_sharding.py")),
    "rule/orthogonalize.py": (8, ("tests/rule/test_update.py", "tests/rule/test_orthogonalize.py")),
    "engine/step.py": (6, ("tests/rule/test_orthogonalize.py", "tests/engine/test_eager.py",
                           "tests/optimizer/test_step.py", "tests/engine/test_sharding.py")),
    "state_dict.py": (6, ("tests/optimizer/test_checkpoints.py", "tests/engine/test_sharding.py")),
    "engine/hyperparameters.py": (6, ("tests/optimizer/test_construction.py",)),
    "meta_train/unroll.py": (10, ("tests/meta_train/test_unroll.py",)),
    "policy/resolve.py": (7, ("tests/policy/test_hub.py", "tests/policy/test_hub_remote.py")),
    "policy/files.py": (9, ("tests/policy/test_hub.py", "tests/policy/test_hub_damage.py")),
    "meta_train/checkpoint.py": (10, ("tests/faults/test_disks.py", "tests/meta_train/test_outer_loop.py",
                                      "tests/faults/test_interruptions.py", "tests/cli/test_meta_train_command.py")),
}  # fmt: skip

#: Survivors that are no lack of a test: by module and the faulty line, as it was and as it became.
EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "state_dict.py",
        'if getattr(p, "_fsdp_flattened", False) and key in saved["state"]:',
        'if getattr(p, "_fsdp_flattened", False) and key not in saved["state"]:',
    ): "Noticed by the test of classic FSDP in `test_parallel_training.py`, which takes too long to be run here.",
    (
        "state_dict.py",
        "own = [name for name in values if name in GUARDED_TENSOR_KEYS]",
        "own = [name for name in values if name not in GUARDED_TENSOR_KEYS]",
    ): "Noticed by the test of classic FSDP in `test_parallel_training.py`, which takes too long to be run here.",
    (
        "optimizer.py",
        'state["trust"] = torch.zeros_like(state[TENSOR_KEYS[0]])',
        'state["trust"] = torch.zeros_like(state[TENSOR_KEYS[1]])',
    ): "The same: both are single numbers of one dtype and device.",
    ("meta_train/unroll.py", "segment: int = 0", "segment: int = 1"): (
        "The same values: segments only say what is kept in memory."
    ),
    (
        "meta_train/unroll.py",
        "return run([t.detach() for t in tensors], recompute=False)",
        "return run([t.detach() for t in tensors], recompute=True)",
    ): "The same values: a forward pass in segments of one step.",
    ("meta_train/checkpoint.py", "os.link(current, temporary)", "pass"): (
        "The checkpoint is then copied instead of linked: the same files."
    ),
    (
        "meta_train/checkpoint.py",
        "temporary.unlink(missing_ok=True) # where both already were one file, replacing did nothing",
        "temporary.unlink(missing_ok=False) # where both already were one file, replacing did nothing",
    ): "The checkpoint is then copied instead of linked: the same files.",
}

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is",
               "in": "not in", "not in": "in"}  # fmt: skip
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "**": "*", "|": "&", "&": "|", "//": "/", "%": "*"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """Characters ``begin`` to ``end`` of a module, replaced."""

    module: str
    line: int
    kind: str
    begin: int
    end: int
    text: str

    def plant(self, source: str) -> str:
        return source[: self.begin] + self.text + source[self.end :]

    def lines(self, source: str) -> tuple[str, str]:
        """The faulty line before and after."""
        first = source.rfind("\n", 0, self.begin) + 1
        old = source[first : source.find("\n", self.end)]
        new = self.plant(source)
        return " ".join(old.split()), " ".join(new[first : new.find("\n", self.begin + len(self.text))].split())


class Finder(ast.NodeVisitor):
    """Every fault that could be planted in a module."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source, self.faults = module, source, list[Fault]()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(source))

    def span(self, node: Any) -> tuple[int, int]:
        assert self.source.isascii(), "columns are counted in bytes"
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def add(self, node: Any, kind: str, begin: int, end: int, text: str) -> None:
        self.faults.append(Fault(self.module, node.lineno, kind, begin, end, text))

    def between(self, left: ast.expr, right: ast.expr, table: dict[str, str], kind: str) -> None:
        """The operator that stands between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[begin:end]
        for operator in sorted(table, key=len, reverse=True):
            match = re.search(rf"(?<![\w*/]){re.escape(operator)}(?![\w*/=])", gap)
            if match:
                self.add(left, kind, begin + match.start(), begin + match.end(), table[operator])
                return

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for right in node.comparators:
            self.between(left, right, COMPARISONS, "comparison")
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        joins_paths = isinstance(node.op, ast.Div) and self.module.endswith(("resolve.py", "files.py", "checkpoint.py"))
        texts = (isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
        if not joins_paths and not any(texts):
            self.between(node.left, node.right, OPERATORS, "arithmetic")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.between(node.values[0], node.values[1], {"and": "or", "or": "and"}, "and/or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.add(node, "sign or not dropped", self.span(node)[0], self.span(node.operand)[0], "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        begin, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(node, "constant", begin, end, str(not node.value))
        elif isinstance(node.value, int | float):
            self.add(
                node, "constant", begin, end, repr(node.value * 2 if node.value not in (0, 0.0) else node.value + 1)
            )

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "strict":  # zip's own check, which never fires
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            begin, end = self.span(node.test)
            self.add(node, "condition negated", begin, end, f"not ({self.source[begin:end]})")
            self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(node, "statement left out", *self.span(node), "pass")
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "statement left out", *self.span(node), "pass")  # what it would have said is not looked into

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Subscript):
            self.add(node, "statement left out", *self.span(node), "pass")
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None), *node.body):
            self.visit(part)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Not looked into: a message."""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def drawn(copy: Path, seed: int, factor: float, only: str) -> Iterator[Fault]:
    """The faults to plant, module by module."""
    for module, (count, _) in MODULES.items():
        if only in module:
            faults = Finder(module, (copy / "learned_optim" / module).read_text()).faults
            size = min(len(faults), max(1, round(count * factor)))
            yield from sorted(random.Random(f"{seed} {module}").sample(faults, size), key=lambda f: f.begin)


def run_tests(copy: Path, tests: tuple[str, ...], limit: float) -> tuple[bool, str, float]:
    """In a process of its own: whether they pass, the first that fails, seconds. Too slow is a failure."""
    begun = time.monotonic()
    log = copy / "log"
    child = os.fork()
    if child == 0:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        status = 99
        try:
            import pytest

            options = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", "-rfE")
            status = int(pytest.main([*options, *tests]))
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    status = None
    try:
        while status is None and time.monotonic() - begun < limit:
            done, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # the session that the child began: what its tests left running, too
    took = time.monotonic() - begun
    if status is None:
        os.waitpid(child, 0)
        return False, f"took longer than {limit:.0f} s", took
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return status == 0, first[1] if first else ("" if status == 0 else f"exit status {status}"), took


def check(faults: list[Fault], copy: Path) -> Iterator[dict[str, Any]]:
    """Plant each fault, and say who noticed.

    Raises:
        SystemExit: the tests fail without any fault.
    """
    limits: dict[str, float] = {}
    for fault in faults:
        tests = MODULES[fault.module][1]
        if fault.module not in limits:
            passed, failed, took = run_tests(copy, tests, 600)
            if not passed:
                raise SystemExit(
                    f"the tests of {fault.module} fail without any fault: {failed}\n{(copy / 'log').read_text()}"
                )
            limits[fault.module] = 2 * took + 20
        path = copy / "learned_optim" / fault.module
        source = path.read_text()
        before, after = fault.lines(source)
        path.write_text(fault.plant(source))
        try:
            passed, failed, took = run_tests(copy, tests, limits[fault.module])
        finally:
            path.write_text(source)
        result = {"module": fault.module, "line": fault.line, "kind": fault.kind, "before": before, "after": after,
                 "caught_by": "" if passed else failed, "seconds": round(took, 1)}  # fmt: skip
        if passed:
            result["why"] = EXPLAINED.get((fault.module, before, after), "")
        print(f"{'SURVIVED' if passed else 'caught':9}{fault.module}:{fault.line} {after}   {failed}", flush=True)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--faults", type=int, default=67)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--list", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a faulty module of the same size and second would pass for the one before
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        faults = list(
            drawn(copy, arguments.seed, arguments.faults / sum(n for n, _ in MODULES.values()), arguments.only)
        )
        if arguments.list:
            for fault in faults:
                print(
                    fault.module,
                    fault.line,
                    *fault.lines((copy / "learned_optim" / fault.module).read_text()),
                    sep=" | ",
                )
            return
        # Imported once, here: every run of the tests is a fork of this process.
        import pytest  # noqa: F401
        import torch

        torch.set_num_threads(1)
        results = list(check(faults, copy))
    caught = sum(bool(r["caught_by"]) for r in results)
    print(f"{caught} of {len(results)} faults caught in {(time.monotonic() - begun) / 60:.1f} minutes")
    if arguments.out:
        values = {"seed": arguments.seed, "planted": len(results), "caught": caught,
                  "minutes": round((time.monotonic() - begun) / 60, 1),
                  "tests": {module: list(tests) for module, (_, tests) in MODULES.items()},
                  "faults": results}  # fmt: skip
        arguments.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
