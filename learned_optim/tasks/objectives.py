"""Losses ``(module, batch) -> scalar`` that several families share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .base import Batch


def classification(module: Any, batch: Batch) -> Tensor:
    """Cross-entropy (nats) of ``(inputs, labels)``."""
    inputs, labels = batch
    return F.cross_entropy(module(inputs), labels)


def regression(module: Any, batch: Batch) -> Tensor:
    """Mean squared error of ``(inputs, targets)``, targets ``[batch, outputs]``."""
    inputs, targets = batch
    return F.mse_loss(module(inputs), targets)


def next_token(module: Any, batch: Batch) -> Tensor:
    """Cross-entropy (nats per token) of predicting ``tokens[:, 1:]`` from what precedes; batch ``(tokens,)``."""
    (tokens,) = batch
    return F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def reconstruction(module: Any, batch: Batch) -> Tensor:
    """Mean squared error per pixel between images and their reconstruction; batch ``(images,)``."""
    (images,) = batch
    return F.mse_loss(module(images), images.flatten(1))


def bernoulli_reconstruction(module: Any, batch: Batch) -> Tensor:
    """Binary cross-entropy (nats per pixel) of images in [0, 1] given the reconstruction's logits."""
    (images,) = batch
    return F.binary_cross_entropy_with_logits(module(images), images.flatten(1))


def negative_elbo(module: Any, batch: Batch) -> Tensor:
    """Negative evidence lower bound (nats per pixel) of a variational autoencoder.

    Batch ``(images in [0, 1], noise)`` with noise ``[batch, code]`` standard normal: the draw is part of the batch
    so that the loss is a function of its arguments.
    """
    images, noise = batch
    pixels = images.flatten(1)
    mean, log_variance = module.encoder(images).chunk(2, dim=1)
    # Bounded, or a bold first step overflows exp().
    log_variance = 6.0 * (log_variance / 6.0).tanh()
    logits = module.decoder(mean + noise * (0.5 * log_variance).exp())
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
    return F.binary_cross_entropy_with_logits(logits, pixels) + divergence / pixels.shape[1]


def with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """A loss with the gradient of ``surrogate`` and the value of ``value``.

    For tasks whose own loss says little about progress, because its target is bootstrapped or its labels are noise:
    the optimizer follows ``surrogate``, and runs are compared by ``value``.
    """
    return value.detach() + (surrogate - surrogate.detach())
