"""What the libraries of points in stacked batches share: names of arguments, and samples of a size for each item."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

import kpcore
from kpcore.backends import devices


@contextmanager
def argument_names(**names: str) -> Iterator[None]:
    """Errors of kpcore's functions speak of arguments by the names that another library has for them.

    `names`: {name in kpcore: name in the other library}.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if error.args and isinstance(error.args[0], str):
            pattern = rf"\b({'|'.join(names)})\b"
            error.args = (re.sub(pattern, lambda match: names[match[0]], error.args[0]), *error.args[1:])
        raise


def farthest_points(points: np.ndarray, counts: np.ndarray, row_splits: np.ndarray, start: int | np.ndarray
                    ) -> np.ndarray:  # fmt: skip
    """The index (S,) int32 of `counts[b]` points of each batch item b, chosen as by `kpcore.farthest_point_sampling`.

    `counts`, (B,) int64 on the host, must not exceed the number of points of any item. All items are sampled with the
    largest of them: the first points chosen do not depend on how many are.
    """
    most = int(counts.max(initial=0))
    if not most:
        return devices.namespace(points).empty(0, np.int32)
    index, bounds = kpcore.farthest_point_sampling(points, most, row_splits=row_splits, start=start)
    if len(index) == counts.sum():
        return index
    ends = np.cumsum(counts)
    rows = np.arange(int(ends[-1])) + np.repeat(devices.on_host(bounds)[:-1] - ends + counts, counts)
    return index[devices.to_device_of(index, rows)]
