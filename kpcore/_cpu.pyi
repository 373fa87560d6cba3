from numpy import ndarray

class NotFinite(Exception): ...
class OutOfRange(Exception): ...

def radius_search(
    points: ndarray,
    queries: ndarray | None,
    points_row_splits: ndarray,
    queries_row_splits: ndarray | None,
    radius: float,
    max_neighbors: int | None,
    sort: int,
    return_distances: bool,
    count_only: bool,
    threads: int,
) -> tuple[ndarray, ndarray | None, ndarray | None]: ...
def transpose(
    index: ndarray, row_splits: ndarray, distance: ndarray | None, num_points: int, threads: int
) -> tuple[ndarray, ndarray, ndarray | None]: ...
def grid_subsample(
    points: ndarray,
    features: ndarray | None,
    labels: ndarray | None,
    row_splits: ndarray,
    voxel_size: float,
    ignore_label: int | None,
    threads: int,
) -> tuple[ndarray, ndarray | None, ndarray | None, ndarray, ndarray, ndarray]: ...
def farthest_points(
    points: ndarray, row_splits: ndarray, start: ndarray, out_row_splits: ndarray, method: int, threads: int
) -> ndarray: ...
def kernel_points(num: int, dimension: int, fixed: int, seed: int, threads: int) -> ndarray: ...
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
def fma_rate(dtype: str) -> float: ...
def version() -> str: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def pause_threads() -> None: ...
