"""DINO (Caron et al. 2021, arXiv:2104.14294): match a slow teacher's soft assignment to prototypes.

    python dino.py --config configs/dino_r18.yaml [section.key=value ...]
    torchrun --nproc_per_node=4 dino.py --config configs/dino_r18.yaml

Here: dino_loss (Eq. 3), DINO (student, teacher, centre), the training loop.
In common/: data, augmentations, AdamW, schedules, the moving average, probe, scores, checkpoints.
Deviation: views: crop, colour jitter and flip only, two of one size (no multi-crop), as the study.
Deviation: DINO's head: GELU as the original; the study's code had ReLU.
Deviation: DINO's weight decay: constant, as the study; the original raises it along a cosine.
Deviation: teacher temperature: it rises with every step; the original's with every epoch.

Shapes: V = 2 views, B images a rank, W ranks, D features, E bottleneck, K prototypes, S pixels.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common.annotations import read_split
from common.augmentations import ColorJitterNormalize, CropViews
from common.backbones import build_backbone
from common.data import build_loaders
from common.distributed import all_reduce_mean, compiles, mixed_precision, to_device, wrap
from common.ema import ema_update
from common.optim import build_optimizer, set_lr
from common.probe import LinearProbe, pos_weight, settle_batchnorm
from common.running.checkpoint import TrainState
from common.running.config import Augmentation, Data, Optimization, Probe, RunOptions, load_config
from common.running.process import entry_point
from common.running.run import Run
from common.running.schema import Count, NonNegativeInt, Positive, Proportion
from common.sampler import EpochSampler, imbalanced_indices, keep_labels
from common.schedules import cosine, linear, warmup_cosine
from common.scoring import Scoring
from common.store import leave_out_unreadable, open_images

# ============================== config ==============================


@dataclass(frozen=True)
class SSLSettings:  # App. B.2
    proj_hidden_dim: Count
    proj_output_dim: Count  # of the bottleneck
    num_prototypes: Count
    clip_grad: bool
    freeze_prototyper: NonNegativeInt  # epochs in which the prototypes stay as they are
    use_bn_in_head: Literal[False]
    norm_prototyper: bool  # true: prototypes of norm 1; false: the norm is trained
    student_temperature: Positive
    warmup_teacher_temperature: Positive
    teacher_temperature: Positive
    warmup_temperature_epochs: NonNegativeInt
    center_momentum: Proportion
    base_tau: Proportion
    final_tau: Proportion


@dataclass(frozen=True)
class Config:
    method: Literal["dino"]  # another method's config is an error
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


def dino_loss(student_logits, teacher_logits, center, student_temperature, teacher_temperature):
    """Cross-entropy between teacher and student over the two views, Eq. 3 of arXiv:2104.14294.

    student_logits, teacher_logits: (2B, K), view 0 then view 1; center: (K,). The teacher's
    distribution of a view is the target of the student's of the other view. Mean over both
    directions and this rank's B images; ln K where nothing is told apart.
    """
    targets = F.softmax((teacher_logits - center) / teacher_temperature, dim=1).detach()
    swapped = targets.roll(len(targets) // 2, dims=0)  # (2B, K), view 1 then view 0
    log_p = F.log_softmax(student_logits / student_temperature, dim=1)
    return -(swapped * log_p).sum(dim=1).mean()


@torch.no_grad()
def teacher_statistics(logits, center, temperature, loss):
    """Is the teacher's output constant, and is it then uniform or one-hot? In nats.

    logits: (2B, K); loss: dino_loss of them. Entropy of a view's distribution (ln K: uniform, 0:
    one-hot), KL from the student's, and information: how much lower the entropy of a view is than
    that of the mean over views; 0 where all views get the same, so in either collapse.
    """
    log_q = F.log_softmax((logits - center) / temperature, dim=1)
    entropy = -(log_q.exp() * log_q).sum(dim=1).mean()
    information = torch.special.entr(all_reduce_mean(log_q.exp().mean(dim=0))).sum() - entropy
    collapsed = information < 0.01 * math.log(len(logits))  # the most it can be on one rank
    notes = {"log_num_prototypes": math.log(logits.shape[1]), "teacher_information": information}
    notes |= {"teacher_entropy": entropy, "teacher_student_kl": loss - entropy}
    return notes | {"collapsed": collapsed}


# ============================== model ===============================


class Head(nn.Module):
    """Three-layer projector to an L2-normalised bottleneck, then weight-normed prototypes."""

    def __init__(self, feature_dim, hidden_dim, bottleneck_dim, num_prototypes, norm_fixed):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.projector[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        # Norms and directions of the prototypes; the directions' scale does not matter.
        self.prototypes = weight_norm(nn.Linear(bottleneck_dim, num_prototypes, bias=False))
        norm = self.prototypes.parametrizations.weight.original0  # (K, 1)
        nn.init.ones_(norm)
        norm.requires_grad_(not norm_fixed)

    def forward(self, h):
        """h: (B, D) -> embeddings (B, E) of norm 1, logits (B, K)."""
        z = self.projector(h)
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)  # half is too few
        return z, self.prototypes(z)


class DINO(nn.Module):
    def __init__(self, backbone, head, num_prototypes):
        super().__init__()
        self.backbone, self.head = backbone, head  # the student
        self.teacher = copy.deepcopy(self.student()).requires_grad_(False)
        self.register_buffer("center", torch.zeros(num_prototypes))  # saved with the model

    def student(self):
        """What the teacher follows."""
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def encode(self, images):
        """images: (B, 3, S, S) -> the student's features (B, D), embeddings (B, E)."""
        h = self.backbone(images)
        return h, self.head(h)[0]

    def forward(self, views):
        """views: (V, B, 3, S, S) -> the student's features (V, B, D) and embeddings (V, B, E), and
        logits (V * B, K) of student and teacher. BatchNorm sees one view at a time.
        """
        h = [self.backbone(view) for view in views]
        z, student = zip(*(self.head(features) for features in h), strict=True)
        with torch.no_grad():
            teacher = [self.teacher.head(self.teacher.backbone(view))[1] for view in views]
        return torch.stack(h), torch.stack(z), torch.cat(student), torch.cat(teacher)


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
    dims = feature_dim, ssl.proj_hidden_dim, ssl.proj_output_dim, ssl.num_prototypes
    head = Head(*dims, ssl.norm_prototyper)
    model = DINO(backbone, head, ssl.num_prototypes)

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

    teacher_temperatures = ssl.warmup_teacher_temperature, ssl.teacher_temperature
    temperature_steps = ssl.warmup_temperature_epochs * sampler.steps_per_epoch

    def loss_of(views, _):  # of held-out views, in the end
        with autocast:
            *_, student, teacher = (x.float() for x in model(views))
        teacher_t = linear(run.total_steps, temperature_steps, *teacher_temperatures)
        return dino_loss(student, teacher, model.center, ssl.student_temperature, teacher_t)

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
                h, z, student, teacher = ddp(views)
            student, teacher = student.float(), teacher.float()
            teacher_t = linear(step, temperature_steps, *teacher_temperatures)
            loss = dino_loss(student, teacher, model.center, ssl.student_temperature, teacher_t)
            run.note(**teacher_statistics(teacher, model.center, teacher_t, loss.detach()))
            mean_logits = all_reduce_mean(teacher.mean(dim=0))  # Eq. 4, over all ranks
            model.center.lerp_(mean_logits, 1 - ssl.center_momentum)

            # --- shared: backward ---
            optimizer.zero_grad(set_to_none=True)
            if not frozen:
                scaler.scale(loss).backward()
            # --- end shared ---

            if ssl.clip_grad and not frozen:
                scaler.unscale_(optimizer)
                for p in model.backbone.parameters():
                    nn.utils.clip_grad_norm_(p, max_norm=1.0)  # each on its own
            if epoch < ssl.freeze_prototyper:
                model.head.prototypes.zero_grad(set_to_none=True)

            # --- shared: update ---
            if not frozen:
                scaler.step(optimizer)
                scaler.update()
            # --- end shared ---

            tau = cosine(step, run.total_steps, ssl.base_tau, ssl.final_tau)
            ema_update(model.teacher, model.student(), tau)

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
