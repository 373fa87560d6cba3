"""Runs the benchmarks: ``python bench/run.py cpu``, or networks, files, scale, gpu, threads.

What follows holds for cpu, networks and files; for the others see scale.py, gpu.py and threads.py. Each case first
checks that kpcore and its peers agree, then measures.

Every task runs in a new process that is pinned to as many cores as it has threads. Before anything is imported,
OMP_NUM_THREADS and similar variables are set and OpenBLAS's variables are removed, so that OpenMP, TBB, OpenBLAS and
torch all use those cores and choose their kernels themselves. The two sides of a comparison alternate (A B A B). Every
call allocates its outputs and builds its index. A time is the median of at least 5 calls, each after at least 25 ms of
untimed calls of the same side: after calls of the other side, threads take up to 10 ms to wake, and memory that the
other side freed costs twice as much to use. OpenBLAS's idle threads, which would spin on a core for 25 ms, sleep at
once. "First" is the first timed call of the process. It runs on Linux with glibc only: it reads /proc and pins
processes.
"""

import argparse
import ctypes
import gc
import importlib
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from datetime import datetime, timezone
from importlib import metadata
from io import StringIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
# A time is divided by the time of one of these ("x its time"); that of a peer is divided by ours ("x faster").
BASELINES = (
    "xyz alone",
    "scalar L2",
    "FMA floor",
    "its forward",
    "rigid",
    "two rigid",
    "the layer's step",
    "vjp without",
    "features and filters",
    "the layer",
    "a training step",
    "NumPy X @ X.T",
)


class Seconds(float):
    """The result of a call that measures its time itself, or computes it."""


def timed(call):
    """(result, seconds) of a call."""
    start = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - start
    return out, float(out) if isinstance(out, Seconds) else seconds


def alternate(calls, seconds):
    """Time the calls in turns: at least 5 rounds, up to 51 until `seconds` have passed; with 0 seconds one round."""
    times, end = [[] for _ in calls], time.perf_counter() + seconds
    rounds, warm = (5, 0.025) if seconds else (1, 0)
    gc.disable()
    while len(times[0]) < rounds or (time.perf_counter() < end and len(times[0]) < 51):
        for call, samples in zip(calls, times, strict=True):
            warm_until = time.perf_counter() + warm
            while time.perf_counter() < warm_until:
                call()
            samples.append(timed(call)[1])
    gc.enable()
    return [{"median": statistics.median(x), "min": min(x), "max": max(x), "samples": x} for x in times]


class Bench:
    """The measurements of one task; a case calls its methods, which add to `rows`."""

    Seconds = Seconds

    def __init__(self, case, targets, sizes, folder, seconds, threads, most_threads):
        self.case, self.targets, self.sizes, self.folder, self.seconds = case, targets, sizes, Path(folder), seconds
        self.threads, self.most_threads = threads, most_threads
        self.rows, self.labels, self.firsts = [], {"order": "", "size": ""}, {}

    def label(self, order, size):
        """Set the order and the number of points that the following rows show."""
        self.labels = {"order": order, "size": size}

    def first(self, call):
        """Call a function for the first time and remember how long it took."""
        out, self.firsts[call] = timed(call)
        return out

    def row(self, what, value=None, unit="", against=None, verdict=None, judged=True, call=None, **more):
        """Add a row; without a verdict it is judged by its target, if there is one."""
        target = self.targets.get((self.case, what, self.labels["order"], against)) if judged else None
        if verdict is None:
            verdict = "" if target is None else "met" if COMPARE[target[0]](value, target[1]) else "MISSED"
        row = {"case": self.case, "what": what, **self.labels, "threads": self.threads, "first": self.firsts.get(call)}
        row |= {"against": against, "value": value, "unit": unit, "target": target, "verdict": verdict}
        self.rows.append({"ours": None, "theirs": None, "note": ""} | row | more)

    def rate(self, what, call, count, unit):
        """Measure how many millions of `count` a core does in a second."""
        (ours,) = alternate([call], self.seconds)
        self.row(what, count / ours["median"] / self.threads / 1e6, unit, call=call, ours=ours)

    def per_point(self, what, call, count, **more):
        """Measure the time per point, in nanoseconds."""
        (ours,) = alternate([call], self.seconds)
        self.row(what, ours["median"] / count * 1e9, "ns per point", call=call, ours=ours, **more)

    def compare(self, what, call, against, other, **more):
        """Measure two calls in turns."""
        ours, theirs = alternate([call, other], self.seconds)
        ratio = ours["median"] / theirs["median"]
        value, unit = (ratio, "x its time") if against in BASELINES else (1 / ratio, "x faster")
        self.row(what, value, unit, against, call=call, ours=ours, theirs=theirs, **more)

    def beyond(self, what, call, against, other, **more):
        """Measure how much longer one call of some microseconds takes than another; a sample is the mean of 100."""

        def hundred(call):
            start = time.perf_counter()
            for _ in range(100):
                call()
            return Seconds((time.perf_counter() - start) / 100)

        ours, theirs = alternate([lambda: hundred(call), lambda: hundred(other)], self.seconds)
        self.row(
            what, 1e6 * (ours["median"] - theirs["median"]), "µs beyond", against, ours=ours, theirs=theirs, **more
        )

    def against(self, what, call, peer, inputs, check, **more):
        """Compare with a peer if it is installed and `check` accepts its result; else the row says why not."""
        import peers

        if reason := peers.missing(peer):
            self.absent(what, peer.name, reason)
            return
        other = peer.setup(**inputs)
        try:
            check(peer.read(other()))
        except AssertionError as error:
            self.row(what, against=peer.name, verdict="WRONG", note=str(error))
            return
        self.compare(what, call, peer.name, other, **more)

    def absent(self, what, against, reason):
        """Add a row for something that cannot be measured here."""
        self.row(what, against=against, verdict="missing", note=reason)

    def peak(self, call):
        """Peak resident memory of the first call, with its result, minus that before the call, in bytes."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # the call would reuse free heap memory, some 250 KiB, and seem to need less
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
        before = kilobytes("/proc/self/status", "VmRSS")
        self.first(call)
        return 1024 * (kilobytes("/proc/self/status", "VmHWM") - before)

    def memory(self, what, call, expected, unit="MiB beyond output and weights"):
        """Measure the peak minus the expected bytes."""
        self.row(what, (self.peak(call) - expected) / 2**20, unit, call=call)

    def free_memory(self):
        return 0.8 * 1024 * kilobytes("/proc/meminfo", "MemAvailable")


def kilobytes(path, key):
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{key}:"))


# Tasks


def work(task):
    """Run a task; this is what runs in its process."""
    os.sched_setaffinity(0, task["cores"])
    import kpcore as kp

    cases = importlib.import_module(task["module"])
    kp.set_num_threads(len(task["cores"]))
    sizes, seconds = cases.SIZES["quick" if task["quick"] else "full"], 0 if task["quick"] else 2
    threads = len(task["cores"]), task["most_threads"]
    bench = Bench(task["case"], cases.TARGETS, sizes, task["folder"], seconds, *threads)
    getattr(cases, task["case"])(bench, **task["arguments"])
    (bench.folder / "rows.json").write_text(json.dumps(bench.rows))


def run_task(task):
    """Run a task in a new process and return its rows; if it fails, a single row says so."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "KPCORE_NUM_THREADS"):
        environment[name] = str(len(task["cores"]))
    environment["OPENBLAS_THREAD_TIMEOUT"] = "4"  # 2 ** 4 cycles; consecutive products are as fast as without it
    if "coretype" in task["arguments"]:
        environment["OPENBLAS_CORETYPE"] = task["arguments"]["coretype"]
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if process.returncode == 0:
        return json.loads(Path(task["folder"], "rows.json").read_text())
    print(process.stderr, file=sys.stderr)
    note = (process.stderr.strip() or f"exit code {process.returncode}").splitlines()[-1]
    return [failed_row(task, "FAILED", note)]


def failed_row(task, verdict, note):
    what = ", ".join(map(str, task["arguments"].values()))
    row = {"case": task["case"], "what": what, "threads": len(task["cores"]), "verdict": verdict, "note": note}
    texts, values = ("order", "size", "unit"), ("first", "ours", "against", "theirs", "value", "target")
    return dict.fromkeys(texts, "") | dict.fromkeys(values) | row


# The machine


def one_cpu_per_core():
    """The logical CPUs that this process may use, one for each physical core."""
    cores = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.setdefault(siblings.read_text() if siblings.exists() else cpu, cpu)
    return list(cores.values())


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git(*command):
    return subprocess.run(["git", "-C", HERE, *command], capture_output=True, text=True).stdout.strip()


def machine():
    import kpcore as kp

    cpu = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
    cpu = {key.strip(): value.strip("\t: ") for key, value in cpu.items()}
    caches = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    config = StringIO()
    with redirect_stdout(config):
        kp.show_config()
    names = ("numpy", "scipy", "torch", "open3d", "open3d-cpu", "small_gicp", "fpsample", "threadpoolctl")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git("rev-parse", "--short", "HEAD") + "-changed" * bool(git("status", "--porcelain", "-uno")),
        "cpu": cpu.get("model name", platform.machine()),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "avx512": "avx512f" in cpu.get("flags", ""),
        "cores": len(one_cpu_per_core()),
        "caches": caches,
        "ram_gib": round(kilobytes("/proc/meminfo", "MemTotal") / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {"kpcore": kp.__version__} | {name: version(name) for name in names if version(name)},
        "isas": kp.backends.cpu.isas(),
        "load_before": os.getloadavg()[0],
        "config": config.getvalue().splitlines(),
    }


# The tables

HEADER = ["case", "what", "order", "points", "threads", "first, ms", "ms (min–max)"]
HEADER += ["against", "its ms", "measured", "target", "verdict"]
SHORT = [column for column in range(len(HEADER)) if HEADER[column] not in ("points", "first, ms")]


def digits(number):
    """Three significant digits, never an exponent."""
    return f"{number:.3g}" if abs(number) < 999.5 else f"{number:.0f}"


def milliseconds(seconds):
    return digits(1000 * seconds)


def cells(row):
    ours, theirs = row["ours"], row["theirs"]
    return [
        *(row[name] for name in ("case", "what", "order", "size")),
        str(row["threads"]),
        milliseconds(row["first"]) if row["first"] else "",
        "{} ({}–{})".format(*(milliseconds(ours[name]) for name in ("median", "min", "max"))) if ours else "",
        row["against"] or "",
        milliseconds(theirs["median"]) if theirs else "",
        f"{digits(row['value'])} {row['unit']}" if row["value"] is not None else "",
        f"{row['target'][0]} {digits(row['target'][1])}" if row["target"] else "",
        f"{row['verdict']} ({row['note']})" if row["note"] else row["verdict"],
    ]


def markdown(lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]) + "\n"


def growth_table(rows):
    """Times and memory as Markdown, with a line for each number of points and a column for each operator."""
    table = {}
    for row in rows:
        ours, size = row["ours"], row["size"]
        text = row["note"]
        if ours:
            text = f"{milliseconds(ours['median'])} ({digits(row['value'])} ns, {row['bytes_per_point']:.0f} B)"
        table.setdefault(size, {})[row["what"]] = text
    ops = list(dict.fromkeys(row["what"] for row in rows))
    return markdown([["points", *ops], *([size, *(times.get(op, "") for op in ops)] for size, times in table.items())])


def write_up(report, everything):
    """The result as Markdown: all rows, or only those judged on all cores and those not met; then the growth table."""
    m, rows = report["machine"], report["rows"]
    versions, caches = (", ".join(f"{k} {v}" for k, v in m[name].items()) for name in ("versions", "caches"))
    verdicts = [row["verdict"] for row in rows if row["target"]]
    failed = sum(row["verdict"] in ("FAILED", "WRONG") for row in rows)
    text = (
        f"{m['date']}, commit {m['commit']}, on {m['cpu']} (family {m['cpu_family']}, model {m['cpu_model']}), "
        f"{m['cores']} cores, {'/'.join(m['isas'])}, {caches}, {m['ram_gib']} GiB, Linux {m['kernel']}; "
        f"Python {m['python']}, {versions}.\n"
        f"{verdicts.count('met')} of {len(verdicts)} targets met, {verdicts.count('missing')} could not be measured"
    )
    text += f"; {failed} failed or gave other results.\n" if failed else ".\n"
    growth = [row for row in rows if row["case"] == "growth"]
    most = max((row["threads"] for row in rows), default=0)

    def shown(row):
        return everything or row["verdict"] not in ("", "met") or (row["target"] and row["threads"] == most)

    table = [row for row in rows if row not in growth and shown(row)]
    columns = range(len(HEADER)) if everything else SHORT
    lines = [[line[column] for column in columns] for line in (HEADER, *map(cells, table))]
    text += "\n" + markdown(lines) if table else ""
    return text + (
        "\nHow time and memory grow: ms (ns and, with the result, peak bytes per point):\n\n" + growth_table(growth)
        if growth
        else ""
    )


def write_readme(readme, text):
    """Replace the text between two markers in README.md."""
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    before, has_begin, rest = readme.read_text().partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise SystemExit(f"{readme}: expected the markers {begin} and {end}")
    readme.write_text(f"{before}{begin}\n{text}{end}{after}")


def main():
    import cases
    import files
    import networks
    import scale

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=["cpu", "files", "gpu", "networks", "scale", "threads"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    known = [name for module in (cases, files, networks, scale) for name in module.TASKS]
    parser.add_argument("--only", choices=known, help="run only this case")
    parser.add_argument("--out", type=Path, help="folder for the results; by default bench/results for a complete run")
    parser.add_argument("--readme", action="store_true", help="also write the judged rows into README.md")
    parser.add_argument(
        "--python", action="append", help="for threads: measure the kpcore of this interpreter; may be repeated"
    )
    options = parser.parse_args()
    if options.device == "threads":
        import threads

        return threads.main(options)
    complete = not (options.quick or options.only)
    if options.readme and not (complete and options.device == "networks"):
        parser.error("--readme: only valid for a complete run of networks, without --quick and --only")
    cases = {"networks": networks, "files": files, "scale": scale}.get(options.device, cases)
    if options.only and options.only not in cases.TASKS:
        parser.error(f"--only: expected one of {', '.join(cases.TASKS)}, got {options.only}")
    out = options.out = options.out or (HERE / "results" if complete else None)
    if options.device == "gpu":
        import gpu

        return gpu.main(options, git("rev-parse", "--short", "HEAD"))

    command = [argument for argument in sys.argv[1:] if argument not in ("--out", str(options.out))]
    report = {"machine": machine(), "command": command, "rows": []}
    if (load := report["machine"]["load_before"]) > 0.5:
        print(f"Load average {load:.1f}: other processes are running, which makes times unreliable.", file=sys.stderr)
    cores = one_cpu_per_core()[:2]
    with tempfile.TemporaryDirectory() as folder:
        cases.prepare(Path(folder), cases.SIZES["quick" if options.quick else "full"])
        shared = {"folder": folder, "module": cases.__name__, "quick": options.quick, "most_threads": len(cores)}
        for case in [options.only] if options.only else cases.TASKS:
            on_all_cores = options.quick or case == "growth" or cases in (networks, files, scale)
            fewest_threads = len(cores) if on_all_cores else 1
            for arguments in cases.TASKS[case]:
                for threads in range(fewest_threads, len(cores) + 1):
                    task = shared | {"case": case, "arguments": arguments, "cores": cores[:threads]}
                    if "coretype" in arguments and not report["machine"]["avx512"]:
                        rows = [failed_row(task, "missing", "this CPU has no AVX-512")]
                    else:
                        rows = run_task(task)
                    report["rows"] += rows
                    for row in rows:
                        print(" | ".join(filter(None, cells(row))), flush=True)

    print(f"\n{write_up(report, everything=True)}")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{options.device}.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / f"{options.device}.md").write_text(write_up(report, everything=True))
    if options.readme:
        write_readme(HERE.parent / "README.md", write_up(report, everything=False))
    return any(row["verdict"] in ("WRONG", "FAILED") for row in report["rows"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        work(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
