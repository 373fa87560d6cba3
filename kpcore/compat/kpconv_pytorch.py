"""The layers of KPConv-PyTorch (HuguesTHOMAS/KPConv-PyTorch), with its names, arguments and state.

One line at the end of its ``models/blocks.py`` replaces the class and the functions above it::

    from kpcore.compat.kpconv_pytorch import KPConv, max_pool, closest_pool, global_average

Everything else stays as it is: the blocks and networks, checkpoints, states of optimizers, and the regularization in
``models/architectures.py``, which reads `min_d2` and `deformed_KP` of the layers. `p2p_fitting_regularizer` here has
the same value and takes a fraction of the time.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import padded, published
from kpcore.compat.pools import closest_pool, max_pool
from kpcore.nn import blocks
from kpcore.ops import OPS
from kpcore.torch.layers import draw_uniform, redraw_kernel_points
from kpcore.torch.ops import on_stream_of, to_array, to_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.compat.published import Matrix
    from kpcore.nn.blocks import Geometry

_PLACES = {"num_kpoints": "kernel_size", "dimension": "p_dim", "fixed": "fixed_kernel_points"}
_NAMES = {"points": "s_pts", "queries": "q_pts", "features": "x", "neighbors": "neighb_inds"}
__all__ = ["KPConv", "closest_pool", "global_average", "max_pool", "p2p_fitting_regularizer"]


class KPConv(torch.nn.Module):
    """Kernel point convolution: rigid, deformable, or deformable and modulated.

    Names of parameters, their order, shapes and initialisation are the published ones. The kernel points are a
    parameter that requires no gradient, as there, so that the state of an optimizer of all parameters loads.

    Parameters
    ----------
    kernel_size : int
        K, the number of kernel points.
    p_dim : int
        Dimension of the points, D.
    in_channels, out_channels : int
    KP_extent : float
        Distance at which the linear influence reaches zero.
    radius : float
        Search radius, for a deformable layer that of rigid layers: the kernel points have a mean norm of 0.66 of it.
        More than 30 fill the whole radius.
    fixed_kernel_points : {"center", "verticals", "none"}
    KP_influence : {"linear", "gaussian", "constant"}
    aggregation_mode : {"sum", "closest"}
    deformable, modulated : bool

    Attributes
    ----------
    weights : (K, in_channels, out_channels) parameter
    kernel_points : (K, D) parameter without gradient
    offset_conv, offset_bias
        The rigid convolution that computes the offsets of a deformable layer, and its bias; otherwise None.
    offset_features, deformed_KP, min_d2 : tensors
        Of a deformable layer after a forward pass: the output of `offset_conv` with its bias; the deformed kernel
        points of each query (M, K, D); the squared distance of each to the nearest neighbour (M, K), which is computed
        when it is read. A query without neighbours has some 3e12 there, as published, where the padding is a point at
        1e6. None before, and in a copy of the layer.

    Notes
    -----
    Differences: where a neighbour is at the place of a kernel point, the gradient of offsets and positions is 0, not
    NaN; deformable layers have a gradient with ``KP_influence="gaussian"`` and ``aggregation_mode="closest"`` too.

    ``torch.utils.checkpoint`` needs ``use_reentrant=False``, or the regularization has no gradient. A replica of
    torch.nn.DataParallel keeps what it computes to itself, as it does in the published code.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.kpconv_pytorch import KPConv
    >>> points, features = torch.rand(200, 3), torch.ones(200, 4)
    >>> inds = torch.from_numpy(kpt.radius_search(points, None, 0.5, sort="distance").to_padded(20))
    >>> layer = KPConv(15, 3, 4, 8, KP_extent=0.12, radius=0.25, deformable=True)
    >>> layer(points, points, inds, features).shape
    torch.Size([200, 8])
    >>> layer.min_d2.shape, layer.deformed_KP.shape
    (torch.Size([200, 15]), torch.Size([200, 15, 3]))
    """

    weights: torch.nn.Parameter
    kernel_points: torch.nn.Parameter
    offset_conv: KPConv | None
    offset_bias: torch.nn.Parameter | None
    offset_features: torch.Tensor | None
    deformed_KP: torch.Tensor | None
    _normalization: str | None = None

    def __init__(self, kernel_size: int, p_dim: int, in_channels: int, out_channels: int, KP_extent: float,
                 radius: float, fixed_kernel_points: str = "center", KP_influence: str = "linear",
                 aggregation_mode: str = "sum", deformable: bool = False, modulated: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.K, self.p_dim = kernel_size, p_dim
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        checks.length("KP_extent", KP_extent, np.dtype(np.float32))
        self.radius, self.KP_extent = radius, KP_extent
        self.fixed_kernel_points = fixed_kernel_points
        self.KP_influence, self.aggregation_mode = KP_influence, aggregation_mode
        checks.choice("KP_influence", KP_influence, ("linear", "gaussian", "constant"))
        checks.choice("aggregation_mode", aggregation_mode, ("sum", "closest"))
        self.deformable, self.modulated = deformable, modulated
        self.offset_features = self.deformed_KP = self._where = self._min_d2 = None
        kernel_size = checks.integer("kernel_size", kernel_size, 1)
        self._draw = partial(published.kernel_points, kernel_size, radius, p_dim, fixed_kernel_points,
                             names=_PLACES)  # fmt: skip
        self.weights = torch.nn.Parameter(torch.empty(kernel_size, in_channels, out_channels))
        if deformable:
            self.offset_dim = kernel_size * (p_dim + bool(modulated))
            self.offset_conv = self._rigid(kernel_size, p_dim, in_channels, self.offset_dim, KP_extent, radius,
                                           fixed_kernel_points, KP_influence, aggregation_mode)  # fmt: skip
            self.offset_bias = torch.nn.Parameter(torch.empty(self.offset_dim))
        else:
            self.offset_dim = self.offset_conv = self.offset_bias = None
        self.kernel_points = torch.nn.Parameter(torch.empty(kernel_size, p_dim), requires_grad=False)
        self.reset_parameters()

    @staticmethod
    def _rigid(*arguments: Any) -> KPConv:
        """The convolution for the offsets."""
        return KPConv(*arguments)

    def reset_parameters(self) -> None:
        """Draw new weights and new places of the kernel points, and set the bias of the offsets to zero."""
        redraw_kernel_points(self)
        draw_uniform(self.weights)
        if self.offset_conv is not None:
            self.offset_conv.reset_parameters()
            torch.nn.init.zeros_(self.offset_bias)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied: not the tensors of the last forward pass."""
        return self.__dict__ | dict.fromkeys(("offset_features", "deformed_KP", "_where", "_min_d2"))

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.K}, KP_extent={self.KP_extent:.4g}"
        return text + ", deformable=True" * self.deformable + ", modulated=True" * self.modulated

    def forward(self, q_pts: torch.Tensor, s_pts: torch.Tensor, neighb_inds: Matrix, x: torch.Tensor) -> torch.Tensor:
        """(M, out_channels).

        Parameters
        ----------
        q_pts : (M, D) tensor
        s_pts : (N, D) tensor
        neighb_inds : (M, H) int32 or int64 tensor, or Neighbors
            -1 and N both mean "no neighbour". Its list is made once, see `kpcore.compat.padded`.
        x : (N, in_channels) tensor
        """
        neighbors = padded.neighbors("neighb_inds", neighb_inds, s_pts.shape[0])
        where = s_pts, q_pts, neighbors
        extent = published.influence_extent(self.KP_influence, float(self.KP_extent))
        options = {"influence": self.KP_influence, "aggregation": self.aggregation_mode}
        if not self.deformable:
            return published.named(_NAMES, kpt.kpconv, *where, x, self.weights, self.kernel_points, extent, **options,
                                   normalization=self._normalization)  # fmt: skip
        raw = self.offset_conv(q_pts, s_pts, neighbors, x) + self.offset_bias
        offsets, modulations = blocks.deformation(kpt, self.kernel_points, float(self.KP_extent), raw)
        self.offset_features, self.deformed_KP = raw, self.kernel_points + offsets
        self._where, self._min_d2 = (where, published.version(s_pts), published.version(q_pts)), None
        return published.named(_NAMES, kpt.kpconv, *where, x, self.weights, self.kernel_points, extent, **options,
                               offsets=offsets, modulations=modulations)  # fmt: skip

    @property
    def min_d2(self) -> torch.Tensor | None:
        if self._min_d2 is None and self.deformed_KP is not None:
            # The gradient is that of the forward pass, also if the first to read this is a log under torch.no_grad.
            where, *versions = self._where
            if any(v not in (None, published.version(p)) for v, p in zip(versions, where[:2], strict=True)):
                raise RuntimeError(
                    "min_d2: expected the points of the forward pass, from which it is computed when it is first read, "
                    "got points that were changed in place"
                )
            with torch.set_grad_enabled(self.deformed_KP.requires_grad):
                self._min_d2 = _nearest_distances(where, self.deformed_KP)
        return self._min_d2


def _nearest_distances(where: Geometry, deformed: torch.Tensor) -> torch.Tensor:
    """(M, K) the squared distance of each deformed kernel point (M, K, D) to the nearest neighbour."""
    points, queries, neighbors = where
    rigid = torch.zeros_like(deformed[0] if len(deformed) else deformed.new_empty(deformed.shape[1:]))

    def search() -> torch.Tensor:
        arrays = [to_array(name, t) for name, t in zip(("s_pts", "q_pts"), (points, queries), strict=True)]
        moved = to_array("kernel_points", rigid), to_array("offsets", deformed)
        op = OPS["fitting_loss"]
        _, (nearest,) = op.compute(op.check(*arrays, neighbors, *moved, 1.0))
        return to_tensor(nearest)

    nearest = on_stream_of(points, search).long()  # -1 without neighbours: the padding, which is the last row here
    padding = points.new_full((1, points.shape[1]), published.PADDING)
    return (torch.cat([points, padding])[nearest] - queries[:, None] - deformed).square().sum(2)


def p2p_fitting_regularizer(net: torch.nn.Module) -> torch.Tensor | float:
    """The regularization of all deformable layers of a network, as in ``models/architectures.py``.

    The sum over the layers of twice the mean of ``min_d2 / KP_extent**2`` and `kpcore.repulsion_loss`, times
    ``net.deform_fitting_power``, with ``net.repulse_extent`` in units of the extent of a layer.

    Parameters
    ----------
    net : torch.nn.Module
        With these two attributes, as the published networks have them, after a forward pass.

    Returns
    -------
    () tensor; 0 for a network without deformable layers

    Raises
    ------
    RuntimeError
        If a deformable layer had no forward pass, or only in replicas of torch.nn.DataParallel.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.kpconv_pytorch import KPConv, p2p_fitting_regularizer
    >>> net = torch.nn.ModuleList([KPConv(15, 3, 4, 8, 0.12, 0.25, deformable=True)])
    >>> net.deform_fitting_power, net.repulse_extent = 1.0, 1.2
    >>> points, features = torch.rand(200, 3), torch.ones(200, 4)
    >>> inds = torch.from_numpy(kpt.radius_search(points, None, 0.5).to_padded())
    >>> loss = net[0](points, points, inds, features).square().mean() + p2p_fitting_regularizer(net)
    >>> loss.backward()
    >>> bool(net[0].offset_conv.weights.grad.any())
    True
    """
    fitting: torch.Tensor | float = 0.0
    repulsion: torch.Tensor | float = 0.0
    for name, layer in net.named_modules():
        if not isinstance(layer, KPConv) or not layer.deformable:
            continue
        kernel_points, least = layer.deformed_KP, layer.min_d2
        if kernel_points is None or least is None:
            raise RuntimeError(
                "net: expected a forward pass of every deformable layer, outside of torch.nn.DataParallel, got none of "
                f"{name or 'the layer'}"
            )
        fitting = fitting + least.sum() / (max(1, least.numel()) * layer.KP_extent**2)
        repulsion = repulsion + kpt.repulsion_loss(
            torch.zeros_like(layer.kernel_points), kernel_points, layer.KP_extent, repulse_extent=net.repulse_extent
        )
    return net.deform_fitting_power * (2 * fitting + repulsion)


def global_average(x: torch.Tensor, batch_lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The mean of the rows of each batch item, (B, C); zeros for an item without rows, where the published mean is NaN.

    Parameters
    ----------
    x : (N, C) tensor
    batch_lengths : (B,) tensor of integers, or a sequence
        They must sum to N.
    """
    return published.global_average("batch_lengths", x, batch_lengths)
