"""What keeps an edit in its place: Canny edges and ControlNet-Union.

`canny` draws the edges of a picture, `ControlNet` turns them (through the autoencoder) into residuals that are added to the
image stream of the Flux transformer.

    python controlnet.py
"""
import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------------------- edges


def canny(image, low=100, high=200):
    """Canny's edges of a picture: (H,W) or (H,W,3) uint8 -> (H,W) uint8 of 0 and 255.

    Bit for bit what OpenCV's `Canny(image, low, high)` gives (3x3 Sobel, |dx| + |dy|), the edge map that public ControlNets
    were trained on. Source: OpenCV's fixed-point arithmetic. ValueError: another dtype or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] != 3:
        raise ValueError(f"canny wants uint8 (H,W) or (H,W,3), not {image.dtype} {image.shape}")
    low, high = np.floor(min(low, high)), np.floor(max(low, high))
    dx, dy = sobel(image.reshape(*image.shape[:2], -1))       # (H, W) each
    size = abs(dx) + abs(dy)
    ridge = thin(size, dx, dy)
    return 255 * follow(ridge & (size > high), ridge & (size > low)).astype(np.uint8)


def sobel(image):
    """Horizontal and vertical derivative (H,W) of (H,W,C): at each pixel that of the channel with the largest |dx| + |dy|."""
    p = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), "edge")
    rows = p[:-2] + 2 * p[1:-1] + p[2:]                       # smoothed along y
    cols = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]              # smoothed along x
    dx, dy = rows[:, 2:] - rows[:, :-2], cols[2:] - cols[:-2]  # (H, W, C)
    channel = np.argmax(abs(dx) + abs(dy), axis=2)[..., None]  # the first of equals
    return np.take_along_axis(dx, channel, 2)[..., 0], np.take_along_axis(dy, channel, 2)[..., 0]


def thin(size, dx, dy):
    """Non-maximum suppression: True where `size` is largest across the edge; the edge's direction is one of four."""
    p = np.pad(size, 1)

    def at(y, x):                                             # the neighbour y rows down and x columns to the right
        return p[1 + y:p.shape[0] - 1 + y, 1 + x:p.shape[1] - 1 + x]

    ax, ay = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << 15
    tan22 = ax * 13573                                        # tan(22.5 deg) * 2^15;  tan(67.5 deg) = tan(22.5 deg) + 2
    falling = (dx ^ dy) >= 0                                  # the gradient points along the falling diagonal
    flat = (size > at(0, -1)) & (size >= at(0, 1))
    steep = (size > at(-1, 0)) & (size >= at(1, 0))
    slanted = np.where(falling, (size > at(-1, -1)) & (size > at(1, 1)), (size > at(-1, 1)) & (size > at(1, -1)))
    return np.where(ay < tan22, flat, np.where(ay > tan22 + (ax << 16), steep, slanted))


def follow(strong, weak):
    """Hysteresis: the strong pixels and every weak one that a chain of weak pixels (8 neighbours) ties to them."""
    width = strong.shape[1] + 2
    weak, edges = np.pad(weak & ~strong, 1).ravel(), np.pad(strong, 1).ravel()
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    front = np.flatnonzero(edges)
    while front.size:                                         # only the pixels reached last can reach new ones
        near = (front[:, None] + around).ravel()
        front = np.unique(near[weak[near]])
        weak[front], edges[front] = False, True
    return edges.reshape(-1, width)[1:-1, 1:-1]
