"""The functions of kpcore.compat on a GPU: CuPy arrays, and CUDA tensors or those of the host standing for them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import test_compat_functions as cases
from reference import assert_same_bits

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))
from test_gpu import cupy  # noqa: E402
from test_torch_gpu import REAL, device, place  # noqa: E402, F401 - device is a fixture of every test

pytestmark = pytest.mark.gpu


def assert_results(got, expected, kind):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert isinstance(a, kind)
        a = a.cpu().numpy() if kind is torch.Tensor else a.get()
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if b.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        else:
            assert_same_bits(np.ascontiguousarray(a), b)


@pytest.mark.parametrize("function", ["subsample_batch", "batch_query", "grid_subsample_pack_mode", "max_pool"])
def test_cupy_arrays(function):
    got = cases.results(function, lambda _, array: cupy.asarray(array))
    assert_results(got, cases.results(function), cupy.ndarray)


@pytest.mark.parametrize("function", cases.CALLS)
def test_tensors(function):
    got = cases.results(function, lambda _, array: place(array))
    assert all(tensor.is_cuda == REAL for tensor in got)
    assert_results(got, cases.results(function), torch.Tensor)


def test_lengths_on_the_host():
    got = cases.results("batch_query", lambda name, array: array if name in "LM" else place(array))
    assert_results(got, cases.results("batch_query"), torch.Tensor)
    got = cases.results("subsample_batch", lambda name, array: array if name in "LM" else cupy.asarray(array))
    assert_results(got, cases.results("subsample_batch"), cupy.ndarray)


@pytest.mark.parametrize("project, function, case", cases.cases("radius_search_pack_mode"))
def test_a_radius_at_which_points_lie(project, function, case):
    arguments, _ = cases.read(project, function, case)
    moved = {name: cupy.asarray(v) if isinstance(v, np.ndarray) else v for name, v in arguments.items()}
    for module_function, drop in ((cases.compat.radius_search_pack_mode, ()),
                                  (cases.compat.radius_count_pack_mode, ("neighbor_limit",))):  # fmt: skip
        on_cpu, on_gpu = ({k: v for k, v in a.items() if k not in drop} for a in (arguments, moved))
        assert_results((module_function(**on_gpu),), (module_function(**on_cpu),), cupy.ndarray)
