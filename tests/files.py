"""Files written byte by byte: the oracle of the readers."""

import io
import struct

import numpy as np
import pytest

from kpcore import scenes

POINTS = np.array([[1.5, -2, 0.25], [3, 4.125, -1], [0, 0.5, 2], [10, 20, 30]])
COLORS = np.array([[255, 0, 10], [1, 2, 3], [9, 80, 70], [200, 201, 202]], np.uint8)
LABELS = np.array([3, 0, 7, 3], np.int32)
TABLE = np.column_stack([POINTS, COLORS, LABELS])


def ply(points, binary=True, kind="float"):
    form = "binary_little_endian" if binary else "ascii"
    axes = "".join(f"property {kind} {axis}\n" for axis in "xyz")
    rest = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue", "label"))
    head = f"ply\nformat {form} 1.0\ncomment by hand\nelement vertex {len(points)}\n{axes}{rest}end_header\n"
    layout = "<" + ("f" if kind == "float" else "d") * 3 + "4B"
    rows = list(zip(points, COLORS, LABELS, strict=True))
    if binary:
        return head.encode() + b"".join(struct.pack(layout, *p, *c, label) for p, c, label in rows)
    return head.encode() + "".join(" ".join(map(str, (*p, *c, label))) + "\n" for p, c, label in rows).encode()


def lzf(data):
    """Runs of at most 32 literal bytes: valid LZF that compresses nothing."""
    return b"".join(bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32))


def pcd(points, encoding, width=None, height=1):
    width = len(points) if width is None else width
    packed = (COLORS.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)).astype(np.uint32)
    x, y, z = np.array(points, np.float32).T
    curve = np.zeros((len(points), 2), np.float32)  # a field of two numbers, in front of what matters
    rgb, label = packed.view(np.float32), LABELS.astype(np.uint16)
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS curve x y z rgb label\nSIZE 4 4 4 4 4 2\n"
        f"TYPE F F F F F U\nCOUNT 2 1 1 1 1 1\nWIDTH {width}\nHEIGHT {height}\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {width * height}\nDATA {encoding}\n"
    ).encode()
    if encoding == "ascii":
        rows = zip(x, y, z, rgb, label, strict=True)
        return head + "".join(f"0  0 {a} {b} {c} {float(d)!r}\t{e}\n" for a, b, c, d, e in rows).encode()
    fields = [curve, x, y, z, rgb, label]
    if encoding == "binary":
        return head + b"".join(b"".join(field[i].tobytes() for field in fields) for i in range(len(points)))
    plain = b"".join(field.tobytes() for field in fields)
    return head + struct.pack("<II", len(lzf(plain)), len(plain)) + lzf(plain)


def las(points, offset=(0, 0, 0), scale=0.125):
    """LAS 1.2, point format 2, colours in 16 bits."""
    whole = np.round((points - np.array(offset)) / scale).astype(int)
    head = struct.pack("<4sHHIHH8sBB32s32sHH", b"LASF", 0, 0, 0, 0, 0, b"", 1, 2, b"", b"", 1, 2026)
    head += struct.pack("<HIIBHI5I", 227, 227, 0, 2, 26, len(points), *[len(points)] * 5)
    head += struct.pack(
        "<12d", scale, scale, scale, *offset, *np.ravel(list(zip(points.max(0), points.min(0), strict=True)))
    )
    rows = zip(whole, COLORS.astype(int) * 256, LABELS, strict=True)
    return head + b"".join(struct.pack("<3iHBBbBH3H", *p, 0, 9, label, 0, 0, 0, *c) for p, c, label in rows)


def laz(points, form=2):
    laspy = pytest.importorskip("laspy")
    pytest.importorskip("lazrs")
    header = laspy.LasHeader(point_format=form, version="1.2" if form < 6 else "1.4")
    header.scales = [0.125] * 3
    data = laspy.LasData(header)
    data.x, data.y, data.z = points.T
    data.classification = LABELS
    data.red, data.green, data.blue = COLORS.T.astype(np.uint16) * 256
    out = io.BytesIO()
    data.write(out, do_compress=True, laz_backend=laspy.LazBackend.Lazrs)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(**arrays):
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def structured(points):
    table = np.zeros(
        len(points), [("Y", "f8"), ("X", "f8"), ("Z", "f8"), ("R", "f4"), ("G", "f4"), ("B", "f4"), ("Class", "i8")]
    )
    for name, column in zip("XYZ", points.T, strict=True):
        table[name] = column
    for name, column in zip("RGB", COLORS.T / 255, strict=True):
        table[name] = column
    table["Class"] = LABELS
    return table


def text(points, separator, header=""):
    rows = zip(points, COLORS, LABELS, strict=True)
    return (header + "".join(separator.join(map(str, (*p, *c, label))) + "\n" for p, c, label in rows)).encode()


FILES = {
    "binary.ply": lambda p: ply(p),
    "double.ply": lambda p: ply(p, kind="double"),
    "ascii.ply": lambda p: ply(p, binary=False, kind="double"),
    "ascii.pcd": lambda p: pcd(p, "ascii"),
    "binary.pcd": lambda p: pcd(p, "binary"),
    "compressed.pcd": lambda p: pcd(p, "binary_compressed"),
    "plain.las": las,
    "packed.laz": laz,
    "layered.laz": lambda p: laz(p, 7),
    "table.npy": lambda p: npy(np.column_stack([p, COLORS, LABELS])),
    "fields.npy": lambda p: npy(structured(p)),
    "arrays.npz": lambda p: npz(points=p, colors=COLORS, labels=LABELS),
    "table.npz": lambda p: npz(anything=np.column_stack([p, COLORS, LABELS])),
    "spaces.xyz": lambda p: text(p, " ", "# made by hand\n\n"),
    "named.xyz": lambda p: text(p, "  ", "//X Y Z R G B Classification\n"),
    "commas.csv": lambda p: text(p, " , ", "\ufeffx,y,z,red,green,blue,label\n"),
    "semicolons.csv": lambda p: text(p, ";"),
    "tabs.txt": lambda p: text(p, "\t", '"x"\t"y"\t"z"\t"r"\t"g"\t"b"\t"label"\n'),
    "scan.bin": lambda p: np.column_stack([p, np.ones(4)]).astype(np.float32).tobytes(),
}
NEEDS = {".laz": "lazrs"}


def patched(data, at, layout, *values):
    """The data with some bytes of it replaced."""
    new = struct.pack(layout, *values)
    return data[:at] + new + data[at + len(new) :]


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(scenes.ReadError) as refused:
        scenes.read(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line.removeprefix(f"{path}: ")
