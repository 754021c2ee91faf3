"""Overrides: what a person decided about single clips or whole sources, against scores, duplicates and captions."""

import difflib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.keys import is_clip_key, is_source_id, source_of
from pipelines.data.reasons import overridden
from pipelines.data.steps.run import Run, Step
from pipelines.data.steps.sources import read_table
from pipelines.errors import UserError

COLUMNS = ("key", "decision", "note")  # of the table
DECISIONS = ("keep", "reject")
_NAMED = 3  # keys that an error names


@dataclass(frozen=True)
class Override:
    """A person's decision."""

    keep: bool
    note: str
    row: int  # of the table, from 1 on, not counting its head


def read_overrides(uri: str, listing: pa.Table) -> dict[str, Override]:
    """Decisions by key of a clip, source_id, or path as the listing of sources has it.

    Raises:
        UserError: the table cannot be read, or holds something else, one thing twice with two decisions, or a path that
            is not listed.
    """
    table = read_table(uri, COLUMNS[:2], "overrides", optional=COLUMNS[2:])
    paths = set(listing["path"].to_pylist())
    found: dict[str, Override] = {}
    for number, line in enumerate(table.to_pylist(), 1):
        name, decision = (str(line[column] or "").strip() for column in COLUMNS[:2])
        where = f"overrides {uri}, row {number}"
        if decision not in DECISIONS:
            raise UserError(f"{where}: decision {decision!r} of {name!r} must be {' or '.join(DECISIONS)}")
        if not (is_clip_key(name) or is_source_id(name) or name in paths):
            close = difflib.get_close_matches(name, sorted(paths), n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "take the row out"
            raise UserError(
                f"{where}: key {name!r} is neither the path of a source, nor a source_id, nor a clip's key; {remedy}"
            )
        override = Override(decision == "keep", " ".join(str(line.get("note") or "").split()), number)
        if found.setdefault(name, override).keep != override.keep:
            raise UserError(f"{where}: {name!r} is to be kept and rejected (row {found[name].row}): take one row out")
    return found


class ApplyOverrides(Step):
    """Rejects what a person rejected, and keeps what they kept, whatever the steps after this one would decide.

    What is said of a clip goes before what is said of its source.
    """

    def __init__(self, overrides: Mapping[str, Override]) -> None:
        self.overrides = overrides

    def apply(self, run: Run) -> None:
        """Decide.

        Raises:
            UserError: a clip or source that is named is not among those of the run.
        """
        of_source = self._of_sources(run)
        keys = run.clips.table["key"]
        clips = pa.array([name for name in self.overrides if is_clip_key(name)], pa.string())
        removed = set(run.removed["source_id"].to_pylist())
        there = pc.is_in(clips, keys.combine_chunks() if keys.num_chunks != 1 else keys.chunk(0)).to_pylist()
        for name, known in zip(clips.to_pylist(), there, strict=True):
            if not known and source_of(name) not in removed:
                raise UserError(_unknown(run, name, self.overrides[name]))
        sources = pa.array(list(of_source), pa.string())
        chosen = pc.or_(pc.is_in(keys, clips), pc.is_in(run.clips.table["work_key"], sources))
        for index in np.flatnonzero(chosen.to_numpy()).tolist():
            key = keys[index].as_py()
            override = self.overrides.get(key) or of_source[source_of(key)]
            if override.keep:
                run.clips.verdicts.protect(index, override.note)
            else:
                run.clips.verdicts.set(index, "rejected", overridden(override.note))

    def _of_sources(self, run: Run) -> dict[str, Override]:
        """By source_id, what is said of sources, by whatever name."""
        every = pa.concat_tables([table.select(["path", "source_id"]) for table in (run.sources, run.removed)])
        ids: dict[str, set[str]] = defaultdict(set)
        for row in every.filter(pc.is_in(every["path"], pa.array(list(self.overrides), pa.string()))).to_pylist():
            ids[row["path"]] |= {row["source_id"]} - {None}
        known = set(pc.unique(every["source_id"]).to_pylist())
        found: dict[str, Override] = {}
        for name, override in self.overrides.items():
            if is_source_id(name) and name not in known:
                raise UserError(
                    f"overrides, row {override.row}: no source has the source_id {name!r}; take the row out, or name "
                    "the source among source.path"
                )
            found |= dict.fromkeys([name] if is_source_id(name) else ids[name], override)
        return found


def _unknown(run: Run, name: str, override: Override) -> str:
    table = run.clips.table
    same = table.filter(pc.equal(table["work_key"], source_of(name)))["key"]
    others = ", ".join(same.slice(0, _NAMED).to_pylist())
    told = (
        f"its source has {len(same)} others ({others}, ...), as it was split otherwise" if others else "nor its source"
    )
    return f"overrides, row {override.row}: there is no clip {name!r}, {told}: correct the key, or take the row out"
