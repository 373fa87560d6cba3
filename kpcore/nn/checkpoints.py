"""Networks in safetensors files, which hold arrays and a text and cannot execute code."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kpcore.config import require
from kpcore.files import replacing
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network, check_arrays

if TYPE_CHECKING:
    import os
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


def load(path: str | os.PathLike[str]) -> tuple[Network | KPNeXt, Arrays, Arrays, dict[str, Any]]:
    """(network, params, state, more) of a file that `save` wrote, with NumPy arrays; a ValueError for other files."""
    groups, about = read(path)
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
    except Exception as error:  # safetensors has exceptions of its own, and wrong JSON values cause any exception
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


def _opened(path: Path) -> Any:
    safetensors = require("safetensors", "io")
    try:
        return safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"is damaged, or no safetensors file: {error}") from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Arrays], dict[str, Any]]:
    """(groups, about) of a file that `write` wrote."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a regular file")
    path.open("rb").close()  # if this fails, the OSError names the file, which that of safetensors does not
    with errors_name(path), _opened(path) as file:
        about = json.loads((file.metadata() or {}).get("kpcore", "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"expected a JSON object in the metadata named kpcore, got {type(about).__name__}")
        groups = {group: {} for group in about.pop("groups", ())}
        for full_name in file.keys():  # noqa: SIM118 - not a dict
            group, _, name = full_name.partition(".")
            groups.setdefault(group, {})[name] = file.get_tensor(full_name)
    return groups, about
