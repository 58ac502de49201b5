"""How long from the command to the first step of `configs/demo.yaml`? At most 15 s on 2 cores."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import emit

ROOT = Path(__file__).parent.parent
LIMIT = 15  # seconds


def main():
    with tempfile.TemporaryDirectory() as folder:
        make = ["-m", "common.synthetic", "--train", "300", "--val", "20", "--size", "80"]
        subprocess.run(
            [sys.executable, *make, "--seed", "0", "--out", f"{folder}/set"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        places = [f"data.image_root={folder}/set/images", f"run.output_dir={folder}", "run.name=a"]
        places += [f"data.{s}_csv={folder}/set/SewerML_{s.title()}.csv" for s in ("train", "val")]
        start = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, "simclr.py", "--config", "configs/demo.yaml", *places],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        log = Path(folder, "a", "log.jsonl")
        while not (log.exists() and log.stat().st_size):
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        first = json.loads(log.read_text().splitlines()[0])
        run.terminate()
        run.wait()
        assert first["step"] == 1
    emit("the demo's first step", seconds, None, LIMIT, "s")


if __name__ == "__main__":
    main()
