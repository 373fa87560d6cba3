"""Curves of a training, and its report: what they hold, what they leave out, and that names are no markup."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from kpcore import cli, visualization
from kpcore.nn import checkpoints
from kpcore.pipeline import curves, report, training
from kpcore.pipeline.settings import from_dict

TAGS = "<b>&\"'wall"  # a name that would be markup
NAMES = ("ceiling", "floor", TAGS, "<script>alert(1)</script>")


def step(epoch, number, loss=1.0, **more):
    return {"epoch": epoch, "step": number, "loss": loss, "entropy": loss, "lr": 0.01, "points": 100,
            "seconds": 0.5, "waited": 0.01} | more  # fmt: skip


def scores(miou, iou=None, **more):
    return {"miou": miou, "accuracy": 0.5, "iou": {"a": miou, "b": None} if iou is None else iou,
            "class_accuracy": {"a": 0.1, "b": 0.2}} | more  # fmt: skip


def log_of(tmp_path, *entries, tail=b""):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries) + tail)
    return path


# ---- curves


def test_the_log_is_read(tmp_path):
    entries = [step(0, 0), step(0, 1), {"epoch": 1, "test": scores(0.3), "seconds": 2.0}, step(1, 0)]
    log = curves.read_log(log_of(tmp_path, *entries, tail=b'{"epoch": 1, "st'))  # of a process that was killed
    assert [entry["step"] for entry in log.steps] == [0, 1, 0] and log.tests == []
    assert log.validations == [(1, scores(0.3), 2.0)]
    # With validation data, the test data choose nothing.
    entries += [{"epoch": 1, "validation": scores(0.4)}, {"epoch": 2, "validation": scores(0.2), "test": scores(0.9)}]
    log = curves.read_log(log_of(tmp_path, *entries))
    assert [one.scores["miou"] for one in log.validations] == [0.4, 0.2] and log.best(False).epoch == 1
    assert [one.scores["miou"] for one in log.tests] == [0.3, 0.9] and log.validations[0].seconds is None
    for wrong in (
        b"{\n",
        b"[1]\n",
        b'{"epoch": 1}\n',
        b'{"epoch": "a", "step": 1, "loss": 2}\n',
        b'{"epoch": 1, "test": 3}\n',
    ):
        (tmp_path / "log.jsonl").write_bytes(wrong + json.dumps(step(0, 0)).encode() + b"\n")
        with pytest.raises(ValueError, match=r"log.jsonl: line 1: expected a log entry of a training"):
            curves.read_log(tmp_path / "log.jsonl")


def test_the_best_validation():
    def log(*values, **more):
        return curves.Log(
            [step(0, 0)], [curves.Validation(i, scores(v, **more), 1.0) for i, v in enumerate(values)], []
        )

    assert log(0.1, 0.5, 0.5, 0.2).best(False).epoch == 1 and log().best(False) is None
    assert log(None, 0.2).best(False).epoch == 1 and log(None).best(False) is None
    one = log(0.1, 0.5)
    one.validations[0].scores["accuracy"] = 0.8
    assert one.best(True).epoch == 0


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_panels_of_curves():
    validations = [curves.Validation(e, scores(e / 10), 1.0) for e in (1, 2)]
    plain = curves.figure(curves.Log([step(0, i) for i in range(9)], validations, []))
    assert titles(plain) == ["loss: entropy of the classes", "learning rate", "validation", "a", "b"]
    assert plain.axes[2].get_title(loc="right") == "best 0.200, epoch 2"
    notes = [axes.get_title(loc="right") for axes in plain.axes[3:]]
    assert notes == ["0.20", "–"]  # b has no points
    regularized = [step(0, i, loss=2.0, entropy=1.5, regularization=0.5) for i in range(9)]
    figure = curves.figure(curves.Log(regularized, [], []))
    assert titles(figure) == ["loss", "entropy of the classes", "learning rate"]
    assert [figure.axes[i].get_title(loc="right") for i in range(2)] == ["last 2", "last 1.5"]
    classified = curves.figure(curves.Log([step(0, 0)], validations, []), classifies=True)
    assert [axes.get_title(loc="right") for axes in classified.axes[3:]] == ["0.10", "0.20"]
    assert classified.axes[2].get_title(loc="right") == "best 0.500, epoch 1"


def test_curves_show_the_numbers_of_the_log():
    losses = np.exp(-np.linspace(0, 3, 2000)) + 0.1 * np.random.default_rng(0).random(2000)
    steps = [step(i // 200, i % 200, loss=loss, lr=1e-3 * i) for i, loss in enumerate(losses)]
    validations = [curves.Validation(e, scores(e / 20), 1.0) for e in range(1, 11)]
    tests = [curves.Validation(10, scores(0.45), 1.0)]
    loss, rate, validation, a, b = curves.figure(curves.Log(steps, validations, tests)).axes
    x, y = loss.lines[0].get_data()
    np.testing.assert_allclose(y, [losses[round(200 * at) - 33 : round(200 * at)].mean() for at in x])  # running means
    assert x[-1] == 10 and len(x) == 400 and loss.get_yscale() == "log"
    np.testing.assert_allclose(rate.lines[0].get_data()[1][[0, -1]], [0, 1.999])
    miou = next(line for line in validation.lines if line.get_label() == "mIoU")
    np.testing.assert_allclose(miou.get_data(), [range(1, 11), np.arange(1, 11) / 20])
    test = next(line for line in validation.lines if line.get_label() == "mIoU of the test")
    assert test.get_data()[0] == [10] and test.get_data()[1] == [0.45]
    np.testing.assert_allclose(a.lines[0].get_data()[1], np.arange(1, 11) / 20)
    assert np.isnan(b.lines[0].get_data()[1]).all()


@pytest.mark.parametrize("classes", [2, 9, 14])
def test_curves_of_many_classes(classes, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "_MOST_CLASSES", 13)
    iou = {f"class ${i}$": 0.5 for i in range(classes)}
    log = curves.Log([step(0, 0, loss=0.0)], [curves.Validation(1, scores(0.5, iou), 1.0)], [])
    figure = curves.figure(log, theme="dark")
    assert len(figure.axes) == 3 + min(classes, 13) and figure.axes[0].get_yscale() == "linear"  # of a loss of 0
    boxes = np.array([axes.get_position().extents for axes in figure.axes])
    assert boxes.min() > 0 and boxes.max() < 1
    apart = [(one[2:] <= other[:2]).any() or (other[2:] <= one[:2]).any()
             for i, one in enumerate(boxes) for other in boxes[:i]]  # fmt: skip
    assert all(apart)  # no panels overlap
    assert ("the first 13 of 14 classes" in figure.texts[0].get_text()) == (classes == 14)
    if classes == 9:
        figure.savefig(tmp_path / "a.png")


def test_curves_of_a_run_without_steps(tmp_path):
    log_of(tmp_path)
    curves.curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


# ---- report


def sections(**training_settings):
    return {
        "data": {
            "train": [{"indoor": 1, "points": 6000}], "test": [{"indoor": 2, "points": 4000}],
            "classes": {name: [number] for number, name in enumerate(NAMES)}, "features": ["one", "height"],
            "colors": {"floor": "#123456"},
        },
        "network": {"voxel_size": 0.25, "levels": 2, "width": 4},
        "training": {"radius": 2.0, "batch_points": 1500, "epochs": 2, "steps": 2, "validate": 1, "workers": 0}
        | training_settings,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a & <b>"
    training.Training(from_dict(sections()), folder, ".").run()
    return folder


@pytest.fixture
def no_curves(monkeypatch):
    """Empty figures in place of curves, which take a second."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(curves, "figure", lambda *_, **__: Figure((1, 1)))


def copied(run, tmp_path, change=None, name="last.safetensors"):
    """A copy of a run; `change` gets the header of a checkpoint of it."""
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    if change:
        groups, about = checkpoints.read(tmp_path / "run" / name)
        change(about)
        checkpoints.write(tmp_path / "run" / name, groups, about)
    return tmp_path / "run"


class Page(HTMLParser):
    """The text of a page by section, its images, and what it would load; an error for tags that do not match."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.images, self.loads, self.tags = [], {}, [], [], set()
        self.at = "head"
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        if tag == "section":
            self.at = values["id"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.images.append((self.at, values["class"], values["src"], values["alt"]))
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "section":
            self.at = "end"

    def handle_data(self, data):
        self.text[self.at] = self.text.get(self.at, "") + data + "\n"

    def lines(self, section):
        return [line for line in self.text[section].split("\n") if line]


def test_a_report_of_a_run(run, tmp_path):
    path = report.write(run)
    assert path == run / "report.html"
    page = Page(path)
    # It loads nothing, and no name is markup.
    assert all(value.startswith(("data:image/", "#")) for value in page.loads) and "{{" not in page.source
    assert not {"script", "b>", "link", "iframe"} & page.tags and "@import" not in page.source
    assert "url(" not in page.source
    assert "Training a & <b>" in page.text["head"]
    for section in ("scores", "confusion", "settings"):
        assert {*NAMES} <= {line.removeprefix("classes.") for line in page.lines(section)}, section
    # What was not asked for.
    assert "--data DIR" in page.text["features"]
    assert "--data DIR" in page.text["pictures"]
    model = training.Model.load(run / "best.safetensors")
    result = checkpoints.read(run / "best.safetensors")[1]["result"]
    results = checkpoints.read(run / "last.safetensors")[1]["run"]["results"]
    shown = [result, *([results[-1]] if result["epoch"] < 2 else [])]  # the best and the last validation
    cells = re.findall(r'title="[^"]*: ([\d,]+)"', page.source)
    expected = [value for one in shown for row in one["confusion"] for value in row if value]
    assert [int(cell.replace(",", "")) for cell in cells] == expected
    assert f"{result['miou']:.3f}" in page.text["head"] and f"{result['miou']:.4f}" in page.text["scores"]
    assert "#123456" in page.source  # the colour in the settings
    assert f"{sum(value.size for value in model.params.values()):,}" in page.text["head"]
    settings = page.lines("settings")
    folded = "".join(re.findall("<details>.*?</details>", page.source))
    assert 'changed">epochs<' in page.source and ">epochs<" not in folded and ">lr<" in folded
    assert settings[settings.index("epochs") + 1 :][:2] == ["2", "20"]  # value and default
    assert "[training]: " in page.text["settings"] and settings[settings.index("lr") + 1 :][:2] == ["0.01", "0.01"]
    assert "2 of 2" in page.text["times"] and "2 × validation" in page.text["times"]
    assert any("chosen by the test data" in line for line in page.lines("warnings"))
    # Curves for both kinds of pages, of the same content every time.
    assert [(at, kind) for at, kind, _, _ in page.images] == [
        (at, kind) for at in ("curves", "features") for kind in ("of-dark", "of-light")
    ]
    for _, _, source, words in page.images:
        svg = base64.b64decode(source.partition("base64,")[2]).decode()
        assert svg.rstrip().endswith("</svg>") and words
    assert report.write(run, tmp_path / "b.html").read_text() == page.source


@pytest.mark.usefixtures("no_curves")
def test_recorded_parts_of_a_report(run, tmp_path):
    points = {"ceiling": 50, "floor": 20_000, TAGS: 1000, NAMES[3]: 99}
    histogram = {"quantiles": [], "edges": [0.0, 1.0, 3.0], "counts": [0, 1, 3, 4]}

    def record(about):
        about["classes"] = {"train": {name: {"points": n, "files": 7} for name, n in points.items()},
                            "test": {"floor": {"points": 321_000, "files": 1},
                                     "ceiling": {"points": 150, "files": 1}}}  # fmt: skip
        about["statistics"] = {
            "features": {TAGS: histogram, "height": histogram, "none": {"edges": [0, 1], "counts": [0, 0, 0]}},
            "neighbors": [21.25, 8.5], "points_per_voxel": 1.234, "spacing": 0.5, "points": 54321,
            "unit": [0.3048, None], "class_shares": {},
        }  # fmt: skip
        about["warnings"] = ["97 % of <intensity> lies beyond"]
        about["run"]["epoch"] = 1

    page = Page(report.write(copied(run, tmp_path, record)))
    lines = page.lines("classes")
    at = lines.index("floor")
    assert lines[at + 1 : at + 7] == ["20,000", "95", "7", "321,000", "99.9", "1"]
    assert re.findall(r'<td class="few">([^<]*)</td>', page.source) == ["50", "150", "–", "99", "–"]
    lines = page.lines("features")
    assert lines[1:9:2] == ["points and neighbours", "points", "points per voxel", "spacing of points"]
    assert lines[2:10:2] == ["train", "54,321", "1.23", "0.5"]
    assert lines[9:15] == [
        "metres per unit of x and y", "0.3048", "neighbours on level 0", "21.2", "neighbours on level 1", "8.5"
    ]  # fmt: skip
    assert [at for at, *_ in page.images] == ["curves"] * 2 + ["features"] * 2
    warnings = page.text["warnings"]
    assert "97 % of <intensity> lies beyond" in warnings and "1 of 2 epochs are done" in warnings
    assert f"Few points in train, less than 100 or 0.1 %: ceiling, {NAMES[3]}." in warnings


@pytest.mark.parametrize("statistics", [
    None, 3, [], {}, {"features": None, "neighbors": None}, {"features": {"a": None}, "unit": [None, None]},
    {"features": {"b": {"edges": [1, 0], "counts": [2, 1, 1]}}, "neighbors": [None]},
    {"features": {"a": {"edges": [0, 1, 2], "counts": [2]}}, "points": None},
])  # fmt: skip
def test_statistics_that_say_nothing_are_left_out(run, statistics):
    read = report._read(run)
    read = read._replace(about=read.about | {"statistics": statistics, "classes": statistics})
    assert "not recorded by this version" in report._features_section(read, None)
    assert "not recorded by this version" in report._classes_section(read)


def test_histograms():
    edges, density, beyond = report._histogram({"edges": [0, 1, 3], "counts": [1, 4, 3, 2]})
    np.testing.assert_allclose(density, [0.4, 0.15])
    assert beyond == pytest.approx(0.3) and edges.tolist() == [0, 1, 3]


@pytest.mark.usefixtures("no_curves")
def test_a_report_with_a_test_after_the_training(run, tmp_path):
    folder = copied(run, tmp_path)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    entries = [{"validation" if name == "test" else name: value for name, value in one.items()} for one in entries]
    entries.append({"epoch": 2, "test": scores(0.4321, {"floor": 0.8765}), "seconds": 1.0})
    log_of(folder, *entries)
    page = Page(report.write(folder))
    assert "0.432" in page.text["head"] and "0.876" in page.text["scores"] and "IoU in the test" in page.text["scores"]
    assert "chosen by the test data" not in page.text["warnings"]


@pytest.mark.usefixtures("no_curves")
def test_a_report_of_what_is_left(run, tmp_path):
    """Without the log, without the best or the last checkpoint."""
    folder = copied(run, tmp_path)
    (folder / "log.jsonl").unlink()
    (folder / "last.safetensors").unlink()
    page = Page(report.write(folder))
    assert "no steps in log.jsonl" in page.text["curves"] and "no steps" in page.text["times"]
    assert "best validation" in page.text["confusion"]
    shutil.copy(run / "last.safetensors", folder)
    (folder / "best.safetensors").unlink()
    assert "last validation" in Page(report.write(folder)).text["confusion"]


@pytest.mark.usefixtures("no_curves")
def test_pictures_of_test_scenes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_PANEL", 120)
    page = Page(report.write(run, tmp_path / "a.html", data=tmp_path))
    lines = page.lines("features")
    at = lines.index("points and neighbours")
    assert lines[at : at + 6] == ["points and neighbours", "train", "test", "points", "6,000", "4,000"]
    (_, dark, one, words), (_, light, other, _) = (image for image in page.images if image[0] == "pictures")
    assert (dark, light) == ("of-dark", "of-light") and one != other and words.startswith("indoor 2: ")
    for source in (one, other):
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_curves")
def test_a_report_of_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(visualization, "PANEL", (120, 90))
    objects = {
        "data": {"kind": "objects", "train": [{"shapes": 0, "number": 2, "points": 300}],
                 "test": [{"shapes": 90, "number": 1, "points": 300}], "classes": ["chair", "table"]},
        "network": {"voxel_size": 0.2, "levels": 2, "width": 4},
        "training": {"batch_points": 2000, "epochs": 1, "steps": 1, "workers": 0},
    }  # fmt: skip
    training.Training(from_dict(objects), tmp_path / "run", ".").run()
    page = Page(report.write(tmp_path / "run", data="."))
    assert [at for at, *_ in page.images] == ["curves"] * 2 + ["pictures"] * 2
    assert "accuracy after epoch 1 of 1" in page.text["head"] and "objects" in page.lines("scores")


@pytest.mark.usefixtures("no_curves")
def test_the_command(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path / 'a.html'}\n"
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


@pytest.mark.usefixtures("no_curves")
def test_runs_that_are_refused(run, tmp_path, capsys):
    def refused(folder, *more):
        assert cli.main(["report", str(folder), *map(str, more)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    assert "expected the folder of a run, got none" in refused(tmp_path / "no")
    assert "got a file" in refused(run / "log.jsonl")
    (tmp_path / "empty").mkdir()
    assert "expected last.safetensors or best.safetensors of kpcore train, got neither" in refused(tmp_path / "empty")
    shutil.copytree(run, tmp_path / "folds" / "Area_1")
    assert f"that of several, such as {tmp_path / 'folds' / 'Area_1'}" in refused(tmp_path / "folds")
    folder = copied(run, tmp_path, lambda about: about.pop("settings"))
    assert "last.safetensors: expected a file that kpcore train wrote" in refused(folder)
    (folder / "last.safetensors").write_bytes(b"no")
    assert "last.safetensors: is damaged" in refused(folder)
    shutil.copy(run / "last.safetensors", folder)
    (folder / "log.jsonl").write_text("no\n{}\n")
    assert "log.jsonl: line 1: expected a log entry" in refused(folder)
    assert "there is no folder" in refused(run, "--out", tmp_path / "no" / "a.html")
    assert not (folder / "report.html").exists()
