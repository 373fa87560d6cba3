"""Write docs/commands.md from the parser of the commands: ``python docs/commands.py``.

A test fails if the page is out of date.
"""

import argparse
import sys
from pathlib import Path

from kpcore.cli import EXIT_CODES, parser

BEGIN = """# Commands

`kpcore COMMAND --help` prints what is here about one command; `python -m kpcore` is the same as `kpcore`.

Results are printed on standard output; progress, warnings and errors on standard error, each message in one line. On a
terminal progress is a bar, elsewhere a line a minute. The object that `--json` prints has `command`, `exit_code`,
`warnings`, `error` if the command was refused, and the results: `files`, `failed` and `skipped` of commands that take
several files, `classes`, `scores` and `confusion` (a row for each true class) where there are labels. Numbers that are
not finite are null. This page is written by `docs/commands.py`.

"""


def page():
    """The text of docs/commands.md."""
    top = parser()
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    one = next(iter(commands.choices.values()))
    shared = next(group for group in one._action_groups if group.title == "options of every command")._group_actions
    lines = ["| command | does |", "|---|---|"]
    lines += [f"| [`{action.dest}`](#kpcore-{action.dest}) | {action.help} |" for action in commands._choices_actions]
    lines += ["", "Options of every command:", "", *_table(shared), ""]
    lines += ["| exit code | means |", "|---|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    for name, command in commands.choices.items():
        options = [action for action in command._actions if action.dest not in {"help", *(one.dest for one in shared)}]
        examples = command.epilog.partition("examples:\n")[2].partition("\n\n")[0]
        lines += ["", f"## kpcore {name}", "", command.description, ""]
        lines += [*_table(options), ""] if options else []
        lines += ["\n".join(f"  {line}" for line in examples.splitlines())]
    return BEGIN + "\n".join(lines) + "\n"


def _table(actions):
    lines = ["| option | means |", "|---|---|"]
    for action in actions:
        values = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices and not action.metavar else None
        value = choices or " ".join(one or action.dest.upper() for one in values)
        if not action.option_strings:
            words = value + (" ..." if action.nargs == "+" else "")
        elif action.nargs == 0:
            words = ", ".join(action.option_strings)
        else:
            words = f"{', '.join(action.option_strings)} {value}" + (" ..." if action.nargs == "+" else "")
        needed = "; needed" if action.required and action.option_strings else ""
        cell = words.replace("|", "\\|")
        lines.append(f"| `{cell}` | {action.help}{needed} |")
    return lines


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "commands.md")
    path.write_text(page(), encoding="utf-8")
