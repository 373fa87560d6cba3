"""The way from scans to labels: settings, scenes in memory, batches, training, voting, segmentation and surveys."""

from __future__ import annotations

__all__ = ["segment_tiles"]


def __getattr__(name: str) -> object:
    if name == "segment_tiles":
        from kpcore.pipeline.tiled import segment_tiles

        return segment_tiles
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
