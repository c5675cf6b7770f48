"""Where the time of a training step on CPU goes: ours beside the reference's PyTorch modules.

Milliseconds by kind of work, one thread, from each library's own profiler. Kinds are told by the
names of operations, so elementwise work is not cut alike in both: products, attention, GELU and
normalisation are; what is left of a step is to be compared as one.

    python -m benchmarks.step_profile --case "S, K 1024"
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable

from benchmarks.contenders import build_ours, start_reference
from benchmarks.train_step import CASES, as_overrides
from benchmarks.turns import limit_threads

# The first that is found in the name of an operation is its kind. Ours: the path of its scopes.
OURS = {
    "optimizer and EMA": r"/(optimizer|ema)/",
    "attention": r"/attn/(?!qkv|proj)",
    "normalisation": r"/norm[12]?/",
    "GELU": r"/mlp/(?!fc)|/gelu|/erf",
    "scan's arrays": r"dynamic_(update_)?(slice|index)|broadcast_in_dim$|^$",
}
REFERENCE = {
    "products": r"^aten::(mm|addmm|linear|mkldnn_linear|convolution|mkldnn_convolution)",
    "attention": r"^aten::(bmm|baddbmm|_softmax|_scaled_dot_product|_efficient|_flash)",
    "normalisation": r"^aten::native_layer_norm",
    "GELU": r"^aten::gelu",
    "optimizer and EMA": r"^aten::_foreach|[Aa]dam",
}
OTHER = "the rest"
KINDS = ("products", *OURS, OTHER)


def kind_of(name: str, rules: dict[str, str]) -> str:
    """The first kind whose pattern is in a name, or `OTHER`."""
    return next((kind for kind, pattern in rules.items() if re.search(pattern, name)), OTHER)


def kinds_of_program(hlo: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program, by its name.

    What multiplies matrices is a product, whatever is fused into it, but for attention's.
    """
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", hlo, re.M | re.S))
    with_products = {name for name, body in bodies.items() if " dot(" in body}
    found = {}
    pattern = r"^\s*(?:ROOT )?%([\w.-]+) = \S+ ([\w-]+)\((.*)$"
    for name, opcode, rest in re.findall(pattern, hlo, re.M):
        scope = re.search(r'op_name="([^"]*)"', rest)
        kind = kind_of(scope[1] if scope else "", OURS)
        called = re.search(r"calls=%([\w.-]+)", rest)
        is_product = opcode == "dot" or (called and called[1] in with_products)
        found[name] = "products" if is_product and kind != "attention" else kind
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


def profile_ours(case: str, overrides: dict, folder: str, num_steps: int) -> dict[str, float]:
    """Milliseconds of our step by kind."""
    import jax

    config_name, settings = CASES[case]
    compiled, step = build_ours(config_name, settings | overrides, folder)
    kinds = kinds_of_program(compiled.as_text())
    for _ in range(2):
        step()
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
    return dict(found)


def profile_reference(case: str, overrides: dict, folder: str, num_steps: int) -> dict[str, float]:
    """Milliseconds of the reference's step by kind; it starts from what ours left in `folder`."""
    import torch

    config_name, settings = CASES[case]
    step = start_reference(config_name, settings | overrides, folder, is_fused=False)
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(num_steps):
            step()
    found = collections.Counter()
    for row in profile.key_averages():
        found[kind_of(row.key, REFERENCE)] += row.self_cpu_time_total / 1e3 / num_steps
    return dict(found)


def _in_a_process(work: Callable, *arguments) -> dict[str, float]:
    """Each library in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def table(ours: dict[str, float], reference: dict[str, float]) -> str:
    """Markdown: a row a kind, and their sums."""
    rows = ["| ms a step | ours | reference |", "|---|---|---|"]
    for kind in KINDS:
        rows.append(f"| {kind} | {ours.get(kind, 0):.0f} | {reference.get(kind, 0):.0f} |")
    rows.append(f"| all | {sum(ours.values()):.0f} | {sum(reference.values()):.0f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", choices=CASES, default="quickstart")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of ours")
    options = parser.parse_args()
    limit_threads(1)
    os.environ["JAX_PLATFORMS"] = "cpu"
    overrides = as_overrides(options.set)
    with tempfile.TemporaryDirectory() as folder:
        arguments = options.case, overrides, folder, options.steps
        ours = _in_a_process(profile_ours, *arguments)
        reference = _in_a_process(profile_reference, *arguments)
    print(table(ours, reference))


if __name__ == "__main__":
    main()
