"""A real labelled folder of images that anyone can fetch: Debian's openclipart.

    python benchmarks/clip_art.py --out runs/material/clip_art

Writes OUT/{train,val}/CLASS/*.png, which `--config.data.name=folder:OUT` trains on. The classes are
categories of the package openclipart-png, which apt-get downloads into OUT/download unless it is
there: public-domain drawings on transparent pages. Each drawing is put on white, cut out, and
fitted into a white square of 128 px.

The package is full of variants: decks of cards, colours of one button, clocks at every hour. Near
duplicates, found by a perceptual hash, form groups. A group in several classes says nothing about
either and is dropped; every other one is on one side of the split as a whole. Which side depends
on the contents alone. One row of the table that is printed counts a class: pictures to train and
to validate on, their groups, and how many pictures of the package were dropped (copies, in several
classes, over --most, blank, tiny or huge).
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

PACKAGE, PICTURES = "openclipart-png", "usr/share/openclipart/png"
# Not those with too few pictures, nor `shapes`, of which nine in ten are generated stars.
CLASSES = (
    *("animals", "buildings", "computer", "food", "geography", "office"),
    *("people", "plants", "recreation", "signs_and_symbols", "tools", "transportation"),
)
SIDE = 128
LEAST_SIDE, MOST_PIXELS = 32, 40_000_000  # of the drawing; of the file
PAPER = 248  # grey of what counts as paper, 255 being white
CELLS, STEP = 16, 2  # of the perceptual hash: its grid, and the least step of grey that counts
NEAR = 32  # of its 512 bits: recoloured pictures differ in up to so many, others seldom do


@dataclasses.dataclass(frozen=True, eq=False)
class Drawing:
    """pixels: uint8 [H, W, 3]"""

    category: str
    name: str
    pixels: np.ndarray

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.blake2b(self.pixels.tobytes(), digest_size=16).hexdigest()


Group = list[Drawing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    parser.add_argument("--deb", type=pathlib.Path, help="the package, where it is on disk already")
    parser.add_argument("--val_fraction", type=float, default=0.3)
    parser.add_argument("--most", type=int, default=700, help="pictures of a class")
    arguments = parser.parse_args()
    if not 0 < arguments.val_fraction < 1:
        parser.error(f"--val_fraction must lie between 0 and 1, got {arguments.val_fraction}")
    for side in ("train", "val"):
        if (arguments.out / side).exists():
            parser.error(f"{arguments.out / side} exists: remove it, or name another folder")

    with tempfile.TemporaryDirectory() as folder:
        run("dpkg-deb", "-x", arguments.deb or fetch(arguments.out / "download"), folder)
        found, drawings = read(pathlib.Path(folder) / PICTURES)
    groups = collections.defaultdict(list)
    for group in near_duplicates(distinct(drawings)):
        if len({drawing.category for drawing in group}) == 1:
            groups[group[0].category].append(group)

    print(f"{'class':20}{'train':>7}{'val':>7}{'groups':>8}{'dropped':>9}")
    for category in CLASSES:
        sides = split(groups[category], arguments.val_fraction, arguments.most)
        for side, chosen in sides.items():
            write([drawing for group in chosen for drawing in group], arguments.out / side)
        train, val = (sum(map(len, chosen)) for chosen in sides.values())
        kept, dropped = sum(map(len, sides.values())), found[category] - train - val
        print(f"{category:20}{train:>7}{val:>7}{kept:>8}{dropped:>9}")


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """The package, downloaded into the folder unless it is there."""
    pattern = f"{PACKAGE}_*.deb"
    if not any(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", PACKAGE, cwd=folder)
    return max(folder.glob(pattern))


def run(*command: object, cwd: pathlib.Path | None = None) -> None:
    words = list(map(str, command))
    try:
        subprocess.run(words, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        what = error if isinstance(error, OSError) else f"{words[0]} failed"
        raise SystemExit(f"{what}; --deb takes a file of the package {PACKAGE}") from None


def read(folder: pathlib.Path) -> tuple[collections.Counter[str], list[Drawing]]:
    """Counts of the pictures of each class in the folder, and the drawings that they hold."""
    paths = [path for category in CLASSES for path in sorted((folder / category).rglob("*.png"))]
    files = sorted({path.resolve() for path in paths})  # many are links to others
    Image.MAX_IMAGE_PIXELS = None  # `square` has its own limit
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        squares = dict(zip(files, pool.map(open_square, files), strict=True))
    found, drawings = collections.Counter(), []
    for path in paths:
        category, *inside = path.relative_to(folder).parts
        found[category] += 1
        if (pixels := squares[path.resolve()]) is not None:
            drawings.append(Drawing(category, "-".join(inside), pixels))
    return found, drawings


def open_square(path: pathlib.Path) -> np.ndarray | None:
    with Image.open(path) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            return None
        return square(picture.convert("RGBA"))


def square(picture: Image.Image) -> np.ndarray | None:
    """The drawing on an RGBA page, uint8 [SIDE, SIDE, 3]; None where there is none to speak of."""
    white = Image.new("RGBA", picture.size, "white")
    page = Image.alpha_composite(white, picture).convert("RGB")
    drawing = page.crop(drawn_box(page))
    short, long = sorted(drawing.size)
    if long < LEAST_SIDE or short * SIDE < long:
        return None
    return np.asarray(ImageOps.pad(drawing, (SIDE, SIDE), color="white"))


def drawn_box(page: Image.Image) -> tuple[int, int, int, int]:
    """Box of what is not white: left, top, right, bottom; all 0 where all is white."""
    is_drawn = page.convert("L").point(lambda grey: 255 * (grey < PAPER))
    return is_drawn.getbbox() or (0, 0, 0, 0)


def distinct(drawings: Iterable[Drawing]) -> Group:
    """One of the equal drawings of each class: the first by name, in whatever order they come."""
    by_name = sorted(drawings, key=lambda drawing: drawing.name, reverse=True)
    return list({(drawing.category, drawing.digest): drawing for drawing in by_name}.values())


def near_duplicates(drawings: Sequence[Drawing], distance: int = NEAR) -> list[Group]:
    """Groups of drawings that a chain of hashes, each near the next, links."""
    bits = np.stack([perceptual_hash(drawing.pixels) for drawing in drawings])
    signs = 2 * bits.astype(np.float32) - 1
    differing = (bits.shape[1] - signs @ signs.T) / 2
    _, numbers = connected_components(csr_matrix(differing <= distance), directed=False)
    groups = collections.defaultdict(list)
    for number, drawing in zip(numbers, drawings, strict=True):
        groups[number].append(drawing)
    return list(groups.values())


def perceptual_hash(pixels: np.ndarray) -> np.ndarray:
    """Signs of the steps of grey in the drawing without its margins: bool [2 * CELLS**2].

    Seen from left to right in the first half, from top to bottom in the second.
    """
    grey = Image.fromarray(pixels).convert("L")
    grey = grey.crop(drawn_box(grey))
    sizes = ((CELLS + 1, CELLS), (CELLS, CELLS + 1))
    across, down = (np.asarray(grey.resize(s, Image.Resampling.BOX), np.int16) for s in sizes)
    steps = np.diff(across, axis=1), np.diff(down, axis=0)
    return np.concatenate([step.ravel() for step in steps]) > STEP


def split(groups: Iterable[Group], val_fraction: float, most: int) -> dict[str, list[Group]]:
    """Whole groups of one class for train and val, `most` drawings in all.

    In the order of a hash of their contents they fill val, then train; one that is too large for
    what is left of val goes to train, and one that is too large for what is left of all to neither.
    """
    sides: dict[str, list[Group]] = {"train": [], "val": []}
    groups = sorted(groups, key=digest_of_group)
    left = min(most, sum(map(len, groups)))
    left_of_val = round(val_fraction * left)
    for group in groups:
        if len(group) > left:
            continue
        left -= len(group)
        if len(group) <= left_of_val:
            left_of_val -= len(group)
            sides["val"].append(group)
        else:
            sides["train"].append(group)
    return sides


def digest_of_group(group: Group) -> str:
    digests = sorted(drawing.digest for drawing in group)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def write(drawings: Iterable[Drawing], folder: pathlib.Path) -> None:
    for drawing in drawings:
        path = folder / drawing.category / drawing.name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawing.pixels).save(path)


if __name__ == "__main__":
    main()
