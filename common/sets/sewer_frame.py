"""One frame of the synthetic set: what any pipe shows, the defects, light, overlay and camera.

Used by common/synthetic.py. A painter is called as painter(scene, rng) and paints one class.
"""

import io
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.annotations import CLASS_IMPORTANCE
from common.sets.sewer_scene import BLACK, LIME, RUST, SLUDGE, Scene, video_style

CLASSES = tuple(CLASS_IMPORTANCE)
BRICK, BOARD = ((0.3, 0.18), (0.6, 0.25, 0.15)), ((0.07, 0.65), (0.55, 0.42, 0.25))  # half size


def crack(scene, rng):
    """RB: dark jagged cracks along and around the pipe, often with a piece broken out."""
    (angle, depth), lines = scene.spot(rng), []
    for k in range(rng.integers(2, 5)):
        steps = np.linspace(-0.5, 0.5, 25) * rng.uniform(1.0, 1.8)
        wander = np.cumsum(rng.normal(0, 0.035, 25)) + rng.normal(0, 0.12)
        turn, far = (steps, wander) if k == 1 else (wander, steps)  # around or along the pipe
        path = scene.pixel(angle + turn, depth * np.exp(far))
        width = rng.uniform(0.018, 0.045) * scene.focal / depth / np.exp(far)
        lines += [(path[i : i + 2], width[i] * rng.uniform(0.5, 1.5)) for i in range(24)]
    if rng.random() < 0.6:
        around, reach = np.sort(rng.uniform(0, 2 * np.pi, 8)), rng.uniform(0.15, 0.35)
        hole = scene.pixel(angle + reach * np.sin(around), depth * np.exp(reach * np.cos(around)))
        scene.paint(0.6 * scene.strokes([(hole + 0.012 * scene.height, 0)]), LIME)
        lines.append((hole, 0))
    scene.paint(rng.uniform(0.6, 1) * scene.strokes(lines), BLACK)


def surface_damage(scene, rng):
    """OB: a large rough, spalled patch with the aggregate showing."""
    mask = scene.patch(*scene.spot(rng), *rng.uniform(0.6, 1.3, 2), 0.7) * rng.uniform(0.65, 1)
    tone = scene.style.wall * rng.uniform(0.6, 1.2) * np.array([1.05, 0.95, 0.85])
    rough = 0.5 * scene.medium + 0.7 * scene.fine + 0.5 * scene.speckle
    scene.paint(0.6 * mask, tone)
    scene.paint(mask * np.clip(3 * rough - 0.7, 0, 0.85), tone * 0.15)
    scene.paint(mask * np.clip(-3 * rough - 0.9, 0, 0.85), LIME)
    scene.relief += mask * (0.03 * scene.medium + 0.01 * scene.fine)


def sealing_ring(scene, rng):
    """IS: a rubber ring that has come out of the joint and hangs into the pipe."""
    angle, reach = rng.uniform(-1, 1), rng.uniform(0.5, 1.0)
    left, right = scene.pixel(angle + np.array([-reach, reach]), scene.joint)
    low = (left + right) / 2 + np.array([rng.normal(0, 0.3), rng.uniform(0.8, 1.5)]) * scene.unit
    t = np.linspace(0, 1, 30)[:, None]
    points = left * (1 - t) ** 2 + low * 2 * t * (1 - t) + right * t**2  # a Bezier curve
    scene.paint(scene.strokes([(points, 0.13 * scene.unit)]), BLACK, scene.joint)
    shine = scene.strokes([(points - [0, 0.035 * scene.unit], 0.04 * scene.unit)])
    scene.paint(0.7 * shine, LIME, scene.joint)


def roots(scene, rng):
    """RO: a tangle of fine branching roots that grows from the joint."""
    start, lines = scene.spot(rng, 0.0, 1.9)[0], []
    for _ in range(rng.integers(10, 40)):
        angle = start + rng.normal(0, 0.25)
        stack = [(scene.pixel(angle, scene.joint), angle + rng.normal(np.pi / 2, 0.6), 0.03, 14)]
        while stack:
            point, turn, width, steps = stack.pop()
            turns = turn + np.cumsum(rng.normal(0, 0.35, steps))
            moves = np.stack([np.cos(turns), np.sin(turns)], 1) * 0.055 * scene.unit
            path = point + np.cumsum(moves, 0)
            lines.append((path, width * scene.unit))
            if steps > 5:
                k = rng.integers(1, steps - 1)
                stack += [(path[k], turns[k] + s, width / 2, steps // 2) for s in (-0.7, 0.7)]
    scene.paint(0.85 * scene.strokes(lines[::2]), SLUDGE, scene.joint)
    tone = rng.uniform(0.6, 1.3) * np.array([0.4, 0.3, 0.2])
    scene.paint(0.7 * scene.strokes(lines[1::2]), tone, scene.joint)


def infiltration(scene, rng):
    """IN: rust, lime or dirty water that runs down the wall."""
    angle, depth = scene.spot(rng, 0.8, 1.2)
    total = 0.6 * scene.patch(angle, depth, 0.6, 0.5, 0.6, 0.6)
    for _ in range(rng.integers(5, 10)):
        fallen = scene.angle * np.float32(np.sign(angle)) - np.float32(rng.uniform(0.3, 1.2))
        width = rng.uniform(0.025, 0.07) * (1 + np.clip(fallen, 0, 2))
        sway = rng.normal(0, 0.2) * scene.coarse + 0.05 * scene.medium
        run = scene.ring(depth + rng.normal(0, 0.25) + sway, width) * np.clip(fallen * 8, 0, 1)
        total = np.maximum(total, run * np.clip((rng.uniform(0.8, 1.9) - fallen) * 3, 0, 1))
    total = total * np.clip(0.8 + 0.5 * scene.fine, 0, 1) * ~scene.water
    scene.paint(rng.uniform(0.75, 1) * total, (RUST, LIME, SLUDGE)[rng.integers(3)])
    scene.relief += 0.01 * total


def settled_deposits(scene, rng):
    """AF: a heap of sediment and gravel on the invert."""
    (_, middle), length, top = scene.spot(rng), rng.uniform(0.7, 1.8), rng.uniform(0.15, 0.4)
    base = np.float32(1 - scene.level + rng.uniform(0.0, 0.05))
    top = min(top, 0.6 * (1 - scene.eye[1] - base))  # the camera is never buried
    height = base + top / 2
    for _ in range(3):  # the ray meets the heap where it is as low as the heap is high
        depth = np.clip((1 - height - scene.eye[1]) / np.maximum(scene.dy, 1e-3), 0.1, 15)
        depth = depth.astype(np.float32)
        across = (np.float32(scene.eye[0]) + depth * scene.dx) * 0.25 + 0.5
        lumps = scene.noise(16, across, depth * 3) + 0.5 * scene.noise(64, across, depth * 9)
        off = (depth - middle) / length
        off *= np.where(off < 0, 0.4, 1)  # steeper on the far side
        height = base + top * np.exp(-off * off) * (1 + 0.35 * lumps)
    nearer = depth < np.where(scene.water, scene.lit + 1, scene.depth)
    mask = nearer & (height > base + 0.04) & (scene.dy > 0.02)
    gravel = scene.noise(128, across, depth * 16) + scene.noise(64, across, depth * 9)
    tone = np.array([0.42, 0.35, 0.27]) * rng.uniform(0.5, 1.3)
    scene.paint(mask, tone, depth)
    scene.paint(mask * np.clip(1.2 * gravel - 0.5, 0, 0.6), tone * 0.5 + 0.35)
    scene.paint(mask * np.clip(-1.2 * gravel - 0.4, 0, 0.8), tone * 0.2)
    scene.relief = np.where(mask, 0.02 * lumps + 0.005 * gravel, scene.relief)
    scene.water &= ~mask


def attached_deposits(scene, rng):
    """BE: a lumpy crust on the wall, half the time on both sides at one height."""
    colour = np.array((LIME, RUST, SLUDGE)[rng.integers(3)])
    (angle, depth), size = scene.spot(rng), (rng.uniform(0.25, 0.45), rng.uniform(0.7, 1.6))
    for side in (angle, -angle)[: rng.integers(1, 3)]:
        crust = scene.patch(side, depth, *size, 1.1, 0.25)
        scene.paint(rng.uniform(0.5, 0.9) * crust, colour)
        scene.paint(crust * np.clip(scene.fine + 0.6 * scene.speckle, 0, 0.8), colour * 0.4)
        scene.relief += crust * (0.05 + 0.03 * scene.medium + 0.008 * scene.fine)


def obstacle(scene, rng):
    """FO: a brick or a board in the pipe."""
    depth, tilt = 1.1 * scene.spot(rng)[1], rng.uniform(-0.5, 0.5)
    foot, unit = scene.pixel(np.pi + rng.normal(0, 0.25), depth, 0.8), scene.focal / depth
    half, colour = (BRICK, BOARD)[rng.integers(2)]
    colour = np.array(colour) * rng.uniform(0.5, 1.3)
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    front = foot + np.array([[-1, 0], [1, 0], [1, -2], [-1, -2]]) * half @ turn * unit
    back = front + np.array([0.12, -0.14]) * unit
    scene.paint(0.7 * scene.strokes([(front + [0, 0.08 * unit], 0)]), BLACK)
    side = [front[1], back[1], back[2], front[2]]
    scene.paint(scene.strokes([(back, 0), (side, 0)]), colour, depth)
    scene.paint(scene.strokes([(front, 0)]), colour * 0.6, depth)


def opening(scene, rng, radius, ragged, rim):
    """GR, PH, PB: a hole of a radius in the wall; its far side catches the lamp."""
    angle, depth = scene.spot(rng, 0.4, 1.7)
    radius = radius * rng.uniform(0.7, 1.2)
    edge = scene.patch(angle, depth, radius * 1.15, radius * 1.15, ragged, 0.15)
    hole = scene.patch(angle, depth, radius, radius, ragged, 0.12)
    inside = np.clip((scene.depth - depth) / radius * 0.5 + 0.3, 0, 1) ** 1.5
    scene.paint(edge * 0.85, scene.style.wall * rim)
    scene.paint(hole, BLACK)
    scene.paint(hole * inside * 0.7, scene.style.wall)
    scene.relief += 0.03 * (edge - hole)


PAINTERS = dict(  # what lies on the wall comes before what stands in front of it
    OB=surface_damage, BE=attached_deposits, IN=infiltration, RB=crack,
    GR=partial(opening, radius=0.42, ragged=0.0, rim=0.5),  # branch pipe
    PH=partial(opening, radius=0.42, ragged=0.6, rim=1.5),  # chiseled through the wall
    PB=partial(opening, radius=0.25, ragged=0.0, rim=1.5),  # drilled, with a light sleeve
    AF=settled_deposits, FO=obstacle, RO=roots, IS=sealing_ring,
)  # fmt: skip


def furnish(scene, rng):
    """Paint what any frame may show: texture, dirt, stains, joints, specks."""
    style = scene.style
    rough = 0.7 * scene.coarse + 0.8 * scene.medium + scene.fine + scene.speckle
    scene.albedo *= 1 + np.float32(style.grain) * rough
    if style.brick:
        course = scene.depth * 4
        mortar = (course % 1 < 0.15) | ((scene.angle * 4 + course // 1 % 2 * 0.5) % 1 < 0.12)
        scene.paint(0.4 * mortar * (scene.depth < 5), BLACK)
    dirt = style.dirt - scene.away(np.pi) + 0.25 * scene.coarse + 0.1 * scene.medium
    dirt = np.clip(dirt / 0.15, 0, 0.8)
    scene.paint(dirt, style.dirt_colour)
    scene.paint(dirt * np.clip(style.gravel * rough - 0.5, 0, 0.8), LIME)
    for angle in style.seams:
        scene.paint(0.5 * (scene.away(angle + 0.01 * scene.coarse) < 0.015), SLUDGE)
    for _ in range(style.stains + rng.integers(0, 2)):
        place, size = scene.spot(rng, 0, np.pi), (rng.uniform(0.15, 0.7), rng.uniform(0.3, 1.4))
        stain = scene.patch(*place, *size, 0.9, rng.uniform(0.1, 0.8))
        stain *= rng.uniform(0.25, 0.75) * np.clip(0.8 + rng.random() * scene.fine, 0, 1)
        scene.paint(stain, (LIME, RUST, SLUDGE)[rng.integers(3)])
    crust = rng.random() < 0.3  # lime or dirt on a sound joint
    for depth in (scene.joint + style.pipe_length * np.arange(4)).tolist():
        ring = scene.ring(depth, 0.02 * depth) * np.clip(0.7 + 0.5 * scene.coarse, 0, 1)
        scene.paint(style.joint_contrast * ring, [style.joint_tone] * 3)
        if crust:
            thick = scene.ring(depth + 0.08 * scene.medium, 0.1) * (scene.coarse > 0.1)
            scene.paint(0.7 * thick, (LIME, SLUDGE)[scene.travel > 64])
    gap = scene.ring(scene.joint, rng.uniform(0.02, 0.08)) * (scene.depth > scene.joint)
    scene.paint(rng.uniform(0.3, 0.9) * gap, BLACK)
    face = style.wall * rng.uniform(0.4, 0.8) + rng.uniform(0.2, 0.5)
    scene.paint(scene.lip * (0.8 + 0.2 * scene.medium), face)
    scene.paint(scene.lip * np.clip(scene.coarse + scene.fine, 0, 0.7), style.dirt_colour)
    for _ in range(rng.integers(0, 5)):
        speck = scene.patch(*scene.spot(rng, 0, np.pi), *rng.uniform(0.02, 0.06, 2), 0.3)
        scene.paint(speck, (SLUDGE, LIME)[rng.integers(2)])


def overlay(scene, image, rng):
    """Add blurred text lines and, in some videos, a compass circle to image [3, h, w]."""
    style, h, w = scene.style, scene.height, scene.width
    text = Image.new("L", (w, h))
    draw = ImageDraw.Draw(text)
    for k, y in enumerate(style.text_lines):
        x = 0.06 * w
        for word in range(1 + (k * 7 + len(style.text_lines)) % 3):
            end = x + w * (0.06 + 0.05 * ((k * 5 + word) % 4) + rng.uniform(0, 0.03))
            draw.rectangle((x, y * h, end, (y + 0.018) * h), round(255 * style.text_strength))
            x = end + 0.03 * w
    text = text.filter(ImageFilter.GaussianBlur(0.008 * h))
    if style.compass:
        box = (0.84 * w, 0.06 * h, 0.84 * w + 0.15 * h, 0.21 * h)
        ImageDraw.Draw(text).ellipse(box, outline=200, width=scene.scale)
    return image + np.asarray(text, np.float32) / 255 * (np.float32(style.text_tone) - image)


def render(row, size, seed):
    """Image [size, round(size * 352 / 288), 3] uint8 of a row; depends on nothing else."""
    style, rng = video_style(seed, row.video), np.random.default_rng([seed, 2, row.index])
    # Each class has its own random numbers, so that it leaves the rest of the frame as it is.
    own = {c: np.random.default_rng([seed, 3, row.index, CLASSES.index(c)]) for c in row.classes}
    scene = Scene(style, row, size, rng, own)
    furnish(scene, np.random.default_rng([seed, 4, row.index]))
    for name, painter in PAINTERS.items():
        if name in own:
            painter(scene, own[name])
    scene.paint(0.5 * scene.water, style.dirt_colour * 0.8 + 0.06)
    # Relief: slopes that face the lamp are brighter. Image gradients become slopes on the wall.
    slopes, steep = np.gradient(scene.relief, 1 / scene.height), np.clip(scene.depth, 0.5, 6)
    inward = -(slopes[0] * scene.outward[0] + slopes[1] * scene.outward[1])
    tilt = 1.3 * inward / steep + 0.4 * (slopes[1] - slopes[0])
    shade = np.clip(1 + tilt * style.focal / steep, 0.3, 1.7)
    glare = 1 + rng.uniform(0, 0.5) * np.exp(-((scene.away(rng.uniform(-3, 3)) / 0.4) ** 2))
    light = shade * glare * np.exp(-scene.lit / style.lamp) / (0.6 + 0.12 * scene.lit)
    image = light.astype(np.float32) * scene.albedo
    image *= np.float32(style.exposure * rng.lognormal(0, 0.12) / image.mean())  # auto exposure
    image = overlay(scene, 1 - np.exp(-image) + np.float32(style.haze)[:, None, None], rng)
    image = image.reshape(3, size, scene.scale, -1, scene.scale).mean((2, 4)).transpose(1, 2, 0)
    image = image + rng.normal(0, style.noise * np.sqrt(size / 288), image.shape)
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(style.blur * size / 288))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)  # inspection videos are compressed
    return np.asarray(Image.open(buffer))
