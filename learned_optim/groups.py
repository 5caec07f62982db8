"""Parameter groups of a model: what each of its tensors is, read off the modules that own them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from learned_optim.engine.kinds import KIND_KEYS
from learned_optim.rule.layouts import EMBEDDING_ASPECT

#: Modules whose name says that they compute several things at once, and how many, each with as many outputs.
_PACKED = {"qkv": 3, "Wqkv": 3, "qkv_proj": 3, "c_attn": 3, "gate_up_proj": 2}
#: Layers that store queries, keys and values head by head, and how the names of the classes that own them begin.
_BY_HEAD: dict[str, tuple[str, ...]] = {
    "query_key_value": ("",),
    "qkv_proj": ("CodeGen", "MiniMax"),
    "c_attn": ("GPTBigCode",),
    "in_proj": ("Disentangled",),
}
#: What modules call the width of a head.
_HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size", "hidden_size_per_attention_head")
#: Gates that lie below each other in the weights of recurrent layers.
_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
#: Names of what is stored of a weight: as it is, pruned, or in one of torch's parametrizations, of direction and size.
_STORED = ("weight", "weight_orig", "weight_v")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
#: In names of parameters that a module of unknown type owns.
_EMBEDDINGS = ("embed", "pos_", "position", "token")

Keys = dict[str, Any]


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **group_defaults: Any,
) -> list[dict[str, Any]]:
    """Ordinary parameter groups that say what each tensor of a model is.

    Known are torch's own layers and, by class or name, what models keep in one tensor: the packed projections of
    ``nn.MultiheadAttention``, GPT-2, GPT-NeoX, Mamba and their like, gates of recurrent layers, stacks of experts,
    transposed convolutions. Embeddings and heads are told from matrices by module, not by aspect ratio: a head is what
    ``get_output_embeddings()`` names, or the last linear layer if its weight has an embedding's shape or 16 outputs for
    each input. What is not known is left to its shape. Weight decay goes to everything but biases, norms, other
    vectors, and what is marked ``_no_weight_decay``.

    Args:
        model: of any kind; parameters that need no gradient are among the groups, too, and stay as they are.
        weight_decay: of the groups that have any.
        overrides: keys by pattern of parameter names (``{"*.w_experts": {"stacked": 1}}``), of which later ones win:
            ``role``, ``stacked``, ``split``, ``transposed``, or anything else that a group may hold. A tied parameter
            has several names; any of them will do.
        group_defaults: put into every group, such as ``lr``.

    Returns:
        Groups with parameters by name, in the model's order; see ``docs/groups.md`` for their keys. Optimizers that do
        not know these leave them alone.

    Raises:
        TypeError: this is no module, or overrides are no mappings.
        ValueError: a pattern that fits no parameter; a lazy layer that has not seen an input yet.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8), nn.LayerNorm(8))
        >>> [(group["role"], group["weight_decay"], len(group["params"])) for group in param_groups(model)]
        [('embedding', 0.01, 1), ('matrix', 0.01, 1), ('vector', 0.0, 3)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes a module, found {type(model).__name__}; for parameters see docs/groups.md")
    named = dict(model.named_parameters())
    lazy = [name for name, p in named.items() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"{lazy} have no shape yet: run the model on an input first")
    overrides = {} if overrides is None else overrides
    of_patterns = overrides.values() if isinstance(overrides, Mapping) else [overrides]
    if any(not isinstance(changed, Mapping) or "params" in changed for changed in of_patterns):
        raise TypeError(
            f"Invalid overrides: {overrides!r}; expected group keys by pattern, {{'head.*': {{'lr': 1e-4}}}}"
        )
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    unused = [pattern for pattern in overrides if not any(_fits(of_one, pattern) for of_one in names.values())]
    if unused:
        raise ValueError(f"no parameter has a name like {unused}; there are {list(named)[:8]} and so on")
    uses = _uses(model)
    heads = _heads(model)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, p in named.items():
        keys = _of_parameter(uses[p], heads)
        found = keys.get("role")
        for pattern, changed in overrides.items():
            if _fits(names[p], pattern):
                keys |= changed
        decay = 0.0 if (keys.get("role") or found) == "vector" else weight_decay
        group = {"weight_decay": decay, **group_defaults, **keys}
        group = {key: value for key, value in group.items() if key not in KIND_KEYS or value is not None}
        # What is printed of a tensor is rounded: two learning rates may look the same.
        same = tuple(sorted((key, id(v) if isinstance(v, Tensor) else repr(v)) for key, v in group.items()))
        groups.setdefault(same, {"params": [], **group})["params"].append((name, p))
    return list(groups.values())


def _fits(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


class _Use(NamedTuple):
    """A module that owns a parameter."""

    module: nn.Module
    parent: nn.Module | None
    module_name: str  #: in its parent
    name: str  #: of the parameter in the module
    p: Tensor


def _uses(model: nn.Module) -> dict[Tensor, list[_Use]]:
    """All modules that own each parameter: of tied ones there are several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[Tensor, list[_Use]] = {}
    for path, module in modules.items():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # what it stores is its owner's
        above, _, last = path.rpartition(".")
        parent = modules[above] if path else None
        for name, p in _stored(module):
            uses.setdefault(p, []).append(_Use(module, parent, last, name, p))
    return uses


def _stored(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters that a module owns, parametrized ones under the names that they had before ``parametrize`` was there.

    None is asked for by its name: to read a parametrized weight is to compute it, which may change buffers.
    """
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    made_of = getattr(module, "parametrizations", None)
    for name, parts in made_of.items() if isinstance(made_of, nn.ModuleDict) else ():
        halves = {"original0": f"{name}_g", "original1": f"{name}_v"} if _is_weight_norm(parts) else {}
        for part, p in parts.named_parameters(recurse=False, remove_duplicate=False):
            yield halves.get(part, name), p


def _is_weight_norm(parts: nn.Module) -> bool:
    return [type(part).__name__ for part in parts.children()] == ["_WeightNorm"]


def _weight(module: nn.Module) -> Tensor | None:
    """What is stored of a layer's weight, or what sharding has put in its place."""
    stored = dict(_stored(module))
    found = next((stored[name] for name in _STORED if name in stored), None)
    if found is None and not parametrize.is_parametrized(module, "weight"):
        found = getattr(module, "weight", None)
    return found if isinstance(found, Tensor) else None


def _heads(model: nn.Module) -> set[Tensor]:
    """Weights that predict a vocabulary, tied ones among them."""
    heads: set[Tensor] = set()
    shapes: set[torch.Size] = set()
    last: Tensor | None = None
    count: dict[torch.Size, int] = {}
    for module in model.modules():
        weight = _weight(module) if isinstance(module, nn.Embedding | nn.Linear) else None
        if isinstance(module, nn.Embedding) and weight is not None:
            shapes.add(weight.shape)
        elif weight is not None and weight.ndim == 2:
            last = weight
            count[last.shape] = count.get(last.shape, 0) + 1
        outputs = getattr(module, "get_output_embeddings", None)
        head = None
        with suppress(NotImplementedError):  # of a base class: the model names none
            head = outputs() if callable(outputs) else None
        if isinstance(head, nn.Module):
            heads.update(p for p in head.parameters(recurse=False) if p.ndim == 2)
    if last is not None:
        rows, columns = last.shape
        if rows >= EMBEDDING_ASPECT * columns or (last.shape in shapes and count[last.shape] == 1):
            heads.add(last)
    return heads


def _of_parameter(uses: list[_Use], heads: set[Tensor]) -> Keys:
    """The keys of a parameter."""
    p = uses[0].p
    if getattr(p, "_no_weight_decay", False) or any(_is_magnitude(use) for use in uses):
        return {"role": "vector"}
    if any(isinstance(use.module, nn.Embedding | nn.EmbeddingBag) for use in uses):
        return {"role": "embedding"}
    if p in heads:
        return {"role": "head"}
    use = uses[0]
    for known in (_recurrent, _attention, _convolution, _linear):
        if (keys := known(use)) is not None:
            break
    else:
        keys = _unknown(use)
    if "bias" in use.name or p.ndim - keys.get("stacked", 0) <= 1:
        keys["role"] = "vector"
    return keys


def _is_magnitude(use: _Use) -> bool:
    """Whether it holds the lengths of a weight's rows, of which another one holds the directions."""
    name, found, _ = use.name.rpartition("_g")
    return bool(found) and any(other == f"{name}_v" for other, _ in _stored(use.module))


def _recurrent(use: _Use) -> Keys | None:
    if not isinstance(use.module, nn.RNNBase | nn.RNNCellBase):
        return None
    gates = next((n for kind, n in _GATES.items() if isinstance(use.module, kind)), 1)
    projection = use.name.startswith("weight_hr")
    return {"role": "matrix", **({"split": gates} if gates > 1 and not projection else {})}


def _attention(use: _Use) -> Keys | None:
    if not isinstance(use.module, nn.MultiheadAttention):
        return None
    if use.name in ("bias_k", "bias_v"):  # [1, 1, width]
        return {"role": "vector"}
    return {"role": "matrix", **({"split": 3} if use.name.startswith("in_proj") else {})}


def _convolution(use: _Use) -> Keys | None:
    module = use.module
    if not isinstance(module, nn.modules.conv._ConvNd) or not use.name.startswith("weight"):
        return None
    # Filters of groups, depthwise ones among them, are one matrix: cut by groups they did worse, see docs/groups.md. In
    # transposed convolutions they would have to be cut along the inputs.
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups == 1
    return {"role": "conv", **({"transposed": True} if transposed else {})}


def _linear(use: _Use) -> Keys | None:
    """Linear layers, and GPT-2's Conv1D, which is one that is stored transposed."""
    module = use.module
    if isinstance(module, nn.Bilinear):
        return {"role": "matrix"}
    transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    weight = _weight(module) if transposed or isinstance(module, nn.Linear) else None
    if weight is None or weight.ndim != 2:  # sharding flattens it, subclasses stack several
        return None
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    split = _split(use, outputs, inputs)
    return {
        "role": "matrix",
        **({"split": split} if split else {}),
        **({"transposed": True} if transposed and use.p.ndim == 2 else {}),
    }


def _split(use: _Use, outputs: int, inputs: int) -> int | tuple[int, ...] | None:
    """How the outputs of a layer with a telling name are cut."""
    if (by_head := _by_head(use, outputs)) is not None:
        return by_head
    if hasattr(use.parent, "A_log"):
        return _state_space(use, outputs)
    count = _PACKED.get(use.module_name, 0)
    if count == 2:
        return 2 if outputs % 2 == 0 else None
    if use.module_name == "c_attn" and outputs == 2 * inputs:  # keys and values of what attends to another sequence
        return 2
    if use.module_name == "qkv_proj":  # with fewer keys and values than queries
        heads, width = getattr(use.parent, "num_key_value_heads", None), getattr(use.parent, "head_dim", None)
        if isinstance(heads, int) and isinstance(width, int) and 0 < 2 * heads * width < outputs:
            keys = heads * width
            return 3 if outputs == 3 * keys else (outputs - 2 * keys, keys, keys)
    return 3 if count == 3 and outputs == 3 * inputs else None


def _by_head(use: _Use, outputs: int) -> int | None:
    """How many matrices of a head's width: the one cut that fits whatever order queries, keys and values are in."""
    if not type(use.parent).__name__.startswith(_BY_HEAD.get(use.module_name, ())):
        return None
    heads = 3 * _size(use.parent, "num_attention_heads", "num_heads", "n_head")
    width = _size(use.parent, *_HEAD_WIDTHS) or (outputs // heads if heads and outputs % heads == 0 else 0)
    return outputs // width if width and outputs % width == 0 and outputs > width else None


def _state_space(use: _Use, outputs: int) -> int | tuple[int, ...] | None:
    """The projections of Mamba and Mamba 2, by the sizes that their mixers know."""
    mixer = use.parent
    inner, state = _size(mixer, "intermediate_size", "d_inner"), _size(mixer, "ssm_state_size", "d_state")
    shared = _size(mixer, "n_groups", "ngroups") * state
    steps, heads = _size(mixer, "time_step_rank", "dt_rank"), _size(mixer, "num_heads", "nheads")
    known = {"x_proj": [(steps, state, state)], "in_proj": [(inner, inner, shared, shared, heads)]}
    if hasattr(mixer, "x_proj"):  # Zamba's mixer has none, and there the rows of the two halves take turns
        known["in_proj"] = [(inner, inner)]
    for sizes in known.get(use.module_name, ()):
        if all(sizes) and sum(sizes) == outputs:
            return len(sizes) if len(set(sizes)) == 1 else sizes
    return None


def _size(module: nn.Module | None, *names: str) -> int:
    """The first of these attributes that is a positive integer; 0 where there is none."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)


def _unknown(use: _Use) -> Keys:
    """By name, for what torch has no layer for."""
    module, name, p = use.module, use.name, use.p
    kind = type(module).__name__
    if isinstance(module, _NORMS) or "norm" in kind.lower() or name == "A_log":
        return {"role": "vector"}
    if p.ndim >= 2 and ("expert" in kind.lower() or "expert" in name.lower() or "expert" in use.module_name.lower()):
        return _experts(use)
    if "bias" in name:
        return {"role": "vector"}
    if any(part in name for part in _EMBEDDINGS):
        return {"role": "embedding" if sum(n > 1 for n in p.shape) > 1 else "vector"}
    return {"role": "matrix"} if name == "weight" and p.ndim == 2 else {}


def _experts(use: _Use) -> Keys:
    """A stack [experts, outputs, inputs], or [experts, inputs, outputs] where the module says so, or its shapes."""
    module, p = use.module, use.p
    if p.ndim == 2:  # biases, or a stack in the hands of a module of its own
        return {"stacked": 1} if "bias" in use.name else {}
    both = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    transposed, concatenated = getattr(module, "is_transposed", None), getattr(module, "is_concatenated", True)
    if transposed is None and all(isinstance(w, Tensor) and w.ndim == 3 for w in both):
        (first, second), (third, fourth) = both[0].shape[1:], both[1].shape[1:]  # pyright: ignore[reportOptionalMemberAccess]
        transposed = (first, second) == (fourth, 2 * third) and (first, second) != (2 * fourth, third)
    keys: Keys = {"role": "matrix", "stacked": 1}
    if use.name == "gate_up_proj" and concatenated:
        keys["split"] = 2
    if transposed:
        keys["transposed"] = True
    return keys
