from collections.abc import Callable, Collection

from numpy import dtype, ndarray

from kpcore.kpconv import Problem

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
def frozen(array: ndarray) -> ndarray: ...
def checked_list(
    index: ndarray, row_splits: ndarray, num_points: int, copy: bool, threads: int
) -> tuple[ndarray, ndarray]: ...
def longest_row(row_splits: ndarray, threads: int) -> int: ...
def padded(index: ndarray, row_splits: ndarray, width: int, fill: int, dtype: dtype, threads: int) -> ndarray: ...
def unpadded(matrix: ndarray, num_points: int, threads: int) -> tuple[ndarray, ndarray]: ...
def grid_subsample(
    points: ndarray,
    features: ndarray | None,
    labels: ndarray | None,
    row_splits: ndarray,
    voxel_size: ndarray,
    origin: ndarray | None,
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
    points: ndarray,
    row_splits: ndarray,
    start: ndarray,
    out_row_splits: ndarray,
    total: int,
    method: int,
    threads: int,
) -> ndarray: ...
def neighbor_reduce(
    features: ndarray,
    index: ndarray,
    row_splits: ndarray,
    weights: ndarray | None,
    shared: ndarray | None,
    reduction: int,
    empty: float,
    pad_value: float,
    width: int,
    return_choice: bool,
    threads: int,
) -> tuple[ndarray, ndarray | None]: ...
def neighbor_reduce_grad_weights(
    features: ndarray, index: ndarray, row_splits: ndarray, reduction: int, grad_out: ndarray, threads: int
) -> ndarray: ...
def segment_reduce(
    features: ndarray, row_splits: ndarray, reduction: int, empty: float, return_choice: bool, threads: int
) -> tuple[ndarray, ndarray | None]: ...
def segment_reduce_grad(
    grad_out: ndarray, row_splits: ndarray, reduction: int, num_rows: int, threads: int
) -> ndarray: ...
def unpool(choice: ndarray, grad_out: ndarray, num_rows: int, threads: int) -> ndarray: ...
def gather_rows(features: ndarray, index: ndarray, row_splits: ndarray | None, threads: int) -> ndarray: ...
def inverse_distance_weights(
    distance: ndarray, row_splits: ndarray, power: float, dtype: dtype, threads: int
) -> ndarray: ...
def kernel_points(num: int, dimension: int, fixed: int, radii: ndarray | None, seed: int, threads: int) -> ndarray: ...
def lloyd(num: int, dimension: int, fixed: int, seed: int, threads: int) -> ndarray: ...
def kpconv(problem: Problem) -> ndarray: ...
def kpconv_grad_features(
    problem: Problem, transposed_index: ndarray, transposed_row_splits: ndarray, grad_out: ndarray
) -> ndarray: ...
def kpconv_grads(problem: Problem, grad_out: ndarray, needs: Collection[str]) -> dict[str, ndarray]: ...
def fitting_loss(
    points: ndarray,
    queries: ndarray,
    index: ndarray,
    row_splits: ndarray,
    kernel_points: ndarray,
    offsets: ndarray,
    extent: float,
    weight: float,
    threads: int,
) -> tuple[ndarray, ndarray]: ...
def fitting_loss_grad(
    points: ndarray,
    queries: ndarray,
    index: ndarray,
    row_splits: ndarray,
    kernel_points: ndarray,
    offsets: ndarray,
    extent: float,
    weight: float,
    nearest: ndarray,
    grad_out: ndarray,
    return_offsets: bool,
    return_kernel_points: bool,
    threads: int,
) -> tuple[ndarray | None, ndarray | None]: ...
def repulsion_loss(
    kernel_points: ndarray, offsets: ndarray, extent: float, repulse_extent: float, weight: float, threads: int
) -> ndarray: ...
def repulsion_loss_grad(
    kernel_points: ndarray,
    offsets: ndarray,
    extent: float,
    repulse_extent: float,
    weight: float,
    grad_out: ndarray,
    return_offsets: bool,
    return_kernel_points: bool,
    threads: int,
) -> tuple[ndarray | None, ndarray | None]: ...
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
def sum_squares(values: ndarray, threads: int) -> float: ...
def sgd(
    value: ndarray, grad: ndarray, moment: ndarray, lr: float, momentum: float, weight_decay: float, threads: int
) -> None: ...
def adamw(
    value: ndarray,
    grad: ndarray,
    mean: ndarray,
    square: ndarray,
    keep: float,
    first: float,
    second: float,
    rate: float,
    inverse_root: float,
    eps: float,
    threads: int,
) -> None: ...
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
def xla_arrays(address: int, dtypes: dict[int, dtype], writeable: bool) -> list[ndarray]: ...
def array_at(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: dtype, owner: object
) -> ndarray: ...
def version() -> str: ...
def isas() -> tuple[str, ...]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def openmp_library() -> str | None: ...
def pause_threads() -> None: ...
