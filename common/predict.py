"""Score new images with a finished run: which of them need a look?

    python -m common.predict --run runs/NAME PATHS... --out scores.csv [--prevalence .02]
        [--threshold P | --recall .95 | --false-alarms .01]

PATHS: images, folders, or one CSV with a column `Filename`. Writes a row an image: file (relative
to the root that scores.json names), score, probability, decision (defect | normal, or empty, as no
threshold is known; unreadable, those last). The score is the logit of the run's offline probe, or,
where it has none or its validation no defect, the distance to the nearest normal training images.
The probability is calibrated on the run's validation scores and moved to --prevalence, the share of
defects that is expected among the new images (default: validation's). Stopped, it goes on when the
same command is given again. Exit code 1: done, but some images, named at the end, cannot be read.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset

from common.augmentations import ColorJitterNormalize, resize_squash
from common.data import batches, cores, make_loader
from common.distributed import mixed_precision, to_device
from common.images import ImageFolder
from common.inspection.listing import list_images, must_be_new
from common.inspection.scores_file import Part, files_hash, line_of, sidecar, write_scores
from common.inspection.trained import Scorer, Trained
from common.label_table import normal_name
from common.running.arguments import at_least, path_argument, share
from common.running.errors import ImageError, UserError
from common.running.process import Stopped, StopSignal, entry_point, start_process
from common.running.progress import Progress, say, write_error

AT_ONCE = 64  # images
SHOWN = 20  # unreadable images in the terminal
DEFAULT_THRESHOLD = 0.5


class _Images(Dataset):
    """Position in filename -> ((3, S, S) uint8, position), or (why it cannot be used, position)."""

    def __init__(self, root, filename, image_size):
        self.images, self.filename, self.image_size = ImageFolder(root), filename, image_size

    def __getitem__(self, position):
        try:
            name = self.filename[position].decode()
            normal_name(name)
            return resize_squash(self.images.read(name), self.image_size), position
        except UnicodeDecodeError:
            return "its name is not UTF-8", position
        except (ImageError, ValueError) as error:
            return str(error), position


def _collate(samples):
    """(images (B, 3, S, S) uint8, their positions, {position: why} of the others)."""
    good = [sample for sample in samples if not isinstance(sample[0], str)]
    bad = {position: why for why, position in samples if isinstance(why, str)}
    images = torch.stack([image for image, _ in good]) if good else torch.zeros(0)
    return images, [position for _, position in good], bad


@torch.no_grad()
def score_images(scorer, root, filename, part, workers, device):
    """Score the images from where the part ends. Raises Stopped where it was asked to stop."""
    done, stop, trained = len(part.lines), StopSignal(), scorer.trained
    scores_of = scorer.of(root, filename)
    clean = ColorJitterNormalize(seed=0).clean
    autocast, _ = mixed_precision(trained.config["optimization"]["precision"], device)
    encoder = to_device(trained.encoder, device, AT_ONCE)
    dataset = _Images(root, filename, trained.config["data"]["image_size"])
    how = {"collate_fn": _collate, "batch_size": AT_ONCE, "sampler": range(done, len(filename))}
    progress = Progress(len(filename), "scoring", "images", done)
    for images, positions, bad in batches(
        make_loader(dataset, workers, device.type == "cuda", AT_ONCE, **how)
    ):
        found = dict(bad)
        if positions:
            with autocast:
                features = encoder(clean(images.to(device, non_blocking=True)))
            scores = scores_of(features.float().cpu(), positions)
            found |= dict(zip(positions, scores, strict=True))
        part.add([line_of(found[position]) for position in sorted(found)])
        progress.update(len(found))
        if stop.received:
            part.close()
            say(f"stopped after {len(part.lines)} images; the same command goes on from here")
            raise Stopped
    progress.close()


def operating_point(held, args):
    """(Calibration or None, prevalence or None, Expected or None) of a command line."""
    calibration, why = held.calibration()
    if calibration is None:
        say(f"no probabilities: {why}")
        if args.threshold:
            raise UserError(f"--threshold is of a probability, but {why}")
    if args.prevalence and not (len(held.defects) and len(held.normals)):
        raise UserError(f"--prevalence changes nothing here: {why}")
    prevalence = args.prevalence or (calibration.share if calibration else None)
    if args.recall:
        return calibration, prevalence, held.at_recall(args.recall)
    if args.false_alarms:
        return calibration, prevalence, held.at_false_alarms(args.false_alarms)
    if calibration is None:
        say("no decisions: --false-alarms gives them")
        return None, prevalence, None
    p = args.threshold or DEFAULT_THRESHOLD
    how = f"a probability of at least {p:g}"
    return calibration, prevalence, held.at(calibration.score(p, prevalence), how)


def outlook_text(expected, prevalence, images):
    """What to expect of that many images, in words."""
    text = f"flagged: {expected.how}"
    if prevalence is None or None in (expected.recall, expected.false_alarms):
        return text
    outlook = expected.outlook(prevalence, images)
    shares = (
        f"{name} {outlook[name][0]:.3f} ({outlook[name][1]:.3f} to {outlook[name][2]:.3f})"
        for name in ("precision", "recall")
    )
    text += f"\nat a prevalence of {prevalence:.4g} expect {', '.join(shares)}, and to look at "
    return text + "{:.0f} ({:.0f} to {:.0f}) of ".format(*outlook["images"]) + f"{images} images"


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=path_argument, metavar="PATH")
    parser.add_argument("--run", required=True, type=path_argument, metavar="RUN_FOLDER")
    parser.add_argument("--out", required=True, type=path_argument, metavar="scores.csv")
    parser.add_argument("--image-root", type=path_argument, metavar="DIR", help="of a CSV's names")
    parser.add_argument("--prevalence", type=share, metavar="SHARE", help="of defects, expected")
    point = parser.add_mutually_exclusive_group()
    point.add_argument("--threshold", type=share, metavar="P", help="probability; default .5")
    point.add_argument("--recall", type=share, metavar="SHARE", help="of defects to be flagged")
    point.add_argument("--false-alarms", type=share, metavar="SHARE", help="of normals, at most")
    parser.add_argument("--workers", type=at_least(0), default=cores(), metavar="N")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args(argv)
    out = Path(args.out)
    must_be_new([out, sidecar(out)], args.force)
    if out.suffix == ".json" or not out.parent.is_dir():
        raise UserError(f"--out {out}: expected a CSV file in a folder that is there")
    trained = Trained(args.run)
    scorer = Scorer(trained)
    say(scorer.describe())
    root, filename, others, skipped = list_images(args.paths, args.image_root)
    if others:
        say(f"{others} other files in these folders are no images, by their names")
    calibration, prevalence, expected = operating_point(scorer.held, args)
    if expected:
        say(outlook_text(expected, prevalence, len(filename)))
    threshold = expected and expected.threshold
    of = {"run": os.path.realpath(args.run), "checkpoint_sha256": trained.sha}
    of |= {"score": scorer.kind, "root": root}
    about = of | {
        "method": trained.result["method"],
        "backbone": trained.result["backbone"],
        "prevalence": prevalence,
        "calibration": calibration and vars(calibration),
        "threshold": expected and {"score": threshold, "how": expected.how},
        "expected": expected and prevalence and expected.outlook(prevalence, len(filename)),
        "validation": {
            "normals": len(scorer.held.normals),
            "defects": len(scorer.held.defects),
            "score_recall_false_alarms": scorer.held.curve(threshold),
        },
    }
    images = {"images": len(filename), "files_sha256": files_hash(filename)}
    part = Part(out, of | images, args.force)
    device = start_process(trained.config["seed"], deterministic=False).device
    score_images(scorer, root, filename, part, args.workers, device)
    part.close()
    probability = calibration and (lambda score: calibration.probability(score, prevalence))
    bad = write_scores(out, filename, part.lines, probability, threshold, about)
    part.path.unlink()
    print(f"{out}: {len(filename) - len(bad)} images scored")
    for name, why in [*skipped.items(), *bad.items()][:SHOWN]:
        write_error(f"{name}: {why}")
    if bad:
        write_error(f"{len(bad)} images cannot be used; {sidecar(out)} lists them")
    if skipped:
        write_error(f"{len(skipped)} folders were not looked into")
    if bad or skipped:
        sys.exit(1)


if __name__ == "__main__":
    main()
