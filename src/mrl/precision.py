"""Which precision a device multiplies in hardware."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def has_bf16(device: torch.device, capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether the device multiplies bfloat16 in hardware (a processor with AVX-512 BF16 or AMX, a GPU from Ampere on).

    Args:
        device: where the model runs.
        capabilities: of the processor; None asks torch.

    Example:
        >>> has_bf16(torch.device("cpu"), {"avx512_bf16": True}), has_bf16(torch.device("cpu"), {})
        (True, False)
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    found = torch.cpu.get_capabilities() if capabilities is None else capabilities
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
