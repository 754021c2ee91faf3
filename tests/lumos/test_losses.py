import pytest
import torch
import torch.nn.functional as F

from lumos.losses import cross_entropy_rows, masked_visual_loss, text_loss
from lumos.masking import apply_mask

from .models import VOCABULARY, documents, tiny_model


def test_chunks_change_neither_values_nor_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(40, 16, generator=generator)
    targets = torch.randint(0, 40, (50,), generator=generator)
    results = []
    for chunk_rows in (7, 50):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses, normalisers = cross_entropy_rows(h, w, targets, chunk_rows=chunk_rows)
        (losses.sum() + 0.3 * normalisers.square().sum()).backward()
        results.append((losses.detach(), h.grad, w.grad))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = h @ w.T
    plain = F.cross_entropy(logits, targets, reduction="none")
    (plain.sum() + 0.3 * logits.logsumexp(-1).square().sum()).backward()
    for ours in results:
        for a, b in zip(ours, (plain.detach(), h.grad, w.grad), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def batch():
    texts, layouts = documents(3, 6)
    ids = torch.cat(texts)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    start = 0
    for layout in layouts:
        mask[start + layout.grid_index[:, ::2]] = True
        start += layout.length
    return ids, mask, layouts


def test_the_loss_is_over_the_codebook_at_masked_visual_tokens():
    model = tiny_model()
    ids, mask, layouts = batch()
    hidden = model(apply_mask(ids, mask, VOCABULARY), layouts)
    result = masked_visual_loss(hidden, model.lm_head.weight, ids, mask, layouts, VOCABULARY)
    logits = hidden @ model.lm_head.weight.T
    expected = [
        F.cross_entropy(logits[i, VOCABULARY.visual_start :], ids[i] - VOCABULARY.visual_start)
        for i in mask.nonzero().squeeze(-1).tolist()
        if ids[i] >= VOCABULARY.visual_start
    ]
    torch.testing.assert_close(result.token_losses, torch.stack(expected), atol=1e-4, rtol=0)
    sums, counts = result.per_frame(3)
    assert float(sums.sum()) == pytest.approx(float(result.token_losses.detach().sum()), rel=1e-5)
    assert len(set(counts.tolist())) == 1
    assert float(result.total(0.1).detach()) > float(result.total().detach())


def test_a_batch_without_masked_tokens_is_an_error():
    model = tiny_model()
    ids, mask, layouts = batch()
    with pytest.raises(ValueError, match="no visual token"):
        masked_visual_loss(
            torch.zeros(len(ids), 64), model.lm_head.weight, ids, torch.zeros_like(mask), layouts, VOCABULARY
        )


def test_text_loss_predicts_the_next_prompt_token():
    model = tiny_model()
    ids, _, layouts = batch()
    hidden = model(ids, layouts)
    losses = text_loss(hidden, model.lm_head.weight, ids, layouts, VOCABULARY)
    assert len(losses) == (3 + 1) + (6 + 1)  # every text token and the turn end, of both documents
    logits = hidden @ model.lm_head.weight[: VOCABULARY.visual_start].T
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0], ids[1]), atol=1e-5, rtol=0)
    losses.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
