"""LeJEPA (Balestriero and LeCun 2025, arXiv:2511.08544): views agree, embeddings are Gaussian.

    python lejepa.py --config configs/lejepa_r18.yaml [section.key=value ...]
    torchrun --nproc_per_node=4 lejepa.py --config configs/lejepa_r18.yaml

Here: sigreg, lejepa_loss, LeJEPA (encoder and projector), the training loop.
In common/: data, augmentations, AdamW, schedules, probe, scores, label-free measures, checkpoints.
Beyond the study. No teacher, no predictor, no stopped gradient, no negatives: one weight, lambda.
Deviation: LeJEPA's views: two, as the study; the original has two global and six local ones.
Deviation: LeJEPA's knots: 17 from 0 to 3, as its authors' code; the paper's text has -5 to 5.
Deviation: LeJEPA's probe: on the backbone's last features, as all methods here.

Shapes: V = 2 views, B images a rank, W ranks, D features, K embedding dimensions, M slices,
S pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from common.annotations import read_split
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import build_loaders
from common.distributed import (
    all_reduce_mean,
    compiles,
    mixed_precision,
    to_device,
    world_size,
    wrap,
)
from common.optim import build_optimizer, set_lr
from common.probe import LinearProbe, pos_weight, settle_batchnorm
from common.running.checkpoint import TrainState
from common.running.config import Augmentation, Data, Optimization, Probe, RunOptions, load_config
from common.running.keyed import SLICES, keyed_rng
from common.running.process import entry_point
from common.running.run import Run
from common.running.schema import Count, InnerProportion, NonNegativeInt
from common.sampler import EpochSampler, imbalanced_indices, keep_labels
from common.schedules import cosine, warmup_cosine
from common.scoring import Scoring
from common.store import leave_out_unreadable, open_images

# ============================== config ==============================


@dataclass(frozen=True)
class SSLSettings:
    proj_hidden_dim: Count
    proj_output_dim: Count
    lambda_: InnerProportion  # of SIGReg in the loss
    num_slices: Count


@dataclass(frozen=True)
class Config:
    method: Literal["lejepa"]  # another method's config is an error
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


def draw_slices(dim, num_slices, seed, step, device):
    """Directions (K, M) of length 1, drawn from the step's key, so the same on all ranks."""
    key = int(keyed_rng(SLICES, seed, step).integers(2**63))
    generator = torch.Generator(device).manual_seed(key)
    return F.normalize(torch.randn(dim, num_slices, generator=generator, device=device), dim=0)


def sigreg(z, slices):
    """Sketched isotropic Gaussian regularisation of arXiv:2511.08544: how far from N(0, I).

    z: (B, K) embeddings of a view; slices: (K, M). Along each slice the test of Epps and Pulley,
    which compares the characteristic function of the global batch with a Gaussian's; their mean,
    the same on all ranks. 1.05 on average for a Gaussian, .402 B W where all is 0.
    """
    t = torch.linspace(0, 3, 17, device=z.device)  # the other half is the same, so twice
    gauss = torch.exp(-t.square() / 2)
    angles = (z @ slices)[:, :, None] * t  # (B, M, 17)
    cos, sin = all_reduce_mean(torch.stack([angles.cos().mean(dim=0), angles.sin().mean(dim=0)]))
    error = (cos - gauss).square() + sin.square()  # (M, 17)
    return len(z) * world_size() * 2 * torch.trapezoid(error * gauss, t).mean()


def lejepa_loss(z, slices, lambda_):
    """(1 - lambda) prediction + lambda SIGReg of arXiv:2511.08544; returns both terms, too.

    z: (V, B, K) embeddings, not normalised; slices: (K, M). prediction: mean over views, this
    rank's images and dimensions (the paper's Eq. 5 sums over these) of (centre - z)^2, the centre
    being the mean of an image's views.
    """
    prediction = (z.mean(dim=0) - z).square().mean()
    gaussian = torch.stack([sigreg(view, slices) for view in z]).mean()
    return (1 - lambda_) * prediction + lambda_ * gaussian, prediction, gaussian


# ============================== model ===============================


class LeJEPA(nn.Module):
    def __init__(self, backbone, feature_dim, proj_hidden_dim, proj_output_dim):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(  # no bias in front of a BatchNorm
            nn.Linear(feature_dim, proj_hidden_dim, bias=False),
            nn.BatchNorm1d(proj_hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(proj_hidden_dim, proj_hidden_dim, bias=False),
            nn.BatchNorm1d(proj_hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(proj_hidden_dim, proj_output_dim),
        )

    def encode(self, images):
        """images: (B, 3, S, S) -> features (B, D), embeddings (B, K)."""
        h = self.backbone(images)
        return h, self.projector(h)

    def forward(self, views):
        """views: (V, B, 3, S, S) -> features (V, B, D), embeddings (V, B, K).

        BatchNorm sees one view at a time.
        """
        h, z = zip(*(self.encode(view) for view in views), strict=True)
        return torch.stack(h), torch.stack(z)


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
    model = LeJEPA(backbone, feature_dim, ssl.proj_hidden_dim, ssl.proj_output_dim)
    directions = ssl.proj_output_dim, ssl.num_slices, cfg.seed

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
            _, z = model(views)
        slices = draw_slices(*directions, run.total_steps, run.device)
        return lejepa_loss(z.float(), slices, ssl.lambda_)[0]

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
                h, z = ddp(views)
            slices = draw_slices(*directions, step, run.device)
            loss, prediction, gaussian = lejepa_loss(z.float(), slices, ssl.lambda_)
            run.note(prediction=prediction.detach(), sigreg=gaussian.detach())

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
