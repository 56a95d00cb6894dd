"""What the file beside the weights says of their network, held against the spec.

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
_FACTS = (
    *("num_heads", "layer_norm_eps", "activation", "rope_theta"),
    *_INTERPOLATED,
    *_OF_THE_CLASSIFIER,
)


def check_description(path: epath.Path, spec: Spec, strict: bool) -> None:
    """Compares the spec with the `spec.json` or `config.json` beside a file, or in our own folder.

    A `config.json` of a network that is not known here is not compared, one of a network that
    cannot be built here gives a warning.

    Raises:
      InputError: they contradict each other, which is a warning where not `strict`; names both
        values.
    """
    file = _description_of(path)
    contradictions = _contradictions(file, spec) if file else []
    if not contradictions:
        return
    message = f"{file} contradicts the spec: {'; '.join(contradictions)}"
    if strict:
        raise InputError(message)
    warnings.warn(message, stacklevel=3)


def _description_of(path: epath.Path) -> epath.Path | None:
    folder = path if path.is_dir() else path.parent
    if path in (folder, folder / WEIGHTS_FILE) and (folder / SPEC_FILE).exists():
        return folder / SPEC_FILE
    return folder / CONFIG_FILE if (folder / CONFIG_FILE).is_file() else None


def _contradictions(file: epath.Path, spec: Spec) -> list[str]:
    try:
        if file.name == SPEC_FILE:
            described, said = load_spec(file.parent), list(_FACTS)
        else:
            config = read_json(file)
            described = spec_of_config(config)
            said = [fact for fact in _FACTS if says(config, fact)]
    except UnknownNetworkError as error:
        log.info("%s is not compared with the spec: %s", file, error)
        return []
    except InputError as error:
        warnings.warn(f"{file} is not compared with the spec: {error}", stacklevel=4)
        return []
    if described.family != spec.family:  # the names in the file say it better
        return []
    if not described.num_classes:
        said = [fact for fact in said if fact not in _OF_THE_CLASSIFIER]
    found, ours = [], _facts(spec)
    for fact, value in _facts(described).items():
        if fact not in said or value == ours[fact]:
            continue
        message = f"{fact} is {value!r}, and {ours[fact]!r} in the spec"
        if fact in _INTERPOLATED:
            log.info("%s: %s", file, message)
        else:
            found.append(message)
    return found


def _facts(spec: Spec) -> dict[str, object]:
    """What is compared of a network of this family; a ViT's blocks may have other heads."""
    facts = {name: getattr(spec, name) for name in _FACTS if hasattr(spec, name)}
    if isinstance(spec, ViTSpec):
        heads = tuple(block.num_heads for block in spec.blocks)
        facts["num_heads"] = heads[0] if len(set(heads)) == 1 else heads
    return facts
