"""`simulate`: executes programs in virtual time, with durations from a cost model.

Every worker has a clock. It starts when the process's random draws are made. `Run` and `Update` advance it; a `Send`
takes a link from its source process to its target process for the message's duration and lets the sender go on at once;
a `Recv` waits for the message; a collective starts when its last member has come. Links between the same two processes
carry one message at a time, and those among a group of processes one large collective: a sum in the background begins
when all its members have started it and the one before is over, and its `Await` waits for it. What such a sum computes
takes time of the worker where its process has no core left, and is counted at the `Await`: with c seconds of it in d
seconds of a sum, a worker that has computed t seconds since the sum began is through after max(t + c, d). The events
are those that the runtime records.

Workers that compute at the same time slow each other, and how long they do so depends on how slow they are: the step
is simulated with every worker of a machine taken as active, then again with the activity that came out, `NUM_PASSES`
times in all.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from partita.cost.collectives import SMALL_BYTES
from partita.cost.model import CollectiveKind, CostModel
from partita.errors import ProgramError
from partita.plan import Plan, Worker
from partita.program.instructions import (
    AllGather,
    AllReduce,
    AllToAll,
    Await,
    Free,
    Instruction,
    Program,
    ProgramSet,
    Recv,
    ReduceScatter,
    Run,
    Send,
    Start,
    SumSquares,
    Update,
)
from partita.program.timeline import Event, Timeline
from partita.program.wire import sent_bytes, whole_bytes
from partita.simulator.memory import JobMemory

Activity = Mapping[tuple[int, int], float]  # (worker, index of the instruction) -> num_active of `CostModel`
NUM_PASSES = 3

Collective = AllReduce | ReduceScatter | AllGather | AllToAll
_COLLECTIVES = (AllReduce, ReduceScatter, AllGather, AllToAll)
# Of the time in which plain SGD updates the same elements, which reads two and writes one of them.
SQUARE_SHARE = 1 / 3
_KINDS: Mapping[type, CollectiveKind] = {
    AllReduce: "all_reduce",
    ReduceScatter: "reduce_scatter",
    AllGather: "all_gather",
    AllToAll: "all_to_all",
}


@dataclass
class _Clock:
    program: Program
    place: Worker
    now_s: float
    memory: JobMemory
    position: int = 0
    arrived_s: float | None = None  # when it came to the collective that it waits in
    events: list[Event] = field(default_factory=list)

    @property
    def current(self) -> Instruction | None:
        done = self.position >= len(self.program.instructions)
        return None if done else self.program.instructions[self.position]

    def finish(self, start_s: float, end_s: float) -> None:
        instruction = self.current
        assert instruction is not None
        if not isinstance(instruction, Free):
            kind = type(instruction).__name__
            self.events.append(Event(self.program.worker, self.position, kind, label_of(instruction), start_s, end_s))
        self.memory.execute(self.program.worker, instruction, start_s, end_s)
        self.now_s = end_s
        self.position += 1
        self.arrived_s = None


def label_of(instruction: Instruction) -> str:
    """A short text for timelines."""
    if isinstance(instruction, Run):
        return f"{instruction.phase.value} {instruction.microbatch} stage {instruction.stage}"
    if isinstance(instruction, Update):
        return f"update {sum(part.num_elements for part in instruction.slices)} elements"
    return str(getattr(instruction, "key", ""))


def simulate(
    programs: ProgramSet, plan: Plan, cost: CostModel, *, optimizer: str = "SGD", update_values: int = 0
) -> Timeline:
    """Predicts the timeline of one step.

    Args:
        programs: of all workers of the job.
        plan: where the workers are, and whether segments are compiled.
        cost: predicted durations.
        optimizer: class name of the optimizer, e.g. "AdamW".
        update_values: how many temporary values of a slice's size its update makes.

    Raises:
        ProgramError: the programs deadlock (run `partita.program.check` first).
    """
    per_machine = _per_machine(plan)
    active: Activity = {
        (program.worker, index): per_machine[plan.workers[program.worker].machine]
        for program in programs.programs
        for index in range(len(program.instructions))
    }
    timeline = _Simulation(programs, plan, cost, optimizer, active, update_values).run()
    if _take_turns(plan):
        for _ in range(NUM_PASSES - 1):
            active = activity(timeline, plan)
            timeline = _Simulation(programs, plan, cost, optimizer, active, update_values).run()
    return timeline


def _per_machine(plan: Plan) -> Mapping[int, int]:
    return Counter(worker.machine for worker in plan.workers)


def _take_turns(plan: Plan) -> bool:
    """Whether workers of one machine compute at different times."""
    return plan.axes.get("pipeline", 1) > 1 and max(_per_machine(plan).values()) > 1


def activity(timeline: Timeline, plan: Plan) -> Activity:
    """By (worker, instruction): how many workers of the machine compute while it runs, on average, itself included.
    Those of a pipeline are busy in turns; others are taken to be so all the time."""
    if not _take_turns(plan):
        per_machine = _per_machine(plan)
        return {
            (event.worker, event.index): per_machine[plan.workers[event.worker].machine] for event in timeline.events
        }
    busy: dict[int, list[Event]] = defaultdict(list)
    for event in timeline.events:  # sorted by start
        if event.kind in ("Run", "Update"):
            busy[plan.workers[event.worker].machine].append(event)
    found: dict[tuple[int, int], float] = {}
    for events in busy.values():
        longest_s = max(event.time_s for event in events)
        starts = [event.start_s for event in events]
        for event in events:
            first = bisect.bisect_left(starts, event.start_s - longest_s)
            last = bisect.bisect_right(starts, event.end_s)
            shared_s = sum(
                max(min(event.end_s, other.end_s) - max(event.start_s, other.start_s), 0.0)
                for other in events[first:last]
                if other.worker != event.worker
            )
            found[event.worker, event.index] = 1 + (shared_s / event.time_s if event.time_s > 0 else 0.0)
    return found


class _Simulation:
    def __init__(
        self,
        programs: ProgramSet,
        plan: Plan,
        cost: CostModel,
        optimizer: str,
        num_active: Activity,
        update_values: int,
    ) -> None:
        self.programs, self.plan, self.cost, self.optimizer = programs, plan, cost, optimizer
        self.num_active = num_active
        per_process = Counter(worker.process for worker in plan.workers)
        starts_s = {
            worker.index: cost.step_time_s(per_process[worker.process]) + self._draws_s(worker)
            for worker in plan.workers
        }
        self.memory = JobMemory(programs, 0.0, update_values)  # draws and feeds come before the workers start
        self.clocks = {
            program.worker: _Clock(program, plan.workers[program.worker], starts_s[program.worker], self.memory)
            for program in programs.programs
        }
        self.mail: dict[tuple[int, int, str], float] = {}
        self.link_free_s: dict[tuple[int, int], float] = defaultdict(float)
        self.group_free_s: dict[tuple[int, ...], float] = defaultdict(float)  # by processes that add up together
        self.begun_s: dict[str, list[float]] = defaultdict(list)  # by key of a sum in the background
        self.over_s: dict[str, float] = {}
        self.used_cores = plan.used_cores
        self.bytes_sent = 0

    def _draws_s(self, place: Worker) -> float:
        """Every process makes all draws, one after the other, before its workers start."""
        return sum(
            self.cost.segment_time_s(draw.module, f"draw {draw.name}", place, compiled=False)
            for draw in self.programs.draws
        )

    def run(self) -> Timeline:
        while any(clock.current is not None for clock in self.clocks.values()):
            if not any([self._advance(clock) for clock in self.clocks.values()]):
                raise ProgramError(
                    "the programs deadlock in the simulator; partita.program.check names who waits for whom"
                )
        step_time_s = max(clock.now_s for clock in self.clocks.values())
        self.memory.end(step_time_s)
        events = sorted(
            (e for clock in self.clocks.values() for e in clock.events), key=lambda e: (e.start_s, e.worker)
        )
        return Timeline(
            events=tuple(events),
            step_time_s=step_time_s,
            peak_memory_bytes=self.memory.worker_peak_bytes,
            step_memory_bytes=self.memory.process_peak_bytes,
            bytes_sent=self.bytes_sent,
        )

    def _advance(self, clock: _Clock) -> bool:
        moved = False
        while (instruction := clock.current) is not None:
            if isinstance(instruction, _COLLECTIVES) and len(instruction.group) > 1:
                if not self._collective(clock, instruction):
                    return moved
            elif isinstance(instruction, Await):
                over_s = self.over_s.get(instruction.key)
                if over_s is None:
                    return moved
                through_s = clock.now_s + self._interruption_s(clock.place, instruction.collective)
                clock.finish(clock.now_s, max(through_s, over_s) + self.cost.instruction_time_s())
            elif isinstance(instruction, Recv):
                ready_s = self.mail.pop((instruction.peer, clock.program.worker, instruction.key), None)
                if ready_s is None:
                    return moved
                clock.finish(clock.now_s, max(clock.now_s, ready_s) + self.cost.instruction_time_s())
            else:
                clock.finish(clock.now_s, clock.now_s + self._duration_s(clock, instruction))
            moved = True
        return moved

    def _duration_s(self, clock: _Clock, instruction: Instruction) -> float:
        fixed_s = self.cost.instruction_time_s()
        active = self.num_active.get((clock.program.worker, clock.position), 1.0)
        if isinstance(instruction, Run):
            segment = self.programs.segments[instruction.segment]
            return fixed_s + self.cost.segment_time_s(
                segment.module, segment.key, clock.place, compiled=self.plan.compiled, num_active=active
            )
        if isinstance(instruction, Update):
            sizes = tuple(part.num_elements for part in instruction.slices)
            return fixed_s + self.cost.update_time_s(sizes, self.optimizer, clock.place, num_active=active)
        if isinstance(instruction, SumSquares):  # a `Clip` that must scale takes as long; most need not
            sizes = tuple(part.num_elements for slices in clock.program.updates for part in slices)
            return fixed_s + SQUARE_SHARE * self.cost.update_time_s(sizes, "SGD", clock.place, num_active=active)
        if isinstance(instruction, ReduceScatter):  # alone: its gradients are only cut
            return fixed_s * (1 + len(instruction.registers))
        if isinstance(instruction, Send):
            self._send(clock, instruction)
            return fixed_s
        if isinstance(instruction, Start):
            self._begin(clock, instruction.collective)
            return fixed_s
        return 0.0 if isinstance(instruction, Free) else fixed_s

    def _send(self, clock: _Clock, instruction: Send) -> None:
        target = self.plan.workers[instruction.peer]
        link = (clock.place.process, target.process)
        start_s = clock.now_s
        if link[0] != link[1]:
            start_s = max(start_s, self.link_free_s[link])
            self.bytes_sent += instruction.spec.num_bytes
        end_s = start_s + self.cost.transfer_time_s(instruction.spec.num_bytes, clock.place, target)
        self.link_free_s[link] = end_s
        self.mail[clock.program.worker, instruction.peer, instruction.key] = end_s

    def _begin(self, clock: _Clock, collective: AllReduce) -> None:
        begun = self.begun_s[collective.key]
        begun.append(clock.now_s)
        if len(begun) == len(collective.group):
            places = tuple(self.plan.workers[index] for index in collective.group)
            self.over_s[collective.key] = self._exchanged_s(collective, places, max(begun))

    def _interruption_s(self, place: Worker, collective: AllReduce) -> float:
        """What a sum in the background has taken of a worker's time."""
        return self.cost.interruption_s(
            whole_bytes(collective),
            place,
            num_processes=len({self.plan.workers[index].process for index in collective.group}),
            num_busy=self.used_cores[place.process],
        )

    def _exchanged_s(self, instruction: Collective, places: tuple[Worker, ...], start_s: float) -> float:
        """When a collective is over whose last member has come at `start_s`. Large ones of the same processes share
        their links, and so follow each other."""
        num_bytes = whole_bytes(instruction)
        num_tensors = len(getattr(instruction, "registers", ())) or 1
        is_gradients = isinstance(instruction, AllReduce) and bool(instruction.gradients)
        if is_gradients:
            duration_s = self.cost.gradient_sum_time_s(num_bytes, places, num_tensors=num_tensors)
        else:
            kind = _KINDS[type(instruction)]
            duration_s = self.cost.collective_time_s(kind, num_bytes, places, num_tensors=num_tensors)
        process_of = {member: place.process for member, place in zip(instruction.group, places, strict=True)}
        sent = sent_bytes(instruction, process_of, on_gpu=all(place.gpu is not None for place in places))
        self.bytes_sent += sum(
            round(value * self.cost.sent_share) if is_gradients else value for value in sent.values()
        )
        processes = tuple(sorted(sent))
        if len(processes) > 1 and num_bytes > SMALL_BYTES:
            start_s = max(start_s, self.group_free_s[processes])
            self.group_free_s[processes] = start_s + duration_s
        return start_s + duration_s

    def _collective(self, clock: _Clock, instruction: Collective) -> bool:
        """Lets the group go on once all have come; whether it did."""
        if clock.arrived_s is None:
            clock.arrived_s = clock.now_s
        members = [self.clocks[index] for index in instruction.group]
        for member in members:
            if getattr(member.current, "key", None) != instruction.key:
                return False
        places = tuple(member.place for member in members)
        over_s = self._exchanged_s(instruction, places, max(member.now_s for member in members))
        over_s += self.cost.instruction_time_s()
        for member in members:
            member.finish(member.now_s, over_s)
        return True
