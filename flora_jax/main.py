"""Command line: flora_jax --config=digits --workdir=DIR, or python -m flora_jax.main ..."""

import argparse
import ast
import contextlib
import io
import logging
import os
import platform
import re
import sys
import traceback
import warnings

from flora_jax.cluster import interrupts, memory
from flora_jax.io.paths import check_are_there

if __name__ == "__main__":
    check_are_there(sys.argv[1:])
    memory.use_large_pages()
    interrupts.answer_at_once()  # also while JAX is imported, which takes seconds

import absl.logging
import jax
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from flora_jax import configs, help
from flora_jax.cluster import processes
from flora_jax.cluster.mesh import check_devices
from flora_jax.commands.benchmark import BATCH_SIZES, benchmark
from flora_jax.commands.check_predictions import check_predictions
from flora_jax.commands.evaluate import evaluate
from flora_jax.commands.predict import predict
from flora_jax.commands.push import push
from flora_jax.errors import UserError
from flora_jax.io.files import user_cache_dir
from flora_jax.io.paths import user_path
from flora_jax.methods import start
from flora_jax.preflight.plan import plan
from flora_jax.preflight.topology import check_topology, use_compiler_only
from flora_jax.runs.auto_config import settings_of
from flora_jax.runs.checks import check
from flora_jax.runs.workdir import Run, done_stages, has_run

_DEFAULT_CONFIG = "digits"
_OF_A_MODEL = ("predict", "evaluate", "benchmark", "push_to_hub")  # flags that need no config
# A default file would be read here at once, and the overrides meant for another file applied to it.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run; any field can be set: --config.section.key=value"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: results and checkpoints.")
_STAGE = flags.DEFINE_string("stage", None, "Run this stage only.")
_REDO = flags.DEFINE_bool("redo", False, "Do the one stage again.")
_PROFILE = flags.DEFINE_integer("profile", None, "Write a JAX profile of this training step.")
_CHECK_PREDICTIONS = flags.DEFINE_bool(
    "check_predictions", False, "Compare stored predictions with a fresh pass of their teacher."
)
_CHECK_TOPOLOGY = flags.DEFINE_string(
    "check_topology", None, "Whether the run fits a TPU slice, such as v5e:4x4; no TPU is needed."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print what would run, how long it takes and what it leaves, and stop."
)
_PREDICT = flags.DEFINE_string(
    "predict", None, "Folder of a model that says what is in the pictures given behind the flags."
)
_EVALUATE = flags.DEFINE_string(
    "evaluate", None, "Folder of a model whose accuracy on the images of --data is measured."
)
_PUSH_TO_HUB = flags.DEFINE_string(
    "push_to_hub", None, "owner/name on the Hugging Face hub, for the export in --workdir."
)
_DATA = flags.DEFINE_string("data", None, "For --evaluate: folder:PATH or tfds:NAME.")
_SPLIT = flags.DEFINE_string("split", None, "For --evaluate: a split other than the test split.")
_CLASS_EMBEDDINGS = flags.DEFINE_string(
    "class_embeddings",
    None,
    "For --evaluate of a model that embeds images: a .npy or .safetensors of its classes' texts.",
)
_BENCHMARK = flags.DEFINE_string(
    "benchmark", None, "Folder of a run or a model that is timed in every engine installed."
)
_AGAINST = flags.DEFINE_string("against", None, "For --benchmark: a model to compare with.")
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "For --benchmark: images at a time, 1,8,64 by default."
)
_JSON = flags.DEFINE_bool("json", False, "For --predict, --evaluate, --benchmark: print JSON.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, which JAX finds on TPU, SLURM and Kubernetes."
)
_TRACEBACK = flags.DEFINE_bool(
    "traceback", False, "Show where an error comes from, also where its message says it all."
)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 and _PREDICT.value is None:
        raise app.UsageError(f"unexpected arguments: {' '.join(arguments[1:])}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    try:
        with interrupts.ended_with_its_reader():
            _run(arguments[1:])
    except processes.Stopped as stopped:
        print(f"stopped: {stopped}; the same command goes on", file=sys.stderr)
        sys.exit(stopped.exit_status)
    except UserError as error:
        if _TRACEBACK.value:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        processes.exit_at_once(1)
    except Exception:  # a fault of ours; Python's own exit might wait for other processes
        traceback.print_exc()
        processes.exit_at_once(1)


def _run(pictures: list[str]) -> None:
    """Does what the flags say."""
    if _DISTRIBUTED.value or _COORDINATOR.value:
        processes.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    if _CHECK_TOPOLOGY.value:
        use_compiler_only()
    absl.logging.set_verbosity(absl.logging.WARNING)
    check_devices()
    _show_log()
    _configure_jax()
    if _PREDICT.value is not None:
        if predict(_PREDICT.value, pictures, _JSON.value):
            sys.exit(1)
    elif _EVALUATE.value is not None:
        about = (str(_DATA.value), _SPLIT.value, _JSON.value, _CLASS_EMBEDDINGS.value)
        evaluate(_EVALUATE.value, *about)
    elif _BENCHMARK.value is not None:
        sizes = _BATCH_SIZES.value or BATCH_SIZES
        benchmark(_BENCHMARK.value, _AGAINST.value, sizes, _JSON.value)
    elif _PUSH_TO_HUB.value is not None:
        push(_PUSH_TO_HUB.value, _WORKDIR.value)
    elif _CHECK_TOPOLOGY.value:
        settings = settings_of(_CONFIG.value)
        print(check_topology(settings, _CHECK_TOPOLOGY.value))
    elif _DRY_RUN.value:
        this_run = Run(settings_of(_CONFIG.value), user_path(_WORKDIR.value or "."))
        start.check_stages(this_run)
        this_run.images = check(this_run.settings, done_stages(this_run))
        print(plan(this_run, *start.plan_of(this_run)))
    elif _CHECK_PREDICTIONS.value:
        settings = settings_of(_CONFIG.value)
        check_predictions(Run(settings, epath.Path(_WORKDIR.value)))
    else:
        if _PROFILE.value:
            _CONFIG.value.profile_step = _PROFILE.value
        if (config := _CONFIG.value) is not None:
            given = dict(each.split(" = ", 1) for each in config.get("given", ()))
            given |= config_flags.get_override_values(flags.FLAGS["config"])
            with config.unlocked():
                config.given = tuple(f"{name} = {value}" for name, value in given.items())
        start.run(_CONFIG.value, _WORKDIR.value, _STAGE.value, _REDO.value)


def run() -> None:
    """Parses the flags and runs what they say."""
    flags.register_multi_flags_validator(
        ["workdir", "check_topology", "dry_run", *_OF_A_MODEL],
        lambda values: any(values.values()),
        "--workdir must be given, the folder of the run.",
    )
    flags.mark_flags_as_mutual_exclusive(_OF_A_MODEL)
    of_data = ("split", "class_embeddings")
    flags.register_multi_flags_validator(
        ["data", "evaluate", *of_data],
        lambda of: bool(of["data"]) == bool(of["evaluate"]) >= any(of[name] for name in of_data),
        "--evaluate=FOLDER and --data=folder:PATH or tfds:NAME come together, --split and "
        "--class_embeddings with them.",
    )
    flags.register_multi_flags_validator(
        ["against", "batch_sizes", "benchmark"],
        lambda values: values["benchmark"] or not (values["against"] or values["batch_sizes"]),
        "--against and --batch_sizes need --benchmark=FOLDER.",
    )
    flags.FLAGS.set_gnu_getopt()  # flags may stand behind the pictures
    app.run(main, flags_parser=_parse_flags)


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parses the flags; a config field that does not exist is the user's error: no traceback."""
    if help.is_asked_for(arguments[1:]):
        print(help.text())
        sys.exit()
    try:
        return flags.FLAGS(_with_config_file(arguments))
    except flags.Error as error:
        sys.exit(f"error: {re.sub(r'^flags .*?: (?=--)', '', str(error))}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = str(error)
        with contextlib.suppress(ValueError, SyntaxError):  # that of a KeyError is a literal
            text = str(ast.literal_eval(text))
        sys.exit(f"error: {_no_such_field(text, arguments) or ' '.join(text.split())}")


def _no_such_field(text: str, arguments: list[str]) -> str | None:
    """What ml_collections says of a field that is not there, with the whole name of the field."""
    if not (found := re.match(r"'(\w+)'(?:\s+Did you mean \"(\w+)\")?", text)):
        return None
    for argument in arguments:
        if given := re.match(rf"--?config\.((?:\w+\.)*){found[1]}\b", argument):
            hint = f" (did you mean {given[1] + found[2]!r}?)" if found[2] else ""
            return f"no setting {given[1]}{found[1]}{hint}"
    return None


def _with_config_file(arguments: list[str]) -> list[str]:
    """The arguments with the file of the config in the place of its name, or of a run's own."""
    program, *others = arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config")
    parser.add_argument("--workdir", "-workdir")
    if any(re.match(f"--?({'|'.join(_OF_A_MODEL)})(=|$)", argument) for argument in others):
        return arguments
    known, others = parser.parse_known_args(others)
    workdir = known.workdir and os.fspath(user_path(known.workdir))
    if workdir is not None:
        others = [f"--workdir={workdir}", *others]
    if known.config is None and has_run(workdir):
        file = configs.file_of_run(workdir)
    else:
        file = configs.file_of(known.config or _DEFAULT_CONFIG)
    return [program, f"--config={file}", *others]


def _configure_jax() -> None:
    if jax.config.values["jax_compilation_cache_dir"] is None:
        compiled = user_cache_dir("compiled")
        if compiled is not None:
            # A folder for each machine: programs for one CPU may not run on another.
            folder = os.fspath(compiled / platform.node())
            jax.config.update("jax_compilation_cache_dir", folder)
    if jax.config.values["jax_num_cpu_devices"] > 1:
        # Several programs in flight at once would wait for each other's threads for ever.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _show_log() -> None:
    """Shows our own lines in full."""
    # The exceptions that Orbax logs in its threads are also raised, as the error of the save.
    absl.logging.get_absl_logger().addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("flora_jax")
    log.addHandler(handler)
    log.setLevel(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    log.propagate = False
    # Python's own lines would show a file and its code.
    warnings.showwarning = lambda message, *_: log.warning("%s", " ".join(str(message).split()))


if __name__ == "__main__":
    run()
