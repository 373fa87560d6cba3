"""Networks in files: safetensors, which hold arrays and a text, and cannot run anything."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kpcore.config import require
from kpcore.files import whole
from kpcore.nn.kpnext import KPNeXt
from kpcore.nn.networks import Network, check_arrays

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from kpcore.nn.blocks import Parameters

Arrays: TypeAlias = dict[str, np.ndarray]


def save(path: str | os.PathLike[str], net: Network | KPNeXt, params: Parameters[np.ndarray],
         state: Parameters[np.ndarray], **more: Any) -> None:  # fmt: skip
    """Write a network with its parameters to one file, whole or not at all.

    Parameters
    ----------
    path : str or Path
    net : Network or KPNeXt
    params, state : dict of NumPy arrays by name
    **more : anything that JSON can hold
        What else is to be known of it, such as the names of the classes.
    """
    if taken := {"network", "groups"} & more.keys():
        raise ValueError(f"more: expected names that are not the file's own, got {', '.join(sorted(taken))}")
    write(path, {"params": params, "state": state}, about_network(net) | more)


def load(path: str | os.PathLike[str]) -> tuple[Network | KPNeXt, Arrays, Arrays, dict[str, Any]]:
    """(network, params, state, more) of a file that `save` wrote; arrays are NumPy's. A ValueError names what is wrong
    with another."""
    groups, about = read(path)
    with naming(path):
        net = _network(about.pop("network", None))
        params, state = groups.get("params", {}), groups.get("state", {})
        check_arrays(net, params, state)
    return net, params, state, about


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is wrong with the contents of a file is a ValueError of one line that names it."""
    try:
        yield
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:  # safetensors has its own kinds, and JSON can hold anything where numbers belong
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {said if len(said) <= 400 else said[:400] + ' ...'}") from None


def _network(described: object) -> Network | KPNeXt:
    if not isinstance(described, dict):
        raise ValueError("expected a file that kpcore.nn.save wrote, got one without a network")
    described, kinds = dict(described), {"Network": Network, "KPNeXt": KPNeXt}
    kind = described.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"expected a network of {' or '.join(kinds)}, got {kind!r}")
    return kinds[kind](**described)


def about_network(net: Network | KPNeXt) -> dict[str, Any]:
    """The description of a network as JSON holds it, from which `load` makes the network again."""
    return {"network": {"kind": type(net).__name__, **dataclasses.asdict(net)}}


def write(path: str | os.PathLike[str], groups: Mapping[str, Parameters[np.ndarray]], about: dict[str, Any]) -> None:
    """Dicts of arrays by name, each dict with a name without dots, and what JSON can hold, in one file that is there
    whole or not at all."""
    safetensors = require("safetensors.numpy", "io")
    arrays = {
        f"{group}.{name}": np.asarray(value, order="C")
        for group, values in groups.items()
        for name, value in values.items()
    }
    data = safetensors.save(arrays, {"kpcore": json.dumps(about | {"groups": [*groups]})})
    with whole(path) as part:
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
        raise ValueError(f"{path}: is no regular file")
    path.open("rb").close()  # of what cannot be opened safetensors raises an OSError without its name
    with naming(path), _opened(path) as file:
        about = json.loads((file.metadata() or {}).get("kpcore", "{}"))
        if not isinstance(about, dict):
            raise ValueError(f"expected names and values in what kpcore says of it, got {type(about).__name__}")
        groups = {group: {} for group in about.pop("groups", ())}
        for name_of_both in file.keys():  # noqa: SIM118 - not a dict
            group, _, name = name_of_both.partition(".")
            groups.setdefault(group, {})[name] = file.get_tensor(name_of_both)
    return groups, about
