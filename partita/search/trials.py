"""`SearchTrial`: what `build` gets. Optuna's interface for suggestions, in the process of a trial.

The study is where the search is coordinated, so that one process alone writes to it and knows all other trials; a
suggestion is a question to that process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from partita.errors import InputError

Ask = Callable[[str, str, tuple[Any, ...], dict[str, Any]], Any]


class SearchTrial:
    """Suggests what a candidate is made of, as `optuna.Trial` does; what was suggested once stays.

    Args:
        number: of the trial.
        known: values by name that are given: those of a candidate that is trained on.
        ask: for other names: the kind of a suggestion, the name and the arguments in, a value out; None: all are known.

    Example:
        >>> trial = SearchTrial(0, {"width": 32})
        >>> trial.suggest_int("width", 8, 64)
        32
    """

    def __init__(self, number: int, known: Mapping[str, Any], ask: Ask | None = None) -> None:
        self.number = number
        self._values = dict(known)
        self._ask = ask
        self._attributes: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from `low` to `high`, both included."""
        return int(self._value("int", name, (low, high), {"step": step, "log": log}))

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number from `low` to `high`."""
        return float(self._value("float", name, (low, high), {"step": step, "log": log}))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`: texts, numbers, truth values or None."""
        return self._value("categorical", name, (list(choices),), {})

    def _value(self, kind: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name not in self._values:
            if self._ask is None:
                raise InputError(
                    f"a candidate must be built as before, but {name!r} was not suggested then; it had "
                    f"{sorted(self._values)}. What is suggested must follow from earlier suggestions alone"
                )
            self._values[name] = self._ask(kind, name, arguments, options)
        return self._values[name]

    @property
    def params(self) -> dict[str, Any]:
        """What was suggested so far."""
        return dict(self._values)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """What `set_user_attr` has noted."""
        return dict(self._attributes)

    def set_user_attr(self, key: str, value: Any) -> None:
        """Notes something about the candidate (a value that JSON knows), which is kept with the trial."""
        self._attributes[key] = value
