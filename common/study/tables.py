"""The study's tables, made of finished runs."""

import itertools

import numpy as np

from common.metrics import METRICS, all_scores
from common.normal_only import NAMES, OF_RANKING
from common.study.evaluate import draw_subsets
from common.study.results import PREVALENCES, Estimate, beside, difference, estimate, settings
from common.study.table import Table

OF_FIGURE_2 = ("f1", "f2_ciw", "f1_normal")
OF_TABLES = (*OF_FIGURE_2, "precision", "recall")
BACKBONES = {"resnet18": "ResNet-18", "vit_tiny": "ViT-Tiny"}
SETTING = ("backbone", "method", "defects in training")


def backbone_name(backbone):
    """A backbone in print; a fork's is called what its config calls it."""
    return BACKBONES.get(backbone, backbone)


def percent(proportion):
    """A proportion of defects in print."""
    return "as it is" if proportion is None else f"{100 * proportion:g} %"


def setting(entry):
    """What the runs of several seeds have in common."""
    return entry.backbone, entry.method, entry.proportion


def in_print(backbone, method, proportion):
    """A setting as cells of a row."""
    return [backbone_name(backbone), method, percent(proportion)]


def _header(metrics, of_paper):
    """Names of columns: each metric's and, where the paper has it, its value's and difference's."""
    for metric in metrics:
        name = METRICS[metric]
        yield name
        if metric in of_paper:
            yield from (f"{name}, paper", f"{name}, difference")


def performance(finished, split, paper=None):
    """Tables 1, 3 and 4: every score of a split. split: train | val.

    paper: `paper_values`, to stand beside them; None: they are of other images.
    """
    rows, of_paper = [], OF_TABLES if paper else ()
    for (backbone, method, proportion), entries in settings(finished, setting).items():
        row = [*in_print(backbone, method, proportion), len(entries)]
        for metric in METRICS:
            ours = estimate(entries, metric, split=split)
            key = ("tables 3 and 4", backbone, method, split, metric, proportion, None)
            row += beside(ours, paper.get(key)) if metric in of_paper else [ours]
        rows.append(row)
    if split == "val":
        rows.append(_everything_a_defect(finished, of_paper))
    what = {
        "train": "the online probe over the last epoch, on augmented views, as it learned. In "
        "brackets 95 % intervals over seeds, where there are several",
        "val": f"the {finished[0].probe} probe on clean validation images, all of them. In "
        "brackets 95 % intervals: over seeds (t), or with one seed over images (bootstrap)",
    }[split]
    theirs = (
        " The paper's are the online probe's, on augmented views, and of Sewer-ML at 224 pixels: "
        "beside another set's their difference means nothing. Its MAE never got a gradient, so its "
        "values stand beside the random ViT's too."
    )
    return Table(
        f"performance_{split}",
        {
            "train": "Scores in training (Tables 3 and 4)",
            "val": "Scores on validation (Tables 1, 3 and 4)",
        }[split],
        f"Scores of {what}.{theirs if paper else ''} Scores are binary, defect or normal: easier "
        "than, and not comparable with, the 17-class benchmark of Sewer-ML.",
        (*SETTING, "seeds", *_header(METRICS, of_paper)),
        rows,
    )


def _means(finished, *columns):
    """Rows of means over seeds, one a setting. columns: each the way to a number of a result."""
    rows = []
    for key, entries in settings(finished, setting).items():
        found = [[_at(e.result, way) for e in entries] for way in columns]
        known = [[value for value in of if value is not None] for of in found]
        means = [float(np.mean(of)) if of else None for of in known]
        rows.append([*in_print(*key), len(entries), *means])
    return rows


def _at(values, way):
    for key in way:
        values = (values or {}).get(key)
    return values


def probes(finished):
    """AUROC by all three probes: how much of a difference is labels, how much features."""
    splits = "val", "val_offline", "val_offline_fixed"
    return Table(
        "probes",
        "AUROC by probe",
        "AUROC on clean validation images, as they are, mean over seeds. online: the study's, "
        "learned beside the encoder. offline: a regression to convergence on the run's own "
        "labelled rows, so with few defects it has few to learn from. offline, fixed labels: "
        "the same on one set for all runs, all labelled rows of the training CSV (of more than "
        "50,000 a sample): only the features differ.",
        (*SETTING, "seeds", "online", "offline", "offline, fixed labels"),
        _means(finished, *((split, "auroc") for split in splits)),
    )


def normal_only(finished):
    """Scores that need normals only, beside the offline probe's; a row a setting."""
    which = [(name, metric) for name in NAMES for metric in OF_RANKING[:2]]
    ways = [("val_normal_only", *of) for of in which]
    scores = [f"{METRICS[metric]}, {name}" for name, metric in which]
    return Table(
        "normal_only",
        "With normals only",
        "How well the distance to normal training images ranks validation, without a label of a "
        "defect: knn, mean cosine distance to the 5 nearest of at most 10,000; mahalanobis, with a "
        "shrunk covariance. Mean over seeds; beside it the offline probe, which has labels. The "
        "encoder may have seen defects in pre-training. A score is worth what it is above the "
        "random encoder's.",
        (*SETTING, "seeds", *scores, "AUROC, offline probe"),
        _means(finished, *ways, ("val_offline", "auroc")),
    )


def _everything_a_defect(finished, of_paper):
    """The floor: the scores of calling every validation image a defect."""
    stored = finished[0].scores
    how = stored.label, stored.classes, stored.class_names
    scores = all_scores(np.ones(len(stored.label)), *how)
    row = ["", "everything a defect", "", ""]
    for metric in METRICS:
        floor = Estimate(scores[metric], None, None, 0)
        row += beside(floor, None) if metric in of_paper else [floor]
    return row


def differences(finished, metrics=("auroc", "average_precision")):
    """Runs of one training proportion in pairs: methods of a backbone, backbones of a method."""
    groups, rows = settings(finished, setting), []
    for (one, entries), (other, others) in itertools.combinations(groups.items(), 2):
        if one[2] == other[2] and (one[0] == other[0] or one[1] == other[1]):
            found = [difference(entries, others, metric) for metric in metrics]
            if any(found):
                names = [
                    f"{method}, {backbone_name(backbone)}" for backbone, method, _ in (one, other)
                ]
                rows.append([percent(one[2]), *names, max(f.seeds for f in found if f), *found])
    return Table(
        "differences",
        "Which is better, in pairs",
        "How much higher the first of a pair scores than the second, on clean validation images "
        f"by the {finished[0].probe} probe, with 95 % intervals: over the seeds that both have "
        "(t), or of one seed over images, drawn for both alike (bootstrap). An interval across 0 "
        "leaves open which is better; one over images says nothing of other seeds.",
        ("defects in training", "this", "less this", "seeds", *map(METRICS.get, metrics)),
        rows,
    )


def matrix(finished, paper=None):
    """Figures 2, 4 and 5 as numbers: every score at every validation prevalence."""
    rows, of_paper = [], OF_FIGURE_2 if paper else ()
    for (backbone, method, proportion), entries in settings(finished, setting).items():
        for p in PREVALENCES:
            row = [*in_print(backbone, method, proportion), percent(p), len(entries)]
            for metric in METRICS:
                ours = estimate(entries, metric, p)
                at = ("figure 2", backbone, method, "val", metric, proportion, p)
                row += beside(ours, paper.get(at)) if metric in of_paper else [ours]
            rows.append(row)
    return Table(
        "matrix",
        "Training against validation proportion, in numbers",
        f"The {finished[0].probe} probe on clean validation images, in closed form"
        f"{', beside Figure 2' if paper else ''}. In brackets 95 % intervals: over seeds (t), or "
        "with one seed over images.",
        (*SETTING, "defects in validation", "seeds", *_header(METRICS, of_paper)),
        rows,
    )


def subsets(finished, draws, metrics=("f1", "f2_ciw", "f2_ciw_strict", "precision")):
    """The closed form beside real subsets, as the study drew one; a row a setting and prevalence.

    Of each setting's first seed. draws: subsets a row; mean and standard deviation over them.
    """
    rows = []
    for key, entries in settings(finished, setting).items():
        for p in PREVALENCES:
            row = [*in_print(*key), percent(p)]
            exact, drawn = entries[0].at(p), draw_subsets(entries[0].scores, p, draws)
            for metric in metrics:
                known = drawn[metric][~np.isnan(drawn[metric])]
                spread = [float(known.mean()), float(known.std())] if len(known) else [None, None]
                row += [exact[metric], *spread]
            rows.append(row)
    header = [*SETTING, "defects in validation"]
    for name in map(METRICS.get, metrics):
        header += [name, f"{name}, mean of draws", f"{name}, std of draws"]
    return Table(
        "subsets",
        "Closed form and drawn subsets",
        f"Scores of each setting's first seed at a prevalence: in closed form, and of {draws} "
        "subsets drawn with that prevalence from the validation images. The std is what a study "
        "that draws one subset leaves to chance. F2_CIW of small subsets is biased: a class "
        "without an image in the draw counts as a class of which nothing is found.",
        tuple(header),
        rows,
    )


def resolution(finished, paper=None):
    """Table 2: validation F1 by image size, supervised, resize only."""
    rows = []
    groups = settings(finished, lambda e: (*setting(e), e.run.cfg.data.image_size))
    for (backbone, method, proportion, size), entries in groups.items():
        at = ("table 2", backbone, method, "val", "f1", None, float(size))
        minutes = float(np.mean([e.result["seconds"] / e.result["epochs"] for e in entries])) / 60
        ours = [estimate(entries, "f1")]
        ours = beside(*ours, paper.get(at)) if paper else ours
        rows.append([*in_print(backbone, method, proportion), size, *ours, minutes])
    rows.sort(key=lambda row: (*row[:3], row[3]))
    return Table(
        "resolution",
        "Table 2: image size",
        f"Validation F1 of the supervised baseline by image size, resized and not augmented, by "
        f"the {finished[0].probe} probe. Minutes: of the whole run with its validations, divided "
        "by its epochs.",
        (*SETTING, "pixels", *_header(["f1"], ["f1"] if paper else ()), "minutes an epoch"),
        rows,
    )
