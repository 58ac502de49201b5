"""MAE (He et al. 2021, arXiv:2111.06377): rebuild the hidden patches of an image from the rest.

    python mae.py --config configs/mae_vit_tiny.yaml [section.key=value ...]
    torchrun --nproc_per_node=4 mae.py --config configs/mae_vit_tiny.yaml

Here: random_masking, patchify and mae_loss, MAE (encoder and decoder), the training loop.
In common/: data, augmentations, AdamW, schedules, probe, scores, label-free measures, checkpoints.
Deviation: views: crop, colour jitter and flip; the original has no jitter, and crops down to .2.
Deviation: MAE's views: two, each with its own mask, as the paper's text; the original has one.
Deviation: MAE's gradient: reaches encoder and decoder; the study's, by a mistake, reached neither.
Deviation: MAE's heads: the encoder has 3, as the other methods' ViT-Tiny; the study's MAE had 12.

Shapes: V = 2 views, B images a rank, N = V * B, S pixels, P patch size, L patches, D features.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import nn

from common.annotations import read_split
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import build_loaders
from common.distributed import compiles, mixed_precision, to_device, wrap
from common.optim import build_optimizer, set_lr
from common.probe import LinearProbe, pos_weight, settle_batchnorm
from common.running.checkpoint import TrainState
from common.running.config import Augmentation, Data, Optimization, Probe, RunOptions, load_config
from common.running.process import entry_point
from common.running.run import Run
from common.running.schema import Count, InnerProportion, NonNegativeInt
from common.sampler import EpochSampler, imbalanced_indices, keep_labels
from common.schedules import cosine, warmup_cosine
from common.scoring import Scoring
from common.store import leave_out_unreadable, open_images

# ============================== config ==============================


@dataclass(frozen=True)
class SSLSettings:  # App. B.3
    mask_ratio: InnerProportion
    norm_pix_loss: bool
    decoder_embed_dim: Count
    decoder_depth: Count
    decoder_num_heads: Count
    features: Literal["class_token", "mean_of_patches"]  # what is probed and scored


@dataclass(frozen=True)
class Config:
    method: Literal["mae"]  # another method's config is an error
    backbone: Literal["vit_tiny"]
    patch_size: Count  # pixels
    seed: NonNegativeInt
    data: Data
    augmentation: Augmentation
    optimization: Optimization
    ssl_settings: SSLSettings
    probe: Probe
    run: RunOptions
    num_heads: Count | None = None  # vit_tiny only; null: the backbone's own, 3

    def problems(self):
        """Sentences about values that do not go together."""
        ssl = self.ssl_settings
        if ssl.decoder_embed_dim % ssl.decoder_num_heads or ssl.decoder_embed_dim % 4:
            yield "ssl_settings.decoder_embed_dim: expected a multiple of 4 and decoder_num_heads"
        if self.data.image_size == self.patch_size:
            yield "patch_size: of one patch an image, none could be hidden"


# =============================== loss ===============================


def random_masking(noise, mask_ratio):
    """Which patches to hide: those with the highest noise. noise: (N, L).

    Returns ids_keep (N, L_keep); mask (N, L), 0 keep and 1 remove; ids_restore (N, L), the place
    of each patch in (kept patches, then removed ones).
    """
    length = noise.shape[1]
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = min(max(round(length * (1 - mask_ratio)), 1), length - 1)
    return ids_shuffle[:, :kept], (ids_restore >= kept).float(), ids_restore


def patchify(images, patch_size):
    """images: (N, 3, S, S) -> (N, L, P * P * 3), pixels of a patch by row, column, channel."""
    n, channels, height, width = images.shape
    p, rows, columns = patch_size, height // patch_size, width // patch_size
    patches = images.reshape(n, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(n, rows * columns, p * p * channels)


def mae_loss(images, pred, mask, patch_size, norm_pix_loss):
    """Mean squared error on the removed patches, Section 3 of arXiv:2111.06377.

    images: (N, 3, S, S) normalised; pred: (N, L, P * P * 3); mask: (N, L), 1 where removed.
    norm_pix_loss: the target is each patch less its mean, over its (unbiased) standard deviation;
    predicting zero then gives about 1.
    """
    target = patchify(images, patch_size)
    if norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    error = (pred - target).square().mean(dim=2)  # (N, L)
    return (error * mask).sum() / mask.sum()


# ============================== model ===============================


def gather_tokens(x, ids):
    """x: (N, L, D), ids: (N, M) -> (N, M, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def positions(grid_size, dim):
    """Fixed sin-cos positions of a class token (zeros) and a grid -> parameter (1, 1 + L, dim)."""
    grid = build_sincos2d_pos_embed(grid_size, dim)
    return nn.Parameter(F.pad(grid, (0, 0, 1, 0))[None], requires_grad=False)


def initialise(module):
    """The original's: Xavier for linear layers."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class MAE(nn.Module):
    def __init__(self, backbone, mask_ratio, decoder_dim, decoder_depth, decoder_heads, features):
        super().__init__()
        self.backbone, self.mask_ratio, self.features = backbone, mask_ratio, features
        embed, dim = backbone.patch_embed, backbone.num_features
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        blocks = [Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, embed.patch_size[0] ** 2 * 3)
        self.apply(initialise)
        nn.init.xavier_uniform_(embed.proj.weight.view(dim, -1))  # as a linear layer of a patch
        nn.init.normal_(backbone.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        backbone.pos_embed = positions(embed.grid_size, dim)
        self.decoder_pos_embed = positions(embed.grid_size, decoder_dim)

    def encode(self, images):
        """images: (B, 3, S, S), nothing hidden -> features (B, D), twice: there is no projector."""
        tokens = self.backbone.forward_features(images)  # (B, 1 + L, D)
        h = tokens[:, 0] if self.features == "class_token" else tokens[:, 1:].mean(dim=1)
        return h, h

    def encode_kept(self, images, ids_keep):
        """images: (N, 3, S, S), ids_keep: (N, L_keep) -> tokens (N, 1 + L_keep, D)."""
        vit = self.backbone
        x = gather_tokens(vit.patch_embed(images) + vit.pos_embed[:, 1:], ids_keep)
        class_token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(torch.cat([class_token, x], dim=1)))

    def decode(self, tokens, ids_restore):
        """tokens: (N, 1 + L_keep, D), ids_restore: (N, L) -> predicted pixels (N, L, P * P * 3)."""
        x = self.decoder_embed(tokens)
        hidden = ids_restore.shape[1] + 1 - x.shape[1]
        x_all = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1).to(x.dtype)], dim=1)
        x = torch.cat([x[:, :1], gather_tokens(x_all, ids_restore)], dim=1)
        x = self.decoder_norm(self.decoder_blocks(x + self.decoder_pos_embed))
        return self.decoder_pred(x[:, 1:])

    def forward(self, images, noise):
        """images: (N, 3, S, S), noise: (N, L) -> pixels (N, L, P * P * 3), mask (N, L)."""
        ids_keep, mask, ids_restore = random_masking(noise, self.mask_ratio)
        return self.decode(self.encode_kept(images, ids_keep), ids_restore), mask


# =============================== train ==============================


@entry_point
def main(argv=None):
    # --- shared: setup ---
    cfg = load_config(Config, argv)
    data, aug, opt, frozen = cfg.data, cfg.augmentation, cfg.optimization, cfg.run.frozen_encoder
    run = Run.start(cfg)  # ranks, device, seed, run folder and its lock
    train, val = read_split(data.train_csv, data.val_csv)
    images = open_images(data.image_root, data.packed)
    train, val = leave_out_unreadable(images, data.max_bad_images, train, val)
    share = data.train_defect_proportion, cfg.seed, data.fraction, data.subset_size
    rows = imbalanced_indices(train.defect, *share)
    train = keep_labels(train, rows, data.labels, cfg.seed)
    # --- end shared ---

    num_patches = (data.image_size // cfg.patch_size) ** 2
    crops = CropViews(
        data.image_size, aug.min_scale, aug.t_val, aug.flip_prob, 2, cfg.seed, num_patches
    )

    # --- shared: data and backbone ---
    run.describe_data(train, rows, val, images.packed)
    sampler = EpochSampler(rows, opt.batch_size, cfg.seed, run.rank, run.world_size)
    how = data.num_workers, run.device
    train_loader, val_loader = build_loaders(images, train, sampler, crops, val, *how)
    augment = ColorJitterNormalize(cfg.seed, compiles(cfg.run.compile, run.device)).to(run.device)
    vit = cfg.patch_size, cfg.num_heads
    backbone, feature_dim = build_backbone(cfg.backbone, data.image_size, *vit)
    # --- end shared ---

    ssl = cfg.ssl_settings
    decoder = ssl.decoder_embed_dim, ssl.decoder_depth, ssl.decoder_num_heads
    model = MAE(backbone, ssl.mask_ratio, *decoder, ssl.features)

    # --- shared: optimisation ---
    model = to_device(model, run.device, opt.batch_size)  # channels_last, SyncBatchNorm
    decay = opt.weight_decay, opt.exclude_bias_and_norm, opt.trust_coefficient
    optimizer = build_optimizer(model, opt.optimizer, opt.lr, opt.momentum, *decay)
    if frozen:
        model.requires_grad_(False)
    weight = pos_weight(cfg.probe.pos_weight, train.defect[rows])
    probe = LinearProbe(feature_dim, cfg.probe.momentum, cfg.probe.weight_decay, weight)
    probe = probe.to(run.device)
    autocast, scaler = mixed_precision(opt.precision, run.device)
    how = cfg.seed, cfg.probe.pos_weight, augment.clean, crops, *run.place, autocast
    scoring = Scoring(train, rows, val, val_loader, *how)
    state = TrainState(model, optimizer, probe, scaler)
    run.resume(state, sampler.steps_per_epoch)
    ddp = wrap(model, run.device, cfg.run.compile, cfg.run.deterministic)
    warmup_steps = opt.warmup_epochs * sampler.steps_per_epoch
    if frozen and not run.pretrained and run.step == 0:
        settle_batchnorm(model, train_loader, augment, run.device, autocast)
    # --- end shared ---

    def loss_of(views, batch):  # of held-out views, in the end
        images = views.flatten(0, 1)
        with autocast:
            pred, mask = model(images, batch.noise.transpose(0, 1).flatten(0, 1))
        return mae_loss(images, pred.float(), mask, cfg.patch_size, ssl.norm_pix_loss)

    for epoch in run.epochs():
        model.train(not run.pretrained)
        for step, batch in run.steps(train_loader):  # goes on in mid-epoch after a resume
            # --- shared: batch ---
            batch = batch.to(run.device)
            views = augment(batch.views, batch.factors, step)  # (V, B, 3, S, S)
            lr = warmup_cosine(
                step, run.total_steps, warmup_steps, opt.lr, opt.warmup_start_lr, opt.min_lr
            )
            set_lr(optimizer, lr)
            # --- end shared ---

            images = views.flatten(0, 1)  # (V * B, 3, S, S)
            with autocast:
                pred, mask = ddp(images, batch.noise.transpose(0, 1).flatten(0, 1))
                with torch.no_grad():  # the probe and all scores are of whole images
                    h, z = (x.unflatten(0, views.shape[:2]) for x in model.encode(images))
            loss = mae_loss(images, pred.float(), mask, cfg.patch_size, ssl.norm_pix_loss)

            # --- shared: backward ---
            optimizer.zero_grad(set_to_none=True)
            if not frozen:
                scaler.scale(loss).backward()
            # --- end shared ---

            # --- shared: update ---
            if not frozen:
                scaler.step(optimizer)
                scaler.update()
            # --- end shared ---

            # --- shared: probe ---
            probe_lr = cosine(step, run.total_steps, cfg.probe.lr, 0.0)
            logits = probe.step(h.detach().float(), batch.label, probe_lr)
            # --- end shared ---

            # --- shared: log, save ---
            state.scores.add(batch.row, logits)
            rates = {"lr": lr, "probe_lr": probe_lr}
            run.end_step(state, loss, probe.loss, rates, views, z.detach())
            # --- end shared ---

        # --- shared: epoch end ---
        validation = scoring.validate(model, probe) if run.validates(epoch) else None
        run.end_epoch(state, scoring.train_scores(state.scores, probe), validation)
        # --- end shared ---

    # --- shared: finish ---
    run.finish(scoring.final(model, probe, state.train_scores, run.folder, loss_of))
    # --- end shared ---


if __name__ == "__main__":
    main()
