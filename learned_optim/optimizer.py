"""LearnedOptimizer: parameter groups, lazy state and checkpoints; no mathematics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.diagnostics import figures_by_parameter, summary_of
from learned_optim.engine.auto import make_backend
from learned_optim.engine.collect import Collector, StateKeys, check_added
from learned_optim.engine.graph import CudaCapture, StepGraph
from learned_optim.engine.head import StepReport
from learned_optim.engine.hyperparameters import FIXED, check_flags, checked_new_group, hyperparameters
from learned_optim.engine.kinds import KIND_KEYS
from learned_optim.engine.offload import Offload
from learned_optim.engine.sharding import find_shards
from learned_optim.engine.state_checks import STATE_DTYPES
from learned_optim.policy.policy import Policy, as_policy
from learned_optim.rule.cells import CELLS
from learned_optim.state_dict import AsSaved, checked, groups_of_adamw, restored, state_of_adamw, without_pieces_of_fsdp

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class LearnedOptimizer(Optimizer):
    r"""A drop-in replacement for ``torch.optim.AdamW`` whose update rule was learned.

    .. code-block:: text

        input : lr, beta1, beta2, eps, weight_decay, parameters p, policy (f: bounded factor, 1 at 0)
        state : m, v, h_1 .. h_H, all zero, per coordinate; two averages of a cosine, a and the age, per tensor
        for t = 1, 2, ... do, for every tensor
            g   = gradient (negated if maximize)
            m   = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
            u   = g / (sqrt(v_hat) + eps),      b = m_hat / (sqrt(v_hat) + eps)     bias-corrected
            c   = context of the tensor: its shape, log age, rms of p, u, b, h_1, cosine of g and m
            s, w, kappa, k, rates, decay = head(c)                                  once per tensor
            x   = features of the coordinate: u, b, h_1, p over their rms
            z_j = clamp(rate_j f(W_j x), 1/age, 1)
            h_j = h_j + z_j (u - h_j)                                               recurrent, H per coordinate
            a   = clamp(a + min(delta, gamma cos + rho S c), -alpha, alpha)         pace, recurrent too
            age, a = 1 + k (age - 1), k a                                           k < 1 where the problem has changed
            d   = s e^a (w_b b + w_u u + sum_j w_j h_j) f(Q x)
            d   = (1 - kappa) d where d u < 0                                       caution
            if d is a matrix, and the policy orthogonalises with share w:
                o = polar(d) |d| / |polar(d)|,   c = <d, o> / |d|^2                 by blocks; |.|: Frobenius norm
                e = d + w (o - d)
                d = e |d| / |e| min(1, c / 0.7)^(q w)                               damped where it turns far
            p   = p - lr (weight_decay + decay min(1, lr / 1e-3)) p - lr d

    ``lr`` has Adam's unit and scales the whole update; an existing learning rate and schedule carry over, but the
    rule shrinks its own steps as noise averages out, so a schedule is not needed.

    Args:
        params: parameters, ``named_parameters()``, or dicts of groups; all float types, and complex ones as pairs.
        lr: learning rate, a number or a 1-element tensor.
        betas: decay rates of m and v; ``None`` takes the policy's own.
        eps: added to the denominator, in units of the gradient; ``None`` takes the policy's own.
        weight_decay: decoupled, as in AdamW. A policy may add some of its own, as ``pretraining`` does for large
            matrices, also with 0 here; at learning rates below 1e-3 that falls with their square.
        policy: bundled name, folder, Hub id (``"owner/name"`` or ``"owner/name@revision"``), or a :class:`Policy`.
            A bundled name touches no network.
        revision: branch, tag or commit of a Hub id.
        maximize: ascend instead of descend.
        backend: ``"compiled"`` runs C++ that is generated from the rule and compiled once per machine (on GPUs:
            Triton kernels), ``"eager"`` plain torch operations. ``"auto"`` compiles where there is a compiler and, on
            GPUs, a million parameters or more; :attr:`backend` says what is used.
        state_dtype: ``torch.bfloat16`` keeps m and h in 2 bytes each (v stays in float32): 8 bytes per parameter with
            ``default``. ``None``: float32, and float64 for float64 parameters: 12 bytes per parameter in float32.
            ``torch.float16`` holds nothing above 65,504 or below 6e-8: for gradients whose size you know.
        safeguard: each tensor begins with AdamW's own step at this lr and gets the rule's, unless its gradients turn
            against the way taken so far more than in ordinary training; then it falls back to AdamW's. Every update
            is a mixture of the two: its weights add up to at most 8 (AdamW's: 1). No loss is evaluated and nothing
            promises that it falls; it costs one number per tensor and a quarter of the speed: ``docs/safeguard.md``.
        skip_nonfinite: a tensor whose gradient holds a NaN or an infinity is left out of the step: parameter, state
            and step count stay as they are, to the last bit. :meth:`diagnostics` says so and counts (``skipped``).
            Off by default, as in torch, where such a gradient makes the parameter NaN: ``docs/trouble.md``.
        capturable: keeps step counts on the GPU, and reads an ``lr`` that is a tensor there, so that you can capture
            :meth:`step` in a ``torch.cuda.graph`` of your own, after a step or two without. ``False``: on a GPU the
            optimizer captures its step by itself, unless ``backend="eager"``; :attr:`backend` says so, or why not.
        offload: keeps m, v and h in pinned memory of the host, and copies them to the GPU and back in each step, a
            chunk at a time while it computes another (``docs/resume.md``). Without effect on CPUs.

    Raises:
        ValueError: an argument out of range, or an unknown policy or backend.
        TypeError: an argument of the wrong type.
        FileNotFoundError: a policy folder without the files of a policy.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> opt = LearnedOptimizer(model.parameters(), lr=1e-3)
        >>> x, y = torch.randn(64, 10), torch.randn(64, 1)
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss = torch.nn.functional.mse_loss(model(x), y)
        ...     loss.backward()
        ...     _ = opt.step()

    The rule grew out of Wolf, "From zero to research: an introduction to meta-learning" (2018) and Andrychowicz et
    al., "Learning to learn by gradient descent by gradient descent" (2016); its growing window is that of
    schedule-free learning (Defazio et al. 2024), its caution that of Liang et al., "Cautious Optimizers" (2024).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        weight_decay: float = 0.01,
        *,
        policy: str | Path | Policy = "default",
        revision: str | None = None,
        maximize: bool = False,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        safeguard: bool = False,
        skip_nonfinite: bool = False,
        capturable: bool = False,
        offload: bool = False,
    ) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(f"Invalid state_dtype: {state_dtype!r}; choose one of {STATE_DTYPES} or None")
        check_flags(safeguard=safeguard, skip_nonfinite=skip_nonfinite, capturable=capturable, offload=offload)
        self.policy = as_policy(policy, revision)
        if safeguard and not CELLS[self.policy.config.cell].is_mixture:
            raise ValueError(f"safeguard=True needs a gated cell, the policy's is {self.policy.config.cell!r}")
        self.safeguard, self.skip_nonfinite, self.capturable = safeguard, skip_nonfinite, capturable
        self.offload, self.state_dtype, self._backend_name = offload, state_dtype, backend
        self._make_engine()
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": self.policy.config.betas if betas is None else betas,
            "eps": self.policy.config.eps if eps is None else eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "policy": f"{self.policy.fingerprint()} ({self.policy.source})",
        }
        hyperparameters(defaults)
        super().__init__(params, defaults)

    @classmethod
    def from_adamw(cls, adamw: Optimizer, **options: Any) -> LearnedOptimizer:
        """Go on from AdamW in the middle of a run: the same parameters, its moments, step counts and learning rates.

        Groups keep their names, ``lr``, ``weight_decay``, ``maximize`` and what else they hold, so that a schedule can
        go on, made anew with ``last_epoch=old.last_epoch - 1``. ``betas`` and ``eps`` are the policy's, as always; the
        moments are scaled so that they are the same after bias correction.

        The age of each tensor is its step count, so that the rule takes the short steps of a run that is as old: the
        loss goes on where it was. Running cosines, pace and the hidden state, which takes ``step / 4`` steps or so to
        fill, start at zero. A fresh optimizer is the other choice: its first steps are large, so that the loss jumps,
        and then mostly falls faster. A parameter without state starts afresh.

        Args:
            adamw: a ``torch.optim.AdamW``, in any of its implementations, or an ``Adam`` without weight decay. It is
                left as it is; ``del`` it to free its moments.
            options: of :class:`LearnedOptimizer`; ``lr``, ``weight_decay`` and ``maximize`` then hold for all groups.
                At the same ``lr`` the rule takes larger steps than AdamW: a third of it is a careful start.

        Returns:
            A new optimizer of the same parameters.

        Raises:
            TypeError: another optimizer.
            ValueError: an Adam that adds weight decay to the gradient: its moments are not those of the gradient.
            RuntimeError: state that does not fit its parameter.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
            >>> model(torch.randn(8, 3)).square().mean().backward()
            >>> adamw.step()
            >>> LearnedOptimizer.from_adamw(adamw, lr=3e-4).state[model.weight]["step"].item()
            1.0
        """
        groups = groups_of_adamw(adamw, options)
        defaults = {key: adamw.defaults[key] for key in ("lr", "weight_decay", "maximize")}
        new = cls(groups, **{**defaults, **options})
        new.state.update(state_of_adamw(adamw, new.param_groups, new._keys))
        return new

    def __setattr__(self, name: str, value: Any, /) -> None:
        if name in FIXED and name in self.__dict__:
            raise AttributeError(f"{name} is fixed when the optimizer is made; make a new one with {name}={value!r}")
        super().__setattr__(name, value)

    @property
    def backend(self) -> str:
        """How the rule is run, and why."""
        return self._graph.described(self._backend.name)

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the rule did in the last step, for each parameter that it updated.

        Computed when asked, from a few dozen values per tensor that the step leaves behind. Empty before the first.

        Returns:
            By parameter name where ``named_parameters()`` were given, else by ``"group.index"``, these figures:

            - ``step``, ``lr``: the parameter's own count of updates, and the learning rate of the last.
            - ``step_size``: the sum of the mixture's weights, relative to lr; AdamW has 1. ``pace``: the factor in it
              that has built up in the course of training.
            - ``share_momentum``, ``share_gradient``, ``share_hidden_0``, ...: the parts of it; AdamW has momentum
              only. ``caution_factor``: the factor of coordinates that would move against the present gradient.
            - ``decay``: the rule's own weight decay, beside the user's; at an ``lr`` below 1e-3 there is less of it.
            - ``update_rms``: rms of the update over lr, without weight decay, and ``update_to_adamw``: over that of
              AdamW at the same lr. An *estimate*, from sums, not from coordinates: mostly within a
              quarter, and less good for tensors of a few coordinates.
            - ``rms_gradient``, ``rms_momentum``: of gradient and momentum over sqrt(v); momentum far below gradient
              means noise. ``cosine`` of the two, and its ``cosine_fast`` and ``cosine_slow`` averages: steadily
              positive means steps are too small, negative too large. ``sparsity`` of the momentum: 0 where all
              coordinates are alike, about 0.36 where they are normal, near 1 where few count. ``rms_parameter``.
            - ``rms_hidden_0``: of the first hidden unit before the step; 1 where gradients never change sign.
              ``window_0``, ...: over how many steps each hidden unit averages, ``age`` at most; the coordinates' own
              gates, which vary it, are left out. ``age``: ``step``, less what was forgotten where the problem changed.
            - ``trust``: with a safeguard only, its trust in the rule; up to 0.25 the step was AdamW's.
            - ``skipped``: with ``skip_nonfinite`` only, how many of the tensor's steps were left out so far.

            A tensor with a gradient that is not finite has NaN here, but for ``step``, ``lr`` and ``skipped``.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> opt = LearnedOptimizer(model.named_parameters())
            >>> model(torch.randn(8, 3)).square().mean().backward()
            >>> opt.step()
            >>> sorted(opt.diagnostics())
            ['bias', 'weight']
        """
        return figures_by_parameter(self.policy.config, self._report)

    def summary(self) -> str:
        """What each tensor is taken for, as a table: its role, the matrices that are orthogonalised, its weight decay.

        Groups say it (``learned_optim.param_groups(model)`` makes them), or else its shape.

        Example:
            >>> print(LearnedOptimizer(torch.nn.Linear(3, 2).named_parameters()).summary())
            parameter  shape  taken for             orthogonalised  weight decay
            weight     2×3    matrix, by its shape  2×3             0.01
            bias       2      vector, by its shape  no              0.01
        """
        return summary_of(self.policy.config, self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it leaves out, or gives as ``None`` for ``betas`` and ``eps``, takes the defaults."""
        if isinstance(param_group, dict):
            param_group = checked_new_group(param_group, self.defaults, KIND_KEYS)
        super().add_param_group(param_group)
        check_added(self.param_groups)

    @torch.compiler.disable  # the rule's scalars change with every step: traced, they would be frozen into the graph
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: a sparse gradient of what is no embedding; state that does not fit its parameter, since one of
                them was replaced; two parameters that share memory or state. Nothing has been changed then.
            TypeError, ValueError: a hyperparameter in a group is no number, or out of range; likewise.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._graph.check(self.param_groups, self.state)
        shards = find_shards(self.param_groups)
        params = self._collector.collect(self.param_groups, self.state)
        report = self._graph.run(self._backend, params, shards, self.skip_nonfinite)
        report.names = self._collector.names
        self._report = report
        for p in params:
            p.release_grad()
        return loss

    def _make_engine(self) -> None:
        self._backend = make_backend(self._backend_name, self.policy.config, self.policy.weights())
        options = self.state_dtype, self.safeguard, self.skip_nonfinite, self.capturable
        offload = Offload() if self.offload else None
        self._keys = StateKeys.of(self.policy.config, *options, host=offload and offload.host)
        self._graph = StepGraph(CudaCapture(), self.capturable, own=self._backend_name != "eager", offload=offload)
        self._forget()

    def _forget(self) -> None:
        """What is kept from the last steps."""
        self._collector = Collector(self._keys, orthogonal=bool(self.policy.config.orthogonal))
        self._graph.forget()
        self._report = StepReport()  # of the last step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: getattr(self, key) for key in (*FIXED, "_backend_name")}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p, values in state["state"].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, AsSaved):
                    values[key] = restored(self._keys, p, key, value.value)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # state saved without it can be loaded, as with torch's optimizers
        if "policy" in state:
            self._make_engine()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The state, as :meth:`torch.optim.Optimizer.state_dict` returns it.

        Of parameters that classic FSDP has flattened, the averages of the cosine, the pace and the trust are saved as
        0 and the age as the step count: every process has another one for its piece, which FSDP refuses to save.
        State of parameters that are in no group any more is left out: nobody could load it.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        everything, ids = self.state, {id(p) for p in params}
        kept = {p: state for p, state in everything.items() if id(p) in ids or not isinstance(p, Tensor)}
        if len(kept) < len(everything):
            self.state = defaultdict(dict, kept)
        try:
            return without_pieces_of_fsdp(super().state_dict(), params)
        finally:
            self.state = everything

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by :meth:`state_dict`; bit-exact, whatever the dtype of the parameters.

        Raises:
            ValueError: a checkpoint of another optimizer (see :meth:`from_adamw`) or of another policy, or state that
                does not fit the parameters; nothing has been changed then.
        """
        handle = self.register_load_state_dict_pre_hook(  # last, so after the user's own hooks
            lambda _, state: checked(state, self.param_groups, self.defaults["policy"], self._keys.coordinate)
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            group["policy"] = self.defaults["policy"]
