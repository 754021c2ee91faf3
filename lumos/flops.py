"""FLOPs and parameters of the decoder by arithmetic: what MFU and a plan of a run are computed from.

A multiplication with its addition counts as two. Only matrix products are counted: norms, rotations and the SwiGLU's
gate are below 1 % of them. There are two counts of one step. ``dense`` is the usual one (6 N per token and attention
over L x L), as if every position were predicted over the whole vocabulary and every pair of tokens attended; with it,
figures compare with those of other programs. ``exact`` is what the block-causal mask and the loss ask for: the prefix
products of ``SequenceLayout.segments`` and the head on masked visual tokens and visual classes alone. In a causal
segment the whole rectangle is counted, as the counters of kernels do; captions are short beside frames. A text loss
is not counted.

Nothing here computes with tensors.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import acos, pi, sqrt

from lumos.config import MaskConfig, ModelConfig, Recompute
from lumos.layout import SequenceLayout


@dataclass(frozen=True)
class Parts:
    """A figure by part of the decoder."""

    linear: float = 0.0  # projections of the blocks: q, k, v, o, gate, up, down
    attention: float = 0.0  # products of queries with keys, and of scores with values
    head: float = 0.0  # logits

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.linear + self.attention + self.head


@dataclass(frozen=True)
class Workload:
    """Counts of a batch that FLOPs follow from, all linearly."""

    tokens: int  # of all documents, markup and text included
    exact_pairs: int  # of a query and a key, in the prefix products
    dense_pairs: int  # the same, if every token met every token of its document
    visual_predictions: float  # positions at which the visual loss is taken

    @classmethod
    def of(cls, layouts: Iterable[SequenceLayout], *, visual_predictions: float) -> "Workload":
        """The counts of packed documents."""
        tokens = exact = dense = 0
        for layout in layouts:
            tokens += layout.length
            exact += sum((segment.stop - segment.start) * segment.stop for segment in layout.segments)
            dense += layout.length**2
        return cls(tokens, exact, dense, visual_predictions)

    def times(self, count: int) -> "Workload":
        """So many of it."""
        return Workload(*(count * value for value in vars(self).values()))


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step. MFU is :attr:`model` per second by the peak; the hardware's share, :attr:`hardware`."""

    forward: Parts
    recomputed: Parts  # in the backward pass, of what the forward pass did not keep

    @property
    def model(self) -> float:
        """What the step asks for, however it is computed: two products in the backward pass for one in the forward."""
        return 3 * self.forward.total

    @property
    def hardware(self) -> float:
        """What is computed."""
        return self.model + self.recomputed.total


def exact_flops(
    config: ModelConfig, work: Workload, *, visual_classes: int, recompute: Recompute = "none"
) -> StepFlops:
    """FLOPs of a step as the mask and the loss ask for.

    Args:
        config: shape of the model.
        work: of all documents of the step.
        visual_classes: size of the codebook.
        recompute: what is computed a second time in the backward pass: nothing; blocks but for their attention; blocks.
    """
    forward = Parts(
        linear=2.0 * work.tokens * _block_weights(config) * config.num_layers,
        attention=_attention(config, work.exact_pairs),
        head=2.0 * config.hidden_size * work.visual_predictions * visual_classes,
    )
    # The attention kernels form the scores, one of two forward products, again; whatever is recomputed besides. The
    # loss forms its gradients while the logits are there, so of the head nothing is.
    # The last product of a block is not repeated: its own output is kept as the next block's input.
    last = 2.0 * work.tokens * config.hidden_size * config.intermediate_size * config.num_layers
    recomputed = Parts(
        linear=0.0 if recompute == "none" else forward.linear - last,
        attention=forward.attention * (1.5 if recompute == "full" else 0.5),
    )
    return StepFlops(forward, recomputed)


def dense_flops(config: ModelConfig, work: Workload) -> StepFlops:
    """FLOPs of a step by the usual count: 6 N per token (N: matrices of the blocks and head), and attention L x L."""
    forward = Parts(
        linear=2.0 * work.tokens * _block_weights(config) * config.num_layers,
        attention=_attention(config, work.dense_pairs),
        head=2.0 * work.tokens * config.hidden_size * config.vocab_size,
    )
    return StepFlops(forward, Parts())


def mean_mask_ratio(mask: MaskConfig) -> float:
    """Expected share of masked cells, over the diffusion time: the mean of max(min_ratio, cos(pi u / 2))."""
    low = mask.min_ratio
    return 2 / pi * sqrt(1 - low**2) + low * (1 - 2 / pi * acos(low))


@dataclass(frozen=True)
class ParameterCounts:
    """Number of parameters by part."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    visual_head: int  # rows of the codebook
    other_head: int  # rows of text and markup, which the visual loss never reads

    @property
    def total(self) -> int:
        """All of them, as ``ModelConfig.num_parameters`` has it."""
        return self.embedding + self.attention + self.mlp + self.norms + self.visual_head + self.other_head


def count_parameters(config: ModelConfig, *, visual_classes: int) -> ParameterCounts:
    """Parameters of a decoder with so many visual codes."""
    layers, hidden = config.num_layers, config.hidden_size
    mlp = 3 * hidden * config.intermediate_size
    norms = layers * (2 * hidden + 4 * config.model_parallel_size * config.head_dim) + hidden
    return ParameterCounts(
        embedding=config.vocab_size * hidden,
        attention=layers * (_block_weights(config) - mlp),
        mlp=layers * mlp,
        norms=norms,
        visual_head=visual_classes * hidden,
        other_head=(config.vocab_size - visual_classes) * hidden,
    )


def _block_weights(config: ModelConfig) -> int:
    """Weights of the matrices of one block."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def _attention(config: ModelConfig, pairs: int) -> float:
    """Forward products of so many pairs in every layer: two, of head_dim multiplications in every head."""
    return 4.0 * pairs * config.num_heads * config.head_dim * config.num_layers
