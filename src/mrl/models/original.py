"""Checkpoints with the names of the authors' published implementation, turned into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from mrl.errors import ConfigError

AFFINE = r"(weight|bias)"
STATISTICS = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
SHARED = {rf"mix_locally\.{AFFINE}": r"local.\1", rf"proj\.{AFFINE}": r"proj.\1"}
SEPARATE = {
    rf"proj_([qkv])\.{AFFINE}": r"\1_proj.\2",
    r"conv_proj_([qkv])\.conv\.weight": r"\1_conv.weight",
    rf"conv_proj_([qkv])\.bn\.{STATISTICS}": r"\1_norm.\2",
}


def _common(basis: str, views: str) -> dict[str, str]:
    """The names of a common basis, under `basis`, and of its three views, under `views`."""
    return {
        rf"{basis}\.conv\.weight": r"basis.conv.weight",
        rf"{basis}\.bn\.{STATISTICS}": r"basis.norm.\1",
        rf"{basis}\.linear_indim\.{AFFINE}": r"basis.proj.\1",
        rf"{views}conv_proj_([qkv])\.conv\.weight": r"basis.\1_conv.weight",
        rf"{views}conv_proj_([qkv])\.bn\.{STATISTICS}": r"basis.\1_norm.\2",
    }


VARIANTS = {  # by the part of a name that gives the variant away; the first that is found
    "basis_set_regional": {**_common("basis_set_regional", r"regional_atten\."), **SHARED},
    "basis_qkv": {**_common("basis_qkv", ""), **SHARED},
    "": {**SEPARATE, **SHARED},
}
NETWORK = {
    rf"stage(\d+)\.patch_embed\.(proj|norm)\.{AFFINE}": r"stages.\1.patch_embed.\2.\3",
    rf"stage(\d+)\.blocks\.(\d+)\.(norm1|norm2|mlp\.fc1|mlp\.fc2)\.{AFFINE}": r"stages.\1.blocks.\2.\3.\4",
    rf"norm\.{AFFINE}": r"norm.\1",
    rf"head\.{AFFINE}": r"head.fc.\1",
}
MIXER_OF_BLOCK = re.compile(r"stage(\d+)\.blocks\.(\d+)\.attn\.(.+)")


def convert_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network or of a single mixer, from the authors' names to ours, for a strict load.

    The variant is recognised from the names: `basis_set_regional` is MRL with a common basis (`qkv="common"`),
    `basis_qkv` is `CommonQKVAttention`, neither is MRL. The tensors are the same objects, apart from BatchNorm's
    counter, which becomes a scalar as torch has it, and a basis' 1 x 1 convolution, which becomes a linear layer.

    Args:
        state_dict: the authors' names; a `module.` in front of every one (from data-parallel training) is fine.

    Raises:
        ConfigError: names that are not the authors'.

    Example:
        >>> import torch
        >>> list(convert_original({"proj_q.weight": torch.ones(4, 4), "mix_locally.bias": torch.ones(4)}))
        ['q_proj.weight', 'local.bias']
        >>> list(convert_original({"stage0.blocks.1.attn.conv_proj_k.conv.weight": torch.ones(4, 1, 2, 2)}))
        ['stages.0.blocks.1.mixer.k_conv.weight']
    """
    if not state_dict:
        raise ConfigError("convert_original: the state dict is empty; give the weights of a network or of a mixer.")
    prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
    names = {key: key.removeprefix(prefix) for key in state_dict}
    found = {part for name in names.values() for part in name.split(".")}
    mixer = next(table for mark, table in VARIANTS.items() if not mark or mark in found)
    single = any(_renamed(name, mixer) for name in names.values())
    converted, unknown = {}, []
    for key, name in names.items():
        ours = _renamed(name, mixer) if single else _network_name(name, mixer)
        if ours is None:
            unknown.append(name)
            continue
        value = state_dict[key]
        if ours.endswith("num_batches_tracked"):
            value = value.reshape(())
        elif ours.endswith("basis.proj.weight"):
            value = value.flatten(1)
        converted[ours] = value
    if unknown:
        raise ConfigError(
            f"convert_original: {len(unknown)} of {len(names)} names are not those of an original MRL checkpoint: "
            f"{', '.join(unknown)}; give the untouched state dict of a network or of one mixer."
        )
    return converted


def _network_name(name: str, mixer: Mapping[str, str]) -> str | None:
    inside = MIXER_OF_BLOCK.fullmatch(name)
    if inside is None:
        return _renamed(name, NETWORK)
    stage, block, rest = inside.groups()
    ours = _renamed(rest, mixer)
    return ours and f"stages.{stage}.blocks.{block}.mixer.{ours}"


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    for pattern, ours in table.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return None
