"""Training families on generated graphs: labels of nodes from few labelled ones, full batch, and missing links."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..nets import ACTIVATIONS, initialise, random_style
from ..sampling import Data, chance, choice, integer, log_int, log_uniform, run_length, spawn, uniform

DEGREE = 12
"""Most neighbours that a node listens to: a list of fixed length is gathered, which ``vmap`` does for all runs."""


class Graph:
    """A degree-corrected stochastic block model with noisy features of its nodes.

    Blocks are finer than classes (a class is two blocks or more), edges mostly join nodes of one block or, in some
    graphs, of different ones, and hubs have many; features are the block's mean in few directions, with much noise,
    or sparse words of the block.

    Args:
        rng: source of every choice; the graph itself is made at first use.
        nodes: number of nodes.
        classes: number of labels.
        columns: number of features.
        together: least part of the edges that the blocks decide.
        opposites: how often these join different blocks.
    """

    def __init__(
        self,
        rng: torch.Generator,
        nodes: int,
        classes: int,
        columns: int,
        together: float = 0.5,
        opposites: float = 0.25,
    ) -> None:
        self.nodes, self.classes, self.columns = nodes, classes, columns
        self.blocks, self.degree = classes * integer(rng, 1, 3), uniform(rng, 4.0, 12.0)
        self.together, self.hubs = uniform(rng, together, 0.95), uniform(rng, 0.0, 0.8)
        self.signal, self.words, self.wrong = uniform(rng, 0.5, 1.5), chance(rng, 0.4), uniform(rng, 0.05, 0.2)
        self.opposites, self.make_rng = chance(rng, opposites), spawn(rng)
        self._moved: dict[torch.device, Data] = {}

    @functools.cached_property
    def made(self) -> Data:
        """Features ``[nodes, columns]``, neighbours ``[nodes, DEGREE + 1]`` with the node itself first, whether
        there is one, labels ``[nodes]``, and all edges ``[edges, 2]``."""
        rng = self.make_rng()
        n, block = self.nodes, torch.randint(self.blocks, (self.nodes,), generator=self.make_rng())
        partner = torch.randperm(self.blocks, generator=rng) if self.opposites else torch.arange(self.blocks)
        weight = torch.exp(self.hubs * torch.randn(n, generator=rng))
        edges = round(n * self.degree / 2)
        start = torch.multinomial(weight, edges, replacement=True, generator=rng)
        end = torch.multinomial(weight, edges, replacement=True, generator=rng)
        # Of those that should stay near, the end is drawn from the block's own list of nodes.
        order = block.argsort(stable=True)
        counts = torch.bincount(block, minlength=self.blocks)
        first, wanted = counts.cumsum(0) - counts, partner[block[start]]
        near = order[(first[wanted] + (torch.rand(edges, generator=rng) * counts[wanted]).long()).clamp(max=n - 1)]
        end = torch.where(torch.rand(edges, generator=rng) < self.together, near, end)
        pairs = torch.stack([start, end], 1)[start != end].sort(1).values.unique(dim=0)
        return self._features(rng, block), *self.listed(rng, pairs), self._labels(rng, block), pairs

    def _features(self, rng: torch.Generator, block: Tensor) -> Tensor:
        means = torch.randn(self.blocks, self.columns, generator=rng)
        if self.words:
            rate = 0.06 * (self.signal * means).exp()
            return (torch.rand(self.nodes, self.columns, generator=rng) < rate[block].clamp(max=0.8)).float()
        x = self.signal * means[block] * (8 / self.columns) ** 0.5
        return x + torch.randn(self.nodes, self.columns, generator=rng)

    def listed(self, rng: torch.Generator, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours by these edges ``[edges, 2]``, and whether there is one, as in ``made``."""
        both = torch.cat([pairs, pairs.flip(1)])
        both = both[torch.randperm(len(both), generator=rng)]
        both = both[both[:, 0].argsort(stable=True)]
        counts = torch.bincount(both[:, 0], minlength=self.nodes)
        column = torch.arange(len(both)) - (counts.cumsum(0) - counts)[both[:, 0]]
        kept = column < DEGREE
        table = torch.arange(self.nodes)[:, None].repeat(1, DEGREE + 1)
        present = torch.zeros(self.nodes, DEGREE + 1, dtype=torch.bool)
        present[:, 0] = True
        table[both[kept, 0], column[kept] + 1] = both[kept, 1]
        present[both[kept, 0], column[kept] + 1] = True
        return table, present

    def _labels(self, rng: torch.Generator, block: Tensor) -> Tensor:
        guess = torch.randint(self.classes, (self.nodes,), generator=rng)
        wrong = torch.rand(self.nodes, generator=rng) < self.wrong
        return torch.where(wrong, guess, block % self.classes)

    def on(self, device: torch.device) -> Data:
        """``made`` there. The graph is no part of batches or buffers: of those there is a copy per step or run."""
        if device not in self._moved:
            self._moved[device] = tuple(t.to(device) for t in self.made)
        return self._moved[device]


class GraphLayer(nn.Module):
    """One round of messages: ``[nodes, inputs]`` to ``[nodes, outputs]``.

    ``"gcn"``: mean with weights of both degrees; ``"sage"``: the node itself beside its neighbours' mean; ``"gat"``:
    attention by an additive score; ``"gin"``: a network on the sum.
    """

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kind = kind
        self.lin = nn.Linear(inputs, outputs)
        if kind == "sage":
            self.own = nn.Linear(inputs, outputs, bias=False)
        elif kind == "gat":
            self.score = nn.Linear(outputs, 2, bias=False)
        elif kind == "gin":
            self.network = nn.Sequential(nn.ReLU(), nn.Linear(outputs, outputs))

    def forward(self, x: Tensor, neighbours: Tensor, present: Tensor) -> Tensor:
        def gather(values: Tensor) -> Tensor:
            return values.index_select(0, neighbours.flatten()).view(*neighbours.shape, -1)

        h, there = self.lin(x), present.to(x.dtype)
        if self.kind == "gat":
            mine, theirs = self.score(h).unbind(1)
            scores = F.leaky_relu(mine[:, None] + gather(theirs[:, None]).squeeze(2), 0.2)
            weight = scores.masked_fill(~present, -math.inf).softmax(1)
        elif self.kind == "gcn":
            degree = there.sum(1)
            weight = there * (degree[:, None] * degree[neighbours]).rsqrt()
        elif self.kind == "gin":
            return self.network((there.unsqueeze(2) * gather(h)).sum(1) * 0.3)
        else:
            others = there[:, 1:]
            weight = F.pad(others / others.sum(1, keepdim=True).clamp(min=1), (1, 0))
        out = (weight.unsqueeze(2) * gather(h)).sum(1)
        return out + self.own(x) if self.kind == "sage" else out


class GraphNet(nn.Module):
    """Layers of messages on a whole graph; gives ``[nodes, outputs]``."""

    def __init__(self, kind: str, widths: list[int], activation: str, normed: bool, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer(kind, a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(w) if normed else nn.Identity() for w in widths[1:-1])
        self.act, self.residual = ACTIVATIONS[activation](), residual

    def forward(self, graph: Data) -> Tensor:
        x, neighbours, present = graph
        for layer, norm in zip(self.layers, self.norms, strict=False):
            h = self.act(norm(layer(x, neighbours, present)))
            x = x + h if self.residual and h.shape == x.shape else h
        return self.layers[-1](x, neighbours, present)


def _network(rng: torch.Generator, columns: int, outputs: int) -> Callable[[], nn.Module]:
    style = random_style(rng, inits=("default", "xavier", "scaled"))
    kind, hidden, depth = choice(rng, ("gcn", "sage", "gat", "gin")), log_int(rng, 12, 64), integer(rng, 1, 3)
    widths, normed = [columns, *[hidden] * depth, outputs], style.norm != "none"
    return lambda: initialise(GraphNet(kind, widths, style.activation, normed, style.residual), style)


def graphs_full_batch(rng: torch.Generator) -> Task:
    """Some nodes of one graph have labels, in part wrong; every step sees the whole graph and the same labels.

    Semi-supervised classification as of papers in a citation network, with a penalty on squared weights as usual
    there: there is no gradient noise at all. Held-out, without the penalty, are the nodes that have no label.
    """
    nodes, classes, columns = log_int(rng, 400, 1500), integer(rng, 3, 12), log_int(rng, 12, 96)
    graph, share, penalty = Graph(rng, nodes, classes, columns), uniform(rng, 0.2, 0.8), log_uniform(rng, 3e-4, 3e-3)
    make, make_rng = _network(rng, columns, classes), spawn(rng)

    def some(held_out: bool) -> Data:
        order, cut = torch.randperm(nodes, generator=make_rng()), round(share * nodes)
        index = order[cut:] if held_out else order[:cut]
        return index, graph.made[3][index]

    def batches(_: torch.Generator) -> Iterator[Data]:
        batch = some(False)
        while True:
            yield batch

    def loss(module: nn.Module, batch: Data) -> Tensor:
        index, labels = batch
        cost = F.cross_entropy(module(graph.on(index.device)[:3]).index_select(0, index), labels)
        if module.training:
            cost = (
                cost + penalty / 2 * torch.stack([w.square().sum() for w in module.parameters() if w.dim() > 1]).sum()
            )
        return cost

    length = run_length(rng, 250, 600, 12 * nodes * columns * 48)
    return ModuleTask(make, batches, loss, length=length, eval_batch=lambda: some(True))


def graph_links(rng: torch.Generator) -> Task:
    """Which pairs of nodes are linked: embeddings of nodes from the graph without the links in question.

    As in social graphs: messages run along half of the links, a batch is some of another 40% and as many random
    pairs, held-out are the rest. Links that carry messages are not asked for: they would be too easy to tell.
    """
    nodes, columns, width = log_int(rng, 300, 1500), log_int(rng, 16, 96), log_int(rng, 16, 64)
    graph = Graph(rng, nodes, integer(rng, 8, 24), columns, together=0.75, opposites=0.0)
    make, make_rng, batch_size = _network(rng, columns, width), spawn(rng), log_int(rng, 64, 512)

    @functools.cache
    def parts() -> tuple[Tensor, Tensor, Data]:
        """Links of batches, held-out ones, and the neighbours that messages come from."""
        split_rng = make_rng()
        pairs = graph.made[4][torch.randperm(len(graph.made[4]), generator=split_rng)]
        held_out, half = len(pairs) // 10, len(pairs) // 2
        return pairs[held_out:half], pairs[:held_out], graph.listed(split_rng, pairs[half:])

    def with_others(pairs: Tensor, pair_rng: torch.Generator) -> Data:
        """Pairs, and as many again whose second node is any, which now and then are links too."""
        other = torch.randint(nodes, (len(pairs),), generator=pair_rng)
        linked = torch.arange(2 * len(pairs)) < len(pairs)
        return torch.cat([pairs, torch.stack([pairs[:, 0], other], 1)]), linked.float()

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        pairs = parts()[0]
        while True:
            yield with_others(pairs[torch.randint(len(pairs), (batch_size,), generator=batch_rng)], batch_rng)

    moved: dict[torch.device, Data] = {}

    def loss(module: nn.Module, batch: Data) -> Tensor:
        pairs, linked = batch
        if pairs.device not in moved:
            moved[pairs.device] = tuple(t.to(pairs.device) for t in (graph.made[0], *parts()[2]))
        x = module(moved[pairs.device])
        start, end = (x.index_select(0, index) for index in pairs.unbind(1))
        scores = (start * end).sum(1) / width**0.5
        return F.binary_cross_entropy_with_logits(scores, linked)

    length = run_length(rng, 250, 600, 12 * nodes * columns * 48)
    return ModuleTask(make, batches, loss, length=length, eval_batch=lambda: with_others(parts()[1], make_rng()))


FAMILIES = (
    TaskFamily("graphs_full_batch", "labels of nodes by graph networks, full batch", "train", graphs_full_batch),
    TaskFamily("graph_links", "missing links of a graph", "train", graph_links),
)
