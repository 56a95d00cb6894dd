"""Folders without a split to report on: copies stay together, each class is in every part."""

import collections
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from flora_jax.data import copies, splits
from flora_jax.data.copies import near_duplicates, thumbnail
from flora_jax.data.subsets import split_by_content
from tests.helpers.pictures import keys, not_an_image, save, scene

COPIED = range(0, 40, 4)  # scenes of which there are copies


def smaller(picture):
    return picture.resize((picture.width * 7 // 10, picture.height * 7 // 10))


def cropped(picture):
    x, y = 0.015 * picture.width, 0.015 * picture.height
    return picture.crop((round(x), round(y), round(picture.width - x), round(picture.height - y)))


@pytest.fixture
def moths(tmp_path):
    """40 scenes in two classes, some of them with copies, one of which is in the other class."""
    folder = tmp_path / "moths"
    for i in range(40):
        picture = scene(i, (96, 72))
        here, other = ("hawk", "silk") if i % 2 else ("silk", "hawk")
        save(folder / here / f"{i}.png", picture, compress_level=1)
        if i in COPIED:
            save(folder / here / f"{i}-small.png", smaller(picture))
            save(folder / here / f"{i}-worse.jpg", picture, quality=60)
            save(folder / other / f"{i}-cut.bmp", cropped(picture))
    return folder


def parts(loaded) -> list[set[str]]:
    """Names of the files in train, heldout and test."""
    named = [keys(part) for part in (loaded.train, loaded.heldout, loaded.test)]
    return [{pathlib.PurePath(key).name for key in part} for part in named]


def test_copies_of_a_picture_stay_in_one_part(moths, caplog):
    caplog.set_level(logging.INFO)
    loaded = splits.load_splits(f"folder:{moths}", 0.2)
    found = parts(loaded)
    assert sorted(name for part in found for name in part) == sorted(
        path.name for path in moths.rglob("*.*")
    )
    for i in COPIED:
        copies_of_one = [f"{i}.png", f"{i}-small.png", f"{i}-worse.jpg", f"{i}-cut.bmp"]
        assert sum(not part.isdisjoint(copies_of_one) for part in found) == 1
    assert loaded.class_names == ("hawk", "silk")
    counts = [np.bincount(part.labels, minlength=2) for part in (loaded.test, loaded.heldout)]
    whole = np.array([30, 40])
    assert abs(counts[0] - whole / 4).max() <= 1
    assert abs(counts[1] - 0.2 * (whole - counts[0])).max() <= 1
    counts = tuple(map(len, found))
    assert str(loaded) == "{} images to train with, {} to choose by, {} to report on; ".format(
        *counts
    ) + ("2 classes; 10 groups of copies, 40 images, are kept together")


def test_names_order_and_the_seed_do_not_move_the_test_images(moths, tmp_path):
    loaded = splits.load_splits(f"folder:{moths}", 0.2)
    other_seed = splits.load_splits(f"folder:{moths}", 0.2, seed=1)
    assert parts(other_seed)[2] == parts(loaded)[2]
    assert parts(other_seed)[1] != parts(loaded)[1]

    renamed = {}
    for number, path in enumerate(sorted(moths.rglob("*.*"), key=lambda path: path.name[::-1])):
        renamed[path.name] = f"{number}{path.suffix}"
        path.rename(path.with_name("x" + renamed[path.name]))
    (moths / "hawk").rename(moths / "zebra")
    moths.rename(tmp_path / "train")
    again = splits.load_splits(f"folder:{tmp_path}", 0.2)
    expected = [{"x" + renamed[name] for name in part} for part in parts(loaded)]
    assert parts(again) == expected


def test_some_classes_and_held_out_images_of_ones_own(moths, tmp_path):
    save(moths / "owl/0.png", scene(90))  # too few, but not taken
    with pytest.raises(ValueError, match=r"3 parts, .* at least 3 images.*: owl has 1"):
        splits.load_splits(f"folder:{moths}")
    loaded = splits.load_splits(f"folder:{moths}", 0.2, classes=(2, 0))
    assert loaded.class_names == ("silk", "hawk")
    for part in (loaded.train, loaded.heldout, loaded.test):
        for i in range(len(part)):
            assert part[i]["label"] == ("silk", "hawk").index(part.key(i).split("/")[0])

    for name in ("hawk", "silk", "owl"):
        save(tmp_path / f"unseen/{name}/0.png", scene(91))
    save(moths / "owl/1.png", scene(92))
    own = splits.load_splits(f"folder:{moths}", heldout_split=f"{tmp_path}/unseen")
    assert own.heldout.labels.tolist() == [0, 1, 2]
    assert sorted(keys(own.train) + keys(own.test)) == sorted(
        path.relative_to(moths).as_posix() for path in moths.rglob("*.*")
    )


def test_no_copy_of_a_training_image_is_held_out_by_content(moths, tmp_path):
    for name in ("hawk", "silk"):
        save(tmp_path / f"val/{name}/0.png", scene(90))
    moths.rename(tmp_path / "train")
    by_name, by_content = (
        splits.load_splits(f"folder:{tmp_path}", 0.2, heldout_by=by) for by in splits.HELD_OUT_BY
    )
    assert keys(by_content.test) == keys(by_name.test)
    assert len(by_content.train) + len(by_content.heldout) == 70

    def torn_apart(loaded):
        drawings = [{name.split(".")[0].split("-")[0] for name in part} for part in parts(loaded)]
        return drawings[0] & drawings[1]

    assert torn_apart(by_name)
    assert not torn_apart(by_content)


def test_plain_pictures_are_copies_of_nothing():
    """Blank pages and flat colours, some with a speck; two equal files are one all the same."""
    flat = [np.full((50, 50, 3), value, np.uint8) for value in range(0, 250, 10)]
    specked = [np.full((200, 200, 3), 255, np.uint8) for _ in range(40)]
    for i, page in enumerate(specked):
        page[4 * i : 4 * i + 3, 3 * i : 3 * i + 3] = 0
    noise = np.random.default_rng(0).integers(-1, 2, (30, 50, 50, 3)) + 128
    pictures = [*flat, *specked, *noise.astype(np.uint8), flat[0]]
    contents = np.arange(len(pictures))
    contents[-1] = 0
    groups = near_duplicates(np.stack([thumbnail(pixels) for pixels in pictures]), contents)
    assert groups[-1] == groups[0]
    assert len(set(groups.tolist())) == len(pictures) - 1


def test_a_chain_of_pictures_that_have_much_in_common_is_no_group_of_copies():
    """Such as X-rays; each also has a copy."""
    alike = [Image.blend(scene(0), scene(1 + i), 0.15) for i in range(61)]
    others = [scene(i) for i in range(62, 190)]
    pictures = [*alike, *map(smaller, alike), *others]
    thumbnails = np.stack([thumbnail(np.asarray(picture)) for picture in pictures])
    groups = near_duplicates(thumbnails, np.arange(len(pictures)))
    assert np.bincount(groups).max() <= len(pictures) // 20
    np.testing.assert_array_equal(groups[:61], groups[61:122])
    order = np.random.default_rng(0).permutation(len(pictures))
    mixed = near_duplicates(thumbnails[order], order)
    together = groups[:, None] == groups
    np.testing.assert_array_equal(mixed[:, None] == mixed, together[order][:, order])


def test_what_was_found_is_kept_until_a_file_changes(moths, cache, caplog, monkeypatch):
    looked_at: list[int] = []
    real = copies._look
    monkeypatch.setattr(copies, "_look", lambda source: looked_at.append(1) or real(source))
    with monkeypatch.context() as patch:
        patch.setattr(copies, "is_first", lambda: False)
        first = parts(splits.load_splits(f"folder:{moths}"))
    assert not list((cache.parent / "copies").glob("*")), "another process writes it"
    for _ in range(2):
        assert parts(splits.load_splits(f"folder:{moths}")) == first
    assert len(looked_at) == 2

    save(moths / "silk/2.png", scene(1, (90, 70)))  # now a copy of one of the other class
    assert any({"1.png", "2.png"} <= part for part in parts(splits.load_splits(f"folder:{moths}")))
    (file,) = (cache.parent / "copies").glob("*")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    splits.load_splits(f"folder:{moths}")
    assert len(looked_at) == 4
    assert "is damaged" in caplog.text


def grouped(*sizes: int, label: int = 0) -> tuple[list[int], list[int]]:
    """Labels, and groups of these sizes."""
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return [label] * len(groups), groups


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([1, 1, 1], [1, 1, 1]),
        ([4, 4, 4], [4, 4, 4]),
        ([30, 1, 1], [30, 1, 1]),
        ([90, *[1] * 10], [90, 10, 0]),  # the share of test is 25, but searching needs one
    ],
)
def test_each_class_is_in_every_part_and_large_groups_are_trained_on(sizes, expected):
    labels, groups = grouped(*sizes)
    copied = np.array([range(len(labels)), groups], np.uint64)
    found = split_by_content(np.array(labels), copied, [(0.25, 0), (0.1, 0)])
    assert sorted(np.concatenate(found).tolist()) == list(range(len(labels)))
    if expected[2]:
        assert [len(part) for part in found] == expected
    else:
        assert all(len(part) for part in found)
        assert set(range(90)) <= set(found[0].tolist())
    for part in found:
        assert all(
            groups.count(group) == count
            for group, count in collections.Counter(groups[i] for i in part).items()
        )


def test_test_images_are_decoded_as_they_are(tmp_path):
    for i in range(8):
        save(tmp_path / f"set/{'ab'[i % 2]}/{i}.jpeg", scene(i))
    loaded = splits.load_splits(f"folder:{tmp_path}/set", 0.3, least_side=15)
    heights = [
        {part[i]["image"].shape[0] for i in range(len(part))}
        for part in (loaded.train, loaded.heldout, loaded.test)
    ]
    assert heights == [{15}, {15}, {60}]


def test_a_class_that_is_copies_of_one_picture_is_trained_on(tmp_path, caplog):
    for i in range(6):
        save(tmp_path / f"set/a/{i}.png", scene(i))
        save(tmp_path / f"set/b/{i}.jpeg", scene(9), quality=60 + i)
    loaded = splits.load_splits(f"folder:{tmp_path}/set")
    assert loaded.train.labels.tolist().count(1) == 6
    assert {message.split(":")[0] for message in caplog.messages} == {
        "no image to report on of b",
        "no image to search with of b",
    }


def test_pictures_of_every_kind_and_bad_ones_are_split(tmp_path):
    for i in range(12):
        save(tmp_path / f"set/a/{i}.jpeg", scene(i).convert("CMYK"))
        save(tmp_path / f"set/b/{i}.png", scene(20 + i).convert("L"))
    not_an_image(tmp_path / "set/a/bad.jpeg")
    (tmp_path / "set/b/gone.png").symlink_to("nowhere")
    loaded = splits.load_splits(f"folder:{tmp_path}/set", 0.25, on_bad_image="skip")
    assert sum(map(len, (loaded.train, loaded.heldout, loaded.test))) == 26
    for part in (loaded.train, loaded.heldout, loaded.test):
        for i in range(len(part)):
            assert part[i]["image"].shape == (60, 80, 3)
