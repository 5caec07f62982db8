"""Perplexities by quarter of an article, with intervals, as figures and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: What is compared, and what the tables call it.
NAMES = {
    "forgetful": "static, state forgotten at each chunk",
    "static": "static, state carried over",
    "cache": "static + unigram cache",
    "sgd": "dynamic evaluation, SGD",
    "adam": "dynamic evaluation, Adam",
    "rms": "dynamic evaluation, RMS and decay",
    "rms_memory": "dynamic evaluation, RMS, memory alone",
    "rms_all": "dynamic evaluation, RMS, with memory",
    "learned_memory": "learned adapter, memory alone",
    "learned": "learned adapter",
}


def quarters(losses: Sequence[Tensor]) -> Tensor:
    """Sums of losses and numbers of words by article and quarter, [articles, 4, 2]."""
    return torch.tensor(
        [[[float(part.double().sum()), float(len(part))] for part in l.tensor_split(4)] for l in losses],
        dtype=torch.float64,
    )


def resampled(sums: Tensor, draws: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Means of sums and counts [articles, ..., 2], and those of articles drawn with replacement, [draws, ...]."""
    index = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(seed))
    total, drawn = sums.sum(0), sums[index].sum(1)
    return total[..., 0] / total[..., 1], drawn[..., 0] / drawn[..., 1]


def interval(drawn: Tensor) -> Tensor:
    """The middle 95% of [draws, ...] as [2, ...]."""
    return torch.nanquantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype), 0)


def compare(
    by_method: dict[str, Tensor], plain: str, with_memory: str, draws: int = 4000, seed: int = 0
) -> dict[str, Any]:
    """Perplexities by quarter with 95% bootstrap intervals over articles, and gains over the static model.

    Args:
        by_method: :func:`quarters` of each method.
        plain: the best dynamic evaluation of the LSTM's weights.
        with_memory: the best dynamic evaluation that has the memory as well.
        draws: of the bootstrap.
        seed: of it.
    """
    means, drawn = {}, {}
    for name, sums in by_method.items():
        whole = torch.cat([sums, sums.sum(1, keepdim=True)], 1)  # the last column is the whole article
        means[name], drawn[name] = resampled(whole, draws, seed)

    table = {}
    for name in by_method:
        table[name] = {
            "perplexity": means[name].exp().tolist(),
            "perplexity_interval": interval(drawn[name].exp()).T.tolist(),
            "gain": (means["static"] - means[name]).tolist(),
            "gain_interval": interval(drawn["static"] - drawn[name]).T.tolist(),
        }

    def against(name: str) -> dict[str, Any]:
        sums = by_method["learned"].sum(1)[:, 0] - by_method[name].sum(1)[:, 0]
        columns = [0, 3, 4]
        ratio = (means["static"] - means["learned"])[3] / (means["static"] - means[name])[3]
        ratios = (drawn["static"] - drawn["learned"])[:, 3] / (drawn["static"] - drawn[name])[:, 3]
        return {
            "reference": name, "articles_better": int((sums < 0.0).sum()),
            "difference": (means["learned"] - means[name])[columns].tolist(),
            "difference_interval": interval((drawn["learned"] - drawn[name])[:, columns]).T.tolist(),
            "last_quarter_ratio": float(ratio), "last_quarter_ratio_interval": interval(ratios).tolist(),
        }  # fmt: skip

    comparisons = {"against": against(plain), "against_with_memory": against(with_memory)}
    return {"methods": table, "articles": len(by_method["static"])} | comparisons


def markdown(results: dict[str, Any]) -> str:
    """The table of a ``results.json``."""
    rows = ["|  | quarter 1 | quarter 2 | quarter 3 | quarter 4 | whole | gain in quarter 4, nats per word |",
            "| --- | --: | --: | --: | --: | --: | --: |"]  # fmt: skip
    for name, row in results["methods"].items():
        cells = [
            f"{value:.1f} ({low:.0f}–{high:.0f})"
            for value, (low, high) in zip(row["perplexity"], row["perplexity_interval"], strict=True)
        ]
        low, high = row["gain_interval"][3]
        rows.append(f"| {NAMES[name]} | {' | '.join(cells)} | {row['gain'][3]:.3f} ({low:.3f} to {high:.3f}) |")
    for key in ("against", "against_with_memory"):
        comparison = results[key]
        low, high = comparison["last_quarter_ratio_interval"]
        better = f"{comparison['articles_better']} of {results['articles']}"
        rows += [
            "", f"Gain of the learned adapter in the last quarter over that of *{NAMES[comparison['reference']]}*: "
            f"{comparison['last_quarter_ratio']:.2f} ({low:.2f} to {high:.2f}). Its loss is lower on {better} "
            f"articles; the paired difference in nats per word is {_differences(comparison)}.",
        ]  # fmt: skip
    return "\n".join(rows)


def _differences(comparison: dict[str, Any]) -> str:
    parts = zip(
        ("in the first quarter", "in the last", "over the whole"),
        comparison["difference"], comparison["difference_interval"], strict=True,
    )  # fmt: skip
    return ", ".join(f"{value:+.3f} ({low:+.3f} to {high:+.3f}) {where}" for where, value, (low, high) in parts)
