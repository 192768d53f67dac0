"""`python -m mica_ds`: the form in which launchers start the command line."""

from mica_ds.cli import app

if __name__ == "__main__":
    app(prog_name="mica-ds")
