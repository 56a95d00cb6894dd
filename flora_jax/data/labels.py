"""Labels of a split: the check that they are classes, and those of TFDS, kept in a file.

TFDS keeps a label inside the record of its image, so that the labels of ImageNet cost a pass over
all of it. They are read once and kept, beside the dataset or in the user's cache.
"""

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from flora_jax.cluster.processes import is_first
from flora_jax.data.kept import digest, keep, read_kept
from flora_jax.errors import InputError, few
from flora_jax.io.files import user_cache_dir

_RECORDS_AT_ONCE = 512  # of ImageNet 56 MB, in each thread
_SAMPLE = 32  # records by which a kept file is known to be of this dataset

log = logging.getLogger(__name__)


def check_labels(labels: np.ndarray, num_classes: int, of: str) -> None:
    """Raises InputError, which names what the labels are `of`, unless they are classes."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"the labels of {of} must be integers, got {labels.dtype}")
    is_wrong = (labels < 0) | (labels >= num_classes)
    if is_wrong.any():
        raise InputError(
            f"{is_wrong.sum()} of the {len(labels)} labels of {of} are no class "
            f"0..{num_classes - 1}: {few([str(value) for value in np.unique(labels[is_wrong])])}"
        )


def stored_labels(name: str, records: Any) -> np.ndarray:
    """The labels int32 [n] of a TFDS data source, from the file that an earlier call has kept.

    The file is made anew where it is damaged or the files of the dataset have changed.

    Args:
      name: of the split, for the log.
      records: what `tensorflow_datasets.data_source` returns, of ArrayRecord files.
    """
    file = f"labels-{_fingerprint(records)}.bin"
    folders = [epath.Path(records.dataset_info.data_dir), user_cache_dir("labels")]
    places = [folder / file for folder in folders if folder is not None]
    for place in places:
        labels = np.frombuffer(read_kept(place) or b"", "<i4").astype(np.int32)
        if len(labels) == len(records) and _is_of(records, labels):
            return labels
    log.info("%s: reading %d labels, which takes a pass over the images", name, len(records))
    parts = np.array_split(np.arange(len(records)), -(-len(records) // _RECORDS_AT_ONCE))
    with ThreadPoolExecutor(4) as pool:
        labels = np.concatenate(list(pool.map(functools.partial(_labels_of, records), parts)))
    for place in places if is_first() else ():
        if keep(place, labels.astype("<i4").tobytes()):
            break
    return labels


def _fingerprint(records: Any) -> str:
    """Changes with the files of the split, but not with the folder that they are in."""
    instructions = records.dataset_info.splits[records.split].file_instructions
    with ThreadPoolExecutor(16) as pool:
        sizes = pool.map(lambda part: epath.Path(part.filename).stat(), instructions)
        parts = [
            (os.path.basename(part.filename), part.skip, part.take, size.length, size.mtime)
            for part, size in zip(instructions, sizes, strict=True)
        ]
    return digest(repr(parts).encode()).hex()


def _is_of(records: Any, labels: np.ndarray) -> bool:
    """Whether some records have these labels: files may be replaced by others as long and old."""
    sample = np.linspace(0, len(labels) - 1, min(_SAMPLE, len(labels))).astype(int)
    return np.array_equal(_labels_of(records, sample), labels[sample])


def _labels_of(records: Any, indices: np.ndarray) -> np.ndarray:
    """Labels int32 [n] of some records, of which nothing else is decoded."""
    from tensorflow_datasets.proto import tf_example_pb2

    read = tf_example_pb2.Example.FromString
    encoded = records.data_source.__getitems__(indices.tolist())
    labels = [read(one).features.feature["label"].int64_list.value[0] for one in encoded]
    # What no int32 holds is no class either way.
    return np.clip(labels, -1, np.iinfo(np.int32).max).astype(np.int32)
