from collections.abc import Collection, Iterable, Sequence
from typing import Literal, overload

from numpy.typing import DTypeLike
from torch import Tensor, dtype

import kpcore
from kpcore import BatchNormed, CovarianceFeatures, KernelMap, Pyramid, Sampled, Subsampled
from kpcore import Neighbors as Neighbors
from kpcore.neighbors import Flow
from kpcore.search import IgnoreQueryPoint, Metric, Sort
from kpcore.torch.data import PyramidCollate as PyramidCollate
from kpcore.torch.data import PyramidDataset as PyramidDataset
from kpcore.torch.data import dynamic_shapes as dynamic_shapes
from kpcore.torch.data import to_device as to_device
from kpcore.torch.deform2d_layers import ConditionalConv2d as ConditionalConv2d
from kpcore.torch.deform2d_layers import DeformableConv2d as DeformableConv2d
from kpcore.torch.deform2d_layers import DeformableKernelConv2d as DeformableKernelConv2d
from kpcore.torch.deform2d_layers import GlobalDeformableKernel2d as GlobalDeformableKernel2d
from kpcore.torch.deform2d_layers import LocalDeformableKernel2d as LocalDeformableKernel2d
from kpcore.torch.layers import DeformableKPConv as DeformableKPConv
from kpcore.torch.layers import KPConv as KPConv
from kpcore.torch.layers import KPConvX as KPConvX
from kpcore.torch.networks import ImageNetwork as ImageNetwork
from kpcore.torch.networks import Network as Network
from kpcore.torch.open3d_layers import ContinuousConv as ContinuousConv
from kpcore.torch.open3d_layers import SparseConv as SparseConv
from kpcore.torch.open3d_layers import SparseConvTranspose as SparseConvTranspose
from kpcore.torch.open3d_searches import FixedRadiusSearch as FixedRadiusSearch
from kpcore.torch.open3d_searches import KNNSearch as KNNSearch
from kpcore.torch.open3d_searches import RadiusSearch as RadiusSearch
from kpcore.torch.open3d_searches import VoxelPooling as VoxelPooling
from kpcore.torch.ops import use_torch_allocator as use_torch_allocator
from kpcore.torch.sparse_layers import InverseConv as InverseConv
from kpcore.torch.sparse_layers import StridedConv as StridedConv
from kpcore.torch.sparse_layers import SubmanifoldConv as SubmanifoldConv
from kpcore.torch.sparse_tensors import to_sparse as to_sparse

class GridIndex(kpcore.GridIndex):
    @overload
    def radius_search(
        self,
        queries: Tensor | None,
        radius: float | Tensor,
        *,
        queries_row_splits: Tensor | None = ...,
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
        queries: Tensor | None,
        radius: float | Tensor,
        *,
        queries_row_splits: Tensor | None = ...,
        inclusive: bool = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[True],
    ) -> Tensor: ...

class KDTree(kpcore.KDTree):
    @overload
    def radius_search(
        self,
        queries: Tensor | None,
        radius: float | Tensor,
        *,
        queries_row_splits: Tensor | None = ...,
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
        queries: Tensor | None,
        radius: float | Tensor,
        *,
        queries_row_splits: Tensor | None = ...,
        inclusive: bool = ...,
        metric: Metric = ...,
        ignore_query_point: IgnoreQueryPoint = ...,
        max_neighbors: int | None = ...,
        sort: Sort | None = ...,
        return_distances: bool = ...,
        count_only: Literal[True],
    ) -> Tensor: ...

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
) -> BatchNormed[Tensor, Tensor]: ...
def batch_to_row_splits(
    batch: Tensor,
    num_items: int | None = ...,
) -> Tensor: ...
def build_pyramid(
    points: Tensor,
    *,
    voxel_size: float,
    num_levels: int,
    row_splits: Tensor | None = ...,
    features: Tensor | None = ...,
    labels: Tensor | None = ...,
    subsampled: bool = ...,
    origin: Literal[0, "published"] = ...,
    conv_radius: float = ...,
    deform_radius: float = ...,
    deform_levels: Collection[int] = ...,
    neighbor_limits: Sequence[int] | None = ...,
    inclusive: bool = ...,
    upsample_levels: Collection[int] = ...,
) -> Pyramid[Tensor]: ...
def calibrate_neighbor_limits(
    clouds: Iterable[Tensor],
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
    first: Tensor,
    second: Tensor,
    third: Tensor | None = ...,
    fourth: Tensor | None = ...,
) -> Tensor: ...
def conditional_conv2d(
    x: Tensor,
    weights: Tensor,
    routing: Tensor,
    *,
    kernel_size: int | Sequence[int] | None = ...,
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    kernel_offsets: Tensor | None = ...,
    data_offsets: Tensor | None = ...,
    modulations: Tensor | None = ...,
    bias: Tensor | None = ...,
    grid: str = ...,
    clip: str | None = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Tensor: ...
def continuous_conv(
    points: Tensor,
    queries: Tensor | None,
    neighbors: Neighbors,
    features: Tensor,
    filters: Tensor,
    extents: Tensor | float,
    *,
    coordinate_mapping: str = ...,
    interpolation: str = ...,
    align_corners: bool = ...,
    normalize: bool = ...,
    offset: Tensor | None = ...,
    importances: Tensor | None = ...,
    neighbor_importances: Tensor | None = ...,
) -> Tensor: ...
def continuous_conv_transpose(
    points: Tensor,
    queries: Tensor | None,
    neighbors: Neighbors,
    features: Tensor,
    filters: Tensor,
    extents: Tensor | float,
    *,
    coordinate_mapping: str = ...,
    interpolation: str = ...,
    align_corners: bool = ...,
    normalize: bool = ...,
    offset: Tensor | None = ...,
    importances: Tensor | None = ...,
    neighbor_importances: Tensor | None = ...,
) -> Tensor: ...
def covariance_features(
    points: Tensor,
    *,
    k: int | None = ...,
    radius: float | None = ...,
    viewpoint: Tensor | Sequence[float] | None = ...,
    row_splits: Tensor | None = ...,
) -> CovarianceFeatures[Tensor]: ...
def deformable_conv2d(
    x: Tensor,
    weight: Tensor,
    data_offsets: Tensor | None,
    *,
    modulations: Tensor | None = ...,
    bias: Tensor | None = ...,
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Tensor: ...
def deformable_kernel_conv2d(
    x: Tensor,
    weight: Tensor,
    kernel_offsets: Tensor | None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    groups: int = ...,
    data_offsets: Tensor | None = ...,
    modulations: Tensor | None = ...,
    bias: Tensor | None = ...,
    grid: str = ...,
    clip: str | None = ...,
    layout: str = ...,
    detach_offsets: bool = ...,
) -> Tensor: ...
def dropout(
    features: Tensor,
    rate: float,
    seed: int | Tensor,
    *,
    training: bool = ...,
) -> Tensor: ...
def farthest_point_sampling(
    points: Tensor,
    num: int | Tensor | None = ...,
    *,
    min_distance: float = ...,
    row_splits: Tensor | None = ...,
    start: int | Tensor = ...,
    method: Literal["exact", "bucketed"] | None = ...,
) -> Sampled[Tensor]: ...
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
    points: Tensor,
    voxel_size: float | Sequence[float] | Tensor,
    *,
    features: Tensor | None = ...,
    labels: Tensor | None = ...,
    row_splits: Tensor | None = ...,
    origin: float | Sequence[float] | Tensor | str = ...,
    position: Literal["barycenter", "center", "nearest"] = ...,
    feature: Literal["mean", "max", "nearest"] = ...,
    ignore_label: int | None = ...,
) -> Subsampled[Tensor, Tensor]: ...
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
    queries: Tensor | None,
    features: Tensor,
    k: int = ...,
    power: float = ...,
    *,
    points_row_splits: Tensor | None = ...,
    queries_row_splits: Tensor | None = ...,
) -> Tensor: ...
def kernel_map(
    coords: Tensor,
    out_coords: Tensor | None = ...,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = ...,
    dilation: int | Sequence[int] = ...,
    padding: int | Sequence[int] = ...,
    shape: Sequence[int] | None = ...,
    rule: Literal["submanifold", "spconv", "minkowski"] = ...,
    row_splits: Tensor | None = ...,
    out_row_splits: Tensor | None = ...,
) -> KernelMap[Tensor]: ...
def kernel_points(
    num: int | Sequence[int],
    radius: float = ...,
    *,
    dimension: int = ...,
    fixed: Literal["none", "center", "verticals"] = ...,
    method: Literal["potential", "lloyd", "shells"] = ...,
    rotate: Literal["vertical", "full"] | None = ...,
    seed: int = ...,
    dtype: DTypeLike | dtype = ...,
) -> Tensor: ...
def knn_graph(
    points: Tensor,
    k: int,
    *,
    row_splits: Tensor | None = ...,
    loop: bool = ...,
    flow: Flow = ...,
) -> Tensor: ...
def knn_search(
    points: Tensor,
    queries: Tensor | None,
    k: int,
    *,
    points_row_splits: Tensor | None = ...,
    queries_row_splits: Tensor | None = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    return_distances: bool = ...,
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
    kernel_offsets: Tensor | None = ...,
    kernel_extent: float | None = ...,
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
def lengths(
    row_splits: Tensor,
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
def normals(
    points: Tensor,
    *,
    k: int | None = ...,
    radius: float | None = ...,
    viewpoint: Tensor | Sequence[float] | None = ...,
    row_splits: Tensor | None = ...,
) -> Tensor: ...
def outlier_mask(
    points: Tensor,
    *,
    mean_k: int | None = ...,
    std_mul: float | None = ...,
    radius: float | None = ...,
    min_points: int | None = ...,
    row_splits: Tensor | None = ...,
) -> Tensor: ...
@overload
def radius_search(
    points: Tensor,
    queries: Tensor | None,
    radius: float | Tensor,
    *,
    points_row_splits: Tensor | None = ...,
    queries_row_splits: Tensor | None = ...,
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
    points: Tensor,
    queries: Tensor | None,
    radius: float | Tensor,
    *,
    points_row_splits: Tensor | None = ...,
    queries_row_splits: Tensor | None = ...,
    inclusive: bool = ...,
    metric: Metric = ...,
    ignore_query_point: IgnoreQueryPoint = ...,
    max_neighbors: int | None = ...,
    sort: Sort | None = ...,
    return_distances: bool = ...,
    count_only: Literal[True],
) -> Tensor: ...
def relu(
    features: Tensor,
) -> Tensor: ...
def relu6(
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
def row_splits(
    lengths: Sequence[int] | Tensor,
) -> Tensor: ...
def row_splits_to_batch(
    row_splits: Tensor,
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
def sparse_conv(
    neighbors: Neighbors,
    kernel_index: Tensor,
    features: Tensor,
    filters: Tensor,
    *,
    normalize: bool = ...,
    importances: Tensor | None = ...,
    neighbor_importances: Tensor | None = ...,
) -> Tensor: ...
def sparse_conv_transpose(
    neighbors: Neighbors,
    kernel_index: Tensor,
    features: Tensor,
    filters: Tensor,
    *,
    normalize: bool = ...,
    importances: Tensor | None = ...,
    neighbor_importances: Tensor | None = ...,
) -> Tensor: ...
def to_dense(
    coords: Tensor,
    features: Tensor,
    shape: Sequence[int],
    row_splits: Tensor | None = ...,
) -> Tensor: ...
