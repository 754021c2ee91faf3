"""The shipped runs: complete, as the paper has them, fitting their devices; each kind of stage trained at CPU size."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
import yaml

from lumos.config import ModelConfig, lumos_1b, lumos_3b, lumos_500m
from pipelines.config import find_config, load_config, shipped_configs
from pipelines.training.accelerators import parse_cluster
from pipelines.training.config import TrainConfig
from pipelines.training.engine import DEEPSPEED_DIR, check_engine, engine_settings, read_deepspeed_file
from pipelines.training.estimate import make_plan
from pipelines.training.plan_question import make_question

from .runs import run_ranks
from .stage_steps import STAGES

SIZES = {"0.5b": lumos_500m(), "1b": lumos_1b(), "3b": lumos_3b()}
RUNS = [f"{size}-{stage}" for size in SIZES for stage in STAGES]


def keys(cls, prefix=""):
    """All keys of a config, dotted; sections that are null by default count as one."""
    for field in fields(cls):
        section = field.type if is_dataclass(field.type) else None
        if section:
            yield from keys(section, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def flat(raw, sections, prefix=""):
    for key, value in raw.items():
        if isinstance(value, dict) and any(name.startswith(f"{prefix}{key}.") for name in sections):
            yield from flat(value, sections, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_size_and_stage_is_shipped():
    assert set(RUNS) <= set(shipped_configs("train"))


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_is_complete_and_follows_the_paper(name):
    size, stage = name.split("-", 1)
    raw = yaml.safe_load(find_config("train", name).read_text())
    asked = set(keys(TrainConfig))
    assert sorted(asked - set(flat(raw, asked))) == []
    config = load_config(TrainConfig, name)
    model = config.model.resolve(129536, 65536)
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    assert [getattr(model, key) for key in names] == [getattr(SIZES[size], key) for key in names]
    assert isinstance(model, ModelConfig)
    check_engine(config)
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.95, 0.1, 4.0)
    assert (optimizer.schedule, config.precision, config.num_workers) == ("constant", "bf16", 48)
    assert (config.data.caption_drop, config.data.vocabulary, config.mask.min_ratio) == (0.1, "lumos1", 0.7)
    stages = list(STAGES)
    before = stages[stages.index(stage) - 1] if stage != stages[0] else None
    assert config.init_from == (f"runs/{size}-{before}" if before else None)
    assert config.output == f"runs/{name}"
    if stage == "image-256p":
        assert optimizer.lr == {"0.5b": 1e-4, "1b": 5e-5, "3b": 1e-4}[size]
        assert config.batch_rows(1) == 48 * 6
    else:
        assert (config.batch_rows(1), config.batch_rows(7)) == (48 * 6, 48)
        assert config.data.mix.image == config.data.mix.video


@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_run_fits_the_papers_devices(name):
    config = load_config(TrainConfig, name)
    h, w = (48, 84) if name.endswith("384p") else (32, 56)
    rows = [f"image:{h}x{w}"] + ([] if "image" in name else [f"video:7x{h}x{w}"])
    plan = make_plan(config, make_question(config, parse_cluster("48xH20"), rows=rows))
    assert plan.fits, plan.fitting
    # The widest of the shapes that the paper's crops give: of as many pixels, but with the most row ends.
    assert all(bucket.rows_per_pass * bucket.bare_tokens <= config.micro_batch_tokens for bucket in plan.buckets)
    assert plan.buckets[-1].rows_per_step == plan.buckets[-1].rows_per_pass * 48  # one pass a worker


def test_deepspeed_takes_the_shipped_files():
    """By its own check of a config, in a process of its own, as its accelerator is chosen at its import."""
    sections = []
    for file in sorted(DEEPSPEED_DIR.glob("*.json")):
        name, zero = file.stem, read_deepspeed_file(file.stem)["zero_optimization"]
        assert zero["stage"] == int(name[4]), name
        assert ("offload" in name) == ("offload_optimizer" in zero), name
        if zero["stage"]:
            assert zero["overlap_comm"] == name.endswith("-gpu"), name
            config = load_config(TrainConfig, "1b-image-256p", [f"deepspeed={name}"])
            check_engine(config)
            sections.append(engine_settings(config)["zero_optimization"])
    code = (
        "import json, sys; from deepspeed.runtime.zero.config import DeepSpeedZeroConfig; "
        "[DeepSpeedZeroConfig(**section) for section in json.loads(sys.argv[1])]"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(sections)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_each_kind_of_stage_trains_from_the_one_before(tmp_path):
    """One process, without Ray: the shipped runs with a small model on a made snapshot; see stage_steps.py."""
    run_ranks("stage_steps", tmp_path, processes=1)
    assert json.loads((tmp_path / "done.json").read_text()) == list(STAGES)
