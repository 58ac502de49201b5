"""Read annotation CSVs into arrays. Sewer-ML's own files are a special case of the format.

`Filename` and `Defect` are needed. `Defect` is 1 (defect), 0 (normal) or empty (not labelled).
Every other column is a class of 0 and 1, except `WaterLevel`, `VA` and `ND`, which are ignored.
"""

import csv
import difflib
import hashlib
import os
from dataclasses import dataclass

import numpy as np

from common.errors import UserError

# Class-importance weights (CIW): Haurum and Moeslund, Sewer-ML, CVPR 2021, in the files' order.
CLASS_IMPORTANCE = {
    "RB": 1.0,  # cracks, breaks, collapses
    "OB": 0.5518,  # surface damage
    "PF": 0.2896,  # production error
    "DE": 0.1622,  # deformation
    "FS": 0.6419,  # displaced joint
    "IS": 0.1847,  # intruding sealing material
    "RO": 0.3559,  # roots
    "IN": 0.3131,  # infiltration
    "AF": 0.0811,  # settled deposits
    "BE": 0.2275,  # attached deposits
    "FO": 0.2477,  # obstacle
    "GR": 0.0901,  # branch pipe
    "PH": 0.4167,  # chiseled connection
    "PB": 0.4167,  # drilled connection
    "OS": 0.9009,  # lateral reinstatement cuts
    "OP": 0.3829,  # connection with transition profile
    "OK": 0.4396,  # connection with construction changes
}
NOT_CLASSES = ("Filename", "Defect", "WaterLevel", "VA", "ND")

DEFECT, NORMAL, UNLABELLED = 1, 0, -1

_CODES = {"0": 0, "1": 1, "": UNLABELLED}
_ROWS_AT_ONCE = 65536
_LONGEST_NAME = 1024  # bytes
_SHOWN = 5  # rows in a message


@dataclass(frozen=True)
class Annotations:
    """N rows of one CSV, in the file's order."""

    path: str
    filename: np.ndarray  # (N,) UTF-8 bytes, fixed width: 1.3 million names in 16 MB
    defect: np.ndarray  # (N,) int8: 1 defect, 0 normal, -1 not labelled
    classes: np.ndarray  # (N, C) bool; all False where not labelled
    class_names: tuple[str, ...]  # C names, in the file's order

    def __len__(self):
        return len(self.defect)

    def name(self, row):
        """File name of a row, as text."""
        return self.filename[row].decode()

    def sha256(self, rows=None):
        """Hash of names, labels and classes of the given rows (default: all)."""
        rows = slice(None) if rows is None else rows
        digest = hashlib.sha256(repr((self.class_names, self.filename.dtype.str)).encode())
        for array in (self.filename, self.defect, self.classes):
            digest.update(np.ascontiguousarray(array[rows]).tobytes())
        return digest.hexdigest()


def _refuse(path, problems):
    """Raise UserError with the first few problems, given as (line, sentence), and their count."""
    problems = sorted(problems)
    shown = [f"{path}:{line}: {sentence}" for line, sentence in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        shown.append(f"... {len(problems)} such rows in all")
    raise UserError("\n".join(shown))


def _read_header(path, header):
    """Check the column names; returns the class names."""
    for name in ("Filename", "Defect"):
        if name not in header:
            close = difflib.get_close_matches(name.lower(), [h.lower() for h in header], n=1)
            near = next((h for h in header if close and h.lower() == close[0]), None)
            hint = f"; did you mean '{near}'?" if near else ""
            columns = ", ".join(header)[:200] or "none"
            raise UserError(f"{path}: column '{name}' is missing (columns: {columns}){hint}")
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise UserError(f"{path}: column '{sorted(twice)[0]}' stands twice")
    if "" in header:
        raise UserError(f"{path}:1: column {header.index('') + 1} has no name")
    return tuple(name for name in header if name not in NOT_CLASSES)


def _codes(cells):
    """Cells '0', '1' or '' -> int8 codes; any other cell gives 2."""
    return np.fromiter((_CODES.get(cell, 2) for cell in cells), np.int8, len(cells))


def _bad_name(name):
    """Why a file name is refused, or None: nothing outside the image root may be named."""
    if not name:
        return "Filename is empty"
    if name[0] in "/\\" or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/"):
        return f"Filename {name!r} points outside the image root"
    if "\0" in name or "\n" in name or "\r" in name:
        return f"Filename {name[:80]!r} holds a line break or NUL (an unbalanced quote?)"
    if len(name.encode()) > _LONGEST_NAME:
        return f"Filename is longer than {_LONGEST_NAME} bytes"
    return None


def _read_rows(path, rows, header, class_names, first_line):
    """A list of CSV rows -> (names, defect, classes), checked."""
    width = len(header)
    uneven = [(i, row) for i, row in enumerate(rows) if len(row) != width]
    if uneven:
        text = f"cells, the header has {width}"
        _refuse(path, [(first_line + i, f"{len(row)} {text}") for i, row in uneven])
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    problems = [
        (first_line + i, why)
        for i, why in enumerate(map(_bad_name, columns["Filename"]))
        if why is not None
    ]
    defect = _codes(columns["Defect"])
    classes = np.zeros((len(rows), len(class_names)), np.int8)
    for c, name in enumerate(class_names):
        classes[:, c] = _codes(columns[name])
    for name, codes in [("Defect", defect), *zip(class_names, classes.T, strict=True)]:
        wrong = codes == 2
        if name != "Defect":
            wrong = wrong | ((codes == UNLABELLED) & (defect != UNLABELLED))
        allowed = "0, 1 or empty (not labelled)" if name == "Defect" else "0 or 1"
        problems += [
            (first_line + i, f"{name} is {columns[name][i][:40]!r}, expected {allowed}")
            for i in np.flatnonzero(wrong)
        ]
    if problems:
        _refuse(path, problems)
    classes[defect == UNLABELLED] = 0
    return np.array([name.encode() for name in columns["Filename"]]), defect, classes == 1


def read_annotations(path):
    """CSV file -> Annotations. Raises UserError naming the file, and the line and column if any.

    Reads Sewer-ML's 1.3 million rows in a few seconds.
    """
    path = os.fspath(path)
    names, defects, classes = [], [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path}: the file is empty")
            class_names = _read_header(path, header)
            chunk, first_line = [], reader.line_num + 1
            while True:
                row = next(reader, None)
                if row:
                    chunk.append(row)
                if chunk and (row is None or len(chunk) == _ROWS_AT_ONCE):
                    n, d, c = _read_rows(path, chunk, header, class_names, first_line)
                    names.append(n)
                    defects.append(d)
                    classes.append(c)
                    chunk, first_line = [], reader.line_num + 1
                if row is None:
                    break
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    if not names:
        raise UserError(f"{path}: there is a header, but no row")
    annotations = Annotations(
        path, np.concatenate(names), np.concatenate(defects), np.concatenate(classes), class_names
    )
    _check_names_are_unique(annotations)
    _check_defect_is_any_class(annotations)
    return annotations


def _check_names_are_unique(annotations):
    order = np.argsort(annotations.filename, kind="stable")
    names = annotations.filename[order]
    again = order[1:][names[1:] == names[:-1]]
    if len(again):
        text = "stands in the file more than once"
        _refuse(
            annotations.path,
            [(int(i) + 2, f"Filename {annotations.name(i)!r} {text}") for i in again],
        )


def _check_defect_is_any_class(annotations):
    """In Sewer-ML's layout Defect is "any of the 17"; a contradiction is an error of the file."""
    if not set(CLASS_IMPORTANCE) <= set(annotations.class_names):
        return
    sewer_ml = [annotations.class_names.index(name) for name in CLASS_IMPORTANCE]
    any_class = annotations.classes[:, sewer_ml].any(axis=1)
    wrong = (annotations.defect != UNLABELLED) & ((annotations.defect == DEFECT) != any_class)
    if wrong.any():
        text = "contradicts its 17 class columns"
        _refuse(
            annotations.path,
            [
                (int(i) + 2, f"Defect is {annotations.defect[i]}, which {text}")
                for i in np.flatnonzero(wrong)
            ],
        )


def count_labels(defect):
    """(N,) labels -> {"normal": n, "defect": n, "unlabelled": n}."""
    groups = {"normal": NORMAL, "defect": DEFECT, "unlabelled": UNLABELLED}
    return {name: int((defect == group).sum()) for name, group in groups.items()}


def check_disjoint(train, val):
    """Raises UserError where a file name stands in both: validation would see training images."""
    width = max(train.filename.dtype.itemsize, val.filename.dtype.itemsize)
    both = np.intersect1d(train.filename.astype(f"S{width}"), val.filename.astype(f"S{width}"))
    if len(both):
        shown = ", ".join(name.decode() for name in both[:3])
        raise UserError(
            f"{train.path} and {val.path} share {len(both)} file names, such as {shown}: "
            "validation would see training images"
        )
