"""A program for the tests: `mica-ds export` of several configs, as an adapter and merged, and what it refuses."""

import json
import sys
from pathlib import Path

from mica_ds import comm


def main() -> None:
    from mica_ds import recipe  # imports DeepSpeed, which wants to be started first
    from mica_ds.config import load_config
    from mica_ds.errors import UserError

    for file in map(Path, sys.argv[1:]):
        config = load_config(file)
        said = None
        try:
            if config.adapter.method != "full":
                recipe.export(config, is_merged=False)
            recipe.export(config, is_merged=True)
        except UserError as error:
            said = str(error)
        if comm.is_main():
            file.with_suffix(".said").write_text(json.dumps(said))


if __name__ == "__main__":
    comm.run(main)
