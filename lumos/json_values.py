"""Typed dataclasses from the untyped values of a JSON file, and the keys that they do not know kept beside them."""

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

DataclassT = TypeVar("DataclassT")


def read_dataclass(cls: type[DataclassT], raw: Any, path: str, unknown: dict[str, Any]) -> DataclassT:
    """An object of a dataclass from a JSON object.

    Args:
        cls: its fields may be plain values, literals, tuples, dataclasses and dicts; each may be None.
        raw: null stands for a key that is left out.
        path: of the object in its file, for messages.
        unknown: takes the keys that the class does not have, those of nested objects in dicts of their own.

    Raises:
        ValueError: if a value is missing, of another type or out of range; the message names the key and the value.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is {raw!r}, expected an object")
    hints = get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            unknown[key] = value
        elif value is not None:
            nested: dict[str, Any] = {}
            values[key] = _read_value(hints[key], value, f"{path}.{key}", nested)
            if nested:
                unknown[key] = nested
    known: tuple[Any, ...] = fields(cls)  # type: ignore[arg-type]
    required = (f.name for f in known if f.default is MISSING and f.default_factory is MISSING)
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_value(hint: Any, value: Any, path: str, unknown: dict[str, Any]) -> Any:
    """A JSON value as the type of a field: lists become tuples, whole numbers floats where floats are asked for."""
    origin, members = get_origin(hint), get_args(hint)
    if type(None) in members:
        return _read_value(members[0], value, path, unknown)
    if is_dataclass(hint) and isinstance(hint, type):
        return read_dataclass(hint, value, path, unknown)
    if origin is tuple and isinstance(value, list):
        kinds = members[:1] * len(value) if members[-1] is Ellipsis else members
        if len(kinds) == len(value):
            return tuple(_read_value(kind, item, path, unknown) for kind, item in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if value in members if origin is Literal else type(value) is (origin or hint):
        return value
    expected = f"one of {', '.join(members)}" if origin is Literal else str(hint).removeprefix("<class ").rstrip(">")
    raise ValueError(f"{path} is {value!r}, expected {expected}")


def merge(values: dict[str, Any], unknown: dict[str, Any]) -> dict[str, Any]:
    """Put the keys that :func:`read_dataclass` did not know back into their places."""
    nested = {key: merge(values[key], value) for key, value in unknown.items() if isinstance(values.get(key), dict)}
    return {**values, **unknown, **nested}
