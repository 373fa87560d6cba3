"""Polygon files (PLY), ascii or binary."""

from __future__ import annotations

import re

import numpy as np

from kpcore.config import require
from kpcore.io.cloud import LABELS, Columns, LabelField, ReadError, first_of, from_columns, position, span


def read(path, size, asked):
    plyfile = require("plyfile", "io")
    with path.open("rb") as file:
        header = file.read(1 << 16).partition(b"end_header")[0]
    for name, count in re.findall(rb"^element\s+(\w+)\s+(\d+)", header, re.MULTILINE):
        if int(count) > size:  # plyfile allocates first and looks later
            raise ReadError(f"truncated: promises {int(count)} {name.decode()} elements in {size} bytes")
    ply = plyfile.PlyData.read(path)
    if "vertex" not in ply:
        raise ReadError("has no vertex element")
    vertex = ply["vertex"].data
    return from_columns(Columns((name, vertex[name]) for name in vertex.dtype.names), asked)


def label_field(source, label, into):
    label = into or label
    plyfile = require("plyfile", "io")
    ply = plyfile.PlyData.read(source)
    vertex = ply["vertex"]
    names = vertex.data.dtype.names
    at = position(names, label) if label else first_of(names, LABELS)
    name = None if at is None else names[at]
    if name is None:
        name = label or "label"
        wider = np.empty(len(vertex.data), [*vertex.data.dtype.descr, (name, "i4")])
        for one in vertex.data.dtype.names:
            wider[one] = vertex.data[one]
        wider[name] = 0
        properties = (*vertex.properties, plyfile.PlyProperty(name, "int"))
        new = plyfile.PlyElement("vertex", properties, len(wider), vertex.comments)
        new.data = wider
        ply.elements = [new if element.name == "vertex" else element for element in ply.elements]
        vertex = new
    values = np.array(vertex.data[name])

    def write(out, labels, kept):
        values[kept] = labels
        vertex.data[name] = values
        ply.write(out)

    return LabelField(name, len(values), *span(values.dtype), write)
