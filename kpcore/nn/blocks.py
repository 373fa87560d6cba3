"""The blocks of the published networks, as functions of the operators.

Each block is written once for all frameworks: `run.F` is the namespace with the operators (`kpcore`, `kpcore.torch` or
`kpcore.jax`), and features are its arrays or tensors. Between operators a block uses only arithmetic, slices and
reshapes that arrays and tensors have in common.

A block gets the width of its output and asks its `Run` for parameters by name and shape. A network is initialised by
one pass over no points, in which the `Run` creates the parameters that blocks ask for. So shapes are written once.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypedDict

import numpy as np

import kpcore
from kpcore.autodiff import Tensor
from kpcore.backends import checks, devices
from kpcore.backends.devices import AnyArray, Buffer, Value
from kpcore.dispositions import random_rotation, rotated
from kpcore.neighbors import unchecked_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import ModuleType

    from numpy.typing import DTypeLike

    from kpcore.kernel_map import KernelMap
    from kpcore.neighbors import Neighbors
    from kpcore.nn.kpnext import KPNeXt
    from kpcore.nn.networks import Network
    from kpcore.pyramid import Level

MOST_LEVELS, MOST_CHANNELS, MOST_PARAMETERS = 16, 2**14, 10**9
# The kernel_extent of resampled convolutions in mean norms of their kernel points, 1.5 times the least distance between
# 15 of them. Up to that distance, kernel offsets of zero would be the rigid convolution, but have no gradient, and an
# offset convolution that starts with zeros would never learn.
_KERNEL_EXTENT = 4 / 3
# The logits of a point outside the columns of its head. exp(-10,000) is 0 in every dtype, and float16 can hold the
# number; with -inf, checks that all outputs of a network are finite and products with 0 would fail.
OUTSIDE = -1e4
IN_VOXELS = (1e-6, 100)  # limits of radii in voxels; a sphere that is cut out for training is smaller than 100 voxels


Parameters = Mapping[str, Value]  # by name
Draw: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]  # draws the initial values
Geometry: TypeAlias = "tuple[AnyArray, AnyArray | None, Neighbors]"  # (points, queries, neighbors) as in kpconv


class KernelPlaces(TypedDict):
    """The kernel points of a layer."""

    num: int
    radius: float
    extent: float
    dimension: int


class ShellPlaces(KernelPlaces):
    """The kernel points of a layer that lie on shells; `shells` is the number on each."""

    shells: Sequence[int]


class NewValues(TypedDict):
    """How a `Run` creates missing parameters: drawn with the seed, or zeros if it is None."""

    seed: int | None
    dtype: DTypeLike


class Deformed(NamedTuple):
    """The kernels of a deformable convolution: kernel points (K, D) that `offsets` (M, K, D) move for each query."""

    where: Geometry
    kernel_points: AnyArray
    offsets: AnyArray
    extent: float


class Run(Generic[Value, Buffer]):
    """One pass through a network: operators, parameters and options of its blocks, and the state after the pass.

    Parameters
    ----------
    F : module
        `kpcore`, for arrays and `kpcore.autodiff.Tensor`; `kpcore.torch`; `kpcore.jax`.
    params, state : dict of arrays by name
        Trained arrays; and arrays that are not trained, running statistics and kernel points.
    training : bool
        Whether batch normalisation uses the statistics of the features instead of the running ones.
    norm : {"batch", "group", "instance", None}
        Group and instance normalisation treat each batch item separately. None: a bias instead of a normalisation.
    groups : int
        Number of groups of the group normalisation. If it does not divide the number of channels, the greatest common
        divisor of the two is used.
    momentum, slope : float
        Of the batch normalisation, and of the leaky ReLU.
    conv : dict
        The options of all convolutions: influence, aggregation, normalization.
    repulse_extent : float
        Of the regularization of deformable convolutions, see `kpcore.repulsion_loss`.
    detach_offsets : bool
        Whether offsets and modulations of deformable convolutions are constants of the gradient.
    learn_kernel_points : bool
        Whether kernel points are parameters, see `kernel`.
    bias : bool
        Whether convolutions and linear layers have a bias besides that of the normalisation after them.
    norm_affine : bool
        Whether scale and shift of a normalisation are parameters, or constants in the state.
    norm_together : bool
        Whether group and instance normalisation treat all batch items as one.
    observe : callable, optional
        Called as ``observe(name, level, out)`` with the output of each block, and with the `Deformed` kernels of each
        deformable convolution, for which the level is None. For features of several levels, and for pictures of what a
        network has learned.
    new : dict, optional
        How to create missing parameters: seed (None: zeros) and dtype. Without it a missing parameter is an error.

    Attributes
    ----------
    new_state : dict
        The state after the pass.
    regularization : list
        In training, one number for each deformable convolution.
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
    detach_offsets: bool
    learn_kernel_points: bool
    bias: bool
    norm_affine: bool
    norm_together: bool
    observe: Callable[[str, int | None, Any], object] | None
    new: NewValues | None
    new_state: dict[str, Buffer]
    regularization: list[Value]

    def __init__(self, F: ModuleType, params: dict[str, Value], state: dict[str, Buffer], *, training: bool = False,
                 norm: str | None = "batch", groups: int = 32,
                 momentum: float = 0.02, slope: float = 0.1, conv: Mapping[str, Any] | None = None,
                 repulse_extent: float = 1.2, detach_offsets: bool = False, learn_kernel_points: bool = False,
                 bias: bool = False, norm_affine: bool = True, norm_together: bool = False,
                 observe: Callable[[str, int | None, Any], object] | None = None,
                 new: NewValues | None = None) -> None:  # fmt: skip
        self.F, self.params, self.state, self.training = F, params, state, training
        self.norm, self.groups, self.momentum, self.slope = norm, groups, momentum, slope
        self.conv, self.repulse_extent, self.new = conv or {}, repulse_extent, new
        self.detach_offsets = checks.boolean("detach_offsets", detach_offsets)
        self.learn_kernel_points, self.observe = learn_kernel_points, observe
        self.bias, self.norm_affine, self.norm_together = bias, norm_affine, norm_together
        self.new_state, self.regularization, self._num_new = dict(state), [], 0

    def without_training(self) -> Run[Value, Buffer]:
        """The same pass outside of training, for layers that get no rows, which have no statistics."""
        run = copy.copy(self)
        run.training = False
        return run

    def parameter(self, name: str, shape: tuple[int, ...], draw: Draw) -> Value:
        """A trained array; while a network is initialised, `draw(rng, shape)` draws its initial values."""
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
                # The seed includes the name, so that adding or removing a block changes no other parameter.
                rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
                values[name] = np.ascontiguousarray(draw(rng, shape), dtype)
        if name not in values:
            raise ValueError(f"{kind}: expected {name} {shape}, which the architecture has, got none with this name")
        value = values[name]
        if tuple(value.shape) != shape:
            raise ValueError(f"{kind}: expected {name} {shape}, got {tuple(value.shape)}")
        return value


def check_fields(net: object, check: Callable[..., Any], names: Iterable[str], *limits: Any) -> None:
    """Check fields of a network and replace them by what the check returns: plain numbers, which JSON can hold."""
    for name in names:
        object.__setattr__(net, name, check(name, getattr(net, name), *limits))


def check_channels(name: str, channels: int) -> None:
    """Check that the widest level has at most 2**14 channels; weights (15, 2**16, 2**16) would take 240 GB."""
    if channels > MOST_CHANNELS:
        raise ValueError(f"{name}: expected at most {MOST_CHANNELS} channels on any level, got {channels}")


def check_norm(net: Network | KPNeXt, item_width: int | None) -> None:
    """Check `norm` and `norm_groups` of a network.

    `item_width` is the width of a normalised layer with one row for each batch item, or None. In such a layer a group
    of one channel is a single number, and normalising it would give a constant.
    """
    checks.choice("norm", net.norm, ("batch", "group", "instance", None))
    check_fields(net, checks.integer, ("norm_groups",), 1)
    groups = {"group": math.gcd(net.norm_groups, item_width or 1), "instance": item_width}.get(net.norm)
    if item_width and groups == item_width:
        raise ValueError(f"norm: expected one with several channels in each group, since the {item_width} channels "
                         f"before the logits have one row for each batch item, got {net.norm!r}")  # fmt: skip


def integers_on_host(name: str, value: Any) -> np.ndarray:
    """Integers of any framework as a NumPy array. They decide what is computed, so no framework can trace them."""
    if hasattr(value, "cpu"):  # torch
        value = value.cpu().numpy()
    try:
        value = devices.on_host(value) if devices.is_array(value) else np.asarray(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected values, which decide the rows of each head, got an array that jax.jit traces; make it "
            "a constant of the function"
        ) from None
    if value.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    return value


def placed_like(array: AnyArray, values: np.ndarray) -> Any:
    """Values of the host as an array that the operators take together with `array`."""
    if devices.is_array(array):
        return devices.to_device_of(array, values)
    torch = sys.modules.get("torch")
    return torch.as_tensor(values, device=array.device) if torch and isinstance(array, torch.Tensor) else values


def one_row_each(row_splits: Value) -> Value:
    """row_splits of B one-row items, arange(B + 1), as an array of the framework of `row_splits`, (B + 1,)."""
    return (row_splits * 0 + 1).cumsum(0) - 1


def _uniform(fan_in: int) -> Draw:
    """Draw uniformly in ±1 / sqrt(fan_in), PyTorch's default for linear layers."""
    bound = 1 / math.sqrt(fan_in)
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def _ones(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return np.ones(shape)


def norm(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, row_splits: AnyArray,
         activate: bool = True) -> Value:  # fmt: skip
    """The normalisation or bias that `run.norm` names, followed by a leaky ReLU if `activate`."""
    F, channels = run.F, features.shape[1]
    affine = run.parameter if run.norm_affine else run.buffer
    shift = affine(f"{name}.shift", (channels,), _zeros)
    slope = run.slope if activate else None
    if run.norm is None:
        features = features + shift
        return F.leaky_relu(features, slope) if activate else features
    scale = affine(f"{name}.scale", (channels,), _ones)
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
    items = None if run.norm_together else row_splits
    return F.group_norm(features, groups, scale, shift, row_splits=items, negative_slope=slope)


def unary(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, width: int, row_splits: AnyArray,
          activate: bool = True) -> Value:  # fmt: skip
    """A linear layer to `width` channels, applied to every point, and its normalisation."""
    out = dense(run, name, features, width, activate=False, bias=run.bias)
    return norm(run, f"{name}.norm", out, row_splits, activate)


def dense(run: Run[Value, Buffer], name: str, features: Value | np.ndarray, width: int, activate: bool = True,
          bias: bool = True) -> Value:  # fmt: skip
    """A linear layer to `width` channels, by default with a bias, applied to every point."""
    channels = features.shape[1]
    weights = run.parameter(f"{name}.weights", (channels, width), _uniform(channels))
    shift = run.parameter(f"{name}.bias", (width,), _zeros) if bias else None
    out = run.F.linear(features, weights, shift)
    return run.F.leaky_relu(out, run.slope) if activate else out


def head(run: Run[Value, Buffer], names: tuple[str, str], features: Value | np.ndarray, hidden: int, width: int,
         row_splits: AnyArray, normed: bool, rate: float, seed: int | AnyArray | None) -> Value:  # fmt: skip
    """A layer to `hidden` channels, normalised or with a bias, its dropout, and the layer to the `width` logits."""
    x = unary(run, names[0], features, hidden, row_splits) if normed else dense(run, names[0], features, hidden)
    return dense(run, names[1], dropout(run, x, rate, seed), width, activate=False)


def heads(run: Run[Value, Buffer], features: Value, widths: Sequence[int], hidden: int, categories: np.ndarray,
          level: Level, *more: Any) -> Value:  # fmt: skip
    """The logits of several heads side by side, each computed for the rows of its batch items; `OUTSIDE` elsewhere.

    Head h has `widths[h]` columns and computes the rows of the batch items of `level` whose number in `categories` is
    h. Its batch normalisation sees these rows alone; a head without rows changes no running statistics. `more` are
    further arguments of `head`.
    """
    F, bounds, parts = run.F, integers_on_host("row_splits", level.row_splits), []
    heads_of_rows = np.repeat(categories, np.diff(bounds))
    for number, width in enumerate(widths):
        before = np.concatenate([[0], np.cumsum(heads_of_rows == number)])  # rows of the head before each row
        num = int(before[-1])
        # For each row its place among those of the head, or no neighbour. The transpose lists the rows of the head.
        pairs = np.arange(num, dtype=np.int32), before
        places = unchecked_list(*(placed_like(level.neighbors.stored_index, values) for values in pairs), num)
        # Without rows the features are constants: their gradient would be an array of zeros for each such head.
        rows = F.nearest_upsample(features if num else detached(features), places.transpose())
        logits = head(run if num else run.without_training(), (f"heads.{number}.0", f"heads.{number}.1"), rows, hidden,
                      width, placed_like(level.row_splits, before[bounds]), *more)  # fmt: skip
        parts.append(F.neighbor_reduce(logits, places, "sum", empty=OUTSIDE))
    while len(parts) > 1:  # concatenate takes up to four arrays
        fours = [parts[i : i + 4] for i in range(0, len(parts), 4)]
        parts = [F.concatenate(*four) if len(four) > 1 else four[0] for four in fours]
    return parts[0]


def dropout(run: Run[Value, Buffer], features: Value, rate: float, seed: int | AnyArray | None) -> Value:
    """`kpcore.dropout` in training; otherwise the features unchanged."""
    if not rate or not run.training:
        return features
    if seed is None:
        raise ValueError(f"seed: expected an integer in training, because dropout is {rate}, got None")
    return run.F.dropout(features, rate, seed)


def kernel(run: Run[Value, Buffer], name: str, places: KernelPlaces) -> Value | Buffer:
    """The kernel points of a layer. As published, each layer rotates them about the last axis by a random angle.

    They are a buffer; or, if the run learns them, a parameter in units of the extent, as offsets are, so that a
    learning rate does not depend on the unit of the points.
    """
    num, radius, dimension, shells = (places.get(key) for key in ("num", "radius", "dimension", "shells"))

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        points = kpcore.kernel_points(shells or num, radius, dimension=dimension, dtype=np.float64,
                                      method="shells" if shells else "potential")  # fmt: skip
        points = rotated(points, random_rotation(dimension, "vertical", int(rng.integers(2**62))))
        return points / places["extent"] if run.learn_kernel_points else points

    full_name, shape = f"{name}.kernel_points", (num, dimension)
    if run.learn_kernel_points:
        return places["extent"] * run.parameter(full_name, shape, draw)
    return run.buffer(full_name, shape, draw)


def conv(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
         places: KernelPlaces, resample: bool = False, draw: Draw | None = None) -> Value:  # fmt: skip
    """A rigid convolution. `where` is (points, queries, neighbors), as `kpcore.kpconv` takes them.

    `resample`: with weights that are resampled for each query, see `resampling`. `draw`: the initialisation of the
    weights.
    """
    num, channels = places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels, width), draw or _uniform(channels * width))
    points = kernel(run, name, places)
    options = resampling(run, name, where, features, places) if resample else {}
    return run.F.kpconv(*where, features, weights, points, places["extent"], **run.conv, **options)


def resampling(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray,
               places: KernelPlaces) -> dict[str, Any]:  # fmt: skip
    """The arguments kernel_offsets and kernel_extent of a convolution; a rigid convolution computes the offsets.

    They are K D numbers for each query, times the extent. Weights and bias of that convolution are initially zero.
    """
    num, dimension = places["num"], places["dimension"]
    raw = conv(run, f"{name}.kernel_offset_conv", where, features, num * dimension, places, draw=_zeros)
    raw = raw + run.parameter(f"{name}.kernel_offset_bias", (raw.shape[1],), _zeros)
    if run.detach_offsets:
        raw = detached(raw)
    extent = _KERNEL_EXTENT * places["radius"]
    return {"kernel_offsets": extent * raw.reshape(-1, num, dimension), "kernel_extent": extent}


def deformable_conv(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
                    places: KernelPlaces, modulated: bool = False, resample: bool = False) -> Value:  # fmt: skip
    """A deformable convolution; a rigid convolution computes its offsets. See `deformed`, and `conv` for `resample`."""
    num, channels = places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels, width), _uniform(channels * width))
    points = kernel(run, name, places)
    raw = conv(run, f"{name}.offset_conv", where, features, num * (places["dimension"] + modulated), places)
    raw = raw + run.parameter(f"{name}.offset_bias", (raw.shape[1],), _zeros)
    if run.detach_offsets:
        raw = detached(raw)
    options = {**run.conv, **(resampling(run, name, where, features, places) if resample else {})}
    out, offsets = deformed(run.F, where, features, weights, points, places["extent"], raw, options)
    if run.observe:
        run.observe(name, None, Deformed(where, points, offsets, places["extent"]))
    if run.training:
        run.regularization.append(
            regularization(run.F, where, points, offsets, places["extent"], repulse_extent=run.repulse_extent)
        )
    return out


def detached(value: AnyArray) -> Any:
    """The same values as a constant of the gradient, in every framework: of a tensor of the tape its array."""
    if isinstance(value, Tensor):
        return value.value
    if hasattr(value, "detach"):  # torch
        return value.detach()
    jax = sys.modules.get("jax")
    return jax.lax.stop_gradient(value) if jax is not None and isinstance(value, jax.Array) else value


def deformation(F: ModuleType, kernel_points: AnyArray, extent: float, raw: Value) -> tuple[Value, Value | None]:
    """(offsets (M, K, D), modulations (M, K) or None) from the output of the convolution for the offsets.

    The first K D channels of `raw`, times the extent, are the offsets; twice the sigmoid of K further channels, if
    there are any, are the modulations.
    """
    num, dimension = kernel_points.shape
    split = num * dimension
    offsets = extent * raw[:, :split].reshape(-1, num, dimension)
    return offsets, 2 * F.sigmoid(raw[:, split:]) if raw.shape[1] > split else None


def deformed(F: ModuleType, where: Geometry, features: AnyArray, weights: Value, kernel_points: AnyArray, extent: float,
             raw: Value, options: Mapping[str, Any]) -> tuple[Value, Value]:  # fmt: skip
    """(output, offsets (M, K, D)) of a deformable convolution (Thomas et al. 2019, section 3.2); see `deformation`."""
    offsets, modulations = deformation(F, kernel_points, extent, raw)
    out = F.kpconv(*where, features, weights, kernel_points, extent, offsets=offsets, modulations=modulations,
                   **options)  # fmt: skip
    return out, offsets


def regularization(F: ModuleType, where: Geometry, kernel_points: AnyArray, offsets: Value, extent: float, *,
                   repulse_extent: float = 1.2) -> Value:  # fmt: skip
    """``2 * fitting_loss + repulsion_loss``, as in the published PyTorch code."""
    fitting = F.fitting_loss(*where, kernel_points, offsets, extent)
    return 2 * fitting + F.repulsion_loss(kernel_points, offsets, extent, repulse_extent=repulse_extent)


def simple(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
           places: KernelPlaces, row_splits: AnyArray, deform: bool | None = None,
           resample: bool = False) -> Value:  # fmt: skip
    """A convolution and its normalisation. `deform`: None for a rigid one, else whether the deformable is modulated.

    `resample`: with weights that are resampled for each query.
    """
    if deform is None:
        out = conv(run, f"{name}.conv", where, features, width, places, resample)
    else:
        out = deformable_conv(run, f"{name}.conv", where, features, width, places, deform, resample)
    if run.bias:
        out = out + run.parameter(f"{name}.conv.bias", (width,), _zeros)
    return norm(run, f"{name}.norm", out, row_splits)


def bottleneck(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
               places: KernelPlaces, row_splits: AnyArray, queries_row_splits: AnyArray, deform: bool | None = None,
               always_narrow: bool = False, pad_value: float | None = None,
               resample: bool = False) -> Value:  # fmt: skip
    """A residual block: a linear layer to a quarter of the width, a convolution, a linear layer to `width`; a shortcut.

    In a strided block (queries are not the points) the shortcut is the maximum over the neighbours. In it, as in the
    published code, `pad_value` counts as one more neighbour of queries with fewer neighbours than the list's width. The
    shortcut has a linear layer if the width changes.
    """
    narrow, shortcut = features, features
    if always_narrow or features.shape[1] != width // 4:
        narrow = unary(run, f"{name}.unary1", features, width // 4, row_splits)
    out = simple(run, name, where, narrow, width // 4, places, queries_row_splits, deform, resample)
    out = unary(run, f"{name}.unary2", out, width, queries_row_splits, activate=False)
    if where[1] is not None:
        shortcut = run.F.neighbor_reduce(features, where[2], "max", pad_value=pad_value)
    if features.shape[1] != width:
        shortcut = unary(run, f"{name}.unary_shortcut", shortcut, width, queries_row_splits, activate=False)
    return run.F.leaky_relu(run.F.add(out, shortcut), run.slope)


def depthwise(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, places: KernelPlaces,
              attention_groups: int | None = None, attention_norm: bool = True) -> Value:  # fmt: skip
    """KPConvD, or with `attention_groups` KPConvX (Thomas et al. 2024).

    Each neighbour is weighted by its nearest kernel point. `attention_groups` consecutive channels share one number of
    the attention, which is computed from the features of the query; so the queries must be the points, None in `where`.
    With `attention_norm` the attention of each kernel point is normalised before the sigmoid, over all points of the
    batch together, also outside of training, as published.
    """
    F, num, channels = run.F, places["num"], features.shape[1]
    weights = run.parameter(f"{name}.weights", (num, channels), _uniform(channels))
    points, extent = kernel(run, name, places), places["extent"]
    if attention_groups is None:
        return F.kpconv(*where, features, weights, points, extent, aggregation="closest")
    if where[1] is not None:
        raise ValueError("where: expected None for the queries, because attention is computed from the features of the "
                         "points, got other queries")  # fmt: skip
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
    """A residual block of KPNeXt: a depthwise convolution, linear layers to four times the channels and to `width`."""
    channels = features.shape[1]
    out = depthwise(run, f"{name}.conv", where, features, places, attention_groups, attention_norm)
    out = norm(run, f"{name}.norm", out, row_splits)
    out = unary(run, f"{name}.unary1", out, 4 * channels, row_splits)
    out = unary(run, f"{name}.unary2", out, width, row_splits, activate=False)
    shortcut = features
    if channels != width:
        shortcut = unary(run, f"{name}.unary_shortcut", features, width, row_splits, activate=False)
    return run.F.leaky_relu(run.F.add(out, shortcut), run.slope)


# ---- the layers of Open3D


def _glorot(fan_in: int, fan_out: int) -> Draw:
    """Draw uniformly in ±sqrt(6 / (fan_in + fan_out)), Open3D's initialisation of the linear layer of the centre."""
    bound = math.sqrt(6 / (fan_in + fan_out))
    return lambda rng, shape: rng.uniform(-bound, bound, shape)


def _near_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Draw uniformly in ±0.05, Open3D's initialisation of kernels."""
    return rng.uniform(-0.05, 0.05, shape)


def relative_distances(F: ModuleType, where: Geometry, extents: AnyArray | float,
                       metric: Literal["l1", "l2", "linf"] = "l2") -> Any:  # fmt: skip
    """(E,) the distance of each pair in radii, half the extents, squared for "l2": what Open3D's window functions get.

    They are computed from the positions, not taken from ``neighbors.distance``, so that in torch and JAX the gradient
    of a window reaches points, queries and extents. The tape has no arithmetic for that: there these must be arrays.
    """
    points, queries, neighbors = where
    checks.choice("metric", metric, ("l1", "l2", "linf"))
    for name, value in (("points", points), ("queries", queries), ("extents", extents)):
        if isinstance(value, Tensor):
            raise TypeError(f"{name}: expected an array, because the tape has no gradient of a window function, got a "
                            "Tensor; torch and JAX have one")  # fmt: skip
    index, row_splits = neighbors.stored_index, neighbors.stored_row_splits
    xp = devices.namespace(index) if devices.is_array(index) else np
    places, starts = xp.arange(index.shape[0] + 1), row_splits[1:-1]
    searchsorted = functools.partial(xp.searchsorted, starts) if devices.is_array(starts) else starts.searchsorted
    rows = searchsorted(places[:-1], side="right")
    index = index * (places[:-1] < row_splits[-1])  # behind the last pair a list may hold any numbers

    def of_pairs(pairs: Any, values: Any) -> Any:
        """The row of `values` for each pair, by lists of one neighbour, which operators of all frameworks take."""
        return F.nearest_upsample(values, unchecked_list(pairs, places, values.shape[0]))

    if isinstance(extents, (int, float)):
        extents = float(extents)  # a NumPy float64 would turn float32 positions into float64
    elif extents.ndim and extents.shape[0] != 1:
        extents = of_pairs(rows, extents.reshape(extents.shape[0], -1))
    relative = (of_pairs(index, points) - of_pairs(rows, points if queries is None else queries)) / (0.5 * extents)
    if metric == "l2":
        return (relative * relative).sum(1)
    sizes = abs(relative)
    if metric == "l1":
        return sizes.sum(1)
    return sizes.amax(1) if hasattr(sizes, "amax") else sizes.max(1)  # torch's max returns columns as well


def continuous_conv(run: Run[Value, Buffer], name: str, where: Geometry, features: Value | np.ndarray, width: int,
                    kernel_size: int | Sequence[int], extents: AnyArray | float, *,
                    window_function: Callable[[Any], Any] | None = None, metric: Literal["l1", "l2", "linf"] = "l2",
                    normalize: bool = True, use_dense_layer_for_center: bool = False, use_bias: bool = True,
                    activation: Callable[[Value], Value] | None = None, **options: Any) -> Value:  # fmt: skip
    """The layer ContinuousConv of Open3D over a neighbour list that was searched before.

    `where` is (points, queries, neighbors), `options` are further arguments of `kpcore.continuous_conv`. The
    `window_function` of the `relative_distances` weights the neighbours. The linear layer for the centre needs as many
    queries as points. Parameters are those of Open3D's layer: "kernel", "bias" and, transposed, "dense.weight".
    """
    F, channels = run.F, features.shape[1]
    kernel_size = checks.integers("kernel_size", kernel_size, 3, 1).tolist()
    kernel = run.parameter(f"{name}.kernel", (*kernel_size, channels, width), _near_zero)
    if window_function is not None:
        options["neighbor_importances"] = window_function(relative_distances(F, where, extents, metric))
    out = F.continuous_conv(*where, features, kernel, extents, normalize=normalize, **options)
    if use_dense_layer_for_center:
        dense = run.parameter(f"{name}.dense.weight", (channels, width), _glorot(channels, width))
        out = F.add(out, F.linear(features, dense))
    return _biased(run, name, out, use_bias, activation)


def sparse_conv(run: Run[Value, Buffer], name: str, kernel_map: KernelMap, features: Value | np.ndarray, width: int, *,
                use_bias: bool = True, activation: Callable[[Value], Value] | None = None,
                **options: Any) -> Value:  # fmt: skip
    """A sparse convolution over a kernel map: submanifold or strided, or inverse with ``kernel_map.transpose()``.

    `options` are further arguments of `kpcore.sparse_conv`.
    """
    kernel = run.parameter(f"{name}.kernel", (*kernel_map.kernel_size, features.shape[1], width), _near_zero)
    out = run.F.sparse_conv(kernel_map.neighbors, kernel_map.kernel_index, features, kernel, **options)
    return _biased(run, name, out, use_bias, activation)


def _biased(run: Run[Value, Buffer], name: str, out: Value, use_bias: bool,
            activation: Callable[[Value], Value] | None) -> Value:  # fmt: skip
    if use_bias:
        out = out + run.parameter(f"{name}.bias", (out.shape[1],), _zeros)
    return out if activation is None else activation(out)
