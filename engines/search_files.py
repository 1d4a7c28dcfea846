"""The files of a search, as they are read: to resume it, to report it, and while it runs."""

import contextlib
import dataclasses
import json
import pathlib

from settings.fields import difference, flag
from settings.subjects import FIELDS, SEARCH, DataConfig, is_path
from space.costs import Costs, OwnCost
from space.limits import bounds_of, describe
from space.search_space import SearchSpace
from utils import UserError, atomic_write, read_json

LARGE = {  # settings of a search whose values nobody reads: (where they come from, how they differ)
    "space": ("search space", "another one"), "checkpoint": ("--checkpoint", "other weights"),
    "split": ("held-out images", "others"), "costs": ("--flops-table", "other FLOPs"),
    "latency": ("--latency-table", "other latencies"), "counted": ("--own", "other costs"),
    "own_costs": ("costs of --own", "others"), "strategy_code": ("the searcher of --own", "another one"),
}  # fmt: skip


def n_generations(state):
    """How many generations a search has in all, with those that confirmations added."""
    return state["settings"]["generations"] + sum(row["generations"] for row in state["confirmations"])


def is_exhausted(state):
    """Whether a search ended because no further candidate within the limits was new."""
    return state["done"] and state["evaluated"] < n_generations(state) * state["settings"]["population"]


def unconfirmed(state):
    """Whether a search whose generations are complete limits latency, and its best candidates are to be measured."""
    rows = state["confirmations"]
    return "latency" in state["settings"].get("limits", ()) and not (rows and rows[-1]["after"] == state["generation"])


def own_costs_of(settings, function=lambda name: None):
    """The own costs (name -> OwnCost) of a search; `function(name)` is one that is any function of a candidate."""
    found = {name: OwnCost(**values) for name, values in settings.get("own_costs", {}).items()}
    return {name: cost if cost.rows else cost._replace(function=function(name)) for name, cost in found.items()}


def as_own_costs(own):
    """The setting that `own_costs_of` reads, or none."""
    costs = {name: {k: v for k, v in cost._asdict().items() if k != "function"} for name, cost in own.items()}
    return {"own_costs": costs} if costs else {}


def children_wanted(settings):
    """How many candidates of each generation but the first are to be new children, or what an own searcher asks for."""
    return settings["population"] if "strategy" in settings else settings["mutation"] + settings["crossover"]


def space_of(settings, function=lambda name: None):
    """The SearchSpace of a search with these settings, with the costs that the search had.

    An operation of one's own is counted by its module, which only search.py has; tables are not read again. `function`
    is that of `own_costs_of`.
    """
    space = SearchSpace.from_dict(settings["space"])
    if counted := settings.get("counted"):
        space = dataclasses.replace(space, given_costs=Costs(*counted))
    given = {}
    if table := settings.get("costs"):
        given |= {"flops": table[0], "stem_flops": table[1], "tail_flops": 0}
    if table := settings.get("latency"):
        given |= {"latency": table["medians"], "fixed_latency": table["stem_and_tail"]}
    if own := own_costs_of(settings, function):
        given["own"] = own
    return space.with_costs(**given) if given else space


def cost_of(name, result, own):
    """A cost in a result, as SearchSpace.cost has it; a result has those that are limited. `own` are those of Costs."""
    if name in own:
        return round(result[name] * own[name].scale) if own[name].rows else result[name]
    return round(result["latency_ms"] * 1e6) if name == "latency" else result[name]


def costs_of(settings):
    """The costs that matter in a search with these settings: FLOPs, what it limits, and what it makes low."""
    named = {"flops", *settings.get("limits", ()), *settings.get("objectives", ())}
    return [name for name in ("flops", "params", "latency", *settings.get("own_costs", ())) if name in named]


def state_path(out):
    return pathlib.Path(out) / "checkpoints" / "search" / "state.json"


def images_path(out):
    """The list of the images, which search.py writes for its trials."""
    return state_path(out).with_name("images.json")


def listed_images(out):
    """`images_path`, or None where there is no such list: of synthetic images, or on a machine that does not see it."""
    path = images_path(out)
    return path if path.exists() else None


def has_search(out):
    """Whether there is a search in a folder."""
    return state_path(out).exists()


def read_state(out):
    """The state of the search in a folder; see SearchRecord. Raises UserError if there is none, or it is damaged."""
    path = state_path(out)
    if not path.exists():
        raise UserError(f"{out}: no search here ({path} is missing); name the --out folder of a search")
    found = read_json(path)
    keys = ("settings", "generation", "evaluated", "best", "done")
    if not isinstance(found, dict) or not found.keys() >= {*keys} or not isinstance(found["settings"], dict):
        raise UserError(f"{path}: not the state of a search; name another --out")
    # Searches of before have no such lists.
    return {"error": None, "warnings": [], "starts": [], "children": [], "confirmations": [], **found}


def settings_difference(before, now, ignore=()):
    """{flag, or what it is: "0.5 (was 0.3)"} of what differs between the settings of two searches."""
    changes = difference(SEARCH, _by_flags(before), _by_flags(now), ignore)
    for name in changes.keys() & LARGE.keys():
        where, how = LARGE[name]
        changes[where] = f"{how} than then"
    return {flag(n) if n in FIELDS else n: change for n, change in changes.items() if n not in LARGE}


def _by_flags(settings):
    """The settings of a search by the names of its flags."""
    settings = dict(settings)
    data = settings.pop("data", None)
    if isinstance(data, dict):
        with contextlib.suppress(TypeError):
            data = DataConfig.from_dict(data).to_dict()
        data = dict(data)
        if is_path("group_by", data.get("group_by")):
            data.pop("group_by")  # may have moved; the split knows its content
        settings |= data
    with contextlib.suppress(KeyError, TypeError, UserError):
        # Records of before have another hash of the same operations, which `from_dict` reads as that of now.
        settings["space"] = SearchSpace.from_dict(settings["space"]).to_dict()
    if settings.keys() & {"limits", "flops_limit"}:
        settings["limit"] = describe(bounds_of(settings), own_costs_of(settings))
    return {name: value for name, value in settings.items() if name not in ("limits", "flops_limit")}


def read_generations(out, repair=False, skip=0):
    """The results in acc/*.jsonl, a list for each generation but the first `skip`, whose files are not opened.

    An incomplete last line, of a search that was killed while writing it, is ignored, and removed if `repair` is true.
    Raises UserError if another line is damaged.
    """
    paths = sorted((pathlib.Path(out) / "acc").glob("*.jsonl"), key=lambda path: (len(path.name), path.name))
    return [_read_generation(path, repair) for path in paths[skip:]]


def _read_generation(path, repair):
    results, lines = [], path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        if repair:
            with atomic_write(path, "wb") as file:
                file.writelines(lines)
    for number, line in enumerate(lines, 1):
        try:
            results.append(json.loads(line))
            results[-1]["architecture"], results[-1]["acc1"], results[-1]["acc5"]
        except (ValueError, KeyError, TypeError):
            text = f"{path}: line {number} is damaged; remove it to have that candidate evaluated again"
            raise UserError(text) from None
    return results


def by_score(result):
    """The order of results: by top-1, ties by top-5; by score in a search that ranks by another one."""
    return (result["score"],) if "score" in result else (result["acc1"], result["acc5"])


def ranked(results):
    """The results with an accuracy, best first; of equals, the earlier one first."""
    return sorted((r for r in results if r["acc1"] is not None), key=by_score, reverse=True)
