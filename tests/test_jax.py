"""kpcore.jax: every operator under jit, grad and vmap; the other functions outside of these."""

import copy
import ctypes
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import clouds
import numpy as np
import ops
import pytest
from gradcheck import check_vjp
from reference import assert_same_bits

import kpcore as kp

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import jax_devices  # noqa: E402

import kpcore.jax as kpj  # noqa: E402
from kpcore.jax import ffi, operators  # noqa: E402
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
    """The operator as a function of the named arguments and of its Neighbors."""

    def fn(*values):
        return ops.output(op, getattr(kpj, op.name)(**{**arguments, **dict(zip(names, values, strict=True))}))

    return fn


def float_types(x64):
    return [(np.float32, np.float64), (np.float64, np.float64)] if x64 else [(np.float32, np.float32)]


# ---- every operator


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
    operators.decoded.cache_clear()
    given = of_jax(arguments)
    for name in ops.diff(op, arguments):
        asked.clear()
        fn = function(op, given, [name])
        jax.jit(jax.grad(lambda x, fn=fn: fn(x).sum()))(given[name]).block_until_ready()
        assert asked == [{name}]
    operators.decoded.cache_clear()


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("inline", [True, False])
def test_one_trace_differentiated_in_several_ways(inline):
    """In all arguments, in each, and in all again: the needed gradients are not those of the time before."""
    op, arguments = ops.call("fitting_loss-0", 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    traced = jax.jit(function(op, of_jax(arguments), names), inline=inline)
    expected = dict(zip(names, ops.vjp(op, arguments, names)[1](np.ones((), np.float32)), strict=True))
    for wanted in (names, *([name] for name in names), names):

        def fn(*values, wanted=wanted):
            return traced(*[(arguments | dict(zip(wanted, values, strict=True)))[name] for name in names])

        got = jax.vjp(fn, *(arguments[name] for name in wanted))[1](jnp.ones(()))
        for name, gradient in zip(wanted, got, strict=True):
            assert_same_bits(np.asarray(gradient), expected[name])


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_a_list_with_its_transpose(variant, monkeypatch):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    lists = [a for a in arguments.values() if isinstance(a, kp.Neighbors)]
    fn = function(op, of_jax(arguments), names)
    first = jax.grad(lambda *values: fn(*values).sum(), tuple(range(len(names))))(*(arguments[n] for n in names))
    if not lists:
        return
    arguments["neighbors"] = lists[0].with_transpose()
    fn = function(op, of_jax(arguments), names)
    if variant in ("kpconv-0", "kpconvx-0", "neighbor_reduce-0"):  # whose gradients use only the transpose
        monkeypatch.setattr("kpcore.neighbors.transposed", None)
    again = jax.grad(lambda *values: fn(*values).sum(), tuple(range(len(names))))(*(arguments[n] for n in names))
    for a, b in zip(first, again, strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_vmap_over_what_is_differentiable(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    names = ops.diff(op, arguments)
    fn = function(op, of_jax(arguments), names)

    def both(*values):
        out, pullback = jax.vjp(fn, *values)
        return out, pullback(2 * out)

    one = jax.jit(both)
    stacks = [jnp.stack([arguments[name], 2 * arguments[name]]) for name in names]
    # Over all arguments, over every second one, and over the others.
    for mapped in {tuple(i % step == rest for i in range(len(names))) for step, rest in ((1, 0), (2, 0), (2, 1))}:
        if not any(mapped):
            continue
        axes = tuple(0 if m else None for m in mapped)
        values = [s if axis == 0 else s[0] for s, axis in zip(stacks, axes, strict=True)]
        each = [one(*(s[b] if axis == 0 else s for s, axis in zip(values, axes, strict=True))) for b in range(2)]
        over = jax.vmap(both, in_axes=axes)
        expected = [jnp.stack(leaves) for leaves in zip(*map(jax.tree.leaves, each), strict=True)]
        for f in [jax.jit(over), over][: 1 + (variant.endswith("-0") and all(mapped))]:  # without jit: minutes for all
            for a, b in zip(jax.tree.leaves(f(*values)), expected, strict=True):
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
            *([(jnp.asarray(array)[None], Exception)] if ops.has_one_shape(op, name) else []),
            (jnp.asarray(array, jnp.bfloat16), Exception),
            *([] if x64 else [(array.astype(np.float64), TypeError)]),
        ):
            with pytest.raises(error, match=rf"\b{name}\b" if error is TypeError else None):
                jax.block_until_ready(getattr(kpj, op.name)(**of_jax(arguments) | {name: wrong}))
    with pytest.raises(TypeError):
        getattr(kpj, op.name)(**of_jax(arguments), surplus=1)


def said(function, *args):
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args)
    return type(caught.value), str(caught.value).replace("numpy.", "jnp.")


def trace(op, arguments, name):
    """Trace the call as a function of one argument, without running it."""

    def fn(value):
        return getattr(kpj, op.name)(**of_jax(arguments) | {name: value})

    return jax.eval_shape(fn, jnp.asarray(arguments[name]))


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("variant", ops.TRACED)
def test_wrong_dtypes_and_shapes_are_named_while_tracing_as_by_numpy(variant):
    op, arguments = ops.call(variant, 24, np.float32, np.float32)
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray):
            continue
        wrongs = [array.astype(dtype) for dtype in (jnp.bfloat16, np.float16, np.int16, np.uint32, np.complex64)]
        if ops.has_one_shape(op, name):
            wrongs += [array[None], np.array(array.flat[0])]
            wrongs += [np.concatenate([array, array])] if name in ("weights", "scale", "labels", "second") else []
        for wrong in wrongs:
            given = arguments | {name: wrong}
            of_numpy = said(lambda given: getattr(kp, op.name)(**given), given)
            assert said(trace, op, given, name) == of_numpy, (name, wrong.dtype, wrong.shape)


def test_keys_and_wide_integers_are_named(x64):
    with pytest.raises(TypeError, match=r"features: expected an array of numbers, got key<fry>"):
        kpj.relu(jax.random.key(0))
    logits, labels = np.zeros((2, 3), np.float32), np.array([0, 2**32])
    error = Exception if x64 else ValueError  # with x64 the values of labels are checked when the call runs
    with pytest.raises(error, match="labels: expected"):
        jax.block_until_ready(kpj.softmax_cross_entropy(logits, labels))


def test_a_record_and_every_kind_of_argument(monkeypatch):
    monkeypatch.setitem(OPS, "weighted", ops.WEIGHTED)
    weighted = operators.define(ops.WEIGHTED, ops.weighted)
    features = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    neighbors = kp.Neighbors.from_padded(np.array([[0, 1], [1, 2]]), 2)
    for weights, lists in ((None, None), (jnp.ones(3, jnp.float32) * 2, neighbors)):
        scale = -54 if weights is None else -108

        def fn(features, weights=weights, lists=lists):
            return weighted(features, weights, lists, 3, power=2, negate=True, name="text", more=[2, 3])

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
    assert_same_bits(again.stored_transposed.index, neighbors.stored_transposed.index)


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
    many = kp.neighbors.new_list(np.zeros(1, np.int32), np.array([0, 2**31]), 1)
    if x64:
        assert jax.tree.leaves(many)[1].dtype == np.int64
    else:
        with pytest.raises(ValueError, match="neighbors"):
            jax.tree.flatten(many)


def a_list():
    points = np.random.default_rng(0).random((60, 3)).astype(np.float32)
    return kp.radius_search(points, None, 0.3, return_distances=True)


REBUILT = {
    "tree.map": lambda neighbors: jax.tree.map(lambda a: a, neighbors),
    "unflatten": lambda neighbors: jax.tree.unflatten(*jax.tree.flatten(neighbors)[::-1]),
    "device_put": jax.device_put,
    "device_get": lambda neighbors: jax.device_get(jax.device_put(neighbors)),
    "jit": lambda neighbors: jax.jit(lambda neighbors: neighbors)(neighbors),
    "int32": lambda neighbors: jax.tree.map(lambda a: a if a.dtype.kind == "f" else a.astype(np.int32), neighbors),
    "int64": lambda neighbors: jax.tree.map(lambda a: a if a.dtype.kind == "f" else a.astype(np.int64), neighbors),
}
METHODS = {
    "counts": lambda neighbors: neighbors.counts,
    "num_pairs": lambda neighbors: np.array(neighbors.num_pairs),
    "to_padded": lambda neighbors: neighbors.to_padded(),
    "to_sparse": lambda neighbors: neighbors.to_sparse().toarray(),
    "transpose": lambda neighbors: neighbors.transpose().index,
    "distance of the transpose": lambda neighbors: neighbors.transpose().distance,
    "with_transpose": lambda neighbors: neighbors.with_transpose().stored_transposed.row_splits,
    "to": lambda neighbors: neighbors.to("cpu").index,
    "pickle": lambda neighbors: pickle.loads(pickle.dumps(neighbors)).distance,
    "pickled matrix": lambda neighbors: pickle.loads(pickle.dumps(neighbors)).to_padded(),
    "copy": lambda neighbors: copy.copy(neighbors).distance,
    "deepcopy": lambda neighbors: copy.deepcopy(neighbors).distance,
    "neighbor_reduce": lambda neighbors: kp.neighbor_reduce(np.arange(60.0)[:, None], neighbors, "sum"),
    "nearest_upsample": lambda neighbors: kp.nearest_upsample(np.arange(60.0)[:, None], neighbors),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("rebuilt", REBUILT.values(), ids=REBUILT)
def test_methods_of_a_list_that_jax_made(rebuilt, method):
    expected, got = method(a_list()), method(rebuilt(a_list()))
    assert_same_bits(np.asarray(got), np.asarray(expected))


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("rebuilt", REBUILT.values(), ids=REBUILT)
def test_an_operator_on_a_list_that_jax_made(rebuilt, jit):
    features = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)

    def fn(features, neighbors):
        return kpj.neighbor_reduce(features, neighbors, "max")

    expected = np.stack([features[row[row < 60]].max(0) for row in a_list().to_padded()])
    assert_same_bits(np.asarray((jax.jit(fn) if jit else fn)(features, rebuilt(a_list()))), expected)


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("index", lambda a: a + 10**8, "neighbors.index: expected values from 0 to 59"),
        ("index", lambda a: a - 60, "neighbors.index: expected values from 0 to 59"),
        ("row_splits", lambda a: a * 1000, "neighbors.row_splits: expected a last value of at most"),
        ("row_splits", lambda a: a[::-1], "neighbors.row_splits: expected"),
        ("row_splits", lambda a: a.at[3].set(10**6), "neighbors.row_splits: expected values that never decrease"),
        ("row_splits", lambda a: -a, "neighbors.row_splits: expected"),
        ("index", lambda a: a.astype(jnp.float32), r"neighbors.index: expected int32 or int64, got float32"),
        ("row_splits", lambda a: a.astype(jnp.float32), r"neighbors.row_splits: expected int32 or int64, got float32"),
        ("row_splits", lambda a: a[None], r"neighbors.row_splits: expected \(M\+1,\), got \(1, 61\)"),
    ],
)
def test_a_wrong_list_is_refused_in_each_call(part, change, said):
    """The values of a list that is an argument of a compiled program are checked when it runs."""
    neighbors = jax.device_put(a_list())
    parts = {"index": neighbors.index, "row_splits": neighbors.row_splits}
    parts[part] = change(jnp.asarray(parts[part]))
    wrong = kp.neighbors.unchecked_list(*parts.values(), 60)
    features = np.ones((60, 1), np.float32)
    for fn in (
        kpj.neighbor_reduce,
        jax.jit(kpj.neighbor_reduce),
        jax.jit(jax.grad(lambda f, n: kpj.neighbor_reduce(f, n).sum())),
    ):
        with pytest.raises(Exception, match=said):
            jax.block_until_ready(fn(features, wrong))


def test_methods_of_a_traced_list_raise_an_error():
    texts = []

    def fn(neighbors):
        texts.append(repr(neighbors))
        with pytest.raises(TypeError, match=r"neighbors.index: expected an array outside of jit"):
            neighbors.transpose()
        return neighbors.index

    jax.jit(fn)(a_list())
    pairs = a_list().num_pairs
    assert texts == [f"Neighbors(60 points, index ({pairs},), row_splits (61,), not checked yet)"]
    assert repr(jax.eval_shape(lambda neighbors: neighbors, a_list())) == texts[0]
    assert repr(jax.tree.map(lambda a: None, a_list())).startswith("Neighbors(60 points, index None")


def test_whether_a_list_was_trained_with_is_no_part_of_its_structure():
    one, other = a_list(), a_list()
    one.transpose()
    assert jax.tree.structure(one) == jax.tree.structure(other)
    features = np.ones((60, 1), np.float32)
    program = jax.jit(kpj.neighbor_reduce).lower(features, one).compile()
    assert np.array_equal(program(features, other), program(features, one))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), one, other)
    assert stacked.index.shape == (2, one.num_pairs)
    assert jax.tree.structure(one.with_transpose()) != jax.tree.structure(other)
    assert jax.tree.structure(one.with_transpose().with_transpose(False)) == jax.tree.structure(other)


# ---- transforms of JAX


def convolution(num=40):
    """(a function of a list, features and weights; arguments for it)."""
    _, arguments = ops.call("kpconv-0", num, np.float32, np.float32)
    names = "neighbors", "features", "weights"

    def fn(*values):
        return kpj.kpconv(**of_jax(arguments) | dict(zip(names, values, strict=True)))

    return fn, [arguments[name] for name in names]


def by_numpy(neighbors, features, weights):
    return kp.kpconv(**ops.call("kpconv-0", 40, np.float32, np.float32)[1] | {"neighbors": neighbors,
                     "features": np.asarray(features), "weights": np.asarray(weights)})  # fmt: skip


@pytest.mark.parametrize("symbolic", [False, True])
def test_export(symbolic):
    """Sizes may be symbolic; the pytree structure of lists is stored with the program."""
    pytest.importorskip("flatbuffers")
    from jax import export

    fn, (neighbors, features, weights) = convolution()
    traced = jax.jit(lambda given: {"out": fn(given["lists"], given["features"], weights), "lists": given["lists"]})
    given = {"features": features, "lists": neighbors}
    with pytest.raises(ValueError, match="custom calls"):
        export.export(traced)(given)
    pairs = export.symbolic_shape("E")[0] if symbolic else neighbors.num_pairs
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((pairs,) if a is neighbors.index else a.shape, a.dtype), given)
    checks = [export.DisabledSafetyCheck.custom_call("kpcore")]
    text = export.export(traced, disabled_checks=checks)(shapes).serialize(vjp_order=0)
    got = export.deserialize(text).call(given)
    assert_same_bits(np.asarray(got["out"]), by_numpy(neighbors, features, weights))
    assert_same_bits(got["lists"].counts, neighbors.counts)


def test_export_of_a_gradient_and_of_records():
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers")
    points = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    levels = kp.build_pyramid(points, voxel_size=0.2, num_levels=2)
    num, one = len(levels[0].points), np.ones(4, np.float32)
    features = np.random.default_rng(1).normal(size=(num, 4)).astype(np.float32)

    def fn(levels, features):
        normed = kpj.batch_norm(features, one, 0 * one, 0 * one, one)
        return normed, kpj.neighbor_reduce(normed.features, levels[0].pools)

    checks = [export.DisabledSafetyCheck.custom_call("kpcore")]
    program = export.export(jax.jit(fn), disabled_checks=checks)(levels, features)
    program = export.deserialize(program.serialize(vjp_order=1))
    normed, pooled = program.call(levels, features)
    expected = kp.batch_norm(features, one, 0 * one, 0 * one, one)
    assert type(normed) is kp.BatchNormed
    assert_same_bits(np.asarray(normed.features), expected.features)
    assert_same_bits(np.asarray(pooled), kp.neighbor_reduce(expected.features, levels[0].pools))
    gradient = jax.grad(lambda f: (program.call(levels, f)[1] ** 2).sum())(features)
    assert_same_bits(
        np.asarray(gradient), np.asarray(jax.jit(jax.grad(lambda f: (fn(levels, f)[1] ** 2).sum()))(features))
    )


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_remat(policy):
    fn, arguments = convolution()

    def loss(fn):
        return lambda features, weights: (fn(arguments[0], features, weights) ** 2).sum()

    expected = jax.grad(loss(fn), (0, 1))(*arguments[1:])
    for wrap in jax.jit, lambda fn: fn:
        got = wrap(jax.grad(loss(jax.checkpoint(fn, policy=policy)), (0, 1)))(*arguments[1:])
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(np.asarray(a), np.asarray(b))


def test_scan_and_map_over_clouds():
    """Clouds of one size; the leaves of their lists are stacked."""
    rng = np.random.default_rng(0)
    points = rng.random((3, 30, 3)).astype(np.float32)
    lists, features = [kp.knn_search(p, None, 5) for p in points], rng.normal(size=(3, 30, 4)).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *lists)
    expected = np.stack([f[nb.index.reshape(-1, 5)].max(1) for nb, f in zip(lists, features, strict=True)])

    def one(cloud):
        return kpj.neighbor_reduce(cloud[1], cloud[0], "max")

    assert_same_bits(np.asarray(jax.lax.map(one, (stacked, features))), expected)

    def total(scale):
        def step(sum, cloud):
            return sum + (scale * one(cloud)).sum(), None

        return jax.lax.scan(step, jnp.zeros(()), (stacked, features))[0]

    np.testing.assert_allclose(jax.grad(total)(1.0), expected.sum(dtype=np.float64), rtol=1e-4)


def test_an_ensemble_by_vmap_over_parameters():
    fn, (neighbors, features, weights) = convolution()
    ensemble = np.stack([weights, -weights, weights[::-1]])
    got = jax.jit(jax.vmap(fn, in_axes=(None, None, 0)))(neighbors, features, ensemble)
    for out, each in zip(got, ensemble, strict=True):
        assert_same_bits(np.asarray(out), by_numpy(neighbors, features, each))

    def loss(weights):
        return (fn(neighbors, features, weights) ** 2).sum()

    grads = jax.jit(jax.vmap(jax.grad(loss)))(ensemble)
    for gradient, each in zip(grads, ensemble, strict=True):
        assert_same_bits(np.asarray(gradient), np.asarray(jax.grad(loss)(each)))


def test_arguments_may_be_donated():
    """Operators do not write to their arguments, and reuse of donated memory by JAX changes no list."""
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    neighbors = a_list()
    kept, index = features.copy(), neighbors.index.copy()
    given, lists = jax.device_put(features), jax.device_put(neighbors)

    def step(features, neighbors):
        return kpj.relu(features - kpj.neighbor_reduce(features, neighbors)), jax.tree.map(lambda a: a + 1, neighbors)

    got, _ = jax.jit(step, donate_argnums=(0, 1))(given, lists)
    assert_same_bits(np.asarray(got), np.maximum(features - kp.neighbor_reduce(features, neighbors), 0))
    assert_same_bits(features, kept)
    assert_same_bits(neighbors.index, index)


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
def test_a_program_is_kept_on_disk(python, tmp_path):
    code = (
        "import jax, jax.monitoring, numpy as np, kpcore.jax as kpj\n"
        "jax.config.update('jax_compilation_cache_dir', 'cache')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "events = []\n"
        "jax.monitoring.register_event_listener(lambda event, **_: events.append(event))\n"
        "fn = jax.jit(jax.grad(lambda x: (kpj.leaky_relu(x, 0.5) ** 2).sum()))\n"
        "print(fn(np.array([-2, 3], np.float32)), any('cache_hits' in event for event in events))"
    )
    assert [python(code).stdout for _ in range(2)] == ["[-1.  6.] False\n", "[-1.  6.] True\n"]


def test_the_default_dtype(x64):
    """The dtype of arrays that kpcore.jax creates, with float64 on and off."""
    points = jnp.asarray(np.random.default_rng(0).random((50, 3)))
    assert points.dtype == (jnp.float64 if x64 else jnp.float32)
    sub = kpj.grid_subsample(points, 0.3, labels=np.arange(50))
    assert sub.points.dtype == points.dtype
    assert sub.labels.dtype == sub.row_splits.dtype == (jnp.int64 if x64 else jnp.int32)
    assert kpj.kernel_points(15).dtype == jnp.float32


# ---- several devices


@pytest.fixture(scope="module")
def on_four_devices(tmp_path_factory):
    """{case: traceback} of the cases of jax_devices.py that fail, in a process with four devices."""
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "jax_devices.py"],
        cwd=tmp_path_factory.mktemp("devices"),
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={jax_devices.DEVICES}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("x64", [False], indirect=True, ids=["x32"])
@pytest.mark.parametrize("case", [case.__name__ for case in jax_devices.CASES])
def test_several_devices(case, on_four_devices):
    assert case not in on_four_devices, on_four_devices[case]


# ---- how operators are defined and called


def test_an_error_in_the_operator_is_that_of_the_call():
    _, arguments = ops.call("kpconv-0", 24, np.float32, np.float32)
    given = of_jax(arguments) | {"influence": "cubic"}
    with pytest.raises(ValueError, match="influence: expected 'linear' or 'gaussian' or 'constant', got 'cubic'"):
        jax.jit(lambda f: kpj.kpconv(**{**given, "features": f}))(given["features"]).block_until_ready()
    kpj.kpconv(**of_jax(arguments)).block_until_ready()  # a correct call after the error works


@pytest.mark.parametrize("x64", [True], indirect=True, ids=["x64"])
def test_a_wrong_gradient_is_caught(monkeypatch, x64):
    op, _ = ops.call("kpconv-0")
    wrong = replace(op, vjp=lambda *a: {name: g * 1.001 for name, g in op.vjp(*a).items()})
    monkeypatch.setitem(OPS, op.name, wrong)
    operators.decoded.cache_clear()
    with pytest.raises(AssertionError, match="relative error"):
        test_by_central_differences("kpconv-0", x64)
    operators.decoded.cache_clear()


def test_threads_share_a_compiled_function():
    op, arguments = ops.call("kpconv-0", 500, np.float32, np.float32)
    fn = jax.jit(jax.grad(lambda w: (function(op, of_jax(arguments), ["weights"])(w) ** 2).sum()))
    expected = np.asarray(fn(arguments["weights"]))
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: np.asarray(fn(arguments["weights"])), range(40)):
            assert_same_bits(got, expected)


def test_every_name_of_all_exists():
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


# ---- functions that are not traced


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
    for origin in ("published", np.float32([[0.03, -0.1, 0.2]])):
        expected = kp.grid_subsample(points, 0.1, origin=origin)
        passed = origin if isinstance(origin, str) else jnp.asarray(origin)
        assert_same_bits(np.asarray(kpj.grid_subsample(given, 0.1, origin=passed).points), expected.points)
    levels = kpj.build_pyramid(given, voxel_size=0.1, num_levels=3, origin="published")
    expected = kp.build_pyramid(points, voxel_size=0.1, num_levels=3, origin="published")
    assert_same_bits(np.asarray(levels[1].points), expected[1].points)
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


def test_an_accelerator_is_an_error():
    """Calls the handler that XLA would call on an accelerator."""
    handler = ctypes.cast(ffi.handlers["CUDA"], ctypes.c_void_p).value
    jax.ffi.register_ffi_target("kpcore_elsewhere", jax.ffi.pycapsule(handler))
    call = jax.ffi.ffi_call("kpcore_elsewhere", jax.ShapeDtypeStruct((1,), np.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"kpcore.jax computes on the CPU: move its arguments there"):
        jax.block_until_ready(call(np.ones(1, np.float32)))
