"""The data room works without jax: no file imports it, and batches are built where it is absent."""

import subprocess
import sys
import textwrap


def test_data_never_imports_jax():
    program = """
        import importlib, pkgutil, sys, warnings
        import dinov2_jax.data as room

        for module in pkgutil.iter_modules(room.__path__):
            importlib.import_module(f"dinov2_jax.data.{module.name}")
        assert not {"jax", "flax", "grain", "torch"} & set(sys.modules), sorted(sys.modules)

        sys.modules["jax"] = None  # from now on importing it fails
        from dinov2_jax.data.masking import BlockMasks
        from dinov2_jax.data.multicrop import MultiCrop
        from dinov2_jax.data.pipeline import make_batches
        from dinov2_jax.data.sources import open_source

        with make_batches(
            open_source("photos:"),
            seed=0,
            global_batch_size=4,
            group_size=2,
            multicrop=MultiCrop(global_crop_size_px=28, local_crop_size_px=14),
            masks=BlockMasks(rows=2, cols=2, num_crops=4),
            total_steps=2,
        ) as batches:
            shapes = [batch.global_crops.shape for batch in batches]
        assert shapes == [(4, 2, 28, 28, 3)] * 2, shapes
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert result.stdout == "done\n", result.stderr
