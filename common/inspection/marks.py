"""Marks that people made on a review page, into the CSVs that they train on."""

import csv
import io
import itertools
import os
from pathlib import Path

from common.annotations import DEFECT, NORMAL, UNLABELLED, read_annotations
from common.label_table import read_header
from common.running.errors import UserError, some
from common.running.folder import write_atomically
from common.running.progress import say

CELLS = {DEFECT: "1", NORMAL: "0"}


def write_csv(path, rows, header, delimiter=","):
    """Rows of cells -> a CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows])
    write_atomically(path, text.getvalue())


def read_marks(path):
    """labels.csv of review -> {normalised name: 1 or 0}, and how many are unsure."""
    marks = read_annotations(path)
    known = marks.defect != UNLABELLED
    names = {marks.name(i): int(marks.defect[i]) for i in known.nonzero()[0]}
    return names, int((~known).sum())


def _roots(path):
    """Which folders the marked images lay in when they were scored, real paths."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        delimiter, names = read_header(path, file)
        rows = csv.DictReader(file, names, delimiter=delimiter)
        roots = {row.get("Root") for row in itertools.islice(rows, 1, None)}
    return {os.path.realpath(root) for root in roots if root}


def fill(folder, train_csv, val_csv, labels_csv):
    """Marks into the empty cells of train_csv; what it was is kept as train_1.csv, train_2.csv, ...

    folder: that the CSVs' names are relative to. Raises UserError where a mark is of an image below
    another folder, of a validation image, whose labels must not depend on scores, or of an image
    that neither CSV has.
    """
    marks, unsure = read_marks(labels_csv)
    train, val = read_annotations(train_csv), read_annotations(val_csv)
    if other := _roots(labels_csv) - {os.path.realpath(folder)}:
        raise UserError(
            f"{labels_csv}: marks of images in {', '.join(sorted(other))}, not in {folder}. Where "
            "that is the same folder, which has moved, take the column Root away"
        )
    in_val = [val.name(i) for i in range(len(val)) if val.name(i) in marks]
    unknown = set(marks).difference(map(train.name, range(len(train))), in_val)
    of_val = f"are of {val_csv}: labels of validation must not depend on scores"
    of_others = f"are of images that {train_csv} does not name: score them from its root"
    for found, why in ((in_val, of_val), (sorted(unknown), of_others)):
        if found:
            raise UserError(f"{labels_csv}: {len(found)} marks {why}: {some(found)}")
    with open(train_csv, newline="", encoding="utf-8-sig") as file:
        delimiter, _ = read_header(train_csv, file)
        text = file.read()
    header, *rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    columns = {name.strip(): i for i, name in enumerate(header)}
    filled, other = 0, []
    for i, row in enumerate(rows):
        mark = marks.get(train.name(i))
        if mark is None:
            continue
        if train.defect[i] == UNLABELLED:
            filled += 1
            row[columns["Defect"]] = CELLS[mark]
            for kind in train.class_names:
                row[columns[kind]] = CELLS[NORMAL]  # which class it is, a mark does not say
        elif train.defect[i] != mark:
            other.append(train.name(i))
    kept = next(
        path
        for path in (Path(train_csv).with_name(f"train_{i}.csv") for i in itertools.count(1))
        if not path.exists()
    )
    kept.write_text(text, encoding="utf-8")
    write_csv(train_csv, rows, header, delimiter)
    print(f"{train_csv}: {filled} of {len(marks)} marks filled in, {unsure} unsure; before: {kept}")
    if other:
        say(f"{len(other)} marks contradict a label that was there, and stays: {some(other)}")
