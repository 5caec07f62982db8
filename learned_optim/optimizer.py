"""LearnedOptimizer: parameter groups, lazy state and checkpoints; no mathematics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.diagnostics import figures_by_parameter
from learned_optim.engine.auto import make_backend
from learned_optim.engine.hyperparameters import StepContext, check_group, hyperparameters
from learned_optim.engine.param_state import GUARDED_TENSOR_KEYS, TENSOR_KEYS, ParamIndex, ParamState, arithmetic_dtype
from learned_optim.engine.sharding import find_shards, origin
from learned_optim.engine.step import Backend, StepReport, run_step
from learned_optim.policy.policy import Policy
from learned_optim.rule.cells import CELLS
from learned_optim.rule.types import Hyperparameters
from learned_optim.state_dict import AsSaved, checked, without_pieces_of_fsdp

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_ONE = torch.tensor(1.0, device="cpu")  # a float would be made a tensor anew for each that it is added to
_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LearnedOptimizer(Optimizer):
    r"""A drop-in replacement for ``torch.optim.AdamW`` whose update rule was learned.

    .. code-block:: text

        input : lr, beta1, beta2, eps, weight_decay, parameters p, policy (f: bounded factor, 1 at 0)
        state : m, v, h_1 .. h_H, all zero, per coordinate; two averages of a cosine and a, per tensor
        for t = 1, 2, ... do, for every tensor
            g   = gradient (negated if maximize)
            m   = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
            u   = g / (sqrt(v_hat) + eps),      b = m_hat / (sqrt(v_hat) + eps)     bias-corrected
            c   = context of the tensor: its shape, log t, rms of p, u, b, h_1, cosine of g and m
            s, w, kappa, rates = head(c)                                            once per tensor
            x   = features of the coordinate: u, b, h_1, p over their rms
            z_j = clamp(rate_j f(W_j x), 1/t, 1)
            h_j = h_j + z_j (u - h_j)                                               recurrent, H per coordinate
            a   = clamp(a + min(delta, gamma cos + rho S c), -alpha, alpha)         pace, recurrent too
            d   = s e^a (w_b b + w_u u + sum_j w_j h_j) f(Q x)
            d   = (1 - kappa) d where d u < 0                                       caution
            if d is a matrix, and the policy orthogonalises with share w:
                o = polar(d) |d| / |polar(d)|,   c = <d, o> / |d|^2                 by blocks; |.|: Frobenius norm
                e = d + w (o - d)
                d = e |d| / |e| min(1, c / 0.7)^(q w)                               damped where it turns far
            p   = p - lr weight_decay p - lr d

    ``lr`` has Adam's unit and scales the whole update; an existing learning rate and schedule carry over, but the
    rule shrinks its own steps as noise averages out, so a schedule is not needed.

    Args:
        params: parameters, ``named_parameters()``, or dicts of parameter groups; all float or complex types.
            Complex parameters are seen as pairs of real ones.
        lr: learning rate, a number or a 1-element tensor.
        betas: decay rates of m and v; ``None`` takes the policy's own.
        eps: added to the denominator, in units of the gradient; ``None`` takes the policy's own.
        weight_decay: decoupled, as in AdamW.
        policy: bundled name, folder, Hub id (``"owner/name"`` or ``"owner/name@revision"``), or a :class:`Policy`.
            A bundled name touches no network.
        revision: branch, tag or commit of a Hub id.
        maximize: ascend instead of descend.
        backend: ``"compiled"`` runs C++ that is generated from the rule and compiled once per machine (on GPUs: what
            ``torch.compile`` makes), ``"eager"`` plain torch operations. ``"auto"`` compiles where there is a compiler
            and, on GPUs, a million parameters or more; :attr:`backend` says what is used.
        state_dtype: ``torch.bfloat16`` keeps m and h in 2 bytes each (v stays in float32): 8 bytes per parameter with
            ``default``. ``None``: float32, and float64 for float64 parameters: 12 bytes per parameter in float32.
        safeguard: each tensor begins with AdamW's own step at this lr and gets the rule's as its gradients agree with
            the way taken so far; where they turn against it, it falls back to AdamW's. Every update is a mixture of
            the two: its weights add up to at most 8 (AdamW's: 1; the rule alone is bounded only by its policy).
            No loss is evaluated and nothing promises that the loss falls; it costs some small operations per step and
            one number per tensor, and a part of the speed-up. Measured in ``docs/safeguard.md``.

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
    ) -> None:
        if state_dtype is not None and state_dtype not in _STATE_DTYPES:
            raise ValueError(f"Invalid state_dtype: {state_dtype!r}; choose one of {_STATE_DTYPES} or None")
        if not isinstance(safeguard, bool):
            raise TypeError(f"Invalid safeguard: {safeguard!r}; expected True or False")
        self.policy = _resolve(policy, revision)
        if safeguard and not CELLS[self.policy.config.cell].is_mixture:
            raise ValueError(f"safeguard=True needs a gated cell, the policy's is {self.policy.config.cell!r}")
        self.safeguard = safeguard
        self.state_dtype = state_dtype
        self._backend_name = backend
        self._backend = self._make_backend()
        self._report = StepReport([], [])  # of the last step
        self._params: dict[ParamIndex, ParamState] = {}  # of the last steps
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": self.policy.config.betas if betas is None else betas,
            "eps": self.policy.config.eps if eps is None else eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "policy": f"{self.policy.fingerprint()} ({self.policy.source})",
        }
        check_group(defaults)
        super().__init__(params, defaults)

    @property
    def backend(self) -> str:
        """How the rule is run, and why."""
        return self._backend.name

    def diagnostics(self) -> dict[str, dict[str, float]]:
        """What the rule did in the last step, for each parameter that it updated.

        Computed when asked, from a few dozen values per tensor that the step leaves behind: no pass over memory, no
        communication, nothing in checkpoints. Empty before the first step.

        Returns:
            By parameter name where ``named_parameters()`` were given, else by ``"group.index"``, these figures:

            - ``step``, ``lr``: the parameter's own count of updates, and the learning rate of the last.
            - ``step_size``: the sum of the mixture's weights, relative to lr; AdamW has 1. ``pace``: the factor in it
              that has built up in the course of training.
            - ``share_momentum``, ``share_gradient``, ``share_hidden_0``, ...: the parts of it; AdamW has momentum
              only. ``caution_factor``: the factor of coordinates that would move against the present gradient.
            - ``update_rms``: rms of the update over lr, without weight decay, and ``update_to_adamw``: over that of
              AdamW at the same lr. An *estimate*, from sums, not from coordinates: mostly within a
              quarter, and less good for tensors of a few coordinates.
            - ``rms_gradient``, ``rms_momentum``: of gradient and momentum over sqrt(v); momentum far below gradient
              means noise. ``cosine`` of the two, and its ``cosine_fast`` and ``cosine_slow`` averages: steadily
              positive means steps are too small, negative too large. ``sparsity`` of the momentum: 0 where all
              coordinates are alike, about 0.36 where they are normal, near 1 where few count. ``rms_parameter``.
            - ``rms_hidden_0``: of the first hidden unit before the step; 1 where gradients never change sign.
              ``window_0``, ...: over how many steps each hidden unit averages, ``step`` at most; the coordinates' own
              gates, which vary it, are left out.
            - ``trust``: with a safeguard only, its trust in the rule; up to 0.25 the step was AdamW's.

            A tensor with a gradient that is not finite has NaN here.

        Example:
            >>> model = torch.nn.Linear(3, 1)
            >>> opt = LearnedOptimizer(model.named_parameters())
            >>> model(torch.randn(8, 3)).square().mean().backward()
            >>> opt.step()
            >>> sorted(opt.diagnostics())
            ['bias', 'weight']
        """
        return figures_by_parameter(self.policy.config, self.param_groups, self._report)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it leaves out, or gives as ``None`` for ``betas`` and ``eps``, takes the defaults."""
        if isinstance(param_group, dict):
            for name in ("betas", "eps"):
                if name in param_group and param_group[name] is None:
                    param_group = {**param_group, name: self.defaults[name]}
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.compiler.disable  # the rule's scalars change with every step: traced, they would be frozen into the graph
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one update of every parameter that has a gradient.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            RuntimeError: a sparse gradient; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"LearnedOptimizer does not support sparse gradients (parameter of shape {tuple(p.shape)}, "
                        f"gradient layout {p.grad.layout}); use sparse=False in the embedding"
                    )
        shards = find_shards(self.param_groups)
        params = self._with_gradients()
        self._report = run_step(self._backend, params, shards)
        for p in params:
            p.release_grad()
        return loss

    def _with_gradients(self) -> list[ParamState]:
        """All parameters that have a gradient, with gradient and step."""
        if len(self._params) > sum(len(group["params"]) for group in self.param_groups):
            self._params.clear()  # of parameters that are no longer here, among them
        groups = [
            [self._param_state((g, i), p, group) for i, p in enumerate(group["params"]) if p.grad is not None]
            for g, group in enumerate(self.param_groups)
        ]
        params = list(itertools.chain.from_iterable(groups))
        if params:
            torch._foreach_add_([p.count for p in params], _ONE, alpha=1.0)  # pyright: ignore[reportPrivateImportUsage]
        contexts: dict[Hyperparameters, dict[float, StepContext]] = {}
        for group, some in zip(self.param_groups, groups, strict=True):
            hyper = hyperparameters(group)
            by_step = contexts.setdefault(hyper, {})
            for p in some:
                step = float(p.count)
                if step not in by_step:
                    by_step[step] = StepContext(step, hyper)
                p.context = by_step[step]
        return params

    def _param_state(self, index: ParamIndex, p: Tensor, group: dict[str, Any]) -> ParamState:
        state = self.state[p]
        param = self._params.get(index)
        if param is None or not param.is_of(p, state):
            self._complete(p, state)
            begins = origin(p) if self.policy.config.orthogonal else (0, 0)
            tensor_keys = GUARDED_TENSOR_KEYS if self.safeguard else TENSOR_KEYS
            param = ParamState(p, state, self._coordinate_keys(), tensor_keys, index, begins)
            self._params[index] = param
        if p.grad is None:
            raise RuntimeError("a parameter without gradient cannot be updated")
        param.set_grad(p.grad, group["maximize"])
        return param

    def _complete(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """State that a parameter does not have yet."""
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for key in self._coordinate_keys():
                state[key] = torch.zeros_like(p, dtype=self._state_dtype_of(p, key))
            for key in TENSOR_KEYS:
                state[key] = torch.zeros((), dtype=arithmetic_dtype(p.dtype.to_real()), device=p.device)
        if self.safeguard and "trust" not in state:  # nor in state that was saved without a safeguard
            state["trust"] = torch.zeros_like(state[TENSOR_KEYS[0]])

    def _make_backend(self) -> Backend:
        return make_backend(self._backend_name, self.policy.config, self.policy.weights())

    def _coordinate_keys(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(f"hidden_{j}" for j in range(self.policy.config.hidden_size))]

    def _state_dtype_of(self, p: Tensor, key: str) -> torch.dtype:
        real = arithmetic_dtype(p.dtype.to_real())
        if self.state_dtype is not None:
            # In two bytes the second moment's increments, 0.1% of its value, would be rounded away.
            real = torch.promote_types(self.state_dtype, torch.float32) if key == "exp_avg_sq" else self.state_dtype
        if p.is_complex():
            return torch.promote_types(real, torch.float32).to_complex()
        return real

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "policy": self.policy,
            "state_dtype": self.state_dtype,
            "safeguard": self.safeguard,
            "_backend_name": self._backend_name,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p, values in state["state"].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, AsSaved):
                    values[key] = self._restored(p, key, value.value)
        super().__setstate__(state)
        self._report, self._params = StepReport([], []), {}
        for group in self.param_groups:
            group.setdefault("maximize", False)  # state saved without it can be loaded, as with torch's optimizers
        if "policy" in state:
            self._backend = self._make_backend()

    def state_dict(self) -> dict[str, Any]:
        """The state, as :meth:`torch.optim.Optimizer.state_dict` returns it.

        Where classic FSDP has flattened the parameters, the averages of the cosine, the pace and the trust are saved
        as 0 and begin anew in a run that is resumed: every process has another one for its piece, which FSDP refuses
        to save.
        """
        params = (p for group in self.param_groups for p in group["params"])
        return without_pieces_of_fsdp(super().state_dict(), params)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by :meth:`state_dict`; bit-exact, whatever the dtype of the parameters.

        Raises:
            ValueError: a checkpoint of another optimizer or of another policy, or state that does not fit the
                parameters; nothing has been changed then.
        """
        handle = self.register_load_state_dict_pre_hook(  # last, so after the user's own hooks
            lambda _, state: checked(state, self.param_groups, self.defaults["policy"], self._coordinate_keys())
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group in self.param_groups:
            group["policy"] = self.defaults["policy"]

    def _restored(self, p: Any, key: str, value: Any) -> Any:
        """A saved value as this optimizer keeps it: torch itself would have cast it to the parameter's dtype."""
        if key == "step":
            return torch.as_tensor(value, dtype=torch.float32).detach().cpu().clone()
        if not isinstance(value, Tensor) or not isinstance(p, Tensor):
            return value
        dtype = self._state_dtype_of(p, key) if key in self._coordinate_keys() else value.dtype
        return value.detach().to(device=p.device, dtype=dtype, copy=True)


def _resolve(policy: str | Path | Policy, revision: str | None) -> Policy:
    if not isinstance(policy, str | Path | Policy):
        raise TypeError(f"policy must be a name, a folder, a Hub id or a Policy, found {type(policy).__name__}")
    if isinstance(policy, Policy) and revision is not None:
        raise ValueError("revision goes with a Hub id, found it beside a Policy object")
    return Policy.from_pretrained(policy) if revision is None else Policy.from_pretrained(policy, revision=revision)
