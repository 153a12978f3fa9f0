"""Single images on the host: decoding, resizing, the two ImageNet crops.

Layout: uint8 [H, W, 3] in 0..255, RGB. NumPy and OpenCV only, for this runs in reader threads and spawned workers.
Left out: augmentation of sets held in memory, which is jitted (`memory`).
"""

import cv2
import numpy as np

cv2.setNumThreads(0)  # parallelism comes from readers and workers; OpenCV's own threads would compete with them

# Random resized crop of Szegedy et al. (2015) with the ranges that ImageNet training has used since.
_CROP_AREA_FRAC = (0.08, 1.0)
_CROP_LOG_ASPECT = (np.log(3 / 4), np.log(4 / 3))
_CROP_ATTEMPTS = 10
_EVAL_RESIZE_RATIO = 256 / 224  # short side before the centre crop, over the crop's side


def decode(encoded: bytes) -> np.ndarray:
    """Decode a JPEG or PNG; the EXIF orientation is ignored, as TFDS does.

    Args:
        encoded: the bytes of the file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: the bytes are no image.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    if image is None:
        raise ValueError(f"expected a JPEG or PNG image, got {len(encoded)} bytes that are none; prepare the data anew")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def resize(image: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Resize an image: pixel areas are averaged when it shrinks (no aliasing), bilinear when it grows.

    Args:
        image: uint8 [H, W, 3].
        height_px, width_px: size of the result.

    Returns:
        uint8 [height_px, width_px, 3].
    """
    shrinks = height_px * width_px < image.shape[0] * image.shape[1]
    # The exact variant gives the same bytes on every CPU; sets that are enlarged on loading must not depend on one.
    return cv2.resize(image, (width_px, height_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR_EXACT)


def random_resized_crop(rng: np.random.Generator, image: np.ndarray, size_px: int) -> np.ndarray:
    """Cut out a random part (8-100 % of the area, aspect 3/4-4/3), resize it, and mirror it half of the time.

    Args:
        rng: this example's generator (NumPy's, since no JAX runs in the readers).
        image: uint8 [H, W, 3].
        size_px: side of the result.

    Returns:
        uint8 [size_px, size_px, 3].

    Reference: Szegedy et al. 2015, section 6. After ten draws that do not fit, the largest centre square is taken.
    """
    top, left, rows, cols = _draw_window(rng, *image.shape[:2])
    crop = resize(image[top : top + rows, left : left + cols], size_px, size_px)
    return cv2.flip(crop, 1) if rng.random() < 0.5 else crop


def _draw_window(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * rng.uniform(*_CROP_AREA_FRAC)
        aspect = np.exp(rng.uniform(*_CROP_LOG_ASPECT))
        rows, cols = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 0 < rows <= height and 0 < cols <= width:
            return int(rng.integers(height - rows + 1)), int(rng.integers(width - cols + 1)), rows, cols
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def centre_crop(image: np.ndarray, size_px: int) -> np.ndarray:
    """Resize the short side to 256/224 of the result's, and cut out the centre.

    Args:
        image: uint8 [H, W, 3].
        size_px: side of the result.

    Returns:
        uint8 [size_px, size_px, 3].
    """
    factor = round(size_px * _EVAL_RESIZE_RATIO) / min(image.shape[:2])
    height, width = (round(side * factor) for side in image.shape[:2])
    top, left = (height - size_px) // 2, (width - size_px) // 2
    return np.ascontiguousarray(resize(image, height, width)[top : top + size_px, left : left + size_px])
