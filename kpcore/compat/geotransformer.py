"""The layers of GeoTransformer (qinzheng93/GeoTransformer), with its names, arguments and state.

One line at the end of ``geotransformer/modules/kpconv/kpconv.py``, and one at the end of ``functional.py`` beside it,
replace what is above them::

    from kpcore.compat.geotransformer import KPConv
    from kpcore.compat.geotransformer import global_avgpool, maxpool, nearest_upsample
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import kpcore.torch as kpt
from kpcore.compat import padded, published
from kpcore.compat.kernels import disposition
from kpcore.torch.layers import redraw_kernel_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.compat.published import Matrix

_PLACES = {"num_kpoints": "kernel_size"}
_NAMES = {"points": "s_points", "queries": "q_points", "features": "s_feats", "neighbors": "neighbor_indices"}
__all__ = ["KPConv", "global_avgpool", "maxpool", "nearest_upsample"]


class KPConv(kpt.KPConv):
    """Rigid kernel point convolution, divided by the number of neighbours with features that sum to more than zero.

    Names of parameters and buffers, their order, shapes and initialisation are the published ones.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        K, the number of kernel points.
    radius : float
        Search radius: the kernel points have a mean norm of 0.66 of it. More than 30 fill the whole radius.
    sigma : float
        Distance at which the influence reaches zero.
    bias : bool
        Added after the division.
    dimension : int
    inf, eps : float
        Have no effect: padding is left out, not moved far away.

    Notes
    -----
    Differences: -1 means "no neighbour" too; `neighbor_indices` need not be contiguous; where a neighbour is at the
    place of a kernel point, the gradient of positions is 0, not NaN.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.geotransformer import KPConv
    >>> points, feats = torch.rand(200, 3), torch.ones(200, 4)
    >>> indices = torch.from_numpy(kpt.radius_search(points, None, 0.25, sort="distance").to_padded(20))
    >>> layer = KPConv(4, 8, 15, radius=0.25, sigma=0.2, bias=True)
    >>> layer(feats, points, points, indices).shape
    torch.Size([200, 8])
    >>> list(layer.state_dict())
    ['weights', 'bias', 'kernel_points']
    """

    sigma = published.EXTENT

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, radius: float, sigma: float,
                 bias: bool = False, dimension: int = 3, inf: float = 1e6, eps: float = 1e-9) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, extent=sigma, dimension=dimension, bias=bias,
                         normalization="positive", **disposition(kernel_size, radius))  # fmt: skip
        self._draw = partial(published.kernel_points, kernel_size, radius, dimension, names=_PLACES)
        redraw_kernel_points(self)
        self.kernel_size, self.in_channels, self.out_channels = kernel_size, in_channels, out_channels
        self.radius, self.dimension, self.inf, self.eps = radius, dimension, inf, eps

    def forward(self, s_feats: torch.Tensor, q_points: torch.Tensor, s_points: torch.Tensor,  # type: ignore[override]
                neighbor_indices: Matrix) -> torch.Tensor:  # fmt: skip
        """(M, out_channels).

        Parameters
        ----------
        s_feats : (N, in_channels) tensor
        q_points : (M, D) tensor
        s_points : (N, D) tensor
        neighbor_indices : (M, H) int32 or int64 tensor, or Neighbors
            -1 and N both mean "no neighbour". Its list is made once, see `kpcore.compat.padded`.
        """
        neighbors = padded.neighbors("neighbor_indices", neighbor_indices, s_points.shape[0])
        return published.named(_NAMES, super().forward, s_points, q_points, neighbors, s_feats)


def maxpool(x: torch.Tensor, neighbor_indices: Matrix) -> torch.Tensor:
    """The maximum over the neighbours of each query, (M, C); a zero takes part in rows with padding, as published.

    Parameters
    ----------
    x : (N, C) tensor
    neighbor_indices : (M, H) int32 or int64 tensor, or Neighbors with a width
    """
    return published.max_pool("neighbor_indices", x, neighbor_indices, 0.0)


def nearest_upsample(x: torch.Tensor, upsample_indices: Matrix) -> torch.Tensor:
    """The features of the neighbours in the first column, (M, C); zeros where it is padding.

    Parameters
    ----------
    x : (N, C) tensor
    upsample_indices : (M, H) int32 or int64 tensor, or Neighbors
    """
    return published.first_pool("upsample_indices", x, upsample_indices)


def global_avgpool(x: torch.Tensor, batch_lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The mean of the rows of each batch item, (B, C); zeros for an item without rows, where the published mean is NaN.

    Parameters
    ----------
    x : (N, C) tensor
    batch_lengths : (B,) tensor of integers, or a sequence
        They must sum to N.
    """
    return published.global_average("batch_lengths", x, batch_lengths)
