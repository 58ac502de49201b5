"""From scores to decisions: probabilities, thresholds, and what to expect of them.

All of it from the scores of a labelled validation set that the probe has not learned from. Its
images count as independent: frames of one video are not, so the intervals are then too narrow.
R: share of defects that are flagged, F: share of normals that are.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.offline_probe import fit_logistic
from common.running.errors import UserError
from common.running.keyed import RATES, keyed_rng

CONFIDENCE = 0.95
INTERVAL = (2.5, 97.5)  # percentiles
DRAWS = 20_000
CURVE = 400  # thresholds of a curve


def logit(p):
    """log odds of a probability inside 0 to 1."""
    return math.log(p) - math.log1p(-p)


@dataclass(frozen=True)
class Calibration:
    """P(defect | score) on the validation set; ranks stay."""

    slope: float
    intercept: float
    share: float  # of defects there

    @classmethod
    def fit(cls, scores, labels):
        """Platt 1999, unweighted, with his targets: (n1 + 1) / (n1 + 2) and 1 / (n0 + 2).

        scores: (n,); labels: (n,) 1 or 0, both. An unweighted fit takes back what a pos_weight did.
        """
        scores, is_defect = np.asarray(scores, np.float64), np.asarray(labels) == 1
        n, n_defect = len(scores), int(is_defect.sum())
        targets = np.where(is_defect, (n_defect + 1) / (n_defect + 2), 1 / (n - n_defect + 2))
        mean, std = scores.mean(), scores.std() or 1.0
        x = torch.from_numpy((scores - mean) / std)[:, None]
        (a, b), _ = fit_logistic(x, torch.from_numpy(targets), 0.0)
        slope = float(a) / std
        return cls(slope, float(b) - slope * mean, n_defect / n)

    def _shift(self, prevalence):
        """Prior shift (Saerens et al. 2002): what another share of defects adds to the log odds."""
        return logit(prevalence) - logit(self.share)

    def probability(self, scores, prevalence):
        """(n,) scores -> (n,) probabilities at a prevalence inside 0 to 1."""
        odds = self.slope * np.asarray(scores, np.float64) + self.intercept
        return 1 / (1 + np.exp(-np.clip(odds + self._shift(prevalence), -700, 700)))

    def score(self, probability, prevalence):
        """The score with that probability, where the slope is above 0."""
        return (logit(probability) - self._shift(prevalence) - self.intercept) / self.slope


def held_out_rank(n, share):
    """(k, is_sure): beyond the k-th most extreme of n held-out scores lies `share` of what comes.

    That share is Beta(k, n - k + 1), whatever the distribution. is_sure: with 95 % confidence it is
    at most `share`; where n is too small for that, it is so on average. Raises ValueError with the
    n that is needed where not even that is possible.
    """
    k = torch.arange(n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = torch.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share)).cumsum(0)
    sure = int((below <= 1 - CONFIDENCE).sum())  # largest k with P(Bin(n, share) < k) <= .05
    on_average = math.floor(share * (n + 1) + 1e-9)
    if not sure and not on_average:
        raise ValueError(math.ceil(1 / share - 1e-9) - 1)
    return (sure, True) if sure else (on_average, False)


@dataclass(frozen=True)
class Expected:
    """What flagging `score >= threshold` gives: Beta parameters of R and F, None where unknown."""

    threshold: float
    recall: tuple | None
    false_alarms: tuple | None
    how: str  # it was chosen, in words

    def outlook(self, prevalence, images):
        """{recall, false_alarms, precision, images: (value, low, high)} or None where unknown.

        images: how many are to be looked at of that many; intervals are of 95 %.
        """
        rng, drawn, best = keyed_rng(RATES), {}, {}
        for name, beta in (("recall", self.recall), ("false_alarms", self.false_alarms)):
            if beta is None:
                return dict.fromkeys(("recall", "false_alarms", "precision", "images"))
            a, b, best[name] = beta
            drawn[name] = rng.beta(a, b, DRAWS)
        for values in (drawn, best):
            hits = prevalence * values["recall"]
            flagged = hits + (1 - prevalence) * values["false_alarms"]
            values["precision"] = hits / np.maximum(flagged, 1e-300)
            values["images"] = images * flagged
        drawn["images"] = rng.binomial(images, np.clip(drawn["images"] / max(images, 1), 0, 1))
        ends = {name: np.percentile(values, INTERVAL) for name, values in drawn.items()}
        # None or all of n may lie beyond the interval, whose prior has seen half an image more.
        low, high = ({name: float(ends[name][i]) for name in best} for i in (0, 1))
        values = {name: float(x) for name, x in best.items()}
        return {name: (x, min(low[name], x), max(high[name], x)) for name, x in values.items()}


def _counted(flagged):
    """(n,) bool -> Beta(x + .5, n - x + .5) and x / n; None without an image."""
    x, n = int(flagged.sum()), len(flagged)
    return (x + 0.5, n - x + 0.5, x / n) if n else None


def _from_rank(n, k):
    """What lies beyond the k-th of n: Beta(k, n - k + 1) and its mean."""
    return k, n - k + 1, k / (n + 1)


class Held:
    """Validation scores by label: what operating points are chosen from."""

    def __init__(self, scores, labels):
        """scores: (n,) float32; labels: (n,) 1, 0 or -1, which is left out."""
        scores, labels = np.asarray(scores, np.float32), np.asarray(labels)
        self.defects, self.normals = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])

    def calibration(self):
        """(Calibration, None), or (None, why there is no probability)."""
        n, n_defect = len(self.normals), len(self.defects)
        if not n or not n_defect:
            return None, f"validation has {n} normal and {n_defect} defect images: it needs both"
        labels = np.repeat((0, 1), (n, n_defect))
        found = Calibration.fit(np.concatenate([self.normals, self.defects]), labels)
        if found.slope <= 0:
            return None, "on validation, defects do not score higher than normals"
        return found, None

    def at(self, threshold, how):
        """Expected of a threshold that was not chosen by counting either kind."""
        counts = (_counted(group >= threshold) for group in (self.defects, self.normals))
        return Expected(float(threshold), *counts, how)

    def at_recall(self, recall):
        """Flag from the k-th lowest defect on."""
        k, sure = self._rank(self.defects, 1 - recall, f"recall of {recall:g}", "defects")
        threshold, n = self.defects[k - 1], len(self.defects)
        miss_a, miss_b, missed = _from_rank(n, k)
        how = f"recall of at least {recall:g} {sure}, by {n} defects of validation"
        alarms = _counted(self.normals >= threshold)
        return Expected(float(threshold), (miss_b, miss_a, 1 - missed), alarms, how)

    def at_false_alarms(self, share):
        """Flag above the k-th highest normal; needs no defect."""
        what = f"share of false alarms of {share:g}"
        k, sure = self._rank(self.normals, share, what, "normals")
        n, at = len(self.normals), self.normals[-k]
        threshold = np.nextafter(at, np.float32(np.inf))
        how = f"at most {share:g} of the normals flagged {sure}, by {n} normals of validation"
        return Expected(
            float(threshold), _counted(self.defects >= threshold), _from_rank(n, k), how
        )

    @staticmethod
    def _rank(group, share, what, kind):
        try:
            k, sure = held_out_rank(len(group), share)
        except ValueError as error:
            raise UserError(
                f"a {what} needs {error} labelled {kind} in validation, which has {len(group)}"
            ) from None
        enough = math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-share))
        return k, "with 95 % confidence" if sure else f"on average (for 95 % confidence: {enough})"

    def curve(self, threshold=None):
        """Some CURVE rows [threshold, R, F] from the highest threshold on; None where unknown.

        The rates of `score >= threshold`, for a slider: closest where few are flagged, and with the
        threshold that is given. No rows without a labelled image.
        """
        every = np.unique(np.concatenate([self.defects, self.normals]))[::-1]
        if not len(every):
            return []
        steps = (
            np.linspace(0, 1, CURVE // 2) * (len(every) - 1),
            np.geomspace(1, len(every), CURVE // 2) - 1,
        )
        chosen = every[np.unique(np.concatenate(steps).round().astype(int))].astype(np.float64)
        if threshold is not None:
            chosen = np.append(chosen, threshold)
        rows = []
        for t in np.unique(chosen)[::-1]:
            rates = [
                1 - float(np.searchsorted(group, t)) / len(group) if len(group) else None
                for group in (self.defects, self.normals)
            ]
            rows.append([float(t), *rates])
        return rows
