"""Floor 4: one instruction list per worker, and the checks that make it safe to run."""

from partita.program.check import check
from partita.program.instructions import ProgramSet
from partita.program.lower import forget, lower
from partita.program.split import microbatch_verdict
from partita.program.timeline import Event, Timeline

__all__ = ["Event", "ProgramSet", "Timeline", "check", "forget", "lower", "microbatch_verdict"]
