"""Cut DeepPCB into tiles: real images of printed circuit boards with six kinds of defect.

    python -m common.sets.deeppcb PCBData --out DIR

PCBData is that folder of a clone of https://github.com/tangsanli5201/DeepPCB. The command writes
DIR/images/GGGGG/NNNNNNNN_RC.png (128 x 128 pixels, 1 bit; tile in row R and column C of image
NNNNNNNN, board GGGGG), DIR/train.csv and DIR/val.csv: 33,588 tiles, of them 8,536 defects. The
CSVs are split by board: no board is in both. Their column `group` names it, and is no class.

The set: S. Tang, F. He, X. Huang, J. Yang, *Online PCB Defect Detector On A New PCB Defect
Dataset*, arXiv:1902.06197; MIT licence. 1,500 line scans of 11 boards, 640 x 640 pixels; some of
the defects were drawn by hand, say its authors. Each comes with a defect-free template
(NNNNNNNN_temp.jpg), which is *not* used: the greys of templates and tested images differ by their
JPEG history, so that the two are told apart without seeing a defect (by the share of mid-greys
alone: AUROC 1.000). For the same reason tiles are black and white. Normal tiles are those of
tested images that no defect touches.

The rule: 5 x 5 tiles an image from the top left; white where the grey is above 127. With
share = (area of a box inside the tile) / (area of the box), a tile is a defect of each class of
which it has a share of at least .5; one that has none of these, but more than .02 of any box, is
left out; all others are normal.
"""

import argparse
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.data import open_image
from common.running.errors import UserError
from common.running.folder import write_atomically
from common.running.process import entry_point
from common.running.progress import Progress

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pinhole")  # types 1 to 6
VALIDATION = ("00041", "13000", "77000")  # boards; the other eight are for training
HEADER = ("Filename", *CLASSES, "Defect", "group")
SIZE, TILE = 640, 128  # pixels
THRESHOLD = 127  # white above it
DEFECT_FROM, NORMAL_UP_TO = 0.5, 0.02  # shares of a box


class Board(NamedTuple):
    """One tested image."""

    path: Path  # .../groupGGGGG/GGGGG/NNNNNNNN_test.jpg
    boxes: np.ndarray  # (n, 5) int64: x1, y1, x2, y2 in pixels, type 1 to 6

    @property
    def group(self):
        return self.path.parent.name

    def tile_name(self, row, column):
        """File name of a tile below DIR/images."""
        return f"{self.group}/{self.path.stem.removesuffix('_test')}_{row}{column}.png"


def read_boxes(path):
    """A file of defects, `x1 y1 x2 y2 type` a line -> (n, 5) int64; UserError names the line."""
    boxes = []
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for number, line in enumerate(lines, 1):
        text = " ".join(line.split())
        if not text:
            continue
        box = [int(n) for n in text.split()] if re.fullmatch(r"(\d{1,3} ){4}[1-6]", text) else None
        if not box or not (box[0] < box[2] <= SIZE and box[1] < box[3] <= SIZE):
            raise UserError(
                f"{path}:{number}: {line[:80]!r} is no defect; expected x1 y1 x2 y2 type, with "
                f"x1 < x2 and y1 < y2 from 0 to {SIZE} and a type from 1 to 6"
            )
        boxes.append(box)
    return np.array(boxes, np.int64).reshape(-1, 5)


def read_boards(root):
    """All tested images below PCBData with their defects, sorted by path."""
    paths = sorted(Path(root).glob("group*/*/*_test.jpg"))
    if not paths:
        raise UserError(
            f"{root}: no groupGGGGG/GGGGG/NNNNNNNN_test.jpg in it; expected the folder PCBData of "
            "a clone of DeepPCB"
        )
    labels = [
        path.parent.with_name(f"{path.parent.name}_not") / f"{path.stem.removesuffix('_test')}.txt"
        for path in paths
    ]
    for label in sorted({*labels} ^ {*Path(root).glob("group*/*_not/*.txt")}):
        lost = f"{label}: not there, but its image is"
        raise UserError(lost if label in labels else f"{label}: its image is not there")
    return [Board(path, read_boxes(label)) for path, label in zip(paths, labels, strict=True)]


def tiles(boxes):
    """(n, 5) boxes -> [(row, column, (6,) bool classes)] of the tiles that are not left out."""
    start = np.arange(0, SIZE, TILE)
    x1, y1, x2, y2, kind = (column[:, None] for column in boxes.T)  # (n, 1)
    width = (np.minimum(x2, start + TILE) - np.maximum(x1, start)).clip(0)  # (n, 5)
    height = (np.minimum(y2, start + TILE) - np.maximum(y1, start)).clip(0)
    area = ((x2 - x1) * (y2 - y1))[..., None]
    share = height[:, :, None] * width[:, None, :] / area  # (n, 5 rows, 5 columns)
    mostly = share >= DEFECT_FROM
    classes = np.stack([mostly[kind[:, 0] == k + 1].any(0) for k in range(len(CLASSES))], -1)
    kept = classes.any(-1) | ~(share > NORMAL_UP_TO).any(0)
    return [(int(row), int(column), classes[row, column]) for row, column in np.argwhere(kept)]


def tables(boards):
    """The CSVs' texts by file name."""
    lines = {"train.csv": [], "val.csv": []}
    for board in boards:
        for row, column, classes in tiles(board.boxes):
            cells = [board.tile_name(row, column), *map(int, classes), int(classes.any())]
            name = "val.csv" if board.group in VALIDATION else "train.csv"
            lines[name].append(",".join(map(str, [*cells, board.group])) + "\n")
    return {name: "".join([",".join(HEADER) + "\n", *rows]) for name, rows in lines.items()}


def write_tiles(board, folder):
    """Write the tiles of one tested image below folder, black and white; UserError names it."""
    image = open_image(str(board.path.parent.resolve()), board.path.name)
    if image.size != (SIZE, SIZE):
        raise UserError(f"{board.path}: {image.size} pixels, expected {(SIZE, SIZE)}")
    white = np.asarray(image.convert("L")) > THRESHOLD
    (folder / board.group).mkdir(parents=True, exist_ok=True)
    for row, column, _ in tiles(board.boxes):
        y, x = row * TILE, column * TILE
        tile = Image.fromarray(white[y : y + TILE, x : x + TILE])  # bool: one bit a pixel
        tile.save(folder / board.tile_name(row, column))


def is_whole(out, files, names):
    """Whether folder out holds these CSVs and all of their images."""
    try:
        same = all((out / name).read_bytes() == text.encode() for name, text in files.items())
    except OSError:
        return False
    return same and all((out / "images" / name).is_file() for name in names)


def cut(root, out):
    """Write the tiles of PCBData to folder out. Returns the CSVs' texts by file name.

    What was begun and not finished is done again; a folder that holds anything else is refused.
    """
    out, boards = Path(out), read_boards(root)
    files = tables(boards)
    for name, text in files.items():
        if text.count("\n") < 2:
            raise UserError(f"{root}: no tile for {name}; validation boards: {VALIDATION}")
    names = [line.split(",")[0] for text in files.values() for line in text.splitlines()[1:]]
    mark = out / f"unfinished.{hashlib.sha256(''.join(files.values()).encode()).hexdigest()[:12]}"
    try:
        if not mark.exists() and out.exists() and any(out.iterdir()):
            if is_whole(out, files, names):
                return files
            raise UserError(
                f"{out}: holds something else than this set; choose another folder, or delete it"
            )
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        progress = Progress(len(boards), "cutting", "images")
        for board in boards:
            write_tiles(board, out / "images")
            progress.update()
        progress.close()
        for name, text in files.items():  # last: a CSV's images are all there
            write_atomically(out / name, text)
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    return files


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", metavar="PCBData", help="that folder of a clone of DeepPCB")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    args = parser.parse_args(argv)
    for name, text in cut(args.root, args.out).items():
        rows = [line.split(",") for line in text.splitlines()[1:]]
        defects = sum(row[HEADER.index("Defect")] == "1" for row in rows)
        print(f"{Path(args.out) / name}: {len(rows)} tiles, {defects} defects")


if __name__ == "__main__":
    main()
