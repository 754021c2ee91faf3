"""Teach the network of ``transitions.py``: ``python -m pipelines.data.video.teach_transitions FOOTAGE WEIGHTS``.

Shots of the footage and of procedural pictures are moved, scaled, lit and coloured at random and joined in every way,
small as they are looked at; a network of two hidden layers learns which steps lie in a joint. Takes about ten minutes
and 4 GB on two cores.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import nn

from pipelines.data.video.fingerprint import small_planes
from pipelines.data.video.transitions import REACH, describe, measure_steps

SEQUENCES = 2000  # of six shots each
WIDTH, HEIGHT = 64, 36  # px
TAKEN = (128, 72)  # px of footage, which is cropped and scaled to those
# Frames of single shots, and how often each is drawn; other files are of one shot, parted in stretches.
FILM = {
    "big_buck_bunny_0_30.webm": [(50, 282), (284, 375), (377, 487), (500, 550), (552, 600), (630, 690)],
    "bigbuckbunny.mp4": [(0, 132)],
}
LENGTHS = [3, 4, 6, 8, 10, 12, 16, 20, 24, 30]  # frames of a gradual joint
KINDS = {"hard": 0.32, "dissolve": 0.2, "fade": 0.13, "wipe": 0.25, "flash": 0.1}
EPOCHS, BATCH, RATE = 6, 2048, 3e-3


@cache
def footage(folder: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Shots [T, 3, 72, 128] (Y, Cb and Cr) and how probably each is drawn."""
    shots, weights = [], []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".mp4", ".mkv", ".webm"):
            continue
        scaler = VideoReformatter()
        with av.open(str(path)) as container:
            frames = np.stack([small_planes(frame, TAKEN, scaler) for frame in container.decode(video=0)])
        parts = [frames[first:stop] for first, stop in FILM.get(path.name, [])]
        parts = parts or [frames[first : first + 200] for first in range(0, max(1, len(frames) - 100), 200)]
        shots += parts
        weights += [4.0 if path.name in FILM else 0.7] * len(parts)
    return shots, np.array(weights) / sum(weights)


def _texture(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = random.uniform(20, 230, 3) + np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24, 48):
        noise = random.normal(0, 1, (cells, int(cells * 1.8), 3)).astype(np.float32)
        smooth = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        picture = picture + smooth * (40 / np.sqrt(cells)) * random.uniform(0.3, 1.5)
    return picture


def _card(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    plain = random.uniform(0, 255, 3) if random.random() < 0.5 else np.full(3, random.choice([0.0, 16.0, 250.0]))
    picture = plain + np.zeros((height, width, 3), np.float32)
    picture[:, :, 1:] = picture[:, :, 1:] * 0.2 + 100
    ink = 255 - picture[0, 0, 0]
    for top in range(int(random.integers(8, 40)), height - 10, int(random.integers(7, 20))):
        left = int(random.integers(5, 60))
        while left < width - 20 and random.random() > 0.08:
            word = int(random.integers(4, 14))
            if random.random() < 0.7:
                picture[top : top + 4, left : left + word, 0] = ink * random.uniform(0.7, 1)
            left += word + 3
    return picture


def _shapes(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = (random.uniform(20, 235, 3) + np.zeros((height, width, 3))).astype(np.float32)
    for _ in range(int(random.integers(3, 25))):
        colour = tuple(map(float, random.uniform(0, 255, 3)))
        x, y = int(random.integers(width)), int(random.integers(height))
        if random.random() < 0.5:
            cv2.circle(picture, (x, y), int(random.integers(4, 40)), colour, -1)
        else:
            corner = (x + int(random.integers(5, 80)), y + int(random.integers(5, 60)))
            cv2.rectangle(picture, (x, y), corner, colour, -1)
    return picture


def procedural(random: np.random.Generator, count: int) -> np.ndarray:
    """A texture, a card with lines of text, or shapes, with or without a subject that moves before it."""
    height, width = 110, 190
    picture = (_texture, _card, _shapes)[random.integers(3)](random, height, width)
    picture[:, :, 1:] = 128 + (picture[:, :, 1:] - 128) * random.uniform(0.1, 0.8)
    video = np.repeat(picture.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)[None], count, axis=0)
    if random.random() < 0.4:
        x, y, side = random.uniform(0, width), random.uniform(0, height), int(random.integers(4, 30))
        (across, down), colour = random.uniform(-5, 5, 2), random.integers(0, 255, 3)
        for index in range(count):
            left, top = int(x + across * index) % width, int(y + down * index) % height
            box = np.s_[index, :, max(0, top - side) : top + side, max(0, left - side) : left + side]
            video[box] = colour[:, None, None]
    return video


def draw_shot(random: np.random.Generator, count: int, folder: str) -> np.ndarray:
    """So many frames [T, 3, HEIGHT, WIDTH] of one shot: seen by a camera that moves, in another light."""
    shots, weights = footage(folder)
    source, first, speed = procedural(random, count), 0, 1.0
    if random.random() > 0.3:
        source = shots[random.choice(len(shots), p=weights)]
        speed = min(random.choice([0.5, 1, 1, 1, 1, 2, 2, 3, 0]), (len(source) - 1) / count)
        first = int(random.integers(0, max(1, len(source) - int(count * speed) - 1)))
    source = [source, source, source[::-1], source[..., ::-1]][random.integers(4)]
    zoom = np.full(2, random.uniform(0.4, 1) if random.random() > 0.3 else 1.0)
    if random.random() > 0.6 and zoom[0] < 1:
        zoom[1] = np.clip(zoom[0] * np.exp(random.normal(0, 0.35)), 0.2, 1)
    begin = random.uniform(0, 1, 2)
    end = begin if random.random() < 0.4 else random.uniform(0, 1, 2)
    turn = max(10, count * random.choice([0.3, 0.6, 1, 1, 2]))  # frames until the camera turns back
    shake, noise = random.choice([0, 0, 0, 0.01, 0.03]), random.choice([0, 0, 1.5, 4])
    gain = random.uniform(0.5, 1.2, 2) if random.random() < 0.25 else np.ones(2)
    passes = random.random() < 0.2  # something goes past the camera
    if random.random() < 0.45:  # nothing moves at all
        zoom[1], end, shake, noise, gain, speed, passes = zoom[0], begin, 0, 0, np.ones(2), 0, False
    light = random.uniform(0.35, 1.1) if random.random() < 0.4 else 1.0
    curve = (255 * (np.arange(256) / 255) ** random.uniform(0.7, 1.5) * light).clip(0, 255)
    colour = random.uniform(0, 1.6) if random.random() < 0.5 else 1.0
    bars = int(random.integers(2, 5)) if random.random() < 0.15 else 0
    when, pace = random.uniform(0, count), random.uniform(0.02, 0.3) * random.choice([-1, 1])
    wide, tone = random.uniform(0.05, 0.4), random.integers(20, 235, 3)
    video = np.empty((count, 3, HEIGHT, WIDTH), np.uint8)
    rows, columns = source.shape[2:]
    for index, frame in enumerate(video):
        way = 1 - abs(1 - index / turn % 2)
        scale = zoom[0] + (zoom[1] - zoom[0]) * way
        place = (begin + (end - begin) * way + random.normal(0, 1, 2) * shake).clip(0, 1)
        width, height = max(16, int(columns * scale)), max(9, int(rows * scale))
        left, top = int(place[0] * (columns - width)), int(place[1] * (rows - height))
        seen = source[min(len(source) - 1, first + int(index * speed)), :, top : top + height, left : left + width]
        small = [
            cv2.resize(np.ascontiguousarray(plane), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for plane in seen
        ]
        luma = (
            curve[small[0]] * (gain[0] + (gain[1] - gain[0]) * index / count)
            + random.normal(0, 1, small[0].shape) * noise
        )
        chroma = 128 + (np.stack(small[1:]).astype(np.float32) - 128) * colour
        frame[:] = np.concatenate([luma[None], chroma]).clip(0, 255)
        if passes:
            edge = (index - when) * pace
            frame[:, :, int(np.clip(edge, 0, 1) * WIDTH) : int(np.clip(edge + wide, 0, 1) * WIDTH)] = tone[
                :, None, None
            ]
        if bars:
            frame[0, :bars] = frame[0, -bars:] = 0
            frame[1:, :bars] = frame[1:, -bars:] = 128
    return video


def _mix(one: np.ndarray, other: np.ndarray | float, share: np.ndarray | float) -> np.ndarray:
    mixed: np.ndarray = one + (other - one.astype(np.float32)) * share
    return mixed


def _wipe(one: np.ndarray, other: np.ndarray, share: np.ndarray, random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / np.array([HEIGHT, WIDTH])[:, None, None]
    phases = [x, 1 - x, y, 1 - y, np.hypot(x - 0.5, y - 0.5) / 0.71, (x + y) / 2]
    which, soft = random.integers(6), random.choice([0.01, 0.05, 0.15])
    if which >= 4 or random.random() > 0.25:
        return _mix(one, other, ((share * (1 + soft) - phases[which]) / soft).clip(0, 1))
    pushed, axis = np.empty(one.shape, np.float32), 2 if which < 2 else 1  # the one pushes the other out
    for index in range(len(one)):
        pair = (one[index], other[index]) if which % 2 == 0 else (other[index], one[index])
        both, size = np.concatenate(pair, axis=axis), one.shape[axis + 1]
        moved = int(share[index].item() * size)
        pushed[index] = both.take(np.arange(size) + (moved if which % 2 == 0 else size - moved), axis=axis)
    return pushed


def _join(kind: str, one: np.ndarray, other: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The frames between two shots, and labels of the steps to them and out of them: 1, or -1 where either is right."""
    length = len(one)
    share = ((np.arange(length) + 1) / (length + 1))[:, None, None, None]
    share = share if random.random() < 0.7 else share**2 * (3 - 2 * share)
    hold = 0
    if kind == "dissolve":
        joined = _mix(one, other, share)
    elif kind == "wipe":
        joined = _wipe(one, other, share, random)
    else:
        level = random.choice([0, 0, 0, 255, 16]) if kind == "fade" else random.uniform(200, 255)
        tone = np.array([level, 128, 128], np.float32)[:, None, None]
        hold = int(random.choice([0, 1, 2, 6, 15, 30])) if kind == "fade" else 0
        parts = [_mix(one, tone, share), tone + np.zeros((hold, *one.shape[1:])), _mix(other, tone, share[::-1])]
        joined = np.concatenate(parts)
    label = np.ones(len(joined) + 1)
    blurred = min(2, length // 5) + (length in (3, 4))
    label[:blurred] = label[len(label) - blurred :] = -1
    if hold > 4:
        label[length + 2 : length + hold - 1] = -1
    return joined.clip(0, 255).astype(np.uint8), label


def draw_sequence(random: np.random.Generator, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Six shots joined, and the label of the step to each frame: 1 in a joint, 0 not, -1 where either is right."""
    parts = [draw_shot(random, int(random.integers(14, 70)), folder)]
    labels = [np.zeros(len(parts[0]))]
    for _ in range(5):
        kind = random.choice(list(KINDS), p=list(KINDS.values()))
        length = int(random.integers(1, 5) if kind == "flash" else random.choice(LENGTHS))
        before = parts[-1]
        length = 0 if kind == "hard" else max(0, min(length, len(before) - 4))
        shot = draw_shot(random, int(random.integers(12, 70)) + length, folder)
        if random.random() < 0.25:  # of the same light and colour
            moved = before[-1].mean((1, 2)) - shot[0].mean((1, 2))
            shot = (shot.astype(np.float32) + moved[:, None, None]).clip(0, 255).astype(np.uint8)
        joined, label = before[:0], np.ones(1)
        if length:
            joined, label = _join(kind, before[-length:], shot[:length], random)
            parts[-1], labels[-1] = before[:-length], labels[-1][: len(before) - length]
        parts.append(np.concatenate([joined, shot[length:]]))
        labels.append(np.concatenate([label, np.zeros(len(parts[-1]) - len(label))]))
    frames, label = np.concatenate(parts), np.concatenate(labels)
    for _ in range(int(random.integers(0, 4))):  # flashes within a shot are no cuts
        place, length = int(random.integers(6, len(frames) - 8)), int(random.integers(1, 4))
        if not label[place - 6 : place + length + 6].any():
            tone = np.array([random.choice([255, 255, 0]), 128, 128])[:, None, None]
            frames[place : place + length] = _mix(frames[place : place + length], tone, random.uniform(0.4, 1))
    return frames, label


def draw_steps(seed: int, count: int, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """What is measured of the steps of so many sequences, and their labels."""
    cv2.setNumThreads(1)
    random = np.random.default_rng(seed)
    found, labels = [], []
    for _ in range(count):
        frames, label = draw_sequence(random, folder)
        kinds = [np.stack(kind) for kind in zip(*map(describe, frames), strict=True)]
        padded = [np.concatenate([kind[:1].repeat(REACH, 0), kind, kind[-1:].repeat(REACH, 0)]) for kind in kinds]
        found.append(measure_steps(padded)[label >= 0].astype(np.float16))
        labels.append(label[label >= 0])
    return np.concatenate(found), np.concatenate(labels)


def teach(steps: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """The weights of a network that tells the labels; its inputs are scaled by its first layer."""
    torch.manual_seed(0)
    mean, spread = steps[::7].mean(0), steps[::7].std(0) + 1e-3
    steps = steps.sub_(mean).div_(spread)
    layers = (nn.Linear(steps.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    network, batches = nn.Sequential(*layers), len(steps) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(steps))[: batches * BATCH].reshape(batches, BATCH):
            loss = nn.functional.binary_cross_entropy_with_logits(network(steps[chosen])[:, 0], labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        sys.stderr.write(f"epoch {epoch}: loss {total / batches:.4f}\n")
    w1, b1, w2, b2, w3, b3 = (each.detach().numpy() for each in network.parameters())
    w1 = w1 / spread.numpy()
    weights = {"w1": w1.T.astype(np.float16), "b1": b1 - w1 @ mean.numpy(), "w2": w2.T, "b2": b2, "w3": w3.T, "b3": b3}
    return {name: np.ascontiguousarray(each) for name, each in weights.items()}


def main() -> None:
    """Draw, teach and write."""
    folder, target = sys.argv[1:]
    draw = partial(draw_steps, count=SEQUENCES // 8, folder=folder)
    with ProcessPoolExecutor(2) as pool:
        steps, labels = zip(*pool.map(draw, range(8)), strict=True)
    made = teach(torch.from_numpy(np.concatenate(steps)).float(), torch.from_numpy(np.concatenate(labels)).float())
    np.savez(target, allow_pickle=False, **made)


if __name__ == "__main__":
    main()
