"""Compressed models beside the dense one, in milliseconds and not only in MACs.

    python benchmarks/subnet.py --model deit_s --batch 16
    python benchmarks/subnet.py --folders runs/digits/dense runs/digits/subnet --batch 256

The first form builds full-size networks with random weights: the published FLORA subnet, a network
slimmed to 60 % of the MACs, and FLORA's uniform ranks on top of that. The second takes saved
models, the first of which is the reference. All are timed in turn, round after round; the table
has medians. `realised` is the share of the MAC saving that is seen in milliseconds.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

import flora_jax as flora
from flora_jax.models import create, functional
from flora_jax.models.spec import Spec
from flora_jax.report.table import human_count

SIZES = {"deit_t": "tiny", "deit_s": "small", "deit_b": "base"}
PUBLISHED = pathlib.Path(__file__).parents[1] / "tests/data/published_subnets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=SIZES)
    what.add_argument("--folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, help="also write the ratios to this file")
    arguments = parser.parse_args()

    if arguments.model:
        models = {name: create(spec) for name, spec in full_size(arguments.model).items()}
    else:
        models = {str(path): flora.load(path) for path in arguments.folders}
    machine = (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores, "
        f"jax {jax.__version__}, float32, batch {arguments.batch}"
    )
    print(machine)
    times = measure({n: _forward(m, arguments.batch) for n, m in models.items()}, arguments.rounds)
    ratios = print_table(models, times, arguments.batch)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "ratios": ratios}, indent=1))


def full_size(model: str) -> dict[str, Spec]:
    dense = flora.deit(SIZES[model])
    specs = {"dense": dense}
    published = json.loads(PUBLISHED.read_text()).get(f"deit_{SIZES[model]}")
    if published:
        ratios = np.ravel(published["ratios_per_block"])
        specs["FLORA, published"] = _low_rank(
            dense, [round(r * la.full_rank) for r, la in zip(ratios, dense.layers, strict=True)]
        )
    slim = _slimmed(dense, round(0.6 * dense.macs()))
    specs["ViT-Slim"] = slim
    space = flora.RankSpace.regular(slim)
    ranks = space.uniform_ranks_within(round(0.46 * dense.macs()))
    specs["FLORA on ViT-Slim"] = _low_rank(slim, ranks)
    return specs


def _low_rank(spec: Spec, ranks) -> Spec:
    pairs = zip(spec.layers, ranks, strict=True)
    return spec.with_ranks(tuple(None if la.is_cheaper_dense(r) else int(r) for la, r in pairs))


def _slimmed(spec: Spec, macs: int) -> Spec:
    """Cut by random gates: the widths differ from block to block as after a search."""
    gated = flora.slim.add_gates(create(spec))
    graphdef, parameters = functional.split(gated.network)
    rng = np.random.default_rng(0)
    for name, value in parameters.items():
        if name.endswith("gate"):
            parameters[name] = rng.normal(size=value.shape).astype(np.float32)
    gated = flora.slim.Gated(
        functional.merge(graphdef, parameters), gated.attention, gated.has_token_gates
    )
    return flora.slim.cut_spec(spec, flora.slim.threshold_to_macs(gated, macs))


def _forward(model, batch: int) -> Callable[[], object]:
    graphdef, parameters = functional.split(model)
    run = jax.jit(lambda parameters, images: functional.merge(graphdef, parameters)(images))
    images = np.random.default_rng(0).normal(size=(batch, *model.spec.image_shape))
    images = jax.device_put(np.float32(images))
    return lambda: run(parameters, images).block_until_ready()


def measure(forwards: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every model in every round, in turn, after two that do not count."""
    times = {name: [] for name in forwards}
    for _ in range(2):
        for forward in forwards.values():
            forward()
    for _ in range(rounds):
        for name, forward in forwards.items():
            started = time.perf_counter()
            forward()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def print_table(models: dict, times: dict[str, list[float]], batch: int) -> dict[str, float]:
    """Returns the ratios `realised_saving` by model."""
    print(
        f"{'model':32}{'MACs':>10}{'share':>8}{'ms':>10}{'share':>8}{'images/s':>10}{'realised':>10}"
    )
    reference, *_ = models
    dense, ratios = models[reference].spec.macs(), {}
    for name, model in models.items():
        milliseconds = statistics.median(times[name])
        macs = model.spec.macs()
        pairs = zip(times[name], times[reference], strict=True)
        share = statistics.median(own / other for own, other in pairs)
        realised = ""
        if macs < dense:
            ratios[f"realised_saving of {name}"] = (1 - share) / (1 - macs / dense)
            realised = f"{100 * ratios[f'realised_saving of {name}']:.0f} %"
        print(
            f"{name:32}{human_count(macs):>10}{macs / dense:>8.3f}{milliseconds:>10.2f}"
            f"{share:>8.3f}{1000 * batch / milliseconds:>10.0f}{realised:>10}"
        )
    return ratios


if __name__ == "__main__":
    main()
