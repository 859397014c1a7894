"""The inference form: norms, projections and reductions as one linear map of each region."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrl.blocks.common_qkv import CommonBasis, CommonQKVAttention, reduce_map
from mrl.blocks.compose import compose, region_patches, tap_sums
from mrl.blocks.group_conv import LocalGroupConv
from mrl.blocks.mixer import RegionalLocalMixer
from mrl.blocks.regions import RegionNorm, pad_to_regions, ragged_factor, region_mean
from mrl.errors import ConfigError

Mixer = RegionalLocalMixer | CommonQKVAttention
Folded = tuple[tuple[Tensor, ...], Tensor | None]
ONE_GEMM_FROM = 128  # region tokens from which one GEMM with the larger weight beats projecting every position


@torch.no_grad()
def fold_(
    module: nn.Module, rank: int | None = None, *, batch: Tensor | None = None, tolerance: float = 1e-2
) -> nn.Module:
    """Turns every mixer inside a module into its inference form, in place, all or nothing; returns the module.

    Args:
        module: a mixer, or any model that contains some; it is in eval mode afterwards.
        rank: None is exact up to rounding; R cuts the depthwise kernels of regions with more than R positions.
        batch: an input of `module`, on which a cut is checked: the relative L2 error of each cut mixer's output is left
            in its `fold_error`.
        tolerance: the largest such error that is accepted.

    Raises:
        ConfigError: nothing to fold, folded already, projections that are not plain linear layers, a rank below 1 or
            one that cuts nothing here, or an error above the tolerance; nothing has changed then.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(8), RegionalLocalMixer(8, 2, 2)).eval()
        >>> x = torch.randn(1, 4, 4, 8)
        >>> y = net(x)
        >>> torch.allclose(fold_(net)(x), y, atol=1e-5)
        True
    """
    mixers = {name: m for name, m in module.named_modules() if isinstance(m, Mixer)}
    if not mixers:
        raise ConfigError(f"fold_: {type(module).__name__} contains no MRL mixer; give a mixer or a model with some.")
    if any(mixer.folded is not None for mixer in mixers.values()):
        raise ConfigError("fold_: it is folded already; build or load the model again to fold it another way.")
    for name, mixer in mixers.items():
        names = ("q_proj", "k_proj", "v_proj", "basis.proj")
        layers = {n: m for n, m in mixer.named_modules() if n in names}
        odd = next((n for n, m in layers.items() if type(m) is not nn.Linear), None)
        if odd is not None:
            raise ConfigError(
                f"fold_: {f'{name}.' if name else ''}{odd} is a {type(layers[odd]).__name__}, whose weight is not all it "
                "does; merge LoRA weights, or fold before you quantise."
            )
    if rank is not None and rank < 1:
        raise ConfigError(f"fold_(rank={rank}): a kernel has at least rank 1; use 1 to the region's area.")
    twins = {name: _folded(mixer, rank) for name, mixer in mixers.items()}
    if rank is not None and not any(_cuttable(mixer) for mixer in mixers.values()):
        raise ConfigError(f"fold_(rank={rank}): no depthwise reduction to cut here; use rank=None.")
    errors = {}
    if rank is not None and batch is not None:
        errors = _errors(module, batch, {mixers[n]: twins[n] for n in mixers if _cuttable(mixers[n])})
        worst = max(errors, key=errors.__getitem__)
        if not errors[worst] <= tolerance:
            name = next(n for n, mixer in mixers.items() if mixer is worst)
            raise ConfigError(
                f"fold_(rank={rank}): the output of {name or 'the mixer'} changes by {errors[worst]:.3g} of its size on "
                f"this batch, above tolerance={tolerance:g}; use a higher rank (the region's area is exact)."
            )
    for name, mixer in mixers.items():
        mixer._modules = twins[name]._modules
        mixer.fold_error = errors.get(mixer)
    return module.eval()


def _errors(module: nn.Module, batch: Tensor, twins: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, float]:
    """The relative L2 error of each twin's output on what its mixer reads when `module` runs on the batch."""
    squares = {mixer: [0.0, 0.0] for mixer in twins}

    def compare(mixer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        ours = twins[mixer](*inputs)
        exact, ours = (t[0] if isinstance(t, tuple) else t for t in (output, ours))
        squares[mixer][0] += (ours.double() - exact.double()).square().sum().item()
        squares[mixer][1] += exact.double().square().sum().item()

    was_training = {m: m.training for m in module.modules()}
    hooks = [mixer.register_forward_hook(compare) for mixer in twins]
    try:
        module.eval()(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in was_training.items():
            m.training = training
    return {mixer: (gap / max(size, 1e-300)) ** 0.5 for mixer, (gap, size) in squares.items()}


def _cuttable(mixer: Mixer) -> bool:
    separate = isinstance(mixer, RegionalLocalMixer) and mixer.qkv == "separate"
    return separate and mixer.reduce == "depthwise" and mixer.region_size != (1, 1)


def _folded(mixer: Mixer, rank: int | None) -> Mixer:
    """The inference form of a mixer, sharing what does not change; the mixer stays as it is."""
    if isinstance(mixer, CommonQKVAttention) or mixer.qkv == "common":
        parts: dict[str, nn.Module] = {"folded": FoldedBasis(mixer.basis)}
        gone = {"basis"}
    else:
        make = FoldedMean if mixer.reduce == "mean" else FoldedRegions
        parts = {"folded": make(mixer) if make is FoldedMean or rank is None else FoldedRegions(mixer, rank)}
        gone = {f"{n}_{what}" for n in "qkv" for what in ("proj", "conv", "norm")}
    if isinstance(mixer, RegionalLocalMixer):
        parts["local"] = _channels_last_(_inference_local(mixer.local))
    return _twin(mixer, {**{k: m for k, m in mixer._modules.items() if k not in gone}, **parts}).eval()


def _inference_local(local: nn.Module) -> nn.Module:
    if isinstance(local, LocalGroupConv):
        return _twin(local, {"conv": copy.deepcopy(local.conv), "p4m": local.p4m.to_conv2d()})
    return copy.deepcopy(local)


def _channels_last_(module: nn.Module) -> nn.Module:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return module


def _twin(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A second module with the same parameters and settings, other children, and no forward hooks."""
    twin = copy.copy(module)
    twin._modules, twin._forward_hooks, twin._forward_pre_hooks = dict(children), OrderedDict(), OrderedDict()
    return twin


def _affine(norm: RegionNorm) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm in eval mode, in float64."""
    gain = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return gain, norm.bias.double() - norm.running_mean.double() * gain


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype).contiguous(), requires_grad=False)


def _projections(mixer: RegionalLocalMixer) -> tuple[Tensor, Tensor]:
    """Weight (3C, C) and bias (3C) of q, k and v, in float64; a missing bias is 0."""
    linears = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    weight = torch.cat([linear.weight.double() for linear in linears])
    if linears[0].bias is None:
        return weight, weight.new_zeros(len(weight))
    return weight, torch.cat([linear.bias.double() for linear in linears])


class _FoldedProjections(nn.Module):
    """q, k and v of a mixer with its own three projections; the plain projections serve prefix tokens and values."""

    def __init__(self, mixer: RegionalLocalMixer) -> None:
        super().__init__()
        self.dim, self.region = mixer.dim, mixer.region_size
        weight, bias = _projections(mixer)
        self.weight, self.bias = (_frozen(t, mixer.q_proj.weight) for t in (weight, bias))

    def prefix(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of prefix tokens, (B, P, C) each."""
        return F.linear(tokens, self.weight, self.bias).chunk(3, -1)

    def values(self, x: Tensor) -> Tensor:
        """The full-resolution values."""
        return F.linear(x, self.weight[2 * self.dim :], self.bias[2 * self.dim :])


class FoldedMean(_FoldedProjections):
    """The inference form of `reduce="mean"`: the norms are inside the projections of the regions' means."""

    def __init__(self, mixer: RegionalLocalMixer) -> None:
        super().__init__(mixer)
        weight, bias = _projections(mixer)
        gain, shift = (
            torch.cat(t) for t in zip(*map(_affine, (mixer.q_norm, mixer.k_norm, mixer.v_norm)), strict=True)
        )
        self.mean_weight = _frozen(weight * gain[:, None], mixer.q_proj.weight)
        self.mean_bias = _frozen(bias * gain + shift, mixer.q_proj.weight)

    def forward(self, x: Tensor, values: bool) -> Folded:
        """Region tokens q, k, v (B, Hr, Wr, C), and the full-resolution values where they are asked for."""
        tokens = F.linear(region_mean(x, self.region), self.mean_weight, self.mean_bias)
        return tokens.split(self.dim, -1), self.values(x) if values else None


class FoldedRegions(_FoldedProjections):
    """The inference form of `reduce="depthwise"`: one linear map of each region's positions, norms inside.

        out = whole @ patch + shift + bias * sum of the taps,   whole[c, (p, i)] = gain[c] * k_c[p] * W[c, i]

    Where there are few region tokens, a processor is faster projecting every position and reducing afterwards than
    reading the larger weight: then it does that, with the norms inside the taps.

    Args:
        mixer: whose weights it takes.
        rank: None is exact; R first pools each region with R patterns, which the taps are cut to by an SVD.
    """

    def __init__(self, mixer: RegionalLocalMixer, rank: int | None = None) -> None:
        super().__init__(mixer)
        rows, cols = self.region
        like, (weight, bias) = mixer.q_proj.weight, _projections(mixer)
        taps, mixes, pools = [], [], []
        norms = (mixer.q_norm, mixer.k_norm, mixer.v_norm)
        gain, shift = (torch.cat(t) for t in zip(*map(_affine, norms), strict=True))
        cut = rank is not None and rank < min(rows * cols, mixer.dim)
        for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv):
            kernel = conv.weight.double().flatten(1)  # (C, r * r)
            if cut:
                left, size, right = torch.linalg.svd(kernel, full_matrices=False)
                mixes.append(left[:, :rank] * size[:rank])
                pools.append(right[:rank])
                kernel = mixes[-1] @ right[:rank]
            taps.append(kernel)
        kernels = torch.cat(taps) * gain[:, None]
        spread = torch.cat(mixes) * gain[:, None] if cut else kernels
        self.pool = _frozen(torch.stack(pools), like) if cut else None  # (3, R, r * r)
        self.whole = _frozen(compose(weight, spread[:, None, None]), like)  # (3C, R or r * r times C)
        self.taps = _frozen(kernels.view(-1, 1, rows, cols), like)
        self.shift = _frozen(shift, like)
        self.offset = _frozen(shift + bias * kernels.sum(1), like)

    def forward(self, x: Tensor, values: bool) -> Folded:
        """Region tokens q, k, v (B, Hr, Wr, C), and the full-resolution values where they are asked for."""
        if not values:
            return self._reduced(x, 3).split(self.dim, -1), None
        full = self.values(x)
        v = self._convolved(full, slice(2 * self.dim, None))
        return (*self._reduced(x, 2).split(self.dim, -1), v), full

    def _reduced(self, x: Tensor, parts: int) -> Tensor:
        """The tokens of the first parts of q, k, v: (B, Hr, Wr, parts * C)."""
        _, height, width, _ = x.shape
        (rows, cols), some = self.region, slice(0, parts * self.dim)
        cells = -(-height // rows) * -(-width // cols)
        many = torch.compiler.is_exporting() or rows * cols == 1 or x.shape[0] * cells >= ONE_GEMM_FROM
        if self.pool is None and not many:
            return self._convolved(F.linear(x, self.weight[some], self.bias[some]), some)
        patches = region_patches(pad_to_regions(x, self.region), self.region)
        ragged = height % rows or width % cols
        offset = None if ragged else self.offset[some]
        if self.pool is None:
            out = F.linear(patches, self.whole[some], offset)
        else:
            out = self._pooled(patches, parts, offset)
        if not ragged:
            return out
        bias = self.bias[some] * tap_sums(self.taps[some], height, width)
        return ((out + bias) * ragged_factor(height, width, self.region, x) + self.shift[some]).to(x.dtype)

    def _pooled(self, patches: Tensor, parts: int, offset: Tensor | None) -> Tensor:
        """R weighted sums of each region's positions, then the projections of those."""
        pooled = self.pool[:parts].flatten(0, 1) @ patches.unflatten(-1, (-1, self.dim))  # (B, Hr, Wr, parts * R, C)
        pooled = pooled.unflatten(-2, (parts, -1)).flatten(-2)  # (B, Hr, Wr, parts, R * C)
        weight = self.whole[: parts * self.dim].unflatten(0, (parts, -1))  # (parts, C, R * C)
        out = torch.cat([F.linear(pooled[..., i, :], weight[i]) for i in range(parts)], -1)
        return out if offset is None else out + offset

    def _convolved(self, full: Tensor, some: slice) -> Tensor:
        """The depthwise reduction of full-resolution projections, norms inside."""
        _, height, width, channels = full.shape
        rows, cols = self.region
        ragged = height % rows or width % cols
        padded = pad_to_regions(full, self.region).permute(0, 3, 1, 2)
        bias = None if ragged else self.shift[some]
        out = F.conv2d(padded, self.taps[some], bias, stride=self.region, groups=channels).permute(0, 2, 3, 1)
        if not ragged:
            return out
        return (out * ragged_factor(height, width, self.region, full) + self.shift[some]).to(full.dtype)


class FoldedBasis(nn.Module):
    """The inference form of a common basis: its norm inside the projection, the three others inside the convolutions."""

    def __init__(self, basis: CommonBasis) -> None:
        super().__init__()
        self.kv_stride, self.region, self.conv = basis.kv_stride, basis.region, copy.deepcopy(basis.conv)
        if self.conv is not None:
            self.conv.requires_grad_(False)
        like, weight = basis.proj.weight, basis.proj.weight.double()
        gain, shift = _affine(basis.norm)
        bias = weight @ shift + (0 if basis.proj.bias is None else basis.proj.bias.double())
        self.weight, self.bias = _frozen(weight * gain, like), _frozen(bias, like)
        affine = [_affine(norm) for norm in (basis.q_norm, basis.k_norm, basis.v_norm)]
        convs = (basis.q_conv, basis.k_conv, basis.v_conv)
        kernels = [conv.weight.double() * g[:, None, None, None] for conv, (g, _) in zip(convs, affine, strict=True)]
        self.taps = _frozen(torch.cat(kernels), like)
        self.shift = _frozen(torch.cat([s for _, s in affine]), like)

    def forward(self, x: Tensor, values: bool = False) -> Folded:
        """The maps q, k, v, (B, Hr, Wr, C) each; a common basis has no full-resolution values."""
        basis = F.linear(reduce_map(x, self.conv, self.region), self.weight, self.bias)  # (B, Hr, Wr, C)
        if self.kv_stride == 1:
            return self._views(basis, 0, 3, 1), None
        return (*self._views(basis, 0, 1, 1), *self._views(basis, 1, 3, self.kv_stride)), None

    def _views(self, basis: Tensor, start: int, end: int, stride: int) -> tuple[Tensor, ...]:
        dim = basis.shape[-1]
        some, copies = slice(start * dim, end * dim), basis.repeat(1, 1, 1, end - start).permute(0, 3, 1, 2)
        out = F.conv2d(copies, self.taps[some], self.shift[some], stride=stride, padding=1, groups=copies.shape[1])
        return out.permute(0, 2, 3, 1).split(dim, -1)
