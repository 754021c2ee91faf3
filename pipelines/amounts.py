"""Large figures as people read them, and rows of them in columns."""

from collections.abc import Sequence

_SIZES = (1e12, 1e9, 1e6, 1e3)


def amount(count: float) -> str:
    """A count in trillions, billions, millions or thousands."""
    return _in_units(count, ("T", "B", "M", "k"), "")


def byte_size(count: float) -> str:
    """A number of bytes in terabytes, gigabytes, megabytes or kilobytes."""
    return _in_units(count, ("TB", "GB", "MB", "kB"), " B")


def _in_units(count: float, units: Sequence[str], small: str) -> str:
    for unit, size in zip(units, _SIZES, strict=True):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}{small}"


def columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> list[str]:
    """Lines in which the cells of every column have one width, at the left or at the right of it."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    sided = (
        [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    )
    return ["  ".join(cells).rstrip() for cells in sided]
