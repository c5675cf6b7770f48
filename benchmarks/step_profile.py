"""Where the time of a training step on CPU goes: ours beside the reference's PyTorch modules.

Milliseconds by kind of work, one thread, from each library's own profiler. Kinds are told by the
names of operations, so elementwise work is not cut alike in both: products, attention, GELU and
normalisation are; what is left of a step is to be compared as one.

A column adds up to the CPU time of the same step without the profiler, in the same process. Its row
"between operations, and the profiler's own" is what the kinds leave of that: allocation, dispatch
and Python, which run outside operations, less what profiling adds to each of them. Where it is
below zero the profiler added more than that, and the kinds above it took less than they show.

    python -m benchmarks.step_profile --case "S, K 1024"
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from benchmarks.contenders import build_ours, start_reference
from benchmarks.train_step import CASES, as_overrides
from benchmarks.turns import limit_threads, timed

# The first that is found in the name of an operation is its kind. Ours: the path of its scopes.
OURS = {
    "all else": r"/(optimizer|ema|augment)/",
    "attention": r"/attn/(?!qkv|proj)",
    "normalisation": r"/norm[12]?/",
    "GELU": r"/mlp/(?!fc)|/gelu|/erf",
    "scan": r"dynamic_(update_)?(slice|index)|broadcast_in_dim$|^$",
}
REFERENCE = {
    "products": r"^aten::(mm|addmm|linear|mkldnn_linear|convolution|mkldnn_convolution)",
    "attention": r"^aten::(bmm|baddbmm|_softmax|_scaled_dot_product|_efficient|_flash)",
    "normalisation": r"^aten::native_layer_norm",
    "GELU": r"^aten::gelu",
}
OTHER, BETWEEN = "all else", "between"
TITLES = {
    "products": "products with weights, and what is fused into them",
    "attention": "attention's products and softmax",
    "normalisation": "normalisation",
    "GELU": "GELU",
    "scan": "what the scan over blocks keeps: zeroed, written, read",
    OTHER: "all else",
    BETWEEN: "between operations, and the profiler's own",
}
DOT = r"\[([\d,]*)\]\S* dot\((.*)"


def kind_of(name: str, rules: dict[str, str]) -> str:
    """The first kind whose pattern is in a name, or `OTHER`."""
    return next((kind for kind, pattern in rules.items() if re.search(pattern, name)), OTHER)


def is_product(sizes: str, rest: str) -> bool:
    """Whether a dot multiplies matrices; with one row or column it is a sum, written so for speed.

    Args:
      sizes: of its result, such as "16,65,128"; rest: of its line, from the operands on.
    """
    batch_dims = re.search(r"lhs_batch_dims={([\d,]*)}", rest)
    num_batch_dims = len(batch_dims[1].split(",")) if batch_dims else 0
    own = [size for size in sizes.split(",")[num_batch_dims:] if size not in ("", "1")]
    return len(own) > 1


def kinds_of_program(hlo: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name.

    What multiplies matrices is a product, whatever is fused into it, but for attention's and the
    augmentation's.
    """
    bodies = re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S)
    with_products = {
        name for name, body in bodies if any(is_product(*dot) for dot in re.findall(DOT, body))
    }
    pattern = r"^\s*(?:ROOT )?%([\w.-]+) = (\S+ ([\w-]+)\((.*))$"
    instructions = re.findall(pattern, hlo, re.M)
    scopes, read_by = {}, collections.defaultdict(list)
    for name, _, _, rest in instructions:
        scope = re.search(r'op_name="([^"]*)"', rest)
        scopes[name] = scope[1] if scope else ""
        for operand in re.findall(r"%([\w.-]+)", rest):
            read_by[operand].append(scopes[name])
    found = {}
    for name, text, opcode, rest in instructions:
        kind = kind_of(scopes[name], OURS)
        if opcode == "dot":
            (dot,) = re.findall(DOT, text)
            multiplies = is_product(*dot)
            if not multiplies and not scopes[name]:
                # XLA leaves a sum that it rewrote without a name: it is of what reads it.
                kinds = (kind_of(scope, OURS) for scope in read_by[name])
                kind = next((kind for kind in kinds if kind != "scan"), OTHER)
        else:
            called = re.search(r"calls=%([\w.-]+)", rest)
            multiplies = called and called[1] in with_products
        is_apart = kind == "attention" or "/augment/" in scopes[name]
        found[name] = "products" if multiplies and not is_apart else kind
    return found


def self_times(events: Iterable[tuple[float, float, str]]) -> collections.Counter:
    """Time by name of nested `(start, end, name)`: what is inside another is not counted twice."""
    times, open_events = collections.Counter(), []
    for start, end, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events:
            times[open_events[-1][1]] -= end - start
        times[name] += end - start
        open_events.append((end, name))
    return times


def cpu_ms(step: Callable[[], object], num_steps: int) -> float:
    """Of a step without a profiler: the median, after two that warm up."""
    return 1e3 * float(np.median([timed(step)[1] for _ in range(2 + num_steps)][2:]))


def column(kinds: Mapping[str, float], step_ms: float) -> dict[str, float]:
    """Kinds of a step, and what they leave of the time that it takes without the profiler."""
    return {**kinds, BETWEEN: step_ms - sum(kinds.values())}


def profile_ours(
    config_name: str, overrides: Mapping, folder: str, num_steps: int
) -> dict[str, float]:
    """Milliseconds of our step by kind."""
    import jax

    compiled, step = build_ours(config_name, overrides, folder)
    kinds = kinds_of_program(compiled.as_text())
    step_ms = cpu_ms(step, num_steps)
    with tempfile.TemporaryDirectory() as trace:
        with jax.profiler.trace(trace):
            for _ in range(num_steps):
                step()
        (file,) = pathlib.Path(trace).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    found = collections.Counter()
    for line in (line for plane in planes for line in plane.lines):
        events = (
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for event in line.events
            if event.name in kinds
        )
        for name, nanoseconds in self_times(events).items():
            found[kinds[name]] += nanoseconds / 1e6 / num_steps
    return column(found, step_ms)


def profile_reference(
    config_name: str, overrides: Mapping, folder: str, num_steps: int
) -> dict[str, float]:
    """Milliseconds of the reference's step by kind; it starts from what ours left in `folder`."""
    import torch

    step = start_reference(config_name, overrides, folder, is_fused=False)
    step_ms = cpu_ms(step, num_steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(num_steps):
            step()
    found = collections.Counter()
    for row in profile.key_averages():
        found[kind_of(row.key, REFERENCE)] += row.self_cpu_time_total / 1e3 / num_steps
    return column(found, step_ms)


def _in_a_process(work: Callable, *arguments) -> dict[str, float]:
    """Each library in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def table(ours: Mapping[str, float], reference: Mapping[str, float]) -> str:
    """Markdown: a row a kind, and their sums, which are the steps' times without the profiler."""
    rows = ["| ms a step | ours | reference |", "|---|---|---|"]
    for kind, title in TITLES.items():
        cells = (f"{x[kind]:,.0f}" if kind in x else "-" for x in (ours, reference))
        rows.append(f"| {title} | {' | '.join(cells)} |")
    rows.append(f"| all | {sum(ours.values()):,.0f} | {sum(reference.values()):,.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", choices=CASES, default="quickstart")
    parser.add_argument("--steps", type=int, default=5, help="without the profiler, and with it")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of ours")
    options = parser.parse_args()
    limit_threads(1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    config_name, overrides = CASES[options.case]
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_name, overrides | as_overrides(options.set), folder, options.steps
        ours = _in_a_process(profile_ours, *arguments)
        reference = _in_a_process(profile_reference, *arguments)
    print(table(ours, reference))


if __name__ == "__main__":
    main()
