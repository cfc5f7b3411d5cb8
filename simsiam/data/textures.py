"""A generated data set of ten texture classes, from which SimSiam learns in minutes on a CPU."""

import numpy as np
import torch
from torch import Tensor

TEXTURE_CLASSES = tuple("rows columns diagonals checks grid dots rings bricks zigzag blobs".split())
# A rounded table of the sine: with it and the exact operations below (+ - * / floor sqrt) every
# machine generates the same bytes, which libm's sine does not guarantee.
SINE = np.round(np.sin(2 * np.pi * np.arange(4096) / 4096) * 2**15) / 2**15


def sine(cycles: np.ndarray) -> np.ndarray:
    """Return the sine of `cycles` periods."""
    return SINE[np.floor(cycles * 4096).astype(np.int64) & 4095]


def make_textures(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Generate images, uint8, N x 3 x 32 x 32, of the classes in turn, and their labels.

    Phase, scale, contrast, polarity, lighting and tint vary within every class alike, so that
    neither single pixels nor colours tell the class, but their arrangement, which views keep.
    """
    rng = np.random.default_rng([seed, number])
    u = rng.random((number, 16, 1, 1))
    corners = rng.random((number, 14, 14))
    grain = rng.random((number, 32, 32)) - 0.5
    labels = np.arange(number) % len(TEXTURE_CLASSES)
    field = np.empty((number, 32, 32))
    for label, name in enumerate(TEXTURE_CLASSES):
        rows = labels == label
        field[rows] = draw_texture(name, u[rows], corners[rows])
    y, x = np.mgrid[0:32, 0:32].astype(float)
    field *= np.where(u[:, 7] < 0.5, 1.0, -1.0) * (0.10 + 0.25 * u[:, 8])  # polarity, contrast
    field += 0.3 * ((u[:, 9] - 0.5) * (x - 15.5) + (u[:, 10] - 0.5) * (y - 15.5)) / 16  # lighting
    tint = 0.35 + 0.3 * u[:, 11] + 0.2 * (u[:, 12:15, 0] - 0.5)  # N x 3 x 1
    images = tint[..., None] + (field + 0.12 * grain)[:, None]
    pixels = np.clip(np.floor(images * 256), 0, 255).astype(np.uint8)
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def draw_texture(name: str, u: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return brightness in [-1, 1], N x 32 x 32, of a class.

    `u`: N x 16 and `corners`: N x 14 x 14 random numbers from 0 to 1.
    """
    y, x = np.mgrid[0:32, 0:32].astype(float)
    period = 5 + 6 * u[:, 0]  # pixels
    # A shear of both axes: unlike a rotation exact, and as good here.
    slope = 0.3 * (u[:, 1] - 0.5)
    a = (x + slope * y) / period + u[:, 2]  # in periods
    b = (y - slope * x) / period + u[:, 3]
    side = np.where(u[:, 4] < 0.5, 1.0, -1.0)

    def line(t: np.ndarray) -> np.ndarray:  # 0 on lines one period apart, 1 midway between them
        return np.abs(t - np.floor(t) - 0.5) * 2

    if name == "rows":
        field = sine(b)
    elif name == "columns":
        field = sine(a)
    elif name == "diagonals":
        field = sine((a + side * b) * 0.7)
    elif name == "checks":
        field = 1.5 * sine(a / 1.4) * sine(b / 1.4)
    elif name == "grid":
        field = 1 - 2.4 * np.minimum(line(a), line(b))
    elif name == "dots":
        field = 2.2 - 4.5 * np.sqrt((line(a) / 2) ** 2 + (line(b) / 2) ** 2)
    elif name == "rings":
        field = sine(np.sqrt((x - 32 * u[:, 5]) ** 2 + (y - 32 * u[:, 6]) ** 2) / period)
    elif name == "bricks":
        field = 1 - 2.4 * np.minimum(2 * line(a / 2 + 0.5 * (np.floor(b) % 2)), line(b))
    elif name == "zigzag":
        field = sine(b + 0.6 * line(a / 2))
    elif name == "blobs":
        # Bilinear interpolation of random values. Sums, not a matrix product: the two neighbours
        # and zeros add up to the same bits in any order.
        cell = np.arange(32)[:, None] / (0.55 * period)
        down = np.clip(1 - np.abs(cell + u[:, 2] - np.arange(14)), 0, None)  # N x 32 x 14
        across = np.clip(1 - np.abs(cell + u[:, 3] - np.arange(14)), 0, None)
        mixed = (down[..., None] * corners[:, None]).sum(2)  # N x 32 x 14
        field = 4.5 * ((mixed[:, :, None] * across[:, None]).sum(3) - 0.5)
    return np.clip(field, -1, 1)
