"""Ten thousand labelled pictures that anyone can fetch: the emojis of four vendors.

    python benchmarks/emoji.py --out runs/material/emoji

Writes OUT/N/{train,heldout,val}/CLASS/*.png for N = 1000, 3000 and all, pictures of 64 px on white.
Classes are the Unicode subgroups of at least eight emojis (`animal-bird`, `place-building`). The
pictures are those of the npm packages emoji-datasource-{apple,google,twitter,facebook}, which
`npm pack` downloads into OUT/download unless they are there: of each emoji the plain one and, where
there are any, three of its skin tones. All pictures of an emoji are on one side of the split: a
fifth of the emojis of each class to report on, a twentieth to choose with, all others to train on.
The smaller sets hold whole emojis too, the same share of each class, and report on the same
pictures. The table that is printed counts the pictures.
"""

import argparse
import collections
import hashlib
import io
import json
import math
import pathlib
import subprocess
import tarfile
from collections.abc import Iterator

from PIL import Image

VENDORS = ("apple", "google", "twitter", "facebook")
LEAST_EMOJIS, TONES = 8, 3
SIDES = {"val": 0.2, "heldout": 0.05}
SIZES = (1000, 3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    out: pathlib.Path = arguments.out
    if (out / "all").exists():
        parser.error(f"{out / 'all'} exists: remove it, or name another folder")

    pictures, listed = {}, []
    for vendor in VENDORS:
        pictures[vendor], listed = read(package(vendor, out / "download"), vendor)
    classes = emojis_by_class(listed)
    sides = collections.defaultdict(list)
    for emojis in classes.values():
        for side, chosen in split(emojis).items():
            sides[side].append(chosen)

    def files(emoji: dict) -> Iterator[tuple[str, bytes]]:
        for vendor, of_vendor in pictures.items():
            for image in emoji["images"]:
                if image in of_vendor:
                    yield f"{emoji['unified']}_{image[:-4]}_{vendor}.png", of_vendor[image]

    wanted = {"all": sides}
    num_train = sum(len(list(files(emoji))) for chosen in sides["train"] for emoji in chosen)
    for size in SIZES:
        share = size / num_train
        few = [chosen[: math.ceil(share * len(chosen))] for chosen in sides["train"]]
        wanted[str(size)] = sides | {"train": few}
    print(f"{'set':8}{'classes':>9}" + "".join(f"{side:>9}" for side in ("train", *SIDES)))
    for name, parts in wanted.items():
        counts = collections.Counter()
        for side, chosen in parts.items():
            for emoji in (emoji for emojis in chosen for emoji in emojis):
                folder = out / name / side / emoji["subcategory"].replace(" ", "")
                folder.mkdir(parents=True, exist_ok=True)
                for file, png in files(emoji):
                    write(png, folder / file)
                    counts[side] += 1
        counted = "".join(f"{counts[side]:>9}" for side in ("train", *SIDES))
        print(f"{name:8}{len(classes):>9}{counted}")


def package(vendor: str, folder: pathlib.Path) -> pathlib.Path:
    """The package of a vendor, downloaded into the folder unless it is there."""
    name = f"emoji-datasource-{vendor}"
    if not any(folder.glob(f"{name}-*.tgz")):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", name], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return max(folder.glob(f"{name}-*.tgz"))


def read(package: pathlib.Path, vendor: str) -> tuple[dict[str, bytes], list[dict]]:
    """The pictures of 64 px by their file names, and the list of all emojis."""
    pictures, listed = {}, []
    with tarfile.open(package) as archive:
        for member in archive:  # in their order: going back means unpacking anew
            if member.name.startswith(f"package/img/{vendor}/64/") and member.isfile():
                pictures[pathlib.Path(member.name).name] = archive.extractfile(member).read()
            elif member.name == "package/emoji.json":
                listed = json.load(archive.extractfile(member))
    return pictures, listed


def emojis_by_class(listed: list[dict]) -> dict[str, list[dict]]:
    """Emojis of each class in the order of a hash; "images" are the files of those to take."""
    classes = collections.defaultdict(list)
    for emoji in sorted(listed, key=lambda emoji: digest(emoji["unified"])):
        tones = [tone["image"] for tone in emoji.get("skin_variations", {}).values()]
        chosen = sorted(tones, key=digest)[:TONES]
        classes[emoji["subcategory"]].append(emoji | {"images": [emoji["image"], *chosen]})
    return {name: classes[name] for name in sorted(classes) if len(classes[name]) >= LEAST_EMOJIS}


def split(emojis: list[dict]) -> dict[str, list[dict]]:
    """Emojis of one class for each side; at least one for each."""
    sides, start = {}, 0
    for side, share in SIDES.items():
        end = start + max(1, round(share * len(emojis)))
        sides[side], start = emojis[start:end], end
    return sides | {"train": emojis[start:]}


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write(png: bytes, path: pathlib.Path) -> None:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(white, picture).convert("RGB").save(path)


if __name__ == "__main__":
    main()
