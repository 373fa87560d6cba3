"""Generated objects of ten categories with labelled parts: a data set for classification and for part segmentation.

Objects of a category differ in construction: a table stands on four legs, on trestles, on panels or on a column, a lamp
hangs or stands on a disc, a tripod or a vase. Each is also stretched along its axes and turned about the vertical, so
that extents and heights say little about its category.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kpcore.io import Cloud
from kpcore.io.mesh import sample_triangles
from kpcore.scenes.surfaces import box, joined, rotation, turned

if TYPE_CHECKING:
    from collections.abc import Callable

    Faces = list[np.ndarray]
    Parts = dict[str, Faces]

CATEGORIES = {
    "airplane": ("fuselage", "wing", "tail", "engine"),
    "bed": ("frame", "mattress", "board", "pillow"),
    "bottle": ("body", "neck", "cap"),
    "car": ("body", "cabin", "wheel"),
    "chair": ("seat", "back", "leg", "arm"),
    "lamp": ("foot", "pole", "shade"),
    "mug": ("body", "handle"),
    "shelf": ("board", "side", "back"),
    "sofa": ("base", "back", "arm", "cushion", "leg"),
    "table": ("top", "leg", "drawer"),
}  #: the parts of each category
_FIRST_LABELS = np.cumsum([0, *map(len, CATEGORIES.values())]).tolist()
PART_LABELS = {
    name: [*range(first, first + len(parts))]
    for (name, parts), first in zip(CATEGORIES.items(), _FIRST_LABELS, strict=False)
}  #: numbers of the parts that no other category has, as data sets of parts number them

_STRETCH = 0.5  # the largest logarithm of the factor of an axis: 1.6 times as long, or as short


def shapes(category: str, seed: int = 0, num_points: int = 10_000) -> Cloud:
    """Points of a generated object, uniform by area; the same for the same category and seed, on every machine.

    The object is about a metre in size, upright and faces any direction. `labels` index `names`, the parts of the
    category in `CATEGORIES`; not every object has every part.

    >>> chair = shapes("chair", seed=1, num_points=500)
    >>> chair.points.shape, chair.names
    ((500, 3), ('seat', 'back', 'leg', 'arm'))
    """
    if category not in CATEGORIES:
        raise ValueError(f"category: expected one of {', '.join(CATEGORIES)}, got {category!r}")
    num_points = int(num_points)
    if num_points < 1:
        raise ValueError(f"num_points: expected at least 1, got {num_points}")
    rng = np.random.default_rng([list(CATEGORIES).index(category), seed])
    parts, names = _MAKERS[category](rng), CATEGORIES[category]
    quads = np.concatenate([faces for faces in parts.values() if faces])
    quads = quads * np.exp(rng.uniform(-_STRETCH, _STRETCH, 3)) @ rotation(rng.uniform(0, 2 * np.pi))
    # Sines differ in the last bit between machines. On a grid of 2**-20, a micrometre, corners are the same bits.
    quads = np.round(quads * 2**20) / 2**20
    labels = np.repeat([names.index(name) for name in parts], [len(faces) for faces in parts.values()])
    triangles = np.concatenate([quads[:, [0, 1, 2]], quads[:, [3, 2, 1]]])
    points, chosen = sample_triangles(triangles, num_points, rng)
    return Cloud(
        points.astype(np.float32), None, labels[chosen % len(quads)].astype(np.int32), np.zeros(3), names=names
    )


def _either(rng: np.random.Generator, probability: float = 0.5) -> bool:
    return bool(rng.random() < probability)


def _placed(faces: Faces, at: tuple[float, float, float] = (0, 0, 0), yaw: float = 0.0) -> Faces:
    """Faces rotated about the vertical, then moved."""
    return [face @ rotation(yaw) + at for face in faces]


def _along(faces: Faces, axis: int) -> Faces:
    """Faces whose vertical becomes the axis x (0) or y (1)."""
    return [face[:, [2, 1, 0] if axis == 0 else [0, 2, 1]] for face in faces]


def _tilted(faces: Faces, slope: float, at: float = 0.0) -> Faces:
    """Faces sheared backwards: y grows by `slope` for each unit of height above `at`."""
    return [face + [0, 1, 0] * ((face[:, 2:] - at) * slope) for face in faces]


def _bar(start: tuple[float, float, float], end: tuple[float, float, float], thick: float) -> Faces:
    """A square bar from one point to another, whose ends are level."""
    corners = thick / 2 * np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0], [-1, -1, 0]])
    return joined([corners + start, corners + end])


def _tube(path: np.ndarray, radius: float, sides: int = 10) -> Faces:
    """A tube around a path (n, 3) in a vertical plane through the x axis."""
    along = np.gradient(path, axis=0)
    along /= np.sqrt((along * along).sum(axis=1))[:, None]
    normal = np.stack([along[:, 2], np.zeros(len(path)), -along[:, 0]], axis=1)
    angle = np.linspace(0, 2 * np.pi, sides + 1)[:, None]
    rings = [radius * (np.cos(angle) * across + np.sin(angle) * [0, 1, 0]) for across in normal]
    return joined([ring + at for ring, at in zip(rings, path, strict=True)])


def _slab(outline: list[tuple[float, float, float]], thick: float) -> Faces:
    """A slab between an outline of four corners, in the order of a face, and the same above it."""
    low = np.array(outline, float)
    high = low + np.array([0, 0, thick])
    ring = [0, 1, 3, 2, 0]
    return [low, high, *joined([low[ring], high[ring]])]


def _wing(root: float, tip: float, span: float, sweep: float, rise: float, thick: float) -> Faces:
    """Two swept wings of chords `root` and `tip`, from the middle of the fuselage, which lies along x."""
    faces: Faces = []
    for y in (-span, span):
        faces += _slab([(0, 0, 0), (root, 0, 0), (sweep, y, rise), (sweep + tip, y, rise)], thick)
    return faces


def _legs(rng: np.random.Generator, length: float, width: float, height: float, thick: float) -> Faces:
    """Four legs below a seat or a top: square, turned or splayed."""
    kind, faces = rng.integers(3), []
    splay = rng.uniform(0.02, 0.12) if kind == 2 else 0.0
    for x in (-1, 1):
        for y in (-1, 1):
            at = np.array([x * (length - thick) / 2, y * (width - thick) / 2, 0])
            if kind == 1:
                profile = [(thick / 3, 0), (thick / 2, 0.4 * height), (thick / 2.5, 0.7 * height), (thick / 2, height)]
                faces += turned(profile, at, sides=8)
            else:
                faces += _bar(at + splay * np.array([x, y, 0]), at + np.array([0, 0, height]), thick)
    return faces


def _column(rng: np.random.Generator, reach: float, height: float, thick: float) -> Faces:
    """A column on a disc or on a cross of feet."""
    faces = turned([(thick / 2, 0.03), (thick / 2, height)], sides=12)
    if _either(rng):
        return faces + turned([(reach, 0), (reach, 0.02), (thick / 2, 0.05)], sides=24) + turned([(0, 0), (reach, 0)])
    number = int(rng.integers(3, 7))
    foot = box((reach, 0.04, 0.03), (reach / 2, 0, 0))
    for k in range(number):
        faces += _placed(foot, yaw=2 * np.pi * k / number)
    return faces


def _airplane(rng: np.random.Generator) -> Parts:
    length, radius = rng.uniform(0.8, 1.4), rng.uniform(0.04, 0.11)
    height, nose = rng.uniform(0.1, 0.2), rng.uniform(0.08, 0.25)
    hull = [(0.02, 0), (0.7 * radius, nose * 0.5 * length), (radius, nose * length), (radius, 0.65 * length),
            (0.6 * radius, 0.85 * length), (0.02, length)]  # fmt: skip
    fuselage = _placed(_along(turned(hull, sides=16), 0), (0, 0, height))
    root, span = rng.uniform(0.14, 0.3) * length, rng.uniform(0.35, 0.75)
    tip, sweep = root * rng.uniform(0.3, 1.0), rng.uniform(0.0, 0.35)
    start, level = rng.uniform(0.28, 0.45) * length, height + rng.choice([-0.6, 0.0, 0.8]) * radius
    rise = rng.uniform(-0.03, 0.08)
    wing = _placed(_wing(root, tip, span, sweep, rise, 0.02), (start, 0, level))
    if _either(rng, 0.2):  # a biplane
        wing += _placed(_wing(root, tip, span, sweep, rise, 0.02), (start, 0, level + 0.16))
    chord, back = rng.uniform(0.09, 0.16) * length, 0.86 * length
    fin = rng.uniform(0.12, 0.26)
    top = height + fin
    outline = [(back, height, 0), (back + chord, height, 0), (back + 0.07, top, 0), (back + chord, top, 0)]
    tail = _along(_slab(outline, 0.015), 1)
    stabiliser = _wing(chord, 0.6 * chord, rng.uniform(0.14, 0.28), 0.05, 0, 0.015)
    tail += _placed(stabiliser, (back, 0, height + (fin if _either(rng, 0.3) else 0.0)))
    engine: Faces = []
    if _either(rng, 0.3):  # a propeller
        blades = int(rng.integers(2, 5))
        for k in range(blades):
            blade = box((0.01, 0.03, 0.15), sides="xXyYzZ")
            c, s = np.cos(2 * np.pi * k / blades), np.sin(2 * np.pi * k / blades)
            turn = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
            engine += _placed([face @ turn for face in blade], (-0.01, 0, height))
    else:
        size, number = rng.uniform(0.025, 0.05), int(rng.integers(1, 3))
        pod = _along(turned([(0.6 * size, 0), (size, 0.04), (size, 0.12), (0.5 * size, 0.18)], sides=12), 0)
        for k in range(number):
            out = span * (k + 1) / (number + 1)
            for side in (-1, 1):
                engine += _placed(pod, (start + sweep * out / span - 0.02, side * out, level - size))
    return {"fuselage": fuselage, "wing": wing, "tail": tail, "engine": engine}


def _bed(rng: np.random.Generator) -> Parts:
    width, length = rng.uniform(0.45, 1.0), rng.uniform(0.95, 1.2)
    under, rail, soft = rng.uniform(0.0, 0.25), rng.uniform(0.06, 0.16), rng.uniform(0.06, 0.16)
    levels = [under] if not _either(rng, 0.2) else [under, under + 0.6]  # a bunk bed
    parts: Parts = {"frame": [], "mattress": [], "board": [], "pillow": []}
    for level in levels:
        parts["frame"] += box((width, length, rail), (0, 0, level))
        parts["mattress"] += box((0.94 * width, 0.95 * length, soft), (0, 0, level + rail), sides="xXyYZ")
        number = 2 if width > 0.7 else 1
        for k in range(number):
            x = (k - (number - 1) / 2) * width / 2
            size = (0.75 * width / number, 0.16, rng.uniform(0.04, 0.08))
            parts["pillow"] += box(size, (x, 0.38 * length, level + rail + soft))
    top = levels[-1] + rail
    head, foot = top + rng.uniform(0.15, 0.45), top + rng.uniform(0.0, 0.2)
    for y, height, there in ((1, head, True), (-1, foot, _either(rng))):
        at = y * (length / 2 + 0.02)
        if there and _either(rng):
            parts["board"] += box((width, 0.04, height), (0, at, 0))
        elif there:
            for x in np.linspace(-0.5, 0.5, int(rng.integers(4, 9))) * (width - 0.03):
                parts["board"] += box((0.03, 0.03, height), (x, at, 0))
            parts["board"] += box((width, 0.04, 0.05), (0, at, height))
    if under > 0.04 or len(levels) > 1:
        for x in (-1, 1):
            for y in (-1, 1):
                at = (x * (width / 2 - 0.03), y * (length / 2 - 0.03), 0)
                parts["frame"] += box((0.05, 0.05, levels[-1]), at)
    return parts


def _bottle(rng: np.random.Generator) -> Parts:
    radius, height = rng.uniform(0.1, 0.28), rng.uniform(0.4, 0.75)
    neck, long = radius * rng.uniform(0.2, 0.6), rng.uniform(0.06, 0.35)
    waist, sides = radius * rng.uniform(0.75, 1.0), int(rng.choice([4, 6, 24, 24, 24]))
    shoulder = height + rng.uniform(0.02, 0.18)
    body = [(0, 0), (radius, 0), (radius, 0.2 * height), (waist, 0.5 * height), (radius, 0.75 * height),
            (radius, height), (0.75 * radius + 0.25 * neck, 0.5 * (height + shoulder)), (neck, shoulder)]  # fmt: skip
    top = shoulder + long
    parts = {"body": turned(body, sides=sides), "neck": turned([(neck, shoulder), (neck, top)], sides=sides), "cap": []}
    if _either(rng, 0.75):
        wide, tall = neck * rng.uniform(1.05, 1.4), rng.uniform(0.03, 0.1)
        parts["cap"] = turned([(neck, top), (wide, top), (wide, top + tall), (0, top + tall)], sides=24)
    return parts


def _car(rng: np.random.Generator) -> Parts:
    length, width = rng.uniform(0.75, 1.3), rng.uniform(0.38, 0.55)
    wheel, body = rng.uniform(0.07, 0.14), rng.uniform(0.12, 0.28)
    low = wheel * rng.uniform(0.6, 1.2)
    shape = box((length, width, body), (0, 0, low))
    kind = rng.integers(4)
    front, back, tall = [(-0.25, 0.3, 0.2), (-0.25, 0.48, 0.24), (-0.4, 0.48, 0.4), (-0.3, 0.02, 0.25)][kind]
    tall *= rng.uniform(0.8, 1.2)
    slopes, inner = rng.uniform(0.02, 0.14, 2), 0.9 * width / 2
    base, roof = (front * length, back * length), (front * length + slopes[0], back * length - min(slopes[1], 0.1))
    z = low + body
    ring = [0, 1, 3, 2, 0]
    rings = [
        np.array([[x, y, level] for y in (-half, half) for x in ends])[ring]
        for ends, half, level in ((base, inner, z), (roof, 0.9 * inner, z + tall))
    ]
    cabin = [*joined(rings), rings[1][[0, 1, 3, 2]]]
    if kind == 3:  # the bed of a pickup
        for y in (-1, 1):
            shape += box((0.4 * length, 0.03, 0.08), (0.28 * length, y * (width / 2 - 0.015), z))
    wheels: Faces = []
    number = 3 if length > 1.15 and _either(rng) else 2
    for x in np.linspace(-0.32, 0.34, number) * length:
        for y in (-1, 1):
            tyre = turned([(0, 0), (wheel, 0), (wheel, 0.08), (0.4 * wheel, 0.09), (0, 0.07)], sides=16)
            tyre = [face * [1, y, 1] for face in _along(tyre, 1)]
            wheels += _placed(tyre, (x, y * (width / 2 - 0.06), wheel))
    return {"body": shape, "cabin": cabin, "wheel": wheels}


def _chair(rng: np.random.Generator) -> Parts:
    width, depth = rng.uniform(0.36, 0.6), rng.uniform(0.36, 0.6)
    height, thick, tall = rng.uniform(0.25, 0.65), rng.uniform(0.02, 0.1), rng.uniform(0.25, 0.7)
    top = height + thick
    round_seat = _either(rng, 0.25)
    if round_seat:
        seat = turned([(0, height), (width / 2, height), (width / 2, top), (0, top)], sides=20)
    else:
        seat = box((width, depth, thick), (0, 0, height))
    kind, y, slope = rng.integers(3), depth / 2 - 0.02, rng.uniform(0, 0.3)
    if kind == 0:
        back = box((width, 0.03, tall), (0, y, top))
    else:
        number = int(rng.integers(3, 7))
        back = []
        for x in (-1, 1):
            back += box((0.035, 0.035, tall), (x * (width / 2 - 0.02), y, top))
        for k in range(number):
            if kind == 1:
                back += box((width, 0.02, 0.4 * tall / number), (0, y, top + tall * (k + 0.6) / number))
            else:
                x = (k + 0.5) / number - 0.5
                back += box((0.4 * width / number, 0.02, tall), (x * width, y, top))
        if kind == 2:
            back += box((width, 0.03, 0.05), (0, y, top + tall - 0.05))
    leg = _legs(rng, width, depth, height, rng.uniform(0.03, 0.06))
    if round_seat or _either(rng, 0.3):
        leg = _column(rng, rng.uniform(0.18, 0.3), height, rng.uniform(0.04, 0.08))
    arm: Faces = []
    if _either(rng):
        rest = rng.uniform(0.15, 0.25)
        for x in (-1, 1):
            at = x * (width / 2 + 0.01)
            arm += box((0.05, 0.9 * depth, 0.03), (at, 0, top + rest))
            arm += box((0.03, 0.03, rest), (at, -0.35 * depth, top))
    return {"seat": seat, "back": _tilted(back, slope, top), "leg": leg, "arm": arm}


def _lamp(rng: np.random.Generator) -> Parts:
    tall, reach, thin = rng.uniform(0.2, 1.2), rng.uniform(0.1, 0.26), rng.uniform(0.008, 0.03)
    wide, narrow, long = rng.uniform(0.12, 0.32), rng.uniform(0.04, 0.2), rng.uniform(0.12, 0.35)
    sides = int(rng.choice([4, 8, 24]))
    shade = turned([(wide, 0), (min(narrow, wide), long)], sides=sides)
    kind = rng.integers(4)
    if kind == 0:  # hangs from the ceiling
        foot = turned([(0.08, 0), (0.08, 0.03), (0, 0.03)])
        pole = turned([(thin, -tall), (thin, 0)], sides=8)
        return {"foot": _placed(foot, (0, 0, tall + long)), "pole": _placed(pole, (0, 0, tall + long)), "shade": shade}
    foot = turned([(reach, 0), (reach, 0.02), (thin, 0.05)], sides=24) + turned([(0, 0), (reach, 0)], sides=24)
    if kind == 1:  # a tripod
        foot = []
        for k in range(3):
            foot += _placed(_bar((reach + 0.1, 0, 0), (0, 0, 0.4 * tall), 2 * thin), yaw=2 * np.pi * k / 3)
    if kind == 2:  # a bent arm
        out = rng.uniform(0.2, 0.6)
        pole = _tube(np.array([[0, 0, 0], [-0.3 * out, 0, 0.6 * tall], [0, 0, tall], [out, 0, 1.02 * tall]]), thin)
        return {"foot": foot, "pole": pole, "shade": _placed(shade, (out, 0, 1.02 * tall - long))}
    if kind == 3 and tall < 0.7:  # a vase as the foot
        belly = rng.uniform(0.06, 0.16)
        profile = [(0.6 * belly, 0), (belly, 0.3 * tall), (0.7 * belly, 0.6 * tall), (thin, 0.8 * tall)]
        foot = turned(profile, sides=20)
    pole = turned([(thin, 0), (thin, tall + 0.8 * long)], sides=8)
    return {"foot": foot, "pole": pole, "shade": _placed(shade, (0, 0, tall))}


def _mug(rng: np.random.Generator) -> Parts:
    low, high, tall = *rng.uniform(0.22, 0.4, 2), rng.uniform(0.4, 0.95)
    sides, wall = int(rng.choice([6, 24, 24])), 0.04
    belly = (low + high) / 2 * rng.uniform(0.9, 1.2)
    profile = [(0, 0), (low, 0), (belly, 0.5 * tall), (high, tall), (high - wall, tall), (belly - wall, 0.5 * tall),
               (low - wall, wall), (0, wall)]  # fmt: skip
    out, begin, end = rng.uniform(0.12, 0.3), 0.2 * tall, 0.8 * tall
    angle = np.linspace(-np.pi / 2, np.pi / 2, 13)
    bend = np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** rng.uniform(0.4, 1.0)
    path = np.stack([out * bend, 0 * angle, (begin + end) / 2 + (end - begin) / 2 * np.sin(angle)], axis=1)
    path[:, 0] += np.interp(path[:, 2], [0, 0.5 * tall, tall], [low, belly, high]) - 0.02
    handle = _tube(path, rng.uniform(0.02, 0.05))
    return {"body": turned(profile, sides=sides), "handle": _placed(handle, yaw=rng.uniform(0, 2 * np.pi))}


def _shelf(rng: np.random.Generator) -> Parts:
    width, depth, height = rng.uniform(0.35, 1.1), rng.uniform(0.15, 0.4), rng.uniform(0.45, 1.2)
    thick, number = rng.uniform(0.015, 0.035), int(rng.integers(3, 7))
    parts: Parts = {"board": [], "side": [], "back": []}
    low = rng.uniform(0, 0.1)
    for z in np.linspace(low, height - thick, number):
        parts["board"] += box((width, depth, thick), (0, 0, z))
    if _either(rng):
        walls = int(rng.integers(2, 5))
        for x in np.linspace(-0.5, 0.5, walls) * (width - thick):
            parts["side"] += box((thick, depth, height), (x, 0, 0))
    else:
        for x in (-1, 1):
            for y in (-1, 1):
                at = (x * (width / 2 - 0.02), y * (depth / 2 - 0.02), 0)
                parts["side"] += box((0.03, 0.03, height), at)
    if _either(rng):
        parts["back"] = box((width, 0.01, height), (0, depth / 2, 0))
    return parts


def _sofa(rng: np.random.Generator) -> Parts:
    width, depth = rng.uniform(0.6, 1.4), rng.uniform(0.45, 0.65)
    under, base, tall = rng.uniform(0.0, 0.12), rng.uniform(0.1, 0.25), rng.uniform(0.2, 0.45)
    thick, side = rng.uniform(0.08, 0.18), rng.uniform(0.06, 0.16)
    top = under + base
    parts: Parts = {name: [] for name in CATEGORIES["sofa"]}
    parts["base"] = box((width, depth, base), (0, 0, under))
    parts["back"] = _tilted(box((width, thick, tall), (0, depth / 2 - thick / 2, top)), rng.uniform(0, 0.25), top)
    if _either(rng, 0.8):
        rest = tall * rng.uniform(0.3, 0.8)
        for x in (-1, 1):
            parts["arm"] += box((side, depth, base + rest), (x * (width + side) / 2, 0, under))
    number = int(np.ceil(width / rng.uniform(0.4, 0.6)))
    for k in range(number):
        x = ((k + 0.5) / number - 0.5) * width
        parts["cushion"] += box((0.94 * width / number, depth - thick, 0.09), (x, -thick / 2, top), sides="xXyYZ")
    if _either(rng, 0.25):  # a corner
        parts["base"] += box((depth, 0.5, base), (width / 2 - depth / 2, -depth / 2 - 0.25, under))
    if under > 0.03:
        parts["leg"] = _legs(rng, 0.95 * width, 0.9 * depth, under, 0.05)
    return parts


def _table(rng: np.random.Generator) -> Parts:
    length, width = rng.uniform(0.5, 1.4), rng.uniform(0.4, 0.8)
    height, thick = rng.uniform(0.25, 0.95), rng.uniform(0.02, 0.07)
    kind, drawer = rng.integers(4), []
    top = box((length, width, thick), (0, 0, height))
    if kind == 0:
        radius = rng.uniform(0.25, 0.6)
        top = turned([(0, height), (radius, height), (radius, height + thick), (0, height + thick)], sides=28)
        leg = _column(rng, 0.6 * radius, height, rng.uniform(0.04, 0.12))
    elif kind == 1:  # trestles
        leg = []
        for x in (-0.4 * length, 0.4 * length):
            leg += _bar((x, -0.45 * width, 0), (x, 0.1 * width, height), 0.04)
            leg += _bar((x, 0.45 * width, 0), (x, -0.1 * width, height), 0.04)
    elif kind == 2:  # panels
        leg = []
        for x in (-1, 1):
            leg += box((0.03, 0.9 * width, height), (x * (length / 2 - 0.04), 0, 0))
    else:
        leg = _legs(rng, length, width, height, rng.uniform(0.03, 0.08))
    if kind and _either(rng, 0.4):
        deep = min(0.9 * height, rng.uniform(0.08, 0.4))
        drawer = box((0.3 * length, 0.8 * width, deep), (0.28 * length, 0, height - deep), sides="xXyYz")
    return {"top": top, "leg": leg, "drawer": drawer}


_MAKERS: dict[str, Callable[[np.random.Generator], Parts]] = {
    "airplane": _airplane, "bed": _bed, "bottle": _bottle, "car": _car, "chair": _chair, "lamp": _lamp, "mug": _mug,
    "shelf": _shelf, "sofa": _sofa, "table": _table,
}  # fmt: skip
