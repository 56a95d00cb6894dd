"""Progress of long work: a bar on a terminal, an occasional line in a log."""

import numbers
import sys
import time
from collections.abc import Callable

import jax
from tqdm import tqdm


class Progress:
    """Shows how far a piece of work is, how fast it goes and how long it still takes.

    Rate and time left are of what comes after the first update, during which programs compile.

    On a terminal (stderr) this is a tqdm bar, otherwise lines on stderr: one at the first update,
    then at most one every `interval` seconds. A summary line ends both. Of several processes, the
    first one shows it.

        with Progress("search", total=1200, start=300) as progress:
            for step in range(300, 1200):
                ...
                progress.update(loss=0.53)

    Args:
      name: what is being done.
      total: units of work in all.
      start: units already done earlier, by an interrupted run; they do not enter the rate.
      unit: one unit of work, in the singular.
      interval: seconds between two lines of a log.
      clock: seconds, as `time.monotonic`.

    Raises:
      ValueError: total is below 1, or start lies outside 0..total.
    """

    def __init__(
        self,
        name: str,
        total: int,
        start: int = 0,
        unit: str = "step",
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if total < 1:
            raise ValueError(f"total of {name!r} must be at least 1, got {total}")
        if not 0 <= start <= total:
            raise ValueError(f"start of {name!r} must lie in 0..{total}, got {start}")
        self.name, self.total, self.start, self.unit = name, total, start, unit
        self.done = self._warm = start  # units when the clock of the rate started
        self._interval, self._clock = interval, clock
        self._values: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self._started = self._warm_since = self._next_line = self._clock()
        self._bar, self._is_shown = None, jax.process_index() == 0
        if self._is_shown and sys.stderr.isatty():
            self._bar = tqdm(
                desc=self.name,
                total=self.total,
                initial=self.start,
                unit=f" {self.unit}s",
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self._bar is not None:
            self._bar.close()
        how = "interrupted after" if error_type else "done in"
        if error_type is None and self.done < self.total:
            how = "converged after"
        self._print(f"{how} {_format_duration(self._elapsed())}", self._rate())

    def update(self, count: int = 1, **values: float) -> None:
        """Counts `count` more units as done; 0 only changes the values shown.

        Args:
          **values: numbers on the host, shown until they are replaced. A device array is refused:
            showing it would make the host wait for the device.

        Raises:
          TypeError: a value is not a number on the host.
        """
        for name, value in values.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a Python number, got a {type(value).__name__}")
        self._values |= values
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(self._shown_values()), refresh=False)
            self._bar.update(count)
        elif count and self._clock() >= self._next_line:
            self._next_line = self._clock() + self._interval
            self._print(f"{100 * self.done // self.total} %", self._rate(), self._time_left())
        if self._warm == self.start and self.done > self.start:
            self._warm, self._warm_since = self.done, self._clock()

    def _elapsed(self) -> float:
        return self._clock() - self._started

    def _rate(self) -> str:
        count, seconds = self.done - self._warm, self._clock() - self._warm_since
        if not count or seconds <= 0 or self._warm == self.start:
            return ""
        if count >= seconds:
            return f"{count / seconds:.1f} {self.unit}s/s"
        return f"{seconds / count:.1f} s/{self.unit}"

    def _time_left(self) -> str:
        count, seconds = self.done - self._warm, self._clock() - self._warm_since
        if not count or self._warm == self.start:
            return ""
        return f"{_format_duration(seconds / count * max(0, self.total - self.done))} left"

    def _shown_values(self) -> list[str]:
        return [
            f"{name} {value}" if isinstance(value, numbers.Integral) else f"{name} {value:.4g}"
            for name, value in self._values.items()
        ]

    def _print(self, *parts: str) -> None:
        counted = f"{self.done}/{self.total} {self.unit}s"
        shown = [self.name, counted, *parts, *self._shown_values()]
        if self._is_shown:
            line = "  ".join(part for part in shown if part)
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _format_duration(seconds: float) -> str:
    """Writes seconds as 1:03 or 2:01:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
