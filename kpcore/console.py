"""Shared by the commands: formats of progress bars, the error for invalid options, output folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kpcore.pipeline.voting import Scores

BAR = {"bar_format": "{desc:26}{bar:30}{percentage:4.0f} %  {rate_fmt}  {elapsed}<{remaining}{postfix}", "leave": False,
       "ncols": 110, "nrows": 24, "disable": None, "unit": " steps"}  # fmt: skip
BAR_WITHOUT_RATE = "{desc:26}{bar:30}{percentage:4.0f} %  {elapsed}<{remaining}"


class Refused(ValueError):
    """The options of a command are invalid or do not fit its input."""


def classes_in_mean(scores: Scores) -> str:
    """Text after a mean IoU that says over how many classes it is; empty if over all."""
    counted = sum(value is not None for value in scores["iou"].values())
    return "" if counted == len(scores["iou"]) else f" over {counted} of {len(scores['iou'])} classes"


def make_folder(out: Path) -> None:
    """Make the folder of --out, unless it exists."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from None
