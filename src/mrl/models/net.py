"""The published MRL networks: stages of an overlapping embedding and blocks that mix regionally and locally."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, to_ntuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mrl.blocks import fold_
from mrl.models.layers import Block, LayerNorm, OverlapEmbed

__all__ = ["MRLNet"]


class Stage(nn.Module):
    """An embedding and its blocks: (B, C, H, W) -> (B, C', H', W'), channels last in memory."""

    def __init__(self, patch_embed: OverlapEmbed, blocks: list[Block]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds, then mixes."""
        x = self.patch_embed(x)  # (B, H', W', C')
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)  # (B, C', H', W')


class MRLNet(nn.Module):
    """Mixing Regionally and Locally: a pyramid of MRL blocks with a mean-pooled linear head; any image size.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        region_size: positions along one side of a region, one for all stages or one each.
        group_size: channels a group of the local convolution, one for all stages or one each.
        mlp_ratio: hidden width of the MLP over its input.
        num_classes: of the head; 0 leaves the pooled features.
        in_chans: of the image.
        global_pool: "avg", or "" for the map.
        drop_rate: dropout in front of the head.
        drop_path_rate: stochastic depth at the end of each stage (one for all or one each), linear from 0 inside it.
        mixer_args: further arguments of every `RegionalLocalMixer`, such as `{"qkv": "common"}`; its `scale` is the
            published `dim ** -0.5` unless it stands here.
        **options: `device` and `dtype` of the parameters; others, which a wrapper made for many networks may pass, are
            left out with a warning.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes)

    Reference:
        S. Mohta, H. Suganuma, Y. Tanaka, "MRL: Learning to Mix with Attention and Convolutions", arXiv:2208.13975.

    Example:
        >>> net = MRLNet(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), region_size=2, num_classes=3)
        >>> net(torch.randn(2, 3, 40, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        embed_dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        region_size: int | tuple[int, ...] = 2,
        group_size: int | tuple[int, ...] = 1,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | tuple[float, ...] = 0.0,
        mixer_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = [f"{name}={options.pop(name)!r}" for name in list(options) if name not in ("device", "dtype")]
        if unknown:
            warnings.warn(f"MRLNet: {', '.join(unknown)} left out; it has no such argument.", stacklevel=2)
        self.num_classes, self.in_chans = num_classes, in_chans
        each = to_ntuple(len(embed_dims))
        settings = zip(each(num_heads), each(region_size), each(group_size), strict=True)
        self.feature_info, stages, previous = [], [], in_chans
        for i, (dim, heads_region_group) in enumerate(zip(embed_dims, settings, strict=True)):
            kernel = (7, 4, 2) if i == 0 else (3, 2, 1)
            rates = torch.linspace(0, each(drop_path_rate)[i], depths[i], device="cpu").tolist()
            blocks = [Block(dim, *heads_region_group, mlp_ratio, rate, mixer_args or {}, **options) for rate in rates]
            stages.append(Stage(OverlapEmbed(previous, dim, *kernel, **options), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
            previous = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = previous
        self.norm = LayerNorm(previous, **options)
        self.head = ClassifierHead(previous, num_classes, pool_type=global_pool, drop_rate=drop_rate, **options)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond biases and norms, which timm leaves out by their shape."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters from input to head, for layer-wise decay."""
        fine = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades compute for memory in training."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def fold_(self, rank: int | None = None, *, batch: Tensor | None = None, tolerance: float = 1e-2) -> MRLNet:
        """Turns the network into its inference form, in place; the same function up to rounding, unless `rank` cuts it.

        Args:
            rank: of the depthwise reductions, see `RegionalLocalMixer.fold_`; None is exact.
            batch: images (B, in_chans, H, W) on which a cut is checked.
            tolerance: the largest relative L2 error of a mixer's output on the batch.

        Raises:
            ConfigError: it is folded already, or an error above the tolerance; the network is as it was then.

        Example:
            >>> net = MRLNet((16, 32), (1, 1), (1, 2), num_classes=3).eval()
            >>> x = torch.randn(2, 3, 40, 32)
            >>> y = net(x)
            >>> torch.allclose(net.fold_()(x), y, atol=1e-5)
            True
        """
        fold_(self, rank, batch=batch, tolerance=tolerance)
        for module in self.modules():
            if isinstance(module, Block):
                module.fold_activation_()
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the network a new head; 0 classes leave the pooled features."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages' outputs, as timm's backbones give them.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n stages, or these; None for all.
            norm: whether the last stage's output passes the final norm.
            stop_early: leave out the stages behind the last index.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: leave out the final features.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: use 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        end = len(self.stages) - 1
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                out = self._final_norm(x) if norm and i == end else x
                intermediates.append(out.permute(0, 2, 3, 1) if output_fmt == "NHWC" else out)
        if intermediates_only:
            return intermediates
        return (self._final_norm(x) if i == end else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops what the given stages do not need; returns their indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.head.in_features = self.num_features
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take

    def _final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, (B, C, H / 32, W / 32) with four stages."""
        return self._final_norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools the map and classifies it."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.patch_embed.proj",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2208.13975",
        "paper_name": "MRL: Learning to Mix with Attention and Convolutions",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "mrl_13": _cfg(pool_size=(14, 14)),
        "mrl_21": _cfg(pool_size=(14, 14)),
        "mrl_tiny": _cfg(),
        "mrl_small": _cfg(),
        "mrl_hovernet": _cfg(input_size=(3, 256, 256), pool_size=(8, 8)),
        "mrl_13_common_qkv": _cfg(pool_size=(14, 14)),
        "mrl_21_common_qkv": _cfg(pool_size=(14, 14)),
        "mrl_tiny_common_qkv": _cfg(),
        "mrl_small_common_qkv": _cfg(),
        "mrl_hovernet_common_qkv": _cfg(input_size=(3, 256, 256), pool_size=(8, 8)),
        "mrl_hovernet_common_qkv_p4m": _cfg(input_size=(3, 256, 256), pool_size=(8, 8)),
        "test_mrl": _cfg(input_size=(3, 32, 32), pool_size=(4, 4)),
    }
)

PYRAMID = (96, 192, 384, 768)


def _create_mrl(variant: str, pretrained: bool, kwargs: dict[str, Any], **spec: Any) -> MRLNet:
    settings = {**spec, **kwargs}
    settings["mixer_args"] = {**spec.get("mixer_args", {}), **(kwargs.get("mixer_args") or {})}  # the variant's stay
    feature_cfg = {"out_indices": tuple(range(len(settings["depths"]))), "feature_cls": "getter"}
    return build_model_with_cfg(MRLNet, variant, pretrained, feature_cfg=feature_cfg, **settings)


def _mrl_three(
    variant: str, pretrained: bool, kwargs: dict[str, Any], depths: tuple[int, ...], **mixer_args: Any
) -> MRLNet:
    spec = {"embed_dims": (64, 192, 384), "depths": depths, "num_heads": (1, 3, 6), "group_size": (1, 3, 6)}
    regional = {"region_size": (4, 4, 2), "drop_path_rate": (0.0, 0.0, 0.1)}
    return _create_mrl(variant, pretrained, kwargs, **spec, **regional, mixer_args=mixer_args)


def _mrl_pyramid(
    variant: str,
    pretrained: bool,
    kwargs: dict[str, Any],
    depth: int,
    num_heads: tuple[int, ...],
    group_size: tuple[int, ...],
    **mixer_args: Any,
) -> MRLNet:
    spec = {"embed_dims": PYRAMID, "depths": (2, 2, depth, 2), "num_heads": num_heads, "group_size": group_size}
    regional = {"region_size": (4, 4, 2, 1), "drop_path_rate": (0.0, 0.0, 0.1, 0.1)}
    return _create_mrl(variant, pretrained, kwargs, **spec, **regional, mixer_args=mixer_args)


THIRTEEN, TWENTY_ONE = (1, 2, 10), (1, 4, 16)
TINY = (6, (3, 6, 12, 24), (1, 2, 8, 4))
SMALL = (18, (1, 2, 4, 8), (2, 2, 16, 2))
HOVERNET = (8, (1, 2, 4, 8), (1, 2, 4, 8))


@register_model
def mrl_13(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-13: 20.2 M parameters, 4.64 GMACs at 224 x 224."""
    return _mrl_three("mrl_13", pretrained, kwargs, THIRTEEN)


@register_model
def mrl_13_common_qkv(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-13 with a common basis for q, k and v: 17.1 M parameters, 3.64 GMACs at 224 x 224."""
    return _mrl_three("mrl_13_common_qkv", pretrained, kwargs, THIRTEEN, qkv="common")


@register_model
def mrl_21(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-21: 31.9 M parameters, 7.46 GMACs at 224 x 224."""
    return _mrl_three("mrl_21", pretrained, kwargs, TWENTY_ONE)


@register_model
def mrl_21_common_qkv(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-21 with a common basis for q, k and v."""
    return _mrl_three("mrl_21_common_qkv", pretrained, kwargs, TWENTY_ONE, qkv="common")


@register_model
def mrl_tiny(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-tiny: 30.5 M parameters, 4.68 GMACs at 224 x 224."""
    return _mrl_pyramid("mrl_tiny", pretrained, kwargs, *TINY)


@register_model
def mrl_tiny_common_qkv(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-tiny with a common basis for q, k and v."""
    return _mrl_pyramid("mrl_tiny_common_qkv", pretrained, kwargs, *TINY, qkv="common")


@register_model
def mrl_small(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-small: 52.7 M parameters, 9.04 GMACs at 224 x 224."""
    return _mrl_pyramid("mrl_small", pretrained, kwargs, *SMALL)


@register_model
def mrl_small_common_qkv(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """MRL-small with a common basis for q, k and v."""
    return _mrl_pyramid("mrl_small_common_qkv", pretrained, kwargs, *SMALL, qkv="common")


@register_model
def mrl_hovernet(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """The encoder of HoVer-Net with MRL: 34.1 M parameters, 7.03 GMACs at 256 x 256."""
    return _mrl_pyramid("mrl_hovernet", pretrained, kwargs, *HOVERNET)


@register_model
def mrl_hovernet_common_qkv(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """The encoder of HoVer-Net with MRL and a common basis: 29.3 M parameters, 5.61 GMACs at 256 x 256."""
    return _mrl_pyramid("mrl_hovernet_common_qkv", pretrained, kwargs, *HOVERNET, qkv="common")


@register_model
def mrl_hovernet_common_qkv_p4m(pretrained: bool = False, **kwargs: Any) -> MRLNet:
    """The encoder of HoVer-Net with MRL, a common basis and group convolutions: 29.3 M parameters."""
    return _mrl_pyramid("mrl_hovernet_common_qkv_p4m", pretrained, kwargs, *HOVERNET, qkv="common", local="p4m")


@register_model
def test_mrl(pretrained: bool = False, **kwargs: Any) -> MRLNet:  # noqa: PT028
    """A tiny network for tests: 32 x 32 images, two stages."""
    spec = {"embed_dims": (16, 32), "depths": (1, 2), "num_heads": (1, 2), "group_size": (1, 2), "region_size": 2}
    return _create_mrl("test_mrl", pretrained, kwargs, **spec, drop_path_rate=(0.0, 0.1))
