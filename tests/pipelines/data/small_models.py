"""Small files of the formats that models come in: open_clip folders, LAION's heads, a text detector in ONNX."""

import importlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

EMBED = 16
_VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": EMBED, "vision_cfg": _VISION, "text_cfg": _TEXT}
COCA = {
    "embed_dim": EMBED,
    "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**_TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**_TEXT, "attn_pooler_heads": 2},
    "custom_text": True,
}


def write_open_clip(folder: Path, architecture: dict = CLIP, seed: int = 0) -> Path:
    """A folder as the hub has them, with random weights."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": {}}))
    open_clip = importlib.import_module("open_clip")
    name = f"small-{folder.name}-{seed}"
    (folder / f"{name}.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(seed)
    model = open_clip.create_model(name)
    save_file(
        {key: value.contiguous().clone() for key, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return folder


def write_head(path: Path, *widths: int, seed: int = 0) -> Path:
    """Linear layers from CLIP features to one number, under the names that nn.Sequential with Dropouts gives."""
    torch.manual_seed(seed)
    sizes = [EMBED, *widths, 1]
    state = {}
    for number, (before, after) in enumerate(pairwise(sizes)):
        layer = torch.nn.Linear(before, after)
        prefix = f"layers.{2 * number}." if widths else ""
        state |= {f"{prefix}weight": layer.weight.data, f"{prefix}bias": layer.bias.data}
    torch.save(state, path)
    return path


def write_text_detector(path: Path) -> Path:
    """A network of a DB detector's interface that takes what is bright for text."""
    weight = numpy_helper.from_array(np.full((1, 3, 1, 1), 20.0, np.float32), "weight")
    bias = numpy_helper.from_array(np.full(1, -20.0, np.float32), "bias")
    nodes = [
        helper.make_node("Conv", ["image", "weight", "bias"], ["sum"], kernel_shape=[1, 1]),
        helper.make_node("Sigmoid", ["sum"], ["probability"]),
    ]
    shape = [1, 3, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [1, 1, "height", "width"])],
        [weight, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(path))
    return path
