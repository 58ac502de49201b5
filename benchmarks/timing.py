"""What every benchmark here does: time ours and a peer in turns, and print one JSON line."""

import json
import statistics
import time


def interleaved(calls, repeats, warmups=1, clock=time.perf_counter):
    """{name: function without arguments} -> {name: [seconds of each repeat]}, taken in turns.

    What else the machine does in the meantime so falls on all of them alike. clock: for what runs
    in one thread, time.process_time does not count the seconds that other processes take.
    """
    for _ in range(warmups):
        for call in calls.values():
            call()
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def medians(calls, repeats, warmups=1, clock=time.perf_counter):
    """The same -> {name: median seconds}."""
    found = interleaved(calls, repeats, warmups, clock)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def emit(name, ours, peer, target, unit, **more):
    """One line: ratio is how many times smaller ours is than the peer's.

    peer: None where ours is held against a limit, target: then `ratio` is the limit over ours.
    """
    limit = target if peer is None else peer
    line = {"name": name, "ours": ours, "peer": peer, "ratio": limit / ours, "target": target}
    print(json.dumps(line | {"unit": unit} | more), flush=True)
