"""Point clouds to work on: read from files, a made-up indoor scan, or made-up objects.

cloud = kpcore.scenes.read("scan.laz")     # kpcore.io.read: PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, text, KITTI .bin
cloud = kpcore.scenes.indoor(1_000_000)    # labelled, coloured, no download
cloud = kpcore.scenes.shapes("chair", seed=3)    # one of ten CATEGORIES, labelled by part
"""

from kpcore.io import Cloud, ReadError, read

from .indoor import indoor
from .shapes import CATEGORIES, PART_LABELS, shapes

__all__ = ["CATEGORIES", "PART_LABELS", "Cloud", "ReadError", "indoor", "read", "shapes"]
