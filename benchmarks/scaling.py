"""Scaling of a supernet's training over TPU v5e chips, on paper and from the compiler.

    python benchmarks/scaling.py --model deit_b --chips v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16

No TPU is needed, but libtpu (the extra tpu). Every program is compiled for its
topology, which gives its memory and what it communicates; `--skip_compiling` leaves that out, and
takes the parameters' size for the all-reduce. Times are computed from the chip's data sheet: no
clock ran. The last table is the cost of a whole FLORA run by the config.
"""

import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from common import describe_machine, parser_of, write_json

import flora_jax as flora
from flora_jax.cluster.mesh import make_mesh
from flora_jax.flora.extras.tpu_kernel import TILE
from flora_jax.flora.space import RankSpace
from flora_jax.models import functional
from flora_jax.preflight.programs import (
    DoesNotFitError,
    Program,
    Training,
    compile_training,
    heaviest_training,
)
from flora_jax.preflight.topology import GIB, devices_of, use_compiler_only
from flora_jax.runs.budgets import budgets_of
from flora_jax.runs.settings import Settings

# docs.cloud.google.com/tpu/docs/v5e: a chip has four links, 1600 Gbit/s together each way.
PEAK = 197e12 / 2  # bfloat16 multiply-adds a second
HBM_BANDWIDTH = 819e9  # bytes a second
LINK_BANDWIDTH = 50e9  # bytes a second, each way
TORUS_SIDE = 16  # only a whole side of a pod closes to a ring
UPDATE_TRAFFIC = 7  # AdamW reads parameter, gradient and two moments, and writes three of them
IMAGENET = 1_281_167

STEP_TITLES = (
    *("chips", "images a chip", "images a step", "T multiply-adds a chip", "ms at the peak"),
    *("ms at ASSUMED", "update ms", "all-reduce ms", "efficiency", "images/s"),
)
MEMORY_TITLES = ("memory GiB", "temporaries GiB", "program MB", "all-reduced MB")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=("deit_t", "deit_s", "deit_b"), default="deit_b")
    parser.add_argument("--chips", nargs="+", default=["v5e:2x2", "v5e:4x4"], metavar="v5e:AxB")
    parser.add_argument("--images", type=int, default=64, help="a chip, for weak scaling")
    parser.add_argument("--batch", type=int, default=1024, help="of all, for strong scaling")
    parser.add_argument("--utilization", type=float, default=0.4, help="of the peak; assumed")
    parser.add_argument("--skip_compiling", action="store_true")
    arguments = parser.parse_args()
    for topology in arguments.chips:
        if not topology.startswith("v5e:"):
            parser.error(f"{topology}: only v5e's figures are known here")
        if arguments.batch % num_chips(topology):
            parser.error(f"--batch {arguments.batch} cannot be shared by {topology}")

    use_compiler_only()
    config = importlib.import_module(f"flora_jax.configs.{arguments.model}").get_config()
    config.supernet.compute_dtype = "bfloat16"
    settings = Settings.from_config(config)
    training = heaviest_training(settings, "tiled")
    space = settings.space.of(training.spec)
    draws = space.sample(np.random.default_rng(0), 1000, "low_rank_aware")
    macs = training_macs(executed_macs(space, draws).mean(), training.spec)
    print(
        f"{arguments.model}, supernet of {num_parameters(training) / 1e6:.1f} M parameters, "
        f"bfloat16, teacher in the step; {macs / 1e9:.1f} G multiply-adds an image, of which "
        f"{training.macs / 1e9:.1f} G are counted by the papers' rule"
    )

    @functools.cache
    def compiled(topology: str, images: int) -> Program | DoesNotFitError | None:
        if arguments.skip_compiling:
            return None
        print(f"compiling for {topology}, {images} images a chip", file=sys.stderr, flush=True)
        try:
            mesh = make_mesh(1, devices_of(topology)[1])
            return compile_training(settings, training, mesh, images)
        except DoesNotFitError as error:
            return error

    def row(topology: str, images: int) -> list[str]:
        step = Step(topology, images, macs, num_parameters(training), arguments.utilization)
        return [*step.cells(), *memory_cells(compiled(topology, images))]

    assumed = f"{100 * arguments.utilization:.0f} % of the peak"
    title = [title.replace("ASSUMED", assumed) for title in (*STEP_TITLES, *MEMORY_TITLES)]
    print(f"\nWeak scaling, {arguments.images} images a chip\n")
    weak = print_table(title, (row(topology, arguments.images) for topology in arguments.chips))
    print(f"\nStrong scaling, {arguments.batch} images a step\n")
    shares = {topology: arguments.batch // num_chips(topology) for topology in arguments.chips}
    strong = print_table(title, (row(topology, images) for topology, images in shares.items()))
    print(f"\nA whole run, at {assumed}\n")
    cost = print_cost(stages(settings, space, macs), arguments.utilization)
    tables = {"weak scaling": weak, "strong scaling": strong, "a whole run": cost}
    write_json(arguments.json, describe_machine(arguments.model, assumed), tables)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step's times on paper, in seconds, without any overlap."""

    topology: str
    images: int
    macs: float
    num_parameters: int
    utilization: float

    @property
    def arithmetic(self) -> float:
        return self.macs * self.images / PEAK / self.utilization

    @property
    def update(self) -> float:
        return UPDATE_TRAFFIC * 4 * self.num_parameters / HBM_BANDWIDTH

    @property
    def all_reduce(self) -> float:
        return all_reduce_seconds(self.topology, 4 * self.num_parameters)

    def cells(self) -> list[str]:
        chips, seconds = num_chips(self.topology), self.arithmetic + self.update + self.all_reduce
        return [
            self.topology,
            str(self.images),
            str(self.images * chips),
            f"{self.images * self.macs / 1e12:.2f}",
            f"{1e3 * self.arithmetic * self.utilization:.1f}",
            f"{1e3 * self.arithmetic:.1f}",
            f"{1e3 * self.update:.1f}",
            f"{1e3 * self.all_reduce:.1f}",
            f"{100 * self.arithmetic / seconds:.0f} %",
            f"{self.images * chips / seconds:,.0f}",
        ]


def memory_cells(program: Program | DoesNotFitError | None) -> list[str]:
    if program is None:
        return [""] * 4
    if isinstance(program, DoesNotFitError):
        return [f"{program.needed / GIB:.1f}: does not fit", "", "", ""]
    return [
        f"{program.total / GIB:.2f}",
        f"{program.temporaries / GIB:.2f}",
        f"{program.code / 1e6:.0f}",
        f"{sum(c.num_bytes for c in program.collectives) / 1e6:.0f}",
    ]


def all_reduce_seconds(topology: str, num_bytes: float) -> float:
    """Half of the bytes go along each axis first; a line is half as fast as a ring."""
    chips = num_chips(topology)
    links = sum(2 if side == TORUS_SIDE else 1 for side in sides_of(topology))
    return 2 * num_bytes * (chips - 1) / chips / (links * LINK_BANDWIDTH)


def sides_of(topology: str) -> list[int]:
    return [int(side) for side in topology.partition(":")[2].split("x")]


def num_chips(topology: str) -> int:
    return math.prod(sides_of(topology))


def num_parameters(training: Training) -> int:
    return sum(math.prod(p.shape) for p in functional.split(training.network)[1].values())


def executed_macs(space: RankSpace, genes: np.ndarray) -> np.ndarray:
    """genes [..., L] -> multiply-adds of a forward pass [...]: pairs of factors in whole tiles."""
    ranks = -(-space.ranks(genes) // TILE) * TILE
    weights = [
        layer.tokens * (layer.in_features + layer.out_features) for layer in space.spec.layers
    ]
    return space.fixed_macs + ranks @ np.array(weights)


def training_macs(forward: float, teacher: flora.Spec) -> float:
    return 3 * forward + teacher.macs()


def stages(
    settings: Settings, space: RankSpace, supernet_macs: float
) -> dict[str, tuple[float, float]]:
    """Of a run: images that pass through each stage, and multiply-adds for one."""
    spec, rng = space.spec, np.random.default_rng(0)
    heldout = round(IMAGENET * settings.data.heldout_fraction)
    images = IMAGENET - heldout
    full = executed_macs(space, space.full_rank_genes)
    uniform = executed_macs(space, space.sample(rng, 1000)).mean()
    local = full + (uniform - full) / space.num_blocks
    window = budgets_of(settings.spending, spec)[-1].window
    candidate = executed_macs(space, space.sample_within(rng, 1000, window)).mean()
    epochs, part = settings.filter.train.epochs, settings.filter.train_fraction
    triples = sum(len(kept) for kept in space.kept)
    candidates = settings.search.generations * settings.search.population
    networks = 1 if settings.uniform_baseline == "none" else 2
    return {
        f"{space.num_blocks} local supernets, {epochs:g} epochs of {100 * part:g} %": (
            space.num_blocks * epochs * part * images,
            training_macs(local, spec),
        ),
        # Half of the blocks, on average, come after the one that varies.
        f"scores of {triples} triples": (triples * heldout, full / 2),
        f"supernet, {settings.supernet.epochs:g} epochs": (
            settings.supernet.epochs * images,
            supernet_macs,
        ),
        f"search, {candidates} candidates": (candidates * heldout, candidate),
        f"fine-tuning of {networks}, {settings.finetune.epochs:g} epochs": (
            networks * settings.finetune.epochs * images,
            training_macs(sum(window) / 2, spec),
        ),
    }


def print_cost(stages: dict[str, tuple[float, float]], utilization: float) -> list[dict]:
    rows = [[name, images, macs, images * macs] for name, (images, macs) in stages.items()]
    images, total = (sum(row[column] for row in rows) for column in (1, 3))
    rows.append(["all", images, total / images, total])
    return print_table(
        ("stage", "times ImageNet", "G multiply-adds an image", "10^18 in all", "chip-hours"),
        [
            [
                name,
                f"{images / IMAGENET:.1f}",
                f"{macs / 1e9:.1f}",
                f"{total / 1e18:.2f}",
                f"{total / PEAK / utilization / 3600:.0f}",
            ]
            for name, images, macs, total in rows
        ],
    )


def print_table(title: Sequence[str], rows: Iterable[list[str]]) -> list[dict[str, str]]:
    """Each row as soon as it is there; returns all of them."""
    print("| " + " | ".join(title) + " |")
    print("|" + "---|" * len(title), flush=True)
    found = []
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
        found.append(dict(zip(title, row, strict=True)))
    return found


if __name__ == "__main__":
    main()
