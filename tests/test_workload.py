"""The FLOPs of a step, counted by formulas and in the program."""

import re

import jax

from dinov2_jax import config, startup, workload
from dinov2_jax.config import REPOSITORY
from tests.test_compile import TINY_TEXTS


def test_flops_are_those_of_the_program():
    """Against the matrix products in the jaxpr of the step, drop path and padding included."""
    cfg = config.load_config(
        str(REPOSITORY / "configs" / "vits14.py"),
        [
            *TINY_TEXTS,
            ("model.drop_path_rate", "0.3"),
            ("koleo.loss_weight", "0"),
            ("remat", "none"),
            ("layer_norm", "xla"),  # sums as products are no FLOPs of the model
            ("compiler_preset", ""),  # a step with compiler options cannot be traced in another
        ],
        needs_data=False,
    )
    mesh = startup.build_mesh(cfg, jax.devices()[:1])
    trainer = startup.build_trainer(cfg, mesh)
    batch = workload.abstract_batch(cfg, mesh)
    jaxpr = jax.make_jaxpr(trainer.train_step)(
        trainer.abstract_state, batch, trainer.schedules.at(0)
    )
    counted = workload.count_flops(cfg, trainer.network)
    d, rows, large, small = 64, 2 * 16, 28 // 7, 14 // 7
    gram = 2 * rows * rows * d  # of the metric feature_rank
    resized = (
        2 * 2 * d * small * large * (large + small)
    )  # positions for the locals, there and back
    assert products(jaxpr.jaxpr) == counted.executed + gram + resized
    assert counted.model > counted.executed


def products(jaxpr, times: int = 1) -> float:
    total = 0
    for equation in jaxpr.eqns:
        scope = str(equation.source_info.name_stack)
        # The cross-entropy's sums are inner products, row by row.
        counts = not re.search(r"augment|targets|nk,n?k->n", scope)
        if equation.primitive.name == "dot_general" and counts:
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = 1
            for axis in contracted:
                inner *= equation.invars[0].aval.shape[axis]
            total += 2 * times * equation.outvars[0].aval.size * inner
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"),
        ):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += products(inside, times * turns)
    return total
