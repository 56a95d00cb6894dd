"""Which subnet each step of a supernet trains."""

import numpy as np
import pytest

from flora_jax.flora.sampling import nested_law, sandwich_law, space_law


def test_draws_depend_on_seed_and_step_alone(tiny_space):
    profiles = np.array([[0] * 6, [1, 0, 1, 0, 1, 0], [2] * 6])
    for make in (
        lambda seed: space_law(tiny_space, "low_rank_aware", seed),
        lambda seed: sandwich_law(tiny_space, seed),
        lambda seed: nested_law(tiny_space, profiles, seed),
    ):
        draws = [[make(seed)(step) for step in range(60)] for seed in (0, 0, 1)]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.array_equal(draws[0], draws[2])
        assert all(tiny_space.contains(genes).all() for genes in draws[0])


def test_sandwich_takes_turns_between_largest_smallest_and_a_drawn_one(tiny_space):
    draw = sandwich_law(tiny_space, seed=0)
    for step in range(0, 30, 3):
        np.testing.assert_array_equal(draw(step), tiny_space.full_rank_genes)
        np.testing.assert_array_equal(draw(step + 1), tiny_space.cheapest_genes)
    assert len({tuple(draw(step)) for step in range(2, 60, 3)}) > 10


def test_nested_draws_stay_near_their_path(tiny_space):
    profiles = np.array([[0] * 6, [1] * 6, [2] * 6])
    draw = nested_law(tiny_space, profiles, seed=0)
    off = np.array([min(abs(draw(s) - profile).sum() for profile in profiles) for s in range(300)])
    assert 0.3 < off.mean() < 0.7  # six genes, each astray with a chance of 0.1, some clipped
    assert off.max() <= 4


@pytest.mark.parametrize("step", [0, 7])
def test_published_law_is_the_space_s_own(tiny_space, step):
    expected = tiny_space.sample(np.random.default_rng([3, step]), 1, "low_rank_aware")[0]
    np.testing.assert_array_equal(space_law(tiny_space, "low_rank_aware", 3)(step), expected)
