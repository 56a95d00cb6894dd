"""Records survive an interruption at any byte."""

import json
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.errors import StorageError
from flora_jax.io.json_lines import JsonLines, read_lines, read_records

RECORDS = [{"step": step, "loss": 1 / (step + 1)} for step in range(6)]
WHOLE = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@given(cut=st.integers(0, len(WHOLE)), durable=st.booleans())
def test_a_file_cut_anywhere_goes_on(cut, durable):
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory) / "metrics.jsonl"
        path.write_bytes(WHOLE[:cut])
        done = read_records(path)
        assert done == RECORDS[: len(done)]
        assert len(done) == WHOLE[:cut].count(b"\n")
        with JsonLines(path, read_lines(path)) as lines:
            lines.append(RECORDS[len(done) :], durable=durable)
            assert path.read_bytes() == WHOLE  # also before it is closed


def test_no_file_has_no_records(tmp_path):
    assert read_lines(tmp_path / "none") == []
    with JsonLines(tmp_path / "folder/new"):
        pass
    assert (tmp_path / "folder/new").read_bytes() == b""


def test_a_file_that_cannot_be_written_says_which(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/metrics"):
        JsonLines(tmp_path / "file/metrics.jsonl")
