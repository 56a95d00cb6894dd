"""What a good run takes, by the number of images: the rules of `configs/yours.py`.

They pass through what was measured on 2,000 drawings of 12 classes and a DINOv2 ViT-S/14
(docs/decisions.md): batches of 64, eight epochs, twelve of fine-tuning, learning rates of 3e-4 and
5e-4 for 512 images.
"""

import math

_MEASURED_IMAGES, _MEASURED_BATCH = 2000, 64
_FEWEST_EPOCHS, _MOST_EPOCHS = 5.0, 40.0
LEAST_IMAGES = 8
_BATCHES_AN_EPOCH = 8
_HELD_OUT_A_CLASS, _HELD_OUT_IN_ALL = 30, 300
_ENOUGH_FOR_TOP1 = 5000
_COMPARED = 50_000


def epochs(measured: float, num_images: int) -> float:
    """As the inverse square root of the number of images, so that few are seen more often."""
    wanted = measured * math.sqrt(_MEASURED_IMAGES / num_images)
    return round(min(max(wanted, _FEWEST_EPOCHS), _MOST_EPOCHS), 1)


def batch_size(num_images: int, num_devices: int) -> int:
    """64, 256 from 20,000 images on, 1,024 from 200,000 on; at least eight batches an epoch.

    A multiple of the number of devices.
    """
    wanted = _MEASURED_BATCH
    for threshold, larger in ((20_000, 256), (200_000, 1024)):
        if num_images >= threshold:
            wanted = larger
    fits = 2 ** int(math.log2(max(num_images / _BATCHES_AN_EPOCH, LEAST_IMAGES)))
    return -(-min(wanted, fits) // num_devices) * num_devices


def learning_rate(measured: float, batch_size: int) -> float:
    """For 512 images; `measured` at a batch of 64.

    The rate of a step grows as the square root of a larger batch, as Adam wants it, and stays in a
    smaller one, for few images make few steps.
    """
    share = _MEASURED_BATCH / batch_size
    return float(f"{measured * (math.sqrt(share) if share < 1 else share):.2g}")


def heldout_fraction(num_images: int, num_classes: int) -> float:
    """Thirty images a class and 300 in all, but a quarter at most and a fiftieth at least."""
    wanted = max(_HELD_OUT_A_CLASS * num_classes, _HELD_OUT_IN_ALL) / num_images
    return round(min(max(wanted, 0.02), 0.25), 3)


def metric(num_heldout: int) -> str:
    """The likelihood, which says more on few images, until there are enough for top-1."""
    return "top1" if num_heldout >= _ENOUGH_FOR_TOP1 else "log_likelihood"


def heldout_by(name: str, num_images: int) -> str:
    """By the contents of a folder of at most 50,000 images, whose comparison takes a minute."""
    return "content" if name.startswith("folder:") and num_images <= _COMPARED else "name"
