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
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.io.scans import Scan
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


class Rules(NamedTuple):
    """Which label a point gets besides that of its class."""

    keep: tuple[int, ...] = ()  #: labels in the file that stay
    unclassified: float | None = None  #: points with a smaller probability get the label `doubtful`
    doubtful: int = 1

    def values(self, model: Model, is_new: bool) -> list[int]:
        """All labels that may be written; if the field is a new one also those that stay."""
        doubtful = [] if self.unclassified is None else [self.doubtful]
        return [*model.label_values.tolist(), *doubtful, *(self.keep if is_new else ())]

    def notes(self, model: Model, into: str | None, ignored: int, unclassified: int, stays: int) -> Iterator[str]:
        """In words, how many points have another label than that of their class."""
        if ignored:
            what = "keep their label" if into is None else f"have 0 in {into}, unless they had another value there"
            yield f"{ignored:,} points are ignored and {what}"
        if self.unclassified is not None:
            pairs = zip(model.classes, model.label_values, strict=True)
            also = [name for name, value in pairs if value == self.doubtful]
            too = f", which the class {also[0]} has too" if also else ""
            yield f"{unclassified:,} points have a smaller probability and get the label {self.doubtful}{too}"
        if self.keep:
            yield f"{stays:,} points keep their label"


def doubtful_label(out: str | os.PathLike[str]) -> int:
    """The label of points with a probability that is too small, in a file of this name."""
    return 1 if Path(out).suffix.lower() in (".las", ".laz") else 0


class Final(NamedTuple):
    """The labels of points as they are written."""

    labels: np.ndarray  #: (n,) int32
    percent: np.ndarray  #: (n,) uint8, the probability of the class; 0 for points that keep their label
    is_of_class: np.ndarray  #: (n,) bool, points with the label of their class
    unclassified: int  #: points with a probability that is too small
    stays: int  #: points that keep their label


def final_labels(model: Model, rules: Rules, classes: np.ndarray, confidence: np.ndarray,
                 in_file: np.ndarray | None) -> Final:  # fmt: skip
    """The labels of points of these classes, which have the labels `in_file` there, if any."""
    labels, is_of_class = model.label_values[classes], np.ones(len(classes), bool)
    percent, stays = np.round(100 * confidence).astype(np.uint8), np.zeros(len(classes), bool)
    if rules.unclassified is not None:
        is_of_class = confidence >= rules.unclassified
        labels[~is_of_class] = rules.doubtful
    unclassified = int(np.count_nonzero(~is_of_class))
    if rules.keep and in_file is not None:
        stays = np.isin(in_file, rules.keep)
        labels[stays], percent[stays] = in_file[stays], 0  # written too, as the field may be a new one
        is_of_class &= ~stays
    return Final(labels, percent, is_of_class, unclassified, int(np.count_nonzero(stays)))


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
        cloud = scaled(cloud, *(unit_scale(model, [cloud]) if scale == "auto" else scale))
    kept = np.ones(len(cloud.points), bool) if cloud.kept is None else cloud.kept
    rules = Rules(tuple(keep), unclassified, doubtful_label(out))
    more = {"confidence": np.uint8} if confidence else {}
    field = label_field(  # checks before the work
        source, out, len(kept), label=None if into else model.settings.data.label, into=into, extra=more,
        values=rules.values(model, into is not None), columns=model.settings.data.columns
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
    final = final_labels(model, rules, labelled.classes, labelled.confidence, cloud.labels)
    ignored = sum(number for name, number in cloud.dropped.items() if name != "zeros")
    labelled.notes.extend(rules.notes(model, into, ignored, final.unclassified, final.stays))
    write_to(field, source, out, final.labels, kept, {"confidence": final.percent} if confidence else {})
    counts = np.bincount(labelled.classes[final.is_of_class], minlength=model.net.num_classes)
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


def unit_scale(model: Model, clouds: Sequence[Cloud | Scan]) -> tuple[float, float]:
    """Factors of x and y, and of z, from the unit that files state to that of the training."""
    training = model.statistics.unit if model.statistics else [None, None]
    of_file = statistics.unit_of(clouds)
    what = "the file states" if len(clouds) == 1 else "the files state"
    for name, unit in ((what, of_file), ("the files of the training state", training)):
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
