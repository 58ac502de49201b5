"""What a run is scored by: the online probe on train and val, the offline probe, label-free.

Deviation: validation: on clean images; the study's Tables 1, 3 and 4 are on augmented views.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.annotations import Annotations
from common.data import clean_loader
from common.distributed import broadcast_buffers
from common.metrics import all_scores, at_prevalence
from common.offline_probe import MOST_ROWS, offline_probe, stratified_sample
from common.probe import evaluate
from common.rankme import label_free
from common.running.keyed import FEATURE_ROWS, keyed_rng

PREVALENCES = (0.01, 0.02, 0.05, 0.15, 0.45)  # of the study's grid
MOST_FEATURES = 25_600  # rows; RankMe's own sample size


@dataclass
class Scoring:
    """The same way of scoring for every method; plain values, made once a run."""

    train: Annotations
    train_rows: np.ndarray
    val: Annotations
    val_loader: torch.utils.data.DataLoader
    seed: int
    pos_weight: float
    clean: object  # uint8 images -> normalised float32
    rank: int
    world_size: int
    device: torch.device
    autocast: torch.autocast
    _last: tuple | None = None  # the newest validation

    def train_scores(self, running):
        """Scores of the online probe over an epoch, on augmented views. running: RunningScores."""
        rows, logits = (x.numpy() for x in running.gather())
        return all_scores(
            logits, self.train.defect[rows], self.train.classes[rows], self.train.class_names
        )

    def validate(self, model, probe):
        """One clean pass over val. Returns (scores, label-free measures, None but on rank 0)."""
        broadcast_buffers(model)
        rows, features, embeddings = evaluate(
            model, self.val_loader, self.clean, self.device, self.autocast, "validation"
        )
        logits = probe.cpu()(features).numpy()
        probe.to(self.device)
        chosen, measures = self._feature_rows(len(rows)), None
        if self.rank == 0:  # nobody else writes them down
            measures = label_free(features[chosen], embeddings[chosen])
        scores = self._val_scores(logits), measures
        self._last = *scores, features, embeddings, logits
        return scores

    def _val_scores(self, logits):
        return all_scores(logits, self.val.defect, self.val.classes, self.val.class_names)

    @staticmethod
    def _feature_rows(n):
        """The fixed set that label-free measures are of: the same rows in every run."""
        return np.sort(keyed_rng(FEATURE_ROWS, n).permutation(n)[:MOST_FEATURES])

    def final(self, model, probe, train_scores, folder):
        """Score for the last time; write val_scores.npz and features_val.npz. Returns a dict.

        All ranks call it; only rank 0 writes, fits the offline probe and gets a result.
        """
        if self._last is None:  # resumed behind the last epoch
            self.validate(model, probe)
        val_scores, measures, features, embeddings, logits = self._last
        train_rows, train_features = self._offline_sample(model)
        if self.rank != 0:
            return None
        threads = torch.get_num_threads()
        if self.world_size > 1:  # torchrun gives each rank one thread, and the others wait
            torch.set_num_threads(os.cpu_count())
        offline_logits, fit = offline_probe(
            train_features, self.train.defect[train_rows], features, self.pos_weight, self.seed
        )
        torch.set_num_threads(threads)
        if offline_logits is None:
            counts = {name: val_scores[name] for name in ("n", "n_defect")}
            names = [name for name in val_scores if name not in (*counts, "undefined")]
            offline = dict.fromkeys(names) | counts | {"undefined": dict.fromkeys(names, fit)}
        else:
            offline_logits = offline_logits.float().numpy()
            offline = self._val_scores(offline_logits) | fit
        self._write_arrays(Path(folder), features, embeddings, logits, offline_logits)
        val = self.val
        return {
            "train": train_scores,
            "val": val_scores,
            "val_offline": offline,
            "val_at": {
                str(p): at_prevalence(logits, val.defect, p, val.classes, val.class_names)
                for p in PREVALENCES
            },
            "label_free": measures,
        }

    def _offline_sample(self, model):
        """(rows, clean features) of the labelled training rows, or of a stratified sample."""
        labelled = stratified_sample(self.train.defect[self.train_rows], MOST_ROWS, self.seed)
        rows = self.train_rows[labelled]
        loader, images = self.val_loader, self.val_loader.dataset
        loader = clean_loader(
            images.image_root,
            self.train,
            rows[self.rank :: self.world_size],
            images.image_size,
            loader.batch_size,
            loader.num_workers,
            loader.pin_memory,
        )
        got, features, _ = evaluate(
            model, loader, self.clean, self.device, self.autocast, "features for the offline probe"
        )
        return got.numpy(), features

    def _write_arrays(self, folder, features, embeddings, logits, offline_logits):
        val, missing = self.val, np.full(len(logits), np.nan, np.float32)
        np.savez(
            folder / "val_scores.npz",
            filename=val.filename,
            logit=logits,
            logit_offline=missing if offline_logits is None else offline_logits,
            label=val.defect,
            classes=val.classes,
            class_names=np.array(val.class_names, dtype=str),
        )
        chosen = self._feature_rows(len(val))
        np.savez(
            folder / "features_val.npz",
            filename=val.filename[chosen],
            features=features[chosen].half().numpy(),
            embeddings=embeddings[chosen].half().numpy(),
        )


def summary(result):
    """The validation scores of a result in a few words."""
    parts = []
    for name, label in (("val", "online probe"), ("val_offline", "offline probe")):
        scores = result[name]
        if scores.get("auroc") is not None:
            parts.append(f"{label} F1 {scores['f1']:.3f}, AUROC {scores['auroc']:.3f}")
    return "; ".join(parts) or "without a defect or a normal to score"
