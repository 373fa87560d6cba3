"""farthest_point_sampling. The chosen points are compared exactly, for both methods."""

import itertools
import re
from pathlib import Path

import clouds
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_same_bits

import kpcore as kp

METHODS = ["exact", "bucketed"]
both_methods = pytest.mark.parametrize("method", METHODS)
both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def check_sampling(points, num, methods=(*METHODS, None), **options):
    if not reference.is_measurable(points, points_row_splits=options.get("row_splits")):
        for method in methods:
            with pytest.raises(ValueError, match=r"points: expected .*distances that float.* rescale them"):
                kp.farthest_point_sampling(points, num, method=method, **options)
        return
    index, row_splits = reference.farthest_points(points, num, **options)
    for method in methods:
        got = kp.farthest_point_sampling(points, num, method=method, **options)
        assert_same_bits(got.index, index.astype(np.int32))
        assert_same_bits(got.row_splits, row_splits.astype(np.int64))


# ---- against the reference


@both_dtypes
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("name", clouds.NASTY)
def test_nasty_clouds(name, dim, dtype):
    points = clouds.nasty(name, dim, dtype)[0][:400]  # a lattice in 16 dimensions has 65,536
    check_sampling(points, 100)
    check_sampling(points, len(points) + 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_number_for_each_item(method):
    points, row_splits = clouds.uniform(500)[0], clouds.splits([100, 0, 300, 60, 40])
    counts, start = np.array([7, 3, 0, 60, 999]), np.array([5, 0, 9, 1, 0])
    sampled = kp.farthest_point_sampling(points, counts, row_splits=row_splits, start=start, method=method)
    whole = kp.farthest_point_sampling(points, row_splits=row_splits, start=start, method=method).index
    expected = [whole[begin : begin + count] for begin, count in zip(row_splits[:-1], [7, 0, 0, 60, 40], strict=True)]
    assert sampled.row_splits.tolist() == [0, 7, 7, 7, 67, 107]
    assert sampled.index.tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize("num", [1, 2, *clouds.SIZES[:-1], 1025])
def test_sizes(num):
    points, _ = clouds.uniform(num)
    check_sampling(points, num)
    check_sampling(points, num // 2 + 1, start=num // 3)


@pytest.mark.parametrize("dim", range(1, 17))
def test_dimensions(dim):
    check_sampling(clouds.uniform(1000, dim)[0], 300)


@both_dtypes
@pytest.mark.parametrize("name", ["uniform", "lattice_ties", "lattice_far_away", "mixed_density", "duplicates"])
def test_trees_of_several_levels(name, dtype):
    # 20,000 points make about 400 buckets, so three levels of nodes with 16 children.
    points = clouds.uniform(20_000, dtype=dtype)[0] if name == "uniform" else clouds.nasty(name, 3, dtype, 20_000)[0]
    check_sampling(points, 500, start=7)


@given(st.data())
def test_any_cloud_any_options(data):
    points, _ = clouds.nasty(
        data.draw(st.sampled_from(list(clouds.NASTY))),
        data.draw(st.integers(1, 5)),
        data.draw(clouds.float_types),
        data.draw(st.integers(1, 400)),
        data.draw(clouds.seeds),
    )
    options = {}
    if data.draw(st.booleans()):
        options["row_splits"] = data.draw(clouds.row_splits_of(len(points)))
    lengths = np.diff(options.get("row_splits", [0, len(points)]))
    if data.draw(st.booleans()):
        options["start"] = np.array([data.draw(st.integers(0, max(0, length - 1))) for length in lengths], np.int64)
    elif nonempty := lengths[lengths > 0].tolist():
        options["start"] = data.draw(st.integers(0, min(nonempty) - 1))
    if len(points) and data.draw(st.booleans()):  # the distance of two points, or nearly
        pair = points[[data.draw(st.integers(0, len(points) - 1)) for _ in range(2)]].astype(np.float64)
        least = float(np.hypot.reduce(pair[1] - pair[0])) * data.draw(st.sampled_from([1, 0.3, 1 + 1e-6]))
        options["min_distance"] = least if 1e-18 < least < 1e18 else 0.0
    check_sampling(points, data.draw(st.none() | st.integers(1, 420)), **options)


@given(seed=clouds.seeds, dtype=clouds.float_types, levels=st.integers(2, 5), dim=st.integers(1, 4))
def test_few_values_many_ties(seed, dtype, levels, dim):
    points = np.random.default_rng(seed).integers(0, levels, (300, dim)).astype(dtype)
    check_sampling(points, 300)


@both_dtypes
@pytest.mark.parametrize("exponents", [(-200, 120), (-45, -38), (30, 38)])
def test_squares_that_underflow_and_overflow(exponents, dtype):
    # 1e-45 is below the smallest normal float32, 1e38 near the largest: squares are 0 or infinite, and distances tie.
    rng = np.random.default_rng(0)
    with np.errstate(under="ignore"):
        points = (
            (rng.normal(size=(500, 3)) * 10.0 ** rng.integers(*exponents, (500, 1))).clip(-3e38, 3e38).astype(dtype)
        )
    check_sampling(points, 500)


@pytest.mark.parametrize("growth", [1.05, 1.2, 1.5])
def test_clouds_that_resist_cutting(growth):
    # Coordinates grow geometrically: a cut in the middle of the bounding box separates only a few points.
    points = np.zeros((1500, 2))
    points[:, 0] = growth ** np.minimum(np.arange(1500), 700 * np.log(1.5) / np.log(growth))
    check_sampling(points, 300)


# ---- a distance that points keep


@both_dtypes
@pytest.mark.parametrize("dim", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1, 0.1])
def test_points_that_keep_a_distance(scale, dim, dtype):
    # On a lattice many points are at exactly the distance, which they may be. 0.1 is rounded.
    points = (np.random.default_rng(0).integers(0, {1: 300, 2: 20, 3: 8, 5: 3}[dim], (600, dim)) * scale).astype(dtype)
    splits = np.array([0, 250, 250, 251, 600])
    counts = []
    for least in (0.5, 1, 2**0.5, 2, 3.1):
        check_sampling(points, None, min_distance=least * scale)
        check_sampling(points, 40, min_distance=least * scale, row_splits=splits, start=np.array([9, 0, 0, 348]))
        counts.append(len(kp.farthest_point_sampling(points, min_distance=least * scale).index))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


@both_methods
@both_dtypes
def test_the_distance_may_be_exactly_the_least(dtype, method):
    points = np.arange(9, dtype=dtype)[:, None]
    for least, expected in ((4, [0, 8, 4]), (np.nextafter(dtype(4), dtype(5)), [0, 8]), (2, [0, 8, 4, 2, 6])):
        for num in (None, 7):
            assert kp.farthest_point_sampling(points, num, min_distance=least, method=method).index.tolist() == expected


@both_methods
def test_all_points(method):
    points, splits = clouds.nasty("duplicates")[0], np.array([0, 0, 100, 300])
    check_sampling(points, None, (method,), row_splits=splits)
    got = kp.farthest_point_sampling(points, row_splits=splits, method=method)
    assert sorted(got.index.tolist()) == list(range(300)) and got.row_splits.tolist() == splits.tolist()
    # Without a distance copies follow by index; with one, however small, no point is there twice.
    far = kp.farthest_point_sampling(points, min_distance=1e-6, method=method)
    assert len(far.index) == len(np.unique(points, axis=0)) < 300


def test_nothing_keeps_any_distance():
    got = kp.farthest_point_sampling(np.empty((0, 3)), min_distance=0.5, row_splits=np.array([0, 0, 0]))
    assert (got.index.shape, got.index.dtype, got.row_splits.tolist()) == ((0,), np.int32, [0, 0, 0])
    one = kp.farthest_point_sampling(np.zeros((3, 3)), 2, min_distance=0.5, row_splits=np.array([0, 2, 2, 3]))
    assert (one.index.tolist(), one.row_splits.tolist()) == ([0, 2], [0, 1, 1, 2])


@both_methods
def test_the_choice_of_released_code(method):
    prefix, cases = "kpconvx/furthest_point_sample/", set()
    with np.load(Path(__file__).parent / "golden" / "clients_core.npz") as file:
        golden = {key.removeprefix(prefix): file[key] for key in file if key.startswith(prefix)}
    for case in {key.partition("/")[0] for key in golden}:
        points, num, least = (golden[f"{case}/in/{name}"] for name in ("points", "new_n", "min_d"))
        expected = golden[f"{case}/out/index"]
        got = kp.farthest_point_sampling(
            points, int(num) if num > 0 else None, min_distance=float(least), method=method
        ).index
        # Where only copies are left that code repeats the last index.
        distinct = len(np.unique(points, axis=0))
        assert_same_bits(got[:distinct], expected[:distinct])
        assert len(got) == len(expected)
        cases.add(case)
    assert len(cases) == 10


# ---- one rule each


@both_methods
def test_the_farthest_comes_first(method):
    points = np.array([[0.0], [1.0], [9.0], [10.0], [4.0]])
    assert kp.farthest_point_sampling(points, 5, method=method).index.tolist() == [0, 3, 4, 1, 2]


@both_methods
def test_ties_go_to_the_smallest_index(method):
    # Many copies of the corners of a cube, from its centre: all corners tie, then all copies of them.
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    points = np.concatenate([np.zeros((1, 3)), np.tile(corners, (100, 1))])
    assert kp.farthest_point_sampling(points, 12, method=method).index.tolist() == list(range(12))


@both_methods
def test_no_point_is_chosen_twice(method):
    got = kp.farthest_point_sampling(np.full((300, 3), 0.1), 300, start=5, method=method).index
    assert got.tolist() == [5, *(i for i in range(300) if i != 5)]
    row_splits = np.array([0, 100, 300])
    got = kp.farthest_point_sampling(np.full((300, 3), 0.1), 50, row_splits=row_splits, start=5, method=method).index
    assert got.tolist() == [5, *range(5), *range(6, 50), 105, *range(100, 105), *range(106, 150)]


@both_methods
def test_at_most_all_points_are_chosen(method):
    got = kp.farthest_point_sampling(clouds.uniform(100)[0], 10**12, method=method)
    assert sorted(got.index.tolist()) == list(range(100))
    assert got.row_splits.tolist() == [0, 100]


@both_methods
def test_fewer_are_the_first_of_more(method):
    points, _ = clouds.uniform(2000)
    more = kp.farthest_point_sampling(points, 500, method=method).index
    for num in (1, 2, 17, 499):
        assert_same_bits(kp.farthest_point_sampling(points, num, method=method).index, more[:num].copy())


@both_methods
def test_a_batch_is_its_items_one_after_the_other(method):
    row_splits, (points, _) = kp.row_splits([400, 0, 1, 129, 0]), clouds.uniform(530)
    start = np.array([3, 0, 0, 128, 0])
    got = kp.farthest_point_sampling(points, 100, row_splits=row_splits, start=start, method=method)
    assert kp.lengths(got.row_splits).tolist() == [100, 0, 1, 100, 0]
    for item, (first, last) in enumerate(itertools.pairwise(row_splits)):
        alone = kp.farthest_point_sampling(points[first:last], 100, start=start[item : item + 1], method=method).index
        assert_same_bits(got.index[got.row_splits[item] : got.row_splits[item + 1]], alone + np.int32(first))


def test_empty_input():
    for row_splits in (None, np.array([0]), np.array([0, 0, 0])):
        index, got = kp.farthest_point_sampling(np.empty((0, 3), np.float32), 5, row_splits=row_splits)
        assert (index.shape, index.dtype, got.tolist()) == (
            (0,),
            np.int32,
            [0] * (2 if row_splits is None else len(got)),
        )


def test_chosen_points_cover_the_others():
    # No point is farther from the chosen points than these are from each other.
    points = clouds.uniform(3000, dtype=np.float64)[0]
    chosen = points[kp.farthest_point_sampling(points, 100).index]
    between = reference.squared_distances(chosen, chosen)[np.triu_indices(100, 1)]
    assert reference.squared_distances(chosen, points).min(1).max() <= between.min()


def test_permuting_the_points_permutes_the_choice():
    points = clouds.uniform(2000, dtype=np.float64)[0]  # without ties
    order = np.random.default_rng(0).permutation(2000)
    expected = kp.farthest_point_sampling(points, 200, start=int(order[3])).index
    assert np.array_equal(order[kp.farthest_point_sampling(points[order], 200, start=3).index], expected)


# ---- the same bits everywhere


@both_methods
@both_dtypes
@pytest.mark.parametrize("dim", [2, 3, 5])
@pytest.mark.parametrize("name", ["uniform", "lattice"])
def test_same_bits_with_any_instructions_and_threads(name, dim, dtype, method, isa, set_threads):
    # Equal to the reference, so the same for all instruction sets and numbers of threads.
    points = (
        clouds.uniform(3000, dim, dtype)[0] if name == "uniform" else clouds.nasty("lattice_ties", dim, dtype, 3000)[0]
    )
    num = len(points) // 3
    row_splits = np.array([0, num, num, num + 500, len(points)])
    for threads in (1, 2, 3):
        set_threads(threads)
        check_sampling(points, 200, (method,))
        check_sampling(points, 200, (method,), row_splits=row_splits)


@pytest.mark.parametrize("name", ["uniform", "lattice"])
def test_the_scan_shares_its_points_among_threads(name, isa, set_threads):
    # "exact" takes one thread for every 65,536 points.
    points = clouds.uniform(200_000)[0] if name == "uniform" else clouds.nasty("lattice_ties", num=200_000)[0]
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(kp.farthest_point_sampling(points, 100, method="exact").index)
        results.append(kp.farthest_point_sampling(points, 100, method="bucketed").index)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("name", clouds.SCANS)
def test_real_scans(shared, name):
    file, read, _ = clouds.SCANS[name]
    points = np.ascontiguousarray(read(shared / "data" / file))
    check_sampling(points, 64)
    check_sampling((points - np.floor(points.mean(0))).astype(np.float32), 64)
    assert_same_bits(*(kp.farthest_point_sampling(points, 3000, method=method).index for method in METHODS))


# ---- errors


@both_methods
@both_dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 63, 637, 999])
def test_a_coordinate_that_is_not_finite_names_its_row(row, value, dtype, method):
    points = clouds.uniform(1000, dtype=dtype)[0]
    points[row, 1] = points[999, 2] = value
    with pytest.raises(ValueError, match=rf"points: expected finite coordinates, got .* in row {row}$"):
        kp.farthest_point_sampling(points, 1, method=method)


ERRORS = {
    "17-D": ({"points": np.zeros((5, 17))}, ValueError, "points: expected (N, D) with D = 1 to 16, got (5, 17)"),
    "0-D": ({"points": np.zeros((5, 0))}, ValueError, "points: expected (N, D) with D = 1 to 16, got (5, 0)"),
    "1-d": ({"points": np.zeros(5)}, ValueError, "points: expected (N, D), got (5,)"),
    "list": ({"points": [[0.0]]}, TypeError, "points: expected a NumPy or CuPy array, got list"),
    "integers": ({"points": np.zeros((5, 3), int)}, TypeError, "points: expected float32 or float64, got int64"),
    "none": ({"num": 0}, ValueError, "num: expected at least 1, got 0"),
    "below none": ({"num": np.array([-1])}, ValueError, "num: expected numbers of at least 0, got -1 for item 0"),
    "for other items": ({"num": np.array([2, 2])}, ValueError, "num: expected (1,) to match row_splits, got (2,)"),
    "half of each": ({"num": np.array([1.5])}, TypeError, "num: expected int64, got float64"),
    "half": ({"num": 1.5}, TypeError, "num: expected an integer, got float"),
    "before": ({"start": -1}, ValueError, "start: expected 0 to 2147483647, got -1"),
    "after": ({"start": 5}, ValueError, "start: expected 0 to 4 in item 0, got 5"),
    "after in an item": (
        {"start": 2, "row_splits": np.array([0, 0, 3, 5])},
        ValueError,
        "start: expected 0 to 1 in item 2, got 2",
    ),
    "one of them": (
        {"start": np.array([0, -1]), "row_splits": np.array([0, 3, 5])},
        ValueError,
        "start: expected 0 to 1 in item 1, got -1",
    ),
    "too few": (
        {"start": np.array([0]), "row_splits": np.array([0, 3, 5])},
        ValueError,
        "start: expected (2,) to match row_splits, got (1,)",
    ),
    "start of int32": ({"start": np.zeros(1, np.int32)}, TypeError, "start: expected int64, got int32"),
    "row_splits": (
        {"row_splits": np.array([0, 4])},
        ValueError,
        "row_splits: expected values from 0 to 5 to match points",
    ),
    "below zero": ({"min_distance": -0.1}, ValueError, "min_distance: expected a number of at least zero, got -0.1"),
    "no distance": ({"min_distance": None}, TypeError, "min_distance: expected a number, got NoneType"),
    "not finite": ({"min_distance": np.inf}, ValueError, "min_distance: expected a finite number"),
    "too near": ({"min_distance": 1e-200}, ValueError, "min_distance: expected a number with a square that"),
    "method": ({"method": "fast"}, ValueError, "method: expected None or 'exact' or 'bucketed', got 'fast'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        kp.farthest_point_sampling(**{"points": np.zeros((5, 3)), "num": 2} | changes)


def test_inputs_stay_as_they_are():
    points, start = clouds.uniform(500)[0], np.array([3])
    points.flags.writeable = start.flags.writeable = False
    check_sampling(points, 50, start=start)
    check_sampling(points[::2], 50)
    check_sampling(np.asfortranarray(points), 50)
