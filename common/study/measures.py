"""How well label-free measures tell good runs from bad, and what picking by one costs."""

import math
from dataclasses import dataclass

import numpy as np

from common.label_free import KINDS
from common.running.keyed import MEASURE_DRAWS, keyed_rng
from common.study.results import Estimate, settings
from common.study.table import Table
from common.study.tables import backbone_name

DRAWS = 500  # of the bootstrap over runs
RANK_CORRELATIONS = ("Spearman", "Kendall")
CONTROLS = ("random", "pretrained")  # encoders that were not trained here
SCALED = 0.4  # LeJEPA's loss over lambda to this power is what its paper correlates with accuracy


@dataclass(frozen=True)
class Measure:
    """One number of a run, and which end of it should be good."""

    name: str  # in print
    part: str  # of result.json, or `log`: of the last epoch's record
    key: str
    good: int = 1  # 1: high, -1: low, 0: near 1
    needs: str = ""  # "": nothing; normals: labels of normal ones; labels: of both

    def of(self, entry):
        """The value of a Finished run, or None. A RankMe is a share of the largest it could be."""
        if self.part == "log":
            return entry.epochs()[-1].get(self.key) if entry.epochs() else None
        found = entry.result
        for name in self.part.split("."):
            found = found.get(name) or {}
        value = found.get(self.key)
        if value is None or not self.key.startswith("rankme"):
            return value
        return value / found[f"{self.key.removesuffix('_centred')}_largest"]

    def goodness(self, entry):
        """The same, but high is good."""
        value = self.of(entry)
        if value is None:
            return None
        return -abs(value - 1) if self.good == 0 else self.good * value


def _spectral(part, needs=""):
    """The measures that exist of all images and of the defects alone."""
    whose = ", defects alone" if needs else ""
    for kind in KINDS:
        for key, name, good in (
            (f"rankme_{kind}", "RankMe", 1),
            (f"rankme_{kind}_centred", "RankMe, centred", 1),
            (f"stable_rank_{kind}", "stable rank", 1),
            (f"participation_ratio_{kind}", "participation ratio", 1),
            (f"alpha_req_{kind}", "alpha-ReQ, ranks 4 to 100", 0),
            (f"alpha_req_full_{kind}", "alpha-ReQ, all ranks", 0),
        ):
            yield Measure(f"{name}, {kind}{whose}", part, key, good, needs)


MEASURES = (
    *_spectral("label_free"),
    *(
        Measure(f"{name}, {kind}", "label_free", f"{key}_{kind}", good)
        for kind in KINDS
        for key, name, good in (
            ("std", "std", 1),
            ("lidar", "LiDAR", 1),
            ("alignment", "alignment", -1),
            ("uniformity", "uniformity", -1),
            ("sigreg", "SIGReg", -1),
        )
    ),
    Measure("training loss", "log", "loss", -1),
    Measure("loss on held-out views", "label_free", "loss_held_out", -1),
    *(
        Measure(f"AUROC of {name}", f"val_normal_only.{of}", "auroc", 1, "labels")
        for name, of in (("knn", "knn"), ("Mahalanobis", "mahalanobis"))
    ),
    *_spectral("given_labels", "labels"),
    *(
        Measure(f"{name}, {kind}", "given_labels", f"{key}_{kind}", 1, "labels")
        for kind in KINDS
        for key, name in (("margin", "margin of classes"), ("purity", "purity of neighbours"))
    ),
)
_OF_PAPER = [f"{key}_{kind}" for key in ("rankme", "std") for kind in KINDS[::-1]]
DRAWN = [m for key in _OF_PAPER for m in MEASURES if (m.part, m.key) == ("label_free", key)]


def target(entry):
    """What a measure should foretell: average precision with the same labels for every run."""
    return (entry.result.get("val_offline_fixed") or {}).get("average_precision")


def groups_of(finished):
    """{(backbone, method): runs that were trained}, then all of them under ("all", "pooled")."""
    trained = [e for e in finished if e.result["method"] not in CONTROLS and target(e) is not None]
    groups = settings(trained, lambda e: (e.backbone, e.result["method"]))
    return groups | ({("all", "pooled"): trained} if len(groups) > 1 else {})


def scaled_loss(entry):
    """-loss / lambda^SCALED at the end, for a method whose loss has a lambda; else None."""
    weight = getattr(getattr(entry.run.cfg, "ssl_settings", None), "lambda_", None)
    loss = Measure("", "log", "loss").of(entry)
    return -loss / weight**SCALED if weight and loss is not None else None


def measures(finished, name="label_free"):
    """Each measure's rank correlation with the score, and the regret of picking by it."""
    rows = []
    for (backbone, method), entries in groups_of(finished).items():
        scores = np.array([target(e) for e in entries])
        where = [backbone_name(backbone), method]
        longest = max(e.result["epochs"] for e in entries)
        last = scores[[e.result["epochs"] == longest for e in entries]]
        for pick, regret in (
            ("a run at random", scores.max() - scores.mean()),
            ("the last epoch: a run of the most", scores.max() - last.mean()),
        ):
            regret = float(regret) if len(scores) > 1 else None
            rows.append([*where, pick, "", len(scores), None, None, regret])
        found = [(m.name, m.needs, [m.goodness(e) for e in entries]) for m in MEASURES]
        if method != "pooled":
            scaled = f"training loss / lambda^{SCALED:g}"
            found.append((scaled, "", [scaled_loss(e) for e in entries]))
        for measure, needs, values in found:
            known = [(v, s) for v, s in zip(values, scores, strict=True) if v is not None]
            if known:
                row = [*where, measure, needs or "nothing", len(known)]
                rows.append([*row, *rank_correlations(*zip(*known, strict=True))])
    return Table(
        name,
        "Choosing without labels" + (", among settings" if name != "label_free" else ""),
        "Within a method and backbone, whose runs differ in what the grid varies: rank correlation "
        "of each measure, turned so that more should be better, with average precision on "
        f"validation by the probe on fixed labels, and, in brackets, 95 % of {DRAWS} bootstrap "
        "samples of runs. Regret: what is lost of it by the run that the measure would pick, of "
        "all that have it; beside it a run picked at random, and one of those that trained the "
        "longest. Measures that need labels show what the others miss. Pooled over methods a "
        "measure compares what its authors do not: that row is there to show that it misleads. "
        "MAE and supervised runs have no projector: their embeddings are their features.",
        ("backbone", "method", "measure", "needs", "runs", *RANK_CORRELATIONS, "regret"),
        rows,
    )


def runs(finished):
    """What each run of many settings reached, beside the measures that need nothing."""
    shown = [m for m in MEASURES if m.part in ("label_free", "log") and "features" not in m.name]
    rows = []
    for e in sorted(finished, key=lambda e: (e.result["method"], -(target(e) or 0))):
        scores = e.result.get("val_offline_fixed") or {}
        found = [scores.get("average_precision"), scores.get("auroc")]
        rows.append([backbone_name(e.backbone), e.method, *found, *(m.of(e) for m in shown)])
    names = (m.name.replace(", embeddings", "") for m in shown)
    return Table(
        "settings",
        "Runs of many settings",
        "A row a run, the best of a method first: average precision and AUROC on validation by the "
        "probe on fixed labels, and the measures of its embeddings. RankMe is a share of its "
        "largest value.",
        ("backbone", "method", "average precision", "AUROC", *names),
        rows,
    )


def rank_correlations(x, y):
    """[Spearman's rho and Kendall's tau-b as Estimate, regret] of a measure x and a score y, (n,).

    Fewer than three runs, or one value only, give no correlation, and one run no regret.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    signs = [np.sign(v[:, None] - v) for v in (x, y)]
    order = np.arange(n)[None]
    draws = keyed_rng(MEASURE_DRAWS, n).integers(0, n, (DRAWS, n))
    found = []
    for correlate in (_spearman, _kendall):
        (whole,) = correlate(*signs, order)
        if n < 3 or math.isnan(whole):
            found.append(None)
            continue
        drawn = correlate(*signs, draws)
        low, high = np.nanpercentile(drawn, (2.5, 97.5))
        found.append(Estimate(float(whole), float(low), float(high), n))
    return [*found, float(y.max() - y[np.argmax(x)]) if n > 1 else None]


def _spearman(x, y, of):
    """x, y: (n, n) signs of differences; of: (draws, n) which runs. Returns (draws,), maybe NaN."""
    return _cosine(*(_drawn(signs, of).sum(axis=2) for signs in (x, y)))  # ranks less their mean


def _kendall(x, y, of):
    return _cosine(*(_drawn(signs, of).reshape(len(of), -1) for signs in (x, y)))


def _drawn(signs, of):
    return signs[of[:, :, None], of[:, None, :]]


def _cosine(a, b):
    """(draws, m) twice -> (draws,); NaN where one is all 0."""
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
