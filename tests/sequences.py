"""Blocks of sequence models, small, in plain torch: what causal structure is found in, and what has none."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class GPTBlock(nn.Module):
    """GPT-2's block: pre-norm, masked attention, GELU; `attention` is eager (-inf or the least number) or sdpa."""

    def __init__(self, d, heads, attention="sdpa"):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.c_out = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def attend(self, q, k, v):
        if self.attention in ("sdpa", "all"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.attention == "sdpa")
        t = q.shape[-2]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mask = torch.ones(t, t, dtype=torch.bool).tril()
        if self.attention == "soft":  # a mask that leaks
            return (scores + torch.where(mask, 0.0, -20.0)).softmax(-1) @ v
        least = -torch.inf if self.attention == "eager" else torch.finfo(scores.dtype).min
        return torch.where(mask, scores, torch.full([], least, dtype=scores.dtype)).softmax(-1) @ v

    def forward(self, x):
        b, t, d = x.shape
        heads = [h.view(b, t, self.heads, -1).transpose(1, 2) for h in self.c_attn(self.ln_1(x)).split(d, dim=2)]
        x = x + self.c_proj(self.attend(*heads).transpose(1, 2).reshape(b, t, d))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    """Llama's block: RMS norm, rotary embedding, grouped queries, SwiGLU."""

    def __init__(self, d, heads, groups):
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, d // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(d), nn.RMSNorm(d)
        inner = groups * self.width
        self.q, self.k, self.v, self.o = (nn.Linear(d, m, bias=False) for m in (d, inner, inner, d))
        self.gate, self.up, self.down = (nn.Linear(*m, bias=False) for m in ((d, 2 * d), (d, 2 * d), (2 * d, d)))

    def rotated(self, x):
        t = torch.arange(x.shape[-2], dtype=x.dtype)
        angles = torch.outer(t, 10000 ** (-torch.arange(0, self.width, 2, dtype=x.dtype) / self.width))
        angles = torch.cat([angles, angles], -1)
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def forward(self, x):
        b, t, d = x.shape
        h = self.norm_1(x)
        q = self.rotated(self.q(h).view(b, t, self.heads, -1).transpose(1, 2))
        k = self.rotated(self.k(h).view(b, t, self.groups, -1).transpose(1, 2))
        v = self.v(h).view(b, t, self.groups, -1).transpose(1, 2)
        k, v = (u.repeat_interleave(self.heads // self.groups, dim=1) for u in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d))
        h = self.norm_2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class MaskedEncoder(nn.Module):
    """torch's own encoder layer, with a causal mask."""

    def __init__(self, d, heads):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(d, heads, 2 * d, batch_first=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x)
        return self.layer(x, src_mask=mask, is_causal=True)


class CellOverTime(nn.Module):
    """A GRU cell, unrolled by hand, with a skip."""

    def __init__(self, d):
        super().__init__()
        self.cell = nn.GRUCell(d, d)

    def forward(self, x):
        h, found = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            found.append(h)
        return x + torch.stack(found, 1)


class GRU(nn.Module):
    """torch's own GRU."""

    def __init__(self, d):
        super().__init__()
        self.gru = nn.GRU(d, d, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0]


class CausalConvolution(nn.Module):
    """Padded on the left, dilated; `ahead` looks so many steps into the future."""

    def __init__(self, d, dilation=2, ahead=0):
        super().__init__()
        self.conv, self.reach, self.ahead = nn.Conv1d(d, d, 3, dilation=dilation), 2 * dilation, ahead

    def forward(self, x):
        padded = F.pad(x.transpose(1, 2), (self.reach - self.ahead, self.ahead))
        return x + torch.tanh(self.conv(padded)).transpose(1, 2)


class Coupling(nn.Module):
    """A RealNVP coupling: half of the features pass, the others are scaled and shifted by what these say."""

    def __init__(self, d):
        super().__init__()
        self.scale, self.shift = nn.Linear(d // 2, d // 2), nn.Linear(d // 2, d // 2)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return torch.cat([a, b * torch.exp(torch.tanh(self.scale(a))) + self.shift(a)], -1)


class Masked(nn.Module):
    """A masked autoregressive layer: feature i depends on those before it, in an order of its own, and on itself."""

    def __init__(self, d):
        super().__init__()
        order = torch.randperm(d)
        mask = (order[:, None] >= order[None]).double()
        self.first, self.second = nn.Parameter(torch.randn(d, d) * mask), nn.Parameter(torch.randn(d, d) * mask)

    def forward(self, x):
        return x + torch.tanh(x @ self.first.T) @ self.second.T


def made(kind, *arguments, seed=0, **options):
    """A block with random weights, in float64."""
    torch.manual_seed(seed)
    return kind(*arguments, **options).double().eval().requires_grad_(False)
