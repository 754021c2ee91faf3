import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lumos.attention import attend, attention_mask
from lumos.decoder import RMSNorm
from lumos.kernels import KERNELS, by_rows

from .models import VOCABULARY, documents, tiny_model


def random_qkv(layouts, dtype=torch.float32):
    tokens = sum(layout.length for layout in layouts)
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2)
    return [torch.randn(tokens, h, 32, generator=generator).to(dtype).requires_grad_() for h in heads]


@pytest.mark.parametrize("backend", ["sdpa", "fused_cpu"])
def test_backends_equal_the_dense_mask_forward_and_backward(backend):
    _, layouts = documents(5, 5, 9, 5)
    results = {}
    for name in (backend, "dense"):
        inputs = random_qkv(layouts)
        out = attend(*inputs, layouts, backend=name)
        out.square().sum().backward()
        results[name] = [out.detach(), *(x.grad for x in inputs)]
    for ours, reference in zip(results[backend], results["dense"], strict=True):
        torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-5)


def test_bfloat16_gradients_follow_float32():
    _, layouts = documents(5, 9)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = random_qkv(layouts, dtype)
        attend(*inputs, layouts, backend="fused_cpu").float().square().sum().backward()
        grads[dtype] = [x.grad.float() for x in inputs]
    for ours, reference in zip(grads[torch.bfloat16], grads[torch.float32], strict=True):
        assert float((ours - reference).norm() / reference.norm()) < 0.02


def test_the_mask_is_causal_between_frames_and_full_within():
    _, (layout,) = documents(4)
    mask = attention_mask(layout)
    for frame in layout.frames:
        inside = slice(frame.start, frame.stop)
        assert mask[inside, : frame.stop].all()
        assert not mask[inside, frame.stop :].any()
    tail = layout.length - 1
    assert mask[tail].all()
    assert not mask[tail - 1, tail]
    assert torch.equal(mask[: layout.frames[0].start, : layout.frames[0].start].triu(1).any(), torch.tensor(False))


def test_changing_a_later_frame_leaves_earlier_hidden_states_bitwise_equal():
    model = tiny_model()
    (ids,), (layout,) = documents(6)
    changed = ids.clone()
    last = layout.frames[-1]
    changed[last.start : last.stop] = VOCABULARY.mask
    with torch.no_grad():
        before, after = model(ids, [layout]), model(changed, [layout])
    assert torch.equal(before[: last.start], after[: last.start])
    assert not torch.equal(before[last.start :], after[last.start :])


def test_packed_documents_do_not_see_each_other():
    model = tiny_model()
    texts, layouts = documents(3, 8, 3)
    with torch.no_grad():
        packed = model(torch.cat(texts), layouts).split([len(t) for t in texts])
        for together, ids, layout in zip(packed, texts, layouts, strict=True):
            torch.testing.assert_close(together, model(ids, [layout]), atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_gradient():
    texts, layouts = documents(3, 8)
    grads = []
    for recompute in ("none", "selective", "full"):
        model = tiny_model()
        model.recompute = recompute
        model(torch.cat(texts), layouts).sum().backward()
        grads.append([p.grad for name, p in model.named_parameters() if "lm_head" not in name])
    for kept, *recomputed in zip(*grads, strict=True):
        assert all(torch.equal(kept, other) for other in recomputed)


@pytest.mark.parametrize("backend", ["fused_flash", "fused_cudnn"])
def test_cuda_kernels_are_called_as_they_are_declared(backend):
    """Arguments and shapes alone, on tensors without values: the kernels themselves need a GPU."""
    kernel = KERNELS[backend]
    with FakeTensorMode():
        q, k = (torch.empty(1, heads, n, 64, device="cuda", dtype=torch.bfloat16) for heads, n in ((4, 20), (2, 50)))
        out, state = kernel.forward(q, k, k, None, False)
        assert out.shape == q.shape
        gradients = kernel.backward(torch.empty_like(out), q, k, k, out, state, None, False)
        assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]
    with pytest.raises(ValueError, match="cut the tail"):
        KERNELS["fused_flash"].forward(q, k, k, q, False)


def test_rows_worked_on_in_parts_are_as_all_at_once():
    """To the bit, of views too, and with gradients all at once."""
    x, y = torch.randn(300, 2, 8)[:, :1], torch.randn(300, 4)
    called = []

    def function(x, y):
        called.append(len(x))
        return torch.cat([x[..., :4] * y[:, None], x[..., 4:].exp()], -1)

    whole = by_rows(function, x, y)
    assert called == [300], "with gradients, whatever the length"
    with torch.inference_mode():
        assert torch.equal(by_rows(function, x, y), whole)
    assert called == [300, 128, 128, 44]


def test_rows_worked_on_in_parts_are_of_the_type_that_they_are_of_all_at_once():
    """Under autocast a float32 weight makes float32 of bfloat16: so a validation sees what a training step does."""
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(300, 8).bfloat16()
    with torch.no_grad():
        assert torch.equal(norm(x), norm._norm(x))
        assert norm(x).dtype == norm(x[:10]).dtype == torch.float32
