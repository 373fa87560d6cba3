"""The published layers of kpcore.compat against recorded results of the published code, and what surrounds them."""

import copy
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from reference import assert_close

import kpcore as kp
import kpcore.compat

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import kpcore.torch as kpt  # noqa: E402
from kpcore.compat import (  # noqa: E402
    easy_kpconv,
    geotransformer,
    kpconv_pytorch,
    kpconvx,
    open3d_ml,
    padded,
    predator,
)

GOLDEN = Path(__file__).parent / "golden"
INFLUENCES = ("constant", "linear", "gaussian")
ACTIVATIONS = ("none", "sigmoid", "tanh", "softmax")
MODULES = {
    "kpconv_rigid": kpconv_pytorch, "kpconv_deform": kpconv_pytorch, "kpconv_modulated": kpconv_pytorch,
    "predator": predator, "geotransformer": geotransformer, "easykpconv": easy_kpconv, "open3dml": open3d_ml,
    "kpconvx_conv": kpconvx, "kpconvx_attention": kpconvx,
}  # fmt: skip


def golden_cases():
    """{(file, case): {name: array}} of all recorded layers."""
    cases = {}
    for file in MODULES:
        with np.load(GOLDEN / f"clients_layers_{file}.npz") as arrays:
            for key in arrays:
                case, kind, name = key.replace("/in/", " in ").replace("/out/", " out ").split(" ")
                cases.setdefault((file, case), {})[f"{kind}/{name}"] = arrays[key]
    return cases


CASES = golden_cases()
DEFORMABLE = [key for key, g in CASES.items() if "out/min_d2" in g]


def made(file, case, g):
    """The layer of a recorded case by the published constructor, in float64."""
    module, radius = MODULES[file], float(g["in/radius"])
    channels = [int(g[f"in/{name}"]) for name in ("in_channels", "out_channels", "channels") if f"in/{name}" in g]
    if module is kpconvx:
        layer = getattr(kpconvx, case.partition("/")[0])
        options = {"influence_mode": INFLUENCES[int(g.get("in/influence", 1))]}
        if layer is kpconvx.KPConv:
            options["aggregation_mode"] = "nearest" if "in/nearest" in g else "sum"
            options |= {"modulated": bool(g.get("in/modulated", 0)), "groups": int(g.get("in/groups", 1))}
        if layer is kpconvx.KPConvX:
            options["attention_groups"] = int(g["in/attention_groups"])
            options["attention_act"] = ACTIVATIONS[int(g["in/attention_act"])]
            options["mod_grp_norm"] = bool(g["in/mod_grp_norm"])
        return layer(*channels, g["in/shell_sizes"].tolist(), radius, float(g["in/sigma"]), **options).double()
    kernel_size = int(g["in/num_kernel_points"])
    if "in/sigma" in g:
        options = {"groups": int(g["in/groups"])} if "in/groups" in g else {}
        options["bias"] = bool(g.get("in/bias", 0))
        return module.KPConv(*channels, kernel_size, radius, float(g["in/sigma"]), **options).double()
    return module.KPConv(
        kernel_size, 3, *channels, float(g["in/extent"]), radius,
        KP_influence=INFLUENCES[int(g.get("in/influence", 1))],
        aggregation_mode="closest" if "in/closest" in g else "sum",
        deformable=bool(g.get("in/deformable", 0)), modulated=bool(g.get("in/modulated", 0)),
    ).double()  # fmt: skip


def in_order(layer, queries, points, indices, features):
    """The arguments of a call in the published order."""
    if isinstance(layer, geotransformer.KPConv):
        return features, queries, points, indices
    if isinstance(layer, kpconv_pytorch.KPConv):
        return queries, points, indices, features
    return queries, points, features, indices


def called(layer, *inputs):
    return layer(*in_order(layer, *inputs))


def loaded(file, case, place=torch.from_numpy):
    """(recorded values, layer with the recorded state, inputs)."""
    g = CASES[file, case]
    layer, state = made(file, case, g), state_of(g)
    assert str(layer.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    inputs = [place(g[f"in/{name}"]) for name in ("q_points", "s_points", "neighbors", "features")]
    return g, layer.to(inputs[0].device), inputs


def state_of(g):
    return {name.removeprefix("in/state/"): torch.from_numpy(g[name]) for name in g if name.startswith("in/state/")}


def gradients(loss, layer, features):
    """{name in the recorded file: gradient} of the features and parameters that have one."""
    names = ["features", *(f"state/{name}" for name, p in layer.named_parameters() if p.requires_grad)]
    values = [features, *(p for p in layer.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, values, retain_graph=True, allow_unused=True)
    return {name: grad.cpu().numpy() for name, grad in zip(names, grads, strict=True) if grad is not None}


def as_network(layer, repulse_extent=1.2):
    """A network of this layer with the attributes that the published regularization reads."""
    net = torch.nn.ModuleList([layer])
    net.deform_fitting_power, net.repulse_extent = 1.0, float(repulse_extent)
    return net


# ---- recorded layers


def check_recorded(file, case, place=torch.from_numpy):
    """The output, gradients and what a deformable layer leaves behind against what was recorded, on a device."""
    g, layer, (*where, features) = loaded(file, case, place)
    features.requires_grad_()
    out = called(layer, *where, features)
    results = {"output": out}
    results |= prefixed("grad", gradients((out * place(g["in/grad_output"])).sum(), layer, features))
    if (file, case) in DEFORMABLE:
        regularizer = MODULES[file].p2p_fitting_regularizer(as_network(layer, g["in/repulse_extent"]))
        results |= {"regularizer": regularizer, "deformed_KP_first_rows": layer.deformed_KP[:6]}
        results |= prefixed("regularizer_grad", gradients(regularizer, layer, features))
        results |= {name: getattr(layer, name) for name in ("min_d2", "offset_features")}
    results = {n: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for n, v in results.items()}
    expected = {name.removeprefix("out/"): g[name] for name in g if name.startswith("out/")}
    unused = {name for name in results.keys() - expected.keys() if not np.any(results[name])}
    assert results.keys() - unused == expected.keys()
    for name, value in expected.items():
        assert_close(results[name], value, 1e-10)


def prefixed(prefix, values):
    return {f"{prefix}/{name}": value for name, value in values.items()}


@pytest.mark.parametrize(("file", "case"), CASES)
def test_golden(file, case):
    check_recorded(file, case)


def test_golden_is_complete():
    assert len(CASES) == 40 and len(DEFORMABLE) == 7


@pytest.mark.parametrize(("file", "case"), CASES)
def test_state_and_parameters_are_the_published_ones(file, case):
    """Names, order and shapes of the state; kernel points are a frozen parameter or a buffer, as in each client."""
    g, layer, _ = loaded(file, case)
    state = state_of(g)
    for (name, value), (expected_name, expected) in zip(layer.state_dict().items(), state.items(), strict=True):
        assert name == expected_name and torch.equal(value, expected)
    got = [(name, p.shape, p.requires_grad) for name, p in layer.named_parameters()]
    assert got == [(name, p.shape, p.requires_grad) for name, p in client_parameters(file, state)]


def client_parameters(file, state):
    """[(name, parameter)] as ``named_parameters()`` of the published layer gives them."""
    parameters = []
    for name, value in state.items():
        is_kernel = name.endswith("kernel_points")
        shared = file == "open3dml" and name == "offset_conv.kernel_points"
        if not (
            shared or (is_kernel and "kpconvx" in file) or (is_kernel and file in ("geotransformer", "easykpconv"))
        ):
            parameters.append((name, torch.nn.Parameter(value.clone(), requires_grad=not is_kernel)))
    return parameters


RESUMED = [
    ("kpconv_deform", "deformable"), ("kpconv_rigid", "linear_sum"), ("predator", "linear_sum"),
    ("open3dml", "deformable_modulated"), ("geotransformer", "bias"), ("easykpconv", "groups2_bias"),
    ("kpconvx_conv", "KPConv/modulated"), ("kpconvx_attention", "KPConvX/groups4_norm"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "case"), RESUMED)
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_optimizers_resume(file, case, kind):
    """Two steps with the client's parameters, in its groups by learning rate; the layer's make the third."""
    _, layer, _ = loaded(file, case)
    client = client_parameters(file, state_of(CASES[file, case]))
    options = {"lr": 0.1, "momentum": 0.98, "weight_decay": 1e-3} if kind == "SGD" else {"lr": 0.1}

    def optimizer(parameters):
        groups = [{"params": [p for name, p in parameters if ("offset" in name) is at_offsets]}
                  for at_offsets in (False, True)]  # fmt: skip
        return getattr(torch.optim, kind)([groups[0], groups[1] | {"lr": 0.01}], **options)

    def step(optimizer, parameters, seed):
        generator = torch.Generator().manual_seed(seed)
        for _, parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()

    saved = optimizer(client)
    for seed in range(2):
        step(saved, client, seed)
    with torch.no_grad():
        for parameter, (_, trained) in zip(layer.parameters(), client, strict=True):
            parameter.copy_(trained)
    resumed = optimizer(list(layer.named_parameters()))
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    step(saved, client, 2)
    step(resumed, list(layer.named_parameters()), 2)
    for parameter, (name, expected) in zip(layer.parameters(), client, strict=True):
        assert torch.equal(parameter, expected), name
        assert parameter.requires_grad or torch.equal(parameter, state_of(CASES[file, case])[name])


# ---- deformable layers


@pytest.mark.parametrize(("file", "case"), DEFORMABLE)
def test_the_regularization_of_the_client(file, case):
    """What the published code computes of min_d2 and deformed_KP has the gradients of p2p_fitting_regularizer."""
    _, layer, (*where, features) = loaded(file, case)
    features.requires_grad_()
    called(layer, *where, features)
    places = layer.deformed_KP / layer.KP_extent
    apart = (places[:, :, None] - places.detach()[:, None]).square().sum(3) + 1e4 * torch.eye(layer.K)
    repulsion = (apart.sqrt() - 1.2).clamp(max=0).square().sum(2).mean()
    expected = 2 * (layer.min_d2 / layer.KP_extent**2).mean() + repulsion
    regularizer = kpconv_pytorch.p2p_fitting_regularizer(as_network(layer))
    assert_close(regularizer.detach().numpy(), expected.detach().numpy(), 1e-10)
    for name, grad in gradients(expected, layer, features).items():
        assert_close(gradients(regularizer, layer, features)[name], grad, 1e-10)


def test_distances_have_their_gradient_after_a_log_of_them():
    _, layer, (*where, features) = loaded("kpconv_deform", "deformable")
    layer(*where, features)
    with torch.no_grad():
        assert layer.min_d2.mean() > 0
    assert layer.min_d2.requires_grad
    with torch.no_grad():
        layer(*where, features)
    assert not layer.min_d2.requires_grad


def test_no_regularization_before_a_forward_pass():
    layer = kpconv_pytorch.KPConv(15, 3, 2, 3, 0.3, 0.5, deformable=True)
    assert layer.min_d2 is None and layer.deformed_KP is None
    with pytest.raises(
        RuntimeError, match=r"^net: expected a forward pass of every deformable layer.*, got none of 0$"
    ):
        kpconv_pytorch.p2p_fitting_regularizer(as_network(layer))
    assert kpconv_pytorch.p2p_fitting_regularizer(as_network(torch.nn.Linear(2, 2))) == 0


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_predator(modulated):
    """By the formula: divided by the number of neighbours in range with features that sum to more than zero."""
    g, _, (queries, points, indices, features) = loaded("kpconv_modulated", "linear")
    extent = 0.16
    layer = predator.KPConv(15, 3, 2, 3, extent, 0.5, deformable=True, modulated=modulated).double()
    state = {name: value for name, value in state_of(g).items() if modulated or "offset" not in name}
    layer.load_state_dict(state, strict=modulated)
    features.requires_grad_()
    out = layer(queries, points, indices, features)
    assert isinstance(layer.offset_conv, predator.KPConv)
    expected_raw = layer.offset_conv(queries, points, indices, features) + layer.offset_bias
    assert torch.equal(layer.offset_features, expected_raw)

    valid = (indices >= 0) & (indices < len(points))
    near = torch.where(valid, indices, 0)
    apart = (points[near] - queries[:, None])[:, :, None] - layer.deformed_KP[:, None]
    distances = apart.norm(dim=3)
    in_range = valid & (distances < extent).any(2)
    assert (in_range != valid).any()
    gathered = features[near] * in_range[:, :, None]
    influences = (1 - distances / extent).clamp(min=0)
    by_kernel_point = torch.einsum("mhk,mhc->mkc", influences, gathered)
    if modulated:
        by_kernel_point = by_kernel_point * 2 * torch.sigmoid(layer.offset_features[:, 45:])[:, :, None]
    counts = (gathered.sum(2) > 0).sum(1).clamp(min=1)
    assert len(counts.unique()) > 2
    expected = torch.einsum("mkc,kco->mo", by_kernel_point, layer.weights) / counts[:, None]
    assert_close(out.detach().numpy(), expected.detach().numpy(), 1e-10)
    grad = torch.randn_like(out)
    for name, value in gradients((expected * grad).sum(), layer, features).items():
        assert_close(gradients((out * grad).sum(), layer, features)[name], value, 1e-10)


# ---- what layers are made with


@pytest.mark.parametrize(
    "make",
    [
        lambda num, radius: kpconv_pytorch.KPConv(num, 3, 2, 4, 0.3, radius, deformable=True),
        lambda num, radius: predator.KPConv(num, 3, 2, 4, 0.3, radius),
        lambda num, radius: open3d_ml.KPConv(num, 3, 2, 4, 0.3, radius, deformable=True),
        lambda num, radius: geotransformer.KPConv(2, 4, num, radius, 0.3),
        lambda num, radius: easy_kpconv.KPConv(2, 4, num, radius, 0.3, groups=2),
    ],
)
def test_initial_values(make):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - from which the published code draws kernel points
    layer, again, many = make(15, 2.5), make(15, 2.5), make(40, 2.5)
    norms = layer.kernel_points.detach().norm(dim=1)
    assert abs(norms[1:].mean() - 0.66 * 2.5) < 0.01 * 2.5
    assert norms.max() < 0.75 * 2.5 < many.kernel_points.norm(dim=1).max() <= 1.05 * 2.5
    assert 0 < norms[0] < 0.05 * 2.5  # not at the place of a query, where the published gradient is NaN
    assert not torch.equal(layer.kernel_points, again.kernel_points)
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(make(15, 2.5).kernel_points, layer.kernel_points)
    bound = (layer.weights[0].numel()) ** -0.5
    assert 0.9 * bound < layer.weights.abs().max() <= bound
    if getattr(layer, "deformable", False):
        assert not layer.offset_bias.any()
    layer.kernel_points.data.zero_()
    layer.reset_parameters()
    assert abs(layer.kernel_points.norm(dim=1)[1:].mean() - 0.66 * 2.5) < 0.01 * 2.5


def test_settings_that_are_changed_later():
    points, _, indices, features = cloud()
    layer = geotransformer.KPConv(4, 8, 15, 0.5, 0.3)
    other = geotransformer.KPConv(4, 8, 15, 0.5, 0.05)
    other.load_state_dict(layer.state_dict())
    layer.sigma = 0.05
    assert torch.equal(layer(features, points, points, indices), other(features, points, points, indices))
    assert layer(features, points, points, indices).any() and layer.sigma == 0.05
    for make in (kpconvx.KPConvD, kpconvx.KPConvX):
        more = {} if make is kpconvx.KPConvD else {"attention_groups": 2}
        layer, other = (make(4, [1, 14], 0.5, sigma, influence_mode="gaussian", **more) for sigma in (0.3, 0.05))
        other.load_state_dict(layer.state_dict())
        layer.sigma = 0.05
        assert torch.equal(layer(points, points, features, indices), other(points, points, features, indices))
        assert layer(points, points, features, indices).any() and layer.sigma == 0.05
    deformable = kpconv_pytorch.KPConv(15, 3, 4, 8, 0.3, 0.5, deformable=True)
    rigid = kpconv_pytorch.KPConv(15, 3, 4, 8, 0.3, 0.5)
    rigid.load_state_dict({name: deformable.state_dict()[name] for name in ("weights", "kernel_points")})
    deformable.deformable = False
    assert torch.equal(deformable(points, points, indices, features), rigid(points, points, indices, features))


@pytest.mark.parametrize("which", [0, 1])
def test_distances_of_points_that_change(which):
    points, _, indices, features = cloud()
    layer, places = kpconv_pytorch.KPConv(15, 3, 4, 8, 0.3, 0.5, deformable=True), [points.clone(), points.clone()]
    layer(*places, indices, features)
    places[which].zero_()
    with pytest.raises(RuntimeError, match=r"min_d2: expected the points of the forward pass, .* got points that were"):
        layer.min_d2  # noqa: B018


def test_open3d_ml_shares_kernel_points():
    with torch.device("meta"):
        layer = open3d_ml.KPConv(15, 3, 2, 4, 0.3, 2.5, deformable=True)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.kernel_points is layer.offset_conv.kernel_points
    other = kpconv_pytorch.KPConv(15, 3, 2, 4, 0.3, 2.5, deformable=True)
    assert not torch.equal(other.kernel_points, other.offset_conv.kernel_points)


def test_kpconvx_shares_kernel_points():
    shared = {}
    first = kpconvx.KPConvD(8, [1, 14], 0.5, 0.5, shared_kp_data=shared)
    others = [
        kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, shared_kp_data=shared),
        kpconvx.KPConv(8, 8, [1, 14], 0.5, 0.5, shared_kp_data=shared),
    ]
    assert all(other.kernel_points is first.kernel_points is shared["k_pts"] for other in others)
    with pytest.raises(
        ValueError, match=r"^shared_kp_data: expected kernel points \(43, 3\) to match .* got \(15, 3\)"
    ):
        kpconvx.KPConvD(8, [1, 14, 28], 0.5, 0.5, shared_kp_data=shared)


def test_the_activation_of_kpconvx():
    layer = kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, activation=torch.nn.GELU())
    assert isinstance(layer.alpha_mlp[2], torch.nn.GELU) and layer.alpha_mlp[2] is not layer.alpha_mlp[1]
    assert kpconvx.KPConvX(8, [1, 14], 0.5, 0.5).alpha_mlp[2].negative_slope == 0.1


def test_modulations_of_other_queries():
    """As published, of the mean over the row of the matrix, padding included; and not of a large depthwise kernel."""
    g, layer, (queries, points, indices, features) = loaded("kpconvx_conv", "KPConv/modulated")
    few, rows = queries[:9] + 0.01, indices[:9].clone()
    rows[:, 5:] = -1
    rows[0] = len(points)
    means = torch.stack([features[row[(row >= 0) & (row < len(points))]].sum(0) for row in rows]) / 12
    plain = kpconvx.KPConv(4, 6, [1, 14], 0.5, 0.35).double()
    with torch.no_grad():
        modulations = 2 * torch.sigmoid(layer.gen_mlp(means))
        plain.load_state_dict({name: v for name, v in state_of(g).items() if "gen" not in name})
        expected = torch.zeros(9, 6, dtype=torch.float64)
        for k in range(15):
            weights = plain.weights.clone()
            plain.weights.zero_()
            plain.weights[k] = weights[k]
            expected += modulations[:, k : k + 1] * plain(few, points, features, rows)
            plain.weights.copy_(weights)
    assert_close(layer(few, points, features, rows).detach().numpy(), expected.numpy(), 1e-10)
    large = kpconvx.KPConv(4, 4, [1, 14, 28], 0.5, 0.35, groups=-1, aggregation_mode="nearest", modulated=True).double()
    called(large, queries, points, indices, features).sum().backward()
    assert large.gen_mlp.weight.grad is None and large.weights.grad.any()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: kpconvx.KPConvD(8, [1, 14], 0.5, 0.5, Cmid=4), NotImplementedError, "Cmid: expected 0, because .* 4$"),
        (lambda: kpconvx.KPConvD(8, [1, 14], 0.5, 0.5, influence_mode="mlp"), NotImplementedError,
         "influence_mode: expected one of linear, gaussian, constant, .* got 'mlp'"),
        (lambda: kpconvx.KPConv(8, 8, [1, 14], 0.5, 0.5, use_geom=True), NotImplementedError, "use_geom: expected Fal"),
        (lambda: kpconvx.KPDef(8, 8, [1, 14], 0.5, 0.5), NotImplementedError, "KPDef: .* not supported"),
        (lambda: kpconvx.KPConv(8, 8, [1, 14], 0.5, 0.5, aggregation_mode="closest"), ValueError, "aggregation_mode: "),
        (lambda: kpconvx.KPConv(8, 6, [1, 14], 0.5, 0.5, groups=4), ValueError, "groups: expected .* 8 and 6"),
        (lambda: kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, attention_groups=3), ValueError, "attention_groups: .* got 3"),
        (lambda: kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, attention_groups=-3), ValueError, "attention_groups: .* got -3"),
        (lambda: kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, attention_groups=0), ValueError, "attention_groups: .* got 0"),
        (lambda: kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, attention_act="relu"), ValueError, "attention_act: expected"),
        (lambda: kpconvx.KPConvX(8, [1, 14], 0.5, 0.5, activation=None), TypeError, "activation: expected a torch.nn"),
        (lambda: kpconv_pytorch.KPConv(15, 3, 2, 4, 0.3, 0.5, KP_influence="cubic"), ValueError, "KP_influence: exp"),
        (lambda: predator.KPConv(15, 3, 2, 4, 0.3, 0.5, aggregation_mode="max"), ValueError, "aggregation_mode: "),
        (lambda: kpconv_pytorch.KPConv(15, 3, 0, 4, 0.3, 0.5), ValueError, "in_channels: expected at least 1, got 0"),
        (lambda: kpconv_pytorch.KPConv(0, 3, 2, 4, 0.3, 0.5), ValueError, "kernel_size: expected at least 1, got 0"),
        (lambda: easy_kpconv.KPConv(4, 6, 15, 0.5, 0.3, groups=4), ValueError, "groups: expected a divisor of 4 and 6"),
        (lambda: padded.cache(None), TypeError, "enabled: expected True or False"),
    ],
)  # fmt: skip
def test_wrong_settings(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_wrong_matrices():
    _, layer, (queries, points, indices, features) = loaded("kpconv_rigid", "linear_sum")
    for wrong, message in (
        (indices.float(), "neighb_inds: expected int32 or int64, got float32"),
        (indices[0], r"neighb_inds: expected \(M, H\), got"),
        (indices + 1, r"neighb_inds: expected values from -1 to 36 .* got 37"),
        (indices.numpy(), "neighb_inds: expected a torch tensor, got ndarray"),
        (indices.to("meta"), "neighb_inds: expected a tensor on the CPU or a CUDA GPU, got one on meta"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            layer(queries, points, wrong, features)


@pytest.mark.parametrize("name", ["kpconv_pytorch", "deformable", "geotransformer", "easy_kpconv", "kpconvd"])
def test_wrong_inputs(name):
    layer, (queries, points, matrix, features) = LAYERS[name], cloud()
    names = dict(zip(("queries", "points", "indices", "features"), ("q_p", "s_p", "neighb", "x|s_f"), strict=True))
    for wrong, argument in (
        ((queries, points, matrix, features[:-1]), "features"),
        ((queries, points, matrix, features.double()), "features"),
        ((queries.double(), points, matrix, features), "queries"),
        ((queries[:-1], points, matrix, features), "indices"),
    ):
        with pytest.raises(
            (TypeError, ValueError),
            match=rf"^({names[argument]}|weights: .* to match (x|s_feats),)",
        ):
            called(layer, *wrong)


# ---- pooling


def padded_rows(seed=0):
    """(features, matrix) with full, short and empty rows, and negative features."""
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 30, (20, 6))
    matrix[np.arange(6) >= rng.integers(0, 7, (20, 1))] = 30
    assert (matrix[:, 0] == 30).any() and (matrix[:, -1] < 30).any()
    return torch.from_numpy(rng.normal(size=(30, 4)) - 1).requires_grad_(), torch.from_numpy(matrix)


@pytest.mark.parametrize(
    ("pool", "padding", "column"),
    [
        *[(pool, 0.0, None) for pool in (kpconv_pytorch.max_pool, predator.max_pool, open3d_ml.max_pool,
                                         geotransformer.maxpool, easy_kpconv.local_maxpool_pack_mode)],
        (kpconvx.local_maxpool, -1e6, None),
        *[(pool, 0.0, 0) for pool in (kpconv_pytorch.closest_pool, predator.closest_pool, open3d_ml.closest_pool,
                                      geotransformer.nearest_upsample, easy_kpconv.nearest_interpolate_pack_mode,
                                      kpconvx.local_nearest_pool)],
    ],
)  # fmt: skip
def test_pooling(pool, padding, column):
    features, matrix = padded_rows()
    with_padding = torch.cat([features, torch.full((1, 4), padding)])
    expected = with_padding[matrix].amax(1) if column is None else with_padding[matrix[:, column]]
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, features, grad)
    for fill in (30, -1):
        out = pool(features, torch.where(matrix == 30, fill, matrix))
        assert torch.equal(out, expected)
        assert_close(torch.autograd.grad(out, features, grad)[0].numpy(), expected_grad.numpy(), 1e-12)


def test_the_first_column_is_not_the_first_neighbour():
    """A query without a neighbour in the first column gets zeros, as published."""
    features = torch.arange(1.0, 4)[:, None]
    matrix = torch.tensor([[3, 1], [2, 3], [-1, 0]])
    assert kpconv_pytorch.closest_pool(features, matrix).ravel().tolist() == [0, 3, 0]


@pytest.mark.parametrize(
    "average",
    [kpconv_pytorch.global_average, geotransformer.global_avgpool, easy_kpconv.global_avgpool_pack_mode,
     kpconvx.global_avgpool],
)  # fmt: skip
def test_global_average(average):
    features = torch.arange(10.0).reshape(5, 2)
    expected = torch.stack([features[:3].mean(0), torch.zeros(2), features[3:].mean(0)])
    for lengths in (torch.tensor([3, 0, 2], dtype=torch.int32), [3, 0, 2], np.array([3, 0, 2])):
        assert torch.equal(average(features, lengths), expected)
    assert average(features[:0], []).shape == (0, 2)
    for wrong, error, message in (
        ([3, 1], ValueError, "expected lengths that add up to 5 to match the features, got 4"),
        ([7, -2], ValueError, "expected numbers of at least 0, got -2"),
        ([3.0, 2.0], TypeError, r"expected integers \(B,\), got float32 \(2,\)"),
    ):
        with pytest.raises(error, match=f"^(batch_)?lengths: {message}"):
            average(features, torch.tensor(wrong))


# ---- lists of matrices


@pytest.fixture
def conversions(monkeypatch):
    """The matrices that were converted, in their order."""
    converted, convert = [], padded.padded_tensor

    def recording(name, matrix, num_points):
        converted.append(name)
        return convert(name, matrix, num_points)

    padded._lists.clear()
    monkeypatch.setattr(padded, "padded_tensor", recording)
    yield converted
    padded.cache(True)


def cloud(num=60, seed=0, width=12):
    """(queries, points, matrix, features): the queries are the points, float32."""
    generator = torch.Generator().manual_seed(seed)
    points, features = torch.rand(num, 3, generator=generator), torch.randn(num, 4, generator=generator)
    neighbors = kpt.radius_search(points, None, 0.4, sort="distance")
    return points, points, torch.from_numpy(neighbors.to_padded(width, dtype=np.int64)), features


def layers_of_all_clients():
    torch.manual_seed(0)
    return {
        "kpconv_pytorch": kpconv_pytorch.KPConv(15, 3, 4, 4, 0.3, 0.4),
        "deformable": kpconv_pytorch.KPConv(15, 3, 4, 4, 0.3, 0.4, deformable=True, modulated=True),
        "predator": predator.KPConv(15, 3, 4, 4, 0.3, 0.4, deformable=True),
        "open3d_ml": open3d_ml.KPConv(15, 3, 4, 4, 0.3, 0.4, KP_influence="gaussian", deformable=True),
        "geotransformer": geotransformer.KPConv(4, 4, 15, 0.4, 0.3, bias=True),
        "easy_kpconv": easy_kpconv.KPConv(4, 4, 15, 0.4, 0.3, groups=2),
        "kpconvx": kpconvx.KPConvX(4, [1, 14], 0.4, 0.4, attention_groups=2, mod_grp_norm=True),
        "kpconvd": kpconvx.KPConvD(4, [1, 14], 0.4, 0.4),
        "modulated": kpconvx.KPConv(4, 4, [1, 14], 0.4, 0.4, modulated=True, groups=-1),
    }


LAYERS = layers_of_all_clients()
OF_LAYERS = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def results(layer, run, features):
    """The output of ``run(features)`` and all gradients, with those of the regularization."""
    layer.zero_grad()
    features = features.detach().requires_grad_()
    out = run(features)
    loss = out.float().square().sum()
    if getattr(layer, "deformable", False):
        loss = loss + kpconv_pytorch.p2p_fitting_regularizer(as_network(layer))
    loss.backward()
    return [out.detach(), features.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def assert_equal(got, expected):
    for value, other in zip(got, expected, strict=True):
        assert (value is None and other is None) or torch.equal(value, other)


def test_a_matrix_is_converted_once(conversions):
    queries, points, matrix, features = cloud()
    for _ in range(2):
        for layer in LAYERS.values():
            called(layer, queries, points, matrix, features.requires_grad_()).sum().backward()
        kpconv_pytorch.max_pool(features, matrix)
        kpconv_pytorch.closest_pool(features, matrix)
    assert conversions == ["neighb_inds", "inds"]  # the second is the first column
    made = padded.neighbors("matrix", matrix, 60)
    assert made.stored_transposed is not None and made is padded.neighbors("matrix", matrix, 60)
    assert padded.neighbors("list", made, 60) is made


def test_a_list_is_dropped_with_its_matrix(conversions):
    for seed in range(30):  # most of these matrices have the address and the id of the one before
        queries, points, matrix, features = cloud(seed=seed)
        layer = LAYERS["kpconv_pytorch"]
        expected = layer(queries, points, kp.Neighbors.from_padded(matrix.numpy(), 60), features)
        assert torch.equal(layer(queries, points, matrix, features), expected)
        del matrix
        assert not padded._lists
    assert len(conversions) == 30


def test_changes_in_place_are_seen(conversions):
    def as_list(matrix, num_points=60):
        assert_same(padded.neighbors("matrix", matrix, num_points), matrix.clone(), num_points)

    def assert_same(got, matrix, num_points):
        expected = kp.Neighbors.from_padded(matrix.numpy(), num_points)
        assert np.array_equal(got.index, expected.index) and np.array_equal(got.row_splits, expected.row_splits)
        assert (got.num_points, got.width) == (num_points, matrix.shape[1])

    *_, matrix, _ = cloud()
    as_list(matrix)
    matrix[3, 0] = 7
    as_list(matrix)
    matrix[:, :4].fill_(-1)  # through a view
    as_list(matrix)
    as_list(matrix, 100)
    matrix.resize_(50, 12)
    as_list(matrix)
    matrix.data = torch.full((50, 12), 5)
    as_list(matrix)
    matrix.set_(torch.full((40, 12), 6))
    as_list(matrix)
    with torch.inference_mode():  # which has no versions: nothing is kept
        matrix = torch.full((40, 12), 6)
        as_list(matrix)
        matrix[0] = 60
        as_list(matrix)
    assert len(conversions) == 9
    kp.compat.cache(False)
    assert not padded._lists
    *_, matrix, _ = cloud()
    as_list(matrix)
    as_list(matrix)
    assert len(conversions) == 11 and not padded._lists


def test_an_id_that_another_matrix_had_before(conversions):
    *_, matrix, _ = cloud()
    made, key = padded.neighbors("matrix", matrix, 60), (id(matrix), False)
    padded._forget(key, None)  # a late notice of the end of the other matrix
    assert padded.neighbors("matrix", matrix, 60) is made and len(conversions) == 1
    (_, state, _), other = padded._lists[key], matrix.clone()
    padded._lists[key] = weakref.ref(other), state, None  # no notice yet
    again = padded.neighbors("matrix", matrix, 60)
    assert np.array_equal(again.index, made.index) and padded._lists[key][0]() is matrix


def test_threads(conversions):
    queries, points, matrix, features = cloud()
    layer = LAYERS["kpconv_pytorch"]
    expected = layer(queries, points, matrix, features)
    padded._lists.clear()
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: layer(queries, points, matrix, features), range(64)))
    assert all(torch.equal(out, expected) for out in outs) and len(padded._lists) == 1


# ---- what surrounds layers


@OF_LAYERS
def test_checkpointing(layer):
    queries, points, matrix, features = cloud()
    expected = results(layer, lambda x: called(layer, queries, points, matrix, x), features)

    def recomputed(x):
        return checkpoint(lambda x: called(layer, queries, points, matrix, x), x, use_reentrant=False)

    assert_equal(results(layer, recomputed, features), expected)


@OF_LAYERS
def test_autocast(layer):
    queries, points, matrix, features = cloud()
    features = features.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, grad, *others = results(layer, lambda x: called(layer, queries, points, matrix, x), features)
    assert out.dtype == torch.float32 and grad.dtype == torch.bfloat16
    expected = results(layer, lambda x: called(layer, queries, points, matrix, x), features.float())
    for got, value in zip([out, grad.float(), *others], expected, strict=True):
        assert value is None or (got - value).abs().max() < 2e-2 * value.abs().max()


@OF_LAYERS
def test_data_parallel(layer):
    """Without GPUs the wrapped module is called itself, so also what it does with each GPU: a replica in a thread."""
    queries, points, matrix, features = cloud()
    inputs = in_order(layer, queries, points, matrix, features)
    expected = layer(*inputs)
    assert torch.equal(torch.nn.DataParallel(layer)(*inputs), expected)
    replica = replicated(layer)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(replica, *inputs).result()
    assert torch.equal(out, expected)
    if getattr(layer, "deformable", False):
        assert torch.equal(replica.min_d2, layer.min_d2) and replica.min_d2 is not layer.min_d2


def replicated(module):
    """As torch.nn.parallel.replicate, which needs GPUs, makes a replica: parameters are plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, tensor in {**module._parameters, **module._buffers}.items():
        setattr(replica, name, None if tensor is None else tensor.detach().clone())
    for name, child in module._modules.items():
        setattr(replica, name, replicated(child))
    return replica


@OF_LAYERS
def test_copies_after_a_forward_pass(layer):
    queries, points, matrix, features = cloud()
    expected = called(layer, queries, points, matrix, features)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert getattr(again, "min_d2", None) is None and getattr(again, "offset_features", None) is None
        assert torch.equal(called(again, queries, points, matrix, features), expected)
    assert not getattr(layer, "deformable", False) or layer.min_d2 is not None


@pytest.mark.parametrize("name", ["deformable", "kpconvx"])
def test_compiled(name):
    """A matrix is converted between two compiled parts; with a list everything is one graph."""
    layer = LAYERS[name]
    queries, points, matrix, features = cloud()
    expected = results(layer, lambda x: called(layer, queries, points, matrix, x), features)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: called(layer, *inputs), backend="aot_eager")
    assert_equal(results(layer, lambda x: compiled(queries, points, matrix, x), features), expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: called(layer, *inputs), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):  # with a reason from torch 2.7 on
        compiled(queries, points, matrix, features)
    neighbors = kp.Neighbors.from_padded(matrix.numpy(), len(points))
    assert_equal(results(layer, lambda x: compiled(queries, points, neighbors, x), features), expected)


@OF_LAYERS
def test_neither_points_nor_queries(layer):
    queries, points, matrix, features = cloud()
    if getattr(layer, "mod_grp_norm", False):
        return  # the mean and variance over no points
    out = called(layer, queries[:0], points, matrix[:0], features)
    assert out.shape == (0, 4)
    out = called(layer, queries[:5], points[:0], torch.zeros(5, 12, dtype=torch.int64), features[:0])
    assert out.shape == (5, 4)
