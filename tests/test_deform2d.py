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
                at = at + (
                    kernel_offsets[b, first : first + 2, oy, ox] if local else kernel_offsets[b, first : first + 2]
                )
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
            padding=1, dilation=1, groups=1, kernel_groups=1, data_groups=None, modulated=False, bias=True,
            experts=None, layout="NCHW", dtype=np.float64, seed=0, spread=0.7, **more):  # fmt: skip
    """(function, arguments) with random arrays. `form`: of the kernel offsets, "local", "global" or None.

    `data_groups`: None without data offsets.
    """
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
    arguments |= {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "layout": layout,
        **more,
    }
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
    "data, strided": {"kind": "data", "form": None, "scope": (2, 3), "kernel": (2, 3), "data_groups": 1,
                      "stride": (2, 1), "layout": "NHWC"},
    "modulated": {"kind": "data", "form": None, "scope": 3, "modulated": True, "bias": False},
    "plain": {"kind": "data", "form": None, "scope": 3},
    "plain, depthwise": {"kind": "data", "form": None, "scope": 3, "groups": 6, "stride": 2},
    "plain, strided": {"kind": "data", "form": None, "scope": 3, "stride": (3, 2), "dilation": 2, "size": (11, 9)},
    "experts": {"kind": "data", "form": None, "scope": 3, "experts": 2},
    "experts, depthwise": {"kind": "data", "form": None, "scope": 3, "experts": 3, "groups": 6, "layout": "NHWC"},
}  # fmt: skip
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def example(**options):
    """An entry of CALLS. Its arguments are those of a problem; without points there are no images."""

    def make(num, geometry, features):
        batch = options.get("batch", 2) if num else 0
        return problem(**{"size": (5, 4), "dtype": features} | options | {"batch": batch})[1]

    return make


CALLS = {
    "deformable_kernel_conv2d": (
        example(channels=4, kernel_groups=2, data_groups=1, modulated=True),
        [
            {},
            {"data_offsets": None, "modulations": None, "clip": None, "grid": "uniform"},
            {"data_offsets": None, "modulations": None, "bias": None},
            lambda a: {"kernel_offsets": np.ascontiguousarray(a["kernel_offsets"][:, :18, 0, 0]), "groups": 4},
        ],
    ),
    "deformable_conv2d": (
        example(kind="data", form=None, scope=3, data_groups=2, groups=2, modulated=True, channels=6, outputs=4),
        [{}, {"modulations": None, "bias": None}, {"data_offsets": None, "modulations": None, "layout": "NCHW"}],
    ),
    "conditional_conv2d": (
        example(form="global", experts=2, groups=2, channels=4, data_groups=1, layout="NHWC"),
        [{}, {"data_offsets": None, "bias": None}, {"kernel_offsets": None, "data_offsets": None, "kernel_size": None}],
    ),
}


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

        def fn(value, name=name):
            return function(**arguments | {name: value})

        check_vjp(fn, kp.autodiff.vjp(fn, arguments[name])[1], [arguments[name]], step=1e-6, tolerance=1e-6)


@each_problem
def test_gradients_of_float32(name):
    function, arguments = problem(**PROBLEMS[name], dtype=np.float32)
    doubles = {n: a.astype(np.float64) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    expected = gradients(function, doubles)
    for n, gradient in gradients(function, arguments).items():
        assert gradient.dtype == np.float32
        assert_close(gradient, expected[n], 2e-5)


# ---- the three operators and plain convolution


def test_zero_offsets_of_a_kernel_without_scope_are_a_plain_convolution():
    _, arguments = problem(scope=3, groups=1)
    zero = np.zeros_like(arguments["kernel_offsets"])
    plain = kp.deformable_conv2d(arguments["x"], arguments["weight"], None, bias=arguments["bias"], padding=1, groups=6)
    for clip in ("scope", None):
        for grid in ("unit", "uniform"):
            out = kp.deformable_kernel_conv2d(**arguments | {"kernel_offsets": zero, "clip": clip, "grid": grid})
            assert_close(out, plain, 1e-14)
    assert_close(plain, expected(arguments | {"kernel_offsets": zero}), 1e-13)


@pytest.mark.parametrize("depthwise", [False, True])
def test_data_offsets_of_zero_change_no_bit(depthwise):
    """Neither does the number of images: torchvision and mmcv had errors of both kinds."""
    more = {"groups": 6} if depthwise else {}
    _, arguments = problem(
        kind="data", form=None, scope=3, data_groups=1, batch=33, size=(4, 5), dtype=np.float32, **more
    )
    plain = kp.deformable_conv2d(**arguments | {"data_offsets": None})
    assert_same_bits(kp.deformable_conv2d(**arguments | {"data_offsets": 0 * arguments["data_offsets"]}), plain)
    each = [kp.deformable_conv2d(**arguments | {n: arguments[n][i : i + 1] for n in ("x", "data_offsets")})
            for i in range(33)]  # fmt: skip
    assert_same_bits(np.concatenate(each), kp.deformable_conv2d(**arguments))


def test_a_scope_of_four_is_averaged_over_two_by_two_cells():
    _, arguments = problem(scope=4)
    weight = arguments["weight"]
    means = (weight[..., :-1, :-1] + weight[..., 1:, :-1] + weight[..., :-1, 1:] + weight[..., 1:, 1:]) / 4
    out = kp.deformable_kernel_conv2d(**arguments | {"kernel_offsets": np.zeros_like(arguments["kernel_offsets"])})
    plain = kp.deformable_conv2d(arguments["x"], means, None, bias=arguments["bias"], padding=1, groups=6)
    assert_close(out, plain, 1e-14)


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (-1, 2), (1, -1)])
def test_integer_offsets_shift(shift):
    """Kernel offsets shift the kernel within its scope, data offsets the image."""
    _, arguments = problem(scope=7, spread=0.0)
    offsets = arguments["kernel_offsets"]
    offsets[:, 0::2], offsets[:, 1::2] = shift
    first = [2 + s for s in shift]
    part = arguments["weight"][:, :, first[0] : first[0] + 3, first[1] : first[1] + 3]
    plain = kp.deformable_conv2d(arguments["x"], part, None, bias=arguments["bias"], padding=1, groups=6)
    assert_close(kp.deformable_kernel_conv2d(**arguments), plain, 1e-14)
    shifted = np.zeros_like(arguments["x"])
    (dy, dx), (height, width) = shift, shifted.shape[2:]
    rows, columns = (np.arange(max(0, -d), min(n, n - d)) for d, n in ((dy, height), (dx, width)))
    shifted[:, :, rows[:, None], columns] = arguments["x"][:, :, rows[:, None] + dy, columns + dx]
    data = np.zeros_like(offsets)
    data[:, 0::2], data[:, 1::2] = shift
    out = kp.deformable_conv2d(arguments["x"], part, data, padding=1, groups=6)
    # The padding is shifted too, so pixels at the border see pixels of the image that a shifted image has lost.
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    plain = kp.deformable_conv2d(shifted, part, None, padding=1, groups=6)
    assert_close(out[inner], plain[inner], 1e-14)


def test_a_mixture_of_equal_experts_is_one_of_them():
    _, arguments = problem(experts=3, form="global", groups=2)
    arguments["weights"][:] = arguments["weights"][0]
    arguments["routing"] = np.full_like(arguments["routing"], 1 / 3)
    weight = arguments["weights"][0]
    others = {name: value for name, value in arguments.items() if name not in ("weights", "routing")}
    assert_close(kp.conditional_conv2d(**arguments), kp.deformable_kernel_conv2d(weight=weight, **others), 1e-13)


@pytest.mark.parametrize("groups", [1, 2])
def test_global_offsets_are_the_same_at_all_positions(groups):
    """Local offsets that are equal everywhere give the result of global ones."""
    _, arguments = problem(form="global", channels=4, groups=4)
    offsets = arguments["kernel_offsets"]
    local = np.broadcast_to(np.tile(offsets, (1, groups))[:, :, None, None], (2, 18 * groups, 7, 6)).copy()
    assert_close(kp.deformable_kernel_conv2d(**arguments | {"kernel_offsets": local}),
                 kp.deformable_kernel_conv2d(**arguments), 1e-13)  # fmt: skip


# ---- derivatives where interpolation has a kink


def slope(function, arguments, name, channel):
    """The derivative of the sum of the result by one channel of offsets, at all positions together."""
    out, pullback = kp.autodiff.vjp(lambda v: function(**arguments | {name: v}), arguments[name])
    return pullback(np.ones_like(out))[0][:, channel].sum()


def difference(function, arguments, name, channel, step):
    moved = arguments[name].copy()
    moved[:, channel] += step
    return (function(**arguments | {name: moved}).sum() - function(**arguments).sum()) / step


@pytest.mark.parametrize(
    ("clip", "offset", "step"),
    [
        (None, 0.0, 1e-6),  # from the right at a cell
        (None, 1.0, 1e-6),  # also at the last one, beyond which the weight fades to zero
        ("scope", 0.0, 1e-6),
        ("scope", -1.0, 1e-6),  # at the first cell, towards the inside
        ("scope", 1.0, -1e-6),  # at the last cell too
    ],
)
def test_slope_at_a_cell(clip, offset, step):
    function, arguments = problem(scope=3, batch=1, channels=2, spread=0.0, clip=clip)
    channel = 8  # row of the tap in the middle
    arguments["kernel_offsets"][:, channel] = offset
    got = slope(function, arguments, "kernel_offsets", channel)
    assert got == pytest.approx(difference(function, arguments, "kernel_offsets", channel, step), rel=1e-6)
    assert abs(got) > 1e-3


@pytest.mark.parametrize("offset", [1.5, -2.5])
def test_offsets_that_are_clipped_have_no_gradient(offset):
    function, arguments = problem(scope=3, batch=1, channels=2, spread=0.0)
    arguments["kernel_offsets"][:, 8] = offset
    assert slope(function, arguments, "kernel_offsets", 8) == 0


def test_slope_of_data_offsets_at_a_pixel():
    """From the right; samples end at the last pixels and beyond."""
    function, arguments = problem(kind="data", form=None, scope=3, data_groups=1, batch=1, padding=0)
    arguments["data_offsets"][:] = abs(np.round(arguments["data_offsets"]))
    for channel in (0, 1, 9):
        expected = difference(function, arguments, "data_offsets", channel, 1e-6)
        assert slope(function, arguments, "data_offsets", channel) == pytest.approx(expected, rel=1e-6)


# ---- what holds for all of them


@each_problem
def test_only_the_gradients_that_are_needed(name):
    """Each has the same bits whatever else is computed."""
    function, arguments = problem(**PROBLEMS[name], dtype=np.float32)
    together = gradients(function, arguments)
    for n in GRADIENTS:
        if arguments.get(n) is not None:
            assert_same_bits(gradients(function, arguments, (n,))[n], together[n])


@pytest.mark.parametrize("name", ["local", "local, data groups", "global, data", "data, groups", "experts", "plain"])
def test_the_same_bits_with_any_number_of_threads(name, isa, set_threads):
    sizes = {"size": (40, 37), "channels": 12, "batch": 3} | ({"outputs": 14} if "global" in name else {})
    function, arguments = problem(**PROBLEMS[name] | sizes, dtype=np.float32)
    results = []
    for threads in (1, 2, 7):
        set_threads(threads)
        results.append(gradients(function, arguments))
    for other in results[1:]:
        for n, value in results[0].items():
            assert_same_bits(other[n], value)


@pytest.mark.parametrize("channels", [1, 2, 15, 16, 17, 33, 64, 65, 100])
@pytest.mark.parametrize("name", ["local", "local, data", "data", "global", "plain, depthwise"])
def test_channels(name, channels, isa):
    more = {"groups": channels} if name == "plain, depthwise" else {}
    sizes = {"channels": channels, "size": (4, 5), "batch": 1}
    function, arguments = problem(**PROBLEMS[name] | sizes | more, dtype=np.float32)
    assert_close(function(**arguments), expected(arguments), 2e-5)
    doubles = {n: a.astype(np.float64) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
    for n, gradient in gradients(function, arguments).items():
        assert_close(gradient, gradients(function, doubles)[n], 3e-5)


@pytest.mark.parametrize("groups", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_offset_groups(groups, isa):
    """Channels are stored in another order, in vectors of two to sixteen."""
    kernel_groups, data_groups = groups
    function, arguments = problem(channels=4 * kernel_groups, kernel_groups=kernel_groups, data_groups=data_groups)
    assert_close(function(**arguments), expected(arguments), 1e-10)


def test_a_pixel_that_is_not_finite_reaches_no_sample_outside():
    """Samples outside of the image read some pixel, times zero. Here those of one group are outside, not the others."""
    _, arguments = problem(kind="data", form=None, scope=3, data_groups=2, batch=1)
    arguments["data_offsets"][:, :18] = 100
    arguments["data_offsets"][:, 18:] = 0.25
    arguments["x"][0, :, 0, 0] = arguments["x"][0, :, -1, -1] = np.nan
    out = kp.deformable_conv2d(**arguments)
    assert np.isfinite(out[0, :, 2:-3, 2:-3]).all()
    assert np.isnan(out[0, :, 0, 0]).all()


def test_layouts_agree():
    function, arguments = problem(data_groups=2, modulated=True, kernel_groups=3)
    last = {n: np.ascontiguousarray(np.moveaxis(arguments[n], 1, -1))
            for n in ("x", "kernel_offsets", "data_offsets", "modulations")}  # fmt: skip
    out = function(**arguments | last | {"layout": "NHWC"})
    assert_same_bits(np.ascontiguousarray(np.moveaxis(out, -1, 1)), function(**arguments))


@pytest.mark.parametrize("name", ["local", "local, data", "data", "global, experts"])
def test_no_images(name):
    function, arguments = problem(**PROBLEMS[name] | {"batch": 0})
    results = gradients(function, arguments)
    assert results["out"].shape[0] == 0
    for n in ("weight", "weights", "bias"):
        assert not results.get(n, np.zeros(1)).any()


def test_detached_offsets_have_zero_gradients():
    function, arguments = problem(data_groups=1, modulated=True)
    full, detached = gradients(function, arguments), gradients(function, arguments | {"detach_offsets": True})
    for n, gradient in detached.items():
        if n in ("kernel_offsets", "data_offsets", "modulations"):
            assert gradient.shape == full[n].shape
            assert not gradient.any()
            assert full[n].any()
        else:
            assert_same_bits(gradient, full[n])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_offsets_that_are_not_finite_or_far_away_change_only_their_position(value):
    """NaN gives NaN; an infinite offset is clipped to the scope, or lies outside of the image."""
    function, arguments = problem(data_groups=1, clip="scope")
    before = function(**arguments)
    for n in ("kernel_offsets", "data_offsets"):
        changed = arguments[n].copy()
        changed[0, 3, 2, 2] = value
        out = function(**arguments | {n: changed})
        assert np.isnan(out[0, :, 2, 2]).all() == np.isnan(value)
        out[0, :, 2, 2] = before[0, :, 2, 2]
        assert_same_bits(out, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((2, 6, 7))}, ValueError, r"x: expected \(B, C, H, W\), got \(2, 6, 7\)"),
        ({"x": np.zeros((2, 0, 7, 6))}, ValueError, "x: expected at least 1 channel"),
        ({"layout": "NCWH"}, ValueError, "layout: expected 'NCHW' or 'NHWC', got 'NCWH'"),
        ({"grid": "linear"}, ValueError, "grid: expected 'unit' or 'uniform'"),
        ({"clip": True}, ValueError, "clip: expected None or 'scope', got True"),
        ({"stride": 0}, ValueError, "stride: expected 1 to 2147483647, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, "stride: expected an integer, or one for each axis, got 3 of them"),
        ({"padding": -1}, ValueError, "padding: expected 0 to 2147483647, got -1"),
        ({"kernel_size": 2.5}, TypeError, "kernel_size: expected an integer, got float"),
        ({"kernel_size": 9}, ValueError, "x: expected at least 9 x 9 pixels with padding, the size of the dilated"),
        ({"padding": 2**20, "kernel_offsets": None, "kernel_size": 2**20, "groups": 6}, ValueError,
         "x: expected at most 2147483647 pixels with padding, for all offset groups together, got 4398"),
        ({"groups": 2}, ValueError, "groups: expected 6, the number of channels of x, because weight is depthwise"),
        ({"weight": np.zeros((6, 2, 4, 4))}, ValueError, r"weight: expected \(C, Sh, Sw\) or \(C, 1, Sh, Sw\) with"),
        ({"weight": np.zeros((5, 4, 4))}, ValueError, r"weight: expected \(6, Sh, Sw\) to match x, got \(5, 4, 4\)"),
        ({"weight": np.zeros((6, 1, 0, 4))}, ValueError, "weight: expected sizes of at least 1"),
        ({"weight": np.zeros((6, 1, 4, 4), np.float32)}, TypeError, "weight: expected float64 to match x, got float32"),
        ({"kernel_offsets": np.zeros((2, 17, 7, 6))}, ValueError, "kernel_offsets: expected a multiple of 18 at"),
        ({"kernel_offsets": np.zeros((2, 72, 7, 6))}, ValueError, "kernel_offsets: expected offset groups that"),
        ({"kernel_offsets": np.zeros((2, 18, 7, 5))}, ValueError, "kernel_offsets: .* to match the output and x"),
        ({"kernel_offsets": np.zeros((2, 17)), "groups": 6}, ValueError, r"kernel_offsets: expected \(2, 18\) to"),
        ({"kernel_offsets": np.zeros((2, 18, 7))}, ValueError,
         r"kernel_offsets: expected 4 axes \(local\) or 2 \(global\), got 3"),
        ({"data_offsets": np.zeros((2, 9, 7, 6))}, ValueError, "data_offsets: expected a multiple of 18 at axis 1"),
        ({"data_offsets": np.zeros((2, 18, 7, 6)), "modulations": np.zeros((2, 18, 7, 6))}, ValueError,
         r"modulations: expected \(2, 9, 7, 6\) to match data_offsets and the output and x"),
        ({"bias": np.zeros(5)}, ValueError, r"bias: expected \(6,\) to match weight, got \(5,\)"),
        ({"detach_offsets": 1}, TypeError, "detach_offsets: expected True or False, got int"),
    ],
)  # fmt: skip
def test_errors(changes, error, message):
    function, arguments = problem()
    with pytest.raises(error, match=message):
        function(**arguments | changes)


def test_errors_of_experts_and_groups():
    function, arguments = problem(experts=2, form="global", groups=2)
    with pytest.raises(ValueError, match=r"routing: expected \(2, 2\) to match weights and x, got \(2, 3\)"):
        function(**arguments | {"routing": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"weights: expected \(E, Cout, 2, Sh, Sw\) to match x and groups"):
        function(**arguments | {"groups": 3})
    with pytest.raises(ValueError, match="groups: expected a divisor of 6 channels of x, got 4"):
        function(**arguments | {"groups": 4})
    message = (
        "groups: expected 6 for a depthwise weights of shape .*, got 1; pass groups=6, or weights without its axis"
    )
    with pytest.raises(ValueError, match=message):
        function(**arguments | {"weights": np.zeros((2, 6, 1, 4, 4)), "groups": 1, "bias": None})
    weights = np.zeros((2, 7, 3, 4, 4))
    with pytest.raises(ValueError, match="groups: expected a divisor of 7 output channels of weights, got 2"):
        function(**arguments | {"weights": weights, "bias": None})
