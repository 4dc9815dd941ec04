"""Parquet of any schema: only the columns that are used are decoded, and what Python has no value for becomes text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fedlora.core.errors import DataError
from fedlora.data.files.rows import NOT_VALUES, Row
from fedlora.data.files.sources import BAD_BYTES, FLOOR, PARQUET, RATIO, Source, module

T = TypeVar("T")

_ROWS = 512
"""Rows that are decoded at once."""


def read_parquet(source: Source) -> Iterator[tuple[int, Row]]:
    """Numbers are rows, from 1. Needs pyarrow."""
    arrow = module("pyarrow", source.name, "Parquet files need")
    parquet = module("pyarrow.parquet", source.name, "Parquet files need")
    if source.head()[:4] != PARQUET:
        raise DataError(f"{source.name}: not a Parquet file", hint="set data.format to what the file is, or name it so")
    whole = _whole(source)
    damaged = "is damaged, cut off or encrypted", "copy or write it again"
    file, names = _guarded(lambda: _opened(parquet, whole), source, *damaged)
    wanted = [name for name in dict.fromkeys(names) if source.wanted is None or name in source.wanted]
    if any(names.count(name) > 1 for name in wanted):
        raise DataError(f"{source.name}: a column that is used is there twice", hint="rename one of them, or remove it")
    source.unread.update({name: file.metadata.num_rows for name in names if name not in wanted})
    _check_size(_guarded(lambda: _decompressed(file.metadata, wanted), source, *damaged), source)
    number = 0
    for batch in _batches(file, wanted, source):
        here = batch.schema.names
        columns = [_values(arrow, batch.column(name)) if name in here else [None] * batch.num_rows for name in wanted]
        for values in zip(*columns, strict=True) if wanted else [()] * batch.num_rows:
            number += 1
            yield number, NOT_VALUES if any(v is _NONE for v in values) else dict(zip(wanted, values, strict=True))


def _guarded(attempt: Callable[[], T], source: Source, what: str, hint: str) -> T:
    """What an attempt gives. pyarrow's errors are of a dozen classes and may quote values: only the class is told.

    Raises:
        DataError: it fails; ``what`` says of the file what that means.
    """
    failed = ""
    try:
        return attempt()
    except MemoryError:
        raise
    except Exception as e:
        failed = type(e).__name__
    raise DataError(f"{source.name}: the Parquet file {what} ({failed})", hint=hint)


def _whole(source: Source) -> Any:
    """What pyarrow opens: the path, or the bytes of a file that is compressed once more, as Parquet is read from its end."""
    with source.open() as stream:
        return source.path if isinstance(getattr(stream, "raw", None), io.FileIO) else io.BytesIO(stream.read())


def _opened(parquet: Any, whole: Any) -> tuple[Any, list[str]]:
    file = parquet.ParquetFile(whole)
    return file, file.schema_arrow.names


def _decompressed(meta: Any, wanted: list[str]) -> int:
    """Bytes that the wanted columns say they have once decompressed."""
    groups = [meta.row_group(at) for at in range(meta.num_row_groups)]
    columns = [group.column(at) for group in groups for at in range(group.num_columns)]
    return sum(
        max(c.total_uncompressed_size, 0) for c in columns if {c.path_in_schema, c.path_in_schema.split(".")[0]} & {*wanted}
    )


def _check_size(size: int, source: Source) -> None:
    there = max(source.path.stat().st_size, 1)
    if size > FLOOR and size > RATIO * there:
        raise DataError(
            f"{source.name}: says that it decompresses to {size / 2**30:.1f} GiB, {size // there:,} times its size",
            hint="if its rows are meant, split the file: each may hold 2 GiB",
        )


def _batches(file: Any, wanted: list[str], source: Source) -> Iterator[Any]:
    batches = file.iter_batches(batch_size=_ROWS, columns=wanted, use_threads=False)
    broken = (
        "holds a column that is used and cannot be decoded",
        "it is damaged, or pyarrow lacks a feature of it: write it again",
    )
    while (batch := _guarded(lambda: next(batches, None), source, *broken)) is not None:
        source.spend(batch.nbytes)
        yield batch


# --- values ------------------------------------------------------------------------------------------------------------

_NONE = object()
"""A value that cannot be read. None is one that is not there."""


def _values(arrow: Any, array: Any) -> list[Any]:
    """The values of an array; ``_NONE`` for each that cannot be read."""
    array = _stored(arrow, array)
    found = _listed(array) if _is_plain(arrow, array.type) else None
    if found is None:
        found = _softened(arrow, array)
    if found is not None:
        return found
    return [_NONE if (one := _softened(arrow, array.slice(at, 1))) is None else one[0] for at in range(len(array))]


def _stored(arrow: Any, array: Any) -> Any:
    while isinstance(array.type, arrow.BaseExtensionType):
        array = array.storage
    return array


def _softened(arrow: Any, array: Any) -> list[Any] | None:
    """The values by way of types that every value of theirs is a Python value of: text as bytes, times as text."""
    try:
        soft = array.cast(_soft(arrow, array.type))
    except MemoryError:
        raise
    except Exception:
        soft = None
    values = None if soft is None else _listed(soft)
    return None if values is None else [_plain(v) for v in values]


def _listed(array: Any) -> list[Any] | None:
    try:
        found: list[Any] = array.to_pylist()
    except MemoryError:
        raise
    except Exception:  # text that is no UTF-8, a date beyond the year 9999 ...
        return None
    return found


def _is_plain(arrow: Any, kind: Any) -> bool:
    """Python has its values as they are, text that is UTF-8 provided."""
    t = arrow.types
    if t.is_list(kind) or t.is_large_list(kind):
        return _is_plain(arrow, kind.value_type)
    if t.is_struct(kind):
        return all(_is_plain(arrow, kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        t.is_string(kind)
        or t.is_large_string(kind)
        or t.is_integer(kind)
        or t.is_floating(kind)
        or t.is_boolean(kind)
        or t.is_null(kind)
    )


def _soft(arrow: Any, kind: Any) -> Any:
    """The type to cast to. Text becomes bytes, which need not be UTF-8; what has limits in Python becomes text."""
    t = arrow.types
    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return arrow.large_list(_soft(arrow, kind.value_type))
    if t.is_struct(kind):
        return arrow.struct([(kind.field(i).name, _soft(arrow, kind.field(i).type)) for i in range(kind.num_fields)])
    if t.is_map(kind):
        return arrow.map_(_soft(arrow, kind.key_type), _soft(arrow, kind.item_type))
    if t.is_dictionary(kind):
        return _soft(arrow, kind.value_type)
    if t.is_integer(kind) or t.is_floating(kind) or t.is_boolean(kind) or t.is_null(kind):
        return kind
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_string(kind) or t.is_large_string(kind):
        return arrow.large_binary()
    if t.is_fixed_size_binary(kind):
        return arrow.binary()
    if isinstance(kind, arrow.BaseExtensionType):
        return _soft(arrow, kind.storage_type)
    return arrow.string()


def _plain(value: Any) -> Any:
    """Bytes as text, a map as an object, inside of everything."""
    if isinstance(value, bytes):
        return value.decode("utf-8", BAD_BYTES)
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
            return {_plain(key): _plain(item) for key, item in value}
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
