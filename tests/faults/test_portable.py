"""Training by one process, and the commands, need nothing that Windows or macOS lack."""

import csv
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT, TINY
from small import OVERRIDES

# As on Windows, and on macOS and Python 3.14 for the last: no fcntl, no hard links, none of these
# signals, no fork. What is hidden from the first import on is hidden from the workers, too.
PRELUDE = """
import multiprocessing, os, signal, sys
sys.modules["fcntl"] = None
of_os = os, ("link", "fork", "sched_getaffinity", "pread", "preadv")
for module, names in (of_os, (signal, ("SIGPIPE", "SIGUSR1"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
"""
CALL = """
if __name__ == "__main__":
    import {module}
    {module}.main(sys.argv[1:])
"""


def call(folder, module, *words):
    """A command as such a system runs it."""
    script = folder / f"run_{module.replace('.', '_')}.py"
    script.write_text(PRELUDE + CALL.format(module=module))
    how = {"cwd": folder, "capture_output": True, "text": True, "timeout": PATIENCE}
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, script, *map(str, words)], env=env, **how)
    assert done.returncode == 0, done.stderr
    return done


def test_from_a_folder_to_a_review_page_without_them(tiny_set, tmp_path):
    data = dict(word.split("=") for word in tiny_set)
    words = [*tiny_set, *TINY, *OVERRIDES["simclr"], "optimization.epochs=2", "data.num_workers=1"]
    place = [f"run.output_dir={tmp_path / 'runs'}", "run.name=here"]
    config = ROOT / "configs" / "simclr_r18.yaml"
    said = call(tmp_path, "simclr", "--config", config, *words, *place).stderr
    assert "no locks (Windows)" in said
    packed = tmp_path / "packed"
    csvs = data["data.train_csv"], data["data.val_csv"]
    how = "--out", packed, "--form", "raw", "--annotations", *csvs
    call(tmp_path, "common.pack", "--image-root", data["data.image_root"], *how)
    place[-1] = "run.name=packed"
    call(tmp_path, "simclr", "--config", config, *words, *place, f"data.packed={packed}")
    trained, root = tmp_path / "runs" / "here", data["data.image_root"]
    assert (trained / "prev.pt").exists() and (trained / "last.pt").exists()
    scores = tmp_path / "s.csv"
    how = "--image-root", root, "--out", scores, "--workers", 1
    call(tmp_path, "common.predict", "--run", trained, data["data.val_csv"], *how)
    with open(scores, newline="") as file:
        assert len(list(csv.DictReader(file))) == 24
    call(tmp_path, "common.review", scores, "--out", tmp_path / "r.html")
    call(tmp_path, "common.export", "--run", trained, "--out", tmp_path / "out")
    call(tmp_path, "common.annotate", root, "--check", data["data.train_csv"])


@pytest.mark.parametrize("module", ["common.compare"])
def test_compare_without_them(module, finished, tmp_path):
    call(tmp_path, module, finished, "--out", tmp_path / "c.png")
