"""Class labels of clouds by votes of overlapping spheres, and the scores of such labels."""

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

_SMOOTH = 0.95  # weight of the mean of a point's earlier votes, as in the KPConv code


class Scores(TypedDict):
    """Scores of labels, see `scores`; the log of a training holds them as JSON."""

    miou: float | None
    accuracy: float | None
    mean_class_accuracy: float | None
    iou: dict[str, float | None]
    class_accuracy: dict[str, float | None]
    points: int


def probabilities(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
                  watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(n, classes) class probabilities of the scene's subsampled points.

    Spheres are drawn by `Potentials`, until each point has a vote and all potentials are at least ``votes - 1``. A
    sphere votes for its points within the fraction `vote_radius` of its radius. Points that still have no vote when all
    potentials are at least `votes` get a sphere around them. The probabilities of a point are those of its first vote;
    each further vote moves them by a twentieth. `watch` is called with the fraction of points that have a vote.
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
            # Spheres raise potentials up to their radius but vote only up to vote_radius, so that a place near several
            # spheres may never have the lowest potential.
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
    """True for the points of a sphere that it votes for: those near its rim lack half of their neighbours."""
    squared = ((scene.points[sphere.rows] - sphere.center) ** 2).sum(axis=1)
    return squared <= (training.vote_radius * training.radius) ** 2


def labels_of(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
              watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(N,) class numbers of the scene's points before subsampling, each that of the nearest subsampled point."""
    classes = probabilities(model, scene, votes, seed, watch).argmax(axis=1)
    return classes[scene.tree.knn_search(scene.full, 1).index]


def evaluate(model: Model, scenes: Sequence[Scene], votes: int | None = None,
             watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """The confusion matrix over the labelled points of scenes before subsampling; rows are true classes.

    For a network that classifies whole scenes it is that over scenes.
    """
    classes = model.net.num_classes
    total = np.zeros((classes, classes), np.int64)
    if not model.net.segments:
        true = np.concatenate([scene.labels for scene in scenes])
        return confusion(true, scene_probabilities(model, scenes, votes, watch=watch).argmax(axis=1), classes)
    for scene in scenes:
        total += confusion(scene.full_labels, labels_of(model, scene, votes, watch=watch), classes)
    return total


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts of points by true class (row) and predicted class (column); IGNORED is not counted."""
    counted = true != IGNORED
    pairs = classes * true[counted] + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def scene_probabilities(model: Model, scenes: Sequence[Scene], votes: int | None = None, seed: int = 0,
                        watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(scenes, classes) class probabilities of whole scenes, the mean over `votes`.

    The first vote is that of the scenes as they are; in each further one they are augmented as in training. `watch` is
    called with the fraction of votes that are done.
    """
    training, net = model.settings.training, model.net
    votes, size = training.votes if votes is None else votes, training.batch_clouds
    total = np.zeros((len(scenes), net.num_classes), np.float32)
    jobs = ((vote, begin) for vote in range(votes) for begin in range(0, len(scenes), size))

    def make(job: tuple[int, int]) -> batches.Batch:
        vote, begin = job
        spheres = [batches.whole_scene(scenes, number) for number in range(begin, min(begin + size, len(scenes)))]
        rng = np.random.default_rng([seed, vote, begin]) if vote else None
        return batches.make_batch(net, scenes, model.columns, spheres, training, rng, learns=False)

    done = 0
    for batch in batches.Prefetched(jobs, make, training.workers):
        logits = net(kp, model.params, model.state, batch.pyramid, batch.features).logits
        total[[sphere.scene for sphere in batch.spheres]] += kp.softmax(logits)
        done += len(batch.spheres)
        if watch:
            watch(done / (votes * len(scenes)))
    return total / votes


def scores(confusion: np.ndarray, names: Sequence[str]) -> Scores:
    """IoU and accuracy of each class, their means, the accuracy and the number of points.

    The IoU of a class is None if no point has or gets it, its accuracy if no point has it.
    """
    correct, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    union = true + predicted - correct
    iou, class_accuracy = (
        {name: float(c / n) if n else None for name, c, n in zip(names, correct, number, strict=True)}
        for number in (union, true)
    )
    total = int(confusion.sum())
    accuracy = float(correct.sum() / total) if total else None
    return {"miou": _mean(iou), "accuracy": accuracy, "mean_class_accuracy": _mean(class_accuracy), "iou": iou,
            "class_accuracy": class_accuracy, "points": total}  # fmt: skip


def _mean(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return float(np.mean(known)) if known else None
