"""Segmentation of a scan file: a trained network labels its points, and a copy with these labels is written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.config import KpcoreWarning, free_memory
from kpcore.console import classes_in_mean
from kpcore.io.cloud import Cloud
from kpcore.io.formats import check_out, label_field, write_labels, write_to
from kpcore.pipeline import blocks, statistics, voting
from kpcore.pipeline.colors import named_colors
from kpcore.pipeline.data import IGNORED, class_numbers, part_numbers, read_cloud, scaled
from kpcore.pipeline.labelling import Labelled, check_category, chosen_method, label

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from kpcore.pipeline.model import Model
    from kpcore.pipeline.settings import Settings

__all__ = ["Segmented", "compare", "draw", "segment", "write_labels"]


class Segmented(NamedTuple):
    """The predicted classes of a cloud's points, compared with its labels."""

    cloud: Cloud | None  #: None for digits
    classes: np.ndarray  #: (N,) predicted class numbers of the cloud's points
    counts: np.ndarray  #: (classes,) number of points of each predicted class; of `segment`, those that it wrote
    true: np.ndarray | None  #: (N,) class numbers by the labels in the file, IGNORED where these are of no class
    scores: voting.Scores | None  #: of the predicted classes; None without labels
    labelled: Labelled | None = None  #: with the confidence, and with what makes the classes doubtful


def segment(model: Model, source: str | os.PathLike[str], out: str | os.PathLike[str], *, method: str | None = None,
            votes: int | None = None, category: str | None = None, keep: Sequence[int] = (), into: str | None = None,
            confidence: bool = False, unclassified: float | None = None, ignore: Sequence[int | str] = (),
            scale: tuple[float, float] | str | None = None, report: Callable[[str], object] | None = None,
            watch: Callable[[float], object] | None = None) -> Segmented:  # fmt: skip
    """Label the points of a file, and write a copy with these labels; everything else in it stays the same.

    Parameters
    ----------
    model : Model
    source, out : path
        See `kpcore.io.write_labels`.
    method : {"blocks", "potentials"}, optional
        See `Model.predict`, as for `votes`, `category` and `watch`.
    keep : sequence of int
        Points that have one of these labels in the file keep it.
    into : str, optional
        The field that the labels are written to, an existing or a new one.
    confidence : bool
        Whether a field ``confidence`` is written too: the probability of the label in per cent, uint8; 0 for points
        that keep their label.
    unclassified : float, optional
        Points with a smaller probability get the label 1 in LAS and LAZ, unclassified in ASPRS's table, elsewhere 0.
    ignore : sequence of int and str
        Points with these labels or flags are not in the input, and keep their label; in a new field they have 0. See
        `kpcore.io.read`.
    scale : (float, float) or "auto", optional
        Factors of x and y, and of z, to the unit of the training; "auto": as the file and the model state their units.
    report : function, optional
        Is called with lines of text before the work: how many blocks there are, and what they need; and what is not as
        usual.

    Returns
    -------
    Segmented

    Raises
    ------
    MemoryError
        If a block needs more memory than there is.

    Warns
    -----
    KpcoreWarning
        The input is unlike that of the training; each is in ``Segmented.labelled.warnings`` too.
    """
    check_category(model, category)
    chosen_method(model, method, votes)
    check_out(source, out)
    if unclassified is not None and not 0 < unclassified <= 1:
        raise ValueError(f"unclassified: expected a probability above 0, at most 1, got {unclassified}")
    cloud = read_cloud(model.settings, source, labelled=False, exact=True, ignore=ignore)
    if scale is not None:
        cloud = scaled(cloud, *(unit_scale(model, cloud) if scale == "auto" else scale))
    values, kept = model.label_values, np.ones(len(cloud.points), bool) if cloud.kept is None else cloud.kept
    doubtful = 1 if Path(out).suffix.lower() in (".las", ".laz") else 0
    more = {"confidence": np.uint8} if confidence else {}
    field = label_field(  # checks before the work
        source, out, len(kept), label=None if into else model.settings.data.label, into=into, extra=more,
        values=[*values, *([] if unclassified is None else [doubtful]), *(keep if into else ())],
        columns=model.settings.data.columns
    )  # fmt: skip
    true = None
    if cloud.labels is not None and category is not None:
        true = part_numbers(model.settings, source, cloud.labels, [*model.settings.heads].index(category))
    elif cloud.labels is not None:
        true = class_numbers(model.settings, cloud.labels)
    if category is None:
        tell(model, cloud, method, votes, report)
    labelled = label(model, cloud, mode=method, votes=votes, category=category, advise=scale is None,
                     watch=watch)  # fmt: skip
    for message in labelled.warnings:
        warnings.warn(f"{source}: {message}", KpcoreWarning, stacklevel=2)
    labels, is_of_class = values[labelled.classes], np.ones(len(labelled.classes), bool)
    ignored = sum(number for name, number in cloud.dropped.items() if name != "zeros")
    if ignored:
        what = "keep their label" if into is None else f"have 0 in {into}, unless they had another value there"
        labelled.notes.append(f"{ignored:,} points are ignored and {what}")
    if unclassified is not None:
        is_of_class = labelled.confidence >= unclassified
        labels[~is_of_class] = doubtful
        also = [name for name, value in zip(model.classes, values, strict=True) if value == doubtful]
        labelled.notes.append(f"{np.count_nonzero(~is_of_class):,} points have a smaller probability and get the label "
                              f"{doubtful}{f', which the class {also[0]} has too' if also else ''}")  # fmt: skip
    written = {"confidence": np.round(100 * labelled.confidence).astype(np.uint8)} if confidence else {}
    if keep and cloud.labels is not None:
        changes = ~np.isin(cloud.labels, keep)
        is_of_class &= changes
        labelled.notes.append(f"{np.count_nonzero(~changes):,} points keep their label")
        labels[~changes] = cloud.labels[~changes]  # written too, as the field may be a new one
        written = {name: np.where(changes, of_points, 0) for name, of_points in written.items()}
    write_to(field, source, out, labels, kept, written)
    counts = np.bincount(labelled.classes[is_of_class], minlength=model.net.num_classes)
    return compare(model, cloud, true, labelled.classes, category)._replace(counts=counts, labelled=labelled)


def tell(model: Model, cloud: Cloud, method: str | None, votes: int | None,
         report: Callable[[str], object] | None) -> None:  # fmt: skip
    """Report what blocks need; an error if it is more memory than there is."""
    notes: list[str] = []
    if chosen_method(model, method, votes)[0] == "blocks":
        plan, size = blocks.plan(model, cloud, np.arange(len(cloud.points))), model.block_size
        number = f"{plan.blocks:,} block{'s' * (plan.blocks != 1)} of {size.side:g}"
        notes = [f"{number} with a halo of {size.halo:g}, up to {plan.points:,} points, which need some "
                 f"{plan.memory / 2**30:.2g} GiB"]  # fmt: skip
        limit = free_memory()
        if plan.memory > limit:
            raise MemoryError(f"{notes[0]}, more than the {limit / 2**30:.2g} GiB there are; the method potentials has "
                              "smaller inputs")  # fmt: skip
        if model.net.norm in ("group", "instance"):
            notes.append(f"the network's {model.net.norm} normalisation is over the points of each block")
    for note in notes if report else ():
        report(note)


def unit_scale(model: Model, cloud: Cloud) -> tuple[float, float]:
    """Factors of x and y, and of z, from the unit that a file states to that of the training."""
    training = model.statistics.unit if model.statistics else [None, None]
    of_file = statistics.unit_of([cloud])
    for name, unit in (("the file states", of_file), ("the files of the training state", training)):
        if unit[0] is None:
            raise ValueError(f"scale: expected numbers rather than auto, since {name} no unit")
    horizontal = of_file[0] / training[0]
    return horizontal, of_file[1] / training[1] if of_file[1] and training[1] else horizontal


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
    names, colors = named_colors(names)
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
