"""What networks learn: fields in scans, deformed kernels, inputs that maximise a feature; pictures and commands."""

import base64
import re
import struct

import numpy as np
import pytest

import kpcore as kp
from kpcore import cli, nn, picture, visualization
from kpcore.pipeline import batches, inspection
from kpcore.pipeline.settings import from_dict
from kpcore.pipeline.training import Model, Training

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

VOXEL, RADIUS, SHIFT = 0.15, 1.2, (1000, 2000, 30)
KPNEXT = {
    "voxel_size": VOXEL, "kind": "kpnext", "depths": [1, 1, 1], "width": 16, "num_neighbors": [8, 8, 8],
    "shells": [1, 6], "attention_norm": False,
}  # fmt: skip


def config(network=None, **more):
    return from_dict({
        "data": {
            "train": [{"indoor": 0, "points": 5000}], "features": ["one", "color"],
            "classes": {"flat": [0, 1], "upright": [2, 3, 4, 5], "thing": [*range(6, 15)]},
        },
        "network": network or {"voxel_size": VOXEL, "levels": 3, "width": 16, "kernel_size": 7} | more,
        "training": {"radius": RADIUS, "batch_points": 3000},
    })  # fmt: skip


def new_model(settings, folder):
    """A Model of its initial parameters, and the checkpoint."""
    run = Training(settings, folder, folder)
    run._save("model.safetensors", {})
    return Model.load(folder / "model.safetensors"), folder / "model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(Model, path) of networks that label points, by kind."""
    settings = {
        "rigid": config(), "deformable": config(deformable=2), "resampled": config(resampled=2),
        "kpnext": config(KPNEXT),
    }  # fmt: skip
    return {kind: new_model(one, tmp_path_factory.mktemp(kind)) for kind, one in settings.items()}


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A scan of the flat far from the origin."""
    cloud = kp.scenes.indoor(20_000, seed=3)
    path = tmp_path_factory.mktemp("scan") / "flat <3>.npz"
    np.savez(path, points=cloud.points + np.array(SHIFT, np.float64), colors=cloud.colors, labels=cloud.labels)
    return path


@pytest.fixture
def command(capsys, tmp_path):
    def run(*words):
        """(exit code, stdout, stderr) of a command that writes to the folder `tmp_path / "out"`."""
        code = cli.main([*map(str, words), "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return run


def read_image(path):
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def is_green(image):
    return (image[..., 1] > 1.8 * image[..., 0]) & (image[..., 1] > 1.8 * image[..., 2]) & (image[..., 1] > 100)


# ---- what a pass through a network shows


@pytest.mark.parametrize("kind", ["rigid", "deformable", "resampled", "kpnext"])
def test_blocks_of_the_encoder_are_observed(models, scan, kind):
    model, _ = models[kind]
    scene = inspection.scene_of_file(model, scan)
    _, batch = inspection._input_at(model, scene, scene.points[0])
    seen = []
    run = model.net.new_run(kp, model.params, model.state, observe=lambda *what: seen.append(what))
    logits = model.net.compute_logits(run, batch.pyramid, batch.features, None)
    plain = model.net(kp, model.params, model.state, batch.pyramid, batch.features).logits
    np.testing.assert_array_equal(logits, plain)
    outputs = [(name, level, out) for name, level, out in seen if level is not None]
    levels = [level for name, level, _ in outputs if name.startswith("encoder")]
    assert levels == ([0, 1, 2] if kind == "kpnext" else [0, 0, 1, 1, 2, 2])
    decoded = [level for name, level, _ in outputs if name.startswith("decoder")]
    assert decoded == ([1, 0] if kind == "kpnext" else [1, 1, 0, 0])
    assert all(len(out) == len(batch.pyramid[level].points) for _, level, out in outputs)
    assert len({name for name, *_ in outputs}) == len(outputs)
    assert len(seen) - len(outputs) == (2 if kind == "deformable" else 0)
    assert sum("resampled" in name for name in getattr(model.net, "architecture", ())) == 2 * (kind == "resampled")


def test_a_global_average_is_not_observed():
    net = nn.kpcnn(1, 4, 0.2, levels=2, convs=2, width=8, kernel_size=5)
    params, state = net.init()
    points = np.random.default_rng(0).random((300, 3), np.float32)
    pyramid = net.pyramid(points)
    seen = []
    run = net.new_run(kp, params, state, observe=lambda *what: seen.append(what))
    net.compute_logits(run, pyramid, np.ones((len(pyramid[0].points), 1), np.float32), None)
    assert [level for _, level, _ in seen] == [0, 0, 1, 1]


# ---- fields


def test_the_field_is_the_derivative_of_the_logit(models, scan):
    """A small step along the features changes the logit by the gradient, whose sizes are the field."""
    model, _ = models["rigid"]
    params, state = ({k: v.astype(np.float64) for k, v in part.items()} for part in (model.params, model.state))
    scene = inspection.scene_of_file(model, scan)
    field = inspection.field_at(model, scene, scene.points[50])
    _, batch = inspection._input_at(model, scene, scene.points[50])
    levels = model.net.pyramid(batch.pyramid[0].points.astype(np.float64), subsampled=True)
    row = int(np.argmin(np.linalg.norm(levels[0].points, axis=1)))
    features = batch.features.astype(np.float64)

    def logit(features):
        return model.net(kp, params, state, levels, features).logits[row, field.predicted]

    logits = model.net(kp, params, state, levels, features).logits[row]
    assert field.predicted == logits.argmax()
    for point in np.argsort(field.values)[[-1, -5, -20]]:
        total = 0
        for channel in range(features.shape[1]):
            step = np.zeros_like(features)
            step[point, channel] = 1e-6
            total += abs(logit(features + step) - logit(features - step)) / 2e-6
        assert abs(total / field.values[point] - 1) < 1e-3


@pytest.mark.parametrize("kind", ["rigid", "deformable", "resampled", "kpnext"])
def test_fields_of_levels(models, scan, kind):
    model, _ = models[kind]
    scene = inspection.scene_of_file(model, scan)
    center = inspection.nearest_point(model, scene, scene.full[100])
    assert np.linalg.norm(center - scene.full[100]) <= VOXEL * 3**0.5
    fields = [inspection.field_at(model, scene, center, level) for level in (0, 1, 2, None)]
    for field in fields:
        points = scene.points[field.sphere.rows]
        assert len(points) == len(field.values) and np.linalg.norm(points - center, axis=1).max() <= RADIUS
        inside = np.linalg.norm(points - field.center, axis=1) <= field.radius * (1 + 1e-5)
        assert field.values[inside].sum() >= 0.95 * field.values.sum() > 0
    np.testing.assert_allclose(fields[0].center, center, atol=1e-6)
    if kind != "kpnext":  # two blocks, of neighbours within 2.5 voxels each
        far = np.linalg.norm(scene.points[fields[0].sphere.rows] - center, axis=1) > 5.001 * VOXEL
        assert far.any() and not fields[0].values[far].any()
    assert fields[0].radius < fields[2].radius


def test_constant_offsets_have_another_field(models, scan):
    for kind, differs in (("rigid", False), ("deformable", True)):
        model, _ = models[kind]
        scene = inspection.scene_of_file(model, scan)
        full, detached = (
            inspection.field_at(model, scene, scene.points[9], 2, detach_offsets=d) for d in (False, True)
        )
        assert np.array_equal(full.values, detached.values) != differs


def test_kernels_at_rest_and_deformed(models, scan):
    model, _ = models["deformable"]
    scene = inspection.scene_of_file(model, scan)
    rest, moved = inspection.kernels_at(model, scene, scene.points[20])
    np.testing.assert_array_equal(rest.kernel_points, model.state["encoder.5.conv.kernel_points"])
    assert 0 < np.abs(moved.kernel_points - rest.kernel_points).max() < RADIUS
    for patch in (rest, moved):
        distance = np.linalg.norm(patch.neighbors[:, None] - patch.kernel_points[None], axis=2)
        np.testing.assert_allclose(patch.influence, np.clip(1 - distance / patch.extent, 0, None), atol=1e-6)
        assert patch.radius <= model.net.deform_radius * 4 * VOXEL * (1 + 1e-6)
    np.testing.assert_array_equal(np.abs(rest.neighbors).sum(axis=1).min(), 0)  # the query is its own neighbour
    assert inspection.kernels_at(models["rigid"][0], scene, scene.points[20]) == []


# ---- inputs that maximise a feature


def digits(folder):
    """A Model of digits, and an idx file of images with bars of different lengths and brightness; one is black."""
    rng = np.random.default_rng(0)
    images = np.zeros((12, 12, 12), np.uint8)
    for image in images[1:]:
        begin, length = rng.integers(0, 5), rng.integers(3, 8)
        image[rng.integers(2, 10), begin : begin + length] = rng.integers(100, 256)
    for name, array in (("images", images), ("labels", np.arange(12, dtype=np.uint8) % 10)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())
    files = {"images": "images", "labels": "labels"}
    settings = from_dict({
        "data": {"train": [files], "features": ["one", "value"]},
        "network": {"voxel_size": 1.0, "levels": 2, "width": 8, "kernel_size": 5, "head_width": 8},
    })  # fmt: skip
    return (*new_model(settings, folder), folder / "images")


def test_digits_are_ranked_by_their_largest_activation(tmp_path):
    model, _, path = digits(tmp_path)
    scenes, names = inspection.scenes_of_files(model, [path])
    assert names == [f"images {number}" for number in range(1, 12)]
    chosen = inspection.maximizing_inputs(model, scenes, names, [0, 1], channels=[0, 3], num_inputs=4)
    assert [*chosen] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    for (level, channel), inputs in chosen.items():
        largest = []
        for number in range(len(scenes)):
            batch = batches.make_batch(model.net, scenes, model.columns, [batches.whole_scene(scenes, number)])
            out = inspection._activations(model, batch, batch.features)[level][:, channel]
            largest.append(out.max())
            if names[number] == inputs[0].name:
                distance = np.linalg.norm(batch.pyramid[0].points[:, None] - batch.pyramid[level].points, axis=2)
                np.testing.assert_allclose(inputs[0].activation, out[distance.argmin(axis=1)])
        assert [one.name for one in inputs] == [names[i] for i in np.argsort(-np.array(largest), kind="stable")[:4]]
        np.testing.assert_allclose([one.activation.max() for one in inputs], np.sort(largest)[::-1][:4])


def test_spheres_that_maximise_a_feature_are_apart(models, scan):
    model, _ = models["rigid"]
    scene = inspection.scene_of_file(model, scan)
    seen = []
    chosen = inspection.maximizing_inputs(
        model, [scene], ["a"], [0, 2], num_channels=3, num_inputs=3, watch=seen.append
    )
    assert seen == sorted(seen) and seen[-1] == 1
    assert [level for level, _ in chosen] == [0, 0, 0, 2, 2, 2] and len(chosen) == 6
    for inputs in chosen.values():
        assert 2 <= len(inputs) <= 3
        for i, one in enumerate(inputs):
            assert all(np.linalg.norm(one.center - other.center) >= RADIUS for other in inputs[:i])
            assert np.linalg.norm(one.points, axis=1).max() <= RADIUS * (1 + 1e-6)
    covered = np.concatenate([sphere.rows for sphere in inspection._covering(model, [scene])])
    assert np.array_equal(np.unique(covered), np.arange(len(scene.points)))


def test_spheres_of_one_scene_are_kept_if_they_are_apart():
    spheres = [batches.Sphere(scene, np.array([x, 0.0, 0.0]), np.arange(3)) for scene, x in (
        (0, 0), (0, 0.9), (1, 0.5), (0, -1), (0, 1), (0, 5),
    )]  # fmt: skip
    assert [(s.scene, s.center[0]) for s in inspection._apart(spheres, 1, 4)] == [(0, 0), (1, 0.5), (0, -1), (0, 1)]


def test_the_most_selective_channels():
    maxima = np.array([[1.0, 0, 50, 2], [1, 0, 60, 2], [1, 0, 70, 2], [-np.inf, 3, 3, 3], [1, 9, 80, 2]])
    assert inspection._selective(maxima, 2) == [1, 2]  # of constant channels none is larger than the mean


# ---- pictures


def test_colours_of_a_field():
    values, colors = np.array([0.0, 0.01, 0.2, 1.0]), np.full((4, 3), 200, np.uint8)
    shown = visualization.field_colors(values, colors).astype(int)
    assert (np.ptp(shown[0]) == 0) and 60 < shown[0, 0] < 140  # the darkened colour
    redness = shown[:, 0] - shown[:, 2]
    assert (np.diff(redness) > 0).all() and redness[3] > 150
    np.testing.assert_array_equal(visualization.field_colors(7 * values, colors), shown)  # relative to the largest
    assert np.ptp(visualization.field_colors(np.zeros(2)), axis=1).max() == 0  # without any mass


def test_a_heat_map_over_an_image(tmp_path):
    field = np.zeros((20, 30))
    field[4, 25] = 1
    draw = [visualization.ImageField(np.full((20, 30), 0.5), field, (15, 5), "one", "note")]
    visualization.draw_image_fields(tmp_path / "a.png", "Title", "words", draw)
    image = read_image(tmp_path / "a.png")
    scale = visualization.PANEL[0] / 30  # the panel is as wide as 30 columns
    top = visualization.TOP + (visualization.PANEL[1] - 20 * scale) / 2
    rows, columns = np.nonzero(is_green(image))
    place = [(rows.mean() + 0.5 - top) / scale, (columns.mean() + 0.5 - visualization.MARGIN) / scale]
    np.testing.assert_allclose(place, [15.5, 5.5], atol=0.1)
    hot = image[int(top + 4.5 * scale), int(visualization.MARGIN + 25.5 * scale)]
    assert hot[0] > 200 and hot[2] < 100


def cloud_field(**more):
    rng = np.random.default_rng(0)
    points = rng.random((2000, 3), np.float32) * [2, 2, 0.1] + [5, 5, 5]
    center = points[7]
    values = np.exp(-20 * ((points - center) ** 2).sum(axis=1))
    return visualization.PointField(points, None, values, center, 0.05, **{"name": "a <b>", "note": "95 %"} | more)


def test_the_output_of_a_field_over_points_is_marked(tmp_path):
    hidden = cloud_field()
    under = hidden.points - [0, 0, 1]  # a query below all points is drawn before them
    field = visualization.PointField(np.vstack([hidden.points, under]), None, np.tile(hidden.values, 2),
                                     under[7], 0.05, "hidden")  # fmt: skip
    for name, fields in (("a", [hidden]), ("b", [field]), ("c", [hidden, field, hidden])):
        visualization.draw_point_fields(tmp_path / name, "Title", "words", fields, (0, 0, 1), across=2)
        assert is_green(read_image(tmp_path / name)).sum() > 200 * len(fields)


@pytest.mark.parametrize("up", [(0, 0, 1), (0, -1, 0)])
def test_a_page_holds_the_cloud(tmp_path, up):
    field = cloud_field()
    visualization.write_html(tmp_path / "a.html", field, up)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<title>a &lt;b&gt;: 95 %</title>" in page and "{{" not in page and "http" not in page
    points, colors = (base64.b64decode(text) for text in re.findall(r'bytes\("([^"]*)"\)', page))
    points = np.frombuffer(points, np.float32).reshape(-1, 3)
    assert (points[-1] == 0).all()  # the output
    points, relative = points[:-1], field.points - field.center
    np.testing.assert_allclose(points[:, 2], relative @ up, atol=1e-5)
    between = np.linalg.norm(points[:50, None] - points[:50], axis=2)  # turned, not distorted
    np.testing.assert_allclose(between, np.linalg.norm(relative[:50, None] - relative[:50], axis=2), atol=1e-5)
    assert np.linalg.det(np.linalg.lstsq(relative, points, rcond=None)[0]) > 0.99  # nor mirrored
    colors = np.frombuffer(colors, np.uint8).reshape(-1, 3)
    np.testing.assert_array_equal(colors[:-1], visualization.field_colors(field.values))
    np.testing.assert_array_equal(colors[-1], visualization.MARK)


def test_names_in_a_page(tmp_path):
    field = cloud_field(name="{{SPACING}} {{COLORS}}\n</title>$x$", note="")
    visualization.write_html(str(tmp_path / "a.html"), field, (0, 0, 7))  # as long as one likes
    assert "<title>{{SPACING}} {{COLORS}} &lt;/title&gt;$x$</title>" in (tmp_path / "a.html").read_text()


def test_names_that_are_too_long_lose_their_middle():
    words = picture.shortened(f"2024-05-17_{'x' * 300}\nsubsampled.las", 620, 11)
    assert len(words) < 60 and words.startswith("2024-05-17_xx") and words.endswith("xx subsampled.las")
    assert picture.shortened("cost: 3 $", 620, 11) == r"cost: 3 \$"


FIELD = {"points": np.zeros((4, 3)), "colors": None, "values": np.ones(4), "center": np.zeros(3), "spacing": 1.0}
IMAGE = {"image": np.zeros((5, 6)), "values": np.ones((5, 6)), "center": [4, 5]}


@pytest.mark.parametrize(("kind", "wrong", "message"), [
    ("PointField", {"points": np.zeros((4, 2))}, r"points: expected \(N, 3\), got \(4, 2\)"),
    ("PointField", {"points": np.zeros((0, 3))}, "points: expected at least one"),
    ("PointField", {"points": np.full((4, 3), np.nan)}, "points: expected finite values, got nan"),
    ("PointField", {"values": np.ones(3)}, r"values: expected \(4\), got \(3,\)"),
    ("PointField", {"values": -np.ones(4)}, "values: expected finite values of at least 0, got -1"),
    ("PointField", {"values": np.array([1, 1, 1, np.nan])}, "values: expected finite values of at least 0, got nan"),
    ("PointField", {"center": np.full(3, np.nan)}, "center: expected finite"),
    ("PointField", {"spacing": 0}, "spacing: expected a length above zero, got 0"),
    ("PointField", {"colors": np.ones((4, 3))}, "colors: expected uint8, got float64"),
    ("PointField", {"colors": np.ones((3, 3), np.uint8)}, r"colors: expected \(4, 3\), got \(3, 3\)"),
    ("ImageField", {"image": np.zeros((5, 6), np.uint8)}, "image: expected floats from 0 to 1, got uint8"),
    ("ImageField", {"image": np.full((5, 6), 255.0)}, "image: expected values from 0 to 1, got 255 to 255"),
    ("ImageField", {"image": np.zeros((5, 6, 4))}, r"image: expected \(H, W, 3\), got \(5, 6, 4\)"),
    ("ImageField", {"values": np.zeros((6, 5))}, r"values: expected \(5, 6\), got \(6, 5\)"),
    ("ImageField", {"center": (4, 6)}, "center: expected a row and a column of 5 x 6"),
])  # fmt: skip
def test_fields_that_are_refused(kind, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(visualization, kind)(**({"PointField": FIELD, "ImageField": IMAGE}[kind] | wrong), name="a")


def test_pictures_that_are_refused(tmp_path):
    path, one, up = tmp_path / "a", cloud_field(), (0, 0, 1)
    for call, message in (
        (lambda: visualization.write_html(path, one, (0, 0, 0)), "up: expected the direction of an axis"),
        (
            lambda: visualization.draw_point_fields(path, "", "", [one], (1, 1, 1)),
            "up: expected the direction of an axis",
        ),
        (lambda: visualization.draw_point_fields(path, "", "", [], up), "fields: expected at least one"),
        (lambda: visualization.draw_point_fields(path, "", "", [one], up, across=0), "across: expected at least 1"),
        (lambda: visualization.draw_kernels(path, "", "", [], up), "patches: expected at least one"),
        (
            lambda: visualization.draw_activations(
                path, "", "", [visualization.Activation(one.points, one.values, 1, "")], up
            ),
            "features: expected a sequence of inputs",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
        assert not path.exists()


def test_the_output_of_a_field_over_an_image_is_any_sequence(tmp_path):
    images = []
    for center in ((4, 5), [4, 5], np.array([4, 5])):
        one = [visualization.ImageField(**(IMAGE | {"center": center}), name="a")]
        visualization.draw_image_fields(tmp_path / "a.png", "", "", one)
        images.append(read_image(tmp_path / "a.png"))
    assert is_green(images[0]).any()
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(images[0], images[2])


def test_activations_share_a_scale_of_colours(tmp_path):
    flat = np.mgrid[:30, :30].reshape(2, -1).T.astype(np.float32)
    inputs = [visualization.Activation(flat, np.full(900, value), 1.0, "a") for value in (0.0, 1.0)]
    visualization.draw_activations(tmp_path / "a.png", "Title", "words", [inputs], (0, 0, 1))
    image = read_image(tmp_path / "a.png")
    middle = visualization.TOP + visualization.PANEL[1] // 2
    left, right = (image[middle - 60 : middle + 60, x - 60 : x + 60].mean(axis=(0, 1)) for x in (
        visualization.MARGIN + visualization.PANEL[0] // 2,
        visualization.MARGIN + visualization.GAP + 3 * visualization.PANEL[0] // 2,
    ))  # fmt: skip
    assert left[2] > 1.5 * left[0] and right[0] > 1.5 * right[2]


# ---- commands


def test_erf_of_a_scan(models, scan, command, tmp_path):
    model, path = models["deformable"]
    scene = inspection.scene_of_file(model, scan)
    places = [scene.points[at].astype(np.float64) + scene.cloud.shift for at in (30, 400)]
    at = [word for place in places for word in ("--at", *place)]
    code, out, err = command("erf", path, scan, *at)
    assert (code, err) == (0, "") and "logit of the class" in out and f"theoretical radius {model.net.reach:.4g}" in out
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    stem = "kpcore-erf-flat <3>"
    assert names == sorted([f"{stem}.png", *(f"{stem}-{n}{e}" for n in (1, 2) for e in (".html", "-kernel.png"))])
    assert is_green(read_image(tmp_path / "out" / f"{stem}.png")).sum() > 400
    rows = re.findall(r"^ +([\d.]+) +([\d.]+) +([\d.]+) +(\w+) +([\d.]+) +([\d.]+) +(.*)$", out, re.MULTILINE)
    assert len(rows) == 2
    for row, place, number in zip(rows, places, (30, 400), strict=True):
        field = inspection.field_at(model, scene, scene.points[number])
        np.testing.assert_allclose([float(value) for value in row[:3]], place, atol=0.006)
        assert row[3] == model.settings.names[field.predicted]
        np.testing.assert_allclose(float(row[4]), field.size, atol=0.051)
        np.testing.assert_allclose(float(row[5]), field.radius, atol=0.001)
        np.testing.assert_allclose([float(value) for value in row[6].split()], field.deviations, atol=0.001)


def test_erf_of_a_level_in_the_middle_of_a_scan(models, scan, command, tmp_path):
    code, out, err = command("erf", models["rigid"][1], scan, "--level", 1)
    assert (code, err) == (0, "") and "features of level 1" in out
    assert sorted(file.suffix for file in (tmp_path / "out").iterdir()) == [".html", ".png"]


def test_features_of_scans(models, scan, command, tmp_path):
    code, out, err = command("features", models["rigid"][1], scan, scan, *("--level", 1) * 2, "--channels", 2, 5)
    assert (code, err) == (0, "")
    rows = re.findall(r"^level (\d), channel +(\d): +(-?[\d.]+) in flat <3>.npz$", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("1", "2"), ("1", "2"), ("1", "5"), ("1", "5")]
    assert read_image(tmp_path / "out" / "kpcore-features.png").shape[1] > 4 * visualization.PANEL[0]


def test_features_of_digits(command, tmp_path):
    _, path, images = digits(tmp_path)
    code, out, err = command("features", path, images, "--level", 0, "--level", 1)
    assert (code, err) == (0, "") and len(
        re.findall(r"^level [01], channel .* in images \d+$", out, re.MULTILINE)
    ) == 16
    assert "level 2" not in command("features", path, images)[1]  # which it does not have
    code, out, err = command("features", path, tmp_path / "labels", "--level", 0)
    assert (code, out) == (2, "") and "labels: expected images (N, H, W), got (12,)" in err
    code, out, err = command("erf", path, images)
    assert (code, out) == (2, "") and "expected a network that labels points" in err


def test_what_the_commands_refuse(models, scan, command, tmp_path, capsys):
    _, path = models["rigid"]
    assert cli.main(["erf", str(path), str(scan), "--out", str(path)]) == 2  # which is a file
    assert "File exists" in capsys.readouterr().err
    for words, message in (
        (["erf", tmp_path / "none.safetensors", scan], "none.safetensors: No such file"),
        (["erf", path, tmp_path / "none.npz"], "none.npz: No such file"),
        (["erf", path, scan, "--at", 1, 2, 3], "--at 1 2 3: expected a position on the scan, within 0.2598 of a point"),
        (["erf", path, scan, "--at", "nan", 2, 3], "--at nan 2 3: expected finite coordinates"),
        (["erf", path, scan, "--level", 3], "--level 3: expected a level below 3, as "),
        (["features", path, scan, "--level", 4], "--level 4: expected a level below 3, as "),
        (["features", path, scan, "--channels", 16], "channels: expected numbers below 16 on level 0, got 16"),
        (["features", path, tmp_path / "none.npz"], "none.npz: No such file"),
    ):
        code, out, err = command(*words)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize("kind", ["rigid", "deformable"])
def test_a_scan_of_one_point(models, command, tmp_path, kind):
    np.savez(tmp_path / "one.npz", points=np.ones((1, 3)), colors=np.ones((1, 3), np.uint8))
    for words in (["erf"], ["erf", "--at", 1, 1, 1, "--level", 2], ["features"]):
        code, out, err = command(words[0], models[kind][1], tmp_path / "one.npz", *words[1:])
        assert (code, err) == (0, "") and "picture: " in out
