"""KP-CNN and KP-FCNN (Thomas et al. 2019), described by a list of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np

import kpcore
from kpcore.backends import checks
from kpcore.kpconv import AGGREGATIONS, INFLUENCES, NORMALIZATIONS
from kpcore.nn import blocks
from kpcore.nn.blocks import Buffer, Value
from kpcore.pyramid import Pyramid
from kpcore.subsampling import PUBLISHED, common_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from numpy.typing import DTypeLike

    from kpcore.neighbors import Neighbors
    from kpcore.nn.blocks import AnyArray, KernelPlaces, Parameters
    from kpcore.nn.image_networks import ImageNetwork
    from kpcore.nn.kpnext import KPNeXt
    from kpcore.pyramid import Level

_MOST_BLOCKS = 1024  # architecture() makes at most 992
_UPSAMPLINGS = ("nearest_upsample", "kpconv_upsample")
_VARIANTS = ("deformable", "resampled", "strided")  # of the blocks simple and resnetb, in the order of a block's name


if TYPE_CHECKING:  # generic here only: torch does not recognize a generic NamedTuple (Python 3.11) as a named tuple

    class Result(NamedTuple, Generic[Value, Buffer]):
        """The result of a pass through a network."""

        logits: Value
        state: dict[str, Buffer]
        regularization: Value | None

else:

    class Result(NamedTuple):
        """The result of a pass through a network."""

        logits: AnyArray  #: (N, classes), or (B, classes) after a global average
        state: dict[str, AnyArray]  #: the state after the pass; in training with new running statistics
        regularization: AnyArray | None  #: in training a number, if the network has deformable convolutions


def architecture(levels: int = 5, convs: int = 3, *, deformable: int = 0, resampled: int = 0,
                 segment: bool = True, upsample: str = "nearest") -> tuple[str, ...]:  # fmt: skip
    """The list of blocks of the published networks.

    Parameters
    ----------
    levels : int
    convs : int
        Number of blocks with a convolution on each level, including the strided block that leads to it; the first level
        always has two. 2 in the networks of the paper, 3 in the deeper ones of its PyTorch code.
    deformable : int
        How many blocks with a convolution are deformable, counted from the last; 5 in the paper.
    resampled : int
        How many have weights that are resampled for each query (kernel offsets, see `kpcore.kpconv`), counted from the
        last.
    segment : bool
        Whether features are upsampled to the points again (KP-FCNN) or averaged over each batch item (KP-CNN).
    upsample : {"nearest", "kpconv"}
        Whether features are upsampled to those of the nearest coarser point, or by a convolution (section 3.4).

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> architecture(2, 2, deformable=1)
    ('simple', 'resnetb', 'resnetb_strided', 'resnetb_deformable', 'nearest_upsample', 'unary')
    >>> len(architecture()), architecture(segment=False)[-1]
    (22, 'global_average')
    """
    levels, convs = checks.integer("levels", levels, 1, blocks.MOST_LEVELS), checks.integer("convs", convs, 2, 64)
    block_names = ["simple", "resnetb"]
    for _ in range(levels - 1):
        block_names += ["resnetb_strided"] + ["resnetb"] * (convs - 1)
    for name, count in (("resampled", resampled), ("deformable", deformable)):
        count = checks.integer(name, count, 0, len(block_names))
        for i in range(len(block_names) - count, len(block_names)):
            kind, *more = block_names[i].split("_")
            block_names[i] = "_".join([kind, name, *more])
    checks.choice("upsample", upsample, ("nearest", "kpconv"))
    if not segment and upsample != "nearest":
        raise ValueError(f"upsample: expected 'nearest' without segment, as nothing is upsampled, got {upsample!r}")
    return (*block_names, *((f"{upsample}_upsample", "unary") * (levels - 1) if segment else ("global_average",)))


@dataclass(frozen=True)
class Network:
    """The description of a KP-CNN or KP-FCNN, without its parameters.

    It is called with parameters, as a pure function over the operators of `F`: `kpcore`, `kpcore.torch` or
    `kpcore.jax`.

    Parameters
    ----------
    architecture : sequence of str
        Blocks as the published PyTorch code names them: simple, resnetb, each with _deformable and _strided; max_pool;
        then global_average, or nearest_upsample and unary up to the first level. See `architecture`. Besides these,
        simple and resnetb may be _resampled, after _deformable and before _strided; and kpconv_upsample, in the place
        of nearest_upsample, is resnetb_strided mirrored: the finer points are the queries, the coarser ones within the
        radius of their level the neighbours, and the width stays that of the coarser features. The last block may be
        last_unary, on any level: a linear layer to `num_classes` channels in place of the layers for the logits, as in
        networks for registration, which compute a descriptor of each point.
    num_features, num_classes : int
    voxel_size : float
        Voxel size of level 0, in the unit of the points; it doubles with each level.
    dimension : int
        D, 2 or 3.
    width : int
        Channels of the first residual block; they double with each level, and a simple block has half of them. 128 in
        the published code, 64 as the paper counts.
    decoder_width : int or sequence of int, optional
        Channels of level 0 after upsampling, which double with each level; or those of each level but the last, the
        finest first. `width` by default. The networks of the paper have half of it.
    head_width : int, optional
        Channels of the layer before the logits; by default 1024 after a global average, else `width`.
    head_norm : bool
        Whether that layer is normalised, as in the networks of the paper, or has a bias.
    kernel_size : int
        K.
    conv_radius, deform_radius, extent : float
        Search radius, search radius of levels with a deformable block, and extent of the influence, in voxels of the
        level.
    kernel_radius : float
        Mean norm of the kernel points, as a fraction of `conv_radius`.
    influence, aggregation, normalization
        As in `kpcore.kpconv`.
    modulated : bool
        Whether deformable convolutions also modulate their kernel points.
    norm : {"batch", "group", "instance", None}
    norm_groups : int
        Number of groups of the group normalisation, see `nn.Run`.
    momentum : float
        Momentum of the running statistics, see `kpcore.batch_norm`.
    slope : float
        Negative slope of the leaky ReLU.
    always_narrow : bool
        Whether residual blocks have their first linear layer even if it does not change the width, as in the networks
        of the paper.
    pool_pad_value : float, optional
        In a maximum over neighbours, the value that rows shorter than the list's width see in addition; 0 in the
        published PyTorch code, none by default.
    fitting_power : float
        Factor of the regularization of deformable convolutions.
    repulse_extent : float
        The distance in extents up to which deformed kernel points repel each other in it.
    dropout : float
        Dropout rate of the layer before the logits, in training.
    origin : {0, "published"}
        Where the grids of pyramids begin, as in `kpcore.build_pyramid`. "published": radii are exclusive too, as there.
    heads : dict of int by name, optional
        For the labels of parts of objects: a head for each category, with the number of its parts; `num_classes` is
        their sum. Each has its own layer of `head_width` channels before its logits. The network is then called with
        the category of each batch item.
    learn_kernel_points : bool
        Whether kernel points are parameters, called `kernel_points` in their layer and in units of its extent, rather
        than constants. Train them at a smaller learning rate, ``lr_scales={"kernel_points": 0.1}``.
    bias : bool
        Whether convolutions and linear layers have a bias, besides that of the normalisation after them, as in
        GeoTransformer.
    norm_affine : bool
        Whether scale and shift of a normalisation are parameters; otherwise they are constants in the state, one and
        zero, as in Predator.
    norm_together : bool
        Whether group and instance normalisation treat all clouds of a batch as one, as GeoTransformer and Predator do
        with the two clouds of a pair, rather than each batch item separately.
    logits_slope : float, optional
        Negative slope of a leaky ReLU after the logits, 0.1 in Open3D-ML; none by default.
    bottleneck_width : int, optional
        Channels of the features that the decoder gets, if another network stands between encoder and decoder, such as
        the graph network of Predator. The network is then called with a function `between`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> net = kp.nn.Network(kp.nn.architecture(3, 2), num_features=1, num_classes=4, voxel_size=0.04, width=16)
    >>> params, state = net.init(seed=0)
    >>> points = kp.scenes.indoor(20_000).points
    >>> pyramid = net.pyramid(points)
    >>> features = np.ones((len(pyramid[0].points), 1), np.float32)
    >>> result = net(kp, params, state, pyramid, features)
    >>> result.logits.shape == (len(features), 4)
    True
    """

    architecture: Sequence[str]
    num_features: int
    num_classes: int
    voxel_size: float
    dimension: int = 3
    width: int = 128
    decoder_width: int | Sequence[int] | None = None
    head_width: int | None = None
    head_norm: bool = False
    kernel_size: int = 15
    conv_radius: float = 2.5
    deform_radius: float = 5.0
    extent: float = 1.2
    kernel_radius: float = 0.66
    influence: str = "linear"
    aggregation: str = "sum"
    normalization: str | None = None
    modulated: bool = False
    norm: str | None = "batch"
    norm_groups: int = 32
    momentum: float = 0.02
    slope: float = 0.1
    always_narrow: bool = False
    pool_pad_value: float | None = None
    fitting_power: float = 1.0
    repulse_extent: float = 1.2
    dropout: float = 0.0
    origin: int | str = 0
    heads: Mapping[str, int] | None = field(default=None, hash=False)
    learn_kernel_points: bool = False
    bias: bool = False
    norm_affine: bool = True
    norm_together: bool = False
    logits_slope: float | None = None
    bottleneck_width: int | None = None

    def __post_init__(self) -> None:
        single = np.dtype(np.float32)
        if not isinstance(self.architecture, (list, tuple)) or not all(isinstance(b, str) for b in self.architecture):
            raise TypeError(f"architecture: expected a list or tuple of str, got {self.architecture!r}")
        object.__setattr__(self, "architecture", tuple(self.architecture))
        object.__setattr__(self, "origin", common_origin(self.origin))
        _check_architecture(self.architecture)
        blocks.check_fields(self, checks.integer, ("num_features", "num_classes"), 1)
        blocks.check_fields(self, checks.integer, ("kernel_size",), 1, 100)  # the most that kernel_points arranges
        blocks.check_fields(self, checks.integer, ("dimension",), 2, 3)
        blocks.check_fields(self, checks.integer, ("width",), 4)
        if self.width % 4:
            raise ValueError(f"width: expected a multiple of 4, got {self.width}")
        coarsest = 2 ** (self.num_levels - 1)
        if isinstance(self.decoder_width, (list, tuple)):
            widths = tuple(checks.integer("decoder_width", width, 1) for width in self.decoder_width)
            if len(widths) != self.num_levels - 1:
                raise ValueError(f"decoder_width: expected {self.num_levels - 1} numbers, one for each level but the "
                                 f"last, got {len(widths)}")  # fmt: skip
            object.__setattr__(self, "decoder_width", widths)
            blocks.check_channels("decoder_width", max(widths, default=0))
        elif self.decoder_width is not None:
            blocks.check_fields(self, checks.integer, ("decoder_width",), 1)
            blocks.check_channels("decoder_width", self.decoder_width * coarsest)
        widths = [name for name in ("head_width", "bottleneck_width") if getattr(self, name) is not None]
        blocks.check_fields(self, checks.integer, widths, 1)
        for name, most in (("width", coarsest), ("head_width", 1), ("bottleneck_width", 1)):
            blocks.check_channels(name, (getattr(self, name) or 0) * most)
        if self.upsample_levels and min(map(self._decoder_width, range(self.num_levels - 1))) == 1:
            raise ValueError("decoder_width: expected at least 2 with kpconv_upsample, got 1")
        if self.bottleneck_width is not None and self.num_downs == len(self.architecture):
            raise ValueError("bottleneck_width: expected None for an architecture without upsampling, got "
                             f"{self.bottleneck_width}")  # fmt: skip
        blocks.check_fields(self, checks.length, ("voxel_size",), single)
        in_voxels = "conv_radius", "deform_radius", "extent", "kernel_radius", "repulse_extent"
        blocks.check_fields(self, checks.between, in_voxels, *blocks.IN_VOXELS)
        blocks.check_fields(self, checks.between, ("dropout", "momentum"), 0, 1)
        blocks.check_fields(self, checks.between, ("fitting_power",), 0, 10**6)
        blocks.check_fields(self, checks.between, ("slope",), -1, 1)
        if self.pool_pad_value is not None:
            blocks.check_fields(self, checks.between, ("pool_pad_value",), -(10**9), 10**9)
        if self.logits_slope is not None:
            blocks.check_fields(self, checks.between, ("logits_slope",), -1, 1)
        yes_or_no = "head_norm", "modulated", "always_narrow", "learn_kernel_points", "bias", "norm_affine"
        blocks.check_fields(self, checks.boolean, (*yes_or_no, "norm_together"))
        for name, allowed in (("influence", INFLUENCES), ("aggregation", AGGREGATIONS),
                              ("normalization", NORMALIZATIONS)):  # fmt: skip
            checks.choice(name, getattr(self, name), allowed)
        if self.heads is not None:
            object.__setattr__(self, "heads", _checked_heads(self.heads, self.num_classes, self.segments))
        if not self._has_head:
            for name in ("head_width", "head_norm", "heads", "dropout"):
                if value := getattr(self, name):
                    raise ValueError(f"{name}: expected none with last_unary, which stands in place of the layers for "
                                     f"the logits, got {value!r}")  # fmt: skip
        if self.heads is not None and self.logits_slope is not None:
            raise ValueError(f"logits_slope: expected None with heads, got {self.logits_slope}")
        blocks.check_norm(self, self._head_width if self.head_norm and not self.segments else None)

    @property
    def num_levels(self) -> int:
        return 1 + sum(_coarser(block) for block in self.architecture)

    @property
    def num_downs(self) -> int:
        """Number of blocks before the first upsampling."""
        upsamplings = [i for i, block in enumerate(self.architecture) if block in _UPSAMPLINGS]
        return upsamplings[0] if upsamplings else len(self.architecture)

    @property
    def deform_levels(self) -> tuple[int, ...]:
        """The levels with a deformable convolution, which needs the larger neighbourhoods."""
        level, levels = 0, set()
        for block in self.architecture:
            if "deformable" in block:
                levels.add(level)
            level += _coarser(block)
        return tuple(sorted(levels))

    @property
    def upsample_levels(self) -> tuple[int, ...]:
        """The levels to whose points a convolution upsamples."""
        upsamplings = [block for block in self.architecture if block in _UPSAMPLINGS]
        return tuple(level for level, block in enumerate(reversed(upsamplings)) if block == "kpconv_upsample")

    @property
    def segments(self) -> bool:
        """Whether each point gets logits; otherwise each batch item does."""
        return self.architecture[-1] != "global_average"

    @property
    def output_level(self) -> int:
        """The level of the points that get logits: 0, or with last_unary that of the last block."""
        if not self.segments:
            return 0
        return sum(map(_coarser, self.architecture)) - sum(block in _UPSAMPLINGS for block in self.architecture)

    @property
    def _has_head(self) -> bool:
        return self.architecture[-1] != "last_unary"

    @property
    def head_columns(self) -> dict[str, slice]:
        """The columns of the logits of each category of `heads`, in their order.

        >>> import kpcore as kp
        >>> net = kp.nn.kpfcnn(4, 7, 0.02, heads={"chair": 4, "table": 3})
        >>> net.head_columns["table"]
        slice(4, 7, None)
        """
        columns, end = {}, 0
        for name, parts in (self.heads or {}).items():
            columns[name] = slice(end, end + parts)
            end += parts
        return columns

    @property
    def reach(self) -> float | None:
        """The radius of the theoretical receptive field outside of training, in the unit of the points.

        The logits of a point depend only on features of points of level 0 within it: the sum of the search radii of all
        blocks, and of the diagonals of voxels, within which the nearest coarser point is. Offsets do not matter, since
        deformed kernel points act on the neighbours of the search. ``math.inf`` if the logits depend on the whole batch
        item, through a global average or a group or instance normalisation; None if they depend on all items of a
        batch (`norm_together`), or on what another network computes (`bottleneck_width`).

        >>> import kpcore as kp
        >>> net = kp.nn.kpfcnn(num_features=1, num_classes=4, voxel_size=0.1, levels=2, convs=2)
        >>> round(net.reach, 3)  # three blocks within 0.25, one within 0.5, and a nearest point in a voxel of 0.2
        1.596
        """
        by_cloud = self.norm in ("group", "instance")
        if self.bottleneck_width is not None or (by_cloud and self.norm_together):
            return None
        if not self.segments or by_cloud:
            return math.inf
        level, reach = 0, 0.0
        for block in self.architecture:
            if block == "nearest_upsample":
                reach += self.voxel_size * 2**level * math.sqrt(self.dimension)
            elif block not in ("unary", "last_unary"):
                radius = self.deform_radius if level in self.deform_levels else self.conv_radius
                reach += radius * self.voxel_size * 2**level
            level += _coarser(block) - (block in _UPSAMPLINGS)
        return reach

    def pyramid(self, points: AnyArray, *, row_splits: AnyArray | None = None,
                neighbor_limits: Sequence[int] | None = None, subsampled: bool = False,
                features: AnyArray | None = None, labels: AnyArray | None = None,
                F: ModuleType = kpcore) -> Pyramid:  # fmt: skip
        """The pyramid that the network works on, made by `F.build_pyramid` with the network's voxel size and radii."""
        check_dimension(self, points)
        levels = F.build_pyramid(
            points, voxel_size=self.voxel_size, num_levels=self.num_levels, row_splits=row_splits, features=features,
            labels=labels, subsampled=subsampled, origin=self.origin, inclusive=self.origin != PUBLISHED,
            conv_radius=self.conv_radius,
            deform_radius=self.deform_radius, deform_levels=self.deform_levels, neighbor_limits=neighbor_limits,
            upsample_levels=self.upsample_levels
        )  # fmt: skip
        if self.pool_pad_value is None:
            return levels
        return Pyramid(level._replace(pools=_with_width(level.pools)) for level in levels)

    def init(self, seed: int = 0, dtype: DTypeLike = np.float32) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(params, state): dicts of arrays by name.

        As in the published PyTorch code, weights are uniform in ±1 / sqrt(fan-in). NumPy draws them from the seed and
        the name of the parameter, so they are the same on every machine.

        Parameters
        ----------
        seed : int
        dtype : float32 or float64
        """
        return initialised(self, seed, dtype)

    def no_data(self, dtype: DTypeLike) -> tuple[Any, ...]:
        """See `no_points`; the category of the only batch item and a function `between` follow."""

        def between(features: np.ndarray) -> np.ndarray:
            return np.zeros((0, self.bottleneck_width or 0), dtype)

        categories = None if self.heads is None else [0]
        return *no_points(self, dtype), categories, None if self.bottleneck_width is None else between

    def __call__(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer], pyramid: Sequence[Level],
                 features: Value | np.ndarray, *, training: bool = False,
                 seed: int | AnyArray | None = None, detach_offsets: bool = False,
                 categories: AnyArray | Sequence[int] | None = None,
                 between: Callable[[Value], Value] | None = None,
                 observe: Callable[[str, int | None, Any], object] | None = None
                 ) -> Result[Value, Buffer]:  # fmt: skip
        """Logits of the points, or of the batch items.

        Parameters
        ----------
        F : module
            `kpcore` (for arrays and `kpcore.autodiff.Tensor`), `kpcore.torch` or `kpcore.jax`.
        params, state : dict by name
            As `init` returns them, as arrays or tensors that `F` takes.
        pyramid : sequence of Level
            As `pyramid` returns it, with arrays or tensors that `F` takes.
        features : (N, num_features)
            Features of the points of level 0.
        training : bool
            Whether to normalise by the statistics of the batch, apply dropout and compute the regularization.
        seed : int, optional
            Seed of dropout; required in training if the network has dropout.
        detach_offsets : bool
            Whether offsets and modulations of deformable convolutions are constants of the gradient, as for an
            effective receptive field (`kpcore.effective_receptive_field`). The result is the same; offsets, and what
            computes them, then get no gradient from the logits or the regularization.
        categories : (B,) integers
            The number of the category of each batch item in the order of `heads`, for a network that has heads. Their
            values and those of ``pyramid[0].row_splits`` are needed: under `jax.jit` they must be constants.
        between : callable, for a network with `bottleneck_width`
            Called with the features of the encoder (N, C) on the coarsest level; returns those that the decoder starts
            from, (N, bottleneck_width).
        observe : callable, optional
            Called as ``observe(name, level, out)`` with the output of each block, in their order; see `nn.Run`. With
            ``observe=lambda name, level, out: levels.update({level: out})`` the dict `levels` has the features of each
            level after the last block on it.

        Returns
        -------
        Result
            With `heads`, the logits outside the `head_columns` of a point's category are -10,000, whose exponential is
            0: softmax, `kpcore.softmax_cross_entropy` and the largest logit are those within the category.
        """
        return evaluated(self, F, params, state, pyramid, features, training, seed, detach_offsets, observe,
                         categories, between)  # fmt: skip

    def new_run(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer],
                **more: Any) -> blocks.Run[Value, Buffer]:  # fmt: skip
        """The `nn.Run` of a pass through this network."""
        conv = {name: getattr(self, name) for name in ("influence", "aggregation", "normalization")}
        return blocks.Run(F, params, state, norm=self.norm, groups=self.norm_groups, momentum=self.momentum,
                          slope=self.slope, conv=conv, repulse_extent=self.repulse_extent,
                          learn_kernel_points=self.learn_kernel_points, bias=self.bias, norm_affine=self.norm_affine,
                          norm_together=self.norm_together, **more)  # fmt: skip

    def compute_logits(self, run: blocks.Run[Value, Buffer], pyramid: Sequence[Level], x: Value | np.ndarray,
                       seed: int | AnyArray | None, categories: AnyArray | Sequence[int] | None = None,
                       between: Callable[[Value], Value] | None = None) -> Value:  # fmt: skip
        """The logits for the features `x` of the points of level 0."""
        level, width, downs, skips = 0, self.width, self.num_downs, []
        for number, block in enumerate(self.architecture):
            if number == downs:
                x = self._decoder_input(x, between)
            kind, deform = block.split("_")[0], self.modulated if "deformable" in block else None
            resample = "resampled" in block
            here = pyramid[level]
            if number < downs:
                name = f"encoder.{number}"
                if _coarser(block):
                    skips.append(x)
            else:
                name = f"decoder.{number - downs}"
            target, where = here, (here.points, None, here.neighbors)
            if _coarser(block):
                target = pyramid[level + 1]
                where = here.points, target.points, here.pools
            bounds, places = (here.row_splits, target.row_splits), self._places(level)
            if block == "global_average":
                x = run.F.segment_reduce(x, here.row_splits, "mean")
            elif block in _UPSAMPLINGS:
                level, target = level - 1, pyramid[level - 1]
                if block == "nearest_upsample":
                    x = run.F.nearest_upsample(x, target.upsamples)
                else:
                    where = here.points, target.points, target.upsamples
                    x = blocks.bottleneck(run, name, where, x, x.shape[1], places, here.row_splits, target.row_splits,
                                          always_narrow=self.always_narrow)  # fmt: skip
                x = run.F.concatenate(x, skips.pop())
            elif block == "max_pool":
                x = run.F.neighbor_reduce(x, here.pools, "max", pad_value=self.pool_pad_value)
            elif kind == "unary":
                to = width if number < downs else self._decoder_width(level)
                x = blocks.unary(run, name, x, to, here.row_splits)
            elif block == "last_unary":
                x = blocks.dense(run, name, x, self.num_classes, activate=False, bias=self.bias)
            elif kind == "simple":
                x = blocks.simple(run, name, where, x, width // 2, places, bounds[1], deform, resample)
            else:
                x = blocks.bottleneck(run, name, where, x, width, places, *bounds, deform, self.always_narrow,
                                      self.pool_pad_value, resample)  # fmt: skip
            if _coarser(block):
                level, width = level + 1, 2 * width
            if run.observe and block != "global_average":
                run.observe(name, level, x)
        return self._activated(run, self._head(run, pyramid, x, seed, categories))

    def _head(self, run, pyramid, x, seed, categories):
        if not self._has_head:
            return x
        row_splits = pyramid[0].row_splits
        layers = self.head_norm, self.dropout, seed
        if self.heads is not None or categories is not None:
            numbers = self._checked_categories(categories, row_splits.shape[0] - 1)
            return blocks.heads(run, x, [*self.heads.values()], self._head_width, numbers, pyramid[0], *layers)
        row_splits = row_splits if self.segments else blocks.one_row_each(row_splits)
        return blocks.head(run, ("head.0", "head.1"), x, self._head_width, self.num_classes, row_splits, *layers)

    def _activated(self, run, logits):
        return logits if self.logits_slope is None else run.F.leaky_relu(logits, self.logits_slope)

    def _decoder_input(self, x, between):
        """What `between` makes of the features `x` of the encoder; x without bottleneck_width."""
        width = self.bottleneck_width
        if (width is None) != (between is None):
            expected = f"a function that returns {width} columns" if width else "None without bottleneck_width"
            raise ValueError(f"between: expected {expected}, got {between!r}")
        if between is None:
            return x
        out = between(x)
        if tuple(out.shape) != (x.shape[0], width):
            raise ValueError(f"between: expected a result of shape {(x.shape[0], width)}, got {tuple(out.shape)}")
        return out

    def _decoder_width(self, level: int) -> int:
        if isinstance(self.decoder_width, tuple):
            return self.decoder_width[level]
        return (self.decoder_width or self.width) * 2**level

    def _checked_categories(self, categories: Any, items: int) -> np.ndarray:
        if self.heads is None or categories is None:
            expected = "None for a network without" if self.heads is None else "one for each batch item of one with"
            raise ValueError(f"categories: expected {expected} heads, got {categories!r}")
        categories = blocks.integers_on_host("categories", categories)
        if categories.shape != (items,):
            raise ValueError(f"categories: expected ({items},), one for each batch item, got {categories.shape}")
        wrong = (categories < 0) | (categories >= len(self.heads))
        if wrong.any():
            item = int(np.argmax(wrong))
            expected = f"0 to {len(self.heads) - 1}, the numbers of the heads"
            raise ValueError(f"categories: expected {expected}, got {categories[item]} for batch item {item}")
        return categories

    @property
    def _head_width(self) -> int:
        return self.head_width or (self.width if self.segments else 1024)

    def _places(self, level: int) -> KernelPlaces:
        voxel = self.voxel_size * 2**level
        radius = self.kernel_radius * self.conv_radius * voxel
        return {"num": self.kernel_size, "radius": radius, "extent": self.extent * voxel, "dimension": self.dimension}


def kpcnn(num_features: int, num_classes: int, voxel_size: float, *, convs: int = 3, levels: int = 5,
          deformable: int = 0, resampled: int = 0, **options: Any) -> Network:  # fmt: skip
    """KP-CNN, which classifies clouds, in the size of the published PyTorch code (`convs=3`) or of the paper (2).

    `options` are those of `Network`.

    >>> import kpcore as kp
    >>> kp.nn.count(kp.nn.kpcnn(1, 40, 0.02, convs=2).init()[0])
    14295144
    """
    block_names = architecture(levels, convs, deformable=deformable, resampled=resampled, segment=False)
    return _published(block_names, num_features, num_classes, voxel_size, convs, options)


def kpfcnn(num_features: int, num_classes: int, voxel_size: float, *, convs: int = 3, levels: int = 5,
           deformable: int = 0, resampled: int = 0, upsample: str = "nearest", **options: Any) -> Network:  # fmt: skip
    """KP-FCNN, which labels points, in the size of the published PyTorch code (`convs=3`) or of the paper (2).

    `upsample` is that of `architecture`, `options` are those of `Network`.
    """
    block_names = architecture(levels, convs, deformable=deformable, resampled=resampled, upsample=upsample)
    return _published(block_names, num_features, num_classes, voxel_size, convs, options)


def _published(block_names, num_features, num_classes, voxel_size, convs, options):
    if convs == 2:  # the paper's TensorFlow code
        options = {"always_narrow": True, "head_norm": True, "slope": 0.2} | options
        if block_names[-1] != "global_average":
            half = options.get("width", 128) // 2
            options = {"decoder_width": half, "head_width": half} | options
    return Network(block_names, num_features, num_classes, voxel_size, **options)


def check_dimension(net: Network | KPNeXt, points: object) -> None:
    """Check that points have the network's dimension; anything that is no array is left to the operators' checks."""
    shape = tuple(getattr(points, "shape", (0, net.dimension)))
    if shape[1:] != (net.dimension,):
        raise ValueError(f"points: expected (N, {net.dimension}) for the network, got {shape}")


def check_values(groups: Sequence[Parameters[AnyArray]], expected: Sequence[Parameters[AnyArray]],
                 kinds: Sequence[str] = ("params", "state")) -> None:  # fmt: skip
    """Check that the dicts in `groups`, parameters and state, have the names and shapes of those in `expected`."""
    for kind, values, like in zip(kinds, groups, expected, strict=True):
        for name, value in like.items():
            if name not in values:
                raise ValueError(f"{kind}: expected {name} {value.shape}, which the architecture has, got none")
            if tuple(values[name].shape) != value.shape:
                raise ValueError(f"{kind}: expected {name} {value.shape}, got {tuple(values[name].shape)}")
        if others := sorted(values.keys() - like.keys()):
            raise ValueError(f"{kind}: expected only what the architecture has, got {', '.join(others)} too")


class _Recording(dict[str, np.ndarray]):
    """A dict that remembers which of its values were read."""

    def __init__(self, values: Mapping[str, np.ndarray]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return super().__getitem__(name)


def check_arrays(net: Network | KPNeXt, params: Parameters[np.ndarray], state: Parameters[np.ndarray]) -> None:
    """Check that the dicts hold exactly the arrays of a network, with the right shapes and one dtype.

    It does not initialise the network to compare with: a damaged file may describe one of 10**9 parameters, which would
    not fit into memory.
    """
    dtypes = {value.dtype for value in (*params.values(), *state.values())}
    if len(dtypes) > 1 or not dtypes <= {*checks.REAL}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"params, state: expected all arrays in float32 or all in float64, got {got}")
    params, state = _Recording(params), _Recording(state)
    _pass_without_data(net, params, state, *dtypes or (np.dtype(np.float32),), new=None)
    for kind, values in (("params", params), ("state", state)):
        if others := sorted(values.keys() - values.read):
            raise ValueError(f"{kind}: expected only what the architecture has, got {', '.join(others[:3])} too")


def initialised(
    net: Network | KPNeXt | ImageNetwork, seed: int, dtype: DTypeLike
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(params, state) of a network: the arrays that its blocks ask for in a pass over no data."""
    dtype = np.dtype(dtype)
    if dtype not in checks.REAL:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    seed = checks.integer("seed", seed, 0)
    _pass_without_data(net, {}, {}, dtype, {"seed": None, "dtype": dtype})  # raises for too many before any is drawn
    params, state = {}, {}
    _pass_without_data(net, params, state, dtype, {"seed": seed, "dtype": dtype})
    return params, state


def shapes(net: Network | KPNeXt) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of (params, state) of a network by name, without drawing initial values."""
    params, state = {}, {}
    _pass_without_data(net, params, state, np.dtype(np.float32), {"seed": None, "dtype": np.float32})
    return tuple({name: value.shape for name, value in values.items()} for values in (params, state))


def no_points(net: Network | KPNeXt, dtype: DTypeLike) -> tuple[Pyramid, np.ndarray, None]:
    """(pyramid, features, seed) of no points, the input of the pass in which parameters are created or checked."""
    return net.pyramid(np.zeros((0, net.dimension), dtype)), np.zeros((0, net.num_features), dtype), None


def _pass_without_data(net, params, state, dtype, new):
    net.compute_logits(net.new_run(kpcore, params, state, new=new), *net.no_data(dtype))


def evaluated(net: Network | KPNeXt, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer],
              pyramid: Sequence[Level], features: Value | np.ndarray, training: bool,
              seed: int | AnyArray | None, detach_offsets: bool,
              observe: Callable[[str, int | None, Any], object] | None,
              *more: Any) -> Result[Value, Buffer]:  # fmt: skip
    """Run a network; the common part of `Network` and `KPNeXt` when they are called."""
    if len(pyramid) != net.num_levels:
        raise ValueError(f"pyramid: expected {net.num_levels} levels for the architecture, got {len(pyramid)}")
    check_dimension(net, pyramid[0].points)
    if len(features.shape) != 2 or features.shape[1] != net.num_features:
        raise ValueError(f"features: expected (N, {net.num_features}), got {tuple(features.shape)}")
    run = net.new_run(F, params, state, training=training, detach_offsets=detach_offsets, observe=observe)
    logits = net.compute_logits(run, pyramid, features, seed, *more)
    total = None
    for one in run.regularization:
        total = one if total is None else total + one
    return Result(logits, run.new_state, None if total is None else net.fitting_power * total)


def count(params: Parameters[AnyArray]) -> int:
    """The number of parameters: the sum of the sizes of all arrays in a dict."""
    return sum(int(np.prod(value.shape)) for value in params.values())


def _checked_heads(heads: object, num_classes: int, segments: bool) -> dict[str, int]:
    """The numbers of parts by category as a dict of plain numbers."""
    if not isinstance(heads, Mapping) or not heads or not all(isinstance(name, str) for name in heads):
        raise TypeError(f"heads: expected a dict of the number of parts by category, got {heads!r}")
    if not segments:
        raise ValueError("heads: expected None for a network that ends with global_average, which labels no points, "
                         f"got {heads!r}")  # fmt: skip
    heads = {name: checks.integer(f"heads[{name!r}]", parts, 1) for name, parts in heads.items()}
    if sum(heads.values()) != num_classes:
        raise ValueError(f"num_classes: expected {sum(heads.values())}, the parts of all heads, got {num_classes}")
    return heads


def _coarser(block: str) -> bool:
    return "strided" in block or block == "max_pool"


def _check_architecture(block_names: Sequence[str]) -> None:
    if len(block_names) > _MOST_BLOCKS or sum(map(_coarser, block_names)) >= blocks.MOST_LEVELS:
        got = f"got {len(block_names)} blocks on {1 + sum(map(_coarser, block_names))} levels"
        raise ValueError(f"architecture: expected at most {_MOST_BLOCKS} blocks on {blocks.MOST_LEVELS} levels, {got}")
    level, upsampled = 0, False
    for number, block in enumerate(block_names):
        kind, *more = block.split("_")
        known = block in ("unary", "last_unary", "max_pool", *_UPSAMPLINGS, "global_average") or (
            kind in ("simple", "resnetb") and more == [variant for variant in _VARIANTS if variant in more]
        )
        if not known:
            raise ValueError(f"architecture: expected a block of the published networks, got {block!r}")
        if block in _UPSAMPLINGS:
            level, upsampled = level - 1, True
        elif upsampled and block not in ("unary", "last_unary"):
            expected = "nearest_upsample, kpconv_upsample, unary or last_unary after the first upsampling"
            raise ValueError(f"architecture: expected {expected}, got {block!r}")
        if block in ("global_average", "last_unary") and number != len(block_names) - 1:
            raise ValueError(f"architecture: expected {block} only at the end, got it in block {number}")
        level += _coarser(block)
        if level < 0:
            raise ValueError(f"architecture: expected no {block} on level 0, got one in block {number}")
    if not block_names or (block_names[-1] not in ("global_average", "last_unary") and level):
        expected = "global_average or last_unary at the end, or kpconv_upsample or nearest_upsample until level 0"
        raise ValueError(f"architecture: expected {expected}, got {block_names}")


def _with_width(neighbors: Neighbors | None) -> Neighbors | None:
    """Give a list without a width that of its longest row."""
    if neighbors is None or neighbors.width is not None:
        return neighbors
    return neighbors.with_width(int(neighbors.counts.max()) if neighbors.num_queries else 0)
