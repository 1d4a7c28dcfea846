"""The page of a search's report: one HTML file that loads nothing else."""

import base64
import json
import math
import pathlib

import jinja2

from engines.search_files import n_generations
from reports.figures import draw
from reports.search_results import SAME, RandomSearch, SearchResults, check_comparable
from space.limits import describe, milliseconds, share_text, shown
from utils import atomic_write, duration

ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
TEMPLATE = ENVIRONMENT.get_template("page.html.j2", globals={"milliseconds": milliseconds, "SAME": SAME})


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
    best = run.winner
    latency = run.settings.get("latency")
    return TEMPLATE.render(
        run=run,
        comparison=comparison,
        best=best,
        latency=latency,
        runtime=latency["runtime"] if latency else "torch",
        main_cost=_main_cost(run, best),
        measured=any(map(run.measured_text, run.legal[:10])),
        beyond=[r for r in run.succeeded if run.is_beyond(r)],
        status=_status(run),
        tiles=_tiles(run, comparison, best),
        cost=_cost(run),
        settings=_settings(run),
        svgs={name: base64.b64encode(svg).decode() for name, svg in svgs.items()},
    )


def _status(run):
    generations = n_generations(run.state)
    if run.is_exhausted:
        return f"{len(run.generations)} generations, finished: no further candidate within the limits is new"
    if run.state.get("done"):
        return f"{len(run.generations)} generations, finished"
    text = f"Not finished: {len(run.results)} of {run.settings['population'] * generations} candidates"
    text += f", in generation {run.generations[-1].number} of {generations}"
    return f"{text}. It stopped: {run.state['error']}" if run.state.get("error") else text


def _tiles(run, comparison, best):
    """(number, what it is) of each of the tiles at the top."""
    seconds = sum(r["seconds"] or 0 for r in run.results)
    label = f"top-1 of the best by loss, {best['loss']:.3f}" if run.by_loss else "best top-1"
    label += ", in the supernet"
    if n := best["n_images"]:
        error = math.sqrt(best["acc1"] * (100 - best["acc1"]) / n)
        label += f"; ±\u00a0{error:.2f} standard error on {n:,} images"
    tiles = [(f"{best['acc1']:.2f} %", label), (_main_cost(run, best), _costs(run, best))]
    if comparison.at_budget:
        tiles.append(_beside_random(run, comparison, best))
    return [
        *tiles,
        (f"{len(run.results):,}", f"candidates in {len(run.generations)} generations, {run.n_failed or 'none'} failed"),
        (duration(seconds), f"of evaluation, {seconds / len(run.succeeded):.1f} s per candidate"),
    ]


def _beside_random(run, comparison, best):
    """The tile that compares the best with random search, in the score by which the search ranks."""
    n, value, *interval = comparison.at_budget
    found = run.as_read(run.score(best))
    unit, digits = ("in loss,", 3) if run.by_loss else ("points", 2)

    def beside(value):
        return f"{abs(found - value):.{digits}f}", "above" if found >= value else "below"

    how = "measured"
    if None not in interval:
        how = "extrapolated, without an interval, since the spread of random candidates is within the noise"
        if not run.first_warning:
            ends = [" ".join(beside(end)) for end in interval[::-1]]
            how = f"extrapolated, 95% interval {' to '.join(ends)}"
    number, side = beside(value)
    return number, f"{unit} {side} the expected best of {n:,} random candidates, {how}"


def _main_cost(run, best):
    """The cost of the best that its search limits, as measured, or else as predicted or counted."""
    measured = run.measured_text(best) if run.main_cost == "latency" else ""
    return f"{measured} ms" if measured else shown(run.main_cost, run.cost(run.main_cost, best))


def _costs(run, best):
    """What stands below the main cost of the best: what it is, the other costs, and the limits."""
    flops = f"{shown('flops', best['flops'])} FLOPs"
    params = f"{shown('params', run.cost('params', best))} parameters"
    if run.main_cost == "latency":
        predicted = f"{milliseconds(best['latency_ms'])} ms predicted"
        is_measured = run.measured_text(best)
        first = f"its latency in {run.settings['latency']['runtime']}, {'measured' if is_measured else 'predicted'}"
        words = [first, *([predicted] if is_measured else []), flops, params]
    else:
        words = ["its FLOPs", params] if run.main_cost == "flops" else ["its parameters", flops]
    limits = (
        f"Limits: {describe(run.bounds)}, {share_text(run.share)}" if run.limited else "No limit excludes a candidate"
    )
    return f"{words[0]}; {', '.join(words[1:])}. {limits}"


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
