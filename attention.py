"""Token mixers of today's language models: one flat file, plain torch, no hand-written kernels.

Every mixer is a pure function on (B, H, T, D) tensors and a layer built from a config:

    layer = ATTENTION["full"](config)        # config: any object with the attributes that the layer reads
    y = layer(x)                             # (B, T, C) -> (B, T, C), causal
    y = layer(x, causal=False)               # bidirectional, for diffusion models
    cache = layer.init_cache(batch_size=2, max_len=512)
    y = layer(x, cache=cache)                # prefill or decode: any number of tokens, the cache advances

Layer keywords, the same for all:
    cache   from init_cache; None computes the whole sequence at once
    commit  False: read cache + x, but leave the cache as it was (a noisy block, a draft)
    pos     (T,) or (B, T) positions; default cache.pos + arange(T). With a cache `full` and `mla` write to the
            slots named by pos, so that a block in the middle of a canvas can be computed anew
    valid   (B, T) bool, False = padding on the right: hidden from every other token
    mask    (T, S) bool, True = visible, instead of causal/bidirectional: `full` and `mla` only, without a cache
    aux     dict to which a layer adds named scalars, such as a loss of its own
and layer.cache_bytes(T, dtype), layer.reads(T, causal), layer.flops(T, causal): what one sequence of length T costs
in the mixer itself, projections not counted (flops: one forward pass).

B batch, T tokens, C = n_embd, H heads, G = n_head // n_kv_head, D head width. This file imports nothing of ours.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Shared helpers

class Cache:
    """What a layer (or a whole model) remembers: tensors of fixed shape, so that a compiled decode step never recompiles.

    pos (B,) int64 counts the valid tokens of each row. used is an upper bound of pos.max() known on the host: asking
    the device for it would stall every step.
    """
    def __init__(self, batch_size, max_len, device=None, **state):
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_len, self.used = max_len, 0
        self.__dict__.update(state)

    def positions(self, T, pos=None):
        """(B, T) positions of the next T tokens, or pos itself brought to that shape."""
        if pos is None:
            if not torch.compiler.is_compiling():
                if self.used + T > self.max_len:
                    raise ValueError(f"the cache holds {self.max_len} tokens and {self.used} are taken: {T} more do not "
                                     f"fit, make it with init_cache(max_len >= {self.used + T})")
            pos = self.pos[:, None] + torch.arange(T, device=self.pos.device)
        return pos.expand(self.pos.size(0), -1)

    def advance(self, pos, valid=None):
        """Count the tokens at pos (B, T) as seen; the invalid ones among them do not count."""
        end = pos + 1 if valid is None else torch.where(valid, pos + 1, 0)
        self.pos.copy_(torch.maximum(self.pos, end.amax(dim=1)))
        if not torch.compiler.is_compiling():
            self.used = min(self.max_len, self.used + pos.size(1))


def visible(q_pos, k_pos, causal=True, window=None, k_valid=None):
    """Which keys a query may read: positions (..., T) and (..., S) -> bool (..., T, S).

    window counts the token itself: 0 <= t - s < window (causal), |t - s| < window (bidirectional).
    k_valid (..., S) hides keys; a query always sees its own position, so that no softmax row is empty (NaN).
    """
    d = q_pos[..., :, None] - k_pos[..., None, :]
    ok = d >= 0 if causal else torch.ones_like(d, dtype=torch.bool)
    if window is not None:
        ok = ok & (d < window) & (-d < window)
    if k_valid is not None:
        ok = (ok & k_valid[..., None, :]) | (d == 0)
    return ok


def count_visible(T, causal=True, window=None):
    """Number of visible (query, key) pairs in a sequence of T tokens: the sum over queries of the keys they read."""
    w = T if window is None else min(window, T)
    one_side = w * (w + 1) // 2 + (T - w) * w                 # queries before the window is full, and after
    return one_side if causal else 2 * one_side - T


def softmax_attention(q, k, v, causal=True, window=None, sink=None, scale=None, mask=None):
    """Softmax attention. q (B, H, T, D); k, v (B, H_kv, S, D): grouped-query attention when H_kv < H -> (B, H, T, Dv).

    With S > T the queries are the last T of the S positions. mask: bool, broadcastable to (B, H, T, S), True = visible,
    in place of causal and window. sink (H,): a learned logit per head that takes part in the softmax and reads nothing,
    so that a head can attend to no token (gpt-oss). scale defaults to D ** -0.5.
    """
    T, S = q.size(-2), k.size(-2)
    gqa = q.size(1) != k.size(1)
    if mask is None and (window is not None and window < S or sink is not None or (causal and 1 < T < S)):
        t = torch.arange(S, device=q.device)
        mask = visible(t[S - T:], t, causal, window)
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None and T > 1,
                                              scale=scale, enable_gqa=gqa)
    # SDPA has no sink and does not return its normaliser, so this is the definition, with its (T, S) scores in memory.
    k, v = (a.repeat_interleave(q.size(1) // a.size(1), dim=1) for a in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (scale or q.size(-1) ** -0.5)         # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    null = sink.float().view(1, -1, 1, 1).expand(q.size(0), -1, T, 1)
    return torch.cat([scores, null], dim=-1).softmax(dim=-1)[..., :-1].to(v.dtype) @ v


def rotary(x, pos, dim=None, base=10_000.0, interleaved=False):
    """Rotary position embedding of the first `dim` channels (RoFormer, arXiv 2104.09864; partial as in GPT-NeoX).

    x (B, H, T, D), pos (T,) or (B, T). Pairs are channels (i, i + dim/2), the layout of Llama and transformers, or
    (2i, 2i + 1) when interleaved (DeepSeek). Angles in float32: bf16 has no integer above 256 next to each other.
    """
    dim = x.size(-1) if dim is None else dim
    freq = base ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = (pos[..., None].float() * freq).unsqueeze(-3)                              # (1 or B, 1, T, dim/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    r, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = r[..., 0::2], r[..., 1::2]
        r = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = r.chunk(2, dim=-1)
        r = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([r, rest], dim=-1) if rest.size(-1) else r


def top_k(scores, k):
    """The k largest along the last dim, -inf meaning invisible: (index (..., k'), picked (..., k') bool), k' = min(k, S).

    Descending, ties to the earliest index, exactly min(k, visible) picked. Ties are common (ReLU scores, bf16) and
    torch.topk breaks them by memory layout, so parallel and cached selection would differ. Each float32 score is mapped
    to an integer of the same order, with the index in the low bits: no two are equal.
    """
    S = scores.size(-1)
    bits = (scores.detach().float() + 0.0).view(torch.int32).long()                    # + 0.0: -0.0 and 0.0 are a tie
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (order << 32) + (S - 1 - torch.arange(S, device=scores.device))
    index = key.topk(min(k, S), dim=-1).indices
    return index, scores.gather(-1, index) > -math.inf


def write_slots(buffer, new, slots):
    """buffer (B, h, S, D)[b, :, slots[b, t]] = new (B, h, T, D)[b, :, t], in place; slots (B, T)."""
    buffer.scatter_(2, slots[:, None, :, None].expand_as(new), new.to(buffer.dtype))


def extend(cache, new, pos, valid, commit):
    """Put keys and values into their slots and return what the queries at pos may read.

    new: {"k": (B, h, T, D), ...} by the names of the cache's buffers. Returns (buffers, k_pos (S,), k_valid (B, S)).
    With commit=False the new entries lie beyond cache.pos, where nothing reads them later and the next call overwrites
    them: pos must then continue the cache.
    """
    for name, a in new.items():
        write_slots(getattr(cache, name), a, pos)
    end = pos + 1 if valid is None else torch.where(valid, pos + 1, 0)
    end = torch.maximum(cache.pos, end.amax(dim=1))                                    # (B,)
    # eager: only the slots in use. compiled: all of them, masked, so that shapes stay.
    S = cache.max_len if torch.compiler.is_compiling() else min(cache.max_len, cache.used + pos.size(1))
    slots = torch.arange(S, device=pos.device)
    if commit:
        cache.advance(pos, valid)
    return [getattr(cache, name)[:, :, :S] for name in new], slots, slots < end[:, None]


def extend_ring(cache, new, pos, valid, commit):
    """As extend, for a sliding window: the cache keeps the last W tokens in a ring, slot = position % W.

    The ring has one slot more, W, that takes what is not kept and is never read (its position stays -1).
    """
    B, T = pos.shape
    W = cache.slot_pos.size(1) - 1
    ok = torch.ones_like(pos, dtype=torch.bool) if valid is None else valid
    old = [getattr(cache, name) for name in new]
    out = [torch.cat([o, a.to(o.dtype)], dim=2) for o, a in zip(old, new.values())]    # copies: the ring may move on
    k_pos = torch.cat([cache.slot_pos, pos], dim=1)
    k_valid = torch.cat([cache.slot_pos >= 0, ok], dim=1)
    if commit:
        keep = ok & (torch.arange(T, device=pos.device) >= ok.sum(1, keepdim=True) - W)
        slots = torch.where(keep, pos % W, W)
        for o, a in zip(old, new.values()):
            write_slots(o, a, slots)
        cache.slot_pos.scatter_(1, slots, torch.where(keep, pos, -1))
        cache.advance(pos, valid)
    return out, k_pos, k_valid


def no_mask(name, mask):
    if mask is not None:
        raise ValueError(f"layer '{name}' takes no mask=: only 'full' and 'mla' can read one (block diffusion's two streams)")


def itemsize(dtype):
    return torch.empty(0, dtype=dtype).element_size()

# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention

class Full(nn.Module):
    """Multi-head attention with the options of current models: each is off by default.

    n_kv_head < n_head: grouped queries (arXiv 2305.13245), 1 = multi-query. qk_norm: RMSNorm of queries and keys per
    head (Qwen3). attn_gate: the output times sigmoid(W x), per channel (arXiv 2505.06708, Qwen3-Next). window: sliding
    window, with a ring cache of that size. sink: a learned null logit per head (gpt-oss). rotary_fraction: share of the
    head's channels that are rotated (Qwen3-Next: 0.25).
    """
    def __init__(self, config):
        super().__init__()
        C, self.H = config.n_embd, config.n_head
        self.Hkv = config.n_kv_head or self.H
        if self.H % self.Hkv:
            raise ValueError(f"n_head {self.H} must be a multiple of n_kv_head {self.Hkv}")
        if config.head_dim is None and C % self.H:
            raise ValueError(f"n_embd {C} must be a multiple of n_head {self.H}, or give head_dim")
        self.D = config.head_dim or C // self.H
        if config.window is not None and config.window < 1:
            raise ValueError(f"window {config.window} must be at least 1: it counts the token itself")
        self.window = config.window
        self.rope_dim = int(self.D * config.rotary_fraction) if config.position == "rotary" else 0
        if self.rope_dim % 2:
            raise ValueError(f"head width {self.D} x rotary_fraction {config.rotary_fraction} rotates {self.rope_dim} "
                             "channels: it must be an even number")
        self.rope_base = config.rope_base
        self.qkv_proj = nn.Linear(C, (self.H + 2 * self.Hkv) * self.D, bias=config.bias)
        self.o_proj = nn.Linear(self.H * self.D, C, bias=config.bias)
        self.gate_proj = nn.Linear(C, self.H * self.D, bias=False) if config.attn_gate else None
        self.q_norm = nn.RMSNorm(self.D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.D, eps=config.norm_eps) if config.qk_norm else None
        self.sink = nn.Parameter(torch.zeros(self.H)) if config.sink else None

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        B, T, _ = x.shape
        if cache is not None:
            if mask is not None:
                raise ValueError("layer 'full' takes a mask= or a cache=, not both")
            fresh = cache.used == 0 and pos is None and valid is None and commit     # a prefill: no need to read the cache
            pos = cache.positions(T, pos)
        elif pos is None:
            pos = torch.arange(T, device=x.device)
        q, k, v = self.qkv_proj(x).split([self.H * self.D, self.Hkv * self.D, self.Hkv * self.D], dim=-1)
        q = q.view(B, T, self.H, self.D).transpose(1, 2)                               # (B, H, T, D)
        k = k.view(B, T, self.Hkv, self.D).transpose(1, 2)                             # (B, Hkv, T, D)
        v = v.view(B, T, self.Hkv, self.D).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope_dim:
            q = rotary(q, pos, self.rope_dim, self.rope_base)
            k = rotary(k, pos, self.rope_dim, self.rope_base)
        window = self.window
        if cache is not None:
            put = extend_ring if window is not None and window < cache.max_len else extend
            (k_all, v_all), k_pos, k_valid = put(cache, {"k": k, "v": v}, pos, valid, commit)
            if not fresh:
                k, v = k_all.to(q.dtype), v_all.to(q.dtype)
                mask = visible(pos, k_pos, causal, window, k_valid).unsqueeze(1)       # (B, 1, T, S)
        elif mask is not None and window is not None:
            mask = mask & visible(pos, pos, causal, window)                            # positions: streams may share them
        elif valid is not None and mask is None:
            t = torch.arange(T, device=x.device)
            mask = visible(t, t, causal, window, valid).unsqueeze(1)
        y = softmax_attention(q, k, v, causal, window, self.sink, mask=mask)
        y = y.transpose(1, 2).reshape(B, T, self.H * self.D)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y)

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        ring = self.window is not None and self.window < max_len
        S = self.window + 1 if ring else max_len
        kv = {name: torch.zeros(batch_size, self.Hkv, S, self.D, device=device, dtype=dtype) for name in "kv"}
        if ring:
            kv["slot_pos"] = torch.full((batch_size, S), -1, device=device)
        return Cache(batch_size, max_len, device, **kv)

    def cache_bytes(self, T, dtype):
        return 2 * self.Hkv * self.D * min(T, self.window or T) * itemsize(dtype)

    def reads(self, T, causal=True):
        return T if self.window is None else min(T, self.window if causal else 2 * self.window - 1)

    def flops(self, T, causal=True):
        return 4 * self.H * self.D * count_visible(T, causal, self.window)             # scores and values, 2 each


ATTENTION = {"full": Full}
