"""What a list of sessions tells of each."""

from __future__ import annotations

import json
from pathlib import Path

from kvcompose_local.chat import sessions


def told_by(path: Path) -> tuple[int, str]:
    """The messages of a session and the name of its model. Raises SessionError for a file that is damaged or none."""
    with sessions.opened(path) as (manifest, parts):
        messages = json.loads(parts.array("text/json").tobytes())["messages"]
        return sum(message["role"] != "system" for message in messages), Path(manifest.model_path).name
