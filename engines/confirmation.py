"""The end of a search that limits latency: its best candidates are measured as whole networks."""

from devices.table import measure_like
from engines.search_record import SearchRecord
from settings.subjects import RUNTIMES
from space.limits import milliseconds
from utils import log


def confirm(out, table):
    """Measures the ten best of the search in `out`, whose generations are complete, as whole networks on this device.

    The record of the search then has a winner, or more generations to run under a corrected limit.
    """
    record = SearchRecord(out)
    record.pending()  # replays the search
    best = (record.evolution.front() if record.evolution.objectives else record.evolution.legal_ranked())[:10]
    log.info("measuring the %d best candidates as whole networks in %s", len(best), RUNTIMES[table["runtime"]])
    measured, scale = measure_like(table, record.space, best)
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
