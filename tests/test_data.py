import numpy as np
import pytest
import torch
from conftest import write_set
from PIL import Image

from common.annotations import read_annotations
from common.augmentations import CropViews
from common.data import batches, build_loaders, clean_loader
from common.images import ImageFolder
from common.pack import pack
from common.running.errors import ImageError, UserError
from common.sampler import EpochSampler
from common.store import PackedStore

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture
def small(tmp_path):
    write_set(tmp_path / "s", n_train=24, n_val=10)
    train, val = (read_annotations(tmp_path / "s" / f"{n}.csv") for n in ("train", "val"))
    return tmp_path / "s" / "images", train, val


def loaders(small, num_workers, rank=0, world_size=1):
    root, train, val = small
    sampler = EpochSampler(np.arange(24), 8, 3, rank, world_size)
    crops = CropViews(16, 0.4, 0.275, 0.5, 2, seed=3, noise_size=4)
    return build_loaders(root, train, sampler, crops, val, num_workers, torch.device("cpu"))


def test_what_a_sample_gets_depends_neither_on_workers_nor_on_ranks(small):
    def samples(*how):
        loader, _ = loaders(small, *how)
        loader.batch_sampler.start(1)
        found = {}
        for batch in batches(loader):
            for i, row in enumerate(batch.row.tolist()):
                found[row] = (batch.views[i], batch.factors[i], batch.noise[i], batch.label[i])
        return found

    alone = samples(0)
    split = samples(2, 0, 2) | samples(0, 1, 2)
    assert alone.keys() == split.keys() and len(alone) == 24
    for row, values in alone.items():
        assert all(torch.equal(a, b) for a, b in zip(values, split[row], strict=True))


def test_loading_leaves_the_global_generator_alone(small):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    train_loader, val_loader = loaders(small, 0)
    list(batches(train_loader)), list(batches(val_loader))
    assert torch.equal(before, torch.get_rng_state())


def test_crops_larger_than_a_stores_images_are_told_before_a_run(small, tmp_path, capsys):
    """Of 16 px and at least .4 of an image: sqrt(16^2 / .4) = 25.3 are wanted."""
    root, *tables = small
    names = np.concatenate([table.filename for table in tables])
    for side, told in ((24, "want 26"), (25, None)):
        pack(root, names, tmp_path / f"{side}", "raw", side)
        capsys.readouterr()
        loaders((PackedStore(tmp_path / f"{side}"), *tables), 0)
        said = capsys.readouterr().err
        assert ("enlarged" in said) == bool(told) and (told or "") in said


def test_clean_images_come_once_and_in_order(small):
    root, _, val = small
    loader = clean_loader(root, val, np.arange(10), 16, 4, 0, False)
    got = list(batches(loader))
    assert torch.cat([rows for _, rows in got]).tolist() == list(range(10))
    assert got[0][0].shape == (4, 3, 16, 16) and got[0][0].dtype == torch.uint8


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_is_one_sentence_from_any_worker(small, num_workers):
    root, train, _ = small
    path = root / train.name(5)
    path.write_bytes(path.read_bytes()[:-100])  # the header is whole
    loader, _ = loaders(small, num_workers)
    with pytest.raises(ImageError) as error:
        list(batches(loader))
    assert train.name(5) in str(error.value) and "Traceback" not in str(error.value)
    assert "train.csv" in str(error.value)


def test_missing_and_foreign_files_are_noticed_before_a_run(small):
    root, train, _ = small
    (root / train.name(5)).write_bytes(b"junk")
    with pytest.raises(UserError, match=f"{train.name(5)} .*train.csv:7.*header"):
        loaders(small, 0)
    (root / train.name(5)).unlink()
    with pytest.raises(UserError, match=train.name(5)):
        loaders(small, 0)
    with pytest.raises(UserError, match="image_root"):
        loaders((root / "none", *small[1:]), 0)


def test_files_of_validation_are_looked_at_by_every_rank(small):
    root, _, val = small
    (root / val.name(1)).unlink()
    for rank in (0, 1):  # or one alone would know why it ends
        with pytest.raises(UserError, match=val.name(1)):
            loaders(small, 0, rank, 2)


def test_sixteen_bits_of_which_twelve_are_used_are_told_once(small, capfd):
    root, train, val = small
    loaders(small, 0)
    assert "warning" not in capfd.readouterr().err
    bright, dim = np.full((9, 9), 65535, np.uint16), np.full((9, 9), 4095, np.uint16)
    for row in range(20):
        Image.fromarray(bright).save(root / train.name(row))
    loaders(small, 0)
    assert "warning" not in capfd.readouterr().err
    for row in range(10):
        Image.fromarray(dim).save(root / val.name(row))
    loaders(small, 0)
    said = capfd.readouterr().err
    assert said.count("warning") == 1 and "val_00" in said and "8 of the 16 looked into" in said
    assert "Multiply the values by 16" in said


def test_checksums_of_files_are_looked_at_in_the_first_epoch_of_a_start(small, monkeypatch):
    loader, _ = loaders(small, 0)
    checked = []
    monkeypatch.setattr(
        ImageFolder,
        "read",
        lambda self, *a, f=ImageFolder.read: checked.append(a[2]) or f(self, *a),
    )
    loader.batch_sampler.start(4, 1, end=7)
    list(batches(loader))
    assert checked == [True] * 16 + [False] * 48
