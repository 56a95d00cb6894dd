"""Questions put to finished runs, one a subcommand; the answers are in docs/.

    python benchmarks/trials.py search_metric runs/seeds/seed_0 runs/seeds/seed_1
    python benchmarks/trials.py supernets runs/aware runs/plain --subnets 8
    python benchmarks/trials.py fold runs/slim/seed_0 runs/slim/seed_1

search_metric: which held-out measure ranks subnets best? Random subnets of the run's MAC budget,
inherited from its supernet; the held-out images are split in two at random, many times. A measure
on one half is good when it correlates with the accuracy on the other half.

supernets: which training makes the better subnets? For each budget of the first run the same
subnets (the uniform one, random ones) in every run's supernet, on the test images and without
fine-tuning: mean top-1 and log-likelihood, and the difference to the first supernet with a paired
95 % interval. The runs must have the same dense model and test images.

fold: accuracy right after ViT-Slim's cut, with the gates folded into the weights and with hard 0/1
gates; held-out top-1. The runs were made with --config.keep_checkpoints=True.
"""

import argparse
import pathlib
import sys

import jax
import numpy as np
from common import describe_machine, write_json

import flora_jax as flora
from flora_jax.evaluation.comparison import compare
from flora_jax.evaluation.evaluate import evaluate_images
from flora_jax.flora.supernet import extract_ranks
from flora_jax.methods.slim import choose_masks, train_gates
from flora_jax.report.table import difference_text, in_points
from flora_jax.runs.budgets import load_budgets
from flora_jax.runs.images import Images
from flora_jax.runs.workdir import Run, Step
from flora_jax.weights.folder import CHECKPOINTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for trial in (search_metric, supernets, fold):
        command = commands.add_parser(trial.__name__)
        command.set_defaults(trial=trial)
        command.add_argument("runs", nargs="+", type=pathlib.Path, help="folders of finished runs")
        command.add_argument(
            "--json", type=pathlib.Path, help="also write the figures to this file"
        )
        if trial is not fold:
            few = 120 if trial is search_metric else 8
            command.add_argument("--subnets", type=int, default=few, help="random ones a budget")
        if trial is search_metric:
            command.add_argument("--splits", type=int, default=50)
        if trial is supernets:
            command.add_argument("--full_rank", action="store_true", help="the full rank as well")
    arguments = parser.parse_args()
    write_json(arguments.json, describe_machine(), arguments.trial(arguments))


def search_metric(arguments: argparse.Namespace) -> dict[str, dict]:
    ratios = {}
    print("correlation with top1 on the other half of the held-out images")
    print("images      top1  log_likelihood  run")
    for folder in arguments.runs:
        run, supernet = Run.open(folder), flora.load(folder / "supernet")
        rng = np.random.default_rng(0)
        budget = load_budgets(run)[-1].window
        genes = supernet.space.sample_within(rng, arguments.subnets, budget)
        measures = _per_image(Images(run.settings).heldout_set, supernet, genes)
        images, found = measures[0].shape[1], []
        for _ in range(arguments.splits):
            one, other = np.array_split(rng.permutation(images), 2)
            target = measures[0][:, other].mean(axis=1)
            found.append([np.corrcoef(m[:, one].mean(axis=1), target)[0, 1] for m in measures])
        top1, log_likelihood = np.mean(found, axis=0)
        print(f"{images:6d}  {top1:8.2f}  {log_likelihood:14.2f}  {folder}")
        ratios[str(folder)] = {"images": images, "top1": top1, "log_likelihood": log_likelihood}
    return ratios


def _per_image(
    heldout: flora.EvaluationSet, supernet: flora.Supernet, genes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """genes [P, L] -> is the right class first, and its log-probability: both [P, images]."""
    columns = []
    for images, labels, mask in heldout.batches:
        used = np.asarray(mask) > 0
        rows = np.arange(used.sum())
        labels = np.asarray(labels)[used]
        logits = np.stack([np.asarray(supernet(images, one))[used] for one in genes])
        log_probability = np.asarray(jax.nn.log_softmax(logits))
        columns.append((logits.argmax(-1) == labels, log_probability[:, rows, labels]))
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*columns, strict=True))


def supernets(arguments: argparse.Namespace) -> dict[str, dict]:
    ratios: dict[str, dict] = {}
    run, first = Run.open(arguments.runs[0]), str(arguments.runs[0])
    images = Images(run.settings)
    test_set = images.evaluation_set(images.splits.test)
    trained = {str(folder): flora.load(folder / "supernet") for folder in arguments.runs}
    for title, ranks in _subnets_of(run, trained[first].space, arguments).items():
        results = {
            name: _mean_over(supernet, ranks, test_set) for name, supernet in trained.items()
        }
        others = compare(results, [(name, first) for name in results if name != first])
        print(f"{title}: {len(ranks)} subnets")
        for name, found in results.items():
            top1, likelihood = 100 * found["is_correct"].mean(), found["log_likelihood"].mean()
            ratios.setdefault(title, {})[name] = {"top1": top1, "log_likelihood": likelihood}
            line = f"  {top1:6.2f} %  {likelihood:8.4f}  {name}"
            if name in others:
                against = ratios[title][name]["minus the first"] = others[name][first]
                line += (
                    f": {difference_text(in_points(against['top1']))} points, "
                    f"{difference_text(against['log_likelihood'], 4)}"
                )
            print(line, flush=True)
    return ratios


def _subnets_of(
    run: Run, space: flora.RankSpace, arguments: argparse.Namespace
) -> dict[str, list[tuple[int, ...]]]:
    """Ranks [L] of the subnets by a title of their budget."""
    found = {}
    for budget in load_budgets(run):
        title = f"{budget.shares[1]:g} of the multiply-adds"
        found[f"uniform, {title}"] = [space.uniform_ranks_within(budget.window[1])]
        genes = space.sample_within(np.random.default_rng(0), arguments.subnets, budget.window)
        found[f"random, {title}"] = [tuple(ranks) for ranks in space.ranks(genes).tolist()]
    if arguments.full_rank:
        found["full rank"] = [tuple(space.ranks(space.full_rank_genes).tolist())]
    return found


def _mean_over(supernet, ranks: list, test_set: flora.EvaluationSet) -> dict[str, np.ndarray]:
    """Image by image: how often the subnets are right, and their mean log-likelihood."""
    each = [evaluate_images(extract_ranks(supernet, one), test_set) for one in ranks]
    return {
        name: np.mean([found[name] for found in each], axis=0, dtype=np.float64)
        for name in ("is_correct", "log_likelihood")
    }


def fold(arguments: argparse.Namespace) -> dict[str, dict]:
    titles = ("gated, nothing cut", "cut, folded", "cut, 0/1", "retrained")
    print(f"| run | {' | '.join(titles)} |\n|---|---|---|---|---|")
    ratios = {}
    for folder in arguments.runs:
        run = Run.open(folder)
        if not (folder / "slim/gates" / CHECKPOINTS).exists():
            sys.exit(f"{folder} kept no gates: run it with --config.keep_checkpoints=True")
        images = run.images = Images(run.settings)
        dense, settings = flora.load(folder / "dense"), run.settings.slim
        # Done already: read from its last checkpoint.
        gated = train_gates(Step(run, "slim"), dense, settings, run.settings.metric)
        masks = choose_masks(settings, dense.spec, gated)
        models = [
            gated.network,
            flora.slim.extract(gated, masks, fold=True),
            flora.slim.extract(gated, masks, fold=False),
            flora.load(folder / "slim"),
        ]
        shares = [100 * flora.top1(model, images.heldout_set) for model in models]
        print(f"| {folder.name} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
        ratios[str(folder)] = dict(zip(titles, shares, strict=True))
    return ratios


if __name__ == "__main__":
    main()
