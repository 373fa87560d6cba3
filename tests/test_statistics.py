"""The distribution of a training's input, and what is said of an input that differs from it."""

import json
import re

import numpy as np
import pytest

import kpcore as kp
from kpcore.io import Reference
from kpcore.pipeline import data, statistics
from kpcore.pipeline.data import Columns
from kpcore.pipeline.settings import SettingsError, from_dict
from kpcore.pipeline.statistics import Observed

COLUMNS = Columns({"one": 1, "color": 3, "intensity": 1}, {"color": 0.0, "intensity": 100.0},
                  {"color": 255.0, "intensity": 50.0})  # fmt: skip


def features(intensity, seed=0):
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 256, (len(intensity), 3)) / 255
    return np.column_stack([np.ones(len(intensity)), colors, (intensity - 100) / 50]).astype(np.float32)


def of_intensity(values, training=None, **more):
    observed = Observed(COLUMNS, training)
    half = len(values) // 2
    observed.add(features(values[:half]), half)
    observed.add(features(values[half:], 1), len(values) - half)
    return observed.statistics(**{"spacing": 0.5, "unit": [None, None]} | more)


@pytest.fixture(scope="module")
def training():
    return of_intensity(np.random.default_rng(0).normal(100, 20, 20_000))


def test_quantiles_and_histogram_in_the_unit_of_files(training):
    assert [*training.features] == ["color.red", "color.green", "color.blue", "intensity"]
    feature, values = training.features["intensity"], np.random.default_rng(0).normal(100, 20, 20_000)
    for probability, value in feature.quantiles[1:-1]:
        assert abs(value - np.quantile(values, probability)) < 1.5  # bins are 1 wide
    counts = np.histogram(values, [-np.inf, *feature.edges, np.inf])[0]
    assert np.abs(np.array(feature.counts) - counts).sum() < 40 and sum(feature.counts) == 20_000
    red = dict(training.features["color.red"].quantiles)
    assert abs(red[0.5] - 127.5) < 4 and red[0.001] < 1 and red[0.999] > 254


def test_equal_values_and_none():
    constant = of_intensity(np.full(100, 7.0)).features["intensity"]
    assert sum(constant.counts) == 100 and dict(constant.quantiles)[0.5] == pytest.approx(7, abs=1e-3)
    assert statistics.differences(of_intensity(np.full(100, 7.0)), of_intensity(np.full(50, 7.0))) == []
    assert of_intensity(np.zeros(0)).points == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.random.default_rng(1).normal(103, 22, 9000), None),
        (
            np.random.default_rng(1).normal(5000, 400, 9000),
            r"100 % of intensity lies beyond the training range, 37.8\d* to",
        ),
        (
            np.r_[np.full(8900, 100.0), np.full(1100, 1e6)],
            r"11 % of intensity lies beyond the training range, 37.8\d* to 159.7",
        ),
        (np.random.default_rng(1).normal(128, 5, 9000), r"intensity has a median of 128 where training had 99.89"),
    ],
)
def test_values_unlike_those_of_the_training(training, values, message):
    observed = of_intensity(values, training)
    messages = statistics.differences(training, observed)
    few = statistics.differences(training, of_intensity(values[:99], training, unit=[1.0, None]))
    assert few == []
    assert [bool(re.match(message, one)) for one in messages] == [True] if message else messages == []


def net_and_scene(scale, num=6000):
    config = from_dict({
        "data": {"train": ["a.laz"], "classes": {"low": [2], "high": [6]}, "features": ["one"]},
        "network": {"voxel_size": 1.0, "levels": 2, "width": 8}, "training": {"radius": 6.0},
    })  # fmt: skip
    points = np.random.default_rng(0).uniform((0, 0, 0), (50, 50, 1), (num, 3)) * scale
    cloud = kp.io.Cloud(points.astype(np.float32), None, np.full(num, 2, np.int32), np.zeros(3))
    columns = Columns(config.widths, {}, {})
    return config, columns, config.net(), data.scene_of(config, columns, cloud)


def test_another_unit_or_density():
    config, columns, net, scene = net_and_scene(1.0)
    training = statistics.of_training(config, net, columns, [scene], 20.0)
    assert training.class_shares == {"low": 1.0, "high": 0.0} and training.points == 6000
    assert training.points_per_voxel == 6000 / len(scene.points) and 0.2 < training.spacing < 0.5
    middle = scene.points[(np.abs(scene.points[:, :2] - np.median(scene.points[:, :2], axis=0)) <= 10).all(axis=1)]
    counts = [level.neighbors.counts.mean() for level in net.pyramid(middle, subsampled=True)]
    np.testing.assert_allclose(training.neighbors, counts, rtol=0.02)  # the block is around a point near the median

    def messages(scale, num=6000, unit=(None, None)):
        other = net_and_scene(scale, num)[3]
        observed = Observed(columns, training)
        observed.add_scenes(net, [other], 20.0)
        spacing = statistics.spacing_of(other.full)
        return statistics.differences(training, observed.statistics(spacing, list(unit)))

    assert messages(1.0) == messages(1.2) == []
    (feet,) = messages(1 / 0.3048)
    assert re.search(r"1 points? per voxel where training had 2", feet) or "apart where training had" in feet
    assert feet.endswith("other unit or density? Try --scale 0.3048")
    (millimetres,) = messages(1000.0)
    assert millimetres.endswith("Try --scale 0.001")
    (dense,) = messages(1.0, 60_000)
    assert "points per voxel where training had" in dense and "--scale" not in dense


def test_units_that_files_state():
    feet, metres = 1200 / 3937, 1.0

    def cloud(*units):
        return kp.io.Cloud(
            np.zeros((1, 3), np.float32), None, None, np.zeros(3), reference=Reference("", "projected", *units, "")
        )

    assert statistics.unit_of([cloud(feet, None), cloud(feet, metres)]) == [feet, None]
    assert statistics.unit_of([kp.io.Cloud(np.zeros((1, 3), np.float32), None, None, np.zeros(3))]) == [None, None]
    in_feet = "x and y are in units of 0.3048006 m where training had 1 m"
    for training, observed, message in (
        ([metres, metres], [metres, None], None),
        ([None, None], [feet, feet], None),
        ([metres, metres], [feet, feet], f"{in_feet} and z are .*: use --scale 0.3048006"),
        ([metres, metres], [feet, metres], f"{in_feet}: use --scale 0.3048006,1"),
        ([feet, None], [metres, None], "x and y .*: use --scale 3.280833"),
    ):
        messages = statistics._units_that_differ(training, observed)
        assert len(messages) == (message is not None)
        assert message is None or re.fullmatch(message, messages[0])


def test_statistics_in_json(training):
    described = json.loads(json.dumps(training.asdict()))
    assert statistics.from_dict(described, COLUMNS) == training
    for change in (
        {"features": {}}, {"spacing": "1"}, {"spacing": float("nan")}, {"more": 1}, {"neighbors": None}, {"unit": 3},
        {"features": described["features"] | {"intensity": {"quantiles": [], "edges": [1.0], "counts": [1]}}},
    ):  # fmt: skip
        with pytest.raises(SettingsError, match="statistics: expected the distribution of a training"):
            statistics.from_dict(described | change, COLUMNS)
