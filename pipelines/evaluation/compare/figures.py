"""What a comparison of runs says: groups that differ in more than the seed, their final figures, curves and cost."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import fmean
from types import MappingProxyType
from typing import Any

from pipelines.evaluation.compare.runs import Curve, Run
from pipelines.statistics import mean_interval

# Parameters of how a run is carried out, watched and called, which never make two runs two things.
_NAMES_AND_PLACES = re.compile(
    r"output|progress|(tracking|checkpoint|samples|diagnosis|profile|recommended_sampling|sampling_choice|versions)(\..*)?|"
    r"resources\.(?!device).*|validation\.every|export_dtype|max_skipped_in_a_row|min_workers|device|world_size"
)
_SEED = "seed"
_NOT_FINAL = re.compile(r"system/.*|seconds_.*|steps_of/.*|rows_of/.*|lr.*|tokens_seen|clips_seen|epoch|restarts")
_FRAME = re.compile(r"(loss_frame_|val/frame_)\d+")
_POINTS = 400  # of a curve that is drawn
# Shown first, with what they are called on the page; smaller is better of all of them.
HEADLINES = {"val/loss": "validation loss", "loss": "training loss"}
WORDS = {
    **HEADLINES,
    "val/perplexity": "validation perplexity",
    "grad_norm": "norm of the gradients",
    "step_seconds": "seconds of a step",
    "data_wait": "seconds of a step waiting for data",
    "data_wait_share": "share of a step waiting for data",
    "masked_share": "share of masked cells",
    "tokens_per_s": "tokens/s",
    "tokens_per_s_per_device": "tokens/s of a device",
    "mfu": "MFU, counted as usual",
    "mfu_exact": "MFU of what the mask asks for",
    "memory_gb": "peak device memory, GB",
    "rss_gb": "peak memory of a process, GB",
    "perplexity": "training perplexity",
    "tokens": "tokens of a step",
    "masked_tokens": "masked tokens of a step",
    "checkpoint_seconds": "seconds that a checkpoint held up",
    "cut_captions": "captions that were cut",
    "skipped_steps": "skipped steps",
    "val/seconds": "seconds of a validation",
}


@dataclass(frozen=True)
class Figure:
    """A metric of a group: the mean over its seeds, and a 95 % interval of that mean where there are several."""

    mean: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]  # of each run


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run, or a group of them, took."""

    device_hours: float  # in steps, without starts, checkpoints and validation
    tokens: float
    flops: float | None  # 6 per weight of a matrix and token, attention left out; None: the run does not say its size
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str  # what it has that the others have not
    runs: tuple[Run, ...]
    differences: Mapping[str, str]  # the parameters that differ between groups, and what they are here
    final: Mapping[str, Figure]
    cost: Cost

    @property
    def steps(self) -> tuple[int, ...]:
        """Of each run."""
        return tuple(run.steps for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that is told of some runs."""

    groups: tuple[Group, ...]
    differing: tuple[str, ...]  # parameters
    last: int  # steps that final figures are means of

    @property
    def metrics(self) -> list[str]:
        """Names of final figures that stand for themselves, the headlines first; frames have their own table."""
        names = {name for group in self.groups for name in group.final if not _FRAME.fullmatch(name)}
        heads = [name for name in HEADLINES if name in names]
        return heads + sorted(names - set(heads))

    @property
    def frame_metrics(self) -> dict[str, list[str]]:
        """By the prefix of a loss per latent frame, its metrics in the order of the frames."""
        names = {name for group in self.groups for name in group.final if _FRAME.fullmatch(name)}
        found = {}
        for prefix, headline in (("val/frame_", "val/loss"), ("loss_frame_", "loss")):
            members = sorted(
                (name for name in names if name.startswith(prefix)), key=lambda name: int(name.removeprefix(prefix))
            )
            if members:
                found[headline] = members
        return found

    def best(self, metric: str) -> Group | None:
        """The group with the lowest mean of a headline, if others have it too."""
        rated = [group for group in self.groups if metric in group.final]
        return min(rated, key=lambda group: group.final[metric].mean) if len(rated) > 1 else None


def compare_runs(
    runs: Sequence[Run], *, last: int | None = None, neutral: Mapping[str, str] = MappingProxyType({})
) -> Comparison:
    """Group runs and work out what is told of them.

    Args:
        runs: to compare.
        neutral: of parameters that older programs did not have, the value that is the same as having none.
        last: steps at the end that final figures are means of; None: a tenth of the shortest run, 100 at most.
    """
    last = last or min(100, max(1, min(run.steps for run in runs) // 10))
    grouped: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        params = {name: value for name, value in run.params.items() if neutral.get(name) != value}
        key = tuple(sorted((name, value) for name, value in params.items() if _matters(name)))
        grouped.setdefault(key, []).append(run)
    names = sorted({name for key in grouped for name, _ in key})
    differing = [name for name in names if len({dict(key).get(name) for key in grouped}) > 1]
    groups = []
    labels: set[str] = set()
    for key, members in grouped.items():
        differences = {name: dict(key).get(name, neutral.get(name, "not set")) for name in differing}
        label = named = _label(differences, members)
        for number in count(2):  # a run may be named as another's label is numbered
            if label not in labels:
                break
            label = f"{named} ({number})"
        labels.add(label)
        groups.append(
            Group(
                label=label,
                runs=tuple(members),
                differences=differences,
                final=_final(members, last),
                cost=_sum([run_cost(run) for run in members]),
            )
        )
    return Comparison(groups=tuple(groups), differing=tuple(differing), last=last)


def _matters(name: str) -> bool:
    return name != _SEED and not _NAMES_AND_PLACES.fullmatch(name)


def _label(differences: Mapping[str, str], runs: Sequence[Run]) -> str:
    """The last part of each differing key that has a value, with it; the run's name where there is none, or no room.

    Of keys whose last parts are the same, the whole key.
    """
    ends = {name: name.rpartition(".")[2] for name in differences}
    times = Counter(ends.values())
    named = [
        f"{end if times[end] == 1 else name} {differences[name]}"
        for name, end in ends.items()
        if differences[name] != "None"
    ]
    words = ", ".join(named)
    return words if 0 < len(words) <= 60 else runs[0].name


def _final(runs: Sequence[Run], last: int) -> dict[str, Figure]:
    names = {name for run in runs for name in [*run.last, *run.curves] if not _NOT_FINAL.fullmatch(name)}
    final = {}
    for name in sorted(names):
        values = [value for run in runs if (value := _final_value(run, name, last)) is not None]
        if len(values) == len(runs):  # a mean over some of the seeds would not compare
            final[name] = Figure(fmean(values), mean_interval(values), tuple(values))
    return final


def _final_value(run: Run, name: str, last: int) -> float | None:
    """Mean over the last steps of what was read of every step; of all else the last value."""
    curve = {} if name.startswith("val/") else run.curves.get(name, {})
    recent = [value for step, value in curve.items() if step > run.steps - last]
    return fmean(recent) if recent else run.last.get(name)


def run_cost(run: Run) -> Cost:
    """Cost of a run from its curves; a value that stands for several steps counts for all of them."""
    seconds, rates, rates_of_one = (
        run.curves.get(name, {}) for name in ("step_seconds", "tokens_per_s", "tokens_per_s_per_device")
    )
    time = tokens = device_seconds = 0.0
    before, num_workers = 0, int(run.params.get("num_workers", "1"))
    for step, value in seconds.items():
        taken, rate = value * (step - before), rates.get(step, 0.0)
        time += taken
        tokens += taken * rate
        # Of a run with min_workers there may have been fewer.
        device_seconds += taken * (rate / rates_of_one[step] if rates_of_one.get(step) else num_workers)
        before = step
    tokens = max(run.curves.get("tokens_seen", {}).values(), default=tokens)
    weights = _matrix_weights(run)
    return Cost(
        device_hours=device_seconds / 3600,
        tokens=tokens,
        flops=None if weights is None else 6.0 * weights * tokens,
        tokens_per_s=tokens / time if time else 0.0,
    )


def _matrix_weights(run: Run) -> float | None:
    """Parameters but for the embedding's, which multiply nothing; found from the total, as it has two vocabularies."""
    names = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    try:
        total = int(run.tags["num_parameters"])
        hidden, wide, layers, heads, kv_heads, head_dim = (int(run.params[f"model.{name}"]) for name in names)
    except (KeyError, ValueError):
        return None
    blocks = layers * hidden * (2 * (heads + kv_heads) * head_dim + 3 * wide)
    return blocks + max(0, total - blocks) / 2


def _sum(costs: Sequence[Cost]) -> Cost:
    flops = [cost.flops for cost in costs if cost.flops is not None]
    return Cost(
        device_hours=sum(cost.device_hours for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        flops=sum(flops) if len(flops) == len(costs) else None,
        tokens_per_s=fmean(cost.tokens_per_s for cost in costs),
    )


def mean_curve(runs: Sequence[Run], name: str) -> Curve:
    """Mean of a metric over runs, at the steps that all of them have."""
    curves = [run.curves[name] for run in runs if name in run.curves]
    if len(curves) < len(runs) or not curves:
        return {}
    shared = set(curves[0]).intersection(*curves[1:])
    return {step: fmean(curve[step] for curve in curves) for step in sorted(shared)}


def thinned(curve: Curve) -> list[tuple[float, float]]:
    """A curve of few enough points to draw: means of as many neighbours as it takes."""
    points = list(curve.items())
    width = -(-len(points) // _POINTS) or 1
    parts = [points[first : first + width] for first in range(0, len(points), width)]
    return [(float(part[-1][0]), fmean(value for _, value in part)) for part in parts]


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "schema": 1,
        "last_steps": comparison.last,
        "differing": list(comparison.differing),
        "groups": [
            {
                "label": group.label,
                "differences": dict(group.differences),
                "final": {
                    name: {"mean": figure.mean, "interval95": figure.interval, "values": list(figure.values)}
                    for name, figure in group.final.items()
                },
                "cost": dict(vars(group.cost)),
                "runs": [
                    {
                        "run_id": run.run_id,
                        "name": run.name,
                        "experiment": run.experiment,
                        "status": run.status,
                        "seed": run.params.get(_SEED),
                        "steps": run.steps,
                        "cost": dict(vars(run_cost(run))),
                    }
                    for run in group.runs
                ],
            }
            for group in comparison.groups
        ],
    }


def table_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row per run for a CSV file: what it is, what differs, its final figures, its cost."""
    return [
        {
            **{name: value for name, value in run.items() if name != "cost"},
            "group": group["label"],
            **group["differences"],
            **{name: figure["values"][index] for name, figure in group["final"].items()},
            "device_hours": run["cost"]["device_hours"],
            "total_tokens": run["cost"]["tokens"],
            "flops": run["cost"]["flops"],
        }
        for group in as_json(comparison)["groups"]
        for index, run in enumerate(group["runs"])
    ]
