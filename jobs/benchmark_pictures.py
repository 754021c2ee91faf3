"""What ``lumos benchmark`` measures of the pictures that the data pipeline sees: cuts, test pictures, copies."""

from pathlib import Path

import click

from jobs.benchmark_training import COUNT, JSON, write


@click.command(short_help="How well shots are parted, on cuts made of given videos.")
@JSON
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--cuts", "count", type=COUNT, default=240, show_default=True, help="To be made, of five kinds alike.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of shots and transitions.")
def cuts(json_path: Path | None, folder: Path, count: int, seed: int) -> None:
    """Join shots of real videos and see whether `split` parts them again.

    FOLDER holds cartoon_12s.mp4, great_wall_12s.mp4, sintel_30s.mp4 and slides_123s_1080p.mp4. Told are the recall of
    hard cuts, dissolves, fades, wipes and flashes, to within two frames, and the precision; PySceneDetect's detectors
    on the same films besides.
    """
    from pipelines.benchmarks.cuts import GIVEN, run_cuts_benchmark

    write(json_path, run_cuts_benchmark(folder, GIVEN, cuts=count, seed=seed, say=click.echo))


@click.command(short_help="How well test pictures, noise and text are told from real videos.")
@JSON
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--clips", type=COUNT, default=48, show_default=True, help="To be generated, of each kind.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of what is generated.")
def patterns(json_path: Path | None, folder: Path, clips: int, seed: int) -> None:
    """Generate clips of bars, planes, noise and text, all moving, and see which the default config rejects.

    FOLDER holds real videos: told is which of their clips are rejected for the same scores, plain_share and noise.
    """
    from pipelines.benchmarks.patterns import run_patterns_benchmark

    write(json_path, run_patterns_benchmark(folder, clips=clips, seed=seed, say=click.echo))


@click.command(short_help="How well copies are told from other clips of the same scene.")
@JSON
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--clips", type=COUNT, default=60, show_default=True, help="To be copied, in each of seven ways.")
@click.option("--scene", "scenes", multiple=True, help="Pattern of names of files that show one scene; repeatable.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of clips and copies.")
def duplicates(json_path: Path | None, folder: Path, clips: int, scenes: tuple[str, ...], seed: int) -> None:
    """Copy clips of real videos and see which copies are found, and which other clips are taken for copies.

    Copies are encoded anew, scaled, cropped by 5 %, later, mirrored, marked with a logo, or faster by a tenth. Other
    clips of one scene are those of one shot of a video in FOLDER, and those of files that --scene says are one.
    """
    from pipelines.benchmarks.duplicates import run_duplicates_benchmark

    found = run_duplicates_benchmark(folder, scenes=scenes, clips=clips, seed=seed, say=click.echo)
    write(json_path, found)
