"""The names of the public benchmarks, as layouts, results and commands have them; imported quickly, for help texts."""

from collections.abc import Mapping
from typing import Literal, get_args

BenchmarkName = Literal["vbench", "vbench-i2v", "vbench2", "geneval"]
BENCHMARK_NAMES: tuple[BenchmarkName, ...] = get_args(BenchmarkName)
ALSO_CALLED: Mapping[str, str] = {"vbench-2.0": "vbench2"}
ACCEPTED_NAMES = (*BENCHMARK_NAMES, *ALSO_CALLED)
