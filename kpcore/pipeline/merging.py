"""The labelled copy of a file of a survey, written block by block from the results of its groups."""

from __future__ import annotations

import functools
import json
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpcore.files import replacing
from kpcore.io import ReadError, scans
from kpcore.io.cloud import Request
from kpcore.io.formats import label_field, why_no_pieces, write_pieces
from kpcore.nn import checkpoints
from kpcore.pipeline import groups
from kpcore.pipeline.data import IGNORED, class_numbers
from kpcore.pipeline.overview import Overview
from kpcore.pipeline.segmentation import final_labels
from kpcore.pipeline.voting import confusion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kpcore.io.cloud import LabelField
    from kpcore.pipeline.blocks import Cells
    from kpcore.pipeline.groups import Job


# What is known of a copy, by name.
ABOUT = ("counts", "confusion", "ignored", "stays", "unclassified", "close", "made_of", "size", "warnings")


class Labels(NamedTuple):
    """The classes of consecutive points of a file."""

    classes: np.ndarray  #: (n,) class numbers, IGNORED for points that are in no block
    confidence: np.ndarray  #: (n,) float32, 0 for those
    probabilities: np.ndarray | None  #: (n, classes) float32, NaN for those


class Results:
    """The results of groups for one file, read piece by piece."""

    def __init__(self, job: Job, number: int, cells: Sequence[Cells]) -> None:
        self.lattices, self.num_classes = job.options.lattices, job.model.net.num_classes
        self.keeps_probabilities, self._parts, self.close = job.options.probabilities is not None, [], 0
        for one in cells:
            path = groups.result_path(job, one)
            if (of_file := _of_group(str(path), os.stat(path).st_mtime_ns).get(job.files[number].name)) is not None:
                self._parts.append(of_file)
                self.close += int(of_file["close"][0])

    def labels(self, first: int, number: int) -> Labels:
        """The labels of `number` points from row `first`."""
        classes, confidence = np.full(number, IGNORED, np.int64), np.zeros(number, np.float32)
        total = np.full((number, self.num_classes), np.nan, np.float32) if self.keeps_probabilities else None
        sums: dict[str, list[np.ndarray]] = {"rows": [], "total": []}
        for part in self._parts:
            checkpoints.leave_memory(part["rows"])  # read once, from the first row to the last
            begin, end = np.searchsorted(part["rows"], [first, first + number])
            rows = part["rows"][begin:end] - first
            classes[rows], confidence[rows] = part["classes"][begin:end], part["confidence"][begin:end]
            if total is not None:
                total[rows] = part["probabilities"][begin:end]
            begin, end = np.searchsorted(part["part_rows"], [first, first + number])
            sums["rows"].append(part["part_rows"][begin:end] - first)
            sums["total"].append(part["part_total"][begin:end])
        if sums["rows"] and (rows := np.concatenate(sums["rows"])).size:
            order = np.argsort(rows, kind="stable")
            rows, starts, counts = np.unique(rows[order], return_index=True, return_counts=True)
            if not (counts == self.lattices).all():
                raise RuntimeError(f"{int((counts != self.lattices).sum())} points lack the result of a lattice")
            shares = np.add.reduceat(np.concatenate(sums["total"])[order], starts, axis=0) / self.lattices
            classes[rows], confidence[rows] = shares.argmax(axis=1), shares.max(axis=1)
            self.close += int(np.count_nonzero(groups.are_close(shares)))
            if total is not None:
                total[rows] = shares
        return Labels(classes, confidence, total)


@functools.lru_cache(maxsize=16)
def _of_group(path: str, modified: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a group by file, kept for the next files: the header lists all files of a group."""
    return checkpoints.read(path, mapped=True)[0]


def close_results() -> None:
    """Close the results that are open in this process."""
    _of_group.cache_clear()


def field_of(job: Job, number: int) -> LabelField:
    """Where the labels of a file are written; an error if they cannot be."""
    source, options = job.files[number], job.options
    extra = {"confidence": np.uint8} if options.confidence else {}
    field = label_field(
        source.path, source.out, source.points, label=None if options.into else options.label, into=options.into,
        values=job.rules.values(job.model, options.into is not None), extra=extra,
        columns=job.model.settings.data.columns,
    )  # fmt: skip
    if field.write_pieces is None:
        raise ReadError(f"{source.path}: {why_no_pieces(source.path, source.out)}")
    return field


def write_file(job: Job, number: int, cells: Sequence[Cells], made_of: str) -> dict[str, Any]:
    """Write the labelled copy of a file from the results of groups, and then what is known of it as JSON.

    `made_of` says which results these are.
    """
    source, options, model, scan = job.files[number], job.options, job.model, job.scan(number)
    groups.check_unchanged(job, number)
    results, rules = Results(job, number, cells), job.rules
    request, num_classes = Request(label=job.label(scan)), model.net.num_classes
    counts, matrix = np.zeros(num_classes, np.int64), np.zeros((num_classes, num_classes), np.int64)
    notes = {"ignored": 0, "stays": 0, "unclassified": 0}
    has_labels = False
    overview = Overview(job.low, job.high, num_classes)

    def pieces(first: int, records: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        nonlocal has_labels
        labels = results.labels(first, len(records))
        content = scans.decoded(scan, records, request)
        chosen = labels.classes != IGNORED
        classes, confidence = labels.classes[chosen], labels.confidence[chosen]
        in_file = None if content.labels is None else content.labels[chosen]
        final = final_labels(model, rules, classes, confidence, in_file)
        if in_file is not None:
            has_labels |= bool(content.labels.any())
            matrix[:] += confusion(class_numbers(model.settings, in_file), classes, num_classes)
        counts[:] += np.bincount(classes[final.is_of_class], minlength=num_classes)
        ignored = np.count_nonzero(scans.are_points(content.points) & ~chosen)
        for name, value in (("ignored", ignored), ("stays", final.stays),
                            ("unclassified", final.unclassified)):  # fmt: skip
            notes[name] += int(value)
        overview.add(content.points[:, :2] * np.array(options.scale[:2]), labels.classes)
        if store:
            store.append(labels.probabilities)
        return chosen, final.labels, {"confidence": final.percent} if options.confidence else {}

    with ExitStack() as stack:
        store = stack.enter_context(job.store.writer(source.path, source.points)) if options.probabilities else None
        differs = write_pieces(field_of(job, number), source.path, source.out, pieces)
    try:
        groups.check_unchanged(job, number)  # records of another file would have these labels
    except groups.FileFailed:
        os.remove(source.out)
        raise
    folder = job.folder / "files"
    folder.mkdir(exist_ok=True)
    overview.save(folder / f"{source.name}.npz")
    about = {
        "counts": counts.tolist(), "confusion": matrix.tolist() if has_labels else None, **notes,
        "close": results.close, "made_of": made_of, "size": os.stat(source.out).st_size,
        "warnings": differs,
    }  # fmt: skip
    with replacing(folder / f"{source.name}.json") as part:
        part.write_text(json.dumps(about))
    return about
