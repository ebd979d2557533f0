"""A page about a search: which candidates are worth it, how they learnt, what mattered."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.arguments import path_of
from partita.errors import InputError
from partita.search.allocation import front
from partita.search.candidates import Candidate
from partita.search.report import short

if TYPE_CHECKING:
    from partita.search.result import SearchResult

ACCENT, QUIET = "#c2410c", "#94a3b8"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #0f172a }}
pre {{ overflow-x: auto; background: #f8fafc; padding: 1rem; border-radius: 6px }}
</style></head><body><h1>{title}</h1>
{figures}
<pre>{text}</pre></body></html>
"""


def write_search_page(result: SearchResult, path: str | os.PathLike[str]) -> Path:
    """Writes an HTML page that needs nothing else: the Pareto fronts of score and size and of score and step time, all
    learning curves, the importance of what was suggested, and the text of ``result.explain()``. Needs ``pip install
    'partita[report]'``.

    Args:
        result: of `partita.search`.
        path: of the file.

    Raises:
        InputError: plotly is not installed, or the file cannot be written.

    Example:
        >>> write_search_page(partita.search(build, data, deadline="20m"), "search.html")
    """
    target = Path(path_of(path, "path"))
    try:
        from plotly.io import to_html
    except ModuleNotFoundError as error:
        raise InputError("a page about a search needs plotly: pip install 'partita[report]'") from error
    labels = {one.number: _told(result, one) for one in result.trials if one.points}
    made = [_fronts(result, labels), _curves(result, labels), *([_importance(result)] if result.importance else [])]
    texts = [
        to_html(figure, full_html=False, include_plotlyjs=not place, config={"displaylogo": False})
        for place, figure in enumerate(made)
    ]
    page = _PAGE.format(
        title=html.escape(f"Search in {result.folder}"), figures="\n".join(texts), text=html.escape(result.explain())
    )
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"path must be a file that can be written, but {str(target)!r} is not: {error}") from error
    return target


def _fronts(result: SearchResult, labels: Mapping[int, str]) -> Any:
    """Two panels: all judged candidates, and a line through those that no other one beats in both."""
    from plotly.subplots import make_subplots

    judged = [one for one in result.trials if one.points]
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Score and size", "Score and time of a step"))
    axes = {
        "parameters": [float(one.num_parameters) for one in judged],
        "seconds of a step": [one.step_time_s for one in judged],
    }
    scores = [result.predicted(one) for one in judged]
    for column, (name, values) in enumerate(axes.items(), start=1):
        figure.add_scatter(
            x=values, y=scores, mode="markers", row=1, col=column, showlegend=False, hoverinfo="text",
            hovertext=[labels[one.number] for one in judged],
            marker={"color": [ACCENT if one.number == result.best.number else QUIET for one in judged], "size": 9},
        )  # fmt: skip
        best = _best_of_two(result, judged, values, scores)
        figure.add_scatter(
            x=[values[i] for i in best], y=[scores[i] for i in best], mode="lines", row=1, col=column,
            line={"color": ACCENT, "width": 1, "shape": "hv"}, showlegend=False, hoverinfo="skip",
        )  # fmt: skip
        figure.update_xaxes(title_text=name, type="log", row=1, col=column)
    figure.update_yaxes(title_text="score to be relied on at the deadline", row=1, col=1)
    figure.update_layout(template="plotly_white", height=420)
    return figure


def _best_of_two(
    result: SearchResult, judged: Sequence[Candidate], values: Sequence[float], scores: Sequence[float]
) -> list[int]:
    pairs = [(result.aims.sign * score, value) for score, value in zip(scores, values, strict=True)]
    return sorted(front(pairs), key=lambda i: values[i])


def _curves(result: SearchResult, labels: Mapping[int, str]) -> Any:
    from plotly.graph_objects import Figure

    figure = Figure()
    judged = [one for one in result.trials if one.points and one.number != result.best.number]
    for one in [*judged, result.best]:
        is_best = one.number == result.best.number
        figure.add_scatter(
            x=[point.train_s for point in one.points], y=[point.score for point in one.points], mode="lines",
            line={"color": ACCENT if is_best else QUIET, "width": 2.5 if is_best else 1}, showlegend=False,
            hoverinfo="text", hovertext=labels[one.number],
        )  # fmt: skip
    figure.update_layout(template="plotly_white", height=380, title="Learning curves; the delivered one is coloured")
    figure.update_xaxes(title_text="seconds of training", type="log")
    figure.update_yaxes(title_text="score")
    return figure


def _importance(result: SearchResult) -> Any:
    from plotly.graph_objects import Figure

    shares = dict(sorted(result.importance.items(), key=lambda item: item[1]))
    figure = Figure()
    figure.add_bar(x=list(shares.values()), y=list(shares), orientation="h", marker={"color": QUIET})
    figure.update_layout(template="plotly_white", height=120 + 28 * len(shares), title="What mattered for the score")
    figure.update_xaxes(tickformat=".0%")
    return figure


def _told(result: SearchResult, one: Candidate) -> str:
    """What is shown of a candidate under the pointer."""
    values = "".join(f"<br>{html.escape(name)} {html.escape(short(value))}" for name, value in one.params.items())
    return f"candidate {one.number}: {result.predicted(one):.4g}<br>{one.num_parameters:,} parameters{values}"
