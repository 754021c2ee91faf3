import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.checkpoint import ModelInfo, save_checkpoint
from lumos.config import TokenizerInfo
from lumos.decoder import Decoder
from lumos.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.streams import torch_stream
from pipelines.training import initialize
from pipelines.training.initialize import FirstWeights, check_init_from

from .foreign import TEXT_ROWS, VOCABULARY, small_model, write_chameleon, write_llama, write_release
from .runs import run_ranks, tiny_config

LUMOS1 = Vocabulary.lumos1()


def first_weights(folder, model, vocabulary, init_from=None):
    """All first weights of a run, by key."""
    weights = FirstWeights(tiny_config(folder, folder, init_from=init_from and str(init_from)), model, vocabulary)
    state: dict[str, torch.Tensor] = {}
    for weight, key, rows in Decoder(model).weight_parts():
        part = torch.full_like(weight, torch.nan).flatten()
        for start, values in weights.pieces(key, weight.shape, rows):
            part[start : start + len(values)] = values
        parts = [state[key]] if key in state else []
        state[key] = torch.cat([*parts, part.view(weight.shape)])
    return state


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key].float())] == []


@pytest.mark.parametrize("piece", [160, 64 * 7 * 16, 1 << 24])
def test_weights_drawn_in_pieces_are_those_drawn_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(initialize, "PIECE", piece)
    model = small_model()
    whole = Decoder(model)
    whole.init_weights(torch_stream(0, "init"))
    assert_equal(first_weights(tmp_path, model, VOCABULARY), whole.state_dict())


def test_a_stage_begins_with_the_weights_of_the_one_before(tmp_path):
    model = Decoder(small_model())
    model.init_weights(torch.Generator().manual_seed(5))
    output = tmp_path / "stage-1"
    save_checkpoint(output / "export", model, VOCABULARY, max_shard_bytes=20_000)
    larger = replace(model.config, max_seq_len=2 * model.config.max_seq_len)  # as a stage at a larger size has
    for name in (output, output / "export"):
        check_init_from(str(name), larger, VOCABULARY)
        assert_equal(first_weights(tmp_path, larger, VOCABULARY, name), model.state_dict())


def test_a_released_lumos1_is_taken_whole(tmp_path):
    state = write_release(tmp_path / "release")
    model = small_model(LUMOS1)
    check_init_from(str(tmp_path / "release"), model, LUMOS1)
    assert_equal(first_weights(tmp_path, model, LUMOS1, tmp_path / "release"), state)


def test_that_codes_of_another_tokenizer_are_gone_on_from_is_warned_of(tmp_path, caplog):
    cosmos, footage = (TokenizerInfo(kind, 64_000, (4, 8, 8), f"sha256:{kind}") for kind in ("cosmos", "fsq-footage"))
    model = Decoder(small_model())
    model.init_weights(torch.Generator().manual_seed(5))
    save_checkpoint(tmp_path / "ours", model, VOCABULARY, info=ModelInfo(tokenizer=footage))
    write_release(tmp_path / "release")
    for name, config, vocabulary, same, other in (
        ("ours", small_model(), VOCABULARY, footage, replace(footage, weights_hash="sha256:other")),
        ("release", small_model(LUMOS1), LUMOS1, cosmos, footage),
    ):
        caplog.clear()
        check_init_from(str(tmp_path / name), config, vocabulary, same)
        assert caplog.text == ""
        check_init_from(str(tmp_path / name), config, vocabulary, other)
        assert f"codes of the tokenizer {same.kind}" in caplog.text
        assert f"this run's are of {other.kind} ({other.weights_hash}): the same codes mean" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_lends_its_text_rows_and_blocks(tmp_path, tied):
    state = write_llama(tmp_path / "llama", tied=tied)
    model = small_model()
    check_init_from(str(tmp_path / "llama"), model, VOCABULARY)
    ours = first_weights(tmp_path, model, VOCABULARY, tmp_path / "llama")
    for key, weight in ours.items():
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            words = state.get(key, state["model.embed_tokens.weight"])[:TEXT_ROWS]
            assert torch.equal(weight[:TEXT_ROWS], words), key
            assert 0.015 < weight[TEXT_ROWS:].std() < 0.025, key  # drawn, as from scratch
        elif "_norm." in key:
            assert torch.equal(weight, torch.full_like(weight, float(key.endswith("weight")))), key
        else:
            assert torch.equal(weight, state[key]), key
    assert not torch.equal(ours["lm_head.weight"][TEXT_ROWS:], ours["model.embed_tokens.weight"][TEXT_ROWS:])


def test_a_chameleon_lends_its_norms_of_heads_too(tmp_path):
    state = write_chameleon(tmp_path / "chameleon")
    model = small_model()
    check_init_from(str(tmp_path / "chameleon"), model, VOCABULARY)
    ours = first_weights(tmp_path, model, VOCABULARY, tmp_path / "chameleon")
    for key in (key for key in ours if "_norm." in key):
        assert torch.equal(ours[key], state[key][:1]), key
    assert torch.equal(ours["lm_head.weight"][:TEXT_ROWS], state["lm_head.weight"])


def _change(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_what_does_not_fit_is_named_before_anything_is_read(tmp_path):
    folder = tmp_path / "llama"
    write_llama(folder)
    model = small_model()

    def refused(message, model=model, vocabulary=VOCABULARY, name=folder):
        with pytest.raises(UserError, match=message):
            check_init_from(str(name), model, vocabulary)

    refused(r"another shape: it has num_layers = 2; this run has num_layers = 3", model=small_model(num_layers=3))
    refused("rope_theta = 10000.0; this run has rope_theta = 500000.0", model=small_model(rope_theta=500000.0))
    refused("has 52 words, the run's text tokenizer 60", vocabulary=Vocabulary.compact(60, 16))
    refused("set data.vocabulary to compact and data.text_tokenizer", vocabulary=LUMOS1)
    _change(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    refused(r"model.layers.1.mlp.up_proj.weight is missing\. Set model")
    _change(folder, lambda state: state.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 60)}))
    refused(r"up_proj.weight has shape \[96, 60\], the model \[96, 64\]")
    _change(folder, lambda state: state.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(96, 64)}))
    _change(folder, lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}))
    refused("model.layers.2.mlp.up_proj.weight is not in the model")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    refused(r"model.safetensors is damaged \(it has \d+ bytes of \d+\): copy it again")
    (folder / "model.safetensors").unlink()
    refused("is missing: the checkpoint is incomplete")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(r"index.json is damaged \(it has no weight_map\): copy it again")
    refused("is not a checkpoint: it has no config.json", name=tmp_path / "none")
    (tmp_path / "running" / "checkpoints").mkdir(parents=True)
    refused("has exported no model yet: .* `lumos export`", name=tmp_path / "running")


def test_a_chameleon_whose_heads_differ_is_refused(tmp_path):
    write_chameleon(tmp_path / "chameleon")
    key = "model.layers.0.self_attn.q_norm.weight"
    _change(tmp_path / "chameleon", lambda state: state[key].data[1].add_(1.0))
    with pytest.raises(UserError, match=f"{key} of .* differs between heads"):
        first_weights(tmp_path, small_model(), VOCABULARY, tmp_path / "chameleon")


@pytest.mark.slow
def test_others_checkpoints_train_and_come_back_bit_for_bit(tmp_path):
    """Two processes, ZeRO-1 and a ZeRO-3 that partitions every tensor; what is asserted is in initialize_steps.py."""
    write_release(tmp_path / "release", num_layers=1, hidden_size=32, intermediate_size=64)
    write_llama(tmp_path / "llama")
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    run_ranks("initialize_steps", tmp_path)
