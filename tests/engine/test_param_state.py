"""What is kept between steps: nothing of it may outlive what it was made of."""

from __future__ import annotations

import pytest
import torch

from helpers.param_changes import CHANGES, assert_a_step_goes_by_what_is_there_now
from helpers.support import give_gradients, leaves, make


@pytest.mark.parametrize("options", [{}, {"safeguard": True}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_goes_by_what_is_there_now(change, options):
    assert_a_step_goes_by_what_is_there_now(change, **options)


def test_duplicates_of_a_parameter_are_two_updates_of_it():
    (p,) = leaves((5,))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = make([p, p])
    give_gradients([p], 0)
    before = p.detach().clone()
    optimizer.step()
    assert not torch.equal(p, before)
    assert p.isfinite().all()
