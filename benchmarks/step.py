"""How long is a training step, against lightly's losses and heads in a plain loop?

SimCLR, BYOL, Barlow Twins and DINO with both backbones and MAE with ViT-Tiny, at 64 px (patches of
8), 64 images of two views, float32, one CPU thread, without loading and augmentation. Ours is what
a script's `main` does between two batches: forward, loss, backward, optimiser, teacher, and what
lightly's loop has not, the online probe, sums, log. The peer has the same backbone, widths and kind
of optimiser. A second line holds the same step against bare forward and backward of the same model
(all else may take 5 %). MAE's pass over whole images, for the probe, is left out of both and stands
apart.
Processor time, which other work on the machine disturbs less. One turn to warm up and five that
count; in each all are timed, and the ratio is the median of the turns' own, as a machine is not
equally fast for long: a quarter of an hour on a free core.
"""

import copy
import functools
import importlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM, heads
from lightly.utils.lars import LARS
from torch import nn

import barlow
import byol
import dino
import mae
import simclr
from benchmarks._within import run_main
from benchmarks.timing import emit
from common.backbones import build_backbone
from common.data import Batch
from common.distributed import mixed_precision, to_device
from common.running.config import read_config

ROOT = Path(__file__).parent.parent
SIZE, PATCH, BATCH = 64, 8, 64
WARMUPS, REPEATS = 1, 5
PAIRS = [(m, b) for m in ("simclr", "byol", "barlow", "dino") for b in ("resnet18", "vit_tiny")]
PAIRS += [("mae", "vit_tiny")]

# Forward pass and loss of ours: (model, views (2, B, 3, S, S), noise (B, 2, L), settings) -> loss.


def bare_mae(model, views, noise, ssl):
    images = views.flatten(0, 1)
    pred, mask = model(images, noise.transpose(0, 1).flatten(0, 1))
    return mae.mae_loss(images, pred, mask, PATCH, ssl.norm_pix_loss)


def bare_dino(model, views, noise, ssl):
    student, teacher = model(views)[2:]
    return dino.dino_loss(student, teacher, model.center, ssl.student_temperature, 0.04)


def bare_byol(model, views, noise, ssl):
    p, t = model(views)[2:]
    return byol.byol_loss(*p, *t)


BARE = {
    "simclr": lambda model, views, noise, ssl: simclr.nt_xent_loss(
        *model(views)[1], ssl.temperature
    ),
    "barlow": lambda model, views, noise, ssl: barlow.barlow_twins_loss(
        *model(views)[1], ssl.lambda_, ssl.scale_loss
    ),
    "byol": bare_byol,
    "dino": bare_dino,
    "mae": bare_mae,
}


class Peer(nn.Module):
    """lightly's parts in its examples' order. forward(views) -> loss; follow(): the teacher."""

    def __init__(self, method, backbone, dim, ssl):
        super().__init__()
        self.method, self.backbone, self.ssl = method, backbone, ssl
        widths = dim, ssl.proj_hidden_dim, ssl.proj_output_dim
        if method == "simclr":
            self.head = heads.SimCLRProjectionHead(*widths, batch_norm=False)
            self.loss = NTXentLoss(ssl.temperature)
        elif method == "barlow":
            self.head = heads.BarlowTwinsProjectionHead(*widths)
            self.loss = BarlowTwinsLoss(ssl.lambda_)
        elif method == "byol":
            self.head = heads.BYOLProjectionHead(*widths)
            out = ssl.proj_output_dim
            self.predictor = heads.BYOLPredictionHead(out, ssl.pred_hidden_dim, out)
            self.loss = NegativeCosineSimilarity()
        elif method == "dino":
            make = functools.partial(heads.DINOProjectionHead, norm_last_layer=ssl.norm_prototyper)
            self.head = make(*widths, ssl.num_prototypes)
            teachers = make(*widths, ssl.num_prototypes)  # its weight_norm cannot be copied
            self.loss = DINOLoss(ssl.num_prototypes)
        if method in ("byol", "dino"):
            self.student = nn.Sequential(self.backbone, self.head)
            teachers = copy.deepcopy(self.head) if method == "byol" else teachers
            self.teacher = nn.Sequential(copy.deepcopy(self.backbone), teachers)
            utils.deactivate_requires_grad(self.teacher)

    def forward(self, views):
        if self.method in ("simclr", "barlow"):
            return self.loss(*(self.head(self.backbone(view)) for view in views))
        with torch.no_grad():
            t = [self.teacher(view) for view in views]
        student = [self.student(view) for view in views]
        if self.method == "dino":
            return self.loss(t, student, epoch=0)
        p0, p1 = (self.predictor(z) for z in student)
        return self.loss(p0, t[1]) + self.loss(p1, t[0])

    def follow(self):
        if self.method in ("byol", "dino"):
            utils.update_momentum(self.student, self.teacher, m=0.996)


class PeerMAE(nn.Module):
    """lightly's example of MAE."""

    def __init__(self, backbone, dim, ssl):
        super().__init__()
        self.mask_ratio = ssl.mask_ratio
        self.backbone = MaskedVisionTransformerTIMM(vit=backbone)
        self.length = self.backbone.sequence_length
        self.patch_size = backbone.patch_embed.patch_size[0]
        self.decoder = MAEDecoderTIMM(
            num_patches=backbone.patch_embed.num_patches,
            patch_size=self.patch_size,
            embed_dim=dim,
            decoder_embed_dim=ssl.decoder_embed_dim,
            decoder_depth=ssl.decoder_depth,
            decoder_num_heads=ssl.decoder_num_heads,
        )

    def forward(self, views):
        images = views.flatten(0, 1)
        size = len(images), self.length
        kept, masked = utils.random_token_mask(size, self.mask_ratio, device=images.device)
        x = self.decoder.embed(self.backbone.encode(images=images, idx_keep=kept))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, kept, x.type_as(tokens))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)
        return nn.functional.mse_loss(pred, utils.normalize_mean_var(target, dim=-1))

    def follow(self):
        pass


def peer_step(method, cfg, make_views, device):
    """A function without arguments: one step of lightly's loop, on views (2, B, 3, S, S)."""
    ssl, opt = cfg.ssl_settings, cfg.optimization
    backbone, dim = build_backbone(cfg.backbone, cfg.data.image_size, cfg.patch_size)
    model = PeerMAE(backbone, dim, ssl) if method == "mae" else Peer(method, backbone, dim, ssl)
    model = to_device(model, device, opt.batch_size)
    autocast, scaler = mixed_precision(opt.precision, device)
    params = [p for p in model.parameters() if p.requires_grad]
    if opt.optimizer == "lars":
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": opt.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = LARS(groups, lr=opt.lr, momentum=opt.momentum)
    else:
        optimizer = torch.optim.AdamW(params, lr=opt.lr, weight_decay=opt.weight_decay)

    def step():
        with autocast:
            loss = model(make_views())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if method == "dino":
            scaler.unscale_(optimizer)
            for p in model.backbone.parameters():
                nn.utils.clip_grad_norm_(p, max_norm=1.0)
        scaler.step(optimizer)
        scaler.update()
        model.follow()

    return step


class FixedViews:
    """In the place of ColorJitterNormalize: the same normalised views each time."""

    def __init__(self, views):
        self.views, self.clean = views, None

    def to(self, device):
        return self

    def __call__(self, *batch):
        return self.views


def measure(method, backbone, folder):
    """{who: [seconds of a step]} of ours, bare and lightly, in turns, within a run of main."""
    script = importlib.import_module(method)
    config = ROOT / f"configs/{method}_{'r18' if backbone == 'resnet18' else 'vit_tiny'}.yaml"
    overrides = [f"data.{key}_csv={folder}/{key}.csv" for key in ("train", "val")]
    overrides += [f"data.image_root={folder}", "data.train_defect_proportion=null"]
    overrides += [f"data.image_size={SIZE}"]
    overrides += ["data.num_workers=0", f"optimization.batch_size={BATCH}"]
    overrides += ["optimization.precision=fp32", f"run.output_dir={folder}"]
    overrides += [f"run.name={method}_{backbone}"]
    if backbone == "vit_tiny":
        overrides.append(f"patch_size={PATCH}")
    cfg = read_config(script.Config, config, overrides)
    generator = torch.manual_seed(0)
    views = torch.randn(2, BATCH, 3, SIZE, SIZE, generator=generator)
    noise = torch.rand(BATCH, 2, (SIZE // PATCH) ** 2, generator=generator)
    label, rows = (torch.arange(BATCH) % 2).to(torch.int8), torch.arange(BATCH)
    batch = Batch(torch.zeros(BATCH), torch.zeros(BATCH), noise, label, rows)
    models, seconds = [], {}

    def placed(model, *how):
        models.append(model)
        return model

    def bare():
        model = models[0]
        model.zero_grad(set_to_none=True)
        BARE[method](model, views, noise, cfg.ssl_settings).backward()

    @torch.no_grad()
    def whole_images():
        encode(models[0], views.flatten(0, 1))

    calls = {"lightly": peer_step(method, cfg, lambda: views, torch.device("cpu")), "bare": bare}
    things = {
        (script, "ColorJitterNormalize"): lambda *how: FixedViews(views),
        (script, "build_loaders"): lambda *how: (None, None),
        (script, "to_device"): placed,
    }
    if method == "mae":
        encode, calls["whole_images"] = mae.MAE.encode, whole_images
        nothing = torch.zeros(2 * BATCH, 192)
        things[mae.MAE, "encode"] = lambda self, images: (nothing, nothing)

    def batches(loader):
        for turn in range(WARMUPS + REPEATS):
            start = time.process_time()
            yield batch
            found, names = {"ours": time.process_time() - start}, list(calls)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                call = calls[name]
                start = time.process_time()
                call()
                found[name] = time.process_time() - start
            if turn >= WARMUPS:
                for name, value in found.items():
                    seconds.setdefault(name, []).append(value)

    run_main(method, ["--config", str(config), *overrides], batches, things)
    return seconds


def emit_pairs(name, found, ours, peer, target, **more):
    """One line, its ratio the median of the turns' own."""
    a, b = found[ours], found[peer]
    ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
    emit(name, statistics.median(a), statistics.median(b), target, "s", ratio=ratio, **more)


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for split, count in (("train", 64 * BATCH), ("val", 4)):
            lines = ["Filename,Defect", *(f"{split}{i}.png,{i % 2}" for i in range(count))]
            (Path(folder) / f"{split}.csv").write_text("\n".join(lines) + "\n")
        for method, backbone in PAIRS:
            seconds = measure(method, backbone, folder)
            name = f"{method}, {backbone}: a step"
            emit_pairs(name, seconds, "ours", "lightly", 0.97, seconds=seconds)
            alone = f"{name} over forward and backward alone"
            emit_pairs(alone, seconds, "ours", "bare", 1 / 1.05)
            if "whole_images" in seconds:
                whole = f"{method}: the probe's pass over whole images"
                emit_pairs(whole, seconds, "whole_images", "bare", 0)


if __name__ == "__main__":
    main()
