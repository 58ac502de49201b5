"""Stored numbers of each method, in float64: a first step's gradients, and twelve losses of `main`.

Rounding grows with every update, so a float32 trajectory belongs to one processor. In float64 what
is stored here agrees to 1e-9 between processors and numbers of threads. Weights and inputs are
functions of names and shapes alone: the draws of torch and timm differ in their last digits, too.
"""

import importlib

import numpy as np
import pytest
import timm
import torch
from small import METHODS, PAIRS, build, read_log, run, step, stop_at
from torch import nn

TOLERANCE = 1e-6  # relative


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """What a script makes float32 becomes float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


def drawn(name, shape):
    """Uniform from -1 to 1, a function of name and shape."""
    return torch.from_numpy(np.random.default_rng(list(name.encode())).uniform(-1, 1, shape))


@torch.no_grad()
def set_weights(model):
    """Weights of a usual size that depend on nothing but names; a teacher gets its student's."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.ndim > 1:
            p.copy_(drawn(name, p.shape) * (6 / p[0].numel()) ** 0.5)
        elif p.requires_grad:  # biases, and the norms' scales about 1
            p.copy_(0.1 * drawn(name, p.shape) + name.endswith("weight"))
    for teacher, student in (("target", "online"), ("teacher", "student")):
        if hasattr(model, teacher):
            getattr(model, teacher).load_state_dict(getattr(model, student)().state_dict())
    return model


def first_step(method, backbone):
    """Loss, and the gradient's norm of each part of the model."""
    model = set_weights(build(method, backbone)[0])
    views, noise = drawn("views", (2, 8, 3, 32, 32)), drawn("noise", (2, 8, 16))
    labels = torch.tensor([1, 0, 1, 0, 0, -1, -1, -1], dtype=torch.int8)
    loss, _, _ = step(method, model, model, views, noise, labels)
    loss.backward()
    numbers = {"loss": float(loss.detach())}
    for name, part in model.named_children():
        grads = [p.grad.norm() for p in part.parameters() if p.grad is not None]
        if grads:
            numbers[name] = float(torch.stack(grads).norm())
    return numbers


FIRST_STEPS = {
    ("simclr", "resnet18"): {"loss": 4.476104176, "backbone": 276.713888, "projector": 18.27760172},
    ("simclr", "vit_tiny"): {"loss": 3.744972213, "backbone": 81.3706924, "projector": 14.28172827},
    ("byol", "resnet18"): {
        "loss": 4.687474913,
        "backbone": 281.275432,
        "projector": 14.86770117,
        "predictor": 2.132428936,
    },
    ("byol", "vit_tiny"): {
        "loss": 4.618306094,
        "backbone": 72.45098229,
        "projector": 10.18982163,
        "predictor": 1.787449785,
    },
    ("barlow", "resnet18"): {
        "loss": 0.1654151312,
        "backbone": 27.42381932,
        "projector": 1.371433756,
    },
    ("barlow", "vit_tiny"): {
        "loss": 0.09341533559,
        "backbone": 11.15674021,
        "projector": 1.812611043,
    },
    ("lejepa", "resnet18"): {
        "loss": 0.409327969,
        "backbone": 41.00583616,
        "projector": 2.035224525,
    },
    ("lejepa", "vit_tiny"): {
        "loss": 0.2895644375,
        "backbone": 16.85326173,
        "projector": 2.657939981,
    },
    ("dino", "resnet18"): {"loss": 5.946374243, "backbone": 684.3454763, "head": 57.75647256},
    ("dino", "vit_tiny"): {"loss": 5.809681063, "backbone": 129.0410316, "head": 25.04504468},
    ("mae", "vit_tiny"): {
        "loss": 3.239073411,
        "backbone": 3.780914089,
        "decoder_embed": 1.164305772,
        "decoder_blocks": 3.113310803,
        "decoder_norm": 1.384368944,
        "decoder_pred": 1.069063121,
    },
    ("supervised", "resnet18"): {"loss": 1.67128878, "backbone": 213.525535, "head": 10.33125999},
    ("supervised", "vit_tiny"): {"loss": 1.228514267, "backbone": 32.48986719, "head": 4.263016674},
}


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_first_step_is_as_stored(method, backbone):
    numbers = first_step(method, backbone)
    assert numbers == pytest.approx(FIRST_STEPS[method, backbone], rel=TOLERANCE)


class Convolutions(nn.Sequential):
    """(B, 3, S, S) -> (B, 32), with BatchNorm."""

    def __init__(self):
        layers = []
        for before, after in ((3, 16), (16, 32)):
            convolution = nn.Conv2d(before, after, 3, stride=2, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def quick_backbone(name, image_size, patch_size=None, num_heads=None):
    """As build_backbone, but of a few small layers."""
    if name == "resnet18":
        return Convolutions(), 32
    how = {"img_size": image_size, "patch_size": patch_size, "depth": 2, "embed_dim": 48}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **how), 48


STEPS = 12  # 4 epochs of 3


def trajectory(method, folder, tiny_set, monkeypatch):
    """Losses of main's first 12 steps; scores are left out."""
    script = importlib.import_module(method)
    place = script.to_device
    monkeypatch.setattr(script, "build_backbone", quick_backbone)
    monkeypatch.setattr(script, "to_device", lambda model, *how: place(set_weights(model), *how))
    stop_at(monkeypatch, STEPS)
    longer = ["optimization.epochs=4", "run.val_every_epochs=4", "optimization.weight_decay=0.1"]
    with pytest.raises(SystemExit) as stop:
        run(method, folder, tiny_set, method, *longer)
    assert stop.value.code == 75
    return [record["loss"] for record in read_log(folder / method, "step")]


# fmt: off
TRAJECTORIES = {
    "simclr": [
        3.28054771, 3.112710752, 3.197374686, 3.002524426, 3.085008777, 3.647913102,
        2.949821378, 3.203234151, 2.947419312, 2.985754858, 2.960147989, 3.036846562,
    ],
    "byol": [
        3.496713687, 3.459647137, 3.594775256, 3.571252071, 3.373467865, 2.99644678,
        2.919984094, 2.847074328, 2.680290295, 2.856688468, 2.776423995, 2.831905782,
    ],
    "barlow": [
        0.2850485181, 0.2313549711, 0.208746792, 0.2532803384, 0.2668926554, 0.245338242,
        0.2047025226, 0.3610557268, 0.156142741, 0.2183298878, 0.3339723205, 0.2292279523,
    ],
    "lejepa": [
        0.2555103272, 0.276510832, 0.251820628, 0.2798662914, 0.2564788568, 0.2724199696,
        0.2019989698, 0.3003914099, 0.2047392397, 0.2626248112, 0.3814568211, 0.2073073653,
    ],
    "dino": [
        1.938989725, 1.646261566, 2.149478364, 2.709020724, 2.592606272, 3.451701403,
        3.165403004, 3.57880251, 2.669830931, 3.196039335, 2.999164735, 2.874718763,
    ],
    "mae": [
        3.095051667, 2.899536016, 2.735218279, 2.571307651, 2.458916365, 2.3305634,
        2.258670786, 2.18768208, 2.133493926, 2.098663472, 2.078616165, 2.09865139,
    ],
    "supervised": [
        0.8701931238, 0.7734693885, 0.7795984745, 0.7034751177, 0.6854849458, 0.7973980904,
        0.9226405025, 0.6144394279, 0.6391968131, 0.7020069361, 0.6119736433, 0.7388317585,
    ],
}
# fmt: on


@pytest.mark.parametrize("method", METHODS)
def test_trajectory_is_as_stored(method, tmp_path, tiny_set, monkeypatch):
    losses = trajectory(method, tmp_path, tiny_set, monkeypatch)
    assert losses == pytest.approx(TRAJECTORIES[method], rel=TOLERANCE)


def schedule(step, total, warmup, *rates):
    return step, total, warmup + 1, *rates


def momentum(model, name, lr, momentum, *how):
    return model, name, lr, 0.99 * momentum, *how


def decay(model, name, lr, momentum, decay, *how):
    return model, name, lr, momentum, 2 * decay, *how


def exclusion(*how):
    *how, exclude, trust = how
    return *how, not exclude, trust


def trust(*how):
    *how, trust = how
    return *how, 1.01 * trust


def tau(teacher, student, tau):
    return teacher, student, tau - 0.001


# method, a function of its script, and what a mistake makes of the arguments.
MISTAKES = [
    ("simclr", "nt_xent_loss", lambda z0, z1, t: (z0, z1, 1.001 * t)),
    ("byol", "byol_loss", lambda p0, p1, t0, t1: (p0, p1, t0, 1.001 * t1 + 0.001)),
    ("barlow", "barlow_twins_loss", lambda z0, z1, lambda_, scale: (z0, z1, 2 * lambda_, scale)),
    ("lejepa", "lejepa_loss", lambda z, slices, lambda_: (z, slices, 1.01 * lambda_)),
    ("lejepa", "draw_slices", lambda *how: (*how[:3], how[3] + 1, how[4])),
    ("dino", "dino_loss", lambda s, t, center, *how: (s, t, 2 * center, *how)),
    ("dino", "linear", lambda step, *how: (step + 1, *how)),
    ("mae", "mae_loss", lambda images, pred, mask, *how: (images, pred, 1 - mask, *how)),
    ("supervised", "supervised_loss", lambda x, y, weight: (x, y, 2 * weight)),
    *((method, "warmup_cosine", schedule) for method in METHODS),
    *((method, "build_optimizer", momentum) for method in METHODS),
    *((method, "build_optimizer", decay) for method in METHODS),
    *((method, "build_optimizer", exclusion) for method in METHODS),
    *((method, "build_optimizer", trust) for method in ("simclr", "byol", "barlow")),
    *((method, "ema_update", tau) for method in ("byol", "dino")),
]


@pytest.mark.parametrize(("method", "function", "change"), MISTAKES)
def test_a_mistake_is_seen(method, function, change, tmp_path, tiny_set, monkeypatch):
    script = importlib.import_module(method)
    right = getattr(script, function)
    monkeypatch.setattr(script, function, lambda *args: right(*change(*args)))
    losses = trajectory(method, tmp_path, tiny_set, monkeypatch)
    furthest = np.max(np.abs(np.divide(losses, TRAJECTORIES[method]) - 1))
    assert furthest > 10 * TOLERANCE
