"""The safeguard: per tensor, a trust between 0 (AdamW's step) and 1 (the rule's), moved by what gradients say.

The evidence is the correlation between a tensor's gradient and its momentum so far, which the tensor head sees anyway:
the gradient of the loss after a step in the length of that step. Positive means that longer steps would have gained
more. Where steps are as long as they may be, AdamW's or the rule's, it turns negative, and trust falls, faster than it
grows. Ordinary training lives with a little of that, so trust is only lost beyond what is tolerated. What the safeguard
holds off are runs that blow up; it does not make a good start safe, where gradients are noise and object to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_optim.rule.types import Coefficients, TensorState

#: Trust gained in a step on certain evidence ...
GAIN = 0.05
#: ... lost on certain evidence to the contrary ...
LOSS = 0.1
#: ... and lost in every step without any.
DECAY = 0.01
#: A cosine above minus this is no evidence against the rule: networks train fastest where gradients turn a little.
TOLERATED = 0.2
#: Trust up to this counts as none: it wavers where gradients are noise, and AdamW's own step is at the limit there.
DOUBT = 0.25
#: The mixture's weights add up to this at most, relative to lr; AdamW's to 1.
MAX_SIZE = 8.0


def guarded(coeff: Coefficients, state: TensorState, numel: Tensor) -> tuple[Coefficients, TensorState]:
    """Move the coefficients of K tensors towards AdamW's.

    Args:
        coeff: of the tensor head, [K] each.
        state: with this step's averages of the cosine, and the trust before this step.
        numel: [K], coordinates of each tensor.

    Returns:
        Coefficients, and the state with the new trust. With trust 0 they are AdamW's: momentum alone, no amplitude, no
        caution, no orthogonalising, no decay of its own. Features are scaled by the trust, so that amplitude and gates
        fade with it.
    """
    if state.trust is None:
        return coeff, state
    # The cosine of n coordinates of noise is about 1/sqrt(n), its average over some steps half of that.
    evidence = (0.5 * (state.cosine_fast + TOLERATED) * numel.sqrt()).clamp(-1.0, 1.0)
    # A value that is not finite stops here: the step itself says what becomes of it.
    moved = state.trust + torch.where(evidence > 0.0, GAIN, LOSS) * evidence - DECAY
    trust = torch.nan_to_num(moved, nan=0.0).clamp(0.0, 1.0)
    part = (trust - DOUBT).clamp(min=0.0) / (1.0 - DOUBT)
    weights = torch.stack([coeff.momentum, coeff.gradient, *coeff.hidden])  # pyright: ignore[reportArgumentType]
    momentum, gradient, *hidden = weights * (MAX_SIZE / weights.sum(0).clamp(min=MAX_SIZE)) * part
    faded = coeff._replace(
        momentum=momentum + (1.0 - part),
        gradient=gradient,
        caution_factor=1.0 - part * (1.0 - coeff.caution_factor),
        inverse_rms_b=coeff.inverse_rms_b * part,
        inverse_rms_h=coeff.inverse_rms_h * part,
        inverse_rms_u=coeff.inverse_rms_u * part,
        inverse_rms_p=coeff.inverse_rms_p * part,
        orthogonal=coeff.orthogonal * part,
        decay=coeff.decay * part,
        hidden=hidden,
    )
    return faded, state._replace(trust=trust)
