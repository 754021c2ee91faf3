"""A training that is set up to the last detail, makes one step of each bucket, and leaves nothing behind.

Each step is the first that the plan has of its bucket, with its own rows. So the data was read, and the model, its
optimizer's state and the longest sequences were in the memory of every worker. Nothing stays in the output, and of a
server of MLflow it is only asked whether it answers.
"""

import math
import tempfile
import time
from dataclasses import replace
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import LoggingConfig, RunConfig, ScalingConfig

from pipelines.cluster import connect, joining
from pipelines.errors import JobError
from pipelines.training.batch_plan import PlanBucket
from pipelines.training.config import DiagnosisConfig, TrainConfig
from pipelines.training.diagnosis import peak_rss
from pipelines.training.ema import update_average
from pipelines.training.ingest import StepLoader, pack, unpack
from pipelines.training.launch import check_cluster, make_job, reason_of, worker_resources
from pipelines.training.network import NetworkConfig
from pipelines.training.output import Output
from pipelines.training.prepare import PreparedRun, prepare
from pipelines.training.resume import describe_fork, find_beginning
from pipelines.training.run import places
from pipelines.training.step import TrainStep
from pipelines.training.validate import describe
from pipelines.training.worker import Job, Worker

_SEARCHED_STEPS = 100_000  # of the plan, for one of each bucket


def dry_run(config: TrainConfig) -> list[str]:
    """Do all that a training does up to and including one step of each bucket.

    Returns:
        What was found, in lines for people: the bucket with the most latent cells first, remarks last.

    Raises:
        UserError: for anything wrong that can be known before.
        JobError: if a worker fails, such as for want of memory.
    """
    # Whatever a step tells the driver besides is left out, for there is no record that would take it.
    quiet = replace(config, diagnosis=DiagnosisConfig(phases_every=0, hang_seconds=0.0))
    prepared = prepare(quiet)
    quiet = prepared.config
    output = Output(quiet, snapshot_digest=prepared.dataset_digest, fork=describe_fork)
    output.check_writable()
    beginning = find_beginning(prepared, output)
    check_cluster(quiet)
    workers = config.min_workers or config.num_workers  # with the fewest each needs most
    resources = worker_resources(quiet)
    job = make_job(prepared, output, records=None, orders=None, beginning=beginning)
    use_gpu = "GPU" in resources
    with (
        joining(places(quiet, output), quiet.cluster),
        connect(),
        tempfile.TemporaryDirectory(prefix="lumos-dry-run-") as scratch,
    ):
        check_cluster(quiet)
        run_config: Any = RunConfig(  # its static type in Ray is that of Train V1
            name="dry-run", storage_path=scratch, logging_config=LoggingConfig(log_level="WARNING")
        )
        trainer = TorchTrainer(
            dry_worker,
            train_loop_config={"job": replace(job, storage=scratch, diagnosis_uri=scratch)},
            torch_config=NetworkConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=run_config,
        )
        try:
            result: Any = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise JobError(f"the dry run failed: {reason_of(error)}") from error
    lines = [*result.return_value]
    if workers < config.num_workers:
        lines.append(f"tried with the {workers} workers of min_workers, of which each needs more than of num_workers")
    return [*lines, *_remarks(prepared, output)]


def _remarks(prepared: PreparedRun, output: Output) -> list[str]:
    """What a training would go on in spite of."""
    silence = output.store.silence()
    remarks = [describe(prepared), silence and f"{silence}; training would go on and send its record later"]
    return [remark for remark in remarks if remark]


def dry_worker(options: dict[str, Any]) -> Any:
    """Entry point of a Ray Train worker."""
    job: Job = options["job"]
    worker = Worker(job)
    try:
        step = TrainStep(worker.engine, job.run.vocabulary, device=worker.device)
        loader = StepLoader(job.run, worker.rank, dist.get_world_size())
        indices = first_steps(job.run)
        if worker.config.ema is not None:  # the average is in memory once there was an update
            _try(worker, step, loader, indices[0])
            update_average(worker.engine, worker.config.ema, step=worker.config.ema.start)
        return [_try(worker, step, loader, index) for index in indices]
    finally:
        worker.diagnosis.close()
        worker.writer.close()


def first_steps(run: PreparedRun) -> list[int]:
    """The first step of each bucket, that with the most latent cells first; a bucket that never comes has none."""
    plan = run.plan()
    found: dict[PlanBucket, int] = {}
    for index in range(min(run.config.steps, _SEARCHED_STEPS)):
        found.setdefault(plan.step(index).bucket, index)
        if len(found) == len(plan.buckets):
            break
    return [found[bucket] for bucket in sorted(found, key=lambda bucket: math.prod(bucket.shape), reverse=True)]


def _try(worker: Worker, step: TrainStep, loader: StepLoader, index: int) -> str:
    """What a step took of time, that of a first one, and the highest memory of any worker so far."""
    (batch,) = unpack(pack([loader.load(index)]))
    began = time.perf_counter()
    with worker.diagnosis.step(index + 1):
        result = step(batch, lr=worker.config.optimizer.learning_rate(index, worker.config.steps), data_wait=0.0)
    seconds, on_gpu = time.perf_counter() - began, worker.device.type == "cuda"
    used = torch.cuda.max_memory_allocated(worker.device) if on_gpu else 0
    highest = torch.tensor([used / 1e9, peak_rss() / 1e9], device=worker.device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    device_gb, rss_gb = highest.tolist()
    memory = f"{rss_gb:.1f} GB of a process"
    if on_gpu:
        there = torch.cuda.get_device_properties(worker.device).total_memory / 1e9
        memory = f"{device_gb:.1f} of {there:.1f} GB of a device, {memory}"
    return f"{result.bucket}: {result.tokens:,} tokens, loss {result.loss:.3f}, {seconds:.1f} s, {memory}"
