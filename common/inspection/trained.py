"""A finished run as what scores new images: its encoder, and the score that it keeps."""

import os
from pathlib import Path

import numpy as np
import torch

from common.inspection.operating_point import Held
from common.normal_only import REFERENCE, NormalReference
from common.offline_probe import apply_probe
from common.running.errors import UserError, regular
from common.running.folder import SCORES
from common.running.standing import read_result
from common.running.weights import trained_encoder
from common.scoring import OFFLINE_PROBE

PROBES = ("offline", "offline_fixed")  # the first that the run has
KNN = "knn"


class Trained:
    """A finished run's encoder and the score that it keeps, with validation's."""

    def __init__(self, folder):
        """Raises UserError where the run is not finished, or has nothing to score with."""
        self.folder, self.result = Path(folder), read_result(folder)
        self.encoder, self.config, self.sha = trained_encoder(folder)
        try:
            with np.load(regular(self.folder / OFFLINE_PROBE)) as stored:
                probes = {name: torch.from_numpy(stored[name]) for name in stored.files}
            with np.load(regular(self.folder / SCORES)) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except Exception as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"{folder}: its scores cannot be read ({why})") from None
        labels = arrays["label"]
        names = [name for name in PROBES if name in probes and (labels == 1).any()]
        self.kind, self.reference, self.probe = names[0] if names else KNN, None, None
        if names:
            self.probe, scores = probes[self.kind], arrays[f"logit_{self.kind}"]
        else:
            self.reference = NormalReference.load(self.folder / REFERENCE)
            if self.reference.why:
                raise UserError(f"{folder}: nothing to score with: {self.reference.why}")
            scores = arrays[f"score_{KNN}"]
        self.held = Held(scores, labels)

    def describe(self):
        """What scores, in a line."""
        r, held = self.result, self.held
        how = f"the {self.kind} probe" if self.reference is None else "the distance to normals"
        text = f"{self.folder} ({r['method']}, {r['backbone']}, "
        text += f"{self.config['data']['image_size']} px), by {how}"
        auroc = r[f"val_{self.kind}"]["auroc"] if self.reference is None else None
        if auroc is not None:
            text += f": AUROC {auroc:.3f} on its validation set"
        return f"{text}, {len(held.normals)} normals and {len(held.defects)} defects"

    def scorer(self, root, filename):
        """(features (n, D), positions in filename) -> scores (n,) float32."""
        if self.reference is None:
            return lambda features, _: apply_probe(self.probe, features).float().numpy()
        trained_on = os.path.realpath(self.config["data"]["image_root"])
        known = {
            os.path.join(trained_on, n.decode()): i for i, n in enumerate(self.reference.filename)
        }

        def distance(features, positions):
            paths = (os.path.join(root, os.fsdecode(filename[i])) for i in positions)
            return self.reference.scores(features, [known.get(path, -1) for path in paths])[KNN]

        return distance
