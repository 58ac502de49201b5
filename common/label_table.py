"""One annotation CSV as chunks of arrays, checked cell by cell: what `read_annotations` joins."""

import csv
import difflib

import numpy as np

from common.running.errors import UserError

NOT_CLASSES = ("Filename", "Defect", "WaterLevel", "VA", "ND")
DEFECT, NORMAL, UNLABELLED = 1, 0, -1

_CODES = {"0": 0, "1": 1, "": UNLABELLED}
_WRONG = 2  # code of a cell that is none of these
_ROWS_AT_ONCE = 65536
_LONGEST_NAME = 1024  # bytes
_SHOWN = 5  # rows in a message


def refuse(path, problems):
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
    """Cells '0', '1' or '' -> int8 codes 0, 1, -1; any other cell gives 2."""
    text = "".join(cells)
    if "" not in cells and len(text) == len(cells) and not text.strip("01"):  # quick, and usual
        return np.frombuffer(text.encode(), np.int8) - ord("0")
    return np.fromiter((_CODES.get(cell, _WRONG) for cell in cells), np.int8, len(cells))


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


class _Chunk:
    """Some rows of a file as arrays, with what is wrong with them."""

    def __init__(self, path, header, class_names, rows, lines):
        self.lines = np.array(lines, np.int32)
        uneven = [
            (n, len(row)) for n, row in zip(lines, rows, strict=True) if len(row) != len(header)
        ]
        if uneven:
            text = f"cells, the header has {len(header)}"
            refuse(path, [(line, f"{cells} {text}") for line, cells in uneven])
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        names = columns["Filename"]
        bad = [(n, why) for n, why in zip(lines, map(_bad_name, names), strict=True) if why]
        self.defect = _codes(columns["Defect"])
        bad += self._wrong("Defect", columns, self.defect == _WRONG, "0, 1 or empty (not labelled)")
        if bad:
            refuse(path, bad)
        self.filename = np.array([name.encode() for name in names])
        labelled = self.defect != UNLABELLED
        self.classes = np.empty((len(rows), len(class_names)), np.int8)
        self.is_class, self.wrong = [], []  # a class: whether a labelled row holds 0 or 1
        for c, name in enumerate(class_names):
            self.classes[:, c] = codes = _codes(columns[name])
            wrong = (codes == _WRONG) | ((codes == UNLABELLED) & labelled)
            self.is_class.append(bool((labelled & ~wrong).any()))
            self.wrong.append(self._wrong(name, columns, wrong, "0 or 1"))
        self.classes = self.classes == 1
        self.classes[~labelled] = False

    def _wrong(self, name, columns, where, allowed):
        return [
            (int(self.lines[i]), f"{name} is {columns[name][i][:40]!r}, expected {allowed}")
            for i in np.flatnonzero(where)
        ]


def read_chunks(path):
    """The header's other columns, and the file's rows as a list of _Chunk."""
    chunks, rows, lines = [], [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path}: the file is empty")
            names = _read_header(path, header)
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(reader.line_num)
                if len(rows) == _ROWS_AT_ONCE:
                    chunks.append(_Chunk(path, header, names, rows, lines))
                    rows, lines = [], []
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None
    if rows:
        chunks.append(_Chunk(path, header, names, rows, lines))
    return names, chunks
