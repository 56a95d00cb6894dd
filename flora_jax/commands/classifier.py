"""A finished model from a folder, whoever wrote it, ready for pictures of any size."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from flora_jax.cluster.mesh import AXES, SPLIT, WHOLE, make_mesh, on_each_device, replicate, spread
from flora_jax.data.normalize import Normalization
from flora_jax.data.pictures import in_grey
from flora_jax.data.preprocessing import Crop, Preprocessing
from flora_jax.errors import InputError, MissingFileError, did_you_mean, few
from flora_jax.evaluation.outputs import outputs_of, outputs_title, unit_vectors
from flora_jax.io.files import matching
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec, whole_patches
from flora_jax.training.probe import has_no_classifier
from flora_jax.weights.class_embeddings import read_class_embeddings
from flora_jax.weights.folder import SPEC_FILE, inside
from flora_jax.weights.hub import local_folder
from flora_jax.weights.metadata.class_names import CLASSES_FILE, read_class_names
from flora_jax.weights.metadata.preprocessing import PREPROCESSING_FILE, read_preprocessing
from flora_jax.weights.metadata.spec import read_spec
from flora_jax.weights.pretrained import HUGGING_FACE_FILES, from_pretrained

Scores = Callable[[np.ndarray], np.ndarray]
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
      class_names: of its outputs; empty where nobody has named them.
      class_embeddings: float32 [classes, D] of length one in the space that the network embeds
        images in, by which these are classified; None: the network classifies by itself.
    """

    network: Network
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    class_embeddings: np.ndarray | None = None

    @classmethod
    def open(
        cls, path: epath.PathLike, class_embeddings: epath.PathLike | None = None
    ) -> "Classifier":
        """Reads a folder of our own, of Hugging Face or of timm, or `hf:owner/name` of the hub.

        Where nothing says what is done to pictures, the log says what is assumed. A network whose
        pictures are prepared at another size than its own is interpolated to that.

        Args:
          class_embeddings: a file of these, as `read_class_embeddings` reads it.

        Raises:
          MissingFileError: there is no model in the folder.
          InputError: its outputs are nothing to read, and there are no class embeddings; or as
            `read_class_embeddings`, `read_preprocessing`, `read_class_names` and
            `from_pretrained`.
        """
        folder = local_folder(path)
        check_is_model(folder)
        preprocessing = read_preprocessing(folder)
        spec = spec_as_used(folder, preprocessing)
        names, embeddings = read_class_names(folder), None
        if class_embeddings is not None:
            if outputs_of(spec).shown:
                raise InputError(f"{folder} gives {outputs_title(spec)}, and embeds no images")
            width = spec.num_classes or spec.pooled_dim
            names, embeddings = read_class_embeddings(class_embeddings, width)
        elif not spec.num_classes:
            raise InputError(f"{folder} has no classifier: it gives features. {_HOW_TO_CLASSIFY}")
        elif not outputs_of(spec).shown:
            raise InputError(
                f"{folder} gives {outputs_title(spec)}, and no classes: --evaluate with "
                f"--class_embeddings=FILE classifies by those of texts"
            )
        if embeddings is None and names and len(names) != spec.num_classes:
            raise InputError(
                f"{folder} has {len(names)} names of classes for {outputs_title(spec)}; "
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
        if spec.num_classes and has_no_classifier(network):
            raise InputError(f"the weights in {folder} have no classifier. {_HOW_TO_CLASSIFY}")
        preprocessing = dataclasses.replace(preprocessing, image_size=spec.image_size)
        return cls(network, preprocessing, names, embeddings)

    @property
    def num_classes(self) -> int:
        if self.class_embeddings is not None:
            return len(self.class_embeddings)
        return self.network.spec.num_classes

    def name(self, label: int) -> str:
        """Of a class; its number where it has no name."""
        return self.class_names[label] if self.class_names else str(label)

    @property
    def transform(self) -> Crop:
        """Image uint8 [H, W, C] -> uint8 [size, size, channels of the network]."""
        crop = self.preprocessing.crop(self.network.spec.in_channels)
        return CropOfColours(**dataclasses.asdict(crop))

    def scores(self) -> Scores:
        """Makes a function: images uint8 [B, H, W, C] -> float32 [B, num_classes], as `readings`.

        That is logarithms of probabilities, or cosines to the class embeddings.
        """
        if self.class_embeddings is None:
            return self.readings(jax.nn.log_softmax)
        embed, of_classes = self.readings(unit_vectors), self.class_embeddings.T
        return lambda images: embed(images) @ of_classes

    def readings(self, read: Callable[[jax.Array], jax.Array]) -> Scores:
        """Makes a function: images uint8 [B, H, W, C] -> float32 [B, n], what it gives as `read`.

        It is compiled for each B, a multiple of the number of devices.
        """
        structure, parameters = functional.split(self.network)
        mesh = make_mesh()
        parameters, normalization = replicate(parameters, mesh), self.preprocessing.normalization
        run = functools.partial(_run, structure, normalization, mesh, read, parameters)
        return lambda images: jax.device_get(run(spread(images, mesh)))


class CropOfColours(Crop):
    """A crop that takes colours, too, where the network takes grey ones."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.image_shape[2] == 1 and image.shape[2] == 3:
            image = in_grey(image)
        return super().__call__(image)


def batch_size(num_images: int) -> int:
    """Of so many images, as few as make one batch, and a multiple of the number of devices."""
    size = min(_MOST_IMAGES, num_images)
    return -(-size // jax.device_count()) * jax.device_count()


@jax.jit(static_argnums=(0, 1, 2, 3))
def _run(structure, normalization: Normalization, mesh, read, parameters, images):
    """The outputs [B, n] of images uint8, as they are read, whole on every device."""

    def on_one_device(parameters, images):
        outputs = functional.merge(structure, parameters)(normalization(images))
        return jax.lax.all_gather(read(outputs), AXES, tiled=True)

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
    if preprocessing is None:
        return spec
    size = whole_patches(preprocessing.image_size, spec.patch_size)
    if size != spec.image_size:
        log.info(
            "%s: the network of %d pixels is interpolated to the %d of its preprocessing",
            *(folder, spec.image_size, size),
        )
    return dataclasses.replace(spec, image_size=size)
