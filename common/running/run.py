"""One run from start to finish: its folder, its loops over epochs and steps, its log, its end."""

import dataclasses
import functools
import itertools
from pathlib import Path

import torch.distributed as dist

from common.annotations import count_labels, subset_text
from common.data import batches, longest_wait
from common.distributed import all_reduce_mean, all_reduce_means, limit_waits
from common.rankme import embedding_std, is_collapsed
from common.running import checkpoint, provenance, standing
from common.running import folder as files
from common.running.config import identity, method_name, run_name
from common.running.log import RunLog, epoch_record, in_words, none_for_nan
from common.running.overflow import OverflowGuard
from common.running.process import (
    Finished,
    Stopped,
    StopSignal,
    on_first_rank,
    report_failures_to,
    start_process,
)
from common.running.progress import Progress, Stopwatch, clock, say
from common.running.weights import init_encoder


class Run:
    """Use `Run.start(cfg)`. rank, world_size, device: where this process stands."""

    @classmethod
    def start(cls, cfg):
        """Join the ranks, open the run folder, or raise Finished where there is nothing to do."""
        run = cls()
        run.cfg = cfg
        run.place = start_process(cfg.seed, cfg.run.deterministic)
        run.rank, run.world_size, run.device = run.place
        run.is_first = run.rank == 0
        run.folder = Path(cfg.run.output_dir) / run_name(cfg)
        run.stop = StopSignal()
        run.pretrained = method_name(cfg) == "pretrained"  # its statistics stay, too
        if on_first_rank(run._open):
            say(f"{run.folder} is finished: see {files.RESULT} there")
            raise Finished
        report_failures_to(functools.partial(files.note_failure, run.folder))
        if run.device.type == "cpu" and cfg.optimization.precision == "fp16":
            say("optimization.precision fp16 runs as fp32 on CPU")
        return run

    def _open(self):
        """Take the folder. Returns whether it holds the finished run."""
        self._lock, finished = standing.open_folder(self.folder, self.cfg)
        files.set_status(self.folder, "finished" if finished else "running")
        return finished

    def describe_data(self, train, rows, val, packed):
        """Say and keep which rows are trained on. packed: form and hash of a store, or None."""
        self._subset = train, rows
        self.data_sha = {"train_subset": train.sha256(rows), "val": val.sha256(), "packed": packed}
        self.counts = count_labels(train.defect[rows])
        say(f"{self.folder}\n{subset_text(**self.counts, train=train, val=val)}")

    def resume(self, state, steps_per_epoch):
        """Restore the newest checkpoint, if any, into state (a TrainState); open the logs."""
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = steps_per_epoch * self.cfg.optimization.epochs
        self.step = self.epochs_done = 0
        self._watch = Stopwatch()
        saved, name = checkpoint.load_checkpoint(self.folder, warn=say)
        self._last_is_whole = name == checkpoint.LAST
        log_size = 0
        self._init_sha = provenance.init_hash(self.cfg.run.init_from)
        if saved is None and self.cfg.run.init_from:
            init_encoder(state.model, self.cfg.run.init_from)
        elif saved is not None:
            own = identity(self.cfg, with_paths=False)
            path, steps = self.folder / name, (steps_per_epoch, self.total_steps)
            checkpoint.take_up(path, saved, state, self.rank, own, self._must_stay(), steps)
            if saved["versions"] != files.versions():
                say(f"the checkpoint is of {saved['versions']}: no bit-identical resume")
            self.step, self.epochs_done = saved["step"], saved["epochs_done"]
            self._watch = Stopwatch(saved["seconds"], saved["train_seconds"])
            log_size, self._init_sha = saved["log_size"], saved.get("init_sha256")
            say(f"going on at step {self.step} of {self.total_steps}")
        if self.is_first:
            if saved is None:
                files.write_subset(self.folder, *self._subset)
            files.write_config(self.folder, dataclasses.asdict(self.cfg))
            sha = self.data_sha, self._init_sha
            provenance.add(self.folder, self.cfg, self.place, self.step, *sha)
        self.log = RunLog(self.folder, log_size, self.step) if self.is_first else None
        batch = self.cfg.optimization.batch_size
        self._progress = Progress(self.total_steps * batch, "training", "images", self.step * batch)
        self._note, self._notes, self._batches = "", {}, None
        self._guard = OverflowGuard(state)

    def epochs(self):
        """The epochs that are left."""
        yield from range(self.epochs_done, self.cfg.optimization.epochs)

    def steps(self, loader):
        """(step, batch) of the current epoch, from where the run stands.

        One pass of the loader serves all epochs, so that the next epoch's batches are made ahead.
        """
        if self._batches is None:
            first = self.step - self.epochs_done * self.steps_per_epoch
            loader.batch_sampler.start(self.epochs_done, first, self.cfg.optimization.epochs)
            self._batches = batches(loader)
        self._watch.start_step()
        left = self.steps_per_epoch * (self.epochs_done + 1) - self.step
        for batch in itertools.islice(self._batches, left):
            self._guard.before_step()
            yield self.step, batch

    def note(self, **numbers):
        """More about this step: floats or scalar tensors of this rank, logged as means over ranks.

        `collapsed`: 1 where the method itself sees that its output no longer depends on the image.
        """
        self._notes = numbers

    def end_step(self, state, loss, probe_loss, rates, views, embeddings):
        """After each update: sum the loss, log now and then, save now and then, stop if asked to.

        loss: this rank's; probe_loss: the same on all ranks; rates: learning rates by name.
        views: (V, B, 3, S, S), shown once; embeddings: (V, B, K).
        """
        limit_waits(longest_wait(self.cfg.optimization.batch_size // self.world_size))
        if self.step == 0 and self.is_first:
            self.log.show_views(views)
        self._guard.after_step(loss)
        self.step += 1
        self._watch.end_step()
        self._progress.update(self.cfg.optimization.batch_size, self._note)
        ends_epoch = self.step % self.steps_per_epoch == 0
        logs = self.step == 1 or self.step % self.cfg.run.log_every == 0 or ends_epoch
        saves = self.step % self.cfg.run.checkpoint_every_steps == 0
        if logs:  # this and a save wait for the device, nothing else here does
            self._log_step(state, loss, probe_loss, rates, embeddings, ends_epoch)
        if self.stop.agreed(self.step, logs or saves):
            self._save(state)
            if self.is_first:
                files.write_status(self.folder, "preempted", self.stop.name(), True)
            say(f"stopped at step {self.step}; the same command goes on from here")
            raise Stopped
        if saves:
            self._save(state)

    def _log_step(self, state, loss, probe_loss, rates, embeddings, ends_epoch):
        std, notes = embedding_std(embeddings), all_reduce_means(self._notes)
        loss = float(all_reduce_mean(loss.detach().double()))
        record = {"loss": loss, "probe_loss": float(probe_loss), **rates, "embedding_std": std}
        record |= {"loss_scale": self._guard.scale(), "skipped_steps": state.skipped_steps}
        if not self._guard.enabled:
            checkpoint.check_finite(f"the loss at step {self.step}", loss)
        self._note = f"loss {loss:.4f}"
        self._write("step", none_for_nan(record | {"diagnostics": notes}))
        if ends_epoch and not self.cfg.run.frozen_encoder and is_collapsed(std, notes):
            say(f"warning: collapsed, the output hardly depends on the image: {record | notes}")

    def _write(self, kind, record):
        if self.is_first:
            epoch = (self.step - 1) // self.steps_per_epoch
            self.log.write(kind, self.step, {"epoch": epoch, **record, **self._times()})

    def _times(self):
        """Seconds in this run, and training images a second over all ranks without validation."""
        images = self.step * self.cfg.optimization.batch_size
        rate = images / max(self._watch.training, 1e-9)
        return {"seconds": self._watch.seconds(), "samples_per_second": rate}

    def validates(self, epoch):
        """Whether validation is due after this epoch."""
        last = epoch + 1 == self.cfg.optimization.epochs
        return last or (epoch + 1) % self.cfg.run.val_every_epochs == 0

    def end_epoch(self, state, train, validation):
        """Log the epoch's mean loss and scores, and save.

        train: scores of the online probe on augmented views. validation: None, or its scores on
        clean images and the label-free measures of these.
        """
        val, label_free = validation or (None, None)
        loss = state.mean_loss()
        checkpoint.check_finite(f"the loss at step {self.step}", loss)
        if self.step == self.total_steps:
            self._guard.check_end(self.step)
        scores = {"train": train, "val": val}
        self._write("epoch", epoch_record(loss, {**scores, "label_free": label_free}))
        self.epochs_done += 1
        epochs = f"epoch {self.epochs_done}/{self.cfg.optimization.epochs}"
        epochs += ": no finite loss" if loss is None else f": loss {loss:.4f}"
        say(f"{epochs}, {in_words(scores)}, {clock(self._watch.seconds())}")
        state.start_epoch(train)
        self._save(state)

    def _save(self, state):
        content = state.capture()
        for name in ("model", "probe", "loss_sum"):  # the same on all ranks, so all end by it
            checkpoint.check_finite(name, content[name])
        if not self.is_first:
            return
        self.log.sync()
        content = {
            "model": content.pop("model"),
            "state": content,
            "step": self.step,
            "epochs_done": self.epochs_done,
            "config": identity(self.cfg, with_paths=False),
            **self._must_stay(),
            "init_sha256": self._init_sha,
            "versions": files.versions(),
            "seconds": self._watch.seconds(),
            "train_seconds": self._watch.training,
            "log_size": self.log.size(),
        }
        checkpoint.save_checkpoint(self.folder, content, keep_last=self._last_is_whole)
        self._last_is_whole = True

    def _must_stay(self):
        """What a checkpoint must have been written with to be gone on from."""
        device = self.device.type
        return {"world_size": self.world_size, "data_sha": self.data_sha, "device": device}

    def finish(self, result):
        """Write result.json, last of all. result: scores as `Scoring.final` gives them."""
        self._progress.close()
        if self.is_first:
            content = {
                "method": method_name(self.cfg),
                "backbone": self.cfg.backbone,
                "seed": self.cfg.seed,
                "train_defect_proportion": self.cfg.data.train_defect_proportion,
                "epochs": self.cfg.optimization.epochs,
                "train_rows": self.counts,
                **result,
                **self._times(),
            }
            self.log.close()
            files.write_json(self.folder / files.RESULT, content)
            files.write_status(self.folder, "finished")
            shown = {"online probe": result["val"], "offline probe": result["val_offline"]}
            say(f"{self.folder / files.RESULT}: validation: {in_words(shown)}")
        if self.world_size > 1:
            dist.barrier()
