"""Parquet files as record batches, every checksum checked, a damaged file never read short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsakv.errors import InputError
from dsakv.trace.parquet_seal import Seal

_BUFFER_BYTES = 1 << 20
_HINT = "the file was changed or damaged after it was written, or holds what pyarrow cannot read"


class ParquetTrace:
    """An open Parquet file. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file and check its footer.

        Raises:
            InputError: it is no whole Parquet file.
            OSError: it cannot be read.
        """
        self.path = path
        self._raw = open(path, "rb")  # noqa: SIM115  closed by __exit__
        try:
            self._seal = Seal(self._raw, str(path))
            with damage(path):
                self._file = pq.ParquetFile(
                    path, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER_BYTES
                )
                self.schema: pa.Schema = self._file.schema_arrow
                self.metadata: Any = self._file.metadata
        except BaseException:
            self._raw.close()
            raise
        groups = range(self.metadata.num_row_groups)
        if sum(self.metadata.row_group(i).num_rows for i in groups) != self.metadata.num_rows:
            raise InputError(f"{path}: the row groups do not hold the file's {self.metadata.num_rows} rows", _HINT)
        if len(set(self.schema.names)) < len(self.schema.names):
            raise InputError(f"{path}: several columns have the same name", "give each its own")

    def batches(
        self, size: int, columns: Sequence[str] | None = None, row_groups: Sequence[int] | None = None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """At most ``size`` rows at a time with the number of the first one in the file, from 1.

        ``columns`` that the file does not have are passed over.

        Raises:
            InputError: the file is damaged.
            OSError: it cannot be read.
        """
        wanted = None if columns is None else [name for name in columns if name in self.schema.names]
        groups = range(self.metadata.num_row_groups) if row_groups is None else row_groups
        rows = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]
        for group in groups:
            first = 1 + sum(rows[:group])
            left = rows[group]
            self._seal.check(group)
            with damage(self.path):
                source = self._file.iter_batches(size, row_groups=[group], columns=wanted, use_threads=False)
            while True:
                with damage(self.path):
                    batch = next(source, None)
                if batch is None:
                    break
                yield first, batch
                first, left = first + len(batch), left - len(batch)
            if left:
                raise InputError(f"{self.path}: row group {group} does not hold its {rows[group]} rows", _HINT)

    def __enter__(self) -> ParquetTrace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._raw.close()


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Tell what pyarrow says of a file that is not in order from what the disk says.

    Raises:
        InputError: in place of pyarrow's errors.
        OSError: as it comes, if it is the operating system's.
    """
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{path}: damaged or no Parquet file: {text}", _HINT) from error
