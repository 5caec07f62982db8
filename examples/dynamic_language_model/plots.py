"""Pictures of a finished run: python examples/dynamic_language_model/plots.py runs/language-model [--publish]

``--publish`` copies them and ``results.json`` beside the example's README.md, and fills its tables.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator
from PIL import Image
from report import NAMES, interval, markdown, resampled
from torch import Tensor

#: Methods that move the memory.
WITH_MEMORY = ("rms_memory", "rms_all", "learned_memory", "learned")
HERE = Path(__file__).parent
COLORS = {
    "forgetful": "0.75", "static": "0.35", "cache": "#b58900", "sgd": "#74a9cf", "adam": "#7a5195", "rms": "#1f5fa8",
    "rms_memory": "#8fbc8f", "rms_all": "#2e7d32", "learned_memory": "#f0a3ab", "learned": "#d1495b",
}  # fmt: skip
TENSORS = {
    "embedding": ("embedding and output", "#1f5fa8"), "bias": ("output bias", "#74a9cf"),
    "input": ("LSTM, from input", "#d1495b"), "recurrent": ("LSTM, recurrent", "#edae49"),
    "gates": ("LSTM, bias", "#66a182"), "memory": ("memory", "0.4"),
}  # fmt: skip
#: Difference in nats that is coloured fully.
FULL = 3.0
#: Height of a line of the coloured text, in inches.
LINE = 0.18


def binned(losses: Sequence[Tensor], width: int) -> Tensor:
    """Sums and numbers of words by article and position, [articles, bins, 2]."""
    bins = max(math.ceil(len(l) / width) for l in losses)
    out = torch.zeros(len(losses), bins, 2, dtype=torch.float64)
    for row, l in zip(out, losses, strict=True):
        for i, part in enumerate(l.double().split(width)):
            row[i] = torch.tensor([float(part.sum()), float(len(part))])
    return out


def positions(losses: dict[str, list[Tensor]], compared: Sequence[str]) -> Figure:
    """Loss, and gain over the static model, against the position in the article."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = sorted(len(l) for l in losses["static"])
    # Further on too few articles are left to speak of a mean.
    reach = lengths[-max(3, len(lengths) // 4)] if len(lengths) >= 3 else lengths[-1]
    width = max(20, reach // 16)
    bins = max(1, reach // width)
    x = [(i + 0.5) * width for i in range(bins)]
    for name, values in losses.items():
        mean, _ = resampled(binned(values, width), 1)
        left.plot(x, mean[:bins], color=COLORS[name], label=NAMES[name], lw=2.4 if name == "learned" else 1.4)
        if name not in ("forgetful", "static"):
            gain = [s - l for s, l in zip(losses["static"], values, strict=True)]
            mean, drawn = resampled(binned(gain, width), 1000)
            right.plot(x, mean[:bins], color=COLORS[name], lw=2.4 if name == "learned" else 1.4)
            if name in compared:
                right.fill_between(x, *interval(drawn)[:, :bins], color=COLORS[name], alpha=0.18, lw=0)
    left.set(title="Loss while reading", xlabel="words read so far", ylabel="loss, nats per word")
    right.set(title="Gain over the static model", xlabel="words read so far", ylabel="nats per word")
    right.axhline(0.0, color="0.35", lw=1)
    count = len(losses["static"])
    right.text(0.02, 0.94, f"bands: 95%, over {count} articles", transform=right.transAxes, color="0.4")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def color(difference: float) -> str:
    """Green where a word became easier, red where it became harder."""
    strength = min(abs(difference) / FULL, 1.0) ** 0.7
    target = (70, 170, 95) if difference < 0 else (225, 80, 75)
    return "#{:02x}{:02x}{:02x}".format(*(round(255 + (t - 255) * strength) for t in target))


def text_picture(title: str, words: Sequence[str], differences: Sequence[float], columns: int = 120) -> Figure:
    """The article's words on a ground of their colours."""
    cells, row, column = [], 0, 0
    for word in words:
        if column + len(word) > columns:
            row, column = row + 1, 0
        cells.append((row, column))
        column += len(word) + 1
    rows = row + 1
    height = LINE * rows + 0.85
    figure = Figure(figsize=(10, height))
    axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.set(xlim=(0, columns), ylim=(rows + 0.3, -0.85 / LINE))
    axes.axis("off")
    axes.text(0, -3.5, f"What the learned adapter makes of “{title}”", fontsize=13, va="center")
    for x, value, said in ((0, -FULL, "easier than for the static model"), (44, FULL, "harder")):
        axes.add_patch(Rectangle((x, -2.6), 4, 1, color=color(value), lw=0))
        axes.text(x + 5, -2.1, said, fontsize=10, va="center")
    for word, difference, (r, c) in zip(words, differences, cells, strict=True):
        axes.add_patch(Rectangle((c, r - 0.5), len(word), 1, color=color(difference), lw=0))
        axes.text(c, r, word, fontsize=9.3, family="monospace", va="center_baseline", parse_math=False)
    return figure


def text_page(title: str, words: Sequence[str], differences: Sequence[float], static: Tensor) -> str:
    """The same as a page; pointing at a word shows its figures."""
    spans = " ".join(
        f'<span style="background:{color(d)}" title="static {s:.2f} nats, adapter {s + d:.2f}">{html.escape(w)}</span>'
        for w, d, s in zip(words, differences, static.tolist(), strict=True)
    )
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<body style="font:15px/1.7 monospace;max-width:60em;margin:2em auto">'
        f"<h1>{html.escape(title)}</h1><p>Green: easier than for the static model, red: harder. "
        f"Full colour from {FULL:g} nats on.</p><p>{spans}</p>\n"
    )


def updates(by_method: dict[str, dict[str, list[Tensor]]]) -> Figure:
    """Size of the updates, by tensor, along the article: the mean over articles and seven chunks."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(by_method), sharey=True, squeeze=False)[0]
    for axes, (method, tensors) in zip(all_axes, by_method.items(), strict=True):
        for name, sizes in tensors.items():
            reach = sorted(len(s) for s in sizes)[len(sizes) // 2]
            mean = [torch.stack([s[i] for s in sizes if len(s) > i]).mean() for i in range(reach)]
            label, shade = TENSORS[name]
            smooth = [100 * float(torch.stack(mean[max(0, i - 3) : i + 4]).mean()) for i in range(reach)]
            axes.plot(range(1, reach + 1), smooth, color=shade, label=label, lw=1.6)
        axes.set(title=NAMES[method], xlabel="chunks read so far", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    all_axes[0].set_ylabel("size of an update, % of the weights")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def lengths(losses: dict[str, list[Tensor]], compared: Sequence[str]) -> Figure:
    """Gain over a whole article against its length."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    x = torch.tensor([float(len(l)) for l in losses["static"]])
    gains = {
        name: torch.stack([(s - l).mean() for s, l in zip(losses["static"], losses[name], strict=True)])
        for name in compared
    }
    for length, values in zip(x.tolist(), torch.stack(list(gains.values()), 1).tolist(), strict=True):
        axes.plot([length, length], [min(values), max(values)], color="0.8", lw=1, zorder=1)
    for name, gain in gains.items():
        axes.scatter(x, gain, color=COLORS[name], s=28, label=NAMES[name], zorder=2)
        design = torch.stack([torch.ones_like(x), x.log()], 1)
        if float(x.std()) > 0.0:
            line = torch.linalg.lstsq(design, gain[:, None]).solution[:, 0]
            ends = torch.stack([x.min(), x.max()])
            axes.plot(ends, line[0] + line[1] * ends.log(), color=COLORS[name], lw=1.2, alpha=0.7)
    axes.axhline(0.0, color="0.35", lw=1)
    axes.set(xscale="log", xlabel="words in the article", ylabel="gain over the static model, nats per word")
    ticks = [t for t in (200, 400, 700, 1000, 2000, 4000, 8000) if float(x.min()) * 0.8 < t < float(x.max()) * 1.25]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="upper left")
    axes.set_title("Gain against the length of the article")
    return figure


def levels() -> Figure:
    """The three levels of memory."""
    figure = Figure(figsize=(9, 3.5))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 9), ylim=(0, 3.5))
    axes.axis("off")
    rows = (
        (2.55, "Short term: the LSTM's state", "moves with every word, forgotten at the article's end", "#edae49"),
        (1.45, "Medium term: differences from static weights", "moved after every chunk, by a learned rule", "#d1495b"),
        (0.35, "Long term: the static weights", "trained once, the same for every article", "#1f5fa8"),
    )  # fmt: skip
    for y, what, how, shade in rows:
        axes.add_patch(FancyBboxPatch((0.2, y), 4.3, 0.7, "round,pad=0.08", fc="white", ec=shade, lw=2))
        axes.text(0.3, y + 0.47, what, fontsize=10.5, va="center", weight="bold")
        axes.text(0.3, y + 0.17, how, fontsize=9, va="center", color="0.3")
    start, end = 5.0, 8.8
    words = torch.linspace(start, end, 41).tolist()
    axes.plot(
        words[:-1], [2.9 + 0.22 * math.sin(2.1 * i) * math.cos(0.7 * i) for i in range(40)], color="#edae49", lw=1.6
    )
    stairs = [1.5 + 0.62 * (1.0 - math.exp(-i / 3.0)) for i in range(9)]
    axes.step(torch.linspace(start, end, 9).tolist(), stairs, where="post", color="#d1495b", lw=1.8)
    axes.plot([end, end], [stairs[-1], stairs[0]], color="#d1495b", lw=1.8, ls=":")
    axes.plot([start, end], [0.7, 0.7], color="#1f5fa8", lw=1.8)
    for x in torch.linspace(start, end, 9).tolist():
        axes.plot([x, x], [0.3, 3.3], color="0.9", lw=0.8, zorder=0)
    axes.text((start + end) / 2, 0.1, "the article, chunk by chunk", fontsize=9, ha="center", color="0.3")
    return figure


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours: a page of coloured words is a third as large as with all."""
    page = io.BytesIO()
    figure.savefig(page, dpi=130)
    Image.open(page).convert("RGB").quantize(256).save(path, optimize=True)


def draw(run: Path) -> None:
    """All pictures of a run, into its folder."""
    path = run / "results.json"
    if not path.is_file():
        raise SystemExit(f"no {path}: run evaluate.py with --out {run} first")
    results = json.loads(path.read_text(encoding="utf-8"))
    read = torch.load(run / "readings.pt", weights_only=True)
    losses = read["losses"]
    compared = (results["against"]["reference"], results["against_with_memory"]["reference"], "learned")
    figures = {"positions": positions(losses, compared[::2]), "updates": updates(read["updates"]),
               "lengths": lengths(losses, compared), "levels": levels()}  # fmt: skip
    # Of the articles that fit on a page, the one whose gain is nearest to the gain of all.
    fitting = [i for i, w in enumerate(read["words"]) if len(w) <= 1100] or [0]
    gain = results["methods"]["learned"]["gain"][4]
    shown = min(fitting, key=lambda i: abs(float((losses["static"][i] - losses["learned"][i]).mean()) - gain))
    words, title = read["words"][shown][:1100], read["titles"][shown]
    differences = (losses["learned"][shown] - losses["static"][shown]).tolist()
    figures["article"] = text_picture(title, words, differences[: len(words)])
    for name, figure in figures.items():
        save(figure, run / f"{name}.png")
    page = text_page(title, read["words"][shown], differences, losses["static"][shown])
    (run / "article.html").write_text(page, encoding="utf-8")


def filled(readme: str, results: dict[str, Any]) -> str:
    """The README with this run's table and counts between its marks."""
    rows = []
    for name, tried in results["tuned"].items():
        # The factor for the memory is no setting where there is none.
        shown = {k: v for k, v in tried.items() if k != "memory" or name in ("cache", *WITH_MEMORY)}
        rows.append(f"| {NAMES[name]} | {', '.join(f'{k} {v:.3g}' for k, v in shown.items())} |")
    speed = results["words_per_second"]
    paces = [f"| {NAMES[n]} | {v:.0f} | {v / speed['static']:.2f} |" for n, v in speed.items()]
    parts = {
        "speed": "\n".join(["|  | words a second | over static |", "| --- | --: | --: |", *paces]),
        "table": markdown(results),
        "corpus": "\n".join(["```text", *results["corpus"], "```"]),
        "tuned": "\n".join(["|  | chosen on validation articles |", "| --- | --- |", *rows]),
        "seconds": "\n".join(["| stage | seconds |", "| --- | --: |",
                              *(f"| {k} | {v:.0f} |" for k, v in results["seconds"].items())]),
    }  # fmt: skip
    for name, body in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = mark.sub(lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", readme)
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--publish", action="store_true", help="copy everything beside README.md and fill its tables")
    args = parser.parse_args()
    draw(args.run)
    if args.publish:
        (HERE / "figures").mkdir(exist_ok=True)
        for path in (*args.run.glob("*.png"), args.run / "article.html"):
            shutil.copy(path, HERE / "figures")
        shutil.copy(args.run / "results.json", HERE)
        readme = HERE / "README.md"
        results = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
        readme.write_text(filled(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
