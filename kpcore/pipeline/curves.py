"""Curves of a training from its log: loss, learning rate, scores of the validations, and the IoU of each class."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpcore import picture
from kpcore.config import require
from kpcore.files import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from kpcore.pipeline.voting import Scores

LOG, CURVES = "log.jsonl", "curves.png"
_WIDTH, _TOP_HEIGHT, _SMALL_HEIGHT = 12.0, 2.7, 1.55  # of the figure, its first row and the rows of classes, in inches
_LEFT, _RIGHT, _GAP, _SMALL_GAP = 0.55, 0.15, 0.62, 0.22
_MOST_ACROSS, _MOST_CLASSES, _MOST_POINTS = 8, 80, 400


class Validation(NamedTuple):
    """The scores after an epoch, and the seconds that they took."""

    epoch: int
    scores: Scores
    seconds: float | None


class Log(NamedTuple):
    """The entries of the log of a training."""

    steps: list[dict[str, Any]]
    validations: list[Validation]  #: those by which the best network is chosen
    tests: list[Validation]  #: those of test data that nothing is chosen by; none where the best is chosen by these

    def best(self, classifies: bool) -> Validation | None:
        """The first validation with the largest mIoU, or accuracy; None without any."""
        name = "accuracy" if classifies else "miou"
        scored = [one for one in self.validations if one.scores.get(name) is not None]
        return max(scored, key=lambda one: one.scores[name]) if scored else None


def read_log(path: str | os.PathLike[str]) -> Log:
    """Read the log of a training; a last line that is not complete, as a killed process leaves one, is left out."""
    path = Path(path)
    lines, steps, scored = path.read_bytes().splitlines(), [], {"validation": [], "test": []}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            kinds = [kind for kind in scored if kind in entry]
            for kind in kinds:
                scored[kind].append(Validation(int(entry["epoch"]), dict(entry[kind]), entry.get("seconds")))
            if not kinds:
                float(entry["epoch"] + entry["step"] + entry["loss"])
                steps.append(entry)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}: line {number}: expected a log entry of a training") from None
    return Log(steps, *((scored["validation"], scored["test"]) if scored["validation"] else (scored["test"], [])))


def curves(out: str | os.PathLike[str], *, classifies: bool = False) -> None:
    """Draw the curves of a run into its folder; nothing without any step."""
    log = read_log(Path(out) / LOG)
    if log.steps:
        with replacing(Path(out) / CURVES) as part:
            figure(log, classifies=classifies).savefig(part, format="png", dpi=120)


def figure(log: Log, *, classifies: bool = False, theme: str = "light") -> Any:
    """A matplotlib figure with a panel for each kind of number, and a small one for each class.

    classifies : whether the accuracy chooses the best network, rather than the mIoU
    """
    page, best = picture.theme_named(theme), log.best(classifies)
    by_class = "class_accuracy" if classifies else "iou"
    names = [*dict.fromkeys(name for one in log.validations for name in one.scores.get(by_class) or ())]
    names, num_classes = names[:_MOST_CLASSES], len(names)
    regularized = any("regularization" in entry for entry in log.steps)
    top = ["loss", *(["entropy"] if regularized else []), "lr", *(["scores"] if log.validations else [])]
    across = min(max(4, math.ceil(len(names) / math.ceil(len(names) / _MOST_ACROSS))) if names else 4, _MOST_ACROSS)
    rows = math.ceil(len(names) / across)
    height = 0.45 + _TOP_HEIGHT + (0.35 + rows * _SMALL_HEIGHT if rows else 0)
    made = require("matplotlib.figure", "plot").Figure(figsize=(_WIDTH, height), facecolor=page.background)

    def panel(column: int, columns: int, y: float, h: float, title: str, note: str = "") -> Any:
        """Axes with their upper edge y inches below that of the figure."""
        gap = _GAP if h > _SMALL_HEIGHT else _SMALL_GAP
        w = (_WIDTH - _LEFT - _RIGHT - (columns - 1) * gap) / columns
        x = _LEFT + column * (w + gap)
        axes = made.add_axes((x / _WIDTH, 1 - (y + h) / height, w / _WIDTH, h / height), facecolor=page.background)
        room = (w - 0.07 * len(note) - 0.1) * picture.DPI
        axes.set_title(picture.shortened(title, room, 9), loc="left", fontsize=9, color=page.text, pad=4)
        axes.set_title(note, loc="right", fontsize=9, color=page.pale, pad=4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(page.pale)
        axes.tick_params(colors=page.pale, labelsize=8, length=2.5, which="both")
        axes.grid(axis="y", color=page.pale, alpha=0.25, lw=0.6)
        axes.set_axisbelow(True)
        axes.set_xlim(0, last)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5 if w > 2 else 3)
        return axes

    per_epoch = 1 + max(entry["step"] for entry in log.steps)
    at = np.array([entry["epoch"] + (entry["step"] + 1) / per_epoch for entry in log.steps])
    last = max([at.max(), *(one.epoch for one in log.validations), 1e-9])
    titles = {"loss": "loss" if regularized else "loss: entropy of the classes", "entropy": "entropy of the classes",
              "lr": "learning rate"}  # fmt: skip
    for column, name in enumerate(top):
        if name == "scores":
            axes = panel(column, len(top), 0.35, _TOP_HEIGHT - 0.55, "validation", _best_words(best, classifies))
            _plot_scores(axes, log, best, classifies, page)
        else:
            values = np.array([entry.get(name, math.nan) for entry in log.steps], np.float64)
            axes = panel(
                column,
                len(top),
                0.35,
                _TOP_HEIGHT - 0.55,
                titles[name],
                "" if name == "lr" else f"last {values[-1]:.3g}",
            )
            _plot_steps(axes, at, values, page, smooth=name != "lr")
            if best:
                axes.axvline(best.epoch, color=page.pale, lw=0.8, ls=(0, (3, 3)))
        axes.set_xlabel("epoch", fontsize=8, color=page.pale, labelpad=1)
    for number, name in enumerate(names):
        values = [(one.scores.get(by_class) or {}).get(name) for one in log.validations]
        values = np.array([math.nan if value is None else value for value in values])
        known = values[np.isfinite(values)]
        at_best = (best.scores.get(by_class) or {}).get(name) if best else None
        note = "–" if not len(known) else f"{known[-1] if at_best is None else at_best:.2f}"
        y = 0.45 + _TOP_HEIGHT + 0.25 + number // across * _SMALL_HEIGHT
        axes = panel(number % across, across, y, _SMALL_HEIGHT - 0.5, name, note)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1])
        if number % across:
            axes.set_yticklabels([])
        if number + across < len(names):
            axes.set_xticklabels([])
        _plot_epochs(axes, log.validations, values, page.full)
        if best:
            axes.axvline(best.epoch, color=page.pale, lw=0.8, ls=(0, (3, 3)))
    if names:
        which = "each class" if len(names) == num_classes else f"the first {len(names)} of {num_classes} classes"
        words = f"{'accuracy' if classifies else 'IoU'} of {which}"
        made.text(_LEFT / _WIDTH, 1 - (0.35 + _TOP_HEIGHT) / height,
                  f"{words} in validation; dashed, and the numbers: the best epoch", size=9, weight="bold",
                  color=page.text)  # fmt: skip
    return made


def _best_words(best: Validation | None, classifies: bool) -> str:
    if best is None:
        return ""
    name = "accuracy" if classifies else "miou"
    return f"best {best.scores[name]:.3f}, epoch {best.epoch}"


def _plot_steps(axes: Any, at: np.ndarray, values: np.ndarray, page: picture.Theme, smooth: bool) -> None:
    """Values of all steps, pale, and their running mean; of many steps the range of each of 400 parts."""
    if smooth and len(values) > _MOST_POINTS:
        parts = np.array_split(np.arange(len(values)), _MOST_POINTS)
        low, high, middle = ([f(array[part]) for part in parts]
                             for f, array in ((np.nanmin, values), (np.nanmax, values), (np.mean, at)))  # fmt: skip
        axes.fill_between(middle, low, high, color=page.full, alpha=0.25, lw=0)
    elif smooth:
        axes.plot(at, values, color=page.full, alpha=0.35, lw=0.7)
    width = max(1, len(values) // 60) if smooth else 1
    mean = np.convolve(values, np.ones(width) / width, "valid")
    chosen = np.unique(np.linspace(0, len(mean) - 1, min(len(mean), _MOST_POINTS)).round().astype(int))
    axes.plot(at[width - 1 :][chosen], mean[chosen], color=page.full, lw=1.6, marker="o" if len(mean) == 1 else "")
    if smooth and np.nanmin(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        few = np.nanmax(values) < 12 * np.nanmin(values)  # within a decade there may be no power of ten
        axes.yaxis.set_minor_formatter("{x:g}" if few else (lambda value, _: ""))
        if few:
            locator = require("matplotlib.ticker", "plot").LogLocator(subs=(2.0, 5.0))
            axes.yaxis.set_minor_locator(locator)
    elif not smooth:
        axes.set_ylim(0, 1.08 * values.max() or 1)


def _plot_epochs(axes: Any, validations: Sequence[Validation], values: np.ndarray, color: str, label: str = "") -> None:
    known = np.isfinite(values)
    style = {"marker": "o", "markersize": 3.5} if known.sum() <= 30 else {}
    epochs = np.array([one.epoch for one in validations])
    axes.plot(epochs, values, color=color, lw=1.5, label=label, clip_on=False, zorder=3, **style)


def _plot_scores(axes: Any, log: Log, best: Validation | None, classifies: bool, page: picture.Theme) -> None:
    main = ("accuracy", "accuracy") if classifies else ("miou", "mIoU")
    other = ("mean_class_accuracy", "mean class accuracy") if classifies else ("accuracy", "accuracy")
    for (name, words), color in ((other, page.pale), (main, page.full)):
        values = np.array([math.nan if (value := one.scores.get(name)) is None else value for one in log.validations])
        if np.isfinite(values).any():
            _plot_epochs(axes, log.validations, values, color, words)
    if best:
        axes.axvline(best.epoch, color=page.pale, lw=0.8, ls=(0, (3, 3)))
        axes.plot([best.epoch], [best.scores[main[0]]], "o", ms=9, mfc="none", mec=page.differs, mew=1.6, ls="",
                  label="best", clip_on=False, zorder=4)  # fmt: skip
    tested = [one for one in log.tests if one.scores.get(main[0]) is not None]
    if tested:
        axes.plot([one.epoch for one in tested], [one.scores[main[0]] for one in tested], "D", ms=6, ls="",
                  color=page.text, label=f"{main[1]} of the test", clip_on=False, zorder=4)  # fmt: skip
    axes.set(ylim=(0, 1))
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(loc="best", fontsize=8, frameon=False, labelcolor=page.text)
