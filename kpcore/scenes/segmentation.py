"""A scan in, the same scan out with labels."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kpcore.config import require
from kpcore.files import whole
from kpcore.scenes import voting
from kpcore.scenes.data import IGNORED, read_cloud, scene_of
from kpcore.scenes.readers import LABEL_ARRAYS, LABELS, Cloud, ReadError

_KINDS = {".las": "LAS", ".laz": "LAS", ".ply": "PLY", ".npz": "NPZ"}


class Segmented(NamedTuple):
    """What `segment` found."""

    cloud: Cloud
    classes: np.ndarray  #: (N,) numbers of classes, of the cloud's points
    counts: np.ndarray  #: (classes,) points of each
    true: np.ndarray | None  #: (N,) what the file's own labels say, IGNORED where they are of no class
    scores: dict | None  #: against those, see `voting.scores`


def check_out(source, out):
    """An error unless labels of that file can be written to this one."""
    source, out = Path(source), Path(out)
    kinds = [_KINDS.get(path.suffix.lower()) for path in (source, out)]
    if None in kinds or kinds[0] != kinds[1]:
        raise ReadError(f"{out}: labels are written to PLY, LAS, LAZ and NPZ files, of the kind of {source}")
    if not out.parent.is_dir():
        raise ReadError(f"{out}: there is no folder {out.parent}")
    if out.exists() and source.exists() and out.samefile(source):
        raise ReadError(f"{out}: expected another file than the one that is read")


def segment(model, source, out, *, votes=None, watch=None):
    """Label the points of a file, and write it with these labels; what else it holds stays as it is.

    Points that were left out (see `Cloud`) keep the label they have.
    """
    check_out(source, out)
    cloud = read_cloud(model.settings, source, labelled=False)
    values = np.array([labels[0] for labels in model.settings.data.classes.values()], np.int32)
    _filled(source, np.resize(values, len(cloud.points)), cloud.kept, model.settings.data.label)  # or an error, early
    scene = scene_of(model.settings, model.columns, cloud)
    classes = voting.labels_of(model, scene, votes, watch=watch)
    write_labels(source, out, values[classes], kept=cloud.kept, label=model.settings.data.label)
    return found(model, scene, classes)


def found(model, scene, classes):
    """`Segmented` of a scene's points."""
    counts, true, scores = np.bincount(classes, minlength=model.net.num_classes), scene.full_labels, None
    if true is not None and (true != IGNORED).any():
        scores = voting.scores(voting.confusion(true, classes, len(counts)), model.settings.names)
    return Segmented(scene.cloud, classes, counts, true, scores)


def write_labels(source, out, labels, *, kept=None, label=None):
    """Write a file again with other labels, whole or not at all.

    In the field `label`, if the file has one; else a LAS or LAZ has the field classification, and in a PLY or NPZ it is
    a new one of that name. Without `label` it is the first there is of the usual names, or a new one called label, in
    an NPZ labels. A COPC becomes a plain LAZ, as its octree says where in the file its points are.

    Parameters
    ----------
    source, out : path
    labels : (N,) integers
    kept : (n,) bool, optional
        Which of the file's points they are of; all if not given. The others keep the label they have, or 0.
    label : str, optional
    """
    check_out(source, out)
    try:
        with whole(out) as part:
            _filled(source, labels, kept, label).write(part)
    except OSError as error:
        raise ReadError(f"{out}: {error.strerror}") from None


class _Target(NamedTuple):
    """A file in memory, with the labels in it."""

    name: str
    values: np.ndarray  #: a copy, or in an NPZ the array itself
    largest: int | None  #: label, where that is not the dtype's
    write: Callable  #: takes a path; writes the file with `values`


def _filled(source, labels, kept, label):
    """The file in memory with these labels; the others stay as they are."""
    source = Path(source)
    kept = np.ones(len(labels), bool) if kept is None else kept
    try:
        target = {"LAS": _las, "PLY": _ply, "NPZ": _npz}[_KINDS[source.suffix.lower()]](source, label, len(kept))
        name, values = target.name, target.values
        if values.shape != kept.shape or values.dtype.kind not in "iuf":
            raise ReadError(f"{name} is {values.shape} {values.dtype}, not a number for each of {len(kept)} points")
        if target.largest is not None and labels.max(initial=0) > target.largest:
            raise ReadError(f"{name} has classes up to {target.largest}, got {labels.max()}, in this format")
        values[kept] = labels
        if (values[kept] != labels).any():
            raise ReadError(f"{name} is {values.dtype}, which cannot hold {labels.min()} to {labels.max()}")
    except ReadError as error:
        raise ReadError(f"{source}: {error}") from None
    return target


def _named(names, label, usual):
    """Which of a file's names, lower-case ones to their own, the labels have; None if none."""
    return next((names[one] for one in ((label.lower(),) if label else usual) if one in names), None)


def _las(source, label, num):
    laspy = require("laspy", "io")
    las = laspy.read(source, laz_backend=laspy.LazBackend.Lazrs if source.suffix.lower() == ".laz" else None)
    names = {name.lower(): name for name in las.point_format.dimension_names}
    name = _named(names, label, ()) or "classification"
    values = np.array(las[name])
    for records in (las.vlrs, las.evlrs or []):
        for record in [record for record in records if record.user_id == "copc"]:
            records.remove(record)

    def write(out):
        las[name] = values
        las.write(out, laz_backend=laspy.LazBackend.Lazrs if out.suffix.lower() == ".laz" else None)

    five_bits = name == "classification" and las.point_format.id < 6
    return _Target(name, values, 31 if five_bits else None, write)


def _ply(source, label, num):
    plyfile = require("plyfile", "io")
    ply = plyfile.PlyData.read(source)
    vertex = ply["vertex"]
    name = _named({one.lower().removeprefix("scalar_"): one for one in vertex.data.dtype.names}, label, LABELS)
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

    def write(out):
        vertex.data[name] = values
        ply.write(out)

    return _Target(name, values, None, write)


def _npz(source, label, num):
    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    name = _named({one.lower(): one for one in arrays}, label, LABEL_ARRAYS)
    if name is None:
        name = label or "labels"
        arrays[name] = np.zeros(num, np.int32)

    def write(out):
        # Not np.savez_compressed: it takes names of arrays for its own arguments, and adds to the file's name.
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            for one, array in arrays.items():
                with archive.open(f"{one}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)

    return _Target(name, arrays[name], None, write)


def draw(path, title, found, names):
    """Write a picture: the cloud by what was found, and where there are labels by those and by where they differ."""
    from kpcore import picture

    colors = picture.class_colors(len(names))
    panels = [("found", colors[found.classes])]
    if found.true is not None and found.scores:
        true = np.where(found.true == IGNORED, len(names), found.true)
        with_none = np.vstack([colors, [90, 90, 90]]).astype(np.uint8)
        right = np.where(found.true == found.classes, 0, 1)
        wrong = np.array([[96, 104, 112], [236, 64, 64]], np.uint8)[np.where(found.true == IGNORED, 0, right)]
        panels += [("labels", with_none[true]), ("where they differ", wrong)]
    subtitle = "" if not found.scores else f"mIoU {found.scores['miou']:.3f}, accuracy {found.scores['accuracy']:.3f}"
    picture.draw_classes(path, title, subtitle, found.cloud, panels, [*zip(names, colors, strict=True)])
