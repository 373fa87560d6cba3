"""Layers: torch modules over the operators."""

from __future__ import annotations

import math

import torch

import kpcore
from kpcore.dispositions import _rotation
from kpcore.neighbors import Neighbors


class KPConv(torch.nn.Module):
    """Rigid kernel point convolution with its weights, as a layer; see `kpcore.kpconv`.

    Its state is called as in the published PyTorch code: `weights` and `kernel_points`; checkpoints of that load.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        K, the number of kernel points.
    radius : float
        The mean norm of the kernel points; the published networks take 0.66 of the search radius.
    extent : float
        Distance at which the linear influence reaches zero, in the unit of the points.
    dimension : int
        D.
    influence, aggregation, normalization
        As in `kpcore.kpconv`.
    fixed, rotate
        As in `kpcore.kernel_points`; by default turned about the last axis at random, as published, by torch's
        generator. The published code also moves each point by a hundredth of the radius; this one does not.
    dtype : torch.float32 or torch.float64
        Of the weights and kernel points; torch's default if not given.

    Attributes
    ----------
    weights : (K, in_channels, out_channels) parameter
        Uniform in ±1 / sqrt(in_channels * out_channels), the published initialisation.
    kernel_points : (K, D) buffer

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> points = torch.rand(100, 3)
    >>> neighbors = kpt.radius_search(points, None, 0.3)
    >>> layer = kpt.KPConv(4, 8, radius=0.2, extent=0.15)
    >>> layer(points, None, neighbors, torch.ones(100, 4)).shape
    torch.Size([100, 8])
    >>> [(name, tuple(state.shape)) for name, state in layer.state_dict().items()]
    [('weights', (15, 4, 8)), ('kernel_points', (15, 3))]
    """

    def __init__(self, in_channels, out_channels, kernel_size=15, *, radius, extent, dimension=3, influence="linear",
                 aggregation="sum", normalization=None, fixed="center", rotate="vertical", dtype=None):  # fmt: skip
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        points = kpcore.torch.kernel_points(kernel_size, radius, dimension=dimension, fixed=fixed, dtype=dtype)
        if rotate is not None:
            turn = _rotation(dimension, rotate, int(torch.randint(2**62, ())))
            points = points @ torch.from_numpy(turn).to(dtype)
        self.extent, self.influence, self.aggregation, self.normalization = (
            extent,
            influence,
            aggregation,
            normalization,
        )
        self.weights = torch.nn.Parameter(torch.empty(kernel_size, in_channels, out_channels, dtype=dtype))
        self.register_buffer("kernel_points", points)
        self.reset_parameters()

    def reset_parameters(self):
        """Draw the weights again."""
        bound = 1 / math.sqrt(self.weights[0].numel())
        torch.nn.init.uniform_(self.weights, -bound, bound)

    def extra_repr(self):
        kernel_size, in_channels, out_channels = self.weights.shape
        return f"{in_channels}, {out_channels}, kernel_size={kernel_size}, extent={self.extent:.4g}"

    def forward(self, points, queries, neighbors, features):
        """(M, out_channels).

        Parameters
        ----------
        points : (N, D) tensor
        queries : (M, D) tensor, or None
            None: the points themselves.
        neighbors : Neighbors, or (M, H) int32 or int64 tensor
            A padded matrix, where -1 and N mean none, is converted in every call and not under torch.compile: where
            layers share one, ``Neighbors.from_padded`` once is better.
        features : (N, in_channels) tensor
        """
        if isinstance(neighbors, torch.Tensor):
            neighbors = Neighbors.from_padded(neighbors.numpy(), len(points))
        return kpcore.torch.kpconv(
            points, queries, neighbors, features, self.weights, self.kernel_points, self.extent,
            influence=self.influence, aggregation=self.aggregation, normalization=self.normalization
        )  # fmt: skip
