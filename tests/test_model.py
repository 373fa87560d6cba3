"""Trained models that are called from Python: their file, the features that they take, results and warnings."""

import re
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from reference import assert_same_bits

import kpcore as kp
from kpcore import nn
from kpcore.pipeline import blocks, data, model, statistics
from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import Columns
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict

SETTINGS = {
    "data": {"train": ["a.laz"], "classes": {"low": [2, 9], "high": [6]},
             "features": ["one", "color", "height_above_ground", "intensity"]},
    "network": {"voxel_size": 1.0, "levels": 2, "width": 8, "kernel_size": 5},
    "training": {"radius": 6.0},
}  # fmt: skip


def scan(num=3000, seed=0):
    """Arguments of `predict` besides the points, which come first."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((0, 0, 0), (40, 40, 0.2), (num, 3)) + np.array([84_900.0, 447_500.0, 0])
    return points, {"colors": rng.integers(0, 256, (num, 3), np.uint8), "intensity": rng.integers(0, 200, num)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of a model with random weights and the statistics of `scan()`."""
    config = from_dict(SETTINGS)
    net, (points, fields) = config.net(), scan()
    shift, labels = points.min(axis=0), np.full(len(points), 2, np.int32)
    cloud = kp.io.Cloud((points - shift).astype(np.float32), fields["colors"], labels, shift,
                        fields={"intensity": fields["intensity"].astype(np.float32)})  # fmt: skip
    columns = Columns(config.widths, {"color": 0.0, "height_above_ground": 0.0, "intensity": 100.0},
                      {"color": 255.0, "height_above_ground": 1.0, "intensity": 50.0})  # fmt: skip
    scene = data.scene_of(config, columns, cloud)
    params, state = net.init(3)
    model = Model(net, params, state, config, columns, BlockSize(30.0, 6.0),
                  statistics.of_training(config, net, columns, [scene], 30.0))  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    nn.save(path, net, params, state, **model.about(), result={"epoch": 1, "accuracy": 0.7, "miou": 0.5})
    return path


def test_a_model_that_is_loaded(saved):
    model = kp.load_model(saved)
    assert model.classes == ("low", "high") and model.label_values.tolist() == [2, 6]
    assert model.features == ("one", "color", "height_above_ground", "intensity") and model.voxel_size == 1.0
    assert model.block_size == (30.0, 6.0, 2) and model.history == {
        "result": {"epoch": 1, "accuracy": 0.7, "miou": 0.5}
    }
    assert model.statistics.features["intensity"].counts and isinstance(model, Model)
    groups, about = nn.checkpoints.read(saved)
    for name, value, message in (
        ("blocks", {"side": -1.0, "halo": 1.0}, "blocks: expected a side, a halo"),
        ("blocks", {"side": 1.0}, "halo"),
        ("blocks", {"side": 1.0, "halo": 1.0, "lattices": 3}, "1 or 2 lattices"),
        ("statistics", {"features": 1}, "statistics: expected the distribution"),
        ("result", {"miou": 0.5}, "result: expected an epoch, an accuracy and a mean IoU"),
    ):
        bad = saved.with_name("bad.safetensors")
        nn.checkpoints.write(bad, groups, about | {name: value})
        with pytest.raises(ValueError, match=rf"bad\.safetensors: .*{message}"):
            kp.load_model(bad)


def test_a_model_that_is_kept(saved, tmp_path):
    """Its file is mapped, not read again, and predicts the same; another file in its place is loaded."""
    path, (points, fields) = tmp_path / "m.safetensors", scan()
    path.write_bytes(saved.read_bytes())
    with ThreadPoolExecutor(4) as threads:
        models = {*threads.map(model.kept, [path] * 8)}
    (kept,) = models
    assert not any(array.flags.writeable for array in kept.params.values())
    expected, got = (one.predict(points, **fields) for one in (kp.load_model(saved), kept))
    for one, other in zip(expected[:4], got[:4], strict=True):
        assert_same_bits(one, other)
    groups, about = nn.checkpoints.read(path)
    nn.checkpoints.write(path, groups, about | {"result": None})
    assert model.kept(path) is not kept and model.kept(path).history == {"result": None}
    with pytest.raises(FileNotFoundError):
        model.kept(tmp_path / "none")


def test_predictions(saved):
    model, (points, fields) = kp.load_model(saved), scan()
    done = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.predict(points, **fields, watch=done.append)
    assert result.warnings == () and done[-1] == 1 and 0 < done[0] < 1 and done == sorted(done)
    assert result.probabilities.shape == (3000, 2) and result.probabilities.dtype == np.float32
    np.testing.assert_allclose(result.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert_same_bits(result.classes, result.probabilities.argmax(axis=1))
    assert_same_bits(result.confidence, result.probabilities.max(axis=1))
    assert_same_bits(result.labels, np.array([2, 6], np.int32)[result.classes])
    assert 0 < result.classes.mean() < 1

    votes = model.predict(points, **fields, mode="potentials")
    assert (votes.classes == result.classes).mean() > 0.8
    renamed = {"rgb": fields["colors"] / 255, "Intensity": fields["intensity"].astype(float)}
    assert_same_bits(model.predict(points, **renamed).probabilities, result.probabilities)
    heights = kp.height_above_ground(points)
    passed = model.predict(points, **fields, height_above_ground=heights)
    assert (passed.classes == result.classes).mean() > 0.99
    with pytest.warns(kp.KpcoreWarning, match="100 % of height_above_ground lies beyond"):
        higher = model.predict(points, **fields, height_above_ground=heights + 3)
    assert (higher.probabilities != passed.probabilities).any()
    single = (points - points.min(axis=0)).astype(np.float32)
    assert len(model.predict(single, **fields).labels) == 3000


def test_arguments_that_do_not_fit(saved):
    model, (points, fields) = kp.load_model(saved), scan(50)
    asked = "of the model, to which are passed: points, colors, intensity"
    for changes, error, message in (
        (
            {"intensity": None},
            TypeError,
            f"intensity: expected its values, as it is one of the features {asked}; got no fields",
        ),
        ({"intensity": None, "Amplitude": np.zeros(50)}, TypeError, "intensity: expected .*; got Amplitude"),
        ({"colors": None}, TypeError, f"colors: expected those of the points, as color is one of the features {asked}"),
        ({"gps_time": np.zeros(50)}, TypeError, f"gps_time: expected only features {asked}"),
        ({"rgb": fields["colors"]}, TypeError, "colors: expected once, got rgb too"),
        ({"intensity": np.zeros(49)}, ValueError, r"intensity: expected \(50,\) numbers, got \(49,\) float64"),
        ({"intensity": np.full(50, np.nan)}, ValueError, "intensity: expected finite"),
        ({"colors": np.full((50, 3), 1.5)}, ValueError, "colors: expected floats from 0 to 1, got 1.5 to 1.5"),
        (
            {"colors": np.zeros((50, 3), np.uint16)},
            ValueError,
            r"colors: expected \(50, 3\) uint8 or floats from 0 to 1, got .* uint16: divide",
        ),
        ({"mode": "sphere"}, ValueError, "mode: expected 'blocks' or 'potentials', got 'sphere'"),
        ({"category": "chair"}, ValueError, "category: expected none for a network without parts, got chair"),
    ):
        arguments = {name: value for name, value in (fields | changes).items() if value is not None}
        with pytest.raises(error, match=message):
            model.predict(points, **arguments)
    for bad, error, message in (
        (points[:, :2], ValueError, "points: expected .* with D = 3"),
        (points.astype(int), TypeError, "points: expected float32 or float64"),
        (np.full((50, 3), np.inf), ValueError, "points: expected finite"),
        (points[:0], ValueError, "points: expected at least one, got none"),
    ):
        with pytest.raises(error, match=message):
            model.predict(bad, **fields)


def test_an_input_unlike_the_training(saved):
    model, (points, fields) = kp.load_model(saved), scan()
    raised = points + np.array([0, 0, 100.3])
    assert model.predict(raised, **fields).warnings == ()
    with pytest.warns(kp.KpcoreWarning, match="100 % of intensity lies beyond the training range"):
        result = model.predict(points, **fields | {"intensity": fields["intensity"] + 5000})
    assert len(result.warnings) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model.predict(points / 0.3048, **fields)
    assert [str(one.message) for one in caught] == [*result.warnings] and {one.category for one in caught} == {
        kp.KpcoreWarning
    }
    assert result.warnings[-1].endswith("other unit or density? Try --scale 0.3048")


def test_models_of_earlier_versions(saved, tmp_path):
    groups, about = nn.checkpoints.read(saved)
    old = {name: value for name, value in about.items() if name not in ("blocks", "statistics")}
    nn.checkpoints.write(tmp_path / "old.safetensors", groups, old)
    model, (points, fields) = kp.load_model(tmp_path / "old.safetensors"), scan(200)
    assert model.statistics is None and model.block_size == blocks.size_without_training(model.settings) == (
        48.0,
        6.0,
        2,
    )
    assert model.predict(points, **fields).warnings == ()


@pytest.mark.parametrize("kind", ["objects", "parts"])
def test_objects_and_their_parts(kind):
    from kpcore.scenes import shapes

    config = from_dict({
        "data": {"kind": kind, "train": [{"shapes": 0, "number": 1}]},
        "network": {"voxel_size": 0.1, "levels": 2, "width": 8},
    })  # fmt: skip
    net = config.net()
    model = Model(net, *net.init(0), config, Columns(config.widths, {}, {}))
    points = shapes("table", 5, 500).points.astype(np.float64) * 7 + 100
    if kind == "objects":
        result = model.predict(points)
        assert result.labels.shape == (1,) and result.probabilities.shape == (1, len(model.classes))
    else:
        result = model.predict(points, category="table")
        parts = config.data.classes["table"]
        assert result.labels.shape == (500,) and {*result.labels} <= {*parts}
        with pytest.raises(ValueError, match=r"category: expected one of .*, got None"):
            model.predict(points)


def test_a_model_needs_numpy_and_scipy_alone(saved, python):
    code = f"""
import sys
for name in ("safetensors", "torch", "tqdm", "matplotlib", "jax", "cupy", "laspy", "lazrs"):
    sys.modules[name] = None
import numpy as np, kpcore as kp
model = kp.load_model({str(saved)!r})
points = np.random.default_rng(0).uniform(0, 30, (500, 3))
result = model.predict(points, colors=np.zeros((500, 3), np.uint8), intensity=np.full(500, 100))
print(len(result.labels), model.classes)
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "500 ('low', 'high')\n"), done.stderr


def test_coordinates_that_float32_does_not_hold(saved):
    model, (points, fields) = kp.load_model(saved), scan(3000)
    single = points.astype(np.float32)  # steps of 0.03 in y, of voxels of 1
    assert model.predict(single, **fields).warnings == ()
    with pytest.warns(kp.KpcoreWarning) as caught:
        result = model.predict((points * 16).astype(np.float32), **fields)
    said = "points: float32 holds coordinates of 7.161e+06 in steps of 0.5, 50 % of a voxel: pass float64"
    assert result.warnings[0] == said == str(caught[0].message)


def segmented(saved, folder, **options):
    """(written labels, the labels before, what was reported) of a scan that has labels 6 and 7 already."""
    from kpcore.pipeline import segmentation

    points, fields = scan(600)
    before = np.where(np.arange(600) % 3 == 0, 7, 6).astype(np.int32)
    np.savez(folder / "a.npz", points=points, labels=before, **fields)
    lines = []
    result = segmentation.segment(
        kp.load_model(saved), folder / "a.npz", folder / "b.npz", report=lines.append, **options
    )
    with np.load(folder / "b.npz") as written:
        return {name: written[name] for name in written.files}, before, lines + result.labelled.notes, result


@pytest.mark.filterwarnings("ignore::kpcore.KpcoreWarning")
def test_labels_that_are_kept_and_doubtful_ones(saved, tmp_path):
    written, before, lines, result = segmented(saved, tmp_path, keep=[7], confidence=True)
    assert (written["labels"][before == 7] == 7).all() and {*written["labels"][before == 6]} <= {2, 6}
    assert (written["confidence"][before == 7] == 0).all() and (written["confidence"][before == 6] >= 50).all()
    assert result.counts.sum() == 400 and "200 points keep their label" in lines
    assert re.fullmatch(r"8 blocks of 30 with a halo of 6, up to \d+ points, which need some .* GiB", lines[0])

    written, before, *_ = segmented(saved, tmp_path, keep=[7], into="pred")
    assert_same_bits(written["labels"], before)
    assert (written["pred"][before == 7] == 7).all() and {*written["pred"][before == 6]} <= {2, 6}

    written, before, lines, result = segmented(saved, tmp_path, ignore=[7], unclassified=1.0)
    assert (written["labels"][before == 7] == 7).all() and (written["labels"][before == 6] == 0).all()
    assert result.counts.sum() == 0 and lines[-2:] == [
        "200 points are ignored and keep their label", "400 points have a smaller probability and get the label 0"
    ]  # fmt: skip


def test_points_in_another_unit_are_refused_before_hours_of_blocks(saved):
    model, (points, fields) = kp.load_model(saved), scan(3000)
    with pytest.raises(
        ValueError, match=r"points: expected some 150,000 in a block of 30, got 3,000 in 2,\d+ blocks: .*unit"
    ):
        model.predict(points * 1000, **fields)
