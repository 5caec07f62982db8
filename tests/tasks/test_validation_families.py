"""Validation families of users' work: held-out data apart, nothing of training's, generators against references."""

from __future__ import annotations

import ast
import math
import operator
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import learned_optim.tasks.families as families
from learned_optim.tasks import FAMILIES
from learned_optim.tasks.base import batch_tensors
from learned_optim.tasks.data_text import CHARACTERS
from learned_optim.tasks.families import (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
from learned_optim.tasks.pretrained import pretrained_state
from learned_optim.tasks.rollout import train

MODULES = (
    validation_changing,
    validation_control,
    validation_fine_tuning,
    validation_structures,
    validation_users,
)
NAMES = [family.name for module in MODULES for family in module.FAMILIES]
SHARED = {"base", "sampling", "nets", "objectives", "pretrained", "data_images", "data_optional", "data_text"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def modules_imported(path: Path) -> set[str]:
    """Modules of ours that a file of ``families`` imports, by the last part of their names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            ours = node.level or (node.module or "").startswith("learned_optim")
            last = (node.module or "").rpartition(".")[2]
            found |= ({a.name for a in node.names} if last in ("", "families", "tasks") else {last}) if ours else set()
        elif isinstance(node, ast.Import):
            found |= {a.name.rpartition(".")[2] for a in node.names if a.name.startswith("learned_optim")}
    return found


def rows(tensor: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tensor}


# ------------------------------------------------------------------------------------------ apart from training


def test_there_are_nine_and_all_are_for_validation():
    assert len(set(NAMES)) == 9
    assert all(FAMILIES[name].split == "validation" and name.startswith("val_") for name in NAMES)


def test_validation_imports_no_other_family_and_no_other_family_imports_it():
    here = {path.stem: modules_imported(path) for path in Path(families.__file__).parent.glob("*.py")}
    ours = {module.__name__.rpartition(".")[2] for module in MODULES}
    assert ours <= here.keys()
    assert {name: here[name] - SHARED for name in ours if here[name] - SHARED} == {}
    assert {name: here[name] & ours for name in here.keys() - ours if here[name] & ours} == {}


def test_the_check_of_imports_sees_them(tmp_path):
    path = tmp_path / "planted.py"
    path.write_text("from .vision import f\nfrom . import graphs\nimport learned_optim.tasks.families.noise\n")
    assert modules_imported(path) == {"vision", "graphs", "noise"}


# ------------------------------------------------------------------------------------------ held-out data apart


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("val_fine_tuning_text", "val_seq2seq")])
def test_held_out_examples_are_not_trained_on(name, seed):
    def inputs(batch) -> set[bytes]:
        tensors = batch[:2] if name == "val_graph" else batch[:1]
        return rows(torch.cat([t.flatten(1).float() for t in tensors], 1))

    task = FAMILIES[name].task(seed)
    unseen = inputs(task._eval_source())  # type: ignore[attr-defined]
    assert len(unseen) > 100
    assert not any(inputs(batch) & unseen for batch in islice(task.batches(seeded(0)), 60))


def letters_of(token_rows: torch.Tensor) -> set[str]:
    return {"".join(CHARACTERS[i] for i in row) for row in token_rows.tolist()}


def test_held_out_code_is_not_in_the_training_code_nor_in_what_was_read_before():
    task = FAMILIES["val_fine_tuning_text"].task(0)
    seen = "\n".join(letters_of(torch.cat([tokens for (tokens,) in islice(task.batches(seeded(0)), 400)])))
    unseen = letters_of(task._eval_source()[0])  # type: ignore[attr-defined]
    before = validation_fine_tuning.characters("validation", held_out=False)
    documentation = "".join(CHARACTERS[i] for i in before.tolist())
    assert sum(window in seen or window in documentation for window in unseen) <= len(unseen) / 50


def test_held_out_expressions_differ_from_those_trained_on_by_more_than_names():
    def renumbered(row: list[int]) -> tuple[int, ...]:
        names = [validation_structures.VOCABULARY[name] for name in validation_structures.NAMES]
        order = {token: i for i, token in enumerate(t for t in dict.fromkeys(row) if t in names)}
        return tuple(names[order[t]] if t in order else t for t in row if t != 0)

    for seed in range(3):
        task = FAMILIES["val_seq2seq"].task(seed)
        unseen = {renumbered(row) for row in task._eval_source()[0].tolist()}  # type: ignore[attr-defined]
        batches = islice(task.batches(seeded(0)), 200)
        assert not any(renumbered(row) in unseen for source, _ in batches for row in source.tolist())


# ------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("name", ["val_fine_tuning_images", "val_fine_tuning_text"])
def test_runs_begin_with_what_was_learned_before_except_the_head(name):
    task = FAMILIES[name].task(0)
    first, second = task.init(seeded(0))[0], task.init(seeded(1))[0]
    unlike = {key for key in first if not torch.equal(first[key], second[key])}
    assert unlike == ({"head.weight", "head.bias"} if name.endswith("images") else set())


def test_pre_training_taught_something():
    state = pretrained_state(validation_fine_tuning.image_recipe(32, 16, 5))
    network = validation_fine_tuning.DenselyConnected(32, 16, 5, 52)
    network.load_state_dict(state)
    images, labels = next(validation_fine_tuning.image_recipe(32, 16, 5).make_task().batches(seeded(5)))
    with torch.no_grad():
        assert float((network(images).argmax(1) == labels).float().mean()) > 0.7
    task = FAMILIES["val_fine_tuning_text"].task(0)
    params, buffers = task.init(seeded(0))
    assert float(task.loss(params, buffers, next(task.batches(seeded(0))))) < 0.75 * math.log(len(CHARACTERS))


def test_held_out_loss_of_fine_tuning_is_lowest_before_the_end():
    task = FAMILIES["val_fine_tuning_text"].task(0)
    length = task.length
    curve = train(
        task, 0, lambda p: torch.optim.AdamW(p, lr=3e-3), length, evaluate_at=[length // 10, length // 4, length]
    )
    assert min(curve.held_out_along[:2]) < 0.95 * curve.held_out_along[2]


def test_language_model_does_not_see_the_future():
    model = validation_fine_tuning.RotaryLM(97, 32, 2, 4)
    tokens = torch.randint(97, (2, 12), generator=seeded(0))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_rotated_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 8, generator=seeded(0))
    angle = torch.arange(20)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    queries, keys = (validation_fine_tuning.rotate(t.expand(20, 8), angle.cos(), angle.sin()) for t in (q, k))
    scores = queries @ keys.T
    torch.testing.assert_close(scores[3, 0], scores[17, 14])
    assert abs(float(scores[3, 0] - scores[4, 0])) > 1e-3


# ------------------------------------------------------------------------------------------ switches


@pytest.mark.parametrize("seed", range(4))
def test_targets_switch_three_to_five_times(seed, monkeypatch):
    phases = []

    def marked(data, batch_size, rng):
        while True:
            yield next(iter([data]))

    monkeypatch.setattr(validation_changing, "dataset_batches", marked)
    task = FAMILIES["val_switching"].task(seed)
    batches = task.batches(seeded(0))
    phases = [id(next(batches)) for _ in range(task.length)]
    switches = [i for i, (a, b) in enumerate(pairwise(phases)) if a != b]
    assert 3 <= len(switches) <= 5
    assert len(set(phases)) == len(switches) + 1
    lengths = [b - a for a, b in pairwise([0, *switches, task.length])]
    assert min(lengths) > task.length / 20


def test_a_switch_of_letters_keeps_the_images_and_moves_some_names():
    phases, (images, labels) = validation_changing.relabelled_letters(seeded(0), 5, 10, 0.5)
    assert len(phases) == 5
    assert all(phase[0] is phases[0][0] for phase in phases)
    for (_, before), (_, after) in pairwise(phases):
        assert 0.2 < float((before != after).float().mean()) < 0.75
    assert len(images) == len(labels) == 400


def test_oscillators_agree_with_finer_steps():
    from scipy.integrate import solve_ivp

    # The same draws by hand: an undriven, undamped, uncoupled phase would keep its energy, this one has everything.
    rng = seeded(3)
    ((start, end),), _ = validation_changing.changing_oscillators(seeded(3), 1, 0.0)
    stiff, cubic = 0.5 + 2.5 * torch.rand(2, generator=rng), 2 * torch.rand(2, generator=rng)
    damping, coupling = 0.4 * torch.rand(2, generator=rng), validation_changing.uniform(rng, -1.5, 1.5)
    drive, pace = validation_changing.uniform(rng, 0.5, 2.5), validation_changing.uniform(rng, 1.0, 2.0)
    k, c, d = (t.double().numpy() for t in (stiff, cubic, damping))
    for row in range(5):
        phase = math.atan2(float(start[row, 4]), float(start[row, 5]))

        def flow(t, y, phase=phase):
            x, v = y[:2], y[2:]
            return [*v, *(coupling * (x[::-1] - x) + drive * math.sin(phase + pace * t) - k * x - c * x**3 - d * v)]

        wanted = solve_ivp(flow, (0, 1.5), start[row, :4].double().numpy(), rtol=1e-8, atol=1e-8).y[:, -1]
        torch.testing.assert_close(end[row].double(), torch.as_tensor(wanted), atol=2e-3, rtol=2e-3)


# ------------------------------------------------------------------------------------------ fitted Q

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


def test_fitted_q_learns_and_its_held_out_loss_leaves_the_target_network_alone():
    task = FAMILIES["val_fitted_q"].task(1)
    curve = train(task, 0, lambda p: torch.optim.AdamW(p, lr=3e-3), task.length)
    assert sum(curve.losses[-20:]) / 20 < 0.2 * curve.losses[0]
    params, buffers = task.init(seeded(0))
    before = {key: t.clone() for key, t in buffers.items()}
    task.eval_loss({key: p + 1 for key, p in params.items()}, buffers)  # type: ignore[attr-defined]
    assert all(torch.equal(t, before[key]) for key, t in buffers.items())


# ------------------------------------------------------------------------------------------ differential equations


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


# ------------------------------------------------------------------------------------------ sessions


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


# ------------------------------------------------------------------------------------------ series


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


# ------------------------------------------------------------------------------------------ expressions

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


# ------------------------------------------------------------------------------------------ molecules


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


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_a_task_have_one_shape(name):
    batches = FAMILIES[name].task(2).batches(seeded(0))
    shapes = {tuple(t.shape for t in batch_tensors(next(batches))) for _ in range(6)}
    assert len(shapes) == 1
