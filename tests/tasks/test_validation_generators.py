"""What the validation families of users' work generate and compute, against references."""

from __future__ import annotations

import ast
import math
import operator

import pytest
import torch
from torch import nn

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families import validation_control, validation_structures, validation_users
from learned_optim.tasks.rollout import train


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


HILL = validation_control.Hill(0.9, 0.2, 1.0, 0.6, 0.9)
SHOP = validation_control.Inventory((3.0, 8.0, 5.0, 11.0), 0.05, 0.5, 1.0, 0.9)


def test_values_of_the_hill_are_what_the_best_actions_earn():
    table = HILL.values(121, 150)
    place, velocity = 2 * torch.rand(2, 300, generator=seeded(0)) - 1
    promised, earned, weight = (
        validation_control.interpolated(table, place, velocity),
        torch.zeros(300),
        torch.ones(300),
    )
    for _ in range(120):
        options = []
        for action in range(3):
            x, v, reward, ended = HILL.step(place, velocity, torch.full((300,), action))
            ahead = torch.where(ended, 0.0, validation_control.interpolated(table, x, v))
            options.append(reward + HILL.discount * ahead)
        best = torch.stack(options).argmax(0)
        place, velocity, reward, ended = HILL.step(place, velocity, best)
        earned, weight = earned + weight * reward, weight * HILL.discount * (~ended).float()
    assert float((earned - promised).abs().mean()) < 0.05 * float(promised.std())
    assert float(promised.std()) > 0.5


def test_values_of_the_shop_are_what_the_best_orders_earn():
    values = SHOP.action_values()
    orders, n, rng = torch.tensor(SHOP.orders), 20_000, seeded(1)
    season, stock, coming = torch.zeros(n).long(), torch.full((n,), 6), torch.ones(n).long()
    promised, earned = float(values[0, 6, 1].max()), torch.zeros(n)
    for step in range(120):
        action = values[season, stock, coming].argmax(-1)
        demand = torch.poisson(torch.tensor(SHOP.demand)[season], generator=rng)
        left, reward = SHOP.step(stock, orders[coming], orders[action], demand)
        earned += SHOP.discount**step * reward
        season, stock, coming = (season + 1) % 4, left.long(), action
    assert abs(float(earned.mean()) - promised) < 0.02 * abs(promised) + 0.1


@pytest.mark.parametrize("problem", [HILL, SHOP])
def test_true_values_solve_bellmans_equation_in_units_of_their_variance(problem):
    data = problem.sample(seeded(0), 20_000)
    assert abs(float(data.true_values.mean())) < 1e-3
    assert abs(float(data.true_values.std()) - 1) < 1e-3
    # The value of the best action at the next state is that of the nearest recorded one: coarse, but not biased.
    states, actions = data.states, int(data.actions.max()) + 1
    best = torch.full((2000,), -math.inf)
    for action in range(actions):
        own = data.actions == action
        nearest = torch.cdist(data.next_states[:2000], states[own]).argmin(1)
        best = torch.maximum(best, data.true_values[own][nearest])
    error = data.rewards[:2000] + data.discounts[:2000] * best - data.true_values[:2000]
    assert abs(float(error.mean())) < 0.05
    assert float(error.std()) < 0.6


@pytest.mark.parametrize("double", [False, True])
def test_loss_is_the_true_error_with_the_gradient_of_the_bootstrapped_loss(double):
    module = validation_control.Dueling(2, 16, 3)
    for p in module.online.parameters():
        nn.init.normal_(p, std=0.5)
    batch = (*(t[:64] for t in HILL.sample(seeded(0), 200)), torch.tensor(0.25))
    before = [p.clone() for p in module.target.parameters()]
    loss = validation_control.bootstrapped(module, batch, double)
    grads = torch.autograd.grad(loss, list(module.online.parameters()))
    for old, new, online in zip(before, module.target.parameters(), module.online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)

    states, actions, rewards, following, discounts, truth, _ = batch
    online, ahead = module.values(module.online, states), module.values(module.target, following).detach()
    chosen = online[torch.arange(64), actions]
    judge = module.values(module.online, following) if double else ahead
    wanted = rewards + discounts * ahead[torch.arange(64), judge.argmax(1)]
    torch.testing.assert_close(loss, (chosen - truth).square().mean())
    surrogate = nn.functional.smooth_l1_loss(chosen, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(surrogate, list(module.online.parameters())))
    moved = [p.clone() for p in module.target.parameters()]
    validation_control.bootstrapped(module.eval(), batch, double)
    assert all(torch.equal(old, new) for old, new in zip(moved, module.target.parameters(), strict=True))


def test_fitted_q_learns_and_its_held_out_loss_leaves_the_target_network_alone():
    task = FAMILIES["val_fitted_q"].task(1)
    curve = train(task, 0, lambda p: torch.optim.AdamW(p, lr=3e-3), task.length)
    assert sum(curve.losses[-20:]) / 20 < 0.2 * curve.losses[0]
    params, buffers = task.init(seeded(0))
    before = {key: t.clone() for key, t in buffers.items()}
    task.eval_loss({key: p + 1 for key, p in params.items()}, buffers)  # type: ignore[attr-defined]
    assert all(torch.equal(t, before[key]) for key, t in buffers.items())


class Solution(nn.Module):
    """The exact solution where there is one."""

    def __init__(self, equation: validation_users.Equation) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        x, y = points.unbind(1)
        k = math.pi * torch.arange(1, 4)[:, None]
        amplitudes = torch.tensor(self.equation.amplitudes)[:, None]
        along = (k * y).sin() if self.equation.kind == "helmholtz" else (self.equation.speed * k * y / 2).cos()
        return (amplitudes * (k * (x + 1) / 2).sin() * along).sum(0)


@pytest.mark.parametrize("kind", ["helmholtz", "wave"])
def test_the_exact_solution_has_no_loss_and_others_have(kind):
    equation = validation_users.Equation(kind, 1.7, (0.8, -0.5, 0.3), 2.0)
    points = torch.rand(200, 2, generator=seeded(0)) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    with torch.no_grad():  # as the held-out loss is asked for
        assert float(validation_users.physics_loss(Solution(equation), (points,), equation)) < 1e-8
        other = Solution(equation._replace(amplitudes=(0.8, -0.5, 0.5)))
        assert float(validation_users.physics_loss(other, (points,), equation)) > 1e-2


class Front(nn.Module):
    """``tanh(x / sqrt(2 d / k))`` stands still under the Allen-Cahn equation."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self.scale = (speed / 0.1) ** 0.5

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return (self.scale * points[:, 0]).tanh()


def test_a_front_stands_still_under_allen_cahn():
    equation = validation_users.Equation("allen_cahn", 2.0, (0.8, -0.5, 0.3), 2.0)
    points = (torch.rand(100, 2, generator=seeded(0)) - 0.5).requires_grad_()
    assert float(equation.residual(Front(2.0), points).detach().abs().max()) < 1e-4
    assert float(equation.residual(Front(3.0), points).detach().abs().max()) > 1e-2


def test_sessions_stay_in_topics_and_follow_the_popular():
    items, topics = 24_000, 20
    sessions = validation_users.browsing(seeded(0), 5000, items, topics, 8)
    assert sessions.shape == (5000, 8)
    assert int(sessions.min()) >= 0
    assert int(sessions.max()) < items
    # Undo the names: items are numbered by branch, and a topic has eight.
    rng = seeded(0)
    validation_users.uniform(rng, 2.0, 4.0)
    number = torch.randperm(items, generator=rng).argsort()[sessions]
    topic = number // (items // topics)
    assert 0.85 < float((topic[:, 1:] == topic[:, :-1]).float().mean()) < 0.97
    counts = torch.bincount(sessions.flatten(), minlength=items).sort(descending=True).values
    assert 0.25 < float(counts[: items // 20].sum() / counts.sum()) < 0.95


@pytest.mark.parametrize("bpr", [False, True])
def test_ranking_losses_agree_with_their_formulas(bpr):
    module = validation_users.SessionModel(50, 6)
    session = torch.randint(50, (5, 4), generator=seeded(0))
    negatives = torch.tensor([1, 7, int(session[2, -1]), 30])
    log_chance, log_chances = -torch.rand(5, generator=seeded(1)), -torch.rand(4, generator=seeded(2))
    loss = validation_users.sampled_ranking(module, (session, negatives, log_chance, log_chances), bpr)
    wanted, count = 0.0, 0
    vectors, (items, bias) = module(session[:, :-1]).detach(), (t.weight.detach() for t in (module.items, module.bias))
    score = lambda row, item: float(vectors[row] @ items[item] + bias[item, 0])  # noqa: E731
    for row in range(5):
        own = int(session[row, -1])
        others = [(int(item), j) for j, item in enumerate(negatives) if int(item) != own]
        if bpr:
            wanted += sum(math.log1p(math.exp(score(row, i) - score(row, own))) for i, _ in others)
            count += len(negatives)
        else:
            good = math.exp(score(row, own) - float(log_chance[row]))
            bad = sum(math.exp(score(row, i) - float(log_chances[j])) for i, j in others)
            wanted += -math.log(good / (good + bad))
            count += 1
    assert float(loss.detach()) == pytest.approx(wanted / count, rel=1e-4)


@pytest.mark.parametrize("mechanism", sorted(validation_users.MECHANISMS))
@pytest.mark.parametrize("seed", range(3))
def test_series_are_finite_alive_and_stay_in_bounds(mechanism, seed):
    values = validation_users.MECHANISMS[mechanism](seeded(seed), 1500, 6)
    assert values.shape == (1500, 6)
    assert bool(values.isfinite().all())
    late, early = values[-500:], values[500:1000]
    assert float(late.std(0).min()) > 1e-2
    assert float(late.std() / early.std()) < 5  # queues do not grow without end


def test_quantiles_have_the_lowest_loss():
    future = torch.randn(1, 1, 20_000, generator=seeded(0)).transpose(0, 2)  # [20000, 1, 1]
    quantiles = torch.tensor([-1.2816, 0.0, 1.2816])

    def loss(shift: torch.Tensor) -> float:
        return float(
            validation_users.quantile_loss(
                lambda past: (quantiles + shift).expand(len(past), 1, 1, 3), (future, future)
            )
        )

    right = loss(torch.zeros(3))
    assert all(loss(sign * 0.3 * torch.eye(3)[i]) > right for i in range(3) for sign in (-1, 1))


def test_forecasts_see_the_past_in_units_that_move_with_it():
    model = validation_users.GatedConvolutions(3, 4, 16, 3, 5)
    past = torch.randn(2, 3, 48, generator=seeded(0))
    torch.testing.assert_close(model(past + 7.0), model(past) + 7.0, atol=1e-4, rtol=1e-4)
    assert model(past).shape == (2, 3, 5, 3)


FUNCTIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "%": operator.mod}


def evaluated(tokens: list[str], values: dict[str, complex]) -> complex:
    """What a machine with a stack makes of postfix notation."""
    stack: list[complex] = []
    for token in tokens:
        if token in values:
            stack.append(values[token])
        elif token == "neg":
            stack.append(-stack.pop())
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(left**right if token == "**" else FUNCTIONS[token](left, right))
    (result,) = stack
    return result


def test_postfix_notation_has_the_value_that_python_gives():
    signs = {i: token for token, i in validation_structures.VOCABULARY.items()}
    values = {name: 1.1 + 0.2 * i for i, name in enumerate(validation_structures.NAMES)}
    compared = 0
    for source, target in validation_structures.generated_pairs(seeded(0), 400):
        try:
            wanted = eval(" ".join(signs[i] for i in source), {}, values)
            got = evaluated([signs[i] for i in target], values)  # type: ignore[arg-type]
        except (TypeError, OverflowError, ZeroDivisionError):  # complex numbers have no remainder
            continue
        assert got == pytest.approx(wanted, nan_ok=True)
        compared += 1
    assert compared > 200


@pytest.mark.parametrize(
    ("expression", "target"),
    [
        ("a.b(c[0], -d) == 0", "v0 v1 . v2 # [] v3 neg call2 # =="),
        ("a and b or not a", "v0 v1 and v0 not or"),
        ("a is not b in c", None),  # chained
        ("f(x, key=y) + z * w", None),
        ("a + b", None),  # too short
    ],
)
def test_expressions_are_translated_or_refused(expression, target):
    pair = validation_structures.pair(ast.parse(expression, mode="eval").body)
    signs = {i: token for token, i in validation_structures.VOCABULARY.items()}
    assert (pair and " ".join(signs[i] for i in pair[1])) == target


def test_library_has_thousands_of_expressions_and_names_are_dealt_anew():
    pairs = validation_structures.library_pairs()
    assert len(pairs) > 1500
    assert len(set(pairs)) == len(pairs)
    data = tuple(validation_structures.padded([pair[side] for pair in pairs[:50]]) for side in (0, 1))
    renamed = validation_structures.renamed(data, seeded(0))
    for before, after in zip(data, renamed, strict=True):
        assert torch.equal(before == 0, after == 0)
    for row in range(50):  # one name, one new name, on both sides
        mapping = dict(zip(data[0][row].tolist(), renamed[0][row].tolist(), strict=True))
        assert len(set(mapping.values())) == len(mapping)
        assert [mapping.get(t, t) for t in data[1][row].tolist()] == renamed[1][row].tolist()


def test_translator_sees_neither_the_future_nor_padding():
    model = validation_structures.Translator(20, 16, 2)
    source = torch.randint(3, 20, (2, 10), generator=seeded(0))
    target = torch.randint(3, 20, (2, 8), generator=seeded(1))
    changed = target.clone()
    changed[:, 5:] = 3 + (changed[:, 5:] - 2) % 17
    before, after = model(source, target), model(source, changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_molecules_are_connected_and_keep_their_valences():
    kinds, bonds = validation_structures.molecules(seeded(0), 500, 14)
    present = kinds != 4
    assert torch.equal(bonds, bonds.transpose(1, 2))
    valence = torch.cat([validation_structures.VALENCE, torch.zeros(1).long()])[kinds]
    assert bool((bonds.sum(2) <= valence).all())
    reached = torch.linalg.matrix_power((bonds > 0).float() + torch.eye(14), 14)[:, 0] > 0
    assert torch.equal(reached, present)
    size = present.sum(1)
    rings = (bonds > 0).sum((1, 2)) // 2 - size + 1
    assert set(rings.tolist()) == {0, 1, 2}
    assert len({row.numpy().tobytes() for row in torch.cat([kinds, bonds.flatten(1)], 1)}) == len(kinds)


@pytest.mark.parametrize(
    ("bonds", "energy", "gap"),
    [
        ({(0, 1): 1}, -1.0, 2.0),
        ({(0, 1): 1, (1, 2): 1, (2, 3): 1}, -4.4721 / 4, 1.2361),  # butadiene
        ({(i, (i + 1) % 6): 1 for i in range(6)}, -8 / 6, 2.0),  # benzene
    ],
)
def test_hueckels_model_gives_the_textbook_values(bonds, energy, gap):
    atoms = 1 + max(j for pair in bonds for j in pair)
    kinds, matrix = torch.full((1, 8), 4), torch.zeros(1, 8, 8)
    kinds[:, :atoms] = 0
    for (i, j), order in bonds.items():
        matrix[0, i, j] = matrix[0, j, i] = order
    assert float(validation_structures.properties(kinds, matrix, "energy")) == pytest.approx(energy, abs=1e-3)
    assert float(validation_structures.properties(kinds, matrix, "gap")) == pytest.approx(gap, abs=1e-3)
    charges = validation_structures.properties(kinds, matrix, "charges")
    torch.testing.assert_close(charges, torch.zeros(1, 8), atol=1e-3, rtol=0)  # alternant: no atom is charged


@pytest.mark.parametrize("per_atom", [False, True])
def test_graph_network_does_not_mind_the_order_of_atoms(per_atom):
    network = validation_structures.BondNetwork(16, 3, per_atom)
    kinds, bonds = validation_structures.molecules(seeded(0), 20, 12)
    order = torch.randperm(12, generator=seeded(1))
    before, after = network(kinds, bonds), network(kinds[:, order], bonds[:, order][:, :, order])
    torch.testing.assert_close(before[:, order] if per_atom else before, after, atol=1e-5, rtol=1e-4)
