"""Cross entropy of many rows over many classes, summed, its gradients made in the forward pass.

The upstream gradient of a sum is one number. So the gradients of hidden states and weight are formed while a block of
logits is there, and scaled by that number later: three products instead of four, in one buffer that is used again and
again. All logits together exist in neither pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Of the logits normalised at a time: on a CPU they stay in its caches, on a GPU kernels are to be large.
_SOFTMAX_BYTES = {"cpu": 2**23, "cuda": 2**28}
_ROW_STEP = 64  # blocks are whole multiples of so many rows


@dataclass(frozen=True)
class CrossEntropy:
    """The sum to descend on, and the value of every row."""

    total: Float[Tensor, ""]  # of losses and weighted squares of normalisers; differentiable, once
    losses: Float[Tensor, " rows"]  # without gradient; at least float32
    normalisers: Float[Tensor, " rows"]  # log-sum-exp of the logits, for z-loss; without gradient


def cross_entropy(
    hidden: Float[Tensor, "rows channels"],
    weight: Float[Tensor, "classes channels"],
    targets: Int64[Tensor, " rows"],
    *,
    z_loss_weight: float = 0.0,
    block_rows: int | None = None,
) -> CrossEntropy:
    """Cross entropy of ``hidden @ weight.T``, with ``z_loss_weight`` times the squared normaliser added to the sum.

    Products are in the dtype of autocast where that is on, else in that of ``hidden``. Everything between them is in
    float32 (float64 for such inputs), of the very logits that the forward product gave, and so are sums over blocks.
    Where no gradient is wanted, only the forward pass is done.

    Args:
        hidden: one row for each target.
        weight: one row for each class.
        targets: 0..classes-1.
        z_loss_weight: holds normalisers near zero.
        block_rows: rows of logits held at a time; None is what :func:`logits_bytes` hold.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if block_rows is None:
        block_rows = _block_rows(device, len(weight), dtype.itemsize)
    needed = (torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and weight.requires_grad)
    options = _Options(dtype, z_loss_weight, block_rows, *needed)
    total, losses, normalisers = _CrossEntropy.apply(hidden, weight, targets, options)
    return CrossEntropy(total, losses, normalisers)


def logits_bytes(device: str, itemsize: int) -> int:
    """Bytes of the block of logits held at a time, by the bytes of one.

    On a GPU 512 MiB. On a CPU 64 MiB in float32, and 128 in bfloat16, where every block costs a pass over the weight's
    gradient in float32.
    """
    return 2**29 if device == "cuda" else 2**28 // itemsize


def _block_rows(device: str, classes: int, itemsize: int) -> int:
    return max(_ROW_STEP, logits_bytes(device, itemsize) // (classes * itemsize) // _ROW_STEP * _ROW_STEP)


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype  # of products
    z_loss_weight: float
    block_rows: int
    hidden_gradient: bool
    weight_gradient: bool

    @property
    def any_gradient(self) -> bool:
        return self.hidden_gradient or self.weight_gradient


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        normalisers = torch.empty_like(losses)
        x, w = hidden.to(options.dtype), weight.to(options.dtype)
        buffer = w.new_empty(min(options.block_rows, len(x)), len(w))
        grad_hidden = torch.empty_like(hidden) if options.hidden_gradient else None
        new = torch.empty_like if len(x) else torch.zeros_like
        grad_weight = new(weight, dtype=exact) if options.weight_gradient else None
        product = torch.empty_like(w) if options.weight_gradient and options.dtype != exact else None
        for start in range(0, len(x), options.block_rows):
            rows = slice(start, start + options.block_rows)
            block = buffer[: len(x[rows])]
            torch.mm(x[rows], w.T, out=block)
            _normalise(block, targets[rows], losses[rows], normalisers[rows], options)
            if grad_hidden is not None:
                grad_hidden[rows] = torch.mm(block, w)
            if grad_weight is not None:
                _add_product(grad_weight, block.T, x[rows], product, first=start == 0)
        ctx.gradients = grad_hidden, grad_weight
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses, normalisers)
        total = losses.sum()
        if options.z_loss_weight:
            total = total + options.z_loss_weight * normalisers.square().sum()
        return total, losses, normalisers

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a cross entropy were taken already, and it keeps them for one pass")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # they are scaled in place
        if grad_hidden is not None:
            grad_hidden *= grad_total
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor, product: Tensor | None, *, first: bool) -> None:
    """Add ``a @ b``, formed in ``product`` if there is one; the first one is written over what is there."""
    if product is not None:
        torch.mm(a, b, out=product)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out=total)
    else:
        torch.addmm(total, a, b, out=total)


def _normalise(logits: Tensor, targets: Tensor, losses: Tensor, normalisers: Tensor, options: _Options) -> None:
    """Fill in losses and normalisers of a block; turn its logits, in place, into gradients if any are wanted."""
    exact = losses.dtype
    budget = _SOFTMAX_BYTES.get(logits.device.type, _SOFTMAX_BYTES["cpu"])
    step = max(1, budget // (logits.shape[1] * exact.itemsize))
    scratch = None if logits.dtype == exact else logits.new_empty(min(step, len(logits)), logits.shape[1], dtype=exact)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        values = logits[rows] if scratch is None else scratch[: len(logits[rows])].copy_(logits[rows])
        index = targets[rows, None]
        largest, picked = values.amax(-1), values.gather(-1, index).squeeze(-1)
        torch.softmax(values, -1, out=values)
        normalisers[rows] = largest - values.amax(-1).log()  # the largest probability is 1 over the sum
        losses[rows] = normalisers[rows] - picked
        if not options.any_gradient:
            continue
        if options.z_loss_weight:
            values *= (1.0 + 2.0 * options.z_loss_weight * normalisers[rows])[:, None]
        values.scatter_add_(-1, index, values.new_full(index.shape, -1.0))
        if scratch is not None:
            logits[rows] = values
