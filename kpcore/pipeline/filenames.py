"""Names of files: folders and patterns such as tiles/*.laz, in settings and on the command line, expanded in order."""

from __future__ import annotations

import glob
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpcore.files import expanded
from kpcore.pipeline.settings import Part, SettingsError, from_dict, overlap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kpcore.pipeline.settings import Settings, Source

SCANS = (".las", ".laz", ".pcd", ".ply", ".npz")  # formats of the files that a folder stands for
LISTS = ("train", "validation", "test")  # of scenes in [data]


def matching(name: str | os.PathLike[str], folder: str | os.PathLike[str] = ".") -> list[str]:
    """The files that a name stands for, sorted; relative to `folder` if the name is.

    A folder stands for the scans in it, without those in its subfolders; a pattern (``*``, ``?``, ``[...]``, and ``**``
    for folders within folders) for the files that match it. Names that begin with a dot match neither. Any other name
    stands for itself, as does one of a file that exists; whether it exists is not checked. A SettingsError if a folder
    or a pattern stands for no file.
    """
    path = expanded(name)
    full = Path(folder, path)
    if full.is_dir():
        try:
            inside = sorted(one.name for one in full.iterdir() if not one.name.startswith(".") and one.is_file())
        except OSError as error:
            raise SettingsError(f"{full}: {error.strerror}") from None
        scans = [one for one in inside if Path(one).suffix.lower() in SCANS]
        if not scans:
            formats = ", ".join(suffix[1:].upper() for suffix in SCANS)
            pattern = f"; name others by a pattern such as {path / '*'}{Path(inside[0]).suffix}" if inside else ""
            raise SettingsError(f"{full}: expected a folder of {formats} files, got none{pattern}")
        return [(path / one).as_posix() for one in scans]
    if not glob.has_magic(os.fspath(path)) or full.exists():
        return [os.fspath(name)]
    hits = (Path(one) for one in glob.glob(os.fspath(path), root_dir=folder, recursive=True))
    files = sorted({one.as_posix() for one in hits if Path(folder, one).is_file()})
    if not files:
        where = "" if path.is_absolute() else f" in the folder {Path(folder).absolute()}"
        raise SettingsError(f"{name}: expected files that match, got none{where}")
    return files


def copy_name(source: Path, format: str | None = None) -> str:
    """The name of the labelled copy of a scan in a folder; a COPC becomes a plain LAZ, as no octree is written."""
    name = source.name[:-9] + source.name[-4:] if source.name.lower().endswith(".copc.laz") else source.name
    return f"{Path(name).stem}.{format}" if format else name


def check_copies(copies: Mapping[Path, Path]) -> None:
    """Raise an error if two scans have the same copy, or if a copy would replace a scan."""
    taken: dict[str, Path] = {}
    for source, copy in copies.items():
        if (other := taken.setdefault(os.fspath(copy).casefold(), source)) is not source:
            raise SettingsError(f"{source}: its copy would be {copy}, as that of {other}")
    originals = {os.path.realpath(source) for source in copies}
    for copy in copies.values():
        if os.path.realpath(copy) in originals:
            raise SettingsError(f"--out {copy.parent}: the scan {copy} would be replaced by a copy; expected another "
                                "folder")  # fmt: skip


def single(parts: Sequence[Source], folder: str | os.PathLike[str]) -> list[Source]:
    """Parts of single files: a scene of a folder or a pattern becomes one for each of its files."""
    scenes = []
    for part in parts:
        if isinstance(part, Part) and part.file is not None:
            names = matching(part.file, folder)
            scenes += [part] if names == [part.file] else [replace(part, file=name) for name in names]
        else:
            scenes.append(part)
    return scenes


def expand(settings: Settings, folder: str | os.PathLike[str]) -> Settings:
    """Settings with scenes of single files; a SettingsError if one of them may not be where a pattern puts it."""
    changed: dict[str, Any] = {}
    for name in LISTS:
        parts = getattr(settings.data, name, None)
        if isinstance(parts, list):
            try:
                scenes = single(parts, folder)
            except SettingsError as error:
                raise SettingsError(f"[data] {name}: {error}") from None
            if scenes != parts:
                changed[name] = scenes
    if not changed:
        return settings
    # From a dict, so that all that is checked about scenes, such as what validation may hold, is checked of these.
    return from_dict(replace(settings, data=replace(settings.data, **changed)).asdict())


def listed(settings: Settings, folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """The scenes of the settings by the name of their list, with those of folders and patterns as they are now."""
    data = expand(settings, folder).data
    return {name: [str(one) for one in parts] for name in LISTS if isinstance(parts := getattr(data, name, None), list)}


def trained_and_tested(settings: Settings, folder: str | os.PathLike[str]) -> list[str]:
    """Scenes for tests that a folder or a pattern in `train` stands for too: their scores say nothing."""
    patterns = [part for part in settings.data.train if single([part], folder) != [part]]
    tests, scenes = (single(parts, folder) for parts in (settings.data.test, patterns))
    return [str(test) for test in tests if isinstance(test, Part) and any(overlap(test, one) for one in scenes)]
