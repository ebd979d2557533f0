"""Checks of values (``if bad(values).any(): raise``): the one use of data in control flow that a graph can leave out.

While a step is recorded, a question about values (the truth of a boolean tensor) has no answer. If one of the two
answers leads straight to a ``raise`` or a failing ``assert`` in the code that asked, the other answer is the only one
under which the step goes on: it is taken, and the check is noted as left out. Otherwise both answers go on and the
step is no single graph.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TypeVar

_RAISE = dis.opmap["RAISE_VARARGS"]
_MAX_CHECKS = 64  # lines with checks in one step; each costs two recordings

T = TypeVar("T")


class Question(BaseException):
    """A value is asked for that a recording does not have. (No `Exception`, so that the user's code does not catch it.)

    Attributes:
        key: line that asks, which may be one of a library.
        source: line of the user's code that is being run.
        asking: code of every function on the stack.
        error: what torch says of it.
    """

    def __init__(self, key: str, source: str, asking: frozenset[CodeType], error: Exception) -> None:
        super().__init__(key)
        self.key, self.source, self.asking, self.error = key, source, asking, error


class UndecidedError(Exception):
    """Control flow depends on a value.

    Attributes:
        source: line of the user's code.
        func: the op that reads the value.
    """

    def __init__(self, question: Question) -> None:
        super().__init__(str(question.error))
        self.source, self.func = question.source, getattr(question.error, "func", "aten._local_scalar_dense.default")


class Answers:
    """What the step is told when it asks for the truth of a value; by line of the code that asks."""

    def __init__(self) -> None:
        self.by_line: dict[str, bool] = {}

    def to(self, key: str, source: str, error: Exception) -> bool:
        """The answer at line ``key``, reached from the user's line ``source``.

        Raises:
            Question: there is none yet.
        """
        if key not in self.by_line:
            raise Question(key, source, _codes_on_stack(sys._getframe(1)), error)
        return self.by_line[key]


def _codes_on_stack(frame: FrameType | None) -> frozenset[CodeType]:
    codes: set[CodeType] = set()
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back
    return frozenset(codes)


def _is_raised_by(error: BaseException, asking: frozenset[CodeType]) -> bool:
    """Whether a ``raise`` or ``assert`` statement of one of these functions made the error (and no op that failed)."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code not in asking:
        return False
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == _RAISE


def answered(attempt: Callable[[Answers], T]) -> tuple[T, tuple[str, ...]]:
    """The result of ``attempt`` under the answers with which it goes on, and the lines of the checks that these skip.

    Raises:
        UndecidedError: both answers to a question go on.
        Exception: of the attempt, if it fails whatever the answers.
    """
    answers = Answers()
    while True:
        try:
            return attempt(answers), tuple(sorted(answers.by_line))
        except Question as question:
            if len(answers.by_line) >= _MAX_CHECKS:
                raise UndecidedError(question) from question.error
            refused = [guess for guess in (True, False) if _is_refused(attempt, answers, question, guess)]
            if len(refused) != 1:
                raise UndecidedError(question) from question.error
            answers.by_line[question.key] = not refused[0]


def _is_refused(attempt: Callable[[Answers], object], answers: Answers, question: Question, guess: bool) -> bool:
    trial = Answers()
    trial.by_line = {**answers.by_line, question.key: guess}
    try:
        attempt(trial)
    except Question:
        return False
    except Exception as error:
        return _is_raised_by(error, question.asking)
    return False
