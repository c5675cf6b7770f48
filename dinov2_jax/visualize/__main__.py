"""Draws what a model makes of images: `python -m dinov2_jax.visualize COMMAND IMAGES.. --model M`.

Commands: pca, attention, neighbors, matches. Writes one PNG or one self-contained HTML file, as
the suffix of --out says. Exit codes: 0 done; 2 wrong input, 130 interrupted: nothing was written.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence

import numpy as np

from dinov2_jax.arguments import Parser, positive
from dinov2_jax.commands import INTERRUPTED, WRONG_INPUT
from dinov2_jax.data.folder import FileSource
from dinov2_jax.data.image_ops import resize_center_crop
from dinov2_jax.data.records import Source
from dinov2_jax.features.extractor import FeatureExtractor
from dinov2_jax.model import Model, load
from dinov2_jax.preprocess import resize, resize_to_patches
from dinov2_jax.visualize import attention, matches, neighbors, pca, sheets
from dinov2_jax.visualize.patches import check_size, patch_grids
from dinov2_jax.visualize.photos import Photo, PhotoReader, open_images, spaced_rows

PATCHES_A_SIDE = 32  # of the short side: 448 px for patches of 14
BATCH_SIZE = 16


def make_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = Parser(
        prog="python -m dinov2_jax.visualize",
        description="Draws what a model makes of images, as one PNG or one HTML file.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, draw: Callable, *, about: str, tile_px: int, max_images: int = 0):
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(draw=draw)
        sub.add_argument(
            "images", nargs="+", help="image files, folders, .txt lists, tar shards or photos:"
        )
        sub.add_argument(
            "--model", required=True, help="a file, a run's workdir, or a name: dinov2_vits14"
        )
        sub.add_argument(
            "--out", default=f"{name}.png", help="a .png or .html file, replaced if it is there"
        )
        sub.add_argument("--tile-px", type=positive, default=tile_px, help="width of a picture")
        if max_images:
            more = "of more, evenly spaced ones are taken"
            sub.add_argument(
                "--max-images", type=positive, default=max_images, help=f"{max_images}; {more}"
            )
        return sub

    def see_patches(sub):
        sub.add_argument(
            "--size-px",
            type=positive,
            help=f"short side; default: {PATCHES_A_SIDE} patches. Sides become multiples of these",
        )
        sub.add_argument(
            "--square", action="store_true", help="the centred square, not the whole image"
        )
        sub.add_argument("--block", type=int, help="counted from 0; default: the last")

    def cut_background(sub, *, default: bool):
        sub.add_argument(
            "--foreground",
            action=argparse.BooleanOptionalAction,
            default=default,
            help="keep the patches on one side of the first principal component: the side that "
            "lies less on the images' borders",
        )
        sub.add_argument(
            "--threshold", type=float, default=0.0, help="of that component, in standard deviations"
        )
        sub.add_argument("--flip", action="store_true", help="keep the other side")

    sub = command("pca", draw_pca, about="Patch features as colours.", tile_px=224, max_images=16)
    see_patches(sub)
    cut_background(sub, default=True)
    sub = command("attention", draw_attention, about="Where CLS looks.", tile_px=160, max_images=8)
    see_patches(sub)
    sub = command(
        "neighbors", draw_neighbors, about="The most similar images.", tile_px=160, max_images=8
    )
    sub.add_argument("--gallery", help="where neighbours are looked for; default: all IMAGES")
    sub.add_argument("--num-neighbors", type=positive, default=6)
    sub.add_argument("--crop-size-px", type=positive, help="default: what the model records")
    sub = command("matches", draw_matches, about="Patches of two images.", tile_px=560)
    see_patches(sub)
    cut_background(sub, default=False)
    sub.add_argument("--num-matches", type=positive, default=40, help="the most similar ones")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; what is wrong with its input is on stderr. Returns the exit code."""
    try:
        flags = make_parser().parse_args(argv)
        target = sheets.checked_target(flags.out)
        source = open_images(flags.images)
        _refuse_to_replace(target, source)
        if getattr(flags, "gallery", None) and target.exists():
            _refuse_to_replace(target, open_images([flags.gallery]))
        sheet = flags.draw(flags, load(flags.model), source)
        sheets.save(sheet, target)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(f"wrote {target}: {sheet.title}, {target.stat().length / 1e3:.0f} kB")
    return 0


def draw_pca(flags: argparse.Namespace, model: Model, source: Source) -> sheets.Sheet:
    """Patch features as colours."""
    photos = _photos(flags, model, source, flags.max_images)
    grids = patch_grids(model, photos, block=flags.block)
    foreground = _foreground(flags, grids)
    colors = pca.pca_colors(grids, foreground=foreground)
    return pca.pca_sheet(
        photos,
        {"patch features": colors},
        has_background=foreground is None,
        tile_px=flags.tile_px,
    )


def draw_attention(flags: argparse.Namespace, model: Model, source: Source) -> sheets.Sheet:
    """Where CLS looks."""
    photos = _photos(flags, model, source, flags.max_images)
    maps = attention.attention_maps(model, photos, block=flags.block)
    block = model.spec.depth - 1 if flags.block is None else flags.block
    return attention.attention_sheet(photos, maps, block=block, tile_px=flags.tile_px)


def draw_neighbors(flags: argparse.Namespace, model: Model, source: Source) -> sheets.Sheet:
    """The most similar images."""
    sizes = model.sizes(resize_size_px=None, crop_size_px=flags.crop_size_px, crop=True)
    prepare = functools.partial(resize, **sizes)
    extract = FeatureExtractor(
        lambda params, images: {"cls": model.apply(params, images).cls},
        mean=model.spec.mean,
        std=model.spec.std,
        batch_size=BATCH_SIZE,
    )
    extract = functools.partial(extract, model.params)
    channels = len(model.spec.mean)

    def embed(images: Source, rows: Sequence[int]) -> neighbors.Embedded:
        reader = PhotoReader(images, prepare=prepare, num_channels=channels)
        embedded = neighbors.embed(extract, reader, rows)
        _say(reader, len(embedded.rows), flags.command)
        return embedded

    gallery_source = open_images([flags.gallery]) if flags.gallery else source
    gallery = embed(gallery_source, range(len(gallery_source)))
    if flags.gallery:
        queries = embed(source, spaced_rows(len(source), flags.max_images))
    else:
        picked = spaced_rows(len(gallery.rows), flags.max_images)
        queries = neighbors.Embedded(*(x[picked] for x in gallery))
    found = neighbors.neighbors_of(queries, gallery, num_neighbors=flags.num_neighbors)

    def read(images: Source, rows: Sequence[int]) -> dict[int, Photo]:
        return PhotoReader(images, prepare=prepare, num_channels=channels).read(rows)

    rows_of = [[(int(gallery.rows[i]), similarity) for i, similarity in x] for x in found]
    photos = read(gallery_source, sorted({row for pairs in rows_of for row, _ in pairs}))
    return neighbors.neighbors_sheet(
        list(read(source, queries.rows.tolist()).values()),
        [[(photos[row], similarity) for row, similarity in pairs] for pairs in rows_of],
        tile_px=flags.tile_px,
    )


def draw_matches(flags: argparse.Namespace, model: Model, source: Source) -> sheets.Sheet:
    """Patches of two images that correspond."""
    if len(source) != 2:
        raise ValueError(f"matches must have two images, not {len(source)}; name two files")
    photos = _photos(flags, model, source, 2)
    grids = patch_grids(model, photos, block=flags.block)
    found = matches.mutual_matches(
        *grids, foreground=_foreground(flags, grids), num_matches=flags.num_matches
    )
    return matches.matches_sheet(
        photos, found, patch_size=model.spec.patch_size, tile_px=flags.tile_px
    )


def _photos(
    flags: argparse.Namespace, model: Model, source: Source, max_images: int
) -> list[Photo]:
    """The images to draw, at the size that the network gets."""
    patch = model.spec.patch_size
    size_px = flags.size_px or PATCHES_A_SIDE * patch
    check_size(size_px, patch)
    if flags.square:
        size_px = max(round(size_px / patch), 1) * patch
        prepare = functools.partial(resize_center_crop, resize=size_px, crop=size_px)
    else:
        prepare = functools.partial(resize_to_patches, short_side_px=size_px, patch_size=patch)
    reader = PhotoReader(source, prepare=prepare, num_channels=len(model.spec.mean))
    photos = reader.sample(max_images)
    _say(reader, len(photos), flags.command, needed=2 if flags.command == "matches" else 1)
    return photos


def _foreground(flags: argparse.Namespace, grids) -> list[np.ndarray] | None:
    if not flags.foreground:
        return None
    return pca.foreground_masks(grids, threshold=flags.threshold, flip=flags.flip)


def _say(reader: PhotoReader, num_photos: int, command: str, *, needed: int = 1) -> None:
    """Says what was read and what was not; raises ValueError where that is too little."""
    if num_photos < needed:
        name, reason = reader.rejected[-1]
        count = "2 images" if needed == 2 else "1 image"
        raise ValueError(f"{command} must have {count} that can be read; {name}: {reason}")
    print(f"{num_photos} of {len(reader.source)} images from {reader.source.path}", flush=True)
    for name, reason in reader.rejected:
        print(f"left out {name}: {reason}", file=sys.stderr)


def _refuse_to_replace(target: os.PathLike, source: Source) -> None:
    """Raises ValueError where the picture would take the place of one of the images."""
    for part in getattr(source, "sources", [source]):
        if not isinstance(part, FileSource):
            continue  # in no file of its own; ArrayRecord would read each record for its name
        for name in map(part.name, range(len(part))):
            is_namesake = os.path.basename(name) == target.name
            if is_namesake and os.path.realpath(name) == os.path.realpath(target):
                raise ValueError(f"{target} is one of the images; choose another --out")


if __name__ == "__main__":
    sys.exit(main())
