"""Continued pretraining with MiCA adapters under DeepSpeed ZeRO-3."""

__version__ = "0.1.0"
