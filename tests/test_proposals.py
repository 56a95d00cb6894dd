"""How genes come from genes: crossover, mutation, and neighbours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.flora.evolution import cross_blocks, mutate, nearest_kept, neighbours
from tests.helpers.searching import LEAST, MOST, REGULAR, SPACE, TARGET, unhurried


@given(st.integers(0, 2**32))
def test_crossover_takes_whole_blocks(seed):
    rng = np.random.default_rng(seed)
    mothers, fathers = SPACE.sample(rng, 16), SPACE.sample(rng, 16)
    children = cross_blocks(rng, mothers, fathers)
    blocks = [genes.reshape(16, SPACE.num_blocks, 3) for genes in (children, mothers, fathers)]
    from_mother, from_father = ((blocks[0] == parent).all(axis=-1) for parent in blocks[1:])
    assert (from_mother | from_father).all()
    assert SPACE.contains(children).all()
    assert 0 < from_mother.mean() < 1


def test_mutants_redraw_blocks_at_the_given_rate():
    rng = np.random.default_rng(0)
    parents = SPACE.sample(rng, 5000)
    mutants = mutate(rng, SPACE, parents, 0.2)
    assert SPACE.contains(mutants).all()
    changed = (mutants != parents).reshape(5000, SPACE.num_blocks, 3).any(axis=-1).mean()
    assert changed == pytest.approx(0.2 * 0.99, abs=0.01)  # one draw in a hundred is the old one
    np.testing.assert_array_equal(mutate(rng, SPACE, parents, 0.0), parents)


def test_the_nearest_kept_triples():
    space = REGULAR.keep([[(0, 0, 1), (3, 3, 1)], [(1, 0, 0), (0, 0, 1)], [(2, 2, 2)], [(6, 6, 6)]])
    found = nearest_kept(space, [2, 2, 1, 0, 0, 0, 6, 6, 6, 6, 6, 6])
    # In block 1 both are one step away, and qkv's costs less than fc2's.
    assert found.tolist() == [3, 3, 1, 1, 0, 0, 2, 2, 2, 6, 6, 6]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(nearest_kept(space, found), found)


@unhurried
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_neighbours_are_kept_and_near(seed, count):
    rng = np.random.default_rng(seed)
    genes = REGULAR.sample(rng, 1)[0]
    start = nearest_kept(SPACE, genes)
    found = neighbours(SPACE, genes, count, rng)
    assert found.shape == (count, SPACE.num_layers)
    assert found.dtype == np.int32
    assert len(np.unique(found, axis=0)) == count
    assert SPACE.contains(found).all()
    changed = (found != start).reshape(count, -1, 3).any(axis=-1).sum(axis=1)
    assert np.isin(changed, [1, 2]).all()
    assert np.abs(SPACE.macs(found) - SPACE.macs(start)).mean() < 0.02 * (MOST - LEAST)


def test_a_point_has_no_neighbours():
    point = SPACE.keep(triples[:1] for triples in SPACE.kept)
    assert neighbours(point, TARGET, 5, np.random.default_rng(0)).shape == (0, 12)
