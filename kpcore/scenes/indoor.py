"""A made-up indoor scan: a furnished flat of boxes and turned profiles, seen from three tripods, with light."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kpcore.io import Cloud
from kpcore.scenes import surfaces

NAMES = (
    "ceiling", "floor", "wall", "window", "door", "column", "table", "chair",
    "sofa", "bookcase", "books", "lamp", "board", "plant", "clutter",
)  # fmt: skip
CEILING, FLOOR, WALL, WINDOW, DOOR, COLUMN, TABLE, CHAIR, SOFA, BOOKCASE, BOOKS, LAMP, BOARD, PLANT, CLUTTER = range(15)
PLAIN, WOOD, PLANKS, WOVEN = range(4)  # textures

HEIGHT = 2.7
DEPTH = 5.4  # both rooms span y = 0 .. DEPTH; a wall at x = SPLIT separates them
SPLIT, WIDTH = 7.0, 11.0
TRIPODS = np.array([[1.9, 1.2, 1.5], [5.3, 3.3, 1.6], [9.3, 2.4, 1.5]], np.float32)
LAMPS = np.array([[2.3, 3.0, 2.0], [9.1, 2.7, 2.6]], np.float32)
SUN = np.array([20.0, 45.0, 29.0], np.float32)
NOISE = 0.002  # standard deviation along the normal, in metres

OAK, WALNUT, PINE = (168, 122, 78), (104, 70, 48), (206, 170, 124)
WHITE, PAPER, STEEL, BLACK = (236, 234, 228), (226, 220, 206), (150, 152, 156), (38, 38, 42)


def indoor(num_points: int = 1_000_000, seed: int = 0) -> Cloud:
    """A labelled, coloured indoor scan of two furnished rooms, in metres; the same for the same seed.

    The points lie on the surfaces that three terrestrial scanners see: denser near a tripod and where a surface faces
    it, none behind furniture, with 2 mm of range noise. `labels` index `names`.

    >>> cloud = indoor(1000)
    >>> cloud.points.shape, cloud.names[0]
    ((1000, 3), 'ceiling')
    """
    num_points = int(num_points)
    if num_points < 1:
        raise ValueError(f"num_points: expected at least 1, got {num_points}")
    rng = np.random.default_rng(seed)
    corners, colors, labels, textures = (np.array(part) for part in zip(*_flat(rng), strict=True))
    colors, labels = colors.astype(np.float32), labels.astype(np.int32)
    parts, num_seen = [], 0
    while num_seen < num_points:
        parts.append(_scan(rng, corners, colors, labels, textures, int(1.5 * (num_points - num_seen)) + 500))
        num_seen += len(parts[-1][0])
    points, rgb, label = (np.concatenate(part) for part in zip(*parts, strict=True))
    keep = np.sort(rng.permutation(num_seen)[:num_points])
    return Cloud(points[keep], rgb[keep], label[keep], np.zeros(3), names=NAMES)


def _scan(rng, corners, colors, labels, textures, count):
    """(points, colours with light, labels) of points on the surfaces that a tripod sees, at most `count`."""
    origin, along, across = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    twist = corners[:, 3] - corners[:, 2] - along

    # Cells of at most 20 cm, each sampled with one density.
    rows = np.ceil(np.linalg.norm(along, axis=1) / 0.2).clip(1).astype(int)
    columns = np.ceil(np.maximum(*np.linalg.norm([across, across + twist], axis=2)) / 0.2).clip(1).astype(int)
    quad = np.repeat(np.arange(len(corners)), rows * columns)
    cell = np.arange(len(quad)) - np.repeat(np.cumsum(rows * columns) - rows * columns, rows * columns)
    row, column = cell // columns[quad], cell % columns[quad]
    u, v = ((row + 0.5) / rows[quad])[:, None], ((column + 0.5) / columns[quad])[:, None]
    center = origin[quad] + u * along[quad] + v * across[quad] + u * v * twist[quad]
    normal = np.cross(along[quad] + v * twist[quad], across[quad] + u * twist[quad])
    area = np.linalg.norm(normal, axis=1)
    normal /= area[:, None]
    density = 0.25
    for tripod in TRIPODS:
        ray = center - tripod
        squared = (ray * ray).sum(axis=1)
        density = density + np.abs((ray * normal).sum(axis=1)) / np.sqrt(squared) / np.maximum(squared, 0.8)
    weight = area / (rows * columns)[quad] * np.minimum(density, 1.2)
    chosen = np.repeat(np.arange(len(quad)), rng.multinomial(count, weight / weight.sum()))

    quad, normal = quad[chosen], normal[chosen].astype(np.float32)
    u = ((row[chosen] + rng.random(count, np.float32)) / rows[quad]).astype(np.float32)[:, None]
    v = ((column[chosen] + rng.random(count, np.float32)) / columns[quad]).astype(np.float32)[:, None]
    origin, along, across, twist = (part.astype(np.float32) for part in (origin, along, across, twist))
    points = origin[quad] + u * along[quad] + v * (across[quad] + u * twist[quad])

    side = np.zeros(count, np.float32)  # 1 or -1 for the side of its surface that a tripod sees; 0: seen by none
    for tripod in TRIPODS:
        seen, cosine, _ = _lit(points, normal, tripod, 0.008)
        side = np.where(seen, np.sign(cosine), side)
    seen = np.flatnonzero(side)
    points, normal, quad = points[seen], normal[seen] * side[seen, None], quad[seen]
    light = 0.66 + 0.10 * normal[:, 2] ** 2
    for lamp in LAMPS:
        reached, cosine, distance = _lit(points, normal, lamp, 0.012)
        light += reached * 1.1 * cosine.clip(0) / (0.6 + distance * distance)
    reached, cosine, _ = _lit(points, normal, SUN, 0.0006)
    light += reached * 0.55 * cosine.clip(0)
    light[labels[quad] == LAMP] += 0.4

    rgb = colors[quad] * (light * _grain(rng, points, textures[quad]))[:, None]
    points += (NOISE * rng.standard_normal(len(points), np.float32))[:, None] * normal
    return points, rgb.clip(0, 255).astype(np.uint8), labels[quad]


def _lit(points, normal, eye, resolution):
    """(whether visible, cosine of incidence, distance) of points from `eye`.

    A point is visible if it is about as near as the nearest one in its bin of an octahedral map of directions.
    """
    ray = points - eye
    distance = np.sqrt(np.einsum("ij,ij->i", ray, ray))
    cosine = -np.einsum("ij,ij->i", ray, normal) / distance
    flat = ray[:, :2] / np.abs(ray).sum(axis=1)[:, None]
    below = ray[:, 2] < 0
    flat[below] = np.copysign(1 - np.abs(flat[below][:, ::-1]), flat[below])
    side = int(2 / resolution) + 2
    bins = ((flat + 1) / np.float32(resolution)).astype(np.int32)
    bins = bins[:, 0] * side + bins[:, 1]
    nearest = np.full(side * side, np.inf, np.float32)
    np.minimum.at(nearest, bins, distance)
    slack = 0.02 + resolution * distance * (
        1 + 1 / np.abs(cosine).clip(0.12)
    )  # depth of a slanted surface within a bin
    return distance <= nearest[bins] + slack, cosine, distance


def _grain(rng, points, texture):
    """The brightness of the texture of each point, around 1."""
    grain = 0.97 + 0.06 * rng.random(len(points), np.float32)
    wood, planks, woven = ((texture == kind).nonzero()[0] for kind in (WOOD, PLANKS, WOVEN))
    x, y, z = points[wood].T
    grain[wood] *= 1 + 0.10 * np.sin(60 * (y + z) + 5 * np.sin(3 * x) + 9 * np.sin(1.3 * z))
    x, y, _ = points[planks].T
    board = np.floor(y / 0.14)
    length = np.floor(x / 1.1 + 0.37 * board)
    grain[planks] *= 0.84 + 0.3 * ((board * 7.13 + length * 3.71) % 1) + 0.04 * np.sin(90 * y + 4 * np.sin(2 * x))
    grain[planks] *= np.where(y - 0.14 * board < 0.008, 0.7, 1)
    grain[woven] *= 0.86 + 0.28 * rng.random(len(woven), np.float32)
    return grain


def _box(size, color, label, at=(0, 0, 0), texture=PLAIN, sides="xXyYzZ"):
    """The faces of a box that stands on `at`. In `sides` x, y, z are the low faces and X, Y, Z the high ones."""
    return [(face, color, label, texture) for face in surfaces.box(size, at, sides)]


def _turned(profile, color, label, at=(0, 0, 0), texture=PLAIN, sides=20):
    """A profile of (radius, height) rotated about the vertical: legs, pots, lamps, columns, spheres."""
    return [(face, color, label, texture) for face in surfaces.turned(profile, at, sides)]


def _sphere(radius, color, label, at):
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)
    return _turned(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), color, label, at, sides=16)


def _put(parts, x, y, z=0.0, yaw=0.0):
    """Parts rotated about the vertical, then moved."""
    rotation = surfaces.rotation(yaw)
    return [(corners @ rotation + [x, y, z], *rest) for corners, *rest in parts]


def _wall(start, end, color, holes=()):
    """A wall from start to end (x, y) with holes (from, to, bottom, top) along its length."""
    start, end = np.array(start, float), np.array(end, float)
    length = np.linalg.norm(end - start)
    across = sorted({0.0, length, *(edge for hole in holes for edge in hole[:2])})
    levels = sorted({0.0, HEIGHT, *(edge for hole in holes for edge in hole[2:])})
    parts = []
    for u0, u1 in pairwise(across):
        for z0, z1 in pairwise(levels):
            if not any(hole[0] < (u0 + u1) / 2 < hole[1] and hole[2] < (z0 + z1) / 2 < hole[3] for hole in holes):
                ends = [start + u / length * (end - start) for u in (u0, u1)]
                face = np.array([[*ends[u], z] for u, z in ((0, z0), (1, z0), (0, z1), (1, z1))])
                parts.append((face, color, WALL, PLAIN))
    return parts


def _frame(width, bottom, top, color, label, depth=0.14, bar=0.06):
    """A window or door frame along x, centred on the origin."""
    height = top - bottom
    parts = _box((width, depth, bar), color, label, (0, 0, top - bar))
    for x in (-1, 1):
        parts += _box((bar, depth, height), color, label, (x * (width - bar) / 2, 0, bottom))
    return parts


def _window(width, bottom, top):
    parts = _frame(width, bottom, top, WHITE, WINDOW) + _box((width, 0.14, 0.06), WHITE, WINDOW, (0, 0, bottom))
    parts += _box((0.06, 0.06, top - bottom), WHITE, WINDOW, (0, 0, bottom))
    parts += _box((width + 0.1, 0.24, 0.04), WHITE, WINDOW, (0, -0.14, bottom - 0.04))
    for x in np.arange(-width / 2 + 0.1, width / 2 - 0.05, 0.07):  # the radiator below
        parts += _box((0.045, 0.07, 0.55), WHITE, WINDOW, (x, -0.1, 0.14), sides="xXyZ")
    return parts


def _door(width, height, swing):
    leaf = _box((width - 0.1, 0.04, height - 0.06), (222, 214, 200), DOOR, ((width - 0.1) / 2, 0, 0.01))
    leaf += _sphere(0.03, STEEL, DOOR, (width - 0.18, -0.06, 1.02))
    return _frame(width, 0, height, WHITE, DOOR, bar=0.05) + _put(leaf, -width / 2 + 0.05, 0, yaw=swing)


def _table(length, width, height, color, label=TABLE):
    parts = _box((length, width, 0.04), color, label, (0, 0, height - 0.04), WOOD)
    for x in (-1, 1):
        for y in (-1, 1):
            at = (x * (length / 2 - 0.06), y * (width / 2 - 0.06), 0)
            parts += _box((0.06, 0.06, height - 0.04), color, label, at, WOOD, "xXyY")
    return parts


def _chair(color, seat):
    """It faces -y."""
    parts = _box((0.44, 0.43, 0.04), seat, CHAIR, (0, 0, 0.44), WOVEN)
    for x in (-0.19, 0.19):
        parts += _box((0.04, 0.04, 0.44), color, CHAIR, (x, -0.18, 0), WOOD, "xXyY")
        parts += _box((0.04, 0.04, 0.90), color, CHAIR, (x, 0.20, 0), WOOD)
    for z in (0.58, 0.70, 0.82):
        parts += _box((0.36, 0.02, 0.07), color, CHAIR, (0, 0.20, z), WOOD)
    return parts


def _sofa(length, color):
    """It faces -y."""
    dark, light = (tuple(int(c * f) for c in color) for f in (0.8, 1.1))
    parts = _box((length, 0.9, 0.24), dark, SOFA, (0, 0, 0.08), WOVEN)
    parts += _box((length, 0.24, 0.50), color, SOFA, (0, 0.33, 0.32), WOVEN)
    for x in (-1, 1):
        parts += _box((0.2, 0.9, 0.32), color, SOFA, (x * (length / 2 - 0.1), 0, 0.32), WOVEN)
    for x in np.linspace(-1, 1, 3) * (length - 0.4) / 3:
        parts += _box(((length - 0.42) / 3, 0.62, 0.14), light, SOFA, (x, -0.12, 0.32), WOVEN)
    cushion = _box((0.42, 0.12, 0.40), (196, 146, 62), SOFA, (0, 0, 0), WOVEN)
    return parts + _put(cushion, -0.6, 0.12, 0.46, 0.4) + _put(cushion, 0.7, 0.14, 0.46, -0.2)


def _bookcase(rng, length, height, color, depth=0.3):
    """Its back is at y = 0, it faces -y; rows of books with gaps, and a few vases."""
    parts = _box((length, 0.02, height), color, BOOKCASE, (0, -0.01, 0), WOOD, "y")
    for x in np.linspace(-0.5, 0.5, 4) * (length - 0.03):
        parts += _box((0.03, depth, height), color, BOOKCASE, (x, -depth / 2, 0), WOOD, "xXyZ")
    spines = [
        (150, 48, 42), (36, 72, 110), (52, 96, 72), (214, 190, 140), (60, 56, 62),
        (196, 120, 44), (230, 226, 214), (112, 60, 92), (72, 128, 148),
    ]  # fmt: skip
    shelves = np.arange(0.06, height - 0.2, 0.36)
    for z in [*shelves, height - 0.03]:
        parts += _box((length, depth, 0.025), color, BOOKCASE, (0, -depth / 2, z), WOOD, "yzZ")
    for z in shelves:
        x = -length / 2 + 0.05
        while x < length / 2 - 0.1:
            if rng.random() < 0.07:
                vase = [(0.0, 0.0), (0.045, 0.0), (0.07, 0.08), (0.03, 0.17), (0.04, 0.21)]
                if rng.random() < 0.5:
                    parts += _turned(vase, PAPER, CLUTTER, (x + 0.1, -0.14, z + 0.025), sides=12)
                x += 0.22
                continue
            thick, tall, deep = rng.uniform([0.02, 0.19, 0.14], [0.055, 0.29, 0.22])
            at, spine = (x + thick / 2, -depth + 0.05 + deep / 2, z + 0.025), spines[rng.integers(len(spines))]
            parts += _box((thick - 0.002, deep, tall), spine, BOOKS, at, sides="xXyZ")
            x += thick
    return parts


def _plant(rng, size):
    pot = [(0, 0.01), (0.14, 0.01), (0.19, 0.34), (0.17, 0.34), (0.16, 0.30), (0, 0.30)]
    parts = _turned(pot, (176, 98, 66), PLANT)
    for _ in range(110):
        angle, lean = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 1.0)
        reach = size * rng.uniform(0.35, 1.0)
        out = np.array([np.cos(angle) * np.sin(lean), np.sin(angle) * np.sin(lean), np.cos(lean)])
        side = 0.05 * np.array([-np.sin(angle), np.cos(angle), 0.3])
        base = np.array([0, 0, 0.3]) + 0.55 * reach * out
        tip = base + 0.45 * reach * (out - [0, 0, 0.7 * lean])
        color = (48 + int(40 * rng.random()), 96 + int(60 * rng.random()), 44)
        parts.append((np.array([base - side, base + side, tip - side / 3, tip + side / 3]), color, PLANT, PLAIN))
    return parts


def _picture(width, height, colors):
    """It hangs at y = 0 and faces -y, centred on the origin."""
    parts = _box((width + 0.06, 0.03, height + 0.06), BLACK, BOARD, (0, -0.015, -height / 2 - 0.03))
    edges = np.linspace(-height / 2, height / 2, len(colors) + 1)
    for low, high, color in zip(edges[:-1], edges[1:], colors, strict=True):
        parts += _box((width, 0.01, high - low), color, BOARD, (0, -0.035, low), sides="y")
    return parts


def _desk(rng):
    parts = _table(1.7, 0.75, 0.74, PINE)
    parts += _box((0.62, 0.03, 0.36), BLACK, CLUTTER, (-0.1, 0.18, 0.86))  # the screen, on its stand
    parts += _box((0.04, 0.04, 0.16), STEEL, CLUTTER, (-0.1, 0.22, 0.74))
    parts += _box((0.20, 0.16, 0.02), STEEL, CLUTTER, (-0.1, 0.20, 0.74))
    parts += _box((0.44, 0.15, 0.025), WHITE, CLUTTER, (-0.1, -0.16, 0.74))
    for i in range(5):
        sheet = _box((0.21, 0.297, 0.012), WHITE, CLUTTER, sides="xXyYZ")
        parts += _put(sheet, 0.55 + 0.02 * rng.standard_normal(), -0.05, 0.74 + 0.012 * i, rng.uniform(-0.3, 0.3))
    mug = [(0, 0), (0.04, 0), (0.04, 0.1), (0.034, 0.1), (0.034, 0.02), (0, 0.02)]
    return parts + _turned(mug, (54, 96, 128), CLUTTER, (-0.6, -0.1, 0.74), sides=12)


def _office_chair():
    parts = _turned([(0.24, 0.46), (0.25, 0.5), (0.22, 0.54), (0, 0.55)], (48, 58, 74), CHAIR, texture=WOVEN)
    parts += _turned([(0.03, 0.08), (0.03, 0.46)], STEEL, CHAIR, sides=10)
    foot = _box((0.30, 0.04, 0.03), BLACK, CHAIR, (0.15, 0, 0.07)) + _sphere(0.03, BLACK, CHAIR, (0.29, 0, 0.03))
    for angle in np.arange(5) * 2 * np.pi / 5:
        parts += _put(foot, 0, 0, yaw=angle)
    return parts + _box((0.42, 0.05, 0.48), (48, 58, 74), CHAIR, (0, 0.24, 0.62), WOVEN)


def _lamp(shade, color, pole, foot):
    """A shade with the profile `shade`, on a pole with a foot or on a cable."""
    parts = _turned(shade, color, LAMP) + _turned([(0.012, pole[0]), (0.012, pole[1])], BLACK, LAMP, sides=8)
    return parts + (_turned([(0, 0.02), (0.15, 0.02), (0.15, 0.0)], BLACK, LAMP) if foot else [])


def _flat(rng):
    """Every surface as (four corners, colour, label, texture)."""

    def near(*values, by=0.05):
        return [value + by * rng.uniform(-1, 1) for value in values]

    study, half = SPLIT + 0.12, np.pi / 2
    cream, teal, sage = (232, 226, 214), (92, 128, 130), (206, 214, 200)
    doorway = (3.9, 4.85, 0.0, 2.05)
    parts = _box((WIDTH, DEPTH, 0), PAPER, CEILING, (WIDTH / 2, DEPTH / 2, HEIGHT), sides="Z")
    parts += _box((SPLIT, DEPTH, 0), OAK, FLOOR, (SPLIT / 2, DEPTH / 2, 0), PLANKS, "Z")
    parts += _box((WIDTH - study, DEPTH, 0), (128, 134, 140), FLOOR, ((WIDTH + study) / 2, DEPTH / 2, 0), WOVEN, "Z")
    parts += _wall((0, DEPTH), (SPLIT, DEPTH), cream, [(0.9, 2.5, 0.9, 2.3), (3.6, 5.2, 0.9, 2.3)])
    parts += _wall((0, 0), (SPLIT, 0), cream, [(3.2, 4.2, 0.0, 2.1)])
    parts += _wall((0, 0), (0, DEPTH), teal)
    parts += _wall((SPLIT, 0), (SPLIT, DEPTH), cream, [doorway])
    parts += _wall((study, 0), (study, DEPTH), sage, [doorway])
    parts += _wall((study, DEPTH), (WIDTH, DEPTH), sage, [(1.3, 2.9, 0.9, 2.3)])
    parts += _wall((study, 0), (WIDTH, 0), sage)
    parts += _wall((WIDTH, 0), (WIDTH, DEPTH), sage)
    for x in (1.7, 4.4, study + 2.1):
        parts += _put(_window(1.6, 0.9, 2.3), x, DEPTH + 0.06)
    parts += _put(_door(0.95, 2.05, -1.2), SPLIT + 0.06, 4.375, yaw=half)
    parts += _put(_door(1.0, 2.1, 0.0), 3.7, 0.0)
    parts += _turned([(0.17, 0), (0.17, HEIGHT)], (214, 208, 198), COLUMN, (3.05, 4.75, 0), sides=28)

    x, y = 2.3, 3.0  # dining table
    parts += _put(_table(1.9, 0.95, 0.75, WALNUT), x, y)
    for dx, dy, yaw in (
        (-0.55, 0.62, 0), (0.05, 0.62, 0), (0.62, 0.62, 0),
        (-0.5, -0.62, 2 * half), (0.5, -0.66, 2 * half), (1.35, 0.1, -half),
    ):  # fmt: skip
        parts += _put(_chair(WALNUT, (150, 60, 48)), *near(x + dx, y + dy), 0, *near(yaw, by=0.25))
    for dx in (-0.6, 0.0, 0.6):
        parts += _turned([(0, 0.01), (0.09, 0.01), (0.13, 0.025)], WHITE, CLUTTER, (*near(x + dx, y + 0.2), 0.75))
    bowl = [(0, 0.02), (0.1, 0.02), (0.17, 0.09), (0.16, 0.09)]
    parts += _turned(bowl, (70, 110, 120), CLUTTER, (x, y - 0.15, 0.75))
    for _ in range(5):
        orange = (204, 92 + int(60 * rng.random()), 40)
        parts += _sphere(0.04, orange, CLUTTER, (*near(x, y - 0.15, by=0.07), 0.83))
    parts += _put(_lamp([(0.26, 1.75), (0.2, 1.89), (0.05, 1.95)], (214, 170, 70), (1.95, HEIGHT), False), x, y)
    parts += _sphere(0.07, (255, 246, 214), LAMP, (x, y, 1.8))
    parts += _put(_bookcase(rng, 2.7, 2.2, PINE), 0.01, 2.2, yaw=half)
    parts += _put(_plant(rng, 1.2), *near(0.5, 4.85))

    x, y = 5.3, 1.75  # sofa
    parts += _box((2.3, 2.9, 0.012), (170, 64, 56), FLOOR, (x, y, 0), WOVEN, "Z")
    parts += _box((1.9, 2.5, 0.014), (214, 196, 164), FLOOR, (x, y, 0), WOVEN, "Z")
    parts += _put(_sofa(2.2, (74, 92, 116)), 6.45, y, yaw=-half)
    parts += _put(_table(1.1, 0.6, 0.42, OAK), *near(x - 0.1, y), 0, half + 0.1)
    for _ in range(4):
        book = _box((0.2, 0.28, 0.03), rng.integers(40, 220, 3), BOOKS)
        parts += _put(book, *near(x - 0.1, y, by=0.25), 0.42, rng.uniform(0, 3))
    parts += _put(_lamp([(0.2, 1.4), (0.15, 1.72)], (246, 232, 196), (0, 1.5), True), 6.55, 3.2)
    stripes = [(38, 60, 84), (92, 130, 150), (226, 190, 130), (214, 110, 70)]
    parts += _put(_picture(0.9, 0.6, stripes), SPLIT, y, 1.65, -half)

    x = study + 2.1  # desk
    parts += _put(_desk(rng), x, 4.75) + _put(_office_chair(), *near(x - 0.1, 4.0), 0, *near(2 * half, by=0.6))
    parts += _put(_bookcase(rng, 1.8, 1.85, WHITE), WIDTH - 0.01, 1.5, yaw=-half)
    parts += _put(_picture(1.3, 0.9, [(244, 244, 242)]), WIDTH, 3.5, 1.5, -half)
    for x, y, z, edge in ((7.6, 0.5, 0, 0.5), (8.15, 0.42, 0, 0.38), (7.62, 0.52, 0.5, 0.34)):
        carton = _box((edge, 0.8 * edge, edge), (178, 140, 96), CLUTTER)
        parts += _put(carton, *near(x, y, by=0.03), z, rng.uniform(-0.3, 0.3))
    bucket = [(0, 0.01), (0.12, 0.01), (0.15, 0.34), (0.14, 0.34), (0.11, 0.02)]
    parts += _turned(bucket, STEEL, CLUTTER, (*near(10.4, 4.6), 0))
    return parts + _box((0.9, 0.9, 0.06), (250, 250, 244), LAMP, (9.1, 2.7, HEIGHT - 0.06), sides="xXyYz")
