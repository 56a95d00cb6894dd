"""A finished model from a folder, whoever wrote it, ready for pictures of any size."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from PIL import Image

from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.data.normalize import Normalization
from flora_jax.data.preprocessing import Crop, Preprocessing
from flora_jax.errors import InputError, MissingFileError, did_you_mean, few
from flora_jax.io.files import matching
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.training.probe import has_no_classifier
from flora_jax.weights.folder import SPEC_FILE, inside
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata.class_names import CLASSES_FILE, read_class_names
from flora_jax.weights.metadata.preprocessing import PREPROCESSING_FILE, read_preprocessing
from flora_jax.weights.metadata.spec import read_spec
from flora_jax.weights.pretrained import HUGGING_FACE_FILES, from_pretrained

_MOST_IMAGES = 64  # of a batch
_MODEL_FILES = (SPEC_FILE, *HUGGING_FACE_FILES)
_HOW_TO_CLASSIFY = (
    "A run on labelled pictures puts one on it: --config.pretrained=FOLDER "
    "--config.data.name=folder:PATH, of a compressed model with --config=transfer"
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A model with what it wants of pictures.

    Attributes:
      class_names: of its logits; empty where nobody has named them.
    """

    network: Network
    preprocessing: Preprocessing
    class_names: tuple[str, ...]

    @classmethod
    def open(cls, path: epath.PathLike) -> "Classifier":
        """Reads a folder of our own, of Hugging Face or of timm, or `hf:owner/name` of the hub.

        Where nothing says what is done to pictures, the log says what is assumed. A network whose
        pictures are prepared at another size than its own is interpolated to that.

        Raises:
          MissingFileError: there is no model in the folder.
          InputError: it is no classifier, or as `read_preprocessing`, `read_class_names` and
            `from_pretrained`.
        """
        folder = local_folder(path)
        check_is_model(folder)
        preprocessing = read_preprocessing(folder)
        spec = spec_as_used(folder, preprocessing)
        if not spec.num_classes:
            raise InputError(f"{folder} has no classifier: it gives features. {_HOW_TO_CLASSIFY}")
        names = read_class_names(folder)
        if names and len(names) != spec.num_classes:
            raise InputError(
                f"{folder} has {len(names)} names of classes for {spec.num_classes} classes; "
                f"{folder / CLASSES_FILE} can list others"
            )
        if preprocessing is None:
            preprocessing = Preprocessing(spec.image_size)
            if spec.in_channels != 3:
                preprocessing = Preprocessing(spec.image_size, mean=(0.5,), std=(0.5,))
            log.warning(
                "%s does not say what it wants of pictures; assumed, and to be changed in %s: %s",
                *(folder, PREPROCESSING_FILE, json.dumps(dataclasses.asdict(preprocessing))),
            )
        network = from_pretrained(folder, spec)
        if has_no_classifier(network):
            raise InputError(f"the weights in {folder} have no classifier. {_HOW_TO_CLASSIFY}")
        return cls(network, preprocessing, names)

    @property
    def num_classes(self) -> int:
        return self.network.spec.num_classes

    def name(self, label: int) -> str:
        """Of a class; its number where it has no name."""
        return self.class_names[label] if self.class_names else str(label)

    @property
    def transform(self) -> Crop:
        """Image uint8 [H, W, C] -> uint8 [size, size, channels of the network]."""
        crop = self.preprocessing.crop(self.network.spec.in_channels)
        return CropOfColours(**dataclasses.asdict(crop))

    def log_probabilities(self) -> Callable[[np.ndarray], np.ndarray]:
        """Makes a function: images uint8 [B, H, W, C] -> float32 [B, num_classes].

        It is compiled for each B, a multiple of the number of devices.
        """
        structure, parameters = functional.split(self.network)
        mesh = make_mesh()
        parameters, normalization = replicate(parameters, mesh), self.preprocessing.normalization
        run = functools.partial(_run, structure, normalization, mesh, parameters)
        return lambda images: jax.device_get(run(spread(images, mesh)))


class CropOfColours(Crop):
    """A crop that takes colours, too, where the network takes grey ones."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.image_shape[2] == 1 and image.shape[2] == 3:
            image = np.array(Image.fromarray(image).convert("L"))[..., None]
        return super().__call__(image)


def batch_size(num_images: int) -> int:
    """Of so many images, as few as make one batch, and a multiple of the number of devices."""
    size = min(_MOST_IMAGES, num_images)
    return -(-size // jax.device_count()) * jax.device_count()


@jax.jit(static_argnums=(0, 1, 2))
def _run(structure, normalization: Normalization, mesh, parameters, images):
    """Logarithms of the probabilities [B, classes] of images uint8, whole on every device."""

    def on_one_device(parameters, images):
        logits = functional.merge(structure, parameters)(normalization(images))
        return jax.lax.all_gather(jax.nn.log_softmax(logits), AXES, tiled=True)

    return on_each_device(on_one_device, mesh, (WHOLE, SPLIT), WHOLE)(parameters, images)


def holds_model(folder: epath.Path) -> bool:
    """True where the folder has a file of a model, whoever wrote it."""
    return any((folder / file).exists() for file in _MODEL_FILES)


def check_is_model(folder: epath.Path) -> None:
    """Raises MissingFileError unless the folder holds a model; says what lies there instead."""
    if holds_model(folder):
        return
    place = folder if folder.exists() else folder.parent
    folders = [path.name for path in matching(place, "*") if path.is_dir()]
    if not folder.exists():
        raise MissingFileError(f"{folder} is not there{did_you_mean(folder.name, folders)}")
    raise MissingFileError(
        f"{folder} is no folder of a model, with one of {', '.join(_MODEL_FILES)}"
        f"{inside(folder, *_MODEL_FILES) or f'; folders inside it are {few(folders)}'}"
    )


def spec_as_used(folder: epath.Path, preprocessing: Preprocessing | None) -> Spec:
    """The spec of the network in a folder, at the size that its pictures are prepared at."""
    spec = read_spec(folder)
    if preprocessing is None or preprocessing.image_size == spec.image_size:
        return spec
    log.info(
        "%s: the network of %d pixels is interpolated to the %d of its preprocessing",
        *(folder, spec.image_size, preprocessing.image_size),
    )
    return dataclasses.replace(spec, image_size=preprocessing.image_size)
