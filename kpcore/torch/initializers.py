"""Initialisers and activations by the names that they have in TensorFlow, for layers that take such names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn import functional

Initializer: TypeAlias = str | Callable[[torch.Tensor], Any]
Activation: TypeAlias = str | Callable[[torch.Tensor], torch.Tensor] | None

_ACTIVATIONS = {
    "elu": functional.elu,
    "gelu": functional.gelu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=0.2),  # TensorFlow's slope
    "linear": lambda x: x,
    "relu": functional.relu,
    "selu": functional.selu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softmax": partial(torch.softmax, dim=-1),
    "softplus": functional.softplus,
    "softsign": functional.softsign,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
# TensorFlow's defaults: U(-0.05, 0.05), N(0, 0.05²), and the latter without what is beyond two standard deviations.
_FIXED = {
    "normal": partial(torch.nn.init.normal_, std=0.05),
    "ones": torch.nn.init.ones_,
    "random_normal": partial(torch.nn.init.normal_, std=0.05),
    "random_uniform": partial(torch.nn.init.uniform_, a=-0.05, b=0.05),
    "truncated_normal": partial(torch.nn.init.trunc_normal_, std=0.05, a=-0.1, b=0.1),
    "uniform": partial(torch.nn.init.uniform_, a=-0.05, b=0.05),
    "zeros": torch.nn.init.zeros_,
}
# The inverse of the variance, from the numbers of inputs and outputs.
_VARIANCES = {
    "glorot": lambda fan_in, fan_out: (fan_in + fan_out) / 2,
    "he": lambda fan_in, fan_out: fan_in / 2,
    "lecun": lambda fan_in, fan_out: fan_in,
}
_NAMES = (*_FIXED, *(f"{scale}_{shape}" for scale in _VARIANCES for shape in ("normal", "uniform")))
# The standard deviation of a unit normal distribution without what is beyond two standard deviations.
_TRUNCATED = 0.87962566103423978


def check(name: str, initializer: object) -> None:
    """Check that an argument is an initialiser."""
    if not callable(initializer):
        _check_name(name, initializer, _NAMES)


def check_activation(name: str, activation: object) -> None:
    """Check that an argument is an activation or None."""
    if activation is not None and not callable(activation):
        _check_name(name, activation, _ACTIVATIONS)


def _check_name(name, value, names):
    if value not in names:
        raise ValueError(f"{name}: expected a function or one of {', '.join(map(repr, sorted(names)))}, got {value!r}")


@torch.no_grad()
def initialize(initializer: Initializer, weights: torch.Tensor, *, transposed: bool = False) -> None:
    """Fill a tensor in place, by a function that does so or by an initialiser of TensorFlow.

    The fans of "glorot_uniform" and the like are those of TensorFlow, whose last two axes are inputs and outputs, or
    the reverse if `transposed`. Those of torch's functions have outputs and inputs first.
    """
    if not isinstance(initializer, str):
        initializer(weights)
        return
    if initializer in _FIXED:
        _FIXED[initializer](weights)
        return
    scale, _, shape = initializer.partition("_")
    fans = (weights.shape[-2:] if weights.ndim > 1 else weights.shape * 2)[:: -1 if transposed else 1]
    cells = math.prod(weights.shape[:-2])
    deviation = 1 / math.sqrt(max(1.0, _VARIANCES[scale](cells * fans[0], cells * fans[1])))
    if shape == "uniform":
        bound = math.sqrt(3) * deviation
        torch.nn.init.uniform_(weights, -bound, bound)
    else:
        std = deviation / _TRUNCATED
        torch.nn.init.trunc_normal_(weights, std=std, a=-2 * std, b=2 * std)


def activated(activation: Activation, values: torch.Tensor) -> torch.Tensor:
    """The values after an activation: a function, its name in TensorFlow, or None for none."""
    if activation is None:
        return values
    return (_ACTIVATIONS[activation] if isinstance(activation, str) else activation)(values)
