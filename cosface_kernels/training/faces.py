"""Parametric faces: any number of identities, each a vector of shape and colour, drawn with a new pose, light, blur and noise.

    render([3, 3], [0, 1], size=32, seed=0)    # two images of identity 3: uint8 (2, 3, 32, 32)

An image is a function of (identity, image, size, seed) alone, whoever draws it and in whatever order: all random numbers are
hashes of these. Nothing is stored, so a set may have any number of identities.
"""

import functools

import numpy as np

CHUNK = 16  # images drawn together: their planes fit the second-level cache
_SHAPE, _POSE, _GRAIN = 1, 2, 3  # streams of random numbers
_NUMBERS = 256  # the numbers that a stream may need


def render(identities, images, size=32, seed=0):
    """uint8 (N, 3, size, size): image images[n] of identity identities[n], two sequences of N whole numbers from 0 on."""
    identities, images = (np.atleast_1d(np.asarray(each, dtype=np.uint64)) for each in (identities, images))
    drawn = np.empty((len(identities), 3, size, size), dtype=np.uint8)
    for start in range(0, len(drawn), CHUNK):
        chunk = slice(start, start + CHUNK)
        drawn[chunk] = _draw(identities[chunk], images[chunk], size, seed)
    return drawn


def mix(*keys):
    """uint64 hashes, by splitmix64's mixing of one key after another."""
    mixed = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for key in keys:
            mixed = (mixed ^ np.asarray(key, dtype=np.uint64)) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed


def uniform(count, *keys):
    """float32 (count, N) in [0, 1), functions of the keys, of which at least one has N numbers."""
    bits = mix(np.arange(count)[:, None], *keys) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)


class _Numbers:
    """Random numbers of N rows, one after another: each call returns float32 (N, 1, 1)."""

    def __init__(self, *keys):
        self.left = iter(uniform(_NUMBERS, *keys)[:, :, None, None])

    def uniform(self, low, high):
        return np.float32(low) + np.float32(high - low) * next(self.left)

    def around(self, mean, spread):
        """Numbers of a bell curve: the sum of three uniform numbers with the variance of one."""
        return np.float32(mean) + np.float32(spread) * (self.uniform(-1, 1) + self.uniform(-1, 1) + self.uniform(-1, 1))

    def chance(self, probability):
        return (self.uniform(0, 1) < probability).astype(np.float32)

    def colour(self, mean, spread, common):
        """float32 (N, 3, 1, 1): `common` moves all three channels."""
        shade = self.around(0, common)
        return np.clip(np.stack([each + shade + self.around(0, spread) for each in mean], 1), 0, 1)


def _draw(identities, images, size, seed):
    who, how = _Numbers(seed, _SHAPE, identities), _Numbers(seed, _POSE, identities, images)
    canvas = _Canvas(len(identities), size, how)
    _face(canvas, who, how)
    pixels = _occlude(canvas, how)
    pixels = _light(pixels, canvas, how)
    pixels = _blur(pixels, how)
    pixels += how.uniform(0.01, 0.07)[:, None] * _grain(size, seed, identities, images)
    return (np.clip(pixels, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


class _Canvas:
    """N images in face coordinates: x to the right and y down, the head about [-0.6, 0.6] x [-0.8, 0.8], turned by the pose."""

    def __init__(self, count, size, how):
        line = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
        roll, zoom = how.around(0, 0.1), how.around(1.0, 0.05)
        x, y = line[None, None, :] - how.around(0, 0.05), line[None, :, None] - how.around(0, 0.05)
        # A small turn: (1 - r²/2, r) for (cos r, sin r) needs no function whose rounding depends on the place in memory.
        cosine = 1 - roll * roll / 2
        self.x, self.y = (cosine * x + roll * y) * zoom, (cosine * y - roll * x) * zoom
        self.yaw, self.pitch = how.around(0, 0.11), how.around(0, 0.06)
        self.sharpness = np.float32(size / 2)
        backdrop = how.colour((0.5, 0.5, 0.5), 0.2, 0.2)
        self.pixels = np.broadcast_to(backdrop, (count, 3, size, size)) + how.around(0, 0.1)[:, None] * y[:, None]

    def paint(self, cover, colour):
        self.pixels += cover[:, None] * (colour - self.pixels)

    def disc(self, x, y, width, height, depth=0.0, slope=0.0):
        """The share of each pixel that lies in an ellipse. depth: how far the ellipse moves with the turn of the head."""
        x, y = self.x - (x + self.yaw * np.float32(depth)), self.y - (y + self.pitch * np.float32(depth))
        distance = np.sqrt(np.square(x / width) + np.square((y - slope * x) / height)) - 1
        return np.clip(np.float32(0.5) - distance * np.minimum(width, height) * self.sharpness, 0, 1)


def _face(canvas, who, how):
    width, height, jaw = who.around(0.56, 0.035), who.around(0.74, 0.03), who.around(0.22, 0.09)
    skin, hair = who.colour((0.76, 0.58, 0.48), 0.03, 0.1), who.colour((0.3, 0.22, 0.17), 0.06, 0.13)
    volume, hairline, parting = who.around(0.1, 0.05), who.around(-0.42, 0.07), who.around(0, 0.12)
    canvas.paint(canvas.disc(0, -0.12, width + volume, height * 0.9 + volume, -0.4), hair)
    canvas.paint(canvas.disc(0, 1.25, who.around(0.7, 0.06), 0.55, -0.6), how.colour((0.4, 0.4, 0.45), 0.18, 0.18))
    ear, lobe = who.around(0.1, 0.02), who.around(0.15, 0.02)
    for side in (-1, 1):
        canvas.paint(canvas.disc(side * width, 0.02, ear, lobe, -0.3), skin * np.float32(0.88))
    narrowing = 1 - jaw * np.maximum(canvas.y, 0)
    head = canvas.disc(0, 0, width * narrowing, height)
    canvas.paint(head, skin)
    cheeks = canvas.disc(0, 0.22, who.around(0.5, 0.04), 0.14, 0.5) * head
    canvas.paint(cheeks * np.float32(0.25), skin * who.colour((1.0, 0.8, 0.8), 0.04, 0.03))
    fringe = np.clip(
        (hairline + parting * canvas.x + who.around(0.1, 0.12) * canvas.x * canvas.x - canvas.y) * canvas.sharpness, 0, 1
    )
    canvas.paint(fringe * head, hair * np.float32(0.92))
    _eyes(canvas, who, how, hair)
    _nose_and_mouth(canvas, who, how, skin)
    spot = canvas.disc(who.around(0, 0.2), who.around(0.2, 0.15), 0.045, 0.045, 0.6)
    canvas.paint(spot * who.chance(0.4), skin * np.float32(0.5))


def _eyes(canvas, who, how, hair):
    apart, level = who.around(0.25, 0.025), who.around(-0.1, 0.03)
    width, openness, slant = who.around(0.13, 0.012), who.around(0.075, 0.012) * how.uniform(0.55, 1.1), who.around(0, 0.12)
    iris, size, gaze = who.colour((0.3, 0.3, 0.28), 0.09, 0.1), who.around(0.058, 0.005), how.around(0, 0.015)
    brow, thickness, arch = who.around(0.17, 0.02), who.around(0.035, 0.01), who.around(0, 0.16)
    lift = who.around(0.19, 0.025) + how.around(0, 0.01)
    for side in (-1, 1):
        white = canvas.disc(side * apart, level, width, openness, 0.5, side * slant)
        canvas.paint(white, np.float32(0.93))
        canvas.paint(white * canvas.disc(side * apart + gaze, level, size, size, 0.55), iris)
        canvas.paint(white * canvas.disc(side * apart + gaze, level, size * 0.45, size * 0.45, 0.55), np.float32(0.05))
        canvas.paint(canvas.disc(side * apart, level - lift, brow, thickness, 0.5, side * arch), hair * np.float32(0.8))


def _nose_and_mouth(canvas, who, how, skin):
    length, width = who.around(0.17, 0.02), who.around(0.045, 0.008)
    tip, wings = who.around(0.2, 0.025), who.around(0.1, 0.014)
    canvas.paint(canvas.disc(0, tip - length, width, length, 0.8) * np.float32(0.35), skin * np.float32(1.18))
    canvas.paint(canvas.disc(0, tip, wings, 0.05, 0.9) * np.float32(0.55), skin * np.float32(0.72))
    level, wide, full = who.around(0.43, 0.03), who.around(0.2, 0.022), who.around(0.05, 0.01)
    smile, lips = who.around(0, 0.15) + how.around(0, 0.3), who.colour((0.66, 0.36, 0.36), 0.05, 0.05)
    bend = smile * (np.square(canvas.x) * 4 - np.float32(0.06))
    opening = how.chance(0.3) * how.uniform(0.3, 0.9)
    mouth = canvas.disc(0, level - bend, wide, full * (1 + opening), 0.6)
    canvas.paint(mouth, lips)
    canvas.paint(
        canvas.disc(0, level - bend, wide * 0.8, full * (np.float32(0.12) + opening * np.float32(0.5)), 0.6), np.float32(0.15)
    )


def _occlude(canvas, how):
    """Glasses, dark or clear, and a bar across the image, each in some of the images."""
    glasses, dark, frame = how.chance(0.12), how.uniform(0.15, 0.7), how.colour((0.2, 0.2, 0.2), 0.1, 0.15)
    for side in (-1, 1):
        canvas.paint(canvas.disc(side * 0.25, -0.1, 0.19, 0.14, 0.6) * glasses * dark, frame)
    bar, angle = how.chance(0.2), how.uniform(-1, 1)
    along = canvas.y + angle * canvas.x - how.uniform(-0.7, 0.9)
    cover = np.clip((how.uniform(0.06, 0.2) - np.abs(along)) * canvas.sharpness, 0, 1)
    canvas.paint(cover * bar, how.colour((0.45, 0.45, 0.45), 0.2, 0.25))
    return canvas.pixels


def _light(pixels, canvas, how):
    """A lamp from one side, its brightness and its colour."""
    slope = how.around(0, 0.22) * canvas.x + how.around(-0.05, 0.16) * canvas.y
    colour = np.stack([how.around(1, 0.06) for _ in range(3)], 1)
    return pixels * (colour * (how.around(0.95, 0.13) + slope)[:, None])


def _blur(pixels, how):
    """Twice the mean with the neighbours, by an amount from none to all of it."""
    amount = np.maximum(how.uniform(-0.4, 1), 0)[:, None] * np.float32(0.5)
    for _ in range(4):  # down, across, down, across
        pixels = pixels.swapaxes(2, 3)
        padded = np.pad(pixels, ((0, 0), (0, 0), (0, 0), (1, 1)), mode="edge")
        pixels = pixels + amount * ((padded[..., :-2] + padded[..., 2:]) * np.float32(0.5) - pixels)
    return pixels


@functools.lru_cache(maxsize=2)
def _grains(seed):
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(2**18, dtype=np.float32)


def _grain(size, seed, identities, images):
    """Noise float32 (N, 3, size, size): windows, at hashed places, over a quarter of a million normal numbers."""
    grains, count = _grains(seed), 3 * size * size
    table = np.concatenate([grains, grains.take(np.arange(count), mode="wrap")])
    starts = (mix(seed, _GRAIN, identities, images) % np.uint64(len(grains))).astype(np.int64)
    return np.stack([table[start : start + count] for start in starts]).reshape(len(starts), 3, size, size)
