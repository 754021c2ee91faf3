"""Trains and measures tokenizers: the causal FSQ video tokenizer and the small text tokenizer of the package.

A training run is a function of its config: batches depend on (seed, step), the state is saved as it goes, and a run
that was killed continues where it was saved.
"""

import copy
import io
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lumos.config import require
from lumos.tokenizers import FsqTokenizer, TextTokenizer
from lumos.tokenizers.fsq import FsqAutoencoder, FsqConfig, load_weights, save_weights
from lumos.tokenizers.video import frames_to_unit
from pipelines import sample_corpus as corpus
from pipelines import storage
from pipelines.config import config_hash, config_to_dict, provenance
from pipelines.errors import JobError, UserError
from pipelines.training.tokenizer.data import ClipPools, ClipSource, corpus_clips, held_out_corpus_specs
from pipelines.training.tokenizer.evaluate import Measurement, measure
from pipelines.training.tokenizer.text import TextCorpus, read_corpus

_CALIBRATION_BATCHES = 24
_REPORT_SEED = 0
_LOG_FLOOR = 1e-3  # mean squared error in -1..1 (36 dB), below which a clip is good enough to weigh less
_LOG_SCALE = 0.02  # about the mean squared error of real clips, so that the other weights mean what they do beside it


@dataclass(frozen=True, kw_only=True)
class FsqTraining:
    """How an FSQ autoencoder is trained."""

    model: FsqConfig = field(default_factory=FsqConfig)
    source: ClipSource = field(default_factory=ClipSource)
    steps: int = 10_000
    batch_size: int = 10  # clips per step
    learning_rate: float = 2e-3  # of AdamW, at its peak: after a linear warmup, before a cosine decay to a fiftieth
    warmup_steps: int = 100
    weight_decay: float = 0.01
    # What is made small: the mean squared error, or the mean over clips of its logarithm, which is the mean PSNR: clips
    # that are hard weigh no more than easy ones.
    objective: Literal["squared", "log"] = "squared"
    absolute_weight: float = 0.0  # of the mean absolute error beside it; sharpens edges
    gradient_weight: float = (
        0.0  # of the mean absolute error of the steps between neighbouring pixels: edges, no mosaic
    )
    commitment: float = 0.0  # weight of the pull of latents to the middle of their level; makes codes robust to noise
    # Of the pull of latents to fill their range evenly and to be uncorrelated: more of a large codebook is used.
    spread_weight: float = 0.0
    start: str | None = None  # weights of the same `model` to begin from, in place of random ones
    ema_decay: float = 0.998  # of the moving average of the weights, which is what is written
    # Of products; bfloat16 takes half the time on CPUs that have it.
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int = 1  # of the CPU
    save_every: int = 500  # steps between the writing of weights and state
    report_clips: int = 64  # held-out clips of the sample corpus that progress is measured on; they change no weight

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "threads", "save_every", "report_clips"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "warmup_steps",
            "weight_decay",
            "absolute_weight",
            "gradient_weight",
            "commitment",
            "spread_weight",
        ):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it must not be negative")
        require(self.objective in ("squared", "log"), f"objective is {self.objective!r}; it must be squared or log")
        require(self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive")
        require(0 <= self.ema_decay < 1, f"ema_decay is {self.ema_decay}; it must be in 0..1")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """A run that makes a tokenizer: of videos if ``fsq`` is given, of text if ``text`` is."""

    KIND: ClassVar[str] = "tokenizer"

    output: str  # file to write: .safetensors for fsq, .json for text
    seed: int = 0  # decides everything
    fsq: FsqTraining | None = None
    text: TextCorpus | None = None

    def __post_init__(self) -> None:
        require((self.fsq is None) != (self.text is None), "fsq and text: give exactly one of them")
        require(self.seed >= 0, f"seed is {self.seed}; it must not be negative")
        suffix = ".safetensors" if self.fsq is not None else ".json"
        require(Path(self.output).suffix == suffix, f"output is {self.output!r}; its name must end in {suffix}")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainResult:
    """What a training run made."""

    output: str
    weights_hash: str  # "sha256:" and the file's hash
    size: int  # codes, or tokens of text
    seconds: float  # without what an interrupted run took before this one
    loss_first: float = math.nan  # mean of the first tenth of the steps of this run; of no text
    loss_last: float = math.nan  # of the last tenth
    measurement: Measurement | None = None  # on held-out clips of the sample corpus; of no text

    def __str__(self) -> str:
        lines = [f"{self.output}  {self.weights_hash}  vocabulary {self.size}  {self.seconds:.0f} s"]
        if self.measurement is not None:
            lines += [f"loss {self.loss_first:.5f} -> {self.loss_last:.5f}", str(self.measurement)]
        return "\n".join(lines)


def train_tokenizer(config: TokenizerTrainConfig) -> TokenizerTrainResult:
    """Train a tokenizer and write its file.

    Raises:
        UserError: A named file or folder is missing or unusable, `output` is no place for a file, or the state beside
            it is of another run.
        JobError: Training diverged.
    """
    started = time.monotonic()
    output = Path(config.output)
    if output.is_dir() or (output.parent.exists() and not output.parent.is_dir()):
        raise UserError(f"output: {config.output} is not a place for a file; name another")
    if config.text is not None:
        tokenizer = TextTokenizer.train(read_corpus(config.text), vocab_size=config.text.vocab_size)
        output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output)
        seconds = time.monotonic() - started
        return TokenizerTrainResult(
            output=config.output, weights_hash=tokenizer.hash, size=tokenizer.vocab_size, seconds=seconds
        )
    assert config.fsq is not None
    torch.set_num_threads(config.fsq.threads)
    state = read_state(config)  # before the data is made, which takes minutes
    run = FsqRun(config, config.fsq)
    if state is not None:
        run.restore(state)
    output.parent.mkdir(parents=True, exist_ok=True)
    losses = run.train(output)
    trained = FsqTokenizer(output)
    tenth = max(1, len(losses) // 10)
    return TokenizerTrainResult(
        output=config.output,
        weights_hash=trained.weights_hash,
        size=trained.codebook_size,
        seconds=time.monotonic() - started,
        loss_first=_mean(losses[:tenth]),
        loss_last=_mean(losses[-tenth:]),
        measurement=measure(trained, run.held_out, name="sample corpus, held out"),
    )


def _mean(losses: list[float]) -> float:
    return statistics.fmean(losses) if losses else math.nan


class FsqRun:
    """One training run of an FSQ autoencoder: model, average, optimiser, data."""

    def __init__(self, config: TokenizerTrainConfig, training: FsqTraining) -> None:
        self.config, self.training = config, training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = FsqAutoencoder(training.model)
        if training.start is not None:
            self._start(training.start)
        self.pools = ClipPools(training.source, config.seed)
        self.held_out = corpus_clips(
            held_out_corpus_specs(_REPORT_SEED, training.report_clips),
            size=48,
            num_frames=corpus.NUM_FRAMES,
            label="render held-out clips",
        )
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
        )
        self.step = 0

    def _start(self, path: str) -> None:
        try:
            model, _ = load_weights(path)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"fsq.start: {error}") from error
        if model.config != self.training.model:
            raise UserError(f"fsq.start: {path} has the sizes {model.config}; fsq.model asks for {self.training.model}")
        self.model.load_state_dict(model.state_dict())

    def train(self, output: Path) -> list[float]:
        """Run to the last step, writing weights and state as it goes; returns the losses of this call."""
        losses: list[float] = []
        report = ""
        with tqdm(total=self.training.steps, initial=self.step, desc="train FSQ", unit="step") as bar:
            while self.step < self.training.steps:
                losses.append(self.train_step())
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix_str(f"loss {_mean(losses[-50:]):.5f} {report}")
                if self.step % self.training.save_every == 0 or self.step == self.training.steps:
                    self.save(output)
                    result = measure(FsqTokenizer(output), self.held_out, name="held out")
                    report = f"psnr {result.psnr:.2f} codes {result.codes_used}"
                    line = f"step {self.step}: loss {_mean(losses[-200:]):.5f}, {result.summary()}"
                    tqdm.write(line, file=sys.stderr)
        state_file(output).unlink(missing_ok=True)
        return losses

    def train_step(self) -> float:
        """One step of the optimiser; returns the loss.

        Raises:
            JobError: It is not finite.
        """
        training = self.training
        for group in self.optimizer.param_groups:
            group["lr"] = training.learning_rate * self._rate()
        seen, wanted = (frames_to_unit(clips) for clips in self.pools.batch(self.step, training.batch_size))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16"):
            latents = self.model.encode_latents(seen).float()
            rounded = self.model.codes_to_latents(self.model.latents_to_codes(latents))
            # Straight through: rounded on the way forward, the identity on the way back.
            decoded = self.model.decode_latents(latents + (rounded - latents).detach())
        error = decoded.float() - wanted
        loss = self._objective(error)
        if training.absolute_weight:
            loss = loss + training.absolute_weight * error.abs().mean()
        if training.gradient_weight:
            steps = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
            loss = loss + training.gradient_weight * steps
        if training.spread_weight:
            loss = loss + training.spread_weight * unevenness(latents.flatten(0, 3))
        (loss + training.commitment * (latents - rounded).square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise JobError(f"training diverged at step {self.step}: loss {value}; lower fsq.learning_rate")
        self._update_average()
        return value

    def _objective(self, error: Tensor) -> Tensor:
        squared = error.square()
        if self.training.objective == "squared":
            return squared.mean()
        return _LOG_SCALE * (squared.mean(dim=(1, 2, 3, 4)) + _LOG_FLOOR).log().mean()

    def _rate(self) -> float:
        training = self.training
        warmup = min(1.0, (self.step + 1) / max(1, training.warmup_steps))
        return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / training.steps)))

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average follows closely, or the first weights would linger in it.
        weight = 1 - min(self.training.ema_decay, self.step / (self.step + 20))
        for average, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(value, weight)

    def save(self, output: Path) -> None:
        """Write the averaged weights, and beside them what a resumed run needs."""
        self._calibrate()
        about = {"train": config_to_dict(self.config), "step": self.step, "provenance": provenance()}
        save_weights(output, self.average, about)
        state: dict[str, Any] = {
            "config": _identity(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        storage.write_bytes_atomic(str(state_file(output)), buffer.getvalue())

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where a state was written."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Measure the averaged weights' latent statistics: an average of statistics lags behind the weights."""
        norm = self.average.latent_norm
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
        self.average.train()
        for index in range(_CALIBRATION_BATCHES):
            seen, _ = self.pools.batch(self.training.steps + index, self.training.batch_size)
            self.average.encode_latents(frames_to_unit(seen))
        self.average.eval()


def unevenness(latents: Float[Tensor, "cells dims"]) -> Tensor:
    """How far latents in -1..1 are from filling the range evenly, each dimension for itself; 0 where they do.

    The mean squared distance of a dimension's sorted values to even ones, plus the mean squared correlation of pairs.
    """
    count, dims = latents.shape
    even = (torch.arange(count, device=latents.device) + 0.5) * 2 / count - 1
    distance = (latents.sort(dim=0).values - even[:, None]).square().mean()
    centered = latents - latents.mean(dim=0)
    scaled = centered / centered.square().mean(dim=0).clamp(min=1e-6).sqrt()
    correlation = scaled.T @ scaled / count
    pairs = correlation.square().sum() - correlation.diagonal().square().sum()
    return distance + pairs / max(1, dims * (dims - 1))


def state_file(output: Path) -> Path:
    """Where the state of an unfinished run lies."""
    return output.with_suffix(".state.pt")


def _identity(config: TokenizerTrainConfig) -> str:
    return config_hash(config_to_dict(config) | {"output": ""})


def read_state(config: TokenizerTrainConfig) -> dict[str, Any] | None:
    """The state that an interrupted run of this config left, or None.

    Raises:
        UserError: The state beside the output is of another config.
    """
    file = state_file(Path(config.output))
    if not file.is_file():
        return None
    state: dict[str, Any] = torch.load(file, weights_only=True)
    if state["config"] != _identity(config):
        raise UserError(f"{file} belongs to a run of another config; remove it or name another output")
    tqdm.write(f"continuing {file} at step {state['step']}", file=sys.stderr)
    return state
