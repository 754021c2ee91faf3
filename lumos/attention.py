"""Block-causal attention by prefix decomposition, and the KV cache beside it.

A document is a sequence of segments (``SequenceLayout.segments``): text is causal, a frame is one bidirectional block
that sees everything before it. So each frame is an unmasked attention over the keys up to its own end, and no L x L
mask exists anywhere. Documents are packed one after another and never attend to each other; neighbours of equal layout
are attended together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lumos.kernels import KERNELS, Kernel, flash_cpu
from lumos.layout import Segment, SequenceLayout

Backend = Literal["auto", "sdpa", "fused_cpu", "fused_flash", "fused_cudnn", "dense"]

_CUDA_PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention_mask(layout: SequenceLayout) -> Bool[Tensor, "tokens tokens"]:
    """The dense mask a layout stands for (True = attend); for tests and for reading, not used in computing."""
    index = torch.arange(layout.length)
    mask = index[:, None] >= index[None, :]
    for segment in layout.segments:
        if not segment.causal:
            mask[segment.start : segment.stop, : segment.stop] = True
    return mask


def attend(
    query: Float[Tensor, "tokens heads head_dim"],
    key: Float[Tensor, "tokens kv_heads head_dim"],
    value: Float[Tensor, "tokens kv_heads head_dim"],
    layouts: Sequence[SequenceLayout],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens heads head_dim"]:
    """Attention of packed documents, each to itself.

    Args:
        query: rotated queries of all documents, one after another.
        key: rotated keys; query head i uses key head ``i // (heads / kv_heads)``.
        value: values.
        layouts: one layout per document, in order; their lengths sum to ``tokens``.
        backend: ``sdpa`` slices through ``scaled_dot_product_attention``; ``fused_*`` call a kernel of torch and
            accumulate the gradients of keys and values in one buffer; ``dense`` forms the mask (for comparison);
            ``auto`` is fused_cpu on a CPU and sdpa elsewhere.
    """
    if backend == "auto":
        backend = "fused_cpu" if query.device.type == "cpu" else "sdpa"
    outputs = []
    start = 0
    for layout, run in groupby(layouts):
        count = sum(1 for _ in run)
        stop = start + count * layout.length
        # [tokens, heads, head_dim] -> [documents, heads, length, head_dim], views without copies
        q, k, v = (
            x[start:stop].reshape(count, layout.length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)
        )
        outputs.append(_attend_group(q, k, v, layout, backend).transpose(1, 2).flatten(0, 1))
        start = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_group(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, backend: Backend) -> Tensor:
    if backend == "dense":
        mask = attention_mask(layout).to(q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if backend != "sdpa":
        out: Tensor = _PrefixAttention.apply(q, k, v, layout.segments, KERNELS[backend])
        return out
    with sdpa_kernel(_CUDA_PRIORITY, set_priority=True):
        parts = [_attend_segment(q, k, v, segment) for segment in layout.segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _segment_mask(segment: Segment, past: int, like: Tensor) -> tuple[Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` of a segment after ``past`` tokens.

    A mask is needed only where causal tokens follow others: everything before them is seen, then a triangle.
    """
    length, before = segment.stop - segment.start, past + segment.start
    if not segment.causal or length == 1:
        return None, False
    if before == 0:
        return None, True
    return like.new_full((length, before + length), float("-inf")).triu(before + 1), False


def _attend_segment(q: Tensor, k: Tensor, v: Tensor, segment: Segment) -> Tensor:
    mask, causal = _segment_mask(segment, 0, q)
    return _sdpa(q[:, :, segment.start : segment.stop], k[:, :, : segment.stop], v[:, :, : segment.stop], mask, causal)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:  # whose only kernel without an L x L matrix takes no groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


class _PrefixAttention(torch.autograd.Function):
    """All segments of a group in one node, so that dK and dV are summed in place, not padded and added.

    Nothing of size L x L is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], kernel: Kernel) -> Tensor:
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device)
        out = out.transpose(1, 2)
        ctx.kernel, ctx.segments, ctx.states = kernel, segments, []
        query, key, value = (x.to(kernel.dtype or x.dtype) for x in (q, k, v))
        for segment in segments:
            rows, seen = slice(segment.start, segment.stop), slice(segment.stop)
            mask, causal = _segment_mask(segment, 0, query)
            part, state = kernel.forward(query[:, :, rows], key[:, :, seen], value[:, :, seen], mask, causal)
            out[:, :, rows] = part
            ctx.states.append(state)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        dtype, kernel = grad_out.dtype, ctx.kernel
        q, k, v, out, grad_out = (x.to(kernel.dtype or x.dtype) for x in (*ctx.saved_tensors, grad_out))
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        for segment, state in zip(ctx.segments, ctx.states, strict=True):
            rows, seen = slice(segment.start, segment.stop), slice(segment.stop)
            mask, causal = _segment_mask(segment, 0, q)
            inputs = q[:, :, rows], k[:, :, seen], v[:, :, seen], out[:, :, rows]
            dq, dk, dv = kernel.backward(grad_out[:, :, rows], *inputs, state, mask, causal)
            grad_q[:, :, rows] = dq
            grad_k[:, :, seen] += dk
            grad_v[:, :, seen] += dv
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None


@dataclass(frozen=True)
class RowPart:
    """Tokens that a pass computes of one row of a cache: a whole stretch after what the row holds, or some of it.

    With ``index``, keys and values of the other tokens of the stretch are those of an earlier pass, which was taken
    back by :meth:`KVCache.truncate`. The stretch must then be one frame, in which every token sees every other.
    """

    row: int
    layout: SequenceLayout  # of the whole stretch
    index: Int64[Tensor, " tokens"] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed."""
        return self.layout.length if self.index is None else len(self.index)


@dataclass
class KVCache:
    """Preallocated keys and values of several documents, each with its own length.

    ``lengths[i]`` tokens of row i are valid; :meth:`truncate` takes tokens back without touching memory.
    """

    keys: Float[Tensor, "layers rows kv_heads capacity head_dim"]
    values: Float[Tensor, "layers rows kv_heads capacity head_dim"]
    lengths: list[int]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget tokens from the end so that row i holds ``lengths[i]``.

        Raises:
            ValueError: if a row holds fewer already.
        """
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate rows of {self.lengths} tokens to {list(lengths)}")
        self.lengths = list(lengths)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        parts: Sequence[RowPart],
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Put the tokens of every part into a layer and attend at true lengths.

        ``lengths`` stays: the caller advances it once all layers are done.
        """
        out = torch.empty_like(query)
        start = 0
        for part in parts:
            past, stop = self.lengths[part.row], start + part.num_tokens
            end, capacity = past + part.layout.length, self.keys.shape[3]
            if end > capacity:
                raise ValueError(f"row {part.row} needs {end} tokens, the cache holds {capacity}")
            keys, values = self.keys[layer, part.row], self.values[layer, part.row]
            place = slice(past, end) if part.index is None else past + part.index
            keys[:, place] = key[start:stop].transpose(0, 1)
            values[:, place] = value[start:stop].transpose(0, 1)
            q = query[start:stop].transpose(0, 1)[None]
            k, v = keys[None, :, :end], values[None, :, :end]
            segments = part.layout.segments if part.index is None else (Segment(0, part.num_tokens, causal=False),)
            for segment in segments:
                seen = end if part.index is not None else past + segment.stop
                found = _attend_after(
                    q[:, :, segment.start : segment.stop], k[:, :, :seen], v[:, :, :seen], segment, past
                )
                out[start + segment.start : start + segment.stop] = found[0].transpose(0, 1)
            start = stop
        return out


def _attend_after(q: Tensor, k: Tensor, v: Tensor, segment: Segment, past: int) -> Tensor:
    """Queries of a segment after ``past`` tokens to the keys it sees."""
    mask, causal = _segment_mask(segment, past, q)
    if q.device.type == "cpu":
        return flash_cpu(q, k, v, mask, causal)[0]
    return _sdpa(q, k, v, mask, causal)
