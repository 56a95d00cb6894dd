"""Shared parts of the benchmarks: models, arguments, the machine, the JSON file."""

import argparse
import importlib.util
import itertools
import json
import pathlib
import resource
from collections.abc import Callable, Sequence

import numpy as np

import flora_jax as flora
from flora_jax.timing import WARM_UP, describe_device

DEITS = {
    "deit_t": flora.deit("tiny"),
    "deit_s": flora.deit("small"),
    "deit_b": flora.deit("base"),
    "two_blocks": flora.deit("tiny", depth=2),  # to try a program in seconds
}
MODELS = DEITS | {"tiny_vit_21m": flora.tiny_vit("21m")}
PAUSE = 0.3  # seconds between pieces of work that are timed


def parser_of(
    doc: str,
    model: str = "",
    models: Sequence[str] = tuple(MODELS),
    batch: int = 0,
    rounds: int = 0,
) -> argparse.ArgumentParser:
    """A parser with --json, and with the options for which a default is given."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if model:
        parser.add_argument("--model", choices=models, default=model)
    if batch:
        parser.add_argument("--batch", type=int, default=batch, help="images at once")
    if rounds:
        parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    return parser


def peak_gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def why_no_peer(spec: flora.Spec) -> str:
    """A reason why `torch_peer` cannot compute the same; "" where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return "" if isinstance(spec, flora.ViTSpec) else f"there is no {spec.title} in torch_peer.py"


def describe_machine(*facts: str) -> str:
    return ", ".join((describe_device(), *facts))


def some_images(spec, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, H, W, C] and labels int32 [B]"""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *spec.image_shape), np.uint8)
    return images, rng.integers(0, spec.num_classes, batch).astype(np.int32)


def one_after_another(
    function: Callable, arguments: Sequence, untimed: int = 0
) -> Callable[[], object]:
    """Work for `time_in_turn`: the function of each argument; the first ones also to warm up."""
    to_warm_up = itertools.islice(itertools.cycle(arguments), WARM_UP)
    remaining = iter(np.repeat([*to_warm_up, *arguments], 1 + untimed, axis=0))
    return lambda: function(next(remaining))


def write_json(path: pathlib.Path | None, machine: str, ratios: dict) -> None:
    if path:
        path.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=1) + "\n")
