"""What a run is scored by: the online and the offline probes, normals alone, label-free measures.

Deviation: validation: on clean images; the study's Tables 1, 3 and 4 are on augmented views.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.annotations import Annotations
from common.augmentations import ColorJitterNormalize, CropViews
from common.data import TrainImages, batches, clean_loader, cores, make_loader
from common.distributed import all_reduce_mean, broadcast_buffers, gather_unpadded, limit_waits
from common.label_free import VIEW_IMAGES, VIEWS, given_labels, label_free, of_clean, of_views
from common.metrics import all_scores, without_values
from common.normal_only import REFERENCE, NormalReference, normal_only_scores, reference_rows
from common.offline_probe import apply_probe, fits, offline_probe
from common.probe import evaluate, pos_weight
from common.running.keyed import FEATURE_ROWS, keyed_rng
from common.running.progress import Progress, say

PREVALENCES = (0.01, 0.02, 0.05, 0.15, 0.45)  # of the study's grid
MOST_FEATURES = 25_600  # rows; RankMe's own sample size
FINAL_LIMIT = 30 * 60  # seconds for rank 0 to fit the offline probes, while the others wait
OFFLINE_PROBE = "offline_probe.npz"
VIEW_SEED = 0  # of the fixed views: the same in every run, whatever its seed


@dataclass
class Scoring:
    """The same way of scoring for every method; plain values, made once a run."""

    train: Annotations
    train_rows: np.ndarray
    val: Annotations
    val_loader: torch.utils.data.DataLoader
    seed: int
    pos_weight: str | float  # as in the config
    clean: object  # uint8 images -> normalised float32
    crops: CropViews  # as in training
    rank: int
    world_size: int
    device: torch.device
    autocast: torch.autocast
    _last: tuple | None = None  # the newest validation

    def train_scores(self, running, probe):
        """Scores of the online probe over an epoch, on augmented views. running: RunningScores."""
        rows, logits = (x.numpy() for x in running.gather())
        train = self.train
        scores = all_scores(logits, train.defect[rows], train.classes[rows], train.class_names)
        why = probe.unlearned()
        return without_values(scores, why) if why else scores

    def validate(self, model, probe):
        """One clean pass over val. Returns (scores, label-free measures, None but on rank 0)."""
        broadcast_buffers(model)
        rows, features, embeddings = evaluate(
            model, self.val_loader, self.clean, self.device, self.autocast, "validation"
        )
        logits = probe.cpu()(features).numpy()
        probe.to(self.device)
        why = probe.unlearned()
        chosen, measures = fixed_rows(len(rows), MOST_FEATURES), None
        if self.rank == 0:  # nobody else writes them down
            measures = label_free(features[chosen], embeddings[chosen])
        scores = self._val_scores(logits, why), measures
        self._last = *scores, features, embeddings, logits, why
        return scores

    def _val_scores(self, logits, why=None, prevalence=None):
        """why: the reason why they are of a probe that learned nothing, if so."""
        val = self.val
        logits = np.zeros(len(val)) if why else logits
        scores = all_scores(logits, val.defect, val.classes, val.class_names, prevalence)
        return without_values(scores, why) if why else scores

    def final(self, model, probe, train_scores, folder, loss_of):
        """Score for the last time; write val_scores, features_val, offline_probe, normal_features.

        loss_of: the method's loss of (views (V, B, 3, S, S), Batch), or None where it needs labels.
        All ranks call it; only rank 0 writes, fits the offline probes and gets a result, a dict.
        """
        if self._last is None:  # resumed behind the last epoch
            self.validate(model, probe)
        val_scores, measures, features, embeddings, logits, why = self._last
        on = fits(self.train.defect, self.train_rows, self.seed)
        normals = reference_rows(self.train.defect, self.train_rows, self.seed)
        needed = np.unique(np.concatenate([normals, *(of for of, _ in on.values())]))
        rows, train_features = self._train_features(model, needed)
        views, held_out = self._fixed_views(model, loss_of)
        if self.world_size > 1:
            say(f"the other ranks wait for the last scores, at most {FINAL_LIMIT // 60} minutes")
            limit_waits(FINAL_LIMIT)
        if self.rank != 0:
            return None
        threads = torch.get_num_threads()
        if self.world_size > 1:  # torchrun gives each rank one thread, and the others wait
            torch.set_num_threads(cores())
        all_logits = {"logit": np.full_like(logits, np.nan) if why else logits}
        results, probes = {}, {}
        for name, (of, seed) in on.items():
            results[name], all_logits[f"logit_{name}"], probes[name] = self._offline(
                train_features[np.searchsorted(rows, of)], self.train.defect[of], features, seed
            )
        reference = NormalReference(
            train_features[np.searchsorted(rows, normals)], self.train.filename[normals]
        )
        distances = reference.scores(features)
        chosen = fixed_rows(len(self.val), MOST_FEATURES)
        of_chosen = features[chosen], embeddings[chosen]
        few = np.searchsorted(chosen, fixed_rows(len(self.val), VIEW_IMAGES))
        measures = measures | of_clean(*of_chosen, few) | of_views(*views)
        measures["loss_held_out"] = held_out
        minority = given_labels(*of_chosen, self.val.defect[chosen])
        torch.set_num_threads(threads)
        reference.save(Path(folder) / REFERENCE)
        all_logits |= {f"score_{name}": values for name, values in distances.items()}
        self._write_arrays(Path(folder), features, embeddings, all_logits, probes)
        return {
            "train": train_scores,
            "val": val_scores,
            **{f"val_{name}": scores for name, scores in results.items()},
            "val_normal_only": normal_only_scores(
                reference, distances, self.val.defect, PREVALENCES
            ),
            "val_at": {str(p): self._val_scores(logits, why, p) for p in PREVALENCES},
            "label_free": measures,
            "given_labels": minority,
        }

    @torch.no_grad()
    def _fixed_views(self, model, loss_of):
        """Augmented views of the first VIEW_IMAGES fixed rows of val, in eval mode.

        Drawn as in training, over as many epochs as give VIEWS or more, whatever the batches. Each
        rank has as many rows, so that a few are left out where they do not divide. Returns
        (features (V, n, D), embeddings (V, n, K)), and the mean of the method's loss over whole
        batches of the run's size (one of all images, where they are fewer), or None. n is 0 where
        there is no image for each rank.
        """
        loader, rows = self.val_loader, fixed_rows(len(self.val), VIEW_IMAGES)
        crops = copy.copy(self.crops)
        crops.seed = VIEW_SEED
        share = len(rows) // self.world_size  # the same for each rank
        if not share:
            return [torch.zeros(VIEWS, 0, 1)] * 2, None
        rows = rows[self.rank * share :][:share].tolist()
        size, epochs = min(loader.batch_size, share), range(-(-VIEWS // crops.num_views))
        parts = [rows[at : at + size] for at in range(0, share, size)]
        keys = [[(epoch, row) for row in part] for part in parts for epoch in epochs]
        images = TrainImages(loader.dataset.images, self.val, crops)
        how = loader.num_workers, loader.pin_memory, size
        augment = ColorJitterNormalize(VIEW_SEED).to(self.device)
        encoded, losses, was_training = ([], []), [], model.training
        model.eval()
        progress = Progress(share * len(epochs), "augmented views", unit="images")
        for step, batch in enumerate(batches(make_loader(images, *how, batch_sampler=keys))):
            batch = batch.to(self.device)
            views = augment(batch.views, batch.factors, step % len(epochs))  # its epoch
            with self.autocast:
                of_batch = zip(*map(model.encode, views), strict=True)
            for kept, z in zip(encoded, of_batch, strict=True):
                kept.append(torch.stack(z).float().cpu())  # (V, B, D), (V, B, K)
            if loss_of is not None and len(batch.row) == size:
                losses.append(loss_of(views, batch).double())
            progress.update(len(batch.row))
        progress.close()
        model.train(was_training)
        many = len(epochs)
        of_parts = ([torch.cat(z[i : i + many]) for i in range(0, len(z), many)] for z in encoded)
        whole = [gather_unpadded(torch.cat(z, dim=1).transpose(0, 1)) for z in of_parts]
        held_out = float(all_reduce_mean(torch.stack(losses).mean())) if losses else math.nan
        return [z.transpose(0, 1) for z in whole], held_out if math.isfinite(held_out) else None

    def _train_features(self, model, rows):
        """(rows, clean features (n, D)) of sorted training rows, in their order."""
        loader, images = self.val_loader, self.val_loader.dataset
        loader = clean_loader(
            images.images,
            self.train,
            rows[self.rank :: self.world_size],
            images.image_size,
            loader.batch_size,
            loader.num_workers,
            loader.pin_memory,
        )
        label = "features for the offline probe"
        got, features, _ = evaluate(model, loader, self.clean, self.device, self.autocast, label)
        return got.numpy(), features

    def _offline(self, features, defect, val_features, seed):
        """(scores, logits (N,), weights or None) of one offline probe; NaN logits without one."""
        weight, fit = offline_probe(features, defect, pos_weight(self.pos_weight, defect), seed)
        if weight is None:
            return self._val_scores(None, fit), np.full(len(val_features), np.nan, np.float32), None
        logits = apply_probe(weight, val_features).float().numpy()
        return self._val_scores(logits) | fit, logits, weight

    def _write_arrays(self, folder, features, embeddings, logits, probes):
        val = self.val
        np.savez_compressed(  # a study's are kept
            folder / "val_scores.npz",
            filename=val.filename,
            **logits,
            label=val.defect,
            classes=val.classes,
            class_names=np.array(val.class_names, dtype=str),
        )
        chosen = fixed_rows(len(val), MOST_FEATURES)
        np.savez(
            folder / "features_val.npz",
            filename=val.filename[chosen],
            features=features[chosen].half().numpy(),
            embeddings=embeddings[chosen].half().numpy(),
        )
        fitted = {name: weight.numpy() for name, weight in probes.items() if weight is not None}
        np.savez(folder / OFFLINE_PROBE, **fitted)  # (D + 1,) float64 of raw features, bias last


def fixed_rows(n, most):
    """The rows of val's n that label-free measures are of, the same in every run; sorted (most,).

    Fewer are a part of more.
    """
    return np.sort(keyed_rng(FEATURE_ROWS, n).permutation(n)[:most])
