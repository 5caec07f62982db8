"""What README.md and docs/ say works: code runs, commands exist, links lead somewhere, figures are those measured."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from helpers.scripts import PAGES, RUN_AND_LEAVE, client_block, code_blocks, load_script, run_script
from learned_optim import Policy

README, DOCS = ROOT / "README.md", ROOT / "docs"
TOOL = "tools/readme_tables.py"
#: What else people read.
OTHERS = (
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "pretrained").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
)
_OF_CODE = re.compile(r"^```.*?^```$|`[^`]*`", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", _OF_CODE.sub("", text_of(page)))


@cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p, "python")], ids=name_of)
def test_every_python_block_runs_one_after_the_other(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for line, code in code_blocks(page, "python"):
        # Empty lines in front: a traceback then shows the page's own line numbers.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)


def test_the_block_for_several_processes_runs_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(client_block("torchrun"), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(RUN_AND_LEAVE), "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_every_block_that_needs_something_is_run_by_a_test() -> None:
    of_clients = text_of(ROOT / "tests" / "clients" / "test_client_blocks.py")
    for needs in {name for page in PAGES for name in re.findall(r"<!-- needs (\w+) -->", text_of(page))}:
        assert needs in ("torchrun", "cuda") or f'"{needs}"' in of_clients


def test_every_command_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    lines = [line for page in PAGES for _, text in code_blocks(page, "sh") for line in text.splitlines()]
    # Those within sentences too, where it is plain what they run.
    ours = r"`((?:make [\w-]+|learned-optim [\w-]+|python (?:tools|examples)/[\w/]+\.py)[^`]*)`"
    lines += [command for page in PAGES for command in re.findall(ours, text_of(page))]
    commands = {tuple(shlex.split(line, comments=True)) for line in lines}
    helped = set()
    for command in filter(None, commands):
        program, *rest = command
        if program == "make":
            assert {word for word in rest if "=" not in word} <= targets, f"no such target: {command}"
        elif program == "learned-optim":
            helped.add(rest[0])
        elif program == "python":
            assert (ROOT / rest[0]).is_file(), f"no such script: {command}"
        else:
            assert program in ("git", "cd", "pip", "torchrun"), f"unknown command: {command}"
    assert helped
    for name in helped:
        shown = [sys.executable, "-m", "learned_optim", name, "--help"]
        done = subprocess.run(shown, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"learned-optim {name}: {done.stderr}"


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"outside the repository: {link}"
        assert target.exists(), f"broken link: {link}"
        assert not anchor or anchor in anchors(target), f"no such heading: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(DOCS.glob("*.md")) <= linked


def test_every_page_is_in_the_sites_navigation() -> None:
    # mkdocs.yml has tags of its own, which a plain reader of YAML refuses: the files' names are enough.
    navigation = text_of(ROOT / "mkdocs.yml").partition("\nnav:")[2].partition("\nnot_in_nav:")[0]
    named = set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE))
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= named
    hooks = load_script("tools/site_hooks.py")
    of_the_repository = {hooks.site_path(page) for page in (*PAGES, *OTHERS)} | {"api.md", "step/table.md"}
    assert named <= of_the_repository, "no such page"


def test_the_site_is_built_without_warnings_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site, command = tmp_path / "site", [sys.executable, "-m", "mkdocs", "build", "--strict"]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [*command, "--site-dir", str(site)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"(https?:[^\"]+)", text_of(page))
        assert not loaded, page
    api = text_of(site / "api.html")
    for module in load_script("tools/site_hooks.py").PUBLIC:
        for name in set(importlib.import_module(module).__all__) - {"__version__"}:
            assert f'id="{module}.{name}"' in api, f"{module}.{name} is not on the page of the API"


def test_links_lead_to_the_same_things_in_the_site() -> None:
    hooks = load_script("tools/site_hooks.py")
    page = DOCS / "step" / "table.md"
    for there, here in {
        "../speed.md#reading-it": "../speed.md#reading-it",
        "../../README.md": "../index.md",
        "../../CONTRIBUTING.md": "../CONTRIBUTING.md",
        "../../learned_optim/rule/update.py": "../source/learned_optim/rule/update.py.md",
        "../../learned_optim/rule": "../source/learned_optim/rule/index.md",
        "https://pytorch.org/x": "https://pytorch.org/x",
        "#here": "#here",
    }.items():
        assert hooks.rewritten(f"a [b]({there}) c", page) == f"a [b]({here}) c"
    code = "`[b](../speed.md)`\n\n```text\n[b](../../README.md)\n```\n"
    assert hooks.rewritten(code, page) == code


def test_the_recipe_makes_the_bundled_policy_but_for_what_was_learned(tmp_path: Path, monkeypatch) -> None:
    """Its code runs, with other numbers in place of those that evolution strategies found."""
    monkeypatch.chdir(tmp_path)
    ((line, code),) = code_blocks(ROOT / "pretrained" / "RECIPE.md", "python")
    learned = {name: torch.full_like(weight, 0.1) for name, weight in Policy().weights().items()}
    Policy().save_pretrained("run3/best")
    for run, step in itertools.product(("run5", "run7", "run9"), range(40)):
        Path(run).mkdir(exist_ok=True)
        torch.save({"weights": learned}, f"{run}/{step}.pt")
    exec(compile("\n" * (line - 1) + code, "RECIPE.md", "exec"), {})
    last = max(int(folder.name.removeprefix("stage")) for folder in tmp_path.glob("stage*"))
    for folder, bundled_as in ((f"stage{last}", "default"), ("pretraining", "pretraining")):
        made, bundled = Policy.from_pretrained(folder), Policy.from_pretrained(bundled_as)
        assert made.config == bundled.config
        for name in {"age", "decay", "gate_context", "gate_features"} & set(made.weights()):  # nothing learned there
            assert torch.equal(made.state_dict()[name], bundled.state_dict()[name])
    # What is set by hand stands in a column of its own; all else is default's.
    default, own = Policy.from_pretrained("default").state_dict(), bundled.state_dict()
    assert torch.equal(own["head"][:, -1], made.state_dict()["head"][:, -1])
    for name, weight in default.items():
        assert torch.equal(own[name][..., : weight.shape[-1]], weight)


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert {*DOCS.rglob("*.png"), *DOCS.rglob("*.svg")} <= shown


def test_the_readme_is_short_and_shows_one_picture() -> None:
    text = text_of(README)
    assert len(text) <= 9000
    assert text.count("![") == 1


def test_the_figures_are_those_of_the_results_files() -> None:
    done = subprocess.run([sys.executable, str(ROOT / TOOL), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}run: python {TOOL}"


def test_every_results_file_is_shown() -> None:
    elsewhere = {"mutations", "reliability", "safeguard"}  # pages that other tools write
    inside = {"iteration"}  # in another's table
    shown = {name for page in PAGES for name in re.findall(r"<!-- results:(\w+) -->", text_of(page))}
    assert {path.stem for path in (DOCS / "results").glob("*.json")} <= shown | elsewhere | inside


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_begins_with_the_mark_of_a_figure(page: Path) -> None:
    # Markdown would take the whole line for HTML.
    assert not re.findall(r"^\W*<!-- (?:figure:\w+|/) -->", text_of(page), re.MULTILINE)


def test_an_outdated_figure_is_noticed_and_filled_in() -> None:
    tool = load_script(TOOL)
    results, text = tool.Results(), text_of(README)
    assert tool.filled(text, results) == text
    old = re.sub(r"(<!-- figure:steps -->).*?(<!-- / -->)", r"\g<1>99\2", text)
    old = re.sub(r"(<!-- results:validation -->\n).*?(<!-- /results -->)", r"\1\2", old, flags=re.DOTALL)
    assert old != text
    assert tool.filled(old, results) == text


def test_speedups_in_time_are_those_in_steps_over_what_an_iteration_costs(tmp_path: Path) -> None:
    tool = load_script(TOOL)
    folder = shutil.copytree(DOCS / "results", tmp_path / "results")
    (folder / "iteration.json").unlink(missing_ok=True)
    for row in tool.validation(tool.Results(folder)).values():
        assert row["cost of an iteration"] == row["speedup in time"] == tool.NOT_MEASURED

    tasks = [row["task"].partition("/")[0] for row in tool.Results()["quality"]["evaluation"]["tasks"]]
    tasks = {name: {"ratio": {"default": 1.0 if i else 200.0, "another": 1.2}} for i, name in enumerate(tasks)}
    (folder / "iteration.json").write_text(json.dumps({"tasks": tasks, "summary": {}}), encoding="utf-8")
    rows = tool.ratios(tool.Results(folder))
    for _, row in rows[:-1]:
        assert row["time"] == row["steps"] / row["iteration"]
    name, means = rows[-1]
    assert name == "geometric mean"
    assert means["iteration"] == pytest.approx(200 ** (1 / len(tasks)))
    assert means["time"] == pytest.approx(means["steps"] / means["iteration"])
    table = tool.validation(tool.Results(folder))
    for name, row in rows:
        assert table[name]["speedup in time"].startswith("**") == (round(row["time"], 2) < 1.0)
        assert table[name]["held-out loss"].startswith("**") == (round(row["held-out"], 2) > 1.0)


def test_the_picture_of_nanogpt_is_drawn(tmp_path: Path) -> None:
    tool = load_script(TOOL)
    tool.nanogpt_tables.draw_nanogpt(tool.Results(), tmp_path / "nanogpt.png")
    assert (tmp_path / "nanogpt.png").stat().st_size > 10_000


def test_the_picture_of_the_rule_is_drawn(tmp_path: Path) -> None:
    load_script("tools/draw_rule.py").draw(tmp_path / "rule.svg")
    assert (tmp_path / "rule.svg").stat().st_size > 10_000


def test_the_tool_says_what_it_can_do(tmp_path: Path) -> None:
    assert "--check" in run_script(TOOL, "--help", cwd=tmp_path)
