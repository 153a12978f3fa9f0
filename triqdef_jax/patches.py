"""Adversarial patches as arrays: masks, placements, pasting.

Images are float32 [B, H, W, C] in [0, 1]; a patch is float32 [S, S, C] in [0, 1] on a square canvas with a mask [S, S]
in {0, 1} that says which canvas pixels belong to it, so one static S holds patches of many sizes. Positions are pixel
indices: pixel (row, col) sits at exactly (row, col). How patches are made, and their files, live elsewhere.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

SHAPES = ("square", "circle")
LOCATIONS = ("random", "center", "corner", "fixed")
MAX_DENOMINATOR = 16  # of the share of patched images: larger groups than 16 images would tie the batch size down


class Placement(NamedTuple):
    """Where patches go: the image position of the centre of the mask's bounding box, then rotation and scale about it.

    Attributes:
      center_row: float32 [B], pixels; half-integers for even sizes.
      center_col: float32 [B], pixels.
      angle_deg: float32 [B], degrees, positive turns counter-clockwise as displayed.
      scale: float32 [B], side in the image over side on the canvas, > 0.
    """

    center_row: jax.Array
    center_col: jax.Array
    angle_deg: jax.Array
    scale: jax.Array


def make_mask(size_px: int, canvas_px: int, shape: str = "square") -> np.ndarray:
    """Draw the mask of one patch, centred in its canvas (half a pixel to the upper left when that is not possible).

    Args:
      size_px: side or diameter of the patch in pixels, 1 to `canvas_px`.
      canvas_px: side S of the canvas in pixels.
      shape: 'square', or 'circle' (pixels whose centre lies within size_px / 2 of the patch's centre).

    Returns:
      float32 [S, S] in {0, 1}, a NumPy array.

    Raises:
      ValueError: for an unknown shape or a size outside 1..canvas_px.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {SHAPES}, got {shape!r}")
    if not 1 <= size_px <= canvas_px:
        raise ValueError(f"size_px: expected 1 to canvas_px={canvas_px}, got {size_px}; enlarge the canvas")
    offset = np.arange(canvas_px) - (canvas_px - size_px) // 2 - (size_px - 1) / 2
    distance = np.abs(offset)
    if shape == "square":
        inside = np.maximum(distance[:, None], distance[None, :]) < size_px / 2
    else:
        inside = np.hypot(distance[:, None], distance[None, :]) <= size_px / 2
    return inside.astype(np.float32)


def sample_placements(
    key: jax.Array,
    num: int,
    *,
    image_size_px: int,
    size_px,
    rotation_deg: float = 0.0,
    scale_range: tuple[float, float] = (1.0, 1.0),
    location: str = "random",
    location_key: jax.Array | None = None,
) -> Placement:
    """Draw placements such that the patch, scaled and not yet rotated, lies inside a square image.

    Without jitter (no rotation, scale 1) the upper left corner is a whole pixel, uniform over all that fit; with jitter
    the centre is continuous. Rotation may push the corners of a patch at the border out of the image; they are cut off.

    Args:
      key: PRNG key.
      num: number of placements B.
      image_size_px: side of the image in pixels.
      size_px: side of the patch in pixels: an int, or an integer array [] or [num], traced or not.
      rotation_deg: angles are uniform in [-rotation_deg, rotation_deg] degrees.
      scale_range: scales are uniform in (low, high).
      location: 'random'; 'center'; 'corner' (one of the four); 'fixed' (one random place for all `num`).
      location_key: draws the place instead of `key`; pass the same one again to keep places while the jitter varies.

    Returns:
      `Placement` of float32 [num] arrays.

    Raises:
      ValueError: for an unknown location, a bad range, or a known size that does not fit into the image.
    """
    _check_sampling(image_size_px, size_px, rotation_deg, scale_range, location)
    share, jitter = jnp.split(jax.random.uniform(key, (4, num)), 2)  # one draw: each costs 0.2 s to compile on CPU
    if location_key is not None:
        share = jax.random.uniform(location_key, (2, num))
    angle = rotation_deg * (2.0 * jitter[0] - 1.0)
    scale = scale_range[0] + (scale_range[1] - scale_range[0]) * jitter[1]
    size = jnp.broadcast_to(jnp.asarray(size_px, jnp.float32), (num,))
    share = _location_share(share, location)
    is_whole_px = rotation_deg == 0.0 and tuple(scale_range) == (1.0, 1.0)
    room = image_size_px - size * scale  # pixels the upper left corner can move
    if is_whole_px and location == "center":
        corner = jnp.broadcast_to(jnp.floor(room / 2), (2, num))
    elif is_whole_px:
        corner = jnp.minimum(jnp.floor(share * (room + 1.0)), room)  # share * (room + 1) can round up to room + 1
    else:
        corner = share * room
    center = corner + (size * scale - 1.0) / 2
    return Placement(center[0], center[1], angle, scale)


def apply_patches(images: jax.Array, patches: jax.Array, masks: jax.Array, placements: Placement) -> jax.Array:
    """Paste one patch into each image, ``x (1 - M) + P M`` with P and M warped to the image.

    Every image pixel looks up its place on the canvas (inverse warp). M is the mask at the nearest canvas pixel, hence
    hard. P is bilinear over those of the four neighbours that the mask contains, weights renormalised, so what lies on
    the canvas outside the mask never shows. With angle 0, scale 1 and whole-pixel corners this is a bit-exact paste.

    Args:
      images: float32 [B, H, W, C] in [0, 1].
      patches: float32 [B, S, S, C] in [0, 1], finite everywhere.
      masks: [B, S, S] in {0, 1}; the placement's centre is the centre of the mask's bounding box.
      placements: `Placement` of [B] arrays.

    Returns:
      float32 [B, H, W, C] in [0, 1].

    Raises:
      ValueError: when shapes do not agree.

    Gradient: to `images` outside the pasted pixels, to `patches` through the bilinear weights inside the mask; masks
    and placements get none.
    """
    _check_paste(images, patches, masks, placements)
    masks, placements = jax.lax.stop_gradient((masks.astype(patches.dtype), placements))
    warp = jax.vmap(_warp_one, in_axes=(0, 0, 0, None))
    values, inside = warp(patches, masks, placements, images.shape[1:3])
    return jnp.where(inside[..., None], values.astype(images.dtype), images)


def select_patched(images: jax.Array, patched_frac: float) -> jax.Array:
    """Take the rows that get a patch: the first p of each group of q, for the share p / q.

    Groups are neighbours, so a batch sharded over devices keeps its rows where they are.

    Args:
      images: [B, ...], images or anything that runs along with them, such as labels.
      patched_frac: share of the batch in (0, 1], a fraction with a denominator of at most 16.

    Returns:
      [B p / q, ...].

    Raises:
      ValueError: when the share is no such fraction or B is not a multiple of q.
    """
    share = Fraction(patched_frac).limit_denominator(MAX_DENOMINATOR)
    if not 0.0 < patched_frac <= 1.0 or abs(float(share) - patched_frac) > 1e-3:  # 0.333 is meant as 1/3
        raise ValueError(f"patched_frac: expected p/q in (0, 1] with q up to {MAX_DENOMINATOR}, got {patched_frac}")
    batch, group = images.shape[0], share.denominator
    if batch % group:
        raise ValueError(f"images: a share of {share} needs a batch divisible by {group}, got {batch}")
    grouped = images.reshape(batch // group, group, *images.shape[1:])
    return grouped[:, : share.numerator].reshape(-1, *images.shape[1:])


def round_to_uint8(values: jax.Array) -> jax.Array:
    """Round to the stored pixel grid: ``clip(round(255 v), 0, 255)``, half to even; divide by 255 to come back.

    Args:
      values: float array in [0, 1].

    Returns:
      uint8 array of the same shape.
    """
    return jnp.clip(jnp.round(255.0 * values), 0.0, 255.0).astype(jnp.uint8)


def _location_share(uniform, location):
    """Turn uniform draws [2, num] into the upper left corner as a share of the room it has, in [0, 1]."""
    if location == "center":
        return jnp.full_like(uniform, 0.5)
    if location == "corner":
        return jnp.round(uniform)
    if location == "fixed":
        return jnp.broadcast_to(uniform[:, :1], uniform.shape)
    return uniform


def _warp_one(patch, mask, placement, image_shape):
    """Return values [H, W, C] and the hard mask, bool [H, W], of one patch in image coordinates."""
    rows, cols = _canvas_coordinates(mask, placement, image_shape)
    size = mask.shape[0]
    canvas = jnp.concatenate([patch * mask[..., None], mask[..., None]], axis=-1)
    canvas = jnp.pad(canvas, ((1, 1), (1, 1), (0, 0)))  # canvas index -1 and S: nothing there
    rows, cols = jnp.clip(rows, -1.0, size), jnp.clip(cols, -1.0, size)
    low_row, low_col = jnp.minimum(jnp.floor(rows), size - 1.0), jnp.minimum(jnp.floor(cols), size - 1.0)
    row_frac, col_frac = (rows - low_row)[..., None], (cols - low_col)[..., None]
    row, col = low_row.astype(jnp.int32) + 1, low_col.astype(jnp.int32) + 1
    taps = [[canvas.at[row + i, col + j].get(mode="promise_in_bounds") for j in (0, 1)] for i in (0, 1)]
    upper = (1.0 - col_frac) * taps[0][0] + col_frac * taps[0][1]
    lower = (1.0 - col_frac) * taps[1][0] + col_frac * taps[1][1]
    blend = (1.0 - row_frac) * upper + row_frac * lower
    near = jnp.where(
        row_frac < 0.5,
        jnp.where(col_frac < 0.5, taps[0][0], taps[0][1]),
        jnp.where(col_frac < 0.5, taps[1][0], taps[1][1]),
    )
    inside = jax.lax.stop_gradient(near[..., -1]) > 0.5
    weight = jnp.where(inside, jax.lax.stop_gradient(blend[..., -1]), 1.0)  # at least 1/4 inside: the nearest tap's
    return blend[..., :-1] / weight[..., None], inside


def _canvas_coordinates(mask, placement, image_shape):
    """Return the canvas position of every image pixel, two float32 [H, W]."""
    down = jnp.arange(image_shape[0], dtype=jnp.float32)[:, None] - placement.center_row
    right = jnp.arange(image_shape[1], dtype=jnp.float32)[None, :] - placement.center_col
    angle = jnp.deg2rad(placement.angle_deg)
    cos, sin = jnp.cos(angle) / placement.scale, jnp.sin(angle) / placement.scale
    rows = down * cos + right * sin + _middle(mask.max(axis=1))
    cols = right * cos - down * sin + _middle(mask.max(axis=0))
    return rows, cols


def _middle(is_used):
    """Return the middle between the first and the last one of a 0/1 vector, a multiple of 1/2."""
    last = is_used.size - 1 - jnp.argmax(is_used[::-1])
    return (jnp.argmax(is_used) + last) / 2


def _check_sampling(image_size_px, size_px, rotation_deg, scale_range, location):
    if location not in LOCATIONS:
        raise ValueError(f"location: expected one of {LOCATIONS}, got {location!r}")
    if not 0.0 < scale_range[0] <= scale_range[1]:
        raise ValueError(f"scale_range: expected 0 < low <= high, got {scale_range}")
    if rotation_deg < 0.0:
        raise ValueError(f"rotation_deg: expected an angle >= 0, got {rotation_deg}")
    if isinstance(size_px, jax.core.Tracer):
        return  # a traced size was checked where it was a number
    if np.min(size_px) < 1 or np.max(size_px) * scale_range[1] > image_size_px:
        raise ValueError(
            f"size_px: expected 1 or more and, times the scale {scale_range[1]}, at most the image's "
            f"{image_size_px} px, got {np.asarray(size_px).tolist()}"
        )


def _check_paste(images, patches, masks, placements):
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images: expected float [B, H, W, C], got {images.dtype} {images.shape}; divide uint8 by 255")
    batch, canvas = images.shape[0], patches.shape[1] if patches.ndim == 4 else 0
    if patches.shape != (batch, canvas, canvas, images.shape[3]):
        raise ValueError(f"patches: expected [B, S, S, C] with B={batch}, C={images.shape[3]}, got {patches.shape}")
    if masks.shape != (batch, canvas, canvas):
        raise ValueError(f"masks: expected [B, S, S] = {(batch, canvas, canvas)}, got {masks.shape}")
    shapes = {jnp.shape(field) for field in placements}
    if shapes != {(batch,)}:
        raise ValueError(f"placements: expected four arrays of shape {(batch,)}, got {sorted(shapes)}")
