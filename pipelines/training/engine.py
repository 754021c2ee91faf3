"""DeepSpeed: its surroundings, its configuration, the engine, and weights gathered out of it."""

import json
import logging
import os
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
        import deepspeed.ops  # after DS_ACCELERATOR is set

        # Its shared-memory all-reduce, for which gloo stands in. DeepSpeed believes it available on any CPU and raises
        # where its build finds no compiler or ninja; where it finds them the build takes minutes, for no gain here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed's Muon compiles its update, which needs a C++ compiler and gains nothing at a CPU's sizes.
        torch.compiler.set_stance("force_eager")


def make_engine(module: nn.Module, config: TrainConfig) -> Engine:
    """A DeepSpeed engine with its optimizer around a module.

    Every worker must call it, within an initialised process group. The optimizer's groups hold ``lr_factor``: what
    the step's learning rate is multiplied by.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=_make_optimizer(module, config.optimizer),
        config=engine_settings(config),
        dist_init_required=False,
    )
    return engine


def _make_optimizer(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; or Muon for the matrices of the decoder's blocks, and AdamW for the rest.

    Matrices decay, norms do not, and neither does the embedding, most of whose rows a batch never meets.
    """
    use_muon = options.kind == "muon"
    hidden, decayed, plain = [], [], []
    for name, parameter in module.named_parameters():
        parameter.use_muon = False  # type: ignore[attr-defined]
        if parameter.ndim != 2 or "norm" in name or "embed" in name:
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
