"""A finished run's encoder for other programs: weights that timm loads, a model card, ONNX.

    python -m common.export --run runs/NAME --out DIR [--onnx]

Writes encoder.safetensors (with what it was trained by and scores as metadata, and no path or name
of a machine), probe.safetensors where the run kept one, and README.md, the model card, which says
how to load them. --onnx (pip install -e ".[export]"): model.onnx, from resized pixels to features
and the probe's logit, checked against torch.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save
from torch import nn

from common.augmentations import MEAN, STD, ColorJitterNormalize
from common.backbones import TIMM
from common.inspection.listing import must_be_new
from common.inspection.trained import Trained
from common.normal_only import NAMES
from common.running.arguments import path_argument
from common.running.errors import UserError
from common.running.folder import write_atomically
from common.running.process import entry_point
from common.running.progress import say

ENCODER, PROBE, CARD, ONNX = "encoder.safetensors", "probe.safetensors", "README.md", "model.onnx"
TOLERANCE = 1e-4  # of ONNX against torch, of the largest value
DATA = ("train_defect_proportion", "fraction", "subset_size", "labels", "image_size")
CARD_TEXT = """---
library_name: timm
tags: [{method}, defect-detection]
---

# {method}, {backbone}, {size} px

An encoder of inspection images, trained by `{script}.py` on
{rows}; seed {seed}, {epochs} epochs.

```python
import timm
import torch
from safetensors.torch import load_file

encoder = timm.create_model("{architecture}", checkpoint_path="{encoder}", {arguments}).eval()
mean = torch.tensor({mean}).reshape(3, 1, 1)
std = torch.tensor({std}).reshape(3, 1, 1)
# image: (3, {size}, {size}) uint8 RGB: all of it, resized without regard to its aspect ratio
# (bicubic, antialiased)
features = encoder(((image.float() / 255 - mean) / std)[None])  # (1, {dim})
{use_probe}```

## Scores on its validation set

| | AUROC | average precision | F1 |
|---|---|---|---|
{scores}

{n} images, {n_defect} of them defects, at that mix. offline: logistic regression on frozen
features, fitted on the run's own labelled rows. knn and mahalanobis: distance to normal training
images. They say nothing about images of another kind; compare with a random encoder on the same
data.

Licence: that of the images it was trained on decides. Made with rare-defect-ssl; torch {torch},
timm {timm}.
"""
PROBE_TEXT = """probe = load_file("{probe}")
logit = features @ probe["weight"].T + probe["bias"]  # at or above 0: called a defect
"""


def timm_arguments(config):
    """Name and keyword arguments of timm.create_model for a run's encoder."""
    how = {"num_classes": 0}
    if config["backbone"] == "vit_tiny":
        how["img_size"] = config["data"]["image_size"]
        how |= {k: config[k] for k in ("patch_size", "num_heads") if config.get(k) is not None}
        if (config.get("ssl_settings") or {}).get("features") == "mean_of_patches":
            how |= {"global_pool": "avg", "fc_norm": False}
    if config["backbone"] not in TIMM:
        raise UserError(f"backbone {config['backbone']}: not one of {', '.join(TIMM)}")
    return TIMM[config["backbone"]], how


def metadata(trained, architecture, how):
    """{name: text} of a safetensors file: what it was trained by and on, and its scores."""
    result, config = trained.result, trained.config
    kept = {key: result[key] for key in ("method", "backbone", "seed", "epochs", "train_rows")}
    groups = ("val", "val_offline", "val_offline_fixed", "val_normal_only", "label_free")
    return {
        "format": "pt",
        **{key: json.dumps(value) for key, value in kept.items()},
        "data": json.dumps({key: config["data"].get(key) for key in DATA}),
        "ssl_settings": json.dumps(config.get("ssl_settings")),
        "scores": json.dumps({key: result.get(key) for key in groups}),
        "timm": json.dumps({"model_name": architecture, **how}),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "checkpoint_sha256": trained.sha,
    }


def _row(name, scores):
    cells = (scores.get(key) for key in ("auroc", "average_precision", "f1"))
    return f"| {name} | " + " | ".join("-" if c is None else f"{c:.3f}" for c in cells) + " |"


def card(trained, architecture, how, has_probe):
    """The model card in Markdown."""
    result = trained.result
    rows = result["train_rows"]
    scored = [_row(name, result[f"val_{name}"]) for name in ("offline", "offline_fixed")]
    of_normals = result.get("val_normal_only", {})
    scored += [_row(name, of_normals[name]) for name in NAMES if name in of_normals]
    return CARD_TEXT.format(
        method=result["method"],
        script=trained.config["method"],
        backbone=result["backbone"],
        size=trained.config["data"]["image_size"],
        rows=", ".join(f"{n} {kind}" for kind, n in rows.items()) + " images",
        seed=result["seed"],
        epochs=result["epochs"],
        architecture=architecture,
        encoder=ENCODER,
        arguments=", ".join(f"{key}={value!r}" for key, value in how.items()),
        mean=MEAN,
        std=STD,
        dim=trained.encoder.num_features,
        use_probe=PROBE_TEXT.format(probe=PROBE) if has_probe else "",
        scores="\n".join(scored),
        n=result["val_offline"]["n"],
        n_defect=result["val_offline"]["n_defect"],
        torch=torch.__version__.split("+")[0],
        timm=timm.__version__,
    )


class Whole(nn.Module):
    """(B, 3, S, S) uint8 pixels -> features (B, D), logits (B,)."""

    def __init__(self, encoder, weight):
        super().__init__()
        self.encoder, self.normalise = encoder, ColorJitterNormalize(seed=0)
        self.probe = nn.Linear(len(weight) - 1, 1)
        with torch.no_grad():
            self.probe.weight.copy_(weight[None, :-1]), self.probe.bias.copy_(weight[-1:])

    def forward(self, pixels):
        features = self.encoder(self.normalise.clean(pixels))
        return features, self.probe(features)[:, 0]


def write_onnx(whole, size, path):
    """model.onnx with a free batch size, compared with torch at two of them. Raises UserError."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f'--onnx: {error.name} is missing: pip install -e ".[export]"') from None
    new = f"{path}.new"
    torch.onnx.export(
        whole,
        (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
        new,
        input_names=["pixels"],
        output_names=["features", "logit"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(new)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info):
        del part.metadata_props[:]  # in which torch notes paths of this machine
        part.doc_string = ""
    onnx.save(model, new)
    session = onnxruntime.InferenceSession(new, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        pixels = rng.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
        with torch.no_grad():
            ours = whole(torch.from_numpy(pixels))
        theirs = session.run(None, {"pixels": pixels})
        for name, a, b in zip(("features", "logit"), ours, theirs, strict=True):
            off = float(np.abs(a.numpy() - b).max() / max(np.abs(b).max(), 1.0))
            if a.shape != b.shape or not off <= TOLERANCE:
                os.unlink(new)
                raise UserError(f"--onnx: its {name} differ from torch's by {off:.1e}; not kept")
    os.replace(new, path)


@entry_point
def main(argv=None):
    """Command line; see the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", required=True, type=path_argument, metavar="RUN_FOLDER")
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR")
    parser.add_argument("--onnx", action="store_true", help="model.onnx too")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    args = parser.parse_args(argv)
    trained, out = Trained(args.run), Path(args.out)
    probe = trained.probes.get(trained.kept)
    if args.onnx and probe is None:
        raise UserError(f"{args.run}: --onnx holds the probe, and this run has none")
    names = [ENCODER, CARD, *([PROBE] if probe is not None else [])]
    names += [ONNX] if args.onnx else []
    must_be_new([out / name for name in names], args.force)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: there is a file of that name, and it should be a folder")
    architecture, how = timm_arguments(trained.config)
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.contiguous().clone() for k, v in trained.encoder.state_dict().items()}
    about = metadata(trained, architecture, how)
    (out / ENCODER).write_bytes(save(weights, about))
    if probe is not None:
        parts = {"weight": probe[None, :-1].float().contiguous(), "bias": probe[-1:].float()}
        (out / PROBE).write_bytes(save(parts, {"format": "pt", "fitted": trained.kept}))
    write_atomically(out / CARD, card(trained, architecture, how, probe is not None))
    if args.onnx:
        say("writing ONNX, and comparing it")
        whole = Whole(trained.encoder, probe).eval()
        write_onnx(whole, trained.config["data"]["image_size"], os.fspath(out / ONNX))
    print(f"{out}: {', '.join(names)}")


if __name__ == "__main__":
    main()
