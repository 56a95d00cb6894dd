"""Position embeddings and relative position tables taken to other sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flora_jax.weights.resample import resample_pos_embed, resample_relative_position_table


@pytest.fixture(scope="module")
def golden(data_dir):
    """timm's results for a 14 x 14 grid and of a window of 7."""
    with np.load(data_dir / "resample_embeddings.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("grid", [24, 10])
def test_pos_embed_is_timms(golden, grid):
    ours = resample_pos_embed(golden["pos_embed_14"][0], 1, grid)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, golden[f"pos_embed_{grid}"][0], atol=1e-5, rtol=0)


def test_relative_position_table_is_timms(golden):
    ours = resample_relative_position_table(golden["rel_table_7"], 12)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, golden["rel_table_12"], atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(side=st.integers(1, 8), grid=st.integers(1, 8), prefix=st.integers(0, 2))
def test_pos_embed_of_any_grid(side, grid, prefix):
    rng = np.random.default_rng(side)
    before = rng.normal(size=(prefix + side * side, 3)).astype(np.float32)
    after = resample_pos_embed(before, prefix, grid)
    assert after.shape == (prefix + grid * grid, 3)
    np.testing.assert_array_equal(after[:prefix], before[:prefix])
    flat = np.ones_like(before) * np.float32([1, -2, 3])
    np.testing.assert_allclose(resample_pos_embed(flat, prefix, grid), [[1, -2, 3]] * len(after))
    if side == grid:
        np.testing.assert_array_equal(after, before)


@settings(max_examples=30)
@given(source=st.integers(2, 8), window=st.integers(1, 8))
def test_relative_position_table_of_any_window(source, window):
    rng = np.random.default_rng(source)
    before = rng.normal(size=((2 * source - 1) ** 2, 2)).astype(np.float32)
    after = resample_relative_position_table(before, window)
    assert after.shape == ((2 * window - 1) ** 2, 2)
    centres = (len(after) // 2, len(before) // 2)  # no offset at all stays no offset
    np.testing.assert_allclose(after[centres[0]], before[centres[1]], rtol=1e-6)
    if source == window:
        np.testing.assert_array_equal(after, before)
    # Turning all offsets round turns the result round.
    np.testing.assert_allclose(
        resample_relative_position_table(before[::-1], window)[::-1], after, atol=1e-5
    )


def test_pos_embed_without_a_square_grid():
    with pytest.raises(ValueError, match=r"10 patches make no square grid"):
        resample_pos_embed(np.zeros((11, 4), np.float32), 1, 3)
    with pytest.raises(ValueError, match="0 patches make no square grid"):
        resample_pos_embed(np.zeros((1, 4), np.float32), 1, 3)


@pytest.mark.parametrize("rows", [0, 1, 10, 16])
def test_table_of_no_window(rows):
    with pytest.raises(ValueError, match=f"table of {rows} rows belongs to no window"):
        resample_relative_position_table(np.zeros((rows, 2), np.float32), 3)
