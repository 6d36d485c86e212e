"""The pictures of a scene: a textured background that drifts under a moving camera, and the candidates on it."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from mubic_deploy.scenes.plan import HEIGHT, WIDTH, Candidate, Plan, hop_height

FINE = 3  # candidates are drawn this many times finer, then averaged
MARGIN = 64  # pixels of background beyond each edge, for the camera
Colour = tuple[int, int, int]


class Painter:
    """Draws the frames of one scene; the background is made once."""

    def __init__(self, plan: Plan, rng: np.random.Generator) -> None:
        self.plan = plan
        self.levels = [plan.levels(k) for k in range(len(plan.candidates))]
        self._still = _texture(rng, clutter=int(rng.integers(3, 10)))
        self._moving = _texture(rng, clutter=0)
        self._share = rng.uniform(0, 0.35)  # of the layer that drifts by itself
        self._drift = rng.uniform(-14, 14, 2)  # its speed, pixels a second
        self._grain = rng.uniform(0, 3)
        self._rng = rng

    def frame(self, index: int) -> Image.Image:
        """RGB picture [180, 320] of frame `index`. Frames must be asked for in order: the grain is drawn as they go."""
        plan = self.plan
        camera = plan.camera[index]
        wander = camera + MARGIN / 2 * np.sin(self._drift * plan.times[index] / (MARGIN / 2))
        picture = Image.blend(_window(self._still, camera), _window(self._moving, wander), self._share)
        grain = self._rng.normal(0, self._grain, (HEIGHT, WIDTH, 1))
        picture = Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
        for k in np.argsort(plan.places[:, index, 1]):  # the lower ones stand in front
            self._place(picture, plan.candidates[k], plan.places[k, index], float(self.levels[k][index]))
        return picture

    def _place(self, picture: Image.Image, c: Candidate, place: np.ndarray, level: float) -> None:
        side = 2 * int(1.5 * c.radius) + 2
        fine = Image.new("RGBA", (side * FINE, side * FINE), (0, 0, 0, 0))
        DRAWINGS[c.kind](ImageDraw.Draw(fine), c, side * FINE / 2, c.radius * FINE, level)
        patch = fine.reduce(FINE)
        x, y = place
        if c.kind == "bouncer":
            self._shadow(picture, c, place, level)
            y = y - hop_height(c) * level
        # whole pixels to the left, the rest by a bilinear shift, so that slow motion is smooth
        left, top = np.floor([x - side / 2, y - side / 2])
        part = (left - (x - side / 2), top - (y - side / 2))
        shift = (1, 0, part[0], 0, 1, part[1])
        patch = patch.transform(patch.size, Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
        picture.paste(patch, (int(left), int(top)), patch)

    def _shadow(self, picture: Image.Image, c: Candidate, place: np.ndarray, level: float) -> None:
        wide, high = (1 - 0.4 * level) * c.radius, (0.25 - 0.1 * level) * c.radius
        mask = Image.new("L", (int(2 * wide) + 4, int(2 * high) + 4))
        ImageDraw.Draw(mask).ellipse((1, 1, 2 * wide, 2 * high), fill=int(150 - 70 * level))
        at = (int(place[0] - wide), int(place[1] + 0.95 * c.radius - high))
        picture.paste(Image.new("RGB", mask.size, (15, 15, 20)), at, mask)


def _window(texture: Image.Image, camera: np.ndarray) -> Image.Image:
    x, y = MARGIN + camera
    return texture.transform((WIDTH, HEIGHT), Image.Transform.AFFINE, (1, 0, x, 0, 1, y), Image.Resampling.BILINEAR)


def _texture(rng: np.random.Generator, clutter: int) -> Image.Image:
    """Noise of five octaves between two colours, with `clutter` resting shapes: RGB, MARGIN beyond each edge."""
    size = (WIDTH + 2 * MARGIN, HEIGHT + 2 * MARGIN)
    field = np.zeros(size[::-1])
    roughness = rng.uniform(0.45, 0.8)
    for octave in range(5):
        cells = 2 ** (octave + 2)
        coarse = rng.normal(size=(cells, cells * 3 // 2)).astype(np.float32)
        layer = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        field += roughness**octave * np.asarray(layer)
    field = (field - field.min()) / (field.max() - field.min())
    hue = rng.uniform()
    ends = [_rgb(hue, rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.45)), _rgb(hue + rng.uniform(-0.2, 0.2), 0.4, 0.75)]
    a, b = np.array(ends, float)
    picture = Image.fromarray((a + field[..., None] * (b - a)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(clutter):
        x, y = rng.uniform((0, 0), size)
        w, h = rng.uniform(6, 40, 2)
        colour = _rgb(rng.uniform(), rng.uniform(0.1, 0.8), rng.uniform(0.2, 0.9))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x - w, y - h, x + w, y + h), fill=colour)
    return picture


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    r, g, b = colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1))
    return int(255 * r), int(255 * g), int(255 * b)


def _box(x: float, y: float, w: float, h: float) -> tuple[float, float, float, float]:
    return x - w, y - h, x + w, y + h


def _bouncer(draw: ImageDraw.ImageDraw, c: Candidate, middle: float, r: float, level: float) -> None:
    """A ball with a stripe, a beach ball or a crate; flat where it meets the ground."""
    squash = 0.75 + 0.25 * min(level / 0.12, 1)
    w, h = r * (2 - squash) * 0.95, r * 0.95 * squash
    y = middle + (r * 0.95 - h)
    main, other = _rgb(c.hue, 0.85, c.light), _rgb(c.hue + 0.45, 0.6, 1.1 - 0.6 * c.light)
    box = _box(middle, y, w, h)
    if c.look < 0.35:
        draw.ellipse(box, fill=main)
        draw.chord(box, 200, 340, fill=other)
    elif c.look < 0.7:
        for part in range(6):
            start = part * 60 + 200 * c.look
            draw.pieslice(box, start, start + 60, fill=main if part % 2 else other)
    else:
        draw.rectangle(box, fill=main)
        draw.line((box[0], box[1], box[2], box[3]), fill=other, width=int(0.2 * r))
        draw.line((box[0], box[3], box[2], box[1]), fill=other, width=int(0.2 * r))


def _pulser(draw: ImageDraw.ImageDraw, c: Candidate, middle: float, r: float, level: float) -> None:
    """Rings, a star or a hexagon that swells and glows."""
    size = r * (0.7 + 0.45 * level)
    main = _rgb(c.hue, 0.9 - 0.5 * level, 0.45 * c.light + 0.25 + 0.4 * level)
    other = _rgb(c.hue + 0.5, 0.7, 0.35 + 0.5 * level)
    if c.look < 0.35:
        for ring in range(4):
            share = size * (1 - ring / 4)
            draw.ellipse(_box(middle, middle, share, share), fill=other if ring % 2 else main)
        return
    corners = 10 if c.look < 0.7 else 6
    reach = [size * (0.5 if corners == 10 and i % 2 else 1) for i in range(corners)]
    turn = 2 * np.pi * np.arange(corners) / corners + 6 * c.look
    points = [(middle + s * np.cos(a), middle + s * np.sin(a)) for s, a in zip(reach, turn, strict=True)]
    draw.polygon(points, fill=main)
    draw.ellipse(_box(middle, middle, 0.35 * size, 0.35 * size), fill=other)


def _talker(draw: ImageDraw.ImageDraw, c: Candidate, middle: float, r: float, level: float) -> None:
    """A face, round, long or square, with a mouth that opens."""
    skin = _rgb(c.hue, 0.35, 0.45 + 0.5 * c.light)
    dark = _rgb(c.hue + 0.5, 0.6, 0.2)
    w, h = (0.95 * r, r) if c.look < 0.35 else (0.78 * r, r) if c.look < 0.7 else (0.9 * r, 0.9 * r)
    box = _box(middle, middle, w, h)
    if c.look < 0.7:
        draw.ellipse(box, fill=skin)
        draw.chord(box, 205, 335, fill=dark)
    else:
        draw.rounded_rectangle(box, 0.2 * r, fill=skin)
        draw.line((middle, middle - h, middle, middle - 1.3 * r), fill=dark, width=int(0.12 * r))
    for side in (-1, 1):
        x, y = middle + side * 0.38 * w, middle - 0.18 * h
        draw.ellipse(_box(x, y, 0.17 * r, 0.15 * r), fill=(245, 245, 245))
        draw.ellipse(_box(x, y, 0.08 * r, 0.08 * r), fill=(10, 10, 10))
    draw.ellipse(_box(middle, middle + 0.48 * h, 0.36 * w, (0.04 + 0.3 * level) * r), fill=(90, 10, 20))
    if level > 0.35:
        draw.ellipse(_box(middle, middle + 0.48 * h + 0.14 * r * level, 0.2 * w, 0.1 * r * level), fill=(215, 90, 100))


DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw, Candidate, float, float, float], None]] = {
    "bouncer": _bouncer,
    "pulser": _pulser,
    "talker": _talker,
}
