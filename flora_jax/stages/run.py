"""A run: its settings, and the folder in which its stages leave what later ones read.

Folder of a run:
  dense/            the uncompressed model
  pretrain/         its training run, unless the weights were given
  slim/             the slimmed model, from which FLORA goes on where the run slims; in it gates/,
                    cut/ and retrain/: training of the gates, the model after the cut, retraining;
                    decision.safetensors: the gates and what they leave
  transfer/         a finished model fine-tuned on this dataset
  calibrate/        what `calibrate` has summed so far, while it goes on
  inherited/        the supernet before training, its factors weighed by the calibration
  filter/block_00/  local supernets with their scores; filter/space.json: the kept triples
  supernet/         the supernet's training run: open it with `flora_jax.load`
  allocate/         genes.json: the ranks of least measured drop for each budget, and the drops
  search/           history.jsonl and best.json; latency.json where that is the budget
  extract/          the subnet, and the baselines at the allocated ranks and at the largest common
                    ratio inside the budget, with the weights that they inherit
  finetune/         their training runs
  subnet/ allocated/ uniform/   the finished models; of several budgets subnet_0.55/ and so on
  export/subnet/    and so on: what is handed out of a model, with its card; written whole
  result.json, test_images.safetensors, report.html, report.png
  config.json, images.json      the settings, and the signature of the images
  classes.json      the names of the classes by label, here and beside each finished model, with
                    preprocessing.json, what it wants of pictures, and evaluation.json, how it did
                    on the test images
"""

import dataclasses

from etils import epath

from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet
from flora_jax.flora.svd import factorize
from flora_jax.io.files import read_json
from flora_jax.io.paths import user_path
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.runs.settings import Settings
from flora_jax.weights import folder
from flora_jax.weights.metadata.spec import describes_itself, read_spec

CONFIG_FILE, IMAGES_FILE, DONE_FILE = "config.json", "images.json", "stages.json"
INHERITED, EXPORT = "inherited", "export"


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a run and the folder it runs in."""

    settings: Settings
    folder: epath.Path

    @classmethod
    def open(cls, folder: epath.PathLike) -> "Run":
        """The run that was made in this folder."""
        folder = user_path(folder)
        return cls(saved_settings(folder), folder)

    @property
    def spec(self) -> Spec:
        return network_spec(self.settings)


def has_run(folder: epath.PathLike | None) -> bool:
    """Whether a run was started in this folder."""
    return folder is not None and (user_path(folder) / CONFIG_FILE).exists()


def done_stages(run: Run) -> dict[str, dict]:
    """The stages that are done, with the seconds that each took."""
    path = run.folder / DONE_FILE
    return read_json(path) if path.exists() else {}


def saved_settings(folder: epath.Path) -> Settings:
    """The settings that the run in this folder was made with."""
    config = read_json(folder / CONFIG_FILE)
    # Versions that did not say so factorised by the plain SVD, and ignored transparency.
    config = {"calibration": {"images": 0}} | config
    config["data"] = {"background": ()} | config.get("data", {})
    return Settings.from_config(config)


def network_spec(settings: Settings) -> Spec:
    """The spec of the dense model; of a transfer that of the weights, with the other classes.

    A file that stands alone does not say its own: it is the config's.
    """
    if "transfer" not in settings.stages or not describes_itself(settings.pretrained):
        return settings.model
    given = read_spec(settings.pretrained)
    return dataclasses.replace(given, num_classes=settings.model.num_classes)


def load_dense(run: Run) -> Network:
    """The uncompressed model, once `pretrain` is done."""
    return folder.load_model(run.folder / "dense")


def load_base(run: Run) -> Network:
    """The model that FLORA compresses: the slimmed one where the run slims."""
    return folder.load_model(_base_folder(run))


def load_regular_space(run: Run) -> RankSpace:
    """Every rank triple of the model that FLORA compresses."""
    return run.settings.space.of(folder.load_spec(_base_folder(run)))


def load_space(run: Run) -> RankSpace:
    """The filtered space where the run filters, otherwise every rank triple."""
    regular = load_regular_space(run)
    if "filter" not in run.settings.stages:
        return regular
    return RankSpace.from_json(regular.spec, read_json(run.folder / "filter/space.json"))


def load_inherited(run: Run) -> Supernet:
    """The supernet of every rank triple with the weights that it inherits, before any training."""
    if "calibrate" in run.settings.stages:
        return folder.load_supernet(run.folder / INHERITED)
    return factorize(load_base(run), load_regular_space(run))


def load_shared(run: Run) -> Supernet:
    """The supernet that subnets are cut out of: the trained one where the run trains one."""
    if "supernet" in run.settings.stages:
        return folder.load_supernet(run.folder / "supernet")
    return load_inherited(run)


def _base_folder(run: Run) -> epath.Path:
    return run.folder / ("slim" if "slim" in run.settings.stages else "dense")
