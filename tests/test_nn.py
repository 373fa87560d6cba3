"""Networks in every framework; optimizers and schedules against torch."""

import dataclasses
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_same_bits

import kpcore as kp
from kpcore import nn
from kpcore.nn import blocks, checkpoints

PARTS = {"chair": 2, "mug": 1, "table": 2}  # heads of a network with 5 classes


def small(resampled=0, upsample="nearest", **options):
    """A network with 3 levels, the last of them deformable, for features with 2 channels."""
    architecture = nn.architecture(3, 2, deformable=2, resampled=resampled, upsample=upsample)
    return nn.Network(architecture, 2, 5, 0.2, **{"width": 8, "kernel_size": 5} | options)


def descriptor(upsamplings=1, **options):
    """A network with 3 levels whose output is a descriptor of each point on a level, for features with 2 channels."""
    decoder = ["nearest_upsample", "unary"] * (upsamplings - 1) + ["nearest_upsample"]
    architecture = ("simple", "resnetb", "resnetb_strided", "resnetb_strided", *decoder, "last_unary")
    return nn.Network(architecture, 2, 5, 0.2, **{"width": 8, "kernel_size": 5} | options)


def batch(net, dtype=np.float32, seed=0, num=150):
    """(pyramid, features, labels) of two random clouds."""
    rng = np.random.default_rng(seed)
    points = rng.random((2 * num, net.dimension)).astype(dtype)
    labels = rng.integers(0, net.num_classes, 2 * num)
    features = rng.standard_normal((2 * num, net.num_features)).astype(dtype)
    splits = np.array([0, num, 2 * num])
    levels = net.pyramid(points, row_splits=splits, features=features, labels=labels)
    labels = levels[0].labels if net.segments else np.array([1, 2])
    return levels, levels[0].features, labels


def lattice():
    """Points on a lattice, most of which lie on faces of voxels of size 0.03."""
    return (np.random.default_rng(0).integers(0, 16, (800, 3)) * 0.015 - 0.3).astype(np.float32)


def relative(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


# ---- architectures


@pytest.mark.parametrize(
    ("make", "convs", "deformable", "millions"),
    [
        (nn.kpcnn, 2, 0, 14.30), (nn.kpcnn, 2, 5, 15.16), (nn.kpfcnn, 2, 0, 14.08), (nn.kpfcnn, 2, 5, 14.95),
        (nn.kpfcnn, 3, 0, 24.38), (nn.kpfcnn, 3, 5, 25.59),
    ],
)  # fmt: skip
def test_the_published_numbers_of_parameters(make, convs, deformable, millions):
    features, classes = (1, 40) if make is nn.kpcnn else (5, 13)
    params, _ = make(features, classes, 0.03, convs=convs, deformable=deformable).init()
    assert round(nn.count(params) / 1e6, 2) == millions


def parameters_of_kpnext(depths, widths, features, classes, kernel_size, attention_groups):
    """The number of parameters of the published code, where only the first stage of the encoder has no attention."""

    def block(channels, width, attention):
        shared = kernel_size * channels // (attention_groups or 1)
        of_attention = channels * channels + channels + channels * shared + 2 * shared
        conv = kernel_size * channels + 2 * channels + (of_attention if attention and attention_groups else 0)
        shortcut = channels * width + 2 * width if channels != width else 0
        return conv + 4 * channels * channels + 8 * channels + 4 * channels * width + 2 * width + shortcut

    following = [*widths[1:], widths[-1]]
    total = kernel_size * features * widths[0] + 2 * widths[0]
    for level, depth in enumerate(depths):
        total += (depth - 1) * block(widths[level], widths[level], level)
        total += block(widths[level], following[level], level)
    for level, width in enumerate(widths[:-1]):
        total += 2 * following[level] * width + 2 * width + block(width, width, True)
    return total + widths[0] ** 2 + 2 * widths[0] + classes * widths[0] + classes


@pytest.mark.parametrize(
    ("size", "attention", "number"),
    [("S", False, 4_986_733), ("L", False, 7_829_069), ("S", True, 11_442_685), ("L", True, 18_288_909)],
)
def test_the_published_numbers_of_parameters_of_kpnext(size, attention, number):
    net = nn.kpnext(5, 13, 0.04, size=size, attention=attention)
    widths, groups = [64, 96, 128, 192, 256], 4 if attention else None
    assert nn.count(net.init()[0]) == parameters_of_kpnext(net.depths, widths, 5, 13, 43, groups) == number


def test_architectures():
    paper = nn.architecture(5, 2, deformable=5, segment=False)
    assert paper == (
        "simple", "resnetb", "resnetb_strided", "resnetb", "resnetb_strided",
        "resnetb_deformable", "resnetb_deformable_strided", "resnetb_deformable", "resnetb_deformable_strided",
        "resnetb_deformable", "global_average",
    )  # fmt: skip
    net = nn.Network(paper, 1, 40, 0.02)
    assert (net.num_levels, net.deform_levels, net.segments) == (5, (2, 3, 4), False)
    assert nn.architecture(1) == ("simple", "resnetb")
    assert nn.architecture(2, 2, deformable=1, resampled=2, segment=False)[2:] == (
        "resnetb_resampled_strided", "resnetb_deformable_resampled", "global_average",
    )  # fmt: skip
    assert nn.architecture(5)[-8:] == ("nearest_upsample", "unary") * 4
    assert nn.architecture(3, upsample="kpconv")[-4:] == ("kpconv_upsample", "unary") * 2
    with pytest.raises(ValueError, match="upsample: expected 'nearest' without segment, as nothing is upsampled, got"):
        nn.architecture(3, segment=False, upsample="kpconv")
    with pytest.raises(ValueError, match="upsample: expected 'nearest' or 'kpconv', got 'linear'"):
        nn.architecture(3, upsample="linear")


@pytest.mark.parametrize(
    ("blocks_of", "message"),
    [
        (["simple", "resnet"], "architecture: expected a block of the published networks, got 'resnet'"),
        (["simple_strided"], "nearest_upsample until level 0"),
        (["simple", "nearest_upsample"], "expected no nearest_upsample on level 0, got one in block 1"),
        (["simple", "kpconv_upsample"], "expected no kpconv_upsample on level 0, got one in block 1"),
        (["simple", "global_average", "unary"], "global_average only at the end, got it in block 1"),
        (["simple", "last_unary", "unary"], "last_unary only at the end, got it in block 1"),
        (["simple_strided", "nearest_upsample", "simple"], "after the first upsampling, got 'simple'"),
        ([], "architecture"),
    ],
)
def test_wrong_architectures(blocks_of, message):
    with pytest.raises(ValueError, match=message):
        nn.Network(blocks_of, 1, 2, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "width: expected a multiple of 4, got 30"),
        ({"norm": "layer"}, "norm: expected"),
        ({"dimension": 4}, "dimension"),
        ({"voxel_size": 0.0}, "voxel_size"),
        ({"num_classes": 0}, "num_classes"),
        ({"deform_radius": 0.0}, "deform_radius"),
        ({"momentum": 2.0}, "momentum: expected 0 to 1, got 2"),
        ({"dropout": -0.1}, "dropout: expected 0 to 1, got -0.1"),
        ({"architecture": ("simple", "global_average"), "norm": "instance", "head_norm": True}, "norm: expected one"),
        (
            {"architecture": ("simple", "global_average"), "norm": "group", "head_norm": True, "head_width": 32},
            "norm: expected one with several channels in each group",
        ),
        (
            {"architecture": nn.architecture(2, upsample="kpconv"), "decoder_width": 1},
            "decoder_width: expected at least 2 with kpconv_upsample, got 1",
        ),
        ({"heads": {"chair": 2, "mug": 4}}, "num_classes: expected 6, the parts of all heads, got 2"),
        ({"heads": {"chair": 2, "mug": 0}}, r"heads\['mug'\]: expected at least 1, got 0"),
        (
            {"heads": {"chair": 5}, "architecture": ("simple", "global_average")},
            r"heads: expected None for a network that ends with global_average, which labels no points, got {'chair'",
        ),
        ({"head_width": 0}, "head_width: expected at least 1, got 0"),
        ({"decoder_width": [4]}, "decoder_width: expected 0 numbers, one for each level but the last, got 1"),
        (
            {"architecture": nn.architecture(3, upsample="kpconv"), "decoder_width": (4, 1)},
            "decoder_width: expected at least 2 with kpconv_upsample, got 1",
        ),
        ({"architecture": nn.architecture(3), "decoder_width": (0, 3)}, "decoder_width: expected at least 1, got 0"),
        ({"architecture": nn.architecture(3), "decoder_width": (3, 2**15)}, "decoder_width: expected at most 16384"),
        ({"bottleneck_width": 3}, "bottleneck_width: expected None for an architecture without upsampling, got 3"),
        ({"architecture": nn.architecture(2), "bottleneck_width": 0}, "bottleneck_width: expected at least 1, got 0"),
        ({"logits_slope": 2.0}, "logits_slope: expected -1 to 1, got 2.0"),
        ({"heads": {"chair": 2}, "logits_slope": 0.1}, "logits_slope: expected None with heads, got 0.1"),
        ({"architecture": ("simple", "last_unary"), "dropout": 0.5}, "dropout: expected none with last_unary, .* 0.5"),
        ({"architecture": ("simple", "last_unary"), "head_width": 8}, "head_width: expected none with last_unary"),
        ({"architecture": ("simple", "last_unary"), "heads": {"a": 2}}, "heads: expected none with last_unary"),
        ({"decoder_width": -3}, "decoder_width: expected at least 1, got -3"),
        ({"fitting_power": -1.0}, "fitting_power: expected 0 to 1000000, got -1.0"),
        ({"repulse_extent": 0}, "repulse_extent: expected 1e-06 to 100, got"),
        ({"slope": math.inf}, "slope: expected -1 to 1, got"),
        ({"pool_pad_value": math.nan}, "pool_pad_value: expected -1000000000 to 1000000000, got"),
        ({"influence": "square"}, "influence: expected 'linear' or"),
        ({"aggregation": "mean"}, "aggregation: expected 'sum' or"),
        ({"normalization": "sum"}, "normalization: expected None or"),
        ({"origin": 0.1}, "origin: expected 0 or 'published', got 0.1"),
    ],
)
def test_wrong_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        nn.Network(**{"architecture": ("simple",), "num_features": 1, "num_classes": 2, "voxel_size": 0.1} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_width": 2.5}, "decoder_width: expected an integer, got float"),
        ({"fitting_power": "x"}, "fitting_power: expected a number, got str"),
        ({"head_norm": 1}, "head_norm: expected True or False, got int"),
        ({"learn_kernel_points": 1}, "learn_kernel_points: expected True or False, got int"),
        ({"bias": 1}, "bias: expected True or False, got int"),
        ({"norm_together": None}, "norm_together: expected True or False, got NoneType"),
        ({"decoder_width": [2.5, 3], "architecture": nn.architecture(3)}, "decoder_width: expected an integer, got"),
        ({"heads": ["chair"]}, r"heads: expected a dict of the number of parts by category, got \['chair'\]"),
        ({"heads": {"chair": 2.5}}, r"heads\['chair'\]: expected an integer, got float"),
    ],
)
def test_types_that_no_network_takes(options, message):
    with pytest.raises(TypeError, match=message):
        nn.Network(**{"architecture": ("simple",), "num_features": 1, "num_classes": 2, "voxel_size": 0.1} | options)


def test_points_and_features_of_other_shapes():
    flat = np.zeros((5, 2), np.float32)
    for net in (small(), nn.KPNeXt((1, 1), 2, 3, 0.2, None, width=16)):
        with pytest.raises(ValueError, match=r"points: expected \(N, 3\) for the network, got \(5, 2\)"):
            net.pyramid(flat)
        with pytest.raises(TypeError, match="points"):
            net.pyramid([[0.0, 0.0, 0.0]])
        params, state = net.init()
        pyramid, features, _ = batch(net)
        with pytest.raises(ValueError, match=r"features: expected \(N, 2\), got \(\d+,\)"):
            net(kp, params, state, pyramid, features[:, 0])
        other = kp.build_pyramid(flat, voxel_size=0.2, num_levels=net.num_levels)
        with pytest.raises(ValueError, match=r"points: expected \(N, 3\) for the network, got"):
            net(kp, params, state, other, features)


# ---- parameters


def test_initial_values_come_from_the_seed_and_the_name():
    params, state = small().init(3)
    again, same = small().init(3)
    for one, other in ((params, again), (state, same)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_same_bits(value, other[name])
            assert value.dtype == np.float32 and value.flags.c_contiguous
    deeper, _ = nn.Network(nn.architecture(3, 3), 2, 5, 0.2, width=8, kernel_size=5).init(3)
    assert_same_bits(params["encoder.1.unary1.weights"], deeper["encoder.1.unary1.weights"])
    other, _ = small().init(4)
    assert not (params["encoder.0.conv.weights"] == other["encoder.0.conv.weights"]).any()
    double, _ = small().init(3, np.float64)
    np.testing.assert_array_equal(double["head.1.weights"].astype(np.float32), params["head.1.weights"])
    with pytest.raises(TypeError, match="dtype: expected float32 or float64, got float16"):
        small().init(0, np.float16)


def test_initial_values_are_those_published():
    params, state = small().init()
    for name, value in params.items():
        leaf = name.rpartition(".")[2]
        if leaf == "weights":  # of a convolution torch takes all but the first axis for a fan-in
            fan_in = value[0].size if value.ndim == 3 else len(value)
            assert np.abs(value).max() <= 1 / math.sqrt(fan_in) + 1e-7
            assert value.size < 100 or np.abs(value).max() > 0.95 / math.sqrt(fan_in)
        else:
            assert (value == (1 if leaf == "scale" else 0)).all(), name
    kernels = {name: value for name, value in state.items() if name.endswith("kernel_points")}
    assert len(kernels) == 6 + 2
    for name, value in kernels.items():
        level = {"0": 0, "1": 0, "2": 0, "3": 1, "4": 1, "5": 2}[name.split(".")[1]]
        radius = np.linalg.norm(value[1:], axis=1).mean()
        np.testing.assert_allclose(radius, 0.66 * 2.5 * 0.2 * 2**level, rtol=1e-6)
    one, other = kernels["encoder.0.conv.kernel_points"], kernels["encoder.1.conv.kernel_points"]
    np.testing.assert_allclose(one[:, 2], other[:, 2], atol=1e-6)  # the rotation is about the last axis
    assert np.abs(one - other).max() > 1e-2


def test_a_parameter_that_is_missing_or_of_another_shape():
    net = small()
    params, state = net.init()
    pyramid, features, _ = batch(net)
    without = {name: value for name, value in params.items() if name != "encoder.3.unary1.weights"}
    with pytest.raises(ValueError, match=r"params: expected encoder.3.unary1.weights \(8, 4\), .* got none"):
        net(kp, without, state, pyramid, features)
    with pytest.raises(ValueError, match=r"state: expected encoder.0.norm.mean \(4,\), got \(5,\)"):
        net(kp, params, state | {"encoder.0.norm.mean": np.zeros(5, np.float32)}, pyramid, features)
    with pytest.raises(ValueError, match="pyramid: expected 3 levels for the architecture, got 2"):
        net(kp, params, state, pyramid[:2], features)
    with pytest.raises(ValueError, match=r"features: expected \(N, 2\), got"):
        net(kp, params, state, pyramid, features[:, :1])


# ---- gradients


def differences(loss, params, way, step=1e-7):
    """The directional derivative of a loss, by differences, along a dict like the parameters."""
    there, back = (
        float(loss({name: kp.autodiff.Tensor(v + s * way[name]) for name, v in params.items()}).value)
        for s in (step, -step)
    )
    return (there - back) / (2 * step)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"norm": "group", "norm_groups": 2}, {"norm": "instance"}, {"norm": None}, {"modulated": True},
        {"influence": "gaussian", "normalization": "count"}, {"head_norm": True, "always_narrow": True, "slope": 0.2},
        {"dimension": 2, "dropout": 0.3}, {"pool_pad_value": 0.0}, {"resampled": 6},
        {"upsample": "kpconv"}, {"learn_kernel_points": True, "resampled": 3, "modulated": True},
        {"bias": True, "norm": "group", "norm_groups": 1, "norm_together": True, "logits_slope": 0.1},
        {"norm": "instance", "norm_affine": False, "norm_together": True, "decoder_width": (6, 5)},
    ],
    ids=str,
)  # fmt: skip
def test_gradients_of_whole_networks(options):
    net = small(repulse_extent=1e-3, **options)  # the gradient of the repulsion is half its derivative, as published
    params, state = net.init(1, np.float64)
    pyramid, features, labels = batch(net, np.float64)
    # Parameters are moved away from the initial zeros and ones, at which many gradients are zero.
    rng = np.random.default_rng(5)
    params = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in params.items()}

    def loss(params):
        result = net(kp, params, state, pyramid, features, training=True, seed=3)
        return kp.softmax_cross_entropy(result.logits, labels) + 0.01 * result.regularization

    value, grads = kp.autodiff.value_and_grad(loss)(params)
    assert value.shape == ()
    way = {name: rng.standard_normal(v.shape) * (np.abs(grads[name]).max() > 1e-9) for name, v in params.items()}
    along = sum((grads[name] * way[name]).sum() for name in params)
    np.testing.assert_allclose(differences(loss, params, way), along, rtol=1e-4)
    assert sum(np.abs(g).max() > 0 for g in grads.values()) > 0.9 * len(grads)


@pytest.mark.parametrize(
    "net",
    [
        small(norm="instance"), small(norm="group", norm_groups=4), small(norm=None),
        small(upsample="kpconv", norm="instance"),
        nn.kpcnn(2, 5, 0.2, convs=2, levels=3, width=8, norm="group", norm_groups=4),
        nn.kpcnn(2, 5, 0.2, levels=3, width=8, norm="instance"),
        nn.KPNeXt((1, 1), 2, 5, 0.2, None, width=16, norm="group", norm_groups=4),
        nn.KPNeXt((1, 1), 2, 5, 0.2, 4, False, width=16, norm="group", norm_groups=4, attention_norm=False),
    ],
    ids=lambda net: f"{type(net).__name__} {net.norm} {net.segments}",
)  # fmt: skip
def test_other_norms_look_at_each_item_alone(net):
    params, state = net.init()
    assert not any(name.endswith(("mean", "variance")) for name in state)
    params = {name: value + np.float32(0.1) for name, value in params.items()}  # because shifts are zero initially
    one, other = (batch(net, seed=seed, num=100)[0][0].points[:100] for seed in (1, 2))
    features = np.random.default_rng(0).standard_normal((len(one) + len(other), 2)).astype(np.float32)
    both = net.pyramid(
        np.concatenate([one, other]), row_splits=np.array([0, len(one), len(one) + len(other)]), subsampled=True
    )
    logits = net(kp, params, state, both, features).logits
    alone = net(kp, params, state, net.pyramid(one, subsampled=True), features[: len(one)]).logits
    assert relative(logits[: len(alone)], alone) < 1e-5
    assert np.ptp(logits, axis=0).max() > 1e-3


def test_norms_of_all_items_together():
    nets = [small(norm=norm, norm_together=True, norm_groups=4) for norm in ("group", "instance")]
    for net in nets:
        alone = dataclasses.replace(net, norm_together=False)
        assert (net.reach, alone.reach) == (None, math.inf)
        params, state = net.init()
        pyramid, features, _ = batch(net)
        whole = [level._replace(row_splits=level.row_splits[[0, -1]]) for level in pyramid]
        got, split = (one(kp, params, state, pyramid, features).logits for one in (net, alone))
        assert_same_bits(got, alone(kp, params, state, whole, features).logits)
        assert np.abs(got - split).max() > 1e-3


def test_scales_and_shifts_that_are_constants():
    net = small(norm="instance", norm_affine=False)
    params, state = net.init()
    assert not any("norm" in name for name in params)
    constants = {name: value for name, value in state.items() if "norm" in name}
    assert len(constants) == 2 * sum(name.endswith("shift") for name in state) > 0
    assert all((value == name.endswith("scale")).all() for name, value in constants.items())
    pyramid, features, _ = batch(net)
    result = net(kp, params, state, pyramid, features, training=True)
    learning = dataclasses.replace(net, norm_affine=True)
    assert_same_bits(result.logits, learning(kp, params | constants, state, pyramid, features, training=True).logits)
    assert result.state.keys() == state.keys()


def test_networks_whose_output_is_a_descriptor():
    for upsamplings in (1, 2):
        net = descriptor(upsamplings, bias=True)
        level = 2 - upsamplings
        assert (net.output_level, net.segments, net.num_levels) == (level, True, 3)
        params, state = net.init()
        assert not any(name.startswith("head") for name in params)
        assert params[f"decoder.{2 * upsamplings - 1}.bias"].shape == (5,)
        pyramid, features, _ = batch(net)
        assert net(kp, params, state, pyramid, features).logits.shape == (len(pyramid[level].points), 5)
    assert small().output_level == nn.kpcnn(1, 4, 0.1).output_level == 0
    assert "decoder.1.bias" not in descriptor().init()[0]


@pytest.mark.parametrize("framework", ["kpcore", "torch", "jax"])
def test_a_function_between_encoder_and_decoder(framework):
    net = descriptor(2, bottleneck_width=7, decoder_width=(6, 5), norm=None)
    assert net.reach is None
    params, state = net.init(1)
    assert params["decoder.1.weights"].shape == (7 + 8, 5)
    pyramid, features, _ = batch(net)
    weights = np.random.default_rng(0).standard_normal((16, 7)).astype(np.float32)
    seen = {}

    def between(x):
        seen["encoder"] = x
        return kp.linear(x, weights)

    def observe(name, level, out):
        seen[name] = level, out

    result = net(kp, params, state, pyramid, features, between=between, observe=observe)
    assert seen["encoder"] is seen["encoder.3"][1]
    assert [seen[f"decoder.{number}"][0] for number in range(4)] == [1, 1, 0, 0]
    assert seen["decoder.3"][1] is result.logits
    for wrong, message in (
        (None, r"between: expected a function that returns 7 columns, got None"),
        (lambda x: x, r"between: expected a result of shape \(\d+, 7\), got \(\d+, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net(kp, params, state, pyramid, features, between=wrong)
    with pytest.raises(ValueError, match="between: expected None without bottleneck_width, got <function"):
        small()(kp, *small().init(), pyramid, features, between=between)
    if framework == "torch":
        torch = pytest.importorskip("torch")
        module = kp.torch.Network(net, params, state)
        levels = net.pyramid(torch.from_numpy(pyramid[0].points), row_splits=torch.from_numpy(pyramid[0].row_splits),
                             subsampled=True, F=kp.torch)  # fmt: skip
        layer = torch.nn.Linear(16, 7, bias=False)
        layer.weight.data[...] = torch.from_numpy(weights.T.copy())
        out, _ = module(levels, torch.from_numpy(features), between=layer, observe=observe)
        assert seen["decoder.3"][1] is out
        np.testing.assert_allclose(out.detach().numpy(), result.logits, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        assert all(p.grad.abs().max() > 0 for p in (layer.weight, module.encoder.get_submodule("0.conv").weights))
    if framework == "jax":
        jax, F = pytest.importorskip("jax"), kp.jax

        def logits(weights, *inputs):
            return net(F, *inputs, between=lambda x: x @ weights).logits

        inputs = jax.tree.map(jax.numpy.asarray, (weights, params, state, pyramid, features))
        np.testing.assert_allclose(jax.jit(logits)(*inputs), result.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "net", [small(norm=None, dropout=0.5), nn.KPNeXt((1, 1), 2, 5, 0.2, None, width=16, norm=None, dropout=0.5)],
    ids=["Network", "KPNeXt"],
)  # fmt: skip
def test_dropout_is_before_the_logits_in_training(net):
    params, state = net.init()
    # The input of the last layer is ones and its output their sum: each logit is twice the number of kept values.
    params["head.0.bias" if "head.0.bias" in params else "head.0.norm.shift"][...] = 1
    params["head.0.weights"][...] = 0
    params["head.1.weights"][...] = 1 / len(params["head.1.weights"])
    pyramid, features, _ = batch(net)

    def logits(**more):
        return net(kp, params, state, pyramid, features, **more).logits

    assert (logits() == 1).all()
    kept = logits(training=True, seed=4)
    assert abs(kept.mean() - 1) < 0.1 and len(np.unique(kept)) > 3
    assert_same_bits(kept, logits(training=True, seed=4))
    assert (kept != logits(training=True, seed=5)).any()
    with pytest.raises(ValueError, match=r"seed: expected an integer in training, because dropout is 0\.5, got None"):
        logits(training=True)
    torch = pytest.importorskip("torch")
    module = kp.torch.Network(net, params, state)
    levels = net.pyramid(torch.from_numpy(pyramid[0].points), subsampled=True, F=kp.torch)
    one, other = (module(levels, torch.from_numpy(features))[0] for _ in range(2))
    assert (one != other).any()


def test_padding_of_pooling_is_seen_where_published():
    net = small(pool_pad_value=0.0)
    pyramid = batch(net)[0]
    assert pyramid[0].pools.width == pyramid[0].pools.counts.max()
    assert pyramid[2].pools is None
    assert small().pyramid(pyramid[0].points)[0].pools.width is None


# ---- upsampling by convolutions, learned kernel points


def test_a_convolution_upsamples_from_the_points_around():
    architecture = ("simple", "simple_strided", "simple_deformable_strided", "kpconv_upsample", "unary")
    net = nn.Network((*architecture, "nearest_upsample", "unary"), 2, 5, 0.2, width=8, kernel_size=5)
    assert (net.upsample_levels, net.num_downs, net.deform_levels) == ((1,), 3, (1,))
    convolutions, skips = [], []

    class Recording:
        """The operators of kpcore, with the arguments of the convolutions and of the concatenations."""

        def __getattr__(self, name):
            calls = {"kpconv": convolutions, "concatenate": skips}.get(name, [])
            return lambda *args, **options: calls.append(args) or getattr(kp, name)(*args, **options)

    params, state = net.init()
    pyramid, features, _ = batch(net)
    net(Recording(), params, state, pyramid, features)
    points, queries, neighbors, _, weights, kernel_points, extent = convolutions[-1]
    assert points is pyramid[2].points and queries is pyramid[1].points and neighbors is pyramid[1].upsamples
    expected = kp.radius_search(
        points, queries, 2.5 * 0.8, points_row_splits=pyramid[2].row_splits, queries_row_splits=pyramid[1].row_splits
    )
    assert_same_bits(neighbors.index, expected.index)
    # The level of the coarser points sets the kernel; their 8 channels stay, 2 of them in the convolution.
    assert (weights.shape, extent) == ((5, 2, 2), net.extent * 0.8)
    np.testing.assert_allclose(np.linalg.norm(kernel_points, axis=1)[1:].mean(), 0.66 * 2.5 * 0.8, rtol=1e-6)
    assert [part.shape for part in skips[0]] == [(len(queries), 8), (len(queries), 4)]
    assert (pyramid[0].upsamples.counts == 1).all()  # the nearest
    assert not any(name.startswith("decoder.2") for name in params)


def test_the_reach_of_a_convolution_that_upsamples():
    net = nn.kpfcnn(1, 2, 0.1, levels=2, convs=2, width=8, kernel_size=5, dimension=2, upsample="kpconv")
    # Three blocks within 2.5 voxels of 0.1, the strided one among them, one within 2.5 of 0.2, and the upsampling.
    assert round(net.reach, 9) == 3 * 0.25 + 2 * 0.5
    assert round(nn.kpfcnn(1, 2, 0.1, levels=3, convs=2, upsample="kpconv").reach, 9) == 3 * 0.25 + 3 * 0.5 + 2 * 1.0
    params, state = net.init()
    middles = np.arange(0.05, 5, 0.1, np.float32)
    pyramid = net.pyramid(np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2), subsampled=True)
    points, at = pyramid[0].points, 25 * len(middles) + 25
    field = kp.effective_receptive_field(
        lambda x: net(kp, params, state, pyramid, x).logits, np.ones((len(points), 1), np.float32), [at],
        reach=net.reach, points=points
    )[0]  # fmt: skip
    farthest = np.linalg.norm(points - points[at], axis=1)[field > 0].max()
    assert 0.6 * net.reach < farthest <= net.reach


def test_kernel_points_are_learned_in_units_of_the_extent():
    net, fixed = small(learn_kernel_points=True), small()
    params, state = net.init()
    fixed_params, fixed_state = fixed.init()
    learned = [name for name in fixed_state if name.endswith("kernel_points")]
    assert {*params} - {*fixed_params} == {*learned} and len(learned) == 8 and not {*learned} & {*state}
    np.testing.assert_allclose(1.2 * 0.2 * params[learned[0]], fixed_state[learned[0]], rtol=1e-6)
    np.testing.assert_allclose(1.2 * 0.8 * params[learned[-1]], fixed_state[learned[-1]], rtol=1e-6)
    pyramid, features, labels = batch(net)
    expected = fixed(kp, fixed_params, fixed_state, pyramid, features, training=True)
    result = net(kp, params, state, pyramid, features, training=True)
    np.testing.assert_allclose(result.logits, expected.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result.regularization, expected.regularization, rtol=1e-4)
    losses, after, _ = losses_by_the_tape(net, params, state, pyramid, features, labels, 10)
    assert losses[-1] < 0.8 * losses[0]
    assert all((after[name] != params[name]).any() for name in learned)


def test_learned_kernel_points_do_not_depend_on_the_unit_of_the_points():
    """In metres and in millimetres the same losses and, at the same learning rate, the same network."""
    trained = []
    for unit in (1.0, 1024.0):
        net = nn.Network(nn.architecture(2, 2), 2, 5, 0.25 * unit, width=8, kernel_size=5, learn_kernel_points=True)
        params, state = net.init()
        rng = np.random.default_rng(0)
        points = rng.random((300, 3)).astype(np.float32) * np.float32(unit)
        pyramid = net.pyramid(points)
        features = rng.standard_normal((len(pyramid[0].points), 2)).astype(np.float32)
        optimizer = nn.sgd(params, momentum=0.9, lr_scales={"kernel_points": 0.1})
        for _ in range(3):
            tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
            logits = net(kp, tensors, state, pyramid, features, training=True).logits
            kp.softmax_cross_entropy(logits, np.arange(len(features)) % 5).backward()
            optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, 0.1)
        trained.append(params)
    for name, value in trained[0].items():
        np.testing.assert_allclose(trained[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


# ---- a head for each category


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "instance", None])
def test_a_head_sees_the_rows_of_its_category(norm, training):
    net = small(heads=PARTS, head_norm=True, norm=norm, dropout=0.5)
    pyramid = net.pyramid(np.random.default_rng(0).random((200, 3)), row_splits=np.array([0, 60, 60, 130, 200]))
    level, splits = pyramid[0], pyramid[0].row_splits
    params, state = net.init(1, np.float64)
    params = {name: value for name, value in params.items() if name.startswith("heads")}
    rng = np.random.default_rng(1)
    features, out_grad = rng.standard_normal((len(level.points), 7)), rng.standard_normal((len(level.points), 5))
    params |= {f"heads.{number}.0.weights": rng.standard_normal((7, 6)) for number in range(3)}
    params |= {f"heads.{number}.1.weights": rng.standard_normal((6, parts)) for number, parts in enumerate((2, 1, 2))}
    for name in {*params, *state}:
        if ".0.norm." in name:
            (params if name in params else state)[name] = rng.random(6) + 0.5
    categories = np.array([2, 0, 0, 2])
    options = (6,), (True, 0.5, 7)

    def run_of(params):
        return nn.Run(kp, params, dict(state), training=training, norm=norm)

    def all_heads(features, params):
        run = run_of(params)
        return blocks.heads(run, features, (2, 1, 2), *options[0], categories, level, *options[1]), run.new_state

    logits, pullback, new_state = kp.autodiff.vjp(all_heads, features, params, has_aux=True)
    grad_features, grads = pullback(out_grad)
    expected, expected_grad = np.full_like(out_grad, -1e4), np.zeros_like(features)
    expected_state, expected_grads = dict(state), {name: np.zeros_like(value) for name, value in params.items()}
    for number, columns in ((0, slice(0, 2)), (2, slice(3, 5))):
        assert net.head_columns[[*PARTS][number]] == columns
        items = categories == number
        rows = np.repeat(items, np.diff(splits))
        lengths = kp.row_splits(np.diff(splits)[items])

        def one_head(features, params, number=number, lengths=lengths):
            run, names = run_of(params), (f"heads.{number}.0", f"heads.{number}.1")
            width = (2, 1, 2)[number]
            return blocks.head(run, names, features, *options[0], width, lengths, *options[1]), run.new_state

        expected[rows, columns], one_pullback, changed = kp.autodiff.vjp(one_head, features[rows], params, has_aux=True)
        expected_grad[rows], part = one_pullback(np.ascontiguousarray(out_grad[rows, columns]))
        of_head = f"heads.{number}."
        expected_grads |= {name: value for name, value in part.items() if name.startswith(of_head)}
        expected_state |= {name: value for name, value in changed.items() if name.startswith(of_head)}
    np.testing.assert_allclose(logits, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grad_features, expected_grad, rtol=1e-12, atol=1e-12)
    for name, value in (expected_grads | expected_state).items():
        np.testing.assert_allclose((grads | new_state)[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
    # The head of the mug has no rows: gradients of zero, and running statistics that stay as they are.
    assert all(not grads[name].any() for name in params if name.startswith("heads.1"))
    assert all((new_state[name] == state[name]).all() for name in state if name.startswith("heads.1"))
    if training and norm == "batch":
        assert all((new_state[name] != state[name]).any() for name in state if name.startswith("heads.2"))


def test_classes_of_other_categories_have_no_probability():
    net = small(heads=PARTS)
    params, state = net.init()
    pyramid, features, _ = batch(net)
    logits = net(kp, params, state, pyramid, features, categories=[2, 0]).logits
    bound = pyramid[0].row_splits[1]
    labels = np.repeat([3, 1], np.diff(pyramid[0].row_splits))
    for rows, columns in ((slice(0, bound), slice(3, 5)), (slice(bound, None), slice(0, 2))):
        within = kp.softmax_cross_entropy(
            np.ascontiguousarray(logits[rows, columns]), labels[rows] - columns.start, reduction="none"
        )
        assert_same_bits(kp.softmax_cross_entropy(logits, labels, reduction="none")[rows], within)
        assert (logits[rows].argmax(axis=1) - columns.start == logits[rows, columns].argmax(axis=1)).all()
    _, (grad,) = kp.autodiff.value_and_grad(lambda x: kp.softmax_cross_entropy(x[0], labels))([logits])
    assert not grad[:bound, :3].any() and not grad[bound:, 2:].any()


def test_heads_are_trained_in_every_framework():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    net = small(heads=PARTS, head_norm=True)
    params, state = net.init()
    pyramid, features, _ = batch(net)
    splits, categories = pyramid[0].row_splits, np.array([2, 0])
    labels = np.repeat([3, 1], np.diff(splits))

    def loss(F, params, labels=labels, pyramid=pyramid, features=features):
        result = net(F, params, state, pyramid, features, training=True, categories=categories)
        return F.softmax_cross_entropy(result.logits, labels) + result.regularization

    expected, grads = kp.autodiff.value_and_grad(lambda params: loss(kp, params))(params)
    jax_loss, jax_grads = jax.jit(jax.value_and_grad(lambda params: loss(kp.jax, params)))(params)
    module = kp.torch.Network(net, params, state)
    levels = net.pyramid(
        torch.from_numpy(pyramid[0].points), row_splits=torch.from_numpy(splits), subsampled=True, F=kp.torch
    )
    logits, regularization = module(levels, torch.from_numpy(features), categories=torch.from_numpy(categories))
    torch_loss = kp.torch.softmax_cross_entropy(logits, torch.from_numpy(labels)) + regularization
    torch_loss.backward()
    np.testing.assert_allclose([float(jax_loss), torch_loss.item()], [expected] * 2, rtol=1e-5)
    for name, parameter in module.named_parameters():
        np.testing.assert_allclose(parameter.grad.numpy(), grads[name], atol=1e-4, err_msg=name)
        np.testing.assert_allclose(np.asarray(jax_grads[name]), grads[name], atol=1e-4, err_msg=name)
    assert not module.get_parameter("heads.1.0.weights").grad.any()
    assert_same_bits(module.get_buffer("heads.1.0.norm.mean").numpy(), state["heads.1.0.norm.mean"])
    with pytest.raises(TypeError, match=r"row_splits: expected values, .* got an array that jax\.jit traces"):
        jax.jit(lambda pyramid: loss(kp.jax, params, pyramid=pyramid))(pyramid)


@pytest.mark.parametrize(
    ("categories", "error", "message"),
    [
        (None, ValueError, "categories: expected one for each batch item of one with heads, got None"),
        ([0], ValueError, r"categories: expected \(2,\), one for each batch item, got \(1,\)"),
        ([1, 3], ValueError, "categories: expected 0 to 2, the numbers of the heads, got 3 for batch item 1"),
        ([-1, 3], ValueError, "categories: expected 0 to 2, the numbers of the heads, got -1 for batch item 0"),
        ([0.0, 1.0], TypeError, "categories: expected integers, got float64"),
    ],
)
def test_wrong_categories(categories, error, message):
    net = small(heads=PARTS)
    params, state = net.init()
    pyramid, features, _ = batch(net)
    with pytest.raises(error, match=message):
        net(kp, params, state, pyramid, features, categories=categories)


def test_categories_without_heads():
    net = small()
    pyramid, features, _ = batch(net)
    with pytest.raises(ValueError, match=r"categories: expected None for a network without heads, got \[0, 0\]"):
        net(kp, *net.init(), pyramid, features, categories=[0, 0])


# ---- in every framework


def losses_by_the_tape(net, params, state, pyramid, features, labels, steps):
    params, found = {name: value.copy() for name, value in params.items()}, []
    optimizer = nn.sgd(params, momentum=0.9, weight_decay=1e-3, lr_scales={"offset": 0.1})
    for _ in range(steps):
        tensors = {name: kp.autodiff.Tensor(value) for name, value in params.items()}
        result = net(kp, tensors, state, pyramid, features, training=True)
        loss = kp.softmax_cross_entropy(result.logits, labels) + result.regularization
        loss.backward()
        state = result.state
        optimizer.step({name: tensor.grad for name, tensor in tensors.items()}, 0.02)
        found.append(float(loss.value))
    return found, params, state


@pytest.mark.parametrize("net", [small(modulated=True), small(resampled=6)], ids=["modulated", "resampled"])
def test_one_definition_trained_by_the_tape_and_by_torch(net):
    torch = pytest.importorskip("torch")
    params, state = net.init()
    pyramid, features, labels = batch(net)
    expected, after, state_after = losses_by_the_tape(net, params, state, pyramid, features, labels, 10)
    assert expected[-1] < 0.8 * expected[0]

    module = kp.torch.Network(net, params, state)
    assert {*module.state_dict()} == {*params, *state}
    named = dict(module.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if ("offset" in name) == slow], "lr": 0.002 if slow else 0.02}
        for slow in (False, True)
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
    splits = torch.from_numpy(pyramid[0].row_splits)
    levels = net.pyramid(torch.from_numpy(pyramid[0].points), row_splits=splits, subsampled=True, F=kp.torch)
    got = []
    for _ in range(10):
        optimizer.zero_grad()
        logits, regularization = module(levels, torch.from_numpy(features))
        loss = kp.torch.softmax_cross_entropy(logits, torch.from_numpy(labels)) + regularization
        loss.backward()
        optimizer.step()
        got.append(loss.item())
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    trained, trained_state = module.arrays()
    for name, value in (after | state_after).items():
        np.testing.assert_allclose((trained | trained_state)[name], value, atol=1e-4, err_msg=name)
    # The weights of the module are passed back to the tape.
    module.eval()
    with torch.no_grad():
        logits, regularization = module(levels, torch.from_numpy(features))
    assert regularization is None
    again = net(kp, trained, trained_state, pyramid, features).logits
    assert_same_bits(np.ascontiguousarray(logits.numpy()), again)
    other = kp.torch.Network(net, seed=7)
    other.load_state_dict(module.state_dict())
    assert_same_bits(other.arrays()[0]["head.1.weights"], trained["head.1.weights"])


def test_kernel_offsets_start_at_zero_and_learn_from_there():
    net = small(resampled=6)
    params, state = net.init()
    pyramid, features, labels = batch(net)
    offsets = [name for name in params if "kernel_offset" in name]
    assert len(offsets) == 12 and not any(params[name].any() for name in offsets)
    _, after, _ = losses_by_the_tape(net, params, state, pyramid, features, labels, 1)
    assert all(after[name].any() for name in offsets)


def test_one_definition_trained_by_the_tape_and_by_jax():
    jax, F = pytest.importorskip("jax"), kp.jax
    net = small()
    params, state = net.init()
    pyramid, features, labels = batch(net)
    expected, _, _ = losses_by_the_tape(net, params, state, pyramid, features, labels, 10)

    def loss(params, state, pyramid, features, labels):
        result = net(F, params, state, pyramid, features, training=True)
        return F.softmax_cross_entropy(result.logits, labels) + result.regularization, result.state

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    inputs = jax.tree.map(jax.numpy.asarray, (pyramid, features, labels.astype(np.int32)))
    params, state = jax.tree.map(jax.numpy.asarray, (params, state))
    moments, got = jax.tree.map(jax.numpy.zeros_like, params), []
    for _ in range(10):
        (value, state), grads = step(params, state, *inputs)
        moments = {name: 0.9 * moments[name] + grads[name] + 1e-3 * params[name] for name in params}
        params = {name: p - (0.002 if "offset" in name else 0.02) * moments[name] for name, p in params.items()}
        got.append(float(value))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(
    "net",
    [
        nn.kpcnn(2, 5, 0.2, convs=2, levels=3, width=8, deformable=2, kernel_size=5),
        nn.kpcnn(2, 5, 0.2, levels=2, width=8, norm="group", norm_groups=2, head_norm=True, resampled=1),
        small(norm="instance", dropout=0.4, modulated=True), small(norm=None, dimension=2), small(pool_pad_value=0.0),
        small(resampled=3, norm="group", norm_groups=4),
        small(upsample="kpconv", deform_radius=3.0), small(learn_kernel_points=True, modulated=True),
        small(heads=PARTS, head_norm=True), small(heads=PARTS, head_norm=True, norm="group", norm_groups=4),
        small(heads=PARTS, dropout=0.4),
        nn.Network(("simple_strided", "max_pool", "resnetb", "global_average"), 2, 5, 0.1, width=8),
        nn.KPNeXt((1, 1), 2, 5, 0.2, None, width=16), nn.KPNeXt((1, 1), 2, 5, 0.2, 4, segment=False, width=16),
        nn.KPNeXt((1, 1), 2, 5, 0.2, 4, segment=False, width=16, norm="group", norm_groups=4),
        small(bias=True, norm="group", norm_groups=4, norm_together=True, logits_slope=0.1),
        descriptor(norm="instance", norm_affine=False, norm_together=True, normalization="positive"),
        nn.KPNeXt((1, 1), 2, 5, 0.2, None, segment=False, width=16, extent=1.5, head_width=6, head_norm=False),
    ],
    ids=lambda net: f"{type(net).__name__} {net.norm} {net.segments} {net.dimension}",
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_a_pass_is_the_same_in_every_framework(net, framework, training):
    module = pytest.importorskip(framework)
    F, place = (kp.torch, module.from_numpy) if framework == "torch" else (kp.jax, module.numpy.asarray)
    params, state = net.init(2)
    pyramid, features, _ = batch(net)
    pyramid = net.pyramid(pyramid[0].points, row_splits=pyramid[0].row_splits, subsampled=True)
    more = {"categories": [2, 0]} if getattr(net, "heads", None) else {}
    expected = net(kp, params, state, pyramid, features, training=training, seed=9, **more)
    if framework == "torch":
        levels = net.pyramid(
            place(pyramid[0].points), row_splits=place(pyramid[0].row_splits), subsampled=True, F=kp.torch
        )
    else:
        levels = module.tree.map(place, pyramid)
    given = ({name: place(value) for name, value in values.items()} for values in (params, state))
    got = net(F, *given, levels, place(features), training=training, seed=9, **more)
    np.testing.assert_allclose(np.asarray(got.logits), expected.logits, rtol=1e-4, atol=1e-5)
    for name, value in expected.state.items():
        np.testing.assert_allclose(np.asarray(got.state[name]), value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert (got.regularization is None) == (expected.regularization is None)
    if expected.regularization is not None:
        np.testing.assert_allclose(float(got.regularization), expected.regularization, rtol=1e-4)


@pytest.mark.parametrize(
    "net", [small(modulated=True, resampled=6), nn.KPNeXt((1, 2), 2, 5, 0.2, 4, width=16)], ids=repr
)
def test_a_torch_module_is_trained_in_one_graph(net):
    torch = pytest.importorskip("torch")
    pyramid, features, labels = batch(net)
    levels = net.pyramid(torch.from_numpy(pyramid[0].points), subsampled=True, F=kp.torch)
    features, labels = torch.from_numpy(features), torch.from_numpy(labels)

    def gradients(compiled):
        module = kp.torch.Network(net)

        def loss(features):
            logits, regularization = module(levels, features)
            loss = kp.torch.softmax_cross_entropy(logits, labels)
            return loss if regularization is None else loss + regularization

        value = (torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss)(features)
        value.backward()
        return value, [p.grad for p in module.parameters()], dict(module.named_buffers())

    torch.testing.assert_close(gradients(True), gradients(False))


def test_a_torch_module_in_one_graph():
    torch = pytest.importorskip("torch")
    net = small()
    module = kp.torch.Network(net).eval()
    pyramid, features, _ = batch(net)
    levels = net.pyramid(torch.from_numpy(pyramid[0].points), subsampled=True, F=kp.torch)
    compiled = torch.compile(lambda features: module(levels, features)[0], fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = module(levels, torch.from_numpy(features))[0]
        torch.testing.assert_close(compiled(torch.from_numpy(features)), expected)


# ---- KPNeXt


@pytest.mark.parametrize("attention_groups", [None, 4])
@pytest.mark.parametrize("segment", [True, False])
def test_gradients_of_kpnext(segment, attention_groups):
    head = {} if segment else {"head_width": 6, "head_norm": False, "extent": 1.7}
    net = nn.KPNeXt(
        (1, 2), 2, 3, 0.2, attention_groups, segment, width=16, num_neighbors=(8, 10), shells=(1, 6), **head
    )
    params, state = net.init(0, np.float64)
    pyramid, features, labels = batch(net, np.float64)

    def loss(params):
        result = net(kp, params, state, pyramid, features, training=True)
        assert result.regularization is None
        return kp.softmax_cross_entropy(result.logits, labels)

    _, grads = kp.autodiff.value_and_grad(loss)(params)
    rng = np.random.default_rng(0)
    way = {name: rng.standard_normal(value.shape) for name, value in params.items()}
    along = sum((grads[name] * way[name]).sum() for name in params)
    np.testing.assert_allclose(differences(loss, params, way), along, rtol=1e-4)
    assert any("attention" in name for name in params) == (attention_groups is not None)


def test_the_extents_of_kpnext():
    net = nn.KPNeXt((1, 1), 2, 3, 0.2, None, width=16, num_neighbors=(8, 10), extent=1.5)
    pyramid, features, _ = batch(net)
    used = []

    def kpconv(*args, **options):
        used.append(args[6])
        return kp.kpconv(*args, **options)

    net(types.SimpleNamespace(**{**vars(kp), "kpconv": kpconv}), *net.init(), pyramid, features)
    np.testing.assert_allclose(used, [1.5 * 0.2, 1.5 * 0.2, 1.5 * 0.2 * 2.2, 1.5 * 0.2])
    assert net.reach < dataclasses.replace(net, extent=None).reach


def test_the_lists_of_kpnext_are_those_of_voxels():
    net = nn.KPNeXt((1, 1), 2, 3, 0.2, None, width=16, num_neighbors=(8, 10))
    fine, coarse = batch(net)[0]
    cells = [np.floor(level.points / np.float32(0.2 * 2.2)).astype(int) for level in (fine, coarse)]
    item = [np.repeat([0, 1], np.diff(level.row_splits)) for level in (fine, coarse)]
    of = fine.upsamples.index
    assert (item[1][of] == item[0]).all() and (cells[1][of] == cells[0]).all()
    assert fine.pools.num_pairs == len(fine.points)
    for voxel in range(len(coarse.points)):
        begin, end = fine.pools.row_splits[voxel : voxel + 2]
        assert (of[fine.pools.index[begin:end]] == voxel).all()
    assert (fine.neighbors.counts == 8).all()
    for alone in (net.pyramid(fine.points), net.pyramid(fine.points, subsampled=True)):
        assert alone[0].row_splits.tolist() == [0, len(alone[0].points)]
    torch = pytest.importorskip("torch")
    alone = net.pyramid(torch.from_numpy(fine.points), subsampled=True, F=kp.torch)
    assert alone[0].row_splits.tolist() == [0, len(fine.points)] and alone[0].row_splits.dtype == torch.int64


@pytest.mark.parametrize("attention_norm", [True, False])
def test_kpconvx_is_that_of_the_torch_layer(attention_norm):
    torch = pytest.importorskip("torch")
    layer = kp.torch.KPConvX(
        16, (1, 6), radius=0.5, extent=0.5, attention_groups=4, attention_norm=attention_norm
    )  # fmt: skip
    for values in (layer.alpha_mlp[1].norm.bias, layer.grpnorm.weight, layer.grpnorm.bias):
        values.data.normal_()
    rng = np.random.default_rng(0)
    points, features = rng.random((80, 3), np.float32), rng.standard_normal((80, 16), np.float32)
    neighbors = kp.knn_search(points, None, 12)
    weights = {name: value.numpy().copy() for name, value in layer.state_dict().items()}
    params = {
        "x.weights": weights["weights"], "x.attention.0.weights": weights["alpha_mlp.0.weight"].T.copy(),
        "x.attention.0.bias": weights["alpha_mlp.1.norm.bias"],
        "x.attention.1.weights": weights["alpha_mlp.3.weight"].T.copy(),
        "x.attention.norm.scale": weights["grpnorm.weight"], "x.attention.norm.shift": weights["grpnorm.bias"],
    }  # fmt: skip
    run = blocks.Run(kp, params, {"x.kernel_points": weights["kernel_points"]})
    places = {"num": 7, "radius": 0.5, "extent": 0.5, "dimension": 3, "shells": (1, 6)}
    got = blocks.depthwise(run, "x", (points, None, neighbors), features, places, 4, attention_norm)
    with torch.no_grad():
        expected = layer(torch.from_numpy(points), None, neighbors, torch.from_numpy(features)).numpy()
    assert relative(got, expected) < 2e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": (8,)}, "num_neighbors: expected one for each of 2 levels"),
        ({"attention_groups": 5}, "attention_groups: expected a divisor"),
        ({"norm": "layer"}, "norm"),
        (
            {"norm": "instance", "segment": False},
            "norm: expected one with several channels in each group",
        ),
        (
            {"norm": "group", "segment": False, "width": 16},
            "norm: expected one with several channels in each group, since the 32 channels",
        ),
        ({"grid_factor": 1.0}, "grid_factor: expected a number above 1, at most 100, got 1.0"),
        ({"shells": (14, 28)}, r"shells: expected 1 point on the first shell, which is the centre, got \(14, 28\)"),
        ({"dropout": 2}, "dropout: expected 0 to 1, got 2"),
        ({"slope": math.nan}, "slope: expected -1 to 1, got"),
        ({"origin": "first"}, "origin: expected 0 or 'published', got 'first'"),
    ],
)
def test_wrong_arguments_of_kpnext(options, message):
    with pytest.raises(ValueError, match=message):
        nn.KPNeXt((1, 1), 1, 2, 0.1, **{"attention_groups": 4} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": 3}, "depths: expected a sequence of integers, got int"),
        ({"num_neighbors": 12}, "num_neighbors: expected a sequence"), ({"segment": "no"}, "segment: expected True or"),
        ({"attention_norm": None}, "attention_norm: expected True or False, got NoneType"),
        ({"width": 16.0}, "width: expected an integer, got float"),
    ],
)  # fmt: skip
def test_types_that_kpnext_does_not_take(options, message):
    with pytest.raises(TypeError, match=message):
        nn.KPNeXt(**{"depths": (1, 1), "num_features": 1, "num_classes": 2, "voxel_size": 0.1} | options)


# ---- optimizers and schedules


def run_both(ours, theirs, steps, schedule):
    """Parameters after steps with the same gradients, by an optimizer of kpcore and one of torch."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    # There is work for more than one thread.
    params = {"a": rng.standard_normal((2300, 2000)), "offset": rng.standard_normal(7)}
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    optimizer, other = ours(params), theirs(tensors)
    for step in range(steps):
        grads = {name: rng.standard_normal(value.shape) for name, value in params.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        for group in other.param_groups:
            group["lr"] = schedule(step) * group.get("scale", 1.0)
        optimizer.step(grads, schedule(step))
        other.step()
    for name, value in params.items():
        np.testing.assert_allclose(value, tensors[name].detach().numpy(), rtol=1e-9, atol=1e-11)


def test_sgd_is_torchs():
    torch = pytest.importorskip("torch")
    run_both(
        lambda p: nn.sgd(p, momentum=0.9, weight_decay=0.01, lr_scales={"offset": 0.1}),
        lambda t: torch.optim.SGD(
            [{"params": [t["a"]]}, {"params": [t["offset"]], "scale": 0.1}], lr=1.0, momentum=0.9, weight_decay=0.01
        ),
        5, lambda step: 0.1 / (step + 1),
    )  # fmt: skip


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    run_both(
        lambda p: nn.adamw(p, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        lambda t: torch.optim.AdamW([*t.values()], lr=1.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
        5, lambda step: 0.1 / (step + 1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [0, 1, 7, 33, 2**17 + 11])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_optimizers_in_any_dtype_size_and_number_of_threads(name, size, dtype, isa, set_threads):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(size)
    start = rng.standard_normal(size).astype(dtype)
    grads = [rng.standard_normal(2 * size).astype(dtype)[::2] for _ in range(3)]  # not contiguous
    options = {"momentum": 0.9} if name == "SGD" else {"betas": (0.8, 0.95), "eps": 1e-6}
    tensor = torch.tensor(start, requires_grad=True)
    theirs = getattr(torch.optim, name)([tensor], lr=0.1, weight_decay=0.05, **options)
    for grad in grads:
        tensor.grad = torch.tensor(grad.copy())
        theirs.step()
    found = []
    for threads in (1, 2, 3):
        set_threads(threads)
        params = {"a": start.copy()}
        ours = getattr(nn, name.lower())(params, weight_decay=0.05, **options)
        for grad in grads:
            ours.step({"a": grad}, 0.1)
        found.append(params["a"])
        assert_same_bits(found[0], found[-1])
    np.testing.assert_allclose(found[0], tensor.detach().numpy(), atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("make", [nn.sgd, nn.adamw])
def test_an_optimizer_goes_on_where_another_stopped(make):
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((5, 4)).astype(np.float32), "b": rng.standard_normal(3).astype(np.float32)}
    grads = [{name: rng.standard_normal(v.shape).astype(np.float32) for name, v in start.items()} for _ in range(4)]
    whole, first = ({name: value.copy() for name, value in start.items()} for _ in range(2))
    one, two = make(whole), make(first)
    for g in grads:
        one.step(g, 0.1)
    for g in grads[:2]:
        two.step(g, 0.1)
    kept = {name: np.array(value) for name, value in two.state().items()}
    second = {name: value.copy() for name, value in first.items()}
    three = make(second)
    three.restore(kept)
    for g in grads[2:]:
        three.step(g, 0.1)
    for name, value in whole.items():
        assert_same_bits(second[name], value)
    with pytest.raises(ValueError, match="state: expected what"):
        three.restore({"num_steps": np.array(1)})


def test_optimizers_refuse_other_gradients():
    optimizer = nn.sgd({"a": np.zeros(3)})
    with pytest.raises(ValueError, match="grads: expected one for each parameter, got other names: a"):
        optimizer.step({}, 0.1)
    with pytest.raises(ValueError, match=r"grads: expected a \(3,\) float64, got \(4,\)"):
        optimizer.step({"a": np.zeros(4)}, 0.1)
    with pytest.raises(ValueError, match=r"params: expected C-contiguous writable arrays"):
        nn.sgd({"a": np.zeros((3, 2)).T})
    with pytest.raises(ValueError, match="lr: expected a finite number"):
        optimizer.step({"a": np.zeros(3)}, math.nan)
    with pytest.raises(ValueError, match=r"grads: expected a \(3,\) float64, got None"):
        optimizer.step({"a": None}, 0.1)
    assert optimizer.num_steps == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: nn.sgd(p, momentum=-1), "momentum: expected a number of at least zero, got -1"),
        (lambda p: nn.sgd(p, weight_decay=-1), "weight_decay: expected a number of at least zero"),
        (lambda p: nn.adamw(p, betas=(0.9, 1.0)), r"betas: expected numbers below 1, got \(0\.9, 1\.0\)"),
        (lambda p: nn.adamw(p, betas=(0.9,)), r"betas: expected two numbers, got \(0\.9,\)"),
        (lambda p: nn.adamw(p, eps=-1e-8), "eps: expected a number of at least zero"),
        (lambda p: nn.sgd(p).step({"a": np.zeros(3)}, -1.0), "lr: expected a number of at least zero, got -1.0"),
        (lambda p: nn.sgd({"a": np.broadcast_to(0.0, 3)}), "params: expected C-contiguous writable arrays"),
        (lambda p: nn.sgd({"a": np.frombuffer(bytes(8))}), "params: expected C-contiguous writable arrays"),
        (
            lambda p: nn.sgd({"a": np.zeros(3, int)}),
            "params: expected .* arrays, got ndarray int64 for a",
        ),
        (lambda p: nn.sgd({"a": [1.0]}), "params: expected float32 or float64 arrays, got list for a"),
    ],
)
def test_wrong_arguments_of_optimizers(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make({"a": np.zeros(3)})


def test_the_state_of_an_optimizer_is_of_its_moment():
    params = {"a": np.ones(3)}
    optimizer = nn.sgd(params, momentum=0.9, weight_decay=0.0)
    optimizer.step({"a": np.ones(3)}, 0.1)
    state = optimizer.state()
    optimizer.step({"a": np.ones(3)}, 0.1)
    assert state["momentum.a"].tolist() == [1, 1, 1] and state["num_steps"] == 1


def test_clipping():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    grads = {"a": 3 * rng.standard_normal((50, 4)), "b": 3 * rng.standard_normal(9)}
    tensors = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads.values()]
    for limit in (1000.0, 5.0):
        for tensor, grad in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.tensor(grad)
        got = {name: grad.copy() for name, grad in grads.items()}
        norm = torch.nn.utils.clip_grad_norm_(tensors, limit)
        np.testing.assert_allclose(nn.clip_by_norm(got, limit), norm.item(), rtol=1e-12)
        for tensor, grad in zip(tensors, got.values(), strict=True):
            np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-6)
    nn.clip_by_value(grads, 2.0)
    assert np.abs(grads["a"]).max() == 2.0 and (np.abs(grads["a"]) < 2).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 9, 1000, 300_001])
def test_the_norm_is_the_same_bits_everywhere_and_right_to_the_last(dtype, size, set_threads, set_isa):
    rng = np.random.default_rng(size)
    grads = {name: (rng.standard_normal(n) * 10.0 ** rng.integers(-9, 9, n)).astype(dtype)
             for name, n in (("a", size), ("b", 7))}  # fmt: skip
    squares = math.fsum(float(v) * float(v) for grad in grads.values() for v in grad)
    found = set()
    for isa in kp.backends.cpu.isas():
        set_isa(isa)
        for num_threads in (1, 2, 3):
            set_threads(num_threads)
            found.add(nn.clip_by_norm(grads, 1e100))
    (norm,) = found
    assert abs(norm - math.sqrt(squares)) <= 2 * math.ulp(norm)


def test_the_norm_of_float32_gradients_beyond_their_squares():
    grads = {"a": np.float32([3e30, 4e30])}
    np.testing.assert_allclose(nn.clip_by_norm(grads, 1.0), 5e30, rtol=1e-6)
    np.testing.assert_allclose(grads["a"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.sgd({"w": np.ones(3)}).step({"w": [1.0, 1.0, 1.0]}, 0.1), r"grads: expected w \(3,\) float64"),
        (lambda: nn.adamw({"w": np.ones(3)}).step({"w": 1.0}, 0.1), r"grads: expected w \(3,\) float64"),
        (lambda: nn.sgd({"w": np.ones(3)}).step({"w": np.ones(3)}, 10**400), "lr: expected a number that float64"),
        (lambda: nn.sgd({"w": np.ones(3)}).restore({"momentum.w": [0, 0, 0], "num_steps": 0}), "state: expected mom"),
        (lambda: nn.adamw({}, betas=0.9), "betas: expected two numbers, got 0.9"),
        (lambda: nn.adamw({}, betas=(0.9, 10**400)), "betas: expected a number that float64"),
        (lambda: nn.clip_by_norm({"w": [1.0]}, 1.0), "grads: expected float32 or float64 arrays, got list for w"),
        (lambda: nn.clip_by_value({"w": np.ones(3, int)}, 1.0), "grads: expected .* got ndarray int64 for w"),
        (lambda: nn.exponential(0.1, 10.0, 1)(10**6), "step: expected one with a learning rate that float64 can hold"),
        (lambda: nn.exponential(0.1, 10.0, 1)(10**400), "step: expected a number that float64"),
        (lambda: nn.exponential(0.1, 10.0, 2**63), r"steps: expected 1 to 2\*\*63 - 1"),
        (lambda: nn.one_cycle(0.1, 10)("1"), "step: expected a number, got str"),
        (lambda: nn.cosine(0.1, 0), "steps: expected at least 1, got 0"),
        (lambda: nn.cosine(0.0, 10), "lr: expected a finite number above zero, got 0"),
        (lambda: nn.warm_up(nn.cosine(0.1, 10), -1), "steps: expected at least 0, got -1"),
        (lambda: nn.warm_up(0.1, 5), "schedule: expected a function of the step, such as cosine"),
        (lambda: nn.warm_up(nn.cosine(0.1, 10), 5)("1"), "step: expected a number, got str"),
        (lambda: nn.one_cycle(0.1, 10, start="1"), "start: expected a number, got str"),
        (lambda: nn.one_cycle(0.1, 10, warm=10**400), "warm: expected a number that float64"),
    ],
)
def test_errors_of_optimizers_and_schedules(call, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("depths", [(1,), (1, 1)])
@pytest.mark.parametrize("more", [{"features": np.ones((4, 1), np.float32)}, {"labels": np.zeros(6, np.int32)}])
def test_the_levels_of_kpnext_take_a_row_for_each_point(depths, more):
    net = nn.KPNeXt(depths, 1, 4, voxel_size=0.1, width=16, num_neighbors=(4, 4), attention_groups=None)
    for subsampled in (False, True):
        with pytest.raises(ValueError, match=rf"^{next(iter(more))}: expected"):
            net.pyramid(np.random.default_rng(0).random((5, 3), np.float32), subsampled=subsampled, **more)


def test_schedules():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=50, cycle_momentum=False)
    ours = nn.one_cycle(0.3, 50)
    for step in range(50):
        np.testing.assert_allclose(ours(step), optimizer.param_groups[0]["lr"], rtol=1e-9)
        optimizer.step()
        if step < 49:
            theirs.step()
    exponential = nn.exponential(0.01, 0.1, 150)
    np.testing.assert_allclose([exponential(s) for s in (0, 75, 150, 300)], [1e-2, 10**-2.5, 1e-3, 1e-4])


def test_warm_up_and_cosine_are_torchs():
    torch = pytest.importorskip("torch")
    warm, steps = 5, 40
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps),
        ],
        milestones=[warm],
    )
    ours = nn.warm_up(nn.cosine(0.1, steps), warm)
    for step in range(warm + steps + 1):
        np.testing.assert_allclose(ours(step), optimizer.param_groups[0]["lr"], rtol=1e-9, atol=1e-16)
        formula = 0.1 * step / warm if step < warm else 0.05 * (1 + math.cos(math.pi * (step - warm) / steps))
        np.testing.assert_allclose(ours(step), formula, rtol=1e-12, atol=1e-17)
        optimizer.step()
        if step < warm + steps:
            theirs.step()
    # Beyond either end: no negative rates, and no second period.
    assert (ours(-3), ours(warm + steps + 7)) == (0, 0)
    assert nn.warm_up(nn.exponential(0.1, 0.5, 10), 4)(14) == 0.05
    assert nn.warm_up(nn.cosine(0.1, 10), 0)(3) == nn.cosine(0.1, 10)(3)


# ---- tables of the blocks

SUMMARIZED = {
    "small": small(),
    "classes": nn.kpcnn(1, 4, 0.2, levels=3, convs=2, width=8, head_norm=True),
    "heads, upsampled by convolutions": small(heads=PARTS, upsample="kpconv", learn_kernel_points=True, resampled=1),
    "descriptor": descriptor(bottleneck_width=12),
    "max_pool": nn.Network(("simple", "max_pool", "resnetb", "nearest_upsample", "unary"), 2, 5, 0.2, width=8),
    "KPNeXt": nn.KPNeXt((1, 2, 1), 1, 2, 0.1, width=16, num_neighbors=(4, 5, 6), extent=1.5),
    "KPNeXt of classes": nn.KPNeXt((1, 1), 1, 2, 0.1, width=16, num_neighbors=(4, 5), segment=False, norm=None),
}


@pytest.mark.parametrize("name", SUMMARIZED)
def test_the_table_of_blocks(name):
    """Each number against those of a pass, of the pyramid and of the parameters."""
    net = SUMMARIZED[name]
    params, state = net.init()
    title, columns, *rows, last = nn.summary(net, params).splitlines()
    assert title.startswith(f"{type(net).__name__}: ") and title.endswith(", float32")
    assert title == nn.summary(net).splitlines()[0] + ", float32"
    assert " ".join(columns.split()) == "block kind level in out neighbours extent parameters"
    assert len({len(line) for line in (columns, *rows, last)}) == 1
    names = [row.split()[0] for row in rows]
    numbers = [int(row.split()[-1].replace(",", "")) for row in rows]
    for row_name, number in zip(names, numbers, strict=True):
        assert number == sum(value.size for key, value in params.items() if key.startswith(f"{row_name}."))
    assert sum(numbers) == nn.count(params) and last.split() == ["total", f"{nn.count(params):,}"]

    outputs = {}
    pyramid = net.pyramid(np.random.default_rng(0).random((200, 3), np.float32))
    more = {"categories": [0]} if getattr(net, "heads", None) else {}
    if getattr(net, "bottleneck_width", None):
        more["between"] = lambda x: np.zeros((len(x), net.bottleneck_width), np.float32)
    features = np.ones((len(pyramid[0].points), net.num_features), np.float32)

    def observe(block, level, out):
        if level is not None:
            outputs[block] = level, out.shape[1]

    net(kp, params, state, pyramid, features, observe=observe, **more)
    rows = dict(zip(names, rows, strict=True))
    for block, (level, channels) in outputs.items():
        row = rows.get(block) or rows[f"{block}.block"]
        before, after, inside, out = re.search(r" (\d+)(?:->(\d+))? +(\d+) +(\d+) ", row + " ").groups()
        assert (int(after or before), int(out)) == (level, channels)
        weights = [value for key, value in params.items() if re.fullmatch(rf"{block}(\.unary1|\.conv)?\.weights", key)]
        assert not weights or int(inside) in weights[0].shape
        if re.search("simple|resnetb|max_pool|kpconv", row):
            radius = pyramid[int(before)].radius
            assert f" {radius:.4g} " in row
            if "max_pool" not in row:
                assert f" {net.extent * pyramid[int(before)].voxel_size:.4g} " in row
        elif "inverted" in row:
            extent = (net.extent or net.radius) * pyramid[level].voxel_size
            assert re.search(rf" {net.num_neighbors[level]} nearest +{extent:.4g} ", row)
    assert all(block in names for block in outputs if "decoder" not in block)


def test_the_table_of_other_parameters():
    net = small()
    with pytest.raises(ValueError, match=r"params: expected encoder\.0\.conv\.weights .*, got none"):
        nn.summary(net, {})
    with pytest.raises(TypeError, match=r"net: expected a kpcore\.nn\.Network or KPNeXt, got str"):
        nn.summary("net")


def test_a_torch_module_prints_its_blocks():
    pytest.importorskip("torch")
    for net in (small(), SUMMARIZED["KPNeXt"]):
        assert repr(kp.torch.Network(net)) == nn.summary(net)


# ---- files


def test_a_network_in_a_file(tmp_path):
    pytest.importorskip("safetensors")
    others = small(heads=PARTS, upsample="kpconv", learn_kernel_points=True)
    for net in (small(), others, nn.KPNeXt((1, 1), 1, 2, 0.1, width=16, num_neighbors=(4, 4))):
        params, state = net.init()
        nn.save(tmp_path / "net.safetensors", net, params, state, names=["a", "b"])
        assert os.listdir(tmp_path) == ["net.safetensors"]
        again, *arrays, more = nn.load(tmp_path / "net.safetensors")
        assert again == net and hash(again) == hash(net) and more == {"names": ["a", "b"]}
        for one, other in zip(arrays, (params, state), strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                assert_same_bits(one[name], value)


def test_a_file_with_other_arrays_than_the_network_has(tmp_path):
    pytest.importorskip("safetensors")
    net = nn.KPNeXt((1, 1), 1, 2, 0.1, 4, width=16, num_neighbors=(4, 4))
    params, state = net.init()
    without = {name: value for name, value in params.items() if "decoder.0.block.conv.attention" not in name}
    for values, message in (
        # As in files of versions in which the last block had no attention.
        (without, r"params: expected decoder\.0\.block\.conv\.attention\.0\.weights \(16, 16\), .* got none"),
        (params | {"head.1.bias": np.zeros(3, np.float32)}, r"params: expected head\.1\.bias \(2,\), got \(3,\)"),
        (params | {"head.2.bias": params["head.1.bias"]}, "params: expected only what .* has, got head.2.bias too"),
    ):
        nn.save(tmp_path / "net", net, values, state)
        with pytest.raises(ValueError, match=message):
            nn.load(tmp_path / "net")


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path):
    pytest.importorskip("safetensors")
    nets = (
        nn.kpfcnn(np.int64(1), np.int64(4), np.float32(0.1), levels=2, width=np.int32(16), head_norm=np.bool_(True)),
        nn.kpnext(np.int64(1), np.int64(4), np.float32(0.1), depths=np.array([1, 1]), width=np.int64(16)),
    )
    for net in nets:
        nn.save(tmp_path / "a", net, *net.init())
        assert nn.load(tmp_path / "a")[0] == net
    with pytest.raises(TypeError, match="JSON"):
        nn.save(tmp_path / "b", net, *net.init(), names={1, 2})
    for name in ("groups", "network"):
        with pytest.raises(ValueError, match=f"more: expected names other than network and groups, got {name}"):
            nn.save(tmp_path / "b", net, *net.init(), **{name: 1})
    assert os.listdir(tmp_path) == ["a"]
    checkpoints.write(tmp_path / "c", {"params": {}, "state": {}}, {"network": {"kind": "UNet"}})
    with pytest.raises(ValueError, match="c: expected a network of Network or KPNeXt, got 'UNet'"):
        nn.load(tmp_path / "c")


def test_a_torch_module_takes_what_the_network_has():
    pytest.importorskip("torch")
    net = small()
    params, state = net.init()
    for values, message in (
        ((params, None), "state: expected both params and state"),
        ((None, state), "params: expected both params and state"),
        (({}, {}), r"params: expected encoder\.0\.conv\.weights .*, which the architecture has, got none"),
        (
            (small(width=16).init()[0], state),
            r"params: expected encoder\.0\.conv\.weights \(5, 2, 4\), got",
        ),
        (
            (params, state | {"more": params["head.1.bias"]}),
            "state: expected only what .* has, got more too",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            kp.torch.Network(net, *values)


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    checkpoints.write(path, {"params": {"x.y": np.arange(3.0)}, "none": {}}, {"n": 1})

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stopped)  # before the new file replaces the old one
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(path, {"params": {"x.y": np.arange(4.0)}}, {"n": 2})
    groups, about = checkpoints.read(path)
    assert about == {"n": 1} and groups["none"] == {}
    assert groups["params"]["x.y"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a file that kpcore\.nn\.save wrote"):
        nn.load(path)


# ---- model files


def safetensors_bytes(header, data=b""):
    """The bytes of a safetensors file: the length of the JSON header in 8 bytes, the header, the arrays."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
DAMAGED = "is damaged, or no safetensors file: "


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", DAMAGED + "expected a header of at most 0 bytes, got a length of 0"),
        (b"no", DAMAGED + "expected a header of at most 0 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", DAMAGED + "expected a header of at most 2 bytes, got a length of 115292150"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", DAMAGED + "expected a header of at most 2 bytes"),
        (safetensors_bytes(b"[]"), DAMAGED + "expected a header that is a JSON object, got list"),
        (safetensors_bytes(b"{]"), DAMAGED + "Expecting property name"),
        (safetensors_bytes(b"[" * 10**5), DAMAGED + "maximum recursion depth"),
        (safetensors_bytes(b'{"\xff": 1}'), DAMAGED + "'utf-8' codec can't decode"),
        (safetensors_bytes({"\ud800": ONE}, b"abcd"), DAMAGED + "'utf-8' codec can't encode"),
        (safetensors_bytes({"__metadata__": {"a": "\ud800"}}), DAMAGED + "'utf-8' codec can't encode"),
        (safetensors_bytes({"__metadata__": {"a": 1}}), DAMAGED + "expected texts by name as __metadata__"),
        *[
            (safetensors_bytes({"__metadata__": value}), DAMAGED + "expected texts by name as __metadata__")
            for value in ([1], [], 0, False, "")
        ],
        (
            safetensors_bytes(b'{"a": %s, "a": %s}' % (2 * (json.dumps(ONE).encode(),)), b"abcd"),
            DAMAGED + "'a': expected each name once in the header, got it twice",
        ),
        (
            safetensors_bytes(b'{"__metadata__": {"k": "1", "k": "2"}}'),
            DAMAGED + "'k': expected each name once in the header, got it twice",
        ),
        *[
            (safetensors_bytes({"a": ONE | changes}, b"abcd"), f"{DAMAGED}'a': expected {said}")
            for changes, said in (
                ({"x": 1}, "dtype, shape and data_offsets, got {'dtype': 'F32',"),
                (
                    {"dtype": "BF16"},
                    "a dtype of F64, F32, F16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, C64, got 'BF16",
                ),
                ({"dtype": ["F32"]}, "a dtype of F64, F32"),
                ({"shape": 1}, "shape of integers from 0 on, got 1"),
                ({"shape": [-1]}, "shape of integers from 0 on, got [-1"),
                ({"shape": [True]}, "shape of integers from 0 on, got [True]"),
                ({"shape": [1.0]}, "shape of integers from 0 on, got [1.0]"),
                ({"shape": [2**64]}, "shape of integers from 0 on, got [1.8"),
                ({"shape": ["1"]}, "shape of integers from 0 on, got ['1']"),
                ({"shape": [1] * 33}, "at most 32 dimensions and 2 data_offsets, got 33, 2"),
                ({"shape": [2**62, 0]}, "a shape of fewer than 2**63 bytes, got"),
                ({"shape": [2]}, "data_offsets of 8 bytes for F32 [2], got [0, 4]"),
                ({"data_offsets": [0, 4, 4]}, "at most 32 dimensions and 2 data_offsets, got 1, 3"),
                ({"data_offsets": [4, 0]}, "data_offsets of 4 bytes for F32 [1], got [4, 0]"),
                ({"data_offsets": [4, 8]}, "data_offsets that begin at 0, got 4"),
            )
        ],
        (
            safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
            DAMAGED + "expected 4398046511",
        ),
        (
            safetensors_bytes({"a": ONE, "b": ONE | {"data_offsets": [8, 12]}}, b"abcdefghijkl"),
            DAMAGED + "'b': expected data_offsets that begin at 4, got 8",
        ),
        (
            safetensors_bytes({"a": ONE, "b": ONE}, b"abcd"),
            DAMAGED + "'b': expected data_offsets that begin at 4, got 0",
        ),
        (safetensors_bytes({"a": ONE}, b"abc"), DAMAGED + "expected 73 bytes, as the header says, got 72"),
        (safetensors_bytes({"a": ONE}, b"abcde"), DAMAGED + "expected 73 bytes, as the header says, got 74"),
        (safetensors_bytes({"__metadata__": {"kpcore": "[1]"}}), "expected a JSON object in the metadata named kpcore"),
        (safetensors_bytes({"__metadata__": {"kpcore": "{"}}), "Expecting property name"),
        (safetensors_bytes({"__metadata__": {"kpcore": "[" * 100_000}}), "recursion"),
        pytest.param(
            safetensors_bytes({"__metadata__": {"kpcore": "9" * 5000}}),
            "4300 digits",
            marks=pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="Python before 3.10.7"),
        ),
        (safetensors_bytes({"__metadata__": {"kpcore": '{"groups": 3}'}}), "not iterable"),
        (safetensors_bytes({}), "expected a file that kpcore.nn.save wrote"),
        (
            safetensors_bytes({"__metadata__": {"kpcore": '{"network": 3}'}}),
            "expected a file that kpcore.nn.save wrote",
        ),
        (safetensors_bytes({"__metadata__": {"kpcore": '{"network": {"kind": [1]}}'}}), "expected a network of"),
        (safetensors_bytes({"__metadata__": {"kpcore": '{"network": {"kind": "KPNeXt"}}'}}), "missing"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_model_files_that_are_damaged(tmp_path, content, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for mapped in (False, True):
        with pytest.raises(ValueError) as refused:
            nn.load(path, mapped=mapped)
        line = str(refused.value)
        assert line.startswith(f"{path}: {said}" if said.startswith(DAMAGED) else f"{path}: ")
        assert said in line and "\n" not in line


def test_model_files_in_memory(tmp_path):
    """Mapped arrays are those that are read, aligned and read-only, also where the file does not align them."""
    header = {"x.a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
              "x.b": {"dtype": "F64", "shape": [2, 1], "data_offsets": [3, 19]},
              "x.c": {"dtype": "I16", "shape": [0, 4], "data_offsets": [19, 19]},
              "x.d": {"dtype": "F32", "shape": [], "data_offsets": [19, 23]}}  # fmt: skip
    data = bytes(range(3)) + np.array([1.5, -2.0]).tobytes() + np.array(3, np.float32).tobytes()
    for spaces in range(8):
        text = json.dumps(header).encode() + b" " * spaces
        (tmp_path / "a").write_bytes(safetensors_bytes(text, data))
        (read, about), (mapped, also) = (checkpoints.read(tmp_path / "a", mapped=mapped) for mapped in (False, True))
        assert about == also and read.keys() == mapped.keys() and [*read["x"]] == [*mapped["x"]]
        for name, array in mapped["x"].items():
            assert_same_bits(array, read["x"][name])
            assert array.flags.aligned and not array.flags.writeable
        assert mapped["x"]["a"].base is not None  # a view: this one needs no alignment
    net = small()
    params, state = net.init()
    nn.save(tmp_path / "net", net, params, state)
    again, *groups, _ = nn.load(tmp_path / "net", mapped=True)
    assert again == net and all(array.base is not None for group in groups for array in group.values())
    pyramid = net.pyramid(np.random.default_rng(0).random((500, 3), np.float32))
    features = np.ones((len(pyramid[0].points), net.num_features), np.float32)
    results = [net(kp, *arrays, pyramid, features).logits for arrays in (groups, (params, state))]
    assert_same_bits(*results)
    nn.save(tmp_path / "net", net, net.init(1)[0], state)  # as a training does, while another process has it mapped
    for one, other in zip(groups, (params, state), strict=True):
        for name, value in other.items():
            assert_same_bits(one[name], value)


WORDS = (*b'"{}[],:0148-e.\\ \n\0\xff',)  # bytes that mean something in a header
TOKENS = (
    *(b"null", b"true", b"NaN", b"1e5", b"BF16", b"F8_E4M3", b"I8", b"BOOL", b"\\ud800", b"9223372036854775807"),
    *(b"99999999999999999999", b'"shape":[1],', b'"a":1,', b'"__metadata__":{},'),
)


@pytest.fixture(scope="module")
def valid_files():
    """Bytes of valid safetensors files: of the library, and of other programs."""
    numpy = pytest.importorskip("safetensors.numpy")
    arrays = {
        "p.a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "p.b": np.array(3.0),
        "s.é": np.zeros((0, 4), np.int8),
        "s.d": np.array([True, False]),
        "c": np.array([1 + 2j], np.complex64),
        **{f"i.{dtype}": np.arange(3).astype(dtype) for dtype in ("f2", "i8", "i4", "i2", "u8", "u4", "u2", "u1")},
    }
    other = {"b": ONE, "a": ONE | {"shape": [0], "data_offsets": [0, 0]}, "__metadata__": {"é\n": "\U0001f600"}}
    last = {"c": {"dtype": "F16", "shape": [], "data_offsets": [4, 6]}}
    return numpy.save(arrays, {"kpcore": "{}"}), safetensors_bytes(b"  " + json.dumps(other | last).encode(), b"abcdef")


@settings(max_examples=settings().max_examples // 2)  # 10 ms each
@given(
    which=st.integers(0, 1),
    changes=st.lists(
        st.tuples(
            st.integers(0, 10**4),
            st.just(0) | st.integers(0, 20),
            st.binary(max_size=3)
            | st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(bytes)
            | st.sampled_from(TOKENS),
        ),
        max_size=3,
    ),
    keeps_length=st.booleans(),
)  # fmt: skip
def test_files_are_read_as_the_library_reads_them(valid_files, tmp_path_factory, which, changes, keeps_length):
    """Mutated files: an error of one line where the library has one, else its arrays."""
    safetensors = pytest.importorskip("safetensors")
    content = valid_files[which]
    length = struct.unpack("<Q", content[:8])[0]
    for place, removed, added in changes:
        place = place % (len(content) + 1)
        more = len(content)
        content = content[:place] + added + content[place + removed :]
        length += len(content) - more if 8 <= place < 8 + length else 0
    if not keeps_length and len(content) >= 8 and length >= 0:
        content = struct.pack("<Q", length) + content[8:]
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(content)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            expected = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception:  # TypeError and AttributeError for dtypes that NumPy does not have
        expected = None
    try:
        with path.open("rb") as file:
            metadata, arrays = checkpoints._contents(file)
    except (ValueError, RecursionError) as error:
        is_stricter = "expected each name once" in str(error) or "expected dtype, shape and data_offsets" in str(error)
        assert expected is None or is_stricter
        return
    assert expected is not None and metadata == expected[0] and [*arrays] == [*expected[1]]
    for name, array in arrays.items():
        assert_same_bits(array, expected[1][name])
        assert array.flags.writeable and array.flags.owndata


def test_a_file_that_becomes_shorter_while_it_is_read():
    content = safetensors_bytes({"a": ONE}, b"abcd")

    class Shorter(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer).cast("B")[:2])

    with pytest.raises(ValueError, match="'a': expected 4 bytes, got fewer"):
        checkpoints._contents(Shorter(content))


@pytest.mark.parametrize(
    "net", [small(), nn.KPNeXt((1, 1), 1, 2, 0.1, width=16, num_neighbors=(4, 4))], ids=["Network", "KPNeXt"]
)
def test_a_network_is_loaded_with_numpy_and_scipy_alone(tmp_path, net):
    pytest.importorskip("safetensors")
    params, state = net.init()
    nn.save(tmp_path / "a", net, params, state, names=["a", "b"])
    code = f"""
import sys
for name in ("safetensors", "torch", "tqdm", "matplotlib", "jax", "cupy", "laspy", "yaml"):
    sys.modules[name] = None  # importing it is an error
import numpy as np, kpcore as kp, kpcore.pipeline.training, kpcore.pipeline.segmentation
net, params, state, more = kp.nn.load({str(tmp_path / "a")!r})
pyramid = net.pyramid(np.random.default_rng(0).random((300, 3), np.float32))
logits = net(kp, params, state, pyramid, np.ones((len(pyramid[0].points), net.num_features), np.float32)).logits
np.save({str(tmp_path / "logits.npy")!r}, logits)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    pyramid = net.pyramid(np.random.default_rng(0).random((300, 3), np.float32))
    ones = np.ones((len(pyramid[0].points), net.num_features), np.float32)
    assert_same_bits(np.load(tmp_path / "logits.npy"), net(kp, params, state, pyramid, ones).logits)


def test_paths_that_are_no_model_files(tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        nn.load(tmp_path / "none")
    assert missing.value.filename == str(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is not a regular file"):
        nn.load(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"expected a file, got a folder$"):
        nn.load(tmp_path)
    (tmp_path / "best.safetensors").touch()
    with pytest.raises(ValueError, match=r"expected a file, got a folder; there is .*best\.safetensors"):
        nn.load(tmp_path)


KPNEXT = {"depths": (1, 1), "width": 16, "num_neighbors": (4, 4)}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *[("Network", {"architecture": blocks_of}) for blocks_of in (3, [3], "simple", ["unary"] * 10**5, [], None)],
        *[("Network", {"architecture": ["max_pool"] * levels + ["global_average"]}) for levels in (16, 10**5)],
        *[(kind, {"width": width}) for kind in ("Network", "KPNeXt") for width in (10**9, 2**62, 10**30, -4, "8", 8.0)],
        *[("Network", {name: 10**9}) for name in ("decoder_width", "head_width", "num_features", "num_classes")],
        *[("Network", {name: 1e30}) for name in ("conv_radius", "deform_radius", "extent", "voxel_size", "slope")],
        *[("Network", {"kernel_size": size}) for size in (10**9, 0, None, [5])],
        *[("KPNeXt", {"depths": depths}) for depths in ([10**9], [1] * 17, [999, 999], [], "ab", 3)],
        ("KPNeXt", {"num_neighbors": [10**9, 10**9]}),
        *[("KPNeXt", {"shells": shells}) for shells in ([1, 10**9], [1] + [999] * 3)],
        *[("KPNeXt", {"grid_factor": factor}) for factor in (1e30, 1e300, float("nan"))],
        ("KPNeXt", {"radius": 1e30}),
        ("Network", {"hue": 3}),
        ("Network", {"norm": 3}),
        ("Network", {"momentum": float("nan")}),
    ],
)
def test_networks_in_files_are_bounded(tmp_path, kind, changes):
    """Loading takes the memory of the arrays in the file, in megabytes, however large a network it describes."""
    pytest.importorskip("safetensors")
    net = nn.KPNeXt(num_features=1, num_classes=2, voxel_size=0.1, **KPNEXT) if kind == "KPNeXt" else small()
    nn.save(tmp_path / "a", net, *net.init())
    groups, about = checkpoints.read(tmp_path / "a")
    about["network"] |= changes
    checkpoints.write(tmp_path / "a", groups, about)
    tracemalloc.start()
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a'}: ")) as refused:
        nn.load(tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(refused.value) and peak < 64e6


def test_arrays_in_files_are_those_of_the_network(tmp_path):
    pytest.importorskip("safetensors")
    net = small()
    params, state = net.init()
    name = next(iter(params))
    bias = params["head.1.bias"]
    for groups, said in (
        ((params | {"x": bias}, state), "params: expected only what the architecture has, got x too"),
        ((params, state | {"x": bias}), "state: expected only what the architecture has, got x too"),
        (({k: v for k, v in params.items() if k != name}, state), rf"params: expected {re.escape(name)} .*, which the"),
        ((params, {}), "state: expected"),
        (({}, {}), "params: expected"),
        ((params | {"head.1.bias": bias[:-1]}, state), r"params: expected head\.1\.bias \(\d+,\), got"),
        ((params | {"head.1.bias": bias.astype(np.int32)}, state), "in float64, got float32, int32"),
        ((params | {"head.1.bias": bias.astype(np.float64)}, state), "got float32, float64"),
        (({k: v.astype(np.float16) for k, v in params.items()}, state), "got float16, float32"),
    ):
        nn.save(tmp_path / "a", net, *groups)
        with pytest.raises(ValueError, match=rf"a: .*{said}"):
            nn.load(tmp_path / "a")
    double = net.init(dtype=np.float64)
    nn.save(tmp_path / "a", net, *double)
    assert nn.load(tmp_path / "a")[1][name].dtype == np.float64


def test_networks_of_too_many_parameters_are_not_begun(monkeypatch):
    size = sum(value.size for values in small().init() for value in values.values())
    monkeypatch.setattr(blocks, "MOST_PARAMETERS", size)
    small().init()
    monkeypatch.setattr(blocks, "MOST_PARAMETERS", size - 1)
    with pytest.raises(ValueError, match=f"width: expected a network of at most {size - 1:,} parameters, got more"):
        small().init()
