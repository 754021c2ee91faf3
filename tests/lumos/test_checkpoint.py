import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.checkpoint import FORMAT_VERSION, ModelInfo, load_checkpoint, load_weights, read_config, save_checkpoint
from lumos.config import SamplingConfig, TokenizerInfo, to_release_config
from lumos.decoder import Decoder
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary

from . import golden
from .models import VOCABULARY, documents, tiny_config, tiny_model

INFO = ModelInfo(
    prompt_template="lumos1",
    shapes=((3, 2, 4), (1, 4, 4)),
    fps=12.0,
    tokenizer=TokenizerInfo("fsq", 32, (4, 8, 8), "sha256:a"),
    text_tokenizer_hash="sha256:b",
    sampling=SamplingConfig(num_steps=12, guidance_scale=2.0),
    dataset_digest="c",
    train_config={"steps": 60, "data": {"split": "train"}},
)


def change_section(folder, change):
    """Rewrite the section lumos of a folder's config.json."""
    raw = json.loads((folder / "config.json").read_text())
    change(raw["lumos"])
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_save_then_load_is_identical(tmp_path, max_shard_bytes):
    model = tiny_model(rope="3d")
    save_checkpoint(tmp_path / "m", model, VOCABULARY, info=INFO, max_shard_bytes=max_shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)
    loaded = load_checkpoint(tmp_path / "m")
    assert (loaded.config, loaded.vocabulary, loaded.info) == (model.config, VOCABULARY, INFO)
    ids, layouts = documents(5)
    with torch.no_grad():
        assert torch.equal(model(ids[0], layouts), loaded.model(ids[0], layouts))


def test_golden_save_then_load_is_identical(tmp_path):
    stem = golden.stems("_forward")[0]
    model = golden.reference_model(golden.model_name(stem))
    save_checkpoint(tmp_path / "m", model, Vocabulary.lumos1())
    loaded = load_checkpoint(tmp_path / "m").model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o777 == 0o644, "others may read it"


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
    assert loaded.info == ModelInfo(prompt_template="lumos1")
    assert (loaded.info.sampling.num_steps, loaded.info.sampling.guidance_scale) == (50, 15.0)
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
    with pytest.raises(FileNotFoundError, match=r"nothing is not a checkpoint: there is no such folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        read_config(tmp_path)
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
    change_section(folder, lambda section: section.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(ValueError, match=r"has checkpoint format 3, .* install the lumos-ray that wrote it or a newer"):
        load_checkpoint(folder)
    with pytest.raises(ValueError, match="vocabulary"):
        save_checkpoint(tmp_path / "n", tiny_model(), Vocabulary.lumos1())


def test_the_text_tokenizer_is_kept_beside_the_weights(tmp_path):
    text = TextTokenizer.load()
    save_checkpoint(tmp_path / "m", tiny_model(), VOCABULARY, text_tokenizer=EMBEDDED_FILE.read_text(encoding="utf-8"))
    assert TextTokenizer.load(tmp_path / "m" / "text_tokenizer.json").hash == text.hash


def test_folders_of_older_programs_are_read(tmp_path):
    """Format 1 had the info as an untyped dict, which held less, or nothing."""
    extra = {
        "prompt_template": "caption",
        "fps": 12,
        "shapes": [[3, 2, 4]],
        "tokenizer": {"kind": "fsq", "codebook_size": 32, "compression": [4, 8, 8], "weights_hash": "sha256:a"},
        "dataset_digest": "c",
        "train_config": {"steps": 60},
        "note": "of my own",
    }
    folder = tmp_path / "m"
    for content, info in (
        (
            extra,
            ModelInfo(
                shapes=((3, 2, 4),),
                fps=12.0,
                tokenizer=INFO.tokenizer,
                dataset_digest="c",
                train_config={"steps": 60},
                unknown={"note": "of my own"},
            ),
        ),
        ({"fps": 12.0}, ModelInfo(fps=12.0)),
        ({}, ModelInfo(prompt_template="lumos1")),
    ):
        save_checkpoint(folder, tiny_model(), VOCABULARY, info=INFO)
        change_section(folder, lambda section: section.update(format_version=1))
        change_section(folder, lambda section, content=content: section.update(extra=content) or section.pop("info"))
        assert read_config(folder)[2] == info
    change_section(folder, lambda section: section.pop("extra"))
    assert read_config(folder)[2] == ModelInfo(prompt_template="lumos1")


def test_keys_of_other_programs_are_kept(tmp_path):
    folder = tmp_path / "m"
    save_checkpoint(folder, tiny_model(), VOCABULARY, info=INFO)
    change_section(folder, lambda section: section["info"].update(authors=["a", "b"]))
    change_section(folder, lambda section: section["info"]["sampling"].update(guidance_interval=[0.2, 0.8]))
    info = read_config(folder)[2]
    assert replace(info, unknown={}) == INFO
    assert info.unknown == {"authors": ["a", "b"], "sampling": {"guidance_interval": [0.2, 0.8]}}
    save_checkpoint(folder, tiny_model(), VOCABULARY, info=info)
    written = json.loads((folder / "config.json").read_text())["lumos"]["info"]
    assert written["authors"] == ["a", "b"]
    assert written["sampling"]["guidance_interval"] == [0.2, 0.8]
    assert written["sampling"]["num_steps"] == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": "fast"}, "info.fps is 'fast', expected 'float'"),
        ({"fps": -1.0}, "info: fps must be positive, got -1.0"),
        ({"fps": True}, "info.fps is True"),
        ({"shapes": [[3, 2]]}, r"info.shapes is \[3, 2\], expected tuple\[int, int, int\]"),
        ({"shapes": [[3, 0, 4]]}, r"shapes must be positive \(t, h, w\)"),
        ({"prompt_template": "haiku"}, "info.prompt_template is 'haiku', expected one of caption, lumos1"),
        ({"sampling": {"num_steps": 0}}, "info.sampling: num_steps must be at least 1, got 0"),
        ({"sampling": {"num_steps": 2.5}}, "info.sampling.num_steps is 2.5, expected 'int'"),
        ({"tokenizer": {"kind": "fsq"}}, "info.tokenizer lacks codebook_size, compression, weights_hash"),
        ({"tokenizer": "fsq"}, "info.tokenizer is 'fsq', expected an object"),
    ],
)
def test_an_info_that_makes_no_sense_is_named(tmp_path, change, message):
    save_checkpoint(tmp_path / "m", tiny_model(), VOCABULARY, info=INFO)
    change_section(tmp_path / "m", lambda section: section["info"].update(change))
    with pytest.raises(ValueError, match=f"config.json: lumos: .*{message}"):
        read_config(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[]", "is no JSON object"),
        ("config.json", b"\xff", r"is not valid JSON \('utf-8' codec"),
        ("model.safetensors.index.json", b"{", "is damaged"),
        ("model.safetensors.index.json", b"[]", "is damaged"),
        ("model.safetensors.index.json", b"{}", r"is damaged \(KeyError\('weight_map'\)\): copy it again"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, name, content, message):
    save_checkpoint(tmp_path / "m", tiny_model(), VOCABULARY)
    (tmp_path / "m" / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("section", [[], "x", {"format_version": "2"}, {"format_version": 1, "rope": "m", "extra": 1}])
def test_a_section_that_is_something_else_is_named(tmp_path, section):
    save_checkpoint(tmp_path / "m", tiny_model(), VOCABULARY)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"lumos": section}))
    with pytest.raises(ValueError, match=r"config.json: lumos: "):
        read_config(tmp_path / "m")


def test_a_section_that_lacks_a_key_is_named(tmp_path):
    save_checkpoint(tmp_path / "m", tiny_model(), VOCABULARY)
    change_section(tmp_path / "m", lambda section: section.pop("vocabulary"))
    with pytest.raises(ValueError, match="the section lumos lacks 'vocabulary'"):
        read_config(tmp_path / "m")
