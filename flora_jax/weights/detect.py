"""The layout of a file's names, the prefixes before them, and the copy of a network to read."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flora_jax.errors import InputError, few
from flora_jax.models.spec import Spec
from flora_jax.weights import layouts
from flora_jax.weights.name_map import Table

log = logging.getLogger(__name__)

_AVERAGED = re.compile(r"(^|[._-])(ema|swa|avg|averaged?)\d*([._-]|$)", re.IGNORECASE)
# Counted or computed, not learned, or of what is no part of the images' network: a token that
# training put in the place of patches, a layer behind the features, a norm of local crops, a
# network for texts.
_NO_WEIGHT = re.compile(
    r"(^|\.)((relative_position_index|relative_coords_table|attention_bias_idxs|attn_mask|position_ids|num_batches_tracked|n_averaged"
    r"|mask_token|logit_scale|logit_bias|rope_embed\.periods|rope\.freqs_(cos|sin)|qkv\.bias_mask)$"
    r"|(pooler\.dense|text_model|text_projection|visual_projection|local_cls_norm)\.)"
    r"|(^|\.)visual\.head\.|^proj$"  # OpenCLIP's last projection
)
# What of OpenCLIP's files is of the images' network.
_OF_IMAGES = re.compile(r"(\w+\.)*?visual\.")
# A training checkpoint of DINOv2 has its blocks in chunks, numbered on from one to the next.
_CHUNK = re.compile(r"(^|\.)blocks\.\d+\.(?=\d+\.)")


class Layout(NamedTuple):
    """The names of a family's weights in one library.

    `signature` is in one name of each file, `lacks` in none.
    """

    title: str
    family: str
    table: Callable[..., Table]
    signature: str
    lacks: str = "$^"

    def offset(self, spec: Spec, keys: Collection[str]) -> float | None:
        """How the library of the weights interpolates positions, as `resample_pos_embed` takes it.

        Of transformers' networks DINOv2 with registers alone antialiases, of DINOv2's releases,
        which keep their mask token, too. A number moves the points of the release.
        """
        if self.title.startswith("Hugging Face"):
            return None if getattr(spec, "positions", "all") == "patches" else 0.0
        return 0.1 if "mask_token" in keys and "register_tokens" not in keys else None


# The first whose signature stands in a name, at its beginning or behind a dot.
_BLOCKS = r"blocks\.\d+\."
LAYOUTS = [
    Layout("Hugging Face Swin", "swin", layouts.hugging_face_swin, rf"{_BLOCKS}layernorm_"),
    Layout(
        *("Hugging Face ViT", "vit", layouts.hugging_face_vit),
        r"layers?\.\d+\.layernorm_|embeddings\.(cls_token|class_embedding|patch_embedding)",
    ),
    Layout(
        *("timm TinyViT", "tiny_vit", layouts.timm_tiny_vit),
        rf"stages\.\d+\.{_BLOCKS}(attn\.attention_biases$|local_conv\.)",
    ),
    Layout("flora_jax TinyViT", "tiny_vit", layouts.own, rf"{_BLOCKS}attn\.attention_biases$"),
    Layout("timm Swin", "swin", layouts.timm_swin, rf"layers\.\d+\.{_BLOCKS}"),
    Layout(
        *("flora_jax Swin", "swin", layouts.own),
        *(rf"{_BLOCKS}attn\.(relative_position_bias_table|logit_scale)$", "cls_token$"),
    ),
    Layout("flora_jax ViT", "vit", layouts.own, rf"{_BLOCKS}attn\.proj\.kernel$"),
    Layout("OpenCLIP ViT", "vit", layouts.open_clip_vit, rf"transformer\.res{_BLOCKS}"),
    Layout("timm ViT", "vit", layouts.timm_vit, _BLOCKS),
]


def detect(keys: Collection[str], spec: Spec) -> Layout:
    """The layout that these names are in, whatever stands before them.

    Raises:
      InputError: none of LAYOUTS, or one of another family than the spec's.
    """

    def have(pattern: str) -> bool:
        return any(map(re.compile(rf"(^|\.)({pattern})").search, keys))

    found = (each for each in LAYOUTS if have(each.signature) and not have(each.lacks))
    layout = next(found, None)
    if layout is None:
        expected = [source for row in layouts.timm(spec) for source in row.sources]
        raise InputError(
            f"unknown weight names: found {few(keys, 3)}; expected those of "
            f"{', '.join(layout.title for layout in LAYOUTS)}, such as {few(expected, 3)}"
        )
    if layout.family != spec.family:
        raise InputError(
            f"these are weights of a {layout.title}, but the spec is a {type(spec).__name__}"
        )
    return layout


def without_prefix(arrays: Mapping[str, np.ndarray], spec: Spec) -> dict[str, np.ndarray]:
    """The arrays under the names of their layout, without a wrapper's prefix (`names_within`).

    Raises:
      InputError: as `detect`, or several copies of the weights, or two names that become one.
    """
    arrays = {key: a for key, a in arrays.items() if _OF_IMAGES.match(key)} or arrays
    arrays = {_CHUNK.sub(r"\1blocks.", key): a for key, a in arrays.items()}
    table = detect(arrays, spec).table(spec, arrays)
    names = names_within(arrays, [source for row in table for source in row.sources])
    return {name: arrays[key] for key, name in names.items()}


def is_buffer(key: str) -> bool:
    """Whether this is no weight of the network: it follows from the spec, or is not used here."""
    return _NO_WEIGHT.search(key) is not None


def pick(copies: Collection[str], usual: Sequence[str] = ()) -> str:
    """The copy of a network's weights to read, by the name that it stands under.

    That is the moving average, which published evaluations use; a line in the log says so. Without
    one it is the first of the `usual` names that is there.

    Raises:
      InputError: several are left to choose from.
    """
    averaged = [name for name in copies if _AVERAGED.search(name)]
    choice = averaged or [name for name in usual if name in copies][:1] or list(copies)
    if len(choice) > 1:
        raise InputError(
            f"there are weights under each of {_quoted(choice)}: leave one of them in the file"
        )
    if averaged and len(copies) > 1:
        log.info("weights stand under %s: the average, %r, is read", _quoted(copies), choice[0])
    return choice[0]


def names_within(keys: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """The names in a file -> without the prefix that most of the expected ones have there.

    Prefixes are such as "module." or "_orig_mod.model."; names that lack it stay as they are. Of
    several copies under different prefixes only the names of one are returned (see `pick`).

    Raises:
      InputError: several copies without an average among them, or two names that become one.
    """
    expected = set(expected)
    found = [
        (key[:start], key)
        for key in keys
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[start:] in expected
    ]
    counts = Counter(prefix for prefix, _ in found)
    most = max(counts.values(), default=0)
    prefix = pick([p for p, count in counts.items() if count == most] or [""])
    others = {key for p, key in found if p != prefix and counts[p] == most}
    names = {key: key.removeprefix(prefix) for key in keys if key not in others}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise InputError(f"{few(twice)} stand in the file with {prefix!r} before them and without")
    return names


def _quoted(names: Collection[str]) -> str:
    return ", ".join(repr(name) if name else "no prefix" for name in sorted(names))
