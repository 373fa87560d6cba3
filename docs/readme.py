"""Writes README's table of functions from their docstrings and the table of operators: ``python docs/readme.py``.

A row is the first line of a public function's docstring and the arguments it is differentiable in. A test fails if the
table is out of date.
"""

import inspect
import sys
from pathlib import Path

import kpcore as kp
from kpcore.ops import OPS

BEGIN, END = "<!-- operators:begin -->\n", "<!-- operators:end -->\n"
# The modules in the order in which a network is made, from points to a loss.
MODULES = ("search", "neighbors", "subsampling", "sampling", "pyramid", "dispositions", "kpconv", "deformation",
           "pooling", "layers")  # fmt: skip


def table():
    """The lines between the two marks, each a row of what one public function or class does."""
    lines = ["| function | does | gradients |", "|---|---|---|"]
    for module in MODULES:
        for name in sys.modules[f"kpcore.{module}"].__all__:
            public = getattr(kp, name)
            if isinstance(public, type) and issubclass(public, tuple):
                continue  # what a function returns
            summary = inspect.getdoc(public).partition("\n\n")[0].replace("\n", " ").replace("``", "`")
            gradients = ", ".join(OPS[name].diff).replace("_", " ") if name in OPS else "–"
            lines.append(f"| `{name}` | {summary.replace('|', chr(92) + '|')} | {gradients} |")
    return "\n".join(lines) + "\n"


def written(readme):
    """The text of README with the table of today in it."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "README.md")
    path.write_text(written(path.read_text()))
