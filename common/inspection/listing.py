"""What a command line names: image files, folders, the names of a CSV."""

import csv
import os
from typing import NamedTuple

import numpy as np

from common.label_table import normal_name, read_header, refuse
from common.running.errors import UserError, regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # of images in a folder


def must_be_new(paths, force):
    """Raises UserError naming those that are there, unless --force was given."""
    there = [str(path) for path in paths if os.path.exists(path)]
    if there and not force:
        raise UserError(f"{', '.join(there)}: there already; --force overwrites")


class Listing(NamedTuple):
    """The images that were named."""

    root: str
    filename: np.ndarray  # (N,) names below it as bytes, each once
    others: int  # files in folders that are no images, by their names
    skipped: dict  # {folder: why it was not looked into}


def list_images(paths, image_root=None):
    """Listing of the images that a command line names.

    paths: files and folders, or one CSV with a column Filename; image_root: what names are relative
    to, otherwise the one folder, the CSV's folder, or the deepest folder that holds all. A folder's
    files come in the order of their names. Raises UserError naming what is not there.
    """
    tables = [path for path in paths if path.lower().endswith((".csv", ".tsv"))]
    if tables and len(paths) > 1:
        raise UserError(f"{tables[0]}: a CSV of names stands alone, not among {len(paths)} paths")
    if tables:
        root = image_root or os.path.dirname(paths[0]) or "."
        return Listing(os.path.realpath(root), _array(_names(paths[0])), 0, {})
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
    folders = [path if os.path.isdir(path) else os.path.dirname(path) or "." for path in paths]
    root = os.path.realpath(image_root or os.path.commonpath(map(os.path.realpath, folders)))
    found, others, skipped = {}, 0, {}
    for path, folder in zip(paths, folders, strict=True):
        at = os.path.realpath(folder)
        below = at == root or at.startswith(os.path.join(root, ""))
        if not below:
            raise UserError(f"{path}: not below --image-root {root}")
        if folder != path:
            found[os.path.relpath(os.path.join(at, os.path.basename(path)), root)] = None
            continue
        unreadable = []
        for place, inside, files in os.walk(at, onerror=unreadable.append):
            inside.sort()
            links = [os.path.join(place, name) for name in inside]
            skipped |= {p: "a link to a folder; name it" for p in links if os.path.islink(p)}
            images = sorted(name for name in files if name.lower().endswith(SUFFIXES))
            others += len(files) - len(images)
            prefix = "" if place == root else os.path.relpath(place, root) + os.sep
            found |= dict.fromkeys(prefix + name for name in images)
        skipped |= {error.filename: error.strerror for error in unreadable}
    if not found:
        raise UserError(f"{', '.join(paths)}: no images ({' '.join(SUFFIXES)})")
    return Listing(root, _array(name.replace(os.sep, "/") for name in found), others, skipped)


def _array(names):
    return np.array(list(map(os.fsencode, names)))


def _names(path):
    """The names in a CSV's column Filename, normalised, each once."""
    found, refused = {}, []
    try:
        with open(regular(path), newline="", encoding="utf-8-sig") as file:
            delimiter, header = read_header(path, file)
            if "Filename" not in header:
                raise UserError(f"{path}: column 'Filename' is missing")
            column, reader = header.index("Filename"), csv.reader(file, delimiter=delimiter)
            next(reader)
            for row in reader:
                try:
                    if row:
                        found[normal_name(row[column] if column < len(row) else "")] = None
                except ValueError as why:
                    refused.append((reader.line_num, str(why)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: no CSV in UTF-8 ({type(error).__name__})") from None
    if refused:
        refuse(path, refused)
    if not found:
        raise UserError(f"{path}: there is a header, but no row")
    return found
