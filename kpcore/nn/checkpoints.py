"""Networks in safetensors files, which hold arrays and a text and cannot execute code."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from kpcore.config import require
from kpcore.files import replacing
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network, check_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kpcore.nn.blocks import Parameters

Arrays: TypeAlias = dict[str, np.ndarray]


def save(path: str | os.PathLike[str], net: Network | KPNeXt, params: Parameters[np.ndarray],
         state: Parameters[np.ndarray], **more: Any) -> None:  # fmt: skip
    """Write a network with its parameters to one file, which appears only when it is complete.

    Parameters
    ----------
    path : str or Path
    net : Network or KPNeXt
    params, state : dict of NumPy arrays by name
    **more : anything that JSON can hold
        Anything else to store with the network, such as the names of the classes.
    """
    if taken := {"network", "groups"} & more.keys():
        raise ValueError(f"more: expected names other than network and groups, got {', '.join(sorted(taken))}")
    write(path, {"params": params, "state": state}, about_network(net) | more)


def load(
    path: str | os.PathLike[str], *, mapped: bool = False
) -> tuple[Network | KPNeXt, Arrays, Arrays, dict[str, Any]]:
    """(network, params, state, more) of a file that `save` wrote, with NumPy arrays; a ValueError for other files.

    With `mapped` the arrays are read-only views of the file in memory, which all processes of a machine share. The file
    may be replaced, as `save` does, but not changed as long as they are in use.
    """
    groups, about = read(path, mapped=mapped)
    with errors_name(path):
        net = _network(about.pop("network", None))
        params, state = groups.get("params", {}), groups.get("state", {})
        check_arrays(net, params, state)
    return net, params, state, about


@contextmanager
def errors_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an exception about the contents of a file into a ValueError of one line that names the file."""
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # wrong JSON values cause any exception
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {message if len(message) <= 400 else message[:400] + ' ...'}") from None


def _network(described: object) -> Network | KPNeXt:
    if not isinstance(described, dict):
        raise ValueError("expected a file that kpcore.nn.save wrote, got one without a network")
    described, kinds = dict(described), {"Network": Network, "KPNeXt": KPNeXt}
    kind = described.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"expected a network of {' or '.join(kinds)}, got {kind!r}")
    return kinds[kind](**described)


def about_network(net: Network | KPNeXt) -> dict[str, Any]:
    """The description of a network as values that JSON can hold, from which `load` makes the network again."""
    return {"network": {"kind": type(net).__name__, **dataclasses.asdict(net)}}


def write(path: str | os.PathLike[str], groups: Mapping[str, Parameters[np.ndarray]], about: dict[str, Any]) -> None:
    """Write groups of arrays, {group: {name: array}}, and `about`, which JSON can hold, to one file.

    Names of groups have no dots. The file appears only when it is complete.
    """
    safetensors = require("safetensors.numpy", "io")
    arrays = {
        f"{group}.{name}": np.asarray(value, order="C")
        for group, values in groups.items()
        for name, value in values.items()
    }
    data = safetensors.save(arrays, {"kpcore": json.dumps(about | {"groups": [*groups]})})
    with replacing(path) as part:
        Path(part).write_bytes(data)


_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # bytes, as in the library safetensors


def _contents(file: BinaryIO, mapped: bool = False) -> tuple[dict[str, str], Arrays]:
    """(metadata, arrays) of an open safetensors file: new arrays, or views of it, in the order of their names.

    The file is the length of the header in 8 bytes, the header, and the arrays without gaps between them. The header is
    a JSON object in UTF-8 with an entry for each array, and texts by name as ``__metadata__``
    (https://github.com/huggingface/safetensors). Everything is checked before memory is taken for an array. An error is
    what the library refuses, and besides names that occur twice, entries with other fields than dtype, shape and
    data_offsets, and more than 32 dimensions.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if 8 + length > size or length > _LONGEST_HEADER:
        most = max(0, min(size - 8, _LONGEST_HEADER))
        raise ValueError(f"expected a header of at most {most} bytes, got a length of {length}")
    header = json.loads(file.read(length).decode(), object_pairs_hook=_named_once, parse_int=_integer)
    if not isinstance(header, dict):
        raise ValueError(f"expected a header that is a JSON object, got {type(header).__name__}")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("expected texts by name as __metadata__")
    "".join([*header, *metadata, *metadata.values()]).encode()  # an error for one half of a surrogate pair
    entries = sorted(((name, *_entry(name, entry)) for name, entry in header.items()), key=lambda entry: entry[3:])
    end = 0
    for name, _, _, begin, stop in entries:
        if begin != end:
            raise ValueError(f"{name!r}: expected data_offsets that begin at {end}, got {begin}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"expected {8 + length + end} bytes, as the header says, got {size}")
    if mapped:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        views = ((name, _view(memory, dtype, shape, 8 + length + begin)) for name, dtype, shape, begin, _ in entries)
        return metadata, dict(sorted(views))
    arrays = {name: np.empty(shape, dtype) for name, dtype, shape, _, _ in entries}
    for name, array in arrays.items():
        if file.readinto(array) != array.nbytes:
            raise ValueError(f"{name!r}: expected {array.nbytes} bytes, got fewer: the file has become shorter")
    return metadata, dict(sorted(arrays.items()))


def leave_memory(array: np.ndarray) -> None:
    """Let the pages of a mapped file that this process has read no longer count as its memory; others read them again.

    array : one of the file, as `read` returns them with `mapped`
    """
    base = array
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _view(memory: mmap.mmap, dtype: str, shape: list[int], offset: int) -> np.ndarray:
    """A read-only array of a part of a file in memory; a copy where the part is not aligned, as it need not be."""
    num = math.prod(shape)
    array = np.frombuffer(memory, dtype, num, offset).reshape(shape) if num else np.empty(shape, dtype)
    if not array.flags.aligned:
        array = array.copy()
    array.flags.writeable = False
    return array


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these names and values; an error for a name that occurs twice."""
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name!r}: expected each name once in the header, got it twice")
        values[name] = value
    return values


def _integer(text: str) -> int | float:
    """An integer of JSON; a float, which no size may be, for one with a sign or of more than 19 digits."""
    return int(text) if text.isdigit() and len(text) < 20 else float(text)


def _entry(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    """(dtype, shape, begin, end) of an array, checked."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: expected dtype, shape and data_offsets, got {entry!r}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name!r}: expected a dtype of {', '.join(_DTYPES)}, got {kind!r}")
    for field, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ValueError(f"{name!r}: expected {field} of integers from 0 on, got {values!r}")
    if len(shape) > 32 or len(offsets) != 2:  # 32: the most dimensions that every NumPy has
        raise ValueError(
            f"{name!r}: expected at most 32 dimensions and 2 data_offsets, got {len(shape)}, {len(offsets)}"
        )
    itemsize = np.dtype(_DTYPES[kind]).itemsize
    if itemsize * math.prod(num or 1 for num in shape) >= 2**63:  # NumPy allocates no such array, even an empty one
        raise ValueError(f"{name!r}: expected a shape of fewer than 2**63 bytes, got {shape}")
    num_bytes = itemsize * math.prod(shape)
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{name!r}: expected data_offsets of {num_bytes} bytes for {kind} {shape}, got {offsets}")
    return _DTYPES[kind], shape, *offsets


def read(path: str | os.PathLike[str], *, mapped: bool = False) -> tuple[dict[str, Arrays], dict[str, Any]]:
    """(groups, about) of a file that `write` wrote; `mapped`: see `load`."""
    path = Path(path)
    if path.is_dir():
        inside = path / "best.safetensors"
        advice = f"; there is {inside}" if inside.is_file() else ""
        raise ValueError(f"{path}: expected a file, got a folder{advice}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    with path.open("rb") as file, errors_name(path):
        try:
            metadata, arrays = _contents(file, mapped)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is damaged, or no safetensors file: {error}") from None
        about = json.loads(metadata.get("kpcore", "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"expected a JSON object in the metadata named kpcore, got {type(about).__name__}")
        groups = {group: {} for group in about.pop("groups", ())}
        for full_name, array in arrays.items():
            group, _, name = full_name.partition(".")
            groups.setdefault(group, {})[name] = array
    return groups, about
