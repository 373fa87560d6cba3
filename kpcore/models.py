"""Trained models, which are called from Python without a framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from kpcore.pipeline.model import Model

__all__ = ["load_model"]


def load_model(path: str | os.PathLike[str]) -> Model:
    """Load a trained model, to label points with it. It needs NumPy and SciPy alone.

    Parameters
    ----------
    path : str or Path
        A best.safetensors or last.safetensors that ``kpcore train`` wrote, or a file of ``kpcore convert``.

    Returns
    -------
    Model
        With `classes`, `features`, `voxel_size`, `summary` and `predict`.

    Raises
    ------
    ValueError
        The file is damaged, or holds no trained model; the message names it.
    OSError
        It cannot be read.

    Examples
    --------
    >>> import kpcore as kp
    >>> model = kp.load_model("runs/ahn3/best.safetensors")              # doctest: +SKIP
    >>> result = model.predict(points, intensity=intensity)              # doctest: +SKIP
    >>> result.labels, result.confidence, result.warnings                # doctest: +SKIP
    """
    from kpcore.pipeline.model import Model  # with all of the pipeline, which other users of kpcore do not need

    return Model.load(path)
