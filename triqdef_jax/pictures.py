"""Draw what trained runs see: `python -m triqdef_jax.pictures --workdirs=runs/digits[,runs/OTHER] [--images=4] [--layer=stage3]`.

The patches of the run's pool; Grad-CAM of the first test images under every bit-width, clean and patched; the maps that FDP and GPDP
compare (features, input gradients, their soft edges) under every bit-width. Writes PNG files to `<workdir>/results/pictures/` and
`<workdir>/results/pictures.json`, whose file names start in `results/`. Examples, not evidence: figures stand in the other results.
"""

import importlib.metadata
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags

from triqdef_jax import data as data_lib
from triqdef_jax import drawing, entry, files, loop, perceptual, probes, runs, sources
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.results import PACKAGES

FILE, FOLDER = "pictures.json", "pictures"
PATCHES_PER_ROW = 8
MAPS_OF_IMAGES = 2  # test images whose maps are drawn, each on a sheet of its own


class Picture(NamedTuple):
    """One sheet uint8 `[H, W, 3]`, its file name without ending, title, caption, and the group it is shown with."""

    name: str
    group: str
    title: str
    caption: str
    image: np.ndarray


def patch_sheet(pool, *, name: str, title: str, num_shown: int = 32) -> Picture:
    """Draw the first patches of a pool, labelled with their target classes; grey is canvas outside the patch."""
    tiles = []
    for values, mask, target in zip(pool.values[:num_shown], pool.masks, pool.target, strict=False):
        shown = np.uint8(np.rint(255 * np.where(mask[..., None] > 0, values, 0.5)))
        label = "any class" if target < 0 else f"class {target}"
        tiles.append((label, drawing.enlarge(shown, drawing.tile_px(shown.shape[0]))))
    rows = [tiles[start : start + PATCHES_PER_ROW] for start in range(0, len(tiles), PATCHES_PER_ROW)]
    sizes = "/".join(map(str, sorted(set(pool.size_px.tolist()))))
    caption = f"{len(tiles)} of {len(pool.values)} patches of {sizes} px and the class that each was made for."
    return Picture(name, "patches", title, caption, drawing.sheet(rows))


def cam_sheet(
    networks: Sequence[probes.OneBit], images: np.ndarray, labels: np.ndarray, *, layer: str, image_set: str
) -> Picture:
    """Draw Grad-CAM of a layer for the predicted class, a row per image uint8 `[H, W, 3]`, a column per bit-width."""
    side = drawing.tile_px(images.shape[1])
    cams = [probes.grad_cam(network, images, layer=layer) for network in networks]
    heats, classes = (np.stack([np.asarray(cam[place]) for cam in cams]) for place in range(2))
    rows = []
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        row = [(f"label {label}", drawing.enlarge(image, side))]
        for k, network in enumerate(networks):
            row.append((f"{network.bits} bit: {classes[k, n]}", drawing.overlay(image, heats[k, n], side)))
        rows.append(row)
    caption = (
        f"The first {len(images)} test images, {image_set}; then, for each bit-width, the class it predicts and where the features of {layer} "
        "speak for that class (bright), on the scale of each map's own maximum."
    )
    return Picture(f"grad-cam-{image_set}", "grad_cam", f"Grad-CAM, {image_set} images", caption, drawing.sheet(rows))


def map_sheets(
    networks: Sequence[probes.OneBit], images: np.ndarray, labels: np.ndarray, *, layers: Sequence[str]
) -> list[Picture]:
    """Draw the maps of patched images uint8 `[B, H, W, 3]` that FDP (`layers`) and GPDP compare, a sheet per image, a column per bit-width."""
    found = [probes.probe(network, images, labels).maps for network in networks]
    rows_of: list[list] = [[[("image", drawing.enlarge(image, drawing.tile_px(len(image))))]] for image in images]
    for name in (*layers, INPUT_GRADIENT):
        maps = perceptual.channel_map(jnp.stack([of_network[name] for of_network in found]))
        edges = perceptual.soft_edges(perceptual.sobel_magnitude(maps))
        for words, values in (("gradient" if name == INPUT_GRADIENT else name, maps), ("edges", edges)):
            titles = [f"{words} {network.bits}" for network in networks]
            for n, rows in enumerate(rows_of):
                rows.append([(title, _map_tile(values[k, n], images.shape[1])) for k, title in enumerate(titles)])
    return [_map_picture(n, rows, labels[n], layers) for n, rows in enumerate(rows_of)]


def _map_picture(number, rows, label, layers):
    caption = (
        f"Test image {number} with a held-out patch, label {label}. Below, for each bit-width: mean magnitude over channels and its soft edges, "
        f"of {', '.join(layers) or 'no features'} (FDP) and of the input gradient (GPDP), each on the scale of its own maximum."
    )
    title = f"Maps that the penalties compare, test image {number}"
    return Picture(f"maps-{number}", "maps", title, caption, drawing.sheet(rows))


def _map_tile(values, image_size_px):
    return drawing.enlarge(drawing.heat_colours(np.asarray(values)), drawing.tile_px(image_size_px))


def save(workdir: str | pathlib.Path, pictures: Sequence[Picture], about: dict) -> pathlib.Path:
    """Write PNG files and their list; `about` joins the list's record. Returns the path of the list."""
    folder = pathlib.Path(workdir) / "results"
    listed = []
    for picture in pictures:
        file = f"{FOLDER}/{picture.name}.png"
        with files.atomic_open(folder / file) as out:
            out.write(drawing.png(picture.image))
        listed.append({"file": file, "title": picture.title, "caption": picture.caption, "group": picture.group})
    path = folder / FILE
    files.atomic_write_json(path, {"kind": "pictures", "name": pathlib.Path(workdir).name, **about, "pictures": listed})
    return path


def check(trained, *, num_images: int, layer: str) -> str:
    """Return the name of the layer that Grad-CAM explains, '' standing for the last stage; ValueError for no such layer or no image."""
    stages = trained.network.module.plan.stages
    if (layer or stages[-1]) not in stages or num_images < 1:
        raise ValueError(f"expected a layer of {', '.join(stages)} and 1 image or more, got {layer!r} and {num_images}")
    return layer or stages[-1]


def draw(trained, data, pool, *, num_images: int, layer: str = "") -> list[Picture]:
    """Draw all pictures of a run.

    Args:
      trained: `runs.Trained`. data: its data set. pool: its whole `PatchPool`. num_images: first so many test images.
      layer: feature layer that Grad-CAM explains; '' for the last stage.

    Raises:
      ValueError: as `check`.
    """
    config, layer = trained.config, check(trained, num_images=num_images, layer=layer)
    images, labels = probes.first_test_images(data, num_images)
    training, held_out = pool.split()
    patched = probes.patched(held_out, images, config)
    networks = [probes.one_bit(trained, b) for b in config.quant.bits]
    return [
        patch_sheet(training, name="patches-training", title="Patches of the pool that training draws from"),
        patch_sheet(held_out, name="patches-held-out", title="Held-out patches of the pool"),
        cam_sheet(networks, images, labels, layer=layer, image_set="clean"),
        cam_sheet(networks, patched, labels, layer=layer, image_set="patched"),
        *map_sheets(networks, patched, labels, layers=config.loss.feature_layers)[:MAPS_OF_IMAGES],
    ]


def main(argv):
    del argv
    options = flags.FLAGS
    if not options.workdirs:
        raise entry.UserError("--workdirs=DIR[,DIR] is needed: the directories of trained runs")
    try:
        for workdir in options.workdirs:
            with entry.user_errors():
                trained = runs.load_trained(workdir)
                check(trained, num_images=options.images, layer=options.layer)
                data = data_lib.load(trained.config.data)
                pool = sources.train_pool(trained.config, data)
            pictures = draw(trained, data, pool, num_images=options.images, layer=options.layer)
            about = {
                "config_hash": files.config_hash(trained.config),
                "step": trained.step,
                "patches_digest": pool.digest,
                "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            }
            with entry.user_errors():
                path = save(workdir, pictures, about)
            print(f"{len(pictures)} pictures listed in {path}")
    except loop.PreemptedError as error:  # while a source network was trained for the patches
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Directories of trained runs.")
    flags.DEFINE_integer("images", 4, "First so many test images are drawn.")
    flags.DEFINE_string("layer", "", "Feature layer that Grad-CAM explains; the last stage if empty.")
    entry.run_program(main)
