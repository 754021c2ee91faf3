import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lumos
from lumos.config import SamplingConfig
from pipelines.errors import UserError
from pipelines.generation.config import GenerateConfig
from pipelines.generation.generator import VideoGenerator
from pipelines.generation.model import AbandonedError, Engine, read_card
from pipelines.generation.request import VideoRequest
from pipelines.media import encode_video

PROMPTS = ("a red square moves left", "a blue circle moves up over a green background", "x")


@pytest.fixture
def engine(generate_config: GenerateConfig) -> Engine:
    return Engine(read_card(generate_config).folder, generate_config.replicas)


def requests_of(engine: Engine, count: int, num_steps: int = 4) -> list[VideoRequest]:
    """Prompts of several lengths, with settings of their own."""
    size = engine.encoder.size()
    sampling = SamplingConfig(num_steps=num_steps)
    return [
        VideoRequest(
            prompt=PROMPTS[i % 3],
            seed=i,
            size=size,
            sampling=replace(sampling, guidance_scale=(1.0, 3.0, 7.5)[i % 3], history_ratio=(0.7, 0.2)[i % 2]),
        )
        for i in range(count)
    ]


def never() -> bool:
    return False


def test_invariance_a_video_does_not_depend_on_its_batch(engine: Engine) -> None:
    requests = requests_of(engine, 8)
    alone = [engine.run([request], never)[0] for request in requests]
    assert len(set(alone)) == 8
    for size in (2, 3, 5, 8):
        batches = [requests[start : start + size] for start in range(0, 8, size)]
        assert [data for batch in batches for data in engine.run(batch, never)] == alone
    assert engine.run(requests[::-1], never) == alone[::-1]


def test_the_library_draws_the_same_videos(engine: Engine, model_dir: Path, tokenizer_path: Path) -> None:
    model = lumos.load(model_dir, device="cpu", tokenizer=tokenizer_path)
    requests = requests_of(engine, 3)
    for request, data in zip(requests, engine.run(requests, never), strict=True):
        sampling = request.sampling
        frames = model.generate(
            request.prompt,
            seed=request.seed,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            history_ratio=sampling.history_ratio,
        )
        assert encode_video(frames, request.size.fps) == data


def test_invariance_given_frames_are_continued_alike_everywhere(
    engine: Engine, model_dir: Path, tokenizer_path: Path
) -> None:
    model = lumos.load(model_dir, device="cpu", tokenizer=tokenizer_path)
    size = engine.encoder.size()
    frames = np.random.default_rng(0).integers(0, 256, (4, 5, size.height, size.width, 3), dtype=np.uint8)
    requests = [replace(r, given=given) for r, given in zip(requests_of(engine, 4), frames, strict=True)]
    alone = [engine.run([request], never)[0] for request in requests]
    assert engine.run(requests, never) == alone
    assert len({*alone, *engine.run(requests_of(engine, 4), never)}) == 8
    for request, data in zip(requests, alone, strict=True):
        sampling = request.sampling
        continued = model.generate(
            request.prompt,
            seed=request.seed,
            clip=request.given,
            num_steps=sampling.num_steps,
            guidance_scale=sampling.guidance_scale,
            history_ratio=sampling.history_ratio,
        )
        assert encode_video(continued, size.fps) == data


def test_a_batch_nobody_waits_for_is_stopped_after_a_frame(engine: Engine) -> None:
    asked = 0

    def after_two() -> bool:
        nonlocal asked
        asked += 1
        return asked == 2

    with pytest.raises(AbandonedError):
        engine.run(requests_of(engine, 1), after_two)
    assert asked == 2


def test_more_steps_than_cells_end_with_every_cell_drawn(engine: Engine) -> None:
    request = requests_of(engine, 2, num_steps=40)[1]  # 16 cells a frame
    assert engine.run([request], never) == [engine.run([*requests_of(engine, 1, num_steps=40), request], never)[1]]


def test_a_replica_that_comes_later_loads_no_other_weights(generate_config: GenerateConfig, tmp_path: Path) -> None:
    """As where one is lost after a training has written to the folder: its videos would have another model's hash."""
    folder = shutil.copytree(generate_config.model, tmp_path / "model")
    card = read_card(replace(generate_config, model=str(folder)))
    VideoGenerator(card, generate_config)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="are not those that this run began with"):
        VideoGenerator(card, generate_config)
