"""Surgery on a model we did not write: plan, swap in place, calibrate, save."""

from mrl.swap.apply import Handle, swap_
from mrl.swap.calibrate import CalibrateConfig, calibrate
from mrl.swap.config import SETTINGS, SwapConfig
from mrl.swap.plan import Plan, PlanRow, plan
from mrl.swap.store import load, save

__all__ = [
    "SETTINGS",
    "CalibrateConfig",
    "Handle",
    "Plan",
    "PlanRow",
    "SwapConfig",
    "calibrate",
    "load",
    "plan",
    "save",
    "swap_",
]
