"""Files changed at random: whatever comes, it is used or refused with a sentence, never more."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, warm_parent, write_set
from small import ABOUT_SCORES, make_up
from test_bad_images import BMP, JPEG, PNG, TIFF, WEBP, saved
from warm import SERVER

import simclr
from common.annotations import read_annotations
from common.images import open_image
from common.inspection import marks
from common.inspection.scores_file import read_scores, sidecar
from common.normal_only import NormalReference
from common.pack import pack
from common.running.checkpoint import load_checkpoint, save_checkpoint
from common.running.config import read_config
from common.running.errors import UserError
from common.running.standing import read_result
from common.running.weights import init_encoder
from common.store import IMAGES, INDEX, SETTINGS, PackedStore
from common.study.evaluate import load_scores
from common.study.grid import read_grid

SIGNS = ["\n", ",", ";", '"', "'", ":", "[", "{", "-", "&a", "*a", "!!x", "\0", "\x1b", "\t", "  "]
SIGNS += [
    "nan",
    "1e999",
    "../",
    "\ufeff",
    "\u2028",
    "9" * 30,
    "null",
    "0",
    "-1",
    "%",
    "#",
    "|",
    ">",
]
SIGNS = [sign.encode() for sign in SIGNS] + [b"\xff\xfe", b"\x80", b"a" * 3000]


def mutated(data, rng):
    """Bytes with one to four changes: a bit, a byte, a sign, a piece gone, moved, twice, zeroed."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, n = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64, 500])
        kind = rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            data[at:at] = rng.choice(SIGNS)
        elif kind == 3:
            del data[at : at + n]
        elif kind == 4:
            data[at:at] = data[rng.randrange(len(data) + 1) :][:n]
        elif kind == 5:
            data[at : at + n] = bytes(len(data[at : at + n]))
        elif kind == 6:
            del data[at:]
        else:
            data[at : at + 1] = rng.choice(SIGNS)
    return bytes(data)


class Kind:
    """A kind of file: its `good` bytes (one or more), its `name`, and `read`, by its reader."""

    def __init__(self, folder):
        self.folder = folder

    def place(self, data):
        (self.folder / self.name).write_bytes(data)


class Yaml(Kind):
    name = "x.yaml"
    good = (ROOT / "configs/simclr_r18.yaml").read_bytes()

    def read(self):
        read_config(simclr.Config, self.folder / self.name)


class Grid(Yaml):
    good = (ROOT / "configs/grid/mini.yaml").read_bytes()

    def read(self):
        read_grid(self.folder / self.name)


class Csv(Kind):
    name = "x.csv"

    def __init__(self, folder):
        super().__init__(folder)
        write_set(folder / "set", unlabelled=3)
        self.good = (folder / "set/train.csv").read_bytes()

    def read(self):
        read_annotations(self.folder / self.name)


class Checkpoint(Kind):
    name = "last.pt"

    def __init__(self, folder):
        super().__init__(folder)
        content = {"model": {"w": torch.randn(50)}, "step": 3, "config": {"a": [1.0, None]}}
        save_checkpoint(folder, content)
        self.good = (folder / self.name).read_bytes()

    def read(self):
        load_checkpoint(self.folder, lambda text: None)


class Summed(Checkpoint):
    """With a checksum that fits, so that torch reads it."""

    def place(self, data):
        super().place(hashlib.sha256(data[32:]).digest() + data[32:])


class Image(Kind):
    name = "x.png"
    good = (PNG, JPEG, TIFF, WEBP, BMP, saved("PNG", "L"), saved("PNG", "P"), saved("PNG", "LA"))
    good += (saved("JPEG", "CMYK"), saved("TIFF", "F"), saved("PNG", "1"), saved("WEBP", "RGBA"))

    def read(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_image(os.path.realpath(self.folder), self.name)


class Scores(Kind):
    """What a finished run leaves: its scores."""

    name = "val_scores.npz"

    def __init__(self, folder):
        super().__init__(folder)
        words = write_set(folder / "set")
        (run,) = read_grid(
            ROOT / "configs/grid/mini.yaml",
            [*words, f"run.output_dir={folder / 'runs'}", "data.train_defect_proportion=[0.05]"],
        )[:1]
        make_up(run, np.random.default_rng(0))
        self.run, self.folder = run, run.folder
        self.good = (run.folder / self.name).read_bytes()

    def read(self):
        load_scores(self.folder)


class Result(Scores):
    name = "result.json"

    def read(self):
        read_result(self.folder)


class Normals(Kind):
    name = "normal_features.npz"

    def __init__(self, folder):
        super().__init__(folder)
        names = np.array([b"a%d" % i for i in range(40)])
        NormalReference(torch.randn(40, 6), names).save(folder / self.name)
        self.good = (folder / self.name).read_bytes()

    def read(self):
        NormalReference.load(self.folder / self.name)


class Store(Kind):
    """Its settings; what it holds is read, too."""

    name = SETTINGS

    def __init__(self, folder):
        super().__init__(folder)
        write_set(folder / "set", n_train=6, n_val=3)
        table = read_annotations(folder / "set/train.csv")
        pack(folder / "set/images", table.filename, folder / "store", "raw", 32)
        self.table, self.folder = table, folder / "store"
        self.good = (self.folder / self.name).read_bytes()

    def read(self):
        store = PackedStore(self.folder)
        store.check(32, 32, self.table)
        for i in range(len(self.table)):
            store.read(self.table.name(i))


class Index(Store):
    name = INDEX


class Packed(Store):
    name = IMAGES


class Weights(Kind):
    """A file that an encoder starts from."""

    name = "x.safetensors"

    def __init__(self, folder):
        super().__init__(folder)
        self.model = torch.nn.Module()
        self.model.backbone = torch.nn.Sequential(torch.nn.Linear(3, 3))
        self.good = self.bytes_of(self.model.backbone.state_dict())

    def bytes_of(self, weights):
        return safetensors.torch.save(weights)

    def read(self):
        init_encoder(self.model, self.folder / self.name)


class Pickled(Weights):
    name = "x.pth"

    def bytes_of(self, weights):
        file = io.BytesIO()
        torch.save(weights, file)
        return file.getvalue()


class Predicted(Kind):
    name = "s.csv"
    good = b"file,score,probability,decision\na.png,1.5,0.8,defect\nb.png,-2,0.1,normal\n"
    good += b"c.png,,,unreadable\n"

    def __init__(self, folder):
        super().__init__(folder)
        sidecar(folder / self.name).write_text(json.dumps(ABOUT_SCORES))

    def read(self):
        read_scores(self.folder / self.name)


class Sidecar(Predicted):
    name = "s.json"

    def __init__(self, folder):
        super().__init__(folder)
        (folder / "s.csv").write_bytes(Predicted.good)
        self.good = (folder / self.name).read_bytes()

    def read(self):
        read_scores(self.folder / "s.csv")


class Marks(Csv):
    """labels.csv of the review page."""

    name = "labels.csv"

    def __init__(self, folder):
        super().__init__(folder)
        self.good = b"Filename,Defect\ntrain_0000.png,1\ntrain_0001.png,0\ntrain_0002.png,\n"

    def read(self):
        with contextlib.redirect_stdout(io.StringIO()):
            train = shutil.copy(self.folder / "set/train.csv", self.folder / "t.csv")
            marks.fill(
                self.folder / "set/images",
                train,
                self.folder / "set/val.csv",
                self.folder / self.name,
            )
        for path in self.folder.glob("t_*.csv"):
            path.unlink()


KINDS = {  # how many of each: 10,000 in all
    Yaml: 2000,
    Grid: 600,
    Csv: 2000,
    Checkpoint: 800,
    Summed: 600,
    Image: 1500,
    Scores: 500,
    Result: 400,
    Normals: 300,
    Store: 200,
    Index: 100,
    Packed: 100,
    Weights: 200,
    Pickled: 100,
    Predicted: 200,
    Sidecar: 200,
    Marks: 200,
}


def trials(kind, folder, seed, n):
    """n changed files; writes what came of each as soon as it is known, a line each."""
    kind, rng = kind(folder), random.Random(seed)
    goods = kind.good if isinstance(kind.good, tuple) else (kind.good,)
    os.chdir(ROOT)
    with open(folder / "trials.txt", "w", buffering=1) as file, open(os.devnull, "w") as nowhere:
        for i in range(n):
            data = mutated(rng.choice(goods), rng)
            kind.place(data)
            (folder / "now.bin").write_bytes(data)  # of which one a crash was
            found = "used"
            try:
                with contextlib.redirect_stderr(nowhere):
                    kind.read()
            except UserError as error:
                found = "refused" if str(error) and len(str(error)) < 5000 else "refused at length"
            except BaseException as error:  # what must not be
                found = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
                (folder / f"bad{i}").write_bytes(data)
            file.write(f"{found}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_used_or_refused(kind, tmp_path, count):
    """In a process of its own, so that a crash is one."""
    warm_parent()
    n = KINDS[kind]
    process = SERVER.Process(target=trials, args=(kind, tmp_path, kind.__name__, n))
    process.start()
    process.join()
    lines = (tmp_path / "trials.txt").read_text().splitlines()
    bad = [(i, line) for i, line in enumerate(lines) if line not in ("used", "refused")]
    crashed = n - len(lines)
    count("generated bad inputs", tried=len(lines), unexpected=len(bad), crashes=bool(crashed))
    assert not bad, bad[:5]
    assert process.exitcode == 0 and not crashed
    assert lines.count("refused") > n / 20  # the changes reach what is read
