"""A naive mixer: loops over batch, regions, heads and taps, float64 numpy, no code shared with the package."""

import math

import numpy as np


def linear(x, weights, name):
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def batch_norm(tokens, weights, name, training, eps=1e-5):
    """`tokens` (..., C); returns the result and the (mean, unbiased variance) of the batch, or None where unused."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    mean, var, seen = weights[f"{name}.running_mean"], weights[f"{name}.running_var"], None
    if training and len(flat) > 1:
        mean, var = flat.mean(0), flat.var(0)
        seen = mean, flat.var(0, ddof=1)
    return (tokens - mean) / np.sqrt(var + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"], seen


def regions(height, width, region):
    """The positions of each region, row by row: a list of lists of (row, column, row inside, column inside)."""
    rows, cols = region
    cells = []
    for top in range(0, height, rows):
        for left in range(0, width, cols):
            inside = [(top + i, left + j, i, j) for i in range(rows) for j in range(cols)]
            cells.append([p for p in inside if p[0] < height and p[1] < width])
    return cells


def softmax_attention(q, k, v, num_heads, scale, bias):
    """One image: q (Nq, C), k and v (Nk, C), bias (Nk,)."""
    d = q.shape[1] // num_heads
    out = np.zeros_like(q)
    for h in range(num_heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(q)):
            logits = np.array([scale * np.dot(q[i, part], k[j, part]) + bias[j] for j in range(len(k))])
            share = np.exp(logits - logits.max())
            share /= share.sum()
            out[i, part] = sum(share[j] * v[j, part] for j in range(len(k)))
    return out


def local_convolution(u, weight, bias):
    """`u` (H, W, C); `weight` (C, group_size, k, k)."""
    height, width, dim = u.shape
    group_size, kernel = weight.shape[1], weight.shape[2]
    out = np.zeros_like(u)
    for o in range(dim):
        first = o // group_size * group_size
        for i in range(height):
            for j in range(width):
                total = bias[o]
                for a in range(kernel):
                    for b in range(kernel):
                        y, x = i + a - kernel // 2, j + b - kernel // 2
                        if 0 <= y < height and 0 <= x < width:
                            total += np.dot(weight[o, :, a, b], u[y, x, first : first + group_size])
                out[i, j, o] = total
    return out


def turned(plane, element):
    """An element of p4m on a plane (H, W): quarter turns, then the rows in reverse order."""
    plane = np.rot90(plane, element % 4)
    return plane[::-1] if element >= 4 else plane


def group_elements():
    """What the 8 elements do to a plane whose entries all differ, to find products by looking them up."""
    probe = np.arange(9).reshape(3, 3)
    return {turned(probe, s).tobytes(): s for s in range(8)}, probe


def p4m_bank(weight):
    """The 8 turned copies of filters `weight` (fields, 1, 8, k, k): (8 * fields, 8, k, k)."""
    found, probe = group_elements()
    bank = np.zeros((8 * len(weight), 8, *weight.shape[3:]))
    for field in range(len(weight)):
        for h in range(8):
            for s in range(8):
                moved = found[turned(turned(probe, s), h).tobytes()]  # what s becomes under h
                bank[8 * field + h, moved] = turned(weight[field, 0, s], h)
    return bank


def common_basis(x, weights, cells, area, grid, reduce, training):
    """q, k, v (B, regions, C) of `qkv="common"` and the statistics that its norms saw."""
    batch, seen = x.shape[0], {}
    reduced = np.zeros((batch, len(cells), x.shape[-1]))
    for b in range(batch):
        for r, cell in enumerate(cells):
            if reduce == "mean":
                reduced[b, r] = sum(x[b, i, j] for i, j, _, _ in cell) / len(cell)
            else:
                taps = weights["basis.conv.weight"]
                reduced[b, r] = sum(x[b, i, j] * taps[:, 0, a, c] for i, j, a, c in cell) * area / len(cell)
    normed, seen["basis.norm"] = batch_norm(reduced, weights, "basis.norm", training)
    basis = linear(normed, weights, "basis.proj").reshape(batch, *grid, -1)
    tokens, none = {}, np.zeros(x.shape[-1])
    for name in "qkv":
        views = np.stack([local_convolution(one, weights[f"basis.{name}_conv.weight"], none) for one in basis])
        tokens[name], seen[f"basis.{name}_norm"] = batch_norm(views, weights, f"basis.{name}_norm", training)
        tokens[name] = tokens[name].reshape(batch, len(cells), -1)
    return tokens, seen


def mix_locally(u, weights):
    """The local convolution on (H, W, C), and the p4m convolution of each field where there is one."""
    if "local.weight" in weights:
        return local_convolution(u, weights["local.weight"], weights["local.bias"])
    u = local_convolution(u, weights["local.conv.weight"], weights["local.conv.bias"])
    return local_convolution(u, p4m_bank(weights["local.p4m.weight"]), np.repeat(weights["local.p4m.bias"], 8))


def mixer(x, weights, *, num_heads, region, scale, local_gain=1.0, local_source="input", reduce="depthwise",
          prefix=None, training=False):  # fmt: skip
    """The mixer of block.md on `x` (B, H, W, C); returns (y, prefix out or None, {norm: (mean, variance)})."""
    batch, height, width, dim = x.shape
    cells = regions(height, width, region)
    area = region[0] * region[1]
    tokens, seen, common = {}, {}, "basis.proj.weight" in weights
    if common:
        grid = -(-height // region[0]), -(-width // region[1])
        tokens, seen = common_basis(x, weights, cells, area, grid, reduce, training)
    full_v = None if common else linear(x, weights, "v_proj")
    for name in () if common else "qkv":
        reduced = np.zeros((batch, len(cells), dim))
        for b in range(batch):
            for r, cell in enumerate(cells):
                if reduce == "mean":
                    mean = sum(x[b, i, j] for i, j, _, _ in cell) / len(cell)
                    reduced[b, r] = linear(mean, weights, f"{name}_proj")
                else:
                    taps = weights[f"{name}_conv.weight"]
                    full = [linear(x[b, i, j], weights, f"{name}_proj") * taps[:, 0, a, c] for i, j, a, c in cell]
                    reduced[b, r] = sum(full) * area / len(cell)
        tokens[name], seen[f"{name}_norm"] = batch_norm(reduced, weights, f"{name}_norm", training)
    count = 0 if prefix is None else prefix.shape[1]
    unit = 1 if count else area
    bias = [0.0] * count + [math.log(len(cell) / unit) for cell in cells]
    y, prefix_out = np.zeros_like(x), None if prefix is None else np.zeros_like(prefix)
    for b in range(batch):
        q, k, v = (
            tokens[n][b] if prefix is None else np.concatenate([linear(prefix[b], weights, f"{n}_proj"), tokens[n][b]])
            for n in "qkv"
        )
        mixed = softmax_attention(q, k, v, num_heads, scale, bias)
        u = local_gain * (x[b] if local_source == "input" else full_v[b])
        for r, cell in enumerate(cells):
            for i, j, _, _ in cell:
                u[i, j] = u[i, j] + mixed[count + r]
        y[b] = linear(mix_locally(u, weights), weights, "proj")
        if count:
            prefix_out[b] = linear(mixed[:count], weights, "proj")
    return y, prefix_out, seen
