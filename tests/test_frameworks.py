"""Trains one network definition on the tape, in PyTorch and in JAX, and compares the loss curves."""

import numpy as np
import pytest

import kpcore as kp

STEPS, RATE, EXTENT = 50, 0.1, 0.2


def deformable(F, cloud, features, weights, offset_weights):
    """(output, regularization) of a deformable layer."""
    points, neighbors, kernel_points = cloud
    raw = F.kpconv(points, None, neighbors, features, offset_weights, kernel_points, EXTENT)
    offsets = EXTENT * raw.reshape(-1, 15, 3)
    out = F.kpconv(points, None, neighbors, features, weights, kernel_points, EXTENT, offsets=offsets)
    fitting = F.fitting_loss(points, None, neighbors, kernel_points, offsets, EXTENT)
    return out, F.add(2 * fitting, F.repulsion_loss(kernel_points, offsets, EXTENT))


def loss(F, weights, cloud, norm, features, labels):
    hidden, first = deformable(F, cloud, features, *weights[:2])
    hidden = F.batch_norm(hidden, *norm, negative_slope=0.1).features
    logits, second = deformable(F, cloud, hidden, *weights[2:])
    return F.add(F.softmax_cross_entropy(logits, labels), 0.05 * F.add(first, second))


def by_the_tape(weights, *inputs):
    losses = []
    for _ in range(STEPS):
        value, grads = kp.autodiff.value_and_grad(lambda w: loss(kp, w, *inputs))(weights)
        weights = [w - RATE * g for w, g in zip(weights, grads, strict=True)]
        losses.append(float(value))
    return losses


def by_torch(weights, cloud, norm, features, labels):
    torch = pytest.importorskip("torch")
    weights = [torch.tensor(w, requires_grad=True) for w in weights]
    cloud = torch.tensor(cloud[0]), cloud[1], torch.tensor(cloud[2])
    norm, features, labels = [torch.tensor(n) for n in norm], torch.tensor(features), torch.tensor(labels)
    optimizer, losses = torch.optim.SGD(weights, RATE), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(kp.torch, weights, cloud, norm, features, labels)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def by_jax(weights, *inputs):
    jax, F = pytest.importorskip("jax"), kp.jax
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        step = jax.jit(jax.value_and_grad(lambda w, *inputs: loss(F, w, *inputs)))
        losses = []
        for _ in range(STEPS):
            value, grads = step(weights, *inputs)
            weights = [w - RATE * g for w, g in zip(weights, grads, strict=True)]
            losses.append(float(value))
        return losses
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = kp.get_num_threads()
    kp.set_num_threads(1)  # the network is small, and the frameworks have threads of their own
    yield
    kp.set_num_threads(before)


@pytest.fixture(scope="module")
def case():
    """Random points with random features, labelled by whether they are in a cylinder; only positions tell that."""
    rng = np.random.default_rng(0)
    points, features = rng.random((200, 3)), rng.standard_normal((200, 4))
    labels = (((points[:, :2] - 0.5) ** 2).sum(1) < 0.15).astype(np.int64)
    cloud = points, kp.radius_search(points, None, 0.3), kp.kernel_points(15, 0.2, dtype=np.float64)
    norm = np.ones(8), np.zeros(8), np.zeros(8), np.ones(8)
    weights = [0.03 * rng.standard_normal(shape) for shape in ((15, 4, 8), (15, 4, 45), (15, 8, 2), (15, 8, 45))]
    return weights, cloud, norm, features, labels


@pytest.fixture(scope="module")
def curve(case):
    return by_the_tape(*case)


def test_the_tape_learns(case, curve):
    assert curve[-1] < curve[0] / 4
    rigid = loss(kp, [w * (i % 2 == 0) for i, w in enumerate(case[0])], *case[1:])
    assert abs(rigid - curve[0]) > 1e-3  # the offsets change the loss


@pytest.mark.parametrize("framework", [by_torch, by_jax])
def test_the_curve_of_the_tape(case, curve, framework):
    np.testing.assert_allclose(framework(*case), curve, rtol=1e-8)


# ---- running statistics


def two_passes(F, scale, first, second, running):
    """Two passes in one loss; the second takes the running statistics of the first."""
    shift = 0 * running[0]
    one = F.batch_norm(first, scale, shift, *running)
    two = F.batch_norm(second, scale, shift, one.running_mean, one.running_var)
    return F.add(F.segment_reduce(one.features, None, "sum"), F.segment_reduce(two.features, None, "max")), two


def passes_by_the_tape(scale, *arrays):
    scale = kp.autodiff.Tensor(scale)
    out, last = two_passes(kp, scale, arrays[0], arrays[1], arrays[2:])
    out.backward(np.ones((1, 4), np.float32))
    return scale.grad, last.running_mean, last.running_var


def passes_by_torch(scale, *arrays):
    torch = pytest.importorskip("torch")
    scale, arrays = torch.tensor(scale, requires_grad=True), list(map(torch.tensor, arrays))
    out, last = two_passes(kp.torch, scale, arrays[0], arrays[1], arrays[2:])
    out.sum().backward()
    assert not last.running_mean.requires_grad
    return scale.grad.numpy(), last.running_mean.numpy(), last.running_var.numpy()


def passes_by_jax(scale, *arrays):
    jax = pytest.importorskip("jax")

    def loss(scale):
        out, last = two_passes(kp.jax, scale, arrays[0], arrays[1], arrays[2:])
        return out.sum(), last[1:]

    gradient, statistics = jax.jit(jax.grad(loss, has_aux=True))(scale)
    assert not np.any(jax.grad(lambda scale: sum(map(sum, loss(scale)[1])))(scale))
    return map(np.asarray, (gradient, *statistics))


def passes_by_a_scan(scale, *arrays):
    """The two passes as a `lax.scan` over the clouds."""
    jax = pytest.importorskip("jax")

    def loss(scale):
        def step(running, x):
            out = kp.jax.batch_norm(x, scale, 0 * scale, *running)
            return tuple(out[1:]), (out.features.sum(), out.features.max(0).sum())

        running, (sums, most) = jax.lax.scan(step, arrays[2:], np.stack(arrays[:2]))
        return sums[0] + most[1], running

    gradient, statistics = jax.grad(loss, has_aux=True)(scale)
    return map(np.asarray, (gradient, *statistics))


@pytest.mark.parametrize("framework", [passes_by_the_tape, passes_by_torch, passes_by_jax, passes_by_a_scan])
def test_running_statistics_go_from_one_pass_to_the_next_in_one_loss(framework):
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2, 4).astype(np.float32)
    first, second = rng.normal(2, 3, (2, 9, 4)).astype(np.float32)
    gradient, mean, variance = framework(scale, first, second, np.zeros(4, np.float32), np.ones(4, np.float32))
    momentum, whitened = 0.02, [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (first, second)]
    np.testing.assert_allclose(gradient, whitened[0].sum(0) + whitened[1].max(0), rtol=1e-4)
    expected_mean, expected_variance = 0, 1
    for x in first, second:
        expected_mean = (1 - momentum) * expected_mean + momentum * x.mean(0)
        expected_variance = (1 - momentum) * expected_variance + momentum * x.var(0, ddof=1)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-5)
