"""Batches: which spheres of which scenes, augmented, with their pyramids; made ahead by threads."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

import kpcore as kp
from kpcore.dispositions import random_rotation, rotated
from kpcore.pipeline.settings import SettingsError
from kpcore.pyramid import Pyramid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kpcore.nn import KPNeXt, Network
    from kpcore.pipeline.data import Columns, Scene
    from kpcore.pipeline.settings import Training

Job = TypeVar("Job")
Made = TypeVar("Made")


class Sphere(NamedTuple):
    """Points of a scene around a centre."""

    scene: int
    center: np.ndarray  #: (D,)
    rows: np.ndarray  #: of the scene's points


class Batch(NamedTuple):
    """The input of a network for one step, and the labels of its points."""

    spheres: list[Sphere]
    pyramid: Pyramid
    features: np.ndarray
    labels: np.ndarray


class Potentials:
    """Spheres where the fewest have been, as published.

    Places a tenth of the radius apart have a potential, small and random at first; a sphere is put at the lowest, moved
    a little, and adds (1 - d² / r²)² to those within.
    """

    scenes: Sequence[Scene]
    radius: float
    rng: np.random.Generator
    move: bool
    values: np.ndarray  #: the potential of each place

    def __init__(self, scenes: Sequence[Scene], radius: float, rng: np.random.Generator, move: bool = True) -> None:
        self.scenes, self.radius, self.rng, self.move = scenes, radius, rng, move
        try:
            places = [kp.grid_subsample(scene.points, radius / 10).points for scene in scenes]
        except ValueError as error:
            raise SettingsError(
                f"[training] radius: expected a larger one, got {radius}; of its tenth: {error}"
            ) from None
        self._bounds = np.cumsum([0, *map(len, places)])
        self._places = np.concatenate(places)
        self.values = rng.uniform(0, 1e-3, len(self._places))

    def next(self) -> Sphere:
        at = int(self.values.argmin())
        number = int(np.searchsorted(self._bounds, at, "right")) - 1
        center = self._places[at]
        if self.move:
            by = self.rng.normal(0, self.radius / 10, len(center))
            center = (center + np.clip(by, -self.radius / 2, self.radius / 2)).astype(np.float32)
        return self.at(number, center)

    def at(self, number: int, center: np.ndarray) -> Sphere:
        """A sphere of a scene at a given place."""
        places = slice(self._bounds[number], self._bounds[number + 1])
        squared = ((self._places[places] - center) ** 2).sum(axis=1, dtype=np.float64) / self.radius**2
        self.values[places] += np.where(squared < 1, (1 - squared) ** 2, 0)
        return _sphere(self.scenes, number, center, self.radius)


class Balanced:
    """Spheres around points of classes that are drawn evenly."""

    scenes: Sequence[Scene]
    radius: float
    rng: np.random.Generator

    def __init__(self, scenes: Sequence[Scene], radius: float, rng: np.random.Generator) -> None:
        self.scenes, self.radius, self.rng = scenes, radius, rng
        bounds = np.cumsum([0, *(len(scene.points) for scene in scenes)])
        labels = np.concatenate([scene.labels for scene in scenes])
        self._bounds, self._rows = bounds, [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]

    def next(self) -> Sphere:
        at = int(self.rng.choice(self._rows[self.rng.integers(len(self._rows))]))
        number = int(np.searchsorted(self._bounds, at, "right")) - 1
        center = self.scenes[number].points[at - self._bounds[number]]
        return _sphere(self.scenes, number, center, self.radius)


def _sphere(scenes: Sequence[Scene], number: int, center: np.ndarray, radius: float) -> Sphere:
    neighbors = scenes[number].tree.radius_search(center[None], radius)
    return Sphere(number, center, neighbors.index)


def training_jobs(scenes: Sequence[Scene], training: Training, digits: bool, rng: np.random.Generator,
                  number: int) -> Iterator[list[Sphere]]:  # fmt: skip
    """`number` lists of spheres, or of digits, one list for each batch."""
    if digits:
        source = _shuffled(scenes, rng)
    else:
        sampler = (Potentials if training.sampling == "regular" else Balanced)(scenes, training.radius, rng)
        source = iter(sampler.next, None)
    held = None
    for _ in range(number):
        spheres, held = _fill(source, training, held)
        yield spheres


def _shuffled(scenes: Sequence[Scene], rng: np.random.Generator) -> Iterator[Sphere]:
    """Whole scenes, all of them in another order each time."""
    while True:
        for number in rng.permutation(len(scenes)):
            yield whole(scenes, int(number))


def whole(scenes: Sequence[Scene], number: int) -> Sphere:
    """A "sphere" that is a whole scene."""
    points = scenes[number].points
    return Sphere(number, np.zeros(points.shape[1], np.float32), np.arange(len(points)))


def _fill(source: Iterator[Sphere], training: Training, held: Sphere | None) -> tuple[list[Sphere], Sphere | None]:
    """(spheres for a batch, the one that did not fit or None)"""
    spheres, points, alone = [], 0, 0
    while len(spheres) < training.batch_clouds:
        sphere = next(source, None) if held is None else held
        held = None
        if sphere is None:
            break
        if spheres and points + len(sphere.rows) > training.batch_points:
            held = sphere
            break
        if len(sphere.rows) > 1:
            spheres.append(sphere)
            points += len(sphere.rows)
            continue
        alone += 1  # moved off the scene, as happens; but not always
        if alone == 1000:
            raise SettingsError(f"[training] radius: expected several points within {training.radius}, got one at most")
    return spheres, held


def make_batch(net: Network | KPNeXt, scenes: Sequence[Scene], columns: Columns, spheres: list[Sphere],
               training: Training | None = None, rng: np.random.Generator | None = None) -> Batch:  # fmt: skip
    """A Batch of spheres of scenes with these Columns; augmented as `training` says, unless `rng` is None."""
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
        labels.append(scene.labels if scene.tree is None else scene.labels[sphere.rows])
    lengths = [len(centered) for centered in points]
    row_splits, stacked = kp.row_splits(lengths), np.concatenate(points)
    try:
        pyramid = _pyramid(net, stacked, row_splits, training, rng)
    except ValueError as error:  # more voxels along an axis than their keys have room for
        raise SettingsError(f"[training] scale, noise: expected smaller ones, got {error}") from None
    normalised = rng is not None and net.norm == "batch"
    few = [number for number, level in enumerate(pyramid) if normalised and len(level.points) < 2]
    if few:
        raise SettingsError(
            f"[network] levels: expected at least two points of a batch on each, to normalise, got "
            f"{len(pyramid[few[0]].points)} on level {few[0]}; larger spheres or batches help"
        )
    return Batch(spheres, pyramid, np.concatenate(features), np.concatenate(labels))


def _pyramid(net: Network | KPNeXt, points: np.ndarray, row_splits: np.ndarray, training: Training | None,
             rng: np.random.Generator | None) -> Pyramid:  # fmt: skip
    if rng is None or not training.turn_grid:
        return net.pyramid(points, row_splits=row_splits, subsampled=True)
    # Voxels along other axes each time, as published: turned before, and back after.
    turns = [_turn(points.shape[1], "full", rng) for _ in row_splits[1:]]
    levels = net.pyramid(_turned(points, row_splits, turns), row_splits=row_splits, subsampled=True)
    back = [turn.T for turn in turns]
    return Pyramid(
        [levels[0]._replace(points=points)]
        + [level._replace(points=_turned(level.points, level.row_splits, back)) for level in levels[1:]]
    )


def _turned(points: np.ndarray, row_splits: np.ndarray, turns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([
        rotated(points[begin:end], turn)
        for begin, end, turn in zip(row_splits[:-1], row_splits[1:], turns, strict=True)
    ])  # fmt: skip


def _turn(dimension: int, kind: str, rng: np.random.Generator) -> np.ndarray:
    return random_rotation(dimension, kind, int(rng.integers(2**62))).astype(np.float32)


def _augmented(points: np.ndarray, features: np.ndarray, training: Training, columns: Columns,
               rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    dimension = points.shape[1]
    if training.rotate in ("vertical", "all"):
        turn = _turn(dimension, "vertical" if training.rotate == "vertical" else "full", rng)
        points = rotated(points, turn)
    elif training.rotate != "none":
        angle = np.deg2rad(rng.uniform(-training.rotate, training.rotate))
        turn = np.eye(dimension)
        turn[:2, :2] = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        points = rotated(points, turn.astype(np.float32))
    scale = rng.uniform(*training.scale, dimension)
    flips = rng.random(dimension) < 0.5
    scale[[axis for axis, flip in enumerate(training.flip) if flip and flips[axis]]] *= -1
    points = points * scale.astype(np.float32)
    points = points + rng.normal(0, training.noise, points.shape).astype(np.float32)
    color = columns.span("color")
    if color and rng.random() >= training.keep_color:
        features[:, color] = 0
    return points, features


class Prefetched(Generic[Job, Made]):
    """Results of `make(job)` in the order of the jobs, made ahead by threads; `waited` seconds for them so far.

    Threads, because the work is kernels that let go of the interpreter, and scenes need not be copied. What a job is
    made of is drawn when it is asked for, in order; so a run is the same with any number of threads.
    """

    waited: float

    def __init__(self, jobs: Iterable[Job], make: Callable[[Job], Made], workers: int) -> None:
        self.waited, self._jobs, self._make, self._workers = 0.0, iter(jobs), make, workers

    def __iter__(self) -> Iterator[Made]:
        if not self._workers:
            for job in self._jobs:
                begin = time.perf_counter()
                made = self._make(job)
                self.waited += time.perf_counter() - begin
                yield made
            return
        pool, ahead = ThreadPoolExecutor(self._workers, "kpcore-batches"), deque()
        try:
            for job in self._jobs:
                ahead.append(pool.submit(self._make, job))
                if len(ahead) > 2 * self._workers:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            for one in ahead:
                one.cancel()
            pool.shutdown()

    def _next(self, ahead: deque[Future[Made]]) -> Made:
        begin = time.perf_counter()
        made = ahead.popleft().result()
        self.waited += time.perf_counter() - begin
        return made
