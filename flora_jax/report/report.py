"""The report stage: the table of a run, its pictures and its page."""

from etils import epath

from flora_jax.cluster.processes import by_the_first
from flora_jax.io.files import replacing
from flora_jax.report.data import ReportData, Run, read_report_data
from flora_jax.report.figures import panels_of, sheet
from flora_jax.report.formats import png
from flora_jax.report.page import render
from flora_jax.report.slim_figures import slim_panels
from flora_jax.report.table import aligned
from flora_jax.runs.images import Images


def report(run: Run, images: Images | None) -> None:
    """Prints the table, draws the pictures and writes the page, out of what the stages have saved.

    Also of a run that is not finished, of which it says so.

    Args:
      images: of the run; None where they cannot be read.
    """
    data, files = read_report_data(run, images), {}
    if data.slimming:
        title = f"{data.name}: gates and what they leave"
        files["slim.png"] = png(sheet(slim_panels(data.slimming), title))
    if run.settings.cuts_by:
        title = f"{data.name}: {data.savings}" if data.savings else data.name
        files["report.png"] = png(sheet(panels_of(data), title))
    files["report.html"] = render(data).encode(errors="replace")
    _show_once(run.folder, data, files)


@by_the_first
def _show_once(folder: epath.Path, data: ReportData, files: dict[str, bytes]) -> None:
    if data.unfinished:
        print(f"\n{data.unfinished}")
    if data.models:
        about = f"ms: {data.timed_in}\n" if data.timed_in else ""
        print(f"\n{aligned(data.models)}\n{about}")
    if data.skipped_images:
        print(f"{data.skipped_images} test images could not be decoded and count for no model.\n")
    for name, content in files.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(content)
        print(f"{'Page' if name.endswith('.html') else 'Picture'}: {folder / name}")
