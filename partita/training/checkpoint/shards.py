"""Files of tensors, whole or in parts, in the layout of torch DCP's safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from partita.program.instructions import Box
from partita.training.checkpoint.folder import DamagedError, flush

_OFFSETS, _SAVED = "DCP_SHARDING_INFO", "saved_offsets"  # as torch.distributed.checkpoint writes and reads them
_SHAPES = "shapes"


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor of some shape; `value` are its entries."""

    name: str
    value: Tensor
    shape: tuple[int, ...]
    box: Box

    @classmethod
    def whole(cls, name: str, value: Tensor) -> Chunk:
        return cls(name, value, tuple(value.shape), Box.whole(tuple(value.shape)))

    @classmethod
    def cut(cls, name: str, value: Tensor, box: Box) -> Chunk:
        """The box of the whole `value`."""
        return cls(name, box.of(value), tuple(value.shape), box)

    def frozen(self) -> Chunk:
        """The same with a copy of its entries, which training does not change."""
        copy = self.value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return Chunk(self.name, copy, self.shape, self.box)


def write_chunks(path: Path, chunks: Sequence[Chunk]) -> None:
    """Writes one chunk each of some tensors to a file, and has it flushed to disk."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for chunk in chunks:
        value = chunk.value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        tensors[chunk.name] = value.clone() if place in storages else value  # the format has no shared memory
        storages.add(place)
    header = {
        "format": "pt",
        _OFFSETS: json.dumps({chunk.name: {_SAVED: list(chunk.box.starts)} for chunk in chunks}),
        _SHAPES: json.dumps({chunk.name: list(chunk.shape) for chunk in chunks}),
    }
    save_file(tensors, path, metadata=header)
    flush(path)


@dataclass(frozen=True)
class _Place:
    file: Any
    box: Box


class Shards:
    """The tensors of some files, put together again.

    Raises:
        DamagedError: a file is no such file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[_Place]] = {}
        for path in paths:
            try:
                self._add(path)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise DamagedError(f"{path.name}: {type(error).__name__}: {error}") from error

    def _add(self, path: Path) -> None:
        file: Any = safe_open(path, framework="pt")
        header = file.metadata() or {}
        offsets, shapes = json.loads(header.get(_OFFSETS, "{}")), json.loads(header.get(_SHAPES, "{}"))
        for name in file.keys():  # noqa: SIM118  a file of tensors, no mapping
            lengths = tuple(file.get_slice(name).get_shape())
            starts = tuple(offsets[name][_SAVED]) if name in offsets else (0,) * len(lengths)
            self.shapes[name] = tuple(shapes.get(name, lengths))
            self._places.setdefault(name, []).append(_Place(file, Box(starts, lengths)))

    def read(self, name: str) -> Tensor:
        """A tensor, whole.

        Raises:
            DamagedError: not all of its entries are there.
        """
        shape, places = self.shapes[name], self._places[name]
        try:
            if len(places) == 1 and places[0].box.is_whole(shape):
                found: Tensor = places[0].file.get_tensor(name)
                return found
            value: Tensor | None = None
            for place in places:
                part = place.file.get_tensor(name)
                value = torch.empty(shape, dtype=part.dtype) if value is None else value
                place.box.of(value).copy_(part)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DamagedError(f"{name}: {type(error).__name__}: {error}") from error
        if value is None or sum(place.box.num_elements for place in places) < math.prod(shape):
            raise DamagedError(f"{name} must have all entries of shape {shape}, but some are in no file")
        return value
