"""Write the table of functions in README from docstrings and the table of operators: ``python docs/readme.py``.

A row has the name of a public function, the first line of its docstring, and the arguments that have a gradient. A test
fails if the table is out of date.
"""

import inspect
import sys
from pathlib import Path

import kpcore as kp
from kpcore.ops import OPS

BEGIN, END = "<!-- operators:begin -->\n", "<!-- operators:end -->\n"
# In the order in which a network uses them, from points to the loss, and what shows what it has learned.
MODULES = ("search", "neighbors", "subsampling", "sampling", "features", "pyramid", "dispositions", "kpconv",
           "deformation", "continuous", "sparse", "kernel_map", "pooling", "deform2d", "layers",
           "receptive_field")  # fmt: skip


def table():
    """The lines between BEGIN and END: a Markdown table with a row for each public function and class."""
    lines = ["| function | does | gradients |", "|---|---|---|"]
    for module in MODULES:
        for name in sys.modules[f"kpcore.{module}"].__all__:
            public = getattr(kp, name)
            if isinstance(public, type) and issubclass(public, tuple):
                continue  # the type of a result
            summary = inspect.getdoc(public).partition("\n\n")[0].replace("\n", " ").replace("``", "`")
            gradients = ", ".join(OPS[name].diff).replace("_", " ") if name in OPS else "–"
            lines.append(f"| `{name}` | {summary.replace('|', chr(92) + '|')} | {gradients} |")
    return "\n".join(lines) + "\n"


def written(readme):
    """The text of README with the current table."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "README.md")
    path.write_text(written(path.read_text()))
