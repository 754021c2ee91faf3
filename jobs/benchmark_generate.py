"""``lumos benchmark generate``: time and memory of drawing videos. Ray is not needed."""

from pathlib import Path
from typing import Any

import click

from jobs.benchmark_training import COUNT, DEVICE, JSON, PRESET, check_device, write

_PAGE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Drawing videos: time by size of batch, memory, share of the products' rate.")
@PRESET
@JSON
@DEVICE
@click.option("--batch", "batches", type=COUNT, multiple=True, default=(1, 2, 4, 8), show_default=True, help="Videos.")
@click.option("--repeats", type=COUNT, default=3, show_default=True, help="Videos of each size of batch, at the least.")
@click.option("--steps", type=COUNT, help="Per latent frame; 10 on a CPU and 50 on a GPU if left out.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Blocks by torch.compile.")
def generate(
    preset: str, json_path: Path | None, device: str, batches: tuple[int, ...], steps: int | None, **options: Any
) -> None:
    """Measure the sampler: seconds a video, with random weights, without the video tokenizer.

    Guidance 15, history ratio 0.7. On a CPU, on 2 threads, in products of two 2048x2048 float32 matrices timed around
    each batch; the peak of memory is that of a process of its own that draws the first batch.
    """
    check_device(device)
    from lumos.config import SamplingConfig
    from pipelines.benchmarks.generate import GenerateBenchmark, run_generate_benchmark

    sampling = SamplingConfig(num_steps=steps or (50 if device == "cuda" else 10))
    config = GenerateBenchmark(preset=preset, device=device, batches=batches, sampling=sampling, **options)
    write(json_path, run_generate_benchmark(config, click.echo))


@click.command(short_help="What shortcuts of the sampler, and hidden history, do to videos of the demo's model.")
@click.option("--model", required=True, help="Folder of a model that `lumos demo` trained.")
@JSON
@click.option("--page", type=_PAGE, help="Write an HTML page there.")
@click.option("--prompts", type=COUNT, default=32, show_default=True, help="Held-out combinations, at most 64.")
@click.option("--seeds", type=COUNT, default=3, show_default=True, help="Videos of each prompt and way.")
@click.option("--only", multiple=True, help="A way by its name, repeatable; the full sampler is always drawn.")
def sampling(json_path: Path | None, page: Path | None, **options: Any) -> None:
    """Draw the demo's held-out prompts in many ways, judge the videos, and compare with the full sampler.

    Ways draw the same prompts and seeds in turns. Intervals are of 95 %, by a bootstrap over prompts.
    """
    from pipelines.benchmarks.sampling import SamplingBenchmark, lines, run_sampling_benchmark
    from pipelines.pages.render import check_writable

    if page is not None:
        check_writable(page)
    found = run_sampling_benchmark(SamplingBenchmark(**options), page)
    for line in lines(found):
        click.echo(line)
    write(json_path, found)
