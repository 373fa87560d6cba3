"""KPNeXt (Thomas et al. 2024): networks of depthwise convolutions, with or without attention over kernel points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import kpcore
from kpcore import config
from kpcore.backends import checks, devices
from kpcore.neighbors import Neighbors
from kpcore.nn import blocks
from kpcore.nn.networks import check_dimension, evaluated, initialised, no_points
from kpcore.pyramid import Level, Pyramid
from kpcore.subsampling import common_origin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from numpy.typing import DTypeLike

    from kpcore.nn.blocks import AnyArray, Buffer, Parameters, ShellPlaces, Value
    from kpcore.nn.networks import Result

_SIZES = {"S": (2, 2, 2, 8, 2), "L": (3, 3, 9, 12, 3)}


@dataclass(frozen=True)
class KPNeXt:
    """The description of a KPNeXt that labels points or clouds, without its parameters; it is used like `Network`.

    A full convolution is followed by stages of residual blocks (`nn.blocks.inverted`), the last of which increases the
    width. Between stages, features are reduced to the maximum over the points of each voxel. To label points, each
    level of the decoder concatenates the features of a point's voxel with those of the point in the encoder, and has a
    linear layer and a block. The published training also drops residual branches at random (drop path); this one does
    not.

    Parameters
    ----------
    depths : sequence of int
        Number of blocks in each stage; see `kpnext`.
    num_features, num_classes : int
    voxel_size : float
        Voxel size of level 0, in the unit of the points.
    attention_groups : int or None
        How many consecutive channels share one number of the attention (KPConvX), which all blocks except those of the
        first stage have. None: no attention (KPConvD).
    attention_norm : bool
        Whether the attention of each kernel point is normalised before the sigmoid, over all points of the batch
        together, as published. The result for one batch item then depends on the other items.
    segment : bool
        Whether each point gets logits; otherwise each batch item does.
    dimension : int
    width : int
        Channels of the first stage; they grow by a factor of 1.41 with each stage, rounded up to a multiple of 16.
    num_neighbors : sequence of int
        Number of nearest neighbours on each level.
    shells : sequence of int
        Number of kernel points on each shell.
    radius : float
        Radius of the kernel, in voxels of the level.
    grid_factor : float
        Factor by which voxels grow from level to level.
    norm, norm_groups, momentum, slope, dropout, origin
        As in `Network`.
    extent : float, optional
        Extent of the influence, in voxels of the level; by default that of the kernel, `radius`.
    head_width : int, optional
        Channels of the layer before the logits; by default those of the features that it gets.
    head_norm : bool
        Whether that layer is normalised, or has a bias, as in the published networks that classify clouds.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> net = kp.nn.KPNeXt((1, 1), 1, 4, voxel_size=0.1, width=16, num_neighbors=(12, 16), attention_groups=4)
    >>> params, state = net.init()
    >>> pyramid = net.pyramid(kp.scenes.indoor(5_000).points)
    >>> features = np.ones((len(pyramid[0].points), 1), np.float32)
    >>> net(kp, params, state, pyramid, features).logits.shape == (len(features), 4)
    True
    """

    depths: Sequence[int]
    num_features: int
    num_classes: int
    voxel_size: float
    attention_groups: int | None = 4
    segment: bool = True
    dimension: int = 3
    width: int = 64
    num_neighbors: Sequence[int] = (12, 16, 20, 20, 20)
    shells: Sequence[int] = (1, 14, 28)
    radius: float = 2.1
    grid_factor: float = 2.2
    norm: str | None = "batch"
    norm_groups: int = 32
    momentum: float = 0.1
    slope: float = 0.1
    dropout: float = 0.0
    attention_norm: bool = True
    origin: int | str = 0
    extent: float | None = None
    head_width: int | None = None
    head_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("depths", "num_neighbors", "shells"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple, np.ndarray)):
                raise TypeError(f"{name}: expected a sequence of integers, got {type(values).__name__}")
            object.__setattr__(self, name, tuple(checks.integer(name, value, 1, 1000) for value in values))
        object.__setattr__(self, "origin", common_origin(self.origin))
        if len(self.depths) > blocks.MOST_LEVELS or sum(self.depths) > 1000 or sum(self.shells) > 1000:
            limits = f"depths of at most {blocks.MOST_LEVELS} levels and 1000 blocks, and shells of 1000 kernel points"
            raise ValueError(f"depths, shells: expected {limits}, got {self.depths} and {self.shells}")
        if not self.depths or len(self.num_neighbors) < len(self.depths):
            got = f"got {self.num_neighbors}"
            raise ValueError(f"num_neighbors: expected one for each of {len(self.depths)} levels, {got}")
        if self.shells[:1] != (1,):
            raise ValueError(f"shells: expected 1 point on the first shell, which is the centre, got {self.shells}")
        blocks.check_fields(self, checks.integer, ("num_features", "num_classes", "width"), 1)
        blocks.check_fields(self, checks.integer, ("dimension",), 2, 3)
        blocks.check_fields(self, checks.length, ("voxel_size",), np.dtype(np.float32))
        in_voxels = [name for name in ("radius", "extent") if getattr(self, name) is not None]
        blocks.check_fields(self, checks.between, in_voxels, *blocks.IN_VOXELS)
        blocks.check_fields(self, checks.number, ("grid_factor",), np.dtype(np.float32))
        if not 1 < self.grid_factor <= 100:
            raise ValueError(f"grid_factor: expected a number above 1, at most 100, got {self.grid_factor}")
        blocks.check_channels("width", self.widths[-1])
        if self.head_width is not None:
            blocks.check_fields(self, checks.integer, ("head_width",), 1)
            blocks.check_channels("head_width", self.head_width)
        blocks.check_fields(self, checks.between, ("dropout", "momentum"), 0, 1)
        blocks.check_fields(self, checks.between, ("slope",), -1, 1)
        blocks.check_fields(self, checks.boolean, ("segment", "attention_norm", "head_norm"))
        normed = self.head_norm and not self.segment
        blocks.check_norm(self, (self.head_width or self.widths[-1]) if normed else None)
        if self.attention_groups is not None:
            blocks.check_fields(self, checks.integer, ("attention_groups",), 1)
            if any(width % self.attention_groups for width in self.widths):
                raise ValueError(f"attention_groups: expected a divisor of {self.widths}, got {self.attention_groups}")

    @property
    def num_levels(self) -> int:
        return len(self.depths)

    @property
    def segments(self) -> bool:
        """Whether each point gets logits; otherwise each batch item does."""
        return self.segment

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(-(-int(self.width * 1.41**level) // 16) * 16 for level in range(self.num_levels))

    @property
    def reach(self) -> float | None:
        """The radius of the theoretical receptive field outside of training, as `Network.reach`.

        A convolution sees neighbours up to the radius of its kernel and, from there, the extent of the influence; a
        maximum or an upsampling stays within a voxel. None if the logits depend on all items of a batch, through the
        normalisation of the attention (`attention_norm`).

        >>> import kpcore as kp
        >>> net = kp.nn.KPNeXt((1, 1), 1, 4, 0.1, num_neighbors=(12, 16), attention_groups=None)
        >>> round(net.reach, 3), kp.nn.kpnext(1, 4, 0.1).reach
        (2.946, None)
        """
        if self.attention_groups is not None and self.attention_norm and self.num_levels > 1:
            return None
        if not self.segments or self.norm in ("group", "instance"):
            return math.inf
        voxels = [self.voxel_size * self.grid_factor**level for level in range(self.num_levels)]
        convolutions = [depth + 1 for depth in self.depths]  # the stem, or the block of the decoder; not on the last
        convolutions[0] += self.num_levels > 1
        convolutions[-1] -= self.num_levels > 1
        within_voxels = 2 * math.sqrt(self.dimension) * sum(voxels[1:])
        reach = self.radius + (self.extent or self.radius)
        radii = (reach * num * voxel for num, voxel in zip(convolutions, voxels, strict=True))
        return within_voxels + sum(radii)

    def pyramid(self, points: AnyArray, *, row_splits: AnyArray | None = None, subsampled: bool = False,
                features: AnyArray | None = None, labels: AnyArray | None = None,
                F: ModuleType = kpcore) -> Pyramid:  # fmt: skip
        """The pyramid that the network works on, with the nearest `num_neighbors` on each level.

        ``pools`` of a level lists the points in each voxel of the next level, ``upsamples`` the voxel of each point.
        """
        check_dimension(self, points)
        for name, value in (("features", features), ("labels", labels)):
            if value is not None and len(value) != len(points):
                raise ValueError(f"{name}: expected {len(points)} rows to match points, got {tuple(value.shape)}")
        here = points, features, labels, row_splits
        if not subsampled:
            more = {"features": features, "labels": labels, "row_splits": row_splits, "origin": self.origin}
            here = F.grid_subsample(points, self.voxel_size, **more)[:4]
        elif row_splits is None:
            # row_splits of a single item, as an array of the points' framework.
            here = *here[:3], blocks.one_row_each(F.grid_subsample(points, self.voxel_size).row_splits) * len(points)
        levels = []
        for number in range(self.num_levels):
            points, features, labels, row_splits = here
            voxel = self.voxel_size * self.grid_factor**number
            k = self.num_neighbors[number]
            neighbors = F.knn_search(points, None, k, points_row_splits=row_splits)
            pools = upsamples = None
            if number + 1 < self.num_levels:
                coarser = F.grid_subsample(points, voxel * self.grid_factor, features=features, labels=labels,
                                           row_splits=row_splits, origin=self.origin)  # fmt: skip
                here = coarser[:4]
                upsamples = _voxel_list(coarser.inverse, len(coarser.points))
                pools = upsamples.transpose()
            levels.append(Level(points, row_splits, features, labels, voxel, self.radius * voxel, neighbors, pools,
                                upsamples))  # fmt: skip
        return Pyramid(levels)

    def init(self, seed: int = 0, dtype: DTypeLike = np.float32) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(params, state), as `Network.init` returns them."""
        return initialised(self, seed, dtype)

    def no_data(self, dtype: DTypeLike) -> tuple[Pyramid, np.ndarray, None]:
        """See `no_points`."""
        return no_points(self, dtype)

    def __call__(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer], pyramid: Sequence[Level],
                 features: Value | np.ndarray, *, training: bool = False,
                 seed: int | AnyArray | None = None, detach_offsets: bool = False,
                 observe: Callable[[str, int | None, Any], object] | None = None
                 ) -> Result[Value, Buffer]:  # fmt: skip
        """The `Result` of a pass, as when a `Network` is called; `detach_offsets` changes nothing without offsets."""
        return evaluated(self, F, params, state, pyramid, features, training, seed, detach_offsets, observe)

    def new_run(self, F: ModuleType, params: Parameters[Value], state: Parameters[Buffer],
                **more: Any) -> blocks.Run[Value, Buffer]:  # fmt: skip
        """The `nn.Run` of a pass through this network."""
        return blocks.Run(F, params, state, norm=self.norm, groups=self.norm_groups, momentum=self.momentum,
                          slope=self.slope, conv={"aggregation": "closest"}, **more)  # fmt: skip

    def compute_logits(self, run: blocks.Run[Value, Buffer], pyramid: Sequence[Level], x: Value | np.ndarray,
                       seed: int | AnyArray | None) -> Value:  # fmt: skip
        """The logits for the features `x` of the points of level 0."""
        widths, skips = self.widths, []
        first = pyramid[0]
        x = blocks.simple(run, "stem", (first.points, None, first.neighbors), x, widths[0], self._places(0),
                          first.row_splits)  # fmt: skip
        for level, depth in enumerate(self.depths):
            here = pyramid[level]
            if level:
                x = run.F.neighbor_reduce(x, pyramid[level - 1].pools, "max")
            for number in range(depth):
                width = widths[min(level + 1, len(widths) - 1)] if number == depth - 1 else widths[level]
                groups = self.attention_groups if level else None
                name = f"encoder.{level}.{number}"
                x = self._block(run, name, here, x, width, level, groups)
                if run.observe:
                    run.observe(name, level, x)
            skips.append(x)
        if not self.segment:
            x = run.F.segment_reduce(x, pyramid[-1].row_splits, "mean")
            return self._head(run, x, widths[-1], blocks.one_row_each(first.row_splits), seed)
        for level in range(self.num_levels - 2, -1, -1):
            here = pyramid[level]
            x = run.F.concatenate(run.F.nearest_upsample(x, here.upsamples), skips[level])
            x = blocks.unary(run, f"decoder.{level}.unary", x, widths[level], here.row_splits)
            x = self._block(run, f"decoder.{level}.block", here, x, widths[level], level, self.attention_groups)
            if run.observe:
                run.observe(f"decoder.{level}", level, x)
        return self._head(run, x, widths[0], first.row_splits, seed)

    def _head(self, run, x, width, row_splits, seed):
        return blocks.head(run, ("head.0", "head.1"), x, self.head_width or width, self.num_classes, row_splits,
                           self.head_norm, self.dropout, seed)  # fmt: skip

    def _block(self, run, name, here, x, width, level, attention_groups):
        where = here.points, None, here.neighbors
        return blocks.inverted(run, name, where, x, width, self._places(level), here.row_splits, attention_groups,
                               self.attention_norm)  # fmt: skip

    def _places(self, level: int) -> ShellPlaces:
        radius = self.radius * self.voxel_size * self.grid_factor**level
        extent = radius if self.extent is None else self.extent * self.voxel_size * self.grid_factor**level
        return {"num": sum(self.shells), "radius": radius, "extent": extent, "dimension": self.dimension,
                "shells": self.shells}  # fmt: skip


def kpnext(num_features: int, num_classes: int, voxel_size: float, *, size: str = "L", attention: bool = True,
           **options: Any) -> KPNeXt:  # fmt: skip
    """KPNeXt as published: KPConvX, or without `attention` KPConvD, in the sizes "S" and "L".

    `options` are those of `KPNeXt`.

    >>> import kpcore as kp
    >>> [round(kp.nn.count(kp.nn.kpnext(5, 13, 0.04, size=size, attention=False).init()[0]) / 1e6, 1) for size in "SL"]
    [5.0, 7.8]
    """
    checks.choice("size", size, tuple(_SIZES))
    options = {"depths": _SIZES[size], "attention_groups": 4 if attention else None} | options
    return KPNeXt(num_features=num_features, num_classes=num_classes, voxel_size=voxel_size, **options)


def _voxel_list(inverse: Any, num_voxels: int) -> Neighbors:
    """The voxel of each point as a list with one entry in each row, on the device of `inverse`."""
    array = inverse
    if not devices.is_array(inverse):  # a tensor or a JAX array
        array = config.cupy().from_dlpack(inverse) if getattr(inverse, "is_cuda", False) else np.asarray(inverse)
    splits = devices.namespace(array).arange(len(array) + 1)
    return Neighbors(array, splits, num_voxels)
