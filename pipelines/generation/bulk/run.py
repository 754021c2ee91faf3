"""The command: videos for one prompt or many, by this process or by the replicas of a cluster."""

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines import storage
from pipelines.cluster import joining
from pipelines.config import config_to_dict, provenance
from pipelines.errors import JobError, UserError
from pipelines.generation.bulk.layouts import extra_files, video_folders
from pipelines.generation.bulk.manifest import Manifest
from pipelines.generation.bulk.plan import Job, check_writable, plan
from pipelines.generation.config import GenerateConfig
from pipelines.generation.model import Engine, ModelCard, model_places, read_card, set_threads
from pipelines.media import MEDIA_TYPES
from pipelines.storage.lock import dataset_lock

RUN_FILE = "generate.json"

Store = Callable[[Job, bytes], None]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """What a bulk run did."""

    output: str
    generated: int
    skipped: int  # held already
    seconds: float

    def __str__(self) -> str:
        held = f", {self.skipped} there already" if self.skipped else ""
        made = "1 video" if self.generated == 1 else f"{self.generated} videos"
        return f"{self.output}: {made} made in {self.seconds:.1f} s{held}"


def generate(config: GenerateConfig, say: Say = lambda _: None) -> GenerateResult:
    """Make the videos of a config that its output folder does not hold yet.

    An output that ends in ``.mp4``, ``.gif`` or ``.png`` is one file for one video, made anew each time. ``say`` is
    told what goes on. A run of as many videos as fit a batch on one machine is done in this process, without Ray.

    Raises:
        UserError: if model, tokenizers, prompts, size or output cannot be used, or another run writes to the output;
            no video is made then.
        JobError: if some videos could not be made; the others are there, and the same run makes the missing ones.
    """
    begin = time.monotonic()
    single = _is_file(config.output)
    card = read_card(config)
    jobs = plan(config, card)
    if single:
        _check_single(config, jobs)
    check_writable(config.output.rpartition("/")[0] or "." if single else config.output)
    try:
        # Two runs that keep one manifest would each write what the other does not know away.
        with nullcontext() if single else dataset_lock(config.output, name=f"output: {config.output}"):
            manifest = None if single else Manifest(config.output)
            pending = [job for job in jobs if manifest is None or not manifest.holds(job.row)]
            if pending:
                if (why := card.untrained(pending[0].request.size)) is not None:
                    say(f"warning: {why}")
                with joining({**model_places(config), "output": config.output}, config.cluster):
                    _make(config, card, pending, manifest, say, total=len(jobs))
            if manifest is not None:
                _write_extras(config, jobs)
    except KeyboardInterrupt:
        kept = "" if single else f"; what is in {config.output} is kept"
        raise JobError(f"interrupted{kept}: the same command continues") from None
    return GenerateResult(
        output=config.output,
        generated=len(pending),
        skipped=len(jobs) - len(pending),
        seconds=time.monotonic() - begin,
    )


def _is_file(output: str) -> bool:
    """Whether an output is a file; a ``UserError`` if it looks like one of a kind that is not written."""
    name = output.rpartition("/")[2]
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    if suffix in MEDIA_TYPES:
        return True
    if re.fullmatch(r"[a-z][a-z0-9]{1,4}", suffix) and not storage.is_dir(output):
        kinds = ", ".join(f".{kind}" for kind in MEDIA_TYPES)
        raise UserError(f"output: {output} ends in .{suffix}; one file is {kinds}, a folder of that name {output}/")
    return False


def _check_single(config: GenerateConfig, jobs: Sequence[Job]) -> None:
    if len(jobs) > 1:
        raise UserError(f"output: {config.output} is one file, for {len(jobs)} videos: name a folder")
    if not config.output.lower().endswith(f".{config.format}"):
        raise UserError(f"output: {config.output} does not end in .{config.format}: set format, or another name")
    if storage.is_local(config.output) and storage.is_dir(config.output):
        raise UserError(f"output: {config.output} is a folder: add a slash, or name another file")


def _write_note(config: GenerateConfig, card: ModelCard) -> None:
    """Note beside the videos what makes them."""
    note = {
        "config": config_to_dict(config),
        "sampling": asdict(card.sampling),
        "model": card.identity,
        "provenance": provenance(),
    }
    storage.write_json_atomic(storage.join(config.output, RUN_FILE), note)


def _write_extras(config: GenerateConfig, jobs: Sequence[Job]) -> None:
    """What a benchmark wants beside the videos; and nothing but videos where these lie."""
    for path, data in extra_files(config, [job.row for job in jobs]).items():
        storage.write_bytes_atomic(storage.join(config.output, path), data)
    for folder in video_folders(config):
        place = storage.join(config.output, folder)
        if storage.is_local(place) and storage.is_dir(place):  # not there if no entry asks for it
            for name in os.listdir(place):
                if re.fullmatch(r"\..*\.tmp", name):  # of a run that was killed as it wrote
                    storage.remove(storage.join(place, name))


def _make(
    config: GenerateConfig,
    card: ModelCard,
    pending: Sequence[Job],
    manifest: Manifest | None,
    say: Say,
    *,
    total: int,
) -> None:
    direct = _fits_here(config, len(pending))
    latents = pending[0].request.size.latent_shape[0] if direct else 1
    interval = 0.1 if sys.stderr.isatty() else 15.0
    say(f"loading {config.model}" + ("" if direct else f" into {config.replicas.num_replicas} replicas of Ray Serve"))
    begun = False

    with tqdm(
        total=total * latents,
        initial=(total - len(pending)) * latents,
        desc="frames" if direct else "videos",
        unit="latent frame" if direct else "video",
        mininterval=interval,
        delay=1e-9,  # so that it shows with the first video
    ) as bar:

        def store(job: Job, data: bytes) -> None:
            nonlocal begun
            if manifest is None:
                storage.write_bytes_atomic(config.output, data)
            else:
                if not begun:
                    _write_note(config, card)
                    begun = True
                manifest.add(job.row, data)
            if not direct:
                bar.update()

        try:
            if direct:
                _make_here(config, card, pending, store, bar)
                failures: list[str] = []
            else:
                from pipelines.generation.bulk.replicas import make_by_replicas  # brings Ray, seconds of it

                failures = make_by_replicas(config, card, pending, store)
        except OSError as error:
            raise JobError(f"cannot write to {config.output}: {error}; the same command continues") from error
        finally:
            if manifest is not None and begun:
                manifest.save()
    if failures:
        raise JobError(
            f"{len(failures)} of {len(pending)} videos were not made, first: {failures[0]}; "
            "the others are complete, and the same command makes the missing ones"
        )


def _fits_here(config: GenerateConfig, count: int) -> bool:
    """Whether so few videos are asked for, of one process on this machine, that Ray would only take time to start."""
    connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    alone = os.environ.get("RAY_ADDRESS", "local") in ("", "local") and not connected
    return alone and config.replicas.num_replicas == 1 and count <= config.batch.max_size


def _make_here(config: GenerateConfig, card: ModelCard, jobs: Sequence[Job], store: Store, bar: "tqdm[Any]") -> None:
    """Draw in this process; every kind of request in a batch of its own."""
    set_threads(config.replicas)
    engine = Engine(card.folder, config.replicas)

    def count(_place: int, _codes: NDArray[np.int64]) -> None:
        bar.update()

    kinds: dict[Any, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.request.kind, []).append(job)
    for batch in kinds.values():
        bar.update(sum((job.request.num_given + 3) // 4 for job in batch))
        files = engine.run([job.request for job in batch], lambda: False, count)
        for job, data in zip(batch, files, strict=True):
            store(job, data)
