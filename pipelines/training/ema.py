"""An exponential moving average of the weights, kept as the optimizer's moments are: divided among the workers."""

import torch

from pipelines.training.config import EmaConfig
from pipelines.training.engine import Engine
from pipelines.training.engine_files import EMA, master_weights, optimizer_state


@torch.no_grad()
def update_average(engine: Engine, config: EmaConfig, *, step: int) -> None:
    """After the update of 0-based ``step``: move the average, of which each worker has its part in float32.

    It begins with the weights after step ``config.start``. Being among the optimizer's state, it goes into checkpoints
    and comes out of them without more.
    """
    if step < config.start:
        return
    state = optimizer_state(engine)
    for flat, _ in master_weights(engine):
        average = state[flat].get(EMA)
        if average is None:
            state[flat][EMA] = flat.detach().clone()
        else:
            average.lerp_(flat.detach(), 1.0 - config.decay)


def forget_average(engine: Engine) -> None:
    """Drop an average that a checkpoint brought, as that of another run from which this one is forked."""
    for held in optimizer_state(engine).values():
        held.pop(EMA, None)
