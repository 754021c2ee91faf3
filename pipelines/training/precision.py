"""What products of a training are made in, and `precision: auto` made definite."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from pipelines.training.config import TrainConfig

AUTO = "auto"
Definite = Literal["bf16", "fp32"]


def has_bf16_products() -> bool:
    """Whether this machine's CPU multiplies in bf16; with AVX2 alone, torch takes 25 times as long as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def with_precision(config: TrainConfig) -> TrainConfig:
    """The config with `precision: auto` made definite.

    A run that began keeps what it began in, on whichever machine it goes on; GPUs multiply in bf16; of CPUs the
    driver's stands for all.
    """
    if config.precision != AUTO:
        return config
    return replace(config, precision=_begun_in(config) or _best(config))


def _begun_in(config: TrainConfig) -> Definite | None:
    try:
        run = json.loads((Path(config.output).expanduser() / "run.json").read_text(encoding="utf-8"))
        found = run["identity"]["precision"]
    except (OSError, ValueError, TypeError, KeyError):  # no run, or none that can be read, which others tell
        return None
    return found if found in get_args(Definite) else None


def _best(config: TrainConfig) -> Definite:
    return "bf16" if config.resources.device == "gpu" or has_bf16_products() else "fp32"


def slow_precision(config: TrainConfig) -> str | None:
    """What to tell a user whose CPU has not what the config asks for; None: nothing."""
    if config.precision != "bf16" or config.resources.device != "cpu" or has_bf16_products():
        return None
    return (
        "precision = bf16, but this CPU does not multiply in it, so that torch takes some 25 times as long as in "
        "float32: precision=auto takes what the machine has"
    )
