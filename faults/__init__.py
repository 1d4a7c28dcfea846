"""Faults that are injected into the commands, and inputs that break their parsers."""

import utils  # noqa: F401  # before torch: it sets OpenMP
