"""Surgery on a model we did not write: plan, swap in place, calibrate, save."""

from mrl.models.build import MODEL_LOADERS
from mrl.swap.apply import Handle, swap_
from mrl.swap.calibrate import calibrate
from mrl.swap.calibration import CalibrateConfig, CalibrationReport, StageReport
from mrl.swap.config import SETTINGS, SwapConfig
from mrl.swap.plan import Plan, PlanRow, plan
from mrl.swap.select import select
from mrl.swap.store import load, save

MODEL_LOADERS["folder"] = load

__all__ = [
    "SETTINGS",
    "CalibrateConfig",
    "CalibrationReport",
    "Handle",
    "Plan",
    "PlanRow",
    "StageReport",
    "SwapConfig",
    "calibrate",
    "load",
    "plan",
    "save",
    "select",
    "swap_",
]
