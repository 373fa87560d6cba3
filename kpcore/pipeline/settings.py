"""Settings of a training from a TOML file: data, network, training and blocks; all names and values are checked.

The tables of the file are the dataclasses of sections.py; docs/settings.md has every key.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kpcore import nn
from kpcore.config import require
from kpcore.pipeline.sections import (
    COMPUTED_FEATURES,
    FLAGS,
    LENGTHS,
    OPTIONS,
    SOURCES,
    SURFACE_FEATURES,
    Architecture,
    Blocks,
    Data,
    Digits,
    Ground,
    Key,
    Objects,
    Part,
    Source,
    Surface,
    Training,
    keys,
)
from kpcore.scenes import CATEGORIES, PART_LABELS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from types import ModuleType

__all__ = [
    "COMPUTED_FEATURES", "FLAGS", "LENGTHS", "SURFACE_FEATURES", "Architecture", "Blocks", "Data", "Digits",
    "Ground", "Objects", "Part", "Settings", "SettingsError", "Source", "Surface", "Training", "bounds_text",
    "from_dict", "near", "read_settings", "toml_parser",
]  # fmt: skip

_UTF_16_MARKS, _MAX_BYTES = (b"\xff\xfe", b"\xfe\xff"), 2**24
_MOST_NAME_BYTES = 200  # file systems take names of up to 255 bytes
_LABEL_RANGE = (-(2**31), 2**31 - 1)
_ONLY_KPCONV = ("levels", "convs", "deformable", "resampled", "upsample")
_SUBTABLES = ("classes", "colors", "ground", "surface")  # of [data]
_MOST_ALIKE, _ALIKE = 0.75, 0.6  # of names for advice, see difflib: in other tables, in the same one

Section = TypeVar("Section")  # one of the dataclasses of sections.py


class SettingsError(ValueError):
    """A setting is invalid or does not fit the data; the message is one line that names it."""


@dataclass(frozen=True)
class Settings:
    """All settings of a training."""

    data: Data
    network: Architecture
    training: Training
    blocks: Blocks = field(default_factory=Blocks)

    @property
    def digits(self) -> bool:
        return self.data.kind == "digits"

    @property
    def classifies(self) -> bool:
        """Whether a whole cloud has a class, rather than each of its points."""
        return self.data.kind in ("digits", "objects")

    @property
    def whole(self) -> bool:
        """Whether an input is a whole cloud, rather than a sphere."""
        return self.data.kind != "scenes"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; for parts those of the category with the label."""
        if self.data.kind == "parts":
            return tuple(f"{name} {label}" for name, labels in self.data.classes.items() for label in labels)
        return tuple(map(str, range(10))) if self.digits else tuple(self.data.classes)

    @property
    def heads(self) -> dict[str, int] | None:
        """The number of parts of each category; None unless the data are parts."""
        return {name: len(labels) for name, labels in self.data.classes.items()} if self.data.kind == "parts" else None

    @property
    def dimension(self) -> int:
        return 2 if self.digits else 3

    @property
    def widths(self) -> dict[str, int]:
        """The number of columns of each feature by its name."""
        return {name: {"local": self.dimension, "color": 3, "normals": 3}.get(name, 1) for name in self.data.features}

    def net(self) -> nn.Network | nn.KPNeXt:
        """The network for the features and classes of the data."""
        network = self.network
        sizes = sum(self.widths.values()), len(self.names), network.voxel_size
        options: dict[str, Any] = {"width": network.width, "dimension": self.dimension} | network.options
        try:
            if network.kind == "kpnext":
                return nn.kpnext(*sizes, segment=not self.classifies, **options)
            blocks = nn.architecture(
                network.levels, network.convs, deformable=network.deformable, resampled=network.resampled,
                segment=not self.classifies, upsample=network.upsample
            )  # fmt: skip
            return nn.Network(blocks, *sizes, heads=self.heads, **options)
        except (TypeError, ValueError) as error:
            raise SettingsError(f"[network] {error}") from None

    def by_fold(self) -> dict[str, Settings]:
        """The settings of the training of each fold by its name, which a folder can have; empty without folds."""
        data = self.data
        if data.folds is None:
            return {}
        return {
            name: replace(self, data=replace(
                data, folds=None, train=[part for part in data.train if part not in test], test=test
            ))
            for name, test in _parts_by_fold(data).items()
        }  # fmt: skip

    def asdict(self) -> dict[str, Any]:
        """Nested dicts, from which `from_dict` makes these settings."""
        return asdict(self)


def toml_parser() -> ModuleType:
    """The module that parses TOML."""
    return require("tomllib" if sys.version_info >= (3, 11) else "tomli", "io")


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """Read settings from a TOML file; errors name the setting."""
    toml = toml_parser()
    try:
        values = toml.loads(_text(path))
        _check_classes_of_file(values)
        return from_dict(values)
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at {error.start}"
        raise SettingsError(f"{path}: expected text in UTF-8, got {got}") from None
    except RecursionError:
        raise SettingsError(f"{path}: its lists or tables are nested too deep") from None
    except ValueError as error:  # raised by the TOML parser, also for integers of more than 4300 digits
        raise SettingsError(f"{path}: {error}") from None


def _check_classes_of_file(values: dict[str, Any]) -> None:
    """Raise an error for a setting after the line [data.classes] that would be a class with labels."""
    data = values.get("data")
    if isinstance(data, dict) and isinstance(data.get("classes"), dict) and "ignore" in data["classes"]:
        raise SettingsError("[data.classes] ignore: expected the name of a class, got a setting of [data], which "
                            "stands before the line [data.classes]; labels of no class are ignored anyway")  # fmt: skip


def _text(path: str | os.PathLike[str]) -> str:
    path = Path(path)
    if path.exists() and not path.is_file():
        raise SettingsError("is not a regular file")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise SettingsError(f"expected a TOML file of at most {_MAX_BYTES:,} bytes, got {size:,}")
    data = path.read_bytes()
    if data.startswith(_UTF_16_MARKS) or b"\0" in data[:4]:
        raise SettingsError("expected UTF-8, as of any TOML file, got UTF-16: save it as UTF-8")
    return data.decode("utf-8-sig")  # "-sig", as Notepad writes a byte order mark


def from_dict(values: dict[str, Any]) -> Settings:
    """Make settings from nested dicts, as a TOML parser returns them."""
    if not isinstance(values, dict):
        raise SettingsError(f"expected the sections data, network and training, got {_shown(values)}")
    sections = [one.name for one in fields(Settings)]
    if others := [name for name in values if name not in sections]:
        raise SettingsError(f"expected the sections {', '.join(sections[:-1])} and {sections[-1]}, got "
                            f"{', '.join(others)} too{_section_advice(others[0])}")  # fmt: skip
    settings = Settings(
        _data(values.get("data", {})),
        _network(values.get("network", {})),
        _section(Training, values.get("training", {}), "[training]"),
        _section(Blocks, values.get("blocks", {}), "[blocks]"),
    )
    _check_training(settings.training, settings.dimension)
    settings.net()
    return settings


def _data(values: Any) -> Data:
    if not isinstance(values, dict):
        raise SettingsError(f"[data]: expected a table of settings, got {_shown(values)}")
    data = dict(values)
    _check_names(data, "[data]", keys(Data))
    if "kind" in data:
        _check_choice("[data] kind", data["kind"], tuple(SOURCES))
    for name in ("train", "test"):
        parts = data.get(name, [])
        if not isinstance(parts, list) or (name == "train" and not parts):
            raise SettingsError(f"[data] {name}: expected a list of files, got {_shown(parts)}")
        data[name] = [_part(part, f"[data] {name}[{i}]", data.get("kind")) for i, part in enumerate(parts)]
    validation = data.get("validation", [])
    if isinstance(validation, list):
        data["validation"] = [_part(part, f"[data] validation[{i}]", data.get("kind"))
                              for i, part in enumerate(validation)]  # fmt: skip
    elif type(validation) is not float or not 0.01 <= validation <= 0.5:
        raise SettingsError(f"[data] validation: expected a list of files, or a fraction from 0.01 to 0.5, got "
                            f"{_shown(validation)}")  # fmt: skip
    if isinstance(data.get("ground"), list):
        raise SettingsError("[data] ground: expected a table, see [data.ground]; classes and their labels stand in "
                            "[data.classes]")  # fmt: skip
    data["ground"] = _section(Ground, data.get("ground", {}), "[data.ground]")
    data["surface"] = _section(Surface, data.get("surface", {}), "[data.surface]")
    data["kind"] = kind = _kind(data)
    data = _section(Data, data, "[data]")
    _check_reading(data)
    names = data.features
    if not names or len({name.lower() for name in names}) < len(names):
        raise SettingsError(f"[data] features: expected at least one, each once, got {names}")
    if data.folds is not None and not any(isinstance(part, Part) and part.is_pattern for part in data.train):
        _parts_by_fold(data)  # those of a pattern are known where the folder of the data is
    if kind in ("objects", "parts"):
        data = _objects(data)
    if kind == "objects":
        return data
    if kind == "digits":
        if unknown := {*names} - {"one", "value", "local"}:
            raise SettingsError(f"[data] features: expected one, value or local for digits, got {', '.join(unknown)}"
                                f"{near(min(unknown), ('one', 'value', 'local'))}")  # fmt: skip
        if data.classes or data.label or data.columns:
            raise SettingsError(
                "[data]: classes, label and columns are not allowed for digits, whose classes are 0 to 9"
            )
        return data
    if "value" in names:
        raise SettingsError("[data] features: value is only valid for digits")
    if data.columns is not None and len({*data.columns}) < max(3, len(data.columns)):
        raise SettingsError(f"[data] columns: expected at least x y z, each name once, got {_shown(data.columns)}")
    if not isinstance(data.classes, dict) or not (1 if kind == "parts" else 2) <= len(data.classes) <= 10_000:
        raise SettingsError(f"[data.classes]: expected 2 to 10,000 classes, got {len(data.classes)}")
    seen = set()
    for name, labels in data.classes.items():
        if not isinstance(labels, list) or not labels or not all(type(v) is int for v in labels):
            advice = f", such as [{labels}]" if type(labels) is int else ""
            if name in keys(Data).keys() - _SUBTABLES:
                advice = "; as a setting of [data] it stands before the line [data.classes]"
            raise SettingsError(f"[data.classes] {name}: expected a list of integers, got {_shown(labels)}{advice}")
        if not _LABEL_RANGE[0] <= min(labels) <= max(labels) <= _LABEL_RANGE[1]:
            raise SettingsError(f"[data.classes] {name}: expected 32-bit integers, got {_shown(labels)}")
        if seen & {*labels}:
            raise SettingsError(f"[data.classes] {name}: expected labels that no other class has, got {_shown(labels)}")
        seen |= {*labels}
    return data


def _check_reading(data: Data) -> None:
    """Check the settings of classes, of what is not read, and of computed features."""
    for name, values in (("may_be_empty", data.may_be_empty), ("colors", data.colors)):
        if unknown := [one for one in values if one not in (*data.classes, *map(str, range(10)))]:
            raise SettingsError(f"[data] {name}: expected names of classes, got {_shown(unknown[0])}; there are "
                                f"{', '.join(data.classes)}{near(unknown[0], data.classes)}")  # fmt: skip
    for name, color in data.colors.items():
        if not isinstance(color, str) or not re.fullmatch("#[0-9a-fA-F]{6}", color):
            raise SettingsError(f'[data.colors] {name}: expected a colour such as "#ff8000", got {_shown(color)}')
    for one in data.ignore:
        if one not in FLAGS and type(one) is not int:
            expected = f"labels or {', '.join(FLAGS)}"
            raise SettingsError(f"[data] ignore: expected {expected}, got {_shown(one)}{near(one, FLAGS)}")
    if data.kind != "scenes":
        for name in ("validation", "ignore", "drop_zeros", "cache"):
            if getattr(data, name) not in (None, []):
                raise SettingsError(f"[data] {name}: only valid for scenes, got {data.kind}")
    elif isinstance(data.validation, list):
        for number, part in enumerate(data.validation):
            if any(overlap(part, another) for another in data.train):
                raise SettingsError(f"[data] validation[{number}]: expected points that are not in train, got {part}")
    elif data.folds is not None:
        raise SettingsError("[data] validation: not allowed together with folds")


def _kind(data: Mapping[str, Any]) -> str:
    """The kind of the data; an error if it is unknown or another than that of the parts."""
    validation = data["validation"] if isinstance(data.get("validation"), list) else []
    sources = {type(part) for part in (*data["train"], *data["test"], *validation)}
    if len(sources) > 1:
        raise SettingsError("[data] train, test, validation: expected either scenes or digits, got both")
    kinds = [name for name, source in SOURCES.items() if source in sources]
    kind = data.get("kind", kinds[0])
    if kind not in kinds:
        raise SettingsError(f"[data] kind: expected {kinds[0]}, as train and test are, got {kind}")
    return kind


def _parts_by_fold(data: Data) -> dict[str, list[Source]]:
    """The scenes of each fold by the name of the fold; an error unless they are two or more with no point in common."""
    if data.kind != "scenes":
        raise SettingsError(f"[data] folds: only valid for scenes, got {data.kind}")
    if data.test:
        raise SettingsError("[data] test: not allowed together with folds, which test each scene in train")
    folds: dict[str, list[Source]] = {}
    keys: dict[str, str] = {}
    for number, part in enumerate(data.train):
        where = f"[data] train[{number}]"
        key = str(part) if data.folds == "file" else _area(part, where)
        name = re.sub(r"[^\w.-]+", "-", key).strip("-.")
        if not name or len(name.encode()) > _MOST_NAME_BYTES:
            expected = f"a fold with a name of letters or digits, at most {_MOST_NAME_BYTES} bytes"
            raise SettingsError(f"{where} {data.folds}: expected {expected}, got {_shown(key)}")
        if (other := keys.setdefault(name.casefold(), key)) != key:
            raise SettingsError(f"{where} {data.folds}: the folders of the folds {other} and {key} have the same name")
        for fold, parts in folds.items():
            if fold != name and any(overlap(part, another) for another in parts):
                raise SettingsError(f"{where}: expected points that are in one fold only, got {part}, also in {fold}")
        folds.setdefault(name, []).append(part)
    if len(folds) == 1:
        raise SettingsError(f"[data] folds: expected scenes of two {data.folds}s or more, got those of {key} only")
    return folds


def _area(part: Part, where: str) -> str:
    if part.area is not None:
        return part.area
    path = Path(part.file or "")
    if len(path.parts) < 2 or path.is_absolute() or path.parts[0].startswith(("..", "~")):
        raise SettingsError(f"{where} area: expected a name, which {part} has no folder to take from")
    return path.parts[0]


def overlap(part: Part, other: Part) -> bool:
    """Whether two scenes can have points in common: the same file or indoor seed, and boxes that overlap."""
    return str(part) == str(other) and all(
        low < high
        for one, another in ((part, other), (other, part))
        for low, high in zip(one.min or (), another.max or (), strict=False)
    )


def _objects(data: Data) -> Data:
    """The data of objects or parts with their classes; an error for settings that do not apply."""
    if unknown := {*data.features} - {"one", "local"}:
        raise SettingsError(f"[data] features: expected one or local for objects, got {', '.join(unknown)}"
                            f"{near(min(unknown), ('one', 'local'))}")  # fmt: skip
    classes, generated = data.classes, [part for part in (*data.train, *data.test) if part.shapes is not None]
    if not classes and len(generated) == len(data.train) + len(data.test):
        classes = [*CATEGORIES] if data.kind == "objects" else PART_LABELS
    if generated and (unknown := [name for name in classes if name not in CATEGORIES]):
        raise SettingsError(f"[data] classes: expected those of shapes, {', '.join(CATEGORIES)}, got {unknown[0]} too")
    if data.kind == "parts":
        if generated and any(PART_LABELS[name] != labels for name, labels in dict(classes).items()):
            raise SettingsError(
                "[data.classes]: expected the part labels of generated shapes, kpcore.scenes.PART_LABELS"
            )
        return replace(data, classes=classes)
    if data.label:
        raise SettingsError("[data] label: not allowed for objects, whose folder or list says their class")
    if not isinstance(classes, list) or not 2 <= len({*classes}) == len(classes) <= 10_000:
        raise SettingsError(f"[data] classes: expected a list of 2 to 10,000 names, each once, got {_shown(classes)}")
    return replace(data, classes=classes)


def _part(values: Any, where: str, kind: object) -> Source:
    if kind in ("objects", "parts"):
        part = _section(Objects, values, where)
        sources = [name for name in ("folder", "list", "shapes") if getattr(part, name) is not None]
        if len(sources) != 1:
            raise SettingsError(f"{where}: expected one of folder, list and shapes, got {_shown(values)}")
        if part.split is not None and part.folder is None:
            raise SettingsError(f"{where} split: only valid together with folder, got {sources[0]}")
        return part
    if isinstance(values, dict) and "images" in values:
        part = _section(Digits, values, where)
        if part.first < 0 or (part.last is not None and part.last <= part.first):
            raise SettingsError(f"{where} first, last: expected 0 <= first < last, got {_shown(values)}")
        return part
    part = _section(Part, {"file": values} if isinstance(values, str) else values, where)
    if (part.file is None) == (part.indoor is None):
        raise SettingsError(
            f"{where}: expected either file or indoor, got {'neither' if part.file is None else 'both'}"
        )
    if part.file is not None and (part.mirror, part.points) != (Part.mirror, Part.points):
        raise SettingsError(f"{where} points, mirror: only valid together with indoor, got a file")
    for name in ("min", "max"):
        corner = getattr(part, name) or ()
        if len(corner) > 3 or any(map(math.isnan, corner)):
            raise SettingsError(f"{where} {name}: expected up to 3 coordinates, got {_shown(corner)}")
    return part


def _network(values: Any) -> Architecture:
    names = keys(Architecture)
    if isinstance(values, dict):
        if not isinstance(values.get("options", {}), dict):
            raise SettingsError(f"[network] options: expected a table of settings, got {_shown(values['options'])}")
        options = {name: value for name, value in values.items() if name not in names} | values.get("options", {})
        values = {name: value for name, value in values.items() if name in names} | {"options": options}
        kind = values.get("kind", Architecture.kind)
        _check_choice("[network] kind", kind, names["kind"].choices)
        for name in _ONLY_KPCONV if kind == "kpnext" else ():
            if values.get(name, getattr(Architecture, name)) != getattr(Architecture, name):
                raise SettingsError(f"[network] {name}: not valid for kpnext, whose setting is depths")
        if "dimension" in options:
            raise SettingsError("[network] dimension: cannot be set, as it follows from the data: 2 for digits, else 3")
        if "heads" in options:
            raise SettingsError('[network] heads: cannot be set, as they follow from the data: kind = "parts"')
        _check_names(options, "[network]", _NETWORKS[kind])
        for name, value in options.items():
            if (choices := OPTIONS[kind][name].choices) and isinstance(value, str):
                _check_choice(f"[network] {name}", value, choices)
    return _section(Architecture, values, "[network]")


def _section(kind: type[Section], values: Any, where: str) -> Section:
    """A dataclass made from a dict; an error for unknown names, missing values and values that are not allowed."""
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected a table of settings, got {_shown(values)}")
    known, about = {f.name: f for f in fields(kind)}, keys(kind)
    _check_names(values, where, about)
    for name, value in values.items():
        types = str(known[name].type)
        if types == "float" and type(value) is int and abs(value) < 2**63:
            values = {**values, name: float(value)}
        elif not _has_type(value, types):
            raise SettingsError(f"{where} {name}: expected {types}, got {_shown(value)}")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise SettingsError(f"{where} {name}: expected a value, got none")
    section = kind(**values)
    for name, key in about.items():
        value = getattr(section, name)
        if value is not None and key.choices:
            _check_choice(f"{where} {name}", value, key.choices)
        if value is not None and key.bounds and not key.bounds[0] <= value <= key.bounds[1]:
            raise SettingsError(f"{where} {name}: expected {bounds_text(key.bounds)}, got {_shown(value)}")
    return section


def bounds_text(bounds: tuple[float, float]) -> str:
    """A range in words, such as 1 to 10,000 or 1e-09 to 1e+09."""
    return " to ".join(f"{bound:,}" if type(bound) is int else f"{bound:g}" for bound in bounds)


def _check_choice(where: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise SettingsError(f"{where}: expected {_listed(choices, 'or')}, got {_shown(value)}{near(value, choices)}")


def _listed(words: Sequence[str], conjunction: str) -> str:
    """Words as text: a, b or c."""
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# ---- what was probably meant


# The keys of [network] by kind of network, and those of the other tables.
_NETWORKS = {
    kind: {name: key for name, key in keys(Architecture).items() if kind == "kpconv" or name not in _ONLY_KPCONV}
    | options
    for kind, options in OPTIONS.items()
}
_TABLES = {
    "[data]": keys(Data), "[data.ground]": keys(Ground), "[data.surface]": keys(Surface),
    **{f'[network] with kind = "{kind}"': known for kind, known in _NETWORKS.items()},
    "[training]": keys(Training), "[blocks]": keys(Blocks),
}  # fmt: skip
_PARTS = {"scenes": keys(Part), "digits": keys(Digits), 'kind = "objects" or "parts"': keys(Objects)}


def _check_names(values: Mapping[str, Any], where: str, known: Mapping[str, Key]) -> None:
    """Raise an error for a name that is not known, which says what was probably meant or in which table it stands."""
    for name in values:
        if name not in known:
            of_table = where in ("[network]", *_TABLES)
            advice = _advice(name, known, _other_tables(known, where, _TABLES if of_table else _PARTS | _TABLES))
            advice += {"": "", "?": " "}.get(advice[-1:], "; ")
            raise SettingsError(f"{where} {_shown(name)[1:-1]}: unknown setting; {advice}known are {', '.join(known)}")


def _other_tables(
    known: Mapping[str, Key], where: str, tables: Mapping[str, dict[str, Key]]
) -> dict[str, dict[str, Key]]:
    """The keys of all tables but one; elsewhere than in [network] the keys of all kinds of networks together."""
    others: dict[str, dict[str, Key]] = {}
    for table, its in tables.items():
        name = table if where == "[network]" else table.partition(" with kind")[0]
        if its != known:
            others[name] = others.get(name, {}) | its
    return others


def _advice(name: str, known: Mapping[str, Key], others: Mapping[str, Mapping[str, Key]]) -> str:
    """The setting that was probably meant by a name, as text; empty if there is none."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    if plain in known:
        return f"did you mean {plain}?"
    if tables := [table for table, its in others.items() if plain in its]:
        return f"it is a setting of {_listed(tables, 'and')}"
    every = [(table, one, key) for table, its in ({"": known} | others).items() for one, key in its.items()]
    for table, one, key in every:
        if plain in key.also:
            return f"did you mean {one}{table and f' of {table}'}?"

    def alike(table: str, one: str) -> float:
        ratio = difflib.SequenceMatcher(None, plain, one).ratio()
        return ratio if ratio >= (_MOST_ALIKE if table else _ALIKE) else 0.0

    table, one, _ = max(every, key=lambda entry: alike(*entry[:2]))  # the first of equals, of the same table
    return f"did you mean {one}{table and f' of {table}'}?" if alike(table, one) else ""


def _section_advice(name: str) -> str:
    """Text after the error for a section that does not exist."""
    plain = name.strip().lower()
    if plain in _SUBTABLES:
        return f"; did you mean [data.{plain}]?"
    sections = [one.name for one in fields(Settings)]
    if nearest := difflib.get_close_matches(plain, [*sections, *_SUBTABLES], 1, _ALIKE):
        return f"; did you mean [{'data.' * (nearest[0] in _SUBTABLES)}{nearest[0]}]?"
    return f"; {name}: {advice}" if (advice := _advice(name, {}, _other_tables({}, "", _TABLES))) else ""


def near(value: object, choices: Iterable[str], alike: float = _ALIKE) -> str:
    """Text after an error for a value: the allowed one that it is like, if any; `alike` from 0 to 1, see difflib."""
    if not isinstance(value, str):
        return ""
    by_lower = {choice.lower(): choice for choice in choices}
    nearest = difflib.get_close_matches(value.strip().lower(), by_lower, 1, alike)
    return f"; did you mean {by_lower[nearest[0]]}?" if nearest else ""


# ---- values


def _shown(value: object) -> str:
    """A value for a message, at most 80 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # 0xfff...: Python writes no decimal numbers of more than 4300 digits
        text = "an integer of too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _has_type(value: object, types: str) -> bool:
    """Whether a value has a type that is written as an annotation of a dataclass above."""
    for kind in types.split(" | "):
        outer, _, inner = kind.partition("[")
        if kind == "None":
            fits = value is None
        elif outer == "list":
            fits = isinstance(value, list) and all(_has_type(v, inner.rstrip("]")) for v in value if inner)
        elif kind == "float":
            fits = type(value) is float or (type(value) is int and abs(value) < 2**63)
        elif kind == "Source":  # made by `_part`
            fits = isinstance(value, tuple(SOURCES.values()))
        else:
            types_of = {"int": int, "str": str, "bool": bool, "dict": dict, "Ground": Ground, "Surface": Surface}
            fits = type(value) is types_of[outer]
        if fits:
            return True
    return False


def _check_training(training: Training, dimension: int) -> None:
    def check(name: str, fits: bool, expected: str, advice: str = "") -> None:
        if not fits:
            got = _shown(getattr(training, name))
            raise SettingsError(f"[training] {name}: expected {expected}, got {got}{advice}")

    rotate, kinds = training.rotate, ("vertical", "all", "none")
    is_valid = rotate in kinds if isinstance(rotate, str) else 0 <= rotate <= 180
    check("rotate", is_valid, "vertical, all, none, or degrees from 0 to 180", near(rotate, kinds))
    scale = training.scale
    check(
        "scale",
        len(scale) == 2 and 0.01 <= scale[0] <= scale[1] <= 100,
        "the smallest and largest factor, from 0.01 to 100",
    )
    check("flip", len(training.flip) <= dimension, f"up to {dimension} axes")
