"""The end of a search that limits latency: its best candidates are measured as whole networks."""

from devices.elsewhere import results_path
from devices.table import measure_like, write_like
from engines.search_record import SearchRecord
from settings.subjects import RUNTIMES
from space.limits import milliseconds
from utils import log


def confirm(out, table):
    """Measures the ten best of the search in `out`, whose generations are complete, as whole networks on this device.

    With them the largest legal candidate, which decides nothing. The record of the search then has a winner, or more
    generations to run under a corrected limit. Those of a table of another device are written for it, and read back
    once they are measured; until then, returns False.
    """
    record = SearchRecord(out)
    known = record.state.get("largest")  # not of searches of before, which asked another device for the optimum
    record.pending()  # replays the search
    evolution, space = record.evolution, record.space
    best = (evolution.front() if evolution.objectives else evolution.legal_ranked())[:10]
    folder = None
    largest = space.check(known["architecture"]) if known else evolution.limits.optimum("flops", -1)
    more = [largest] if largest and largest not in best else []
    if table.get("elsewhere"):
        folder = out / "device" / f"{evolution.generation:03}"
        if not results_path(folder).exists():
            n, size = write_like(table, space, [*best, *more], folder)
            text = "warning: the winner's latency is not checked: %s has %d networks, %.1f MB, for %s; "
            text += "run on_device.py there, put results.json into the folder, then --resume"
            log.warning(text, folder, n, size / 1e6, table["device"])
            record.lock.close()
            return False
    log.info("measuring the %d best candidates as whole networks in %s", len(best), RUNTIMES[table["runtime"]])
    measured, scale = measure_like(table, space, [*best, *more], folder)
    for candidate, ns in zip(more, measured[len(best) :]):
        log.info("the largest legal candidate, %s: measured %s ms", list(candidate), milliseconds(ns / 1e6))
        if known:
            known |= {"measured_ms": ns / 1e6, "holds": evolution.limits.holds("latency", ns)}
    if abs(scale - 1) > 0.05:
        text = "this device takes %.2f times as long as when the table was measured: latencies are scaled to that time"
        log.warning(text, 1 / scale)
    row = record.confirm(dict(zip(best, measured)))
    record.lock.close()
    for rank, m in enumerate(row["measured"], 1):
        numbers = f"predicted {milliseconds(m['predicted_ms'])} ms, measured {milliseconds(m['measured_ms'])} ms"
        log.info("rank %d: %s%s", rank, numbers, "" if m["holds"] else ", beyond the limit")
    if row["generations"]:
        log.info("none holds: %d more generations, latencies times %.3f", row["generations"], row["correction"])
    return True
