"""flora_jax: vision transformers made smaller and faster, by FLORA and ViT-Slim."""

from flora_jax import slim
from flora_jax.evaluation import EvaluationSet, evaluate, top1
from flora_jax.lowrank.calibration import Calibration, calibrate
from flora_jax.lowrank.space import RankSpace
from flora_jax.lowrank.supernet import Supernet, extract, factorize
from flora_jax.models.factory import create
from flora_jax.models.spec import BlockSpec, Spec
from flora_jax.models.swin_spec import SwinSpec, swin
from flora_jax.models.vit_spec import ViTSpec, deit
from flora_jax.search.allocation import allocate
from flora_jax.weights.export import export_timm
from flora_jax.weights.folder import load, save
from flora_jax.weights.pretrained import from_pretrained, from_state_dict


def macs(spec: Spec) -> int:
    """Multiply-adds for one image of a model of this spec."""
    return spec.macs()


def num_params(spec: Spec) -> int:
    """Every parameter of a model of this spec."""
    return spec.num_params()


__all__ = [
    "BlockSpec",
    "Calibration",
    "EvaluationSet",
    "RankSpace",
    "Spec",
    "Supernet",
    "SwinSpec",
    "ViTSpec",
    "allocate",
    "calibrate",
    "create",
    "deit",
    "evaluate",
    "export_timm",
    "extract",
    "factorize",
    "from_pretrained",
    "from_state_dict",
    "load",
    "macs",
    "num_params",
    "save",
    "slim",
    "swin",
    "top1",
]
