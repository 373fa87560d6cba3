"""The layers of Easy-KPConv (qinzheng93/Easy-KPConv), with its names, arguments and state.

One line at the end of a file replaces what is above it, in ``easy_kpconv/layers/kpconv.py``, ``ops/pooling.py`` and
``ops/nearest_interpolate.py``::

    from kpcore.compat.easy_kpconv import KPConv
    from kpcore.compat.easy_kpconv import global_avgpool_pack_mode, local_maxpool_pack_mode
    from kpcore.compat.easy_kpconv import nearest_interpolate_pack_mode
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import kpcore.torch as kpt
from kpcore.compat import padded, published
from kpcore.compat.kernels import disposition
from kpcore.torch.layers import draw_uniform, redraw_kernel_points

if TYPE_CHECKING:
    from kpcore.compat.published import Matrix

_PLACES = {"num_kpoints": "kernel_size"}
_NAMES = {"points": "s_points", "queries": "q_points", "features": "s_feats", "neighbors": "neighbor_indices"}
__all__ = ["KPConv", "global_avgpool_pack_mode", "local_maxpool_pack_mode", "nearest_interpolate_pack_mode"]


class KPConv(kpt.KPConv):
    """Rigid kernel point convolution, divided by the number of neighbours with features that sum to more than zero.

    Names of parameters and buffers, their order, shapes and initialisation are the published ones: with several groups,
    weights are (K, groups, in_channels / groups, out_channels / groups).

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        K, the number of kernel points.
    radius : float
        Search radius: the kernel points have a mean norm of 0.66 of it. More than 30 fill the whole radius.
    sigma : float
        Distance at which the influence reaches zero.
    groups : int
        A divisor of both numbers of channels.
    bias : bool
        Added after the division.
    dimension : int
    inf : float
        Has no effect: padding is left out, not moved far away.

    Notes
    -----
    Differences: -1 means "no neighbour" too; groups work on the CPU; where a neighbour is at the place of a kernel
    point, the gradient of positions is 0, not NaN.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.easy_kpconv import KPConv
    >>> points, feats = torch.rand(200, 3), torch.ones(200, 4)
    >>> indices = torch.from_numpy(kpt.radius_search(points, None, 0.25, sort="distance").to_padded(20))
    >>> layer = KPConv(4, 8, 15, radius=0.25, sigma=0.2, groups=2)
    >>> layer(points, points, feats, indices).shape, layer.weights.shape
    (torch.Size([200, 8]), torch.Size([15, 2, 2, 4]))
    """

    sigma = published.EXTENT

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, radius: float, sigma: float,
                 groups: int = 1, bias: bool = False, dimension: int = 3, inf: float = 1e6) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, extent=sigma, dimension=dimension, groups=groups, bias=bias,
            normalization="positive", **disposition(kernel_size, radius)
        )  # fmt: skip
        self._draw = partial(published.kernel_points, kernel_size, radius, dimension, names=_PLACES)
        redraw_kernel_points(self)
        self.kernel_size, self.in_channels, self.out_channels = kernel_size, in_channels, out_channels
        self.radius, self.groups, self.dimension, self.inf = radius, groups, dimension, inf
        if groups > 1:
            shape = kernel_size, groups, in_channels // groups, out_channels // groups
            self.weights = torch.nn.Parameter(self.weights.new_empty(shape))
            draw_uniform(self.weights, self.bias)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, sigma={self.sigma:.4g}"
        return text + f", groups={self.groups}, bias={self.bias is not None}"

    def forward(self, q_points: torch.Tensor, s_points: torch.Tensor, s_feats: torch.Tensor,  # type: ignore[override]
                neighbor_indices: Matrix) -> torch.Tensor:  # fmt: skip
        """(M, out_channels).

        Parameters
        ----------
        q_points : (M, D) tensor
        s_points : (N, D) tensor
        s_feats : (N, in_channels) tensor
        neighbor_indices : (M, H) int32 or int64 tensor, or Neighbors
            -1 and N both mean "no neighbour". Its list is made once, see `kpcore.compat.padded`.
        """
        neighbors = padded.neighbors("neighbor_indices", neighbor_indices, s_points.shape[0])
        if self.groups == 1:
            return published.named(_NAMES, super().forward, s_points, q_points, neighbors, s_feats)
        weights, groups = published.ungrouped(self.weights)
        out = published.named(_NAMES, kpt.kpconv, s_points, q_points, neighbors, s_feats, weights, self.kernel_points,
                              self.extent, normalization="positive", groups=groups)  # fmt: skip
        return out if self.bias is None else out + self.bias


def local_maxpool_pack_mode(feats: torch.Tensor, neighbor_indices: Matrix) -> torch.Tensor:
    """The maximum over the neighbours of each query, (M, C); a zero takes part in rows with padding, as published.

    Parameters
    ----------
    feats : (N, C) tensor
    neighbor_indices : (M, H) int32 or int64 tensor, or Neighbors with a width
    """
    return published.max_pool("neighbor_indices", feats, neighbor_indices, 0.0)


def nearest_interpolate_pack_mode(inputs: torch.Tensor, neighbor_indices: Matrix) -> torch.Tensor:
    """The features of the neighbours in the first column, (M, C); zeros where it is padding.

    Parameters
    ----------
    inputs : (N, C) tensor
    neighbor_indices : (M, H) int32 or int64 tensor, or Neighbors
    """
    return published.first_pool("neighbor_indices", inputs, neighbor_indices)


def global_avgpool_pack_mode(feats: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of each batch item, (B, C); zeros for an item without rows, where the published mean is NaN.

    Parameters
    ----------
    feats : (N, C) tensor
    lengths : (B,) tensor of integers
        They must sum to N.
    """
    return published.global_average("lengths", feats, lengths)
