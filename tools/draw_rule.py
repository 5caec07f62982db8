"""Draw docs/rule.svg, the update rule at a glance: python tools/draw_rule.py [docs/rule.svg]"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STATE, LEARNED, PLAIN = "#CFE5F7", "#FBDDC5", "#F3F3F3"  #: kept between steps, learned, neither


class Box(NamedTuple):
    """Centre and size in the drawing's units; the first line of the text is bold."""

    x: float
    y: float
    width: float
    height: float
    text: str
    colour: str = PLAIN


BOXES = {
    "measured": Box(1.5, 5.0, 2.4, 1.5, "seven sums\nhow large, how noisy,\nsame direction as before?"),
    "tensor_state": Box(4.55, 5.0, 2.3, 1.5, "tensor's state\naverages of a cosine,\npace, age", STATE),
    "head": Box(7.75, 5.0, 2.7, 1.5, "tensor head\nlinear map of these and of\nthe tensor's shape", LEARNED),
    "gradient": Box(1.0, 1.7, 1.4, 1.5, "gradient\ng"),
    "state": Box(3.35, 1.7, 2.2, 1.5, "parameter's state\nAdam's moments m, v\nhidden unit h", STATE),
    "mixture": Box(6.15, 1.7, 2.3, 1.5, "mixture\nmomentum + gradient\n+ hidden unit", LEARNED),
    "polar": Box(9.05, 1.7, 2.4, 1.5, "orthogonalise\nmatrices, in blocks of\nrows; then damp"),
    "move": Box(11.75, 1.7, 1.9, 1.5, "move\np ← p − lr · d\nand weight decay"),
}
#: From, to, text beside the arrow.
ARROWS = (
    ("gradient", "state", ""), ("state", "mixture", ""), ("mixture", "polar", "d"), ("polar", "move", "d"),
    ("measured", "tensor_state", ""), ("tensor_state", "head", ""),
)  # fmt: skip


def draw(path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "rule", "font.size": 9.5, "mathtext.default": "regular"}):
        figure = Figure(figsize=(10.2, 5.0))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, 12.9), ylim=(0, 6.45))
        axes.axis("off")
        for y, height, label in ((4.0, 2.3, "once for each tensor"), (0.65, 2.35, "for each parameter")):
            _rounded(axes, 0.1, y, 12.7, height, "white", "#AAAAAA", dashed=True)
            axes.text(12.65, y + height - 0.12, label, ha="right", va="top", style="italic", color="#555555")
        for box in BOXES.values():
            _rounded(axes, box.x - box.width / 2, box.y - box.height / 2, box.width, box.height, box.colour, "#444444")
            title, _, rest = box.text.partition("\n")
            axes.text(box.x, box.y + 0.38, title, ha="center", va="center", weight="bold")
            axes.text(box.x, box.y - 0.2, rest, ha="center", va="center", linespacing=1.4)
        for start, end, text in ARROWS:
            a, b = BOXES[start], BOXES[end]
            _arrow(axes, (a.x + a.width / 2, a.y), (b.x - b.width / 2, b.y))
            axes.text((a.x + a.width / 2 + b.x - b.width / 2) / 2, a.y + 0.15, text, ha="center", va="bottom")
        _arrow(axes, (2.6, 2.45), (1.7, 4.25))
        axes.text(2.3, 3.5, "measure", ha="left", va="center")
        head, mixture = BOXES["head"], BOXES["mixture"]
        _arrow(axes, (head.x - 0.3, head.y - head.height / 2), (mixture.x + 0.3, mixture.y + mixture.height / 2))
        axes.text(7.25, 3.5, "step size, weights of the mixture, caution", ha="left", va="center")
        for x, colour, text in ((0.2, STATE, "kept between steps"), (3.1, LEARNED, "weights that were learned")):
            _rounded(axes, x, 0.13, 0.4, 0.28, colour, "#444444")
            axes.text(x + 0.55, 0.27, text, va="center")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _rounded(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str, dashed: bool = False
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.12"
    box = FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge)
    box.set_linestyle("--" if dashed else "-")
    axes.add_patch(box)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "shrinkA": 2, "shrinkB": 2})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path(__file__).parents[1] / "docs" / "rule.svg")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    main()
