"""Small checkpoint folders as others write them: the Lumos-1 release, Llama, Chameleon."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lumos.config import ModelConfig, to_release_config
from lumos.decoder import Decoder
from lumos.vocabulary import Vocabulary

TEXT_ROWS = 48
VOCABULARY = Vocabulary.compact(TEXT_ROWS, 16)


def small_model(vocabulary: Vocabulary | int = VOCABULARY, **changes: Any) -> ModelConfig:
    """A model of a vocabulary, or a text model of so many words."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    }  # fmt: skip
    if isinstance(vocabulary, int):
        return ModelConfig(vocab_size=vocabulary, **(sizes | changes))
    rows = {"vocab_size": vocabulary.vocab_size, "visual_start": vocabulary.visual_start}
    return ModelConfig(**rows, **(sizes | changes))


def random_state(config: ModelConfig, seed: int = 1) -> dict[str, Tensor]:
    """Weights of no pattern, norms included, under the authors' key names."""
    generator = torch.Generator().manual_seed(seed)
    state = Decoder(config).state_dict()
    return {key: torch.randn(tensor.shape, generator=generator) for key, tensor in state.items()}


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, files: int = 1) -> Path:
    """A folder as the transformers library writes it, in one file or sharded with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        shard = {key: state[key] for key in sorted(state)[number::files]}
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_release(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A released Lumos-1 folder: bfloat16, two files, an unused VQ-VAE, no section of ours."""
    config = small_model(Vocabulary.lumos1(), **changes)
    state = {key: tensor.bfloat16() for key, tensor in random_state(config).items()}
    unused = {"model.vqmodel.encoder.conv_in.weight": torch.zeros(3)}
    raw = {"model_type": "chameleon", **to_release_config(config), "vq_config": {}}
    write_folder(folder, state | unused, raw, files=2)
    return state


def write_llama(folder: Path, *, tied: bool = False, **changes: Any) -> dict[str, Tensor]:
    """A Llama folder: no norms of queries and keys, a vocabulary of words only."""
    config = small_model(TEXT_ROWS + 4, **changes)  # a few rows more than its tokenizer has words
    state = {key: tensor for key, tensor in random_state(config, seed=2).items() if "_norm." not in key}
    raw = {"model_type": "llama", **to_release_config(config), "tie_word_embeddings": tied}
    for ours in ("qk_norm_eps", "model_parallel_size"):
        del raw[ours]
    if tied:
        del state["lm_head.weight"]
    write_folder(folder, state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}, raw)
    return state


def write_chameleon(folder: Path) -> dict[str, Tensor]:
    """A Chameleon folder as Hugging Face has it: norms of queries and keys repeated for every head."""
    config = small_model(TEXT_ROWS)
    state = random_state(config, seed=3)
    for key in [key for key in state if "q_norm" in key or "k_norm" in key]:
        state[key] = state[key].repeat(config.num_heads if "q_norm" in key else config.num_kv_heads, 1)
    write_folder(folder, state, {"model_type": "chameleon", **to_release_config(config)})
    return state


def full_weights(decoder: Decoder) -> dict[str, Tensor]:
    """Trained weights in float32, whatever the ZeRO stage, named as parameters. Every worker must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in decoder.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # the optimizer's own copy where there is one
        state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    return state
