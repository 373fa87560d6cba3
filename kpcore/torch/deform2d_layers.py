"""Convolutions of images that adapt to the image, as layers with the arguments of torch.nn.Conv2d."""

from __future__ import annotations

import math
from typing import Literal

import torch

import kpcore
from kpcore.backends import checks
from kpcore.nn.images import DataOffsets, KernelOffsets, Size, check_offsets, scope_of


class _AdaptiveConv2d(torch.nn.Module):
    """The weight of a convolution, the generators of what it takes from the image, and the convolution with them."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    offset_generator: torch.nn.Conv2d | torch.nn.Linear | None
    data_offset_generator: torch.nn.Conv2d | None
    routing: torch.nn.Linear | None

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype, *,
                 kernel_offsets=None, scope_size=None, offset_groups=1, data_offsets=None, data_offset_groups=1,
                 num_experts=None, grid="unit", clip="scope", detach_offsets=False):  # fmt: skip
        super().__init__()
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        self.groups = checks.integer("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: expected a multiple of groups, {groups}, got {channels}")
        self.kernel_size = checks.pair("kernel_size", kernel_size, 1)
        self.stride, self.dilation = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
        self.padding = checks.pair("padding", padding, 0)
        check_offsets(kernel_offsets, offset_groups, data_offsets, data_offset_groups)
        self.scope_size = scope_of(self.kernel_size, kernel_offsets, scope_size)
        if kernel_offsets == "local" and not groups == in_channels == out_channels:
            raise ValueError(
                "groups: expected in_channels and out_channels, because a local deformable kernel is depthwise, got "
                f"groups={groups}, in_channels={in_channels} and out_channels={out_channels}"
            )
        checks.choice("grid", grid, ("unit", "uniform"))
        checks.choice("clip", clip, ("scope", None))
        self.kernel_offsets, self.data_offsets, self.grid, self.clip = kernel_offsets, data_offsets, grid, clip
        self.offset_groups = _checked_groups("offset_groups", offset_groups, in_channels)
        self.data_offset_groups = _checked_groups("data_offset_groups", data_offset_groups, in_channels)
        self.detach_offsets = checks.boolean("detach_offsets", detach_offsets)

        shape = (out_channels, in_channels // groups, *self.scope_size)
        if num_experts is not None:
            shape = (checks.integer("num_experts", num_experts, 1), *shape)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        self.register_parameter(
            "bias",
            torch.nn.Parameter(torch.empty(out_channels, dtype=dtype)) if checks.boolean("bias", bias) else None,
        )
        taps = math.prod(self.kernel_size)
        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "dtype": dtype}
        self.offset_generator = self.data_offset_generator = self.routing = None
        if kernel_offsets == "local":
            self.offset_generator = torch.nn.Conv2d(in_channels, 2 * offset_groups * taps, self.kernel_size, **geometry)
        elif kernel_offsets == "global":
            self.offset_generator = torch.nn.Linear(in_channels, 2 * taps, dtype=dtype)
        if data_offsets is not None:
            number = (3 if data_offsets == "modulated" else 2) * data_offset_groups * taps
            self.data_offset_generator = torch.nn.Conv2d(in_channels, number, self.kernel_size, **geometry)
        if num_experts is not None:
            self.routing = torch.nn.Linear(in_channels, num_experts, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights, bias and routing, and set the generators of offsets to zero.

        Weights and bias are uniform in ±1 / sqrt(fan-in), as those of torch.nn.Conv2d, with the fan-in of the kernel
        that is applied, in_channels / groups * K * K. For a depthwise one that is ±1 / K, as in the published code of
        deformable kernels. A larger scope does not make weights smaller, since each tap still gets one sample.
        """
        bound = 1 / math.sqrt(self.in_channels // self.groups * math.prod(self.kernel_size))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                torch.nn.init.uniform_(parameter, -bound, bound)
        for generator in (self.offset_generator, self.data_offset_generator):
            if generator is not None:
                torch.nn.init.zeros_(generator.weight)
                torch.nn.init.zeros_(generator.bias)
        if self.routing is not None:
            self.routing.reset_parameters()

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" * any(self.padding)
        text += f", dilation={self.dilation}" * (self.dilation != (1, 1))
        text += f", groups={self.groups}" * (self.groups != 1) + ", bias=False" * (self.bias is None)
        if self.kernel_offsets is not None:
            text += f", kernel_offsets={self.kernel_offsets!r}, scope_size={self.scope_size}"
        if self.data_offsets is not None:
            text += f", data_offsets={self.data_offsets!r}"
        return text

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, out_channels, Ho, Wo), as from torch.nn.Conv2d.

        Parameters
        ----------
        x : (B, in_channels, H, W) tensor
            In either memory format; the result has that of `x`. Under autocast the convolution computes in float32.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            got = tuple(x.shape)
            raise ValueError(f"x: expected (B, {self.in_channels}, H, W) to match in_channels, got {got}")
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()

        def arranged(images):
            return images.permute(0, 2, 3, 1) if is_last else images

        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups,
                   "bias": self.bias, "detach_offsets": self.detach_offsets, "data_offsets": None,
                   "layout": "NHWC" if is_last else "NCHW"}  # fmt: skip
        if self.data_offset_generator is not None:
            raw, split = self.data_offset_generator(x), 2 * self.data_offset_groups * math.prod(self.kernel_size)
            if self.data_offsets == "modulated":
                options["modulations"] = arranged(torch.sigmoid(raw[:, split:]))
            options["data_offsets"] = arranged(raw[:, :split])
        if self.offset_generator is not None:
            is_local = self.kernel_offsets == "local"
            offsets = self.offset_generator(x if is_local else x.mean((2, 3)))
            options["kernel_offsets"] = arranged(offsets) if is_local else offsets
            # Not |=, which torch 2.6 does not trace.
            options.update(kernel_size=self.kernel_size, grid=self.grid, clip=self.clip)
        if self.routing is not None:
            routing = torch.sigmoid(self.routing(x.mean((2, 3))))
            out = kpcore.torch.conditional_conv2d(arranged(x), self.weight, routing, **options)
        elif self.offset_generator is not None:
            out = kpcore.torch.deformable_kernel_conv2d(arranged(x), self.weight, **options)
        else:
            out = kpcore.torch.deformable_conv2d(arranged(x), self.weight, **options)
        return out.permute(0, 3, 1, 2) if is_last else out


def _checked_groups(name, value, channels):
    if channels % checks.integer(name, value, 1):
        raise ValueError(f"{name}: expected a divisor of in_channels, {channels}, got {value}")
    return value


class LocalDeformableKernel2d(_AdaptiveConv2d):
    """Depthwise convolution with a kernel that is resampled at every output position, as a layer.

    The local deformable kernel of Gao et al. (2020); see `kpcore.deformable_kernel_conv2d`. A convolution with the
    geometry of this one computes the kernel offsets. It is initially zero, so that the layer begins as a convolution
    with the fixed kernel that the grid samples.

    Parameters
    ----------
    in_channels, out_channels : int
        Equal, since the convolution is depthwise.
    kernel_size, stride, padding, dilation : int or (int, int)
        As in torch.nn.Conv2d.
    groups : int, optional
        `in_channels`, the only value.
    bias : bool
    scope_size : int or (int, int), optional
        Size of the weight; by default one more than `kernel_size`, 4 x 4 for 3 x 3, which the paper finds best.
    offset_groups : int
        Number of groups of channels that have separate kernel offsets; channel c is in group c mod `offset_groups`.
    grid : {"unit", "uniform"}
        As in `kpcore.deformable_kernel_conv2d`: as in the published code, or as in the paper.
    clip : {"scope", None}
        As in `kpcore.deformable_kernel_conv2d`: as in the paper, or as in the published code.
    detach_offsets : bool
        Whether offsets are constants of the gradient, as for an effective receptive field.
    dtype : torch.float32 or torch.float64
        By default torch's default dtype.

    Attributes
    ----------
    weight : (out_channels, 1, *scope_size) parameter
    bias : (out_channels,) parameter, or None
    offset_generator : torch.nn.Conv2d
        Parameters with "offset_generator" in their name have a learning rate of their own in the paper: 1e-2 of the
        others' in ResNet-50-DW, 1e-1 in MobileNet-V2.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> layer = kpt.LocalDeformableKernel2d(8, 8, 3, padding=1)
    >>> layer(torch.ones(2, 8, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    >>> [(name, tuple(value.shape)) for name, value in layer.state_dict().items()][:2]
    [('weight', (8, 1, 4, 4)), ('bias', (8,))]
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
                 dilation: Size = 1, groups: int | None = None, bias: bool = True, *, scope_size: Size | None = None,
                 offset_groups: int = 1, grid: Literal["unit", "uniform"] = "unit",
                 clip: Literal["scope"] | None = "scope", detach_offsets: bool = False,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        groups = in_channels if groups is None else groups
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype,
                         kernel_offsets="local", scope_size=scope_size, offset_groups=offset_groups, grid=grid,
                         clip=clip, detach_offsets=detach_offsets)  # fmt: skip


class GlobalDeformableKernel2d(_AdaptiveConv2d):
    """Convolution with a kernel that is resampled for every image, as a layer.

    The global deformable kernel of Gao et al. (2020); see `kpcore.deformable_kernel_conv2d`. A linear layer of the mean
    over the image computes the kernel offsets. It is initially zero.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in torch.nn.Conv2d.
    scope_size, grid, clip, detach_offsets, dtype
        As in `LocalDeformableKernel2d`; the scope is 2 x 2 by default for a kernel of 1 x 1.

    Attributes
    ----------
    weight : (out_channels, in_channels / groups, *scope_size) parameter
    bias : (out_channels,) parameter, or None
    offset_generator : torch.nn.Linear

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> layer = kpt.GlobalDeformableKernel2d(8, 4, 1)
    >>> layer(torch.ones(2, 8, 6, 6)).shape, tuple(layer.weight.shape)
    (torch.Size([2, 4, 6, 6]), (4, 8, 2, 2))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
                 dilation: Size = 1, groups: int = 1, bias: bool = True, *, scope_size: Size | None = None,
                 grid: Literal["unit", "uniform"] = "unit", clip: Literal["scope"] | None = "scope",
                 detach_offsets: bool = False, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype,
                         kernel_offsets="global", scope_size=scope_size, grid=grid, clip=clip,
                         detach_offsets=detach_offsets)  # fmt: skip


class DeformableConv2d(_AdaptiveConv2d):
    """Deformable convolution (Dai et al. 2017), or if `modulated` DCNv2 (Zhu et al. 2019), as a layer.

    See `kpcore.deformable_conv2d`. A convolution with the geometry of this one computes the data offsets, and if
    `modulated` the logits of the modulations, whose sigmoid multiplies the samples. It is initially zero, as published;
    so modulations begin at 0.5, and without them the layer begins as a plain convolution.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in torch.nn.Conv2d.
    modulated : bool
    data_offset_groups : int
        Number of groups of consecutive channels that have separate data offsets and modulations.
    detach_offsets, dtype
        As in `LocalDeformableKernel2d`.

    Attributes
    ----------
    weight : (out_channels, in_channels / groups, *kernel_size) parameter
    bias : (out_channels,) parameter, or None
    data_offset_generator : torch.nn.Conv2d
        To 2 G K K channels, or if `modulated` to 3 G K K, the last G K K for the modulations.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> layer, x = kpt.DeformableConv2d(8, 4, 3, padding=1), torch.rand(2, 8, 6, 6)
    >>> torch.allclose(layer(x), torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1), atol=1e-6)
    True
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
                 dilation: Size = 1, groups: int = 1, bias: bool = True, *, modulated: bool = False,
                 data_offset_groups: int = 1, detach_offsets: bool = False,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype,
                         data_offsets="modulated" if checks.boolean("modulated", modulated) else "plain",
                         data_offset_groups=data_offset_groups, detach_offsets=detach_offsets)  # fmt: skip


class DeformableKernelConv2d(_AdaptiveConv2d):
    """Depthwise convolution with local kernel offsets and data offsets (Gao et al. 2020, eq. 11), as a layer.

    See `kpcore.deformable_kernel_conv2d`. Two convolutions with the geometry of this one compute the two kinds of
    offsets; both are initially zero.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in `LocalDeformableKernel2d`.
    modulated : bool
        As in `DeformableConv2d`.
    scope_size, offset_groups, grid, clip, detach_offsets, dtype
        As in `LocalDeformableKernel2d`.
    data_offset_groups : int
        Number of groups of consecutive channels that have separate data offsets.

    Attributes
    ----------
    weight : (out_channels, 1, *scope_size) parameter
    bias : (out_channels,) parameter, or None
    offset_generator, data_offset_generator : torch.nn.Conv2d

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> kpt.DeformableKernelConv2d(8, 8, 3, stride=2, padding=1)(torch.ones(2, 8, 6, 6)).shape
    torch.Size([2, 8, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
                 dilation: Size = 1, groups: int | None = None, bias: bool = True, *, modulated: bool = False,
                 scope_size: Size | None = None, offset_groups: int = 1, data_offset_groups: int = 1,
                 grid: Literal["unit", "uniform"] = "unit", clip: Literal["scope"] | None = "scope",
                 detach_offsets: bool = False, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        groups = in_channels if groups is None else groups
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype,
                         kernel_offsets="local", scope_size=scope_size, offset_groups=offset_groups,
                         data_offsets="modulated" if checks.boolean("modulated", modulated) else "plain",
                         data_offset_groups=data_offset_groups, grid=grid, clip=clip,
                         detach_offsets=detach_offsets)  # fmt: skip


class ConditionalConv2d(_AdaptiveConv2d):
    """Convolution of each image with its own mixture of the kernels of experts (Yang et al. 2019), as a layer.

    See `kpcore.conditional_conv2d`. The sigmoid of a linear layer, `routing`, of the mean over the image gives the
    factors of the mixture. The mixture may be a deformable kernel too, which is the best combination of Gao et al.
    (2020) on MobileNet-V2.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in torch.nn.Conv2d; with local kernel offsets, depthwise.
    num_experts : int
    kernel_offsets : {"local", "global", None}
    data_offsets : {"plain", "modulated", None}
    scope_size, offset_groups, data_offset_groups, grid, clip, detach_offsets, dtype
        As in `DeformableKernelConv2d`.

    Attributes
    ----------
    weight : (num_experts, out_channels, in_channels / groups, *scope_size) parameter
    bias : (out_channels,) parameter, or None
    routing : torch.nn.Linear
    offset_generator, data_offset_generator : torch.nn.Module, or None
        As in the layers of such offsets.

    Examples
    --------
    >>> import torch, kpcore.torch as kpt
    >>> layer = kpt.ConditionalConv2d(8, 4, 3, padding=1, num_experts=3)
    >>> layer(torch.ones(2, 8, 6, 6)).shape, tuple(layer.weight.shape)
    (torch.Size([2, 4, 6, 6]), (3, 4, 8, 3, 3))
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size, stride: Size = 1, padding: Size = 0,
                 dilation: Size = 1, groups: int = 1, bias: bool = True, *, num_experts: int = 8,
                 kernel_offsets: KernelOffsets = None, data_offsets: DataOffsets = None,
                 scope_size: Size | None = None, offset_groups: int = 1, data_offset_groups: int = 1,
                 grid: Literal["unit", "uniform"] = "unit", clip: Literal["scope"] | None = "scope",
                 detach_offsets: bool = False, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, dtype,
                         kernel_offsets=kernel_offsets, scope_size=scope_size, offset_groups=offset_groups,
                         data_offsets=data_offsets, data_offset_groups=data_offset_groups, num_experts=num_experts,
                         grid=grid, clip=clip, detach_offsets=detach_offsets)  # fmt: skip
