"""SubmanifoldConv, StridedConv and InverseConv against dense convolutions of torch, and spconv's layers."""

import copy
import math
import pickle

import pytest
from reference import assert_close

torch = pytest.importorskip("torch")

from torch.autograd.gradcheck import gradcheck  # noqa: E402
from torch.nn import functional  # noqa: E402

import kpcore as kp  # noqa: E402
import kpcore.torch as kpt  # noqa: E402

SHAPE = (6, 7, 8)


def cloud(num=90, dtype=torch.float32, seed=0):
    """(coordinates (num, 3) int32 of different voxels of SHAPE, features (num, 4))."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(math.prod(SHAPE), generator=generator)[:num]
    coords = torch.stack([chosen // 56, chosen // 8 % 7, chosen % 8], 1).int()
    return coords, torch.rand(num, 4, generator=generator, dtype=dtype)


def dense_weight(layer):
    """The weight of a dense convolution, (Cout, Cin, k0, k1, k2)."""
    return layer.weight.permute(4, 3, 0, 1, 2)


def at(grid, coords):
    return grid[0, :, coords[:, 0], coords[:, 1], coords[:, 2]].T


def test_submanifold_is_a_dense_convolution_at_the_inputs():
    coords, features = cloud()
    first, second = kpt.SubmanifoldConv(4, 5, 3, dilation=2), kpt.SubmanifoldConv(5, 2, 3, dilation=2, bias=False)
    m = first.kernel_map(coords)
    got = second(first(features, m), m)
    grid = features
    for layer in (first, second):
        grid = kpt.to_dense(coords, grid, SHAPE)
        grid = at(functional.conv3d(grid, dense_weight(layer), layer.bias, padding=2, dilation=2), coords)
    torch.testing.assert_close(got, grid)


@pytest.mark.parametrize("kernel_size, stride, padding", [(2, 2, 0), (3, 2, 1), ((3, 2, 1), (2, 1, 3), (1, 0, 0))])
def test_strided_and_inverse_are_dense_convolutions(kernel_size, stride, padding):
    coords, features = cloud()
    down = kpt.StridedConv(4, 5, kernel_size, stride=stride, padding=padding)
    up = kpt.InverseConv(5, 3, kernel_size)
    m = down.kernel_map(coords, shape=SHAPE)
    got = down(features, m)
    options = {"stride": stride, "padding": padding}
    dense = functional.conv3d(kpt.to_dense(coords, features, SHAPE), dense_weight(down), down.bias, **options)
    torch.testing.assert_close(got, at(dense, m.out_coords))
    grid = kpt.to_dense(m.out_coords, got, dense.shape[2:])
    transposed = functional.conv_transpose3d(grid, up.weight.permute(3, 4, 0, 1, 2), up.bias, **options)
    padded = functional.pad(transposed, (0, 3) * 3)  # cells that no output reads
    expected = at(padded - up.bias[:, None, None, None], coords) + up.bias
    inner = (coords < torch.tensor(transposed.shape[2:])).all(1)
    torch.testing.assert_close(up(got, m)[inner], expected[inner])
    assert inner.sum() > 40


def test_minkowski_outputs_are_multiples_of_the_stride():
    coords, features = cloud()
    layer = kpt.StridedConv(4, 5, 2, stride=2, rule="minkowski")
    m = layer.kernel_map(coords)
    assert not (m.out_coords % 2).any()
    spconv = kpt.StridedConv(4, 5, 2, stride=2)
    spconv.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(features, m), spconv(features, spconv.kernel_map(coords)))


def test_batches_do_not_see_each_other():
    coords, features = cloud()
    splits = torch.tensor([0, 40, 90])
    for layer in (kpt.SubmanifoldConv(4, 5, 3), kpt.StridedConv(4, 5, 3)):
        m = layer.kernel_map(coords, row_splits=splits)
        out = layer(features, m)
        for item in range(2):
            rows = slice(*splits[item : item + 2].tolist())
            one = layer(features[rows], layer.kernel_map(coords[rows]))
            torch.testing.assert_close(out[slice(*m.out_row_splits[item : item + 2].tolist())], one)


def test_gradients():
    coords, features = cloud(20, torch.float64)
    for kind in (kpt.SubmanifoldConv, kpt.StridedConv):
        layer = kind(4, 2, 2, dtype=torch.float64)
        m = layer.kernel_map(coords)
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def run(features, *values, layer=layer, m=m, names=names):
            out = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (features, m))
            return kpt.to_dense(m.out_coords, out, SHAPE)

        assert gradcheck(run, [features.requires_grad_(), *parameters], fast_mode=True)


@pytest.mark.parametrize("make", [kpt.SubmanifoldConv, kpt.StridedConv, kpt.InverseConv])
def test_module_basics(make):
    layer = make(4, 5, (3, 1, 2), dtype=torch.float64)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"weight": (3, 1, 2, 4, 5), "bias": (5,)}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    bound = 1 / math.sqrt(6 * 4)
    for parameter in layer.parameters():
        assert 0.5 * bound < parameter.abs().max() <= bound
    before = layer.weight.detach().clone()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, before)
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert make(4, 5, 3, dimension=2, bias=False).weight.shape == (3, 3, 4, 5)
    assert repr(make(4, 5, 3, bias=False)).startswith(f"{make.__name__}(4, 5, kernel_size=(3, 3, 3), bias=False")


def test_compiled():
    coords, features = cloud()
    layer = kpt.SubmanifoldConv(4, 5, 3)
    m = layer.kernel_map(coords)
    compiled = torch.compile(lambda features: torch.relu(layer(features, m)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features), torch.relu(layer(features, m)))


COORDS, FEATURES = cloud()
ERRORS = {
    "kernel_map: expected one for Kernel(size=(3, 3, 3), stride=(1, 1, 1), dilation=(1, 1, 1), padding=(0, 0, 0), "
    "rule='submanifold') to match the layer, got one for Kernel(size=(2, 2, 2), stride=(1, 1, 1), dilation=(1, 1, 1), "
    "padding=(0, 0, 0), rule='submanifold')":
        lambda: kpt.SubmanifoldConv(4, 5, 3)(FEATURES, kpt.kernel_map(COORDS, kernel_size=2)),
    "kernel_map: expected the map of a strided layer, got one for rule='submanifold'":
        lambda: kpt.InverseConv(4, 5, 3)(FEATURES, kpt.kernel_map(COORDS, kernel_size=3)),
    "kernel_map: expected the map that kernel_map made, got its transpose":
        lambda: kpt.SubmanifoldConv(4, 5, 3)(FEATURES, kpt.kernel_map(COORDS, kernel_size=3).transpose()),
    "kernel_map: expected a map of tensors, which kpcore.torch.kernel_map makes, got one of ndarray":
        lambda: kpt.SubmanifoldConv(4, 5, 3)(FEATURES, kp.kernel_map(COORDS.numpy(), kernel_size=3)),
    "coords: expected (N, 3) to match kernel_size, got (90, 4); the clouds of a batch are bounded by row_splits, not "
    "numbered in a column":
        lambda: kpt.StridedConv(4, 5, 3).kernel_map(torch.cat([COORDS[:, :1], COORDS], 1)),
    "kernel_map: expected kpcore.KernelMap, got Neighbors":
        lambda: kpt.SubmanifoldConv(4, 5, 3)(FEATURES, kpt.kernel_map(COORDS, kernel_size=3).neighbors),
    "features: expected (N, 4) to match in_channels, got (90, 3)":
        lambda: kpt.SubmanifoldConv(4, 5, 3)(FEATURES[:, :3], kpt.kernel_map(COORDS, kernel_size=3)),
    "kernel_size[1]: expected 1 to 2147483647, got 0": lambda: kpt.StridedConv(4, 5, (3, 0, 3)),
    "dimension: expected 1 to 4, got 5": lambda: kpt.StridedConv(4, 5, (1,) * 5),
    "stride: expected a number or 3 of them, got shape (2,)": lambda: kpt.StridedConv(4, 5, 3, stride=(2, 2)),
    "rule: expected 'spconv' or 'minkowski', got 'submanifold'": lambda: kpt.StridedConv(4, 5, 3, rule="submanifold"),
    "padding: expected 0 with rule='minkowski', got (1, 1, 1)":
        lambda: kpt.StridedConv(4, 5, 3, padding=1, rule="minkowski"),
    "in_channels: expected at least 1, got 0": lambda: kpt.InverseConv(0, 5, 3),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises((TypeError, ValueError)) as error:
        ERRORS[message]()
    assert str(error.value) == message


def test_coordinates_off_the_grid_are_an_error():
    with pytest.raises(TypeError, match=r"^coords: expected int32, got float32; coordinates are integers here"):
        kpt.SubmanifoldConv(4, 5, 3).kernel_map(COORDS.float())
    assert isinstance(kpt.SubmanifoldConv(4, 5, 3).kernel_map(COORDS), kp.KernelMap)


def test_layers_of_spconv():
    """A U of the three layers with the weights of spconv's, whose wheel for the CPU has no gradients."""
    spconv = pytest.importorskip("spconv.pytorch")
    native = {"algo": spconv.ConvAlgo.Native, "bias": False}
    theirs = [spconv.SubMConv3d(4, 5, 3, indice_key="sub", **native),
              spconv.SparseConv3d(5, 6, 2, stride=2, indice_key="down", **native),
              spconv.SparseInverseConv3d(6, 3, 2, indice_key="down", **native)]  # fmt: skip
    ours = [kpt.SubmanifoldConv(4, 5, 3, bias=False), kpt.StridedConv(5, 6, 2, bias=False),
            kpt.InverseConv(6, 3, 2, bias=False)]  # fmt: skip
    with torch.no_grad():
        for layer, their_layer in zip(ours, theirs, strict=True):  # (Cout, k0, k1, k2, Cin) -> (k0, k1, k2, Cin, Cout)
            layer.weight.copy_(their_layer.weight.permute(1, 2, 3, 4, 0))
    coords, features = cloud()
    same, down = ours[0].kernel_map(coords), ours[1].kernel_map(coords, shape=SHAPE)
    out = ours[2](ours[1](ours[0](features, same), down), down)
    indices = torch.cat([torch.zeros(90, 1, dtype=torch.int32), coords], 1)
    x = spconv.SparseConvTensor(features, indices, SHAPE, 1)
    expected = theirs[2](theirs[1](theirs[0](x))).features
    assert_close(out.detach().numpy(), expected.detach().numpy(), 2e-5)
