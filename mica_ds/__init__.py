"""Continued pretraining with MiCA adapters under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"

import os

# OpenBLAS's idle threads spin for some 30 ms, and take the core from torch's (measured: 2.3 instead of 2.2 s for a
# 14336-row weight, on two threads); it reads this when numpy or scipy loads it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
# OpenMP's, too, would spin for a millisecond and more, and slow a rank many times beside any other work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Nothing is asked of a model hub at run time; the hub's client reads this when it is loaded.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
