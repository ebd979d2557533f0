"""Rules found by experiment, and where they are kept: shipped with the package, in the cache folder, in this process.

All three map the signature of an op call's small twin (`partita.sharding.scaling`) to rules as text, or to nothing if
the op could not be run on random tensors; then the call in its true shapes is looked up and tried, if it is small. What
is in none of them is searched in a process of its own, within ``SEARCH_LIMIT_S`` seconds per process. Never searched
are views, factories, random and mutating ops, and ops whose output shapes depend on values: no experiment tells more of
them than their declaration.
"""

from __future__ import annotations

import functools
import json
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from partita.cache import read_json, write_json
from partita.sharding.calls import OpCall
from partita.sharding.helper import Helper
from partita.sharding.scaling import exact, is_small, signature, twin

FORMAT = 2  # raised whenever the search itself changes, so that old cached rules are not read
SEARCH_LIMIT_S = 120.0

Texts = tuple[str, ...] | None


class RuleBook:
    """The found rules, with a helper process that lives while rules are searched.

    Args:
        shipped: rules by signature that are known from the start.
        cache_name: JSON file in the cache folder; None keeps nothing there.
        limit_s: seconds of search over the life of the book.
    """

    def __init__(self, *, shipped: Mapping[str, Texts], cache_name: str | None, limit_s: float) -> None:
        self._rules: dict[str, Texts] = dict(shipped)
        self._twins: dict[Any, tuple[OpCall, ...]] = {}
        self._cache_name = cache_name
        self._read_cache = cache_name is None
        self._left_s = limit_s
        self._lock = threading.RLock()
        self._helper: Helper | None = None

    def find(self, calls: Iterable[OpCall]) -> list[tuple[str, ...]]:
        """Rules of each call, searched where they are not known; empty if there are none."""
        calls = list(calls)
        with self._lock:
            for position in (0, 1):  # the twins, then true shapes where a twin could not be run
                wanted = {}
                for call in calls:
                    for candidate in self._candidates(call)[position : position + 1]:
                        if position == 0 or self._rules.get(signature(self._candidates(call)[0])) is None:
                            wanted[signature(candidate)] = candidate
                self._search(wanted)
            return [self._known(call) for call in calls]

    def allow(self, limit_s: float) -> None:
        """Search for at least ``limit_s`` seconds more."""
        with self._lock:
            self._left_s = max(self._left_s, limit_s)

    def close(self) -> None:
        """End the helper process, if one runs."""
        with self._lock:
            if self._helper is not None:
                self._helper.close()
                self._helper = None

    def _candidates(self, call: OpCall) -> tuple[OpCall, ...]:
        """The small twin, and the call itself if it is another and not large."""
        if call.key not in self._twins:
            small, whole = twin(call), exact(call)
            found = [c for c in (small, whole) if c is not None and is_small(c)]
            unique = {signature(c): c for c in found}
            self._twins[call.key] = tuple(unique.values())
        return self._twins[call.key]

    def _known(self, call: OpCall) -> tuple[str, ...]:
        for candidate in self._candidates(call):
            texts = self._rules.get(signature(candidate))
            if texts is not None:
                return texts
        return ()

    def _search(self, wanted: Mapping[str, OpCall]) -> None:
        missing = {name: call for name, call in wanted.items() if name not in self._rules}
        if missing and not self._read_cache:
            self._read_cache = True
            for name, texts in _read(read_json(str(self._cache_name)) or {}).items():
                self._rules.setdefault(name, texts)
            missing = {name: call for name, call in missing.items() if name not in self._rules}
        if missing:
            self._run(list(missing), list(missing.values()))

    def _run(self, names: Sequence[str], calls: Sequence[OpCall]) -> None:
        self._helper = self._helper or Helper()
        started_s = time.monotonic()
        results = self._helper.find(calls, limit_s=self._left_s) if self._left_s > 0 else [None] * len(calls)
        self._left_s -= time.monotonic() - started_s
        new: dict[str, Texts] = {}
        late: list[str] = []
        for name, result in zip(names, results, strict=True):
            if result is None:
                late.append(name)
                self._rules[name] = ()
            else:
                self._rules[name] = new[name] = result.rules if result.ran else None
        if self._cache_name is not None and new:
            kept = _read(read_json(self._cache_name) or {}) | new
            _write_cache(self._cache_name, kept)
        if late:
            warnings.warn(
                f"rules of {len(late)} ops ({', '.join(late[:3])}, ...) were not found within {SEARCH_LIMIT_S:.0f} s; "
                "these ops run on whole inputs, which is right but slow. Run again to go on searching: what was found "
                "is kept. Workers in other processes must all have the same rules.",
                stacklevel=2,
            )


def is_searched(call: OpCall) -> bool:
    """Whether an experiment can tell how ``call`` may be run in parts."""
    target = call.target
    if not isinstance(target, torch._ops.OpOverload) or call.is_random or target.is_view or not call.inputs:
        return False
    refused = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    if refused & set(target.tags) or target._schema.is_mutable:
        return False
    if any(returned.alias_info is not None for returned in target._schema.returns):
        return False
    shapes = [spec.shape for spec in (*call.inputs, *call.outputs) if spec is not None]
    return all(0 not in shape for shape in shapes) and any(extent > 1 for shape in shapes for extent in shape)


@functools.cache
def rule_book() -> RuleBook:
    """The book of this process."""
    name = f"sharding/rules-{FORMAT}-torch-{torch.__version__}.json"
    return RuleBook(shipped=shipped_rules(), cache_name=name, limit_s=SEARCH_LIMIT_S)


@functools.cache
def shipped_rules() -> Mapping[str, Texts]:
    """The rules in ``data/rules.json``, written by `partita.sharding.regenerate`."""
    file = resources.files("partita.sharding").joinpath("data/rules.json")
    return _read(json.loads(file.read_text(encoding="utf-8")))


def _read(kept: Mapping[str, Any]) -> dict[str, Texts]:
    return {name: None if texts is None else tuple(texts) for name, texts in kept.items()}


def _write_cache(name: str, rules: Mapping[str, Texts]) -> None:
    try:
        write_json(name, rules)
    except OSError as error:
        warnings.warn(f"found rules cannot be kept and will be searched again: {error}", stacklevel=2)
