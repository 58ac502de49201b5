"""How long does ./run_grid.sh plan take for the paper's grid of 110 runs, beyond its imports?

The time of the command, less that of a process which only imports what it imports.
"""

import subprocess
import sys

from benchmarks.timing import emit, medians

LIMIT = 2  # seconds
IMPORTS = "import common.study.__main__, barlow, byol, dino, lejepa, mae, simclr, supervised"


def python(*words):
    """Run this Python with its output thrown away."""
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)


def main():
    calls = {
        "plan": lambda: python("-m", "common.study", "plan"),
        "imports": lambda: python("-c", IMPORTS),
    }
    found = medians(calls, repeats=3)
    ours = max(found["plan"] - found["imports"], 0.01)
    emit("plan of 110 runs", ours, None, LIMIT, "s", imports=found["imports"])


if __name__ == "__main__":
    main()
