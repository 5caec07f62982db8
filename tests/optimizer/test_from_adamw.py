"""``from_adamw``: moments, steps, rates and names go over; what AdamW does not know starts at zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from helpers.optimizer_checks import through_a_file
from helpers.reference import ReferenceTensor
from helpers.rule_checks import ADAMW
from helpers.support import POLICIES, assert_same_bits, copies, give_gradients, leaves, run, train
from learned_optim import LearnedOptimizer

SHAPES = ((4, 3), (5,), ())
#: Ways in which AdamW is run, and what it may be given.
VARIANTS = [
    {}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}, {"maximize": True},
    {"betas": (0.8, 0.99), "eps": 1e-6}, {"weight_decay": 0.0}, {"lr": torch.tensor(0.01)},
]  # fmt: skip


def under_way(kind=AdamW, steps=7, dtype=torch.float32, **options):
    params = leaves(*SHAPES, dtype=dtype)
    adamw = kind([{"params": [("w", params[0]), ("b", params[1])]}, {"params": [("s", params[2])], "lr": 0.005}],
                 **{"lr": 0.01, **options})  # fmt: skip
    for t in range(steps):
        give_gradients(params, t)
        adamw.step()
    return params, adamw


def from_adamw(adamw, policy="random", **options):
    policy = POLICIES.get(policy, policy)
    return LearnedOptimizer.from_adamw(adamw, **{"policy": policy, "backend": "eager", **options})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("policy", ["random", "orthogonal"])
def test_the_first_step_is_the_one_of_a_transcription_that_starts_with_adamws_moments(variant, policy):
    params, adamw = under_way(**variant)
    optimizer = from_adamw(adamw, policy)
    give_gradients(params, 7)
    config = POLICIES[policy].config
    expected = []
    for p, lr in zip(params, (0.01, 0.01, 0.005), strict=True):
        one, theirs = ReferenceTensor(POLICIES[policy], p.shape), adamw.state[p]
        one.t, one.age = 7, 7.0
        of_m, of_v = ((1 - b**7) / (1 - a**7) for a, b in zip(adamw.defaults["betas"], config.betas, strict=True))
        one.m = [x * of_m for x in theirs["exp_avg"].flatten().tolist()]
        one.v = [x * of_v for x in theirs["exp_avg_sq"].flatten().tolist()]
        sign = -1.0 if variant.get("maximize") else 1.0
        g = [sign * x for x in p.grad.flatten().tolist()]
        hyper = {"lr": lr, "betas": config.betas, "eps": config.eps, "weight_decay": variant.get("weight_decay", 0.01)}
        expected.append(one.step(p.detach().flatten().tolist(), g, **hyper))
    optimizer.step()
    for p, values in zip(params, expected, strict=True):
        wanted = torch.tensor(values, dtype=torch.float64).reshape(p.shape)
        torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == 8


def test_with_adams_mixture_it_goes_on_exactly_as_adamw_would():
    params, adamw = under_way()
    others = copies(params)
    optimizer = from_adamw(adamw, ADAMW)
    theirs = AdamW([{"params": others[:2]}, {"params": others[2:]}])
    theirs.load_state_dict(adamw.state_dict())
    run(optimizer, params, 5, start=7)
    run(theirs, others, 5, start=7)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("safeguard", [False, True])
def test_the_loss_does_not_jump_in_the_middle_of_training(safeguard):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.randn(256, 8)
    y = x[:, :1] * x[:, 1:2] + 0.3 * torch.randn(256, 1)

    def loss():
        some = torch.randint(256, (32,))
        return torch.nn.functional.mse_loss(model(x[some]), y[some])

    adamw = AdamW(model.named_parameters(), lr=1e-3)
    train(model, loss, adamw, 300)
    before = torch.nn.functional.mse_loss(model(x), y).item()
    optimizer = LearnedOptimizer.from_adamw(adamw, safeguard=safeguard)
    seen = []
    for _ in range(20):
        train(model, loss, optimizer, 1)
        seen.append(torch.nn.functional.mse_loss(model(x), y).item())
    assert max(seen) < 1.05 * before
    assert optimizer.diagnostics().keys() == dict(model.named_parameters()).keys()


def test_groups_go_over_with_what_they_hold_and_betas_and_eps_are_the_policys():
    params, adamw = under_way(betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2, maximize=True)
    adamw.param_groups[1]["kind"] = "own"
    torch.optim.lr_scheduler.StepLR(adamw, 10)
    optimizer = from_adamw(adamw)
    config = POLICIES["random"].config
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], first["initial_lr"], second["kind"]) == (0.01, 0.005, 0.01, "own")
    assert (first["weight_decay"], first["maximize"], first["param_names"]) == (0.2, True, ["w", "b"])
    assert (first["betas"], first["eps"]) == (config.betas, config.eps)
    assert all(a is b for a, b in zip([*first["params"], *second["params"]], params, strict=True))
    assert not {"amsgrad", "foreach", "fused"} & first.keys()
    torch.optim.lr_scheduler.StepLR(optimizer, 10, last_epoch=7)
    optimizer.add_param_group({"params": [("new", *leaves((2,)))]})
    assert optimizer.param_groups[2]["lr"] == 0.01


def test_what_is_given_holds_for_all_groups():
    _, adamw = under_way()
    torch.optim.lr_scheduler.StepLR(adamw, 10)
    optimizer = from_adamw(adamw, lr=0.003, weight_decay=0.5, betas=(0.7, 0.8), eps=0.1, state_dtype=torch.bfloat16)
    for group in optimizer.param_groups:
        assert [group[k] for k in ("lr", "weight_decay", "betas", "eps")] == [0.003, 0.5, (0.7, 0.8), 0.1]
        assert group["initial_lr"] == 0.003
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)


SCHEDULES = {
    "lambda": lambda opt, last: torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 / (1 + step), last),
    "steps": lambda opt, last: torch.optim.lr_scheduler.StepLR(opt, 5, 0.5, last),
    "one cycle": lambda opt, last: torch.optim.lr_scheduler.OneCycleLR(
        opt, 0.1, 40, cycle_momentum=False, last_epoch=last
    ),
}


def goes_on(schedule, **options):
    """Learning rates of five steps, of AdamW and of the optimizer that goes on from it after nine."""
    _, adamw = under_way()
    theirs = SCHEDULES[schedule](adamw, -1)
    for _ in range(9):
        adamw.step()
        theirs.step()
    optimizer = from_adamw(adamw, **options)
    ours = SCHEDULES[schedule](optimizer, theirs.last_epoch - 1)
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(5):
        for some, opt, plan in zip(rates, (adamw, optimizer), (theirs, ours), strict=True):
            some.append(float(opt.param_groups[0]["lr"]))
            opt.step()
            plan.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_goes_on_as_the_document_says(schedule):
    theirs, ours = goes_on(schedule)
    assert ours == pytest.approx(theirs)


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(
    ("schedule", "factors"), [("lambda", [1 / t for t in range(10, 15)]), ("steps", [1, *[0.5] * 4])]
)
def test_a_schedule_goes_on_from_a_rate_that_is_given(schedule, factors, kind):
    _, ours = goes_on(schedule, lr=kind(0.003))
    assert ours == pytest.approx([0.003 * factor for factor in factors])


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_bias_corrected_moments_are_the_same_and_all_else_is_zero(betas):
    params, adamw = under_way(betas=betas, steps=3)
    optimizer = from_adamw(adamw)
    for p in params:
        ours, theirs = optimizer.state[p], adamw.state[p]
        for key, beta, other in zip(("exp_avg", "exp_avg_sq"), POLICIES["random"].config.betas, betas, strict=True):
            torch.testing.assert_close(ours[key] / (1 - beta**3), theirs[key] / (1 - other**3))
        assert all(
            not value.any() for key, value in ours.items() if key not in ("step", "age", "exp_avg", "exp_avg_sq")
        )
        assert ours["age"] == ours["step"] == 3


def test_adamw_is_left_as_it_is():
    params, adamw = under_way(lr=torch.tensor(0.01))
    before = copy.deepcopy(adamw.state_dict())
    optimizer = from_adamw(adamw)
    run(optimizer, params, 3)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    after = adamw.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, values in before["state"].items():
        assert_same_bits(list(after["state"][key].values()), list(values.values()))


def test_parameters_without_state_start_afresh():
    params = leaves(*SHAPES)
    adamw = AdamW(params)
    give_gradients(params[:1], 0)
    adamw.step()
    adamw.state[params[1]] = {}
    optimizer = from_adamw(adamw)
    assert list(optimizer.state) == params[:1]
    run(optimizer, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 1, 1]
    assert len(from_adamw(AdamW(leaves((3,)))).state) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes_and_a_step_that_is_no_tensor(dtype):
    params, adamw = under_way(dtype=dtype)
    for p in params:
        adamw.state[p]["step"] = 7
    optimizer = from_adamw(adamw)
    run(optimizer, params, 2)
    assert all(p.isfinite().all() for p in params)
    assert optimizer.state[params[0]]["step"] == 9
    assert optimizer.state[params[0]]["exp_avg"].dtype != torch.bfloat16
    other = LearnedOptimizer(
        [{"params": copies(params[:2])}, {"params": copies(params[2:])}], policy=POLICIES["random"]
    )
    other.load_state_dict(through_a_file(optimizer.state_dict()))


def test_an_adam_without_weight_decay_is_taken_and_one_with_it_is_explained():
    params, adam = under_way(Adam)
    assert from_adamw(adam).state[params[0]]["step"] == 7
    _, adam = under_way(Adam, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"adds weight decay to the gradient.*AdamW or an Adam with weight_decay=0"):
        from_adamw(adam)


@pytest.mark.parametrize("kind", [SGD, NAdam, None])
def test_other_optimizers_are_refused(kind):
    other = kind(leaves((3,)), lr=0.1) if kind else "adamw"
    with pytest.raises(TypeError, match=f"found {type(other).__name__}"):
        LearnedOptimizer.from_adamw(other)
    assert kind is None or isinstance(other, Optimizer)


def test_state_that_does_not_fit_is_refused():
    params, adamw = under_way()
    adamw.state[params[1]]["exp_avg"] = torch.zeros(1)  # which would be broadcast
    with pytest.raises(RuntimeError, match=r"'b'.*exp_avg has shape \(1,\).*\(5,\)"):
        from_adamw(adamw)


def test_the_way_that_the_error_for_a_checkpoint_names_works():
    params, adamw = under_way()
    saved = through_a_file(adamw.state_dict())
    again = AdamW([{"params": params[:2]}, {"params": params[2:]}])
    optimizer = LearnedOptimizer([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match=r"load it into a torch\.optim\.AdamW.*LearnedOptimizer\.from_adamw\(adamw\)"):
        optimizer.load_state_dict(saved)
    again.load_state_dict(saved)
    assert from_adamw(again).state[params[0]]["step"] == 7
    assert math.isclose(from_adamw(again).param_groups[1]["lr"], 0.005)
