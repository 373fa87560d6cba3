from typing import Any

from torch import Tensor

import kpcore
from kpcore import BatchNormed, Pyramid, Sampled, Subsampled
from kpcore import Neighbors as Neighbors
from kpcore.torch.layers import DeformableKPConv as DeformableKPConv
from kpcore.torch.layers import KPConv as KPConv
from kpcore.torch.layers import KPConvX as KPConvX
from kpcore.torch.networks import Network as Network
from kpcore.torch.ops import use_torch_allocator as use_torch_allocator

class GridIndex(kpcore.GridIndex): ...
class KDTree(kpcore.KDTree): ...

def add(
    first: Tensor,
    second: Tensor,
) -> Tensor: ...
def batch_norm(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
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
    first: Tensor,
    second: Tensor,
    third: Tensor | None = ...,
    fourth: Tensor | None = ...,
) -> Tensor: ...
def dropout(
    features: Tensor,
    rate: float,
    seed: int | Tensor,
    *,
    training: bool = ...,
) -> Tensor: ...
def farthest_point_sampling(
    points: Any,
    num: Any,
    *,
    row_splits: Any = ...,
    start: Any = ...,
    method: Any = ...,
) -> Sampled: ...
def fitting_loss(
    points: Tensor,
    queries: Tensor | None,
    neighbors: Neighbors,
    kernel_points: Tensor,
    offsets: Tensor,
    extent: float,
    *,
    reduction: str = ...,
) -> Tensor: ...
def gather(
    features: Tensor,
    index: Tensor,
) -> Tensor: ...
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
    features: Tensor,
    num_groups: int,
    scale: Tensor,
    shift: Tensor,
    *,
    row_splits: Tensor | None = ...,
    eps: float = ...,
    negative_slope: float | None = ...,
) -> Tensor: ...
def interpolate(
    points: Tensor,
    queries: Tensor,
    features: Tensor,
    k: int = ...,
    power: float = ...,
    *,
    points_row_splits: Tensor | None = ...,
    queries_row_splits: Tensor | None = ...,
) -> Tensor: ...
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
def leaky_relu(
    features: Tensor,
    negative_slope: float = ...,
) -> Tensor: ...
def linear(
    features: Tensor,
    weights: Tensor,
    bias: Tensor | None = ...,
) -> Tensor: ...
def nearest_upsample(
    features: Tensor,
    neighbors: Neighbors,
) -> Tensor: ...
def neighbor_reduce(
    features: Tensor,
    neighbors: Neighbors,
    reduce: str = ...,
    *,
    weights: Tensor | None = ...,
    empty: float = ...,
    pad_value: float | None = ...,
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
def relu(
    features: Tensor,
) -> Tensor: ...
def repulsion_loss(
    kernel_points: Tensor,
    offsets: Tensor,
    extent: float,
    *,
    repulse_extent: float = ...,
    detach_others: bool = ...,
    reduction: str = ...,
) -> Tensor: ...
def segment_reduce(
    features: Tensor,
    row_splits: Tensor | None,
    reduce: str = ...,
    *,
    empty: float = ...,
) -> Tensor: ...
def sigmoid(
    features: Tensor,
) -> Tensor: ...
def softmax(
    features: Tensor,
) -> Tensor: ...
def softmax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = ...,
    class_weights: Tensor | None = ...,
    reduction: str = ...,
) -> Tensor: ...
