"""DeepSpeed: its surroundings, its configuration, the engine, and weights gathered out of it."""

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from pipelines.config import PROJECT_DIR
from pipelines.errors import UserError
from pipelines.storage.cache import local_path
from pipelines.training.config import OptimizerConfig, TrainConfig
from pipelines.training.precision import has_bf16_products

DEEPSPEED_DIR = PROJECT_DIR / "infra" / "deepspeed"

# Decided by the run's config; a DeepSpeed file that sets them too would be silently at odds with it.
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "amp",
    "torch_autocast",
    "data_types",
    "communication_data_type",
)
_OFFLOADS = ("offload_optimizer", "offload_param")

Engine: TypeAlias = Any  # deepspeed.DeepSpeedEngine: the package has no types, and its import is left to the workers


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """The DeepSpeed settings a run names: a shipped file, or a path, of a store too.

    Raises:
        UserError: if there is no such file, or it sets what the run's config decides.
    """
    path = DEEPSPEED_DIR / f"{name}.json"
    if name.endswith(".json"):
        with suppress(FileNotFoundError):
            path = Path(local_path(name))
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json")))
        raise UserError(f"deepspeed: {name!r} is neither a JSON file nor a shipped name ({shipped})")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON ({error})") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization", {}), dict):
        raise UserError(f"deepspeed: {path} must hold a mapping of keys to values, and so must its zero_optimization")
    _check_zero(path, settings.get("zero_optimization", {}))
    clash = sorted(set(_OURS) & set(settings))
    if clash:
        raise UserError(
            f"deepspeed: {path} sets {', '.join(clash)}; remove them, the run's config decides these "
            "(global_batch, micro_batch_tokens, optimizer, precision)"
        )
    _check_known(path, settings)
    return settings


def _check_zero(path: Path, zero: dict[str, Any]) -> None:
    """Refuse values that what reads them here, before DeepSpeed does, would take amiss."""
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        raise UserError(f"deepspeed: {path}: zero_optimization.stage is {stage!r}: set it to 0, 1, 2 or 3")
    for key in _OFFLOADS:
        if not isinstance(zero.get(key), dict | None):
            raise UserError(f'deepspeed: {path}: zero_optimization.{key} must be a mapping such as {{"device": "cpu"}}')


def _check_known(path: Path, settings: dict[str, Any]) -> None:
    """Refuse keys that DeepSpeed does not know; most it would pass over without a word."""
    top, zero = _known_keys()
    for keys, known, prefix in (
        (settings, top, ""),
        (settings.get("zero_optimization", {}), zero, "zero_optimization."),
    ):
        for key in keys if known else ():
            if key not in known:
                close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)
                remedy = f"did you mean {close[0]}?" if close else "remove it, or see DeepSpeed's documentation"
                raise UserError(f"deepspeed: {path}: unknown key {prefix}{key}; {remedy}")


@cache
def _known_keys() -> tuple[frozenset[str], frozenset[str]]:
    """Keys of a DeepSpeed file, and of its zero_optimization, out of the package's source, for its import is costly.

    The first are all words that its readers of configs hold, and so a few that are no keys. None where it is not
    installed.
    """
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return frozenset(), frozenset()
    package = Path(spec.origin).parent
    sources = [file for name in ("*config*.py", "constants.py") for file in package.rglob(name)]
    words = {word for file in sources for word in re.findall(r"""["']([a-z]\w+)["']""", file.read_text("utf-8"))}
    zero = (package / "runtime" / "zero" / "config.py").read_text("utf-8")
    fields = re.findall(r"^    ([a-z]\w*): ", zero, re.MULTILINE) + re.findall(r"""alias=["'](\w+)["']""", zero)
    return frozenset(words), frozenset(fields)


def autocast_dtype(config: TrainConfig) -> torch.dtype | None:
    """What products are made in over float32 parameters, as a CPU has them; none: in the parameters' own dtype."""
    return torch.bfloat16 if config.precision == "bf16" and config.resources.device == "cpu" else None


def parameter_dtype(config: TrainConfig) -> torch.dtype:
    """Of the model's parameters, of which a bf16 model's optimizer has float32 masters."""
    return torch.bfloat16 if config.precision == "bf16" and config.resources.device == "gpu" else torch.float32


def check_engine(config: TrainConfig) -> None:
    """Refuse what DeepSpeed is not able to do, or does in another way than the config says.

    Raises:
        UserError: naming the keys and what to set instead.
    """
    zero = read_deepspeed_file(config.deepspeed).get("zero_optimization", {})
    stage, muon, bf16 = zero.get("stage", 0), config.optimizer.kind == "muon", parameter_dtype(config) == torch.bfloat16
    offload = {key: _offload_device(zero, key) for key in _OFFLOADS}
    where = f"deepspeed = {config.deepspeed}"
    if muon and stage == 3:
        raise UserError(f"{where} is ZeRO-3, which DeepSpeed's Muon does not work with: take zero1 or zero2, or adamw")
    if muon and offload["offload_optimizer"] != "none":
        raise UserError(
            f"{where} offloads the optimizer, which takes DeepSpeed's CPU Adam: set optimizer.kind to adamw, or take "
            "zero1 or zero2"
        )
    if bf16 and stage == 0:
        # Besides, DeepSpeed begins with an update on zero gradients there, so Adam's bias correction is one step ahead:
        # the first update has 0.74 of its size, and runs depart from those of ZeRO-1.
        raise UserError(
            f"{where} with precision = bf16 on GPUs would accumulate and reduce gradients in bf16: take zero1 (whose "
            "gradients are float32, and its optimizer divided among the workers) or precision fp32"
        )
    if bf16 and muon and stage == 2:
        raise UserError(
            f"{where} is ZeRO-2, which would accumulate Muon's gradients in bf16: take zero1, or optimizer.kind adamw"
        )
    if stage == 3 and config.model.compile:
        # Its compiler follows DeepSpeed's hooks that gather every module's weights: more graphs than it keeps.
        raise UserError(f"{where} is ZeRO-3, with which model.compile does not work: set it to false, or take zero1")
    for key, device in offload.items():
        if device not in ("none", "cpu"):
            raise UserError(f"{where}: {key}.device is {device!r}, which is not supported: cpu, or leave it out")
    if zero.get("compute_grad_norm", True) is False:
        raise UserError(f"{where} sets compute_grad_norm to false: remove it, non-finite steps are told by the norm")


def engine_settings(config: TrainConfig) -> dict[str, Any]:
    """The full DeepSpeed configuration of a run.

    One semantics: products in bf16 if the config says so, weights of the optimizer and gradients, once they are
    reduced or accumulated, in float32. A CPU has float32 parameters under autocast, on all ZeRO stages. A GPU has bf16
    parameters (2 bytes each) beside float32 masters and moments (12 bytes, divided among the workers from stage 1 on).
    Of the float32 gradients stage 1 keeps all on every worker (4 bytes a parameter), stages 2 and 3 a worker's part.
    """
    settings = read_deepspeed_file(config.deepspeed)
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        # The boundary is set by the step, whose number of micro-batches varies; this is only told from 1.
        "gradient_accumulation_steps": 2,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": parameter_dtype(config) == torch.bfloat16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # the run's own records take its place
    }
    return settings


def prepare_process(device: torch.device, *, threads: int) -> None:
    """Settle DeepSpeed and torch in a worker process. To be called before anything else imports DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # else it counts NUMA nodes by numactl
    torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _absent("mlflow"):  # DeepSpeed's autotuner, which nothing here calls, imports all of it: 500 modules
        import deepspeed.ops  # after DS_ACCELERATOR is set
    if device.type == "cpu":
        # Its shared-memory all-reduce, for which gloo stands in. DeepSpeed believes it available on any CPU and raises
        # where its build finds no compiler or ninja; where it finds them the build takes minutes, for no gain here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's Muon compiles its update, which needs a C++ compiler and gains nothing at a CPU's sizes; asking
        # torch for it alone imports its compiler.
        deepspeed.runtime.compiler.compile = lambda: lambda function: function
        if not has_bf16_products():
            from deepspeed.runtime.zero.muon import original_muon

            # DeepSpeed takes every CPU for one that multiplies in bf16, which makes Muon 25 times slower.
            original_muon.ns_compute_dtype = lambda *_: torch.float32


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """A package that is not loaded yet cannot be imported within the block."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def make_engine(module: nn.Module, config: TrainConfig) -> Engine:
    """A DeepSpeed engine with its optimizer around a module.

    Every worker must call it, within an initialised process group. The optimizer's groups hold ``lr_factor``: what
    the step's learning rate is multiplied by.
    """
    import deepspeed

    settings = engine_settings(config)
    offload = _offload_device(settings.get("zero_optimization", {}), "offload_optimizer") != "none"
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_make_optimizer(module, config.optimizer, offload=offload),
        config=settings,
        dist_init_required=False,
    )
    return engine


def _offload_device(zero: dict[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))


def _make_optimizer(module: nn.Module, options: OptimizerConfig, *, offload: bool) -> torch.optim.Optimizer:
    """AdamW; or Muon for the matrices of the decoder's blocks, and AdamW for the rest.

    Matrices decay, norms do not, and neither does the embedding, most of whose rows a batch never meets.
    """
    use_muon = options.kind == "muon"
    hidden, decayed, plain = [], [], []
    for name, parameter in module.named_parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # of one that ZeRO-3 has partitioned already
        if len(shape) != 2 or "norm" in name or "embed" in name:
            plain.append(parameter)
        elif use_muon and "lm_head" not in name:
            parameter.use_muon = True  # type: ignore[attr-defined]
            hidden.append(parameter)
        else:
            decayed.append(parameter)
    adam = {"lr": options.lr, "lr_factor": 1.0, "betas": (options.beta1, options.beta2), "eps": options.eps}
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay, **adam},
        {"params": plain, "weight_decay": 0.0, **adam},
    ]
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        on_cpu: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True)
        return on_cpu
    if not use_muon:
        return torch.optim.AdamW(groups)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = {
        "params": hidden,
        "use_muon": True,
        "lr": options.muon_lr,
        "lr_factor": options.muon_lr / options.lr,
        "momentum": options.muon_momentum,
        "weight_decay": options.weight_decay,
        "ns_method": "standard",
    }
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam([muon, *({"use_muon": False, **group} for group in groups)])
    return optimizer
