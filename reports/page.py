"""The page of a search's report: one HTML file that loads nothing else."""

import base64
import json
import math
import pathlib

import jinja2

from engines.search_record import n_generations
from reports.figures import draw
from reports.search_results import SAME, RandomSearch, SearchResults, check_comparable
from space.limits import describe, shown
from utils import atomic_write, duration

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATE = ENVIRONMENT.get_template("page.html.j2", globals={"shown": shown, "SAME": SAME})


def write_report(out, other=None):
    """Writes report.html and figures/ into the folder of a search, compared with the random search in `other` if given.

    Returns the page's path. Raises UserError if there is nothing to report yet.
    """
    run = SearchResults(out)
    if other is not None:
        other = SearchResults(other)
        check_comparable(run, other)
    comparison = RandomSearch(run, other)
    svgs = draw(run, comparison, run.out / "figures")
    path = run.out / "report.html"
    with atomic_write(path) as file:
        file.write(page(run, comparison, svgs))
    return path


def page(run, comparison, svgs):
    """The HTML of the report. Its policy lets a browser load nothing at all.

    `run` is a `SearchResults`, `comparison` its `RandomSearch`, and `svgs` has the figures in bytes by name.
    """
    best = run.legal[0]
    latency = run.settings.get("latency")
    return TEMPLATE.render(
        run=run,
        comparison=comparison,
        best=best,
        by_loss="score" in best,
        latency=latency,
        runtime=latency["runtime"] if latency else "torch",
        main_cost=_main_cost(run, best),
        measured=any(map(run.measured_text, run.legal[:10])),
        beyond=[r for r in run.succeeded if run.is_beyond(r)],
        status=f"{len(run.generations)} generations, finished" if run.state.get("done") else _unfinished(run),
        tiles=_tiles(run, comparison, best),
        cost=_cost(run),
        settings=_settings(run),
        svgs={name: base64.b64encode(svg).decode() for name, svg in svgs.items()},
    )


def _unfinished(run):
    generations = n_generations(run.state)
    text = f"Not finished: {len(run.results)} of {run.settings['population'] * generations} candidates"
    text += f", in generation {run.generations[-1].number} of {generations}"
    return f"{text}. It stopped: {run.state['error']}" if run.state.get("error") else text


def _tiles(run, comparison, best):
    """(number, what it is) of each of the tiles at the top."""
    seconds = sum(r["seconds"] or 0 for r in run.results)
    label = "top-1 of the best by loss" if "score" in best else "best top-1"
    label += ", in the supernet"
    if n := best["n_images"]:
        error = math.sqrt(best["acc1"] * (100 - best["acc1"]) / n)
        label += f"; ±\u00a0{error:.2f} standard error on {n:,} images"
    tiles = [(f"{best['acc1']:.2f} %", label), (_main_cost(run, best), _costs(run, best))]
    if comparison.at_budget:
        n, value, low, high = comparison.at_budget
        how = "measured"
        if low is not None:
            interval = f"95% interval {best['acc1'] - high:+.2f} to {best['acc1'] - low:+.2f}"
            unknown = "without an interval, since the spread of random candidates is within the noise"
            how = f"extrapolated, {unknown if run.first_warning else interval}"
        note = f"points over the expected best of {n:,} random candidates, {how}"
        tiles.append((f"{best['acc1'] - value:+.2f}", note))
    return [
        *tiles,
        (f"{len(run.results):,}", f"candidates in {len(run.generations)} generations, {run.n_failed or 'none'} failed"),
        (duration(seconds), f"of evaluation, {seconds / len(run.succeeded):.1f} s per candidate"),
    ]


def _main_cost(run, best):
    """The cost of the best that its search limits, as measured, or else as predicted or counted."""
    measured = run.measured_text(best) if run.main_cost == "latency" else ""
    return f"{measured} ms" if measured else shown(run.main_cost, run.cost(run.main_cost, best))


def _costs(run, best):
    """What stands below the main cost of the best: what it is, the other costs, and the limits."""
    flops = f"{shown('flops', best['flops'])} FLOPs"
    params = f"{shown('params', run.cost('params', best))} parameters"
    if run.main_cost == "latency":
        predicted = f"{best['latency_ms']:.3f} ms predicted"
        is_measured = run.measured_text(best)
        first = f"its latency in {run.settings['latency']['runtime']}, {'measured' if is_measured else 'predicted'}"
        words = [first, *([predicted] if is_measured else []), flops, params]
    else:
        words = ["its FLOPs", params] if run.main_cost == "flops" else ["its parameters", flops]
    return f"{words[0]}; {', '.join(words[1:])}. Limits: {describe(run.bounds)}"


def _cost(run):
    wall = sum(start["last"] - start["begun"] for start in run.starts)
    seconds = [r["seconds"] or 0 for r in run.results]
    pairs = {
        "candidates": f"{len(run.results)}, {run.n_failed or 'none'} of them failed",
        "evaluation": f"{duration(sum(seconds))} in all, {sum(seconds) / len(run.succeeded):.2f} s per candidate, "
        f"{sum(r['n_images'] or 0 for r in run.results):,} images validated",
        "wall clock": f"{duration(wall)}, all starts together" if run.starts else "not recorded",
    }
    if run.n_failed:
        pairs["last failure"] = next(r.get("error", "") for r in reversed(run.results) if r["acc1"] is None)
    return pairs


def _settings(run):
    pairs = {
        name: "\n".join(dict.fromkeys(start[name] for start in run.starts)) or "not recorded"
        for name in ("command", "versions")
    }
    pairs["seed"] = run.settings["seed"]
    settings = dict(run.settings)
    if "latency" in settings:
        settings["latency"] = {k: v for k, v in settings["latency"].items() if k != "medians"}
    pairs |= {k: v for k, v in settings.items() if k not in pairs}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in pairs.items()}
