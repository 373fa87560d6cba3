from collections.abc import Callable
from typing import Any

from numpy import dtype, ndarray

class NotFinite(Exception): ...
class OutOfRange(Exception): ...

class Index:
    num_points: int
    dtype: dtype[Any]
    crowding: float
    def __init__(self, points: ndarray, row_splits: ndarray, cell: float | None, threads: int) -> None: ...

def fields() -> dict[str, dict[str, str]]: ...
def run(name: str, call: Any = None, **more: Any) -> None: ...
def radius_search(
    index: Index,
    queries: ndarray | None,
    queries_row_splits: ndarray | None,
    radius: float | ndarray,
    inclusive: bool,
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
    inclusive: bool,
    k: int,
    sort: int,
    metric: int,
    ignore: int,
    return_distances: bool,
    check_room: Callable[[int, int], None],
    threads: int,
) -> tuple[ndarray, ndarray, ndarray | None]: ...
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
def frozen(array: ndarray) -> ndarray: ...
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
def pause_threads() -> bool: ...
