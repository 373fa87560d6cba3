"""Tables in text files: XYZ, TXT, CSV and PTS."""

from __future__ import annotations

import csv
import itertools
import re
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
    decode_text,
    first_name_index,
    from_columns,
    from_table,
    integer_range,
    join_warnings,
    may_be_colors,
    name_index,
    table_names,
)
from kpcore.io.table import check_new_name, nameless, number_words, points_first, table_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TextIO

    from kpcore.io.table import Column, Table

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
ROWS = 1 << 16  # rows with new cells in memory at a time

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
    head = _head(path, encoding_of(path), request)
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
    _, table, names, warning = _parsed(path, request)
    if names is not None:
        return from_columns(NamedArrays(zip(names, table.T, strict=True)), request)
    content = from_table(table, request)
    return content._replace(warning=join_warnings(warning, content.warning))


def _parsed(path: Path, request: Request) -> tuple[Head, np.ndarray, Sequence[str] | None, str | None]:
    """(layout, table, the column names that the file has or None, a warning or None)."""
    check_lines(path)
    encoding = encoding_of(path)
    head = _head(path, encoding, request)
    table = numbers(path, encoding, head.delimiter, head.skip, head.count)
    header = _header(head, request)
    if head.trailing and np.isnan(table[:, -1]).all() and not (len(header) == table.shape[1] and header[-1]):
        table = table[:, :-1]
    width, names, warning = table.shape[1], None, None
    if _has_xyz(head.names):
        names = _names_of_line(head.names, head.delimiter, width)
    elif not request.columns:
        names, warning = _names_of_comments(head.comments, head.delimiter, width)
        if names is None and path.suffix.lower() == ".pts":
            names = _names_of_pts(table)
    return head, table, names, warning


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


def encoding_of(path: Path) -> str:
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


# ---- labels


def label_field(source: Path, label: str | None, into: str | None, extra: Mapping[str, np.dtype],
                columns: Sequence[str] | None = None) -> LabelField:  # fmt: skip
    """Text of all other columns stays as it is; a new column gets a name where the others have names."""
    request = Request(columns=None if columns is None else tuple(columns))
    head, table, stated, _ = _parsed(source, request)
    num, width = table.shape
    if stated is not None:
        check_columns(stated, request)
    elif width < 3 or (columns and len(columns) != width):
        from_table(table, request)  # says what is wrong
    names = [*(stated or columns or nameless(table))]
    label = into or label
    at = name_index(names, label) if label else first_name_index(names, LABELS)
    name = (label or "label") if at is None else names[at]
    places = {name: at, **{other: name_index(names, other) for other in extra}}  # of each field written; None: new
    new = [other for other, place in places.items() if place is None]
    for other in new:
        check_new_name("extra" if other in extra else "label, into", other)
        if set(other) & set('"#,;') or "//" in other:
            raise ReadError(f"expected a name without separators and quotes for a new column, got {other!r}")

    def write(out: Path, labels: np.ndarray, kept: np.ndarray, extra: Mapping[str, np.ndarray]) -> list[str]:
        values = {name: labels, **extra}
        comma = _has_decimal_commas(source, head)
        edits = [
            (place, row_words(values[other], kept, "", comma)) for other, place in places.items() if place is not None
        ]
        added = [row_words(values[other], kept, "0", comma) for other in new]
        encoding = encoding_of(source)
        with source.open(encoding=encoding, newline="") as file, out.open("w", encoding=encoding, newline="") as copy:
            if new and not stated:
                line = (head.delimiter or " ").join([*names, *new])
                copy.write(f"# {_as_in(encoding, line)}{_line_end(source, encoding)}")
            for _ in range(head.skip):
                line = file.readline()
                copy.write(_with_names(line, head, width, encoding, new) if new and stated else line)
            write_rows(file, copy, head.delimiter, num, width, edits, added, head.count is not None)
        return []

    return LabelField(name, num, *integer_range(np.int32), write)


def row_words(values: np.ndarray, kept: np.ndarray, other: str, comma: bool = False) -> Iterator[str]:
    """The text of a column, one for each point; `other` for points where kept is False."""
    done = 0
    for begin in range(0, len(kept), ROWS):
        keeps = kept[begin : begin + ROWS].tolist()
        chosen = iter(number_words(values[done : done + sum(keeps)]))
        done += sum(keeps)
        for keep in keeps:
            word = next(chosen) if keep else other
            yield word.replace(".", ",") if comma else word


def _as_in(encoding: str, text: str) -> str:
    """Text that has the bytes of UTF-8 in a file that is read as Latin-1, which its other bytes may not be."""
    return text.encode().decode(encoding) if encoding == "latin-1" else text


def _line_end(path: Path, encoding: str) -> str:
    with path.open(encoding=encoding, newline="") as file:
        line = file.readline()
    return line[len(line.rstrip("\r\n")) :] or "\n"


def _has_decimal_commas(path: Path, head: Head) -> bool:
    """Whether the first row has a decimal comma, so that fractions in new columns are written with it too."""
    if head.delimiter == ",":
        return False
    with path.open(encoding=encoding_of(path)) as file:
        return any("," in _uncommented(line) for line in itertools.islice(file, head.skip, head.skip + 1))


def _with_names(line: str, head: Head, width: int, encoding: str, new: Sequence[str]) -> str:
    """The line with the names of new columns, if it is the one that has the names of the others."""
    text, end = line.rstrip("\r\n"), line[len(line.rstrip("\r\n")) :]
    plain = decode_text(text.encode(encoding)) if encoding == "latin-1" else text
    words = plain.strip()
    if words.startswith(("#", "//")):
        usual = [comment for comment in head.comments if _names_of_comment(comment, head.delimiter, width)[0]]
        is_names = not _has_xyz(head.names) and words.lstrip("#/") == usual[0]
        plain_names = words.lstrip("#/")
    else:
        is_names = bool(head.names) and _uncommented(plain) == head.names
        plain_names = _uncommented(plain)
    if not is_names:
        return line
    separators = (head.delimiter, None, ",")
    separator = next(one for one in separators if len([name for name in _cells(plain_names, one) if name]) == width)
    return _appended(text, separator, [_as_in(encoding, name) for name in new], width) + end


def write_rows(file: TextIO, copy: TextIO, delimiter: str | None, num: int, width: int,
               edits: Sequence[tuple[int, Iterator[str]]],
               added: Sequence[Iterator[str]], counts: bool = False) -> None:  # fmt: skip
    """Copy the `num` rows of a table of `width` columns, with other text in some cells, and with cells at their ends.

    `edits` is [(column, texts of the rows)], "" where the cell stays as it is; `counts`: lines of one number are no
    rows. Blank lines and comments stay.
    """
    row = 0
    for line in file:
        text = line.strip()
        if not text or text.startswith(("#", "//")) or (counts and re.fullmatch(r"\d+", text, re.A)):
            copy.write(line)
            continue
        if row == num:
            raise ReadError(f"changed while it was read: had {num} points")
        body, rest = _body(line)
        changed = [(at, word) for at, words in edits if (word := next(words))]
        if changed:
            spans = _spans(body, delimiter)
            for at, word in sorted(changed, reverse=True):
                body = body[: spans[at][0]] + word + body[spans[at][1] :]
        copy.write((_appended(body, delimiter, [next(words) for words in added], width) if added else body) + rest)
        row += 1
    if row != num:
        raise ReadError(f"changed while it was read: had {num} points, has {row}")


def _body(line: str) -> tuple[str, str]:
    """(the cells of a line, the comment and line end after them)."""
    body = line.rstrip("\r\n")
    if "#" in body or "//" in body:
        masked = _WINDOWS_NAN.sub(lambda match: "n" * len(match[0]), body)
        masked = _WINDOWS_INF.sub(lambda match: "n" * len(match[0]), masked)
        if match := _COMMENT.search(masked):
            body = body[: match.start()]
    return body, line[len(body) :]


def _spans(body: str, delimiter: str | None) -> list[tuple[int, int]]:
    """(first, last + 1) character of each cell, without spaces around it."""
    if delimiter is None:
        return [match.span() for match in re.finditer(r"\S+", body)]
    marks = [match.start() for match in re.finditer(rf'"[^"]*"|({delimiter})', body) if match[1]]
    spans = []
    for low, high in zip([0, *(mark + 1 for mark in marks)], [*marks, len(body)], strict=True):
        cell = body[low:high]
        before, after = len(cell) - len(cell.lstrip()), len(cell) - len(cell.rstrip())
        spans.append((low + before, high - after) if cell.strip() else (low, high))
    return spans


def _appended(body: str, delimiter: str | None, words: Sequence[str], width: int) -> str:
    """The row of `width` cells with more: before a delimiter after the last cell, and before spaces."""
    cells = body.rstrip() if delimiter != "\t" else body.rstrip(" ")
    is_ended = delimiter and cells.endswith(delimiter) and len(_spans(cells, delimiter)) > width
    end = delimiter if is_ended else ""
    stop = len(cells) - len(end)
    return cells[:stop] + "".join(f"{delimiter or ' '}{word}" for word in words) + body[stop:]


# ---- a new file


def table(path: Path, size: int, columns: Sequence[str] | None = None) -> Table:
    """All columns of a file: of 32 or 64-bit integers if the first row has a whole number and all others are whole."""
    missing: list[str] = []

    def load() -> list[tuple[str, np.ndarray]]:
        request = Request(columns=None if columns is None else tuple(columns))
        head, numbers_of, stated, _ = _parsed(path, request)
        if stated is not None:
            check_columns(stated, request)
        else:
            from_table(numbers_of[:1000], request)  # raises an error unless it is a table of these columns
        names, encoding = [*(stated or columns or nameless(numbers_of))], encoding_of(path)
        with path.open(encoding=encoding) as file:
            first = _cells(_uncommented(next(itertools.islice(file, head.skip, None)).rstrip("\n")), head.delimiter)
        named = []
        for at, (name, values) in enumerate(zip(names, numbers_of.T, strict=True)):
            typed = values
            if re.fullmatch(r"[-+]?\d+", first[at], re.A) and name.lower() not in ("x", "y", "z"):
                if are_integers(values, *integer_range(np.int32)).all():
                    typed = values.astype(np.int32)
                elif are_integers(values, -(2.0**53) + 1, 2.0**53 - 1).all():
                    typed = values.astype(np.int64)
                elif are_integers(values, -(2.0**63), 2.0**64).all():  # float64 has rounded these
                    typed = _exact_integers(path, encoding, head, at)
                    typed = values if typed is None else typed
                    if typed is values and f"all digits of {name}" not in missing:
                        missing.append(f"all digits of {name}")
            named.append((name, typed))
        return points_first(named)

    return table_of(load, lambda names: first_name_index(names, LABELS), missing)


def _exact_integers(path: Path, encoding: str, head: Head, at: int) -> np.ndarray | None:
    for dtype in (np.int64, np.uint64):
        try:
            return np.loadtxt(path, dtype, delimiter=head.delimiter, skiprows=head.skip, usecols=at, ndmin=1,
                              encoding=encoding)  # fmt: skip
        except (ValueError, OverflowError):
            continue
    return None


def create(out: Path, num: int, columns: Sequence[Column], blocks: Iterable[list[np.ndarray]]) -> None:
    """Write a table with names in its first line, separated by commas in a CSV, else by spaces."""
    delimiter = "," if out.suffix.lower() == ".csv" else " "
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerow([one.name for one in columns])
        for arrays in blocks:
            words = zip(*(number_words(values) for values in arrays), strict=True)
            file.writelines(f"{delimiter.join(row)}\n" for row in words)
