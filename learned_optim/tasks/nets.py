"""Networks the zoo trains. Every operation in them can be differentiated twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .sampling import chance, choice, log_uniform

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU}
NORMS = ("none", "layer", "batch", "rms")
INITS = ("default", "default", "xavier", "orthogonal", "zero_output", "scaled")


@dataclass(frozen=True)
class Style:
    """What can be varied about any network.

    Attributes:
        activation: a key of ``ACTIVATIONS``.
        norm: one of ``NORMS``.
        init: one of ``INITS``.
        scale: factor on all weight matrices when ``init`` is ``"scaled"``.
        residual: whether layers that keep the width add their input.
    """

    activation: str = "relu"
    norm: str = "none"
    init: str = "default"
    scale: float = 1.0
    residual: bool = False

    def act(self) -> nn.Module:
        return ACTIVATIONS[self.activation]()


def random_style(
    rng: torch.Generator, *, norms: Sequence[str] = NORMS, inits: Sequence[str] = INITS, residual: float = 0.3
) -> Style:
    """Draws a style; ``residual`` is the probability of residual connections."""
    return Style(
        activation=choice(rng, list(ACTIVATIONS)),
        norm=choice(rng, norms),
        init=choice(rng, inits),
        scale=log_uniform(rng, 0.4, 2.5),
        residual=chance(rng, residual),
    )


def initialise(module: nn.Module, style: Style) -> nn.Module:
    """Re-draws the weight matrices of the linear and convolutional layers of ``module`` in place, and returns it.

    ``"xavier"`` and ``"orthogonal"`` zero the biases too; ``"zero_output"`` zeroes the last layer's weight;
    ``"scaled"`` multiplies torch's default by ``style.scale``. Norms, embeddings and recurrent cells keep theirs.
    """
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d))]
    with torch.no_grad():
        for layer in layers:
            if style.init == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            elif style.init == "orthogonal":
                nn.init.orthogonal_(layer.weight)
            elif style.init == "scaled":
                layer.weight.mul_(style.scale)
            if style.init in ("xavier", "orthogonal") and layer.bias is not None:
                layer.bias.zero_()
        if style.init == "zero_output" and layers:
            layers[-1].weight.zero_()
    return module


def norm_layer(kind: str, features: int, dims: int = 0) -> list[nn.Module]:
    """0 or 1 layers that normalise ``[batch, features]``, or ``[batch, features, *size]`` of ``dims`` more axes."""
    if kind == "none":
        return []
    if kind == "batch":
        return [(nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dims](features)]
    if dims:  # the channel axis is not the last one; a group norm of one group is the usual substitute
        return [nn.GroupNorm(1, features)]
    return [nn.LayerNorm(features) if kind == "layer" else nn.RMSNorm(features, eps=1e-6)]


class Residual(nn.Module):
    """``x + body(x)``, or ``shortcut(x) + body(x)``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (x if self.shortcut is None else self.shortcut(x))


def mlp(widths: Sequence[int], style: Style) -> nn.Sequential:
    """A perceptron on ``[batch, widths[0]]`` that gives ``[batch, widths[-1]]``; flattens its input first."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths[:-1]):
        layer = nn.Sequential(nn.Linear(fan_in, fan_out), *norm_layer(style.norm, fan_out), style.act())
        layers.append(Residual(layer) if style.residual and fan_in == fan_out else layer)
    layers.append(nn.Linear(widths[-2], widths[-1]))
    return nn.Sequential(*layers)


def convnet(in_channels: int, channels: Sequence[int], outputs: int, style: Style, dims: int = 2) -> nn.Sequential:
    """Strided convolutions and global average pooling: ``[batch, in_channels, *size]`` to ``[batch, outputs]``."""
    conv, pool = ((nn.Conv1d, nn.AdaptiveAvgPool1d), (nn.Conv2d, nn.AdaptiveAvgPool2d))[dims - 1]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise([in_channels, *channels]):
        layers += [conv(fan_in, fan_out, 3, stride=2, padding=1), *norm_layer(style.norm, fan_out, dims), style.act()]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(channels[-1], outputs))


def residual_convnet(
    in_channels: int, channels: Sequence[int], outputs: int, style: Style, blocks: int = 1
) -> nn.Sequential:
    """A small ResNet: a stem at half size, then stages of ``blocks`` residual blocks, each stage halving the size."""

    def conv(fan_in: int, fan_out: int, stride: int, size: int = 3) -> list[nn.Module]:
        bias = style.norm == "none"
        layer = nn.Conv2d(fan_in, fan_out, size, stride=stride, padding=size // 2, bias=bias)
        return [layer, *norm_layer(style.norm, fan_out, 2)]

    layers: list[nn.Module] = [*conv(in_channels, channels[0], 2), style.act()]
    width = channels[0]
    for stage, fan_out in enumerate(channels):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            body = nn.Sequential(*conv(width, fan_out, stride), style.act(), *conv(fan_out, fan_out, 1))
            same = stride == 1 and width == fan_out
            shortcut = None if same else nn.Sequential(*conv(width, fan_out, stride, size=1))
            layers += [Residual(body, shortcut), style.act()]
            width = fan_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


class Attention(nn.Module):
    """Multi-head self-attention on ``[batch, time, width]``.

    Written out because the fused kernels of ``scaled_dot_product_attention`` cannot be differentiated twice.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5
        if self.causal:
            later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, width))


def transformer_blocks(width: int, depth: int, heads: int, style: Style, causal: bool) -> nn.Sequential:
    """Pre-norm transformer blocks with a final norm, on ``[batch, time, width]``."""
    norm = "rms" if style.norm == "rms" else "layer"
    blocks: list[nn.Module] = []
    for _ in range(depth):
        hidden = nn.Sequential(nn.Linear(width, 4 * width), style.act(), nn.Linear(4 * width, width))
        blocks += [
            Residual(nn.Sequential(*norm_layer(norm, width), Attention(width, heads, causal))),
            Residual(nn.Sequential(*norm_layer(norm, width), hidden)),
        ]
    return nn.Sequential(*blocks, *norm_layer(norm, width))


class VisionTransformer(nn.Module):
    """Images ``[batch, channels, size, size]`` cut into patches, mean-pooled, to ``[batch, outputs]``."""

    def __init__(
        self, image: tuple[int, int], patch: int, width: int, depth: int, heads: int, outputs: int, style: Style
    ) -> None:
        super().__init__()
        channels, size = image
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = transformer_blocks(width, depth, heads, style, causal=False)
        self.output = nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, size, _ = images.shape
        n, p = size // self.patch, self.patch
        patches = images.view(batch, channels, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, n * n, -1)
        return self.output(self.blocks(self.embed(patches) + self.position).mean(1))


class TransformerLM(nn.Module):
    """Decoder-only language model: tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``."""

    def __init__(
        self, vocabulary: int, context: int, width: int, depth: int, heads: int, style: Style, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = transformer_blocks(width, depth, heads, style, causal=True)
        self.output = nn.Linear(width, vocabulary)
        tie(self.output, self.embed, tied)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]]))


class RecurrentLM(nn.Module):
    """GRU or LSTM language model: tokens ``[batch, time]`` to logits ``[batch, time, vocabulary]``.

    With ``tied`` the output layer's weight is the embedding; then ``embedding`` must equal ``hidden``, or a linear
    layer brings the hidden state to the embedding's width.
    """

    def __init__(
        self, cell: str, vocabulary: int, embedding: int, hidden: int, layers: int = 1, tied: bool = False
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.rnn = (nn.GRU if cell == "gru" else nn.LSTM)(embedding, hidden, layers, batch_first=True)
        self.project = nn.Linear(hidden, embedding) if tied and hidden != embedding else nn.Identity()
        self.output = nn.Linear(embedding if tied else hidden, vocabulary)
        tie(self.output, self.embed, tied)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.project(self.rnn(self.embed(tokens))[0]))


def tie(output: nn.Linear, embed: nn.Embedding, tied: bool) -> None:
    """Makes ``output.weight`` the embedding, drawn at the scale of a linear layer, if ``tied``."""
    if tied:
        # The embedding's unit normal would start with logits of size sqrt(width).
        nn.init.normal_(embed.weight, std=embed.embedding_dim**-0.5)
        output.weight = embed.weight


class AutoEncoder(nn.Module):
    """``[batch, ...]`` to a code ``[batch, code]`` and back to logits ``[batch, pixels]``."""

    def __init__(self, pixels: int, hidden: Sequence[int], code: int, style: Style, variational: bool = False) -> None:
        super().__init__()
        self.encoder = mlp([pixels, *hidden, (2 if variational else 1) * code], style)
        self.decoder = mlp([code, *reversed(hidden), pixels], style)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))
