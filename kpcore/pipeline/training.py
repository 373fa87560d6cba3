"""Training on the tape, with checkpoints, a log and curves in a folder; and trained models."""

from __future__ import annotations

import itertools
import json
import math
import os
import reprlib
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore import nn
from kpcore.config import KpcoreWarning, free_memory
from kpcore.files import expanded, replacing
from kpcore.io.cloud import list_names
from kpcore.nn import checkpoints
from kpcore.nn.networks import check_arrays, shapes
from kpcore.pipeline import batches, blocks, filenames, labelling, statistics
from kpcore.pipeline.cache import Cache
from kpcore.pipeline.class_table import check_classes, class_table
from kpcore.pipeline.curves import LOG, curves
from kpcore.pipeline.data import IGNORED, class_counts, columns_of, load, load_training
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from io import FileIO

    from kpcore.nn.blocks import Parameters
    from kpcore.pipeline.class_table import ClassTable
    from kpcore.pipeline.data import Columns, PartClouds, Scene
    from kpcore.pipeline.settings import Settings, Source
    from kpcore.pipeline.settings import Training as TrainingSettings

LAST, BEST = "last.safetensors", "best.safetensors"
_BETWEEN_CHECKPOINTS = 60  # seconds; results do not depend on it


class NotFinite(ArithmeticError):
    """A loss or gradient is NaN or infinite; the message names the first layer with such an output."""


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
    init : Path, optional
        A trained model to begin with, see `_Initial`. With `resume` it is not read, as the run has begun with it.
    say : callable, optional
        Called with a line before each part of the work until the first step, which may take minutes.
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
    files: dict[str, list[str]]  #: the scenes of each list in [data], with those of folders and patterns
    init: str | None  #: the model that the run began with
    scenes: list[Scene]
    validation_scenes: list[Scene]  #: by which the best network is chosen; without any it is chosen by test_scenes
    test_scenes: list[Scene]
    classes: ClassTable  #: points and files of each class
    warnings: list[str]  #: what is doubtful about the data
    model: Model
    optimizer: nn.Optimizer[np.ndarray]
    schedule: Callable[[float], float]  #: the learning rate of a step, counted over all epochs
    class_weights: np.ndarray | None

    def __init__(self, settings: Settings, out: str | os.PathLike[str], folder: str | os.PathLike[str], *,
                 seed: int = 0, resume: bool = False, read_parts: PartClouds | None = None,
                 init: str | os.PathLike[str] | None = None,
                 say: Callable[[str], object] = lambda line: None) -> None:  # fmt: skip
        if settings.data.folds is not None:
            raise ValueError("settings: expected those of one fold, from Settings.by_fold, got those of all folds")
        cache = None
        if settings.data.cache is not None:
            cache = Cache(Path(folder, expanded(settings.data.cache)), say)
        settings = _without_cache(settings)  # it is a folder of this machine, on which no number of the model depends
        self.settings, self.out, self.folder, self.seed = settings, Path(out), Path(folder), seed
        self.epoch = self.step = 0
        self.best, self.results, self.loss = -1.0, [], None
        test = settings.data.test
        self.files = filenames.listed(settings, folder)
        net = settings.net()
        sizes = _check_memory(settings, net)
        saved = saved_run(self.out / LAST, settings, seed) if resume else None
        initial = _Initial(Path(init), settings, net) if init is not None and not resume else None
        self.init = str(init) if initial else saved.run.get("init") if saved else None
        if resume and init is not None and self.init is None:
            raise ValueError(f"init: expected none, as the run to resume in {out} began without, got {init}")
        columns = initial.model.columns if initial else saved.columns if saved else None
        say(f"reading the data: {', '.join(f'{len(one)} for {name}' for name, one in self.files.items() if one)}")
        self.scenes, self.validation_scenes, columns = load_training(settings, folder, read_parts, columns, cache)
        self.test_scenes = load(settings, test, folder, columns, read_parts, cache)[0] if test else []
        parts = {"train": self.scenes, "validation": self.validation_scenes, "test": self.test_scenes}
        self.classes = class_table(settings, parts)
        self.warnings = check_classes(settings, parts, self.classes)
        if tested := filenames.trained_and_tested(settings, folder):
            self.warnings.append(f"[data] test: expected points that are not in train, got {list_names(tested)}, so "
                                 "that their scores are too good")  # fmt: skip
        for message in self.warnings:
            warnings.warn(message, KpcoreWarning, stacklevel=2)
        say(sizes)
        params, state = net.init(seed)
        if initial:
            say(initial.fill(params, state))
        size = of_training = None
        if not settings.whole:
            size = blocks.default_size(settings, self.scenes)
            of_training = statistics.of_training(settings, net, columns, self.scenes, size.side)
        self.model = Model(net, params, state, settings, columns, size, of_training)
        self.optimizer = self._optimizer(params)
        self.schedule = _schedule(settings.training)
        self.class_weights = self._class_weights()
        if saved:
            self._resume(saved, say)

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
                for entry in self._scores(self.epoch == training.epochs):
                    _append(log, entry)
                    if watch:
                        watch(entry)
                self._save_last()
                saved = time.perf_counter()
        if not (self.test_scenes or self.validation_scenes):
            self._save(BEST, {})
        elif not (self.out / BEST).is_file():
            self._save(BEST, {"result": self.results[-1], "chosen_by": "the last epoch"})
            warnings.warn(f"{self.out / BEST}: expected the best network, got none; it is that of the last epoch now",
                          KpcoreWarning, stacklevel=2)  # fmt: skip
        curves(self.out, classifies=self.settings.classifies)
        return self.results

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

    def _scores(self, is_last: bool) -> Iterator[dict[str, Any]]:
        """The log entries of the scores after an epoch that is validated, or the last; saves the best network so far.

        With scenes for validation the test scenes are labelled once, by the best network after the last epoch.
        """
        if not (is_last or self.epoch % self.settings.training.validate == 0):
            return
        if not self.validation_scenes:
            if self.test_scenes:
                yield self._validate("test", self.test_scenes)
            return
        yield self._validate("validation", self.validation_scenes)
        if is_last and self.test_scenes:
            best = Model.load(self.out / BEST) if (self.out / BEST).is_file() else self.model
            best.history.setdefault("result", self.results[-1])
            begin = time.perf_counter()
            confusion, scores = labelling.evaluate_scores(best, self.test_scenes)
            result = {"epoch": self.epoch, "confusion": confusion.tolist(), **scores}
            _save(self.out / BEST, best, {**best.history, "test": result})
            of = best.history["result"]["epoch"]
            yield {"epoch": self.epoch, "test": scores, "best": of, "seconds": time.perf_counter() - begin}

    def _validate(self, kind: str, scenes: list[Scene]) -> dict[str, Any]:
        """Evaluate scenes, save the network if it is the best so far; returns the log entry."""
        begin = time.perf_counter()
        confusion, scores = labelling.evaluate_scores(self.model, scenes)
        entry = {"epoch": self.epoch, kind: scores, "seconds": time.perf_counter() - begin}
        self.results.append({"epoch": self.epoch, "confusion": confusion.tolist(), **scores})
        score = scores["accuracy" if self.settings.classifies else "miou"]
        if score is not None and score > self.best:
            self.best = score
            self._save(BEST, {"result": self.results[-1], "chosen_by": kind})
        return entry

    # ---- checkpoints

    def _save(self, name: str, more: Mapping[str, Any]) -> None:
        _save(self.out / name, self.model, {"classes": self.classes, "warnings": self.warnings, **more})

    def _save_last(self) -> None:
        model = self.model
        groups = {"params": model.params, "state": model.state, "optimizer": self.optimizer.state()}
        run = {"epoch": self.epoch, "step": self.step, "seed": self.seed, "best": self.best, "results": self.results,
               "points": self._num_points(), "files": self.files, "init": self.init}  # fmt: skip
        checkpoints.write(self.out / LAST, groups, checkpoints.about_network(model.net) | model.about()
                          | {"classes": self.classes, "warnings": self.warnings, "run": run})  # fmt: skip

    def _resume(self, saved: SavedRun, say: Callable[[str], object]) -> None:
        last = self.out / LAST
        with checkpoints.errors_name(f"resume: {last}"):
            self._check_files(saved.run.get("files"))
            if saved.run.get("points") != self._num_points():
                raise ValueError(f"expected the data of the run to resume, {saved.run.get('points')} points to train "
                                 f"on, got {self._num_points()}")  # fmt: skip
            self._restore(saved.groups, saved.run)
        self._cut_log()
        self._say_what_changes(saved.settings, say)

    def _check_files(self, before: Any) -> None:
        """Raise an error if a folder or a pattern has other files than when the run began."""
        if not isinstance(before, dict) or before == self.files:  # not stored by earlier versions
            return
        changes = []
        for name, files in self.files.items():
            earlier = before.get(name, [])
            for word, some, others in (("new", files, earlier), ("missing", earlier, files)):
                if other := [one for one in some if one not in others]:
                    changes.append(f"{word} in {name}: {list_names(other)}")
        raise ValueError(f"expected the files of the run to resume, got others: {'; '.join(changes) or 'their order'}")

    def _say_what_changes(self, before: Settings, say: Callable[[str], object]) -> None:
        """Say what more epochs change in the steps that are left."""
        training = self.settings.training
        if training.epochs == before.training.epochs:
            return
        line = f"{training.epochs} epochs instead of {before.training.epochs}"
        if training.schedule == "one_cycle":
            step = self.epoch * training.steps + self.step
            rates = [schedule(step) for schedule in (self.schedule, _schedule(before.training))]
            line += ": the cycle of the learning rate is stretched to them, which is now {:.3g} instead of {:.3g}"
            line = line.format(*rates)
        say(line)

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
                is_score = "test" in entry or "validation" in entry
                at = entry["epoch"], 0 if is_score else entry["step"]
                is_done = at <= (self.epoch, self.step) if is_score else at < (self.epoch, self.step)
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

    def _class_weights(self) -> np.ndarray | None:
        kind = self.settings.training.class_weights
        if kind == "none":
            return None
        classes = len(self.settings.names)
        counts = np.sum([class_counts(scene.labels, classes) for scene in self.scenes], axis=0)
        weights = (1 / np.maximum(counts, 1)) ** (0.5 if kind == "root" else 1.0)
        weights[counts == 0] = 0
        return (weights / weights[counts > 0].mean()).astype(np.float32)


def _save(path: Path, model: Model, more: Mapping[str, Any]) -> None:
    nn.save(path, model.net, model.params, model.state, **model.about(), **more)


def has_run(out: Path) -> bool:
    """Whether a run in a folder has done a step."""
    return (out / LOG).is_file() and (out / LOG).stat().st_size > 0


class SavedRun(NamedTuple):
    """The last checkpoint of a run."""

    groups: dict[str, checkpoints.Arrays]
    run: dict[str, Any]  #: how far it is
    settings: Settings  #: those that it was run with
    columns: Columns


def saved_run(last: Path, settings: Settings, seed: int) -> SavedRun:
    """Read the last checkpoint of a run; an error if it does not go on with the settings or has another seed.

    `epochs` may be larger than in the run. `validate`, `workers` and `cache` may be others: no weight depends on them.
    """
    settings = _without_cache(settings)
    groups, about = checkpoints.read(last)
    with checkpoints.errors_name(f"resume: {last}"):
        run = about.get("run")
        if not isinstance(run, dict):
            raise ValueError(f"expected the {LAST} of a training, got another checkpoint")
        saved = from_dict(about.get("settings"))
        if differences := _differences(saved, settings):
            raise ValueError(f"expected the settings of the run to resume, got others: {'; '.join(differences)}")
        if run.get("seed") != seed:
            raise ValueError(f"seed: expected {run.get('seed')}, as of the run to resume, got {seed}")
        return SavedRun(groups, run, saved, columns_of(saved, about.get("columns")))


def _without_cache(settings: Settings) -> Settings:
    return replace(settings, data=replace(settings.data, cache=None))


def _differences(saved: Settings, settings: Settings) -> list[str]:
    """A text for each setting that is not that of the run to resume, up to eight of them."""
    allowed = {"epochs", "validate", "workers"}
    if settings.training.epochs < saved.training.epochs:
        allowed.remove("epochs")
    before, now = (dict(_flat(one.asdict())) for one in (saved, settings))
    differences = [
        f"{name}: {reprlib.repr(before.get(name))} in the run, {reprlib.repr(now.get(name))} in the file"
        for name in {**before, **now}
        if before.get(name) != now.get(name) and name not in {f"[training] {one}" for one in allowed}
    ]
    for name in filenames.LISTS:
        lists = getattr(saved.data, name), getattr(settings.data, name)
        if lists[0] != lists[1] and all(isinstance(one, list) for one in lists):
            earlier, later = _other_scenes(*lists), _other_scenes(*lists[::-1])
            text = f"{earlier} in the run, {later} in the file" if earlier != later else "in another order"
            differences = [one for one in differences if not one.startswith(f"[data] {name}: ")]
            differences.append(f"[data] {name}: {text}")
    return differences[:8] + ([f"and {len(differences) - 8} more"] if len(differences) > 8 else [])


def _other_scenes(scenes: Sequence[Source], others: Sequence[Source]) -> str:
    """The scenes that are not among the others: their names, or all their settings where others have these names."""
    names = {str(one) for one in others}
    return list_names(repr(one) if str(one) in names else str(one) for one in scenes if one not in others)


def _flat(values: Mapping[str, Any], table: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all settings in nested dicts, such as ("[training] lr", 0.01)."""
    for name, value in values.items():
        if isinstance(value, dict) and table != "data.classes":
            inner = name if not table else table if name == "options" else f"{table}.{name}"
            yield from _flat(value, inner)
        else:
            yield f"[{table}] {name}", value


def _schedule(training: TrainingSettings) -> Callable[[float], float]:
    """The learning rate of each step."""
    if training.schedule == "one_cycle":
        return nn.one_cycle(training.lr, max(2, training.epochs * training.steps))
    return nn.exponential(training.lr, training.lr_decay, max(1, round(training.lr_decay_epochs * training.steps)))


def _check_memory(settings: Settings, net: nn.Network | nn.KPNeXt) -> str:
    """A line with the sizes of the network; a MemoryError if they exceed what is free, before anything is drawn.

    A checkpoint needs most: besides parameters and moments, a copy of the moments, and of all of them a copy and the
    text that is written. Measured: 7 times the parameters with one moment (SGD), 11 times with two (AdamW). What the
    features of a batch take is not counted.
    """
    params, state = (sum(map(math.prod, one.values())) for one in shapes(net))
    moments = 1 if settings.training.optimizer == "sgd" else 2
    size, free = 4 * ((3 + 4 * moments) * params + 3 * state), free_memory()
    sizes = f"{params:,} parameters, which need {_bytes(size)} with gradients, optimizer and checkpoint"
    if size > free:
        network = settings.network
        levels = f"levels = {network.levels}, " if network.kind == "kpconv" else ""
        raise MemoryError(f"[network] {levels}width = {network.width}: {sizes}, and {_bytes(free)} are free")
    return f"initialising {sizes}"


def _bytes(size: float) -> str:
    """A size with a unit in which it is at least 1."""
    power = max(one for one in (1, 2, 3) if size >= 1024**one or one == 1)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


class _Initial:
    """A trained model that a training begins with.

    All its arrays are taken, also the running statistics; but if the classes are others, or in another order, the layer
    of the logits stays new, as its columns are classes (of parts: all layers of the categories). Features are scaled as
    for the model, so that each of their numbers means the same.

    Raises ValueError with all that differs unless the features and the network are those of the model.
    """

    # They change no array and no result of the trained network.
    _FREE = ("num_classes", "heads", "dropout", "momentum", "fitting_power", "repulse_extent")

    def __init__(self, path: Path, settings: Settings, net: nn.Network | nn.KPNeXt) -> None:
        self.path, self.names, self.model = path, settings.names, Model.load(path)
        trained = self.model.settings
        differences = []
        if [*trained.widths.items()] != [*settings.widths.items()]:
            differences.append(f"features {', '.join(trained.widths)} in the model, {', '.join(settings.widths)} here")
        if type(self.model.net) is not type(net):
            differences.append(f"{type(self.model.net).__name__} in the model, {type(net).__name__} here")
        else:
            differences += [
                f"{one.name} {reprlib.repr(getattr(self.model.net, one.name))} in the model, "
                f"{reprlib.repr(getattr(net, one.name))} here"
                for one in fields(net)
                if one.name not in (*self._FREE, "num_features")
                and getattr(net, one.name) != getattr(self.model.net, one.name)
            ]
        if differences:
            raise ValueError(f"init: {path}: expected the network of the settings, got another: "
                             f"{'; '.join(differences)}")  # fmt: skip
        self._same = trained.names == settings.names and trained.heads == settings.heads

    def fill(self, params: dict[str, np.ndarray], state: dict[str, np.ndarray]) -> str:
        """Copy the arrays of the model into those of the new network; returns a line that says what was taken."""
        taken = new = 0
        for arrays, source in ((params, self.model.params), (state, self.model.state)):
            for name, value in arrays.items():
                if self._same or not name.startswith(("head.1.", "heads.")):
                    value[...] = source[name]
                    taken += value.size
                else:
                    new += value.size
        line = f"begins with {self.path}: {taken:,} numbers are taken, features are scaled as there"
        if self._same:
            return line
        before, now = list_names(self.model.settings.names), list_names(self.names)
        return f"{line}; {new:,} are new, of the layer for the classes, which are {now}, there {before}"


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
