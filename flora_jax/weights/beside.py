"""Check of a spec against the description of a network beside its weights.

Heads, the eps of norms, the activation and the pool leave no trace in names and shapes: read with
another of them, weights make another network in silence. Another resolution or window is no
contradiction, for positions are interpolated; nor is another pool than that of a network without a
classifier.
"""

import logging
import warnings

from etils import epath

from flora_jax.errors import InputError
from flora_jax.models.spec import Spec
from flora_jax.models.vit_spec import ViTSpec
from flora_jax.weights.folder import SPEC_FILE, WEIGHTS_FILE, load_spec
from flora_jax.weights.metadata.spec import CONFIG_FILE, read_config

log = logging.getLogger(__name__)

_FACTS = (
    *("num_heads", "layer_norm_eps", "activation", "rope_theta", "rope_grid", "rope_offset"),
    "pool_num_heads",
)
_OF_THE_CLASSIFIER = ("pool", "fc_norm")


def check_description(path: epath.Path, spec: Spec, strict: bool) -> bool:
    """Compares the spec with the `spec.json` or `config.json` beside a file, or in our own folder.

    A `config.json` of a network that is not known here, or cannot be built, is not compared.

    Returns:
      Whether the weights must have as many outputs as the spec: they are described so.

    Raises:
      InputError: they contradict each other, which is a warning where not `strict`; names both
        values.
    """
    folder = path if path.is_dir() else path.parent
    is_own = path in (folder, folder / WEIGHTS_FILE) and (folder / SPEC_FILE).exists()
    file = folder / (SPEC_FILE if is_own else CONFIG_FILE)
    if not file.is_file():
        return False
    try:
        described = load_spec(folder) if is_own else read_config(file)
    except InputError as error:
        log.warning("the spec is not compared with what is beside the weights: %s", error)
        return False
    if described.family != spec.family:  # the names in the file say it better
        return False
    names = _FACTS + (_OF_THE_CLASSIFIER if described.num_classes else ())
    names += ("outputs",) if described.num_classes == spec.num_classes else ()
    known = "pretrained_window_sizes"  # where they are those of the spec, they may change with it
    names += (known,) if getattr(described, known, ()) else ()
    facts = [(name, _fact(described, name), _fact(spec, name)) for name in names]
    contradictions = [
        f"{name} is {theirs!r}, and {ours!r} in the spec"
        for name, theirs, ours in facts
        if theirs != ours
    ]
    if contradictions:
        message = f"{file} contradicts the spec: {'; '.join(contradictions)}"
        if strict:
            raise InputError(message)
        warnings.warn(message, stacklevel=3)
    return strict and described.num_classes == spec.num_classes


def _fact(spec: Spec, name: str) -> object:
    """A field's value, or None where the family has none; a ViT's blocks may differ in heads."""
    if name == "num_heads" and isinstance(spec, ViTSpec):
        heads = tuple(block.num_heads for block in spec.blocks)
        return heads[0] if len(set(heads)) == 1 else heads
    return getattr(spec, name, None)
