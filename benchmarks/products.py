"""The matrix products of a layer on CPU: XLA's libraries beside PyTorch's, in turns.

    python -m benchmarks.products --threads 1

GFLOP/s by CPU time, medians, float32, of ViT-S's layers over the tokens of 16 images of 224 px:
`forward` is x w, `inputs` the gradient y w^T, `weights` the gradient x^T y. Which library is the
faster goes by the machine, so the figures of docs/performance.md say of which one they are.
"""

import argparse
import os

import numpy as np

from benchmarks.turns import Child, limit_threads, take_turns

ROWS = 16 * 257
LAYERS = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}
FORMS = {
    "forward": lambda x, w, y: x @ w,
    "inputs": lambda x, w, y: y @ w.T,
    "weights": lambda x, w, y: x.T @ y,
}
CONTENDERS = ("pytorch", "xla", "cpu_products")


def start(contender: str, layer: str, form: str, rows: int = ROWS):
    """One product of a contender: PyTorch, or a compiler preset of ours ("xla": none)."""
    rng, (d, f) = np.random.default_rng(0), LAYERS[layer]
    shapes = (rows, d), (d, f), (rows, f)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    product = FORMS[form]
    if contender == "pytorch":
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        tensors = [torch.from_numpy(array) for array in arrays]
        return lambda: product(*tensors).numpy()

    import jax

    from dinov2_jax.compiler import compiler_options

    options = compiler_options({"xla": ""}.get(contender, contender), platform="cpu")
    arrays = jax.device_put(arrays)
    compiled = jax.jit(product, keep_unused=True).lower(*arrays).compile(compiler_options=options)
    return lambda: np.asarray(compiled(*arrays))


def measure(layer: str, form: str, *, rounds: int, rows: int = ROWS) -> dict[str, float]:
    """GFLOP/s of each contender, by CPU time."""
    children = {name: Child(start, name, layer, form, rows) for name in CONTENDERS}
    seconds = take_turns(children, rounds)
    for child in children.values():
        child.finish()
    flops = 2 * rows * np.prod(LAYERS[layer])
    return {name: flops / 1e9 / np.median(rows_[:, 1]) for name, rows_ in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    limit_threads(options.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    print(f"{options.threads} threads; {options.rounds} turns; GFLOP/s by CPU time")
    for layer in LAYERS:
        for form in FORMS:
            found = measure(layer, form, rounds=options.rounds)
            print(f"{layer:4} {form:7}", *(f"{name} {rate:6.1f}" for name, rate in found.items()))


if __name__ == "__main__":
    main()
