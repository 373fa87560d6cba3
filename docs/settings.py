"""Write docs/settings.md, the reference of all settings, from kpcore.pipeline.sections: ``python docs/settings.py``.

Meanings of the options of networks come from the docstrings of kpcore.nn. A test fails if the page is out of date.
"""

import inspect
import json
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import kpcore as kp
from kpcore.pipeline import sections
from kpcore.pipeline.settings import bounds_text

INTRODUCTION = """\
# Settings

Every key of the TOML file that `kpcore train` reads, with an example. [The guide](guide.md#start-from-your-files) says
how `kpcore init` writes such a file, [networks.md](networks.md#train-on-your-scans) what a training does. A key that
does not exist is an error, which names the one that was probably meant, or the table that it stands in. Lengths in the
*unit of the points* are metres or feet, as the files have them. This page is written by `python docs/settings.py`.

"""
# (heading, what follows it, dataclass) of each table
TABLES = (
    ("[data]", "", sections.Data),
    ("A scene in train, test or validation", 'A file name, or a table such as `{ file = "a.laz", max = [500.0] }`:',
     sections.Part),
    ("Objects or parts in train or test", "", sections.Objects),
    ("Digits in train or test", "", sections.Digits),
    ("[data.ground]", "", sections.Ground),
    ("[data.surface]", "", sections.Surface),
    ("[network]", "", sections.Architecture),
    ("[training]", "", sections.Training),
    ("[blocks]", "", sections.Blocks),
)  # fmt: skip
OPTIONS = {
    "kpconv": ("Options of kpconv in [network]", kp.nn.Network),
    "kpnext": ("Options of kpnext in [network]", kp.nn.KPNeXt),
}
_TYPES = {"bool": "true or false", "int": "whole numbers", "float": "numbers", "str": "text"}


def page():
    """The text of the page."""
    parts = [INTRODUCTION]
    for heading, text, section in TABLES:
        text = text or inspect.getdoc(section)
        rows = [_row(one.name, key, _default(one, key), str(one.type), _described(kp.nn.architecture).get(one.name, ""))
                for one, key in zip(fields(section), sections.keys(section).values(), strict=True)]  # fmt: skip
        parts += [f"## {heading}\n\n{text}\n\n", *_table(rows)]
        if section is sections.Architecture:
            for kind, (name, network) in OPTIONS.items():
                parts += [f"\n### {name}\n\n", *_table(_options(kind, network))]
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


def _table(rows):
    yield "| setting, an example | default | values | meaning | change it |\n|---|---|---|---|---|\n"
    yield from rows


def _options(kind, network):
    """The rows of the options of a network."""
    described = _described(kp.kpconv) | _described(kp.nn.Network) | _described(network)
    known = {one.name: one for one in fields(network)}
    for name, key in sections.OPTIONS[kind].items():
        if name in known:
            default, types = _default(known[name], key), str(known[name].type)
        else:
            parameter = inspect.signature(kp.nn.kpnext).parameters[name]
            default, types = _toml(parameter.default), str(parameter.annotation)
        yield _row(name, key, default, types, described.get(name, ""))


def _row(name, key, default, types, described):
    meaning = key.meaning or described
    if not meaning:
        raise ValueError(f"{name}: expected a meaning, in kpcore.pipeline.sections or a docstring, got none")
    cells = [f"`{name} = {key.example}`", default, _values(key, types), _sentence(meaning), key.when]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _sentence(text):
    text = re.sub(r"``([^`]*)``", r"`\1`", text).rstrip(".")
    return text[:1].upper() + text[1:] if not text.startswith('"') else text


def _default(one, key):
    if key.default:
        return key.default
    if one.default is MISSING and one.default_factory is MISSING:
        return "needed"
    value = one.default if one.default_factory is MISSING else one.default_factory()
    return "none" if value is None or value in ([], {}) else "the defaults below" if hasattr(
        value, "__dataclass_fields__") else _toml(value)  # fmt: skip


def _toml(value):
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _values(key, types):
    """The allowed values, and their unit."""
    values = key.allowed or ", ".join(f'"{choice}"' for choice in key.choices)
    if key.bounds:
        values = bounds_text(key.bounds)
    values = values or _TYPES.get(types.partition(" |")[0], "")
    unit = "" if not key.unit or key.unit in values else f"*{key.unit}*"
    return ", ".join(filter(None, (values, unit)))


def _described(public):
    """{argument: its text} of a docstring in numpydoc form; arguments without text are left out."""
    text = inspect.getdoc(public).partition("\nParameters\n----------\n")[2].partition("\nReturns\n")[0]
    texts = {}
    for names, body in re.findall(r"^(\w[^\n]*)\n((?:    [^\n]*\n|\n(?=    ))+)", text, re.M):
        if not body.strip().startswith("As in"):
            for name in names.partition(" : ")[0].split(", "):
                texts[name] = " ".join(body.split())
    return texts


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "settings.md")
    path.write_text(page(), encoding="utf-8")
