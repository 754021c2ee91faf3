"""The Lumos-1 decoder: a pre-norm Llama block with per-head q/k LayerNorm, MM-RoPE and block-causal attention.

Module names give the state-dict keys of the authors' release. Batches are packed: tokens of all documents lie one after
another in one dimension, and a list of layouts says where each begins.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lumos.attention import Backend, KVCache, RowPart, attend
from lumos.config import ModelConfig, Recompute
from lumos.head import Head
from lumos.kernels import ATTENTION_OPS, by_rows
from lumos.layout import SequenceLayout
from lumos.rope import packed_tables, rotary_tables, rotate

# On CPU a matrix product over 1, 2, 3, 5 or 7 rows takes another path than the same rows inside a larger one and
# differs in the last bits; whole groups of 8 rows do not, so cached passes are padded to them.
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class _Pass:
    """What every layer of one forward pass shares."""

    cos: Tensor
    sin: Tensor
    layouts: Sequence[SequenceLayout]  # of whole documents
    backend: Backend
    cache: KVCache | None = None  # if there is one, what is computed are parts of its rows
    parts: Sequence[RowPart] = ()


class RMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch channels"]:
        """Normalise the last dimension, cast back, then scale."""
        return by_rows(self._norm, x)

    def _norm(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)  # in float32 within, without copies kept


class HeadNorm(nn.Module):
    """LayerNorm of each head, then a scale and shift; parameter row r serves the r-th block of heads."""

    def __init__(self, num_blocks: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_blocks, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_blocks, head_dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "tokens heads head_dim"]) -> Float[Tensor, "tokens heads head_dim"]:
        """Normalise over head_dim."""
        if len(self.weight) == 1:
            return F.layer_norm(x, (x.shape[-1],), self.weight[0], self.bias[0], self.eps)
        normed = F.layer_norm(x, (x.shape[-1],), eps=self.eps)
        heads = x.shape[1] // len(self.weight)
        weight, bias = (repeat(p, "block dim -> (block heads) dim", heads=heads) for p in (self.weight, self.bias))
        return normed * weight + bias


class Linear(nn.Linear):
    """Torch's, without first values on the meta device, where making some imports torch's compiler, for seconds."""

    def reset_parameters(self) -> None:
        """Draw first values, unless there is nothing to hold them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """Likewise."""

    def reset_parameters(self) -> None:
        """Draw first values, unless there is nothing to hold them."""
        if not self.weight.is_meta:
            super().reset_parameters()


class SelfAttention(nn.Module):
    """Projections, q/k norm, rotation, attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        query_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = HeadNorm(config.model_parallel_size, config.head_dim, config.qk_norm_eps)
        self.k_norm = HeadNorm(config.model_parallel_size, config.head_dim, config.qk_norm_eps)

    def project(self, x: Float[Tensor, "rows channels"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of the rows that hold tokens; rows beyond are padding."""
        q, k, v = (
            rearrange(proj(x)[: len(cos)], "tokens (heads dim) -> tokens heads dim", dim=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (
            by_rows(partial(_turned, self.q_norm), q, cos, sin),
            by_rows(partial(_turned, self.k_norm), k, cos, sin),
            v,
        )

    def output(self, attended: Float[Tensor, "tokens heads head_dim"], rows: int) -> Float[Tensor, "rows channels"]:
        """Back to channels; rows beyond the tokens are zeros."""
        out = rearrange(attended, "tokens heads dim -> tokens (heads dim)")
        padding = rows - len(out)
        projected: Tensor = self.o_proj(F.pad(out, (0, 0, 0, padding)) if padding else out)
        return projected


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels"]:
        """Gate, project back."""
        projected: Tensor = self.down_proj(by_rows(_gated, self.gate_proj(x), self.up_proj(x)))
        return projected


def _turned(norm: HeadNorm, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(norm(x), cos, sin)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Block(nn.Module):
    """Attention and SwiGLU, each pre-normed with a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "rows channels"], shared: _Pass) -> Float[Tensor, "rows channels"]:
        """One layer."""
        q, k, v = self.before(x, shared.cos, shared.sin)
        if shared.cache is None:
            attended = attend(q, k, v, shared.layouts, backend=shared.backend)
        else:
            attended = shared.cache.attend(self.layer, q, k, v, shared.parts)
        return self.after(x, attended)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """What comes after attention."""
        x = x + self.self_attn.output(attended, len(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Embedding, blocks and final norm: everything under ``model.`` in the release's keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


def fill_initially(weight: Tensor, name: str, num_layers: int, generator: torch.Generator | None) -> None:
    """Give a parameter of that name, or a part of it, its first values.

    Normal, std 0.02, with residual outputs scaled down by the depth; norms at identity.
    """
    if "norm" in name:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        depth = 2 * num_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        weight.normal_(0.0, 0.02 / depth**0.5, generator=generator)


class Decoder(nn.Module):
    """The model. Call it for hidden states; losses and the sampler apply the rows of ``lm_head`` they need."""

    def __init__(self, config: ModelConfig, *, train_text: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "none"  # in the backward pass
        self.attention_backend: Backend = "auto"
        self.model = Backbone(config)
        self.lm_head = Head(config, train_text=train_text)

    def forward(
        self, ids: Int64[Tensor, " tokens"], layouts: Sequence[SequenceLayout]
    ) -> Float[Tensor, "tokens channels"]:
        """Hidden states after the final norm.

        Args:
            ids: packed tokens of all documents.
            layouts: one per document, in order; positions restart at 0 in each.

        Raises:
            ValueError: if the layouts' lengths do not sum to the number of tokens, or a document is too long.
        """
        _check(ids, [layout.length for layout in layouts])
        longest = max(layout.length for layout in layouts)
        if longest > self.config.max_seq_len:
            raise ValueError(f"a document of {longest} tokens is longer than max_seq_len {self.config.max_seq_len}")
        cos, sin = packed_tables(layouts, self.config, ids.device)
        return self._run(ids, _Pass(cos, sin, layouts, self.attention_backend))

    def forward_cached(
        self,
        ids: Int64[Tensor, " tokens"],
        parts: Sequence[RowPart],
        positions: Int64[Tensor, "tokens 3"],
        cache: KVCache,
    ) -> Float[Tensor, "tokens channels"]:
        """Hidden states of tokens appended to rows of a cache, which keeps their keys and values.

        Args:
            ids: the tokens of all parts, one after another.
            parts: which row each belongs to, of different rows.
            positions: of each token, in the whole document (``rope.position_ids``).
            cache: the rows; afterwards each is longer by the length of its part's layout.
        """
        _check(ids, [part.num_tokens for part in parts])
        cos, sin = rotary_tables(positions, self.config)
        hidden = self._run(ids, _Pass(cos, sin, (), self.attention_backend, cache, parts))
        for part in parts:
            cache.lengths[part.row] += part.layout.length
        return hidden

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        """An empty cache for ``rows`` documents of at most ``capacity`` tokens."""
        shape = (self.config.num_layers, rows, self.config.num_kv_heads, capacity, self.config.head_dim)
        weight = self.lm_head.visual
        return KVCache(weight.new_zeros(shape), weight.new_zeros(shape), lengths=[0] * rows)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights (:func:`fill_initially`)."""
        with torch.no_grad():
            for weight, key, _ in self.weight_parts():
                fill_initially(weight, key, self.config.num_layers, generator)

    def weight_parts(self) -> Iterator[tuple[Tensor, str, slice]]:
        """Every weight, the authors' key it belongs to, and which rows of that key's matrix it holds.

        Parts of one key come one after another in the order of their rows. The head's rows of text are not among the
        parameters unless they are trained (:class:`lumos.head.Head`).
        """
        for name, weight in self.model.named_parameters(prefix="model"):
            yield weight, name, slice(0, len(weight))
        head = self.lm_head
        yield head.text, "lm_head.weight", slice(0, head.num_text)
        yield head.visual, "lm_head.weight", slice(head.num_text, head.num_text + head.num_visual)

    def compile_blocks(self, **options: Any) -> None:
        """Compile what lies before and after attention in each block, once for all lengths; as ``torch.compile``.

        Attention stays as it is: its kernels are compiled already, and its shapes change with every caption.
        """
        for block in self.model.layers:
            for name in ("before", "after"):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=True, **options))

    def _run(self, ids: Tensor, shared: _Pass) -> Tensor:
        padding = -len(ids) % _ROW_MULTIPLE if shared.cache is not None else 0
        x = self.model.embed_tokens(F.pad(ids, (0, padding)) if padding else ids)
        if torch.is_autocast_enabled(x.device.type):  # activations are of one kind, whatever keeps the parameters
            x = x.to(torch.get_autocast_dtype(x.device.type))
        shared = replace(shared, cos=shared.cos.to(x.dtype), sin=shared.sin.to(x.dtype))
        recompute = self.recompute if torch.is_grad_enabled() else "none"
        for block in self.model.layers:
            x = _RUN[recompute](block, x, shared)
        hidden: Tensor = self.model.norm(x)[: len(ids)]
        return hidden


def _check(ids: Tensor, lengths: Sequence[int]) -> None:
    if sum(lengths) != len(ids) or not lengths:
        raise ValueError(f"{len(lengths)} layouts of {sum(lengths)} tokens in all do not fit {len(ids)} token ids")


def _keep_attention(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


_RUN: dict[Recompute, Callable[[nn.Module, Tensor, _Pass], Tensor]] = {
    "none": lambda block, x, shared: block(x, shared),
    "selective": partial(
        checkpoint,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, _keep_attention),
    ),
    "full": partial(checkpoint, use_reentrant=False),
}
