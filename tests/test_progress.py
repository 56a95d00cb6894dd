"""Progress of long work: lines in a log, a bar on a terminal."""

import io
import re
import sys

import pytest

from flora_jax.progress import Progress


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def shown_lines(capsys) -> list[str]:
    """What was printed, without the time of day that every line begins with."""
    lines = capsys.readouterr().err.splitlines()
    return [re.fullmatch(r"\d\d:\d\d:\d\d (.*)", line).group(1) for line in lines]


def test_lines_of_a_resumed_run(capsys):
    clock = Clock()
    with Progress("supernet", total=1200, start=300, clock=clock) as progress:
        for seconds, count in ((10, 142), (5, 8), (5, 50), (1, 1)):
            clock.now += seconds
            progress.update(count, loss=0.531234, epoch=3)
        clock.now += 79
        progress.update(699)
    lines = shown_lines(capsys)
    assert lines == [
        "supernet  442/1200 steps  36 %  14.2 steps/s  0:53 left  loss 0.5312  epoch 3",
        # 15 s: too early for a line
        "supernet  500/1200 steps  41 %  10.0 steps/s  1:10 left  loss 0.5312  epoch 3",
        "supernet  1200/1200 steps  100 %  9.0 steps/s  0:00 left  loss 0.5312  epoch 3",
        "supernet  1200/1200 steps  done in 1:40  9.0 steps/s  loss 0.5312  epoch 3",
    ]


def test_summary_of_interrupted_work(capsys):
    clock = Clock()

    def interrupted():
        with Progress("search", total=2, clock=clock) as progress:
            clock.now += 7323
            progress.update(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "search  2/2 steps  stopped after 2:02:03" in capsys.readouterr().err


def test_nothing_left_to_do(capsys):
    with Progress("filter", total=20, unit="block", start=20, clock=Clock()):
        pass
    assert shown_lines(capsys) == ["filter  20/20 blocks  done in 0:00"]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("supernet", total=10, start=4) as progress:
        progress.update(5, loss=0.25)
        progress._bar.refresh()
        progress.update()
    *bars, summary = re.split(r"[\r\n]+", terminal.getvalue().strip())
    assert bars[0].startswith("supernet:  40%")
    assert any(bar.startswith("supernet:  90%") and "loss 0.25" in bar for bar in bars)
    assert "supernet  10/10 steps  done in 0:00" in summary


def test_values_must_be_on_the_host():
    class DeviceArray:
        def __float__(self):
            raise AssertionError("the device was asked for a value")

        __repr__ = __format__ = __float__

    with (
        pytest.raises(TypeError, match="loss must be a Python number, got a DeviceArray"),
        Progress("supernet", total=2) as progress,
    ):
        progress.update(loss=DeviceArray())


@pytest.mark.parametrize("total, start", [(0, 0), (5, 6), (5, -1)])
def test_impossible_totals_are_refused(total, start):
    with pytest.raises(ValueError, match="'search' must"):
        Progress("search", total=total, start=start)
