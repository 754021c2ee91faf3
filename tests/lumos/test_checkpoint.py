import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.checkpoint import load_checkpoint, load_weights, read_config, save_checkpoint
from lumos.config import to_release_config
from lumos.decoder import Decoder
from lumos.vocabulary import Vocabulary

from . import golden
from .models import VOCABULARY, documents, tiny_config, tiny_model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_save_then_load_is_identical(tmp_path, max_shard_bytes):
    model = tiny_model(rope="3d")
    save_checkpoint(tmp_path / "m", model, VOCABULARY, extra={"fps": 12}, max_shard_bytes=max_shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    loaded = load_checkpoint(tmp_path / "m")
    assert (loaded.config, loaded.vocabulary, loaded.extra) == (model.config, VOCABULARY, {"fps": 12})
    ids, layouts = documents(5)
    with torch.no_grad():
        assert torch.equal(model(ids[0], layouts), loaded.model(ids[0], layouts))


def test_golden_save_then_load_is_identical(tmp_path):
    stem = golden.stems("_forward")[0]
    model = golden.reference_model(golden.model_name(stem))
    save_checkpoint(tmp_path / "m", model, Vocabulary.lumos1())
    loaded = load_checkpoint(tmp_path / "m").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_released_folder_loads_without_our_section(tmp_path):
    config = tiny_config(vocab_size=129536, hidden_size=32, num_layers=1)
    model = Decoder(config)
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    state["model.vqmodel.encoder.conv_in.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors")
    raw = {**to_release_config(config), "hidden_act": "silu", "vq_config": {"a": 1}, "attention_bias": False}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    loaded = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert loaded.vocabulary == Vocabulary.lumos1()
    assert torch.equal(loaded.model.lm_head.weight, state["lm_head.weight"])


def test_overwriting_keeps_one_complete_checkpoint(tmp_path):
    for seed in (1, 2):
        save_checkpoint(tmp_path / "m", tiny_model(seed), VOCABULARY)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert torch.equal(load_checkpoint(tmp_path / "m").model.lm_head.weight, tiny_model(2).lm_head.weight)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="other"):
        save_checkpoint(tmp_path / "other", tiny_model(), VOCABULARY)


def test_bad_checkpoints_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path / "nothing")
    folder = tmp_path / "m"
    save_checkpoint(folder, tiny_model(), VOCABULARY)
    with pytest.raises(ValueError, match=r"down_proj.weight has shape \[64, 96\], the model \[64, 80\]"):
        load_weights(Decoder(tiny_config(intermediate_size=80)), folder)
    with pytest.raises(ValueError, match="missing"):
        load_weights(Decoder(tiny_config(num_layers=3)), folder)
    state = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        load_checkpoint(folder)
    save_file(state, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["lumos"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="newer lumos"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="vocabulary"):
        save_checkpoint(tmp_path / "n", tiny_model(), Vocabulary.lumos1())
