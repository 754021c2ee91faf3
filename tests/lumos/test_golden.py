"""Against the reference outputs of the authors' release: one test per file of LUMOS_GOLDEN_DIR.

The tolerances are those of the mission: positions, masks and patterns exact, logits 1e-4, losses 1e-5, gradients 1e-3.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lumos.attention import attention_mask
from lumos.batch import PackedBatch
from lumos.config import MaskConfig, ModelConfig, SamplingConfig
from lumos.guidance import GenerationRequest, GuidedBranches, history_mask_index
from lumos.layout import parse
from lumos.losses import masked_visual_loss
from lumos.masking import apply_mask, mask_from_scores, mask_ratio
from lumos.rope import position_ids, rotary_tables
from lumos.sampling import num_remasked, remask
from lumos.vocabulary import Vocabulary

from . import golden

VOCABULARY = Vocabulary.lumos1()
ANY_MODEL = ModelConfig(
    vocab_size=1, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64
)


def split_positions(positions: torch.Tensor, layout_length: int, on_grid: np.ndarray) -> np.ndarray:
    """Our three axes as the reference writes them: text, t, h, w, flag."""
    text = np.arange(layout_length)
    return np.stack([text, *positions.numpy().T, on_grid])


def grid_flags(layout) -> np.ndarray:
    flags = np.zeros(layout.length, dtype=np.int64)
    for frame in layout.frames:
        flags[frame.grid_start : frame.grid_start + frame.grid_size] = 1
    return flags


def test_the_reference_files_are_there():
    assert golden.stems("_forward")
    assert golden.stems("_train")
    assert golden.stems("_gen")
    assert golden.stems("_gen_i2v")


@pytest.mark.parametrize("stem", golden.stems("_forward"))
def test_golden_forward(stem):
    data, model = golden.load(stem), golden.reference_model(golden.model_name(stem))
    masks = golden.unpack_mask(data["mask_clean_bits"], data["mask_shape"])
    columns = torch.from_numpy(data["cols"]).long()
    for row, ids in enumerate(data["input_ids"]):
        layout = parse(VOCABULARY, ids)
        assert np.array_equal(attention_mask(layout).numpy(), masks[row])
        ours = split_positions(position_ids(layout, model.config), layout.length, grid_flags(layout))
        theirs = np.stack([data[key][row] for key in ("pos_text", "pos_t", "pos_h", "pos_w", "flag")])
        assert np.array_equal(ours, theirs)
        cos, sin = rotary_tables(position_ids(layout, model.config), model.config)
        np.testing.assert_allclose(torch.cat([cos, cos], -1).numpy(), data["cos"][row], atol=1e-6)
        np.testing.assert_allclose(torch.cat([sin, sin], -1).numpy(), data["sin"][row], atol=1e-6)
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids).long(), [layout])
            logits = hidden @ model.lm_head.weight[columns].T
        np.testing.assert_allclose(logits.numpy(), data["logits_clean"][row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("stem", golden.stems("_train"))
def test_golden_train(stem):
    data, model = golden.load(stem), golden.reference_model(golden.model_name(stem))
    lengths = data["lengths"].tolist()
    documents = [torch.from_numpy(ids[:n]).long() for ids, n in zip(data["input_ids"], lengths, strict=True)]
    layouts = [parse(VOCABULARY, document) for document in documents]
    masks = recorded_masks(data, layouts)
    for document, mask, reference in zip(documents, masks, data["masked_input_ids"], strict=True):
        assert np.array_equal(apply_mask(document, mask, VOCABULARY).numpy(), reference[: len(document)])
    check_training(model, data, documents, layouts, masks, suffix="clean")
    for row in range(len(documents)):
        one = slice(row, row + 1)
        check_training(model, data, documents[one], layouts[one], masks[one], suffix=f"s{row}")


def recorded_masks(data, layouts):
    """Tube masks from the reference's own random draws: one timestep per sample, then scores per sample."""
    torch.manual_seed(int(data["torch_seed"]))
    timesteps = torch.rand(len(layouts))
    np.testing.assert_allclose(timesteps.numpy(), data["timesteps"])
    masks = []
    for row, layout in enumerate(layouts):
        ratio = mask_ratio(float(timesteps[row]), MaskConfig().min_ratio)
        assert ratio == pytest.approx(float(data["mask_prob"][row]), abs=1e-6)
        tube = mask_from_scores(torch.rand(1, layout.grid_index.shape[1])[0], ratio)
        mask = torch.zeros(layout.length, dtype=torch.bool)
        mask[layout.grid_index] = tube
        assert np.array_equal(mask.numpy(), data["mask"][row][: layout.length])
        masks.append(mask)
    return masks


def check_training(model, data, documents, layouts, masks, *, suffix):
    ids, mask = torch.cat(documents), torch.cat(masks)
    model.zero_grad()
    hidden = model(apply_mask(ids, mask, VOCABULARY), layouts)
    result = masked_visual_loss(hidden, model.lm_head, PackedBatch(ids, mask, tuple(layouts)), VOCABULARY)
    loss = result.total / len(result.token_losses)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(data[f"closs_{suffix}"]), abs=1e-5)
    np.testing.assert_allclose(result.token_losses.numpy(), data[f"token_loss_{suffix}"], atol=1e-4, rtol=0)
    frames = {len(layout.frames) for layout in layouts}
    if len(frames) == 1:
        sums, counts = result.per_frame(frames.pop())
        np.testing.assert_allclose((sums / counts).numpy(), data[f"frame_loss_{suffix}"], atol=1e-5, rtol=0)
    gradients = {name.replace("visual", "weight"): p.grad for name, p in model.named_parameters()}
    norms = [float(gradients[name].norm()) for name in data["grad_names"].tolist()]
    np.testing.assert_allclose(norms, data[f"grad_norm_{suffix}"], rtol=1e-3)
    if suffix == "clean":
        check_gradient_pieces(gradients, data)


def check_gradient_pieces(gradients, data):
    first = "model.layers.0.self_attn."
    pieces = {
        "grad_q_proj0_8x8": gradients[first + "q_proj.weight"][:8, :8],
        "grad_q_norm0_weight": gradients[first + "q_norm.weight"],
        "grad_k_norm0_bias": gradients[first + "k_norm.bias"],
        "grad_embed_mask_row": gradients["model.embed_tokens.weight"][VOCABULARY.mask],
        "grad_norm_vec": gradients["model.norm.weight"],
    }
    for key, ours in pieces.items():
        scale = float(np.abs(data[key]).max())
        np.testing.assert_allclose(ours.numpy(), data[key], atol=1e-3 * scale, rtol=0, err_msg=key)


def edge_names() -> list[str]:
    path = golden.GOLDEN_DIR / "edge_positions_masks.npz"
    return golden.load(path.stem)["names"].tolist() if path.exists() else []


@pytest.mark.parametrize("name", edge_names())
def test_golden_edge_positions_masks(name):
    data = golden.load("edge_positions_masks")
    layout = parse(VOCABULARY, data[f"{name}/ids"])
    assert np.array_equal(attention_mask(layout).numpy(), data[f"{name}/mask"])
    flags = grid_flags(layout)
    ours = split_positions(position_ids(layout, ANY_MODEL), layout.length, flags)
    reference = data[f"{name}/pos"]
    assert np.array_equal(ours[[0, 4]], reference[[0, 4]])
    assert np.array_equal(ours[1:4, flags == 1], reference[1:4, flags == 1])


@pytest.mark.parametrize("key", golden.load("history_pattern"))
def test_golden_history_pattern(key):
    cells, ratio = key.removeprefix("L").split("_r")
    ours = history_mask_index(int(cells), float(ratio))
    assert np.array_equal(ours.numpy(), golden.load("history_pattern")[key])


@pytest.mark.parametrize("key", golden.load("mask_len_schedule"))
def test_golden_mask_len_schedule(key):
    slots, steps = map(int, key.removeprefix("n").split("_T"))
    unknown, ours = slots, []
    for step in range(steps):
        ours.append(num_remasked(slots, unknown, step, steps))
        unknown = ours[-1]
    assert np.array_equal(ours, golden.load("mask_len_schedule")[key])


@pytest.mark.parametrize("stem", golden.stems("_gen") + golden.stems("_gen_i2v"))
def test_golden_generation_by_teacher_forcing(stem):
    """The release's options: its own draws and frames are forced, logits and re-masking compared at every step."""
    data, model = golden.load(stem), golden.reference_model(golden.model_name(stem))
    request = reference_request(data, SamplingConfig(release_temperature=True, release_given_frames=True))
    with torch.inference_mode():
        branches = GuidedBranches(model, VOCABULARY, [request])
        temperature = request.config.temperature
        for f in range(len(data["current_tokens"])):
            assert branches.cache.lengths == [len(data[f"ctx_cond_f{f}"]), len(data[f"ctx_uncond_f{f}"])]
            check_positions(branches, data, f)
            for s in range(request.config.num_steps):
                temperature *= 1 - (s + 1) / request.config.num_steps
                assert temperature == pytest.approx(float(data["temperature"][f, s]), abs=1e-6)
                check_step(branches, data, f, s, temperature)
            final = forced_frame(data, f)
            if f + 1 < len(data["current_tokens"]):
                assert np.array_equal(branches.commit(final[None])[0].numpy(), data["committed_tokens"][f])


def reference_request(data, config):
    rows, cols = data["latent_hw"].tolist()
    given = int(data["given_frames"])
    start = int(data["uncond_start"]) + 3
    frame_length = rows * (cols + 1) + 4
    grid = [
        data["prompt0"][start + i * frame_length + 3 : start + (i + 1) * frame_length - 1].reshape(rows, cols + 1)
        for i in range(given)
    ]
    codes = np.stack(grid)[:, :, :cols] - VOCABULARY.visual_start if given else None
    text = data["prompt0"][1 : int(data["uncond_start"]) - 1].tolist()
    config = replace(
        config,
        num_steps=int(data["steps"]),
        guidance_scale=float(data["guidance"]),
        history_ratio=float(data["history_ratio"]),
    )
    return GenerationRequest(
        text_ids=text,
        shape=(int(data["latent_frames"]), rows, cols),
        fps=float(data["fps"]),
        seed=0,
        config=config,
        given=codes,
    )


def check_positions(branches, data, f):
    for row, branch in enumerate(("cond", "uncond")):
        past, length = branches.cache.lengths[row], branches.frame.length
        ours = branches.positions[row][past : past + length].numpy().T
        reference = data[f"pos_{branch}_f{f}"]
        flags = reference[4] == 1
        assert np.array_equal(ours[:, flags], reference[1:4, flags])
        assert np.array_equal(ours[0, ~flags], reference[0, ~flags])


def check_step(branches, data, f, s, temperature):
    frame = torch.from_numpy(data["current_tokens"][f, s]).long()[None]
    head, guidance = branches.model.lm_head.weight, branches.requests[0].config.guidance_scale
    small, columns = (torch.from_numpy(data[key]).long() for key in ("cols_small", "cols"))
    conditional, unconditional = (x[0] for x in branches.hidden(frame))
    for ours, key in ((conditional, "cond_logits"), (unconditional, "uncond_logits")):
        np.testing.assert_allclose((ours @ head[small].T).numpy(), data[key][f, s], atol=1e-4, rtol=0)
    guided = unconditional + guidance * (conditional - unconditional)
    np.testing.assert_allclose((guided @ head[columns].T).numpy(), data["cfg_logits"][f, s], atol=2e-3, rtol=0)
    slots = torch.ones(1, len(branches.slots), dtype=torch.bool)
    everything = branches.logits(
        branches.guided(frame, slots, slots, step=s, num_steps=branches.requests[0].config.num_steps)
    )
    visual = columns >= VOCABULARY.visual_start
    ours = everything[:, columns[visual] - VOCABULARY.visual_start]
    reference = data["cfg_logits"][f, s][:, visual.numpy()]
    np.testing.assert_allclose(ours.numpy(), reference, atol=2e-3, rtol=0)
    unknown = frame[0, branches.slots] == VOCABULARY.mask
    draw = torch.from_numpy(data["draw"][f, s]).long()
    draw = draw - VOCABULARY.visual_start if int(draw.max()) >= VOCABULARY.codebook_size else draw
    probabilities = everything.softmax(-1).gather(-1, draw[:, None]).squeeze(-1)[unknown]
    reference = torch.from_numpy(data["selected_probs"][f, s])[unknown]
    np.testing.assert_allclose(probabilities.numpy(), reference.numpy(), rtol=5e-3)
    if s + 1 < branches.requests[0].config.num_steps:
        count = num_remasked(len(unknown), int(unknown.sum()), s, branches.requests[0].config.num_steps)
        assert count == int(data["mask_len"][f, s])
        gumbel = torch.from_numpy(data["gumbel"][f, s])[unknown]
        masked = torch.zeros_like(unknown)
        masked[unknown] = remask(reference, gumbel, temperature, count)
        assert np.array_equal(masked.numpy(), data["remask"][f, s])


def forced_frame(data, f):
    """The finished frame f of the reference, cut from its final tokens (video start, duration, fps, frames, end)."""
    length = data["current_tokens"].shape[-1]
    start = 3 + (int(data["given_frames"]) + f) * length
    return torch.from_numpy(data["final_tokens"][start : start + length]).long()
