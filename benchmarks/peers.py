"""Other one-shot compressors beside ours: the same network, pictures and shares of MACs.

    python benchmarks/dinov2.py --out runs/material/dinov2_vits14
    python benchmarks/clip_art.py --out runs/material/clip_art
    python benchmarks/peers.py --model runs/material/dinov2_vits14 \
        --pictures runs/material/clip_art --aa_svd DIR --balf DIR --corp DIR --torch_pruning DIR

The network is DINOv2 ViT-S/14. Every method sees the same pictures of train/ without labels, and
has to fit the same shares of the dense MACs, as flora_jax counts them. The tokens of pictures of
val/ are compared with the dense network's: mean cosines of class tokens and of all tokens; error,
the sum of |f - f_dense|^2 over class tokens as a share of that of |f_dense|^2; centred, the same of
all tokens, as a share of their variance. Seconds are all that a method takes to compress, also to
search for its knob. Milliseconds are medians in PyTorch at batch 1 and 8, beside their share of the
dense network's, timed in turn; networks of ours are timed in ONNX Runtime, too.

--photographs takes random crops of photographs in place of the clip art, a third of the photographs
to test: coarse, for they are sixteen.

The peers are local clones, whose functions are called; what is not given is left out. All may
change the four linear layers of every block, and keep their own defaults but for the budget:

    AA-SVD          low rank, anchored, uniform (arXiv 2604.02119), also with its refinement of each
                    block; SVD-LLM's whitening is from the same code
    BALF            low rank, whitened, ranks allocated by it (arXiv 2509.25136)
    CORP            MLP width, alone or with the same share of query and key dimensions, then also
                    at the dense "scale", an option of theirs (arXiv 2602.05243); in one pass, or
                    "anew": statistics after each layer, its default, which fails for both
    Torch-Pruning   MLP width and head dimensions (arXiv 2301.12900); for Taylor the loss is the
                    mean square of the class token

--slow adds "refined" and "anew", which take a quarter of an hour each.
"""

import bisect
import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import json
import logging
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import dinov2
import numpy as np
import torch
from common import describe_machine, parser_of
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flora_jax as flora
from flora_jax.flora.supernet import extract_ranks
from flora_jax.models.network import Network
from flora_jax.timing import median_ratio, time_in_turn
from flora_jax.weights.export.engines import installed_engines
from flora_jax.weights.export.pytorch import load_export

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
BATCHES, BATCH_SIZE, PAUSE = (1, 8), 32, 0.1
STEPS = 400  # of a knob between 0 and 1
# What AA-SVD imports for language models and for its logs.
NOT_NEEDED = (
    *("wandb", "bitsandbytes", "omegaconf", "transformers", "transformers.modeling_outputs"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2")),
)


class Mlp(nn.Module):
    """The MLP with its activation as a module: CORP looks at what leaves `act`."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, nn.GELU(), mlp.fc2

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """The dense network, ours and in PyTorch, and normalised pictures [n, H, W, C] to calibrate."""

    model: Network
    network: nn.Module
    pictures: np.ndarray

    @property
    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(to_torch(self.pictures)), BATCH_SIZE)

    def macs(self, network: nn.Module) -> int:
        """As `flora_jax.macs` counts: what is outside of the blocks' products stays as it is."""
        return self.model.spec.macs() - sum(products(self.network)) + sum(products(network))

    def share_of_weights(self, budget: int) -> float:
        """The share of the MACs of the blocks' weights that may stay."""
        return 1 - (self.model.spec.macs() - budget) / products(self.network)[0]


def main() -> None:
    parser = parser_of(__doc__, rounds=11)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of dinov2.py")
    pictures = parser.add_mutually_exclusive_group(required=True)
    pictures.add_argument("--pictures", type=pathlib.Path, help="folder of clip_art.py")
    pictures.add_argument("--photographs", action="store_true", help="crops of photographs")
    parser.add_argument("--image_size", type=int, default=98)
    parser.add_argument("--num_calibration", type=int, default=512)
    parser.add_argument("--num_test", type=int, default=300)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--figure", type=pathlib.Path, help="draw the table to this .png")
    parser.add_argument("--only", nargs="+", default=[""], help="methods whose names begin so")
    parser.add_argument("--slow", action="store_true", help="also what takes long")
    for peer in (peers := sorted({peer for peer, *_ in METHODS.values() if peer})):
        parser.add_argument(f"--{peer}", type=pathlib.Path, metavar="DIR", help="its clone")
    arguments = parser.parse_args()

    machine = describe_machine(f"torch {torch.__version__}", f"{torch.get_num_threads()} threads")
    clones = {peer: clone for peer in peers if (clone := getattr(arguments, peer))}
    commits = {
        peer: subprocess.check_output(("git", "-C", clone, "rev-parse", "HEAD"), text=True).strip()
        for peer, clone in clones.items()
    }
    print(machine)
    print(*(f"{peer}: {commits.get(peer, 'not given, left out')}" for peer in peers), sep="\n")
    model, size = dinov2.load(arguments.model, arguments.image_size), arguments.image_size
    numbers = arguments.num_calibration, arguments.num_test
    if arguments.photographs:
        pictures, unseen = (
            crops_of(size, number, is_seen)
            for number, is_seen in zip(numbers, (True, False), strict=True)
        )
    else:
        pictures, unseen = (
            dinov2.drawings(arguments.pictures / split, number, size)
            for number, split in zip(numbers, ("train", "val"), strict=True)
        )
    images = to_torch(unseen)
    print(f"{len(pictures)} pictures to calibrate, {len(images)} to test")

    task = Task(model, in_torch(model), pictures)
    networks, rows = {("dense", 1.0): task.network}, [{"method": "dense", "at": 1.0, "s": 0.0}]
    ours = {("dense", 1.0): model}
    for at in arguments.budgets:
        for name, (peer, method, *how) in METHODS.items():
            is_left_out = (peer and peer not in clones) or (how[1:] and not arguments.slow)
            if is_left_out or not name.startswith(tuple(arguments.only)):
                continue
            run = functools.partial(method, clones.get(peer), *how[:1])
            try:
                small, seconds = compress(task, run, round(at * model.spec.macs()))
            except Exception as error:  # what the others took minutes for is not lost
                print(f"{name} at {at:g} failed: {type(error).__name__}: {error}")
                continue
            print(f"{name} at {at:g}: {seconds:.0f} s", flush=True)
            rows.append({"method": name, "at": at, "s": seconds})
            networks[name, at] = in_torch(small) if isinstance(small, Network) else small
            if isinstance(small, Network):
                ours[name, at] = small
    dense = tokens_of(task.network, images)
    for row, network in zip(rows, networks.values(), strict=True):
        row |= compare(tokens_of(network, images), dense)
        row["MACs"] = task.macs(network) / model.spec.macs()
    (runtime,) = (engine for engine in installed_engines()[0] if engine.name == "ONNX Runtime")
    in_runtime = {key: runtime.open(network) for key, network in ours.items()}
    for batch in BATCHES:
        with torch.inference_mode():
            work = {key: functools.partial(net, images[:batch]) for key, net in networks.items()}
            add_times(rows, time_in_turn(work, arguments.rounds, PAUSE), f"{batch}")
        work = {key: prepare(batch) for key, prepare in in_runtime.items()}
        add_times(rows, time_in_turn(work, arguments.rounds, PAUSE), f"ORT {batch}")
    print(f"\n{'':25}" + "".join(f"{fact:>9}" for fact in list(rows[0])[1:]))
    for name, *values in map(dict.values, rows):
        print(f"{name:25}" + "".join(f"{value:>9.3f}" for value in values))
    if arguments.figure:
        draw(rows, arguments.figure)
    if arguments.json:
        found = {"machine": machine, "commits": commits, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def add_times(rows: list[dict], times: dict[tuple[str, float], np.ndarray], of: str) -> None:
    dense = times["dense", 1.0]
    for row in rows:
        own = times.get((row["method"], row["at"]))
        row[f"ms {of}"] = np.nan if own is None else float(np.median(own))
        row[f"share {of}"] = np.nan if own is None else median_ratio(own, dense)


def draw(rows: list[dict], path: pathlib.Path) -> None:
    """Cosines of class tokens against MACs and milliseconds, a line a method."""
    figure = Figure((11, 4.6), dpi=140, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    milliseconds = "share of the milliseconds, PyTorch, batch 8"
    costs = {"MACs": "share of the multiply-adds", "share 8": milliseconds}
    colours = dict(zip(METHODS, colormaps["tab20"].colors, strict=False))
    for panel, (cost, title) in zip(panels, costs.items(), strict=True):
        for name in dict.fromkeys(row["method"] for row in rows[1:]):
            own = sorted((row[cost], row["class"]) for row in rows if row["method"] == name)
            look = {"color": colours[name]}
            if name == "flora.compress":
                look = {"linewidth": 3, "color": "black"}
            panel.plot(*zip(*own, strict=True), marker="o", label=name, **look)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("cosine to the dense class token")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path)


def crops_of(size: int, number: int, is_seen: bool) -> np.ndarray:
    """Crops of two thirds of the photographs, or of the others: [n, size, size, 3]."""
    photos = [
        photo
        for i, (_, photo) in enumerate(sorted(dinov2.photographs().items()))
        if (i % 3 != 0) == is_seen
    ]
    each, rng = -(-number // len(photos)), np.random.default_rng(is_seen)
    made = np.concatenate([dinov2.crops(photo, size, each, rng) for photo in photos])
    return dinov2.normalise(made[:number])


def to_torch(pictures: np.ndarray) -> torch.Tensor:
    return torch.tensor(pictures.transpose(0, 3, 1, 2))


def in_torch(model: Network) -> nn.Module:
    """The network as `export_torch` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        flora.export_torch(model, folder)
        network = load_export(folder)
    for block in network.blocks:
        block.mlp = Mlp(block.mlp)
    return network


def compress(task: Task, method: Callable, budget: int) -> tuple[Network | nn.Module, float]:
    """The compressed network, and the seconds that it took; what is printed is lost."""
    started, lost = time.perf_counter(), io.StringIO()
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(lost), contextlib.redirect_stderr(lost):
        small = method(task, budget)
    seconds = time.perf_counter() - started
    macs = task.macs(in_torch(small) if isinstance(small, Network) else small.eval())
    counted = small.spec.macs() if isinstance(small, Network) else macs
    if macs > budget or macs != counted:
        raise AssertionError(f"{macs} MACs, {counted} as counted in JAX; the budget is {budget}")
    return small, seconds


@torch.inference_mode()
def products(network: nn.Module) -> tuple[int, int]:
    """Multiply-adds of one image in the blocks: of weights, and of tokens with tokens."""
    num_tokens, weights, widths = len(network.pos_embed), 0, []
    for block in network.blocks:  # qkv gives twice the width of queries and that of values
        qkv, proj = block.attn.qkv, block.attn.proj
        of_qkv = qkv.register_forward_hook(lambda _, x, y: widths.append(y.shape[-1]))
        of_proj = proj.register_forward_hook(lambda _, x, y: widths.append(x[0].shape[-1]))
        block.attn(torch.zeros(1, *network.pos_embed.shape))
        of_qkv.remove(), of_proj.remove()
        weights += sum(p.numel() for p in block.parameters() if p.ndim == 2)
    return num_tokens * weights, num_tokens**2 * sum(widths) // 2


@torch.inference_mode()
def tokens_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """[n, N, D]"""
    return torch.cat([network.features(batch) for batch in images.split(BATCH_SIZE)])


def compare(tokens: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    cosines = nn.functional.cosine_similarity(tokens, dense, dim=-1)
    error, spread = (tokens - dense).square(), (dense - dense.mean((0, 1))).square()
    found = {
        "class": cosines[:, 0].mean(),
        "tokens": cosines.mean(),
        "error": error[:, 0].sum() / dense[:, 0].square().sum(),
        "centred": error.sum() / spread.sum(),
    }
    return {name: float(value) for name, value in found.items()}


# --- the methods: what they take first is the clone -----------------------------------------------


def uniform(_, how: str, task: Task, budget: int) -> Network:
    space = flora.RankSpace.regular(task.model.spec, ratios=(1,))
    calibration = flora.calibrate(task.model, task.pictures) if how == "aware" else None
    supernet = flora.factorize(task.model, space, calibration=calibration)
    small = extract_ranks(supernet, space.uniform_ranks_within(budget))
    return flora.refit(small, task.model, task.pictures) if how == "refitted" else small


@torch.no_grad()
def aa_svd(clone: pathlib.Path, how: str, task: Task, budget: int) -> nn.Module:
    """Layer after layer, with the statistics of what enters it in both networks."""
    names = ("compress", "decompose", "adapters.llama_adapter")
    collect, decompose, adapters = load(clone, *(f"aa_svd.compression.{name}" for name in names))
    small, ratio = copy.deepcopy(task.network), task.share_of_weights(budget)
    dense_x: list[tuple[torch.Tensor]] = []
    hook = small.blocks[0].register_forward_pre_hook(lambda _, x: dense_x.append(x))
    for (batch,) in task.loader:
        small(batch)
    hook.remove()
    small_x, options = dense_x, [{}] * len(dense_x)
    factorize = getattr(decompose, f"compress_module_obj{2 if how == 'whitened' else 4}")
    refine = functools.partial(adapters.LlamaModelAdapter.finetune_layer, None)
    for i, (dense, block) in enumerate(zip(task.network.blocks, small.blocks, strict=True)):
        own, whole = SimpleNamespace(layer=block), SimpleNamespace(layer=dense)
        for name in LAYERS:
            layer, of = block.get_submodule(name), dense.get_submodule(name)
            of_small, crossed, of_dense = collect.collect_gram_matrix_parallel(
                own, layer, small_x, options, whole, of, dense_x, "cpu", name
            )
            moments = (of_dense,) if how == "whitened" else (of_dense, crossed, of_small)
            block.set_submodule(name, factorize(layer, *moments, ratio, "cpu"))
        dense_x = [(dense(x),) for (x,) in dense_x]
        if how == "refined":  # as its `apply_compression_parallel` calls it
            wanted, settings = [x for (x,) in dense_x], {"num_steps": 25, "lr": 1e-4}
            with torch.enable_grad():
                refine(own, small_x, options, wanted, "cpu", i, loss_type="mse", **settings)
        small_x = [(block(x),) for (x,) in small_x]
    return small


@torch.no_grad()
def balf(clone: pathlib.Path, task: Task, budget: int) -> nn.Module:
    """The steps of its `to_low_rank_activation_aware_auto`, which needs CUDA."""
    theirs, utils = load(clone, "lib.factorization.factorize", "lib.utils")
    small = copy.deepcopy(task.network)
    names = [f"blocks.{i}.{name}" for i in range(len(small.blocks)) for name in LAYERS]
    layers = {name: small.get_submodule(name) for name in names}
    cache = theirs.collect_activation_cache(small, task.loader, names)
    made, energies, costs = {}, [], []
    stays = mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor)
    with stays, mock.patch("torch.backends.cuda.preferred_linalg_library"):
        for name, layer in layers.items():
            out, inverse = theirs.obtain_whitening_matrix(cache["acts"][name], layer)
            factors = torch.linalg.svd(inverse @ theirs.get_reshape(layer)(layer.weight), False)
            made[name] = out, inverse, factors
            energy = factors[1].square().sum(0).cumsum(0)
            energies.append(energy / energy[-1])
            shapes = layer.weight.shape, cache["outs"][name]
            costs.append(theirs.generate_cost_flops_linear(*shapes, layer))
    most = task.share_of_weights(budget) * sum(int(cost[-1]) for cost in costs)
    ranks = dict(zip(names, theirs.maximize_energy(energies, costs, most), strict=True))

    def factorize(name: str, layer: nn.Module) -> nn.Module:
        return theirs.factorize_linear_whitened(layer, lambda *_: ranks[name], *made[name])

    return utils.replace_with_factory(small, layers, factorize)


def corp(clone: pathlib.Path, how: str, task: Task, budget: int) -> nn.Module:
    schemas, runner = load(clone, "config.schemas", "pruning.runner")
    spec, block, pruning = task.model.spec, task.model.spec.blocks[0], schemas.PruningConfig()

    def macs_at(cut: float) -> int:
        units = min(int(block.mlp_dim * cut), block.mlp_dim - pruning.min_channels)
        dims = min(int(block.head_dim * cut), block.head_dim - pruning.min_qk_dim)
        dims *= block.num_heads * ("QK" in how)
        of_a_token = 2 * spec.embed_dim * (units + dims) + spec.num_tokens * dims
        return spec.macs() - spec.depth * spec.num_tokens * of_a_token

    pruning.sparsity = pruning.qk_sparsity = least_cut(macs_at, budget)
    pruning.qk_keep_original_scale = "scale" in how
    pruning.target = schemas.PruneTarget.BOTH if "QK" in how else schemas.PruneTarget.MLP
    if "anew" not in how:
        pruning.schedule = schemas.ScheduleType.GLOBAL
    run = schemas.RunnerConfig(device="cpu", calib_samples=len(task.pictures))
    config = schemas.FullConfig(pruning=pruning, runner=run)
    result = runner.PruneRunner(config).run(copy.deepcopy(task.network), task.loader)
    if not result.success:
        raise RuntimeError(result.error_message)
    return result.pruned_model


def torch_pruning(clone: pathlib.Path, how: str, task: Task, budget: int) -> nn.Module:
    (theirs,) = load(clone, "torch_pruning")
    scores = theirs.importance.GroupMagnitudeImportance, theirs.importance.GroupTaylorImportance

    def prune(cut: float, is_taylor: bool) -> nn.Module:
        small = copy.deepcopy(task.network)
        settings = {
            "pruning_ratio": cut,
            "ignored_layers": [block.mlp.fc2 for block in small.blocks],  # the width stays
            "num_heads": {block.attn.qkv: block.attn.num_heads for block in small.blocks},
            "out_channel_groups": {},  # its default is one dict for all pruners
        }
        images = next(iter(task.loader))[0][:1]
        pruner = theirs.pruner.BasePruner(small, images, scores[is_taylor](), **settings)
        for (batch,) in task.loader if is_taylor else ():
            small(batch).square().mean().backward()
        pruner.step()
        return small

    cut = least_cut(lambda cut: task.macs(prune(cut, False)), budget)  # alike for both
    return prune(cut, how == "Taylor")


def least_cut(macs_at: Callable[[float], int], budget: int) -> float:
    """The least multiple of 1 / STEPS at which the MACs fit the budget."""
    step = bisect.bisect_left(range(STEPS), -budget, key=lambda step: -macs_at(step / STEPS))
    if step == STEPS:
        raise ValueError(f"it cannot go below {macs_at(1 - 1 / STEPS)} MACs")
    return step / STEPS


# Name: the clone it needs, the function, how; a last True: only with --slow.
METHODS: dict[str, tuple] = {
    "Torch-Pruning, l2": ("torch_pruning", torch_pruning, "l2"),
    "Torch-Pruning, Taylor": ("torch_pruning", torch_pruning, "Taylor"),
    "CORP, MLP": ("corp", corp, "MLP"),
    "CORP, MLP and QK": ("corp", corp, "MLP, QK"),
    "CORP, MLP and QK, scale": ("corp", corp, "MLP, QK, scale"),
    "CORP, MLP, anew": ("corp", corp, "MLP, anew", True),
    "SVD-LLM whitening": ("aa_svd", aa_svd, "whitened"),
    "BALF": ("balf", balf),
    "AA-SVD": ("aa_svd", aa_svd, "anchored"),
    "AA-SVD, refined": ("aa_svd", aa_svd, "refined", True),
    "plain SVD": ("", uniform, "plain"),
    "activation-aware, uniform": ("", uniform, "aware"),
    "uniform ranks, refitted": ("", uniform, "refitted"),
    "flora.compress": ("", lambda _, t, macs: flora.compress(t.model, t.pictures, macs=macs)),
}


def load(clone: pathlib.Path, *names: str) -> list:
    """Modules of a clone; what AA-SVD imports without need here is empty meanwhile."""
    empty = {name: mock.MagicMock(run=None) for name in NOT_NEEDED if name not in sys.modules}
    with mock.patch.object(sys, "path", [str(clone), *sys.path]):
        sys.modules.update(empty)
        modules = [importlib.import_module(name) for name in names]
    for name in empty:
        del sys.modules[name]
    return modules


if __name__ == "__main__":
    main()
