"""Class probabilities of a cloud, block by block.

A block is a square cell of a lattice in the file's coordinates. Its input is every point of the cell and of a margin
around it, in an order that follows from their values alone; it is one batch item by itself. Only the points of the cell
get its labels. So a label depends on the block's points and the network, not on the order of the points in the file, on
threads, on memory, or on what was labelled before.

The probabilities are the mean over two lattices. The second is shifted by half a side and its blocks are turned, so
that voxels have other faces: floors and walls that lie on the faces of one lattice cost a flat 0.06 of its mean IoU.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore import config, nn
from kpcore.backends import devices
from kpcore.config import free_memory
from kpcore.dispositions import rotated
from kpcore.pipeline import batches
from kpcore.pipeline.data import computed_values, coordinates, pieces, reach_of, subsampled, values_of
from kpcore.pipeline.settings import LENGTHS, SettingsError
from kpcore.pyramid import Pyramid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike

    from kpcore.io import Cloud
    from kpcore.pipeline.data import Reach, Scene
    from kpcore.pipeline.model import Model
    from kpcore.pipeline.settings import Settings
    from kpcore.pipeline.statistics import Observed

TYPICAL_POINTS = 150_000  # of level 0 in a block of the training data
_MOST_CELLS = 2**31  # along an axis
_MOST_EMPTY_BLOCKS, _FEWEST_POINTS = 1000, 50  # of so many blocks each has so many points on average: or hours are lost
_TYPICAL_NEIGHBORS = 40
_PREPARED = 3  # blocks in memory where one is labelled at a time: that in the network, the next, and the one after
_BYTES_OF_INPUT = 150  # of a point of a block: float64 coordinates, order, features before and after subsampling


class BlockSize(NamedTuple):
    """The size of blocks, in the unit of the points."""

    side: float
    halo: float  #: width of the margin that the network sees; computed features see their reach more
    lattices: int = 2  #: over which probabilities are averaged


class Lattice(NamedTuple):
    """Where blocks are, and how their voxels are turned about the vertical."""

    shift: float  #: of the cells in x and y, in sides
    angle: float  #: in degrees


LATTICES = (Lattice(0.0, 0.0), Lattice(0.5, 30.0))


class Block(NamedTuple):
    """The points of a cell and of its margins."""

    center: np.ndarray  #: (3,) float64, subtracted from the coordinates
    rows: np.ndarray  #: (n,) indices into the cloud's points, in the order of their values
    positions: np.ndarray  #: (n,) of these in the rows of the cloud that are labelled
    seen: np.ndarray  #: (n,) bool, points in the cell and in the margin that the network sees
    inside: np.ndarray  #: (n,) bool, points in the cell
    around: np.ndarray  #: (m,) further points, in any order, on which only heights above ground depend


class Cells(NamedTuple):
    """A square of cells of a lattice."""

    x: int  #: the lowest column
    y: int  #: the lowest row
    number: int  #: of columns, and of rows


class Plan(NamedTuple):
    """What labelling in blocks takes."""

    blocks: int
    points: int  #: in the largest block, with the margin that the network sees; an estimate from the points of its cell
    memory: int  #: bytes besides the cloud, an estimate


class Input(NamedTuple):
    """What the network gets for a block."""

    positions: np.ndarray  #: of the points in the cell, in the rows of the cloud that are labelled
    places: np.ndarray  #: the point of level 0 that is nearest to each of these
    features: np.ndarray  #: (n, C) of level 0
    pyramid: Pyramid
    num_points: int  #: before subsampling


def default_size(settings: Settings, scenes: Sequence[Scene]) -> BlockSize:
    """The size of the settings; by default a side with which a block of the scenes has some 150,000 points."""
    radius, blocks = settings.training.radius, settings.blocks
    side = blocks.side
    if side is None:
        # The area that points cover, in cells as wide as an input sphere: an outlier far away adds one cell.
        cells = sum(_num_cells(scene.points, radius) for scene in scenes)
        density = sum(len(scene.points) for scene in scenes) / (cells * radius**2)
        side = max(4 * radius, float(f"{math.sqrt(TYPICAL_POINTS / density):.2g}"))
    return BlockSize(side, radius if blocks.halo is None else blocks.halo, blocks.lattices)


def _num_cells(points: np.ndarray, side: float) -> int:
    """The number of square cells with points."""
    cells = [_runs(np.floor(piece[:, :2] / side)) for piece in pieces(points)]
    return len(np.unique(_runs(np.concatenate(cells)), axis=0))


def _runs(rows: np.ndarray) -> np.ndarray:
    """The first of each run of equal rows; np.unique of all takes a hundred times as long, 80 s for 20 million."""
    return rows[np.append(True, (rows[1:] != rows[:-1]).any(axis=1))]


def size_without_training(settings: Settings) -> BlockSize:
    """The size for a model that does not say it, as those of versions before 0.3."""
    radius, blocks = settings.training.radius, settings.blocks
    return BlockSize(blocks.side or 8 * radius, radius if blocks.halo is None else blocks.halo, blocks.lattices)


def size_of(described: Mapping[str, float]) -> BlockSize:
    """Make a BlockSize from its description in JSON."""
    size = BlockSize(**described)
    is_size = all(type(length) in (int, float) and LENGTHS[0] <= length <= LENGTHS[1] for length in size[:2])
    if not is_size or size.lattices not in range(1, len(LATTICES) + 1):
        raise SettingsError(f"blocks: expected a side, a halo and 1 or 2 lattices, got {described}")
    return size


def blocks_of(cloud: Cloud, rows: np.ndarray, size: BlockSize, reach: Reach, ranks: np.ndarray, shift: float = 0.0,
              cells: Cells | None = None) -> Iterator[Block]:  # fmt: skip
    """The blocks of some points of a cloud, each with a point in its cell; by x, then by y.

    `reach` is beyond the margin that the network sees. `ranks` are those of the points by `ranks_of`. `shift` is that
    of the lattice, in sides. With `cells` there are the blocks of these alone.
    """
    points = coordinates(cloud, rows)
    cell_of = np.floor(points[:, :2] / size.side - shift)
    if np.abs(cell_of).max(initial=0) >= _MOST_CELLS:
        raise ValueError(
            f"side: expected blocks with which the points lie in fewer than 2**32 columns, got a side of {size.side:g} "
            f"and coordinates up to {np.abs(points[:, :2]).max():g}"
        )
    order = np.lexsort((cell_of[:, 1], cell_of[:, 0]))
    starts = np.flatnonzero((np.diff(cell_of[order], axis=0, prepend=np.nan) != 0).any(axis=1))
    ends = np.append(starts[1:], len(order))
    if cells is None:
        check_blocks(size, len(rows), len(starts))
    numbers = {(int(x), int(y)): number for number, (x, y) in enumerate(cell_of[order[starts]])}
    del cell_of
    by_cell = [points[order, axis] for axis in (0, 1)]  # so that the coordinates of a cell are together
    widest = size.halo + max(reach)
    number_around = math.floor(widest / size.side) + 1  # a point at this distance may be the first of the next cell
    steps = range(-number_around, number_around + 1)
    for (x, y), number in numbers.items():
        if cells is not None and not (cells.x <= x < cells.x + cells.number and cells.y <= y < cells.y + cells.number):
            continue
        near = [numbers[x + dx, y + dy] for dx in steps for dy in steps if (x + dx, y + dy) in numbers]
        low, high = (np.array([x, y]) + shift) * size.side, (np.array([x, y]) + shift + 1) * size.side
        parts, around = [], []
        for other in near:
            of_cell = slice(starts[other], ends[other])
            # The distance to the cell; 0 in it, although a quotient may be rounded up to the next cell.
            distance = np.zeros(ends[other] - starts[other])
            for axis in (0, 1) if other != number else ():
                np.maximum(distance, low[axis] - by_cell[axis][of_cell], out=distance)
                np.maximum(distance, by_cell[axis][of_cell] - high[axis], out=distance)
            is_near = distance <= size.halo + reach.surface
            around.append(order[of_cell][(distance <= widest) & ~is_near])
            rows_of_cell, seen = order[of_cell][is_near], distance[is_near] <= size.halo
            parts.append((rows_of_cell, seen, np.full(len(seen), other == number)))
        rows_near, seen, inside = (np.concatenate(column) for column in zip(*parts, strict=True))
        around, sort = np.concatenate(around), np.argsort(ranks[rows_near], kind="stable")
        rows_near, seen, inside = rows_near[sort], seen[sort], inside[sort]
        heights = np.sort(points[rows_near[inside], 2])
        center = np.array([*(low + high) / 2, heights[len(heights) // 2]])
        yield Block(center, rows[rows_near], rows_near, seen, inside, rows[around])


def check_blocks(size: BlockSize, points: int, blocks: int) -> None:
    """Raise an error if there are many blocks with next to no points, which would take hours."""
    if blocks > _MOST_EMPTY_BLOCKS and points < _FEWEST_POINTS * blocks:
        raise ValueError(
            f"points: expected some {TYPICAL_POINTS:,} in a block of {size.side:g}, got {points:,} in {blocks:,} "
            "blocks: coordinates may have another unit than in training, see --scale"
        )


def ranks_of(points: np.ndarray, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """(n,) int32 place of each point in the order by x, y and z, then by `values` by name, (n,) or (n, width).

    Three sorts of single numbers, and a sort of what is equal in x and y, take a third of the time of np.lexsort.
    """
    key = _ranks(points[:, 0]) << 32 | _ranks(points[:, 1])
    order = np.argsort(key)
    in_order = key[order]
    equal = np.append(in_order[1:] == in_order[:-1], False)
    tied = equal | np.append(False, equal[:-1])
    if tied.any():
        rows = order[tied]
        order[tied] = rows[np.lexsort([*(column[rows] for column in columns_of(values)), points[rows, 2], key[rows]])]
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order))
    return ranks


def _ranks(values: np.ndarray) -> np.ndarray:
    """The number of smaller different values of each."""
    order = np.argsort(values)
    in_order = values[order]
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.cumsum(np.append(False, in_order[1:] != in_order[:-1])[: len(values)])
    return ranks


def columns_of(values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The columns of values by name, (n,) each."""
    return [column for of_feature in values.values() for column in of_feature.reshape(len(of_feature), -1).T]


def input_of(model: Model, cloud: Cloud, block: Block, angle: float = 0.0, like: ArrayLike | None = None) -> Input:
    """The network's input for a block whose voxels are turned by an angle, on the device of `like`.

    The points are turned too if the network was trained with such rotations; else they are turned back afterwards.
    """
    settings, net = model.settings, model.net
    points = coordinates(cloud, block.rows)
    known = values_of(settings, cloud, block.rows)
    values = known | computed_values(settings, points, known, coordinates(cloud, block.around))
    seen = block.seen
    local = (points[seen] - block.center).astype(np.float32)
    features = model.columns.clipped(local, {name: column[seen] for name, column in values.items()})
    if angle:
        turn = _rotation(angle)
        local = rotated(local, turn)
        if (normals := model.columns.span("normals")) and _knows(settings, angle):
            features[:, normals] = rotated(features[:, normals], turn)
    inside = local[block.inside[seen]]
    if devices.is_array(like):
        local, inside, features = (devices.to_device_of(like, array) for array in (local, inside, features))
    sub = subsampled(settings, local, features=features)
    places = kp.knn_search(sub.points, inside, 1).index
    pyramid = net.pyramid(sub.points, row_splits=sub.row_splits, subsampled=True)
    if angle and not _knows(settings, angle):
        back = devices.to_device_of(like, _rotation(-angle)) if devices.is_array(like) else _rotation(-angle)
        pyramid = Pyramid(level._replace(points=rotated(level.points, back)) for level in pyramid)
    return Input(block.positions[block.inside], places, sub.features, pyramid, len(local))


def _rotation(angle: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]], np.float32)


def _knows(settings: Settings, angle: float) -> bool:
    """Whether the network was trained on points that are turned about the vertical by this angle."""
    rotate = settings.training.rotate
    return rotate in ("vertical", "all") if isinstance(rotate, str) else rotate >= angle


def plan(model: Model, cloud: Cloud, rows: np.ndarray) -> Plan:
    """How many blocks there are, the points of the largest, and the memory that it takes."""
    size = model.block_size
    cells = np.floor(coordinates(cloud, rows)[:, :2] / size.side)
    if np.abs(cells).max(initial=0) >= _MOST_CELLS:
        counts = np.ones(1, np.int64)  # `blocks_of` raises an error
    else:
        keys = cells.astype(np.int64)
        counts = np.unique(keys[:, 0] << 32 | keys[:, 1] & 0xFFFFFFFF, return_counts=True)[1]
    points = min(len(rows), int(counts.max() * (1 + 2 * size.halo / size.side) ** 2))
    sums = 4 * len(rows) * model.net.num_classes if size.lattices > 1 else 0
    return Plan(size.lattices * len(counts), points, int(points * bytes_per_point(model)) + sums)


def at_once(model: Model, points: float, memory: float, threads: int) -> int:
    """How many blocks of so many points are labelled at the same time in this memory, each by threads of its part.

    Blocks need nothing of each other, so that two threads label two blocks faster than one after the other.
    """
    return max(1, min(threads, int(memory / max(1.0, points * bytes_per_point(model, 1)))))


def bytes_per_point(model: Model, prepared: int = _PREPARED) -> float:
    """Memory for a point of a block before subsampling, with so many inputs of blocks in memory.

    Besides the cloud, the peak was between half and 1.3 times this sum for KP-FCNNs of 32 and 64 channels, rigid and
    deformable, and a KPNeXt, in one block and in nine.
    """
    widths: list[tuple[int, int]] = []  # (level, channels) of each block of the network
    few = np.zeros((2, model.net.dimension), np.float32)
    pyramid, features = model.net.pyramid(few, subsampled=True), np.zeros((2, model.net.num_features), np.float32)

    def see(name: str, level: int | None, value: Any) -> None:
        if level is not None and isinstance(value, np.ndarray):  # else the deformed kernel points of a layer
            widths.append((level, value.shape[1]))

    model.net(kp, model.params, model.state, pyramid, features, observe=see)
    share = 1 / 3  # of the points of a level that the next has, on surfaces
    largest = max(channels * share**level for level, channels in widths)
    largest *= 4 if isinstance(model.net, nn.KPNeXt) else 1  # its inverted blocks have four times their channels inside
    encoded = dict(widths[: 1 + max(range(len(widths)), key=lambda number: widths[number][0])])
    kept = sum(channels * share**level for level, channels in encoded.items())
    statistics = model.statistics
    counts = statistics.neighbors if statistics else [_TYPICAL_NEIGHBORS] * model.net.num_levels
    pairs = sum(number * share**level for level, number in enumerate(counts))
    of_level_0 = 4 * (kept + 2.5 * largest) + prepared * 4 * 2.5 * pairs
    return prepared * _BYTES_OF_INPUT + of_level_0 / max(1.0, statistics.points_per_voxel if statistics else 1.0)


def probabilities(model: Model, cloud: Cloud, rows: np.ndarray, *, like: ArrayLike | None = None,
                  watch: Callable[[float], object] | None = None,
                  observed: Observed | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(positions in `rows`, (n, classes) probabilities) of the points in each block.

    `rows` are the cloud's points that are to be labelled. `watch` is called with the fraction of them that is done;
    `observed` counts the features and neighbours of all blocks.
    """
    lattices = LATTICES[: model.block_size.lattices]
    total = np.zeros((len(rows), model.net.num_classes), np.float32) if len(lattices) > 1 else None
    planned, done = plan(model, cloud, rows), 0
    together = at_once(model, planned.points, free_memory() / 2, config.get_num_threads())
    together = min(together, planned.blocks // len(lattices))
    ranks = ranks_of(coordinates(cloud, rows), values_of(model.settings, cloud, rows))
    for number, lattice in enumerate(lattices, 1):
        pieces = of_lattice(model, cloud, rows, lattice, ranks, like=like, observed=observed, together=together)
        for positions, shares in pieces:
            if total is None:
                yield positions, shares
            elif number < len(lattices):
                total[positions] += shares
            else:
                yield positions, (total[positions] + shares) / len(lattices)
            done += len(positions)
            if watch:
                watch(done / (len(rows) * len(lattices)))


def of_lattice(model: Model, cloud: Cloud, rows: np.ndarray, lattice: Lattice, ranks: np.ndarray, *,
               cells: Cells | None = None, like: ArrayLike | None = None, observed: Observed | None = None,
               together: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(positions in `rows`, (n, classes) probabilities) of the points in each block of a lattice, see `blocks_of`.

    On the CPU so many blocks are labelled `together`.
    """
    settings, net = model.settings, model.net
    chosen = blocks_of(cloud, rows, model.block_size, reach_of(settings), ranks, lattice.shift, cells)
    groups = model.params, model.state
    if devices.is_array(like):
        groups = ({name: devices.to_device_of(like, value) for name, value in group.items()} for group in groups)
    params, state = groups

    counting = threading.Lock()

    def make(block: Block) -> Input:
        return input_of(model, cloud, block, lattice.angle, like)

    def label(block: Input) -> tuple[np.ndarray, np.ndarray]:
        if observed:
            with counting:
                observed.add(devices.on_host(block.features), block.num_points)
                observed.add_neighbors(block.pyramid)
        logits = net(kp, params, state, block.pyramid, block.features).logits
        return block.positions, devices.on_host(kp.softmax(logits)[block.places])

    def label_in_thread(block: Block) -> tuple[np.ndarray, np.ndarray]:
        with config.threads_of_calls_here(threads):
            return label(make(block))

    if together > 1 and not devices.is_array(like):
        threads = max(1, config.get_num_threads() // together)
        yield from batches.Prefetched(chosen, label_in_thread, together)
    else:  # one thread prepares the next blocks: each takes up to a gigabyte
        yield from map(label, batches.Prefetched(chosen, make, min(1, settings.training.workers)))
