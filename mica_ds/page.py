"""The report of a run for those who did not run it: one HTML file that opens offline and asks for nothing."""

import math
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mica_ds import figures
from mica_ds.basis import warnings
from mica_ds.config import Config
from mica_ds.documents import source_files, stored_files
from mica_ds.export import export_folder
from mica_ds.files import replace_text
from mica_ds.scores import course
from mica_ds.statistics import accuracy_interval, points
from mica_ds.weights import open_checkpoint

PAGE = "report.html"

_METHODS = {"mica": "MiCA", "lora": "LoRA", "full": "full fine-tuning"}
_TIMES = ("before", "after")
_PACKAGES = ("mica_ds", "torch", "deepspeed", "transformers", "peft")


@dataclass(frozen=True)
class Knowledge:
    """An accuracy, and between which shares the true one lies with 95 % confidence."""

    share: float
    right: int
    low: float
    high: float


@dataclass(frozen=True)
class TextSource:
    """A file or folder of the config, and what it holds now."""

    path: str
    purpose: str
    files: int
    size: int
    """Bytes."""


def write_page(
    config: Config, summary: dict[str, Any], history: list[dict[str, float]], manifest: dict[str, Any] | None
) -> Path:
    """Write `report.html`, whole or not at all, and return its path. Local, on one rank.

    Args:
        config: the run's.
        summary: what goes into `summary.json`.
        history: what was logged, over all starts of the run.
        manifest: that of the bases, where the method has any.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": _duration,
        "amount": _amount,
        "percent": _percent,
        "points": points,
        "literal": repr,
    }
    template = environment.get_template("page.html")
    text = template.render(
        config=config,
        summary=summary,
        method=_METHODS[config.adapter.method],
        model_parameters=_model_parameters(config, summary),
        epochs=max(entry.get("epoch", 0.0) for entry in history),
        texts=_texts(config),
        **_scores(summary, history),
        loss=Markup(_loss(history)),
        spectra={kind: Markup(panel) for kind, panel in figures.spectrum_panels(manifest).items()} if manifest else {},
        warnings=_warnings(summary, manifest),
        base=str(config.model.path.absolute()),
        exported=str(export_folder(config).absolute()),
        today=f"{date.today():%-d %B %Y}",
        versions={name: version(name) for name in _PACKAGES},
    )
    file = config.output_dir / PAGE
    replace_text(file, text)
    return file


def _model_parameters(config: Config, summary: dict[str, Any]) -> int:
    if config.adapter.method == "full":  # a resumed run has not read the base, which may be gone
        return summary["trainable_parameters"]
    return sum(math.prod(tensor.shape) for tensor in open_checkpoint(config.model.path).values())


def _scores(summary: dict[str, Any], history: list[dict[str, float]]) -> dict[str, Any]:
    """Knowledge and forgetting; None for what was not measured."""
    if summary["knowledge_after"] is None:
        knowledge, accuracy = None, ""
    else:
        ends = (0, summary["exported_step"])
        during = {f"step {step}": share for step, share in course(history, summary)["knowledge"] if step not in ends}
        shares = {"before": summary["knowledge_before"], **during, "after": summary["knowledge_after"]}
        all_known = {name: _knowledge(share, summary["questions"]) for name, share in shares.items()}
        intervals = {name: (known.low, known.high) for name, known in all_known.items()}
        accuracy = figures.accuracy_panel(shares, intervals, summary["chance"])
        knowledge = {name: all_known[name] for name in _TIMES}
    forgetting = None
    if summary["retention_after"] is not None:
        forgetting = summary["retention_after"] / summary["retention_before"]
    return {"knowledge": knowledge, "accuracy": Markup(accuracy), "forgetting": forgetting}


def _knowledge(share: float, questions: int) -> Knowledge:
    right = round(share * questions)
    return Knowledge(share, right, *accuracy_interval(right, questions))


def _texts(config: Config) -> list[TextSource]:
    named = [(source.path, "learnt") for source in config.data.corpus]
    named += [(source.path, "replay") for source in config.data.replay]
    named += [(path, "questions") for path in [config.evaluate.questions] if path]
    named += [(path, "held out") for path in [config.evaluate.domain, config.evaluate.retention] if path]
    return [_text(path, purpose) for path, purpose in named]


def _text(path: Path, purpose: str) -> TextSource:
    stored = (file for found in source_files(path) for file in stored_files(found))
    files = [file for file in stored if file.is_file()]  # what was read hours ago may be gone
    return TextSource(str(path), purpose, len(files), sum(file.stat().st_size for file in files))


def _loss(history: list[dict[str, float]]) -> str:
    losses = [entry for entry in history if "loss" in entry]
    return figures.loss_panel([int(entry["step"]) for entry in losses], [entry["loss"] for entry in losses])


def _warnings(summary: dict[str, Any], manifest: dict[str, Any] | None) -> list[str]:
    found = warnings(manifest) if manifest else []
    if skipped := summary["skipped_steps"]:
        found.insert(0, f"{skipped} of {summary['steps']} steps changed nothing: loss or gradient was not finite")
    return found


def _duration(seconds: float) -> str:
    """`2.4 s`, `11 min 21 s`, `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _amount(number: float) -> str:
    """`812`, `6,144`, `2.4 million`, `70.6 billion`."""
    if number >= 1e9:
        return f"{number / 1e9:.1f} billion"
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
