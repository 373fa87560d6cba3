"""Trained models: their file, and labels of points by them."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpcore import nn
from kpcore.backends import checks, devices
from kpcore.config import KpcoreWarning
from kpcore.io.cloud import Content, Request, cloud_of, list_names
from kpcore.nn import checkpoints
from kpcore.pipeline import blocks, labelling, statistics, voting
from kpcore.pipeline.data import HEIGHT, HEIGHT_FIELD, columns_of, object_scene
from kpcore.pipeline.objects import in_unit_sphere
from kpcore.pipeline.settings import COMPUTED_FEATURES, from_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike

    from kpcore.io import Cloud
    from kpcore.pipeline.blocks import BlockSize
    from kpcore.pipeline.data import Columns
    from kpcore.pipeline.settings import Settings
    from kpcore.pipeline.statistics import Statistics


_MOST_ROUNDING = 0.05  # of coordinates, in voxels
_RANGES = {"one": "constant", "local": "relative to the centre of a sphere"}


class Prediction(NamedTuple):
    """What `Model.predict` returns; arrays are CuPy arrays if the points are."""

    labels: np.ndarray  #: (N,) int32, as in files of the training; (1,) for a model of objects
    classes: np.ndarray  #: (N,) positions in `Model.classes`
    probabilities: np.ndarray  #: (N, classes) float32
    confidence: np.ndarray  #: (N,) probability of the class
    warnings: tuple[str, ...]  #: why the result is not to be trusted, in a line each


class Model:
    """A trained network with its settings, which say how the features of a cloud are made; see `kpcore.load_model`."""

    net: nn.Network | nn.KPNeXt
    params: dict[str, np.ndarray]
    state: dict[str, np.ndarray]
    settings: Settings
    columns: Columns
    block_size: BlockSize  #: of the blocks in which clouds are labelled
    statistics: Statistics | None  #: of the training's input; None in files of versions before 0.3
    history: dict[str, Any]  #: what else the file says of the training: the scores of the network, the table of classes

    def __init__(self, net: nn.Network | nn.KPNeXt, params: dict[str, np.ndarray], state: dict[str, np.ndarray],
                 settings: Settings, columns: Columns, block_size: BlockSize | None = None,
                 statistics: Statistics | None = None, history: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.net, self.params, self.state, self.settings, self.columns = net, params, state, settings, columns
        self.block_size = block_size or blocks.size_without_training(settings)
        self.statistics, self.history = statistics, history or {}

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mapped: bool = False) -> Model:
        """Load a file that a training wrote; with `mapped`, all processes of a machine share its arrays: `nn.load`."""
        net, params, state, about = nn.load(path, mapped=mapped)
        with checkpoints.errors_name(path):
            if not {"settings", "columns"} <= about.keys():
                got = "got one without its settings or columns"
                if "converted" in about:
                    got = "got one of kpcore convert, which says what is missing for segment and predict"
                raise ValueError(f"expected a file that kpcore train wrote, {got}")
            settings = from_dict(about.pop("settings"))
            _check_network(net, settings)
            columns = columns_of(settings, about.pop("columns"))
            size, described = about.pop("blocks", None), about.pop("statistics", None)
            for kind in ("result", "test"):
                _check_result(kind, about.get(kind))
            return cls(net, params, state, settings, columns, blocks.size_of(size) if size else None,
                       statistics.from_dict(described, columns) if described else None, about)  # fmt: skip

    def about(self) -> dict[str, Any]:
        """Settings, columns, size of blocks and statistics in JSON types, for the header of a checkpoint."""
        about = {"settings": self.settings.asdict(), "columns": asdict(self.columns)}
        if not self.settings.whole:
            about["blocks"] = self.block_size._asdict()
        if self.statistics:
            about["statistics"] = self.statistics.asdict()
        return about

    def __repr__(self) -> str:
        return f"Model({len(self.classes)} classes: {', '.join(self.classes)}; features: {', '.join(self.features)})"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.settings.names

    @property
    def label_values(self) -> np.ndarray:
        """(classes,) int32, the label in files of each class; the first if a class has several."""
        if not isinstance(self.settings.data.classes, dict):
            return np.arange(len(self.classes), dtype=np.int32)
        labels = [*self.settings.data.classes.values()]
        return np.array(np.concatenate(labels) if self.settings.heads else [of[0] for of in labels], np.int32)

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features, see `predict`."""
        return tuple(self.settings.data.features)

    @property
    def voxel_size(self) -> float:
        """Voxel size of level 0 of the network, in the unit of the points."""
        return self.net.voxel_size

    def summary(self) -> str:
        """What the model is and was trained on, in lines of text."""
        net, settings, labels = self.net, self.settings, self.label_values
        lines = [nn.summary(net, self.params), ""]
        shares = self.statistics.class_shares if self.statistics else {}
        lines.append(f"{len(self.classes)} classes")
        for name, label in zip(self.classes, labels, strict=True):
            share = f", {100 * shares[name]:.2f} % of the training" if name in shares else ""
            lines.append(f"{name:>24}  label {label}{share}")
        lines.append(f"{net.num_features} features")
        ranges = self.statistics.features if self.statistics else {}
        for name, width in settings.widths.items():
            columns = [ranges[of] for of in statistics.column_names(name, width) if of in ranges]
            words = [f"{one.edges[0]:.4g} to {one.edges[-1]:.4g}" for one in columns]
            lines.append(f"{name:>24}  {', '.join(words) or _RANGES.get(name, f'columns: {width}')}")
        if self.statistics:
            one = self.statistics
            units = zip(("x and y", "z"), one.unit, strict=True)
            stated = [f"{axes} in units of {unit:.7g} m" for axes, unit in units if unit]
            distance = f"the median distance to the nearest {one.spacing:.3g}, {one.points_per_voxel:.3g} in a voxel"
            lines.append(f"trained on {one.points:,} points, {distance}; {' and '.join(stated) or 'unit not stated'}")
        else:
            lines.append("no training statistics: input is not compared with that of the training")
        if not settings.whole:
            size, method = self.block_size, labelling.chosen_method(self)[0]
            lines.append(f"labels by {method}; blocks of {size.side:g} with a halo of {size.halo:g}, spheres of radius "
                         f"{settings.training.radius:g}")  # fmt: skip
        for kind in ("result", "test"):
            if isinstance(scores := self.history.get(kind), dict):
                what = (
                    f"chosen by its {self.history.get('chosen_by', 'test')} scores"
                    if kind == "result"
                    else "on the test data"
                )
                lines.append(f"after epoch {scores['epoch']}, {what}: mIoU {scores['miou'] or 0:.4f}, accuracy "
                             f"{scores['accuracy']:.4f}")  # fmt: skip
        lines.append(f"licence: {settings.data.licence or 'not stated'}")
        return "\n".join(lines)

    def predict(self, points: ArrayLike, *, colors: ArrayLike | None = None, mode: str | None = None,
                votes: int | None = None, category: str | None = None,
                watch: Callable[[float], object] | None = None, **fields: ArrayLike) -> Prediction:  # fmt: skip
        """Labels of points, with the probabilities of all classes, and warnings if they are not to be trusted.

        Parameters
        ----------
        points : (N, 3) float32 or float64
            In the unit of the training. Coordinates of a map, such as UTM, should be float64.
        colors : (N, 3) uint8, or floats from 0 to 1
            For the feature color; also called ``rgb`` or ``color``.
        mode : {"blocks", "potentials"}, optional
            In blocks, see `kpcore.pipeline.blocks`; or by votes of overlapping spheres. By default blocks, but
            potentials if there are `votes`, or if local is one of the features: these coordinates relative to the
            centre of an input sphere are never as large in training as in a block.
        votes : int, optional
            Votes for each place, for potentials and objects; by default as in the settings of the training.
        category : str, optional
            Category of the object, for a model of parts.
        watch : function, optional
            Is called with the fraction of the points that are done.
        **fields : (N,) numbers
            The features of the model that are fields of files, by name: ``intensity=...``. The others are computed:
            one, local, height (z), height_above_ground (unless it is passed).

        Returns
        -------
        Prediction

        Raises
        ------
        ValueError, TypeError
            For features that are missing, unknown or of another length, for coordinates that are not finite, and for a
            mode that the model does not have.

        Warns
        -----
        KpcoreWarning
            The input is unlike that of the training; each is in `Prediction.warnings` too.
        """
        if self.settings.data.kind == "digits":
            raise ValueError("predict: expected a model of scenes, objects or parts, got one of digits")
        cloud = self._cloud(points, colors, fields)
        if self.settings.classifies:
            scene = object_scene(self.settings, self.columns, "points", in_unit_sphere("points", cloud.points))
            shares = voting.scene_probabilities(self, [scene], votes, watch=watch)
            return _prediction(self, points, shares.argmax(axis=1), shares, [])
        rounding = float(np.spacing(np.abs(cloud.exact).max().astype(np.float32)))
        messages = []
        if devices.as_array(points).dtype == np.float32 and rounding > _MOST_ROUNDING * self.voxel_size:
            messages.append(
                f"points: float32 holds coordinates of {np.abs(cloud.exact).max():.4g} in steps of "
                f"{rounding:.2g}, {100 * rounding / self.voxel_size:.2g} % of a voxel: pass float64"
            )
        labelled = labelling.label(
            self, cloud, mode=mode, votes=votes, category=category, keep_probabilities=True, like=points, watch=watch
        )
        messages += labelled.warnings
        for message in messages:
            warnings.warn(message, KpcoreWarning, stacklevel=2)
        return _prediction(self, points, labelled.classes, labelled.probabilities, messages)

    def _cloud(self, points: ArrayLike, colors: ArrayLike | None, fields: Mapping[str, ArrayLike]) -> Cloud:
        """The Cloud of arguments of `predict`; an error for features that are missing or unknown."""
        points = devices.on_host(checks.points_array("points", points, {}, dimensions=(3,)))
        if not np.isfinite(points).all():
            raise checks.not_finite(points=points)
        if len(points) == 0:
            raise ValueError("points: expected at least one, got none")
        fields, optional = dict(fields), {HEIGHT: HEIGHT_FIELD} if HEIGHT in self.features else {}
        for name in ("rgb", "color"):
            if name in fields:
                if colors is not None:
                    raise TypeError(f"colors: expected once, got {name} too")
                colors = fields.pop(name)
        needed = [name for name in self.features if name not in COMPUTED_FEATURES]
        names = {name.lower(): name for name in fields}
        known = {name.lower() for name in (*needed, *optional)}
        if "color" in self.features and colors is None:
            raise TypeError(f"colors: expected those of the points, as color is one of the features {self._asked()}")
        if "color" not in self.features and colors is not None:
            raise TypeError(f"colors: expected none, as color is not one of the features {self._asked()}")
        if missing := [name for name in needed if name.lower() not in names]:
            got = list_names(names.values()) if names else "no fields"
            raise TypeError(
                f"{missing[0]}: expected its values, as it is one of the features {self._asked()}; got {got}"
            )
        if unknown := [name for lower, name in names.items() if lower not in known]:
            raise TypeError(f"{unknown[0]}: expected only features {self._asked()}")
        arrays = {}
        for lower, name in names.items():
            values = devices.on_host(devices.as_array(fields[name]))
            if values.shape != (len(points),) or values.dtype.kind not in "fiub":
                raise ValueError(f"{name}: expected ({len(points)},) numbers, got {values.shape} {values.dtype}")
            if bad := len(values) - int(np.isfinite(values).sum()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinite ones for {bad:,} points")
            arrays[optional.get(lower, lower)] = values
        colors = None if colors is None else _checked_colors(devices.on_host(devices.as_array(colors)), len(points))
        return cloud_of(Content(points, tuple(arrays), arrays, colors), Request(exact=True))

    def _asked(self) -> str:
        """The features that `predict` has to be passed, in words."""
        asked = ["colors" if name == "color" else name for name in self.features
                 if name == "color" or name not in COMPUTED_FEATURES]  # fmt: skip
        return f"of the model, to which are passed: {', '.join(['points', *asked])}"


_loading = threading.Lock()
_kept: dict[tuple[str, int, int, int], Model] = {}  # the model that this process has loaded last


def kept(path: str | os.PathLike[str]) -> Model:
    """The model of a file, mapped, and kept for the next call in this process unless the file has changed since."""
    about = os.stat(path)
    key = os.path.abspath(path), about.st_ino, about.st_mtime_ns, about.st_size
    with _loading:
        if key not in _kept:
            model = Model.load(path, mapped=True)
            _kept.clear()
            _kept[key] = model
        return _kept[key]


def _prediction(model: Model, points: ArrayLike, classes: np.ndarray, probabilities: np.ndarray,
                messages: Sequence[str]) -> Prediction:  # fmt: skip
    arrays = model.label_values[classes], classes, probabilities, probabilities.max(axis=1)
    if devices.is_array(points):
        arrays = (devices.to_device_of(points, array) for array in arrays)
    return Prediction(*arrays, tuple(messages))


def _check_result(kind: str, scores: object) -> None:
    """Raise an error unless scores in a file are none, or have an epoch and numbers."""
    if scores is None:
        return
    numbers = (("epoch", (int,)), ("accuracy", (int, float)), ("miou", (int, float, type(None))))
    if not isinstance(scores, dict) or any(type(scores.get(name)) not in kinds for name, kinds in numbers):
        raise ValueError(f"{kind}: expected an epoch, an accuracy and a mean IoU")


def _checked_colors(colors: np.ndarray, num: int) -> np.ndarray:
    """Colours as (N, 3) uint8."""
    if colors.shape != (num, 3) or (colors.dtype != np.uint8 and colors.dtype.kind != "f"):
        raise ValueError(f"colors: expected ({num}, 3) uint8 or floats from 0 to 1, got {colors.shape} {colors.dtype}"
                         + (": divide 16-bit colours by 65535" if colors.dtype == np.uint16 else ""))  # fmt: skip
    if colors.dtype == np.uint8:
        return colors
    if not ((colors >= 0) & (colors <= 1)).all():
        raise ValueError(f"colors: expected floats from 0 to 1, got {colors.min():g} to {colors.max():g}")
    return np.round(colors * 255).astype(np.uint8)


def _check_network(net: nn.Network | nn.KPNeXt, settings: Settings) -> None:
    """Raise an error unless the network fits the data of the settings."""
    expected = settings.net()
    for name in ("num_features", "num_classes", "voxel_size", "dimension", "segments", "origin"):
        if getattr(net, name) != getattr(expected, name):
            raise ValueError(f"network: expected {name} {getattr(expected, name)}, as in its settings, got "
                             f"{getattr(net, name)}")  # fmt: skip
