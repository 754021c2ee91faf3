"""Which videos a run makes and where they lie: numbered files, or the exact names that a benchmark's code looks for.

    files       OUT/00000-a-red-square-7.mp4
    vbench      OUT/videos/{prompt}-{0..4}.mp4; OUT/flickering/{prompt}-{0..24}.mp4 of temporal_flickering's prompts
    vbench-i2v  OUT/videos/{prompt}-{0..4}.mp4
    vbench2     OUT/videos/{first 180 characters of the prompt}-{0..2, of Diversity 0..19}.mp4
    geneval     OUT/images/{00000}/metadata.jsonl, OUT/images/{00000}/samples/{0000..0003}.png

VBench takes the extension of whatever file of the folder is listed first, so videos lie alone in theirs.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lumos.compression import VideoSize
from pipelines import storage
from pipelines.errors import UserError
from pipelines.generation.bulk.commands import evaluation_script
from pipelines.generation.bulk.prompts import Prompt, read_prompts
from pipelines.generation.config import GenerateConfig
from pipelines.generation.request import file_name

EVALUATE_FILE = "evaluate.sh"
NAMES_FILE = "prompts.json"
MAX_NAME_BYTES = 216  # of a file's name, the longest that VBench has; file systems take 255
FLICKERING = "temporal_flickering"
FLICKERING_VIDEOS = 25
I2V_RATIOS = ("1-1", "8-5", "7-4", "16-9")
_SEED_STRIDE = 100  # between the first seeds of two prompts, so that every video of a benchmark has its own


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A video to make."""

    paths: tuple[str, ...]  # in the output folder: its file, and further folders that need it too
    index: int  # of its prompt in the file
    prompt: Prompt
    seed: int
    named_by: str | None = None  # the prompt of the benchmark, where its name or a longer text differs from it


@dataclass(frozen=True)
class Group:
    """A prompt of a benchmark, and how many videos it wants in which folder."""

    prompt: str
    index: int  # in the file
    counts: Mapping[str, int]  # videos by folder
    image: str | None = None


def layout_entries(config: GenerateConfig, size: VideoSize) -> list[Entry]:
    """The videos of a run; a ``UserError`` if the file is not what the layout takes."""
    if config.layout == "files":
        return _numbered(config)
    assert isinstance(config.prompts, str)
    if config.layout == "geneval":
        return _geneval(config, size)
    groups = read_groups(config.layout, config.prompts)
    texts = _long_prompts(config, [group.prompt for group in groups])
    names = video_names(config.layout, [group.prompt for group in groups])
    folder = _images_of_ratio(config.images, size) if config.images is not None else ""
    entries = []
    for group, text, name in zip(groups, texts, names, strict=True):
        prompt = Prompt(text=text, where=f"prompts: {config.prompts}, entry {group.index}")
        if group.image is not None:
            prompt = replace(prompt, image=storage.join(folder, group.image))
        for number in range(max(group.counts.values())):
            paths = tuple(f"{at}/{name}-{number}.mp4" for at, count in group.counts.items() if number < count)
            seed = config.seed + _SEED_STRIDE * group.index + number
            named_by = group.prompt if text != group.prompt else None
            entries.append(Entry(paths=paths, index=group.index, prompt=prompt, seed=seed, named_by=named_by))
    return entries


def _numbered(config: GenerateConfig) -> list[Entry]:
    """Rows without a seed that ask for the same get successive seeds, so that no two videos are equal."""
    entries, repeats = [], dict[tuple[str, str | None, str | None], int]()
    for index, prompt in enumerate(read_prompts(config.prompts)):
        same = (prompt.text, prompt.image, prompt.clip)
        first = prompt.seed
        if first is None:
            first = config.seed + repeats.setdefault(same, 0) * config.seeds_per_prompt
            repeats[same] += 1
        for seed in range(first, first + config.seeds_per_prompt):
            path = f"{index:05d}-{file_name(prompt.text, seed, config.format)}"
            entries.append(Entry(paths=(path,), index=index, prompt=prompt, seed=seed))
    return entries


def read_groups(layout: str, uri: str) -> list[Group]:
    """The prompts of one of VBench's info files; entries of one prompt are one group.

    Raises:
        UserError: if it is none.
    """
    groups: dict[str, Group] = {}
    for index, row in enumerate(read_rows(uri, layout)):
        prompt, dimensions = row.get("prompt_en"), row.get("dimension")
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(dimensions, str | list):
            raise UserError(f"prompts: {uri}, entry {index}: no prompt_en and dimension; {_remedy(layout)}")
        dimensions = [dimensions] if isinstance(dimensions, str) else dimensions
        counts = {"videos": 5}
        if layout == "vbench" and FLICKERING in dimensions:
            counts["flickering"] = FLICKERING_VIDEOS
        if layout == "vbench2":
            counts = {"videos": 20 if "Diversity" in dimensions else 3}
        image = _image_name(row, prompt) if layout == "vbench-i2v" else None
        known = groups.get(prompt)
        if known is not None:
            if known.image != image:
                raise UserError(
                    f"prompts: {uri}, entry {index}: the prompt of entry {known.index} with another picture"
                )
            merged = {at: max(known.counts.get(at, 0), counts.get(at, 0)) for at in {**known.counts, **counts}}
            groups[prompt] = replace(known, counts=merged)
        else:
            groups[prompt] = Group(prompt, index, counts, image)
    return list(groups.values())


_FILES = {
    "vbench": "VBench_full_info.json",
    "vbench-i2v": "vbench2_i2v_full_info.json",
    "vbench2": "VBench2_full_info.json",
    "geneval": "evaluation_metadata.jsonl",
}


def _remedy(layout: str) -> str:
    return f"layout {layout} takes the benchmark's own {_FILES[layout]}; for prompts of your own leave layout out"


def _image_name(row: Mapping[str, Any], prompt: str) -> str:
    """The picture of an entry; early files leave it out where a camera motion follows the picture's own prompt."""
    named = row.get("image_name")
    return named if isinstance(named, str) else f"{prompt.partition(', camera ')[0]}.jpg"


def read_rows(uri: str, layout: str) -> list[dict[str, Any]]:
    """The entries of a benchmark's file; a ``UserError`` if it cannot be read as one."""
    if not storage.exists(uri):
        raise UserError(f"prompts: there is no file {uri}; {_remedy(layout)}")
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()] if layout == "geneval" else json.loads(text)
        )
        json.dumps(rows, ensure_ascii=False).encode()  # halves of characters are in no file or name
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"prompts: {uri} cannot be read as JSON ({error}); {_remedy(layout)}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"prompts: {uri} is no list of entries; {_remedy(layout)}")
    return rows


def _long_prompts(config: GenerateConfig, prompts: Sequence[str]) -> list[str]:
    """The text to draw from for each prompt: its line of the long prompts, if such are given."""
    if config.long_prompts is None:
        return list(prompts)
    assert isinstance(config.prompts, str)
    long = [prompt.text for prompt in read_prompts(config.long_prompts)]
    rows = read_rows(config.prompts, config.layout)
    if len(long) != len(rows):
        raise UserError(
            f"long_prompts: {config.long_prompts} has {len(long)} texts, {config.prompts} {len(rows)} entries: they "
            "must correspond line by line"
        )
    text_of: dict[str, str] = {}
    for row, text in zip(rows, long, strict=True):
        text_of.setdefault(str(row.get("prompt_en", row.get("prompt"))), text)
    return [text_of[prompt] for prompt in prompts]


def video_names(layout: str, prompts: Sequence[str]) -> list[str]:
    """The name of each prompt's videos, without number and extension: what the benchmark's code looks for.

    A prompt that cannot be a name (it holds a slash, or is too long) gets one that is like it and ends in a hash;
    ``prompts.json`` has it for VBench's ``--mode custom_input``.

    Raises:
        UserError: if two prompts would have one name.
    """
    names = [prompt[:180] if layout == "vbench2" else prompt for prompt in prompts]
    legal = [name if _is_legal(name) else _legal_name(prompt) for name, prompt in zip(names, prompts, strict=True)]
    first_of: dict[str, str] = {}
    for name, prompt in zip(legal, prompts, strict=True):
        if first_of.setdefault(name, prompt) != prompt:
            raise UserError(f"prompts: {prompt[:80]!r} and {first_of[name][:80]!r} would have one name, {name[:80]!r}")
    return legal


def _is_legal(name: str) -> bool:
    is_plain = name.isprintable() and "/" not in name and not name.startswith(".")
    return is_plain and len(f"{name}-24.mp4".encode()) <= MAX_NAME_BYTES + 1  # 216 is that of a name with one digit


def _legal_name(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    plain = "".join(letter if letter.isprintable() and letter != "/" else "_" for letter in prompt).lstrip(".")
    while len(f"{plain}~{digest}-24.mp4".encode()) > MAX_NAME_BYTES + 1:
        plain = plain[:-1]
    return f"{plain}~{digest}"


def _images_of_ratio(folder: str, size: VideoSize) -> str:
    """The folder of the pictures cropped to the ratio nearest to a size, where there are several."""
    for place in (folder, storage.join(folder, "crop"), storage.join(folder, "data", "crop")):
        ratios = [name for name in I2V_RATIOS if storage.is_dir(storage.join(place, name))]
        if ratios:
            return storage.join(place, min(ratios, key=lambda name: abs(_ratio(name) - size.width / size.height)))
    if not storage.is_dir(folder):
        raise UserError(f"images: there is no folder {folder}: name VBench-I2V's data/crop, or one ratio of it")
    return folder


def _ratio(name: str) -> float:
    width, _, height = name.partition("-")
    return int(width) / int(height)


def _geneval(config: GenerateConfig, size: VideoSize) -> list[Entry]:
    assert isinstance(config.prompts, str)
    if size.num_frames != 1:
        raise UserError(f"video: layout geneval is of images, num_frames is {size.num_frames}: set video.num_frames=1")
    rows = read_rows(config.prompts, config.layout)
    for index, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str) or "include" not in row or "tag" not in row:
            raise UserError(
                f"prompts: {config.prompts}, line {index + 1}: no tag, include and prompt; {_remedy(config.layout)}"
            )
    prompts = [row["prompt"] for row in rows]
    entries = []
    for index, (prompt, text) in enumerate(zip(prompts, _long_prompts(config, prompts), strict=True)):
        where = Prompt(text=text, where=f"prompts: {config.prompts}, line {index + 1}")
        for number in range(4):
            path = f"images/{index:05d}/samples/{number:04d}.png"
            seed = config.seed + _SEED_STRIDE * index + number
            named_by = prompt if text != prompt else None
            entries.append(Entry(paths=(path,), index=index, prompt=where, seed=seed, named_by=named_by))
    return entries


def video_folders(config: GenerateConfig) -> list[str]:
    """Folders of the output in which nothing but videos may lie."""
    return {"vbench": ["videos", "flickering"], "vbench-i2v": ["videos"], "vbench2": ["videos"]}.get(config.layout, [])


def extra_files(config: GenerateConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """What a benchmark needs besides videos, by path in the output folder; ``rows`` are those of the manifest."""
    if config.layout == "files":
        return {}
    assert isinstance(config.prompts, str)
    size = f"{rows[0]['width']}x{rows[0]['height']}"
    whole_path = storage.filesystem(config.prompts)[1] if storage.is_local(config.prompts) else config.prompts
    files = {EVALUATE_FILE: evaluation_script(config.layout, whole_path, size).encode()}
    if config.layout == "geneval":
        for index, row in enumerate(read_rows(config.prompts, config.layout)):
            files[f"images/{index:05d}/metadata.jsonl"] = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
        return files
    prompts = {
        path: row.get("named_by", row["prompt"]) for row in rows for path in (row["path"], *row.get("copies", ()))
    }
    hashed = {path: prompt for path, prompt in prompts.items() if re.search(r"~[0-9a-f]{8}-\d+\.mp4$", path)}
    if hashed:
        files[NAMES_FILE] = (json.dumps(hashed, ensure_ascii=False, indent=1) + "\n").encode()
    return files
