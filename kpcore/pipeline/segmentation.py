"""Segmentation of a scan file: a trained network labels its points, and a copy with these labels is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore import moved
from kpcore.console import classes_in_mean
from kpcore.io.cloud import Cloud
from kpcore.io.formats import check_out, label_field, write_labels, write_to
from kpcore.pipeline import voting
from kpcore.pipeline.colors import class_colors, distinct_colors
from kpcore.pipeline.data import IGNORED, part_scene, read_cloud, scene_of
from kpcore.pipeline.settings import Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

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


def draw(path: str | os.PathLike[str], title: str, segmented: Segmented,
         names: Settings | Sequence[str], *, theme: str = "dark", unit: str | None = None,
         width: int | None = None) -> None:  # fmt: skip
    """Write a picture of the cloud coloured by predicted class; with labels also by label and by difference.

    The legend has the classes that occur, with their shares of the points.

    names : settings, of which classes have the colours of `colors.class_colors`; or names of classes without settings
    theme, unit, width : see `picture.draw_classes`
    """
    from kpcore import picture

    page, classes = picture.theme_named(theme), segmented.classes
    if isinstance(names, Settings):
        names, colors = names.names, class_colors(names)
    else:
        colors = distinct_colors(len(names))
    panels, true = [("predicted", colors[classes])], segmented.true if segmented.scores else None
    shares = [segmented.counts / max(1, len(classes))]
    differences = []
    if true is not None:
        ignored, differs = true == IGNORED, (true != IGNORED) & (true != classes)
        shares.append(np.bincount(true[~ignored], minlength=len(names)) / max(1, len(true)))
        of_labels = np.vstack([colors, picture.rgb(page.unlabeled)])  # the last is that of IGNORED
        kinds = np.where(ignored, 2, differs)
        of_differences = np.array([picture.rgb(one) for one in (page.same, page.differs, page.unlabeled)])
        panels += [("labels", of_labels[true]), ("where they differ", of_differences[kinds])]
        for number, words in enumerate(("as labelled", "another class", "of no class in the file")):
            if share := np.count_nonzero(kinds == number) / len(kinds):
                differences.append((words, f"{picture.share_words(share)} %", of_differences[number]))
    occurring = []
    for name, color, *of_class in zip(names, colors, *shares, strict=True):
        if any(of_class):
            words = ", labels ".join(f"{picture.share_words(share)} %" for share in of_class)
            occurring.append((name, words, color))
    scores = segmented.scores
    subtitle = f"{len(classes):,} points"
    if scores:
        subtitle += f" · mIoU {scores['miou']:.3f}{classes_in_mean(scores)}, accuracy {scores['accuracy']:.3f}"
    legend = [group for group in (occurring, differences) if group]
    picture.draw_classes(path, title, subtitle, segmented.cloud, panels, legend, theme=theme, unit=unit, width=width)


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
