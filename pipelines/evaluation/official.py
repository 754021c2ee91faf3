"""Results that official benchmarks wrote, and the totals that their leaderboards publish.

Dimensions, ranges and weights are those of VBench's ``scripts/constant.py`` and VBench-2.0's, sums those of their
``cal_final_score.py``, ``cal_i2v_final_score.py`` and of GenEval's ``summary_scores.py``. There, a dimension that is
missing counts 0; here there is no total without it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import storage
from pipelines.amounts import columns
from pipelines.benchmark_names import ALSO_CALLED, BenchmarkName
from pipelines.errors import UserError
from pipelines.statistics import wilson_interval


@dataclass(frozen=True)
class Dimension:
    """One dimension of a benchmark."""

    name: str  # as result files have it, in lower case
    least: float = 0.0  # the range that becomes 0..1
    most: float = 1.0
    weight: float = 1.0  # within its group


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Groups of dimensions, each a weighted mean, and the weights of the groups in the total."""

    name: BenchmarkName
    groups: Mapping[str, tuple[Dimension, ...]]
    weights: Mapping[str, float]
    least_videos: int  # results that the whole benchmark has of every dimension, at least

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """All by name."""
        return {dimension.name: dimension for group in self.groups.values() for dimension in group}


_VIDEO = {
    "subject_consistency": Dimension("subject_consistency", 0.1462),
    "background_consistency": Dimension("background_consistency", 0.2615),
    "temporal_flickering": Dimension("temporal_flickering", 0.6293),
    "motion_smoothness": Dimension("motion_smoothness", 0.706, 0.9975),
    "dynamic_degree": Dimension("dynamic_degree", weight=0.5),
    "aesthetic_quality": Dimension("aesthetic_quality"),
    "imaging_quality": Dimension("imaging_quality"),
}


def _plain(*names: str) -> tuple[Dimension, ...]:
    return tuple(Dimension(name) for name in names)


VBENCH = Benchmark(
    name="vbench",
    groups={
        "quality": tuple(_VIDEO.values()),
        "semantic": (
            *_plain("object_class", "multiple_objects", "human_action", "color", "spatial_relationship"),
            Dimension("scene", most=0.8222),
            Dimension("appearance_style", 0.0009, 0.2855),
            Dimension("temporal_style", most=0.364),
            Dimension("overall_consistency", most=0.364),
        ),
    },
    weights={"quality": 4.0, "semantic": 1.0},
    least_videos=72 * 5,  # subject_consistency's prompts are the fewest
)
VBENCH_I2V = Benchmark(
    name="vbench-i2v",
    groups={
        "i2v": (
            Dimension("camera_motion", weight=0.1),
            Dimension("i2v_subject", 0.1462),
            Dimension("i2v_background", 0.2615),
        ),
        "quality": tuple(dimension for name, dimension in _VIDEO.items() if name != "temporal_flickering"),
    },
    weights={"i2v": 1.0, "quality": 1.0},
    least_videos=109 * 5,  # i2v_background's
)
VBENCH_2 = Benchmark(
    name="vbench2",
    groups={
        "creativity": _plain("composition", "diversity"),
        "commonsense": _plain("instance_preservation", "motion_rationality"),
        "controllability": _plain(
            "camera_motion",
            "complex_landscape",
            "complex_plot",
            "dynamic_attribute",
            "dynamic_spatial_relationship",
            "human_interaction",
            "motion_order_understanding",
        ),
        "human_fidelity": _plain("human_anatomy", "human_clothes", "human_identity"),
        "physics": _plain("material", "mechanics", "multi-view_consistency", "thermotics"),
    },
    weights=dict.fromkeys(("creativity", "commonsense", "controllability", "human_fidelity", "physics"), 1.0),
    least_videos=10,  # of diversity, which compares the videos of a prompt, its ten prompts
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in (VBENCH, VBENCH_I2V, VBENCH_2)}
GENEVAL: BenchmarkName = "geneval"
_MAX_COUNTED = 5  # dimensions that are named, of those with few videos


@dataclass(frozen=True, kw_only=True)
class OfficialResults:
    """What official result files say, and the totals."""

    benchmark: str
    dimensions: Mapping[str, float]  # as the files have them
    normalized: Mapping[str, float]  # in the range that totals are made of
    groups: Mapping[str, float]  # of those that are whole
    total: float | None  # None while something is missing
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what else there is to say

    def __str__(self) -> str:
        rows = [["dimension", "score", "normalised"]]
        rows += [[name, f"{value:.4f}", f"{self.normalized[name]:.4f}"] for name, value in self.dimensions.items()]
        rows += [[f"= {name}", f"{value:.4f}", ""] for name, value in self.groups.items()]
        rows.append(["= total", "-" if self.total is None else f"{self.total:.4f}", ""])
        lines = [self.benchmark, *columns(rows)]
        if self.missing:
            lines.append(f"no total: {len(self.missing)} dimensions are missing ({', '.join(self.missing)})")
        return "\n".join([*lines, *self.notes])

    def metrics(self) -> dict[str, float]:
        """All figures by name, as MLflow records them."""
        found = {f"{self.benchmark}/{name}": value for name, value in self.dimensions.items()}
        found |= {f"{self.benchmark}/group_{name}": value for name, value in self.groups.items()}
        return found if self.total is None else {**found, f"{self.benchmark}/total": self.total}

    def as_json(self) -> dict[str, Any]:
        """The same as a file has it."""
        return {"schema": 1, **asdict(self)}


def import_results(files: Sequence[str], *, benchmark: str | None = None) -> OfficialResults:
    """Read official result files of one benchmark: ``*_eval_results.json`` of VBench's, or GenEval's JSON lines.

    Args:
        files: local or s3://; of VBench, one file for each dimension or one for several.
        benchmark: which; None: told from what the files hold.

    Raises:
        UserError: if a file is missing, of another kind, or contradicts another.
    """
    lines = [uri for uri in files if uri.endswith(".jsonl")]
    if benchmark is None and lines and len(lines) < len(files):
        other = next(uri for uri in files if uri not in lines)
        raise UserError(f"{lines[0]} is GenEval's by its ending, {other} VBench's: name the files of one benchmark")
    if benchmark == GENEVAL or (benchmark is None and lines):
        return _geneval(files)
    scores: dict[str, float] = {}
    counts: dict[str, int] = {}
    where: dict[str, str] = {}
    for uri in files:
        for name, (score, count) in _vbench_scores(uri).items():
            if scores.get(name, score) != score:
                raise UserError(
                    f"{uri} gives {name} {score:g}, {where[name]} {scores[name]:g}: name the results of one evaluation"
                )
            scores[name], where[name] = score, uri
            if count is not None:
                counts[name] = count
    named = BENCHMARKS[ALSO_CALLED.get(benchmark, benchmark)] if benchmark is not None else _benchmark_of(where)
    return _totals(named, scores, counts, where)


def _read(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except OSError as error:
        raise UserError(f"{uri} cannot be read ({error}): name files that the benchmark wrote") from error


def _vbench_scores(uri: str) -> dict[str, tuple[float, int | None]]:
    """Of what stands under each dimension's name the first item, its score, and the length of the second, a list."""
    remedy = "expected VBench's *_eval_results.json (not *_full_info.json): {dimension: [score, [...]]}"
    try:
        value = json.loads(_read(uri))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{uri} is no JSON ({error}); {remedy}") from error
    if not isinstance(value, dict) or not value:
        raise UserError(f"{uri} holds no dimensions; {remedy}")
    scores = {}
    for name, entry in value.items():
        score = entry[0] if isinstance(entry, list) and entry else entry
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise UserError(f"{uri}: {name} has no score but {str(entry)[:60]!r}; {remedy}")
        if not 0 <= score <= 1:  # NaN too
            raise UserError(f"{uri}: {name} is {score}, which is not in 0..1; totals are made of shares, not percent")
        each = entry[1] if isinstance(entry, list) and len(entry) > 1 else None
        if (known := name.lower().replace(" ", "_")) in scores:
            raise UserError(f"{uri} gives {known} twice: name the results of one evaluation")
        scores[known] = (float(score), len(each) if isinstance(each, list) and each else None)
    return scores


def _benchmark_of(where: Mapping[str, str]) -> Benchmark:
    """The benchmark that has all these dimensions, each of a file; the one for text to video if several do."""
    if fits := _having(where):
        return fits[0]
    known = set().union(*(benchmark.dimensions for benchmark in BENCHMARKS.values()))
    if unknown := sorted(where.keys() - known):
        raise UserError(f"{where[unknown[0]]}: {unknown[0]} is no dimension of any of {', '.join(BENCHMARKS)}")
    kinds = []
    for uri in dict.fromkeys(where.values()):
        names = " or ".join(each.name for each in _having([name for name in where if where[name] == uri]))
        kinds.append(f"{uri} is of {names}" if names else f"{uri} itself is of several")
    raise UserError(f"the results hold dimensions of several benchmarks ({'; '.join(kinds)}): name the files of one")


def _having(names: Iterable[str]) -> list[Benchmark]:
    return [each for each in BENCHMARKS.values() if set(names) <= each.dimensions.keys()]


def _totals(
    benchmark: Benchmark, scores: Mapping[str, float], counts: Mapping[str, int], where: Mapping[str, str]
) -> OfficialResults:
    dimensions = benchmark.dimensions
    for name in scores:
        if name not in dimensions:
            raise UserError(f"{where[name]}: {name} is no dimension of {benchmark.name}: {', '.join(dimensions)}")
    known = [name for name in dimensions if name in scores]
    normalized = {
        name: (scores[name] - dimensions[name].least) / (dimensions[name].most - dimensions[name].least)
        for name in known
    }
    groups = {
        group: sum(normalized[d.name] * d.weight for d in members) / sum(d.weight for d in members)
        for group, members in benchmark.groups.items()
        if all(d.name in normalized for d in members)
    }
    whole = len(groups) == len(benchmark.groups)
    weights = benchmark.weights
    total = sum(groups[group] * weights[group] for group in groups) / sum(weights.values()) if whole else None
    return OfficialResults(
        benchmark=benchmark.name,
        dimensions={name: scores[name] for name in known},
        normalized=normalized,
        groups=groups,
        total=total,
        missing=tuple(name for name in dimensions if name not in scores),
        notes=(*_notes_of_ranges(benchmark, scores, normalized), *_notes_of_counts(benchmark, counts)),
    )


def _notes_of_ranges(
    benchmark: Benchmark, scores: Mapping[str, float], normalized: Mapping[str, float]
) -> Iterator[str]:
    for name, share in normalized.items():
        if not 0 <= share <= 1:
            d = benchmark.dimensions[name]
            yield (
                f"{name}: {scores[name]:.4f} is outside {d.least:g} to {d.most:g}, which becomes 0 to 1; it counts as "
                f"{share:.4f}, as in the benchmark's own script"
            )


def _notes_of_counts(benchmark: Benchmark, counts: Mapping[str, int]) -> Iterator[str]:
    few = [f"{name} {count}" for name, count in counts.items() if count < benchmark.least_videos]
    if few:
        more = f" and {len(few) - _MAX_COUNTED} more" if len(few) > _MAX_COUNTED else ""
        yield (
            f"not the whole benchmark: fewer than {benchmark.least_videos} results ({', '.join(few[:_MAX_COUNTED])}"
            f"{more}); such scores cannot be compared with published ones"
        )


_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
_GENEVAL_PROMPTS, _GENEVAL_IMAGES = 553, 4  # and pictures of each


def _geneval(files: Sequence[str]) -> OfficialResults:
    """The share of correct pictures of each task, and the mean over tasks."""
    right: dict[str, list[bool]] = {}
    prompts: dict[str, int] = {}
    seen: set[str] = set()
    for uri in files:
        for number, line in enumerate(_read(uri).split(b"\n"), start=1):  # splitlines() would cut prompts too
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                tag, correct, prompt, picture = row["tag"], row["correct"], row["metadata"], str(row["filename"])
                if not isinstance(correct, bool | int) or correct not in (0, 1):
                    raise ValueError(f"correct is {correct!r}")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"{uri}, line {number}: no result of GenEval ({error!r}); expected the file that "
                    "evaluate_images.py writes, with filename, tag, prompt, correct and metadata"
                ) from error
            if picture in seen:
                raise UserError(f"{uri}, line {number}: {picture} is there twice; name each results file once")
            seen.add(picture)
            right.setdefault(str(tag), []).append(bool(correct))
            prompts[str(prompt)] = prompts.get(str(prompt), 0) + 1
    if not right:
        raise UserError(f"{', '.join(files)}: no results; expected GenEval's results.jsonl")
    shares = {tag: sum(values) / len(values) for tag, values in right.items()}
    missing = tuple(task for task in _TASKS if task not in shares)
    notes = []
    for tag, values in right.items():
        low, high = wilson_interval(sum(values), len(values))
        notes.append(f"{tag}: {sum(values)} of {len(values)} pictures, 95 % {low:.3f} to {high:.3f} (Wilson)")
    uneven = sum(count != _GENEVAL_IMAGES for count in prompts.values())
    if len(prompts) != _GENEVAL_PROMPTS or uneven:
        notes.append(
            f"not the whole benchmark: {len(prompts)} of {_GENEVAL_PROMPTS} prompts, of which {uneven} have not "
            f"{_GENEVAL_IMAGES} pictures; such a score cannot be compared with published ones"
        )
    return OfficialResults(
        benchmark=GENEVAL,
        dimensions=shares,
        normalized=shares,
        groups={},
        total=None if missing else sum(shares.values()) / len(shares),
        missing=missing,
        notes=tuple(notes),
    )
