"""One annotation CSV as chunks of arrays, checked cell by cell: what `read_annotations` joins."""

import csv
import difflib
import re

import numpy as np

from common.running.errors import CONTROL, UserError

NOT_CLASSES = ("Filename", "Defect", "WaterLevel", "VA", "ND", "")
DEFECT, NORMAL, UNLABELLED = 1, 0, -1

_DELIMITERS = ",;\t"
_CODES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": UNLABELLED}
_WRONG = 2  # code of a cell that is none of these
_ROWS_AT_ONCE = 65536
_LONGEST_NAME = 1024  # bytes
_SHOWN = 5  # rows in a message
_NOT_NORMAL = re.compile(r"\\|//|(^|/)\.(/|$)|/$")  # in a name that another one may be the same as
# In names between line breaks: what needs a closer look, which takes ten times as long.
_SUSPECT = re.compile(r"[\\:\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]|\.[./]|/[/.\n]|\n[/.\n]")


def refuse(path, problems, count=None):
    """Raise UserError with the first few problems, given as (line, sentence), and their count."""
    count = count or len(problems)
    shown = [f"{path}:{line}: {sentence}" for line, sentence in sorted(problems)[:_SHOWN]]
    if count > _SHOWN:
        shown.append(f"... {count} such rows in all")
    raise UserError("\n".join(shown))


def _read_header(path, file):
    """(delimiter, column names): the delimiter is the one that finds both columns needed."""
    found, needed = [], {"Filename", "Defect"}
    for delimiter in _DELIMITERS:
        file.seek(0)
        try:
            names = next(csv.reader(file, delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            why = error
            continue
        names = [name.strip() for name in names]
        found.append((len(needed.intersection(names)), len(names), delimiter, names))
    file.seek(0)
    if not found:
        raise UserError(f"{path}:1: {why}")
    *_, delimiter, names = max(found, key=lambda f: f[:2])
    if not any(names):
        raise UserError(f"{path}: the first line is empty, where the columns' names are expected")
    return delimiter, names


def _check_header(path, header):
    for name in header:
        if CONTROL.search(name):
            raise UserError(f"{path}: column {name[:80]!r} holds a control character")
        if name and header.count(name) > 1:
            raise UserError(f"{path}: column '{name}' stands twice")
    for name in ("Filename", "Defect"):
        if name not in header:
            close = difflib.get_close_matches(name.lower(), [h.lower() for h in header], n=1)
            near = next((h for h in header if close and h.lower() == close[0]), None)
            hint = f"; did you mean '{near}'?" if near else ""
            columns = ", ".join(header)[:200] or "none"
            raise UserError(f"{path}: column '{name}' is missing (columns: {columns}){hint}")


def _codes(cells):
    """Cells of _CODES, in any case and between blanks -> int8 codes; any other cell gives 2."""
    text = "\n".join(cells)
    for _ in range(2):  # the quick and usual way: every cell is one digit, or becomes one
        if len(text) == 2 * len(cells) - 1 and not text[1::2].strip("\n"):
            if not text[::2].strip("01"):
                return np.frombuffer(text[::2].encode(), np.int8) - ord("0")
        text = text.lower().replace("1.0", "1").replace("0.0", "0")
        text = text.replace("true", "1").replace("false", "0")  # last: true.0 is no value
    codes = {cell: _CODES.get(cell.strip().lower(), _WRONG) for cell in set(cells)}
    return np.fromiter(map(codes.__getitem__, cells), np.int8, len(cells))


def normal_name(name):
    """A file name in the one form in which it is compared and opened: a/b.png for .\\a//b.png.

    Raises ValueError saying why where it is refused: nothing outside the image root may be named.
    """
    if _NOT_NORMAL.search(name):
        above = "/" * name.startswith(("/", "\\"))  # normpath keeps two, and takes `a/..` away
        parts = name.replace("\\", "/").split("/")
        name = above + "/".join(part for part in parts if part not in ("", "."))
    if not name:
        raise ValueError("Filename is empty")
    if CONTROL.search(name):
        text = "holds a line break or another control character (an unbalanced quote?)"
        raise ValueError(f"Filename {name[:80]!r} {text}")
    if name[0] == "/" or name[1:2] == ":" or (".." in name and ".." in name.split("/")):
        raise ValueError(f"Filename {name!r} points outside the image root")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"Filename is longer than {_LONGEST_NAME} bytes")
    return name


def _normal_names(names, lines):
    """(file names as UTF-8 bytes, [(line, why)] of those that are refused)."""
    text = "\n{}\n".format("\n".join(names))
    plain = text.count("\n") == len(names) + 1 and not _SUSPECT.search(text)
    if plain and len(max(names, key=len)) * 4 <= _LONGEST_NAME:
        return [name.encode() for name in names], []
    normal, refused = [], []
    for line, name in zip(lines, names, strict=True):
        try:
            normal.append(normal_name(name).encode())
        except ValueError as why:
            refused.append((line, str(why)))
    return normal, refused


class _Chunk:
    """Some rows of a file as arrays, with what is wrong with them.

    Whether a column is a class is known when all chunks are: until then its cells are counted.
    """

    def __init__(self, path, header, names, rows, lines):
        """names: those columns of the header that may be classes."""
        self.lines = np.array(lines, np.int32)
        uneven = [
            (n, len(row)) for n, row in zip(lines, rows, strict=True) if len(row) != len(header)
        ]
        if uneven:
            text = f"cells, the header has {len(header)}"
            refuse(path, [(line, f"{cells} {text}") for line, cells in uneven])
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        filenames, bad = _normal_names(columns["Filename"], lines)
        self.defect = _codes(columns["Defect"])
        where = np.flatnonzero(self.defect == _WRONG)
        bad += self._told("Defect", columns, where, "0, 1 or empty (not labelled)")
        if bad:
            refuse(path, bad)
        self.filename = np.array(filenames)
        labelled = self.defect != UNLABELLED
        self.labelled = int(labelled.sum())
        self.classes = np.empty((len(rows), len(names)), bool)
        self.values = np.empty(len(names), np.int64)  # (C,) labelled cells that are 0 or 1
        self.wrong = []  # C times: the first few wrong cells, and how many there are
        for c, name in enumerate(names):
            codes = _codes(columns[name])
            self.classes[:, c] = (codes == DEFECT) & labelled
            self.values[c] = (labelled & (codes <= 1) & (codes >= 0)).sum()
            where = np.flatnonzero((codes == _WRONG) | ((codes == UNLABELLED) & labelled))
            self.wrong.append((self._told(name, columns, where[:_SHOWN], "0 or 1"), len(where)))

    def _told(self, name, columns, where, allowed):
        return [
            (int(self.lines[i]), f"{name} is {columns[name][i][:40]!r}, expected {allowed}")
            for i in where
        ]


def read_chunks(path):
    """(header, those of its columns that may be classes, the file's rows as a list of _Chunk)."""
    chunks, rows, lines = [], [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        delimiter, header = _read_header(path, file)
        _check_header(path, header)
        names = tuple(name for name in header if name not in NOT_CLASSES)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            next(reader)
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
    return header, names, chunks
