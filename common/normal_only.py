"""Scores that need normals only: how far an image's features lie from those of normal ones.

knn: mean cosine distance to the 5 nearest normal features; after DN2 (Bergman et al. 2020,
arXiv:2002.10445), which has squared Euclidean distances.
mahalanobis: distance from their mean under their covariance (Rippel et al. 2020, arXiv:2005.14140),
shrunk as Ledoit and Wolf do (2004, doi 10.1016/S0047-259X(03)00096-4).

The reference is of normal training images, clean and in eval mode, searched exactly. The encoder
may have seen defects in pre-training; these scores need no label of one.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.annotations import NORMAL
from common.metrics import at_prevalence, without_values
from common.running.errors import UserError, regular
from common.running.keyed import NORMAL_SAMPLE, keyed_rng

MOST_NORMALS = 10_000  # of the reference
NEIGHBOURS = 5
AT_ONCE = 1024  # rows of a block of distances
REFERENCE = "normal_features.npz"
NAMES = ("knn", "mahalanobis")
OF_RANKING = ("auroc", "average_precision", "n", "n_defect")  # what needs no threshold


def reference_rows(defect, rows, seed):
    """Which training rows the reference is of: at most MOST_NORMALS labelled normal ones, sorted.

    defect: (N,) labels of a training CSV; rows: of a run's subset of it.
    """
    normals = np.sort(rows[defect[rows] == NORMAL])
    order = keyed_rng(NORMAL_SAMPLE, seed).permutation(len(normals))
    return normals[np.sort(order[:MOST_NORMALS])]


def ledoit_wolf(x):
    """Shrunk covariance of rows. x: (n, D) float64, centred. Returns ((D, D), shrinkage 0 to 1).

    (1 - b) S + b tr(S) / D I: S the biased covariance, b the share that minimises the expected
    squared error, Eq. 14 of the paper, whose sums over images are written by their norms.
    """
    n, dim = x.shape
    s = x.T @ x / n
    mu = s.trace() / dim
    off_target = (s.square().sum() - dim * mu**2) / dim  # d^2: of S from the target
    of_images = x.square().sum(dim=1).square().sum() / n - s.square().sum()
    noise = torch.minimum(of_images / (n * dim), off_target)  # b^2: of S from the truth
    share = float(noise / off_target) if off_target > 0 else 1.0
    return (1 - share) * s + share * mu * torch.eye(dim, dtype=x.dtype), share


class NormalReference:
    """Normal features, to which others are compared."""

    def __init__(self, features, filename):
        """features: (n, D); filename: (n,) UTF-8 bytes.

        `why`: None, or why nothing can be compared with them: fewer than 6 images, or all alike.
        """
        self.features = torch.as_tensor(features).float()
        self.filename, self.why = np.asarray(filename), None
        n = len(self.features)
        if n <= NEIGHBOURS:
            self.why = f"{n} normal training images, {NEIGHBOURS + 1} are needed"
            return
        x = self.features.double()
        self._mean = x.mean(dim=0)
        covariance, _ = ledoit_wolf(x - self._mean)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed or not covariance.trace() > 0:
            self.why = f"the features of the {n} normal training images are all alike"
            return
        self._factor, self._unit = factor, F.normalize(x, dim=1)

    def scores(self, features, itself=None):
        """features: (n, D) -> {"knn": (n,) from 0 to 2, "mahalanobis": (n,) of at least 0} float32.

        itself: (n,) positions in the reference of the same images, or -1: an image is no neighbour
        of its own. Without a reference, see `why`, all are NaN.
        """
        if self.why:
            return {name: np.full(len(features), np.nan, np.float32) for name in NAMES}
        itself = np.full(len(features), -1) if itself is None else np.asarray(itself)
        knn = [torch.zeros(0)]
        for at in range(0, len(features), AT_ONCE):
            block, own = features[at : at + AT_ONCE].double(), itself[at : at + AT_ONCE]
            distance = 1 - F.normalize(block, dim=1) @ self._unit.T
            known = np.flatnonzero(own >= 0)
            distance[known, own[known]] = float("inf")
            nearest = distance.topk(NEIGHBOURS, largest=False, sorted=True).values
            knn.append(nearest.mean(dim=1).clamp_min(0).float())
        centred = (features.double() - self._mean).T
        whitened = torch.linalg.solve_triangular(self._factor, centred, upper=False)
        return {"knn": torch.cat(knn).numpy(), "mahalanobis": whitened.norm(dim=0).float().numpy()}

    def save(self, path):
        """float32, as they are compared."""
        np.savez(path, features=self.features.numpy(), filename=self.filename)

    @classmethod
    def load(cls, path):
        """Raises UserError naming the file."""
        try:
            with np.load(regular(path)) as stored:
                return cls(stored["features"], stored["filename"])
        except FileNotFoundError:
            raise UserError(f"{path}: not there: the run is of an earlier release") from None
        except Exception as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None


def normal_only_scores(reference, scores, labels, prevalences):
    """What the ranking by each score is worth: AUROC and average precision.

    scores: as NormalReference gives them; labels: (N,) 1, 0 or -1. Returns {"reference": images in
    it, name: {"auroc", ..., "at": {prevalence: the same}}}, with `undefined` where values are None.
    """
    result = {"reference": len(reference.features)}
    for name, values in scores.items():

        def at(prevalence, values=values):
            found = at_prevalence(np.nan_to_num(values), labels, prevalence)
            found = without_values(found, reference.why) if reference.why else found
            undefined = {k: why for k, why in found["undefined"].items() if k in OF_RANKING}
            return {k: found[k] for k in OF_RANKING} | {"undefined": undefined}

        result[name] = at(None) | {"at": {str(p): at(p) for p in prevalences}}
    return result
