"""The page of a search's report: one HTML file that loads nothing else."""

import html
import json
import math
import re
import statistics

from engines.search_record import n_generations, state_path
from reports.figures import draw, millions
from reports.search_results import SAME, RandomSearch, SearchResults, check_comparable
from space.limits import describe
from utils import atomic_write, duration

# --- the log -------------------------------------------------------------------------------------------------


def read_log(path):
    """(commands, versions, seconds) from a search's run.log, over all of its runs.

    The log has times without dates, so a gap of a day or more is not counted.
    """
    commands, versions, seconds, before = [], [], 0, None
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        match = re.match(r"(\d\d):(\d\d):(\d\d) (?:(command|versions): )?(.*)", line)
        if not match:
            continue
        now = int(match[1]) * 3600 + int(match[2]) * 60 + int(match[3])
        if match[4] == "command":
            commands.append(f"python {match[5]}")
        else:
            seconds += 0 if before is None else (now - before) % 86_400
        if match[4] == "versions":
            versions.append(match[5])
        before = now
    return commands, versions, seconds


# --- the page ------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light; --ink: #222; --grey: #666; --line: #e2e2e2; --accent: #0b4f8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 40px 24px 64px; color: var(--ink); background: #fff;
       font: 15px/1.5 Helvetica, Arial, "Liberation Sans", sans-serif; }
h1 { font-size: 26px; font-weight: 600; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; font-weight: 600; margin: 44px 0 12px; }
.status, figcaption, .tile small, dt, th { color: var(--grey); }
.status { margin: 0; }
.warning { margin: 12px 0 0; color: #8c2d04; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 0 28px; margin: 28px 0 0; }
.tile { border-top: 2px solid var(--accent); padding: 10px 0 14px; }
.tile b { display: block; font-size: 27px; font-weight: 600; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile small { display: block; font-size: 13px; line-height: 1.4; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13.5px; margin-top: 8px; max-width: 100ch; }
.datum:hover { filter: brightness(0.8); }
details { margin-top: 10px; font-size: 13.5px; } summary { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { font-weight: 400; }
th, td { padding: 4px 22px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
td.left, th.left { text-align: left; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
       overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; font-size: 13.5px; }
dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { padding: 0; } h2, figure, .tile { break-inside: avoid; } }
"""


def write_report(out, other=None):
    """Writes report.html and figures/ into the folder of a search, compared with the random search in `other` if given.

    Returns the page's path. Raises UserError where there is nothing to report yet.
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
    """The HTML of the report. Its policy lets a browser load nothing at all."""
    best = run.legal[0]
    status = f"{len(run.generations)} generations, finished" if run.state.get("done") else _unfinished(run)
    body = [
        "<h1>Single Path One-Shot: search report</h1>",
        f'<p class="status">{_text(status)}</p>',
        *(f'<p class="warning">Warning: {_text(text)}</p>' for text in run.warnings()),
        _tiles(run, comparison, best),
        "<h2>How the search went</h2>",
        _figure("generations", svgs, "Best, mean and spread by generation; best so far against random search", f"""
            (a) Every dot is a candidate, evaluated in the supernet on the search's validation images. (b) The best
            top-1 so far, at the end of each generation. {_text(_random_caption(comparison))}
            The best of many measurements is too high by chance, in both curves alike."""),
        _generation_table(run),
        "<h2>Accuracy and cost of every candidate</h2>",
        _figure("plane", svgs, "Candidates in the FLOPs-accuracy plane", f"""
            {len(run.succeeded)} candidates by FLOPs and top-1, coloured by generation; circled, the
            {len(run.front())} on the Pareto front: none with at most their FLOPs is more accurate.
            {"Dashed, the limits on FLOPs." * ("flops" in run.bounds)}
            {"Crosses, candidates that failed." * bool(run.n_failed)}"""),
        *([f"<h2>The front of {', '.join(run.objectives)}</h2>{_family(run, svgs)}"] if run.objectives else []),
        *([f"<h2>Latency</h2>{_latency(run)}"] if "latency" in run.settings else []),
        "<h2>Which operations the search takes</h2>",
        _figure("operations", svgs, "Share of each operation in each block", f"""
            Top: share of each operation in each block. Below: one map for each operation, a row for each generation.
            {1 / len(run.space.operations):.0%} is an even choice; vertical lines part the stages."""),
        "<h2>The best architectures</h2>",
        _figure("best", svgs, "The best candidates as paths", """
            From the image on the left to the classifier on the right; a box is a choice block, with its operation's
            kernel size (X: the Xception-like unit). FLOPs are multiply-adds, parameters those of a stand-alone
            network."""),
        _best_table(run),
        "<h2>What it cost</h2>",
        _cost(run),
        "<h2>How to repeat it</h2>",
        _settings(run),
    ]  # fmt: skip
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Search report: {best["acc1"]:.2f} % at {millions(best["flops"])}</title>
<style>{CSS}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


class _Html(str):
    """What is HTML already."""


def _text(text):
    return text if isinstance(text, _Html) else html.escape(str(text), quote=True)


def _unfinished(run):
    last, settings = run.generations[-1], run.settings
    generations = n_generations(run.state)
    text = f"Not finished: {len(run.results)} of {settings['population'] * generations} candidates"
    text += f", in generation {last.number} of {generations}"
    return f"{text}. It stopped: {run.state['error']}" if run.state.get("error") else text


def _tiles(run, comparison, best):
    seconds = sum(r["seconds"] or 0 for r in run.results)
    precision = ""
    if n := best["n_images"]:
        precision = f"; ±\u00a0{math.sqrt(best['acc1'] * (100 - best['acc1']) / n):.2f} standard error on {n:,} images"
    label = "top-1 of the best by loss" if "score" in best else "best top-1"
    params = millions(run.space.params(best["architecture"]))
    latency = f", {best['latency_ms']:.2f} ms predicted" if "latency_ms" in best else ""
    for m in (m for row in run.confirmations for m in row["measured"]):
        latency += f", {m['measured_ms']:.2f} ms measured" * (m["architecture"] == best["architecture"])
    tiles = [
        (f"{best['acc1']:.2f} %", f"{label}, in the supernet{precision}"),
        (millions(best["flops"]), f"its FLOPs; {params} parameters{latency}. Limits: {describe(run.bounds)}"),
    ]
    if comparison.at_budget:
        n, value, low, high = comparison.at_budget
        how = "measured"
        if low is not None:
            how = f"extrapolated, 95% interval {best['acc1'] - high:+.2f} to {best['acc1'] - low:+.2f}"
        note = f"points over the expected best of {n:,} random candidates, {how}"
        tiles.append((f"{best['acc1'] - value:+.2f}", note))
    tiles += [
        (f"{len(run.results):,}", f"candidates in {len(run.generations)} generations, {run.n_failed or 'none'} failed"),
        (duration(seconds), f"of evaluation, {seconds / len(run.succeeded):.1f} s a candidate"),
    ]
    tiles = "".join(f'<div class="tile"><b>{_text(b)}</b><small>{_text(s)}</small></div>' for b, s in tiles)
    return f'<div class="tiles">{tiles}</div>'


def _figure(name, svgs, label, caption):
    return (
        f'<figure id="{name}" role="img" aria-label="{_text(label)}">{svgs[name]}\n'
        f"<figcaption>{' '.join(caption.split())} <code>figures/{name}.svg</code></figcaption></figure>"
    )


def _random_caption(comparison):
    """Describes the curve of random search, and how far it was measured."""
    if not comparison.uniform:
        return "No curve of random search: under a limit this low the first generation is not a uniform sample."
    if not comparison.measured:
        return "No curve of random search: no random candidate has an accuracy."
    measure = (
        "To measure more: search.py --strategy random into a folder DIR of its own, then report.py RUN --random DIR."
    )
    size, source = comparison.size, "the first generation, drawn at random"
    if comparison.other:
        source = f"the random search in {comparison.other.out}"
    text = (
        "Random search, dashed: the expected best of n random legal candidates, exact for the "
        f"{size} accuracies of {source} (order statistics; at n = {size} it is simply the best of them)."
    )
    if comparison.extrapolated:
        text += (
            " Beyond them nothing was measured: the dotted line is an extrapolation by a normal distribution with "
            "their mean and standard deviation. Its 95% bootstrap interval covers these two only, not how normal the "
            "accuracies are. " + measure
        )
    elif comparison.skewed:
        text += f" It ends where the measurements do, which are too skewed to extrapolate from as normal. {measure}"
    elif size < SAME * comparison.budget:
        text += f" The curve ends where the measurements do: {size} candidates are too few to extrapolate from."
    return text


def _table(head, rows, left=()):
    def row(tag, cells):
        opening = (f"{tag} class=left" if i in left else tag for i in range(len(cells)))
        return f"<tr>{''.join(f'<{o}>{_text(c)}</{tag}>' for o, c in zip(opening, cells))}</tr>"

    body = "".join(row("td", cells) for cells in rows)
    return f'<div class="wide"><table><thead>{row("th", head)}</thead><tbody>{body}</tbody></table></div>'


def _generation_table(run):
    rows = []
    for g in run.generations:
        name = str(g.number) if g.closed else f"{g.number} (not finished)"
        numbers = [f"{g.best['acc1']:.2f}", f"{g.mean:.2f}", f"{g.sd:.2f}"] if g.succeeded else ["", "", ""]
        flops = statistics.fmean(r["flops"] for r in g.results)
        rows.append([name, len(g.results), len(g.results) - len(g.succeeded), *numbers, f"{flops / 1e6:.2f}"])
    head = ["generation", "candidates", "failed", "best top-1 %", "mean top-1 %", "standard deviation", "mean MFLOPs"]
    return f"<details><summary>Numbers by generation</summary>{_table(head, rows)}</details>"


def _best_table(run):
    rows = []
    for rank, r in enumerate(run.legal[:10], 1):
        costs = f"{r['flops']:,}", f"{run.space.params(r['architecture']):,}"
        loss = [f"{r['loss']:.3f}"] if "score" in r else []
        rows.append([rank, f"{r['acc1']:.2f}", f"{r['acc5']:.2f}", *loss, *costs, r["generation"], r["architecture"]])
    by_loss = ["loss"] * ("score" in run.legal[0])
    head = ["rank", "top-1 %", "top-5 %", *by_loss, "FLOPs", "parameters", "generation", "architecture"]
    return f"<details><summary>Numbers and architectures</summary>{_table(head, rows, left={len(head) - 1})}</details>"


def _family(run, svgs):
    """The front against each of its costs, and a table whose rows link the files of its members."""
    members, rows, timed = run.family(), [], "latency" in run.settings
    figures = [
        _figure(f"front-{cost}", svgs, f"The front in the plane of {cost} and accuracy", f"""
            Circled, the {len(members)} candidates of the front: no other one is at least as good in all of
            {", ".join(run.objectives)} and better in one.""")
        for cost in run.objectives if cost != "acc1"
    ]  # fmt: skip
    for path, r in members:
        ms = [f"{r['latency_ms']:.3f}"] * timed
        costs = f"{r['flops']:,}", f"{run.space.params(r['architecture']):,}", *ms
        rows.append([_Html(f'<a href="{path}">{path}</a>'), f"{r['acc1']:.2f}", *costs, r["generation"]])
        rows[-1].append(r["architecture"])
    head = ["file", "top-1 %", "FLOPs", "parameters", *["predicted ms"] * timed, "generation", "architecture"]
    return "".join(figures) + _table(head, rows, left={0, len(head) - 1})


def _latency(run):
    """What the table of the device predicts, beside whole networks measured after the last generation."""
    table, rows = run.settings["latency"], []
    setting = f"{table['device']}, {table['threads']} threads, batch size {table['batch_size']}, torch {table['torch']}"
    text = f"Predicted from a table of {setting}. Two measurements of a network differ by up to {table['spread']:.1%}."
    if not run.confirmations:
        return f"<p>{_text(text)} No network has been measured as a whole.</p>"
    for row in run.confirmations:
        for m in row["measured"]:
            numbers = [f"{m['predicted_ms']:.3f}", f"{m['measured_ms']:.3f}", "yes" if m["holds"] else "no"]
            rows.append([row["after"], *numbers, m["architecture"]])
        if row["correction"]:
            text += f" After generation {row['after']} none of the best held: {row['generations']} generations followed"
            text += f", with latencies times {row['correction']:.3f}."
    head = ["after generation", "predicted ms", "measured ms", "holds", "architecture"]
    return f"<p>{_text(text)}</p>{_table(head, rows, left={4})}"


def _cost(run):
    _, _, wall = read_log(state_path(run.out).with_name("run.log"))
    seconds = [r["seconds"] or 0 for r in run.results]
    pairs = {
        "candidates": f"{len(run.results)}, {run.n_failed or 'none'} of them failed",
        "evaluation": f"{duration(sum(seconds))} in all, {sum(seconds) / len(run.succeeded):.2f} s a candidate, "
        f"{sum(r['n_images'] or 0 for r in run.results):,} images validated",
        "wall clock": f"{duration(wall)} by the log, all starts together" if wall else "not recorded",
    }
    if run.n_failed:
        pairs["last failure"] = next(r.get("error", "") for r in reversed(run.results) if r["acc1"] is None)
    return _list(pairs)


def _settings(run):
    commands, versions, _ = read_log(state_path(run.out).with_name("run.log"))
    pairs = {
        "command": "\n".join(dict.fromkeys(commands)) or "not recorded",
        "versions": "\n".join(dict.fromkeys(versions)) or "not recorded",
    }
    pairs["seed"] = run.settings["seed"]
    settings = dict(run.settings)
    if "latency" in settings:
        settings["latency"] = {k: v for k, v in settings["latency"].items() if k != "medians"}
    return _list(pairs | {k: v for k, v in settings.items() if k not in pairs})


def _list(pairs):
    def shown(value):
        return "<br>".join(map(_text, (value if isinstance(value, str) else json.dumps(value)).splitlines()))

    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{shown(v)}</dd>" for k, v in pairs.items()) + "</dl>"
