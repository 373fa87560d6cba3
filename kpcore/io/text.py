"""Tables in text files: XYZ, TXT, CSV and PTS."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io.cloud import (
    LABELS,
    Content,
    NamedArrays,
    ReadError,
    Request,
    check_columns,
    decode_text,
    from_columns,
    from_table,
    join_warnings,
    may_be_colors,
    table_names,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# A number with a decimal point, and an empty cell, which is read as NaN.
_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf|infinity)", re.I | re.A)
_MISSING = r"(?:NA|N/A|null|none)"
_EMPTY = re.compile(f"{_MISSING}?", re.I)
# NaN and infinity as C on Windows writes them. Their # must not start a comment: 1.#IND would be read as 1.
_WINDOWS_NAN = re.compile(r"[-+]?1[.,]#(?:QNAN|SNAN|IND)\d*|[-+]?nan\(\w*\)", re.I)
_WINDOWS_INF = re.compile(r"1[.,]#INF\d*", re.I)
_COMMENT = re.compile(r"(?:#|(?:^|(?<=[\s,;]))//).*", re.M)
_COUNT = re.compile(r"^[ \t]*(\d+)[ \t]*$", re.M)
_QUOTED_DECIMAL = re.compile(r'(?<=\d),(?=\d+(?:e[-+]?\d+)? *")', re.I)  # the comma of "1,5" if the separator is one
# A comma that cannot separate thousands: 0,125 or 1234,5 or 1,25 or 1,2345.
_SURELY_DECIMAL = re.compile(r"(?<![\d,.])(?:(?:0\d*|\d{4,}),\d|\d*,(?:\d\d?|\d{4,})(?![\d,]))", re.A)
_BLOCK = 1 << 22  # characters cleaned at a time
_MAX_COMMENTS = 100  # the last comments are searched for column names
_MAX_LINE = 1 << 20  # bytes

# Words in a comment that make it column names, and words that make it a sentence.
_COLUMN_WORDS = {
    *LABELS, "r", "g", "b", "a", "red", "green", "blue", "alpha", "rgb", "i", "intensity", "reflectance", "nx", "ny",
    "nz", "t", "time", "timestamp", "gps_time", "id", "index", "instance", "ring", "row", "column", "confidence",
}  # fmt: skip
_SENTENCE_WORDS = {
    "in", "the", "of", "are", "is", "and", "as", "for", "to", "with", "all", "from", "by", "this", "file", "holds",
    "metres", "meters", "units",
}  # fmt: skip


class Head(NamedTuple):
    """The layout of a table, read from its lines up to the first row."""

    skip: int  #: number of lines before the first row
    delimiter: str | None  #: None: white space
    trailing: bool  #: whether the first row ends in a delimiter
    names: str  #: the line that names the columns, or ""
    comments: list[str]  #: the last comments, latest first
    count: int | None  #: declared number of rows (PTS)
    row: list[str]  #: the cells of the first row


def field_names(path: Path, size: int, request: Request) -> tuple[str, ...]:
    """From the lines up to the first row, which also shows whether the columns of a PTS may be r g b."""
    check_lines(path, only_first=True)
    head = _head(path, _encoding(path), request)
    row, header = head.row, _header(head, request)
    if head.trailing and not (len(header) == len(row) and header[-1]):
        row = row[:-1]
    if _has_xyz(head.names):
        names = tuple(_names_of_line(head.names, head.delimiter, len(row)))
        check_columns(names, request)
        return names
    if request.columns is None:
        names, _ = _names_of_comments(head.comments, head.delimiter, len(row))
        if names is None and path.suffix.lower() == ".pts":
            names = _names_of_pts(np.array([[float(_clean(cell, None, set()) or "nan") for cell in row]]))
        if names is not None:
            return tuple(names)
    return table_names(len(row), request)


def read(path: Path, size: int, request: Request) -> Content:
    check_lines(path)
    encoding = _encoding(path)
    head = _head(path, encoding, request)
    table = numbers(path, encoding, head.delimiter, head.skip, head.count)
    header = _header(head, request)
    if head.trailing and np.isnan(table[:, -1]).all() and not (len(header) == table.shape[1] and header[-1]):
        table = table[:, :-1]
    width, warning = table.shape[1], None
    if _has_xyz(head.names):
        names = _names_of_line(head.names, head.delimiter, width)
    elif request.columns:
        names = None
    else:
        names, warning = _names_of_comments(head.comments, head.delimiter, width)
        if names is None and path.suffix.lower() == ".pts":
            names = _names_of_pts(table)
    if names is not None:
        return from_columns(NamedArrays(zip(names, table.T, strict=True)), request)
    content = from_table(table, request)
    return content._replace(warning=join_warnings(warning, content.warning))


def _header(head: Head, request: Request) -> Sequence[str]:
    """The names of the columns in the file or in the request, as they are written; () if there are none."""
    return _cells(head.names, head.delimiter) if _has_xyz(head.names) else request.columns or ()


def check_lines(path: Path, only_first: bool = False) -> None:
    """Raise an error for a line of a megabyte or more, for which NumPy would allocate 12 times as much."""
    with path.open("rb") as file:
        while len(part := file.read(_MAX_LINE)) == _MAX_LINE:
            if b"\n" not in part and b"\r" not in part:
                raise ReadError(f"expected a row for each point, got a line of more than {_MAX_LINE} bytes")
            if only_first:
                return


def _encoding(path: Path) -> str:
    """The encoding by the byte order mark; else Latin-1, which decodes any bytes, as comments may hold anything."""
    with path.open("rb") as file:
        start = file.read(3)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig" if start == b"\xef\xbb\xbf" else "latin-1"


def _head(path: Path, encoding: str, request: Request) -> Head:
    names, comments, skip, count = "", [], 0, None
    with path.open(encoding=encoding) as file:
        for line in file:
            line = line.rstrip("\n")
            words = line.strip()
            if words.startswith(("#", "//")):
                comments = [words.lstrip("#/"), *comments[:_MAX_COMMENTS]]
            elif words:
                line = _uncommented(line)
                delimiter = _delimiter(line)
                cells = _cells(line, delimiter)
                if count is None and len(cells) == 1 and re.fullmatch(r"\d{1,18}", cells[0], re.A):
                    count = int(cells[0])
                elif _is_row(cells):
                    if delimiter == "," and re.fullmatch(r"\s*-?\d+,\d+(?:, +-?\d+,\d+)+\s*", line):
                        raise ReadError(
                            f"line {skip + 1}: its commas may be decimal marks or separators: write decimal points"
                        )
                    if encoding == "latin-1":
                        names, *comments = (decode_text(text.encode(encoding)) for text in (names, *comments))
                    return Head(skip, delimiter, delimiter is not None and not cells[-1], names, comments, count, cells)
                elif not names and (request.columns or _has_xyz(line)):
                    names = line
                else:
                    expected = "numbers" if names else "numbers or the names x, y, z"
                    raise ReadError(f"line {skip + 1}: expected {expected}, got {words[:40]!r}")
            skip += 1
    raise ReadError("holds no points")


def _delimiter(line: str) -> str | None:
    """The separator of a row; None for white space."""
    for mark in ";\t,":
        if mark in line and not any(len(cell.split()) > 1 for cell in line.split(mark)):
            return mark
    return None


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return [cell.strip('"') for cell in line.split()]
    quoted = '"' in line
    cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True)) if quoted else line.split(delimiter)
    return [cell.strip() for cell in cells]


def _is_row(cells: list[str]) -> bool:
    """Whether all cells are numbers or empty, and at least one is a number."""
    return any(map(_is_number, cells)) and all(_is_number(cell) or _EMPTY.fullmatch(cell) for cell in cells)


def _is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell.replace(",", ".", 1)) is not None


def _has_xyz(line: str) -> bool:
    return {"x", "y", "z"} <= {word.strip('"').lower() for word in re.split(r"[\s,;]+", line)}


def _names_of_line(line: str, delimiter: str | None, width: int) -> list[str]:
    for separator in (delimiter, None, ","):
        names = _cells(line, separator)
        names = names[:-1] if len(names) == width + 1 and not names[-1] else names
        if len(names) == width:
            return names
    num = len(_cells(line, delimiter))
    commas = ": are its decimal marks commas?" if delimiter == "," and width == 2 * num else ""
    raise ReadError(f"names {num} columns, but its rows have {width}{commas}")


def _names_of_comments(comments: list[str], delimiter: str | None, width: int) -> tuple[list[str] | None, str | None]:
    """(names or None, a warning or None), from the last comment that can only be column names."""
    parsed = [_names_of_comment(comment, delimiter, width) for comment in comments]
    names = next((names for names, _ in parsed if names), None)
    return names, None if names else next((warning for _, warning in parsed if warning), None)


def _names_of_comment(comment: str, delimiter: str | None, width: int) -> tuple[list[str] | None, str | None]:
    """(names or None, a warning or None): there must be a name for each column, and no word of a sentence."""
    for separator in dict.fromkeys((delimiter, None, ",")):
        names = _cells(comment, separator)
        words = [name.lower() for name in names]
        if len(words) != width or len({*words}) < width or not {"x", "y", "z"} <= {*words}:
            continue
        if _SENTENCE_WORDS & {*words} or not all(name.isidentifier() or (name and separator) for name in names):
            continue
        if words[:3] == ["x", "y", "z"] or {*words} - {"x", "y", "z"} <= _COLUMN_WORDS:
            return names, None
        return None, (f"the comment {comment.strip()[:60]!r} may name its columns, but the first three were read as "
                      "x y z: name the columns with columns=")  # fmt: skip
    return None, None


def _names_of_pts(table: np.ndarray) -> tuple[str, ...] | None:
    """Column names of a PTS: x y z intensity, or these and r g b; None if the table fits neither."""
    width, last = table.shape[1], table[:, -3:]
    if width == 4:
        return ("x", "y", "z", "intensity")
    if width in (6, 7) and (may_be_colors(last) or not last.any()):
        return ("x", "y", "z", *["intensity"] * (width == 7), "r", "g", "b")
    return None


def numbers(path: Path, encoding: str = "latin-1", delimiter: str | None = None, skip: int = 0,
            count: int | None = None) -> np.ndarray:  # fmt: skip
    """The (N, columns) float64 table in a file after `skip` lines; an error unless it has `count` rows.

    Empty cells, NA, N/A, null and none are NaN.
    """
    try:  # comments=None: `_cleaned_numbers` removes them, as NumPy takes 1.#IND for a 1 and a comment
        table = np.loadtxt(path, delimiter=delimiter, skiprows=skip, ndmin=2, encoding=encoding, comments=None)
    except UnicodeDecodeError:
        raise
    except ValueError:
        return _cleaned_numbers(path, encoding, delimiter, skip, count)
    if count is not None and len(table) != count:
        raise ReadError(f"declares {count} points, holds {len(table)}")
    return table


def _cleaned_numbers(path: Path, encoding: str, delimiter: str | None, skip: int, count: int | None) -> np.ndarray:
    """The table of a file that `numpy.loadtxt` can only read after `_clean`."""
    tables, width, expected, num, marks = [], None, count, 0, set()
    with path.open(encoding=encoding) as file:
        for _ in range(skip):
            file.readline()
        while block := file.read(_BLOCK):
            block += file.readline()
            for at, piece in enumerate([block] if count is None else _COUNT.split(block)):
                if at % 2:  # a PTS of several scans: the count of the next one
                    if num != expected:
                        raise ReadError(f"line {skip + 1}: expected {expected} points before the next count, got {num}")
                    expected, num = int(piece[:18]), 0
                    continue
                lines = [line for line in _clean(piece, delimiter, marks).split("\n") if line and not line.isspace()]
                if lines:
                    try:
                        table = np.loadtxt(lines, delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
                    except ValueError:  # the message of NumPy has other line numbers and advice for its caller
                        table = None
                    if table is None or table.shape[1] != (width or table.shape[1]):
                        raise ReadError(_first_error(piece, delimiter, width, skip))
                    tables.append(table)
                    width, num = table.shape[1], num + len(table)
                skip += piece.count("\n")
    if count is not None and num != expected:
        raise ReadError(f"declares {expected} points, holds {num}")
    if "comma" in marks and "point" in marks:
        raise ReadError("has both decimal points and decimal commas: write decimal points")
    if "comma" in marks and "decimal" not in marks:
        raise ReadError("its commas may be decimal marks or thousands separators: write decimal points")
    return np.concatenate(tables) if tables else np.empty((0, 0))


def _clean(text: str, delimiter: str | None, marks: set[str]) -> str:
    """Lines changed so that `numpy.loadtxt` can read them.

    Adds to `marks` "point" and "comma" if the text has these, and "decimal" if a comma must be a decimal mark.
    """
    text = _uncommented(text)
    if "." in text:
        marks.add("point")
    if '"' in text and delimiter:
        text = re.sub('(?<=") +| +(?=")', "", text).replace('""', "")
        if delimiter == "," and _QUOTED_DECIMAL.search(text):
            quoted = re.findall(r'"[-+]?(\d+,\d+)', text)
            marks |= {"comma", "decimal"} if any(map(_SURELY_DECIMAL.match, quoted)) else {"comma"}
            text = _QUOTED_DECIMAL.sub(".", text)
    if delimiter != "," and "," in text:
        marks |= {"comma", "decimal"} if _SURELY_DECIMAL.search(text) else {"comma"}
        text = text.replace(",", ".")
    if "n" in text or "N" in text:
        other = rf"[^\s{delimiter or ''}]"
        text = re.sub(rf"(?<!{other}){_MISSING}(?!{other})", "nan", text, flags=re.I)
    if delimiter:
        text = re.sub(rf"^ *(?={delimiter})|(?<={delimiter}) *(?={delimiter}|$)", "nan", text, flags=re.M)
    return text


def _uncommented(text: str) -> str:
    if "#" in text or "(" in text:
        text = _WINDOWS_INF.sub("inf", _WINDOWS_NAN.sub("nan", text))
    return _COMMENT.sub("", text) if "#" in text or "//" in text else text


def _first_error(text: str, delimiter: str | None, width: int | None, before: int) -> str:
    """The error message for the first wrong line in a text that follows `before` other lines."""
    for number, line in enumerate(text.split("\n"), before + 1):
        cells = _cells(_uncommented(line), delimiter)
        if not any(cells):
            continue
        width = width or len(cells)
        if len(cells) != width:
            return f"line {number}: expected {width} numbers, got {len(cells)}"
        for cell in cells:
            if not (_is_number(cell) or _EMPTY.fullmatch(cell)):
                return f"line {number}: expected numbers, got {cell[:40]!r}"
    return "does not hold a table of numbers"
