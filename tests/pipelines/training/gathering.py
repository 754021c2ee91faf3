"""Whole weights out of a DeepSpeed engine, for tests to compare; a training exports them from its checkpoints."""

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """Full parameters in float32, whatever the ZeRO stage. Every worker must call it."""
    state = {}
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # the optimizer's own copy where there is one
        with torch.no_grad():
            state[name] = (parameter if full is None else full).float().clone()
    return state
