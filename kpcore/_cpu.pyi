from collections.abc import Callable

from numpy import dtype, ndarray

class NotFinite(Exception): ...
class OutOfRange(Exception): ...

class Index:
    num_points: int
    dtype: dtype
    crowding: float
    def __init__(self, points: ndarray, row_splits: ndarray, cell: float | None, threads: int) -> None: ...

def radius_search(
    index: Index,
    queries: ndarray | None,
    queries_row_splits: ndarray | None,
    radius: float | ndarray,
    max_neighbors: int | None,
    sort: int,
    metric: int,
    ignore: int,
    return_distances: bool,
    count_only: bool,
    check_room: Callable[[int, int], None],
    threads: int,
) -> tuple[ndarray, ndarray | None, ndarray | None]: ...
def knn_search(
    index: Index,
    queries: ndarray | None,
    queries_row_splits: ndarray | None,
    radius: float | ndarray,
    k: int,
    sort: int,
    metric: int,
    ignore: int,
    return_distances: bool,
    check_room: Callable[[int, int], None],
    threads: int,
) -> tuple[ndarray, ndarray, ndarray | None]: ...
def transpose(
    index: ndarray, row_splits: ndarray, distance: ndarray | None, num_points: int, threads: int
) -> tuple[ndarray, ndarray, ndarray | None]: ...
def grid_subsample(
    points: ndarray,
    features: ndarray | None,
    labels: ndarray | None,
    row_splits: ndarray,
    voxel_size: ndarray,
    origin: ndarray,
    position: int,
    feature: int,
    return_nearest: bool,
    ignore_label: int | None,
    threads: int,
) -> tuple[ndarray, ndarray | None, ndarray | None, ndarray, ndarray, ndarray, ndarray | None]: ...
def grid_subsample_grad(
    features: ndarray,
    inverse: ndarray,
    counts: ndarray,
    nearest: ndarray | None,
    feature: int,
    grad_out: ndarray,
    threads: int,
) -> ndarray: ...
def farthest_points(
    points: ndarray, row_splits: ndarray, start: ndarray, out_row_splits: ndarray, method: int, threads: int
) -> ndarray: ...
def kernel_points(num: int, dimension: int, fixed: int, radii: ndarray | None, seed: int, threads: int) -> ndarray: ...
def lloyd(num: int, dimension: int, fixed: int, seed: int, threads: int) -> ndarray: ...
def kpconv(
    points: ndarray,
    queries: ndarray,
    index: ndarray,
    row_splits: ndarray,
    features: ndarray,
    weights: ndarray,
    kernel_points: ndarray,
    extent: float,
    influence: int,
    aggregation: int,
    normalization: int,
    threads: int,
) -> ndarray: ...
def kpconv_grad_features(
    points: ndarray,
    queries: ndarray,
    index: ndarray,
    row_splits: ndarray,
    transposed_index: ndarray,
    transposed_row_splits: ndarray,
    features: ndarray,
    weights: ndarray,
    kernel_points: ndarray,
    extent: float,
    influence: int,
    aggregation: int,
    normalization: int,
    grad_out: ndarray,
    threads: int,
) -> ndarray: ...
def kpconv_grad_weights(
    points: ndarray,
    queries: ndarray,
    index: ndarray,
    row_splits: ndarray,
    features: ndarray,
    weights: ndarray,
    kernel_points: ndarray,
    extent: float,
    influence: int,
    aggregation: int,
    normalization: int,
    grad_out: ndarray,
    threads: int,
) -> ndarray: ...
def linear(features: ndarray, weights: ndarray, bias: ndarray | None, threads: int) -> ndarray: ...
def linear_grad_features(weights: ndarray, grad_out: ndarray, threads: int) -> ndarray: ...
def linear_grad_weights(features: ndarray, grad_out: ndarray, threads: int) -> ndarray: ...
def sum_rows(rows: ndarray, threads: int) -> ndarray: ...
def moments(features: ndarray, row_splits: ndarray, groups: int, threads: int) -> tuple[ndarray, ndarray]: ...
def normalize(
    features: ndarray,
    row_splits: ndarray,
    scale: ndarray,
    shift: ndarray,
    mean: ndarray,
    inverse_std: ndarray,
    negative_slope: float,
    threads: int,
) -> ndarray: ...
def normalize_grad(
    features: ndarray,
    row_splits: ndarray,
    scale: ndarray,
    shift: ndarray,
    mean: ndarray,
    inverse_std: ndarray,
    is_given: bool,
    negative_slope: float,
    grad_out: ndarray,
    features_needed: bool,
    scale_needed: bool,
    shift_needed: bool,
    threads: int,
) -> tuple[ndarray | None, ndarray | None, ndarray | None]: ...
def activate(features: ndarray, activation: int, negative_slope: float, threads: int) -> ndarray: ...
def activate_grad(
    features: ndarray, activation: int, negative_slope: float, grad_out: ndarray, threads: int
) -> ndarray: ...
def add(first: ndarray, second: ndarray, threads: int) -> ndarray: ...
def dropout(features: ndarray, rate: float, seed: int, threads: int) -> ndarray: ...
def softmax(features: ndarray, threads: int) -> ndarray: ...
def softmax_grad(features: ndarray, grad_out: ndarray, threads: int) -> ndarray: ...
def cross_entropy(
    logits: ndarray,
    labels: ndarray,
    ignore_index: int | None,
    class_weights: ndarray | None,
    reduction: int,
    each: bool,
    threads: int,
) -> ndarray: ...
def cross_entropy_grad(
    logits: ndarray,
    labels: ndarray,
    ignore_index: int | None,
    class_weights: ndarray | None,
    reduction: int,
    grad_out: ndarray,
    threads: int,
) -> ndarray: ...
def concatenate(features: list[ndarray], threads: int) -> ndarray: ...
def split(whole: ndarray, channels: list[int], needed: list[bool], threads: int) -> list[ndarray | None]: ...
def fma_rate(dtype: str) -> float: ...
def version() -> str: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def pause_threads() -> None: ...
