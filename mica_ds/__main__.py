"""`python -m mica_ds`: the form in which launchers start the command line."""

from mica_ds import signals

if __name__ == "__main__":
    signals.watch_imports()
    from mica_ds.cli import app

    app(prog_name="mica-ds")
