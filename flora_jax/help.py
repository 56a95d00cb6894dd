"""The text of --help; written without importing JAX, which takes seconds."""

import re

from flora_jax import configs
from flora_jax.methods.listing import stages

_TEXT = """\
Makes vision transformers smaller and faster: FLORA (low-rank search) and ViT-Slim.

  flora_jax --config=digits --workdir=runs/digits     runs a config's stages, or goes on with them
  flora_jax --config=yours --config.pretrained=...    any field of a config can be set
  flora_jax --predict=FOLDER photos/ cat.jpg          what a finished model says is in pictures
  flora_jax --evaluate=FOLDER --data=folder:PATH      its accuracy; --json, --split,
                                                      --class_embeddings=FILE of texts, for a CLIP
  flora_jax --benchmark=FOLDER                        ms of a run's models; --against, --batch_sizes
  flora_jax --push_to_hub=owner/name --workdir=DIR    what a run exported, on the Hugging Face hub

  --config=NAME|FILE    what to run (digits); NAME:runlocal shrinks it to a laptop
  --workdir=DIR         the folder of the run, gs:// too; alone: goes on with the run that is there
  --stage=NAME          this stage only; with --redo again, although it is done; report: any time
  --dry_run             what would run, how long it takes, what it leaves on disk; and stops
  --check_topology=v5e:4x4, --check_predictions    does it fit a TPU slice; do stored ones hold
  --profile=STEP, --traceback, --helpfull    a profile; where an error comes from; all flags
  --distributed, --coordinator, --num_processes, --process_id: of several, launch/README.md

Stages, in the order of their method:
{stages}

Configs:
{configs}
"""


def text() -> str:
    """A screen of help: the flags, the stages, the configs."""
    return _TEXT.format(
        stages=_table(stages()),
        configs=_table(_configs()),
    ).rstrip()


def is_asked_for(arguments: list[str]) -> bool:
    """Whether the command line asks for help, or for nothing."""
    return not arguments or any(argument in ("-h", "--help", "-help") for argument in arguments)


def _configs() -> dict[str, str]:
    """Names and first lines; those that differ in the size of the network stand together."""
    alike: dict[str, list[str]] = {}
    for name in configs.names():
        without_size = re.sub(r"-\w+, ImageNet", ", ImageNet", configs.first_line(name))
        alike.setdefault(without_size, []).append(name)
    return {
        ", ".join([first, *(f"_{name.rpartition('_')[2]}" for name in others)]): (
            line if others else configs.first_line(first)
        )
        for line, (first, *others) in alike.items()
    }


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines))
    return "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
