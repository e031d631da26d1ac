"""Residual-stream states on disk: captured shard by shard, read one layer at a time."""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from artifacts.jobs.data import Text
from artifacts.jobs.encoding import RowEncoder
from artifacts.jobs.errors import BuildError
from artifacts.jobs.model import CausalModel, batches
from artifacts.jobs.position import LAST, Position
from artifacts.jobs.residual import NOT_FINITE_REMEDY, read_states
from artifacts.jobs.shards import (
    PATTERN,
    StorageDtype,
    bytes_per_row,
    check_space,
    is_whole,
    rows_per_shard,
    shard_path,
    write_shard,
)
from artifacts.jobs.workdir import DONE, fresh_directory, is_done, mark_done, read_json, write_json

INPUTS = "inputs.json"


@dataclass(frozen=True)
class StateStore:
    """States of one model on the rows of one file, at one position of every row.

    The directory holds `shard-00000.safetensors`, ... each with one tensor `layer.{l}` [rows, hidden_size], float32 or
    bfloat16, per captured layer, and a marker that is written last.
    """

    directory: Path

    def layer(self, layer: int) -> Tensor:
        """States of one layer, [num_rows, hidden_size], float32; the other layers stay on the disk.

        Raises:
            BuildError: the capture is not finished, lacks the layer, or its files were changed since.
        """
        if not (self.directory / DONE).is_file():
            raise BuildError(f"the states in {self.directory} are not finished; run the capture step again")
        done = read_json(self.directory / DONE)
        if layer not in done["layers"]:
            raise BuildError(f"the states in {self.directory} are of layers {done['layers']}, not of layer {layer}")
        try:
            parts = [self._read(path, layer) for path in sorted(self.directory.glob(PATTERN))]
        except SafetensorError as error:
            raise self._changed(str(error)) from error
        num_rows = sum(map(len, parts))
        if num_rows != done["rows"]:
            raise self._changed(f"{num_rows} of {done['rows']} rows")
        return torch.cat(parts)

    def _read(self, path: Path, layer: int) -> Tensor:
        with safe_open(path, framework="pt") as shard:
            states: Tensor = shard.get_tensor(f"layer.{layer}").float()
        return states

    def _changed(self, found: str) -> BuildError:
        return BuildError(f"{self.directory} was changed since its capture ({found}); delete it and run capture again")


class Place(NamedTuple):
    """A row, its token ids as an array of four bytes each, and the places in it that are averaged."""

    row: Text
    ids: Sequence[int]
    span: range


class _Shard(NamedTuple):
    """A file and what goes into it."""

    path: Path
    places: Sequence[Place]


def capture_states(
    model: CausalModel,
    rows: Sequence[Text],
    layers: Sequence[int],
    directory: Path,
    digest: str,
    batch_tokens: int,
    title: str,
    quiet: bool,
    position: Position = LAST,
    storage_dtype: StorageDtype = "float32",
) -> bool:
    """Write the states of rows; memory holds the states of one shard, whatever the number of rows.

    It may be stopped at any point: finished shards of a run with the same digest are kept, and as every batch lies
    within a shard, the resumed run gives the same bytes.

    Args:
        model: to read.
        rows: at least one.
        layers: whose output is kept.
        directory: of the store.
        digest: of everything that decides the states, position and storage dtype included.
        batch_tokens: padded tokens of one forward pass.
        title, quiet: of the progress bar, which counts tokens.
        position: where a row is read.
        storage_dtype: of the files; bfloat16 takes half the disk and keeps eight bits of each number.

    Returns:
        Whether anything was computed; False when the store was already complete.

    Raises:
        BuildError: a row is too long for the model or lacks the position, a state is not finite, or the disk is too
            small; the row's file and line are named.
    """
    if is_done(directory, digest):
        return False
    _begin(directory, digest)
    row_bytes = bytes_per_row(len(layers), model.hidden_size, storage_dtype)
    check_space(directory, len(rows) * row_bytes)
    shards = _shards(directory, locate(model.encoder, rows, position), rows_per_shard(row_bytes))
    missing = [shard for shard in shards if not is_whole(shard.path, _shapes(shard, model, layers), storage_dtype)]
    total, left = (sum(len(place.ids) for shard in some for place in shard.places) for some in (shards, missing))
    with _bar(title, total, total - left, quiet) as bar:
        for shard in missing:
            write_shard(shard.path, _compute(model, shard, layers, storage_dtype, batch_tokens, bar))
    mark_done(directory, digest, rows=len(rows), layers=list(layers))
    return True


def locate(encoder: RowEncoder, rows: Sequence[Text], position: Position) -> list[Place]:
    """Tokenise rows and find the position in each.

    Raises:
        BuildError: as `RowEncoder.encode`, or a row lacks the position; its file and line are named.
    """
    token_id = encoder.token_id(position.token) if position.kind == "token" else None
    places = []
    for row in rows:
        encoded = encoder.encode(row)
        try:
            places.append(Place(row, array("i", encoded.ids), position.span(encoded, token_id)))
        except ValueError as error:
            raise BuildError(f"{row.where} cannot be read at position {position} of {encoder.name}: {error}") from None
    return places


def _begin(directory: Path, digest: str) -> None:
    """Empty the directory unless it belongs to an interrupted run of the same digest; leave no unfinished file."""
    inputs = directory / INPUTS
    if not inputs.is_file() or read_json(inputs) != digest:
        # First what declares the rest valid, in case the emptying itself is interrupted.
        for name in (DONE, INPUTS):
            (directory / name).unlink(missing_ok=True)
        fresh_directory(directory)
        write_json(inputs, digest)
    for left in directory.glob(".*"):
        left.unlink()


def _shards(directory: Path, places: Sequence[Place], step: int) -> list[_Shard]:
    starts = range(0, len(places), step)
    return [_Shard(shard_path(directory, number), places[start : start + step]) for number, start in enumerate(starts)]


def _shapes(shard: _Shard, model: CausalModel, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    return {f"layer.{layer}": (len(shard.places), model.hidden_size) for layer in layers}


def _bar(title: str, total: int, initial: int, quiet: bool) -> "tqdm[None]":
    """Counts tokens, on which the time of a forward pass depends; `initial` ones are known from an earlier run."""
    return tqdm(
        desc=f"{title:<24}",
        total=total,
        initial=initial,
        unit=" tokens",
        unit_scale=True,
        disable=quiet,
        file=sys.stderr,
        dynamic_ncols=True,
    )


def _compute(
    model: CausalModel,
    shard: _Shard,
    layers: Sequence[int],
    storage_dtype: StorageDtype,
    batch_tokens: int,
    bar: "tqdm[None]",
) -> dict[str, Tensor]:
    """Tensors of one shard, [num_rows, hidden_size] each."""
    shapes = _shapes(shard, model, layers)
    states = {name: torch.empty(shape, dtype=getattr(torch, storage_dtype)) for name, shape in shapes.items()}
    for indices in batches([place.ids for place in shard.places], batch_tokens):
        batch = [shard.places[index] for index in indices]
        found = read_states(model, [place.ids for place in batch], [place.span for place in batch], layers)
        wrong = (~found.isfinite()).any(dim=-1).nonzero()
        if len(wrong):
            layer, row = layers[int(wrong[0, 0])], batch[int(wrong[0, 1])].row
            raise BuildError(
                f"{row.where}: the state of {model.name} after layer {layer} is not finite (NaN or infinite); "
                f"{NOT_FINITE_REMEDY}"
            )
        for name, each in zip(states, found, strict=True):
            states[name][indices] = each.to(states[name].dtype)
        bar.update(sum(len(place.ids) for place in batch))
    return states
