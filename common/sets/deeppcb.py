"""Cut DeepPCB into tiles: real images of printed circuit boards with six kinds of defect.

    python -m common.sets.deeppcb PCBData --out DIR

PCBData is that folder of a clone of https://github.com/tangsanli5201/DeepPCB. Writes
DIR/images/GGGGG/NNNNNNNN_RC.png (1 bit a pixel; row R and column C of image NNNNNNNN, board GGGGG),
DIR/train.csv and DIR/val.csv: 33,588 tiles, 8,536 of them defects. No board is in both CSVs; their
column `group`, the board, is no class.

The set: Tang, He, Huang, Yang, *Online PCB Defect Detector On A New PCB Defect Dataset*,
arXiv:1902.06197; MIT licence. 1,500 images of 11 boards, 640 x 640; some defects were drawn by
hand, say its authors. The defect-free template beside each image (NNNNNNNN_temp.jpg) is *not* used:
templates and tested images differ in their JPEG greys, so that they are told apart without seeing a
defect (by the share of mid-grey pixels alone: AUROC 1.000).

The rule: 5 x 5 tiles an image from the top left, white where the grey is above 127, else black.
With share = (area of a box inside the tile) / (area of the box), a tile is a defect of every class
of which it has a share of at least .5; a tile without such a share that has more than .02 of any
box is left out; all others are normal.
"""

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import open_image
from common.running.arguments import path_argument
from common.running.errors import UserError
from common.running.faults import explain
from common.running.folder import write_atomically
from common.running.process import entry_point
from common.running.progress import Progress

CLASSES = ("open", "short", "mousebite", "spur", "copper", "pinhole")  # types 1 to 6
HEADER = ("Filename", *CLASSES, "Defect", "group")
VALIDATION = ("00041", "13000", "77000")  # boards; the other eight are for training
SIZE, TILE = 640, 128  # pixels
BLACK_UP_TO, DEFECT_FROM, NORMAL_UP_TO = 127, 0.5, 0.02  # grey; shares of a box


def read_boxes(path):
    """A file of defects, `x1 y1 x2 y2 type` a line -> (n, 5) int64; UserError names the line."""
    boxes = []
    for number, line in enumerate(path.read_text("ascii", "replace").splitlines(), 1):
        text = " ".join(line.split())
        box = [int(n) for n in text.split()] if re.fullmatch(r"(\d{1,3} ){4}[1-6]", text) else None
        if text and not (box and box[0] < box[2] <= SIZE and box[1] < box[3] <= SIZE):
            raise UserError(
                f"{path}:{number}: {line[:80]!r} is no defect; expected x1 y1 x2 y2 type, with "
                f"x1 < x2 and y1 < y2 from 0 to {SIZE} and a type from 1 to {len(CLASSES)}"
            )
        boxes += [box] if box else []
    return np.array(boxes, np.int64).reshape(-1, 5)


def tiles_of(boxes):
    """(n, 5) boxes of one image -> {(row, column): (6,) bool classes} of the tiles kept."""
    start = np.arange(0, SIZE, TILE)
    x1, y1, x2, y2, kind = (column[:, None] for column in boxes.T)  # (n, 1)
    width = (np.minimum(x2, start + TILE) - np.maximum(x1, start)).clip(0)  # (n, 5)
    height = (np.minimum(y2, start + TILE) - np.maximum(y1, start)).clip(0)
    area = ((x2 - x1) * (y2 - y1))[..., None]
    share = height[:, :, None] * width[:, None, :] / area  # (n, rows, columns)
    of_class = [(share[kind[:, 0] == k] >= DEFECT_FROM).any(0) for k in range(1, len(CLASSES) + 1)]
    classes = np.stack(of_class, -1)  # (rows, columns, 6)
    kept = classes.any(-1) | ~(share > NORMAL_UP_TO).any(0)
    return {(row, column): classes[row, column] for row, column in np.argwhere(kept).tolist()}


def read_boards(root):
    """{path of a tested image below PCBData: its tiles, as of `tiles_of`}, sorted."""
    root, images = Path(root), {}
    for path in sorted(root.glob("group*/*/*_test.jpg")):
        label = path.parent.with_name(f"{path.parent.name}_not")
        images[label / f"{path.stem.removesuffix('_test')}.txt"] = path
    if not images:
        raise UserError(
            f"{root}: no groupGGGGG/GGGGG/NNNNNNNN_test.jpg in it; expected the folder PCBData of "
            "a clone of DeepPCB"
        )
    for label in sorted(set(root.glob("group*/*_not/*.txt")) - set(images)):
        raise UserError(f"{label}: the image of these defects is not there")
    return {path: tiles_of(read_boxes(label)) for label, path in images.items()}


def tile_name(path, row, column):
    """File name below DIR/images."""
    return f"{path.parent.name}/{path.stem.removesuffix('_test')}_{row}{column}.png"


def tables(boards):
    """The CSVs' texts by file name."""
    files = {name: ",".join(HEADER) + "\n" for name in ("train.csv", "val.csv")}
    for path, tiles in boards.items():
        group = path.parent.name
        for place, classes in tiles.items():
            flags = [str(int(flag)) for flag in (*classes, classes.any())]
            line = ",".join([tile_name(path, *place), *flags, group])
            files["val.csv" if group in VALIDATION else "train.csv"] += line + "\n"
    return files


def write_tiles(path, tiles, folder):
    """Write the tiles of one tested image below folder; UserError where it cannot be used."""
    image = open_image(str(path.parent.resolve()), path.name)
    if image.size != (SIZE, SIZE):
        raise UserError(f"{path}: {image.width} x {image.height} pixels, expected {SIZE} x {SIZE}")
    white = np.asarray(image.convert("L")) > BLACK_UP_TO
    (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
    for row, column in tiles:
        y, x = row * TILE, column * TILE
        tile = Image.fromarray(white[y : y + TILE, x : x + TILE])  # bool: 1 bit a pixel
        tile.save(folder / tile_name(path, row, column))


def is_whole(out, files):
    """Whether folder out holds these CSVs and every image that they name."""
    names = re.findall(r"^.+?\.png", "".join(files.values()), re.MULTILINE)
    whole = all((out / name).is_file() for name in [*files, *(f"images/{name}" for name in names)])
    return whole and all((out / name).read_text("utf-8") == text for name, text in files.items())


def cut(root, out):
    """Write the tiles of PCBData to folder out; returns the CSVs' texts by file name.

    A set that is there is kept, one that was begun is done again, and a folder with anything else
    in it is refused.
    """
    out = Path(out)
    mark = out / "unfinished"  # there from before the first image until after the last table
    try:
        boards = read_boards(root)
        files = tables(boards)
        if out.exists() and any(out.iterdir()) and not mark.exists():
            if is_whole(out, files):
                return files
            raise UserError(f"{out}: holds something else than this set; choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
        progress = Progress(len(boards), "cutting", "images")
        for path, tiles in boards.items():
            write_tiles(path, tiles, out / "images")
            progress.update()
        progress.close()
        for name, text in files.items():
            write_atomically(out / name, text)
        mark.unlink(missing_ok=True)
    except OSError as error:
        error.filename = error.filename or out
        raise explain(error) or UserError(f"{error.filename}: {error.strerror or error}") from None
    return files


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "root", type=path_argument, metavar="PCBData", help="that folder of a clone of DeepPCB"
    )
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR")
    args = parser.parse_args(argv)
    for name, text in cut(args.root, args.out).items():
        defect = [line.split(",")[-2] for line in text.splitlines()[1:]]
        print(f"{Path(args.out) / name}: {len(defect)} tiles, {defect.count('1')} defects")


if __name__ == "__main__":
    main()
