"""Hooks of mkdocs (``mkdocs.yml``): what the pages of docs/ link to beside them becomes part of the site.

The pages are written for the repository, where links such as ``../learned_optim/rule/update.py`` lead somewhere. In
the site README.md is the first page, other Markdown files and pictures keep their path, and a source file or a folder
becomes a page below source/. The page ``api.md`` is made of the public names.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Modules whose ``__all__`` is public, and what the page of the API says of them.
PUBLIC = {
    "learned_optim": "The optimizer, and the policies that it runs.",
    "learned_optim.meta_train": "Meta-training: see [Train your own](train_your_own.md).",
    "learned_optim.tasks": "What rules are trained on: see [Train your own](train_your_own.md).",
    "learned_optim.bench": "Measurements against tuned baselines.",
}
#: Code, in which nothing is a link; or a link.
LINK = re.compile(r"^```.*?^```$|`[^`\n]*`|\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)", re.DOTALL | re.MULTILINE)


def site_path(path: Path) -> str:
    """Where a file or folder of the repository lies in the site."""
    name = path.relative_to(ROOT)
    if name == Path("README.md"):
        return "index.md"
    if name.parts[0] == "docs":
        return name.relative_to("docs").as_posix()
    if path.suffix in (".md", ".png", ".svg"):
        return name.as_posix()
    return f"source/{name.as_posix()}{'/index' if path.is_dir() else ''}.md"


def linked(markdown: str, page: Path) -> Iterator[tuple[re.Match[str], Path]]:
    """Links to files of the repository."""
    for match in LINK.finditer(markdown):
        if match["target"] and "://" not in match["target"]:
            yield match, (page.parent / match["target"]).resolve()


def rewritten(markdown: str, page: Path) -> str:
    """The page with links that lead to the same things in the site."""
    folder, end = PurePosixPath(site_path(page)).parent, 0
    parts: list[str] = []
    for match, target in linked(markdown, page):
        parts += [
            markdown[end : match.start()],
            f"]({os.path.relpath(site_path(target), folder)}{match['anchor'] or ''})",
        ]
        end = match.end()
    return "".join([*parts, markdown[end:]])


def source_page(path: Path) -> str:
    """A source file as it is, or what is in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_file():
        language = {".py": "python", ".cpp": "cpp"}.get(path.suffix, path.suffix.lstrip("."))
        return f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}````\n"
    rows = [f"- `{child.name}`: {summary(child)}" for child in sorted(path.iterdir()) if summary(child)]
    return f"# {name}\n\n" + "\n".join(rows) + "\n"


def summary(path: Path) -> str:
    """First line of a module's or a package's docstring."""
    module = path / "__init__.py" if path.is_dir() else path
    if module.suffix != ".py" or not module.is_file() or path.name == "__init__.py":
        return ""
    return (ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def public_names(module: str) -> list[str]:
    """``__all__``, read without importing anything."""
    path = ROOT.joinpath(*module.split("."), "__init__.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    raise ValueError(f"no __all__ in {path}")


def api_page() -> str:
    lines = ["# API", ""]
    for module, what in PUBLIC.items():
        lines += [f"## {module}", "", what, ""]
        lines += [f"::: {module}.{name}\n" for name in public_names(module)]
    return "\n".join(lines)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    def add(file: File) -> None:
        if files.get_file_from_path(file.src_uri) is None:
            files.append(file)

    add(File.generated(config, "api.md", content=api_page()))
    pending, seen = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], set[Path]()
    while pending:
        path = pending.pop()
        if path in seen or not path.exists():  # mkdocs itself names links that lead nowhere
            continue
        seen.add(path)
        if site_path(path).startswith("source/"):
            add(File.generated(config, site_path(path), content=source_page(path)))
            continue
        add(File.generated(config, site_path(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            pending += [target for _, target in linked(path.read_text(encoding="utf-8"), path)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    path = Path(page.file.abs_src_path or "")
    return rewritten(markdown, path) if path.is_file() and path.is_relative_to(ROOT) else markdown
