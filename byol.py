"""BYOL (Grill et al. 2020, arXiv:2006.07733): predict a slow teacher's view of the same image.

    python byol.py --config configs/byol_r18.yaml [section.key=value ...]
    torchrun --nproc_per_node=4 byol.py --config configs/byol_r18.yaml

Here: byol_loss (Eq. 2, both directions), BYOL (online and target networks), the training loop.
In common/: data, augmentations, LARS, schedules, the moving average, probe, scores, checkpoints.
Deviation: views: crop, colour jitter and flip only, as the study.
Deviation: BYOL's width: hidden layers of 2048 instead of 4096, as the study.
Deviation: BYOL's biases: none in front of a BatchNorm, which would take them out again.

Shapes: V = 2 views, B images a rank, D features, K embedding dimensions, S pixels.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common.annotations import read_split
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import build_loaders
from common.distributed import compiles, mixed_precision, to_device, wrap
from common.ema import ema_update
from common.optim import build_optimizer, set_lr
from common.probe import LinearProbe, pos_weight, settle_batchnorm
from common.running.checkpoint import TrainState
from common.running.config import Augmentation, Data, Optimization, Probe, RunOptions, load_config
from common.running.process import entry_point
from common.running.run import Run
from common.running.schema import Count, NonNegativeInt, Proportion
from common.sampler import EpochSampler, imbalanced_indices, keep_labels
from common.schedules import cosine, warmup_cosine
from common.scoring import Scoring
from common.store import leave_out_unreadable, open_images

# ============================== config ==============================


@dataclass(frozen=True)
class SSLSettings:  # App. B.1
    proj_hidden_dim: Count
    pred_hidden_dim: Count
    proj_output_dim: Count
    normalize_projector: Literal[False]  # in the study it touches logging only
    base_tau: Proportion
    final_tau: Proportion


@dataclass(frozen=True)
class Config:
    method: Literal["byol"]  # another method's config is an error
    backbone: Literal["resnet18", "vit_tiny"]
    seed: NonNegativeInt
    data: Data
    augmentation: Augmentation
    optimization: Optimization
    ssl_settings: SSLSettings
    probe: Probe
    run: RunOptions
    patch_size: Count | None = None  # pixels, vit_tiny only; null: the backbone's own, 16
    num_heads: Count | None = None  # vit_tiny only; null: the backbone's own, 3


# =============================== loss ===============================


def byol_loss(p0, p1, t0, t1):
    """Eq. 2 of arXiv:2006.07733 in both directions: 0 (aligned) to 8 (opposed).

    p0, p1: (B, K) predictions from the two views; t0, t1: (B, K) targets, constants. Any scale.
    Returns the mean over this rank's B images of (2 - 2 cos(p0, t1)) + (2 - 2 cos(p1, t0)).
    """
    t0, t1 = t0.detach(), t1.detach()
    similarity = F.cosine_similarity(p0, t1, dim=1) + F.cosine_similarity(p1, t0, dim=1)  # (B,)
    return (4 - 2 * similarity).mean()


# ============================== model ===============================


def mlp(input_dim, hidden_dim, output_dim):
    """Projector and predictor. No bias in front of a BatchNorm, nor, as the original, at the end:
    the predictor's BatchNorm takes the projector's out again."""
    return nn.Sequential(
        nn.Linear(input_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, output_dim, bias=False),
    )


class BYOL(nn.Module):
    def __init__(self, backbone, feature_dim, proj_hidden_dim, pred_hidden_dim, proj_output_dim):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp(feature_dim, proj_hidden_dim, proj_output_dim)
        self.predictor = mlp(proj_output_dim, pred_hidden_dim, proj_output_dim)
        # A copy, never an alias; its BatchNorm keeps statistics of its own.
        self.target = copy.deepcopy(self.online()).requires_grad_(False)

    def online(self):
        """What the target follows: everything but the predictor."""
        return nn.Sequential(self.backbone, self.projector)

    def encode(self, images):
        """images: (B, 3, S, S) -> features (B, D), embeddings (B, K)."""
        h = self.backbone(images)
        return h, self.projector(h)

    def forward(self, views):
        """views: (V, B, 3, S, S) -> features (V, B, D), embeddings, predictions, targets (V, B, K).

        BatchNorm sees one view at a time.
        """
        h, z = zip(*(self.encode(view) for view in views), strict=True)
        p = [self.predictor(embeddings) for embeddings in z]
        with torch.no_grad():
            t = [self.target(view) for view in views]
        return torch.stack(h), torch.stack(z), torch.stack(p), torch.stack(t)


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

    crops = CropViews(data.image_size, aug.min_scale, aug.t_val, aug.flip_prob, 2, cfg.seed)

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
    dims = ssl.proj_hidden_dim, ssl.pred_hidden_dim, ssl.proj_output_dim
    model = BYOL(backbone, feature_dim, *dims)

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

    def loss_of(views, _):  # of held-out views, in the end
        with autocast:
            _, _, p, t = model(views)
        return byol_loss(*p.float(), *t.float())

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
                h, z, p, t = ddp(views)
            loss = byol_loss(*p.float(), *t.float())

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

            tau = cosine(step, run.total_steps, ssl.base_tau, ssl.final_tau)
            ema_update(model.target, model.online(), tau)

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
