"""What the rest of a grid will take: seconds an image of runs that cost as much, times images."""

from common.running.errors import UserError
from common.running.folder import RESULT, read_json
from common.running.log import LOG, read_log
from common.running.progress import clock
from common.study.grid import state, training_subset

CALIBRATION = "calibration.json"  # in the output folder: {cost_key: seconds an image}


def cost_key(run):
    """Runs of one key take about the same time an image."""
    cfg = run.cfg
    frozen = "random " if cfg.run.frozen_encoder else ""
    return f"{frozen}{cfg.method} {cfg.backbone} {cfg.patch_size or ''} {cfg.data.image_size} px"


class TimeLeft:
    """The time that the runs of a grid still take; counts each run's images once."""

    def __init__(self, runs):
        self.runs, self._images = runs, {}

    def seconds(self):
        """(seconds of what is known, unfinished runs, how many of them are of unknown length)."""
        left = [run for run in self.runs if state(run)[0] != "finished"]
        rates = self._seconds_per_image()
        known = [run for run in left if cost_key(run) in rates and self._count(run)]
        total = sum(rates[cost_key(run)] * self._images_left(run) for run in known)
        return total, len(left), len(left) - len(known)

    def text(self, jobs):
        """The same in words, with `jobs` runs at a time."""
        seconds, left, unknown = self.seconds()
        text = f"{left} left"
        if left > unknown:
            text += f", about {clock(seconds / jobs)} with {jobs} at a time"
        if unknown:
            text += f", {unknown} of unknown length: see plan --calibrate"
        return text

    def _seconds_per_image(self):
        """{cost_key: seconds}, from finished runs, else from what was calibrated."""
        known, measured = {}, {}
        for folder in {run.folder.parent for run in self.runs}:
            known |= read_json(folder / CALIBRATION) or {}
        for run in self.runs:
            result = read_json(run.folder / RESULT) or {}
            if {"train_rows", "epochs", "seconds"} <= result.keys():
                images = max(sum(result["train_rows"].values()) * result["epochs"], 1)
                measured.setdefault(cost_key(run), []).append(result["seconds"] / images)
        return known | {key: sum(times) / len(times) for key, times in measured.items()}

    def _count(self, run):
        """Training images of a run over its epochs; None while that cannot be told."""
        if run.name not in self._images:
            try:
                epoch = len(training_subset(run)[1])
                self._images[run.name] = epoch * run.cfg.optimization.epochs
            except UserError:
                return None
        return self._images[run.name]

    def _images_left(self, run):
        try:
            steps = max((r["step"] for r in read_log(run.folder / LOG)), default=0)
        except (OSError, ValueError, KeyError, TypeError):
            steps = 0
        return max(self._count(run) - steps * run.cfg.optimization.batch_size, 0)
