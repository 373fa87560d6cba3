"""k-fold cross-validation: the confusion matrices of complete folds, their sum, a table and a file of both."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from kpcore.files import replacing
from kpcore.nn import checkpoints
from kpcore.pipeline.training import LAST, has_run, saved_run
from kpcore.pipeline.voting import scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kpcore.pipeline.settings import Settings

FOLDS = "folds.json"


def last_confusion(out: Path, settings: Settings, seed: int) -> np.ndarray | None:
    """The confusion matrix after the last epoch of the run in a folder; None unless the run is complete.

    An error if it is a run with other settings or another seed. The last epoch, and not the best, since choosing an
    epoch by the scene that is then scored makes the score too high.
    """
    last, classes = out / LAST, len(settings.names)
    if not (has_run(out) and last.is_file()):
        return None
    run = saved_run(last, settings, seed).run
    with checkpoints.errors_name(f"resume: {last}"):
        if run["epoch"] != settings.training.epochs:
            return None
        return np.array(run["results"][-1]["confusion"], np.int64).reshape(classes, classes)


def write(path: Path, names: Sequence[str], confusions: Mapping[str, np.ndarray]) -> None:
    """Write the confusion matrix and the scores of each fold and of the sum as JSON."""
    folds = {fold: {**scores(matrix, names), "confusion": matrix.tolist()} for fold, matrix in confusions.items()}
    total = total_confusion(confusions)
    content = {"folds": folds, "all": {**scores(total, names), "confusion": total.tolist()}}
    with replacing(path) as part:
        part.write_text(json.dumps(content) + "\n", encoding="utf-8")


def names_of_folds(path: Path) -> list[str]:
    """The names of the folds in a file that `write` wrote."""
    with checkpoints.errors_name(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("folds"), dict) or not content["folds"]:
            raise ValueError("expected the folds of a training, got something else")
    return [*content["folds"]]


def total_confusion(confusions: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.sum([*confusions.values()], axis=0)


def table(names: Sequence[str], confusions: Mapping[str, np.ndarray]) -> list[str]:
    """Lines of a table with a column of scores for each fold, and one for the sum of their confusion matrices."""
    columns = [*confusions.items(), ("all folds", total_confusion(confusions))]
    scored = [(fold, scores(matrix, names)) for fold, matrix in columns]
    rows = [(f"IoU {name}", [one["iou"][name] for _, one in scored]) for name in names]
    rows += [
        (title, [one[key] for _, one in scored])
        for title, key in (("mIoU", "miou"), ("accuracy", "accuracy"), ("mean class accuracy", "mean_class_accuracy"))
    ]
    widths = [max(len(fold), len(f"{one['points']:,}"), 6) for fold, one in scored]
    first = max(len(title) for title, _ in rows)

    def line(title: str, cells: Sequence[str]) -> str:
        padded = (f"{cell:>{width}}" for cell, width in zip((title, *cells), (first, *widths), strict=True))
        return "  ".join(padded)

    return [
        line("", [fold for fold, _ in scored]),
        line("points", [f"{one['points']:,}" for _, one in scored]),
        *(line(title, ["-" if value is None else f"{value:.4f}" for value in values]) for title, values in rows),
    ]
