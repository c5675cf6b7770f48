"""A training step beside the reference's PyTorch modules: time and memory, in turns.

    ours            the step of `dinov2_jax.train`, with what its configuration chooses by itself
    reference       the modules of the package `dinov2`; its softmax is spelled out without xFormers
    reference+sdpa  the same with torch's scaled_dot_product_attention

Each is a process of its own; float32; `python -m benchmarks.train_step --threads 1`. Malloc's
settings are the system's, or those of GLIBC_TUNABLES, for all of them.
Ours beside itself: `--contenders ours --variants remat=none drop_path_form=matmul`.
"""

import argparse
import functools
import os
import tempfile

import numpy as np

from benchmarks.contenders import start_ours, start_reference
from benchmarks.turns import Child, limit_threads, median_ratios, take_turns

BATCH = {"global_batch_size": 8, "group_size": 8, "mesh.data": 1}
# 1 instead of 1e-5: what the blocks compute reaches the losses, which are compared.
CHECKED = {"model.layer_scale_init": 1.0}


def vit_small(num_prototypes: int, drop_path_rate: float) -> tuple[str, dict]:
    """ViT-S/14, 8 images of 2 x 224 and 8 x 98 px."""
    return "vits14", BATCH | CHECKED | {
        "dino.num_prototypes": num_prototypes,
        "ibot.num_prototypes": num_prototypes,
        "model.drop_path_rate": drop_path_rate,
    }


CASES = {
    "S, K 1024": vit_small(1024, 0.0),
    "S, K 65536": vit_small(65_536, 0.0),
    "S, K 1024, drop path 0.4": vit_small(1024, 0.4),
    "S, K 65536, drop path 0.4": vit_small(65_536, 0.4),
    "quickstart": ("quickstart", CHECKED),
}
CONTENDERS = {
    "ours": start_ours,
    "reference": functools.partial(start_reference, is_fused=False),
    "reference+sdpa": functools.partial(start_reference, is_fused=True),
}
LOSSES = ("dino_global_loss", "dino_local_loss", "ibot_loss", "koleo_loss", "total_loss")


def as_overrides(texts: list[str]) -> dict[str, str]:
    """Values by dotted key, of KEY=VALUE."""
    return dict(text.split("=", 1) for text in texts)


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Of the loss terms, relative to ours."""
    return max(abs(theirs[name] / ours[name] - 1) for name in LOSSES)


def report(title: str, seconds: dict[str, np.ndarray], peaks_mb: dict[str, float]) -> None:
    """Medians, and medians of ratios inside a turn; above 1 ours is faster, below 1 leaner."""
    for name, rows in seconds.items():
        wall, cpu = np.median(rows, axis=0)
        wall_ratio, cpu_ratio = median_ratios(seconds, name)
        print(
            f"{title} | {name:14} | {wall:6.2f} s, {cpu:6.2f} CPU s, {peaks_mb[name]:5.0f} MB; "
            f"ours is {wall_ratio:.2f} times as fast, {cpu_ratio:.2f} by CPU time, "
            f"in {peaks_mb['ours'] / peaks_mb[name]:.2f} times the memory",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of ours, e.g. remat=dots"
    )
    parser.add_argument(
        "--variants", nargs="+", default=[], metavar="KEY=VALUE", help="ours again, each changed"
    )
    options = parser.parse_args()
    limit_threads(options.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(
        f"{options.threads} threads; {options.rounds} turns after a first step; float32; "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')!r}"
    )
    for title in options.cases:
        config_name, overrides = CASES[title]
        overrides = overrides | as_overrides(options.set)
        with tempfile.TemporaryDirectory() as folder:
            children = {
                name: Child(CONTENDERS[name], config_name, overrides, folder)
                for name in dict.fromkeys(["ours", *options.contenders])
            }
            for text in options.variants:
                changed = overrides | as_overrides([text])
                children[text] = Child(start_ours, config_name, changed, folder)
            first = {name: child.first for name, child in children.items()}
            if not overrides.get("model.drop_path_rate"):
                for name in list(children)[1:]:
                    error = largest_difference(first["ours"], first[name])
                    print(f"{title} | ours and {name} differ by {error:.1e} in the first losses")
            # Each has taken its first step.
            seconds = take_turns(children, options.rounds, num_warmups=0)
            report(title, seconds, {name: child.finish() for name, child in children.items()})


if __name__ == "__main__":
    main()
