"""How well label-free measures tell good runs from bad, and what picking by one costs."""

import math
from dataclasses import dataclass

import numpy as np

from common.label_free import KINDS
from common.running.config import identity
from common.running.keyed import MEASURE_DRAWS, keyed_rng
from common.study.evaluate import interval as interval_of
from common.study.results import Estimate, flat, settings
from common.study.table import Table
from common.study.tables import backbone_name

DRAWS = 500  # of the bootstrap over settings
FEWEST = 6  # settings: of fewer a bootstrap finds certainty in what is chance
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
    needs: str = ""  # "": nothing; labels: of normals and defects
    of_views: bool = False  # of the run's own augmentation: to be compared where that is the same

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


VIEWED = ("lidar", "alignment")
MEASURES = (
    *_spectral("label_free"),
    Measure("std, embeddings", "label_free", "std_embeddings"),  # features have a scale
    *(
        Measure(f"{name}, {kind}", "label_free", f"{key}_{kind}", good, of_views=key in VIEWED)
        for kind in KINDS
        for key, name, good in (
            ("lidar", "LiDAR", 1),
            ("alignment", "alignment", -1),
            ("uniformity", "uniformity", -1),
            ("sigreg", "SIGReg", -1),
        )
    ),
    Measure("training loss", "log", "loss", -1, of_views=True),
    Measure("loss on held-out views", "label_free", "loss_held_out", -1, of_views=True),
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
        where = [backbone_name(backbone), method]
        rows += [[*where, *row] for row in _floors(entries)]
        rows += [[*where, *row] for row in _of_runs(method, entries)]
        same = max(settings(entries, lambda e: str(e.run.cfg.augmentation)).values(), key=len)
        if 1 < len(same) < len(entries) and method != "pooled":
            rows += [[*where, *row] for row in _of_runs(method, same, ", of one augmentation")]
    return Table(
        name,
        "Choosing without labels" + (", among settings" if name != "label_free" else ""),
        "Within a method and backbone, whose runs differ in what the grid varies: rank correlation "
        "of each measure, turned so that more should be better, with average precision on "
        f"validation by the probe on fixed labels, and, in brackets, 95 % of {DRAWS} bootstrap "
        "samples of settings. Regret: how far the run that the measure would pick lies below the "
        "best; beside it a run picked at random, and one of those that trained the longest. "
        "Measures that need labels show what the others miss. Pooled over methods a "
        "measure compares what its authors do not: that row is there to show that it misleads. "
        f"Of fewer than {FEWEST} settings (seeds of one count as one) there is no interval: even "
        "no relation at all often gives a perfect order. Losses are compared as they are, also "
        "where settings change their scale. Training losses, LiDAR and alignment are of the run's "
        "own augmentation; where that varies, they have rows for runs of one augmentation too. MAE "
        "and supervised runs have no projector: their embeddings are their features.",
        ("backbone", "method", "measure", "needs", "runs", *RANK_CORRELATIONS, "regret"),
        rows,
    )


def _floors(entries):
    """What picking at random costs, among all and, where lengths vary, among the longest."""
    scores, epochs = np.array([(target(e), e.result["epochs"]) for e in entries]).T
    picks = {"a run at random": scores}
    if len(set(epochs)) > 1:
        picks["a run of the most epochs"] = scores[epochs == epochs.max()]
    for name, picked in picks.items():
        regret = float(scores.max() - picked.mean()) if len(scores) > 1 else None
        yield [name, "", len(picked), None, None, regret]


def _of_runs(method, entries, which=""):
    """A row a measure of runs of one method; which: what else they share, then only of views."""
    found = [(m, [m.goodness(e) for e in entries]) for m in MEASURES if m.of_views or not which]
    settings = [getattr(e.run.cfg, "ssl_settings", None) for e in entries]
    with_sigreg = all(hasattr(s, "num_slices") for s in settings)  # LeJEPA's, and its forks'
    if with_sigreg and len({s.lambda_ for s in settings}) > 1:
        scaled = Measure(f"training loss / lambda^{SCALED:g}", "log", "loss")
        found.append((scaled, [scaled_loss(e) for e in entries]))
    values_of = [flat(identity(e.run.cfg, with_paths=True)) | {"seed": None} for e in entries]
    scores, names = [target(e) for e in entries], [str(sorted(v.items())) for v in values_of]
    for measure, values in found:
        known = [row for row in zip(values, scores, names, strict=True) if row[0] is not None]
        if known:
            supervised = method == "supervised" and measure.part == "log"
            needs = "labels" if supervised else measure.needs or "nothing"
            columns = *zip(*known, strict=True), max(scores)
            yield [measure.name + which, needs, len(known), *rank_correlations(*columns)]


def runs(finished):
    """What each run of many settings reached, beside the measures that need nothing."""
    shown = [m for m in MEASURES if m.part in ("label_free", "log") and "features" not in m.name]
    notes = {e: e.diagnostics() for e in finished}
    keys, rows = list(dict.fromkeys(key for of in notes.values() for key in of)), []
    for e in sorted(finished, key=lambda e: (e.result["method"], -(target(e) or 0))):
        scores = e.result.get("val_offline_fixed") or {}
        found = [scores.get("average_precision"), scores.get("auroc")]
        found += [*(m.of(e) for m in shown), *map(notes[e].get, keys)]
        rows.append([backbone_name(e.backbone), e.method, *found])
    names = (m.name.replace(", embeddings", "") for m in shown)
    return Table(
        "settings",
        "Runs of many settings",
        "A row a run, the best of a method first: average precision and AUROC on validation by the "
        "probe on fixed labels, and the measures of its embeddings. RankMe is a share of its "
        "largest value; last come the method's own numbers, means over the last epoch's log.",
        ("backbone", "method", "average precision", "AUROC", *names, *keys),
        rows,
    )


def rank_correlations(x, y, setting=None, best=None):
    """[Spearman's rho and Kendall's tau-b as Estimate, regret] of a measure x and a score y, (n,).

    setting: (n,) what runs of several seeds share, drawn together; None: each is its own. Intervals
    need FEWEST settings. best: the score that regret is counted from, y's own where None; of runs
    that tie in x the mean is picked. Fewer than three runs, or one value only, give no correlation,
    and one run no regret.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = len(x)
    of = np.unique(np.arange(n) if setting is None else setting, return_inverse=True)[1]
    many = of.max() + 1
    drawn = keyed_rng(MEASURE_DRAWS, many).multinomial(many, np.full(many, 1 / many), DRAWS)
    signs = [np.sign(v[:, None] - v) for v in (x, y)]
    found = []
    for correlate in (_spearman, _kendall):
        (whole,) = correlate(*signs, np.ones((1, n)))
        if n < 3 or math.isnan(whole):
            found.append(None)
            continue
        interval = None, None
        if many >= FEWEST:
            interval = interval_of(correlate(*signs, drawn[:, of]))
        found.append(Estimate(float(whole), *interval, n))
    best = y.max() if best is None else best
    return [*found, float(best - y[x == x.max()].mean()) if n > 1 else None]


def _spearman(x, y, often):
    """x, y: (n, n) signs of differences; often: (draws, n) each run is drawn. (draws,), maybe NaN.

    Sums of signs are twice the ranks less their mean.
    """
    a, b = often @ x.T, often @ y.T
    return _cosine(*((often * c).sum(axis=1) for c in (a * b, a * a, b * b)))


def _kendall(x, y, often):
    return _cosine(*((often @ c * often).sum(axis=1) for c in (x * y, x * x, y * y)))


def _cosine(ab, aa, bb):
    """(draws,) inner products -> (draws,); NaN where one is of nothing."""
    with np.errstate(invalid="ignore"):
        return ab / np.sqrt(aa * bb)
