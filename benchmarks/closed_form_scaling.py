"""Scaling of the closed form over TPU v5e chips: by the compiler, on paper, and on this CPU.

    python benchmarks/closed_form_scaling.py --model vit_g \\
        --chips v5e:1x1 v5e:2x2 v5e:4x4 v5e:8x8 v5e:16x16

No TPU is needed, but libtpu (the extra tpu): the programs of `flora.compress` are compiled for each
topology, which gives their memory and what they communicate; `--skip_compiling` leaves that out.
What a host computes is timed here. Times of chips are computed: no clock of a TPU ran.
"""

import dataclasses
import math
import tempfile
import timeit

import jax
import jax.numpy as jnp
import numpy as np
from common import describe_machine, parser_of, write_json
from scaling import PEAK, all_reduce_seconds, num_chips, print_table
from threadpoolctl import threadpool_limits

import flora_jax as flora
from flora_jax.closed_form import calibrate, compress, reduce, refit, regression
from flora_jax.cluster.mesh import make_mesh
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.preflight import programs
from flora_jax.preflight.topology import GIB, devices_of, use_compiler_only
from flora_jax.runs.settings import Settings

DINOV2 = {"image_size": 518, "patch_size": 14, "num_classes": 0, "layer_scale": True}
GIANT = {"embed_dim": 1536, "depth": 40, "num_heads": 24, "gated_mlp": True, "mlp_ratio": 8 / 3}
TINY = {"image_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 2}  # to try the program
VITS = {
    "vit_l": flora.ViTSpec(**DINOV2, embed_dim=1024, depth=24, num_heads=16),
    "vit_g": flora.ViTSpec(**DINOV2 | GIANT),
    "two_blocks": flora.ViTSpec(**DINOV2 | TINY),
}
UTILIZATION = 0.4  # of the peak; assumed
HIGHEST = 6  # passes of the matrix unit for a float32 product as precise as moments need
CHIPS_A_HOST, CORES_A_HOST = 4, 112  # ct5lp-hightpu-4t: docs.cloud.google.com/tpu/docs/v5e
HOST_LINK = 16e9  # bytes a second between a host and all its chips; assumed
PASSES = refit._PASSES | {"leave": (refit._leave, "mlp")}
UP, DOWN = 10, 4  # hidden states of all images that these passes read and change


def main() -> None:
    parser = parser_of(__doc__, "vit_l", models=tuple(VITS))
    parser.add_argument("--chips", nargs="+", default=["v5e:2x2", "v5e:4x4"], metavar="v5e:AxB")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--skip_compiling", action="store_true")
    arguments = parser.parse_args()
    use_compiler_only()
    dense, images = VITS[arguments.model], arguments.images
    half = reduce.Shape(dense.blocks[0].head_dim // 2, dense.blocks[0].mlp_dim // 2)
    small = reduce.reduced_spec(dense, [half] * dense.depth)
    machine, macs = describe_machine(f"{arguments.model}, {images} images"), macs_of(dense, small)
    print(f"{machine}: {small.macs() / 1e9:,.0f} of {dense.macs() / 1e9:,.0f} G multiply-adds")
    tables = {}
    if not arguments.skip_compiling:
        print("\nBy the compiler: GiB of a device, MB that are all-reduced\n")
        cells = (program_cells(dense, small, chips) for chips in arguments.chips)
        tables["programs"] = print_table(("chips", "images a chip", *macs), cells)
    print("\nG multiply-adds of the chips, for an image and a block\n")
    tables["macs"] = print_table([*macs], [[f"{each / 1e9:.1f}" for each in macs.values()]])
    print("\nms of the host, here\n")
    host = host_seconds(dense, small)
    tables["host"] = print_table([*host], [[f"{1e3 * each:.0f}" for each in host.values()]])
    print(f"\nSeconds, at {100 * UTILIZATION:.0f} % of the peak\n")
    rows = {chips: row_of(dense, small, images, chips, host) for chips in arguments.chips}
    cells = ([chips, *(f"{value:.1f}" for value in row.values())] for chips, row in rows.items())
    tables["seconds"] = print_table(("chips", *next(iter(rows.values()))), cells)
    write_json(arguments.json, machine, tables)


def inputs_of(spec: flora.ViTSpec) -> dict[str, int]:
    """The width of what enters each layer of a block."""
    width, block = spec.embed_dim, spec.blocks[0]
    return dict(zip(refit._PASSES, (width, block.attention_dim, width, block.mlp_dim), strict=True))


def tries_of(spec: flora.ViTSpec) -> int:
    return len(compress.head_dims(spec, spec.blocks[0])) - 1


def macs_of(dense: flora.ViTSpec, small: flora.ViTSpec) -> dict[str, float]:
    """Multiply-adds of each program for one image and block; those of moments count HIGHEST."""
    tokens, width, parts = dense.num_tokens, dense.embed_dim, []
    for spec in (dense, small):
        qkv, fc1, fc2 = (layer.macs(None) for layer in spec.layers[:3])
        context = qkv + 2 * tokens**2 * spec.blocks[0].attention_dim
        parts += [context, context + spec.projections[0].macs(None), fc1, fc1 + fc2]
    _, attention, _, mlp, small_context, small_attention, small_fc1, small_mlp = parts
    # Each group of layers takes a pass through the blocks up to its last.
    last = [int(group[-1].name.split(".")[1]) + 1 for group in calibrate.layer_groups(dense)]
    products = {
        "calibrate": (attention + mlp) * sum(last) / dense.depth,
        "losses": (1 + tries_of(dense)) * attention + mlp,
    }
    own = (0, attention + small_context, small_attention, mlp + small_fc1, small_mlp)
    products |= dict(zip(PASSES, own, strict=True))
    moments = {leaf: n * (n + width) for leaf, n in inputs_of(small).items()}
    moments["calibrate"] = sum(n**2 for n in inputs_of(dense).values())
    return {n: each + HIGHEST * tokens * moments.get(n, 0) for n, each in products.items()}


def row_of(dense, small, images: int, chips: str, host: dict) -> dict:
    """What a compression moves, and seconds of its parts, none at the same time as another."""
    devices, depth, width = num_chips(chips), dense.depth, dense.embed_dim
    size, hosts = calibrate.batch_size(dense, devices), math.ceil(devices / CHIPS_A_HOST)
    used = {"calibrate": compress.MOMENT_IMAGES, "losses": compress.LOSS_IMAGES}
    costs = macs_of(dense, small).items()
    macs = depth * sum(math.ceil(used.get(name, images) / devices) * each for name, each in costs)
    batches, moment_batches = (math.ceil(n / size) for n in (images, used["calibrate"]))
    calibrated = 4 * sum(n**2 for n in inputs_of(dense).values())
    refitted = 4 * sum(n * (n + width) for n in inputs_of(small).values())
    summed = depth * moment_batches * calibrated
    stream = 4 * width * dense.num_tokens * math.ceil(images / hosts)
    # Parameters go to each chip anew for each pass.
    groups, networks = len(calibrate.layer_groups(dense)), [s.num_params() for s in (dense, small)]
    sent = 4 * (3 * sum(networks) + (groups + 2) * networks[0])
    in_file = (DOWN * host["write a GiB"] + UP * host["read a GiB"]) * stream / GIB
    orders = math.ceil(depth / CORES_A_HOST) * (host["heads"] + host["units"])
    same = {
        "sums": summed / GIB * host["add a GiB"],
        "layers": depth * sum(host[f"fit {leaf}"] for leaf in refit._PASSES),
        "orders": orders + depth * host["tries"],
        "parameters": (min(devices, CHIPS_A_HOST) * sent + summed + depth * refitted) / HOST_LINK,
    }
    reduced = summed + batches * depth * refitted
    seconds = {
        "arithmetic": macs / PEAK / UTILIZATION,
        "all-reduce": all_reduce_seconds(chips, reduced),
    }
    are_in_files = 2 * stream * hosts > refit.STATES_BYTES * devices
    seconds["states' links"] = are_in_files * depth * (UP + DOWN) * stream / HOST_LINK
    seconds["states' files"] = are_in_files * depth * in_file
    every = sum((seconds | same).values())
    amounts = {"GB all-reduced": reduced / 1e9, "GiB of states a host": 2 * stream / GIB}
    parts = {"% arithmetic": seconds["arithmetic"], "% every process": sum(same.values())}
    shares = {name: 100 * part / every for name, part in parts.items()}
    return amounts | seconds | same | {"all": every} | shares


def program_cells(dense: flora.ViTSpec, small: flora.ViTSpec, chips: str) -> list[str]:
    """Memory and all-reduced bytes of each program, with batches as large as they are there."""
    mesh, like, real = make_mesh(1, devices_of(chips)[1]), jax.ShapeDtypeStruct, jnp.float32
    size = calibrate.batch_size(dense, mesh.size)
    states = like((size * dense.num_tokens, dense.embed_dim), real)
    x, mask = programs._split((states, like((size,), real)), mesh)
    blocks = [create_abstract(spec).blocks[0] for spec in (dense, small)]
    structure, own = functional.split(blocks[0])
    block = dense.blocks[0]
    turns = (tries_of(dense), 3, block.num_heads, block.head_dim, block.head_dim)
    whole = programs._whole((own, {"turns": like(turns, real)}), mesh)
    lowered = [compress._try.lower(structure, mesh, dense.num_read_tokens, *whole, x, mask)]
    tokens = refit._Tokens.of(dense, small, 0)
    for one_pass, part in PASSES.values():
        halves = [functional.split(refit._part(block, part)) for block in blocks]
        static = (one_pass, *(structure for structure, _ in halves), mesh, tokens)
        whole = [programs._whole(parameters, mesh) for _, parameters in halves]
        lowered.append(refit._advance.lower(*static, *whole, refit.Streams(x, x), mask))
    # Calibration of as many blocks as one group has; the others' parameters are there as well.
    depth = min(dense.depth, len(calibrate.layer_groups(dense)[0]) // 4 + 1)
    some = dataclasses.replace(dense, depth=depth, blocks=dense.blocks[:depth])
    found = [programs.compile_calibration(Settings(), some, mesh)]
    found += [programs._compile(each, size // mesh.size) for each in lowered]
    memory = [program.total / GIB for program in found]
    memory[0] += 4 * (dense.num_params() - some.num_params()) / GIB
    memory[1] += 4 * dense.num_params() / GIB  # which all devices have beside it
    reduced = (sum(c.num_bytes for c in program.collectives) / 1e6 for program in found)
    cells = (f"{gib:.2f}, {mb:.0f}" for gib, mb in zip(memory, reduced, strict=True))
    return [chips, str(size // mesh.size), *cells]


def host_seconds(dense: flora.ViTSpec, small: flora.ViTSpec) -> dict[str, float]:
    """Seconds of each work for a block, or for a GiB; the least of three."""
    found, block, random = {}, dense.blocks[0], np.random.default_rng(0).standard_normal

    def timed(name: str, function, *arguments, size: float = 1) -> None:
        times = timeit.repeat(lambda: function(*arguments), number=1, repeat=3)
        found[name] = min(times) / size

    def moment(width: int) -> np.ndarray:
        x = random((width, width), np.float32)
        return x.T @ x / width + np.eye(width, dtype=np.float32)

    own, starts = (
        {name: random(p.shape, np.float32) for name, p in functional.split(each)[1].items()}
        for each in (create_abstract(spec).blocks[0] for spec in (dense, small))
    )
    moments = {f"b.{leaf}": moment(width) for leaf, width in inputs_of(dense).items()}
    moments |= {f"{name}.mean": np.zeros(len(m), np.float32) for name, m in moments.items()}
    known, step = calibrate.Calibration(dense, "", 1, moments), reduce.unit_step(block.mlp_dim)
    covariance = known.covariance_of("b.mlp.fc2")
    with threadpool_limits(1):  # as in `reduce.importance`, a thread a block
        heads = reduce.order_heads(own, dense, block, known, "b")
        timed("heads", reduce.order_heads, own, dense, block, known, "b")
        timed("units", reduce.order_units, covariance, own["mlp.fc2.kernel"], step)
    tries = compress.head_dims(dense, block)[:-1]
    timed("tries", lambda: [compress._with_head_dim(own, block, heads, dim) for dim in tries])
    for leaf, width in inputs_of(small).items():
        x, t = np.zeros(width), np.zeros(dense.embed_dim)
        sums = {"count": 1, "x": x, "t": t, "xx": moment(width), "xt": np.outer(x, t)}
        start = {name: starts[f"{leaf}.{name}"] for name in ("kernel", "bias")}
        is_target, fit = leaf in refit._NORMS, regression.fit_layer
        timed(f"fit {leaf}", fit, sums, start, is_target, regression.RIDGE)
    array = np.ones(2**26, np.float32)  # a quarter of a GiB
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        timed("write a GiB", np.save, file.name, array, size=0.25)
        timed("read a GiB", np.load, file.name, size=0.25)
    total = np.ones(array.shape)
    timed("add a GiB", np.add, total, array, total, size=0.25)
    return found


if __name__ == "__main__":
    main()
