"""Imports run one way: rule <- policy, engine <- optimizer <- meta_train, bench <- cli; those in functions count."""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "learned_optim"
#: What may import what: itself, and everything above it.
LAYERS = (
    {"rule", "tasks", "plots"},
    {"policy", "engine"},
    {"state_dict", "diagnostics", "groups"},
    {"optimizer"},
    {"meta_train", "bench"},
    {"cli"},
    {"__init__", "__main__"},
)
MOST_LINES = 350
MOST_AT_THE_TOP = 12
#: Any module may import these names of the package itself.
OF_THE_PACKAGE = {"__version__"}


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    return {name_of(path, root): path for path in sorted(root.rglob("*.py"))}


def imports(path: Path, known: dict[str, Path]) -> tuple[set[str], set[str]]:
    """Modules of ours that a file imports, wherever in it, and the top-level names of all others."""
    ours, others = set(), set()
    package = next(name for name, other in known.items() if other == path).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if module == "learned_optim" and alias.name in OF_THE_PACKAGE:
                    continue
                full = f"{module}.{alias.name}"
                wanted.append(full if full in known else module)
        for name in wanted:
            (ours if name in known else others).add(name if name in known else name.partition(".")[0])
    return ours, others


def graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: imports(path, known)[0] for name, path in known.items()}


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, or ``None``."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for other in sorted(arrows[name]):
                if ring := visit(other, [*way, name]):
                    return ring
            done.add(name)
        return None

    return next((ring for name in arrows if (ring := visit(name, []))), None)


def part(module: str) -> str:
    """The package or top-level module that it belongs to."""
    return [*module.split("."), "__init__"][1]


def arrows_up(arrows: dict[str, set[str]]) -> list[str]:
    level = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    return [
        f"{module} imports {other}"
        for module, others in arrows.items()
        for other in others
        if part(module) != part(other) and level[part(module)] <= level[part(other)]
    ]


def foreign_to_the_rule(root: Path) -> list[str]:
    known, allowed = modules(root), {"torch", *sys.stdlib_module_names}
    rule = {name: path for name, path in known.items() if part(name) == "rule"}
    return [
        f"{name} imports {other}"
        for name, path in rule.items()
        for other in set.union(*imports(path, known))
        if other not in allowed and part(other) != "rule"
    ]


def test_no_circle():
    assert circle(graph(ROOT)) is None


def test_no_arrow_runs_up():
    assert arrows_up(graph(ROOT)) == []


def test_the_rule_imports_torch_and_itself_only():
    assert foreign_to_the_rule(ROOT) == []


def test_no_file_is_too_long():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules(ROOT).items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_few_things_lie_at_the_top_and_all_have_their_layer():
    top = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert top == set.union(*LAYERS)
    assert len(top - LAYERS[-1]) <= MOST_AT_THE_TOP


def test_every_package_says_what_is_in_it():
    for folder in (path.parent for path in ROOT.rglob("__init__.py") if path.parent != ROOT):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        missing = [p.name for p in folder.glob("*.py") if p.stem != "__init__" and p.name not in text]
        if folder.name != "tasks":
            assert missing == [], f"{folder.name}/__init__.py does not say what these hold"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path / "learned_optim", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize(
    ("where", "line", "caught"),
    [
        ("rule/ops.py", "from learned_optim.policy import Policy", {"arrow", "circle", "foreign"}),
        ("rule/ops.py", "def f():\n    from learned_optim.rule import update", {"circle"}),
        ("rule/ops.py", "import numpy", {"foreign"}),
        ("engine/step.py", "import learned_optim.policy.policy", {"arrow"}),
        ("policy/files.py", "if TYPE_CHECKING:\n    from learned_optim.policy.policy import Policy", {"circle"}),
        ("bench/curves.py", "from learned_optim.meta_train import meta_train", {"arrow"}),
        ("tasks/base.py", "from ..rule.config import PolicyConfig", {"arrow"}),
        ("tasks/base.py", "from learned_optim import __version__", set()),
    ],
)
def test_planted_imports_are_caught(copy: Path, where: str, line: str, caught: set[str]):
    path = copy / where
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    arrows = graph(copy)
    checks = {"arrow": arrows_up(arrows), "circle": circle(arrows), "foreign": foreign_to_the_rule(copy)}
    assert {name for name, problems in checks.items() if problems} == caught
