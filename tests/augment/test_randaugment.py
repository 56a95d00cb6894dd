"""RandAugment's operations against timm's pixels, and the law of their draws."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flora_jax.data import pixels
from flora_jax.data.pixels import OPERATIONS

repeatable = settings(derandomize=True, deadline=None, max_examples=25)


seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def calls(golden):
    """[(operation, magnitude with its sign, what timm made of it, output)]"""
    return [
        (
            call["op"],
            -call["magnitude"] if call["negated"] else call["magnitude"],
            call["args"],
            golden[f"op{index}"],
        )
        for index, call in enumerate(json.loads(str(golden["calls_json"])))
    ]


def test_the_operations_are_those_of_timms_increasing_set(golden, calls):
    assert len(OPERATIONS) == 15
    assert {name for name, *_ in calls} == OPERATIONS.keys()
    for call in json.loads(str(golden["calls_json"])):
        assert OPERATIONS[call["op"]].signed == (call["negated"] is not None)


def test_operations_agree_with_timm_pixel_for_pixel(image, calls):
    assert len(calls) == 95
    for name, magnitude, _, expected in calls:
        output = np.asarray(OPERATIONS[name](Image.fromarray(image), magnitude))
        np.testing.assert_array_equal(output, expected, err_msg=f"{name} at {magnitude}")


def test_magnitudes_become_timms_arguments(calls):
    for name, magnitude, arguments, _ in calls:
        argument = OPERATIONS[name].argument
        resolved = [] if argument is None else [argument(magnitude)]
        assert resolved == pytest.approx(arguments, abs=1e-12), f"{name} at {magnitude}"


def test_posterize_keeps_one_bit_at_the_largest_magnitude(image):
    posterize = OPERATIONS["PosterizeIncreasing"]
    assert posterize.argument(10) == 1
    assert set(np.unique(posterize(Image.fromarray(image), 10))) <= {0, 128}


def test_two_operations_are_drawn_uniformly_and_each_is_kept_with_probability_one_half():
    rng = np.random.default_rng(0)
    draws = [pixels.draw_operations(rng) for _ in range(6000)]
    counts = Counter(len(draw) for draw in draws)
    for number, share in enumerate((1 / 4, 1 / 2, 1 / 4)):
        assert counts[number] / 6000 == pytest.approx(share, abs=0.03)
    names = Counter(name for draw in draws for name, _ in draw)
    for name in OPERATIONS:
        assert names[name] == pytest.approx(6000 / 15, rel=0.2)
    pairs = [draw for draw in draws if len(draw) == 2]
    repeated = np.mean([first == second for (first, _), (second, _) in pairs])
    assert repeated == pytest.approx(1 / 15, abs=0.025)


def test_magnitudes_are_normal_about_nine_and_half_of_the_signed_ones_negative():
    rng = np.random.default_rng(0)
    drawn = [pair for _ in range(6000) for pair in pixels.draw_operations(rng)]
    signed = [magnitude for name, magnitude in drawn if OPERATIONS[name].signed]
    unsigned = [magnitude for name, magnitude in drawn if not OPERATIONS[name].signed]
    assert np.mean(np.array(signed) < 0) == pytest.approx(0.5, abs=0.04)
    assert min(unsigned) >= 0
    magnitudes = np.abs([*signed, *unsigned])
    assert magnitudes.max() == 10
    assert np.median(magnitudes) == pytest.approx(9, abs=0.05)
    # One deviation to either side of the mean, and what is clipped beyond the second.
    assert np.quantile(magnitudes, [0.1587, 0.8413]) == pytest.approx([8.5, 9.5], abs=0.05)
    assert np.mean(magnitudes == 10) == pytest.approx(0.0228, abs=0.008)


@repeatable
@given(seeds, st.floats(0, 10), st.floats(0, 20), st.integers(1, 4))
def test_drawn_magnitudes_lie_in_the_range_of_the_operations(seed, magnitude, std, number):
    drawn = pixels.draw_operations(np.random.default_rng(seed), magnitude, std, number)
    assert len(drawn) <= number
    for _, strength in drawn:
        assert -10 <= strength <= 10


@repeatable
@given(seeds)
def test_rand_augment_does_the_drawn_operations_in_order(image, seed):
    drawn = pixels.draw_operations(np.random.default_rng(seed), num_operations=3)
    expected = Image.fromarray(image)
    for name, strength in drawn:
        expected = OPERATIONS[name](expected, strength)
    output = pixels.rand_augment(image, np.random.default_rng(seed), num_operations=3)
    assert (output.dtype, output.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(output, np.asarray(expected))


@pytest.mark.parametrize("shape, dtype", [((8, 8, 1), "uint8"), ((8, 8, 3), "float32")])
def test_rand_augment_refuses_what_is_no_colour_image(shape, dtype):
    with pytest.raises(ValueError, match=f"colour images.*got {dtype}"):
        pixels.rand_augment(np.zeros(shape, dtype), np.random.default_rng(0))
