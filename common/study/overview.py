"""Pictures of what the study asks: who sees defects, what imbalance costs, how far labels go, and
what tells good runs from bad without them."""

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.cm import viridis

from common.study.figures import COLOURS, MARKS, looks, panels, shades, with_legend
from common.study.results import Estimate, estimate, settings
from common.study.tables import backbone_name, percent

SPLITS = {"own labels": "val_offline", "fixed labels": "val_offline_fixed"}


def overview(finished):
    """AUROC by method and proportion with its interval, and of normals alone; a panel a backbone.

    Dashed: chance. Dotted: the random encoder's mean. Diamonds: knn, which needs no defect.
    """
    backbones = settings(finished, lambda e: e.backbone)
    widest = max(len(settings(of, lambda e: e.method)) for of in backbones.values())
    how = {"height": 4.2, "width": max(4.0, 0.95 * widest), "sharey": "row"}
    figure, axes = panels(1, len(backbones), **how)
    proportions = list(shades(finished))
    shade = dict(zip(proportions, viridis(np.linspace(0.85, 0.1, len(proportions))), strict=True))
    for axis, (backbone, entries) in zip(axes[0], backbones.items(), strict=True):
        axis.axhline(0.5, color="#555555", linestyle="--", linewidth=1, label="chance")
        control = [e.at()["auroc"] for e in entries if e.result["method"] == "random"]
        if control and None not in control:
            mean = float(np.mean(control))
            axis.axhline(mean, color="#555555", linestyle=":", label="random encoder")
        methods = settings(entries, lambda e: e.method)
        for at, runs in enumerate(methods.values()):
            groups = settings(runs, lambda e: percent(e.proportion))
            for i, (proportion, of) in enumerate(groups.items()):
                x, found = at + 0.14 * (i - (len(groups) - 1) / 2), estimate(of, "auroc")
                label, how = f"its probe, trained with {proportion}", {"color": shade[proportion]}
                if found.low is not None:
                    axis.plot([x, x], [found.low, found.high], linewidth=1.5, **how)
                axis.plot(x, np.nan if found.mean is None else found.mean, "o", label=label, **how)
                knn = [(e.result.get("val_normal_only") or {}).get("knn", {}) for e in of]
                knn = [scores["auroc"] for scores in knn if scores.get("auroc") is not None]
                how = {"color": "#D55E00", "markersize": 5, "fillstyle": "none"}
                label = "normals alone: knn"
                axis.plot(x, np.mean(knn) if knn else np.nan, "D", label=label, **how)
        names = [name.replace(", ", ",\n") for name in methods]
        axis.set_xticks(range(len(methods)), names, rotation=30, ha="right", fontsize=8)
        axis.set_title(backbone_name(backbone))
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("AUROC on validation")
    return with_legend(figure, axes)


def causes(finished):
    """What fewer defects in training cost, taken apart; None where no backbone has two proportions.

    AUROC against training proportion; a row a backbone, a column what was kept the same: the
    probe's labels, the number of images (runs with data.subset_size), both, or neither.
    """
    of_backbone = settings(finished, lambda e: e.backbone if e.proportion is not None else None)
    many = (of for of in of_backbone.values() if len({e.proportion for e in of}) > 1)
    known = [e for of in many for e in of]
    if not known:
        return None
    sizes = {False: "own number of images", True: "the same number of images"}
    by_size = settings(known, lambda e: e.run.cfg.data.subset_size is not None)
    columns = [(s, labels) for s in sizes if s in by_size for labels in SPLITS]
    backbones = list(settings(known, lambda e: e.backbone))
    figure, axes = panels(len(backbones), len(columns), sharey="row", height=3.2)
    look = looks(known)
    for c, (size, labels) in enumerate(columns):
        lines = settings(by_size[size], lambda e: (e.backbone, e.method))
        for (backbone, method), entries in lines.items():
            scores = {}
            for entry in entries:
                value = (entry.result.get(SPLITS[labels]) or {}).get("auroc")
                if value is not None:
                    scores.setdefault(entry.proportion, []).append(value)
            axis, (colour, mark) = axes[backbones.index(backbone), c], look[method]
            x = sorted(scores)
            y = [np.mean(scores[p]) for p in x]
            axis.plot(x, y, color=colour, marker=mark, markersize=4, label=method)
            low, high = ([f(scores[p]) for p in x] for f in (min, max))
            axis.fill_between(x, low, high, color=colour, alpha=0.12)
        for axis, backbone in zip(axes[:, c], backbones, strict=True):
            axis.set_title(f"{backbone_name(backbone)}: {labels},\n{sizes[size]}", fontsize=9)
            axis.set_xscale("log")
            axis.set_xticks(ticks := sorted({e.proportion for e in known}), map(percent, ticks))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("defects in training")
    for axis in axes[:, 0]:
        axis.set_ylabel("AUROC, offline probe")
    return with_legend(figure, axes)


def correlations(rows):
    """Rank correlation of each measure with its interval; a column and colour a kind of labels.

    rows: of measures.measures; those of single methods are shown, a mark each.
    """
    rows = [r for r in rows if isinstance(r[5], Estimate) and r[1] != "pooled"]
    names = list(dict.fromkeys((r[3], r[2]) for r in rows))
    lines = list(dict.fromkeys((r[0], r[1]) for r in rows))
    figure, ((axis,),) = panels(1, 1, height=max(2.0, 0.24 * len(names)), width=7.5)
    for i, (line, colour, mark) in enumerate(zip(lines, cycle(COLOURS), cycle(MARKS))):
        of = [r for r in rows if (r[0], r[1]) == line]
        y = [names.index((r[3], r[2])) + 0.6 * ((i + 0.5) / len(lines) - 0.5) for r in of]
        ends = [
            (at, r[5].low, r[5].high) for at, r in zip(y, of, strict=True) if r[5].low is not None
        ]
        axis.hlines(*np.array(ends).reshape(-1, 3).T, color=colour, linewidth=1)
        label = ", ".join(line[::-1])
        axis.plot([r[5].mean for r in of], y, mark, color=colour, markersize=4, label=label)
    axis.axvline(0, color="#555555", linewidth=0.8)
    axis.set_yticks(
        range(len(names)), [n + (f" ({k})" if k != "nothing" else "") for k, n in names]
    )
    axis.tick_params(axis="y", labelsize=7)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(-1.02, 1.02)
    axis.set_xlabel("Spearman's rank correlation with average precision")
    axis.grid(alpha=0.25)
    return with_legend(figure, np.array([[axis]]))


def label_budget(finished):
    """AUROC on validation against the number of labels; a line a start, its seeds as a band.

    A frozen encoder is scored by its offline probe, a supervised run by its head.
    """
    figure, ((axis,),) = panels(1, 1, height=4.2, width=6.5)
    starts = {e.run.cfg.run.init_from for e in finished} - {None}
    lines = settings(finished, lambda e: (e.backbone, start_of(e, len(starts) > 1)))
    for (backbone, start), entries in lines.items():
        by_count = settings(entries, lambda e: _labels_of(e.result))
        counts = sorted(by_count)
        values = [[_auroc(e.result) for e in by_count[n]] for n in counts]
        values = [[v for v in found if v is not None] or [np.nan] for found in values]
        (line,) = axis.plot(counts, [np.mean(v) for v in values], "o-")
        line.set_label(f"{start}, {backbone_name(backbone)}")
        axis.fill_between(counts, *([f(v) for v in values] for f in (min, max)), alpha=0.15)
    axis.set_xscale("log")
    axis.set_xticks(ticks := sorted({_labels_of(e.result) for e in finished}), ticks)
    axis.minorticks_off()
    axis.set_xlabel("labelled training images")
    axis.set_ylabel("AUROC on validation")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def start_of(entry, by_name=False):
    """What a run of the label budget started from, in print; by_name: which weights."""
    options, method = entry.run.cfg.run, entry.result["method"]
    name = f" ({Path(options.init_from).name})" if by_name and options.init_from else ""
    if options.frozen_encoder:
        return f"probe on {'random' if options.init_from is None else 'pre-trained'} features{name}"
    return f"{method}, {'from scratch' if options.init_from is None else 'fine-tuned'}{name}"


def _labels_of(result):
    return result["train_rows"]["normal"] + result["train_rows"]["defect"]


def _auroc(result):
    return result["val" if result["method"] == "supervised" else "val_offline"]["auroc"]
