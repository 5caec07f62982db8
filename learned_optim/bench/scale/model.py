"""The language models: decoder-only transformers with RMSNorm, rotary positions and SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Of the rotary positions' angles (Su et al. 2021, arXiv 2104.09864).
BASE = 10_000.0


class SelfAttention(nn.Module):
    """Causal attention of several heads on ``[batch, time, width]``, with rotary positions."""

    turn: Tensor  #: cosines and sines, ``[2, context, width / heads / 2]``

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        half = width // heads // 2
        angle = torch.arange(context)[:, None] * BASE ** (-torch.arange(half) / half)
        self.register_buffer("turn", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        cos, sin = self.turn[:, :time].to(x.dtype)

        def rotated(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(v.dtype)

        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class SwiGlu(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv 2002.05202) with as many weights as one of four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * round(width / 3)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """Attention and feed-forward layer, each behind an RMSNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads, context)
        self.feed_forward = SwiGlu(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class LanguageModel(nn.Module):
    """Tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``.

    Matrices start normal with deviation ``1 / sqrt(3 fan_in)``, which is that of torch's linear layers and, at width
    768, GPT-2's 0.02. The layers that write to the residual stream are divided by ``sqrt(2 depth)``. Embedding and
    output are two matrices, so that Muon's split needs no rule for a shared one.

    Args:
        vocabulary: of the tokens.
        context: longest sequence.
        depth: blocks.
        width: of the residual stream, a multiple of twice the heads.
        heads: of each attention.
    """

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(depth)))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                fan_in = width if "embed" in name else p.shape[1]
                last = name.endswith(("attention.out.weight", "down.weight"))
                nn.init.normal_(p, std=(3 * fan_in * (2 * depth if last else 1)) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token of ``[batch, time + 1]``."""
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
