"""Point clouds to work on: read from files, a made-up indoor scan, a made-up city, or made-up objects.

cloud = kpcore.scenes.read("scan.laz")     # kpcore.io.read: PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, text, KITTI .bin
cloud = kpcore.scenes.indoor(1_000_000)    # labelled, coloured, no download
cloud = kpcore.scenes.shapes("chair", seed=3)    # one of ten CATEGORIES, labelled by part
cloud = kpcore.scenes.city((155_000, 463_000), (155_200, 463_200))    # airborne, labelled; any box of an endless world
files = kpcore.scenes.write_city("tiles", (155_000, 463_000), (156_000, 464_000), tiles=(2, 2))    # LAZ, any size
"""

from kpcore.io import Cloud, ReadError, read

from .city import CITY_CLASSES, city, write_city
from .indoor import indoor
from .shapes import CATEGORIES, PART_LABELS, shapes

__all__ = [
    "CATEGORIES", "CITY_CLASSES", "PART_LABELS", "Cloud", "ReadError", "city", "indoor", "read", "shapes", "write_city",
]  # fmt: skip
