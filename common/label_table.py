"""One annotation CSV as chunks of arrays, checked cell by cell: for `read_annotations`."""

import csv
import difflib
import re
from itertools import islice

import numpy as np

from common.running.errors import CONTROL, SHOWN, UserError, regular

NOT_CLASSES = ("Filename", "Defect", "WaterLevel", "VA", "ND", "")
DEFECT, NORMAL, UNLABELLED = 1, 0, -1
WRONG = 2  # code of a cell that is none of these

_DELIMITERS = ",;\t"
_CODES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "": UNLABELLED}
_BYTES_AT_ONCE = 1 << 20  # of a plain file
_ROWS_AT_ONCE = 65536  # of any other
_LONGEST_NAME = 1024  # bytes
_NOT_NORMAL = re.compile(r"\\|//|(^|/)\.(/|$)|/$")  # in a name that another one may be the same as
_SUSPECT = bytes(range(1, 32)) + b"\\:\x7f\xc2\xe2"  # bytes: a name with one is looked at closely
_KINDS = bytes.maketrans(_SUSPECT + b"/", b"\1" * len(_SUSPECT) + b".")


def refuse(path, problems, count=None):
    """Raise UserError with the first few problems, given as (line, sentence), and their count."""
    count = count or len(problems)
    shown = [f"{path}:{line}: {sentence}" for line, sentence in sorted(problems)[:SHOWN]]
    if count > SHOWN:
        shown.append(f"... {count} such rows in all")
    raise UserError("\n".join(shown))


def read_header(path, file):
    """(delimiter, column names) of an open CSV, which stands at its start again.

    The delimiter is the one that finds both columns needed, or that one of them that there is.
    """
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
    for name in ("Filename", "Defect"):
        if name not in header:
            close = difflib.get_close_matches(name.lower(), [h.lower() for h in header], n=1)
            near = next((h for h in header if close and h.lower() == close[0]), None)
            hint = f"; did you mean '{near}'?" if near else ""
            columns = ", ".join(header)[:200] or "none"
            raise UserError(f"{path}: column '{name}' is missing (columns: {columns}){hint}")
    for name in filter(None, header):
        if header.count(name) > 1:
            raise UserError(f"{path}: column '{name}' stands twice")


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


def _chunk(path, header, names, lines, cells):
    """N rows: (lines, file names, codes (N, 1 + C) of Defect and `names`, C lists of wrong cells).

    cells: (text, start, end): the cell of row i and column c is text[start[i, c]:end[i, c]].
    Whether a column is a class is known when all rows are: so its first wrong cells are kept.
    """
    filename, bad = _names(cells, header.index("Filename"), lines)
    columns = [header.index(name) for name in ("Defect", *names)]
    codes = _codes(cells, columns)

    def wrong(c, allowed, most=None):
        where = np.flatnonzero(codes[:, c] == WRONG)[:most]
        found = zip(lines[where], _texts(cells, columns[c], where), strict=True)
        return [(n, f"{header[columns[c]]} is {x[:40]!r}, expected {allowed}") for n, x in found]

    if bad := bad + wrong(0, "0, 1 or empty (not labelled)"):
        refuse(path, bad)
    codes[(codes == UNLABELLED) & (codes[:, :1] != UNLABELLED)] = WRONG
    return lines, filename, codes, [wrong(c, "0 or 1", SHOWN) for c in range(1, len(columns))]


def _texts(cells, column, rows):
    text, start, end = cells
    places = zip(start[rows, column].tolist(), end[rows, column].tolist(), strict=True)
    return [text[a:b].decode() for a, b in places]


def _codes(cells, columns):
    """(N, len(columns)) int8 codes of cells of _CODES, in any case and between blanks; else 2."""
    text, start, end = cells
    codes = np.frombuffer(text + b"\0", np.uint8)[start] - ord("0")  # right where it is one digit
    codes = np.minimum(codes, WRONG).view(np.int8)
    codes[end - start > 1] = WRONG
    codes[end == start] = UNLABELLED
    codes = codes[:, columns]
    for c in np.flatnonzero((codes == WRONG).any(axis=0)):
        rows = np.flatnonzero(codes[:, c] == WRONG)
        found = _texts(cells, columns[c], rows)
        known = {cell: _CODES.get(cell.strip().lower(), WRONG) for cell in set(found)}
        codes[rows, c] = [known[cell] for cell in found]
    return codes


def _names(cells, column, lines):
    """(file names as UTF-8 bytes, [(line, why)] of those that are refused)."""
    text, start, end = cells
    start, length = start[:, column], end[:, column] - start[:, column]
    width = length.max()
    if length.min() and width <= _LONGEST_NAME and b"\0" not in text:
        names = np.ndarray(len(text), f"S{width}", text + bytes(width), strides=1)[start]
        names.view(np.uint8).reshape(-1, width)[np.arange(width) >= length[:, None]] = 0
        kinds = (b"\0" + names.astype(f"S{width + 1}").tobytes()).translate(_KINDS)
        if not any(kind in kinds for kind in (b"\1", b"..", b".\0", b"\0.")):
            return names, []
    normal, refused = [], []
    for line, name in zip(lines, _texts(cells, column, slice(None)), strict=True):
        try:
            normal.append(normal_name(name).encode())
        except ValueError as why:
            refused.append((line, str(why)))
    return np.array(normal), refused


def _plain_rows(path, delimiter, columns):
    """Yield (lines, cells) of a file in which every line is a row; ValueError where it may not."""
    with open(path, "rb") as file:
        done = 0
        while block := file.read(_BYTES_AT_ONCE) + file.readline():
            text = block.replace(b"\r\n", b"\n").removesuffix(b"\n") + b"\n"
            text.decode()  # raises where it is no UTF-8
            data = np.frombuffer(text, np.uint8)
            end = np.flatnonzero((data == ord("\n")) | (data == ord(delimiter)))
            breaks = np.flatnonzero(data[end] == ord("\n"))
            even = np.array_equal(breaks, np.arange(columns - 1, len(end), columns))
            if not even or b'"' in text or b"\r" in text:
                raise ValueError("csv.reader has to look at it")
            lines = np.arange(done, done + len(breaks), dtype=np.int32) + 1
            start = np.append(0, end[:-1] + 1)
            rows = slice(done == 0, None)  # without the header
            yield lines[rows], (text, *(x.reshape(-1, columns)[rows] for x in (start, end)))
            done += len(breaks)


def _csv_rows(path, delimiter, columns):
    """Yield (lines, cells) of any file."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            next(reader)
            numbered = ((reader.line_num, row) for row in reader if row)
            while rows := list(islice(numbered, _ROWS_AT_ONCE)):
                if uneven := [(line, len(row)) for line, row in rows if len(row) != columns]:
                    text = f"cells, the header has {columns}"
                    refuse(path, [(line, f"{cells} {text}") for line, cells in uneven])
                lines = np.array([line for line, _ in rows], np.int32)
                cells = [cell for _, row in rows for cell in row]
                text = "".join(cells).encode()
                lengths = map(len, cells if text.isascii() else map(str.encode, cells))
                length = np.fromiter(lengths, np.int64, len(cells)).reshape(-1, columns)
                end = length.cumsum().reshape(-1, columns)
                yield lines, (text, end - length, end)
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}") from None


def read_table(path):
    """(header, those C of its columns that may be classes, and what _chunk gives, of all rows).

    The wrong cells stay one list of C lists a chunk.
    """
    with open(regular(path), newline="", encoding="utf-8-sig") as file:
        delimiter, header = read_header(path, file)
    _check_header(path, header)
    names = tuple(name for name in header if name not in NOT_CLASSES)
    how = path, delimiter, len(header)
    try:
        chunks = [_chunk(path, header, names, *rows) for rows in _plain_rows(*how) if len(rows[0])]
    except (ValueError, UserError):  # what is wrong is told by csv.reader's rows
        chunks = [_chunk(path, header, names, *rows) for rows in _csv_rows(*how)]
    if not chunks:
        raise UserError(f"{path}: there is a header, but no row")
    *arrays, wrong = zip(*chunks, strict=True)
    return header, names, *map(np.concatenate, arrays), wrong
