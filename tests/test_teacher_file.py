"""The teacher as one file: whole whatever its sharding, under the reference's names."""

import jax
import numpy as np
from etils import epath

from dinov2_jax.convert.safetensors_file import open_safetensors
from dinov2_jax.convert.state_dict import to_reference
from dinov2_jax.sharding import make_mesh, tree_sharding
from dinov2_jax.teacher_file import TEACHER_FILE, teacher_writer
from tests import tiny


def test_a_sharded_teacher_is_written_whole(tmp_path):
    params = tiny.make_network().init(jax.random.key(0), image_shape=tiny.IMAGE_SHAPE)
    shardings = tree_sharding(params, make_mesh(fsdp=2, data=4), min_size_to_shard_mb=0.0)
    sharded = jax.device_put(params, shardings)
    assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    write = teacher_writer(epath.Path(tmp_path), {"about": "a test"})
    write(sharded, 7)
    flat, metadata = open_safetensors(tmp_path / TEACHER_FILE)
    assert metadata["about"] == "a test" and metadata["step"] == "7"
    expected = to_reference(jax.device_get(params))
    assert set(flat) == set(expected) and "backbone.blocks.1.attn.qkv.weight" in flat
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(flat[name]), np.asarray(array), err_msg=name)
