import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs.plan import command
from lumos.config import lumos_1b, lumos_3b
from lumos.flops import Workload, count_parameters, dense_flops, exact_flops, mean_mask_ratio
from lumos.layout import TAIL, video_layout
from lumos.tokenizers import FsqTokenizer
from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.training.accelerators import parse_cluster
from pipelines.training.config import CheckpointConfig, DataConfig, ResourceConfig, SourceConfig, TrainConfig
from pipelines.training.device_memory import Pass, Setup, block_activations, worker_memory
from pipelines.training.estimate import make_plan
from pipelines.training.estimate_text import as_text, as_values
from pipelines.training.plan_question import make_question, parse_rows
from pipelines.training.precision import has_bf16_products

from .runs import tiny_config
from .snapshots import CODEBOOK, write_snapshot

ROOT = Path(__file__).resolve().parents[3]
ONE_CLIP = Pass(tokens=13_000, predictions=10_000)


def off_by(folder, *cases):
    """Of each case, the planned memory by the measured, less 1: two processes with real engines (memory_steps.py)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.pipelines.training.memory_steps", str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((folder / "figures.json").read_text())
    assert list(figures) == list(cases)
    return {case: found["planned"] / found["measured"] - 1 for case, found in figures.items()}


@pytest.mark.slow
def test_planned_memory_is_within_15_percent_of_what_a_step_takes(tmp_path):
    (off,) = off_by(tmp_path, "float32 zero1").values()
    assert abs(off) < 0.15


@pytest.mark.slow
@pytest.mark.skipif(not has_bf16_products(), reason="this CPU does not multiply in bf16: it would take ten minutes")
def test_planned_memory_in_bf16_is_within_15_percent_of_what_a_step_takes(tmp_path):
    off = off_by(tmp_path, "bf16 zero2 full", "bf16 zero1 grouped", "bf16 zero3")
    zero3 = off.pop("bf16 zero3")  # measured 10 to 18 % above the plan, which says so
    assert max(map(abs, off.values())) < 0.15
    assert abs(zero3) < 0.25


def setup(**changes):
    return Setup(**({"zero": {"stage": 1}, "workers": 8, "parameter_bytes": 2, "recompute": "none"} | changes))


def memory(model, one=ONE_CLIP, **changes):
    return worker_memory(model, count_parameters(model, visual_classes=64000), setup(**changes), one)


def test_every_remedy_takes_less_memory():
    model = lumos_3b()
    kept = [memory(model, recompute=kind).peak for kind in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)
    # Live parameters bound as small as the sharded GPU files have them; by default all stay gathered.
    stages = [memory(model, recompute="full", zero={"stage": stage, "reduce_bucket_size": 5e7,
              "overlap_comm": False, "stage3_max_live_parameters": 2e8}).peak for stage in (1, 2, 3)]  # fmt: skip
    assert stages == sorted(stages, reverse=True)
    offloaded = memory(model, zero={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    here = memory(model, zero={"stage": 2})
    assert offloaded.peak < here.peak
    assert offloaded.host["optimizer states"] == here.device["optimizer states"]
    assert memory(model, replace(ONE_CLIP, tokens=6_500)).peak < memory(model).peak


def test_states_of_adam_and_muon_are_divided_among_the_workers():
    counts = count_parameters(lumos_1b(), visual_classes=64000)
    trained = counts.total - counts.other_head  # no loss reaches the rows of text
    one, eight = memory(lumos_1b(), workers=1), memory(lumos_1b(), workers=8)
    assert one.device["masters"] == 4 * trained
    assert one.device["optimizer states"] == 8 * trained == 8 * eight.device["optimizer states"]
    muon = memory(lumos_1b(), workers=1, muon=True)
    assert muon.device["optimizer states"] == 8 * trained - 4 * (counts.attention + counts.mlp)
    assert memory(lumos_1b(), workers=8, ema=True).device["ema"] == 4 * trained / 8
    assert memory(lumos_1b(), train_text=True).device["weights"] == 2 * counts.total


def test_one_clip_of_the_paper_takes_what_arithmetic_says():
    """12,544 codes of a 448x256 clip at 1B without recomputing: about 1.4 GB in each of 16 blocks."""
    assert block_activations(lumos_1b(), 13_000, 2, "none") == pytest.approx(1.4e9, rel=0.05)
    assert block_activations(lumos_1b(), 13_000, 2, "full") == 13_000 * 2048 * 2


def question(config, cluster="8xH100-80GB", rows=("video:7x4x4", "image:4x4"), **changes):
    return make_question(config, parse_cluster(cluster), rows=rows, **changes)


def test_a_plan_adds_up(tmp_path):
    config = tiny_config(tmp_path, tmp_path, global_batch=16, checkpoint=CheckpointConfig(keep=3))
    asked = question(config, tokens=1e6, mfu=0.25, caption_tokens=20)
    plan = make_plan(config, asked)
    layout = video_layout(5 + 20, (7, 4, 4), tail=TAIL)
    video, image = plan.buckets
    assert (video.tokens_per_row, video.tokens, video.rows_per_step) == (layout.length, 16 * layout.length, 16)
    work = Workload.of([layout] * 16, visual_predictions=16 * 7 * 16 * mean_mask_ratio(config.mask))
    assert video.exact.model == pytest.approx(exact_flops(asked.model, work, visual_classes=asked.codebook_size).model)
    assert video.dense.model == pytest.approx(dense_flops(asked.model, work).model)
    assert sum(bucket.share for bucket in plan.buckets) == pytest.approx(1.0)
    mean = (video.exact.model + image.exact.model) / 2
    assert plan.step_seconds == pytest.approx(mean / (0.25 * 8 * 66.9e12))  # float32's peak, as the config has it
    in_bf16 = make_plan(replace(config, precision="bf16"), asked)
    assert in_bf16.step_seconds == pytest.approx(mean / (0.25 * 8 * 989.4e12))
    assert plan.steps == math.ceil(1e6 / ((video.tokens + image.tokens) / 2))
    assert plan.days == pytest.approx(plan.steps * plan.step_seconds / 86400)
    assert plan.fits
    assert as_values(plan)["memory_peak"] == plan.peak.memory.peak
    assert "fits" not in as_text(plan)
    assert re.search(r" tokens: \S+ s, [^0]\S+ device hours, ", as_text(plan))  # of what takes no hour
    assert re.search(r"one every \d+ steps \(\S+ s\)", as_text(plan))


def test_what_does_not_fit_is_told_with_the_keys_that_help(tmp_path):
    gpu = tiny_config(tmp_path, tmp_path, precision="bf16", global_batch=16, resources=ResourceConfig(device="gpu"))
    shape = {name: getattr(lumos_3b(), name) for name in (
        "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")}  # fmt: skip
    config = replace(gpu, model=replace(gpu.model, **shape, max_seq_len=40_000), micro_batch_tokens=60_000)
    plan = make_plan(config, question(config, rows=["video:7x48x84"]))
    assert not plan.fits
    assert any("checkpoint_activations" in changes for changes, _ in plan.fitting)
    assert all(peak <= plan.room for _, peak in plan.fitting)
    assert "does not fit: video 7x48x84 needs" in as_text(plan)
    small = make_plan(config, replace(question(config, rows=["video:7x48x84"]), cluster=parse_cluster("8", 100.0, 6.0)))
    assert not small.fitting
    assert "no key helps" in as_text(small)


def test_rows_are_those_of_the_dataset_unless_told(tmp_path):
    dataset = write_snapshot(tmp_path / "dataset", {(2, 4, 4): 12, (1, 4, 4): 4})
    config = tiny_config(dataset, tmp_path / "out")
    found = make_question(config, parse_cluster("2xH20"))
    assert [(str(rows), rows.weight) for rows in found.rows] == [("image 1x4x4", 4.0), ("video 2x4x4", 12.0)]
    assert found.codebook_size == CODEBOOK
    plan = make_plan(config, found)
    assert [bucket.share for bucket in plan.buckets] == [0.25, 0.75]
    assert plan.epochs == pytest.approx(60 * 8 / 16)
    assert "30 passes over it" in as_text(plan)


def test_48_devices_on_six_nodes_and_ten_million_videos(tmp_path):
    config = replace(load_config(TrainConfig, "1b-joint-256p"), steps=200_000)
    rows = ["video:7x32x56=10e6", "image:32x56=60e6"]
    plan = make_plan(config, make_question(config, parse_cluster("48xH20"), rows=rows))
    assert plan.nodes == 6
    assert plan.question.dataset_bytes == 2 * 32 * 56 * (7 * 10e6 + 60e6)
    rows_per_s = (48 + 288) / 2 / plan.step_seconds
    assert plan.s3_reads_per_s == pytest.approx(rows_per_s / 5)
    assert plan.epochs == pytest.approx(200_000 * (48 + 288) / 2 / 70e6)
    assert plan.checkpoint_bytes / 3 < plan.node_disk_bytes < 2 * plan.checkpoint_bytes
    text = as_text(plan)
    assert "6 nodes of 8 devices" in text
    assert "dataset: 466 GB, 0.48 passes over it" in text
    assert as_values(plan)["s3_gets_per_s"] == plan.s3_reads_per_s
    assert "an MFU of 40% (--mfu), which no measurement gave unless you did one" in text
    for file in ("training/memory_steps.py", "storage/test_s3_reading.py"):  # which measure what it is computed from
        assert f"tests/pipelines/{file}" in text
        assert (ROOT / "tests" / "pipelines" / file).exists()
    for wrong, told in {"video:7x32x56=0": "how many", "video:7x32x56=many": "how many"}.items():
        with pytest.raises(UserError, match=told):
            parse_rows(wrong)
    with pytest.raises(UserError, match="of all shapes how many rows there are, or of none"):
        make_question(config, parse_cluster("48xH20"), rows=["video:7x32x56=10e6", "image:32x56"])


def test_shares_follow_the_weights_of_the_sources(tmp_path):
    images = write_snapshot(tmp_path / "images", {(1, 4, 4): 12})
    videos = write_snapshot(tmp_path / "videos", {(2, 4, 4): 12})
    sources = (SourceConfig(dataset=str(images), weight=1), SourceConfig(dataset=str(videos), weight=3))
    config = tiny_config(images, tmp_path / "out")
    config = replace(config, data=replace(config.data, dataset=None, sources=sources))
    plan = make_plan(config, make_question(config, parse_cluster("2xH20")))
    assert [(bucket.rows.kind, bucket.share) for bucket in plan.buckets] == [("image", 0.25), ("video", 0.75)]


def test_rows_that_are_told_have_the_codes_of_the_runs_tokenizer(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    assert question(config).codebook_size == FsqTokenizer().codebook_size  # that of the package
    paper = replace(config.data, vocabulary="lumos1", text_tokenizer="nowhere.json")
    assert question(replace(config, data=paper), rows=["video:7x4x4"]).codebook_size == 64000


def test_captions_longer_than_the_context_are_planned_as_they_are_cut(tmp_path):
    config = tiny_config(tmp_path, tmp_path, global_batch=16)
    (bucket,) = make_plan(config, question(config, rows=["video:7x4x4"], caption_tokens=10_000)).buckets
    assert bucket.tokens_per_row == config.model.max_seq_len


def test_settings_of_a_cpu_are_told(tmp_path):
    config = tiny_config(tmp_path, tmp_path, global_batch=16)
    plan = make_plan(config, question(config))
    assert "add resources.device=gpu deepspeed=zero1-gpu" in as_text(plan)
    gpu = replace(config, resources=ResourceConfig(device="gpu"), deepspeed="zero1-gpu")
    assert make_plan(gpu, question(gpu)).remarks == ()


def test_what_training_would_refuse_is_refused(tmp_path):
    gpu = tiny_config(tmp_path, tmp_path, precision="bf16", global_batch=16, resources=ResourceConfig(device="gpu"))
    refused = replace(gpu, deepspeed="zero0")
    with pytest.raises(UserError, match="take zero1"):
        make_plan(refused, question(refused))
    two = (tmp_path / "one", tmp_path / "foreign")
    for folder, codes in zip(two, (64, 128), strict=True):
        write_snapshot(folder, {(2, 4, 4): 21}, codebook_size=codes)
    sources = tuple(SourceConfig(dataset=str(folder)) for folder in two)
    with pytest.raises(UserError, match=r"foreign\S* was made by the tokenizer .*128 codes"):
        make_question(replace(gpu, data=DataConfig(sources=sources)), parse_cluster("2xH20"))
    large = replace(gpu, micro_batch_tokens=100_000)
    with pytest.raises(UserError, match=r"a row of video 9x64x64 has \d+ tokens and more, model.max_seq_len is 512"):
        make_plan(large, question(large, rows=["video:9x64x64"]))


def test_bad_questions_are_told(tmp_path):
    config = tiny_config(tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="To plan without it, give --rows"):
        make_question(config, parse_cluster("2xH20"))
    with pytest.raises(UserError, match="such as image:32x56"):
        parse_rows("32x56")
    with pytest.raises(UserError, match="--mfu is a share"):
        question(config, mfu=1.5)
    for tokens in (math.nan, math.inf, 0.0):
        with pytest.raises(UserError, match="--tokens must be a number above 0"):
            question(config, tokens=tokens)
    with pytest.raises(UserError, match="whole numbers of 2 cells each way"):
        question(config, rows=["video:7x5x4"])
    for tflops, memory in ((math.nan, 80.0), (100.0, None), (100.0, 0.0)):
        with pytest.raises(UserError, match="give both"):
            parse_cluster("8", tflops, memory)
    with pytest.raises(UserError, match="on 3 devices: global_batch"):
        make_plan(config, question(config, "3xH20"))


def test_the_command_prints_json_and_says_by_its_status_whether_it_fits():
    arguments = ["quickstart", "--rows", "video:7x32x56", "--json", "--cluster"]
    fits = CliRunner().invoke(command, [*arguments, "2xH20"])
    assert fits.exit_code == 0, fits.output
    assert json.loads(fits.output)["fits"]
    full = CliRunner().invoke(command, [*arguments, "2", "--tflops", "100", "--memory-gb", "2"])
    assert full.exit_code == 1
    assert not json.loads(full.output)["fits"]
