"""Models as folders: `spec.json` beside the weights.

A finished model's weights are `model.safetensors` with a checksum. The folder of a training keeps
Orbax `checkpoints/` instead, that of a trained supernet an Orbax checkpoint of its `parameters/`.
One that was exported, for PyTorch or under timm's names, has the spec itself in `spec.json`.
"""

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from flora_jax.cluster.processes import by_the_first
from flora_jax.errors import InputError, MissingFileError, few
from flora_jax.flora.space import RankSpace
from flora_jax.flora.supernet import Supernet, abstract_supernet
from flora_jax.io import checkpoint, files
from flora_jax.io.files import sha256
from flora_jax.io.paths import user_path
from flora_jax.models import functional
from flora_jax.models.factory import create_abstract
from flora_jax.models.network import Network
from flora_jax.models.spec import Spec
from flora_jax.models.spec_json import spec_from_json, spec_to_json
from flora_jax.weights import layouts

FORMAT = 1
SPEC_FILE, WEIGHTS_FILE = "spec.json", "model.safetensors"
PARAMETERS, CHECKPOINTS = "parameters", "checkpoints"


def describe(model: Network | Supernet) -> dict:
    """The content of `spec.json`: enough to build a model again without its weights."""
    if isinstance(model, Supernet):
        spec, space = model.space.spec, model.space.to_json()
    else:
        spec, space = model.spec, None
    return {"format": FORMAT, "spec": spec_to_json(spec), "space": space}


def save_description_once(model: Network | Supernet, path: epath.PathLike) -> None:
    """Marks the folder of a training run as a model that `load` can open."""
    files.write_json_once(epath.Path(path) / SPEC_FILE, describe(model))


def save(model: Network | Supernet, path: epath.PathLike) -> None:
    """Writes a model to the folder `path`; `load` reads it back bit for bit.

    The description is written last, so that a folder with one is complete.
    """
    path = user_path(path)
    parameters = functional.split(model.network if isinstance(model, Supernet) else model)[1]
    with files.replacing(path / WEIGHTS_FILE) as partial:
        partial.write_bytes(safetensors.save({n: np.asarray(p) for n, p in parameters.items()}))
        checksum = sha256(partial)
    files.write_json(path / SPEC_FILE, {**describe(model), "sha256": {WEIGHTS_FILE: checksum}})


save_once = by_the_first(save)


def save_trained_once(model: Network | Supernet, path: epath.PathLike) -> None:
    """Leaves the parameters of a training that is done in its folder, as one Orbax checkpoint."""
    network = model.network if isinstance(model, Supernet) else model
    parameters = {n: np.asarray(p) for n, p in functional.split(network)[1].items()}
    if not checkpoint.has_saved_parameters(epath.Path(path) / PARAMETERS):
        checkpoint.save_parameters(parameters, epath.Path(path) / PARAMETERS)


def load(path: epath.PathLike) -> Network | Supernet:
    """Opens a saved model, or the newest checkpoint of a training run (a supernet, mostly).

    A folder that `export_torch` wrote is a saved model, too.

    Raises:
      MissingFileError: nothing to open at `path`.
      InputError: the folder was written by a newer version, its content is damaged, or a parameter
        is NaN or infinite; names it.
    """
    path = user_path(path)
    description = _read_description(path)
    spec = spec_from_json(description["spec"])
    if (path / WEIGHTS_FILE).exists():
        parameters = _read_weights(path / WEIGHTS_FILE, spec, description.get("sha256"))
    elif checkpoint.has_saved_parameters(path / PARAMETERS):
        parameters = checkpoint.read_saved_parameters(path / PARAMETERS)
    else:
        parameters = checkpoint.read_parameters(path / CHECKPOINTS)
    if not_finite := [name for name, p in parameters.items() if not np.isfinite(p).all()]:
        raise InputError(f"{path} holds parameters that are NaN or infinite: {few(not_finite)}")
    if description["space"] is None:
        return functional.with_parameters(create_abstract(spec), parameters)
    supernet = abstract_supernet(RankSpace.from_json(spec, description["space"]))
    return Supernet(functional.with_parameters(supernet.network, parameters), supernet.space)


def load_model(path: epath.PathLike) -> Network:
    """Loads a plain model. Raises as `load`, and InputError for a supernet."""
    model = load(path)
    if isinstance(model, Supernet):
        raise InputError(f"{path} holds a supernet: flora_jax.load opens it, extract a model first")
    return model


def load_supernet(path: epath.PathLike) -> Supernet:
    """Loads a supernet. Raises as `load`, and InputError for a plain model."""
    supernet = load(path)
    if not isinstance(supernet, Supernet):
        raise InputError(f"{path} holds a plain model where a supernet is needed")
    return supernet


def load_spec(path: epath.PathLike) -> Spec:
    """Reads the spec of a saved model, without its weights. Raises as `load`."""
    return spec_from_json(_read_description(user_path(path))["spec"])


def inside(path: epath.Path, *names: str) -> str:
    """For a message: the folders inside that hold one of these files, such as checkpoint-500."""
    found = {p.parent.name for name in names for p in files.matching(path, f"*/{name}")}
    return f"; inside it are {few(found)}" if found else ""


def _read_description(path: epath.Path) -> dict:
    if not (path / SPEC_FILE).exists():
        hint = inside(path, SPEC_FILE)
        raise MissingFileError(f"{path} has no {SPEC_FILE}: not a folder of a saved model{hint}")
    description = files.read_json(path / SPEC_FILE)
    if "family" in description:  # an export's; of no other do the weights need no checksum
        return {"format": FORMAT, "spec": description, "space": None}
    needed = {"format", "spec", "space"} | ({"sha256"} if (path / WEIGHTS_FILE).exists() else set())
    if missing := needed - description.keys():
        raise InputError(f"{path / SPEC_FILE} lacks {', '.join(sorted(missing))}")
    if description["format"] != FORMAT:
        raise InputError(f"{path} has format {description['format']}; this version reads {FORMAT}")
    return description


def _read_weights(path: epath.Path, spec: Spec, checksums: dict | None) -> dict[str, np.ndarray]:
    """The parameters that `save` wrote, or, without checksums, `export_torch` or `export_timm`."""
    with files.on_disk(path) as file:
        if checksums is not None and sha256(file) != checksums[WEIGHTS_FILE]:
            raise InputError(f"{path} is damaged: its checksum is not the one in {SPEC_FILE}")
        try:
            arrays = safetensors.load_file(file)
        except SafetensorError as error:
            raise InputError(f"{path} is damaged: {error}") from error
    if checksums is not None:
        return arrays
    for table in (layouts.pytorch(spec), layouts.timm(spec)):
        if {source for row in table for source in row.sources} == arrays.keys():
            return {row.target: row.read([arrays[s] for s in row.sources]) for row in table}
    raise InputError(f"{path} holds other weights than {SPEC_FILE} says: {few(arrays)}")
