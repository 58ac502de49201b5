"""The study's report: one page that works offline, its tables as CSV and LaTeX, its figures."""

import base64
import html
import io
from collections import Counter
from pathlib import Path

from common.running.errors import UserError
from common.running.keyed import SAMPLE_IMAGES, keyed_rng
from common.running.progress import Progress, say
from common.study import figures, tables
from common.study.classes import class_recall, samples
from common.study.measures import measures
from common.study.measures import runs as runs_of_settings
from common.study.overview import causes, correlations, label_budget, overview
from common.study.results import collect, paper_values, settings, with_variants

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 0 1rem }
h1, h2 { line-height: 1.2; margin-top: 2.5rem }
.wide { overflow-x: auto } .wide img { max-width: 100%; min-width: 40rem } figure { margin: 1rem 0 }
nav a { display: inline-block; margin: 0 1rem .2rem 0 } nav { font-size: 14px }
@media (max-width: 40rem) { nav { white-space: nowrap; overflow-x: auto } }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: 3px 9px; text-align: left; white-space: nowrap }
th { position: sticky; top: 0; background: #fff } p, figcaption { max-width: 46rem }
"""
SEWER_ML = 130_046  # validation images of it: then the paper's values mean something
MOST_ROWS, FIRST_ROWS = 60, 12  # of a longer table the first are shown, and all folded away
NOTES = """
The scores are of a binary decision, defect or normal. Validation scores are the {probe} probe's on
clean images; training scores are the online probe's over the last epoch, on augmented views, while
it learned. Other prevalences are in closed form from the rates of hits and false alarms: what large
subsets tend to (F2_CIW of small ones lies lower, as a class that is not drawn counts 0). Frames of
one video are not independent, so intervals over images are too narrow.
"""


class Page:
    """Collects sections; writes each table and figure to its own files too."""

    def __init__(self, folder):
        self.folder, self.parts, self.titles = Path(folder), [], []
        self.folder.mkdir(parents=True, exist_ok=True)

    def _add(self, title, content):
        self.titles.append(html.escape(title))
        self.parts.append(f"<h2 id=part{len(self.titles)}>{html.escape(title)}</h2>{content}")

    def add_text(self, title, text):
        """A heading and a paragraph."""
        self._add(title, f"<p>{html.escape(text)}</p>")

    def add_table(self, table):
        """NAME.csv and NAME.tex beside the page."""
        table.write_csv(self.folder / f"{table.name}.csv")
        table.write_latex(self.folder / f"{table.name}.tex")
        self.add_text(table.title, table.caption)
        files = f'<a href="{table.name}.csv">CSV</a> <a href="{table.name}.tex">LaTeX</a>'
        content = table.html()
        if len(table.rows) > MOST_ROWS:
            content = f"<details><summary>all {len(table.rows)} rows</summary>{content}</details>"
            content = table.html(FIRST_ROWS) + content
        self.parts.append(f"{content}<p>{files}</p>")

    def add_figure(self, name, title, caption, figure):
        """NAME.png and NAME.pdf beside the page, and the picture in it."""
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150)
        figure.savefig(self.folder / f"{name}.pdf")
        figures.plt.close(figure)
        (self.folder / f"{name}.png").write_bytes(picture.getvalue())
        data = base64.b64encode(picture.getvalue()).decode()
        self._add(
            title,
            '<figure><div class="wide">'
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
            f"</div><figcaption>{html.escape(caption)}</figcaption></figure>",
        )

    def write(self, title):
        """index.html; returns its path."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        links = (f"<a href=#part{i}>{name}</a>" for i, name in enumerate(self.titles, 1))
        intro, *parts = self.parts
        contents = f"{intro}<nav>{' '.join(links)}</nav>"
        body = f"<h1>{html.escape(title)}</h1>" + "\n".join([contents, *parts])
        path = self.folder / "index.html"
        path.write_text(f"<!doctype html><html lang=en>{head}<body>{body}</body></html>\n", "utf-8")
        return path


def write_report(runs, folder, probe="online", draws=0, paper=False):
    """runs: GridRuns, finished or not. Writes the page of what is there; returns its path.

    probe: a key of LOGITS, whose validation scores; draws: real subsets to draw a prevalence;
    paper: the paper's values beside ours also where the images are not Sewer-ML's.
    """
    finished, missing = collect(runs, probe)
    if not finished:
        why = [f"{name}: {why}" for name, why in missing.items() if why != "queued"]
        raise UserError("\n  ".join(["no run of this grid is finished:", *why]))
    page = Page(folder)
    page.parts.append(f"<p>{len(finished)} of {len(runs)} runs.</p>")
    for note, n in Counter(e.note for e in finished if e.note).items():
        page.parts.append(f"<p>{n} of these {html.escape(note)}</p>")

    def of(group):
        return [e for e in finished if group in e.run.groups]

    ablations = of("resolution"), of("augmentation")
    budget = [e for e in finished if any(g.startswith("labels") for g in e.run.groups)]
    many = [e for e in finished if any(g.startswith("label_free") for g in e.run.groups)]
    of_many = (g for e in many for g in e.run.groups if g.startswith("label_free"))
    apart = {"resolution", "augmentation", *of_many}
    main = [e for e in finished if set(e.run.groups) - apart]
    paper = paper_values() if paper or len(finished[0].scores.label) == SEWER_ML else None
    steps = list(_main_steps(page, with_variants(main), probe, draws, paper)) if main else []
    if budget:
        how = "label_budget", "AUROC by number of labels"
        caption = "Validation, at its own mix. A frozen encoder by its offline probe, a supervised "
        caption += "run by its head; a point is the mean over seeds, the band their range."
        steps.insert(0, lambda: page.add_figure(*how, caption, label_budget(budget)))
    if many:
        steps += _choice_steps(page, with_variants(many), "label_free_settings")
        steps.append(lambda: page.add_table(runs_of_settings(with_variants(many))))
    if ablations[0]:
        sizes = with_variants(ablations[0], but=["data.image_size"])
        steps.append(lambda: page.add_table(tables.resolution(sizes, paper)))
    if ablations[1]:
        how = "fig3_augmentation", "Figure 3: augmentation"
        caption = f"Validation F1 by the {probe} probe. The scale is the panel's own."
        views = with_variants(ablations[1], but=["augmentation.t_val", "augmentation.min_scale"])
        steps.append(lambda: page.add_figure(*how, caption, figures.augmentation(views)))
    progress = Progress(len(steps), "report", "parts")
    for step in steps:
        try:
            step()
        except UserError as error:  # of the images or annotations: they may be elsewhere
            page.add_text("A part that could not be made", f"It shows images or labels. {error}")
        progress.update()
    progress.close()
    if missing:
        page.add_text("Missing runs", f"{len(missing)} of {len(runs)} runs are not in this report.")
        rows = "".join(
            f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in missing.items()
        )
        page.parts.append(f"<details><summary>Their names</summary><ul>{rows}</ul></details>")
    path = page.write("Which self-supervised features reveal rare defects?")
    say(f"{path}: {len(finished)} of {len(runs)} runs")
    return path


def _main_steps(page, main, probe, draws, paper):
    """One call a part of the page about methods, proportions and backbones."""
    yield lambda: page.add_figure(
        "overview",
        "Who sees the defects",
        f"AUROC of the {probe} probe on clean validation images, with 95 % intervals over seeds "
        "(t), or with one seed over images; the stronger the more defects in training. What is "
        "learned is what lies above the random encoder. The diamonds need no label of a defect.",
        overview(main),
    )
    yield lambda: page.parts.append(f"<p>{html.escape(NOTES.format(probe=probe))}</p>")
    for split in ("val", "train"):
        yield lambda s=split: page.add_table(tables.performance(main, s, paper))
    yield lambda: page.add_table(tables.differences(main))
    yield lambda: page.add_table(tables.probes(main))
    yield lambda: page.add_table(tables.normal_only(main))
    if taken_apart := causes(with_variants(main, but=["data.subset_size"])):
        yield lambda: page.add_figure(
            "causes",
            "What fewer defects cost, taken apart",
            "AUROC of offline probes against the proportion in pre-training. With fewer defects a "
            "run pre-trains on fewer, its own probe learns from fewer labels, and the largest "
            "subset of that proportion has fewer images: each column keeps something the same. "
            "Mean over seeds, the band their range.",
            taken_apart,
        )
    for backbone, entries in settings(main, lambda e: e.backbone).items():
        name = tables.backbone_name(backbone)
        for part, metrics in (
            ("", tables.OF_FIGURE_2),
            ("_more", ("precision", "recall", "f2_ciw_strict")),
        ):
            yield lambda e=entries, b=backbone, n=name, p=part, m=metrics: page.add_figure(
                f"heatmap_{b}{p}",
                f"{n}: training against validation proportion" + (", more scores" if p else ""),
                f"The paper's Figures 2, 4 and 5. The {probe} probe on clean validation images, "
                "every prevalence in closed form, mean over seeds. All panels share one scale.",
                figures.heatmaps(e, m),
            )
    yield lambda: page.add_figure(
        "f1_by_prevalence",
        "F1 by prevalence",
        f"The {probe} probe on clean validation images. Upright lines: 95 % intervals, over seeds "
        "(t), or with one seed over images.",
        figures.prevalence_curves(main),
    )
    yield lambda: page.add_table(tables.matrix(main, paper))
    if draws:
        yield lambda: page.add_table(tables.subsets(main, draws))
    yield lambda: page.add_figure(
        "label_free_over_epochs",
        "Label-free measures over epochs",
        "Figures 6 to 8, on clean validation images in eval mode; one line a run, the stronger the "
        "more defects were in its training. Embeddings after L2 normalisation, times sqrt(K).",
        figures.over_epochs(main),
    )
    yield lambda: page.add_figure(
        "label_free_against_f1",
        "Label-free measures against F1",
        f"Figures 9 and 10. A point a run; filled: ResNet-18, open: ViT-Tiny. F1 on training views "
        f"is the online probe's over the last epoch, on validation the {probe} probe's. Compare "
        "runs of one method: over several such a measure means nothing.",
        figures.measures_against_f1(main),
    )
    yield from _choice_steps(page, main)
    classes = class_recall(main)
    yield lambda: page.add_figure(
        "recall_by_class",
        "Recall by defect class",
        f"The {probe} probe on clean validation images, a point a class and run, against the "
        "images of that class in the run's training subset; the stronger the more defects in it.",
        figures.recall_by_class(main, classes.rows),
    )
    yield lambda: page.add_table(classes)
    yield lambda: page.add_figure(
        "samples",
        "Sample images by defect class",
        "Table 5 and Figure 1: images of the training and the validation CSV, drawn at random.",
        samples(main[0].run.cfg.data, lambda n: keyed_rng(SAMPLE_IMAGES, n)),
    )


def _choice_steps(page, entries, name="label_free"):
    """What tells good runs from bad: the picture and the table."""
    table = measures(entries, name)
    if any(row[5] is not None and row[1] != "pooled" for row in table.rows):
        yield lambda: page.add_figure(
            f"{name}_correlations",
            f"{table.title}: the picture",
            "Rank correlation of each measure, turned so that more should be better, with average "
            "precision by the probe on fixed labels; lines: 95 % of bootstrap samples of settings. "
            "In brackets what a measure needs. An interval across 0, or none, tells nothing.",
            correlations(table.rows),
        )
    yield lambda: page.add_table(table)
