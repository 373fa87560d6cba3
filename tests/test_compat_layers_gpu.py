"""The published layers of kpcore.compat on a GPU: on CUDA tensors, or those of the host standing for them."""

import sys
from pathlib import Path

import pytest
import test_compat_layers as cases

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent / "cuda_emu"))
from test_torch_gpu import device, place  # noqa: E402, F401 - device is a fixture of every test

from kpcore.compat import kpconv_pytorch, padded  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("file", "case"),
    [("kpconv_rigid", "linear_sum_minus_one_padding"), ("kpconv_modulated", "linear"), ("predator", "gaussian_closest"),
     ("open3dml", "deformable"), ("geotransformer", "bias"), ("easykpconv", "groups2_bias"),
     ("kpconvx_conv", "KPConv/modulated"), ("kpconvx_attention", "KPConvX/groups2_strided")],
)  # fmt: skip
def test_golden(file, case):
    cases.check_recorded(file, case, place)


def test_pooling():
    features, matrix = cases.padded_rows()
    features = features.detach()
    with_padding = torch.cat([features, torch.zeros(1, 4)])
    moved, indices = place(features.numpy()), place(matrix.numpy())
    assert torch.equal(kpconv_pytorch.max_pool(moved, indices).cpu(), with_padding[matrix].amax(1))
    assert torch.equal(kpconv_pytorch.closest_pool(moved, indices).cpu(), with_padding[matrix[:, 0]])
    average = kpconv_pytorch.global_average(moved, [10, 0, 20]).cpu()
    expected = torch.stack([features[:10].mean(0), with_padding[-1], features[10:].mean(0)])
    assert torch.allclose(average, expected, rtol=1e-12)


def test_a_list_is_where_its_matrix_is():
    _, matrix = cases.padded_rows()
    matrix = place(matrix.numpy())
    made = padded.neighbors("matrix", matrix, 30)
    assert type(made.stored_index).__module__.partition(".")[0] != "numpy"
    assert padded.neighbors("matrix", matrix, 30) is made
    matrix[0] = -1
    assert padded.neighbors("matrix", matrix, 30).to("cpu").counts[0] == 0
