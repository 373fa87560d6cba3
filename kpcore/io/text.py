"""Tables in text: XYZ, TXT, CSV, PTS."""

from __future__ import annotations

import io

import numpy as np

from kpcore.io.cloud import Columns, ReadError, from_columns, from_table


def read(path, size, asked):
    names, commented, skip = None, True, 0
    with path.open(encoding="utf-8-sig") as file:
        while line := file.readline(100_000):
            comment = line.startswith(("#", "//"))
            delimiter = next((mark for mark in ",;\t" if mark in line), None)
            words = [word.strip().strip('"').lower() for word in line.strip().lstrip("#/").split(delimiter)]
            if words and not comment and _is_number(words[0]):
                break
            if {"x", "y", "z"} <= set(words):
                names, commented = words, comment
            elif any(words) and not comment:
                raise ReadError(f"line {skip + 1}: expected numbers or the names x, y, z, got {line.strip()[:40]!r}")
            skip += 1
    if not line:
        raise ReadError("holds no points")
    table = numbers(path, delimiter, skip)
    if names and len(names) == table.shape[1]:
        return from_columns(Columns(zip(names, table.T, strict=True)), asked)
    if not commented:
        raise ReadError(f"names {len(names)} columns, has {table.shape[1]}")
    return from_table(table, asked)


def numbers(source, delimiter=None, skip=0, before=0):
    """The table in a file, or in a StringIO of what follows `before` lines of one, without the first `skip` lines."""
    try:
        return np.loadtxt(source, delimiter=delimiter, skiprows=skip, ndmin=2, encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise
    except ValueError:  # NumPy counts other lines, and advises its own caller
        width = None
    if isinstance(source, io.StringIO):
        source.seek(0)
    with source if isinstance(source, io.StringIO) else source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            words = [word.strip() for word in line.partition("#")[0].strip().split(delimiter)]
            if number <= skip or not any(words):
                continue
            width = width or len(words)
            if len(words) != width:
                raise ReadError(f"line {before + number}: expected {width} numbers, got {len(words)}")
            for word in words:
                if not _is_number(word):
                    raise ReadError(f"line {before + number}: expected numbers, got {word[:40]!r}")
    raise ReadError("holds no table of numbers")


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True
