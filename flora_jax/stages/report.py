"""What a run has come to, for people: the table, the pictures and the page."""

import logging

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.io.files import read_json, replacing
from flora_jax.io.paths import as_text
from flora_jax.report import plots, slim_plots, table
from flora_jax.report.page import Page, render
from flora_jax.runs.budgets import finished_models
from flora_jax.runs.images import Images
from flora_jax.runs.workdir import Run, done_stages
from flora_jax.slim.threshold import DECISION_FILE, read_decision
from flora_jax.stages.drawing import drawn_of, is_budget_known
from flora_jax.stages.page import page_of
from flora_jax.weights.folder import SPEC_FILE, load_spec

log = logging.getLogger(__name__)


def report(run: Run, images: Images | None) -> None:
    """Prints the table, draws the pictures and writes the page, out of what the stages have saved.

    Also of a run that is not finished, of which it says so.

    Args:
      images: of the run; None where they cannot be read.
    """
    path = run.folder / "result.json"
    result = read_json(path) if path.exists() else {}
    rows = table.comparison_rows(result) if result else _costs(run)
    drawn, slimmed = drawn_of(run, result), _slim_picture(run, images)
    pictures = {"What slimming leaves": slimmed} if slimmed else {}
    page = page_of(run, images, result, rows, drawn, pictures)
    files = {"slim.png": slimmed} if slimmed else {}
    if "extract" in run.settings.stages:
        files["report.png"] = plots.png(plots.report_figure(drawn))
    files["report.html"] = render(page).encode(errors="replace")
    skipped = result.get(table.DATA, {}).get("skipped_test_images", 0)
    _show_once(run.folder, page, skipped, files)


@by_the_first
def _show_once(directory: epath.Path, page: Page, skipped: int, files: dict[str, bytes]) -> None:
    if page.unfinished:
        print(f"\n{page.unfinished}")
    if page.models:
        print(f"\n{table.aligned(page.models)}\n")
    if skipped:
        print(f"{skipped} test images could not be decoded and count for no model.\n")
    for name, content in files.items():
        with replacing(directory / name) as partial:
            partial.write_bytes(content)
        print(f"{'Page' if name.endswith('.html') else 'Picture'}: {directory / name}")


def _costs(run: Run) -> list[list[str]]:
    """What the models cost that are there already, though nothing is evaluated."""
    if "extract" in run.settings.stages and not is_budget_known(run):
        return []
    costs = {}
    for _, name, path, _ in finished_models(run):
        for folder in (run.folder / path, run.folder / "extract" / path):  # before it is trained
            if (folder / SPEC_FILE).exists():
                spec = load_spec(folder)
                costs[name] = {"macs": spec.macs(), "params": spec.num_params()}
    return table.cost_rows(costs) if costs else []


def _slim_picture(run: Run, images: Images | None) -> bytes | None:
    if "slim" not in done_stages(run):
        return None
    if not (run.folder / DECISION_FILE).exists():
        log.warning(
            "no picture of the slimming: %s is missing, because an earlier version of flora_jax "
            "slimmed this model",
            run.folder / DECISION_FILE,
        )
        return None
    gates, masks = read_decision(run.folder / DECISION_FILE)
    some = None if images is None else next(images.unseen(8, "report/image"), None)
    figure = slim_plots.slim_figure(
        gates,
        masks,
        image=None if some is None else some[0],
        num_prefix_tokens=run.spec.num_prefix_tokens,
        title=f"{as_text(run.folder.name)}: gates and what they leave",
    )
    return plots.png(figure)
