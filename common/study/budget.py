"""The label budget: how far labels go, from each start."""

from pathlib import Path

import numpy as np

from common.study.figures import panels
from common.study.results import settings
from common.study.tables import backbone_name


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
