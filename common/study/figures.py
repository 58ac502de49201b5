"""The study's figures, in colours that the colour-blind can tell apart."""

import itertools

import matplotlib
import numpy as np

from common.metrics import METRICS
from common.study.measures import DRAWN
from common.study.results import PREVALENCES, estimate, settings
from common.study.tables import backbone_name, in_print, percent, setting

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # a `$` of a name is a `$`
from matplotlib import pyplot as plt  # noqa: E402 (the backend has to be chosen first)

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999")
MARKS = "osD^vPX*"


def looks(finished):
    """{method: (colour, mark)} in the order in which the methods come."""
    methods = list(settings(finished, lambda e: e.method))
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKS), strict=False)
    return dict(zip(methods, pairs, strict=False))


def shades(finished):
    """{proportion in print: opacity}, the more defects in training the stronger."""
    proportions = sorted({e.proportion for e in finished}, key=lambda p: 1 if p is None else p)
    opacity = np.linspace(1, 0.35, len(proportions))[::-1]
    return dict(zip(map(percent, proportions), opacity, strict=True))


def heatmaps(finished, metrics):
    """Figures 2, 4 and 5: a panel a metric, training setting against validation prevalence.

    finished: runs of one backbone; metrics: keys of METRICS. All panels share the scale from 0 to
    100 %.
    """
    groups = settings(finished, lambda e: (e.method, e.proportion))
    names = [f"{method} {percent(p)}" for method, p in groups]
    height = 1.3 + 0.26 * len(names)
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(1.8 + 3.1 * len(metrics), height), layout="constrained"
    )
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        values = np.full((len(names), len(PREVALENCES)), np.nan)
        for i, entries in enumerate(groups.values()):
            for j, prevalence in enumerate(PREVALENCES):
                found = [e.at(prevalence)[metric] for e in entries]
                found = [100 * x for x in found if x is not None]
                values[i, j] = np.mean(found) if found else np.nan
        image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        _write_numbers(axis, values, ".1f", 55)
        axis.set_title(METRICS[metric])
        axis.set_xticks(range(len(PREVALENCES)), [percent(p) for p in PREVALENCES])
        axis.set_xlabel("defects in validation")
        axis.set_yticks(range(len(names)), names if axis is np.atleast_1d(axes)[0] else [])
        _separate(axis, [method for method, _ in groups])
    figure.colorbar(image, ax=axes, label="%", shrink=min(1.0, 3 / height), pad=0.01)
    return figure


def _write_numbers(axis, values, how, middle):
    """Into each cell its value, dark on the bright half of the colours above `middle`."""
    for (i, j), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else format(value, how)
        colour = "black" if value > middle else "white"
        axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)


def _separate(axis, methods):
    for i in range(1, len(methods)):
        if methods[i] != methods[i - 1]:
            axis.axhline(i - 0.5, color="white", linewidth=2)


def prevalence_curves(finished):
    """F1 against the prevalence of validation, one line a method; a panel a training proportion.

    Error bars at PREVALENCES: 95 % over images with one seed, else over seeds.
    """
    groups = settings(finished, lambda e: (e.backbone, e.proportion))
    backbones = list(dict.fromkeys(b for b, _ in groups))
    proportions = list(dict.fromkeys(p for _, p in groups))
    figure, axes = panels(len(backbones), len(proportions))
    grid, look = np.geomspace(0.005, 0.6, 25), looks(finished)
    for (backbone, proportion), entries in groups.items():
        axis = axes[backbones.index(backbone), proportions.index(proportion)]
        axis.plot(grid, 2 * grid / (1 + grid), ":", color="#999999", label="everything a defect")
        for i, (method, runs) in enumerate(settings(entries, lambda e: e.method).items()):
            lines = np.array([[e.scores.at(p)["f1"] for p in grid] for e in runs], float)
            colour = look[method][0]
            axis.plot(grid, lines.mean(axis=0), color=colour, label=method)
            found = [(p, estimate(runs, "f1", p)) for p in PREVALENCES]
            for p, f in found:
                if f.low is not None:
                    x = p * 1.03 ** (i - 3)  # side by side
                    axis.plot([x, x], [f.low, f.high], color=colour, linewidth=0.8)
        axis.set_title(f"{backbone_name(backbone)}, trained with {percent(proportion)}", fontsize=9)
        axis.set_xscale("log")
        axis.set_xticks(PREVALENCES, [percent(p) for p in PREVALENCES], fontsize=7)
        axis.minorticks_off()
        axis.set_ylim(0, 1)
    _labels(axes, "defects in validation", "F1")
    return with_legend(figure, axes)


def over_epochs(finished):
    """Figures 6 to 8: measures over epochs; a row a measure, a column a backbone."""
    keys = {"rankme_embeddings": "RankMe of embeddings"}
    keys |= {f"{m}_{k}": f"{m} of {k}" for k in ("features", "embeddings") for m in ("mean", "std")}
    backbones = list(settings(finished, lambda e: e.backbone))
    figure, axes = panels(len(keys), len(backbones), sharex="col", sharey="row")
    look, shade = looks(finished), shades(finished)
    for entry in finished:
        records = entry.epochs()
        for row, (key, name) in enumerate(keys.items()):
            axis = axes[row, backbones.index(entry.backbone)]
            x = [r["epoch"] + 1 for r in records]
            y = [r.get(f"label_free_{key}", np.nan) for r in records]
            colour, mark = look[entry.method]
            how = {"color": colour, "marker": mark, "markersize": 3, "label": entry.method}
            axis.plot(x, y, alpha=shade[percent(entry.proportion)], **how)
            axis.set_ylabel(name if axis in axes[:, 0] else "")
            axis.set_title(backbone_name(entry.backbone) if row == 0 else "")
            axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    return with_legend(figure, axes)


def measures_against_f1(finished):
    """Figures 9 and 10: each label-free measure against F1 on training views and on validation."""
    figure, axes = panels(2, len(DRAWN), sharey="row")
    look = looks(finished)
    for entry in finished:
        for column, measure in enumerate(DRAWN):
            value = measure.of(entry)
            for row, f1 in enumerate((entry.result["train"]["f1"], entry.at()["f1"])):
                if value is None or f1 is None:
                    continue
                colour, mark = look[entry.method]
                face = colour if entry.backbone == "resnet18" else "none"
                label = f"{entry.method}, {backbone_name(entry.backbone)}"
                how = {"marker": mark, "facecolors": face, "edgecolors": colour, "label": label}
                axes[row, column].scatter(value, f1, **how)
            share = ", share" if measure.key.startswith("rankme") else ""
            axes[1, column].set_xlabel(measure.name + share)
    axes[0, 0].set_ylabel("F1, training views")
    axes[1, 0].set_ylabel("F1, validation")
    return with_legend(figure, axes)


def recall_by_class(finished, rows):
    """Recall of each defect class in validation against its images in the training subset.

    rows: of class_recall.
    """
    backbones = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = panels(1, max(len(backbones), 1), sharey="row", height=3.4)
    look, shade = looks(finished), shades(finished)
    for backbone, method, proportion, _, _, trained, _, recall in rows:
        axis = axes[0, backbones.index(backbone)]
        if trained is not None and recall is not None:
            colour, mark = look[method]
            how = {"s": 14, "color": colour, "marker": mark, "label": method}
            axis.scatter(trained + 1, recall, alpha=shade[proportion], **how)
        axis.set_xscale("log")
        axis.set_title(backbone)
    _labels(axes, "images of the class in training, plus 1", "recall of the class")
    return with_legend(figure, axes)


def augmentation(finished):
    """Figure 3: validation F1 by t_val and min_scale; a panel a method, backbone and proportion."""
    groups = settings(finished, setting)
    figure, axes = panels(1, len(groups), height=3.6, width=5.2)
    for axis, (name, entries) in zip(axes[0], groups.items(), strict=True):
        aug = settings(entries, lambda e: e.run.cfg.augmentation)
        ys, xs = (sorted({getattr(a, key) for a in aug}) for key in ("t_val", "min_scale"))
        values = np.full((len(ys), len(xs)), np.nan)
        for a, of in settings(entries, lambda e: e.run.cfg.augmentation).items():
            mean = estimate(of, "f1").mean
            values[ys.index(a.t_val), xs.index(a.min_scale)] = np.nan if mean is None else mean
        image = axis.imshow(values, cmap="cividis", aspect="auto", origin="lower")
        _write_numbers(axis, values, ".3f", (np.nanmin(values) + np.nanmax(values)) / 2)
        axis.set_xticks(range(len(xs)), xs)
        axis.set_yticks(range(len(ys)), ys)
        axis.set_title(", ".join(in_print(*name)), fontsize=9)
        figure.colorbar(image, label="validation F1")
    _labels(axes, "min_scale: smallest crop, share of the image", "t_val: strength of the jitter")
    return figure


def panels(rows, columns, height=2.6, width=3.0, **how):
    """(figure, (rows, columns) axes); height, width: inches of a panel; how: for plt.subplots."""
    size = (1.2 + width * columns, 0.9 + height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **how)


def _labels(axes, x, y):
    for axis in axes[-1]:
        axis.set_xlabel(x)
    for axis in axes[:, 0]:
        axis.set_ylabel(y)


def with_legend(figure, axes):
    """One legend for all panels, below them."""
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(2, min(6, int(figure.get_size_inches()[0] / 1.6)))
    how = {"loc": "outside lower center", "ncols": columns, "fontsize": 8}
    legend = figure.legend(handles.values(), handles, **how)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return figure
