"""What the rule takes each tensor for, and what it did to it in the last step: no pass over memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from learned_optim.engine.collect import name_of, parts_of
from learned_optim.engine.head import StepRecord, StepReport
from learned_optim.engine.kinds import TensorKind
from learned_optim.engine.param_state import ParamIndex
from learned_optim.rule.config import PolicyConfig
from learned_optim.rule.context import cosine_of
from learned_optim.rule.layouts import ShapeContext
from learned_optim.rule.types import Coefficients, TensorSums


def summary_of(config: PolicyConfig, groups: Sequence[Mapping[str, Any]]) -> str:
    """See :meth:`learned_optim.LearnedOptimizer.summary`."""
    rows = [("parameter", "shape", "taken for", "orthogonalised", "weight decay")]
    for g, group in enumerate(groups):
        kind = TensorKind.of(group)
        for i, p in enumerate(group["params"]):
            decay = f"{float(group['weight_decay']):g}"
            if is_lazy(p):
                rows.append((name_of(groups, (g, i)), "not yet", "unknown, has no shape yet", "no", decay))
                continue
            parts = parts_of(groups, (g, i), kind, p)
            shape = parts[0].shape
            seen = ShapeContext.of(shape)
            role = kind.role or ("vector" if seen.is_vector else "conv" if seen.is_convolution else "matrix")
            of = {part.shape: None for part in parts}
            taken = f"{role}, by its shape" if kind.role is None else role
            if kind.is_packed:
                taken = f"{len(parts)} × {role} {', '.join(map(_times, of))}"
            elif parts[0].transposed:
                taken += ", stored transposed"
            matrices = [config.orthogonalization.matrix_shape(part.shape, kind.role) for part in parts]
            sizes = {_times(size): None for size in matrices if size}
            rows.append((name_of(groups, (g, i)), _times(p.shape), taken, ", ".join(sizes) or "no", decay))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def figures_by_parameter(config: PolicyConfig, report: StepReport) -> dict[str, dict[str, float]]:
    """See :meth:`learned_optim.LearnedOptimizer.diagnostics`."""
    factors: dict[ParamIndex, float] = {}
    for params, changed in report.length_factors:
        factors |= dict(zip(params, changed.tolist(), strict=True))
    rows: dict[ParamIndex, dict[str, float]] = {}
    for record in report.records:
        figures = _figures(config, record, [factors.get(index, 1.0) for index in record.params])
        if report.skipped:
            counts = torch.stack([report.skipped[index] for index in record.params])
            figures["skipped"] = counts.to(figures["step"])
        table = torch.stack(list(figures.values())).T.tolist()  # one transfer from the device
        rows |= {index: dict(zip(figures, row, strict=True)) for index, row in zip(record.params, table, strict=True)}
    uses = Counter(report.names[index] for index in rows)
    names = {i: f"{report.names[i]} ({i[0]}.{i[1]})" if uses[report.names[i]] > 1 else report.names[i] for i in rows}
    return {names[index]: rows[index] for index in sorted(rows)}


def _figures(config: PolicyConfig, record: StepRecord, length_factors: list[float]) -> dict[str, Tensor]:
    """[K] each; ``length_factors`` is what orthogonalising multiplied the lengths of updates by."""
    count = len(record.params)
    numel = record.numel[:count]
    state = record.tensor_state
    steps, lr, beta1 = numel.new_tensor([(c.step, c.hyper.lr, c.hyper.beta1) for c in record.contexts]).T
    step = steps - 1.0 if record.left_out else steps  # the one that was left out is not counted
    means = TensorSums(*(s.double() / numel for s in record.sums))
    u_u, b_b, abs_b, h_h, p_p, *_ = means
    coeff: Any = Coefficients.of_rows(record.coefficients.unbind(), len(config.hidden_weights))
    weights = torch.stack([coeff.momentum, coeff.gradient, *coeff.hidden])
    gates = [torch.maximum(rate, coeff.gate_floor).clamp(max=1.0) for rate in coeff.rates]
    of_momentum = (1.0 - beta1) / (1.0 - beta1**step)
    all_gates = torch.stack([of_momentum, torch.ones_like(step), *gates])
    update = _update_rms(weights, all_gates, u_u, b_b, h_h, coeff.caution_factor)
    update = update * numel.new_tensor(length_factors)
    size = weights.sum(0)
    names = ["momentum", "gradient", *(f"hidden_{j}" for j in range(len(coeff.hidden)))]
    return {
        "step": step,
        "lr": lr,
        "step_size": size,
        **{f"share_{name}": w / size for name, w in zip(names, weights, strict=True)},
        "caution_factor": coeff.caution_factor,
        "decay": coeff.decay,
        "update_rms": update,
        "update_to_adamw": update / b_b.sqrt().clamp(min=1e-30),
        "rms_gradient": u_u.sqrt(),
        "rms_momentum": b_b.sqrt(),
        "rms_parameter": p_p.sqrt(),
        "sparsity": 1.0 - abs_b.square() / b_b.clamp(min=1e-60),
        "cosine": cosine_of(means),
        "cosine_fast": state.cosine_fast[:count],
        "cosine_slow": state.cosine_slow[:count],
        "pace": state.log_pace[:count].exp(),
        "age": state.age[:count],
        "rms_hidden_0": h_h.sqrt(),
        **{f"window_{j}": 1.0 / gate for j, gate in enumerate(gates)},
        **({} if state.trust is None else {"trust": state.trust[:count]}),
    }


def _update_rms(weights: Tensor, gates: Tensor, u_u: Tensor, b_b: Tensor, h_h: Tensor, keep: Tensor) -> Tensor:
    """The rms of d, [K], from what is known of the averages that it is mixed of.

    The gradient is taken for a constant signal in white noise. Two averages with gates y and z then have the product
    signal + noise y z / (y + z - y z); how much is signal is seen from the momentum, whose size is known. That of h_1
    is known too. Each coordinate's amplitude is left out. Coordinates of d and u are taken for normal where those that
    disagree are made smaller.

    Args:
        weights: [M, K], of momentum, gradient and hidden units.
        gates: [M', K], theirs; hidden units without a weight may follow.
        u_u: mean square of u, [K]; likewise those of b, and of h_1 before the step.
        keep: factor of the coordinates that disagree with the gradient, [K].
    """
    gates = gates[: len(weights)]
    y, z = gates.unsqueeze(0), gates.unsqueeze(1)
    overlap = y * z / (y + z - y * z)
    signal = (b_b - u_u * overlap[0, 0]) / (1.0 - overlap[0, 0]).clamp(min=1e-6)
    signal = torch.minimum(signal.clamp(min=0.0), u_u)
    products = signal + (u_u - signal) * overlap
    scale = torch.ones_like(weights)
    scale[0] = (b_b / products[0, 0].clamp(min=1e-60)).sqrt()
    if len(weights) > 2:
        gate = gates[2]
        after = (1.0 - gate) ** 2 * h_h + gate**2 * u_u + 2.0 * gate * (1.0 - gate) * torch.minimum(signal, h_h)
        scale[2] = (after / products[2, 2].clamp(min=1e-60)).sqrt()
    mixed = weights * scale
    square = (mixed.unsqueeze(0) * mixed.unsqueeze(1) * products).sum((0, 1)).clamp(min=0.0)
    with_u = (mixed * products[1]).sum(0)
    angle = (with_u / (square * u_u).sqrt().clamp(min=1e-30)).clamp(-1.0, 1.0).acos()
    disagreeing = (angle - angle.sin() * angle.cos()) / torch.pi  # the share of d's square that lies there
    return (square * (1.0 - (1.0 - keep**2) * disagreeing)).sqrt()
