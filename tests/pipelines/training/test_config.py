import json
from dataclasses import replace
from pathlib import Path

import pytest

from lumos.config import SamplingChoice
from lumos.vocabulary import Vocabulary
from pipelines.config import config_hash, load_config, shipped_configs
from pipelines.errors import UserError
from pipelines.training.config import (
    OptimizerConfig,
    ResourceConfig,
    SamplingTrialConfig,
    TrainConfig,
    ValidationConfig,
)
from pipelines.training.engine import check_engine, engine_settings, read_deepspeed_file
from tests.pipelines.training.runs import tiny_config

CONFIG = tiny_config(Path("data"), Path("out"))


@pytest.mark.parametrize("name", shipped_configs("train"))
def test_shipped_configs_are_valid(name):
    config = load_config(TrainConfig, name)
    check_engine(config)
    assert engine_settings(config)["gradient_clipping"] == config.optimizer.clip_norm


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch=3", r"global_batch = 3 is not a multiple of num_workers = 2; nearest that are: 2 and 4"),
        ("num_workers=3", r"global_batch = 2 is not a multiple of num_workers = 3; nearest that are: 3"),
        ("image_batch=5", "image_batch = 5 is not a multiple of num_workers = 2; nearest that are: 4 and 6"),
        ("image_batch=0", "image_batch must be at least 1, got 0"),
        ("micro_batch=2", r"key 'micro_batch' is no more: .*is now micro_batch_tokens: set that to micro_batch x"),
        ("data.mix={image: 0, video: 1}", r"data.mix: mix.image must be positive, got 0.0; .*leave it out"),
        ("data.mix={}", r"mix names neither image nor video"),
        ("data.mix={film: 1}", r"unknown key 'data.mix.film'"),
        (
            "data.sources=[{dataset: a}]",
            r"data: dataset and sources are both set: set dataset to null, or sources to \[\]",
        ),
        ("data.dataset=null", "data: set dataset, or sources"),
        ("data.sources=[{dataset: a, weight: 0}]", r"weight of a must be positive, got 0.0; .*leave the source out"),
        ("data.sources=[{dataset: a, weight: 1, repeat: 1}]", r"a has a weight and a repeat: set one of them"),
        ("data.order=3", r"data.order: .*1 or 2"),
        ("optimizer.lr=0.0", "lr must be positive, got 0.0"),
        ("optimizer.warmup_steps=21", "decay_steps = 21 exceeds steps = 20"),
        ("model.head_dim=48", "head_dim must be a multiple of 32, got 48"),
        ("data.grid_unit=12", "grid_unit must be a positive multiple of 8 px, got 12"),
        ("recommended_sampling.num_steps=0", "recommended_sampling: num_steps must be at least 1, got 0"),
        ("recommended_sampling.steps=3", "unknown key 'recommended_sampling.steps'"),
        ("sampling_choice={candidates: []}", "sampling_choice: candidates is empty: name at least one, or set"),
        ("sampling_choice={}", "key 'sampling_choice.candidates' is missing"),
        ("sampling_choice={candidates: [{}]}", "candidates.0 is recommended_sampling itself: change a value"),
        (
            "sampling_choice={candidates: [{guidance_scale: 3.0}, {guidance_scale: 3.0, num_steps: 12}]}",
            r"sampling_choice.candidates.1 is the same as sampling_choice.candidates.0: change a value",
        ),
        (
            "sampling_choice={candidates: [{history_ratio: 0.3}, {history_ratio: 1.3}]}",
            r"sampling_choice.candidates.1: history_ratio must be in \[0, 1\], got 1.3",
        ),
        (
            "sampling_choice={candidates: [{num_step: 3}]}",
            "unknown key 'sampling_choice.candidates.0.num_step' = 3; did you mean '.*candidates.0.num_steps'",
        ),
        ("sampling_choice={candidates: [{num_steps: 3}], prompts: 4}", "prompts must be at least 8, got 4"),
        (
            "sampling_choice={candidates: [{num_steps: 3}], prompts: 129}",
            "sampling_choice.prompts = 129 exceeds validation.rows = 128: they are captions of those rows",
        ),
        ("optimiser.lr=1.0", "unknown key 'optimiser'.*did you mean 'optimizer.lr'"),
        ("steps=-3", "steps must be at least 1, got -3"),
        ("batch_size=4", "unknown key 'batch_size' = 4; did you mean 'global_batch'"),
        ("optimizer.learning_rate=0.1", "unknown key 'optimizer.learning_rate' = 0.1; did you mean 'optimizer.lr'"),
        ("ema=0.99", "ema: it is a mapping of decay, start; got 0.99"),
        ("tracking.uri=ftp://a/b", r"tracking: uri = ftp://a/b is none in which MLflow keeps runs: .*sqlite:///PATH"),
        ("steps=many", "steps: input should be a valid integer, got 'many'"),
    ],
)
def test_bad_values_are_errors_that_name_them(override, message):
    with pytest.raises(UserError, match=message):
        load_config(TrainConfig, "quickstart", [override])


def test_a_near_name_of_a_shipped_config_is_told():
    with pytest.raises(UserError, match=r"'quickstrat' is neither .*\); did you mean 'quickstart'\?"):
        load_config(TrainConfig, "quickstrat")


def test_sources_have_weights_or_none_has(tmp_path):
    for given, message in (
        ("[{dataset: a, weight: 1}, {dataset: b}]", "sources: b has no weight, others have: give all one or none"),
        ("[{dataset: a}, {dataset: a}]", "sources names a twice: give it one entry with a higher weight or repeat"),
    ):
        with pytest.raises(UserError, match=message):
            load_config(TrainConfig, "quickstart", ["data.dataset=null", f"data.sources={given}"])


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    options = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr_ratio=0.1)
    rates = [options.learning_rate(step, 20) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[-1] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    constant = replace(options, schedule="constant")
    assert constant.learning_rate(19, 20) == 1.0


def test_identity_leaves_out_what_does_not_change_the_result():
    same = replace(CONFIG, output="elsewhere", resources=ResourceConfig(steps_per_block=3), progress=True)
    assert same.identity_hash() == CONFIG.identity_hash()
    otherwise = replace(CONFIG, deepspeed="zero3", model=replace(CONFIG.model, checkpoint_activations=True))
    assert otherwise.identity_hash() == CONFIG.identity_hash()
    assert replace(CONFIG, seed=1).identity_hash() != CONFIG.identity_hash()
    assert replace(CONFIG, steps=61).identity_hash() != CONFIG.identity_hash()
    constant = replace(CONFIG, optimizer=replace(CONFIG.optimizer, schedule="constant"))
    assert replace(constant, steps=61).identity_hash() == constant.identity_hash()


def test_a_trial_of_ways_to_sample_is_on_held_out_prompts():
    trial = SamplingTrialConfig(candidates=(SamplingChoice(num_steps=3),))
    assert replace(CONFIG, sampling_choice=trial).identity_hash() == CONFIG.identity_hash()
    trained_on = ValidationConfig(every=0, split=CONFIG.data.split)
    assert replace(CONFIG, validation=trained_on).sampling_choice is None
    with pytest.raises(ValueError, match="split = train is trained on: name another, or set sampling_choice=null and"):
        replace(CONFIG, validation=trained_on, sampling_choice=trial)


def test_identity_is_that_of_older_programs():
    # A new key changes it, and every older run is refused as another one: let identity() leave the key out where it has
    # its default.
    older = replace(CONFIG, data=replace(CONFIG.data, order=1))
    assert config_hash(older.older_identity()) == "1d38942c34027beb"
    assert CONFIG.identity()["data"]["order"] == 2


def test_vocabulary_lumos1_asks_for_its_tokenizers():
    config = replace(CONFIG, data=replace(CONFIG.data, vocabulary="lumos1"))
    assert config.make_vocabulary(text_vocab_size=65536, codebook_size=64000) == Vocabulary.lumos1()
    with pytest.raises(ValueError, match="has 64000 visual codes, the snapshot's tokenizer 512"):
        config.make_vocabulary(text_vocab_size=65536, codebook_size=512)
    with pytest.raises(ValueError, match="text tokenizer has 70000 ids"):
        config.make_vocabulary(text_vocab_size=70000, codebook_size=64000)


def test_deepspeed_files_are_found_and_checked(tmp_path):
    assert [read_deepspeed_file(f"zero{stage}")["zero_optimization"]["stage"] for stage in range(4)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"'zero9' is neither a JSON file nor a shipped name \(zero0, zero1"):
        read_deepspeed_file("zero9")
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    with pytest.raises(UserError, match=r"own.json sets bf16; remove them"):
        read_deepspeed_file(str(own))
    for data in (b"{", b"\xff\xfe"):
        own.write_bytes(data)
        with pytest.raises(UserError, match="is not valid JSON"):
            read_deepspeed_file(str(own))
    for text in ("[1]", '{"zero_optimization": 1}'):
        own.write_text(text)
        with pytest.raises(UserError, match=r"own.json must hold a mapping of keys to values, and so must its zero_op"):
            read_deepspeed_file(str(own))
    for text, message in (
        (
            '{"zero_optimisation": {"stage": 2}}',
            r"own.json: unknown key zero_optimisation; did you mean zero_optimization",
        ),
        ('{"zero_optimization": {"stagee": 2}}', r"unknown key zero_optimization.stagee; did you mean stage\?"),
        ('{"my_own_wishes": 1}', r"unknown key my_own_wishes; remove it"),
        ('{"zero_optimization": {"stage": 4}}', r"zero_optimization.stage is 4: set it to 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": "3"}}', r"zero_optimization.stage is '3': set it to"),
        ('{"zero_optimization": {"offload_optimizer": "cpu"}}', r"zero_optimization.offload_optimizer must be a map"),
    ):
        own.write_text(text)
        with pytest.raises(UserError, match=message):
            read_deepspeed_file(str(own))
    known = {"wall_clock_breakdown": True, "flops_profiler": {}, "zero_optimization": {"stage3_max_reuse_distance": 1}}
    own.write_text(json.dumps(known))
    assert read_deepspeed_file(str(own)) == known


@pytest.mark.parametrize(
    ("zero", "optimizer", "device", "message"),
    [
        (
            {"stage": 3},
            {"kind": "muon", "clip_norm": 0.0},
            "cpu",
            "ZeRO-3, which DeepSpeed's Muon does not work with: ta",
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            {"kind": "muon", "clip_norm": 0.0},
            "gpu",
            "offloads the optimizer, which takes DeepSpeed's CPU Adam: set optimizer.kind to adamw",
        ),
        ({"stage": 2}, {"kind": "muon", "clip_norm": 0.0}, "gpu", "accumulate Muon's gradients in bf16: take zero1"),
        ({"stage": 0}, {}, "gpu", "would accumulate and reduce gradients in bf16: take zero1"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, "gpu", "offload_param.device is 'nvme'"),
        ({"stage": 1, "compute_grad_norm": False}, {}, "cpu", "compute_grad_norm to false: remove it"),
    ],
)
def test_what_deepspeed_is_not_able_to_do_is_refused(tmp_path, zero, optimizer, device, message):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = replace(
        CONFIG,
        deepspeed=str(file),
        optimizer=OptimizerConfig(**optimizer),
        precision="bf16",
        resources=ResourceConfig(device=device),
    )
    with pytest.raises(UserError, match=message):
        check_engine(config)


def test_compiled_blocks_are_refused_under_zero_3():
    compiled = replace(CONFIG, deepspeed="zero3", model=replace(CONFIG.model, compile=True))
    with pytest.raises(UserError, match=r"is ZeRO-3, with which model.compile does not work: set it to false"):
        check_engine(compiled)
    check_engine(replace(compiled, deepspeed="zero1"))


def test_wsd_warms_up_stays_and_decays():
    options = OptimizerConfig(lr=1.0, schedule="wsd", warmup_steps=2, decay_steps=3, min_lr_ratio=0.2)
    rates = [options.learning_rate(step, 9) for step in range(9)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4])
    with pytest.raises(ValueError, match="decay_steps is 3 with schedule cosine: it belongs to wsd"):
        OptimizerConfig(schedule="cosine", decay_steps=3)
    with pytest.raises(ValueError, match="exceeds steps = 4"):
        replace(CONFIG, optimizer=options, steps=4)


def test_a_run_may_have_fewer_workers_whose_number_need_not_divide_its_batch():
    elastic = replace(CONFIG, num_workers=2, min_workers=1)
    assert elastic.identity_hash() == CONFIG.identity_hash()
    assert replace(CONFIG, num_workers=4, min_workers=2).min_workers == 2
    with pytest.raises(ValueError, match="global_batch = 8 is not a multiple of num_workers = 3"):
        replace(CONFIG, num_workers=3, min_workers=2)
    with pytest.raises(ValueError, match="min_workers must be from 1 to num_workers = 2, got 3"):
        replace(CONFIG, num_workers=2, min_workers=3)
