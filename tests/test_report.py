"""The report on complete, incomplete and broken run folders; made up here, not trained."""

import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, write_set
from scipy import stats
from small import make_narrow, make_up, read_log
from small import run as trained

import lejepa
from common.metrics import METRICS, all_scores, at_prevalence
from common.running.config import read_config
from common.running.errors import UserError
from common.running.folder import read_json, write_json
from common.study.classes import class_recall
from common.study.cost import TimeLeft
from common.study.evaluate import draw_subsets, load_scores
from common.study.figures import (
    augmentation,
    heatmaps,
    measures_against_f1,
    over_epochs,
    prevalence_curves,
    recall_by_class,
)
from common.study.grid import read_grid
from common.study.measures import MEASURES, measures, rank_correlations, scaled_loss, target
from common.study.measures import runs as runs_of_settings
from common.study.overview import causes, correlations, label_budget, overview
from common.study.report import write_report
from common.study.results import (
    Estimate,
    Finished,
    _over_seeds,
    collect,
    difference,
    estimate,
    paper_values,
    with_variants,
)
from common.study.tables import (
    SETTING,
    in_print,
    normal_only,
    performance,
    probes,
    resolution,
    setting,
)

PAPER = ROOT / "configs/grid/paper.yaml"
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


def paper_runs(tmp_path, tiny_set, *overrides):
    return read_grid(PAPER, [*tiny_set, f"run.output_dir={tmp_path / 'runs'}", *overrides])


@pytest.fixture(scope="module")
def complete(tmp_path_factory, tiny_set):
    """(runs of the paper's grid, all finished, folder of the report)."""
    tmp_path = tmp_path_factory.mktemp("complete")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        runs = paper_runs(tmp_path, tiny_set, "data.train_defect_proportion=[0.05, 0.45]")
        rng = np.random.default_rng(0)
        for run in runs:
            make_up(run, rng)
        write_report(runs, tmp_path / "report", draws=3, paper=True)
    return runs, tmp_path / "report"


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_complete_grid_gives_every_table_and_figure(complete):
    runs, folder = complete
    assert len(runs) == 11 * 2 + 2 * 2 + 10 + 35
    names = {p.name for p in folder.iterdir()}
    tables = ("performance_val", "performance_train", "resolution", "label_free", "subsets")
    tables += ("matrix", "class_recall", "probes", "differences")
    assert {f"{t}.{kind}" for t in tables for kind in ("csv", "tex")} <= names
    figures = ("heatmap_resnet18", "heatmap_vit_tiny", "heatmap_resnet18_more", "fig3_augmentation")
    figures += ("f1_by_prevalence", "label_free_over_epochs", "label_free_against_f1", "samples")
    figures += ("recall_by_class", "overview", "causes")
    assert {f"{f}.{kind}" for f in figures for kind in ("png", "pdf")} <= names
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 12 and "Missing runs" not in page
    assert not re.search(r'(src|href)="(?!data:|[\w.]+")', page)  # works offline
    places, links = (re.findall(rf"<{tag}=#?part(\d+)>", page) for tag in ("h2 id", "a href"))
    assert len(places) > 20 and places == links


def test_drawn_subsets_stand_beside_the_closed_form(complete):
    runs, folder = complete
    rows = read_csv(folder / "subsets.csv")
    assert len(rows) == (11 + 2) * 2 * 5  # settings times prevalences
    (run,) = [r for r in runs if r.name.startswith("simclr_vit_tiny_p45")]
    scores = load_scores(run.folder)
    at = {"method": "simclr", "backbone": "ViT-Tiny", "defects in training": "45 %"}
    found = [r for r in rows if at.items() <= r.items()]
    assert [r["defects in validation"] for r in found] == ["1 %", "2 %", "5 %", "15 %", "45 %"]
    assert float(found[3]["F1"]) == scores.at(0.15)["f1"]
    drawn = draw_subsets(scores, 0.15, 3)["f1"]
    spread = [float(found[3][f"F1, {what} of draws"]) for what in ("mean", "std")]
    assert spread == pytest.approx([drawn.mean(), drawn.std()])


def test_the_report_is_by_the_probe_that_was_asked_for(complete):
    runs, _ = complete
    splits = {"online": "val", "offline": "val_offline", "offline_fixed": "val_offline_fixed"}
    for probe, key in splits.items():
        finished, missing = collect(runs[:3], probe)
        assert len(finished) == 3 and not missing
        for entry in finished:
            result = json.loads((entry.run.folder / "result.json").read_text())
            assert estimate([entry], "f1").mean == result[key]["f1"]
            assert entry.at()["auroc"] == result[key]["auroc"]
            assert estimate([entry], "f1", split="train").mean == result["train"]["f1"]
    assert len({result[key]["auroc"] for key in splits.values()}) == 3


def test_the_three_probes_stand_side_by_side(complete):
    runs, folder = complete
    rows, entries = read_csv(folder / "probes.csv"), collect(runs[:1])[0]
    (row,) = [
        r
        for r in rows
        if all(r[k] == v for k, v in zip(r, in_print(*setting(entries[0])), strict=False))
    ]
    result = entries[0].result
    for name, key in (("online", "val"), ("offline, fixed labels", "val_offline_fixed")):
        assert float(row[name]) == result[key]["auroc"]
    without = {k: v for k, v in result.items() if k != "val_offline_fixed"}  # an earlier release's
    older = dataclasses.replace(entries[0], result=without)
    assert probes([older]).rows[0][-1] is None


def test_scores_that_need_normals_only_have_a_table(complete):
    runs, folder = complete
    rows, (entry, *_) = read_csv(folder / "normal_only.csv"), collect(runs[:1])[0]
    (row,) = [
        r
        for r in rows
        if all(r[k] == v for k, v in zip(r, in_print(*setting(entry)), strict=False))
    ]
    found = entry.result["val_normal_only"]
    for name in ("knn", "mahalanobis"):
        assert float(row[f"AUROC, {name}"]) == found[name]["auroc"]
        assert float(row[f"average precision, {name}"]) == found[name]["average_precision"]
    assert float(row["AUROC, offline probe"]) == entry.result["val_offline"]["auroc"]
    without = {k: v for k, v in entry.result.items() if k != "val_normal_only"}
    older = dataclasses.replace(entry, result=without)
    assert normal_only([older]).rows[0][4:8] == [None] * 4


def test_numbers_stand_beside_the_papers(complete):
    runs, folder = complete
    rows = read_csv(folder / "performance_val.csv")
    (row,) = [
        r
        for r in rows
        if (r["backbone"], r["method"], r["defects in training"]) == ("ResNet-18", "simclr", "45 %")
    ]
    (run,) = [r for r in runs if r.name.startswith("simclr_resnet18_p45")]
    ours = json.loads((run.folder / "result.json").read_text())["val"]["f1"]
    assert float(row["F1"]) == ours and float(row["F1, paper"]) == 0.814
    assert float(row["F1, difference"]) == pytest.approx(ours - 0.814)
    assert float(row["F1 low"]) < ours < float(row["F1 high"])
    assert [r["method"] for r in rows if r["backbone"] == ""] == ["everything a defect"]
    assert float(rows[-1]["recall"]) == 1 and float(rows[-1]["precision"]) == pytest.approx(8 / 24)
    latex = (folder / "performance_val.tex").read_text()
    assert latex.count(r"\\") == len(rows) + 1 and "45 \\%" in latex


def test_every_score_of_a_table_is_the_runs(complete):
    """Of each setting, metric and prevalence; at one seed no mean is taken."""
    runs, folder = complete
    entries = [e for e in collect(runs)[0] if {"methods", "random"} & set(e.run.groups)]
    assert len(entries) == 13 * 2
    tables = {name: read_csv(folder / f"{name}.csv") for name in ("matrix", "class_recall")}
    for split in ("train", "val"):
        tables[split] = read_csv(folder / f"performance_{split}.csv")
    for entry in entries:
        keys = dict(zip(SETTING, in_print(*setting(entry)), strict=True))
        of = {name: [r for r in rows if keys.items() <= r.items()] for name, rows in tables.items()}
        with np.load(entry.run.folder / "val_scores.npz") as stored:
            logit, label, classes = (stored[name] for name in ("logit", "label", "classes"))
            how = logit, label, classes, list(map(str, stored["class_names"]))
        for split in ("train", "val"):
            (row,) = of[split]
            same_number(row, entry.result[split])
        assert len(of["matrix"]) == 5
        for row, p in zip(of["matrix"], (0.01, 0.02, 0.05, 0.15, 0.45), strict=True):
            assert row["defects in validation"] == f"{100 * p:g} %"
            same_number(row, all_scores(*how, p))
        for row, is_of in zip(of["class_recall"], classes.T.astype(bool), strict=True):
            recall = (logit[is_of & (label == 1)] >= 0).mean()
            assert float(row["recall"]) == pytest.approx(recall)
            assert int(row["in validation"]) == (is_of & (label == 1)).sum()
    sizes = read_csv(folder / "resolution.csv")
    for entry in (e for e in collect(runs)[0] if "resolution" in e.run.groups):
        pixels, backbone = entry.run.cfg.data.image_size, in_print(*setting(entry))[0]
        at = [r for r in sizes if (r["pixels"], r["backbone"]) == (str(pixels), backbone)]
        (row,) = [r for r in at if r["defects in training"] == in_print(*setting(entry))[2]]
        assert float(row["F1"]) == entry.result["val"]["f1"]
        assert float(row["minutes an epoch"]) == pytest.approx(0.1)  # 60 s for 10 epochs


def same_number(row, scores):
    for metric, name in METRICS.items():
        assert (float(row[name]) if row[name] else None) == pytest.approx(scores[metric]), name


def drawn(complete):
    runs, _ = complete
    return [e for e in collect(runs)[0] if is_main(e, "resnet18", e.proportion)]


def test_a_heatmap_shows_the_scores(complete):
    entries = drawn(complete)
    axes = heatmaps(entries, ["f1", "f2_ciw_strict"]).axes[:2]
    names = [text.get_text() for text in axes[0].get_yticklabels()]
    assert names == [f"{e.method} {100 * e.proportion:g} %" for e in entries] and len(names) == 12
    for axis, metric in zip(axes, ("f1", "f2_ciw_strict"), strict=True):
        shown = np.array(axis.get_images()[0].get_array())
        written = np.reshape([text.get_text() for text in axis.texts], shown.shape)
        for i, e in enumerate(entries):
            expected = [100 * e.scores.at(p)[metric] for p in (0.01, 0.02, 0.05, 0.15, 0.45)]
            assert shown[i].tolist() == pytest.approx(expected)
            assert written[i].tolist() == [f"{x:.1f}" for x in expected]


def test_curves_show_the_scores(complete):
    entries = drawn(complete)
    figure = prevalence_curves(entries)
    assert len(figure.axes) == 2
    for axis, proportion in zip(figure.axes, (0.05, 0.45), strict=True):
        assert axis.get_title().endswith(f"{100 * proportion:g} %")
        lines = {k: v for k, v in lines_of(axis).items() if not k.startswith("_")}
        x, y = np.transpose(lines.pop("everything a defect"))
        precision = x  # recall is 1
        assert y == pytest.approx(2 * precision / (1 + precision))
        assert set(lines) == {e.method for e in entries}
        for e in (e for e in entries if e.proportion == proportion):
            x, y = np.transpose(lines[e.method])
            assert y == pytest.approx([e.scores.at(p)["f1"] for p in x])


def test_measures_are_drawn_over_epochs_and_against_scores(complete):
    entries = drawn(complete)[:2]
    figure = over_epochs(entries)
    keys = ["rankme_embeddings", "mean_features", "std_features"]
    keys += ["mean_embeddings", "std_embeddings"]
    for axis, key in zip(figure.axes, keys, strict=True):
        for line, e in zip(axis.get_lines(), entries, strict=True):
            log = [r for r in read_log(e.run.folder) if r["kind"] == "epoch"]
            expected = [[r["epoch"] + 1, r[f"label_free_{key}"]] for r in log]
            assert line.get_xydata().tolist() == expected and len(expected) == 2
    axes = np.reshape(measures_against_f1(entries).axes, (2, 3))
    keys = ["rankme_embeddings", "rankme_features", "std_embeddings"]
    for column, key in zip(axes.T, keys, strict=True):
        shares = [e.result["label_free"][key] for e in entries]
        shares = [x / 128 if "rankme" in key else x for x in shares]
        for axis, split in zip(column, ("train", "val"), strict=True):
            points = [scatter.get_offsets()[0].tolist() for scatter in axis.collections]
            f1 = [e.result[split]["f1"] for e in entries]
            assert points == [pytest.approx(point) for point in zip(shares, f1, strict=True)]


def test_augmentations_and_classes_are_drawn_where_they_belong(complete):
    runs, _ = complete
    entries = [e for e in collect(runs)[0] if "augmentation" in e.run.groups]
    axis = augmentation(entries).axes[0]
    shown = np.array(axis.get_images()[0].get_array())
    xs, ys = (
        [float(t.get_text()) for t in f()] for f in (axis.get_xticklabels, axis.get_yticklabels)
    )
    assert xs == sorted(xs) and ys == sorted(ys) and shown.shape == (len(ys), len(xs))
    for e in entries:
        aug = e.run.cfg.augmentation
        at = ys.index(aug.t_val), xs.index(aug.min_scale)
        assert shown[at] == pytest.approx(e.result["val"]["f1"])
    entries = drawn(complete)[:1]
    rows = class_recall(entries).rows
    (axis,) = recall_by_class(entries, rows).axes
    points = [scatter.get_offsets()[0].tolist() for scatter in axis.collections]
    counts = entries[0].class_counts()
    assert points == [[counts[row[4]] + 1, pytest.approx(row[7])] for row in rows] and points


def test_an_incomplete_or_broken_grid_gives_what_is_there_and_names_the_gaps(tmp_path, tiny_set):
    runs = paper_runs(tmp_path, tiny_set, "data.train_defect_proportion=0.45")
    runs = [run for run in runs if set(run.groups) & {"methods", "random"}]
    with pytest.raises(UserError, match="no run of this grid is finished:$"):
        write_report(runs, tmp_path / "report")
    elsewhere = paper_runs(tmp_path, tiny_set, "optimization.epochs=11")[:2]
    for run in elsewhere:
        make_up(run, RNG)
    with pytest.raises(UserError, match=f"{tmp_path / 'runs'}: 2 finished runs of other settings"):
        write_report(runs, tmp_path / "report")
    for run in runs[:8]:
        make_up(run, np.random.default_rng(1))
    for run, damage in zip(runs[:2], ("{", '{"val": {"f1": 1}}'), strict=True):
        (run.folder / "result.json").write_text(damage)
    scores = runs[2].folder / "val_scores.npz"
    scores.write_bytes(scores.read_bytes()[:-100])
    (runs[3].folder / "log.jsonl").unlink()
    (runs[4].folder / "log.jsonl").write_text('{"kind": "epo\n{}\n')
    (runs[6].folder / "log.jsonl").write_text('{"kind": "epoch", "epoch": 3, "label_free_n": 9}\n')
    finished, missing = collect(runs)
    assert [e.run for e in finished] == runs[5:8]
    for run in (*runs[:2], *runs[3:5]):
        assert "damaged" in missing[run.name]
    assert "val_scores.npz" in missing[runs[2].name] and missing[runs[9].name] == "queued"
    page = write_report(runs, tmp_path / "report").read_text()
    assert "Missing runs" in page and all(run.name in page for run in runs[8:])
    assert f"3 of {len(runs)} runs" in page and "could not be made" not in page
    assert TimeLeft(runs).seconds()[1] == len(runs) - 5  # what is damaged is still to do


def test_without_the_data_the_report_leaves_out_only_what_shows_them(tmp_path):
    mine = write_set(tmp_path / "set")
    runs = paper_runs(tmp_path, mine, "data.train_defect_proportion=0.45")[:1]
    make_up(runs[0], RNG)
    (tmp_path / "set/val.csv").unlink()
    page = write_report(runs, tmp_path / "report").read_text()
    assert "could not be made" in page and "set/val.csv: cannot be read" in page
    assert "1 of these not compared with" in page  # nobody knows whether these are its images
    assert (tmp_path / "report/heatmap_resnet18.png").exists()


def test_different_experiments_are_not_averaged_as_seeds(tmp_path, tiny_set):
    axes = {"seed": [1, 2], "optimization.epochs": [10, 20]}
    group = {"configs": ["configs/simclr_r18.yaml"], "axes": axes, "overrides": {}}
    grid = {"overrides": {"run.output_dir": str(tmp_path / "runs")}, "groups": {"mine": group}}
    (tmp_path / "g.yaml").write_text(json.dumps(grid))
    runs = read_grid(tmp_path / "g.yaml", tiny_set)
    for run in runs:
        make_up(run, RNG)
    finished = with_variants(collect(runs)[0])
    *rows, floor = performance(finished, "val").rows
    assert [row[1] for row in rows] == [f"simclr, optimization.epochs={n}" for n in (10, 20)]
    assert [row[3] for row in rows] == [2, 2]
    rows = resolution(with_variants(collect(runs)[0], ["optimization.epochs"])).rows
    assert [row[1] for row in rows] == ["simclr"]  # told that these may differ
    page = write_report(runs, tmp_path / "report").read_text()  # a group of another name
    assert page.count("simclr, optimization.epochs=20") > 2


def test_over_seeds_there_is_a_mean_and_a_t_interval(tmp_path, tiny_set):
    runs = paper_runs(tmp_path, tiny_set, "data.train_defect_proportion=0.45", "seed=[1, 2, 3]")
    runs = [run for run in runs if run.name.startswith("simclr_resnet18")]
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
    finished, _ = collect(runs)
    values = [e.result["val"]["f1"] for e in finished]
    found = estimate(finished, "f1")
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.seeds) == (pytest.approx(np.mean(values)), 3)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    (row, _) = performance(finished, "val").rows
    assert row[3] == 3 and str(row[6]) == str(found)


def test_intervals_over_any_number_of_seeds_are_students():
    for n in range(2, 31):
        values = np.random.default_rng(n).normal(size=n)
        low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        found = _over_seeds(list(values))
        assert (found.mean, found.seeds) == (pytest.approx(values.mean()), n)
        assert found.high - found.low == pytest.approx(high - low, rel=0.002)


def test_pairs_of_runs_are_compared_on_the_same_images(complete):
    runs, folder = complete
    rows = read_csv(folder / "differences.csv")
    assert len(rows) == 2 * (15 + 21 + 6)  # pairs of 6 methods, of 7, and of the 6 that both have
    at = {"defects in training": "45 %", "this": "simclr, ViT-Tiny", "less this": "mae, ViT-Tiny"}
    (row,) = [r for r in rows if at.items() <= r.items()]
    by_name = {f"{e.method}, ViT-Tiny": e for e in collect(runs)[0] if is_main(e, "vit_tiny", 0.45)}
    one, other = by_name[at["this"]], by_name[at["less this"]]
    assert float(row["AUROC"]) == one.at()["auroc"] - other.at()["auroc"] and row["seeds"] == "1"
    drawn = one.resampled("auroc") - other.resampled("auroc")
    expected = [float(np.percentile(drawn, q)) for q in (2.5, 97.5)]
    assert [float(row[f"AUROC {end}"]) for end in ("low", "high")] == expected


def is_main(entry, backbone, proportion):
    where = entry.backbone == backbone and entry.proportion == proportion
    return where and bool({"methods", "random"} & set(entry.run.groups))


def test_a_difference_over_seeds_has_a_t_interval_of_those_that_both_have(tmp_path, tiny_set):
    runs = paper_runs(tmp_path, tiny_set, "data.train_defect_proportion=0.45", "seed=[1, 2, 3]")
    runs = [run for run in runs if re.match("(simclr|byol)_resnet18", run.name)]
    runs = [run for run in runs if "methods" in run.groups]
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
    finished, _ = collect(runs)
    one, other = ([e for e in finished if e.method == name] for name in ("simclr", "byol"))
    by_seed = {e.result["seed"]: e for e in other}
    values = [a.at()["auroc"] - by_seed[a.result["seed"]].at()["auroc"] for a in one[1:]]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(values), scale=stats.sem(values))
    found = difference(one[1:], other[::-1], "auroc")
    assert (found.mean, found.seeds) == (pytest.approx(np.mean(values)), 2)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    assert difference(one[:1], other[1:], "auroc") is None  # no seed in both
    scores = dataclasses.replace(other[0].scores, label=1 - other[0].scores.label)
    elsewhere = dataclasses.replace(other[0])
    elsewhere.__dict__["scores"] = scores  # of other images
    assert difference(one[:1], [elsewhere], "auroc") is None


def test_scores_at_other_prevalences_come_from_what_is_stored(complete):
    runs, _ = complete
    entry = Finished(runs[0], json.loads((runs[0].folder / "result.json").read_text()), "online")
    with np.load(runs[0].folder / "val_scores.npz") as stored:
        how = stored["classes"], [str(n) for n in stored["class_names"]]
        expected = at_prevalence(stored["logit"], stored["label"], 0.02, *how)
    assert entry.scores.at(0.02) == entry.at(0.02) == expected
    assert sum(entry.class_counts().values()) > 0


@pytest.mark.parametrize("n", [3, 5, 6, 10, 60])
def test_rank_correlations_are_the_librarys(n):
    rng = np.random.default_rng(n)
    x, y = rng.permutation(n) // 2, rng.integers(0, 8, n) + rng.random(n).round(1)
    rho, tau, regret = rank_correlations(x, y)
    assert rho.mean == pytest.approx(stats.spearmanr(x, y)[0])
    assert tau.mean == pytest.approx(stats.kendalltau(x, y)[0])
    if n < 6:  # too few to know how sure one is
        assert (rho.low, rho.high, tau.low, tau.high) == (None,) * 4
    else:
        assert -1 <= rho.low <= rho.mean <= rho.high <= 1 and tau.low < tau.high
    assert regret == pytest.approx(
        y.max() - np.mean([b for a, b in zip(x, y, strict=True) if a == max(x)])
    )


def test_the_order_of_runs_decides_nothing():
    assert rank_correlations([2, 2, 1], [0.1, 0.9, 0.2])[2] == pytest.approx(0.4)
    assert rank_correlations([2, 2, 1], [0.9, 0.1, 0.2])[2] == pytest.approx(0.4)
    assert rank_correlations([2, 1], [0.5, 0.4], best=0.9)[2] == pytest.approx(0.4)


def test_seeds_of_a_setting_are_drawn_together():
    """Three equal seeds of each of eight settings tell no more than the eight."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 8))
    once, of_seeds = rank_correlations(x, y), [np.repeat(v, 3) for v in (x, y, np.arange(8))]
    for one, thrice in zip(once, rank_correlations(*of_seeds), strict=True):
        values = [(v.mean, v.low, v.high) if isinstance(v, Estimate) else v for v in (one, thrice)]
        assert values[0] == pytest.approx(values[1])
    apart = rank_correlations(*of_seeds[:2])[0]
    assert apart.high - apart.low < 0.8 * (once[0].high - once[0].low)


def test_the_interval_of_a_correlation_is_the_bootstraps():
    rng = np.random.default_rng(1)
    x = rng.normal(size=25)
    y = x + rng.normal(size=25)
    rho, tau, _ = rank_correlations(x, y)
    draws = [rng.integers(0, 25, 25) for _ in range(2000)]
    for found, library in ((rho, stats.spearmanr), (tau, stats.kendalltau)):
        expected = np.percentile([library(x[i], y[i])[0] for i in draws], (2.5, 97.5))
        assert (found.low, found.high) == pytest.approx(expected, abs=0.06)


def test_without_a_choice_there_is_no_correlation_and_no_regret():
    assert rank_correlations([1, 1, 1], [1, 2, 3])[:2] == [None, None]
    assert rank_correlations([3, 1], [0.5, 0.9]) == [None, None, pytest.approx(0.4)]
    assert rank_correlations([1], [0.5]) == [None, None, None]
    assert rank_correlations([3, 1, 2], [0.5, 0.9, 0.7])[2] == pytest.approx(0.4)


def of_label_free(tmp_path, tiny_set, change):
    """Two methods' five finished runs each and their controls, after change(result, i)."""
    runs = [r for r in paper_runs(tmp_path, tiny_set) if set(r.groups) & {"methods", "random"}]
    runs = [r for r in runs if r.cfg.method in ("simclr", "dino") and r.cfg.backbone == "resnet18"]
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
        result = json.loads((run.folder / "result.json").read_text())
        change(result, i)
        write_json(run.folder / "result.json", result)
    return collect(runs)[0]


def test_a_measure_counts_within_a_method_and_pooling_misleads(tmp_path, tiny_set):
    """Within each method RankMe follows the score; the better method has the lower one."""

    def change(result, i):
        better = result["method"] == "dino"
        score = 0.3 + 0.5 * better + i / 100
        result["val_offline_fixed"]["average_precision"] = score
        measures = result["label_free"] | {"rankme_embeddings": 64 * (score - 0.75 * better)}
        measures["rankme_embeddings_largest"] = 128
        result["label_free"] = measures | {"sigreg_embeddings": 1 - score}
        result["label_free"] |= {"alpha_req_embeddings": 1 + (1 - score) * (-1) ** i}

    finished = of_label_free(tmp_path, tiny_set, change)
    rows = {(r[1], r[2]): r[4:] for r in measures(finished).rows}
    assert {method for method, _ in rows} == {"simclr", "dino", "pooled"}  # without the controls
    for method in ("simclr", "dino"):
        for name in ("RankMe", "SIGReg", "alpha-ReQ, ranks 4 to 100"):
            n, rho, tau, regret = rows[method, f"{name}, embeddings"]
            assert (n, rho.mean, tau.mean, regret) == (5, pytest.approx(1), pytest.approx(1), 0)
        n, _, _, regret = rows[method, "a run at random"]
        assert regret == pytest.approx(0.02) and n == 5
    n, rho, _, regret = rows["pooled", "RankMe, embeddings"]
    assert n == 10 and rho.mean < 0 and regret > 0.4
    assert rows["pooled", "SIGReg, embeddings"][1].mean == pytest.approx(1)


def test_every_measure_of_a_run_is_in_the_table(tmp_path, tiny_set):
    make_narrow()
    try:
        folder = trained("lejepa", tmp_path, tiny_set, "real")
    finally:
        make_narrow(False)
    cfg = read_config(lejepa.Config, folder / "config.yaml", [])
    of = [dataclasses.replace(cfg, seed=seed) for seed in (1, 2)]
    of.append(
        dataclasses.replace(cfg, ssl_settings=dataclasses.replace(cfg.ssl_settings, lambda_=0.5))
    )
    of.append(
        dataclasses.replace(cfg, augmentation=dataclasses.replace(cfg.augmentation, t_val=0.7))
    )
    result = read_json(folder / "result.json")
    entries = [Finished(SimpleNamespace(folder=folder, cfg=c), result, "") for c in of]
    rows = {row[2]: row for row in measures(entries).rows}
    assert {m.name for m in MEASURES} <= set(rows) and target(entries[0]) is not None
    loss = read_log(folder, "epoch")[-1]["loss"]
    (found,) = (m.goodness(entries[0]) for m in MEASURES if m.name == "training loss")
    assert found == -loss and scaled_loss(entries[2]) == pytest.approx(-loss / 0.5**0.4)
    assert rows["training loss / lambda^0.4"][3:5] == ["nothing", 4]
    apart = {name: row[4] for name, row in rows.items() if name.endswith("of one augmentation")}
    assert len(apart) == 7 and set(apart.values()) == {3}  # LiDAR, alignment, losses
    assert apart.keys() >= {
        "training loss, of one augmentation",
        "LiDAR, features, of one augmentation",
    }
    assert not any("lambda" in row[2] for row in measures(entries[:2]).rows)  # fixed, it is void
    (row,) = runs_of_settings(entries[:1]).rows
    named = dict(zip(runs_of_settings(entries[:1]).header, row, strict=True))
    steps = [r for r in read_log(folder, "step") if r["epoch"] == result["epochs"] - 1]
    assert named["sigreg"] == pytest.approx(np.mean([r["diagnostics"]["sigreg"] for r in steps]))


GOOD = {  # which end should be good, as their authors say: 1 high, -1 low, 0 near 1
    **{"RankMe": 1, "RankMe, centred": 1, "stable rank": 1, "participation ratio": 1},
    **{"alpha-ReQ, ranks 4 to 100": 0, "alpha-ReQ, all ranks": 0, "std": 1, "LiDAR": 1},
    **{"alignment": -1, "uniformity": -1, "SIGReg": -1, "training loss": -1},
    **{"loss on held-out views": -1, "AUROC of knn": 1, "AUROC of Mahalanobis": 1},
    **{"margin of classes": 1, "purity of neighbours": 1},
}


def test_measures_are_turned_so_that_more_should_be_better():
    names = [re.sub(", (features|embeddings)(, defects alone)?$", "", m.name) for m in MEASURES]
    assert set(names) == set(GOOD)
    for name, measure in zip(names, MEASURES, strict=True):
        found = {}
        for value in (0.4, 0.9, 1.3):
            number = {measure.key: value, f"{measure.key.removesuffix('_centred')}_largest": 1}
            for part in reversed(measure.part.split(".")):
                number = {part: number}
            log = [number.get("log", {})]
            found[value] = measure.goodness(
                SimpleNamespace(result=number, epochs=lambda of=log: of)
            )
        order = {1: [0.4, 0.9, 1.3], -1: [1.3, 0.9, 0.4], 0: [0.4, 1.3, 0.9]}[GOOD[name]]
        assert sorted(found, key=found.get) == order, measure.name


def test_a_measure_that_the_best_run_lacks_does_not_look_perfect(tmp_path, tiny_set):
    def change(result, i):
        result["val_offline_fixed"]["average_precision"] = 0.9 - i % 5 / 10
        result["label_free"]["lidar_features"] = None if i % 5 == 0 else 10.0 - i % 5

    rows = {(r[1], r[2]): r[4:] for r in measures(of_label_free(tmp_path, tiny_set, change)).rows}
    n, rho, _, regret = rows["simclr", "LiDAR, features"]
    assert (n, rho.mean, regret) == (4, pytest.approx(1), pytest.approx(0.1))
    assert ("simclr", "a run of the most epochs") not in rows  # all ran as long


def test_the_papers_values_are_complete_and_consistent():
    values = paper_values()
    assert len(values) == 550 + 50 + 10 + 225  # 50: those of the MAE that was a random ViT
    random = {key: value for key, value in values.items() if key[2] == "random"}
    assert random == {k: values[(*k[:2], "mae", *k[3:])] for k in random} and len(random) == 50
    for key, precision in values.items():
        table, backbone, method, split, metric, p, at = key
        if metric != "precision":
            continue
        recall, f1 = (values[(table, backbone, method, split, m, p, at)] for m in ("recall", "f1"))
        if precision + recall:
            assert f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=0.006), (
                key
            )


def test_a_grid_of_many_settings_is_a_choice_among_them(tmp_path, tiny_set):
    words = [*tiny_set, f"run.output_dir={tmp_path / 'runs'}"]
    runs = read_grid(ROOT / "configs/grid/label_free.yaml", words)
    for i, run in enumerate(runs):
        make_up(run, np.random.default_rng(i))
    page = write_report(runs, tmp_path / "report").read_text()
    assert "Choosing without labels, among settings" in page and "Tables 1, 3" not in page
    rows = read_csv(tmp_path / "report/settings.csv")
    assert len(rows) == 24 and "optimization.lr=0.003" in " ".join(r["method"] for r in rows)
    best = [float(r["average precision"]) for r in rows if r["method"].startswith("simclr")]
    assert best == sorted(best, reverse=True) and len(best) == 12
    found = {r["method"]: r for r in read_csv(tmp_path / "report/label_free_settings.csv")}
    assert set(found) == {"simclr", "lejepa", "pooled"} and found["simclr"]["runs"] == "12"
    assert (tmp_path / "report/label_free_settings_correlations.png").exists()


def test_the_picture_of_correlations_has_a_mark_a_method_and_measure():
    row = ["ResNet-18", "byol", "RankMe", "nothing", 9, Estimate(0.5, -0.2, 0.9, 9), None, 0.1]
    other = [*row[:1], "dino", *row[2:5], Estimate(-0.3, -0.6, 0.1, 9), *row[6:]]
    rows = [
        row,
        other,
        [*row[:1], "pooled", *row[2:]],
        [*row[:2], "std", "labels", 2, None, None, 0],
    ]
    (axis,) = correlations(rows).axes
    marks = [line.get_xydata().tolist() for line in axis.get_lines()[:2]]
    assert [x for ((x, _),) in marks] == [0.5, -0.3]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["RankMe"]


def test_runs_are_told_apart_by_a_group_of_their_own_or_by_what_differs(tmp_path, tiny_set):
    words = [*tiny_set, f"run.output_dir={tmp_path / 'runs'}", "seed=[1, 2]"]
    runs = read_grid(ROOT / "configs/grid/boards.yaml", words)
    runs = [r for r in runs if r.cfg.method == "simclr" and r.cfg.backbone == "vit_tiny"]
    for run in runs:
        make_up(run, RNG)
    names = [e.method for e in with_variants(collect(runs)[0])]
    assert names == ["simclr", "simclr", "simclr, lars", "simclr, lars", "random", "random"]


def of_causes(method, proportion, own, fixed, subset_size=None):
    """A finished run as the pictures of the overview look at it."""
    cfg = SimpleNamespace(data=SimpleNamespace(subset_size=subset_size))
    result = {
        "method": method,
        "val_offline": {"auroc": own},
        "val_offline_fixed": {"auroc": fixed},
    }
    how = {"result": result, "backbone": "resnet18", "proportion": proportion, "method": method}
    return SimpleNamespace(run=SimpleNamespace(cfg=cfg), **how)


def lines_of(axis):
    return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}


def test_causes_are_told_apart_by_what_is_kept_the_same():
    entries = [of_causes("byol", p, 0.5 + p, 0.6 + p) for p in (0.45, 0.05)]
    entries += [of_causes("byol", p, None, 0.7 + p, 2000) for p in (0.05, 0.45)]
    entries += [of_causes("random", 0.05, 0.5, 0.5), of_causes("random", None, 0.1, 0.1)]
    axes = causes(entries).axes
    near = pytest.approx
    assert [axis.get_title().split(": ")[1] for axis in axes] == [
        "own labels,\nown number of images",
        "fixed labels,\nown number of images",
        "own labels,\nthe same number of images",
        "fixed labels,\nthe same number of images",
    ]
    assert lines_of(axes[0])["byol"] == [[0.05, near(0.55)], [0.45, near(0.95)]]
    assert lines_of(axes[1])["byol"] == [[0.05, near(0.65)], [0.45, near(1.05)]]
    assert lines_of(axes[2])["byol"] == []
    assert lines_of(axes[3])["byol"] == [[0.05, near(0.75)], [0.45, near(1.15)]]
    assert lines_of(axes[0])["random"] == [[0.05, 0.5]]


def test_the_overview_shows_each_setting_its_interval_chance_and_the_random_encoder(complete):
    runs, _ = complete
    runs = [run for run in runs if set(run.groups) & {"methods", "random"}]
    entries = [e for e in collect(runs)[0] if e.backbone == "resnet18"]
    (axis,) = overview(entries).axes
    names = ["supervised", "byol", "barlow", "simclr", "dino", "random"]
    assert [text.get_text() for text in axis.get_xticklabels()] == names
    lines = [line.get_xydata().tolist() for line in axis.get_lines()]
    assert lines[0][0][1] == 0.5
    control = [e.at()["auroc"] for e in entries if e.method == "random"]
    assert lines[1][0][1] == pytest.approx(np.mean(control)) and len(control) == 2
    for e in entries:
        at = [y for line in lines for _, y in line]
        assert e.at()["auroc"] in at and set(e.interval("auroc")) <= set(at)
        assert e.result["val_normal_only"]["knn"]["auroc"] in at


def of_budget(labels, auroc, script="simclr", frozen=True, init_from=None, seed=0):
    """A finished run as the picture of the label budget looks at it."""
    options = SimpleNamespace(frozen_encoder=frozen, init_from=init_from)
    method = ("random" if init_from is None else "pretrained") if frozen else script
    defects = max(labels // 4, 1)
    result = {
        "method": method,
        "seed": seed,
        "train_rows": {"normal": labels - defects, "defect": defects, "unlabelled": 9},
        "val": {"auroc": auroc if script == "supervised" else 0.1},
        "val_offline": {"auroc": 0.2 if script == "supervised" else auroc},
    }
    run = SimpleNamespace(cfg=SimpleNamespace(run=options))
    return SimpleNamespace(run=run, result=result, backbone="resnet18")


def test_the_label_budget_has_a_line_a_start():
    entries = [of_budget(n, 0.5 + n / 1000) for n in (400, 100)]
    entries += [of_budget(100, x, init_from="a", seed=i) for i, x in enumerate((0.6, 0.8))]
    entries += [of_budget(100, 0.7, "supervised", False), of_budget(100, None, init_from="a")]
    entries += [of_budget(n, 0.9, "supervised", False, "a") for n in (100, 400)]
    figure = label_budget(entries)
    (axis,) = figure.axes
    assert lines_of(axis) == {
        "probe on random features, ResNet-18": [[100, 0.6], [400, 0.9]],
        "probe on pre-trained features, ResNet-18": [[100, pytest.approx(0.7)]],
        "supervised, from scratch, ResNet-18": [[100, 0.7]],
        "supervised, fine-tuned, ResNet-18": [[100, 0.9], [400, 0.9]],
    }
    assert [text.get_text() for text in axis.get_xticklabels()] == ["100", "400"]
    figure = label_budget([of_budget(100, 0.6, init_from=f"x/{name}") for name in "ab"])
    named = [line.get_label() for line in figure.axes[0].get_lines()]
    assert named == [f"probe on pre-trained features ({name}), ResNet-18" for name in "ab"]


def test_a_grid_of_label_budgets_is_reported(tmp_path, tiny_set):
    words = [*tiny_set, f"run.output_dir={tmp_path / 'runs'}"]
    runs = read_grid(ROOT / "configs/grid/labels.yaml", words)
    assert len(runs) == 12 and all(g.startswith("labels") for r in runs for g in r.groups)
    assert {r.cfg.data.labels for r in runs} == {50, 150, 450}
    for run in runs[::3]:
        make_up(run, np.random.default_rng(0))
    page = write_report(runs, tmp_path / "report", "offline")
    assert "AUROC by number of labels" in page.read_text()
    assert (tmp_path / "report" / "label_budget.png").exists()
