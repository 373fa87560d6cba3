"""Colours of classes: of ASPRS classes, of the settings, and others that are told apart."""

import numpy as np
import pytest

from kpcore.pipeline import colors
from kpcore.pipeline.settings import from_dict


def settings(classes, files="a.laz", **data):
    data = {"train": [files], "classes": classes} | data
    return from_dict({"data": data, "network": {"voxel_size": 1.0, "levels": 2}})


def hex_of(rows):
    return ["#" + bytes(row).hex() for row in np.asarray(rows, np.uint8)]


AHN = {"other": [1], "ground": [2], "building": [6], "bridge": [26]}


@pytest.mark.parametrize(("classes", "files", "more", "expected"), [
    (AHN, "a.laz", {}, True),
    (AHN, "a.ply", {}, True),  # by two names
    ({"other": [1], "ground": [2]}, "a.ply", {}, False),  # one is not enough
    ({"sol": [2], "batiment": [6]}, "a.LAS", {}, True),  # no name that contradicts
    ({"sol": [2], "batiment": [6]}, "a.ply", {}, False),
    ({"sol": [2], "batiment": [6]}, "a.las", {"label": "semantic"}, False),  # another field
    ({"sol": [2], "batiment": [6]}, "a.las", {"label": "Classification"}, True),
    ({"sol": [2], "batiment": [6]}, "a.las", {"test": ["b.ply"]}, False),
    ({"sol": [2], "batiment": [6]}, "a.las", {"validation": ["b.ply"]}, False),
    ({"sol": [2], "batiment": [6]}, "a.las", {"validation": 0.1}, True),
    ({"sol": [2], "batiment": [6]}, {"indoor": 1}, {}, False),
    ({"vegetation": [3, 4, 5], "water tower": [15]}, "a.las", {}, True),
    # DALES, in LAS files; SemanticKITTI, its files and its benchmark; Toronto-3D
    ({"ground": [1], "vegetation": [2], "cars": [3], "buildings": [8]}, "a.las", {}, False),
    ({"car": [10], "road": [40], "building": [50], "vegetation": [70], "terrain": [72]}, "a.las", {}, False),
    ({"car": [1], "road": [9], "building": [13], "vegetation": [15], "terrain": [17]}, "a.bin", {}, False),
    ({"car": [1], "road": [9]}, "a.las", {}, False),
    ({"road": [1], "natural": [3], "building": [4]}, "a.ply", {}, False),
])  # fmt: skip
def test_which_labels_are_asprs_classes(classes, files, more, expected):
    assert colors.are_asprs(settings(classes, files, **more)) == expected


def test_colours_of_classes():
    got = hex_of(colors.class_colors(settings(AHN)))
    assert got[:3] == [colors.ASPRS[code] for code in (1, 2, 6)] and len({*got}) == 4
    # The first label of a class counts, which is the one that is written for it.
    assert hex_of(colors.class_colors(settings({"veg": [5, 3], "sol": [2]})))[0] == colors.ASPRS[5]
    chosen = hex_of(colors.class_colors(settings(AHN, colors={"ground": "#FF0001", "bridge": "#010203"})))
    assert chosen == [got[0], "#ff0001", got[2], "#010203"]
    other = settings({"a": [1], "b": [2], "c": [3]}, "a.ply", colors={"b": "#0072B3"})
    # The first colour would look like that of b.
    assert hex_of(colors.class_colors(other)) == ["#e69f00", "#0072b3", "#009e73"]


def test_colours_of_digits_and_objects():
    digits = {"data": {"train": [{"images": "a", "labels": "b"}], "features": ["value"], "colors": {"3": "#ffffff"}},
              "network": {"voxel_size": 1.0, "levels": 2}}  # fmt: skip
    got = colors.class_colors(from_dict(digits))
    assert got.shape == (10, 3) and got.dtype == np.uint8 and (got[3] == 255).all()


def seen_as_by_deuteranopes(rows):
    """Linear RGB -> cones of Hunt, Pointer and Estevez -> M from L and S, by Vienot, Brettel and Mollon (1999)."""
    linear = np.where(rows / 255 <= 0.04045, rows / 255 / 12.92, ((rows / 255 + 0.055) / 1.055) ** 2.4)
    cones = (
        linear @ np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]).T
    )
    seen = np.column_stack([cones[:, 0], 0.494207 * cones[:, 0] + 1.24827 * cones[:, 2], cones[:, 2]])
    back = np.array(
        [[0.080944, -0.130504, 0.116721], [-0.0102485, 0.0540194, -0.113615], [-0.000365294, -0.00412163, 0.693513]]
    )
    return (seen @ back.T).clip(0, 1)


def lightness_and_blueness(linear):
    """What is left of a colour without the difference of red and green: CIE L* and b*, in hundredths."""
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    xyz = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.column_stack([1.16 * xyz[:, 1] - 0.16, 2 * (xyz[:, 1] - xyz[:, 2])])


def nearest_pair(rows):
    at = lightness_and_blueness(seen_as_by_deuteranopes(rows.astype(float)))
    distance = np.linalg.norm(at[:, None] - at, axis=2)
    return distance[~np.eye(len(at), dtype=bool)].min()


def test_colours_are_told_apart_by_colour_blind_readers():
    """By another simulation and another distance than those by which the colours are chosen."""
    codes = (1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 15, 17)
    assert nearest_pair(np.array([[int(colors.ASPRS[c][i : i + 2], 16) for i in (1, 3, 5)] for c in codes])) > 0.12
    usual = np.array([[0xAA, 0x55, 0], [0, 0x80, 0]])  # brown ground, green vegetation
    assert nearest_pair(usual) < 0.1
    assert nearest_pair(colors.distinct_colors(7)) > 0.12
    assert nearest_pair(colors.distinct_colors(15)) > 0.06


def test_distinct_colours():
    many = colors.distinct_colors(70)
    assert many.shape == (70, 3) and len({*hex_of(many[:64])}) == 64 and (many[64:] == many[:6]).all()
    assert colors.distinct_colors(0).shape == (0, 3)
    taken = np.array([[0, 114, 178], [240, 228, 66]], np.uint8)
    rest = colors.distinct_colors(20, taken)
    assert not {*hex_of(taken)} & {*hex_of(rest)} and hex_of(rest)[:2] == ["#e69f00", "#009e73"]
    assert (many[:20] == colors.distinct_colors(20)).all()  # more classes change no colour of the first
