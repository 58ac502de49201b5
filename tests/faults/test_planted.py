"""Mistakes planted in a copy of the project: the tests that should find them do."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT

PLANTED = {  # what is wrong: (file, what stands there, what comes instead, the tests that see it)
    "no fsync": (
        "common/running/checkpoint.py",
        "            os.fsync(file.fileno())\n        if keep_last",
        "        if keep_last",
        "tests/faults/test_checkpoint.py",
    ),
    "no checksum": (
        "common/running/checkpoint.py",
        "if hashlib.sha256(data[32:]).digest() != data[:32]:",
        "if False:",
        "tests/faults/test_checkpoint.py",
    ),
    "last.pt is written in place": (
        "common/running/checkpoint.py",
        'new, link = folder / (LAST + ".new")',
        "new, link = folder / LAST",
        "tests/faults/test_checkpoint.py",
    ),
    "weights run code": (
        "common/running/checkpoint.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "tests/faults/test_hostile.py",
    ),
    "the teacher stays": (
        "byol.py",
        "ema_update(",
        "(lambda *a: None)(",
        "tests/test_methods.py -k teacher",
    ),
    "DINO's centre is not saved": (
        "dino.py",
        'register_buffer("center", ',
        'register_buffer("center", persistent=False, tensor=',
        "tests/faults/test_kill_and_resume.py -k dino",
    ),
    "no lock": (
        "common/running/standing.py",
        "getattr(fcntl, kind)(file, how | fcntl.LOCK_NB)",
        "pass",
        "tests/faults/test_a_run.py -k share_a_folder",
    ),
    "links lead anywhere": (
        "common/images.py",
        'if not path.startswith(os.path.join(image_root, "")):',
        "if False:",
        "tests/test_images.py -k outside",
    ),
    "jitter from the global generator": (
        "common/augmentations.py",
        "rng = keyed_rng(VIEW, self.seed, epoch, row, view)",
        "rng = np.random.default_rng()",
        "tests/test_augmentations.py tests/test_data.py",
    ),
    "the probe's optimiser is forgotten": (
        "common/probe.py",
        'register_buffer("momentum_buffer", ',
        'register_buffer("momentum_buffer", persistent=False, tensor=',
        "tests/faults/test_kill_and_resume.py -k simclr",
    ),
    "the loader draws from the global generator": (
        "common/data.py",
        "generator=torch.Generator(),",
        "generator=None,",
        "tests/test_data.py tests/faults/test_kill_and_resume.py",
    ),
    "another config goes on": (
        "common/running/checkpoint.py",
        '    changed = differences(saved["config"], config)\n',
        "    changed = []\n",
        "tests/faults/test_bad_checkpoints.py",
    ),
    "pipes are opened": (
        "common/running/errors.py",
        "    if not stat.S_ISREG(mode):",
        "    if False:",
        "tests/faults/test_no_regular_file.py",
    ),
    "NaN is saved": (
        "common/running/checkpoint.py",
        "if not torch.isfinite(torch.as_tensor(content)).all():",
        "if False:",
        "tests/faults/test_checkpoint.py tests/faults/test_a_run.py -k finite",
    ),
    "scores by rank": (
        "common/probe.py",
        "rows, logits = gather_unpadded(rows), gather_unpadded(logits)",
        "rows, logits = rows, logits",
        "tests/test_methods.py -k every_image_once",
    ),
    "names are markup": (
        "common/inspection/review.html",
        "picture.alt = name.textContent = image.file;",
        "picture.alt = name.innerHTML = image.file;",
        "tests/test_review.py -k odd_names",
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "project"
    wanted = ("*.py", "*.sh", "*.md", "*.toml", "Makefile", "LICENSE")
    folder.mkdir()
    for pattern in wanted:
        for path in ROOT.glob(pattern):
            shutil.copy(path, folder)
    for name in (".ci", "common", "configs", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_mistake_is_caught(case, copied, count):
    name, old, new, tests = PLANTED[case]
    path = copied / name
    text = path.read_text()
    assert text.count(old) >= 1, "the mistake has no place any more"
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copied)}
    path.write_text(text.replace(old, new, 1))
    try:
        done = subprocess.run(
            words, cwd=copied, env=env, capture_output=True, text=True, timeout=PATIENCE
        )
    finally:
        path.write_text(text)
    caught = done.returncode == 1 and "FAILED " in done.stdout
    count("planted mistakes", planted=1, caught=caught)
    assert caught, done.stdout[-2000:]
