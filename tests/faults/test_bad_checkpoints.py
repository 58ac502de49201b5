"""What a disk, a person or a stranger leaves where a run's checkpoint belongs."""

import hashlib
import io
import os
import pickle
import shutil
import sys
import zipfile

import pytest
import torch
from conftest import exit_code
from refusal import refused
from small import run
from test_bad_images import sock

import simclr
from common.running.checkpoint import read_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("narrow")

SMALL = ["patch_size=8", "optimization.epochs=1"]


@pytest.fixture(scope="module")
def begun(tiny_set, tmp_path_factory):
    """Folder of a run that has a checkpoint, but no result."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(simclr.Run, "finish", lambda self, result: sys.exit(75))
        with pytest.raises(SystemExit):
            run("simclr", folder, tiny_set, "run", *SMALL, backbone="vit_tiny")
    (folder / "run/prev.pt").unlink(missing_ok=True)
    return folder


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, canary, call=os.mkdir):
        self.how = call, (str(canary),)

    def __reduce__(self):
        return self.how


def summed(data):
    """With a checksum that fits."""
    return hashlib.sha256(data).digest() + data


def of_torch(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def archive(_):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02.")
    return file.getvalue()


BYTES = {  # what is wrong: a checkpoint's bytes -> others
    "no byte": lambda data: b"",
    "a checksum alone": lambda data: data[:32],
    "half of it": lambda data: data[: len(data) // 2],
    "one byte too few": lambda data: data[:-1],
    "one byte too many": lambda data: data + b"\0",
    "a flipped bit in the checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a flipped bit in a weight": lambda data: (
        data[:90_000] + bytes([data[90_000] ^ 1]) + data[90_001:]
    ),
    "a zeroed page": lambda data: data[:40_960] + b"\0" * 4096 + data[45_056:],
    "a text": lambda data: b"no checkpoint",
    "a Git LFS pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "torch's own file": lambda data: data[32:],
    "another program's zip": archive,
    "a zip with a checksum": lambda data: summed(archive(data)),
    "an empty pickle": lambda data: summed(pickle.dumps(None)),
}
PLACES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": sock,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("none")),
    "a link to itself": lambda path: path.symlink_to(path),
}


def first_weight(content):
    return next(k for k, v in content["model"].items() if v.is_floating_point())


def _remove(content, *keys):
    for key in keys:
        del content[key]


def _weight(change):
    def apply(content):
        name = first_weight(content)
        content["model"][name] = change(content["model"][name])

    return apply


CONTENT = {  # what is wrong: a change of the content, what the message has to name
    "a newer format": (lambda c: c.update(format=99), ["format 99"]),
    "no format": (lambda c: c.pop("format"), ["format None"]),
    "another learning rate": (lambda c: c["config"]["optimization"].update(lr=9.0), ["lr", "9"]),
    "another method": (lambda c: c["config"].update(method="byol"), ["method", "byol"]),
    "another backbone": (lambda c: c["config"].update(backbone="resnet18"), ["backbone"]),
    "another seed": (lambda c: c["config"].update(seed=7), ["seed", "7"]),
    "another size": (lambda c: c["config"]["data"].update(image_size=64), ["image_size", "64"]),
    "other data": (lambda c: c.update(data_sha="0"), ["data_sha"]),
    "another number of ranks": (lambda c: c.update(world_size=4), ["world_size", "4", "1"]),
    "another device": (lambda c: c.update(device="cuda"), ["device", "cuda"]),
    "no model": (lambda c: c.pop("model"), ["model"]),
    "no state": (lambda c: c.pop("state"), ["state"]),
    "no step": (lambda c: c.pop("step"), ["step"]),
    "no config": (lambda c: c.pop("config"), ["config"]),
    "a step of text": (lambda c: c.update(step="one"), ["'one'"]),
    "a step that never was": (lambda c: c.update(step=10**9), ["step"]),
    "a negative step": (lambda c: c.update(step=-1), ["step"]),
    "a weight less": (lambda c: c["model"].pop(first_weight(c)), ["model"]),
    "a weight more": (lambda c: c["model"].update(extra=torch.ones(1)), ["extra"]),
    "a weight of another shape": (_weight(lambda w: w[None]), ["model"]),
    "a weight that is no tensor": (_weight(lambda w: "x"), ["model"]),
    "a weight that is not finite": (_weight(lambda w: w * float("nan")), ["is not finite"]),
    "a model of another kind": (lambda c: c.update(model=[1]), ["model"]),
    "an optimizer's state less": (lambda c: c["state"]["optimizer"].pop("state"), ["optimizer"]),
    "an optimizer of other groups": (
        lambda c: c["state"]["optimizer"]["param_groups"].pop(),
        ["optimizer"],
    ),
    "a probe of another width": (
        lambda c: c["state"].update(probe={k: v[..., :3] for k, v in c["state"]["probe"].items()}),
        ["probe"],
    ),
    "no sums of the epoch": (lambda c: c["state"].pop("loss_sum"), ["loss_sum"]),
    "more rows than scores": (
        lambda c: c["state"].update(scores={"rows": torch.arange(9), "logits": torch.ones(1)}),
        ["9 rows", "1 scores"],
    ),
}


def copy(begun, tmp_path):
    """A copy that shares the files until they are replaced."""
    shutil.copytree(begun / "run", tmp_path / "runs/run", copy_function=os.link)
    return tmp_path / "runs/run/last.pt"


def go_on(tmp_path, tiny_set):
    from small import arguments

    return arguments("simclr", tiny_set, tmp_path / "runs", "run", *SMALL, backbone="vit_tiny")


@pytest.mark.parametrize("case", [*BYTES, *PLACES])
def test_what_is_no_checkpoint(case, begun, tiny_set, tmp_path, capsys, count):
    path = copy(begun, tmp_path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(BYTES[case](content)) if case in BYTES else PLACES[case](path)
    argv = go_on(tmp_path, tiny_set)
    refused(simclr.main, argv, [path, "afresh"], tmp_path, capsys, count, "checkpoints")


@pytest.mark.parametrize("case", CONTENT)
def test_what_is_no_checkpoint_of_this_run(case, begun, tiny_set, tmp_path, capsys, count):
    """Its checksum fits: a person, a script or a stranger made it so."""
    path = copy(begun, tmp_path)
    content = read_checkpoint(path)
    change, words = CONTENT[case]
    change(content)
    path.unlink()
    if "format" in case:
        path.write_bytes(summed(of_torch(content)))
    else:
        content.pop("format")
        save_checkpoint(path.parent, content)
    argv = go_on(tmp_path, tiny_set)
    refused(simclr.main, argv, [path, *words], tmp_path, capsys, count, "checkpoints")


def test_both_are_damaged(begun, tiny_set, tmp_path, capsys, count):
    path = copy(begun, tmp_path)
    path.unlink()
    for name in ("last.pt", "prev.pt"):
        path.with_name(name).write_bytes(b"junk")
    words = [path, path.with_name("prev.pt"), "afresh"]
    argv = go_on(tmp_path, tiny_set)
    refused(simclr.main, argv, words, tmp_path, capsys, count, "checkpoints")


def test_the_other_is_whole(begun, tiny_set, tmp_path, capsys):
    """Then the run goes on from there, with a warning."""
    path = copy(begun, tmp_path)
    os.rename(path, path.with_name("prev.pt"))
    path.write_bytes(b"junk")
    assert exit_code(simclr.main, *go_on(tmp_path, tiny_set)) == 0
    said = capsys.readouterr().err
    assert "going on from" in said and "prev.pt" in said
