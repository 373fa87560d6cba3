"""Convolutions of images as functions and the networks of Gao et al. (2020): against formulas, published numbers of
parameters and operations, and between frameworks."""

import dataclasses
import functools

import numpy as np
import pytest
from gradcheck import check_vjp
from reference import assert_close, assert_same_bits

import kpcore as kp
from kpcore import nn
from kpcore.nn import images


def batch(dtype=np.float64, size=(2, 7, 6, 4), seed=0):
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def called(function, *arguments, dtype=np.float64, seed=0, moved=0.0, **options):
    """(output, parameters) of a function of images; the parameters are moved from their initial values at random."""
    params, rng = {}, np.random.default_rng(seed)
    run = nn.Run(kp, params, {}, new={"seed": seed, "dtype": dtype})
    function(run, "a", *arguments, **options)
    for name in params:
        params[name] = params[name] + moved * rng.standard_normal(params[name].shape).astype(dtype)
    return function(nn.Run(kp, params, {}), "a", *arguments, **options), params


def first(array):
    """Channels of (B, H, W, C) first."""
    return None if array is None else np.moveaxis(array, 3, 1)


def plain(x, weight, bias=None, **geometry):
    """A rigid convolution of (B, H, W, C) by its formula."""
    (stride, padding, dilation), groups = (geometry.get(n, d) for n, d in (("stride", 1), ("padding", 0),
                                           ("dilation", 1))), geometry.get("groups", 1)  # fmt: skip
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    outputs, per_group, size = weight.shape[:3]
    height, width = ((n - dilation * (size - 1) - 1) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), height, width, outputs))
    for i in range(outputs):
        start = i // (outputs // groups) * per_group
        for u in range(size):
            for v in range(size):
                rows, columns = (slice(d * dilation, d * dilation + stride * (n - 1) + 1, stride)
                                 for d, n in ((u, height), (v, width)))  # fmt: skip
                out[..., i] += x[:, rows, columns, start : start + per_group] @ weight[i, :, u, v]
    return out if bias is None else out + bias


def averaged(weight):
    """The 3 x 3 kernel that a scope of 4 x 4 has on a centred grid of unit spacing: means of 2 x 2 cells."""
    return (weight[..., :-1, :-1] + weight[..., 1:, :-1] + weight[..., :-1, 1:] + weight[..., 1:, 1:]) / 4


# ---- the convolutions


GEOMETRIES = [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_begin_rigid(geometry):
    x = batch()
    out, params = called(images.conv, x, 6, 3, groups=2, **geometry)
    assert_close(out, plain(x, params["a.weight"], groups=2, **geometry), 1e-12)
    for scope, applied in ((3, lambda weight: weight), (None, averaged)):
        for function in (images.local_deformable_kernel, images.deformable_kernel_conv):
            out, params = called(function, x, 3, scope_size=scope, **geometry)
            assert_close(out, plain(x, applied(params["a.weight"]), groups=4, **geometry), 1e-12)
        out, params = called(images.global_deformable_kernel, x, 5, 3, scope_size=scope, **geometry)
        assert_close(out, plain(x, applied(params["a.weight"]), **geometry), 1e-12)
    out, params = called(images.deformable_conv, x, 5, 3, **geometry)
    assert_close(out, plain(x, params["a.weight"], **geometry), 1e-12)
    out, params = called(images.deformable_conv, x, 5, 3, modulated=True, **geometry)
    assert_close(out, plain(x, params["a.weight"], **geometry) / 2, 1e-12)


def test_scopes_are_one_more_than_the_kernel():
    x = batch()
    shapes = {
        (1, None): (2, 2), (3, None): (4, 4), ((3, 1), None): (4, 2), (3, 9): (9, 9), (3, (5, 4)): (5, 4)
    }  # fmt: skip
    for (kernel_size, scope_size), scope in shapes.items():
        _, params = called(images.global_deformable_kernel, x, 5, kernel_size, scope_size=scope_size, padding=1)
        assert params["a.weight"].shape == (5, 4, *scope)


def generated(params, name, x, **geometry):
    return plain(x, params[f"a.{name}.weight"], params[f"a.{name}.bias"], **geometry)


def linear_of_mean(params, name, x):
    return x.mean((1, 2)) @ params[f"a.{name}.weights"] + params[f"a.{name}.bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("options", [{}, {"offset_groups": 2, "grid": "uniform", "clip": None, "bias": False}], ids=str)
def test_local_offsets_come_from_a_convolution(geometry, options):
    x = batch()
    out, params = called(images.local_deformable_kernel, x, 3, moved=0.3, **geometry, **options)
    offsets = generated(params, "offset_generator", x, **geometry)
    assert offsets.shape[3] == 18 * options.pop("offset_groups", 1)
    options = {name: value for name, value in options.items() if name != "bias"}
    expected = kp.deformable_kernel_conv2d(first(x), params["a.weight"], first(offsets), kernel_size=3, groups=4,
                                           bias=params.get("a.bias"), **geometry, **options)  # fmt: skip
    assert_close(first(out), expected, 1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_global_offsets_come_from_the_mean(geometry):
    x = batch()
    out, params = called(images.global_deformable_kernel, x, 6, 3, groups=2, moved=0.3, **geometry)
    offsets = linear_of_mean(params, "offset_generator", x)
    expected = kp.deformable_kernel_conv2d(first(x), params["a.weight"], offsets, kernel_size=3, groups=2,
                                           bias=params["a.bias"], **geometry)  # fmt: skip
    assert_close(first(out), expected, 1e-12)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_data_offsets_come_from_a_convolution(geometry, modulated):
    x = batch()
    out, params = called(images.deformable_conv, x, 6, 3, data_offset_groups=2, modulated=modulated, moved=0.3,
                         **geometry)  # fmt: skip
    raw = first(generated(params, "data_offset_generator", x, **geometry))
    assert raw.shape[1] == (54 if modulated else 36)
    modulations = sigmoid(raw[:, 36:]) if modulated else None
    expected = kp.deformable_conv2d(first(x), params["a.weight"], raw[:, :36], modulations=modulations,
                                    bias=params["a.bias"], **geometry)  # fmt: skip
    assert_close(first(out), expected, 1e-12)


@pytest.mark.parametrize("modulated", [False, True])
def test_kernel_and_data_offsets_together(modulated):
    x = batch()
    out, params = called(images.deformable_kernel_conv, x, 3, modulated=modulated, padding=1, moved=0.3)
    raw = first(generated(params, "data_offset_generator", x, padding=1))
    expected = kp.deformable_kernel_conv2d(
        first(x), params["a.weight"], first(generated(params, "offset_generator", x, padding=1)), kernel_size=3,
        groups=4, padding=1, data_offsets=raw[:, :18], modulations=sigmoid(raw[:, 18:]) if modulated else None,
        bias=params["a.bias"],
    )  # fmt: skip
    assert_close(first(out), expected, 1e-12)


@pytest.mark.parametrize("kernel_offsets", [None, "local", "global"])
def test_experts_are_mixed_by_the_mean(kernel_offsets):
    x = batch()
    out, params = called(images.conditional_conv, x, 4, 3, experts=3, groups=4, padding=1, moved=0.3,
                         kernel_offsets=kernel_offsets)  # fmt: skip
    mixed = np.einsum("be,e...->b...", sigmoid(linear_of_mean(params, "routing", x)), params["a.weight"])
    for item, weight in enumerate(mixed):
        one, options = first(x[item : item + 1]), {"groups": 4, "padding": 1, "bias": params["a.bias"]}
        if kernel_offsets is None:
            expected = kp.deformable_conv2d(one, weight, None, **options)
        else:
            if kernel_offsets == "local":
                offsets = first(generated(params, "offset_generator", x, padding=1))
            else:
                offsets = linear_of_mean(params, "offset_generator", x)
            expected = kp.deformable_kernel_conv2d(one, weight, offsets[item : item + 1], kernel_size=3, **options)
        assert_close(first(out)[item : item + 1], expected, 1e-12)


def test_initial_values():
    x = batch(size=(1, 5, 5, 8))
    _, params = called(images.conditional_conv, x, 16, 3, groups=2, kernel_offsets="global", scope_size=5,
                       data_offsets="modulated")  # fmt: skip
    zeros = {name for name, value in params.items() if not value.any()}
    assert zeros == {"a.bias", "a.routing.bias"} | {
        f"a.{part}" for part in ("offset_generator.weights", "offset_generator.bias", "data_offset_generator.weight",
                                 "data_offset_generator.bias")
    }  # fmt: skip
    bounds = {"a.weight": 1 / 6, "a.routing.weights": 1 / np.sqrt(8)}  # 4 channels of a group times 9 taps
    for name, bound in bounds.items():
        assert 0.9 * bound < np.abs(params[name]).max() <= bound
    assert {name: value.shape for name, value in params.items() if name not in zeros} == {
        "a.weight": (8, 16, 4, 5, 5), "a.routing.weights": (8, 8)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (images.local_deformable_kernel, (3,), {"padding": 1}),
        (images.global_deformable_kernel, (5, 3), {"padding": 1, "clip": None}),
        (images.deformable_conv, (5, 3), {"padding": 1, "modulated": True}),
        (images.deformable_kernel_conv, (3,), {"padding": 1, "modulated": True, "clip": None}),
        (images.conditional_conv, (5, 3), {"padding": 1, "experts": 3}),
        (images.conditional_conv, (4, 3), {"experts": 3, "groups": 4, "kernel_offsets": "local"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_gradients_reach_generators(function, arguments, options):
    x = batch()
    # Moved, since offsets of zero are at kinks of the interpolation.
    _, params = called(function, x, *arguments, moved=0.05, **options)
    names = [*params]

    def evaluate(x, *values, detach_offsets=False):
        run = nn.Run(kp, dict(zip(names, values, strict=True)), {}, detach_offsets=detach_offsets)
        return function(run, "a", x, *arguments, **options)

    options = {**options}
    primals = (x, *params.values())
    _, pullback = kp.autodiff.vjp(evaluate, *primals)
    grads = dict(zip(names, pullback(np.ones(evaluate(*primals).shape))[1:], strict=True))
    assert all(np.abs(grad).max() > 0 for grad in grads.values())
    check_vjp(evaluate, pullback, primals, step=1e-6, tolerance=1e-5)
    _, pullback = kp.autodiff.vjp(functools.partial(evaluate, detach_offsets=True), *primals)
    grads = dict(zip(names, pullback(np.ones(evaluate(*primals).shape))[1:], strict=True))
    assert {name for name, grad in grads.items() if not grad.any()} == {n for n in names if "offset_generator" in n}


# ---- what else the networks need


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_means_and_maxima(dtype):
    x = batch(dtype, (3, 9, 7, 5))
    run = nn.Run(kp, {}, {})
    assert_close(images.average(run, x), x.mean((1, 2)), 1e-5)
    for size, stride, padding in ((3, 2, 1), (2, 2, 0), (5, 1, 2)):
        padded = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))[:, ::stride, ::stride]
        assert_same_bits(images.max_pool(run, x, size, stride, padding), windows.max((4, 5)))


def test_the_gradient_of_a_maximum_goes_to_one_pixel():
    x = np.zeros((1, 4, 4, 1))
    x[0, 0, 0] = x[0, 3, 3] = 1.0  # corners, which windows over the border contain several times
    run = nn.Run(kp, {}, {})
    out, pullback = kp.autodiff.vjp(lambda x: images.max_pool(run, x, 3, 2, 1), x)
    (grad,) = pullback(np.ones_like(out))
    assert (grad[0, 0, 0], grad[0, 3, 3], grad.sum()) == (1, 1, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: called(images.conv, batch(), 4, 3, kernel_offsets="both"), "kernel_offsets: expected None or 'local'"),
        (lambda: called(images.conv, batch(), 4, 3, data_offsets=True), "data_offsets: expected None or 'plain'"),
        (lambda: called(images.conv, batch(), 4, 3, scope_size=4), "scope_size: expected None without kernel_offsets"),
        (lambda: called(images.conv, batch(), 4, 3, kernel_offsets="global", offset_groups=2),
         "offset_groups: expected 1 without local kernel_offsets, got 2"),
        (lambda: called(images.conv, batch(), 4, 3, data_offset_groups=2), "data_offset_groups: expected 1 without"),
        (lambda: called(images.conditional_conv, batch(), 4, 3, experts=0), "weights: expected sizes of at least 1"),
        (lambda: called(images.conv, batch(), 6, 3, kernel_offsets="local"), "weight: expected .* is depthwise"),
        (lambda: nn.ImageNetwork("basic", [(1, 1, 1, 1)], 8), "block: expected 'bottleneck' or 'inverted', got"),
        (lambda: nn.ImageNetwork("inverted", [(1, 8, 1)], 8), r"stages: expected a sequence of \(inner, width, d"),
        (lambda: nn.ImageNetwork("inverted", [], 8), "stages: expected 1 to 1000 blocks"),
        (lambda: nn.ImageNetwork("inverted", [(1, 8, 1, 0)], 8), "stages: expected at least 1, got 0"),
        (lambda: nn.ImageNetwork("inverted", [(2**10, 8, 1, 1)], 32), "stages: expected at most 16384 channels"),
        (lambda: nn.resnet50_dw(kernel="rigid"), "kernel: expected None or 'local' or 'global', got 'rigid'"),
        (lambda: nn.resnet50_dw(scope=0), "scope: expected 1 to 64, got 0"),
        (lambda: nn.resnet50_dw(pointwise="local"), "pointwise: expected None or 'global', got 'local'"),
        (lambda: nn.multiply_adds(nn.mobilenet_v2(), 0), "height: expected at least 1, got 0"),
        (lambda: nn.mobilenet_v2()(kp, {}, {}, np.zeros((2, 3, 32, 32))), r"x: expected \(B, H, W, 3\), got \(2, 3, 3"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


# ---- networks


RESNET, MOBILENET = nn.resnet50_dw, nn.mobilenet_v2
MOVED = {RESNET: {"data_offsets": "plain", "data_offsets_from": 1},
         MOBILENET: {"data_offsets": "plain", "data_offsets_from": 2}}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "number", "published"),
    [
        (RESNET, {}, 23_682_216, 23.7),
        (RESNET, {"kernel": "local", "scope": 3}, 24_905_928, 24.9),
        (RESNET, {"kernel": "local"}, 24_958_792, 25.0),
        (RESNET, {"kernel": "local", "scope": 5}, 25_026_760, 25.0),
        (RESNET, {"kernel": "local", "scope": 9}, 25_449_672, 25.4),
        (RESNET, {"kernel": "global"}, 23_871_304, 23.9),
        (RESNET, {"kernel": "global", "pointwise": "global"}, 80_068_872, 80.1),
        (RESNET, {"kernel": "local", "pointwise": "global"}, 81_156_360, 81.2),
        (RESNET, {"experts": 2, "pointwise_experts": 2}, 42_525_448, 42.5),
        (RESNET, {"kernel": "local", "pointwise_experts": 2}, 43_718_920, 43.7),
        (RESNET, MOVED[RESNET], 24_843_666, 24.8),
        (RESNET, {"kernel": "local"} | MOVED[RESNET], 26_120_242, 26.1),
        (MOBILENET, {}, 3_504_872, 3.5),
        (MOBILENET, {"kernel": "global"}, 3_683_578, 3.7),
        (MOBILENET, {"kernel": "local"}, 4_711_162, 4.7),
        (MOBILENET, {"kernel": "global", "pointwise": "global"}, 10_074_942, 10.1),
        (MOBILENET, {"kernel": "local", "pointwise": "global"}, 11_102_526, 11.1),
        (MOBILENET, {"experts": 8, "pointwise_experts": 8}, 18_953_760, 19.0),
        (MOBILENET, {"kernel": "local", "pointwise_experts": 8}, 19_653_258, 19.7),
        (MOBILENET, MOVED[MOBILENET], 4_617_092, 4.6),
        (MOBILENET, {"kernel": "local"} | MOVED[MOBILENET], 5_823_382, 5.8),
    ],
    ids=str,
)
def test_the_published_numbers_of_parameters(make, options, number, published):
    params, _ = make(**options).init()
    assert nn.count(params) == number
    assert round(number / 1e6, 1) == published


@pytest.mark.parametrize(
    ("make", "options", "published"),  # differences of tables 1 and 2, whose numbers have two decimals
    [
        (RESNET, {"kernel": "local"}, 4.32 - 3.82), (RESNET, {"kernel": "local", "scope": 9}, 4.32 - 3.82),
        (RESNET, {"kernel": "global"}, 3.82 - 3.82), (RESNET, MOVED[RESNET], 4.10 - 3.82),
        (RESNET, {"kernel": "local"} | MOVED[RESNET], 4.60 - 3.82),
        (MOBILENET, {"kernel": "local"}, 0.73 - 0.31), (MOBILENET, {"kernel": "global"}, 0.31 - 0.31),
        (MOBILENET, MOVED[MOBILENET], 0.52 - 0.31), (MOBILENET, {"kernel": "local"} | MOVED[MOBILENET], 0.93 - 0.31),
    ],
    ids=str,
)  # fmt: skip
def test_the_published_differences_of_multiply_adds(make, options, published):
    more = nn.multiply_adds(make(**options)) - nn.multiply_adds(make())
    assert abs(more / 1e9 - published) < 0.01


def test_multiply_adds_of_rigid_networks():
    # MobileNet-V2: 300.8 M (Sandler et al. 2018 print 300 M). A stem, a depthwise block and the head, by hand.
    assert nn.multiply_adds(nn.mobilenet_v2()) == 300_774_272
    net = nn.ImageNetwork("inverted", [(1, 4, 1, 1)], 8, num_classes=5)
    assert nn.multiply_adds(net, 10, 6) == 5 * 3 * (3 * 9 * 8 + 9 * 8 + 8 * 4) + 4 * 5
    experts = dataclasses.replace(net, experts=3, pointwise_experts=2)
    assert nn.multiply_adds(experts, 10, 6) - nn.multiply_adds(net, 10, 6) == (
        3 * 9 * 8 + 8 * 3 + 2 * 8 * 4 + 8 * 2  # mixtures and routing
    )


def small(block="bottleneck", **options):
    """A network whose second stage has a stride, but the width of the first, so that its shortcut is a special case."""
    stages = [(8, 8, 1, 1), (12, 8, 2, 2)] if block == "bottleneck" else [(1, 8, 1, 1), (3, 8, 2, 2)]
    head = None if block == "bottleneck" else 24
    return nn.ImageNetwork(block, stages, 8, head, num_classes=4, **options)


NETWORKS = [
    small(kernel="local", scope=5, data_offsets="modulated", grid="uniform", clip=None),
    small("inverted", kernel="global", pointwise="global"),
    small("inverted", kernel="local", experts=3, pointwise_experts=2, dropout=0.3),
    small(data_offsets="plain", data_offsets_from=1),
]


def test_options_reach_the_convolutions():
    net = small(kernel="local", data_offsets="plain", pointwise="global")
    params, state = net.init(2)
    params, (x, _) = moved(params, 0.1), labelled()
    logits = net(kp, params, state, x, training=True).logits
    for name, value in {"grid": "uniform", "clip": None}.items():
        other = dataclasses.replace(net, **{name: value})(kp, params, state, x, training=True).logits
        assert np.abs(other - logits).max() > 1e-3, name
    dropped = dataclasses.replace(net, dropout=0.5)
    assert_same_bits(dropped(kp, params, state, x).logits, net(kp, params, state, x).logits)
    first, second = (dropped(kp, params, state, x, training=True, seed=seed).logits for seed in (1, 2))
    assert np.abs(first - second).max() > 1e-3
    for detach in (False, True):
        tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
        logits = net(kp, tensors, state, x, training=True, detach_offsets=detach).logits
        logits.backward(np.float32(np.eye(len(x), 4)))
        constant = {name for name, tensor in tensors.items() if not tensor.grad.any()}
        assert constant == {name for name in params if detach and "offset_generator" in name}


def labelled(dtype=np.float32, num=6):
    rng = np.random.default_rng(0)
    return rng.standard_normal((num, 18, 16, 3)).astype(dtype), rng.integers(0, 4, num)


def moved(params, scale=0.02):
    """Parameters away from the initial zeros of the generators."""
    rng = np.random.default_rng(1)
    return {n: v + scale * rng.standard_normal(v.shape).astype(v.dtype) for n, v in params.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("net", NETWORKS, ids=range(len(NETWORKS)))
def test_a_pass_is_the_same_in_every_framework(net, framework, training):
    module = pytest.importorskip(framework)
    F, place = (kp.torch, module.from_numpy) if framework == "torch" else (kp.jax, module.numpy.asarray)
    params, state = net.init(2)
    params, (x, _) = moved(params), labelled()
    expected = net(kp, params, state, x, training=training, seed=9)
    inputs = ({name: place(value) for name, value in values.items()} for values in (params, state))
    got = net(F, *inputs, place(x), training=training, seed=9)
    np.testing.assert_allclose(np.asarray(got.logits), expected.logits, rtol=1e-4, atol=1e-5)
    assert got.regularization is expected.regularization is None
    for name, value in expected.state.items():
        np.testing.assert_allclose(np.asarray(got.state[name]), value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("net", NETWORKS, ids=range(len(NETWORKS)))
def test_gradients_of_whole_networks(net):
    params, state = net.init(1, np.float64)
    params, (x, labels) = moved(params), labelled(np.float64)
    names = [*params]

    def loss(*values):
        logits = net(kp, dict(zip(names, values, strict=True)), state, x, training=True, seed=3).logits
        return kp.softmax_cross_entropy(logits, labels)

    _, pullback = kp.autodiff.vjp(loss, *params.values())
    # A small step, since ReLUs, maxima and interpolation have kinks close to any point of so many values.
    check_vjp(loss, pullback, [*params.values()], step=1e-8, tolerance=1e-4)


def losses_by_the_tape(net, params, state, x, labels, steps):
    losses, schedule = [], nn.warm_up(nn.cosine(0.1, steps), 2)
    optimizer = nn.sgd(params, momentum=0.9, weight_decay=4e-5, lr_scales={"offset_generator": 0.1})
    for step in range(steps):
        tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
        result = net(kp, tensors, state, x, training=True)
        loss = kp.softmax_cross_entropy(result.logits, labels)
        loss.backward()
        state = result.state
        optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, schedule(step))
        losses.append(float(loss.value))
    return losses, params, state


@pytest.mark.parametrize("net", NETWORKS[:2], ids=["local", "global"])
def test_one_definition_trained_by_the_tape_and_by_torch(net):
    torch = pytest.importorskip("torch")
    start, state = net.init()
    x, labels = labelled()
    expected, after, state_after = losses_by_the_tape(net, {**start}, state, x, labels, 12)
    assert expected[-1] < 0.7 * expected[0]
    start, state = net.init()
    module = kp.torch.ImageNetwork(net, start, state)
    named = dict(module.named_parameters())
    assert {*module.state_dict()} == {*start, *state}
    slow = [parameter for name, parameter in named.items() if "offset_generator" in name]
    others = [parameter for name, parameter in named.items() if "offset_generator" not in name]
    optimizer = torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": others, "lr": 0.1}], momentum=0.9,
                                weight_decay=4e-5)  # fmt: skip
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, nn.warm_up(nn.cosine(1.0, 12), 2))
    pictures, got = torch.from_numpy(x).permute(0, 3, 1, 2), []
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(pictures), torch.from_numpy(labels))
        loss.backward()
        optimizer.step()
        scheduler.step()
        got.append(loss.item())
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    trained, trained_state = module.arrays()
    for name, value in (after | state_after).items():
        np.testing.assert_allclose((trained | trained_state)[name], value, atol=2e-3, err_msg=name)
    for name, value in after.items():
        if "offset_generator.weight" in name:
            assert np.abs(value).max() > 1e-5, name


def test_one_definition_trained_by_the_tape_and_by_jax():
    jax, F, net = pytest.importorskip("jax"), kp.jax, NETWORKS[1]
    params, state = net.init()
    x, labels = labelled()
    expected, _, _ = losses_by_the_tape(net, {n: v.copy() for n, v in params.items()}, state, x, labels, 5)

    def loss(params, state):
        result = net(F, params, state, x, training=True)
        return F.softmax_cross_entropy(result.logits, labels.astype(np.int32)), result.state

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params, state = jax.tree.map(jax.numpy.asarray, (params, state))
    schedule, got = nn.warm_up(nn.cosine(0.1, 5), 2), []
    moments = jax.tree.map(jax.numpy.zeros_like, params)
    for number in range(5):
        (value, state), grads = step(params, state)
        moments = {name: 0.9 * moments[name] + grads[name] + 4e-5 * params[name] for name in params}
        rates = {name: schedule(number) * (0.1 if "offset_generator" in name else 1) for name in params}
        params = {name: value - rates[name] * moments[name] for name, value in params.items()}
        got.append(float(value))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def torchs_conv(torch, params, name, x, **geometry):
    """A convolution of torch with the parameters of a network: "weight", or "weights" of a linear layer."""
    if f"{name}.weights" in params:
        weight = torch.from_numpy(params[f"{name}.weights"].T[:, :, None, None].copy())
    else:
        weight = torch.from_numpy(params[f"{name}.weight"])
    return torch.nn.functional.conv2d(x, weight, **geometry)


def torchs_block(torch, params, name, x, activation, **geometry):
    """A convolution, batch normalisation and activation of torch; the stem and the last layer have no other names."""
    out = torchs_conv(torch, params, f"{name}.conv", x, **geometry)
    scale, shift = (torch.from_numpy(params[f"{name}.norm.{part}"]) for part in ("scale", "shift"))
    return activation(torch.nn.functional.batch_norm(out, None, None, scale, shift, training=True))


@pytest.mark.parametrize("make", [nn.resnet50_dw, nn.mobilenet_v2])
def test_the_architectures_by_torch(make):
    """The logits of the rigid networks against the definitions of He et al. and Sandler et al., written in torch."""
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    net = make(10)
    params, state = net.init(3)
    # Scales of 3, so that values exceed 6, where ReLU and ReLU6 differ.
    params = {name: 3 * value if name.endswith("norm.scale") else value for name, value in params.items()}
    image = np.random.default_rng(0).standard_normal((4, 64, 48, 3)).astype(np.float32)
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    is_resnet = make is nn.resnet50_dw
    act, same = (f.relu if is_resnet else f.relu6), lambda x: x
    x = torchs_block(torch, params, "stem", x, act, stride=2, padding=3 if is_resnet else 1)
    if is_resnet:
        x = f.max_pool2d(x, 3, 2, 1)
    for number, (inner, width, depth, stride) in enumerate(net.stages):
        for place in range(depth):
            name, step = f"stage.{number}.{place}", 1 if place else stride
            out = x
            if is_resnet or inner > 1:
                out = torchs_block(torch, params, f"{name}.first", out, act)
            out = torchs_block(torch, params, f"{name}.depthwise", out, act, stride=step, padding=1,
                               groups=out.shape[1])  # fmt: skip
            out = torchs_block(torch, params, f"{name}.second", out, same)
            if is_resnet:
                shortcut = x if place else torchs_block(torch, params, f"{name}.shortcut", x, same, stride=step)
                x = f.relu(out + shortcut)
            else:
                x = out + x if place else out
            assert x.shape[1] == width
    if not is_resnet:
        x = torchs_block(torch, params, "last", x, act)
    expected = x.mean((2, 3)).numpy() @ params["head.weights"] + params["head.bias"]
    got = net(kp, params, state, image, training=True).logits
    assert_close(got, expected, 2e-4)


@pytest.mark.parametrize("make", [nn.resnet50_dw, nn.mobilenet_v2])
def test_the_networks_in_torch_and_on_the_tape(make):
    torch = pytest.importorskip("torch")
    net = make(10, kernel="local", data_offsets="plain", data_offsets_from=2)
    params, state = net.init()
    params = moved(params, 1e-3)
    image = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
    expected = net(kp, tensors, state, image, training=True).logits.value
    module = kp.torch.ImageNetwork(net, params, state)
    assert_close(module(torch.from_numpy(image).permute(0, 3, 1, 2)).detach().numpy(), expected, 1e-5)
    assert module.eval()(torch.from_numpy(image).permute(0, 3, 1, 2)).shape == (2, 10)


def test_a_torch_module_is_trained_in_one_graph():
    torch, net = pytest.importorskip("torch"), NETWORKS[2]
    x, labels = (torch.from_numpy(array) for array in labelled())
    x = x.permute(0, 3, 1, 2).contiguous()

    def gradients(compiled):
        module = kp.torch.ImageNetwork(net)

        def loss(x):
            return torch.nn.functional.cross_entropy(module(x), labels)

        torch.manual_seed(0)
        value = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(x)
        value.backward()
        return value, [p.grad for p in module.parameters()], dict(module.named_buffers())

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_torch_module_of_images():
    torch = pytest.importorskip("torch")
    net = small(kernel="local")
    module = kp.torch.ImageNetwork(net, seed=5)
    assert "3 features, 4 classes, 2 stages" in repr(module)
    with pytest.raises(ValueError, match=r"^x: expected \(B, 3, H, W\), got \(3, 8, 8\)"):
        module(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"^x: expected \(B, 3, H, W\), got"):
        module(torch.zeros(1, 4, 8, 8))
    again = kp.torch.ImageNetwork(net)
    again.load_state_dict(module.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = module.eval()(x)
        assert torch.equal(again.eval()(x), expected)
        assert torch.equal(module(x.to(memory_format=torch.channels_last)), expected)
