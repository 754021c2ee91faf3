"""The arithmetic against torch's counter, which sees every product: the losses' and attention's custom functions call
plain operators within, in both passes, and the counter knows those."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lumos.batch import PackedBatch
from lumos.config import MaskConfig, lumos_1b, lumos_3b
from lumos.decoder import Decoder
from lumos.flops import Workload, count_parameters, dense_flops, exact_flops, mean_mask_ratio
from lumos.losses import masked_visual_loss, text_loss
from lumos.masking import loss_mask, mask_ratio, sample_masked_positions

from .models import VOCABULARY, documents, tiny_config

CONFIGS = {
    "grouped heads": {},
    "plain heads": {"num_kv_heads": 4, "num_layers": 3},
    "wide": {"hidden_size": 96, "intermediate_size": 160, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
}


def _batch(shape):
    parts, layouts = documents(5, 5, 9, shape=shape)
    ids = torch.cat(parts)
    generator = torch.Generator().manual_seed(0)
    masked = torch.cat([sample_masked_positions(layout, MaskConfig(), generator) for layout in layouts])
    return ids, masked, layouts


def _counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_exact_flops_equal_the_counters(changes, checkpointing):
    config = tiny_config(**changes)
    model = Decoder(config)
    model.recompute = checkpointing
    ids, masked, layouts = _batch((3, 2, 4))
    work = Workload.of(layouts, visual_predictions=int(loss_mask(ids, masked, VOCABULARY).sum()))
    flops = exact_flops(config, work, visual_classes=VOCABULARY.codebook_size, checkpointing=checkpointing)

    def forward():
        hidden = model(ids, layouts)
        return masked_visual_loss(hidden, model.lm_head, PackedBatch(ids, masked, tuple(layouts)), VOCABULARY).total

    with torch.no_grad():
        assert _counted(forward) == flops.forward.total
    assert _counted(lambda: forward().backward()) == flops.hardware


def test_the_text_loss_is_counted():
    config = tiny_config()
    model = Decoder(config)
    ids, _, layouts = _batch((2, 2, 4))
    predicted = []
    with torch.no_grad():
        counted = _counted(
            lambda: predicted.append(text_loss(model(ids, layouts), model.lm_head, ids, layouts, VOCABULARY))
        )
    work = Workload.of(layouts, visual_predictions=0, text_predictions=len(predicted[0].losses))
    flops = exact_flops(config, work, visual_classes=VOCABULARY.codebook_size, text_classes=VOCABULARY.visual_start)
    assert counted == flops.forward.total
    assert work.text_predictions == 5 + 5 + 9 + 3  # every text token and the turn end of each of three prompts


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_dense_flops_equal_the_counters_of_dense_attention_and_a_full_head(changes):
    config = tiny_config(**changes)
    model = Decoder(config)
    model.attention_backend = "dense"
    ids, _, layouts = _batch((3, 2, 4))
    flops = dense_flops(config, Workload.of(layouts, visual_predictions=0))
    with torch.no_grad():
        assert _counted(lambda: model(ids, layouts) @ model.lm_head.weight.T) == flops.forward.total
    assert flops.model == 3 * flops.forward.total  # gradients of input and weight: two products for one


def test_workloads_add_up():
    _, first = documents(5, 9)
    _, second = documents(3, shape=(1, 2, 4))
    apart = Workload.of(first, visual_predictions=7) + Workload.of(second, visual_predictions=2, text_predictions=1)
    assert apart == Workload.of([*first, *second], visual_predictions=9, text_predictions=1)
    assert Workload.of(first * 3, visual_predictions=21) == Workload.of(first, visual_predictions=7).scaled(3)
    assert apart.exact_pairs < apart.dense_pairs


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(model_parallel_size=2), lumos_1b(), lumos_3b()])
def test_parameters_by_part_are_all_parameters(config):
    visual = VOCABULARY.codebook_size if config.vocab_size < 1000 else 64000
    counts = count_parameters(config, visual_classes=visual)
    assert counts.total == config.num_parameters
    with torch.device("meta"):
        model = Decoder(config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    assert counts.norms == sum(size for name, size in sizes.items() if "norm" in name)
    assert counts.mlp == sum(size for name, size in sizes.items() if ".mlp." in name)
    assert counts.embedding == sizes["model.embed_tokens.weight"]


@pytest.mark.parametrize("low", [0.3, 0.7, 1.0])
def test_the_mean_mask_ratio_is_the_mean_over_time(low):
    times = (np.arange(20000) + 0.5) / 20000
    assert mean_mask_ratio(MaskConfig(min_ratio=low)) == pytest.approx(
        np.mean([mask_ratio(time, low) for time in times]), abs=1e-6
    )
