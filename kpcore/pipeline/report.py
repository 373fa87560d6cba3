"""The report of a training: one HTML page with its settings, data, curves, scores, pictures, warnings and times.

The page loads nothing, opens from any folder, and follows the light or dark setting of its reader. It is made of what
`kpcore.pipeline.training` writes to the folder of a run; a part that the run has not recorded is left out with a line
that says so.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import tempfile
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore import picture
from kpcore.config import require
from kpcore.console import classes_in_mean
from kpcore.files import check_writable, replacing
from kpcore.nn import checkpoints
from kpcore.pipeline import classification, curves, labelling, segmentation, statistics, voting
from kpcore.pipeline.class_table import FEWEST_POINTS, LEAST_SHARE
from kpcore.pipeline.colors import class_colors
from kpcore.pipeline.data import load
from kpcore.pipeline.folds import FOLDS
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict
from kpcore.pipeline.training import BEST, LAST
from kpcore.visualization import filled

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from kpcore.nn.checkpoints import Arrays
    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.settings import Settings, Source
    from kpcore.pipeline.voting import Scores

__all__ = ["REPORT", "write"]

REPORT = "report.html"
_MOST_PICTURES, _PANEL = 4, 640  # scenes with a picture, and the width of its panels in pixels
_MOST_OBJECTS = 200  # that are classified, of which 20 are drawn
_MOST_COUNTED = 16  # classes of a confusion matrix with numbers besides shares in its cells
_MISSING = '<p class="missing">not recorded by this version</p>'
_SPLITS = ("train", "validation", "test")


def write(run: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *,
          data: str | os.PathLike[str] | None = None) -> Path:  # fmt: skip
    """Write the report of a run.

    Parameters
    ----------
    run : str or Path
        The folder that a training wrote; with ``last.safetensors``, ``best.safetensors`` or both.
    out : str or Path, optional
        The page; by default ``report.html`` in that folder.
    data : str or Path, optional
        The folder of the data files. With it the best network, or else the last one, labels up to four of the test
        scenes (those of the validation if there are none), and the report has a picture of each, and their features
        beside those of the training.

    Returns
    -------
    Path
        That of the page.

    Raises
    ------
    ValueError
        The folder has no run, or files of it are damaged.
    OSError
        The page cannot be written.

    Examples
    --------
    >>> from kpcore.pipeline import report
    >>> report.write("runs/scans")  # doctest: +SKIP
    PosixPath('runs/scans/report.html')
    """
    folder = Path(run)
    out = folder / REPORT if out is None else Path(out)
    read = _read(folder)
    check_writable(out)  # before the pictures
    tested = None if data is None else _tested(read, data)
    page = filled(Path(__file__).with_name("report.html"), _page(read, tested))
    with replacing(out) as part:
        part.write_text(page, encoding="utf-8")
    return out


class _Run(NamedTuple):
    """What the files of a run say."""

    folder: Path
    settings: Settings
    about: dict[str, Any]  #: of the last checkpoint; of the best one if there is no last
    params: Arrays
    best: Result | None
    last: Result | None
    test: Result | None  #: of the best network on the test data, after the last epoch, if another part chose it
    log: curves.Log | None

    @property
    def epochs_done(self) -> int | None:
        return _at(self.about, "run", "epoch")

    def recorded(self, *names: str) -> Any:
        """An entry of the checkpoint; None unless it is there."""
        return _at(self.about, *names)


class Result(NamedTuple):
    """The confusion matrix of a validation and its scores."""

    epoch: int
    confusion: np.ndarray
    scores: Scores


class _Tested(NamedTuple):
    """Test data of a run, read for pictures, and how their distribution differs from that of the training."""

    model: Model
    parts: Sequence[Source]
    scenes: list[Scene]
    statistics: dict[str, Any] | None
    differences: list[str]


def _tested(run: _Run, data: str | os.PathLike[str]) -> _Tested:
    settings = run.settings
    validation = settings.data.validation if isinstance(settings.data.validation, list) else []
    parts = (settings.data.test or validation)[: _MOST_PICTURES if settings.data.kind == "scenes" else None]
    model = Model.load(run.folder / (BEST if (run.folder / BEST).is_file() else LAST))
    if not parts:
        return _Tested(model, [], [], None, [])
    scenes = load(settings, parts, data, model.columns)[0]
    if model.statistics is None or settings.whole:
        return _Tested(model, parts, scenes, None, [])
    clouds = [scene.cloud for scene in scenes]
    observed = statistics.Observed(model.columns, model.statistics)
    observed.add_scenes(model.net, scenes, model.block_size.side)
    spacing = float(np.median([statistics.spacing_of(scene.full) for scene in scenes]))
    seen = observed.statistics(spacing, statistics.unit_of(clouds))
    return _Tested(model, parts, scenes, seen.asdict(), statistics.differences(model.statistics, seen))


def _at(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _read(folder: Path) -> _Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of a run, got {'a file' if folder.exists() else 'none'}")
    names = [name for name in (LAST, BEST) if (folder / name).is_file()]
    if not names:
        if (folder / FOLDS).is_file() or any((one / LAST).is_file() for one in folder.iterdir() if one.is_dir()):
            one = next((one.name for one in sorted(folder.iterdir()) if (one / LAST).is_file()), "FOLD")
            raise ValueError(f"{folder}: expected the folder of one run, got that of several, such as {folder / one}")
        raise ValueError(f"{folder}: expected {LAST} or {BEST} of kpcore train, got neither")
    files = {name: checkpoints.read(folder / name) for name in names}
    groups, about = files[names[0]]
    with checkpoints.errors_name(folder / names[0]):
        if "settings" not in about:
            raise ValueError("expected a file that kpcore train wrote, got one without its settings")
        settings = from_dict(about["settings"])
        results = [_result(one) for one in _at(about, "run", "results") or ()]
    best = test = None
    if BEST in files:
        with checkpoints.errors_name(folder / BEST):
            chosen, tested = (files[BEST][1].get(name) for name in ("result", "test"))
            best, test = _result(chosen) if chosen else None, _result(tested) if tested else None
    log = curves.read_log(folder / curves.LOG) if (folder / curves.LOG).is_file() else None
    return _Run(folder, settings, about, groups.get("params", {}), best, results[-1] if results else None, test, log)


def _result(described: Mapping[str, Any]) -> Result:
    scores = {name: value for name, value in described.items() if name not in ("epoch", "confusion")}
    confusion = np.array(described["confusion"], np.int64)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"confusion: expected a square matrix, got {confusion.shape}")
    return Result(int(described["epoch"]), confusion, scores)


# ---- the page


def _page(run: _Run, tested: _Tested | None) -> dict[str, str]:
    sections: dict[str, str] = {
        "Warnings": _warnings_section(run, tested),
        "Scores": _scores_section(run),
        "Confusion": _confusion_section(run),
        "Curves": _curves_section(run),
        "Classes": _classes_section(run),
        "Features": _features_section(run, tested),
        "Pictures": _pictures_section(run, tested),
        "Settings": _settings_section(run),
        "Times": _times_section(run),
    }
    kind = "classification of whole clouds" if run.settings.classifies else "labels of points"
    net = "KPNeXt" if run.settings.network.kind == "kpnext" else "KPConv network"
    files = [path for path in (run.folder / name for name in (BEST, LAST, curves.LOG)) if path.is_file()]
    sizes = ", ".join(f"{_text(path.name)} ({path.stat().st_size:,} bytes)" for path in files)
    return {
        "TITLE": _text(f"Training {run.folder.resolve().name}"),
        "SUBTITLE": _text(f"{net}, {kind}, {len(run.settings.names)} classes"),
        "GENERATOR": _text(f"kpcore {kp.__version__}"),
        "NAVIGATION": "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections),
        "NUMBERS": "".join(f"<div><b>{value}</b><span>{words}</span></div>" for value, words in _numbers(run)),
        "SECTIONS": "".join(
            f'<section id="{name.lower()}"><h2>{name}</h2>{body}</section>' for name, body in sections.items()
        ),
        "FOOTER": f"Report of kpcore {_text(kp.__version__)} from {sizes} in {_text(run.folder.resolve())}.",
    }


def _text(words: object) -> str:
    """Words as HTML, in one line."""
    return html.escape(picture.in_one_line(str(words)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table of HTML cells; those that begin with a tag of a cell are whole cells."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(one if one.startswith(("<td", "<th")) else f"<{tag}>{one}</{tag}>" for one in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{cells("th", head)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")  # fmt: skip


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _figure(made: Callable[[str], Any], words: str) -> str:
    """A matplotlib figure as SVG for light and dark pages; `made` makes it for a theme."""
    matplotlib = require("matplotlib", "plot")
    images = {}
    for theme in picture.THEMES:
        file = io.StringIO()
        # Without the date, and with identifiers by content, the same run has the same page.
        with matplotlib.rc_context({"svg.hashsalt": "kpcore"}):
            made(theme).savefig(file, format="svg", metadata={"Date": None})
        images[theme] = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue().encode()).decode()}"
    return _both_themes(images, words)


def _both_themes(images: Mapping[str, str], words: str) -> str:
    # Not by a <picture>, of which a dark page would print the dark image.
    return "".join(("<figure>", *(
        f'<img class="of-{theme}" src="{image}" alt="{_text(words)}">' for theme, image in images.items()
    ), "</figure>"))  # fmt: skip


# ---- numbers and warnings


def _numbers(run: _Run) -> list[tuple[str, str]]:
    settings, shown, out = run.settings, run.best or run.last, []
    if shown:
        main = "accuracy" if settings.classifies else "miou"
        by = ", of the validation" if run.log and run.log.tests else ", of the test data" if settings.data.test else ""
        where = f"after epoch {shown.epoch} of {settings.training.epochs}{by}"
        words = "accuracy" if settings.classifies else f"mIoU{classes_in_mean(shown.scores)}"
        out.append((_number(shown.scores.get(main)), f"{words} {where}"))
        if not settings.classifies:
            out.append((_number(shown.scores.get("accuracy")), "accuracy of the points then"))
    if run.log and run.log.tests and not settings.classifies:
        last = run.log.tests[-1]
        out.append((_number(last.scores.get("miou")), f"mIoU of the test data{classes_in_mean(last.scores)}"))
    out.append((f"{kp.nn.count(run.params):,}", "parameters"))
    if points := run.recorded("run", "points"):
        out.append((f"{points:,}", "points to train on, after subsampling"))
    if run.log and run.log.steps:
        out.append((_duration(_seconds(run.log)), f"for {len(run.log.steps):,} steps and validations"))
    return out


def _seconds(log: curves.Log) -> float:
    both = [entry.get("seconds") for entry in log.steps]
    both += [one.seconds for one in (*log.validations, *log.tests)]
    return sum(value for value in both if _is_number(value))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _warnings_section(run: _Run, tested: _Tested | None) -> str:
    lines = _warnings(run) + [f"Test data: {one}" for one in (tested.differences if tested else ())]
    if not lines:
        return "<p>None.</p>"
    return f'<ul class="warnings">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>'


def _warnings(run: _Run) -> list[str]:
    settings, recorded = run.settings, run.recorded("warnings")
    lines = [str(one) for one in recorded] if isinstance(recorded, list) else []
    epochs, done = settings.training.epochs, run.epochs_done
    if type(done) is int and done < epochs:
        lines.append(f"The run is not complete: {done} of {epochs} epochs are done.")
    if settings.data.test and run.log and not run.log.tests and len(run.log.validations) > 1:
        lines.append("The best epoch was chosen by the test data, so that its score is too good: choose it by "
                     "[data] validation.")  # fmt: skip
    if shown := run.best or run.last:
        total, correct = shown.confusion.sum(axis=1), np.diag(shown.confusion)
        never = [name for name, n, c in zip(settings.names, total, correct, strict=False) if n and not c]
        if never:
            lines.append(f"After epoch {shown.epoch} these classes are never predicted rightly: {', '.join(never)}.")
        if absent := [name for name, n in zip(settings.names, total, strict=False) if not n]:
            what = "objects" if settings.classifies else "points"
            lines.append(f"The validation has no {what} of {', '.join(absent)}.")
    for split, classes in _splits(run):
        points = {name: _count(classes, name, "points") or 0 for name in settings.names}
        if few := [name for name in points if _is_few(points[name], sum(points.values()))]:
            lines.append(
                f"Few points in {split}, less than {FEWEST_POINTS} or {100 * LEAST_SHARE:g} %: {', '.join(few)}."
            )
    if run.log and (share := _waited(run.log.steps)) is not None and share > 0.1:
        lines.append(f"Steps waited for batches {share:.0%} of the time: more workers in [training] may help.")
    return lines


# ---- classes and scores


def _splits(run: _Run) -> list[tuple[str, dict[str, Any]]]:
    """The recorded points and files of each class, by the parts of the data that the run has."""
    return [
        (name, classes) for name in _SPLITS if isinstance(classes := run.recorded("classes", name), dict) and classes
    ]


def _count(classes: Mapping[str, Any], name: str, what: str) -> int | None:
    value = _at(classes, name, what)
    return int(value) if _is_number(value) else None


def _is_few(points: int, total: int) -> bool:
    return points < FEWEST_POINTS or points < LEAST_SHARE * total


def _swatches(run: _Run) -> list[str]:
    """The names of the classes as HTML, each with its colour in pictures."""
    return [
        f'<span class="swatch" style="background:#{bytes(color).hex()}"></span>{_text(name)}'
        for name, color in zip(run.settings.names, class_colors(run.settings), strict=True)
    ]


def _classes_section(run: _Run) -> str:
    splits = _splits(run)
    if not splits:
        return _MISSING
    head, rows = ["class"], [[swatch] for swatch in _swatches(run)]
    for split, classes in splits:
        head += [f"{split}<br><small>points</small>", "<small>%</small>", "<small>files</small>"]
        points = [_count(classes, name, "points") for name in run.settings.names]
        total = sum(value or 0 for value in points)
        for row, name, value in zip(rows, run.settings.names, points, strict=True):
            cell = "–" if value is None else f"{value:,}"
            row.append(f'<td class="few">{cell}</td>' if _is_few(value or 0, total) else cell)
            row.append("–" if value is None or not total else picture.share_words(value / total))
            files = _count(classes, name, "files")
            row.append("–" if files is None else f"{files:,}")
    words = f"Marked: a class with less than {FEWEST_POINTS} points or {100 * LEAST_SHARE:g} % of them."
    return f"{_table(head, rows)}<p class='pale'>{words}</p>"


def _scores_section(run: _Run) -> str:
    shown = run.best or run.last
    if shown is None:
        return '<p class="missing">the run has no validation</p>'
    if len(shown.confusion) != len(run.settings.names):
        return _MISSING
    of = voting.scores(shown.confusion, run.settings.names)
    precision = voting.scores(shown.confusion.T, run.settings.names)["class_accuracy"]
    iou, recall = of["iou"], of["class_accuracy"]
    tested = run.log.tests[-1] if run.log and run.log.tests else None
    head = ["class", "points" if not run.settings.classifies else "objects", '<th class="text" colspan="2">IoU</th>',
            "recall", "precision", *(["IoU in the test"] if tested else [])]  # fmt: skip
    rows = []
    for name, swatch, total in zip(run.settings.names, _swatches(run), shown.confusion.sum(axis=1), strict=True):
        bar = f'<td class="text"><span class="bar"><i style="width:{100 * (iou[name] or 0):.1f}%"></i></span></td>'
        row = [swatch, f"{total:,}", _number(iou[name]), bar, _number(recall[name]), _number(precision[name])]
        rows.append(row + ([_number((tested.scores.get("iou") or {}).get(name))] if tested else []))
    mean = ["<b>all</b>", f"{shown.confusion.sum():,}", f"<b>{_number(of['miou'])}</b>", "<td></td>",
            _number(of["mean_class_accuracy"]), _number(_mean(precision.values()))]  # fmt: skip
    rows.append(mean + ([_number(tested.scores.get("miou"))] if tested else []))
    which = "best" if run.best else "last"
    words = (f"After epoch {shown.epoch}, the {which} validation: mean IoU {_number(of['miou'], '.4f')}"
             f"{classes_in_mean(of)}, accuracy {_number(of['accuracy'], '.4f')}.")  # fmt: skip
    if "class_miou" in shown.scores:
        words += f" Mean over objects {_number(shown.scores.get('miou'))}, over categories " \
                 f"{_number(shown.scores.get('class_miou'))}."  # fmt: skip
    return f"<p>{_text(words)}</p>{_table(head, rows)}"


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _confusion_section(run: _Run) -> str:
    results = [("best", run.best), ("last", run.last)]
    if run.best and run.last and run.best.epoch == run.last.epoch:
        results = [("best and last", run.best)]
    results = [(f"{which} validation", result) for which, result in results]
    parts = []
    for which, result in [("test", run.test), *results]:
        if result is None or len(result.confusion) != len(run.settings.names):
            continue
        table = _confusion_table(run, result.confusion)
        title = f"<h3>{which}, after epoch {result.epoch}</h3>"
        # All but the first are folded, as they seldom differ much.
        parts.append(f"<details><summary>{which}</summary>{title}{table}</details>" if parts else title + table)
    if not parts:
        return _MISSING
    return f"<p>A row for each true class: its points by predicted class, in per cent of the row.</p>{''.join(parts)}"


def _confusion_table(run: _Run, confusion: np.ndarray) -> str:
    names, totals = [_text(name) for name in run.settings.names], confusion.sum(axis=1)
    counted, rows = len(names) <= _MOST_COUNTED, []
    for i, (name, total) in enumerate(zip(names, totals, strict=True)):
        row = [f"<th>{name}</th>"]
        for j, (predicted, value) in enumerate(zip(names, confusion[i], strict=True)):
            share = value / total if total else 0.0
            if not value:
                row.append("<td></td>")
                continue
            kind = "cell strong" if share > 0.6 else "cell"
            more = f"<br><small>{value:,}</small>" if counted else ""
            words = f"{name}, {'as' if i == j else 'labelled'} {predicted}: {value:,}"
            row.append(f'<td class="{kind}" style="--share:{share:.3f}" title="{words}">'
                       f"{picture.share_words(share)}{more}</td>")  # fmt: skip
        rows.append([*row, f'<td class="total">{total:,}</td>'])
    return _table(["<th></th>", *names, "all"], rows, "confusion")


# ---- curves, features, pictures


def _curves_section(run: _Run) -> str:
    log = run.log
    if log is None or not log.steps:
        return f'<p class="missing">no steps in {curves.LOG}</p>'
    return _figure(lambda theme: curves.figure(log, classifies=run.settings.classifies, theme=theme),
                   "Loss, learning rate, scores of the validations and the score of each class by epoch")  # fmt: skip


def _features_section(run: _Run, tested: _Tested | None) -> str:
    of = {"train": run.recorded("statistics"), "test": tested.statistics if tested else None}
    of = {name: one for name, one in of.items() if isinstance(one, dict)}
    histograms: dict[str, dict[str, Histogram]] = {}
    for split, one in of.items():
        for name, described in (one.get("features") or {}).items():
            if (histogram := _histogram(described)) is not None:
                histograms.setdefault(name, {})[split] = histogram
    parts = []
    if histograms:
        parts.append(_figure(lambda theme: _draw_histograms(histograms, theme),
                             "Histograms of the features in the parts of the data"))  # fmt: skip
    rows = [[words, *cells] for words, *cells in _statistics_rows(of) if any(cell != "–" for cell in cells)]
    if rows:
        parts.append(_table(["points and neighbours", *of], rows))
    if parts and tested is None:
        parts.append('<p class="missing">of test data with kpcore report --data DIR</p>')
    return "".join(parts) or _MISSING


class Histogram(NamedTuple):
    """A histogram of values between its outer edges, and the share of those beyond."""

    edges: np.ndarray
    density: np.ndarray  #: the share of all values, for a length of 1
    beyond: float


def _histogram(described: Any) -> Histogram | None:
    """The histogram of a feature, see `statistics.Feature`; None unless it has any value."""
    edges, counts = (np.array(_at(described, name) or [], np.float64) for name in ("edges", "counts"))
    widths = np.diff(edges)
    if len(counts) != len(edges) + 1 or not len(widths) or not (widths > 0).all() or not counts.sum() > 0:
        return None
    return Histogram(edges, counts[1:-1] / counts.sum() / widths, float(counts[[0, -1]].sum() / counts.sum()))


def _draw_histograms(histograms: Mapping[str, Mapping[str, Histogram]], theme: str) -> Any:
    page, across = picture.THEMES[theme], min(4, max(2, len(histograms)))
    rows = math.ceil(len(histograms) / across)
    made = require("matplotlib.figure", "plot").Figure((12, 0.35 + 2.1 * rows), facecolor=page.background)
    styles = {
        "train": {"fill": True, "color": page.pale, "alpha": 0.45, "lw": 0},
        "test": {"color": page.differs, "lw": 1.6},
    }
    for number, (name, splits) in enumerate(histograms.items()):
        axes = made.add_subplot(rows, across, number + 1, facecolor=page.background)
        for split, one in splits.items():
            axes.stairs(one.density, one.edges, label=split, **styles[split])
        if "test" in splits and splits["test"].beyond > 0.005:
            note = f"{picture.share_words(splits['test'].beyond)} % of the test beyond"
            axes.set_title(note, loc="right", fontsize=8, color=page.differs, pad=4)
        axes.set_title(picture.shortened(name, 360, 9), loc="left", fontsize=9, color=page.text, pad=4)
        axes.set(yticks=[], xmargin=0.02)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(page.pale)
        axes.tick_params(colors=page.pale, labelsize=8, length=2.5)
        axes.set_ylim(0, None)
        if number == 0:
            axes.legend(fontsize=8, frameon=False, labelcolor=page.text)
    made.subplots_adjust(0.02, 0.09 if rows > 1 else 0.15, 0.99, 1 - 0.3 / made.get_figheight(), 0.1, 0.45)
    return made


def _statistics_rows(of: Mapping[str, dict[str, Any]]) -> list[list[str]]:
    rows = []
    for words, name, form in (("points", "points", ",.0f"), ("points per voxel", "points_per_voxel", ".3g"),
                              ("spacing of points", "spacing", ".3g")):  # fmt: skip
        values = [one.get(name) for one in of.values()]
        rows.append([words, *(_number(value, form) if _is_number(value) else "–" for value in values)])
    for axis, words in enumerate(("metres per unit of x and y", "metres per unit of z")):
        units = [(*(one.get("unit") or ()), None, None)[axis] for one in of.values()]
        rows.append([words, *(_number(value, ".7g") if _is_number(value) else "–" for value in units)])
    neighbors = [one.get("neighbors") or [] for one in of.values()]
    for level in range(max(map(len, neighbors), default=0)):
        cells = [one[level] if level < len(one) else None for one in neighbors]
        rows.append([f"neighbours on level {level}", *(_number(n, ".1f") if _is_number(n) else "–" for n in cells)])
    return rows


def _pictures_section(run: _Run, tested: _Tested | None) -> str:
    if tested is None:
        return '<p class="missing">none: made by kpcore report --data DIR, the folder of the data files</p>'
    settings, (model, parts, scenes, *_) = run.settings, tested
    if not parts:
        return '<p class="missing">none: the settings have no test data</p>'
    if settings.classifies:
        classified = classification.classify(model, scenes[:_MOST_OBJECTS])
        images = _pictures(
            lambda path, theme: classification.draw_examples(path, "Test data", model, classified, theme)
        )
        return _both_themes(images, "Test data with their predicted classes")
    if settings.heads:
        return '<p class="missing">none: made of scenes and of objects without parts</p>'
    out = []
    for part, scene in zip(parts, scenes, strict=True):
        # Of the file only the points of the part are drawn.
        cloud = replace(scene.cloud, points=scene.full, colors=None, labels=None)
        segmented = segmentation.compare(model, cloud, scene.full_labels, labelling.labels_of(model, scene))
        unit = "m" if getattr(part, "indoor", None) is not None else None  # otherwise that of the file

        def draw(path: Path, theme: str, title: str = str(part), seen: Any = segmented,
                 unit: str | None = unit) -> None:  # fmt: skip
            segmentation.draw(path, title, seen, settings, theme=theme, unit=unit, width=_PANEL)

        out.append(_both_themes(_pictures(draw), f"{part}: predicted classes, labels, and where they differ"))
    return "".join(out)


def _pictures(draw: Callable[[Path, str], None]) -> dict[str, str]:
    """A PNG for each theme, drawn by a function of its path and the theme, as addresses that hold it."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for theme in picture.THEMES:
            path = Path(folder, f"{theme}.png")
            draw(path, theme)
            out[theme] = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return out


# ---- settings and times


def _settings_section(run: _Run) -> str:
    parts = ["<p>As in the TOML file; settings in bold have other values than by default.</p>"]
    for f in fields(run.settings):
        section = getattr(run.settings, f.name)
        changed, others = [], []
        for name, value, default in _values(section, ""):
            rows = changed if value != default else others
            cells = ['<td class="text">' + _text(name) + "</td>", f'<td class="text">{_text(_toml(value))}</td>',
                     f'<td class="text pale">{"" if default is MISSING else _text(_toml(default))}</td>']  # fmt: skip
            rows.append([cell.replace('class="text"', 'class="text changed"') for cell in cells[:2]] + cells[2:]
                        if value != default else cells)  # fmt: skip
        head = [f'<th class="text">{words}</th>' for words in (f"[{f.name}]", "value", "default")]
        if changed:
            parts.append(_table(head, changed))
        if others:
            words = f"[{f.name}]: {len(others)} settings with their defaults"
            parts.append(f"<details><summary>{words}</summary>{_table(head, others)}</details>")
    return "".join(parts)


def _values(section: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of each setting of a section; MISSING where there is no default."""
    out = []
    for f in fields(section):
        value = getattr(section, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(value) and is_dataclass(default):
            out += _values(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict) and value and f.name in ("classes", "options"):
            out += [(f"{prefix}{f.name}.{name}", one, MISSING) for name, one in value.items()]
        else:
            out.append((prefix + f.name, value, default))
    return out


def _toml(value: Any) -> str:
    """A value as TOML writes it; without what is None, which TOML has no word for."""
    if value is None:
        return "–"
    if is_dataclass(value):
        return _toml({
            f.name: one for f in fields(value) if (one := getattr(value, f.name)) != f.default and one is not None
        })  # fmt: skip
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }" if value else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _waited(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """The share of the time that steps waited for their batches; None without times."""
    both = [(entry["waited"], entry["seconds"]) for entry in steps if "waited" in entry and "seconds" in entry]
    total = sum(seconds for _, seconds in both)
    return sum(waited for waited, _ in both) / total if total else None


def _times_section(run: _Run) -> str:
    log, training = run.log, run.settings.training
    if log is None or not log.steps:
        return f'<p class="missing">no steps in {curves.LOG}</p>'
    seconds = [entry["seconds"] for entry in log.steps if _is_number(entry.get("seconds"))]
    points = [entry["points"] for entry in log.steps if _is_number(entry.get("points"))]
    rows = [["epochs", f"{run.epochs_done if run.epochs_done is not None else '–'} of {training.epochs}"],
            ["steps", f"{len(log.steps):,}"]]  # fmt: skip
    if seconds:
        rows += [["step", f"{np.median(seconds):.3f} s <small>median; the longest {max(seconds):.3f}</small>"],
                 ["all steps", _duration(sum(seconds))]]  # fmt: skip
    if seconds and len(points) == len(seconds):
        rows += [["points in a batch", f"{np.mean(points):,.0f} <small>mean</small>"],
                 ["points in a second", f"{sum(points) / sum(seconds):,.0f}"]]  # fmt: skip
    if (share := _waited(log.steps)) is not None:
        rows.append(["waited for batches", f"{picture.share_words(share)} % of the time"])
    for words, scored in (("validation", log.validations), ("test", log.tests)):
        times = [one.seconds for one in scored if _is_number(one.seconds)]
        if times:
            rows.append([f"{len(times)} × {words}", f"{np.mean(times):.1f} s <small>mean</small>"])
    if (seed := run.recorded("run", "seed")) is not None:
        rows.append(["seed", _text(seed)])
    return _table(["what", '<th class="text">how much</th>'],
                  [[_text(words), f'<td class="text">{value}</td>'] for words, value in rows])  # fmt: skip
