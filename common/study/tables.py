"""The study's tables: made of finished runs, written as CSV, LaTeX and HTML."""

import csv
import html
from dataclasses import dataclass

import numpy as np

from common.metrics import f2_ciw, f2_ciw_strict
from common.study.results import (
    Estimate,
    estimate,
    kendall,
    paper_values,
    regret,
    settings,
    spearman,
)

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
MEASURES = {  # label-free, key in result.json's label_free: name in print
    "rankme_embeddings": "RankMe of embeddings",
    "rankme_embeddings_centred": "RankMe of embeddings, centred",
    "rankme_features": "RankMe of features",
    "rankme_features_centred": "RankMe of features, centred",
    "std_embeddings": "std of embeddings",
    "std_features": "std of features",
}


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers, None or Estimate."""

    name: str  # of its files
    title: str
    caption: str
    header: tuple
    rows: list

    def text(self):
        """Rows of text: three decimals for a float."""
        return [[_text(cell) for cell in row] for row in self.rows]

    def write_csv(self, path):
        """Numbers in full; an Estimate becomes three columns: mean, low, high."""
        wide = {i for row in self.rows for i, c in enumerate(row) if isinstance(c, Estimate)}
        header = []
        for i, name in enumerate(self.header):
            header += [name, f"{name} low", f"{name} high"] if i in wide else [name]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for row in self.rows:
                cells = []
                for i, cell in enumerate(row):
                    if i in wide:
                        known = isinstance(cell, Estimate)
                        cells += [cell.mean, cell.low, cell.high] if known else [cell, None, None]
                    else:
                        cells.append(cell)
                writer.writerow(["" if c is None else c for c in cells])

    def write_latex(self, path):
        """A booktabs table."""
        body = [" & ".join(map(_latex, row)) + r" \\" for row in self.text()]
        lines = [
            r"\begin{table}",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{'l' * len(self.header)}}}",
            r"\toprule",
            " & ".join(map(_latex, self.header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def html(self):
        """A table that scrolls sideways in its own frame."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.text()
        )
        return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _text(cell):
    if cell is None:
        return ""
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _latex(text):
    for character in "&%_#$":
        text = text.replace(character, "\\" + character)
    return text


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
        "val": "the online probe on clean validation images, all of them; the paper's validation "
        "is on augmented views",
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
    if not finished:
        return []
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
            pairs = [(e.result["label_free"].get(key), e.result["val"][score]) for e in entries]
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
