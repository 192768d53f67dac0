"""The command line: `mica-ds VERB CONFIG.yaml [key=value …]`, under any launcher or alone."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from mica_ds import sender
from mica_ds.arms import load_study
from mica_ds.config import load_config
from mica_ds.errors import UserError
from mica_ds.stores import check_uri, resolve_uri

app = typer.Typer(
    name="mica-ds",
    help="Teach a base language model your documents: continued pretraining with MiCA adapters under DeepSpeed ZeRO-3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path,
    typer.Argument(metavar="CONFIG.yaml", help="The run's settings; see configs/."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's: adapter.r=32"),
]


def _run(verb: str, config: Path, overrides: list[str] | None, **options: Any) -> None:
    from mica_ds import comm  # imports torch, which `sync` needs not wait for

    def main() -> None:
        from mica_ds import memory, recipe  # imports DeepSpeed, which wants to be started first

        with comm.failing_together():
            settings = load_config(config, overrides)
        comm.be_patient(settings.patience)
        comm.advise(memory.hint(settings, "evaluating" if verb == "evaluate" else "training"))
        with memory.explained(settings):
            getattr(recipe, verb)(settings, **options)

    comm.run(main)


def _refuse(reason: UserError | str) -> NoReturn:
    """What `comm.run` does with a user's mistake, for verbs that join no group."""
    print(f"error: {reason}", file=sys.stderr)
    raise typer.Exit(2) from None


@app.command()
def basis(config: ConfigFile, overrides: Overrides = None) -> None:
    """Compute the minor bases of all target weights into the run folder's cache."""
    _run("basis", config, overrides)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run the whole chain: bases, training, evaluation before and after, export, tracking."""
    _run("train", config, overrides)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Score the run's checkpoint and the base model under it, or the base model where there is none."""
    _run("evaluate", config, overrides)


@app.command()
def questions(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The jsonl file to write.")] = Path("questions.jsonl"),
    number: Annotated[int, typer.Option(min=1, help="At most so many questions.")] = 100,
    held_out: Annotated[
        Path | None, typer.Option(help="A jsonl file for the documents without the sentences asked for.")
    ] = None,
    by_model: Annotated[
        bool, typer.Option("--by-model", help="Of three times as many, keep those the base model is least sure of.")
    ] = False,
) -> None:
    """Draft multiple-choice questions from the documents, for a person to correct."""
    _run("questions", config, overrides, output=output, number=number, held_out=held_out, by_model=by_model)


@app.command()
def export(
    config: ConfigFile,
    overrides: Overrides = None,
    form: Annotated[
        Literal["adapter", "merged"],
        typer.Option("--format", help="The adapter for peft, or the base model with the adapter merged into it."),
    ] = "adapter",
) -> None:
    """Write the run's checkpoint as a peft adapter or merged into its base (after full fine-tuning: as a model)."""
    _run("export", config, overrides, is_merged=form == "merged")


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
) -> None:
    """Check everything that a run needs, on all its ranks, without loading a weight."""
    _run("doctor", config, overrides, as_json=as_json)


@app.command()
def study(
    file: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="Arms, learning rates, seeds; see configs/study/.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the file's: parallel=1"),
    ] = None,
    results: Annotated[
        Path | None, typer.Option("--report", help="Only make table and plots, from these results: results.jsonl.")
    ] = None,
) -> None:
    """Compare methods fairly: a learning rate swept for each, then several seeds, on the same data and budget."""
    from mica_ds import comm

    def main() -> None:
        from mica_ds import study as verb

        with comm.failing_together():
            settings = load_study(file, overrides)
        if results:
            verb.report(settings, results)
        else:
            verb.conduct(settings)

    comm.run(main, is_alone=True)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and so ranks, of each node.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of each GPU; 0 for ranks on CPUs.")] = 80,
    host_memory: Annotated[float, typer.Option(min=1, help="GiB of each node.")] = 1024,
    nvme: Annotated[float, typer.Option(min=0, help="GiB of each node's own disk.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the tables.")] = False,
) -> None:
    """Predict from config.json alone what a run takes on a cluster, and what to change where it does not fit."""
    from mica_ds import process

    process.load_deepspeed(is_quiet=True)
    from mica_ds.plan import GIB
    from mica_ds.sheet import print_plan
    from mica_ds.zero import Cluster

    memory = (int(GIB * size) for size in (gpu_memory, host_memory, nvme))
    try:
        fits = print_plan(load_config(config, overrides), Cluster(nodes, gpus_per_node, *memory), as_json)
    except UserError as error:
        _refuse(error)
    except Exception as error:  # of the model's code, which is run without data
        _refuse(f"model.path: this model cannot be counted: {error!r}")
    if not fits:
        raise typer.Exit(2)


@app.command()
def sync(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's output_dir.")],
    uri: Annotated[str | None, typer.Option(help="Another store than the run's own.")] = None,
) -> None:
    """Send to MLflow what a run's journal holds and the store has not got yet; any number of times."""
    try:
        if uri:
            check_uri(uri)
        print(sender.sync(folder, resolve_uri(uri) if uri else None))
    except UserError as error:
        _refuse(error)
