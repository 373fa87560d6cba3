"""Draws the pictures of docs/neighbours.md from results of kpcore: ``python docs/figures.py [folder]``."""

import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle

import kpcore as kp

TEXT, PALE, FAINT = "#0f1319", "#5d6878", "#c3cad3"  # on a white background
BLUE, ORANGE, GREEN, VIOLET = "#2468b4", "#d9701e", "#2b8a4b", "#7d4fb0"
NEAR_TO_FAR = LinearSegmentedColormap.from_list("", ["#123f73", "#3d86cf", "#c4ddf3"])
DPI = 144


def figure(width, height):
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def panel(fig, box, x, y):
    """Axes of equal scale in a box (left, bottom, width, height), all in inches."""
    width, height = fig.get_size_inches()
    axes = fig.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
    axes.set(xlim=x, ylim=y, aspect="equal")
    axes.set_axis_off()
    return axes


def dots(axes, points, color, size=42, **style):
    axes.scatter(*points.T, s=size, c=color, linewidths=style.pop("linewidths", 0), zorder=3, **style)


def ball(axes, center, radius, color, metric="l2", **style):
    style = {"edgecolor": color, "facecolor": (*to_rgb(color), 0.08), "linewidth": 1.6, "zorder": 1} | style
    corners = {"l1": [(1, 0), (0, 1), (-1, 0), (0, -1)], "linf": [(1, 1), (-1, 1), (-1, -1), (1, -1)]}
    if metric == "l2":
        axes.add_patch(Circle(center, radius, **style))
    else:
        axes.add_patch(Polygon(center + radius * np.array(corners[metric]), **style))


def query_mark(axes, point):
    axes.scatter(*point, marker="x", s=55, c=TEXT, linewidths=2.2, zorder=5)


def cells(axes, x, y, texts, colors, inks):
    for i, (text, color, ink) in enumerate(zip(texts, colors, inks, strict=True)):
        axes.add_patch(Rectangle((x + i, y), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
        axes.text(x + i + 0.5, y + 0.47, text, color=ink, size=10.5, ha="center", va="center")


def arrow(axes, begin, end, color, gaps):
    if np.linalg.norm(end - begin) > 0.02:  # no arrow from a point to itself
        style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.0, "mutation_scale": 7}
        style["shrinkA"], style["shrinkB"] = gaps
        axes.annotate("", end, begin, arrowprops=style, zorder=2)


def apart(points, distance):
    """True for points that have no earlier point within the distance, so that drawn dots do not overlap."""
    nb = kp.radius_search(points, None, distance)
    return nb.index[nb.row_splits[:-1]] == np.arange(len(points))


def draw_list():
    points = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [5, 0]], np.float32)
    nb = kp.radius_search(points, None, 1.0)
    row_colors = [PALE, BLUE, GREEN, ORANGE, VIOLET]
    fig = figure(9, 2.15)
    axes = panel(fig, (0.1, 0.05, 3.5, 2.05), (-0.4, 5.4), (-1.9, 1.5))
    ball(axes, points[1], 1, BLUE)
    dots(axes, points, row_colors, 270)
    for i, point in enumerate(points):
        axes.text(*point, i, color="white", size=10.5, weight="bold", ha="center", va="center_baseline", zorder=4)
    axes.text(2.5, -1.6, "the neighbours of point 1: 0, 1 and 2", color=PALE, size=10, ha="center", va="center")
    axes = panel(fig, (3.75, 0.05, 5.2, 2.05), (-2.9, 11.6), (-2.5, 3.22))
    cells(axes, 0, 1, nb.index, np.repeat(row_colors, nb.counts), ["white"] * nb.num_pairs)
    axes.text(-0.35, 1.47, "index", color=TEXT, size=10.5, ha="right", va="center", family="monospace")
    axes.text(-0.35, -0.6, "row_splits", color=TEXT, size=10.5, ha="right", va="center", family="monospace")
    for split in nb.row_splits:
        axes.plot([split, split], [-0.15, 0.9], color=FAINT, linewidth=1.2)
        axes.text(split, -0.6, split, color=TEXT, size=10.5, ha="center", va="center")
    for row, (begin, end) in enumerate(zip(nb.row_splits, nb.row_splits[1:], strict=False)):
        axes.text((begin + end) / 2, 2.45, f"row {row}", color=row_colors[row], size=9.5, ha="center", va="center")
    return fig


def draw_metric():
    points = np.random.default_rng(11).uniform(-1.4, 1.4, (150, 2))
    lengths = np.stack([np.linalg.norm(points, order, axis=1) for order in (1, 2, np.inf)])
    points = points[((abs(lengths - 1) > 0.06) & (lengths > 0.15)).all(axis=0)]  # off the lines and the cross
    points = points[apart(points, 0.13)]
    query = np.zeros((1, 2))
    fig = figure(9, 3.4)
    metrics = (("l2", "straight line"), ("l1", "sum of the steps"), ("linf", "longest step"))
    for i, (metric, words) in enumerate(metrics):
        nb = kp.radius_search(points, query, 1.0, metric=metric)
        axes = panel(fig, (0.15 + 2.95 * i, 0.05, 2.8, 3.3), (-1.5, 1.5), (-1.5, 2.03))
        ball(axes, query[0], 1, BLUE, metric)
        dots(axes, np.delete(points, nb.index, axis=0), FAINT, 34)
        dots(axes, points[nb.index], BLUE, 34)
        query_mark(axes, query[0])
        axes.text(0, 1.84, f'metric="{metric}"', color=TEXT, size=11, ha="center", va="center", family="monospace")
        axes.text(0, 1.61, f"{words}: {nb.num_pairs} points", color=PALE, size=10, ha="center", va="center")
    return fig


def draw_order():
    points = np.random.default_rng(337).uniform(-1.2, 1.2, (90, 2))
    length = np.linalg.norm(points, axis=1)
    points = points[(abs(length - 1) > 0.11) & (length > 0.25)]  # off the line and the cross
    points = np.random.default_rng(4).permutation(points[apart(points, 0.25)])
    query = np.zeros((1, 2))
    by_distance = kp.radius_search(points, query, 1.0, sort="distance", return_distances=True)
    color, ink = ["#eceff3"] * len(points), [PALE] * len(points)
    for i, distance in zip(by_distance.index, by_distance.distance, strict=True):
        color[i], ink[i] = NEAR_TO_FAR(1.5 * distance - 0.4), "white" if distance < 0.6 else TEXT
    fig = figure(9, 3.7)
    axes = panel(fig, (0.1, 0.1, 3.5, 3.5), (-1.35, 1.35), (-1.35, 1.35))
    ball(axes, query[0], 1, BLUE)
    ball(axes, query[0], by_distance.distance[5:7].mean(), PALE, facecolor="none", linestyle="--", linewidth=1.3)
    dots(axes, points, color, 230)
    for i, point in enumerate(points):
        axes.text(*point, i, color=ink[i], size=9.5, ha="center", va="center_baseline", zorder=4)
    query_mark(axes, query[0])
    axes = panel(fig, (3.85, 0.15, 5.05, 3.4), (0, 13.4), (-0.35, 8.7))
    rows = (("index", None), ("distance", None), ("index", 6), ("distance", 6))
    for line, (sort, max_neighbors) in enumerate(rows):
        index = kp.radius_search(points, query, 1.0, sort=sort, max_neighbors=max_neighbors).index
        words = f'sort="{sort}"' + (f", max_neighbors={max_neighbors}" if max_neighbors else "")
        y = 6.7 - 2.3 * line
        axes.text(0, y + 1.45, words, color=TEXT, size=10, va="center", family="monospace")
        cells(axes, 0, y, index, [color[i] for i in index], [ink[i] for i in index])
        if max_neighbors:
            axes.text(6.4, y + 0.47, "the six in the dashed circle", color=PALE, size=10, va="center")
    return fig


def draw_pyramid():
    points = np.random.default_rng(3).random((300, 2)) * 0.8
    fine, coarse = kp.build_pyramid(points, voxel_size=0.1, num_levels=2)
    lists = (
        ("neighbors", "level 0 to level 0", BLUE, fine.neighbors, fine, fine),
        ("pools", "level 0 to level 1", ORANGE, fine.pools, fine, coarse),
        ("upsamples", "level 1 to level 0", GREEN, fine.upsamples, coarse, fine),
    )
    fig = figure(9, 3.55)
    for i, (name, words, color, nb, sources, targets) in enumerate(lists):
        axes = panel(fig, (0.15 + 2.95 * i, 0.05, 2.8, 3.45), (-0.02, 0.82), (-0.02, 1.015))
        axes.text(0.4, 0.965, f"level.{name}", color=color, size=11, ha="center", va="center", family="monospace")
        axes.text(0.4, 0.895, words, color=PALE, size=10, ha="center", va="center")
        dots(axes, fine.points, PALE, 20)
        if i:
            dots(axes, coarse.points, "white", 62, marker="s", edgecolors=ORANGE, linewidths=1.8)
        queries = range(len(targets.points))  # all, or only the one in the middle
        if i < 2:
            queries = kp.knn_search(targets.points, np.array([[0.4, 0.4]]), 1).index
            target = targets.points[queries[0]]
            ball(axes, target, fine.radius, color)
            dots(axes, target[None], color, 80, marker="os"[i])
        for q in queries:
            for n in nb.index[nb.row_splits[q] : nb.row_splits[q + 1]]:
                arrow(axes, sources.points[n], targets.points[q], color, (2, 6) if i < 2 else (5, 2))
    return fig


def main(folder):
    for name in ("list", "metric", "order", "pyramid"):
        path = Path(folder) / f"neighbours_{name}.png"
        FigureCanvasAgg(globals()[f"draw_{name}"]()).print_png(
            path, metadata={"Software": None}, pil_kwargs={"optimize": True}
        )
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
