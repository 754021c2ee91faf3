"""Whether a folder has a benchmark's layout: by the names that the benchmark's own code looks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from pipelines.errors import UserError
from pipelines.generation.bulk.layouts import MAX_NAME_BYTES, read_groups, read_rows, video_names

_MARKS = {".mp4": (4, b"ftyp"), ".png": (0, b"\x89PNG\r\n\x1a\n")}  # offset and bytes that a file has
_SHOWN = 5  # names of each kind


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """What was found; ``missing``, ``surplus`` and ``wrong`` are paths in the folder, wrong ones with the reason."""

    layout: str
    expected: int
    missing: Sequence[str]
    surplus: Sequence[str]
    wrong: Sequence[str]

    @property
    def is_valid(self) -> bool:
        """Whether the benchmark can be run."""
        return not (self.missing or self.surplus or self.wrong)

    def __str__(self) -> str:
        found = self.expected - len(self.missing)
        lines = [f"{self.layout}: {found} of {self.expected} files are there"]
        for what in ("missing", "surplus", "wrong"):
            names = getattr(self, what)
            if names:
                more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"{what} ({len(names)}): " + ", ".join(names[:_SHOWN]) + more)
        return "\n".join(lines)


def check_layout(folder: str, layout: str, prompts: str | None = None) -> LayoutReport:
    """Compare a folder with what a benchmark wants.

    Args:
        folder: local or s3://, as ``lumos generate`` with this layout makes it.
        layout: one of ``BENCHMARK_NAMES``.
        prompts: the benchmark's file; None is the one that the folder's ``generate.json`` names.

    Raises:
        UserError: if there is no such folder, or nothing says which prompts it is of.
    """
    if not storage.is_dir(folder):
        raise UserError(f"there is no folder {folder}")
    if prompts is None:
        note = storage.join(folder, "generate.json")
        if not storage.exists(note):
            raise UserError(f"{folder} has no generate.json that names the benchmark's file: give --prompts FILE")
        config: dict[str, Any] = storage.read_json(note)["config"]
        if config.get("layout") != layout:
            raise UserError(f"{note} is of layout {config.get('layout')}, not {layout}: give --prompts FILE")
        prompts = str(config["prompts"])
    return _check_geneval(folder, prompts) if layout == "geneval" else _check_videos(folder, layout, prompts)


def _check_videos(folder: str, layout: str, prompts: str) -> LayoutReport:
    groups = read_groups(layout, prompts)
    names = video_names(layout, [group.prompt for group in groups])
    wanted: dict[str, set[str]] = {"videos": set()}
    for group, name in zip(groups, names, strict=True):
        for place, count in group.counts.items():
            wanted.setdefault(place, set()).update(f"{name}-{number}.mp4" for number in range(count))
    missing, surplus, wrong = [], [], []
    for place, expected in wanted.items():
        found = _names(storage.join(folder, place))
        missing += [f"{place}/{name}" for name in sorted(expected - found)]
        surplus += [f"{place}/{name}" for name in sorted(found - expected)]
        for name in sorted(expected & found):
            wrong += _fault(folder, f"{place}/{name}", ".mp4")
            if len(name.encode()) > MAX_NAME_BYTES + 1:
                wrong.append(f"{place}/{name}: a name of more than {MAX_NAME_BYTES + 1} bytes")
    return LayoutReport(
        layout=layout,
        expected=sum(map(len, wanted.values())),
        missing=missing,
        surplus=surplus,
        wrong=wrong,
    )


def _check_geneval(folder: str, prompts: str) -> LayoutReport:
    rows = read_rows(prompts, "geneval")
    expected = {f"{index:05d}" for index in range(len(rows))}
    found = _names(storage.join(folder, "images"))
    missing, wrong = [], []
    surplus = [f"images/{name}" for name in sorted(found - expected)]
    samples = {f"{number:04d}.png" for number in range(4)}
    for index, row in enumerate(rows):
        place = f"images/{index:05d}"
        there = _names(storage.join(folder, place, "samples"))
        missing += [f"{place}/samples/{name}" for name in sorted(samples - there)]
        surplus += [f"{place}/samples/{name}" for name in sorted(there - samples)]
        for name in sorted(samples & there):
            wrong += _fault(folder, f"{place}/samples/{name}", ".png")
        metadata = storage.join(folder, place, "metadata.jsonl")
        if not storage.exists(metadata):
            missing.append(f"{place}/metadata.jsonl")
            continue
        try:
            if storage.read_json(metadata) != row:
                wrong.append(f"{place}/metadata.jsonl: not line {index + 1} of {prompts}")
        except ValueError:
            wrong.append(f"{place}/metadata.jsonl: not one JSON object")
    return LayoutReport(
        layout="geneval",
        expected=len(rows) * (len(samples) + 1),
        missing=missing,
        surplus=surplus,
        wrong=wrong,
    )


def _names(folder: str) -> set[str]:
    """Names in a folder, hidden ones too, since the benchmarks see those as well."""
    filesystem, path = storage.filesystem(folder)
    if not filesystem.exists(path):
        return set()
    return {str(name).rstrip("/").rpartition("/")[2] for name in filesystem.ls(path, detail=False)}


def _fault(folder: str, path: str, suffix: str) -> list[str]:
    offset, mark = _MARKS[suffix]
    uri = storage.join(folder, path)
    filesystem, place = storage.filesystem(uri)
    head = filesystem.cat_file(place, start=0, end=offset + len(mark))
    return [] if head[offset:] == mark else [f"{path}: no {suffix} file"]
