"""Sources small enough to know every image of, and batches to compare."""

import io
import pathlib

import numpy as np
from PIL import Image

from flora_jax.data import augment, batches, sources

SHAPE = (8, 8, 1)


def numbered_source(size: int, num_classes: int = 3) -> sources.ArraySource:
    """Image i is filled with the value i, so that a batch tells which images it holds."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, *SHAPE))
    labels = np.arange(size, dtype=np.int32) % num_classes
    return sources.ArraySource("numbered", images, labels, num_classes)


def write_jpegs(root: pathlib.Path, counts: dict[str, int], least_size: tuple[int, int]) -> None:
    """So many JPEGs in each folder, of growing widths."""
    rng, (width, height) = np.random.default_rng(0), least_size
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(256, size=(6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((width + i, height), Image.Resampling.BICUBIC)
            picture.save(root / folder / f"{i}.jpg")


def encode(picture: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


def write_tfds(data_dir: pathlib.Path, num_classes: int, **examples: list[tuple[bytes, int]]):
    """Writes "tiny_pictures" in ArrayRecord: the (encoded image, label) of each split."""
    import tensorflow_datasets as tfds

    # Not registered: it is read from its files alone, as a dataset without a builder at hand.
    class TinyPictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # TFDS would look there for checksums of downloads; there are none

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(num_classes=num_classes),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(part) for split, part in examples.items()}

        def _generate_examples(self, part):
            for i, (image, label) in enumerate(part):
                yield i, {"image": image, "label": label}

    TinyPictures(data_dir=data_dir, file_format="array_record").download_and_prepare()


def as_rgb(picture):
    return np.stack([picture] * 3, axis=-1) if picture.ndim == 2 else picture


def take_eval(source, batch_size, transform=None):
    transform = transform or augment.Augmentation("digits").evaluation(SHAPE)
    return list(batches.eval_batches(source, transform, batch_size))


def of_all_processes(take, process_count: int, *arguments, **options) -> list[batches.Batch]:
    """The global batches, put together from those that every process takes."""
    parts = [
        take(*arguments, process_index=i, process_count=process_count, **options)
        for i in range(process_count)
    ]
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def assert_same_batches(one: list[batches.Batch], other: list[batches.Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])
