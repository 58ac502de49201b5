"""How well label-free measures tell good runs from bad."""

from common.study.results import kendall, regret, settings, spearman
from common.study.table import Table
from common.study.tables import backbone_name

MEASURES = {  # label-free, key in result.json's label_free: name in print
    "rankme_embeddings": "RankMe of embeddings",
    "rankme_embeddings_centred": "RankMe of embeddings, centred",
    "rankme_features": "RankMe of features",
    "rankme_features_centred": "RankMe of features, centred",
    "std_embeddings": "std of embeddings",
    "std_features": "std of features",
}


def measures(finished):
    """How well each label-free measure tells good runs from bad: rank correlation and regret.

    Within each method and backbone (whose runs differ in proportion and seed), and over all trained
    runs. RankMe is divided by the largest that its matrix could have, so that embeddings of
    different widths can be pooled.
    """
    trained = [e for e in finished if e.result["method"] not in ("random", "pretrained")]
    groups = {("all", "all trained"): trained}
    groups |= settings(finished, lambda e: (e.backbone, e.method))
    rows = []
    for (backbone, method), entries in groups.items():
        for key, name in MEASURES.items():
            for split in ("train", "val"):
                f1 = [e.at()["f1"] if split == "val" else e.result[split]["f1"] for e in entries]
                pairs = zip(map(measure_of(key), entries), f1, strict=True)
                pairs = [pair for pair in pairs if None not in pair]
                x, y = zip(*pairs, strict=True) if pairs else ((), ())
                row = [backbone_name(backbone), method, name, split, len(x)]
                rows.append([*row, spearman(x, y), kendall(x, y), regret(x, y)])
    return Table(
        "label_free",
        "Label-free measures against F1, in numbers",
        "Rank correlation over runs of each measure, on clean validation images, with F1 on "
        f"training views (the online probe's) and on validation (the {finished[0].probe} probe's), "
        "and the F1 that is lost by picking the run with the highest measure. Over all runs RankMe "
        "counts as a share of its largest value. Embeddings are the projector's output; supervised "
        "and MAE, which have none, have their features there. Fewer than three runs give no "
        "correlation.",
        ("backbone", "method", "measure", "F1 of", "runs", "Spearman", "Kendall", "regret"),
        rows,
    )


def measure_of(key):
    """A function Finished -> that measure; RankMe as a share of the largest it could be."""
    of = key.removesuffix("_centred")

    def value(entry):
        label_free = entry.result["label_free"]
        if not key.startswith("rankme") or label_free.get(key) is None:
            return label_free.get(key)
        return label_free[key] / label_free[f"{of}_largest"]

    return value
