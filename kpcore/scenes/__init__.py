"""Point clouds to work on: read from files, or a made-up indoor scan.

cloud = kpcore.scenes.read("scan.laz")     # kpcore.io.read: PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, text, KITTI .bin
cloud = kpcore.scenes.indoor(1_000_000)    # labelled, coloured, no download
"""

from kpcore.io import Cloud, ReadError, read

from .indoor import indoor

__all__ = ["Cloud", "ReadError", "indoor", "read"]
