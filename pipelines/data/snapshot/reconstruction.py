"""How well a tokenizer reconstructs a snapshot's own clips, by the scores of those whose codes were decoded again."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Spread:
    """One score over the clips that have it."""

    clips: int
    mean: float
    lowest: float


@dataclass(frozen=True)
class Reconstruction:
    """What a ledger says of its kept clips."""

    kept: int  # clips
    psnr: Spread | None  # dB; None where no clip was measured
    ssim: Spread | None  # also where an older program measured the clips

    def __str__(self) -> str:
        if self.psnr is None:
            return (
                f"not measured on any of {self.kept} clips; raise tokens.decode_back_share to have more decoded again"
            )
        told = f"PSNR {self.psnr.mean:.1f} dB on average, {self.psnr.lowest:.1f} dB at worst"
        if self.ssim is not None:
            told += f"; SSIM {self.ssim.mean:.3f} on average, {self.ssim.lowest:.3f} at worst"
        return f"{told} (measured on {self.psnr.clips} of {self.kept} clips)"


def read_reconstruction(pieces: Iterable[pa.Table]) -> Reconstruction:
    """From pieces of a ledger with the columns status and scores."""
    kept, found = 0, {name: [np.zeros(0)] for name in ("psnr", "ssim")}
    for piece in pieces:
        scores = piece.filter(pc.equal(piece["status"], "kept"))["scores"]
        kept += len(scores)
        for name in found.keys() & {field.name for field in scores.type}:  # an older ledger lacks some
            found[name].append(pc.struct_field(scores, name).drop_null().to_numpy())
    return Reconstruction(kept, **{name: _spread(np.concatenate(parts)) for name, parts in found.items()})


def _spread(values: NDArray[np.float64]) -> Spread | None:
    return Spread(len(values), float(values.mean()), float(values.min())) if len(values) else None
