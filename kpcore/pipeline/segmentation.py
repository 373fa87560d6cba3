"""A scan in, the same scan out with labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import Cloud
from kpcore.io.formats import check_out, label_field, write_labels, write_to
from kpcore.pipeline import voting
from kpcore.pipeline.data import IGNORED, read_cloud, scene_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.training import Model

__all__ = ["Segmented", "draw", "found", "segment", "write_labels"]


class Segmented(NamedTuple):
    """The classes of a cloud's points, as `segment` returns them."""

    cloud: Cloud | None  #: None of digits
    classes: np.ndarray  #: (N,) numbers of classes, of the cloud's points
    counts: np.ndarray  #: (classes,) points of each
    true: np.ndarray | None  #: (N,) what the file's own labels say, IGNORED where they are of no class
    scores: voting.Scores | None  #: against those, see `voting.scores`


def segment(model: Model, source: str | os.PathLike[str], out: str | os.PathLike[str], *, votes: int | None = None,
            watch: Callable[[float], object] | None = None) -> Segmented:  # fmt: skip
    """Label the points of a file, and write it with these labels; what else it holds stays as it is.

    Points that were left out (see `Cloud`) keep the label they have.
    """
    check_out(source, out)
    cloud = read_cloud(model.settings, source, labelled=False)
    values = np.array([labels[0] for labels in model.settings.data.classes.values()], np.int32)
    kept = np.ones(len(cloud.points), bool) if cloud.kept is None else cloud.kept
    field = label_field(source, out, len(kept), label=model.settings.data.label, values=values)  # or an error, early
    scene = scene_of(model.settings, model.columns, cloud)
    classes = voting.labels_of(model, scene, votes, watch=watch)
    write_to(field, source, out, values[classes], kept)
    return found(model, scene, classes)


def found(model: Model, scene: Scene, classes: np.ndarray) -> Segmented:
    """`Segmented` of a scene's points."""
    counts, true, scores = np.bincount(classes, minlength=model.net.num_classes), scene.full_labels, None
    if true is not None and (true != IGNORED).any():
        scores = voting.scores(voting.confusion(true, classes, len(counts)), model.settings.names)
    return Segmented(scene.cloud, classes, counts, true, scores)


def draw(path: Path, title: str, found: Segmented, names: Sequence[str]) -> None:
    """Write a picture of the cloud by predicted classes and, if it has labels, by those and by where they differ."""
    from kpcore import picture

    colors = picture.class_colors(len(names))
    panels = [("found", colors[found.classes])]
    if found.true is not None and found.scores:
        true = np.where(found.true == IGNORED, len(names), found.true)
        with_none = np.vstack([colors, [90, 90, 90]]).astype(np.uint8)
        right = np.where(found.true == found.classes, 0, 1)
        wrong = np.array([[96, 104, 112], [236, 64, 64]], np.uint8)[np.where(found.true == IGNORED, 0, right)]
        panels += [("labels", with_none[true]), ("where they differ", wrong)]
    subtitle = "" if not found.scores else f"mIoU {found.scores['miou']:.3f}, accuracy {found.scores['accuracy']:.3f}"
    picture.draw_classes(path, title, subtitle, found.cloud, panels, [*zip(names, colors, strict=True)])
