"""What the commands share: progress bars, options that are refused, folders for what comes out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kpcore.pipeline.voting import Scores

BAR = {"bar_format": "{desc:26}{bar:30}{percentage:4.0f} %  {rate_fmt}  {elapsed}<{remaining}{postfix}", "leave": False,
       "ncols": 110, "nrows": 24, "disable": None, "unit": " steps"}  # fmt: skip
PLAIN = "{desc:26}{bar:30}{percentage:4.0f} %  {elapsed}<{remaining}"


class Refused(ValueError):
    """The options cannot be carried out."""


def of_classes(scores: Scores) -> str:
    """Of how many classes a mean IoU is, where not of all."""
    there = sum(value is not None for value in scores["iou"].values())
    return "" if there == len(scores["iou"]) else f" over {there} of {len(scores['iou'])} classes"


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from None
