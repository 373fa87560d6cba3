"""Effective receptive fields: against the recursion over layers, against known results, in every framework."""

import contextlib
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import clouds
import numpy as np
import pytest
import reference
from reference import receptive_field_over_paths, receptive_field_recursion

import kpcore as kp
from kpcore import nn, receptive_field
from kpcore.nn import blocks

LAYOUTS = ("NCHW", "NHWC")
FRAMEWORKS = ("torch", "jax")


@pytest.fixture(params=FRAMEWORKS)
def images(request):
    """A framework with two-dimensional convolutions: `array` of NumPy values, `conv` and `relu`."""
    if request.param == "torch":
        torch = pytest.importorskip("torch")
        conv = torch.nn.functional.conv2d
        yield SimpleNamespace(
            array=torch.tensor, relu=torch.relu,
            conv=lambda x, w, **o: conv(x, torch.tensor(w).to(x.dtype), **o)
        )  # fmt: skip
        return
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)

    def conv(x, w, stride=1, padding=0, dilation=1):
        return jax.lax.conv_general_dilated(x, jax.numpy.asarray(w, x.dtype), (stride, stride),
                                            [(padding, padding)] * 2, rhs_dilation=(dilation, dilation))  # fmt: skip

    yield SimpleNamespace(array=jax.numpy.asarray, relu=jax.nn.relu, conv=conv)
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(params=["tape", *FRAMEWORKS])
def points_framework(request):
    """The functions of kpcore in a framework, F, and `array` of NumPy values."""
    if request.param == "tape":
        yield SimpleNamespace(F=kp, array=np.asarray)
        return
    module = pytest.importorskip(request.param)
    if request.param == "torch":
        yield SimpleNamespace(F=kp.torch, array=module.tensor)
        return
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", True)
    yield SimpleNamespace(F=kp.jax, array=module.numpy.asarray)
    module.config.update("jax_enable_x64", before)


def in_layout(fn, layout):
    """A function of NCHW images as one of images in a layout."""
    if layout == "NCHW":
        return fn
    axes = (lambda x: x.transpose(0, 3, 1, 2), lambda x: x.transpose(0, 2, 3, 1))
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        axes = tuple(lambda x, own=own, order=order: x.permute(order) if isinstance(x, torch.Tensor) else own(x)
                     for own, order in zip(axes, ((0, 3, 1, 2), (0, 2, 3, 1)), strict=True))  # fmt: skip
    return lambda x: axes[1](fn(axes[0](x)))


def random_layers(
    seed, size=(9, 10), channels=(2, 3, 2), options=({"stride": 2, "padding": 1}, {"padding": 1, "dilation": 2})
):
    """Kernels (C_out, C_in, 3, 3), options of their convolutions, and their layers for the recursion."""
    rng, kernels, layers = np.random.default_rng(seed), [], []
    for (cin, cout), option in zip(itertools.pairwise(channels), options, strict=True):
        stride, padding, dilation = option.get("stride", 1), option.get("padding", 0), option.get("dilation", 1)
        kernels.append(rng.normal(size=(cout, cin, 3, 3)))
        size = tuple((axis + 2 * padding - 2 * dilation - 1) // stride + 1 for axis in size)
        places = np.stack(np.indices(size), -1)[:, :, None] * stride - padding
        taps = np.stack(np.indices((3, 3)), -1).reshape(9, 2) * dilation
        w = kernels[-1].transpose(2, 3, 1, 0).reshape(9, cin, cout)
        layers.append((places + taps, np.broadcast_to(w, (*size, *w.shape))))
    return kernels, options, layers


# ---- the recursion that the other tests trust


@pytest.mark.parametrize("dim", [1, 2])
def test_the_recursion_is_the_sum_over_paths(dim):
    """Equation 3 of Gao et al. (2020), and 5: layer m as the sum of its taps, each a kernel of one tap."""
    rng = np.random.default_rng(dim)
    taps = list(itertools.product(*[(-1, 0, 1)] * dim))
    kernels = [{k: rng.normal() for k in taps} for _ in range(3)]
    grid = (9,) * dim
    places = np.stack(np.indices(grid), -1)[..., None, :] + np.array(taps)
    layers = [(places, np.broadcast_to(list(kernel.values()), (*grid, len(taps)))) for kernel in kernels]
    fields = receptive_field_recursion(layers, grid)[(*[4] * dim, 0)][..., 0]
    expected = np.array([receptive_field_over_paths(kernels, i, (4,) * dim) for i in np.ndindex(grid)])
    assert np.abs(fields.reshape(-1) - expected).max() < 1e-12 * np.abs(expected).max()
    others = [kernels[0], kernels[2]]
    for i in list(np.ndindex(grid))[::3]:
        by_taps = sum(
            w * receptive_field_over_paths(others, i, tuple(np.add([4] * dim, k))) for k, w in kernels[1].items()
        )
        assert abs(by_taps - fields[i]) < 1e-12 * np.abs(expected).max()


def test_the_recursion_interpolates_between_places():
    places, weights = np.array([[[0.25], [1.5]], [[2.75], [-0.5]]]), np.array([[1.0, 2], [4, 8]])
    fields = receptive_field_recursion([(places, weights)], (4,))
    assert np.array_equal(fields[:, 0, :, 0], [[0.75, 0.25 + 1, 1, 0], [4, 0, 1, 3]])


# ---- images


@pytest.mark.parametrize(("size", "num"), [(1, 3), (3, 1), (3, 4), (5, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_of_ones(images, size, num, layout):
    """n layers of K x K ones: mass K^(2n) and variance n (K² - 1) / 12 along each axis."""
    kernel, middle = np.ones((1, 1, size, size)), num * (size // 2) + 1

    def fn(x):
        for _ in range(num):
            x = images.conv(x, kernel, padding=size // 2)
        return x

    shape = (1, 1, 2 * middle + 1, 2 * middle + 1)
    x = images.array(np.zeros(shape if layout == "NCHW" else shape[:1] + shape[2:] + shape[1:2]))
    fields = kp.effective_receptive_field(in_layout(fn, layout), x, [[0, middle, middle]], layout=layout)
    assert (fields.dtype, fields.shape) == (np.float64, (1, *shape[2:]))
    assert fields.sum() == size ** (2 * num)
    variance = num * (size**2 - 1) / 12
    assert np.allclose(kp.receptive_field_moments(fields), variance, rtol=1e-12)
    assert np.allclose(kp.receptive_field_moments(fields, [[middle, middle]]), variance, rtol=1e-12)
    box = np.ones(1)
    for _ in range(num):
        box = np.convolve(box, np.ones(size))
    assert np.array_equal(fields[0], np.pad(np.outer(box, box), 1))


@pytest.mark.parametrize("gated", [False, True])
def test_images_by_the_recursion(images, gated):
    """Strided, padded and dilated layers with several channels, with and without ReLU."""
    kernels, options, layers = random_layers(0)
    x = np.random.default_rng(1).normal(size=(2, 2, 9, 10))

    def fn(x):
        hidden = []
        for kernel, option in zip(kernels, options, strict=True):
            x = images.conv(x, kernel, **option)
            hidden.append(x)
            x = images.relu(x) if gated else x
        fn.hidden = hidden
        return x

    if gated:
        fn(images.array(x[1:]))
        gates = [np.moveaxis(np.asarray(hidden)[0], 0, -1) > 0 for hidden in fn.hidden]
        assert 0.2 < np.mean([gate.mean() for gate in gates]) < 0.8
        layers = [(*layer, gate.astype(float)) for layer, gate in zip(layers, gates, strict=True)]
    jacobian = receptive_field_recursion(layers, (9, 10))  # (3, 3, C_out, 9, 10, C_in)
    where = np.argwhere(np.ones(jacobian.shape[:2], bool))
    positions = np.column_stack([np.ones(len(where), int), where])
    for channels in (None, [1]):
        chosen = jacobian.sum(2) if channels is None else jacobian[:, :, 1]
        for reduce, expected in (("abs", np.abs(chosen).sum(-1)), ("square", (chosen**2).sum(-1))):
            fields = kp.effective_receptive_field(fn, images.array(x), positions, layout="NCHW", channels=channels,
                                                  reduce=reduce)  # fmt: skip
            expected = expected.reshape(fields.shape)
            assert np.abs(fields - expected).max() <= 1e-12 * expected.max() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_that_share_a_pass_in_images(layout):
    """Two images, a strided layer: the same bits as one by one, in few passes, which hooks of torch count."""
    torch = pytest.importorskip("torch")
    conv2d = torch.nn.functional.conv2d
    rng, passes, calls = np.random.default_rng(0), [], []
    first, second = torch.tensor(rng.normal(size=(4, 3, 3, 3))), torch.tensor(rng.normal(size=(2, 4, 3, 3)))

    def fn(x):
        calls.append(x)
        out = conv2d(torch.tanh(conv2d(x, first, stride=2, padding=1)), second, padding=1)
        out.register_hook(lambda grad: passes.append(np.count_nonzero(grad.numpy())))
        return out

    x = torch.tensor(rng.normal(size=(2, 3, 40, 30) if layout == "NCHW" else (2, 40, 30, 3)))
    where = np.argwhere(np.ones((2, 20, 15)))[rng.permutation(600)[:60]]
    alone = kp.effective_receptive_field(in_layout(fn, layout), x, where, layout=layout)
    assert (len(passes), len(calls)) == (60, 1)
    passes.clear(), calls.clear()
    reach = 2 * 1 + 1  # one tap of the strided output, one tap of the input
    shared = kp.effective_receptive_field(in_layout(fn, layout), x, where, layout=layout, reach=reach, stride=2)
    assert np.array_equal(shared, alone)
    assert len(calls) == 1 and len(passes) < 20 and sum(passes) == 2 * 60
    with pytest.raises(ValueError, match=r"reach: expected the radius .* got 2; 0\.[0-9]+ of the gradient is far"):
        kp.effective_receptive_field(in_layout(fn, layout), x, where, layout=layout, reach=2, stride=2)
    with pytest.raises(ValueError, match="reach: expected the radius"):  # an offset that is wrong
        kp.effective_receptive_field(in_layout(fn, layout), x, where, layout=layout, reach=3, stride=2, offset=(0, 1))


def test_centres_of_images_without_padding(images):
    """A field that is not centred on its own row and column, with a rectangle of taps and strides for each axis."""
    kernel = np.random.default_rng(0).normal(size=(1, 1, 5, 3))

    def fn(x):
        return images.conv(x, kernel)[:, :, ::3, ::2]

    x = images.array(np.zeros((1, 1, 40, 40)))
    where = np.argwhere(np.ones((1, 12, 19)))[::7]
    shared = kp.effective_receptive_field(fn, x, where, layout="NCHW", reach=2, stride=(3, 2), offset=(2, 1))
    assert np.array_equal(shared, kp.effective_receptive_field(fn, x, where, layout="NCHW"))


def test_images_that_depend_on_each_other(images):
    x = images.array(np.random.default_rng(0).normal(size=(3, 1, 5, 5)))
    for options in ({}, {"reach": math.inf}):
        with pytest.raises(
            ValueError, match=r"depends on that image alone, got 0\.5|got inf; 0\.5 of the gradient is in other batch"
        ):
            kp.effective_receptive_field(lambda x: x - x.mean(0), x, [[1, 2, 2]], layout="NCHW", **options)


# ---- points


def grid_of_points(side=9):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2).astype(np.float64)


@pytest.mark.parametrize("kind", ["kpconv", "sparse_conv"])
def test_layers_of_ones_on_points(points_framework, kind):
    """Points on a regular grid with a kernel of 3 x 3 ones: as for images."""
    F, array, points = points_framework.F, points_framework.array, grid_of_points()
    kernel = np.ones((9, 1, 1))
    if kind == "kpconv":
        neighbors = kp.radius_search(points, None, 1.0, metric="linf")
        geometry, places = (array(points), None, neighbors), array(grid_of_points(3) - 1)
        options = {"influence": "constant", "aggregation": "closest"}

        def conv(x):
            return F.kpconv(*geometry, x, array(kernel), places, 1.0, **options)
    else:
        kernel_map = kp.kernel_map(points.astype(np.int32), kernel_size=3)

        def conv(x):
            return F.sparse_conv(kernel_map.neighbors, array(kernel_map.kernel_index), x, array(kernel))

    fields = kp.effective_receptive_field(lambda x: conv(conv(conv(x))), array(np.zeros((81, 1))), [40])
    assert fields.shape == (1, 81) and fields.sum() == 9**3
    assert np.abs(kp.receptive_field_moments(fields, positions=points) - 3 * 8 / 12).max() < 1e-12


def stack_of_kpconv(gated):
    """Two layers over 60 points: points, x, fn(F, array), and the layers for the recursion."""
    rng = np.random.default_rng(3)
    points = rng.random((60, 3))
    kernel_points, weights = rng.normal(size=(7, 3)) * 0.2, [rng.normal(size=s) for s in ((7, 2, 4), (7, 4, 3))]
    neighbors, x = kp.radius_search(points, None, 0.35), rng.normal(size=(60, 2))

    def fn(F, array):
        def layers(x):
            for w in weights:
                x = F.kpconv(array(points), None, neighbors, x, array(w), array(kernel_points), 0.3)
                x = F.leaky_relu(x, 0.1) if gated else x
            return x

        return layers

    rows = np.split(neighbors.index, neighbors.row_splits[1:-1])
    per_row = reference.kpconv_rows(points, points, rows, x, kernel_points, 0.3)
    width, hidden, layers = max(map(len, rows)), x, []
    for w in weights:
        places, taps = np.full((60, width, 1), -1), np.zeros((60, width, *w.shape[1:]))
        for query, (row, h) in enumerate(per_row):
            places[query, : len(row), 0] = row
            taps[query, : len(row)] = np.tensordot(h, w, 1)
        hidden = reference.kpconv(per_row, hidden, w)
        slopes = np.where(hidden > 0, 1, 0.1 if gated else 1)
        layers.append((places, taps, slopes))
        hidden = hidden * slopes
    return points, x, fn, layers


@pytest.mark.parametrize("gated", [False, True])
def test_points_by_the_recursion(points_framework, gated):
    _, x, fn, layers = stack_of_kpconv(gated)
    jacobian = receptive_field_recursion(layers, (60,))  # (60, 3, 60, 2)
    array = points_framework.array
    for channels in (None, [0, 2]):
        expected = np.abs(jacobian[:, channels or slice(None)].sum(1)).sum(-1)
        fields = kp.effective_receptive_field(fn(points_framework.F, array), array(x), range(60), channels=channels)
        assert np.abs(fields - expected).max() <= 1e-12 * expected.max()


def test_impulses_probe_a_linear_stack(points_framework):
    """Without activations an impulse at a point shows at an output what the field there says, with its sign."""
    _, x, fn, _ = stack_of_kpconv(False)
    array = points_framework.array
    fn = fn(points_framework.F, array)
    responses = []
    for point in range(60):
        impulse = np.zeros_like(x)
        impulse[point] = [0, 1]
        responses.append(np.asarray(fn(array(impulse)))[:, 1])
    only_one = lambda one: fn(points_framework.F.linear(one, array(np.array([[0.0, 1]]))))  # noqa: E731
    fields = kp.effective_receptive_field(only_one, array(x[:, 1:]), range(60), channels=[1])
    assert np.abs(fields - np.abs(responses).T).max() <= 1e-12 * fields.max()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_positions_that_share_a_pass_in_clouds(dtype):
    """Three clouds one above the other, one of them empty: the same bits as one by one."""
    rng = np.random.default_rng(0)
    points, splits = rng.random((900, 3)).astype(dtype), np.array([0, 500, 500, 900])
    neighbors = kp.radius_search(points, None, 0.15, points_row_splits=splits)
    weights, kernel_points = rng.normal(size=(5, 3, 3)).astype(dtype), rng.normal(size=(5, 3)).astype(dtype) * 0.05

    def conv(x):
        return kp.kpconv(points, None, neighbors, x, weights, kernel_points, 0.12)

    calls = []

    def fn(x):
        calls.append(x)
        return conv(kp.leaky_relu(conv(x), 0.1))

    x, where = rng.normal(size=(900, 3)).astype(dtype), rng.permutation(900)[:80]
    alone = kp.effective_receptive_field(fn, x, where)
    assert len(calls) == 1 and alone.shape == (80, 900) and np.count_nonzero(alone) > 1000
    geometry = {"points": points, "points_row_splits": splits}
    shared = kp.effective_receptive_field(fn, x, where, reach=0.3, **geometry)
    assert np.array_equal(shared, alone)
    of_items = kp.effective_receptive_field(fn, x, where, reach=math.inf, points_row_splits=splits)
    assert np.array_equal(of_items, alone)
    with pytest.raises(ValueError, match=r"reach: expected the radius of .* receptive field, got 0\.2"):
        kp.effective_receptive_field(fn, x, where, reach=0.2, **geometry)
    with pytest.raises(ValueError, match="reach"):  # one position alone
        kp.effective_receptive_field(fn, x, where[:1], reach=0.05, points=points)


@pytest.fixture
def passes(monkeypatch):
    """A list to which each pass on the tape adds the number of outputs that are differentiated in it."""
    numbers, vjp = [], kp.autodiff.vjp

    def counting(fn, x):
        out, pullback = vjp(fn, x)
        return out, lambda seed: numbers.append(np.count_nonzero(seed)) or pullback(seed)

    monkeypatch.setattr("kpcore.autodiff.vjp", counting)
    return numbers


def test_the_number_of_passes(passes):
    """Positions on a line, more than twice the reach apart, share one pass; else as many as overlap."""
    points = np.arange(40.0)[:, None]
    neighbors = kp.radius_search(points, None, 1.0)

    def fn(x):
        return kp.neighbor_reduce(x, neighbors, "sum")

    x = np.ones((40, 1))
    for step, expected in ((1, 3), (2, 2), (3, 1)):
        passes.clear()
        fields = kp.effective_receptive_field(fn, x, range(0, 40, step), reach=1, points=points)
        assert len(passes) == expected and sum(passes) == len(fields) == len(range(0, 40, step))
        assert np.array_equal(fields, np.abs(points - points[::step].T).T <= 1)
    passes.clear()
    kp.effective_receptive_field(fn, x, [5, 5], reach=1, points=points)
    assert passes == [1, 1]
    passes.clear()  # two clouds at the same place
    where = {"points": points % 20, "points_row_splits": np.array([0, 20, 40])}
    kp.effective_receptive_field(lambda x: x, x, range(40), reach=1, **where)
    assert sum(passes) == 40 and len(passes) == 3
    passes.clear()
    kp.effective_receptive_field(lambda x: x, x, range(40), reach=math.inf, **where)
    assert passes == [2] * 20


def test_the_reach_is_a_distance_up_to_the_rounding_of_the_points():
    """Not along an axis; and a neighbour at float32(0.1), which is 1.5e-9 more than 0.1, is within 0.1."""
    points, x = np.array([[0.0, 0], [1, 1], [5, 5]]), np.ones((3, 1))
    pair = kp.radius_search(points, None, 1.5)
    for reach, fails in ((1.4, True), (1.42, False)):
        with pytest.raises(ValueError, match="reach: expected") if fails else contextlib.nullcontext():
            kp.effective_receptive_field(lambda x: kp.neighbor_reduce(x, pair), x, [0], reach=reach, points=points)
    points = np.array([[0.0], [0.1], [5.0]], np.float32)
    pair = kp.radius_search(points, None, 0.1)
    fields = kp.effective_receptive_field(
        lambda x: kp.neighbor_reduce(x, pair), x.astype(np.float32), [0], reach=0.1, points=points
    )
    assert np.array_equal(fields, [[0.5, 0.5, 0]])


@pytest.mark.parametrize("reduce", ["abs", "square"])
@pytest.mark.parametrize(("dtype", "beyond", "fails"), [
    (np.float32, 1e-6, False), (np.float32, 4e-6, True), (np.float64, 3e-15, False), (np.float64, 1e-6, True),
])  # fmt: skip
def test_roundings_outside_of_the_reach(dtype, beyond, fails, reduce):
    """Up to 16 roundings of the largest value are what fast convolutions leave there: they become zero."""
    points, neighbors = np.arange(3.0)[:, None], kp.Neighbors.from_padded(np.array([[0, 1, 2]] * 3), 3)
    weights, x = np.array([1, 0.5, beyond] * 3, dtype), np.ones((3, 1), dtype)

    def fn(x):
        return kp.neighbor_reduce(x, neighbors, "sum", weights=weights)

    with pytest.raises(ValueError, match="reach: expected") if fails else contextlib.nullcontext():
        fields = kp.effective_receptive_field(fn, x, [0], reach=1, points=points, reduce=reduce)
        assert np.array_equal(fields, [[1, 0.5 if reduce == "abs" else 0.25, 0]])


def test_outputs_at_other_positions_than_the_points():
    """A strided layer, whose queries are the points of a coarser level, in two clouds."""
    rng = np.random.default_rng(0)
    points, splits = rng.random((400, 3)), np.array([0, 150, 400])
    coarse = kp.grid_subsample(points, 0.25, row_splits=splits)
    pools = kp.radius_search(points, coarse.points, 0.3, points_row_splits=splits, queries_row_splits=coarse.row_splits)

    def fn(x):
        return kp.neighbor_reduce(x, pools, "mean")

    x, where = rng.normal(size=(400, 2)), np.arange(len(coarse.points))
    alone = kp.effective_receptive_field(fn, x, where)
    geometry = {"points": points, "points_row_splits": splits, "queries_row_splits": coarse.row_splits}
    shared = kp.effective_receptive_field(fn, x, where, reach=0.3, queries=coarse.points, **geometry)
    assert np.array_equal(shared, alone)
    assert np.array_equal(kp.effective_receptive_field(fn, x, where, reach=math.inf, **geometry), alone)
    assert np.allclose(alone.sum(1), 2, rtol=1e-12)  # of both output channels, each the mean of one input channel


def test_no_positions_and_no_points():
    x = np.ones((5, 2), np.float32)
    assert kp.effective_receptive_field(lambda x: x, x, []).shape == (0, 5)
    assert kp.effective_receptive_field(lambda x: x, x, [], reach=1.0, points=x).shape == (0, 5)
    assert kp.effective_receptive_field(lambda x: x, x[:0], []).shape == (0, 0)
    assert np.array_equal(kp.effective_receptive_field(lambda x: x, x, [1]), [[0, 2, 0, 0, 0]])


def test_dtypes_of_torch():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = torch.nn.Linear(3, 4, dtype=dtype)
        with torch.no_grad():
            fields = kp.effective_receptive_field(layer, torch.ones(6, 3, dtype=dtype), torch.tensor([2, 5]))
        expected = layer.weight.detach().double().sum(0).abs().sum()
        assert fields.dtype == np.float64 and np.array_equal(np.argwhere(fields), [[0, 2], [1, 5]])
        assert np.allclose(fields[[0, 1], [2, 5]], expected, rtol=3 * torch.finfo(dtype).eps)
        assert layer.weight.grad is None


def test_neither_torch_nor_jax_is_imported_for_arrays(tmp_path):
    code = (
        "import sys, numpy as np, kpcore as kp; kp.effective_receptive_field(lambda x: x, np.ones((3, 1)), [1]); "
        "assert not {'torch', 'jax', 'cupy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


IMAGE = {"layout": "NCHW"}
X = np.ones((5, 2))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((lambda x: x, X, [5]), {}, ValueError, r"where: expected positions in an output of \(5,\), got \[5\] at 0"),
        ((lambda x: x, X, [0, -1]), {}, ValueError, r"where: .* got \[-1\] at 1"),
        ((lambda x: x, X, [0.5]), {}, TypeError, "where: expected integers, got float64"),
        ((lambda x: x, X, [True]), {}, TypeError, "where: expected integers, got bool"),
        ((lambda x: x, X, [[0, 1]]), {}, ValueError, r"where: expected \(P,\), rows of the output, got \(1, 2\)"),
        ((lambda x: x, X, 3), {}, ValueError, r"where: expected \(P,\), rows of the output, got \(\)"),
        ((lambda x: x, X.astype(int), [0]), {}, TypeError, "x: expected floats, which have gradients, got int64"),
        ((lambda x: x, X.tolist(), [0]), {}, TypeError, "x: expected a NumPy, CuPy or JAX array or a torch tensor"),
        ((lambda x: x, X[0], [0]), {}, ValueError, r"x: expected \(N, C\), got \(2,\)"),
        ((lambda x: x, X, [0]), IMAGE, ValueError, r"x: expected four dimensions, because layout .* got \(5, 2\)"),
        ((lambda x: X, X, [0]), {}, TypeError, "fn: expected a result computed from its arguments"),
        ((lambda x: x.reshape(1, 5, 2), X, [0]), {}, ValueError, r"fn: expected a result of shape \(M, C\), got \(1"),
        ((lambda x: x, X, [0]), {"channels": [2]}, ValueError, "channels: expected 0 to 1, got 2"),
        ((lambda x: x, X, [0]), {"channels": [1, 1]}, ValueError, r"channels: expected different .* got \[1, 1\]"),
        ((lambda x: x, X, [0]), {"channels": []}, ValueError, "channels: expected different .* at least one"),
        ((lambda x: x, X, [0]), {"reduce": "mean"}, ValueError, "reduce: expected 'abs' or 'square', got 'mean'"),
        ((lambda x: x, X, [0]), {"layout": "CHW"}, ValueError, "layout: expected None or 'NCHW' or 'NHWC'"),
        ((lambda x: x, X, [0]), {"reach": -1}, ValueError, "reach: expected a number of at least zero, got -1"),
        ((lambda x: x, X, [0]), {"reach": 1}, ValueError, "points: expected the positions of the rows of x"),
        ((lambda x: x, X, [0]), {"reach": 1, "points": X[1:]}, ValueError, r"points: expected \(5, D\) to match x"),
        ((lambda x: x.reshape(10, 1), X, [0]), {"reach": 1, "points": X}, ValueError, "queries: expected those of "),
        ((lambda x: x.reshape(10, 1), X, [0]), {"reach": math.inf}, ValueError, "queries_row_splits: expected th"),
        ((lambda x: x, X, [0]), {"reach": math.inf, "points_row_splits": np.array([0, 4])}, ValueError,
         "points_row_splits: expected values from 0 to 5 to match x"),
        ((lambda x: x.reshape(10, 1), X, [0]), {"reach": math.inf, "points_row_splits": np.array([0, 2, 5]),
         "queries_row_splits": np.array([0, 10])}, ValueError, r"queries_row_splits: expected \(3,\) to match points_"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        kp.effective_receptive_field(*arguments, **options)


def test_wrong_functions(images):
    x = images.array(np.ones((2, 1, 4, 4)))
    where, torch = [[0, 1, 1]], sys.modules.get("torch")
    with pytest.raises(ValueError, match=r"where: expected \(P, 3\), each an image, a row and a column, got \(3,\)"):
        kp.effective_receptive_field(lambda x: x, x, where[0], **IMAGE)
    with pytest.raises(ValueError, match=r"where: expected positions in an output of \(2, 3, 4\), got \[0, 3, 1\]"):
        kp.effective_receptive_field(lambda x: x[:, :, 1:], x, [[0, 3, 1]], **IMAGE)
    with pytest.raises(ValueError, match=r"fn: expected a result of four dimensions with 2 images, as x, got \(1, 1"):
        kp.effective_receptive_field(lambda x: x[:1], x, where, **IMAGE)
    with pytest.raises(TypeError, match=r"fn: expected a .* as its result, got tuple"):
        kp.effective_receptive_field(lambda x: (x, x), x, where, **IMAGE)
    with pytest.raises(TypeError, match="fn: expected a result computed from x by differentiable operations"):
        kp.effective_receptive_field(lambda x: x > 0, x, where, **IMAGE)
    with pytest.raises(ValueError, match="stride: expected a finite number above zero, got 0"):
        kp.effective_receptive_field(lambda x: x, x, where, reach=1, stride=0, **IMAGE)
    if torch is not None and isinstance(x, torch.Tensor):
        parameter = torch.ones(2, 1, 4, 4, dtype=x.dtype, requires_grad=True)
        with pytest.raises(TypeError, match="fn: expected a result computed from x by differentiable operations"):
            kp.effective_receptive_field(lambda x: x.detach() * parameter, x, where, **IMAGE)
    with pytest.raises(TypeError, match="x: expected floats, which have gradients"):
        kp.effective_receptive_field(lambda x: x, images.array(np.ones((1, 1, 4, 4), np.int32)), where, **IMAGE)


# ---- networks of kpcore.nn


def scans(folder):
    """{name: points} of a generated flat and, if there are real scans, of a room and a street."""
    points = {"flat": kp.scenes.indoor(30_000).points}
    if folder is not None:
        for name in ("room", "street"):
            file, read, voxel = clouds.SCANS[name]
            points[name] = np.ascontiguousarray(read(folder / "data" / file), np.float32) / np.float32(voxel / 0.1)
    return points


NETWORKS = {
    "rigid": nn.Network(nn.architecture(3, 2), 2, 3, 0.1, width=8, kernel_size=7),
    "deformable": nn.Network(nn.architecture(2, 2, deformable=2), 2, 3, 0.1, width=8, kernel_size=7),
    "max_pool": nn.Network(("simple", "max_pool", "resnetb", "nearest_upsample", "unary"), 2, 3, 0.1, width=8),
    "kpnext": nn.KPNeXt((1, 1), 2, 3, 0.1, width=16, num_neighbors=(60, 60), attention_groups=4, attention_norm=False),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("scan", ["flat", "room", "street"])
def test_networks_state_their_reach(name, scan, request):
    """It bounds the theoretical field on scans, is at most 2.2 times as large, and positions share passes by it."""
    net = NETWORKS[name]
    points = scans(None if scan == "flat" else request.getfixturevalue("shared"))[scan]
    pyramid = net.pyramid(points)
    level, rng = pyramid[0], np.random.default_rng(0)
    params, state = net.init(0)
    params |= {
        key: 10 * value for key, value in params.items() if "offset" in key
    }  # kernel points move by some extents
    x, where = rng.normal(size=(len(level.points), 2)).astype(np.float32), rng.integers(0, len(level.points), 12)

    def fn(x):
        return net(kp, params, state, pyramid, x).logits

    fields = kp.effective_receptive_field(fn, x, where)
    farthest = max(
        np.linalg.norm(level.points[field > 0].astype(float) - level.points[position], axis=1).max()
        for field, position in zip(fields, where, strict=True)
    )
    assert farthest <= net.reach <= 2.2 * farthest
    shared = kp.effective_receptive_field(fn, x, where, reach=net.reach, points=level.points)
    assert np.array_equal(shared, fields)


def test_networks_that_see_more_than_a_radius():
    two = nn.architecture(2, 2)
    assert nn.Network(two, 1, 4, 0.1).reach < math.inf
    for options in ({"norm": "group"}, {"norm": "instance"}):
        assert nn.Network(two, 1, 4, 0.1, **options).reach == math.inf
    assert nn.Network(nn.architecture(2, 2, segment=False), 1, 4, 0.1).reach == math.inf
    kpnext = {"depths": (1, 1), "num_features": 1, "num_classes": 4, "voxel_size": 0.1, "attention_norm": False}
    assert nn.KPNeXt(**kpnext).reach == nn.KPNeXt(**kpnext | {"attention_groups": None}).reach < math.inf
    assert nn.KPNeXt(**kpnext | {"attention_groups": None, "attention_norm": True}).reach < math.inf
    assert nn.KPNeXt(**kpnext | {"norm": "group"}).reach == nn.KPNeXt(**kpnext | {"segment": False}).reach == math.inf
    # The normalisation of the attention joins the items of a batch.
    joined = nn.KPNeXt(**kpnext | {"attention_norm": True, "width": 16, "num_neighbors": (8, 8)})
    assert joined.reach is None
    points, (params, state) = np.random.default_rng(0).random((200, 3)), joined.init(0, np.float64)
    pyramid = joined.pyramid(points, row_splits=np.array([0, 100, 200]))
    splits = pyramid[0].row_splits
    x = np.random.default_rng(1).normal(size=(splits[-1], 1))
    fields = kp.effective_receptive_field(lambda x: joined(kp, params, state, pyramid, x).logits, x, [0])
    assert fields[0, : splits[1]].max() > fields[0, splits[1] :].max() > 0


def test_logits_of_whole_clouds(passes):
    """KP-CNN has one row of logits for each cloud; with an infinite reach all clouds share a pass."""
    net = nn.kpcnn(2, 3, 0.2, levels=2, convs=2, width=8)
    params, state = net.init(0, np.float64)
    pyramid = net.pyramid(np.random.default_rng(0).random((300, 3)), row_splits=np.array([0, 120, 200, 300]))
    x = np.random.default_rng(1).normal(size=(len(pyramid[0].points), 2))

    def fn(x):
        return net(kp, params, state, pyramid, x).logits

    splits = {"points_row_splits": pyramid[0].row_splits, "queries_row_splits": np.arange(4)}
    shared = kp.effective_receptive_field(fn, x, range(3), reach=net.reach, **splits)
    assert passes == [9]  # three rows of three logits
    assert np.array_equal(shared, kp.effective_receptive_field(fn, x, range(3))) and (shared > 0).any(0).mean() > 0.9


# ---- offsets as constants of the gradient


@pytest.mark.parametrize("modulated", [False, True])
def test_the_terms_of_offsets(points_framework, modulated):
    """The full gradient minus that with constant offsets is what reaches the features through the generator."""
    F, array, rng = points_framework.F, points_framework.array, np.random.default_rng(0)
    points, places = rng.random((40, 3)), {"num": 6, "radius": 0.2, "extent": 0.25, "dimension": 3}
    neighbors, x, grad = kp.radius_search(points, None, 0.5), rng.normal(size=(40, 3)), rng.normal(size=(40, 4))
    new = blocks.Run(kp, {}, {}, new={"seed": 0, "dtype": np.float64})
    blocks.deformable_conv(new, "conv", (points, None, neighbors), x, 4, places, modulated)
    params = {key: array(3 * value if "offset" in key else value) for key, value in new.params.items()}
    state = {key: array(value) for key, value in new.state.items()}
    where, results, gradients = (array(points), None, neighbors), [], []
    for detach_offsets in (False, True):

        def fn(x, detach_offsets=detach_offsets):
            run = blocks.Run(F, params, state, detach_offsets=detach_offsets)
            return blocks.deformable_conv(run, "conv", where, x, 4, places, modulated)

        out, pullback = receptive_field._differentiated(fn, array(x))
        results.append(np.asarray(fn(array(x))))
        gradients.append(pullback(grad))
        assert out == (40, 4)
    assert np.array_equal(*results)

    bias, weights = new.params["conv.offset_conv.weights"] * 3, new.params["conv.weights"]
    own = [new.state[f"conv.{name}kernel_points"] for name in ("", "offset_conv.")]

    def generator(x):
        return kp.kpconv(points, None, neighbors, x, bias, own[1], 0.25)

    def convolution(x, raw):
        return blocks.deformed(kp, (points, None, neighbors), x, weights, own[0], 0.25, raw, {})[0]

    raw, through_generator = kp.autodiff.vjp(generator, x)
    through_features, of_raw = kp.autodiff.vjp(convolution, x, raw)[1](grad)
    (terms,) = through_generator(of_raw)
    scale = np.abs(gradients[0]).max()
    assert np.abs(terms).max() > 0.01 * scale
    assert np.abs(gradients[1] - through_features).max() <= 1e-12 * scale
    assert np.abs(gradients[0] - gradients[1] - terms).max() <= 1e-12 * scale


@pytest.mark.parametrize("modulated", [False, True])
def test_constant_offsets_of_a_torch_layer(modulated):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = kp.torch.DeformableKPConv(3, 4, 6, radius=0.2, extent=0.25, modulated=modulated, dtype=torch.float64)
    points, x = torch.rand(40, 3, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    neighbors = kp.torch.radius_search(points, None, 0.5)
    full, offsets = layer(points, None, neighbors, x, return_offsets=True)
    detached, constants = layer(points, None, neighbors, x, True, detach_offsets=True)
    assert torch.equal(full, detached) and torch.equal(offsets, constants) and not constants.requires_grad
    parameters = [x, layer.weights, layer.offset_conv.weights]
    grads = torch.autograd.grad(detached.square().sum(), parameters, allow_unused=True)
    assert grads[2] is None and grads[0].any() and grads[1].any()
    (with_generator,) = torch.autograd.grad(full.square().sum(), [x])
    assert not torch.allclose(with_generator, grads[0], rtol=1e-3)
    with pytest.raises(TypeError, match="detach_offsets: expected True or False, got int"):
        layer(points, None, neighbors, x, detach_offsets=1)


@pytest.mark.parametrize("modulated", [False, True])
def test_constant_offsets_of_a_network(points_framework, modulated):
    """In every framework: the same logits, another field, and no gradient of what computes offsets."""
    F, array = points_framework.F, points_framework.array
    net = nn.Network(nn.architecture(2, 2, deformable=2), 2, 3, 0.2, width=8, kernel_size=5, modulated=modulated)
    params, state = net.init(0, np.float64)
    params = {name: 4 * value if "offset" in name else value for name, value in params.items()}
    pyramid = net.pyramid(np.random.default_rng(0).random((300, 3)))
    x = np.random.default_rng(1).normal(size=(len(pyramid[0].points), 2))
    levels = [level._replace(points=array(level.points), row_splits=array(level.row_splits)) for level in pyramid]
    values = [{name: array(value) for name, value in values.items()} for values in (params, state)]
    fields, logits = [], []
    for options in ({}, {"detach_offsets": True}):

        def fn(x, options=options):
            return net(F, *values, levels, x, **options).logits

        fields.append(kp.effective_receptive_field(fn, array(x), [7]))
        logits.append(np.asarray(fn(array(x))))
    assert np.array_equal(*logits)
    assert np.abs(fields[0] - fields[1]).max() > 1e-3 * fields[0].max()
    by_tape = kp.effective_receptive_field(
        lambda x: net(kp, params, state, pyramid, x, detach_offsets=True).logits, x, [7]
    )
    assert np.abs(fields[1] - by_tape).max() <= 1e-12 * by_tape.max()


def test_constant_offsets_in_training():
    """Parameters that compute offsets get no gradient, from the logits or the regularization."""
    net = nn.Network(nn.architecture(2, 2, deformable=2), 2, 3, 0.2, width=8, kernel_size=5)
    params, state = net.init(0)
    pyramid = net.pyramid(np.random.default_rng(0).random((300, 3), np.float32))
    x = np.ones((len(pyramid[0].points), 2), np.float32)

    def loss(params, detach_offsets):
        result = net(kp, params, state, pyramid, x, training=True, detach_offsets=detach_offsets)
        return kp.softmax_cross_entropy(result.logits, np.zeros(len(x), np.int64)) + result.regularization

    values, grads = zip(*(kp.autodiff.value_and_grad(loss)(params, detach) for detach in (False, True)), strict=True)
    assert values[0] == values[1]
    zero = [{name for name, gradient in gradients.items() if not gradient.any()} for gradients in grads]
    offset = {name for name in params if "offset" in name}
    assert offset and not zero[0] & offset and zero[1] - zero[0] == offset


def test_constant_offsets_of_a_torch_network():
    torch = pytest.importorskip("torch")
    net = nn.Network(nn.architecture(2, 2, deformable=1), 2, 3, 0.2, width=8, kernel_size=5)
    module = kp.torch.Network(net).requires_grad_(False).eval()
    pyramid = net.pyramid(torch.rand(300, 3, generator=torch.Generator().manual_seed(0)), F=kp.torch)
    x = torch.ones(len(pyramid[0].points), 2)
    params, state = module.arrays()
    levels = [level._replace(points=level.points.numpy(), row_splits=level.row_splits.numpy()) for level in pyramid]
    for detach_offsets in (False, True):
        fields = kp.effective_receptive_field(
            lambda x, detach=detach_offsets: module(pyramid, x, detach_offsets=detach)[0], x, [5]
        )
        expected = kp.effective_receptive_field(
            lambda x, detach=detach_offsets: net(kp, params, state, levels, x, detach_offsets=detach).logits,
            x.numpy(), [5]
        )  # fmt: skip
        assert np.abs(fields - expected).max() <= 2e-5 * expected.max() > 0


# ---- measures


def test_measures_of_a_normal_distribution():
    """exp(-d²/2s²) is 4.55 % of the largest at s sqrt(-2 ln 0.0455), and has 95 % of its mass within that of 5 %."""
    s, centre = 12.0, np.array([100.0, 90.0])
    difference = np.stack(np.indices((201, 181)), -1) - centre
    fields = np.exp(-(difference**2).sum(-1) / (2 * s * s))[None]
    assert np.allclose(kp.receptive_field_size(fields), math.sqrt(math.pi * 2 * -math.log(0.0455)) * s, rtol=2e-3)
    assert np.allclose(kp.receptive_field_radius(fields, [centre]), s * math.sqrt(-2 * math.log(0.05)), rtol=2e-2)
    assert np.allclose(kp.receptive_field_moments(fields), s * s, rtol=1e-9)
    assert np.allclose(kp.receptive_field_moments(fields, centre[None] + [3, 0]), [s * s + 9, s * s], rtol=1e-9)
    assert np.allclose(kp.receptive_field_share(fields, difference[..., 0] > 0.5), 0.5, rtol=4e-2)
    # The same as points.
    positions = np.stack(np.indices((201, 181)), -1).reshape(-1, 2).astype(np.float32)
    flat = fields.reshape(1, -1)
    assert kp.receptive_field_size(flat) == kp.receptive_field_size(fields)
    radius = kp.receptive_field_radius(flat, [centre], share=0.5, positions=positions)
    assert radius == kp.receptive_field_radius(fields, [centre], share=0.5)
    assert np.array_equal(kp.receptive_field_moments(flat, positions=positions), kp.receptive_field_moments(fields))
    mask = difference[..., 1] > 2
    assert kp.receptive_field_share(flat, mask.reshape(-1)) == kp.receptive_field_share(fields, mask)


def test_measures_of_few_points():
    fields = np.array([[4.0, 1, 1, 2, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    positions = np.array([[0.0, 0], [1, 0], [0, 2], [3, 0], [9, 9]])
    centres = [[0.0, 0], [3, 1], [0, 0]]
    assert np.array_equal(kp.receptive_field_size(fields, level=0.25), [math.sqrt(2), 1, 0])
    assert np.array_equal(kp.receptive_field_size(fields, level=0.24), [2, 1, 0])
    for share, expected in ((0.5, 0), (0.51, 1), (0.625, 1), (0.75, 2), (0.76, 3), (1, 3)):
        radii = kp.receptive_field_radius(fields, centres, share=share, positions=positions)
        assert np.array_equal(radii, [expected, 1, np.nan], equal_nan=True)
    moments = kp.receptive_field_moments(fields, centres, positions=positions)
    assert np.array_equal(moments, [[(1 + 18) / 8, 4 / 8], [0, 1], [np.nan] * 2], equal_nan=True)
    about_centroid = kp.receptive_field_moments(fields, positions=positions)
    assert np.allclose(about_centroid[0], [19 / 8 - (7 / 8) ** 2, 4 / 8 - (2 / 8) ** 2], rtol=1e-15)
    masks = np.array([[1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 1, 1]], bool)
    assert np.array_equal(kp.receptive_field_share(fields, masks), [5 / 8, 0, np.nan], equal_nan=True)
    assert np.array_equal(kp.receptive_field_share(fields[:1], masks[0]), [5 / 8])


FIELD = np.ones((1, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kp.receptive_field_size(FIELD[0]), ValueError, r"fields: expected \(P, N\) or \(P, H, W\), got \(5"),
        (lambda: kp.receptive_field_size(-FIELD), ValueError,
         "fields: expected finite numbers of at least zero, got -1.0 to -1.0"),
        (lambda: kp.receptive_field_size([[1.0]]), TypeError, "fields: expected a NumPy array, got list"),
        (lambda: kp.receptive_field_size(FIELD, level=2), ValueError, "level: expected 0 to 1, got 2"),
        (lambda: kp.receptive_field_moments(FIELD), ValueError, "positions: expected those of the points"),
        (lambda: kp.receptive_field_moments(FIELD[None], positions=X), ValueError, "positions: expected None for"),
        (lambda: kp.receptive_field_moments(FIELD, positions=X[1:]), ValueError, r"positions: expected \(5, D\) to"),
        (lambda: kp.receptive_field_radius(FIELD, [[0]], positions=X), ValueError, r"centres: expected \(1, 2\)"),
        (lambda: kp.receptive_field_radius(FIELD, X[:1], positions=X, share=0), ValueError, "share: expected a number"),
        (lambda: kp.receptive_field_share(FIELD, [1] * 5), TypeError, "mask: expected bool, got int64"),
        (lambda: kp.receptive_field_share(FIELD, [True]), ValueError, r"mask: expected \(5,\) or \(1, 5\) to match"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_measures(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_that_is_not_finite():
    for value in (np.nan, np.inf):
        for reach in (None, np.inf):
            with pytest.raises(ValueError, match=r"fn: expected a finite gradient, got one with [13] of 3 places that"):
                kp.effective_receptive_field(
                    lambda x, value=value: kp.linear(x, np.array([[value]])), np.ones((3, 1)), [1], reach=reach
                )
        with pytest.raises(ValueError, match="fields: expected finite numbers of at least zero, got"):
            kp.receptive_field_size(np.array([[1, value, 2]]))


def test_one_channel_may_be_a_number():
    weights = np.array([[1.0, 10.0]])
    for channels in (1, np.int64(1), [1]):
        fields = kp.effective_receptive_field(lambda x: kp.linear(x, weights), np.ones((2, 1)), [0], channels=channels)
        assert fields.tolist() == [[10.0, 0.0]]


# ---- deformable kernels and deformable convolution of images


def deformable_stack(kind, seed=0, size=(7, 6), depth=3, channels=2):
    """(fn, layers): a stack on the tape with random offsets at every position, and its layers for the recursion."""
    rng, taps = np.random.default_rng(seed), np.stack(np.indices((3, 3)), -1).reshape(9, 2)
    local, scope = "local" in kind, 4 if "local" in kind or "global" in kind else 3
    calls, layers = [], []
    for _ in range(depth):
        weight = rng.normal(size=(channels, 1 if local else channels, scope, scope))
        offsets = {}
        if local:
            offsets["kernel_offsets"] = rng.normal(size=(1, 18, *size))
        if "global" in kind:
            offsets["kernel_offsets"] = rng.normal(size=(1, 18))
        if "data" in kind:
            offsets["data_offsets"] = 0.8 * rng.normal(size=(1, 18, *size))
        calls.append((weight, offsets))
        places = np.stack(np.indices(size), -1)[:, :, None] - 1 + taps
        if "data" in kind:
            places = places + offsets["data_offsets"][0].reshape(9, 2, *size).transpose(2, 3, 0, 1)
        at = taps + (scope - 3) / 2 + np.zeros((*size, 9, 2))
        if local:
            at = at + offsets["kernel_offsets"][0].reshape(9, 2, *size).transpose(2, 3, 0, 1)
        if "global" in kind:
            at = at + offsets["kernel_offsets"][0].reshape(9, 2)
        by_cell = weight.transpose(2, 3, 1, 0)  # (scope, scope, C_in, C_out)
        by_cell = by_cell * np.eye(channels) if local else by_cell
        at = np.clip(at, 0, scope - 1)
        w = [[[reference.interpolated(by_cell, q) for q in by_tap] for by_tap in row] for row in at]
        layers.append((places, np.array(w)))

    def fn(x, gated=False):
        fn.gates = []
        for weight, offsets in calls:
            if "kernel_offsets" in offsets:
                x = kp.deformable_kernel_conv2d(x, weight, kernel_size=3, padding=1, **offsets)
            else:
                x = kp.deformable_conv2d(x, weight, offsets.get("data_offsets"), padding=1)
            if gated:
                fn.gates.append(np.moveaxis(getattr(x, "value", x)[0] > 0, 0, -1))
                x = kp.relu(x)
        return x

    return fn, layers


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["rigid", "data", "local", "local, data", "global", "global, data"])
def test_deformable_stacks_by_the_recursion(kind, gated):
    fn, layers = deformable_stack(kind)
    x = np.random.default_rng(1).normal(size=(1, 2, 7, 6))
    if gated:
        fn(x, gated=True)
        layers = [(*layer, gate.astype(float)) for layer, gate in zip(layers, fn.gates, strict=True)]
    expected = np.abs(receptive_field_recursion(layers, (7, 6)).sum(2)).sum(-1).reshape(42, 7, 6)
    where = [(0, y, x) for y, x in np.ndindex(7, 6)]
    fields = kp.effective_receptive_field(lambda x: fn(x, gated), x, where, layout="NCHW")
    assert np.abs(fields - expected).max() <= 1e-12 * expected.max() > 0


@pytest.mark.parametrize("kind", ["kernel", "data", "both"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_deformable_layer_by_equations_8_10_and_11(kind, layer):
    """R(i; j) = sum_k R(i; j + k + dj_k, k + dk_k), for offsets that do not depend on the position.

    R(i; j, k) is the field of the stack whose deformable layer is replaced by a kernel of the one value at k. It is
    linear in that value, and between positions in j by the interpolation of the image.
    """
    rng, size, centre, taps = np.random.default_rng(layer), (15, 15), 7, np.stack(np.indices((3, 3)), -1).reshape(9, 2)
    kernels = [rng.uniform(0.5, 1.5, size=(1, 1, 3, 3)) for _ in range(3)]  # positive: no value cancels another
    kernel_offsets, data_offsets = 0.4 * rng.normal(size=(2, 9, 2))

    def stack(x, without):
        for number, kernel in enumerate(kernels):
            if number != layer:
                x = kp.deformable_conv2d(x, kernel, None, padding=1)
            elif not without:
                more = {}
                if kind != "data":
                    more["kernel_offsets"] = kernel_offsets.reshape(1, 18)
                if kind != "kernel":
                    at_all = np.broadcast_to(data_offsets.reshape(1, 18, 1, 1), (1, 18, *size))
                    more["data_offsets"] = np.ascontiguousarray(at_all)
                x = kp.deformable_kernel_conv2d(x, kernel, **{"kernel_offsets": None} | more, kernel_size=3, padding=1)
        return x

    x, where = np.zeros((1, 1, *size)), np.array([(0, *place) for place in np.ndindex(size)])
    others = kp.effective_receptive_field(lambda x: stack(x, True), x, where, layout="NCHW").reshape(*size, *size)
    expected = 0
    for k, dk, dj in zip(taps, kernel_offsets, data_offsets, strict=True):
        value = reference.interpolated(kernels[layer][0, 0], np.clip(k + dk * (kind != "data"), 0, 2))
        expected = expected + value * reference.interpolated(others, centre + k - 1 + dj * (kind != "kernel"))
    field = kp.effective_receptive_field(lambda x: stack(x, False), x, [(0, centre, centre)], layout="NCHW")[0]
    assert np.abs(field - expected).max() <= 1e-12 * expected.max() > 0


def test_kernel_offsets_leave_the_theoretical_field_and_data_offsets_change_it():
    """The claim of Gao et al. (2020): where an output depends on the input, for positive kernels and any offsets."""
    rng, size = np.random.default_rng(0), (17, 17)
    kernels = [rng.uniform(0.5, 1.5, size=(1, 1, 4, 4)) for _ in range(3)]

    def support(kernel_offsets=0.0, data_offsets=0.0):
        def fn(x):
            for kernel in kernels:
                x = kp.deformable_kernel_conv2d(
                    x, kernel, kernel_offsets * rng.normal(size=(1, 18, *size)), kernel_size=3, padding=1,
                    data_offsets=data_offsets * rng.normal(size=(1, 18, *size)),
                )  # fmt: skip
            return x

        return kp.effective_receptive_field(fn, np.zeros((1, 1, *size)), [(0, 8, 8)], layout="NCHW")[0]

    rigid, moved_kernel, moved_data = support(), support(kernel_offsets=2.0), support(data_offsets=2.0)
    assert np.count_nonzero(rigid) == 7 * 7
    assert np.array_equal(moved_kernel != 0, rigid != 0)
    assert np.abs(moved_kernel / moved_kernel.sum() - rigid / rigid.sum()).max() > 0.01
    assert np.count_nonzero((moved_data != 0) & (rigid == 0)) > 10


@pytest.mark.parametrize("kind", ["kernel", "data"])
def test_the_terms_of_generated_offsets(kind):
    """The full gradient is that with constant offsets and that through the generator."""
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(1, 4, 6, 5)), rng.normal(size=(4, 1, 3, 3))
    generator = 0.3 * rng.normal(size=(18, 4, 3, 3))

    def layer(x, offsets, detach=False):
        name = "kernel_offsets" if kind == "kernel" else "data_offsets"
        more = {"kernel_offsets": None, name: offsets, "detach_offsets": detach}
        return kp.deformable_kernel_conv2d(x, weight, kernel_size=3, padding=1, groups=4, **more)

    offsets, through_generator = kp.autodiff.vjp(lambda x: kp.deformable_conv2d(x, generator, None, padding=1), x)

    def whole(x, detach):
        return layer(x, kp.deformable_conv2d(x, generator, None, padding=1), detach)

    out, full = kp.autodiff.vjp(lambda x: whole(x, False), x)
    _, detached = kp.autodiff.vjp(lambda x: whole(x, True), x)
    _, by_offsets = kp.autodiff.vjp(lambda o: layer(x, o), offsets)
    grad = rng.normal(size=out.shape)
    term = through_generator(by_offsets(grad)[0])[0]
    assert np.abs(full(grad)[0] - detached(grad)[0] - term).max() <= 1e-12 * np.abs(term).max() > 0
