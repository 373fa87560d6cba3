"""Convolutions of images that adapt to the image, as functions of the operators, in the manner of `kpcore.nn.blocks`.

Images and their features are (B, H, W, C), so that layers of rows take them as (B H W, C). What a convolution computes
from the image, kernel offsets, data offsets and the mixture of experts, comes from generators, which are layers with
parameters of their own; their names contain "offset_generator", by which an optimizer can slow them down.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from kpcore.autodiff import Tensor
from kpcore.backends import checks, devices
from kpcore.neighbors import unchecked_list
from kpcore.nn import blocks
from kpcore.nn.blocks import Buffer, Run, Value, _uniform, _zeros

if TYPE_CHECKING:
    from collections.abc import Sequence

Size: TypeAlias = "int | Sequence[int]"  # rows and columns, or one number for both
KernelOffsets: TypeAlias = Literal["local", "global"] | None
DataOffsets: TypeAlias = Literal["plain", "modulated"] | None


def local_deformable_kernel(run: Run[Value, Buffer], name: str, x: Value, kernel_size: Size, **options: Any) -> Value:
    """A depthwise convolution with a kernel that is resampled at every output position (Gao et al. 2020, section 3.3).

    `options` are further arguments of `conv`.
    """
    return conv(run, name, x, x.shape[3], kernel_size, groups=x.shape[3], kernel_offsets="local", **options)


def global_deformable_kernel(run: Run[Value, Buffer], name: str, x: Value, width: int, kernel_size: Size,
                             **options: Any) -> Value:  # fmt: skip
    """A convolution with a kernel that is resampled for every image (Gao et al. 2020, section 3.3).

    `options` are further arguments of `conv`.
    """
    return conv(run, name, x, width, kernel_size, kernel_offsets="global", **options)


def deformable_conv(run: Run[Value, Buffer], name: str, x: Value, width: int, kernel_size: Size, *,
                    modulated: bool = False, **options: Any) -> Value:  # fmt: skip
    """A deformable convolution (Dai et al. 2017), or if `modulated` that of Zhu et al. (2019).

    `options` are further arguments of `conv`.
    """
    data_offsets = "modulated" if modulated else "plain"
    return conv(run, name, x, width, kernel_size, data_offsets=data_offsets, **options)


def deformable_kernel_conv(run: Run[Value, Buffer], name: str, x: Value, kernel_size: Size, *, modulated: bool = False,
                           **options: Any) -> Value:  # fmt: skip
    """A depthwise convolution with local kernel offsets and data offsets (Gao et al. 2020, eq. 11).

    `options` are further arguments of `conv`.
    """
    data_offsets = "modulated" if modulated else "plain"
    return local_deformable_kernel(run, name, x, kernel_size, data_offsets=data_offsets, **options)


def conditional_conv(run: Run[Value, Buffer], name: str, x: Value, width: int, kernel_size: Size, *, experts: int = 8,
                     **options: Any) -> Value:  # fmt: skip
    """A convolution of each image with its own mixture of the kernels of experts (Yang et al. 2019).

    `options` are further arguments of `conv`.
    """
    return conv(run, name, x, width, kernel_size, experts=experts, **options)


def conv(run: Run[Value, Buffer], name: str, x: Value, width: int, kernel_size: Size, *, stride: Size = 1,
         padding: Size = 0, dilation: Size = 1, groups: int = 1, bias: bool = True,
         kernel_offsets: KernelOffsets = None, scope_size: Size | None = None, offset_groups: int = 1,
         data_offsets: DataOffsets = None, data_offset_groups: int = 1, experts: int | None = None,
         grid: Literal["unit", "uniform"] = "unit", clip: Literal["scope"] | None = "scope"
         ) -> Value:  # fmt: skip
    """A convolution of images: rigid, or adapted to the image in one or more ways.

    Parameters
    ----------
    run, name
        As for all blocks. The parameters are "weight", with `bias` "bias", and those of the generators.
    x : (B, H, W, C)
    width : int
        Number of output channels.
    kernel_size, stride, padding, dilation, groups, grid, clip
        As in `kpcore.deformable_kernel_conv2d`.
    kernel_offsets : {"local", "global", None}
        Local offsets come from a convolution configured as this one, with a bias; global ones from a linear layer of
        the mean over the image. Both generators are "offset_generator" and initially zero.
    scope_size : int or (int, int), optional
        Size of the weight that is resampled; by default one more than the kernel's, which is 4 for 3 x 3 and 2 for
        1 x 1, as published.
    offset_groups : int
        Number of groups of channels that have separate local kernel offsets.
    data_offsets : {"plain", "modulated", None}
        From a convolution configured as this one, "data_offset_generator", which is initially zero. If modulated, the
        sigmoid of further channels multiplies the samples (Zhu et al. 2019), initially 0.5.
    data_offset_groups : int
        Number of groups of channels that have separate data offsets.
    experts : int, optional
        Number of kernels that are mixed for each image by the sigmoid of a linear layer, "routing", of its mean.

    Returns
    -------
    (B, Ho, Wo, width)
    """
    F, channels, kernel_size = run.F, _channels(x), checks.pair("kernel_size", kernel_size, 1)
    taps, geometry = math.prod(kernel_size), {"stride": stride, "padding": padding, "dilation": dilation}
    options = geometry | {"groups": groups, "layout": "NHWC", "detach_offsets": run.detach_offsets}
    check_offsets(kernel_offsets, offset_groups, data_offsets, data_offset_groups)
    scope = scope_of(kernel_size, kernel_offsets, scope_size)
    shape = (width, channels // groups, *scope)
    # Of the kernel that is applied, not of the scope: ±1/K for a depthwise one, as in the published code.
    draw = _uniform(channels // groups * taps)
    mean = average(run, x) if kernel_offsets == "global" or experts is not None else None

    if kernel_offsets is not None:
        options.update(grid=grid, clip=clip, kernel_size=kernel_size)  # not |=, which torch 2.6 does not trace
        generator = f"{name}.offset_generator"
        if kernel_offsets == "local":
            offsets = _generated(run, generator, x, 2 * offset_groups * taps, kernel_size, geometry)
        else:
            weights = run.parameter(f"{generator}.weights", (channels, 2 * taps), _zeros)
            offsets = F.linear(mean, weights, run.parameter(f"{generator}.bias", (2 * taps,), _zeros))
        options["kernel_offsets"] = offsets
    options["data_offsets"] = None
    if data_offsets is not None:
        split = 2 * data_offset_groups * taps
        number = split + (split // 2 if data_offsets == "modulated" else 0)
        raw = _generated(run, f"{name}.data_offset_generator", x, number, kernel_size, geometry)
        if data_offsets == "modulated":
            rows = raw.reshape(-1, raw.shape[3])
            options["modulations"] = F.sigmoid(rows[:, split:]).reshape(*raw.shape[:3], split // 2)
            raw = rows[:, :split].reshape(*raw.shape[:3], split)
        options["data_offsets"] = raw
    if bias:
        options["bias"] = run.parameter(f"{name}.bias", (width,), _zeros)

    if experts is not None:
        routing = F.sigmoid(blocks.dense(run, f"{name}.routing", mean, experts, activate=False))
        return F.conditional_conv2d(x, run.parameter(f"{name}.weight", (experts, *shape), draw), routing, **options)
    weight = run.parameter(f"{name}.weight", shape, draw)
    if kernel_offsets is not None:
        return F.deformable_kernel_conv2d(x, weight, **options)
    return F.deformable_conv2d(x, weight, **options)


def check_offsets(kernel_offsets: KernelOffsets, offset_groups: int, data_offsets: DataOffsets,
                  data_offset_groups: int) -> None:  # fmt: skip
    """Check the kinds of offsets, and that only offsets which differ from channel to channel have groups."""
    checks.choice("kernel_offsets", kernel_offsets, (None, "local", "global"))
    checks.choice("data_offsets", data_offsets, (None, "plain", "modulated"))
    if offset_groups != 1 and kernel_offsets != "local":
        raise ValueError(f"offset_groups: expected 1 without local kernel_offsets, got {offset_groups}")
    if data_offset_groups != 1 and data_offsets is None:
        raise ValueError(f"data_offset_groups: expected 1 without data_offsets, got {data_offset_groups}")


def scope_of(kernel_size: tuple[int, int], kernel_offsets: KernelOffsets, scope_size: Size | None) -> tuple[int, int]:
    """The size of a weight: by default one more than the kernel's where there are kernel offsets, else the kernel's."""
    if kernel_offsets is None:
        if scope_size is not None:
            raise ValueError(f"scope_size: expected None without kernel_offsets, got {scope_size}")
        return kernel_size
    return (kernel_size[0] + 1, kernel_size[1] + 1) if scope_size is None else checks.pair("scope_size", scope_size, 1)


def _channels(x):
    if len(x.shape) != 4:
        raise ValueError(f"x: expected (B, H, W, C), got {tuple(x.shape)}")
    return x.shape[3]


def _generated(run, name, x, width, kernel_size, geometry):
    """The output of a generator: a convolution with a bias, initially zero."""
    weight = run.parameter(f"{name}.weight", (width, x.shape[3], *kernel_size), _zeros)
    bias = run.parameter(f"{name}.bias", (width,), _zeros)
    return run.F.deformable_conv2d(x, weight, None, bias=bias, layout="NHWC", **geometry)


def pointwise(run: Run[Value, Buffer], name: str, x: Value, width: int) -> Value:
    """A rigid 1 x 1 convolution without a bias."""
    channels = x.shape[3]
    weights = run.parameter(f"{name}.weights", (channels, width), _uniform(channels))
    return run.F.linear(_rows(x), weights).reshape(*x.shape[:3], width)


def norm(run: Run[Value, Buffer], name: str, x: Value, activation: Literal["relu", "relu6"] | None = "relu") -> Value:
    """`blocks.norm` of batch statistics, followed by an activation: a ReLU in a run whose slope is 0."""
    out = blocks.norm(run, name, _rows(x), None, activate=activation == "relu")
    return (run.F.relu6(out) if activation == "relu6" else out).reshape(*x.shape)


def average(run: Run[Value, Buffer], x: Value) -> Value:
    """(B, C): the mean over each image."""
    row_splits = _range(x, x.shape[0] + 1) * (x.shape[1] * x.shape[2])
    return run.F.segment_reduce(_rows(x), row_splits, "mean")


def max_pool(run: Run[Value, Buffer], x: Value, size: int, stride: int, padding: int) -> Value:
    """The maximum over windows of size x size; (B, Ho, Wo, C)."""
    batch, height, width, channels = x.shape
    out_height, out_width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
    taps, places = size * size, _range(x, batch * out_height * out_width * size * size)
    tap, out = places % taps, places // taps
    # Places in the padding are clipped to the image. They repeat a pixel of their window, which changes no maximum.
    row = (out // out_width % out_height * stride - padding + tap // size).clip(0, height - 1)
    column = (out % out_width * stride - padding + tap % size).clip(0, width - 1)
    index = (out // (out_height * out_width) * height + row) * width + column
    windows = unchecked_list(index, _range(x, batch * out_height * out_width + 1) * taps, batch * height * width)
    return run.F.neighbor_reduce(_rows(x), windows, "max").reshape(batch, out_height, out_width, channels)


def _rows(x):
    return x.reshape(-1, x.shape[3])


def _range(x, size):
    """The integers 0 to size - 1 as an array of the framework and device of x."""
    if isinstance(x, Tensor):
        x = x.value
    if hasattr(x, "new_ones"):  # a tensor of torch; made by its methods, which torch.compile traces
        return x.new_ones(size).long().cumsum(0) - 1
    return (devices.namespace(x) if devices.is_array(x) else np).arange(size)  # JAX takes NumPy's
