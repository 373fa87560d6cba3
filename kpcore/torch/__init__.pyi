from typing import Any

from torch import Tensor

import kpcore
from kpcore import Neighbors as Neighbors
from kpcore import Pyramid, Sampled, Subsampled
from kpcore.torch.layers import KPConv as KPConv

class GridIndex(kpcore.GridIndex): ...
class KDTree(kpcore.KDTree): ...

def build_pyramid(
    points: Any,
    *,
    voxel_size: Any,
    num_levels: Any,
    row_splits: Any = ...,
    features: Any = ...,
    labels: Any = ...,
    subsampled: Any = ...,
    conv_radius: Any = ...,
    deform_radius: Any = ...,
    deform_levels: Any = ...,
    neighbor_limits: Any = ...,
) -> Pyramid: ...
def farthest_point_sampling(
    points: Any,
    num: Any,
    *,
    row_splits: Any = ...,
    start: Any = ...,
    method: Any = ...,
) -> Sampled: ...
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
    points: Tensor,
    queries: Tensor | None,
    neighbors: Neighbors,
    features: Tensor,
    weights: Tensor,
    kernel_points: Tensor,
    extent: float,
    *,
    influence: str = ...,
    aggregation: str = ...,
    normalization: str | None = ...,
    groups: int = ...,
    offsets: Tensor | None = ...,
    modulations: Tensor | None = ...,
) -> Tensor: ...
def kpconvx(
    points: Tensor,
    queries: Tensor | None,
    neighbors: Neighbors,
    features: Tensor,
    weights: Tensor,
    attention: Tensor,
    kernel_points: Tensor,
    extent: float,
    *,
    influence: str = ...,
) -> Tensor: ...
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
