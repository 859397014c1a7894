"""The search of `mrl tune`: what may vary, who proposes, where trials are kept, what is judged and reported."""

from __future__ import annotations

from mrl.tuning.goal import Goal
from mrl.tuning.settings import Settings
from mrl.tuning.space import Axis, Space, parse_space

__all__ = ["Axis", "Goal", "Settings", "Space", "parse_space"]
