"""The distribution of a training's input, which a model holds, and how another input differs from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import kpcore as kp
from kpcore.pipeline.data import counts_of, pieces, quantiles_in_memory
from kpcore.pipeline.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kpcore import nn
    from kpcore.io import Cloud
    from kpcore.io.scans import Scan
    from kpcore.pipeline.cache import Stored
    from kpcore.pipeline.data import Columns, Quantiles, Scene
    from kpcore.pipeline.settings import Settings
    from kpcore.pyramid import Pyramid

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
_BINS = 128  # of a histogram, from the 0.001 to the 0.999 quantile, besides one below and one above
_SHARE_BEYOND = 0.1  # of values beyond the training range, which has 0.002 of the training's
_SHIFT = 0.5  # the largest difference of two cumulative distributions: tiles of one survey differ by 0.05 to 0.3
_FEWEST_POINTS = 100  # that have a distribution
_RATIO = 2.0  # of points per voxel, spacing and neighbours
_SCENES_OF_NEIGHBORS = 8
_SPACING_POINTS = 20_000  # points to which the nearest is searched
_FACTORS = (0.3048, 0.01, 0.001)  # of a foot, a centimetre and a millimetre to a metre
_NAMES = {"color": ("color.red", "color.green", "color.blue"), "normals": ("normals.x", "normals.y", "normals.z")}


@dataclass(frozen=True)
class Feature:
    """The distribution of a column of features, in the unit of the files.

    quantiles : [probability, value] pairs
    edges : of the bins of the histogram, from the 0.001 to the 0.999 quantile of the training
    counts : of the values below the first edge, in each bin, and above the last edge
    """

    quantiles: list[list[float]]
    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Statistics:
    """The distribution of the input of a network.

    features : by the name of the column; those that are the same everywhere by definition, "one" and "local", are left
        out
    neighbors : the mean number of neighbours on each level of the network
    points_per_voxel : points before subsampling for each of level 0
    spacing : the median distance of a point to the nearest one, before subsampling; 0 if most have a duplicate
    points : the number of points before subsampling
    unit : metres per unit of x and y, and of z, as the files say; None where they do not
    class_shares : the share of each class in the labelled points; empty without labels
    """

    features: dict[str, Feature]
    neighbors: list[float]
    points_per_voxel: float
    spacing: float
    points: int
    unit: list[float | None]
    class_shares: dict[str, float]

    def asdict(self) -> dict[str, Any]:
        """Nested dicts of JSON values, from which `from_dict` makes the statistics."""
        return asdict(self)


def from_dict(values: Mapping[str, Any], columns: Columns) -> Statistics:
    """Make Statistics from nested dicts; an error unless they can be those of a network with these columns."""
    try:
        features = {str(name): Feature(**feature) for name, feature in values["features"].items()}
        statistics = Statistics(**{**values, "features": features})
        numbers = [
            statistics.points,
            *statistics.class_shares.values(),
            statistics.points_per_voxel,
            statistics.spacing,
            *statistics.neighbors,
        ]
        numbers += [length for length in statistics.unit if length is not None]
        for feature in features.values():
            numbers += [*feature.edges, *feature.counts, *np.asarray(feature.quantiles, float).ravel()]
            if len(feature.counts) != len(feature.edges) + 1:
                raise ValueError
        if not all(type(number) in (int, float, np.float64) and math.isfinite(number) for number in numbers):
            raise ValueError
        if [*features] != [column.name for column in columns_with_values(columns)]:
            raise ValueError
    except (TypeError, ValueError, KeyError, AttributeError):
        raise SettingsError("statistics: expected the distribution of a training, got other values") from None
    return statistics


class Column(NamedTuple):
    """A column of the features, and how its values are scaled."""

    number: int
    name: str
    center: float
    scale: float


def columns_with_values(columns: Columns) -> list[Column]:
    """The columns of the features whose values come from the input."""
    out, begin = [], 0
    for name, width in columns.widths.items():
        if name not in ("one", "local"):
            names = column_names(name, width)
            center, scale = (np.broadcast_to(values[name], width) for values in (columns.center, columns.scale))
            out += [Column(begin + i, names[i], float(center[i]), float(scale[i])) for i in range(width)]
        begin += width
    return out


def column_names(feature: str, width: int) -> tuple[str, ...]:
    """The name of each column of a feature."""
    return _NAMES.get(feature, (feature,) * width)


class Observed:
    """The distribution of inputs that are seen one after the other, in the bins of the training.

    Parameters
    ----------
    columns : Columns
    training : Statistics, optional
        Those of the training, in whose bins values are counted; without them the bins follow from the first input.
    quantiles : callable, optional
        Computes the quantiles of values in several arrays.
    """

    def __init__(self, columns: Columns, training: Statistics | None = None,
                 quantiles: Quantiles = quantiles_in_memory) -> None:  # fmt: skip
        self._quantiles = quantiles
        self._columns = columns_with_values(columns)
        self._training = training
        self._edges: list[np.ndarray] | None = None
        self._counts: list[np.ndarray] = []
        self._neighbors = np.zeros((0, 2))
        self.points = self.voxels = 0

    def add(self, features: np.ndarray, num_points: int) -> None:
        """Count the features of points of level 0, which come from `num_points` points."""
        self._begin([features])
        values = [features[:, column.number] for column in self._columns]
        for edges, counts, of_column in zip(self._edges, self._counts, values, strict=True):
            places = np.searchsorted(edges, of_column, "right")
            places[of_column == edges[-1]] -= 1  # the last edge belongs to the last bin
            counts += np.bincount(places, minlength=len(counts))
        self.points, self.voxels = self.points + num_points, self.voxels + len(features)

    def _begin(self, inputs: Sequence[np.ndarray]) -> None:
        """Choose the bins by the features of the first inputs."""
        if self._edges is None:
            self._edges = [
                self._edges_of(column, [features[:, column.number] for features in inputs]) for column in self._columns
            ]
            self._counts = [np.zeros(len(edges) + 1, np.int64) for edges in self._edges]

    def add_neighbors(self, pyramid: Pyramid) -> None:
        """Count the neighbours on each level."""
        counts = np.array([[level.neighbors.num_pairs, level.neighbors.num_queries] for level in pyramid], float)
        self._neighbors = counts if len(self._neighbors) == 0 else self._neighbors + counts

    def add_scenes(self, net: nn.Network | nn.KPNeXt, scenes: Sequence[Scene], side: float) -> None:
        """Count the features of scenes, and the neighbours in a block of this side in the middle of some of them."""
        self._begin([scene.columns for scene in scenes])
        for scene in scenes:
            for features in pieces(scene.columns):
                self.add(features, 0)
            self.points += scene.stored.num_points if scene.stored else len(scene.full)
        for scene in scenes[:: 1 + len(scenes) // _SCENES_OF_NEIGHBORS]:
            middle = scene.points[scene.stored.middle if scene.stored else middle_of(scene.points), :2]
            points = np.concatenate([points[(np.abs(points[:, :2] - middle) <= side / 2).all(axis=1)]
                                     for points in pieces(scene.points)])  # fmt: skip
            self.add_neighbors(net.pyramid(points, row_splits=kp.row_splits([len(points)]), subsampled=True))

    def counted(self) -> dict[str, Any]:
        """What was counted in the bins of a training, in JSON types."""
        return {"counts": [counts.tolist() for counts in self._counts], "neighbors": self._neighbors.tolist(),
                "points": self.points, "voxels": self.voxels}  # fmt: skip

    def add_counted(self, counted: Mapping[str, Any]) -> None:
        """Add what was counted elsewhere, see `counted`."""
        if counted["voxels"]:
            if self._edges is None:
                self.add(np.empty((0, 1 + max((column.number for column in self._columns), default=0)), np.float32), 0)
            for counts, others in zip(self._counts, counted["counts"], strict=True):
                counts += others
            self.points, self.voxels = self.points + counted["points"], self.voxels + counted["voxels"]
        neighbors = np.array(counted["neighbors"]).reshape(-1, 2)
        self._neighbors = self._neighbors + neighbors if len(self._neighbors) else neighbors

    def _edges_of(self, column: Column, values: Sequence[np.ndarray]) -> np.ndarray:
        if self._training:
            edges = np.array(self._training.features[column.name].edges)
            return ((edges - column.center) / column.scale).astype(np.float32)
        low, high = self._quantiles(values, (0.001, 0.999), np.float32) if sum(map(len, values)) else (0.0, 1.0)
        return np.linspace(low, max(high, low + 1e-6), _BINS + 1, dtype=np.float32)

    def statistics(self, spacing: float, unit: list[float | None],
                   class_shares: dict[str, float] | None = None) -> Statistics:  # fmt: skip
        """What was seen so far."""
        features = {}
        for column, edges, counts in zip(self._columns, self._edges or (), self._counts, strict=True):
            in_file = edges.astype(np.float64) * column.scale + column.center
            features[column.name] = Feature(_quantiles(in_file, counts), in_file.tolist(), counts.tolist())
        pairs, queries = self._neighbors.T
        neighbors = (pairs / np.maximum(queries, 1)).tolist()
        density = self.points / max(1, self.voxels)
        return Statistics(features, neighbors, density, spacing, self.points, unit, class_shares or {})


def _quantiles(edges: np.ndarray, counts: np.ndarray) -> list[list[float]]:
    """Quantiles of a histogram, linear within its bins; beyond the outer edges they are those edges."""
    shares = np.cumsum(counts)[:-1] / max(1, counts.sum())
    return [[q, float(np.interp(q, shares, edges))] for q in QUANTILES]


def middle_of(points: np.ndarray) -> int:
    """The number of the point nearest in x and y to the median of all, where there may be none."""
    places = points[:, :2]
    return int(((places - np.median(places, axis=0)) ** 2).sum(axis=1).argmin())


def spacing_of(points: np.ndarray) -> float:
    """The median distance of a point to the nearest other one; 0 if most have a duplicate."""
    if len(points) < 2:
        return 0.0
    queries = points[:: 1 + len(points) // _SPACING_POINTS]
    return float(np.median(kp.knn_search(points, queries, 2, return_distances=True).distance[1::2]))


def unit_of(clouds: Sequence[Cloud | Scan | Stored]) -> list[float | None]:
    """Metres per unit of x and y, and of z, as all clouds say; None where one does not, or where they differ."""
    references = [cloud.reference for cloud in clouds]
    units: list[float | None] = []
    for name in ("horizontal", "vertical"):
        values = {None if one is None else getattr(one, name) for one in references}
        units.append(values.pop() if len(values) == 1 else None)
    return units


def of_training(settings: Settings, net: nn.Network | nn.KPNeXt, columns: Columns, scenes: Sequence[Scene],
                side: float) -> Statistics:  # fmt: skip
    """The statistics of the scenes of a training; neighbours are counted in blocks of this side."""
    cache = scenes[0].stored.cache if scenes[0].stored else None
    observed = Observed(columns, quantiles=cache.quantiles if cache else quantiles_in_memory)
    observed.add_scenes(net, scenes, side)
    counts = np.sum([counts_of(settings, scene) for scene in scenes], axis=0)
    shares = dict(zip(settings.names, (counts / max(1, counts.sum())).tolist(), strict=True))
    spacing = float(np.median([scene.stored.spacing if scene.stored else spacing_of(scene.full) for scene in scenes]))
    return observed.statistics(spacing, unit_of([scene.stored or scene.cloud for scene in scenes]), shares)


def differences(training: Statistics, observed: Statistics, advise: bool = True) -> list[str]:
    """In a line each, what differs so much from the training that labels are not to be trusted.

    With `advise` a line says which scale to try, if coordinates have not been scaled yet.
    """
    out = _units_that_differ(training.unit, observed.unit)
    if observed.points < _FEWEST_POINTS:
        return out
    for name, feature in training.features.items():
        other = observed.features[name]
        shares, others = (np.array(one.counts) / max(1, sum(one.counts)) for one in (feature, other))
        beyond, low, high = others[0] + others[-1], feature.edges[0], feature.edges[-1]
        shift = np.abs(np.cumsum(shares - others)).max()
        if beyond > _SHARE_BEYOND:
            out.append(f"{100 * beyond:.0f} % of {name} lies beyond the training range, {low:.4g} to {high:.4g}")
        elif shift > _SHIFT:
            medians = (dict(one.quantiles)[0.5] for one in (other, feature))
            out.append("{} has a median of {:.4g} where training had {:.4g}".format(name, *medians))
    density = []
    if _differs(observed.points_per_voxel, training.points_per_voxel):
        density.append(f"{observed.points_per_voxel:.3g} points per voxel where training had "
                       f"{training.points_per_voxel:.3g}")  # fmt: skip
    if _differs(observed.spacing, training.spacing):
        density.append(f"points {observed.spacing:.3g} apart where training had {training.spacing:.3g}")
    # Neighbourhoods of coarser levels reach beyond small clouds and narrow strips.
    if any(map(_differs, observed.neighbors[:2], training.neighbors[:2])):
        means = (", ".join(f"{number:.3g}" for number in one.neighbors) for one in (observed, training))
        density.append("{} neighbours on the levels of the network where training had {}".format(*means))
    if density:
        out.append(f"{'; '.join(density)}: other unit or density?{_advice(training, observed) if advise else ''}")
    return out


def _units_that_differ(training: Sequence[float | None], observed: Sequence[float | None]) -> list[str]:
    pairs = zip(("x and y", "z"), training, observed, strict=True)
    both_known = [(axes, one, other) for axes, one, other in pairs if one and other and abs(other / one - 1) > 1e-3]
    if not both_known:
        return []
    words = " and ".join(f"{axes} are in units of {other:.7g} m where training had {one:.7g} m"
                         for axes, one, other in both_known)  # fmt: skip
    factors = [other / one if one and other else None for one, other in zip(training, observed, strict=True)]
    if factors[0] is None:
        return [f"{words}; the unit of x and y is not known"]
    horizontal, vertical = factors if None not in factors else 2 * [factors[0]]
    scale = f"{horizontal:.7g}" if horizontal == vertical else f"{horizontal:.7g},{vertical:.7g}"
    return [f"{words}: use --scale {scale}"]


def _differs(one: float, other: float) -> bool:
    return min(one, other) > 0 and max(one, other) / min(one, other) > _RATIO


def _advice(training: Statistics, observed: Statistics) -> str:
    """Which scale to try, if the spacing says that the unit is another one."""
    if not (training.spacing and observed.spacing):
        return ""
    if training.unit[0] and observed.unit[0]:  # what differs there is told by itself
        return ""
    ratio = training.spacing / observed.spacing
    for factor in (*_FACTORS, *(1 / factor for factor in _FACTORS)):
        if 1 / 1.3 < ratio / factor < 1.3:
            return f" Try --scale {factor:.5g}"
    return ""
