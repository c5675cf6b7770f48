"""An `.npy` file that grows is the file that numpy writes at once."""

import io

import ml_dtypes
import numpy as np
import pytest

from dinov2_jax.features.npy_file import NpyFile


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("sizes", [(), (1,), (3, 0, 9), (64,) * 20])
def test_it_is_numpys_file_byte_for_byte(tmp_path, dtype, sizes):
    rows = np.random.default_rng(0).standard_normal((sum(sizes), 5, 2)).astype(dtype)
    file = NpyFile(tmp_path / "x.npy", (5, 2), np.dtype(dtype))
    for part in np.split(rows, np.cumsum(sizes)[:-1] if sizes else []):
        file.append(part)
    file.close()
    file.close()
    expected = io.BytesIO()
    np.save(expected, rows)
    assert (tmp_path / "x.npy").read_bytes() == expected.getvalue()
    found = np.load(tmp_path / "x.npy").view(dtype)
    np.testing.assert_array_equal(found.astype(np.float32), rows.astype(np.float32))


def test_bfloat16_is_not_taken_for_numbers(tmp_path):
    file = NpyFile(tmp_path / "x.npy", (4,), np.dtype(ml_dtypes.bfloat16))
    file.append(np.ones((2, 4), ml_dtypes.bfloat16))
    file.close()
    stored = np.load(tmp_path / "x.npy")
    assert stored.dtype == np.dtype("V2")
    with pytest.raises(TypeError):
        stored + stored
