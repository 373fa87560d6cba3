"""kpcore.torch on a GPU: on real CUDA tensors where there are any, else with tensors of the host standing for them.

Then everything but the dispatch of torch itself runs: the conversions, the kernels on the emulator, and autograd.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import ops
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))
import test_gpu  # noqa: E402 - which installs the stand-in for CuPy, or CuPy
from test_gpu import cupy  # noqa: E402

import kpcore as kp  # noqa: E402
import kpcore.torch as kpt  # noqa: E402
from kpcore.ops import OPS  # noqa: E402
from kpcore.torch import ops as torch_ops  # noqa: E402

pytestmark = pytest.mark.gpu
REAL = not test_gpu.EMULATED and torch.cuda.is_available()


@pytest.fixture(autouse=True)
def device(monkeypatch):
    if not REAL:
        monkeypatch.setattr(torch_ops, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(torch_ops, "torch_stream", lambda device: nullcontext())


def place(value):
    """Tensors and lists on the device."""
    if isinstance(value, kp.Neighbors):
        return value.to("cuda")
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(value.copy())
        return tensor.cuda() if REAL else tensor
    return value


def check(variant, context):
    """The operator on tensors, within the context, against that on arrays."""
    op, arguments = ops.call(variant)
    names = ops.diff(op, arguments)
    out, pullback = ops.vjp(op, arguments, names)
    grad = np.asarray(ops.covector(out))
    given = {name: place(value) for name, value in arguments.items()}
    for name in names:
        given[name].requires_grad_()
    with context:
        got = ops.output(op, getattr(kpt, op.name)(**given))
        found = torch.autograd.grad(got, [given[name] for name in names], place(grad))
    for a, b in zip((got.detach(), *found), (out, *pullback(grad)), strict=True):
        assert a.is_cuda == REAL
        np.testing.assert_allclose(a.cpu().numpy(), b, rtol=0, atol=1e-10 * max(np.abs(b).max(initial=0), 1))


@pytest.mark.parametrize("variant", ops.VARIANTS)
def test_every_operator_and_its_gradients(variant):
    check(variant, nullcontext())


@pytest.mark.parametrize("variant", ["kpconv-0", "neighbor_reduce-1", "batch_norm-0"])
def test_as_torch_operators(variant):
    """What compilers and tracers see."""
    check(variant, torch.profiler.profile())  # somebody listens


def test_what_is_not_traced():
    points = np.random.default_rng(0).random((200, 3), np.float32)
    tensor = place(points)
    expected = kp.radius_search(points, None, 0.2)
    tree, grid = kpt.KDTree(tensor), kpt.GridIndex(tensor, 0.2)
    for found in (kpt.radius_search(tensor, None, 0.2), tree.radius_search(tensor, 0.2), tree.radius_search(None, 0.2),
                  grid.radius_search(None, 0.2)):  # fmt: skip
        assert isinstance(found.index, cupy.ndarray)
        assert np.array_equal(found.to("cpu").index, expected.index)
    assert torch.is_tensor(kpt.grid_subsample(tensor, 0.2).points)
    pyramid = kpt.build_pyramid(tensor, voxel_size=0.1, num_levels=2)
    assert torch.is_tensor(pyramid[0].points) and isinstance(pyramid[0].pools.index, cupy.ndarray)
    assert kpt.farthest_point_sampling(tensor, 5).index.tolist() == kp.farthest_point_sampling(points, 5).index.tolist()


def test_lists_move_to_the_device_and_back():
    neighbors = kp.radius_search(np.random.default_rng(0).random((50, 3)), None, 0.3)
    moved = kpt.to_device({"lists": [neighbors]}, "cuda")["lists"][0]
    assert isinstance(moved.index, cupy.ndarray)
    assert np.array_equal(kpt.to_device((moved,), "cpu")[0].index, neighbors.index)


def test_limits_of_clouds_on_the_device():
    points = np.random.default_rng(0).random((300, 3), np.float32)
    settings = {"voxel_size": 0.1, "num_levels": 2}
    assert kpt.calibrate_neighbor_limits(iter([place(points)]), **settings) == kp.calibrate_neighbor_limits(
        [points], **settings
    )


def test_a_layer_trains():
    points = place(np.random.default_rng(0).random((60, 3), np.float32))
    neighbors = kpt.radius_search(points, None, 0.4)
    layer = kpt.DeformableKPConv(4, 5, radius=0.2, extent=0.15)
    layer = layer.cuda() if REAL else layer
    features, losses = place(np.ones((60, 4), np.float32)), []
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss = (layer(points, None, neighbors, features) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_a_padded_matrix_of_the_device():
    points = place(np.random.default_rng(0).random((30, 3), np.float32))
    neighbors = kpt.radius_search(points, None, 0.4)
    padded = place(neighbors.to("cpu").to_padded().astype(np.int64))
    layer = kpt.KPConv(2, 3, radius=0.2, extent=0.15)
    layer = layer.cuda() if REAL else layer
    features = place(np.ones((30, 2), np.float32))
    a, b = layer(points, None, neighbors, features), layer(points, None, padded, features)
    assert torch.equal(a, b)


def test_every_operator_is_there_for_cuda():
    for name in OPS:
        if OPS[name].result is not None:
            for which in (name, f"{name}_vjp"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kpcore::{which}", "CUDA")


def test_tensors_elsewhere():
    with pytest.raises(
        TypeError, match=r"features: expected a tensor on the CPU or a CUDA GPU, got one on meta; move it"
    ):
        kpt.relu(torch.ones(3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_of_16_bits_are_traced(dtype):
    assert torch_ops.numpy_dtype("features", dtype, torch.empty(1)).name == str(dtype)[6:]
    assert torch_ops._torch_dtype(torch_ops.numpy_dtype("features", dtype, torch.empty(1))) == dtype


def test_memory_of_torch(monkeypatch):
    """CuPy's functions are given those of torch."""
    calls = []
    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", lambda *given: calls.append(given) or 4096)
    monkeypatch.setattr(torch.cuda, "caching_allocator_delete", lambda *given: calls.append(given))
    monkeypatch.setattr(cupy.cuda, "set_allocator", calls.append)
    kpt.use_torch_allocator()
    if not REAL:
        ((allocate, free),) = calls
        assert allocate(512, 0) == 4096
        free(4096, 0)
        assert calls[1:] == [(512, 0, 0), (4096,)]
