"""Which files are one survey, by what their headers state: one reference system, one unit, side by side."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.reference import FOOT, SURVEY_FOOT
from kpcore.picture import in_one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kpcore.io import Reference
    from kpcore.io.scans import Scan

__all__ = ["Decision", "decide", "overlapping"]

LARGEST_OVERLAP = 0.2  # of the area of the smaller box; buffered tiles share a few per cent
_MOST_PAIRS = 50_000_000  # of overlapping boxes: 800 MB
_BLOCK = 4_000_000  # pairs that are compared at once: about 300 MB
# Names of systems that say nothing of where a file is.
_NAMELESS = ("", "unknown", "undefined", "unnamed", "none", "local", "userdefined", "unknownengineeringcrs")


class Decision(NamedTuple):
    """Whether files are labelled as one survey, and a sentence that says so and why."""

    together: bool
    reason: str


def decide(scans: Sequence[Scan], together: bool | None = None,
           others: Sequence[str | os.PathLike[str]] = ()) -> Decision:  # fmt: skip
    """Decide whether files are one survey, labelled as if they were one file, or labelled each by itself.

    By default they are one survey if all of these hold:

    - all are LAS, LAZ or COPC files;
    - all state the same coordinate reference system: its kind, its units of x and y and of z (to 1e-9), and its name,
      in which capitals and punctuation do not count. Files that state none are alike only if each is far from the
      origin: its largest coordinate in x or y is above 1000 and above ten times its extent. Scans near the origin may
      each have another origin;
    - no two of their boxes in x and y share 20 % or more of the area of the smaller one. A box without area, of a
      single point or of a line along an axis, shares none.

    Files without points are left out of these comparisons.

    Parameters
    ----------
    scans : sequence of `kpcore.io.scans.Scan`
        In the order in which the sentence should look for the first two that differ. A file of which the header states
        no box that can be right is no part of a survey, unless `kpcore.io.scans.measured` has made one.
    together : bool, optional
        True: one survey, whatever the names of the reference systems and the overlap. False: each by itself.
    others : sequence of str or Path
        Further files, in formats other than LAS, LAZ and COPC.

    Returns
    -------
    Decision

    Raises
    ------
    ValueError
        If there is no file; or if `together` is True, but files state different units, are in other formats, have a
        box that is no box, or two of them are one file.

    Notes
    -----
    The boxes are compared by a sweep over strips: 100,000 tiles take some seconds.

    Examples
    --------
    >>> from types import SimpleNamespace as Scan
    >>> from kpcore.io import Reference
    >>> from kpcore.pipeline import surveys
    >>> rd = Reference("EPSG:28992", "projected", 1.0, 1.0, "GeoTIFF keys")
    >>> a = Scan(path="a.laz", num_points=1000, low=(85000, 446000, 0), high=(86000, 447000, 9), reference=rd)
    >>> b = Scan(path="b.laz", num_points=2000, low=(85990, 446000, 0), high=(87000, 447000, 9), reference=rd)
    >>> surveys.decide([a, b]).reason
    '2 files, 3,000 points, are labelled as one survey (--separate labels each by itself)'
    >>> b.reference = None
    >>> surveys.decide([a, b]).reason
    'each of the 2 files is labelled by itself: a.laz states EPSG:28992 and b.laz states none (--together labels them as one survey)'
    """  # noqa: E501
    number = len(scans) + len(others)
    if number == 0:
        raise ValueError("scans: expected at least one file, got none")
    points = sum(scan.num_points for scan in scans)
    if number == 1:
        return Decision(True, "1 file" if others else f"1 file, {_counted(points, 'point')}")
    if together is False:
        return Decision(False, f"each of the {number:,} files is labelled by itself (--separate)")
    scans = [*scans]
    if together:
        _check_together(scans, others)
        difference = _different_systems(scans)
        although = f", although {difference}" if difference else ""
        one_survey = f"{number:,} files, {_counted(points, 'point')}, are labelled as one survey (--together){although}"
        return Decision(True, one_survey)
    advice = " (--together labels them as one survey)"
    difference = _other_formats(others) or _not_boxes(scans) or _different_units(scans) or _one_file_twice(scans)
    if difference:
        advice = ""  # --together would be an error
    else:
        difference = _different_systems(scans) or _near_origin(scans) or _on_each_other(scans)
    if difference:
        return Decision(False, f"each of the {number:,} files is labelled by itself: {difference}{advice}")
    one_survey = f"{number:,} files, {_counted(points, 'point')}, are labelled as one survey"
    return Decision(True, f"{one_survey} (--separate labels each by itself)")


def overlapping(scans: Sequence[Scan], touching: bool = False) -> np.ndarray:
    """Pairs of files with boxes that overlap in x and y, where points may be in both, as in buffered tiles.

    Parameters
    ----------
    scans : sequence of `kpcore.io.scans.Scan`
        Those without points overlap none.
    touching : bool
        Also those that share only a line or a point, so that the overlap has no area.

    Returns
    -------
    (n, 2) int64, positions in `scans`, the smaller first, in ascending order.

    Raises
    ------
    ValueError
        If there are more than 50 million pairs, or a box is no box.
    """
    scans = [*scans]
    if difference := _not_boxes(scans):
        raise ValueError(f"scans: expected boxes with finite low <= high, got {difference}")
    used, low, high = _boxes(scans)
    blocks, number = [np.zeros((0, 2), np.int64)], 0
    for pairs in _pairs(low, high, touching):
        number += len(pairs)
        if number > _MOST_PAIRS:
            raise ValueError(f"scans: expected at most {_MOST_PAIRS:,} pairs of boxes that overlap, got more")
        blocks.append(pairs)
    pairs = np.sort(used[np.concatenate(blocks)], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


# ---- what differs: a clause that names two files, or None


def _check_together(scans: list[Scan], others: Sequence[str | os.PathLike[str]]) -> None:
    for check, expected in (
        (lambda _: _other_formats(others), "LAS, LAZ and COPC files"),
        (_not_boxes, "boxes with finite low <= high"),
        (_different_units, "files in one unit"),
        (_one_file_twice, "each file once"),
    ):
        if difference := check(scans):
            raise ValueError(f"together: expected {expected}, got {difference}")


def _other_formats(others: Sequence[str | os.PathLike[str]]) -> str | None:
    return f"{Path(others[0]).name}, which is no LAS, LAZ or COPC file" if others else None


def _not_boxes(scans: list[Scan]) -> str | None:
    for scan in scans:
        if not scan.num_points:
            continue
        if scan.low is None or scan.high is None:
            return f"{_names(scan)[0]}, which states no box of its points that can be right"
        box = np.array([scan.low, scan.high], np.float64)
        if not (np.isfinite(box).all() and (box[0] <= box[1]).all()):
            return f"{_names(scan)[0]}, with {box[0].tolist()} to {box[1].tolist()} in its header"
    return None


def _different_units(scans: list[Scan]) -> str | None:
    """Units that both files state and that differ; what a file does not state differs from nothing here."""
    for axes, unit in (("", _horizontal), ("heights in ", lambda reference: reference and reference.vertical)):
        pair = _first_two(scans, unit, lambda a, b: a is None or b is None or _same_length(a, b))
        if pair:
            (a, b), units = _names(*pair), [_unit_words(unit(scan.reference)) for scan in pair]
            return f"{a} has {axes or 'x and y in '}{units[0]} and {b} in {units[1]}"
    return None


def _different_systems(scans: list[Scan]) -> str | None:
    pair = _first_two(scans, lambda reference: reference, _same_system, skip=False)
    if pair is None:
        return None
    (a, b), (one, other) = _names(*pair), (scan.reference for scan in pair)
    words = [_system_words(reference) for reference in (one, other)]
    if _key(one.name if one else None) == _key(other.name if other else None):
        assert one and other
        if one.kind != other.kind:
            words = [f"{name}, {reference.kind}," for name, reference in zip(words, (one, other), strict=True)]
        else:
            axis = "vertical" if _same_length(one.horizontal, other.horizontal) else "horizontal"
            units = [_unit_words(getattr(reference, axis)) for reference in (one, other)]
            words = [f"{unit} as the {axis} unit" for unit in units]
    return f"{a} states {words[0]} and {b} states {words[1]}"


def _near_origin(scans: list[Scan]) -> str | None:
    """The first two files, if none states a system and one is near the origin."""
    used, low, high = _boxes(scans)
    if len(used) < 2 or _key(_name_of(scans[used[0]].reference)):
        return None
    near = np.flatnonzero(~are_far(low, high))
    if not len(near):
        return None
    pair = sorted({0, near[0]} if near[0] else {0, 1})
    names = dict(zip(pair, _names(*(scans[i] for i in used[pair])), strict=True))
    which = names[near[0]]
    return (
        f"{' and '.join(names.values())} name no reference system, and the coordinates of {which} are near the origin"
    )


def _on_each_other(scans: list[Scan]) -> str | None:
    used, low, high = _boxes(scans)
    area = (high - low).prod(axis=1)
    for pairs in _pairs(low, high, False):
        one, other = pairs.T
        shared = np.minimum(high[one], high[other]) - np.maximum(low[one], low[other])
        share = shared.prod(axis=1) / np.minimum(area[one], area[other])
        large = np.flatnonzero(share >= LARGEST_OVERLAP)
        if len(large):
            first = large[np.lexsort(np.sort(used[pairs[large]], axis=1).T[::-1])[0]]
            a, b = _names(*(scans[i] for i in sorted(used[pairs[first]])))
            return f"the boxes of {a} and {b} overlap by {100 * share[first]:.0f} % of the smaller one"
    return None


def _one_file_twice(scans: list[Scan]) -> str | None:
    """Two paths of one file: equal, or symbolic or hard links. Only files with equal headers are looked at on disk."""
    alike, seen = defaultdict(list), {}
    for scan in scans:
        alike[(scan.num_points, *scan.low, *scan.high)].append(scan)
    for group in alike.values():
        for scan in group if len(group) > 1 else ():
            try:
                status = os.stat(scan.path)
                identity = status.st_dev, status.st_ino
            except OSError:
                identity = os.path.realpath(scan.path)
            if identity in seen:
                a, b = _names(seen[identity], scan)
                return f"{a} twice" if a == b else f"{a} and {b}, which are one file"
            seen[identity] = scan
    return None


# ---- systems and units


def _first_two(scans: list[Scan], value: Callable, same: Callable, skip: bool = True) -> tuple[Scan, Scan] | None:
    """The first file with points, and the first with another value; None if none does.

    skip : leave out files of which the value is None
    """
    first, compared = None, {}  # many files have few different references
    for scan in scans:
        if scan.num_points and scan.reference not in compared:
            compared[scan.reference] = None
            of_scan = value(scan.reference)
            if skip and of_scan is None:
                continue
            if first is None:
                first = scan, of_scan
            elif not same(first[1], of_scan):
                return first[0], scan
    return None


def _same_system(one: Reference | None, other: Reference | None) -> bool:
    if one is None or other is None:
        return not _key(_name_of(one or other)) and not _horizontal(one or other)
    return (
        one.kind == other.kind
        and _key(one.name) == _key(other.name)
        and _same_length(one.horizontal, other.horizontal)
        and _same_length(one.vertical, other.vertical)
    )


def _same_length(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isclose(one, other, rel_tol=1e-9))


def _name_of(reference: Reference | None) -> str | None:
    return None if reference is None else reference.name


def _key(name: str | None) -> str:
    """A name without capitals and punctuation: NAD83 / UTM zone 10N is NAD83_UTM_Zone_10N; empty if it says nothing."""
    key = re.sub(r"[\W_]+", "", (name or "").replace("+", "plus").casefold())
    return "" if key in _NAMELESS else key


def _horizontal(reference: Reference | None) -> float | None:
    """Metres per unit of x and y; infinite for degrees, which are no length; None if it is not stated."""
    if reference is None:
        return None
    return math.inf if reference.kind == "geographic" else reference.horizontal


def _system_words(reference: Reference | None) -> str:
    if reference is None:
        return "none"
    name = in_one_line(reference.name or "")
    return name or (f"a {reference.kind} system without a name" if reference.kind != "unknown" else "none by name")


def _unit_words(metres: float | None) -> str:
    if metres is None:
        return "nothing"
    if metres == math.inf:
        return "degrees"
    for length, words in ((1.0, "metres"), (FOOT, "feet"), (SURVEY_FOOT, "US survey feet")):
        if _same_length(metres, length):
            return words
    return f"units of {metres:.12g} m"


def _names(*scans: Scan) -> list[str]:
    """The names of files, with their folders if two are equal."""
    names = [Path(scan.path).name for scan in scans]
    return [*map(in_one_line, names if len({*names}) == len(names) else [str(Path(scan.path)) for scan in scans])]


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


# ---- boxes


def are_far(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether boxes are far from the origin, as those of projected coordinates are, and scans in a room are not.

    (n, 2) corners in x and y. The rule of `kpcore.io.Cloud.shift`: the largest coordinate is above 1000 and above ten
    times the extent.
    """
    extents, reach = (high - low).max(axis=-1), np.maximum(np.abs(low), np.abs(high)).max(axis=-1)
    return reach > np.maximum(1000.0, 10.0 * extents)


def _boxes(scans: list[Scan]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions of the files with points, (n, 2) lower and (n, 2) upper corners of their boxes in x and y)"""
    used = np.array([i for i, scan in enumerate(scans) if scan.num_points], np.int64)
    corners = [np.array([side(scans[i])[:2] for i in used], np.float64).reshape(-1, 2)
               for side in (lambda scan: scan.low, lambda scan: scan.high)]  # fmt: skip
    return used, *corners


def _pairs(low: np.ndarray, high: np.ndarray, touching: bool) -> Iterator[np.ndarray]:
    """(n, 2) pairs of boxes that overlap, each once, in blocks of at most some millions.

    The boxes are divided into strips along one axis; within a strip, a sweep along the other one finds the pairs. A
    pair is of the strip in which its overlap begins. A single sweep would compare each tile of a grid of 100,000 with
    the 316 of its column, and in a corridor along the sweep's other axis each with all.
    """
    if len(low) < 2:
        return
    across = int(np.argmax(np.ptp((low + high) / 2, axis=0)))  # the axis that is divided: the longer one
    along = 1 - across
    edges = np.unique(np.quantile(low[:, across], np.linspace(0, 1, 1 + int(math.sqrt(len(low)))), method="lower"))
    first = np.searchsorted(edges, low[:, across], "right") - 1
    last = np.searchsorted(edges, high[:, across], "right") - 1
    members = np.repeat(np.arange(len(low)), last - first + 1)
    strip = np.repeat(first, last - first + 1) + _counting(last - first + 1)
    order = np.lexsort((low[members, along], strip))
    members, strip = members[order], strip[order]
    bounds = np.searchsorted(strip, np.arange(len(edges) + 1))
    for begin, end in itertools.pairwise(bounds):
        inside = members[begin:end]
        reach = np.searchsorted(low[inside, along], high[inside, along], "right" if touching else "left")
        counts = np.maximum(reach - 1 - np.arange(len(inside)), 0)
        ends = np.cumsum(counts)
        at = 0
        while at < len(inside):  # blocks of boxes with some million candidates together, and of one box at least
            stop = max(at + 1, int(np.searchsorted(ends, (ends[at - 1] if at else 0) + _BLOCK, "right")))
            some = counts[at:stop]
            one = np.repeat(np.arange(at, stop), some)
            pairs = np.column_stack([inside[one], inside[one + 1 + _counting(some)]])
            at = stop
            begins = np.maximum(*low[pairs].transpose(1, 0, 2))
            sizes = np.minimum(*high[pairs].transpose(1, 0, 2)) - begins
            overlaps = (sizes >= 0 if touching else sizes > 0).all(axis=1)
            number = strip[begin] if len(inside) else 0
            overlaps &= np.searchsorted(edges, begins[:, across], "right") - 1 == number
            if overlaps.any():
                yield pairs[overlaps]


def _counting(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the counts, one after another."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
