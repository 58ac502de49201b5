"""A page to look through scored images and mark them; it works offline, in any browser.

    python -m common.review scores.csv --out review.html [--most 500] [--next uncertain]
        [--unlabelled train.csv]

Shows the images of a scores.csv of `python -m common.predict` by descending score, or, with --next
uncertain, those nearest to its threshold first. A slider and a field
show what a threshold would mean at a prevalence. Marks are kept in the browser and saved as
labels.csv, for `python -m common.annotate FOLDER --out DIR --labels labels.csv`. --unlabelled: only
images that this CSV names without a label.
"""

import argparse
import base64
import hashlib
import io
import json
import sys
from pathlib import Path

from PIL import Image

from common.annotations import UNLABELLED, read_annotations
from common.images import ImageFolder
from common.inspection.listing import must_be_new
from common.inspection.scores_file import UNREADABLE, read_scores
from common.running.arguments import at_least, path_argument
from common.running.errors import ImageError, UserError
from common.running.folder import write_atomically
from common.running.process import entry_point
from common.running.progress import Progress, write_error

TEMPLATE = Path(__file__).parent / "inspection" / "review.html"
PIXELS, QUALITY = 320, 80  # longest side and JPEG quality of a picture on the page
ORDERS = {"score": "the highest scores first", "uncertain": "the least certain first"}


def chosen(rows, about, most, order, only=None):
    """The rows to show, with their score as a number, in the order to show them.

    rows: of scores.csv; about: scores.json; only: names to choose from, or None. Raises UserError.
    """
    rows = [{**row, "score": float(row["score"])} for row in rows if row["decision"] != UNREADABLE]
    if only is not None:
        rows = [row for row in rows if row["file"] in only]
    if order == "uncertain":
        if not about.get("threshold"):
            raise UserError("--next uncertain: these scores have no threshold to be near to")
        at = about["threshold"]["score"]
        rows.sort(key=lambda row: (abs(row["score"] - at), row["file"]))
    else:
        rows.sort(key=lambda row: (-row["score"], row["file"]))
    return rows[:most]


def _picture(images, name):
    """A small JPEG in base64."""
    image = Image.fromarray(images.read(name))
    image.thumbnail((PIXELS, PIXELS))
    image.save(buffer := io.BytesIO(), "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def page_data(rows, about, root, order):
    """What the page shows as plain types, and {file: why} of images that are gone."""
    images, shown, gone = ImageFolder(root), [], {}
    progress = Progress(len(rows), "pictures", "images")
    for row in rows:
        try:
            picture = _picture(images, row["file"])
            shown.append({"file": row["file"], "score": row["score"], "picture": picture})
        except ImageError as error:
            gone[row["file"]] = str(error)
        progress.update()
    progress.close()
    names = json.dumps([about["checkpoint_sha256"], about["root"], [s["file"] for s in shown]])
    curve = about["validation"]["score_recall_false_alarms"]
    middle = curve[len(curve) // 2][0] if curve else None
    kept = {key: about.get(key) for key in ("calibration", "prevalence")}
    return kept | {
        "id": hashlib.sha256(names.encode()).hexdigest()[:16],
        "run": f"{Path(about['run']).name}: {about['method']}, {about['backbone']}",
        "root": about["root"],
        "images": shown,
        "total": about["counts"]["images"] - about["counts"]["unreadable"],
        "order": ORDERS[order],
        "curve": curve,
        "threshold": (about.get("threshold") or {"score": middle})["score"],
    }, gone


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scores", type=path_argument, metavar="scores.csv")
    parser.add_argument("--out", required=True, type=path_argument, metavar="review.html")
    parser.add_argument(
        "--most", type=at_least(1), default=500, metavar="N", help="images on the page"
    )
    parser.add_argument("--next", choices=tuple(ORDERS), default="score", help="which come first")
    parser.add_argument("--unlabelled", type=path_argument, metavar="CSV")
    parser.add_argument(
        "--image-root", type=path_argument, metavar="DIR", help="where they are now"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args(argv)
    must_be_new([args.out], args.force)
    rows, about = read_scores(args.scores)
    only = None
    if args.unlabelled:
        table = read_annotations(args.unlabelled)
        only = {table.name(i) for i in (table.defect == UNLABELLED).nonzero()[0]}
    rows = chosen(rows, about, args.most, args.next, only)
    data, gone = page_data(rows, about, args.image_root or about["root"], args.next)
    if not data["images"]:
        raise UserError(f"{args.scores}: no image to show")
    text = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")  # nothing ends the script
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)
    write_atomically(args.out, page)
    print(
        f"{args.out}: {len(data['images'])} images, {len(page) / 1e6:.1f} MB; open it in a browser"
    )
    if gone:
        write_error("\n".join([*gone.values(), f"{len(gone)} images cannot be read"]))
        sys.exit(1)


if __name__ == "__main__":
    main()
