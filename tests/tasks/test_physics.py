"""Differential equations: derivatives, operators on solutions known in closed form, boundary points."""

from __future__ import annotations

from inspect import getclosurevars

import pytest
import torch
from torch.func import jacrev, vmap

from learned_optim.tasks import FAMILIES
from learned_optim.tasks.families.physics import EQUATIONS, Field, Jet, Waves, edge_points


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jet(function, x: torch.Tensor) -> Jet:
    """By automatic differentiation, of a function of one point [dims] to a scalar."""
    first, second = vmap(jacrev(function))(x), vmap(jacrev(jacrev(function)))(x)
    return Jet(vmap(function)(x)[:, None], first.T[..., None], torch.diagonal(second, dim1=1, dim2=2).T[..., None])


@pytest.mark.parametrize("omega", [0.0, 2.0])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_field_gives_the_derivatives_that_autograd_does(omega, dims):
    torch.manual_seed(0)
    field = Field([dims, 8, 8, 1], omega, 1.5).double()
    x = torch.randn(5, dims, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(field(x), jet(lambda point: field(point[None]).value.squeeze(), x))


def test_waves_give_the_derivatives_that_autograd_does():
    draw = lambda *shape: torch.randn(*shape, generator=seeded(2), dtype=torch.float64)  # noqa: E731
    waves, x = Waves(draw(2, 4), draw(4), draw(4, 1)), draw(5, 2)
    torch.testing.assert_close(waves(x), jet(lambda point: waves(point[None]).value.squeeze(), x))


C = (0.7, 1.3, 2.0)
SOLUTIONS = {  # of the equations without a force
    "helmholtz": lambda x: (x[0] * (4 * C[0]) ** 0.5).sin(),
    "reaction": lambda x: (x[0] * (C[1] / (0.2 * C[0])) ** 0.5).tanh(),
    "heat": lambda x: (-0.3 * C[0] * 4 * x[0]).exp() * (2 * x[1]).sin(),
    "wave": lambda x: (3 * (x[1] - C[0] ** 0.5 * x[0])).sin(),
    "burgers": lambda x: 0.4 - 0.6 * (0.6 * (x[1] - 0.4 * x[0]) / (0.1 * C[0])).tanh(),
    "advection": lambda x: (-0.02 * 9 * x[0]).exp() * (3 * (x[1] - C[0] * x[0])).sin(),
    "poisson": lambda x: x[0] ** 2 - x[1] ** 2,
}


@pytest.mark.parametrize("name", sorted(SOLUTIONS))
def test_operators_vanish_on_solutions_known_in_closed_form(name):
    dims = 2 if name == "poisson" else max(1, EQUATIONS[name].dims[0])
    x = 2 * torch.rand(7, dims, generator=seeded(), dtype=torch.float64) - 1
    residual = EQUATIONS[name].operator(jet(SOLUTIONS[name], x), C)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-9)


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_edge_points_lie_on_the_boundary_and_not_at_the_end_of_time(dims, time):
    x = edge_points(seeded(), 400, dims, time)
    assert bool((x.abs() <= 1).all())
    on_side = x.abs() == 1
    assert bool(on_side.any(1).all())
    if time:
        assert not bool((x[:, 0] == 1).any())
        assert float((x[:, 0] == -1).float().mean()) == (1.0 if dims == 1 else 0.5)
    else:
        assert bool((x == 1).any(0).all())
        assert bool((x == -1).any(0).all())


def test_the_loss_of_the_true_solution_is_zero():
    for number in range(20):
        task = FAMILIES["physics_informed"].task(number)
        draw = getclosurevars(task._make_batches).nonlocals["draw"]  # type: ignore[attr-defined]
        solution = getclosurevars(draw).nonlocals["solution"]
        batch = next(task.batches(seeded()))
        assert float(task._loss_fn(solution, batch)) < 1e-6  # type: ignore[attr-defined]
        assert float(task._loss_fn(solution, task._eval_source())) < 1e-10  # type: ignore[attr-defined]
