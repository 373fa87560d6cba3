"""Count the cost of adding an operator: ``python docs/operator_cost.py neighbor_reduce [--tree FOLDER]``.

Lists the files that were edited by hand to add it, without CHANGELOG, and the places that spell out its argument list:
brackets, braces or macros that name at least two thirds of the arguments of the public function. --tree is the folder
of another version of the project.
"""

import argparse
import ast
import re
from pathlib import Path

WRITTEN_BY_SCRIPTS = ("*.pyi",)
WRITTEN_PARTS = re.compile("<!-- operators:begin -->.*<!-- operators:end -->", re.DOTALL)  # README's table
PLACES = ("kpcore", "src", "tests", "bench", "meson.build", "README.md")
KINDS = {".py", ".pyx", ".pyi", ".h", ".cpp", ".cu", ".md", ".build"}


# Candidates for an argument list: the text in parentheses (nested once) or braces, and macros of several lines.
LISTS = re.compile(r"\([^()]*(?:\([^()]*\)[^()]*)*\)|\{[^{}]*\}|^#define.*\\\n(?:.*\\\n)*.*", re.MULTILINE)


def files(tree):
    for place in PLACES:
        path = tree / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in KINDS and not any(file.match(pattern) for pattern in WRITTEN_BY_SCRIPTS):
                yield file


def arguments(tree, name):
    """(names of the arguments of the public function, the file that defines it)"""
    for file in sorted((tree / "kpcore").rglob("*.py")):
        if {"torch", "jax", "backends"} & set(file.relative_to(tree).parts):
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name and not file.name.startswith("_g"):
                spec = node.args
                return [a.arg for a in (*spec.args, *spec.kwonlyargs)], file
    raise SystemExit(f"name: expected a public function of kpcore, got {name}")


def marks_of_addition(name, module):
    """{pattern of a path: regular expressions that match what was added there for the operator, but no mere call}"""
    stem, title = module.stem, "".join(part.title() for part in name.split("_"))
    struct = f"(?:{title}|{name.replace('kpconv', 'KPConv')})"
    return {
        r".*\.py$": [rf"^(?:    )?def {name}\(", rf'^    "{name}",$', rf'"{name}": \(', rf'\(\s*"{name}",$',
                     rf"^from kpcore\.{stem} import .*\b(?:{name}|{name.upper()})\b"],
        r".*\.pyx$": [rf"^def {name}\(", rf"\(\*{name}\)"],
        r".*\.(h|cpp)$": [rf"^Status {name}\(", rf"\bX\((?:Status, )?{name}\b", rf"^struct {struct} \{{"],
        rf".*formulas/{stem}\.h$|.*src/{stem}\.h$": [r"KP_HD|__host__"],
        rf".*{stem}\.cu$": [r"__global__"],
        rf".*gpu_{stem}\.py$": [r"^def "],
        rf".*test_{stem}\.py$|.*reference\.py$": [rf"\b{name}\("],
        r".*bench/cases\.py$": [rf"\b{name}\b"],
        r".*README\.md$": [rf"^\| `{name}`"],
    }  # fmt: skip


def edited_files(tree, name, module):
    """The files that were edited to add the operator."""
    for file in files(tree):
        text, path = WRITTEN_PARTS.sub("", file.read_text(errors="replace")), file.relative_to(tree).as_posix()
        for pattern, marks in marks_of_addition(name, module).items():
            if re.match(pattern, path) and any(re.search(mark, text, re.MULTILINE) for mark in marks):
                yield path
                break


def argument_lists(tree, paths, names):
    """(file, line) of each list that names at least two thirds of the arguments."""
    aliases = {"neighbors": {"neighbors", "index"}, "reduce": {"reduce", "reduction"}}
    wanted = [aliases.get(name, {name}) for name in names]
    for path in paths:
        if not path.startswith(("kpcore", "src")):
            continue
        text = (tree / path).read_text(errors="replace")
        for match in LISTS.finditer(text):
            words = set(re.findall(r"\w+", match[0]))
            if sum(bool(words & each) for each in wanted) * 3 >= 2 * len(wanted):
                yield path, text.count("\n", 0, match.start()) + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    options = parser.parse_args()
    names, module = arguments(options.tree, options.name)
    paths = list(edited_files(options.tree, options.name, module))
    print(f"{options.name}: {len(paths)} files")
    for path in paths:
        print(f"    {path}")
    if len(names) < 4:  # lists of so few names are also those of other functions
        return
    lists = list(argument_lists(options.tree, paths, names))
    print(f"argument list ({', '.join(names)}) spelled {len(lists)} times")
    for path, line in lists:
        print(f"    {path}:{line}")


if __name__ == "__main__":
    main()
