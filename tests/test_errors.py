"""What the user can mend is one line; what is our fault keeps its traceback."""

import pytest
from absl import flags
from absl.testing import flagsaver
from hypothesis import given
from hypothesis import strategies as st

from flora_jax import main
from flora_jax.cluster.mesh import equal_share
from flora_jax.errors import (
    InputError,
    MissingFileError,
    RunError,
    StorageError,
    UserError,
    did_you_mean,
    differences,
    few,
    unknown,
)
from flora_jax.methods import start
from flora_jax.training.loop import NonFiniteLossError


@pytest.fixture
def run_raises(monkeypatch):
    """A function: the exception that the run raises, what `--traceback` is -> exit status."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(main, "_configure_jax", lambda: None)
    monkeypatch.setattr(main, "_show_log", lambda: None)

    def run(error: Exception, traceback: bool) -> int:
        def fail(*arguments):
            raise error

        monkeypatch.setattr(start, "run", fail)
        with flagsaver.flagsaver(traceback=traceback), pytest.raises(SystemExit) as caught:
            main.main(["flora_jax"])
        return caught.value.code

    return run


KINDS = {
    InputError: ValueError,
    MissingFileError: FileNotFoundError,
    RunError: RuntimeError,
    StorageError: OSError,
    NonFiniteLossError: FloatingPointError,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_error_is_one_line_and_what_programs_expect(run_raises, capsys, kind):
    assert run_raises(kind("wrong value"), traceback=False) == 1
    assert capsys.readouterr().err == "error: wrong value\n"
    assert issubclass(kind, KINDS[kind])
    assert issubclass(kind, UserError)


@pytest.mark.parametrize("error", [OSError("oops"), InputError("oops")])
def test_our_own_fault_keeps_its_traceback_and_a_users_on_request(run_raises, capsys, error):
    assert run_raises(error, traceback=isinstance(error, InputError)) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "in fail" in shown


def test_hints():
    assert did_you_mean("serach", ["search", "report"]) == " (did you mean 'search'?)"
    assert did_you_mean("x", ["search"]) == ""
    assert unknown("stage", "x", ["a", "b"]) == "unknown stage 'x'; choose one of a, b"
    assert few({"b", "a"}) == "a, b"
    assert few([]) == "none"
    assert few([f"{i}" for i in range(9)], 3) == "0, 1, 2 and 6 more"


VALUES = st.recursive(
    st.integers(0, 3) | st.text(max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, VALUES)
def test_differences_are_all_there_is_between_two(there, here):
    found = list(differences(there, here))
    assert bool(found) == (there != here)
    assert len({name for name, _, _ in found}) == len(found)


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 4))
def test_a_batch_is_shared_equally_or_the_nearest_that_can_be_is_named(size, devices, parts):
    if size % (devices * parts) == 0:
        share = equal_share("batch_size", size, devices, parts)
        assert share * devices == size
        assert share % parts == 0
        return
    with pytest.raises(InputError, match=rf"batch_size {size} cannot be shared") as caught:
        equal_share("batch_size", size, devices, parts)
    nearest = int(str(caught.value).split()[-1])
    assert equal_share("batch_size", nearest, devices, parts) >= 1
    legal = range(devices * parts, 2 * size + devices * parts + 1, devices * parts)
    assert abs(nearest - size) == min(abs(other - size) for other in legal)
