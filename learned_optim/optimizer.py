"""LearnedOptimizer: parameter groups, lazy state and checkpoints; no mathematics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from learned_optim.backends import Job, arithmetic_dtype
from learned_optim.cells import Hyperparameters
from learned_optim.compiled import make_backend
from learned_optim.policy import Policy

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class LearnedOptimizer(Optimizer):
    r"""A drop-in replacement for ``torch.optim.AdamW`` whose update rule was learned.

    .. code-block:: text

        input : lr, beta1, beta2, eps, weight_decay, parameters p, policy (f: bounded factor, 1 at 0)
        state : m, v, h_1 .. h_4, all zero, per coordinate; two averages of a cosine, per tensor
        for t = 1, 2, ... do, for every tensor
            g   = gradient (negated if maximize)
            m   = beta1 m + (1 - beta1) g,      v = beta2 v + (1 - beta2) g^2
            u   = g / (sqrt(v_hat) + eps),      b = m_hat / (sqrt(v_hat) + eps)     bias-corrected
            c   = context of the tensor: its shape, log t, rms of p, u, b, h_1, cosine of g and m
            s, w, kappa, rates = head(c)                                            once per tensor
            x   = features of the coordinate: u, b, h_1, p over their rms
            z_j = clamp(rate_j f(W_j x), 1/t, 1)
            h_j = h_j + z_j (u - h_j)                                               recurrent, 4 per coordinate
            d   = s (w_b b + w_u u + sum_j w_j h_j) f(Q x)
            d   = (1 - kappa) d where d u < 0
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
        backend: ``"eager"``, ``"compiled"`` or ``"auto"``; :attr:`backend` says what is used.
        state_dtype: ``torch.bfloat16`` keeps m and h in 2 bytes each (v stays in float32): 14 bytes per parameter.
            ``None``: float32, and float64 for float64 parameters: 24 bytes per parameter in float32.
        safeguard: reserved; ``True`` is refused by this version.

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
    schedule-free learning (Defazio et al. 2024), its agreement gate that of Liang et al., "Cautious Optimizers" (2024).
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
        if safeguard:
            raise ValueError("safeguard=True is not available in this version")
        self.policy = _resolve(policy, revision)
        self.state_dtype = state_dtype
        self._backend_name = backend
        self._backend = make_backend(backend, self.policy)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": self.policy.config.betas if betas is None else betas,
            "eps": self.policy.config.eps if eps is None else eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "policy": f"{self.policy.fingerprint()} ({self.policy.source})",
        }
        _check_group(defaults)
        super().__init__(params, defaults)

    @property
    def backend(self) -> str:
        """How the rule is run, and why."""
        return self._backend.name

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what it leaves out, or gives as ``None`` for ``betas`` and ``eps``, takes the defaults."""
        if isinstance(param_group, dict):
            for name in ("betas", "eps"):
                if name in param_group and param_group[name] is None:
                    param_group = {**param_group, name: self.defaults[name]}
            _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.compiler.disable  # the rule's numbers change with every step: traced, they would be frozen into the graph
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
        with_grad = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for p in (p for params in with_grad for p in params):
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"LearnedOptimizer does not support sparse gradients (parameter of shape {tuple(p.shape)}, "
                    f"gradient layout {p.grad.layout}); use sparse=False in the embedding"
                )
        self._backend.prepare([p for params in with_grad for p in params])
        for group, params in zip(self.param_groups, with_grad, strict=True):
            if params:
                beta1, beta2 = group["betas"]
                hyper = Hyperparameters(*map(_number, (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])))
                self._backend.run([self._job(p, group["maximize"]) for p in params], hyper)
        return loss

    def _job(self, p: Tensor, maximize: bool) -> Job:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            for key in self._plane_keys():
                state[key] = torch.zeros_like(p, dtype=self._plane_dtype(p, key))
            for key in ("cosine_fast", "cosine_slow"):
                state[key] = torch.zeros((), dtype=arithmetic_dtype(p.dtype.to_real()), device=p.device)
        state["step"] += 1
        grad = p.grad
        if grad is None:
            raise RuntimeError("a parameter without gradient cannot be updated")
        tensors = [p, -grad if maximize else grad, *(state[key] for key in self._plane_keys())]
        if p.is_complex():
            tensors = [torch.view_as_real(t.resolve_conj()) for t in tensors]
        return Job(tensors[0], tensors[1], tuple(tensors[2:]), (state["cosine_fast"], state["cosine_slow"]),
                   float(state["step"]))  # fmt: skip

    def _plane_keys(self) -> list[str]:
        return ["exp_avg", "exp_avg_sq", *(f"hidden_{j}" for j in range(self.policy.config.hidden_size))]

    def _plane_dtype(self, p: Tensor, key: str) -> torch.dtype:
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
            "_backend_name": self._backend_name,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p, values in state["state"].items():
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, _AsSaved):
                    values[key] = self._restored(p, key, value.value)
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)  # state saved without it can be loaded, as with torch's optimizers
        if "policy" in state:
            self._backend = make_backend(self._backend_name, self.policy)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by :meth:`state_dict`; bit-exact, whatever the dtype of the parameters.

        Raises:
            ValueError: a checkpoint of another optimizer or of another policy, or state that does not fit the
                parameters; nothing has been changed then.
        """
        handle = self.register_load_state_dict_pre_hook(_checked)  # last, so after the user's own hooks
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
        dtype = self._plane_dtype(p, key) if key in self._plane_keys() else value.dtype
        return value.detach().to(device=p.device, dtype=dtype, copy=True)


class _AsSaved:
    """Hides a value from ``Optimizer.load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _checked(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Check that a saved state fits the optimizer, and wrap its values so that they arrive as they were saved."""
    if not isinstance(optimizer, LearnedOptimizer):
        raise TypeError(f"expected a LearnedOptimizer, found {type(optimizer).__name__}")
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(f"not an optimizer state: expected the keys 'state' and 'param_groups', found {found}")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    for group in saved_groups:
        saved = group.get("policy")
        if not isinstance(saved, str):
            keys = sorted(k for k in group if k not in ("params", "param_names"))
            raise ValueError(
                f"this state was not saved by LearnedOptimizer: its parameter groups name no policy (keys {keys}). "
                "State of AdamW or another optimizer cannot be continued; start with a fresh optimizer"
            )
        if saved.split()[0] != str(optimizer.defaults["policy"]).split()[0]:
            raise ValueError(
                f"this state was made by policy {saved}, the optimizer runs policy {optimizer.defaults['policy']}: "
                "construct LearnedOptimizer with the policy of the checkpoint, or start with a fresh optimizer"
            )
    saved_ids = [i for group in saved_groups for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    sizes = ([len(g["params"]) for g in saved_groups], [len(g["params"]) for g in groups])
    if sizes[0] != sizes[1]:
        raise ValueError(f"the state's parameter groups hold {sizes[0]} parameters, the optimizer's hold {sizes[1]}")
    needed = ["step", *optimizer._plane_keys(), "cosine_fast", "cosine_slow"]
    state = dict(state_dict["state"])
    for key, p in zip(saved_ids, params, strict=True):
        values = state.get(key)
        if not values:
            continue
        missing = [name for name in needed if name not in values]
        if missing:
            raise ValueError(f"the state of parameter {key!r} lacks {missing}")
        for name in optimizer._plane_keys():
            plane = values[name]
            if not isinstance(plane, Tensor) or plane.shape != p.shape or plane.is_complex() != p.is_complex():
                found = f"{plane.dtype} of shape {tuple(plane.shape)}" if isinstance(plane, Tensor) else type(plane)
                raise ValueError(
                    f"the state of parameter {key!r} holds as {name} {found}, "
                    f"the parameter is {p.dtype} of shape {tuple(p.shape)}"
                )
        state[key] = {name: _AsSaved(value) for name, value in values.items()}
    return {**state_dict, "state": state}


def _resolve(policy: str | Path | Policy, revision: str | None) -> Policy:
    if isinstance(policy, Policy):
        if revision is not None:
            raise ValueError("revision goes with a Hub id, found it beside a Policy object")
        return policy
    if not isinstance(policy, str | Path):
        raise TypeError(f"policy must be a name, a folder, a Hub id or a Policy, found {type(policy).__name__}")
    return Policy.from_pretrained(policy) if revision is None else Policy.from_pretrained(policy, revision=revision)


def _check_group(group: Mapping[str, Any]) -> None:
    """Raise the error that torch.optim would, for the first hyperparameter out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    _check_number("learning rate", lr)
    betas = group["betas"]
    if not isinstance(betas, Iterable) or isinstance(betas, str) or len(tuple(betas)) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two numbers or None")
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        _check_number(f"beta parameter at index {i}", beta, below=1.0)
    _check_number("epsilon value", group["eps"])
    _check_number("weight_decay value", group["weight_decay"])
    if group["maximize"] not in (True, False):
        raise TypeError(f"Invalid maximize: {group['maximize']!r}; expected True or False")


def _check_number(what: str, value: Any, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"Invalid {what}: {value!r} ({type(value).__name__}); expected a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Invalid {what}: a Tensor of shape {tuple(value.shape)}; expected 1 element")
    if not 0.0 <= _number(value) < below:
        raise ValueError(f"Invalid {what}: {value}")


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
