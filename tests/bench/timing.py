"""How everything is measured: sides in turn after a warm-up, medians with their spread, peak memory
in a run of its own"""

import ctypes
import gc
import math
import statistics
import threading
import time
from contextlib import contextmanager

import psutil
import torch


def synchronise(
    device: str | torch.device,  # where the work runs
) -> None:
    "Wait for the GPU, whose work is only queued by a call; nothing to wait for on a CPU."
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()


def seconds_of(
    work,  # a function without arguments
    device: str | torch.device,  # where it runs
) -> float:  # wall seconds
    "The wall time of one call, from an idle device to an idle device."
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def rounds_for(
    slowest: float,  # seconds of the slowest side, by the warm-up
    repeats: int,  # at least so many
    least: float = 10.0,  # seconds to measure each side for, at least
) -> int:  # at most six times `repeats`
    "Short work is repeated more often: its single times scatter more."
    return max(repeats, min(6 * repeats, math.ceil(least / slowest)))


def in_turn(
    sides: dict,  # name -> a function without arguments
    device: str | torch.device,  # where they run
    repeats: int = 5,  # rounds, at least
) -> dict:  # name -> one time in seconds for each round
    """Warm every side up twice, then time them in turn (a, b, a, b, ...), so that what slows the
    machine down slows all of them."""
    slowest = max(min(seconds_of(work, device) for _ in range(2)) for work in sides.values())
    times = {name: [] for name in sides}
    gc.collect()
    for _ in range(rounds_for(slowest, repeats)):
        for name, work in sides.items():
            times[name].append(seconds_of(work, device))
    return times


def ratios(
    times: dict,  # of `in_turn`
    above: str,  # the side above the line
    below: str,  # the side below it
) -> list[float]:  # one a round
    "The ratio of two sides, round by round."
    return [a / b for a, b in zip(times[above], times[below])]


def spread(
    values: list[float],  # at least one
) -> dict:  # median, min, max
    "What a table says of repeated measurements."
    return dict(median=statistics.median(values), min=min(values), max=max(values), n=len(values))


def give_back() -> None:
    """Return freed memory to the GPU, and to the system where the C library can (glibc): else it
    would be used again, and growth would not be seen."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


@contextmanager
def watched():
    """A list whose only entry is the largest resident size of this process, looked up every 2 ms by
    a thread."""
    process = psutil.Process()
    peak = [0]
    stop = threading.Event()

    def watch():
        while not stop.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            stop.wait(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def peak_growth(
    work,  # a function without arguments; warmed up
    device: str | torch.device,  # where it runs
) -> int:  # bytes above what was in use before
    """The memory one call needs at its peak, besides the weights and optimizer states that are
    there already. CUDA: `max_memory_allocated`. CPU: growth of the resident size, sampled by a
    thread; call it outside of timings."""
    give_back()
    if torch.device(device).type == 'cuda':
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    with watched() as peak:
        work()
    return max(0, peak[0] - before)


def compare(
    case: str,  # what is compared, for the table
    ours,  # a function without arguments
    theirs,  # the same work, done by the other side
    settings,  # device and repeats
) -> dict:  # a row: times, per-round ratios, memory
    """Measure two sides; the ratio is theirs / ours, so above 1 we are faster. A side that does not
    fit on the GPU is said to."""
    sides = dict(ours=ours, theirs=theirs)
    try:
        times = in_turn(sides, settings.device, settings.repeats)
        memory = {name: peak_growth(work, settings.device) for name, work in sides.items()}
    except torch.OutOfMemoryError:
        return dict(case=case, note='does not fit into this memory')
    return dict(case=case, times=times, ratios=ratios(times, 'theirs', 'ours'), memory=memory)


def print_row(
    part: str,  # its name
    row: dict,  # of `compare`
    words: str = 'theirs / ours',  # what its ratio is
) -> None:
    "A line while it runs."
    print(
        f'{part}, {row["case"]}: '
        + (row['note'] if 'note' in row else f'{statistics.median(row["ratios"]):.3f} {words}'),
        flush=True,
    )
