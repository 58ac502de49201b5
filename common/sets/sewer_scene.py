"""A pipe seen from inside, by ray casting: geometry, materials, noise on the wall, masks to paint.

Lengths are in pipe radii, y points down, angle 0 is the crown. Used by common/synthetic.py.
"""

from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

WALLS = np.array([  # reflectance (red, green, blue) of the pipe materials
    (0.62, 0.59, 0.54), (0.58, 0.53, 0.56), (0.57, 0.61, 0.54), (0.60, 0.55, 0.42),
    (0.50, 0.50, 0.30), (0.85, 0.36, 0.16), (0.78, 0.50, 0.22), (0.50, 0.52, 0.58),
    (0.66, 0.64, 0.62), (0.50, 0.44, 0.38), (0.54, 0.38, 0.31), (0.60, 0.60, 0.58),
])  # fmt: skip
LIME, RUST, SLUDGE, BLACK = (0.88, 0.85, 0.78), (0.4, 0.2, 0.08), (0.12, 0.1, 0.08), (0.02,) * 3


def video_style(seed, video):
    """What the frames of one video share: pipe, lamp, camera and overlay."""
    rng = np.random.default_rng([seed, 1, video])
    return SimpleNamespace(
        wall=np.clip(rng.choice(WALLS) * rng.normal(1, 0.03, 3), 0.1, 0.95),
        table=rng.uniform(-1, 1, 128 * 128).astype(np.float32),
        grain=rng.uniform(0.04, 0.2),
        brick=rng.random() < 0.08,
        pipe_length=rng.uniform(2.0, 6.0),
        joint_tone=rng.choice([0.02, 0.9]),
        joint_contrast=rng.uniform(0.3, 0.7),
        focal=rng.uniform(0.58, 0.8),  # in image heights
        centre=rng.normal(0.5, 0.05, 2),
        lamp=rng.uniform(1.5, 4.0),  # depth over which the light falls to 37 %
        exposure=rng.uniform(0.38, 0.75),
        haze=rng.uniform(0.03, 0.12) * np.array([1, 0.92, 1.05]),
        dirt=rng.uniform(0.0, 0.85),  # half width of the dirty invert, in radians
        dirt_colour=rng.uniform(0.08, 0.4) * np.array([1, 0.9, 0.75]),
        gravel=rng.uniform(-0.5, 0.8),
        seams=rng.uniform(-np.pi, np.pi, rng.choice(3, p=[0.7, 0.2, 0.1])),
        stains=rng.integers(0, 4),
        noise=rng.uniform(0.004, 0.04),  # at 288 pixels
        blur=rng.uniform(0.2, 1.3),  # in pixels of a 288-pixel frame
        text_lines=[0.06 + 0.05 * k for k in range(rng.integers(0, 5))] + [0.9] * rng.integers(2),
        text_tone=rng.choice([0.15, 0.85]),
        text_strength=rng.uniform(0.4, 0.8),
        compass=rng.random() < 0.5,
    )


class Scene:
    """A pipe seen from inside. Lengths are in pipe radii, y points down, angle 0 is the crown.

    Pixel arrays [height, width]: depth and angle of the wall seen there, lit (depth the lamp's
    light travels), relief (height above the wall), water, lip, noises; albedo [3, height, width].
    """

    def __init__(self, style, row, size, rng, own):
        self.style, self.scale = style, 2 if size <= 144 else 1  # drawn larger: no jagged edges
        self.height, self.width = size * self.scale, round(size * 352 / 288) * self.scale
        self.focal, self.level = style.focal * self.height, 1 - 2 * row.water / 100
        self.eye = rng.normal(0, 0.1), min(rng.normal(0.08, 0.1), self.level - 0.35)
        self.vanish = (style.centre + rng.normal(0, 0.06, 2)) * [self.width, self.height]
        near = rng.random() < 0.75 or bool({"DE", "FS", "OK", "IS", "RO"} & set(row.classes))
        self.joint = style.focal / (rng.uniform(0.25, 0.42) if near else rng.uniform(0.1, 0.2))
        self.unit = self.focal / self.joint  # pixels per radius at the joint
        self.oval = 1 + rng.normal(0, 0.015) * np.array([1, -1])
        self.travel = rng.uniform(0, 128)
        way, shift = rng.uniform(-np.pi, np.pi), rng.uniform(0, 0.05)  # no joint is perfect
        self.next_wall = style.wall
        if "DE" in own:  # deformation: the whole pipe is squeezed, mostly from above
            squeeze = own["DE"].uniform(0.12, 0.2) * own["DE"].choice([1, 1, -1])
            self.oval = np.array([1 + squeeze, 1 - squeeze])
        if "FS" in own:  # displaced joint: the face of the next pipe shows as a crescent
            shift = own["FS"].uniform(0.13, 0.26)
        self.next_pipe = [shift * np.sin(way), -shift * np.cos(way), 1.0]  # x, y, radius
        if "OK" in own:  # construction change: the next pipe is narrower and of other material
            self.next_pipe[2] = own["OK"].uniform(0.74, 0.88)
            self.next_wall = own["OK"].choice(WALLS) * own["OK"].uniform(0.8, 1.2)
        self.cast()

    def cast(self):
        """Intersect all rays with pipe and water; set the pixel arrays."""
        py, px = np.mgrid[: self.height, : self.width].astype(np.float32)
        fx = (px - np.float32(self.vanish[0])) / np.float32(self.focal)
        fy = (py - np.float32(self.vanish[1])) / np.float32(self.focal)
        self.outward = np.stack([fy, fx]) / (np.hypot(fx, fy) + 1e-6)
        ox, oy = np.float32(self.eye)
        self.dx, self.dy = dx, dy = fx / np.float32(self.oval[0]), fy / np.float32(self.oval[1])
        self.depth, self.lip = self.march(ox, oy, dx, dy, 0)
        self.lit, self.water = self.depth, np.zeros(px.shape, bool)
        if self.level < 1:  # go on from the water surface with the mirrored ray
            surface = np.float32(self.level - self.eye[1]) / np.maximum(dy, 1e-4)
            self.water = surface < self.depth
            oy = np.where(self.water, np.float32(2 * self.level) - oy, oy)
            ripple = 0.03 * self.noise(4, px / self.width, surface * 3) * self.water * dy
            dx, dy = dx + ripple, np.where(self.water, -dy, dy)
            self.depth, self.lip = self.march(ox, oy, dx, dy, surface * self.water)
            self.lit = np.where(self.water, 0.7 * surface + 0.3 * self.depth, self.depth)
        self.angle = np.arctan2(ox + self.depth * dx, -(oy + self.depth * dy))
        turn = self.angle / np.float32(2 * np.pi) + np.float32(0.5)
        along = self.depth + 3 * self.lip * np.hypot(dx, dy)  # outward on the face of a pipe
        self.coarse = self.noise(8, turn, along * 1.3)
        self.medium = self.noise(32, turn, along * 5)
        self.fine = self.noise(128, turn, along * 18) * np.exp(-0.25 * self.depth)
        self.speckle = self.noise(512, turn, 90 * np.log(along))
        self.relief = 0.02 * self.style.grain * self.medium
        self.albedo = np.tile(np.float32(self.style.wall)[:, None, None], (1, *px.shape))
        self.paint(self.depth > self.joint, self.next_wall)

    def march(self, ox, oy, dx, dy, start):
        """Depth of the wall for rays from depth `start`, and where it is the next pipe's face."""

        def leave(x, y, radius):
            """Depth at which the rays leave a cylinder, and whether they are in it at the joint."""
            x, y = ox - np.float32(x), oy - np.float32(y)
            a, b, c = dx * dx + dy * dy + 1e-6, x * dx + y * dy, x * x + y * y - radius * radius
            depth = (np.sqrt(np.maximum(b * b - a * np.float32(c), 0)) - b) / a
            return depth, (a * self.joint + 2 * b) * self.joint + c < 0

        (depth, before), (further, inside) = leave(0.0, 0.0, 1.0), leave(*self.next_pipe)
        lip = before & ~inside & (start < self.joint)
        depth = np.where(lip, self.joint, np.where(before & inside, further, depth))
        return np.minimum(depth, 40).astype(np.float32), lip

    def noise(self, period, turn, along):
        """Smooth noise in -1..1: `period` (a power of 2) cells per turn, `along` in cells."""
        u, v = turn * period, along + np.float32(self.travel)
        iu, iv = np.floor(u), np.floor(v)
        u, v, iu, iv = u - iu, v - iv, iu.astype(np.int32), iv.astype(np.int32)
        u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
        mask, table = min(period, 128) - 1, self.style.table
        u0, u1, v0, v1 = (iu & mask) << 7, ((iu + 1) & mask) << 7, iv & 127, (iv + 1) & 127
        low, high = table.take(u0 + v0), table.take(u1 + v0)
        low += v * (table.take(u0 + v1) - low)
        high += v * (table.take(u1 + v1) - high)
        return low + u * (high - low)

    def paint(self, mask, colour, lit=None):
        """Blend a colour in by mask 0..1; a thing standing in the pipe is `lit` at its depth."""
        mask = np.asarray(mask, np.float32)
        self.albedo += mask * (np.float32(colour)[:, None, None] - self.albedo)
        if lit is not None:
            self.lit = self.lit + mask * (np.float32(lit) - self.lit)

    def away(self, angle):
        """Angle 0..pi between each pixel and `angle`."""
        off = np.abs(self.angle - np.asarray(angle, np.float32))
        return np.minimum(off, np.abs(np.float32(2 * np.pi) - off))

    def patch(self, angle, depth, half_angle, half_length, ragged=0.0, soft=0.3):
        """Mask 0..1 of an ellipse on the wall, its edge `ragged` by noise."""
        off = self.away(angle) / np.float32(half_angle)
        along = (self.depth - np.float32(depth)) / np.float32(half_length)
        rough = ragged * 0.55 * (self.coarse + self.medium + 0.5 * self.fine)
        far = np.sqrt(off * off + along * along) + rough
        return np.clip((1 - far) / soft, 0, 1) * ~self.water

    def ring(self, depth, half_width):
        """Mask 0..1 of a ring around the pipe."""
        return np.clip(1.5 - np.abs(self.depth - depth) / half_width, 0, 1)

    def spot(self, rng, low=0.3, high=2.0):
        """A place on a side wall: angle `low`..`high` from the crown, depth well in the image."""
        side = rng.choice([-1, 1]) * rng.uniform(low, high)
        return side, self.style.focal / rng.uniform(0.3, 0.42)

    def pixel(self, angle, depth, radius=1.0):
        """Image positions [..., 2] of points at an angle, depth and distance from the axis."""
        xy = np.stack([np.sin(angle) * radius, -np.cos(angle) * radius], -1) - self.eye
        return xy * self.oval * self.focal / np.asarray(depth)[..., None] + self.vanish

    def strokes(self, shapes):
        """Mask of (points [n, 2], line width) in pixels; width 0 fills the polygon."""
        image = Image.new("L", (self.width, self.height))
        draw = ImageDraw.Draw(image)
        for points, width in shapes:
            flat = np.ravel(points).tolist()
            if width:
                draw.line(flat, 255, max(1, round(width)), joint="curve")
            else:
                draw.polygon(flat, 255)
        return np.asarray(image, np.float32) / 255
