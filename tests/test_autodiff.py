"""autodiff: gradients of every operator by central differences, and the behaviour and errors of the tape."""

import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import clouds
import examples
import numpy as np
import ops
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits

import kpcore as kp
from kpcore import ops as ops_table
from kpcore.ops import OPS, Call, Shaped

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


# ---- every operator of the table


def test_every_operator_has_a_call_to_test():
    assert set(ops.CALLS) == set(OPS)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_by_central_differences(variant):
    op, arguments = ops.call(variant)
    for names in (ops.diff(op, arguments), *([name] for name in ops.diff(op, arguments))):
        _, pullback = ops.vjp(op, arguments, names)

        def fn(*values, names=names):
            return ops.vjp(op, {**arguments, **dict(zip(names, values, strict=True))}, names)[0]

        check_vjp(fn, pullback, [arguments[name] for name in names], step=1e-6)


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_only_what_is_needed_is_computed(variant):
    op, arguments = ops.call(variant)
    needs_seen = []
    counting = replace(op, vjp=lambda a, s, g, needs: needs_seen.append(set(needs)) or op.vjp(a, s, g, needs))
    for name in ops.diff(op, arguments):
        needs_seen.clear()
        with_tensor = {**arguments, name: kp.autodiff.Tensor(arguments[name])}
        out = ops.output(op, kp.autodiff.record(counting, with_tensor))
        out.backward(np.ones(out.shape, out.dtype))
        assert needs_seen == [{name}]


DOCS = Path(__file__).parents[1] / "docs"


def test_signatures_are_written_down(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import signatures

    for file in signatures.FRAMEWORKS:
        written = (DOCS.parent / "kpcore" / file).read_text()
        assert written == signatures.text(file), "run python docs/signatures.py"


def test_the_table_in_readme_is_that_of_the_docstrings(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    import readme

    written = (DOCS.parent / "README.md").read_text()
    assert readme.table() in written, "run python docs/readme.py"
    assert readme.written(written) == written


@pytest.mark.parametrize("variant", ops.TRACED)
@pytest.mark.parametrize("dtypes", [(np.float32, np.float32), (np.float64, np.float32), (np.float64, np.float64)])
def test_shapes_are_known_ahead(variant, dtypes):
    op, arguments = ops.call(variant, 24, *dtypes)
    out, saved = examples.computed(op, arguments)
    outputs = (out,) if op.record is None else out
    assert op.record is None or isinstance(out, op.record)
    assert [(a.shape, a.dtype) for a in (*outputs, *saved)] == [
        (tuple(shape), np.dtype(dtype)) for shape, dtype in op.result(Call(**shaped(arguments)))
    ]


def shaped(arguments):
    def of(value):
        if isinstance(value, np.ndarray):
            return Shaped(value.shape, value.dtype)
        if isinstance(value, kp.Neighbors):
            index, row_splits = of(value.index), of(value.row_splits)
            return kp.neighbors.new_list(index, row_splits, value.num_points, None, value.width)
        return value

    return {name: of(value) for name, value in arguments.items()}


@pytest.mark.parametrize("variant", ops.TRACED)
def test_what_kind_each_argument_is(variant):
    op, arguments = ops.call(variant)
    kinds = ops_table.kinds(getattr(kp, op.name))
    assert list(kinds) == list(arguments)
    types = {
        "Array": np.ndarray,
        "Neighbors": kp.Neighbors,
        "float": (float, int),
        "int": int,
        "bool": bool,
        "str": str,
        "int[]": tuple,
        "int or int[]": (int, tuple),
    }
    for name, (kind, optional) in kinds.items():
        assert isinstance(arguments[name], types[kind]) or (arguments[name] is None and optional), name
    assert {name for name in op.diff if kinds[name][0] != "Array"} == set()


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_result_is_a_tensor_to_type_checkers_where_it_is_one(name):
    parameters = inspect.signature(getattr(kp, name)).parameters
    assert {n for n, p in parameters.items() if p.annotation.startswith("Array[Computed]")} == set(OPS[name].diff)


# ---- the tape itself


def product_vjp(call, saved, grad, needs):
    return {name: grad * getattr(call, other) for name, other in (("a", "b"), ("b", "a")) if name in needs}


@kp.autodiff.operator(vjp=product_vjp, diff=("a", "b"), forward=lambda call: (np.array(np.vdot(call.a, call.b)), ()))
def scalar_product(a, b):
    """Σ a b, an operator for these tests whose gradients are known."""
    return Call(a=a, b=b)


PRODUCT = OPS.pop("scalar_product")


def test_backward_adds_to_every_input():
    a, b = kp.autodiff.Tensor(np.arange(3.0)), kp.autodiff.Tensor(np.ones(3))
    out = scalar_product(a, b)
    assert a.grad is None
    out.backward()
    assert_same_bits(a.grad, np.ones(3))
    out.backward(np.array(2.0))
    assert_same_bits(b.grad, 3 * np.arange(3.0))
    scalar_product(a, a).backward()
    assert_same_bits(a.grad, 3 + 2 * np.arange(3.0))


def test_backward_of_a_tensor_that_is_not_a_scalar_needs_a_gradient():
    case = float64_case()
    out = layer(case)(kp.autodiff.Tensor(case.features), case.weights)
    with pytest.raises(ValueError, match="grad"):
        out.backward()
    out.backward(case.grad)


def test_nests_of_primals():
    nest = {"a": np.arange(3.0), "more": [np.ones(3), (np.full(3, 2.0),)]}

    def fn(nest):
        return scalar_product(nest["a"], nest["more"][1][0])

    value, grads = kp.autodiff.value_and_grad(fn)(nest)
    assert value == 6
    assert_same_bits(grads["a"], np.full(3, 2.0))
    assert_same_bits(grads["more"][0], np.zeros(3))
    assert_same_bits(grads["more"][1][0], np.arange(3.0))


def test_grad_of_some_arguments():
    a, b = np.arange(3.0), np.ones(3)
    assert_same_bits(kp.autodiff.grad(scalar_product, argnums=1)(a, b), a)
    both = kp.autodiff.grad(scalar_product, argnums=(1, 0))(a, b)
    assert_same_bits(both[0], a)
    assert_same_bits(both[1], b)
    with pytest.raises(ValueError, match="scalar"):
        case = float64_case()
        kp.autodiff.grad(layer(case))(case.features, case.weights)


def test_has_aux():
    def fn(a):
        return scalar_product(a, a), {"twice": scalar_product(a, np.full(3, 2.0)), "text": "kept"}

    (value, aux), gradient = kp.autodiff.value_and_grad(fn, has_aux=True)(np.ones(3))
    assert (value, aux["twice"], aux["text"]) == (3, 6, "kept")
    assert type(aux["twice"]) is np.ndarray
    assert_same_bits(gradient, np.full(3, 2.0))
    assert kp.autodiff.grad(fn, has_aux=True)(np.ones(3))[1]["text"] == "kept"
    assert kp.autodiff.vjp(fn, np.ones(3), has_aux=True)[2]["text"] == "kept"


def test_a_gradient_inside_a_differentiated_function():
    def outer(a):
        inner = kp.autodiff.grad(lambda b: scalar_product(b, np.full(3, 3.0)))(np.ones(3))
        return scalar_product(a, inner)

    assert_same_bits(kp.autodiff.grad(outer)(np.ones(3)), np.full(3, 3.0))


def test_second_derivatives_are_an_error():
    with pytest.raises(NotImplementedError, match="second derivatives"):
        kp.autodiff.grad(lambda a: kp.autodiff.grad(lambda b: scalar_product(b, b))(a))(np.ones(3))


@pytest.mark.parametrize("primal", [[1.0], 1.0, np.arange(3), None])
def test_what_is_no_primal(primal):
    with pytest.raises(TypeError, match="value"):
        kp.autodiff.vjp(lambda a: scalar_product(a, a), primal)


@pytest.mark.parametrize("gradient", [{}, {"a": None}])
def test_a_missing_gradient_names_operator_and_argument(gradient):
    op = replace(PRODUCT, vjp=lambda *_: gradient)
    with pytest.raises(NotImplementedError, match="a: scalar_product"):
        kp.autodiff.grad(lambda a: kp.autodiff.record(op, {"a": a, "b": np.ones(3)}))(np.ones(3))


@pytest.mark.parametrize("gradient", [np.ones(2), np.ones((3, 1)), np.ones(3, np.float32)])
def test_a_gradient_of_another_shape_or_dtype(gradient):
    op = replace(PRODUCT, vjp=lambda *_: {"a": gradient})
    with pytest.raises(AssertionError, match="a: scalar_product"):
        kp.autodiff.grad(lambda a: kp.autodiff.record(op, {"a": a, "b": np.ones(3)}))(np.ones(3))


def test_an_exception_leaves_nothing_behind():
    a, b = kp.autodiff.Tensor(np.arange(3.0)), kp.autodiff.Tensor(np.ones(3))
    failing = replace(PRODUCT, vjp=lambda *_: {"a": np.ones(3)})
    out = scalar_product(kp.autodiff.record(failing, {"a": a, "b": b}), np.array(1.0))
    with pytest.raises(NotImplementedError, match="b: scalar_product"):
        out.backward()
    assert a.grad is None and b.grad is None
    scalar_product(a, b).backward()
    assert_same_bits(a.grad, np.ones(3))


def test_threads_add_to_one_tensor():
    ones = np.ones(200_000)  # so long that NumPy releases the GIL while it adds
    a = kp.autodiff.Tensor(ones)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: scalar_product(a, ones).backward(), range(200)))
    assert_same_bits(a.grad, np.full(200_000, 200.0))


def test_a_long_chain():
    def fn(a):
        out = scalar_product(a, a)
        for _ in range(5000):
            out = scalar_product(out, np.array(1.0))
        return out

    assert_same_bits(kp.autodiff.grad(fn)(np.ones(3)), np.full(3, 2.0))


# ---- methods of Tensor


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda t: t.reshape(-1, 2, 3), lambda a: a.reshape(-1, 2, 3)),
        (lambda t: t.reshape((3, 8)), lambda a: a.reshape(3, 8)),
        (lambda t: t * 3, lambda a: a * 3),
        (lambda t: np.float64(0.3) * t, lambda a: a * a.dtype.type(0.3)),
        (lambda t: 2 * (t.reshape(24) * -0.5).reshape(2, 12), lambda a: -a.reshape(2, 12)),
    ],
)
def test_other_axes_and_a_factor(fn, expected, dtype):
    a = np.random.default_rng(0).normal(size=(4, 6)).astype(dtype)
    out, pullback = kp.autodiff.vjp(fn, a)
    assert_same_bits(out, expected(a))
    grad = np.random.default_rng(1).normal(size=out.shape).astype(dtype)
    (gradient,) = pullback(grad)
    assert_same_bits(gradient, expected(np.ones_like(a)).flat[0] * grad.reshape(a.shape))
    assert not np.may_share_memory(gradient, grad)
    tensor = kp.autodiff.Tensor(a)
    fn(tensor).backward(grad)
    assert_same_bits(tensor.grad, gradient)


def test_a_factor_of_a_scalar():
    product = lambda a: 0.5 * scalar_product(a, np.ones(3, np.float32))  # noqa: E731
    value, grad = kp.autodiff.value_and_grad(product)(np.ones(3, np.float32))
    assert_same_bits(value, np.array(1.5, np.float32))
    assert_same_bits(grad, np.full(3, 0.5, np.float32))


def test_the_tape_keeps_only_arrays_that_a_gradient_reads():
    first, second, kept = kp.autodiff.Tensor(np.ones((3, 2))), kp.autodiff.Tensor(np.ones((3, 2))), {}

    def watched(name, tensor):
        kept[name] = weakref.ref(tensor.value)
        return tensor

    added = watched("added", kp.add(first, second))
    both = watched("concatenated", kp.concatenate(added, watched("scaled", 2 * first)))
    out = kp.linear(both, np.ones((4, 1)))
    del added, both
    alive = {name for name, reference in kept.items() if reference() is not None}
    assert alive == {"concatenated"}  # the vjp of linear reads its features
    out.backward(np.ones((3, 1)))
    assert_same_bits(first.grad, np.full((3, 2), 3.0))
    assert_same_bits(second.grad, np.ones((3, 2)))


@pytest.mark.parametrize("slope", [0.1, 0.0, -0.5, 2.0, None])
def test_an_activation_is_differentiated_by_its_result(slope):
    special = [0.0, -0.0, np.nan, np.inf, 1e-320, -1e-320, 5e-324, -5e-324]
    x = np.concatenate([np.random.default_rng(0).standard_normal(50), special])
    op, more = (kp.relu, {}) if slope is None else (kp.leaky_relu, {"negative_slope": slope})
    tensor = kp.autodiff.Tensor(x)
    grad = np.arange(1.0, 59.0)
    out = op(tensor, **more)
    assert (out.node.call.features is x) == (slope == -0.5)
    out.backward(grad)
    row = ops_table.OPS["relu" if slope is None else "leaky_relu"]
    call = row.check(x, **more)
    assert_same_bits(tensor.grad, row.vjp(call, (), grad, frozenset(["features"]))["features"])


def test_sums_and_columns_of_tensors():
    rng = np.random.default_rng(0)
    x, y, row = rng.random((5, 4)), rng.random((5, 2)), rng.random(2)

    def loss(x, y, row):
        return kp.linear((x[:, 1:3] + row + y).reshape(1, -1), np.arange(10.0)[:, None]).reshape(())

    value, (of_x, of_y, of_row) = kp.autodiff.value_and_grad(loss, (0, 1, 2))(x, y, row)
    weights = np.arange(10.0).reshape(5, 2)
    np.testing.assert_allclose(value, (weights * (x[:, 1:3] + row + y)).sum())
    assert_same_bits(of_y, weights)
    np.testing.assert_array_equal(of_x, np.hstack([np.zeros((5, 1)), weights, np.zeros((5, 1))]))
    np.testing.assert_allclose(of_row, weights.sum(axis=0))
    both = y + kp.autodiff.Tensor(row.reshape(1, 2).repeat(5, 0)), kp.autodiff.Tensor(np.array(2.0)) + np.float64(3)
    assert_same_bits(both[0].value, y + row)
    assert both[1].value == 5.0
    tensor = kp.autodiff.Tensor(y)
    (tensor + tensor).backward(weights)
    assert_same_bits(tensor.grad, 2 * weights)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda t: t * t, "factor: expected a number, got Tensor"),
        (lambda t: np.ones(3) * t, "factor: expected a number, got ndarray"),
        (lambda t: t * "2", "factor: expected a number, got str"),
        (lambda t: t * np.inf, "factor: expected a finite number"),
        (lambda t: t.reshape(2, 2), "reshape"),
        (lambda t: t + 1, "unsupported operand"),
        (lambda t: "x" + t, "can only concatenate str"),
        (lambda t: t + np.ones(4), r"the second: expected \(3,\)|the second: expected .* got \(4,\)"),
        (lambda t: np.ones(3, np.float32) + t, "the second"),
        (lambda t: t[:, 1], "columns: expected a slice, as in tensor"),
        (lambda t: t[0], "columns: expected a slice, as in tensor"),
        (lambda t: [*t], "columns: expected a slice, as in tensor"),
        (lambda t: t.reshape(1, 1, 3)[:, :, 1:], "columns: expected a slice, as in tensor"),
        (lambda t: t.reshape(1, 3)[0:1, 1:2], "columns: expected a slice, as in tensor"),
        (lambda t: t.reshape(1, 3)[:, ::2], "columns: expected a slice, as in tensor"),
    ],
)
def test_what_a_tensor_does_not_do(wrong, error):
    with pytest.raises((TypeError, ValueError), match=error):
        wrong(kp.autodiff.Tensor(np.ones(3)))
