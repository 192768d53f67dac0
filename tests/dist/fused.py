"""`mica-ds`, saying when Liger's fused loss is called."""

import importlib
from typing import Any

from mica_ds import cli

CALLED = "Liger's fused loss"

if __name__ == "__main__":
    functional = importlib.import_module("liger_kernel.transformers.functional")
    fused = functional.liger_fused_linear_cross_entropy

    def telling(*args: Any, **kwargs: Any) -> Any:
        print(CALLED, flush=True)
        return fused(*args, **kwargs)

    functional.liger_fused_linear_cross_entropy = telling
    cli.app()
