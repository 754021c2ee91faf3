"""Reading the reference outputs: files, weights and bit masks (tests/golden/README.md)."""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumos.config import from_release_config
from lumos.decoder import Decoder
from lumos.vocabulary import Vocabulary

GOLDEN_DIR = Path(os.environ.get("LUMOS_GOLDEN_DIR", Path(__file__).parents[1] / "golden"))

SUFFIXES = ("_forward", "_train", "_gen_i2v", "_gen")


def stems(suffix: str) -> list[str]:
    """Names of the reference files of one kind, without extension."""
    names = sorted(path.stem for path in GOLDEN_DIR.glob(f"*{suffix}.npz"))
    return [name for name in names if next(s for s in SUFFIXES if name.endswith(s)) == suffix]


def load(stem: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(GOLDEN_DIR / f"{stem}.npz") as archive:
        return dict(archive)


def model_name(stem: str) -> str:
    """The model a file belongs to."""
    return stem.removesuffix(next(s for s in SUFFIXES if stem.endswith(s)))


@cache
def reference_model(name: str) -> Decoder:
    """The decoder with the reference's weights, drawn as the reference drew them."""
    meta: dict[str, Any] = json.loads((GOLDEN_DIR / f"{name}.json").read_text())
    config = from_release_config(meta["config"])
    model = Decoder(replace(config, visual_start=Vocabulary.lumos1().visual_start))
    rng = np.random.default_rng(meta["weight_seed"])
    state = {}
    for key in sorted(meta["shapes"]):
        x = rng.standard_normal(meta["shapes"][key])
        x = (1 + 0.1 * x if key.endswith("weight") else 0.1 * x) if "norm" in key.split(".")[-2] else 0.02 * x
        state[key] = torch.from_numpy(x.astype(np.float32))
        first = state[key].flatten()[:4].tolist()
        assert np.allclose(first, meta["first4"][key]), f"{key} is not the reference's"
    model.load_state_dict(state, strict=True)
    return model


def unpack_mask(bits: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Boolean mask from its packed bits."""
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(bool)
