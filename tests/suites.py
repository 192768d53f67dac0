"""A little data in the formats of standard suites, as folders that copies of their repositories would be."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

NAME = "Rowan/hellaswag"
MMLU_OTHER = [
    *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts", "human_aging", "management"),
    *("marketing", "medical_genetics", "miscellaneous", "nutrition", "professional_accounting"),
    *("professional_medicine", "virology"),
]


def write_hellaswag(folder: Path, questions: int = 7) -> Path:
    """Write train and validation files below a folder, and return it."""
    data = folder / NAME
    data.mkdir(parents=True)
    rows = [
        {
            "ind": i,
            "activity_label": "Printing",
            "ctx_a": f"Edda sets page {i} of the almanac.",
            "ctx_b": "she",
            "endings": [
                "inks the plate and pulls the bar.",
                "eats it [step] with salt",
                f"sings {i} songs about the sea, one after another, until the evening comes.",
                "sleeps.",
            ],
            "label": str(i % 4),
        }
        for i in range(questions)
    ]
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_truthfulqa(folder: Path) -> None:
    """Write the multiple-choice questions, of which the first option is right, in `mc2_targets` the second, too."""
    choices = ["He sets the type.", "He inks the plate, too.", "Nobody knows.", "A whale, as all agree."]
    rows = [
        {
            "question": f"What does the printer of almanac {i} do?",
            "mc1_targets": {"choices": choices[: 3 + i % 2], "labels": [1, 0, 0, 0][: 3 + i % 2]},
            "mc2_targets": {"choices": choices, "labels": [1, 1, 0, 0]},
        }
        for i in range(3)
    ]
    _write_repository(folder / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})


def write_mmlu(folder: Path) -> None:
    """Write the subjects of mmlu_other, each with one question more than the one before."""
    subjects = {}
    for number, subject in enumerate(MMLU_OTHER, start=1):
        rows = [
            {
                "question": f"What is the answer to question {i} of {subject}?",
                "subject": subject,
                "choices": ["ink", "paper", f"page {i}", "salt"],
                "answer": (i + number) % 4,
            }
            for i in range(number)
        ]
        subjects[subject] = {"test": rows, "dev": rows[:1]}
    _write_repository(folder / "cais/mmlu", subjects)


def _write_repository(folder: Path, configurations: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write parquet files, and the README.md that says which belongs to what."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        (folder / name).mkdir(parents=True)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            pa.parquet.write_table(pa.Table.from_pylist(rows), folder / name / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
