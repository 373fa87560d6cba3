"""The table of classes before a training, and what is said of labels that are rare, mistyped or missing."""

import json

import numpy as np
import pytest

import kpcore as kp
from kpcore.pipeline import class_table, data, training
from kpcore.pipeline.settings import SettingsError, from_dict


def write(path, labels, seed=0):
    """A file of points in a flat square with these numbers of points by label."""
    numbers = np.concatenate([np.full(number, label) for label, number in labels.items()])
    points = np.random.default_rng(seed).uniform((0, 0, 0), (12, 8, 0.5), (len(numbers), 3))
    np.savez(path, points=points, labels=np.random.default_rng(1).permutation(numbers).astype(np.int32))


def config(classes, **more):
    return from_dict({
        "data": {"train": ["a.npz", "b.npz"], "test": ["c.npz"], "classes": classes} | more,
        "network": {"voxel_size": 0.5, "levels": 2, "width": 8, "kernel_size": 5},
        "training": {"radius": 3.0, "batch_points": 800, "batch_clouds": 2, "epochs": 2, "steps": 2, "validate": 1},
    })  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a.npz", {2: 900, 6: 600, 9: 1})
    write(tmp_path / "b.npz", {2: 500}, 1)
    write(tmp_path / "c.npz", {2: 700, 6: 300, 64: 400}, 2)
    return tmp_path


def test_points_and_files_of_each_class(folder):
    with pytest.warns(kp.KpcoreWarning) as caught:
        run = training.Training(config({"ground": [2], "building": [6], "water": [9]}), folder / "run", folder)
    assert [str(one.message) for one in caught] == [
        "[data] train: few points of water 1 (0.05 %): their IoU says little",
        "[data] test: no points of water: the score says nothing of them",
    ]
    assert run.classes == {
        "train": {"ground": {"points": 1400, "files": 2}, "building": {"points": 600, "files": 1},
                  "water": {"points": 1, "files": 1}},
        "test": {"ground": {"points": 700, "files": 1}, "building": {"points": 300, "files": 1},
                 "water": {"points": 0, "files": 0}},
    }  # fmt: skip
    lines = class_table.lines(run.classes)
    assert [line.split() for line in lines] == [
        ["train", "points", "files", "test", "points", "files"], ["ground", "1,400", "2", "700", "1"],
        ["building", "600", "1", "300", "1"], ["water", "1", "1", "0", "0"],
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_a_label_that_no_file_holds(folder):
    with pytest.warns(kp.KpcoreWarning) as caught:
        training.Training(config({"ground": [2, 22], "building": [6]}), folder / "run", folder)
    listed = "2 (2,100 points, ground) 6 (900 points, building) 9 (1 point, of no class) 64 (400 points, of no class)"
    assert [str(one.message) for one in caught] == [
        f"[data.classes] ground: no file holds the label 22; there are {listed}; the nearest of no class is 9"
    ]


def test_a_class_without_points_is_an_error(folder):
    classes = {"ground": [2], "building": [5]}
    message = (
        r"\[data.classes\] building: expected points with the label 5 in the training data, got none; their labels are "
        r"2 \(1,400 points, ground\) 6 \(600 points, of no class\) 9 \(1 point, of no class\); the nearest of no "
        r'class is 6; if this is intended: may_be_empty = \["building"\] in \[data\]'
    )
    with pytest.raises(SettingsError, match=message):
        training.Training(config(classes), folder / "run", folder)
    with pytest.warns(kp.KpcoreWarning, match="no file holds the label 5|few points of building 0"):
        training.Training(config(classes, may_be_empty=["building"]), folder / "run", folder)
    # A label that only the test files hold
    with pytest.raises(SettingsError, match=r"building: expected points with the label 64 in the training data"):
        training.Training(config({"ground": [2], "building": [64]}), folder / "run", folder)


def test_the_best_network_is_chosen_by_validation(folder):
    write(folder / "v.npz", {2: 500, 6: 400}, 3)
    classes = {"ground": [2], "building": [6]}
    run = training.Training(config(classes, validation=["v.npz"]), folder / "run", folder)
    entries = []
    run.run(entries.append)
    scores = [("validation" if "validation" in one else "test", one["epoch"]) for one in entries if "loss" not in one]
    assert scores == [("validation", 1), ("validation", 2), ("test", 2)]
    best = kp.load_model(folder / "run" / "best.safetensors")
    assert best.history["chosen_by"] == "validation" and best.history["classes"] == run.classes
    by_validation = [one["validation"]["miou"] for one in entries if "validation" in one]
    assert best.history["result"]["miou"] == max(by_validation)
    of_best = training.labelling.evaluate_scores(best, run.test_scenes)[1]
    assert best.history["test"]["miou"] == entries[-1]["test"]["miou"] == of_best["miou"]
    logged = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    assert logged == entries
    resumed = training.Training(run.settings, folder / "run", folder, resume=True)
    assert resumed.best == max(by_validation) and len(resumed.results) == 2


def test_a_fraction_of_each_scene_for_validation(folder):
    classes = {"ground": [2], "building": [6]}
    whole, _ = data.load_scenes(config(classes), config(classes).data.train, folder)
    train, validation, _ = data.load_training(config(classes, validation=0.2), folder)
    for scene, part, aside in zip(whole, train, validation, strict=True):
        number = len(scene.full)
        assert len(part.full) + len(aside.full) == number and abs(len(aside.full) / number - 0.2) < 0.01
        low, high = aside.full[:, 0].min(), aside.full[:, 0].max()  # x is the longer axis
        assert not ((part.full[:, 0] > low) & (part.full[:, 0] < high)).any()
    for fraction, message in ((0.001, "from 0.01 to 0.5, got 0.001"), ("all", "a list of files, or a fraction")):
        with pytest.raises(SettingsError, match=rf"\[data\] validation: expected .*{message}"):
            config(classes, validation=fraction)
    with pytest.raises(
        SettingsError, match=r"\[data\] validation\[0\]: expected points that are not in train, got a.npz"
    ):
        config(classes, validation=["a.npz"])


def test_the_strip_that_is_set_aside_has_a_share_of_each_class(folder):
    points = np.random.default_rng(0).uniform((0, 0, 0), (12, 8, 0.5), (4000, 3))
    labels = np.select([np.abs(points[:, 0] - 4) < 1.5, np.abs(points[:, 0] - 6) < 0.3], [6, 9], 2)
    np.savez(folder / "a.npz", points=points, labels=labels.astype(np.int32))
    settings = config({"ground": [2], "building": [6], "water": [9]}, validation=0.1, train=["a.npz"])
    (train,), (aside,), _ = data.load_training(settings, folder)
    counts = [np.bincount(scene.full_labels, minlength=3) for scene in (train, aside)]
    assert (counts[0] > 0).all() and (counts[1] > 0).sum() >= 2 and counts[1].sum() == 400


def test_a_best_network_that_is_gone_is_said_and_replaced(folder):
    settings = config({"ground": [2], "building": [6]})
    training.Training(settings, folder / "run", folder).run()
    best = folder / "run" / "best.safetensors"
    best.unlink()
    with pytest.warns(
        kp.KpcoreWarning, match=r"best.safetensors: expected the best network, got none; it is that of the"
    ):
        training.Training(settings, folder / "run", folder, resume=True).run()
    assert kp.load_model(best).history["chosen_by"] == "the last epoch"
