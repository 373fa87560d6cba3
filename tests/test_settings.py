"""Settings: which names and values are allowed, what is said about others, and the page that lists all of them."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_training import TOML, settings_dict

import kpcore as kp
from kpcore.io import ReadError
from kpcore.pipeline import data, sections, settings
from kpcore.pipeline.settings import SettingsError, from_dict

DIGITS = {"images": "a", "labels": "b"}
DOCS = Path(__file__).parents[1] / "docs"


def test_settings_and_their_defaults():
    config = from_dict(settings_dict())
    assert config.names == ("flat", "upright", "thing") and not config.digits
    net = config.net()
    assert (net.num_features, net.num_classes, net.width, net.kernel_size) == (5, 3, 8, 5)
    assert config.training.rotate == "vertical" and config.training.workers == 2
    assert from_dict(json.loads(json.dumps(config.asdict()))) == config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"training": {"speed": 3}}, r"\[training\] speed: unknown setting; known are radius"),
        (
            {"training": {"epoch": 3}},
            r"\[training\] epoch: unknown setting; did you mean epochs\? known are radius",
        ),
        ({"training": {"radius": "2"}}, r"\[training\] radius: expected float, got '2'"),
        ({"training": {"radius": 0}}, r"\[training\] radius: expected 1e-09 to 1e\+09, got 0\.0"),
        ({"training": {"optimizer": "lion"}}, r"\[training\] optimizer: expected sgd or adamw, got 'lion'"),
        ({"training": {"rotate": "sideways"}}, r"\[training\] rotate: expected vertical, all, none, or degrees"),
        ({"training": {"scale": [1.1, 0.9]}}, r"\[training\] scale"),
        ({"training": {"flip": [1]}}, r"\[training\] flip: expected list\[bool\]"),
        ({"network": {"width": 30}}, r"\[network\] width: expected a multiple of 4, got 30"),
        ({"network": {"upsample": "linear"}}, r"\[network\] upsample: expected nearest or kpconv, got 'linear'"),
        ({"training": {"kernel_points_lr": -1}}, r"\[training\] kernel_points_lr: expected 0 to 1000, got -1\.0"),
        ({"network": {"hue": 3}}, r"\[network\] .*hue"),
        ({"network": {"kind": "unet"}}, r"\[network\] kind: expected kpconv or kpnext, got 'unet'"),
        ({"network": {"kind": "kpnext"}}, r"\[network\] levels: not valid for kpnext"),
        ({"data": {"train": []}}, r"\[data\] train: expected a list of files, got \[\]"),
        (
            {"data": {"train": [{"file": "a.las", "indoor": 1}]}},
            r"train\[0\]: expected either file or indoor, got both",
        ),
        ({"data": {"train": [{}]}}, r"train\[0\]: expected either file or indoor, got neither"),
        (
            {"data": {"test": [{"images": "a", "labels": "b"}]}},
            r"\[data\] train, test, validation: expected either scenes or digits",
        ),
        ({"data": {"classes": {"a": [1]}}}, r"\[data.classes\]: expected 2 to 10,000 classes, got 1"),
        ({"data": {"classes": {"a": [1], "b": [1]}}}, r"\[data.classes\] b: expected labels that no other class has"),
        ({"data": {"classes": {"a": [1], "b": ["x"]}}}, r"\[data.classes\] b: expected a list of integers"),
        ({"data": {"features": []}}, r"\[data\] features: expected at least one"),
        ({"data": {"features": ["one", "Echo", "echo"]}}, r"\[data\] features: expected at least one, each once"),
        ({"data": {"features": ["value"]}}, r"\[data\] features: value is only valid for digits"),
        ({"data": {"train": [{"file": "a.las", "min": [0.0] * 4}]}}, r"train\[0\] min: expected up to 3 coordinates"),
        ({"data": {"train": [DIGITS]}}, r"\[data\] train, test, validation: expected either scenes or digits"),
        (
            {"data": {"train": [DIGITS], "test": []}},
            r"\[data\] features: .* for digits, got (color|height)",
        ),
        (
            {"data": {"train": [DIGITS], "test": [], "features": ["one"]}},
            r"classes, label and columns are not allowed for digits",
        ),
        (
            {"data": {"train": [DIGITS | {"first": 3, "last": 3}]}},
            r"train\[0\] first, last: expected 0 <= first < last",
        ),
        ({"data": {"train": [DIGITS | {"first": -3}]}}, r"train\[0\] first, last: expected 0 <= first < last, got"),
        ({"training": {"vote_radius": 0.1}}, r"\[training\] vote_radius: expected 0\.2 to 1, got 0\.1"),
        ({"training": {"vote_radius": 1.1}}, r"\[training\] vote_radius: expected 0\.2 to 1, got 1\.1"),
        ({"training": {"votes": 0}}, r"\[training\] votes: expected 1 to 1,000, got 0"),
        ({"training": {"rotate": -1}}, r"\[training\] rotate: expected vertical, all, none, or degrees from 0 to 180"),
        ({"training": {"scale": [0.9, float("inf")]}}, r"\[training\] scale: expected the smallest and largest factor"),
        ({"training": {"flip": [True] * 4}}, r"\[training\] flip: expected up to 3 axes, got \[True"),
        (
            {"training": {"scale": [1e9, 1e9]}},
            r"\[training\] scale: expected the smallest and largest factor, from 0\.01",
        ),
        ({"training": {"momentum": 1.0}}, r"\[training\] momentum: expected 0 to 0\.99999, got 1\.0"),
        ({"network": {"dimension": 2}}, r"\[network\] dimension: cannot be set"),
        ({"network": {"options": 3}}, r"\[network\] options: expected a table of settings, got 3"),
        ({"network": {"slope": "x"}}, r"\[network\] slope: expected a number, got str"),
        ({"network": {"segment": False}}, r"\[network\] segment: unknown setting"),
        (
            {"data": {"train": [{"file": "a.las", "mirror": True}]}},
            r"train\[0\] points, mirror: only valid together with indoor",
        ),
        (
            {"data": {"train": [{"file": "a.las", "points": 3}]}},
            r"train\[0\] points, mirror: only valid together with indoor, got a file",
        ),
        ({"network": {"dropout": 1.5}}, r"\[network\] dropout: expected 0 to 1, got 1\.5"),
        ({"network": {"conv_radius": -1.0}}, r"\[network\] conv_radius: expected"),
        *[
            ({"training": {name: wrong}}, rf"\[training\] {name}: expected {bounds}, got {got}")
            for name, bounds, wrongs in (
                ("radius", r"1e-09 to 1e\+09", (1e30, 1e-30, 0, float("nan"), float("inf"))),
                ("batch_points", "1 to 10,000,000", (10**9, 0)),
                ("batch_clouds", "1 to 10,000", (10**9, 0)),
                ("epochs", "1 to 10,000", (10**9, 2**63 - 1)),
                ("steps", "1 to 100,000", (10**9,)),
                ("lr", r"1e-12 to 1e\+06", (1e30, 0, float("nan"))),
                ("weight_decay", "0 to 1000", (1e30, -1)),
                ("lr_decay", "1e-06 to 1", (10.0, 0)),
                ("lr_decay_epochs", r"0\.001 to 1e\+06", (1e30, 0)),
                ("offset_lr", "0 to 1000", (1e30,)),
                ("clip_value", r"0 to 1e\+09", (1e30,)),
                ("clip_norm", r"0 to 1e\+09", (1e30,)),
                ("noise", r"0 to 1e\+09", (1e30, -1.0, float("nan"))),
                ("votes", "1 to 1,000", (10**9,)),
                ("validate", "1 to 10,000", (10**9, 0)),
                ("workers", "0 to 256", (10**9, -1)),
            )
            for wrong in wrongs
            for got in (re.escape(str(float(wrong) if "e" in bounds or "1000" in bounds else wrong)),)
        ],
        ({"training": {"radius": 10**400}}, r"\[training\] radius: expected float, got 1000.*\.\.\.$"),
        pytest.param(
            {"training": {"steps": 0xF << 20_000}},
            r"\[training\] steps: expected .*, got an integer of too many digits",
            marks=pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="Python before 3.10.7"),
        ),
        ({"network": {"voxel_size": 1e30}}, r"\[network\] voxel_size: expected 1e-09 to 1e\+09, got 1e\+30"),
        (
            {"network": {"width": 10**9}},
            r"\[network\] width: expected at most 16384 channels on any level, got 2000000000",
        ),
        ({"network": {"levels": 10**9}}, r"\[network\] levels: expected 1 to 16, got 1000000000"),
        ({"network": {"convs": 10**9}}, r"\[network\] convs: expected 2 to 64, got 1000000000"),
        ({"network": {"deformable": 10**9}}, r"\[network\] deformable: expected 0 to \d+, got 1000000000"),
        ({"network": {"kernel_size": 10**9}}, r"\[network\] kernel_size: expected 1 to 100, got 1000000000"),
        ({"network": {"conv_radius": 1e30}}, r"\[network\] conv_radius: expected 1e-06 to 100, got 1e\+30"),
        ({"network": {"slope": 1e30}}, r"\[network\] slope: expected -1 to 1, got 1e\+30"),
        (
            {"data": {"train": [{"indoor": 0, "points": 10**12}]}},
            r"train\[0\] points: expected 1 to 100,000,000, got 10+",
        ),
        ({"data": {"train": [{"indoor": -1}]}}, r"train\[0\] indoor: expected 0 to 2,147,483,647, got -1"),
        ({"data": {"train": [{"file": "a", "max": [float("nan")]}]}}, r"train\[0\] max: expected up to 3 coordinates"),
        ({"data": {"classes": {"a": [1], "b": [2**31]}}}, r"\[data.classes\] b: expected 32-bit integers, got"),
        (
            {"data": {"columns": ["x", "y"]}},
            r"\[data\] columns: expected at least x y z, each name once, got \['x', 'y'\]",
        ),
        ({"data": {"columns": [*"xyzz"]}}, r"\[data\] columns: expected at least x y z, each name once"),
        ({"data": {"columns": "x y z"}}, r"\[data\] columns: expected list\[str\] \| None, got 'x y z'"),
        ({"wind": {"a": 1}}, "expected the sections data, network, training and blocks, got wind too"),
    ],
)
def test_settings_that_are_refused(more, message):
    sections = settings_dict()
    for name, values in more.items():
        sections[name] = sections.get(name, {}) | values
    with pytest.raises(SettingsError, match=message):
        from_dict(sections)


def test_files_that_are_not_settings(tmp_path):
    with pytest.raises(SettingsError, match=r"missing.toml: No such file"):
        settings.read_settings(tmp_path / "missing.toml")
    for name, text in (("a", b"[data"), ("b", b"\xff\xfe"), ("c", b"[data]\ntrain = 3")):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(SettingsError, match=str(tmp_path / name)):
            settings.read_settings(tmp_path / name)


def test_settings_files_of_any_editor(tmp_path):
    path, text = tmp_path / "a.toml", "# Gebäude" + TOML
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert settings.read_settings(path).names == ("flat", "upright")
    for content, message in (
        (text.encode("utf-16"), "expected UTF-8, as of any TOML file, got UTF-16: save it as UTF-8"),
        (b"\xfe\xff" + text.encode("utf-16-be"), "got UTF-16"),
        (text.encode("utf-16-le"), "got UTF-16"),
        (text.encode("latin-1"), "expected text in UTF-8, got byte 0xe4 at 5"),
        (b"a = " + 100_000 * b"[", "nested too deep"),
        (b"a = " + 5000 * b"9", "4300 digits" if hasattr(sys, "set_int_max_str_digits") else ""),
        (b"data = 3", r"\[data\]: expected a table of settings, got 3"),
        (b"network = 3\n" + text.split("[network]")[0].encode(), r"\[network\]: expected a table of settings, got 3"),
        (bytes(2**24 + 1), "expected a TOML file of at most 16,777,216 bytes, got 16,777,217"),
    ):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=rf"a\.toml: .*{message}"):
            settings.read_settings(path)
    with pytest.raises(SettingsError, match="is not a regular file"):
        settings.read_settings(tmp_path)


# ---- what was probably meant

SCENES = {"data": {"train": ["a.las"], "test": ["b.las"], "classes": {"ground": [2], "building": [6]}},
          "network": {"voxel_size": 0.5}}  # fmt: skip
OBJECTS = {"data": {"train": [{"folder": "a"}], "kind": "objects", "classes": ["chair", "lamp"]},
           "network": {"voxel_size": 0.05}}  # fmt: skip
KPNEXT = SCENES | {"network": {"voxel_size": 0.5, "kind": "kpnext"}}
# For each table: (settings without errors, where it is in them, its keys, how errors call it)
TABLES = {
    "data": (SCENES, ["data"], sections.keys(sections.Data), "[data]"),
    "scene": (SCENES, ["data", "train", 0], sections.keys(sections.Part), "[data] train[0]"),
    "objects": (OBJECTS, ["data", "train", 0], sections.keys(sections.Objects), "[data] train[0]"),
    "ground": (SCENES, ["data", "ground"], sections.keys(sections.Ground), "[data.ground]"),
    "surface": (SCENES, ["data", "surface"], sections.keys(sections.Surface), "[data.surface]"),
    "network": (SCENES, ["network"], sections.keys(sections.Architecture), "[network]"),
    "kpconv": (SCENES, ["network"], sections.OPTIONS["kpconv"], "[network]"),
    "kpnext": (KPNEXT, ["network"], sections.OPTIONS["kpnext"], "[network]"),
    "training": (SCENES, ["training"], sections.keys(sections.Training), "[training]"),
    "blocks": (SCENES, ["blocks"], sections.keys(sections.Blocks), "[blocks]"),
}


def with_value(config, path, value):
    """A copy of settings in which a value is set."""
    config = json.loads(json.dumps(config))
    if path[:2] == ["data", "train"] and isinstance(config["data"]["train"][0], str):
        config["data"]["train"][0] = {"file": config["data"]["train"][0]}
    at = config
    for name in path[:-1]:
        at = at.setdefault(name, {}) if isinstance(at, dict) else at[name]
    at[path[-1]] = value
    return config


def refusal(config):
    with pytest.raises(SettingsError) as refused:
        from_dict(config)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("table", TABLES)
def test_every_misspelt_name_is_told_with_the_right_one(table):
    config, path, keys, where = TABLES[table]
    for name in keys:
        middle = len(name) // 2
        typos = {name[:middle] + name[middle + 1 :], name[0] + name[1:].replace("_", "-"), name.upper(), name + "s"}
        for typo in typos - keys.keys() - {name, "label", "val"}:
            if len(name) < 4 and typo != name.upper():
                continue  # lr without a letter is nothing
            message = refusal(with_value(config, [*path, typo], 1))
            begin = re.escape(f"{where} {typo}: unknown setting; ")
            told = re.match(begin + r"(?:did you mean (\w+)\?|it is)", message)
            assert told and told[1] in (name, *(one for one in keys if typo in keys[one].also)), message


@pytest.mark.parametrize("table", TABLES)
def test_every_name_of_other_code_is_told_with_the_right_one(table):
    config, path, keys, _ = TABLES[table]
    for name, key in keys.items():
        for other in key.also:
            message = refusal(with_value(config, [*path, other], 1))
            assert f"did you mean {name}?" in message or "it is a setting of" in message, (name, other, message)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["data", "voxel_size"], r"\[data\] voxel_size: unknown setting; it is a setting of \[network\]; known are tr"),
        (["training", "halo"], r"\[training\] halo: unknown setting; it is a setting of \[blocks\]; known"),
        (["data", "radius"], r"it is a setting of \[data.surface\], \[network\] and \[training\]; known"),
        (["training", "wdith"], r"did you mean width of \[network\]\? known are radius"),
        (["network", "in_radius"], r"did you mean radius of \[training\]\?"),
        (["network", "depths"], r'it is a setting of \[network\] with kind = "kpnext"; known'),
        (["network", "options", "slop"], r"\[network\] slop: unknown setting; did you mean slope\?"),
        (["data", "train", 0, "imagse"], r"train\[0\] imagse: unknown setting; did you mean images of digits\?"),
        (["data", "train", 0, "folder"], r'folder: unknown setting; it is a setting of kind = "objects" or "parts"; '),
        (["data", "train", 0, "label"], r"label: unknown setting; it is a setting of \[data\]; known are file"),
        (["training", "zzz"], r"\[training\] zzz: unknown setting; known are radius"),
        (["training", "a\nb"], r"\[training\] a\\nb: unknown setting; known are radius"),
        (["trainig"], r"expected the sections data, network, training and blocks, got trainig too; did you mean "
                      r"\[training\]\?$"),
        (["Network "], r"got Network  too; did you mean \[network\]\?$"),
        (["classes"], r"got classes too; did you mean \[data.classes\]\?$"),
        (["epochs"], r"got epochs too; epochs: it is a setting of \[training\]$"),
        (["qqq"], r"got qqq too$"),
    ],
)  # fmt: skip
def test_names_of_other_tables(path, message):
    assert re.search(message, refusal(with_value(SCENES, path, 1)))


def test_a_misspelt_name_comes_before_what_is_missing():
    assert "did you mean train?" in refusal({"data": {"trian": ["a"]}})
    assert "did you mean voxel_size?" in refusal(SCENES | {"network": {"voxel_sise": 1.0}})


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["training", "optimizer"], "adamW", r"optimizer: expected sgd or adamw, got 'adamW'; did you mean adamw\?$"),
        (["training", "sampling"], "regualr", r"got 'regualr'; did you mean regular\?$"),
        (["training", "rotate"], "vertikal", r"got 'vertikal'; did you mean vertical\?$"),
        (["data", "kind"], "object", r"kind: expected scenes, digits, objects or parts, got 'object'; did you mean ob"),
        (["data", "ignore"], ["witheld"], r"got 'witheld'; did you mean withheld\?$"),
        (["data", "may_be_empty"], ["grond"], r"got 'grond'; there are ground, building; did you mean ground\?$"),
        (["data", "colors"], {"bulding": "#000000"}, r"got 'bulding'; .*; did you mean building\?$"),
        (["network", "kind"], "kpnxt", r"kind: expected kpconv or kpnext, got 'kpnxt'; did you mean kpnext\?$"),
        (["network", "norm"], "bacth", r"norm: expected batch, group or instance, got 'bacth'; did you mean batch\?$"),
        (["network", "influence"], "liner", r"got 'liner'; did you mean linear\?$"),
        (["data", "classes", "building"], 6, r"building: expected a list of integers, got 6, such as \[6\]"),
        (["data", "classes", "label"], "x", r"got 'x'; as a setting of \[data\] it stands before the line \[data.cl"),
        (["data", "ground"], [2], r"\[data\] ground: expected a table, .* their labels stand in \[data.classes\]"),
    ],
)  # fmt: skip
def test_values_that_are_nearly_right(path, value, message):
    assert re.search(message, refusal(with_value(SCENES, path, value)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [("intensty", "did you mean Intensity?"), ("heigth", "did you mean height?"),
     ("planrity", "did you mean planarity?"), ("temperature", "there are labels x y z Intensity")],
)  # fmt: skip
def test_features_that_are_misspelt(tmp_path, name, advice):
    columns = ["x", "y", "z", "Intensity"]
    np.savez(tmp_path / "a.npz", points=np.rec.fromarrays(np.ones((4, 5)), names=columns), labels=np.arange(5) % 2)
    config = from_dict(SCENES | {"data": SCENES["data"] | {"train": ["a.npz"], "features": ["one", name]}})
    with pytest.raises(ReadError) as refused:
        data.read_cloud(config, tmp_path / "a.npz")
    assert str(refused.value).endswith(advice) and str(refused.value).count("did you mean") <= 1


def test_a_setting_after_the_line_of_the_classes(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(TOML.replace("upright =", "ignore = [7]\nupright ="))
    with pytest.raises(SettingsError, match=r"\[data.classes\] ignore: .* stands before the line \[data.classes\]"):
        settings.read_settings(path)
    saved = {"train": ["a.las"], "classes": {"ignore": [7], "ground": [2]}}  # of a checkpoint: its names stay valid
    assert from_dict(SCENES | {"data": saved}).names == ("ignore", "ground")


# ---- the reference page


def test_every_option_of_the_networks_is_a_setting():
    not_options = {"architecture", "num_features", "num_classes", "voxel_size", "dimension", "width", "heads",
                   "segment", "bottleneck_width"}  # fmt: skip
    for kind, network, more in (("kpconv", kp.nn.Network, set()), ("kpnext", kp.nn.KPNeXt, {"size", "attention"})):
        assert sections.OPTIONS[kind].keys() == {one.name for one in fields(network)} - not_options | more


@pytest.mark.parametrize("table", TABLES)
def test_every_example_is_a_value(table):
    config, path, keys, _ = TABLES[table]
    for name, key in keys.items():
        value = settings.toml_parser().loads(f"a = {key.example}")["a"]
        changed = with_value(config, [*path, name], value)
        if name in ("indoor", "points", "mirror") and table == "scene":
            changed["data"]["train"][0] = {"indoor": 0, name: value}
        if name in ("list", "shapes") or name == "number":
            changed["data"]["train"][0].pop("folder")
            changed["data"]["train"][0].setdefault("list" if name == "list" else "shapes", 0)
            changed["data"]["classes"] = ["chair", "table"]
        if name == "folds":
            changed["data"] |= {"train": ["Area_1/a.ply", "Area_2/b.ply"], "test": []}
        if name == "kind" and table == "data":
            changed = with_value(OBJECTS, [*path, name], value)
        if name in ("may_be_empty",):
            changed["data"]["classes"]["bridge"] = [17]
        if name == "kind" and table == "network":
            changed["network"].pop("levels", None)
        from_dict(changed)


def test_the_page_of_settings_is_that_of_their_types(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.delitem(sys.modules, "settings", raising=False)
    import settings as writer

    assert (DOCS / "settings.md").read_text(encoding="utf-8") == writer.page(), "run python docs/settings.py"
    for *_, section in writer.TABLES:
        assert all(f"| `{one.name} = " in writer.page() for one in fields(section))
