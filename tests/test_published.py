"""Imports of checkpoints of published code: outputs, losses and gradients are those that it gives."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from reference import assert_same_bits

import kpcore as kp
from kpcore import nn
from kpcore.nn import checkpoints

GOLDEN = Path(__file__).parent / "golden"
OPEN3D_ML = {
    "architecture": ["simple", "resnetb", "resnetb_strided", "resnetb", "resnetb_deformable", "nearest_upsample",
                     "unary"],
    "first_subsampling_dl": 0.12, "conv_radius": 2.5, "deform_radius": 5.0, "KP_extent": 1.2, "KP_influence": "linear",
    "aggregation_mode": "sum", "batch_norm_momentum": 0.02, "repulse_extent": 1.2, "deform_fitting_power": 1.0,
    "modulated": False, "use_batch_norm": True, "num_classes": 5, "first_features_dim": 16, "in_features_dim": 3,
    "num_kernel_points": 15, "in_points_dim": 3,
}  # fmt: skip
_NOWHERE = 1e6  # in arrays that no recorded array is imported to
KPCONVX = {
    "shell_sizes": [1, 14], "kp_radius": 2.1, "kp_sigma": 2.1, "radius_scaling": 2.2, "init_sub_size": 0.14,
    "in_sub_size": 0.14, "in_sub_mode": "grid", "neighbor_limits": [10, 12, 10], "inv_grp_norm": True, "inv_groups": 8,
    "inv_act": "sigmoid", "first_inv_layer": 1, "kp_influence": "linear", "kp_aggregation": "nearest", "norm": "batch",
    "bn_momentum": 0.1, "grid_pool": True, "decoder_layer": True, "kpx_upcut": False, "channel_scaling": 1.41, "dim": 3,
    "share_kp": True, "kp_mode": "kpconvx", "drop_path_rate": 0.3,
}  # fmt: skip
GEOTRANSFORMER = {"init_voxel_size": 0.12, "base_radius": 2.5, "base_sigma": 2.0, "group_norm": 2}
PREDATOR = {"first_subsampling_dl": 0.12, "conv_radius": 2.5, "KP_extent": 2.0}


def relative(got, expected):
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()


def lattice():
    """Points on a lattice, most of which lie on faces of voxels of size 0.03."""
    return (np.random.default_rng(0).integers(0, 16, (800, 3)) * 0.015 - 0.3).astype(np.float32)


class Case:
    """A recorded network: what the published code was called with, what it gave, and the same network imported."""

    def __init__(self, name, load, pools="pools", upsamples="upsamples"):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {key.removeprefix("net/"): file[key] for key in file}
        self.inputs = {key[3:]: value for key, value in arrays.items() if key.startswith("in/")}
        self.out = {key[4:]: value for key, value in arrays.items() if key.startswith("out/")}
        self.state_dict, self.load = self.part(self.inputs, "state/"), load
        self.net, self.params, self.state = load(self.state_dict)
        self.levels = [self.level(number, pools, upsamples) for number in range(self.net.num_levels)]

    @staticmethod
    def part(arrays, start):
        return {key.removeprefix(start): value for key, value in arrays.items() if key.startswith(start)}

    def level(self, number, pools, upsamples):
        def listed(kind, of=0):
            return kp.Neighbors.from_padded(self.inputs[f"{kind}/{number}"], len(self.inputs[f"points/{number + of}"]))

        splits = kp.row_splits(self.inputs[f"lengths/{number}"].astype(np.int64))
        between = [listed(pools), listed(upsamples, of=1)] if number + 1 < self.net.num_levels else [None, None]
        points = self.inputs[f"points/{number}"]
        return kp.Level(points, splits, None, None, 0.0, 0.0, listed("neighbors"), *between)

    def named(self, start):
        """Recorded arrays, such as gradients of parameters, as {name in the imported network: array}.

        They are imported in the place of the arrays that they belong to, and those that were changed are returned.
        """
        recorded = self.part(self.out, start)
        nowhere = {name: np.full(np.shape(value), _NOWHERE, np.float32) for name, value in self.state_dict.items()}
        _, params, state = self.load(nowhere | recorded)
        known = {name: value for name, value in (params | state).items() if (value != _NOWHERE).any()}
        assert len([name for name in known if name in params or "norm" in name]) >= len(recorded) > 0
        return {name: value for name, value in known.items() if not (name.endswith(("scale", "shift")) and (
            value == value.flat[0]).all())}  # fmt: skip

    def trained(self):
        """(tensors of the parameters, loss, result) of a training pass."""
        tensors = {name: kp.autodiff.Tensor(value) for name, value in self.params.items()}
        result = self.net(kp, tensors, self.state, self.levels, self.inputs["features"], training=True)
        loss = entropy = kp.softmax_cross_entropy(result.logits, self.inputs["labels"])
        if result.regularization is not None:
            loss = entropy + result.regularization
            np.testing.assert_allclose(entropy.value, self.out["output_loss"], rtol=2e-6)
            np.testing.assert_allclose(result.regularization.value, self.out["reg_loss"], rtol=2e-6)
        loss.backward()
        return tensors, loss, result


@functools.cache
def case(name):
    """The recorded network of a client, which tests do not change."""
    if name == "open3d-ml":
        return Case("clients_network_open3dml", lambda state: nn.import_open3d_ml(state, OPEN3D_ML))
    if name == "geotransformer":
        return Case("clients_network_geotransformer", lambda state: nn.import_geotransformer(state, GEOTRANSFORMER),
                    "subsampling", "upsampling")  # fmt: skip
    if name == "predator":
        return Case("clients_network_predator", lambda state: nn.import_predator(state, PREDATOR))
    config = KPCONVX | {"kp_mode": name}
    return Case(f"clients_network_kpnext_{name}", lambda state: nn.import_kpconvx(state, config))


# ---- against the published code


@pytest.mark.parametrize("name", ["open3d-ml", "kpconvx", "kpconvd"])
def test_networks_that_label_points(name):
    one = case(name)
    logits = one.net(kp, one.params, one.state, one.levels, one.inputs["features"]).logits
    assert relative(logits, one.out["logits_eval"]) < 3e-5
    tensors, loss, result = one.trained()
    assert relative(result.logits.value, one.out["logits_train"]) < 3e-5
    np.testing.assert_allclose(loss.value, one.out["loss"], rtol=2e-6)
    for key, value in one.named("grad/").items():
        assert relative(tensors[key].grad, value) < 3e-5, key
    after = {key: value for key, value in one.named("state_after/").items() if key.endswith(("mean", "variance"))}
    assert len(after) >= 10
    for key, value in after.items():
        assert relative(result.state[key], value) < 3e-5, key


def test_the_backbone_of_geotransformer():
    one = case("geotransformer")
    assert (one.net.output_level, one.net.reach) == (1, None)
    tensors, levels = {name: kp.autodiff.Tensor(value) for name, value in one.params.items()}, {}
    result = one.net(kp, tensors, one.state, one.levels, one.inputs["features"],
                     observe=lambda name, level, out: levels.update({level: out}))  # fmt: skip
    feats = [levels[level] for level in (1, 2, 3)]
    assert result.logits is feats[0]
    loss = 0
    for number, out in enumerate(feats):
        assert relative(out.value, one.out[f"feats/{number}"]) < 3e-5
        out.backward(one.inputs[f"grad_outputs/{number}"])
        loss += (out.value * one.inputs[f"grad_outputs/{number}"]).sum(dtype=np.float64)
    np.testing.assert_allclose(loss, one.out["loss"], rtol=3e-5)
    for key, value in one.named("grad/").items():
        assert relative(tensors[key].grad, value) < 3e-5, key


def graph_network(torch, arrays, points, split, nearest):
    """The part of Predator between encoder and decoder, which is not imported, on features (N, C)."""
    state = {name: value.reshape(value.shape[:2]) if value.ndim > 2 else value for name, value in arrays.items()}

    def linear(x, name):
        out = x @ state[f"{name}.weight"].T
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out

    def normalized(x):
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) / (x.var(axes, correction=0) + 1e-5).sqrt()

    def leaky(x):
        return torch.nn.functional.leaky_relu(x, 0.2)

    def self_attention(points, x, name):
        order = torch.cdist(points, points).topk(nearest + 1, largest=False).indices[:, 1:]

        def edges(x):
            center = x[:, None].expand(-1, nearest, -1)
            return torch.cat([center, x[order] - center], dim=2)

        first = leaky(normalized(linear(edges(x), f"{name}.conv1"))).amax(1)
        second = leaky(normalized(linear(edges(first), f"{name}.conv2"))).amax(1)
        return leaky(normalized(linear(torch.cat([x, first, second], dim=1), f"{name}.conv3")))

    def cross_attention(x, other, name):
        query, key, value = (
            linear(one, f"{name}.attn.proj.{number}").reshape(len(one), -1, 4)  # (N, channels, 4 heads)
            for number, one in enumerate((x, other, other))
        )
        weights = torch.softmax(torch.einsum("nch,mch->hnm", query, key) / query.shape[1] ** 0.5, dim=2)
        message = linear(torch.einsum("hnm,mch->nch", weights, value).reshape(len(x), -1), f"{name}.attn.merge")
        hidden = torch.relu(normalized(linear(torch.cat([x, message], dim=1), f"{name}.mlp.0")))
        return linear(hidden, f"{name}.mlp.3")

    def between(x):
        x = linear(x, "bottle")
        source, target = x[:split], x[split:]
        for number, kind in enumerate(("self", "cross", "self")):
            name = f"gnn.layers.{number}"
            if kind == "self":
                source, target = (
                    self_attention(at, x, name) for at, x in ((points[:split], source), (points[split:], target))
                )
            else:
                source = source + cross_attention(source, target, name)
                target = target + cross_attention(target, source, name)
        x = linear(torch.cat([source, target]), "proj_gnn")
        scores = linear(x, "proj_score")
        direction = torch.nn.functional.normalize(x, dim=1)
        products = direction[:split] @ direction[split:].T / (torch.exp(state["epsilon"]) + 0.03)
        saliency = torch.cat([
            torch.softmax(products, dim=1) @ scores[split:], torch.softmax(products.T, dim=1) @ scores[:split]
        ])  # fmt: skip
        return torch.cat([scores, saliency, x], dim=1)

    return between


def test_predator_with_its_graph_network_between_encoder_and_decoder():
    torch = pytest.importorskip("torch")
    kpt = pytest.importorskip("kpcore.torch")
    one = case("predator")
    not_imported = ("epsilon", "bottle", "gnn", "proj_gnn", "proj_score")
    arrays = {name: torch.tensor(value, requires_grad=True) for name, value in one.state_dict.items()
              if name.split(".")[0] in not_imported}  # fmt: skip
    coarsest = one.levels[-1]
    gnn = graph_network(torch, arrays, torch.tensor(coarsest.points), int(coarsest.row_splits[1]),
                        int(one.inputs["dgcnn_k"]))  # fmt: skip
    seen = []
    module = kpt.Network(one.net, one.params, one.state)
    levels = [
        level._replace(points=torch.tensor(level.points), row_splits=torch.tensor(level.row_splits))
        for level in one.levels
    ]
    features = torch.tensor(one.inputs["features"])
    out, _ = module(levels, features, between=lambda x: gnn(seen.append(x) or x))
    assert relative(seen[0].detach(), one.out["encoder"]) < 3e-5
    feats = torch.nn.functional.normalize(out[:, :-2], dim=1)
    overlap, saliency = torch.sigmoid(out[:, -2]), torch.sigmoid(out[:, -1])
    for got, name in ((feats, "feats"), (overlap, "scores_overlap"), (saliency, "scores_saliency")):
        assert relative(got.detach(), one.out[name]) < 1e-4  # Predator's float32 differs from float64 by 2e-5
    loss = (feats * torch.tensor(one.inputs["grad_feats"])).sum() + overlap.sum() - 0.5 * saliency.sum()
    loss.backward()
    np.testing.assert_allclose(loss.detach(), one.out["loss"], rtol=1e-5)
    grads = {name: value.grad for name, value in module.named_parameters()}
    expected = Case.part(one.out, "grad/")
    for name in ("proj_gnn.weight", "proj_score.weight"):
        assert relative(arrays[name].grad, expected[name]) < 2e-4, name
    named = one.named("grad/")
    assert len(named) == 4
    for name, value in named.items():
        assert relative(grads[name], value) < 2e-4, name


def by_coordinates(points):
    return np.lexsort(points.round(4).T)


def sets(neighbors, queries, points, first=None):
    """The neighbours of each query by the numbers that `points` gives them, or only the first of each."""
    rows = np.split(neighbors.index[: neighbors.row_splits[-1]], neighbors.row_splits[1:-1])
    return [{int(points[i]) for i in rows[query][:first]} for query in queries]


@pytest.mark.parametrize("name", ["open3d-ml", "kpconvx", "kpconvd", "geotransformer", "predator"])
def test_pyramids_of_an_imported_network_are_the_published_ones(name):
    one = case(name)
    limits = {} if "kpconv" in name else {"neighbor_limits": one.inputs["neighbor_limits"].tolist()}
    built = one.net.pyramid(one.levels[0].points, row_splits=one.levels[0].row_splits, subsampled=True, **limits)
    orders = [[by_coordinates(level.points) for level in levels] for levels in (built, one.levels)]
    numbers = [[np.argsort(order) for order in of_levels] for of_levels in orders]
    for level, (got, expected) in enumerate(zip(built, one.levels, strict=True)):
        assert got.row_splits.tolist() == expected.row_splits.tolist()
        assert np.abs(got.points[orders[0][level]] - expected.points[orders[1][level]]).max() < 1e-6
        lists = [("neighbors", level, level, None)]
        if level + 1 < len(built):
            lists += [("pools", level + 1, level, None), ("upsamples", level, level + 1, 1)]
        for kind, queries, points, first in lists:
            both = [
                sets(getattr(levels[level], kind), order[queries], number[points], first)
                for levels, order, number in zip((built, one.levels), orders, numbers, strict=True)
            ]
            assert both[0] == both[1], (level, kind)


# ---- KPConv-PyTorch


def published(name):
    """(network, params, state, pyramid, inputs and results of KPConv-PyTorch, the function that imports)."""
    golden = dict(np.load(GOLDEN / f"network_{name}.npz"))
    config = {}
    for line in golden["config"]:
        key, value = str(line).split("=")
        config[key] = float(value) if "." in value else int(value)
    state_dict = {key[6:]: value for key, value in golden.items() if key.startswith("state/")}

    def load(more=()):
        return nn.import_kpconv_pytorch(state_dict | dict(more), golden["architecture"].tolist(), config)

    net, params, state = load()
    pyramid = []
    for level in range(net.num_levels):

        def listed(kind, level=level, of=0):
            return kp.Neighbors.from_padded(golden[f"{kind}/{level}"], len(golden[f"points/{level + of}"]))

        points, splits = golden[f"points/{level}"], kp.row_splits(golden[f"lengths/{level}"])
        between = [listed("pools"), listed("upsamples", of=1)] if level + 1 < net.num_levels else [None, None]
        pyramid.append(kp.Level(points, splits, None, None, 0.0, 0.0, listed("neighbors"), *between))
    return net, params, state, pyramid, golden, load


@pytest.mark.parametrize("name", ["kpcnn", "kpfcnn"])
def test_networks_of_kpconv_pytorch(name):
    net, params, state, pyramid, golden, load = published(name)
    tensors = {key: kp.autodiff.Tensor(value) for key, value in params.items()}
    result = net(kp, tensors, state, pyramid, golden["features"], training=True)
    entropy = kp.softmax_cross_entropy(result.logits, golden["labels"])
    loss = entropy + result.regularization
    loss.backward()
    assert relative(result.logits.value, golden["logits_train"]) < 2e-5
    for got, expected in ((entropy, "output_loss"), (result.regularization, "reg_loss"), (loss, "loss")):
        np.testing.assert_allclose(got.value, golden[expected], rtol=2e-6)
    recorded = {kind: {key[len(kind) :]: value for key, value in golden.items() if key.startswith(kind)}
                for kind in ("grad/", "state_after/")}  # fmt: skip
    assert len(recorded["grad/"]) == len(params)
    for key, value in load(recorded["grad/"])[1].items():
        assert relative(tensors[key].grad, value) < 1e-4, key
    after = load(recorded["state_after/"])[2]
    assert sum(not np.array_equal(after[key], state[key]) for key in state) == sum("norm" in key for key in state)
    for key, value in after.items():
        assert relative(result.state[key], value) < 2e-5, key
    logits = net(kp, params, result.state, pyramid, golden["features"]).logits
    assert relative(logits, golden["logits_eval"]) < 2e-5


def test_weights_of_classes_and_the_number_of_labels_do_not_matter():
    net, params, *_ = published("kpfcnn")
    golden = dict(np.load(GOLDEN / "network_kpfcnn.npz"))
    state_dict = {key[6:]: value for key, value in golden.items() if key.startswith("state/")}
    config = {"num_classes": 8, "first_subsampling_dl": 0.03, "deform_radius": 4.0}
    got, imported, _ = nn.import_kpconv_pytorch(
        state_dict | {"criterion.weight": np.ones(6, np.float32)}, golden["architecture"].tolist(), config
    )
    assert got == net  # 6 classes, as many as the last layer has
    for name, value in params.items():
        assert_same_bits(imported[name], value)
    # In DataParallel all names have a prefix.
    wrapped = {f"module.{name}": value for name, value in state_dict.items()}
    assert nn.import_kpconv_pytorch(wrapped, golden["architecture"].tolist(), config)[0] == net


def test_an_import_copies_the_arrays():
    state = case("open3d-ml").state_dict
    state = {name: value.copy() for name, value in state.items()}
    _, params, more = nn.import_open3d_ml(state, OPEN3D_ML)
    for name, value in (params | more).items():
        assert not any(np.shares_memory(value, other) for other in state.values()), name
        assert value.dtype == np.float32
        assert value.flags.c_contiguous


def test_an_imported_network_has_the_published_grids(tmp_path):
    net, params, state, *_ = published("kpfcnn")
    assert net.origin == "published"
    points = lattice()
    sizes = {"voxel_size": 0.03, "num_levels": net.num_levels, "deform_levels": net.deform_levels}
    sizes |= {"conv_radius": net.conv_radius, "deform_radius": net.deform_radius}

    def same(levels, origin):
        expected = kp.build_pyramid(points, origin=origin, **sizes)
        return all(np.array_equal(a.points, b.points) for a, b in zip(levels, expected, strict=True))

    assert same(net.pyramid(points), "published")
    assert not same(net.pyramid(points), 0)
    assert same(dataclasses.replace(net, origin=0).pyramid(points), 0)
    pytest.importorskip("safetensors")
    nn.save(tmp_path / "net", net, params, state)
    assert nn.load(tmp_path / "net")[0] == net
    # Files of versions without `origin` do not name it.
    groups, about = checkpoints.read(tmp_path / "net")
    del about["network"]["origin"]
    checkpoints.write(tmp_path / "old", groups, about)
    assert nn.load(tmp_path / "old")[0] == dataclasses.replace(net, origin=0)


@pytest.mark.parametrize("subsampled", [False, True])
def test_the_grids_of_kpnext(subsampled):
    points = lattice()
    net = nn.KPNeXt((1, 1, 1), 1, 2, 0.03, None, width=16, grid_factor=2, origin="published")
    expected = kp.build_pyramid(points, voxel_size=0.03, num_levels=3, subsampled=subsampled, origin="published")
    at_zero = dataclasses.replace(net, origin=0).pyramid(points, subsampled=subsampled)
    levels = net.pyramid(points, subsampled=subsampled)
    for one, other in zip(levels, expected, strict=True):
        assert_same_bits(one.points, other.points)
    assert not np.array_equal(levels[-1].points, at_zero[-1].points)


@pytest.mark.parametrize("name", ["open3d-ml", "kpconvx", "kpconvd", "geotransformer", "predator"])
def test_imported_networks_are_saved_and_loaded(name, tmp_path):
    pytest.importorskip("safetensors")
    one = case(name)
    nn.save(tmp_path / "net", one.net, one.params, one.state)
    net, params, state, _ = nn.load(tmp_path / "net")
    assert net == one.net
    assert hash(net) == hash(one.net)
    for got, expected in ((params, one.params), (state, one.state)):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_bits(got[key], value)
    # Files of versions without the later fields do not name them, and describe networks that do not have them.
    groups, about = checkpoints.read(tmp_path / "net")
    later = {"bias", "norm_affine", "norm_together", "logits_slope", "bottleneck_width", "extent", "head_width"}
    old = about["network"].keys() - later - ({"head_norm"} if "kpconv" in name else set())
    about["network"] = {key: about["network"][key] for key in old | ({"extent", "head_width"} if "Network" in str(
        about["network"]["kind"]) else set())}  # fmt: skip
    checkpoints.write(tmp_path / "old", groups, about)
    if "kpconv" in name:
        assert nn.load(tmp_path / "old")[0] == net
    elif name == "open3d-ml":
        assert nn.load(tmp_path / "old")[0] == dataclasses.replace(net, logits_slope=None)
    else:  # its arrays do not fit a network without the fields
        with pytest.raises(ValueError, match=r"old: (params|state): expected"):
            nn.load(tmp_path / "old")


def under_published_names(values, norm):
    """A state_dict with the names of KPConv-PyTorch."""
    leaves = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
    renamed = {}
    for name, value in values.items():
        first, number, *layers, leaf = name.split(".")
        if first == "head":
            part = "head_mlp" if number == "0" else "head_softmax"
            renamed[f"{part}.{'batch_norm.bias' if leaf == 'bias' else 'mlp.weight'}"] = value.T
            continue
        path = [f"{first}_blocks", number]
        for i, layer in enumerate(layers):
            if layer == "norm":
                of_block = first == "encoder" and number != "0" and i == 0
                path.append("batch_norm_conv" if of_block else "batch_norm")
                path += ["batch_norm"] * (norm == "batch")
                leaf = leaves[leaf]
            else:
                path.append("KPConv" if layer == "conv" else layer)
        if leaf == "weights" and "KPConv" not in path:
            renamed[".".join([*path, "mlp.weight"])] = value.T
        else:
            renamed[".".join([*path, leaf])] = value
    return renamed


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("modulated", [False, True])
def test_the_import_of_other_settings(norm, modulated):
    net = nn.kpfcnn(3, 5, 0.1, levels=2, deformable=1, width=16, modulated=modulated, norm=norm, pool_pad_value=0.0,
                    origin="published")  # fmt: skip
    params, state = net.init(4)
    config = {
        "num_classes": 5, "in_features_dim": 3, "first_features_dim": 16, "first_subsampling_dl": 0.1,
        "modulated": int(modulated), "use_batch_norm": int(norm is not None), "batch_norm_momentum": 0.02,
        "dataset": "S3DIS",
    }  # fmt: skip
    tensors = under_published_names(params | state, norm)
    assert ("encoder_blocks.1.unary2.batch_norm.bias" in tensors) == (norm is None)
    assert tensors["encoder_blocks.4.KPConv.offset_bias"].shape == (15 * (4 if modulated else 3),)
    got, *imported = nn.import_kpconv_pytorch(tensors, net.architecture, config)
    assert got == net
    for one, other in zip(imported, (params, state), strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert_same_bits(one[name], value)


# ---- other settings of the other clients


def test_settings_of_open3d_ml():
    state = case("open3d-ml").state_dict

    def load(**more):
        return nn.import_open3d_ml(state, OPEN3D_ML | more)[0]

    # In that project the setting is the weight of the running statistics, 0.02 unless a file has it.
    assert load(batch_norm_momentum=0.98).momentum == pytest.approx(0.02)
    without = {name: value for name, value in OPEN3D_ML.items() if name != "batch_norm_momentum"}
    assert nn.import_open3d_ml(state, without)[0].momentum == 0.98
    assert (load().slope, load().logits_slope) == (0.1, 0.1)
    assert (load(l_relu=0.2).slope, load(l_relu=0.2).logits_slope) == (0.2, 0.2)
    # With reduce_fc the layers after the upsampling have half the channels, the head is normalised, the logits linear.
    half = nn.kpfcnn(3, 5, 0.12, levels=2, width=16, decoder_width=8, head_width=8, head_norm=True)
    params, more = half.init(1)
    tensors = under_published_names({k: v for k, v in (params | more).items() if "head.0.norm" not in k}, "batch")
    leaves = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
    for leaf, published_leaf in leaves.items():
        tensors[f"head_mlp.batch_norm.batch_norm.{published_leaf}"] = (params | more)[f"head.0.norm.{leaf}"]
    config = OPEN3D_ML | {"architecture": list(half.architecture), "reduce_fc": True}
    net, imported, _ = nn.import_open3d_ml(tensors, config)
    assert (net.decoder_width, net.head_width, net.head_norm, net.logits_slope) == (8, 8, True, None)
    for name, value in params.items():
        assert_same_bits(imported[name], value)


def classifier_of_kpconvx():
    """The arrays of a KPNeXt that classifies, by their published names."""
    state = case("kpconvd").state_dict
    kept = {name: value for name, value in state.items() if not name.startswith(("decoder", "head"))}
    rng = np.random.default_rng(0)
    shapes = {
        "head.0.mlp.weight": (24, 32),
        "head.0.norm.norm.bias": (24,),
        "head.2.weight": (7, 24),
        "head.2.bias": (7,),
    }
    return kept | {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_classifier_of_kpconvx():
    one, tensors = case("kpconvd"), classifier_of_kpconvx()
    net, params, state = nn.import_kpconvx(tensors, KPCONVX | {"kp_mode": "kpconvd", "num_classes": 7})
    assert (net.segments, net.num_classes, net.head_width, net.head_norm, net.dropout) == (False, 7, 24, False, 0.4)
    levels = {}
    logits = net(kp, params, state, one.levels, one.inputs["features"],
                 observe=lambda name, level, out: levels.update({level: out})).logits  # fmt: skip
    means = kp.segment_reduce(levels[2], one.levels[2].row_splits, "mean")
    hidden = means @ tensors["head.0.mlp.weight"].T + tensors["head.0.norm.norm.bias"]
    hidden = np.where(hidden > 0, hidden, np.float32(0.1) * hidden)
    assert relative(logits, hidden @ tensors["head.2.weight"].T + tensors["head.2.bias"]) < 1e-5


def test_settings_of_kpconvx():
    state = case("kpconvx").state_dict

    def load(more=(), **changed):
        return nn.import_kpconvx(state | dict(more), KPCONVX | changed)[0]

    assert (load().radius, load().extent) == (2.1, None)
    assert load(kp_sigma=1.5).extent == 1.5
    # Levels with larger voxels than the scenes: the published extent stays that of the scenes.
    net = load(in_sub_size=0.28)
    assert (net.voxel_size, net.radius, net.extent) == (0.28, 2.1, pytest.approx(1.05))
    net = load(in_sub_size=0.07)
    assert (net.voxel_size, net.radius, net.extent) == (0.07, pytest.approx(4.2), None)
    assert load(in_sub_size=-1.0).voxel_size == 0.14
    assert load({"criterion.weight": np.ones(5)}) == load()
    # Without the normalisation, the published layer has its arrays, but does not use them.
    one = case("kpconvx")
    net, params, more = nn.import_kpconvx(state, KPCONVX | {"inv_grp_norm": False})
    assert not net.attention_norm
    assert not any("attention.norm" in name for name in params)
    assert relative(net(kp, params, more, one.levels, one.inputs["features"]).logits, one.out["logits_eval"]) > 1e-3
    for changed, message in (
        ({"init_sub_size": -1.0}, r"expected init_sub_size and kp_sigma above 0, got -1 and 2\.1: their product"),
        ({"kp_aggregation": "sum"}, r"config: expected kp_aggregation 'nearest', as kpcore\.nn\.KPNeXt has, got 'sum'"),
        ({"kp_mode": "kpconv"}, "expected kp_mode 'kpconvx' or 'kpconvd'"),
        ({"kpx_upcut": True}, "expected kpx_upcut False"), ({"grid_pool": False}, "expected grid_pool True"),
        ({"decoder_layer": False}, "expected decoder_layer True"),
        ({"norm": "layer"}, "expected norm 'batch' or 'none'"),
        ({"inv_act": "softmax"}, "expected inv_act 'sigmoid'"),
        ({"inv_groups": 4}, "expected inv_groups 8, as of the arrays, got 4"),
        ({"channel_scaling": 2}, r"with which stages have \(16, 32, 32\) channels, .*, got \(16, 32, 64\)"),
        ({"shell_sizes": [1, 13]}, r"other shape: stem\.conv\.weights: expected \(14, 1, 5, 16\)"),
        ({"neighbor_limits": None}, "config: expected neighbor_limits, got none"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load(**changed)
    with pytest.raises(ValueError, match="got attention in the first stage"):
        load({"encoder_1.0.conv.alpha_mlp.3.weight": np.zeros((30, 16))})
    with pytest.raises(ValueError, match=r"expected stem\.conv\.weights with 4 axes, got \(3,\)"):
        load({"stem.conv.weights": np.zeros(3)})
    with pytest.raises(ValueError, match="expected arrays of encoder_1"):
        nn.import_kpconvx({"stem.conv.weights": np.zeros((15, 1, 5, 16))}, KPCONVX)


def test_settings_of_geotransformer_and_predator():
    one, other = case("geotransformer"), case("predator")
    absolute = {"init_voxel_size": 0.12, "init_radius": 0.3, "init_sigma": 0.24, "group_norm": 2}
    whole = {f"backbone.{name}": value for name, value in one.state_dict.items()}
    whole["transformer.embedding.proj_d.weight"] = np.zeros((4, 4))
    net, params, state = nn.import_geotransformer(whole, absolute)
    assert net == dataclasses.replace(one.net, conv_radius=net.conv_radius, extent=net.extent)
    assert (net.conv_radius, net.extent) == (pytest.approx(2.5), pytest.approx(2.0))
    for name, value in (one.params | one.state).items():
        assert_same_bits((params | state)[name], value)
    assert one.net.architecture == (
        "simple", "resnetb", *("resnetb_strided", "resnetb", "resnetb") * 3, "nearest_upsample", "unary",
        "nearest_upsample", "last_unary",
    )  # fmt: skip
    # Three stages whose decoder reaches the finest, as for ModelNet.
    state = {name: value for name, value in one.state_dict.items() if not name.startswith(("encoder4", "decoder"))}
    state |= {"decoder2.mlp.weight": np.zeros((16, 48)), "decoder2.mlp.bias": np.zeros(16),
              "decoder2.norm.norm.weight": np.zeros(16), "decoder2.norm.norm.bias": np.zeros(16),
              "decoder1.mlp.weight": np.zeros((6, 24)), "decoder1.mlp.bias": np.zeros(6)}  # fmt: skip
    net = nn.import_geotransformer(state, GEOTRANSFORMER)[0]
    assert (net.num_levels, net.output_level, net.num_classes) == (3, 0, 6)
    for changed, message in (({"init_voxel_size": None}, "config: expected init_voxel_size, got none"),
                             ({"base_radius": None}, "base_radius: expected a number"),
                             ({"kernel_size": 9}, "config: expected kernel_size 15, as of the arrays, got 9"),
                             ({"output_dim": 3}, "config: expected output_dim 8, as of the arrays, got 3"),
                             ({"group_norm": None}, "config: expected group_norm")):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            nn.import_geotransformer(one.state_dict, GEOTRANSFORMER | changed)
    with pytest.raises(ValueError, match="config: expected init_sigma, got none"):
        nn.import_geotransformer(one.state_dict, {"init_voxel_size": 0.1, "base_radius": 2.5, "group_norm": 2})
    with pytest.raises(
        ValueError, match=r"expected arrays of encoder1_1, encoder1_2, \.\.\. and of decoders, got none"
    ):
        nn.import_geotransformer({"backbone.encoder1_1.KPConv.bias": np.zeros(4)}, GEOTRANSFORMER)
    assert other.net.architecture == (
        "simple", "resnetb", "resnetb_strided", "resnetb", "resnetb_strided", "resnetb", "nearest_upsample", "unary",
        "nearest_upsample", "last_unary",
    )  # fmt: skip
    assert other.net.decoder_width == (4, 9)
    with pytest.raises(ValueError, match="config: expected conv_radius, KP_extent, got none"):
        nn.import_predator(other.state_dict, {"first_subsampling_dl": 0.1})
    for groups in (3, 32):
        with pytest.raises(
            ValueError, match=rf"config: expected a group_norm that divides the channels of .* got {groups}"
        ):
            nn.import_geotransformer(one.state_dict, GEOTRANSFORMER | {"group_norm": groups})
    with pytest.raises(ValueError, match=r"expected decoder_blocks\.-1\.mlp\.weight with 2 axes, got none"):
        state = {name: value for name, value in other.state_dict.items() if not name.startswith("decoder")}
        nn.import_predator(state, PREDATOR)


# ---- what does not fit


def test_an_import_lists_all_arrays_that_do_not_fit():
    one = case("open3d-ml")
    state = dict(one.state_dict)
    del state["encoder_blocks.1.unary1.mlp.weight"], state["decoder_blocks.1.mlp.weight"]
    state["head_mlp.mlp.weight"] = np.zeros((16, 17), np.float32)
    state |= {
        "extra.weight": np.zeros(3),
        "epoch": np.zeros(()),
        "encoder_blocks.9.KPConv.weights": np.zeros((15, 4, 4)),
    }
    with pytest.raises(ValueError) as refused:
        nn.import_open3d_ml(state, OPEN3D_ML)
    assert str(refused.value).splitlines() == [
        "state_dict: expected the arrays of Open3D-ML with these settings, got 2 missing, 1 other shape, 3 left over",
        "missing: encoder_blocks.1.unary1.mlp.weight (4, 8)",
        "missing: decoder_blocks.1.mlp.weight (16, 48)",
        "other shape: head_mlp.mlp.weight: expected (16, 16), got (16, 17)",
        "left over: extra.weight (3,)",
        "left over: epoch ()",
        "left over: encoder_blocks.9.KPConv.weights (15, 4, 4)",
    ]
    # Settings of another network.
    with pytest.raises(
        ValueError, match=r"other shape: encoder_blocks\.0\.KPConv\.weights: expected \(15, 4, 8\), got \(15, 3, 8\)"
    ):
        nn.import_open3d_ml(one.state_dict, OPEN3D_ML | {"in_features_dim": 4})


def test_an_import_says_which_client_the_names_look_like():
    states = {name: case(name).state_dict for name in ("open3d-ml", "kpconvx", "geotransformer", "predator")}
    functions = {
        "open3d-ml": (nn.import_open3d_ml, OPEN3D_ML), "kpconvx": (nn.import_kpconvx, KPCONVX),
        "geotransformer": (nn.import_geotransformer, GEOTRANSFORMER), "predator": (nn.import_predator, PREDATOR),
    }  # fmt: skip
    for name, (function, config) in functions.items():
        for other, state in states.items():
            if other != name:
                with pytest.raises(ValueError, match=rf"state_dict: expected names of .*: use .*\(--from {other}\)"):
                    function(state, config)
    kpcnn = {"block_ops.0.KPConv.weights": np.zeros((15, 1, 8))}
    with pytest.raises(ValueError, match=r"got those of KPConv-PyTorch, such as block_ops\.0\.KPConv\.weights: use "
                                         r"kpcore\.nn\.import_kpconv_pytorch \(--from kpconv-pytorch\)"):  # fmt: skip
        nn.import_open3d_ml(kpcnn, OPEN3D_ML)
    # KPFCNN has the same names in both projects.
    net = nn.import_kpconv_pytorch(states["open3d-ml"], OPEN3D_ML["architecture"], OPEN3D_ML)[0]
    assert net.logits_slope is None


def test_an_import_without_arrays_or_settings():
    architecture = OPEN3D_ML["architecture"]
    with pytest.raises(ValueError, match="config: expected first_subsampling_dl, got none"):
        nn.import_kpconv_pytorch({}, architecture, {})
    with pytest.raises(ValueError, match=r"missing: encoder_blocks\.0\.KPConv\.weights"):
        nn.import_kpconv_pytorch({}, architecture, OPEN3D_ML)
    with pytest.raises(TypeError, match="architecture: expected a list or tuple of str, got 'simple'"):
        nn.import_kpconv_pytorch({}, "simple", OPEN3D_ML)
    with pytest.raises(ValueError, match="config: expected architecture, first_subsampling_dl, conv_radius, KP_extent"):
        nn.import_open3d_ml({}, {})
    with pytest.raises(ValueError, match="config: expected deform_radius, got none"):
        nn.import_open3d_ml({}, {name: value for name, value in OPEN3D_ML.items() if name != "deform_radius"})
    with pytest.raises(TypeError, match=r"expected dense arrays or tensors .* on the CPU, got <class 'dict'> for"):
        nn.import_open3d_ml({"optimizer": {}}, OPEN3D_ML)
    for function in (nn.import_predator, nn.import_geotransformer, nn.import_kpconvx):
        with pytest.raises(ValueError, match=r"expected arrays of|expected stem|config: expected"):
            function({}, PREDATOR | GEOTRANSFORMER | KPCONVX)


def test_tensors_of_torch_are_imported():
    torch = pytest.importorskip("torch")
    one = case("open3d-ml")
    tensors = {name: torch.tensor(value) for name, value in one.state_dict.items()}
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        converted = {name: value.to(kind) if value.is_floating_point() else value for name, value in tensors.items()}
        _, params, _ = nn.import_open3d_ml(converted, OPEN3D_ML)
        for name, value in params.items():
            assert value.dtype == np.float32
            assert relative(value, one.params[name]) < (4e-3 if kind is torch.bfloat16 else 1e-9)
    with pytest.raises(TypeError, match=r"got torch.strided, torch.float32, on meta for "):
        nn.import_open3d_ml({name: value.to("meta") for name, value in tensors.items()}, OPEN3D_ML)


def test_arrays_that_no_network_has():
    """All are refused at once: a network of 100,000 blocks would take minutes to make."""
    torch, one = pytest.importorskip("torch"), case("predator")
    first = next(iter(one.state_dict))
    for name, value, error, message in (
        (
            "encoder_blocks.100000.unary2.mlp.weight",
            np.ones((4, 4)),
            ValueError,
            "names with numbers up to 1024, got e",
        ),
        (
            "encoder_blocks.2000.unary2.mlp.weight",
            np.ones((4, 4)),
            ValueError,
            "names with numbers up to 1024, got enc",
        ),
        (first, np.full(3, np.nan), ValueError, f"expected finite numbers in float32, got NaN or infinity in {first}"),
        (first, np.full(3, 1e300), ValueError, "expected finite numbers in float32, got NaN or infinity"),
        (first, torch.tensor([1e300], dtype=torch.float64), ValueError, "expected finite numbers in float32"),
        (first, np.ones(3, complex), TypeError, "of real numbers on the CPU, got complex128 for"),
        (
            first,
            torch.ones(3, dtype=torch.complex64),
            TypeError,
            "of real numbers on the CPU, got torch.strided, .*x64",
        ),
        (first, torch.ones(3, 3).to_sparse(), TypeError, "expected dense arrays .*, got torch.sparse_coo"),
        (first, np.array(["1"]), TypeError, "of real numbers on the CPU, got <U1"),
        (first, np.ma.masked_array([1.0], [True]), TypeError, "expected dense arrays"),
        (3, np.ones(3), TypeError, "state_dict: expected arrays by name, got dict"),
    ):
        with pytest.raises(error, match=message):
            nn.import_predator(one.state_dict | {name: value}, PREDATOR)
    for wrong in (None, [1]):
        with pytest.raises(TypeError, match="state_dict: expected arrays by name, got"):
            nn.import_predator(wrong, PREDATOR)
        with pytest.raises(TypeError, match="config: expected settings by name, got"):
            nn.import_predator(one.state_dict, wrong)


def test_prefixes_of_wrapped_networks():
    one = case("open3d-ml")
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        net, *_ = nn.import_open3d_ml({prefix + name: value for name, value in one.state_dict.items()}, OPEN3D_ML)
        assert net == one.net


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kp_mode": "kpconvd"}, "expected kp_mode 'kpconvx', as of the arrays, got 'kpconvd'"),
        ({"layer_blocks": [9, 9]}, r"expected layer_blocks \[1, 1, 1\], as of the arrays, got \[9, 9\]"),
        ({"init_channels": 64}, "expected init_channels 16, as of the arrays, got 64"),
        ({"inv_grp_norm": "False"}, "expected inv_grp_norm 0 or 1, got 'False'"),
        ({"shell_sizes": "x"}, "^shell_sizes: expected a sequence of integers, got str"),
        ({"channel_scaling": "1.41"}, "channel_scaling: expected a number"),
    ],
)
def test_settings_that_contradict_the_arrays(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nn.import_kpconvx(case("kpconvx").state_dict, KPCONVX | changed)


def test_published_networks_search_within_an_exclusive_radius():
    points = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3).astype(np.float32)
    net = nn.Network(nn.architecture(1, 2), 1, 2, voxel_size=1.0, conv_radius=2.0, width=4)
    published = dataclasses.replace(net, origin="published")
    for one, inclusive in ((net, True), (published, False)):
        got = one.pyramid(points, subsampled=True)[0].neighbors
        assert np.array_equal(got.index, kp.radius_search(points, None, 2.0, inclusive=inclusive).index)
