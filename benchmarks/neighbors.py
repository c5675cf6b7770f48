"""The exact search for neighbours: time and memory, for growing banks and numbers of queries.

python benchmarks/neighbors.py grow                 in memory, one size doubled after another
python benchmarks/neighbors.py grow --devices 8     over fake devices of one host
python benchmarks/neighbors.py disk --rows 400000   a bank mapped from disk, larger than a piece
python benchmarks/neighbors.py plan                 ImageNet-1k against its validation set
"""

import argparse
import os
import pathlib
import resource
import tempfile
import time

import numpy as np

WIDTH, K = 384, 20


def noise(rows: int, width: int, seed: int) -> np.ndarray:
    """float32 `[rows, width]`."""
    return np.random.default_rng(seed).standard_normal((rows, width), np.float32)


def timed(queries, bank, **settings) -> tuple[float, float]:
    """Seconds of one search by the clock, and of processor time; one before it compiles."""
    from dinov2_jax.neighbors import nearest_neighbors

    nearest_neighbors(queries[:1024], bank[: 1 << 15], k=K, **settings)
    started = time.perf_counter(), time.process_time()
    nearest_neighbors(queries, bank, k=K, **settings)
    return time.perf_counter() - started[0], time.process_time() - started[1]


def grow(max_rows: int) -> None:
    """Doubles the bank at 2,048 queries, then the queries at 65,536 rows."""
    rows = [1 << i for i in range(15, max_rows.bit_length())]
    bank = noise(rows[-1], WIDTH, 0)
    cases = [(2_048, n) for n in rows] + [(n, 65_536) for n in (1_024, 4_096, 8_192)]
    print(f"{'queries':>8} {'rows':>9} {'secs':>7} {'CPU secs':>9} {'CPU ns per pair':>16}")
    for num_queries, num_rows in cases:
        queries = noise(num_queries, WIDTH, 1)
        secs, cpu_secs = timed(queries, bank[:num_rows])
        per_pair = 1e9 * cpu_secs / num_queries / num_rows
        print(f"{num_queries:8,} {num_rows:9,} {secs:7.2f} {cpu_secs:9.2f} {per_pair:16.1f}")


def disk(num_rows: int, piece_mib: int) -> None:
    """Searches a bank that is mapped from disk, in pieces."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "bank.npy"
        bank = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, WIDTH))
        for start in range(0, num_rows, 65_536):
            bank[start : start + 65_536] = noise(len(bank[start : start + 65_536]), WIDTH, start)
        bank.flush()
        del bank
        bank = np.load(path, mmap_mode="r")
        secs, _ = timed(noise(1_024, WIDTH, 1), bank, piece_bytes=piece_mib * 2**20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = num_rows * WIDTH * 4 / 2**20
    print(f"{num_rows:,} rows, {size:,.0f} MiB on disk, pieces of {piece_mib} MiB: {secs:.1f} s,")
    print(f"peak RSS {peak:,.0f} MiB")


def plan(num_queries: int, num_rows: int, width: int) -> None:
    """Prints what a task would print before it starts."""
    from dinov2_jax.evals.search import describe
    from dinov2_jax.neighbors import seconds_per_step
    from dinov2_jax.neighbors_plan import make_plan

    made = make_plan(num_queries, num_rows, width, k=200)
    print(describe(made, made.num_steps * seconds_per_step(made)))


def main() -> None:
    """One measurement by its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("grow", "disk", "plan"))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--piece-mib", type=int, default=64)
    flags = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={flags.devices}"
    if flags.what == "grow":
        grow(flags.rows or 262_144)
    elif flags.what == "disk":
        disk(flags.rows or 400_000, flags.piece_mib)
    else:
        plan(50_000, flags.rows or 1_281_167, 1_536)


if __name__ == "__main__":
    main()
