"""Conversion of checkpoints of published PyTorch code to model files."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpcore import nn
from kpcore.config import require
from kpcore.files import check_writable
from kpcore.nn import published
from kpcore.nn.checkpoints import errors_name
from kpcore.nn.published_arrays import CLIENTS, clients_of, need
from kpcore.nn.published_geotransformer import geotransformer
from kpcore.nn.published_kpconvx import kpconvx
from kpcore.pipeline.data import columns_of
from kpcore.pipeline.settings import LENGTHS, SettingsError, from_dict

if TYPE_CHECKING:
    import os

    from kpcore.nn.blocks import Parameters

_LARGEST = 2**24  # bytes of a file of settings
# Settings of ml-kpconvx in sections that do not describe the network.
_PICKED = {"train": ("in_radius",), "augment_test": ("chromatic_norm", "height_norm")}
# The entries of checkpoints that hold the arrays.
_STATES = ("model_state_dict", "model", "state_dict")
# {data set: {number of input channels: features}} in KPConv-PyTorch and ml-kpconvx; S3DIR there is S3DIS by rooms
_COLORED = {4: ["one", "color"], 5: ["one", "color", "height"]}
_FEATURES = {"S3DIS": _COLORED, "S3DIR": _COLORED, "SemanticKitti": {2: ["one", "height"]}}
# What ml-kpconvx subtracts from colours, 0 to 1, and divides them by (chromatic_norm); and from heights (height_norm).
_CHROMATIC = ([0.5136457, 0.49523646, 0.44921124], [0.18308958, 0.18415008, 0.19252081])
_HEIGHT = (1.39467324, 1.014554043)


class Format(NamedTuple):
    """What a client's settings are called, and where they are."""

    state: str  #: the entry of a checkpoint that holds the arrays
    beside: str | None  #: the file of settings that the client writes to the folder of a run
    sections: tuple[str, ...]  #: of settings that describe the network
    load: Callable[..., Any]


def _load_kpconv_pytorch(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, ...]:
    """As the import, which has defaults for radii, but with all settings that a parameters.txt has."""
    if not (looks_like := clients_of(state_dict)) or "kpconv-pytorch" in looks_like:
        need(config, "architecture", *published.needed_lengths(config.get("architecture")))
    return published.kpconv_pytorch(state_dict, config.get("architecture", ()), config)


FORMATS = {
    "kpconv-pytorch": Format("model_state_dict", "parameters.txt", (), _load_kpconv_pytorch),
    "open3d-ml": Format("model_state_dict", None, ("dataset", "model"), published.open3d_ml),
    "kpconvx": Format("model_state_dict", "parameters.json", ("data", "model"), kpconvx),
    "geotransformer": Format("model", None, ("backbone",), geotransformer),
    "predator": Format("state_dict", "config.json", ("model", "overlap_attention_module"), published.predator),
}


class Converted(NamedTuple):
    """A network from a checkpoint."""

    net: nn.Network | nn.KPNeXt
    params: Parameters[Any]
    state: Parameters[Any]
    configs: list[Path]  #: the files of settings that were read
    unused: list[str]  #: names of arrays that are not of the network
    about: dict[str, Any]  #: what else the file holds
    missing: str | None  #: why kpcore segment and kpcore predict cannot use the network; None if one of them can


def convert(checkpoint: str | os.PathLike[str], client: str, out: str | os.PathLike[str],
            configs: Sequence[str | os.PathLike[str]] = ()) -> Converted:  # fmt: skip
    """Convert a checkpoint to a file that `nn.load` reads; nothing is written if the checkpoint does not fit.

    Parameters
    ----------
    checkpoint : path
        Read with ``torch.load(weights_only=True)``, which executes no code of the file.
    client : str
        One of `FORMATS`.
    out : path
        The safetensors file to write.
    configs : sequence of paths
        Files of settings: parameters.txt, yml, TOML or JSON, where later ones add to or replace earlier ones. By
        default the file that the client writes, in the folder of the checkpoint or the one above.

    Returns
    -------
    Converted

    Raises
    ------
    ValueError
        For files that cannot be read, missing settings, and arrays that do not fit, which it lists in lines.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    _check_differs(out, checkpoint)
    require("safetensors", "io")
    check_writable(out)
    form, paths = FORMATS[client], [Path(path) for path in configs]
    state_dict = read_checkpoint(checkpoint, form.state)
    if not paths and form.beside:
        places = [folder / form.beside for folder in (checkpoint.parent, checkpoint.absolute().parent.parent)]
        paths = [place for place in places if place.is_file()][:1]
    config = {}
    for path in paths:
        _check_differs(out, path)
        with errors_name(path):
            config |= _flat(_settings(path, client), form.sections)
    where = ", ".join(map(str, paths)) or (f"no {form.beside} beside it or above" if form.beside else "no --config")
    try:
        net, params, state, unused = form.load(state_dict, config)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # settings of any type may come from a file
        first, *lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError("\n".join([f"{checkpoint}, settings of {where}: {first}", *lines])) from None
    about, missing = _use(client, net, config, checkpoint.name)
    nn.save(out, net, params, state, converted={"from": client, "file": checkpoint.name}, **about)
    return Converted(net, params, state, paths, unused, about, missing)


# ---- files


def _check_differs(out: Path, path: Path) -> None:
    if out.exists() and path.exists() and out.samefile(path):
        raise ValueError(f"{out}: expected a file other than {path}, which is read and never overwritten")


def read_checkpoint(path: Path, state: str) -> Mapping[str, Any]:
    """The dict of tensors in a checkpoint, by default in its entry called `state`."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    path.open("rb").close()  # if this fails, the OSError names the file
    torch = require("torch", "torch")
    allowed = torch.serialization.get_safe_globals()  # which the context would take away at its end
    added = [one for one in _numbers_of_numpy() if one not in allowed]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(added):
            warnings.simplefilter("ignore")  # of the format of old files
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # pickle, zipfile and torch raise almost anything for a damaged file
        raise ValueError(f"{path}: {_why(error)}") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: expected a dict with {state}, got {type(loaded).__name__}")
    for name in dict.fromkeys((state, *_STATES)):
        if isinstance(loaded.get(name), Mapping):
            return loaded[name]
    if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    raise ValueError(f"{path}: expected a dict with {state}, got {', '.join(map(str, loaded)) or 'an empty one'}")


def _numbers_of_numpy() -> list[Any]:
    """What a pickled number of NumPy needs, such as the loss of the best epoch; it executes nothing."""
    scalar, dtypes = np.float64(0).__reduce__()[0], [np.dtype(kind) for kind in ("f8", "f4", "i8", "i4", "?")]
    names = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"  # of NumPy 1 and 2
    return [*((scalar, name) for name in names), np.dtype, *map(type, dtypes)]


def _why(error: Exception) -> str:
    """In one line why torch.load refuses a file."""
    message = " ".join(str(error).split())
    if needed := re.search(r"GLOBAL ([\w.]+)", message):
        return (f"expected a checkpoint of arrays and numbers, got one that needs {needed[1]}, which could execute "
                "code; if it is trusted, load it with the code that wrote it and save its arrays alone")  # fmt: skip
    return f"is damaged, or no file that torch.save wrote ({type(error).__name__}: {message[:100]})"


def _settings(path: Path, client: str) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise ValueError("is not a regular file")
    if (size := path.stat().st_size) > _LARGEST:
        raise ValueError(f"expected settings of at most {_LARGEST:,} bytes, got {size:,}")
    text, suffix = path.read_text(encoding="utf-8-sig"), path.suffix.lower()
    if suffix == ".txt":
        if client != "kpconv-pytorch":
            raise ValueError(f"expected settings of {CLIENTS[client].title}, got a parameters.txt of KPConv-PyTorch")
        return parameters(text)
    if suffix == ".json":
        values = json.loads(text)
    elif suffix in (".yml", ".yaml"):
        if client == "kpconv-pytorch":  # the arrays of Open3D-ML have the same names, but another function
            raise ValueError("expected settings of KPConv-PyTorch, got a yml file, as Open3D-ML has (--from open3d-ml)")
        values = require("yaml", "io").safe_load(text)
    elif suffix == ".toml":
        values = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "io").loads(text)
    else:
        raise ValueError(f"expected parameters.txt or a file ending in .yml, .yaml, .toml or .json, got {suffix!r}")
    if not isinstance(values, dict):
        raise ValueError(f"expected settings by name, got {type(values).__name__}")
    return values


def parameters(text: str) -> dict[str, Any]:
    """The settings in a parameters.txt of KPConv-PyTorch.

    >>> parameters("# comment\\nnum_classes = 13\\nKP_extent = 1.200\\narchitecture = simple resnetb\\nclass_w =\\n")
    {'num_classes': 13, 'KP_extent': 1.2, 'architecture': ['simple', 'resnetb'], 'class_w': []}
    """
    values = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"line {number}: expected name = value, got {line.strip()[:60]!r}")
        words = [_number(word) for word in value.split()]
        is_list = name.strip() in ("architecture", "class_w", "augment_symmetries") or len(words) != 1
        values[name.strip()] = words if is_list else words[0]
    return values


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"None": None, "True": True, "False": False}.get(word, word)


def _flat(values: Mapping[str, Any], sections: Sequence[str]) -> dict[str, Any]:
    """The settings outside of sections, and those in the sections that describe the network."""
    if not sections:
        tables = [name for name, value in values.items() if isinstance(value, dict) and not name.startswith("label_")]
        if tables:
            raise ValueError(f"expected settings outside of tables, got [{tables[0]}]")
    flat = {name: value for name, value in values.items() if name not in sections}
    for section in sections:
        if isinstance(values.get(section), dict):
            flat |= values[section]
    for section, names in _PICKED.items():
        if isinstance(others := flat.pop(section, None), dict):
            flat |= {name: others[name] for name in names if name in others}
    return flat


# ---- what kpcore segment and kpcore predict need besides the network


def _use(client: str, net: nn.Network | nn.KPNeXt, config: Mapping[str, Any],
         source: str) -> tuple[dict[str, Any], str | None]:  # fmt: skip
    """(settings, columns and names for the file, why no command can use it); the names alone if none can."""
    if client in ("geotransformer", "predator"):
        return {}, "its output is a descriptor, not a class"
    names, labels = classes_of(net.num_classes, config)
    about = {"names": names}
    try:
        features, center, scale = _features(client, net, config)
        data = {"kind": "scenes", "train": [source], "classes": dict(zip(names, [[n] for n in labels], strict=True))}
        if not net.segments:
            data |= {"kind": "objects", "train": [{"list": source}], "classes": names}
        # Of these, only voxel_size and origin matter, since the network itself is in the file.
        network = {"voxel_size": net.voxel_size, "origin": net.origin}
        network |= {"kind": "kpnext"} if isinstance(net, nn.KPNeXt) else {"levels": net.num_levels}
        training = {"radius": _radius(config)} if net.segments else {}
        settings = from_dict({"data": data | {"features": features}, "network": network, "training": training})
        widths = settings.widths
        if sum(widths.values()) != net.num_features:
            raise SettingsError(f"features: expected some with {net.num_features} columns together, got {features}")
        columns = {"widths": widths, "center": center, "scale": scale}
        columns_of(settings, columns)
    except SettingsError as error:
        return about, str(error)
    return about | {"settings": settings.asdict(), "columns": columns}, None


def classes_of(num_classes: int, config: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """The names of the classes and their labels in files, in the order of the logits: that of the labels.

    They come from label_to_names, or from label_and_names of ml-kpconvx, without the ignored labels; else classes are
    called by their label, or by their number.
    """
    by_label = config.get("label_to_names", config.get("label_and_names"))
    ignored = config.get("ignored_labels", config.get("ignored_label_inds"))
    ignored = [] if ignored is None else [ignored] if type(ignored) is int else ignored
    if not isinstance(ignored, (list, tuple)) or any(type(label) is not int for label in ignored):
        raise ValueError(f"ignored_labels: expected a list of labels, got {ignored!r}")
    listed = config.get("lbl_values", config.get("label_values")) or ()
    if any(type(label) is not int for label in listed):
        raise ValueError(f"label_values: expected a list of integers, got {listed!r}")
    try:
        pairs = by_label.items() if isinstance(by_label, dict) else by_label or ()
        named = {int(label): str(name) for label, name in pairs}
        labels = sorted({*(named or listed)} - {*ignored}) or [*range(num_classes)]
    except (TypeError, ValueError):
        raise ValueError(f"label_to_names: expected a name for each label, got {by_label!r}") from None
    if len(labels) != num_classes:
        raise ValueError(f"label_to_names, ignored_labels: expected {num_classes} classes, as the network has, got "
                         f"{len(labels)}")  # fmt: skip
    names = [named.get(label, f"class {label}") for label in labels]
    if len({*names}) < len(names):
        raise ValueError(f"label_to_names: expected a different name for each class, got {', '.join(names)}")
    return names, labels


def _radius(config: Mapping[str, Any]) -> float:
    radius = config.get("in_radius")
    if not isinstance(radius, (int, float)) or not LENGTHS[0] <= radius <= LENGTHS[1]:
        raise SettingsError(f"in_radius: expected the radius of the spheres that the network labels, got {radius!r}")
    return float(radius)


def _features(client: str, net: nn.Network | nn.KPNeXt,
              config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """(features, center, scale) of `data.Columns` for the input of a network, as the client makes it."""
    center, scale = {"color": 0.0, "height": 0.0}, {"color": 255.0, "height": 1.0}
    features = config.get("features") or _published_features(client, net, config)
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise SettingsError(f"features: expected a list of names, such as one and color, got {features!r}")
    if client == "kpconvx":
        if config.get("chromatic_norm"):
            mean, deviation = _CHROMATIC
            center["color"], scale["color"] = [255 * one for one in mean], [255 * one for one in deviation]
        if config.get("height_norm"):
            center["height"], scale["height"] = _HEIGHT
    for name in features:
        if name not in ("one", "local", "color", "height"):  # a field of files, as it is in them
            center[name], scale[name] = 0.0, 1.0
    kept = [name for name in center if name in features]
    return features, {name: center[name] for name in kept}, {name: scale[name] for name in kept}


def _published_features(client: str, net: nn.Network | nn.KPNeXt, config: Mapping[str, Any]) -> list[str]:
    """The features that a client computes for a data set and a number of channels."""
    dataset, channels = config.get("dataset", config.get("name")), net.num_features
    known = {1: ["one"]}
    if client == "open3d-ml":
        known[4] = ["one", "local"]  # its height is that above the centre of a sphere, which is no feature here
    elif net.segments and isinstance(dataset, str):
        known |= _FEATURES.get(dataset, {})
    if channels not in known:
        raise SettingsError(
            f"features: expected the names of the {channels} columns of its input, which depend on the data set; add "
            f'them to a file of --config, such as features = ["one", "color", "height"]'
        )
    return known[channels]


def summary(unused: Sequence[str]) -> list[str]:
    """The names of arrays that were not converted: the first parts of most, since there are hundreds."""

    def short(name: str) -> str:
        *_, leaf = name.split(".")
        if leaf == "num_batches_tracked" or ".grpnorm." in name:
            return "num_batches_tracked" if leaf == "num_batches_tracked" else "grpnorm"
        return name if name.startswith("criterion.") else name.partition(".")[0]

    return list(dict.fromkeys(map(short, unused)))
