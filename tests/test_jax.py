"""kpcore.jax: every operator of the table under jit, grad and vmap; the rest outside of them."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import clouds
import numpy as np
import ops
import pytest
from gradcheck import check_vjp
from reference import assert_same_bits

import kpcore as kp

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import kpcore.jax as kpj  # noqa: E402
from kpcore.ops import OPS  # noqa: E402


@pytest.fixture(autouse=True, params=[True, False], ids=["x64", "x32"])
def x64(request):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", before)


def of_jax(arguments):
    return {name: jnp.asarray(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()}


def function(op, arguments, names):
    """The operator as a function of the named arguments, of a Neighbors, and of nothing else."""

    def fn(*values):
        return ops.output(op, getattr(kpj, op.name)(**{**arguments, **dict(zip(names, values, strict=True))}))

    return fn


def float_types(x64):
    return [(np.float32, np.float64), (np.float64, np.float64)] if x64 else [(np.float32, np.float32)]


# ---- every operator of the table


@pytest.mark.parametrize("num, jit", [(24, True), (24, False), (1, True), (0, True)])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_the_bits_of_the_tape(variant, num, jit, x64):
    for dtypes in float_types(x64):
        op, arguments = ops.call(variant, num, *dtypes)
        names = ops.diff(op, arguments)
        out, pullback = ops.vjp(op, arguments, names)
        given, grad = of_jax(arguments), ops.covector(out)
        traced = [name for name, a in given.items() if isinstance(a, (jax.Array, kp.Neighbors))]
        fn = function(op, given, traced)

        def both(*values, fn=fn, traced=traced, names=names, grad=grad):
            of = dict(zip(traced, values, strict=True))
            out, pullback = jax.vjp(
                lambda *diff: fn(*{**of, **dict(zip(names, diff, strict=True))}.values()), *(of[n] for n in names)
            )
            return out, pullback(jnp.asarray(grad))

        got_out, got = (jax.jit(both) if jit else both)(*(given[name] for name in traced))
        assert_same_bits(np.asarray(got_out), out)
        for g, expected in zip(got, pullback(grad), strict=True):
            assert_same_bits(np.asarray(g), expected)


@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_by_central_differences(variant, x64):
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    fn = jax.jit(function(op, of_jax(arguments), names))
    primals = [arguments[name] for name in names]
    _, pullback = jax.vjp(fn, *map(jnp.asarray, primals))
    check_vjp(lambda *p: np.asarray(fn(*p)), lambda g: map(np.asarray, pullback(jnp.asarray(g))), primals, step=1e-6)


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_only_what_is_needed_is_computed(variant, monkeypatch):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    asked = []
    counting = replace(op, vjp=lambda a, s, g, needs: asked.append(set(needs)) or op.vjp(a, s, g, needs))
    monkeypatch.setitem(OPS, op.name, counting)
    kpj._decoded.cache_clear()
    given = of_jax(arguments)
    for name in ops.diff(op, arguments):
        asked.clear()
        fn = function(op, given, [name])
        jax.jit(jax.grad(lambda x, fn=fn: fn(x).sum()))(given[name]).block_until_ready()
        assert asked == [{name}]
    kpj._decoded.cache_clear()


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_a_list_with_its_transpose(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    lists = [a for a in arguments.values() if isinstance(a, kp.Neighbors)]
    fn = function(op, of_jax(arguments), names)
    first = jax.grad(lambda *values: fn(*values).sum(), tuple(range(len(names))))(*(arguments[n] for n in names))
    for neighbors in lists:
        neighbors.transpose()
    again = jax.grad(lambda *values: fn(*values).sum(), tuple(range(len(names))))(*(arguments[n] for n in names))
    for a, b in zip(first, again, strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_vmap_over_what_is_differentiable(variant, jit):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    fn = function(op, of_jax(arguments), names)

    def grads(*values):
        return jax.grad(lambda *v: (fn(*v) ** 2).sum(), tuple(range(len(names))))(*values)

    stacks = [jnp.stack([arguments[name], 2 * arguments[name], -arguments[name]]) for name in names]
    # All of them; with jit also every second one, shared with the others, and these.
    choices = (lambda i: True, lambda i: i % 2 == 0, lambda i: i % 2 == 1)[: 3 if jit else 1]
    for mapped in {tuple(chosen(i) for i in range(len(names))) for chosen in choices}:
        if not any(mapped):
            continue
        axes = tuple(0 if m else None for m in mapped)
        given = [s if axis == 0 else s[0] for s, axis in zip(stacks, axes, strict=True)]
        for f in (fn, grads):
            over = jax.vmap(f, in_axes=axes)
            got = jax.tree.leaves((jax.jit(over) if jit else over)(*given))
            each = [f(*(s[b] if axis == 0 else s for s, axis in zip(given, axes, strict=True))) for b in range(3)]
            for a, b in zip(got, map(jnp.stack, zip(*map(jax.tree.leaves, each), strict=True)), strict=True):
                assert_same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_second_derivatives_are_an_error(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    name = ops.diff(op, arguments)[0]
    fn = function(op, of_jax(arguments), [name])
    with pytest.raises(NotImplementedError, match=f"{op.name}: second derivatives"):
        jax.grad(lambda x: jax.grad(lambda y: (fn(y) ** 2).sum())(x).sum())(arguments[name])


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_an_argument_without_gradient_says_so(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    for name, array in arguments.items():
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and name not in op.diff:
            with pytest.raises(TypeError, match=f"{name}: {op.name} cannot be differentiated"):
                jax.grad(lambda x, name=name: function(op, of_jax(arguments), [name])(x).sum())(array)


@pytest.mark.parametrize("variant", ops.TRACED)
def test_wrong_arguments_are_named(variant, x64):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray):
            continue
        for wrong, error in (
            (array.tolist(), TypeError),
            *([] if op.name in ops.ANY_SHAPE else [(jnp.asarray(array)[None], Exception)]),
            (jnp.asarray(array, jnp.bfloat16), Exception),
            *([] if x64 else [(array.astype(np.float64), TypeError)]),
        ):
            with pytest.raises(error, match=rf"\b{name}\b" if error is TypeError else None):
                jax.block_until_ready(getattr(kpj, op.name)(**of_jax(arguments) | {name: wrong}))
    with pytest.raises(TypeError):
        getattr(kpj, op.name)(**of_jax(arguments), surplus=1)


def test_a_record_and_every_kind_of_argument(monkeypatch):
    monkeypatch.setitem(OPS, "weighted", ops.WEIGHTED)
    weighted = kpj.define(ops.WEIGHTED, ops.weighted)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    neighbors = kp.Neighbors.from_padded(np.array([[0, 1], [1, 2]]), 2)
    for weights, lists in ((None, None), (jnp.ones(3, jnp.float32) * 2, neighbors)):
        scale = -9 if weights is None else -18

        def fn(features, weights=weights, lists=lists):
            return weighted(features, weights, lists, 3, power=2, negate=True, name="text")

        out = jax.jit(fn)(features)
        assert type(out) is ops.Weighted and out.sums.dtype == jnp.int32
        assert np.allclose(out.features, scale * features)
        gradient = jax.jit(jax.grad(lambda f, fn=fn: (fn(f).features ** 2).sum()))(features)
        assert np.allclose(gradient, 2 * scale**2 * features, rtol=1e-5)
        assert not np.any(jax.grad(lambda f, fn=fn: fn(f).sums.astype(jnp.float32).sum())(features))


# ---- Neighbors


def test_a_list_is_a_pytree():
    neighbors = ops.call("kpconv-0", 24, np.float32, np.float32)[1]["neighbors"].with_transpose()
    leaves, structure = jax.tree.flatten(neighbors)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.num_points, again.width, again.distance) == (neighbors.num_points, neighbors.width, None)
    assert_same_bits(again.index, neighbors.index)
    assert np.array_equal(again.row_splits, neighbors.row_splits)
    assert_same_bits(again._transposed.index, neighbors._transposed.index)


def test_a_list_as_an_argument_of_jit_is_traced_once_for_a_shape():
    traces = []

    @jax.jit
    def fn(neighbors, features):
        traces.append(None)
        return kpj.kpconv(**given, neighbors=neighbors, features=features)

    _, given = ops.call("kpconv-0", 24, np.float32, np.float32)
    neighbors, features = given.pop("neighbors"), given.pop("features")
    other = kp.Neighbors(neighbors.index[::-1].copy(), neighbors.row_splits, neighbors.num_points)
    assert not np.array_equal(np.asarray(fn(neighbors, features)), np.asarray(fn(other, features)))
    assert len(traces) == 1


def test_more_pairs_than_32_bits_need_x64(x64):
    many = kp.Neighbors._trusted(np.zeros(1, np.int32), np.array([0, 2**31]), 1)
    if x64:
        assert jax.tree.leaves(many)[1].dtype == np.int64
    else:
        with pytest.raises(ValueError, match="neighbors"):
            jax.tree.flatten(many)


# ---- what it is made of


def test_an_error_in_the_operator_is_that_of_the_call():
    _, arguments = ops.call("kpconv-0", 24, np.float32, np.float32)
    given = of_jax(arguments) | {"influence": "cubic"}
    with pytest.raises(Exception, match="influence: expected 'linear' or 'gaussian' or 'constant', got 'cubic'"):
        jax.jit(lambda f: kpj.kpconv(**{**given, "features": f}))(given["features"]).block_until_ready()
    kpj.kpconv(**of_jax(arguments)).block_until_ready()  # and the next one works


@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
def test_a_wrong_gradient_is_caught(monkeypatch, x64):
    op, _ = ops.call("kpconv-0")
    wrong = replace(op, vjp=lambda *a: {name: g * 1.001 for name, g in op.vjp(*a).items()})
    monkeypatch.setitem(OPS, op.name, wrong)
    kpj._decoded.cache_clear()
    with pytest.raises(AssertionError, match="relative error"):
        test_by_central_differences("kpconv-0", x64)
    kpj._decoded.cache_clear()


def test_threads_share_a_compiled_function():
    op, arguments = ops.call("kpconv-0", 500, np.float32, np.float32)
    fn = jax.jit(jax.grad(lambda w: (function(op, of_jax(arguments), ["weights"])(w) ** 2).sum()))
    expected = np.asarray(fn(arguments["weights"]))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: np.asarray(fn(arguments["weights"])), range(40)):
            assert_same_bits(got, expected)


def test_all_names_are_there():
    assert [name for name in kpj.__all__ if not hasattr(kpj, name)] == []
    assert set(OPS) <= set(kpj.__all__)


def test_without_jax_one_line_says_what_to_install(python):
    done = python(
        "import sys; sys.modules['jax'] = None\n"
        "import kpcore\n"
        "try: kpcore.jax\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert done.stdout == "kpcore.jax needs JAX: pip install kpcore[jax]\n", done.stderr


# ---- what is not traced


def test_searches_are_those_of_kpcore(x64):
    points, radius = clouds.uniform(300)
    given, splits = jnp.asarray(points), np.array([0, 100, 300])
    expected = kp.radius_search(points, None, radius, points_row_splits=splits)
    got = kpj.radius_search(given, None, radius, points_row_splits=jnp.asarray(splits))
    assert_same_bits(got.index, expected.index)
    for index in kpj.KDTree(given), kpj.GridIndex(given, radius):
        assert_same_bits(index.knn_search(None, 3).index, kp.knn_search(points, None, 3).index)
    sub, expected = kpj.grid_subsample(given, 0.1), kp.grid_subsample(points, 0.1)
    assert_same_bits(np.asarray(sub.points), expected.points)
    assert isinstance(sub.counts, jax.Array) and sub.features is None
    levels = kpj.build_pyramid(given, voxel_size=0.1, num_levels=3)
    assert type(levels) is kp.Pyramid and isinstance(levels[1].points, jax.Array)
    with pytest.raises(TypeError, match="points: radius_search is not traced"):
        jax.jit(lambda p: kpj.radius_search(p, None, radius))(given)


def test_labels_that_32_bits_cannot_hold(x64):
    points, labels = np.zeros((2, 3), np.float32), np.array([2**40, 2**40])
    if x64:
        assert kpj.grid_subsample(points, 1.0, labels=labels).labels.tolist() == [2**40]
    else:
        with pytest.raises(TypeError, match="jax_enable_x64"):
            kpj.grid_subsample(points, 1.0, labels=labels)


def test_an_accelerator_is_refused_in_words():
    """What XLA would call there, called here."""
    handler = ctypes.cast(kpj._handlers["CUDA"], ctypes.c_void_p).value
    jax.ffi.register_ffi_target("kpcore_elsewhere", jax.ffi.pycapsule(handler))
    call = jax.ffi.ffi_call("kpcore_elsewhere", jax.ShapeDtypeStruct((1,), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kpcore.jax computes on the CPU: move what it gets there"):
        jax.block_until_ready(call(np.ones(1, np.float32)))
