"""The device mesh, and one path+shape rule that shards every tree of the train state.

Student, teacher and both Adam moments are plain pytrees whose paths share a suffix, so one rule
serves them all. Mesh axes: `data` (batch only), `fsdp` (batch, and parameters in pieces) and
`model` (prototypes). All axes are Auto: shapes under `jit` are global, XLA places collectives.
"""

import collections
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dinov2_jax.data.batch import Batch

MESH_AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *, data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Builds the mesh `('data', 'fsdp', 'model')` over all devices.

    Devices of several slices (which the data centre's network joins) are cut by `data`, so that
    only gradients and sums cross from slice to slice. Of GPUs each host is a slice: `data` cuts
    them if it can, and otherwise the other axes go over hosts too.

    Args:
      data, fsdp, model: devices on each axis; one of them may be -1, which takes what is left.
      devices: the devices; all of them when None.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `data` is no multiple of
        the number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: each size must be positive, and at most one of them -1")
    if free:
        sizes[free[0]] = len(devices) // max(fixed, 1)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, but there are "
            f"{len(devices)}; set one of mesh.data, mesh.fsdp, mesh.model to -1 to fill up"
        )
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % num_slices and devices[0].platform == "tpu":
        raise ValueError(
            f"mesh {sizes} on {num_slices} slices: mesh.data must be a multiple of the slices, over"
            " which it alone is cut; lower mesh.fsdp or mesh.model"
        )
    # Axes need not be whole sides of the torus, which jax.make_mesh grants to v5e alone: an axis of
    # 16 on v6e:8x8 is a side and a quarter of the other. Whole sides are still tried first.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if num_slices == 1 or sizes["data"] % num_slices:
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), **options)
    else:
        shape = (sizes["data"] // num_slices, sizes["fsdp"], sizes["model"])
        grid = mesh_utils.create_hybrid_device_mesh(shape, (num_slices, 1, 1), **options)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of pieces that the batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def host_shares(mesh: Mesh) -> dict[int, int]:
    """How many of the batch's pieces each process holds, by its index, ascending.

    Devices that differ in their place on `model` alone hold the same piece, also on two hosts.
    """
    pieces = mesh.devices.reshape(batch_shards(mesh), -1)
    holders = [process for row in pieces for process in {x.process_index for x in row}]
    return dict(sorted(collections.Counter(holders).items()))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every device field of a `Batch`: the leading axis over the batch shards."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def platform() -> str:
    """Kind of the devices that a program is traced for, "tpu" say: those of the mesh, if any.

    They need not be of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def shard_rows(x: jax.Array, *, last: str | None = None) -> jax.Array:
    """Keeps axis 0 of an activation cut over the batch axes, and its last over `last`, if given.

    Left to itself, XLA may cut activations like the weights and sum or move them instead. Does
    nothing where no mesh is set, and leaves an axis alone that the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def cut(size: int, axes: tuple[str, ...]) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in axes if axis in mesh.axis_names)
        return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    rows = cut(x.shape[0], BATCH_AXES)
    columns = cut(x.shape[-1], (last,)) if last else None
    if rows is None and columns is None:
        return x
    middle = (None,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, *middle, columns))


def shard_prototypes(weight: jax.Array) -> jax.Array:
    """Keeps prototypes `[k, d]` cut over `model` for a product with rows, if the mesh divides them.

    Where `fsdp` cuts rows and prototypes, XLA left to itself gathers over both axes, and then takes
    its share of `model` again.
    """
    model = jax.sharding.get_abstract_mesh().shape.get("model", 1)
    if model == 1 or weight.shape[0] % model:
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec("model"))


def row_shards(*arrays: jax.Array) -> int:
    """Into how many pieces the mesh in use cuts the rows of all arrays; 1 if not those of all."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(BATCH_AXES) <= set(mesh.axis_names):
        return 1
    shards = batch_shards(mesh)
    return 1 if any(len(x) % shards for x in arrays) else shards


def fsdp_cuts_parameters() -> bool:
    """Whether the mesh in use cuts parameters, and not only rows."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def cut_axis(names: Sequence[str], shape: Sequence[int], fsdp: int) -> int | None:
    """Which axis of a parameter `fsdp` cuts: its largest that it divides; None: none.

    Never the columns of SwiGLU's two halves in one, which are products of their own: cut so, they
    would have to be dealt anew.
    """
    if "w12" in names:
        shape = shape[:-1]
    candidates = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not candidates:
        return None
    return max(candidates, key=lambda axis: (shape[axis], axis))


def on_each_device(kernel: Callable, *arrays: jax.Array, replicated: tuple[jax.Array, ...] = ()):
    """Runs a kernel, which XLA cannot partition, on the rows of each device.

    Of rows (the first axis of each array) that the devices do not divide each takes all. The
    results are cut as the arrays are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(*arrays, *replicated)
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    rows = PartitionSpec(axes if arrays[0].shape[0] % shards == 0 else None)
    specs = (rows,) * len(arrays) + (PartitionSpec(),) * len(replicated)
    # Kernels do not say over which axes their results vary, which the check asks for.
    return jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)(
        *arrays, *replicated
    )


def path_names(path: Sequence) -> tuple[str, ...]:
    """The names along a pytree path, whatever kind of key each step is."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def leaf_spec(
    names: Sequence[str],
    shape: Sequence[int],
    *,
    mesh_shape: dict[str, int],
    min_size_to_shard: int,
) -> PartitionSpec:
    """The rule: how a leaf of the train state is cut, from its path and shape alone.

    * prototypes (`last_layer/weight_*`, `[k, ...]`) and centers `[k]`: `k` over `model`, and over
      `fsdp` too if the tensor is large enough and `k` divides;
    * any other tensor of at least `min_size_to_shard` bytes (f32): its `cut_axis`, but never the
      stacked layer axis of `blocks`, over which the forward pass scans;
    * everything else is replicated.

    Example: `('teacher', 'backbone', 'blocks', 'mlp', 'fc1', 'kernel')`, `[24, 1024, 4096]` with
    fsdp = 8 gives `PartitionSpec(None, None, 'fsdp')`.
    """
    is_large = 4 * math.prod(shape) >= min_size_to_shard
    fsdp, model = mesh_shape["fsdp"], mesh_shape["model"]
    if "last_layer" in names or "centers" in names:
        axes = []
        if shape and shape[0] % model == 0:
            axes.append("model")
        if axes and is_large and shape[0] % (model * fsdp) == 0:
            axes.append("fsdp")
        axes = [axis for axis in axes if mesh_shape[axis] > 1]
        return PartitionSpec(tuple(axes)) if axes else PartitionSpec()
    first = 1 if "blocks" in names else 0
    cut = cut_axis(names, shape[first:], fsdp)
    if cut is None or not is_large:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (first + cut), "fsdp")


def tree_sharding(tree, mesh: Mesh, *, min_size_to_shard_mb: float = 4.0):
    """Applies `leaf_spec` to every leaf of a tree of arrays or `ShapeDtypeStruct`s."""

    def leaf_sharding(path, leaf) -> NamedSharding:
        spec = leaf_spec(
            path_names(path),
            leaf.shape,
            mesh_shape=dict(mesh.shape),
            min_size_to_shard=int(min_size_to_shard_mb * 2**20),
        )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def bytes_per_device(tree, shardings) -> int:
    """Bytes that one device holds of a tree of arrays or `ShapeDtypeStruct`s."""

    def leaf_bytes(leaf, sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(leaf_bytes, tree, shardings)))


# The fields of `Batch` that the step needs; the others are for the host's books.
DEVICE_FIELDS = tuple(name for name in Batch._fields if name not in ("index", "bad_record"))


def host_groups(mesh: Mesh, *, num_groups: int) -> list[int]:
    """Which groups of a batch the devices of this process hold, ascending.

    Devices that differ in their place on `model` alone hold the same ones, also on two hosts.
    """
    pieces = batch_sharding(mesh).addressable_devices_indices_map((num_groups,)).values()
    return sorted({group for (piece,) in pieces for group in range(*piece.indices(num_groups))})


def put_batch(batch: Batch, mesh: Mesh, *, num_groups: int) -> dict[str, jax.Array]:
    """Copies this host's part of a batch to its devices, as global arrays cut over the batch axes.

    Args:
      batch: of the groups `host_groups`, in their order.
      mesh: of the run.
      num_groups: in the whole batch, over all hosts.
    """
    sharding = batch_sharding(mesh)
    place = {group: i for i, group in enumerate(host_groups(mesh, num_groups=num_groups))}

    def put(local: np.ndarray) -> jax.Array:
        rows = len(local) // len(place)  # of one group

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(num_groups * rows)
            first = place[start // rows] * rows  # a device's groups lie together, here as there
            return local[first : first + stop - start]

        shape = (num_groups * rows, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, piece)

    return {name: put(np.asarray(getattr(batch, name))) for name in DEVICE_FIELDS}
