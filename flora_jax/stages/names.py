"""The stages of a run in their order, each with a line of help."""

STAGES = {
    "pretrain": "reads the dense model's weights, or trains it",
    "transfer": "fine-tunes a finished model on other classes",
    "slim": "ViT-Slim: learns gates, cuts out what they close, retrains",
    "calibrate": "weighs the supernet's factors by what enters each layer",
    "filter": "FLORA: keeps the best rank triples of each block",
    "supernet": "FLORA: trains all subnets at once",
    "allocate": "finds ranks by measured sensitivity, without training",
    "search": "FLORA: evolves the best subnet for each budget",
    "extract": "cuts out the subnets and their baselines",
    "finetune": "trains them on, in the same way",
    "evaluate": "compares all models on the test images: result.json",
    "export": "hands out the models as files with a card: --config.export=onnx, torch, ...",
    "report": "prints the table, writes report.html",
}
FLORA_STAGES = tuple(name for name in STAGES if name not in ("transfer", "slim", "export"))
