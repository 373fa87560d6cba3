"""The convolutions of kpcore as torch modules with their weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

import kpcore
from kpcore.backends import checks
from kpcore.dispositions import random_rotation, rotated
from kpcore.neighbors import Neighbors
from kpcore.nn import blocks
from kpcore.torch.ops import padded_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.nn.blocks import Geometry

_ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda logits: torch.softmax(logits, 1),
    None: lambda logits: logits,
}


class KPConv(torch.nn.Module):
    """Rigid kernel point convolution with its weights, as a layer; see `kpcore.kpconv`.

    Parameters and buffers have the names of the published PyTorch code, `weights` and `kernel_points`, so that its
    checkpoints load.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int, or with ``method="shells"`` a sequence of int
        K, the number of kernel points; with "shells" the number of points of each shell, the first of which is 1.
    radius : float
        The mean norm of the kernel points; 0.66 of the search radius in the published networks.
    extent : float
        Distance at which the linear influence reaches zero, in the unit of the points.
    dimension : int
        D.
    influence, aggregation, normalization
        As in `kpcore.kpconv`.
    groups : int
        A divisor of both numbers of channels: part i of the output is computed from part i of the input only. If there
        are as many groups as channels of the input and of the output, the convolution is depthwise.
    bias : bool
        Whether to add a bias to the output, after the normalization.
    fixed, method, rotate
        As in `kpcore.kernel_points`. By default the kernel points are rotated about the last axis by a random angle
        from torch's generator, as published. The published code also moves each point at random by a hundredth of the
        radius; this layer does not.
    learn_kernel_points : bool
        Whether the kernel points are a parameter. They are positions in the unit of the points: give them a learning
        rate apart from the others, proportional to the square of the extent.
    dtype : torch.float32 or torch.float64
        The dtype of the weights and kernel points; by default torch's default dtype.

    Attributes
    ----------
    weights : (K, in_channels / groups, out_channels) parameter, depthwise (K, in_channels)
        Uniform in ±1 / sqrt(in_channels / groups * out_channels), depthwise in ±1 / sqrt(in_channels), the published
        initialisation.
    bias : (out_channels,) parameter, or None
        Uniform in the same limits.
    kernel_points : (K, D) buffer, or parameter

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
    >>> grouped = kpt.KPConv(4, 8, radius=0.2, extent=0.15, groups=2, bias=True)
    >>> [(name, tuple(state.shape)) for name, state in grouped.state_dict().items()]
    [('weights', (15, 2, 8)), ('bias', (8,)), ('kernel_points', (15, 3))]
    """

    weights: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    kernel_points: torch.Tensor
    extent: float
    options: dict[str, Any]

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int] = 15, *, radius: float,
                 extent: float, dimension: int = 3, influence: str = "linear", aggregation: str = "sum",
                 normalization: str | None = None, groups: int = 1, bias: bool = False, fixed: str = "center",
                 method: str = "potential", rotate: str | None = "vertical", learn_kernel_points: bool = False,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        shape, groups = _grouped(in_channels, out_channels, groups)
        self._draw = partial(drawn_kernel_points, kernel_size, radius, rotate, dimension=dimension, fixed=fixed,
                             method=method)  # fmt: skip
        points = self._draw(dtype=dtype)
        self.extent = extent
        self.options = {"influence": influence, "aggregation": aggregation, "normalization": normalization,
                        "groups": groups}  # fmt: skip
        self.weights = torch.nn.Parameter(points.new_empty(len(points), *shape))
        self.register_parameter("bias", _new_bias(bias, self.weights))
        if checks.boolean("learn_kernel_points", learn_kernel_points):
            self.kernel_points = torch.nn.Parameter(points)
        else:
            self.register_buffer("kernel_points", points)
        draw_uniform(self.weights, self.bias)

    def reset_parameters(self) -> None:
        """Draw new weights, a new bias and a new rotation of the kernel points."""
        redraw_kernel_points(self)
        draw_uniform(self.weights, self.bias)

    def extra_repr(self) -> str:
        return _described(self)

    def forward(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                features: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """(M, out_channels).

        Parameters
        ----------
        points : (N, D) tensor
        queries : (M, D) tensor, or None
            None: the points themselves.
        neighbors : Neighbors, or (M, H) int32 or int64 tensor
            In a padded matrix, -1 and N both mean "no neighbour". It is converted in every call, and is an error under
            torch.compile; if several layers share one, convert it once with ``Neighbors.from_padded``.
        features : (N, in_channels) tensor
        """
        out = kpcore.torch.kpconv(
            points, queries, _as_neighbors(neighbors, points), features, self.weights, self.kernel_points, self.extent,
            **self.options
        )  # fmt: skip
        return out if self.bias is None else out + self.bias


class DeformableKPConv(torch.nn.Module):
    """Deformable kernel point convolution (Thomas et al. 2019, section 3.2), as a layer; see `kpcore.kpconv`.

    A rigid convolution, `offset_conv`, computes D numbers for each query and kernel point, and with `modulated` one
    more: ``raw = offset_conv(...) + offset_bias``. The first K D of them, times `extent`, are the offsets of the kernel
    points; twice the sigmoid of the last K are the modulations. Parameters and buffers have the names of the published
    PyTorch code, so that its checkpoints load.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As in `KPConv`.
    groups, bias
        As in `KPConv`, for the deformable convolution. The one that computes the offsets has no groups and always has
        its bias.
    radius, extent, dimension, influence, aggregation, normalization, fixed, method, rotate, dtype
        As in `KPConv`, for both convolutions. Since the kernel points move, search for neighbours in a larger radius
        than for a rigid layer: the published networks search within 5 voxels for deformable layers and 2.5 for rigid
        ones, and set `radius` to 0.66 of 2.5 voxels in both.
    modulated : bool

    Attributes
    ----------
    weights, bias, kernel_points
        As in `KPConv`; the kernel points are a buffer.
    offset_conv : KPConv
        From `in_channels` to K D channels, or with `modulated` K (D + 1). As in the published PyTorch code, its weights
        are drawn in the same way (they are not zero), and its kernel points are rotated by another angle.
    offset_bias : (K D,) or (K (D + 1),) parameter
        Initially zero. The published training uses a tenth of the learning rate for parameters with "offset" in their
        name.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> points, features = torch.rand(100, 3), torch.rand(100, 4)
    >>> neighbors = kpt.radius_search(points, None, 0.5)
    >>> layer = kpt.DeformableKPConv(4, 8, radius=0.2, extent=0.15)
    >>> layer(points, None, neighbors, features).shape
    torch.Size([100, 8])

    In training, a regularization keeps the kernel points apart from each other and close to the points. The module
    stores nothing between calls, so that it compiles in one graph:

    >>> out, offsets = layer(points, None, neighbors, features, return_offsets=True)
    >>> loss = out.square().mean() + layer.regularization(points, None, neighbors, offsets)
    >>> loss.backward()
    >>> (layer.kernel_points + offsets).shape
    torch.Size([100, 15, 3])
    >>> sorted(layer.state_dict())
    ['kernel_points', 'offset_bias', 'offset_conv.kernel_points', 'offset_conv.weights', 'weights']
    """

    weights: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    kernel_points: torch.Tensor
    extent: float
    modulated: bool
    options: dict[str, Any]
    offset_conv: KPConv
    offset_bias: torch.nn.Parameter

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int] = 15, *, radius: float,
                 extent: float, modulated: bool = False, dimension: int = 3, influence: str = "linear",
                 aggregation: str = "sum", normalization: str | None = None, groups: int = 1, bias: bool = False,
                 fixed: str = "center", method: str = "potential", rotate: str | None = "vertical",
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        shape, groups = _grouped(in_channels, out_channels, groups)
        places = {"dimension": dimension, "fixed": fixed, "method": method}
        self._draw = partial(drawn_kernel_points, kernel_size, radius, rotate, **places)
        points = self._draw(dtype=dtype)
        self.extent, self.modulated = extent, modulated
        options = {"influence": influence, "aggregation": aggregation, "normalization": normalization}
        self.options = options | {"groups": groups}
        self.weights = torch.nn.Parameter(points.new_empty(len(points), *shape))
        self.register_parameter("bias", _new_bias(bias, self.weights))
        self.register_buffer("kernel_points", points)
        num_raw = len(points) * (dimension + bool(modulated))
        self.offset_conv = KPConv(in_channels, num_raw, kernel_size, radius=radius, extent=extent, rotate=rotate,
                                  dtype=dtype, **places, **options)  # fmt: skip
        self.offset_bias = torch.nn.Parameter(points.new_zeros(num_raw))
        draw_uniform(self.weights, self.bias)

    def reset_parameters(self) -> None:
        """Draw new weights, a new bias and new rotations of the kernel points, and set the offsets' bias to zero."""
        redraw_kernel_points(self)
        self.offset_conv.reset_parameters()
        torch.nn.init.zeros_(self.offset_bias)
        draw_uniform(self.weights, self.bias)

    def extra_repr(self) -> str:
        return _described(self) + ", modulated=True" * self.modulated

    @overload
    def forward(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                features: torch.Tensor, return_offsets: Literal[False] = False, *,
                detach_offsets: bool = False) -> torch.Tensor: ...  # fmt: skip
    @overload
    def forward(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                features: torch.Tensor, return_offsets: Literal[True], *,
                detach_offsets: bool = False) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
    def forward(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                features: torch.Tensor, return_offsets: bool = False, *,
                detach_offsets: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(M, out_channels); with `return_offsets` also the offsets (M, K, D), in the unit of the points.

        The deformed kernel points are ``kernel_points + offsets``. `kpcore.fitting_loss` and `kpcore.repulsion_loss`
        take the offsets; `regularization` is the sum of the two that the published code uses.

        Parameters
        ----------
        points, queries, neighbors, features
            As in `KPConv.forward`.
        return_offsets : bool
        detach_offsets : bool
            Whether offsets and modulations are constants of the gradient, as for an effective receptive field.
        """
        neighbors = _as_neighbors(neighbors, points)
        raw = self.offset_conv(points, queries, neighbors, features) + self.offset_bias
        if checks.boolean("detach_offsets", detach_offsets):
            raw = raw.detach()
        out, offsets = blocks.deformed(kpcore.torch, (points, queries, neighbors), features, self.weights,
                                       self.kernel_points, self.extent, raw, self.options)  # fmt: skip
        if self.bias is not None:
            out = out + self.bias
        return (out, offsets) if return_offsets else out

    def regularization(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                       offsets: torch.Tensor, repulse_extent: float = 1.2) -> torch.Tensor:  # fmt: skip
        """``2 * fitting_loss + repulsion_loss``, which the published PyTorch code adds to the loss for every layer.

        Parameters
        ----------
        points, queries, neighbors
            As in the call that returned the offsets.
        offsets : (M, K, D) tensor
        repulse_extent : float
            As in `kpcore.repulsion_loss`.

        Returns
        -------
        () tensor
        """
        where: Geometry = points, queries, _as_neighbors(neighbors, points)
        return blocks.regularization(kpcore.torch, where, self.kernel_points, offsets, self.extent,
                                     repulse_extent=repulse_extent)  # fmt: skip


class KPConvX(torch.nn.Module):
    """Depthwise kernel point convolution with attention over its kernel points, as a layer; see `kpcore.kpconvx`.

    The attention of a query with features f_q is ``activation(group_norm(L2 leaky_relu(L1 f_q + b)))`` (Thomas et al.
    2024): A numbers for each kernel point, each shared by `attention_groups` consecutive channels. The group
    normalisation is left out unless `attention_norm` is True; without attention the layer is KPConvD. Parameters and
    buffers have the names of the published code, so that its checkpoints load. As there, positions have no gradient
    when there is attention.

    Parameters
    ----------
    channels : int
        C, of the input and of the output.
    shell_sizes : sequence of int
        The kernel points of each shell, from 1 at the centre outwards.
    radius : float
        Radius of the ball that the shells fill, see `kpcore.kernel_points`; the search radius in the published
        networks.
    extent : float
        Distance at which the linear influence reaches zero; the search radius in the published networks.
    attention_groups : int or None
        How many channels share one number of the attention; a divisor of C; 4 (S3DIS) or 8 in the published networks.
        None: no attention (KPConvD).
    attention_activation : {"sigmoid", "tanh", "softmax", None}
        The softmax runs over the K A numbers of a query, as published.
    attention_norm : bool
        Whether to normalise the attention of each kernel point before the activation, over its A numbers of all queries
        in the batch together, as published.
    dimension, influence, fixed, rotate, dtype
        As in `KPConv`. The published code also moves each kernel point by a thousandth of the radius.

    Attributes
    ----------
    weights : (K, C) parameter
        Uniform in ±1 / sqrt(C), the published initialisation.
    kernel_points : (K, D) buffer
    alpha_mlp : torch.nn.Sequential
        The two linear layers of the attention, C to C to K A, with torch's default initialisation; the bias b,
        initially zero, is `alpha_mlp.1.norm.bias`.
    grpnorm : torch.nn.GroupNorm
        K groups of A numbers. As in the published state it exists even if `attention_norm` is False; then it requires
        no gradient.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> points = torch.rand(100, 3)
    >>> neighbors = kpt.knn_search(points, None, 16)
    >>> layer = kpt.KPConvX(32, radius=0.3, extent=0.3, attention_groups=8)
    >>> layer(points, None, neighbors, torch.ones(100, 32)).shape
    torch.Size([100, 32])
    >>> list(layer.state_dict())[:2], list(layer.alpha_mlp.state_dict()), list(layer.grpnorm.state_dict())
    (['weights', 'kernel_points'], ['0.weight', '1.norm.bias', '3.weight'], ['weight', 'bias'])
    >>> list(kpt.KPConvX(32, radius=0.3, extent=0.3, attention_groups=None).state_dict())
    ['weights', 'kernel_points']
    """

    weights: torch.nn.Parameter
    kernel_points: torch.Tensor
    extent: float
    influence: str
    attention_groups: int | None
    attention_activation: str | None  # this and the attributes below exist only with attention
    attention_norm: bool
    alpha_mlp: torch.nn.Sequential
    grpnorm: torch.nn.GroupNorm

    def __init__(self, channels: int, shell_sizes: Sequence[int] = (1, 14, 28), *, radius: float, extent: float,
                 attention_groups: int | None = 8, attention_activation: str | None = "sigmoid",
                 attention_norm: bool = False, dimension: int = 3, influence: str = "linear", fixed: str = "center",
                 rotate: str | None = "vertical", dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__()
        channels = checks.integer("channels", channels, 1)
        self._draw = partial(drawn_kernel_points, shell_sizes, radius, rotate, dimension=dimension, fixed=fixed,
                             method="shells", name="shell_sizes")  # fmt: skip
        points = self._draw(dtype=dtype)
        kernel_size, dtype = len(points), points.dtype
        self.extent, self.influence, self.attention_groups = extent, influence, attention_groups
        self.weights = torch.nn.Parameter(points.new_empty(kernel_size, channels))
        self.register_buffer("kernel_points", points)
        if attention_groups is not None:
            attention_groups = checks.integer("attention_groups", attention_groups, 1)
            if channels % attention_groups:
                raise ValueError(f"attention_groups: expected a divisor of {channels} channels, got {attention_groups}")
            checks.choice("attention_activation", attention_activation, tuple(_ACTIVATIONS))
            self.attention_activation, self.attention_norm = attention_activation, attention_norm
            num_logits = kernel_size * (channels // attention_groups)
            self.alpha_mlp = torch.nn.Sequential(
                torch.nn.Linear(channels, channels, bias=False, dtype=dtype),
                torch.nn.Sequential(OrderedDict(norm=_Bias(channels, dtype))),
                torch.nn.LeakyReLU(0.1),
                torch.nn.Linear(channels, num_logits, bias=False, dtype=dtype),
            )
            self.grpnorm = torch.nn.GroupNorm(kernel_size, num_logits, dtype=dtype)
            self.grpnorm.requires_grad_(bool(attention_norm))
        draw_uniform(self.weights)

    def reset_parameters(self) -> None:
        """Draw new weights and a new rotation of the kernel points, and reset all other parameters."""
        redraw_kernel_points(self)
        if self.attention_groups is not None:
            for module in (*self.alpha_mlp[::3], *self.alpha_mlp[1], self.grpnorm):
                module.reset_parameters()
        draw_uniform(self.weights)

    def extra_repr(self) -> str:
        kernel_size, channels = self.weights.shape
        text = f"{channels}, kernel_size={kernel_size}, extent={self.extent:.4g}"
        return f"{text}, attention_groups={self.attention_groups}"

    def forward(self, points: torch.Tensor, queries: torch.Tensor | None, neighbors: Neighbors | torch.Tensor,
                features: torch.Tensor, query_features: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """(M, C).

        Parameters
        ----------
        points, queries, neighbors, features
            As in `KPConv.forward`.
        query_features : (M, C) tensor, optional
            Features from which the attention is computed. By default `features`, if `queries` is None or the same
            tensor object as `points`; required for other queries. The published code takes `features` whenever there
            are as many queries as points, else those of each query's first neighbour, which is the nearest if lists are
            sorted by distance: ``kpt.nearest_upsample(features, neighbors)``.
        """
        neighbors = _as_neighbors(neighbors, points)
        if self.attention_groups is None:
            return kpcore.torch.kpconv(
                points, queries, neighbors, features, self.weights, self.kernel_points, self.extent,
                influence=self.influence, aggregation="closest"
            )  # fmt: skip
        if query_features is None:
            if queries is not None and queries is not points:  # values are not compared
                raise ValueError(
                    "query_features: expected (M, C), because queries is neither None nor the tensor passed as points, "
                    "got None; if neighbors is sorted by distance, the features of the nearest point are "
                    "kpcore.torch.nearest_upsample(features, neighbors)"
                )
            query_features = features
        logits, norm = self.alpha_mlp(query_features), self.grpnorm
        if self.attention_norm:
            logits = kpcore.torch.group_norm(logits, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        attention = _ACTIVATIONS[self.attention_activation](logits).unflatten(1, (len(self.weights), -1))
        return kpcore.torch.kpconvx(
            points, queries, neighbors, features, self.weights, attention, self.kernel_points, self.extent,
            influence=self.influence
        )  # fmt: skip


class _Bias(torch.nn.Module):
    """A bias for each channel; the published code has this module in the place of a normalisation."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(channels, dtype=dtype))

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features + self.bias


def _grouped(in_channels: int, out_channels: int, groups: int) -> tuple[tuple[int, ...], int]:
    """(shape of the weights of a kernel point, `groups` for `kpcore.kpconv`) of checked numbers of channels."""
    in_channels = checks.integer("in_channels", in_channels, 1)
    out_channels = checks.integer("out_channels", out_channels, 1)
    groups = checks.integer("groups", groups, 1)
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels} channels, got {groups}")
    if groups > 1 and groups == in_channels == out_channels:
        return (in_channels,), 1
    return (in_channels // groups, out_channels), groups


def _new_bias(bias: bool, weights: torch.Tensor) -> torch.nn.Parameter | None:
    return torch.nn.Parameter(weights.new_empty(weights.shape[-1])) if checks.boolean("bias", bias) else None


def _described(layer: KPConv | DeformableKPConv) -> str:
    """The settings of a layer, as its repr shows them."""
    (kernel_size, *channels), groups = layer.weights.shape, layer.options["groups"]
    in_channels, out_channels = channels[0] * groups, channels[-1]
    groups = out_channels if len(channels) == 1 else groups
    text = f"{in_channels}, {out_channels}, kernel_size={kernel_size}, extent={layer.extent:.4g}"
    return text + f", groups={groups}" * (groups > 1) + ", bias=True" * (layer.bias is not None)


def drawn_kernel_points(num: int | Sequence[int], radius: float, rotate: str | None, *, dimension: int,
                        dtype: torch.dtype | None = None, name: str = "kernel_size", **options: Any
                        ) -> torch.Tensor:  # fmt: skip
    """Kernel points (K, D) with a random rotation from torch's generator, on torch's default device.

    Errors call `num` by `name`.
    """
    dtype, device = torch.get_default_dtype() if dtype is None else dtype, torch.get_default_device()
    with checks.argument_names({"num": name}):
        points = kpcore.torch.kernel_points(num, radius, dimension=dimension, dtype=dtype, **options)
    checks.choice("rotate", rotate, (None, "vertical", "full"))
    if rotate is not None and device.type != "meta":  # on "meta" nothing is drawn, as in torch's layers
        rotation = random_rotation(dimension, rotate, int(torch.randint(2**62, (), device="cpu")))
        points = rotated(points, torch.from_numpy(rotation).to(dtype))
    return points.to(device)


@torch.no_grad()
def redraw_kernel_points(layer: Any) -> None:
    """Compute the `kernel_points` of a layer again with its `_draw`: after `to_empty` their memory is uninitialised."""
    points = layer.kernel_points
    if not points.is_meta:
        with torch.device("cpu"):
            points.copy_(layer._draw(dtype=torch.float64 if points.dtype == torch.float64 else torch.float32))


def draw_uniform(weights: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Draw weights as torch's kaiming_uniform_ with a = sqrt(5), which takes all axes but the first as the fan-in, and
    a bias in the same limits."""
    bound = 1 / math.sqrt(weights[0].numel())
    torch.nn.init.uniform_(weights, -bound, bound)
    if bias is not None:
        torch.nn.init.uniform_(bias, -bound, bound)


def _as_neighbors(neighbors: Neighbors | torch.Tensor, points: torch.Tensor) -> Neighbors:
    """Convert a padded matrix to Neighbors; return Neighbors unchanged."""
    if not isinstance(neighbors, torch.Tensor):
        return neighbors
    if torch.compiler.is_compiling():
        raise TypeError(
            "neighbors: expected kpcore.Neighbors under torch.compile, got a tensor; convert it outside of "
            "the compiled function with Neighbors.from_padded(neighbors.numpy(), len(points))"
        )
    return padded_tensor("neighbors", neighbors, len(points))
