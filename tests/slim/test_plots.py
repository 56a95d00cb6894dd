"""Figures of a slimmed network: what is drawn is what was given."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from flora_jax.report import slim_figures
from flora_jax.report.data import Slimming
from flora_jax.report.figures import sheet
from flora_jax.slim import Masks

pytestmark = pytest.mark.slow


THRESHOLDS = {"attn": 0.3, "mlp": 0.5, "patch": 0.6}


def network(blocks=4, heads=2, head_dim=8, hidden=32, tokens=17, seed=0):
    """Random gates and the masks of THRESHOLDS; block 1 loses head 0; a token that left is away."""
    rng = np.random.default_rng(seed)
    gates = {
        "attn": [rng.random((heads, head_dim)) for _ in range(blocks)],
        "mlp": [rng.random(hidden) for _ in range(blocks)],
        "patch": [rng.random(tokens) for _ in range(blocks if tokens else 0)],
    }
    gates["attn"][1][0] = 0.1
    masks = {kind: [gate >= THRESHOLDS[kind] for gate in gates[kind]] for kind in gates}
    patch = [np.any(masks["patch"][b:], axis=0) for b in range(len(masks["patch"]))]
    for mask in patch:
        mask[0] = True
    thresholds = {kind: THRESHOLDS[kind] for kind in gates if gates[kind]}
    return gates, Masks(tuple(masks["attn"]), tuple(masks["mlp"]), tuple(patch), thresholds)


def photo(side=32):
    return np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_gates_and_their_threshold():
    gates, _ = network()
    ax = Figure().subplots()
    slim_figures.plot_gates(ax, gates["attn"], 0.3, "#123456")
    values = np.concatenate(gates["attn"]).ravel()
    counts, edges = np.histogram(values, bins=40)
    assert [bar.get_height() for bar in ax.patches] == counts.tolist()
    np.testing.assert_allclose([bar.get_x() for bar in ax.patches], edges[:-1])
    assert list(ax.lines[0].get_xdata()) == [0.3, 0.3]
    assert legend_texts(ax) == ["threshold 0.3"]


@pytest.mark.parametrize("tokens", [17, 0])
def test_kept_shares_of_every_block(tokens):
    _, masks = network(tokens=tokens)
    ax = Figure().subplots()
    slim_figures.plot_kept(ax, masks)
    kinds = [kind for kind in (masks.attn, masks.mlp, masks.patch) if kind]
    assert len(ax.containers) == len(kinds) == 2 + bool(tokens)
    for bars, kind in zip(ax.containers, kinds, strict=True):
        heights = [bar.get_height() for bar in bars]
        np.testing.assert_allclose(heights, [100 * mask.mean() for mask in kind])
    (heads,) = ax.lines
    assert heads.get_ydata().tolist() == [100, 50, 100, 100]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.containers[0]]
    np.testing.assert_allclose(heads.get_xdata(), centres)
    names = ["heads", "attention dimensions", "MLP units", "tokens"]
    assert legend_texts(ax) == names[: 1 + len(kinds)]


def test_dimensions_of_every_head():
    _, masks = network()
    wider = Masks((*masks.attn[:3], np.eye(3, 8, dtype=bool)), masks.mlp, masks.patch, {})
    ax = Figure().subplots()
    slim_figures.plot_heads(ax, wider)
    shares = ax.collections[0].get_array()
    assert shares.shape == (3, 4)
    for b, mask in enumerate(wider.attn):
        np.testing.assert_allclose(shares[: len(mask), b], 100 * mask.mean(1))
    assert np.ma.getmaskarray(shares)[2].tolist() == [True, True, True, False]
    assert legend_texts(ax) == ["head cut"]


def test_dropped_patches_turn_grey():
    image = photo(8) / 255
    kept = np.ones(16, bool)
    kept[[0, 5]] = False
    shown = slim_figures.faded(image, kept)
    dropped = np.zeros((8, 8), bool)
    dropped[:2, :2] = dropped[2:4, 2:4] = True
    np.testing.assert_array_equal(shown[~dropped], image[~dropped])
    assert np.ptp(shown[dropped], axis=-1).max() == 0
    assert shown[dropped].min() > 0.5


@pytest.mark.parametrize(
    "image", [photo(), photo(8)[..., :1], photo(224) / 255], ids=["uint8", "grey", "float"]
)
def test_panels_of_a_vit(image):
    gates, masks = network(blocks=6)
    panels = slim_figures.slim_panels(Slimming(gates, masks, image))
    shares = [100 * np.mean(kind) for kind in (masks.attn, masks.mlp, masks.patch)]
    assert [panel.title for panel in panels] == [
        f"Attention dimensions: {shares[0]:.1f} % kept",
        f"MLP units: {shares[1]:.1f} % kept",
        f"Tokens: {shares[2]:.1f} % kept",
        "What every block keeps",
        "Dimensions of every head",
        "Patches that stay",
    ]
    ax = Figure().subplots()
    panels[-1].draw(ax)
    maps = [f"block {b}\n{masks.patch[b][1:].sum()} of 16" for b in (0, 2, 3, 5)]
    assert [text.get_text() for text in ax.texts] == ["image\n16 patches", *maps]
    assert len(ax.images) == 5


@pytest.mark.parametrize("tokens", [17, 0])
def test_no_map_without_an_image_or_token_gates(tokens):
    data = Slimming(*network(tokens=tokens), None if tokens else photo())
    titles = [panel.title for panel in slim_figures.slim_panels(data)]
    assert "Patches that stay" not in titles
    assert sum("% kept" in title for title in titles) == 2 + bool(tokens)


@pytest.mark.parametrize(
    "sizes",
    [
        {"blocks": 12, "heads": 6, "head_dim": 64, "hidden": 1536, "tokens": 197},
        {"blocks": 6, "heads": 2, "head_dim": 32, "hidden": 256, "tokens": 17},
        {"blocks": 24, "heads": 12, "head_dim": 32, "hidden": 512, "tokens": 0},
    ],
    ids=["deit", "digits", "swin"],
)
def test_texts_do_not_overlap(sizes):
    panels = slim_figures.slim_panels(Slimming(*network(**sizes), photo(56)))
    figure = sheet(panels, "example")
    figure.draw_without_rendering()
    hidden = {
        tick.label1
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not axis.get_view_interval()[0] <= tick.get_loc() <= axis.get_view_interval()[1]
    }
    texts = set(figure.findobj(lambda part: isinstance(part, Text) and part.get_text())) - hidden
    drawn = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_visible()]
    assert len(drawn) > 50
    pairs = itertools.combinations(drawn, 2)
    assert [(a, b) for (a, box), (b, other) in pairs if box.overlaps(other)] == []
