"""k-fold cross-validation: its settings, its runs, and the table of their summed confusion matrices."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from test_training import settings_dict
from training_runs import assert_same_checkpoints

from kpcore import cli
from kpcore.nn import checkpoints
from kpcore.pipeline import data, labelling, training
from kpcore.pipeline.settings import SettingsError, from_dict, read_settings
from kpcore.scenes import indoor

pytest.importorskip("safetensors")

# The learning rate is so large that the last epoch of some folds is not the best.
TOML = """
[data]
folds = "area"
train = [
    { indoor = 0, points = 3000, area = "East" },
    { indoor = 1, points = 2000, area = "West wing" },
    { indoor = 2, points = 2000, area = "East" },
    { indoor = 3, points = 2500, area = "North" },
]
features = ["one", "height"]
[data.classes]
flat = [0, 1]
upright = [2, 3, 4, 5]
[network]
voxel_size = 0.3
levels = 2
width = 8
momentum = 0.8
[training]
radius = 1.5
batch_clouds = 2
epochs = 3
steps = 3
lr = 2.0
momentum = 0.5
validate = 1
"""
NAMES = ["East", "West-wing", "North"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(TOML file, folder of complete folds)."""
    folder = tmp_path_factory.mktemp("folds")
    (folder / "a.toml").write_text(TOML)
    assert cli.main(["train", str(folder / "a.toml"), "--out", str(folder / "run")]) == 0
    return folder / "a.toml", folder / "run"


def folds_of(parts, folds="area", **more):
    return from_dict(settings_dict(data={"train": parts, "test": [], "folds": folds, **more})).by_fold()


def files(fold):
    return [str(part) for part in fold.data.train], [str(part) for part in fold.data.test]


# ---- settings


def test_each_area_is_tested_by_a_network_trained_on_the_others():
    folds = folds_of(
        ["Area_1/hall/hall.ply", "./Area_2/a.ply", {"file": "b.ply", "area": "Area_1"}, {"indoor": 4, "area": "é 3"}]
    )
    assert {name: files(fold) for name, fold in folds.items()} == {
        "Area_1": (["./Area_2/a.ply", "indoor 4"], ["Area_1/hall/hall.ply", "b.ply"]),
        "Area_2": (["Area_1/hall/hall.ply", "b.ply", "indoor 4"], ["./Area_2/a.ply"]),
        "é-3": (["Area_1/hall/hall.ply", "./Area_2/a.ply", "b.ply"], ["indoor 4"]),
    }
    for fold in folds.values():
        assert fold.data.folds is None and from_dict(json.loads(json.dumps(fold.asdict()))) == fold
    assert from_dict(settings_dict()).by_fold() == {}


def test_each_file_is_a_fold():
    boxes = [{"file": "x/a.ply", "max": [1.0]}, "x/b.ply", {"file": "x/a.ply", "min": [1.0]}]
    folds = folds_of([*boxes, {"indoor": 3}, {"indoor": 3, "mirror": True}], "file")
    assert {name: files(fold)[1] for name, fold in folds.items()} == {
        "x-a.ply": ["x/a.ply"] * 2, "x-b.ply": ["x/b.ply"], "indoor-3": ["indoor 3"] * 2
    }  # fmt: skip


def test_boxes_of_a_file_are_in_several_areas_unless_they_overlap():
    west, east = ({"file": "a.ply", "area": name} for name in ("west", "east"))
    assert len(folds_of([west | {"max": [1.0, 2.0]}, east | {"min": [1.0]}])) == 2
    assert len(folds_of([west | {"min": [0.0, 2.0]}, east | {"max": [9.0, 2.0]}])) == 2
    message = r"\[data\] train\[1\]: expected points that are in one fold only, got a\.ply, also in west"
    for corners in (({"max": [1.0]}, {"min": [0.5]}), ({}, {"min": [1.0]}), ({"min": [1.0]}, {"min": [1.0, 2.0]})):
        with pytest.raises(SettingsError, match=message):
            folds_of([west | corners[0], east | corners[1]])


TWO = [{"indoor": 0, "area": "a"}, {"indoor": 1, "area": "b"}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": TWO, "folds": "room"}, r"\[data\] folds: expected area or file, got 'room'"),
        ({"train": TWO, "folds": 6}, r"\[data\] folds: expected str \| None, got 6"),
        ({"train": TWO, "test": [{"indoor": 2}]}, r"\[data\] test: not allowed together with folds"),
        ({"train": TWO[:1]}, r"\[data\] folds: expected scenes of two areas or more, got those of a only"),
        ({"train": ["a.ply"], "folds": "file"}, r"\[data\] folds: expected scenes of two files or more, got .* a\.ply"),
        ({"train": [*TWO, {"indoor": 3}]}, r"train\[2\] area: expected a name, which indoor 3 has no folder to take"),
        *[
            ({"train": [*TWO, name]}, rf"train\[2\] area: expected a name, which {name} has no folder to take from")
            for name in ("a.ply", "/S3DIS/Area_1/a.ply", "../Area_1/a.ply", "~/Area_1/a.ply", "./a.ply")
        ],
        ({"train": [{"indoor": 0, "area": 1}]}, r"train\[0\] area: expected str \| None, got 1"),
        ({"train": [*TWO, {"indoor": 2, "area": "A"}]}, r"train\[2\] area: the folders of the folds a and A have the"),
        ({"train": [*TWO, {"indoor": 2, "area": "/b"}]}, r"train\[2\] area: the folders of the folds b and /b have"),
        *[
            ({"train": [*TWO, {"indoor": 2, "area": name}]}, r"train\[2\] area: expected a fold with a name of letters")
            for name in ("", "..", "?", "é" * 101)
        ],
        ({"train": [*TWO, {"indoor": 0, "area": "b"}]}, r"train\[2\]: expected points that .* got indoor 0, also in a"),
        ({"train": [{"images": "a", "labels": "b"}], "features": ["one"]}, r"folds: only valid for scenes, got digits"),
        *[
            ({"kind": kind, "train": [{"shapes": 0}], "features": ["one"]}, f"only valid for scenes, got {kind}")
            for kind in ("objects", "parts")
        ],
    ],
)
def test_folds_that_are_refused(more, message):
    with pytest.raises(SettingsError, match=message) as refused:
        from_dict(settings_dict(data={"test": [], "folds": "area", **more}))
    assert "\n" not in str(refused.value)


def test_a_training_is_that_of_one_fold(tmp_path):
    config = from_dict(settings_dict(data={"train": TWO, "test": [], "folds": "area"}))
    with pytest.raises(ValueError, match="expected those of one fold"):
        training.Training(config, tmp_path, ".")


# ---- runs


def numbers(line):
    """The cells of a line of a table after its title, which may have spaces."""
    return [
        None if cell == "-" else float(cell.replace(",", ""))
        for cell in re.findall(r"(?<= )(?:-|[\d.,]+)(?= |$)", line)
    ]


def test_the_table_is_that_of_the_summed_confusions(whole, command):
    _, out = whole
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "folds.json"])
    content = json.loads((out / "folds.json").read_text())
    assert [*content["folds"]] == NAMES
    matrices, best = [], []
    for name in NAMES:
        run = checkpoints.read(out / name / "last.safetensors")[1]["run"]
        assert [result["epoch"] for result in run["results"]] == [1, 2, 3]
        matrices.append(np.array(run["results"][-1]["confusion"]))
        best.append(max(run["results"], key=lambda result: result["miou"])["epoch"])
        assert content["folds"][name]["confusion"] == run["results"][-1]["confusion"]
    assert min(best) < 3
    total = sum(matrices)
    labels = [indoor(points, seed).labels for seed, points in enumerate((3000, 2000, 2000, 2500))]
    assert total.sum() == sum((one < 6).sum() for one in labels) and content["all"]["confusion"] == total.tolist()
    code, printed, err = command("test", out)
    assert (code, err) == (0, "")
    table = printed[printed.index(NAMES[0] + "  ") :].splitlines()
    assert re.split(r" {2,}", table[0].strip()) == [*NAMES, "all folds"]
    columns = [*matrices, total]
    assert numbers(table[1]) == [matrix.sum() for matrix in columns]
    for row, (name, i) in enumerate((("flat", 0), ("upright", 1)), 2):
        assert table[row].split()[:2] == ["IoU", name]
        iou = [matrix[i, i] / (matrix[i].sum() + matrix[:, i].sum() - matrix[i, i]) for matrix in columns]
        np.testing.assert_allclose(numbers(table[row]), iou, atol=5e-5)
        assert content["all"]["iou"][name] == iou[-1]
    for line, expected in zip(table[4:7], (
        np.mean([numbers(table[2]), numbers(table[3])], axis=0),
        [np.trace(matrix) / matrix.sum() for matrix in columns],
        [np.mean(np.diag(matrix) / matrix.sum(axis=1)) for matrix in columns],
    ), strict=True):  # fmt: skip
        np.testing.assert_allclose(numbers(line), expected, atol=1.1e-4)
    assert [line.split()[0] for line in table[4:7]] == ["mIoU", "accuracy", "mean"]
    rows = printed[printed.index("confusion, ") :].splitlines()[1:]
    assert [numbers(row) for row in rows] == total.tolist()


def test_training_prints_the_table_that_test_prints(whole, command, tmp_path):
    toml, out = whole
    (out / "North" / "curves.png").unlink()  # as where the run was killed after its last checkpoint
    (out / "folds.json").rename(out.parent / "before.json")
    code, printed, err = command("train", toml, "--out", out, "--resume")
    assert (code, err) == (0, "") and printed.count("done already: ") == 2 and (out / "North" / "curves.png").exists()
    assert (out / "folds.json").read_bytes() == (out.parent / "before.json").read_bytes()
    tested = command("test", out, "--out", tmp_path / "tested")[1]
    table = re.search(r"^ +East  .*?^mean class accuracy[^\n]*$", printed, re.MULTILINE | re.DOTALL)[0]
    assert table in tested
    assert sorted(path.name for path in (tmp_path / "tested").iterdir()) == ["confusion.csv", "confusion.png"]
    rows = (tmp_path / "tested" / "confusion.csv").read_text().splitlines()[1:]
    total = json.loads((out / "folds.json").read_text())["all"]["confusion"]
    assert [[*map(int, row.split(",")[1:])] for row in rows] == total


def test_a_fold_is_a_run_like_any_other(whole, command):
    toml, out = whole
    for name, fold in read_settings(toml).by_fold().items():
        assert sorted(path.name for path in (out / name).iterdir()) == [
            "best.safetensors", "curves.png", "last.safetensors", "log.jsonl"
        ]  # fmt: skip
        model = training.Model.load(out / name / "best.safetensors")
        assert model.settings == fold
        heights = np.concatenate([indoor(part.points, part.indoor).points[:, 2] for part in fold.data.train])
        assert model.columns.center["height"] == np.median(heights.astype(np.float64))  # no share of the tested area
        best = max(checkpoints.read(out / name / "last.safetensors")[1]["run"]["results"], key=lambda one: one["miou"])
        tested = data.load(fold, fold.data.test, ".", model.columns)[0]
        assert labelling.evaluate(model, tested).tolist() == best["confusion"]
        code, printed, _ = command("test", out / name / "best.safetensors")
        assert code == 0 and f"{best['points']:,} labelled: mIoU {best['miou']:.4f}" in printed
    alone = training.Training(fold, out.parent / "alone", ".")  # the last fold, on scenes that it reads itself
    alone.run()
    assert_same_checkpoints(*(checkpoints.read(run / "last.safetensors") for run in (out / name, alone.out)))


def test_files_are_read_once_for_all_folds(command, tmp_path, monkeypatch):
    read, opened = data.read_cloud, []
    monkeypatch.setattr(data, "read_cloud", lambda settings, path: opened.append(path.name) or read(settings, path))
    for seed, area in enumerate(("north", "south", "west")):
        (tmp_path / area).mkdir()
        cloud = indoor(1500, seed)
        np.savez(tmp_path / area / f"{area}.npz", points=cloud.points, labels=cloud.labels)
    parts = '"north/north.npz", "south/south.npz", "west/west.npz"'
    (tmp_path / "a.toml").write_text(re.sub(r"train = \[.*?\n\]", f"train = [{parts}]", TOML, flags=re.DOTALL))
    assert command("train", tmp_path / "a.toml", "--out", tmp_path / "run")[0] == 0
    assert sorted(opened) == ["north.npz", "south.npz", "west.npz"]
    assert command("test", tmp_path / "run", "--data", tmp_path)[0] == 0


def test_folds_that_are_trained_one_by_one(whole, command, tmp_path):
    """As several machines do that share the folder."""
    toml, out = whole
    code, printed, _ = command("train", toml, "--out", tmp_path, "--fold", "West-wing")
    assert code == 0 and printed.endswith("1 of 3 folds are done; to be trained: East, North\n")
    assert [path.name for path in tmp_path.iterdir()] == ["West-wing"]
    code, _, err = command("test", tmp_path)
    assert code == 2 and "expected a model, or a folder of folds that are all trained, with folds.json" in err
    code, _, err = command("train", toml, "--out", tmp_path, "--fold", "West-wing")
    assert code == 2 and "West-wing has a run already; resume it with --resume" in err
    code, _, err = command("train", toml, "--out", tmp_path, "--fold", "North", "--resume")
    assert code == 2 and "expected a checkpoint last.safetensors in" in err and "without --resume" in err
    code, _, err = command("train", toml, "--out", tmp_path, "--fold", "North", "--seed", 1)
    assert code == 2 and "West-wing/last.safetensors: seed: expected 0, as of the run to resume, got 1" in err
    assert command("train", toml, "--out", tmp_path, "--fold", "North")[0] == 0
    assert not (tmp_path / "folds.json").exists()
    code, printed, _ = command("train", toml, "--out", tmp_path, "--fold", "East")
    assert code == 0 and "all folds" in printed
    assert (tmp_path / "folds.json").read_bytes() == (out / "folds.json").read_bytes()


def test_folds_that_cannot_be_trained(whole, command, tmp_path):
    toml, out = whole
    (tmp_path / "plain.toml").write_text(TOML.replace('folds = "area"', ""))
    (tmp_path / "other.toml").write_text(TOML.replace("lr = 2.0", "lr = 1.0"))
    for words, message in (
        ([toml, "--out", out], "East has a run already; resume it with --resume or choose another folder"),
        ([toml, "--out", tmp_path / "x", "--fold", "west"], "--fold: expected one of East, West-wing, North, got west"),
        ([tmp_path / "plain.toml", "--out", tmp_path / "x", "--fold", "a"], "--fold: expected settings with folds in"),
        ([toml, "--out", tmp_path / "x", "--resume"], "x, got none; start a new run without --resume"),
        (
            [tmp_path / "other.toml", "--out", out, "--resume"],
            "East/last.safetensors: expected the settings of the run",
        ),
    ):
        code, printed, err = command("train", *words)
        assert (code, printed) == (2, "") and message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for content in ("[3]", "{}", '{"folds": ["East"]}', '{"folds": {}}'):
        (tmp_path / "folds.json").write_text(content)
        code, _, err = command("test", tmp_path)
        assert code == 2 and err.endswith("folds.json: expected the folds of a training, got something else\n")


def test_folds_whose_first_step_failed_are_trained_anew(command, tmp_path):
    short = TOML.replace("epochs = 3\nsteps = 3", "epochs = 1\nsteps = 1")
    (tmp_path / "a.toml").write_text(short.replace("radius = 1.5", "radius = 0.0001"))
    code, _, err = command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--fold", "East")
    assert code == 2 and "[training] radius" in err and (tmp_path / "run" / "East" / "last.safetensors").exists()
    (tmp_path / "a.toml").write_text(short)
    assert command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--fold", "North")[0] == 0
    assert command("train", tmp_path / "a.toml", "--out", tmp_path / "run", "--fold", "East")[0] == 0


def test_killed_in_its_second_fold_a_run_goes_on_to_the_same_weights(whole, command, tmp_path, monkeypatch):
    toml, out = whole
    code = """
import os, signal, sys
from kpcore import cli
from kpcore.pipeline import training
training._BETWEEN_CHECKPOINTS = 0
train, steps = training.Training._train, []
def killed(run, batch):
    steps.append(train(run, batch))
    if len(steps) == 9 + 5:  # the fifth of the second fold
        os.kill(os.getpid(), signal.SIGKILL)
    return steps[-1]
training.Training._train = killed
cli.main(sys.argv[1:])
"""
    words = [sys.executable, "-c", code, "train", str(toml), "--out", str(tmp_path / "run")]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == -signal.SIGKILL
    run = checkpoints.read(tmp_path / "run" / "West-wing" / "last.safetensors")[1]["run"]
    assert (run["epoch"], run["step"]) == (1, 1) and not (tmp_path / "run" / "North" / "log.jsonl").exists()
    status, printed, _ = command("train", toml, "--out", tmp_path / "run", "--fold", "North")
    assert status == 0 and printed.endswith("2 of 3 folds are done; to be trained: West-wing\n")
    train, steps = training.Training._train, []
    monkeypatch.setattr(training.Training, "_train", lambda run, batch: steps.append(run.out.name) or train(run, batch))
    status, printed, _ = command("train", toml, "--out", tmp_path / "run", "--resume")
    assert status == 0 and printed.count("done already: ") == 2
    assert steps == ["West-wing"] * (9 - 4)
    for name in NAMES:
        for file in ("last", "best"):
            both = (folder / name / f"{file}.safetensors" for folder in (out, tmp_path / "run"))
            assert_same_checkpoints(*map(checkpoints.read, both))
    assert (tmp_path / "run" / "folds.json").read_bytes() == (out / "folds.json").read_bytes()
