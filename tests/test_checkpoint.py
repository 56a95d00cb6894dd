"""Checkpoints of a run: real faults on real files, errors in the background, several processes."""

import functools
import logging
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

import flora_jax as flora
from flora_jax import mesh, processes
from flora_jax.io.checkpoint import Checkpoints, read_parameters
from flora_jax.io.files import read_json
from flora_jax.io.folder import save_description
from flora_jax.io.manifest import verify
from flora_jax.models import create_abstract, functional
from flora_jax.train.settings import TrainSettings
from flora_jax.train.step import TrainState, initial_state
from tests.conftest import ROOT

WRITE_MANIFEST = "flora_jax.io.checkpoint.write_manifest"


def state_at(step: int, size: int = 100) -> TrainState:
    """A state that differs in every array from that of another step."""
    noise = np.random.default_rng(step).normal(size=size)
    return TrainState(
        step=jnp.int32(step),
        parameters={"w": jnp.float32(noise), "b": jnp.float32(noise[:3])},
        optimizer={"w": jnp.bfloat16(noise)},
        average=None,
    )


def restored_step(directory) -> int:
    """The step that training goes on from; its arrays must be those saved."""
    with Checkpoints(directory) as checkpoints:
        state = checkpoints.restore(state_at(0))
    assert_same(state, state_at(int(state.step)))
    return int(state.step)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def files(directory) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6. Tests leave it as it is."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state_at(step))
    return directory


@pytest.fixture
def run(saved, tmp_path):
    """A copy of steps 3 and 6 to damage."""
    return shutil.copytree(saved, tmp_path / "run")


# --- saving and restoring ------------------------------------------------------------------------


def test_a_state_comes_back_on_the_devices_it_is_wanted_on(saved):
    template = mesh.replicate(state_at(0), mesh.make_mesh())
    with Checkpoints(saved) as checkpoints:
        state = checkpoints.restore(template)
    assert_same(state, state_at(6))
    for ours, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(template), strict=True):
        assert ours.sharding == wanted.sharding


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = state_at(0)
        assert checkpoints.restore(state) is state
        assert checkpoints.latest_path() is None
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_parameters(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        read_parameters(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "keep, keep_every, kept",
    [(2, 0, ["10", "8"]), (1, 0, ["10"]), (1, 4, ["10", "4", "8"]), (2, 5, ["10", "8"])],
)
def test_which_steps_stay(tmp_path, keep, keep_every, kept):
    with Checkpoints(tmp_path, keep, keep_every) as checkpoints:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(step, state_at(step))
        assert checkpoints.latest_path() == tmp_path / "10"
    assert names(tmp_path) == [*kept, "manifests"]
    assert names(tmp_path / "manifests") == [f"{step}.json" for step in kept]
    assert restored_step(tmp_path) == 10


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every must be 0 or a number of steps, got -2"):
        Checkpoints(tmp_path, keep_every=-2)
    assert names(tmp_path) == []


def test_a_step_is_not_saved_over(run):
    before = files(run)
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match="6 already exists: r"):
        checkpoints.save(6, state_at(7))
    assert files(run) == before


def test_file_modes_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with Checkpoints(tmp_path / "run") as checkpoints:
            checkpoints.save(3, state_at(3))
    finally:
        os.umask(previous)
    for path in (tmp_path / "run").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


# --- in the background ---------------------------------------------------------------------------


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """On CPU, what is being written are views of the very buffers that the next step is given."""
    step = jax.jit(functools.partial(jax.tree.map, lambda x: x * 2 + 1), donate_argnums=0)
    state = state_at(3, size=2**22)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        assert_same(checkpoints.restore(state), state_at(3, size=2**22))


def test_save_returns_before_the_step_is_complete(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    write = _imported(WRITE_MANIFEST)

    def write_later(*arguments):
        assert may_go_on.wait(timeout=60)
        write(*arguments)

    monkeypatch.setattr(WRITE_MANIFEST, write_later)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3))
        assert not (tmp_path / "manifests" / "3.json").exists()
        may_go_on.set()
        assert checkpoints.latest_path() == tmp_path / "3"
    assert restored_step(tmp_path) == 3


def _imported(name: str):
    module, attribute = name.rsplit(".", 1)
    return getattr(sys.modules[module], attribute)


def _fail(*_):
    raise OSError("the cable is out")


def _save_again(checkpoints):
    checkpoints.save(12, state_at(12))


def _restore(checkpoints):
    checkpoints.restore(state_at(0))


@pytest.mark.parametrize("use", [_save_again, _restore, Checkpoints.latest_path, None])
def test_an_error_in_the_background_surfaces(run, monkeypatch, use):
    """At the next call, or at the end; only once, and the steps before it stay."""
    checkpoints = Checkpoints(run, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(WRITE_MANIFEST, _fail)
        checkpoints.save(9, state_at(9))
        with pytest.raises(OSError, match=rf"saving {run}/9 failed: the cable is out"):
            use(checkpoints) if use else checkpoints.__exit__(None, None, None)
    checkpoints.__exit__(None, None, None)
    assert restored_step(run) == 6


def test_an_error_in_the_background_is_not_hidden_by_one_in_the_foreground(run, monkeypatch):
    """Who stops a run must learn that its last state was not saved."""

    def stop_after_save():
        with Checkpoints(run) as checkpoints:
            checkpoints.save(9, state_at(9))
            raise KeyboardInterrupt

    monkeypatch.setattr(WRITE_MANIFEST, _fail)
    with pytest.raises(OSError, match=r"saving .*/run/9 failed") as caught:
        stop_after_save()
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


# --- damage --------------------------------------------------------------------------------------


def _largest_file(run) -> pathlib.Path:
    return max(files(run / "6"), key=lambda path: path.stat().st_size)


def _flip_a_bit(run):
    path = _largest_file(run)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    return f"{path} is altered"


def _truncate(run):
    path = _largest_file(run)
    path.write_bytes(path.read_bytes()[:-1])
    return f"{path} is altered"


def _delete_a_file(run):
    path = _largest_file(run)
    path.unlink()
    return f"{path.relative_to(run / '6')} missing"


def _add_a_file(run):
    (run / "6" / "state" / "extra").write_text("")
    return "state/extra in"


def _delete_the_manifest(run):
    """As a run leaves it that is killed between the step and its manifest."""
    (run / "manifests" / "6.json").unlink()
    return "6.json is missing, so writing was not finished"


def _cut_the_manifest(run):
    path = run / "manifests" / "6.json"
    path.write_text(path.read_text()[:-9])
    return "6.json is not valid JSON"


def _manifest_of_other_bytes(run):
    (run / "manifests" / "6.json").write_bytes(b"\xff\x00\xfe")
    return "can't decode byte"


def _manifest_of_a_list(run):
    (run / "manifests" / "6.json").write_text("[1, 2]")
    return "6.json is not a manifest"


def _manifest_of_another_entry(run):
    path = run / "manifests" / "6.json"
    path.write_text(path.read_text().replace('"sha256"', '"sha255"', 1))
    return "is altered"


def _manifest_that_leaves_the_folder(run):
    path = run / "manifests" / "6.json"
    path.write_text(path.read_text().replace("_CHECKPOINT_METADATA", "../3/_CHECKPOINT_METADATA"))
    return "../3/_CHECKPOINT_METADATA missing"


def _manifest_of_an_absolute_path(run):
    path = run / "manifests" / "6.json"
    outside = run / "6" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("_CHECKPOINT_METADATA", str(outside)))
    return f"{outside} missing"


FAULTS = [
    _flip_a_bit,
    _truncate,
    _delete_a_file,
    _add_a_file,
    _delete_the_manifest,
    _cut_the_manifest,
    _manifest_of_other_bytes,
    _manifest_of_a_list,
    _manifest_of_another_entry,
    _manifest_that_leaves_the_folder,
    _manifest_of_an_absolute_path,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_from_the_step_before_a_damaged_one(run, fault, caplog):
    reason = fault(run)
    damaged = files(run / "6")
    assert restored_step(run) == 3
    (record,) = [r for r in caplog.records if r.name.startswith("flora_jax")]
    moved = run / "damaged" / "6-0"
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"step 6 is damaged and moved to {moved}: ")
    assert reason in record.message
    assert reason in (run / "damaged" / "6-0.txt").read_text()
    assert files(moved) == {moved / p.relative_to(run / "6"): b for p, b in damaged.items()}
    assert names(run) == ["3", "damaged", "manifests"]
    with Checkpoints(run) as checkpoints:
        checkpoints.restore(state_at(0))
        checkpoints.save(6, state_at(6))
    assert restored_step(run) == 6


@pytest.mark.parametrize("fault", FAULTS)
def test_reading_parameters_passes_over_a_damaged_step_and_changes_nothing(run, fault, caplog):
    reason = fault(run)
    before = files(run)
    assert_same(read_parameters(run), state_at(3).parameters)
    (record,) = [r for r in caplog.records if r.name.startswith("flora_jax")]
    assert record.message.startswith("read step 3, since newer ones are damaged: ")
    assert reason in record.message
    assert files(run) == before


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_passes(saved, data):
    """In any file of a step, at any place."""
    folder, manifest = epath.Path(saved / "6"), epath.Path(saved / "manifests" / "6.json")
    path = data.draw(
        st.sampled_from(sorted(p for p, content in files(saved / "6").items() if content))
    )
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=f"{path.name} is altered"):
            verify(folder, manifest)
    finally:
        path.write_bytes(content)
    verify(folder, manifest)


def test_a_manifest_lists_every_file(saved):
    content = files(saved / "6")
    manifest = read_json(saved / "manifests" / "6.json")
    assert manifest.keys() == {str(path.relative_to(saved / "6")) for path in content}
    assert [manifest[name]["bytes"] for name in sorted(manifest)] == [
        len(content[path]) for path in sorted(content, key=lambda p: str(p.relative_to(saved)))
    ]


@pytest.mark.parametrize("name", ["9", "009"])
def test_an_empty_folder_is_no_step(run, name):
    (run / name).mkdir()
    assert_same(read_parameters(run), state_at(6).parameters)
    assert restored_step(run) == 6
    assert names(run / "damaged") == [f"{name}-0", f"{name}-0.txt"]


def test_other_folders_are_left_alone(run):
    for name in ("notes", "9.old", "-9", "²"):
        (run / name).mkdir()
    before = names(run)
    assert restored_step(run) == 6
    assert names(run) == before


def test_a_half_written_step_is_removed(run):
    half = run / "9.orbax-checkpoint-tmp"
    shutil.copytree(run / "6", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    assert_same(read_parameters(run), state_at(6).parameters)
    assert half.exists()
    assert restored_step(run) == 6
    assert names(run) == ["3", "6", "manifests"]


def test_no_step_is_whole(run, caplog):
    for step in ("3", "6"):
        (run / step / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(ValueError, match=r"every checkpoint in .*run is damaged: .*/6/.*; .*/3/"):
        read_parameters(run)
    state = state_at(0)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.restore(state) is state
        checkpoints.save(3, state_at(3))
    *_, last = [r for r in caplog.records if r.name.startswith("flora_jax")]
    assert last.levelno == logging.ERROR
    assert last.message.endswith(f"the damaged ones are in {run / 'damaged'}")
    assert names(run / "damaged") == ["3-0", "3-0.txt", "6-0", "6-0.txt"]
    assert restored_step(run) == 3


def test_a_step_damaged_twice(run):
    for _ in range(2):
        _delete_a_file(run)
        assert restored_step(run) == 3
        with Checkpoints(run) as checkpoints:
            checkpoints.save(6, state_at(6))
    assert names(run / "damaged") == ["6-0", "6-0.txt", "6-1", "6-1.txt"]


# --- a full disk ---------------------------------------------------------------------------------


def save_until_full(directory: str):
    """The program of a process whose files may not grow, or whose disk is small."""
    random = TrainState(jnp.int32(9), {"w": jax.random.normal(jax.random.key(0), 2**19)}, {}, None)
    try:
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(3, state_at(3))
            checkpoints.save(9, random)
    except OSError as error:
        print(error)
    print(restored_step(directory))


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))


def _program(*calls: str) -> list[str]:
    lines = ("from tests import test_checkpoint", *(f"test_checkpoint.{call}" for call in calls))
    return [sys.executable, "-c", "; ".join(lines)]


def _output(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_file_that_may_not_grow(tmp_path):
    done = _output(*_program("limit_file_size()", f"save_until_full({str(tmp_path)!r})"))
    error, step = done.stdout.splitlines()
    assert error.startswith(f"saving {tmp_path}/9 failed: ")
    assert "File too large" in error
    assert step == "3"


def test_a_full_disk(tmp_path):
    namespace = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or _output(*namespace, *mount).returncode:
        pytest.skip("this system does not let a process mount a small disk of its own")
    script = 'limit=$1; shift; mount -t tmpfs -o size=1m tmpfs "$limit" && exec "$@"'
    program = _program(f"save_until_full({str(tmp_path)!r})")
    done = _output(*namespace, "sh", "-c", script, "sh", str(tmp_path), *program)
    error, step = done.stdout.splitlines()
    assert error.startswith(f"saving {tmp_path}/9 failed: ")
    assert "No space left on device" in error
    assert step == "3"


# --- several processes ---------------------------------------------------------------------------


def sharded_state(step: int, over: jax.sharding.Mesh) -> TrainState:
    state = TrainState(jnp.int32(step), {"w": jnp.full((512, 256), step, jnp.float32)}, {}, None)
    return jax.jit(lambda tree: tree)(mesh.shard_parameters(state, over))


def save_and_restore_together(directory: str, port: int, process: int):
    """The program of one of two processes that hold half of the state each."""
    processes.connect(f"127.0.0.1:{port}", 2, process)
    over = mesh.make_mesh(fsdp=2)
    with Checkpoints(directory) as checkpoints:
        for step in (3, 6, 9):
            checkpoints.save(step, sharded_state(step, over))
    processes.wait_for_all("saved")
    if process == 0:
        (pathlib.Path(directory) / "9" / "_CHECKPOINT_METADATA").write_text("{}")
    with Checkpoints(directory) as checkpoints:
        state = checkpoints.restore(sharded_state(0, over))
        (shard,) = state.parameters["w"].addressable_shards
        print(int(state.step), shard.data.shape, float(shard.data.min()), float(shard.data.max()))
        checkpoints.save(9, sharded_state(9, over))


def test_two_processes_agree_and_one_goes_on_alone(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            _program(f"save_and_restore_together({str(tmp_path)!r}, {port}, {process})"),
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    for output, errors in outputs:
        assert output.endswith("6 (256, 256) 6.0 6.0\n"), errors
    assert names(tmp_path) == ["6", "9", "damaged", "manifests"]
    np.testing.assert_array_equal(read_parameters(tmp_path)["w"], np.full((512, 256), 9))
    with Checkpoints(tmp_path) as checkpoints:
        alone = sharded_state(0, mesh.make_mesh())
        assert_same(checkpoints.restore(alone), sharded_state(9, mesh.make_mesh()))


# --- opening a training folder -------------------------------------------------------------------


def state_of(model, step, ema_decay=0.0):
    """A state whose moving average differs from its parameters."""
    settings = TrainSettings(steps=9, batch_size=1, learning_rate=0.1, ema_decay=ema_decay)
    parameters = {name: np.array(value) for name, value in functional.split(model)[1].items()}
    state = initial_state(parameters, settings)
    if ema_decay:
        state = state._replace(average={name: -value for name, value in parameters.items()})
    return mesh.replicate(state._replace(step=jnp.int32(step)), mesh.make_mesh())


def test_load_opens_a_training_folder(tiny_model, tiny_space, tmp_path):
    supernet = flora.factorize(tiny_model, tiny_space)
    save_description(supernet, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state_of(supernet.network, 4))
    again = flora.load(tmp_path)
    assert_same(functional.split(again.network)[1], functional.split(supernet.network)[1])
    assert again.space.choices == supernet.space.choices


def test_load_prefers_the_moving_average(tiny_model, tmp_path):
    save_description(tiny_model, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(4, state_of(tiny_model, 4, ema_decay=0.9))
    loaded, parameters = (functional.split(m)[1] for m in (flora.load(tmp_path), tiny_model))
    for name, value in parameters.items():
        np.testing.assert_array_equal(loaded[name], -value)


def test_relative_folders(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(3, state_of(tiny_model, 3))
    save_description(tiny_model, "run")
    loaded = functional.split(flora.load("run"))[1]
    for name, value in state_of(tiny_model, 3).parameters.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_checkpoint_of_another_network(tiny_model, micro_spec, tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state_of(tiny_model, 3))
    save_description(create_abstract(micro_spec), tmp_path)
    with pytest.raises(ValueError, match="do not fit the model"):
        flora.load(tmp_path)
