"""The three point convolutions of docs/aggregation.py."""

from pathlib import Path

import numpy as np
import pytest

FORMS = [("torch", "torch"), ("NumPy", "torch"), ("JAX", "jax")]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs")
    import aggregation

    return aggregation


@pytest.mark.parametrize(("framework", "module"), FORMS)
def test_each_form_gives_the_result_of_the_article(script, framework, module):
    for name in ("torch", "scipy.spatial", module):
        pytest.importorskip(name)
    for example in script.EXAMPLES:
        expected = script.call(example, "article", 300)()
        got = np.asarray(script.call(example, framework, 300)())
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=example)
        assert np.ptp(got) > 0.1


def test_the_table(script, monkeypatch, tmp_path):
    for name in ("torch", "scipy.spatial", "jax"):
        pytest.importorskip(name)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("runs on Linux only")
    monkeypatch.setattr(script, "SIZES", (50,))
    monkeypatch.setattr(script, "EXAMPLES", dict([*script.EXAMPLES.items()][:1]))
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    script.PAGE.write_text(f"before\n{script.BEGIN}old\n{script.END}after\n")
    script.main()
    before, *table, after = [line for line in script.PAGE.read_text().splitlines() if not line.startswith("<!--")]
    assert (before, after) == ("before", "after")
    assert len(table) == 3 and table[2].startswith("| mean of the 8 nearest | 50 |") and table[2].count(" ms, ") == 4
