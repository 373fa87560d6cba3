"""kernel_map and to_dense. Maps are compared exactly with a dictionary of coordinates, and with torch and spconv."""

import functools
import gc
import itertools
import math
import pickle
import re
import weakref

import clouds
import numpy as np
import pytest
from gradcheck import check_vjp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_close, assert_same_bits

import kpcore as kp

RULES = ["submanifold", "spconv", "minkowski"]
all_rules = pytest.mark.parametrize("rule", RULES)


# ---- the reference


def items_of(row_splits, num):
    """The batch item of each row."""
    row_splits = [0, num] if row_splits is None else row_splits
    return np.repeat(np.arange(len(row_splits) - 1), np.diff(row_splits)).tolist()


def input_of(rule, out, cell, kernel_size, stride, dilation, padding):
    """The coordinates that kernel cell `cell` (k0, k1, ...) of an output reads."""
    at = []
    for o, k, size, s, d, p in zip(out, cell, kernel_size, stride, dilation, padding, strict=True):
        if rule == "spconv":
            at.append(o * s - p + k * d)
        elif rule == "minkowski" and size % 2 == 0:
            at.append(o + k * d)
        else:
            at.append(o + (k - (size - 1) // 2) * d)
    return tuple(at)


def outputs_of(rule, coords, items, kernel_size, stride, dilation, padding, shape):
    """The outputs (item, coordinates) of strided rules, in their order."""
    outputs = set()
    for item, at in zip(items, coords.tolist(), strict=True):
        if rule == "minkowski":
            outputs.add((item, *(x // s * s for x, s in zip(at, stride, strict=True))))
            continue
        per_axis = []
        for axis, (x, size, s, d, p) in enumerate(zip(at, kernel_size, stride, dilation, padding, strict=True)):
            read = {(x + p - k * d) // s for k in range(size) if (x + p - k * d) % s == 0}
            if shape is not None:
                read &= set(range((shape[axis] + 2 * p - d * (size - 1) - 1) // s + 1))
            per_axis.append(read)
        outputs |= {(item, *out) for out in itertools.product(*per_axis)}
    return sorted(outputs)


def reference_map(coords, out_coords=None, *, kernel_size, stride=1, dilation=1, padding=0, shape=None,
                  rule="submanifold", row_splits=None, out_row_splits=None):  # fmt: skip
    """(row_splits, index, kernel_index, out_coords, out_row_splits) of a kernel map."""
    axes = coords.shape[1]
    options = [(v,) * axes if isinstance(v, int) else tuple(v) for v in (kernel_size, stride, dilation, padding)]
    items, num_items = items_of(row_splits, len(coords)), 1 if row_splits is None else len(row_splits) - 1
    if out_coords is not None:
        out_items = items_of(out_row_splits, len(out_coords))
        outputs = [(item, *at) for item, at in zip(out_items, out_coords.tolist(), strict=True)]
    elif rule == "submanifold":
        outputs = [(item, *at) for item, at in zip(items, coords.tolist(), strict=True)]
    else:
        outputs = outputs_of(rule, coords, items, *options, shape)
    rows = {}
    for i, (item, at) in enumerate(zip(items, coords.tolist(), strict=True)):
        rows.setdefault((item, *at), []).append(i)
    cells = list(itertools.product(*map(range, options[0])))
    pairs = [
        [(i, k) for k, cell in enumerate(cells) for i in rows.get((item, *input_of(rule, at, cell, *options)), ())]
        for item, *at in outputs
    ]
    index, kernel_index = np.array(list(itertools.chain(*pairs)), np.int32).reshape(-1, 2).T
    counts = np.bincount([item for item, *_ in outputs], minlength=num_items)
    return (clouds.splits([len(row) for row in pairs]), index, kernel_index,
            np.array([at for _, *at in outputs], np.int32).reshape(-1, axes), clouds.splits(counts))  # fmt: skip


def arrays_of(m):
    return m.neighbors.row_splits, m.neighbors.index, m.kernel_index, m.out_coords, m.out_row_splits


def check_map(coords, out_coords=None, **options):
    """Assert that a map is that of the reference, and its transpose the transpose of that."""
    m = kp.kernel_map(coords, out_coords, **options)
    expected = reference_map(coords, out_coords, **options)
    for got, array in zip(arrays_of(m), expected, strict=True):
        assert_same_bits(got, np.ascontiguousarray(array))
    assert_same_bits(m.in_coords, coords)
    back = m.transpose()
    assert back.transpose() is m
    row_splits, index, kernel_index = expected[:3]
    outputs = np.repeat(np.arange(len(row_splits) - 1, dtype=np.int32), np.diff(row_splits))
    order = np.lexsort((outputs, kernel_index, index))
    assert_same_bits(back.neighbors.index, outputs[order])
    assert_same_bits(back.kernel_index, np.ascontiguousarray(kernel_index[order]))
    assert_same_bits(back.neighbors.row_splits, clouds.splits(np.bincount(index, minlength=len(coords))))
    assert back.out_coords is m.in_coords and back.in_coords is m.out_coords
    assert (back.kernel_size, back.num_kernels) == (m.kernel_size, math.prod(m.kernel_size))
    return m


def voxels(num, axes=3, seed=0, span=None):
    """Random integer coordinates around 0, some of them equal."""
    span = span or max(2, round((2 * num) ** (1 / axes)))
    return np.random.default_rng(seed).integers(-span // 2, span // 2 + 1, (num, axes)).astype(np.int32)


# ---- example calls


def to_dense_arguments(num, geometry, features):
    rng = np.random.default_rng(1)
    return {
        "coords": rng.integers(0, (4, 3, 5), (num, 3)).astype(np.int32),
        "features": rng.normal(size=(num, 3)).astype(features),
        "shape": (4, 3, 5),
    }


def two_items(call):
    num = len(call["coords"])
    return {"row_splits": np.array([0, num // 3, num // 3, num])}


CALLS = {"to_dense": (to_dense_arguments, [{}, two_items])}


# ---- kernel maps against the reference


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@all_rules
def test_rules_and_kernels(rule, kernel_size, axes):
    coords = voxels(60 if kernel_size**axes < 200 else 4, axes)
    for dilation in (1, 2, 3):
        check_map(coords, kernel_size=kernel_size, dilation=dilation, rule=rule)
        if rule == "submanifold":
            continue
        for stride in (2, 3):
            check_map(coords, kernel_size=kernel_size, dilation=dilation, stride=stride, rule=rule)
            if rule == "spconv":
                check_map(coords, kernel_size=kernel_size, dilation=dilation, stride=stride, padding=1, rule=rule)


@settings(max_examples=settings().max_examples // 4)  # 80 ms each
@given(st.data())
def test_any_voxels_any_options(data):
    axes, rule = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(RULES))
    coords = voxels(data.draw(st.integers(0, 80)), axes, data.draw(clouds.seeds), data.draw(st.integers(1, 12)))

    def numbers(low, high):
        return data.draw(st.integers(low, high) | st.tuples(*[st.integers(low, high)] * axes))

    options = {"kernel_size": numbers(1, 4), "dilation": numbers(1, 4), "rule": rule}
    if rule != "submanifold":
        options["stride"] = numbers(1, 4)
    if rule == "spconv":
        options["padding"] = numbers(0, 3)
    out_coords = None
    if data.draw(st.booleans()):
        options["row_splits"] = data.draw(clouds.row_splits_of(len(coords)))
    if data.draw(st.booleans()):
        out_coords = voxels(data.draw(st.integers(0, 40)), axes, data.draw(clouds.seeds), 9)
        if "row_splits" in options:
            num_items = len(options["row_splits"]) - 1
            options["out_row_splits"] = data.draw(clouds.row_splits_of(len(out_coords), num_items))
    elif rule == "spconv" and data.draw(st.booleans()):
        coords += 8
        options["shape"] = (data.draw(st.integers(20, 24)),) * axes
    check_map(coords, out_coords, **options)


@all_rules
def test_kernels_of_more_than_256_cells(rule):
    coords = voxels(40, span=9)
    assert check_map(coords, kernel_size=7, rule=rule).kernel_index.max() > 256
    check_map(coords, kernel_size=(1, 30, 11), rule=rule)


@all_rules
@pytest.mark.parametrize("kernel_size", [2, 3])
def test_one_value_with_any_number_of_threads(rule, kernel_size, isa, set_threads):
    coords = voxels(40_000, span=40)
    row_splits = np.array([0, 15_000, 15_000, 39_000, 40_000])
    stride = 1 if rule == "submanifold" else 2
    maps = []
    for threads in (1, 2, 3):
        set_threads(threads)
        m = kp.kernel_map(coords, kernel_size=kernel_size, stride=stride, rule=rule, row_splits=row_splits)
        maps.append((*arrays_of(m), *arrays_of(m.transpose())))
    for other in maps[1:]:
        for got, expected in zip(other, maps[0], strict=True):
            assert_same_bits(got, expected)


@all_rules
def test_a_batch_is_its_items_one_after_the_other(rule):
    coords, row_splits = voxels(90), np.array([0, 40, 40, 90])
    m = kp.kernel_map(coords, kernel_size=3, rule=rule, row_splits=row_splits)
    for item, (begin, end) in enumerate(itertools.pairwise(row_splits)):
        alone = kp.kernel_map(coords[begin:end], kernel_size=3, rule=rule)
        first, last = m.out_row_splits[item : item + 2]
        assert_same_bits(m.out_coords[first:last], alone.out_coords)
        pairs = slice(*m.neighbors.row_splits[[first, last]])
        assert_same_bits(m.neighbors.index[pairs] - np.int32(begin), alone.neighbors.index)
        assert_same_bits(m.kernel_index[pairs], alone.kernel_index)


@all_rules
@pytest.mark.parametrize("dilation", [1, 2**31 - 1])
def test_coordinates_at_the_ends_of_int32(rule, dilation):
    low, high = -(2**31), 2**31 - 1
    for ends in ([low, low + 1], [high - 1, high], [low, 0, high], [low, low + 1, -1, 0, high - 1, high]):
        coords = np.array(ends, np.int32)[:, None]
        check_map(coords, kernel_size=3, dilation=dilation, rule="submanifold")
        check_map(coords, coords[::-1].copy(), kernel_size=(3,), stride=1, dilation=dilation, rule=rule)
    if rule == "spconv":
        check_map(coords, np.array([[1], [-1]], np.int32), kernel_size=2, stride=high, padding=high, rule=rule)


def test_many_equal_coordinates():
    coords = np.zeros((3000, 3), np.int32)
    m = kp.kernel_map(coords, np.array([[0, 0, 1], [0, 0, 0]], np.int32), kernel_size=3)
    assert m.neighbors.counts.tolist() == [3000, 3000]
    assert_same_bits(m.neighbors.index, np.tile(np.arange(3000, dtype=np.int32), 2))
    assert m.transpose().kernel_index[:4].tolist() == [12, 13, 12, 13]


def test_a_few_outputs_among_many_inputs():
    coords = np.unique(voxels(20_000, span=40), axis=0)
    check_map(coords, np.array([[15, 3, 2], [-20, -20, -20], [15, 3, 2], [99, 0, 0]], np.int32), kernel_size=3)


@all_rules
def test_nothing(rule):
    for row_splits in (None, np.array([0]), np.array([0, 0, 0])):
        m = check_map(np.empty((0, 2), np.int32), kernel_size=3, rule=rule, row_splits=row_splits)
        assert len(m.out_coords) == len(m.kernel_index) == 0
    check_map(np.empty((0, 2), np.int32), np.zeros((2, 2), np.int32), kernel_size=3, rule=rule)
    check_map(np.zeros((2, 2), np.int32), np.empty((0, 2), np.int32), kernel_size=3, rule=rule)


def test_outputs_beyond_the_shape_are_not_made():
    coords = np.array([[0], [5]], np.int32)
    options = {"kernel_size": 2, "stride": 2, "rule": "spconv"}
    assert kp.kernel_map(coords, shape=(6,), **options).out_coords.ravel().tolist() == [0, 2]
    assert kp.kernel_map(coords[1:], shape=(6,), kernel_size=1, stride=6, rule="spconv").out_coords.shape == (0, 1)
    assert kp.kernel_map(coords, padding=1, shape=(6,), **options).out_coords.ravel().tolist() == [0, 3]


# ---- convolutions with a map


def sparse_convolution(m, features, filters):
    """out[o] = the sum over the pairs (o, i, k) of features[i] @ filters[k], in float64."""
    out = np.zeros((m.neighbors.num_queries, filters.shape[-1]))
    outputs = np.repeat(np.arange(len(out)), m.neighbors.counts)
    filters = filters.reshape(-1, *filters.shape[-2:])
    np.add.at(out, outputs, np.einsum("ec,ecd->ed", features[m.neighbors.index], filters[m.kernel_index]))
    return out


def convolution(axes, coords, features, filters, shape, before=0, after=0, **options):
    """The dense convolution of torch over the grid of the features, with more zeros before and after each axis."""
    torch = pytest.importorskip("torch")
    weights = torch.from_numpy(np.ascontiguousarray(np.moveaxis(filters, (-1, -2), (0, 1))))
    grid = torch.nn.functional.pad(torch.from_numpy(kp.to_dense(coords, features, shape)), (before, after) * axes)
    return getattr(torch.nn.functional, f"conv{axes}d")(grid, weights, **options).numpy()[0]


def layer(axes, kernel_size, num=40, extent=7, seed=0):
    """Different voxels of a grid, and features and filters for them."""
    rng = np.random.default_rng(seed)
    shape = tuple(extent + axis for axis in range(axes))
    chosen = rng.permutation(math.prod(shape))[:num]
    coords = np.stack(np.unravel_index(chosen, shape), 1).astype(np.int32)
    size = (kernel_size,) * axes if isinstance(kernel_size, int) else kernel_size
    return shape, coords, rng.normal(size=(len(coords), 3)), rng.normal(size=(*size, 3, 4))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_spconv_is_a_dense_convolution(axes, kernel_size, stride, dilation, padding):
    shape, coords, features, filters = layer(axes, kernel_size)
    options = {"stride": stride, "dilation": dilation, "padding": padding}
    if min(shape) + 2 * padding <= dilation * (kernel_size - 1):
        with pytest.raises(ValueError, match=r"^shape: expected at least \d+ along axis 0"):
            kp.kernel_map(coords, kernel_size=kernel_size, shape=shape, rule="spconv", **options)
        return
    expected = convolution(axes, coords, features, filters, shape, **options)
    m = kp.kernel_map(coords, kernel_size=kernel_size, shape=shape, rule="spconv", **options)
    got = kp.to_dense(m.out_coords, sparse_convolution(m, features, filters), expected.shape[1:])[0]
    assert_close(got, expected, 1e-13)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_submanifold_is_a_dense_convolution_at_the_inputs(axes, kernel_size):
    shape, coords, features, filters = layer(axes, kernel_size)
    expected = convolution(axes, coords, features, filters, shape, (kernel_size - 1) // 2, kernel_size // 2)
    m = kp.kernel_map(coords, kernel_size=kernel_size)
    assert_close(sparse_convolution(m, features, filters), expected[(slice(None), *coords.T)].T, 1e-13)


def test_axes_of_filters_are_those_of_coordinates():
    shape, coords, features, filters = layer(3, (1, 2, 3))
    expected = convolution(3, coords, features, filters, shape, padding=(0, 1, 1))
    m = kp.kernel_map(coords, kernel_size=(1, 2, 3), padding=(0, 1, 1), shape=shape, rule="spconv")
    got = kp.to_dense(m.out_coords, sparse_convolution(m, features, filters), expected.shape[1:])[0]
    assert_close(got, expected, 1e-13)


def test_the_transpose_is_the_adjoint():
    coords = voxels(200)
    m = kp.kernel_map(coords, kernel_size=3, stride=2, padding=1, rule="spconv")
    rng = np.random.default_rng(0)
    x, filters = rng.normal(size=(len(coords), 3)), rng.normal(size=(27, 3, 4))
    y = rng.normal(size=(len(m.out_coords), 4))
    forward = (sparse_convolution(m, x, filters) * y).sum()
    backward = (x * sparse_convolution(m.transpose(), y, filters.transpose(0, 2, 1))).sum()
    assert abs(forward - backward) <= 1e-12 * abs(forward)


@pytest.mark.parametrize(
    "kernel_size, stride, padding, dilation", [(3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2)]
)
def test_spconv(kernel_size, stride, padding, dilation, request):
    """The CPU wheel of spconv: the same outputs and values, for all three kinds of layers."""
    torch, spconv = pytest.importorskip("torch"), pytest.importorskip("spconv.pytorch")
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # with two, spconv 2.3.8 loses some of the sums: another result in each call
    shape, coords, features, _ = layer(3, kernel_size, num=150, extent=9)
    features = features.astype(np.float32)
    indices = torch.from_numpy(np.concatenate([np.zeros((len(coords), 1), np.int32), coords], 1))
    x = spconv.SparseConvTensor(torch.from_numpy(features), indices, shape, 1)

    def weights(conv):  # (Cout, k0, k1, k2, Cin) -> (k0, k1, k2, Cin, Cout)
        return np.moveaxis(conv.weight.detach().numpy().astype(np.float64), 0, -1)

    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    down = spconv.SparseConv3d(3, 4, bias=False, indice_key="down", algo=spconv.ConvAlgo.Native, **options)
    y, m = down(x), kp.kernel_map(coords, shape=shape, rule="spconv", **options)
    place = np.lexsort(y.indices.numpy().T[::-1])
    assert_same_bits(m.out_coords, np.ascontiguousarray(y.indices.numpy()[place, 1:]))
    assert_close(y.features.detach().numpy()[place], sparse_convolution(m, features, weights(down)), 1e-5)

    up = spconv.SparseInverseConv3d(4, 3, kernel_size, indice_key="down", bias=False, algo=spconv.ConvAlgo.Native)
    expected = sparse_convolution(m.transpose(), y.features.detach().numpy()[place], weights(up))
    assert_close(up(y).features.detach().numpy(), expected, 1e-5)
    if kernel_size % 2 and stride == 1:
        submanifold = spconv.SubMConv3d(3, 4, kernel_size, dilation=dilation, bias=False, algo=spconv.ConvAlgo.Native)
        m = kp.kernel_map(coords, kernel_size=kernel_size, dilation=dilation)
        expected = sparse_convolution(m, features, weights(submanifold))
        assert_close(submanifold(x).features.detach().numpy(), expected, 1e-5)


# ---- the record


def test_a_map_is_frozen_and_owns_its_arrays():
    coords = voxels(50)
    m = kp.kernel_map(coords, kernel_size=3)
    before = m.out_coords.copy()
    coords[:] = 0
    assert_same_bits(m.out_coords, before)
    assert repr(m) == "KernelMap(50 outputs, 50 inputs, kernel 3 x 3 x 3)"
    with pytest.raises(AttributeError):
        m.kernel_index = None


def test_a_pickled_map_is_the_same():
    m = kp.kernel_map(voxels(50), kernel_size=(1, 2, 3), stride=2, rule="spconv")
    m.transpose()
    same = pickle.loads(pickle.dumps(m))
    for got, expected in zip((*arrays_of(same), *arrays_of(same.transpose())),
                             (*arrays_of(m), *arrays_of(m.transpose())), strict=True):  # fmt: skip
        assert_same_bits(got, expected)
    assert same.kernel_size == (1, 2, 3) and same.transpose().transpose() is same


def test_inputs_stay_as_they_are():
    coords = voxels(50)
    coords.flags.writeable = False
    check_map(coords, kernel_size=3)
    assert_same_bits(arrays_of(kp.kernel_map(np.asfortranarray(coords), kernel_size=3))[1],
                     arrays_of(kp.kernel_map(coords, kernel_size=3))[1])  # fmt: skip


COORDS = np.zeros((5, 3), np.int32)
FAR = np.array([[0, 0, 0], [2**21, 2**21, 2**21]], np.int32)
ERRORS = {
    "floats": (
        {"coords": np.zeros((5, 3))},
        TypeError,
        "coords: expected int32, got float64; coordinates are integers here, such as floor(points / voxel_size)",
    ),
    "int64": ({"coords": np.zeros((5, 3), np.int64)}, TypeError, "coords: expected int32, got int64"),
    "int16": (
        {"coords": np.zeros((5, 3), np.int16)},
        TypeError,
        "coords: expected int32, got int16; convert it with coords.astype(numpy.int32)",
    ),
    "list": ({"coords": [[0]]}, TypeError, "coords: expected a NumPy or CuPy array, got list"),
    "5-D": ({"coords": np.zeros((5, 5), np.int32)}, ValueError, "coords: expected (N, D) with D = 1 to 4, got (5, 5)"),
    "0-D": ({"coords": np.zeros((5, 0), np.int32)}, ValueError, "coords: expected (N, D) with D = 1 to 4, got (5, 0)"),
    "other axes": (
        {"out_coords": np.zeros((5, 2), np.int32)},
        ValueError,
        "out_coords: expected (M, 3) to match coords, got (5, 2)",
    ),
    "no kernel": ({"kernel_size": 0}, ValueError, "kernel_size: expected 1 to 2147483647, got 0"),
    "two sizes": ({"kernel_size": (3, 3)}, ValueError, "kernel_size: expected a number or 3 of them, got shape (2,)"),
    "half a cell": ({"kernel_size": 1.5}, TypeError, "kernel_size: expected an integer, got float"),
    "many cells": ({"kernel_size": 2**11}, ValueError, "kernel_size: expected at most 2**31 - 1 cells, got 8589934592"),
    "stride": (
        {"stride": 2},
        ValueError,
        "stride: expected 1, because rule='submanifold' has no stride, got [2, 2, 2]",
    ),
    "padding": ({"padding": 1}, ValueError, "padding: expected 0 with rule='submanifold', got [1, 1, 1]"),
    "padding of minkowski": (
        {"padding": 1, "rule": "minkowski"},
        ValueError,
        "padding: expected 0 with rule='minkowski', got [1, 1, 1]",
    ),
    "shape": (
        {"shape": (9, 9, 9)},
        ValueError,
        "shape: expected None, because only rule='spconv' without out_coords has one, got a shape",
    ),
    "one number as shape": ({"shape": 9, "rule": "spconv"}, TypeError, "shape: expected 3 integers, got int"),
    "outside": (
        {"coords": np.array([[0, 0, 0], [0, 4, -1]], np.int32), "shape": (4, 4, 4), "rule": "spconv"},
        ValueError,
        "coords: expected coordinates from 0 to below (4, 4, 4) to match shape, got [0, 4, -1] in row 1",
    ),
    "rule": ({"rule": "dense"}, ValueError, "rule: expected 'submanifold' or 'spconv' or 'minkowski', got 'dense'"),
    "row_splits": ({"row_splits": np.array([0, 4])}, ValueError, "row_splits: expected values from 0 to 5 to match"),
    "items of no outputs": (
        {"out_row_splits": np.array([0, 5])},
        ValueError,
        "out_row_splits: expected None without out_coords, got an array",
    ),
    "other items": (
        {"out_coords": COORDS, "row_splits": np.array([0, 2, 5])},
        ValueError,
        "out_row_splits: expected (3,) to match row_splits, got (2,)",
    ),
    "far apart": (
        {"coords": FAR},
        ValueError,
        "coords: expected coordinates whose cells can be numbered in 63 bits, got 1 items that span "
        "2097153 x 2097153 x 2097153 cells",
    ),
    "outputs far apart": ({"out_coords": FAR}, ValueError, "out_coords: expected coordinates whose cells can be"),
    "outputs below int32": (
        {"coords": np.full((1, 3), -(2**31), np.int32), "rule": "minkowski", "stride": 3},
        ValueError,
        "coords: expected coordinates whose outputs int32 can hold, got outputs from -2147483649",
    ),
    "outputs above int32": (
        {"coords": np.full((1, 3), 2**31 - 1, np.int32), "rule": "spconv", "padding": 1},
        ValueError,
        "coords: expected coordinates whose outputs int32 can hold, got outputs from 2147483646",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kp.kernel_map(**{"coords": COORDS, "kernel_size": 3} | changes)


# ---- frameworks


def test_torch_takes_and_returns_tensors():
    torch, coords, row_splits = pytest.importorskip("torch"), voxels(60), np.array([0, 20, 60])
    options = {"kernel_size": 3, "stride": 2, "rule": "minkowski"}
    expected = kp.kernel_map(coords, row_splits=row_splits, **options)
    m = kp.torch.kernel_map(torch.from_numpy(coords), row_splits=torch.from_numpy(row_splits), **options)
    for other, arrays in ((m, expected), (m.transpose(), expected.transpose())):
        for name in ("kernel_index", "out_coords", "out_row_splits", "in_coords", "in_row_splits"):
            assert_same_bits(getattr(other, name).numpy(), getattr(arrays, name))
        assert_same_bits(other.neighbors.index, arrays.neighbors.index)
    assert m.transpose().transpose() is m
    same = pickle.loads(pickle.dumps(m))
    assert torch.equal(same.kernel_index, m.kernel_index)
    assert torch.equal(same.transpose().kernel_index, m.transpose().kernel_index)
    with pytest.raises(TypeError, match="coords: expected int32, got int64"):
        kp.torch.kernel_map(torch.zeros(5, 3, dtype=torch.int64), kernel_size=3)


def test_jax_takes_and_returns_its_arrays():
    jax, coords = pytest.importorskip("jax"), voxels(60)
    expected = kp.kernel_map(coords, kernel_size=3)
    m = kp.jax.kernel_map(jax.numpy.asarray(coords), kernel_size=3)
    for other, arrays in ((m, expected), (m.transpose(), expected.transpose())):
        assert isinstance(other.kernel_index, jax.Array) and isinstance(other.out_coords, jax.Array)
        assert_same_bits(np.asarray(other.kernel_index), arrays.kernel_index)
        assert_same_bits(other.neighbors.index, arrays.neighbors.index)
    with pytest.raises(TypeError, match="coords: kernel_map is not traced"):
        jax.jit(lambda c: kp.jax.kernel_map(c, kernel_size=3).kernel_index)(coords)
    features = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    pooled = jax.jit(lambda f, m: kp.jax.neighbor_reduce(f, m.neighbors, "max") * m.num_kernels)(features, m)
    assert_same_bits(np.asarray(pooled), kp.neighbor_reduce(features, expected.neighbors, "max") * np.float32(27))


# ---- to_dense


def dense(coords, features, shape, row_splits=None):
    out = np.zeros((1 if row_splits is None else len(row_splits) - 1, *shape, features.shape[1]), features.dtype)
    np.add.at(out, (items_of(row_splits, len(coords)), *coords.T), features)
    return np.moveaxis(out, -1, 1)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 3, 2), (2, 3, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("row_splits", [None, np.array([0, 20, 20, 60])])
def test_to_dense(shape, dtype, row_splits):
    rng = np.random.default_rng(0)
    coords, features = rng.integers(0, shape, (60, len(shape))).astype(np.int32), rng.normal(size=(60, 3)).astype(dtype)
    got = kp.to_dense(coords, features, shape, row_splits)
    assert_same_bits(got, np.ascontiguousarray(dense(coords, features, shape, row_splits)))
    features = features.astype(np.float64)
    fn = lambda f: kp.to_dense(coords, f, list(shape), row_splits)  # noqa: E731
    check_vjp(fn, kp.autodiff.vjp(fn, features)[1], (features,))


def test_to_dense_of_nothing():
    assert kp.to_dense(np.empty((0, 2), np.int32), np.empty((0, 3)), (2, 3)).tolist() == np.zeros((1, 3, 2, 3)).tolist()
    assert kp.to_dense(np.zeros((4, 2), np.int32), np.empty((4, 0)), (2, 3)).shape == (1, 0, 2, 3)
    assert kp.to_dense(np.empty((0, 2), np.int32), np.empty((0, 3)), (2, 3), np.array([0])).shape == (0, 3, 2, 3)


def test_to_dense_with_any_number_of_threads(isa, set_threads):
    rng = np.random.default_rng(0)
    coords, features = (
        rng.integers(0, 12, (40_000, 3)).astype(np.int32),
        rng.normal(size=(40_000, 5)).astype(np.float32),
    )
    expected = np.ascontiguousarray(dense(coords, features, (12, 12, 12)))
    for threads in (1, 2, 3):
        set_threads(threads)
        out, pullback = kp.autodiff.vjp(lambda f: kp.to_dense(coords, f, (12, 12, 12)), features)
        assert_same_bits(out, expected)
        assert_same_bits(pullback(expected)[0], np.ascontiguousarray(expected[0][(slice(None), *coords.T)].T))


TO_DENSE_ERRORS = {
    "floats": (
        {"coords": np.zeros((5, 2))},
        TypeError,
        "coords: expected int32, got float64; coordinates are integers",
    ),
    "outside": (
        {"coords": np.array([[0, 0]] * 4 + [[2, 0]], np.int32)},
        ValueError,
        "coords: expected coordinates from 0 to below (2, 3) to match shape, got [2, 0] in row 4",
    ),
    "negative": (
        {"coords": np.array([[0, 0]] * 4 + [[0, -1]], np.int32)},
        ValueError,
        "coords: expected coordinates from 0 to below (2, 3) to match shape, got [0, -1] in row 4",
    ),
    "axes": ({"shape": (2, 3, 4)}, ValueError, "shape: expected a number or 2 of them, got shape (3,)"),
    "a number": ({"shape": 2}, TypeError, "shape: expected 2 integers, got int"),
    "no cells": ({"shape": (2, 0)}, ValueError, "shape[1]: expected 1 to 2147483647, got 0"),
    "rows": ({"features": np.zeros((4, 1))}, ValueError, "features: expected (5, C) to match coords, got (4, 1)"),
    "row_splits": ({"row_splits": np.array([0, 4])}, ValueError, "row_splits: expected values from 0 to 5 to match"),
}


@pytest.mark.parametrize(("changes", "error", "message"), TO_DENSE_ERRORS.values(), ids=TO_DENSE_ERRORS)
def test_errors_of_to_dense_name_the_argument(changes, error, message):
    arguments = {"coords": np.zeros((5, 2), np.int32), "features": np.zeros((5, 1)), "shape": (2, 3)}
    with pytest.raises(error, match=re.escape(message)):
        kp.to_dense(**arguments | changes)


def test_a_map_and_its_transpose_are_freed_with_the_last_reference():
    gc.disable()
    try:
        m = kp.kernel_map(np.zeros((4, 2), np.int32), kernel_size=3)
        back = m.transpose()
        gone = weakref.ref(m)
        del m
        assert gone() is None
        assert back.transpose().transpose() is back
        gone = weakref.ref(back)
        del back
        assert gone() is None
    finally:
        gc.enable()
