from __future__ import annotations

import copy
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import partita
from partita import Checkpoints, Constraints
from partita.errors import CheckpointError, InputError
from partita.program.instructions import Box
from partita.training.checkpoint import folder as folders
from partita.training.checkpoint.contents import Ownership
from partita.training.checkpoint.loader import load, weights_of
from partita.training.checkpoint.saver import Saver, Source
from partita.training.checkpoint.shards import Chunk, Shards, write_chunks
from partita.training.events import Checkpointed, WarningRaised, subscribe
from partita.training.job import Team

ONE = Constraints(num_workers=1, compiled=False)


class Trap:
    """Unpickling it would call something."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Trap, "sprung", True)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_B: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(x_B))) * self.scale  # type: ignore[no-any-return]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batch_of(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 7, (12,), generator=generator), torch.randint(0, 7, (12,), generator=generator)


def build(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    groups = [{"params": [model.scale], "lr": 0.03}, {"params": [model.embedding.weight, *model.norm.parameters()]}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def trained(seed: int = 0, num_steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    """By plain PyTorch."""
    model, optimizer = build(seed)
    for step in range(num_steps):
        loss_fn(model, batch_of(step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(folder: Path, step: int, made: tuple[nn.Module, torch.optim.Optimizer] | None = None, **extra: Any) -> Path:
    model, optimizer = made or trained(num_steps=1)
    saver = Saver(Team(), None, 5.0)
    source = Source(step=step, model=model, optimizer=optimizer, ownership=Ownership, collect=lambda: None, extra=extra)
    try:
        return Path(saver.save(folder, source, in_background=False).wait())
    finally:
        saver.close()


def flat_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    found = optimizer.state_dict()
    return [
        *sorted(
            (index, key, value.tolist()) for index, state in found["state"].items() for key, value in state.items()
        ),
        *found["param_groups"],
    ]


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# What comes back ---------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    saved, saved_optimizer = trained()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    path = write(tmp_path, 42, (saved, saved_optimizer), also={"counter": {"count": 3}})
    wanted = random.random(), float(np.random.rand()), float(torch.rand(()))
    model, optimizer = build(1)
    found = load(tmp_path, model, optimizer)
    assert (found.step, found.path, found.also) == (42, str(path), {"counter": {"count": 3}})
    assert same(model, saved) and flat_state(optimizer) == flat_state(saved_optimizer)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == wanted


def test_weights_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = write(tmp_path, 1, (model, optimizer))
    plain = load_file(path / "weights.safetensors")
    assert set(plain) == set(model.state_dict()) - {"head.weight"}
    other, _ = build(1)
    other.load_state_dict(weights_of(tmp_path))
    assert same(other, model)
    assert set(weights_of(tmp_path, ["scale"])) == {"scale"}


def test_the_order_of_parameters_in_groups_may_change(tmp_path: Path) -> None:
    saved, saved_optimizer = trained()
    write(tmp_path, 1, (saved, saved_optimizer))
    model, _ = build(1)
    groups = [{"params": [model.scale], "lr": 0.5}, {"params": [*model.norm.parameters(), model.embedding.weight]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    load(tmp_path, model, optimizer)
    for (name, one), other in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], saved_optimizer.state[other]["exp_avg"]), name
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.01]


@pytest.mark.parametrize("kind", ["lbfgs", "muon"])
def test_states_that_are_not_only_tensors(tmp_path: Path, kind: str) -> None:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 2, bias=False)
        return model, torch.optim.LBFGS(model.parameters()) if kind == "lbfgs" else torch.optim.Muon(model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> Any:
            optimizer.zero_grad()
            loss = (model(torch.eye(3)) - 1.0).pow(4).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    saved = make(0)
    step(*saved)
    write(tmp_path, 1, saved)
    found = make(1)
    load(tmp_path, *found)
    step(*saved)
    step(*found)
    assert same(found[0], saved[0])


def test_numbers_of_numpy_come_back_as_pythons(tmp_path: Path) -> None:
    saved = trained()
    saved[1].param_groups[0]["lr"] = np.float64(0.25)
    write(tmp_path, 1, saved)
    model, optimizer = build(1)
    load(tmp_path, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    write(tmp_path, 1)
    model, optimizer = trained()
    optimizer.state[model.scale]["trap"] = Trap()  # type: ignore[index]
    with pytest.raises(CheckpointError, match="must consist of tensors, numbers"):
        write(tmp_path, 2, (model, optimizer))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and not Trap.sprung


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool])
def test_weights_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.tensor([0.0, 1.0, 1.0]).to(dtype))
        return model, torch.optim.SGD(model.parameters())

    saved, found = make(), make()
    saved[0].table = torch.tensor([1.0, 0.0, 1.0]).to(dtype)
    write(tmp_path, 1, saved)
    load(tmp_path, *found)
    assert found[0].table.dtype == dtype
    assert torch.equal(
        found[0].table.float() if dtype.is_floating_point else found[0].table,
        saved[0].table.float() if dtype.is_floating_point else saved[0].table,
    )


def test_a_state_of_a_module_that_is_no_tensor(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    def make() -> tuple[Any, torch.optim.Optimizer]:
        model = Counting(2, 2)
        return model, torch.optim.SGD(model.parameters())

    saved, found = make(), make()
    saved[0].count = 9
    write(tmp_path, 1, saved)
    load(tmp_path, *found)
    assert found[0].count == 9


# Which is read -----------------------------------------------------------------------------------------------------


def test_the_latest_counts_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 3, 99_999_999, 100_000_000):
        write(tmp_path, step)
    assert load(tmp_path, *build()).step == 100_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-100000000", "step-99999999"]


def test_a_step_that_is_saved_again_counts_and_the_older_one_is_not_touched_before(tmp_path: Path) -> None:
    for turn in range(1, 5):
        made = trained(turn)
        path = write(tmp_path, 7, made)
        model, optimizer = build(9)
        load(tmp_path, model, optimizer)
        assert same(model, made[0]), path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007.002", "step-00000007.003"]


FILES = ("checkpoint.json", "weights.safetensors", "optimizer/optimizer.safetensors", "rest.pt")


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_latest_one_falls_back_to_the_one_before(tmp_path: Path, name: str, how: str) -> None:
    made = trained(3)
    write(tmp_path, 1, made)
    latest = write(tmp_path, 2)
    content = bytearray((latest / name).read_bytes())
    for place in (0, len(content) // 2, len(content) - 1) if how == "flipped" else (len(content) // 2,):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        (latest / name).write_bytes(damaged if how == "flipped" else content[:place])
        if how == "gone":
            (latest / name).unlink()
        model, optimizer = build(9)
        assert load(tmp_path, model, optimizer).step == 1
        assert same(model, made[0])


def test_nothing_readable_names_every_problem(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has none"):
        load(tmp_path, *build())
    for step in (3, 4):
        (write(tmp_path, step) / "weights.safetensors").write_bytes(b"rubbish")
    before, _ = made = build(9)
    kept = copy.deepcopy(before)
    with pytest.raises(CheckpointError, match=r"step-00000004: weights.*7 bytes.*step-00000003"):
        load(tmp_path, *made)
    assert same(before, kept)


@pytest.mark.parametrize("text", ["[1]", "3", "", '{"sha256": "0", "content": {"format": 2}}', "\xff"])
def test_what_is_no_description_of_a_checkpoint_falls_back_to_the_one_before(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / "checkpoint.json").write_text(text, encoding="latin-1")
    assert load(tmp_path, *build()).step == 1


def test_half_written_folders_are_never_read_and_go_when_they_are_old(tmp_path: Path) -> None:
    write(tmp_path, 1)
    for name in (".writing-old", ".writing-new", "step-00000009"):
        (tmp_path / name).mkdir()
    (tmp_path / ".writing-old" / "file").write_text("")
    for path in (tmp_path / ".writing-old" / "file", tmp_path / ".writing-old"):
        os.utime(path, (0, 0))
    assert load(tmp_path, *build()).step == 1
    write(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".writing-new", "step-00000001", "step-00000002", "step-00000009"}


# Crashes -----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nobody tidies up."""


def test_a_crash_at_every_moment_of_a_save_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = trained(1), trained(2)
    write(tmp_path, 1, before)
    num_calls = 0
    crash_at = -1

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == crash_at:
                raise Crash
            return real(*arguments, **options)

        return call

    for place, name in ((os, "fsync"), (os, "open"), (Path, "rename"), (Path, "write_bytes"), (torch, "save")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    for crash_at in itertools.count(1):  # noqa: B007  counted() reads it
        num_calls = 0
        try:
            write(tmp_path, 2, after)
        except Crash:
            pass
        else:
            break
        model, optimizer = build(9)
        found = load(tmp_path, model, optimizer)  # a crash after the renaming has lost nothing
        assert same(model, (before if found.step == 1 else after)[0])
    assert crash_at > 10


SAVES_FOR_EVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_training_checkpoint import build, write
import os, random, signal, time, torch
from partita.training.checkpoint.loader import load

base = Path(sys.argv[2])
chance = random.Random(4)
last = 0
for kill in range(20):
    pid = os.fork()
    if pid == 0:
        model, optimizer = build()
        step = last
        while True:
            step += 1
            with torch.no_grad():
                model.scale.fill_(float(step))
            write(base, step, (model, optimizer))
    while not list(base.glob("step-*")):
        time.sleep(0.01)
    time.sleep(chance.uniform(0.01, 0.12))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    model, optimizer = build(1)
    found = load(base, model, optimizer)
    assert found.step >= last and float(model.scale.detach()) == found.step, (found.step, last)
    last = found.step
print(last)
"""


def test_a_process_that_is_killed_at_random_moments_loses_nothing_committed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVES_FOR_EVER, str(Path(__file__).parent), str(tmp_path)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 1
    assert signal.SIGKILL  # the names in the script are those of this module


@pytest.mark.parametrize("name", ["write_chunks", "commit"])
def test_a_full_disk_leaves_the_previous_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write(tmp_path, 1)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(
        f"partita.training.checkpoint.{'saver.write_chunks' if name == 'write_chunks' else 'folder.commit'}", fail
    )
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path, 1)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "file", 1)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    torch.save({"also": Trap()}, path / "rest.pt")
    meta = folders.read_meta(path)  # a stranger signs what he likes
    files = {**meta.files, "rest.pt": folders.facts_of(path / "rest.pt")}
    path.rename(tmp_path / ".writing-x")
    folders.commit(
        tmp_path / ".writing-x", type(meta)(**{**{n: getattr(meta, n) for n in meta.__struct_fields__}, "files": files})
    )
    with pytest.raises(CheckpointError, match="weights_only|Unsupported"):
        load(tmp_path, *build())
    assert not Trap.sprung


# Of another model --------------------------------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = Tied()
    other.norm = nn.BatchNorm1d(4, track_running_stats=False)  # type: ignore[assignment]
    groups = [{"params": [other.scale]}, {"params": [other.embedding.weight, *other.norm.parameters()]}]
    with pytest.raises(CheckpointError, match="belong to this model.*running_mean"):
        load(tmp_path, other, torch.optim.AdamW(groups))


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()  # type: ignore[no-any-return]


def parts(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter]} for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("make_optimizer", "match"),
    [
        (lambda model: torch.optim.AdamW(model.parameters()), r"\(AdamW\), but holds that of SGD"),
        (lambda model: torch.optim.SGD(parts(model), lr=0.1), r"\[1, 1\] parameters.*\[2\]"),
        (lambda model: torch.optim.SGD([model.weight], lr=0.1), r"\[1\] parameters.*\[2\]"),
    ],
)
def test_the_state_of_another_optimizer_is_refused_before_anything_changes(
    tmp_path: Path, make_optimizer: Any, match: str
) -> None:
    batch = torch.randn(4, 3)
    model = nn.Linear(3, 1)
    saved = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with partita.parallelize(model, saved, square, batch, plan=ONE) as step:
        step(batch)
        step.save(tmp_path)
    other = nn.Linear(3, 1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with partita.parallelize(other, make_optimizer(other), square, batch, plan=ONE) as step:
        with pytest.raises(CheckpointError, match=match):
            step.load(tmp_path)
        assert step.num_steps == 0
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        step(batch)


# Parts of tensors --------------------------------------------------------------------------------------------------


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


# In the background -------------------------------------------------------------------------------------------------


def plain_losses(num_steps: int) -> list[float]:
    model, optimizer = build()
    losses = []
    for step in range(num_steps):
        loss = loss_fn(model, batch_of(step))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("plan", [ONE, Constraints(data=2, num_workers=2, compiled=False, num_microbatches=1)])
def test_a_checkpoint_in_the_background_holds_what_was_when_it_was_asked_for(tmp_path: Path, plan: Constraints) -> None:
    model, optimizer = build()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=plan) as step:
        losses = [step(batch_of(index)).loss for index in range(2)]
        saving = step.save_async(tmp_path)
        losses += [step(batch_of(index)).loss for index in range(2, 4)]
        path = saving.wait()
        assert saving.is_over and Path(path).name == "step-00000002"
    other, other_optimizer = build(3)
    with partita.parallelize(other, other_optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        step.load(path)
        assert step.num_steps == 2
        again = [step(batch_of(index)).loss for index in range(2, 4)]
    assert losses == pytest.approx(plain_losses(4), rel=1e-4) and again == pytest.approx(losses[2:], rel=1e-4)


def test_checkpoints_come_by_themselves_and_training_resumes(tmp_path: Path) -> None:
    settings, seen = Checkpoints(tmp_path, every_steps=2, keep=3), []
    unsubscribe = subscribe(seen.append)
    losses: list[float] = []
    for most in (5, 9):  # the first run ends after step 5, its last checkpoint is of step 4
        model, optimizer = build(most)
        if most == 5:
            model, optimizer = build()
        with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
            losses = losses[: step.num_steps]
            assert step.num_steps == (0 if most == 5 else 4)
            while step.num_steps < most:
                losses.append(step(batch_of(step.num_steps)).loss)
    unsubscribe()
    assert losses == pytest.approx(plain_losses(9), rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (4, 6, 8)]
    told = [(event.action, event.step) for event in seen if isinstance(event, Checkpointed)]
    assert told == [("saved", 2), ("saved", 4), ("loaded", 4), ("saved", 6), ("saved", 8)]


def test_never_resuming_leaves_checkpoints_alone(tmp_path: Path) -> None:
    write(tmp_path, 7)
    model, optimizer = build()
    with partita.parallelize(
        model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=str(tmp_path), resume="never"
    ) as step:
        assert step.num_steps == 0
        step(batch_of(0))
        assert Path(step.save()).name == "step-00000001"


def test_a_failure_in_the_background_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    seen: list[Any] = []
    unsubscribe = subscribe(seen.append)
    model, optimizer = build()
    settings = Checkpoints(tmp_path, every_steps=1)
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
        monkeypatch.setattr("partita.training.checkpoint.saver.write_chunks", fail)
        step(batch_of(0))
        step(batch_of(1))
        monkeypatch.undo()
        step(batch_of(2))
    unsubscribe()
    told = [event.message for event in seen if isinstance(event, WarningRaised)]
    assert told and "No space left" in told[0] and "step 1" in told[0]
    assert "step-00000003" in [path.name for path in tmp_path.iterdir()]


# Besides the model -------------------------------------------------------------------------------------------------


def test_schedulers_go_on_where_they_were(tmp_path: Path) -> None:
    def make() -> tuple[Any, ...]:
        model, optimizer = build()
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    model, optimizer, scheduler = make()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        for index in range(3):
            step(batch_of(index))
            scheduler.step()
        step.save(tmp_path, also={"scheduler": scheduler})
        wanted = step(batch_of(3)).loss, scheduler.state_dict()
    model, optimizer, scheduler = make()
    settings = Checkpoints(tmp_path, also={"scheduler": scheduler})
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE, checkpoints=settings) as step:
        assert [group["lr"] for group in optimizer.param_groups] == [0.015, 0.005]
        assert (step(batch_of(3)).loss, scheduler.state_dict()) == wanted


def test_what_has_no_state_or_an_unsafe_one_is_refused(tmp_path: Path) -> None:
    class Unsafe:
        def state_dict(self) -> dict[str, Any]:
            return {"trap": Trap()}

        def load_state_dict(self, state: Any) -> None: ...

    model, optimizer = build()
    with partita.parallelize(model, optimizer, loss_fn, batch_of(0), plan=ONE) as step:
        with pytest.raises(InputError, match="state_dict"):
            step.save(tmp_path, also={"count": 3})  # type: ignore[dict-item]
        with pytest.raises(InputError, match="'loader' must consist of tensors"):
            step.save(tmp_path, also={"loader": Unsafe()})
        with pytest.raises(InputError, match="must have a folder"):
            step.save()
    assert not Trap.sprung and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"folder": 3}, {"every_steps": 0}, {"keep": True}, {"also": [1]}])
def test_settings_of_a_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Checkpoints(**{"folder": "x", **options})
