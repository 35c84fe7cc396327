"""Stages whose results are kept as long as what they were made from stays the same."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mace_lora.atomic import content_digest, write_text

__all__ = ["Stages"]


@dataclass
class Stages:
    """Folders named after a stage and the hash of its inputs: a finished one is used again, an unfinished one goes on.

    Attributes:
        folder: of all stages.
        say: gets a line for every stage.
        seconds: of every stage that this configuration uses, by name; of the last start where it was interrupted.
    """

    folder: Path
    say: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=dict)

    def run(
        self, name: str, settings: Mapping[str, Any], files: Iterable[Path], make: Callable[[Path], object]
    ) -> Path:
        """Folder of a stage's results, made unless it is there.

        Args:
            name: of the stage.
            settings: what its results depend on, JSON values.
            files: the same, by their content.
            make: writes the results into a folder; called again after an interruption.
        """
        inputs = {**settings, "files": [content_digest(f) for f in files]}
        text = json.dumps(inputs, sort_keys=True, default=str)
        place = self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        record = place / "stage.json"
        if record.is_file():
            self.say(f"{name}: is there ({place.name})")
        else:
            self.say(f"{name}: {'going on' if place.is_dir() else 'starting'} in {place.name}")
            place.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            make(place)
            content = {"name": name, "seconds": round(time.monotonic() - start, 1), "inputs": inputs}
            write_text(record, json.dumps(content, indent=1, default=str) + "\n")
        self.seconds[name] = json.loads(record.read_text())["seconds"]
        return place
