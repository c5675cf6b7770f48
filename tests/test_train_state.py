"""The network's modules and the state that every run begins with."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny


def test_the_teacher_begins_as_the_student_in_arrays_of_its_own():
    network = tiny.make_network()
    state = tiny.make_state(network, tiny.make_optimizer_for(network))
    jax.tree.map(np.testing.assert_array_equal, state.teacher, state.student)
    pointers = [
        {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)}
        for tree in (state.student, state.teacher)
    ]
    assert not pointers[0] & pointers[1]  # donated together: neither may be the other
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert {name: center.shape for name, center in state.centers.items()} == {
        "dino": (tiny.NUM_PROTOTYPES,),
        "ibot": (tiny.NUM_PROTOTYPES,),
    }


def test_the_seed_decides_the_start():
    network = tiny.make_network()
    optimizer = tiny.make_optimizer_for(network)
    first, again, other = (tiny.make_state(network, optimizer, seed=seed) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first.student, again.student)
    kernels = [
        state.student["backbone"]["patch_embed"]["proj"]["kernel"] for state in (first, other)
    ]
    assert not np.array_equal(*kernels)


def test_a_tied_head_serves_both_losses():
    tied, untied = tiny.make_network(separate_head=False), tiny.make_network()
    assert set(tied.modules) == {"backbone", "dino_head"}
    assert (tied.patch_head_name, untied.patch_head_name) == ("dino_head", "ibot_head")
    params = {"dino_head": "its parameters", "ibot_head": "others"}
    assert tied.head("ibot", params).params == "its parameters"
    assert untied.head("ibot", params).params == "others"


def test_heads_do_not_begin_alike():
    params = tiny.make_network().init(jax.random.key(0), image_shape=tiny.IMAGE_SHAPE)
    dino, ibot = (params[name]["last_layer"]["weight_v"] for name in ("dino_head", "ibot_head"))
    assert not np.array_equal(dino, ibot)
