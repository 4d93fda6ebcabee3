"""Whether other processes take the processors while something is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from slimrank.errors import SlimrankError

LOOK_SECONDS = 1.0
TOO_BUSY = 0.5  # of one processor: two models that are measured in turns no longer meet the same machine
WORTH_SAYING = 0.1  # of one processor


@dataclass
class Others:
    """What other processes take.

    Attributes:
        processors: how many they keep busy, on average.
    """

    processors: float = 0.0


@contextmanager
def others() -> Iterator[Others]:
    """Measure what other processes take inside the context."""
    found, before, start = Others(), _times(), time.perf_counter()
    yield found
    busy, own = (now - then for now, then in zip(_times(), before, strict=True))
    found.processors = max(0.0, busy - own) / max(time.perf_counter() - start, 1e-9)


def check_idle() -> None:
    """Make sure that a measurement makes sense.

    Raises:
        SlimrankError: other processes keep processors busy.
    """
    with others() as found:
        time.sleep(LOOK_SECONDS)
    if found.processors > TOO_BUSY:
        raise SlimrankError(
            f"this machine is too busy to measure: other processes keep {found.processors:.1f} of "
            f"{psutil.cpu_count() or 1} processors busy.",
            "end them, or measure all the same with --busy",
        )


def _times() -> tuple[float, float]:
    """Return the seconds that processors have worked in all, and for this process."""
    every, mine = psutil.cpu_times(), psutil.Process().cpu_times()
    waiting = sum(getattr(every, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return sum(every) - waiting, mine.user + mine.system
