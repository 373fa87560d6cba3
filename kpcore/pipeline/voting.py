"""Labels for clouds: votes of overlapping spheres, brought back to every point."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

import kpcore as kp
from kpcore.pipeline import batches
from kpcore.pipeline.data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.settings import Training
    from kpcore.pipeline.training import Model

_SMOOTH = 0.95  # of a point's earlier votes, as published


class Scores(TypedDict):
    """How good labels are, see `scores`; JSON in the log of a training."""

    miou: float | None
    accuracy: float | None
    iou: dict[str, float | None]
    points: int


def probabilities(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
                  watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(n, classes) of the scene's subsampled points.

    Spheres lie where the fewest have been, until each point was in one and all potentials are above ``votes - 1``; each
    says something of its points within the settings' `vote_radius` of its radius. What by then was in none has spheres
    of its own. A point's first vote counts fully, each further one for a twentieth. `watch` is told how much is done, 0
    to 1.
    """
    training, net = model.settings.training, model.net
    votes = training.votes if votes is None else votes
    probability = np.zeros((len(scene.points), net.num_classes), np.float32)
    seen = np.zeros(len(scene.points), bool)
    sampler = batches.Potentials([scene], training.radius, np.random.default_rng(seed), move=votes > 1)
    covered = np.zeros(len(scene.points), bool)

    def jobs() -> Iterator[list[batches.Sphere]]:
        spheres, points = [], 0
        while not covered.all() or sampler.values.min() < votes - 1:
            # Potentials reach further than votes: places amid others of the rim may never be the lowest.
            left_out = sampler.values.min() >= votes
            sphere = sampler.at(0, scene.points[covered.argmin()]) if left_out else sampler.next()
            if len(sphere.rows) == 0:
                continue
            if spheres and (points + len(sphere.rows) > training.batch_points or len(spheres) == training.batch_clouds):
                yield spheres
                spheres, points = [], 0
            spheres.append(sphere)
            points += len(sphere.rows)
            near = _near(scene, sphere, training)
            covered[sphere.rows[near]] = True
        if spheres:
            yield spheres

    def make(spheres: list[batches.Sphere]) -> batches.Batch:
        return batches.make_batch(net, [scene], model.columns, spheres)

    for batch in batches.Prefetched(jobs(), make, training.workers):
        logits = net(kp, model.params, model.state, batch.pyramid, batch.features).logits
        voted = kp.softmax(logits)
        begin = 0
        for sphere in batch.spheres:
            near = _near(scene, sphere, training)
            rows, vote = sphere.rows[near], voted[begin : begin + len(sphere.rows)][near]
            first = ~seen[rows]
            probability[rows] = np.where(first[:, None], vote, _SMOOTH * probability[rows] + (1 - _SMOOTH) * vote)
            seen[rows] = True
            begin += len(sphere.rows)
        if watch:
            watch(float(seen.mean()))
    return probability


def _near(scene: Scene, sphere: batches.Sphere, training: Training) -> np.ndarray:
    """Which points of a sphere have a vote: those away from its rim, where half the neighbours are missing."""
    squared = ((scene.points[sphere.rows] - sphere.center) ** 2).sum(axis=1)
    return squared <= (training.vote_radius * training.radius) ** 2


def labels_of(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
              watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(N,) numbers of classes of all the scene's points before subsampling: of the nearest that is left of them."""
    classes = probabilities(model, scene, votes, seed, watch).argmax(axis=1)
    return classes[scene.tree.knn_search(scene.full, 1).index]


def evaluate(model: Model, scenes: Sequence[Scene], votes: int | None = None,
             watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """The confusion of classes over the scenes' labelled points, those before subsampling; rows are the true ones."""
    classes = model.net.num_classes
    total = np.zeros((classes, classes), np.int64)
    if not model.net.segments:
        return _classified(model, scenes, total)
    for scene in scenes:
        total += confusion(scene.full_labels, labels_of(model, scene, votes, watch=watch), classes)
    return total


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes): how many points of each true class, a row, were predicted to be of each; without IGNORED."""
    counted = true != IGNORED
    pairs = classes * true[counted] + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def _classified(model: Model, scenes: Sequence[Scene], total: np.ndarray) -> np.ndarray:
    training = model.settings.training
    size = training.batch_clouds
    whole = [batches.whole(scenes, number) for number in range(len(scenes))]

    def make(spheres: list[batches.Sphere]) -> batches.Batch:
        return batches.make_batch(model.net, scenes, model.columns, spheres)

    jobs = (whole[i : i + size] for i in range(0, len(whole), size))
    for batch in batches.Prefetched(jobs, make, training.workers):
        logits = model.net(kp, model.params, model.state, batch.pyramid, batch.features).logits
        total += confusion(batch.labels, logits.argmax(axis=1), len(total))
    return total


def scores(confusion: np.ndarray, names: Sequence[str]) -> Scores:
    """IoU of each class, None where no point has or gets it; their mean; and the part of the points that is right."""
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = true + predicted - right
    iou = {name: float(r / u) if u else None for name, r, u in zip(names, right, union, strict=True)}
    there = [value for value in iou.values() if value is not None]
    total = int(confusion.sum())
    return {"miou": float(np.mean(there)) if there else None, "accuracy": float(right.sum() / total) if total else None,
            "iou": iou, "points": total}  # fmt: skip
