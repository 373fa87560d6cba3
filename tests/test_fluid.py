"""Open3D's layers as functions for all frameworks (`kpcore.nn.blocks`), and the training of docs/fluid.py."""

import functools
from pathlib import Path

import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_same_bits

import kpcore as kp
from kpcore.nn import blocks

DIAMETER = 0.7
EXTENTS = {"number": (), "one": (1,), "of each query": (30,), "of each axis": (1, 3), "of each": (30, 3)}


def vjp_of_torch(fn, *primals):
    torch = pytest.importorskip("torch")
    tensors = [torch.tensor(p, requires_grad=True) for p in primals]
    out = fn(kp.torch, *tensors)
    pullback = functools.partial(torch.autograd.grad, out, tensors)
    return out.detach().numpy(), lambda grad: [g.numpy() for g in pullback(torch.tensor(grad))]


def vjp_of_jax(fn, *primals):
    jax = pytest.importorskip("jax")
    out, pullback = jax.vjp(jax.jit(lambda *arrays: fn(kp.jax, *arrays)), *map(jax.numpy.asarray, primals))
    return np.asarray(out), lambda grad: map(np.asarray, pullback(jax.numpy.asarray(grad)))


each_framework = pytest.mark.parametrize("vjp", [vjp_of_torch, vjp_of_jax])


@pytest.fixture(autouse=True)
def x64():
    """float64 in JAX, if it is installed."""
    try:
        import jax
    except ModuleNotFoundError:
        yield
        return
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def cloud():
    """(points, queries, neighbors): the first query has no neighbours; behind the last pair are numbers of no point."""
    points, queries = np.random.default_rng(0).random((2, 100, 3))
    queries = queries[:30]
    queries[0] += 5
    nb = kp.radius_search(points, queries, DIAMETER / 2)
    return points, queries, kp.Neighbors(np.append(nb.index, np.int32([-7, 1000])), nb.row_splits, 100)


def extents_of(kind):
    return DIAMETER * np.random.default_rng(1).uniform(1, 1.2, EXTENTS[kind])


# ---- distances for window functions


@pytest.mark.parametrize("metric", ["l1", "l2", "linf"])
@pytest.mark.parametrize("kind", EXTENTS)
@each_framework
def test_relative_distances_and_their_gradients(vjp, kind, metric):
    points, queries, nb = cloud()
    extents, pairs = extents_of(kind), nb.num_pairs

    def distances(F, points, queries, extents):
        return blocks.relative_distances(F, (points, queries, nb), extents, metric)[:pairs]

    out, pullback = vjp(distances, points, queries, extents)
    of_query = extents if kind in ("number", "one", "of each axis") else np.repeat(extents, nb.counts, axis=0)
    radii = of_query.reshape(-1, 3 if "axis" in kind or kind == "of each" else 1) / 2
    relative = np.abs(points[nb.index[:pairs]] - np.repeat(queries, nb.counts, axis=0)) / radii
    expected = {"l1": relative.sum(1), "l2": (relative**2).sum(1), "linf": relative.max(1)}[metric]
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    np.testing.assert_allclose(distances(kp, points, queries, extents), expected, rtol=1e-12)
    check_vjp(lambda *primals: distances(kp, *primals), pullback, (points, queries, extents), step=1e-6)


@each_framework
def test_relative_distances_without_queries(vjp):
    points, _, _ = cloud()
    nb = kp.radius_search(points, None, DIAMETER / 2, return_distances=True)

    def distances(F, points):
        return blocks.relative_distances(F, (points, None, nb), DIAMETER)

    out, pullback = vjp(distances, points)
    np.testing.assert_allclose(out, (nb.distance / (DIAMETER / 2)) ** 2, atol=1e-12)
    check_vjp(lambda points: distances(kp, points), pullback, (points,))


def test_float32_positions_give_float32_distances():
    points, queries, nb = cloud()
    where = points.astype(np.float32), queries.astype(np.float32), nb
    assert blocks.relative_distances(kp, where, np.float64(DIAMETER)).dtype == np.float32


@pytest.mark.parametrize("name", ["points", "queries", "extents"])
def test_a_window_of_tensors_of_the_tape_is_an_error(name):
    points, queries, nb = cloud()
    values = {"points": points, "queries": queries, "extents": extents_of("one")}
    values[name] = kp.autodiff.Tensor(values[name])
    with pytest.raises(TypeError, match=f"{name}: expected an array, because the tape"):
        blocks.relative_distances(kp, (values["points"], values["queries"], nb), values["extents"])


# ---- the layers


def window(squared):
    return (1.2 - squared) ** 3


def parameters(layer):
    """The parameters that a layer asks for, all of them drawn at random."""
    run = blocks.Run(kp, {}, {}, new={"seed": 0, "dtype": np.float64})
    layer(run)
    return {name: np.random.default_rng(2).standard_normal(value.shape) for name, value in run.params.items()}


@pytest.mark.parametrize("kind", EXTENTS)
@each_framework
def test_continuous_conv(vjp, kind):
    """The layer is the operator, the linear layer, the bias and the activation; gradients go through the window too."""
    points, _, _ = cloud()
    points = points[:30]
    nb, extents = kp.radius_search(points, None, DIAMETER / 2), extents_of(kind)
    features = np.random.default_rng(3).standard_normal((30, 4))

    def layer(run, points, features, extents):
        return blocks.continuous_conv(
            run, "conv", (points, None, nb), features, 5, (3, 2, 4), extents, window_function=window,
            use_dense_layer_for_center=True, activation=run.F.sigmoid, coordinate_mapping="identity"
        )  # fmt: skip

    params = parameters(lambda run: layer(run, points, features, extents))
    assert {name: value.shape for name, value in params.items()} == {
        "conv.kernel": (3, 2, 4, 4, 5),
        "conv.dense.weight": (4, 5),
        "conv.bias": (5,),
    }

    def on(F, points, features, extents, *values):
        return layer(blocks.Run(F, dict(zip(params, values, strict=True)), {}), points, features, extents)

    primals = points, features, extents, *params.values()
    out, pullback = vjp(on, *primals)
    weights = window(blocks.relative_distances(kp, (points, None, nb), extents))
    conv = kp.continuous_conv(points, None, nb, features, params["conv.kernel"], extents, normalize=True,
                              coordinate_mapping="identity", neighbor_importances=weights)  # fmt: skip
    expected = kp.sigmoid(conv + features @ params["conv.dense.weight"] + params["conv.bias"])
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    check_vjp(lambda *primals: on(kp, *primals), pullback, primals, step=1e-7, tolerance=1e-5)


def test_the_parts_of_a_layer_that_can_be_left_out():
    points, queries, nb = cloud()
    features = np.random.default_rng(3).standard_normal((100, 4))
    run = blocks.Run(kp, {}, {}, new={"seed": 0, "dtype": np.float64})
    out = blocks.continuous_conv(run, "conv", (points, queries, nb), features, 5, (3, 3, 3), DIAMETER, use_bias=False,
                                 normalize=False)  # fmt: skip
    assert list(run.params) == ["conv.kernel"]
    assert 0.04 < np.abs(run.params["conv.kernel"]).max() < 0.05
    assert_same_bits(out, kp.continuous_conv(points, queries, nb, features, run.params["conv.kernel"], DIAMETER))


@each_framework
def test_sparse_conv(vjp):
    """A strided layer and the inverse of it, over one kernel map."""
    coords = np.unique(np.random.default_rng(0).integers(0, 6, (80, 3), np.int32), axis=0)
    m = kp.kernel_map(coords, kernel_size=(3, 2, 3), stride=2, rule="spconv")
    features = np.random.default_rng(3).standard_normal((len(coords), 4))

    def layers(run, m, features):
        hidden = blocks.sparse_conv(run, "down", m, features, 5, activation=run.F.sigmoid, normalize=True)
        return blocks.sparse_conv(run, "up", m.transpose(), hidden, 4, use_bias=False)

    params = parameters(lambda run: layers(run, m, features))
    assert {name: value.shape for name, value in params.items()} == {
        "down.kernel": (3, 2, 3, 4, 5),
        "down.bias": (5,),
        "up.kernel": (3, 2, 3, 5, 4),
    }

    def on(F, features, *values):
        map_of_F = m.converted(pytest.importorskip("torch").from_numpy) if F.__name__ == "kpcore.torch" else m
        return layers(blocks.Run(F, dict(zip(params, values, strict=True)), {}), map_of_F, features)

    primals = features, *params.values()
    out, pullback = vjp(on, *primals)
    down = kp.sparse_conv(m.neighbors, m.kernel_index, features, params["down.kernel"], normalize=True)
    back = m.transpose()
    expected = kp.sparse_conv(back.neighbors, back.kernel_index, kp.sigmoid(down + params["down.bias"]),
                              params["up.kernel"])  # fmt: skip
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
    check_vjp(lambda *primals: on(kp, *primals), pullback, primals)


# ---- a network of three layers


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-4), (np.float64, 1e-12)])
def test_the_same_curve_in_all_frameworks(monkeypatch, dtype, tolerance):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    import fluid

    monkeypatch.setattr(fluid, "DTYPE", dtype)
    monkeypatch.setattr(fluid, "STEPS", 35)
    calls, loss = [], fluid.loss
    monkeypatch.setattr(fluid, "loss", lambda F, *inputs: calls.append(F) or loss(F, *inputs))
    curves = {name: np.array([*training()]) for name, training in fluid.TRAININGS.items()}
    curve = curves.pop("the tape")
    assert len(curve) == 35
    assert curve[-1] < curve[0] / 10
    for name, other in curves.items():
        np.testing.assert_allclose(other, curve, rtol=tolerance, err_msg=name)
    assert calls.count(kp.jax) == 1  # traced once, although every step has other neighbours
