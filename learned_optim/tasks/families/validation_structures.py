"""Validation families on structures: expressions translated from one notation to another, molecules."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import ModuleTask, Task, TaskFamily
from ..data_optional import standardise
from ..data_text import VALIDATION_MODULES, module_source
from ..sampling import Data, chance, choice, dataset_batches, dataset_task, integer, log_int, spawn, split, uniform

NAMES = tuple(f"v{i}" for i in range(12))
OPERATORS = {
    getattr(ast, name): sign
    for name, sign in (
        *(("Add", "+"), ("Sub", "-"), ("Mult", "*"), ("Div", "/"), ("Mod", "%"), ("FloorDiv", "//"), ("Pow", "**")),
        *(("Eq", "=="), ("NotEq", "!="), ("Lt", "<"), ("LtE", "<="), ("Gt", ">"), ("GtE", ">="), ("Is", "is")),
        *(("IsNot", "is not"), ("In", "in"), ("NotIn", "not in"), ("And", "and"), ("Or", "or"), ("Not", "not")),
        *(("USub", "neg"), ("BitAnd", "&"), ("BitOr", "|"), ("LShift", "<<"), ("RShift", ">>")),
    )
}
TOKENS = (
    "padding",
    "start",
    "end",
    *NAMES,
    "#",
    *OPERATORS.values(),
    *"()[],.",
    "[]",
    "call0",
    "call1",
    "call2",
    "call3",
)
VOCABULARY = {token: i for i, token in enumerate(TOKENS)}

_TOKEN = re.compile(r"(?:is not|not in)\b|\w+|//|\*\*|<<|>>|[=!<>]=|[^\s\w]")

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of an expression as Python writes it, and in postfix notation."""


def postfix(node: ast.expr) -> list[str]:
    """Operands first, then the operator; names as they are, zeros, which stand for any constant, as ``#``.

    Raises:
        KeyError: the expression holds what this notation has no sign for.
    """
    match node:
        case ast.Name(id=name):
            return [name]
        case ast.Constant(value=0):
            return ["#"]
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return [*postfix(left), *postfix(right), OPERATORS[type(op)]]
        case ast.UnaryOp(op=op, operand=operand):
            return [*postfix(operand), OPERATORS[type(op)]]
        case ast.BoolOp(op=op, values=[first, *others]):
            tokens = postfix(first)
            for other in others:
                tokens += [*postfix(other), OPERATORS[type(op)]]
            return tokens
        case ast.Attribute(value=value, attr=name):
            return [*postfix(value), name, "."]
        case ast.Subscript(value=value, slice=index):
            return [*postfix(value), *postfix(index), "[]"]
        case ast.Call(func=function, args=args, keywords=[]) if len(args) <= 3:
            return [*postfix(function), *(t for arg in args for t in postfix(arg)), f"call{len(args)}"]
    raise KeyError(type(node).__name__)


def pair(node: ast.expr) -> Pair | None:
    """The two notations with names numbered as they appear, or ``None`` if there is no such pair."""
    try:
        target = postfix(node)
    except KeyError:
        return None
    if not 5 <= len(target) <= 16:
        return None
    words = ["#" if word == "0" else word for word in _TOKEN.findall(ast.unparse(node))]
    signs = VOCABULARY.keys() - set(NAMES)
    numbered = {w: f"v{i}" for i, w in enumerate(w for w in dict.fromkeys(words) if w not in signs)}
    if len(numbered) > len(NAMES) or len(words) > 24:
        return None
    source = [VOCABULARY[numbered.get(word, word)] for word in words]
    return tuple(source), tuple(VOCABULARY[numbered.get(word, word)] for word in target)


@functools.cache
def library_pairs() -> tuple[Pair, ...]:
    """The different expressions of ``VALIDATION_MODULES``, whatever their names and constants are."""
    pairs: dict[Pair, None] = {}
    for tree in (ast.parse(source) for name in VALIDATION_MODULES for source in module_source(name)):
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
        for node in nodes:
            if isinstance(node, ast.Constant):
                node.value = 0
        pairs |= {found: None for node in nodes if (found := pair(node)) is not None}
    return tuple(pairs)


def random_expression(rng: torch.Generator, leaves: int) -> ast.expr:
    """A random tree of arithmetic with so many leaves; Python puts brackets where they are needed."""
    if leaves == 1:
        name = ast.Name(choice(rng, NAMES[:8]))
        return ast.UnaryOp(ast.USub(), name) if chance(rng, 0.1) else name
    left = integer(rng, 1, leaves - 1)
    op = choice(rng, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Mod, ast.Pow))
    return ast.BinOp(random_expression(rng, left), op(), random_expression(rng, leaves - left))


def generated_pairs(rng: torch.Generator, n: int) -> tuple[Pair, ...]:
    """Up to ``n`` different random expressions."""
    drawn = (pair(random_expression(rng, integer(rng, 3, 7))) for _ in range(n))
    return tuple(dict.fromkeys(p for p in drawn if p is not None))


def renamed(data: Data, rng: torch.Generator) -> Data:
    """The same expressions with other names, drawn for each row."""
    first, n = VOCABULARY[NAMES[0]], len(data[0])
    table = torch.arange(len(VOCABULARY)).repeat(n, 1)
    table[:, first : first + len(NAMES)] = first + torch.rand(n, len(NAMES), generator=rng).argsort(1)
    return tuple(table.gather(1, tokens) for tokens in data)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as one tensor, int64, zeros behind the shorter ones."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


class Translator(nn.Module):
    """Gated convolutions that read, and causal ones that write and look back after each (Gehring et al. 2017).

    Tokens ``[batch, source]`` and the target's ``[batch, target]`` so far, to logits ``[batch, target, vocabulary]``.
    """

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(32, width)
        self.readers, self.writers = (
            nn.ModuleList(nn.Linear(3 * width, 2 * width) for _ in range(depth)) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.questions = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.output = nn.Linear(width, vocabulary)
        for embedding in (self.embed, self.place):
            nn.init.normal_(embedding.weight, std=0.5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = words = self.embed(source) + self.place.weight[: source.shape[1]]
        depth = len(self.readers)
        for layer, norm in zip(self.readers, self.norms[:depth], strict=True):
            x = x + F.glu(layer(threes(norm(x), 1)))
        blank, keys = (source == 0)[:, None], x.transpose(1, 2)
        y = self.embed(target) + self.place.weight[: target.shape[1]]
        for layer, norm, question in zip(self.writers, self.norms[depth:], self.questions, strict=True):
            y = y + F.glu(layer(threes(norm(y), 2)))
            scores = (question(y) @ keys * keys.shape[1] ** -0.5).masked_fill(blank, -1e9)
            y = y + scores.softmax(-1) @ (x + words)
        return self.output(y)


def threes(x: Tensor, before: int) -> Tensor:
    """Every place of ``[batch, time, width]`` with ``before`` ones before it and the rest of three behind it."""
    x, time = F.pad(x, (0, 0, before, 2 - before)), x.shape[1]
    return torch.cat([x[:, i : i + time] for i in range(3)], -1)


def translation(module: Any, batch: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    """Cross-entropy (nats per token) with smoothed labels; padding does not count."""
    source, target = batch
    logits = module(source, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0, label_smoothing=smoothing)


def val_seq2seq(rng: torch.Generator) -> Task:
    """Expressions, random arithmetic or out of Python's library, are put into postfix notation.

    An encoder, a decoder that is told the right beginning, attention and label smoothing, as in translation: the
    order of words changes with the structure of the whole, and names, new ones in every batch, have to be copied.
    """
    generated, n, make_rng = chance(rng, 0.5), log_int(rng, 4000, 6000), spawn(rng)
    width, depth, smoothing = choice(rng, (48, 64)), 2, choice(rng, (0.05, 0.1))
    batch_size, length = log_int(rng, 16, 28), log_int(rng, 350, 500)

    @functools.cache
    def load() -> tuple[Data, Data]:
        pairs = generated_pairs(make_rng(), n) if generated else library_pairs()
        start, end = VOCABULARY["start"], VOCABULARY["end"]
        data = padded([source for source, _ in pairs]), padded([(start, *target, end) for _, target in pairs])
        return split(data, make_rng())

    def batches(batch_rng: torch.Generator) -> Iterator[Data]:
        for data in dataset_batches(load()[0], batch_size, batch_rng):
            yield renamed(data, batch_rng)

    return ModuleTask(
        lambda: Translator(len(VOCABULARY), width, depth),
        batches,
        lambda module, batch: translation(module, batch, smoothing),
        length=length,
        eval_batch=lambda: renamed(load()[1], make_rng()),
    )


VALENCE = torch.tensor([4, 3, 2, 3])  # of the kinds of atoms
LEVEL = torch.tensor([0.0, 0.5, 1.2, -0.8])  # on-site energies, in units of a single bond's


def molecules(rng: torch.Generator, n: int, atoms: int) -> tuple[Tensor, Tensor]:
    """Up to ``n`` trees of atoms, up to two rings of 5 or 6 in each: kinds ``[n, atoms]``, 4 for no atom, and bonds.

    Bonds are ``[n, atoms, atoms]``: 0, 1 or 2. No atom has more than its valence allows.
    """
    kinds = torch.multinomial(torch.tensor([0.6, 0.15, 0.15, 0.1]), n * atoms, replacement=True, generator=rng)
    kinds = kinds.view(n, atoms)
    size = torch.randint(atoms // 2, atoms + 1, (n, 1), generator=rng)
    kinds[:, :2] = 0  # a tree that begins with carbon can always grow on
    free, bonds = VALENCE[kinds].float(), torch.zeros(n, atoms, atoms)
    rows = torch.arange(n)

    def join(i: Tensor, j: Tensor, order: Tensor) -> None:
        for a, b in ((i, j), (j, i)):
            bonds[rows, a, b] += order
            free[rows, a] -= order

    for atom in range(1, atoms):
        parent = torch.multinomial(free[:, :atom].clamp_min(0) + 1e-6, 1, generator=rng)[:, 0]
        child = torch.full((n,), atom)
        both = torch.minimum(free[rows, parent], free[rows, child]) >= 3
        order = torch.where(both & (torch.rand(n, generator=rng) < 0.4), 2.0, 1.0)
        alive = (atom < size[:, 0]) & (free[rows, parent] >= 1)
        # An atom without a free neighbour ends the molecule.
        size = torch.where(alive[:, None], size, size.clamp_max(atom))
        join(parent, child, order * alive)
    for _ in range(2):
        near = (bonds > 0).float()
        walks = [torch.linalg.matrix_power(near, steps) > 0 for steps in (1, 2, 3, 4, 5)]
        far = (walks[3] | walks[4]) & ~walks[0] & ~walks[1] & ~walks[2] & ~torch.eye(atoms, dtype=torch.bool)
        weight = (far * (free[:, :, None] >= 1) * (free[:, None] >= 1)).float().flatten(1)
        some = weight.sum(1) > 0
        ends = torch.multinomial(weight + 1e-9, 1, generator=rng)[:, 0]
        join(ends // atoms, ends % atoms, (some & (torch.rand(n, generator=rng) < 0.7)).float())
    kinds = kinds.masked_fill(torch.arange(atoms) >= size, 4)
    # Small molecules come up more than once; none may be in both parts of the data.
    unlike = torch.unique(torch.cat([kinds, bonds.long().flatten(1)], 1), dim=0)
    return unlike[:, :atoms], unlike[:, atoms:].view(-1, atoms, atoms).float()


def orbitals(kinds: Tensor, bonds: Tensor) -> tuple[Tensor, Tensor]:
    """Energies ``[n, atoms]``, rising, and orbitals ``[n, atoms, atoms]`` of Hückel's model; 99 where no atom is."""
    absent = kinds == 4
    level = torch.where(absent, 99.0, -LEVEL[kinds.clamp_max(3)])
    coupling = torch.where(bonds == 2, 1.4, bonds)
    return torch.linalg.eigh(torch.diag_embed(level) - coupling)


def properties(kinds: Tensor, bonds: Tensor, wanted: str) -> Tensor:
    """What Hückel's model says of molecules: ``"energy"`` per atom, the ``"gap"``, or the atoms' ``"charges"``."""
    energies, vectors = orbitals(kinds, bonds)
    size = (kinds != 4).sum(1)
    pairs = size // 2
    filled = (torch.arange(kinds.shape[1]) < pairs[:, None]).float()
    if wanted == "energy":
        return 2 * (energies * filled).sum(1) / size
    if wanted == "gap":
        return (energies.gather(1, pairs[:, None]) - energies.gather(1, pairs[:, None] - 1))[:, 0]
    charges = 1 - 2 * (vectors.square() * filled[:, None]).sum(-1)
    return charges.masked_fill(kinds == 4, 0.0)


class BondNetwork(nn.Module):
    """Atoms hear their neighbours by the kind of bond, several times; then all together, or each for itself."""

    def __init__(self, width: int, depth: int, per_atom: bool) -> None:
        super().__init__()
        self.per_atom = per_atom
        self.embed = nn.Embedding(5, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(3 * width), nn.Linear(3 * width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.gate, self.value = nn.Linear(width, 1), nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, kinds: Tensor, bonds: Tensor) -> Tensor:
        present = (kinds != 4).float()[..., None]
        single, double = (bonds == 1).float(), (bonds == 2).float()
        x = self.embed(kinds)
        for layer in self.layers:
            x = x + layer(torch.cat([x, single @ x, double @ x], -1))
        x = self.norm(x)
        if self.per_atom:
            return (self.head(x) * present)[..., 0]
        return self.head((self.gate(x).sigmoid() * self.value(x) * present).mean(1))[:, 0]


def property_error(module: Any, batch: Data) -> Tensor:
    """Mean squared error in units of the property's variance; batch ``(kinds, bonds, targets)``."""
    kinds, bonds, targets = batch
    return F.mse_loss(module(kinds, bonds), targets)


def val_graph(rng: torch.Generator) -> Task:
    """A network on graphs learns properties of small molecules that Hückel's model computes from their bonds.

    Energies and charges depend on the whole molecule, rings included, as those that chemists fit; labels have a
    little noise.
    """
    wanted, atoms, n = choice(rng, ("energy", "gap", "charges")), integer(rng, 12, 18), log_int(rng, 3000, 6000)
    width, depth, noise = choice(rng, (48, 64)), integer(rng, 3, 5), uniform(rng, 0.02, 0.1)
    batch_size, length, make_rng = log_int(rng, 16, 40), log_int(rng, 350, 600), spawn(rng)

    def load() -> tuple[Data, Data]:
        data_rng = make_rng()
        kinds, bonds = molecules(data_rng, n, atoms)
        targets = properties(kinds, bonds, wanted)
        flat = standardise(targets.reshape(-1, 1)).view(targets.shape)
        return split((kinds, bonds, flat + noise * torch.randn(flat.shape, generator=data_rng)), data_rng)

    return dataset_task(
        lambda: BondNetwork(width, depth, wanted == "charges"),
        load,
        property_error,
        batch_size=batch_size,
        length=length,
    )


FAMILIES = (
    TaskFamily("val_seq2seq", "expressions put into postfix notation", "validation", val_seq2seq),
    TaskFamily("val_graph", "properties of molecules from their bonds", "validation", val_graph),
)
