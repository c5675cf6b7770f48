"""Prototype losses with dense logits and in blocks: temporary memory, and time side by side.

Measured is what a step does with a head's features: the teacher's targets by Sinkhorn-Knopp, the
cross-entropy of as many student rows, and its gradient for features and prototypes.

    python benchmarks/prototypes.py memory            K = 4,096 to 262,144, by the compiler's books
    python benchmarks/prototypes.py time              in turns; medians and ratios
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads, HeadMode
from dinov2_jax.models.heads import DINOHead, Head

WIDTH, BOTTLENECK = 384, 256
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of student and teacher each, and prototypes; the type of products."""

    rows: int
    k: int
    dtype: str = "float32"

    @property
    def module(self) -> DINOHead:
        # One layer instead of an MLP, which is the same either way.
        sizes = dict(num_prototypes=self.k, bottleneck_dim=BOTTLENECK, num_layers=1)
        return DINOHead(**sizes, dtype=jnp.dtype(self.dtype))

    def compile(self, heads: HeadMode):
        """The compiled gradient of (student and teacher parameters, features [2, 1, rows, d])."""

        def loss(student: dict, teacher: dict, features: jax.Array) -> jax.Array:
            student_head, teacher_head = Head(self.module, student), Head(self.module, teacher)
            target, _ = heads.targets(
                teacher_head,
                heads.rows(teacher_head, features[1]),
                is_real=jnp.ones((1, self.rows), bool),
                center=jnp.zeros(self.k),
                temp=jnp.float32(TEACHER_TEMP),
                centering="sinkhorn_knopp",
                num_sinkhorn_iters=3,
                center_momentum=0.9,
            )
            weights = jnp.full((1, self.rows), 1 / self.rows)
            return heads.ibot_loss(
                student_head,
                features[0],
                target,
                weights,
                num_crops=1,
                student_temp=STUDENT_TEMP,
            )

        params = jax.eval_shape(lambda: self.init(jax.random.key(0)))
        features = jax.ShapeDtypeStruct((2, 1, self.rows, WIDTH), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, params, features).compile()

    def init(self, key: jax.Array) -> dict:
        return self.module.init(key, jnp.zeros((1, WIDTH)))["params"]

    def inputs(self):
        keys = jax.random.split(jax.random.key(0), 3)
        init = jax.jit(self.init)
        features = jax.random.normal(keys[2], (2, 1, self.rows, WIDTH))
        return init(keys[0]), init(keys[1]), features


def report_memory(rows: list[int], ks: list[int]) -> None:
    """Prints temporaries of both ways in MB, beside the gradient that both hand over."""
    print(f"{'rows':>6} {'K':>8} {'gradient MB':>12} {'dense MB':>10} {'blocks MB':>10}")
    for num_rows in rows:
        for k in ks:
            memory = [
                Case(num_rows, k).compile(heads).memory_analysis()
                for heads in (DenseHeads(), BlockHeads())
            ]
            dense, blocks = (m.temp_size_in_bytes / 1e6 for m in memory)
            gradient = memory[0].output_size_in_bytes / 1e6
            print(f"{num_rows:6} {k:8} {gradient:12.1f} {dense:10.1f} {blocks:10.1f}", flush=True)


def report_time(rows: list[int], ks: list[int], block_sizes: list[int], num_rounds: int) -> None:
    """Prints medians over rounds; in each round every way runs once."""
    for num_rows in rows:
        for k in ks:
            case = Case(num_rows, k)
            ways = {"dense": DenseHeads()}
            ways |= {f"blocks {size or 'auto'}": BlockHeads(size) for size in block_sizes}
            compiled = {name: case.compile(heads) for name, heads in ways.items()}
            inputs = case.inputs()
            wall, cpu = ({name: [] for name in ways} for _ in range(2))
            for _ in range(num_rounds + 1):
                for name, run in compiled.items():
                    started = time.perf_counter(), time.process_time()
                    jax.block_until_ready(run(*inputs))
                    wall[name].append(time.perf_counter() - started[0])
                    cpu[name].append(time.process_time() - started[1])
            for name in ways:
                print(
                    f"rows {num_rows:5}  K {k:7}  {name:12} "
                    f"{1e3 * statistics.median(wall[name][1:]):8.1f} ms "
                    f"({1e3 * min(wall[name][1:]):.1f} at best), {ratio(wall, name):.2f} times "
                    f"dense; {ratio(cpu, name):.2f} times in CPU time",
                    flush=True,
                )


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Median over rounds of what `name` took, in times of dense; the first round warms up."""
    pairs = zip(seconds[name][1:], seconds["dense"][1:], strict=True)
    return statistics.median(a / b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=("memory", "time"))
    parser.add_argument("--rows", type=int, nargs="+", default=[80, 600])
    parser.add_argument("--k", type=int, nargs="+", default=None)
    parser.add_argument("--block_sizes", type=int, nargs="+", default=[0], help="0: by itself")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.what == "memory":
        report_memory(options.rows, options.k or [2**i for i in range(12, 19)])
    else:
        report_time(options.rows, options.k or [65_536], options.block_sizes, options.rounds)


if __name__ == "__main__":
    main()
