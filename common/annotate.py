"""From a team's folder of images to train.csv and val.csv, with a check for shortcuts.

    python -m common.annotate FOLDER --out DIR [--normal free] [--val-share .3] [--group REGEX]
    python -m common.annotate FOLDER --out DIR --labels labels.csv
    python -m common.annotate FOLDER --check CSV [CSV]

FOLDER has a folder a class, of which --normal names the one of normal images, or, right inside it,
images that nobody has labelled, or both. --group: images in whose name (below FOLDER) it finds the
same text, such as a video or a part, stay together, as do identical files: otherwise validation
sees what was trained on. --labels: marks of `python -m common.review` fill empty cells of the
train.csv in DIR; the old one is kept. The check is of train.csv against val.csv, or of any CSVs: it
tells what can be read off the files themselves, and the floors that a method has to beat.
"""

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections import Counter, defaultdict

import numpy as np

from common.inspection.listing import list_images, must_be_new
from common.inspection.marks import fill, write_csv
from common.inspection.shortcuts import check
from common.label_table import NOT_CLASSES, normal_name
from common.running.arguments import path_argument, share
from common.running.errors import SHOWN, UserError, regular
from common.running.process import entry_point
from common.running.progress import Progress, say, write_error

NORMAL_NAMES = ("normal", "normals", "good", "ok", "free", "no_defect", "nodefect", "defect_free")
TRAIN, VAL = "train.csv", "val.csv"


def classes_of(names, normal=None):
    """(class of each image or None, name of the normal class or None where there is no class).

    names: a/b/c.png is of class a, c.png of none. Raises UserError where no folder is --normal.
    """
    kinds = [name.split("/")[0] if "/" in name else None for name in names]
    folders = sorted({kind for kind in kinds if kind is not None})
    if not folders:
        return kinds, None
    found = [kind for kind in folders if kind == normal]
    known = [normal.lower()] if normal else NORMAL_NAMES
    found = found or [kind for kind in folders if kind.lower() in known]
    if reserved := [kind for kind in folders if kind in NOT_CLASSES]:
        raise UserError(f"folder {reserved[0]}: a column of that name has a meaning of its own")
    if len(found) != 1:
        asked = f"--normal {normal}: no such folder" if normal else "--normal: not named"
        raise UserError(f"{asked}; which of these has the normal images? {', '.join(folders)}")
    return kinds, found[0]


def groups_of(names, digests, pattern=None):
    """A group's number for each image: same text found by the pattern, or the same bytes.

    pattern: a compiled regular expression; its first bracket counts, without one all of it. An
    image in which it finds nothing is a group of its own.
    """
    parent = list(range(len(names)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for i, (name, digest) in enumerate(zip(names, digests, strict=True)):
        found = pattern.search(name) if pattern else None
        text = found and found[1 if pattern.groups else 0]
        for key in (("bytes", digest), ("text", text)):
            if key[1] is not None:
                parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(names))]


def split(names, kinds, groups, val_share):
    """Whether each image is for validation. Groups stay whole; each kind of group is shared alike.

    A kind is a set of classes. Within one, groups come in the order of a hash of their first name,
    so that the split is no matter of order or chance; a kind's only group is trained on.
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    of_kind = defaultdict(list)
    for images in members.values():
        key = hashlib.sha256(min(names[i] for i in images).encode()).digest()
        of_kind[frozenset(kinds[i] for i in images)].append((key, images))
    is_val = [False] * len(names)
    for found in of_kind.values():
        left = val_share * sum(len(images) for _, images in found)
        for _, images in sorted(found)[: len(found) - 1]:
            if len(images) / 2 <= left:  # nearer to the share with it than without
                left -= len(images)
                for i in images:
                    is_val[i] = True
    return is_val


def _digests(root, names):
    """sha256 of each file's bytes; None where it cannot be read. Names the identical ones."""
    progress, digests = Progress(len(names), "reading", "files"), []
    for name in names:
        digest = None
        with contextlib.suppress(OSError), open(regular(os.path.join(root, name)), "rb") as file:
            digest = hashlib.sha256(file.read()).digest()
        digests.append(digest)
        progress.update()
    progress.close()
    copies = defaultdict(list)
    for name, digest in zip(names, digests, strict=True):
        copies[digest].append(name)
    same = [found for digest, found in copies.items() if digest and len(found) > 1]
    if same:
        say(f"{sum(map(len, same)) - len(same)} images are copies of another, byte for byte:")
        for found in same[:SHOWN]:
            say(f"  {' = '.join(found[:SHOWN])}" + (" ..." if len(found) > SHOWN else ""))
    return digests


def make_csvs(folder, out, normal, val_share, pattern):
    """train.csv and val.csv of a folder, a column a class of defects.

    Returns their paths and {name: why} of what could not be used.
    """
    root, found, others, skipped = list_images([folder])
    if others:
        say(f"{others} other files are no images, by their names")
    names, unusable = [], dict(skipped)
    for name in found:
        try:
            names.append(normal_name(name.decode()))
        except ValueError as why:  # no UTF-8, or a line break
            unusable[os.fsdecode(name).encode(errors="backslashreplace").decode()] = str(why)
    kinds, normal = classes_of(names, normal)
    groups = groups_of(names, _digests(root, names), pattern)
    if pattern is not None:
        known = sum(pattern.search(name) is not None for name in names)
        say(f"{len(set(groups))} groups; --group finds something in {known} of {len(names)} names")
    is_val = split(names, kinds, groups, val_share)
    if normal is not None:  # nothing can be scored by images without a label
        is_val = [val and kind is not None for val, kind in zip(is_val, kinds, strict=True)]
    if not any(is_val) or all(is_val):
        few = f"{len(set(groups))} groups of images"
        raise UserError(f"{few} cannot be split into training and validation; see --group")
    os.makedirs(out, exist_ok=True)
    defects = sorted({kind for kind in kinds if kind not in (None, normal)})
    header = ["Filename", *defects, "Defect"]
    paths = [os.path.join(out, name) for name in (TRAIN, VAL)]
    for path, of_val in zip(paths, (False, True), strict=True):
        rows = []
        for name, kind, val in sorted(zip(names, kinds, is_val, strict=True), key=lambda x: x[0]):
            if val == of_val:
                cells = [int(kind == name_of) for name_of in defects] + [int(kind != normal)]
                rows.append([name, *([""] * len(cells) if kind is None else cells)])
        write_csv(path, rows, header)
        here = Counter(kind for kind, val in zip(kinds, is_val, strict=True) if val == of_val)
        counts = ", ".join(f"{n} {kind or 'not labelled'}" for kind, n in here.most_common())
        print(f"{path}: {len(rows)} images: {counts}")
    return paths, unusable


def halves(pattern):
    """(names, labels) -> (n,) bool that halves them by group, for a check of a single CSV."""

    def half(names, labels):
        groups = groups_of(names, [None] * len(names), pattern)
        return np.array(split(names, [str(label) for label in labels], groups, 0.5), bool)

    return half


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=path_argument, metavar="FOLDER")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="of train.csv and val.csv")
    parser.add_argument("--normal", metavar="NAME", help="of the folder of normal images")
    parser.add_argument("--val-share", type=share, default=0.3, metavar="SHARE")
    parser.add_argument("--group", metavar="REGEX", help="searched for in the names below FOLDER")
    parser.add_argument("--labels", type=path_argument, metavar="labels.csv")
    parser.add_argument("--check", type=path_argument, nargs="+", metavar="CSV")
    parser.add_argument("--force", action="store_true", help="overwrite train.csv and val.csv")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.check is None):
        raise UserError("give either --out or --check")
    pattern = None
    if args.group is not None:
        try:
            pattern = re.compile(args.group)
        except re.error as error:
            raise UserError(f"--group: {args.group!r} is no regular expression: {error}") from None
    if args.check:
        if len(args.check) > 2:
            raise UserError(
                f"--check: a train.csv and a val.csv, or one CSV; got {len(args.check)}"
            )
        check(args.folder, args.check, halves(pattern))
        return
    paths, unusable = [os.path.join(args.out, name) for name in (TRAIN, VAL)], {}
    if args.labels:
        fill(args.folder, *paths, args.labels)
    else:
        must_be_new(paths, args.force)
        paths, unusable = make_csvs(args.folder, args.out, args.normal, args.val_share, pattern)
    check(args.folder, paths, halves(pattern))
    if unusable:
        for name, why in [*unusable.items()][:SHOWN]:
            write_error(f"{name}: {why}")
        write_error(f"{len(unusable)} files or folders are not in these CSVs")
        sys.exit(1)


if __name__ == "__main__":
    main()
