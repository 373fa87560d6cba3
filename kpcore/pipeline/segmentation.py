"""Segmentation of a scan file: a trained network labels its points, and a copy with these labels is written."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.config import KpcoreWarning
from kpcore.io.cloud import Cloud
from kpcore.io.formats import check_out, label_field, write_labels, write_to
from kpcore.pipeline import voting
from kpcore.pipeline.data import IGNORED, class_numbers, part_numbers, read_cloud
from kpcore.pipeline.labelling import Labelled, check_category, chosen_method, label

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kpcore.pipeline.model import Model

__all__ = ["Segmented", "compare", "draw", "segment", "write_labels"]


class Segmented(NamedTuple):
    """The predicted classes of a cloud's points, compared with its labels."""

    cloud: Cloud | None  #: None for digits
    classes: np.ndarray  #: (N,) predicted class numbers of the cloud's points
    counts: np.ndarray  #: (classes,) number of points of each predicted class
    true: np.ndarray | None  #: (N,) class numbers by the labels in the file, IGNORED where these are of no class
    scores: voting.Scores | None  #: of the predicted classes; None without labels
    labelled: Labelled | None = None  #: with the confidence, and with what makes the classes doubtful


def segment(model: Model, source: str | os.PathLike[str], out: str | os.PathLike[str], *, method: str | None = None,
            votes: int | None = None, category: str | None = None,
            watch: Callable[[float], object] | None = None) -> Segmented:  # fmt: skip
    """Label the points of a file, and write a copy with these labels; everything else in it stays the same.

    Points without finite coordinates keep their label. See `Model.predict` for the arguments.
    """
    check_category(model, category)
    chosen_method(model, method, votes)
    check_out(source, out)
    cloud = read_cloud(model.settings, source, labelled=False, exact=True)
    values = model.label_values
    kept = np.ones(len(cloud.points), bool) if cloud.kept is None else cloud.kept
    field = label_field(
        source, out, len(kept), label=model.settings.data.label, values=values
    )  # checks before the work
    true = None
    if cloud.labels is not None and category is not None:
        true = part_numbers(model.settings, source, cloud.labels, [*model.settings.heads].index(category))
    elif cloud.labels is not None:
        true = class_numbers(model.settings, cloud.labels)
    labelled = label(model, cloud, mode=method, votes=votes, category=category, watch=watch)
    for message in labelled.warnings:
        warnings.warn(f"{source}: {message}", KpcoreWarning, stacklevel=2)
    write_to(field, source, out, values[labelled.classes], kept)
    return compare(model, cloud, true, labelled.classes, category)._replace(labelled=labelled)


def compare(model: Model, cloud: Cloud, true: np.ndarray | None, classes: np.ndarray,
            category: str | None = None) -> Segmented:  # fmt: skip
    """Compare predicted classes of a cloud's points with those of its labels, None if it has none."""
    counts, scores = np.bincount(classes, minlength=model.net.num_classes), None
    if true is not None and (true != IGNORED).any():
        matrix, heads = voting.confusion(true, classes, len(counts)), model.settings.heads
        scores = (
            voting.part_scores([matrix], [[*heads].index(category)], heads)
            if heads
            else voting.scores(matrix, model.settings.names)
        )
    return Segmented(cloud, classes, counts, true, scores)


def draw(path: Path, title: str, segmented: Segmented, names: Sequence[str]) -> None:
    """Write a picture of the cloud coloured by predicted class; with labels also by label and by difference."""
    from kpcore import picture

    colors = picture.class_colors(len(names))
    panels = [("found", colors[segmented.classes])]
    if segmented.true is not None and segmented.scores:
        ignored = segmented.true == IGNORED
        label_colors = np.vstack([colors, [90, 90, 90]]).astype(np.uint8)  # the last is that of IGNORED
        differs = ~ignored & (segmented.true != segmented.classes)
        differs_colors = np.array([[96, 104, 112], [236, 64, 64]], np.uint8)
        panels += [
            ("labels", label_colors[np.where(ignored, len(names), segmented.true)]),
            ("where they differ", differs_colors[differs.astype(np.intp)]),
        ]
    scores = segmented.scores
    subtitle = f"mIoU {scores['miou']:.3f}, accuracy {scores['accuracy']:.3f}" if scores else ""
    picture.draw_classes(path, title, subtitle, segmented.cloud, panels, [*zip(names, colors, strict=True)])
