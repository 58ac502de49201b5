"""What run_grid.sh calls: plan, run, status and report of a grid."""

import argparse
import fnmatch
import shlex
import sys
from collections import Counter

import torch

from common.running.arguments import at_least, path_argument
from common.running.errors import UserError
from common.running.progress import say
from common.study.cost import TimeLeft
from common.study.evaluate import LOGITS
from common.study.grid import read_grid, state
from common.study.launch import Launcher, gpu_ids, log_path, tail
from common.study.slurm import submit

GRID = "configs/grid/paper.yaml"


def plan(runs, args):
    """Every run with its command, and what the rest will take."""
    for run in runs:
        at, why = state(run)
        note = f": {why}" if at == "refused" else ""
        print(f"# {run.name} ({', '.join(run.groups)}): {at}{note}")
        print(shlex.join(run.command(nproc=args.nproc)))
    print(f"# {len(runs)} runs; {TimeLeft(runs).text(args.jobs)}")


def status(runs, args):
    """How many runs are in which state, what stands in the way, and what the rest will take."""
    states = {run.name: state(run) for run in runs}
    counts = Counter(at for at, _ in states.values())
    print(", ".join(f"{n} {at}" for at, n in counts.items()))
    for line in _notes(states.values()):
        print(line)
    for run in runs:
        at, why = states[run.name]
        if at in ("running", "failed", "preempted", "refused"):
            print(f"{at}: {run.name}" + (f": {why}" if why else ""))
        if at == "failed":
            print(tail(log_path(run)))
    print(TimeLeft(runs).text(args.jobs))


def _notes(states):
    """Lines about finished runs that could not be compared with their CSVs."""
    notes = Counter(why for at, why in states if at == "finished" and why)
    return [f"{n} finished, {why}" for why, n in notes.items()]


def run(runs, args):
    """Start what is not finished. Exits with the launcher's code."""
    for line in _notes(map(state, runs)):
        say(line)
    if args.launcher == "slurm":
        again = ["./run_grid.sh", "run", "--grid", args.grid, "--nproc", str(args.nproc)]
        submit(runs, args.jobs, [*again, *args.overrides], shlex.split(args.sbatch))
        return
    if 0 < torch.cuda.device_count() < args.nproc:
        there = torch.cuda.device_count()
        raise UserError(f"--nproc {args.nproc}: this machine has {there} GPU(s), one a process")
    sys.exit(Launcher(runs, args.jobs, args.nproc, gpu_ids()).run())


def report(runs, args):
    """The page, tables and figures of what is finished."""
    from common.study.report import write_report  # matplotlib, which nothing else here needs

    write_report(runs, args.out, args.probe, args.draws, args.paper)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="./run_grid.sh", description=__doc__)
    parser.add_argument("command", choices=["plan", "run", "status", "report"])
    parser.add_argument("--grid", type=path_argument, default=GRID, metavar="FILE.yaml")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time, over all GPUs")
    parser.add_argument("--nproc", type=at_least(1), default=1, help="processes (GPUs) a run")
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--sbatch", default="", metavar="WORDS", help="for sbatch: --sbatch='--gres=gpu:1'"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only these runs: 'simclr_*'; repeatable"
    )
    parser.add_argument(
        *("--out",), type=path_argument, default="report", metavar="FOLDER", help="report: where to"
    )
    parser.add_argument(
        "--probe", choices=list(LOGITS), default="online", help="report: whose scores"
    )
    parser.add_argument(
        "--draws",
        type=at_least(1),
        default=0,
        metavar="N",
        help="report: draw N real subsets, too",
    )
    parser.add_argument("--paper", action="store_true", help="report: beside the paper's values")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    try:
        runs = read_grid(args.grid, args.overrides)
        if args.only:
            runs = [r for r in runs if any(fnmatch.fnmatch(r.name, o) for o in args.only)]
        if not runs:
            asked = (
                f"no run is named {' '.join(args.only)}" if args.only else "no run in its groups"
            )
            raise UserError(f"{args.grid}: {asked}")
        {"plan": plan, "run": run, "status": status, "report": report}[args.command](runs, args)
    except (UserError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
