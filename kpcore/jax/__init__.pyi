from collections.abc import Collection, Iterable, Sequence
from typing import Literal, overload

from jax import Array
from numpy import ndarray
from numpy.typing import DTypeLike

import kpcore
from kpcore import BatchNormed, CovarianceFeatures, KernelMap, Pyramid, Sampled, Subsampled
from kpcore import Neighbors as Neighbors
from kpcore.jax.sparse_arrays import to_bcoo as to_bcoo
from kpcore.neighbors import Flow
from kpcore.search import IgnoreQueryPoint, Metric, Sort

class GridIndex(kpcore.GridIndex):
    @overload
    def radius_search(
        self,
        queries: Array | ndarray | None,
        radius: float | Array | ndarray,
        *,
        queries_row_splits: Array | ndarray | None = ...,
        inclusive: bool = ...,
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
        queries: Array | ndarray | None,
        radius: float | Array | ndarray,
        *,
        queries_row_splits: Array | ndarray | None = ...,
        inclusive: bool = ...,
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
        queries: Array | ndarray | None,
        radius: float | Array | ndarray,
        *,
        queries_row_splits: Array | ndarray | None = ...,
        inclusive: bool = ...,
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
        queries: Array | ndarray | None,
        radius: float | Array | ndarray,
        *,
        queries_row_splits: Array | ndarray | None = ...,
        inclusive: bool = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[True],
    ) -> Array: ...

def add(
    first: Array | ndarray,
    second: Array | ndarray,
) -> Array: ...
def batch_norm(
    features: Array | ndarray,
    scale: Array | ndarray,
    shift: Array | ndarray,
    running_mean: Array | ndarray,
    running_var: Array | ndarray,
    *,
    training: bool = ...,
    momentum: float = ...,
    eps: float = ...,
    negative_slope: float | None = ...,
) -> BatchNormed[Array, Array]: ...
def batch_to_row_splits(
    batch: Array | ndarray,
    num_items: int | None = ...,
) -> Array: ...
def build_pyramid(
    points: Array | ndarray,
    *,
    voxel_size: float,
    num_levels: int,
    row_splits: Array | ndarray | None = ...,
    features: Array | ndarray | None = ...,
    labels: Array | ndarray | None = ...,
    subsampled: bool = ...,
    origin: Literal[0, "published"] = ...,
    conv_radius: float = ...,
    deform_radius: float = ...,
    deform_levels: Collection[int] = ...,
    neighbor_limits: Sequence[int] | None = ...,
    inclusive: bool = ...,
    upsample_levels: Collection[int] = ...,
) -> Pyramid[Array]: ...
def calibrate_neighbor_limits(
    clouds: Iterable[Array | ndarray],
    *,
    voxel_size: float,
    num_levels: int,
    origin: Literal[0, "published"] = ...,
    conv_radius: float = ...,
    deform_radius: float = ...,
    deform_levels: Collection[int] = ...,
    inclusive: bool = ...,
    fraction: float = ...,
) -> list[int]: ...
def concatenate(
    first: Array | ndarray,
    second: Array | ndarray,
    third: Array | ndarray | None = ...,
    fourth: Array | ndarray | None = ...,
) -> Array: ...
def conditional_conv2d(
    x: Array | ndarray,
    weights: Array | ndarray,
    routing: Array | ndarray,
    *,
    kernel_size: int | Sequence[int] | None = ...,
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    kernel_offsets: Array | ndarray | None = ...,
    data_offsets: Array | ndarray | None = ...,
    modulations: Array | ndarray | None = ...,
    bias: Array | ndarray | None = ...,
    grid: str = ...,
    clip: str | None = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Array: ...
def continuous_conv(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    neighbors: Neighbors,
    features: Array | ndarray,
    filters: Array | ndarray,
    extents: Array | ndarray | float,
    *,
    coordinate_mapping: str = ...,
    interpolation: str = ...,
    align_corners: bool = ...,
    normalize: bool = ...,
    offset: Array | ndarray | None = ...,
    importances: Array | ndarray | None = ...,
    neighbor_importances: Array | ndarray | None = ...,
) -> Array: ...
def continuous_conv_transpose(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    neighbors: Neighbors,
    features: Array | ndarray,
    filters: Array | ndarray,
    extents: Array | ndarray | float,
    *,
    coordinate_mapping: str = ...,
    interpolation: str = ...,
    align_corners: bool = ...,
    normalize: bool = ...,
    offset: Array | ndarray | None = ...,
    importances: Array | ndarray | None = ...,
    neighbor_importances: Array | ndarray | None = ...,
) -> Array: ...
def covariance_features(
    points: Array | ndarray,
    *,
    k: int | None = ...,
    radius: float | None = ...,
    viewpoint: Array | ndarray | Sequence[float] | None = ...,
    row_splits: Array | ndarray | None = ...,
) -> CovarianceFeatures[Array]: ...
def deformable_conv2d(
    x: Array | ndarray,
    weight: Array | ndarray,
    data_offsets: Array | ndarray | None,
    *,
    modulations: Array | ndarray | None = ...,
    bias: Array | ndarray | None = ...,
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Array: ...
def deformable_kernel_conv2d(
    x: Array | ndarray,
    weight: Array | ndarray,
    kernel_offsets: Array | ndarray | None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    data_offsets: Array | ndarray | None = ...,
    modulations: Array | ndarray | None = ...,
    bias: Array | ndarray | None = ...,
    grid: str = ...,
    clip: str | None = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Array: ...
def dropout(
    features: Array | ndarray,
    rate: float,
    seed: int,
    *,
    training: bool = ...,
) -> Array: ...
def farthest_point_sampling(
    points: Array | ndarray,
    num: int | Array | ndarray | None = ...,
    *,
    min_distance: float = ...,
    row_splits: Array | ndarray | None = ...,
    start: int | Array | ndarray = ...,
    method: Literal["exact", "bucketed"] | None = ...,
) -> Sampled[Array]: ...
def fitting_loss(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    neighbors: Neighbors,
    kernel_points: Array | ndarray,
    offsets: Array | ndarray,
    extent: float,
    *,
    reduction: str = ...,
) -> Array: ...
def gather(
    features: Array | ndarray,
    index: Array | ndarray,
) -> Array: ...
def grid_subsample(
    points: Array | ndarray,
    voxel_size: float | Sequence[float] | Array | ndarray,
    *,
    features: Array | ndarray | None = ...,
    labels: Array | ndarray | None = ...,
    row_splits: Array | ndarray | None = ...,
    origin: float | Sequence[float] | Array | ndarray | str = ...,
    position: Literal["barycenter", "center", "nearest"] = ...,
    feature: Literal["mean", "max", "nearest"] = ...,
    ignore_label: int | None = ...,
) -> Subsampled[Array, Array]: ...
def group_norm(
    features: Array | ndarray,
    num_groups: int,
    scale: Array | ndarray,
    shift: Array | ndarray,
    *,
    row_splits: Array | ndarray | None = ...,
    eps: float = ...,
    negative_slope: float | None = ...,
) -> Array: ...
def interpolate(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    features: Array | ndarray,
    k: int = ...,
    power: float = ...,
    *,
    points_row_splits: Array | ndarray | None = ...,
    queries_row_splits: Array | ndarray | None = ...,
) -> Array: ...
def kernel_map(
    coords: Array | ndarray,
    out_coords: Array | ndarray | None = ...,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    shape: Sequence[int] | None = ...,
    rule: Literal["submanifold", "spconv", "minkowski"] = ...,
    row_splits: Array | ndarray | None = ...,
    out_row_splits: Array | ndarray | None = ...,
) -> KernelMap[Array]: ...
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
def knn_graph(
    points: Array | ndarray,
    k: int,
    *,
    row_splits: Array | ndarray | None = ...,
    loop: bool = ...,
    flow: Flow = ...,
) -> Array: ...
def knn_search(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    k: int,
    *,
    points_row_splits: Array | ndarray | None = ...,
    queries_row_splits: Array | ndarray | None = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    return_distances: bool = ...,
) -> Neighbors: ...
def kpconv(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    neighbors: Neighbors,
    features: Array | ndarray,
    weights: Array | ndarray,
    kernel_points: Array | ndarray,
    extent: float,
    *,
    influence: str = ...,
    aggregation: str = ...,
    normalization: str | None = ...,
    groups: int = ...,
    offsets: Array | ndarray | None = ...,
    modulations: Array | ndarray | None = ...,
    kernel_offsets: Array | ndarray | None = ...,
    kernel_extent: float | None = ...,
) -> Array: ...
def kpconvx(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    neighbors: Neighbors,
    features: Array | ndarray,
    weights: Array | ndarray,
    attention: Array | ndarray,
    kernel_points: Array | ndarray,
    extent: float,
    *,
    influence: str = ...,
) -> Array: ...
def leaky_relu(
    features: Array | ndarray,
    negative_slope: float = ...,
) -> Array: ...
def lengths(
    row_splits: Array | ndarray,
) -> Array: ...
def linear(
    features: Array | ndarray,
    weights: Array | ndarray,
    bias: Array | ndarray | None = ...,
) -> Array: ...
def nearest_upsample(
    features: Array | ndarray,
    neighbors: Neighbors,
) -> Array: ...
def neighbor_reduce(
    features: Array | ndarray,
    neighbors: Neighbors,
    reduce: str = ...,
    *,
    weights: Array | ndarray | None = ...,
    empty: float = ...,
    pad_value: float | None = ...,
) -> Array: ...
def normals(
    points: Array | ndarray,
    *,
    k: int | None = ...,
    radius: float | None = ...,
    viewpoint: Array | ndarray | Sequence[float] | None = ...,
    row_splits: Array | ndarray | None = ...,
) -> Array: ...
def outlier_mask(
    points: Array | ndarray,
    *,
    mean_k: int | None = ...,
    std_mul: float | None = ...,
    radius: float | None = ...,
    min_points: int | None = ...,
    row_splits: Array | ndarray | None = ...,
) -> Array: ...
@overload
def radius_search(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    radius: float | Array | ndarray,
    *,
    points_row_splits: Array | ndarray | None = ...,
    queries_row_splits: Array | ndarray | None = ...,
    inclusive: bool = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    max_neighbors: int | None = ...,
    sort: Sort | None = ...,
    return_distances: bool = ...,
    count_only: Literal[False] = ...,
) -> Neighbors: ...
@overload
def radius_search(
    points: Array | ndarray,
    queries: Array | ndarray | None,
    radius: float | Array | ndarray,
    *,
    points_row_splits: Array | ndarray | None = ...,
    queries_row_splits: Array | ndarray | None = ...,
    inclusive: bool = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    max_neighbors: int | None = ...,
    sort: Sort | None = ...,
    return_distances: bool = ...,
    count_only: Literal[True],
) -> Array: ...
def relu(
    features: Array | ndarray,
) -> Array: ...
def relu6(
    features: Array | ndarray,
) -> Array: ...
def repulsion_loss(
    kernel_points: Array | ndarray,
    offsets: Array | ndarray,
    extent: float,
    *,
    repulse_extent: float = ...,
    detach_others: bool = ...,
    reduction: str = ...,
) -> Array: ...
def row_splits(
    lengths: Sequence[int] | Array | ndarray,
) -> Array: ...
def row_splits_to_batch(
    row_splits: Array | ndarray,
) -> Array: ...
def segment_reduce(
    features: Array | ndarray,
    row_splits: Array | ndarray | None,
    reduce: str = ...,
    *,
    empty: float = ...,
) -> Array: ...
def sigmoid(
    features: Array | ndarray,
) -> Array: ...
def softmax(
    features: Array | ndarray,
) -> Array: ...
def softmax_cross_entropy(
    logits: Array | ndarray,
    labels: Array | ndarray,
    *,
    ignore_index: int | None = ...,
    class_weights: Array | ndarray | None = ...,
    reduction: str = ...,
) -> Array: ...
def sparse_conv(
    neighbors: Neighbors,
    kernel_index: Array | ndarray,
    features: Array | ndarray,
    filters: Array | ndarray,
    *,
    normalize: bool = ...,
    importances: Array | ndarray | None = ...,
    neighbor_importances: Array | ndarray | None = ...,
) -> Array: ...
def sparse_conv_transpose(
    neighbors: Neighbors,
    kernel_index: Array | ndarray,
    features: Array | ndarray,
    filters: Array | ndarray,
    *,
    normalize: bool = ...,
    importances: Array | ndarray | None = ...,
    neighbor_importances: Array | ndarray | None = ...,
) -> Array: ...
def to_dense(
    coords: Array | ndarray,
    features: Array | ndarray,
    shape: Sequence[int],
    row_splits: Array | ndarray | None = ...,
) -> Array: ...
