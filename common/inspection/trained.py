"""A finished run as what scores new images: its encoder, and the score that it keeps."""

import os
from pathlib import Path

import numpy as np
import torch

from common.backbones import build_backbone
from common.inspection.operating_point import Held
from common.normal_only import REFERENCE, NormalReference
from common.offline_probe import apply_probe
from common.running.errors import UserError, regular
from common.running.folder import SCORES
from common.running.standing import read_result
from common.running.weights import trained_config, trained_weights
from common.scoring import OFFLINE_PROBE

PROBES = ("offline", "offline_fixed")  # the first that the run has
KNN = "knn"


def read_arrays(path):
    """{name: array} of an .npz file. Raises UserError naming it, whatever it holds."""
    try:
        with np.load(regular(path)) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # of damaged or forged bytes anything may be raised
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: cannot be read ({why})") from None


def trained_encoder(folder):
    """(encoder in eval mode, (B, 3, S, S) -> features (B, D); config; the checkpoint's sha256)."""
    config, (weights, sha) = trained_config(folder), trained_weights(folder)
    size, vit = config["data"]["image_size"], (config.get("patch_size"), config.get("num_heads"))
    encoder, _ = build_backbone(config["backbone"], size, *vit)
    encoder.load_state_dict(weights)
    if (config.get("ssl_settings") or {}).get("features") == "mean_of_patches":
        encoder.global_pool = "avg"  # timm's name for it: without the class token
    return encoder.eval(), config, sha


class Trained:
    """A finished run's encoder, the probes that it keeps, and its validation scores."""

    def __init__(self, folder):
        """Raises UserError where the run is not finished or cannot be read."""
        self.folder, self.result = Path(folder), read_result(folder)
        self.encoder, self.config, self.sha = trained_encoder(folder)
        self.arrays = read_arrays(self.folder / SCORES)
        probes = read_arrays(self.folder / OFFLINE_PROBE)
        self.probes = {name: torch.from_numpy(weight) for name, weight in probes.items()}
        self.kept = next((name for name in PROBES if name in self.probes), None)


class Scorer:
    """What scores new images: a probe, or, without one or a defect to see it by, the normals."""

    def __init__(self, trained):
        """Raises UserError where the run has neither."""
        self.trained, self.reference = trained, None
        labels = trained.arrays["label"]
        self.kind = trained.kept if (labels == 1).any() else None
        scores = trained.arrays[f"logit_{self.kind}"] if self.kind else None
        if self.kind is None:
            self.kind, self.reference = KNN, NormalReference.load(trained.folder / REFERENCE)
            if self.reference.why:
                raise UserError(f"{trained.folder}: nothing to score with: {self.reference.why}")
            scores = trained.arrays[f"score_{KNN}"]
        self.held = Held(scores, labels)

    def describe(self):
        """What scores, in a line."""
        r, held = self.trained.result, self.held
        how, of = f"the {self.kind} probe", r.get(f"val_{self.kind}", {})
        if self.reference is not None:
            how, of = "the distance to normals", r["val_normal_only"][KNN]
        text = f"{self.trained.folder} ({r['method']}, {r['backbone']}, "
        text += f"{self.trained.config['data']['image_size']} px), by {how}"
        if of.get("auroc") is not None:
            text += f": AUROC {of['auroc']:.3f} on its validation set"
        return f"{text}, {len(held.normals)} normals and {len(held.defects)} defects"

    def of(self, root, filename):
        """(features (n, D), positions in filename) -> scores (n,) float32."""
        if self.reference is None:
            probe = self.trained.probes[self.kind]
            return lambda features, _: apply_probe(probe, features).float().numpy()
        trained_on = os.path.realpath(self.trained.config["data"]["image_root"])
        known = {
            os.path.join(trained_on, n.decode()): i for i, n in enumerate(self.reference.filename)
        }

        def distance(features, positions):
            paths = (os.path.join(root, os.fsdecode(filename[i])) for i in positions)
            return self.reference.scores(features, [known.get(path, -1) for path in paths])[KNN]

        return distance
