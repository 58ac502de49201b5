"""What several tests need: a tiny data set on disk, the shared data folder, gloo ranks."""

import csv
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import yaml
from figures import count, pytest_terminal_summary  # noqa: F401 (fixture and hook)
from PIL import Image

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

PATIENCE = 1800  # seconds: only what hangs takes as long, however busy the machine

torch.set_num_threads(1)  # small tensors: threads only get in each other's way
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start would inherit it


LONG = "a_grid ranks grid_of_many a_run fork portable kill_and_resume methods report".split()


def pytest_collection_modifyitems(items):
    """Files that take minutes first, so that no core waits for another's at the end."""
    order = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.module.__name__, len(order)))


@pytest.fixture(scope="session")
def sewer_ml():
    """Folder with genuine Sewer-ML images and annotations."""
    folder = SHARED / "sewerml"
    if not folder.is_dir():
        pytest.skip(f"no Sewer-ML sample in {folder}")
    return folder


def write_set(folder, n_train=64, n_val=24, size=40, unlabelled=0, seed=0):
    """A learnable set: defects carry a bright square. Returns overrides that name it."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for split, n in (("train", n_train), ("val", n_val)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["Filename", "RB", "FS", "ND", "Defect"])
            for i in range(n):
                defect = i % 3 == 0
                image = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
                if defect:
                    image[5:20, 5:20] = 255
                name = f"{split}_{i:04d}.png"
                Image.fromarray(image).save(folder / "images" / name)
                labels = [int(defect), int(defect and i % 2), int(not defect), int(defect)]
                if split == "train" and i < unlabelled:
                    labels = [""] * 4
                writer.writerow([name, *labels])
    return [
        f"data.image_root={folder / 'images'}",
        f"data.train_csv={folder / 'train.csv'}",
        f"data.val_csv={folder / 'val.csv'}",
    ]


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory):
    """Overrides that name a set of 64 + 24 images, eight of them without a label."""
    return write_set(tmp_path_factory.mktemp("set") / "tiny", unlabelled=8)


@pytest.fixture(scope="session")
def finished(tiny_set, tmp_path_factory):
    """Folder of a finished run of seconds: SimCLR, ResNet-18 at 32 px on the tiny set."""
    import small

    before = small.is_narrow()
    small.make_narrow(False)
    folder = small.run("simclr", tmp_path_factory.mktemp("finished"), tiny_set, "simclr")
    small.make_narrow(before)
    return folder


TINY = [
    "data.image_size=32",
    "data.train_defect_proportion=0.25",
    "data.num_workers=0",
    "optimization.batch_size=16",
    "optimization.epochs=2",
    "optimization.warmup_epochs=1",
    "run.val_every_epochs=1",
    "run.log_every=1",
]


@pytest.fixture(scope="module")
def narrow():
    """Small encoders in the place of ResNet-18 and ViT-Tiny, here and in processes from here."""
    from small import make_narrow

    make_narrow()
    yield
    make_narrow(False)


@pytest.fixture
def narrow_here():
    """The same for one test of a module that has full ones."""
    from small import make_narrow

    make_narrow()
    yield
    make_narrow(False)


@pytest.fixture
def full_size():
    """The encoders as they are, in a narrow module."""
    from small import make_narrow

    make_narrow(False)
    yield
    make_narrow()


def exit_code(main, *words):
    """Of a command's main in this process."""
    try:
        main([*map(str, words)])
    except SystemExit as end:
        return end.code
    return 0


def python(*args, **kwargs):
    """Run this Python in the project's folder; returns the finished process with its output."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        **kwargs,
    )


METHODS = ["simclr", "byol", "barlow", "lejepa", "dino", "mae", "supervised"]
COMMANDS = ["predict", "annotate", "review", "export", "pack", "compare", "study.__main__"]


def warm_parent():
    """Start the process that imports all this once, and from which others fork at once.

    Importing torch takes seconds; a fork of a process that has done so, and that has computed
    nothing, none. It is multiprocessing's fork server: no thread or lock of pytest's is copied.
    """
    modules = [*METHODS, *(f"common.{name}" for name in COMMANDS), "small"]
    mp.get_context("forkserver").set_forkserver_preload(modules)
    before, here = dict(os.environ), os.getcwd()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    os.chdir(ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(here)


def _rank(rank, world_size, folder, narrow, function, args):
    from small import make_narrow

    make_narrow(narrow)
    with open(folder / f"{rank}.err", "w") as said:
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    # As torchrun has them; but the ranks meet in a file, because a port may be taken meanwhile.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "unused", "MASTER_PORT": "unused"}
    store = torch.distributed.FileStore(str(folder / "store"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_ranks(world_size, folder, function, *args):
    """function(*args) on gloo ranks; returns what each rank returned. It must be importable.

    What rank r writes to standard error is in folder/r.err.
    """
    from small import is_narrow

    warm_parent()
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)  # of an earlier call
    args = (world_size, folder, is_narrow(), function, args)
    mp.start_processes(_rank, args, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def read_yaml(path):
    """A YAML file by PyYAML's own rules, to compare with ours."""
    return yaml.safe_load(Path(path).read_text())
