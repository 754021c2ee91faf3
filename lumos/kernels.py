"""The attention kernels of torch whose backward can be called for a part of the keys. Those of CUDA were never run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ROWS = 128  # of an elementwise chain on a CPU that are worked on at a time: they stay in its cache
Gradients = tuple[Tensor, Tensor, Tensor]
State = tuple[Any, ...]  # what the forward pass leaves to the backward pass besides its inputs and its output
_aten = torch.ops.aten


def by_rows(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """``function(x, *others)``, of which a row depends on the same rows alone and is as long as that of ``x``.

    On a CPU, without gradients, some rows at a time: what is between the steps of a chain then stays in the cache.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or len(x) <= _ROWS:
        return function(x, *others)
    out: Tensor | None = None
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        part = function(x[rows], *(other[rows] for other in others))
        out = part.new_empty(x.shape) if out is None else out  # under autocast of another type than x
        out[rows] = part
    assert out is not None
    return out


@dataclass(frozen=True)
class Kernel:
    """Attention of queries [batch, heads, queries, head_dim] to keys with as many heads, or a divisor of them."""

    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, State]]  # q, k, v, mask, is causal
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, State, Tensor | None, bool], Gradients]
    dtype: torch.dtype | None = None  # what it computes in; None: whatever comes


def flash_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, State]:
    """Attention on a CPU, with the heads of a group in one product where all keys are seen."""
    queries = _folded(q, k, mask, causal)
    out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(queries, k, v, 0.0, causal, attn_mask=mask)
    return out.reshape(q.shape), (logsumexp,)


def _folded(x: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The heads of a group one after another as queries of one head: longer products, and keys are read once."""
    if mask is not None or causal:
        return x
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])


def _flash_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State, mask: Tensor | None, causal: bool
) -> Gradients:
    folded = (_folded(x, k, mask, causal) for x in (grad, q))
    grad_q, grad_k, grad_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *folded, k, v, _folded(out, k, mask, causal), *state, 0.0, causal, attn_mask=mask
    )
    return grad_q.reshape(q.shape), grad_k, grad_v


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, State]:
    if mask is not None:
        raise ValueError(
            "flash attention takes no mask, which causal tokens after a frame need: cut the tail of documents off "
            "(lumos.batch.pack does), or use another backend"
        )
    out, *state, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return out, tuple(state)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State, mask: Tensor | None, causal: bool
) -> Gradients:
    *softmax, seed, offset = state
    gradients: Gradients = _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, *softmax, 0.0, causal, seed, offset
    )
    return gradients


def _cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, State]:
    out, *state, _ = _aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, causal, False)
    return out, tuple(state)


def _cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, state: State, mask: Tensor | None, causal: bool
) -> Gradients:
    logsumexp, *sizes, seed, offset = state
    gradients: Gradients = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, logsumexp, seed, offset, mask, *sizes, 0.0, causal
    )
    return gradients


KERNELS = {
    "fused_cpu": Kernel(flash_cpu, _flash_cpu_backward, torch.float32),  # its bfloat16 backward is 3 times slower
    "fused_flash": Kernel(_flash, _flash_backward),
    "fused_cudnn": Kernel(_cudnn, _cudnn_backward),
}

# What selective recomputation keeps the results of.
ATTENTION_OPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
}
