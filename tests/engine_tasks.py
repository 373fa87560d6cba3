"""Tasks that the tests of engines send to workers, which import this module."""

import os
import signal
import time
from pathlib import Path

import kpcore as kp
from kpcore.backends import cpu


class Odd(Exception):
    """Cannot be unpickled: its argument is made of two."""

    def __init__(self, one, other):
        super().__init__(f"{one}\n{other}")


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


def square(task):
    if task == "odd":
        raise Odd("first", "second")
    if task == "result":
        return Unreadable()
    if task == "exit":
        raise SystemExit(5)
    return task * task


def process(task):
    return os.getpid()


def seen(task):
    return cpu.isa(), kp.get_num_threads(), kp.get_memory_limit()


def killed(folder, deadly, times, task):
    """Kill this worker, `times` times in all, during a task that is deadly; note in the folder when a task begins."""
    begun = len([*Path(folder).glob(f"{task}-*")])
    (Path(folder) / f"{task}-{begun}").touch()
    if task in deadly and begun < times:
        time.sleep(0.1)  # in which the other worker begins a task
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return task


def slow(folder, task):
    (Path(folder) / f"{task}-{os.getpid()}").touch()
    time.sleep(60)
