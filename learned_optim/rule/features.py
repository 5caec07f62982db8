"""What the cell sees: features of a coordinate.

Features are even under (g, p) -> (-g, -p) and free of the gradient's scale; the update, a mixture of directions times
functions of the features, is therefore odd and scale-free as a whole. To add one, add an entry to :data:`FEATURES`:
every policy names its own in its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from learned_optim.rule.ops import clamp_magnitude


class RelativeValues(NamedTuple):
    """A coordinate's values over their rms in its tensor, clamped, [n] each."""

    b: Tensor  #: Adam's direction
    h: Tensor  #: first hidden unit before this step
    u: Tensor  #: normalised gradient
    p: Tensor  #: parameter
    odd_hidden: bool  #: whether hidden units change their sign with the gradient, as b and u do

    @classmethod
    def of(cls, b: Tensor, h: Tensor, u: Tensor, p: Tensor, bound: float, odd_hidden: bool) -> RelativeValues:
        b, h, u, p = (clamp_magnitude(n, bound) for n in (b, h, u, p))
        return cls(b, h, u, p, odd_hidden)

    def times_h(self, x: Tensor) -> Tensor:
        """The product of b or u with h, even in any case."""
        return (x if self.odd_hidden else x.abs()) * self.h


FEATURES: dict[str, Callable[[RelativeValues], Tensor]] = {
    "abs_b": lambda n: n.b.abs(),
    "abs_h": lambda n: n.h.abs(),
    "abs_u": lambda n: n.u.abs(),
    "b_h": lambda n: n.times_h(n.b),
    "u_b": lambda n: n.u * n.b,
    "u_h": lambda n: n.times_h(n.u),
    "p_b": lambda n: n.p * n.b,
}

#: What the cell of a new policy sees if its configuration does not say.
DEFAULT_FEATURES = ("abs_b", "abs_h", "abs_u", "b_h", "u_b", "u_h", "p_b")


def coordinate_features(names: Sequence[str], values: RelativeValues) -> list[Tensor]:
    """The cell's inputs, [n] each, in the order of ``names``."""
    return [FEATURES[name](values) for name in names]
