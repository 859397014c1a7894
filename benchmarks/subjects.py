"""What is measured: networks, their rivals, and the runtimes that run them."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import literal
from mrl.blocks import RegionalLocalMixer
from mrl.deploy.onnx import open_session, to_onnx

PEERS = (
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "vit_small_patch16_224",
    "pvt_v2_b2",
    "coatnet_0_rw_224",
    "maxvit_tiny_tf_224",
)
OURS = ("mrl_13", "mrl_13_common_qkv")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Call = Callable[[int], object]
FILES = tempfile.TemporaryDirectory(prefix="mrl-bench-")


class NotRunError(Exception):
    """A row that this machine cannot run, with the reason."""


class Exchanged(nn.Module):
    """A mixer in the place of a ViT's attention: tokens (B, 1 + H*W, C) -> the same, the CLS token among the regions."""

    def __init__(self, mixer: RegionalLocalMixer, height: int, width: int) -> None:
        super().__init__()
        self.mixer, self.size = mixer, (height, width)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y, prefix = self.mixer(x[:, 1:].unflatten(1, self.size), x[:, :1])
        return torch.cat([prefix, y.flatten(1, 2)], 1)


def vit_with_mixers(image_size: int, region: int = 2, *, name: str = "vit_small_patch16_224") -> nn.Module:
    """ViT-S/16 with every attention exchanged for the cheapest mixer, its projections kept; not trained, only timed."""
    model = timm.create_model(name, img_size=image_size).eval()
    grid = model.patch_embed.grid_size
    for block in model.blocks:
        dim, heads = block.attn.proj.in_features, block.attn.num_heads
        mixer = RegionalLocalMixer(dim, heads, region, reduce="mean", scale=block.attn.scale).eval()
        for part, linear in enumerate((mixer.q_proj, mixer.k_proj, mixer.v_proj)):
            rows = slice(part * dim, (part + 1) * dim)
            linear.weight.data, linear.bias.data = block.attn.qkv.weight.data[rows], block.attn.qkv.bias.data[rows]
        mixer.proj.load_state_dict(block.attn.proj.state_dict())
        block.attn = Exchanged(mixer, *grid)
    return model


def build(name: str, image_size: int = 224, form: str = "plain") -> nn.Module:
    """A network in eval mode.

    Args:
        name: a timm name, "literal" (mrl_13 written out), or "vit_small + mrl".
        image_size: pixels along a side.
        form: "plain" or "folded"; only ours have both.
    """
    if name == "literal":
        return literal.Network("mrl_13").eval()
    if name == "vit_small + mrl":
        return vit_with_mixers(image_size)
    sized = {"img_size": image_size} if name.startswith(("vit", "swin", "maxvit")) and image_size != 224 else {}
    model = timm.create_model(name, **sized).eval()
    return model.fold_() if form == "folded" else model


def as_call(model: nn.Module, images: Tensor, runtime: str, precision: str, key: str = "") -> Call:
    """A function that runs the model once.

    Args:
        model: in eval mode.
        images: (B, 3, H, W) float32 on the device that measures.
        runtime: "eager", "compile", "graphs" (CUDA graph replay), "onnxruntime" or "openvino".
        precision: "fp32" or "bf16".
        key: a name under which the ONNX file of the model is kept until the process ends; without one it is made anew.

    Raises:
        NotRunError: the runtime is not here or refuses the model.
    """
    if runtime == "onnxruntime":
        session, feed = open_session(_onnx_file(model, images, key)), {"image": images.numpy()}
        return lambda index: session.run(None, feed)
    if runtime == "openvino":
        return _openvino(model, images, precision, key)
    dtype = DTYPES[precision]
    x = images.to(dtype)
    model = copy.deepcopy(model).to(images.device, dtype)
    if runtime in ("compile", "graphs"):
        torch.compiler.reset()
        model = torch.compile(model, mode="reduce-overhead" if runtime == "graphs" else None)

    def call(index: int) -> None:
        with torch.inference_mode():
            model(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    try:
        call(0)
    except Exception as error:  # whatever a compiler raises: the row says so
        raise NotRunError(f"{runtime}: {type(error).__name__}: {str(error).splitlines()[0][:120]}") from error
    return call


def _onnx_file(model: nn.Module, images: Tensor, key: str) -> Path:
    path = Path(FILES.name) / f"{key.replace('/', '-')}-{images.shape[-1]}.onnx"
    return path if key and path.is_file() else to_onnx(model, path, tuple(images.shape[2:]))


def _openvino(model: nn.Module, images: Tensor, precision: str, key: str) -> Call:
    """Reads the ONNX file: OpenVINO's converter of torch models would report its use to its makers, its reader does not."""
    if importlib.util.find_spec("openvino") is None:
        raise NotRunError('not run: needs OpenVINO; install "mrl[openvino]"')
    import openvino

    core = openvino.Core()
    graph = core.read_model(_onnx_file(model, images, key))
    graph.reshape(list(images.shape))
    hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision], "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    request = core.compile_model(graph, "CPU", hints).create_infer_request()
    feed = {0: images.numpy()}
    return lambda index: request.infer(feed)
