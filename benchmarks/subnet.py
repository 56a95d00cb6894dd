"""Compressed models beside the dense one, in milliseconds and not only in MACs.

    python benchmarks/subnet.py --model deit_s --batch 16
    python benchmarks/subnet.py --folders runs/digits/dense runs/digits/subnet --batch 256

The first form builds full-size networks with random weights: the published FLORA subnet, a network
slimmed to 60 % of the MACs, and FLORA's uniform ranks on top of that. Before, it measures the
latency table that a search may spend, which predicts the published subnet and random ones:
`latency_prediction_error` is the median of |predicted / measured - 1|, both as shares of the dense
network's time. The second form takes saved models, the first of which is the reference.

All are timed in turn, round after round; the tables have medians. `realised` is the share of the
MAC saving that is seen in milliseconds.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from common import DEITS, PAUSE, describe_machine, parser_of, write_json

import flora_jax as flora
from flora_jax.models import functional
from flora_jax.models.factory import create
from flora_jax.models.spec import Spec
from flora_jax.report.table import human_count
from flora_jax.timing import median_ratio, time_in_turn
from flora_jax.weights.export.engines import ENGINES, engine_of
from flora_jax.weights.export.latency import measure, time_specs

SIXTHS = tuple(i / 6 for i in range(1, 7))
EIGHTHS = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 1.0)
RATIOS = dict.fromkeys(DEITS, SIXTHS) | {"deit_b": EIGHTHS}  # the published choices
_PUBLISHED_NAMES = {"deit_s": "deit_small", "deit_b": "deit_base"}
_RATIO_NAMES = {"FLORA, published": "realised_saving"}
PUBLISHED = pathlib.Path(__file__).parents[1] / "tests/data/published_subnets.json"


def main() -> None:
    parser = parser_of(__doc__, batch=16, rounds=15)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=DEITS)
    what.add_argument("--folders", nargs="+", type=pathlib.Path)
    parser.add_argument("--subnets", type=int, default=6, help="random ones to predict; 0: none")
    parser.add_argument("--engine", choices=ENGINES, default="jax", help="of the table")
    arguments = parser.parse_args()

    machine = describe_machine("float32", f"batch {arguments.batch}")
    print(machine)
    ratios = {}
    if arguments.model:
        if arguments.subnets:
            ratios["latency_prediction_error"] = prediction_error(arguments)
        models = {name: create(spec) for name, spec in full_size(arguments.model).items()}
    else:
        models = {str(path): flora.load(path) for path in arguments.folders}
    forwards = {name: _forward(model, arguments.batch) for name, model in models.items()}
    times = time_in_turn(forwards, arguments.rounds, PAUSE)
    ratios |= print_table(models, times, arguments.batch)
    write_json(arguments.json, machine, ratios)


def prediction_error(arguments: argparse.Namespace) -> float:
    """Of the published subnet, where there is one, and of random ones."""
    dense, ratios = DEITS[arguments.model], RATIOS[arguments.model]
    space = flora.RankSpace.regular(dense, ratios)
    started = time.perf_counter()
    engine = engine_of(arguments.engine)
    table = measure(space.variants(), engine, arguments.batch)
    print(f"latency table: {time.perf_counter() - started:.0f} s")

    random = space.sample(np.random.default_rng(0), arguments.subnets)
    genes = {f"random {i}": one for i, one in enumerate(random, start=1)}
    if published := _published(arguments.model):
        genes = {"published": np.searchsorted(ratios, np.array(published) - 1e-6)} | genes
    specs = {name: space.extracted_spec(one) for name, one in genes.items()}
    times = time_specs({"dense": dense} | specs, engine, arguments.batch, arguments.rounds)

    errors = []
    print(f"{'subnet':12}{'MACs':>8}{'predicted':>11}{'measured':>10}{'error':>10}")
    for name, one in genes.items():
        predicted = float(table.cost(one)) / 1e6 / table.dense_ms
        measured = median_ratio(times[name], times["dense"])
        errors.append(predicted / measured - 1)
        macs = specs[name].macs() / dense.macs()
        print(
            f"{name:12}{macs:>8.3f}{predicted:>11.3f}{measured:>10.3f}{100 * errors[-1]:>+8.1f} %"
        )
    return statistics.median(map(abs, errors))


def _published(model: str) -> list[float]:
    """The ratios of the released subnet, empty where there is none."""
    subnets = json.loads(PUBLISHED.read_text())
    return np.ravel(
        subnets.get(_PUBLISHED_NAMES.get(model), {}).get("ratios_per_block", ())
    ).tolist()


def full_size(model: str) -> dict[str, Spec]:
    dense = DEITS[model]
    specs = {"dense": dense}
    if published := _published(model):
        pairs = zip(published, dense.layers, strict=True)
        specs["FLORA, published"] = _low_rank(dense, [round(r * la.full_rank) for r, la in pairs])
    slim = _slimmed(dense, round(0.6 * dense.macs()))
    specs["ViT-Slim"] = slim
    space = flora.RankSpace.regular(slim)
    ranks = space.uniform_ranks_within(round(0.46 * dense.macs()))
    specs["FLORA on ViT-Slim"] = _low_rank(slim, ranks)
    return specs


def _low_rank(spec: Spec, ranks) -> Spec:
    pairs = zip(spec.layers, ranks, strict=True)
    return spec.with_ranks(tuple(la.extracted_rank(int(r)) for la, r in pairs))


def _slimmed(spec: Spec, macs: int) -> Spec:
    """Cut by random gates: the widths differ from block to block as after a search."""
    gated = flora.slim.add_gates(create(spec))
    structure, parameters = functional.split(gated.network)
    rng = np.random.default_rng(0)
    for name, value in parameters.items():
        if name.endswith("gate"):
            parameters[name] = rng.normal(size=value.shape).astype(np.float32)
    gated = flora.slim.Gated(
        functional.merge(structure, parameters), gated.attention, gated.has_token_gates
    )
    return flora.slim.cut_spec(spec, flora.slim.threshold_to_macs(gated, macs))


def _forward(model, batch: int) -> Callable[[], object]:
    structure, parameters = functional.split(model)
    run = jax.jit(lambda parameters, images: functional.merge(structure, parameters)(images))
    images = np.random.default_rng(0).normal(size=(batch, *model.spec.image_shape))
    images = jax.device_put(np.float32(images))
    return lambda: run(parameters, images).block_until_ready()


def print_table(models: dict, times: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """Returns `realised_saving`, of the published subnet, and the others by their names."""
    print(
        f"{'model':32}{'MACs':>10}{'share':>8}{'ms':>10}{'share':>8}{'images/s':>10}{'realised':>10}"
    )
    reference, *_ = models
    dense, ratios = models[reference].spec.macs(), {}
    for name, model in models.items():
        milliseconds = np.median(times[name])
        macs = model.spec.macs()
        share = median_ratio(times[name], times[reference])
        realised = ""
        if macs < dense:
            saving = (1 - share) / (1 - macs / dense)
            ratios[_RATIO_NAMES.get(name, f"realised_saving of {name}")] = saving
            realised = f"{100 * saving:.0f} %"
        print(
            f"{name:32}{human_count(macs):>10}{macs / dense:>8.3f}{milliseconds:>10.2f}"
            f"{share:>8.3f}{1000 * batch / milliseconds:>10.0f}{realised:>10}"
        )
    return ratios


if __name__ == "__main__":
    main()
