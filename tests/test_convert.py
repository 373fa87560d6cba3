"""The command convert: one conversion for each client, what commands make of its results, and what it refuses."""

import json
import os
import re

import numpy as np
import pytest
from test_published import GEOTRANSFORMER, GOLDEN, KPCONVX, OPEN3D_ML, PREDATOR, case, classifier_of_kpconvx, published

import kpcore as kp
from kpcore import nn
from kpcore.pipeline import conversion
from kpcore.pipeline.training import Model

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")


def saved(path, state, entry, **more):
    """A checkpoint with arrays as tensors in an entry, as training scripts write it."""
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 7, entry: tensors, "optimizer": {"lr": 0.01}} | more, path)
    return path


def toml(values):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def parameters_of(name, **more):
    """The parameters.txt of a recorded network of KPConv-PyTorch."""
    with np.load(GOLDEN / f"network_{name}.npz") as golden:
        config = [str(line).replace("=", " = ") for line in golden["config"]]
        lines = ["# -----#", "", f"architecture = {' '.join(golden['architecture'])}"]
    lines += [
        *config,
        "epoch_steps = None",
        "lr_decay_epochs = 1:0.98 2:0.5",
        "class_w =",
        "augment_symmetries = 1 0 0",
    ]
    return "\n".join([*lines, *(f"{name} = {value}" for name, value in more.items()), ""])


def run_of_kpconv_pytorch(folder, name="kpfcnn", criterion=True, **more):
    """A checkpoint in the folder of a run, with its parameters.txt above."""
    with np.load(GOLDEN / f"network_{name}.npz") as golden:
        state = {key[6:]: golden[key] for key in golden if key.startswith("state/")}
    if criterion:
        state["criterion.weight"] = np.ones(6, np.float32)
    path = saved(folder / "Log_1" / "checkpoints" / "chkp_0007.tar", state, "model_state_dict", saving_path="Log_1")
    (folder / "Log_1" / "parameters.txt").write_text(parameters_of(name, **more))
    return path


def assert_same_network(path, expected):
    """The arrays of a file are those that were imported; returns what else it holds."""
    net, params, state, more = nn.load(path)
    assert net == expected[0]
    for got, values in ((params, expected[1]), (state, expected[2])):
        assert got.keys() == values.keys()
        assert all(np.array_equal(got[name], value) for name, value in values.items())
    return more


# ---- one conversion for each client


def test_a_checkpoint_of_kpconv_pytorch(tmp_path, command, monkeypatch):
    """The settings lie in the folder above the checkpoint."""
    path = run_of_kpconv_pytorch(tmp_path, dataset="S3DIS", in_radius="1.200", use_batch_norm=1, modulated=0)
    monkeypatch.chdir(path.parent)
    code, out, err = command("convert", "chkp_0007.tar", "--from", "kpconv-pytorch", "--out", tmp_path / "net.st")
    assert (code, err) == (0, "")
    net, params, state, *_ = published("kpfcnn")
    more = assert_same_network(tmp_path / "net.st", (net, params, state))
    assert more["converted"] == {"from": "kpconv-pytorch", "file": "chkp_0007.tar"}
    assert out.splitlines() == [
        f"{tmp_path / 'net.st'}: Network of KPConv-PyTorch, {nn.count(params):,} parameters, 4 levels, "
        "voxel size 0.03, 4 input features",
        "6 classes: class 0, class 1, class 2, class 3, class 4, class 5",
        f"settings: {path.parent.parent / 'parameters.txt'}",
        "not converted: num_batches_tracked, criterion.weight",
        "kpcore segment: can use it",
    ]
    model = Model.load(tmp_path / "net.st")
    assert (model.settings.data.features, model.settings.training.radius) == (["one", "color"], 1.2)
    assert model.columns.widths == {"one": 1, "color": 3}
    columns = model.columns.features(np.zeros((1, 3)), {"color": np.array([[0, 51, 255]])})
    np.testing.assert_allclose(columns, [[1, 0, 0.2, 1]])


def test_a_checkpoint_of_open3d_ml(tmp_path, command):
    yaml = pytest.importorskip("yaml")
    state = case("open3d-ml").state_dict
    path = saved(tmp_path / "ckpt_00100.pth", state, "model_state_dict", scheduler_state_dict={"last_epoch": 3})
    model = OPEN3D_ML | {
        "name": "KPFCNN",
        "in_radius": 1.5,
        "lbl_values": [0, 1, 2, 3, 4, 5],
        "ignored_label_inds": [0],
    }
    settings = {"dataset": {"name": "Toronto3D", "class_weights": [1, 2]}, "model": model, "pipeline": {"in_radius": 9}}
    (tmp_path / "net.yml").write_text(yaml.safe_dump(settings))
    code, out, err = command(
        "convert", path, "--from", "open3d-ml", "--config", tmp_path / "net.yml", "--out", tmp_path / "net"
    )
    assert (code, err) == (0, "")
    more = assert_same_network(tmp_path / "net", nn.import_open3d_ml(state, OPEN3D_ML))
    assert more["names"] == ["class 1", "class 2", "class 3", "class 4", "class 5"]
    assert "not converted: num_batches_tracked\n" in out
    assert "kpcore segment: cannot use it: features: expected the names of the 3 columns of its input" in out
    assert command("segment", tmp_path / "net", "a.ply", "--out", "b.ply")[2].endswith(
        "got one of kpcore convert, which says what is missing for segment and predict\n"
    )
    # A further file names the classes and the columns of the input.
    names = ["none", "road", "marking", "nature", "building", "line"]
    table = toml({str(label): name for label, name in enumerate(names)})
    (tmp_path / "more.toml").write_text(f'features = ["one", "height", "intensity"]\n[label_to_names]\n{table}')
    config = ("--config", tmp_path / "net.yml", "--config", tmp_path / "more.toml")
    code, out, _ = command("convert", path, "--from", "open3d-ml", *config, "--out", tmp_path / "net")
    assert code == 0
    assert "5 classes: road, marking, nature, building, line\n" in out
    assert f"settings: {tmp_path / 'net.yml'}, {tmp_path / 'more.toml'}\n" in out
    model = Model.load(tmp_path / "net")
    assert model.settings.data.classes == {"road": [1], "marking": [2], "nature": [3], "building": [4], "line": [5]}
    assert (model.settings.training.radius, model.net.logits_slope) == (1.5, 0.1)


@pytest.mark.parametrize("name", ["kpconvx", "kpconvd"])
def test_a_checkpoint_of_kpconvx(tmp_path, command, name):
    state = case(name).state_dict
    path = saved(tmp_path / "run" / "checkpoints" / "current_chkp.tar", state, "model_state_dict")
    config = KPCONVX | {"kp_mode": name, "inv_grp_norm": True}
    data = ("init_sub_size", "dim")
    settings = {
        "data": {key: config[key] for key in data} | {
            "name": "S3DIR", "label_and_names": [[0, "ceiling"], [1, "floor"], [2, "wall"], [3, "beam"], [4, "column"],
                                                 [5, "nothing"]], "ignored_labels": [5]},
        "model": {key: value for key, value in config.items() if key not in data},
        "train": {"in_radius": 2.1, "lr": 0.005}, "test": {"in_radius": 100.0},
        "augment_test": {"scale": [0.99, 1.01], "chromatic_norm": True, "height_norm": False},
    }  # fmt: skip
    (tmp_path / "run" / "parameters.json").write_text(json.dumps(settings))
    code, out, err = command("convert", path, "--from", "kpconvx", "--out", tmp_path / "net")
    assert (code, err) == (0, "")
    assert_same_network(tmp_path / "net", nn.import_kpconvx(state, config))
    assert "5 classes: ceiling, floor, wall, beam, column\n" in out
    assert out.endswith("kpcore segment: can use it\n")
    model = Model.load(tmp_path / "net")
    assert (model.settings.network.kind, model.settings.training.radius) == ("kpnext", 2.1)
    assert model.settings.data.features == ["one", "color", "height"]
    got = model.columns.features(np.zeros((1, 3)), {"color": np.array([[0, 255, 127.5]]), "height": np.array([3.0])})
    expected = [1, -0.5136457 / 0.18308958, (1 - 0.49523646) / 0.18415008, (0.5 - 0.44921124) / 0.19252081, 3]
    np.testing.assert_allclose(got, [expected], rtol=1e-6)
    # What the published layer has but does not use.
    settings["model"]["inv_grp_norm"] = False
    (tmp_path / "run" / "parameters.json").write_text(json.dumps(settings))
    code, out, _ = command("convert", path, "--from", "kpconvx", "--out", tmp_path / "net")
    assert code == 0
    assert ("not converted: num_batches_tracked, grpnorm\n" in out) == (name == "kpconvx")


def test_a_checkpoint_of_geotransformer(tmp_path, command):
    state = {f"backbone.{name}": value for name, value in case("geotransformer").state_dict.items()}
    state |= {"transformer.embedding.proj_d.weight": np.zeros((4, 4)), "optimal_transport.alpha": np.zeros(())}
    path = saved(tmp_path / "geotransformer-3dmatch.pth.tar", state, "model", iteration=3)
    (tmp_path / "backbone.toml").write_text("[backbone]\n" + toml(GEOTRANSFORMER) + "[train]\nbatch_size = 1\n")
    code, out, err = command("convert", path, "--from", "geotransformer", "--config", tmp_path / "backbone.toml",
                             "--out", tmp_path / "net")  # fmt: skip
    assert (code, err) == (0, "")
    one = case("geotransformer")
    assert_same_network(tmp_path / "net", (one.net, one.params, one.state))
    assert "8 channels for each point of level 1\n" in out
    assert "not converted: transformer, optimal_transport\n" in out
    assert out.endswith("kpcore segment: cannot use it: its output is a descriptor, not a class\n")


def test_a_checkpoint_of_predator(tmp_path, command):
    one = case("predator")
    path = saved(tmp_path / "snapshot" / "checkpoints" / "model_best_loss.pth", one.state_dict, "state_dict",
                 best_loss=np.float64(0.25), best_recall=np.float32(1.0), scheduler={})  # fmt: skip
    (tmp_path / "snapshot" / "config.json").write_text(json.dumps(PREDATOR | {"exp_dir": "indoor", "gpu_mode": True}))
    code, out, err = command("convert", path, "--from", "predator", "--out", tmp_path / "net")
    assert (code, err) == (0, "")
    assert_same_network(tmp_path / "net", (one.net, one.params, one.state))
    assert "10 channels for each point of level 0\n" in out
    assert "not converted: epsilon, bottle, gnn, proj_gnn, proj_score\n" in out


def test_a_classifier(tmp_path, command):
    path = run_of_kpconv_pytorch(tmp_path, "kpcnn", criterion=False, dataset="ModelNet40")
    code, out, _ = command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "net")
    assert code == 0
    assert "kpcore predict: cannot use it: features: expected the names of the 4 columns of its input" in out
    (tmp_path / "more.toml").write_text('features = ["one", "local"]\n')
    config = ("--config", path.parents[1] / "parameters.txt", "--config", tmp_path / "more.toml")
    code, out, _ = command("convert", path, "--from", "kpconv-pytorch", *config, "--out", tmp_path / "net")
    assert code == 0
    assert out.endswith("kpcore predict: can use it\n")
    np.savez(tmp_path / "object.npz", points=np.random.default_rng(0).random((400, 3)))
    code, out, err = command("predict", tmp_path / "net", tmp_path / "object.npz")
    assert (code, err) == (0, "")
    assert re.fullmatch(r".*object\.npz: class \d 0\.\d+\n", out)
    path = saved(tmp_path / "x.tar", classifier_of_kpconvx(), "model_state_dict")
    (tmp_path / "x.toml").write_text(toml(KPCONVX | {"kp_mode": "kpconvd", "features": ["one", "local"]}))
    code, out, _ = command(
        "convert", path, "--from", "kpconvx", "--config", tmp_path / "x.toml", "--out", tmp_path / "net"
    )
    assert code == 0
    assert "kpcore predict: cannot use it: features: expected some with 5 columns together, got ['one', 'local']" in out


def test_a_converted_network_labels_a_scan(tmp_path, command):
    """kpcore segment gives the logits of the network on the features that the client makes."""
    path = run_of_kpconv_pytorch(tmp_path, dataset="S3DIS", in_radius="0.6")
    assert command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "net")[0] == 0
    rng = np.random.default_rng(0)
    points, colors = rng.random((3000, 3)) * 0.4, rng.integers(0, 256, (3000, 3)).astype(np.uint8)
    np.savez(tmp_path / "scan.npz", points=points, colors=colors, labels=np.zeros(3000, np.int32))
    code, _, err = command("segment", tmp_path / "net", tmp_path / "scan.npz", "--out", tmp_path / "labelled.npz",
                           "--method", "potentials")  # fmt: skip
    assert (code, err) == (0, "")
    with np.load(tmp_path / "labelled.npz") as file:
        labels = file["labels"]
    net, params, state, *_ = published("kpfcnn")
    points = points.astype(np.float32)
    inputs = np.concatenate([np.ones((3000, 1)), colors / 255], axis=1).astype(np.float32)
    sub = kp.grid_subsample(points, net.voxel_size, features=inputs, origin=net.origin)
    levels = net.pyramid(sub.points, subsampled=True)
    expected = net(kp, params, state, levels, sub.features).logits.argmax(axis=1)
    nearest = kp.knn_search(sub.points, points, 1).index
    # Spheres of the command have fewer points at their borders, and grids with other origins.
    assert len(np.unique(expected)) > 1
    assert (labels == expected[nearest]).mean() > 0.7


# ---- what is refused


@pytest.fixture
def refused(command, tmp_path):
    """Run convert, which must fail and write nothing: (last line of standard error, the lines before it)."""

    def run(path, client, *more):
        out = tmp_path / "refused.safetensors"
        before = sorted(tmp_path.iterdir())
        code, printed, err = command("convert", path, "--from", client, *more, "--out", out)
        assert (code, printed) == (2, "")
        assert sorted(tmp_path.iterdir()) == before
        *lines, last = err.splitlines()
        assert last.startswith("kpcore: ")
        return last.removeprefix("kpcore: "), lines

    return run


def test_arrays_that_do_not_fit_are_listed(tmp_path, refused):
    path = run_of_kpconv_pytorch(tmp_path)
    settings = path.parents[1] / "parameters.txt"
    text = settings.read_text()
    settings.write_text(text.replace("in_features_dim = 4", "in_features_dim = 5"))
    last, lines = refused(path, "kpconv-pytorch")
    assert last == (f"{path}, settings of {settings}: state_dict: expected the arrays of KPConv-PyTorch with these "
                    "settings, got 1 other shape; nothing is written")  # fmt: skip
    assert lines == ["other shape: encoder_blocks.0.KPConv.weights: expected (15, 5, 8), got (15, 4, 8)"]
    settings.write_text(text.replace("simple resnetb resnetb_strided resnetb", "simple resnetb resnetb_strided"))
    last, lines = refused(path, "kpconv-pytorch")
    assert re.search(r"got \d+ missing, \d+ other shape, \d+ left over; nothing is written$", last)
    counts = [int(number) for number in re.findall(r"(\d+) (?:missing|other|left)", last)]
    assert len(lines) == sum(counts)
    kinds = np.repeat(["missing", "other shape", "left over"], counts)
    assert [line.split(":")[0] for line in lines] == kinds.tolist()
    # The code is another one.
    for client, config, words in (
        ("geotransformer", GEOTRANSFORMER, "expected names of GeoTransformer, got those of KPConv-PyTorch, such as"),
        ("predator", PREDATOR, "expected names of Predator, got those of KPConv-PyTorch"),
        ("kpconvx", KPCONVX, "expected names of KPConvX (ml-kpconvx), got those of KPConv-PyTorch"),
    ):
        (tmp_path / "config.toml").write_text(toml(config))
        last, lines = refused(path, client, "--config", tmp_path / "config.toml")
        assert words in last
        assert last.endswith("use kpcore.nn.import_kpconv_pytorch (--from kpconv-pytorch)")
        assert not lines
    path = saved(tmp_path / "gnn.pth", case("predator").state_dict, "state_dict")
    assert refused(path, "kpconv-pytorch")[0].endswith("use kpcore.nn.import_predator (--from predator)")


def test_missing_settings_are_named(tmp_path, refused):
    path = run_of_kpconv_pytorch(tmp_path)
    settings = path.parents[1] / "parameters.txt"
    settings.write_text("num_classes = 6\nfirst_subsampling_dl = 0.03\n")
    assert refused(path, "kpconv-pytorch")[0] == (
        f"{path}, settings of {settings}: config: expected architecture, conv_radius, KP_extent, got none"
    )
    lines = [line for line in parameters_of("kpfcnn").splitlines() if "deform_radius" not in line]
    settings.write_text("\n".join(lines))
    assert refused(path, "kpconv-pytorch")[0].endswith("config: expected deform_radius, got none")
    settings.unlink()
    assert refused(path, "kpconv-pytorch")[0] == (
        f"{path}, settings of no parameters.txt beside it or above: config: expected architecture, "
        "first_subsampling_dl, conv_radius, KP_extent, got none"
    )
    path = saved(tmp_path / "a.pth", case("open3d-ml").state_dict, "model_state_dict")
    assert refused(path, "open3d-ml")[0].endswith(
        "settings of no --config: config: expected architecture, first_subsampling_dl, conv_radius, KP_extent, got none"
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "x = ", r"a\.toml: .*"), ("a.json", "[1]", r"a\.json: expected settings by name, got list"),
        ("a.json", "{", r"a\.json: "), ("a.txt", "num_classes 3", r"a\.txt: line 1: expected name = value, got 'num_c"),
        ("a.yml", "a: [", r"a\.yml: "),
        ("a.yml", "!!python/object/apply:os.system [ls]", r"a\.yml: .*could not determine a constructor"),
        ("a.yaml", "x: 1", r"a\.yaml: expected settings of KPConv-PyTorch, got a yml file, as Open3D-ML has \(--from"),
        ("a.ini", "x", r"a\.ini: expected parameters\.txt or a file ending in \.yml, .* or \.json, got '\.ini'"),
        ("a.toml", 'label_to_names = ["a"]', "label_to_names: expected a name for each label, got"),
        ("a.toml", '[label_to_names]\n0 = "a"\n1 = "b"', "label_to_names, ignored_labels: expected 6 classes, .* 2"),
        ("a.toml", "[label_to_names]\n" + "".join(f'{i} = "a"\n' for i in range(6)), "expected a different name"),
        ("a.toml", 'conv_radius = "wide"', "conv_radius: expected a number, got str"),
        ("a.toml", "architecture = [1, 2]", r"architecture: expected a list or tuple of str, got \[1, 2\]"),
        ("a.toml", "first_features_dim = [8]", "first_features_dim: expected an integer, got list"),
        ("a.toml", "[model]\nKP_extent = 9.0", r"a\.toml: expected settings outside of tables, got \[model\]"),
        ("a.toml", 'ignored_labels = "12"', "ignored_labels: expected a list of labels, got '12'"),
        ("a.toml", "label_values = [0.5, 1.5]", "label_values: expected a list of integers, got"),
        ("a.toml", 'use_batch_norm = "no"', "config: expected use_batch_norm 0 or 1, got 'no'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read(tmp_path, refused, name, text, message):
    path = run_of_kpconv_pytorch(tmp_path)
    (tmp_path / name).write_text(text)
    configs = ("--config", tmp_path / name)
    if name.endswith(".yml"):
        assert re.search(message, refused(path, "open3d-ml", *configs)[0])
    else:
        settings = ("--config", path.parents[1] / "parameters.txt")
        assert re.search(message, refused(path, "kpconv-pytorch", *settings, *configs)[0])


def test_settings_of_another_client_or_none(tmp_path, refused):
    path = run_of_kpconv_pytorch(tmp_path)
    settings = path.parents[1] / "parameters.txt"
    assert refused(path, "open3d-ml", "--config", settings)[0] == (
        f"{settings}: expected settings of Open3D-ML, got a parameters.txt of KPConv-PyTorch"
    )
    assert refused(path, "kpconv-pytorch", "--config", tmp_path / "none.toml")[0].startswith(
        f"{tmp_path / 'none.toml'}: No"
    )
    assert refused(path, "kpconv-pytorch", "--config", tmp_path)[0] == f"{tmp_path}: is not a regular file"


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmful",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_execute_code(tmp_path, refused, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.tar"
    torch.save({"model_state_dict": {}, "more": Harmful()}, path, _use_new_zipfile_serialization=zipped)
    last = refused(path, "kpconv-pytorch")[0]
    assert last == (
        f"{path}: expected a checkpoint of arrays and numbers, got one that needs {os.system.__module__}.system, which "
        "could execute code; if it is trusted, load it with the code that wrote it and save its arrays alone"
    )
    assert not (tmp_path / "harmful").exists()


def test_files_that_are_no_checkpoint(tmp_path, refused):
    path = run_of_kpconv_pytorch(tmp_path)
    whole = path.read_bytes()
    broken = tmp_path / "broken.tar"
    for data in (whole[: len(whole) // 2], whole[:-30], b"", b"hello world", b"PK\3\4" + bytes(50)):
        broken.write_bytes(data)
        assert refused(broken, "kpconv-pytorch")[0].startswith(
            f"{broken}: is damaged, or no file that torch.save wrote ("
        )
    assert refused(tmp_path / "none.tar", "kpconv-pytorch")[0] == f"{tmp_path / 'none.tar'}: No such file or directory"
    assert refused(tmp_path, "kpconv-pytorch")[0] == f"{tmp_path}: is not a regular file"
    for value, words in ((torch.zeros(3), "expected a dict with model_state_dict, got Tensor"),
                         ({"epoch": 3}, "expected a dict with model_state_dict, got epoch"),
                         ({}, "expected a dict with model_state_dict, got an empty one")):  # fmt: skip
        torch.save(value, broken)
        assert refused(broken, "kpconv-pytorch")[0] == f"{broken}: {words}"


def test_arrays_without_an_entry_and_numbers_of_old_numpy(tmp_path, command):
    one = case("predator")
    (tmp_path / "config.toml").write_text(toml(PREDATOR))
    config = ("--config", tmp_path / "config.toml")
    tensors = {name: torch.from_numpy(value) for name, value in one.state_dict.items()}
    torch.save(tensors, tmp_path / "bare.pth")
    assert command("convert", tmp_path / "bare.pth", "--from", "predator", *config, "--out", tmp_path / "net")[0] == 0
    path = tmp_path / "old.pth"
    torch.save({"state_dict": tensors, "best_loss": np.float64(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core.multiarray" in data
    path.write_bytes(data)
    assert command("convert", path, "--from", "predator", *config, "--out", tmp_path / "net")[0] == 0


def test_where_it_is_written(tmp_path, command, refused):
    path = run_of_kpconv_pytorch(tmp_path)
    whole = path.read_bytes()
    code, _, err = command("convert", path, "--from", "kpconv-pytorch", "--out", path)
    assert (code, path.read_bytes()) == (2, whole)
    assert err == f"kpcore: {path}: expected a file other than {path}, which is read and never overwritten\n"
    settings = path.parents[1] / "parameters.txt"
    whole = settings.read_bytes()
    code, _, err = command("convert", path, "--from", "kpconv-pytorch", "--out", settings)
    assert (code, settings.read_bytes()) == (2, whole)
    assert "which is read and never overwritten" in err
    code, _, err = command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "none" / "net")
    assert (code, err) == (2, f"kpcore: {tmp_path / 'none' / 'net'}: there is no folder {tmp_path / 'none'}\n")
    # An existing file is replaced, as by other commands; but not if the checkpoint is refused.
    (tmp_path / "net").write_text("before")
    (tmp_path / "empty.toml").write_text("")
    code, *_ = command(
        "convert", path, "--from", "kpconv-pytorch", "--config", tmp_path / "empty.toml", "--out", tmp_path / "net"
    )
    assert (code, (tmp_path / "net").read_text()) == (2, "before")
    assert command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "net")[0] == 0
    assert nn.load(tmp_path / "net")[0].num_classes == 6
    assert command("convert", path, "--from", "other", "--out", tmp_path / "net")[0] == 2


def test_without_torch(tmp_path, refused, monkeypatch):
    path = run_of_kpconv_pytorch(tmp_path)
    original = conversion.require

    def require(module, extra):
        return original(module if module != "torch" else "torch_that_is_not_installed", extra)

    monkeypatch.setattr(conversion, "require", require)
    assert refused(path, "kpconv-pytorch")[0].endswith('is not installed: pip install "kpcore[torch]"')


def test_a_center_for_each_column(tmp_path, command):
    path = run_of_kpconv_pytorch(tmp_path, dataset="S3DIS", in_radius="1.2")
    assert command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "net")[0] == 0
    net, params, state, about = nn.load(tmp_path / "net")
    for name, value in (("center", [0.0, 1.0]), ("scale", [1.0, 2.0, 0.0]), ("scale", [1.0, 2.0, "3"]), ("center", [])):
        columns = about["columns"] | {name: {"color": value}}
        nn.save(tmp_path / "other", net, params, state, **about | {"columns": columns})
        with pytest.raises(ValueError, match=rf"other: columns: expected a finite number as {name} of color, got \["):
            Model.load(tmp_path / "other")


def test_what_torch_may_load_stays_as_it_was(tmp_path, command):
    import kpcore.torch  # noqa: F401 - which lets torch load lists and pyramids

    before = torch.serialization.get_safe_globals()
    path = run_of_kpconv_pytorch(tmp_path)
    assert command("convert", path, "--from", "kpconv-pytorch", "--out", tmp_path / "net")[0] == 0
    assert set(torch.serialization.get_safe_globals()) == set(before)
