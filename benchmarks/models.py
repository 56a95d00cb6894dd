"""Every kind of checkpoint that is read, from its own library's folder to a smaller network.

    pip install '.[torch]' timm transformers
    XLA_FLAGS=--xla_backend_optimization_level=0 python benchmarks/models.py

(The flag is for the tiny networks, where compiling is most of the time.)

Each kind is built by transformers or timm, tiny and with random weights, and saved as its library
saves it. Then `flora.from_pretrained(folder)` reads it, and a row says how far the output is from
the library's own (of the largest value), the share of the MACs that FLORA leaves (calibrate,
factorize, allocate, extract), that the closed form leaves (compress), and that ViT-Slim leaves
(half of the attention's dimensions and MLP units; two thirds of the tokens), and whether the filter
scores a block.
--only=KIND runs one kind, such as hf-dinov2; --full builds it at the size its library gives it.
"""

import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import timm
import torch
import transformers
from common import describe_machine, parser_of, write_json
from timm.models import save_for_hf

import flora_jax as flora
from flora_jax import slim
from flora_jax.flora.filter import score_block
from flora_jax.models import functional

SHARE, BATCH = 0.8, 8
_HF_TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "image_size": 64,
    "patch_size": 16,
}
_TIMM_TINY = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 64}
_SWIN_TINY = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)}
_14 = {"image_size": 56, "patch_size": 14}


class Kind(NamedTuple):
    """A model of a library: how it is named there, and what makes it tiny."""

    title: str
    model: str  # a class of transformers, or an architecture of timm
    tiny: dict
    always: dict | None = None


KINDS = {
    "hf-vit": Kind("ViT", "ViTForImageClassification", _HF_TINY),
    "hf-deit": Kind("DeiT", "DeiTForImageClassification", _HF_TINY),
    "hf-deit-distilled": Kind("DeiT distilled", "DeiTForImageClassificationWithTeacher", _HF_TINY),
    "hf-beit": Kind(
        "BEiT", "BeitForImageClassification", _HF_TINY, {"use_relative_position_bias": True}
    ),
    "hf-dinov2": Kind("DINOv2", "Dinov2Model", _HF_TINY | _14),
    "hf-dinov2-registers": Kind("DINOv2 + registers", "Dinov2WithRegistersModel", _HF_TINY | _14),
    "hf-dinov2-classifier": Kind(
        "DINOv2, classifier", "Dinov2ForImageClassification", _HF_TINY | _14
    ),
    "hf-dinov3": Kind("DINOv3", "DINOv3ViTModel", _HF_TINY, {"num_register_tokens": 4}),
    "hf-clip": Kind("CLIP", "CLIPVisionModel", _HF_TINY),
    "hf-siglip": Kind("SigLIP", "SiglipVisionModel", _HF_TINY),
    "hf-siglip-classifier": Kind(
        "SigLIP, classifier", "SiglipForImageClassification", {"vision_config": _HF_TINY}
    ),
    "hf-swin": Kind(
        "Swin",
        "SwinForImageClassification",
        _SWIN_TINY | {"image_size": 64, "patch_size": 4, "window_size": 4},
    ),
    "hf-swin-v2": Kind(
        "Swin V2",
        "Swinv2ForImageClassification",
        _SWIN_TINY | {"image_size": 64, "patch_size": 4, "window_size": 4},
    ),
    "timm-augreg": Kind("ViT, AugReg", "vit_base_patch16_224", _TIMM_TINY),
    "timm-deit": Kind("DeiT", "deit_base_patch16_224", _TIMM_TINY),
    "timm-deit-distilled": Kind("DeiT distilled", "deit_base_distilled_patch16_224", _TIMM_TINY),
    "timm-deit3": Kind("DeiT III", "deit3_base_patch16_224", _TIMM_TINY),
    "timm-dinov2": Kind("DINOv2", "vit_base_patch14_dinov2", _TIMM_TINY | {"img_size": 56}),
    "timm-dinov2-registers": Kind(
        "DINOv2 + registers", "vit_base_patch14_reg4_dinov2", _TIMM_TINY | {"img_size": 56}
    ),
    "timm-dinov3": Kind("DINOv3", "vit_base_patch16_dinov3", _TIMM_TINY | {"img_size": 64}),
    "timm-beitv2": Kind("BEiT v2", "beitv2_base_patch16_224", _TIMM_TINY),
    "timm-pe": Kind("Perception Encoder", "vit_pe_core_base_patch16_224", _TIMM_TINY),
    "timm-eva02": Kind("EVA-02", "eva02_base_patch14_224", _TIMM_TINY | {"img_size": 56}),
    "timm-eva02-tiny": Kind(
        "EVA-02 Ti, S", "eva02_tiny_patch14_224", _TIMM_TINY | {"img_size": 56}
    ),
    "timm-clip": Kind("CLIP", "vit_base_patch16_clip_224", _TIMM_TINY),
    "timm-siglip": Kind("SigLIP", "vit_base_patch16_siglip_224", _TIMM_TINY),
    "timm-siglip-gap": Kind("SigLIP, mean", "vit_base_patch16_siglip_gap_224", _TIMM_TINY),
    "timm-swin": Kind("Swin", "swin_tiny_patch4_window7_224", _SWIN_TINY | {"img_size": 56}),
    "timm-swin-v2": Kind("Swin V2", "swinv2_tiny_window8_256", _SWIN_TINY | {"img_size": 64}),
    "timm-tiny-vit": Kind(
        "TinyViT",
        "tiny_vit_21m_224",
        {"embed_dims": (16, 48, 64, 96), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3)},
    ),
}
COLUMNS = (
    *("checkpoint", "library", "difference", "FLORA", "closed form", "attention, MLP", "tokens"),
    "filter",
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these kinds, not all")
    parser.add_argument("--full", action="store_true", help="at full size; needs --only")
    arguments = parser.parse_args()
    if arguments.full and not arguments.only:
        parser.error("--full needs --only")
    logging.getLogger("flora_jax").setLevel(logging.ERROR)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    found = {}
    for name in arguments.only or KINDS:
        cells = row(name, KINDS[name], arguments.full)
        found[name] = dict(zip(COLUMNS, cells, strict=True))
        print(f"| {' | '.join(cells)} |", flush=True)
    write_json(arguments.json, describe_machine(), found)


def row(name: str, kind: Kind, is_full: bool) -> list[str]:
    """Everything that the library does with one kind, as the cells of the table."""
    torch.manual_seed(0)
    library = "transformers" if name.startswith("hf") else "timm"
    with tempfile.TemporaryDirectory() as folder:
        build = _of_transformers if library == "transformers" else _of_timm
        theirs = build(kind, folder, is_full)
        model = flora.from_pretrained(folder)
    spec, rng = model.spec, np.random.default_rng(0)
    images = rng.normal(size=(BATCH, *spec.image_shape)).astype(np.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    difference = abs(_output(model, images) - expected).max() / abs(expected).max()

    space = flora.RankSpace.regular(spec, ratios=(1 / 4, 1))
    calibration = flora.calibrate(model, images)
    supernet = flora.factorize(model, space, calibration=calibration)
    genes = flora.allocate(supernet, images, macs=int(SHARE * flora.macs(spec)))
    subnet = flora.extract(supernet, genes)
    fitted = flora.compress(model, images, macs=int(SHARE * flora.macs(spec)))
    assert all(np.isfinite(_output(small, images)).all() for small in (subnet, fitted))
    return [
        kind.title,
        library,
        f"{difference:.0e}",
        *(f"{flora.macs(small.spec) / flora.macs(spec):.2f}" for small in (subnet, fitted)),
        *_slimmed(model, images, rng),
        _filtered(model, supernet, rng),
    ]


def _output(model, images: np.ndarray) -> np.ndarray:
    structure, parameters = functional.split(model)
    compiled = jax.jit(lambda p, x: functional.merge(structure, p)(x))
    return np.asarray(compiled(parameters, images))


def _slimmed(model, images: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """The share of MACs with half the dimensions and units, and with two thirds of the tokens."""
    gated = slim.add_gates(model)
    structure, parameters = functional.split(gated.network)
    for name in parameters:
        if name.endswith("gate"):  # open, all of them are alike
            parameters[name] *= rng.uniform(0.5, 1, parameters[name].shape).astype(np.float32)
    gated = dataclasses.replace(gated, network=functional.merge(structure, parameters))
    cuts = [{"attn": 0.5, "mlp": 0.5}]
    if gated.has_token_gates:
        cuts.append({"patch": 0.67})
    shares = []
    for budgets in cuts:
        small = slim.extract(gated, slim.threshold(gated, **budgets))
        assert np.isfinite(_output(small, images)).all()
        shares.append(f"{flora.macs(small.spec) / flora.macs(model.spec):.2f}")
    return shares[0], shares[1] if len(shares) == 2 else f"no: {model.spec.why_tokens_stay}"


def _filtered(model, supernet: flora.Supernet, rng: np.random.Generator) -> str:
    spec = supernet.space.spec
    batch = {
        "image": rng.integers(0, 256, (BATCH, *spec.image_shape), np.uint8),
        "label": rng.integers(0, spec.num_classes or 1, BATCH).astype(np.int32),
        "mask": np.ones(BATCH, np.float32),
    }
    images = flora.EvaluationSet([batch], flora.Normalization())
    if not spec.classifies:
        images = images.compared_with(model)
    scores = score_block(supernet, 0, images)
    (shown, *_) = scores.values()
    assert all(np.isfinite(metric).all() for metric in scores.values())
    return f"{len(shown)} triples"


def _of_transformers(kind: Kind, folder: str, is_full: bool) -> Callable:
    model_class = getattr(transformers, kind.model)
    config = model_class.config_class(**kind.always or {}, **({} if is_full else kind.tiny))
    model = model_class(config).eval()
    _disturb(model)
    model.save_pretrained(folder)

    def output(images):
        given = model(images)
        return given.logits if "logits" in given else given.pooler_output

    return output


def _of_timm(kind: Kind, folder: str, is_full: bool) -> Callable:
    arguments = {} if is_full else dict(kind.tiny)
    model = timm.create_model(kind.model, pretrained=False, **arguments).eval()
    _disturb(model)
    save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def _disturb(model: torch.nn.Module) -> None:
    """Gives what begins as zero or one, biases, norms, classifiers, values that tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
