"""DeepSpeed: its surroundings, its configuration, the engine, and weights gathered out of it."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pipelines.config import PROJECT_DIR
from pipelines.errors import UserError
from pipelines.training.config import OptimizerConfig, TrainConfig

DEEPSPEED_DIR = PROJECT_DIR / "infra" / "deepspeed"

# Decided by the run's config; a DeepSpeed file that sets them too would be silently at odds with it.
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)


Engine: TypeAlias = Any  # deepspeed.DeepSpeedEngine: the package has no types, and its import is left to the workers


def read_deepspeed_file(name: str) -> dict[str, Any]:
    """The DeepSpeed settings a run names: a shipped file, or a path.

    Raises:
        UserError: if there is no such file, or it sets what the run's config decides.
    """
    path = Path(name) if name.endswith(".json") else DEEPSPEED_DIR / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in DEEPSPEED_DIR.glob("*.json")))
        raise UserError(f"deepspeed: {name!r} is neither a JSON file nor a shipped name ({shipped})")
    try:
        settings = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"deepspeed: {path} is not valid JSON ({error})") from error
    clash = sorted(set(_OURS) & set(settings))
    if clash:
        raise UserError(
            f"deepspeed: {path} sets {', '.join(clash)}; remove them, the run's config decides these "
            "(global_batch, micro_batch, optimizer, precision)"
        )
    return dict(settings)


def engine_settings(config: TrainConfig) -> dict[str, Any]:
    """The full DeepSpeed configuration of a run."""
    settings = read_deepspeed_file(config.deepspeed)
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings |= {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.optimizer.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 2**31,  # the run's own records take its place
    }
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if config.precision == "bf16" and config.micro_batches > 1 and stage:
        settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    return settings


def prepare_process(device: torch.device, *, threads: int) -> None:
    """Settle DeepSpeed and torch in a worker process. To be called before anything else imports DeepSpeed."""
    os.environ["DS_ACCELERATOR"] = "cuda" if device.type == "cuda" else "cpu"
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))  # else it counts NUMA nodes by numactl
    torch.set_num_threads(threads)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        _disable_shm_comm()
        # DeepSpeed's Muon compiles its update, which needs a C++ compiler and gains nothing at a CPU's sizes.
        torch.compiler.set_stance("force_eager")


def _disable_shm_comm() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce; gloo stands in.

    DeepSpeed believes the op available on any CPU and raises where its build finds no compiler or ninja. Where it finds
    them the build takes minutes on two busy cores and the op is no faster than gloo at these sizes, so it is off in any
    case, which also makes runs the same wherever they are.
    """
    import deepspeed.ops  # after DS_ACCELERATOR is set

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_engine(module: nn.Module, config: TrainConfig) -> Engine:
    """A DeepSpeed engine with its optimizer around a module.

    Every worker must call it, within an initialised process group. The optimizer's groups hold ``lr_factor``: what
    the step's learning rate is multiplied by.
    """
    import deepspeed

    optimizer = _muon(module, config.optimizer) if config.optimizer.kind == "muon" else _adamw(module, config.optimizer)
    settings = engine_settings(config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _adamw(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW: decay for matrices; none for norms, and none for the embedding, most of whose rows a batch never meets."""
    groups = _groups(module, hidden_apart=False)
    return torch.optim.AdamW(
        [
            {"params": groups.decayed, "weight_decay": options.weight_decay, "lr_factor": 1.0},
            {"params": groups.plain, "weight_decay": 0.0, "lr_factor": 1.0},
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
    )


def _muon(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the matrices of the decoder's blocks, AdamW as above for the rest."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    groups = _groups(module, hidden_apart=True)
    for parameter in module.parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]
    for parameter in groups.hidden:
        parameter.use_muon = True  # type: ignore[attr-defined]
    adam = {"betas": (options.beta1, options.beta2), "eps": options.eps, "lr": options.lr, "lr_factor": 1.0}
    made: torch.optim.Optimizer = MuonWithAuxAdam(
        [
            {
                "params": groups.hidden,
                "use_muon": True,
                "lr": options.muon_lr,
                "lr_factor": options.muon_lr / options.lr,
                "momentum": options.muon_momentum,
                "weight_decay": options.weight_decay,
                "ns_method": "standard",
            },
            {"params": groups.decayed, "use_muon": False, "weight_decay": options.weight_decay, **adam},
            {"params": groups.plain, "use_muon": False, "weight_decay": 0.0, **adam},
        ]
    )
    return made


@dataclass(frozen=True)
class _Groups:
    hidden: list[nn.Parameter]  # matrices of the blocks, if asked for apart
    decayed: list[nn.Parameter]
    plain: list[nn.Parameter]


def _groups(module: nn.Module, *, hidden_apart: bool) -> _Groups:
    groups = _Groups([], [], [])
    for name, parameter in module.named_parameters():
        if parameter.ndim != 2 or "norm" in name or "embed" in name:
            groups.plain.append(parameter)
        elif hidden_apart and "lm_head" not in name:
            groups.hidden.append(parameter)
        else:
            groups.decayed.append(parameter)
    return groups


def gather_weights(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Full weights in float32 on the CPU, whatever the ZeRO stage.

    Every worker must call it; those that do not ``keep`` the weights get none and need no memory for them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # the optimizer's own copy where there is one
        if keep:
            state[name] = (parameter.detach() if full is None else full).float().cpu().clone()
    return state
