"""What the TPU compiler says of kernels, drop path and remat, without a TPU (extra `tpu`).

Milliseconds are the compiler's cycles over the clock: those it states for fusions and copies, and
for kernels the bundles of their final schedule, once per grid step. No hardware ran.

    python -m benchmarks.tpu_schedule attention [--topology v5e:2x2] [--tokens 257 --images 32]
    python -m benchmarks.tpu_schedule prototypes [--topology v5e:2x2] [--rows 2450 --k 65536]
    python -m benchmarks.tpu_schedule drop_path [--tokens 257 --images 32]
    python -m benchmarks.tpu_schedule remat
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.prototypes import Case
from dinov2_jax.cost.estimate import estimate
from dinov2_jax.cost.hlo import Program
from dinov2_jax.cost.topology import open_topology
from dinov2_jax.losses.head_modes import BlockHeads, DenseHeads
from dinov2_jax.losses.pallas_tiles import WIDE, tiles
from dinov2_jax.models.attention import attend, split_heads
from dinov2_jax.models.attention_pallas import grid_steps, self_attention
from dinov2_jax.models.drop_path import DropPath, add_residual, num_kept
from dinov2_jax.models.drop_path_pallas import fork
from dinov2_jax.models.layer_norm_pallas import block_rows, normalize
from dinov2_jax.models.vit import VARIANTS, VisionTransformer
from dinov2_jax.sharding import BATCH_AXES, make_mesh, shard_rows

# Kernels whose grids are over other tiles: wider ones of rows; all images, not the kept ones.
WIDE_KERNELS = (
    "prototypes_max",
    "prototypes_sum",
    "prototypes_cross_entropy",
    "drop_path_join",
)
DROP_PATH_RATE = 0.4
KINDS = ("products", "kernels", "copies", "other", "collectives")


def compile_for(topology, num_devices: int, function, *arguments: jax.ShapeDtypeStruct):
    """Compiles with every argument cut over the devices, or replicated if it has one axis."""
    mesh = make_mesh(devices=topology.devices[:num_devices])

    def place(x):
        spec = PartitionSpec(BATCH_AXES if len(x.shape) > 2 else None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()


def visible_ms(compiled, topology) -> float:
    """Fusions and copies, each once."""
    cycles = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())
    return 1e3 * sum(map(int, cycles)) / topology.chip.clock_hz


def attention(flags, topology) -> None:
    d, heads = flags.width, flags.width // 64

    def plain(qkv):
        x = attend(*split_heads(qkv, heads))
        return x.swapaxes(1, 2).reshape(*qkv.shape[:2], d)

    def fused(qkv):
        return self_attention(qkv, num_heads=heads)

    for name, function in (("xla", plain), ("pallas", fused)):

        def both(qkv, grad, function=function):
            out, vjp = jax.vjp(function, qkv)
            return out, vjp(grad)

        sizes = ((flags.images, flags.tokens, width) for width in (3 * d, d))
        arguments = (jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes)
        compiled = compile_for(topology, 1, both, *arguments)
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        ms = visible_ms(compiled, topology)
        print(f"{name}: fusions and copies {ms:.2f} ms, temporary {temporary:.0f} MiB", flush=True)


def kernels(flags, topology) -> None:
    """Compiles the kernels again in a process that writes their schedules out."""
    wide_steps = 0
    if flags.what == "attention":
        steps = grid_steps(flags.images, flags.tokens, flags.width, 64)
    elif flags.what == "drop_path":
        blocks = -(-flags.tokens // block_rows(flags.tokens))
        steps, wide_steps = num_kept(flags.images, DROP_PATH_RATE) * blocks, flags.images * blocks
    else:
        (rows, row_tile), (wide_rows, wide_tile), (k, k_tile) = (
            tiles(flags.rows),
            tiles(flags.rows, largest=WIDE),
            tiles(flags.k),
        )
        steps = rows // row_tile * (k // k_tile)
        wide_steps = wide_rows // wide_tile * (k // k_tile)
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.tpu_schedule", *sys.argv[1:], "--no_kernels"]
        environment = os.environ | {"LIBTPU_INIT_ARGS": dump}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        seen = set()
        for path in pathlib.Path(folder).glob("*schedule-analysis_final_bundles.txt"):
            name = re.search(rf"{flags.what}_[a-z_]+", path.name)
            bundles = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            if not name or (name[0], bundles[1]) in seen:
                continue
            seen.add((name[0], bundles[1]))
            times = wide_steps if name[0] in WIDE_KERNELS else steps
            ms = 1e3 * int(bundles[1]) * times / topology.chip.clock_hz
            print(f"{name[0]}: {bundles[1]} bundles x {times} grid steps = {ms:.2f} ms")


def prototypes(flags, topology) -> None:
    """Targets by Sinkhorn-Knopp, the loss of as many rows, and its gradient, on one chip."""
    ways = {
        "dense": DenseHeads(),
        "blocks": BlockHeads(),
        "pallas": BlockHeads(has_kernels=True),
    }
    case = Case(flags.rows, flags.k, "bfloat16")
    for name in ("pallas",) if flags.no_kernels else ways:
        with jax.set_mesh(make_mesh(devices=topology.devices[:1])):
            compiled = case.compile(ways[name])
        found = estimate(Program(compiled.as_text()), topology.chip)
        temporary = compiled.memory_analysis().temp_size_in_bytes >> 20
        in_kernels = sum(row.seconds for row in found.rows if row.kind == "kernels")
        print(
            f"{name}: {found.seconds * 1e3:.1f} ms, of which {in_kernels * 1e3:.1f} are what "
            f"kernels state; temporary {temporary} MiB",
            flush=True,
        )


def drop_path(flags, topology) -> None:
    """Layer normalisation, an empty branch and the residual, with gradients: `images` a chip."""
    x = jax.ShapeDtypeStruct(
        (flags.images * len(topology.devices), flags.tokens, flags.width), jnp.bfloat16
    )
    vectors = [jax.ShapeDtypeStruct((flags.width,), jnp.float32)] * 4
    for form in ("pallas",) if flags.no_kernels else ("gather", "matmul", "pallas"):
        drop = DropPath(DROP_PATH_RATE, "subset", len(topology.devices), form)

        def run(x, scale, bias, last_bias, gamma, drop=drop):
            def norm(x, *order):
                function = fork if order else normalize
                return function(x, scale[None], bias[None], *order, x.dtype)

            def layer(tokens, hands_out_bias=False):
                if hands_out_bias:
                    return tokens, last_bias
                return tokens + last_bias.astype(tokens.dtype)

            added = add_residual(
                x,
                layer,
                norm=norm,
                scale=lambda residual: residual * gamma,
                drop_path=drop,
                make_key=lambda: jax.random.key(0),
            )
            return shard_rows(added)

        def both(x, grad, *vectors, run=run):
            out, pull = jax.vjp(run, x, *vectors)
            return out, jax.tree.map(lambda g: shard_rows(g) if g.ndim > 2 else g, pull(grad))

        compiled = compile_for(topology, len(topology.devices), both, x, x, *vectors)
        found = estimate(Program(compiled.as_text()), topology.chip)
        ms = {kind: 1e3 * sum(r.seconds for r in found.rows if r.kind == kind) for kind in KINDS}
        print(f"{form}:", *(f"{kind} {x:.2f} ms" for kind, x in ms.items()), flush=True)


def remat(flags, topology) -> None:
    """The gradient of a ViT-L's blocks for the global crops of 12 images, drop path on."""
    for policy in flags.policies:
        backbone = VisionTransformer(
            **(VARIANTS["vit_large"] | {"ffn": flags.ffn}),
            layer_norm=flags.layer_norm,
            patch_size=14,
            dtype=jnp.bfloat16,
            remat=policy,
            attention=flags.attention,
            drop_path_rate=0.3,
            drop_path_form=flags.drop_path_form,
        )
        images = jax.ShapeDtypeStruct((24, 224, 224, 3), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        params = jax.eval_shape(backbone.init, key, images)

        def loss(params, images, key, backbone=backbone):
            out = backbone.apply(params, images, train=True, rngs={"drop_path": key})
            return (out.patches.astype(jnp.float32) ** 2).sum()

        mesh = make_mesh(devices=topology.devices[:1])
        replicated = NamedSharding(mesh, PartitionSpec())
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss), in_shardings=replicated).lower(params, images, key)
            compiled = lowered.compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes >> 20
        found = estimate(Program(compiled.as_text()), topology.chip)
        print(f"{policy}: {found.seconds * 1e3:.0f} ms, temporary {temporary} MiB", flush=True)
        for part, kinds in found.table().items():
            print("   ", part, *(f"{kind} {1e3 * secs:.1f}" for kind, secs in kinds.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("attention", "prototypes", "drop_path", "remat"))
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--tokens", type=int, default=257)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2450)
    parser.add_argument("--k", type=int, default=65_536)
    parser.add_argument("--policies", nargs="+", default=["dots", "branches", "blocks"])
    parser.add_argument("--attention", default="pallas", help="of remat: pallas or xla")
    parser.add_argument("--ffn", default="mlp", help="of remat: mlp or swiglu")
    parser.add_argument("--layer_norm", default="xla", help="of remat: xla or pallas")
    parser.add_argument(
        "--drop_path_form", default="matmul", help="of remat; pallas with its layer_norm"
    )
    parser.add_argument("--no_kernels", action="store_true", help="without their schedules")
    flags = parser.parse_args()
    topology = open_topology(flags.topology)
    {f.__name__: f for f in (attention, prototypes, drop_path, remat)}[flags.what](flags, topology)
    if flags.what != "remat" and not flags.no_kernels:
        kernels(flags, topology)


if __name__ == "__main__":
    main()
