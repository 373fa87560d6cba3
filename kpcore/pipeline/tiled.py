"""Labels of files that need not fit into memory, on one machine or many: a survey of LAS, LAZ and COPC, or one file.

A survey is labelled as if it were one cloud: the input of a block is every point of its cell and halo, of whatever
file. One pass puts the points of files without an index into cells on disk (`tiles`); groups of blocks are tasks of an
engine (`groups`, `engines`); a file is written when all groups that it touches are done (`merging`). Files, memory,
threads, workers and resumption choose which blocks are computed where, and no label depends on them.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from kpcore import config, nn
from kpcore.backends import checks
from kpcore.config import KpcoreWarning, free_memory
from kpcore.console import counted, plain
from kpcore.files import replacing
from kpcore.io import ReadError, copc, scans
from kpcore.io.cloud import Request, name_index
from kpcore.io.formats import WRITERS
from kpcore.nn import checkpoints
from kpcore.pipeline import blocks, engines, filenames, groups, merging, statistics, surveys, tiles, voting
from kpcore.pipeline.blocks import LATTICES, Cells
from kpcore.pipeline.data import check_projected, fields_of
from kpcore.pipeline.groups import FileFailed, Job, Options, Source
from kpcore.pipeline.labelling import chosen_method
from kpcore.pipeline.model import Model
from kpcore.pipeline.overview import Overview
from kpcore.pipeline.probabilities import create_store
from kpcore.pipeline.segmentation import unit_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Executor

    from kpcore.io.scans import Scan
    from kpcore.pipeline.engines import Engine

Paths: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

MANIFEST, SUMMARY, PICTURE, PROBABILITIES = "segment.json", "summary.json", "overview.png", "probabilities.zarr"
_FORMAT = 1  # of the manifest and of the results of groups
_INTERPRETER = 250 << 20  # bytes of a worker with its libraries, before a model
_MOST_IN_GROUP = 8_000_000  # points: what a killed worker repeats takes a minute or two
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


def segment_tiles(model: Model | str | os.PathLike[str], sources: Paths, out: str | os.PathLike[str], *,
                  around: Paths = (), memory: int | None = None,
                  scratch: str | os.PathLike[str] | None = None, resume: bool = False, workers: int = 0,
                  dask: str | None = None, client: Any = None, executor: Executor | None = None,
                  format: str | None = None, keep: Sequence[int] = (), into: str | None = None,
                  confidence: bool = False, unclassified: float | None = None, probabilities: bool = False,
                  ignore: Sequence[int | str] = (), scale: tuple[float, float] | str | None = None,
                  theme: str = "dark", report: Callable[[str], object] | None = None,
                  watch: Callable[[str, float, str], object] | None = None) -> Survey:  # fmt: skip
    """Label LAS, LAZ and COPC files as one survey, or a single PLY, NPY or NPZ, and write a labelled copy of each.

    Labels are equal to the bit however the survey is cut into files, and whatever the memory, the workers and the
    interruptions, on processors of one instruction set; all workers use the best that all of them have. Points that
    several files have, equal in coordinates, GPS time and number of the return, count once and are labelled in each.

    Parameters
    ----------
    model : Model or path
    sources : path or sequence of path
        Files of one survey, in one unit, folders and patterns. They are not changed.
    out : path
        A folder for the copies, with the names of the files; a COPC becomes a plain LAZ. Also ``summary.json``, and
        ``overview.png`` if matplotlib is installed. For one file also the name of its copy, with an extension; see
        `kpcore.io.formats.why_no_pieces` for those that there can be.
    around : path or sequence of path
        Further files of the survey, folders and patterns, of which the points near `sources` are in the input, and
        which are not labelled; `sources` among them are labelled.
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
        Of the copies, of one file also another; by default as the files.
    keep, into, confidence, unclassified, ignore, scale
        See `kpcore.pipeline.segmentation.segment`.
    probabilities : bool
        Whether the probabilities of all classes are written to ``probabilities.zarr`` in `out`.
    theme : {"dark", "light"}
        Of the picture.
    report : function, optional
        Is called with lines of text.
    watch : function, optional
        Is called with ("reading" or "labelling", the fraction that is done, a note); and after each task with
        ("worker", 0, what was done where).

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
    chosen_method(model, "blocks")
    sources, around = _listed_files(sources), _listed_files(around)
    copies: dict[Path, Path | None] = {**copies_of(sources, out, format)}
    labelled = {os.path.realpath(source) for source in copies}
    for other in map(Path, around):
        if other.suffix.lower() not in scans.EXTENSIONS or not other.exists():
            raise ValueError(f"around: expected LAS, LAZ and COPC files, got {other}")
        if os.path.realpath(other) not in labelled:  # as those of a folder are
            copies[other] = None
    run = _Run(model, path, copies, Path(out), scratch, theme, say, watch)
    with _engine(workers, dask, client, executor, memory) as engine, run.refused():
        run.prepare(
            engine, memory=memory, resume=resume, keep=keep, into=into, confidence=confidence,
            unclassified=unclassified, probabilities=probabilities, ignore=ignore, scale=scale,
        )  # fmt: skip
        if not run.is_complete:
            run.label(engine)
    return run.finish(begin)


def _listed_files(names: Paths) -> list[str]:
    """The files that names, of files, folders and patterns, stand for."""
    names = [names] if isinstance(names, (str, os.PathLike)) else names
    return [file for name in names for file in filenames.matching(name)]


def _engine(workers: int, dask: str | None, client: Any, executor: Executor | None, memory: int | None) -> Engine:
    """The engine that the arguments name."""
    if dask is not None or client is not None:
        return engines.dask(client if dask is None else dask)
    if executor is not None:
        return engines.executor(executor)
    return engines.processes(checks.integer("workers", workers, 1)) if workers else engines.here()


def copies_of(sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str],
              format: str | None) -> dict[Path, Path]:  # fmt: skip
    """The copy of each source."""
    if format is not None:
        formats = scans.EXTENSIONS if len(sources) > 1 else [*WRITERS]
        checks.choice("format", format, tuple(suffix[1:] for suffix in formats))
    sources, out = [Path(source) for source in sources], Path(out)
    if not sources:
        raise ValueError("sources: expected at least one file, got none")
    others = [source for source in sources if source.suffix.lower() not in scans.EXTENSIONS]
    if len(sources) > 1 and others:
        raise ValueError(f"sources: expected one file, or LAS, LAZ and COPC files, got {others[0]} among others")
    if len(sources) == 1 and _is_name_of_copy(out):
        return {sources[0]: out}
    copies = {source: out / filenames.copy_name(source, format) for source in sources}
    filenames.check_copies(copies)
    return copies


def is_under_way(out: str | os.PathLike[str]) -> bool:
    """Whether `segment_tiles` has begun to label to `out`, and has not come to its end."""
    try:
        return json.loads(_manifest_path(Path(out)).read_text())["state"] == "running"
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _manifest_path(out: Path) -> Path:
    """The manifest beside the copies in a folder, or beside the copy of one file."""
    return out.with_suffix(".segment.json") if _is_name_of_copy(out) else out / MANIFEST


def _is_name_of_copy(out: Path) -> bool:
    """Whether it is the name of the copy of a single file, rather than that of a folder."""
    return out.suffix.lower() in WRITERS and not out.is_dir()


class _Run:
    """A survey from the headers of its files to its summary."""

    def __init__(self, model: Model, model_path: Path | None, copies: Mapping[Path, Path | None], out: Path,
                 scratch: str | os.PathLike[str] | None, theme: str, say: Callable[[str], object],
                 watch: Callable[[str, float, str], object] | None) -> None:  # fmt: skip
        self.model, self.model_path, self.copies, self.theme, self.say = model, model_path, copies, theme, say
        self.manifest_path = _manifest_path(out)
        self.out = self.manifest_path.parent
        self.watch = watch or (lambda what, done, note: None)
        self.is_alone = self.out != out
        name = f"{out.stem}.segment" if self.is_alone else "segment"
        self.folder = Path(scratch or self.out).absolute() / f".{name}-{groups.hashed(os.path.realpath(self.out))[:8]}"
        self.failed: dict[int, str] = {}  # why a file cannot be labelled, by its number
        self.scans: dict[int, Scan] = {}
        self.seconds = {"tiling": 0.0, "reading": 0.0, "labelling": 0.0, "writing": 0.0}
        self.peaks: dict[tuple[str, int], int] = {}
        self.points, self.is_new, self.has_begun, self.open_files = 0, False, False, ExitStack()

    def _beside(self, name: str) -> str:
        """The name of a result beside the copies, with that of the copy where it is a file by itself."""
        return f"{self.manifest_path.name.partition('.segment.json')[0]}.{name}" if self.is_alone else name

    # ---- before the work

    @contextmanager
    def refused(self) -> Iterator[None]:
        """Leave nothing behind if the block raises an error before any work is done."""
        was_there = self.out.exists()
        try:
            with self.open_files:
                yield
        except BaseException:
            if self.is_new and not self.has_begun:
                shutil.rmtree(self.folder, ignore_errors=True)
                if not was_there:
                    with suppress(OSError):
                        self.out.rmdir()
            raise

    def prepare(self, engine: Engine, *, memory: int | None, resume: bool, scale: tuple[float, float] | str | None,
                ignore: Sequence[int | str], keep: Sequence[int], into: str | None, confidence: bool,
                unclassified: float | None, probabilities: bool) -> None:  # fmt: skip
        """Check everything, put points into cells, and plan groups."""
        self._open()
        opened = [self.scans[number] for number in sorted(self.scans)]
        surveys.decide(opened, together=True)
        if scale == "auto":
            scale = unit_scale(self.model, opened)
        factors = [1.0, 1.0, 1.0] if scale is None else [float(scale[0]), float(scale[0]), float(scale[1])]
        if unclassified is not None and not 0 < unclassified <= 1:
            raise ValueError(f"unclassified: expected a probability above 0, at most 1, got {unclassified}")
        if probabilities:
            config.require("zarr", "zarr")
        store = None
        if probabilities:
            store = str(self.manifest_path.absolute().with_name(self._beside(PROBABILITIES)))
        options = Options(
            self._fields(), self.model.settings.data.label, [*self.model.settings.data.ignore, *ignore],
            self.model.settings.data.drop_zeros, factors, None, self.model.block_size.lattices, [*keep], into,
            confidence, unclassified, store,
        )  # fmt: skip
        self.machines = engine.machines()
        self.instruction_set = engines.common_instruction_set(self.machines)
        self.files = [self._source(number, source, copy) for number, (source, copy) in enumerate(self.copies.items())]
        shown = [scan for number, scan in self.scans.items() if self.files[number].out] or opened
        low = np.min([scan.low for scan in shown], axis=0) * factors
        high = np.max([scan.high for scan in shown], axis=0) * factors
        self.out.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier(options) if resume else None
        self.earlier = earlier or {}
        if earlier and isinstance(earlier.get("scratch"), str) and Path(earlier["scratch"]).is_dir():
            self.folder = Path(earlier["scratch"])
        self.job = Job(self.folder, self.files, options, low[:2].tolist(), high[:2].tolist())
        self.job.__dict__["model"] = self.model
        if self._is_complete():
            number = len(self.written)
            self.say(f"the {counted(number, 'file')} {'are' if number > 1 else 'is'} done already")
            return
        self._make_folder(earlier)
        for number in [*self.scans]:
            if self.files[number].out:
                try:
                    merging.field_of(self.job, number)
                except ReadError as error:
                    self._leave_out(number, error)
        self._check_disk()
        if not self._has_cells(earlier):
            self._sort(engine, memory)
        self.job.__dict__.pop("tiles", None)
        self.job.tiles.without(self.failed)
        self._plan(engine, memory)

    def _open(self) -> None:
        warned: dict[str, list[Path]] = {}
        for number, source in enumerate(self.copies):
            try:
                data = self.model.settings.data
                scan = scans.opened(os.path.abspath(source), data.columns)
                check_projected(source, scan.reference)
                if scan.is_copc:
                    copc.nodes(scan)
                if scan.low is None:
                    is_named = data.label and name_index(scan.names, data.label) is not None
                    scan = scans.measured(scan, data.label if is_named else None)
            except ReadError as error:
                self.failed[number] = str(error)
            else:
                self.scans[number] = scan
                if scan.warning:
                    warned.setdefault(scan.warning, []).append(source)
        _warn(warned)
        if not self.scans:
            raise ReadError(next(iter(self.failed.values())))
        if self.failed:
            self.say(f"{len(self.failed):,} of {counted(len(self.copies), 'file')} cannot be read, and "
                     f"{'is' if len(self.failed) == 1 else 'are'} left out")  # fmt: skip

    def _fields(self) -> list[str]:
        """The fields of the features, which must be the same in all files."""
        settings, fields, first = self.model.settings, None, None
        warned: dict[str, list[str]] = {}
        for number, scan in [*self.scans.items()]:
            of_file, unused = fields_of(settings, scan.names)
            try:
                scans.needed(scan, Request(tuple(of_file)))
                if "color" in settings.data.features and not scan.has_colors:
                    raise ReadError(f"{scan.path}: has no colours, but color is one of the features")
            except ReadError as error:
                self._leave_out(number, error)
                continue
            for name in unused:
                unused_field = f"its field {name} is not used, since the feature {name} is computed"
                warned.setdefault(unused_field, []).append(scan.path)
            types = [(name, scan.dimensions[name_index(scan.names, name)].holds) for name in of_file]
            if fields is None:
                fields, first = types, scan
            elif types != fields:
                raise ValueError(f"sources: expected the same fields in all files of a survey, got {_words(fields)} in "
                                 f"{first.path} and {_words(types)} in {scan.path}")  # fmt: skip
        _warn(warned)
        return [name for name, _ in fields]

    def _leave_out(self, number: int, error: ReadError) -> None:
        """List a file as failed; an error if there is no other."""
        self.failed[number] = str(error)
        del self.scans[number]
        if not self.scans:
            raise error

    def _source(self, number: int, source: Path, copy: Path | None) -> Source:
        scan, box, out = self.scans.get(number), None, os.path.abspath(copy) if copy else ""
        if scan is None:
            return Source(os.path.abspath(source), 0, 0, 0, out)
        if scan.is_copc:
            nodes = copc.nodes(scan)
            box = [*nodes.low[:, :2].min(axis=0).tolist(), *nodes.high[:, :2].max(axis=0).tolist()]
        return Source(scan.path, scan.size, scan.modified, scan.num_points, out, box, scan.telling.hex())

    def _check_disk(self) -> None:
        """Say what disk is needed; an error if it is more than is free."""
        needs: dict[int, list[Any]] = {}
        plain = [scan for number, scan in self.scans.items() if self.files[number].box is None]
        points, classes = sum(scan.num_points for scan in self.scans.values()), self.model.net.num_classes
        per_point = 12 + 4 * classes * (0.4 if self.model.block_size.lattices > 1 else 0)
        scratch = tiles.bytes_on_disk(plain) + int(points * per_point)
        copies = sum(scan.size + 5 * scan.num_points for number, scan in self.scans.items() if self.files[number].out)
        for folder, number, what in ((self.folder, scratch, "points and results until the end"),
                                     (self.out, copies, "labelled files")):  # fmt: skip
            self.say(f"disk: some {_bytes(number)} for {what}, in {folder}")
            needs.setdefault(os.stat(folder).st_dev, [folder, 0])[1] += number
        # Of an earlier run, which is resumed.
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        for folder, number in needs.values():
            if number - there > (free := shutil.disk_usage(folder).free):
                raise ValueError(f"scratch: expected some {_bytes(number)} of free disk in {folder}, got "
                                 f"{_bytes(free)}; points and results may be in a folder on another disk")  # fmt: skip

    def _earlier(self, options: Options) -> dict[str, Any] | None:
        """The manifest of an earlier run; an error if that was another one."""
        try:
            earlier = json.loads(self.manifest_path.read_text())
        except FileNotFoundError:
            self.say("there is nothing to resume")
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{self.manifest_path}: expected the manifest of an earlier run, got {reason}") from None
        if not isinstance(earlier, dict):
            raise ValueError(f"{self.manifest_path}: expected the manifest of an earlier run, got other JSON")
        described = self._described(options)
        for name, value in described.items():
            if (before := earlier.get(name)) != value:
                if isinstance(value, dict) and isinstance(before, dict):
                    name, before, value = next((f"{name} {key}", before.get(key), value[key]) for key in value
                                               if before.get(key) != value[key])  # fmt: skip
                if name == "model":
                    before, value = "another one", "this model"
                advice = "without --resume, all files are labelled again"
                raise ValueError(f"resume: expected {name} {before}, as in {self.manifest_path}, got {value}; {advice}")
        return earlier

    def _described(self, options: Options) -> dict[str, Any]:
        """What labels depend on besides the files."""
        described = asdict(options)
        del described["wide_colors"]
        processor = f"{platform.machine()} {self.instruction_set}"
        return {"format": _FORMAT, "made_with": groups.made_with(), "instruction_set": processor,
                "model": self._model_hash(), "blocks": self.model.block_size._asdict(),
                "options": json.loads(json.dumps(described))}  # fmt: skip

    @functools.cache  # noqa: B019
    def _model_hash(self) -> str:
        if self.model_path:
            return hashlib.sha256(self.model_path.read_bytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(self.model.about(), sort_keys=True).encode())
        for name, array in sorted((self.model.params | self.model.state).items()):
            digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _is_complete(self) -> bool:
        """Whether an earlier run has labelled these files, and the copies are there."""
        done, wanted = self.earlier_files(), [source for source in self.files if source.out]
        self.is_complete = self.earlier.get("state") == "done" and {*done} == {source.key for source in wanted}
        self.is_complete &= self.earlier.get("around") == self._around()
        self.is_complete &= all(
            _size(source.out) == done[source.key]["size"] and self._has_probabilities(source)
            for source in wanted if source.key in done
        )  # fmt: skip
        if self.is_complete:
            self.written = {number: done[source.key] for number, source in enumerate(self.files) if source.out}
            self.abouts, self.groups = {}, []
        return self.is_complete

    def _around(self) -> list[str]:
        return [source.key for source in self.files if not source.out]

    def _make_folder(self, earlier: dict[str, Any] | None) -> None:
        if not earlier and self.folder.exists():
            self._lock()
            self.open_files.close()
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.is_new = not earlier  # after the lock: the folder of another run that is at work stays
        if self.model_path:
            with replacing(self.job.model_path) as part:  # workers of an earlier run may still have the file mapped
                shutil.copyfile(self.model_path, part)
        else:
            model = self.model
            nn.save(self.job.model_path, model.net, model.params, model.state, **model.about())
        if probabilities := self.job.options.probabilities:
            labels = self.model.label_values.tolist()
            create_store(probabilities, self.job.labelled_paths, self.model.classes, labels,
                         model=self._model_hash(), resume=bool(earlier))  # fmt: skip

    def _lock(self) -> None:
        """An error if another run works in the folder; the lock ends with the process."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = self.open_files.enter_context((self.folder / "lock").open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out: another run is labelling to {self.out}") from None
        except OSError:  # a file system without locks
            return

    def _write_manifest(self, state: dict[str, Any]) -> None:
        described = self._described(self.job.options) | {"scratch": str(self.folder), "limit": self.limit} | state
        with replacing(self.manifest_path) as part:
            part.write_text(json.dumps(described, indent=1))

    def _has_cells(self, earlier: dict[str, Any] | None) -> bool:
        """Whether an earlier run has put the points of these files into cells."""
        try:
            state = json.loads((self.folder / "cells.json").read_text())
        except (OSError, ValueError):
            return False
        expected = {"files": [source.key for source in self.files], "sizes": tiles.sizes(self.folder / "cells")}
        if not earlier or not isinstance(state, dict) or any(state.get(name) != expected[name] for name in expected):
            return False
        self.job.options = replace(self.job.options, wide_colors=state.get("wide_colors"))
        return True

    def _sort(self, engine: Engine, memory: int | None) -> None:
        """Put the points of files without an index into cells."""
        begin, widest = time.perf_counter(), 0
        needs_colors = "color" in self.model.settings.data.features
        numbers = [number for number in self.scans if self.files[number].box is None]
        total, done = max(1, sum(self.scans[number].num_points for number in numbers)), 0

        def see(number: int, records: np.ndarray) -> None:
            nonlocal widest
            if needs_colors:
                widest = max(widest, scans.widest_color(self.scans[number], records))

        def watch(points: int) -> None:
            nonlocal done
            done += points
            self.watch("reading", done / total, f"{done:,} points")

        (self.folder / "cells.json").unlink(missing_ok=True)
        side = self.model.block_size.side / tiles.CELLS_OF_BLOCK
        budget = self._memory(memory)
        needed = {number: scans.needed(self.scans[number], self.job.request(self.scans[number])) for number in numbers}
        scale, at_once = self.job.options.scale, min(1 << 30, budget // 6)
        failed = tiles.build(self.folder / "cells", self.scans, needed, side, scale, at_once, see, watch)
        for number, scan in self.scans.items():
            if needs_colors and self.files[number].box:
                try:
                    widest = max(widest, scans.widest_color(scan, next(scans.records(scan))[1]))  # a million points
                except ReadError as error:
                    failed[number] = str(error)
        self.failed |= failed
        if needs_colors and not widest:
            raise ReadError(f"{self.files[0].path}: its colours are all 0, but color is one of the features")
        self.job.options = replace(self.job.options, wide_colors=widest > 255 if needs_colors else None)
        if not failed:  # else they are read again by a run that goes on: it may have been the storage
            with replacing(self.folder / "cells.json") as part:
                part.write_text(json.dumps({
                    "files": [source.key for source in self.files], "sizes": tiles.sizes(self.folder / "cells"),
                    "wide_colors": self.job.options.wide_colors,
                }))  # fmt: skip
        self.seconds["tiling"] = time.perf_counter() - begin

    def _memory(self, memory: int | None) -> int:
        """Bytes for this process and its workers."""
        free = free_memory()
        if memory is None:
            return int(free / 2) if np.isfinite(free) else 2 << 30
        if memory > free:
            raise ValueError(f"memory: expected at most the {_bytes(free)} that are free, got {_bytes(memory)}")
        return memory

    def _memory_of_worker(self, engine: Engine, memory: int | None) -> int:
        """Bytes for each worker: of `memory`, or half of what is free on its machine."""
        if engine.is_here:
            return self._memory(memory)
        if memory is None:
            workers_of_machine = -(-engine.workers // len({one.host for one in self.machines}))
            free = min(one.memory for one in self.machines)
            return int((free / 2 if np.isfinite(free) else 2 << 30) / workers_of_machine)
        return (self._memory(memory) - _INTERPRETER) // engine.workers

    def _plan(self, engine: Engine, memory: int | None) -> None:
        """Divide the blocks into groups that fit into the memory of a worker; an error if one block does not."""
        model, size = self.model, self.model.block_size
        counts = [self.job.tiles.count()]
        for number, scan in self.scans.items():
            if self.files[number].box and number not in self.failed:
                counts.append(_count_nodes(scan, self.job.options.scale, size.side / tiles.CELLS_OF_BLOCK))
        count = tiles.summed(
            np.concatenate([one.cells for one in counts]), np.concatenate([one.points for one in counts])
        )
        if not count.points.sum():
            raise ReadError(next(iter(self.failed.values()), "sources: expected points, got none"))
        margin = groups.margin_of(model)
        squares = _squares(count, size.lattices)
        blocks.check_blocks(size, int(count.points.sum()), int(np.count_nonzero(squares.points)))
        all_points = count.points.sum()
        in_block = min(all_points, squares.points.max() * (1 + 2 * size.halo / size.side) ** 2)
        per_point = groups.bytes_per_point(model)
        of_worker = self._memory_of_worker(engine, memory)
        fixed = _INTERPRETER + _model_bytes(model)
        threads = min(one.threads for one in self.machines)
        together = blocks.at_once(model, in_block, (of_worker - fixed) / 2, threads)
        of_one = in_block * (blocks.bytes_per_point(model, 1) if together > 1 else blocks.bytes_per_point(model))
        fixed += int(together * of_one)
        self.job.blocks_at_once = together
        fits = (of_worker - fixed) / per_point
        limit = min(fits, _MOST_IN_GROUP)
        if not engine.is_here:
            limit = min(limit, max(count.points.sum() / (_TASKS_OF_WORKER * engine.workers), squares.points.max()))
        before = self.earlier.get("limit")
        if isinstance(before, (int, float)) and fits >= before > 0:  # the same groups as before, of which some are done
            limit = before
        self.limit = limit
        self.groups, largest = _divided(squares, limit, margin / size.side, size.lattices)
        largest = min(largest, all_points)
        needs = fixed + int(largest * per_point)
        price = (1 + 2 * size.halo / size.side) ** 2
        number = size.lattices * np.count_nonzero(squares.points)
        self.say(f"{counted(number, 'block')} of {size.side:g} with a halo of "
                 f"{size.halo:g}, which put each point {size.lattices * price:.3g} times into the network, in "
                 f"{counted(len(self.groups), 'group')}")  # fmt: skip
        self.say(f"{engine.description}: the largest block has some {int(in_block):,} points, the largest group "
                 f"{int(largest):,}; a worker needs some {_bytes(needs)} and may take {_bytes(of_worker)}")  # fmt: skip
        if needs > of_worker:
            number, advice = engine.workers, "fewer workers, or " if engine.workers > 1 else ""
            total, got, workers = needs, of_worker, "" if engine.is_here else " for each worker"
            if memory is not None and not engine.is_here:
                total, got = needs * number + _INTERPRETER, memory
                workers = f" for this process and {counted(number, 'worker')}"
            raise ValueError(f"memory: expected at least {_bytes(total)}{workers}, got {_bytes(got)}; {advice}"
                             f"a model with smaller [blocks] needs less")  # fmt: skip
        sums = {tuple(cells): points for cells, points in zip(squares.cells.tolist(), squares.points, strict=True)}
        self.points_of = [
            sum(
                sums.get((x, y), 0.0)
                for x in range(one.x, one.x + one.number)
                for y in range(one.y, one.y + one.number)
            )
            for one in self.groups
        ]

    # ---- the work

    def label(self, engine: Engine) -> None:
        """Label the groups that are not done, and write each file once its groups are."""
        job, size, lattices = self.job, self.model.block_size, self.job.options.lattices
        self.has_begun = True
        self._write_manifest({"state": "running"})
        self.touches: list[list[int]] = []  # the files with points in the blocks of each group
        self.reads: list[list[int]] = []  # and in their margins
        margin = groups.margin_of(self.model)
        for cells in self.groups:
            low, high = groups.box_of(cells, size.side, lattices)
            self.touches.append(groups.files_in(job, low, high, self.failed))
            self.reads.append(groups.files_in(job, low - margin, high + margin, self.failed))
        self.groups_of: dict[int, list[int]] = {
            number: [] for number in self.scans if number not in self.failed and self.files[number].out
        }
        for group, numbers in enumerate(self.touches):
            for number in numbers:
                if number in self.groups_of:
                    self.groups_of[number].append(group)
        self.inputs = [self._inputs(group) for group in range(len(self.groups))]
        job.save()
        self.written = {number: about for number in self.groups_of if (about := self._already_written(number))}
        needed = {
            group for number, of_file in self.groups_of.items() if number not in self.written for group in of_file
        }
        self.abouts: dict[int, dict[str, Any]] = {}
        for group in range(len(self.groups)):
            if about := self._result(group):
                self.abouts[group] = about
        left = [group for group in sorted(needed) if group not in self.abouts]
        if len(left) < len(self.groups):
            self.say(f"{len(self.groups) - len(left):,} of {counted(len(self.groups), 'group')} and "
                     f"{len(self.written):,} of {counted(len(self.files), 'file')} are done already")  # fmt: skip
        self.started, self.done_points = time.perf_counter(), 0.0
        self.all_points = max(1.0, sum(self.points_of[group] for group in left))
        ready = [("file", number) for number in self.groups_of if number not in self.written and self._is_ready(number)]
        tasks = [*map(self._task_of_file, [number for _, number in ready]), *map(self._task_of_group, left)]
        self.scheduled = {number for _, number in ready}  # files with a task that writes them
        work = functools.partial(_work, str(self.folder))
        for _ in engine.run(work, tasks, instruction_set=self.instruction_set, after=self._after, beside=_is_file):
            pass

    def _inputs(self, group: int) -> str:
        return groups.inputs_digest(self.job, (number for number in self.reads[group] if number not in self.failed))

    def _result(self, group: int) -> dict[str, Any] | None:
        """What is known of a group that is done, with these files as its input; None if it is not."""
        try:
            _, about = checkpoints.read(groups.result_path(self.job, self.groups[group]), mapped=True)
        except (OSError, ValueError):
            return None
        return about if about.get("inputs") == self.inputs[group] else None

    def _made_of(self, number: int) -> str:
        """Says which results the copy of a file is made of."""
        return groups.hashed("".join(f"{self.groups[group]}{self.inputs[group]}" for group in self.groups_of[number]))

    def _already_written(self, number: int) -> dict[str, Any] | None:
        source = self.files[number]
        try:
            about = json.loads((self.folder / "files" / f"{source.name}.json").read_text())
        except (OSError, ValueError):
            about = self.earlier_files().get(source.key)
        if not isinstance(about, dict) or not {*merging.ABOUT} <= about.keys():
            return None
        is_done = (about["made_of"], about["size"]) == (self._made_of(number), _size(source.out))
        return about if is_done and self._has_probabilities(source) else None

    def earlier_files(self) -> dict[str, Any]:
        """What an earlier run says of the copies that it has written, by key of the file."""
        files = self.earlier.get("files")
        return files if isinstance(files, dict) else {}

    def _has_probabilities(self, source: Source) -> bool:
        return not self.job.options.probabilities or self.job.store.is_complete(source.path)

    def _is_ready(self, number: int) -> bool:
        return all(group in self.abouts for group in self.groups_of[number])

    def _task_of_group(self, group: int) -> tuple[str, int, Cells, tuple[int, ...]]:
        return "group", group, self.groups[group], tuple(sorted(self.failed))

    def _task_of_file(self, number: int) -> tuple[str, int, list[Cells], str]:
        return "file", number, [self.groups[group] for group in self.groups_of[number]], self._made_of(number)

    def _after(self, task: tuple[Any, ...], outcome: Any) -> list[tuple[Any, ...]]:
        """Take the outcome of a task; the tasks that it makes possible or necessary."""
        kind, number = task[:2]
        if isinstance(outcome, OSError) and outcome.errno in _FATAL:
            raise outcome
        if kind == "file" and (number_of_error := getattr(outcome, "errno", None)) in _FATAL:
            raise OSError(number_of_error, os.strerror(number_of_error), self.files[number].out)
        if isinstance(outcome, (engines.Unfit, KeyboardInterrupt)):
            raise outcome
        if isinstance(outcome, FileFailed):
            return self._lose(outcome.number, outcome.reason)
        if isinstance(outcome, Exception):
            numbers = [number] if kind == "file" else self.touches[number]
            reason = str(outcome) if isinstance(outcome, (ReadError, OSError)) else _reason(outcome)
            for one in numbers:
                self.failed.setdefault(one, reason)
                self.groups_of.pop(one, None)
            return []
        peak = self.peaks.get(outcome["worker"], 0)
        self.peaks[outcome["worker"]] = max(peak, outcome["peak"])
        for what, seconds in outcome["seconds"].items():
            self.seconds[what] += seconds
        if kind == "file":
            self._tell(outcome)
            if number not in self.groups_of:
                return []
            if outcome["made_of"] == self._made_of(number):
                self.written[number] = outcome
                return []
            # Of results that hold no longer; it may have replaced a later copy.
            self.written.pop(number, None)
            self.scheduled.discard(number)
            return self._files_that_are_ready([number])
        if outcome["inputs"] != self.inputs[number]:  # a file has failed meanwhile, and the group waits again
            return []
        self.abouts[number] = outcome
        self.points += outcome["points"]
        self.done_points += self.points_of[number]
        self._tell(outcome)
        return self._files_that_are_ready(self.touches[number])

    def _files_that_are_ready(self, numbers: Sequence[int]) -> list[tuple[Any, ...]]:
        tasks = []
        for one in numbers:
            if one in self.groups_of and one not in self.scheduled and self._is_ready(one):
                self.scheduled.add(one)
                tasks.append(self._task_of_file(one))
        return tasks

    def _lose(self, number: int, reason: str) -> list[tuple[Any, ...]]:
        """Leave out a file that cannot be read; the groups that must be labelled again without it."""
        if number in self.failed:
            return []
        self.failed[number] = reason
        self.groups_of.pop(number, None)
        self.job.tiles.without([number])
        again = [group for group, numbers in enumerate(self.reads) if number in numbers]
        for group in again:
            self.inputs[group] = self._inputs(group)
            self.abouts.pop(group, None)
            for one in self.touches[group]:
                self.written.pop(one, None)
                self.scheduled.discard(one)
        return [
            self._task_of_group(group) for group in again if any(one in self.groups_of for one in self.touches[group])
        ]

    def _tell(self, outcome: Mapping[str, Any]) -> None:
        rate = self.points / max(1e-9, time.perf_counter() - self.started)
        files = counted(len(self.groups_of), "file")
        note = f"{len(self.written):,} of {files}, {self.points:,} points, {rate:,.0f}/s"
        self.watch("labelling", min(1.0, self.done_points / self.all_points), note)
        self.watch("worker", 0.0, f"{outcome['worker'][0]} process {outcome['worker'][1]}: {outcome['told']}")

    # ---- after the work

    def finish(self, begin: float) -> Survey:
        """The summary, the picture and the manifest; the folder is removed unless files have failed."""
        names, written, notes = self.model.classes, [], []
        warned: dict[str, list[str]] = {}
        counts, matrix = np.zeros(len(names), np.int64), np.zeros((len(names), len(names)), np.int64)
        for number, about in sorted(self.written.items()):
            source, of_file = self.files[number], about["confusion"]
            rows = None if of_file is None else np.array(of_file)
            rules = self.job.rules.notes(self.model, self.job.options.into, about["ignored"], about["unclassified"],
                                         about["stays"])  # fmt: skip
            of_class = dict(zip(names, about["counts"], strict=True))
            written.append(Written(source.path, source.out, source.points, of_class, rows, [*rules]))
            counts += about["counts"]
            matrix += 0 if rows is None else rows
            for line in about["warnings"]:
                warned.setdefault(line, []).append(source.out)
        _warn(warned)
        total = matrix if matrix.any() else None
        messages = self._differences()
        for message in messages:
            warnings.warn(message, KpcoreWarning, stacklevel=3)
        failed = {self.files[number].path: reason for number, reason in sorted(self.failed.items())}
        if self.model.net.norm in ("group", "instance"):
            notes.append(f"the network's {self.model.net.norm} normalisation is over the points of each block")
        if not self.model.statistics:
            notes.append("the model file has no training statistics, so its input is not compared with them")
        self.seconds["all"] = time.perf_counter() - begin
        survey = Survey(
            written, failed, dict(zip(names, counts.tolist(), strict=True)), total,
            None if total is None else voting.scores(total, names), messages, notes, self.seconds, self.points,
            _peak(), len(self.groups),
            sum(about["close"] for about in self.written.values()),
        )  # fmt: skip
        if self.is_complete:
            return survey
        self._draw(survey)
        peaks = self.peaks | {(socket.gethostname(), os.getpid()): _peak()}
        survey = survey._replace(peak_memory=sum(peaks.values()))
        self._write_summary(survey)
        abouts = {
            self.files[number].key: {name: about[name] for name in merging.ABOUT}
            for number, about in self.written.items()
        }
        self._write_manifest(
            {
                "state": "incomplete" if failed else "done",
                "failed": failed,
                "warnings": messages,
                "files": abouts,
                "around": self._around(),
            }
        )
        merging.close_results()
        if failed:
            self.say(f"{self.folder} is kept for --resume")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return survey

    def _differences(self) -> list[str]:
        """How the input differs from that of the training."""
        training = self.model.statistics
        if self.is_complete:
            return [*map(str, self.earlier.get("warnings") or ())]
        if not training or not self.abouts:
            return []
        observed, spacings = statistics.Observed(self.model.columns, training), []
        for group in self.abouts:
            _, about = checkpoints.read(groups.result_path(self.job, self.groups[group]), mapped=True)
            observed.add_counted(about["observed"])
            spacings.append(about["spacing"])
        spacing = float(np.median(spacings))
        unit = statistics.unit_of([scan for number, scan in self.scans.items() if number not in self.failed])
        factors = self.job.options.scale
        unit = [length and length / factor for length, factor in zip(unit, factors[1:], strict=True)]
        seen = observed.statistics(spacing, unit)
        return statistics.differences(training, seen, advise=factors == [1.0, 1.0, 1.0])

    def _write_summary(self, survey: Survey) -> None:
        if self.is_alone:
            return
        described = survey._asdict() | {
            "files": [one._asdict() | {"confusion": _listed(one.confusion)} for one in survey.files],
            "confusion": _listed(survey.confusion), "classes": self.model.classes,
            "points_per_second": survey.points / max(1e-9, survey.seconds["all"]),
            "instruction_set": self.instruction_set, "kpcore": config.__version__,
        }  # fmt: skip
        with replacing(self.out / SUMMARY) as part:
            part.write_text(json.dumps(plain(described), indent=1))

    def _draw(self, survey: Survey) -> None:
        if self.is_alone or not self.written:
            return
        paths = [self.folder / "files" / f"{self.files[number].name}.npz" for number in self.written]
        if importlib.util.find_spec("matplotlib") is None or not all(path.exists() for path in paths):
            return
        whole = Overview.load(paths[0])
        for path in paths[1:]:
            other = Overview.load(path)
            if not np.array_equal([other.low, other.high], [whole.low, whole.high]):
                self.say(f"{PICTURE} is not drawn: the survey had another extent when {path.stem} was labelled")
                return
            whole.merge(other)
        scale = np.array(self.job.options.scale)
        boxes = [(Path(scan.path).stem, np.array(scan.low) * scale, np.array(scan.high) * scale)
                 for number, scan in self.scans.items() if number in self.written]  # fmt: skip
        points = sum(one.points for one in survey.files)
        subtitle = f"{counted(points, 'point')}, {counted(len(survey.files), 'file')}"
        unit = None if (scale == 1).all() else "units of the training"
        whole.draw(self.out / PICTURE, self.out.absolute().name, subtitle, self.model.settings, boxes, theme=self.theme,
                   unit=unit, reference=next(iter(self.scans.values())).reference)  # fmt: skip


def _warn(files_of: Mapping[str, Sequence[str | Path]]) -> None:
    """Warn of messages about files, each once for all files that it is about."""
    for message, files in files_of.items():
        others = f" (so have {counted(len(files) - 1, 'other file')})" if len(files) > 1 else ""
        warnings.warn(f"{files[0]}: {message}{others}", stacklevel=4)


def _is_file(task: tuple[Any, ...]) -> bool:
    return task[0] == "file"


def _work(folder: str, task: tuple[Any, ...]) -> dict[str, Any]:
    """Do a task, in any process that reaches the folder."""
    job, begin = _job(folder, os.stat(Path(folder, "job.json")).st_mtime_ns), time.perf_counter()
    kind, number, *rest = task
    if kind == "group":
        about = groups.label_group(job, *rest)
        reading = about.pop("reading")
        seconds = {"reading": reading, "labelling": time.perf_counter() - begin - reading}
        told = f"{counted(about['points'], 'point')} of group {number + 1:,}"
    else:
        about = merging.write_file(job, number, *rest)
        seconds = {"writing": time.perf_counter() - begin}
        told = f"wrote {job.files[number].out}"
    told += f" in {time.perf_counter() - begin:.1f} s"
    return about | {"worker": (socket.gethostname(), os.getpid()), "peak": _peak(), "seconds": seconds, "told": told}


@functools.lru_cache(maxsize=2)
def _job(folder: str, modified: int) -> Job:
    """The job in a folder, kept until it changes."""
    return Job.load(Path(folder))


def _peak() -> int:
    """The largest memory of this process so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"not enough memory: {error}; a smaller --memory makes smaller groups"
    if isinstance(error, engines.WorkerKilled):
        return f"its labels could not be computed: {error}"
    return f"its labels could not be computed: {type(error).__name__}: {error}"


def _size(path: str) -> int | None:
    """The size of a file; None if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _bytes(number: float) -> str:
    """A size with three digits, in the unit that needs no zeros."""
    for unit in ("KiB", "MiB", "GiB"):
        if (number := number / 1024) < 999.5:
            return f"{number:.3g} {unit}"
    return f"{number / 1024:,.3g} TiB" if number < 999.5 * 1024 else f"{number / 1024:,.0f} TiB"


def _words(fields: Sequence[tuple[str, np.dtype]]) -> str:
    return ", ".join(f"{name} ({dtype})" for name, dtype in fields) or "none"


def _listed(array: np.ndarray | None) -> list[Any] | None:
    return None if array is None else array.tolist()


def _model_bytes(model: Model) -> int:
    return sum(array.nbytes for array in (model.params | model.state).values())


class _Squares(NamedTuple):
    """Cells of the first lattice, with the points in each."""

    cells: np.ndarray  #: (n, 2)
    points: np.ndarray  #: (n,), 0 for one in which only a block of the second lattice begins


def _squares(count: tiles.Count, lattices: int) -> _Squares:
    """The blocks in which there are points, from the cells of `tiles`."""
    number = tiles.CELLS_OF_BLOCK
    cells, points = count.cells // number, count.points
    for lattice in LATTICES[1:lattices]:
        shifted = (count.cells - round(lattice.shift * number)) // number
        cells, points = np.concatenate([cells, shifted]), np.append(points, np.zeros(len(shifted)))
    return _Squares(*tiles.summed(cells, points))


def _divided(squares: _Squares, limit: float, margin: float, lattices: int) -> tuple[list[Cells], float]:
    """(groups with at most `limit` points each, where that is possible, and the points of the largest).

    Squares of blocks are divided into four until they are small enough. `margin` is in sides of a block.
    """
    shift = max(lattice.shift for lattice in LATTICES[:lattices])
    cells, points, out, largest = squares.cells, squares.points, [], 0.0
    number = groups.LARGEST
    while len(cells):
        of_group, inverse = np.unique(cells // number, axis=0, return_inverse=True)
        inverse = inverse.reshape(-1)
        total = np.bincount(inverse, points) * ((number + shift + 2 * margin) / number) ** 2
        fits = (total <= limit) | (number == 1)
        out += [Cells(int(x) * number, int(y) * number, number) for x, y in of_group[fits]]
        largest = max(largest, total[fits].max(initial=0.0))
        rest = ~fits[inverse]
        cells, points, number = cells[rest], points[rest], number // 2
    return sorted(out), largest


def _count_nodes(scan: Scan, scale: Sequence[float], side: float) -> tiles.Count:
    """The number of points in each cell by the nodes of a COPC, as if those of a node were spread evenly in its box."""
    nodes = copc.nodes(scan)
    cells, points = [], []
    for low, high, number in zip(nodes.low[:, :2] * scale[:2], nodes.high[:, :2] * scale[:2], nodes.count, strict=True):
        begin, end = np.floor(low / side).astype(np.int64), np.floor(high / side).astype(np.int64) + 1
        inside = np.stack(np.meshgrid(*map(np.arange, begin, end), indexing="ij"), axis=-1).reshape(-1, 2)
        cells.append(inside)
        points.append(np.full(len(inside), number / len(inside)))
    return tiles.summed(np.concatenate(cells), np.concatenate(points))
