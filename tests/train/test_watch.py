"""A run that is watched: every point once, whatever interrupted it."""

import itertools
import struct
import sys
import types

import pytest
from etils import epath

from flora_jax.configs import deit_t
from flora_jax.errors import MissingPackageError, RunError
from flora_jax.flora.evolution import read_history
from flora_jax.runs.checks import check
from flora_jax.runs.settings import Settings
from flora_jax.runs.workdir import Planned, put_aside
from flora_jax.training.watch import opened, watching
from tests.helpers.searching import search
from tests.helpers.training import SETTINGS, Interruption, interrupted_before, metrics_of, run

READER = "tensorboardX's messages read the events back"


def shown_points(folder):
    """{tag: [(step, value)]} as TensorBoard shows it, which hides what a restart repeats."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason=READER)
    points: dict[str, list] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.session_log.status == event_pb2.SessionLog.START:
                points = {
                    tag: [point for point in own if point[0] < event.step]
                    for tag, own in points.items()
                }
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.simple_value))
    return points


@pytest.mark.parametrize("stop", [2, 4])  # before the first checkpoint; after it, and logged
def test_a_point_a_step_in_tensorboard(tmp_path, stop):
    pytest.importorskip("tensorboardX", reason="writes the events")
    name, stream = "finetune/subnet", interrupted_before(stop)[0]
    watch, settings = watching(("tensorboard",), tmp_path, name), SETTINGS
    with pytest.raises(Interruption):
        run(tmp_path / name, settings, stream, watch=watch)
    run(tmp_path / name, settings, stream, watch=watch)
    points, records = shown_points(tmp_path / name), metrics_of(tmp_path / name)
    assert len(records) == settings.steps
    for metric in ("loss", "gradient_norm", "learning_rate"):
        expected = [(record["step"], record[metric]) for record in records]
        assert points[f"{name}/{metric}"] == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]
    assert points.keys() - {f"{name}/{metric}" for metric in records[0]} == {
        f"{name}/images_per_second"
    }


class FakeRun:
    """A run as Weights & Biases has it; it takes no step that is not above all others."""

    def __init__(self):
        self.history, self.axes, self.exits = [], {}, []

    def define_metric(self, name, step_metric=None, hidden=None):
        self.axes[name] = step_metric

    def log(self, values, step):
        assert not self.history or step > self.history[-1][0]
        self.history.append((step, values))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.exits.append(kind)


@pytest.fixture
def service(monkeypatch):
    """A module wandb with a service behind it: {id: run}, and how each was asked for."""
    wandb = types.ModuleType("wandb")
    wandb.runs, wandb.asked, wandb.Error = {}, [], type("Error", (Exception,), {})

    def init(**options):
        wandb.asked.append(options)
        wandb.run = wandb.runs.setdefault(options["id"], FakeRun())
        return wandb.run

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return wandb


def trained(folder, name, stream):
    with opened(("wandb",), folder, {"seed": 3}):
        run(folder / name, SETTINGS, stream, watch=watching(("wandb",), folder, name))


def step(name, *paths):
    return Planned(name, "", print, (), paths, None, False)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_point_a_step_in_weights_and_biases(tmp_path, service, stop):
    folder, stream = epath.Path(tmp_path), interrupted_before(stop)[0]
    trained(folder, "pretrain", interrupted_before(None)[0])
    with pytest.raises(Interruption):
        trained(folder, "supernet", stream)
    trained(folder, "supernet", stream)
    [(name, history)] = [(name, run.history) for name, run in service.runs.items()]
    assert [asked["id"] for asked in service.asked] == [name] * 3
    assert {asked["resume"] for asked in service.asked} == {"allow"}
    assert service.asked[0]["config"] == {"seed": 3}
    assert service.runs[name].exits == [None, Interruption, None]
    assert [step for step, _ in history] == list(range(2 * SETTINGS.steps))
    for part, training in enumerate(("pretrain", "supernet")):
        own = history[part * SETTINGS.steps :][: SETTINGS.steps]
        assert [values[f"{training}/step"] for _, values in own] == list(range(SETTINGS.steps))
        losses = [record["loss"] for record in metrics_of(tmp_path / training)]
        assert [values[f"{training}/loss"] for _, values in own] == losses
        assert service.runs[name].axes[f"{training}/*"] == f"{training}/step"

    # What is done anew has other points of the same steps: another run begins.
    (folder / "result.json").write_text("{}")
    put_aside(folder, [step("evaluate", "result.json")])
    assert (folder / "wandb.json").exists()
    put_aside(folder, [step("supernet", "supernet")])
    trained(folder, "supernet", interrupted_before(None)[0])
    assert len(service.runs) == 2
    assert len(service.runs[service.asked[-1]["id"]].history) == SETTINGS.steps


def test_a_service_that_refuses_is_the_users_to_mend(tmp_path, service):
    def init(**options):
        raise service.Error("No API key configured")

    service.init = init
    with (
        pytest.raises(RunError, match=r"No API key configured; `wandb login`.*WANDB_MODE=offline"),
        opened(("wandb",), epath.Path(tmp_path), {}),
    ):
        pytest.fail("work has begun")
    assert not list(tmp_path.iterdir())


def test_what_cannot_watch_is_said_first(monkeypatch):
    with pytest.raises(ValueError, match=r"watch: unknown writer 'tensorbord'.*'tensorboard'"):
        Settings.from_config({"watch": ("wandb", "tensorbord")})
    assert Settings.from_config({"watch": ["wandb", "wandb"]}).watch == ("wandb",)
    both = ("tensorboard", "wandb")
    assert all(
        Settings.from_config({"watch": watch}).watch == both
        for watch in (both, "tensorboard,wandb", ("tensorboard,wandb",))
    )
    config = deit_t.get_config("runlocal")
    config.watch, config.pretrained = ("tensorboard",), "nowhere"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'flora_jax\[tensorboard\]'"):
        check(Settings.from_config(config))
    with (
        pytest.raises(ValueError, match=r"appends to files, which gs://bucket/run cannot"),
        opened(("tensorboard",), epath.Path("gs://bucket/run"), {}),
    ):
        pytest.fail("work has begun")


def test_generations_of_a_search(tmp_path):
    pytest.importorskip("tensorboardX", reason="writes the events")
    history, watch = tmp_path / "history.jsonl", watching(("tensorboard",), tmp_path, "search")
    search(history, watch=watch)
    whole = shown_points(tmp_path / "search")
    history.write_text("".join(history.read_text().splitlines(keepends=True)[:2]))
    search(history, watch=watch)
    best: dict[int, float] = {}
    for candidate in read_history(history):
        best[candidate.generation] = max(candidate.top1, best.get(candidate.generation, 0))
    so_far = itertools.accumulate(best.values(), max)
    expected = [(i, pytest.approx(value)) for i, value in zip(best, so_far, strict=True)]
    assert shown_points(tmp_path / "search") == whole == {"search/best_top1": expected}
