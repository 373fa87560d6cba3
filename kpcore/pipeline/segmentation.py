"""Segmentation of a scan file: a trained network labels its points, and a copy with these labels is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore import moved
from kpcore.io.cloud import Cloud
from kpcore.io.formats import check_out, label_field, write_labels, write_to
from kpcore.pipeline import voting
from kpcore.pipeline.data import IGNORED, part_scene, read_cloud, scene_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.training import Model

__all__ = ["Segmented", "compare", "draw", "segment", "write_labels"]


class Segmented(NamedTuple):
    """The predicted classes of a cloud's points, compared with its labels."""

    cloud: Cloud | None  #: None for digits
    classes: np.ndarray  #: (N,) predicted class numbers of the cloud's points
    counts: np.ndarray  #: (classes,) number of points of each predicted class
    true: np.ndarray | None  #: (N,) class numbers by the labels in the file, IGNORED where these are of no class
    scores: voting.Scores | None  #: of the predicted classes; None without labels


def segment(model: Model, source: str | os.PathLike[str], out: str | os.PathLike[str], *, votes: int | None = None,
            category: str | None = None, watch: Callable[[float], object] | None = None) -> Segmented:  # fmt: skip
    """Label the points of a file, and write a copy with these labels; everything else in it stays the same.

    A network of parts needs the category of the object.

    Points without finite coordinates keep their label. `watch` is called with the fraction that is done.
    """
    check_category(model, category)
    check_out(source, out)
    cloud = read_cloud(model.settings, source, labelled=False)
    heads, classes = model.settings.heads, [*model.settings.data.classes.values()]
    values = np.array(np.concatenate(classes) if heads else [labels[0] for labels in classes], np.int32)
    kept = np.ones(len(cloud.points), bool) if cloud.kept is None else cloud.kept
    field = label_field(
        source, out, len(kept), label=model.settings.data.label, values=values
    )  # checks before the work
    if heads:
        number = [*heads].index(category)
        scene = replace(
            part_scene(model.settings, model.columns, source, cloud.points, cloud.labels, number), cloud=cloud
        )
    else:
        scene = scene_of(model.settings, model.columns, cloud)
    classes = voting.labels_of(model, scene, votes, watch=watch)
    write_to(field, source, out, values[classes], kept)
    return compare(model, scene, classes)


def check_category(model: Model, category: str | None) -> None:
    """Raise an error unless the category is one of the network, or None for a network without categories."""
    heads = model.settings.heads
    if (heads is None) != (category is None) or (heads and category not in heads):
        expected = f"one of {', '.join(heads)}" if heads else "none for a network without parts"
        raise ValueError(f"category: expected {expected}, got {category}")


def compare(model: Model, scene: Scene, classes: np.ndarray) -> Segmented:
    """Compare predicted classes with the labels of a scene."""
    counts, true, scores = np.bincount(classes, minlength=model.net.num_classes), scene.full_labels, None
    if true is not None and (true != IGNORED).any():
        matrix, heads = voting.confusion(true, classes, len(counts)), model.settings.heads
        scores = (
            voting.part_scores([matrix], [scene.category], heads)
            if heads
            else voting.scores(matrix, model.settings.names)
        )
    return Segmented(scene.cloud, classes, counts, true, scores)


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


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
