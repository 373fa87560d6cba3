"""Layers on rows of features: results of torch and of the formulas, gradients, edge cases, reproducibility."""

import itertools
import math
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import examples
import numpy as np
import pytest
import reference
from gradcheck import check_vjp
from hypothesis import given
from hypothesis import strategies as st
from reference import TOLERANCE, assert_close, assert_same_bits

import kpcore as kp
from kpcore.ops import OPS, Call

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])
SHAPES = [(3, 1), (3, 4), (16, 13), (61, 32), (130, 33), (1500, 8), (240, 100), (5, 257)]
CLASSES = {np.uint8: 255, np.int32: -1, np.int64: -100}  # {dtype of labels: ignored label}


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="torch, which these results are compared with, is not installed")


# ---- the formulas in float64


def normalize(features, scale, shift, mean, variance, eps, negative_slope=None):
    """mean and variance broadcast against (N, C)"""
    features, scale, shift = (a.astype(np.float64) for a in (features, scale, shift))
    out = (features - mean) / np.sqrt(variance + eps) * scale + shift
    return out if negative_slope is None else np.where(out > 0, out, out * negative_slope)


def group_moments(features, num_groups, row_splits=None):
    """-> (mean, variance), each (N, C), over the batch item and the group of channels that a value belongs to"""
    mean, variance = np.empty((2, *features.shape))
    for first, last in itertools.pairwise(reference.splits_or_whole(row_splits, len(features))):
        for channels in np.split(np.arange(features.shape[1]), num_groups):
            group = np.s_[first:last, channels[0] : channels[-1] + 1]
            if first < last:
                mean[group] = features[group].mean(dtype=np.float64)
                variance[group] = ((features[group] - mean[group]) ** 2).mean()
    return mean, variance


def softmax(features):
    e = np.exp(features.astype(np.float64) - features.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def cross_entropies(logits, labels, ignore_index=None, class_weights=None):
    """-> (losses, weights) (N,), both 0 where ignored"""
    counts = labels != ignore_index
    classes = np.where(counts, labels, 0).astype(int)
    weights = counts * (1.0 if class_weights is None else class_weights.astype(np.float64)[classes])
    return -weights * np.log(softmax(logits)[np.arange(len(logits)), classes]), weights


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words from a counter of four words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_mask(size, rate, seed):
    """(size,) bool: the values that dropout keeps."""
    words = [
        philox(((i // 64 * 16 + i % 16), 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[i // 16 % 4] for i in range(size)
    ]
    return np.array(words, np.uint64) >= np.uint64(rate * 2**32)


# ---- example calls


def linear_arguments(num, geometry, features):
    rng = np.random.default_rng(2)
    weights, bias = rng.normal(size=(4, 3)).astype(features), rng.normal(size=3).astype(features)
    return examples.rows_of_features(num, geometry, features) | {"weights": weights, "bias": bias}


def norm_arguments(num, geometry, features):
    scale, shift = np.random.default_rng(2).uniform(0.5, 2, (2, 4)).astype(features)
    return examples.rows_of_features(num, geometry, features) | {"scale": scale, "shift": shift}


def batch_norm_arguments(num, geometry, features):
    running = {"running_mean": np.zeros(4, features), "running_var": np.ones(4, features)}
    return norm_arguments(num, geometry, features) | running | {"training": num > 1}


def pair_arguments(num, geometry, features):
    first = examples.rows_of_features(num, geometry, features)["features"]
    return {"first": first, "second": first[:, ::-1].copy()}


def labelled_arguments(num, geometry, features):
    labels = np.random.default_rng(6).integers(0, 4, num).astype(np.int32)
    return {"logits": examples.rows_of_features(num, geometry, features)["features"], "labels": labels}


CALLS = {
    "linear": (linear_arguments, [{}, {"bias": None}]),
    "batch_norm": (batch_norm_arguments, [{}, {"negative_slope": 0.1}]),
    "group_norm": (norm_arguments, [{"num_groups": 2}]),
    "leaky_relu": (examples.rows_of_features, [{}]),
    "relu": (examples.rows_of_features, [{}]),
    "relu6": (examples.rows_of_features, [{}]),
    "sigmoid": (examples.rows_of_features, [{}]),
    "softmax": (examples.rows_of_features, [{}]),
    "dropout": (examples.rows_of_features, [{"rate": 0.4, "seed": 7}]),
    "concatenate": (pair_arguments, [{}]),
    "add": (pair_arguments, [{}]),
    "softmax_cross_entropy": (labelled_arguments, [{}, {"reduction": "none"}]),
}


# ---- every operator with its counterpart in torch


class Layer(NamedTuple):
    primals: object  # (rng, n, c) -> arrays of n rows and c channels
    ours: object  # (*primals) -> array
    in_torch: object  # (torch, *primals) -> tensor


def features(rng, n, c):
    return (rng.normal(size=(n, c)),)


def two(rng, n, c):
    return rng.normal(size=(2, n, c))


def normalized(rng, n, c):
    return rng.normal(3, 2, (n, c)), rng.normal(size=c), rng.normal(size=c)


def product(rng, n, c, c_out=19):
    return rng.normal(size=(n, c)), rng.normal(size=(c, c_out)), rng.normal(size=c_out)


def running(c, dtype):
    return np.linspace(-1, 4, c).astype(dtype), np.linspace(0.5, 3, c).astype(dtype)


def value_of(x):
    return x.value if isinstance(x, kp.autodiff.Tensor) else x


def ours_batch_norm(x, scale, shift, **options):
    statistics = running(len(value_of(scale)), value_of(x).dtype)
    return kp.batch_norm(x, scale, shift, *statistics, **options).features


def torch_batch_norm(torch, x, scale, shift, slope=None, **options):
    mean, var = map(torch.from_numpy, running(len(scale), np.float64))
    out = torch.nn.functional.batch_norm(x, mean, var, scale, shift, **options)
    return out if slope is None else torch.nn.functional.leaky_relu(out, slope)


def torch_group_norm(torch, x, scale, shift, groups=1, row_splits=None, slope=None):
    """group_norm of torch on samples (1, C, rows), one for each batch item."""
    bounds = [0, len(x)] if row_splits is None else row_splits
    items = [x[a:b].T[None] for a, b in itertools.pairwise(bounds) if b > a]
    out = torch.cat([torch.nn.functional.group_norm(i, groups, scale, shift)[0].T for i in items])
    return out if slope is None else torch.nn.functional.leaky_relu(out, slope)


def batch_splits(n):
    return np.array([0, n // 3, n // 3, n])


LAYERS = {
    "linear": Layer(product, kp.linear, lambda torch, x, w, b: x @ w + b),
    "linear, no bias": Layer(lambda *a: product(*a)[:2], kp.linear, lambda torch, x, w: x @ w),
    "linear, wide": Layer(
        partial(product, c_out=150), kp.linear, lambda torch, x, w, b: torch.nn.functional.linear(x, w.T, b)
    ),
    "batch_norm": Layer(normalized, ours_batch_norm, partial(torch_batch_norm, training=True)),
    "batch_norm, leaky": Layer(
        normalized, partial(ours_batch_norm, negative_slope=0.1), partial(torch_batch_norm, slope=0.1, training=True)
    ),
    "batch_norm, eps": Layer(
        normalized, partial(ours_batch_norm, eps=0.5), partial(torch_batch_norm, eps=0.5, training=True)
    ),
    "batch_norm, running": Layer(
        normalized,
        partial(ours_batch_norm, training=False, negative_slope=0.2),
        partial(torch_batch_norm, slope=0.2, training=False),
    ),
    "group_norm": Layer(normalized, lambda x, a, b: kp.group_norm(x, 1, a, b), torch_group_norm),
    "group_norm, leaky": Layer(
        normalized,
        lambda x, a, b: kp.group_norm(x, len(value_of(a)), a, b, negative_slope=0.3),
        lambda torch, x, a, b: torch_group_norm(torch, x, a, b, groups=len(a), slope=0.3),
    ),
    "leaky_relu": Layer(features, kp.leaky_relu, lambda torch, x: torch.nn.functional.leaky_relu(x, 0.1)),
    "leaky_relu, slope": Layer(
        features, lambda x: kp.leaky_relu(x, -0.7), lambda torch, x: torch.nn.functional.leaky_relu(x, -0.7)
    ),
    "relu": Layer(features, kp.relu, lambda torch, x: torch.relu(x)),
    "relu6": Layer(features, lambda x: kp.relu6(9 * x), lambda torch, x: torch.nn.functional.relu6(9 * x)),
    "sigmoid": Layer(features, kp.sigmoid, lambda torch, x: torch.sigmoid(x)),
    "softmax": Layer(features, kp.softmax, lambda torch, x: torch.softmax(x, -1)),
    "add": Layer(two, kp.add, lambda torch, a, b: a + b),
    "concatenate": Layer(
        lambda rng, n, c: (rng.normal(size=(n, c)), rng.normal(size=(n, 3))),
        kp.concatenate,
        lambda torch, *x: torch.cat(x, 1),
    ),
    "concatenate, four": Layer(
        lambda rng, n, c: [rng.normal(size=(n, c + i)) for i in range(4)],
        kp.concatenate,
        lambda torch, *x: torch.cat(x, 1),
    ),
    "dropout": Layer(
        features,
        lambda x: kp.dropout(x, 0.3, seed=5),
        lambda torch, x: x * torch.from_numpy(kept(x.shape, 0.3, 5) / 0.7),
    ),
}


def kept(shape, rate, seed):
    return dropout_mask(math.prod(shape), rate, seed).reshape(shape)


def results(fn, primals, grad):
    out, pullback = kp.autodiff.vjp(fn, *primals)
    return [out, *pullback(grad)]


def torch_results(torch, fn, primals, grad):
    inputs = [torch.from_numpy(p.astype(np.float64)).requires_grad_() for p in primals]
    out = fn(torch, *inputs)
    grads = torch.autograd.grad(out, inputs, torch.from_numpy(np.asarray(grad, np.float64)))
    return [out.detach().numpy(), *(g.numpy() for g in grads)]


def case(name, shape, dtype, seed=0):
    layer, rng = LAYERS[name], np.random.default_rng(seed)
    primals = [np.asarray(p, dtype) for p in layer.primals(rng, *shape)]
    return layer, primals, rng.normal(size=np.shape(layer.ours(*primals))).astype(dtype)


def compare(got, expected, dtype):
    for ours, other in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, other, TOLERANCE[np.dtype(dtype)])


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_torch(name, shape, dtype, isa, torch):
    layer, primals, grad = case(name, shape, dtype)
    compare(results(layer.ours, primals, grad), torch_results(torch, layer.in_torch, primals, grad), dtype)


@both_dtypes
@pytest.mark.parametrize("slope", [None, 0.1])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("n", [1, 4, 300, 5000])
def test_group_norm_of_batch_items(n, groups, slope, dtype, torch):
    rng, row_splits = np.random.default_rng(0), batch_splits(n)
    primals = [np.asarray(p, dtype) for p in normalized(rng, n, 32)]
    grad = rng.normal(size=(n, 32)).astype(dtype)
    got = results(
        lambda x, a, b: kp.group_norm(x, groups, a, b, row_splits=row_splits, negative_slope=slope), primals, grad
    )
    other = partial(torch_group_norm, groups=groups, row_splits=row_splits, slope=slope)
    compare(got, torch_results(torch, other, primals, grad), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_type", CLASSES)
@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_that_of_torch(shape, dtype, label_type, weighted, reduction, torch):
    rng, ignore = np.random.default_rng(0), CLASSES[label_type]
    n, c = shape
    logits, labels = rng.normal(0, 3, shape).astype(dtype), rng.integers(0, min(c, 200), n).astype(label_type)
    labels[1::3] = ignore
    weights = rng.uniform(0.1, 2, c).astype(dtype) if weighted else None
    grad = rng.normal(size=n if reduction == "none" else ()).astype(dtype)
    got = results(
        lambda x: kp.softmax_cross_entropy(x, labels, ignore_index=ignore, class_weights=weights, reduction=reduction),
        [logits],
        grad,
    )
    expected = torch_results(
        torch,
        lambda torch, x: torch.nn.functional.cross_entropy(
            x,
            torch.from_numpy(labels.astype(np.int64)),
            weight=None if weights is None else torch.from_numpy(weights.astype(np.float64)),
            ignore_index=ignore,
            reduction=reduction,
        ),
        [logits],
        grad,
    )
    compare(got, expected, dtype)
    losses, row_weights = cross_entropies(logits, labels, ignore, weights)
    reduced = {"mean": losses.sum() / row_weights.sum(), "sum": losses.sum(), "none": losses}[reduction]
    assert_close(got[0], reduced, TOLERANCE[np.dtype(dtype)])


# ---- against the formulas, which need no torch


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_normalisations_are_their_formulas(shape, dtype, isa):
    x, scale, shift = (np.asarray(p, dtype) for p in normalized(np.random.default_rng(0), *shape))
    c = shape[1]
    for groups in (1, c):
        expected = normalize(x, scale, shift, *group_moments(x, groups), 1e-5, 0.1)
        got = kp.group_norm(x, groups, scale, shift, negative_slope=0.1)
        assert_close(got, expected, TOLERANCE[np.dtype(dtype)])
    assert_close(ours_batch_norm(x, scale, shift, negative_slope=0.1), expected, TOLERANCE[np.dtype(dtype)])


@both_dtypes
def test_softmax_of_any_shape(dtype, isa):
    for shape in (7,), (2, 3, 5), (2, 0, 4), (1, 1), (4, 40):
        x = np.random.default_rng(0).normal(0, 4, shape).astype(dtype)
        assert_close(kp.softmax(x), softmax(x), TOLERANCE[np.dtype(dtype)])


# ---- gradients by central differences

SMOOTH = [name for name in LAYERS if "relu" not in name]


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_by_central_differences(name):
    layer, primals, _ = case(name, (61, 6), np.float64)
    check_vjp(layer.ours, kp.autodiff.vjp(layer.ours, *primals)[1], primals)


@pytest.mark.parametrize("name", ["leaky_relu", "relu", "relu6", "leaky_relu, slope"])
def test_gradients_of_kinks_by_central_differences(name):
    fn, (x,) = LAYERS[name].ours, features(np.random.default_rng(0), 61, 6)
    x = np.sign(x) * (0.01 + np.abs(x))  # farther from zero than the step
    check_vjp(fn, kp.autodiff.vjp(fn, x)[1], (x,))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_by_central_differences(reduction):
    rng = np.random.default_rng(0)
    labels, weights = rng.integers(-1, 7, 61), rng.uniform(0.1, 2, 7)

    def fn(x):
        return kp.softmax_cross_entropy(x, labels, ignore_index=-1, class_weights=weights, reduction=reduction)

    logits = rng.normal(size=(61, 7))
    check_vjp(fn, kp.autodiff.vjp(fn, logits)[1], (logits,))


def network(x, skip, weights, scale, shift, labels, row_splits):
    """The loss of a residual block with every operator of this family."""
    c = 8
    x = kp.concatenate(x, skip)
    hidden = kp.linear(x, weights)
    hidden = kp.batch_norm(hidden, scale, shift, np.zeros(c), np.ones(c), negative_slope=0.1).features
    hidden = kp.dropout(hidden, 0.2, seed=1)
    gate = kp.sigmoid(kp.group_norm(hidden, 2, scale, shift, row_splits=row_splits))
    hidden = kp.add(kp.leaky_relu(hidden, 0.2), kp.softmax(gate))
    return kp.softmax_cross_entropy(kp.add(kp.relu(hidden), hidden), labels)


def test_a_network_by_central_differences():
    rng = np.random.default_rng(3)
    primals = [rng.normal(size=shape) for shape in ((90, 5), (90, 3), (8, 8), 8, 8)]
    fn = partial(network, labels=rng.integers(0, 8, 90), row_splits=batch_splits(90))
    check_vjp(fn, kp.autodiff.vjp(fn, *primals)[1], primals, step=1e-6, tolerance=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_one_primal_alone_gets_the_same_gradient(name):
    layer, primals, grad = case(name, (40, 6), np.float32)
    expected = kp.autodiff.vjp(layer.ours, *primals)[1](grad)
    for i, primal in enumerate(primals):
        (got,) = kp.autodiff.vjp(lambda p, i=i: layer.ours(*primals[:i], p, *primals[i + 1 :]), primal)[1](grad)
        assert_same_bits(got, expected[i])


def test_gradients_share_no_memory():
    for fn in (kp.add, kp.concatenate):
        out, pullback = kp.autodiff.vjp(fn, np.ones((3, 2)), np.ones((3, 2)))
        grad = np.ones_like(out)
        first, second = pullback(grad)
        assert not np.shares_memory(first, second) and not np.shares_memory(first, grad)


# ---- the same bits


@both_dtypes
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_with_any_number_of_threads(name, dtype, isa, set_threads):
    layer, primals, grad = case(name, (9001, 33), dtype)
    all_results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        all_results.append(results(layer.ours, primals, grad))
    for other in all_results[1:]:
        for got, expected in zip(other, all_results[0], strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@both_dtypes
def test_cross_entropy_has_the_same_bits_with_any_number_of_threads(dtype, reduction, isa, set_threads):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9001, 13)).astype(dtype), rng.integers(-1, 13, 9001)
    weights = rng.uniform(size=13).astype(dtype)

    def fn(x):
        return kp.softmax_cross_entropy(x, labels, ignore_index=-1, class_weights=weights, reduction=reduction)

    all_results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        out, pullback = kp.autodiff.vjp(fn, logits)
        all_results.append((out, *pullback(np.ones_like(out))))
    for other in all_results[1:]:
        for got, expected in zip(other, all_results[0], strict=True):
            assert_same_bits(got, expected)


def test_group_norm_of_a_batch_is_that_of_its_items():
    rng, row_splits = np.random.default_rng(0), np.array([0, 40, 40, 41, 2000, 2000])
    x, scale, shift = (p.astype(np.float32) for p in normalized(rng, 2000, 24))
    got = kp.group_norm(x, 4, scale, shift, row_splits=row_splits)
    parts = [kp.group_norm(x[a:b], 4, scale, shift) for a, b in itertools.pairwise(row_splits)]
    assert_same_bits(got, np.concatenate(parts))


@both_dtypes
def test_a_fused_leaky_relu_is_the_one_after(dtype, isa):
    x, scale, shift = (np.asarray(p, dtype) for p in normalized(np.random.default_rng(0), 300, 21))
    expected = kp.leaky_relu(ours_batch_norm(x, scale, shift), 0.1)
    assert_same_bits(ours_batch_norm(x, scale, shift, negative_slope=0.1), expected)
    grad = np.random.default_rng(1).normal(size=x.shape).astype(dtype)
    fused = results(partial(ours_batch_norm, negative_slope=0.1), (x, scale, shift), grad)
    apart = results(lambda *p: kp.leaky_relu(ours_batch_norm(*p), 0.1), (x, scale, shift), grad)
    for a, b in zip(fused, apart, strict=True):
        assert_same_bits(a, b)


# ---- batch statistics


@pytest.mark.parametrize(("dtype", "offset"), [(np.float32, 1e4), (np.float64, 1e5)])
@pytest.mark.parametrize("first", ["like the others", "an outlier"])
def test_a_large_offset_does_no_harm(first, dtype, offset, isa):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3000, 20)) + offset * rng.uniform(-1, 1, 20)).astype(dtype)
    if first == "an outlier":
        x[0] = 0
    scale, shift = np.ones(20, dtype), np.zeros(20, dtype)
    mean, variance = group_moments(x.astype(np.longdouble), 20)
    got = kp.batch_norm(x, scale, shift, shift, scale, momentum=1.0)
    assert_close(got.running_var, variance[0] * 3000 / 2999, 2e-7 if dtype == np.float32 else 1e-9)
    assert_close(got.running_mean, mean[0], 1e-7 if dtype == np.float32 else 1e-14)
    assert_close(got.features, normalize(x, scale, shift, mean, variance, 1e-5), TOLERANCE[np.dtype(dtype)])


def test_gradients_with_a_large_offset(torch):
    rng = np.random.default_rng(0)
    primals = [(rng.normal(size=(3000, 20)) + 1e4).astype(np.float32), np.ones(20, np.float32), np.ones(20, np.float32)]
    grad = rng.normal(size=(3000, 20)).astype(np.float32)
    expected = torch_results(torch, partial(torch_batch_norm, training=True), primals, grad)
    compare(results(ours_batch_norm, primals, grad), expected, np.float32)


@both_dtypes
@pytest.mark.parametrize("momentum", [0.0, 0.02, 0.3, 1.0])
def test_running_statistics_are_those_of_torch(momentum, dtype, torch):
    x, scale, shift = (np.asarray(p, dtype) for p in normalized(np.random.default_rng(0), 50, 7))
    before = running(7, dtype)
    mean, var = (torch.from_numpy(a.astype(np.float64)) for a in before)
    got = kp.batch_norm(x, scale, shift, *before, momentum=momentum)
    torch.nn.functional.batch_norm(torch.from_numpy(x.astype(np.float64)), mean, var, training=True, momentum=momentum)
    for ours, other, old, new in zip(got[1:], (mean, var), before, running(7, dtype), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, other.numpy(), TOLERANCE[np.dtype(dtype)])
        assert_same_bits(old, new)  # the arguments are not written to


def test_without_training_the_running_statistics_stay():
    x, scale, shift = normalized(np.random.default_rng(0), 50, 7)
    before = running(7, np.float64)
    got = kp.batch_norm(x, scale, shift, *before, training=False, momentum=0.5)
    for new, old in zip(got[1:], before, strict=True):
        assert_same_bits(new, old)
        assert not np.shares_memory(new, old)


def test_a_constant_channel_becomes_its_shift():
    x, ones = np.full((1000, 3), 0.1, np.float32), np.ones(3, np.float32)
    shift = np.float32([1, 2, 3])
    got = kp.batch_norm(x, ones, shift, ones, ones, momentum=1.0)
    assert got.features.tolist() == [[1, 2, 3]] * 1000
    assert got.running_var.tolist() == [0, 0, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_a_batch_of_fewer_than_two_rows(n):
    x, ones = np.ones((n, 3)), np.ones(3)
    with pytest.raises(ValueError, match=rf"features: expected at least 2 rows where training, got \({n}, 3\)"):
        kp.batch_norm(x, ones, ones, ones, ones)
    assert kp.batch_norm(x, ones, ones, ones, ones, training=False).features.shape == (n, 3)


# ---- sums that are long


def test_the_gradient_of_weights_over_many_rows():
    rng = np.random.default_rng(0)
    x, w, g = rng.random((200_000, 8), np.float32), np.zeros((8, 5), np.float32), rng.random((200_000, 5), np.float32)
    _, grad_w, grad_b = kp.autodiff.vjp(kp.linear, x, w, np.zeros(5, np.float32))[1](g)
    assert_close(grad_w, x.T.astype(np.float64) @ g, 1e-6)
    assert_close(grad_b, g.sum(0, dtype=np.float64), 1e-7)


@both_dtypes
@pytest.mark.parametrize("c_in", [130, 400])
def test_the_gradient_of_weights_in_many_sums(c_in, dtype, set_threads):
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(40_000, c_in)).astype(dtype), rng.normal(size=(40_000, 70)).astype(dtype)
    all_results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        all_results.append(kp.autodiff.vjp(lambda w: kp.linear(x, w), np.zeros((c_in, 70), dtype))[1](g)[0])
    assert_close(all_results[0], x.T.astype(np.float64) @ g, TOLERANCE[np.dtype(dtype)])
    for got in all_results[1:]:
        assert_same_bits(got, all_results[0])


def test_a_loss_over_many_rows():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300_000, 4)).astype(np.float32), rng.integers(0, 4, 300_000)
    losses, _ = cross_entropies(logits, labels)
    assert_close(kp.softmax_cross_entropy(logits, labels), losses.mean(), 2e-7)


@pytest.mark.parametrize("c_out", [1, 2, 15, 16, 17, 31, 33, 48, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("c_in", [1, 5, 12, 13, 95, 97, 130])
@both_dtypes
def test_linear_of_any_channels(dtype, c_in, c_out, isa):
    rng = np.random.default_rng(0)
    for n in (1, 6, 119, 251) if c_in % 2 else (5, 12, 120, 121):
        x, w, b = (p.astype(dtype) for p in product(rng, n, c_in, c_out))
        grad = rng.normal(size=(n, c_out)).astype(dtype)
        got = results(kp.linear, (x, w, b), grad)
        x, w, b, grad = (a.astype(np.float64) for a in (x, w, b, grad))
        compare(got, (x @ w + b, grad @ w.T, x.T @ grad, grad.sum(0)), dtype)


@both_dtypes
@pytest.mark.parametrize("rows", [1, 29, 103, 121, 309])
def test_products_of_few_rows_by_many_threads(rows, dtype, isa, set_threads):
    """With rows for one or two tiles only, the columns of a matrix product are divided among threads too."""
    rng = np.random.default_rng(rows)
    features, weights, bias, grad = (
        rng.standard_normal(shape).astype(dtype) for shape in ((rows, 301), (301, 711), (711,), (rows, 711))
    )
    all_results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        out, pullback = kp.autodiff.vjp(lambda *args: kp.linear(*args), features, weights, bias)
        all_results.append((out, *pullback(grad)))
    for one, other in itertools.product(all_results[:1], all_results[1:]):
        for value, same in zip(one, other, strict=True):
            assert_same_bits(value, same)
    x, w, g = (a.astype(np.float64) for a in (features, weights, grad))
    for value, expected in zip(all_results[0], (x @ w + bias, g @ w.T, x.T @ g, g.sum(axis=0)), strict=True):
        assert np.abs(value - expected).max() <= 100 * np.finfo(dtype).eps * np.abs(expected).max()


# ---- dropout

# Test vectors of the reference implementation: (counter, key, words).
KNOWN_WORDS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_known_words_of_philox(counter, key, words):
    assert philox(counter, key) == words


@both_dtypes
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_dropout_keeps_what_the_words_say(rate, seed, dtype, isa):
    for n in (0, 1, 15, 16, 17, 63, 64, 65, 1000):
        x = np.random.default_rng(0).normal(size=n).astype(dtype)
        mask = dropout_mask(n, rate, seed)
        got = kp.dropout(x, rate, seed)
        assert got.dtype == dtype
        assert np.array_equal(got != 0, mask & (rate < 1))
        assert_close(got[mask], x[mask] / (1 - rate) if rate < 1 else 0 * x[mask], 1e-6)


def test_the_upper_half_of_the_seed_counts():
    assert (kp.dropout(np.ones(4000), 0.5, 1) != kp.dropout(np.ones(4000), 0.5, 2**32)).mean() > 0.4


def test_dropout_drops_its_share_independently():
    n = 200_000
    kept_by = [kp.dropout(np.ones(n, np.float32), 0.3, seed) > 0 for seed in range(3)]
    for mask in kept_by:
        assert abs(mask.mean() - 0.7) < 5 * math.sqrt(0.21 / n)
        for lag in (1, 2, 16, 64, 1024):
            assert abs((mask[lag:] & mask[:-lag]).mean() - 0.49) < 5 * math.sqrt(0.25 / n)
    assert abs((kept_by[0] & kept_by[1]).mean() - 0.49) < 5 * math.sqrt(0.25 / n)


def test_dropout_is_of_values_in_their_order_whatever_the_shape():
    x = np.ones(960, np.float32)
    assert_same_bits(kp.dropout(x.reshape(6, 8, 20), 0.4, 3).ravel(), kp.dropout(x, 0.4, 3))


def test_dropout_drops_nan_and_keeps_everything_without_training():
    x = np.full(1000, np.nan)
    got = kp.dropout(x, 0.5, 0)
    assert np.array_equal(np.isnan(got), dropout_mask(1000, 0.5, 0))
    same = kp.dropout(x, 0.5, 0, training=False)
    assert_same_bits(same, x)
    assert not np.shares_memory(same, x)
    (grad,) = kp.autodiff.vjp(lambda x: kp.dropout(x, 0.5, 0, training=False), np.ones(5))[1](np.arange(5.0))
    assert grad.tolist() == [0, 1, 2, 3, 4]


# ---- edges


@both_dtypes
@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_empty_and_single(name, shape, dtype, isa):
    if name.startswith("batch_norm") and shape[0] < 2 and "running" not in name:
        return  # an error, tested above
    if name == "group_norm, leaky" and not shape[1]:
        return  # zero groups are an error
    layer, primals, grad = case(name, shape, dtype)
    out, *grads = results(layer.ours, primals, grad)
    assert out.shape[0] == shape[0] and np.isfinite(out).all()
    for g, primal in zip(grads, primals, strict=True):
        assert (g.shape, g.dtype) == (primal.shape, dtype) and np.isfinite(g).all()


def test_no_input_channels_give_the_bias():
    out, pullback = kp.autodiff.vjp(kp.linear, np.empty((3, 0)), np.empty((0, 2)), np.array([1.0, 2.0]))
    assert out.tolist() == [[1, 2]] * 3
    assert [g.tolist() for g in pullback(np.ones((3, 2)))] == [[[], [], []], [], [3, 3]]


def test_elementwise_of_any_shape():
    for shape in (), (5,), (2, 3, 4), (2, 0, 4), (1, 1, 1, 70):
        x = np.random.default_rng(0).normal(size=shape)
        for fn, expected in (
            (kp.relu, np.maximum(x, 0)),
            (kp.relu6, np.clip(x, 0, 6)),
            (kp.leaky_relu, np.where(x > 0, x, 0.1 * x)),
            (kp.sigmoid, 1 / (1 + np.exp(-x))),
            (lambda x: kp.add(x, x), 2 * x),
        ):
            out, pullback = kp.autodiff.vjp(fn, x)
            assert isinstance(out, np.ndarray)
            assert_close(out, expected, 1e-15)
            assert pullback(np.ones_like(x))[0].shape == shape


@both_dtypes
def test_values_at_the_ends(dtype, isa):
    inf, nan = np.inf, np.nan
    x = np.array([-inf, -1e30, -100, -0.0, 0, 100, 1e30, inf, nan], dtype)
    assert_same_bits(kp.relu(x)[:-1], np.array([0, 0, 0, 0, 0, 100, 1e30, inf], dtype))
    assert_same_bits(kp.leaky_relu(x, 0.5)[:-1], np.array([-inf, -5e29, -50, -0.0, 0, 100, 1e30, inf], dtype))
    assert_same_bits(kp.relu6(x)[:-1], np.array([0, 0, 0, 0, 0, 6, 6, 6], dtype))
    got = kp.sigmoid(x)
    assert_close(got[:-1], [0, 0, math.exp(-100) if dtype == np.float64 else 0, 0.5, 0.5, 1, 1, 1], 1e-15)
    for fn in (kp.relu, kp.relu6, kp.leaky_relu, kp.sigmoid):
        out, pullback = kp.autodiff.vjp(fn, x)
        assert np.isnan(out[-1])
        assert np.isfinite(pullback(np.ones_like(x))[0][:-1]).all()


@both_dtypes
def test_softmax_at_the_ends(dtype, isa):
    inf, nan = np.inf, np.nan
    x = np.array([[1e30, 0, -1e30], [-inf, 0, 0], [5, 5, -inf], [nan, 0, 0], [inf, 0, 0], [-inf] * 3], dtype)
    got = kp.softmax(x)
    assert got[:3].tolist() == [[1, 0, 0], [0, 0.5, 0.5], [0.5, 0.5, 0]]
    assert np.isnan(got[3:]).any(1).all()


@both_dtypes
def test_cross_entropy_at_the_ends(dtype, isa):
    logits = np.array([[1e4, 0], [0, 1e4], [0, 0]], dtype)
    loss = kp.softmax_cross_entropy(logits, np.array([0, 0, 1]), reduction="none")
    assert_close(loss, [0, 1e4, math.log(2)], 1e-7)


@both_dtypes
@pytest.mark.parametrize("name", ["all ignored", "no rows", "no weight"])
def test_a_mean_over_nothing_is_zero(name, dtype):
    logits = np.ones((0 if name == "no rows" else 4, 3), dtype)
    labels = np.full(len(logits), 255 if name == "all ignored" else 1, np.uint8)
    weights = np.array([1, 0, 1], dtype) if name == "no weight" else None
    loss, pullback = kp.autodiff.vjp(
        lambda x: kp.softmax_cross_entropy(x, labels, ignore_index=255, class_weights=weights), logits
    )
    assert (loss.shape, loss.dtype, float(loss)) == ((), dtype, 0)
    (grad,) = pullback(np.ones_like(loss))
    assert grad.shape == logits.shape and not grad.any()


@pytest.mark.parametrize("label_type", CLASSES)
@pytest.mark.parametrize("label", [3, 100, -2])
def test_a_label_out_of_range_names_its_row(label, label_type, set_threads):
    if label < 0 and label_type == np.uint8:
        return
    set_threads(2)
    labels = np.zeros(50_000, label_type)
    labels[[40_123, 40_200]] = label
    logits = np.zeros((50_000, 3), np.float32)
    with pytest.raises(ValueError, match=rf"labels: expected 0 to 2, got {label} in row 40123"):
        kp.softmax_cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=rf"labels: expected 0 to 2, or 99 to be ignored, got {label} in row 40123"):
        kp.softmax_cross_entropy(logits, labels, ignore_index=99)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_not_finite_stays_in_its_channel_or_row(name):
    layer, primals, _ = case(name, (40, 6), np.float64)
    primals[0][7, 2] = np.nan
    out = layer.ours(*primals)
    wrong = np.isnan(out)
    if "group_norm" in name and "leaky" not in name:
        assert wrong.all()
    elif "running" in name or "norm" not in name:
        assert wrong.any(1).tolist() == (np.arange(40) == 7).tolist() or (name == "dropout" and not wrong.any())
    else:
        assert wrong.any(0).tolist() == (np.arange(6) == 2).tolist()


# ---- the table of operators


def test_shapes_and_dtypes_are_known_ahead():
    x, c = np.ones((6, 4), np.float32), np.ones(4, np.float32)
    labels = np.zeros(6, np.int64)
    norm = {"features": x, "scale": c, "shift": c, "eps": 1e-5, "negative_slope": None}
    loss = {"logits": x, "labels": labels, "ignore_index": None, "class_weights": None}
    calls = [
        (OPS["linear"], {"features": x, "weights": np.ones((4, 3), np.float32), "bias": None}),
        *(
            (OPS["batch_norm"], norm | {"running_mean": c, "running_var": c, "training": t, "momentum": 0.1})
            for t in (True, False)
        ),
        *((OPS["group_norm"], norm | {"num_groups": 2, "row_splits": s}) for s in (None, np.array([0, 2, 2, 6]))),
        (OPS["leaky_relu"], {"features": x, "negative_slope": 0.1}),
        (OPS["relu"], {"features": x}),
        (OPS["sigmoid"], {"features": x}),
        (OPS["softmax"], {"features": x}),
        (OPS["dropout"], {"features": x, "rate": 0.1, "seed": 0, "training": True}),
        (OPS["add"], {"first": x, "second": x}),
        (OPS["concatenate"], {"first": x, "second": x, "third": None, "fourth": x}),
        *((OPS["softmax_cross_entropy"], loss | {"reduction": r}) for r in ("mean", "sum", "none")),
    ]
    for op, arguments in calls:
        out, saved = examples.computed(op, arguments)
        arrays = [*(out if op.field else (out,)), *saved]
        shaped = {
            name: SimpleNamespace(shape=a.shape, dtype=a.dtype) if isinstance(a, np.ndarray) else a
            for name, a in arguments.items()
        }
        assert op.result(Call(**shaped)) == [(a.shape, a.dtype) for a in arrays], op.name
    assert {op.name for op, _ in calls} <= set(kp.__all__)


@given(st.data())
def test_any_normalisation(data):
    n, groups, width = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 20))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    row_splits = np.sort(np.r_[0, rng.integers(0, n + 1, data.draw(st.integers(0, 4))), n])
    slope = data.draw(st.sampled_from([None, 0.0, 0.1]))
    x, scale, shift = normalized(rng, n, groups * width)
    got = kp.group_norm(x, groups, scale, shift, row_splits=row_splits, negative_slope=slope)
    moments = group_moments(x, groups, row_splits)
    assert_close(got, normalize(x, scale, shift, *moments, 1e-5, slope), 1e-10, magnitude=np.r_[got.ravel(), 1])


def test_add_of_numbers_that_were_arrays():
    loss = 0.5 * np.array(3.0)  # by NumPy a scalar, no array
    assert_same_bits(kp.add(loss, np.array(2.0)), np.array(3.5))
    assert_same_bits(kp.add(np.array(2.0), loss), np.array(3.5))
    with pytest.raises(TypeError, match="second"):
        kp.add(loss, 2.0)


NO_COLUMNS = """
import numpy as np, kpcore as kp
num = 2**40
none, nothing = np.zeros((num, 0), np.float32), np.zeros(0, np.float32)
square = np.zeros((0, 0), np.float32)
calls = {
    "linear": (kp.linear, none, square, nothing),
    "softmax": (kp.softmax, none),
    "concatenate": (kp.concatenate, none, none),
    "add": (kp.add, none, none),
    "relu": (kp.relu, none),
    "dropout": (lambda f: kp.dropout(f, 0.5, 1), none),
    "batch_norm": (lambda f, s: kp.batch_norm(f, s, s, nothing, nothing).features, none, nothing),
    "group_norm": (lambda f, s: kp.group_norm(f, 1, s, s), none, nothing),
    "columns": (lambda f: f[:, :0], none),
    "segment_reduce": (lambda f: kp.segment_reduce(f, None), none[: 2**31 - 1]),
    "segment maximum": (lambda f: kp.segment_reduce(f, None, "max"), none[: 2**31 - 1]),
    "gather": (lambda f: kp.gather(f, np.arange(9)), none[: 2**31 - 1]),
    "linear without rows": (kp.linear, np.zeros((0, 0)), np.zeros((0, num))),
}
for name, (call, *primals) in calls.items():
    out, pullback = kp.autodiff.vjp(call, *primals)
    grads = pullback(np.empty(out.shape, out.dtype))
    assert [g.shape for g in grads] == [p.shape for p in primals], name
    print(name, flush=True)
"""


def test_rows_without_columns_cost_nothing(python):
    done = python(NO_COLUMNS, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("linear without rows\n"), (done.stdout, done.stderr)
