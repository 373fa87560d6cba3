"""Open3D's layers in kpcore.torch: against the operators, dense convolutions and results of Open3D, stored and live."""

import copy
import inspect
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from reference import assert_close

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402
from torch.nn.functional import conv3d, pad  # noqa: E402
from torch.nn.parameter import is_lazy  # noqa: E402

import kpcore.torch as kpt  # noqa: E402
from kpcore.compat import open3d as ops  # noqa: E402
from kpcore.torch import initializers  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
SPARSE = [kpt.SparseConv, kpt.SparseConvTranspose]
METRICS = ["L1", "L2", "Linf"]
EXTENTS = {"number": 0.8, "()": torch.tensor(0.8), "(1,)": torch.tensor([0.8]), "(M,)": torch.linspace(0.5, 1, 20),
           "(M, 1)": torch.linspace(0.5, 1, 20)[:, None], "(1, 3)": torch.tensor([[0.9, 0.7, 0.5]]),
           "(M, 3)": torch.linspace(0.5, 1, 60).reshape(20, 3)}  # fmt: skip


def window(r):
    return (1 - r).clamp(min=0) ** 2


def case(dtype=torch.float32, num=60, num_out=20, seed=0):
    """(features (N, 4), input positions, output positions), the positions in the unit cube."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num, 4), (num, 3), (num_out, 3)
    return [torch.rand(shape, generator=generator, dtype=dtype) for shape in shapes]


def make(layer=kpt.ContinuousConv, seed=0, **options):
    """A layer from 4 to 5 channels, by default with a kernel of unequal sizes, and a bias that is not zero."""
    torch.manual_seed(seed)
    options = {"bias_initializer": "uniform", **options}
    return layer(4, 5, options.pop("kernel_size", (2, 3, 4) if layer is kpt.ContinuousConv else 3), **options)


def as_tensor(extents, dtype):
    return extents.to(dtype) if isinstance(extents, torch.Tensor) else extents


def differences(inp, out, extents):
    """(M, N, 3): differences of positions, divided by half the extents."""
    extents = torch.as_tensor(extents, dtype=inp.dtype)
    rows = extents if extents.ndim == 2 else extents.reshape(-1, 1)
    return (inp[None] - out[:, None]) / (0.5 * rows)[:, None]


def norms(d, metric):
    return {"L1": d.abs().sum(-1), "L2": (d * d).sum(-1), "Linf": d.abs().amax(-1)}[metric]


# ---- ContinuousConv


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("extents", EXTENTS)
@pytest.mark.parametrize("has_window", [False, True])
def test_continuous_conv_is_the_operator_over_all_pairs(metric, extents, has_window):
    """All pairs within the extents, with the window function of their distances, and all the other arguments."""
    features, inp, out = case(torch.float64)
    extents, importance = as_tensor(EXTENTS[extents], torch.float64), torch.rand(60, dtype=torch.float64)
    layer = make(radius_search_metric=metric, window_function=window if has_window else None, activation=torch.tanh,
                 align_corners=False, offset=[0.1, -0.2, 0.3], dtype=torch.float64)  # fmt: skip
    distances = norms(differences(inp, out, extents), metric)
    near = distances <= 1
    assert 20 < near.sum() < 900
    index = near.nonzero()[:, 1].int()
    neighbors = kpt.Neighbors(index.numpy(), np.cumsum([0, *near.sum(1).tolist()]), 60)
    expected = kpt.continuous_conv(
        inp, out, neighbors, features, layer.kernel, extents, align_corners=False, normalize=True, offset=layer.offset,
        importances=importance, neighbor_importances=window(distances[near]) if has_window else None
    )  # fmt: skip
    expected = torch.tanh(expected + layer.bias)
    torch.testing.assert_close(layer(features, inp, out, extents, importance), expected)
    # With a gradient of the positions, distances are computed again instead of taken from the search.
    torch.testing.assert_close(layer(features, inp.requires_grad_(), out, extents, importance), expected)


def test_options_reach_the_operator():
    features, inp, out = case()
    options = {"coordinate_mapping": "identity", "interpolation": "nearest_neighbor", "align_corners": False}
    neighbors = kpt.radius_search(inp, out, 0.4)
    for normalize in (False, True):
        layer = make(**options, normalize=normalize, use_bias=False)
        expected = kpt.continuous_conv(
            inp, out, neighbors, features, layer.kernel, 0.8, **options, normalize=normalize
        )  # fmt: skip
        torch.testing.assert_close(layer(features, inp, out, 0.8), expected)
        assert layer.bias is None


def test_points_at_the_query_are_ignored():
    features, inp, _ = case()
    layer, other = (make(radius_search_ignore_query_points=i, normalize=False) for i in (True, False))
    changed = features.clone()
    changed[0] += 1
    assert torch.equal(layer(features, inp, inp, 0.8)[0], layer(changed, inp, inp, 0.8)[0])
    assert not torch.equal(other(features, inp, inp, 0.8)[0], other(changed, inp, inp, 0.8)[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("extents", ["()", "(M,)", "(1, 3)", "(M, 3)"])
def test_gradients_pass_the_window(metric, extents):
    """To positions, extents and parameters of the window function, and to all else."""
    features, inp, out = case(torch.float64, 12, 20)
    layer = make(radius_search_metric=metric, kernel_size=(2, 2, 3), dtype=torch.float64)
    parameter = torch.tensor([0.7, 1.3], dtype=torch.float64)
    extents = EXTENTS[extents].to(torch.float64) * 1.5
    inputs = [t.requires_grad_() for t in (features, inp, out, extents, parameter)]

    def run(features, inp, out, extents, parameter):
        layer.window_function = lambda r: parameter[0] * (1 - r) ** 2 + parameter[1] * r * (1 - r)
        return layer(features, inp, out, extents)

    assert gradcheck(run, inputs, fast_mode=True)
    with torch.no_grad():
        expected = run(*inputs)
    torch.testing.assert_close(run(*inputs).detach(), expected)


def test_a_window_function_learns():
    class Window(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sharpness = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, r):
            return torch.exp(-self.sharpness * r)

    features, inp, out = case()
    layer = make(window_function=Window(), normalize=False)
    assert "window_function.sharpness" in layer.state_dict()
    layer(features, inp, out, 0.8).sum().backward()
    assert layer.window_function.sharpness.grad != 0


def test_user_neighbors():
    features, inp, out = case()
    layer, plain = (make(window_function=w) for w in (window, None))
    found = plain.search(inp, out, 0.8)
    index, splits = torch.from_numpy(found.index.copy()), torch.from_numpy(found.row_splits.copy())
    importance = torch.rand(len(index))
    # The window function is not applied to neighbours that come with importances of their own, nor to those without.
    expected = kpt.continuous_conv(inp, out, found, features, layer.kernel, 0.8, normalize=True,
                                   neighbor_importances=importance) + layer.bias  # fmt: skip
    user = {"user_neighbors_index": index, "user_neighbors_row_splits": splits}
    torch.testing.assert_close(
        layer(features, inp, out, 0.8, **user, user_neighbors_importance=importance), expected
    )  # fmt: skip
    torch.testing.assert_close(layer(features, inp, out, 0.8, **user), plain(features, inp, out, 0.8))
    long = user | {"user_neighbors_index": index.long()}
    assert torch.equal(layer(features, inp, out, 0.8, **long), layer(features, inp, out, 0.8, **user))
    # It is applied to `neighbors`, whose index may be longer than its last pair.
    for lists in (found, kpt.Neighbors(np.append(found.index, 0), found.row_splits, 60)):
        torch.testing.assert_close(
            layer(features, inp, out, 0.8, neighbors=lists), layer(features, inp, out, 0.8)
        )  # fmt: skip


def test_nns_is_what_was_searched():
    features, inp, out = case()
    layer = make()
    assert layer.nns is None
    layer(features, inp, out, 0.8)
    found = layer.search(inp, out, 0.8)
    assert layer.nns.neighbors_index.tolist() == found.index.tolist()
    assert layer.nns.neighbors_row_splits.tolist() == found.row_splits.tolist()
    assert pickle.loads(pickle.dumps(layer)).nns is None


def test_dense_layer_for_center():
    features, inp, _ = case()
    layer = make(use_dense_layer_for_center=True, activation="relu")
    without = make(activation=None)
    without.load_state_dict({n: v for n, v in layer.state_dict().items() if n != "dense.weight"})
    expected = torch.relu(without(features, inp, inp, 0.8) + features @ layer.dense.weight.T)
    torch.testing.assert_close(layer(features, inp, inp, 0.8), expected)
    assert layer.dense.weight.abs().max() <= math.sqrt(6 / (4 + 5))
    assert layer.dense.weight.abs().max() > 0.1


# ---- SparseConv and SparseConvTranspose


def golden_configurations():
    with np.load(GOLDEN / "open3d_sparse_conv.npz") as data:
        return sorted({name.partition("/")[0] for name in data} - {"configs"})


def test_golden_is_complete():
    assert len(golden_configurations()) == 10


@pytest.mark.parametrize("name", golden_configurations())
def test_golden_sparse_conv(name):
    with np.load(GOLDEN / "open3d_sparse_conv.npz") as data:
        case = {key.partition("/")[2]: torch.from_numpy(data[key]) for key in data if key.startswith(f"{name}/")}
    layer = kpt.SparseConv(3, 4, case["filters"].shape[:3], use_bias=False, normalize=name.endswith("1"))
    layer.load_state_dict({"kernel": case["filters"], "offset": layer.offset})
    features = case["inp_features"].requires_grad_()
    out = layer(features, case["inp_positions"], case["out_positions"], case["voxel_size"])
    grads = torch.autograd.grad(out, [features, layer.kernel], case["grad_out"])
    for ours, theirs in zip((out.detach(), *grads), ("out", "grad_features", "grad_filters"), strict=True):
        assert_close(ours.numpy(), case[theirs].numpy(), 2e-5)


def voxels(size, count, generator):
    """(count, 3) different voxels of a cube of `size`, as (x, y, z)."""
    chosen = torch.randperm(size**3, generator=generator)[:count]
    return torch.stack([chosen % size, chosen // size % size, chosen // size**2], 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sparse_conv_is_a_dense_convolution(size):
    generator = torch.Generator().manual_seed(0)
    inp, out = voxels(7, 120, generator), voxels(7, 343, generator)
    layer, features = make(kpt.SparseConv, kernel_size=[size] * 3), torch.rand(120, 4, generator=generator)
    grid = torch.zeros(4, 7, 7, 7)
    grid[:, inp[:, 2], inp[:, 1], inp[:, 0]] = features.T
    padded = pad(grid, ((size - 1) // 2, size // 2) * 3)
    dense = conv3d(padded[None], layer.kernel.permute(4, 3, 0, 1, 2), layer.bias)[0]
    expected = dense[:, out[:, 2], out[:, 1], out[:, 0]].T
    got = layer(features, 0.25 * inp + 0.125, 0.25 * out + 0.125, torch.tensor(0.25))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_transpose_is_the_adjoint(size):
    generator = torch.Generator().manual_seed(1)
    inp, out = (voxels(6, count, generator).double() for count in (100, 80))
    options = {"kernel_size": [size] * 3, "use_bias": False, "dtype": torch.float64}
    layer, transposed = kpt.SparseConv(4, 5, **options), kpt.SparseConvTranspose(5, 4, **options)
    with torch.no_grad():
        transposed.kernel.copy_(layer.kernel.mT)
    x, y = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((100, 4), (80, 5)))
    left, right = (layer(x, inp, out, 1.0) * y).sum(), (x * transposed(y, out, inp, 1.0)).sum()
    assert abs(left - right) < 1e-12 * abs(left)


def test_normalize_divides_by_the_neighbors():
    generator = torch.Generator().manual_seed(2)
    inp, out = (voxels(4, 40, generator).float() for _ in range(2))
    x, y = torch.rand(40, 4, generator=generator), torch.rand(40, generator=generator)
    for layer in SPARSE:
        normalized, plain = (make(layer, normalize=n, use_bias=False) for n in (True, False))
        lists = plain.search(inp, out, 1.0)
        if layer is kpt.SparseConv:
            counts = torch.from_numpy(lists.counts)[:, None].clamp(min=1)
            expected = plain(x, inp, out, 1.0, y) / counts
        else:
            counts = torch.from_numpy(lists.transpose().counts)[:, None].clamp(min=1)
            expected = plain(x / counts, inp, out, 1.0) * y[:, None]
        torch.testing.assert_close(normalized(x, inp, out, 1.0, y), expected)
        torch.testing.assert_close(normalized(x, inp, out, 1.0, y, neighbors=lists), expected)
        assert normalized.nns.neighbors_index.tolist() == lists.index.tolist()


def test_positions_off_the_grid_belong_to_the_nearest_cell():
    """As Open3D's: the cell changes at the middle between two cells (Open3D#4512), and the window is 2 % wider."""
    layer = kpt.SparseConv(1, 1, 3, use_bias=False)
    with torch.no_grad():
        layer.kernel[1, 1, :, 0, 0] = torch.tensor([1.0, 2, 3])  # along x
    positions = torch.tensor([[x, 0, 0] for x in (-1.54, -1.52, -0.6, -0.4, 0.4, 0.6, 1.52, 1.54)])
    out = layer(torch.ones(1, 1), torch.zeros(1, 3), -positions, 1.0)
    assert out.ravel().tolist() == [0, 1, 1, 2, 2, 3, 3, 0]


# ---- batches


@pytest.mark.parametrize("layer", [kpt.ContinuousConv, *SPARSE])
def test_batches_are_items_one_by_one(layer):
    generator = torch.Generator().manual_seed(3)
    lengths = [30, 0, 25], [10, 7, 15]
    splits = [torch.tensor([0, *np.cumsum(n).tolist()]) for n in lengths]
    positions = [(torch.rand(sum(n), 3, generator=generator) * 4).floor() for n in lengths]
    features, size = torch.rand(55, 4, generator=generator), 2.5 if layer is kpt.ContinuousConv else 1.0
    inputs = [(features, splits[0]), (positions[0], splits[0]), (positions[1], splits[1])]
    module = make(layer)
    out = module(*(ops.RaggedTensor.from_row_splits(*part) for part in inputs), size)
    assert isinstance(out, ops.RaggedTensor) and torch.equal(out.row_splits, splits[1])
    for item in range(3):
        one = module(*(values[bounds[item] : bounds[item + 1]] for values, bounds in inputs), size)
        torch.testing.assert_close(out[item], one)
    together = module(features, *positions, size)
    assert not torch.allclose(together, out.values), "the items see each other when they are one cloud"


# ---- searches and pooling


def test_search_layers_are_the_functions():
    _, points, queries = case()
    ps, qs = torch.tensor([0, 30, 60]), torch.tensor([0, 15, 20])
    ragged = ops.RaggedTensor.from_row_splits(points, ps), ops.RaggedTensor.from_row_splits(queries, qs)
    table = ops.build_spatial_hash_table(points, 0.4, ps, 1 / 64)
    radii, whole = torch.linspace(0.2, 0.6, 20), (torch.tensor([0, 60]), torch.tensor([0, 20]))
    for metric, ignore, distances, dtype in itertools.product(
        METRICS, (False, True), (False, True), (torch.int32, torch.int64)
    ):
        options = {"metric": metric, "ignore_query_point": ignore, "return_distances": distances, "index_dtype": dtype}
        fixed, by_radii = kpt.FixedRadiusSearch(**options), kpt.RadiusSearch(**options, normalize_distances=True)
        expected = [
            ops.fixed_radius_search(points, queries, 0.4, ps, qs, table[2], table[0], table[1], **options),
            ops.radius_search(points, queries, radii, ps, qs, **options, normalize_distances=True),
            ops.knn_search(points, queries, 3, ps, qs, **options),
        ]
        nearest = kpt.KNNSearch(**options)
        got = [fixed(*ragged, 0.4, hash_table=table), by_radii(*ragged, radii), nearest(*ragged, 3)]
        got += [fixed(points, queries, 0.4, ps, qs), by_radii(points, queries, radii, ps, qs),
                nearest(points, queries, 3, ps, qs)]  # fmt: skip
        for ours, theirs in zip(got, expected * 2, strict=True):
            assert ours._fields == theirs._fields and all(map(torch.equal, ours, theirs))
            assert ours.neighbors_index.dtype == dtype
        expected = ops.knn_search(points, queries, 3, *whole, **options)
        assert all(map(torch.equal, nearest(points, queries, 3), expected))


@pytest.mark.parametrize("position_fn", ["average", "nearest_neighbor", "center"])
@pytest.mark.parametrize("feature_fn", ["average", "nearest_neighbor", "max"])
def test_voxel_pooling(position_fn, feature_fn):
    features, points, _ = case()
    got = kpt.VoxelPooling(position_fn, feature_fn)(points, features, 0.3)
    assert all(map(torch.equal, got, ops.voxel_pooling(points, features, 0.3, position_fn, feature_fn)))
    default = kpt.VoxelPooling()
    assert (default.position_fn, default.feature_fn) == ("center", "max")


def test_a_hash_table_is_checked_and_not_needed():
    features, inp, out = case()
    table = ops.build_spatial_hash_table(inp, 0.4, torch.tensor([0, 60]), 1 / 64)
    layer = make()
    expected = layer(features, inp, out, 0.8)
    assert torch.equal(layer(features, inp, out, 0.8, fixed_radius_search_hash_table=table), expected)
    wrong = ops.build_spatial_hash_table(out, 0.4, torch.tensor([0, 20]), 1 / 64)
    with pytest.raises(ValueError, match=r"^hash_table_index: invalid shape, expected \(60,\) to match points, got"):
        layer(features, inp, out, 0.8, fixed_radius_search_hash_table=wrong)
    transposed = make(kpt.SparseConvTranspose)
    with pytest.raises(ValueError, match=r"^hash_table_index: invalid shape, expected \(20,\) to match points, got"):
        transposed(features, inp, out, 0.8, fixed_radius_search_hash_table=table)
    transposed(features, inp, out, 0.8, fixed_radius_search_hash_table=wrong)


# ---- parameters


def test_regularization():
    layer = make()
    assert layer.regularization() == 0 and layer.regularization().shape == ()
    terms = {"kernel": lambda t: 0.5 * t.square().sum(), "bias": lambda t: t.abs().sum(), "dense_kernel": torch.sum}
    layer = make(use_dense_layer_for_center=True, **{f"{name}_regularizer": term for name, term in terms.items()})
    expected = 0.5 * layer.kernel.square().sum() + layer.bias.abs().sum() + layer.dense.weight.sum()
    torch.testing.assert_close(layer.regularization(), expected)
    layer.regularization().backward()
    assert torch.equal(layer.kernel.grad, layer.kernel)
    sparse = make(kpt.SparseConv, kernel_regularizer=torch.sum, bias_regularizer=torch.sum)
    torch.testing.assert_close(sparse.regularization(), sparse.kernel.sum() + sparse.bias.sum())


@pytest.mark.parametrize("layer", [kpt.ContinuousConv, *SPARSE])
def test_channels_are_inferred_at_the_first_call(layer):
    torch.manual_seed(0)
    options = {"use_dense_layer_for_center": True} if layer is kpt.ContinuousConv else {}
    lazy = layer(filters=5, kernel_size=[3, 3, 3], **options)
    names = list(lazy.state_dict())
    assert is_lazy(lazy.kernel) and lazy.in_channels is None
    optimizer = torch.optim.SGD(lazy.parameters(), 0.1)
    copies = [copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy)]
    copies[2].load_state_dict(lazy.state_dict())
    wide = copy.deepcopy(lazy).double()
    features, inp, _ = case()
    out = lazy(features, inp, inp, 0.5)
    assert lazy.in_channels == 4 and lazy.kernel.shape == (3, 3, 3, 4, 5)
    assert 0.04 < lazy.kernel.abs().max() <= 0.05
    out.sum().backward()
    before = lazy.kernel.detach().clone()
    optimizer.step()
    assert not torch.equal(lazy.kernel, before)
    assert type(lazy.kernel) is torch.nn.Parameter and list(lazy.state_dict()) == names
    for other in copies:
        other.load_state_dict(lazy.state_dict())
        assert torch.equal(other(features, inp, inp, 0.5), lazy(features, inp, inp, 0.5))
        assert other.in_channels == 4
    assert wide(features.double(), inp.double(), inp.double(), 0.5).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"size mismatch for kernel: .*\[3, 3, 3, 4, 5\].*\[2, 2, 2, 4, 5\]"):
        layer(filters=5, kernel_size=[2, 2, 2]).load_state_dict(
            {name: value for name, value in lazy.state_dict().items() if "dense" not in name}
        )


def test_state_dict_has_no_gradient():
    layer = kpt.ContinuousConv(filters=2, kernel_size=3)
    assert not layer.state_dict()["bias"].requires_grad
    assert layer.state_dict(keep_vars=True)["bias"] is layer.bias


@pytest.mark.parametrize("layer", [kpt.ContinuousConv, *SPARSE])
def test_module_basics(layer):
    features, inp, _ = case(torch.float64)
    module = make(layer, dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64} and module.offset.dtype == torch.float64
    expected = module(features, inp, inp, 0.5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(features, inp, inp, 0.5), expected)
    kernel = module.kernel.detach().clone()
    module.reset_parameters()
    assert not torch.equal(module.kernel, kernel) and module.kernel.abs().max() <= 0.05
    with torch.device("meta"):
        moved = make(layer).to_empty(device="cpu")
    moved.load_state_dict(make(layer).state_dict())
    assert torch.equal(moved(*case(), 0.5), make(layer)(*case(), 0.5))
    assert repr(module).startswith(f"{layer.__name__}(4, 5, kernel_size=")


def test_autocast():
    features, inp, out = case()
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        halves = torch.nn.functional.linear(features, torch.eye(4))
        assert halves.dtype == torch.bfloat16
        got = layer(halves, inp, out, 0.8)
    torch.testing.assert_close(got.float(), layer(halves.float(), inp, out, 0.8), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "bound", "deviation"), [
    ("uniform", 0.05, 0.05 / 3**0.5),
    ("zeros", 0, 0),
    ("normal", None, 0.05),
    ("truncated_normal", 0.1, 0.05 * 0.8796),
    ("glorot_uniform", (3 / 560) ** 0.5, 560**-0.5),  # 8 cells, 40 inputs and 100 outputs
    ("he_uniform", (6 / 320) ** 0.5, 160**-0.5),
    ("glorot_normal", 2 / 0.8796 * 560**-0.5, 560**-0.5),
    ("he_normal", 2 / 0.8796 * 160**-0.5, 160**-0.5),
    ("lecun_uniform", (3 / 320) ** 0.5, 320**-0.5),
])  # fmt: skip
def test_initializers_of_tensorflow(name, bound, deviation):
    torch.manual_seed(0)
    kernel = kpt.ContinuousConv(40, 100, 2, kernel_initializer=name).kernel
    assert abs(kernel.std() - deviation) <= 0.02 * deviation and abs(kernel.mean()) <= 0.02 * deviation
    if bound is not None:
        assert 0.97 * bound <= kernel.abs().max() <= 1.001 * bound


def test_initializers_of_the_dense_layer_and_the_bias():
    torch.manual_seed(0)
    dense = {"use_dense_layer_for_center": True, "dense_kernel_initializer": "he_uniform"}
    weight = kpt.ContinuousConv(600, 4, 1, **dense).dense.weight  # of 600 inputs, not of 4
    assert 0.95 * (6 / 600) ** 0.5 <= weight.abs().max() <= (6 / 600) ** 0.5
    layer = kpt.SparseConv(4, 5, 3, kernel_initializer=torch.nn.init.ones_, bias_initializer="ones")
    assert (layer.kernel == 1).all() and (layer.bias == 1).all()


def test_activations_of_tensorflow():
    x = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(initializers.activated("relu", x), x.clamp(min=0))
    torch.testing.assert_close(initializers.activated("leaky_relu", x), torch.where(x < 0, 0.2 * x, x))
    torch.testing.assert_close(initializers.activated("softmax", x), x.exp() / x.exp().sum())
    assert initializers.activated("linear", x) is x and initializers.activated(None, x) is x
    for name in initializers._ACTIVATIONS:
        assert pickle.loads(pickle.dumps(make(activation=name))).activation == name


FEATURES, INP, OUT = case()
ERRORS = {
    "filters: expected an integer, got NoneType": lambda: kpt.ContinuousConv(4),
    "kernel_size: expected 3 integers, or one for all axes, got None": lambda: kpt.ContinuousConv(4, 5),
    "kernel_size: expected a number or 3 of them, got shape (2,)": lambda: kpt.ContinuousConv(4, 5, [3, 3]),
    "kernel_size: expected the same size along all axes, got (3, 3, 2)": lambda: kpt.SparseConv(4, 5, [3, 3, 2]),
    "coordinate_mapping: expected 'ball_to_cube_radial' or 'ball_to_cube_volume_preserving' or 'identity', got 'cube'":
        lambda: make(coordinate_mapping="cube"),
    "radius_search_metric: expected 'L1' or 'L2' or 'Linf', got 'l2'": lambda: make(radius_search_metric="l2"),
    "offset: expected 3 numbers, got 2": lambda: make(offset=[0.0, 1.0]),
    "kernel_regularizer: expected a function of a tensor or None, got str": lambda: make(kernel_regularizer="l2"),
    "window_function: expected a function of a tensor or None, got float": lambda: make(window_function=0.5),
    "inp_features: invalid shape, expected (N, 4) to match in_channels, got (60, 3)":
        lambda: make()(FEATURES[:, :3], INP, OUT, 0.8),
    "inp_positions: invalid shape, expected (60, 3) to match inp_features, got (59, 3)":
        lambda: make()(FEATURES, INP[1:], OUT, 0.8),
    "out_positions: expected float32 to match inp_positions, got float64":
        lambda: make()(FEATURES, INP, OUT.double(), 0.8),
    "inp_features: expected float64 to match the kernel, got float32":
        lambda: make().double()(FEATURES, INP, OUT, 0.8),
    "extents: expected a number, (1,) or (20,) to match out_positions, or for each axis (1, 3) or (20, 3), got (7,)":
        lambda: make()(FEATURES, INP, OUT, torch.ones(7)),
    "extents: expected a finite number above zero, got 0": lambda: make()(FEATURES, INP, OUT, 0),
    "extents: expected numbers above zero, got -1.0 in row 1":
        lambda: make()(FEATURES, INP, OUT, torch.tensor([1.0, -1.0] * 10)),
    "extents: expected float32 to match points, got float64; convert points with points.to(extents.dtype)":
        lambda: make()(FEATURES, INP, OUT, torch.tensor(1.0, dtype=torch.float64)),
    "out_positions: expected 60 rows to match inp_features, because use_dense_layer_for_center=True, got 20":
        lambda: make(use_dense_layer_for_center=True)(FEATURES, INP, OUT, 0.8),
    "window_function: expected a tensor of shape (1,), got (1, 1)":
        lambda: make(window_function=lambda r: r[:, None])(FEATURES[:1], INP[:1], INP[:1], 0.8),
    "user_neighbors_row_splits: expected a torch tensor, got NoneType":
        lambda: make()(FEATURES, INP, OUT, 0.8, user_neighbors_index=torch.zeros(3, dtype=torch.int32)),
    "user_neighbors_row_splits: invalid shape, expected (21,) to match out_positions, got (2,)":
        lambda: make()(FEATURES, INP, OUT, 0.8, user_neighbors_index=torch.zeros(3, dtype=torch.int32),
                       user_neighbors_row_splits=torch.tensor([0, 3])),
    "user_neighbors_index: expected values from 0 to 59 to match num_points, got 60":
        lambda: make()(FEATURES, INP, OUT[:1], 0.8, user_neighbors_index=torch.full((3,), 60, dtype=torch.int32),
                       user_neighbors_row_splits=torch.tensor([0, 3])),
    "user_neighbors_importance: expected None without user_neighbors_index, got a tensor":
        lambda: make()(FEATURES, INP, OUT, 0.8, user_neighbors_importance=torch.ones(3)),
    "neighbors: expected None with user_neighbors_index, got Neighbors":
        lambda: make()(FEATURES, INP, OUT, 0.8, user_neighbors_index=torch.zeros(3, dtype=torch.int32),
                       user_neighbors_row_splits=torch.tensor([0, 3]), neighbors=make().search(INP, OUT, 0.8)),
    "inp_features, inp_positions, out_positions: expected RaggedTensors, because one of them is one, got Tensor, "
    "RaggedTensor, Tensor":
        lambda: make()(FEATURES, ops.RaggedTensor.from_row_splits(INP, torch.tensor([0, 60])), OUT, 0.8),
    "voxel_size: expected one number, got (2,)": lambda: make(kpt.SparseConv)(FEATURES, INP, OUT, torch.ones(2)),
    "voxel_size: expected a finite number above zero, got -1.0": lambda: make(kpt.SparseConv)(FEATURES, INP, OUT, -1.0),
    "metric: expected 'L1' or 'L2' or 'Linf', got 'l2'": lambda: kpt.KNNSearch("l2"),
    "index_dtype: expected torch.int32 or torch.int64, got torch.int16":
        lambda: kpt.RadiusSearch(index_dtype=torch.int16),
    "position_fn: expected 'average' or 'nearest_neighbor' or 'center', got 'max'": lambda: kpt.VoxelPooling("max"),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ERRORS[message]()
    assert str(error.value) == message


def test_names_of_initializers_are_checked():
    with pytest.raises(ValueError, match=r"^kernel_initializer: expected a function or one of 'glorot_normal', .*'l2'"):
        make(kernel_initializer="l2")
    with pytest.raises(ValueError, match=r"^activation: expected a function or one of 'elu', .* got 'Relu'"):
        make(activation="Relu")


def test_row_splits_of_features_are_those_of_positions():
    parts = [ops.RaggedTensor.from_row_splits(v, torch.tensor(s))
             for v, s in ((FEATURES, [0, 30, 60]), (INP, [0, 20, 60]), (OUT, [0, 10, 20]))]  # fmt: skip
    with pytest.raises(ValueError, match=r"^inp_features: expected row_splits \[0, 20, 60\] to match inp_positions"):
        make()(*parts, 0.8)


# ---- Open3D itself


@pytest.fixture(scope="module")
def their_layers():
    """open3d.ml.torch.layers, whose import needs graphics libraries."""
    try:
        from open3d.ml.torch import layers
    except Exception as error:  # of which kind depends on what is missing
        pytest.skip(f"optional: open3d.ml.torch cannot be imported: {error}")
    return layers


def run(layer, features, *inputs, **options):
    """The output and the gradients of features, kernel and bias."""
    features = features.clone().requires_grad_()
    out = layer(features, *inputs, **options)
    parameters = [features, layer.kernel, layer.bias]
    return out.detach(), *torch.autograd.grad(out, parameters, torch.linspace(-1, 1, out.numel()).reshape(out.shape))


def assert_same_layers(ours, theirs, *inputs, **options):
    """That a state_dict of theirs loads, and outputs and gradients are then equal."""
    ours.load_state_dict(theirs.state_dict())
    for got, expected in zip(run(ours, *inputs, **options), run(theirs, *inputs, **options), strict=True):
        assert_close(got.numpy(), expected.numpy(), 2e-5)


def test_names_of_open3d(their_layers):
    """Code that says ml3d.layers, ml3d.ops and ml3d.classes runs with one import changed."""
    names = [name for name, value in vars(their_layers).items() if isinstance(value, type)]
    assert sorted(names) == sorted(vars(ops.layers)) and len(names) == 7
    assert ops.layers.SparseConv is kpt.SparseConv and ops.ops is ops.classes is ops


@pytest.mark.parametrize("name", ["ContinuousConv", "SparseConv", "SparseConvTranspose"])
def test_signatures_of_open3d(their_layers, name):
    for method in ("__init__", "forward"):
        ours, theirs = (
            [p.name for p in inspect.signature(getattr(getattr(m, name), method)).parameters.values()
             if p.kind is not p.VAR_KEYWORD]
            for m in (kpt, their_layers)
        )  # fmt: skip
        assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_continuous_conv_of_open3d(their_layers, metric, has_window, dense):
    features, inp, out = case(seed=5)
    out = inp if dense else out
    for number, (mapping, interpolation, align_corners) in enumerate(itertools.product(
        ("ball_to_cube_radial", "ball_to_cube_volume_preserving", "identity"),
        ("linear", "linear_border", "nearest_neighbor"), (False, True)
    )):  # fmt: skip
        options = {
            "kernel_size": [3, 4, 2], "coordinate_mapping": mapping, "interpolation": interpolation,
            "align_corners": align_corners, "normalize": number % 3 > 0, "radius_search_metric": metric,
            "window_function": window if has_window else None, "use_dense_layer_for_center": dense,
            "radius_search_ignore_query_points": dense, "offset": torch.tensor([0.1, -0.2, 0.3]),
            "bias_initializer": torch.nn.init.normal_, "activation": torch.tanh,
        }  # fmt: skip
        ours, theirs = (m.ContinuousConv(4, 5, **options) for m in (kpt, their_layers))
        assert_same_layers(ours, theirs, features, inp, out, 0.8, inp_importance=torch.rand(60))
        if metric != "Linf" and not has_window:  # Open3D has no Linf there, and raises an error with a window
            assert_same_layers(ours, theirs, features, inp, out, torch.linspace(0.5, 1, len(out)))


@pytest.mark.parametrize("name", ["SparseConv", "SparseConvTranspose"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sparse_layers_of_open3d(their_layers, name, size):
    generator = torch.Generator().manual_seed(size)
    for on_grid, normalize in itertools.product((True, False), (True, False)):
        inp, out = (torch.rand(n, 3, generator=generator) * 6 for n in (80, 60))
        inp, out = (inp.floor() * 0.25, out.floor() * 0.25) if on_grid else (inp * 0.25, out * 0.25)
        options = {"kernel_size": [size] * 3, "normalize": normalize, "bias_initializer": torch.nn.init.normal_}
        ours, theirs = (getattr(m, name)(4, 5, **options) for m in (kpt, their_layers))
        features = torch.rand(80, 4, generator=generator)
        assert_same_layers(ours, theirs, features, inp, out, 0.25)
