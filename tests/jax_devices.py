"""Cases that test_jax.py runs in a separate process, in which XLA treats the CPU as several devices."""

import json
import traceback

import jax
import numpy as np
import ops
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import kpcore as kp
import kpcore.jax as kpj

DEVICES = 4
CLOUDS = np.random.default_rng(0).standard_normal((DEVICES, 6, 4)).astype(np.float32)
WEIGHTS = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)


def mesh(explicit=False):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((DEVICES,), ("d",), axis_types=(kind,))


def shard_map(fn, in_specs, out_specs, **options):
    return jax.shard_map(fn, mesh=mesh(), in_specs=in_specs, out_specs=out_specs, **options)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def data_parallel(linear, **options):
    """The loss as a function of weights, the same on all devices, and of clouds, one on each device."""

    def loss(weights, clouds):
        return jax.lax.pmean((linear(clouds[0], weights) ** 2).sum(), "d")

    return shard_map(loss, (P(), P("d")), P(), **options)


def gradient_of_weights():
    return sum(2 * x.T @ (x @ WEIGHTS) for x in CLOUDS.astype(np.float64)) / DEVICES


def replicated_weights():
    for options in {}, {"check_vma": False}:
        loss = data_parallel(kpj.linear, **options)
        assert_close(jax.jit(jax.grad(loss))(WEIGHTS, CLOUDS), gradient_of_weights())


def not_jitted():
    loss = data_parallel(kpj.linear)
    assert_close(loss(WEIGHTS, CLOUDS), np.mean([((x @ WEIGHTS) ** 2).sum() for x in CLOUDS]))
    assert_close(jax.grad(loss)(WEIGHTS, CLOUDS), gradient_of_weights())


def every_operator():
    """Compares gradients with the sum of those that the tape computes for each device."""
    for variant in ops.TRACED:
        op, arguments = ops.call(variant, 24, np.float32, np.float32)
        names = ops.diff(op, arguments)
        divided = names[0]
        each = np.stack([(i + 1) * arguments[divided] for i in range(DEVICES)])

        def loss(shared, divided_value, op=op, arguments=arguments, divided=divided):
            out = getattr(kpj, op.name)(**{**arguments, **shared, divided: divided_value[0]})
            return jax.lax.psum((ops.output(op, out) ** 2).sum(), "d")

        shared = {name: arguments[name] for name in names[1:]}
        got, got_each = jax.jit(jax.grad(shard_map(loss, (P(), P("d")), P()), (0, 1)))(shared, each)
        expected = []
        for value in each:
            out, pullback = ops.vjp(op, arguments | {divided: value}, names)
            expected.append(pullback(np.asarray(2 * out, np.float32)))
        assert_close(got_each, np.stack([first for first, *_ in expected]))
        for i, name in enumerate(names[1:], 1):
            assert_close(got[name], sum(grads[i].astype(np.float64) for grads in expected))


def lists_that_differ():
    """A stack of lists of equal size, one for each device; each stays on its device."""
    lists = [kp.knn_search(x, None, 3) for x in CLOUDS]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *lists)

    def local_maximum(x, neighbors):
        return kpj.neighbor_reduce(x[0], jax.tree.map(lambda a: a[0], neighbors), "max")[None]

    got = jax.jit(shard_map(local_maximum, (P("d"), P("d")), P("d")))(CLOUDS, stack)
    for shard, x, neighbors in zip(got.addressable_shards, CLOUDS, lists, strict=True):
        assert np.array_equal(shard.data[0], x[np.asarray(neighbors.index).reshape(-1, 3)].max(1))
    assert len(got.devices()) == DEVICES


def claimed_to_be_the_same():
    """A result that differs between devices is refused where out_specs say that it is the same on all."""
    for wrap in jax.jit, lambda fn: fn:
        try:
            wrap(shard_map(lambda x: kpj.relu(x[0]), P("d"), P()))(CLOUDS)
        except ValueError as error:
            assert "out_specs" in str(error)
        else:
            raise AssertionError("accepted")


def part_of_a_sum():
    def fn(x):
        return kpj.relu(jax.lax.pcast(x[0], "d", to="unreduced"))

    try:
        jax.jit(shard_map(fn, P("d"), P()))(CLOUDS)
    except TypeError as error:
        assert str(error).startswith("features: expected an array, got one that is not summed over devices yet")
    else:
        raise AssertionError("accepted")


def explicit_axes():
    rows = CLOUDS.reshape(-1, 4)
    devices = mesh(explicit=True)
    with jax.set_mesh(devices):
        x = jax.device_put(rows, NamedSharding(devices, P("d", None)))
        for wrap in jax.jit, lambda fn: fn:
            assert_close(wrap(kpj.relu)(x), np.maximum(rows, 0))
            gradient = wrap(jax.grad(lambda x: (kpj.relu(x) ** 2).sum()))(x)
            assert_close(gradient, 2 * np.maximum(rows, 0))
            assert gradient.sharding == x.sharding


def divided_by_jit():
    rows = CLOUDS.reshape(-1, 4)
    x = jax.device_put(rows, NamedSharding(mesh(), P("d", None)))
    assert_close(jax.jit(jax.nn.softmax)(rows), jax.jit(kpj.softmax)(x))
    assert_close(jax.jit(jax.grad(lambda x: (kpj.relu(x) ** 2).sum()))(x), 2 * np.maximum(rows, 0))


def pmap():
    assert_close(jax.pmap(kpj.relu)(CLOUDS), np.maximum(CLOUDS, 0))


def device_of_the_points():
    points = np.random.default_rng(2).random((50, 3)).astype(np.float32)
    there = jax.devices()[2]
    on_device = jax.device_put(points, there)
    sub = kpj.grid_subsample(on_device, 0.3)
    assert {a.devices().pop() for a in jax.tree.leaves(sub)} == {there}
    for level in kpj.build_pyramid(on_device, voxel_size=0.2, num_levels=2):
        assert level.points.devices() == {there}
    assert kpj.kernel_points(15).devices() == {jax.devices()[0]}
    neighbors = jax.device_put(kpj.radius_search(on_device, None, 0.3), there)
    assert kpj.neighbor_reduce(on_device, neighbors).devices() == {there}
    try:
        kpj.grid_subsample(jax.device_put(points[:48], NamedSharding(mesh(), P("d"))), 0.3)
    except TypeError as error:
        assert str(error).startswith("points: grid_subsample is not divided among devices")
    else:
        raise AssertionError("accepted")


CASES = (
    replicated_weights,
    not_jitted,
    every_operator,
    lists_that_differ,
    claimed_to_be_the_same,
    part_of_a_sum,
    explicit_axes,
    divided_by_jit,
    pmap,
    device_of_the_points,
)


def main():
    assert len(jax.devices()) == DEVICES, jax.devices()
    failures = {}
    for case in CASES:
        try:
            case()
        except Exception:
            failures[case.__name__] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
