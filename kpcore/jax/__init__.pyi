from collections.abc import Collection, Sequence
from typing import Literal, overload

from jax import Array
from numpy.typing import DTypeLike

import kpcore
from kpcore import BatchNormed, Pyramid, Sampled, Subsampled
from kpcore import Neighbors as Neighbors
from kpcore.search import IgnoreQueryPoint, Metric, Sort

class GridIndex(kpcore.GridIndex):
    @overload
    def radius_search(
        self,
        queries: Array | None,
        radius: float | Array,
        *,
        queries_row_splits: Array | None = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[False] = ...,
    ) -> Neighbors: ...
    @overload
    def radius_search(
        self,
        queries: Array | None,
        radius: float | Array,
        *,
        queries_row_splits: Array | None = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[True],
    ) -> Array: ...

class KDTree(kpcore.KDTree):
    @overload
    def radius_search(
        self,
        queries: Array | None,
        radius: float | Array,
        *,
        queries_row_splits: Array | None = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[False] = ...,
    ) -> Neighbors: ...
    @overload
    def radius_search(
        self,
        queries: Array | None,
        radius: float | Array,
        *,
        queries_row_splits: Array | None = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[True],
    ) -> Array: ...

def add(
    first: Array,
    second: Array,
) -> Array: ...
def batch_norm(
    features: Array,
    scale: Array,
    shift: Array,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    negative_slope: float | None = ...,
) -> BatchNormed[Array, Array]: ...
def build_pyramid(
    points: Array,
    *,
    voxel_size: float,
    num_levels: int,
    row_splits: Array | None = ...,
    features: Array | None = ...,
    labels: Array | None = ...,
    subsampled: bool = ...,
    origin: Literal[0, "published"] = ...,
    conv_radius: float = ...,
    deform_radius: float = ...,
    deform_levels: Collection[int] = ...,
    neighbor_limits: Sequence[int] | None = ...,
) -> Pyramid[Array]: ...
def concatenate(
    first: Array,
    second: Array,
    third: Array | None = ...,
    fourth: Array | None = ...,
) -> Array: ...
def dropout(
    features: Array,
    rate: float,
    seed: int,
    *,
    training: bool = ...,
) -> Array: ...
def farthest_point_sampling(
    points: Array,
    num: int,
    *,
    row_splits: Array | None = ...,
    start: int | Array = ...,
    method: Literal["exact", "bucketed"] | None = ...,
) -> Sampled[Array]: ...
def fitting_loss(
    points: Array,
    queries: Array | None,
    neighbors: Neighbors,
    kernel_points: Array,
    offsets: Array,
    extent: float,
    *,
    reduction: str = ...,
) -> Array: ...
def gather(
    features: Array,
    index: Array,
) -> Array: ...
def grid_subsample(
    points: Array,
    voxel_size: float | Sequence[float] | Array,
    *,
    features: Array | None = ...,
    labels: Array | None = ...,
    row_splits: Array | None = ...,
    origin: float | Sequence[float] | Array | str = ...,
    position: Literal["barycenter", "center", "nearest"] = ...,
    feature: Literal["mean", "max", "nearest"] = ...,
    ignore_label: int | None = ...,
) -> Subsampled[Array, Array]: ...
def group_norm(
    features: Array,
    num_groups: int,
    scale: Array,
    shift: Array,
    *,
    row_splits: Array | None = ...,
    eps: float = ...,
    negative_slope: float | None = ...,
) -> Array: ...
def interpolate(
    points: Array,
    queries: Array | None,
    features: Array,
    k: int = ...,
    power: float = ...,
    *,
    points_row_splits: Array | None = ...,
    queries_row_splits: Array | None = ...,
) -> Array: ...
def kernel_points(
    num: int | Sequence[int],
    radius: float = ...,
    *,
    dimension: int = ...,
    fixed: Literal["none", "center", "verticals"] = ...,
    method: Literal["potential", "lloyd", "shells"] = ...,
    rotate: Literal["vertical", "full"] | None = ...,
    seed: int = ...,
    dtype: DTypeLike = ...,
) -> Array: ...
def knn_search(
    points: Array,
    queries: Array | None,
    k: int,
    *,
    points_row_splits: Array | None = ...,
    queries_row_splits: Array | None = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    return_distances: bool = ...,
) -> Neighbors: ...
def kpconv(
    points: Array,
    queries: Array | None,
    neighbors: Neighbors,
    features: Array,
    weights: Array,
    kernel_points: Array,
    extent: float,
    *,
    influence: str = ...,
    aggregation: str = ...,
    normalization: str | None = ...,
    groups: int = ...,
    offsets: Array | None = ...,
    modulations: Array | None = ...,
) -> Array: ...
def kpconvx(
    points: Array,
    queries: Array | None,
    neighbors: Neighbors,
    features: Array,
    weights: Array,
    attention: Array,
    kernel_points: Array,
    extent: float,
    *,
    influence: str = ...,
) -> Array: ...
def leaky_relu(
    features: Array,
    negative_slope: float = ...,
) -> Array: ...
def linear(
    features: Array,
    weights: Array,
    bias: Array | None = ...,
) -> Array: ...
def nearest_upsample(
    features: Array,
    neighbors: Neighbors,
) -> Array: ...
def neighbor_reduce(
    features: Array,
    neighbors: Neighbors,
    reduce: str = ...,
    *,
    weights: Array | None = ...,
    empty: float = ...,
    pad_value: float | None = ...,
) -> Array: ...
@overload
def radius_search(
    points: Array,
    queries: Array | None,
    radius: float | Array,
    *,
    points_row_splits: Array | None = ...,
    queries_row_splits: Array | None = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    max_neighbors: int | None = ...,
    sort: Sort | None = ...,
    return_distances: bool = ...,
    count_only: Literal[False] = ...,
) -> Neighbors: ...
@overload
def radius_search(
    points: Array,
    queries: Array | None,
    radius: float | Array,
    *,
    points_row_splits: Array | None = ...,
    queries_row_splits: Array | None = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    max_neighbors: int | None = ...,
    sort: Sort | None = ...,
    return_distances: bool = ...,
    count_only: Literal[True],
) -> Array: ...
def relu(
    features: Array,
) -> Array: ...
def repulsion_loss(
    kernel_points: Array,
    offsets: Array,
    extent: float,
    *,
    repulse_extent: float = ...,
    detach_others: bool = ...,
    reduction: str = ...,
) -> Array: ...
def segment_reduce(
    features: Array,
    row_splits: Array | None,
    reduce: str = ...,
    *,
    empty: float = ...,
) -> Array: ...
def sigmoid(
    features: Array,
) -> Array: ...
def softmax(
    features: Array,
) -> Array: ...
def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    ignore_index: int | None = ...,
    class_weights: Array | None = ...,
    reduction: str = ...,
) -> Array: ...
