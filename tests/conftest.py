import fcntl
import gc
import math
import os
import pathlib
import shutil
import sys
from importlib.metadata import version

# Most of the time goes into compiling; before JAX is imported, also for the processes we start.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else "",  # gone in it
    )
)


# Every mixture of dtypes and of ranks is written out, also in the processes we start.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis
import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import flora_jax as flora
from flora_jax.models import functional
from tests.helpers.commands import DATA, run_flora
from tests.helpers.files import untracked_files
from tests.helpers.networks import MICRO, TWO_BLOCKS

_MOST_MAPS = 30_000
_BEFORE = pytest.StashKey[set[str]]()


def pytest_sessionstart(session) -> None:
    if not hasattr(session.config, "workerinput"):  # not in each worker, but around them all
        session.config.stash[_BEFORE] = untracked_files()


def pytest_sessionfinish(session) -> None:
    """Tests that leave something in the tree have failed."""
    before = session.config.stash.get(_BEFORE, None)
    if before is not None and (left := untracked_files() - before):
        print(f"\nthe tests have left in the tree: {', '.join(sorted(left))}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items) -> None:
    """Files with whole runs first: none is left alone at the end, while the other worker waits.

    Of those that read `finished_run` one is the first of all, and makes it, and the others come
    last of them, so that they need not wait for it.
    """
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    readers = list(dict.fromkeys(i.path for i in items if "finished_run" in i.fixturenames))

    def place(item) -> tuple[bool, bool, bool]:
        return item.path not in readers[:1], item.path not in long_files, item.path in readers

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector looks at what comes after, and more seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def programs_fit_the_memory_map():
    """Linux gives a process 65,530 maps, a compiled program takes several: without any it dies."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MOST_MAPS:
        jax.clear_caches()


hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")


def folder_of_all_workers(tmp_path_factory) -> pathlib.Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The processes that tests start compile each program once between them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = folder_of_all_workers(tmp_path_factory) / "compiled"
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of one whole run. Tests read it, and run in `own_run`.

    One of the workers makes it, and the others wait for it. They all hold its lock together, so
    that a run in the folder itself is refused every time, and not only beside another test's.
    """
    workdir = folder_of_all_workers(tmp_path_factory) / "finished"
    with workdir.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (workdir / "report.png").exists():
            done = run_flora(workdir)
            assert done.returncode == 0, done.stderr
    with (workdir / "run.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield workdir


@pytest.fixture
def own_run(finished_run, tmp_path):
    """The folder of a copy of the whole run, to go on in."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture(scope="session")
def deit_golden():
    """Numbers of the published FLORA implementation on a small random-weight DeiT."""
    with np.load(DATA / "flora_deit_micro.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def micro_spec():
    return MICRO


@pytest.fixture(scope="session")
def micro_model(deit_golden, micro_spec):
    weights = {k.removeprefix("sd/"): v for k, v in deit_golden.items() if k.startswith("sd/")}
    return flora.from_state_dict(weights, micro_spec)


@pytest.fixture(scope="session")
def micro_space(deit_golden, micro_spec):
    return flora.RankSpace.regular(micro_spec, ratios=deit_golden["ratios"].tolist())


@pytest.fixture(scope="session")
def micro_genes(deit_golden):
    """The golden's 8 configurations as genes [8, 9]."""
    return np.searchsorted(deit_golden["ratios"], deit_golden["configs"]).astype(np.int32)


@pytest.fixture(scope="session")
def micro_images(deit_golden):
    return deit_golden["images_nchw"].transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def data_dir():
    return DATA


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture(scope="session")
def tiny_spec():
    return TWO_BLOCKS


@pytest.fixture(scope="session")
def tiny_model(tiny_spec):
    """Random weights, biases too."""
    structure, parameters = functional.split(flora.create(tiny_spec, seed=1))
    rng = np.random.default_rng(1)
    noise = {name: rng.normal(size=p.shape).astype(np.float32) for name, p in parameters.items()}
    return functional.merge(structure, {n: p + 0.3 * noise[n] for n, p in parameters.items()})


@pytest.fixture(scope="session")
def tiny_space(tiny_spec):
    return flora.RankSpace.regular(tiny_spec, ratios=(1 / 4, 1 / 2, 1))


@pytest.fixture(scope="session")
def tiny_images():
    """float32 [5, 8, 8, 3]"""
    return np.random.default_rng(2).normal(size=(5, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="session")
def count_macs():
    """A function: jaxpr -> multiply-adds of all its matrix products, inner functions included."""

    def count(jaxpr) -> int:
        total = 0
        for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            if equation.primitive is jax.lax.dot_general_p:
                (contracted, _), _ = equation.params["dimension_numbers"]
                left, product = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
                total += math.prod(product) * math.prod(left[axis] for axis in contracted)
            total += sum(count(inner) for inner in jaxprs_in_params(equation.params))
        return total

    return count
