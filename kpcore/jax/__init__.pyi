from typing import Any

from jax import Array

import kpcore
from kpcore import BatchNormed, Pyramid, Sampled, Subsampled
from kpcore import Neighbors as Neighbors

class GridIndex(kpcore.GridIndex): ...
class KDTree(kpcore.KDTree): ...

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
) -> BatchNormed: ...
def build_pyramid(
    points: Any,
    *,
    voxel_size: Any,
    num_levels: Any,
    row_splits: Any = ...,
    features: Any = ...,
    labels: Any = ...,
    subsampled: Any = ...,
    origin: Any = ...,
    conv_radius: Any = ...,
    deform_radius: Any = ...,
    deform_levels: Any = ...,
    neighbor_limits: Any = ...,
) -> Pyramid: ...
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
    points: Any,
    num: Any,
    *,
    row_splits: Any = ...,
    start: Any = ...,
    method: Any = ...,
) -> Sampled: ...
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
    points: Any,
    voxel_size: Any,
    *,
    features: Any = ...,
    labels: Any = ...,
    row_splits: Any = ...,
    origin: Any = ...,
    position: Any = ...,
    feature: Any = ...,
    ignore_label: Any = ...,
) -> Subsampled: ...
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
    queries: Array,
    features: Array,
    k: int = ...,
    power: float = ...,
    *,
    points_row_splits: Array | None = ...,
    queries_row_splits: Array | None = ...,
) -> Array: ...
def kernel_points(
    num: Any,
    radius: Any = ...,
    *,
    dimension: Any = ...,
    fixed: Any = ...,
    method: Any = ...,
    rotate: Any = ...,
    seed: Any = ...,
    dtype: Any = ...,
) -> Any: ...
def knn_search(
    points: Any,
    queries: Any,
    k: Any,
    *,
    points_row_splits: Any = ...,
    queries_row_splits: Any = ...,
    metric: Any = ...,
    ignore_query_point: Any = ...,
    return_distances: Any = ...,
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
def radius_search(
    points: Any,
    queries: Any,
    radius: Any,
    *,
    points_row_splits: Any = ...,
    queries_row_splits: Any = ...,
    metric: Any = ...,
    ignore_query_point: Any = ...,
    max_neighbors: Any = ...,
    sort: Any = ...,
    return_distances: Any = ...,
    count_only: Any = ...,
) -> Any: ...
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
