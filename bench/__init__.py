"""Studies: each module is one, run by `python -m bench.NAME`; study.py has what they share."""

import utils  # noqa: F401  # before torch: it sets OpenMP
