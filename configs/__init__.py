"""The configs that come with flora_jax, one file each: --config=NAME, or the path of a file."""

import ast
import pathlib
import re

from flora_jax.errors import InputError
from flora_jax.errors.hints import choices
from flora_jax.io.paths import user_path

_FOLDER = pathlib.Path(__file__).parent
_NOT_A_CONFIG = ("__init__", "common", "imagenet", "saved")


def names() -> list[str]:
    """The names of the configs, such as "deit_b"."""
    return sorted(f.stem for f in _FOLDER.glob("*.py") if f.stem not in _NOT_A_CONFIG)


def first_line(name: str) -> str:
    """What a config is for: the first line of its docstring."""
    docstring = ast.get_docstring(ast.parse((_FOLDER / f"{name}.py").read_text()))
    return (docstring or "").partition("\n")[0]


def file_of_run(workdir: str) -> str:
    """The config that the run in this folder was made with, as a config file and its argument."""
    return f"{_FOLDER / 'saved'}.py:{workdir}"


def file_of(config: str) -> str:
    """The file that a user means by a name, "deit_b", or by a path, "configs/deit_b.py".

    Args:
      config: may end with an argument of the config, as in "deit_b:runlocal", which stays.

    Raises:
      InputError: there is no such file and no config of this name; lists those there are.
    """
    path, colon, argument = config.partition(":")
    file = user_path(path)
    if file.is_file():
        return f"{file}{colon}{argument}"
    name = path.removeprefix("configs/").removesuffix(".py")
    if name not in names():
        as_ours = re.sub(r"_(t)iny.*|_(s)mall.*|_(b)ase.*", r"_\1\2\3", name)  # deit_base_...
        raise InputError(
            f"unknown config {name!r}; {choices(as_ours, names())}, or the path of a file"
        )
    return f"{_FOLDER / name}.py{colon}{argument}"
