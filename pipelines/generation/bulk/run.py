"""The command: a bulk run over prompts, and the manifest of its folder: a JSON line per video, with what made it."""

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle
from tqdm import tqdm

from lumos.encoder import RequestEncoder
from pipelines import storage
from pipelines.cluster import connect
from pipelines.config import config_to_dict, provenance
from pipelines.errors import JobError, UserError
from pipelines.generation.bulk.prompts import read_prompts
from pipelines.generation.config import MAX_SEED, GenerateConfig
from pipelines.generation.generator import ask, generator_application
from pipelines.generation.model import ModelCard, read_card
from pipelines.generation.request import Refusal, VideoRequest, file_name
from pipelines.media import MEDIA_TYPES

RUN_FILE = "generate.json"
MANIFEST_FILE = "manifest.jsonl"
_SAVE_INTERVAL_S = 5.0

Store = Callable[["_Job", bytes], None]


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


class Manifest:
    """The videos a folder holds, by file name; a ``UserError`` if what says so is damaged.

    A video is written first and its row after it, so a row always stands for a whole file. Rows are saved every few
    seconds, as whole manifests, which object stores can take too; a killed run loses the rows since then and makes
    those videos again, to the same bytes.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.uri = folder, storage.join(folder, MANIFEST_FILE)
        self.rows: dict[str, dict[str, Any]] = {}
        self._saved_at = 0.0
        try:
            if storage.exists(self.uri):
                lines = storage.read_bytes(self.uri).decode("utf-8").split("\n")  # splitlines() would cut prompts too
                rows = [json.loads(line) for line in lines if line.strip()]
                self.rows = {row["path"]: row for row in rows}
        except (NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"output: {self.uri} is no manifest of videos ({error}); name another folder, or remove it to make all "
                "videos again"
            ) from error

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether the folder has the video that a row describes (prompt, seed, config), with its bytes intact."""
        known = self.rows.get(row["path"])
        if known is None or any(known.get(key) != value for key, value in row.items()):
            return False
        try:
            return storage.sha256_file(storage.join(self.folder, row["path"])) == known.get("sha256")
        except FileNotFoundError:
            return False

    def add(self, row: dict[str, Any], data: bytes) -> None:
        """Write a video, then note its row with size and checksum."""
        storage.write_bytes_atomic(storage.join(self.folder, row["path"]), data)
        self.rows[row["path"]] = {**row, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if time.monotonic() - self._saved_at > _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write the manifest, sorted by file name, so that equal runs end with equal manifests."""
        lines = [json.dumps(row, ensure_ascii=False) for _, row in sorted(self.rows.items())]
        storage.write_bytes_atomic(self.uri, "".join(f"{line}\n" for line in lines).encode())
        self._saved_at = time.monotonic()


@dataclass(frozen=True)
class _Job:
    request: VideoRequest
    row: dict[str, Any]  # of the manifest


def generate(config: GenerateConfig) -> GenerateResult:
    """Make the videos of a config that its output folder does not hold yet.

    An output that ends in ``.mp4``, ``.gif`` or ``.png`` is one file for one video, made anew each time.

    Raises:
        UserError: if model, tokenizers, prompts, size or output cannot be used; found before Ray starts.
        JobError: if some videos could not be made; the others are there, and the same run makes the missing ones.
    """
    begin = time.monotonic()
    card = read_card(config)
    jobs = _plan(config, card)
    manifest = None if _is_file(config.output) else Manifest(config.output)
    if manifest is None:
        _check_single(config, jobs)
        pending = jobs
    else:
        pending = [job for job in jobs if not manifest.holds(job.row)]
    if pending:
        if manifest is not None:
            _write_note(config, card)
        _make(config, card, pending, manifest, total=len(jobs))
    return GenerateResult(
        output=config.output,
        generated=len(pending),
        skipped=len(jobs) - len(pending),
        seconds=time.monotonic() - begin,
    )


def _plan(config: GenerateConfig, card: ModelCard) -> list[_Job]:
    """Every video of a run, each known to fit the model."""
    encoder = RequestEncoder(card.folder)
    try:
        size = encoder.size(**asdict(config.video))
    except ValueError as error:
        raise UserError(f"video: {error}") from error
    jobs = []
    for index, prompt in enumerate(read_prompts(config.prompts)):
        first = config.seed if prompt.seed is None else prompt.seed
        for seed in range(first, first + config.seeds_per_prompt):
            try:
                if seed > MAX_SEED:
                    raise ValueError(f"seed {seed} is above 2^63-1")
                request = VideoRequest(
                    prompt=prompt.text,
                    seed=seed,
                    size=size,
                    sampling=card.sampling,
                    format=config.format,
                    motion=config.motion,
                )
                if seed == first:
                    request.encode(encoder)
            except ValueError as error:
                raise UserError(f"prompts: prompt {index} ({prompt.text[:60]!r}): {error}") from error
            row = {
                "path": f"{index:05d}-{file_name(prompt.text, seed, config.format)}",
                "index": index,
                "id": prompt.id,
                "prompt": prompt.text,
                "seed": seed,
                "config_hash": request.config_hash(card.identity),
                **asdict(size),
            }
            jobs.append(_Job(request, row))
    return jobs


def _is_file(output: str) -> bool:
    return output.rpartition(".")[2].lower() in MEDIA_TYPES


def _check_single(config: GenerateConfig, jobs: Sequence[_Job]) -> None:
    if len(jobs) > 1:
        raise UserError(f"output: {config.output} is one file, for {len(jobs)} videos: name a folder")
    if not config.output.lower().endswith(f".{config.format}"):
        raise UserError(f"output: {config.output} does not end in .{config.format}: set format, or another name")


def _write_note(config: GenerateConfig, card: ModelCard) -> None:
    """Note beside the videos what makes them; so a folder that cannot be written is found before Ray starts."""
    uri = storage.join(config.output, RUN_FILE)
    note = {
        "config": config_to_dict(config),
        "sampling": asdict(card.sampling),
        "model": card.identity,
        "provenance": provenance(),
    }
    try:
        storage.write_json_atomic(uri, note)
    except OSError as error:
        raise UserError(f"output: cannot write {uri} ({error}); name another folder") from error


def _make(
    config: GenerateConfig, card: ModelCard, pending: Sequence[_Job], manifest: Manifest | None, *, total: int
) -> None:
    def store(job: _Job, data: bytes) -> None:
        if manifest is None:
            storage.write_bytes_atomic(config.output, data)
        else:
            manifest.add(job.row, data)

    # Enough to fill a batch while another runs, and never more than the replicas' queues take.
    window = 2 * config.batch.max_size * config.replicas.num_replicas
    interval = 0.1 if sys.stderr.isatty() else 15.0
    try:
        with (
            connect(),
            generator_application(card, config) as handle,
            tqdm(total=total, initial=total - len(pending), desc="videos", unit="video", mininterval=interval) as bar,
        ):
            failures = asyncio.run(_drive(handle, pending, store, bar, window))
    except OSError as error:
        raise JobError(f"cannot write to {config.output}: {error}; the same command continues") from error
    finally:
        if manifest is not None:
            manifest.save()
    if failures:
        raise JobError(
            f"{len(failures)} of {len(pending)} videos were not made, first: {failures[0]}; "
            "the others are complete, and the same command makes the missing ones"
        )


async def _drive(
    handle: DeploymentHandle[Any], jobs: Sequence[_Job], store: Store, bar: "tqdm[Any]", window: int
) -> list[str]:
    """Send jobs to the replicas, at most ``window`` at a time; returns what went wrong."""
    places = asyncio.Semaphore(window)
    failures: list[str] = []

    async def one(job: _Job) -> None:
        async with places:
            answer = await ask(handle, job.request)
            while isinstance(answer, Refusal) and answer.reason == "full":  # one replica may have got more than others
                await asyncio.sleep(answer.retry_after_s)
                answer = await ask(handle, job.request)
        if isinstance(answer, Refusal):
            failures.append(f"{job.row['path']}: {answer.message}")
        else:
            store(job, answer)
        bar.update()

    await asyncio.gather(*map(one, jobs))
    return failures
