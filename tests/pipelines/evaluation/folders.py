"""Small folders of videos, as `lumos generate` and as VBench lay them out."""

import json
from pathlib import Path

import numpy as np

from pipelines.media import encode_video

FPS = 12.0


def moving(seed: int, *, speed: int = 2, frames: int = 13, side: int = 48, noise: float = 0.0) -> np.ndarray:
    """A bright square that moves over a dark ground, with noise of its own in every frame."""
    generator = np.random.default_rng(seed)
    ground = generator.integers(20, 60, 3)
    picture = np.empty((frames, side, side, 3), np.uint8)
    for index in range(frames):
        frame = np.full((side, side, 3), ground, np.float64)
        left = (4 + index * speed) % (side - 12)
        frame[16:28, left : left + 12] = 220
        frame += generator.normal(0, noise, frame.shape) if noise else 0
        picture[index] = frame.clip(0, 255)
    return picture


def write_generated(folder: Path, prompts: list[str], seeds: int = 2, below: str = "", **kind: float) -> Path:
    """Videos with a manifest; ``below``: the folder of the videos within it."""
    (folder / below).mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(prompts):
        for seed in range(seeds):
            path = f"{below}{index:05d}-{seed}.mp4"
            (folder / path).write_bytes(encode_video(moving(10 * index + seed, **kind), FPS))
            rows.append({"path": path, "index": index, "prompt": prompt, "seed": seed, "fps": FPS})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "manifest.jsonl").write_text(lines, encoding="utf-8")
    return folder


def write_plain(folder: Path, prompts: list[str], seeds: int = 2, **kind: float) -> Path:
    """VBench's layout: nothing but ``{prompt}-{number}.mp4``."""
    folder.mkdir(parents=True)
    for index, prompt in enumerate(prompts):
        for seed in range(seeds):
            (folder / f"{prompt}-{seed}.mp4").write_bytes(encode_video(moving(10 * index + seed, **kind), FPS))
    return folder
