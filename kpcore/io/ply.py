"""Polygon files (PLY), ascii or binary: what each vertex has. Faces and other elements are passed over."""

from __future__ import annotations

import bisect
import re
import shutil
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    LABELS,
    Asked,
    Columns,
    Content,
    LabelField,
    ReadError,
    decoded,
    first_of,
    from_columns,
    listed,
    position,
    span,
    whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

# Not through plyfile 1.1: it refuses comments and names that are not ASCII, reads lists row by row in Python (40,000
# faces in 0.1 s), and gives a file that it writes another header than the one it read.

TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8", "int64": "i8", "uint64": "u8",  # the last two against the rules
}  # fmt: skip
ORDERS = {"ascii": None, "binary_little_endian": "<", "binary_big_endian": ">"}
HEADER = 1 << 20  #: the most bytes of a header
LIST_BLOCK = 1 << 14  #: bytes of rows with lists looked at together, so few that arrays for each byte stay in the cache
TEXT_BLOCK = 1 << 20  #: bytes of text looked at together
ROWS = 1 << 16  #: that get their labels together
COPY = 1 << 20  #: bytes copied together
LINE = 1 << 23  #: the most bytes of a line of text: a word of two takes 40 while it is looked at


class Property(NamedTuple):
    name: str
    dtype: np.dtype  #: of the number, or of the numbers of a list
    count: np.dtype | None = None  #: of the length of a list; None: one number


class Element(NamedTuple):
    name: str
    num: int
    properties: list[Property]

    @property
    def has_lists(self) -> bool:
        return any(one.count is not None for one in self.properties)

    @property
    def least(self) -> int:
        """The bytes of a binary row, its lists without numbers."""
        return sum((one.count or one.dtype).itemsize for one in self.properties)


class Header(NamedTuple):
    order: str | None  #: of the bytes of a number, as NumPy writes it; None: text
    before: list[Element]  #: the elements before the vertices
    vertex: Element
    start: int  #: where the data starts
    mark: bytes  #: the last byte of a line
    lines: int  #: how many lines the header has
    insert: int  #: where the line of one more property of the vertices goes
    line_end: bytes  #: what ends that line

    @property
    def fixed(self) -> bool:
        """Whether every vertex takes the same number of bytes."""
        return self.order is not None and not self.vertex.has_lists


def read(path: Path, size: int, asked: Asked) -> Content:
    with path.open("rb") as file:
        header = _header(file, size)
        properties, num = header.vertex.properties, header.vertex.num
        scalars = [at for at, one in enumerate(properties) if one.count is None]
        if header.fixed:
            file.seek(_vertices(file, header, size))
            # The fields of a record are numbered, as two properties may have one name.
            table = np.fromfile(file, [(str(at), one.dtype) for at, one in enumerate(properties)], num)
            columns = [table[str(at)] for at in scalars]
        else:
            columns, done = [np.empty(num, properties[at].dtype) for at in scalars], 0
            for rows in _rows(file, header, size):
                for at, column in zip(scalars, columns, strict=True):
                    column[done : done + len(rows.stops)] = rows.numbers(at)
                done += len(rows.stops)
    return from_columns(Columns(zip([properties[at].name for at in scalars], columns, strict=True)), asked)


# ---- the header


def _header(file: BinaryIO, size: int) -> Header:
    head = file.read(HEADER)
    first_end = re.search(rb"\r?\n|\r", head)
    mark = b"\r" if first_end and first_end[0] == b"\r" else b"\n"  # CR alone: as on old Macintoshes
    form, elements, at, number, insert, line_end = None, [], 0, 0, 0, mark
    while (stop := head.find(mark, at)) >= 0:
        line, at, number = head[at:stop], stop + 1, number + 1
        words = line.split()
        match words:
            case [b"ply"] if number == 1:
                pass
            case [] | [b"comment" | b"obj_info", *_]:
                pass
            case [b"format", kind, b"1.0"] if form is None and _text(kind) in ORDERS:
                form = _text(kind)
            case [b"element", name, num] if form and re.fullmatch(rb"\d{1,18}", num):
                elements.append(Element(_text(name), int(num), []))
            case [b"property", b"list", count, kind, *name] if elements and name:
                length = _dtype(count, form, number)
                if length.kind == "f" or length.itemsize == 8:
                    raise ReadError(f"line {number}: expected a list's length to be uchar or int, got {_text(count)}")
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
            insert, line_end = at, line[len(line.rstrip(b"\r")) :] + mark
    else:
        raise ReadError(f"damaged: its header does not end within {len(head)} bytes")

    names = [element.name for element in elements]
    if names.count("vertex") != 1:
        raise ReadError(f"has {names.count('vertex') or 'no'} vertex elements; there are {listed(names)}")
    vertex, order = elements[names.index("vertex")], ORDERS[form]
    if not vertex.properties:
        raise ReadError("has vertices without properties")
    left = size - at if order else size - at + 1  # the last word of a text may end it
    for element in elements:
        # A word of text takes a letter and a space or the end of its line; of a list the length is there.
        left -= element.num * (element.least if order else 2 * len(element.properties))
        if left < 0:
            raise ReadError(f"truncated: promises {element.num} {listed([element.name])} elements in {size} bytes")
    return Header(order, elements[: names.index("vertex")], vertex, at, mark, number, insert, line_end)


def _text(*words: bytes) -> str:
    """Words of a header, in UTF-8 or else Latin-1. Names of several words are against the rules, but there."""
    return decoded(b" ".join(words))


def _dtype(kind: bytes, form: str, number: int) -> np.dtype:
    if _text(kind) not in TYPES:
        raise ReadError(f"line {number}: expected a type such as float or uchar, got {_text(kind)[:60]!r}")
    return np.dtype((ORDERS[form] or "=") + TYPES[_text(kind)])


# ---- the rows of binary files


def _rows(file: BinaryIO, header: Header, size: int) -> Iterator[BinaryRows] | Iterator[TextRows]:
    """The vertices, some at a time."""
    if header.order is None:
        return _text_rows(file, header)
    return _list_rows(file, header.vertex, _vertices(file, header, size), size)


def _vertices(file: BinaryIO, header: Header, size: int) -> int:
    """Where the vertices of a binary file start."""
    at = header.start
    for element in header.before:
        if element.has_lists:
            for rows in _list_rows(file, element, at, size):
                at = rows.at + int(rows.stops[-1])
        else:
            at += element.num * element.least
    if at + header.vertex.num * header.vertex.least > size:
        raise ReadError(f"truncated: promises {header.vertex.num} vertex elements from byte {at} of {size}")
    return at


class BinaryRows(NamedTuple):
    properties: list[Property]
    at: int  #: where in the file the data starts
    data: np.ndarray  #: bytes
    places: list[np.ndarray]  #: where in the data each property of the rows is
    stops: np.ndarray  #: where in the data the rows end

    def numbers(self, at: int) -> np.ndarray:
        return _at_every_byte(self.data, self.properties[at].dtype)[self.places[at]]

    def span(self, at: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Where in the file a property starts and ends; None: one that is to come behind the others."""
        if at is None:
            return self.at + self.stops, self.at + self.stops
        return self.at + self.places[at], self.at + self.places[at] + self.properties[at].dtype.itemsize


def _list_rows(file: BinaryIO, element: Element, at: int, size: int) -> Iterator[BinaryRows]:
    """The rows of an element with lists, without Python for each: where a row would end that starts at a byte is
    computed for every byte of a block, and which bytes are reached from its first by jumps that double."""
    left, length = element.num, LIST_BLOCK
    while left:
        file.seek(at)
        data = np.fromfile(file, np.uint8, length)

        def rows_from(starts, data=data):
            return _places(element.properties, starts, len(data), lambda dtype: dtype.itemsize,
                           lambda one, places: _at_every_byte(data, one.count)[places])  # fmt: skip

        starts = np.zeros(1, np.int64)
        if len(data) >= element.least:
            if length == LIST_BLOCK:
                starts = _reached(rows_from(np.arange(len(data)))[1])[: left + 1]
            else:  # a row that is longer than a block
                stop = rows_from(starts)[1]
                starts = np.append(starts, stop[stop <= len(data)])
        if len(starts) == 1:
            if at + length >= size:
                row = f"{listed([element.name])} {element.num - left} of {element.num}"
                raise ReadError(f"truncated or damaged: {row}, at byte {at}, does not end within {size} bytes")
            length *= 2
            continue
        yield BinaryRows(element.properties, at, data, rows_from(starts[:-1])[0], starts[1:])
        at, left, length = at + int(starts[-1]), left - len(starts) + 1, LIST_BLOCK


def _at_every_byte(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The number that starts at each byte."""
    return np.ndarray(len(data) - dtype.itemsize + 1, dtype, data, strides=(1,))


def _reached(stops: np.ndarray) -> np.ndarray:
    """Where rows start that follow on each other from place 0, and where the last one ends. A row that starts at i ends
    at stops[i], or not at all if that is len(stops) + 1."""
    end = len(stops)
    jump, reached = np.append(stops, [end + 1, end + 1]), np.zeros(1, np.int64)
    while reached[-1] < end:
        reached = np.append(reached, jump[reached])
        jump = jump[jump]
    return reached[reached <= end]


def _places(properties, at, end, width, length_at):
    """Where each property is of the rows that start at these places, and where the rows end: end + 1 if beyond the end.

    Places are bytes, or words of a text: a number takes `width(dtype)` of them, and `length_at(property, places)` gives
    the length of the list that starts there.
    """
    places = []
    for one in properties:
        places.append(at)
        if one.count is None:
            at = at + width(one.dtype)
        else:
            there = at + width(one.count) <= end
            length = length_at(one, np.where(there, at, 0)).astype(np.int64)
            at = np.where(there & (length >= 0), at + width(one.count) + length * width(one.dtype), end + 1)
        at = np.minimum(at, end + 1)
    return places, at


# ---- the rows of text


class TextRows(NamedTuple):
    properties: list[Property]
    at: int  #: where in the file the text starts
    starts: np.ndarray  #: of the words in the text
    ends: np.ndarray
    values: np.ndarray  #: of the words
    places: list[np.ndarray]  #: which word each property of the rows is
    stops: np.ndarray  #: the first word behind the rows
    error: Callable[[str, int], ReadError]  #: (expected, word): of a wrong word

    def numbers(self, at: int) -> np.ndarray:
        one, values = self.properties[at], self.values[self.places[at]]
        if one.dtype.kind == "f":
            return values
        least, most = span(one.dtype if one.dtype.itemsize < 8 else values.dtype)
        right = whole(values, least, most)
        if not right.all():
            raise self.error(f"{listed([one.name])} to be whole, {least} to {most}", self.places[at][right.argmin()])
        return values

    def span(self, at: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Where in the file a property starts and ends; None: one that is to come behind the others."""
        if at is None:
            return self.at + self.ends[self.stops - 1], self.at + self.ends[self.stops - 1]
        return self.at + self.starts[self.places[at]], self.at + self.ends[self.places[at]]


def _text_rows(file: BinaryIO, header: Header) -> Iterator[TextRows]:
    """The vertices of a text: a line each, blank lines left out."""
    vertex, at, number = header.vertex, header.start, header.lines + 1
    skip, left = sum(element.num for element in header.before if element.properties), header.vertex.num
    file.seek(at)
    for text in _whole_lines(file, header.mark):
        data = np.frombuffer(text, np.uint8)
        blank = (data == 32) | (data - np.uint8(9) < 5)  # space; tab to CR
        edges = np.flatnonzero(np.diff(blank, prepend=True, append=True))
        starts, ends, marks = edges[::2], edges[1::2], np.flatnonzero(data == header.mark[0])
        lines = np.unique(np.concatenate([[0], np.searchsorted(starts, marks), [len(starts)]]))  # their first words
        passed = min(skip, len(lines) - 1)
        lines = lines[passed:][: left + 1]
        skip, left = skip - passed, left - (len(lines) - 1)
        if len(lines) > 1:
            yield _rows_of_lines(vertex, at, number, text, starts, ends, lines, marks)
        if not left:
            return
        at, number = at + len(text), number + len(marks)
    if left:
        raise ReadError(f"truncated: promises {vertex.num} vertex elements, {vertex.num - left} are there")


def _rows_of_lines(vertex, at, number, text, starts, ends, lines, marks):
    starts, ends, lines = starts[lines[0] : lines[-1]], ends[lines[0] : lines[-1]], lines - lines[0]

    def error(expected, word, got=None):
        line = number + np.searchsorted(marks, starts[word])
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
        return np.where(whole(length, 0, 2**32), length, -1)

    places, stops = _places(vertex.properties, lines[:-1], lines[1:], lambda dtype: 1, length_at)
    if (stops != lines[1:]).any():
        row = int((stops != lines[1:]).argmax())
        lists = " and those of its lists" if vertex.has_lists else ""
        raise error(f"{len(vertex.properties)} numbers{lists}", lines[row], lines[row + 1] - lines[row])
    return TextRows(vertex.properties, at, starts, ends, values, places, stops, error)


def _numbers(text: bytes) -> np.ndarray:
    """The numbers in a text; fewer than its words if one is no number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy before 2.4 warns of that word, and stops there
        try:
            return np.fromstring(text + b" 0", sep=" ")[:-1]
        except ValueError:
            return np.empty(0)


def _whole_lines(file: BinaryIO, mark: bytes) -> Iterator[bytes]:
    rest = b""
    while block := file.read(TEXT_BLOCK):
        lines, end, rest = (rest + block).rpartition(mark)
        if end:
            yield lines + end
        if len(rest) > LINE:
            raise ReadError(f"damaged: has a line of more than {LINE} bytes")
    if rest:
        yield rest


# ---- labels


def label_field(source: Path, label: str | None, into: str | None) -> LabelField:
    size = source.stat().st_size
    with source.open("rb") as file:
        header = _header(file, size)
        properties, num = header.vertex.properties, header.vertex.num
        names = [one.name for one in properties]
        label = into or label
        at = position(names, label) if label else first_of(names, LABELS)
        if at is None:
            name, dtype = label or "label", np.dtype((header.order or "=") + "i4")
            if name.split() != [name] or not name.isprintable():
                raise ReadError(f"label: expected one word as the name of a new property, got {name!r}")
        elif properties[at].count is None:
            name, dtype, _ = properties[at]
        else:
            raise ReadError(f"{names[at]} is a list for each point; label= names another property, or a new one")
        if header.fixed:
            widths = np.cumsum([0, *(one.dtype.itemsize for one in properties)])
            start = _vertices(file, header, size) + np.arange(num) * widths[-1] + widths[-1 if at is None else at]
            stop = start if at is None else start + dtype.itemsize
        else:
            spans = [rows.span(at) for rows in _rows(file, header, size)]
            start, stop = np.concatenate([np.zeros((2, 0), np.int64), *spans], axis=1)

    def write(out: Path, labels: np.ndarray, kept: np.ndarray) -> None:
        line, places, values = b"", (start[kept], stop[kept]), labels.astype(np.int64)
        if at is None:
            line, places, values = f"property int {name}".encode() + header.line_end, (start, stop), np.zeros(num, int)
            values[kept] = labels
        if header.order is None:
            words = values.astype("S")
            words = np.char.add(b" ", words) if at is None else words
            sizes = np.char.str_len(words)
        else:
            words, sizes = values.astype(dtype), np.full(len(values), dtype.itemsize)
        with source.open("rb") as file, out.open("wb") as copy:
            copy.write(file.read(header.insert) + line)
            _copy_with(file, copy, *places, words, sizes)

    return LabelField(name, num, *span(dtype), write)


def _copy_with(file, out, starts, stops, words, sizes):
    """Copy the rest of a file with the first sizes[i] bytes of words[i] in place of its bytes starts[i] to stops[i]."""
    for first in range(0, len(starts), ROWS):
        start, stop, size = (array[first : first + ROWS] for array in (starts, stops, sizes))
        for _ in range(file.tell(), start[0], COPY):
            out.write(file.read(min(COPY, start[0] - file.tell())))
        at = file.tell()
        data = np.fromfile(file, np.uint8, stop[-1] - at)
        start, stop = start - at, stop - at
        letters = words[first : first + ROWS].view(np.uint8).reshape(len(size), -1)
        width = letters.shape[1]
        if (size == width).all() and (stop - start == width).all():
            copy = data  # bytes in the place of as many, as in every binary file that has labels
            copy[start[:, None] + np.arange(width)] = letters
        else:
            more = size - (stop - start)
            place = start + np.cumsum(more) - more  # in the copy
            copy = np.empty(len(data) + int(more.sum()), np.uint8)
            inserted = _inside(place, place + size, len(copy))
            copy[inserted] = letters[np.arange(width) < size[:, None]]
            copy[~inserted] = data[~_inside(start, stop, len(data))]
        out.write(copy)
    shutil.copyfileobj(file, out)


def _inside(starts: np.ndarray, stops: np.ndarray, num: int) -> np.ndarray:
    """Which of num bytes lie between a start and a stop."""
    steps = np.zeros(num + 1, np.int8)
    steps[starts] += 1  # one that starts where another stops makes 0
    steps[stops] -= 1
    return np.cumsum(steps[:-1], dtype=np.int8) > 0
