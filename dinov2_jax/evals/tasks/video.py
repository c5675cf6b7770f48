"""Video classification by a linear probe: `python -m dinov2_jax.evals video`.

Protocol: section 7.2 of the paper: 8 evenly spaced frames of each video, their mean (UCF-101,
Kinetics) or their concatenation (Something-Something), one view, the frozen probe's grid.
"""

import argparse

import numpy as np

from dinov2_jax.arguments import positive
from dinov2_jax.evals.classes import report_classes
from dinov2_jax.evals.pooled_frames import POOLINGS, pool_frames
from dinov2_jax.evals.probe_fit import add_probe_flags, fit_probe, probe_what
from dinov2_jax.evals.results import Result
from dinov2_jax.evals.scores import top_classes, top_k_accuracy
from dinov2_jax.evals.splits import add_size_flags, crop_sizes, image_sizes
from dinov2_jax.evals.task import Run, Task
from dinov2_jax.evals.video_frames import VideoFrames
from dinov2_jax.evals.video_sets import LAYOUT, VideoSplit, open_videos


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    add = parser.add_argument
    add("--frames", type=positive, default=8, metavar="N", help="of each video (default 8)")
    add(
        "--pooling",
        choices=POOLINGS,
        help="of their features; default: concat for Something-Something, else mean",
    )
    add_size_flags(parser)
    add("--ucf-split", type=int, choices=(1, 2, 3), default=1, help="of UCF-101's three")
    add_probe_flags(parser)


def run(run: Run) -> Result:
    """The grid on pooled frames, the best classifier on the test split."""
    flags = run.flags
    videos = open_videos(run.data, ucf_split=flags.ucf_split)
    pooling = flags.pooling or ("concat" if videos.kind == "ssv2" else "mean")
    what = probe_what(run)

    def features(split: VideoSplit, name: str):
        if split.num_missing:
            run.say(f"{name}: {split.num_missing:,} videos of the list are not there: left out")
        path = f"{run.data}, {name}, {flags.frames} frames"
        source = VideoFrames(split.paths, frames_per_video=flags.frames, path=path)
        frames = run.features(source, what=what, **crop_sizes(flags))
        return pool_frames(frames, split.labels, frames_per_video=flags.frames, pooling=pooling)

    train, train_labels = features(videos.train, "train")
    test, test_labels = features(videos.test, "test")
    classifier, settings, grid = fit_probe(
        run,
        train=train,
        train_labels=train_labels,
        val=test,
        val_labels=test_labels,
        num_classes=len(videos.label_names),
        what={"index": dict(train.index), "pooling": pooling},
    )
    ranked = top_classes(classifier.logits(test), 5)
    predicted = np.asarray(ranked[:, 0])
    return Result(
        metrics={f"top{k}": 100 * top_k_accuracy(ranked, test_labels, k) for k in (1, 5)},
        headline=["top1", "top5"] if len(videos.label_names) > 5 else ["top1"],
        protocol={
            "layout": videos.kind,
            "frames": flags.frames,
            "pooling": pooling,
            **settings,
            **image_sizes(test.index),
        },
        counts={
            "train": len(train),
            "test": len(test),
            "classes": len(videos.label_names),
            "missing": videos.train.num_missing + videos.test.num_missing,
            "unreadable": len(videos.train.paths) + len(videos.test.paths) - len(train) - len(test),
        },
        details={"grid": grid, **report_classes(run, predicted, test_labels, videos.label_names)},
    )


TASK = Task(
    name="video",
    summary="actions in videos by a linear probe of a few frames: UCF-101, Kinetics, SSv2",
    layout=LAYOUT,
    add_flags=add_flags,
    run=run,
)
