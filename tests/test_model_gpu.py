"""Models that are called with arrays of a GPU, on the emulator where there is none."""

import numpy as np
import pytest
from test_gpu import cupy

from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import Columns
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict

pytestmark = pytest.mark.gpu


def test_predictions_of_arrays_on_a_gpu():
    config = from_dict({
        "data": {"train": ["a.laz"], "classes": {"low": [2], "high": [6]},
                 "features": ["height_above_ground", "intensity"]},
        "network": {"voxel_size": 1.0, "levels": 2, "width": 4, "kernel_size": 5}, "training": {"radius": 3.0},
    })  # fmt: skip
    columns = Columns(config.widths, dict.fromkeys(config.widths, 1.0), dict.fromkeys(config.widths, 2.0))
    net = config.net()
    model = Model(net, *net.init(3), config, columns, BlockSize(5.0, 2.0))
    rng = np.random.default_rng(0)
    points, intensity = rng.uniform((0, 0, 0), (10, 5, 1), (60, 3)) + 4e5, rng.integers(0, 5, 60)
    expected = model.predict(points, intensity=intensity)
    result = model.predict(cupy.asarray(points), intensity=cupy.asarray(intensity))
    for name in ("labels", "classes", "probabilities", "confidence"):
        of_gpu = getattr(result, name)
        assert isinstance(of_gpu, cupy.ndarray) and of_gpu.dtype == getattr(expected, name).dtype
    np.testing.assert_allclose(cupy.asnumpy(result.probabilities), expected.probabilities, atol=1e-5)
    assert result.warnings == ()
