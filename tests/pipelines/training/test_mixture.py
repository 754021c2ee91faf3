"""A run over images and videos by turns, with an average of its weights and a trial of ways to sample it, by ZeRO-3."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from lumos.checkpoint import read_config
from lumos.config import SamplingChoice, SamplingConfig, TokenizerConfig
from lumos.tokenizers import load_video_tokenizer
from pipelines.sample_corpus import held_out_specs
from pipelines.training.config import CheckpointConfig, DataConfig, EmaConfig, MixConfig, SamplingTrialConfig
from pipelines.training.export import export, locate
from pipelines.training.run import train
from tests.cluster import own_cluster
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot


def folders(root: Path) -> tuple[Path, Path]:
    """The models of the run."""
    return root / "mixture" / "export", root / "mixture" / "export-ema"


def recommended(models: Sequence[Path]) -> list[SamplingConfig]:
    return [read_config(model)[2].sampling for model in models]


@pytest.mark.slow
def test_a_mixture_of_images_and_videos_with_an_average_of_weights(tmp_path):
    """Shares of steps as asked for; the average of two steps' weights, both kept, is the one exported beside them.

    Both folders recommend what a trial at the end said, which the same command makes if it was not over.
    """
    tokenizer = load_video_tokenizer(TokenizerConfig(kind="fsq"))
    dataset = write_snapshot(
        tmp_path / "mixed",
        {(1, 4, 4): 13, (2, 4, 4): 21},
        held_out={(2, 4, 4): 10},
        tokenizer_hash=tokenizer.weights_hash,
        codebook_size=tokenizer.codebook_size,
        captions=[spec.caption for spec in held_out_specs(0)[:10]],
    )
    config = tiny_config(
        dataset,
        tmp_path / "mixture",
        data=DataConfig(dataset=str(dataset), mix=MixConfig(image=1.0, video=3.0)),
        ema=EmaConfig(decay=0.75, start=22),  # begins with the weights after step 23
        deepspeed="zero3",
        num_workers=2,
        steps=24,
        checkpoint=CheckpointConfig(every=1, keep=2),
        recommended_sampling=SamplingConfig(num_steps=2),
        sampling_choice=SamplingTrialConfig(candidates=(SamplingChoice(guidance_scale=1.0, num_steps=1),)),
    )
    with own_cluster(num_cpus=2):
        result = train(config)
        assert recommended(folders(tmp_path)) == [config.recommended_sampling] * 2
        answer = tmp_path / "mixture" / "sampling_choice.json"
        first = json.loads(answer.read_text())
        for folder in (answer, *folders(tmp_path)):  # what a kill in the trial leaves
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        assert train(config).run_id == result.run_id
    again = json.loads(answer.read_text())
    assert [way["values"] for way in again["ways"]] == [way["values"] for way in first["ways"]]
    assert recommended(folders(tmp_path)) == [config.recommended_sampling] * 2
    answer.write_text(json.dumps(again | {"chosen": 1}))  # what a model that has learnt more might have said
    train(config)  # without a cluster
    assert recommended(folders(tmp_path)) == [SamplingConfig(guidance_scale=1.0, num_steps=1)] * 2
    assert not ray.is_initialized()

    assert sorted(len(record.frame_losses) for record in result.records) == [1] * 6 + [2] * 18
    export(locate(f"{tmp_path / 'mixture'}@23"), tmp_path / "step-23", dtype="fp32")
    exported = (tmp_path / "step-23", *folders(tmp_path))
    before, last, average = (load_file(each / "model.safetensors") for each in exported)
    assert before.keys() == last.keys() == average.keys()
    for key, weight in average.items():
        torch.testing.assert_close(weight, 0.75 * before[key] + 0.25 * last[key], atol=1e-7, rtol=1e-6)
    trained = [key for key in last if not torch.equal(last[key], before[key])]
    assert trained
    assert not any(torch.equal(average[key], last[key]) for key in trained)
