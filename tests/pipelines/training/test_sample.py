"""Videos beside the training, drawn by a tiny model with random weights."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

import lumos
from lumos.checkpoint import ModelInfo, save_checkpoint
from lumos.config import SamplingConfig, TokenizerConfig, TokenizerInfo
from lumos.decoder import Decoder
from lumos.tokenizers import load_video_tokenizer
from lumos.tokenizers.text import EMBEDDED_FILE, TextTokenizer
from lumos.vocabulary import Vocabulary
from pipelines import sample_corpus
from pipelines.evaluation.compare.runs import SAMPLES_FILE
from pipelines.training.checkpoints import LoopState, StoredCheckpoint
from pipelines.training.config import CheckpointConfig, SamplesConfig
from pipelines.training.export import export
from pipelines.training.prepare import prepare
from pipelines.training.sample import (
    Sampler,
    choose_prompts,
    draw_samples,
    judge_samples,
    read_samples,
    write_samples,
)
from tests.pipelines.training.runs import TINY, tiny_config
from tests.pipelines.training.snapshots import write_snapshot
from tests.pipelines.training.test_sender import open_run

CAPTIONS = [spec.caption for spec in sample_corpus.held_out_specs(0)[:2]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_snapshot(folder, {(2, 4, 4): 13}, held_out={(2, 4, 4): 5})


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredCheckpoint:
    """A checkpoint that holds a model."""
    text = TextTokenizer.load(EMBEDDED_FILE)
    tokenizer = load_video_tokenizer(TokenizerConfig(kind="fsq"))
    vocabulary = Vocabulary.compact(text.vocab_size, tokenizer.codebook_size, grid_unit=16)
    model = Decoder(TINY.resolve(vocabulary.vocab_size))
    model.init_weights(torch.Generator().manual_seed(0))
    info = ModelInfo(
        fps=12.0,
        shapes=((2, 4, 4),),
        tokenizer=TokenizerInfo(tokenizer.kind, tokenizer.codebook_size, tokenizer.compression, tokenizer.weights_hash),
        text_tokenizer_hash=text.hash,
        sampling=SamplingConfig(num_steps=2),
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    text_file = EMBEDDED_FILE.read_text(encoding="utf-8")
    save_checkpoint(folder / "export", model, vocabulary, info=info, text_tokenizer=text_file)
    state = LoopState(step=10, num_workers=1, identity_hash="x", exported=True)
    return StoredCheckpoint(str(folder), state)


def test_a_model_folder_recommends_another_sampling_if_told_so(stored, tmp_path):
    export(stored, tmp_path / "as-configured")
    export(stored, tmp_path / "other", sampling=SamplingConfig(history_ratio=0.25))
    found = [lumos.load(tmp_path / name).info for name in ("as-configured", "other")]
    assert found[0].sampling == SamplingConfig(num_steps=2)
    assert found[1] == replace(found[0], sampling=SamplingConfig(history_ratio=0.25))


def prepared(dataset, folder, **samples):
    return prepare(tiny_config(dataset, folder, samples=SamplesConfig(every=10, num_cpus=0.5, **samples)))


def test_prompts_are_the_configs_or_captions_of_held_out_rows(dataset, tmp_path):
    assert choose_prompts(prepared(dataset, tmp_path, prompts=("one", "two"))) == ("one", "two")
    drawn = choose_prompts(prepared(dataset, tmp_path, count=3))
    assert len(drawn) == 3
    assert all(prompt.startswith("pattern ") for prompt in drawn)
    assert drawn == choose_prompts(prepare(replace(prepared(dataset, tmp_path, count=3).config, seed=7)))


def test_videos_are_drawn_judged_and_sent_once(dataset, stored, tmp_path):
    run = prepared(dataset, tmp_path / "out", prompts=tuple(CAPTIONS))
    found = draw_samples(run, stored, CAPTIONS)
    assert draw_samples(run, stored, CAPTIONS) == found, "seeds and weights decide"
    assert {f"judge_{name}" for name in ("color", "background", "shape", "direction", "size", "all", "strict")} <= set(
        found.metrics
    )
    output, _, sender = open_run(dataset, tmp_path / "out")
    folder = write_samples(output.samples, 10, found, time=1000.0)
    said, strips = read_samples(folder)
    assert said["prompts"] == CAPTIONS
    assert [strip.shape for strip in strips] == [(32, 5 * 32, 3)] * 2
    (output.samples / "step-00000020").mkdir()  # a kill left it unfinished
    sender.end("FINISHED")
    assert output.run.samples_sent == 10
    client = MlflowClient(output.store.uri)
    files = {item.path for item in client.list_artifacts(output.run.run_id, "samples/step-00000010")}
    assert files == {f"samples/step-00000010/{name}" for name in ("00.mp4", "01.mp4", SAMPLES_FILE)}
    images = [item.path for item in client.list_artifacts(output.run.run_id, "images")]
    assert sum("samples" in path and "00" in path and path.endswith(".png") for path in images) >= 1
    history = client.get_metric_history(output.run.run_id, "samples/judge_color")
    assert [(metric.step, metric.value) for metric in history] == [(10, found.metrics["judge_color"])]
    damaged = write_samples(output.samples, 30, found, time=1030.0)
    (damaged / "00.mp4").write_bytes(b"no video")
    again, _, sender = open_run(dataset, tmp_path / "out")
    sender.end("FINISHED")
    assert (again.run.samples_sent, again.run.finished) == (30, True), "damaged ones hold nothing up"
    assert {item.path for item in client.list_artifacts(again.run.run_id, "images")} == set(images)


def test_the_judge_is_asked_for_its_own_prompts_alone():
    assert judge_samples(["a sunset", CAPTIONS[0]], []) == {}


def test_a_task_draws_beside_and_one_that_is_slow_has_the_next_left_out(ray_cluster, dataset, stored, tmp_path):
    said: list[str] = []
    sampler = Sampler(prepared(dataset, tmp_path, prompts=("a", "b")), tmp_path / "samples", say=said.append)
    assert [step for step in range(1, 61) if sampler.due(step)] == [10, 20, 30, 40, 50, 60]
    held = threading.Event()

    def find(step: int) -> StoredCheckpoint:
        assert held.wait(60)
        return stored

    sampler.offer(10, find)
    sampler.offer(20, find)
    assert said == ["no samples of step 20: those of step 10 are still being drawn"]
    held.set()
    sampler.close(finished=True)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00000010"]
    assert json.loads((tmp_path / "samples" / "step-00000010" / SAMPLES_FILE).read_text())["files"] == [
        "00.mp4",
        "01.mp4",
    ]

    gone = replace(stored, uri=str(tmp_path / "gone"))
    sampler.offer(30, lambda _: gone)
    sampler.close(finished=True)
    sampler.offer(40, lambda _: None)
    sampler.close(finished=True)

    def silent(_: int) -> StoredCheckpoint:
        raise TimeoutError

    sampler.offer(50, silent)
    sampler.close(finished=True)
    assert said[1].startswith("no samples of step 30: ")
    assert said[2:] == [
        "no samples of step 40: there is no checkpoint of it",
        "no samples of step 50: TimeoutError: no message",
    ]

    run = prepared(dataset, tmp_path, prompts=("a",), num_gpus=1.0)
    sampler = Sampler(run, tmp_path / "samples", say=said.append)
    sampler.offer(60, lambda _: stored)
    sampler.close(finished=True)
    assert said[4:] == ["no samples of step 60: samples.num_cpus and samples.num_gpus need 1 GPU (there is 0)"]


def test_samples_are_drawn_where_there_are_checkpoints(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"samples.every = 15 is not a multiple of checkpoint.every = 10"):
        tiny_config(dataset, Path(tmp_path), checkpoint=CheckpointConfig(every=10), samples=SamplesConfig(every=15))
