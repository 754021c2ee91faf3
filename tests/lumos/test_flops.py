"""The arithmetic against torch's counter, which sees every product: the losses' and attention's custom functions call
plain operators within, in both passes, and the counter knows those but for one, of which it is told."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lumos.batch import pack
from lumos.config import MaskConfig, lumos_1b, lumos_3b
from lumos.decoder import Decoder
from lumos.flops import Workload, count_parameters, dense_flops, exact_flops, mean_mask_ratio
from lumos.losses import LossModule
from lumos.masking import mask_ratio, sample_masked_positions

from .models import VOCABULARY, documents, tiny_config

CONFIGS = {
    "grouped heads": {},
    "plain heads": {"num_kv_heads": 4, "num_layers": 3},
    "wide": {"hidden_size": 96, "intermediate_size": 160, "num_heads": 2, "num_kv_heads": 1, "head_dim": 64},
}


def _batch(shape):
    parts, layouts = documents(5, 5, 9, shape=shape)
    generator = torch.Generator().manual_seed(0)
    masked = torch.cat([sample_masked_positions(layout, MaskConfig(), generator) for layout in layouts])
    return pack(torch.cat(parts), masked, tuple(layouts), VOCABULARY)


def _addmm(_, left, right, *__, **___) -> int:
    return 2 * left[0] * left[1] * right[1]


def _counted(run) -> int:
    # The head's gradient is summed in place by an operator that the counter does not know.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_exact_flops_equal_the_counters(changes, recompute):
    config = tiny_config(**changes)
    model = Decoder(config)
    model.recompute = recompute
    batch = _batch((3, 2, 4))
    work = Workload.of(batch.layouts, visual_predictions=len(batch.loss_positions))
    flops = exact_flops(config, work, visual_classes=VOCABULARY.codebook_size, recompute=recompute)

    module = LossModule(model, VOCABULARY)
    with torch.no_grad():
        assert _counted(lambda: module(batch, 3)) == flops.forward.total
    assert _counted(lambda: module(batch, 3)[0].backward()) == flops.hardware


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_dense_flops_equal_the_counters_of_dense_attention_and_a_full_head(changes):
    config = tiny_config(**changes)
    model = Decoder(config)
    model.attention_backend = "dense"
    batch = _batch((3, 2, 4))
    flops = dense_flops(config, Workload.of(batch.layouts, visual_predictions=0))
    with torch.no_grad():
        assert _counted(lambda: model(batch.ids, batch.layouts) @ model.lm_head.weight.T) == flops.forward.total


def test_a_workload_is_that_of_its_documents_together():
    _, layouts = documents(5, 9)
    work = Workload.of(layouts, visual_predictions=7)
    assert Workload.of(layouts * 3, visual_predictions=21) == work.times(3)
    assert work.exact_pairs < work.dense_pairs


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
