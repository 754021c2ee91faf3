"""Memory of one worker's device by part, by arithmetic over what the decoder, the loss and DeepSpeed keep.

``s`` is the size of a parameter and of an activation: 2 bytes where the model is in bf16, else 4. A step is at its
highest in one of three moments: when the loss forms logits, when the backward pass enters the last block, and when the
optimizer updates. What lasts (weights, masters, moments) is there in all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lumos.config import ModelConfig, Recompute
from lumos.cross_entropy import logits_bytes
from lumos.flops import ParameterCounts

_LIVE_PARAMETERS = 1e9  # DeepSpeed's default of stage3_max_live_parameters, in elements
_BUCKET = 5e8  # its default of reduce_bucket_size


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained, as far as memory depends on it."""

    zero: Mapping[str, Any]  # section zero_optimization of the DeepSpeed file
    workers: int
    parameter_bytes: int  # 2 or 4
    recompute: Recompute
    on_gpu: bool = True
    muon: bool = False
    ema: bool = False
    train_text: bool = False

    @property
    def stage(self) -> int:
        """Of ZeRO."""
        return int(self.zero.get("stage", 0))

    def offloads(self, what: Literal["optimizer", "param"]) -> bool:
        """Whether the host's memory has masters and moments, or the partitioned weights."""
        return bool((self.zero.get(f"offload_{what}") or {}).get("device", "none") != "none")


@dataclass(frozen=True)
class Memory:
    """Bytes by part; a part that is 0 is left out."""

    device: Mapping[str, float]
    host: Mapping[str, float]  # of one worker

    @property
    def peak(self) -> float:
        """Of the device."""
        return sum(self.device.values())


@dataclass(frozen=True)
class Pass:
    """One forward pass of a worker."""

    tokens: int
    predictions: float  # masked visual tokens


def worker_memory(model: ModelConfig, counts: ParameterCounts, setup: Setup, one: Pass) -> Memory:
    """Memory of a worker at the highest moment of a step whose passes are like ``one``."""
    lasting, host = _lasting(counts, setup)
    moments = (
        _loss_moment(model, counts, setup, one),
        _backward_moment(model, counts, setup, one),
        _update_moment(counts, setup),
    )
    highest = max(moments, key=lambda parts: sum(parts.values()))
    device = {name: size for name, size in (lasting | highest).items() if size}
    return Memory(device, {name: size for name, size in host.items() if size})


def trained(counts: ParameterCounts, setup: Setup) -> int:
    """Parameters that have gradients."""
    return counts.total - (0 if setup.train_text else counts.other_head)


def _lasting(counts: ParameterCounts, setup: Setup) -> tuple[dict[str, float], dict[str, float]]:
    """What a device and its host hold between steps."""
    size = trained(counts, setup)
    share = size / setup.workers if setup.stage else float(size)
    moments = 2.0 * share
    if setup.muon:
        moments -= (counts.attention + counts.mlp) * (share / size)  # a Muon's matrix has one
    optimizer = {
        "masters": 4 * share if setup.stage or setup.parameter_bytes == 2 else 0,
        "optimizer states": 4 * moments,
        "ema": 4 * share if setup.ema else 0,
    }
    weights = setup.parameter_bytes * (share if setup.stage == 3 else size)
    device = {"weights": weights, "text rows of the head": 4 * (counts.total - size)}
    host = {}
    if _gradients_last(setup):
        device["gradients"] = _gradients(counts, setup)
    if setup.offloads("optimizer"):
        host = optimizer | {"gradients": 4 * share}
    else:
        device |= optimizer
    if setup.stage == 3:
        if setup.offloads("param"):
            host["weights"] = device.pop("weights")
        live = min(size, float(setup.zero.get("stage3_max_live_parameters", _LIVE_PARAMETERS)))
        device |= {"gathered weights": setup.parameter_bytes * live, "communication buckets": _buckets(counts, setup)}
    return device, host


def _buckets(counts: ParameterCounts, setup: Setup) -> float:
    """Buffers in which gradients are reduced."""
    if not setup.stage:
        return 0.0
    elements = float(setup.zero.get("reduce_bucket_size", _BUCKET))
    if not setup.zero.get("contiguous_gradients", True):
        elements = min(elements, trained(counts, setup))
    width = 4 if setup.stage == 3 else setup.parameter_bytes
    return width * elements * (2 if setup.zero.get("overlap_comm", setup.stage == 3) else 1)


def _gradients_last(setup: Setup) -> bool:
    """Whether gradients keep their memory from step to step: float32 sums beside bf16 parameters, and in ZeRO-3."""
    return setup.stage == 3 or (setup.stage == 1 and setup.parameter_bytes == 2)


def _gradients(counts: ParameterCounts, setup: Setup) -> float:
    size = trained(counts, setup)
    copies = 2 if setup.stage == 3 else 1  # sums of every tensor's part, and those that the optimizer is given
    if setup.stage >= 2:
        return 0.0 if setup.offloads("optimizer") else copies * 4 * size / setup.workers
    return 4.0 * size


def block_activations(model: ModelConfig, tokens: int, width: int, recompute: Recompute) -> float:
    """Bytes that one block keeps from its forward pass for its backward pass, of elements of so many bytes."""
    hidden, wide = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if recompute == "full":
        return tokens * width * hidden  # its input
    attended = tokens * (width * queries + 4 * model.num_heads)  # what attention gives, and its log-sums
    if recompute == "selective":
        return tokens * width * (hidden + queries + 2 * keys + queries) + attended
    norms = 6 * hidden  # two residuals, each normed, and each scaled
    projected = 2 * queries + 3 * keys  # q and k before and after their norm and rotation, v
    return tokens * width * (norms + projected + 4 * wide) + attended


def _activations(model: ModelConfig, setup: Setup, one: Pass) -> float:
    """All blocks' after the forward pass, and the final norm's."""
    blocks = model.num_layers * block_activations(model, one.tokens, setup.parameter_bytes, setup.recompute)
    return blocks + 3 * one.tokens * model.hidden_size * setup.parameter_bytes


def _loss_moment(model: ModelConfig, counts: ParameterCounts, setup: Setup, one: Pass) -> dict[str, float]:
    """Logits of a block of rows, while the head's gradient is summed."""
    classes = counts.visual_head // model.hidden_size
    block = min(
        logits_bytes("cuda" if setup.on_gpu else "cpu", setup.parameter_bytes),
        one.predictions * classes * setup.parameter_bytes,
    )
    product = 0 if setup.parameter_bytes == 4 else setup.parameter_bytes * counts.visual_head
    return {
        "activations": _activations(model, setup, one),
        "logits": 2 * block + product + one.predictions * model.hidden_size * 2 * setup.parameter_bytes,
        "gradient of the head": 4 * counts.visual_head,
    }


def _backward_moment(model: ModelConfig, counts: ParameterCounts, setup: Setup, one: Pass) -> dict[str, float]:
    """Activations go as gradients come, so they are at their highest at one end or the other."""
    width, activations = setup.parameter_bytes, _activations(model, setup, one)
    working: float = one.tokens * width * (2 * model.intermediate_size + model.hidden_size)
    if setup.recompute != "none":
        working += block_activations(model, one.tokens, width, "none")
    gradients: float = 0.0 if _gradients_last(setup) else _gradients(counts, setup)
    parts = {
        "block at work": working,
        "gradient of the head": width * counts.visual_head,
        "communication buckets": _buckets(counts, setup),
    }
    if activations >= gradients:
        return parts | {"activations": activations}
    return parts | {"gradients": gradients}


def _update_moment(counts: ParameterCounts, setup: Setup) -> dict[str, float]:
    size = trained(counts, setup)
    share = size / setup.workers if setup.stage else float(size)
    working: float = 0.0 if setup.offloads("optimizer") else 12 * share  # gradients of its part, two results of Adam
    return {"update at work": working, "gradients": _gradients(counts, setup)}  # once, should they last
