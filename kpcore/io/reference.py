"""Coordinate reference systems as files state them: the kind, and the length of a unit of the coordinates.

Nothing is transformed, so this reads units alone, from the GeoTIFF keys and the well-known text (WKT) that LAS files
hold. Facts from OGC 19-008r4 (GeoTIFF 1.1), OGC 01-009 (WKT 1), OGC 18-010r7 (WKT 2), ASPRS LAS 1.4 R15, and the EPSG
registry.
"""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple

from kpcore.io.cloud import decode_text

if TYPE_CHECKING:
    from collections.abc import Iterator

FOOT, SURVEY_FOOT = 0.3048, 1200 / 3937  # metres: the international foot, and the US survey foot

# Metres per unit by EPSG code of the unit.
UNITS = {
    9001: 1.0, 9002: FOOT, 9003: SURVEY_FOOT, 9005: 0.3047972654, 9014: 6 * FOOT, 9030: 1852.0,
    9035: 5280 * SURVEY_FOOT, 9036: 1000.0, 9093: 5280 * FOOT, 9096: 3 * FOOT, 1025: 1e-3, 1033: 1e-2,
}  # fmt: skip
# Projected systems in metres, by EPSG code, (first, last): UTM on WGS 84, NAD 27, NAD 83, NAD 83 (2011), ED 50 and
# ETRS 89, MGA (Australia), and national grids. Other codes say nothing of the unit: of the state-plane systems of the
# USA one is in metres, the next in feet.
METRIC = [
    (32601, 32660), (32701, 32760), (26701, 26722), (26901, 26923), (6328, 6348), (23028, 23038), (25828, 25838),
    (28348, 28358), (7846, 7859), (3942, 3950), (31466, 31469),
    *((code, code) for code in (2056, 2154, 2180, 2193, 3006, 3035, 3067, 3301, 3310, 3346, 3395, 3812, 3857, 5070,
                                7415, 21781, 27700, 28992, 31370)),
]  # fmt: skip
# Metres per unit of vertical systems by EPSG code: NAVD 88, NGVD 29, EGM 96, EGM 2008, and national heights.
VERTICAL = {
    5703: 1.0, 8228: FOOT, 6360: SURVEY_FOOT, 7968: 1.0, 5702: SURVEY_FOOT, 5773: 1.0, 3855: 1.0,
    5701: 1.0, 5709: 1.0, 5710: 1.0, 5720: 1.0, 5728: 1.0, 5783: 1.0, 7837: 1.0, 5711: 1.0, 5941: 1.0, 5613: 1.0,
}  # fmt: skip
_SURVEY_FEET = re.compile(r"ftUS|US[ _-]?survey[ _-]?(?:foot|feet)|foot_us\b|us-ft", re.I)
_FEET = re.compile(r"\(ft\)|feet_intl|international[ _](?:foot|feet)", re.I)

# Geographic systems of two dimensions, WGS 84, NAD 83, NAD 27 and ETRS 89, which some files name as geocentric ones.
FLAT = (4326, 4269, 4267, 4258)

Kind = Literal["projected", "geographic", "geocentric", "local", "unknown"]
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("PROJCS", "PROJCRS", "PROJECTEDCRS", "DERIVEDPROJCRS"), "projected"),
    **dict.fromkeys(("GEOGCS", "GEOGCRS", "GEOGRAPHICCRS", "GEODCRS", "GEODETICCRS"), "geographic"),
    "GEOCCS": "geocentric",
    **dict.fromkeys(("LOCAL_CS", "ENGCRS", "ENGINEERINGCRS"), "local"),
}
_VERTICAL_KINDS = ("VERT_CS", "VERTCS", "VERTCRS", "VERTICALCRS")
_TOKEN = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([\[\](),])|([^\s\[\](),"]+))\s*')
_DEEPEST = 100  # brackets; a compound system has about 6


class Reference(NamedTuple):
    """The coordinate reference system that a file states: its kind, and the unit of the coordinates.

    Examples
    --------
    >>> import kpcore as kp
    >>> feet = kp.io.Reference("NAD83 / Oregon North (ft)", "projected", 0.3048, None, "WKT")
    >>> feet.horizontal
    0.3048
    """

    name: str | None
    #: geographic: x and y are degrees of longitude and latitude; local: of an engineer's site
    kind: Kind
    #: metres per unit of x and y: 0.3048 for international feet, 1200/3937 for US survey feet; None: degrees, or the
    #: file does not say
    horizontal: float | None
    vertical: float | None  #: metres per unit of z; None: the file does not say
    source: str  #: "GeoTIFF keys", "WKT", or both


# ---- well-known text


class Node(NamedTuple):
    """KEYWORD[values]"""

    keyword: str  #: in upper case
    values: list[str | float | Node]

    @property
    def nodes(self) -> list[Node]:
        return [value for value in self.values if isinstance(value, Node)]

    @property
    def name(self) -> str | None:
        return self.values[0] if self.values and isinstance(self.values[0], str) else None


class _Damaged(ValueError):
    """The text is no WKT."""


def from_wkt(text: str) -> tuple[Reference | None, str | None]:
    """(the Reference in a well-known text, of version 1 or 2 or as ESRI writes it, or None; a warning or None)."""
    text = text.partition("\0")[0].strip()
    if not text:
        return None, None
    try:
        systems = [*_single_systems(_parse(text))]
        first = next((node for node in systems if node.keyword in _KINDS), None)
        height = next((node for node in systems if node.keyword in _VERTICAL_KINDS), None)
        if first is None and height is None:
            raise _Damaged(f"it starts with {text[:20]!r}")
        kind, horizontal, vertical = ("unknown", None, None) if first is None else _units_of(first)
        if height is not None:
            vertical = _unit(height) or next(filter(None, map(_unit, _axes(height))), None)
        name = systems[0].name if len(systems) == 1 else _parse(text)[0].name
    except _Damaged as error:
        damaged = f"its coordinate reference system, in WKT, is damaged ({error}): its unit is unknown"
        return Reference(None, "unknown", None, None, "WKT"), damaged
    warning = None
    if first is not None and horizontal is None and kind != "geographic":
        warning = "its coordinate reference system, in WKT, states no one unit of x and y"
    return Reference(name, kind, horizontal, vertical, "WKT"), warning


def _parse(text: str) -> list[Node]:
    """The nodes of the text that are in no other; ESRI writes two, a horizontal and a vertical one."""
    roots: list[str | float | Node] = []
    stack, at, word = [roots], 0, None
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _Damaged(f"a quotation mark at character {at} is not closed")
        quoted, mark, bare = token.groups()
        at = token.end()
        if mark in ("[", "("):
            if word is None or len(stack) > _DEEPEST:
                raise _Damaged(f"unexpected bracket at character {at - 1}")
            values: list[str | float | Node] = []
            stack[-1][-1] = Node(word.upper(), values)
            stack.append(values)
        elif mark in ("]", ")"):
            stack.pop()
            if not stack:
                raise _Damaged(f"unexpected bracket at character {at - 1}")
        elif mark is None:
            stack[-1].append(_number_or_word(bare) if quoted is None else quoted.replace('""', '"'))
        word = bare if mark is None else None
    if len(stack) > 1:
        raise _Damaged(f"{len(stack) - 1} brackets are not closed")
    return [node for node in roots if isinstance(node, Node)]


def _number_or_word(word: str) -> str | float:
    try:
        return float(word)
    except ValueError:
        return word


def _single_systems(nodes: list[Node]) -> Iterator[Node]:
    """The systems that compound and bound ones consist of."""
    for node in nodes:
        if node.keyword in ("COMPD_CS", "COMPOUNDCRS", "BOUNDCRS", "SOURCECRS"):
            yield from _single_systems(node.nodes)
        elif node.keyword in _KINDS or node.keyword in _VERTICAL_KINDS:
            yield node


def _units_of(system: Node) -> tuple[Kind, float | None, float | None]:
    """(kind, metres per unit of x and y or None, metres per unit of z or None) of a system that is not vertical."""
    kind, common, axes = _KINDS[system.keyword], _unit(system), _axes(system)
    if kind == "geographic" and any(node.keyword == "CS" and _is(node.name, "cartesian") for node in system.nodes):
        kind = "geocentric"
    if kind == "geographic":  # `common` is an angle
        return kind, None, next((_unit(axis) for axis in axes if _is_upward(axis)), None)
    if kind == "geocentric":
        units = {common, *(_unit(axis) for axis in axes)} - {None}
        length = units.pop() if len(units) == 1 else None
        return kind, length, length
    units = {_unit(axis) or common for axis in axes if not _is_upward(axis)} or {common}
    heights = [_unit(axis) or common for axis in axes if _is_upward(axis)]
    return kind, units.pop() if len(units) == 1 else None, heights[0] if heights else None


def _axes(system: Node) -> list[Node]:
    return [node for node in system.nodes if node.keyword == "AXIS"]


def _is(value: str | float | Node | None, word: str) -> bool:
    return isinstance(value, str) and value.lower() == word


def _is_upward(axis: Node) -> bool:
    return any(_is(value, word) for value in axis.values[1:] for word in ("up", "down"))


def _unit(node: Node) -> float | None:
    """The length in metres of the unit that stands in this node itself; None if there is none, or one of no length."""
    unit = next((child for child in node.nodes if child.keyword in ("UNIT", "LENGTHUNIT")), None)
    if unit is None:
        return None
    length = unit.values[1] if len(unit.values) > 1 else None
    if not (isinstance(length, float) and 0 < length < math.inf):
        raise _Damaged(f"the unit {unit.name} has no length")
    return length


# ---- GeoTIFF keys


class Keys(NamedTuple):
    """GeoTIFF keys by the type of their values."""

    codes: dict[int, int]
    sizes: dict[int, float]
    texts: dict[int, str]


def from_keys(directory: bytes, doubles: bytes, text: bytes) -> tuple[Reference | None, str | None]:
    """(the Reference in the records 34735, 34736 and 34737 of a LAS file, or None; a warning or None)."""
    if not directory.strip(b"\0"):
        return None, None
    keys, damaged = _keys(directory, doubles, text)
    if not any(keys) and not damaged:
        return None, None
    kind = _kind(keys.codes)
    citation = keys.texts.get(3073) or keys.texts.get(1026)
    plane, _, above = (citation or "").partition(" + ")
    unknown: list[int] = []
    if kind == "geographic":
        horizontal = None
    elif kind == "geocentric":  # all such systems of EPSG are in metres
        horizontal = _key_unit(keys, 2052, 2053, unknown) or (None if unknown else 1.0)
    else:
        horizontal = _key_unit(keys, 3076, 3077, unknown)
        if horizontal is None and not unknown:
            metric = any(first <= keys.codes.get(3072, 0) <= last for first, last in METRIC)
            horizontal = 1.0 if metric else _unit_in(plane)
    vertical = horizontal if kind == "geocentric" else _key_unit(keys, 4099, None, unknown)
    if vertical is None:
        vertical = VERTICAL.get(keys.codes.get(4096, 0)) or _unit_in(keys.texts.get(4097) or above)
    code = keys.codes.get(3072 if kind == "projected" else 2048, 0)
    name = citation or keys.texts.get(2049) or (f"EPSG:{code}" if 0 < code < 32767 else None)
    warning = None
    if damaged:
        warning = "the GeoTIFF keys of its coordinate reference system are damaged: its unit may be unknown"
    elif unknown:
        warning = f"its unit has the EPSG code {unknown[0]}, which kpcore does not know"
    return Reference(name, kind, horizontal, vertical, "GeoTIFF keys"), warning


def _kind(codes: dict[int, int]) -> Kind:
    if codes.get(1024) == 3:
        return "unknown" if codes.get(2048) in FLAT else "geocentric"
    if codes.get(1024) in (1, 2):
        return "projected" if codes[1024] == 1 else "geographic"
    return "projected" if codes.get(3072) else "geographic" if codes.get(2048) else "unknown"  # undefined, or missing


def _keys(directory: bytes, doubles: bytes, text: bytes) -> tuple[Keys, bool]:
    """(the keys, whether the records are damaged)"""
    shorts = struct.unpack(f"<{len(directory) // 2}H", directory[: len(directory) // 2 * 2])
    keys = Keys({}, {}, {})
    if len(shorts) < 4 or shorts[0] != 1:
        return keys, True
    num = shorts[3]
    damaged = len(shorts) < 4 + 4 * num or (num == 0 and any(shorts[4:]))  # some writers leave the number at 0
    for at in range(4, min(4 + 4 * num, len(shorts) - 3), 4):
        key, place, count, value = shorts[at : at + 4]
        if place == 0:
            keys.codes[key] = value
        elif place == 34736 and 8 * value + 8 <= len(doubles):
            keys.sizes[key] = struct.unpack_from("<d", doubles, 8 * value)[0]
        elif place == 34737 and value + count <= len(text.rstrip(b"\0")) + 1:
            keys.texts[key] = decode_text(text[value : value + count].partition(b"\0")[0]).strip("| ")
        else:
            damaged = True
    return keys, damaged


def _key_unit(keys: Keys, key: int, size: int | None, unknown: list[int]) -> float | None:
    """Metres per unit by the key of a unit, or of its size if the unit is the file's; None if it does not say.

    A code that is in no table is appended to `unknown`.
    """
    code = keys.codes.get(key, 0)
    if code in (0, 32767):
        length = keys.sizes.get(size, 0.0) if size is not None else 0.0
        return length if 0 < length < math.inf else None
    if code not in UNITS:
        unknown.append(code)
    return UNITS.get(code)


def _unit_in(citation: str) -> float | None:
    """Feet if the text of a citation says so."""
    if _SURVEY_FEET.search(citation):
        return SURVEY_FOOT
    return FOOT if _FEET.search(citation) else None


def combined(wkt: bytes | None, keys: tuple[bytes, bytes, bytes] | None, wkt_first: bool
             ) -> tuple[Reference | None, str | None]:  # fmt: skip
    """(the Reference of a file that may hold both, or None; a warning or None).

    The one that the file declares to count (`wkt_first`) does, and the other where it is missing; but a vertical unit
    that only the other states is taken from there.
    """
    text = from_wkt(decode_text(wkt)) if wkt else (None, None)
    table = from_keys(*keys) if keys else (None, None)
    (first, warning), (second, other_warning) = (text, table) if wkt_first else (table, text)
    if first is None or second is None:
        return (second, other_warning) if first is None else (first, warning)
    if first.horizontal and second.horizontal and not math.isclose(first.horizontal, second.horizontal, rel_tol=1e-7):
        units = f"{first.horizontal:.10g} m by its {first.source}, {second.horizontal:.10g} m by its {second.source}"
        warning = warning or f"its unit of x and y is {units}; the first counts"
    if first.vertical is None and second.vertical is not None and warning is None:
        first = first._replace(vertical=second.vertical, source=f"{first.source} and {second.source}")
    return first, warning
