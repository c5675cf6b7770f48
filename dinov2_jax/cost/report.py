"""The compile check's figures as lines for people.

In: the figures by the names that `--json` writes, and the time estimate. Out: what is printed.
"""

from dinov2_jax.cost.estimate import Estimate

LESS_MEMORY = (
    "what lowers it: mesh.fsdp cuts the state, most of the arguments, over so many devices; "
    "temporaries: more devices, grad_accumulation_steps, remat=blocks, mesh.backward_kernels=gather"
)


def print_figures(figures: dict) -> None:
    """What is known without a clock: fits or not, and where the memory goes."""
    axes = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    print(
        f"{figures['topology']}"
        + (f" x {figures['slices']} slices" if figures["slices"] > 1 else "")
        + f": {figures['devices']} devices, mesh {axes}; batch {figures['global_batch_size']} in "
        f"groups of {figures['group_size']}; {figures['dtype']}, remat {figures['remat']}, "
        + (f"backward kernels {kernels}, " if (kernels := figures["backward_kernels"]) else "")
        + f"attention {figures['attention']}, prototypes {figures['heads']}; "
        f"compiled in {figures['compile_seconds']:.0f} s"
    )
    kinds = ", ".join(f"{kind} {gib(size)}" for kind, size in figures["hbm_bytes"].items())
    peak, limit = figures["hbm_peak_bytes"], figures["hbm_limit_bytes"]
    if figures["fits"]:
        print(f"fits: {gib(peak)} of {gib(limit)} HBM ({kinds})")
    else:
        over = f"; {gib(peak - limit)} too much" if peak > limit else ""
        print(f"does not fit: {gib(peak)} of {gib(limit)} HBM{over}" + f" ({kinds})" * bool(kinds))
        print(LESS_MEMORY)
    print(
        f"FLOPs a step: model {figures['model_flops']:.4g}, executed "
        f"{figures['executed_flops']:.4g}"
    )


def print_estimate(figures: dict, step: Estimate, *, breakdown: bool) -> None:
    """Collectives, time and MFU; with `breakdown` by part of the step, and the longest lines."""
    moved = ", ".join(f"{kind} {size / 1e6:.4g} MB" for kind, size in step.collective_bytes.items())
    print(f"collectives a step and device: {moved or 'none'}")
    for warning in step.warnings:
        print(f"warning: {warning}")
    if figures["estimated_mfu"] is None:
        print("no time estimate: this compiler states no cycles")
        return
    images = figures["global_batch_size"] / figures["chips"] / step.seconds
    print(
        f"estimated step {step.seconds * 1e3:.1f} ms, MFU {figures['estimated_mfu']:.1%} of the "
        f"executed FLOPs, {images:.0f} images/s a chip (nothing overlaps; see docs/pods.md)"
    )
    if not breakdown:
        return
    kinds = ("products", "kernels", "copies", "other", "collectives")
    print(f"{'ms a step':22}{'all':>9}" + "".join(f"{kind:>12}" for kind in kinds))
    for part, seconds in step.table().items():
        cells = "".join(f"{seconds.get(kind, 0) * 1e3:>12.2f}" for kind in kinds)
        print(f"{part:22}{sum(seconds.values()) * 1e3:>9.2f}{cells}")
    print("longest instructions, ms a step:")
    for row in step.rows[:30]:
        print(f"{row.seconds * 1e3:8.2f}  {row.part}, {row.kind}: {row.what}")


def gib(num_bytes: float) -> str:
    """ "15.75 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"
