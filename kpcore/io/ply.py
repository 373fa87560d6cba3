"""Polygon files (PLY), ascii or binary: the properties of vertices, and the faces of a mesh."""

from __future__ import annotations

import bisect
import re
import shutil
import warnings
from collections import deque
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    LABELS,
    Content,
    LabelField,
    NamedArrays,
    ReadError,
    Request,
    are_integers,
    check_columns,
    check_extra,
    decode_text,
    first_name_index,
    from_columns,
    integer_range,
    list_names,
    name_index,
    pieces_of,
)
from kpcore.io.las import check_unchanged, state_of
from kpcore.io.layout import named, of_fields, ranges, rows_at_once
from kpcore.io.layout import table as table_of_layout
from kpcore.io.table import check_new_name, filled, number_words, records

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from kpcore.io.cloud import Pieces
    from kpcore.io.layout import Layout
    from kpcore.io.table import Column, Table

# Not through plyfile 1.1: it rejects comments and names that are not ASCII, reads lists row by row in Python (40,000
# faces in 0.1 s), and changes the header of a file that it writes again.

TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8", "int64": "i8", "uint64": "u8",  # the last two are not in the specification
}  # fmt: skip
CORNERS = ("vertex_indices", "vertex_index")  #: usual names of a face's list of vertices
BYTE_ORDERS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER = 1 << 20  #: bytes
LIST_BLOCK = 1 << 14  #: bytes of rows with lists parsed at a time: arrays with an entry per byte stay in the cache
TEXT_BLOCK = 1 << 20  #: bytes of text parsed at a time
LABEL_BLOCK = 1 << 16  #: rows that get their labels at a time
COPY_BLOCK = 1 << 20  #: bytes copied at a time
MAX_LINE = 1 << 23  #: bytes of a line of text; parsing needs 20 times as much memory


class Property(NamedTuple):
    name: str
    dtype: np.dtype  #: of the number, or of each number in a list
    count: np.dtype | None = None  #: type of a list's length; None: not a list


class Element(NamedTuple):
    name: str
    num: int
    properties: list[Property]

    @property
    def has_lists(self) -> bool:
        return any(one.count is not None for one in self.properties)

    @property
    def min_row_bytes(self) -> int:
        """Bytes of a binary row whose lists are empty."""
        return sum((one.count or one.dtype).itemsize for one in self.properties)


class Header(NamedTuple):
    byte_order: str | None  #: "<" or ">"; None: text
    elements: list[Element]  #: in the file's order
    vertex: Element
    start: int  #: the byte where the data starts
    newline: bytes  #: the last byte of each line
    num_lines: int  #: of the header
    insert_at: int  #: the byte where the line of a new vertex property is inserted
    line_end: bytes  #: the bytes that end that line

    @property
    def has_fixed_rows(self) -> bool:
        """Whether every vertex takes the same number of bytes."""
        return self.byte_order is not None and not self.vertex.has_lists

    def before(self, element: Element) -> list[Element]:
        """The elements before another."""
        return self.elements[: next(at for at, one in enumerate(self.elements) if one is element)]


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    with path.open("rb") as file:
        names = tuple(one.name for one in _header(file, size).vertex.properties if one.count is None)
    check_columns(names, request)
    return names


def read(path: Path, size: int, request: Request) -> Content:
    return from_columns(NamedArrays(_columns(path, size)), request)


def _columns(path: Path, size: int) -> list[tuple[str, np.ndarray]]:
    """[(name, values)] of the properties of vertices that are not lists."""
    with path.open("rb") as file:
        header = _header(file, size)
        properties, num = header.vertex.properties, header.vertex.num
        scalars = [at for at, one in enumerate(properties) if one.count is None]
        if header.has_fixed_rows:
            file.seek(_start(file, header, header.vertex, size))
            # The fields of a record are named by their number, as two properties may have the same name.
            table = np.fromfile(file, [(str(at), one.dtype) for at, one in enumerate(properties)], num)
            columns = [table[str(at)] for at in scalars]
        else:
            columns, done = [np.empty(num, properties[at].dtype) for at in scalars], 0
            for rows in _rows(file, header, header.vertex, size):
                for at, column in zip(scalars, columns, strict=True):
                    column[done : done + len(rows.stops)] = rows.numbers(at)
                done += len(rows.stops)
    return [(properties[at].name, column) for at, column in zip(scalars, columns, strict=True)]


def read_faces(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((n, 3) float64 vertices, the number of corners of each face, the vertices at these corners)."""
    vertices = read(path, size, Request()).points.astype(np.float64)
    counts, corners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    with path.open("rb") as file:
        header = _header(file, size)
        for element in header.elements:
            at = first_name_index([one.name for one in element.properties], CORNERS)
            if element.name != "face" or at is None or element.properties[at].count is None:
                continue
            if element.properties[at].dtype.kind == "f":
                raise ReadError(f"{element.properties[at].name}: expected integers, got {element.properties[at].dtype}")
            for rows in _rows(file, header, element, size):
                count, values = rows.lists(at)
                counts.append(count)
                corners.append(values)
    return vertices, np.concatenate(counts), np.concatenate(corners)


# ---- the header


def _header(file: BinaryIO, size: int) -> Header:
    head = file.read(MAX_HEADER)
    first_end = re.search(rb"\r?\n|\r", head)
    newline = b"\r" if first_end and first_end[0] == b"\r" else b"\n"  # CR alone: old Mac OS
    form, elements, at, number, insert_at, line_end = None, [], 0, 0, 0, newline
    while (stop := head.find(newline, at)) >= 0:
        line, at, number = head[at:stop], stop + 1, number + 1
        words = line.split()
        match words:
            case [b"ply"] if number == 1:
                pass
            case [] | [b"comment" | b"obj_info", *_]:
                pass
            case [b"format", kind, b"1.0"] if form is None and _text(kind) in BYTE_ORDERS:
                form = _text(kind)
            case [b"element", name, num] if form and re.fullmatch(rb"\d{1,18}", num):
                elements.append(Element(_text(name), int(num), []))
            case [b"property", b"list", count, kind, *name] if elements and name:
                length = _dtype(count, form, number)
                if length.kind == "f" or length.itemsize == 8:
                    raise ReadError(f"line {number}: expected a list length of type uchar or int, got {_text(count)}")
                elements[-1].properties.append(Property(_text(*name), _dtype(kind, form, number), length))
            case [b"property", kind, *name] if elements and name and kind != b"list":
                elements[-1].properties.append(Property(_text(*name), _dtype(kind, form, number)))
            case [b"end_header"] if form:
                break
            case _:
                expected = "format ascii, binary_little_endian or binary_big_endian 1.0"
                if form:
                    expected = "property, element or end_header" if elements else "element NAME COUNT"
                raise ReadError(f"line {number}: expected {expected}, got {_text(line.strip())[:60]!r}")
        if words and words[0] in (b"element", b"property") and elements[-1].name == "vertex":
            insert_at, line_end = at, line[len(line.rstrip(b"\r")) :] + newline
    else:
        raise ReadError(f"damaged: expected end_header within the first {len(head)} bytes, got none")

    names = [element.name for element in elements]
    if names.count("vertex") != 1:
        raise ReadError(f"expected one element vertex, got {names.count('vertex')}; there are {list_names(names)}")
    vertex, order = elements[names.index("vertex")], BYTE_ORDERS[form]
    if not vertex.properties:
        raise ReadError("its vertices have no properties")
    bytes_left = size - at if order else size - at + 1  # in text, no space follows the last number
    for element in elements:
        # A number in text takes at least a digit and a separator; an empty list is its length.
        bytes_left -= element.num * (element.min_row_bytes if order else 2 * len(element.properties))
        if bytes_left < 0:
            raise ReadError(f"truncated: declares {element.num} {list_names([element.name])} elements in {size} bytes")
    return Header(order, elements, vertex, at, newline, number, insert_at, line_end)


def _text(*words: bytes) -> str:
    """Words of a header as text. A name of several words is not in the specification, but some files have them."""
    return decode_text(b" ".join(words))


def _dtype(kind: bytes, form: str, number: int) -> np.dtype:
    if _text(kind) not in TYPES:
        raise ReadError(f"line {number}: expected a type such as float or uchar, got {_text(kind)[:60]!r}")
    return np.dtype((BYTE_ORDERS[form] or "=") + TYPES[_text(kind)])


# ---- piece by piece


def layout(path: Path, size: int, request: Request) -> Layout:
    """The numbers of the vertices: as in the file where every vertex has as many bytes, else packed."""
    with path.open("rb") as file:
        header = _header(file, size)
        if header.has_fixed_rows:
            _start(file, header, header.vertex, size)
    scalars = [one for one in header.vertex.properties if one.count is None]
    check_columns([one.name for one in scalars], request)
    record = np.dtype([(str(at), one.dtype) for at, one in enumerate(scalars)])
    dimensions = [one._replace(name=of.name) for one, of in zip(named(record), scalars, strict=True)]
    return of_fields(header.vertex.num, record.itemsize, dimensions)


def blocks(path: Path, size: int, layout: Layout, names: Collection[str] | None = None) -> Iterator[np.ndarray]:
    """The records of a layout, (n, size) uint8, in the order of the file."""
    with path.open("rb") as file:
        header = _header(file, size)
        for records, _ in _placed_records(file, header, size, ()):
            yield records


def _placed_records(file: BinaryIO, header: Header, size: int, places: Collection[int | None]
                    ) -> Iterator[tuple[np.ndarray, dict[int | None, tuple[np.ndarray, np.ndarray]]]]:  # fmt: skip
    """(records, {place: the first and the last + 1 byte in the file}) of some vertices at a time.

    Places are those of properties, or None for the end of a vertex.
    """
    properties, num = header.vertex.properties, header.vertex.num
    scalars = [at for at, one in enumerate(properties) if one.count is None]
    record = np.dtype([(str(at), properties[at].dtype) for at in scalars])
    if header.has_fixed_rows:
        start = _start(file, header, header.vertex, size)
        widths = np.cumsum([0, *(one.dtype.itemsize for one in properties)])
        file.seek(start)
        for first, end in ranges(num, record.itemsize):
            records = np.fromfile(file, np.uint8, (end - first) * record.itemsize)
            if len(records) < (end - first) * record.itemsize:
                raise ReadError(f"truncated: ends in the vertices from {first} to {end - 1}")
            begins = start + np.arange(first, end, dtype=np.int64) * record.itemsize if places else None
            yield (
                records.reshape(end - first, record.itemsize),
                {
                    at: (begins + widths[-1 if at is None else at], begins + widths[-1 if at is None else at + 1])
                    for at in places
                },
            )
        return
    held, count, most = [], 0, rows_at_once(record.itemsize)

    def joined():
        parts, of_places = zip(*held, strict=True)
        ranges = {at: np.concatenate([one[at] for one in of_places], axis=1) for at in places}
        return np.concatenate(parts).view(np.uint8).reshape(-1, record.itemsize), ranges

    for rows in _rows(file, header, header.vertex, size):
        part = np.empty(len(rows.stops), record)
        for at in scalars:
            part[str(at)] = rows.numbers(at)
        held.append((part, {at: np.stack(rows.byte_range(at)) for at in places}))
        count += len(part)
        if count >= most:
            yield joined()
            held, count = [], 0
    if held:
        yield joined()


# ---- the rows of binary files


def _rows(file: BinaryIO, header: Header, element: Element, size: int) -> Iterator[BinaryRows] | Iterator[TextRows]:
    """The rows of an element of a text, or of one with lists of a binary file, some at a time."""
    if header.byte_order is None:
        return _text_rows(file, header, element)
    return _list_rows(file, element, _start(file, header, element, size), size)


def _start(file: BinaryIO, header: Header, element: Element, size: int) -> int:
    """The byte where the rows of an element of a binary file start."""
    at = header.start
    for earlier in header.before(element):
        if earlier.has_lists:
            for rows in _list_rows(file, earlier, at, size):
                at = rows.at + int(rows.stops[-1])
        else:
            at += earlier.num * earlier.min_row_bytes
    if at + element.num * element.min_row_bytes > size:
        raise ReadError(
            f"truncated: declares {element.num} {list_names([element.name])} elements from byte {at} of {size}"
        )
    return at


class BinaryRows(NamedTuple):
    properties: list[Property]
    at: int  #: byte of the file where the data starts
    data: np.ndarray  #: bytes
    places: list[np.ndarray]  #: for each property its first byte in the data, for each row
    stops: np.ndarray  #: the byte of the data where each row ends

    def numbers(self, at: int) -> np.ndarray:
        return _at_every_byte(self.data, self.properties[at].dtype)[self.places[at]]

    def lists(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        """(the length of each row's list, the values of all lists) of a property, as int64."""
        one, starts = self.properties[at], self.places[at]
        lengths = _at_every_byte(self.data, one.count)[starts].astype(np.int64)
        places = _within(starts + one.count.itemsize, lengths, one.dtype.itemsize)
        return lengths, _at_every_byte(self.data, one.dtype)[places].astype(np.int64)

    def byte_range(self, at: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(first, last + 1) byte in the file of a property, for each row; None: of a new property after all others."""
        if at is None:
            return self.at + self.stops, self.at + self.stops
        return self.at + self.places[at], self.at + self.places[at] + self.properties[at].dtype.itemsize


def _list_rows(file: BinaryIO, element: Element, at: int, size: int) -> Iterator[BinaryRows]:
    """The rows of an element with lists, without a Python loop over rows.

    Where a row ends depends on the list lengths in it. For every byte of a block it is computed where a row that
    started there would end; `_row_starts` then follows these ends from the first byte, which is known to start a row.
    """
    left, length = element.num, LIST_BLOCK
    while left:
        file.seek(at)
        data = np.fromfile(file, np.uint8, length)

        def rows_from(starts, data=data):
            return _places(element.properties, starts, len(data), lambda dtype: dtype.itemsize,
                           lambda one, places: _at_every_byte(data, one.count)[places])  # fmt: skip

        starts = np.zeros(1, np.int64)
        if len(data) >= element.min_row_bytes:
            if length == LIST_BLOCK:
                starts = _row_starts(rows_from(np.arange(len(data)))[1])[: left + 1]
            else:  # a row that is longer than LIST_BLOCK
                stop = rows_from(starts)[1]
                starts = np.append(starts, stop[stop <= len(data)])
        if len(starts) == 1:
            if at + length >= size:
                row = f"{list_names([element.name])} {element.num - left} of {element.num}"
                raise ReadError(f"truncated or damaged: {row}, at byte {at}, does not end within {size} bytes")
            length *= 2
            continue
        yield BinaryRows(element.properties, at, data, rows_from(starts[:-1])[0], starts[1:])
        at, left, length = at + int(starts[-1]), left - len(starts) + 1, LIST_BLOCK


def _at_every_byte(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A view with the number that starts at each byte."""
    return np.ndarray(len(data) - dtype.itemsize + 1, dtype, data, strides=(1,))


def _within(starts: np.ndarray, lengths: np.ndarray, step: int) -> np.ndarray:
    """The places of the values of lists: start, start + step and so on, for each list."""
    number = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + step * number


def _row_starts(stops: np.ndarray) -> np.ndarray:
    """The starts of consecutive rows from 0 on, followed by the end of the last one.

    A row that starts at i ends at stops[i]; len(stops) + 1 means that it does not end in this block. Pointer doubling:
    each round doubles both the rows that `jump` skips and the starts that are known.

        stops     3  .  .  5  .  7  .
        round 1   one row:   0 -> 3              starts 0, 3
        round 2   two rows:  0 -> 5, 3 -> 7      starts 0, 3, 5, end 7
    """
    end = len(stops)
    jump, reached = np.append(stops, [end + 1, end + 1]), np.zeros(1, np.int64)
    while reached[-1] < end:
        reached = np.append(reached, jump[reached])
        jump = jump[jump]
    return reached[reached <= end]


def _places(properties, at, end, width, length_at):
    """(place of each property, end) of the rows that start at `at`; end + 1 for a row that exceeds `end`.

    Places are bytes, or words of a text. A number takes `width(dtype)` of them; `length_at(property, places)` returns
    the length of the lists that start at these places.
    """
    places = []
    for one in properties:
        places.append(at)
        if one.count is None:
            at = at + width(one.dtype)
        else:
            has_length = at + width(one.count) <= end
            length = length_at(one, np.where(has_length, at, 0)).astype(np.int64)
            at = np.where(has_length & (length >= 0), at + width(one.count) + length * width(one.dtype), end + 1)
        at = np.minimum(at, end + 1)
    return places, at


# ---- the rows of text


class TextRows(NamedTuple):
    properties: list[Property]
    at: int  #: byte of the file where the text starts
    starts: np.ndarray  #: the byte of the text where each word starts
    ends: np.ndarray
    values: np.ndarray  #: the number that each word is
    places: list[np.ndarray]  #: for each property its word, for each row
    stops: np.ndarray  #: the first word after each row
    error: Callable[[str, int], ReadError]  #: error(expected, word) names the line of that word

    def numbers(self, at: int) -> np.ndarray:
        one, values = self.properties[at], self.values[self.places[at]]
        if one.dtype.kind == "f":
            return values
        smallest, largest = integer_range(one.dtype if one.dtype.itemsize < 8 else values.dtype)
        valid = are_integers(values, smallest, largest)
        if not valid.all():
            expected = f"{list_names([one.name])} to be an integer from {smallest} to {largest}"
            raise self.error(expected, self.places[at][valid.argmin()])
        return values

    def lists(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        """(the length of each row's list, the values of all lists) of a property, as int64."""
        starts = self.places[at]
        lengths = self.values[starts].astype(np.int64)
        places = _within(starts + 1, lengths, 1)
        valid = are_integers(self.values[places], *integer_range(np.int64))
        if not valid.all():
            raise self.error("the number of a vertex", places[valid.argmin()])
        return lengths, self.values[places].astype(np.int64)

    def byte_range(self, at: int | None) -> tuple[np.ndarray, np.ndarray]:
        """(first, last + 1) byte in the file of a property, for each row; None: of a new property after all others."""
        if at is None:
            return self.at + self.ends[self.stops - 1], self.at + self.ends[self.stops - 1]
        return self.at + self.starts[self.places[at]], self.at + self.ends[self.places[at]]


def _text_rows(file: BinaryIO, header: Header, element: Element) -> Iterator[TextRows]:
    """The rows of an element of a text file, one in each line; blank lines are skipped."""
    at, number = header.start, header.num_lines + 1
    skip, left = sum(earlier.num for earlier in header.before(element) if earlier.properties), element.num
    file.seek(at)
    for text in _line_blocks(file, header.newline):
        data = np.frombuffer(text, np.uint8)
        blank = (data == 32) | (data - np.uint8(9) < 5)  # space; tab to CR
        edges = np.flatnonzero(np.diff(blank, prepend=True, append=True))
        starts, ends, newlines = edges[::2], edges[1::2], np.flatnonzero(data == header.newline[0])
        lines = np.unique(np.concatenate([[0], np.searchsorted(starts, newlines), [len(starts)]]))  # first word of each
        skipped = min(skip, len(lines) - 1)
        lines = lines[skipped:][: left + 1]
        skip, left = skip - skipped, left - (len(lines) - 1)
        if len(lines) > 1:
            yield _rows_of_lines(element, at, number, text, starts, ends, lines, newlines)
        if not left:
            return
        at, number = at + len(text), number + len(newlines)
    if left:
        name = list_names([element.name])
        raise ReadError(f"truncated: expected {element.num} {name} elements, got {element.num - left}")


def _rows_of_lines(element, at, number, text, starts, ends, lines, newlines):
    """TextRows of the lines whose first words are `lines`."""
    starts, ends, lines = starts[lines[0] : lines[-1]], ends[lines[0] : lines[-1]], lines - lines[0]

    def error(expected, word, got=None):
        line = number + np.searchsorted(newlines, starts[word])
        return ReadError(
            f"line {line}: expected {expected}, got {got or repr(_text(text[starts[word] : ends[word]])[:40])}"
        )

    values = _numbers(text[starts[0] : ends[-1]])
    if len(values) < len(starts):
        wrong = bisect.bisect_left(
            range(len(starts)), True, key=lambda word: len(_numbers(text[starts[0] : ends[word]])) <= word
        )
        raise error("numbers", wrong)

    def length_at(one, places):
        length = values[places]
        return np.where(are_integers(length, 0, 2**32), length, -1)

    places, stops = _places(element.properties, lines[:-1], lines[1:], lambda dtype: 1, length_at)
    if (stops != lines[1:]).any():
        row = int((stops != lines[1:]).argmax())
        lists = " and those of its lists" if element.has_lists else ""
        raise error(f"{len(element.properties)} numbers{lists}", lines[row], lines[row + 1] - lines[row])
    return TextRows(element.properties, at, starts, ends, values, places, stops, error)


def _numbers(text: bytes) -> np.ndarray:
    """The numbers in a text, up to the first word that is not a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy before 2.4 warns of such a word and stops there
        try:
            return np.fromstring(text + b" 0", sep=" ")[:-1]
        except ValueError:
            return np.empty(0)


def _line_blocks(file: BinaryIO, newline: bytes) -> Iterator[bytes]:
    """The rest of a file in blocks that end with a line."""
    rest = b""
    while block := file.read(TEXT_BLOCK):
        lines, end, rest = (rest + block).rpartition(newline)
        if end:
            yield lines + end
        if len(rest) > MAX_LINE:
            raise ReadError(f"damaged: has a line of more than {MAX_LINE} bytes")
    if rest:
        yield rest


# ---- labels


class Edit(NamedTuple):
    """Bytes of some rows that are replaced, or inserted where `start` is `stop`."""

    start: np.ndarray  #: first byte in the file, for each of these rows
    stop: np.ndarray
    words: np.ndarray  #: (rows, w) uint8
    sizes: np.ndarray  #: the number of these bytes that are written, for each row


def label_field(source: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype]) -> LabelField:
    with source.open("rb") as file:
        size, _ = state = state_of(file)
        header = _header(file, size)
        properties, num = header.vertex.properties, header.vertex.num
        names = [one.name for one in properties]
        label = into or label
        at = name_index(names, label) if label else first_name_index(names, LABELS)
        name, dtype = label or "label", np.dtype("i4")
        if at is None:
            check_new_name("label, into", name)
        else:
            name, dtype = names[at], _number_type(properties[at])
        places = {name: at}  # of each field that is written; None: new
        for other, kind in extra.items():
            places[other] = name_index(names, other)
            if places[other] is None:
                check_new_name("extra", other)
                _type_name(other, kind)
            else:
                check_extra(names[places[other]], _number_type(properties[places[other]]), kind)
        # What is damaged is refused before long work.
        if header.has_fixed_rows:
            _start(file, header, header.vertex, size)
        else:
            deque(_rows(file, header, header.vertex, size), maxlen=0)

    def write_pieces(out: Path, pieces: Pieces) -> list[str]:
        kinds = {one: np.dtype("i4") if one == name else extra[one] for one in places}
        new = [one for one, place in places.items() if place is None]
        lines = b"".join(f"property {_type_name(one, kinds[one])} {one}".encode() + header.line_end for one in new)
        with source.open("rb") as file, source.open("rb") as rest, out.open("wb") as copy:
            check_unchanged(file, state)
            copy.write(rest.read(header.insert_at) + lines)
            first = 0
            for records, ranges in _placed_records(file, header, size, {*places.values()}):
                records.flags.writeable = False
                chosen, labels, more = pieces(first, records)
                first += len(records)
                values, added, edits = {name: labels, **more}, [], []
                for one, place in places.items():
                    if place is None:
                        kind = kinds[one]
                        added.append(_words(filled(chosen, values[one], kind), kind, header.byte_order))
                    else:
                        start, stop = ranges[place]
                        words = _words(values[one], properties[place].dtype, header.byte_order)
                        edits.append(_edit(start[chosen], stop[chosen], words))
                if added and header.byte_order:
                    edits.append(_edit(*ranges[None], np.concatenate(added, axis=1)))
                elif added:
                    separated = [word for words in added for word in (b" ", words)]
                    edits.append(_edit(*ranges[None], reduce(np.char.add, separated, b"")))
                _copy_with(rest, copy, _in_order(edits))
            shutil.copyfileobj(rest, copy)
            check_unchanged(file, state)
        return []

    def write(out: Path, labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> list[str]:
        return write_pieces(out, pieces_of(labels, kept, extra))

    return LabelField(name, num, *integer_range(dtype), write, write_pieces=write_pieces)


def _number_type(one: Property) -> np.dtype:
    if one.count is not None:
        raise ReadError(
            f"{one.name} is a list property, which cannot hold labels; name another or a new property with into="
        )
    return one.dtype


def _type_name(name: str, dtype: np.dtype) -> str:
    """The name of a type in the specification, which has no integers of 64 bits."""
    kinds = [kind for kind, code in TYPES.items() if np.dtype(code) == dtype.newbyteorder("=")]
    if kinds[0].endswith("64"):
        raise ReadError(f"{name}: expected a type of PLY, at most 32 bits for integers, got {dtype.name}")
    return kinds[0]


def _words(values: np.ndarray, dtype: np.dtype, byte_order: str | None) -> np.ndarray:
    """Numbers as they are in the file: bytes of text, or (n, w) uint8."""
    if byte_order is None:
        return values.astype("S") if values.dtype.kind in "iub" else np.array(number_words(values), "S")
    words = np.ascontiguousarray(values, dtype.newbyteorder(byte_order))
    return words.view(np.uint8).reshape(len(words), dtype.itemsize)


def _edit(start: np.ndarray, stop: np.ndarray, words: np.ndarray) -> Edit:
    if words.dtype.kind != "S":
        return Edit(start, stop, words, np.full(len(words), words.shape[1]))
    return Edit(start, stop, words.view(np.uint8).reshape(len(words), words.itemsize), np.char.str_len(words))


def _in_order(edits: list[Edit]) -> Edit:
    """All edits as one, in the order of the file."""
    if len(edits) == 1:
        return edits[0]
    width = max(edit.words.shape[1] for edit in edits)
    words = np.concatenate([np.pad(edit.words, ((0, 0), (0, width - edit.words.shape[1]))) for edit in edits])
    start, stop, sizes = (np.concatenate([edit[at] for edit in edits]) for at in (0, 1, 3))
    order = np.lexsort((stop, start))  # what is inserted where another row starts belongs to the row before
    return Edit(start[order], stop[order], words[order], sizes[order])


def _copy_with(file, out, edit):
    """Copy a file from where it is to the end of an edit of it."""
    for first in range(0, len(edit.start), LABEL_BLOCK):
        start, stop, letters, size = (array[first : first + LABEL_BLOCK] for array in edit)
        for _ in range(file.tell(), start[0], COPY_BLOCK):
            out.write(file.read(min(COPY_BLOCK, start[0] - file.tell())))
        at = file.tell()
        data = np.fromfile(file, np.uint8, stop[-1] - at)
        start, stop, width = start - at, stop - at, letters.shape[1]
        if (size == width).all() and (stop - start == width).all():
            copy = data  # nothing moves, as in every binary file that has labels
            copy[start[:, None] + np.arange(width)] = letters
        else:
            more = size - (stop - start)
            place = start + np.cumsum(more) - more  # first byte in the copy
            copy = np.empty(len(data) + int(more.sum()), np.uint8)
            inserted = _are_inside(place, place + size, len(copy))
            copy[inserted] = letters[np.arange(width) < size[:, None]]
            copy[~inserted] = data[~_are_inside(start, stop, len(data))]
        out.write(copy)


def _are_inside(starts: np.ndarray, stops: np.ndarray, num: int) -> np.ndarray:
    """True for each of `num` bytes that lies in one of the ranges."""
    steps = np.zeros(num + 1, np.int8)
    np.add.at(steps, starts, 1)  # several at one byte: an empty range, and one that ends or starts there
    np.subtract.at(steps, stops, 1)
    return np.cumsum(steps[:-1], dtype=np.int8) > 0


# ---- a new file


def table(path: Path, size: int) -> Table:
    """All columns of a file; lists and other elements are missing."""
    with path.open("rb") as file:
        header = _header(file, size)
    missing = [f"element {one.name}" for one in header.elements if one is not header.vertex and one.num]
    missing += [f"list {one.name}" for one in header.vertex.properties if one.count is not None]
    fields = layout(path, size, Request())
    return table_of_layout(fields, lambda: blocks(path, size, fields), missing)


def create(out: Path, num: int, columns: Sequence[Column], blocks: Iterable[list[np.ndarray]]) -> None:
    """Write a binary file with these properties of its vertices."""
    lines = [f"property {_type_name(one.name, one.dtype)} {one.name}" for one in columns]
    head = ["ply", "format binary_little_endian 1.0", f"element vertex {num}", *lines, "end_header", ""]
    with out.open("wb") as file:
        file.write("\n".join(head).encode())
        for arrays in blocks:
            file.write(records(columns, arrays))
