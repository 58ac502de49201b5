"""The fixed views of held-out images, which LiDAR, alignment and the held-out loss are of."""

import numpy as np
import pytest
import torch
from conftest import on_ranks, write_set
from torch import nn

from common.annotations import read_annotations
from common.augmentations import ColorJitterNormalize, CropViews
from common.data import clean_loader
from common.distributed import mixed_precision
from common.images import ImageFolder
from common.label_free import VIEWS
from common.scoring import Scoring

CPU = torch.device("cpu")


class Colours(nn.Module):
    """Features: the mean colour; embeddings: a corner. In training mode it would give NaN."""

    def encode(self, images):
        h = images.mean(dim=(2, 3)) * (torch.nan if self.training else 1)
        return h, images[:, :, 0, :2].flatten(1)


def fixed_views(folder, batch_size, seed=3, rank=0, world_size=1, num_views=2, most=None):
    """(features, embeddings, held-out loss) of a run with that batch size, seed and ranks."""
    val = read_annotations(folder / "val.csv")
    val = val.take(np.arange(len(val)) < (most or len(val)))
    crops = CropViews(16, 0.4, 0.275, 0.5, num_views, seed)
    clean = ColorJitterNormalize(seed).clean
    loader = clean_loader(ImageFolder(folder / "images"), val, [0], 16, batch_size, 0, False)
    autocast, _ = mixed_precision("fp32", CPU)
    how = val, np.arange(len(val)), val, loader, seed, 1.0, clean, crops, rank, world_size
    model = Colours().train()
    views, loss = Scoring(*how, CPU, autocast)._fixed_views(model, lambda v, _: v[0].mean())
    assert model.training
    return [*views, loss]


def of_rank(folder, *how):
    rank = torch.distributed.get_rank()
    views = fixed_views(folder, *how[:2], rank, torch.distributed.get_world_size(), *how[2:])
    return [v if torch.is_tensor(v) else torch.tensor(v or 0.0) for v in views]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring") / "set"
    write_set(folder, n_val=24)
    return folder


def test_fixed_views_are_the_same_for_any_batch_seed_and_number_of_ranks(folder, tmp_path):
    h, z, loss = fixed_views(folder, 24)
    assert h.shape == (VIEWS, 24, 3) and z.shape == (VIEWS, 24, 6) and h.isfinite().all()
    assert len(h[:, 0].unique(dim=0)) == VIEWS  # each another
    between = h.mean(dim=0).std(dim=0).mean()
    assert between > 2 * (h - h.mean(dim=0)).mean(dim=1).abs().mean()  # in order of the images
    assert loss == pytest.approx(h.double()[::2].mean().item(), rel=1e-4)  # v[0]: half of them
    for how in ((5, 4), (7, 3), (24, 9)):
        other = fixed_views(folder, *how)
        assert torch.equal(h, other[0]) and torch.equal(z, other[1])
    for rank in (0, 1):
        other = on_ranks(2, tmp_path / "ranks", of_rank, folder, 5, 3)[rank]
        assert torch.equal(h, other[0]) and torch.equal(z, other[1])


def test_one_view_an_image_gives_as_many(folder):
    h, *_ = fixed_views(folder, 8, num_views=1)
    assert h.shape == (VIEWS, 24, 3)


@pytest.mark.parametrize(("num_views", "views"), [(3, 12), (12, 12), (4, 12)])
def test_a_fork_with_more_views_has_at_least_as_many(folder, num_views, views):
    h, z, loss = fixed_views(folder, 8, num_views=num_views)
    assert h.shape[:2] == z.shape[:2] == (views, 24) and h.isfinite().all() and loss is not None


def test_fewer_images_than_ranks_give_none(folder, tmp_path):
    for h, z, loss in on_ranks(2, tmp_path / "ranks", of_rank, folder, 4, 3, 2, 1):
        assert h.shape[1] == z.shape[1] == 0 and loss == 0
