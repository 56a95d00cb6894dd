"""Check of a spec against the description of a network beside its weights.

Heads, the eps of norms, the activation and the pool leave no trace in names and shapes: read with
another of them, weights make another network in silence. What a file does not say is not checked.
Another resolution or window is no contradiction, for positions are interpolated; nor is another
pool than that of a network without a classifier.
"""

import logging
import warnings

from etils import epath

from flora_jax.errors import InputError, UnknownNetworkError
from flora_jax.io.files import read_json
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE, load_spec
from flora_jax.weights.metadata.spec import CONFIG_FILE, says, spec_of_config

log = logging.getLogger(__name__)

_INTERPOLATED = ("image_size", "window_size")
_OF_THE_CLASSIFIER = ("pool", "fc_norm")
_FACTS = ("num_heads", "layer_norm_eps", "activation", "rope_theta")


def check_description(path: epath.Path, spec: Spec, strict: bool) -> None:
    """Compares the spec with the `spec.json` or `config.json` beside a file, or in our own folder.

    A `config.json` of a network that is not known here is not compared, one of a network that
    cannot be built here gives a warning.

    Raises:
      InputError: they contradict each other, which is a warning where not `strict`; names both
        values.
    """
    folder = path if path.is_dir() else path.parent
    if path in (folder, folder / WEIGHTS_FILE) and (folder / SPEC_FILE).exists():
        file = folder / SPEC_FILE
    elif not (file := folder / CONFIG_FILE).is_file():
        return
    if contradictions := _contradictions(file, spec):
        message = f"{file} contradicts the spec: {'; '.join(contradictions)}"
        if strict:
            raise InputError(message)
        warnings.warn(message, stacklevel=3)


def _contradictions(file: epath.Path, spec: Spec) -> list[str]:
    try:
        config = None if file.name == SPEC_FILE else read_json(file)
        described = load_spec(file.parent) if config is None else spec_of_config(config)
    except UnknownNetworkError as error:
        log.info("%s is not compared with the spec: %s", file, error)
        return []
    except InputError as error:
        warnings.warn(f"{file} is not compared with the spec: {error}", stacklevel=4)
        return []
    if described.family != spec.family:  # the names in the file say it better
        return []
    names = _FACTS + _INTERPOLATED + (_OF_THE_CLASSIFIER if described.num_classes else ())
    found = []
    for name in names:
        theirs, ours = _fact(described, name), _fact(spec, name)
        if theirs == ours or not (config is None or says(config, name)):
            continue
        message = f"{name} is {theirs!r}, and {ours!r} in the spec"
        if name in _INTERPOLATED:
            log.info("%s: %s", file, message)
        else:
            found.append(message)
    return found


def _fact(spec: Spec, name: str) -> object:
    """A field's value, or None where the family has none; a ViT's blocks may differ in heads."""
    if name == "num_heads" and isinstance(spec, ViTSpec):
        heads = tuple(block.num_heads for block in spec.blocks)
        return heads[0] if len(set(heads)) == 1 else heads
    return getattr(spec, name, None)
