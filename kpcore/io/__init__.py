"""Reading point cloud files into a `Cloud`, and writing copies of them with other labels.

cloud = kpcore.io.read("scan.laz")     # PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, XYZ / TXT / CSV / PTS, sweeps in .bin
kpcore.io.write_labels("scan.laz", "labelled.laz", labels, kept=cloud.kept)
"""

from .cloud import Cloud, ReadError
from .formats import read, write_labels

__all__ = ["Cloud", "ReadError", "read", "write_labels"]
