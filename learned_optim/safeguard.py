"""The safeguard: per tensor, a trust between 0 (AdamW's step) and 1 (the rule's), moved by what gradients say.

The evidence is the sign of the correlation between a tensor's gradient and its momentum so far, which the tensor head
sees anyway: the gradient of the loss after a step in the length of that step. Positive means that longer steps would
have gained more. Where steps are as long as they may be, AdamW's or the rule's, it turns negative: trust then falls,
faster than it grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_optim.cells import FIRST_HIDDEN
from learned_optim.policy import PolicyConfig

#: Trust gained in a step on certain evidence ...
GAIN = 0.05
#: ... lost on certain evidence to the contrary ...
LOSS = 0.1
#: ... and lost in every step without any.
DECAY = 0.01
#: Trust up to this counts as none: it wavers where gradients are noise, and AdamW's own step is at the limit there.
DOUBT = 0.25
#: The mixture's weights add up to this at most, relative to lr; AdamW's to 1.
MAX_SIZE = 8.0


def guarded(
    config: PolicyConfig, values: Tensor, numel: Tensor, cosine_fast: Tensor, trust: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the coefficients of K tensors towards AdamW's.

    Args:
        config: the policy's.
        values: [C, K], see :func:`learned_optim.update_rule.coefficients`.
        numel: [K], coordinates of each tensor.
        cosine_fast: [K], this step's included.
        trust: [K], before this step.

    Returns:
        Coefficients [C, K] and the new trust [K]. With trust 0 they are AdamW's: momentum alone, no amplitude, no
        agreement gate, no orthogonalising. Features are scaled by the trust, so that amplitude and gates fade with it.
    """
    # The cosine of n coordinates of noise is about 1/sqrt(n), its average over some steps half of that.
    evidence = (0.5 * cosine_fast * numel.sqrt()).clamp(-1.0, 1.0)
    # A value that is not finite stops here: the step itself says what becomes of it.
    moved = trust + torch.where(evidence > 0.0, GAIN, LOSS) * evidence - DECAY
    trust = torch.nan_to_num(moved, nan=0.0).clamp(0.0, 1.0)
    part = (trust - DOUBT).clamp(min=0.0) / (1.0 - DOUBT)
    last = FIRST_HIDDEN + len(config.hidden_weights)
    weights = torch.cat((values[:2], values[FIRST_HIDDEN:last]))
    weights = weights * (MAX_SIZE / weights.sum(0).clamp(min=MAX_SIZE)) * part
    momentum = weights[:1] + (1.0 - part)
    disagreeing = 1.0 - part * (1.0 - values[2:3])
    faded = values[3:FIRST_HIDDEN] * part
    return torch.cat((momentum, weights[1:2], disagreeing, faded, weights[2:], values[last:])), trust
