"""Training on labelled scenes: batches, runs that go on, votes, labels in files, the commands."""

import dataclasses
import gzip
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from reference import assert_same_bits
from training_runs import assert_same_checkpoints, check_resumed

import kpcore as kp
from kpcore import cli, scenes
from kpcore.nn import checkpoints
from kpcore.pipeline import batches, data, labelling, segmentation, settings, training, voting
from kpcore.pipeline.settings import SettingsError, from_dict

pytest.importorskip("safetensors")

CLASSES = {"flat": [0, 1], "upright": [2, 3, 4, 5], "thing": [*range(6, 14)]}  # 14, clutter, is ignored


def settings_dict(**more):
    """Settings of seconds, as TOML has them; `more` by section."""
    sections = {
        "data": {
            "train": [{"indoor": 0, "points": 12_000}],
            "test": [{"indoor": 1, "points": 6_000}],
            "classes": CLASSES,
            "features": ["one", "color", "height"],
        },
        "network": {"voxel_size": 0.2, "levels": 2, "width": 8, "kernel_size": 5, "momentum": 0.2},
        "training": {
            "radius": 1.5, "batch_points": 1500, "batch_clouds": 3, "epochs": 2, "steps": 6, "validate": 1, "lr": 0.05,
            "momentum": 0.9,
        },
    }  # fmt: skip
    for name, values in more.items():
        sections[name] = sections[name] | values
    return sections


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, Training) of a run."""
    folder = tmp_path_factory.mktemp("run")
    run = training.Training(from_dict(settings_dict()), folder, folder)
    run.run()
    return folder, run


# ---- scenes


def test_scenes_are_subsampled_with_features_and_labels():
    config = from_dict(settings_dict())
    (scene,), columns = data.load(config, config.data.train, ".")
    cloud = scenes.indoor(12_000, 0)
    own = kp.grid_subsample(cloud.points, 0.2)
    assert_same_bits(scene.points, own.points)
    number = np.array([0, 0, 1, 1, 1, 1, *[2] * 8, data.IGNORED])[cloud.labels]
    assert_same_bits(scene.full_labels, number)
    for voxel in range(0, len(scene.points), 50):
        inside = number[own.inverse == voxel]
        counts = np.bincount(inside[inside >= 0], minlength=3)
        assert scene.labels[voxel] == (counts.argmax() if counts.any() else data.IGNORED)
    assert (scene.columns[:, 0] == 1).all()
    colors = kp.grid_subsample(cloud.points, 0.2, features=cloud.colors.astype(np.float32) / 255).features
    np.testing.assert_allclose(scene.columns[:, 1:4], colors, atol=1e-6)
    low, middle, high = np.quantile(cloud.points[:, 2].astype(np.float64), (0.05, 0.5, 0.95))
    heights = kp.grid_subsample(cloud.points, 0.2, features=cloud.points[:, 2:]).features
    np.testing.assert_allclose(scene.columns[:, 4:], (heights - middle) / ((high - low) / 2), atol=1e-5)
    assert columns.widths == {"one": 1, "color": 3, "height": 1}


@pytest.mark.filterwarnings("ignore:.*at the position of an earlier point")
def test_scenes_are_subsampled_as_the_network_says(tmp_path):
    # A lattice, with points on the faces of voxels.
    points = (0.3 + np.random.default_rng(0).integers(0, 24, (3000, 3)) * 0.1).astype(np.float32)
    np.savez(tmp_path / "a.npz", points=points, labels=(np.arange(3000) % 6 + 1).astype(np.int32))
    part = {"train": [{"file": "a.npz"}], "test": [], "features": ["one"]}
    for origin, network in ((0, {}), (0, {"origin": 0}), ("published", {"origin": "published"})):
        config = from_dict(settings_dict(data=part, network=network))
        assert config.net().origin == origin
        loaded, columns = data.load(config, config.data.train, tmp_path)
        assert_same_bits(loaded[0].points, kp.grid_subsample(loaded[0].full, 0.2, origin=origin).points)
        other = kp.grid_subsample(loaded[0].full, 0.2, origin=0 if origin else "published").points
        assert not np.array_equal(loaded[0].points, other)
        spheres = [batches.Sphere(0, np.zeros(3, np.float32), np.arange(len(loaded[0].points)))]
        levels = batches.make_batch(config.net(), loaded, columns, spheres).pyramid
        assert_same_bits(levels[1].points, kp.grid_subsample(levels[0].points, 0.4, origin=origin).points)
    with pytest.raises(SettingsError, match=r"\[network\] origin: expected 0 or 'published', got 1"):
        from_dict(settings_dict(network={"origin": 1}))


def test_a_part_of_a_file_is_cut_in_its_own_coordinates(tmp_path):
    rng = np.random.default_rng(0)
    points = rng.random((4000, 3)) * 100 + [85_000, 447_000, 10]
    labels, intensity = rng.integers(1, 3, 4000), rng.random(4000) * 1000
    np.savez(tmp_path / "scan.npz", points=points, labels=labels, intensity=intensity)
    half = {"train": [{"file": "scan.npz", "max": [85_040.0]}], "test": [{"file": "scan.npz", "min": [85_040.0]}],
            "classes": {"a": [1], "b": [2]}, "features": ["intensity", "height"]}  # fmt: skip
    config = from_dict(settings_dict(data=half))
    (west,), columns = data.load(config, config.data.train, tmp_path)
    (east,), same = data.load(config, config.data.test, tmp_path, columns)
    assert same is columns
    is_west = points[:, 0] < 85_040
    assert (len(west.full), len(east.full)) == (is_west.sum(), (~is_west).sum())
    assert_same_bits(west.full_labels, labels[is_west] - 1)
    middle = np.quantile(intensity[is_west].astype(np.float32).astype(np.float64), 0.5)
    np.testing.assert_allclose(columns.center["intensity"], middle)
    low, middle, high = np.quantile(
        points[is_west, 2], (0.05, 0.5, 0.95)
    )  # of the file, not of what is left after a shift
    np.testing.assert_allclose(
        [columns.center["height"], columns.scale["height"]], [middle, (high - low) / 2], rtol=1e-5
    )
    nothing = {"train": [{"file": "scan.npz", "max": [1.0]}]}
    with pytest.raises(SettingsError, match="expected points between the corners, got none"):
        data.load(config, from_dict(settings_dict(data=half | nothing)).data.train, tmp_path)
    with pytest.raises(scenes.ReadError, match="has no field echo"):
        wrong = from_dict(settings_dict(data=half | {"features": ["echo"]}))
        data.load(wrong, wrong.data.train, tmp_path)
    with pytest.raises(scenes.ReadError, match="has no colours, but color is one of the features"):
        wrong = from_dict(settings_dict(data=half | {"features": ["color"]}))
        data.load(wrong, wrong.data.train, tmp_path)
    with pytest.raises(
        SettingsError, match=r"\[data\] scan\.npz: expected points with labels of the classes, got none"
    ):
        wrong = from_dict(settings_dict(data=half | {"classes": {"a": [7], "b": [8]}}))
        data.load(wrong, wrong.data.train, tmp_path)
    np.savez(tmp_path / "nan.npz", points=points, labels=labels, intensity=np.where(intensity < 3, np.nan, intensity))
    with pytest.raises(
        scenes.ReadError, match=rf"field intensity, a feature, is NaN or infinite for {(intensity < 3).sum()}"
    ):
        data.load(config, from_dict(settings_dict(data=half | {"train": ["nan.npz"]})).data.train, tmp_path)
    zero = half | {"train": ["zero.npz"], "classes": {"a": [0], "b": [1]}}
    np.savez(tmp_path / "zero.npz", points=points, labels=np.zeros(4000, int), intensity=intensity)
    with pytest.raises(
        scenes.ReadError, match=r"zero.npz: has no labels: field labels is 0 throughout; name their field as label"
    ):
        data.load(from_dict(settings_dict(data=zero)), from_dict(settings_dict(data=zero)).data.train, tmp_path)
    named = from_dict(settings_dict(data=zero | {"label": "labels"}))
    assert (data.load(named, named.data.train, tmp_path)[0][0].full_labels == 0).all()
    with pytest.raises(SettingsError, match=r"\[data\] features: the embedded scenes have no intensity"):
        wrong = from_dict(settings_dict(data={"features": ["intensity"]}))
        data.load(wrong, wrong.data.train, tmp_path)


def test_tables_without_names_are_given_some(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.random((500, 3)), rng.integers(0, 60_000, 500), rng.integers(1, 3, 500)])
    np.savetxt(tmp_path / "a.txt", table)
    part = {"train": ["~/a.txt"], "test": [], "features": ["intensity"], "classes": {"a": [1], "b": [2]}}
    monkeypatch.setenv("HOME", str(tmp_path))
    config = from_dict(settings_dict(data=part | {"columns": ["x", "y", "z", "intensity", "label"]}))
    (scene,), _ = data.load(config, config.data.train, tmp_path / "elsewhere")
    assert_same_bits(scene.full_labels, table[:, 4].astype(np.int64) - 1)
    assert_same_bits(scene.cloud.fields["intensity"], table[:, 3].astype(np.float64))
    config = from_dict(settings_dict(data=part | {"features": ["one"]}))
    with pytest.raises(scenes.ReadError, match=r"has no labels: its columns have no names: .* columns of \[data\]"):
        data.load(config, config.data.train, ".")


def test_features_are_limited(tmp_path):
    points = np.random.default_rng(0).random((1000, 3))
    echo = points[:, 0].copy()
    echo[3], echo[5] = 1e6, -1e6
    np.savez(tmp_path / "scan.npz", points=points, labels=np.ones(1000, int), echo=echo)
    config = from_dict(settings_dict(
        data={"train": ["scan.npz"], "test": [], "features": ["echo"], "classes": {"a": [1], "b": [2]}},
        network={"voxel_size": 1e-3},
    ))  # fmt: skip
    (scene,), _ = data.load(config, config.data.train, tmp_path)
    assert scene.columns.max() == 10 and scene.columns.min() == -10 and np.median(np.abs(scene.columns)) < 1


def idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


def digits(folder, number=60, seed=0, features=("one", "value")):
    """Images of two kinds, a bar lying and a bar standing, as idx files; settings for them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, number).astype(np.uint8)
    images = np.zeros((number, 12, 12), np.uint8)
    for image, label in zip(images, labels, strict=True):
        at = rng.integers(3, 8)
        bar = image[at : at + 2, 1:11] if label else image[1:11, at : at + 2]
        bar[...] = rng.integers(100, 256, bar.shape)
    idx(folder / "images.gz", images)
    idx(folder / "labels", labels)
    files = {"images": "images.gz", "labels": "labels"}
    sections = settings_dict(
        training={"rotate": 10, "epochs": 3, "steps": 10, "batch_clouds": 8, "noise": 0.05, "validate": 3}
    )
    sections["data"] = {"train": [files | {"last": 40}], "test": [files | {"first": 40}], "features": [*features]}
    sections["network"] |= {"voxel_size": 1.0, "head_width": 16, "width": 16}
    return images, labels, from_dict(sections)


def test_digits_are_points_in_two_dimensions(tmp_path):
    images, labels, config = digits(tmp_path)
    made = data.load(config, config.data.train, tmp_path)[0]
    assert len(made) == 40 and config.digits and config.net().dimension == 2
    for scene, image, label in zip(made, images, labels, strict=False):
        drawn = np.zeros((12, 12))
        at = (scene.points + 5.5).astype(int)
        drawn[11 - at[:, 1], at[:, 0]] = np.round(255 * scene.columns[:, 1])
        assert (drawn == image).all() and scene.labels.tolist() == [label]
    idx(tmp_path / "labels", np.full(len(labels), 10, np.uint8))
    with pytest.raises(SettingsError, match="labels: expected labels from 0 to 9, got 10"):
        data.load(config, config.data.train, tmp_path)
    (tmp_path / "labels").write_bytes(b"no")
    with pytest.raises(scenes.ReadError, match="is not an idx file of bytes"):
        data.load(config, config.data.train, tmp_path)
    idx(tmp_path / "labels", labels[:0])
    idx(tmp_path / "images.gz", images[:0])
    with pytest.raises(
        SettingsError, match=r"\[data\] images\.gz: expected points with labels of the classes, got none"
    ):
        data.load(config, config.data.train, tmp_path)


@pytest.mark.parametrize("bright", [0, 1])
def test_digits_without_ink_are_classified_too(tmp_path, bright):
    images, labels, config = digits(tmp_path)
    images[40:] = 0
    images[40:, 5, 5] = bright
    idx(tmp_path / "images.gz", images)
    run = training.Training(config, tmp_path / "run", tmp_path)
    confusion = labelling.evaluate(run.model, run.test_scenes)
    assert_same_bits(confusion.sum(axis=1), np.bincount(labels[40:], minlength=10))


def test_idx_files_that_are_cut(tmp_path):
    config = digits(tmp_path)[2]
    whole = gzip.decompress((tmp_path / "images.gz").read_bytes())
    with gzip.open(tmp_path / "images.gz", "wb") as file:
        file.write(whole[:-1])
    with pytest.raises(scenes.ReadError, match="truncated: expected an array of shape"):
        data.load(config, config.data.train, tmp_path)
    (tmp_path / "images.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(scenes.ReadError, match=r"images\.gz"):
        data.load(config, config.data.train, tmp_path)


# ---- batches


def test_potentials_go_where_the_fewest_have_been():
    config = from_dict(settings_dict())
    (scene,), _ = data.load(config, config.data.train, ".")
    sampler = batches.Potentials([scene], 1.5, np.random.default_rng(0))
    visited = np.zeros(len(scene.points), int)
    for number in range(1, 400):
        sphere = sampler.next()
        distance = np.linalg.norm(scene.points - sphere.center, axis=1)
        assert {*np.flatnonzero(distance < 1.5 - 1e-5)} <= {*sphere.rows} <= {*np.flatnonzero(distance < 1.5 + 1e-5)}
        visited[sphere.rows] += 1
        if visited.min() > 0 and number < 150:
            break
    assert visited.min() > 0 and visited.max() < 40 * max(1, np.median(visited))


def test_balanced_spheres_are_about_all_classes():
    config = from_dict(settings_dict())
    (scene,), _ = data.load(config, config.data.train, ".")
    sampler = batches.Balanced([scene, scene], 1.5, np.random.default_rng(0))
    counts, whose = np.zeros(3), set()
    for _ in range(300):
        sphere = sampler.next()
        at = np.flatnonzero((scene.points == sphere.center).all(axis=1))
        counts[scene.labels[at[0]]] += 1
        whose.add(sphere.scene)
    assert counts.min() > 70 and whose == {0, 1}


def batches_of(config, workers, seed=0):
    loaded, columns = data.load(config, config.data.train, ".")
    rng = np.random.default_rng([seed, 0])
    jobs = enumerate(batches.training_jobs(loaded, config.training, False, rng, 5))

    def make(job):
        time.sleep(0.01 * (job[0] % 2))  # so that threads end in another order than they begin
        return batches.make_batch(
            config.net(), loaded, columns, job[1], config.training, np.random.default_rng([seed, job[0]])
        )

    return [*batches.Prefetched(jobs, make, workers)], loaded


def test_batches_are_the_same_with_any_number_of_workers():
    config = from_dict(settings_dict(data={"features": ["local", "color", "one"]}))
    first, loaded = batches_of(config, 0)
    for workers in (1, 3):
        for one, other in zip(first, batches_of(config, workers)[0], strict=True):
            assert_same_bits(one.features, other.features)
            assert_same_bits(one.labels, other.labels)
            for level, same in zip(one.pyramid, other.pyramid, strict=True):
                assert_same_bits(level.points, same.points)
                assert_same_bits(level.neighbors.index, same.neighbors.index)
    assert (first[0].features != batches_of(config, 0, seed=1)[0][0].features[: len(first[0].features)]).any()
    for batch in first:
        sizes = [len(sphere.rows) for sphere in batch.spheres]
        assert len(sizes) <= 3 and (sum(sizes) <= 1500 or len(sizes) == 1)
        assert batch.pyramid[0].row_splits.tolist() == [0, *np.cumsum(sizes)]
        rows = np.concatenate([sphere.rows for sphere in batch.spheres])
        assert_same_bits(batch.labels, loaded[0].labels[rows])
        assert_same_bits(batch.features[:, :3], batch.pyramid[0].points)  # "local": what the network sees
        assert batch.features.shape[1] == config.net().num_features == 7
        assert (batch.features[:, 6] == 1).all()


def test_spheres_that_are_too_small(tmp_path):
    config = from_dict(settings_dict(training={"radius": 0.01}))
    with pytest.raises(
        SettingsError, match=r"\[training\] radius: expected several points in a sphere, .* radius 0\.01"
    ):
        training.Training(config, tmp_path, ".").run()
    tiny = from_dict(settings_dict(training={"radius": 1e-5}))
    with pytest.raises(
        SettingsError, match=r"\[training\] radius: expected a larger one, got 1e-05; for voxels of a tenth"
    ):
        training.Training(tiny, tmp_path, ".").run()
    loaded, columns = data.load(config, config.data.train, ".")
    alone = batches.Sphere(0, loaded[0].points[5], np.array([5]))
    with pytest.raises(
        SettingsError, match=r"\[network\] levels: batch normalisation needs at least 2 points .* got 1 on level 0"
    ):
        batches.make_batch(config.net(), loaded, columns, [alone], config.training, np.random.default_rng(0))


def test_a_batch_ends_before_it_has_too_many_points():
    config = from_dict(settings_dict(training={"batch_points": 500, "batch_clouds": 8}))
    ended = 0
    for batch in batches_of(config, 0)[0]:
        sizes = [len(sphere.rows) for sphere in batch.spheres]
        assert len(sizes) < 8 and (sum(sizes) <= 500 or len(sizes) == 1)
        ended += len(sizes) > 1
    assert ended


def test_an_error_in_a_worker_comes_out():
    def fail(job):
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        [*batches.Prefetched(range(10), fail, 2)]


@pytest.mark.parametrize("rotate", ["vertical", "all", "none", 20])
def test_augmentation_keeps_the_shape(rotate):
    config = from_dict(settings_dict(training={"rotate": rotate, "noise": 0.0, "scale": [1.0, 1.0]}))
    made, loaded = batches_of(config, 0)
    for batch in made:
        for i, sphere in enumerate(batch.spheres):
            begin, end = batch.pyramid[0].row_splits[i : i + 2]
            own = batch.pyramid[0].points[begin:end]
            was = loaded[0].points[sphere.rows] - sphere.center
            np.testing.assert_allclose(np.linalg.norm(own, axis=1), np.linalg.norm(was, axis=1), atol=1e-5)
            if rotate != "all":
                np.testing.assert_allclose(own[:, 2], was[:, 2], atol=1e-6)
            if rotate == "none":
                np.testing.assert_allclose(own, was, atol=1e-6)
            if rotate == 20:
                level = np.linalg.norm(was[:, :2], axis=1) > 0.1
                turn = np.einsum("nd,nd->n", own[level, :2], was[level, :2]) / (was[level, :2] ** 2).sum(axis=1)
                assert np.cos(np.deg2rad(20)) - 1e-4 < turn.min()


def test_scale_noise_flips_and_lost_colors():
    config = from_dict(settings_dict(training={
        "rotate": "none", "noise": 0.01, "scale": [0.5, 2.0], "flip": [False, True, False], "keep_color": 0.5
    }))  # fmt: skip
    made, loaded = batches_of(config, 0)
    signs, blank = set(), set()
    for batch in made:
        for i, sphere in enumerate(batch.spheres):
            begin, end = batch.pyramid[0].row_splits[i : i + 2]
            was = loaded[0].points[sphere.rows] - sphere.center
            own = batch.pyramid[0].points[begin:end]
            factor = (own * was).sum(axis=0) / (was * was).sum(axis=0)
            assert (np.abs(factor) > 0.49).all() and (np.abs(factor) < 2.01).all() and (factor[::2] > 0).all()
            assert 0.005 < (own - factor * was).std() < 0.02
            signs.add(np.sign(factor[1]))
            blank.add(not batch.features[begin:end, 1:4].any())
    assert signs == {-1, 1} and blank == {True, False}


SURFACE = ["normals", "linearity", "planarity", "scattering", "verticality", "curvature"]


@pytest.mark.parametrize("surface", [{}, {"neighbors": 9}, {"radius": 0.3}])
def test_features_of_the_local_surface(surface):
    """They are computed from all points of the cloud, before those of the part are chosen, and are not scaled."""
    part = {"indoor": 0, "points": 4_000, "min": [1.0, -99.0, -99.0]}
    config = from_dict(settings_dict(data={"train": [part], "features": ["one", *SURFACE], "surface": surface}))
    loaded, columns = data.load(config, config.data.train, ".")
    cloud = kp.scenes.indoor(4_000, 0)
    points, options = cloud.points + cloud.shift, {"radius": 0.3} if "radius" in surface else {}
    expected = kp.covariance_features(points, k=None if options else surface.get("neighbors", 20), **options)
    rows = points[:, 0] >= 1
    sub = kp.grid_subsample(cloud.points[rows], 0.2, features=np.column_stack(
        [np.ones(len(points)), *(getattr(expected, name) for name in SURFACE)]
    )[rows].astype(np.float32))  # fmt: skip
    assert_same_bits(loaded[0].columns, sub.features)
    assert 0 < rows.sum() < len(rows)
    assert columns.center == {"color": 0.0} | dict.fromkeys(SURFACE, 0.0)
    assert columns.scale == {"color": 255.0} | dict.fromkeys(SURFACE, 1.0)
    assert data.columns_of(config, dataclasses.asdict(columns)) == columns
    assert max(data.reach_of(config)) == pytest.approx(0.3 if options else 0.2 * surface.get("neighbors", 20) ** 0.5)


@pytest.mark.parametrize("rotate", ["vertical", "all", "none", 20])
def test_normals_are_turned_scaled_and_mirrored_with_the_points(rotate):
    config = from_dict(settings_dict(
        data={"features": ["linearity", "normals", "one"]},
        training={"rotate": rotate, "noise": 0.0, "scale": [0.5, 2.0], "flip": [True, True, True]},
    ))  # fmt: skip
    made, loaded = batches_of(config, 0)
    mirrored = set()
    for batch in made:
        for i, sphere in enumerate(batch.spheres):
            begin, end = batch.pyramid[0].row_splits[i : i + 2]
            was, now = loaded[0].points[sphere.rows] - sphere.center, batch.pyramid[0].points[begin:end]
            matrix, *_ = np.linalg.lstsq(was.astype(np.float64), now.astype(np.float64), rcond=None)
            before, after = loaded[0].columns[sphere.rows, 1:4], batch.features[begin:end, 1:4]
            expected = before @ np.linalg.inv(matrix).T  # which a plane through the points has
            length = np.linalg.norm(before, axis=1, keepdims=True)
            expected *= length / np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(after, expected, atol=1e-4)
            assert_same_bits(batch.features[begin:end, [0, 4]], loaded[0].columns[sphere.rows][:, [0, 4]])
            mirrored.add(np.linalg.det(matrix) < 0)
    assert mirrored == {True, False}


def test_a_run_with_features_of_the_local_surface(tmp_path):
    sections = settings_dict(data={"features": ["one", *SURFACE]}, training={"epochs": 1, "steps": 2})
    run = training.Training(from_dict(sections), tmp_path, ".")
    run.run()
    model = training.Model.load(tmp_path / "best.safetensors")
    assert model.columns == run.model.columns and model.settings.widths == {"one": 1} | dict.fromkeys(SURFACE, 1) | {
        "normals": 3
    }


def test_turned_grids_are_turned_back():
    """Neighbours are within their radius in the coordinates that the network gets, whatever the voxels' axes."""
    made, _ = batches_of(from_dict(settings_dict()), 0)
    plain, _ = batches_of(from_dict(settings_dict(training={"turn_grid": False})), 0)
    differ = False
    for batch, other in zip(made, plain, strict=True):
        assert_same_bits(batch.pyramid[0].points, other.pyramid[0].points)
        differ |= len(batch.pyramid[1].points) != len(other.pyramid[1].points)
        fine, coarse = batch.pyramid
        pools, queries = fine.pools, np.repeat(np.arange(len(coarse.points)), fine.pools.counts)
        distance = np.linalg.norm(fine.points[pools.index] - coarse.points[queries], axis=1)
        assert distance.max() <= 2.5 * 0.2 * (1 + 1e-5)
    assert differ


# ---- runs


def test_a_run_learns_and_leaves_what_it_should(trained):
    folder, run = trained
    assert sorted(os.listdir(folder)) == ["best.safetensors", "curves.png", "last.safetensors", "log.jsonl"]
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps, tests = [e for e in entries if "loss" in e], [e for e in entries if "test" in e]
    assert [(e["epoch"], e["step"]) for e in steps] == [(epoch, step) for epoch in range(2) for step in range(6)]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert [e["epoch"] for e in tests] == [1, 2]
    assert tests[-1]["test"]["points"] > 5000 and {*tests[-1]["test"]["iou"]} == {*CLASSES}
    best = max(tests, key=lambda e: e["test"]["miou"])
    model = training.Model.load(folder / "best.safetensors")
    assert model.settings == run.settings and model.columns == run.model.columns and model.net == run.model.net
    config = voting.scores(labelling.evaluate(model, run.test_scenes), model.settings.names)
    assert config == best["test"]
    from matplotlib.image import imread

    assert imread(folder / "curves.png")[..., :3].std() > 0.05


def test_learned_kernel_points_have_a_learning_rate(tmp_path):
    after = {}
    for rate in (0, 0.1):
        sections = settings_dict(training={"kernel_points_lr": rate}, network={"learn_kernel_points": True})
        run = training.Training(from_dict(sections), tmp_path / str(rate), ".", seed=5)
        before = {name: value.copy() for name, value in run.model.params.items() if "kernel_points" in name}
        run.run()
        after[rate] = [(run.model.params[name] != value).any() for name, value in before.items()]
    assert before and not any(after[0]) and all(after[0.1])


ADAMW = {"optimizer": "adamw", "schedule": "one_cycle", "lr": 0.01, "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("network", "how"),
    [
        ({"deformable": 1, "dropout": 0.2}, ADAMW),
        ({"upsample": "kpconv", "learn_kernel_points": True}, {}),
        ({"kind": "kpnext", "depths": [1, 1], "width": 16, "num_neighbors": [8, 8]}, ADAMW),
    ],
)
def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path, how, network, monkeypatch):
    sections = settings_dict(training=how, network=network)
    if "kind" in network:
        sections["network"] = {"voxel_size": 0.2, "momentum": 0.2} | network
    config = from_dict(sections)
    check_resumed(config, tmp_path, [(0, 3), (1, 0), (1, 4)], monkeypatch)

    def log(run):
        entries = map(json.loads, (tmp_path / run / "log.jsonl").read_text().splitlines())
        return [{k: v for k, v in e.items() if k not in ("seconds", "waited")} for e in entries]

    assert log("whole") == log("part")
    with pytest.raises(ValueError, match=r"resume: .*last\.safetensors: seed: expected 5"):
        training.Training(config, tmp_path / "part", ".", seed=6, resume=True)
    more = from_dict(sections | {"training": sections["training"] | {"workers": 5}})
    assert training.Training(more, tmp_path / "part", ".", seed=5, resume=True).epoch == 2
    with pytest.raises(ValueError, match=r"resume: .*last\.safetensors: expected the settings"):
        training.Training(from_dict(settings_dict(training={"lr": 0.3})), tmp_path / "part", ".", seed=5, resume=True)
    groups, about = checkpoints.read(tmp_path / "part" / "last.safetensors")
    name, _ = groups["params"].popitem()
    checkpoints.write(tmp_path / "part" / "last.safetensors", groups, about)
    with pytest.raises(ValueError, match=rf"resume: .*: params: expected {re.escape(name)} .* got none"):
        training.Training(config, tmp_path / "part", ".", seed=5, resume=True)


SHAPES = {"train": [{"shapes": 0, "number": 5, "points": 300}], "test": [{"shapes": 9, "number": 2, "points": 300}]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scenes", "objects", "parts"])
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(tmp_path, kind):
    parts = settings_dict(training={"epochs": 3})
    if kind != "scenes":
        parts["data"] = SHAPES | {"kind": kind}
    sections = json.dumps(parts)
    code = f"""
import json, sys
from kpcore.pipeline import training
from kpcore.pipeline.settings import from_dict
training._BETWEEN_CHECKPOINTS = 0
out, resume = sys.argv[1], sys.argv[2] == "resume"
training.Training(from_dict(json.loads({sections!r})), out, ".", resume=resume).run(lambda e: print("step", flush=True))
"""

    def start(out, how):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(out), how], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole", "new")
    assert len(whole.communicate()[0].splitlines()) == 3 * 7
    rng, how = np.random.default_rng(0), "new"
    for steps in (2, 3, 4, 5):
        process = start(tmp_path / "part", how)
        for _ in range(steps):
            assert process.stdout.readline() == "step\n"
        time.sleep(float(rng.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        how = "resume" if (tmp_path / "part" / "last.safetensors").exists() else "new"
    process = start(tmp_path / "part", how)
    assert process.communicate()[0].count("step") < 21
    assert process.returncode == 0
    one, other = (checkpoints.read(tmp_path / run / "last.safetensors") for run in ("whole", "part"))
    assert_same_checkpoints(one, other)


def test_a_run_goes_on_from_its_first_moment(command, tmp_path):
    """Nothing that ends a run makes its folder useless."""
    out = tmp_path / "run"
    (tmp_path / "a.toml").write_text(TOML.replace("radius = 1.5", "radius = 0.0001"))
    code, _, err = command("train", tmp_path / "a.toml", "--out", out)
    assert code == 2 and "[training] radius" in err
    (tmp_path / "a.toml").write_text(TOML)

    def stop(entry):
        raise KeyboardInterrupt

    config = settings.read_settings(tmp_path / "a.toml")
    with pytest.raises(KeyboardInterrupt):
        training.Training(config, out, ".").run(stop)  # after the first step, and before a checkpoint
    code, _, err = command("train", tmp_path / "a.toml", "--out", out)
    assert code == 2 and "resume it with --resume" in err
    assert command("train", tmp_path / "a.toml", "--out", out, "--resume")[0] == 0
    assert command("train", tmp_path / "a.toml", "--out", tmp_path / "whole")[0] == 0
    assert_same_checkpoints(*(checkpoints.read(folder / "last.safetensors") for folder in (out, tmp_path / "whole")))
    last = out / "last.safetensors"
    best = (out / "best.safetensors").read_bytes()
    for spoiled, message in (
        (last.read_bytes()[:1000], "is damaged, or no safetensors file"),
        (best, "expected the last.safetensors of a training"),
    ):
        last.write_bytes(spoiled)
        code, _, err = command("train", tmp_path / "a.toml", "--out", out, "--resume")
        assert code == 2 and f"{last}: {message}" in err and err.count("\n") == 1


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path):
    run = training.Training(from_dict(settings_dict()), tmp_path, ".")
    run.model.params["encoder.2.unary1.weights"][0, 0] = np.nan
    with pytest.raises(training.NotFinite, match=r"step 0: the loss is nan; encoder\.2\.unary1\.weights is not"):
        run.run()
    run = training.Training(
        from_dict(settings_dict(training={"lr": 1e6, "weight_decay": 1e3, "clip_value": 0})), tmp_path, "."
    )
    with pytest.raises(training.NotFinite, match=r"epoch 0, step [1-5]: the (loss|gradient) .*(in layer|not finite)"):
        run.run()
    run = training.Training(from_dict(settings_dict()), tmp_path, ".")
    run.model.params["encoder.1.unary1.weights"][...] = 1e30
    run.model.params["encoder.1.conv.weights"][...] = 1e30
    with pytest.raises(training.NotFinite, match=r"comes from kpconv in layer encoder\.1\.conv"):
        run.model.net = _without_norm(run)
        run.run()


def test_gradients_have_to_be_finite_and_are_clipped(tmp_path):
    def spoiled(value):
        run = training.Training(from_dict(settings_dict(training={"clip_value": 0.5})), tmp_path, ".")
        made = run._gradients

        def gradients(batch, seed):
            entry, grads = made(batch, seed)
            grads["encoder.1.conv.weights"].reshape(-1)[3] = value
            return entry, grads

        def step(grads, lr):
            run.clipped = {name: (grad.min(), grad.max()) for name, grad in grads.items()}

        run._gradients, run.optimizer.step = gradients, step
        return run

    for value in (np.nan, np.inf, -np.inf):
        message = r"step 0: the gradient of encoder\.1\.conv\.weights is not finite; all layers' outputs are finite"
        with pytest.raises(training.NotFinite, match=message):
            spoiled(value).run()
    for value in (-7, 7):
        run = spoiled(value)
        run.run()
        assert {*map(abs, run.clipped["encoder.1.conv.weights"])} >= {0.5}
        assert max(max(-low, high) for low, high in run.clipped.values()) <= 0.5


def _without_norm(run):
    """The same network without what would tame its numbers."""
    from dataclasses import replace

    net = replace(run.settings.net(), norm=None)
    params, state = net.init()
    params["encoder.1.conv.weights"][...] = 1e38
    run.model.params, run.model.state, run.optimizer = params, state, run._optimizer(params)
    return net


def test_class_weights():
    loaded = [SimpleNamespace(labels=np.array([0, 0, 0, 0, 1, -1]))]
    for kind, expected in (("inverse", [0.4, 1.6, 0]), ("root", [2 / 3, 4 / 3, 0])):
        run = SimpleNamespace(settings=from_dict(settings_dict(training={"class_weights": kind})), scenes=loaded)
        np.testing.assert_allclose(training.Training._class_weights(run), expected, rtol=1e-6)


@pytest.mark.parametrize("features", [["one", "value"], ["local", "value"]])
def test_digits_are_learned(tmp_path, features):
    config = digits(tmp_path, features=features)[2]
    assert config.net().num_features == sum(2 if name == "local" else 1 for name in features)
    run = training.Training(config, tmp_path / "run", tmp_path)
    (result,) = run.run()
    assert result["accuracy"] >= 0.9 and sum(map(sum, result["confusion"])) == 20


# ---- votes


class Oracle:
    """A "network" that knows the labels of a scene, and doubts those at the rim of its spheres."""

    segments, num_classes = True, 3

    def __init__(self, scene):
        self.scene, self.net, self.params, self.state = scene, self, {}, {}

    def pyramid(self, points, **more):
        return points

    def __call__(self, F, params, state, pyramid, features):
        assert F is kp
        return SimpleNamespace(logits=features)


def oracle(config, scene):
    labels = np.maximum(scene.labels, 0)
    columns = np.zeros((len(labels), 3), np.float32)
    columns[np.arange(len(labels)), labels] = 5
    known = data.Scene(scene.points, columns, scene.labels, scene.tree, scene.full, scene.full_labels)
    model = Oracle(known)
    model.settings, model.columns = config, data.Columns({"known": 3}, {}, {})
    return model, known


@pytest.mark.parametrize(("votes", "vote_radius"), [(1, 0.7), (3, 0.7), (1, 0.2), (2, 0.3)])
def test_votes_come_back_to_every_point(votes, vote_radius):
    config = from_dict(settings_dict(training={"vote_radius": vote_radius}))
    (scene,), _ = data.load(config, config.data.test, ".")
    model, known = oracle(config, scene)
    shares = voting.probabilities(model, known, votes)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-5)
    assert (shares.argmax(axis=1) == np.maximum(scene.labels, 0)).all()
    labels = labelling.labels_of(model, known, votes, mode="potentials")
    nearest = ((scene.full[:, None] - scene.points) ** 2).sum(axis=2).argmin(axis=1)
    assert (labels == np.maximum(scene.labels, 0)[nearest]).all()
    confusion = labelling.evaluate(model, [known, known], votes, mode="potentials")
    counted = scene.full_labels >= 0
    assert confusion.sum() == 2 * counted.sum()
    assert np.trace(confusion) == 2 * (labels == scene.full_labels)[counted].sum()


def test_a_run_with_local_coordinates(tmp_path):
    config = from_dict(settings_dict(data={"features": ["height", "local"]}, training={"steps": 12}))
    run = training.Training(config, tmp_path, ".")
    assert run.run()[-1]["miou"] > 0.2
    model = training.Model.load(tmp_path / "best.safetensors")
    assert model.columns == run.model.columns and model.columns.span("local") == slice(1, 4)


def test_confusion_has_a_row_for_each_true_class():
    config = voting.confusion(np.array([0, 0, 1, -1, 2]), np.array([1, 0, 1, 2, 0]), 3)
    assert config.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_scores():
    confusion = np.array([[5, 1, 0], [2, 2, 0], [0, 0, 0]])
    config = voting.scores(confusion, ("a", "b", "c"))
    assert config == {
        "miou": (5 / 8 + 2 / 5) / 2,
        "accuracy": 0.7,
        "mean_class_accuracy": (5 / 6 + 2 / 4) / 2,
        "iou": {"a": 5 / 8, "b": 2 / 5, "c": None},
        "class_accuracy": {"a": 5 / 6, "b": 2 / 4, "c": None},
        "points": 10,
    }
    assert voting.scores(np.zeros((2, 2), int), "ab")["miou"] is None


# ---- labels in files


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("has_label", [True, False])
def test_labels_in_ply_files(tmp_path, text, has_label):
    plyfile = pytest.importorskip("plyfile")
    rng = np.random.default_rng(0)
    fields = [("x", "f8"), ("y", "f8"), ("z", "f8"), ("quality", "u2"), *[("scalar_Label", "u1")] * has_label]
    table = np.zeros(50, fields)
    for name, _ in fields:
        table[name] = rng.integers(0, 200, 50)
    table["x"][3] = np.nan
    faces = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [
        plyfile.PlyElement.describe(table, "vertex", comments=["by hand"]),
        plyfile.PlyElement.describe(faces, "face"),
    ]
    plyfile.PlyData(elements, text=text, comments=["kept"]).write(tmp_path / "a.ply")
    cloud = scenes.read(tmp_path / "a.ply", fields=["quality"])
    assert cloud.kept.sum() == 49 and not cloud.kept[3]
    assert_same_bits(cloud.fields["quality"], table["quality"][cloud.kept].astype(np.float32))
    labels = rng.integers(1, 100, 49).astype(np.int32)
    segmentation.write_labels(tmp_path / "a.ply", tmp_path / "b.ply", labels, kept=cloud.kept)
    after = plyfile.PlyData.read(tmp_path / "b.ply")
    name = "scalar_Label" if has_label else "label"
    expected = np.zeros(50, int)
    expected[3] = table["scalar_Label"][3] if has_label else 0
    expected[cloud.kept] = labels
    assert (after["vertex"][name] == expected).all()
    for name in ("x", "y", "z", "quality"):
        np.testing.assert_array_equal(after["vertex"][name], table[name])
    assert (after.text, after.comments, after["vertex"].comments) == (text, ["kept"], ["by hand"])
    assert np.array_equal(after["face"]["vertex_indices"][0], [0, 1, 2])
    if has_label:
        with pytest.raises(scenes.ReadError, match=r"scalar_Label holds 0 to 255, got labels .* to 300"):
            segmentation.write_labels(
                tmp_path / "a.ply", tmp_path / "c.ply", labels + 300 - labels.max(), kept=cloud.kept
            )
        assert not (tmp_path / "c.ply").exists()


def test_labels_in_npz_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"points": rng.random((30, 3)), "Labels": np.zeros(30, np.uint8), "other": rng.random(5)}
    np.savez(tmp_path / "a.npz", **arrays)
    labels = rng.integers(0, 9, 30).astype(np.int32)
    segmentation.write_labels(tmp_path / "a.npz", tmp_path / "b.npz", labels)
    with np.load(tmp_path / "b.npz") as after:
        assert {*after.files} == {*arrays}
        assert (after["Labels"] == labels).all() and after["Labels"].dtype == np.uint8
        assert_same_bits(after["other"], arrays["other"])
    fractions = np.random.default_rng(1).random(30).astype(np.float32)
    fractions[7] = np.nan
    np.savez(tmp_path / "f.npz", points=arrays["points"], Truth=fractions)
    kept = np.arange(30) % 5 != 2  # the seventh is not
    segmentation.write_labels(tmp_path / "f.npz", tmp_path / "g.npz", labels[kept], kept=kept, label="TRUTH")
    with np.load(tmp_path / "g.npz") as after:
        assert_same_bits(after["Truth"], np.where(kept, labels, fractions).astype(np.float32))
    with pytest.raises(scenes.ReadError, match=r"a\.npz: Labels holds 0 to 255, got labels 7 to 300"):
        segmentation.write_labels(tmp_path / "a.npz", tmp_path / "h.npz", np.repeat([7, 300], 15))
    with pytest.raises(
        scenes.ReadError, match=r"a\.npz: other: expected one number for each of 30 points, got \(5,\) float64"
    ):
        segmentation.write_labels(tmp_path / "a.npz", tmp_path / "h.npz", labels, label="other")
    assert not [name for name in os.listdir(tmp_path) if "h" in name or "part" in name]
    del arrays["Labels"]
    np.savez(tmp_path / "c.npz", **arrays)
    segmentation.write_labels(tmp_path / "c.npz", tmp_path / "d.npz", labels)
    with np.load(tmp_path / "d.npz") as after:
        assert (after["labels"] == labels).all()


TERMINATED = """
import os, signal, sys, zipfile
import numpy as np
from kpcore import nn
from kpcore.nn import checkpoints
from kpcore.pipeline import segmentation
np.savez("a.npz", points=np.zeros((9, 3)))
signal.signal(signal.{name}, signal.SIG_IGN if len(sys.argv) > 1 else signal.SIG_DFL)  # whoever runs the tests
def end(*args, **kwargs):
    assert [name for name in os.listdir() if "part" in name]
    os.kill(os.getpid(), signal.{name})
    raise KeyError("went on")
os.fsync = end
if {labels}:
    segmentation.write_labels("a.npz", "b.npz", np.zeros(9, np.int32))
else:
    checkpoints.write("b.safetensors", {{}}, {{}})
"""


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_part_of_a_file(name, labels, python, tmp_path):
    done = python(TERMINATED.format(name=name, labels=labels))
    assert done.returncode == -getattr(signal, name), done.stderr
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_signal_that_is_handled_is_left_alone(python, tmp_path):
    code = TERMINATED.format(name="SIGTERM", labels=True).replace("len(sys.argv) > 1", "True")
    done = python(code)
    assert done.returncode == 1 and "went on" in done.stderr
    assert os.listdir(tmp_path) == ["a.npz"]


def test_an_npz_of_any_names(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"points": rng.random((30, 3)), "file": rng.random(5), "allow_pickle": rng.random(2), "a/b": np.array(3)}
    with zipfile.ZipFile(tmp_path / "A.NPZ", "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    labels = rng.integers(0, 9, 30).astype(np.int32)
    segmentation.write_labels(tmp_path / "A.NPZ", tmp_path / "B.NPZ", labels)
    with np.load(tmp_path / "B.NPZ") as after:
        assert {*after.files} == {*arrays, "labels"}
        assert_same_bits(after["labels"], labels)
        for name, array in arrays.items():
            assert_same_bits(after[name], array)
    assert sorted(os.listdir(tmp_path)) == ["A.NPZ", "B.NPZ"]


def test_labels_that_cannot_be_written_are_refused_before_the_network_runs(trained, tmp_path, monkeypatch):
    model = training.Model.load(trained[0] / "best.safetensors")
    monkeypatch.setattr(segmentation, "label", lambda *args, **more: pytest.fail("the network ran"))
    points = scenes.indoor(2000, seed=3)
    for labels, reason in (
        (np.ones(2000, bool), r"labels: expected one number for each of 2000 points, got \(2000,\) bool"),
        (np.ones((2000, 2)), r"labels: .*, got \(2000, 2\)"),
    ):
        np.savez(tmp_path / "a.npz", points=points.points, colors=points.colors, labels=labels)
        with pytest.raises(scenes.ReadError, match=rf"a\.npz: {reason}"):
            segmentation.segment(model, tmp_path / "a.npz", tmp_path / "b.npz")


def test_one_point_is_labelled_and_drawn(command, trained, tmp_path):
    np.savez(tmp_path / "a.npz", points=np.ones((1, 3)), colors=np.full((1, 3), 200, np.uint8))
    model = trained[0] / "best.safetensors"
    code, out, err = command(
        "segment", model, tmp_path / "a.npz", "--out", tmp_path / "b.npz", "--picture", tmp_path / "p.png"
    )
    assert (code, err) == (0, "") and "1 points labelled" in out
    code, _, err = command("segment", model, tmp_path / "a.npz", "--out", tmp_path / "b.npz", "--picture", tmp_path)
    assert code == 2 and "is a folder" in err


def test_files_that_labels_are_not_written_to(tmp_path):
    (tmp_path / "a.las").write_bytes(b"")
    with pytest.raises(scenes.ReadError, match=r"a\.las: expected a file other than the source"):
        segmentation.check_out(tmp_path / "a.las", tmp_path / ".." / tmp_path.name / "a.las")
    with pytest.raises(scenes.ReadError, match=r"b\.las: there is no folder .*none"):
        segmentation.check_out(tmp_path / "a.las", tmp_path / "none" / "b.las")
    for source, out, reason in (
        ("a.las", "b.bin", r"b.bin: expected an extension of files that can be written, .*\.csv.*, got '.bin'"),
        ("a.xyzw", "b.xyz", r"a.xyzw: expected an extension of files that can be read, .*\.csv.*, got '.xyzw'"),
        ("a.npz", "b", "b: expected an extension of files that can be written, .*, got no extension"),
    ):
        with pytest.raises(scenes.ReadError, match=f"{reason}$"):
            segmentation.check_out(tmp_path / source, tmp_path / out)


# ---- commands


TOML = """
[data]
train = [{ indoor = 0, points = 12000 }]
test = [{ indoor = 1, points = 6000 }]
features = ["one", "height"]
[data.classes]
flat = [0, 1]
upright = [2, 3, 4, 5]
[network]
voxel_size = 0.2
levels = 2
width = 8
momentum = 0.3
[training]
radius = 1.5
batch_clouds = 3
epochs = 2
steps = 8
lr = 0.05
momentum = 0.9
"""


def test_train_test_and_segment(command, tmp_path):
    pytest.importorskip("laspy")
    (tmp_path / "a.toml").write_text(TOML)
    code, out, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert re.search(r"^[\d,]+ parameters, 2 levels, 2 classes; [\d,]+ points to train on$", out, re.MULTILINE)
    number = r"[\d.]+"
    scores = rf"mIoU ({number}) over 2 classes, accuracy {number} \| IoU flat {number}, upright {number}"
    line = rf"^test after epoch 2: {scores}$"
    scored = re.search(line, out, re.MULTILINE)
    assert float(scored[1]) > 0.6
    code, _, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert code == 2 and "has a run already; resume it with --resume" in err
    assert command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--resume")[0] == 0
    code, _, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "none", "--resume")
    assert code == 2 and "expected a checkpoint last.safetensors" in err

    model = tmp_path / "run" / "best.safetensors"
    code, out, _ = command("test", model)
    assert code == 0 and f"mIoU {scored[1]}" in out
    assert sum(int(n.replace(",", "")) for row in out.splitlines()[2:] for n in row.split()[1:]) == int(
        out.split()[0].replace(",", "")
    )

    cloud = scenes.indoor(5000, seed=7)
    np.savez(
        tmp_path / "scan.npz", points=cloud.points + np.array([5e5, 4e6, 0]), labels=cloud.labels, extra=np.arange(3)
    )
    code, out, err = command(
        "segment", model, tmp_path / "scan.npz", "--out", tmp_path / "done.npz", "--picture", tmp_path / "p.png"
    )
    assert (code, err) == (0, "")
    with np.load(tmp_path / "done.npz") as done:
        labels = done["labels"]
        assert {*np.unique(labels)} == {0, 2} and done["extra"].tolist() == [0, 1, 2]
    true = np.where(cloud.labels < 2, 0, np.where(cloud.labels < 6, 2, -1))
    right = (labels == true)[true >= 0].mean()
    assert right > 0.7 and f"accuracy {right:.4f}" in out
    assert f"flat {(labels == 0).sum():>12,}" in out
    from matplotlib.image import imread

    assert imread(tmp_path / "p.png")[..., :3].std() > 0.05


def test_a_scan_without_the_label_field_is_labelled_too(trained, tmp_path):
    model = training.Model.load(trained[0] / "best.safetensors")
    model.settings = from_dict(settings_dict(data={"label": "truth"}))
    cloud = scenes.indoor(12_000, seed=3)
    np.savez(tmp_path / "a.npz", points=cloud.points, colors=cloud.colors)
    config = segmentation.segment(model, tmp_path / "a.npz", tmp_path / "b.npz")
    assert config.scores is None and config.counts.sum() == 12_000
    with np.load(tmp_path / "b.npz") as after:
        assert (after["truth"] == np.array([0, 2, 6])[config.classes]).all()


def test_commands_that_cannot_be_carried_out(command, tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for words, message in (
        (["train", tmp_path / "b.toml", "--out", tmp_path], "b.toml: No such file"),
        (["test", tmp_path / "none.safetensors"], "none.safetensors: No such file"),
        (["test", tmp_path / "bad.safetensors"], "bad.safetensors: "),
        (["segment", tmp_path / "bad.safetensors", "a.las", "--out", "b.las"], "bad.safetensors: "),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_options_that_do_not_apply(command, trained, tmp_path):
    code, out, err = command("demo", "--levels", 3, "--voxel", 0.1, "--out", tmp_path)
    assert (code, out) == (2, "") and "--voxel, --levels: only valid together with FILE" in err
    _, _, config = digits(tmp_path)
    model = tmp_path / "model.safetensors"
    training.Training(config, tmp_path, tmp_path)._save(model.name, {})
    for votes in ([], ["--votes", 2]):
        code, out, _ = command("test", model, "--data", tmp_path, *votes)
        assert code == 0 and re.match(r"20 labelled: accuracy [\d.]+, mean class accuracy [\d.]+ \| accuracy 0 ", out)
    code, out, err = command("predict", model, "a.off")
    assert (code, out) == (2, "") and "expected a network of objects, got one of digits" in err
    code, out, err = command("segment", model, "a.las", "--out", "b.las")
    assert (code, out) == (2, "") and "expected a network that labels points" in err
    model = trained[0] / "best.safetensors"
    (tmp_path / "a.npz").write_bytes(b"")
    words = ["segment", model, tmp_path / "a.npz", "--out", tmp_path / "b.npz", "--picture", tmp_path / "no" / "p"]
    code, out, err = command(*words)
    assert (code, out) == (2, "") and "there is no folder" in err
    code, out, err = command("segment", model, tmp_path / "none.npz", "--out", tmp_path / "b.npz")
    assert (code, out) == (2, "") and err == f"kpcore: {tmp_path / 'none.npz'}: no such file or folder\n"


@pytest.mark.filterwarnings("default")
def test_a_class_without_points_is_refused_or_left_out_of_the_mean(command, tmp_path):
    cloud = scenes.indoor(6000, 0)
    np.savez(tmp_path / "a.npz", points=cloud.points, labels=cloud.labels % 4)
    text = TOML.replace("{ indoor = 0, points = 12000 }", '"a.npz"').replace("{ indoor = 1, points = 6000 }", '"a.npz"')
    text = text.replace("upright = [2, 3, 4, 5]", "upright = [2, 3]\nlow = [7]\nnone = [8, 9]")
    text = text.replace("epochs = 2", "epochs = 1")
    (tmp_path / "a.toml").write_text(text)
    code, _, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert code == 2 and "[data.classes] low: expected points with the label 7 in the training data, got none" in err
    (tmp_path / "a.toml").write_text(text.replace("[data]", '[data]\nmay_be_empty = ["low", "none"]'))
    code, out, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert code == 0 and re.search(r"mIoU [\d.]+ over 2 of 4 classes, accuracy", out)
    assert "[data.classes] none: no file holds the label 8, 9" in err


def test_a_nan_ends_a_run_with_one_line(command, tmp_path):
    (tmp_path / "a.toml").write_text(TOML.replace("lr = 0.05", "lr = 1e6\nweight_decay = 1e3\nclip_value = 0.0"))
    code, _, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run")
    assert code == 2 and re.search(r"^kpcore: epoch 0, step \d: ", err, re.MULTILINE)


# ---- files of a run that are damaged


@pytest.fixture
def last(trained, tmp_path):
    """(groups, about, resume): content of the last checkpoint, and a function that resumes from changed content."""
    groups, about = checkpoints.read(trained[0] / "last.safetensors")
    (tmp_path / "log.jsonl").write_bytes((trained[0] / "log.jsonl").read_bytes())

    def resume():
        checkpoints.write(tmp_path / "last.safetensors", groups, about)
        return training.Training(from_dict(settings_dict()), tmp_path, tmp_path, resume=True)

    return groups, about, resume


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups, about: about["run"].update(epoch=10**9), "a run of 2 epochs, got epoch 1000000000"),
        (lambda groups, about: about["run"].update(epoch=-1), "expected the state of a run of 2 epochs, got epoch -1"),
        (lambda groups, about: about["run"].update(step=6), "got epoch 2, step 6"),
        (lambda groups, about: about["run"].update(step="1"), "got epoch 2, step '1'"),
        (lambda groups, about: about["run"].update(best=None), "expected the state of a run"),
        (lambda groups, about: about["run"].update(results=3), "expected the state of a run"),
        (lambda groups, about: about["run"].pop("epoch"), "got epoch None"),
        (lambda groups, about: about["run"].update(seed="x"), "seed: expected x, as of the run to resume, got 0"),
        (lambda groups, about: about.update(run=[1]), r"expected the last\.safetensors of a training"),
        (lambda groups, about: about.update(settings=[1]), "expected the sections"),
        (lambda groups, about: about.pop("settings"), "expected the sections"),
        (lambda groups, about: groups.pop("optimizer"), "expected the state of a run"),
        (lambda groups, about: groups.pop("params"), "params: expected"),
        (lambda groups, about: groups["optimizer"].update(num_steps=np.arange(3)), "expected an optimizer after 12"),
        (lambda groups, about: groups["optimizer"].update(num_steps=np.array(3)), r"after 12 steps, got 3"),
        (lambda groups, about: groups["optimizer"].pop("momentum.head.1.bias"), "state: expected what"),
        (
            lambda groups, about: groups.update(
                {kind: {name: value.astype(float) for name, value in groups[kind].items()} for kind in groups}
            ),
            "params, state: expected float32, got float64",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_a_run_cannot_go_on_from(last, change, message):
    groups, about, resume = last
    change(groups, about)
    with pytest.raises(ValueError, match=rf"resume: .*last\.safetensors: .*{message}") as refused:
        resume()
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_before_there_was_a_setting(last):
    _, about, resume = last
    del about["settings"]["data"]["columns"], about["settings"]["training"]["noise"]
    assert resume().epoch == 2


@pytest.mark.parametrize("line", [b"{}", b"3", b'{"epoch": 1}', b'{"epoch": "1", "step": 1}', b"\xff\x00", b""])
def test_a_log_that_is_damaged(last, tmp_path, line):
    _, _, resume = last
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(b"".join([*lines, line]))  # the last, as where the process was killed
    assert resume().epoch == 2 and (tmp_path / "log.jsonl").read_bytes() == b"".join(lines)
    (tmp_path / "log.jsonl").write_bytes(b"".join([*lines[:3], line + b"\n", *lines[3:]]))
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"^resume: .*log\.jsonl: line 4: expected a log entry of a training$"):
        resume()
    assert (tmp_path / "log.jsonl").read_bytes() == before


def test_a_log_is_whole_when_going_on_ends(last, tmp_path, monkeypatch):
    """What ends it while the log is cut leaves the log as it was."""
    before = (tmp_path / "log.jsonl").read_bytes()

    def stopped(*args):
        raise KeyboardInterrupt

    _, _, resume = last
    checkpoints.write(tmp_path / "last.safetensors", *last[:2])
    monkeypatch.setattr(checkpoints, "write", lambda *args: None)
    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        resume()
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.safetensors", "log.jsonl"]


def test_a_full_disk_takes_no_part_of_a_line(tmp_path):
    """By a limit on the size of files, as the disk is not ours to fill."""
    resource = pytest.importorskip("resource")
    monkey, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with open(tmp_path / "log", "ab", buffering=0) as log:
            training._append(log, {"step": 1})
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
            with pytest.raises(OSError) as raised:
                training._append(log, {"step": 2, "loss": 3.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, monkey)
    assert raised.value.filename == str(tmp_path / "log")
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("size", [0, 40_000])
def test_a_run_without_room_is_one_line(python, tmp_path, size):
    """The first checkpoint of the run has 27 kB, curves.png 50."""
    (tmp_path / "a.toml").write_text(TOML)
    code = f"""
import resource, signal, sys
from kpcore import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
sys.exit(cli.main(["train", "a.toml", "--out", "run"]))
"""
    done = python(code)
    assert done.returncode == 2
    assert re.fullmatch(r"kpcore: run/\w+\.(safetensors|png|jsonl): File too large\n", done.stderr)
    left = os.listdir(tmp_path / "run")
    assert not [name for name in left if "part" in name]
    again = ["--resume"] if "last.safetensors" in left else []
    if not again:
        assert cli.main(["train", str(tmp_path / "a.toml"), "--out", str(tmp_path / "run"), "--resume"]) == 2
    for out, more in (("run", again), ("whole", [])):
        assert cli.main(["train", str(tmp_path / "a.toml"), "--out", str(tmp_path / out), *more]) == 0
    one, other = (checkpoints.read(tmp_path / out / "last.safetensors") for out in ("run", "whole"))
    assert_same_checkpoints(one, other)


def test_resuming_a_run_that_does_not_exist(command, tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    code, out, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--resume")
    assert (code, out) == (2, "") and err.endswith("got none; start a new run without --resume\n")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    code, out, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--resume")
    assert (code, out) == (2, "") and err.endswith("got none; start a new run with another --out\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[(lambda about, v=v: about.update(columns=v), "") for v in (3, [1], {}, {"widths": {}})],
        *[(lambda about, v=v: about["columns"].update(widths=v), "columns: expected widths") for v in (
            3, {}, {"one": 1}, {"one": 1, "color": 3, "height": 10**9}, {"height": 1, "color": 3, "one": 1})],
        *[(lambda about, v=v: about["columns"].update(center=v), "finite number as center of") for v in (
            3, [], {}, {"color": "0", "height": 0.0}, {"color": 0.0, "height": [1, 2]},
            {"color": 0.0, "height": 1e999})],
        *[(lambda about, v=v: about["columns"]["scale"].update(height=v), "finite number as scale of height") for v in (
            0, -1, None, True, float("nan"), 1e-320)],
        (lambda about: about.pop("columns"), "without its settings or columns"),
        (lambda about: about.pop("settings"), "without its settings or columns"),
        *[(lambda about, v=v: about.update(settings=v), "") for v in (3, [1], {}, None)],
        (lambda about: about["settings"]["training"].update(votes=10**9), r"\[training\] votes: expected 1 to 1,000"),
        (lambda about: about["settings"]["training"].update(radius=1e30), r"\[training\] radius: expected"),
        (lambda about: about["settings"]["network"].update(voxel_size=0.3), "expected voxel_size 0.3, as in its"),
        (lambda about: about["settings"]["data"].update(features=["one", "height"]), "expected num_features 2"),
        (lambda about: about["settings"]["data"]["classes"].update(more=[50]), "expected num_classes 4"),
        (lambda about: about["network"].update(voxel_size=0.3), "expected voxel_size 0.2, as .* got 0.3"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_together(trained, command, tmp_path, change, message):
    groups, about = checkpoints.read(trained[0] / "best.safetensors")
    change(about)
    checkpoints.write(tmp_path / "a.safetensors", groups, about)
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}") as refused:
        training.Model.load(tmp_path / "a.safetensors")
    assert "\n" not in str(refused.value)
    code, out, err = command("test", tmp_path / "a.safetensors")
    assert (code, out, err) == (2, "", f"kpcore: {refused.value}\n")
