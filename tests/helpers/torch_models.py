"""What tests do with models of PyTorch; those that import this skip without it."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with PyTorch models")

TOLERANCE = {"atol": 1e-4, "rtol": 0}


def randomise(module) -> None:
    """Biases, norms and tables too, which start out as constants."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight") and not parameter.any():
                parameter += 1  # norms of timm's Swin V2, without which its blocks do nothing
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def images(spec, count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *spec.image_shape)).astype(np.float32)


def torch_logits(module, batch: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        output = module.eval()(torch.tensor(batch.transpose(0, 3, 1, 2)))
    return getattr(output, "logits", output).numpy()
