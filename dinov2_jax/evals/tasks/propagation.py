"""Label propagation on videos: `python -m dinov2_jax.evals propagation`.

Protocol: dino/eval_video_segmentation.py, scored as DAVIS 2017 (semi-supervised).
"""

import argparse
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from dinov2_jax import distributed
from dinov2_jax.arguments import count, positive, positive_number
from dinov2_jax.evals.davis import LAYOUT, VOID, Clip, open_davis, read_masks
from dinov2_jax.evals.mask_scores import boundary_accuracy, region_similarity, statistics
from dinov2_jax.evals.propagation import labels_from_mask, mask_from_labels, propagate
from dinov2_jax.evals.propagation_sheet import palette, propagation_sheet
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.task import Run, Task
from dinov2_jax.progress import Display
from dinov2_jax.storage import write_whole
from dinov2_jax.visualize.sheets import Sheet

SHEET_FILE = "propagation.png"
_PATCHES_AT_ONCE = 8_192  # in the network: attention's memory is what a frame costs


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add = parser.add_argument
    add("--clips", nargs="+", metavar="NAME", help="names, or a .txt of them from --data on")
    add("--short-side", type=positive, default=480, metavar="PX", help="of frames (default 480)")
    add(
        "--context",
        type=positive,
        default=7,
        metavar="N",
        help="frames before, beside the first, that labels come from (default 7)",
    )
    add(
        "--neighbors",
        type=positive,
        default=5,
        metavar="K",
        help="patches that labels come from (default 5)",
    )
    add(
        "--radius",
        type=count,
        default=12,
        metavar="N",
        help="of their square, in patches (default 12); 0: anywhere",
    )
    add(
        "--temperature",
        type=positive_number,
        default=0.1,
        metavar="X",
        help="of their weights (default 0.1)",
    )


def run(run: Run) -> Result:
    """Clip after clip; those that are done already are read."""
    flags = run.flags
    clips = open_davis(run.data, names=flags.clips)
    settings = dict(
        num_context=flags.context,
        num_neighbors=flags.neighbors,
        radius=flags.radius,
        temperature=flags.temperature,
    )
    key = _key(run, settings)
    mine = clips[jax.process_index() :: jax.process_count()]
    total = sum(len(clip.frames) for clip in mine)
    done = 0
    with Display(total=total, done=0, unit="frame", is_shown=run.is_primary) as display:
        for clip in mine:
            if run.flags.force or _read(run, clip, key) is None:
                frames = _masks(run, clip, settings)
                _score(run, clip, key, _counted(frames, display, done, clip))
            done += len(clip.frames)
            display.advance(done)
    distributed.meet()
    found = {clip.name: _read(run, clip, key) for clip in clips}
    objects = [scores for clip in found.values() for scores in clip]
    metrics = {
        f"{measure}_{name}": 100 * float(np.mean([x[measure][name] for x in objects]))
        for measure in ("j", "f")
        for name in ("mean", "recall", "decay")
    }
    metrics["j_and_f"] = (metrics["j_mean"] + metrics["f_mean"]) / 2
    run.draw(lambda: {SHEET_FILE: _sheet(run, clips, found)})
    return Result(
        metrics=metrics,
        headline=["j_and_f", "j_mean", "f_mean"],
        protocol={"short_side_px": flags.short_side, **settings},
        counts={
            "test": sum(len(clip.frames) for clip in clips),
            "clips": len(clips),
            "objects": len(objects),
            "scored": sum(len(clip.scored) for clip in clips),
        },
        details={"clips": found},
    )


def patch_features(run: Run, clip: Clip) -> Iterator[np.ndarray]:
    """Patch tokens `[h, w, d]` of frame after frame, computed in batches."""
    sizes = dict(resize_size_px=run.flags.short_side, crop=False)
    grid = run.model.grid(*run.model.preprocess(clip.frames[0], **sizes).shape[1:3])
    count = max(min(run.batch_size, _PATCHES_AT_ONCE // math.prod(grid)), 1)
    for start in range(0, len(clip.frames), count):
        paths = clip.frames[start : start + count]
        images = run.model.preprocess(paths, **sizes)
        padding = ((0, count - len(paths)), (0, 0), (0, 0), (0, 0))
        patches = np.asarray(run.model(np.pad(images, padding)).patches, np.float32)
        if not np.isfinite(patches).all():
            raise ValueError(
                f"patch features of clip {clip.name} must be finite; the model is not sound"
            )
        yield from patches[: len(paths)].reshape(len(paths), *grid, -1)


def _masks(run: Run, clip: Clip, settings: dict[str, Any]) -> Iterator[np.ndarray]:
    """Masks of all frames: the first as given, the others propagated."""
    truths, num_objects = read_masks(clip)
    first = np.where(truths[0] == VOID, 0, truths[0])
    yield first
    features = patch_features(run, clip)
    current = next(features)
    labels = labels_from_mask(first, num_objects=num_objects, grid=current.shape[:2])
    for shares in propagate(itertools.chain([current], features), labels, **settings):
        yield mask_from_labels(shares, patch_size=run.model.spec.patch_size, shape=first.shape)


def _score(run: Run, clip: Clip, key: str, masks: Iterator[np.ndarray]) -> None:
    """Writes the masks of a clip, and last the scores of each of its objects."""
    truths, num_objects = read_masks(clip)
    _folder(run, clip).mkdir(parents=True, exist_ok=True)
    scores = {"j": [], "f": []}  # [frames][objects]
    files = zip(_mask_paths(run, clip), masks, truths, strict=True)
    for i, (path, mask, truth) in enumerate(files):
        image = Image.fromarray(mask)
        image.putpalette(palette())
        image.save(path)
        if i in clip.scored:
            numbers = range(1, num_objects + 1)
            pairs = [(mask == x, truth == x, truth == VOID) for x in numbers]
            scores["j"].append([region_similarity(*pair) for pair in pairs])
            scores["f"].append([boundary_accuracy(*pair) for pair in pairs])
    found = [
        {measure: statistics(np.array(x)[:, i])._asdict() for measure, x in scores.items()}
        for i in range(num_objects)
    ]
    text = json.dumps({"key": key, "objects": found}, indent=2) + "\n"
    write_whole(epath.Path(_scores_path(run, clip)), text)


def _read(run: Run, clip: Clip, key: str) -> list[dict[str, Any]] | None:
    """What `_score` wrote of the same request; None where it did not."""
    try:
        found = json.loads(_scores_path(run, clip).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found["objects"] if found["key"] == key else None


def _scores_path(run: Run, clip: Clip) -> pathlib.Path:
    return run.out / "masks" / f"{clip.name}.json"


def _mask_paths(run: Run, clip: Clip) -> list[pathlib.Path]:
    return [_folder(run, clip) / f"{frame.stem}.png" for frame in clip.frames]


def _folder(run: Run, clip: Clip) -> pathlib.Path:
    return run.out / "masks" / clip.name


def _key(run: Run, settings: dict[str, Any]) -> str:
    """Of all that decides the masks."""
    model = run.model
    parts = [model.weights_sha256, repr(model.spec), model.dtype.name, str(run.data)]
    text = json.dumps([*parts, run.flags.short_side, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _counted(
    masks: Iterator[np.ndarray], display: Display, done: int, clip: Clip
) -> Iterator[np.ndarray]:
    for i, mask in enumerate(masks, 1):
        display.show(done + i, clip.name)
        yield mask


def _sheet(run: Run, clips: list[Clip], found: dict[str, Any]) -> Sheet:
    notes = {
        name: f"{name}: J "
        + ", ".join(f"{100 * x['j']['mean']:.1f}" for x in objects)
        + "; F "
        + ", ".join(f"{100 * x['f']['mean']:.1f}" for x in objects)
        for name, objects in found.items()
    }
    return propagation_sheet(
        clips,
        lambda clip: [np.asarray(Image.open(path)) for path in _mask_paths(run, clip)],
        lambda clip: read_masks(clip)[0],
        notes,
    )


TASK = Task(
    name="propagation",
    summary="masks of a video's first frame carried on by patch features; J and F of DAVIS",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
