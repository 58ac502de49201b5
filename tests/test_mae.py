import numpy as np
import pytest
import torch
from small import run

from common.backbones import build_backbone
from mae import MAE, mae_loss, patchify, random_masking


def some(seed=0, n=3, size=8, patch=4):
    generator = torch.manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator).double()
    patches = (size // patch) ** 2
    pred = torch.randn(n, patches, patch * patch * 3, generator=generator).double()
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]).double()
    return images, pred, mask


def slow_mae(images, pred, mask, patch, norm_pix_loss):
    """Section 3 written out: pixel by pixel of every removed patch, in float64."""
    n, _, size, _ = images.shape
    across, total, removed = size // patch, 0.0, 0
    for i in range(n):
        for j in range(across**2):
            if mask[i, j] == 0:
                continue
            top, left = patch * (j // across), patch * (j % across)
            target = [
                images[i, c, top + y, left + x]
                for y in range(patch)
                for x in range(patch)
                for c in range(3)
            ]
            target = torch.stack(target)
            if norm_pix_loss:
                m = target.sum() / len(target)
                variance = ((target - m) ** 2).sum() / (len(target) - 1)
                target = (target - m) / (variance + 1e-6) ** 0.5
            total = total + ((pred[i, j] - target) ** 2).sum() / len(target)
            removed += 1
    return total / removed


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_and_gradient_are_the_papers(norm_pix_loss):
    images, pred, mask = some()
    found = []
    for loss in (mae_loss, slow_mae):
        p = pred.clone().requires_grad_()
        value = loss(images, p, mask, 4, norm_pix_loss)
        value.backward()
        found.append((value.detach(), p.grad))
    for ours, slow in zip(*found, strict=True):
        torch.testing.assert_close(ours, slow)
    assert torch.equal(found[0][1].abs().sum(dim=2) > 0, mask > 0)  # on removed patches only


def test_patches_are_rows_columns_channels():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    block = images[1, :, 2:4, 4:6]  # the last patch
    assert torch.equal(patches[1, 5], block.permute(1, 2, 0).flatten())


def test_known_values_and_invariances():
    images, _, mask = some()
    zeros = torch.zeros(3, 4, 48).double()
    assert float(mae_loss(images, zeros, mask, 4, True)) == pytest.approx(47 / 48, rel=1e-4)
    assert float(mae_loss(images, patchify(images, 4), mask, 4, False)) == 0
    base = mae_loss(images, zeros + 0.3, mask, 4, True)  # brightness and contrast do not matter
    torch.testing.assert_close(
        mae_loss(5 * images + 2, zeros + 0.3, mask, 4, True), base, rtol=1e-5, atol=0
    )


def test_masking_hides_three_quarters_and_can_be_undone():
    noise = torch.rand(5, 196, generator=torch.manual_seed(0))
    ids_keep, mask, ids_restore = random_masking(noise, 0.75)
    assert ids_keep.shape == (5, 49) and torch.equal(mask.sum(dim=1), torch.full((5,), 147.0))
    for i in range(5):
        assert torch.equal(mask[i, ids_keep[i]], torch.zeros(49))
        assert noise[i][mask[i] == 0].max() < noise[i][mask[i] == 1].min()
        hidden = [j for j in noise[i].argsort().tolist() if mask[i, j]]
        order = torch.tensor([*ids_keep[i].tolist(), *hidden])
        assert torch.equal(order[ids_restore[i]], torch.arange(196))
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize(("ratio", "kept"), [(0.9, 1), (0.7, 3), (0.99, 1), (0.01, 9)])
def test_of_few_patches_some_are_kept_and_some_hidden(ratio, kept):
    ids_keep, mask, _ = random_masking(torch.rand(2, 10), ratio)
    assert ids_keep.shape == (2, kept) and mask.sum() == 2 * (10 - kept)


def small(features="class_token"):
    torch.manual_seed(0)
    backbone, _ = build_backbone("vit_tiny", 32, 8)
    return MAE(backbone, 0.75, 32, 2, 4, features).double().eval()


def test_with_nothing_hidden_the_encoder_is_the_backbone():
    model, images = small(), torch.randn(2, 3, 32, 32).double()
    everything = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(
        model.encode_kept(images, everything), model.backbone.forward_features(images)
    )


def test_hidden_patches_cannot_be_seen_and_order_comes_from_positions():
    model, images = small(), torch.randn(2, 3, 32, 32).double()
    ids_keep = torch.tensor([[0, 5, 9], [3, 2, 1]])
    tokens = model.encode_kept(images, ids_keep)
    changed = images.clone()
    changed[:, :, 24:, 24:] += 1  # patch 15
    assert torch.equal(model.encode_kept(changed, ids_keep), tokens)
    turned = model.encode_kept(images, ids_keep.flip(1))
    torch.testing.assert_close(turned[:, 1:].flip(1), tokens[:, 1:])


def test_predictions_stand_where_their_patches_are():
    """A decoder without layers writes each token at its own place, the mask token elsewhere."""
    torch.manual_seed(0)
    backbone, _ = build_backbone("vit_tiny", 32, 8)
    model = MAE(backbone, 0.75, 32, 0, 4, "class_token").double().eval()
    model.decoder_pos_embed.zero_()
    noise = torch.rand(2, 16, generator=torch.manual_seed(1))
    images = torch.randn(2, 3, 32, 32).double()
    pred, mask = model(images, noise)
    ids_keep, _, _ = random_masking(noise, 0.75)
    tokens = model.decoder_norm(model.decoder_embed(model.encode_kept(images, ids_keep)))
    kept = model.decoder_pred(tokens[:, 1:])
    hidden = model.decoder_pred(model.decoder_norm(model.mask_token))[0, 0]
    for i in range(2):
        torch.testing.assert_close(pred[i, ids_keep[i]], kept[i])
        torch.testing.assert_close(pred[i, mask[i] == 1], hidden.expand(12, -1))


def test_positions_are_the_originals_up_to_the_order_of_dimensions():
    def sincos(positions, dim):  # get_1d_sincos_pos_embed_from_grid of the original
        omega = 1.0 / 10000 ** (np.arange(dim // 2) / (dim / 2.0))
        out = np.einsum("m,d->md", positions, omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    across, down = np.meshgrid(np.arange(4.0), np.arange(4.0))
    original = np.concatenate([sincos(across.ravel(), 96), sincos(down.ravel(), 96)], axis=1)
    for embed, dim in ((small().backbone.pos_embed, 192), (small().decoder_pos_embed, 32)):
        assert embed.shape == (1, 17, dim) and not embed.requires_grad
        assert torch.equal(embed[0, 0], torch.zeros(dim).double())  # the class token's
    ours = small().backbone.pos_embed[0, 1:].numpy()

    def columns(x):
        return sorted(tuple(c) for c in x.T.round(5) + 0.0)

    assert np.allclose(columns(ours), columns(original), atol=1e-4)


def test_initial_weights_are_the_originals():
    model = small()
    weight = model.backbone.patch_embed.proj.weight  # (192, 3, 8, 8), as a linear layer's
    assert float(weight.abs().max()) == pytest.approx((6 / (192 + 192)) ** 0.5, rel=0.01)
    qkv = model.backbone.blocks[0].attn.qkv
    assert float(qkv.weight.abs().max()) == pytest.approx((6 / (192 + 576)) ** 0.5, rel=0.01)
    assert torch.equal(qkv.bias, torch.zeros(576).double())
    assert 0.01 < float(model.backbone.cls_token.std()) < 0.03


def test_features_are_of_the_whole_image():
    images = torch.randn(2, 3, 32, 32).double()
    h, z = small().encode(images)
    assert h.shape == (2, 192) and torch.equal(h, z)
    torch.testing.assert_close(h, small().backbone(images))
    mean, _ = small("mean_of_patches").encode(images)
    tokens = small().backbone.forward_features(images)
    torch.testing.assert_close(mean, tokens[:, 1:].mean(dim=1))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["ssl_settings.decoder_embed_dim=30", "ssl_settings.decoder_num_heads=3"], "embed_dim"),
        (["ssl_settings.decoder_num_heads=5"], "decoder_num_heads"),
        (["patch_size=32"], "patch_size"),
    ],
)
def test_sizes_that_do_not_fit_are_told(tmp_path, tiny_set, capsys, overrides, word):
    with pytest.raises(SystemExit) as stop:
        run("mae", tmp_path, tiny_set, "wrong", *overrides)
    assert stop.value.code == 2 and word in capsys.readouterr().err
