"""A single PLY, NPY or NPZ that is labelled in parts: as `segment` labels it whole, to the bit."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_tiled import model_with

from kpcore import io, nn
from kpcore.cli import main
from kpcore.pipeline import segmentation, tiled
from kpcore.pipeline.model import Model
from kpcore.scenes.city import city

NUM = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, and a piece of a city in several formats, where some points have no place and some no label."""
    folder = tmp_path_factory.mktemp("formats")
    for name, features in (("model", {}), ("colors", {"features": ["color", "intensity", "height_above_ground"]})):
        model = model_with(label="truth", columns=["x", "y", "z", "intensity", "truth"], **features)
        if features:
            model.columns = replace(model.columns, center=model.columns.center | {"color": [100.0] * 3},
                                    scale=model.columns.scale | {"color": [10.0] * 3})  # fmt: skip
        nn.save(folder / f"{name}.safetensors", model.net, model.params, model.state, **model.about())
    cloud = city((154_970.0, 462_985.0), (155_030.0, 463_025.0), density=3)
    xyz = cloud.exact.copy()
    xyz[::97, 2], xyz[5, 0], xyz[6] = np.nan, np.inf, 1e39
    truth = cloud.labels.astype(np.float32)
    truth[::31] = np.nan
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 200, (len(xyz), 3)).astype(np.uint16)
    colors[-1] = 40_000
    intensity = cloud.fields["intensity"].astype(np.float32)
    fields = {"red": colors[:, 0], "green": colors[:, 1], "blue": colors[:, 2], "intensity": intensity, "truth": truth}
    table = np.zeros(
        len(xyz), [*((axis, "f8") for axis in "xyz"), *((name, one.dtype) for name, one in fields.items())]
    )
    for name, values in [*zip("xyz", xyz.T, strict=True), *fields.items()]:
        table[name] = values
    types = {"f8": "double", "u2": "ushort", "f4": "float"}
    lines = "".join(f"property {types[table.dtype[name].str[1:]]} {name}\n" for name in table.dtype.names)
    for name, order in (("little", "<"), ("big", ">")):
        head = f"ply\nformat binary_{name}_endian 1.0\nelement vertex {len(table)}\n{lines}end_header\n"
        (folder / f"{name}.ply").write_bytes(head.encode() + table.astype(table.dtype.newbyteorder(order)).tobytes())
    np.savez_compressed(folder / "deflated.npz", points=xyz, colors=colors, intensity=intensity, truth=truth)
    np.savez(folder / "stored.npz", x=xyz[:, 0], y=xyz[:, 1], z=xyz[:, 2], intensity=intensity, truth=truth,
             features=rng.normal(size=(len(xyz), 8)))  # fmt: skip
    np.save(folder / "fields.npy", table)
    np.save(folder / "table.npy", np.asfortranarray(np.column_stack([xyz, intensity, truth])))
    finite = table[np.isfinite(xyz).all(axis=1) & (np.abs(xyz) < 1e38).all(axis=1)]
    np.save(folder / "finite.npy", finite)
    return folder


@pytest.mark.parametrize(
    ("model", "source", "out", "options"),
    [
        ("model", "little.ply", "out.ply", {"keep": [6]}),
        ("colors", "big.ply", "out.ply", {"ignore": [5], "unclassified": 0.34}),
        ("model", "big.ply", "out.csv", {}),
        ("colors", "deflated.npz", "out.npz", {"into": "predicted"}),
        ("model", "stored.npz", "out.npz", {"keep": [2]}),
        ("colors", "fields.npy", "out.ply", {}),
        ("model", "table.npy", "out.pcd", {"into": "predicted"}),
        ("colors", "finite.npy", "out.laz", {}),
    ],
)
def test_labels_are_those_of_the_whole_file(folder, tmp_path, monkeypatch, model, source, out, options):
    monkeypatch.setattr(tiled, "_MOST_IN_GROUP", 4000)
    monkeypatch.setattr("kpcore.io.layout.BLOCK", 1000)
    if out.endswith("laz"):
        pytest.importorskip("lazrs")
    path = folder / f"{model}.safetensors"
    told, results = [], []
    for work, name in ((segmentation.segment, f"whole_{out}"), (tiled.segment_tiles, out)):
        model_or_path, files = (Model.load(path), folder / source) if name != out else (path, [folder / source])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(work(model_or_path, files, tmp_path / name, confidence=True, **options))
        told.append("; ".join(str(one.message).replace(name, out) for one in caught))
    whole, survey = results
    assert told[0] == told[1] and ("left out" in told[1]) == (source != "finite.npy")
    assert survey.groups > 2 and len({*whole.classes}) > 1
    assert (tmp_path / out).read_bytes() == (tmp_path / f"whole_{out}").read_bytes()
    assert survey.counts == dict(zip(Model.load(path).classes, whole.counts.tolist(), strict=True))
    np.testing.assert_equal(survey.scores, whole.scores)
    assert [*survey.notes, *survey.files[0].notes] == whole.labelled.notes
    if "unclassified" in options:
        assert 0 in io.read(tmp_path / out, label="truth").labels  # 1 is for LAS
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([out, "out.segment.json", f"whole_{out}"])


# ---- the command


@pytest.fixture
def large(monkeypatch):
    """Every file counts as large."""
    monkeypatch.setattr("kpcore.cli.BYTES_OF_POINT", 10**6)
    monkeypatch.setattr(tiled, "_MOST_IN_GROUP", 4000)


def segment(folder, *words):
    return main(["segment", str(folder / "model.safetensors"), *map(str, words)])


@pytest.mark.filterwarnings("ignore:.*left out, as a coordinate:UserWarning")
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_large_scan_is_labelled_in_parts(folder, tmp_path, large, capsys, is_folder):
    whole = tmp_path / "whole.ply"
    segmentation.segment(Model.load(folder / "model.safetensors"), folder / "big.ply", whole)
    out = tmp_path / "out" if is_folder else tmp_path / "out.ply"
    sources = [folder / "big.ply", folder / "little.ply"][: 1 + is_folder]
    assert segment(folder, *sources, "--out", out, "--memory", "1GB") == 0
    printed = capsys.readouterr().out
    assert printed.count("the largest group") == len(sources)
    assert ("labelled by itself: big.ply is no LAS, LAZ or COPC file" in printed) == is_folder
    assert (out / "big.ply" if is_folder else out).read_bytes() == whole.read_bytes()


@pytest.mark.filterwarnings("ignore:.*left out, as a coordinate:UserWarning")
def test_a_small_scan_is_labelled_whole(folder, tmp_path, capsys):
    assert segment(folder, folder / "big.ply", "--out", tmp_path / "out.ply") == 0
    assert "the largest group" not in capsys.readouterr().out
    assert segment(folder, folder / "big.ply", "--out", tmp_path / "a.ply", "--scratch", tmp_path) == 0
    assert "the largest group" in capsys.readouterr().out
    assert (tmp_path / "out.ply").read_bytes() == (tmp_path / "a.ply").read_bytes()


@pytest.mark.parametrize(
    ("source", "out", "words", "reason"),
    [
        ("a.csv", "out.csv", ["--memory", "1GB"],
         r"a\.csv: needs some [\d.]+ GiB of memory, got 0\.93 GiB: a CSV is not labelled in parts: write it "
         r"as a LAZ or a PLY first"),
        ("big.ply", "out.npz", ["--memory", "1GB"],
         r"needs some 7\.4 GiB .*: a PLY is not labelled in parts as a NPZ: write a PLY"),
        ("a.csv", "out.csv", ["--workers", "2"], r"--workers: only valid .* a CSV is not labelled in parts"),
        ("big.ply little.ply", "out", ["--together"], r"--together: only valid .* big\.ply is no LAS, LAZ or COPC"),
    ],
)  # fmt: skip
def test_what_is_not_labelled_in_parts(folder, tmp_path, large, capsys, source, out, words, reason):
    if source == "a.csv" and not (folder / source).exists():
        table = np.load(folder / "table.npy")[:2000]
        np.savetxt(folder / source, table[:, :4], "%r", ",", header="x,y,z,intensity", comments="")
    sources = [folder / name for name in source.split()]
    assert segment(folder, *sources, "--out", tmp_path / out, *words) == 2
    printed = capsys.readouterr().err
    assert re.search(reason, printed), printed
    assert not [*tmp_path.iterdir()]


@pytest.mark.filterwarnings("ignore:.*left out, as a coordinate:UserWarning")
def test_several_files_that_are_no_survey(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"sources: expected one file, or LAS, LAZ and COPC files, got .*big\.ply among"
    ):
        tiled.segment_tiles(folder / "model.safetensors", [folder / "big.ply", folder / "little.ply"], tmp_path / "out")
    with pytest.raises(io.ReadError, match=r"little\.ply: a PLY is not labelled in parts as a NPZ: write a PLY$"):
        tiled.segment_tiles(folder / "model.safetensors", [folder / "little.ply"], tmp_path / "out", format="npz")
    assert not [*tmp_path.iterdir()]
