"""Supervised baseline: the backbone and a linear head on the labels, with weighted cross-entropy.

    python supervised.py --config configs/supervised_r18.yaml [section.key=value ...]
    torchrun --nproc_per_node=4 supervised.py --config configs/supervised_r18.yaml

Here: supervised_loss, Supervised (encoder and head), the training loop.
In common/: data, augmentations, AdamW, schedules, probe, scores, label-free measures, checkpoints.

Shapes: V = 1 view, B images a rank, D features, S pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import nn

from common.annotations import UNLABELLED, count_labels, read_split
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import build_loaders
from common.distributed import all_reduce_mean, compiles, mixed_precision, to_device, wrap
from common.optim import build_optimizer, set_lr
from common.probe import LinearProbe, pos_weight, settle_batchnorm
from common.running.checkpoint import TrainState
from common.running.config import Augmentation, Data, Optimization, Probe, RunOptions, load_config
from common.running.errors import UserError
from common.running.process import entry_point
from common.running.run import Run
from common.running.schema import Count, NonNegativeInt
from common.sampler import EpochSampler, imbalanced_indices, keep_labels
from common.schedules import cosine, warmup_cosine
from common.scoring import Scoring
from common.store import leave_out_unreadable, open_images

# ============================== config ==============================


@dataclass(frozen=True)
class Config:
    method: Literal["supervised"]  # another method's config is an error
    backbone: Literal["resnet18", "vit_tiny"]
    seed: NonNegativeInt
    data: Data
    augmentation: Augmentation
    optimization: Optimization
    probe: Probe
    run: RunOptions
    patch_size: Count | None = None  # pixels, vit_tiny only; null: the backbone's own, 16
    num_heads: Count | None = None  # vit_tiny only; null: the backbone's own, 3


# =============================== loss ===============================


def supervised_loss(logits, labels, pos_weight):
    """Binary cross-entropy, defects weighted by pos_weight. Images without a label do not count.

    logits: (B,) float; labels: (B,) 1 defect, 0 normal, -1 not labelled. Averaged over ranks, it is
    the mean over all ranks' labelled images, of which a rank may have more than another.
    """
    labelled = (labels >= 0).to(logits.dtype)
    target = labels.clamp_min(0).to(logits.dtype)
    weight = labelled * (1 + (pos_weight - 1) * target)
    total = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
    return total / all_reduce_mean(labelled.sum()).clamp_min(1e-6)  # 0 without labels


# ============================== model ===============================


class Supervised(nn.Module):
    def __init__(self, backbone, feature_dim):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(feature_dim, 1)

    def encode(self, images):
        """images: (B, 3, S, S) -> features (B, D), twice: there is no projector."""
        h = self.backbone(images)
        return h, h

    def forward(self, views):
        """views: (1, B, 3, S, S) -> features (1, B, D), logits (1, B)."""
        h, _ = self.encode(views[0])
        return h[None], self.head(h)[None, :, 0]


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

    if not frozen:  # images without a label have nothing to teach
        rows = rows[train.defect[rows] != UNLABELLED]
        counts = count_labels(train.defect[rows])
        if not (counts["normal"] and counts["defect"]):
            raise UserError(
                f"{data.train_csv}: {counts['normal']} normal and {counts['defect']} defect images "
                "to train on; a classifier needs both"
            )
    crops = CropViews(data.image_size, aug.min_scale, aug.t_val, aug.flip_prob, 1, cfg.seed)

    # --- shared: data and backbone ---
    run.describe_data(train, rows, val, images.packed)
    sampler = EpochSampler(rows, opt.batch_size, cfg.seed, run.rank, run.world_size)
    how = data.num_workers, run.device
    train_loader, val_loader = build_loaders(images, train, sampler, crops, val, *how)
    augment = ColorJitterNormalize(cfg.seed, compiles(cfg.run.compile, run.device)).to(run.device)
    vit = cfg.patch_size, cfg.num_heads
    backbone, feature_dim = build_backbone(cfg.backbone, data.image_size, *vit)
    # --- end shared ---

    model = Supervised(backbone, feature_dim)

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

    # This method's probe is its head: the same weights after every step, on every rank.
    if not frozen:
        probe.follow(model.head)

    loss_of = None  # held out: it would need labels

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

            with autocast:
                h, logits = ddp(views)
            z = h
            loss = supervised_loss(logits[0].float(), batch.label, weight)

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

            if not frozen:
                probe.follow(model.head)

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
