"""Objects with a class each: folders, lists and generated ones; training, votes, predictions, commands."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training_runs import check_resumed

from kpcore.io import ReadError
from kpcore.pipeline import batches, classification, data, labelling, objects, training, voting
from kpcore.pipeline.settings import SettingsError, from_dict, read_settings
from kpcore.scenes import CATEGORIES, shapes

pytest.importorskip("safetensors")


def sections(**more):
    """Settings of objects, as TOML has them; `more` by section."""
    parts = {
        "data": {
            "kind": "objects",
            "train": [{"shapes": 0, "number": 2, "points": 400}],
            "test": [{"shapes": 50, "number": 1, "points": 400}],
        },
        "network": {"voxel_size": 0.15, "levels": 2, "width": 8, "head_width": 16, "kernel_size": 5, "momentum": 0.2},
        "training": {
            "batch_clouds": 6, "epochs": 2, "steps": 4, "validate": 1, "lr": 0.05, "momentum": 0.9,
            "scale": [0.8, 1.2], "flip": [True, True, False], "noise": 0.01,
        },
    }  # fmt: skip
    for name, values in more.items():
        parts[name] = parts[name] | values
    return parts


CLASSES = ["chair", "night_stand", "table"]


def box(path, size, merged=True):
    """An OFF file of a box, with its counts in the first line as in ModelNet40."""
    corners = [[x, y, z] for x in (0, size[0]) for y in (0, size[1]) for z in (0, size[2])]
    faces = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
    lines = [" ".join(map(str, corner)) for corner in corners] + ["4 " + " ".join(map(str, face)) for face in faces]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(("OFF" if merged else "OFF\n") + "8 6 0\n" + "\n".join(lines) + "\n")


SIZES = {"chair": (1, 1, 1), "night_stand": (1, 1, 4), "table": (4, 4, 1)}


@pytest.fixture
def modelnet(tmp_path):
    """The folders of ModelNet40: chair/train/chair_0001.off and so on, with boxes that differ by class."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for number in range(1, 6):
            split = "train" if number < 5 else "test"
            box(tmp_path / name / split / f"{name}_{number:04}.off", SIZES[name] * rng.uniform(0.9, 1.1, 3), number % 2)
    (tmp_path / "README.txt").write_text("read me")
    (tmp_path / "chair" / "train" / ".DS_Store").write_bytes(b"\0")
    return tmp_path


@pytest.fixture
def resampled(tmp_path):
    """The resampled text form: modelnet40_train.txt lists names, chair/chair_0001.txt has x,y,z,nx,ny,nz."""
    rng = np.random.default_rng(0)
    (tmp_path / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    for split, numbers in (("train", range(1, 5)), ("test", range(5, 7))):
        lines = [f"{name}_{number:04}" for name in CLASSES for number in numbers]
        (tmp_path / f"modelnet40_{split}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            name = line.rpartition("_")[0]
            points = rng.random((300, 3)) * SIZES[name]
            (tmp_path / name).mkdir(exist_ok=True)
            table = np.column_stack([points, rng.standard_normal((300, 3))])
            np.savetxt(tmp_path / name / f"{line}.txt", table, "%.6f", ",")
    return tmp_path


def in_folders(**more):
    return {
        "train": [{"folder": ".", "split": "train", "points": 300}],
        "test": [{"folder": ".", "split": "test", "points": 300}],
        "classes": CLASSES,
    } | more


IN_LISTS = {
    "train": [{"list": "modelnet40_train.txt"}],
    "test": [{"list": "modelnet40_test.txt"}],
    "classes": CLASSES,
}


# ---- settings


def test_settings_and_their_defaults():
    config = from_dict(sections())
    assert config.names == tuple(CATEGORIES) and config.classifies and not config.digits and config.dimension == 3
    net = config.net()
    assert (net.num_features, net.num_classes, net.segments) == (1, 10, False)
    assert from_dict(json.loads(json.dumps(config.asdict()))) == config
    assert from_dict(sections(data={"classes": ["mug", "car"]})).names == ("mug", "car")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"kind": "object", "train": ["a.ply"], "test": []},
            r"\[data\] kind: expected scenes, digits, objects or parts, got 'object'",
        ),
        (
            {"kind": "digits", "train": ["a.ply"], "test": []},
            r"\[data\] kind: expected scenes, as train and test are, got digits",
        ),
        ({"train": ["a.off"]}, r"train\[0\]: expected a table of settings"),
        ({"train": [{"folder": "a", "list": "b"}]}, r"train\[0\]: expected one of folder, list and shapes, got"),
        ({"train": [{"points": 3}]}, r"train\[0\]: expected one of folder, list and shapes, got"),
        ({"train": [{"images": "a", "labels": "b"}]}, r"train\[0\] images: unknown setting"),
        ({"train": [{"list": "a", "split": "b"}]}, r"train\[0\] split: only valid together with folder, got list"),
        ({"train": [{"shapes": -1}]}, r"train\[0\] shapes: expected 0 to"),
        ({"train": [{"shapes": 0, "number": 0}]}, r"train\[0\] number: expected 1 to"),
        ({"train": [{"folder": "a", "points": 0}]}, r"train\[0\] points: expected 1 to"),
        ({"train": [{"folder": "a"}]}, r"classes: expected a list of 2 to 10,000 names, each once, got {}"),
        ({"classes": ["mug"]}, r"classes: expected a list of 2 to 10,000 names, each once, got \['mug'\]"),
        ({"classes": ["mug", "mug"]}, r"classes: expected a list of 2 to 10,000 names"),
        ({"classes": {"mug": [0], "car": [1]}}, r"classes: expected a list of 2 to 10,000 names"),
        ({"classes": ["mug", "spoon"]}, r"classes: expected those of shapes, airplane, .*, got spoon too"),
        ({"features": ["one", "color"]}, r"features: expected one or local for objects, got color"),
        ({"label": "class"}, r"label: not allowed for objects"),
    ],
)
def test_settings_that_are_refused(more, message):
    with pytest.raises(SettingsError, match=message):
        from_dict(sections(data=more))


def test_scenes_need_a_table_of_classes():
    with pytest.raises(SettingsError, match=r"\[data.classes\]: expected 2 to 10,000 classes"):
        from_dict({"data": {"train": ["a.ply"], "classes": ["a", "b"]}, "network": {"voxel_size": 1.0}})


def test_the_settings_of_the_pages_are_valid():
    docs = Path(__file__).parents[1] / "docs"
    config = read_settings(docs / "modelnet40.toml")
    assert len(config.names) == 40 and list(config.names) == sorted(config.names) and config.classifies
    config = read_settings(docs / "shapenetpart.toml")
    assert len(config.heads) == 16 and [int(name.split()[1]) for name in config.names] == [*range(50)]


# ---- folders and lists


def test_modelnet_folders_are_read_as_downloaded(modelnet):
    config = from_dict(sections(data=in_folders()))
    with pytest.warns(UserWarning, match="12 objects; left out: files beside the folders .1., hidden files .1."):
        loaded, _ = data.load(config, config.data.train, modelnet)
    assert [int(scene.labels[0]) for scene in loaded] == 4 * [0] + 4 * [1] + 4 * [2]
    assert [scene.name for scene in loaded[:2]] == ["chair/train/chair_0001.off", "chair/train/chair_0002.off"]
    for scene in loaded:
        norms = np.linalg.norm(scene.points, axis=1)
        assert 0.8 < norms.max() <= 1 + 1e-6 and abs(scene.points.mean(axis=0)).max() < 0.2
        tall, wide = np.ptp(scene.points[:, 2]), np.ptp(scene.points[:, 0])
        assert [0.7 < tall / wide < 1.4, tall > 2 * wide, wide > 2 * tall][int(scene.labels[0])]
    with pytest.warns(UserWarning, match="left out"):
        again = data.load(config, config.data.train, modelnet)[0]
    for one, other in zip(loaded, again, strict=True):
        np.testing.assert_array_equal(one.points, other.points)


def test_the_resampled_form_is_read_as_downloaded(resampled, recwarn):
    config = from_dict(sections(data=IN_LISTS))
    loaded, _ = data.load(config, config.data.train, resampled)
    assert [scene.name for scene in loaded[:5]] == [*(f"chair/chair_000{i}.txt" for i in range(1, 5)),
                                                    "night_stand/night_stand_0001.txt"]  # fmt: skip
    assert [int(scene.labels[0]) for scene in loaded] == 4 * [0] + 4 * [1] + 4 * [2] and not recwarn
    assert len(data.load(config, config.data.test, resampled)[0]) == 6


def test_a_table_of_files_and_classes(modelnet, resampled):
    (modelnet / "table.csv").write_text("file,class\ntable/test/table_0005.off,table\n\nchair/chair_0001.txt,chair\n")
    config = from_dict(sections(data={"train": [{"list": "table.csv"}], "test": [], "classes": CLASSES}))
    with pytest.warns(UserWarning, match=r"table\.csv: 2 objects; left out: lines of no class .1."):
        loaded, _ = data.load(config, config.data.train, modelnet)
    assert [int(scene.labels[0]) for scene in loaded] == [2, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "chair/train").rename(root / "chair/other"), "chair/train: No such file or directory"),
        (
            lambda root: [path.unlink() for path in (root / "chair/train").iterdir()],
            "chair/train: expected files of objects, got none$",
        ),
        (lambda root: box(root / "chair/train/a.off", (1, 1, 0)) or box(root / "chair/train/b.off", (0, 0, 0)),
         r"b\.off: expected faces with a finite area above 0, got 12 without"),
        (lambda root: (root / "chair/train/a.off").write_text("OFF1 0 0\n1 1 1\n"), "expected a mesh with faces"),
        (lambda root: (root / "chair/train/a.txt").write_text("1 1 1\n1 1 1\n"), "an object of a size above 0, got 2"),
        (lambda root: (root / "chair/train/a.txt").write_text("1 1 x\n"), r"a\.txt: "),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*left out")
def test_folders_that_are_refused(modelnet, change, message):
    change(modelnet)
    config = from_dict(sections(data=in_folders()))
    with pytest.raises(ReadError, match=message) as error:
        data.load(config, config.data.train, modelnet)
    assert "\n" not in str(error.value)


def test_a_split_that_is_not_chosen(modelnet):
    config = from_dict(sections(data=in_folders(train=[{"folder": "."}])))
    with pytest.raises(ReadError, match=r"chair: expected files .* but the folders test train: choose one with split"):
        data.load(config, config.data.train, modelnet)


def test_lists_that_are_refused(resampled):
    def load(text):
        (resampled / "a.txt").write_text(text)
        config = from_dict(sections(data={"train": [{"list": "a.txt"}], "test": [], "classes": CLASSES}))
        data.load(config, config.data.train, resampled)

    with pytest.raises(ReadError, match=r"a\.txt: line 2: expected a file and its class, or a name, got 3 words"):
        load("chair_0001\na b c\n")
    (resampled / "a.txt").write_bytes(b"chair_\xff\n")
    config = from_dict(sections(data={"train": [{"list": "a.txt"}], "test": [], "classes": CLASSES}))
    with pytest.raises(ReadError, match=r"a\.txt: expected text in UTF-8, got byte 0xff"):
        data.load(config, config.data.train, resampled)
    with pytest.raises(ReadError, match=r"chair_0099\.txt: No such file"):
        load("chair_0099\n")
    with (
        pytest.warns(UserWarning, match=r"0 objects; left out: lines of no class \(1\)"),
        pytest.raises(SettingsError, match=r"\[data\] a\.txt: expected points with labels of the classes, got none"),
    ):
        load("spoon_0001\n")
    (resampled / "chair" / "chair_0009.txt").write_text("0 0 0\n1 1 1\nnan 0 0\n")
    with pytest.warns(UserWarning, match=r"chair_0009\.txt: left out: points that are not finite"):
        load("chair_0009\n")


# ---- training and votes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, Training) of a run that tells generated mugs from tables and airplanes."""
    folder = tmp_path_factory.mktemp("run")
    config = from_dict(sections(
        data={"train": [{"shapes": 0, "number": 20, "points": 500}],
              "test": [{"shapes": 900, "number": 10, "points": 500}], "classes": ["mug", "table", "airplane"]},
        training={"epochs": 3, "steps": 25, "validate": 3, "batch_clouds": 8, "optimizer": "adamw",
                  "schedule": "one_cycle", "lr": 0.01},
    ))  # fmt: skip
    run = training.Training(config, folder, folder)
    run.run()
    return folder, run


def test_objects_are_learned(trained):
    (result,) = trained[1].results
    assert result["accuracy"] >= 0.8 and sum(map(sum, result["confusion"])) == 30
    confusion = np.array(result["confusion"])
    np.testing.assert_allclose(result["mean_class_accuracy"], (np.diag(confusion) / confusion.sum(axis=1)).mean())


@pytest.mark.parametrize(
    "network", [{}, {"deformable": 1}, {"kind": "kpnext", "depths": [1, 1], "num_neighbors": [8, 8]}]
)
def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path, network, monkeypatch):
    parts = sections()
    parts["network"] |= network
    if "kind" in network:
        parts["network"] = {"voxel_size": 0.15, "width": 16} | network
    config = from_dict(parts)
    check_resumed(config, tmp_path, [(0, 2)], monkeypatch)


def test_a_batch_has_whole_objects(trained):
    run = trained[1]
    jobs = batches.training_jobs(run.scenes, run.settings.training, True, np.random.default_rng(0), 8)
    drawn = [sphere for spheres in jobs for sphere in spheres]
    assert len(drawn) == 64 and sorted(sphere.scene for sphere in drawn[:60]) == [*range(60)]
    assert all(len(sphere.rows) == len(run.scenes[sphere.scene].points) for sphere in drawn)
    assert len({len(sphere.rows) for sphere in drawn}) > 10


def test_votes_are_the_mean_over_augmented_passes(trained):
    run = trained[1]
    model, loaded = run.model, run.test_scenes[:9]
    plain = voting.scene_probabilities(model, loaded, 1)
    batch = batches.make_batch(model.net, loaded, model.columns, [batches.whole_scene(loaded, i) for i in range(8)])
    logits = model.net(training.kp, model.params, model.state, batch.pyramid, batch.features).logits
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(plain[:8], exponents / exponents.sum(axis=1, keepdims=True), atol=1e-5)

    two, three = (voting.scene_probabilities(model, loaded, votes) for votes in (2, 3))
    np.testing.assert_allclose(three.sum(axis=1), 1, atol=1e-5)
    second, third = 2 * two - plain, 3 * three - 2 * two
    for vote in (second, third):
        assert vote.min() > -1e-5 and abs(vote - plain).max() > 1e-4
    assert abs(second - third).max() > 1e-4
    assert not np.array_equal(two, voting.scene_probabilities(model, loaded, 2, seed=1))
    seen = []
    voting.scene_probabilities(model, loaded, 2, watch=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1]
    confusion = labelling.evaluate(model, loaded, 3)
    true = np.array([int(scene.labels[0]) for scene in loaded])
    assert confusion.tolist() == voting.confusion(true, three.argmax(axis=1), 3).tolist()


def test_errors_begin_with_the_most_probable():
    loaded = [data.Scene(*6 * [None], name=str(label)) for label in range(4)]
    loaded = [replace(scene, labels=np.array([label])) for scene, label in zip(loaded, [0, 1, 1, 0], strict=True)]
    shares = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.2, 0.8]])
    classified = classification.Classified(loaded, shares)
    assert classified.classes.tolist() == [0, 0, 0, 1] and classified.errors.tolist() == [2, 3, 1]
    assert classified.confusion().tolist() == [[1, 1], [2, 0]]


# ---- commands


TOML = """
[data]
kind = "objects"
classes = ["chair", "night_stand", "table"]
train = [{ folder = ".", split = "train", points = 500 }]
test = [{ folder = ".", split = "test", points = 500 }]
features = ["one", "local"]
[network]
voxel_size = 0.15
levels = 2
width = 8
head_width = 16
momentum = 0.2
[training]
batch_clouds = 6
epochs = 2
steps = 15
lr = 0.05
momentum = 0.9
noise = 0.01
validate = 2
"""


@pytest.mark.filterwarnings("always:.*left out")
def test_train_test_and_predict(command, modelnet):
    pytest.importorskip("matplotlib")
    (modelnet / "a.toml").write_text(TOML)
    code, out, err = command("train", modelnet / "a.toml", "--out", modelnet.parent / "run")
    assert code == 0 and err.count("\n") == 2 and err.count("left out") == 2
    number = r"[\d.]+"
    means = rf"accuracy {number}, mean class accuracy {number}"
    assert re.search(rf"^test after epoch 2: {means} \| accuracy chair {number}, night_", out, re.MULTILINE)
    model = modelnet.parent / "run" / "best.safetensors"
    assert command("train", modelnet / "a.toml", "--out", modelnet.parent / "run", "--resume")[0] == 0

    code, out, _ = command("test", model, "--data", modelnet, "--votes", 3, "--out", modelnet.parent / "tested")
    assert code == 0 and out.startswith(
        "3 labelled: accuracy 1.0000, mean class accuracy 1.0000 | accuracy chair 1.000"
    )
    table = [*csv.reader((modelnet.parent / "tested" / "confusion.csv").read_text().splitlines())]
    assert table == [
        ["true class", *CLASSES],
        *([name, *("01"[name == other] for other in CLASSES)] for name in CLASSES),
    ]
    assert (modelnet.parent / "tested" / "confusion.png").stat().st_size > 1000
    assert not (modelnet.parent / "tested" / "errors.png").exists()

    for name in CLASSES:  # the classes of the test files one place on
        (modelnet / name).rename(modelnet / f"{name}.old")
    for name, other in zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True):
        (modelnet / f"{name}.old").rename(modelnet / other)
    code, out, _ = command("test", model, "--data", modelnet, "--out", modelnet.parent / "tested")
    assert code == 0 and out.startswith("3 labelled: accuracy 0.0000")
    from matplotlib.image import imread

    assert imread(modelnet.parent / "tested" / "errors.png")[..., :3].std() > 0.02

    mug = shapes("mug", 0, 2000).points
    np.save(modelnet / "mug.npy", mug)
    box(modelnet / "one.off", (5, 5, 20))
    code, out, err = command("predict", model, modelnet / "one.off", modelnet / "mug.npy", "--votes", 2)
    assert (code, err) == (0, "")
    lines = [re.fullmatch(r"(.*): (\w+) ([\d.]+)", line) for line in out.splitlines()]
    assert [line[1] for line in lines] == [str(modelnet / "one.off"), str(modelnet / "mug.npy")]
    code, out, err = command("features", model, modelnet / "one.off", modelnet / "mug.npy", "--level", 1,
                             "--out", modelnet.parent / "features")  # fmt: skip
    assert (code, err) == (0, "")
    assert len(re.findall(r"^level 1, channel +\d+: +[\d.]+ in (one\.off|mug\.npy)$", out, re.MULTILINE)) == 8
    assert imread(modelnet.parent / "features" / "kpcore-features.png")[..., :3].std() > 0.02
    assert lines[0][2] == "night_stand" and all(1 / 3 < float(line[3]) <= 1 for line in lines)


def test_objects_far_from_the_origin(trained, tmp_path):
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    faces = "3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"
    for name, shift in (("near", 0), ("far", np.array([515368, 4918340, 2322])), ("huge", 0)):
        rows = "\n".join(
            " ".join(map(repr, row)) for row in (corners * (1e200 if name == "huge" else 1) + shift).tolist()
        )
        (tmp_path / f"{name}.off").write_text(f"OFF\n4 4 0\n{rows}\n{faces}")
    near, far, huge = (
        objects.points_of_file(tmp_path / f"{name}.off", 500, None, strict=False) for name in ("near", "far", "huge")
    )
    np.testing.assert_allclose(far, near, atol=1e-6)
    np.testing.assert_allclose(huge, near, atol=1e-6)


def test_a_file_that_has_no_class_keeps_none_from_another(command, trained, tmp_path):
    box(tmp_path / "a.off", (1, 1, 4))
    (tmp_path / "bad.off").write_text("OFF0 0 0\n")
    code, out, err = command(
        "predict", trained[0] / "best.safetensors", *(tmp_path / f for f in ("bad.off", "a.off", "c.off"))
    )
    assert code == 3 and re.fullmatch(rf"{tmp_path / 'a.off'}: \w+ [\d.]+\n", out)
    assert err.endswith("2 of 3 files failed\n") and "bad.off: expected a mesh" in err and "c.off: No such" in err


@pytest.mark.parametrize("name", ["a.xyz", "a.npy", "a.npz", "b.npz"])
def test_clouds_without_the_columns_of_the_training(tmp_path, name):
    points = np.random.default_rng(0).normal(size=(50, 3))
    columns = ["x", "y", "z", "nx", "ny", "nz"]
    if name.endswith("xyz"):
        np.savetxt(tmp_path / name, points)
    elif name == "a.npy":
        np.save(tmp_path / name, points)
    else:
        np.savez(
            tmp_path / name, **({"points": points} if name == "a.npz" else dict(zip("xyz", points.T, strict=True)))
        )
    got = objects.points_of_file(tmp_path / name, 10, columns, strict=False)
    np.testing.assert_allclose(got, objects.in_unit_sphere("a", points), atol=1e-6)
    with pytest.raises(ReadError, match=r"has 3 columns, got 6 names|its columns have names already"):
        objects.points_of_file(tmp_path / name, 10, columns, strict=True)


def test_other_objects_do_not_go_on_with_a_run(trained, tmp_path, monkeypatch):
    folder, run = trained
    monkeypatch.setattr(training, "load_training", lambda *args, **more: (run.scenes[1:], [], run.model.columns))
    with pytest.raises(ValueError, match=r"expected the data of the run to resume, [0-9]+ points to train on, got "):
        training.Training(run.settings, folder, folder, resume=True)


def test_commands_that_cannot_be_carried_out(command, trained, tmp_path):
    model = trained[0] / "best.safetensors"
    (tmp_path / "a.off").write_text("OFF0 0 0\n")
    (tmp_path / "a.toml").write_text(TOML)
    for words, message in (
        (["predict", model, tmp_path / "none.off"], "none.off: No such file"),
        (["predict", model, tmp_path / "a.off"], "a.off: expected a mesh with faces, got none"),
        (["predict", model, tmp_path / "a.toml"], "unknown extension '.toml'"),
        (["segment", model, tmp_path / "a.las", "--out", "b.las"], "expected a network that labels points"),
        (["test", model, "--out", tmp_path / "a.off"], "--out"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
