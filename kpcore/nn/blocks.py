"""Blocks of the published networks, as functions of the operators.

Each is written once, for every framework: `run.F` is the namespace that has the operators (`kpcore`, `kpcore.torch` or
`kpcore.jax`), and features are its arrays or tensors. What is between operators (sums, slices, products with a number)
is what arrays and tensors do by themselves.

A block is passed only the width of its output. It asks its `Run` for parameters by name and shape; while a network is
being initialised, on no points at all, the `Run` makes them. So the shapes are written once too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypedDict

import numpy as np

import kpcore
from kpcore.backends import checks
from kpcore.backends.devices import AnyArray, Buffer, Value
from kpcore.dispositions import random_rotation, rotated

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

    from numpy.typing import DTypeLike

    from kpcore.neighbors import Neighbors
    from kpcore.nn.kpnext import KPNeXt
    from kpcore.nn.networks import Network

MOST_LEVELS, MOST_CHANNELS, MOST_PARAMETERS = 16, 2**14, 10**9
IN_VOXELS = (1e-6, 100)  # a radius of 100 voxels holds every point of a sphere of training


Parameters = Mapping[str, Value]  # by name
Draw: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # the first values of a parameter
Geometry: TypeAlias = "tuple[AnyArray, AnyArray | None, Neighbors]"  # points, queries and neighbours, as of kpconv


class KernelPlaces(TypedDict):
    """The kernel points of a layer."""

    num: int
    radius: float
    extent: float
    dimension: int


class ShellPlaces(KernelPlaces):
    """The kernel points of a layer that lie on shells: how many on each."""

    shells: Sequence[int]


class NewValues(TypedDict):
    """How a `Run` makes the parameters that are missing. Without a seed they are zeros."""

    seed: int | None
    dtype: DTypeLike


class Run(Generic[Value, Buffer]):
    """One pass through a network: what blocks compute with, and what they leave.

    Parameters
    ----------
    F : module
        `kpcore`, for arrays and `kpcore.autodiff.Tensor`; `kpcore.torch`; `kpcore.jax`.
    params, state : dict of arrays by name
        The arrays that are trained; and those that are not: running statistics and kernel points.
    training : bool
        Whether batch normalisation takes its statistics from the features.
    norm : {"batch", "group", "instance", None}
        None: a bias. Groups and instances are normalised for each batch item.
    groups : int
        Number of groups of the group normalisation. Where it does not divide the channels, their greatest common
        divisor is taken.
    momentum, slope : float
        Of the batch normalisation, and of the leaky ReLU.
    conv : dict
        The options of all convolutions: influence, aggregation, normalization.
    new : dict, optional
        How to make parameters that are missing: seed (None: zeros) and dtype.

    Attributes
    ----------
    new_state : dict
        The state after the pass.
    regularization : list
        One number for each deformable convolution, where training.
    """

    F: ModuleType
    params: dict[str, Value]
    state: dict[str, Buffer]
    training: bool
    norm: str | None
    groups: int
    momentum: float
    slope: float
    conv: Mapping[str, Any]
    repulse_extent: float
    new: NewValues | None
    new_state: dict[str, Buffer]
    regularization: list[Value]

    def __init__(self, F: ModuleType, params: dict[str, Value], state: dict[str, Buffer], *, training: bool = False,
                 norm: str | None = "batch", groups: int = 32,
                 momentum: float = 0.02, slope: float = 0.1, conv: Mapping[str, Any] | None = None,
                 repulse_extent: float = 1.2, new: NewValues | None = None) -> None:  # fmt: skip
        self.F, self.params, self.state, self.training = F, params, state, training
        self.norm, self.groups, self.momentum, self.slope = norm, groups, momentum, slope
        self.conv, self.repulse_extent, self.new = conv or {}, repulse_extent, new
        self.new_state, self.regularization, self._num_new = dict(state), [], 0

    def parameter(self, name: str, shape: tuple[int, ...], draw: Draw) -> Value:
        """A trained array; while a network is initialised, `draw(rng, shape)` gives its first values."""
        return self._get("params", self.params, name, shape, draw)

    def buffer(self, name: str, shape: tuple[int, ...], draw: Draw) -> Buffer:
        """An array that is not trained: running statistics, kernel points."""
        return self._get("state", self.state, name, shape, draw)

    def _get(self, kind: str, values: dict[str, Any], name: str, shape: tuple[int, ...], draw: Draw) -> Any:
        if self.new is not None and name not in values:
            seed, dtype = self.new["seed"], self.new["dtype"]
            self._num_new += math.prod(shape)
            if self._num_new > MOST_PARAMETERS:
                raise ValueError(f"width: expected a network of at most {MOST_PARAMETERS:,} parameters, got more")
            if seed is None:
                values[name] = np.zeros(shape, dtype)
            else:
                # Drawn from the name, so that a block more or less changes no other's.
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                values[name] = np.ascontiguousarray(draw(rng, shape), dtype)
        if name not in values:
            raise ValueError(f"{kind}: expected {name} {shape}, which the architecture has, got none of this name")
        value = values[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{kind}: expected {name} {shape}, got {tuple(value.shape)}")
        return value


def check_fields(net: object, check: Callable[..., Any], names: Iterable[str], *limits: Any) -> None:
    """Fields of a network as one of the checks of arguments returns them: plain numbers, which JSON can hold."""
    for name in names:
        object.__setattr__(net, name, check(name, getattr(net, name), *limits))


def check_channels(name: str, channels: int) -> None:
    """An error for widths with which no network is meant: (15, 2**16, 2**16) weights are 240 GB."""
    if channels > MOST_CHANNELS:
        raise ValueError(f"{name}: expected at most {MOST_CHANNELS} channels on any level, got {channels}")


def check_norm(net: Network | KPNeXt, item_width: int | None) -> None:
    """The fields of a network that say how it is normalised; `item_width` is the width of a normalised layer with one
    row for each batch item, if there is one."""
    checks.choice("norm", net.norm, ("batch", "group", "instance", None))
    check_fields(net, checks.integer, ("norm_groups",), 1)
    groups = {"group": math.gcd(net.norm_groups, item_width or 1), "instance": item_width}.get(net.norm)
    if item_width and groups == item_width:
        raise ValueError(f"norm: expected one that leaves something of the {item_width} numbers of an item before "
                         f"the logits, got {net.norm!r}, a group for each")  # fmt: skip


def one_row_each(row_splits: Value) -> Value:
    """row_splits of B one-row items, arange(B + 1), from those of B items; an array of the same framework."""
    return (row_splits * 0 + 1).cumsum(0) - 1


def _uniform(fan_in: int) -> Draw:
    """Uniform in ±1 / sqrt(fan_in), which is PyTorch's default for linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def _ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape)


def norm(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, row_splits: AnyArray,
         activate: bool = True) -> Value:  # fmt: skip
    """The normalisation of a network, or a bias, and after it a leaky ReLU."""
    F, channels = run.F, features.shape[1]
    shift = run.parameter(f"{name}.shift", (channels,), _zeros)
    slope = run.slope if activate else None
    if run.norm is None:
        features = features + shift
        return F.leaky_relu(features, slope) if activate else features
    scale = run.parameter(f"{name}.scale", (channels,), _ones)
    if run.norm == "batch":
        mean = run.buffer(f"{name}.mean", (channels,), _zeros)
        variance = run.buffer(f"{name}.variance", (channels,), _ones)
        out = F.batch_norm(
            features, scale, shift, mean, variance, training=run.training, momentum=run.momentum, negative_slope=slope
        )
        if run.training:
            run.new_state[f"{name}.mean"], run.new_state[f"{name}.variance"] = out[1:]
        return out[0]
    groups = channels if run.norm == "instance" else math.gcd(run.groups, channels)
    return F.group_norm(features, groups, scale, shift, row_splits=row_splits, negative_slope=slope)


def unary(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, width: int, row_splits: AnyArray,
          activate: bool = True) -> Value:  # fmt: skip
    """A linear layer of every point, normalised: to `width` channels."""
    channels = features.shape[1]
    weights = run.parameter(f"{name}.weights", (channels, width), _uniform(channels))
    return norm(run, f"{name}.norm", run.F.linear(features, weights), row_splits, activate)


def dense(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, width: int, activate: bool = True) -> Value:
    """A linear layer of every point with a bias: to `width` channels."""
    channels = features.shape[1]
    weights = run.parameter(f"{name}.weights", (channels, width), _uniform(channels))
    out = run.F.linear(features, weights, run.parameter(f"{name}.bias", (width,), _zeros))
    return run.F.leaky_relu(out, run.slope) if activate else out


def dropout(run: Run[Value, Buffer], features: Value, rate: float, seed: int | AnyArray | None) -> Value:
    """`kpcore.dropout` of the features in training; the features themselves otherwise."""
    if not rate or not run.training:
        return features
    if seed is None:
        raise ValueError(f"seed: expected an integer, because dropout is {rate} in training, got None")
    return run.F.dropout(features, rate, seed)


def kernel(run: Run[Value, Buffer], name: str, places: KernelPlaces) -> Buffer:
    """Kernel points of a layer, a buffer: `places` has num, radius, extent and dimension, and shells where they lie on
    some. Turned about the last axis by an angle that is drawn for each layer, as published."""
    num, radius, dimension, shells = (places.get(key) for key in ("num", "radius", "dimension", "shells"))

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        points = kpcore.kernel_points(shells or num, radius, dimension=dimension, dtype=np.float64,
                                      method="shells" if shells else "potential")  # fmt: skip
        return rotated(points, random_rotation(dimension, "vertical", int(rng.integers(2**62))))

    return run.buffer(f"{name}.kernel_points", (num, dimension), draw)


def conv(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
         places: KernelPlaces) -> Value:  # fmt: skip
    """A rigid convolution. `where` is (points, queries, neighbors), as `kpcore.kpconv` takes them."""
    num, channels = places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels, width), _uniform(channels * width))
    return run.F.kpconv(*where, features, weights, kernel(run, name, places), places["extent"], **run.conv)


def deformable_conv(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
                    places: KernelPlaces, modulated: bool = False) -> Value:  # fmt: skip
    """A deformable convolution, whose offsets a rigid one makes; see `deformed`."""
    num, channels = places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels, width), _uniform(channels * width))
    points = kernel(run, name, places)
    raw = conv(run, f"{name}.offset_conv", where, features, num * (places["dimension"] + modulated), places)
    raw = raw + run.parameter(f"{name}.offset_bias", (raw.shape[1],), _zeros)
    out, offsets = deformed(run.F, where, features, weights, points, places["extent"], raw, run.conv)
    if run.training:
        run.regularization.append(
            regularization(run.F, where, points, offsets, places["extent"], repulse_extent=run.repulse_extent)
        )
    return out


def deformed(F: ModuleType, where: Geometry, features: AnyArray, weights: Value, kernel_points: AnyArray, extent: float,
             raw: Value, options: Mapping[str, Any]) -> tuple[Value, Value]:  # fmt: skip
    """The convolution by what the offsets' convolution gave, and the offsets (M, K, D) (Thomas et al. 2019, 3.2).

    The first K D of `raw`, times the extent, are offsets; twice the sigmoid of K more, if they are there, modulates.
    """
    num, dimension = kernel_points.shape
    split = num * dimension
    offsets = extent * raw[:, :split].reshape(-1, num, dimension)
    modulations = 2 * F.sigmoid(raw[:, split:]) if raw.shape[1] > split else None
    out = F.kpconv(*where, features, weights, kernel_points, extent, offsets=offsets, modulations=modulations,
                   **options)  # fmt: skip
    return out, offsets


def regularization(F: ModuleType, where: Geometry, kernel_points: AnyArray, offsets: Value, extent: float, *,
                   repulse_extent: float = 1.2) -> Value:  # fmt: skip
    """``2 * fitting_loss + repulsion_loss``, as in the published PyTorch code."""
    fitting = F.fitting_loss(*where, kernel_points, offsets, extent)
    return 2 * fitting + F.repulsion_loss(kernel_points, offsets, extent, repulse_extent=repulse_extent)


def simple(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
           places: KernelPlaces, row_splits: AnyArray, deform: bool | None = None) -> Value:  # fmt: skip
    """A convolution, normalised. `deform`: None for a rigid one, else whether it is modulated."""
    if deform is None:
        out = conv(run, f"{name}.conv", where, features, width, places)
    else:
        out = deformable_conv(run, f"{name}.conv", where, features, width, places, deform)
    return norm(run, f"{name}.norm", out, row_splits)


def bottleneck(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
               places: KernelPlaces, row_splits: AnyArray, queries_row_splits: AnyArray, deform: bool | None = None,
               always_narrow: bool = False, pad_value: float | None = None) -> Value:  # fmt: skip
    """A residual block: down to a quarter of the width, a convolution, up again; added to a shortcut.

    Where the queries are other points, the shortcut is a maximum over the neighbours; `pad_value` is seen by those
    with fewer than the list's width, as published code has it. Where the width changes it has a linear layer.
    """
    narrow, shortcut = features, features
    if always_narrow or features.shape[1] != width // 4:
        narrow = unary(run, f"{name}.unary1", features, width // 4, row_splits)
    out = simple(run, name, where, narrow, width // 4, places, queries_row_splits, deform)
    out = unary(run, f"{name}.unary2", out, width, queries_row_splits, activate=False)
    if where[1] is not None:
        shortcut = run.F.neighbor_reduce(features, where[2], "max", pad_value=pad_value)
    if features.shape[1] != width:
        shortcut = unary(run, f"{name}.unary_shortcut", shortcut, width, queries_row_splits, activate=False)
    return run.F.leaky_relu(run.F.add(out, shortcut), run.slope)


def depthwise(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, places: KernelPlaces,
              attention_groups: int | None = None, attention_norm: bool = True) -> Value:  # fmt: skip
    """KPConvD, or with `attention_groups` KPConvX (Thomas et al. 2024): each neighbour by its nearest kernel point.

    `attention_groups` channels side by side share a number of the attention, which is made of the queries' features;
    queries are the points, None in `where`. With `attention_norm` the numbers of each kernel point are normalised
    before the sigmoid, over all points of the batch together, in training or not, as published.
    """
    F, num, channels = run.F, places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels), _uniform(channels))
    points, extent = kernel(run, name, places), places["extent"]
    if attention_groups is None:
        return F.kpconv(*where, features, weights, points, extent, aggregation="closest")
    if where[1] is not None:
        raise ValueError("where: expected None for the queries with attention, which is made of the points' features")
    first = run.parameter(f"{name}.attention.0.weights", (channels, channels), _uniform(channels))
    bias = run.parameter(f"{name}.attention.0.bias", (channels,), _zeros)
    shared = num * (channels // attention_groups)
    second = run.parameter(f"{name}.attention.1.weights", (channels, shared), _uniform(channels))
    logits = F.linear(F.leaky_relu(F.linear(features, first, bias), run.slope), second)
    if attention_norm:
        scale = run.parameter(f"{name}.attention.norm.scale", (shared,), _ones)
        logits = F.group_norm(logits, num, scale, run.parameter(f"{name}.attention.norm.shift", (shared,), _zeros))
    attention = F.sigmoid(logits).reshape(-1, num, channels // attention_groups)
    return F.kpconvx(*where, features, weights, attention, points, extent)


def inverted(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
             places: KernelPlaces, row_splits: AnyArray, attention_groups: int | None = None,
             attention_norm: bool = True) -> Value:  # fmt: skip
    """A residual block of KPNeXt: a depthwise convolution, four times the channels, and down to `width`."""
    channels = features.shape[1]
    out = depthwise(run, f"{name}.conv", where, features, places, attention_groups, attention_norm)
    out = norm(run, f"{name}.norm", out, row_splits)
    out = unary(run, f"{name}.unary1", out, 4 * channels, row_splits)
    out = unary(run, f"{name}.unary2", out, width, row_splits, activate=False)
    shortcut = features
    if channels != width:
        shortcut = unary(run, f"{name}.unary_shortcut", features, width, row_splits, activate=False)
    return run.F.leaky_relu(run.F.add(out, shortcut), run.slope)
