"""How long do 1.3 million annotation rows take, and how much memory?

Against `csv.DictReader` into a list; names in both tables against sets of Python's strings.
"""

import csv
import multiprocessing
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.timing import emit, medians
from common.annotations import CLASS_IMPORTANCE, check_disjoint, read_annotations

ROWS, VAL_ROWS = 1_300_000, 130_000


def write_table(path, names):
    """A table in Sewer-ML's layout with the given file numbers; every class in 5 % of the rows."""
    rng, ends = random.Random(0), []
    for _ in range(9973):
        classes = [int(rng.random() < 0.05) for _ in CLASS_IMPORTANCE]
        defect = int(any(classes))
        ends.append(f"{rng.choice((0, 5, 10))},0,{str(classes)[1:-1]},{1 - defect},{defect}\n")
    ends = [end.replace(" ", "") for end in ends]
    with open(path, "w") as file:
        file.write(f"Filename,WaterLevel,VA,{','.join(CLASS_IMPORTANCE)},ND,Defect\n")
        file.writelines(f"{name:08d}.png,{ends[name % len(ends)]}" for name in names)
    return path


def read_dicts(path):
    """What is usually done."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def megabytes(key):
    """A line of the kernel's account of this process: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1000


def growth(path):
    """MB by which this process is larger at most while it reads a table."""
    before = megabytes("VmRSS")
    read_annotations(path)
    return megabytes("VmHWM") - before


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = write_table(Path(folder, "train.csv"), range(ROWS))
        val_path = write_table(Path(folder, "val.csv"), range(ROWS, ROWS + VAL_ROWS))
        calls = {"ours": lambda: read_annotations(path), "peer": lambda: read_dicts(path)}
        seconds = medians(calls, repeats=3, warmups=0)
        emit(f"reading {ROWS:,} rows", seconds["ours"], seconds["peer"], 4, "s")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            emit("the same: growth of memory", pool.submit(growth, path).result(), None, 200, "MB")
        train, val = read_annotations(path), read_annotations(val_path)
        names = [list(map(table.name, range(len(table)))) for table in (train, val)]
        calls = {
            "ours": lambda: check_disjoint(train, val),
            "peer": lambda: set(names[0]).isdisjoint(set(names[1])),
        }
        seconds = medians(calls, repeats=3)
        emit(f"no file in both, {VAL_ROWS:,} rows", seconds["ours"], seconds["peer"], 0.8, "s")


if __name__ == "__main__":
    main()
