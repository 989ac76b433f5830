"""Decoders as public code bases write them, from memory and in our own words: tiny, to be compared
with torch.autograd. Each takes ids and gives logits; what it is like stands in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tintc
from tests.support.models import randomized
from tintc.compiler.reports.islands import islands, said

V, D, H, E, N = 29, 16, 4, 4, 3


def wide(x: Tensor) -> Tensor:
    """At least float32, as `float()` is for the models' own half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Hook(nn.Identity):
    """A place to look at a value."""


class HookedBlock(nn.Module):
    """TransformerLens: weights of each head, einsum, hooks that do nothing, norms written out."""

    def __init__(self) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) / 4)

        self.W_Q, self.W_K, self.W_V = (weight(H, D, E) for _ in range(3))
        self.b_Q, self.b_K, self.b_V = (weight(H, E) for _ in range(3))
        self.W_O, self.b_O = weight(H, E, D), weight(D)
        self.W_in, self.b_in, self.W_out, self.b_out = (
            weight(D, 40), weight(40), weight(40, D), weight(D)
        )  # fmt: skip
        self.w1, self.b1, self.w2, self.b2 = (weight(D) for _ in range(4))
        self.hook_z, self.hook_pattern, self.hook_resid = Hook(), Hook(), Hook()
        self.register_buffer("mask", torch.tril(torch.ones(64, 64, dtype=torch.bool)))
        self.register_buffer("IGNORE", torch.tensor(-torch.inf))

    def norm(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w + b

    def forward(self, x: Tensor) -> Tensor:
        y, t = self.norm(x, self.w1, self.b1), x.shape[1]
        q, k, v = (
            torch.einsum("bpd,hde->bphe", y, w) + b
            for w, b in ((self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V))
        )
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(E)
        scores = torch.where(self.mask[None, None, :t, :t], scores, self.IGNORE)
        pattern = F.softmax(scores, dim=-1)
        pattern = self.hook_pattern(
            torch.where(torch.isnan(pattern), torch.zeros_like(pattern), pattern)
        )
        z = self.hook_z(torch.einsum("bkhe,bhqk->bqhe", v, pattern))
        x = self.hook_resid(x + torch.einsum("bqhe,hed->bqd", z, self.W_O) + self.b_O)
        y = self.norm(x, self.w2, self.b2) @ self.W_in + self.b_in
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y.pow(3))))
        return x + (y @ self.W_out + self.b_out)


class Hooked(nn.Module):
    """TransformerLens: tables read by indexing, the head a matrix (D, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.W_E, self.W_pos = nn.Parameter(torch.randn(V, D)), nn.Parameter(torch.randn(64, D))
        self.blocks = nn.ModuleList(HookedBlock() for _ in range(N))
        self.ln_final = nn.LayerNorm(D)
        self.W_U, self.b_U = nn.Parameter(torch.randn(D, V)), nn.Parameter(torch.zeros(V))

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.W_pos[: ids.shape[-1], :].unsqueeze(0).repeat(ids.shape[0], 1, 1)
        x = self.W_E[ids, :] + positions
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x) @ self.W_U + self.b_U


class UnitNorm(nn.Module):
    """x-transformers: the vector's length is sqrt(D), times 1 + g."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * D**0.5 * (self.g + 1)


class GatedFeed(nn.Module):
    """x-transformers: a linear layer of two halves, one of which is the gate of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(D, 48), nn.Linear(24, D)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(self.drop(x * F.silu(gate)))


class MemoryAttention(nn.Module):
    """x-transformers: partly rotated unit queries and keys, a learned scale, keys that are always
    seen, a gate on the values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.to_out, self.to_gate = nn.Linear(D, D, bias=False), nn.Linear(D, D)
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(H, 2, E)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1, H, 1, 1) * 3)

    def turned(self, x: Tensor, freqs: Tensor) -> Tensor:
        size = freqs.shape[-1]
        x, rest = x[..., :size], x[..., size:]
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        half = torch.stack((-b, a), -1).flatten(-2)
        return torch.cat((x * freqs.cos() + half * freqs.sin(), rest), -1)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, H, E).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k = self.turned(q, freqs), self.turned(k, freqs)
        k, v = (
            torch.cat((memory[None].expand(b, -1, -1, -1), y), -2)
            for memory, y in ((self.mem_k, k), (self.mem_v, v))
        )
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        causal = torch.ones((t, t + 2), dtype=torch.bool, device=x.device).triu(3)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(-1), v)
        out = out.transpose(1, 2).reshape(b, t, -1) * self.to_gate(x).sigmoid()
        return self.to_out(out)


class Alternating(nn.Module):
    """x-transformers: attention and feed-forward as items of one list, each with its norm and a
    residual connection with a learned scale.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(V, D)
        self.layers = nn.ModuleList(
            nn.ModuleList([UnitNorm(), MemoryAttention() if i % 2 == 0 else GatedFeed()])
            for i in range(4)
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(4))
        self.register_buffer("inv_freq", 100.0 ** -torch.arange(0, 1, 1.0), persistent=False)
        self.final_norm, self.to_logits = UnitNorm(), nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        t = torch.arange(ids.shape[1], device=ids.device).type_as(self.inv_freq)
        freqs = torch.einsum("i,j->ij", t, self.inv_freq).repeat_interleave(2, -1)
        x = self.token_emb(ids)
        for (norm, layer), scale in zip(self.layers, self.scales, strict=True):  # type: ignore[misc]
            x = layer(norm(x), freqs) + x * scale
        return self.to_logits(self.final_norm(x))


class MatrixBlock(nn.Module):
    """lingua: rotations as matrices of 2 x 2, norms at least in float32, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(D, n, bias=False) for n in (D, D // 2, D // 2))
        self.wo, self.w1, self.w3, self.w2 = (
            nn.Linear(a, b, bias=False) for a, b in ((D, D), (D, 40), (D, 40), (40, D))
        )
        self.n1, self.n2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5)
        return (y * wide(weight)).type_as(x)

    def forward(self, x: Tensor, freqs: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm(x, self.n1)
        q = self.wq(y.view_as(x)).view(b, t, H, E)
        k, v = (layer(y).view(b, t, H // 2, E) for layer in (self.wk, self.wv))
        q, k = (
            (wide(z).reshape(*z.shape[:-1], -1, 1, 2) * freqs[:, None]).sum(-1).flatten(3)
            for z in (q, k)
        )
        k, v = (z[:, :, :, None].expand(b, t, H // 2, 2, E).reshape(b, t, H, E) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(out.transpose(1, 2).contiguous().reshape(b, t, D))
        y = self.norm(x, self.n2)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Matrices(nn.Module):
    """lingua: one table of rotation matrices in a buffer, cut to the call's length."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(V, D)
        self.layers = nn.ModuleList(MatrixBlock() for _ in range(N))
        self.norm, self.output = nn.RMSNorm(D, eps=1e-5), nn.Linear(D, V, bias=False)
        angles = torch.outer(torch.arange(64.0), 100.0 ** -torch.arange(0, 1, 2 / E))
        cos, sin = angles.cos(), angles.sin()
        table = torch.stack((cos, -sin, sin, cos), -1).view(64, -1, 2, 2)
        self.register_buffer("freqs", table, persistent=False)

    def forward(self, ids: Tensor, target: Tensor | None = None) -> Tensor:
        assert ids.shape[1] <= 64, "longer than the table"
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.freqs[: ids.shape[1]])
        logits = self.output(self.norm(x))
        return logits if target is None else F.cross_entropy(logits.flatten(0, 1), target.flatten())


class Cache(dict[str, Tensor]):
    """OLMo: tables by name that modules share, made longer when a call needs it."""


class CachedRotary(nn.Module):
    """OLMo: sines and cosines kept from call to call, computed without autocast."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.cache = cache

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        sin, cos = self.cache.get("sin"), self.cache.get("cos")
        if sin is not None and cos is not None and sin.shape[-2] >= length:
            return sin[:, :, :length], cos[:, :, :length]
        with torch.autocast(device.type, enabled=False):
            inv = 1.0 / 100.0 ** (torch.arange(0, E, 2, device=device, dtype=torch.float64) / E)
            freqs = torch.einsum("i , j -> i j", torch.arange(length, device=device), inv)
            angles = torch.cat((freqs, freqs), -1)
            sin, cos = angles.sin()[None, None], angles.cos()[None, None]
        self.cache["sin"], self.cache["cos"] = sin, cos
        return sin, cos

    def half(self, x: Tensor) -> Tensor:
        b, h, t, e = x.size()
        a, c = x.view(b, h, t, 2, e // 2).unbind(dim=-2)
        return torch.cat((-c, a), dim=-1)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        length = k.shape[-2]
        with torch.autocast(q.device.type, enabled=False):
            sin, cos = (z.type_as(q) for z in self.tables(length, q.device))
            q, k = (
                z * cos[:, :, length - z.shape[-2] : length] + self.half(z) * sin for z in (q, k)
            )
        return q, k


class CachedBlock(nn.Module):
    """OLMo: one product for q, k and v, norms of q and k, norms outside of autocast, SwiGLU."""

    def __init__(self, cache: Cache) -> None:
        super().__init__()
        self.att_proj, self.attn_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.ff_proj, self.ff_out = nn.Linear(D, 48), nn.Linear(24, D)
        self.attn_norm, self.ff_norm, self.q_norm, self.k_norm = (
            nn.Parameter(torch.ones(D)) for _ in range(4)
        )
        self.rotary = CachedRotary(cache)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = wide(x)
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            y = y.to(x.dtype)
        return weight * y

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.att_proj(self.norm(x, self.attn_norm)).split((D, D, D), dim=-1)
        q, k = self.norm(q, self.q_norm).to(v.dtype), self.norm(k, self.k_norm).to(v.dtype)
        q, k, v = (z.view(b, t, H, E).transpose(1, 2) for z in (q, k, v))
        q, k = self.rotary(q, k)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias[:, :, :t, :t].to(q.dtype), dropout_p=0.0, is_causal=False
        )
        x = x + self.attn_out(out.transpose(1, 2).contiguous().view(b, t, D))
        a, gate = self.ff_proj(self.norm(x, self.ff_norm)).chunk(2, dim=-1)
        return x + self.ff_out(F.silu(gate) * a)


class Cached(nn.Module):
    """OLMo: modules in a ModuleDict, a causal bias made by triu_ and masked_fill_, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache()
        blocks = nn.ModuleList(CachedBlock(self.cache) for _ in range(N))
        norm = nn.LayerNorm(D, bias=False)
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(V, D), "blocks": blocks, "ln_f": norm}
        )

    def bias(self, length: int, device: torch.device) -> Tensor:
        kept = self.cache.get("bias")
        if kept is not None and kept.shape[-1] >= length:
            return kept
        with torch.autocast(device.type, enabled=False):
            bias = torch.triu(torch.ones(length, length, device=device), diagonal=1)
            bias.masked_fill_(bias == 1, torch.finfo(bias.dtype).min)
            self.cache["bias"] = bias.view(1, 1, length, length)
        return self.cache["bias"]

    def forward(self, input_ids: Tensor) -> dict[str, Any]:
        x = self.transformer["wte"](input_ids)
        bias = self.bias(x.shape[1], x.device)
        for block in self.transformer["blocks"]:
            x = block(x, bias)
        logits = F.linear(self.transformer["ln_f"](x), self.transformer["wte"].weight)
        return {"logits": logits * (1 / math.sqrt(D)), "attn_key_values": None}


class SandwichBlock(nn.Module):
    """gemma_pytorch: norms on both sides of a sublayer with 1 + weight, complex rotations, groups
    of heads repeated, a cap on scores, every second layer with a window.
    """

    def __init__(self, local: bool) -> None:
        super().__init__()
        self.local = local
        self.qkv_proj, self.o_proj = nn.Linear(D, 2 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(a, b) for a, b in ((D, 40), (D, 40), (40, D))
        )
        self.norms = nn.ParameterList(nn.Parameter(torch.zeros(D)) for _ in range(4))
        self.query_norm, self.key_norm = (nn.Parameter(torch.zeros(E)) for _ in range(2))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1 + wide(weight))).type_as(x)

    def turned(self, x: Tensor, freqs: Tensor) -> Tensor:
        pairs = torch.stack(torch.chunk(wide(x.transpose(1, 2)), 2, dim=-1), dim=-1)
        out = torch.view_as_real(torch.view_as_complex(pairs) * freqs).type_as(x)
        out = torch.cat(torch.chunk(out, 2, dim=-1), dim=-2)
        return out.reshape(*out.shape[:3], -1).transpose(1, 2)

    def attend(self, x: Tensor, freqs: Tensor, mask: Tensor, local: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv_proj(x).split([D, D // 2, D // 2], dim=-1)
        q, k, v = q.view(b, -1, H, E), k.view(b, -1, H // 2, E), v.view(b, -1, H // 2, E)
        q, k = self.norm(q, self.query_norm), self.norm(k, self.key_norm)
        q, k = self.turned(q, freqs), self.turned(k, freqs)
        k, v = (torch.repeat_interleave(z, 2, dim=2) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        q.mul_(E**-0.5)
        scores = torch.matmul(q, k.transpose(2, 3))
        scores = torch.tanh(scores / 5.0) * 5.0
        scores = scores + (local if self.local else mask)
        out = torch.matmul(F.softmax(wide(scores), dim=-1).type_as(q), v)
        return self.o_proj(out.transpose(1, 2).contiguous().view(b, t, -1))

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, local: Tensor) -> Tensor:
        residual, n = x, self.norms
        x = residual + self.norm(self.attend(self.norm(x, n[0]), freqs, mask, local), n[1])
        residual, y = x, self.norm(x, n[2])
        y = self.down_proj(F.gelu(self.gate_proj(y), approximate="tanh") * self.up_proj(y))
        return residual + self.norm(y, n[3])


class Sandwich(nn.Module):
    """gemma_pytorch: a complex table read by index_select, embeddings scaled by a tensor, capped
    logits from the embedding's weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Embedding(V, D)
        self.layers = nn.ModuleList(SandwichBlock(i % 2 == 0) for i in range(N))
        self.norm = nn.RMSNorm(D, eps=1e-6)
        angles = torch.outer(torch.arange(64.0), 100.0 ** -torch.arange(0, 1, 2 / E)).double()
        table = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("freqs_cis", table, persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        t = input_ids.shape[1]
        at = torch.arange(0, t, dtype=torch.int64, device=input_ids.device)
        freqs = self.freqs_cis.index_select(0, at)[None, None]
        mask = torch.full((1, 1, t, t), -2.3819763e38, dtype=torch.float64).triu(diagonal=1)
        local = mask + torch.tril(torch.full_like(mask, -2.3819763e38), diagonal=-5)
        x = self.embedder(input_ids)
        x = x * torch.tensor(D**0.5, dtype=x.dtype, device=x.device)
        for layer in self.layers:
            x = layer(x, freqs, mask, local)
        logits = torch.matmul(self.norm(x), self.embedder.weight.t())
        logits = torch.tanh(logits / 30.0) * 30.0
        return logits.argmax(-1), logits


class SandwichLogits(nn.Module):
    """The logits of it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Sandwich()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[1]


def unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class SpeedBlock(nn.Module):
    """modded-nanogpt, parameter-golf: value embeddings and the first values mixed in, norms
    without weights, half of each head rotated, ReLU squared, gains of heads, learned scales.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.qkvo = nn.Parameter(torch.randn(4, D, D) / 4)
        self.c_fc, self.c_proj = (nn.Parameter(torch.randn(40, D) / 4) for _ in range(2))
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.2]))
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.q_gain = nn.Parameter(torch.full((H,), 1.5))
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.ones(D)) for _ in range(2))
        self.attn_gate = nn.Linear(6, H, bias=False)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, a * -sin + b * cos), -1).type_as(x)

    def forward(
        self, x: Tensor, first: Tensor, values: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        b, t, _ = x.shape
        x = self.lambdas[0] * x + self.lambdas[1] * first
        y = unit(x)
        weight = self.qkvo[:3].flatten(end_dim=1).type_as(y)
        q, k, v = F.linear(y, weight).view(b, t, 3 * H, E).chunk(3, dim=-2)
        q, k = unit(q), unit(k)
        q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        q = q * self.q_gain.to(q.dtype)[None, None, :, None]
        if values is not None:
            v = self.value_mix[0] * v + self.value_mix[1] * values.view_as(v)
        window = 4 if self.index == 1 else 10**6
        i = torch.arange(t, device=x.device)
        seen = (i[:, None] >= i) & (i[:, None] - i < window)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen, scale=0.4
        ).transpose(1, 2)
        out = out * torch.sigmoid(self.attn_gate(y[..., :6])).view(b, t, H, 1)
        x = x + self.attn_scale * F.linear(out.contiguous().view(b, t, D), self.qkvo[3])
        y = F.relu(F.linear(unit(x), self.c_fc)).square()
        return x + self.mlp_scale * F.linear(y, self.c_proj.T)


class Speed(nn.Module):
    """modded-nanogpt, parameter-golf: skips from the first half to the second, a part of the token
    before, capped logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.value_embeds = nn.Embedding(V, D), nn.Embedding(V, D)
        self.blocks = nn.ModuleList(SpeedBlock(i) for i in range(4))
        self.skip_weights = nn.Parameter(torch.ones(2, D))
        self.smear_gate = nn.Linear(4, 1, bias=False)
        self.lm_head = nn.Linear(D, V, bias=False)
        freqs = torch.cat((100.0 ** -torch.linspace(0, 1, E // 4), torch.zeros(E // 4)))
        angles = torch.outer(torch.arange(64.0), freqs)
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.size(1)
        x = self.embed(ids)
        smear = torch.sigmoid(self.smear_gate(x[:, 1:, :4]))
        x = torch.cat([x[:, :1], x[:, 1:] + smear * x[:, :-1]], dim=1)
        x = first = unit(x)
        values, skips = self.value_embeds(ids), []
        for i, block in enumerate(self.blocks):
            if i >= 2:
                x = x + self.skip_weights[i - 2][None, None] * skips.pop()
            x = block(x, first, values if i in (0, 3) else None, self.cos[:, :t], self.sin[:, :t])
            if i < 2:
                skips.append(x)
        logits = self.lm_head(unit(x))
        return 15 * logits * torch.rsqrt(logits.square() + 225)


class Stock(nn.Module):
    """torch's tutorial: nn.TransformerEncoder with a square mask, sines of positions kept."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, H, 40, dropout=0.1, batch_first=True)
        self.encoder, self.linear = nn.TransformerEncoder(layer, N), nn.Linear(D, V)
        self.embedding = nn.Embedding(V, D)
        angles = torch.arange(64.0)[:, None] * torch.exp(torch.arange(0, D, 2) * -0.5)
        table = torch.zeros(1, 64, D)
        table[0, :, 0::2], table[0, :, 1::2] = angles.sin(), angles.cos()
        self.register_buffer("pe", table)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(D) + self.pe[:, : ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.linear(self.encoder(x, mask=mask.to(x.dtype), is_causal=True))


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "weights of each head": Hooked,
    "sublayers in turn": Alternating,
    "rotation matrices": Matrices,
    "tables in a cache": Cached,
    "norms on both sides": SandwichLogits,
    "value residuals": Speed,
    "nn.TransformerEncoder": Stock,
}


def main() -> None:
    """Prints, for each, what is in islands."""
    for name, build in DECODERS.items():
        torch.manual_seed(1)
        model = randomized(build()).double().eval()
        simulator = tintc.compile(model, tintc.SimulatorConfig.exact(), check="none")
        print(f"{name}: {said(islands(simulator))}", flush=True)


if __name__ == "__main__":
    main()
