"""Read annotation CSVs into arrays. Sewer-ML's own files are a special case of the format.

`Filename` and `Defect` are needed. `Defect` is 1 (defect), 0 (normal) or empty (not labelled).
Every other column is a class where at least 95 % of its cells in labelled rows are 0 or 1 (or 0.0,
1.0, False, True), or where its name is that of a Sewer-ML class, except `WaterLevel`, `VA`, `ND`
and those without a name; a column of anything else, such as a date, is ignored. Commas, semicolons
and tabs are told apart by the header.
"""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np

from common.label_table import DEFECT, NORMAL, UNLABELLED, WRONG, read_table, refuse
from common.running.errors import UserError

CLASS_PERCENT = 95  # of a column's labelled cells: where as many are 0 or 1, it is a class

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


@dataclass(frozen=True)
class Annotations:
    """N rows of one CSV, in the file's order."""

    path: str
    filename: np.ndarray  # (N,) UTF-8 bytes, normalised, fixed width: 1.3 million in 16 MB
    defect: np.ndarray  # (N,) int8: 1 defect, 0 normal, -1 not labelled
    classes: np.ndarray  # (N, C) bool; all False where not labelled
    class_names: tuple[str, ...]  # C names, in the file's order
    line: np.ndarray  # (N,) int32 line of the file on which the row ends, from 1
    ignored: tuple[str, ...]  # names of the columns that are neither needed nor a class

    def __len__(self):
        return len(self.defect)

    def take(self, rows):
        """The same table with some of its rows: numbers, or a mask (N,)."""
        arrays = ("filename", "defect", "classes", "line")
        return replace(self, **{name: getattr(self, name)[rows] for name in arrays})

    def name(self, row):
        """File name of a row, as text."""
        return self.filename[row].decode()

    def place(self, row):
        """Where a row stands, as path:line."""
        return f"{self.path}:{self.line[row]}"

    def sha256(self, rows=None):
        """Hash of names, labels and classes of the given rows (default: all)."""
        rows = slice(None) if rows is None else rows
        digest = hashlib.sha256(repr((self.class_names, self.filename.dtype.str)).encode())
        for array in (self.filename, self.defect, self.classes):
            digest.update(np.ascontiguousarray(array[rows]).tobytes())
        return digest.hexdigest()


def read_annotations(path):
    """CSV file -> Annotations. Raises UserError naming the file, and the line and column if any.

    Sewer-ML's 1.3 million rows take a second, a file with quotes, or blank lines, some seconds.
    """
    path = os.fspath(path)
    try:
        header, names, line, filename, codes, wrong = read_table(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    defect, codes = codes[:, 0].copy(), codes[:, 1:]
    labelled = (defect != UNLABELLED)[:, None]
    values = ((codes != WRONG) & labelled).sum(axis=0)  # (C,)
    used = [
        c
        for c, name in enumerate(names)
        if name in CLASS_IMPORTANCE
        or values[c]
        and 100 * values[c] >= CLASS_PERCENT * labelled.sum()
    ]
    codes = codes[:, used]
    if count := (codes == WRONG).sum():
        refuse(path, [place for lists in wrong for c in used for place in lists[c]], count)
    class_names = tuple(names[c] for c in used)
    annotations = Annotations(
        path,
        filename,
        defect,
        (codes == DEFECT) & labelled,
        class_names,
        line,
        tuple(
            name or f"column {i} (no name)"
            for i, name in enumerate(header, 1)
            if name not in ("Filename", "Defect", *class_names)
        ),
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
        places = [(annotations.line[i], f"Filename {annotations.name(i)!r} {text}") for i in again]
        refuse(annotations.path, places)


def _check_defect_is_any_class(annotations):
    """In Sewer-ML's layout Defect is "any of the 17"; a contradiction is an error of the file."""
    if not set(CLASS_IMPORTANCE) <= set(annotations.class_names):
        return
    sewer_ml = [annotations.class_names.index(name) for name in CLASS_IMPORTANCE]
    any_class = annotations.classes[:, sewer_ml].any(axis=1)
    defect = annotations.defect
    wrong = np.flatnonzero((defect != UNLABELLED) & ((defect == DEFECT) != any_class))
    if len(wrong):
        text = "which contradicts its 17 class columns"
        places = [(annotations.line[i], f"Defect is {defect[i]}, {text}") for i in wrong]
        refuse(annotations.path, places)


def count_labels(defect):
    """(N,) labels -> {"normal": n, "defect": n, "unlabelled": n}."""
    groups = {"normal": NORMAL, "defect": DEFECT, "unlabelled": UNLABELLED}
    return {name: int((defect == group).sum()) for name, group in groups.items()}


def check_disjoint(train, val):
    """Raises UserError where a file name stands in both: validation would see training images."""
    both = np.intersect1d(train.filename, val.filename, assume_unique=True)  # each its own: faster
    if len(both):
        shown = ", ".join(name.decode() for name in both[:3])
        raise UserError(
            f"{train.path} and {val.path} share {len(both)} file names, such as {shown}: "
            "validation would see training images"
        )


def read_split(train_csv, val_csv):
    """The Annotations of both; raises UserError where a file name stands in both."""
    train, val = read_annotations(train_csv), read_annotations(val_csv)
    check_disjoint(train, val)
    return train, val


def subset_text(normal, defect, unlabelled, train, val):
    """Numbers of images, and of both tables (Annotations) the classes and the rest, in words."""
    share = defect / max(normal + defect, 1)
    text = f"train: {normal} normal, {defect} defect ({share:.2%} of the labelled), "
    text += f"{unlabelled} not labelled; validation: {len(val)} images"
    if unlabelled:
        text += "\npre-training sees the unlabelled images too, so another mix than that proportion"
    of_train, of_val = _columns_text(train), _columns_text(val)
    if of_train == of_val:
        return f"{text}\n{of_train}"
    return f"{text}\ntrain: {of_train}\nvalidation: {of_val}"


def _columns_text(table):
    words = (", ".join(names) or "none" for names in (table.class_names, table.ignored))
    return "classes: {}; ignored columns: {}".format(*words)
