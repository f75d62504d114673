"""Command line and other front ends; no algorithm lives here."""

import os

# Threads that wait for each other spin for milliseconds by default: while anything else runs on
# one of the cores, a run took 65 s instead of 15 s. It counts where torch is not loaded yet.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
