"""Something for a process to do, and the rows that it answers with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

Row = dict[str, Any]  # in JSON's terms; `kind` says what it is


@dataclass(frozen=True)
class Job:
    """Something to do, in JSON's terms: which kind of work, a name to report it by, what the kind needs."""

    kind: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))
