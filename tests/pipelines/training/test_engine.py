"""The engine, in plain processes without Ray; what is asserted is in muon_resume.py and engine_ranks.py."""

from pathlib import Path

import pytest

from tests.pipelines.training.runs import run_ranks


@pytest.mark.slow
def test_muon_under_zero1_continues_exactly(tmp_path: Path):
    run_ranks("muon_resume", tmp_path)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_on_any_stage(tmp_path: Path):
    run_ranks("engine_ranks", "skip", tmp_path)


@pytest.mark.slow
def test_stages_agree_with_partitioned_tensors_too(tmp_path: Path):
    run_ranks("engine_ranks", "agree", tmp_path)


@pytest.mark.slow
def test_rows_need_not_divide_evenly_among_workers(tmp_path: Path):
    run_ranks("engine_ranks", "uneven", tmp_path)


@pytest.mark.slow
def test_the_average_of_the_weights_on_any_stage(tmp_path: Path):
    run_ranks("engine_ranks", "average", tmp_path)


@pytest.mark.slow
def test_text_is_trained_where_a_worker_has_no_caption(tmp_path: Path):
    run_ranks("engine_ranks", "text", tmp_path)


@pytest.mark.slow
def test_a_checkpoint_that_one_worker_cannot_write_is_left_out(tmp_path: Path):
    for scenario in ("full_disk", "unwritable"):
        run_ranks("engine_ranks", scenario, tmp_path)


@pytest.mark.slow
def test_muon_has_fitting_products_and_the_space_that_a_checkpoint_needs_is_known_before(tmp_path: Path):
    run_ranks("engine_ranks", "products+room", tmp_path)  # at once, as each start of processes takes long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("written", "resumed"),
    [
        # A tolerance of 0 where the layout is the same: nothing is lost between the files and the engine.
        ((2, "zero1", "fp32", "cpu", "adamw"), [(1, "zero2", "fp32", "cpu", "adamw", 1e-4)]),
        ((1, "zero1", "fp32", "cpu", "adamw"), [(2, "zero1", "fp32", "cpu", "adamw", 1e-4)]),
        ((2, "zero3", "fp32", "cpu", "adamw"), [(2, "zero3", "fp32", "cpu", "adamw", 0.0)]),
        pytest.param(
            (2, "zero3", "fp32", "cpu", "adamw"),
            [(1, "zero3", "fp32", "cpu", "adamw", 1e-4), (1, "zero1", "fp32", "cpu", "adamw", 1e-4)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, "zero1", "fp32", "cpu", "muon"),
            [(1, "zero1", "fp32", "cpu", "muon", 1e-3), (2, "zero2", "fp32", "cpu", "muon", 1e-3)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, "zero1", "bf16", "gpu", "adamw"),
            [(2, f"zero{stage}", "bf16", "gpu", "adamw", 0.0 if stage == 1 else 0.02) for stage in (1, 2, 3)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (2, "zero0", "fp32", "cpu", "adamw"),
            [(2, "zero0", "fp32", "cpu", "adamw", 0.0), (1, "zero1", "fp32", "cpu", "adamw", 1e-4)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_checkpoint_is_resumed_under_another_stage_and_world_size(tmp_path: Path, written, resumed):
    world, *how = written
    run_ranks("engine_ranks", "write", tmp_path, *how, processes=world)
    for world, *how in resumed:
        run_ranks("engine_ranks", "resume", tmp_path, *how, processes=world)
