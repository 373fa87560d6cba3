"""A group of neighbouring blocks of a survey: its points are read, its blocks are labelled, the result is one file.

A group is a task for any worker that reaches the folder of the job. Each block belongs to one group, so nothing is
computed twice. A point whose two blocks, one of each lattice, belong to different groups has its probabilities in the
results of both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy

from kpcore import config
from kpcore.files import replacing
from kpcore.io import ReadError, copc, scans
from kpcore.io.cloud import Cloud, Request, field_values, ignored_points, name_index
from kpcore.nn import checkpoints
from kpcore.pipeline import blocks, engines, statistics, tiles
from kpcore.pipeline.blocks import LATTICES, Cells
from kpcore.pipeline.data import HEIGHT_FIELD, not_finite, reach_of, values_of
from kpcore.pipeline.model import Model, kept
from kpcore.pipeline.probabilities import ProbabilityStore, array_names
from kpcore.pipeline.segmentation import Rules, doubtful_label

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from kpcore.io.scans import Scan

CLOSE = 1e-4  # of two probabilities: a GPU may order them in another way
LARGEST = 16  # blocks along the side of a group: a power of two
_BYTES_PER_POINT = 130  # of a point of a group: coordinates twice, order, cells, rows, file
_SLACK = 1e-6  # of the side of a block, around what is read; which points belong to a block is decided afterwards
_AT_ONCE = 1_000_000  # points that are decoded together
_TIME, _RETURN = "gps_time", "return_number"  # with the coordinates they say which points of two files are the same


@dataclass(frozen=True)
class Source:
    """A file of a survey."""

    path: str  #: absolute
    size: int
    modified: int  #: in nanoseconds
    points: int
    out: str  #: the labelled copy; empty for a file that is input alone
    box: list[float] | None = None  #: (x, y) low, (x, y) high of a COPC, in its unit; None for a file without an index
    telling: str = ""  #: `scans.Scan.telling` in hexadecimal digits

    @property
    def key(self) -> str:
        """Is another one if the file changes."""
        return f"{self.path}:{self.size}:{self.modified}"

    @property
    def name(self) -> str:
        """Of the file in results, which hold for other lists of files too."""
        return hashed(self.key)[:24]


@dataclass(frozen=True)
class Options:
    """What labels depend on besides the model and the files, and what is written."""

    fields: list[str]  #: that the network's features are read from
    label: str | None  #: the field of the labels in the files; None: classification
    ignore: list[int | str] = field(default_factory=list)
    drop_zeros: bool = False
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    wide_colors: bool | None = None  #: whether colours have 16 bits in all files; None: they are no feature
    lattices: int = 2
    keep: list[int] = field(default_factory=list)
    into: str | None = None
    confidence: bool = False
    unclassified: float | None = None
    probabilities: str | None = None  #: path of the Zarr


class Job:
    """What the tasks of a survey have in common, in a folder that all workers reach."""

    folder: Path
    files: list[Source]
    options: Options

    def __init__(self, folder: Path, files: Sequence[Source], options: Options, low: Sequence[float],
                 high: Sequence[float], blocks_at_once: int = 1) -> None:  # fmt: skip
        self.folder, self.files, self.options = folder, [*files], options
        self.blocks_at_once = blocks_at_once  #: that fit into the memory of a worker
        self.low, self.high = low, high  #: of the survey, in the unit of the network

    @property
    def path(self) -> Path:
        return self.folder / "job.json"

    @property
    def model_path(self) -> Path:
        return self.folder / "model.safetensors"

    @functools.cached_property
    def model(self) -> Model:
        return kept(self.model_path)

    @functools.cached_property
    def tiles(self) -> tiles.Tiles:
        return tiles.Tiles(self.folder / "cells")

    @functools.cached_property
    def boxes(self) -> np.ndarray:
        """(files, 4) of each file, see `Source.box`; NaN for one without an index."""
        return np.array([source.box or [np.nan] * 4 for source in self.files])

    @functools.cached_property
    def store(self) -> ProbabilityStore:
        """Where the probabilities of all classes are written."""
        paths = self.labelled_paths
        return ProbabilityStore(Path(self.options.probabilities), self.model.classes,
                                dict(zip(paths, array_names(paths), strict=True)))  # fmt: skip

    @property
    def labelled_paths(self) -> list[str]:
        """The files of which copies are written."""
        return [source.path for source in self.files if source.out]

    @property
    def rules(self) -> Rules:
        return Rules(tuple(self.options.keep), self.options.unclassified, doubtful_label(self.files[0].out))

    def request(self, scan: Scan) -> Request:
        """What is read of a file for the input of the network."""
        options = self.options
        identity = [name for name in (_TIME, _RETURN) if name in scan.names] if len(self.files) > 1 else []
        return Request(tuple(dict.fromkeys([*options.fields, *identity])), self.label(scan),
                       ignore=tuple(options.ignore), drop_zeros=options.drop_zeros)  # fmt: skip

    def label(self, scan: Scan) -> str | None:
        """The field of the labels in a file; None: classification."""
        label = self.options.label
        return label if label and name_index(scan.names, label) is not None else None

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a worker keeps its job until it ends
    def scan(self, number: int) -> Scan:
        """The header of a file; an error if it is not the one that the job was made for."""
        check_unchanged(self, number)
        source = self.files[number]
        scan = scans.opened(source.path, self.model.settings.data.columns)
        return scan._replace(telling=bytes.fromhex(source.telling))

    def save(self) -> None:
        """Write the description."""
        described = {"made_with": made_with(), "files": [asdict(source) for source in self.files],
                     "options": asdict(self.options),
                     "low": [*self.low], "high": [*self.high], "blocks_at_once": self.blocks_at_once}  # fmt: skip
        with replacing(self.path) as part:
            part.write_text(json.dumps(described))

    @classmethod
    def load(cls, folder: Path) -> Job:
        described = json.loads((folder / "job.json").read_text())
        if (versions := made_with()) != described["made_with"]:
            names = next(f"{name} {described['made_with'][name]}, as here, got {version}"
                         for name, version in versions.items() if version != described["made_with"][name])  # fmt: skip
            raise engines.Unfit(f"{socket.gethostname()}: expected {names}: the bits of labels could differ")
        files = [Source(**one) for one in described["files"]]
        return cls(folder, files, Options(**described["options"]), described["low"], described["high"],
                   described["blocks_at_once"])  # fmt: skip


def made_with() -> dict[str, str]:
    """The versions of packages on which the bits of labels depend."""
    return {"kpcore": config.__version__, "numpy": np.__version__, "scipy": scipy.__version__}


def check_unchanged(job: Job, number: int) -> None:
    """Raise an error if a file is not the one that the job was made for."""
    source = job.files[number]
    try:
        status = os.stat(source.path)
    except OSError as error:
        raise FileFailed(number, f"{source.path}: was there at the start: {error.strerror}") from None
    if (status.st_size, status.st_mtime_ns) != (source.size, source.modified):
        raise FileFailed(number, f"{source.path}: has changed since the start")


class FileFailed(ReadError):
    """A file of a survey cannot be read."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number, self.reason = number, reason

    def __str__(self) -> str:
        return self.reason


class Points(NamedTuple):
    """Points of a box, and where they come from."""

    cloud: Cloud  #: in the unit of the network
    files: np.ndarray  #: (n,) numbers of files
    rows: np.ndarray  #: (n,) in these files
    first: np.ndarray  #: (n,) the point that this one is the same as, itself if it is in the input


def label_group(job: Job, cells: Cells, without: Collection[int] = ()) -> dict[str, Any]:
    """Label the blocks of a group, and write the result; files `without` are left out.

    Returns what the driver has to know of it; the distribution of its input is in the result alone.
    """
    model, options = job.model, job.options
    low, high = box_of(cells, model.block_size.side, options.lattices)
    begin = time.perf_counter()
    points = points_in(job, low - margin_of(model), high + margin_of(model), without)
    reading = time.perf_counter() - begin
    chosen = np.flatnonzero(points.first == np.arange(len(points.first)))
    observed = statistics.Observed(model.columns, model.statistics) if model.statistics else None
    total = np.zeros((len(chosen), model.net.num_classes), np.float32)
    labelled = np.zeros(len(chosen), np.uint8)  # by so many lattices
    first_lattice, fullest, ranks = 0, chosen[:0], np.zeros(len(chosen), np.int32)
    # Those further off are in no block, and the ground that they make does not depend on their order.
    margin = model.block_size.halo + reach_of(model.settings).surface + _SLACK * model.block_size.side
    xy = points.cloud.exact[chosen, :2]
    ranked = np.flatnonzero(((xy >= low - margin) & (xy <= high + margin)).all(axis=1))
    if len(ranked):
        of_cloud = chosen[ranked]
        ranks[ranked] = blocks.ranks_of(points.cloud.exact[of_cloud], values_of(model.settings, points.cloud, of_cloud))
    for lattice in LATTICES[: options.lattices] if len(chosen) else ():
        pieces = blocks.of_lattice(
            model, points.cloud, chosen, lattice, ranks, cells=cells, observed=observed,
            together=min(job.blocks_at_once, config.get_num_threads(), cells.number**2),
        )  # fmt: skip
        for positions, shares in pieces:
            total[positions] += shares
            labelled[positions] += 1
            if lattice is LATTICES[0]:
                first_lattice += len(positions)
                fullest = max(fullest, positions, key=len)
    place = np.empty(len(points.first), np.int64)
    place[chosen] = np.arange(len(chosen))
    place = place[points.first]
    about = {"inputs": inputs_of(job, cells, without), "points": first_lattice}
    more = {}
    if observed:
        more = {"observed": observed.counted(), "spacing": statistics.spacing_of(points.cloud.exact[chosen[fullest]])}
    _write(job, cells, points, place, labelled, total, about | more)
    return about | {"reading": reading}


def box_of(cells: Cells, side: float, lattices: int) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the blocks of a group in x and y, without their margins."""
    low = np.array([cells.x, cells.y]) * side
    shift = max(lattice.shift for lattice in LATTICES[:lattices])
    return low, low + (cells.number + shift) * side


def result_path(job: Job, cells: Cells) -> Path:
    """Where the result of a group is."""
    return job.folder / "groups" / f"{cells.x}_{cells.y}_{cells.number}.safetensors"


def _write(job: Job, cells: Cells, points: Points, place: np.ndarray, labelled: np.ndarray, total: np.ndarray,
           about: dict[str, Any]) -> None:  # fmt: skip
    """Write the labels of the points that all lattices have labelled, and the probabilities of others, by file."""
    lattices, arrays, dtype = job.options.lattices, {}, np.min_scalar_type(total.shape[1])
    for number in np.unique(points.files):
        of_file = np.flatnonzero(points.files == number)
        of_file = of_file[np.argsort(points.rows[of_file])]
        rows, at = points.rows[of_file], place[of_file]
        whole, part = labelled[at] == lattices, (labelled[at] > 0) & (labelled[at] < lattices)
        if not (whole.any() or part.any()):
            continue
        shares = total[at[whole]] / lattices
        arrays[name := job.files[number].name] = {
            "rows": rows[whole], "classes": shares.argmax(axis=1).astype(dtype), "confidence": shares.max(axis=1),
            "part_rows": rows[part], "part_total": total[at[part]],
            "close": np.array([np.count_nonzero(are_close(shares))]),
        }  # fmt: skip
        if job.options.probabilities:
            arrays[name]["probabilities"] = shares
    path = result_path(job, cells)
    path.parent.mkdir(exist_ok=True)
    checkpoints.write(path, arrays, about)


def are_close(shares: np.ndarray) -> np.ndarray:
    """(n,) bool, whether the two largest probabilities of a point are nearly equal."""
    if shares.shape[1] < 2:
        return np.zeros(len(shares), bool)
    two = np.partition(shares, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0] < CLOSE


def inputs_of(job: Job, cells: Cells, without: Collection[int] = ()) -> str:
    """Says which files' points are in the input of a group; another one if one of them changes."""
    margin = margin_of(job.model)
    low, high = box_of(cells, job.model.block_size.side, job.options.lattices)
    return inputs_digest(job, files_in(job, low - margin, high + margin, without))


def inputs_digest(job: Job, numbers: Iterable[int]) -> str:
    """Another one if one of these files changes, or how they are read."""
    keys = sorted(job.files[number].key for number in numbers)
    return hashed("\n".join([f"wide colours: {job.options.wide_colors}", *keys]))


def hashed(text: str) -> str:
    """The SHA-256 of a text; paths may have bytes that are no UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def bytes_per_point(model: Model) -> int:
    """Memory for a point of a group, besides that for blocks."""
    return _BYTES_PER_POINT + 4 * (model.net.num_classes + 2 * sum(model.columns.widths.values()))


def margin_of(model: Model) -> float:
    """The width of the margin of a group: every point that has an effect on its labels is in it."""
    return model.block_size.halo + max(reach_of(model.settings)) + _SLACK * model.block_size.side


def points_in(job: Job, low: np.ndarray, high: np.ndarray, without: Collection[int] = ()) -> Points:
    """The points of a survey in a box of x and y, in the unit of the network, that are in its input."""
    pieces = []
    for number in files_in(job, low, high, without):
        try:
            for rows, records, shared in _records_in(job, number, low, high):
                piece = _piece(job, number, rows, records, shared, low, high)
                if len(piece.rows):
                    pieces.append(piece)
        except FileFailed:
            raise
        except ReadError as error:
            raise FileFailed(number, str(error)) from None
    if not pieces:
        empty = np.empty((0, 3))
        return Points(Cloud(empty, None, None, np.zeros(3), exact=empty), *np.empty((3, 0), np.int64))
    files = np.repeat([piece.number for piece in pieces], [len(piece.rows) for piece in pieces])
    exact, rows = (np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("points", "rows"))
    fields = {name: np.concatenate([piece.fields[name] for piece in pieces]) for name in pieces[0].fields}
    colors = None if pieces[0].colors is None else np.concatenate([piece.colors for piece in pieces])
    cloud = Cloud(exact, colors, None, np.zeros(3), fields=fields, exact=exact)
    first = np.arange(len(rows))
    shared = np.flatnonzero(np.concatenate([piece.shared for piece in pieces]))
    if len(shared) and len(maybe := shared[places_taken_twice(exact[shared])]):
        values = values_of(job.model.settings, cloud, maybe)
        identity = np.concatenate([piece.identity for piece in pieces])[maybe]
        first[maybe] = maybe[same_points(exact[maybe], identity, files[maybe], values)]
    return Points(cloud, files, rows, first)


class _Piece(NamedTuple):
    """Points of a file."""

    number: int
    points: np.ndarray  #: (n, 3) float64, in the unit of the network
    rows: np.ndarray
    fields: dict[str, np.ndarray]
    colors: np.ndarray | None
    identity: np.ndarray  #: (n, 2) GPS time and number of the return
    shared: np.ndarray  #: (n,) bool, whether another file may have the point too


def files_in(job: Job, low: np.ndarray, high: np.ndarray, without: Collection[int] = ()) -> list[int]:
    """The numbers of the files that may have points in a box of x and y, in the unit of the network."""
    numbers = {*np.unique(job.tiles.entries(*_cells_of(job, low, high))["file"]).tolist()}
    begin, end = low / job.options.scale[:2], high / job.options.scale[:2]
    meet = (job.boxes[:, :2] <= end).all(axis=1) & (job.boxes[:, 2:] >= begin).all(axis=1)
    return sorted(numbers.union(np.flatnonzero(meet).tolist()).difference(without))


def _cells_of(job: Job, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    side = job.model.block_size.side / tiles.CELLS_OF_BLOCK
    return np.floor(low / side), np.floor(high / side)


def _records_in(job: Job, number: int, low: np.ndarray,
                high: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """(rows, records, whether other files may have the point too) of the points of a file in a box, and some beyond."""
    scan, scale, with_index = job.scan(number), job.options.scale[:2], ~np.isnan(job.boxes[:, 0])
    if job.files[number].box:
        # A quotient may be rounded inwards, so that a point on the edge would be missing.
        rows, records = copc.records_in(scan, np.nextafter(low / scale, -np.inf), np.nextafter(high / scale, np.inf))
        yield rows, records, np.full(len(rows), len(job.files) > 1)
        return
    entries = job.tiles.entries(*_cells_of(job, low, high))
    # A cell with points of one file alone shares none, unless there are files with an index, which have no cells.
    shared = np.full(len(entries), with_index.any())
    is_next = (np.diff(entries["x"]) == 0) & (np.diff(entries["y"]) == 0)
    is_other = is_next & (np.diff(entries["file"]) != 0)
    bounds = np.flatnonzero(np.append(True, ~is_next)) if len(entries) else np.empty(0, np.int64)
    of_cell = np.logical_or.reduceat(np.append(is_other, False), bounds) if len(entries) else shared
    shared |= np.repeat(of_cell, np.diff(bounds, append=len(entries)))
    mine = entries["file"] == number
    entries, shared = entries[mine], shared[mine]
    ends = np.flatnonzero(np.diff(np.cumsum(entries["count"]) // _AT_ONCE)) + 1
    for some, are_shared in zip(np.split(entries, ends), np.split(shared, ends), strict=True):
        yield *job.tiles.read(some, scan.record_size), np.repeat(are_shared, some["count"])


def _piece(job: Job, number: int, rows: np.ndarray, records: np.ndarray, shared: np.ndarray, low: np.ndarray,
           high: np.ndarray) -> _Piece:  # fmt: skip
    """The points of records of a file that lie in a box and are in the input of the network."""
    options, scan = job.options, job.scan(number)
    request = job.request(scan)
    content = scans.decoded(scan, records, request, options.wide_colors)
    points = content.points * np.array(options.scale)
    kept = ((points[:, :2] >= low) & (points[:, :2] <= high)).all(axis=1)
    for _, ignored in ignored_points(content.points, content.labels, content.flags or {}, request):
        kept &= ~ignored
    fields = {name.lower(): field_values(name, content.fields[name])[kept] for name in options.fields}
    if bad := not_finite(fields):
        raise ReadError(f"{scan.path}: {bad}")
    if HEIGHT_FIELD in fields:
        fields[HEIGHT_FIELD] = fields[HEIGHT_FIELD] * options.scale[2]
    identity = np.zeros((np.count_nonzero(kept), 2))
    for column, name in enumerate((_TIME, _RETURN)):
        if name in request.fields:
            identity[:, column] = content.fields[name][kept]
    colors = content.colors[kept] if "color" in job.model.settings.data.features else None
    return _Piece(number, points[kept], rows[kept], fields, colors, identity, shared[kept])


def places_taken_twice(points: np.ndarray) -> np.ndarray:
    """The points that are at the same place as another one, and at most a few others.

    One sort of a hash takes a quarter of the time of sorting by coordinates.
    """
    bits = np.ascontiguousarray(points + 0.0).view(np.uint64)  # + 0.0: without negative zeros
    mixed = (bits * np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)) >> np.uint64(7)
    hashed = mixed[:, 0] ^ (mixed[:, 1] << np.uint64(1)) ^ (mixed[:, 2] << np.uint64(2))
    order = np.argsort(hashed)
    equal = np.append(hashed[order[1:]] == hashed[order[:-1]], False)
    return np.sort(order[equal | np.append(False, equal[:-1])])


def same_points(points: np.ndarray, identity: np.ndarray, files: np.ndarray,
                values: Mapping[str, np.ndarray]) -> np.ndarray:  # fmt: skip
    """For each point the first of those that are the same in other files; itself if it is the first.

    Points of different files are the same if coordinates, GPS time and number of the return are. A file may hold such
    points several times, which are different ones: the second there is the same as the second in another file, in the
    order of their values. The first is the one with the least values, not that of a certain file.
    """
    keys = [identity[:, 1], identity[:, 0], points[:, 2], points[:, 1], points[:, 0]]
    columns = blocks.columns_of(values)
    order = np.lexsort([*columns, files, *keys])
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    is_new_file = is_new.copy()
    is_new_file[1:] |= files[order[1:]] != files[order[:-1]]
    key_of, places = np.cumsum(is_new), np.arange(len(order))
    occurrence = places - np.maximum.accumulate(np.where(is_new_file, places, 0))
    groups = np.lexsort([*(column[order] for column in columns), occurrence, key_of])
    starts = np.ones(len(groups), bool)
    starts[1:] = (key_of[groups[1:]] != key_of[groups[:-1]]) | (occurrence[groups[1:]] != occurrence[groups[:-1]])
    first = np.empty(len(order), np.int64)
    first[order[groups]] = order[groups[np.flatnonzero(starts)[np.cumsum(starts) - 1]]]
    return first
