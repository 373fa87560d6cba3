"""The layers of kpcore.torch: results and parameter names against the published layers."""

import itertools
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from reference import assert_close

import kpcore as kp

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

import kpcore.torch as kpt  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
DEFORMABLE = sorted(GOLDEN.glob("deform_*.npz"))

# {name: function from a dtype to a layer with 4 channels and few kernel points}
LAYERS = {
    "rigid": lambda dtype=None: kpt.KPConv(4, 3, 5, radius=0.2, extent=0.25, normalization="count", dtype=dtype),
    "grouped": lambda dtype=None: kpt.KPConv(
        4, 6, 5, radius=0.2, extent=0.25, groups=2, bias=True, normalization="positive", dtype=dtype
    ),
    "learned": lambda dtype=None: kpt.KPConv(
        4, 3, 5, radius=0.2, extent=0.25, learn_kernel_points=True, dtype=dtype
    ),
    "deformable": lambda dtype=None: kpt.DeformableKPConv(4, 3, 5, radius=0.2, extent=0.25, dtype=dtype),
    "modulated": lambda dtype=None: kpt.DeformableKPConv(
        4, 3, 5, radius=0.2, extent=0.25, modulated=True, influence="gaussian", normalization="count", dtype=dtype
    ),
    "deformable, depthwise": lambda dtype=None: kpt.DeformableKPConv(
        4, 4, 5, radius=0.2, extent=0.25, groups=4, bias=True, dtype=dtype
    ),
    "x": lambda dtype=None: kpt.KPConvX(4, [1, 4], radius=0.3, extent=0.3, attention_groups=2, dtype=dtype),
    "x, normalized": lambda dtype=None: kpt.KPConvX(
        4, [1, 4], radius=0.3, extent=0.3, attention_groups=1, attention_activation="tanh", attention_norm=True,
        dtype=dtype
    ),
    "d": lambda dtype=None: kpt.KPConvX(4, [1, 4], radius=0.3, extent=0.3, attention_groups=None, dtype=dtype),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def make(request):
    torch.manual_seed(0)
    return LAYERS[request.param]


def case(num=40, dtype=torch.float32, seed=0):
    """(points, queries, neighbors sorted by distance, features); the first query has no neighbors."""
    generator = torch.Generator().manual_seed(seed)
    points, features = (torch.rand(num, c, generator=generator, dtype=dtype) for c in (3, 4))
    queries = points[: num // 2] + 0.01
    queries[:1] += 9
    return points, queries, kpt.radius_search(points, queries, 0.35, sort="distance"), features - 0.5


def of_queries(layer, points, queries, neighbors, features):
    """The inputs; for attention also the features of the nearest point of each query."""
    inputs = points, queries, neighbors, features
    if getattr(layer, "attention_groups", None) is None or queries is None:
        return inputs
    if isinstance(neighbors, torch.Tensor):
        neighbors = kp.Neighbors.from_padded(neighbors.numpy(), len(points))
    return (*inputs, kpt.nearest_upsample(features, neighbors))


def with_offsets(layer, *inputs):
    """The output of a layer, and the regularization of a deformable one."""
    if not isinstance(layer, kpt.DeformableKPConv):
        return (layer(*of_queries(layer, *inputs)),)
    out, offsets = layer(*inputs, return_offsets=True)
    return out, layer.regularization(*inputs[:3], offsets)


# ---- every layer


def test_by_finite_differences(make):
    layer, (points, queries, neighbors, features) = make(torch.float64), case(dtype=torch.float64)
    parameters = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in parameters.values():
            p += 0.1 * torch.randn_like(p)  # so that no bias is zero

    def fn(features, *values):
        given = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, given, of_queries(layer, points, queries, neighbors, features))

    assert gradcheck(fn, [features.requires_grad_(), *parameters.values()], rtol=1e-5, atol=1e-7)


def test_every_parameter_learns(make):
    layer, inputs = make(), case()
    out = with_offsets(layer, *inputs)
    sum(o.square().sum() for o in out).backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any() and parameter.grad.isfinite().all(), name


def test_compiled_in_one_graph(make):
    torch._dynamo.reset()
    layer = make()
    compiled = torch.compile(lambda *inputs: with_offsets(layer, *inputs), fullgraph=True, backend="aot_eager")
    for num in (40, 40, 60, 70):
        inputs = case(num, seed=num)
        results = []
        for fn in (lambda *inputs: with_offsets(layer, *inputs), compiled):
            layer.zero_grad()
            out = fn(*inputs)
            sum(o.square().sum() for o in out).backward()
            results.append([*out, *(p.grad for p in layer.parameters() if p.requires_grad)])
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_exported(make):
    layer = make().eval()
    inputs = of_queries(layer, *case())
    assert torch.equal(torch.export.export(layer, inputs).module()(*inputs), layer(*inputs))


def test_a_padded_matrix(make):
    layer, (points, queries, neighbors, features) = make(), case()
    padded = neighbors.to_padded()
    for fill, dtype in ((len(points), torch.int32), (-1, torch.int64)):
        matrix = torch.from_numpy(np.where(padded == len(points), fill, padded)).to(dtype)
        for got, expected in zip(
            with_offsets(layer, points, queries, matrix, features),
            with_offsets(layer, points, queries, neighbors, features),
            strict=True,
        ):
            assert torch.equal(got, expected)
    with pytest.raises(Exception, match=r"neighbors: expected kpcore\.Neighbors under torch\.compile"):
        torch.compile(layer, fullgraph=True, backend="eager")(points, queries, matrix, features)


def test_float64_is_what_float32_rounds(make):
    layer, inputs = make(), case()
    exact = with_offsets(layer, *inputs[:2], inputs[2], inputs[3])
    layer.double()
    found = with_offsets(layer, inputs[0].double(), inputs[1].double(), inputs[2], inputs[3].double())
    for single, double in zip(exact, found, strict=True):
        assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
        assert_close(single.detach().numpy(), double.detach().numpy(), 2e-5)
    assert {t.dtype for t in make(torch.float64).state_dict().values()} == {torch.float64}


def test_neither_queries_nor_neighbors(make):
    layer, (points, queries, neighbors, features) = make(), case()
    out, *regularization = with_offsets(layer, points, queries, neighbors, features)
    bias = getattr(layer, "bias", None)
    assert not neighbors.counts[0] and torch.equal(out[0], torch.zeros_like(out[0]) if bias is None else bias)
    assert out[1:].any()
    assert all(r.isfinite() for r in regularization)
    nothing = kp.Neighbors(np.empty(0, np.int32), np.zeros(1, np.int64), len(points))
    if not getattr(layer, "attention_norm", False):
        out, *regularization = with_offsets(layer, points, queries[:0], nothing, features)
        assert out.shape == (0, layer.weights.shape[-1]) and not any(regularization)


def test_the_same_from_the_same_seed(make):
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(1)
    again, other = make(), make()
    copy = pickle.loads(pickle.dumps(first))
    for name, state in first.state_dict().items():
        assert torch.equal(state, again.state_dict()[name]) and torch.equal(state, copy.state_dict()[name])
    assert not torch.equal(first.kernel_points, other.kernel_points)
    assert not torch.equal(first.weights, other.weights)
    other.load_state_dict(first.state_dict())
    inputs = of_queries(first, *case())
    assert torch.equal(other(*inputs), first(*inputs))
    assert torch.equal(copy(*inputs), first(*inputs))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_reset(make, dtype):
    """After `reset_parameters`, a layer holds what a new layer with the same seed holds, whatever it held before."""
    layer = make(dtype)
    with torch.no_grad():
        for state in layer.state_dict().values():
            state.fill_(float("nan"))
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    for name, state in make(dtype).state_dict().items():
        assert torch.equal(layer.state_dict()[name], state), name


def late(make):
    """A module made on "meta", without random numbers, and then moved to uninitialised memory."""
    before = torch.get_rng_state()
    with torch.device("meta"):
        module = make()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(state.is_meta for state in module.state_dict().values())
    module.to_empty(device="cpu")
    with torch.no_grad():
        for state in module.state_dict().values():
            state.fill_(float("nan") if state.is_floating_point() else 99)
    torch.manual_seed(3)
    module.reset_parameters()
    return module


def test_layers_made_on_meta(make):
    module, (points, _, _, features) = late(make), case()
    inputs = points, None, kpt.radius_search(points, None, 0.35), features
    torch.manual_seed(3)
    expected = make()
    for name, state in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], state), name
    assert torch.equal(module(*inputs), expected(*inputs))


@pytest.mark.parametrize("seed", [0, 5])
def test_a_network_made_on_meta(seed):
    net = kp.nn.kpfcnn(1, 3, 0.2, levels=2, convs=2, width=8)
    module, expected = late(lambda: kpt.Network(net, seed=seed)), kpt.Network(net, seed=seed)
    for name, state in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], state), name


def test_printed(make):
    text = repr(make())
    assert re.search(r"4, (\d, )?kernel_size=5, extent=0\.", text)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: kpt.KPConv(0, 3, radius=0.2, extent=0.2), r"^in_channels: expected at least 1, got 0"),
        (
            lambda: kpt.DeformableKPConv(3, 1.5, radius=0.2, extent=0.2),
            r"^out_channels: expected an integer, got float",
        ),
        (lambda: kpt.KPConv(3, 3, radius=0.2, extent=0.2, rotate="up"), r"^rotate: expected None or 'vertical'"),
        (lambda: kpt.KPConv(3, 3, radius=-1, extent=0.2), r"^radius: expected"),
        (lambda: kpt.KPConv(4, 6, radius=1, extent=1, groups=4), r"^groups: expected a divisor of 4 and 6 .*, got 4"),
        (lambda: kpt.DeformableKPConv(4, 4, radius=1, extent=1, groups=0), r"^groups: expected at least 1, got 0"),
        (lambda: kpt.KPConv(4, 6, radius=1, extent=1, bias=1), r"^bias: expected True or False"),
        (lambda: kpt.KPConv(4, 6, radius=1, extent=1, method="spiral"), r"^method: expected"),
        (lambda: kpt.KPConvX(0, radius=0.2, extent=0.2), r"^channels: expected at least 1"),
        (lambda: kpt.KPConvX(12, radius=0.2, extent=0.2), r"^attention_groups: expected a divisor of 12 .* got 8"),
        (lambda: kpt.KPConvX(8, radius=0.2, extent=0.2, attention_activation="relu"), r"^attention_activation: expe"),
        (lambda: kpt.KPConvX(8, 15, radius=0.2, extent=0.2), r"^shell_sizes: expected a sequence"),
    ],
)
def test_wrong_settings(wrong, error):
    with pytest.raises((TypeError, ValueError), match=error):
        wrong()


def test_wrong_inputs(make):
    layer, (points, queries, neighbors, features) = make(), case()
    for wrong, error in (
        ((points, queries, neighbors, features[:, :3]), "features|weights|linear|shapes"),
        ((points, queries, neighbors, features[:-1]), "features"),
        ((points, queries[:-1], neighbors, features), "neighbors"),
        ((points, queries, neighbors.index, features), "neighbors: expected kpcore.Neighbors, got ndarray"),
        ((points, queries, torch.zeros(20, 3), features), "neighbors: expected int32 or int64"),
        ((points, queries, torch.zeros(20, 3, device="meta"), features), "neighbors: expected a tensor on the CPU"),
        ((points.double(), queries.double(), neighbors, features), "kernel_points"),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=error):
            layer(*wrong, *of_queries(layer, points, queries, neighbors, features)[4:])


# ---- KPConv


def test_the_layer_is_the_function():
    torch.manual_seed(0)
    layer = kpt.KPConv(
        4, 3, 7, radius=0.2, extent=0.15, influence="gaussian", aggregation="closest", normalization="count"
    )
    points, queries, neighbors, features = case()
    expected = kpt.kpconv(
        points, queries, neighbors, features, layer.weights, layer.kernel_points, 0.15, influence="gaussian",
        aggregation="closest", normalization="count"
    )  # fmt: skip
    assert torch.equal(layer(points, queries, neighbors, features), expected)


def test_kernel_points_are_rotated():
    exact = np.linalg.norm(kp.kernel_points(15, 0.2, dtype=np.float64), axis=1)
    layer = kpt.KPConv(3, 4, radius=0.2, extent=0.15, dtype=torch.float64)
    assert_close(np.linalg.norm(layer.kernel_points.numpy(), axis=1), exact, 1e-12)
    still = kpt.KPConv(3, 4, radius=0.2, extent=0.15, rotate=None)
    assert np.array_equal(still.kernel_points.numpy(), kp.kernel_points(15, 0.2))
    deformable = kpt.DeformableKPConv(3, 4, radius=0.2, extent=0.15)
    kernels = still.kernel_points, deformable.kernel_points, deformable.offset_conv.kernel_points
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(kernels, 2))


# ---- names and initial values of parameters


def drawn_like(weights, fan_in):
    """Check that weights look uniform in ±1 / sqrt(fan_in), by their range and moments."""
    bound = fan_in**-0.5
    assert bound * 0.98 < weights.abs().max() <= bound
    assert abs(weights.mean()) < 0.02 * bound
    assert abs(weights.std() - bound / 3**0.5) < 0.02 * bound
    expected = torch.empty_like(weights)
    torch.nn.init.kaiming_uniform_(expected, a=5**0.5)  # what the published code calls
    assert abs(expected.std() - weights.std()) < 0.02 * bound


def shapes(layer):
    return {name: tuple(state.shape) for name, state in layer.state_dict().items()}


def test_the_state_of_kpconv():
    layer = kpt.KPConv(32, 64, radius=0.2, extent=0.15)
    assert shapes(layer) == {"weights": (15, 32, 64), "kernel_points": (15, 3)}
    drawn_like(layer.weights, 32 * 64)
    norms = layer.kernel_points.norm(dim=1)
    assert norms[0] == 0 and torch.isclose(norms[1:].mean(), torch.tensor(0.2), rtol=1e-5)


def test_learned_kernel_points_are_parameters_of_the_same_state():
    layer = kpt.KPConv(32, 64, radius=0.2, extent=0.15, learn_kernel_points=True)
    assert {name for name, _ in layer.named_parameters()} == {"kernel_points", "weights"}
    assert isinstance(layer.kernel_points, torch.nn.Parameter)
    layer.load_state_dict(kpt.KPConv(32, 64, radius=0.3, extent=0.15).state_dict(), strict=True)
    assert torch.isclose(layer.kernel_points[1:].norm(dim=1).mean(), torch.tensor(0.3), rtol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_the_state_of_a_deformable_layer(modulated):
    torch.manual_seed(0)
    layer = kpt.DeformableKPConv(32, 64, 13, radius=0.2, extent=0.15, modulated=modulated)
    num = 13 * (3 + modulated)
    expected = {
        "weights": (13, 32, 64),
        "kernel_points": (13, 3),
        "offset_bias": (num,),
        "offset_conv.weights": (13, 32, num),
        "offset_conv.kernel_points": (13, 3),
    }
    assert shapes(layer) == expected
    drawn_like(layer.weights, 32 * 64)
    drawn_like(layer.offset_conv.weights, 32 * num)
    assert not layer.offset_bias.any()
    published = {name: torch.randn(shape) for name, shape in expected.items()}
    layer.load_state_dict(published, strict=True)
    assert all(torch.equal(state, published[name]) for name, state in layer.state_dict().items())
    names = [name for name, _ in layer.named_parameters()]
    assert [name for name in names if "offset" in name] == ["offset_bias", "offset_conv.weights"]


@pytest.mark.parametrize(("groups", "shape"), [(1, (15, 6, 6)), (2, (15, 3, 6)), (3, (15, 2, 6)), (6, (15, 6))])
def test_groups(groups, shape):
    """Each group is a dense layer of its channels; as many groups as channels are a depthwise convolution."""
    torch.manual_seed(0)
    points, queries, neighbors, _ = case()
    features = torch.randn(40, 6)
    for make in (kpt.KPConv, kpt.DeformableKPConv):
        layer = make(6, 6, radius=0.2, extent=0.25, groups=groups, bias=True)
        assert shapes(layer)["weights"] == shape and shapes(layer)["bias"] == (6,)
        bound = math.prod(shape[1:]) ** -0.5
        assert 0.9 * bound < layer.weights.abs().max() <= bound and 0 < layer.bias.abs().max() <= bound
        assert (f"groups={groups}" in layer.extra_repr()) == (groups > 1) and "bias=True" in layer.extra_repr()
        out, *offsets = with_offsets(layer, points, queries, neighbors, features)
        dense = make(6, 6, radius=0.2, extent=0.25)
        state = {name: value for name, value in layer.state_dict().items() if name != "bias"}
        state["weights"] = torch.zeros(15, 6, 6)
        size = 6 // groups
        for group in range(groups):
            of_group = slice(group * size, (group + 1) * size)
            weights = layer.weights[..., of_group]
            state["weights"][:, of_group, of_group] = weights[:, None] if weights.ndim == 2 else weights
        dense.load_state_dict(state)
        expected, *others = with_offsets(dense, points, queries, neighbors, features)
        assert_close(out.detach().numpy(), (expected + layer.bias).detach().numpy(), 2e-5)
        assert len(offsets) == len(others) and all(torch.equal(*pair) for pair in zip(offsets, others, strict=True))


def test_many_kernel_points_by_lloyd():
    layer = kpt.KPConv(2, 2, 40, radius=0.2, extent=0.1, method="lloyd")
    assert layer.kernel_points.shape == (40, 3) and 0.15 < layer.kernel_points.norm(dim=1).max() <= 0.2


def test_the_state_of_kpconvx():
    torch.manual_seed(0)
    layer = kpt.KPConvX(64, radius=0.2, extent=0.2, attention_groups=4)
    assert shapes(layer) == {
        "weights": (43, 64),
        "kernel_points": (43, 3),
        "alpha_mlp.0.weight": (64, 64),
        "alpha_mlp.1.norm.bias": (64,),
        "alpha_mlp.3.weight": (43 * 16, 64),
        "grpnorm.weight": (43 * 16,),
        "grpnorm.bias": (43 * 16,),
    }
    drawn_like(layer.weights, 64)
    drawn_like(layer.alpha_mlp[0].weight, 64)
    drawn_like(layer.alpha_mlp[3].weight, 64)
    assert not layer.alpha_mlp[1].norm.bias.any() and not layer.grpnorm.weight.requires_grad
    radii = layer.kernel_points.norm(dim=1)
    assert_close(radii.numpy(), 0.2 * np.repeat([0, 0.4, 0.8], [1, 14, 28]), 1e-6)
    assert set(shapes(kpt.KPConvX(64, radius=0.2, extent=0.2, attention_groups=None))) == {"weights", "kernel_points"}


# ---- the published code


@pytest.mark.parametrize("path", DEFORMABLE, ids=lambda path: path.stem)
def test_golden_deformable(path):
    golden = np.load(path)
    names = "weights", "offset_weights", "offset_bias", "kernel_points", "offset_kernel_points"
    num, in_channels, out_channels = golden["weights"].shape
    layer = kpt.DeformableKPConv(
        in_channels, out_channels, num, radius=0.1, extent=float(golden["extent"]), modulated=bool(golden["modulated"]),
        influence=str(golden["influence"]), aggregation=str(golden["aggregation"]), dtype=torch.float64
    )  # fmt: skip
    state = {name.replace("offset_w", "offset_conv.w").replace("offset_k", "offset_conv.k"): name for name in names}
    layer.load_state_dict({theirs: torch.from_numpy(golden[name]) for theirs, name in state.items()}, strict=True)
    points, queries, features = (torch.from_numpy(golden[name]) for name in ("points", "queries", "features"))
    features.requires_grad_()
    cloud = points, queries, torch.from_numpy(golden["neighbors_padded"])
    # The 1e-9 of the published gaussian (see golden/README) changes the offsets, and again the output.
    allowed = 4e-5 if golden["influence"] == "gaussian" else 1e-10

    out, offsets = layer(*cloud, features, return_offsets=True)
    assert torch.equal(out, layer(*cloud, features))
    assert_close(out.detach().numpy(), golden["out"], allowed)
    assert_close((layer.kernel_points + offsets).detach().numpy(), golden["deformed_kernel_points"], allowed)
    regularization = layer.regularization(*cloud, offsets)
    losses = 2 * golden["fitting_loss"] + golden["repulsive_loss"]
    assert_close(regularization.detach().numpy(), losses, allowed)

    inputs = features, layer.weights, layer.offset_conv.weights, layer.offset_bias
    grads = torch.autograd.grad(out, inputs, torch.from_numpy(golden["grad_out"]), retain_graph=True)
    for grad, name in zip(grads, ("features", "weights", "offset_weights", "offset_bias"), strict=True):
        assert_close(grad.numpy(), golden[f"grad_{name}"], allowed)
    grads = torch.autograd.grad(regularization, inputs[2:])
    for grad, name in zip(grads, ("offset_weights", "offset_bias"), strict=True):
        expected = 2 * golden[f"grad_fit_{name}"] + golden[f"grad_rep_{name}"]
        assert_close(grad.numpy(), expected, allowed)


# The published layers in the table of docs/frameworks.md, with the channels of the test.
TABLE = {
    published.split("`")[1]: ours.split("`")[1].replace("(64, 64,", "(*channels,").replace("(64,", "(channels[0],")
    for _, published, ours, _ in (
        line.split("|")
        for line in (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `KPConv") and "64" in line
    )
}
RIGID = "KPConv(15, 3, 64, 64, KP_extent, radius)"
MODULATED = "KPConv(15, 3, 64, 64, KP_extent, radius, deformable=True, modulated=True)"
ATTENTIVE, DEPTHWISE = "KPConvX(64, shells, radius, sigma, attention_groups)", "KPConvD(64, shells, radius, sigma)"


def of_the_table(published, channels, radius, sigma, shells=None, attention_groups=None, **more):
    """The layer that the table of docs/frameworks.md names for a published one, in float64, with `more` options."""
    names = {"channels": channels, "radius": radius, "sigma": sigma, "KP_extent": sigma, "shells": shells,
             "attention_groups": attention_groups, "float64": torch.float64, "more": more}  # fmt: skip
    return eval(f"{TABLE[published][:-1]}, dtype=float64, **more)", vars(kpt) | names)


@pytest.mark.parametrize(
    ("published", "norms"),
    [
        # Norms of the kernel points in the published repositories, in search radii: a flattened ball; shells.
        (RIGID, [0] + [0.6539] * 2 + [0.6610] * 12),
        (MODULATED, [0] + [0.6539] * 2 + [0.6610] * 12),
        (ATTENTIVE, [0] + [0.4] * 14 + [0.8] * 28),
        (DEPTHWISE, [0] + [0.4] * 14 + [0.8] * 28),
    ],
)
def test_kernel_points_are_where_the_published_are(published, norms):
    layer = of_the_table(published, (4, 6), 2.5, 1.2, (1, 14, 28), 2)
    convs = [layer, layer.offset_conv] if published == MODULATED else [layer]
    for conv in convs:
        got = np.sort(conv.kernel_points.norm(dim=1).numpy())
        np.testing.assert_allclose(got, 2.5 * np.array(norms), atol=2.5e-3)
        assert conv.extent == 1.2


CLIENTS = [
    ("kpconv_rigid", "linear_sum", RIGID),
    ("kpconv_modulated", "linear", MODULATED),
    ("predator", "linear_sum", RIGID),
    ("geotransformer", "bias_strided", RIGID),
    ("easykpconv", "groups2_bias", RIGID),
    ("easykpconv", "depthwise", RIGID),
    ("kpconvx_conv", "KPConvD/linear", DEPTHWISE),
    ("kpconvx_attention", "KPConvX/groups2_strided", ATTENTIVE),
]


@pytest.mark.parametrize(("file", "case", "published"), CLIENTS)
def test_layers_of_published_code(file, case, published):
    """With the layers of docs/frameworks.md; test_compat_layers.py has all cases and the layers of published names."""
    with np.load(GOLDEN / f"clients_layers_{file}.npz") as golden:
        g = {key.removeprefix(f"{case}/"): golden[key] for key in golden if key.startswith(f"{case}/")}
    state = {key.removeprefix("in/state/"): torch.from_numpy(v) for key, v in g.items() if key.startswith("in/state/")}
    names = "in/in_channels", "in/out_channels", "in/channels"
    channels = [int(g[name]) for name in names if name in g]
    sigma = float(g["in/sigma"] if "in/sigma" in g else g["in/extent"])
    shells, attention = g.get("in/shell_sizes", np.ones(1, int)).tolist(), int(g.get("in/attention_groups", 0))
    more = {}
    if file in ("predator", "geotransformer", "easykpconv"):
        more = {"normalization": "positive", "bias": "bias" in state, "groups": int(g.get("in/groups", 1))}
    layer = of_the_table(published, channels, float(g["in/radius"]), sigma, shells, attention, **more)
    weights = state["weights"]  # Easy-KPConv: (K, groups, Cin / groups, Cout / groups)
    state["weights"] = weights.transpose(1, 2).reshape(layer.weights.shape) if weights.ndim == 4 else weights
    # Their kernel points are moved at random by a hundredth of the radius.
    ours, theirs = (points.norm(dim=1).sort()[0] for points in (layer.kernel_points, state["kernel_points"]))
    assert (ours - theirs).abs().max() < 0.04 * float(g["in/radius"])
    assert abs(ours[1:].mean() / theirs[1:].mean() - 1) < 0.01
    layer.load_state_dict(state)
    points, queries, features = (torch.from_numpy(g[f"in/{name}"]) for name in ("s_points", "q_points", "features"))
    neighbors, more = torch.from_numpy(g["in/neighbors"]), {}
    if len(points) == len(queries):
        queries = None
    elif attention:  # the published attention uses the first neighbor of a query, or zeros without one
        more["query_features"] = torch.cat([features, torch.zeros_like(features[:1])])[neighbors[:, 0]]
    out = layer(points, queries, neighbors, features, **more)
    assert_close(out.detach().numpy(), g["out/output"], 1e-10)


def test_golden_deformable_is_complete():
    assert len(DEFORMABLE) == 3


@pytest.mark.parametrize("name", ["sigmoid", "tanh_strided", "softmax_constant", "none"])
def test_golden_kpconvx(name):
    golden = {key.removeprefix(f"{name}/"): value for key, value in np.load(GOLDEN / "kpconvx.npz").items()}
    activation, influence = golden["options"].tolist()
    layer = kpt.KPConvX(
        12, [1, 14], radius=0.45, extent=float(golden["extent"]), attention_groups=int(golden["groups"]),
        attention_activation=None if activation == "none" else activation, attention_norm=bool(golden["norm"]),
        influence=influence, dtype=torch.float64
    )  # fmt: skip
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden if key.startswith("state/")}
    layer.load_state_dict(state, strict=True)
    points, queries = torch.from_numpy(golden["points"]), torch.from_numpy(golden["queries"])
    features = torch.from_numpy(golden["features"]).requires_grad_()
    neighbors = torch.from_numpy(golden["neighbors_padded"].astype(np.int64))
    for own in (queries,) if golden["strided"] else (None, points):
        out = layer(*of_queries(layer, points, own, neighbors, features) if golden["strided"] else
                    (points, own, neighbors, features))  # fmt: skip
        assert_close(out.detach().numpy(), golden["out"], 1e-10)
    out.backward(torch.from_numpy(golden["grad_out"]))
    assert_close(features.grad.numpy(), golden["grad/features"], 1e-10)
    for key, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == (f"grad/{key}" in golden), key
        if parameter.grad is not None:
            assert_close(parameter.grad.numpy(), golden[f"grad/{key}"], 1e-10)


def test_features_of_the_attention():
    torch.manual_seed(0)
    layer, (points, queries, neighbors, features) = LAYERS["x"](), case()
    first = features[: len(queries)]
    assert not torch.equal(layer(points, queries, neighbors, features, first),
                           layer(points, queries, neighbors, features, -first))  # fmt: skip
    neighbors = kpt.radius_search(points, None, 0.35)  # in order of index: the first neighbor is not the query
    expected = layer(points, None, neighbors, features)
    assert torch.equal(layer(points, points, neighbors, features), expected)
    assert torch.equal(layer(points, points.clone(), neighbors, features, features), expected)


@pytest.mark.parametrize(
    "queries", [lambda points: points.clone(), lambda points: points[:], lambda points: points[:7]]
)
def test_attention_of_other_queries_needs_their_features(queries):
    points, _, _, features = case()
    queries = queries(points)
    neighbors = kpt.radius_search(points, queries, 0.35, sort="distance")
    with pytest.raises(ValueError, match=r"^query_features: expected \(M, C\)"):
        LAYERS["x"]()(points, queries, neighbors, features)
    assert LAYERS["d"]()(points, queries, neighbors, features).shape == (len(queries), 4)


def test_without_attention_it_is_kpconvd():
    torch.manual_seed(0)
    layer, (points, queries, neighbors, features) = LAYERS["d"](torch.float64), case(dtype=torch.float64)
    expected = torch.zeros(len(queries), 4, dtype=torch.float64)
    for q in range(len(queries)):
        for i in neighbors.index[neighbors.row_splits[q] : neighbors.row_splits[q + 1]]:
            distances = (points[i] - queries[q] - layer.kernel_points).norm(dim=1)
            k = distances.argmin()
            expected[q] += max(0, 1 - distances[k] / 0.3) * layer.weights[k].detach() * features[i]
    assert_close(layer(points, queries, neighbors, features).detach().numpy(), expected.numpy(), 1e-10)


# ---- whole networks


@pytest.fixture
def network():
    """(a network in evaluation, its arguments, one of its parts)."""
    net = kp.nn.kpfcnn(1, 3, 0.2, levels=2, convs=2, width=8)
    levels = net.pyramid(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), F=kpt)
    module = kpt.Network(net).eval()
    return module, (levels, torch.ones(len(levels[0].points), 1)), module.get_submodule("encoder.1.unary2")


def with_weights(module, name, weights):
    """A copy of a network with other weights in one part."""
    params, state = module.arrays()
    assert name in params
    return kpt.Network(module.net, params | {name: weights.detach().numpy()}, state).eval()


class Doubled(torch.nn.Module):
    def forward(self, weights):
        return 2 * weights


def test_a_part_of_a_network_parametrised(network):
    module, given, part = network
    expected = with_weights(module, "encoder.1.unary2.weights", 2 * part.weights)(*given)[0]
    torch.nn.utils.parametrize.register_parametrization(part, "weights", Doubled())
    out = module(*given)[0]
    assert torch.equal(out, expected)
    out.sum().backward()
    assert part.parametrizations.weights.original.grad.any()
    assert list(module.arrays()[0]) == list(module.net.init()[0])


def test_a_part_of_a_network_pruned(network):
    module, given, part = network
    prune.l1_unstructured(part, "weights", amount=0.5)
    assert (part.weights == 0).float().mean() == 0.5
    for _ in range(2):  # each pass applies the mask to the trained weights
        expected = with_weights(module, "encoder.1.unary2.weights", part.weights_orig * part.weights_mask)(*given)[0]
        out = module(*given)[0]
        assert torch.equal(out, expected)
        out.sum().backward()
        with torch.no_grad():
            part.weights_orig.mul_(2)


def test_a_part_of_a_network_has_no_hook_for_results(network):
    module, given, part = network
    for name in ("register_forward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"):
        with pytest.raises(NotImplementedError, match="Network: expected a hook on the whole network"):
            getattr(part, name)(lambda *_: None)
    seen = []
    module.register_forward_hook(lambda module, inputs, result: seen.append(result))
    assert module(*given) is seen[0]


def test_batch_norm_is_not_made_one_of_several_processes(network):
    module, given, _ = network
    expected = module(*given)[0]
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert converted is module and not any(isinstance(m, torch.nn.SyncBatchNorm) for m in module.modules())
    assert torch.equal(module(*given)[0], expected)


@pytest.mark.parametrize("layer", [kpt.KPConv, kpt.DeformableKPConv])
def test_kernel_points_in_shells(layer):
    made = layer(4, 6, [1, 8], radius=0.2, extent=0.15, method="shells", groups=2)
    assert made.weights.shape == (9, 2, 6) and made.kernel_points.shape == (9, 3)
    points = torch.rand(30, 3)
    assert made(points, None, kpt.radius_search(points, None, 0.4), torch.ones(30, 4)).shape == (30, 6)
    made.reset_parameters()
    with pytest.raises(TypeError, match=r"^kernel_size: expected a sequence of integers, .* got int"):
        layer(4, 6, 9, radius=0.2, extent=0.15, method="shells")
    with pytest.raises(ValueError, match=r"^shell_sizes: expected"):
        kpt.KPConvX(8, [2, 8], radius=0.2, extent=0.15)


def test_the_default_dtype():
    """Layers have torch's default dtype, networks that of `init`; `kernel_points` are float32 by default."""
    torch.set_default_dtype(torch.float64)
    try:
        assert {t.dtype for t in LAYERS["x"]().state_dict().values()} == {torch.float64}
        net = kp.nn.kpfcnn(1, 3, 0.2, levels=2, convs=2, width=8)
        assert {t.dtype for t in kpt.Network(net).state_dict().values()} == {torch.float32}
        assert kpt.kernel_points(5, 0.2).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
