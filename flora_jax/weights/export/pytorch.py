"""A finished model as a folder that PyTorch opens, without JAX and without this library."""

import json
import logging
import pathlib
import tempfile
from typing import Any

import numpy as np
from etils import epath
from safetensors.numpy import save

from flora_jax.data import pictures
from flora_jax.errors import InputError, few
from flora_jax.io.files import read_json, replacing
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.models.spec_json import spec_to_json
from flora_jax.weights import layouts
from flora_jax.weights.export.checks import (
    check_computes,
    exactly,
    images_to_compare,
)

log = logging.getLogger(__name__)

SPEC_FILE, WEIGHTS_FILE, CODE_FILE = "spec.json", "model.safetensors", "model.py"
PREPROCESS_FILE = "preprocess.py"
_TOLERANCE = 1e-4


def export_torch(model: Network, folder: epath.PathLike, images: np.ndarray | None = None) -> None:
    """Writes a model as a folder that runs in PyTorch: it needs torch and safetensors alone.

    `model.py` holds the networks as plain torch modules, `spec.json` the shape of this one,
    `model.safetensors` its weights, float32. `load(folder)` of that file gives a torch module:
    images float32 [B, C, H, W], normalised, to logits [B, num_classes], or to features [B, D]
    without classes. Its `preprocess(picture)` gives one of these images, as `preprocessing.json`
    says, which a run writes beside it; this takes numpy and Pillow.

    Where torch is installed, the folder's model is compared with this one first, and has to give
    the same within 1e-4 of the largest output; otherwise a warning says that it was not. `model.py`
    is written last: a folder with one is whole. Files of an earlier export are replaced, others in
    the folder stay. `flora_jax.load` reads the folder, too.

    Args:
      images: float32 [B, H, W, C], normalised, to compare on; None: two random ones.

    Raises:
      InputError: the model is a supernet, or holds NaN or infinite parameters; images of another
        shape; the folder holds files but no earlier export; or PyTorch computes something else.
      StorageError: the folder cannot be written.
    """
    folder = user_path(folder)
    images = images_to_compare(model, images)
    _check_can_hold_an_export(folder)
    parameters = functional.split(model)[1]
    arrays = {name: np.asarray(value, np.float32) for name, value in parameters.items()}
    if strange := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise InputError(f"the model holds parameters that are NaN or infinite: {few(strange)}")
    code = pathlib.Path(__file__).with_name("torch_networks.py")
    files = {
        SPEC_FILE: (json.dumps(spec_to_json(model.spec), indent=1) + "\n").encode(),
        WEIGHTS_FILE: save(_state_dict(arrays, model.spec), metadata={"format": "pt"}),
        PREPROCESS_FILE: pathlib.Path(pictures.__file__).read_bytes(),
        CODE_FILE: code.read_bytes(),
    }
    _check_computes_the_same(model, files, images)
    if (folder / CODE_FILE).exists():
        (folder / CODE_FILE).unlink()
    for name, content in files.items():
        with replacing(folder / name) as partial:
            partial.write_bytes(content)


def load_export(folder: epath.PathLike) -> Any:
    """The torch module of an exported folder, as its `model.py` loads it; needs torch."""
    path = pathlib.Path(folder, CODE_FILE)
    module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text(), path, "exec"), module)
    return module["load"](folder)


def _check_can_hold_an_export(folder: epath.Path) -> None:
    if not folder.is_dir():
        return
    try:
        description = read_json(folder / SPEC_FILE)
    except (OSError, InputError):
        description = {}
    if "family" in description:  # that of `flora_jax.save` is another
        return
    # What is hidden, such as .git, is in nobody's way.
    if found := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        raise InputError(
            f"{folder} holds {few(found)}, and no earlier export: give an empty or a new folder"
        )


def _state_dict(parameters: dict[str, np.ndarray], spec: Spec) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the layouts that `model.py` gives them."""
    arrays: dict[str, np.ndarray] = {}
    for row in layouts.pytorch(spec):
        arrays |= row.write(parameters[row.target])
    return arrays


def _check_computes_the_same(model: Network, files: dict[str, bytes], images: np.ndarray) -> None:
    """Raises InputError where PyTorch makes something else of the files than JAX of the model."""
    try:
        import torch
    except ImportError:
        log.warning("the export was not run to check it: pip install 'flora_jax[torch]'")
        return
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            pathlib.Path(name, file).write_bytes(content)
        network = load_export(name)

        def written(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()

        check_computes(written, exactly(model), images, _TOLERANCE)
