"""Ways of drawing videos against each other: the decision by values, the trial with a tiny model's own videos."""

import json
import logging
import time
from dataclasses import asdict, replace
from statistics import fmean

import pytest
from mlflow.tracking import MlflowClient

from lumos.config import SamplingChoice, SamplingConfig, TokenizerConfig
from lumos.tokenizers import load_video_tokenizer
from pipelines import sample_corpus
from pipelines.data.settings import OpenClipConfig
from pipelines.sample_corpus import render_clip
from pipelines.training.config import SamplesConfig, SamplingTrialConfig, ValidationConfig
from pipelines.training.output import Output
from pipelines.training.prepare import prepare
from pipelines.training.record import History
from pipelines.training.sample import draw_samples
from pipelines.training.sampling_choice import (
    Tried,
    choose,
    describe,
    held_out_prompts,
    judge_strictly,
    measure_of,
    recommend,
    try_ways,
)
from pipelines.training.sender import Sender
from tests.pipelines.data.small_models import write_open_clip
from tests.pipelines.training.runs import tiny_config
from tests.pipelines.training.snapshots import write_snapshot
from tests.pipelines.training.test_sample import stored as stored  # a checkpoint that holds a model

SPECS = sample_corpus.held_out_specs(0)[:10]
CONFIGURED = SamplingConfig(num_steps=2)
TRIAL = SamplingTrialConfig(candidates=(SamplingChoice(history_ratio=0.25), SamplingChoice(num_steps=1)), seed=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """With captions of the corpus, each in two held-out rows, and the codes' own tokenizer."""
    tokenizer = load_video_tokenizer(TokenizerConfig(kind="fsq"))
    return write_snapshot(
        tmp_path_factory.mktemp("data") / "dataset",
        {(2, 4, 4): 13},
        held_out={(2, 4, 4): 20},
        tokenizer_hash=tokenizer.weights_hash,
        codebook_size=tokenizer.codebook_size,
        captions=[spec.caption for spec in SPECS],
    )


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    """With captions that the judge does not read, of which there are four."""
    return write_snapshot(tmp_path_factory.mktemp("data") / "patterns", {(2, 4, 4): 13}, held_out={(2, 4, 4): 20})


def prepared(dataset, output, **changes):
    options = {"sampling_choice": TRIAL, "recommended_sampling": CONFIGURED, **changes}
    return prepare(tiny_config(dataset, output, **options))


def tried(*values, **sampling):
    return Tried(sampling=replace(CONFIGURED, **sampling), values=values, seconds=1.0)


def shares(right, of=32):
    """1 in the first ``right`` videos."""
    return [float(number < right) for number in range(of)]


def test_a_candidate_is_recommended_if_it_is_better_than_chance_would_have_it():
    configured = tried(*shares(10))
    assert choose([configured, tried(*shares(10))], 4) == 0, "the configured one wins ties"
    assert choose([configured, tried(*shares(12))], 4) == 0, "two prompts more of 32 may be luck"
    assert choose([configured, tried(*shares(17))], 4) == 1
    assert choose([configured, tried(*shares(5))], 4) == 0
    assert choose([configured, tried(*shares(17)), tried(*shares(20))], 4) == 2
    # The same means, but gained on 15 prompts and lost on 8.
    mixed = [1.0 - value for value in shares(8)[:8]] + [1.0] * 17 + [0.0] * 7
    assert fmean(mixed) == fmean(shares(17))
    assert choose([configured, tried(*mixed)], 4) == 0
    # All differ by the same small amount, where prompts are far apart.
    similarities = [number / 40 for number in range(32)]
    assert choose([tried(*similarities), tried(*(value + 0.001 for value in similarities))], 4) == 1


def test_of_equal_candidates_the_one_with_fewer_passes_is_recommended():
    configured, better = tried(*shares(10)), shares(20)
    slow, unguided, fast = ({"num_steps": 24}, {"guidance_scale": 1.0, "num_steps": 20}, {"num_steps": 12})
    ways = [configured, tried(*better, **slow), tried(*better, **unguided), tried(*better, **fast)]
    assert choose(ways, 4) == 2, "20 passes, against 24 and 12 of both branches"
    assert choose(ways[:2] + ways[3:], 4) == 2
    assert choose([configured, tried(*better), tried(*better)], 4) == 1


def test_few_prompts_decide_nothing():
    assert choose([tried(0.0, 0.0, 0.0), tried(1.0, 1.0, 1.0)], 4) == 0


def test_prompts_are_different_captions_of_held_out_rows_drawn_by_the_seed(dataset, tmp_path):
    run = prepared(dataset, tmp_path)
    prompts = held_out_prompts(run)
    assert sorted(prompts) == sorted(spec.caption for spec in SPECS)
    assert held_out_prompts(prepared(dataset, tmp_path, seed=3)) == prompts
    assert held_out_prompts(prepared(dataset, tmp_path, sampling_choice=replace(TRIAL, seed=6))) != prompts
    assert held_out_prompts(prepared(dataset, tmp_path, sampling_choice=replace(TRIAL, prompts=8))) == prompts[:8]


def test_what_rates_the_videos_is_the_judge_or_clip(dataset, patterns, tmp_path):
    captions = [spec.caption for spec in SPECS]
    clip = SamplesConfig(clip=OpenClipConfig(weights="clip"))
    plain, with_clip = (prepared(dataset, tmp_path, **more).config for more in ({}, {"samples": clip}))
    assert (measure_of(plain, captions), measure_of(with_clip, captions)) == ("judge_strict", "judge_strict")
    assert measure_of(plain, [*captions, "a sunset"]) is None
    assert measure_of(with_clip, [*captions, "a sunset"]) == "clip_similarity"
    assert describe(prepared(dataset, tmp_path)) is None
    assert describe(prepared(patterns, tmp_path)) == (
        "sampling_choice: the held-out rows have 4 different captions, which are too few to tell ways apart; the "
        "model's folder recommends what the config does"
    )
    assert describe(prepared(patterns, tmp_path, sampling_choice=None)) is None


def test_the_judge_wants_all_that_a_caption_asks_for():
    videos = [render_clip(spec) for spec in SPECS]
    captions = [spec.caption for spec in SPECS]
    right = judge_strictly(captions, videos)
    assert fmean(right) > 0.8
    assert fmean(judge_strictly(captions[1:] + captions[:1], videos)) == 0


@pytest.mark.slow
def test_all_ways_have_the_same_prompts_and_seeds(dataset, stored, tmp_path):
    """What is drawn as configured is what the samples beside a training would be, and CLIP rates it alike."""
    clip = OpenClipConfig(weights=str(write_open_clip(tmp_path / "clip")))
    same = replace(TRIAL, candidates=(*TRIAL.candidates, SamplingChoice(temperature=0.0, num_steps=1)))
    run = prepared(dataset, tmp_path, sampling_choice=same, samples=SamplesConfig(seed=5, clip=clip))
    prompts = held_out_prompts(run)
    values = {number: {} for number in range(4)}
    for rated in try_ways(run, stored, list(enumerate(prompts)), "clip_similarity", 1):
        assert rated.seconds > 0
        values[rated.way] |= zip(rated.prompts, rated.values, strict=True)
    assert all(sorted(found) == list(range(10)) for found in values.values())
    assert fmean(values[0].values()) == pytest.approx(draw_samples(run, stored, prompts).metrics["clip_similarity"])
    assert values[0] != values[1]
    assert values[2] == values[3], "with one step nothing is masked again"
    (part,) = (rated for rated in try_ways(run, stored, [(3, prompts[3])], "clip_similarity", 1) if rated.way == 1)
    assert part.values[0] == pytest.approx(values[1][3]), "the seed goes with the prompt"


def opened(run):
    output = Output(run.config, snapshot_digest=run.dataset_digest)
    output.begin(run.config)
    return output


def test_a_trial_is_made_once_written_down_and_sent(ray_cluster, dataset, stored, tmp_path, capsys):
    run = prepared(dataset, tmp_path / "out", progress=True)
    output = opened(run)
    assert recommend(run, output, stored) == CONFIGURED, "noise shows no shape in any way"
    told = capsys.readouterr().err
    assert "sampling_choice: 3 ways on 10 held-out prompts\n" in told
    assert "sampling_choice: what the config recommends stays; the best candidate was history_ratio 0.25 (" in told
    assert "judge_strict 0.000, +0.000 [+0.000, +0.000] against 0.000 as configured, on 10 held-out prompts)" in told
    said = json.loads(output.sampling_choice.read_text())
    assert (said["chosen"], said["measure"], said["step"]) == (0, "judge_strict", 10)
    assert [way["sampling"]["history_ratio"] for way in said["ways"]] == [0.7, 0.25, 0.7]
    assert all(way["values"] == [0.0] * 10 and way["interval95"] == [0.0, 0.0] for way in said["ways"])
    assert all(way["seconds_per_video"] > 0 for way in said["ways"])

    output.sampling_choice.write_text(json.dumps(said | {"chosen": 2}))  # so that another trial would be noticed
    assert recommend(run, output, stored) == replace(CONFIGURED, num_steps=1)
    assert capsys.readouterr().err == ""

    history = History(output.metrics_file)
    Sender(prepared=run, output=output, history=history, kept=dict).end("FINISHED", tmp_path)
    client = MlflowClient(output.store.uri)
    found = client.get_run(output.run.run_id)
    assert json.loads(found.data.tags["recommended_sampling"]) == asdict(CONFIGURED)
    (mean,) = client.get_metric_history(found.info.run_id, "sampling_choice/02")
    assert (mean.step, mean.value) == (10, 0.0)
    assert "sampling_choice.json" in {item.path for item in client.list_artifacts(found.info.run_id)}

    other = prepared(dataset, tmp_path / "out", recommended_sampling=replace(CONFIGURED, guidance_scale=2.0))
    assert recommend(other, opened(other), stored) == other.config.recommended_sampling
    assert json.loads(output.sampling_choice.read_text())["chosen"] == 0, "another question, another trial"


def test_an_error_is_a_warning_and_the_configs_stays(ray_cluster, dataset, patterns, stored, tmp_path, caplog, capsys):
    run = prepared(dataset, tmp_path / "gone")
    output = opened(run)
    output.sampling_choice.write_text("half a fi")
    with caplog.at_level(logging.WARNING):
        assert recommend(run, output, replace(stored, uri=str(tmp_path / "nowhere"))) is None
    assert "sampling_choice: FileNotFoundError: " in caplog.text
    assert "; the model's folder recommends what the config does" in caplog.text
    time.sleep(2)
    assert len(caplog.records) == 1, "Ray does not add a traceback of each task"
    assert not output.sampling_choice.exists()
    caplog.clear()
    without = prepared(patterns, tmp_path / "patterns", progress=True, validation=ValidationConfig(rows=64))
    assert recommend(without, opened(without), stored) is None
    assert "have 4 different captions, which are too few" in capsys.readouterr().err
    assert not caplog.text
