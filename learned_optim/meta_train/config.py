"""What a meta-training run is made of; free of torch, so that ``--help`` need not wait for it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

Estimator = Literal["backprop", "es", "guided", "pes", "mixed", "imitation"]
MetaLoss = Literal["final", "sum", "log_ratio"]
Part = Literal["pace", "age", "decay", "step_size", "averaging", "caution", "tensor_head", "gates", "amplitude", "gru"]

#: Parts of the tensor head, one number each for every entry of the context: in which direction they move its outputs,
#: which are the logarithms of step size, weights of momentum and gradient, odds of caution, and weights of the hidden
#: units.
HEAD_DIRECTIONS: dict[str, tuple[float, ...]] = {
    "step_size": (1.0,),
    "averaging": (0.0, -1.0, -1.0, 0.0, 1.0),
    "caution": (0.0, 0.0, 0.0, 1.0),
}


@dataclasses.dataclass(frozen=True)
class MetaTrainConfig:
    """A meta-training run: everything that decides its result.

    Args:
        outer_steps: updates of the meta-parameters.
        seed: of everything random in the run.
        tasks: names of families of the zoo, or the tags ``train``, ``validation``, ``all``. Ignored where the Python
            API is given tasks.
        start: the policy to start from: ``new`` (hand-set base mixture, zero weights), ``gru`` (a GRU cell with
            random weights), or whatever ``Policy.from_pretrained`` takes.
        learn: the policy, the initial parameters of the optimizee, or both.
        parts: parts of the policy that are learned. Five have few numbers, which ``es`` finds in a fraction of the
            time: ``pace`` (what a tensor's step size grows or shrinks by), ``age`` (when a tensor becomes young again),
            and three parts of the tensor head: ``step_size``, ``averaging`` (the long average against momentum and
            gradient) and ``caution``. The others: all of the ``tensor_head``; ``decay`` (the rule's own weight decay,
            where the policy has it); of each coordinate ``gates`` and ``amplitude``; ``gru`` (all of a GRU cell). Empty
            means ``pace`` and ``step_size`` for ``es``, ``guided`` and ``pes`` where
            the cell is a mixture, and all that the policy has otherwise.
        estimator: of the meta-gradient. ``backprop``: truncated back-propagation through the unrolled inner training.
            ``es``: antithetic evolution strategies over whole trajectories (Salimans et al. 2017). ``guided``: the same
            in directions that back-propagation through windows points out (Maheswaranathan et al. 2019; see
            :mod:`learned_optim.meta_train.guided`). ``pes``: persistent evolution strategies, unbiased over truncated
            trajectories (Vicol et al. 2021). ``mixed``: half the meta-batch each of ``backprop`` and ``pes``, mixed by
            inverse variance (Metz et al. 2019). ``imitation``: back-propagation of how far the policy's updates are
            from a teacher's (Chen et al. 2020; see :mod:`learned_optim.meta_train.imitation`).
        teacher: name or folder of the policy that is imitated, or its repository on the Hub (``imitation``).
        meta_batch: trajectories per outer step (``es``, ``guided``: tasks; ``pes``: antithetic pairs of particles).
        pairs: antithetic pairs per task (``es``, ``guided``). Several are vectorized, run as one batch of networks: for
            small networks, and on a GPU, a fraction of the time that they take one by one.
        guides: outer steps whose back-propagated gradients span the subspace of the perturbations (``guided``).
        guide_share: share of the perturbations that lies in it, in [0, 1); the rest goes in all directions alike.
        unroll_length: inner steps per truncation (``backprop``, ``pes``, ``imitation``), or of the shortest window
            (``guided``).
        second_order: differentiate through the inner gradients too; exact, and slower (``backprop``).
        checkpoint_segment: inner steps whose graph is recomputed in the backward pass together, so that memory grows
            with the root of ``unroll_length``; 0 keeps the whole graph (``backprop``).
        meta_loss: of a window: ``final`` is the last loss, ``sum`` the mean along it, ``log_ratio`` the mean of
            log(loss / loss at the beginning), which weighs tasks of unlike loss scales alike. ``es`` and
            ``guided`` compare whole trajectories by their log-speedup instead.
        held_out_share: part of the meta-loss, or of the comparison (``es``, ``guided``), that is made on held-out data
            where a task has any, in [0, 1]. Comparisons see the lowest held-out loss so far and the one at the end, a
            half each.
        max_length: cap of the trajectories' lengths, in inner steps; 0 takes each task's own. A rule that was
            taught on the first 40 steps of a task of 200 ended with 1.5 times the held-out loss.
        curriculum: outer steps over which the cap grows from a quarter of its value; 0 starts at its full value.
        inner_lr: learning rate of the inner steps.
        inner_lr_spread: each trajectory's rate is drawn log-uniformly within this factor of ``inner_lr``, each way.
        inner_weight_decay: as in the optimizer.
        fixed_scale: impose each tensor's step size: the rms of its mixture is taken out of the gradient, so that
            windows too short to judge step sizes cannot change them (``backprop``).
        sigma: standard deviation of the perturbations (``es``, ``guided``, ``pes``), in units of the weights.
        meta_optimizer: class of ``torch.optim``, or ``LearnedOptimizer``.
        meta_lr: its learning rate.
        clip: bound of the rms of a trajectory's meta-gradient, as a multiple of the running median; a trajectory
            that explodes cannot outvote the others.
        augment: draw augmented tasks (rescaled parameters, noise, jumps) with this probability.
        recipes: train with a user's recipe with this probability: a learning-rate schedule, another weight decay,
            clipped gradients. Otherwise at a constant rate and with ``inner_weight_decay``.
        validate_every: outer steps between validations; 0 never validates.
        validation_tasks: families or tags to validate on.
        validation_seeds: tasks per validation family, or seeds of a task; 0 takes as many as make eight runs in all, or
            one. The best of few runs is often chance.
        validation_length: cap of their lengths, in inner steps; 0 takes each task's own.
        patience: validations without improvement before the run ends early; 0 never.
        save_every: outer steps between checkpoints.
        keep_going: a task that raises is left out, named and counted, instead of ending the run.
        device: where several pairs are vectorized, ``cpu`` or ``cuda`` (``es``, ``guided``). Validation stays on the
            CPU.
        threads: of torch in each process; small networks are fastest with 1.
        backend: how the update rule is run. ``compiled`` makes inner steps about three times as fast once it has
            compiled, half a minute (``es``) to two minutes (``backprop``, ``pes``) the first time on a machine;
            ``auto`` does so where the planned number of inner steps repays it.
    """

    outer_steps: int = 100
    seed: int = 0
    tasks: tuple[str, ...] = ("train",)
    start: str = "new"
    learn: Literal["policy", "init", "both"] = "policy"
    parts: tuple[Part, ...] = ()
    estimator: Estimator = "es"
    teacher: str = "default"
    meta_batch: int = 4
    pairs: int = 1
    guides: int = 8
    guide_share: float = 0.5
    unroll_length: int = 20
    second_order: bool = False
    checkpoint_segment: int = 0
    meta_loss: MetaLoss = "log_ratio"
    held_out_share: float = 0.0
    max_length: int = 0
    curriculum: int = 0
    inner_lr: float = 1e-3
    inner_lr_spread: float = 1.0
    inner_weight_decay: float = 0.01
    fixed_scale: bool = False
    sigma: float = 0.1
    meta_optimizer: str = "Adam"
    meta_lr: float = 0.03
    clip: float = 5.0
    augment: float = 0.0
    recipes: float = 0.0
    validate_every: int = 20
    validation_tasks: tuple[str, ...] = ("validation",)
    validation_seeds: int = 0
    validation_length: int = 0
    patience: int = 0
    save_every: int = 10
    keep_going: bool = False
    device: str = "cpu"
    threads: int = 1
    backend: Literal["auto", "eager", "compiled"] = "auto"

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"MetaTrainConfig.{name} must be {wanted}, found {getattr(self, name)!r}")

        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                require(getattr(self, name) in get_args(hint), name, f"one of {get_args(hint)}")
            elif hint is float:
                require(math.isfinite(getattr(self, name)), name, "a finite number")
            elif hint is int:
                require(type(getattr(self, name)) is int, name, "a whole number")
            elif hint is bool:
                require(isinstance(getattr(self, name), bool), name, "True or False")
            elif get_origin(hint) is tuple:
                require(not isinstance(getattr(self, name), str), name, "a tuple of names, not one name")
        require(all(part in get_args(Part) for part in self.parts), "parts", f"names out of {get_args(Part)}")
        for name in (
            "outer_steps",
            "meta_batch",
            "pairs",
            "guides",
            "unroll_length",
            "save_every",
            "threads",
        ):
            require(getattr(self, name) >= 1, name, "1 or more")
        for name in (
            "checkpoint_segment",
            "max_length",
            "curriculum",
            "validate_every",
            "validation_length",
            "validation_seeds",
            "patience",
        ):
            require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("inner_lr", "sigma", "clip"):
            require(getattr(self, name) > 0.0, name, "positive")
        require(self.meta_lr >= 0.0, "meta_lr", "0 or more")
        require(0.0 <= self.guide_share < 1.0, "guide_share", "in [0, 1)")
        require(self.inner_lr_spread >= 1.0, "inner_lr_spread", "1 or more")
        for name in ("augment", "recipes", "held_out_share"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]")
        require(len(self.tasks) > 0, "tasks", "at least one name")
        of_runs = "for estimators other than 'es' and 'guided'"
        require(self.compares_runs or self.pairs == 1, "pairs", f"1 {of_runs}")
        require(self.device in ("cpu", "cuda"), "device", "'cpu' or 'cuda'")
        require(self.compares_runs or self.device == "cpu", "device", f"'cpu' {of_runs}")
        require(self.estimator != "mixed" or self.meta_batch >= 4, "meta_batch", "4 or more for the mixed estimator")
        if self.estimator == "imitation":
            require(self.backend != "compiled", "backend", "'auto' or 'eager' for 'imitation'")
            for name in ("second_order", "fixed_scale", "checkpoint_segment", "meta_loss"):
                own = getattr(type(self), name)
                require(getattr(self, name) == own, name, f"{own!r} for 'imitation', whose meta-loss is its own")
        else:
            require(self.teacher == type(self).teacher, "teacher", "left out for estimators other than 'imitation'")
        if self.learn != "policy":
            require(self.estimator == "backprop", "estimator", "'backprop' where initial parameters are learned")

    def with_parts(self, is_mixture: bool) -> MetaTrainConfig:
        """The same with ``parts`` spelt out, for a policy whose cell is a mixture of averages, or is not."""
        if self.parts:
            return self
        few = self.estimator in ("es", "guided", "pes") and is_mixture
        everything: tuple[Part, ...] = tuple(part for part in get_args(Part) if part not in HEAD_DIRECTIONS)
        return dataclasses.replace(self, parts=("pace", "step_size") if few else everything)

    @property
    def compares_runs(self) -> bool:
        """Whether the estimator compares whole runs with each other, of which several may be vectorized."""
        return self.estimator in ("es", "guided")

    @property
    def head_directions(self) -> tuple[tuple[float, ...], ...]:
        """Directions in which the tensor head's outputs may move; none where all or nothing of it is learned."""
        return (
            () if "tensor_head" in self.parts else tuple(HEAD_DIRECTIONS[p] for p in self.parts if p in HEAD_DIRECTIONS)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MetaTrainConfig:
        """The inverse of :meth:`to_dict`; keys left out take their defaults.

        Raises:
            ValueError: an unknown key, or a value of the wrong type.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are names and values, found {type(values).__name__}")
        known = {f.name: f.default for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown settings {unknown}; known are {sorted(known)}")
        typed: dict[str, Any] = {}
        for name, value in values.items():
            wanted = type(known[name])
            if wanted is tuple and isinstance(value, list | tuple):
                value = tuple(value)
            elif wanted is float and type(value) is int and abs(value) < 2**1023:  # others are no floats
                value = float(value)
            if type(value) is not wanted or (isinstance(value, tuple) and not all(type(x) is str for x in value)):
                kind = "a list of names" if wanted is tuple else f"of type {wanted.__name__}"
                raise ValueError(f"setting {name!r} must be {kind}, found {value!r:.80}")
            typed[name] = value
        return cls(**typed)

    @classmethod
    def from_file(cls, path: str | Path) -> MetaTrainConfig:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            FileNotFoundError, ValueError: with the file's name.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such settings file: {path}")
        if path.suffix not in (".toml", ".json"):
            raise ValueError(f"{path} is no settings file: its name must end in .toml or .json")
        try:
            read = _toml().loads if path.suffix == ".toml" else json.loads
            return cls.from_dict(read(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_toml(self) -> str:
        """The text of a ``.toml`` file that :meth:`from_file` reads back."""
        # JSON's numbers, booleans, strings and lists of them are TOML's, but for two kinds of characters: TOML knows
        # no pairs of surrogates, and wants DEL escaped.
        lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in self.to_dict().items())
        return "".join(lines).replace("\x7f", "\\u007f")

    def differences(self, other: MetaTrainConfig) -> list[str]:
        """``name: ours -> other's`` for every field that differs."""
        mine, others = self.to_dict(), other.to_dict()
        return [f"{k}: {mine[k]!r} -> {others[k]!r}" for k in mine if mine[k] != others[k]]


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    import tomli  # pyright: ignore[reportMissingImports]  (Python 3.10)

    return tomli
