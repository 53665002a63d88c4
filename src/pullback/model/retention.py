"""Which restore points are kept, as a value."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """How many points to keep of each kind; 0: the kind keeps none by itself. True if any kind keeps some."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))

    def words(self) -> tuple[str, ...]:
        """The same as options of a command: `--keep-last 7 …`, those that are set."""
        pairs = [(f"--keep-{field.name}", getattr(self, field.name)) for field in fields(self)]
        return tuple(word for option, count in pairs if count for word in (option, str(count)))
