"""Device storage of the rows that bundles read and write."""

from dataclasses import dataclass

import torch

from server.engine.entries import Entries
from server.engine.program import Program


class RowPoolFullError(ValueError):
    """The bundle needs more rows than the pool has free; nothing was changed."""


@dataclass(frozen=True)
class Resident:
    """A program whose rows are in the pool.

    Attributes:
        program: what the bundle does.
        places: pool row of each of the program's rows.
        entries: its steps as they stand in the operation table.
        checksum: what the caller knows the program by.
    """

    program: Program
    places: tuple[int, ...]
    entries: Entries
    checksum: str


class RowPool:
    """Rows of every resident bundle, allocated once and only ever rewritten in place.

    Attributes:
        rows: [num_rows, hidden_size], dtype of the model. Its address never changes, because CUDA graphs replay with
            the pointer captured once.
    """

    def __init__(self, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device)
        self._free = list(range(num_rows))
        self._residents: dict[str, Resident] = {}

    def load(self, bundle: str, program: Program, checksum: str = "") -> None:
        """Store a bundle's rows; one that is resident already is left as it is.

        Args:
            bundle: program key.
            program: what it does.
            checksum: of the program, to tell later whether another one of the same key is the same.

        Raises:
            RowPoolFullError: too few free rows.
            ValueError: a row has another length, or a value is not finite in the model's dtype.

            Whatever it raises, nothing was changed.
        """
        if bundle in self._residents:
            return
        rows = program.rows
        if rows.shape[0] > len(self._free):
            raise RowPoolFullError(
                f"{bundle} needs {rows.shape[0]} rows, {len(self._free)} of {self.rows.shape[0]} are free; "
                "raise --steering-rows or load fewer bundles."
            )
        if rows.dim() != 2 or rows.shape[1] != self.rows.shape[1]:
            raise ValueError(
                f"{bundle} has rows {tuple(rows.shape)}, the model takes [num_rows, {self.rows.shape[1]}]."
            )
        cast = rows.to(self.rows)
        if not torch.isfinite(cast).all():
            raise ValueError(f"{bundle} has values that overflow the model's {self.rows.dtype}.")
        places = tuple(self._free[: rows.shape[0]])
        resident = Resident(program, places, Entries.of(program, places), checksum)
        if places:
            self.rows[list(places)] = cast
        del self._free[: len(places)]
        self._residents[bundle] = resident

    def unload(self, bundle: str) -> None:
        """Give a bundle's rows back; the caller makes sure that no request uses it."""
        resident = self._residents.pop(bundle, None)
        if resident is not None:
            self._free.extend(resident.places)

    def __getitem__(self, bundle: str) -> Resident:
        """The resident program of a key. Raises KeyError for an unknown one."""
        return self._residents[bundle]

    def __contains__(self, bundle: object) -> bool:
        return bundle in self._residents

    @property
    def bundles(self) -> list[str]:
        """Keys of the resident bundles, sorted."""
        return sorted(self._residents)

    @property
    def num_bundles(self) -> int:
        """How many bundles are resident."""
        return len(self._residents)

    @property
    def num_used(self) -> int:
        """Rows in use."""
        return self.rows.shape[0] - len(self._free)
