"""Backbones through timm, without a classifier, from random weights."""

import timm

TIMM = {"resnet18": "resnet18", "vit_tiny": "vit_tiny_patch16_224"}  # our name: timm's


def build_backbone(name, image_size, patch_size=None, num_heads=None):
    """name: resnet18 | vit_tiny; image_size: pixels. Returns (module, D): (B, 3, S, S) -> (B, D).

    resnet18: stock stem, global average, D = 512, torchvision's initialisation, as the study (timm
    alone would zero the last BatchNorm of each block). vit_tiny: 12 layers of width D = 192 with
    num_heads (None: 3); the feature is the class token after the final norm; image_size is a
    multiple of patch_size (None: 16).
    """
    if name == "resnet18":
        module = timm.create_model(TIMM[name], num_classes=0, zero_init_last=False)
    elif name == "vit_tiny":
        how = {"patch_size": patch_size, "num_heads": num_heads}
        how = {key: value for key, value in how.items() if value is not None}
        module = timm.create_model(TIMM[name], num_classes=0, img_size=image_size, **how)
    else:
        raise ValueError(f"backbone {name!r}: not one of {', '.join(TIMM)}")
    return module, module.num_features
