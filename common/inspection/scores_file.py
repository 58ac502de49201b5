"""scores.csv of `python -m common.predict`, with its scores.json; and as far as a stop let it get.

A row an image: file, score, probability, decision; unreadable images last, without numbers.
"""

import contextlib
import csv
import hashlib
import json
import math
from pathlib import Path

from common.running.errors import UserError, regular
from common.running.folder import atomically, read_json, write_json

COLUMNS = ("file", "score", "probability", "decision")
DEFECT, NORMAL, UNREADABLE = "defect", "normal", "unreadable"  # decisions


def sidecar(path):
    """scores.json beside scores.csv."""
    return Path(path).with_suffix(".json")


class Part:
    """scores.csv.part: a line of what determines the scores, then one an image, as far as it got.

    A line is a score, or `!` and why there is none.
    """

    def __init__(self, out, header, force=False):
        """header: plain types. What is there of another header is an error, or forgotten by force.

        Raises UserError.
        """
        self.path, self.lines = Path(f"{out}.part"), []
        first, end = f"{json.dumps(header, sort_keys=True)}\n", 0
        with contextlib.suppress(FileNotFoundError):
            there = regular(self.path).read_bytes().splitlines(keepends=True)
            is_ours = there[:1] == [first.encode()]
            if there and not is_ours and not force:
                raise UserError(
                    f"{self.path}: begun with another run or other images; give that command again "
                    "to end it, or --force to forget it"
                )
            if is_ours:
                self.lines = _whole(there[1:])
                end = len(first.encode()) + sum(len(line.encode()) for line in self.lines)
        self._file = open(self.path, "ab")  # noqa: SIM115 (see close)
        self._file.truncate(end)  # so what is done stays, whatever happens now
        if not end:
            self._append([first])

    def _append(self, lines):
        self._file.write("".join(lines).encode())
        self._file.flush()

    def add(self, lines):
        """Lines of the images that come next."""
        self._append(lines)
        self.lines += lines

    def close(self):
        self._file.close()


def line_of(score):
    """A line of a score, or of a text that says why there is none."""
    if not isinstance(score, str) and not math.isfinite(score):
        score = "its features are not finite"
    return f"!{' '.join(score.split())}\n" if isinstance(score, str) else f"{score}\n"


def _whole(lines):
    """Lines as text, up to the first that a kill or a full disk left broken. lines: of bytes."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            text = line.decode()
            if text.endswith("\n") and (text.startswith("!") or math.isfinite(float(text))):
                found.append(text)
                continue
        break
    return found


def files_hash(filename):
    """sha256 of names, in their order. filename: (N,) bytes."""
    return hashlib.sha256(b"\n".join(filename.tolist())).hexdigest()


def write_scores(out, filename, lines, probability, threshold, about):
    """scores.csv and scores.json; returns {file: why} of the unreadable.

    filename: (N,) bytes; lines: as in a Part; probability: score -> number, or None; threshold: the
    score from which on an image is flagged, or None; about: more for the JSON.
    """
    bad, flagged = {}, 0
    with atomically(out, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, line in zip(filename, lines, strict=True):
            name = name.decode(errors="backslashreplace")
            if line.startswith("!"):
                bad[name] = line[1:].rstrip("\n")
                continue
            score, decision = float(line), ""
            if threshold is not None:
                decision = DEFECT if score >= threshold else NORMAL
                flagged += decision == DEFECT
            shown = "" if probability is None else f"{float(probability(score)):.6g}"
            writer.writerow([name, line.rstrip("\n"), shown, decision])
        writer.writerows([name, "", "", UNREADABLE] for name in bad)
        counts = {"images": len(lines), "unreadable": len(bad)}
        counts["flagged"] = flagged if threshold is not None else None
        write_json(sidecar(out), about | {"counts": counts, "unreadable": bad})
    return bad


def _is_number(x):
    return type(x) in (int, float) and math.isfinite(x)


def _holds(x, **wanted):
    """Whether x is a dict of which each of these is as wanted."""
    return isinstance(x, dict) and all(fits(x.get(key)) for key, fits in wanted.items())


def _is_share(x):
    return _is_number(x) and 0 < x < 1


def _is_curve(x):
    of_three = [isinstance(row, list) and len(row) == 3 and _is_number(row[0]) for row in x or []]
    return isinstance(x, list) and all(of_three)


def _is_text(x):
    return isinstance(x, str) and x != ""


WANTED = {key: _is_text for key in ("run", "root", "checkpoint_sha256", "method", "backbone")} | {
    "prevalence": lambda x: x is None or _is_share(x),
    "calibration": lambda x: (
        x is None or _holds(x, slope=_is_number, intercept=_is_number, share=_is_share)
    ),
    "threshold": lambda x: x is None or _holds(x, score=_is_number),
    "validation": lambda x: _holds(x, score_recall_false_alarms=_is_curve),
    "counts": lambda x: _holds(x, images=_is_number, unreadable=_is_number),
}


def _number(cell):
    with contextlib.suppress(ValueError, TypeError):
        return float(cell)
    return math.nan


def read_scores(path):
    """(rows as dicts, contents of the JSON beside it). Raises UserError naming the file."""
    about = read_json(sidecar(path))
    if not isinstance(about, dict):
        raise UserError(f"{sidecar(path)}: cannot be read; it lies beside {path}")
    if wrong := [key for key, fits in WANTED.items() if not fits(about.get(key))]:
        raise UserError(f"{sidecar(path)}: {', '.join(wrong)}: not as predict writes it")
    try:
        with open(regular(path), newline="", encoding="utf-8") as file:
            reader, rows = csv.DictReader(file), []
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)}")
            for row in reader:
                if None in row or None in row.values() or not row["file"]:
                    raise UserError(f"{path}:{reader.line_num}: expected {len(COLUMNS)} cells")
                scored = row["decision"] != UNREADABLE
                if scored and not math.isfinite(_number(row["score"])):
                    told = f"score is '{row['score'][:40]}', expected a number"
                    raise UserError(f"{path}:{reader.line_num}: {told}")
                rows.append(row)
            return rows, about
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__})") from None
