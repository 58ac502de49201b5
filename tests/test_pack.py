import io
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_set
from PIL import Image
from small import arguments, outcome, run, stop_at
from warm import call

import common.pack
import simclr
from common.annotations import read_annotations
from common.augmentations import resize
from common.images import ImageFolder
from common.pack import main, pack
from common.running.config import load_config
from common.running.errors import ImageError, UserError
from common.running.folder import read_json
from common.running.standing import standing
from common.store import IMAGES, INDEX, PackedStore, leave_out_unreadable

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def frames(tmp_path):
    """Folder with 40 images of 40 px, one of them larger, and two CSVs."""
    write_set(tmp_path / "s", n_train=30, n_val=10)
    y, x = np.mgrid[:120, :160] / 12
    waves = np.stack([np.sin(y + x), np.cos(x), np.sin(2 * y)], axis=-1)
    image = Image.fromarray((waves * 100 + 128).astype(np.uint8))
    image.save(tmp_path / "s/images/train_0003.png")
    return tmp_path / "s"


def names(folder, *csvs):
    tables = [
        read_annotations(folder / f"{name}.csv").filename for name in csvs or ("train", "val")
    ]
    return np.unique(np.concatenate(tables))


def damage(folder, name):
    content = bytearray((folder / "images" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "images" / name).write_bytes(content)


def command(folder, out, *more):
    csvs = [str(folder / f"{name}.csv") for name in ("train", "val")]
    return [
        "--image-root",
        str(folder / "images"),
        "--annotations",
        *csvs,
        "--out",
        str(out),
        *more,
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_raw_holds_the_pixels_and_jpeg_nearly(frames, tmp_path, workers):
    files = ImageFolder(frames / "images")
    for form in ("raw", "jpeg"):
        pack(frames / "images", names(frames), tmp_path / form, form, 60, workers)
    raw, jpeg = PackedStore(tmp_path / "raw"), PackedStore(tmp_path / "jpeg")
    for name in map(bytes.decode, names(frames)):
        image = files.read(name)
        if image.shape[0] > 60:
            image = resize(image, (60, 80)).permute(1, 2, 0).numpy()
            assert np.abs(jpeg.read(name).astype(int) - image).mean() < 4
        assert np.array_equal(raw.read(name), image)
        assert jpeg.read(name).shape == image.shape
    assert raw.packed != jpeg.packed and raw.packed.startswith("raw ")


def test_a_store_is_read_by_other_processes_without_a_copy(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    store = PackedStore(tmp_path / "p")
    before = store.read("train_0005.png")
    content = pickle.dumps(store)
    assert len(content) < 2000  # whatever the number of images
    assert np.array_equal(pickle.loads(content).read("train_0005.png"), before)
    assert isinstance(store.index, np.memmap) and isinstance(store.names, np.memmap)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("at", [2, 4, 7])
def test_a_killed_packer_goes_on_to_the_same_bytes(frames, tmp_path, monkeypatch, at, lost):
    """lost: the end of what it had written, too, as by a power cut."""
    monkeypatch.setattr(common.pack, "AT_ONCE", 6)
    how = frames / "images", names(frames)
    pack(*how, tmp_path / "whole", "raw", 60)

    class Killed(BaseException):
        pass

    def fsync(descriptor, calls=[]):  # noqa: B006 (counts)
        calls.append(descriptor)
        if len(calls) == at:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(common.pack, "os", SimpleNamespace(fsync=fsync, path=os.path))
        with pytest.raises(Killed):
            pack(*how, tmp_path / "p", "raw", 60)
    with open(tmp_path / "p" / "index.partial", "ab") as partial:
        partial.write(b"half")  # of a record
    with pytest.raises(UserError, match="not packed to the end"):
        PackedStore(tmp_path / "p")
    if lost:
        images = tmp_path / "p" / IMAGES
        os.truncate(images, max(images.stat().st_size - 6 * 40 * 40 * 3 - 1, 0))
    read = []
    monkeypatch.setattr(ImageFolder, "read", lambda *a, f=ImageFolder.read: read.append(a) or f(*a))
    pack(*how, tmp_path / "p", "raw", 60)
    left = 40 - 6 * (at - 2) + (lost and at > 2)
    assert len(read) == left + 20  # those of the estimate
    for name in (IMAGES, INDEX, "names.npy", "store.json"):
        assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "p" / "index.partial").exists()
    del read[:]
    assert pack(*how, tmp_path / "p", "raw", 60) == {} and not read  # it is done


def test_what_cannot_be_read_is_named_and_left_out(frames, tmp_path, capsys):
    for name in ("train_0007.png", "val_0002.png"):
        damage(frames, name)
    with pytest.raises(SystemExit) as ended:
        main(command(frames, tmp_path / "p"))
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "train_0007.png" in told and "val_0002.png" in told and "2 images cannot be read" in told
    store = PackedStore(tmp_path / "p")
    tables = [read_annotations(frames / f"{name}.csv") for name in ("train", "val")]
    with pytest.raises(UserError, match=r"max_bad_images: 1, but 2 images .*train_0007.*val_0002"):
        leave_out_unreadable(store, 1, *tables)
    train, val = leave_out_unreadable(store, 2, *tables)
    assert len(train) == 29 and len(val) == 9
    assert train.name(7) == "train_0008.png" and train.line[7] == 10
    assert "left out: 2 images" in capsys.readouterr().err
    with pytest.raises(ImageError, match="train_0007.png"):
        store.read("train_0007.png")


def test_an_image_that_is_readable_at_the_second_try_is_packed(frames, tmp_path, monkeypatch):
    failed, read = [], ImageFolder.read

    def once(self, name, *more):
        if name == "train_0009.png" and len(failed) < 2:  # the estimate's try, and the packer's
            failed.append(name)
            raise ImageError(f"{name}: the disk is away")
        return read(self, name, *more)

    monkeypatch.setattr(ImageFolder, "read", once)
    monkeypatch.setattr(common.pack, "TRIED", 40)
    assert pack(frames / "images", names(frames), tmp_path / "p", "raw", 60, 0) == {}
    image = PackedStore(tmp_path / "p").read("train_0009.png")
    assert len(failed) == 2 and np.array_equal(
        image, read(ImageFolder(frames / "images"), failed[0])
    )


def test_a_store_with_more_images_serves_and_one_with_fewer_names_the_first(frames, tmp_path):
    pack(frames / "images", names(frames, "train"), tmp_path / "p", "raw", 60)
    store = PackedStore(tmp_path / "p")
    train, val = (read_annotations(frames / f"{name}.csv") for name in ("train", "val"))
    assert not store.unreadable(train.take(slice(3, 9))).any()
    with pytest.raises(
        UserError, match=r"lacks 10 .*val\.csv, the first val_0000\.png .*val\.csv:2"
    ):
        store.unreadable(val)
    with pytest.raises(ImageError, match="val_0003.png.*not in the store"):
        store.read("val_0003.png")


def test_damage_is_found_when_it_is_read(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    with open(tmp_path / "p" / IMAGES, "r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ImageError, match="train_0000.png.*checksum"):
        PackedStore(tmp_path / "p").read("train_0000.png")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda p: shutil.rmtree(p), "no packed store"),
        (lambda p: (p / INDEX).unlink(), "no packed store"),
        (lambda p: (p / INDEX).write_bytes(b"x"), "no packed store"),
        (lambda p: np.save(p / INDEX, np.load(p / INDEX)[:-1]), "damaged"),
        (lambda p: (p / IMAGES).write_bytes(b""), "damaged"),
        (lambda p: (p / "store.json").write_text('{"format": 9}'), "another format"),
        (lambda p: (p / "store.json").write_text("[]"), "no packed store"),
    ],
)
def test_a_folder_that_is_no_whole_store_is_refused(frames, tmp_path, spoil, told):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    spoil(tmp_path / "p")
    with pytest.raises(UserError, match=f"{tmp_path}/p.*{told}"):
        PackedStore(tmp_path / "p")


def test_settings_that_lost_one_or_have_another_are_refused(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    whole = read_json(tmp_path / "p/store.json")
    needed = "format", "form", "quality", "short_side", "finished", "index_sha256"
    assert set(needed) <= set(whole)
    for key in needed:
        for other in (None, [], "x"):
            changed = {k: v for k, v in whole.items() if k != key or other is not None}
            changed |= {key: other} if other is not None else {}
            if (key, other) == ("finished", "x"):
                continue  # as good as true
            (tmp_path / "p/store.json").write_text(json.dumps(changed))
            with pytest.raises(UserError, match=f"{tmp_path}/p"):
                PackedStore(tmp_path / "p")


def test_a_folder_of_something_else_is_left_alone(frames, tmp_path, monkeypatch):
    how = frames / "images", names(frames)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="something else"):
        pack(*how, tmp_path / "other")
    pack(*how, tmp_path / "p", "raw", 60)
    for more in (("jpeg", 60), ("raw", 50)):
        with pytest.raises(UserError, match="other images or settings"):
            pack(*how, tmp_path / "p", *more)
    with pytest.raises(UserError, match="other images or settings"):
        pack(frames / "images", names(frames, "val"), tmp_path / "p", "raw", 60)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(common.pack.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB are needed"):
        pack(*how, tmp_path / "small", "raw", 60)


def test_two_packers_do_not_meet(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    with open(tmp_path / "p" / "lock", "a") as lock:
        common.pack.try_lock("lockf", lock)
        second = call(tmp_path, "common.pack", *command(frames, tmp_path / "p", "--form", "raw"))
    assert second.poll() == 2 and "another process is packing" in second.err


def test_training_from_raw_pixels_is_training_from_the_files(tiny_set, tmp_path, monkeypatch):
    """Bit for bit; and a checkpoint knows what its images were, but not where they lay."""
    folder = tiny_set[0].partition("=")[2].removesuffix("/images")
    csvs = [f"{folder}/{name}.csv" for name in ("train", "val")]
    for form in ("raw", "jpeg"):
        how = "--image-root", f"{folder}/images", "--annotations", *csvs, "--form", form
        main([*how, "--out", str(tmp_path / form)])
    packed = [f"data.packed={tmp_path / form}" for form in ("raw", "jpeg")]
    files = run("simclr", tmp_path, tiny_set, "files")
    raw = run("simclr", tmp_path, tiny_set, "raw", packed[0])
    assert outcome(raw) == outcome(files)
    provenance = read_json(raw / "provenance.json")
    assert provenance["data_sha256"]["packed"] == PackedStore(tmp_path / "raw").packed
    jpeg = outcome(run("simclr", tmp_path, tiny_set, "jpeg", packed[1]))
    assert jpeg[0][0]["loss"] != outcome(files)[0][0]["loss"]

    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(SystemExit):
            run("simclr", tmp_path, tiny_set, "again", packed[0])
    for other in (packed[1], "data.packed=null"):
        with pytest.raises(SystemExit) as ended:
            run("simclr", tmp_path, tiny_set, "again", other)
        assert ended.value.code == 2
    for other in (tmp_path / "raw", tmp_path / "jpeg"):  # a finished run knows it, too
        how = [f"run.output_dir={tmp_path}", "run.name=raw", f"data.packed={other}"]
        cfg = load_config(simclr.Config, arguments("simclr", tiny_set, tmp_path, "raw", *how))
        state, why = standing(raw, cfg)
        assert state == ("finished" if other.name == "raw" else "refused"), why
    (tmp_path / "raw").rename(tmp_path / "moved")
    moved = run("simclr", tmp_path, tiny_set, "again", f"data.packed={tmp_path / 'moved'}")
    assert outcome(moved) == outcome(files)


def test_crops_that_a_store_is_too_small_for_are_told(frames, tmp_path, capsys):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    store = PackedStore(tmp_path / "p")
    store.check(32, 60.9)
    assert "warning" not in capsys.readouterr().err
    store.check(60, 95.2)
    assert "warning" in capsys.readouterr().err
    with pytest.raises(UserError, match="image_size: 61.*short side of 60 px"):
        store.check(61, 61)
    pack(frames / "images", names(frames, "val"), tmp_path / "q", "raw", 60)
    PackedStore(tmp_path / "q").check(200, 300)  # nothing was shrunk: the originals have no more
    assert "warning" not in capsys.readouterr().err


def test_an_image_that_cannot_be_a_jpeg_is_named(frames, tmp_path):
    Image.new("RGB", (66000, 2)).save(frames / "images/val_0004.png")
    unreadable = pack(frames / "images", names(frames), tmp_path / "p")
    assert list(unreadable) == ["val_0004.png"] and "JPEG" in unreadable["val_0004.png"]
    assert pack(frames / "images", names(frames), tmp_path / "raw", "raw") == {}


def test_other_originals_are_not_mixed_in(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "raw", 60)
    shutil.copytree(frames / "images", tmp_path / "copy")
    with pytest.raises(UserError, match="other images or settings"):
        pack(tmp_path / "copy", names(frames), tmp_path / "p", "raw", 60)


def test_jpeg_files_are_as_stated(frames, tmp_path):
    pack(frames / "images", names(frames), tmp_path / "p", "jpeg", 60)
    store = PackedStore(tmp_path / "p")
    record = store.index[store._position("train_0003.png")]
    content = (tmp_path / "p" / IMAGES).read_bytes()[record["offset"] :][: record["length"]]
    image = Image.open(io.BytesIO(content))
    assert image.format == "JPEG" and image.size == (80, 60)
    ours = io.BytesIO()
    Image.new("RGB", (8, 8)).save(ours, "JPEG", quality=90, subsampling="4:2:0")
    assert image.quantization == Image.open(ours).quantization
