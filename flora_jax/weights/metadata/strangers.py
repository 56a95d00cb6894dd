"""What people give as weights and is none of a vision transformer: what it is, in a few words."""

import re

from etils import epath

from flora_jax.errors import InputError, few
from flora_jax.io.files import read_json

# Of a model's name in transformers or timm: the first whose pattern it begins with.
_MODELS = (
    (
        "a model of texts",
        r"(xlm-)?(mod(ern)?|distil|al|camem)?(ro)?berta?|gpt|llama|mi[sx]tral|qwen|gemma|phi|opt$|t5|mt5"
        r"|m?bart|bloom|falcon|electra|deberta|xlnet|mpnet|pegasus|mamba|deepseek|olmo",
    ),
    (
        "a model of sound",
        r"wav2vec2|whisper|hubert|wavlm|audio|speech|seamless|encodec|clap|unispeech|musicgen|bark|vits",
    ),
    (
        "a convolutional network",
        r"(se_?|wide_?)?resne[xs]?t|convnext|regnet|(tf_)?efficientnet|mobilenet|densenet|vgg|inception"
        r"|nfnet|mnasnet|ghostnet|rexnet|hrnet|dla|darknet|bit$|repvgg",
    ),
    ("a diffusion model", r"UNet|Autoencoder|.*Transformer2D|.*Pipeline"),
)
_FILES = {
    ".gguf": "a GGUF file of llama.cpp",
    ".ggml": "a GGML file of llama.cpp",
    ".onnx": "an ONNX graph",
    ".h5": "a Keras file of TensorFlow",
    ".keras": "a Keras file of TensorFlow",
    ".msgpack": "a msgpack file of Flax",
    ".pb": "a graph of TensorFlow",
    ".tflite": "a TensorFlow Lite graph",
    ".ckpt": "a checkpoint of Lightning or TensorFlow",
    ".pkl": "a pickle, which could run any program",
    ".pickle": "a pickle, which could run any program",
    ".joblib": "a pickle, which could run any program",
    ".npz": "an archive of numpy",
    ".npy": "an array of numpy",
    ".mlmodel": "a model of Core ML",
    ".engine": "an engine of TensorRT",
}
_POINTER = b"version https://git-lfs"
_HEADS = {b"GGUF": "a GGUF file of llama.cpp", b"\x89HDF": "a Keras file of TensorFlow"}
_LORA = re.compile(r"\.lora_[AB]\.")


def kind_of_model(name: str) -> str | None:
    """What a model of this name works on, where it is none of images or no transformer."""
    return next((kind for kind, names in _MODELS if re.match(names, name)), None)


def kind_of_file(path: epath.Path) -> str | None:
    """What a file is by the end of its name, where it is known and not read here."""
    return _FILES.get(path.suffix.lower())


def check_content(file: epath.PathLike, name: str) -> None:
    """Looks at the first bytes of what is called a file of weights.

    Raises:
      InputError: a pointer that Git LFS left in its place, or a file of another kind.
    """
    with open(file, "rb") as opened:
        head = opened.read(len(_POINTER))
    if head == _POINTER:
        raise InputError(
            f"{name} is a pointer that Git LFS left in the place of the weights: fetch them with "
            f"git lfs pull, or give hf:owner/name"
        )
    if kind := _HEADS.get(head[:4]):
        raise InputError(f"{name} is {kind}, whatever its name says")


def check_is_no_adapter(names) -> None:
    """Raises InputError for the weights of a LoRA adapter."""
    if lora := [name for name in names if _LORA.search(name)]:
        raise InputError(f"these are weights of an adapter ({few(lora, 2)}){_MERGE}")


def what_is_in(folder: epath.Path) -> str:
    """What a folder without weights holds instead, to stand behind a message's colon."""
    if (folder / "adapter_config.json").is_file():
        base = _said(folder / "adapter_config.json", "base_model_name_or_path")
        return f"it is an adapter of {base}{_MERGE}"
    if (folder / "model_index.json").is_file():
        pipeline = _said(folder / "model_index.json", "_class_name")
        return f"it is a pipeline of diffusers ({pipeline}), no vision transformer"
    if not folder.exists():
        return "there is no such folder"
    files = sorted(path for path in folder.iterdir() if path.name != ".git")
    if strangers := [f"{path.name} ({kind})" for path in files if (kind := kind_of_file(path))]:
        return f"it holds {few(strangers)}, which is not read here"
    return f"it holds {few([path.name for path in files])}" if files else "it is empty"


_MERGE = (
    ", not a whole model: merge it into its base with merge_and_unload() of peft, and save that"
)


def _said(path: epath.Path, name: str) -> str:
    content = read_json(path)
    return str(content.get(name)) if isinstance(content, dict) else "None"
