"""The tables of the three classic curves, of the rows that `seguncert.apps.curves` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from seguncert.apps.curves import DROPOUT, ENSEMBLE, EVEN, METHODS, NEAR, NET
from seguncert.maps import MAPS, OF_SAMPLES
from seguncert.truth import OFF

Row = Mapping[str, Any]
Rows = Sequence[Row]
OF_ALL = ("confidence", "entropy", *OF_SAMPLES)
WEIGHTINGS = {
    "even": f"every x from {EVEN[0]:g} to {EVEN[1]:g} counts alike",
    "density": "x counts as often as it occurs in the data",
}


def tables(rows: Rows) -> list[Table]:
    """All of them, in the order of reading."""
    return [distances(rows), crossings(rows), methods(rows), *(detections(rows, each) for each in WEIGHTINGS)]


def distances(rows: Rows) -> Table:
    """KL of the net overall and by decile, after each number of updates."""
    table = _table("KL of the net from the exact posterior, in 10⁻³ nat, by quadrature", "problem", "updates",
                   "KL, range of seeds", *map(str, range(1, 11)))  # fmt: skip
    table.caption = (
        "1 to 10: mean KL in the tenths of the data by density of x, from the densest to the sparsest;"
        " each is a region of x that holds a tenth of the probability"
    )
    for problem in _order(rows, "problem"):
        for updates in _order(rows, "updates", problem=problem):
            key = {"problem": problem, "method": NET, "updates": updates}
            deciles = [_thousandths(_row(rows, **key, figure=f"kl.decile {d}")["mean"]) for d in range(1, 11)]
            table.add_row(problem, f"{updates:,}", _range(_row(rows, **key, figure="kl"), _thousandths), *deciles)
        table.add_section()
    return table


def crossings(rows: Rows) -> Table:
    """How far the net is off where the posterior crosses 1/2."""
    table = _table(f"Largest |p − q| of the net within {NEAR:g} of a crossing of the exact posterior and 1/2",
                   "problem", "crossing at x", "after updates", "largest |p − q|, range of seeds")  # fmt: skip
    for row in rows:
        if row["method"] == NET and row["figure"].startswith("error at "):
            table.add_row(row["problem"], row["figure"].split()[-1], f"{row['updates']:,}", _range(row, _plain))
    return table


def methods(rows: Rows) -> Table:
    """What calibrators, dropout and ensembles make of it."""
    table = _table("What each method makes of it, after the last update", "problem", "method", "KL, range of seeds",
                   "in the sparsest tenth", "largest |p − q|, last crossing", f"off by > {OFF}: even", "by density")  # fmt: skip
    table.caption = f"KL in 10⁻³ nat. off: share of x with |p − q| > {OFF}; even: {WEIGHTINGS['even']}; by density: {WEIGHTINGS['density']}"
    for problem in _order(rows, "problem"):
        last = max(_order(rows, "updates", problem=problem))
        rightmost = [each for each in _order(rows, "figure", problem=problem) if each.startswith("error at ")][-1]
        for method in METHODS:
            key = {"problem": problem, "method": method, "updates": last}
            even, density = (100 * _row(rows, **key, figure=f"off.{each}")["mean"] for each in WEIGHTINGS)
            table.add_row(
                problem, method, _range(_row(rows, **key, figure="kl"), _thousandths),
                _range(_row(rows, **key, figure="kl.decile 10"), _thousandths),
                _range(_row(rows, **key, figure=rightmost), _plain), f"{even:.3g} %", f"{density:.2g} %",
            )  # fmt: skip
        table.add_section()
    return table


def detections(rows: Rows, weighting: str) -> Table:
    """AUROC of each map of each method."""
    table = _table(f"AUROC of the maps' doubt for x where the method is off by > {OFF}; {WEIGHTINGS[weighting]}",
                   "problem", "method", "seeds", *(MAPS[name].title for name in OF_ALL))  # fmt: skip
    table.caption = (
        "mean and range of the seeds that are off anywhere, whose number is given; methods that are off nowhere are not listed."
        " Of two classes confidence and entropy put x in the same order"
    )
    for problem in _order(rows, "problem"):
        last = max(_order(rows, "updates", problem=problem))
        for method in METHODS:
            key = {"problem": problem, "method": method, "updates": last}
            found = [_row(rows, **key, figure=f"auroc.{weighting}.{name}") for name in OF_ALL]
            if found[0]["seeds"]:
                table.add_row(
                    problem, method, str(found[0]["seeds"]), *(_range(row, _plain) if row else "" for row in found)
                )
        table.add_section()
    return table


def verdicts(rows: Rows, problem: str = "sparse") -> list[str]:
    """In sentences: the best map of the net, of MC dropout and of the ensemble, and what a fitted temperature changes."""
    last, found = max(_order(rows, "updates", problem=problem)), []
    here = [row for row in rows if row["problem"] == problem and row["updates"] == last]
    for weighting, words in WEIGHTINGS.items():
        start, best = f"auroc.{weighting}.", []
        for method in (NET, DROPOUT, ENSEMBLE):
            known = [
                row for row in here if row["method"] == method and row["figure"].startswith(start) and row["seeds"]
            ]
            if known:
                row = max(known, key=lambda row: row["mean"])
                title = MAPS[row["figure"].removeprefix(start)].title.lower()
                best.append(f"of {method} {title}, {_range(row, _plain)}")
        said = "the best map by AUROC is " + "; ".join(best) if best else f"nothing is off by more than {OFF} anywhere"
        found.append(f"{problem}, {words}: {said}.")
    error = [
        row for row in here if row["figure"].startswith("error at ") and row["method"] in (NET, f"{NET}, temperature")
    ]
    if len({row["method"] for row in error}) == 2:
        before, after = (
            [row for row in error if row["method"] == method][-1] for method in (NET, f"{NET}, temperature")
        )
        found.append(
            f"{problem}: a fitted temperature takes the largest |p − q| at x = {before['figure'].split()[-1]} from"
            f" {_plain(before['mean'])} to {_plain(after['mean'])}."
        )
    return found


def _table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("problem", "method") else "right")
    return table


def _row(rows: Rows, **key: Any) -> Any:
    return next((row for row in rows if all(row[name] == value for name, value in key.items())), None)


def _order(rows: Rows, name: str, **key: Any) -> list[Any]:
    """What there is of it, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows if all(row[k] == value for k, value in key.items())))


def _range(row: Row, write: Callable[[float], str]) -> str:
    if row["mean"] is None:
        return "–"
    return f"{write(row['mean'])} ({write(row['lowest'])}–{write(row['highest'])})"


def _thousandths(value: float) -> str:
    return f"{1e3 * value:.2g}" if value < 0.0995 else f"{1e3 * value:.0f}"


def _plain(value: float) -> str:
    return f"{value:.3f}"
