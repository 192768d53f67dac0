"""A little data in the format of HellaSwag, as a folder that a copy of its repository would be."""

import json
from pathlib import Path

NAME = "Rowan/hellaswag"


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
