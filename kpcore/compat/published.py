"""What published layers have in common: kernel points, the influence, layouts of weights, pooling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import padded
from kpcore.compat.kernels import load_kernels
from kpcore.neighbors import Neighbors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Out = TypeVar("Out")
Matrix: TypeAlias = torch.Tensor | Neighbors  # of neighbours, (M, H), padded with N or -1

# The published name `sigma` of the attribute `extent` of a layer.
EXTENT = property(lambda layer: layer.extent, lambda layer, value: setattr(layer, "extent", value))
PADDING = 1e6  # coordinates of the point that stands for "no neighbour"
_GAUSSIAN = 1e-9  # what the published code adds to 2 sigma², with sigma = 0.3 extent


def influence_extent(influence: str, extent: float) -> float:
    """The `extent` with which `kpcore.kpconv` has the published influence.

    exp(-d² / (2 (0.3 extent)² + 1e-9)) is the gaussian of a slightly larger extent, which also takes in neighbours that
    lie out of range of a deformed kernel by less than 3e-9 / extent.
    """
    return math.sqrt(extent**2 + _GAUSSIAN / (2 * 0.3**2)) if influence == "gaussian" else extent


def kernel_points(num: int, radius: float, dimension: int, fixed: str = "center", *,
                  names: Mapping[str, str], dtype: torch.dtype | None = None) -> torch.Tensor:  # fmt: skip
    """`kpcore.compat.load_kernels` as a tensor on torch's default device; errors speak of ``names[argument]``.

    In float32 and at a random place near that of `kpcore.kernel_points`, as published: a neighbour at the very place of
    a kernel point has a gradient of NaN in the published code, to which these states may be passed on.
    """
    with checks.argument_names(names):
        points = load_kernels(radius, num, dimension, fixed)
    return torch.from_numpy(points).to(torch.get_default_device(), dtype or torch.get_default_dtype())


def version(tensor: torch.Tensor) -> int | None:
    """The number of changes in place of a tensor, None where torch does not count them."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def ungrouped(weights: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(weights, groups) as `kpcore.kpconv` takes them, from weights (K, groups, Cin / groups, Cout / groups)."""
    num, groups, in_channels, out_channels = weights.shape
    if in_channels == out_channels == 1:
        return weights.reshape(num, groups), 1  # depthwise
    return weights.transpose(1, 2).reshape(num, in_channels, groups * out_channels), groups


def named(names: Mapping[str, str], function: Callable[..., Out], *args: object, **kwargs: object) -> Out:
    """Call a function; errors about an argument of kpcore speak of the published one, ``names[argument]``."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with checks.argument_names(names):
        return function(*args, **kwargs)


def max_pool(name: str, features: torch.Tensor, matrix: Matrix, pad_value: float) -> torch.Tensor:
    """The maximum over the neighbours of each query; in rows with padding `pad_value` counts as one more."""
    neighbors = padded.neighbors(name, matrix, features.shape[0])
    return kpt.neighbor_reduce(features, neighbors, "max", pad_value=pad_value)


def first_pool(name: str, features: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """The features of the neighbours in the first column, zeros where it is padding."""
    return kpt.nearest_upsample(features, padded.neighbors(name, matrix, features.shape[0], first=True))


def global_average(name: str, features: torch.Tensor, lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The mean of the rows of each batch item, zeros for an item without rows."""
    lengths = torch.as_tensor(lengths) if len(lengths) else torch.zeros(0, dtype=torch.int64)
    if lengths.ndim != 1 or lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected integers (B,), got {str(lengths.dtype)[6:]} {tuple(lengths.shape)}")
    row_splits = torch.nn.functional.pad(lengths.to(features.device, torch.int64).cumsum(0), (1, 0))
    try:
        return kpt.segment_reduce(features, row_splits, "mean")
    except ValueError:
        total, least = int(lengths.sum()), int(lengths.min()) if len(lengths) else 0
        if least < 0:
            raise ValueError(f"{name}: expected numbers of at least 0, got {least}") from None
        if total == features.shape[0]:
            raise
        expected = f"lengths that add up to {features.shape[0]} to match the features"
        raise ValueError(f"{name}: expected {expected}, got {total}") from None


def only(name: str, value: object, supported: object, why: str) -> None:
    """Raise NotImplementedError for an option with another value than the only one that is supported."""
    if value != supported:
        raise NotImplementedError(f"{name}: expected {supported!r}, because {why}, got {value!r}")
