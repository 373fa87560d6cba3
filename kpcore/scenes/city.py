"""A made-up city as an airborne laser scan, cell by cell of the plane, so that 10⁹ points need no memory.

The plane is divided into square cells. All that stands in a cell, and all random numbers of its points, are drawn from
(seed, cell), and only wires and the terrain, which are functions of the position, cross its edges.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kpcore.io import Cloud, las
from kpcore.io.table import Column

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

CITY_CLASSES = {"ground": 2, "vegetation": 5, "building": 6, "wire": 14, "pole": 15, "car": 64}
GROUND, VEGETATION, BUILDING, WIRE, POLE, CAR = CITY_CLASSES.values()

CELL = 80.0  # metres, from one street's middle to that of the next
PER_METRE = 1000  # coordinates are whole millimetres; a quotient by this is the nearest number, as readers have it
FARTHEST = 2e6  # of a coordinate, in metres: 32 bits hold 2,147 km in steps of 1 mm
ROAD, PAVEMENT, KERB = 4.5, 6.5, 0.12  # distances from the middle of a street, and a height
NODE = 5.0  # distance of the places at which the height of the terrain is computed; it is bilinear between them
NOISE = 0.02  # standard deviation of heights, in metres
STRIP, SPEED, TURN = 480.0, 60.0, 40_000.0  # width of a flight line in metres, metres and seconds
SPAN, SAG, MAST = 40.0, 1.1, 10.0  # of the wires: between two poles, at the middle, and the height of a pole
DISTRICT = 5  # cells
HOUSES, TERRACES, FLATS, OFFICES, HALLS, PARK = range(6)
SHARES = (0.28, 0.50, 0.66, 0.78, 0.88, 1.0)  # of the kinds of districts, cumulative
ASPHALT, PAVING, GRASS, TILES, GRAVEL, METAL, LEAVES, CABLE = 320, 520, 900, 640, 460, 1150, 480, 160  # intensities

FIELDS = ("intensity", "return_number", "number_of_returns", "gps_time", "point_source_id")


class Points(NamedTuple):
    """Points of the scan, each array (n,)."""

    x: np.ndarray  #: int32, in millimetres, as y and z
    y: np.ndarray
    z: np.ndarray
    classification: np.ndarray  #: uint8, of CITY_CLASSES
    intensity: np.ndarray  #: uint16
    return_number: np.ndarray  #: uint8
    number_of_returns: np.ndarray  #: uint8
    gps_time: np.ndarray  #: float64, in seconds
    point_source_id: np.ndarray  #: uint16, the number of the flight line

    def chosen(self, index: np.ndarray) -> Points:
        return Points(*(values[index] for values in self))


def city(low: Sequence[float], high: Sequence[float], *, density: float = 12.0, seed: int = 0) -> Cloud:
    """A labelled airborne laser scan of a part of an endless made-up city, in metres; the same for the same seed.

    Streets on a grid, with cars; houses, blocks of flats, offices and halls with gabled, hipped and flat roofs; trees
    with several returns to a pulse; power lines along some streets; rolling terrain with slopes of up to 10 %.
    Walls have few points. Heights have 2 cm of noise, coordinates are whole millimetres.

    A box has the points of the world in it: a box cut into parts has, in all parts together, exactly the points that it
    has uncut. The objects are the same for every density.

    Parameters
    ----------
    low, high : (2,) numbers
        The box in the plane, in metres, up to 2,000 km from the origin; its points have low <= (x, y) < high.
    density : float
        Pulses per square metre, 0.01 to 1000; there are about 1.1 points for each.
    seed : int
        Of the world, at least 0.

    Returns
    -------
    Cloud
        `labels` are ASPRS classes as `write_city` stores them: 2 ground, 5 vegetation, 6 building, 14 wire, 15 pole,
        and 64 car, the first number that ASPRS leaves to users; `kpcore.scenes.CITY_CLASSES` has them by name.
        `fields` has intensity, return_number, number_of_returns, gps_time and point_source_id (the flight line);
        `exact` the coordinates in float64.

    Raises
    ------
    ValueError
        If the box is empty or too far from the origin, or another argument is out of its range.

    Examples
    --------
    >>> cloud = city((155_000, 463_000), (155_100, 463_050), seed=3)
    >>> sorted(set(cloud.labels.tolist()))
    [2, 5, 6, 14, 15, 64]
    >>> left = city((155_000, 463_000), (155_030, 463_050), seed=3)
    >>> right = city((155_030, 463_000), (155_100, 463_050), seed=3)
    >>> len(left.points) + len(right.points) == len(cloud.points)
    True
    """
    low, high, density, seed = _checked(low, high, density, seed)
    points = _joined(list(_parts(low, high, density, seed)))
    exact = np.column_stack(points[:3]) / PER_METRE
    shift = np.array([*np.floor(low), 0.0])
    moved = (exact - shift).astype(np.float32)
    fields = {name: getattr(points, name) for name in FIELDS}
    fields = {name: values if name == "gps_time" else values.astype(np.float32) for name, values in fields.items()}
    rounding = float(np.abs(moved + shift - exact).max(initial=0.0))
    labels = points.classification.astype(np.int32)
    return Cloud(moved, None, labels, shift, fields=fields, rounding=rounding, exact=exact)


def write_city(out: str | Path, low: Sequence[float], high: Sequence[float], *, tiles: tuple[int, int] = (1, 1),
               buffer: float = 0.0, density: float = 12.0, seed: int = 0) -> list[Path]:  # fmt: skip
    """Write the scan of `city` as LAS or LAZ, in bounded memory.

    The files are LAS 1.4, point format 6, with coordinates in millimetres and without a coordinate reference system.
    COPC is not written, as no well-kept library for Python writes it.

    Parameters
    ----------
    out : path
        Of a file that ends in .las or .laz; otherwise of a folder, which is made, for files ``x_y.laz`` named by the
        lower corners of the tiles in whole metres.
    low, high, density, seed
        As `city` has them.
    tiles : (int, int)
        The number of tiles along x and along y, of equal size.
    buffer : float
        In metres. Each tile has also the points of the box within this distance of its edges, with the same values as
        in the tile to which they belong.

    Returns
    -------
    list of Path
        The files, along x first. A tile without points has none.

    Raises
    ------
    ValueError
        If an argument is out of its range, or `out` is a file and there are several tiles.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> files = write_city(folder, (155_000, 463_000), (155_040, 463_020), tiles=(2, 1), density=1, buffer=5)
    >>> [file.name for file in files]
    ['155000_463000.laz', '155020_463000.laz']
    """
    low, high, density, seed = _checked(low, high, density, seed)
    out = Path(out)
    tiles = tuple(map(operator.index, tiles))
    if len(tiles) != 2 or min(tiles) < 1:
        raise ValueError(f"tiles: expected two numbers of at least 1, got {tiles}")
    if not 0 <= buffer < np.inf:
        raise ValueError(f"buffer: expected a distance of at least 0, got {buffer}")
    is_file = out.suffix.lower() in (".las", ".laz")
    if is_file and tiles != (1, 1):
        raise ValueError(f"out: expected a folder for {tiles[0]} x {tiles[1]} tiles, got {out}")
    edges = [np.linspace(a, b, number + 1) for a, b, number in zip(low, high, tiles, strict=True)]
    names = [[f"{edge:.0f}" for edge in along[:-1]] for along in edges]
    if any(len(set(one)) < len(one) for one in names):
        raise ValueError(f"tiles: expected tiles of at least 1 m, got {tiles}")
    if not is_file:
        out.mkdir(parents=True, exist_ok=True)
    files = []
    for column in range(tiles[0]):
        for row in range(tiles[1]):
            corner, opposite = (np.array([edges[0][column + at], edges[1][row + at]]) for at in (0, 1))
            file = out if is_file else out / f"{names[0][column]}_{names[1][row]}.laz"
            _write(file, np.maximum(corner - buffer, low), np.minimum(opposite + buffer, high), density, seed)
            files.append(file)
    return files


def _checked(low, high, density, seed):
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if low.shape != (2,) or high.shape != (2,) or not (np.abs([low, high]) <= FARTHEST).all() or not (low < high).all():
        raise ValueError(f"low, high: expected a box of (x, y) within {FARTHEST:,.0f} m of the origin, low < high, "
                         f"got {low.tolist()} and {high.tolist()}")  # fmt: skip
    if not 0.01 <= density <= 1000:
        raise ValueError(f"density: expected 0.01 to 1000 pulses per square metre, got {density}")
    seed = operator.index(seed)
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    return low, high, float(density), seed


def _write(file, low, high, density, seed):
    def blocks() -> Iterator[list[np.ndarray]]:
        parts, num = [], 0
        for part in _parts(low, high, density, seed):
            parts.append(part)
            num += len(part.x)
            if num >= 500_000:
                yield as_columns(_joined(parts))
                parts, num = [], 0
        if num:
            yield as_columns(_joined(parts))

    def as_columns(points: Points) -> list[np.ndarray]:
        return [*(values / PER_METRE for values in points[:3]), *points[3:]]

    types = dict.fromkeys("xyz", np.float64) | dict(zip(Points._fields[3:], "BHBBdH", strict=True))
    columns = [Column(name, np.dtype(dtype)) for name, dtype in types.items()]
    las.create(file, None, columns, blocks(), form=6, frame=las.Frame(1 / PER_METRE, (0.0, 0.0, 0.0), True))


def _joined(parts):
    if not parts:
        return Points(*(np.empty(0, dtype) for dtype in (*["i4"] * 3, "u1", "u2", "u1", "u1", "f8", "u2")))
    return Points(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def _parts(low, high, density, seed) -> Iterator[Points]:
    """The points of the cells that a box has a part of, cell by cell, rows of cells first."""
    first, last = np.floor(low / CELL).astype(int), np.ceil(high / CELL).astype(int)
    cells = ((i, j) for j in range(first[1], last[1]) for i in range(first[0], last[0]))

    def part(cell: tuple[int, int]) -> Points:
        points = _cell(seed, *cell, density)
        corner = CELL * np.array(cell)
        if (low <= corner).all() and (corner + CELL <= high).all():
            return points
        inside = np.ones(len(points.x), bool)
        for values, a, b in zip(points[:2], low, high, strict=True):
            inside &= (values / PER_METRE >= a) & (values / PER_METRE < b)
        return points.chosen(inside)

    return map(part, cells)


# ---- the world


def _rng(seed, i, j, what):
    return np.random.default_rng([seed, i % 2**32, j % 2**32, what])


WORLD, SCAN, KIND, DISTRICTS, LINES, TERRAIN = range(6)  # what random numbers are for


def _kind(seed, i, j):
    """The kind of a cell: that of its district, or now and then another, or that of the next district at its edge."""
    here = _rng(seed, i, j, KIND)
    di, dj = here.integers(-1, 2, 2)
    draw = _rng(seed, (i + di) // DISTRICT, (j + dj) // DISTRICT, DISTRICTS).random()
    return int(np.searchsorted(SHARES, here.random() if here.random() < 0.15 else draw, side="right"))


def _has_line(seed, number, axis):
    """Whether a power line runs along the street of this number; axis 0: along x."""
    return _rng(seed, number, axis, LINES).random() < 0.3


def _terrain(seed, x, y):
    """Heights at coordinates: seven waves of 150 to 4000 m, each with slopes of up to 1.4 %."""
    rng = _rng(seed, 0, 0, TERRAIN)
    height = 0.0
    for wavelength in np.geomspace(150, 4000, 7):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = 2 * np.pi / wavelength
        height = height + 0.1 / 7 / wave * np.sin(wave * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    return height


class Scan(NamedTuple):
    """The pulses of a cell in rows along x, each array (rows, columns); heights are metres, others from its corner."""

    x: np.ndarray  #: float32, whole millimetres
    y: np.ndarray
    z: np.ndarray  #: float32, of the surface that stops the pulse
    label: np.ndarray  #: uint8
    intensity: np.ndarray  #: float32
    rough: np.ndarray  #: float32, random in 0 to 1
    top: np.ndarray  #: float32, of the crown above the surface; minus infinity: none
    bottom: np.ndarray
    wire: np.ndarray  #: float32, of the wire above all; minus infinity: none

    def near(self, x, y, reach):
        """The part of the arrays, as views, of which pulses are within a distance of a place along both axes."""
        step = CELL / len(self.x)
        rows, columns = (slice(max(0, int((at - reach) / step)), int((at + reach) / step) + 1) for at in (y, x))
        return Scan(*(values[rows, columns] for values in self))


def _cell(seed, i, j, density):
    """The points of a cell."""
    rng = _rng(seed, i, j, SCAN)
    side = max(1, round(CELL * density**0.5))
    spacing = CELL / side
    grid = np.arange(side, dtype=np.float32)
    draws = rng.random((4, side, side), np.float32)
    # A scanner's rows: pulses vary more along a row than across.
    x = np.floor((grid + 0.1 + 0.8 * draws[0]) * np.float32(spacing * PER_METRE))
    y = np.floor((grid[:, None] + 0.25 + 0.5 * draws[1]) * np.float32(spacing * PER_METRE))
    x, y = (values.clip(0, CELL * PER_METRE - 1) / np.float32(PER_METRE) for values in (x, y))

    nodes = np.arange(CELL / NODE + 1) * NODE
    nodes = _terrain(seed, i * CELL + nodes, j * CELL + nodes[:, None])

    def none() -> np.ndarray:
        return np.full((side, side), -np.inf, np.float32)

    scan = Scan(x, y, _interpolated(nodes.astype(np.float32), x, y), np.full(x.shape, GROUND, np.uint8),
                np.full(x.shape, GRASS, np.float32), draws[2], none(), none(), none())  # fmt: skip
    ground = _ground(nodes)
    extra = _build(scan, seed, i, j, ground, density)
    return _returns(scan, extra, rng, draws[3], i, j)


def _interpolated(nodes, x, y):
    """Heights between the nodes, bilinear."""
    fx, fy = x / np.float32(NODE), y / np.float32(NODE)
    ix, iy = fx.astype(np.int32), fy.astype(np.int32)
    fx -= ix
    fy -= iy
    width = nodes.shape[1]
    at = iy * width + ix
    flat = nodes.ravel()
    below = flat[at] + fx * (flat[at + 1] - flat[at])
    above = flat[at + width] + fx * (flat[at + width + 1] - flat[at + width])
    return below + fy * (above - below)


def _ground(nodes):
    """The same at one place, in numbers of Python, which is 20 times as fast."""
    rows = nodes.tolist()

    def height(x: float, y: float) -> float:
        fx, fy = float(x) / NODE, float(y) / NODE
        ix, iy = int(fx), int(fy)
        below, above = (row[ix] + (fx - ix) * (row[ix + 1] - row[ix]) for row in rows[iy : iy + 2])
        return below + (fy - iy) * (above - below)

    return height


def _build(scan, seed, i, j, ground, density):
    """Put the objects of a cell into its scan; return (x, y, z, label, intensity) of points on upright surfaces."""
    rng = _rng(seed, i, j, WORLD)
    kind = _kind(seed, i, j)
    extra = []
    streets = [kind != PARK or _kind(seed, *cell) != PARK for cell in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))]
    _pave(scan, streets)
    if kind == HOUSES:
        _houses(scan, rng, ground, extra, detached=True)
    elif kind == TERRACES:
        _houses(scan, rng, ground, extra, detached=False)
    elif kind in (FLATS, OFFICES, HALLS):
        _large(scan, rng, ground, extra, kind)
    else:
        for _ in range(rng.integers(25, 70)):
            _tree(scan, rng, ground, *rng.uniform(9, CELL - 9, 2), rng.uniform(2.0, 5.5))
        for _ in range(4):
            _hedge(scan, ground, *rng.uniform(15, CELL - 15, 2), rng.uniform(3, 10), 0.7, rng.uniform(0, 3.14), 1.6)
    for side, has_street in enumerate(streets):
        if has_street:
            _street(scan, rng, ground, side, kind)
    _power(scan, rng, seed, i, j, extra)
    return _upright(scan, extra, density, rng)


def _pave(scan, streets):
    """Roads and pavements in the halves of streets that belong to the cell."""
    for distance, intensity, drop in ((PAVEMENT, PAVING, 0.0), (ROAD, ASPHALT, KERB)):
        on = np.zeros(scan.x.shape, bool)
        for has_street, along in zip(streets, (scan.x, CELL - scan.x, scan.y, CELL - scan.y), strict=True):
            if has_street:
                on |= along < distance
        scan.intensity[on] = intensity
        scan.z[on] -= np.float32(drop)


def _turned(part, x, y, yaw):
    """(along, across): coordinates of the pulses from a place, in directions that are turned by `yaw`."""
    cos, sin = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    dx, dy = part.x - np.float32(x), part.y - np.float32(y)
    return dx * cos + dy * sin, dy * cos - dx * sin


def _put(part, inside, z, label, intensity):
    """Let a surface stop the pulses where it is higher."""
    inside &= z > part.z
    np.copyto(part.z, z, where=inside, casting="same_kind")
    part.label[inside] = label
    part.intensity[inside] = intensity


FLAT, GABLED, HIPPED, SHED = range(4)


def _building(scan, rng, ground, extra, at, half, yaw, height, roof, material, pitch=0.8):
    """A building: half its length and width, the height of its eaves above the ground, and the pitch of its roof."""
    (x, y), (a, b) = at, half
    part = scan.near(x, y, np.hypot(a, b) + 0.5)
    sides = _turned(part, x, y, yaw)
    along, across = np.abs(sides[0]), np.abs(sides[1])
    base = ground(x, y) + height
    inside = (along < a) & (across < b)
    if roof == FLAT:
        z = base + 0.45 * ((along > a - 0.35) | (across > b - 0.35))
        for _ in range(int(a * b / 30)):  # plant on the roof
            size = rng.uniform(0.6, 1.8, 2)
            center = rng.uniform(-0.8, 0.8, 2) * (np.array(half) - size)
            on = (np.abs(sides[0] - center[0]) < size[0]) & (np.abs(sides[1] - center[1]) < size[1])
            z += rng.uniform(0.6, 2.5) * on
    elif roof == SHED:
        z = base + pitch * 0.5 * (sides[1] + b)
    else:
        z = base + pitch * (b - across if roof == GABLED else np.minimum(a - along, b - across))
        if rng.random() < 0.7:  # a chimney
            z = np.where(
                (np.abs(sides[0] - rng.uniform(-0.7, 0.7) * a) < 0.45) & (across < 0.45), base + pitch * b + 0.9, z
            )
        if roof == GABLED and rng.random() < 0.35:  # a dormer
            middle = rng.uniform(-0.5, 0.5) * a
            on = (np.abs(sides[0] - middle) < 1.2) & (sides[1] > 0) & (across < b - 0.7)
            z = np.where(on, np.maximum(z, base + 0.75 * pitch * b), z)
    _put(part, inside, z.astype(np.float32), BUILDING, material)
    foot, cos, sin = base - height, np.cos(yaw), np.sin(yaw)
    for nx, ny, width, reach in ((cos, sin, b, a), (-cos, -sin, b, a), (-sin, cos, a, b), (sin, -cos, a, b)):
        mx, my, tx, ty = x + nx * reach, y + ny * reach, -ny * width, nx * width
        extra.append((mx - tx, my - ty, mx + tx, my + ty, foot, base, BUILDING, 0.7 * material, 0.09))


def _upright(scan, surfaces, density, rng):
    """(x, y, z, label, intensity) of points on upright surfaces, where no building hides them.

    A surface is (start x, start y, end x, end y, lowest, highest, label, intensity, share); it faces to the right of
    the way from its start to its end. `share` is the number of points for a square metre of it and a pulse per square
    metre of ground.
    """
    start_x, start_y, end_x, end_y, low, high, label, intensity, share = np.array(surfaces).reshape(-1, 9).T
    dx, dy = end_x - start_x, end_y - start_y
    length = np.hypot(dx, dy)
    num = rng.poisson(density * share * np.maximum(length, 0.3) * (high - low))
    of = np.repeat(np.arange(len(num)), num)
    along, up = rng.random((2, len(of)))
    noise = rng.normal(0, NOISE, (2, len(of)))
    x, y = start_x[of] + along * dx[of] + noise[0], start_y[of] + along * dy[of] + noise[1]
    z = low[of] + up * (high - low)[of]
    outward = 0.4 / np.maximum(length, 1e-9)[of]
    step = CELL / len(scan.x)
    column, row = (
        (at / step).astype(int).clip(0, len(scan.x) - 1) for at in (x + outward * dy[of], y - outward * dx[of])
    )
    seen = (scan.label[row, column] != BUILDING) | (scan.z[row, column] < z) | (label[of] == POLE)
    seen &= (np.minimum(x, y) >= 0) & (np.maximum(x, y) < CELL - 1 / PER_METRE)
    of = of[seen]
    return (*(values[seen].astype(np.float32) for values in (x, y, z)), label[of].astype(np.uint8), intensity[of])


def _tree(scan, rng, ground, x, y, radius):
    """A tree: its crown is an ellipsoid, or a cone."""
    part = scan.near(x, y, radius)
    squared = ((part.x - np.float32(x)) ** 2 + (part.y - np.float32(y)) ** 2) * np.float32(1 / radius**2)
    squared += np.float32(0.3) * (part.rough - np.float32(0.5))
    inside = squared < 1
    rest = np.sqrt((1 - squared).clip(0, 1))
    height = radius * rng.uniform(2.0, 2.9)
    base = ground(x, y)
    if rng.random() < 0.25:
        top, bottom = base + 0.4 * radius + height * rest**2, np.full_like(rest, base + 0.4 * radius)
    else:
        half = 0.36 * height
        top, bottom = base + height - half + half * rest, base + height - half - half * rest
    inside &= top > part.top
    np.copyto(part.top, top, where=inside, casting="same_kind")
    np.copyto(part.bottom, bottom, where=inside, casting="same_kind")


def _hedge(scan, ground, x, y, a, b, yaw, height):
    part = scan.near(x, y, a + b)
    along, across = _turned(part, x, y, yaw)
    inside = (np.abs(along) < a) & (np.abs(across) < b)
    _put(part, inside, part.z + np.float32(height) * (0.75 + 0.35 * part.rough), VEGETATION, LEAVES)


def _car(scan, rng, x, y, yaw):
    part = scan.near(x, y, 3.0)
    along, across = _turned(part, x, y, yaw)
    a, b = rng.uniform(1.9, 2.4), rng.uniform(0.82, 0.92)
    inside = (np.abs(along) < a) & (np.abs(across) < b) & (part.label == GROUND)
    cabin = (along > -0.9 * a) & (along < 0.35 * a)
    is_van = rng.random() < 0.12
    height = np.where(cabin | is_van, 2.1 if is_van else rng.uniform(1.4, 1.7), 0.95).astype(np.float32)
    _put(part, inside, part.z + height, CAR, rng.uniform(150, 1500))


def _houses(scan, rng, ground, extra, detached):
    """Two rows of houses with gardens between them, along x or along y, detached or in terraces."""
    swap = rng.random() < 0.5
    for front, inward in ((PAVEMENT, 1), (CELL - PAVEMENT, -1)):
        at = PAVEMENT + rng.uniform(1, 4)
        setback, tone = rng.uniform(3, 7), rng.uniform(0.7, 1.3)
        height, pitch, depth = rng.uniform(2.7, 6.2), rng.uniform(0.6, 1.05), rng.uniform(4.0, 5.5)
        roof = GABLED if rng.random() < 0.7 else FLAT
        while True:
            if detached:
                a, b, gap = rng.uniform(4.0, 6.5), rng.uniform(3.6, 5.2), rng.uniform(3, 8)
                height, pitch, roof = rng.uniform(2.6, 6.5), rng.uniform(0.5, 1.1), rng.choice([0, 1, 1, 1, 2, 2, 3])
                yaw, tone, shift = rng.normal(0, 0.06), rng.uniform(0.6, 1.5), rng.uniform(0, 3)
            else:
                a, b, yaw, shift = rng.uniform(2.6, 3.2), depth, 0.0, 0.0
                gap = 0.0 if rng.random() < 0.85 else rng.uniform(3, 7)
            if at + 2 * a > CELL - PAVEMENT - 1:
                break
            across = front + inward * (setback + shift + b)
            place = (across, at + a) if swap else (at + a, across)
            turn = yaw + np.pi / 2 * swap
            _building(scan, rng, ground, extra, place, (a, b), turn, height, roof, TILES * tone, pitch)
            back = across + inward * (b + rng.uniform(4, 14))
            garden = at + a + rng.uniform(-0.6, 0.6) * a
            place = (back, garden) if swap else (garden, back)
            if rng.random() < 0.6:
                _tree(scan, rng, ground, *place, rng.uniform(1.2, 3.8))
            elif rng.random() < 0.4:  # a shed
                _building(scan, rng, ground, extra, place, (1.6, 1.3), turn, 2.2, FLAT, GRAVEL)
            if rng.random() < (0.7 if detached else 0.4):
                edge = across + inward * (b + 5)
                place = (edge, at + 2 * a + 0.5 * gap) if swap else (at + 2 * a + 0.5 * gap, edge)
                _hedge(scan, ground, *place, 5.0, 0.45, np.pi / 2 * (not swap), rng.uniform(1.1, 2.0))
            if detached and gap > 4.5 and rng.random() < 0.7:  # a car beside the house
                place = (across, at + 2 * a + gap / 2) if swap else (at + 2 * a + gap / 2, across)
                _car(scan, rng, *place, np.pi / 2 * (not swap))
            at += 2 * a + gap


def _large(scan, rng, ground, extra, kind):
    """Flats around a court, some offices, or a hall with a car park."""
    low, high = PAVEMENT + 3, CELL - PAVEMENT - 3
    if kind == FLATS:
        depth, height = rng.uniform(5, 6.5), rng.uniform(8, 16)
        half = (high - low) / 2
        roof = FLAT if rng.random() < 0.6 else HIPPED
        gap = rng.uniform(0, 6)
        for turn in rng.permutation(4)[: rng.integers(2, 5)]:
            yaw = np.pi / 2 * turn
            x, y = CELL / 2 + (half - depth) * np.array([np.sin(yaw), -np.cos(yaw)])
            size = (half - gap if turn % 2 == 0 else half - 2 * depth - gap, depth)
            _building(scan, rng, ground, extra, (x, y), size, yaw, height + rng.uniform(0, 3), roof, GRAVEL, 0.6)
        for _ in range(rng.integers(4, 12)):
            _tree(scan, rng, ground, *rng.uniform(low + 16, high - 16, 2), rng.uniform(2, 4.5))
    elif kind == OFFICES:
        for x in (low + 14, high - 14):
            for y in (low + 14, high - 14):
                if rng.random() < 0.75:
                    size, yaw = rng.uniform(6, 12, 2), rng.normal(0, 0.05)
                    material = rng.choice([GRAVEL, METAL])
                    height = rng.uniform(10, 45)
                    _building(scan, rng, ground, extra, (x, y), size, yaw, height, FLAT, material)
                    if rng.random() < 0.5:  # a lower part beside it
                        _building(scan, rng, ground, extra, (CELL / 2, y), (9, 7), yaw, rng.uniform(4, 8), FLAT, GRAVEL)
                else:
                    for _ in range(6):
                        _tree(scan, rng, ground, *(np.array([x, y]) + rng.uniform(-9, 9, 2)), rng.uniform(2, 4))
    else:
        x = low + 20 if rng.random() < 0.5 else high - 20
        roof = rng.choice([FLAT, GABLED, SHED])
        size, height = (rng.uniform(22, 29), rng.uniform(13, 18)), rng.uniform(5, 11)
        _building(scan, rng, ground, extra, (x, CELL / 2), size, np.pi / 2, height, roof, METAL, 0.15)
        lot = CELL - x
        for row in (-10, -4, 4, 10):
            for y in np.arange(low + 3, high - 3, 2.7):
                if rng.random() < 0.55:
                    _car(scan, rng, lot + row, y, np.pi * (row > 0) + rng.normal(0, 0.03))
        for y in rng.uniform(low + 3, high - 3, 5):
            _tree(scan, rng, ground, lot, y, rng.uniform(1.5, 2.5))


def _street(scan, rng, ground, side, kind):
    """Cars and trees in the half of a street that belongs to the cell; side: low x, high x, low y, high y."""

    def place(along: float, distance: float) -> tuple[float, float]:
        distance = CELL - distance if side % 2 else distance
        return (distance, along) if side < 2 else (along, distance)

    yaw = np.pi / 2 * (side < 2) + np.pi * (side in (0, 3))
    at = 11.0
    while at < CELL - 11:  # parked
        if rng.random() < (0.35 if kind != PARK else 0.1):
            _car(scan, rng, *place(at, ROAD - 1.0), yaw + rng.normal(0, 0.02))
        at += rng.uniform(5.2, 6.5)
    for at in rng.uniform(8, CELL - 8, rng.poisson(0.8)):  # moving
        _car(scan, rng, *place(at, 1.3), yaw)
    if rng.random() < 0.4:
        radius = rng.uniform(1.5, 2.8)
        for at in np.arange(14, CELL - 14, rng.uniform(9, 16)):
            _tree(scan, rng, ground, *place(at, PAVEMENT - 0.4), radius * rng.uniform(0.85, 1.1))


def _power(scan, rng, seed, i, j, extra):
    """Wires and poles along the streets at the low sides of the cell: three conductors on a crossbar, one below."""
    for axis, number in ((0, j), (1, i)):
        if not _has_line(seed, number, axis):
            continue
        origin = CELL * np.array([i, j])
        along, across = (scan.x, scan.y) if axis == 0 else (scan.y, scan.x)
        first = np.floor(origin[axis] / SPAN)
        middle = PAVEMENT - 0.6
        poles = (first - 0.5 + np.arange(4)) * SPAN  # the cell has parts of three spans
        other = np.full(4, origin[1 - axis] + middle)
        feet = _terrain(seed, *((poles, other) if axis == 0 else (other, poles)))
        span = (along + np.float32(origin[axis] - poles[0])) / np.float32(SPAN)
        left = span.astype(np.int32).clip(0, 2)
        span -= left
        feet32 = feet.astype(np.float32)
        height = feet32[left] + span * (feet32[left + 1] - feet32[left])
        for offset, up in ((-0.9, MAST), (0.0, MAST), (0.9, MAST), (0.0, MAST - 2.5)):
            place = np.float32(middle + offset)
            near = np.abs(across - place) < 0.13
            # The parabola of the same sag: a catenary of 40 m with 1.1 m of sag differs from it by less than 1 mm.
            z = (height + np.float32(up) - np.float32(4 * SAG) * span * (1 - span))[near]
            free = (z > scan.z[near]) & (z > scan.top[near]) & (scan.rough[near] < 0.9) & (z > scan.wire[near])
            at = np.flatnonzero(near)[free]
            scan.wire.flat[at] = z[free]
            across.flat[at] = place + np.float32(0.15) * (across.flat[at] - place)
        for pole, foot in zip(poles, feet, strict=True):
            place = pole - origin[axis]
            if 0 <= place < CELL:
                x, y, bx, by = (place, middle, 0, 0.9) if axis == 0 else (middle, place, 0.9, 0)
                extra.append((x, y, x, y, foot, foot + MAST, POLE, 350, 0.5))
                extra.append((x - bx, y - by, x + bx, y + by, foot + MAST - 0.1, foot + MAST, POLE, 350, 2))


# ---- the scanner


def _returns(scan, extra, rng, luck, i, j):
    """The points of the pulses, in order, and of upright surfaces."""
    shape = scan.x.size
    x, y, z, label, intensity, _, top, bottom, wire = (values.reshape(-1) for values in scan)
    luck = luck.reshape(-1)
    counts = np.ones(shape, np.uint8)
    leafy = np.flatnonzero(top > z + 0.2)
    depth = top[leafy] - np.maximum(bottom[leafy], z[leafy])
    # Returns within the crown: one, two or three; a third of the pulses reach what is below.
    draw = luck[leafy]
    inner = 1 + (draw < 0.45).astype(np.uint8) + (draw < 0.15)
    inner[depth < 1] = 1
    reaches = (draw * 7) % 1 < 0.35
    counts[leafy] = inner + reaches
    wired = np.flatnonzero(wire > -np.inf)
    counts[wired] += 1

    start = np.cumsum(counts, dtype=np.int32) - counts
    pulse = np.repeat(np.arange(shape, dtype=np.int32), counts)
    number = counts[pulse]
    order = np.ones(len(pulse), np.uint8)
    for turn in range(1, 5):
        order[start[counts > turn] + turn] = turn + 1
    x, y, z, label, intensity = (values[pulse] for values in (x, y, z, label, intensity))
    has_wire = np.zeros(shape, np.uint8)
    has_wire[wired] = 1
    first = start[leafy] + has_wire[leafy]
    level = top[leafy]
    for turn in range(3):
        on = inner > turn
        at = first[on] + turn
        spread = rng.random(len(at), np.float32)
        rest = (level - np.maximum(bottom[leafy], scan.z.reshape(-1)[leafy]))[on]
        level[on] -= rest * (
            spread * spread * np.float32(0.6) if turn == 0 else np.float32(0.15) + spread * np.float32(0.7)
        )
        z[at], label[at], intensity[at] = level[on], VEGETATION, LEAVES
    at = start[wired]
    z[at], label[at], intensity[at] = wire[wired], WIRE, CABLE
    intensity /= np.sqrt(number, dtype=np.float32)

    x, y, z, label, intensity = (np.concatenate(both) for both in zip((x, y, z, label, intensity), extra, strict=True))
    single = np.ones(len(extra[0]), np.uint8)
    order, number = (np.concatenate([values, single]) for values in (order, number))
    intensity = intensity.astype(np.float32, copy=False)
    noise = rng.standard_normal((2, len(x)), np.float32)
    z += np.float32(NOISE) * noise[0]
    intensity *= 1 + np.float32(0.12) * noise[1]
    whole = [np.rint(values * np.float32(PER_METRE)).astype(np.int32) for values in (x, y, z)]
    for axis, corner in enumerate((i, j)):
        np.clip(whole[axis], 0, round(CELL * PER_METRE) - 1, out=whole[axis])
        whole[axis] += np.int32(corner * round(CELL * PER_METRE))
    line = int(np.floor(i * CELL / STRIP))
    start_of_line = TURN * (line - np.floor(-FARTHEST / STRIP))
    time = start_of_line + (whole[1] / PER_METRE + FARTHEST) / SPEED + (whole[0] / PER_METRE - line * STRIP) * 1e-5
    return Points(*whole, label, intensity.clip(1, 65_535).astype(np.uint16), order, number, time,
                  np.full(len(x), line % 65_535 + 1, np.uint16))  # fmt: skip
