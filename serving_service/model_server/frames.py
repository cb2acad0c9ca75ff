"""Data frames from JSON and to JSON, for the common cases in which MLflow's long way leads to the same.

On that way a frame is inferred, cast column by column, checked column by column and put together again. Where every
value is already of the type that the signature asks for, all that has one possible result, which is made here at once.
Everything else is declined, and MLflow decides. Whether the results are the same is what `tests/differential` asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd

Converted = Any  # an array, or None where MLflow has to decide


class FrameReader:
    """Makes the frames of one signature."""

    def __init__(self, columns: dict[str, str], required: frozenset[str]) -> None:
        self._converters = {name: _CONVERTERS[kind] for name, kind in columns.items()}
        self._required = required
        self._names = list(columns)
        self._index = pd.Index(self._names)
        self._is_all_double = set(columns.values()) == {"double"}

    @classmethod
    def of(cls, schema: Any) -> FrameReader | None:
        """None for a signature that has something else than named columns of plain types."""
        if schema is None or schema.is_tensor_spec() or not schema.has_input_names():
            return None
        columns = {spec.name: getattr(spec.type, "name", "") for spec in schema.inputs}
        if len(columns) != len(schema.inputs) or not set(columns.values()) <= _CONVERTERS.keys():
            return None
        return cls(columns, frozenset(schema.required_input_names()))

    def read(self, document: dict[str, Any]) -> pd.DataFrame | None:
        """The frame of a body with `dataframe_split` or `dataframe_records`, as the model gets it; None to decline."""
        found = _split(document["dataframe_split"]) if "dataframe_split" in document else None
        found = found or self._records(document.get("dataframe_records"))
        if found is None:
            return None
        names, rows = found
        if names == self._names and self._is_all_double:
            array = _table(rows)
            return None if array is None else pd.DataFrame(array, columns=self._index.view(), copy=False)
        given = set(names)
        if not (self._required <= given <= self._converters.keys()):
            return None
        values = dict(zip(names, zip(*rows, strict=True), strict=True))
        columns = {}
        for name in self._names:
            if name in given and (column := self._converters[name](values[name])) is None:
                return None
            if name in given:
                columns[name] = column
        return pd.DataFrame(columns)

    def _records(self, records: Any) -> tuple[list[str], list[list[Any]]] | None:
        if type(records) is not list or not records or type(records[0]) is not dict:
            return None
        keys = records[0].keys()
        if not keys <= self._converters.keys() or any(
            type(record) is not dict or record.keys() != keys for record in records
        ):
            return None
        names = [name for name in self._names if name in keys]
        return (names, [[record[name] for name in names] for record in records]) if names else None


def records(table: Any) -> list[dict[str, Any]] | None:
    """What pandas' `to_dict(orient="records")` gives for a frame or series of plain numbers; None to decline."""
    frame = pd.DataFrame(table) if isinstance(table, pd.Series) else table
    labels = frame.columns.tolist()
    if not set(map(type, labels)) <= {str, int}:
        return None
    names = list(map(str, labels))  # as JSON spells them
    dtypes = set(frame.dtypes)
    if len(set(names)) != len(names) or len(dtypes) != 1:
        return None
    dtype = dtypes.pop()
    if not isinstance(dtype, np.dtype) or dtype.kind not in "iufb" or dtype.itemsize > 8:
        return None
    return [dict(zip(names, row, strict=True)) for row in frame.to_numpy().tolist()]


def _split(split: Any) -> tuple[list[str], list[list[Any]]] | None:
    if type(split) is not dict or split.keys() != {"columns", "data"}:
        return None
    names, rows = split["columns"], split["data"]
    if type(names) is not list or not names or set(map(type, names)) != {str} or len(set(names)) != len(names):
        return None
    if type(rows) is not list or not rows or set(map(type, rows)) != {list} or set(map(len, rows)) != {len(names)}:
        return None
    return names, rows


def _table(rows: list[list[Any]]) -> Converted:
    return _numbers_of_types(set(map(type, chain.from_iterable(rows))), rows, np.dtype("float64"))


def _floating(dtype: np.dtype[Any]) -> Callable[[Sequence[Any]], Converted]:
    return lambda values: _numbers_of_types(set(map(type, values)), values, dtype)


def _numbers_of_types(types: set[type], values: Sequence[Any], dtype: np.dtype[Any]) -> Converted:
    if not types <= {float, int}:
        return None
    array = np.array(values)
    # Integers beyond 64 bits have another type; so do they in pandas, but not always the same.
    return array.astype(dtype, copy=False) if array.dtype in _PLAIN else None


def _integers(dtype: np.dtype[Any]) -> Callable[[Sequence[Any]], Converted]:
    def convert(values: Sequence[Any]) -> Converted:
        if set(map(type, values)) != {int}:
            return None
        wide = np.array(values)
        if wide.dtype != np.int64:
            return None
        narrow = wide.astype(dtype, copy=False)
        return narrow if bool((narrow == wide).all()) else None

    return convert


def _booleans(values: Sequence[Any]) -> Converted:
    return np.array(values) if set(map(type, values)) == {bool} else None


def _strings(values: Sequence[Any]) -> Converted:
    # Inferred, because what a column of strings is differs from one pandas to the next.
    return pd.Series(values).array if set(map(type, values)) == {str} else None


_PLAIN = (np.dtype("int64"), np.dtype("float64"))
_CONVERTERS: dict[str, Callable[[Sequence[Any]], Converted]] = {
    "double": _floating(np.dtype("float64")),
    "float": _floating(np.dtype("float32")),
    "long": _integers(np.dtype("int64")),
    "integer": _integers(np.dtype("int32")),
    "boolean": _booleans,
    "string": _strings,
}
