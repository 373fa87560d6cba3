"""The layers of ml-kpconvx (apple/ml-kpconvx), with its names, arguments and state.

One line at the end of a file replaces what is above it, in ``models/kpconv_blocks.py``, ``kpnext_blocks.py`` and
``generic_blocks.py`` of ``Standalone/KPConvX``, and in the files with these names in ``Pointcept-wrapper``::

    from kpcore.compat.kpconvx import KPConv, KPMini
    from kpcore.compat.kpconvx import KPConvD, KPConvX
    from kpcore.compat.kpconvx import global_avgpool, local_maxpool, local_nearest_pool

What cannot be had is an error: ``Cmid`` above 0, ``influence_mode="mlp"``, ``use_geom`` and the class KPDef, which may
stay as it is.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import kpcore.torch as kpt
from kpcore.backends import checks
from kpcore.compat import padded, published
from kpcore.torch.layers import draw_uniform, drawn_kernel_points, redraw_kernel_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.compat.published import Matrix

__all__ = ["KPConv", "KPConvD", "KPConvX", "KPDef", "KPMini", "global_avgpool", "local_maxpool", "local_nearest_pool"]

_NAMES = {"points": "s_pts", "queries": "q_pts", "features": "s_feats", "neighbors": "neighb_inds"}
_ACTIVATION = torch.nn.LeakyReLU(0.1)
_INFLUENCES = ("linear", "gaussian", "constant")
_AGGREGATIONS = {"sum": "sum", "nearest": "closest"}  # {name there: name in kpcore}


class KPConv(torch.nn.Module):
    """Rigid kernel point convolution, in groups or depthwise, and with modulations.

    Names of parameters and buffers, their order, shapes and initialisation are the published ones.

    Parameters
    ----------
    in_channels, out_channels : int
    shell_sizes : sequence of int
        The kernel points of each shell, from 1 at the centre outwards.
    radius : float
        Radius of the ball that the shells fill.
    sigma : float
        Distance at which the linear influence reaches zero.
    shared_kp_data : dict, optional
        Layers with the same dict have the same kernel points, those of the first.
    modulated : bool
        Whether each kernel point of a query has a factor, twice the sigmoid of a linear map of the query's features;
        those of the point itself if there are as many queries as points, else the mean over the row of
        `neighb_inds`, in which padding counts as zeros. As published, a depthwise convolution of more than 25 kernel
        points with ``aggregation_mode="nearest"`` has the linear map, and does not use it.
    use_geom : bool
        Only False.
    groups : int
        A divisor of both numbers of channels; -1 for as many as there are channels of the input.
    dimension : int
    influence_mode : {"linear", "gaussian", "constant"}
    aggregation_mode : {"sum", "nearest"}
    fixed_kernel_points : {"center", "verticals"}
    norm_type, bn_momentum, activation
        Of options that are not supported; without effect.
    inf : float
        Has no effect: padding is left out, not moved far away.

    Notes
    -----
    Positions have no gradient, as published. Differences: -1 means "no neighbour" too; layers that share kernel points
    share nothing else, so they may have other neighbours; the kernel points are not moved at random by a thousandth of
    the radius.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.kpconvx import KPConv
    >>> points, feats = torch.rand(200, 3), torch.ones(200, 4)
    >>> inds = torch.from_numpy(kpt.knn_search(points, None, 12).to_padded())
    >>> layer = KPConv(4, 8, [1, 14], radius=0.25, sigma=0.25, groups=2, aggregation_mode="nearest")
    >>> layer(points, points, feats, inds).shape, layer.weights.shape
    (torch.Size([200, 8]), torch.Size([15, 2, 2, 4]))
    """

    weights: torch.nn.Parameter
    kernel_points: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, shell_sizes: Sequence[int], radius: float, sigma: float,
                 shared_kp_data: dict[str, Any] | None = None, modulated: bool = False, use_geom: bool = False,
                 groups: int = 1, dimension: int = 3, influence_mode: str = "linear", aggregation_mode: str = "sum",
                 fixed_kernel_points: str = "center", norm_type: str = "batch", bn_momentum: float = 0.1,
                 activation: torch.nn.Module | None = _ACTIVATION, inf: float = 1e6) -> None:  # fmt: skip
        super().__init__()
        published.only("use_geom", use_geom, False, "positions are not encoded as features")
        _check_influence(influence_mode)
        checks.choice("aggregation_mode", aggregation_mode, tuple(_AGGREGATIONS))
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        self.groups = groups = in_channels if groups == -1 else checks.integer("groups", groups, 1)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels} channels, got {groups}")
        self.shell_sizes, self.radius, self.sigma, self.dimension = shell_sizes, radius, sigma, dimension
        self.influence_mode, self.aggregation_mode, self.inf = influence_mode, aggregation_mode, inf
        self.fixed_kernel_points, self.modulated, self.use_geom = fixed_kernel_points, modulated, use_geom
        self._draw = partial(drawn_kernel_points, shell_sizes, radius, "vertical", dimension=dimension,
                             fixed=fixed_kernel_points, method="shells", name="shell_sizes")  # fmt: skip
        points = self._draw()
        self.K = len(points)
        self.gather_mode = groups == in_channels and aggregation_mode == "nearest" and self.K > 25
        shape = self.K, groups, in_channels // groups, out_channels // groups
        self.weights = torch.nn.Parameter(points.new_empty(shape))
        if modulated:
            self.gen_mlp = torch.nn.Linear(in_channels, self.K)
        self.register_buffer("kernel_points", points)
        _share(self, shared_kp_data)
        draw_uniform(self.weights)

    def reset_parameters(self) -> None:
        """Draw new weights and a new rotation of the kernel points."""
        redraw_kernel_points(self)
        draw_uniform(self.weights)
        if self.modulated:
            self.gen_mlp.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.K}, sigma={self.sigma:.4g}"

    def forward(self, q_pts: torch.Tensor, s_pts: torch.Tensor, s_feats: torch.Tensor,
                neighb_inds: Matrix) -> torch.Tensor:  # fmt: skip
        """(M, out_channels).

        Parameters
        ----------
        q_pts : (M, D) tensor
        s_pts : (N, D) tensor
        s_feats : (N, in_channels) tensor
        neighb_inds : (M, H) int32 or int64 tensor, or Neighbors
            -1 and N both mean "no neighbour". Its list is made once, see `kpcore.compat.padded`.
        """
        neighbors, modulations = padded.neighbors("neighb_inds", neighb_inds, s_pts.shape[0]), None
        if self.modulated and not self.gather_mode:
            sources = s_feats
            if q_pts.shape[0] != s_pts.shape[0]:
                if neighbors.width is None:
                    raise ValueError("neighb_inds: expected a matrix, or Neighbors with a width, got Neighbors without")
                sources = kpt.neighbor_reduce(s_feats, neighbors, "sum") / max(1, neighbors.width)
            modulations = 2 * torch.sigmoid(self.gen_mlp(sources))
        weights, groups = published.ungrouped(self.weights)
        return published.named(
            _NAMES, kpt.kpconv, s_pts.detach(), q_pts.detach(), neighbors, s_feats, weights, self.kernel_points,
            published.influence_extent(self.influence_mode, self.sigma), influence=self.influence_mode,
            aggregation=_AGGREGATIONS[self.aggregation_mode], groups=groups, modulations=modulations
        )  # fmt: skip


def _set_sigma(layer: Any, sigma: float) -> None:
    layer._sigma, layer.extent = sigma, published.influence_extent(layer.influence, sigma)


_SIGMA = property(lambda layer: layer._sigma, _set_sigma)


class KPConvD(kpt.KPConvX):
    """Depthwise kernel point convolution in which each neighbour has the weights of its nearest kernel point.

    Names of parameters and buffers, their order, shapes and initialisation are the published ones.

    Parameters
    ----------
    channels : int
        C, of the input and of the output.
    shell_sizes, radius, sigma, shared_kp_data, dimension, fixed_kernel_points, norm_type, bn_momentum, activation, inf
        As in `KPConv`.
    Cmid : int
        Only 0.
    influence_mode : {"linear", "gaussian", "constant"}
        "mlp" is not supported.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.kpconvx import KPConvD
    >>> points, feats = torch.rand(200, 3), torch.ones(200, 16)
    >>> inds = torch.from_numpy(kpt.knn_search(points, None, 12).to_padded())
    >>> layer = KPConvD(16, [1, 14, 28], radius=0.25, sigma=0.25)
    >>> layer(points, points, feats, inds).shape, list(layer.state_dict())
    (torch.Size([200, 16]), ['weights', 'kernel_points'])
    """

    sigma = _SIGMA

    def __init__(self, channels: int, shell_sizes: Sequence[int], radius: float, sigma: float, Cmid: int = 0,
                 shared_kp_data: dict[str, Any] | None = None, dimension: int = 3, influence_mode: str = "linear",
                 fixed_kernel_points: str = "center", norm_type: str = "batch", bn_momentum: float = 0.1,
                 activation: torch.nn.Module | None = _ACTIVATION, inf: float = 1e6) -> None:  # fmt: skip
        published.only("Cmid", Cmid, 0, "only depthwise weights are supported")
        _check_influence(influence_mode)
        super().__init__(
            channels, shell_sizes, radius=radius, extent=published.influence_extent(influence_mode, sigma),
            attention_groups=None, dimension=dimension, influence=influence_mode, fixed=fixed_kernel_points
        )  # fmt: skip
        _keep_settings(self, channels, shell_sizes, radius, sigma, dimension, influence_mode, fixed_kernel_points, inf)
        self.Cmid = Cmid
        _share(self, shared_kp_data)

    def forward(self, q_pts: torch.Tensor, s_pts: torch.Tensor, s_feats: torch.Tensor,  # type: ignore[override]
                neighb_inds: Matrix) -> torch.Tensor:  # fmt: skip
        """(M, C), see `KPConv.forward`."""
        neighbors = padded.neighbors("neighb_inds", neighb_inds, s_pts.shape[0])
        return published.named(_NAMES, super().forward, s_pts.detach(), q_pts.detach(), neighbors, s_feats)


KPMini = KPConvD  # its name in kpconv_blocks.py


class KPConvX(kpt.KPConvX):
    """KPConvD with attention over the kernel points of each query.

    Names of parameters and buffers, their order, shapes and initialisation are the published ones. The attention is
    computed from the features of the point itself if there are as many queries as points, else from those of the
    neighbour in the first column of `neighb_inds`, or from zeros where it is padding.

    Parameters
    ----------
    channels, shell_sizes, radius, sigma, shared_kp_data, dimension, influence_mode, fixed_kernel_points, norm_type, \
bn_momentum, inf
        As in `KPConvD`.
    attention_groups : int
        G: C / G numbers for each kernel point, each shared by G consecutive channels. Negative for G = C / -number.
    attention_act : {"sigmoid", "tanh", "softmax", "none"}
    mod_grp_norm : bool
        Whether the numbers of a kernel point are normalised before that, over all points of the batch together.
    activation : torch.nn.Module
        Between the two linear layers of the attention.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> from kpcore.compat.kpconvx import KPConvX
    >>> points, feats = torch.rand(200, 3), torch.ones(200, 16)
    >>> inds = torch.from_numpy(kpt.knn_search(points, None, 12).to_padded())
    >>> layer = KPConvX(16, [1, 14, 28], radius=0.25, sigma=0.25, attention_groups=4, mod_grp_norm=True)
    >>> layer(points, points, feats, inds).shape, layer.alpha_mlp[3].weight.shape
    (torch.Size([200, 16]), torch.Size([172, 16]))
    """

    sigma = _SIGMA

    def __init__(self, channels: int, shell_sizes: Sequence[int], radius: float, sigma: float,
                 attention_groups: int = 8, attention_act: str = "sigmoid", mod_grp_norm: bool = False,
                 shared_kp_data: dict[str, Any] | None = None, dimension: int = 3, influence_mode: str = "linear",
                 fixed_kernel_points: str = "center", norm_type: str = "batch", bn_momentum: float = 0.1,
                 activation: torch.nn.Module = _ACTIVATION, inf: float = 1e6) -> None:  # fmt: skip
        _check_influence(influence_mode)
        checks.choice("attention_act", attention_act, ("sigmoid", "tanh", "softmax", "none"))
        channels = checks.integer("channels", channels, 1)
        attention_groups = checks.integer("attention_groups", attention_groups, -channels)
        shared = attention_groups if attention_groups > 0 else channels // (-attention_groups or channels + 1)
        if not shared or channels % (attention_groups or 1):
            raise ValueError(f"attention_groups: expected ± a divisor of {channels} channels, got {attention_groups}")
        if not isinstance(activation, torch.nn.Module):
            raise TypeError(f"activation: expected a torch.nn.Module, got {type(activation).__name__}")
        super().__init__(
            channels, shell_sizes, radius=radius, extent=published.influence_extent(influence_mode, sigma),
            attention_groups=shared, attention_activation=None if attention_act == "none" else attention_act,
            attention_norm=mod_grp_norm, dimension=dimension, influence=influence_mode, fixed=fixed_kernel_points
        )  # fmt: skip
        _keep_settings(self, channels, shell_sizes, radius, sigma, dimension, influence_mode, fixed_kernel_points, inf)
        self.groups, self.ch_per_grp, self.mod_grp_norm = shared, channels // shared, mod_grp_norm
        self.alpha_mlp[2] = activation
        self.grpnorm.requires_grad_(True)  # as published, also where it is not used
        _share(self, shared_kp_data)

    def forward(self, q_pts: torch.Tensor, s_pts: torch.Tensor, s_feats: torch.Tensor,  # type: ignore[override]
                neighb_inds: Matrix) -> torch.Tensor:  # fmt: skip
        """(M, C), see `KPConv.forward`."""
        neighbors = padded.neighbors("neighb_inds", neighb_inds, s_pts.shape[0])
        sources = s_feats
        if q_pts.shape[0] != s_pts.shape[0]:
            sources = published.first_pool("neighb_inds", s_feats, neighb_inds)
        return published.named(_NAMES, super().forward, s_pts.detach(), q_pts.detach(), neighbors, s_feats, sources)


class KPDef(torch.nn.Module):
    """Not supported: a layer of its name raises NotImplementedError when it is made."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError(
            "KPDef: its offsets, which a linear layer computes, are not supported; keep the published class, or take "
            "kpcore.torch.DeformableKPConv, in which a convolution computes them"
        )


def _check_influence(influence_mode: str) -> None:
    if influence_mode == "mlp":
        raise NotImplementedError(
            f"influence_mode: expected one of {', '.join(_INFLUENCES)}, because weights that an MLP computes from "
            "positions are not supported, got 'mlp'"
        )
    checks.choice("influence_mode", influence_mode, _INFLUENCES)


def _keep_settings(layer: Any, channels: int, shell_sizes: Sequence[int], radius: float, sigma: float, dimension: int,
                   influence_mode: str, fixed_kernel_points: str, inf: float) -> None:  # fmt: skip
    """The attributes that the published classes have."""
    layer.channels, layer.shell_sizes, layer.K = channels, shell_sizes, len(layer.weights)
    layer.radius, layer.sigma, layer.dimension, layer.inf = radius, sigma, dimension, inf
    layer.influence_mode, layer.fixed_kernel_points = influence_mode, fixed_kernel_points


def _share(layer: Any, shared_kp_data: dict[str, Any] | None) -> None:
    """Give a layer the kernel points of the first layer that had the same dict."""
    if shared_kp_data is not None:
        points = shared_kp_data.setdefault("k_pts", layer.kernel_points)
        if points.shape != layer.kernel_points.shape:
            raise ValueError(
                f"shared_kp_data: expected kernel points {tuple(layer.kernel_points.shape)} to match shell_sizes, got "
                f"{tuple(points.shape)}"
            )
        layer.kernel_points = points


def local_maxpool(x: torch.Tensor, inds: Matrix) -> torch.Tensor:
    """The maximum over the neighbours of each query, (M, C); -1e6 where there is none, as published.

    Parameters
    ----------
    x : (N, C) tensor
    inds : (M, H) int32 or int64 tensor, or Neighbors with a width
    """
    return published.max_pool("inds", x, inds, -1e6)


def local_nearest_pool(x: torch.Tensor, inds: Matrix) -> torch.Tensor:
    """The features of the neighbours in the first column, (M, C); zeros where it is padding.

    Parameters
    ----------
    x : (N, C) tensor
    inds : (M, H) int32 or int64 tensor, or Neighbors
    """
    return published.first_pool("inds", x, inds)


def global_avgpool(x: torch.Tensor, lengths: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """The mean of the rows of each batch item, (B, C); zeros for an item without rows, where the published mean is NaN.

    Parameters
    ----------
    x : (N, C) tensor
    lengths : (B,) tensor of integers, or a sequence
        They must sum to N.
    """
    return published.global_average("lengths", x, lengths)
