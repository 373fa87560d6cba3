"""Point clouds to work on: files in the usual formats, and a room made on the spot.

cloud = kpcore.scenes.read("scan.laz")     # PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, XYZ / TXT / CSV, KITTI .bin
cloud = kpcore.scenes.indoor(1_000_000)    # labelled, coloured, no download
"""

from .indoor import indoor
from .readers import Cloud, ReadError, read

__all__ = ["Cloud", "ReadError", "indoor", "read"]
