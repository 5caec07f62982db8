"""The policy: the weights of the learned update rule, and the frozen configuration that goes with them.

The policy is two small networks. A *tensor head* sees a tensor's context (about a dozen numbers, see
:mod:`learned_optim.features`) once per step and sets the tensor's step size and mixture. A *recurrent cell*,
the same for every coordinate of every tensor, sees a coordinate's features and keeps that coordinate's hidden
state. What is done with their outputs stands in :mod:`learned_optim.update_rule`, and only there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from learned_optim.policy_format import FORMAT_VERSION, of_this_format, typed

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import CommitInfo

#: Per-coordinate inputs of the recurrent cell; all are even in (gradient, parameter).
FEATURES = ("abs_b", "abs_h", "abs_u", "b_h", "u_b", "u_h", "p_b")

#: Per-tensor inputs of the tensor head, of this tensor only.
CONTEXT = (
    "bias", "log_t", "log_numel", "is_vector", "is_convolution", "log_fan_ratio", "log_rms_p",
    "cosine_fast", "cosine_slow", "log_rms_b", "log_rms_h", "log_rms_u", "log_sparsity",
)  # fmt: skip

#: Meta-parameters by the part of the rule they belong to: gradient estimators learn one part or several.
PARTS = {
    "pace": ("pace",),
    "step_size": ("head",),  # in one direction of its outputs only, as the two that follow
    "averaging": ("head",),
    "agreement": ("head",),
    "tensor_head": ("head",),
    "gates": ("gate_context", "gate_features"),
    "amplitude": ("amplitude",),
    "gru": ("gru_input", "gru_hidden", "gru_bias", "gru_output"),
}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """Everything that shapes the update besides the weights; saved whole as ``config.json``.

    The defaults are the hand-set base mixture that meta-training starts from: with zero weights the rule is
    that mixture, which matches AdamW tuned per task. :meth:`adamw` is another base, with which a policy of zero
    weights is ``torch.optim.AdamW``.

    Args:
        cell: ``"gated"``, a bank of gated averages of the normalised gradient, or ``"gru"``, a GRU whose outputs
            multiply the mixture coordinate by coordinate (the form of Andrychowicz et al. 2016).
        betas: decay rates of the two moments, as in Adam; what ``betas=None`` means to the optimizer.
        eps: added to the root of the second moment, in units of the gradient; what ``eps=None`` means.
        windows: k of the gates whose averaging window grows: gate k/(t+k-1) at step t.
        rates: constant gates, in 1/steps, of the remaining hidden units.
        step_scale: factor of the learning rate before the head has its say.
        momentum_weight: weight of Adam's direction b in the mixture.
        gradient_weight: weight of the normalised gradient u.
        hidden_weights: weights of the hidden units h_1 .. h_H (gated cell).
        agreement: kappa in [0, 1]: coordinates whose mixture points against the gradient are multiplied
            by 1 - kappa.
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
        orthogonal: how much of a matrix's update is orthogonalised, see :mod:`learned_optim.orthogonal`, in [0, 1]; 0
            does without, which saves matrix products.
        orthogonal_iterations: of Newton and Schulz; each costs six times the coordinates times the smaller side.
        orthogonal_aspect: matrices with this many rows per column or more, as large embeddings have, are not. A row of
            those belongs to one word, and most words are rare.
        orthogonal_shortening: power of the cosine between an update and what orthogonalising makes of it, over 0.7: a
            matrix moves less where that turns its update far, as it does where batches are tiny or inputs sparse, and
            noise in weak directions would be made strong; 0 leaves lengths alone.
        feature_bound: features are clamped to [-feature_bound, feature_bound].
        cosine_decays: decays of the fast and the slow average of the cosine between gradient and momentum.
        features: names of the cell's inputs, in the order of its weights.
        context: names of the head's inputs, in the order of its weights.
        context_center: subtracted from each context number ...
        context_scale: ... which is then divided by this, and clamped to [-context_bound, context_bound].
        context_bound: see ``context_scale``.
        hidden_size: hidden units per coordinate.
        format_version: version of this format; a newer one is refused on loading.

    Raises:
        ValueError: a value out of range, with what was found.
    """

    cell: Literal["gated", "gru"] = "gated"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    windows: tuple[float, ...] = (4.0, 16.0)
    rates: tuple[float, ...] = (0.03, 0.3)
    step_scale: float = 4.5
    momentum_weight: float = 0.22
    gradient_weight: float = 0.37
    hidden_weights: tuple[float, ...] = (0.67, 0.04, 0.04, 0.04)
    agreement: float = 0.5
    head_bound: float = 3.0
    gate_bound: float = 4.0
    amplitude_bound: float = 1.5
    pace_gain: float = 0.0
    pace_rate: float = 0.002
    pace_growth: float = 0.01
    pace_bound: float = 0.7
    orthogonal: float = 0.0
    orthogonal_iterations: int = 3
    orthogonal_aspect: float = 16.0
    orthogonal_shortening: float = 0.0
    feature_bound: float = 4.0
    cosine_decays: tuple[float, float] = (0.8, 0.98)
    features: tuple[str, ...] = FEATURES
    context: tuple[str, ...] = CONTEXT
    context_center: tuple[float, ...] = (0.0, 5.0, 7.0, 0.0, 0.0, 0.0, -3.0, 0.0, 0.0, -1.5, -2.0, 0.0, -0.3)
    context_scale: tuple[float, ...] = (1.0, 3.0, 4.0, 1.0, 1.0, 2.0, 2.0, 0.5, 0.25, 1.0, 1.0, 1.0, 0.5)
    context_bound: float = 3.0
    hidden_size: int = 4
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"PolicyConfig.{name} must be {wanted}, found {getattr(self, name)!r}")

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            require(
                not any(isinstance(x, float) and not math.isfinite(x) for x in numbers), field.name, "finite numbers"
            )
        require(self.cell in ("gated", "gru"), "cell", "'gated' or 'gru'")
        require(len(self.betas) == 2 and all(0.0 <= x < 1.0 for x in self.betas), "betas", "two numbers in [0, 1)")
        require(self.eps >= 0.0, "eps", "0 or more")
        require(1 <= self.hidden_size <= 64, "hidden_size", "between 1 and 64")
        require(all(x >= 1.0 for x in self.windows), "windows", "numbers of 1 or more")
        require(all(0.0 < x <= 1.0 for x in self.rates), "rates", "numbers in (0, 1]")
        if self.cell == "gated":
            units = len(self.windows) + len(self.rates)
            require(units == self.hidden_size, "hidden_size", f"the number of windows and rates ({units})")
            require(len(self.hidden_weights) == self.hidden_size, "hidden_weights", f"{self.hidden_size} numbers")
        require(self.step_scale > 0.0, "step_scale", "positive")
        require(0.0 <= self.agreement <= 1.0, "agreement", "in [0, 1]")
        require(0.0 < self.head_bound <= 10.0, "head_bound", "in (0, 10]")
        for name in ("pace_gain", "pace_rate", "pace_growth"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]")
        require(0.0 <= self.pace_bound <= 10.0, "pace_bound", "in [0, 10]")
        require(0.0 <= self.orthogonal <= 1.0, "orthogonal", "in [0, 1]")
        require(1 <= self.orthogonal_iterations <= 20, "orthogonal_iterations", "between 1 and 20")
        require(self.orthogonal_aspect > 0.0, "orthogonal_aspect", "positive")
        require(0.0 <= self.orthogonal_shortening <= 10.0, "orthogonal_shortening", "in [0, 10]")
        for name in ("gate_bound", "amplitude_bound"):
            require(1.0 <= getattr(self, name) <= 100.0, name, "in [1, 100]")
        for name in ("feature_bound", "context_bound"):
            require(0.0 < getattr(self, name) <= 100.0, name, "in (0, 100]")
        require(
            len(self.cosine_decays) == 2 and all(0.0 <= x < 1.0 for x in self.cosine_decays),
            "cosine_decays", "two numbers in [0, 1)",
        )  # fmt: skip
        require(set(self.features) <= set(FEATURES) and len(self.features) > 0, "features", f"names out of {FEATURES}")
        require(len(set(self.features)) == len(self.features), "features", "free of repetitions")
        require(self.context == CONTEXT, "context", f"{CONTEXT}")
        for name in ("context_center", "context_scale"):
            require(len(getattr(self, name)) == len(CONTEXT), name, f"{len(CONTEXT)} numbers")
        require(all(x > 0.0 for x in self.context_scale), "context_scale", "positive numbers")
        require(self.format_version == FORMAT_VERSION, "format_version", str(FORMAT_VERSION))

    @classmethod
    def adamw(cls, **changes: Any) -> PolicyConfig:
        """A base mixture that is Adam's direction alone: with zero weights the rule is ``torch.optim.AdamW``."""
        base: dict[str, Any] = {
            "step_scale": 1.0, "momentum_weight": 1.0, "gradient_weight": 0.0, "hidden_weights": (0.0,) * 4,
            "agreement": 0.0,
        }  # fmt: skip
        return cls(**{**base, **changes})

    @classmethod
    def gru(cls, **changes: Any) -> PolicyConfig:
        """The article's form: a GRU per coordinate on top of Adam's direction and the normalised gradient."""
        base: dict[str, Any] = {
            "cell": "gru", "windows": (), "rates": (), "hidden_weights": (), "step_scale": 1.0,
            "momentum_weight": 0.5, "gradient_weight": 0.5, "agreement": 0.0, "amplitude_bound": 20.0,
            "pace_rate": 0.0,
        }  # fmt: skip
        return cls(**{**base, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """The inverse of :meth:`to_dict`. Strict: no key may be missing, unknown, or of another type.

        Raises:
            ValueError: with the keys concerned; a newer ``format_version`` is named first.
        """
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ValueError(
                f"made for policy format {version}, this learned_optim reads up to {FORMAT_VERSION}: "
                "upgrade with `pip install -U learned-optim`"
            )
        if type(version) is int and 1 <= version < FORMAT_VERSION:  # True would be equal to 1
            values = of_this_format(values, version)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        missing, unknown = sorted(set(fields) - set(values)), sorted(set(values) - set(fields))
        if missing or unknown:
            raise ValueError(f"missing keys {missing}, unknown keys {unknown}")
        return cls(**{name: typed(name, values[name], field.default) for name, field in fields.items()})

    @property
    def num_outputs(self) -> int:
        """Outputs of the tensor head: step scale, two mixture weights, agreement, one weight per hidden unit."""
        return 4 + len(self.hidden_weights)


class Policy(nn.Module):
    """The meta-parameters of the update rule, as made by :func:`learned_optim.meta_train` or loaded.

    ===============  ==================  =======================================================
    weight           shape               what it does
    ===============  ==================  =======================================================
    head             [outputs, context]  step size, mixture and agreement of a tensor
    pace             [1, context]        what a tensor's step size grows or shrinks by (where ``pace_rate`` is not 0)
    gate_context     [hidden, context]   shifts a tensor's gates (gated cell)
    gate_features    [hidden, features]  shifts a coordinate's gates (gated cell)
    amplitude        [features]          shifts a coordinate's amplitude (gated cell)
    gru_*            ...                 the GRU's weights (GRU cell)
    ===============  ==================  =======================================================

    All start at zero (the rule then is the config's base mixture), except the GRU's recurrent weights, which
    start at random.

    Args:
        config: the architecture and the base mixture; ``PolicyConfig()`` if ``None``.
        generator: source of the GRU's random start; ``None`` takes torch's global one.
        source: where the weights came from, for messages and fingerprints.
    """

    def __init__(
        self, config: PolicyConfig | None = None, *, generator: torch.Generator | None = None, source: str = "new"
    ) -> None:
        super().__init__()
        self.config = config or PolicyConfig()
        self.source = source
        self.results: dict[str, Any] | None = None
        for name, shape in expected_shapes(self.config).items():
            weight = torch.zeros(shape)
            if name in ("gru_input", "gru_hidden"):
                weight.normal_(0.0, 1.0 / math.sqrt(shape[-1]), generator=generator)
            self.register_parameter(name, nn.Parameter(weight))

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as the update rule takes them; with their graph, if they have one."""
        return dict(self.named_parameters())

    def fingerprint(self) -> str:
        """``sha256:`` and 16 hexadecimal digits over configuration and weights: equal if and only if the rule is."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, weight in sorted(self.weights().items()):
            data = weight.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name}{tuple(data.shape)}".encode())
            digest.update(data.numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"

    def extra_repr(self) -> str:
        count = sum(w.numel() for w in self.parameters())
        return f"cell={self.config.cell!r}, meta_parameters={count}, source={self.source!r}, {self.fingerprint()}"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Policy:
        """Load a policy: bundled, from a folder, or from the Hub; see :func:`learned_optim.hub.load_policy`."""
        from learned_optim.hub import load_policy

        return load_policy(
            name_or_path, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only,
            force_download=force_download,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy into ``folder``; see :func:`learned_optim.hub.save_policy`."""
        from learned_optim.hub import save_policy

        save_policy(self, folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Publish the policy in the repository ``owner/name``; see :func:`learned_optim.hub.push_policy`."""
        from learned_optim.hub import push_policy

        return push_policy(
            self, repo_id, private=private, token=token, commit_message=commit_message, revision=revision,
            create_pr=create_pr,
        )  # fmt: skip


def expected_shapes(config: PolicyConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight that a policy of this configuration has."""
    context, features, hidden = len(config.context), len(config.features), config.hidden_size
    pace: dict[str, tuple[int, ...]] = {"pace": (1, context)} if config.pace_rate else {}
    if config.cell == "gated":
        return {
            "head": (config.num_outputs, context),
            "gate_context": (hidden, context),
            "gate_features": (hidden, features),
            "amplitude": (features,),
            **pace,
        }
    return {
        "head": (config.num_outputs, context),
        "gru_input": (3 * hidden, features),
        "gru_hidden": (3 * hidden, hidden),
        "gru_bias": (3 * hidden,),
        "gru_output": (3, hidden),
        **pace,
    }
