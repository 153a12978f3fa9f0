"""Small images, maps and heat as tiles and contact sheets; PNG bytes.

A tile is uint8 `[S, S, 3]` (RGB), a map float `[h, w]` in [0, 1]. Pixels are enlarged by whole factors and never smoothed; only heat from a coarse
layer is, since its cells are no pixels. What is drawn, and files, are the business of `pictures.py`.
"""

from collections.abc import Sequence

import cv2
import numpy as np

MIN_TILE_PX = 96
GAP_PX, LABEL_PX, BASELINE_PX = 6, 16, 12
BACKGROUND, INK = 232, 40  # light grey, against which white and black tiles both stand out
FONT, FONT_SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.4  # about 12 characters over a tile of 96 px
HEAT_COLOURS = (
    cv2.COLORMAP_INFERNO
)  # perceptually uniform, in rising lightness: readable in grey and by the colour-blind


def tile_px(size_px: int) -> int:
    """Return the side of a tile for images of `size_px`: the first whole multiple of at least `MIN_TILE_PX`."""
    return size_px * max(1, -(-MIN_TILE_PX // size_px))


def enlarge(image: np.ndarray, side_px: int) -> np.ndarray:
    """Enlarge an image `[h, w, 3]` or map `[h, w]` by the largest whole factor that fits into `side_px`, centred on the background.

    Returns:
      The same type, `[side_px, side_px, ...]`.

    Raises:
      ValueError: it does not fit.
    """
    longest = max(image.shape[:2])
    if longest > side_px:
        raise ValueError(f"side_px: expected at least the {longest} px of the image, got {side_px}; take larger tiles")
    factor = side_px // longest
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    out = np.full((side_px, side_px, *image.shape[2:]), BACKGROUND if image.dtype == np.uint8 else 0, image.dtype)
    top, left = ((side_px - side) // 2 for side in large.shape[:2])
    out[top : top + large.shape[0], left : left + large.shape[1]] = large
    return out


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colour a map float `[h, w]` in [0, 1], dark to bright; returns uint8 `[h, w, 3]`."""
    grey = np.uint8(np.rint(255 * np.clip(values, 0.0, 1.0)))
    return cv2.cvtColor(cv2.applyColorMap(grey, HEAT_COLOURS), cv2.COLOR_BGR2RGB)


def overlay(image: np.ndarray, heat: np.ndarray, side_px: int, *, weight: float = 0.55) -> np.ndarray:
    """Lay heat float `[h, w]` in [0, 1], enlarged bilinearly, over the grey version of an image uint8 `[H, W, 3]`; `weight` is the heat's share."""
    grey = enlarge(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), side_px).astype(np.float32)[..., None]
    smooth = cv2.resize(np.asarray(heat, np.float32), (side_px, side_px), interpolation=cv2.INTER_LINEAR)
    return np.uint8(np.rint(weight * heat_colours(smooth) + (1 - weight) * grey))


def sheet(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> np.ndarray:
    """Put rows of (label, tile) on one sheet, each label above its tile; rows may differ in length.

    Args:
      rows: labels of printable ASCII, tiles of one side.

    Returns:
      uint8 `[H, W, 3]`.

    Raises:
      ValueError: no tile, or tiles of several sizes.
    """
    shapes = {tile.shape for row in rows for _, tile in row}
    if len(shapes) != 1:
        raise ValueError(f"rows: expected tiles of one shape, got {sorted(shapes)}")
    side = shapes.pop()[0]
    down, across = side + LABEL_PX + GAP_PX, side + GAP_PX
    height, width = len(rows) * down + GAP_PX, max(map(len, rows)) * across + GAP_PX
    out = np.full((height, width, 3), BACKGROUND, np.uint8)
    for i, row in enumerate(rows):
        for j, (label, tile) in enumerate(row):
            top, left = GAP_PX + i * down, GAP_PX + j * across
            cv2.putText(out, label, (left, top + BASELINE_PX), FONT, FONT_SCALE, (INK,) * 3, 1, cv2.LINE_AA)
            out[top + LABEL_PX : top + LABEL_PX + side, left : left + side] = tile
    return out


def png(image: np.ndarray) -> bytes:
    """Return an image uint8 `[H, W, 3]` (RGB) as the bytes of a PNG file."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
