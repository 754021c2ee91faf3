"""Accelerators by name: what MFU and a plan divide by. Figures are the makers' own, dense (without sparsity)."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """One device."""

    name: str
    tflops: float  # 1e12 bf16 FLOP/s of the matrix units, float32 sums, dense
    fp32_tflops: float  # 1e12 float32 FLOP/s without TF32, which training leaves off as torch does
    memory_gb: float  # 1e9 bytes

    def flops(self, precision: Literal["auto", "bf16", "fp32"]) -> float:
        """Peak FLOP/s; accelerators multiply in bf16 where they may."""
        return 1e12 * (self.tflops if precision != "fp32" else self.fp32_tflops)


# NVIDIA's data sheets: A100 (2021-06), H100 SXM (2023-04), H200 SXM (2024-11), B200 (DGX B200, 2024-12), L40S
# (2023-08), GeForce RTX 4090 (Ada whitepaper, table 2, with float32 sums). A800 and H800 compute as A100 and H100
# SXM, over slower links. Sheets of H20 and L20 are not public: their figures are those of press and resellers.
_TABLE = (
    Accelerator("A100-40GB", 312.0, 19.5, 40.0),
    Accelerator("A100-80GB", 312.0, 19.5, 80.0),
    Accelerator("A800-80GB", 312.0, 19.5, 80.0),
    Accelerator("H20", 148.0, 44.0, 96.0),
    Accelerator("H100-80GB", 989.4, 66.9, 80.0),
    Accelerator("H800-80GB", 989.4, 66.9, 80.0),
    Accelerator("H200", 989.4, 66.9, 141.0),
    Accelerator("B200", 2250.0, 75.0, 180.0),
    Accelerator("L20", 119.5, 59.8, 48.0),
    Accelerator("L40S", 362.1, 91.6, 48.0),
    Accelerator("RTX-4090", 165.2, 82.6, 24.0),
)
_OTHER_CARDS = {"pcie", "nvl", "d", "laptop"}


def find_accelerator(name: str) -> Accelerator | None:
    """The device of a name: ours (``H100-80GB``, ``h100``), or as CUDA tells it (``NVIDIA H100 80GB HBM3``).

    Of several sizes of memory the name says which; without, the largest is meant. None for a size that is not known,
    and for cards that share a name with a faster one (PCIe and NVL cards of the H family, the 4090 D and laptops').
    """
    words = _words(name)
    if words & _OTHER_CARDS and not words & {"a100", "a800"}:
        return None
    # The memory is no part of a device's name: "H100-80GB" is found as h100, "RTX-4090" as rtx and 4090.
    matches = [each for each in _TABLE if {word for word in _words(each.name) if not word.endswith("gb")} <= words]
    sized = [each for each in matches if f"{each.memory_gb:.0f}gb" in words]
    best = sized if any(re.fullmatch(r"\d+gb", word) for word in words) else matches
    return max(best, key=lambda each: each.memory_gb) if best else None


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


@dataclass(frozen=True)
class Cluster:
    """So many equal devices."""

    count: int
    device: Accelerator

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name}"


def parse_cluster(text: str, tflops: float | None = None, memory_gb: float | None = None) -> Cluster:
    """A cluster such as ``48xH20`` or ``8xH100-80GB``; or a number of devices whose figures are told.

    Raises:
        UserError: if it is neither.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:[xX*]\s*(.+?)\s*)?", text)
    count, name = (int(match[1]), match[2] or "") if match else (0, "")
    device = find_accelerator(name)
    if tflops is not None or memory_gb is not None:
        peak, memory = tflops or 0.0, memory_gb or 0.0
        told = all(0 < size < math.inf for size in (peak, memory))
        device = Accelerator("device", peak, peak, memory) if told else None
    if device is None or count < 1:
        raise UserError(
            f"--cluster {text!r}: give a number and a device, such as 48xH20 or 8xH100-80GB; known: "
            f"{', '.join(each.name for each in _TABLE)}. For another one give both --tflops and --memory-gb, above 0, "
            "and --cluster NUMBER"
        )
    return Cluster(count, device)
