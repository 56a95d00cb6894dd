"""Profile of a training step of the supernet, by module.

    python benchmarks/step_profile.py --model deit_s --batch 16 --json profile.json

A trace of steps that each train another subnet. Every operation of the compiled program counts for
the module of flora_jax that it comes from, products apart from everything else. A core that helps
with a product of another counts for nothing, so that products take more than is said here.
"""

import collections
import pathlib
import re
import resource
import tempfile
import time
from collections.abc import Iterator

import jax
import numpy as np
from common import MODELS, describe_machine, parser_of, write_json
from step import compile_step

import flora_jax as flora
from flora_jax.cluster.memory import use_large_pages

WARM_UP = 2  # steps


def main() -> None:
    parser = parser_of(__doc__, "deit_s", batch=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compute_dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()

    space = flora.RankSpace.regular(MODELS[arguments.model])
    network = flora.factorize(flora.create(space.spec), space).network
    draws = space.sample(np.random.default_rng(0), WARM_UP + arguments.steps, "low_rank_aware")
    step, state, batch = compile_step(network, space.full_rank_genes, arguments)
    for genes in draws[:WARM_UP]:
        state, metrics = step(state, batch, genes, None)
    jax.block_until_ready(metrics)

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            for genes in draws[WARM_UP:]:
                state, metrics = step(state, batch, genes, None)
                jax.block_until_ready(metrics)
            seconds = (time.perf_counter() - started) / arguments.steps
            after = resource.getrusage(resource.RUSAGE_SELF)
        trace = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        spent = by_module(self_seconds(trace), modules(step.as_text()), arguments.steps)

    machine = describe_machine(arguments.model, arguments.compute_dtype, f"batch {arguments.batch}")
    print(machine)
    shares = {name: each / sum(spent.values()) for name, each in spent.items()}
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{name:40}{1000 * spent[name]:8.0f} ms{share:8.1%}")
    faults, in_user, in_system = (
        (getattr(after, field) - getattr(before, field)) / arguments.steps
        for field in ("ru_minflt", "ru_utime", "ru_stime")
    )
    print(
        f"a step: {seconds:.3f} s, {in_user + in_system:.3f} s of all cores, {in_system:.3f} of it "
        f"in the system, {faults:.0f} page faults"
    )
    write_json(arguments.json, machine, shares)


def self_seconds(trace: pathlib.Path) -> dict[str, float]:
    """Seconds of each operation of the step, without those of the operations inside it."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for name, duration in without_children(line.events):
                seconds[name] += duration / 1e9
    return seconds


def without_children(events) -> Iterator[tuple[str, float]]:
    """(operation, nanoseconds of its own) of one thread."""
    spans = []
    for event in events:
        facts = dict(event.stats)
        if facts.get("hlo_module") == "jit_step" and not event.name.startswith("end: "):
            spans.append((event.start_ns, -event.duration_ns, facts["hlo_op"]))
    open_spans: list[list] = []  # [end, operation, nanoseconds of its own]
    for start, negative, name in sorted(spans):
        while open_spans and open_spans[-1][0] <= start:
            yield tuple(open_spans.pop()[1:])
        if open_spans:
            open_spans[-1][2] += negative
        open_spans.append([start - negative, name, -negative])
    while open_spans:
        yield tuple(open_spans.pop()[1:])


def by_module(seconds: dict[str, float], modules: dict[str, str], steps: int) -> dict[str, float]:
    spent: dict[str, float] = collections.defaultdict(float)
    for name, each in seconds.items():
        spent[modules.get(name, "no module")] += each / steps
    return dict(spent)


def modules(program: str) -> dict[str, str]:
    """Module that each operation of a compiled program counts for, from its text."""
    tables = {
        table: dict(re.findall(r"^(\d+) (.*)$", rows, re.MULTILINE))
        for table, rows in re.findall(r"^(\w+)\n((?:\d+ .*\n)+)", program, re.MULTILINE)
    }

    def module_of(frame: str | None) -> str:
        """The innermost of our own that called the operation."""
        while frame is not None:
            ids = dict(re.findall(r"(\w+)=(\d+)", tables["StackFrames"][frame]))
            location = tables["FileLocations"][ids["file_location_id"]]
            file = tables["FileNames"][re.search(r"file_name_id=(\d+)", location)[1]]
            if "flora_jax/" in file:
                return file.rpartition("flora_jax/")[2].strip('"')
            parent = ids.get("parent_frame_id")
            frame = None if parent == frame else parent
        return "no module"

    computations = re.findall(r"^%(\S+) .*\{\n((?:  .*\n)+)", program, re.MULTILINE)
    with_product = {name for name, body in computations if " dot(" in body}
    found = {}
    for name, operation in re.findall(r"^ *(?:ROOT )?%(\S+) = (.*)$", program, re.MULTILINE):
        frame = re.search(r"stack_frame_id=(\d+)", operation)
        called = re.search(r"calls=%([^\s,)]+)", operation)
        is_product = " dot(" in operation or (called and called[1] in with_product)
        found[name] = module_of(frame and frame[1]) + ", products" * bool(is_product)
    return found


if __name__ == "__main__":
    use_large_pages()  # as the command line does
    main()
