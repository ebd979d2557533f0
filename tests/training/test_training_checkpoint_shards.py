"""Parts of tensors: written by many processes, read as wholes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.program.instructions import Box
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.contents import Ownership
from partita.training.checkpoint.shards import Chunk, Shards, write_chunks


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that hold every entry once."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 3)) if shape else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        place = draw(st.integers(0, box.lengths[dim]))
        boxes += [box.cut(dim, 0, place), box.cut(dim, place, box.lengths[dim] - place)]
        boxes = [box for box in boxes if box.num_elements] or [Box.whole(shape)]
    return shape, boxes


@settings(max_examples=40, deadline=None)
@given(cut=cuts(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
def test_a_tensor_in_boxes_is_put_together(
    tmp_path_factory: pytest.TempPathFactory, cut: tuple[tuple[int, ...], list[Box]], dtype: torch.dtype
) -> None:
    shape, boxes = cut
    folder = tmp_path_factory.mktemp("shards")
    value = torch.randn(shape).mul(3).to(dtype)
    for index, box in enumerate(boxes):
        write_chunks(folder / f"{index}.safetensors", [Chunk.cut("x", value, box), Chunk.whole(f"own {index}", value)])
    shards = Shards(sorted(folder.iterdir()))
    assert torch.equal(shards.read("x"), value) and shards.shapes["x"] == shape
    assert all(torch.equal(shards.read(f"own {index}"), value) for index in range(len(boxes)))


def test_a_part_that_is_missing_is_noticed(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(4, 3)
    write_chunks(tmp_path / "0.safetensors", [Chunk.cut("x", value, Box((0, 0), (2, 3)))])
    with pytest.raises(folders.DamagedError, match=r"all entries of shape \(4, 3\)"):
        Shards([tmp_path / "0.safetensors"]).read("x")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_torchs_own_reader_reads_parts_and_its_writer_is_read(tmp_path: Path) -> None:
    value = torch.arange(12.0).view(4, 3)
    for index, box in enumerate([Box((0, 0), (2, 3)), Box((2, 0), (2, 3))]):
        write_chunks(tmp_path / f"{index}.safetensors", [Chunk.cut("x", value, box)])
    found = {"x": torch.zeros(4, 3)}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(found["x"], value)
    other = tmp_path / "other"
    dcp.save({"y": value}, storage_writer=dcp.HuggingFaceStorageWriter(str(other), save_distributed=True), no_dist=True)
    assert torch.equal(Shards(other.glob("*.safetensors")).read("y"), value)


def test_every_value_has_one_writer_that_has_it_and_loads_are_even() -> None:
    values = {f"w{index}": torch.zeros(index + 1) for index in range(20)} | {
        "cut": torch.zeros(8),
        "buffer": torch.zeros(2),
    }
    owners = {name: (0, 1, 2) for name in values} | {"w3": (2,), "buffer": (1,)}
    ownership = Ownership(num_processes=3, owners=owners, parts={"cut": {1: Box((0,), (4,)), 2: Box((4,), (4,))}})
    writers = ownership.writers(values)
    assert writers["w3"] == 2 and writers["buffer"] == 1 and writers["cut"] == 1
    load = [sum(values[name].nbytes for name, rank in writers.items() if rank == own) for own in range(3)]
    assert max(load) - min(load) <= 2 * max(value.nbytes for value in values.values())
