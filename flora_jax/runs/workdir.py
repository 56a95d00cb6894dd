"""The folder of a run, and its steps: done once, loaded afterwards, redone where inputs change.

A method is a script of steps (`flora_jax/methods`):

    dense = run.step("pretrain", make_dense, settings.pretrain, saved=SavedModel("dense"))
    candidates = run.step("filter", filter_candidates, dense, settings.filter, saved=...)

What goes into a step is its images, the seed, and its inputs: values, or the results of earlier
steps. Their stable hash is the step's key; a step whose key is that of its record is loaded, any
other is done, what it had left before is put aside, and so it is for all that read its result.

Folder of a run:
  dense/            the uncompressed model
  pretrain/         its training run, unless the weights were given
  slim/             the slimmed model, from which FLORA goes on where the run slims; in it gates/,
                    cut/ and retrain/: training of the gates, the model after the cut, retraining;
                    decision.safetensors: the gates and what they leave
  transfer/         a finished model fine-tuned on this dataset
  calibrate/        what `calibrate` has summed so far, while it goes on
  inherited/        the supernet before training, its factors weighed by the calibration
  filter/block_00/  local supernets with their scores; filter/space.json: the candidates
  supernet/         the supernet's training run: open it with `flora_jax.load`
  latency/          table.json, where that is the budget
  allocate/         genes.json: the ranks of least measured sensitivity for each budget
  search/           history.jsonl and best.json
  extract/          the subnet, and the baselines at the allocated ranks and at the largest common
                    ratio inside the budget, with the weights that they inherit
  compress/         the subnets of the closed form, before fine-tuning
  finetune/         their training runs
  subnet/ allocated/ uniform/   the finished models; of several budgets subnet_0.55/ and so on
  export/subnet/    and so on: what is handed out of a model, with its card; written whole
  result.json, test_images.safetensors, report.html, report.png
  config.json, images.json, stages.json   the settings, the signature of the images, and the key and
                    the seconds of each step
  classes.json      the names of the classes by label, here and beside each finished model, with
                    preprocessing.json, what it wants of pictures, and evaluation.json, how it did
                    on the test images
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from flora_jax.cluster.processes import by_the_first, is_first, wait_for_all
from flora_jax.data.augment import Augmentation
from flora_jax.errors import InputError, RunError, differences, listed, unknown
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.io.files import locked, matching, read_json, write_json, write_json_once
from flora_jax.io.paths import is_url, user_path
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from flora_jax.runs.images import Images
from flora_jax.runs.model_files import describe_models_once
from flora_jax.runs.settings import Settings, network_spec
from flora_jax.training.settings import Recipe
from flora_jax.training.train import PREDICTIONS
from flora_jax.training.watch import WANDB_FILE, watching
from flora_jax.weights import folder as models

log = logging.getLogger(__name__)

CONFIG_FILE, IMAGES_FILE, DONE_FILE = "config.json", "images.json", "stages.json"
EARLIER, EXPORT, TEST_IMAGES_FILE = "earlier", "export", "test_images.safetensors"
BENCHMARK_FILE = "benchmark.json"
Script = Callable[["Run"], None]


# What goes into a step.


@dataclasses.dataclass(frozen=True)
class Unhashed:
    """An input whose change leaves a finished step as it is."""

    value: Any


class After:
    """Results that a function finds in the folder of the run by itself: it gets None for them."""

    def __init__(self, *results: "Result"):
        self.results = results


def stable(value) -> Any:
    """JSON values that are equal where an input is, in any process and version of Python.

    Fields of settings that are declared `without_effect` are left out.
    """
    if isinstance(value, Result):
        return {"result": value.name, "key": value.key}
    if isinstance(value, Unhashed):
        return None
    if isinstance(value, After):
        return stable(value.results)
    if isinstance(value, Augmentation):
        return stable({"name": value.name, **value.changes})
    if dataclasses.is_dataclass(value):
        fields = (f for f in dataclasses.fields(value) if f.metadata.get("has_effect", True))
        return {f.name: stable(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(name): stable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [stable(each) for each in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"an input of type {type(value).__name__} has no stable hash")


def key_of(value) -> str:
    """The stable hash of an input, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(stable(value), sort_keys=True).encode()).hexdigest()[:16]


# What a step leaves.


class Saved(Protocol):
    """The place and form of a step's value in the folder of its run.

    Attributes:
      path: of the value, inside the run's folder.
    """

    @property
    def path(self) -> str: ...

    def save(self, folder: epath.Path, value: Any) -> None: ...

    def load(self, folder: epath.Path) -> Any: ...


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A `Network` in a folder of its own."""

    path: str

    def save(self, folder: epath.Path, value: Network) -> None:
        models.save_once(value, folder / self.path)

    def load(self, folder: epath.Path) -> Network:
        return models.load_model(folder / self.path)


@dataclasses.dataclass(frozen=True)
class SavedSupernet:
    """A `Supernet`; a trained one is sharded, as its training has left it."""

    path: str
    is_trained: bool = False

    def save(self, folder: epath.Path, value: Supernet) -> None:
        save = models.save_trained_once if self.is_trained else models.save_once
        save(value, folder / self.path)

    def load(self, folder: epath.Path) -> Supernet:
        return models.load_supernet(folder / self.path)


@dataclasses.dataclass(frozen=True)
class SavedSpace:
    """A `RankSpace` as JSON."""

    path: str

    def save(self, folder: epath.Path, value: RankSpace) -> None:
        content = {"spec": spec_to_json(value.spec), "kept_macs_range": value.macs_range()}
        write_json_once(folder / self.path, content | value.to_json())

    def load(self, folder: epath.Path) -> RankSpace:
        content = read_json(folder / self.path)
        return RankSpace.from_json(spec_from_json(content.pop("spec")), content)


@dataclasses.dataclass(frozen=True)
class SavedJson:
    """JSON values."""

    path: str

    def save(self, folder: epath.Path, value) -> None:
        write_json_once(folder / self.path, value)

    def load(self, folder: epath.Path):
        return read_json(folder / self.path)


@dataclasses.dataclass(frozen=True)
class Result:
    """The value of a step, or of a function that is cheap enough to call whenever it is needed."""

    name: str
    key: str
    inputs: tuple[Any, ...]
    load: Callable[[], Any] = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step of a run's script.

    Attributes:
      paths: patterns of what it leaves in the folder of the run.
      is_always_done: whether it is done every time.
    """

    name: str
    key: str
    function: Callable
    inputs: tuple[Any, ...]
    paths: tuple[str, ...]
    saved: Saved | None
    is_always_done: bool

    def reads(self, names: Iterable[str]) -> bool:
        """Whether one of these steps goes into it, directly or through a derived value."""
        return any(_reads(each, set(names)) for each in self.inputs)


def _reads(value, names: set[str]) -> bool:
    if isinstance(value, Result):
        return value.name in names or any(_reads(each, names) for each in value.inputs)
    if isinstance(value, After):
        return _reads(value.results, names)
    return isinstance(value, tuple | list) and any(_reads(each, names) for each in value)


def _loaded(value):
    """An input as its function takes it."""
    if isinstance(value, Result):
        return value.load()
    if isinstance(value, Unhashed):
        return value.value
    return None if isinstance(value, After) else value


# The run.


@dataclasses.dataclass
class Run:
    """The settings of a run, the folder it runs in, and its images, where they can be read.

    Attributes:
      plan: the steps of its script as far as it has come, in their order.
      does: which steps it does: all, none (to plan), or one alone.
    """

    settings: Settings
    folder: epath.Path
    images: Images | None = None
    plan: dict[str, Planned] = dataclasses.field(default_factory=dict)
    does: bool | str = False

    @classmethod
    def open(cls, folder: epath.PathLike) -> "Run":
        """The run that was made in this folder."""
        folder = user_path(folder)
        return cls(saved_settings(folder), folder)

    @property
    def spec(self) -> Spec:
        return network_spec(self.settings)

    def step(
        self,
        name: str,
        function: Callable,
        *inputs: Any,
        saved: Saved | None = None,
        leaves: Sequence[str] = (),
        otherwise: Any = None,
        when: bool | None = None,
        is_always_done: bool = False,
    ) -> Any:
        """Does a step, or finds it done; returns a `Result`, which loads its value when it is read.

        Args:
          function: (Step, *inputs) -> value, where results of earlier steps are loaded.
          inputs: values, and results of earlier steps; all that the function may read.
          saved: how the value is kept for those who read it; None: nobody does.
          leaves: patterns of what the function leaves itself in the folder of the run, beside the
            folder of the step's name.
          otherwise: returned where the run leaves this step out.
          when: whether it does it; None: where the settings name it among their stages.
          is_always_done: also where it is done already.
        """
        if not (name in self.settings.stages if when is None else when):
            return otherwise
        paths = tuple(dict.fromkeys([name, *([saved.path] if saved else []), *leaves]))
        planned = Planned(name, self._key(inputs), function, inputs, paths, saved, is_always_done)
        self.plan[name] = planned
        if self.does is True or self.does == name:
            self._do(planned)

        def load():
            return saved.load(self.folder) if saved else None

        return Result(name, planned.key, inputs, load)

    def metric_of(self, recipe: Recipe) -> Any:
        """The metric of the best parameters, which matters where these are the result."""
        metric = self.settings.metric
        return metric if recipe.result == "best" else Unhashed(metric)

    def derived(self, function: Callable, *inputs: Any) -> Result:
        """The value of a function that is called whenever it is read, and saved nowhere."""
        name = function.__name__.strip("_")
        return Result(name, self._key(inputs), inputs, lambda: function(*map(_loaded, inputs)))

    def _key(self, inputs: Sequence[Any]) -> str:
        data = {n: v for n, v in stable(self.settings.data).items() if n not in _PLACE}
        return key_of([self.settings.seed, data, self.images_signature, *inputs])

    @property
    def images_signature(self) -> str:
        """That of the images; of those in the folder, where they lie in the same place."""
        file, saved = self.folder / IMAGES_FILE, dict[str, Any]()
        if file.exists() and has_run(self.folder):
            saved = read_json(self.folder / CONFIG_FILE)["data"]
        current = {name: getattr(self.settings.data, name) for name in _PLACE}
        if self.images is None or (saved and current.items() <= saved.items()):
            return read_json(file)["signature"] if file.exists() else ""
        return self.images.signature

    def _do(self, planned: Planned) -> None:
        name, records = planned.name, read_stages(self.folder)
        wait_for_all("stages.json is read")
        seconds = records.get(name, {}).get("seconds")
        if seconds is not None and not planned.is_always_done:
            log.info("%s: done in %.0f s, skipped", name, seconds)
        else:
            log.info("%s: starts", name)
            write_json_once(self.folder / DONE_FILE, records | {name: {"key": planned.key}})
            started = time.monotonic()
            value = planned.function(Step(self, name), *map(_loaded, planned.inputs))
            if planned.saved is not None:
                planned.saved.save(self.folder, value)
            if self.images is not None:
                data = self.settings.data
                describe_models_once(self.folder, planned.paths, self.images.class_names, data)
            record = {"key": planned.key, "seconds": round(time.monotonic() - started, 3)}
            write_json_once(self.folder / DONE_FILE, records | {name: record})
        if not self.settings.keep_checkpoints:
            tidy_once(self.folder, name)


_PLACE = ("name", "data_dir")


@dataclasses.dataclass(frozen=True)
class Step:
    """The place of a step: its folder, its images and its random numbers."""

    run: Run
    name: str

    @property
    def directory(self) -> epath.Path:
        """The folder that the step has for itself."""
        return self.run.folder / self.name

    @property
    def images(self) -> Images:
        assert self.run.images is not None
        return self.run.images

    def seed_of(self, purpose: str) -> int:
        """A seed of its own for everything random."""
        return self.run.settings.seed_of(purpose)

    def training(self, name: str = "") -> dict[str, Any]:
        """The arguments of `flora_jax.train` that say where a training of this name is, and how
        its random numbers are drawn; by default the step's own."""
        settings, name = self.run.settings, name or self.name
        return {
            "directory": self.run.folder / name,
            "name": name,
            "seed": settings.seed,
            "fsdp": settings.fsdp,
            "profile_step": settings.profile_step,
            "watch": self.watch(name),
        }

    def watch(self, name: str):
        """The writers that get the metrics of the training `name`, too."""
        return watching(self.run.settings.watch, self.run.folder, name)


def has_run(folder: epath.PathLike | None) -> bool:
    """Whether a run was started in this folder."""
    return folder is not None and (user_path(folder) / CONFIG_FILE).exists()


def saved_settings(folder: epath.Path) -> Settings:
    """The settings that the run in this folder was made with."""
    return Settings.from_config(read_json(folder / CONFIG_FILE))


def read_stages(folder: epath.Path) -> dict[str, dict]:
    """The records of the steps that were begun, {"key": str, "seconds": float once done}."""
    path = folder / DONE_FILE
    return read_json(path) if path.exists() else {}


def done_stages(run: Run) -> dict[str, dict]:
    """The records of the steps that are done."""
    return {name: of for name, of in read_stages(run.folder).items() if "seconds" in of}


# What a changed config makes necessary.


def planned(run: Run, script: Script) -> dict[str, Planned]:
    """The steps of a run in their order, none of which is done."""
    copy = Run(run.settings, run.folder, run.images)
    script(copy)
    return copy.plan


def stale_steps(run: Run, plan: Mapping[str, Planned]) -> list[str]:
    """The steps that have left something in the folder which other inputs have led to.

    Raises:
      InputError: the first step is one of them: the run is another one.
    """
    records = read_stages(run.folder)
    stale = [
        name
        for name, step in plan.items()
        if records.get(name, {}).get("key") != step.key
        and (name in records or any(True for _ in left_by(run.folder, [step])))
        and not step.is_always_done
    ]
    if stale and stale[0] == next(iter(plan)):
        raise InputError(
            f"{run.folder} was made by another config; choose another --workdir or undo:"
            f"{listed(changes(run))}"
        )
    return stale


def dependents(name: str, plan: Mapping[str, Planned]) -> list[str]:
    """A step, and all that read what it leaves."""
    found = [name]
    for other, step in plan.items():
        if step.reads(found) and not step.is_always_done:
            found.append(other)
    return found


def changes(run: Run) -> list[tuple[str, object, object]]:
    """Fields with an effect whose value differs from that in the folder: (name, there, here)."""
    there, here = saved_settings(run.folder), run.settings
    with_effect = {name for name, *_ in differences(stable(there), stable(here))}
    unsaid, file = {"stages"}, run.folder / IMAGES_FILE
    if file.exists() and read_json(file)["signature"] == run.images_signature:
        unsaid |= {f"data.{name}" for name in _PLACE}
    found = differences(there.to_config(), here.to_config())
    return [each for each in found if each[0] in with_effect - unsaid]


def left_by(folder: epath.Path, steps: Iterable[Planned]) -> Iterator[epath.Path]:
    """The paths that these steps have left in the folder of a run."""
    patterns = dict.fromkeys(pattern for step in steps for pattern in step.paths)
    found = {path for pattern in patterns for path in matching(folder, pattern)}
    yield from sorted(p for p in found if not any(parent in found for parent in p.parents))


def put_aside(folder: epath.Path, steps: Sequence[Planned]) -> None:
    """Moves what these steps have left to the next free folder earlier/N, if there is anything."""
    made = list(left_by(folder, steps))
    if not made:
        return
    if any(_is_watched(folder, step.name) for step in steps):
        made += matching(folder, WANDB_FILE)  # where nothing can be taken back, another run begins
    numbers = itertools.count(1)
    aside = next(p for n in numbers if not (p := folder / EARLIER / str(n)).exists())
    aside.mkdir(parents=True)
    # In a bucket a folder is there once a file is, and nothing can be moved to it before.
    names = [step.name for step in steps]
    (aside / "stages.txt").write_text("\n".join(names) + "\n")
    for path in made:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    log.info("what %s had made is in %s", ", ".join(names), aside)


def _is_watched(folder: epath.Path, name: str) -> bool:
    """Whether a step has left metrics that others were told, too."""
    files = ("metrics.jsonl", "*/metrics.jsonl", "history.jsonl")
    return any(matching(folder, f"{name}/{file}") for file in files)


@by_the_first
def claim_once(run: Run, plan: Mapping[str, Planned], to_redo: Sequence[str]) -> None:
    """Makes the folder this config's own, and puts aside what it does not vouch for."""
    signature = run.images_signature
    if to_redo:
        changed = listed(changes(run)) if has_run(run.folder) else ""
        why = f", because the config has changed:{changed}" if changed else ""
        log.info("%s are done anew%s", ", ".join(to_redo), why)
        records = {n: of for n, of in read_stages(run.folder).items() if n not in to_redo}
        write_json(run.folder / DONE_FILE, records)
        put_aside(run.folder, [plan[name] for name in to_redo])
    write_json(run.folder / IMAGES_FILE, {"signature": signature})
    write_json(run.folder / CONFIG_FILE, run.settings.to_config())


def check_earlier_are_done(run: Run, plan: Mapping[str, Planned], name: str) -> None:
    """Raises RunError unless all that comes before this step is done with this config."""
    if name not in plan:
        raise InputError(unknown("stage", name, plan))
    records = read_stages(run.folder)
    for earlier in itertools.takewhile(lambda other: other != name, plan):
        record = records.get(earlier, {})
        if "seconds" not in record or record["key"] != plan[earlier].key:
            raise RunError(f"stage {name!r} needs {earlier!r}, which is not done yet")


@by_the_first
def tidy_once(folder: epath.Path, name: str) -> None:
    """Deletes what only the trainings of a finished step needed: checkpoints and predictions."""
    for inside in (name, f"{name}/*"):
        for kind in (models.CHECKPOINTS, PREDICTIONS):
            for path in matching(folder, f"{inside}/{kind}"):
                path.rmtree()


def held(folder: epath.Path) -> contextlib.AbstractContextManager:
    """Locks the folder of a run, where that can be done; the first process does it for all."""
    if is_url(folder) or not is_first():
        return contextlib.nullcontext()
    return locked(folder / "run.lock")
