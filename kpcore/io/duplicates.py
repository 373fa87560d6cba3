"""What looks wrong with the points of a file: pixels without a return, duplicates, a crowded place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kpcore.io.cloud import are_at

if TYPE_CHECKING:
    from kpcore.io.cloud import Cloud

CROWDED = 1000  # points at one place are reported if they are more: a million pairs of neighbours


def left_out(number: int, total: int) -> str:
    """Says that points are left out because they have no place."""
    return f"{_counted(number, total)} left out, as a coordinate is NaN, infinite or too large for float32"


def _counted(number: int, total: int) -> str:
    return f"{number:,} of {total:,} points ({100 * number / total:.3g} %)"


def faults(cloud: Cloud, share: float = 0.01) -> list[str]:
    """What looks wrong with the points that were read from a file, in sentences for a report or for warnings.

    Said are, with their number and share of the file's points:

    - points left out because a coordinate is NaN, infinite or too large for float32;
    - points at exactly (0, 0, 0) in the file's coordinates, as in range images where there was no return, left out or
      not; a single one only if the others are far from there (`Cloud.shift`), as objects may have the origin inside;
    - points at exactly the position of an earlier point, if they are at least `share` of all;
    - the position at which most points are, if they are more than 1,000: each of them is a neighbour of all others, so
      that 10,000 of them are 100 million pairs.

    Positions are those of the file if the cloud was read with ``exact=True``, else those of ``Cloud.points``, in
    float32, as a search compares them. This takes the time of a sort, about 0.2 s for a million points.

    Parameters
    ----------
    cloud : Cloud
    share : float
        The smallest share of duplicates that is said, from 0 to 1.

    Returns
    -------
    list of str
        Empty if there is nothing to say. The sentences have no file name and no full stop.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import numpy as np, kpcore as kp
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "scan.npy"
    >>> np.save(path, [[0, 0, 0], [0, 0, 0], [1, 2, 3], [1, 2, 3], [np.nan, 0, 0]])
    >>> for sentence in kp.io.faults(kp.io.read(path)):
    ...     print(sentence)
    1 of 5 points (20 %) left out, as a coordinate is NaN, infinite or too large for float32
    2 of 5 points (40 %) at (0, 0, 0), as pixels without a return are; drop_zeros leaves them out
    1 of 5 points (20 %) at the position of an earlier point
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {share!r}")
    total = len(cloud.points) + cloud.left_out + sum(cloud.dropped.values())

    def counted(number: int) -> str:
        return _counted(number, total)

    sentences = []
    if cloud.left_out:
        sentences.append(left_out(cloud.left_out, total))
    if dropped := cloud.dropped.get("zeros"):
        sentences.append(f"{counted(dropped)} at (0, 0, 0) left out, as pixels without a return are there")
    points, shift = (cloud.points, cloud.shift) if cloud.exact is None else (cloud.exact, np.zeros(3))
    is_zero = are_at(points, (-shift).astype(points.dtype))
    zeros = int(is_zero.sum())
    if zeros > 1 or (zeros and cloud.shift.any()):
        advice = "as pixels without a return are; drop_zeros leaves them out"
        sentences.append(f"{counted(zeros)} at (0, 0, 0), {advice}")
        points = points[~is_zero]
    if len(points):
        first, counts = distinct(points)
        duplicates = len(points) - len(first)
        if duplicates and duplicates >= share * total:
            sentences.append(f"{counted(duplicates)} at the position of an earlier point")
        fullest = int(counts.argmax())
        if counts[fullest] > CROWDED:
            place = ", ".join(f"{value:.10g}" for value in points[first[fullest]] + shift)
            sentences.append(f"{counted(int(counts[fullest]))} at one place, ({place}), all neighbours of each other")
    return sentences


def distinct(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the first point of each distinct position, number of points there) of (N, 3) points; -0.0 is 0.0.

    Sorted are words of 64 bits, a hash above the number of the point, which takes a fifth of the time of a sort by
    three coordinates. Where positions have the same hash, as one pair of a million points may, these points are then
    sorted by coordinates.
    """
    columns = [np.ascontiguousarray(points[:, axis]) + points.dtype.type(0) for axis in range(3)]
    bits = np.uint64(len(points).bit_length())
    words = np.sort(_hashes(columns) >> bits << bits | np.arange(len(points), dtype=np.uint64))
    order = (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    words >>= bits
    is_new = _differ(columns, order)
    starts_word = np.append(True, words[1:] != words[:-1])
    if (is_new & ~starts_word).any():
        run = np.cumsum(starts_word) - 1
        mixed = np.zeros(run[-1] + 1, bool)
        mixed[run[is_new & ~starts_word]] = True
        places = np.flatnonzero(mixed[run])
        some = order[places]
        order[places] = some[np.lexsort([*(values[some] for values in columns), words[places]])]
        is_new = _differ(columns, order)
    starts = np.flatnonzero(is_new)
    return order[starts], np.diff(starts, append=len(points))


def _differ(columns: list[np.ndarray], order: np.ndarray) -> np.ndarray:
    """For points in this order: True for the first, and for each at another position than the one before it."""
    is_new = np.zeros(len(order), bool)
    is_new[:1] = True
    for values in columns:
        values = values[order]
        is_new[1:] |= values[1:] != values[:-1]
    return is_new


def _hashes(columns: list[np.ndarray]) -> np.ndarray:
    """(N,) uint64, equal for equal positions: multiplied by an odd number and mixed, axis by axis."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for values in columns:
        hashes ^= values.view(np.uint32 if values.dtype == np.float32 else np.uint64)
        hashes *= np.uint64(0x9E3779B97F4A7C15)  # 2**64 divided by the golden ratio
        hashes ^= hashes >> np.uint64(29)
    return hashes
