"""Labels of a survey of LAS, LAZ and COPC files that need not fit into memory, on one machine or many.

A survey is labelled as if it were one cloud: the input of a block is every point of its cell and halo, of whatever
file. One pass puts the points of files without an index into cells on disk (`tiles`); groups of blocks are tasks of an
engine (`groups`, `engines`); a file is written when all groups that it touches are done (`merging`). Files, memory,
threads, workers and resumption choose which blocks are computed where, and no label depends on them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy

from kpcore import config, nn
from kpcore.backends import checks
from kpcore.config import KpcoreWarning, free_memory
from kpcore.files import replacing
from kpcore.io import ReadError, scans
from kpcore.io.cloud import name_index
from kpcore.nn import checkpoints
from kpcore.pipeline import blocks, engines, groups, merging, statistics, surveys, tiles, voting
from kpcore.pipeline.blocks import Cells
from kpcore.pipeline.data import check_projected, feature_reach, fields_of
from kpcore.pipeline.groups import FileFailed, Job, Options, Source
from kpcore.pipeline.labelling import chosen_method
from kpcore.pipeline.model import Model
from kpcore.pipeline.segmentation import unit_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Executor

    from kpcore.io.scans import Scan
    from kpcore.pipeline.engines import Engine

MANIFEST, SUMMARY, PICTURE, PROBABILITIES = "segment.json", "summary.json", "overview.png", "probabilities.zarr"
_FORMAT = 1  # of the manifest and of the results of groups
_INTERPRETER = 250 << 20  # bytes of a worker with its libraries, before a model
_MOST_IN_GROUP = 4_000_000  # points: what a killed worker repeats takes a minute or two
_TASKS_OF_WORKER = 6  # groups for each worker at least, so that none is idle at the end
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # errors of the disk rather than of a file


class Written(NamedTuple):
    """A labelled file."""

    source: str
    out: str
    points: int
    counts: dict[str, int]  #: of the labels that were written, by class
    confusion: np.ndarray | None  #: rows are classes by the labels in the file; None without labels
    notes: list[str]


class Survey(NamedTuple):
    """What `segment_tiles` did."""

    files: list[Written]
    failed: dict[str, str]  #: why, by source
    counts: dict[str, int]
    confusion: np.ndarray | None
    scores: voting.Scores | None
    warnings: list[str]  #: why labels may not be trusted
    notes: list[str]
    seconds: dict[str, float]  #: "all", and of all workers together "tiling", "reading", "labelling", "writing"
    points: int  #: that were labelled now, not in an earlier run that was resumed
    peak_memory: int  #: bytes, of this process and its workers
    groups: int
    close: int  #: points with two classes within 1e-4: those that a GPU may label otherwise


def segment_tiles(model: Model | str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]],
                  out: str | os.PathLike[str], *, memory: int | None = None,
                  scratch: str | os.PathLike[str] | None = None, resume: bool = False, workers: int = 0,
                  dask: str | None = None, client: Any = None, executor: Executor | None = None,
                  format: str | None = None, keep: Sequence[int] = (), into: str | None = None,
                  confidence: bool = False, unclassified: float | None = None, probabilities: bool = False,
                  ignore: Sequence[int | str] = (), scale: tuple[float, float] | str | None = None,
                  report: Callable[[str], object] | None = None,
                  watch: Callable[[str, float, str], object] | None = None) -> Survey:  # fmt: skip
    """Label LAS, LAZ and COPC files as one survey, and write a labelled copy of each.

    Labels are equal to the bit however the survey is cut into files, and whatever the memory, the workers and the
    interruptions, on processors of one instruction set; all workers use the best that all of them have. Points that
    several files have, equal in coordinates, GPS time and number of the return, count once and are labelled in each.

    Parameters
    ----------
    model : Model or path
    sources : sequence of path
        Files of one survey, in one unit. They are not changed.
    out : path
        A folder for the copies, with the names of the files; a COPC becomes a plain LAZ. Also ``summary.json``, and
        ``overview.png`` if matplotlib is installed. For one file also the name of its copy, with an extension.
    memory : int, optional
        Bytes that this process and its workers may take; half of what is free by default. It decides how many blocks
        are read together, not the result.
    scratch : path, optional
        A folder for points and results until the end, which all workers reach; `out` by default.
    resume : bool
        Go on from an earlier run in `out` that was interrupted or in which files failed. Options, model, version and
        instruction set must be the same. Files that have changed or are new are labelled again, and their neighbours.
    workers : int
        Processes of this machine; 0: this process, with all threads.
    dask : str, optional
        The address of a scheduler, or ``"local:4"`` for four workers on this machine.
    client : distributed.Client, optional
    executor : concurrent.futures.Executor, optional
        Its workers read and write the same folders as this process.
    format : {"las", "laz"}, optional
        Of the copies; by default as the files.
    keep, into, confidence, unclassified, ignore, scale
        See `kpcore.pipeline.segmentation.segment`.
    probabilities : bool
        Whether the probabilities of all classes are written to ``probabilities.zarr`` in `out`.
    report : function, optional
        Is called with lines of text.
    watch : function, optional
        Is called with ("reading" or "labelling", the fraction that is done, a note).

    Returns
    -------
    Survey
        Files that cannot be read are in ``failed``; all others are labelled without their points.

    Raises
    ------
    ValueError
        For sources, options or a model that do not fit, and if `memory` or the disk is too small; nothing is done.
    OSError
        The disk is full, or fails. What is done stays, for `resume`.

    Warns
    -----
    KpcoreWarning
        The input is unlike that of the training; each is in ``Survey.warnings`` too.

    Examples
    --------
    >>> from kpcore.pipeline import segment_tiles
    >>> survey = segment_tiles("best.safetensors", ["tiles/a.laz", "tiles/b.laz"], "labelled")  # doctest: +SKIP
    >>> survey.counts  # doctest: +SKIP
    {'ground': 8123456, 'building': 2345678, 'vegetation': 3456789}
    """
    begin = time.perf_counter()
    chosen = [name for name, value in (("workers", workers), ("dask", dask), ("client", client),
                                       ("executor", executor)) if value]  # fmt: skip
    if len(chosen) > 1:
        raise ValueError(f"{chosen[1]}: expected one engine, got {chosen[0]} too")
    say = report or (lambda line: None)
    path = None if isinstance(model, Model) else Path(model)
    model = Model.load(path) if path else model
    if chosen_method(model)[0] != "blocks":
        raise ValueError("model: expected one that labels in blocks, got one with the feature local or with votes")
    run = _Run(model, path, _copies(sources, out, format), Path(out), scratch, say, watch)
    with _engine(workers, dask, client, executor, memory) as engine:
        run.prepare(
            engine, memory=memory, resume=resume, keep=keep, into=into, confidence=confidence,
            unclassified=unclassified, probabilities=probabilities, ignore=ignore, scale=scale,
        )  # fmt: skip
        run.label(engine)
    return run.finish(begin)
