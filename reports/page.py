"""The page of a search's report: one HTML file that loads nothing else."""

import base64
import json
import pathlib

import jinja2

from engines.generations import reliability_text, standard_error
from engines.search_files import is_exhausted, n_generations
from reports.figures import draw
from reports.search_results import SAME, RandomSearch, SearchResults, check_comparable
from space.limits import bounding, describe, milliseconds, share_text, shown
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
    search = SearchResults(out)
    if other is not None:
        other = SearchResults(other)
        check_comparable(search, other)
    comparison = RandomSearch(search, other)
    svgs = draw(search, comparison, search.out / "figures")
    path = search.out / "report.html"
    with atomic_write(path) as file:
        file.write(page(search, comparison, svgs))
    return path


def page(search, comparison, svgs):
    """The HTML of the report. Its policy lets a browser load nothing at all.

    `search` is a `SearchResults`, `comparison` its `RandomSearch`, and `svgs` has the figures in bytes by name.
    """
    best = search.winner
    latency = search.settings.get("latency")
    return TEMPLATE.render(
        search=search,
        comparison=comparison,
        best=best,
        latency=latency,
        runtime=latency["runtime"] if latency else "torch",
        main_cost=_main_cost(search, best),
        measured=any(map(search.measured_text, search.legal[:10])),
        reliability=reliability_text(search.generations[0].results),
        beyond=[r for r in search.succeeded if search.is_beyond(r)],
        status=_status(search),
        tiles=_tiles(search, comparison, best),
        cost=_cost(search),
        settings=_settings(search),
        svgs={name: base64.b64encode(svg).decode() for name, svg in svgs.items()},
    )


def _status(search):
    generations = n_generations(search.state)
    if is_exhausted(search.state):
        return f"{len(search.generations)} generations, finished: no further candidate within the limits is new"
    if search.state["done"]:
        return f"{len(search.generations)} generations, finished"
    text = f"Not finished: {len(search.results)} of {search.settings['population'] * generations} candidates"
    text += f", in generation {search.generations[-1].number} of {generations}"
    return f"{text}. It stopped: {search.state['error']}" if search.state["error"] else text


def _tiles(search, comparison, best):
    """(number, what it is) of each of the tiles at the top."""
    seconds = sum(r["seconds"] or 0 for r in search.results)
    label = f"top-1 of the best by loss, {best['loss']:.3f}" if search.by_loss else "best top-1"
    label += ", in the supernet"
    if n := best["n_images"]:
        label += "; ±\u00a0{:.2f} {} on {:,} images".format(*standard_error(best), n)
    tiles = [(f"{best['acc1']:.2f} %", label), (_main_cost(search, best), _costs(search, best))]
    if comparison.at_budget:
        tiles.append(_beside_random(search, comparison, best))
    candidates = f"candidates in {len(search.generations)} generations, {search.n_failed or 'none'} failed"
    each = f"of evaluation, {seconds / len(search.succeeded):.1f} s per candidate"
    return [*tiles, (f"{len(search.results):,}", candidates), (duration(seconds), each)]


def _beside_random(search, comparison, best):
    """The tile that compares the best with random search, in the score by which the search ranks."""
    n, value, *interval = comparison.at_budget
    found = search.as_read(search.score(best))
    unit, digits = ("in loss,", 3) if search.by_loss else ("points", 2)

    def beside(value):
        return f"{abs(found - value):.{digits}f}", "above" if found >= value else "below"

    how = "measured"
    if None not in interval:
        how = "extrapolated, without an interval, since the spread of random candidates is within the noise"
        if not search.first_warning:
            ends = [" ".join(beside(end)) for end in interval[::-1]]
            how = f"extrapolated, 95% interval {' to '.join(ends)}"
    number, side = beside(value)
    return number, f"{unit} {side} the expected best of {n:,} random candidates, {how}"


def _main_cost(search, best):
    """The cost of the best that its search limits, as measured, or else as predicted or counted."""
    measured = search.measured_text(best) if search.main_cost == "latency" else ""
    return f"{measured} ms" if measured else shown(search.main_cost, search.cost(search.main_cost, best), search.own)


def _costs(search, best):
    """What stands below the main cost of the best: what it is, the other costs, and the limits."""
    flops = f"{shown('flops', best['flops'])} FLOPs"
    params = f"{shown('params', search.cost('params', best))} parameters"
    if search.main_cost == "latency":
        predicted = f"{milliseconds(best['latency_ms'])} ms predicted"
        is_measured = search.measured_text(best)
        first = f"its latency in {search.settings['latency']['runtime']}, {'measured' if is_measured else 'predicted'}"
        words = [first, *([predicted] if is_measured else []), flops, params]
    elif search.main_cost in search.own:
        words = [f"its {search.main_cost}", flops, params]
    else:
        words = ["its FLOPs", params] if search.main_cost == "flops" else ["its parameters", flops]
    limits = "No limit excludes a candidate"
    if bounding(search.space, search.bounds):
        limits = f"Limits: {describe(search.bounds, search.own)}, {share_text(search.share)}"
    return f"{words[0]}; {', '.join(words[1:])}. {limits}"


def _cost(search):
    wall = sum(max(0, start["last"] - start["begun"]) for start in search.starts)  # a clock may be set back
    seconds = [r["seconds"] or 0 for r in search.results]
    pairs = {
        "candidates": f"{len(search.results)}, {search.n_failed or 'none'} of them failed",
        "evaluation": f"{duration(sum(seconds))} in all, {sum(seconds) / len(search.succeeded):.2f} s per candidate, "
        f"{sum(r['n_images'] or 0 for r in search.results):,} images validated",
        "wall clock": f"{duration(wall)}, all starts together" if search.starts else "not recorded",
    }
    if search.n_failed:
        pairs["last failure"] = next(r.get("error", "") for r in reversed(search.results) if r["acc1"] is None)
    return pairs


def _settings(search):
    pairs = {
        name: "\n".join(dict.fromkeys(start[name] for start in search.starts)) or "not recorded"
        for name in ("command", "versions")
    }
    pairs["seed"] = search.settings["seed"]
    settings = dict(search.settings)
    if "latency" in settings:
        settings["latency"] = {k: v for k, v in settings["latency"].items() if k != "medians"}
    if search.own:
        settings["own_costs"] = {name: cost.unit for name, cost in search.own.items()}
    pairs |= {k: v for k, v in settings.items() if k not in pairs}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in pairs.items()}
