"""What a run says about itself in words: the start-up table, proposals, the last lines."""

import collections
import math
from collections.abc import Mapping, Sequence

import jax
from etils import epath
from jax.sharding import Mesh, PartitionSpec

from dinov2_jax.advice.proposals import Suggestion
from dinov2_jax.sharding import batch_shards, bytes_per_device, path_names
from dinov2_jax.train_state import TrainState


def start_table(
    *,
    config_path: str,
    workdir: epath.Path,
    mesh: Mesh,
    state: TrainState,
    dtype: str,
    chosen: str,
    heads: str,
    global_batch_size: int,
    group_size: int,
    learning_rate: str,
    activation_bytes: int,
    epochs: float,
    total_steps: int,
) -> str:
    """The table that every run begins with.

    Args:
      config_path, workdir: as given.
      mesh: of the devices in use.
      state: abstract, with shardings.
      dtype: of the computation.
      chosen: what each "auto" became; may be empty.
      heads: how the prototype losses are computed.
      global_batch_size, group_size: images.
      learning_rate: the sentence about it.
      activation_bytes: estimate for one device.
      epochs: passes over the data.
      total_steps: of the run.
    """
    devices = mesh.devices.flatten()
    shards = batch_shards(mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    state_bytes = bytes_per_device(state, shardings)
    grad_bytes = bytes_per_device(state.student, shardings.student)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows = {
        "config": config_path,
        "workdir": str(workdir),
        "mesh": f"{axes}, of {len(devices)} x {devices[0].device_kind}",
        "compute type": dtype,
        **({"chosen by auto": chosen} if chosen else {}),
        "prototype losses": heads,
        "parameters": parameter_line(state.student),
        "steps": f"{total_steps:,}, {epochs:.4g} passes over the data",
        "batch": f"{global_batch_size} images, {global_batch_size // group_size} x {group_size} "
        f"in groups; {global_batch_size // shards} images a device",
        "learning rate": learning_rate,
        "memory a device": f"state {megabytes(state_bytes)}, gradients {megabytes(grad_bytes)}, "
        f"activations about {megabytes(activation_bytes)} (estimates)",
    }
    width = max(len(name) for name in rows)
    shards = f"\n  {'':<{width}}  ".join(sharding_lines(state.student))
    rows["shards"] = shards
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items())


def sharding_lines(params: Mapping) -> list[str]:
    """How the parameters are cut, a line for each way; the teacher and Adam's moments go alike.

    Args:
      params: abstract, with shardings.
    """
    ways = collections.defaultdict(dict)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        ways[str(leaf.sharding.spec)]["/".join(path_names(path))] = leaf
    sizes = {way: sum(4 * leaf.size for leaf in leaves.values()) for way, leaves in ways.items()}
    lines = []
    for way in sorted(ways, key=sizes.get, reverse=True):
        leaves, size = ways[way], megabytes(sizes[way])
        name, leaf = max(leaves.items(), key=lambda item: item[1].size)
        count = f"{len(leaves)} array{'s' * (len(leaves) > 1)}"
        largest = f"the largest {name} {list(leaf.shape)}"
        lines.append(f"{_cut(leaf.sharding.spec)}: {count}, {size}, {largest}")
    return lines


def _cut(spec: PartitionSpec) -> str:
    """ "axis 2 over fsdp", "whole on each device"."""
    parts = []
    for axis, over in enumerate(spec):
        if over:
            parts.append(f"axis {axis} over {over if isinstance(over, str) else ' x '.join(over)}")
    return ", ".join(parts) or "whole on each device"


def parameter_line(params: Mapping) -> str:
    """Parameters of each module, in words."""
    counts = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module))
        for name, module in params.items()
    }
    return ", ".join(f"{name} {count / 1e6:.4g} M" for name, count in counts.items())


def megabytes(num_bytes: float) -> str:
    """ "12 MB", "3.4 GB"."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.3g} GB"
    return f"{num_bytes / 1e6:.3g} MB"


def estimate_activation_bytes(
    *,
    images: int,
    global_tokens: int,
    local_tokens: int,
    num_local_crops: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    mlp_ratio: float,
    itemsize: int,
    kept_share: float,
    remat: str,
) -> int:
    """A rough upper figure of what one device keeps of the backbone for the backward pass.

    In bytes. Per token and block, without remat: the normalised inputs, queries, keys, values, the
    branches' outputs, the hidden layer before and after its nonlinearity, and the attention's
    probabilities. With it the block's input, and what `models.block.remat_block` keeps.

    Args:
      images: on one device.
      global_tokens, local_tokens: of one crop.
      num_local_crops: of one image.
      embed_dim, depth, num_heads, mlp_ratio: of the backbone.
      itemsize: bytes of the compute type.
      kept_share: of the images, by a drop path that leaves images out.
      remat: "none", "dots", "branches" or "blocks".
    """
    per_block = 0.0
    for crops, tokens in ((2, global_tokens), (num_local_crops, local_tokens)):
        in_branches = {
            "none": embed_dim * (8 + 2 * mlp_ratio) + num_heads * tokens,
            "dots": embed_dim * (6 + mlp_ratio),
            "branches": embed_dim * 3,
            "blocks": 0,
        }[remat]
        block_input = 0 if remat == "none" else embed_dim
        per_block += images * crops * tokens * (block_input + kept_share * in_branches)
    return int(per_block * depth * itemsize)


def estimate_logit_bytes(
    *,
    images: int,
    num_micro_batches: int,
    num_local_crops: int,
    masked_rows: float,
    num_prototypes: Sequence[int],
) -> int:
    """What dense heads keep on one device, in float32.

    The targets of the whole batch; and of a micro-batch, both losses at once, each student row's
    target, logits and their exponentials (those of iBOT's only micro-batch are the batch's).

    Args:
      images: on one device, in all micro-batches.
      num_micro_batches: that the student sees them in.
      num_local_crops: of one image.
      masked_rows: of one global crop, on average; those that hold nothing count.
      num_prototypes: on one device, of the DINO and the iBOT head; 0: no such loss.
    """
    dino_rows = 2 + 3 * (2 + num_local_crops) / num_micro_batches
    arrays = 2 if num_micro_batches == 1 else 3
    ibot_rows = 2 * masked_rows * (1 + arrays / num_micro_batches)
    dino, ibot = num_prototypes
    return int(4 * images * (dino_rows * dino + ibot_rows * ibot))


def suggestion_table(suggestions: Sequence[Suggestion]) -> str:
    """Every suggestion with its reason, and below it the flags that apply the changes."""
    rows = [("key", "now", "suggested", "why")]
    for item in suggestions:
        value = f"{item.value}" if item.is_change else "as it is"
        rows.append((item.key, f"{item.current}", value, item.reason))
    a, b, c, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"  {key:<{a}}  {now:<{b}}  {new:<{c}}  {why}" for key, now, new, why in rows]
    flags = [f"--config.{item.key}={item.value}" for item in suggestions if item.is_change]
    return "\n".join([*lines, " ".join(flags) or "nothing to change"])


# What a finished run leaves, as its last words put it.
CONTENTS = {
    "teacher.safetensors": "teacher.safetensors (the network)",
    "crops.png": "crops.png",
    "pca.png": "pca.png (look at them)",
    "metrics.jsonl": "metrics.jsonl",
    "tensorboard": "tensorboard/",
    "checkpoints": "checkpoints/",
}


def last_words(
    *, workdir: epath.Path, metrics: Mapping[str, float], name: str, is_own_data: bool
) -> list[str]:
    """The end of a finished run: how good it is, beside what; what lies where; what to try.

    Args:
      workdir: of the run.
      metrics: the last evaluation, and the baselines of step 0; may be empty.
      name: of the evaluation.
      is_own_data: whether the user's own images were trained on already.
    """
    lines = []
    prefix = f"knn/{name}/"
    values = {key.removeprefix(prefix): value for key, value in metrics.items()}
    if "cls" in values:
        lines.append(f"kNN {name}: {standing(values)}")
    hint = (
        "a larger model (--config=configs/vits14.py; with --suggest, what fits your run), or more "
        "steps (--config.total_steps)"
        if is_own_data
        else "your own images, --config.data.path=/your/images"
    )
    found = [text for file, text in CONTENTS.items() if (epath.Path(workdir) / file).exists()]
    lines.append(f"{workdir} has {', '.join(found)}. Try next, in another --workdir: {hint}")
    return lines


def standing(values: Mapping[str, float]) -> str:
    """Where the trained network stands against each baseline, said as it is."""
    trained = values["cls"]
    baselines = {
        "its random initialisation": "random_init_cls",
        "raw pixels": "raw_pixels",
        "six colour statistics": "color_stats",
        "chance": "chance",
    }
    parts = []
    for words, key in baselines.items():
        if key in values:
            relation = "above" if trained > values[key] else "not above"
            parts.append(f"{relation} {words} ({values[key]:.1%})")
    return f"{trained:.1%}" + (f", {', '.join(parts)}" if parts else "")
