"""A search goes on bit for bit from its history, and refuses that of another one."""

import hashlib
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_jax.flora.evolution import EvolutionSettings, read_history
from tests.helpers.searching import (
    FIRST,
    HIGHER,
    LEAST,
    MOST,
    OTHER_COST,
    REGULAR,
    SMALL,
    WINDOW,
    metrics,
    search,
    unhurried,
)


@pytest.fixture(scope="module")
def whole_history(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "history.jsonl"
    search(path)
    return path.read_bytes()


@pytest.fixture(scope="module", params=[{}, {"windows": [WINDOW, HIGHER], "first": FIRST}])
def finished(tmp_path_factory, request):
    """A finished search: what is unusual in it, its history, its winners."""
    path = tmp_path_factory.mktemp("finished") / "history.jsonl"
    winners = search(path, **request.param)
    return request.param, path.read_bytes(), winners


@pytest.mark.parametrize("generations_left", range(5))
@pytest.mark.parametrize("tail", [b"", b"half", b'{"generation": 9, "genes": []}\n', b"\xff\0\n"])
def test_resumes_at_every_generation(tmp_path, finished, generations_left, tail, caplog):
    change, content, winners = finished
    lines = content.splitlines(keepends=True)
    path = tmp_path / "history.jsonl"
    if tail == b"half":
        tail = b"".join(lines[1 + generations_left :])[:40]
    path.write_bytes(b"".join(lines[: 1 + generations_left]) + tail)
    calls = []

    def score(genes):
        calls.append(len(genes))
        return metrics(genes)

    with caplog.at_level(logging.WARNING):
        assert search(path, score, **change) == winners
    assert path.read_bytes() == content
    assert len(calls) == SMALL.generations - generations_left
    assert bool(caplog.records) == (tail != b"")


@unhurried
@given(st.data())
def test_resumes_after_a_cut_anywhere(tmp_path_factory, finished, data):
    change, content, winners = finished
    path = tmp_path_factory.mktemp("cut") / "history.jsonl"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert search(path, **change) == winners
    assert path.read_bytes() == content


def test_one_window_is_searched_as_ever(whole_history):
    """Histories of versions that knew one window only must go on; this was recorded with one."""
    header, generations = whole_history.split(b"\n", 1)
    assert list(json.loads(header)["search"]) == [
        *("seed", "unit", "window", "settings", "space", "costs")
    ]
    assert json.loads(header)["search"]["window"] == list(WINDOW)
    assert hashlib.sha256(generations).hexdigest() == (
        "0ef79e76afe3c7ccbd3cce3af562098fdb9587f1ef3bb4724b1c07cad108d5ff"
    )


def test_reading_leaves_out_an_unfinished_line(tmp_path, whole_history):
    path = tmp_path / "history.jsonl"
    path.write_bytes(whole_history[:-1])
    assert [candidate.generation for candidate in read_history(path)] == [0] * 8 + [1] * 8 + [2] * 8
    assert path.read_bytes() == whole_history[:-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 8}, "seed 7 instead of 8"),
        ({"windows": [(LEAST, MOST)]}, "window .* instead of"),
        ({"windows": [WINDOW, HIGHER]}, r"window .* instead of \[\["),
        ({"first": FIRST}, "first None instead of"),
        ({"cost": OTHER_COST}, "costs .* instead of .*, unit MACs instead of cells"),
        (
            {"settings": EvolutionSettings()},
            r"settings\.crossovers 3 instead of 25, settings\.generations",
        ),
        ({"space": REGULAR}, "space .* instead of"),
    ],
)
def test_refuses_the_history_of_another_search(tmp_path, whole_history, change, message):
    path = tmp_path / "history.jsonl"
    path.write_bytes(whole_history)
    with pytest.raises(ValueError, match=f"belongs to another search .*{message}"):
        search(path, **change)
    assert path.read_bytes() == whole_history


@pytest.mark.parametrize("content", [b"notes\n", b'{"a": 1}\n', b"[]\n"])
def test_refuses_other_files(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not the history of a search"):
        search(path)
    assert path.read_bytes() == content


def test_history_is_json_lines(whole_history):
    header, *lines = map(json.loads, whole_history.splitlines())
    assert header["search"]["seed"] == 7
    assert [set(line) for line in lines] == [{"generation", "genes", "cost", "score", "top1"}] * 4
