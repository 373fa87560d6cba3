"""Class labels of clouds by votes of overlapping spheres, and the scores of such labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np

import kpcore as kp
from kpcore import moved
from kpcore.pipeline import batches
from kpcore.pipeline.data import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from typing_extensions import NotRequired

    from kpcore.pipeline.data import Scene
    from kpcore.pipeline.settings import Training
    from kpcore.pipeline.training import Model

_POINTS_AT_ONCE = 1_000_000
_SMOOTH = 0.95  # weight of the mean of a point's earlier votes, as in the KPConv code


class Scores(TypedDict):
    """Scores of labels, see `scores`; the log of a training holds them as JSON."""

    miou: float | None
    accuracy: float | None
    mean_class_accuracy: float | None
    iou: dict[str, float | None]
    class_accuracy: dict[str, float | None]
    points: int
    class_miou: NotRequired[float | None]  #: of parts alone, see `part_scores`


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
        while not covered.all() or sampler.lowest < votes - 1:
            # Spheres raise potentials up to their radius but vote only up to vote_radius, so that a place near several
            # spheres may never have the lowest potential.
            left_out = sampler.lowest >= votes
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
        voted = kp.softmax(_logits(model, batch))
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


def point_probabilities(model: Model, scene: Scene, votes: int | None = None, seed: int = 0,
                        watch: Callable[[float], object] | None = None
                        ) -> Iterator[tuple[slice, np.ndarray]]:  # fmt: skip
    """(rows, (n, classes) probabilities) of the scene's points before subsampling, those of the nearest one after it.

    A million points at once, since those of all may need ten times the memory of the cloud.
    """
    of_voxels = probabilities(model, scene, votes, seed, watch)
    nearest = scene.stored.nearest(scene.full) if scene.stored else scene.tree.knn_search(scene.full, 1).index
    for begin in range(0, len(nearest), _POINTS_AT_ONCE):
        rows = slice(begin, begin + _POINTS_AT_ONCE)
        yield rows, of_voxels[nearest[rows]]


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts of points by true class (row) and predicted class (column); IGNORED is not counted."""
    counted = true != IGNORED
    pairs = classes * true[counted] + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def whole_probabilities(model: Model, scenes: Sequence[Scene], votes: int | None = None, seed: int = 0,
                        watch: Callable[[float], object] | None = None) -> Iterator[np.ndarray]:  # fmt: skip
    """Class probabilities of each whole scene, the mean over `votes`: (1, classes), or (N, classes) for its points.

    The first vote is that of the scene as it is; in each further one it is augmented as in training. `watch` is called
    with the fraction of votes that are done.
    """
    training, net = model.settings.training, model.net
    votes, size = training.votes if votes is None else votes, training.batch_clouds
    jobs = [(begin, vote) for begin in range(0, len(scenes), size) for vote in range(votes)]

    def make(job: tuple[int, int]) -> batches.Batch:
        begin, vote = job
        spheres = [batches.whole_scene(scenes, number) for number in range(begin, min(begin + size, len(scenes)))]
        rng = np.random.default_rng([seed, vote, begin]) if vote else None
        return batches.make_batch(net, scenes, model.columns, spheres, training, rng, learns=False)

    total = np.float32(0)
    for number, batch in enumerate(batches.Prefetched(jobs, make, training.workers), 1):
        total = total + kp.softmax(_logits(model, batch))
        if watch:
            watch(number / len(jobs))
        if number % votes == 0:
            bounds = batch.pyramid[0].row_splits if net.segments else np.arange(len(batch.spheres) + 1)
            yield from np.split(total / votes, bounds[1:-1])
            total = np.float32(0)


def scene_probabilities(model: Model, scenes: Sequence[Scene], votes: int | None = None, seed: int = 0,
                        watch: Callable[[float], object] | None = None) -> np.ndarray:  # fmt: skip
    """(scenes, classes) class probabilities by a network that classifies scenes, see `whole_probabilities`."""
    return np.concatenate([*whole_probabilities(model, scenes, votes, seed, watch)])


def _logits(model: Model, batch: batches.Batch) -> np.ndarray:
    return model.net(kp, model.params, model.state, batch.pyramid, batch.features, **batch.options).logits


def part_probabilities(model: Model, scenes: Sequence[Scene], votes: int | None = None,
                       watch: Callable[[float], object] | None = None) -> Iterator[np.ndarray]:  # fmt: skip
    """(n, classes) probabilities of the points of each object before subsampling, those of the nearest one after it."""
    shares = whole_probabilities(model, scenes, votes, watch=watch)
    for scene, share in zip(scenes, shares, strict=True):
        yield share[kp.knn_search(scene.points, scene.full, 1).index]


def part_scores(matrices: Sequence[np.ndarray], categories: Sequence[int], heads: Mapping[str, int]) -> Scores:
    """Scores of part labels, from the confusion matrix of each object, as the benchmark ShapeNetPart defines them.

    The IoU of an object is the mean over the parts of its category; a part that neither its labels nor the predicted
    ones have counts 1. `iou` is the mean over the objects of each category, None without any; `miou` is the mean over
    all objects, `class_miou` the mean over categories.
    """
    begins = np.cumsum([0, *heads.values()])
    values: dict[str, list[float]] = {name: [] for name in heads}
    for matrix, category in zip(matrices, categories, strict=True):
        span = slice(begins[category], begins[category + 1])
        in_category = matrix[span, span]
        correct = np.diag(in_category)
        union = in_category.sum(axis=1) + in_category.sum(axis=0) - correct
        values[list(heads)[category]].append(float(np.where(union > 0, correct / np.maximum(union, 1), 1).mean()))
    iou = {name: float(np.mean(of_objects)) if of_objects else None for name, of_objects in values.items()}
    common = scores(np.sum(matrices, axis=0), [str(number) for number in range(int(begins[-1]))])
    miou = float(np.mean([one for ones in values.values() for one in ones]))
    return common | {"miou": miou, "class_miou": _mean(iou),
                     "iou": iou, "class_accuracy": {}}  # fmt: skip


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


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
