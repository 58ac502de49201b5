"""What the rest of a grid will take: seconds an image of runs that cost as much, times images."""

from common.annotations import UNLABELLED
from common.running.errors import UserError
from common.running.folder import RESULT, read_json
from common.running.log import LOG, read_log
from common.running.progress import clock
from common.study.grid import state, training_subset


def labelled_only(run):
    """Whether a run trains on what has a label alone."""
    return run.cfg.method == "supervised" and not run.cfg.run.frozen_encoder


def cost_key(run):
    """Runs of one key take about the same time an image."""
    cfg = run.cfg
    kinds = "random " * cfg.run.frozen_encoder + "packed " * (cfg.data.packed is not None)
    return f"{kinds}{cfg.method} {cfg.backbone} {cfg.patch_size or ''} {cfg.data.image_size} px"


def data_key(run):
    """Runs of one key, whatever their seeds, train on as many images an epoch."""
    data, of_labels = run.cfg.data, labelled_only(run)
    what = data.train_csv, data.train_defect_proportion, data.fraction, data.subset_size
    return *what, data.labels, of_labels


class TimeLeft:
    """The time that the runs of a grid still take; counts each training set once."""

    def __init__(self, runs):
        self.runs, self._images, self._rates = runs, {}, {}  # _rates: of what is finished

    def seconds(self):
        """(seconds of what is known, unfinished runs, how many of them are of unknown length)."""
        done, of_finished, of_logs = {}, {}, {}  # done: images of those that are left
        for run in self.runs:
            at = "finished" if run.name in self._rates else state(run)[0]
            if at == "finished":
                if run.name not in self._rates:
                    self._rates[run.name], self._images[data_key(run)] = _measured(run)
                of_finished.setdefault(cost_key(run), []).append(self._rates[run.name])
                continue
            done[run], rate = (0, None) if at == "refused" else _logged(run)
            if rate:
                of_logs.setdefault(cost_key(run), []).append(rate)
        rates = {key: sum(of) / len(of) for key, of in (of_logs | of_finished).items()}
        known = [run for run in done if cost_key(run) in rates and self._count(run)]
        total = sum(rates[cost_key(run)] * max(self._count(run) - done[run], 0) for run in known)
        return total, len(done), len(done) - len(known)

    def finished(self):
        """How many runs were, when `seconds` or `text` looked last."""
        return len(self._rates)

    def text(self, jobs):
        """The same in words, with `jobs` runs at a time."""
        seconds, left, unknown = self.seconds()
        text = f"{left} left"
        if left > unknown:
            text += f", about {clock(seconds / jobs)} with {jobs} at a time"
        if unknown:
            text += f", {unknown} of unknown length until one like them has begun"
        return text

    def _count(self, run):
        """Training images of a run over its epochs; None while that cannot be told."""
        key = data_key(run)
        if key not in self._images:  # of no finished run: the CSV has to be read
            try:
                train, rows = training_subset(run)
                known = train.defect[rows] != UNLABELLED
                self._images[key] = int(known.sum()) if labelled_only(run) else len(rows)
            except UserError:
                return None
        return self._images[key] * run.cfg.optimization.epochs


def _measured(run):
    """(seconds an image, with its validations; images an epoch) of a finished run."""
    result = read_json(run.folder / RESULT)
    epoch = sum(result["train_rows"].values())
    return result["seconds"] / max(epoch * result["epochs"], 1), epoch


def _logged(run):
    """(images trained on, seconds an image or None) by the end of an unfinished run's log."""
    try:
        last = read_log(run.folder / LOG)[-1]
        return last["step"] * run.cfg.optimization.batch_size, 1 / last["samples_per_second"]
    except (UserError, OSError, LookupError, TypeError, ZeroDivisionError):
        return 0, None
