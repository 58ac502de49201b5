"""Run every benchmark of this folder and write RESULTS.md: `make bench`, or some by their names.

python -m benchmarks [--out FILE.md] [NAME ...]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
KEYS = ("name", "ours", "peer", "ratio", "target", "unit")
NOT_HERE = ("timing", "gpu")  # gpu.py wants a CUDA device: see its first lines


def processor():
    """Name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _number(x):
    return "" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:,.0f}"


def table(lines):
    """JSON objects -> the rows of a Markdown table."""
    rows = ["| question | ours | peer | unit | ratio | at least | |", "|---" * 7 + "|"]
    for line in lines:
        limit = line["peer"] is None
        least = 1 if limit else line["target"]
        peer = f"at most {_number(line['target'])}" if limit else _number(line["peer"])
        met = "met" if line["ratio"] >= least else "**missed**"
        numbers = [_number(line["ours"]), peer, line["unit"], f"{line['ratio']:.2f}"]
        more = [(k, v) for k, v in line.items() if k not in KEYS and isinstance(v, (int, float))]
        met += "".join(f"; {k} {_number(v)}" for k, v in more)
        rows.append(f"| {line['name']} | {' | '.join(numbers)} | {least:.3g} | {met} |")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", default=HERE / "RESULTS.md", type=Path)
    args = parser.parse_args()
    known = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    names = args.names or [name for name in known if name not in NOT_HERE]
    parts, failed = [], []
    for name in names:
        start = time.monotonic()
        print(f"benchmarks/{name}.py", file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{name}"], stdout=subprocess.PIPE, text=True
        )
        lines = []
        for text in process.stdout:
            print(text, end="", flush=True)
            lines.append(json.loads(text))
        if process.wait():
            failed.append(name)
        doc = (HERE / f"{name}.py").read_text().split('"""')[1].strip()
        took = f"({time.monotonic() - start:.0f} s)"
        parts += ["", f"## {name}.py", "", doc, "", *table(lines), "", took]
    head = [
        "# How fast",
        "",
        f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}. Written by `make bench`: ours and the peer in turns, medians; "
        "`ratio` is how many times faster or smaller ours is.",
    ]
    args.out.write_text("\n".join(head + parts) + "\n")
    print(f"{args.out}", file=sys.stderr)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
