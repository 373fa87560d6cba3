"""Neighbour lists: the rows of a CSR matrix, one for each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, overload

import numpy as np

from kpcore import config, moved
from kpcore.backends import checks, cpu, devices
from kpcore.backends.devices import AnyArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import DTypeLike
    from scipy.sparse import csr_array
    from typing_extensions import Self

__all__ = ["Neighbors", "batch_to_row_splits", "lengths", "row_splits", "row_splits_to_batch"]

Flow: TypeAlias = Literal["source_to_target", "target_to_source"]

_FLOWS = ("source_to_target", "target_to_source")

# Type of a framework's array -> the function (argument name, array) that copies it to NumPy. kpcore.jax adds JAX's.
TO_HOST: dict[type, Callable[[str, Any], np.ndarray]] = {}


def row_splits(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Bounds of stacked items from their lengths.

    Parameters
    ----------
    lengths : sequence of int, (B,)

    Returns
    -------
    (B + 1,) int64, starting at 0

    Examples
    --------
    >>> import kpcore as kp
    >>> kp.row_splits([3, 0, 2])
    array([0, 3, 3, 5])
    """
    values = lengths if devices.is_array(lengths) else np.asarray(lengths)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise TypeError(f"lengths: expected integers (B,), got {values.dtype} {values.shape}")
    if values.size and values.min() < 0:
        raise ValueError(f"lengths: expected numbers of at least 0, got {values.min()}")
    return splits_from_counts(values)


def lengths(row_splits: AnyArray) -> np.ndarray:
    """Lengths of stacked items from their bounds; the inverse of `row_splits`.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.lengths(np.array([0, 3, 3, 5]))
    array([3, 0, 2])
    """
    values = checks.array("row_splits", row_splits, "B+1", checks.SPLITS, {})
    _check_bounds("row_splits", devices.on_host(values))
    return np.diff(values)


def batch_to_row_splits(batch: AnyArray, num_items: int | None = None) -> np.ndarray:
    """Bounds of stacked items from the number of the item of each row, the batch vector of PyTorch Geometric.

    Parameters
    ----------
    batch : (N,) int32 or int64
        From 0, never decreasing; a number that is left out is an empty item.
    num_items : int, optional
        B; by default one more than the last number in `batch`.

    Returns
    -------
    (B + 1,) int64

    Raises
    ------
    ValueError, TypeError
        For a vector that is not sorted, numbers below 0 or from `num_items` on, or other dtypes.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.batch_to_row_splits(np.array([0, 0, 0, 2, 2]))
    array([0, 3, 3, 5])
    >>> kp.batch_to_row_splits(np.array([0, 0, 0, 2, 2]), num_items=4)
    array([0, 3, 3, 5, 5])
    """
    return splits_of_batch("batch", batch, "num_items", num_items)


def row_splits_to_batch(row_splits: AnyArray) -> np.ndarray:
    """The number of the item of each row, from the bounds of the items; the inverse of `batch_to_row_splits`.

    Parameters
    ----------
    row_splits : (B + 1,) int64

    Returns
    -------
    (N,) int64, with N = ``row_splits[-1]``

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> kp.row_splits_to_batch(np.array([0, 3, 3, 5]))
    array([0, 0, 0, 2, 2])
    """
    values = checks.array("row_splits", row_splits, "B+1", checks.SPLITS, {})
    _check_bounds("row_splits", devices.on_host(values))
    return _items_of_rows(values)


def splits_of_batch(name: str, batch: AnyArray, size_name: str, num_items: int | None,
                    rows: tuple[int, str] | None = None) -> np.ndarray:  # fmt: skip
    """`batch_to_row_splits` for arguments that are called `name` and `size_name`.

    `rows`: the number of rows that the batch vector must have, and the name of the argument that has them.
    """
    batch = checks.array(name, batch, "N", checks.INTEGERS, {} if rows is None else {"N": rows})
    xp = devices.namespace(batch)
    falls = batch[1:] < batch[:-1]
    if falls.any():
        at = int(falls.argmax())
        raise ValueError(
            f"{name}: expected numbers that never decrease, got {batch[at]} then {batch[at + 1]} at {at}; sort the "
            "rows by item first"
        )
    first, last = (int(batch[0]), int(batch[-1])) if len(batch) else (0, -1)
    most = checks.MAX_POINTS if num_items is None else checks.integer(size_name, num_items, 0, checks.MAX_POINTS)
    if first < 0 or last >= most:
        match = "" if num_items is None else f" to match {size_name}"
        raise ValueError(f"{name}: expected numbers from 0 to {most - 1}{match}, got {first if first < 0 else last}")
    return xp.searchsorted(batch, xp.arange((last + 1 if num_items is None else most) + 1, dtype=batch.dtype))


def _items_of_rows(row_splits):
    """(row_splits[-1],) int64: the number of the item of each row; `row_splits` are not checked."""
    xp, num_items = devices.namespace(row_splits), len(row_splits) - 1
    if xp is np:
        return np.repeat(np.arange(num_items), row_splits[1:] - row_splits[:-1])  # np.diff takes 4 µs more
    # CuPy's repeat takes the numbers of repetitions from the host only.
    return xp.searchsorted(row_splits[1:], xp.arange(int(row_splits[-1])), side="right")


def _check_bounds(name, values):
    """Raise ValueError unless `values` are row_splits: they start at 0 and never fall; any last value is allowed."""
    checks.check_splits(name, values, values[-1] if len(values) else 0, "its last value")


class Neighbors:
    """The neighbours of M queries among N points in CSR form; from and to padded matrices, pairs, sparse matrices.

    The neighbours of query ``q`` are ``index[row_splits[q]:row_splits[q + 1]]``. The order within a row is that of the
    function that made it. Frozen, compared by identity, picklable.

    NumPy arrays are copied when the list is made, and the arrays of the list are read-only, so a list that was checked
    once stays valid. A list that comes from a pickle, or from a map over a pytree of JAX or torch, is checked when it
    is first used; if it holds JAX arrays, the first method that reads them replaces them by NumPy arrays. CuPy arrays
    cannot be made read-only: they are checked once and must not be changed afterwards. Annotations say ``np.ndarray``
    for arrays of NumPy and of CuPy.

    Parameters
    ----------
    index : (E,) int32 or int64
        Point numbers, 0 to ``num_points - 1``. May be longer than ``row_splits[-1]``; the rest is not used. Stored as
        int32.
    row_splits : (M + 1,) int32 or int64
        Stored as int64.
    num_points : int
    distance : (E,) float32 or float64, optional
        Distances from the query, not squared.
    width : int, optional
        Number of columns of the padded matrix that the list was made from.

    Raises
    ------
    ValueError, TypeError
        For an index outside the points, ``row_splits`` that fall, or wrong shapes or dtypes.

    Examples
    --------
    >>> import numpy as np, kpcore as kp
    >>> nb = kp.Neighbors(np.array([0, 1, 1], np.int32), kp.row_splits([2, 0, 1]), num_points=2)
    >>> nb.counts
    array([2, 0, 1])
    >>> nb.to_padded()
    array([[0, 1],
           [2, 2],
           [1, 2]], dtype=int32)
    """

    # stored_...: the writable arrays, for the kernels; users get read-only views. stored_transposed is None until
    # transpose() is called. stored_leaves caches what kpcore.torch flattens the list into as a pytree node.
    __slots__ = ("_is_checked", "carries_transpose", "num_points", "stored_distance", "stored_index", "stored_leaves",
                 "stored_row_splits", "stored_transposed", "width")  # fmt: skip
    if TYPE_CHECKING:
        stored_index: np.ndarray
        stored_row_splits: np.ndarray
        stored_distance: np.ndarray | None
        stored_transposed: Neighbors | None
        _is_checked: bool
        stored_leaves: tuple[tuple[str, ...], list[Any]] | None
        num_points: int
        width: int | None
        carries_transpose: bool

    def __init__(self, index: AnyArray, row_splits: AnyArray, num_points: int, distance: AnyArray | None = None,
                 width: int | None = None) -> None:  # fmt: skip
        self._set(*_checked_fields("", index, row_splits, num_points, distance, width))

    def _set(self, index, row_splits, num_points, distance=None, width=None, transposed=None, carries_transpose=False,
             is_checked=True) -> Self:  # fmt: skip
        fields = {"stored_index": index, "stored_row_splits": row_splits, "num_points": num_points,
                  "stored_distance": distance, "width": width, "stored_transposed": transposed,
                  "carries_transpose": carries_transpose, "_is_checked": is_checked, "stored_leaves": None}  # fmt: skip
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def _new(cls, *args: Any, **kwargs: Any) -> Self:
        """A list of arrays that the library just made and that no caller holds: neither checked nor copied."""
        return object.__new__(cls)._set(*args, **kwargs)

    # The properties give read-only views of NumPy arrays that cannot be made writable again: the list stays valid.
    @property
    def index(self) -> np.ndarray:
        """(E,) int32."""
        return _read_only(self.stored_index)

    @property
    def row_splits(self) -> np.ndarray:
        """(M + 1,) int64."""
        return _read_only(self.stored_row_splits)

    @property
    def distance(self) -> np.ndarray | None:
        """(E,) float32 or float64, or None."""
        return _read_only(self.stored_distance)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Neighbors is frozen: cannot set {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"Neighbors is frozen: cannot delete {name}")

    def __repr__(self) -> str:
        if not self._is_checked:  # the fields may be tracers of JAX without values, or no arrays at all
            index, row_splits = (getattr(a, "shape", a) for a in (self.stored_index, self.stored_row_splits))
            return f"Neighbors({self.num_points} points, index {index}, row_splits {row_splits}, not checked yet)"
        return f"Neighbors({self.num_queries} queries, {self.num_points} points, {self.num_pairs} pairs)"

    def __reduce__(self) -> tuple[object, ...]:
        index, row_splits, distance = _numpy_arrays(self)
        return _unpickle, (index, row_splits, self.num_points, distance, self.width, self.carries_transpose)

    @property
    def num_queries(self) -> int:
        """M."""
        return self.stored_row_splits.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """Number of pairs in use, ``row_splits[-1]``. On the GPU this waits until the value has been computed."""
        return int(checked(self).stored_row_splits[-1])

    @property
    def counts(self) -> np.ndarray:
        """(M,) int64: number of neighbours of each query."""
        return np.diff(checked(self).stored_row_splits)

    def to_padded(self, width: int | None = None, fill: int | None = None, *,
                  dtype: DTypeLike = np.int32) -> np.ndarray:  # fmt: skip
        """The neighbours as a padded matrix, one row for each query: the form of the published code.

        Parameters
        ----------
        width : int, optional
            Number of columns; by default the length of the longest row. Rows longer than this lose their last entries,
            so cut only lists that are sorted by distance.
        fill : int, optional
            Written where a row has no more neighbours; by default ``num_points``.
        dtype : int32 or int64
            Take int64 to index a torch tensor with the matrix.

        Returns
        -------
        (M, width) of `dtype`
        """
        checked(self)
        backend, xp = devices.backend(self.stored_index), devices.namespace(self.stored_index)
        dtype = np.dtype(dtype)
        if dtype not in checks.INTEGERS:
            raise TypeError(f"dtype: expected int32 or int64, got {dtype}")
        if width is None:
            longest = xp.zeros(1, np.int64)
            backend.run("longest_row", row_splits=self.stored_row_splits, longest=longest)
            width = int(longest[0])
        width = checks.integer("width", width, 0)
        limits = np.iinfo(dtype)
        fill = self.num_points if fill is None else checks.integer("fill", fill, int(limits.min), int(limits.max))
        padded = xp.empty((self.num_queries, width), dtype)
        backend.run("pad_list", index=self.stored_index, row_splits=self.stored_row_splits, fill=fill, padded=padded)
        return padded

    @classmethod
    def from_padded(cls, index: AnyArray, num_points: int) -> Neighbors:
        """From a padded matrix of neighbours (M, width), int32 or int64; -1 and ``num_points`` mean "no neighbour".

        The order of the columns is kept. Any other value outside 0 to ``num_points - 1`` is an error.
        """
        return padded_list("index", index, num_points)

    @classmethod
    def from_coo(cls, query: AnyArray, point: AnyArray, num_queries: int, num_points: int) -> Self:
        """From pairs (query, point), each (E,) int32 or int64, in any order; the pairs of a query keep their order."""
        sizes = {}
        query = checks.array("query", query, "E", checks.INTEGERS, sizes)
        point = checks.array("point", point, "E", checks.INTEGERS, sizes)
        return cls._from_pairs(query, point, ("query", "point"), num_queries, num_points)[0]

    @classmethod
    def _from_pairs(cls, query, point, names, num_queries, num_points):
        """(list, the number of the pair that each of its pairs comes from); `names` are those of the two arrays."""
        num_points = checks.integer("num_points", num_points, 0, checks.MAX_POINTS)
        num_queries = checks.integer("num_queries", num_queries, 0, checks.MAX_POINTS)
        for name, values, size_name, size in ((names[0], query, "num_queries", num_queries),
                                              (names[1], point, "num_points", num_points)):  # fmt: skip
            if len(values) and ((low := int(values.min())) < 0 or int(values.max()) >= size):
                bad = low if low < 0 else int(values.max())
                raise ValueError(f"{name}: expected values from 0 to {size - 1} to match {size_name}, got {bad}")
        order = devices.namespace(query).argsort(query, kind="stable")
        splits = splits_from_counts(devices.namespace(query).bincount(query, minlength=num_queries))
        return cls._new(point[order].astype(np.int32), splits, num_points), order

    def edge_index(self, flow: Flow = "source_to_target") -> np.ndarray:
        """The pairs as edges of a graph, the form of PyTorch Geometric and torch_cluster.

        An edge leads from a point to a query, as features do. The edges are in the order of ``index``: those of query 0
        first.

        Parameters
        ----------
        flow : {"source_to_target", "target_to_source"}
            The rows of the result are (points, queries), or (queries, points).

        Returns
        -------
        (2, E) int64

        Examples
        --------
        >>> import numpy as np, kpcore as kp
        >>> nb = kp.Neighbors(np.array([2, 1, 0], np.int32), kp.row_splits([2, 1]), num_points=3)
        >>> nb.edge_index()
        array([[2, 1, 0],
               [0, 0, 1]])
        """
        is_swapped, pairs = checks.choice("flow", flow, _FLOWS), self.num_pairs
        edges = devices.namespace(self.stored_index).empty((2, pairs), np.int64)
        edges[is_swapped], edges[1 - is_swapped] = self.stored_index[:pairs], _items_of_rows(self.stored_row_splits)
        return edges

    @overload
    @classmethod
    def from_edge_index(cls, edge_index: AnyArray, num_points: int, num_queries: int | None = None, *,
                        flow: Flow = "source_to_target", return_order: Literal[False] = False
                        ) -> Self: ...  # fmt: skip

    @overload
    @classmethod
    def from_edge_index(cls, edge_index: AnyArray, num_points: int, num_queries: int | None = None, *,
                        flow: Flow = "source_to_target", return_order: Literal[True]
                        ) -> tuple[Self, np.ndarray]: ...  # fmt: skip

    @classmethod
    def from_edge_index(cls, edge_index: AnyArray, num_points: int, num_queries: int | None = None, *,
                        flow: Flow = "source_to_target", return_order: bool = False
                        ) -> Self | tuple[Self, np.ndarray]:  # fmt: skip
        """From the edges of a graph, in any order; the inverse of `edge_index`.

        The edges of a query keep their order. What belongs to edges, such as weights, has to follow the order of the
        pairs: ``weights[order]`` with the `order` of ``return_order=True``.

        Parameters
        ----------
        edge_index : (2, E) int32 or int64
            The rows (points, queries), or (queries, points) with ``flow="target_to_source"``.
        num_points : int
        num_queries : int, optional
            By default `num_points`: the queries are the points.
        flow : {"source_to_target", "target_to_source"}
        return_order : bool
            Return (list, order), where ``order`` (E,) int64 is the number of the edge that each pair comes from.

        Examples
        --------
        >>> import numpy as np, kpcore as kp
        >>> edges = np.array([[0, 2, 1], [1, 0, 0]])
        >>> nb, order = kp.Neighbors.from_edge_index(edges, num_points=3, return_order=True)
        >>> nb.to_padded()
        array([[2, 1],
               [0, 3],
               [3, 3]], dtype=int32)
        >>> np.array([0.1, 0.2, 0.3])[order]
        array([0.2, 0.3, 0.1])
        """
        is_swapped = checks.choice("flow", flow, _FLOWS)
        edge_index = checks.array("edge_index", edge_index, "2 E", checks.INTEGERS, {"2": (2, "edge_index")})
        rows = 1 - is_swapped, is_swapped
        neighbors, order = cls._from_pairs(
            *(edge_index[row] for row in rows), [f"edge_index[{row}]" for row in rows],
            num_points if num_queries is None else num_queries, num_points
        )  # fmt: skip
        return (neighbors, order) if checks.boolean("return_order", return_order) else neighbors

    def transpose(self) -> Neighbors:
        """The queries of each point: a list of N rows among M queries. Made once and kept; rows are in rising order."""
        if checked(self).stored_transposed is None:
            index, splits, distance = transposed(
                self.stored_index, self.stored_row_splits, self.stored_distance, self.num_points
            )
            object.__setattr__(self, "stored_transposed", self._new(index, splits, self.num_queries, distance))
        return self.stored_transposed

    def with_transpose(self, carries_transpose: bool = True) -> Self:
        """This list with its transpose among the arrays that a compiled function of JAX or torch gets.

        A compiled function gets only the arrays of a list. The gradient of features needs the transpose and computes it
        in each call, unless it is one of these arrays. A function is compiled separately for lists with and without a
        transpose; whether `transpose` was called before makes no difference.
        """
        transposed = self.transpose() if carries_transpose else checked(self).stored_transposed
        return self._new(self.stored_index, self.stored_row_splits, self.num_points, self.stored_distance, self.width,
                         transposed, checks.boolean("carries_transpose", carries_transpose))  # fmt: skip

    def with_width(self, width: int) -> Self:
        """This list with ``width`` set, as if it came from a padded matrix of that many columns."""
        width = checks.integer("width", width, 0)
        checked(self)
        return self._new(self.stored_index, self.stored_row_splits, self.num_points, self.stored_distance, width,
                         self.stored_transposed, self.carries_transpose)  # fmt: skip

    def to_sparse(self, values: AnyArray | None = None) -> csr_array:
        """A ``scipy.sparse.csr_array`` (M, N) that holds `values` (E,), by default ones (float32).

        On the GPU a ``cupyx.scipy.sparse.csr_matrix``, which counts its values in 32 bits.
        """
        pairs, xp = self.num_pairs, devices.namespace(self.stored_index)
        if values is None:
            values = xp.ones(pairs, np.float32)
        else:
            sizes = {"E": (pairs, "row_splits")} | checks.device_of(("neighbors", self.stored_index))
            values = checks.array("values", values, "E", checks.REAL, sizes)
        index, splits = self.index, self.row_splits
        if xp is np:
            from scipy.sparse import csr_array
        else:
            from cupyx.scipy.sparse import csr_matrix as csr_array

            if pairs > checks.MAX_POINTS:
                raise ValueError(f"neighbors: expected at most {checks.MAX_POINTS} pairs on the GPU, got {pairs}")
            splits = splits.astype(np.int32)
        return csr_array((values, index[:pairs], splits), shape=(self.num_queries, self.num_points))

    def to(self, device: Literal["cpu", "cuda"]) -> Self:
        """This list with its arrays on ``"cpu"`` (NumPy) or ``"cuda"`` (CuPy, on the current GPU).

        Returns the list itself if it is on that device already, else a copy, and of its transpose too if there is one.
        """
        is_on_cpu = isinstance(checked(self).stored_index, np.ndarray)
        if is_on_cpu == (checks.choice("device", device, ("cpu", "cuda")) == 0):
            return self
        move = config.cupy().asarray if device == "cuda" else devices.on_host
        transposed = self.stored_transposed
        return self._new(
            move(self.stored_index), move(self.stored_row_splits), self.num_points,
            None if self.stored_distance is None else move(self.stored_distance), self.width,
            None if transposed is None else transposed.to(device), self.carries_transpose
        )  # fmt: skip


def _read_only(array):
    return cpu.frozen(array) if type(array) is np.ndarray else array


new_list = Neighbors._new


def unchecked_list(*args: Any, **kwargs: Any) -> Neighbors:
    """A list of arrays that come from a pickle or a pytree; it is checked when it is first used."""
    return Neighbors._new(*args, **kwargs, is_checked=False)


def named_list(prefix: str, index: np.ndarray, row_splits: np.ndarray, num_points: int) -> Neighbors:
    """As `Neighbors`, for functions whose arguments are called `<prefix>index` and `<prefix>row_splits`."""
    return new_list(*_checked_fields(prefix, index, row_splits, num_points, None, None))


def padded_list(name: str, index: AnyArray, num_points: int) -> Neighbors:
    """As `Neighbors.from_padded`; errors speak of the matrix as `name`."""
    num_points = checks.integer("num_points", num_points, 0, checks.MAX_POINTS)
    index = checks.array(name, index, "M H", checks.INTEGERS, {})
    backend, xp = devices.backend(index), devices.namespace(index)
    row_splits = xp.empty(len(index) + 1, np.int64)
    try:
        backend.run("count_padded", padded=index, num_points=num_points, row_splits=row_splits)
        pairs = xp.empty(int(row_splits[-1]), np.int32)
        backend.run("unpad", padded=index, num_points=num_points, row_splits=row_splits, index=pairs)
    except backend.OutOfRange:
        wrong = ~(((index >= 0) & (index < num_points)) | (index == -1) | (index == num_points))
        if not wrong.any():
            raise checks.changed(name) from None
        row, column = divmod(int(wrong.argmax()), wrong.shape[1])
        raise ValueError(
            f"{name}: expected values from -1 to {num_points} to match num_points, got {int(index[row, column])} "
            f"in row {row}, column {column}"
        ) from None
    return new_list(pairs, row_splits, num_points, None, index.shape[1])


def list_for_one_call(index: np.ndarray, row_splits: np.ndarray, num_points: int, width: int | None = None,
                      transposed: tuple[np.ndarray, np.ndarray] | None = None) -> Neighbors:  # fmt: skip
    """A list over arrays that a framework passes to one call of an operator: checked, but the index is not copied.

    `transposed`: (index, row_splits) of the transpose of the list, or None.
    """
    index, row_splits = _checked_pairs("neighbors.", index, row_splits, num_points, copy=False)
    stored = None
    if transposed is not None:
        num_queries = len(row_splits) - 1
        transposed = _checked_pairs("the transpose of neighbors.", *transposed, num_queries, copy=False)
        if isinstance(index, np.ndarray):  # not on a GPU, where reading the values would wait for it
            expected, got = (num_points, int(row_splits[-1])), (len(transposed[1]) - 1, int(transposed[1][-1]))
            if expected != got:
                raise ValueError(
                    f"neighbors: expected a transpose of {expected[0]} rows and {expected[1]} pairs, got {got[0]} "
                    f"and {got[1]}"
                )
        stored = new_list(*transposed, num_queries)
    return new_list(index, row_splits, num_points, None, width, stored)


def checked(neighbors: Neighbors) -> Neighbors:
    """The list itself, checked now if it comes from a pickle or pytree; TypeError if it is no `Neighbors`."""
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors: expected kpcore.Neighbors, got {type(neighbors).__name__}")
    if not neighbors._is_checked:
        index, row_splits, distance = _numpy_arrays(neighbors)
        fields = index, row_splits, neighbors.num_points, distance, neighbors.width
        # The transpose is dropped: to check that it is the transpose of this list would take as long as to make it.
        neighbors._set(*_checked_fields("neighbors.", *fields), None, neighbors.carries_transpose)
    return neighbors


def _numpy_arrays(neighbors):
    """(index, row_splits, distance) of a list; arrays of a framework in TO_HOST are copied to NumPy."""
    names = ("index", "row_splits", "distance")
    arrays = [getattr(neighbors, f"stored_{name}") for name in names]
    for i, array in enumerate(arrays):
        for array_type, to_host in TO_HOST.items():
            if isinstance(array, array_type):
                arrays[i] = to_host(f"neighbors.{names[i]}", array)
    return arrays


def _checked_fields(prefix, index, row_splits, num_points, distance, width):
    """The fields of a list, checked; NumPy arrays are copied. Errors begin with `prefix` and the name of the field."""
    num_points = checks.integer(f"{prefix}num_points", num_points, 0, checks.MAX_POINTS)
    index, row_splits = _checked_pairs(prefix, index, row_splits, num_points, copy=True)
    if distance is not None:
        sizes = {"E": (len(index), f"{prefix}index")} | checks.device_of((f"{prefix}index", index))
        distance = checks.array(f"{prefix}distance", distance, "E", checks.REAL, sizes)
        if isinstance(distance, np.ndarray):
            distance = distance.copy()
    if width is not None:
        width = checks.integer(f"{prefix}width", width, 0)
    return index, row_splits, num_points, distance, width


def _checked_pairs(prefix, index, row_splits, num_points, copy):
    """(index as int32, row_splits as int64) of a list, checked.

    NumPy row_splits are always copied; a NumPy index if `copy` is true or it is not int32.
    """
    sizes, names = {}, (f"{prefix}index", f"{prefix}row_splits")
    index = checks.array(names[0], index, "E", checks.INTEGERS, sizes)
    row_splits = checks.array(names[1], row_splits, "M+1", checks.INTEGERS, sizes)
    backend, xp = devices.backend(index), devices.namespace(index)
    if xp is not np:  # CuPy arrays: a copy could not be made read-only, and a check of the values waits for the GPU
        if not copy and index.dtype == np.int32 and row_splits.dtype == np.int64:
            return index, row_splits
        copy = False
    copied = xp.empty(len(index), np.int32) if copy or index.dtype != np.int32 else None
    bounds = xp.empty(len(row_splits), np.int64)
    try:
        backend.run("check_list", index=index, row_splits=row_splits, num_points=num_points, checked_index=copied,
                    checked_row_splits=bounds)  # fmt: skip
    except backend.OutOfRange:
        raise _error_of_pairs(names, index, row_splits, num_points) from None
    return index if copied is None else copied, bounds


def _error_of_pairs(names, index, row_splits, num_points):
    """The error that says what is wrong with the index or the row_splits of a list; `names` are those of the two."""
    row_splits = devices.on_host(row_splits)
    try:
        _check_bounds(names[1], row_splits)
    except ValueError as error:
        return error
    used = int(row_splits[-1])
    if used > len(index):
        return ValueError(f"{names[1]}: expected a last value of at most {len(index)} to match index, got {used}")
    low, high = (int(index[:used].min()), int(index[:used].max())) if used else (0, -1)
    if low < 0 or high >= num_points:
        bad = low if low < 0 else high
        return ValueError(f"{names[0]}: expected values from 0 to {num_points - 1} to match num_points, got {bad}")
    return checks.changed(names[0])


def transposed(
    index: np.ndarray, row_splits: np.ndarray, values: np.ndarray | None, num_points: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(index, row_splits, values or None) of the transpose: the queries of each point, in rising order.

    `values`: one number for each pair, of 4 or 8 bytes, moved along to its place in the transpose.
    """
    xp = devices.namespace(index)
    # Reading row_splits[-1] on a GPU would wait for it; an index longer than that leaves an end that is not used.
    pairs = int(row_splits[-1]) if xp is np else len(index)
    queries, splits = xp.empty(pairs, np.int32), xp.empty(num_points + 1, np.int64)
    moved_values = None if values is None else xp.empty(pairs, values.dtype)
    devices.backend(index).run("transpose", index=index, row_splits=row_splits, values=values,
                               transposed_index=queries, transposed_row_splits=splits,
                               transposed_values=moved_values)  # fmt: skip
    return queries, splits, moved_values


def splits_from_counts(counts: np.ndarray) -> np.ndarray:
    """row_splits of items with `counts` rows, on the device of `counts`, which are not checked."""
    splits = devices.namespace(counts).zeros(len(counts) + 1, np.int64)
    splits[1:] = np.cumsum(counts)
    return splits


def _unpickle(index, row_splits, num_points, distance, width, carries_transpose=False):
    return unchecked_list(index, row_splits, num_points, distance, width, None, carries_transpose)


def point_sizes(neighbors: Neighbors) -> checks.Sizes:
    """The `sizes` with which `checks.array` checks a row for each point: N, and the device of the list."""
    checked(neighbors)
    return {"N": (neighbors.num_points, "neighbors")} | checks.device_of(("neighbors", neighbors.stored_index))


def checked_geometry(
    points: object, queries: object, neighbors: Neighbors, sizes: checks.Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """(points, queries) after checking that they and `neighbors` agree; `sizes` as in `checks.array`.

    If `queries` is None, the points are returned for both.
    """
    points = checks.points_array("points", points, sizes, dimensions=checks.DIMENSIONS)
    if queries is None:
        queries = points
        sizes["M"] = (len(points), "points")
    else:
        like = ("points", points)
        queries = checks.points_array("queries", queries, sizes, dimensions=checks.DIMENSIONS, like=like)
    checked(neighbors)
    if isinstance(neighbors.stored_index, np.ndarray) is not isinstance(points, np.ndarray):
        raise TypeError(
            f"neighbors: expected a list where {sizes['device'][1]} is, got one on another device; nothing is moved "
            "between devices by itself, move it with neighbors.to"
        )
    expected, got = (len(queries), len(points)), (neighbors.num_queries, neighbors.num_points)
    if expected != got:
        raise ValueError(
            f"neighbors: expected {expected[0]} queries and {expected[1]} points to match queries and points, "
            f"got {got[0]} and {got[1]}"
        )
    return points, queries


def __getattr__(name: str) -> object:
    return moved.attribute(__name__, name)
