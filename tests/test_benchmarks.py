"""Benchmarks run and print what their documentation says; what they make of real material."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from benchmarks import clip_art
from benchmarks.seeds import comparison, mean_over_seeds, summary
from tests.helpers.commands import run_benchmark


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, last_line",
    [
        ("load.py --model deit_t", "GiB"),
        ("step.py --model two_blocks --batch 1 --rounds 1 --fitted 2 --without torch dense", "R2"),
        ("step_profile.py --model two_blocks --batch 1 --steps 1", "page faults"),
        *(
            pytest.param(*case, marks=pytest.mark.faults)
            for case in (
                ("data.py --images 4 --batch 2 --batches 1 --rounds 1", "train, 2 workers"),
                (
                    "scoring.py --model two_blocks --batch 1 --rounds 1 --triples 2",
                    "time of one by one",
                ),
                (
                    "subnet.py --model two_blocks --batch 1 --rounds 1 --subnets 1",
                    "FLORA on ViT-Slim",
                ),
                ("compile.py --model two_blocks --batch 1", "peak of sliced over masked"),
                ("checkpoints.py --every 2 --intervals 2 --rounds 1", "cost of checkpoints"),
                ("closed_form_scaling.py --model two_blocks --skip_compiling", "| v5e:4x4 |"),
            )
        ),
    ],
)
def test_benchmark_runs(program, last_line):
    done = run_benchmark(*program.split())
    assert done.returncode == 0, done.stderr
    assert last_line in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program, line",
    [
        ("halving.py RUN --seeds 0", r"^1 errors: \d+ % of the images.* a level one in [01] of 1"),
        ("trials.py search_metric RUN --subnets 4 --splits 2", r"^ +\d+ +[-\d.n]"),
        ("trials.py supernets RUN --subnets 1", r"^random, .*: 1 subnets\n +[\d.]+ %"),
        (
            "front.py --runs RUN --others same RUN --out PICTURE",
            r"^subnet against same at \d+ % of .*: \+0\.00 \(\+0\.00\.\.\+0\.00\) points",
        ),
    ],
)
def test_trials_on_a_finished_run(finished_run, tmp_path, program, line):
    named = program.replace("RUN", str(finished_run)).replace("PICTURE", str(tmp_path / "a.png"))
    done = run_benchmark(*named.split(), "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    assert re.search(line, done.stdout, re.MULTILINE)
    found = json.loads((tmp_path / "found.json").read_text())
    assert "jax" in found["machine"]
    assert found["ratios"]


def test_summary_of_seeds_and_of_several_budgets():
    runs = [
        {
            "dense": {"top1": dense, "macs": 100, "params": 50},
            "subnet": {"top1": subnet, "macs": 40, "params": 20},
        }
        for dense, subnet in ((0.99, 0.98), (0.97, 0.98))
    ]
    dense, subnet = summary(runs).splitlines()[2:]
    assert dense == "| dense | 99.00, 97.00 | 98.00 ± 1.41 | +0.00 | 0.0 % | 0.0 % |"
    assert subnet == "| subnet | 98.00, 98.00 | 98.00 ± 0.00 | +0.00 | 60.0 % | 60.0 % |"
    budgets = [runs[0]["subnet"] | {"budget": [high - 0.05, high]} for high in (0.4, 0.55)]
    rows = summary([runs[0] | {"subnet": budgets}]).splitlines()[3:]
    assert [row.split("|")[1] for row in rows] == [" subnet 0.4 ", " subnet 0.55 "]


def test_comparison_over_seeds(tmp_path):
    """Two seeds that err on other images, each on one in ten more than uniform does."""
    labels, wrong = np.zeros(100, np.int32), np.arange(100) % 10
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        tensors = {"label": labels + seed // 2}
        for name, is_correct in (("uniform 0.55", wrong >= 0), ("subnet 0.55", wrong != seed)):
            tensors[f"{name}/is_correct"] = is_correct.astype(np.uint8)
            tensors[f"{name}/log_likelihood"] = -np.ones(100, np.float32) / (1 + is_correct)
            tensors[f"{name}/predicted"] = labels
        save_file(tensors, path)
    found = mean_over_seeds(paths[:2])
    np.testing.assert_array_equal(found["subnet 0.55"]["is_correct"], 1 - 0.5 * (wrong < 2))
    (row,) = comparison(paths[:2]).splitlines()[2:]
    assert row.startswith("| subnet 0.55 | uniform 0.55 | -10.00 (-1")
    assert "| -0.0500 (-0.0" in row
    with pytest.raises(SystemExit, match=r"2\.safetensors is of other test images than .*0\.saf"):
        comparison(paths)
    with pytest.raises(SystemExit, match=r"9\.safetensors is missing"):
        comparison([*paths, tmp_path / "9.safetensors"])


def drawing(seed: int, category: str = "animals") -> clip_art.Drawing:
    pixels = np.random.default_rng(seed).integers(0, 200, (4, 4, 3), np.uint8)
    large = np.asarray(Image.fromarray(pixels).resize((128, 128)))
    return clip_art.Drawing(category, f"{seed}.png", large)


def house(wall: str, at: tuple[int, int] = (0, 0), page: int = 400) -> Image.Image:
    picture = Image.new("RGBA", (page, page))
    draw, (x, y) = ImageDraw.Draw(picture), at
    draw.polygon([(x, y + 60), (x + 50, y), (x + 100, y + 60)], fill="black")
    draw.rectangle((x + 10, y + 60, x + 90, y + 120), fill=wall)
    draw.rectangle((x + 40, y + 80, x + 60, y + 120), fill="black")
    return picture


def as_drawing(picture: Image.Image, name: str) -> clip_art.Drawing:
    return clip_art.Drawing("buildings", name, clip_art.square(picture))


def names(groups: list[clip_art.Group]) -> set[frozenset[str]]:
    return {frozenset(drawing.name for drawing in group) for group in groups}


@pytest.fixture
def groups() -> list[clip_art.Group]:
    """100 drawings: 40 alone, 10 pairs, 5 of 5, and 15 alike."""
    drawings = iter(map(drawing, range(100)))
    sizes = [1] * 40 + [2] * 10 + [5] * 5 + [15]
    return [[next(drawings) for _ in range(size)] for size in sizes]


@pytest.mark.parametrize(("most", "train", "val"), [(700, 70, 30), (50, 35, 15)])
def test_split_keeps_groups_whole_and_the_fraction(groups, most, train, val):
    sides = clip_art.split(groups, 0.3, most)
    assert {side: sum(map(len, chosen)) for side, chosen in sides.items()} == {
        "train": train,
        "val": val,
    }
    assert names(sides["train"]) | names(sides["val"]) <= names(groups)
    assert not names(sides["train"]) & names(sides["val"])
    mixed = [groups[i][::-1] for i in np.random.default_rng(0).permutation(len(groups))]
    again = clip_art.split(mixed, 0.3, most)
    assert all(names(sides[side]) == names(again[side]) for side in sides)


def test_recoloured_and_moved_drawings_are_near_duplicates():
    drawings = [
        as_drawing(house("gray"), "gray"),
        as_drawing(house("tomato"), "red"),
        as_drawing(house("gray", at=(250, 90)), "moved"),
        as_drawing(house("gray").rotate(90), "turned"),
    ]
    groups = clip_art.near_duplicates(clip_art.distinct(drawings))
    # Where the drawing lies on its page is cut away: "moved" is "gray", the first in the alphabet.
    assert names(groups) == {frozenset({"gray", "red"}), frozenset({"turned"})}


def test_equal_drawings_are_kept_once_a_class():
    drawings = [drawing(0), drawing(0), drawing(0, "food"), drawing(1)]
    kept = clip_art.distinct(drawings)
    found = sorted((one.category, one.name) for one in kept)
    assert found == [("animals", "0.png"), ("animals", "1.png"), ("food", "0.png")]
    # Those in two classes are one group, which tells that the class is in doubt.
    assert sorted(map(len, clip_art.near_duplicates(kept))) == [1, 2]
