"""Parameters, state and groups changed by hand between steps, at random: never silently wrong, never corrupt.

Pruning, densifying and changes of a vocabulary cut and extend parameters and state. A step is then the one that a
transcription of the rule makes from what is there; or an error names what does not fit, and nothing has changed.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from helpers.optimizer_checks import through_a_file
from helpers.reference import ReferenceTensor
from helpers.support import POLICIES, assert_same_bits, copies, give_gradients, leaves, make, run

KEYS = ("exp_avg", "exp_avg_sq", *(f"hidden_{j}" for j in range(4)))
ALONE = ("cosine_fast", "cosine_slow", "log_pace", "age")
SHAPES = ((4, 3), (5,), (4, 3), (2, 3, 2), ())
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 2e-2}


def everything(optimizer) -> tuple[list[torch.Tensor], list[Any]]:
    """All that a step could change, and which objects those are."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in params if p in optimizer.state for v in optimizer.state[p].values()]
    tensors = [t.detach().clone() for t in (*params, *states) if isinstance(t, torch.Tensor)]
    shape = [len(optimizer.state), *(list(state) for state in optimizer.state.values()), *map(id, states)]
    return tensors, [*shape, [{**g, "params": len(g["params"])} for g in optimizer.param_groups]]


def assert_refused(optimizer, match, error=RuntimeError):
    before, shape = everything(optimizer)
    with pytest.raises(error, match=match) as caught:
        optimizer.step()
    after, shape_after = everything(optimizer)
    assert_same_bits(after, before)
    assert shape_after == shape
    assert "Nothing was changed" in str(caught.value)


# --- one change each ------------------------------------------------------------------------------------------------


def two_steps(backend="eager", **options):
    params = leaves((5, 4), (20, 16), (6,))
    optimizer = make(zip(("first", "weight", "last"), params, strict=True), backend=backend, **options)
    run(optimizer, params, 2)
    return params, optimizer


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("shape", [(10, 16), (16, 20), (30, 16), (320,), ()])
def test_state_of_another_shape_is_refused_before_anything_moves(shape, backend):
    params, optimizer = two_steps(backend)
    params[1].data, params[1].grad = torch.randn(shape), None
    give_gradients(params, 3)
    shapes = rf"exp_avg has shape \(20, 16\), the parameter has shape \({', '.join(map(str, shape))},?\)"
    assert_refused(optimizer, rf"parameter 'weight'.*{shapes}.*del opt\.state\[p\]")
    del optimizer.state[params[1]]
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3, 1, 3]


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("key", KEYS)
def test_state_of_which_only_some_was_cut_is_refused(key, backend):
    params, optimizer = two_steps(backend)
    state = optimizer.state[params[1]]
    state[key] = state[key][:10].clone()
    give_gradients(params, 3)
    assert_refused(optimizer, rf"'weight'.*{key} has shape \(10, 16\).*\(20, 16\)")


def spoil_with(key, change):
    def spoil(state):
        state[key] = change(state[key])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with("exp_avg", lambda t: t.long()), "exp_avg is of torch.int64"),
        (spoil_with("hidden_1", lambda t: t.to(torch.complex64)), "hidden_1 is of torch.complex64"),
        (spoil_with("exp_avg_sq", lambda t: t.mean().expand(t.shape)), "exp_avg_sq is expanded"),
        (spoil_with("exp_avg", lambda t: t.tolist()), "exp_avg is a list"),
        (spoil_with("log_pace", lambda t: t.expand(20).clone()), r"log_pace has shape \(20,\)"),
        (spoil_with("step", lambda t: t.bfloat16()), "step is a tensor of .*bfloat16"),
        (spoil_with("step", lambda t: 2), "step is 2"),
        (spoil_with("step", lambda t: t - 7.0), "counted -5.0 steps"),
        (lambda state: state.pop("hidden_2"), r"\['hidden_2'\] are missing"),
        (lambda state: state.pop("step"), r"\['step'\] are missing"),
    ],
)
def test_state_that_cannot_be_used_is_refused(spoil, message):
    params, optimizer = two_steps()
    give_gradients(params, 3)
    spoil(optimizer.state[params[1]])
    assert_refused(optimizer, f"'weight'.*{message}")


@pytest.mark.parametrize(("change", "message"), [("to_sparse", "of torch.sparse"), ("to", "lies on meta")])
def test_state_that_lies_elsewhere_is_refused(change, message):
    params, optimizer = two_steps()
    state, before = optimizer.state[params[1]], [p.detach().clone() for p in params]
    state["exp_avg"] = getattr(state["exp_avg"], change)(*["meta"] * (change == "to"))
    with pytest.raises(RuntimeError, match=f"'weight'.*exp_avg (is )?{message}"):
        optimizer.step()
    assert_same_bits([p.detach() for p in params], before)


def test_a_gradient_of_another_shape_is_refused():
    params, optimizer = two_steps()
    params[1].data = params[1].data[:10].clone()
    assert_refused(optimizer, r"gradient of parameter 'weight' has shape \(20, 16\).*\(10, 16\).*zero_grad")
    params, optimizer = two_steps("compiled")
    params[1].grad.data = torch.randn(3)  # which torch does not hear of, and nothing else has changed
    assert_refused(optimizer, r"gradient of parameter 'weight' has shape \(3,\)")


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_parameter_without_numbers_is_refused(backend):
    p = torch.nn.Parameter(torch.ones(4, 3, device="meta"))
    optimizer = make([p], backend=backend)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'0\.0' is on the meta device.*Nothing was changed.*to_empty"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(
    ("p", "message"),
    [
        (TwoTensor(torch.ones(4, 3), torch.ones(4, 3)), r"is a TwoTensor.*Nothing was changed.*plain tensors"),
        (torch.ones(4, 3, dtype=torch.cfloat).mH, r"conjugates or negates.*Nothing was changed.*resolve_conj"),
        (torch.ones(4, 3, dtype=torch.cfloat).conj().imag, r"conjugates or negates.*Nothing was changed"),
    ],
    ids=["wrapper", "conjugate", "negative"],
)
def test_a_parameter_that_is_not_what_lies_in_its_memory_is_refused(p, message, backend):
    p = torch.nn.Parameter(p)
    before = p.detach().clone()
    optimizer = make([p], backend=backend)
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(before, p.detach())


def test_fake_tensors_are_refused_in_words():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(4, 3))
        p.grad = torch.ones(4, 3)
    optimizer = make([p], backend="eager")
    with pytest.raises(RuntimeError, match=r"is a FakeTensor.*Nothing was changed"):
        optimizer.step()


def test_a_parameter_that_is_expanded_is_refused():
    params, optimizer = two_steps()
    params[2].data = torch.zeros(1).expand(6)
    assert_refused(optimizer, "parameter 'last' cannot be updated: it is expanded")


def shared_data(optimizer, p, q):
    q.data = p.data


def the_same_state(optimizer, p, q):
    optimizer.state[q] = optimizer.state[p]


def state_copied_by_reference(optimizer, p, q):
    optimizer.state[q] = dict(optimizer.state[p])


def state_cut_by_reference(optimizer, p, q):
    optimizer.state[q] = {k: v.clone() if v.shape == p.shape else v for k, v in optimizer.state[p].items()}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tie", [shared_data, the_same_state, state_copied_by_reference, state_cut_by_reference])
def test_two_parameters_with_the_same_memory_or_state_are_refused(tie, frozen):
    p, q = leaves((4, 3), (4, 3))
    optimizer = make([p, q])
    run(optimizer, [p, q], 2)
    tie(optimizer, p, q)
    give_gradients([q] if frozen else [p, q], 3)
    if frozen:
        p.grad = None
    assert_refused(optimizer, r"'0\.[01]' and '0\.[01]' (lie in the same memory|share state)")


def test_parts_of_one_memory_and_state_that_was_handed_on_are_no_sharing():
    (p,) = leaves((8, 3))
    optimizer = make([p])
    run(optimizer, [p], 2)
    state = optimizer.state.pop(p)
    halves = [p.detach()[:4].requires_grad_(), p.detach()[4:].requires_grad_()]
    for half, rows in zip(halves, (slice(0, 4), slice(4, 8)), strict=True):
        optimizer.state[half] = {k: v[rows] if v.shape == p.shape else v.clone() for k, v in state.items()}
    optimizer.param_groups[0]["params"] = halves
    run(optimizer, halves, 2, start=2)
    p_again, q = optimizer.param_groups[0]["params"][0], leaves((4, 3))[0]
    optimizer.state[q] = optimizer.state.pop(p_again)  # whose index, the first one, still holds what was kept
    optimizer.param_groups[0]["params"] = [p_again, halves[1], q]
    p_again.grad = None
    run(optimizer, [halves[1], q], 1)


def test_what_was_removed_is_not_saved_and_comes_back_as_it_was():
    params, optimizer = two_steps()
    state = optimizer.state[params[1]]
    for key in ("params", "param_names"):
        optimizer.param_groups[0][key] = optimizer.param_groups[0][key][::2]
    saved = through_a_file(optimizer.state_dict())
    assert sorted(saved["state"]) == [0, 1]
    make([p.detach().requires_grad_() for p in params[::2]]).load_state_dict(saved)
    optimizer.add_param_group({"params": [("weight", params[1])]})
    assert optimizer.state[params[1]] is state


# --- at random ------------------------------------------------------------------------------------------------------


class Surgery:
    """An optimizer of some small tensors, what is done to it, and what a step of it must be."""

    def __init__(self, seed: int, backend: str) -> None:
        self.rng, self.backend = random.Random(seed), backend
        self.policy = self.rng.choice(["random", "orthogonal"])
        self.options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "backend": backend}
        self.options["skip_nonfinite"] = self.rng.random() < 0.3
        torch.manual_seed(seed)
        params = [self.leaf(shape) for shape in SHAPES[: self.rng.randint(2, 5)]]
        self.optimizer = make([{"params": params[:1]}, {"params": params[1:], "lr": 0.01}], self.policy, **self.options)
        self.spoiled = 0

    def leaf(self, shape, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    @property
    def params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def any(self) -> torch.Tensor | None:
        return self.rng.choice(self.params) if self.params else None

    def place(self, p) -> tuple[list[torch.Tensor], int]:
        return next((g["params"], i) for g in self.optimizer.param_groups for i, q in enumerate(g["params"]) if q is p)

    # --- what is done: each takes a parameter ------------------------------------------------------------------------

    def resize(self, p) -> None:
        """Cut, extended or reshaped, as a new tensor or in place; state along with it, in part, or not at all."""
        how = self.rng.choice(["cut", "extend", "reshape"])
        if p.ndim == 0:
            return

        def change(t):
            if how == "cut":
                return t[: max(1, t.shape[0] - 1)].clone()
            return torch.cat([t, t[:1]]) if how == "extend" else t.reshape(-1).clone()

        shape, state = p.shape, self.optimizer.state.get(p, {})
        along = self.rng.choice(["all", "all", "none", "some", "afresh"])
        if along == "all":
            state = {k: change(v) if v.shape == shape else v for k, v in state.items()}
        elif along == "some":
            state = {k: change(v) if k.startswith("exp_avg") and v.ndim else v for k, v in state.items()}
        elif along == "afresh":
            state = {}
        self.optimizer.state.pop(p, None)
        if self.rng.random() < 0.5:
            p.data, p.grad, new = change(p.data), None, p
        else:
            params, i = self.place(p)
            new = params[i] = change(p.detach()).requires_grad_()
        if state:
            self.optimizer.state[new] = state

    def swap(self, p) -> None:
        """State, or places in their groups."""
        q, state = self.any(), self.optimizer.state
        if self.rng.random() < 0.5:
            state[p], state[q] = state.get(q, {}), state.get(p, {})
        else:
            (mine, i), (others, j) = self.place(p), self.place(q)
            mine[i], others[j] = q, p

    def reorder(self, p) -> None:
        self.rng.shuffle(self.place(p)[0])
        if self.rng.random() < 0.3:
            self.optimizer.param_groups.reverse()

    def delete(self, p) -> None:
        if len(self.params) > 1:
            params, i = self.place(p)
            params.pop(i)
            if self.rng.random() < 0.5:
                self.optimizer.state.pop(p, None)

    def delete_state(self, p) -> None:
        self.optimizer.state.pop(p, None)

    def delete_group(self, p) -> None:
        if len(self.optimizer.param_groups) > 1:
            del self.optimizer.param_groups[self.rng.randrange(len(self.optimizer.param_groups))]

    def freeze_or_thaw(self, p) -> None:
        p.requires_grad_(not p.requires_grad)
        p.grad = None

    def retie(self, p) -> None:
        """By data, by state; or as a user should, which takes one of the two away."""
        alike = [q for q in self.params if q is not p and q.shape == p.shape and q.dtype == p.dtype]
        if not alike:
            return
        q, state = self.rng.choice(alike), self.optimizer.state
        how = self.rng.randrange(5)
        if how < 2:
            q.data = p.data
        elif how < 4 and p in state:
            state[q] = self.rng.choice([lambda s: s, dict, lambda s: {k: v.clone() for k, v in s.items()}])(state[p])
        elif how == 4:
            self.delete(q)

    def cast(self, p) -> None:
        """The parameter, its state, or all of its state with what must not be cast."""
        dtype = self.rng.choice(list(TOLERANCE))
        state = self.optimizer.state.get(p, {})
        how = self.rng.choice(["param", "state", "everything", "to integers"])
        if self.backend != "eager":
            return  # each combination of dtypes takes seconds to compile, and is tested elsewhere
        if how == "param":
            p.data, p.grad = p.data.to(dtype), None
        elif how == "state":
            state.update({k: v.to(dtype) for k, v in state.items() if k in KEYS})
        elif how == "everything":
            state.update({k: v.to(dtype) for k, v in state.items()})
        elif state:
            state["exp_avg"] = state["exp_avg"].to(torch.int32)

    def move(self, p) -> None:
        """Elsewhere in memory, or in other strides, or out of a larger tensor."""
        p.data = self.rng.choice(
            [
                torch.clone,
                lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
                lambda t: torch.stack([t, t], -1)[..., 0],
            ]
        )(p.data)
        for key, value in self.optimizer.state.get(p, {}).items():
            if self.rng.random() < 0.5:
                self.optimizer.state[p][key] = value.clone()

    def add_group(self, p) -> None:
        if len(self.params) < 8:
            new = self.leaf(self.rng.choice(SHAPES), p.dtype)
            self.optimizer.add_param_group({"params": [new], "lr": 0.03, "maximize": self.rng.random() < 0.5})

    def lose_a_part(self, p) -> None:
        if state := self.optimizer.state.get(p):
            del state[self.rng.choice(list(state))]

    CHANGES = (
        resize, resize, resize, swap, reorder, delete, delete_state, delete_group, freeze_or_thaw, retie, retie, cast,
        move, add_group, lose_a_part,
    )  # fmt: skip

    # --- what must hold ----------------------------------------------------------------------------------------------

    def fits(self, p) -> bool:
        state = self.optimizer.state.get(p) or None
        if state is None:
            return True
        return (
            all(key in state and state[key].shape == p.shape and state[key].is_floating_point() for key in KEYS)
            and all(key in state and state[key].ndim == 0 for key in ALONE)
            and "step" in state
            and state["step"].dtype in (torch.float32, torch.float64)
        )

    def apart(self, params) -> bool:
        """Whether no two share memory or state; a fuzz of a few tensors can afford to look at all pairs."""
        seen: dict[int, torch.Tensor] = {}
        for p in params:
            for thing in (p, *self.optimizer.state.get(p, {}).values()):
                if seen.setdefault(thing.data_ptr(), p) is not p:
                    return False
        return True

    def expected(self, p, group) -> tuple[list[float], ReferenceTensor] | None:
        """New parameters by the transcription, from what is there now; ``None`` where the step is to be left out."""
        if self.options["skip_nonfinite"] and not p.grad.isfinite().all():
            return None
        one, state = ReferenceTensor(POLICIES[self.policy], p.shape), self.optimizer.state.get(p) or None
        if state is not None:
            one.t = int(state["step"])
            one.m, one.v = (state[key].flatten().tolist() for key in KEYS[:2])
            one.h = [list(h) for h in zip(*(state[key].flatten().tolist() for key in KEYS[2:]), strict=True)]
            one.cosine_fast, one.cosine_slow, one.pace, one.age = (state[key].item() for key in ALONE)
        sign = -1.0 if group["maximize"] else 1.0
        gradient = [sign * g for g in p.grad.flatten().tolist()]
        names = ("lr", "betas", "eps", "weight_decay")
        return one.step(p.detach().flatten().tolist(), gradient, **{name: group[name] for name in names}), one

    def step(self) -> None:
        """With gradients for some of what is not frozen, perhaps one that is not finite."""
        for p in self.params:
            p.grad = torch.randn_like(p).detach() if p.requires_grad and self.rng.random() < 0.8 else None
        active = [(p, g) for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if active and self.options["skip_nonfinite"] and self.rng.random() < 0.3:
            grad = self.rng.choice(active)[0].grad
            grad[(0,) * grad.ndim] = self.rng.choice([float("nan"), float("inf")])
        misfits = [p for p, _ in active if not self.fits(p)]
        wrong = bool(misfits) or not self.apart([p for p, _ in active])
        if wrong or not self.apart(self.params):  # the latter is refused at once only where both have been stepped
            self.refused(wrong)
            return
        expected = [self.expected(p, group) for p, group in active]
        still = [p for p in self.params if p.grad is None]
        before = [[p.detach().clone(), *(v.clone() for v in self.optimizer.state.get(p, {}).values())] for p in still]
        self.optimizer.step()
        for p, old in zip(still, before, strict=True):
            assert_same_bits([p.detach(), *self.optimizer.state.get(p, {}).values()], old)
        for (p, _), outcome in zip(active, expected, strict=True):
            state = self.optimizer.state[p]
            if outcome is None:
                assert state["skipped"] >= 1
                continue
            new, one = outcome
            tolerance = max(TOLERANCE[t.dtype] for t in (p, *(state[key] for key in KEYS)))
            for actual, wanted in ((p, new), (state["exp_avg"], one.m), (state["exp_avg_sq"], one.v),
                                   (state["hidden_3"], [h[3] for h in one.h])):  # fmt: skip
                wanted = torch.tensor(wanted, dtype=torch.float64).reshape(p.shape)
                torch.testing.assert_close(actual.detach().double(), wanted, rtol=tolerance, atol=tolerance)
            assert state["step"] == one.t
            assert state["cosine_slow"].item() == pytest.approx(one.cosine_slow, abs=tolerance)
            assert state["age"].item() == pytest.approx(one.age, rel=tolerance)
        assert len(self.optimizer.diagnostics()) == len(active)

    def refused(self, wrong: bool) -> None:
        """In words, with nothing changed; and what the words say helps."""
        before, message = everything(self.optimizer), ""
        try:
            self.optimizer.step()
        except RuntimeError as error:
            message = str(error)
        assert bool(message) >= wrong
        if message:
            assert "Nothing was changed" in message
            after = everything(self.optimizer)
            assert_same_bits(after[0], before[0])
            assert after[1] == before[1]
            self.spoiled += 1
        for p in self.params:
            p.data = p.data.clone()
            if p in self.optimizer.state:
                self.optimizer.state[p] = {k: v.clone() for k, v in self.optimizer.state[p].items()}
            if not self.fits(p):
                del self.optimizer.state[p]
        self.optimizer.step()

    def save_and_load(self) -> None:
        """Into a fresh optimizer of such parameters, which then holds the same."""
        for p in self.params:
            if not self.fits(p):
                del self.optimizer.state[p]
        groups = [{"params": copies(group["params"])} for group in self.optimizer.param_groups]
        fresh = make(groups, self.policy, **self.options)
        fresh.load_state_dict(through_a_file(self.optimizer.state_dict()))
        for p, q in zip(self.params, (q for group in fresh.param_groups for q in group["params"]), strict=True):
            for key, value in self.optimizer.state.get(p, {}).items():
                torch.testing.assert_close(fresh.state[q][key], value, rtol=1e-2, atol=1e-2, check_dtype=False)
            give_gradients([q], 0)
        fresh.step()


def operate(seed: int, backend: str = "eager", changes: int = 8) -> int:
    surgery = Surgery(seed, backend)
    surgery.step()
    for _ in range(changes):
        for _ in range(surgery.rng.randint(1, 2)):
            if (p := surgery.any()) is not None:
                surgery.rng.choice(Surgery.CHANGES)(surgery, p)
        surgery.step()
    surgery.save_and_load()
    return surgery.spoiled


@pytest.mark.parametrize("part", range(4))
def test_no_change_of_state_is_silent_and_no_step_corrupt(part):
    refused = [operate(seed) for seed in range(25 * part, 25 * part + 25)]
    assert 0 < sum(refused) < 25 * 6  # some steps are refused, and most are made


def test_no_change_of_state_is_silent_and_no_compiled_step_corrupt():
    for seed in range(1000, 1020):
        operate(seed, "compiled")


@pytest.mark.slow
def test_a_thousand_sequences_of_changes_of_state():
    for seed in range(10_000, 11_000):
        operate(seed, changes=12)
        operate(seed, "compiled", changes=12)
