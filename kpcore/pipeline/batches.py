"""Batches of a training: spheres drawn from scenes, augmented, with their pyramids; prepared by threads in advance."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

import kpcore as kp
from kpcore.dispositions import random_rotation, rotated
from kpcore.pipeline.boxes import Boxes
from kpcore.pipeline.settings import SettingsError
from kpcore.pyramid import Pyramid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kpcore.nn import KPNeXt, Network
    from kpcore.pipeline.data import Columns, Scene
    from kpcore.pipeline.settings import Training

_BLOCK = 1024  # potentials of which the lowest is known: of 4 million, finding it takes 5 µs instead of 2 ms

Job = TypeVar("Job")
Result = TypeVar("Result")


class Sphere(NamedTuple):
    """The points of a scene within a radius of a centre."""

    scene: int  #: number of the scene
    center: np.ndarray  #: (D,)
    rows: np.ndarray  #: indices into the scene's points


class Batch(NamedTuple):
    """The input of a network for one step, and the class numbers of its points."""

    spheres: list[Sphere]
    pyramid: Pyramid
    features: np.ndarray
    labels: np.ndarray
    categories: list[int] | None = None  #: of each sphere, for a network that has heads

    @property
    def options(self) -> dict[str, list[int]]:
        """Further arguments of the network."""
        return {} if self.categories is None else {"categories": self.categories}


class Potentials:
    """Draws spheres where the fewest have been so far, by the potentials of the KPConv code.

    Every voxel of a tenth of the radius has a potential, at first small and random. The next sphere is centred on the
    lowest potential and moved a little (normal noise of a tenth of the radius); it adds (1 - d² / r²)² to the
    potentials at distances d below the radius r.
    """

    scenes: Sequence[Scene]
    radius: float
    rng: np.random.Generator
    move: bool
    values: np.ndarray  #: potentials

    def __init__(self, scenes: Sequence[Scene], radius: float, rng: np.random.Generator, move: bool = True) -> None:
        self.scenes, self.radius, self.rng, self.move = scenes, radius, rng, move
        try:
            places = [
                scene.stored.places(radius / 10)
                if scene.stored
                else kp.grid_subsample(scene.points, radius / 10).points
                for scene in scenes
            ]
        except ValueError as error:
            raise SettingsError(
                f"[training] radius: expected a larger one, got {radius}; for voxels of a tenth of it: {error}"
            ) from None
        self._bounds = np.cumsum([0, *map(len, places)])
        self._boxes = [Boxes(np.asarray(of_scene)) for of_scene in places]
        number = self._bounds[-1]
        blocks = np.full((-(-number // _BLOCK), _BLOCK), np.inf)
        self.values = blocks.ravel()[:number]
        self.values[:] = rng.uniform(0, 1e-3, number)
        self._blocks, self._lowest = blocks, blocks.min(axis=1)

    @property
    def lowest(self) -> float:
        """The lowest potential."""
        return float(self._lowest.min())

    def next(self) -> Sphere:
        """The next sphere."""
        block = int(self._lowest.argmin())
        at = block * _BLOCK + int(self._blocks[block].argmin())
        number = int(np.searchsorted(self._bounds, at, "right")) - 1
        center = self._boxes[number].points[at - self._bounds[number]]
        if self.move:
            noise = self.rng.normal(0, self.radius / 10, len(center))
            center = (center + np.clip(noise, -self.radius / 2, self.radius / 2)).astype(np.float32)
        return self.at(number, center)

    def at(self, number: int, center: np.ndarray) -> Sphere:
        """The sphere of a scene around a centre; its potentials rise."""
        boxes = self._boxes[number]
        near = boxes.near(center, self.radius)
        squared = ((boxes.points[near] - center) ** 2).sum(axis=1, dtype=np.float64) / self.radius**2
        rows = near + self._bounds[number]
        self.values[rows] += np.where(squared < 1, (1 - squared) ** 2, 0)
        changed = np.unique(rows // _BLOCK)
        self._lowest[changed] = self._blocks[changed].min(axis=1)
        return sphere_at(self.scenes, number, center, self.radius)


class Balanced:
    """Draws spheres around points; each class is as likely as any other."""

    scenes: Sequence[Scene]
    radius: float
    rng: np.random.Generator

    def __init__(self, scenes: Sequence[Scene], radius: float, rng: np.random.Generator) -> None:
        self.scenes, self.radius, self.rng = scenes, radius, rng
        # Of each scene its points by class, and where each class begins among them: four bytes for a point, which are
        # on disk for scenes of a cache.
        self._rows, begins = zip(*map(_by_class, scenes), strict=True)
        classes = max(map(len, begins))
        self._begins = np.array([np.pad(one, (0, classes - len(one)), "edge") for one in begins])
        # For each class with points, the number of these in all scenes before each.
        counts = np.diff(self._begins, axis=1).T
        self._classes = np.flatnonzero(counts.any(axis=1))
        self._bounds = np.pad(np.cumsum(counts, axis=1), ((0, 0), (1, 0)))

    def next(self) -> Sphere:
        """The next sphere."""
        label = self._classes[self.rng.integers(len(self._classes))]
        bounds = self._bounds[label]
        at = int(self.rng.integers(bounds[-1]))
        number = int(np.searchsorted(bounds, at, "right")) - 1
        center = self.scenes[number].points[self._rows[number][self._begins[number, label] + at - bounds[number]]]
        return sphere_at(self.scenes, number, center, self.radius)


def _by_class(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """(the points by class, in ascending order within each; where each class begins among them, and the end)"""
    if scene.stored:
        return scene.stored.by_class()
    order = np.argsort(scene.labels, kind="stable").astype(np.int32)
    in_order = scene.labels[order]
    return order, np.searchsorted(in_order, np.arange(in_order[-1] + 2))


def sphere_at(scenes: Sequence[Scene], number: int, center: np.ndarray, radius: float) -> Sphere:
    """The points of a scene within a radius of a centre."""
    if scenes[number].stored:
        return Sphere(number, center, scenes[number].tree.within(center, radius))
    neighbors = scenes[number].tree.radius_search(center[None], radius)
    return Sphere(number, center, neighbors.index)


def training_jobs(scenes: Sequence[Scene], training: Training, whole: bool, rng: np.random.Generator,
                  number: int) -> Iterator[list[Sphere]]:  # fmt: skip
    """`number` lists of spheres, or of `whole` scenes, one list for each batch."""
    if whole:
        source = _shuffled(scenes, rng)
    else:
        sampler = (Potentials if training.sampling == "regular" else Balanced)(scenes, training.radius, rng)
        source = iter(sampler.next, None)
    left_over = None
    for _ in range(number):
        spheres, left_over = _fill(source, training, left_over)
        yield spheres


def _shuffled(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[Sphere]:
    """Whole scenes forever: all of them in random order, then all in another order, and so on."""
    while True:
        for number in rng.permutation(len(scenes)):
            yield whole_scene(scenes, int(number))


def whole_scene(scenes: Sequence[Scene], number: int) -> Sphere:
    """A whole scene in the form of a Sphere."""
    points = scenes[number].points
    return Sphere(number, np.zeros(points.shape[1], np.float32), np.arange(len(points)))


def _fill(source: Iterator[Sphere], training: Training, left_over: Sphere | None) -> tuple[list[Sphere], Sphere | None]:
    """(spheres for a batch, the first sphere that did not fit or None); `left_over` is that of the batch before."""
    spheres, points, empty = [], 0, 0
    while len(spheres) < training.batch_clouds:
        sphere = next(source, None) if left_over is None else left_over
        left_over = None
        if sphere is None:
            break
        if spheres and points + len(sphere.rows) > training.batch_points:
            left_over = sphere
            break
        if len(sphere.rows) > 1:
            spheres.append(sphere)
            points += len(sphere.rows)
            continue
        empty += 1  # one that was moved off the points of the scene; 1000 of them mean that the radius is too small
        if empty == 1000:
            raise SettingsError(
                f"[training] radius: expected several points in a sphere, got at most one in 1000 spheres of radius "
                f"{training.radius}"
            )
    return spheres, left_over


def make_batch(net: Network | KPNeXt, scenes: Sequence[Scene], columns: Columns, spheres: list[Sphere],
               training: Training | None = None, rng: np.random.Generator | None = None, *,
               learns: bool = True) -> Batch:  # fmt: skip
    """Make a Batch of spheres; with `rng` they are augmented as the settings say.

    Unless `learns`, a level may have a single point, of which batch normalisation computes no statistics.
    """
    points, features, labels, local = [], [], [], columns.span("local")
    for sphere in spheres:
        scene = scenes[sphere.scene]
        centered, sphere_features = scene.points[sphere.rows] - sphere.center, scene.columns[sphere.rows]
        if rng is not None:
            centered, sphere_features = _augmented(centered, sphere_features, training, columns, rng)
        if local:
            sphere_features[:, local] = centered
        points.append(centered)
        features.append(sphere_features)
        labels.append(scene.labels[sphere.rows] if net.segments else scene.labels)
    lengths = [len(centered) for centered in points]
    row_splits, stacked = kp.row_splits(lengths), np.concatenate(points)
    try:
        pyramid = _pyramid(net, stacked, row_splits, training, rng)
    except ValueError as error:  # too many voxels along an axis
        raise SettingsError(f"[training] scale, noise: expected smaller values: {error}") from None
    if rng is not None and learns and net.norm == "batch":
        for number, level in enumerate(pyramid):
            if len(level.points) < 2:
                raise SettingsError(
                    f"[network] levels: batch normalisation needs at least 2 points of a batch on each level, got "
                    f"{len(level.points)} on level {number}: use fewer levels, a larger radius or more batch_points"
                )
    categories = [scenes[sphere.scene].category for sphere in spheres]
    return Batch(spheres, pyramid, np.concatenate(features), np.concatenate(labels),
                 None if categories[0] is None else categories)  # fmt: skip


def _pyramid(net: Network | KPNeXt, points: np.ndarray, row_splits: np.ndarray, training: Training | None,
             rng: np.random.Generator | None) -> Pyramid:  # fmt: skip
    if rng is None or not training.turn_grid:
        return net.pyramid(points, row_splits=row_splits, subsampled=True)
    # As in the KPConv code, the voxels of each batch have other axes: points are rotated, subsampled and rotated back.
    rotations = [_random_rotation(points.shape[1], "full", rng) for _ in row_splits[1:]]
    levels = net.pyramid(_rotated_items(points, row_splits, rotations), row_splits=row_splits, subsampled=True)
    inverses = [rotation.T for rotation in rotations]
    return Pyramid(
        [levels[0]._replace(points=points)]
        + [level._replace(points=_rotated_items(level.points, level.row_splits, inverses)) for level in levels[1:]]
    )


def _rotated_items(points: np.ndarray, row_splits: np.ndarray, rotations: Sequence[np.ndarray]) -> np.ndarray:
    """Points with the i-th batch item rotated by rotations[i]."""
    return np.concatenate([
        rotated(points[begin:end], rotation)
        for begin, end, rotation in zip(row_splits[:-1], row_splits[1:], rotations, strict=True)
    ])  # fmt: skip


def _random_rotation(dimension: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    return random_rotation(dimension, kind, int(rng.integers(2**62))).astype(np.float32)


def _augmented(points: np.ndarray, features: np.ndarray, training: Training, columns: Columns,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Points and features of a sphere, rotated, scaled, mirrored, with noise, and sometimes without colours."""
    dimension, normals = points.shape[1], columns.span("normals")
    rotation = None
    if training.rotate in ("vertical", "all"):
        kind = "vertical" if training.rotate == "vertical" else "full"
        rotation = _random_rotation(dimension, kind, rng)
    elif training.rotate != "none":
        angle = np.deg2rad(rng.uniform(-training.rotate, training.rotate))
        rotation = np.eye(dimension)
        rotation[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        rotation = rotation.astype(np.float32)
    if rotation is not None:
        points = rotated(points, rotation)
        if normals:
            features[:, normals] = rotated(features[:, normals], rotation)
    scale = rng.uniform(*training.scale, dimension)
    flips = rng.random(dimension) < 0.5
    scale[[axis for axis, flip in enumerate(training.flip) if flip and flips[axis]]] *= -1
    points = points * scale.astype(np.float32)
    if normals:
        features[:, normals] = _scaled_normals(features[:, normals], scale)
    points = points + rng.normal(0, training.noise, points.shape).astype(np.float32)
    color = columns.span("color")
    if color and rng.random() >= training.keep_color:
        features[:, color] = 0
    return points, features


def _scaled_normals(normals: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The normals of a surface that is scaled along each axis, with their lengths: means over voxels are below 1."""
    scaled = normals / scale
    before, after = (np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (normals, scaled))
    return scaled * (before / np.maximum(after, np.finfo(np.float32).tiny))


class Prefetched(Generic[Job, Result]):
    """Iterates over the results of `make(job)`, computed in advance by threads, in the order of the jobs.

    Threads rather than processes, because most of the work is kernels that release the GIL, and scenes need no copies.
    Jobs are drawn one after the other by the iterating thread, so that results do not depend on the number of workers.
    """

    waited: float  #: seconds spent waiting for results so far

    def __init__(self, jobs: Iterable[Job], make: Callable[[Job], Result], workers: int) -> None:
        self.waited, self._jobs, self._make, self._workers = 0.0, iter(jobs), make, workers

    def __iter__(self) -> Iterator[Result]:
        if not self._workers:
            for job in self._jobs:
                begin = time.perf_counter()
                result = self._make(job)
                self.waited += time.perf_counter() - begin
                yield result
            return
        pool, pending = ThreadPoolExecutor(self._workers, "kpcore-batches"), deque()
        try:
            for job in self._jobs:
                pending.append(pool.submit(self._make, job))
                if len(pending) > 2 * self._workers:
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            for future in pending:
                future.cancel()
            pool.shutdown()

    def _next(self, pending: deque[Future[Result]]) -> Result:
        begin = time.perf_counter()
        result = pending.popleft().result()
        self.waited += time.perf_counter() - begin
        return result
