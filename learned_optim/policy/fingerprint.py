"""Which rule it is, in 16 digits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from learned_optim.rule.config import PolicyConfig


def fingerprint(config: PolicyConfig, weights: Mapping[str, Tensor]) -> str:
    """``sha256:`` and 16 hexadecimal digits over configuration and weights: equal if and only if the rule is."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        data = weight.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(data.shape)}".encode())
        digest.update(data.numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"
