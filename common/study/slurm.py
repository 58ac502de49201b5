"""A grid through Slurm: an array job, a task a run, requeued when pre-empted or out of time."""

import glob
import shlex
import subprocess
from pathlib import Path

from common.running.errors import UserError
from common.running.process import STOPPED
from common.running.progress import say
from common.study.grid import state
from common.study.launch import LOGS

SECONDS_TO_SAVE = 600  # before the time limit Slurm asks: a run in validation saves after it

SCRIPT = """#!/bin/bash
#SBATCH --job-name={job}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@{grace}
names=({names})
cd {here} || exit 1
trap '[ -z "$child" ] || kill -TERM $child' TERM
{command} --only="${{names[$SLURM_ARRAY_TASK_ID]}}" &
child=$!
wait $child
code=$?
while kill -0 $child 2>/dev/null; do  # a signal ended the wait, not the run: it is saving
    wait $child
    code=$?
done
if [ $code = {stopped} ]; then  # saved, or another door has the run: come back later
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
"""


def submit(runs, jobs, command, extra):
    """Hand what is not finished to sbatch. Returns the job's number.

    runs: GridRuns; jobs: tasks at a time; command: words that start one run when `--only NAME` is
    added; extra: words for sbatch, such as --gres=gpu:1. Raises UserError where a run is refused,
    or with sbatch's own words.
    """
    states = {run: state(run) for run in runs}
    left = [run for run, (at, _) in states.items() if at not in ("finished", "refused")]
    refused = [f"{run.name}: {why}" for run, (at, why) in states.items() if at == "refused"]
    if refused:
        raise UserError("\n  ".join(["nothing is submitted while a run is refused:", *refused]))
    if not left:
        say("every run is finished")
        return None
    logs = left[0].folder.parent.absolute() / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "grid.sbatch"
    script.write_text(
        SCRIPT.format(
            job="grid",
            last=len(left) - 1,
            jobs=jobs,
            grace=SECONDS_TO_SAVE,
            names=" ".join(shlex.quote(glob.escape(run.name)) for run in left),
            here=shlex.quote(str(Path.cwd())),
            command=shlex.join(command),
            stopped=STOPPED,
        ),
        "utf-8",
    )
    # Not in the script, where Slurm's own rules of quoting hold.
    output = f"--output={str(logs).replace('%', '%%')}/slurm_%A_%a.log"
    words = ["sbatch", "--parsable", output, *extra, str(script)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("--launcher slurm: there is no sbatch on this machine") from None
    if done.returncode:
        raise UserError(f"{shlex.join(words)}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    say(f"job {job}: {len(left)} runs, {jobs} at a time; squeue -j {job}, scancel {job}")
    return job
