"""Ray Train around the workers: resources, failures that are survived, interrupts and signals that are not lost."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.util.queue import Queue

from pipelines import storage
from pipelines.cluster import is_joined, lacking
from pipelines.cores import usable_cores
from pipelines.errors import UserError, in_words
from pipelines.training.checkpoints import next_attempt
from pipelines.training.config import TrainConfig
from pipelines.training.network import NetworkConfig
from pipelines.training.output import Output
from pipelines.training.prepare import PreparedRun
from pipelines.training.progress import Progress
from pipelines.training.resume import Beginning, find_beginning
from pipelines.training.worker import Job, train_worker


def check_cluster(config: TrainConfig) -> None:
    """Refuse a cluster on which the run would wait for ever; before it is started, as far as that can be told."""
    lack = lacking(processes_of(config)) or _lacking_gpus(config)
    if lack and not (is_joined() and config.cluster.autoscaling):
        without = ", or set resources.device=cpu to train without GPUs" if config.resources.device == "gpu" else ""
        raise UserError(
            f"num_workers = {config.num_workers} workers and their loaders need {lack}: lower num_workers, "
            f"resources.cpus_per_worker or resources.cpus_per_loader{without}"
        )


def _lacking_gpus(config: TrainConfig) -> str:
    """What of GPUs is lacking, in the words of ``lacking``, which before Ray has started here cannot tell of them."""
    wanted = sum(needs.get("GPU", 0.0) for needs in processes_of(config))
    if not wanted or is_joined() or ray.is_initialized():
        return ""
    there = torch.cuda.device_count()
    return f"{wanted:g} GPU (there is {there})" if wanted > there else ""


def processes_of(config: TrainConfig) -> list[dict[str, float]]:
    """What Ray reserves for the fewest workers that train, and for their loaders."""
    return [worker_resources(config), {"CPU": config.resources.cpus_per_loader}] * (
        config.min_workers or config.num_workers
    )


def worker_resources(config: TrainConfig) -> dict[str, float]:
    """What Ray reserves for each worker."""
    gpus = {"GPU": 1.0} if config.resources.device == "gpu" else {}
    return {"CPU": config.resources.cpus_per_worker, **gpus}


def worker_threads(config: TrainConfig) -> int:
    """Torch's threads of each worker: unless named, as if all workers shared this machine."""
    return config.resources.threads_per_worker or max(1, usable_cores() // config.num_workers)


def make_job(
    prepared: PreparedRun,
    output: Output,
    *,
    records: Queue | None,
    orders: Queue | None,
    beginning: Beginning | None = None,
) -> Job:
    """What the workers are told."""
    config = prepared.config
    resume_from = beginning.checkpoint.uri if beginning and beginning.checkpoint else None
    own = config if resume_from is None else replace(config, init_from=None)  # it may be gone
    return Job(
        run=replace(prepared, config=_with_whole_paths(own)),
        identity_hash=output.identity_hash,
        storage=output.storage,
        attempt=next_attempt(output.storage),
        records=records,
        orders=orders,
        resume_from=resume_from,
        threads=worker_threads(config),
        diagnosis_uri=output.profile,
    )


def _with_whole_paths(config: TrainConfig) -> TrainConfig:
    """The config for workers, which have another working directory."""
    scratch, init_from, deepspeed = config.checkpoint.scratch, config.init_from, config.deepspeed
    return replace(
        config,
        init_from=storage.filesystem(init_from)[1] if init_from and storage.is_local(init_from) else init_from,
        deepspeed=os.path.abspath(deepspeed) if deepspeed.endswith(".json") else deepspeed,
        checkpoint=replace(
            config.checkpoint, scratch=os.path.abspath(os.path.expanduser(scratch)) if scratch else None
        ),
    )


def fit_with_patience(job: Job, prepared: PreparedRun, output: Output, progress: Progress) -> Any:
    """Ray Train's ``fit``, begun anew after its last failure if there is a newer checkpoint than it began with."""
    begun = job.resume_from
    while True:
        try:
            return _trainer(job, output).fit()
        except ray.train.TrainingFailedError as error:
            beginning = find_beginning(prepared, output)
            newest = beginning.checkpoint.uri if beginning.checkpoint else None
            if newest is None or newest == begun:
                raise
            begun = newest
            progress.say(f"failed ({reason_of(error)}), but went on since: continuing from step {beginning.step}")
            job = replace(job, resume_from=newest, attempt=next_attempt(output.storage))


@contextmanager
def saved_on_sigterm(orders: Queue, progress: Progress, at_work: Callable[[], bool]) -> Iterator[None]:
    """A first SIGTERM lets the workers save a checkpoint and stop; a second one ends the process.

    Before workers are at work, which may take hours on a full cluster, the first one is an interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        if not at_work():
            progress.say("SIGTERM: no worker is at work yet, so there is nothing to save")
            raise KeyboardInterrupt  # SIGINT is Ray Train's, whose answer waits while it looks for room
        progress.say("SIGTERM: saving a checkpoint, then ending")
        actor: Any = orders.actor
        actor.put_nowait.remote("stop")

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ray Train's handler of Ctrl-C ends the process with status 0, and stays; here it is an interrupt as any other."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _trainer(job: Job, output: Output) -> TorchTrainer:
    config = job.run.config
    resources = worker_resources(config)
    use_gpu = "GPU" in resources
    filesystem, path = storage.arrow_filesystem(output.storage)
    elastic = config.min_workers is not None and config.min_workers < config.num_workers
    workers: Any = (config.min_workers, config.num_workers) if elastic else config.num_workers
    run_config: Any = RunConfig(  # its static type in Ray is that of Train V1
        name=job.attempt,
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=FailureConfig(max_failures=config.checkpoint.max_failures),
        checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=NetworkConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=run_config,
    )


def reason_of(error: Exception) -> str:
    """What went wrong, in one line: the first worker's own error where there is one."""
    failures = getattr(error, "worker_failures", None) or {}
    return in_words(failures[min(failures)] if failures else error, last_line=True)
