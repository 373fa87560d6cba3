"""Training on the tape, with checkpoints, a log and curves in a folder; and trained models."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import kpcore as kp
from kpcore import nn
from kpcore.files import replacing
from kpcore.io.cloud import list_names
from kpcore.nn import checkpoints
from kpcore.nn.networks import check_arrays
from kpcore.pipeline import batches, voting
from kpcore.pipeline.curves import LOG, curves
from kpcore.pipeline.data import IGNORED, columns_of, load
from kpcore.pipeline.settings import from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from io import FileIO

    from kpcore.nn.blocks import Parameters
    from kpcore.pipeline.data import Columns, PartClouds, Scene
    from kpcore.pipeline.settings import Settings

LAST, BEST = "last.safetensors", "best.safetensors"
_BETWEEN_CHECKPOINTS = 60  # seconds; results do not depend on it


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the first layer with such an output."""


class Model:
    """A trained network with its settings, which say how the features of a cloud are made."""

    net: nn.Network | nn.KPNeXt
    params: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    settings: Settings
    columns: Columns

    def __init__(self, net: nn.Network | nn.KPNeXt, params: dict[str, np.ndarray], state: dict[str, np.ndarray],
                 settings: Settings, columns: Columns) -> None:  # fmt: skip
        self.net, self.params, self.state, self.settings, self.columns = net, params, state, settings, columns

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Load a file that a training wrote."""
        net, params, state, about = nn.load(path)
        with checkpoints.errors_name(path):
            if not {"settings", "columns"} <= about.keys():
                got = "got one without its settings or columns"
                if "converted" in about:
                    got = "got one of kpcore convert, which says what is missing for segment and predict"
                raise ValueError(f"expected a file that kpcore train wrote, {got}")
            settings = from_dict(about["settings"])
            _check_network(net, settings)
            return cls(net, params, state, settings, columns_of(settings, about["columns"]))

    def about(self) -> dict[str, Any]:
        """Settings and columns in JSON types, for the header of a checkpoint."""
        return {"settings": self.settings.asdict(), "columns": asdict(self.columns)}


def _check_network(net: nn.Network | nn.KPNeXt, settings: Settings) -> None:
    """Raise an error unless the network fits the data of the settings."""
    expected = settings.net()
    for name in ("num_features", "num_classes", "voxel_size", "dimension", "segments", "origin"):
        if getattr(net, name) != getattr(expected, name):
            raise ValueError(f"network: expected {name} {getattr(expected, name)}, as in its settings, got "
                             f"{getattr(net, name)}")  # fmt: skip


class Training:
    """A training run that writes to a folder; new, or resumed from a checkpoint.

    All random numbers depend only on the seed and the numbers of the epoch and the step, so that a run resumed from any
    of its checkpoints is the same to the bit as one that was never stopped.

    Parameters
    ----------
    settings : Settings
    out : Path
        The folder to write to; with `resume` that of the run to resume.
    folder : Path
        The folder that file names in the settings are relative to.
    seed : int
    resume : bool
    read_parts : dict, optional
        Scenes that are read once for several trainings, which the first one fills, see `data.load_scenes`.
    """

    settings: Settings
    out: Path
    folder: Path
    seed: int
    epoch: int  #: number of the next epoch
    step: int  #: number of the next step in that epoch
    best: float  #: the best score of a validation so far, -1 before the first
    results: list[dict[str, Any]]  #: of each validation so far
    loss: float | None  #: of the last step
    scenes: list[Scene]
    test_scenes: list[Scene]
    model: Model
    optimizer: nn.Optimizer[np.ndarray]
    schedule: Callable[[float], float]  #: the learning rate of a step, counted over all epochs
    class_weights: np.ndarray | None

    def __init__(self, settings: Settings, out: str | os.PathLike[str], folder: str | os.PathLike[str], *,
                 seed: int = 0, resume: bool = False, read_parts: PartClouds | None = None) -> None:  # fmt: skip
        if settings.data.folds is not None:
            raise ValueError("settings: expected those of one fold, from Settings.by_fold, got those of all folds")
        self.settings, self.out, self.folder, self.seed = settings, Path(out), Path(folder), seed
        self.epoch = self.step = 0
        self.best, self.results, self.loss = -1.0, [], None
        train, test = settings.data.train, settings.data.test
        self.scenes, columns = load(settings, train, folder, read_parts=read_parts)
        self.test_scenes = load(settings, test, folder, columns, read_parts)[0] if test else []
        self._warn_of_classes()
        net = settings.net()
        params, state = net.init(seed)
        self.model = Model(net, params, state, settings, columns)
        self.optimizer = self._optimizer(params)
        self.schedule = self._schedule()
        self.class_weights = self._class_weights()
        if resume:
            self._resume()

    # ---- a run

    def run(self, watch: Callable[[dict[str, Any]], object] | None = None) -> list[dict[str, Any]]:
        """Train until all epochs are done. `watch` is called with the log entry of each step and validation."""
        training = self.settings.training
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.epoch or self.step):
            self._save_last()  # so that a run can be resumed before its first checkpoint is due
            with replacing(self.out / LOG):
                pass
        saved = time.perf_counter()
        with open(self.out / LOG, "ab", buffering=0) as log:
            while self.epoch < training.epochs:
                for entry in self._epoch():
                    _append(log, entry)
                    if watch:
                        watch(entry)
                    if time.perf_counter() - saved > _BETWEEN_CHECKPOINTS and self.step < training.steps:
                        self._save_last()
                        saved = time.perf_counter()
                self.epoch, self.step = self.epoch + 1, 0
                if self.test_scenes and (self.epoch % training.validate == 0 or self.epoch == training.epochs):
                    entry = self._validate()
                    _append(log, entry)
                    if watch:
                        watch(entry)
                self._save_last()
                saved = time.perf_counter()
        if not self.test_scenes:
            self._save(BEST, {})
        curves(self.out, classifies=self.settings.classifies)
        return self.results

    def _warn_of_classes(self) -> None:
        """Warn in one line of classes without points in the training data."""
        present = {number for scene in self.scenes for number in np.unique(scene.labels)}
        missing = [name for number, name in enumerate(self.settings.names) if number not in present]
        if missing and self.settings.data.kind in ("objects", "parts"):
            warnings.warn(
                f"[data] classes {', '.join(missing)}: no {self.settings.data.kind} in the training data", stacklevel=3
            )
        elif missing and not self.settings.digits:
            labels = np.unique(np.concatenate([np.unique(scene.cloud.labels) for scene in self.scenes]))
            warnings.warn(f"[data.classes] {', '.join(missing)}: no points in the training data, whose labels are "
                          f"{list_names(map(str, labels))}", stacklevel=3)  # fmt: skip

    def _epoch(self) -> Iterator[dict[str, Any]]:
        """The remaining steps of the epoch; yields the log entry of each."""
        training, epoch = self.settings.training, self.epoch
        rng = np.random.default_rng([self.seed, epoch])
        jobs = batches.training_jobs(self.scenes, training, self.settings.whole, rng, training.steps)
        numbered = itertools.islice(enumerate(jobs), self.step, None)

        def make(job: tuple[int, list[batches.Sphere]]) -> batches.Batch:
            number, spheres = job
            rng = np.random.default_rng([self.seed, epoch, number])
            return batches.make_batch(self.model.net, self.scenes, self.model.columns, spheres, training, rng)

        ready = batches.Prefetched(numbered, make, training.workers)
        waited, began = 0.0, time.perf_counter()
        for batch in ready:
            entry = self._train(batch)
            self.step += 1
            now = time.perf_counter()
            entry |= {"seconds": now - began, "waited": ready.waited - waited}
            waited, began = ready.waited, now
            yield entry

    def _train(self, batch: batches.Batch) -> dict[str, Any]:
        """Do one step; returns its log entry."""
        model, training = self.model, self.settings.training
        number = self.epoch * training.steps + self.step
        entry, grads = self._gradients(batch, seed=(self.seed << 32) + number)
        largest = 0.0
        for name, grad in grads.items():
            size = max(-grad.min(), grad.max())  # both are NaN where one element is
            if not math.isfinite(size):
                raise NotFinite(self._not_finite_report(batch, f"the gradient of {name} is not finite"))
            largest = max(largest, size)
        if 0 < training.clip_value < largest:
            nn.clip_by_value(grads, training.clip_value)
        if training.clip_norm:
            nn.clip_by_norm(grads, training.clip_norm)
        lr = self.schedule(number)
        self.optimizer.step(grads, lr)
        model.state, self.loss = entry.pop("state"), entry["loss"]
        return {"epoch": self.epoch, "step": self.step, **entry, "lr": lr, "points": len(batch.features)}

    def _gradients(self, batch: batches.Batch, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(log entry with the state after the step, gradients). The tape is freed on return."""
        model = self.model
        tensors = {name: kp.autodiff.Tensor(value) for name, value in model.params.items()}
        result = model.net(kp, tensors, model.state, batch.pyramid, batch.features, training=True, seed=seed,
                           **batch.options)  # fmt: skip
        entropy = kp.softmax_cross_entropy(result.logits, batch.labels, ignore_index=IGNORED,
                                           class_weights=self.class_weights)  # fmt: skip
        loss = entropy if result.regularization is None else entropy + result.regularization
        if not math.isfinite(loss.value):
            raise NotFinite(self._not_finite_report(batch, f"the loss is {loss.value}"))
        loss.backward()
        predicted, counted = result.logits.value.argmax(axis=1), batch.labels != IGNORED
        accuracy = float((predicted == batch.labels)[counted].mean()) if counted.any() else None
        entry = {
            "loss": float(loss.value),
            "entropy": float(entropy.value),
            "accuracy": accuracy,
            "state": result.state,
        }
        if result.regularization is not None:
            entry["regularization"] = float(result.regularization.value)
        return entry, {name: _grad(tensor) for name, tensor in tensors.items()}

    def _not_finite_report(self, batch: batches.Batch, symptom: str) -> str:
        """An error message that names the first layer whose output is not finite; all layers are computed again."""
        where = f"epoch {self.epoch}, step {self.step}: {symptom}"
        model = self.model
        for name, value in model.params.items():
            if not np.isfinite(value).all():
                return f"{where}; {name} is not finite already before the step: a smaller learning rate may help"
        if not np.isfinite(batch.features).all():
            return f"{where}; the features of the batch are not finite"
        watched = _CheckedOperators(model.params)
        try:
            model.net(watched, model.params, model.state, batch.pyramid, batch.features, training=True, seed=0,
                      **batch.options)  # fmt: skip
        except NotFinite as error:
            return f"{where}; {error}"
        return f"{where}; all layers' outputs are finite"

    def _validate(self) -> dict[str, Any]:
        """Evaluate the test scenes, save the network if it is the best so far; returns the log entry."""
        begin = time.perf_counter()
        confusion, scores = voting.evaluate_scores(self.model, self.test_scenes)
        entry = {"epoch": self.epoch, "test": scores, "seconds": time.perf_counter() - begin}
        self.results.append({"epoch": self.epoch, "confusion": confusion.tolist(), **entry["test"]})
        score = entry["test"]["accuracy" if self.settings.classifies else "miou"]
        if score > self.best:
            self.best = score
            self._save(BEST, {"result": self.results[-1]})
        return entry

    # ---- checkpoints

    def _save(self, name: str, more: Mapping[str, Any]) -> None:
        model = self.model
        nn.save(self.out / name, model.net, model.params, model.state, **model.about(), **more)

    def _save_last(self) -> None:
        model = self.model
        groups = {"params": model.params, "state": model.state, "optimizer": self.optimizer.state()}
        run = {"epoch": self.epoch, "step": self.step, "seed": self.seed, "best": self.best, "results": self.results,
               "points": self._num_points()}  # fmt: skip
        checkpoints.write(self.out / LAST, groups, checkpoints.about_network(model.net) | model.about() | {"run": run})

    def _resume(self) -> None:
        last = self.out / LAST
        groups, run = saved_run(last, self.settings, self.seed)
        with checkpoints.errors_name(f"resume: {last}"):
            if run.get("points") != self._num_points():
                raise ValueError(f"expected the data of the run to resume, {run.get('points')} points to train on, got "
                                 f"{self._num_points()}")  # fmt: skip
            self._restore(groups, run)
        self._cut_log()

    def _num_points(self) -> int:
        return sum(len(scene.points) for scene in self.scenes)

    def _restore(self, groups: Mapping[str, dict[str, np.ndarray]], run: Mapping[str, Any]) -> None:
        model, training = self.model, self.settings.training
        epoch, step, best, results = (run.get(name) for name in ("epoch", "step", "best", "results"))
        done = epoch * training.steps + step if type(epoch) is type(step) is int else -1
        optimizer = groups.get("optimizer", {})
        is_run = 0 <= done <= training.epochs * training.steps and 0 <= step < training.steps
        if not (is_run and type(best) in (int, float) and isinstance(results, list) and "num_steps" in optimizer):
            raise ValueError(
                f"expected the state of a run of {training.epochs} epochs, got epoch {epoch!r}, step {step!r}"
            )
        if optimizer["num_steps"].shape or optimizer["num_steps"] != done:
            raise ValueError(f"expected an optimizer after {done} steps, got {optimizer['num_steps']}")
        arrays = groups.get("params", {}), groups.get("state", {})
        check_arrays(model.net, *arrays)
        if other_dtypes := {value.dtype for values in arrays for value in values.values()} - {np.dtype(np.float32)}:
            raise ValueError(f"params, state: expected float32, got {', '.join(map(str, other_dtypes))}")
        self.optimizer.restore(optimizer)
        for name, value in model.params.items():
            value[...] = arrays[0][name]
        model.state = arrays[1]
        self.epoch, self.step, self.best, self.results = epoch, step, best, results

    def _cut_log(self) -> None:
        """Remove log entries of steps after the checkpoint, which are done again."""
        path, kept = self.out / LOG, []
        lines = path.read_bytes().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                is_test = "test" in entry
                at = entry["epoch"], 0 if is_test else entry["step"]
                is_done = at <= (self.epoch, self.step) if is_test else at < (self.epoch, self.step)
            except (ValueError, TypeError, KeyError):
                if number < len(lines):
                    raise ValueError(f"resume: {path}: line {number}: expected a log entry of a training") from None
                break  # the last line, which the process did not finish
            if is_done:
                kept.append(line + b"\n")
        with replacing(path) as part:
            part.write_bytes(b"".join(kept))

    # ---- optimizer, schedule, class weights

    def _optimizer(self, params: dict[str, np.ndarray]) -> nn.Optimizer[np.ndarray]:
        training = self.settings.training
        scales = {"offset": training.offset_lr, "kernel_points": training.kernel_points_lr}
        if training.optimizer == "sgd":
            return nn.sgd(params, momentum=training.momentum, weight_decay=training.weight_decay, lr_scales=scales)
        return nn.adamw(params, weight_decay=training.weight_decay, lr_scales=scales)

    def _schedule(self) -> Callable[[float], float]:
        training = self.settings.training
        if training.schedule == "one_cycle":
            return nn.one_cycle(training.lr, max(2, training.epochs * training.steps))
        return nn.exponential(training.lr, training.lr_decay, max(1, round(training.lr_decay_epochs * training.steps)))

    def _class_weights(self) -> np.ndarray | None:
        kind = self.settings.training.class_weights
        if kind == "none":
            return None
        labels = np.concatenate([scene.labels for scene in self.scenes])
        counts = np.bincount(labels[labels != IGNORED], minlength=len(self.settings.names))
        weights = (1 / np.maximum(counts, 1)) ** (0.5 if kind == "root" else 1.0)
        weights[counts == 0] = 0
        return (weights / weights[counts > 0].mean()).astype(np.float32)


def has_run(out: Path) -> bool:
    """Whether a run in a folder has done a step."""
    return (out / LOG).is_file() and (out / LOG).stat().st_size > 0


def saved_run(last: Path, settings: Settings, seed: int) -> tuple[dict[str, checkpoints.Arrays], dict[str, Any]]:
    """(groups, run) of the last checkpoint of a run; an error if it has other settings or another seed."""
    groups, about = checkpoints.read(last)
    with checkpoints.errors_name(f"resume: {last}"):
        run = about.get("run")
        if not isinstance(run, dict):
            raise ValueError(f"expected the {LAST} of a training, got another checkpoint")
        saved = from_dict(about.get("settings"))
        if replace(saved, training=replace(saved.training, workers=0)) != replace(
            settings, training=replace(settings.training, workers=0)
        ):  # results do not depend on workers
            raise ValueError("expected the settings of the run to resume, got others")
        if run.get("seed") != seed:
            raise ValueError(f"seed: expected {run.get('seed')}, as of the run to resume, got {seed}")
    return groups, run


def _grad(tensor: kp.autodiff.Tensor) -> np.ndarray:
    return np.zeros_like(tensor.value) if tensor.grad is None else tensor.grad


def _append(log: FileIO, entry: dict[str, Any]) -> None:
    """Append a line to the log, or nothing: a full disk may have taken a part of it, which is removed."""
    begin, left = log.seek(0, os.SEEK_END), json.dumps(entry).encode() + b"\n"
    try:
        while left:
            left = left[log.write(left) :]
    except OSError as error:
        log.truncate(begin)
        raise OSError(error.errno, error.strerror, log.name) from error


class _CheckedOperators(ModuleType):
    """The operators of kpcore; the first whose result is not finite raises an error that names its layer."""

    def __init__(self, params: Parameters[np.ndarray]) -> None:
        super().__init__(kp.__name__)
        self._names, self._layer = {id(value): name for name, value in params.items()}, "the input"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(kp, name)

        def checked(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                self._layer = self._names.get(id(value), self._layer)
            out = function(*args, **kwargs)
            first = out[0] if isinstance(out, tuple) else out
            if not np.isfinite(first).all():
                layer = self._layer.rpartition(".")[0] or self._layer
                raise NotFinite(f"the first result that is not finite comes from {name} in layer {layer}")
            return out

        return checked
