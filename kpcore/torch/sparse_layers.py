"""Sparse convolutions over a kernel map, as layers: submanifold, strided and inverse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

import kpcore
from kpcore.backends import checks
from kpcore.kernel_map import Kernel, KernelMap


class _SparseLayer(torch.nn.Module):
    """Weights for each kernel cell, a bias, and the convolution over a kernel map."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    kernel_size: tuple[int, ...]

    def __init__(self, in_channels, out_channels, kernel_size, bias, dimension, dtype):
        super().__init__()
        in_channels = checks.integer("in_channels", in_channels, 1)
        out_channels = checks.integer("out_channels", out_channels, 1)
        if isinstance(kernel_size, (list, tuple)):
            dimension = len(kernel_size)
        dimension = checks.integer("dimension", dimension, 1, 4)
        self.kernel_size = tuple(checks.integers("kernel_size", kernel_size, dimension, 1).tolist())
        self.weight = torch.nn.Parameter(torch.empty(*self.kernel_size, in_channels, out_channels, dtype=dtype))
        self.register_parameter(
            "bias",
            torch.nn.Parameter(torch.empty(out_channels, dtype=dtype)) if checks.boolean("bias", bias) else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights and a new bias, uniform in ±1 / sqrt(number of kernel cells * in_channels)."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[:-1]))
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.weight.shape[-2]}, {self.weight.shape[-1]}, kernel_size={self.kernel_size}"
        return text + ", bias=False" * (self.bias is None)

    def _conv(self, features, kernel_map):
        in_channels = self.weight.shape[-2]
        if features.shape[1:] != (in_channels,):
            raise ValueError(f"features: expected (N, {in_channels}) to match in_channels, got {tuple(features.shape)}")
        out = kpcore.torch.sparse_conv(kernel_map.neighbors, kernel_map.kernel_index, features, self.weight)
        return out if self.bias is None else out + self.bias

    def _checked_map(self, kernel_map, expected):
        """The map, checked to have been made for the kernel `expected`."""
        if not isinstance(kernel_map, KernelMap):
            raise TypeError(f"kernel_map: expected kpcore.KernelMap, got {type(kernel_map).__name__}")
        if not isinstance(kernel_map.kernel_index, torch.Tensor):
            raise TypeError(
                "kernel_map: expected a map of tensors, which kpcore.torch.kernel_map makes, got one of "
                f"{type(kernel_map.kernel_index).__name__}"
            )
        if kernel_map.kernel != expected:
            raise ValueError(
                f"kernel_map: expected one for {expected} to match the layer, got one for {kernel_map.kernel}"
            )
        if kernel_map.is_transposed:
            raise ValueError("kernel_map: expected the map that kernel_map made, got its transpose")
        return kernel_map

    def _checked_coords(self, coords):
        axes = len(self.kernel_size)
        if isinstance(coords, torch.Tensor) and coords.ndim == 2 and coords.shape[1] != axes:
            raise ValueError(
                f"coords: expected (N, {axes}) to match kernel_size, got {tuple(coords.shape)}; the clouds of a batch "
                "are bounded by row_splits, not numbered in a column"
            )
        return coords

    def forward(self, features: torch.Tensor, kernel_map: KernelMap[torch.Tensor]) -> torch.Tensor:
        """(M, out_channels), a row for each of ``kernel_map.out_coords``.

        Parameters
        ----------
        features : (N, in_channels) tensor
            A row for each of ``kernel_map.in_coords``.
        kernel_map : KernelMap
            Made for the kernel of this layer, as its method `kernel_map` does.
        """
        return self._conv(features, self._checked_map(kernel_map, self._kernel()))


class SubmanifoldConv(_SparseLayer):
    """Submanifold sparse convolution with its weights, as a layer: outputs are at the inputs' coordinates.

    What spconv calls SubMConv3d. All layers of the same coordinates and kernel share one kernel map, as spconv's layers
    share one by `indice_key`.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int, or one for each axis
    dilation : int, or one for each axis
    bias : bool
    dimension : int
        D, the number of axes, if `kernel_size` is a number.
    dtype : torch.float32 or torch.float64
        By default torch's default dtype.

    Attributes
    ----------
    weight : (*kernel_size, in_channels, out_channels) parameter
        Cells in C order of the axes of the coordinates. spconv's has out_channels first:
        ``conv.weight.copy_(theirs.weight.permute(1, 2, 3, 4, 0))``.
    bias : (out_channels,) parameter, or None

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> coords = torch.tensor([[0, 0, 0], [0, 0, 1], [5, 5, 5]], dtype=torch.int32)
    >>> conv = kpt.SubmanifoldConv(4, 8, 3)
    >>> m = conv.kernel_map(coords)
    >>> conv(torch.ones(3, 4), m).shape, kpt.SubmanifoldConv(8, 2, 3)(torch.ones(3, 8), m).shape
    (torch.Size([3, 8]), torch.Size([3, 2]))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], *,
                 dilation: int | Sequence[int] = 1, bias: bool = True, dimension: int = 3,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, bias, dimension, dtype)
        self.dilation = tuple(checks.integers("dilation", dilation, len(self.kernel_size), 1).tolist())

    def extra_repr(self) -> str:
        return super().extra_repr() + f", dilation={self.dilation}" * (set(self.dilation) != {1})

    def kernel_map(self, coords: torch.Tensor, row_splits: torch.Tensor | None = None) -> KernelMap[torch.Tensor]:
        """A map for this layer and others with its kernel; see `kpcore.kernel_map`.

        Parameters
        ----------
        coords : (N, D) int32 tensor
        row_splits : (B + 1,) int64 tensor, optional
        """
        return kpcore.torch.kernel_map(self._checked_coords(coords), kernel_size=self.kernel_size,
                                       dilation=self.dilation, row_splits=row_splits)  # fmt: skip

    def _kernel(self):
        one, zero = (1,) * len(self.kernel_size), (0,) * len(self.kernel_size)
        return Kernel(self.kernel_size, one, self.dilation, zero, "submanifold")


class StridedConv(_SparseLayer):
    """Strided sparse convolution with its weights, as a layer: outputs are wherever the rule says.

    What spconv calls SparseConv3d (rule "spconv") and MinkowskiEngine MinkowskiConvolution ("minkowski"), whose outputs
    differ; see `kpcore.kernel_map`. `InverseConv` brings features back to the coordinates of the inputs.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int, or one for each axis
    stride, dilation, padding : int, or one for each axis
        Only "spconv" has padding.
    rule : {"spconv", "minkowski"}
    bias, dimension, dtype
        As in `SubmanifoldConv`.

    Attributes
    ----------
    weight : (*kernel_size, in_channels, out_channels) parameter
    bias : (out_channels,) parameter, or None

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> coords = torch.tensor([[0, 0, 0], [0, 0, 1], [5, 5, 5]], dtype=torch.int32)
    >>> conv, inverse = kpt.StridedConv(4, 8, 2, stride=2), kpt.InverseConv(8, 4, 2)
    >>> m = conv.kernel_map(coords)
    >>> m.out_coords.tolist(), inverse(conv(torch.ones(3, 4), m), m).shape
    ([[0, 0, 0], [2, 2, 2]], torch.Size([3, 4]))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], *,
                 stride: int | Sequence[int] = 2, dilation: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
                 rule: Literal["spconv", "minkowski"] = "spconv", bias: bool = True, dimension: int = 3,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, bias, dimension, dtype)
        checks.choice("rule", rule, ("spconv", "minkowski"))
        axes = len(self.kernel_size)
        self.stride = tuple(checks.integers("stride", stride, axes, 1).tolist())
        self.dilation = tuple(checks.integers("dilation", dilation, axes, 1).tolist())
        self.padding, self.rule = tuple(checks.integers("padding", padding, axes, 0).tolist()), rule
        if rule == "minkowski" and any(self.padding):
            raise ValueError(f"padding: expected 0 with rule='minkowski', got {self.padding}")

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, stride={self.stride}, rule={self.rule!r}"
        text += f", dilation={self.dilation}" * (set(self.dilation) != {1})
        return text + f", padding={self.padding}" * any(self.padding)

    def kernel_map(self, coords: torch.Tensor, row_splits: torch.Tensor | None = None,
                   shape: Sequence[int] | None = None) -> KernelMap[torch.Tensor]:  # fmt: skip
        """A map for this layer and others with its kernel and stride; see `kpcore.kernel_map`.

        Parameters
        ----------
        coords : (N, D) int32 tensor
        row_splits : (B + 1,) int64 tensor, optional
        shape : D ints, optional
            Of "spconv": the size of the grid that inputs lie in, spconv's `spatial_shape`.
        """
        return kpcore.torch.kernel_map(
            self._checked_coords(coords), kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation,
            padding=self.padding, shape=shape, rule=self.rule, row_splits=row_splits
        )  # fmt: skip

    def _kernel(self):
        return Kernel(self.kernel_size, self.stride, self.dilation, self.padding, self.rule)


class InverseConv(_SparseLayer):
    """The inverse of a strided layer with its weights, as a layer: from its outputs back to its inputs' coordinates.

    What spconv calls SparseInverseConv3d, with the map of the strided layer: it uses ``kernel_map.transpose()``, in
    which each pair has the kernel cell that it has in the map.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int, or one for each axis
        That of the strided layer.
    bias, dimension, dtype
        As in `SubmanifoldConv`.

    Attributes
    ----------
    weight : (*kernel_size, in_channels, out_channels) parameter
    bias : (out_channels,) parameter, or None
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], *, bias: bool = True,
                 dimension: int = 3, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, bias, dimension, dtype)

    def forward(self, features: torch.Tensor, kernel_map: KernelMap[torch.Tensor]) -> torch.Tensor:
        """(N, out_channels), a row for each of ``kernel_map.in_coords``.

        Parameters
        ----------
        features : (M, in_channels) tensor
            A row for each of ``kernel_map.out_coords``.
        kernel_map : KernelMap
            The map of the strided layer, not its transpose.
        """
        expected = None
        if isinstance(kernel_map, KernelMap):
            if kernel_map.kernel.rule == "submanifold":
                raise ValueError("kernel_map: expected the map of a strided layer, got one for rule='submanifold'")
            expected = kernel_map.kernel._replace(size=self.kernel_size)  # of any stride, dilation and padding
        return self._conv(features, self._checked_map(kernel_map, expected).transpose())
