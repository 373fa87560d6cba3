"""Objects with labelled parts: a head for each category, the scores of ShapeNetPart, its folders, commands."""

import json
import re

import numpy as np
import pytest
from training_runs import check_resumed

from kpcore.io import ReadError, read
from kpcore.pipeline import batches, data, labelling, training, voting
from kpcore.pipeline.settings import SettingsError, from_dict
from kpcore.scenes import CATEGORIES, PART_LABELS, shapes

pytest.importorskip("safetensors")

SOME = {name: PART_LABELS[name] for name in ("mug", "table", "lamp")}


def sections(**more):
    """Settings of parts of generated objects, as TOML has them; `more` by section."""
    parts = {
        "data": {
            "kind": "parts",
            "train": [{"shapes": 0, "number": 4, "points": 400}],
            "test": [{"shapes": 50, "number": 2, "points": 400}],
            "classes": SOME,
            "features": ["one", "local"],
        },
        "network": {"voxel_size": 0.12, "levels": 2, "width": 8, "kernel_size": 5, "momentum": 0.2},
        "training": {
            "batch_clouds": 4, "epochs": 2, "steps": 4, "validate": 1, "lr": 0.05, "momentum": 0.9, "noise": 0.01,
        },
    }  # fmt: skip
    for name, values in more.items():
        parts[name] = parts[name] | values
    return parts


# ---- settings


def test_settings_and_their_defaults():
    config = from_dict(sections())
    assert config.heads == {"mug": 2, "table": 3, "lamp": 3} and config.whole and not config.classifies
    assert config.names[:3] == ("mug 21", "mug 22", "table 31")
    net = config.net()
    assert (net.num_features, net.num_classes, net.segments, net.heads) == (4, 8, True, config.heads)
    assert from_dict(json.loads(json.dumps(config.asdict()))) == config
    assert from_dict(sections(data={"classes": {}})).heads == {name: len(parts) for name, parts in CATEGORIES.items()}
    assert sorted(sum(PART_LABELS.values(), [])) == [*range(sum(map(len, CATEGORIES.values())))]  # noqa: RUF017


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"classes": {"mug": [0, 1]}}, r"expected the part labels of generated shapes, kpcore\.scenes\.PART_LABELS"),
        ({"classes": {"spoon": [0, 1]}}, r"classes: expected those of shapes, .*, got spoon too"),
        ({"classes": {"mug": []}, "train": [{"list": "a"}], "test": []}, r"mug: expected a list of integers"),
        ({"classes": {"a": [0], "b": [0]}, "train": [{"list": "a"}], "test": []}, "labels that no other class has"),
        ({"classes": ["a", "b"], "train": [{"list": "a"}], "test": []}, r"classes\]: expected 2 to 10,000 classes"),
        ({"features": ["color"]}, "expected one or local for objects, got color"),
    ],
)
def test_settings_that_are_refused(more, message):
    with pytest.raises(SettingsError, match=message):
        from_dict(sections(data=more))


# ---- scores


def test_scores_are_those_of_the_benchmark():
    """Two mugs and a table, with the IoUs worked out by hand."""
    heads = {"mug": 2, "table": 3, "lamp": 2}
    matrices = [np.zeros((7, 7), int) for _ in range(3)]
    matrices[0][:2, :2] = [[6, 2], [1, 3]]  # 6 / 9 and 3 / 6
    matrices[1][0, 0] = 5  # no handle and none predicted: 1 and 1
    matrices[2][2:5, 2:5] = [[4, 0, 0], [0, 0, 4], [0, 0, 0]]  # 1, 0 and 0
    scores = voting.part_scores(matrices, [0, 0, 1], heads)
    mugs, table = [(6 / 9 + 3 / 6) / 2, 1], 1 / 3
    assert scores["iou"] == {"mug": pytest.approx(np.mean(mugs)), "table": pytest.approx(table), "lamp": None}
    assert scores["miou"] == pytest.approx(np.mean([*mugs, table]))
    assert scores["class_miou"] == pytest.approx((np.mean(mugs) + table) / 2)
    assert scores["accuracy"] == 18 / 25 and scores["points"] == 25


# ---- the folders of ShapeNetPart

SPLIT = "train_test_split/shuffled_test_file_list.json"
SYNSETS = {"Airplane": "02691156", "Chair": "03001627"}
LABELS = {"Airplane": [0, 1, 2, 3], "Chair": [12, 13, 14, 15]}


@pytest.fixture
def shapenet(tmp_path):
    """The folders of ShapeNetPart with two categories: airplanes along x and chairs along z, parts by place."""
    root, rng = tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal", np.random.default_rng(0)
    (root / "train_test_split").mkdir(parents=True)
    lines = [f"{name}\t{synset}\n" for name, synset in SYNSETS.items()] + ["Bag\t02773838\n"]
    (root / "synsetoffset2category.txt").write_text("".join(lines))
    for split, number in (("train", 6), ("val", 1), ("test", 2)):
        names = []
        for name, synset in SYNSETS.items():
            (root / synset).mkdir(exist_ok=True)
            for i in range(number):
                points, along = rng.uniform(-1, 1, (400, 3)), 0 if name == "Airplane" else 2
                points *= [0.3, 0.3, 0.3]
                points[:, along] *= 3
                part = np.floor((points[:, along] + 0.9) / 0.45)
                table = np.column_stack([points, rng.standard_normal((400, 3)), part + LABELS[name][0]])
                np.savetxt(root / synset / f"{split}{i}.txt", table, "%.6f")
                names.append(f"shape_data/{synset}/{split}{i}")
        names += ["shape_data/02773838/bag"]
        (root / "train_test_split" / f"shuffled_{split}_file_list.json").write_text(json.dumps(names))
    return root


def shapenet_sections(**more):
    train, test = ({"list": f"train_test_split/shuffled_{split}_file_list.json"} for split in ("train", "test"))
    columns = ["x", "y", "z", "nx", "ny", "nz", "label"]
    return sections(
        data={"train": [train], "test": [test], "classes": LABELS, "columns": columns, **more},
        training={
            "epochs": 2,
            "steps": 25,
            "validate": 2,
            "rotate": "none",
            "optimizer": "adamw",
            "schedule": "one_cycle",
            "lr": 0.01,
        },
    )


@pytest.mark.filterwarnings("ignore:.*left out")
def test_shapenet_part_is_read_as_downloaded(shapenet):
    config = from_dict(shapenet_sections())
    loaded, _ = data.load(config, config.data.test, shapenet)
    assert [scene.category for scene in loaded] == [0, 0, 1, 1]
    for scene in loaded:
        assert len(scene.full) == 400 and np.linalg.norm(scene.full, axis=1).max() == pytest.approx(1)
        assert {*scene.full_labels} == ({0, 1, 2, 3}, {4, 5, 6, 7})[scene.category]
        along = scene.full[:, 0 if scene.category == 0 else 2]
        assert (np.diff(scene.full_labels[np.argsort(along)]) >= 0).all()
    with pytest.warns(UserWarning, match=r"train_file_list\.json: 12 objects; left out: objects of no class \(1\)"):
        data.load(config, config.data.train, shapenet)
    batch = batches.make_batch(config.net(), loaded, data.Columns(config.widths, {}, {}),
                               [batches.whole_scene(loaded, number) for number in (2, 0)])  # fmt: skip
    assert batch.categories == [1, 0] and (batch.features[:, 0] == 1).all()
    np.testing.assert_array_equal(batch.features[:, 1:], batch.pyramid[0].points)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("02691156/test0.txt", "0 0 0 1 0 0 2\n1 0 0 1 0 0 12\n",
         r"test0\.txt: expected the part labels 0 1 2 3 of Airplane, got 12 for point 1"),
        ("02691156/test0.txt", "0 0 0 1 0 0 2\n0 0 0 1 0 0 1\n", "expected an object of a size above 0, got 2 points"),
        ("02691156/test0.txt", "0 0 0 1 0 0\n1 0 0 1 0 0\n", "has 6 columns, got 7 names"),
        (SPLIT, "[1, 2]", "expected a list of names such as"),
        (SPLIT, "[", r"shuffled_test_file_list\.json: Expecting value"),
        (SPLIT, '["shape_data/9/a"]', "expected a category of synset.*, got 9"),
        (SPLIT, '["shape_data/02691156/a"]', r"02691156/a\.txt: No such file"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*left out")
def test_folders_that_are_refused(shapenet, name, text, message):
    (shapenet / name).write_text(text)
    config = from_dict(shapenet_sections())
    with pytest.raises(ReadError, match=message) as error:
        data.load(config, config.data.test, shapenet)
    assert "\n" not in str(error.value)


# ---- training


@pytest.mark.parametrize("network", [{}, {"deformable": 1}])
def test_a_run_that_goes_on_is_the_same_to_the_bit(tmp_path, network, monkeypatch):
    config = from_dict(sections(network=network))
    check_resumed(config, tmp_path, [(0, 2)], monkeypatch)


def test_an_object_trains_its_head_alone(tmp_path):
    run = training.Training(from_dict(sections()), tmp_path, ".")
    mugs = [batches.whole_scene(run.scenes, number) for number in range(3)]
    batch = batches.make_batch(run.model.net, run.scenes, run.model.columns, mugs)
    _, grads = run._gradients(batch, seed=0)
    for name, grad in grads.items():
        if name.startswith("heads."):
            assert grad.any() == name.startswith("heads.0."), name


def test_labels_are_those_of_the_nearest_points_and_of_the_category(tmp_path):
    run = training.Training(from_dict(sections()), tmp_path, ".")
    for votes in (1, 2):
        shares = [*voting.whole_probabilities(run.model, run.test_scenes, votes)]
        labels = [*labelling.classes_of(run.model, run.test_scenes, votes)]
        for scene, share, label in zip(run.test_scenes, shares, labels, strict=True):
            columns = run.model.net.head_columns[list(SOME)[scene.category]]
            assert share.shape == (len(scene.points), 8) and label.shape == (len(scene.full),)
            np.testing.assert_allclose(share[:, columns].sum(axis=1), 1, atol=1e-5)
            nearest = ((scene.full[:, None] - scene.points) ** 2).sum(axis=2).argmin(axis=1)
            np.testing.assert_array_equal(label, share.argmax(axis=1)[nearest])
        (alone,) = voting.whole_probabilities(run.model, run.test_scenes[:1], 1)
        if votes == 1:
            np.testing.assert_allclose(shares[0], alone, atol=1e-5)
        else:
            assert abs(shares[0] - alone).max() > 1e-4
    matrix, scores = labelling.evaluate_scores(run.model, run.test_scenes)
    assert matrix.sum() == 400 * len(run.test_scenes) == scores["points"]


# ---- commands


@pytest.mark.filterwarnings("always:.*left out")
def test_train_test_and_segment(command, shapenet, tmp_path):
    parts = shapenet_sections()
    (tmp_path / "a.toml").write_text("".join(
        f"[{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in values.items())
        for name, values in parts.items()
    ))  # fmt: skip
    code, out, err = command("train", tmp_path / "a.toml", "--data", shapenet, "--out", tmp_path / "run")
    assert code == 0 and err.count("left out") == err.count("\n") == 2
    means = re.search(r"instance mIoU ([\d.]+), class mIoU ([\d.]+) \| IoU Airplane [\d.]+, Chair [\d.]+", out)
    assert float(means[1]) > 0.7
    model = tmp_path / "run" / "best.safetensors"
    code, out, _ = command("test", model, "--data", shapenet)
    assert code == 0 and out.startswith(f"1,600 labelled: {means[0]}")
    assert re.search(r"category  objects     mIoU\n +Airplane +2 +0\.\d+\n +Chair +2 +0\.\d+\n", out)

    points = np.random.default_rng(9).uniform(-1, 1, (300, 3)) * [0.3, 0.3, 0.9]
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    rows = "".join("{} {} {}\n".format(*point) for point in points + 7)
    (tmp_path / "chair.ply").write_text(f"ply\nformat ascii 1.0\nelement vertex 300\n{axes}end_header\n{rows}")
    words = ["segment", model, tmp_path / "chair.ply", "--out", tmp_path / "out.ply"]
    code, out, err = command(*words, "--category", "Chair")
    assert (code, err) == (0, "")
    labels = read(tmp_path / "out.ply").labels
    assert {*labels} <= {*LABELS["Chair"]} and (labels == 12 + np.floor((points[:, 2] + 0.9) / 0.45)).mean() > 0.7
    for more, message in (
        ([], "--category: expected one of Airplane, Chair, got None"),
        (["--category", "Bag"], "--category: expected one of Airplane, Chair, got Bag"),
    ):
        code, out, err = command(*words, *more)
        assert (code, out) == (2, "") and message in err
    for words in (["erf", model, "a.npz"], ["features", model, "a.npz"], ["predict", model, "a.npz"]):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and re.search("expected a network of (scenes, objects or digits|objects)", err)


def toml(value):
    """A value as TOML, whose inline tables differ from JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def test_a_network_of_scenes_takes_no_category(command, tmp_path):
    parts = {
        "data": {"train": [{"indoor": 0, "points": 3000}], "classes": {"a": [0, 1], "b": [2]}},
        "network": {"voxel_size": 0.3, "levels": 2, "width": 8},
    }
    run = training.Training(from_dict(parts), tmp_path, ".")
    run._save("model.safetensors", {})
    np.savez(tmp_path / "a.npz", points=shapes("mug", 0, 50).points)
    code, out, err = command("segment", tmp_path / "model.safetensors", tmp_path / "a.npz", "--out", tmp_path / "b.npz",
                             "--category", "mug")  # fmt: skip
    assert (code, out) == (2, "") and "--category: expected none for a network without parts, got mug" in err
