"""What a search is after: quality under a latency budget, or the front of both."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mrl.errors import ConfigError

MODES = ("constrained", "pareto")


@dataclass(frozen=True)
class Goal:
    """What to search for, and how much.

    Args:
        trials: trained trials of each arm; what is over budget or refused is not trained and does not count.
        mode: "constrained": the best quality within the budget; "pareto": quality against latency.
        max_latency_ratio: largest latency / baseline's of the swapped arm (constrained).
        max_latency_ms: the same in milliseconds, instead of the ratio.
        keep: how many of the best of each arm are judged again.
        judges: fresh seeds, each with a fresh inner split, that judge them.
        seed: of the proposals and of every trial's training.

    Raises:
        ConfigError: a value that cannot be.

    Example:
        >>> Goal(max_latency_ratio=0.8).within({"ratio": 0.79, "latency_ms_median": 3.0})
        True
    """

    trials: int = 25
    mode: str = "constrained"
    max_latency_ratio: float | None = None
    max_latency_ms: float | None = None
    keep: int = 3
    judges: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value."""
        if self.mode not in MODES:
            raise ConfigError(f"--mode {self.mode}: unknown; use {' or '.join(MODES)}.")
        for name, least in (("trials", 1), ("keep", 1), ("judges", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: use {least} or more.")
        budgets = [b for b in (self.max_latency_ratio, self.max_latency_ms) if b is not None]
        if len(budgets) == 2:
            raise ConfigError("--max-latency-ratio and --max-latency-ms: give one of them.")
        if budgets and (self.mode != "constrained" or budgets[0] <= 0):
            raise ConfigError("--max-latency-ratio and --max-latency-ms: above 0, and with --mode constrained only.")
        if self.mode == "constrained" and not budgets:
            raise ConfigError(
                "--mode constrained needs a latency budget: give --max-latency-ratio (1 is the baseline's latency) or "
                "--max-latency-ms, or take --mode pareto."
            )

    def within(self, latency: dict[str, Any]) -> bool:
        """Whether a measured latency keeps the budget; always in the mode "pareto"."""
        if self.max_latency_ratio is not None:
            return latency["ratio"] <= self.max_latency_ratio
        return self.max_latency_ms is None or latency["latency_ms_median"] <= self.max_latency_ms

    def identity(self) -> dict[str, Any]:
        """What the trials of a study must agree on; the number of trials may grow, and the judges come later."""
        return {k: v for k, v in asdict(self).items() if k not in ("trials", "keep", "judges")}
