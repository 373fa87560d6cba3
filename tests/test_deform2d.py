"""Convolutions of images: deformable kernels, deformable convolution, conditional convolution."""

import itertools
import math

import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits, tolerance

import kpcore as kp

GRADIENTS = ("x", "weight", "weights", "routing", "kernel_offsets", "data_offsets", "modulations", "bias")


# ---- the formulas in float64, tap by tap


def hats(at, size):
    """[(cell, factor)] of the cells 0, ..., size - 1 around a position, with factors max(0, 1 - distance)."""
    return [(cell, 1 - abs(at - cell)) for cell in range(size) if abs(at - cell) < 1]


def interpolated(values, row, column):
    """values (..., rows, columns) at a position, bilinearly; zero outside."""
    total = np.zeros(values.shape[:-2])
    for (y, a), (x, b) in itertools.product(hats(row, values.shape[-2]), hats(column, values.shape[-1])):
        total += a * b * values[..., y, x]
    return total


def grid_positions(scope, taps, grid):
    if grid == "uniform" and taps > 1:
        return np.linspace(0, scope - 1, taps)
    return np.arange(taps) + (scope - taps) / 2


def convolution(x, weight, *, kernel_size=None, stride=1, padding=0, dilation=1, groups=1, kernel_offsets=None,
                data_offsets=None, modulations=None, bias=None, grid="unit", clip="scope", layout="NCHW",
                routing=None, detach_offsets=False):  # fmt: skip
    """Any of the three operators; `weight` has an axis of experts if there is a routing."""
    to_first = (lambda a: np.moveaxis(a, -1, 1)) if layout == "NHWC" else (lambda a: a)
    x = to_first(x.astype(np.float64))
    batch, channels, height, width = x.shape
    weight = (weight if routing is not None else weight[None]).astype(np.float64)
    experts, scope = len(weight), weight.shape[-2:]
    depthwise = weight.ndim == 4 or (weight.shape[2] == 1 and weight.shape[1] == channels)
    if depthwise:
        weight, groups = weight.reshape(experts, channels, 1, *scope), channels
    routing = np.ones((batch, 1)) if routing is None else routing.astype(np.float64)
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (kernel_size or scope, stride, padding, dilation)]
    (rows, columns), stride, padding, dilation = pairs
    out_height, out_width = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((height, width), (rows, columns), stride, padding, dilation, strict=True)
    )
    outputs, taps = weight.shape[1], rows * columns
    local = kernel_offsets is not None and kernel_offsets.ndim == 4
    kernel_offsets = to_first(kernel_offsets) if local else kernel_offsets
    data_offsets = None if data_offsets is None else to_first(data_offsets)
    modulations = None if modulations is None else to_first(modulations)
    kernel_groups = kernel_offsets.shape[1] // (2 * taps) if local else 1
    data_groups = 1
    if data_offsets is not None or modulations is not None:
        data_groups = modulations.shape[1] // taps if data_offsets is None else data_offsets.shape[1] // (2 * taps)
    out = np.zeros((batch, outputs, out_height, out_width))
    for b, oy, ox, u, v in itertools.product(*map(range, (batch, out_height, out_width, rows, columns))):
        kernel = np.tensordot(routing[b], weight, 1)  # (Cout, Cin / groups, Sh, Sw)
        tap, sampled = u * columns + v, np.zeros((outputs, weight.shape[2]))
        for g in range(kernel_groups):
            at = np.array([grid_positions(scope[0], rows, grid)[u], grid_positions(scope[1], columns, grid)[v]])
            if kernel_offsets is not None:
                first = (g * taps + tap) * 2
                at = at + (kernel_offsets[b, first : first + 2, oy, ox] if local else kernel_offsets[b, first : first + 2])
            if clip == "scope":
                at = np.clip(at, 0, np.array(scope) - 1)
            sampled[g::kernel_groups] = interpolated(kernel[g::kernel_groups], *at)
        values = np.zeros(channels)
        for g in range(data_groups):
            part = slice(channels * g // data_groups, channels * (g + 1) // data_groups)
            at = np.array([oy, ox]) * stride - padding + np.array([u, v]) * dilation
            if data_offsets is not None:
                at = at + data_offsets[b, (g * taps + tap) * 2 : (g * taps + tap) * 2 + 2, oy, ox]
            values[part] = interpolated(x[b, part], *at)
            if modulations is not None:
                values[part] *= modulations[b, g * taps + tap, oy, ox]
        by_group, per_group = values.reshape(groups, -1), outputs // groups
        for o in range(outputs):
            out[b, o, oy, ox] += sampled[o] @ by_group[o // per_group]
    if bias is not None:
        out += bias.astype(np.float64)[:, None, None]
    return np.moveaxis(out, 1, -1) if layout == "NHWC" else out


# ---- problems


def problem(kind="kernel", form="local", batch=2, channels=6, outputs=None, size=(7, 6), kernel=3, scope=4, stride=1,
            padding=1, dilation=1, groups=1, kernel_groups=1, data_groups=None, modulated=False, bias=True, experts=None,
            layout="NCHW", dtype=np.float64, seed=0, spread=0.7, **more):  # fmt: skip
    """(function, arguments) with random arrays. `form`: of the kernel offsets, "local", "global" or None. `data_groups`:
    None without data offsets."""
    rng, pair = np.random.default_rng(seed), lambda value: value if isinstance(value, tuple) else (value, value)
    kernel, scope, stride, padding, dilation = map(pair, (kernel, scope, stride, padding, dilation))
    taps, depthwise = math.prod(kernel), form == "local" or groups == channels
    outputs = channels if depthwise else outputs or channels + 2
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1
           for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)]  # fmt: skip

    def image(count, scale=1.0):
        shape = (batch, count, *out) if layout == "NCHW" else (batch, *out, count)
        return (scale * rng.normal(size=shape)).astype(dtype)

    shape = (outputs, 1 if depthwise else channels // groups, *scope)
    weight = rng.normal(size=shape if experts is None else (experts, *shape)).astype(dtype)
    x = rng.normal(size=(batch, channels, *size) if layout == "NCHW" else (batch, *size, channels)).astype(dtype)
    arguments = {"x": x, "weight" if experts is None else "weights": weight}
    if experts is not None:
        arguments["routing"] = rng.normal(size=(batch, experts)).astype(dtype)
    if kind != "data":
        arguments["kernel_offsets"] = {
            "local": lambda: image(kernel_groups * taps * 2, spread),
            "global": lambda: (spread * rng.normal(size=(batch, taps * 2))).astype(dtype),
            None: lambda: None,
        }[form]()
        arguments["kernel_size"] = kernel
    arguments["data_offsets"] = None if data_groups is None else image(data_groups * taps * 2, 1.5)
    if modulated:
        arguments["modulations"] = image((data_groups or 1) * taps)
    if bias:
        arguments["bias"] = rng.normal(size=outputs).astype(dtype)
    arguments |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "layout": layout, **more}
    function = kp.conditional_conv2d if experts is not None else kp.deformable_conv2d
    if kind != "data" and experts is None:
        function = kp.deformable_kernel_conv2d
    return function, arguments


def expected(arguments):
    """The result by the formulas."""
    arguments = dict(arguments)
    weight = arguments.pop("weights", None)
    return convolution(arguments.pop("x"), arguments.pop("weight", None) if weight is None else weight, **arguments)


PROBLEMS = {
    "local": {},
    "local, groups": {"kernel_groups": 3, "channels": 9},
    "local, fading": {"clip": None, "spread": 2.0},
    "local, clipped": {"clip": "scope", "spread": 2.0},
    "local, uniform": {"grid": "uniform", "scope": 5},
    "local, strided": {"stride": 2, "padding": (2, 0), "size": (9, 8)},
    "local, dilated": {"dilation": (1, 2), "padding": 2, "kernel": (3, 2), "scope": (4, 5)},
    "local, scope 1": {"kernel": 1, "scope": 1, "padding": 0},
    "local, scope smaller than the kernel": {"kernel": 3, "scope": 2},
    "local, channels last": {"layout": "NHWC", "kernel_groups": 2},
    "local, data": {"data_groups": 1},
    "local, data groups": {"data_groups": 3, "kernel_groups": 2, "channels": 12, "modulated": True},
    "local, modulated": {"modulated": True},
    "local, experts": {"experts": 3},
    "global": {"form": "global"},
    "global, groups": {"form": "global", "groups": 2},
    "global, depthwise": {"form": "global", "groups": 6, "clip": None},
    "global, 1 x 1": {"form": "global", "kernel": 1, "scope": 2, "padding": 0},
    "global, data": {"form": "global", "data_groups": 2, "modulated": True},
    "global, experts": {"form": "global", "experts": 2, "groups": 2},
    "no offsets": {"form": None, "scope": 5, "grid": "uniform"},
    "data": {"kind": "data", "form": None, "scope": 3, "data_groups": 1},
    "data, groups": {"kind": "data", "form": None, "scope": 3, "data_groups": 3, "groups": 2, "modulated": True},
    "data, depthwise": {"kind": "data", "form": None, "scope": 3, "data_groups": 2, "groups": 6, "modulated": True},
    "data, strided": {"kind": "data", "form": None, "scope": (2, 3), "kernel": (2, 3), "data_groups": 1, "stride": (2, 1),
                      "layout": "NHWC"},
    "modulated": {"kind": "data", "form": None, "scope": 3, "modulated": True, "bias": False},
    "plain": {"kind": "data", "form": None, "scope": 3},
    "plain, depthwise": {"kind": "data", "form": None, "scope": 3, "groups": 6, "stride": 2},
    "plain, strided": {"kind": "data", "form": None, "scope": 3, "stride": (3, 2), "dilation": 2, "size": (11, 9)},
    "experts": {"kind": "data", "form": None, "scope": 3, "experts": 2},
    "experts, depthwise": {"kind": "data", "form": None, "scope": 3, "experts": 3, "groups": 6, "layout": "NHWC"},
}  # fmt: skip
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def example(name):
    """A function from arguments to those of a problem in PROBLEMS, with as many images, at most two, in their dtype."""

    def arguments(like):
        sizes = {"batch": len(like["x"]), "dtype": like["x"].dtype, "size": (6, 5)}
        absent = dict.fromkeys({*GRADIENTS, "kernel_size"} & set(like))
        return absent | problem(**PROBLEMS[name] | sizes)[1]

    return arguments


CALLS = {
    operator: (
        lambda num, geometry, features, kind=kind: problem(
            **kind, batch=min(2, num), channels=4, size=(6, 5), dtype=features
        )[1],
        [{}, *map(example, names)],
    )
    for operator, kind, names in (
        (
            "deformable_kernel_conv2d",
            {"kernel_groups": 2, "data_groups": 2, "modulated": True},
            ["local, channels last", "local, fading", "global, groups", "global, data", "no offsets"],
        ),
        (
            "deformable_conv2d",
            {"kind": "data", "form": None, "scope": 3, "data_groups": 2, "groups": 2, "modulated": True},
            ["data, depthwise", "data, strided", "plain", "plain, depthwise"],
        ),
        (
            "conditional_conv2d",
            {"experts": 2, "data_groups": 1},
            ["local, experts", "global, experts", "experts", "experts, depthwise"],
        ),
    )
}


# ---- values


@each_problem
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_values_are_those_of_the_formulas(name, dtype):
    function, arguments = problem(**PROBLEMS[name], dtype=dtype)
    out = function(**arguments)
    assert out.dtype == dtype
    assert_close(out, expected(arguments), tolerance(dtype))


def gradients(function, arguments, names=GRADIENTS):
    """{name: gradient} of the arguments in `names` that are set, and the result as "out"."""
    names = [name for name in names if arguments.get(name) is not None]
    out, pullback = kp.autodiff.vjp(
        lambda *values: function(**arguments | dict(zip(names, values, strict=True))), *(arguments[n] for n in names)
    )
    grad = np.random.default_rng(7).normal(size=out.shape).astype(out.dtype)
    return dict(zip(names, pullback(grad), strict=True)) | {"out": out}


@each_problem
def test_gradients_by_differences(name):
    """Of each argument separately."""
    function, arguments = problem(**PROBLEMS[name], seed=3)
    for name in GRADIENTS:
        if arguments.get(name) is None:
            continue
        fn = lambda value, name=name: function(**arguments | {name: value})
        check_vjp(fn, kp.autodiff.vjp(fn, arguments[name])[1], [arguments[name]], step=1e-6, tolerance=1e-6)


@each_problem
def test_gradients_of_float32(name):
    function, arguments = problem(**PROBLEMS[name], dtype=np.float32)
    doubles = {n: a.astype(np.float64) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    expected = gradients(function, doubles)
    for n, gradient in gradients(function, arguments).items():
        assert gradient.dtype == np.float32
        assert_close(gradient, expected[n], 2e-5)
