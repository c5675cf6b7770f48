"""Builds what reads images: the training source and its batches, the in-run evaluation, pictures.

Part of the door, like `startup.py`: it reads the configuration so that the rooms need not.
"""

import contextlib
import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from einops import rearrange
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dinov2_jax.augment import normalize
from dinov2_jax.data.batch import Batch
from dinov2_jax.data.image_ops import decode, resize_center_crop
from dinov2_jax.data.multicrop import MultiCrop
from dinov2_jax.data.pipeline import Batches, make_batches
from dinov2_jax.data.records import BadImage, DataError, Source
from dinov2_jax.data.sources import open_mixture, open_source
from dinov2_jax.distributed import check_same, is_primary, together
from dinov2_jax.evals.in_run import InRunEvaluation, crop_identity, labelled_knn
from dinov2_jax.exchange import of_primary
from dinov2_jax.faults import PassingFault
from dinov2_jax.sharding import host_groups
from dinov2_jax.startup import Trainer, as_config_error, build_augment
from dinov2_jax.startup_heads import build_masks
from dinov2_jax.visualize.crops import crops_sheet
from dinov2_jax.visualize.pca import pca_colors, pca_sheet
from dinov2_jax.visualize.photos import PhotoReader
from dinov2_jax.visualize.sheets import save
from dinov2_jax.workdir import BadImages


@contextlib.contextmanager
def of_key(key: str) -> Iterator[None]:
    """Names the key whose source cannot be opened: what opens it knows no keys."""
    try:
        yield
    except (DataError, PassingFault) as error:
        raise type(error)(f"{key}: {error}") from error


def open_data(config) -> Source:
    """The source of training images.

    Raises:
      DataError: there is nothing usable at data.path or in data.mixture.
      PassingFault: its store cannot be reached now.
    """
    if config.data.mixture:
        with of_key("data.mixture"):
            return open_mixture(tuple(map(tuple, config.data.mixture)))
    with of_key("data.path"):
        return open_source(config.data.path)


def open_batches(config, source: Source, mesh: Mesh, *, start_step: int) -> Batches:
    """This host's part of the batches from a step on."""
    crops, augment = config.crops, config.augment
    multicrop = MultiCrop(
        global_crop_size_px=crops.global_crop_size_px,
        global_crop_scale=crops.global_crop_scale,
        local_crop_size_px=crops.local_crop_size_px,
        local_crop_scale=crops.local_crop_scale,
        num_local_crops=crops.num_local_crops,
        aspect_ratio=crops.aspect_ratio,
        mode=augment.mode,
        blur_probability=augment.blur_probability,
        flip_probability=augment.flip_probability,
        jitter_probability=augment.jitter_probability,
        brightness=augment.brightness,
        contrast=augment.contrast,
        saturation=augment.saturation,
        hue=augment.hue,
        grayscale_probability=augment.grayscale_probability,
        blur_sigma_px=augment.blur_sigma_px,
        solarize_probability=augment.solarize_probability,
    )
    return make_batches(
        source,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        group_size=config.group_size,
        multicrop=multicrop,
        masks=build_masks(config),
        start_step=start_step,
        total_steps=config.total_steps,
        num_channels=config.data.in_channels,
        max_image_pixels=config.data.max_image_pixels,
        num_workers=config.loader.num_workers,
        num_threads=config.loader.num_threads,
        prefetch_batches=config.loader.prefetch_batches,
        groups=host_groups(mesh, num_groups=config.global_batch_size // config.group_size),
    )


def build_bad_images(config, source: Source, workdir: epath.Path, *, is_writer: bool) -> BadImages:
    """The list of bad images, with those that the scan rejected."""

    def explain(record: int) -> tuple[str, str]:
        reading = {
            "num_channels": config.data.in_channels,
            "max_pixels": config.data.max_image_pixels,
        }
        try:
            decode(source[record].image, **reading)
        except BadImage as error:
            return source.name(record), str(error)
        return source.name(record), "could not be read once, and could later"

    return BadImages(
        workdir,
        rejected=source.rejected,
        num_images=len(source),
        max_fraction=config.data.max_bad_fraction,
        explain=explain,
        is_writer=is_writer,
    )


def evaluation_name(config) -> str:
    """<set> in the names of the metrics."""
    if config.eval.name:
        return config.eval.name
    stem = pathlib.PurePath(config.eval.query_path).name
    return re.sub(r"\W+", "_", stem).strip("_") or "eval"


def build_evaluation(config, trainer: Trainer) -> InRunEvaluation | None:
    """The in-run kNN, or None.

    Raises:
      ConfigError: its sources do not allow what is asked.
      DataError: there is nothing usable at eval.bank_path or eval.query_path.
      PassingFault: their store cannot be reached now.
    """
    settings = config.eval
    if settings.kind == "none":
        return None
    with of_key("eval.bank_path"):
        bank = open_source(settings.bank_path)
    with of_key("eval.query_path"):
        queries = open_source(settings.query_path)
    common = {
        "name": evaluation_name(config),
        "bank": bank,
        "queries": queries,
        "apply": lambda params, images: trainer.network.backbone.apply({"params": params}, images),
        "mean": config.augment.mean,
        "std": config.augment.std,
        "num_neighbors": settings.num_neighbors,
        "temperature": settings.temperature,
        "crop_size_px": settings.crop_size_px,
        "batch_size": settings.batch_size,
        "max_images": settings.max_images,
        "num_channels": config.data.in_channels,
        "max_image_pixels": config.data.max_image_pixels,
        "mesh": trainer.mesh,
    }
    with as_config_error():
        if settings.kind == "knn":
            return labelled_knn(
                **common,
                resize_size_px=settings.resize_size_px,
                num_threads=config.loader.num_threads,
            )
        return crop_identity(
            **common,
            crops_per_image=settings.crops_per_image,
            crop_scale=config.crops.local_crop_scale,
            aspect_ratio=config.crops.aspect_ratio,
            brightness=config.augment.brightness,
            contrast=config.augment.contrast,
            saturation=config.augment.saturation,
            hue=config.augment.hue,
        )


def evaluate_with_baselines(
    evaluation: InRunEvaluation | None,
) -> Callable[[Any, int], dict[str, float]] | None:
    """(teacher, step) -> accuracies, alike on all hosts; at step 0 with the baselines beside."""
    if evaluation is None:
        return None

    def evaluate(teacher: Any, step: int) -> dict[str, float]:
        if step > 0:
            return of_primary(evaluation(teacher["backbone"]))
        values = of_primary(evaluation.baselines(teacher["backbone"]))
        prefix = f"knn/{evaluation.name}/"
        trained = {
            f"{prefix}{kind}": values[f"{prefix}random_init_{kind}"]
            for kind in ("cls", "mean_patch")
        }
        return trained | values

    return evaluate


def draw_crops(config, batch: Batch, path: epath.Path) -> None:
    """Writes crops.png: what the network sees. One process may do it alone."""
    # The run's mesh has devices of all processes, which must run whatever it runs.
    with jax.set_mesh(Mesh(np.array(jax.local_devices()[:1]), ("device",))):
        sheet = crops_sheet(
            batch,
            augment=build_augment(config),
            mean=config.augment.mean,
            std=config.augment.std,
            patch_size=config.model.patch_size,
        )
    save(sheet, path)


def draw_patches(config, trainer: Trainer, source: Source, teacher: Any, path: epath.Path) -> None:
    """Writes pca.png: photos beside their patch features, before the training and after it."""
    # Some 24 patches a side, whatever the training resolution: fewer show little.
    size = max(config.crops.global_crop_size_px, 24 * config.model.patch_size)
    reader = PhotoReader(
        source,
        prepare=functools.partial(resize_center_crop, resize=size, crop=size),
        num_channels=config.data.in_channels,
        max_image_pixels=config.data.max_image_pixels,
    )
    # Else a host that cannot read one, or fails, would leave the others waiting for its patches.
    photos = together(lambda: reader.sample(12))
    check_same("set of photos to draw", "\n".join(photo.name for photo in photos))

    # Replicated, so that every process can read it.
    @functools.partial(jax.jit, out_shardings=NamedSharding(trainer.mesh, PartitionSpec()))
    def patches(params, pixels: jax.Array) -> jax.Array:
        image = normalize(pixels[None], mean=config.augment.mean, std=config.augment.std)
        features = trainer.network.backbone.apply({"params": params}, image).patches[0]
        return rearrange(features, "(h w) d -> h w d", h=size // config.model.patch_size)

    columns = {}
    for title, params in (
        ("before training", trainer.init_backbone()),
        ("trained", teacher["backbone"]),
    ):
        grids = [np.asarray(patches(params, photo.pixels), np.float32) for photo in photos]
        columns[title] = pca_colors(grids)
    if is_primary():
        save(pca_sheet(photos, columns), path)
