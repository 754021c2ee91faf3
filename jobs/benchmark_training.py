"""The parts of ``lumos benchmark`` about training. Ray and DeepSpeed are not needed."""

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipelines.errors import UserError

COUNT = click.IntRange(min=1)
PRESET_NAMES = ("cpu-156m", "1b-256p", "1b-384p", "3b-256p", "3b-384p")
BACKENDS = ("auto", "sdpa", "fused_cpu", "fused_flash", "fused_cudnn")
PRESET = click.option("--preset", type=click.Choice(PRESET_NAMES), default="cpu-156m", show_default=True)
REPEATS = click.option("--repeats", type=COUNT, default=7, show_default=True, help="Samples of each figure.")
JSON = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False, writable=True),
    help="Write figures, samples and machine there.",
)
DEVICE = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
BACKEND = click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)


@click.command(short_help="A training step: time, memory; on a GPU tokens/s and MFU.")
@PRESET
@REPEATS
@JSON
@DEVICE
@BACKEND
@click.option("--rows", type=COUNT, default=1, show_default=True, help="Clips of a pass, on a GPU.")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), default="none", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Blocks by torch.compile, on a GPU.")
def train(preset: str, repeats: int, json_path: Path | None, device: str, **options: Any) -> None:
    """Measure forward and backward of a clip, after a check against a dense mask and whole logits (on a CPU).

    On a CPU a float32 product of 2048x2048 is timed in turns with the steps, in float32 and bfloat16, on 2 threads;
    each peak of memory is that of a process of its own. Options after --device are for cuda.
    """
    if device == "cpu":
        context = click.get_current_context()
        names = {str(parameter.name): parameter.opts[0] for parameter in context.command.params}
        given = [names[key] for key in options if context.get_parameter_source(key) != ParameterSource.DEFAULT]
        if given:
            raise UserError(f"{', '.join(given)}: only with --device cuda; on a CPU what is measured is set")
    else:
        check_device(device, options["backend"])
    from pipelines.benchmarks.train import run_cpu_train_benchmark, run_cuda_train_benchmark

    if device == "cuda":
        write(json_path, run_cuda_train_benchmark(preset, repeats, click.echo, **options))
    else:
        write(json_path, run_cpu_train_benchmark(preset, repeats, click.echo))


@click.command(short_help="Attention against the dense mask.")
@PRESET
@REPEATS
@JSON
@DEVICE
@BACKEND
def attention(preset: str, repeats: int, json_path: Path | None, device: str, backend: Any) -> None:
    """Measure forward and backward of attention: speed, gradients and memory, at 16x24 and 32x56 cells a frame."""
    check_device(device, backend)
    from pipelines.benchmarks.layers import run_attention_benchmark

    write(json_path, run_attention_benchmark(preset, repeats, click.echo, device=device, backend=backend))


@click.command(short_help="Head and loss against whole logits.")
@PRESET
@REPEATS
@JSON
@DEVICE
def loss(preset: str, repeats: int, json_path: Path | None, device: str) -> None:
    """Measure forward and backward of head and loss: time and gradients, in float32 and bfloat16."""
    check_device(device)
    from pipelines.benchmarks.layers import run_loss_benchmark

    write(json_path, run_loss_benchmark(preset, repeats, click.echo, device=device))


def check_device(device: str, backend: str = "auto") -> None:
    """Refuse a device that is not there, and a backend of another one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; leave it out, or run where there is one")
    if backend not in ("auto", "sdpa") and (backend == "fused_cpu") != (device == "cpu"):
        raise UserError(f"--backend {backend} is not for --device {device}: take auto or sdpa")


def write(path: Path | None, found: dict[str, Any]) -> None:
    """Put what was found into a file, if one is asked for."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
