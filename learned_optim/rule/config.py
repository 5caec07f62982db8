"""PolicyConfig: everything that shapes the update besides the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from learned_optim.rule.cells import CELLS, Shapes
from learned_optim.rule.context import CONTEXT, DEFAULT_CONTEXT
from learned_optim.rule.features import DEFAULT_FEATURES, FEATURES
from learned_optim.rule.layouts import EMBEDDING_ASPECT
from learned_optim.rule.orthogonalize import POLAR_METHODS, Orthogonalization

#: Of ``config.json``; a newer one is refused on loading.
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Everything that shapes the update besides the weights; saved whole as ``config.json``.

    The defaults are the hand-set base mixture that meta-training starts from: with zero weights the rule is that
    mixture, which matches AdamW tuned per task. :meth:`adamw` is another base, with which a policy of zero weights is
    ``torch.optim.AdamW``.

    Args:
        cell: ``"gated"``, a bank of gated averages of the normalised gradient, or ``"gru"``, a GRU whose outputs
            multiply the mixture coordinate by coordinate (the form of Andrychowicz et al. 2016); see
            :mod:`learned_optim.rule.cells`.
        betas: decay rates of the two moments, as in Adam; what ``betas=None`` means to the optimizer.
        eps: added to the root of the second moment, in units of the gradient; what ``eps=None`` means.
        windows: k of the gates whose averaging window grows: gate k/(t+k-1) at age t.
        rates: constant gates, in 1/steps, of the remaining hidden units.
        step_scale: factor of the learning rate before the head has its say.
        momentum_weight: weight of Adam's direction b in the mixture.
        gradient_weight: weight of the normalised gradient u.
        hidden_weights: weights of the hidden units h_1 .. h_H (gated cell).
        caution: kappa in [0, 1]: coordinates whose mixture points against the gradient are multiplied by 1 - kappa.
        head_bound: bound of the head's log-factors: each of its outputs stays within exp(+-head_bound).
        gate_bound: a coordinate's features change its gates by at most this factor, each way; a tensor's context
            by at most this factor again.
        amplitude_bound: a coordinate's features change its amplitude by at most this factor, each way.
        pace_gain: by how much the logarithm of a tensor's pace, a factor of its step size that builds up in the course
            of training, grows in a step, per unit of the fast average of the cosine between gradient and momentum ...
        pace_rate: ... and per unit of what its weights say of the context; 0 does without weights.
        pace_growth: the logarithm of the pace grows by at most this in a step; that it has grown too far shows in the
            gradients some steps later only.
        pace_bound: the pace stays within exp(+-pace_bound). Gradients of batches that are drawn without replacement
            turn against each other whatever the step size: what they add up to in a long run must stay harmless.
        age_rate: a tensor's age, the number of steps that windows and context count, is multiplied in a step by
            exp(-age_rate x), with x what its weights say of the context where that is positive; 0 does without weights,
            and the age is the number of steps.
        decay_rate: the rule's own weight decay, in the unit of ``weight_decay``, per unit of what its weights say of
            the context where that is positive; 0 does without weights, and decay is the user's alone.
        orthogonal: how much of a matrix's update is orthogonalised, in [0, 1]; 0 does without, which saves matrix
            products. See :mod:`learned_optim.rule.orthogonalize`, also for the next seven.
        orthogonal_method: name out of ``POLAR_METHODS``.
        orthogonal_coefficients: of the method.
        orthogonal_iterations: of the method.
        orthogonal_block: matrices are cut into blocks of at most this many rows (columns, where those are fewer), each
            orthogonalised by itself: a step then costs the same per parameter for matrices of any size; 0 leaves them
            whole.
        orthogonal_aspect: matrices with this many rows per column or more, as large embeddings have, are left alone. A
            row of those belongs to one word, and most words are rare.
        orthogonal_damping: q, the power of the cosine between an update and what orthogonalising makes of it, over the
            threshold: a matrix moves less where that turns its update far, as it does where batches are tiny or inputs
            sparse, and noise in weak directions would be made strong; 0 leaves lengths alone.
        orthogonal_damping_threshold: cosine from which on nothing is damped: most matrices of the training families lie
            between 0.5 and 0.7, small ones and output layers above.
        feature_bound: features are clamped to [-feature_bound, feature_bound].
        cosine_decays: decays of the fast and the slow average of the cosine between gradient and momentum.
        features: names of the cell's inputs out of ``FEATURES``, in the order of its weights.
        context: names of the head's inputs out of ``CONTEXT``, in the order of its weights.
        context_center: subtracted from each context value; empty takes those of ``CONTEXT``.
        context_scale: by which the result is divided; empty takes those of ``CONTEXT``.
        context_bound: to which that is clamped, each way.
        hidden_size: hidden units per coordinate.
        format_version: version of this format; a newer one is refused on loading.

    Raises:
        ValueError: a value out of range, with what was found.
    """

    cell: Literal["gated", "gru"] = "gated"
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    windows: tuple[float, ...] = (4.0, 16.0)
    rates: tuple[float, ...] = (0.03, 0.3)
    step_scale: float = 4.5
    momentum_weight: float = 0.22
    gradient_weight: float = 0.37
    hidden_weights: tuple[float, ...] = (0.67, 0.04, 0.04, 0.04)
    caution: float = 0.5
    head_bound: float = 3.0
    gate_bound: float = 4.0
    amplitude_bound: float = 1.5
    pace_gain: float = 0.0
    pace_rate: float = 0.002
    pace_growth: float = 0.01
    pace_bound: float = 0.7
    age_rate: float = 0.0
    decay_rate: float = 0.0
    orthogonal: float = 0.0
    orthogonal_method: str = "newton_schulz"
    orthogonal_coefficients: tuple[float, ...] = (3.4445, -4.7750, 2.0315)
    orthogonal_iterations: int = 3
    orthogonal_block: int = 0
    orthogonal_aspect: float = EMBEDDING_ASPECT
    orthogonal_damping: float = 0.0
    orthogonal_damping_threshold: float = 0.7
    feature_bound: float = 4.0
    cosine_decays: tuple[float, ...] = (0.8, 0.98)
    features: tuple[str, ...] = DEFAULT_FEATURES
    context: tuple[str, ...] = DEFAULT_CONTEXT
    context_center: tuple[float, ...] = ()
    context_scale: tuple[float, ...] = ()
    context_bound: float = 3.0
    hidden_size: int = 4
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"PolicyConfig.{name} must be {wanted}, found {getattr(self, name)!r}")

        def require_names(name: str, known: Mapping[str, Any]) -> None:
            names = getattr(self, name)
            require(len(names) > 0 and set(names) <= set(known), name, f"names out of {tuple(known)}")
            require(len(set(names)) == len(names), name, "free of repetitions")

        for field in dataclasses.fields(self):
            value = _typed(field.name, getattr(self, field.name), _HINTS[field.name])
            object.__setattr__(self, field.name, value)  # 1 and 1.0 are one rule, with one fingerprint
            scalars = value if isinstance(value, tuple) else (value,)
            finite = not any(isinstance(x, float) and not math.isfinite(x) for x in scalars)
            require(finite, field.name, "finite numbers")
        for name, known in (("cell", CELLS), ("orthogonal_method", POLAR_METHODS)):
            require(getattr(self, name) in known, name, f"one of {tuple(known)}")
        require(len(self.betas) == 2 and all(0.0 <= x < 1.0 for x in self.betas), "betas", "two numbers in [0, 1)")
        require(self.eps >= 0.0, "eps", "0 or more")
        require(1 <= self.hidden_size <= 64, "hidden_size", "between 1 and 64")
        require(all(x >= 1.0 for x in self.windows), "windows", "numbers of 1 or more")
        require(all(0.0 < x <= 1.0 for x in self.rates), "rates", "numbers in (0, 1]")
        for name in ("step_scale", "orthogonal_aspect"):
            require(getattr(self, name) > 0.0, name, "positive")
        for name in ("caution", "pace_gain", "pace_rate", "pace_growth", "age_rate", "orthogonal"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]")
        for name in ("pace_bound", "decay_rate", "orthogonal_damping"):
            require(0.0 <= getattr(self, name) <= 10.0, name, "in [0, 10]")
        require(0.0 < self.head_bound <= 10.0, "head_bound", "in (0, 10]")
        require(len(self.orthogonal_coefficients) > 0, "orthogonal_coefficients", "at least one number")
        require(1 <= self.orthogonal_iterations <= 20, "orthogonal_iterations", "between 1 and 20")
        require(self.orthogonal_block >= 0, "orthogonal_block", "0 or more")
        require(0.001 < self.orthogonal_damping_threshold <= 1.0, "orthogonal_damping_threshold", "in (0.001, 1]")
        for name in ("gate_bound", "amplitude_bound"):
            require(1.0 <= getattr(self, name) <= 100.0, name, "in [1, 100]")
        for name in ("feature_bound", "context_bound"):
            require(0.0 < getattr(self, name) <= 100.0, name, "in (0, 100]")
        decays = self.cosine_decays
        require(len(decays) == 2 and all(0.0 <= x < 1.0 for x in decays), "cosine_decays", "two numbers in [0, 1)")
        require_names("features", FEATURES)
        require_names("context", CONTEXT)
        if not self.context_center:
            object.__setattr__(self, "context_center", tuple(CONTEXT[name].center for name in self.context))
        if not self.context_scale:
            object.__setattr__(self, "context_scale", tuple(CONTEXT[name].scale for name in self.context))
        for name in ("context_center", "context_scale"):
            require(len(getattr(self, name)) == len(self.context), name, f"{len(self.context)} numbers")
        require(all(x > 0.0 for x in self.context_scale), "context_scale", "positive numbers")
        require(self.format_version == FORMAT_VERSION, "format_version", str(FORMAT_VERSION))
        if (problem := CELLS[self.cell].problem(self)) is not None:
            require(False, *problem)

    @classmethod
    def adamw(cls, **changes: Any) -> PolicyConfig:
        """A base mixture that is Adam's direction alone: with zero weights the rule is ``torch.optim.AdamW``."""
        base: dict[str, Any] = {
            "step_scale": 1.0, "momentum_weight": 1.0, "gradient_weight": 0.0, "hidden_weights": (0.0,) * 4,
            "caution": 0.0,
        }  # fmt: skip
        return cls(**{**base, **changes})

    @classmethod
    def gru(cls, **changes: Any) -> PolicyConfig:
        """The article's form: a GRU per coordinate on top of Adam's direction and the normalised gradient."""
        base: dict[str, Any] = {
            "cell": "gru", "windows": (), "rates": (), "hidden_weights": (), "step_scale": 1.0,
            "momentum_weight": 0.5, "gradient_weight": 0.5, "caution": 0.0, "amplitude_bound": 20.0,
            "pace_rate": 0.0,
        }  # fmt: skip
        return cls(**{**base, **changes})

    @property
    def surroundings(self) -> dict[str, Any]:
        """What is around the cell, by name: context, pace, age, orthogonalising.

        A policy of another cell needs the same to do what this one does.
        """
        of_head = ("step_scale", "caution", "head_bound", "cosine_decays", "age_rate")
        names = [name for name in _HINTS if name in of_head or name.startswith(("context", "orthogonal", "pace_"))]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """The inverse of :meth:`to_dict`. Strict: no key may be missing, unknown, or of another type.

        Raises:
            ValueError: with the keys concerned; another ``format_version`` is named first.
        """
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"made for policy format {version}, this learned_optim reads up to {FORMAT_VERSION}: "
                "upgrade, in the clone with `git pull && pip install .`"
            )
        missing, unknown = sorted(set(_HINTS) - set(values)), sorted(set(values) - set(_HINTS))
        if missing or unknown:
            raise ValueError(f"missing keys {missing}, unknown keys {unknown}")
        return cls(**values)

    @property
    def orthogonalization(self) -> Orthogonalization:
        """What is done to the update of a matrix."""
        return Orthogonalization(
            self.orthogonal, self.orthogonal_method, self.orthogonal_coefficients, self.orthogonal_iterations,
            self.orthogonal_block, self.orthogonal_aspect, self.orthogonal_damping, self.orthogonal_damping_threshold,
        )  # fmt: skip

    @property
    def num_outputs(self) -> int:
        """Outputs of the tensor head: step scale, two mixture weights, caution, one weight per hidden unit."""
        return 4 + len(self.hidden_weights)

    def coordinate_weights(self) -> Shapes:
        """Name and shape of the weights that are applied at every coordinate."""
        return CELLS[self.cell].coordinate_weights(self)

    def weight_shapes(self) -> Shapes:
        """Name and shape of every weight, in order."""
        cell, context = CELLS[self.cell], len(self.context)
        head: Shapes = {"head": (self.num_outputs, context)}
        pace: Shapes = {"pace": (1, context)} if self.pace_rate else {}
        age: Shapes = {"age": (1, context)} if self.age_rate else {}
        decay: Shapes = {"decay": (1, context)} if self.decay_rate else {}
        return {**head, **cell.tensor_weights(self), **cell.coordinate_weights(self), **pace, **age, **decay}


_HINTS = get_type_hints(PolicyConfig)  # once: it compiles the annotations, and loading a policy is to compile nothing


def _typed(name: str, value: Any, hint: Any) -> Any:
    """``value``, as read from JSON or given by a user, in the type that the field has."""

    def scalar(x: Any, wanted: type) -> Any:
        is_number = isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**1023  # larger ones are no floats
        if wanted is float and (is_number or isinstance(x, float)):
            return float(x)
        if type(x) is not wanted:
            raise ValueError(f"key {name!r} must hold {wanted.__name__}, found {x!r:.80}")
        return x

    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"key {name!r} must hold a list, found {value!r}")
        return tuple(scalar(x, get_args(hint)[0]) for x in value)
    return scalar(value, str if get_origin(hint) is Literal else hint)
