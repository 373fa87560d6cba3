"""Convolutions of images with kernels or sampling positions that adapt to the image: deformable kernels, deformable
convolution and conditional convolution."""

from __future__ import annotations

from collections.abc import Sequence

from kpcore.autodiff import operator
from kpcore.backends import checks, devices
from kpcore.backends.devices import Array, Computed
from kpcore.ops import Call, empty_like

__all__ = ["conditional_conv2d", "deformable_conv2d", "deformable_kernel_conv2d"]

_LAYOUTS = ("NCHW", "NHWC")
_GRIDS = ("unit", "uniform")
_CLIPS = (None, "scope")
_OFFSETS = ("kernel_offsets", "data_offsets", "modulations")  # those that `detach_offsets` makes constants


def _pair(value):
    """(rows, columns) from an integer or a sequence of one or two."""
    numbers = tuple(value) if isinstance(value, Sequence) else (value,)
    return numbers * 2 if len(numbers) == 1 else numbers


def _result(call):
    experts, kernel_size = getattr(call, "weights", None), getattr(call, "kernel_size", None)
    weight = call.weight if experts is None else experts
    kernel_size = weight.shape[-2:] if kernel_size is None else _pair(kernel_size)
    x, is_last = call.x.shape, call.layout == "NHWC"
    settings = kernel_size, _pair(call.stride), _pair(call.padding), _pair(call.dilation)
    height, width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x[1:3] if is_last else x[2:4], *settings, strict=True)
    )
    channels = weight.shape[0 if experts is None else 1]
    return [((x[0], height, width, channels) if is_last else (x[0], channels, height, width), call.x.dtype)]


def _gradients(call, saved, grad, needs):
    names = {name: "weight" if name == "weights" else name for name in needs}
    computed = set(names.values()) - set(_OFFSETS if call.detach_offsets else ())
    grads, backend = empty_like(call, computed, computed), devices.backend(grad)
    others = dict(grads)
    if "x" in computed and call.data_offsets is None and call.modulations is None:
        backend.run("deform2d_grad_x", call, grad_out=grad, grad_x=others.pop("grad_x"))
    if others:
        backend.run("deform2d_grads", call, grad_out=grad, **others)
    zeros = devices.namespace(grad).zeros_like
    return {
        name: grads[f"grad_{field}"] if field in computed else zeros(getattr(call, name))
        for name, field in names.items()
    }


def _checked_weight(name, weight, sizes, x, groups, local, has_experts):
    """The weight (and whether it is depthwise): (Cout, Cin/groups, Sh, Sw), or (C, Sh, Sw), each with or without E."""
    channels, first = sizes["C"][0], "E " * has_experts
    is_short = getattr(weight, "ndim", 0) == 3 + has_experts
    shape = f"{first}C Sh Sw" if is_short else f"{first}Cout Cin/groups Sh Sw"
    known = {key: sizes[key] for key in ("device", "C")}
    if not (is_short or local):
        if channels % groups:
            raise ValueError(f"groups: expected a divisor of {channels} channels of x, got {groups}")
        known["Cin/groups"] = channels // groups, "x" if groups == 1 else "x and groups"
        if groups == 1 < channels and getattr(weight, "shape", ())[has_experts : has_experts + 2] == (channels, 1):
            raise ValueError(
                f"groups: expected {channels} for a depthwise {name} of shape {weight.shape}, got 1; pass "
                f"groups={channels}, or {name} without its axis of size 1"
            )
    weight = checks.array(name, weight, shape, checks.FEATURES, known, like=("x", x))
    if 0 in weight.shape:
        raise ValueError(f"{name}: expected sizes of at least 1, got {weight.shape}")
    outputs = weight.shape[int(has_experts)]
    if local and not is_short and weight.shape[has_experts : has_experts + 2] != (channels, 1):
        short, full = ("(E, C, Sh, Sw)", "(E, C, 1, Sh, Sw)") if has_experts else ("(C, Sh, Sw)", "(C, 1, Sh, Sw)")
        raise ValueError(
            f"{name}: expected {short} or {full} with the {channels} channels of x, because kernel_offsets of 4 axes "
            f"are local and a local deformable kernel is depthwise, got {weight.shape}"
        )
    if is_short or local:
        if groups not in (1, channels):
            raise ValueError(
                f"groups: expected {channels}, the number of channels of x, because {name} is depthwise, got {groups}"
            )
        return weight, True
    if outputs % groups:
        raise ValueError(f"groups: expected a divisor of {outputs} output channels of {name}, got {groups}")
    return weight, groups == channels == outputs


def _offset_groups(name, array, channels, parts, axis):
    """The number of offset groups: the array has `parts` values for each of them at `axis`."""
    count = array.shape[axis]
    if count == 0 or count % parts:
        raise ValueError(f"{name}: expected a multiple of {parts} at axis {axis} to match kernel_size, got {count}")
    if channels % (count // parts):
        raise ValueError(
            f"{name}: expected offset groups that divide the {channels} channels of x, got {count // parts}"
        )
    return count // parts


def _checked_call(x, weight_name, weight, routing, kernel_offsets, data_offsets, modulations, bias, kernel_size, stride,
                  padding, dilation, groups, grid, clip, layout, detach_offsets):  # fmt: skip
    sizes = {}
    is_last = checks.choice("layout", layout, _LAYOUTS) == 1
    x = checks.array("x", x, "B H W C" if is_last else "B C H W", checks.FEATURES, sizes)
    batch, channels, height, width = (sizes[axis][0] for axis in "BCHW")
    if channels == 0:
        raise ValueError(f"x: expected at least 1 channel, got {x.shape}")
    groups, like = checks.integer("groups", groups, 1, checks.MAX_POINTS), ("x", x)
    has_experts, is_local = weight_name == "weights", getattr(kernel_offsets, "ndim", 0) == 4
    if getattr(kernel_offsets, "ndim", 2) not in (2, 4):
        raise ValueError(f"kernel_offsets: expected 4 axes (local) or 2 (global), got {kernel_offsets.ndim}")
    weight, depthwise = _checked_weight(weight_name, weight, sizes, x, groups, is_local, has_experts)
    experts = weight.shape[0] if has_experts else 1
    if has_experts:
        sizes["E"] = experts, weight_name
        routing = checks.array("routing", routing, "B E", checks.FEATURES, sizes, like=like)
    outputs = weight.shape[int(has_experts)]
    scope = weight.shape[-2:]
    kernel = scope if kernel_size is None else checks.pair("kernel_size", kernel_size, 1)
    stride, padding = checks.pair("stride", stride, 1), checks.pair("padding", padding, 0)
    dilation = checks.pair("dilation", dilation, 1)
    call = Call(x=x, weight=weight, kernel_size=kernel, stride=stride, padding=padding, dilation=dilation,
                layout=layout)  # fmt: skip
    if has_experts:
        call.weights = weight
    out = _result(call)[0][0]
    out_height, out_width = out[1:3] if is_last else out[2:4]
    if out_height < 1 or out_width < 1:
        rows, columns = (d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
        raise ValueError(
            f"x: expected at least {rows} x {columns} pixels with padding, the size of the dilated kernel, got "
            f"{height + 2 * padding[0]} x {width + 2 * padding[1]}"
        )
    sizes |= {"Ho": (out_height, "the output"), "Wo": (out_width, "the output"), "Cout": (outputs, weight_name)}
    shape, axis = ("B Ho Wo {}", 3) if is_last else ("B {} Ho Wo", 1)
    taps = kernel[0] * kernel[1]
    kernel_groups = data_groups = 1
    if kernel_offsets is not None:
        if is_local:
            kernel_offsets = checks.array("kernel_offsets", kernel_offsets, shape.format("G*K*K*2"), checks.FEATURES,
                                          sizes, like=like)  # fmt: skip
            kernel_groups = _offset_groups("kernel_offsets", kernel_offsets, channels, 2 * taps, axis)
        else:
            sizes["K*K*2"] = 2 * taps, "kernel_size"
            kernel_offsets = checks.array(
                "kernel_offsets", kernel_offsets, "B K*K*2", checks.FEATURES, sizes, like=like
            )
    if data_offsets is not None:
        data_offsets = checks.array("data_offsets", data_offsets, shape.format("2*G*K*K"), checks.FEATURES, sizes,
                                    like=like)  # fmt: skip
        data_groups = _offset_groups("data_offsets", data_offsets, channels, 2 * taps, axis)
        sizes["G*K*K"] = data_groups * taps, "data_offsets"
    if modulations is not None:
        modulations = checks.array("modulations", modulations, shape.format("G*K*K"), checks.FEATURES, sizes, like=like)
        data_groups = _offset_groups("modulations", modulations, channels, taps, axis)
    padded = (height + 2 * padding[0]) * (width + 2 * padding[1]) * data_groups
    if padded > checks.MAX_POINTS:  # kernels number them in 32 bits
        raise ValueError(
            f"x: expected at most {checks.MAX_POINTS} pixels with padding, for all offset groups together, got {padded}"
        )
    if bias is not None:
        bias = checks.array("bias", bias, "Cout", checks.FEATURES, sizes, like=like)
    call.__dict__.update(
        routing=routing, kernel_offsets=kernel_offsets, data_offsets=data_offsets, modulations=modulations, bias=bias,
        batch=batch, channels=channels, height=height, width=width, out_channels=outputs, out_height=out_height,
        out_width=out_width, kernel_height=kernel[0], kernel_width=kernel[1], scope_height=scope[0],
        scope_width=scope[1], row_stride=stride[0], column_stride=stride[1], row_padding=padding[0],
        column_padding=padding[1], row_dilation=dilation[0], column_dilation=dilation[1], groups=groups,
        experts=experts, kernel_groups=kernel_groups, data_groups=data_groups, depthwise=depthwise, is_local=is_local,
        uniform_grid=checks.choice("grid", grid, _GRIDS) == 1, clips=checks.choice("clip", clip, _CLIPS) == 1,
        channels_last=is_last, detach_offsets=checks.boolean("detach_offsets", detach_offsets),
    )  # fmt: skip
    return call


@operator(
    vjp=_gradients,
    diff=("x", "weight", "kernel_offsets", "data_offsets", "modulations", "bias"),
    result=_result,
    kernel="deform2d",
)
def deformable_kernel_conv2d(x: Array[Computed], weight: Array[Computed], kernel_offsets: Array[Computed] | None, *,
                             kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
                             padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
                             data_offsets: Array[Computed] | None = None, modulations: Array[Computed] | None = None,
                             bias: Array[Computed] | None = None, grid: str = "unit", clip: str | None = "scope",
                             layout: str = "NCHW", detach_offsets: bool = False) -> Call[Computed]:  # fmt: skip
    """Convolution of images with a deformable kernel: its taps are resampled from a larger one, at learnt places.

    ``out[j] = Σ_k m_jk x[s j - p + d k + o_jk] W(g_k + r_jk)`` over the K x K taps k of output position j (Gao et al.
    2020, eq. 7; with data offsets eq. 11). The weight W has a scope of Sh x Sw values; W(.) interpolates it bilinearly
    at the grid position g_k of the tap plus its kernel offset r_jk, so the effective receptive field adapts to the
    image while the theoretical one stays. x(.) is 0 outside the image, and bilinear between pixels where there are data
    offsets o; m are modulations. Without any of them it is a plain convolution. Differentiable in all its arrays; see
    `kpcore.autodiff`.

    Parameters
    ----------
    x : (B, C, H, W) float32 or float64
        (B, H, W, C) with ``layout="NHWC"``.
    weight : (C, Sh, Sw) or (Cout, C / groups, Sh, Sw), dtype of x
        The first is depthwise, and so is the second with ``groups=C`` and Cout = C. Local kernel offsets need a
        depthwise one; for them (C, 1, Sh, Sw) is taken without `groups`. The scope S may be smaller than K, too.
    kernel_offsets : (B, G K K 2, Ho, Wo) or (B, K K 2), dtype of x, or None
        In units of the weight's cells. Four axes (with "NHWC" (B, Ho, Wo, G K K 2)): local, one set for each output
        position and each of G groups of channels; channel c is in group c mod G. Two axes: global, one set for each
        image. None: zero offsets. The channel of tap (u, v), row u and column v of the kernel, is
        ((g K K + u K + v) 2 + axis), rows first.
    kernel_size : int or (int, int)
        K: rows and columns of taps.
    stride, padding, dilation : int or (int, int)
        s, p and d above; padding is with zeros.
    groups : int
        Number of equal parts into which input and output channels are divided, as in a plain grouped convolution. May
        be left out for a depthwise weight of three axes.
    data_offsets : (B, 2 G K K, Ho, Wo), dtype of x, optional
        Added to the sampling positions in the image, in pixels, in the order of the kernel offsets. Here the G groups
        are of C / G consecutive channels, as in torchvision; those of kernel offsets are interleaved, as published.
    modulations : (B, G K K, Ho, Wo), dtype of x, optional
        Factors of the samples (Zhu et al. 2019), with the groups of the data offsets; or without these.
    bias : (Cout,), dtype of x, optional
    grid : {"unit", "uniform"}
        Positions g of the taps in the weight's scope, per axis: u + (S - K) / 2, a centred grid of unit spacing, as in
        the published code; or u (S - 1) / (K - 1), spread over the scope, as in the paper (for K = 1 its middle).
    clip : {"scope", None}
        "scope": positions in the weight are clipped to [0, S - 1], as in the paper and in the global form of the
        published code. None: the weight fades to zero within one cell outside of the scope, as in its local form.
    layout : {"NCHW", "NHWC"}
        Order of the axes of x, of all offsets and modulations with four axes, and of the result.
    detach_offsets : bool
        Whether offsets and modulations are constants: their gradients are zero, as for an effective receptive field.

    Returns
    -------
    (B, Cout, Ho, Wo), dtype of x
        Ho = (H + 2 p - d (K - 1) - 1) // s + 1, and so on. (B, Ho, Wo, Cout) with "NHWC".

    Raises
    ------
    ValueError, TypeError
        For shapes or dtypes that do not agree. NaN is not an error: it affects the outputs that it is used for.

    Notes
    -----
    Memory beyond the output is that of a copy of some images, at most 16 MiB or one image, and at most 4 MiB per
    thread; in the backward pass three times as much. With global offsets also two kernels.

    Interpolation has a kink where a position is an integer. There the derivative by the offset is that from the right;
    at the upper end of a clipped scope, where that would be zero for ever, it is that from the left. The derivative is
    zero by an offset that is clipped, and where a sample is a cell or more outside, as in torchvision; infinite data
    offsets are outside. Gradients are the same bits with any number of threads. Second derivatives are an error.

    Examples
    --------
    The mean of 2 x 2 cells of the scope is each tap of a kernel of 3 x 3, as long as the offsets are zero:

    >>> import numpy as np, kpcore as kp
    >>> x, weight = np.ones((1, 1, 3, 3)), np.arange(16.0).reshape(1, 4, 4)
    >>> offsets = np.zeros((1, 18, 3, 3))
    >>> float(kp.deformable_kernel_conv2d(x, weight, offsets, kernel_size=3, padding=1)[0, 0, 1, 1])
    67.5
    >>> offsets[:, 0::2] = 1.5  # rows of the taps: the lower end of the scope
    >>> float(kp.deformable_kernel_conv2d(x, weight, offsets, kernel_size=3, padding=1)[0, 0, 1, 1])
    109.5
    """
    return _checked_call(x, "weight", weight, None, kernel_offsets, data_offsets, modulations, bias, kernel_size,
                         stride, padding, dilation, groups, grid, clip, layout, detach_offsets)  # fmt: skip


@operator(
    vjp=_gradients,
    diff=("x", "weight", "data_offsets", "modulations", "bias"),
    result=_result,
    kernel="deform2d",
)
def deformable_conv2d(x: Array[Computed], weight: Array[Computed], data_offsets: Array[Computed] | None, *,
                      modulations: Array[Computed] | None = None, bias: Array[Computed] | None = None,
                      stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
                      dilation: int | Sequence[int] = 1, groups: int = 1, layout: str = "NCHW",
                      detach_offsets: bool = False) -> Call[Computed]:  # fmt: skip
    """Deformable convolution of images (DCN), and with modulations DCNv2: taps sample the image at learnt positions.

    ``out[j] = Σ_k m_jk x(s j - p + d k + o_jk) W_k`` (Dai et al. 2017, Zhu et al. 2019), with bilinear interpolation
    between pixels and zero outside of the image. Differentiable in all its arrays; see `kpcore.autodiff`.

    Parameters
    ----------
    x : (B, C, H, W) float32 or float64
        (B, H, W, C) with ``layout="NHWC"``.
    weight : (Cout, C / groups, K, K), dtype of x; or (C, K, K), depthwise
    data_offsets : (B, 2 G K K, Ho, Wo), dtype of x, or None
        As in `deformable_kernel_conv2d`, and as in torchvision. None: zero, a plain convolution.
    modulations, bias, stride, padding, dilation, groups, layout, detach_offsets
        As in `deformable_kernel_conv2d`.

    Returns
    -------
    (B, Cout, Ho, Wo), dtype of x
        (B, Ho, Wo, Cout) with "NHWC".

    Raises
    ------
    ValueError, TypeError
        As `deformable_kernel_conv2d`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x, weight = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 1, 1))
    >>> offsets = np.full((1, 2, 3, 3), 0.5)  # half a pixel down and right
    >>> kp.deformable_conv2d(x, weight, offsets)[0, 0]
    array([[2.  , 3.  , 1.75],
           [5.  , 6.  , 3.25],
           [3.25, 3.75, 2.  ]])
    """
    return _checked_call(x, "weight", weight, None, None, data_offsets, modulations, bias, None, stride, padding,
                         dilation, groups, "unit", "scope", layout, detach_offsets)  # fmt: skip


@operator(
    vjp=_gradients,
    diff=("x", "weights", "routing", "kernel_offsets", "data_offsets", "modulations", "bias"),
    result=_result,
    kernel="deform2d",
)
def conditional_conv2d(x: Array[Computed], weights: Array[Computed], routing: Array[Computed], *,
                       kernel_size: int | Sequence[int] | None = None, stride: int | Sequence[int] = 1,
                       padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1,
                       kernel_offsets: Array[Computed] | None = None, data_offsets: Array[Computed] | None = None,
                       modulations: Array[Computed] | None = None, bias: Array[Computed] | None = None,
                       grid: str = "unit", clip: str | None = "scope", layout: str = "NCHW",
                       detach_offsets: bool = False) -> Call[Computed]:  # fmt: skip
    """Conditional convolution of images (CondConv): each image is convolved with a mixture of several kernels.

    ``W_b = Σ_e routing[b, e] weights[e]`` is the kernel of image b (Yang et al. 2019, "soft conditional computation").
    With kernel offsets that kernel is deformable, with data offsets its sampling positions: see
    `deformable_kernel_conv2d`, which has the equation. Differentiable in all its arrays; see `kpcore.autodiff`.

    Parameters
    ----------
    x : (B, C, H, W) float32 or float64
        (B, H, W, C) with ``layout="NHWC"``.
    weights : (E, Cout, C / groups, Sh, Sw), dtype of x; or (E, C, Sh, Sw) or (E, C, 1, Sh, Sw), depthwise
        The kernels of E experts.
    routing : (B, E), dtype of x
    kernel_size : int or (int, int), optional
        By default (Sh, Sw).
    kernel_offsets, data_offsets, modulations, bias, stride, padding, dilation, groups, grid, clip, layout
        As in `deformable_kernel_conv2d`.
    detach_offsets : bool
        As in `deformable_kernel_conv2d`; the routing keeps its gradient.

    Returns
    -------
    (B, Cout, Ho, Wo), dtype of x
        (B, Ho, Wo, Cout) with "NHWC".

    Raises
    ------
    ValueError, TypeError
        As `deformable_kernel_conv2d`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> x, weights = np.ones((2, 1, 1, 1)), np.array([1.0, 10.0]).reshape(2, 1, 1, 1, 1)
    >>> kp.conditional_conv2d(x, weights, np.array([[1.0, 0.0], [0.5, 0.5]])).ravel()
    array([1. , 5.5])
    """
    return _checked_call(x, "weights", weights, routing, kernel_offsets, data_offsets, modulations, bias, kernel_size,
                         stride, padding, dilation, groups, grid, clip, layout, detach_offsets)  # fmt: skip
