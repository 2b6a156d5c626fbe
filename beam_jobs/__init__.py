"""The stages of a month as Beam jobs, and the command that runs them."""

import os

# What this distribution is made of.
PACKAGES = ("schemas", "model", "beam_jobs", "serving")
# Before anything loads Arrow: its allocator would give memory back after 10 ms, to take it again, zeroed, for the next batch, which took a
# sixth of what the lookup table costs.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "1000")
