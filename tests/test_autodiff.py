"""autodiff.vjp: gradients by central differences, and what the tape does with masks, chains and mistakes."""

from dataclasses import replace

import clouds
import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits

import kpcore as kp

INFLUENCES, AGGREGATIONS, NORMALIZATIONS = (
    ["linear", "gaussian", "constant"],
    ["sum", "closest"],
    [None, "count", "positive"],
)


def float64_case(**sizes):
    return clouds.random_case(geometry_type=np.float64, feature_type=np.float64, **sizes)


def layer(case, **options):
    """kpconv as a function of features and weights."""
    neighbors = kp.Neighbors(*case.csr())
    return lambda f, w: kp.kpconv(
        case.points, case.queries, neighbors, f, w, case.kernel_points, case.extent, **options
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("influence", INFLUENCES)
def test_kpconv_by_central_differences(influence, aggregation, normalization):
    case = float64_case()
    fn = layer(case, influence=influence, aggregation=aggregation, normalization=normalization)
    check_vjp(fn, kp.autodiff.vjp(fn, case.features, case.weights)[1], (case.features, case.weights))


ROWS = {
    "zero": lambda row: row[:0],
    "one": lambda row: row[:1],
    "full": lambda row: np.arange(200),
}


@pytest.mark.parametrize("name", ["one", "full"])
def test_neighborhoods_by_central_differences(name):
    case = float64_case()
    case = replace(case, rows=[ROWS[name](row) for row in case.rows], extent=10.0)
    fn = layer(case)
    check_vjp(fn, kp.autodiff.vjp(fn, case.features, case.weights)[1], (case.features, case.weights))


def test_gradients_of_empty_neighborhoods_are_zero():
    case = float64_case()
    case = replace(case, rows=[ROWS["zero"](row) for row in case.rows])
    out, pullback = kp.autodiff.vjp(layer(case), case.features, case.weights)
    assert not out.any() and not any(grad.any() for grad in pullback(case.grad))


def test_a_wrong_gradient_is_caught():
    case = float64_case()
    fn = layer(case)
    _, pullback = kp.autodiff.vjp(fn, case.features, case.weights)
    for factors in (1.001, 1), (1, 1.001):
        with pytest.raises(AssertionError, match="relative error"):
            check_vjp(
                fn,
                lambda g, factors=factors: [grad * factor for grad, factor in zip(pullback(g), factors, strict=True)],
                (case.features, case.weights),
            )


@pytest.mark.parametrize("feature_type", [np.float32, np.float64])
@pytest.mark.parametrize("geometry_type", [np.float32, np.float64])
def test_gradients_have_the_shape_and_dtype_of_their_primals(geometry_type, feature_type):
    case = clouds.random_case(geometry_type=geometry_type, feature_type=feature_type)
    _, pullback = kp.autodiff.vjp(layer(case), case.features, case.weights)
    for grad, primal in zip(pullback(case.grad), (case.features, case.weights), strict=True):
        assert (type(grad), grad.dtype, grad.shape) == (np.ndarray, primal.dtype, primal.shape)


def test_the_output_is_that_of_the_plain_call():
    case = clouds.random_case()
    assert_same_bits(
        kp.autodiff.vjp(layer(case), case.features, case.weights)[0], layer(case)(case.features, case.weights)
    )


def test_one_primal_alone_gets_the_same_gradient():
    case, fn = clouds.random_case(), layer(clouds.random_case())
    grad_features, grad_weights = kp.autodiff.vjp(fn, case.features, case.weights)[1](case.grad)
    (only_features,) = kp.autodiff.vjp(lambda f: fn(f, case.weights), case.features)[1](case.grad)
    (only_weights,) = kp.autodiff.vjp(lambda w: fn(case.features, w), case.weights)[1](case.grad)
    assert_same_bits(only_features, grad_features)
    assert_same_bits(only_weights, grad_weights)


def test_pullback_twice_gives_the_same_and_is_linear():
    case = clouds.random_case()
    _, pullback = kp.autodiff.vjp(layer(case), case.features, case.weights)
    first, again, doubled = pullback(case.grad), pullback(case.grad), pullback(2 * case.grad)
    for a, b, c in zip(first, again, doubled, strict=True):
        assert_same_bits(a, b)
        assert_same_bits(2 * a, c)


def test_a_chain_of_layers_with_shared_weights():
    case = float64_case(num_points=61, cin=5, cout=5)
    case = replace(case, queries=case.points, rows=[np.arange(q % 7, 61, 5) for q in range(61)], extent=0.7)
    conv = layer(case)

    def fn(features, weights):
        return conv(conv(features, weights), weights)

    check_vjp(fn, kp.autodiff.vjp(fn, case.features, case.weights)[1], (case.features, case.weights))


def test_a_primal_used_as_both_arguments_of_a_chain():
    case = float64_case(num_kernel=3, num_points=3, cin=3, cout=3, num_queries=3)
    case = replace(case, rows=[np.arange(3)] * 3, extent=3.0)
    first = layer(replace(case, queries=case.points))
    fn, weights = layer(case), case.weights

    def twice(features):
        return fn(first(features, weights), weights)

    check_vjp(twice, kp.autodiff.vjp(twice, case.features)[1], (case.features,))


def test_a_primal_that_is_not_used_gets_zeros():
    case = clouds.random_case()
    fn = layer(case)
    _, pullback = kp.autodiff.vjp(lambda f, w, unused: fn(f, w), case.features, case.weights, np.ones((2, 3)))
    assert_same_bits(pullback(case.grad)[2], np.zeros((2, 3)))


@pytest.mark.parametrize("argument", ["points", "queries", "kernel_points"])
def test_what_has_no_gradient_says_so(argument):
    case = float64_case()
    arrays = {name: getattr(case, name) for name in ("points", "queries", "features", "weights", "kernel_points")}
    arrays |= {"neighbors": kp.Neighbors(*case.csr()), "extent": case.extent, "weights": case.weights[:, :, 0].copy()}
    arrays["attention"] = np.ones((len(case.queries), len(case.weights), 1))
    with pytest.raises(TypeError, match=argument):
        kp.autodiff.vjp(lambda x: kp.kpconvx(**{**arrays, argument: x}), arrays[argument])


@pytest.mark.parametrize(
    ("grad", "error"),
    [
        (lambda grad: grad[:-1], ValueError),
        (lambda grad: grad[:, :-1], ValueError),
        (lambda grad: grad[0], ValueError),
        (lambda grad: grad.tolist(), TypeError),
        (lambda grad: grad.astype(np.float16), TypeError),
        (lambda grad: grad.astype(np.int32), TypeError),
    ],
)
def test_a_wrong_gradient_of_the_output(grad, error):
    case = clouds.random_case()
    _, pullback = kp.autodiff.vjp(layer(case), case.features, case.weights)
    with pytest.raises(error, match="grad"):
        pullback(grad(case.grad))


@pytest.mark.parametrize(
    "layout", [np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2], lambda a: a[::-1].copy()[::-1]]
)
def test_any_layout_of_the_gradient_of_the_output(layout):
    case = clouds.random_case()
    _, pullback = kp.autodiff.vjp(layer(case), case.features, case.weights)
    other = layout(case.grad)
    other.flags.writeable = False
    for got, expected in zip(pullback(other), pullback(case.grad), strict=True):
        assert_same_bits(got, expected)


def test_float32_gradients_are_the_float64_ones():
    case = clouds.random_case(cin=64, cout=64, num_queries=257)
    as_float64 = clouds.Case(
        **{name: getattr(v, "astype", lambda _, v=v: v)(np.float64) for name, v in vars(case).items()}
    )
    got, expected = (kp.autodiff.vjp(layer(c), c.features, c.weights)[1](c.grad) for c in (case, as_float64))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 2e-5)
