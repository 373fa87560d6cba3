"""Neighbour lists: the rows of a CSR matrix, one for each query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from kpcore import config, moved
from kpcore.backends import checks, cpu, devices
from kpcore.backends.devices import AnyArray

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import DTypeLike
    from scipy.sparse import csr_array
    from typing_extensions import Self

__all__ = ["Neighbors", "lengths", "row_splits"]

# What makes NumPy's arrays of a framework's, by their type, from (name, array): frameworks' modules add theirs.
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
        raise ValueError(f"lengths: expected no negative number, got {values.min()}")
    return bounds_of(values)


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


def _check_bounds(name, values):
    """An error unless they are bounds of as many rows as the last one says."""
    checks.check_splits(name, values, values[-1] if len(values) else 0, "its last value")


class Neighbors:
    """The neighbours of M queries among N points in CSR form; from and to padded matrices, pairs, sparse matrices.

    The neighbours of query ``q`` are ``index[row_splits[q]:row_splits[q + 1]]``. The order within a row is that of the
    function that made it. Frozen, compared by identity, picklable.

    Arrays of NumPy are copied, and those of the list are read-only: what was checked stays true. One that was put
    together again by something else, from a pickle or by a map over a pytree of JAX or torch, is checked when it is
    first used; of a list of JAX's arrays a method puts NumPy's in their place. CuPy's arrays cannot be made read-only:
    they are checked once and must not be changed afterwards. Annotations name NumPy's arrays for both.

    Parameters
    ----------
    index : (E,) int32 or int64
        Point numbers, 0 to ``num_points - 1``. May be longer than ``row_splits[-1]``; the rest is not used. The list
        has int32.
    row_splits : (M + 1,) int32 or int64
        Of which the list has int64.
    num_points : int
    distance : (E,) float32 or float64, optional
        True distances, never squared.
    width : int, optional
        The padded width the list came from.

    Raises
    ------
    ValueError, TypeError
        For an index outside the points, falling ``row_splits``, or other shapes or dtypes.

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

    # stored_...: the arrays themselves, for the kernels; stored_transposed is None before it is asked for, and
    # stored_leaves is what kpcore.torch makes of the list in a pytree. Users get read-only views.
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
        """A list of arrays that the library just made, which nobody else has: neither checked nor copied."""
        return object.__new__(cls)._set(*args, **kwargs)

    # What others get of NumPy's arrays is read-only, and cannot be made writable: what was checked stays true.

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
        if not self._is_checked:  # there may be no values, as while JAX traces, or nothing that makes a list
            index, row_splits = (getattr(a, "shape", a) for a in (self.stored_index, self.stored_row_splits))
            return f"Neighbors({self.num_points} points, index {index}, row_splits {row_splits}, not checked yet)"
        return f"Neighbors({self.num_queries} queries, {self.num_points} points, {self.num_pairs} pairs)"

    def __reduce__(self) -> tuple[object, ...]:
        index, row_splits, distance = _on_host(self)
        return _unpickle, (index, row_splits, self.num_points, distance, self.width, self.carries_transpose)

    @property
    def num_queries(self) -> int:
        """M."""
        return self.stored_row_splits.shape[0] - 1

    @property
    def num_pairs(self) -> int:
        """Pairs in use, ``row_splits[-1]``; on the GPU this waits for it."""
        return int(checked(self).stored_row_splits[-1])

    @property
    def counts(self) -> np.ndarray:
        """(M,) int64: neighbours of each query."""
        return np.diff(checked(self).stored_row_splits)

    def to_padded(self, width: int | None = None, fill: int | None = None, *,
                  dtype: DTypeLike = np.int32) -> np.ndarray:  # fmt: skip
        """The rows as a matrix, the form of the published code.

        Parameters
        ----------
        width : int, optional
            Columns; the longest row if not given. Longer rows lose their last entries, so cut only lists that are
            sorted by distance.
        fill : int, optional
            Written where a row has no more neighbours; ``num_points`` if not given.
        dtype : int32 or int64
            Indexing a torch tensor with a matrix takes int64.

        Returns
        -------
        (M, width) of that dtype
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
    def from_padded(cls, index: AnyArray, num_points: int) -> Self:
        """From a matrix of neighbours (M, width), int32 or int64; -1 and ``num_points`` mean none.

        The order of the columns is kept. Anything else outside the points is an error.
        """
        num_points = checks.integer("num_points", num_points, 0, checks.MAX_POINTS)
        index = checks.array("index", index, "M H", checks.INTEGERS, {})
        backend, xp = devices.backend(index), devices.namespace(index)
        row_splits = xp.empty(len(index) + 1, np.int64)
        try:
            backend.run("count_padded", padded=index, num_points=num_points, row_splits=row_splits)
            pairs = xp.empty(int(row_splits[-1]), np.int32)
            backend.run("unpad", padded=index, num_points=num_points, row_splits=row_splits, index=pairs)
        except backend.OutOfRange:
            wrong = ~(((index >= 0) & (index < num_points)) | (index == -1) | (index == num_points))
            if not wrong.any():
                raise checks.changed("index") from None
            row, column = divmod(int(wrong.argmax()), wrong.shape[1])
            raise ValueError(
                f"index: expected values from -1 to {num_points} to match num_points, got {int(index[row, column])} "
                f"in row {row}, column {column}"
            ) from None
        return cls._new(pairs, row_splits, num_points, None, index.shape[1])

    @classmethod
    def from_coo(cls, query: AnyArray, point: AnyArray, num_queries: int, num_points: int) -> Self:
        """From pairs (query, point), each (E,) int32 or int64, in any order; a row keeps the order of its pairs."""
        num_points = checks.integer("num_points", num_points, 0, checks.MAX_POINTS)
        num_queries = checks.integer("num_queries", num_queries, 0, checks.MAX_POINTS)
        sizes = {}
        query = checks.array("query", query, "E", checks.INTEGERS, sizes)
        point = checks.array("point", point, "E", checks.INTEGERS, sizes)
        for name, values, of, size in (("query", query, "num_queries", num_queries),
                                       ("point", point, "num_points", num_points)):  # fmt: skip
            if len(values) and ((low := int(values.min())) < 0 or int(values.max()) >= size):
                bad = low if low < 0 else int(values.max())
                raise ValueError(f"{name}: expected values from 0 to {size - 1} to match {of}, got {bad}")
        order = devices.namespace(query).argsort(query, kind="stable")
        splits = bounds_of(devices.namespace(query).bincount(query, minlength=num_queries))
        return cls._new(point[order].astype(np.int32), splits, num_points)

    def transpose(self) -> Neighbors:
        """The queries of each point: M and N change places. Made once and kept; rows are in rising order."""
        if checked(self).stored_transposed is None:
            index, splits, distance = transposed(
                self.stored_index, self.stored_row_splits, self.stored_distance, self.num_points
            )
            object.__setattr__(self, "stored_transposed", self._new(index, splits, self.num_queries, distance))
        return self.stored_transposed

    def with_transpose(self, carries_transpose: bool = True) -> Self:
        """This list as one that has its transpose with it where JAX or torch take it apart into arrays.

        A compiled function sees a list's arrays only. The gradient of features needs the transpose, and makes it in
        each call unless it is among them. Lists with and without it are different inputs to such a function; whether
        `transpose` was ever called makes no difference.
        """
        transposed = self.transpose() if carries_transpose else checked(self).stored_transposed
        return self._new(self.stored_index, self.stored_row_splits, self.num_points, self.stored_distance, self.width,
                         transposed, checks.boolean("carries_transpose", carries_transpose))  # fmt: skip

    def with_width(self, width: int) -> Self:
        """This list as of a padded matrix of that width."""
        width = checks.integer("width", width, 0)
        checked(self)
        return self._new(self.stored_index, self.stored_row_splits, self.num_points, self.stored_distance, width,
                         self.stored_transposed, self.carries_transpose)  # fmt: skip

    def to_sparse(self, values: AnyArray | None = None) -> csr_array:
        """A ``scipy.sparse.csr_array`` (M, N) with the given values (E,), or ones (float32).

        On the GPU a ``cupyx.scipy.sparse.csr_matrix``, which numbers its values in 32 bits.
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

        The list itself where it is there already, else a copy, with its transpose if that is known.
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
    """A list of arrays that something else put together; it is checked when it is first used."""
    return Neighbors._new(*args, **kwargs, is_checked=False)


def list_for_one_call(index: np.ndarray, row_splits: np.ndarray, num_points: int, width: int | None = None,
                      transposed: tuple[np.ndarray, np.ndarray] | None = None) -> Neighbors:  # fmt: skip
    """A list of a caller's arrays, for the time of one call: checked, but the index is not copied.

    `transposed`: the index and row_splits of its transpose, or None.
    """
    index, row_splits = _checked_pairs("neighbors.", index, row_splits, num_points, copy=False)
    stored = None
    if transposed is not None:
        num_queries = len(row_splits) - 1
        back = _checked_pairs("the transpose of neighbors.", *transposed, num_queries, copy=False)
        if isinstance(index, np.ndarray):  # a GPU would have to be waited for
            expected, got = (num_points, int(row_splits[-1])), (len(back[1]) - 1, int(back[1][-1]))
            if expected != got:
                raise ValueError(
                    f"neighbors: expected a transpose of {expected[0]} rows and {expected[1]} pairs, got {got[0]} "
                    f"and {got[1]}"
                )
        stored = new_list(*back, num_queries)
    return new_list(index, row_splits, num_points, None, width, stored)


def checked(neighbors: Neighbors) -> Neighbors:
    """The list itself, checked now if something else than the library put it together; an error if it is none."""
    if not isinstance(neighbors, Neighbors):
        raise TypeError(f"neighbors: expected kpcore.Neighbors, got {type(neighbors).__name__}")
    if not neighbors._is_checked:
        index, row_splits, distance = _on_host(neighbors)
        fields = index, row_splits, neighbors.num_points, distance, neighbors.width
        # Without the transpose, of which it would take as long to see whether it is one as to make it.
        neighbors._set(*_checked_fields("neighbors.", *fields), None, neighbors.carries_transpose)
    return neighbors


def _on_host(neighbors):
    """(index, row_splits, distance) of a list: of a framework's arrays the NumPy arrays, others as they are."""
    names = ("index", "row_splits", "distance")
    arrays = [getattr(neighbors, f"stored_{name}") for name in names]
    for at, array in enumerate(arrays):
        for kind, to_host in TO_HOST.items():
            if isinstance(array, kind):
                arrays[at] = to_host(f"neighbors.{names[at]}", array)
    return arrays


def _checked_fields(of, index, row_splits, num_points, distance, width):
    """(index, row_splits, num_points, distance, width) of a list; arrays of NumPy are copies."""
    num_points = checks.integer(f"{of}num_points", num_points, 0, checks.MAX_POINTS)
    index, row_splits = _checked_pairs(of, index, row_splits, num_points, copy=True)
    if distance is not None:
        sizes = {"E": (len(index), f"{of}index")} | checks.device_of((f"{of}index", index))
        distance = checks.array(f"{of}distance", distance, "E", checks.REAL, sizes)
        if isinstance(distance, np.ndarray):
            distance = distance.copy()
    if width is not None:
        width = checks.integer(f"{of}width", width, 0)
    return index, row_splits, num_points, distance, width


def _checked_pairs(of, index, row_splits, num_points, copy):
    """(index int32, row_splits int64) of a list; an error unless they are good.

    Of NumPy's arrays the row_splits are a copy, and the index where `copy` says so.
    """
    sizes, names = {}, (f"{of}index", f"{of}row_splits")
    index = checks.array(names[0], index, "E", checks.INTEGERS, sizes)
    row_splits = checks.array(names[1], row_splits, "M+1", checks.INTEGERS, sizes)
    backend, xp = devices.backend(index), devices.namespace(index)
    if xp is not np:  # whose arrays cannot be made read-only, and to look at which is to wait
        if not copy and index.dtype == np.int32 and row_splits.dtype == np.int64:
            return index, row_splits
        copy = False
    copied = xp.empty(len(index), np.int32) if copy or index.dtype != np.int32 else None
    bounds = xp.empty(len(row_splits), np.int64)
    try:
        backend.run("check_list", index=index, row_splits=row_splits, num_points=num_points, checked_index=copied,
                    checked_row_splits=bounds)  # fmt: skip
    except backend.OutOfRange:
        raise _wrong_pairs(names, index, row_splits, num_points) from None
    return index if copied is None else copied, bounds


def _wrong_pairs(names, index, row_splits, num_points):
    """The error for a list whose arrays are not those of one."""
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
    """(index, row_splits, values or None) of the transposed list: the queries of each point, in rising order."""
    xp = devices.namespace(index)
    pairs = int(row_splits[-1]) if xp is np else len(index)  # a GPU would have to be waited for
    back, splits = xp.empty(pairs, np.int32), xp.empty(num_points + 1, np.int64)
    moved_values = None if values is None else xp.empty(pairs, values.dtype)
    devices.backend(index).run("transpose", index=index, row_splits=row_splits, distance=values, transposed_index=back,
                               transposed_row_splits=splits, transposed_distance=moved_values)  # fmt: skip
    return back, splits, moved_values


def bounds_of(counts: np.ndarray) -> np.ndarray:
    """`row_splits` of counts that are known to be fine, where they are."""
    splits = devices.namespace(counts).zeros(len(counts) + 1, np.int64)
    splits[1:] = np.cumsum(counts)
    return splits


def _unpickle(index, row_splits, num_points, distance, width, carries_transpose=False):
    return unchecked_list(index, row_splits, num_points, distance, width, None, carries_transpose)


def sizes_of(neighbors: Neighbors) -> checks.Sizes:
    """What `checks.array` is to know of a list: how many points it has, and where they are."""
    checked(neighbors)
    return {"N": (neighbors.num_points, "neighbors")} | checks.device_of(("neighbors", neighbors.stored_index))


def geometry(
    points: object, queries: object, neighbors: Neighbors, sizes: checks.Sizes
) -> tuple[np.ndarray, np.ndarray]:
    """Points, queries (None: the points) and the list between them, checked; `sizes` as in `checks.array`."""
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
