import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from lumos.batch import PackedBatch, pack
from lumos.cross_entropy import cross_entropy
from lumos.decoder import Decoder
from lumos.losses import LossModule, masked_visual_loss, text_loss
from lumos.masking import apply_mask

from .models import VOCABULARY, documents, tiny_config, tiny_model

Z = 0.3  # weight of the z-loss


def rows_and_weight(dtype=torch.float32, rows=50, classes=40):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (rows, classes))
    return hidden, weight, torch.randint(0, classes, (rows,), generator=generator)


def dense(hidden, weight, targets):
    logits = hidden @ weight.T
    losses, normalisers = F.cross_entropy(logits, targets, reduction="none"), logits.logsumexp(-1)
    return losses.sum() + Z * normalisers.square().sum(), losses, normalisers


def gradients_of(function, hidden, weight, targets, **options):
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, losses, normalisers = function(h, w, targets, **options)
    (0.7 * total).backward()
    return total.detach(), losses.detach(), normalisers.detach(), h.grad, w.grad


def ours(hidden, weight, targets, **options):
    result = cross_entropy(hidden, weight, targets, z_loss_weight=Z, **options)
    return result.total, result.losses, result.normalisers


@pytest.mark.parametrize("block_rows", [7, 50, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_and_gradients_equal_the_dense_form(dtype, tolerance, block_rows):
    inputs = rows_and_weight(dtype)
    expected = gradients_of(dense, *inputs)
    for found, reference in zip(gradients_of(ours, *inputs, block_rows=block_rows), expected, strict=True):
        torch.testing.assert_close(found, reference, atol=tolerance, rtol=tolerance)


def test_under_autocast_products_are_bfloat16_and_what_comes_of_them_is_float32():
    hidden, weight, targets = rows_and_weight(rows=200, classes=300)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients_of(ours, hidden, weight, targets, block_rows=64)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()  # of which all the rest is taken
    torch.testing.assert_close(found[1], F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found[2], logits.logsumexp(-1), atol=1e-5, rtol=1e-6)
    exact = gradients_of(dense, hidden, weight, targets)
    for ours_, reference in zip(found[3:], exact[3:], strict=True):
        assert ours_.dtype == torch.float32
        assert float((ours_ - reference).norm() / reference.norm()) < 0.01  # bfloat16 has 8 bits


def test_probabilities_of_the_backward_pass_sum_to_one():
    """The gradient of a row's logits sums to zero, if it is taken of the very logits that the forward pass gave."""
    hidden, _, targets = rows_and_weight(rows=64)
    weight = torch.ones(4096, 16)  # but for one channel equal rows: of the others' gradients only that sum is left
    weight[:, 0] += torch.linspace(-3, 3, 4096)
    hidden = (4 * hidden).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total = cross_entropy(hidden, weight, targets).total
    total.backward()  # outside of autocast, as backward passes are
    assert float(hidden.grad[:, 1:].abs().max()) < 2**-8  # a rounding to bfloat16; it was 0.11 of other logits


def test_without_gradients_only_values_are_computed():
    inputs = rows_and_weight()
    with torch.no_grad():
        result = cross_entropy(*(x.requires_grad_() if x.is_floating_point() else x for x in inputs))
    assert not result.total.requires_grad
    torch.testing.assert_close(result.total, dense(*inputs)[1].sum().detach(), atol=1e-4, rtol=1e-6)


def test_a_second_backward_pass_is_an_error():
    hidden, weight, targets = rows_and_weight()
    total = cross_entropy(hidden.requires_grad_(), weight, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken already"):
        total.backward()


def batch(*text_lengths):
    texts, layouts = documents(*text_lengths or (3, 6))
    ids = torch.cat(texts)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    start = 0
    for layout in layouts:
        mask[start + layout.grid_index[:, ::2]] = True
        start += layout.length
    return PackedBatch(ids, mask, tuple(layouts))


def test_the_loss_is_over_the_codebook_at_masked_visual_tokens():
    model = tiny_model()
    packed = batch()
    ids, mask = packed.ids, packed.masked_positions
    hidden = model(apply_mask(ids, mask, VOCABULARY), packed.layouts)
    result = masked_visual_loss(hidden, model.lm_head, packed, VOCABULARY)
    logits = hidden @ model.lm_head.weight.T
    expected = [
        F.cross_entropy(logits[i, VOCABULARY.visual_start :], ids[i] - VOCABULARY.visual_start)
        for i in mask.nonzero().squeeze(-1).tolist()
        if ids[i] >= VOCABULARY.visual_start
    ]
    torch.testing.assert_close(result.token_losses, torch.stack(expected).detach(), atol=1e-4, rtol=0)
    sums, counts = result.per_frame(3)
    assert float(sums.sum()) == pytest.approx(float(result.total.detach()), rel=1e-5)
    assert len(set(counts.tolist())) == 1
    with_z = masked_visual_loss(hidden, model.lm_head, packed, VOCABULARY, z_loss_weight=0.1)
    expected_z = result.total + 0.1 * result.normalisers.square().sum()
    torch.testing.assert_close(with_z.total, expected_z, atol=0, rtol=1e-6)


def test_a_batch_without_masked_tokens_is_an_error():
    model = tiny_model()
    packed = batch()
    nothing = PackedBatch(packed.ids, torch.zeros_like(packed.masked_positions), packed.layouts)
    with pytest.raises(ValueError, match="no visual token"):
        masked_visual_loss(torch.zeros(len(packed.ids), 64), model.lm_head, nothing, VOCABULARY)


def test_text_loss_predicts_the_next_prompt_token():
    model = tiny_model()
    packed = batch()
    hidden = model(packed.ids, packed.layouts)
    result = text_loss(hidden, model.lm_head, packed.ids, packed.layouts, VOCABULARY)
    assert len(result.losses) == (3 + 1) + (6 + 1)  # every text token and the turn end, of both documents
    logits = hidden @ model.lm_head.weight[: VOCABULARY.visual_start].T
    torch.testing.assert_close(result.losses[0], F.cross_entropy(logits[0], packed.ids[1]).detach(), atol=1e-5, rtol=0)
    result.total.backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_packing_changes_no_loss_and_no_gradient():
    whole, results = batch(3, 6), []
    packed = pack(whole.ids, whole.masked_positions, whole.layouts, VOCABULARY)
    assert len(packed.ids) == len(whole.ids) - 2 * 2  # the tail of each document
    for each in (whole, packed):
        model = tiny_model()
        total, sums, counts = LossModule(model, VOCABULARY)(each, 3)
        total.backward()
        results.append([total.detach(), sums, counts, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_rows_of_the_head_without_gradient_keep_their_values():
    model = tiny_model()
    before = model.lm_head.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    LossModule(model, VOCABULARY)(batch(), 3)[0].backward()
    optimizer.step()
    after, start = model.lm_head.weight, VOCABULARY.visual_start
    assert torch.equal(after[:start], before[:start])
    assert not torch.isclose(after[start:], before[start:]).any()
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if "lm_head" in name]
    assert shapes == [(VOCABULARY.codebook_size, 64)]  # so no gradient and no moment is larger


def test_text_rows_are_trained_where_the_text_is():
    with pytest.raises(ValueError, match="train_text"):
        LossModule(tiny_model(), VOCABULARY, text_loss_weight=0.5)
    losses = []
    for weight in (0.0, 0.5):
        model = Decoder(tiny_config(), train_text=True)
        model.load_state_dict(tiny_model().state_dict())
        module = LossModule(model, VOCABULARY, text_loss_weight=weight)
        total, sums, _ = module(batch(), 3)
        total.backward()
        losses.append((float(total.detach()), float(sums.sum())))
        assert (model.lm_head.text.grad is not None) == (weight > 0)
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-6)
    packed = batch()
    text = text_loss(
        model(apply_mask(packed.ids, packed.masked_positions, VOCABULARY), packed.layouts),
        model.lm_head,
        packed.ids,
        packed.layouts,
        VOCABULARY,
    )
    assert losses[1][0] - losses[0][0] == pytest.approx(0.5 * float(text.total.detach()), rel=1e-4)
    assert losses[1][1] == losses[0][1]  # what is logged is the visual loss


def test_compiled_blocks_are_compiled_no_more_after_the_first_layouts(monkeypatch):
    """Graphs alone, by a backend that counts them and needs no compiler; by Inductor they are for GPUs."""
    # As users run it: Dynamo would compile the tests' checks of shapes too, and give up on some by what ran before.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    eager, compiled = tiny_model(num_layers=9), tiny_model(num_layers=9)  # more layers than Dynamo keeps graphs of one
    for model in (eager, compiled):
        model.recompute = "selective"
    compiled.compile_blocks(backend=count)
    seen = []
    for lengths in ((3, 6), (5,), (4, 4, 9), (7, 2)):
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            total, *_ = LossModule(model, VOCABULARY)(batch(*lengths), 3)
            total.backward()
            results.append([p.grad for p in model.parameters()])
        assert all(map(torch.equal, *results))
        seen.append(len(graphs))
    assert 0 < seen[0] <= seen[1] == seen[2] == seen[3], seen
