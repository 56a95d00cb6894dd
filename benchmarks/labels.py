"""How long a run on a large TFDS dataset takes to start: its labels are read once and then kept.

    python benchmarks/labels.py --json labels.json

Writes a dataset as large as ImageNet by numbers, 1,281,167 records of 1 kB in 1,000 classes and
128 files of ArrayRecord, to a temporary folder (1.4 GB), and opens its splits in two processes one
after the other: the first reads every record for its label, the second the file in which they are
kept. The first start on ImageNet itself reads 140 GB and is as quick as the disk.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from array_record.python import array_record_module
from common import describe_machine, write_json
from tensorflow_datasets.proto import tf_example_pb2

from flora_jax.data import splits

NAME, VERSION, CLASSES = "many_labels", "1.0.0", 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_281_167)
    parser.add_argument("--bytes", type=int, default=1000, help="of a record")
    parser.add_argument("--files", type=int, default=128)
    parser.add_argument("--opened", help="only open this dataset, and print seconds and MiB")
    parser.add_argument("--json", type=pathlib.Path, help="also write the seconds to this file")
    arguments = parser.parse_args()
    if arguments.opened:
        print(json.dumps(open_splits(arguments.opened)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(pathlib.Path(folder), arguments)
        starts = {name: start_anew(folder) for name in ("first", "second")}
    machine = describe_machine(f"{arguments.records:,} records of {arguments.bytes} B")
    print(machine)
    for name, found in starts.items():
        print(
            f"{name} start: {found['seconds']:.1f} s, of which {found['cpu']:.1f} s on a core, "
            f"{found['MiB']:.0f} MiB more memory"
        )
    write_json(arguments.json, machine, {name: own["seconds"] for name, own in starts.items()})


def open_splits(folder: str) -> dict[str, float]:
    """Seconds until the splits are there, those of all threads, and the memory that it took."""
    import tensorflow_datasets  # noqa: F401  a second or two, whatever the dataset

    before, started, busy = peak_mib(), time.perf_counter(), time.process_time()
    found = splits.load_splits(f"tfds:{NAME}", 0.5, data_dir=folder)
    assert found.num_classes == CLASSES
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - busy,
        "MiB": peak_mib() - before,
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start_anew(folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--opened", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def write_dataset(data_dir: pathlib.Path, arguments: argparse.Namespace) -> None:
    """What `tfds build` would leave: its two descriptions, and the records of two splits."""
    folder, rng = data_dir / NAME / VERSION, np.random.default_rng(0)
    folder.mkdir(parents=True)
    split_infos = []
    for split, files, count in (
        ("train", arguments.files, arguments.records),
        ("validation", 1, max(CLASSES, arguments.records // 25)),
    ):
        lengths = [len(part) for part in np.array_split(np.arange(count), files)]
        for index, length in enumerate(lengths):
            path = folder / f"{NAME}-{split}.array_record-{index:05d}-of-{files:05d}"
            write_records(path, length, arguments.bytes, rng)
        split_infos.append(
            {
                "name": split,
                "shardLengths": list(map(str, lengths)),
                "numBytes": str(count * arguments.bytes),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    package = "tensorflow_datasets.core.features"
    features = {
        "image": {
            "pythonClassName": f"{package}.image_feature.Image",
            "image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8"},
        },
        "label": {
            "pythonClassName": f"{package}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(CLASSES)},
        },
    }
    for name, content in {
        "dataset_info": {
            "name": NAME,
            "version": VERSION,
            "fileFormat": "array_record",
            "splits": split_infos,
        },
        "features": {
            "pythonClassName": f"{package}.features_dict.FeaturesDict",
            "featuresDict": {"features": features},
        },
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_records(path: pathlib.Path, count: int, size: int, rng: np.random.Generator) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    example = tf_example_pb2.Example()
    feature = example.features.feature
    for label in rng.integers(CLASSES, size=count).tolist():
        feature["image"].bytes_list.value[:] = [rng.bytes(size)]
        feature["label"].int64_list.value[:] = [label]
        writer.write(example.SerializeToString())
    writer.close()


if __name__ == "__main__":
    main()
