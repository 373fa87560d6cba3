"""Labelling in blocks: which points a block has, and that labels depend on these and the model alone."""

import numpy as np
import pytest
from reference import assert_same_bits

import kpcore as kp
from kpcore.io.cloud import Content, Request, cloud_of
from kpcore.pipeline import blocks, data, labelling
from kpcore.pipeline.blocks import BlockSize
from kpcore.pipeline.data import Columns, Reach
from kpcore.pipeline.model import Model
from kpcore.pipeline.settings import from_dict


def cloud_at(points, **fields):
    return cloud_of(Content(np.asarray(points), tuple(fields), fields), Request(exact=True))


def terrain(num=6000, at=(84_900.0, 447_500.0, 3.0), seed=0):
    """(points in float64 in the coordinates of a map, intensity) of ground with a house."""
    rng = np.random.default_rng(seed)
    points = rng.uniform((0, 0, 0), (140, 40, 0.2), (num, 3))
    points[(np.abs(points[:, :2] - (30, 20)) < 6).all(axis=1), 2] += 7
    points = np.round(points, 2)  # as in files: many points share a coordinate, and some are at the same place
    points[-50:] = points[:50]
    return points + at, rng.integers(0, 200, num).astype(np.float32)


SETTINGS = {
    "data": {"train": ["a.laz"], "classes": {"low": [2], "high": [6]},
             "features": ["one", "height_above_ground", "intensity"], "ground": {"window": 10.0}},
    "network": {"voxel_size": 1.0, "levels": 2, "width": 8, "kernel_size": 5},
    "training": {"radius": 6.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """A network with random weights, which tells the slightest change of its input."""
    config = from_dict(SETTINGS)
    net = config.net()
    params, state = net.init(3)
    columns = Columns(config.widths, {"height_above_ground": 3.0, "intensity": 100.0},
                      {"height_above_ground": 4.0, "intensity": 50.0})  # fmt: skip
    return Model(net, params, state, config, columns, BlockSize(20.0, 6.0))


NO_REACH = Reach(0.0, 0.0)


def ranks(cloud):
    return blocks.ranks_of(data.coordinates(cloud), {})


def cells(points, side):
    return {tuple(cell) for cell in np.floor(points[:, :2] / side)}


@pytest.mark.parametrize(
    ("side", "halo", "reach"), [(20.0, 6.0, 0.0), (20.0, 6.0, 30.0), (7.0, 12.0, 3.0), (1e4, 1.0, 0)]
)
def test_points_of_blocks(side, halo, reach):
    points, _ = terrain(2000)
    rows = np.flatnonzero(np.arange(2000) % 3 != 0)
    cloud = cloud_at(points)
    seen_by_cell = np.zeros(len(points), int)
    further = 4.0  # from where heights above ground depend on a point
    of_rows = blocks.ranks_of(data.coordinates(cloud, rows), {})
    listed = [*blocks.blocks_of(cloud, rows, BlockSize(side, halo), Reach(reach, reach + further), of_rows)]
    assert len(listed) == len(cells(points[rows], side))
    for block in listed:
        assert_same_bits(rows[block.positions], block.rows)
        low = np.floor(block.center[:2] / side) * side
        expected = [
            {*rows[((points[rows, :2] >= low - margin) & (points[rows, :2] <= low + side + margin)).all(axis=1)]}
            for margin in (halo + reach, halo)
        ]
        assert [{*block.rows}, {*block.rows[block.seen]}] == expected
        wide = halo + reach + further
        is_around = ((points[rows, :2] >= low - wide) & (points[rows, :2] <= low + side + wide)).all(axis=1)
        assert {*block.around} == {*rows[is_around]} - {*block.rows}
        in_cell = block.rows[block.inside]
        assert (np.floor(points[in_cell, :2] / side) == low / side).all()
        seen_by_cell[in_cell] += 1
        assert (np.diff(points[block.rows, 0]) >= 0).all()
    assert (seen_by_cell[rows] == 1).all() and seen_by_cell.sum() == len(rows)


def test_labels_do_not_depend_on_order_threads_or_other_blocks(model):
    points, intensity = terrain()
    first = labelling.label(model, cloud_at(points, intensity=intensity), keep_probabilities=True)
    assert 0.05 < first.classes.mean() < 0.95 and len(cells(points, 20.0)) >= 6
    order = np.random.default_rng(1).permutation(len(points))
    shuffled = labelling.label(model, cloud_at(points[order], intensity=intensity[order]), keep_probabilities=True)
    assert_same_bits(shuffled.probabilities, first.probabilities[order])

    threads = kp.get_num_threads()
    try:
        kp.set_num_threads(1)
        one = labelling.label(model, cloud_at(points, intensity=intensity), keep_probabilities=True)
    finally:
        kp.set_num_threads(threads)
    assert_same_bits(one.probabilities, first.probabilities)

    # The points of a cell with all that labels in it depend on: cells of the second lattice reach 10 beyond, the halo
    # is 6, and heights above ground reach 15.
    low = np.floor(points[points[:, 0].argmin(), :2] / 20) * 20
    near = ((points[:, :2] >= low - 31) & (points[:, :2] <= low + 51)).all(axis=1)
    assert 0 < near.sum() < len(points)
    cut = labelling.label(model, cloud_at(points[near], intensity=intensity[near]), keep_probabilities=True)
    in_cell = (np.floor(points / 20) * 20)[:, :2] == low
    in_cell = in_cell.all(axis=1)
    assert_same_bits(cut.probabilities[in_cell[near]], first.probabilities[in_cell])


def test_points_at_the_same_place_with_other_fields(model):
    points, intensity = terrain(500)
    twice, values = np.concatenate([points, points]), np.concatenate([intensity, intensity + 1])
    first = labelling.label(model, cloud_at(twice, intensity=values), keep_probabilities=True)
    order = np.random.default_rng(1).permutation(1000)
    shuffled = labelling.label(model, cloud_at(twice[order], intensity=values[order]), keep_probabilities=True)
    assert_same_bits(shuffled.probabilities, first.probabilities[order])


def test_a_block_is_one_item_of_the_network(model):
    """The probabilities are those of the network on the block's points by itself."""
    points, intensity = terrain(1500)
    cloud = cloud_at(points, intensity=intensity)
    single = Model(model.net, model.params, model.state, model.settings, model.columns, BlockSize(20.0, 6.0, 1))
    block = next(blocks.blocks_of(cloud, np.arange(1500), single.block_size, Reach(0.0, 15.0), ranks(cloud)))
    heights = kp.height_above_ground(points[block.rows], window=10.0)[block.seen]
    rows = block.rows[block.seen]
    columns = np.column_stack([np.ones(len(rows)), (heights - 3) / 4, (intensity[rows] - 100) / 50]).astype(np.float32)
    local = (points[rows] - block.center).astype(np.float32)
    sub = kp.grid_subsample(local, 1.0, features=columns)
    pyramid = model.net.pyramid(sub.points, subsampled=True)
    shares = kp.softmax(model.net(kp, model.params, model.state, pyramid, sub.features).logits)
    nearest = ((local[:, None] - sub.points) ** 2).sum(axis=2).argmin(axis=1)
    inside = block.inside[block.seen]
    got = labelling.label(single, cloud, keep_probabilities=True).probabilities
    np.testing.assert_allclose(got[rows[inside]], shares[nearest[inside]], atol=1e-5)


def test_far_points_and_one_point(model):
    points = np.array([[0.0, 0, 0], [1e9, -3, 2], [1e9, -3, 2], [-5e8, 1, 0]])
    labelled = labelling.label(model, cloud_at(points, intensity=np.zeros(4, np.float32)), keep_probabilities=True)
    np.testing.assert_allclose(labelled.probabilities.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"side: expected blocks with which .* got a side of 20 and coordinates up to 1e"
    ):
        labelling.label(model, cloud_at(points * 1e8, intensity=np.zeros(4, np.float32)))


def test_the_size_of_blocks():
    scenes = [data.Scene(np.random.default_rng(0).uniform((0, 0, 0), (100, 50, 3), (5000, 3)).astype(np.float32),
                         None, None, None, None, None)]  # fmt: skip
    config = from_dict(SETTINGS)
    # 5000 points of level 0 on some 5000 square units: 150,000 on a square of 390 x 390
    side, halo, lattices = blocks.default_size(config, scenes)
    assert 350 < side < 420 and side == float(f"{side:.2g}") and (halo, lattices) == (6.0, 2)
    assert blocks.default_size(from_dict(SETTINGS | {"blocks": {"side": 31.5, "halo": 2.0}}), scenes) == (31.5, 2.0, 2)
    many = [data.Scene(np.tile(scenes[0].points, (400, 1)), None, None, None, None, None)]
    assert blocks.default_size(config, many).side == 4 * 6.0
    assert blocks.size_without_training(config) == (48.0, 6.0, 2)


def test_which_method_labels(model):
    assert labelling.chosen_method(model) == ("blocks", [])
    assert labelling.chosen_method(model, votes=3) == ("potentials", [])
    assert labelling.chosen_method(model, "potentials")[0] == "potentials"
    with pytest.raises(ValueError, match="votes: expected none with blocks, where each point gets one, got 2"):
        labelling.chosen_method(model, "blocks", 2)
    with pytest.raises(ValueError, match="mode: expected 'blocks' or 'potentials', got 'spheres'"):
        labelling.chosen_method(model, "spheres")
    local = from_dict(SETTINGS | {"data": SETTINGS["data"] | {"features": ["local"]}})
    other = Model(local.net(), {}, {}, local, Columns(local.widths, {}, {}))
    method, (note,) = labelling.chosen_method(other)
    assert method == "potentials" and "the feature local is measured from the centre" in note
    with pytest.raises(ValueError, match="mode: expected potentials for a model with the feature local, got blocks"):
        labelling.chosen_method(other, "blocks")


def test_two_lattices_are_averaged(model):
    """The second is shifted by half a side and turned; the network sees turned points only if training did."""
    points, intensity = terrain(2500)
    cloud = cloud_at(points, intensity=intensity)
    both = labelling.label(model, cloud, keep_probabilities=True).probabilities
    single = Model(model.net, model.params, model.state, model.settings, model.columns, BlockSize(20.0, 6.0, 1))
    first = labelling.label(single, cloud, keep_probabilities=True).probabilities
    second = 2 * both - first
    assert abs(second - first).max() > 1e-4 and abs(both.sum(axis=1) - 1).max() < 1e-5
    # A lattice that is shifted by half a side is that of points shifted by as much.
    shifted = [*blocks.blocks_of(cloud, np.arange(2500), single.block_size, NO_REACH, ranks(cloud), 0.5)]
    moved = cloud_at(points - np.array([10.0, 10.0, 0]), intensity=intensity)
    plain = [*blocks.blocks_of(moved, np.arange(2500), single.block_size, NO_REACH, ranks(moved))]
    assert [{*one.rows[one.inside]} for one in shifted] == [{*one.rows[one.inside]} for one in plain]
    for rotate, are_turned in (("vertical", True), ("none", False), (20.0, False), (45.0, True)):
        config = from_dict(SETTINGS | {"training": {"radius": 6.0, "rotate": rotate}})
        other = Model(model.net, model.params, model.state, config, model.columns, model.block_size)
        turned, plain = (blocks.input_of(other, cloud, shifted[0], angle).pyramid[0].points for angle in (30.0, 0.0))
        # Positions are means over other voxels, so that only their hull agrees.
        width = np.ptp(turned, axis=0) - np.ptp(plain, axis=0)
        assert (abs(width[:2]).max() > 2) == are_turned
