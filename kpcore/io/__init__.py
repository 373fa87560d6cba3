"""Reading point cloud files into a `Cloud`, writing copies of them with other labels, and sampling points of meshes.

cloud = kpcore.io.read("scan.laz")     # PLY, PCD, LAS / LAZ / COPC, NPY / NPZ, XYZ / TXT / CSV / PTS, sweeps in .bin
kpcore.io.write_labels("scan.laz", "labelled.laz", labels, kept=cloud.kept)
kpcore.io.faults(cloud)                # what looks wrong: zeros, duplicates, a crowded place
names = kpcore.io.field_names("scan.laz")     # without reading the points
points = kpcore.io.sample_mesh("chair.off", 10_000)     # OFF, PLY with faces
"""

from .cloud import Cloud, ReadError
from .duplicates import faults
from .formats import field_names, read, write_labels
from .mesh import Mesh, read_mesh, sample_mesh
from .reference import Reference

__all__ = [
    "Cloud", "Mesh", "ReadError", "Reference", "faults", "field_names", "read", "read_mesh", "sample_mesh",
    "write_labels",
]  # fmt: skip
