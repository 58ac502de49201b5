"""The study's tables, made of finished runs."""

import numpy as np

from common.metrics import f2_ciw, f2_ciw_strict
from common.study.evaluate import draw_subsets
from common.study.results import (
    estimate,
    kendall,
    paper_values,
    regret,
    settings,
    spearman,
)
from common.study.table import Table

METRICS = {  # key: name in print
    "f1": "F1",
    "f2_ciw": "F2_CIW",
    "f2_ciw_strict": "F2_CIW strict",
    "f1_normal": "F1_normal",
    "precision": "precision",
    "recall": "recall",
    "auroc": "AUROC",
    "average_precision": "average precision",
}
BACKBONES = {"resnet18": "ResNet-18", "vit_tiny": "ViT-Tiny"}
PREVALENCES = (0.01, 0.02, 0.05, 0.15, 0.45)
MEASURES = {  # label-free, key in result.json's label_free: name in print
    "rankme_embeddings": "RankMe of embeddings",
    "rankme_embeddings_centred": "RankMe of embeddings, centred",
    "rankme_features": "RankMe of features",
    "rankme_features_centred": "RankMe of features, centred",
    "std_embeddings": "std of embeddings",
    "std_features": "std of features",
}


def percent(proportion):
    """A proportion of defects in print."""
    return "as it is" if proportion is None else f"{100 * proportion:g} %"


def setting(entry):
    """What the runs of several seeds have in common."""
    return entry.backbone, entry.method, entry.proportion


def performance(finished, split):
    """Tables 1, 3 and 4: every score of a split beside the paper's. split: train | val."""
    rows, paper = [], paper_values()
    for (backbone, method, proportion), entries in settings(finished, setting).items():
        row = [BACKBONES[backbone], method, percent(proportion), len(entries)]
        for metric in METRICS:
            ours = estimate(entries, metric, split)
            key = ("tables 3 and 4", backbone, method, split, metric, proportion, None)
            theirs = paper.get(key)
            row.append(ours)
            if metric in ("f1", "f2_ciw", "f1_normal", "precision", "recall"):
                known = ours.mean is not None and theirs is not None
                row += [theirs, ours.mean - theirs if known else None]
        rows.append(row)
    if split == "val":
        rows += _everything_a_defect(finished)
    header = ["backbone", "method", "defects in training", "seeds"]
    for metric, name in METRICS.items():
        header.append(name)
        if metric in ("f1", "f2_ciw", "f1_normal", "precision", "recall"):
            header += [f"{name}, paper", "difference"]
    where = {
        "train": "the online probe over the last epoch, on augmented views, as it learned",
        "val": f"the {finished[0].probe} probe on clean validation images, all of them; the "
        "paper's validation is the online probe's, on augmented views",
    }[split]
    return Table(
        f"performance_{split}",
        {"train": "Tables 3 and 4, training", "val": "Tables 1, 3 and 4, validation"}[split],
        f"Scores of {where}. In brackets 95 % intervals: over seeds (t), or with one seed over "
        "images (bootstrap). Scores are binary, defect or normal: easier than, and not comparable "
        "with, the 17-class benchmark of Sewer-ML.",
        tuple(header),
        rows,
    )


def _everything_a_defect(finished):
    """The floor: the scores of calling every validation image a defect."""
    scores = finished[0].scores
    share = float(scores.label.mean())
    called = np.ones(len(scores.label), bool)
    how = scores.classes, scores.class_names
    is_defect = scores.label == 1
    values = {
        "f1": 2 * share / (1 + share),
        "f2_ciw": f2_ciw(called[is_defect], scores.classes[is_defect], scores.class_names),
        "f2_ciw_strict": f2_ciw_strict(called, *how, scores.label),
        "f1_normal": 0.0,
        "precision": share,
        "recall": 1.0,
        "auroc": 0.5,
        "average_precision": share,
    }
    row = ["", "everything a defect", "", ""]
    for metric in METRICS:
        row.append(values[metric])
        if metric in ("f1", "f2_ciw", "f1_normal", "precision", "recall"):
            row += [None, None]
    return [row]


def resolution(finished):
    """Table 2: validation F1 by image size, supervised, resize only."""
    rows, paper = [], paper_values()
    groups = settings(finished, lambda e: (e.backbone, e.run.cfg.data.image_size))
    for (backbone, size), entries in sorted(groups.items()):
        ours = estimate(entries, "f1")
        theirs = paper.get(("table 2", backbone, "supervised", "val", "f1", None, float(size)))
        known = ours.mean is not None and theirs is not None
        seconds = float(np.mean([e.result["seconds"] / e.result["epochs"] for e in entries]))
        difference = ours.mean - theirs if known else None
        minutes = f"{seconds / 60:.2g}"
        rows.append([BACKBONES[backbone], size, ours, theirs, difference, minutes])
    return Table(
        "resolution",
        "Table 2: image size",
        "Validation F1 of the supervised baseline by image size, resized and not augmented.",
        ("backbone", "pixels", "F1", "F1, paper", "difference", "minutes an epoch"),
        rows,
    )


def measures(finished, score="f1"):
    """How well each label-free measure tells good runs from bad: rank correlation and regret.

    Within each method and backbone (whose runs differ in proportion and seed), and over all runs.
    """
    groups = {("all", "all"): finished}
    groups |= settings(finished, lambda e: (e.backbone, e.method))
    rows = []
    for (backbone, method), entries in groups.items():
        for key, name in MEASURES.items():
            pairs = [(e.result["label_free"].get(key), e.val[score]) for e in entries]
            pairs = [p for p in pairs if None not in p]
            x, y = zip(*pairs, strict=True) if pairs else ((), ())
            row = [BACKBONES.get(backbone, backbone), method, name, len(x)]
            rows.append([*row, spearman(x, y), kendall(x, y), regret(x, y)])
    return Table(
        "label_free",
        "Label-free measures against validation F1",
        "Rank correlation over runs of each measure, on clean validation images, with validation "
        "F1, and the F1 that is lost by picking the run with the highest measure. Fewer than three "
        "runs give no correlation.",
        ("backbone", "method", "measure", "runs", "Spearman", "Kendall", "regret"),
        rows,
    )


def subsets(finished, draws, metrics=("f1", "f2_ciw", "f2_ciw_strict", "precision")):
    """The closed form beside real subsets, as the study drew one; a row a setting and prevalence.

    Of each setting's first seed. draws: subsets a row; mean and standard deviation over them.
    """
    rows = []
    for (backbone, method, proportion), entries in settings(finished, setting).items():
        for prevalence in PREVALENCES:
            row = [BACKBONES[backbone], method, percent(proportion), percent(prevalence)]
            exact = entries[0].scores.at(prevalence)
            drawn = draw_subsets(entries[0].scores, prevalence, draws)
            for metric in metrics:
                known = drawn[metric][~np.isnan(drawn[metric])]
                spread = [float(known.mean()), float(known.std())] if len(known) else [None, None]
                row += [exact[metric], *spread]
            rows.append(row)
    header = ["backbone", "method", "defects in training", "defects in validation"]
    for metric in metrics:
        header += [METRICS[metric], "drawn, mean", "drawn, std"]
    return Table(
        "subsets",
        "Closed form and drawn subsets",
        f"Scores at a prevalence in closed form, and of {draws} subsets drawn with that prevalence "
        "from the validation images. The std is what a study that draws one subset leaves to "
        "chance. F2_CIW of small subsets is biased: a class without an image in the draw counts "
        "as a class of which nothing is found.",
        tuple(header),
        rows,
    )
