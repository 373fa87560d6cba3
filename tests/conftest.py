"""Fixtures and settings of all tests: hypothesis tries 500 examples, or as many as KPCORE_EXAMPLES says; with
KPCORE_NO_SKIP=1 a skip is a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # for reference, clouds, gradcheck: importlib mode adds no folder

import kpcore as kp
from kpcore.backends import cpu

examples, derandomize = int(os.environ.get("KPCORE_EXAMPLES", "500")), os.environ.get("CI") == "true"
settings.register_profile("kpcore", max_examples=examples, deadline=None, derandomize=derandomize)
settings.load_profile("kpcore")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs on a GPU if there is one, else on the emulator")
    config.addinivalue_line("markers", "slow: takes seconds or gigabytes; left out under a sanitizer")


def fail_instead_of_skip(report):
    """Skips are failures, except those that say "optional": of tests against a package that CI does not install."""
    optional = isinstance(report.longrepr, tuple) and report.longrepr[2].startswith("Skipped: optional: ")
    if report.skipped and os.environ.get("KPCORE_NO_SKIP") == "1" and not (optional or hasattr(report, "wasxfail")):
        report.outcome, report.longrepr = "failed", f"skipped although KPCORE_NO_SKIP=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return fail_instead_of_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return fail_instead_of_skip((yield))


@pytest.fixture(scope="session")
def shared():
    """The folder with the real scans: KPCORE_SHARED, else `shared` beside the repository."""
    folder = Path(os.environ.get("KPCORE_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real scans in {folder}; set KPCORE_SHARED to the folder that has data/")
    return folder


@pytest.fixture
def command(capsys):
    """Run a command of kpcore in this process: (exit code, standard output, standard error)."""
    from kpcore import cli

    def run(*words):
        code = cli.main([*map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def set_threads():
    """kpcore.set_num_threads; the number of threads is restored after the test."""
    before = kp.get_num_threads()
    yield kp.set_num_threads
    kp.set_num_threads(before)


@pytest.fixture
def set_isa():
    """kpcore.backends.cpu.set_isa; the instruction set is restored after the test."""
    yield cpu.set_isa
    cpu.set_isa(os.environ.get("KPCORE_ISA") or next(i for i in ("avx512", "avx2", "base") if i in cpu.isas()))


@pytest.fixture(params=cpu.isas())
def isa(request, set_isa):
    set_isa(request.param)
    return request.param


@pytest.fixture
def python(tmp_path):
    """Run code in a fresh interpreter, away from the repository, whose kpcore/ would shadow the installed package."""

    def run(code, timeout=600, **env):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | env,
            timeout=timeout,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def write(tmp_path):
    """Write bytes to a file in tmp_path and return its path; skips if the package that reads this format is missing."""

    from files import NEEDS  # not at the top: test_config runs this file without the folder of the tests

    def write(name, data):
        if package := NEEDS.get(name[name.rindex(".") :].lower()):
            pytest.importorskip(package)
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write
