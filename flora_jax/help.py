"""What --help says; written without importing JAX, which takes seconds."""

from flora_jax import configs
from flora_jax.stages.names import STAGES

_TEXT = """\
Makes vision transformers smaller and faster: FLORA (low-rank search) and ViT-Slim.

  flora_jax --config=digits --workdir=runs/digits     runs a config's stages, or goes on with them
  flora_jax --config=yours --config.pretrained=...    any field of a config can be set
  flora_jax --predict=FOLDER photos/ cat.jpg          what a finished model says is in pictures
  flora_jax --evaluate=FOLDER --data=folder:PATH      its accuracy on labelled ones; --json, --split
  flora_jax --benchmark=FOLDER                        ms of a run's models; --against, --batch_sizes

  --config=NAME|FILE    what to run (digits); NAME:runlocal shrinks it to a laptop
  --workdir=DIR         the folder of the run, gs:// too; alone: goes on with the run that is there
  --stage=NAME          this stage only; with --redo again, although it is done
  --dry_run             what would run, how long it takes, what it leaves on disk; and stops
  --check_topology=v5e:4x4    does it fit a TPU slice? needs no TPU and no --workdir
  --check_predictions   compares stored predictions with a fresh pass of their teacher
  --profile=STEP, --traceback, --helpfull    a profile; where an error comes from; all flags
  --distributed, --coordinator, --num_processes, --process_id: of several, launch/README.md

Stages, in their order:
{stages}

Configs:
{configs}
"""


def text() -> str:
    """A screen of help: the flags, the stages, the configs."""
    return _TEXT.format(
        stages=_table(STAGES),
        configs=_table({name: configs.first_line(name) for name in configs.names()}),
    ).rstrip()


def is_asked_for(arguments: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(argument in ("-h", "--help", "-help") for argument in arguments)


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
