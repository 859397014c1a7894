"""The MRL block's mixer: softmax attention among region tokens, then a convolution over the re-assembled map."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrl.blocks.common_qkv import CommonBasis, check_heads, check_map
from mrl.blocks.compose import compose, region_linear, tap_sums
from mrl.blocks.group_conv import LocalGroupConv
from mrl.blocks.regions import (
    LocalConv,
    RegionConv,
    RegionNorm,
    add_regions,
    attend,
    broadcast_regions,
    pad_to_regions,
    ragged_factor,
    region_mean,
    region_pair,
    valid_counts,
)
from mrl.errors import ConfigError

COMPOSE_FROM = 2  # positions for each row of the composed weight, from which composing is the smaller thing to keep


class RegionalLocalMixer(nn.Module):
    """Mixes a map regionally (attention among region tokens) and locally (a convolution over all positions).

        q, k, v = BN(reduce(Linear(x)))
        u = local_gain * source + broadcast(softmax(scale * q k^T + log(valid / r^2)) v)
        y = proj(conv(u))

    With `region_size=1`, unit depthwise weights, identity norms, a gain of 0 and a delta convolution it is plain
    softmax attention. In training the projection and its reduction run as one linear map of each region, so that q, k
    and v never exist at full resolution; `fold_()` is the same for inference, with the norms inside.

    Args:
        dim: channels.
        num_heads: heads of the regional attention; divides `dim`.
        region_size: positions along one side of a region, or (rows, cols); 1 attends at full resolution.
        group_size: channels the local convolution mixes together; 1 is depthwise, `dim` is dense.
        kernel_size: of the local convolution, odd; 1 mixes nothing locally.
        qkv: "separate", three projections (the paper's main block), or "common", three depthwise convolutions of one
            projected basis at region resolution: `mrl_13` falls from 4.64 to 3.64 GMACs.
        qkv_bias: whether the projections (the basis' one) have a bias.
        scale: factor on the logits; None is `head_dim ** -0.5`, the published networks use `dim ** -0.5`.
        local: "conv", the convolution of the paper's main block, or "p4m", followed by a 3 x 3 group convolution that
            shares its weights over turns and reflections; `dim` is then a multiple of 8.
        local_gain: how much of the source is added to the regional tokens; 1 is the paper, 0 drops it.
        local_source: "input", the normed input (the paper), or "value", the full-resolution value projection.
        reduce: "depthwise", project each position, then a learned depthwise reduction (the paper), or "mean", average
            the regions first, then project: cheaper by the region's area.
        basis_drop: with qkv="common", the rate at which whole channels of the basis are dropped in training.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        learn_local_gain: None keeps the gain fixed; "scalar" or "channel" makes it a parameter that starts there.
        device: where the parameters live.
        dtype: of the parameters.

    Shape:
        x: (B, H, W, C) -> (B, H, W, C); with prefix (B, P, C) -> the map and (B, P, C)

    Raises:
        ConfigError: an argument that is out of its range, or two that exclude each other.

    Reference:
        S. Mohta, H. Suganuma, Y. Tanaka, "MRL: Learning to Mix with Attention and Convolutions", arXiv:2208.13975.
        Ours: any height and width, `local_gain`, `local_source="value"`, `reduce="mean"`, `kernel_size`, prefix tokens.

    Example:
        >>> mixer = RegionalLocalMixer(dim=32, num_heads=4, region_size=2)
        >>> mixer(torch.randn(2, 7, 8, 32)).shape
        torch.Size([2, 7, 8, 32])
        >>> y, prefix = mixer(torch.randn(2, 8, 8, 32), torch.randn(2, 1, 32))
        >>> prefix.shape
        torch.Size([2, 1, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        region_size: int | tuple[int, int],
        group_size: int = 1,
        *,
        kernel_size: int = 3,
        qkv: str = "separate",
        qkv_bias: bool = True,
        scale: float | None = None,
        local: str = "conv",
        local_gain: float = 1.0,
        local_source: str = "input",
        reduce: str = "depthwise",
        basis_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        learn_local_gain: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_heads("RegionalLocalMixer", dim, num_heads)
        _check_variants(qkv, local, local_source, reduce, learn_local_gain, basis_drop)
        options = {"device": device, "dtype": dtype}
        self.dim, self.num_heads, self.qkv, self.reduce = dim, num_heads, qkv, reduce
        self.region_size = region_pair(region_size)
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.local_source = local_source
        self.grad_checkpointing = False
        self.register_module("folded", None)
        self.fold_error: float | None = None
        if qkv == "common":
            self.basis = CommonBasis(dim, self.region_size, reduce=reduce, bias=qkv_bias, drop=basis_drop, **options)
        else:
            for name in "qkv":
                self.add_module(f"{name}_proj", nn.Linear(dim, dim, bias=qkv_bias, **options))
            for name in "qkv":
                if reduce == "depthwise":
                    self.add_module(f"{name}_conv", RegionConv(dim, self.region_size, **options))
                self.add_module(f"{name}_norm", RegionNorm(dim, **options))
        self.attn_drop = nn.Dropout(attn_drop)
        if learn_local_gain is None:
            self.local_gain = float(local_gain)
        else:
            shape = (dim,) if learn_local_gain == "channel" else ()
            self.local_gain = nn.Parameter(torch.full(shape, float(local_gain), **options))
        self.local = (LocalGroupConv if local == "p4m" else LocalConv)(dim, kernel_size, group_size, **options)
        self.proj = nn.Linear(dim, dim, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        """What the constructor was told and the children do not show."""
        gain = "learned" if isinstance(self.local_gain, nn.Parameter) else self.local_gain
        return (
            f"{self.dim}, num_heads={self.num_heads}, region_size={self.region_size}, qkv={self.qkv!r}, "
            f"scale={self.scale:.4g}, local_gain={gain}, local_source={self.local_source!r}, reduce={self.reduce!r}"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the full-resolution half of the mixer in the backward pass instead of keeping it.

        Only the input and the region tokens are kept then; the price is one more local convolution.
        """
        self.grad_checkpointing = enable

    def fold_(
        self, rank: int | None = None, *, batch: Tensor | None = None, tolerance: float = 1e-2
    ) -> RegionalLocalMixer:
        """Turns the mixer into its inference form, in place; the same function up to rounding, unless `rank` cuts it.

        Args:
            rank: None is exact; R cuts each depthwise kernel, as a (C, r * r) matrix, to rank R, and the projections'
                cost to R / r^2. Exact at r * r.
            batch: normalised maps (B, H, W, C) on which the cut is checked; the relative L2 error of the output is
                left in `fold_error`.
            tolerance: the largest error that is accepted on the batch.

        Raises:
            ConfigError: it is folded already, a rank that does not apply, or an error above the tolerance; the mixer
                is as it was then.

        Example:
            >>> mixer, x = RegionalLocalMixer(8, 2, 2).eval(), torch.randn(1, 4, 4, 8)
            >>> y = mixer(x)
            >>> torch.allclose(mixer.fold_()(x), y, atol=1e-5)
            True
        """
        from mrl.blocks.fold import fold_

        return fold_(self, rank, batch=batch, tolerance=tolerance)

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mixes a normalised map; prefix tokens (CLS, registers) join the region tokens, the convolution skips them."""
        check_map("RegionalLocalMixer", x, self.dim)
        (q, k, v), value = self._tokens(x)
        grid = q.shape[1:]  # (Hr, Wr, C)
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # (B, Hr*Wr, C)
        count = 0
        if prefix is not None:
            count = prefix.shape[1]
            q, k, v = (torch.cat([p.to(t.dtype), t], 1) for p, t in zip(self._prefix(prefix), (q, k, v), strict=True))
        drop = self.attn_drop.p if self.training else 0.0
        bias = self._key_bias(x, count)
        tokens = attend(q, k, v, self.num_heads, self.scale, key_bias=bias, dropout_p=drop)  # (B, P + Hr*Wr, C)
        regional = tokens[:, count:].unflatten(1, grid[:2])  # (B, Hr, Wr, C)
        source = value if self.local_source == "value" else x
        if self.grad_checkpointing and torch.is_grad_enabled():
            y = checkpoint(self._mix_locally, source, regional, *x.shape[1:3], use_reentrant=False)
        else:
            y = self._mix_locally(source, regional, *x.shape[1:3])
        if prefix is None:
            return y
        return y, self.proj_drop(self.proj(tokens[:, :count]))  # (B, H, W, C), (B, P, C)

    def _mix_locally(self, source: Tensor | None, regional: Tensor, height: int, width: int) -> Tensor:
        """The full-resolution half: broadcast, convolve, project."""
        if self._no_source:
            u = broadcast_regions(regional, height, width, self.region_size)  # (B, H, W, C)
        else:
            u = add_regions(source, regional, self.region_size, self.local_gain)
        return self.proj_drop(self.proj(self.local(u)))

    @property
    def _no_source(self) -> bool:
        return isinstance(self.local_gain, float) and self.local_gain == 0.0

    def _tokens(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Region tokens q, k, v (B, Hr, Wr, C), and the full-resolution values where they are the local source."""
        values = self.local_source == "value" and not self._no_source
        if self.folded is not None:
            return self.folded(x, values)
        if self.qkv == "common":
            return self.basis(x), None
        full = None
        if self.reduce == "mean":
            pooled = region_mean(x, self.region_size)
            parts = [self.q_proj(pooled), self.k_proj(pooled), self.v_proj(pooled)]
            full = self.v_proj(x) if values else None
        elif not values and self._composes(x):
            parts = self._composed(x, "qkv")
        else:
            full = self.v_proj(x)
            queries_keys = (
                self._composed(x, "qk")
                if self._composes(x)
                else [self.q_conv(self.q_proj(x)), self.k_conv(self.k_proj(x))]
            )
            parts = [*queries_keys, self.v_conv(full)]
        # As a list of tokens, which SyncBatchNorm (after a conversion for DDP) reads the same way as our norm.
        q, k, v = (
            norm(t.reshape(-1, self.dim)).reshape(t.shape)
            for norm, t in zip((self.q_norm, self.k_norm, self.v_norm), parts, strict=True)
        )
        return (q, k, v), full if values else None

    def _composes(self, x: Tensor) -> bool:
        """Whether to run projection and reduction as one map: where a backward pass would have to keep q, k and v.

        The composed weight is kept instead, so it has to be the smaller of the two; and the projections and reductions
        have to be plain ones (no LoRA, no quantisation, no hooks), because they are not called.
        """
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        rows, cols = self.region_size
        if x.shape[0] * x.shape[1] * x.shape[2] < COMPOSE_FROM * rows * cols * self.dim:
            return False
        return not any(self._not_plain(f"{n}_{what}") for n in "qkv" for what in ("proj", "conv"))

    def _not_plain(self, name: str) -> bool:
        """Whether a projection or reduction does more than its class says: LoRA, quantisation, somebody's hook."""
        module = getattr(self, name)
        kind = nn.Linear if name.endswith("proj") else RegionConv
        return type(module) is not kind or bool(module._forward_hooks or module._forward_pre_hooks)

    def _composed(self, x: Tensor, names: str) -> list[Tensor]:
        """Projection and depthwise reduction as one linear map of each region, for each of `names`."""
        _, height, width, dim = x.shape
        rows, cols = self.region_size
        linears = [getattr(self, f"{n}_proj") for n in names]
        taps = [getattr(self, f"{n}_conv").weight for n in names]
        weight = torch.cat([compose(linear.weight, tap) for linear, tap in zip(linears, taps, strict=True)])
        out = region_linear(pad_to_regions(x, self.region_size), weight, self.region_size)  # (B, Hr, Wr, n * C)
        if linears[0].bias is not None:
            sums = (
                tap_sums(torch.cat(taps), height, width)
                if height % rows or width % cols
                else torch.cat(taps).sum((1, 2, 3))
            )
            out = out + (sums * torch.cat([linear.bias for linear in linears])).to(out.dtype)
        if height % rows or width % cols:
            out = (out * ragged_factor(height, width, self.region_size, x)).to(out.dtype)
        return list(out.split(dim, -1))

    def _prefix(self, prefix: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of the prefix tokens, which no reduction and no norm touches."""
        if self.qkv == "common":
            raise ConfigError(
                "RegionalLocalMixer(qkv='common'): prefix tokens are on no map that the basis could read; use "
                "qkv='separate'."
            )
        if self.folded is not None:
            return self.folded.prefix(prefix)
        return self.q_proj(prefix), self.k_proj(prefix), self.v_proj(prefix)

    def _key_bias(self, x: Tensor, prefix: int) -> Tensor | None:
        """What the number of positions behind each key adds to its logit; None where that is the same for every key."""
        _, height, width, _ = x.shape
        rows, cols = self.region_size
        ragged = height % rows or width % cols
        if not ragged and (not prefix or rows * cols == 1):
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        counts = valid_counts(height, width, self.region_size, device=x.device, dtype=dtype).flatten()
        if not prefix:
            return (counts / (rows * cols)).log()
        return torch.cat([counts.new_zeros(prefix), counts.log()])


def _check_variants(
    qkv: str, local: str, local_source: str, reduce: str, learn_local_gain: str | None, basis_drop: float
) -> None:
    allowed = {
        "qkv": (qkv, ("separate", "common")),
        "local": (local, ("conv", "p4m")),
        "local_source": (local_source, ("input", "value")),
        "reduce": (reduce, ("depthwise", "mean")),
        "learn_local_gain": (learn_local_gain, (None, "scalar", "channel")),
    }
    for name, (value, choices) in allowed.items():
        if value not in choices:
            listed = " or ".join(repr(choice) for choice in choices)
            raise ConfigError(f"RegionalLocalMixer({name}={value!r}): not known; use {listed}.")
    if qkv == "common" and local_source == "value":
        raise ConfigError(
            "RegionalLocalMixer(qkv='common', local_source='value'): a common basis has no full-resolution values; use "
            "local_source='input'."
        )
    if qkv == "separate" and basis_drop:
        raise ConfigError(
            f"RegionalLocalMixer(basis_drop={basis_drop}): qkv='separate' has no basis to drop from; use 0."
        )
