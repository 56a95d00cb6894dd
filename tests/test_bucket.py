"""Runs in a gs:// folder, on a stand-in for Google's storage."""

import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request

import fsspec
import gcp_storage_emulator.server as emulator
import jax
import numpy as np
import pytest
from etils import epath
from gcp_storage_emulator.handlers import objects

import flora_jax as flora
from flora_jax.io.checkpoint import Checkpoints
from flora_jax.io.places import check_can_hold_a_run
from flora_jax.methods.export import export_once
from flora_jax.models import functional
from flora_jax.runs.workdir import Run
from tests.helpers.checkpoints import program, restored_step, state_at
from tests.helpers.commands import ROOT, free_port, run_flora
from tests.helpers.faults import OFTEN, assert_same_run, send_when
from tests.helpers.files import flip_a_bit

pytestmark = pytest.mark.slow


SPEC = flora.ViTSpec(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)
FILES = "/storage/v1/b/bucket/o/"
MOVE = r"^/storage/v1/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"


def move(request, response, storage) -> None:
    """The one request of ours that the stand-in does not know."""
    source = request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    if response.status == 200:
        storage.delete_file(source, request.params["object_id"])


@pytest.fixture(scope="module")
def address():
    """Of a store with one bucket, which processes started from here take for Google's."""
    port = free_port()
    address = f"http://localhost:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.server.HTTPServer, "request_queue_size", 100)
        patch.setattr(emulator, "HANDLERS", ((MOVE, {"POST": move}), *emulator.HANDLERS))
        patch.setenv("STORAGE_EMULATOR_HOST", address)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask another service
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        with emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield address


def output(*calls: str) -> list[str]:
    command, options = program(__name__, *calls), {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def names(folder: epath.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_and_damage() -> None:
    directory = epath.Path("gs://bucket/checkpoints")
    with Checkpoints(directory) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, state_at(step))
    print(*names(directory))
    files = fsspec.filesystem("gs")
    largest = max(files.find("bucket/checkpoints/9"), key=files.size)
    flip_a_bit(epath.Path(f"gs://{largest}"))
    print(restored_step(directory))
    print(*names(directory), *names(directory / "damaged"))
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(9, state_at(9))
    print(restored_step(directory))


def try_a_folder() -> None:
    check_can_hold_a_run("gs://bucket/tried/run 1")
    print(fsspec.filesystem("gs").exists("bucket/tried"))


def save_and_load() -> None:
    model = flora.create(SPEC)
    flora.save(model, "gs://bucket/model")
    flora.export_timm(model, "gs://bucket/timm.safetensors")
    for _ in range(2):  # anew, and over it
        flora.export_torch(model, "gs://bucket/torch")
    print(sorted(path.name for path in epath.Path("gs://bucket/torch").iterdir()))
    for path in ("gs://bucket/model", "gs://bucket/timm.safetensors"):
        ours, theirs = (functional.split(m)[1] for m in (model, flora.from_pretrained(path, SPEC)))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        print("same")


def hand_out() -> None:
    settings = flora.Settings(model=SPEC, stages=("pretrain",), export=("stablehlo", "timm"))
    run = Run(settings, epath.Path("gs://bucket/handing"))
    flora.save(flora.create(SPEC), run.folder / "dense")
    for _ in range(2):  # the second time it is there
        export_once(run, run.settings.export, None, ("a", "b", "c"))
        print(*names(run.folder / "export"), *names(run.folder / "export/dense"))
    assert flora.load(run.folder / "export/dense/timm").spec == SPEC


def test_checkpoints_models_and_exports(address):
    exported = "['model.py', 'model.safetensors', 'preprocess.py', 'spec.json']"
    files = "README.md classes.json model.stablehlo.bin preprocess.py preprocessing.json timm"
    calls = ("save_and_damage()", "try_a_folder()", "save_and_load()", "hand_out()")
    assert output(*calls) == [
        *("6 9 manifests", "6", "6 damaged manifests 9-0 9-0.txt", "9"),  # a damaged one goes aside
        "False",  # the folder is left as it was
        *(exported, "same", "same"),
        *(f"dense {files}", f"dense {files}"),
    ]


@pytest.mark.faults
def test_a_whole_run_is_killed_and_goes_on(address, finished_run, tmp_path):
    def has_saved() -> bool:
        manifest = urllib.parse.quote("run/supernet/checkpoints/manifests/60.json", safe="")
        try:
            with urllib.request.urlopen(f"{address}{FILES}{manifest}"):
                return True
        except urllib.error.HTTPError:
            return False

    status, errors = send_when(has_saved, signal.SIGKILL, "gs://bucket/run")
    assert status == -signal.SIGKILL, errors
    done = run_flora("gs://bucket/run", *OFTEN)
    assert done.returncode == 0, done.stderr
    output(f"download({str(tmp_path)!r})")
    assert_same_run(tmp_path / "run", finished_run)


def download(directory: str) -> None:
    fsspec.filesystem("gs").get("bucket/run", directory, recursive=True, batch_size=1)
