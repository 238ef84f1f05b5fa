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
    pos     (T,) or (B, T) positions; default cache.pos + arange(T). With a cache `mla` and `full` without a window
            write to the slots named by pos, so that a block in the middle of a canvas can be computed anew
    valid   (B, T) bool, False = padding on the right: hidden from every other token
    mask    (T, S) bool, True = visible, instead of causal/bidirectional: `full` and `mla` only, without a cache
    aux     dict to which a layer adds named scalars, such as a loss of its own
and layer.cache_bytes(T, dtype), layer.reads(T, causal), layer.flops(T, causal): what one sequence of length T costs
in the mixer itself, projections not counted (flops: one forward pass).

B batch, T tokens, C = n_embd, H heads, G = n_head // n_kv_head, D head width. This file imports nothing of ours.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------------------------------------------------------------
# Settings

@dataclass
class LayerConfig:
    """Every setting that a layer reads, with its default. Which ones: `ATTENTION[name].settings`."""
    n_embd: int = 128               # C
    n_head: int = 4
    bias: bool = False              # in the linear maps
    norm_eps: float = 1e-6
    # positions
    position: str = "rotary"        # rotary | learned (by the model) | none
    rope_base: float = 10_000.0
    rotary_fraction: float = 1.0    # share of each head's channels that is rotated
    # layer `full`
    n_kv_head: int | None = None    # None: n_head
    head_dim: int | None = None     # None: n_embd // n_head
    qk_norm: bool = False
    attn_gate: bool = False
    window: int | None = None       # sliding window, the token itself counted
    sink: bool = False
    # layers `linear`, `deltanet`, `gated_deltanet`, `kda`: None takes n_head, n_head, n_embd / heads, the key width
    linear_n_head: int | None = None    # query and key heads
    linear_n_v_head: int | None = None  # value heads, a multiple: each q, k head serves several
    linear_key_dim: int | None = None
    linear_value_dim: int | None = None
    linear_decay: str | None = None     # linear: None | fixed (RetNet) | head (Mamba-2) | channel (GLA)
    decay_gate: str = "auto"            # softplus | lower (a lower bound g_min); auto: the published one
    g_min: float = -5.0
    neg_eigval: bool = False            # beta in (0, 2): a write may flip what the state held (OLMo-Hybrid)
    conv_size: int = 4                  # short convolution before q, k and v
    out_gate: str | None = "auto"       # None | silu | sigmoid
    out_gate_rank: int | None = None    # 0: full rank; None: the published one
    bidir: str = "sum"                  # bidirectional: sum of both scans | forward | backward
    # layers `mla` and `dsa`: None takes DeepSeek-V3's ratio to the head width D
    q_lora_rank: int | None = None      # None: full-rank queries
    kv_lora_rank: int | None = None     # None: 4 D
    qk_nope_head_dim: int | None = None     # None: D
    qk_rope_head_dim: int | None = None     # None: D / 2
    v_head_dim: int | None = None       # None: D
    # sparse layers: None takes the published number, which the layer's docstring names
    sel_block: int | None = None    # keys per block (nsa, infllm, msa)
    sel_topk: int | None = None     # blocks read by a query, the forced ones among them (dsa: tokens)
    sel_init: int | None = None     # forced: the first blocks
    sel_local: int | None = None    # forced: the blocks up to the query's own
    sel_tile: int | None = None     # neighbouring queries that share their picks when not causal; None: sel_block
    cmp_block: int = 32             # nsa, infllm: tokens in a compression window
    cmp_stride: int = 16            # and between two windows
    dense_len: int = 8192           # infllm: a query that sees no more tokens reads all of them
    sel_per_head: bool = False      # infllm: each head picks for itself (MoBA)
    index_n_head: int | None = None     # dsa: None: n_head / 2
    index_head_dim: int | None = None   # dsa, msa: None: the head width


CHOICES = dict(position=("rotary", "learned", "none"), linear_decay=(None, "fixed", "head", "channel"),
               decay_gate=("auto", "softplus", "lower"), out_gate=("auto", None, "silu", "sigmoid"),
               bidir=("sum", "forward", "backward"))


def check_choices(values):
    for field, choices in CHOICES.items():
        if not {values.get(field, choices[0]), str(values.get(field)).lower()} & set(choices):      # position=none: None
            raise ValueError(f"{field}={values[field]} is no choice: one of {', '.join(map(str, choices)).lower()}")


def check_settings(name, values):
    """Refuse settings {field: value} that layer `name` does not read, and values that a field does not know.

    Fields of no layer are not looked at, and a layer class without `settings` may read all.
    """
    read = getattr(ATTENTION[name], "settings", LayerConfig.__dataclass_fields__)
    for field, value in values.items():
        if field in LayerConfig.__dataclass_fields__ and field not in read:
            raise ValueError(f"layer '{name}' does not read {field}: {field}={value} would change nothing. It reads {', '.join(read)}")
    check_choices(values)


# ---------------------------------------------------------------------------------------------------------------------
# Shared helpers

class Cache:
    """What a layer (or a whole model) remembers: tensors of fixed shape, so that a compiled decode step never recompiles.

    pos (B,) int64 counts the valid tokens of each row. used is an upper bound of pos.max() known on the host: asking
    the device for it would stall every step. dense: the host also knows that every row holds `used` of them (it is False for
    good after a call with valid, or with pos into a cache that is not full). A compiled step cannot count on the host: it
    leaves the bound max_len and dense False.
    """
    def __init__(self, batch_size, max_len, device=None, **state):
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_len, self.used, self.dense = max_len, 0, True
        self.__dict__.update(state)

    def positions(self, T, pos=None, valid=None):
        """(B, T) positions of the next T tokens, or pos itself brought to that shape.

        With valid, rows that are full may take part in a step of one token, as padding: their position is max_len.
        """
        eager = not torch.compiler.is_compiling()
        if pos is None:
            if eager and self.used + T > self.max_len:
                self.used = int(self.pos.max())                                        # the bound had padding in it
                taken = self.used if valid is None or T > 1 else int(self.pos.masked_fill(~valid[:, 0], 0).max())
                if taken + T > self.max_len:
                    raise ValueError(f"the cache holds {self.max_len} tokens and {taken} are taken: {T} more do not "
                                     f"fit, make it with init_cache(max_len >= {taken + T})")
            pos = self.pos[:, None] + torch.arange(T, device=self.pos.device)
        elif eager and pos.device.type == "cpu" and T and int(pos.max()) >= self.max_len:      # elsewhere it would be a wait
            raise ValueError(f"pos {int(pos.max())} lies outside the cache of max_len {self.max_len}: the last position is {self.max_len - 1}")
        return pos.expand(self.pos.size(0), -1)

    def needs_mask(self, T, causal, pos, valid, commit):
        """Of the next T tokens: is there a slot in use that one of them must not read? Call it with the caller's pos, before
        they are put. True also where the host cannot know."""
        if torch.compiler.is_compiling():
            return True
        dense = self.dense and valid is None and (pos is None or self.used == self.max_len)
        if commit:
            self.dense = dense
        return not dense or causal and (T > 1 or pos is not None)

    def advance(self, pos, valid=None):
        """Count the tokens at pos (B, T) as seen; the invalid ones among them do not count."""
        end = pos + 1 if valid is None else torch.where(valid, pos + 1, 0)
        self.pos.copy_(torch.maximum(self.pos, end.amax(dim=1)))
        if torch.compiler.is_compiling():
            self.used, self.dense = self.max_len, False
        else:
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


SAFE_UNDER_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def softmax_attention(q, k, v, causal=True, window=None, sink=None, scale=None, mask=None):
    """Softmax attention. q (B, H, T, D); k, v (B, H_kv, S, D): grouped-query attention when H_kv < H -> (B, H, T, Dv).

    With S > T the queries are the last T of the S positions. mask: bool, broadcastable to (B, H, T, S), True = visible,
    in place of causal and window. sink (H,): a learned logit per head that takes part in the softmax and reads nothing,
    so that a head can attend to no token (gpt-oss). scale defaults to D ** -0.5.
    """
    T, S = q.size(-2), k.size(-2)
    if window is not None and mask is None and sink is None and flex_pays(q, v) and T == S > 2 * max(window, 128):
        return flex_window_attention(q, k, v, causal, window, scale)
    if window is not None and mask is None and S > 2 * max(window, 128):
        # A stretch of queries at a time against the keys around it: O(T window), and never a (T, S) mask.
        t, step, y = torch.arange(S, device=q.device), max(window, 128), []
        for i in range(S - T, S, step):
            j = min(i + step, S)
            keys = slice(max(0, i - window + 1), j if causal else min(S, j + window - 1))
            y.append(softmax_attention(q[:, :, i - S + T:j - S + T], k[:, :, keys], v[:, :, keys], sink=sink, scale=scale,
                                       mask=visible(t[i:j], t[keys], causal, window)))
        return torch.cat(y, dim=2)
    Dv = v.size(-1)
    if Dv < q.size(-1) and T > 16:
        v = F.pad(v, (0, q.size(-1) - Dv))                                             # MLA: the fast kernels want one width
    if mask is None and (window is not None and window < S or sink is not None or (causal and 1 < T < S)):
        t = torch.arange(S, device=q.device)
        mask = visible(t[S - T:], t, causal, window)
    if sink is None and q.size(1) != k.size(1) and (T == 1 or T < q.size(-1) and (mask is not None or not causal)):
        # A few queries: for enable_gqa SDPA may copy all keys once per query head. As rows of one head they share them.
        if mask is not None:
            mask = mask.expand(q.size(0), q.size(1), T, S).unflatten(1, (k.size(1), -1)).flatten(2, 3)
        y = softmax_attention(q.unflatten(1, (k.size(1), -1)).flatten(2, 3), k, v, causal=False, scale=scale, mask=mask)
        return y[..., :Dv].unflatten(2, (-1, T)).flatten(1, 2)                         # from (B, H_kv, G T, Dv)
    if sink is None:
        # cuDNN's kernel in torch 2.13 can return NaN gradients under a mask (huggingface/trl #7181)
        with sdpa_kernel(SAFE_UNDER_MASK) if mask is not None and q.is_cuda else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None and T > 1,
                                                  scale=scale, enable_gqa=q.size(1) != k.size(1))[..., :Dv]
    # SDPA has no sink and does not return its normaliser, so this is the definition, with its (T, S) scores in memory.
    k, v = (a.repeat_interleave(q.size(1) // a.size(1), dim=1) for a in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) # (B, H, T, S)
    scores = (scores * (scale or q.size(-1) ** -0.5)).masked_fill(~mask, -math.inf)
    null = sink.to(scores.dtype).view(1, -1, 1, 1).expand(q.size(0), -1, T, 1)
    return torch.cat([scores, null], dim=-1).softmax(dim=-1)[..., :-1].to(v.dtype) @ v[..., :Dv]


def flex_pays(q, v):
    """On CUDA, for the head widths that its kernel takes. It is compiled anew for every shape, some seconds each, and beyond
    eight shapes torch gives up and runs it with all scores in memory: outside of a compiled graph for long inputs only."""
    return q.is_cuda and q.size(-2) >= (128 if torch.compiler.is_compiling() else 1024) and min(q.size(-1), v.size(-1)) >= 16


def in_memory(a):
    """a, put into memory by as_strided where a graph is compiled. Inductor fails for CUDA on a FlexAttention mask that it would
    have to compute on the fly: results of pointwise operations in mask_mod (torch 2.11), numbers of tiles by arange (2.13).
    For the CPU it is the other way round: there it fails on such a view."""
    a = a.contiguous()
    return a.as_strided(a.shape, a.stride()) if a.is_cuda else a


def flex_window_attention(q, k, v, causal, window, scale):
    """A sliding window by FlexAttention: only the tiles of 128 x 128 that the band touches. T = S; mask_mod makes it exact."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    T = q.size(2)
    tile = in_memory(torch.arange(-(-T // 128), device=q.device))
    first = (tile * 128 - window + 1).clamp(min=0) // 128
    last = tile if causal else ((tile * 128 + 126 + window) // 128).clamp(max=len(tile) - 1)
    index = (first[:, None] + tile) % len(tile)                                        # all columns: flex transposes it

    def mask_mod(b, h, t, s):
        return (t - s < window) & ((t >= s) if causal else (s - t < window))
    mask = BlockMask.from_kv_blocks((last - first + 1)[None, None].int(), index[None, None].int(), BLOCK_SIZE=128, mask_mod=mask_mod,
                                    seq_lengths=(T, T))
    flex = compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


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


def hide_padding(mask, valid, causal, window=None):
    """A layer's mask without a cache: the given one or causal and window, less the keys that are not valid (B, T)."""
    if valid is None:
        return mask
    t = torch.arange(valid.size(1), device=valid.device)
    if mask is None:
        return visible(t, t, causal, window, valid).unsqueeze(1)                       # (B, 1, T, T)
    return mask & visible(t, t, False, None, valid).unsqueeze(1)


def no_mask(name, mask):
    if mask is not None:
        raise ValueError(f"layer '{name}' takes no mask=: only 'full' and 'mla' can read one (block diffusion's two streams)")


def itemsize(dtype):
    return torch.empty(0, dtype=dtype).element_size()


def no_autocast(x):
    """Inside, autocast is off on x's device: what must be float32 stays float32. (The meta device has no autocast.)"""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)

# ---------------------------------------------------------------------------------------------------------------------
# Softmax attention

def at_least(name, value, low=1):
    if value < low:
        raise ValueError(f"{name} {value} must be at least {low}")


def head_width(config):
    at_least("n_head", config.n_head)
    if config.head_dim is None and config.n_embd % config.n_head:
        raise ValueError(f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}, or give head_dim")
    D = config.n_embd // config.n_head if config.head_dim is None else config.head_dim
    at_least("head_dim", D)
    return D


class Full(nn.Module):
    """Multi-head attention with the options of current models: each is off by default.

    n_kv_head < n_head: grouped queries (arXiv 2305.13245), 1 = multi-query. qk_norm: RMSNorm of queries and keys per
    head (Qwen3). attn_gate: the output times sigmoid(W x), per channel (arXiv 2505.06708, Qwen3-Next). window: sliding
    window, with a ring cache of that size. sink: a learned null logit per head (gpt-oss). rotary_fraction: share of the
    head's channels that are rotated (Qwen3-Next: 0.25).
    """
    family = "softmax"
    settings = ("n_embd", "n_head", "n_kv_head", "head_dim", "bias", "norm_eps", "position", "rope_base", "rotary_fraction",
                "qk_norm", "attn_gate", "window", "sink")

    def __init__(self, config):
        super().__init__()
        check_choices({field: getattr(config, field) for field in self.settings})
        C, self.H = config.n_embd, config.n_head
        self.Hkv = self.H if config.n_kv_head is None else config.n_kv_head
        if self.Hkv < 1 or self.H % self.Hkv:
            raise ValueError(f"n_head {self.H} must be a multiple of n_kv_head {self.Hkv}, which is at least 1")
        self.D = head_width(config)
        self.window = config.window if "window" in self.settings else None
        if self.window is not None and self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1: it counts the token itself")
        if not 0 <= config.rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction {config.rotary_fraction} must lie between 0 and 1")
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
        self.sink = nn.Parameter(torch.zeros(self.H)) if "sink" in self.settings and config.sink else None

    def project(self, x, pos):
        """(B, T, C) -> q (B, H, T, D), k and v (B, Hkv, T, D), normalised and rotated."""
        B, T, _ = x.shape
        q, k, v = self.qkv_proj(x).split([self.H * self.D, self.Hkv * self.D, self.Hkv * self.D], dim=-1)
        q = q.view(B, T, self.H, self.D).transpose(1, 2)                               # (B, H, T, D)
        k = k.view(B, T, self.Hkv, self.D).transpose(1, 2)                             # (B, Hkv, T, D)
        v = v.view(B, T, self.Hkv, self.D).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope_dim:
            q = rotary(q, pos, self.rope_dim, self.rope_base)
            k = rotary(k, pos, self.rope_dim, self.rope_base)
        return q, k, v

    def output(self, y, x):
        """What the heads read, (B, H, T, D) -> (B, T, C); the gate looks at x, the layer's input."""
        y = y.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y)

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        B, T, _ = x.shape
        if cache is not None:
            if mask is not None:
                raise ValueError("layer 'full' takes a mask= or a cache=, not both")
            # a prefill has no need to read the cache; a compiled step cannot know: `used` is only counted outside of graphs
            fresh = not torch.compiler.is_compiling() and cache.used == 0 and pos is None and valid is None and commit
            masked = cache.needs_mask(T, causal, pos, valid, commit) or self.window is not None
            pos = cache.positions(T, pos)
        elif pos is None:
            pos = torch.arange(T, device=x.device)
        q, k, v = self.project(x, pos)
        window = self.window
        if cache is not None:
            put = extend_ring if window is not None and window < cache.max_len else extend
            (k_all, v_all), k_pos, k_valid = put(cache, {"k": k, "v": v}, pos, valid, commit)
            if not fresh:
                k, v = k_all.to(q.dtype), v_all.to(q.dtype)
                if masked:
                    mask = visible(pos, k_pos, causal, window, k_valid).unsqueeze(1)   # (B, 1, T, S)
        else:
            if mask is not None and window is not None:                                # positions: streams may share them
                mask = mask & visible(pos.expand(B, T), pos.expand(B, T), False, window).unsqueeze(1)
            mask = hide_padding(mask, valid, causal, window)
        y = softmax_attention(q, k, v, causal, window, self.sink, mask=mask)
        return self.output(y, x)

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

# ---------------------------------------------------------------------------------------------------------------------
# Low-rank softmax attention

def cache_for(batch_size, max_len, device, dtype, shapes):
    """Cache with a zero buffer (B, h, slots, width) for each name: (h, slots, width)."""
    return Cache(batch_size, max_len, device, **{name: torch.zeros(batch_size, *shape, device=device, dtype=dtype)
                                                 for name, shape in shapes.items()})


class MLA(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one latent and one rotated key a token.

    c = RMSNorm(W_kv_a x) is kv_lora_rank wide; keys and values of all heads are linear in c. A rotation between W_k_b
    and the query would break that, so positions live in qk_rope_head_dim channels more, their key shared by all heads.
    Two forms, equal up to rounding: naive expands c to keys and values (training); absorbed moves W_k_b into the query
    and W_v_b behind the softmax and attends to c itself, one K/V head (decoding).
    Widths left None take DeepSeek-V3's ratios to the head width D: kv_lora_rank 4 D, qk_nope_head_dim D,
    qk_rope_head_dim D / 2, v_head_dim D. q_lora_rank None: full-rank queries (V2-Lite; V3 has 12 D).
    """
    family = "softmax"
    settings = ("n_embd", "n_head", "head_dim", "bias", "norm_eps", "position", "rope_base", "q_lora_rank", "kv_lora_rank",
                "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

    def __init__(self, config):
        super().__init__()
        check_choices({field: getattr(config, field) for field in self.settings})
        C, self.H = config.n_embd, config.n_head
        given = all(getattr(config, n) is not None for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        D = 0 if given else head_width(config)
        width = dict(kv_lora_rank=4 * D, qk_nope_head_dim=D, qk_rope_head_dim=D // 4 * 2, v_head_dim=D, q_lora_rank=C)
        for name, default in width.items():
            width[name] = default if getattr(config, name) is None else getattr(config, name)
            at_least(name, width[name], 0 if name == "qk_rope_head_dim" else 1)
        self.R, self.nope, self.rope, self.Dv, q_width = width.values()
        if self.rope % 2:
            raise ValueError(f"qk_rope_head_dim {self.rope} must be even: channels are rotated in pairs")
        self.rope_base = config.rope_base if config.position == "rotary" and self.rope else None
        self.scale = (self.nope + self.rope) ** -0.5
        low_rank = config.q_lora_rank is not None
        self.q_a_proj = nn.Linear(C, q_width, bias=config.bias) if low_rank else None
        self.q_a_norm = nn.RMSNorm(q_width, eps=config.norm_eps) if low_rank else None
        self.q_b_proj = nn.Linear(q_width, self.H * (self.nope + self.rope), bias=False)
        self.kv_a_proj = nn.Linear(C, self.R + self.rope, bias=config.bias)
        self.kv_a_norm = nn.RMSNorm(self.R, eps=config.norm_eps)
        self.kv_b_proj = nn.Linear(self.R, self.H * (self.nope + self.Dv), bias=False)
        self.o_proj = nn.Linear(self.H * self.Dv, C, bias=config.bias)

    def project(self, x, pos):
        """(B, T, C) -> q (B, H, T, nope + rope), latent (B, 1, T, R + rope) and q's source (B, T, q_lora_rank or C)."""
        source = x
        if self.q_a_proj is not None:
            source = self.q_a_proj(x)
            source = self.q_a_norm(source).to(source.dtype)
        q = self.q_b_proj(source).unflatten(-1, (self.H, -1)).transpose(1, 2)
        q, q_rope = q.split([self.nope, self.rope], dim=-1)
        c, k_rope = self.kv_a_proj(x).unsqueeze(1).split([self.R, self.rope], dim=-1)
        if self.rope_base:
            q_rope, k_rope = (rotary(a, pos, None, self.rope_base, interleaved=True) for a in (q_rope, k_rope))
        return torch.cat([q, q_rope], dim=-1), torch.cat([self.kv_a_norm(c).to(c.dtype), k_rope], dim=-1), source

    def attend(self, q, latent, attention, absorbed=None):
        """Run attention(q, k, v, scale=) in one of the two forms over latents (B, 1, S, R + rope) -> (B, H, T, Dv).

        absorbed None: the cheaper one. Naive pays R (nope + Dv) once per key, absorbed wider scores and values per pair.
        """
        if absorbed is None:
            absorbed = q.size(2) * (2 * self.R - self.nope - self.Dv) < self.R * (self.nope + self.Dv)
        w = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (self.H, -1))
        w_k, w_v = w.split([self.nope, self.Dv], dim=1)                                # (H, nope, R), (H, Dv, R)
        c, k_rope = latent.split([self.R, self.rope], dim=-1)
        if absorbed:
            q, q_rope = q.split([self.nope, self.rope], dim=-1)
            # the values are the whole latents, cut afterwards: SDPA is fast where keys and values have one width
            y = attention(torch.cat([q @ w_k, q_rope], dim=-1), latent, latent, scale=self.scale)  # (B, H, T, R + rope)
            return y[..., :self.R] @ w_v.transpose(1, 2)
        k = torch.cat([c @ w_k.transpose(1, 2), k_rope.expand(-1, self.H, -1, -1)], dim=-1)
        return attention(q, k, c @ w_v.transpose(1, 2), scale=self.scale)

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        T = x.size(1)
        if cache is not None and mask is not None:
            raise ValueError("layer 'mla' takes a mask= or a cache=, not both")
        if cache is not None:
            masked = cache.needs_mask(T, causal, pos, valid, commit)
            pos = cache.positions(T, pos)
        elif pos is None:
            pos = torch.arange(T, device=x.device)
        q, latent, _ = self.project(x, pos)
        if cache is not None:
            (latent,), k_pos, k_valid = extend(cache, {"latent": latent}, pos, valid, commit)
            latent = latent.to(q.dtype)
            if masked:
                mask = visible(pos, k_pos, causal, None, k_valid).unsqueeze(1)         # (B, 1, T, S)
        else:
            mask = hide_padding(mask, valid, causal)
        y = self.attend(q, latent, functools.partial(softmax_attention, causal=causal, mask=mask),
                        absorbed=False if cache is None else None)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def state(self, T):
        return dict(latent=(1, T, self.R + self.rope))

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        return cache_for(batch_size, max_len, device, dtype, self.state(max_len))

    def cache_bytes(self, T, dtype):
        return sum(math.prod(shape) for shape in self.state(T).values()) * itemsize(dtype)

    def reads(self, T, causal=True):
        return T

    def flops(self, T, causal=True):
        return 2 * self.H * (self.nope + self.rope + self.Dv) * count_visible(T, causal)       # naive form

# ---------------------------------------------------------------------------------------------------------------------
# Sparse softmax attention: a cheap score chooses the blocks of keys that a query reads, the rest is softmax attention
#
# Tokens sit in slots 0, 1, 2, ... and what query t may read is always a prefix of them, slots < limit[t]: limit is t + 1
# when causal, the number of valid tokens otherwise, with a cache as without. `sel` (B, H_kv, T, NB) bool says which
# blocks a query reads; all heads of a group choose together (NSA: each key is then loaded once per group). With tile > 1
# so do neighbouring queries, sel (B, H_kv, ceil(T / tile), NB): the keys of a tile become one dense matrix. Such a pick
# has looked at every query of the tile, so the layers share picks only where nothing is causal.

def row_slices(T, step=1024, cuda=False):
    """Slices of the queries: what takes (T, S) memory runs `step` queries at a time; more on a GPU, where a compiled graph
    holds every slice."""
    step = 4 * step if cuda else step
    return [slice(i, min(i + step, T)) for i in range(0, T, step)]


def block_sparse_attention(q, k, v, sel, block_size, causal=True, tile=1, limit=None, most=None, scale=None, path=None):
    """Softmax attention over chosen blocks of keys. q (B, H, T, D); k, v (B, H_kv, S, D) -> (B, H, T, Dv).

    sel (B, H_kv, ceil(T / tile), ceil(S / block_size)) bool; a query with nothing to read gives 0. limit (1 or B, T):
    query t reads slots < limit[t]; default from causal, the queries being the last T of S. most: a bound on the picks of
    a row, which torch.compile cannot count. path, all three exact and equal up to rounding:
        "dense"   a (T, S) mask: the definition, any device
        "gather"  copies the picked blocks of each tile side by side: shared picks, and decoding
        "flex"    FlexAttention, CUDA: skips the blocks that no query of a tile picked
    None: flex on CUDA where flex_pays, gather if it reads at most half of S and not once per query, else dense.
    """
    (B, H, T, _), (Hkv, S) = q.shape, k.shape[1:3]
    shape = (B, Hkv, -(-T // tile), -(-S // block_size))
    if sel.shape != shape:
        raise ValueError(f"sel has shape {tuple(sel.shape)}, expected (B, H_kv, ceil(T / tile), ceil(S / block_size)), "
                         f"which is {shape}")
    if limit is None:
        t = torch.arange(T, device=q.device)[None]
        limit = t + 1 + S - T if causal else torch.full_like(t, S)
    if path not in (None, "dense", "gather", "flex"):
        raise ValueError(f"path '{path}' is unknown: dense, gather, flex or None")
    tiles = 128 % (H // Hkv) == 0 and 0 in (block_size % 128, 128 % block_size)        # of 128 x 128, in whole tokens and blocks
    if path == "flex" and not tiles:
        raise ValueError(f"path 'flex' needs H / H_kv = {H // Hkv} to divide 128, and block_size {block_size} to divide "
                         "128 or be a multiple of it: use dense or gather")
    if path is None and flex_pays(q, v) and tiles and q.size(-1) <= 256:
        path = "flex"                                                                  # wider heads (absorbed MLA) do not fit
    if path == "gather" or path is None and (tile >= 16 or T <= 16):
        if not torch.compiler.is_compiling() and (most is None or q.device.type == "cpu"):    # elsewhere the count is a wait
            most = max(int(sel.sum(-1).amax()), 1)
        most = sel.size(-1) if most is None else most
        if path == "gather" or 2 * most * block_size <= S:
            return gather_attention(q, k, v, sel, block_size, tile, limit, most, scale)
    if tile > 1:
        sel = sel.repeat_interleave(tile, dim=2)[:, :, :T]
    if path == "flex":
        return flex_block_attention(q, k, v, sel, block_size, limit, scale)
    q = q.unflatten(1, (Hkv, -1)).flatten(0, 1)                                        # groups as rows: one mask each
    k, v = (a.flatten(0, 1).unsqueeze(1) for a in (k, v))                              # (B Hkv, 1, S, D)
    y, slots = [], torch.arange(S, device=q.device)
    for rows in row_slices(T, cuda=q.is_cuda):
        mask = sel[:, :, rows].repeat_interleave(block_size, dim=3)[..., :S] & (slots < limit[:, None, rows, None])
        y.append(softmax_attention(q[:, :, rows], k, v, mask=mask.flatten(0, 1).unsqueeze(1), scale=scale))
    return torch.cat(y, dim=2).unflatten(0, (B, Hkv)).flatten(1, 2)


def pad_slots(a, n):
    """(B, h, S, D) -> (B, h, n, D), zeros at the end; a itself when S = n, where F.pad would copy a whole cache."""
    return a if a.size(2) == n else F.pad(a, (0, 0, 0, n - a.size(2)))


def gather_attention(q, k, v, sel, block, tile, limit, n, scale):
    """The gather path; no row of sel picks more than n blocks."""
    (B, _, T, _), Hkv, nt = q.shape, k.size(1), sel.size(2)
    index, picked = top_k(torch.zeros(sel.shape, device=q.device).masked_fill(~sel, -math.inf), n)     # in ascending order
    index, picked, n = index.flatten(0, 2), picked.flatten(0, 2), index.size(-1)       # (R, n) with rows R = B Hkv nt
    q = pad_slots(q, nt * tile).unflatten(2, (nt, tile)).unflatten(1, (Hkv, -1))
    q = q.transpose(2, 3).flatten(0, 2)                                                # (R, G, tile, D)
    limit = F.pad(limit, (0, nt * tile - T)).view(-1, 1, nt, tile).expand(B, Hkv, -1, -1).flatten(0, 2)        # (R, tile)
    k, v = (pad_slots(a, sel.size(3) * block).unflatten(2, (-1, block)) for a in (k, v))       # (B, Hkv, NB, block, D)
    inside = torch.arange(max(block, tile), device=q.device)

    def attend(r, mask):
        at = (r // (nt * Hkv))[:, None], (r // nt % Hkv)[:, None], index[r]
        kr, vr = (a[at].flatten(1, 2).unsqueeze(1) for a in (k, v))                    # (r, 1, n block, D)
        if mask is None:
            slot = (index[r][..., None] * block + inside[:block]).flatten(1)           # (r, n block)
            mask = picked[r].repeat_interleave(block, dim=1)[:, None] & (slot[:, None] < limit[r][..., None])
            mask = mask.unsqueeze(1)                                                   # (r, 1, tile, n block)
        return softmax_attention(q[r], kr, vr, causal=False, mask=None if mask is False else mask, scale=scale)

    r = torch.arange(len(index), device=q.device)
    if len(r) <= 64 or torch.compiler.is_compiling() or q.device.type != "cpu":
        y = attend(r, None)
    else:
        # A mask for every row costs as much as its attention. Most rows need none (all they picked is visible) or all the
        # same one (their last pick is the diagonal block). 64 rows at a time, since their keys fit into a CPU's cache. On a
        # GPU none of it pays: sorting rows by kind waits for the device.
        last = index[:, -1:] * block
        free = picked.all(1) & (last[:, 0] + block <= limit.amin(1))
        diagonal = ~free & picked.all(1) & (limit == last + 1 + inside[:tile]).all(1) & (tile <= block)
        triangle = torch.ones(tile, n * block, dtype=torch.bool, device=q.device).tril((n - 1) * block)
        parts = [(rows, mask) for kind, mask in ((free, False), (diagonal, triangle), (~free & ~diagonal, None))
                 for rows in r[kind].split(64) if len(rows)]
        y = torch.cat([attend(*part) for part in parts])[torch.cat([rows for rows, _ in parts]).argsort()]
    y = y.unflatten(0, (B, Hkv, nt)).transpose(2, 3)                                   # (B, Hkv, G, nt, tile, Dv)
    return y.flatten(3, 4).flatten(1, 2)[:, :, :T]


@functools.lru_cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention, dynamic=False)            # torch 2.13 generates broken code for symbolic shapes


def flex_block_attention(q, k, v, sel, block, limit, scale):
    """The flex path. The G heads of a group are folded into the rows, row = t G + g: a tile of 128 rows is 128 / G tokens,
    neighbours whose picks overlap, and loads each key once per group, as NSA's own kernel does.

    Tiles are 128 x 128 at least: without max_autotune the backward kernel takes no smaller ones. mask_mod keeps the choice
    exact per token. Never create_block_mask here: on a mask that depends on data it evaluates all T x S.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    (B, H, T, _), (Hkv, S), wide = q.shape, k.shape[1:3], max(block, 128)
    G = H // Hkv
    q = q.unflatten(1, (Hkv, G)).transpose(2, 3).flatten(2, 3)                         # (B, Hkv, T G, D)
    sel, limit = in_memory(sel), in_memory(limit.expand(B, T))
    tiles = F.pad(sel, (0, -sel.size(3) % (wide // block), 0, -T % (128 // G)))
    tiles = tiles.unflatten(3, (-1, wide // block)).any(4).unflatten(2, (-1, 128 // G)).any(3)  # (B, Hkv, rows, columns)
    index = tiles.int().sort(dim=-1, descending=True, stable=True).indices.int()       # all columns: flex transposes it

    # CPU inductor 2.13 gives wrong results, silently, when mask_mod reads the direct output of a scatter in the same
    # graph: select_blocks ends in pointwise operations.
    def mask_mod(b, h, r, s):
        return sel[b, h, r // G, s // block] & (s < limit[b, r // G])
    mask = BlockMask.from_kv_blocks(tiles.sum(-1, dtype=torch.int32), index, BLOCK_SIZE=(128, wide), mask_mod=mask_mod,
                                    seq_lengths=(T * G, S))
    # on the CPU, or inside a graph that is being compiled, flex_attention itself; the CPU has its forward pass only
    flex = compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    y = flex(q, k, v, block_mask=mask, scale=scale)
    return y.unflatten(2, (T, G)).transpose(2, 3).flatten(1, 2)


@torch.no_grad()
def select_blocks(score, slots, limit, n_blocks, block, topk, init=0, local=1, tile=1, dense_len=0):
    """Which blocks each query reads -> sel (b, h, ceil(T / tile), n_blocks) bool.

    score(rows) -> (b, h, t, n_blocks) for a slice of the queries, some at a time: the scores of 64k tokens fit in memory.
    slots, limit (b, T): where a query sits and how many slots it may read. Forced are the first `init` blocks, the
    `local` ones up to the query's own (and as many behind it, if it sees them), and all when limit <= dense_len; they
    count among the topk. The queries of a tile add up their scores, and force what any of them forces.
    """
    sel, j = [], torch.arange(n_blocks, device=slots.device)
    for rows in row_slices(slots.size(1), max(1024 // tile, 1) * tile, slots.is_cuda):
        s, at, lim = score(rows), slots[:, rows], limit[:, rows]
        first = last = own = torch.minimum(at, lim - 1) // block
        if tile > 1:
            t = at.size(1)
            s = F.pad(s.masked_fill((at >= lim)[:, None, :, None], 0), (0, 0, 0, -t % tile))     # padding has no say
            s = s.unflatten(2, (-1, tile)).sum(dim=3)
            fill = torch.arange(t + -t % tile, device=at.device).clamp(max=t - 1)
            own, lim = (a[:, fill].unflatten(1, (-1, tile)) for a in (own, lim))       # (b, nt, tile)
            first, last, lim = own.amin(2), own.amax(2), lim.amax(2)
        first, last, lim = (a[:, None, :, None] for a in (first, last, lim))           # (b, 1, nt, 1)
        seen = j * block < lim
        forced = (j < init) | ((j > first - local) & (j < last + local)) | (lim <= dense_len)
        index, picked = top_k(s.masked_fill(forced, math.inf).masked_fill(~seen, -math.inf), topk)
        sel.append((torch.zeros_like(s, dtype=torch.bool).scatter(-1, index, picked) | forced) & seen)
    return torch.cat(sel, dim=2)


def windows(k, i, size, stride):
    """(B, h, S, D) -> (B, h, m, size, D): windows i (B, m); window i covers slots [i stride, i stride + size)."""
    at = (i[:, :, None] * stride + torch.arange(size, device=k.device)).clamp(0, k.size(2) - 1).flatten(1)
    return k.gather(2, at[:, None, :, None].expand(-1, k.size(1), -1, k.size(3))).unflatten(2, (-1, size))


def compressed_scores(q, ck, limit, S, block, size, stride, pool):
    """Block scores from attention to compressed keys: q (B, H, T, D), ck (B, h, NC, D) -> (B, h, T, ceil(S / block)).

    Softmax over the complete windows, added up over the heads of a group, then pooled to blocks. pool "sum" (NSA, arXiv
    2502.11089 eq. 9-10): a window counts by how many strides of it lie in the block, 1 2 2 2 1 for 32/16/64. pool "max"
    (InfLLM-V2, arXiv 2509.24663): the best of the windows that touch the block.
    """
    s = (q.unflatten(1, (ck.size(1), -1)) @ ck.unsqueeze(2).transpose(-1, -2)).float() * q.size(-1) ** -0.5
    hidden = (torch.arange(ck.size(2), device=q.device) * stride + size > limit[..., None])[:, None, None]
    p = s.masked_fill(hidden, -math.inf).softmax(dim=-1).masked_fill(hidden, 0).sum(dim=2)     # (B, h, T, NC); no key: 0
    a, b, n = size // stride, block // stride, -(-S // block)      # windows j b - a + 1 ... j b + b - 1 touch block j
    p = F.pad(p, (a - 1, max(n * b - p.size(-1), 0))).unfold(-1, a + b - 1, b)[..., :n, :]     # (B, h, T, n, a + b - 1)
    if pool == "max":
        return p.amax(dim=-1)
    o = torch.arange(1 - a, b, device=q.device)                                        # overlap of [o, o + a) and [0, b)
    return p @ ((o + a).clamp(max=b) - o.clamp(min=0)).to(p.dtype)


def index_block_scores(q, k, limit, block):
    """MSA (arXiv 2606.13392): a block's best raw score. q (B, h, T, D), k (B, 1, S, D) -> (B, h, T, ceil(S / block))."""
    s = (q @ k.transpose(-1, -2)).float()
    s = s.masked_fill(torch.arange(k.size(2), device=q.device) >= limit[:, None, :, None], -math.inf)
    return F.pad(s, (0, -s.size(-1) % block), value=-math.inf).unflatten(-1, (-1, block)).amax(dim=-1)


def lightning_scores(q, k, w):
    """DSA's indexer: sum_h w_h relu(q_h . k / sqrt(D)). q (B, h, T, D), k (B, 1, S, D), w (B, T, h) -> (B, 1, T, S).

    Scores of exactly 0 are common (no head fires): only top_k's rule for ties makes the choice well defined.
    """
    s = F.relu(q @ k.transpose(-1, -2) * q.size(-1) ** -0.5)                           # (B, h, T, S)
    return (s * w.transpose(1, 2).unsqueeze(-1)).sum(dim=1, keepdim=True)


def indexer_kl(scores, q, k, mask, scale=None):
    """KL(p || softmax(scores)) of each query, (B, h, T): p is the mean attention of the heads that an index head serves.

    scores (B, h, T, S); q (B, H, T, D), k (B, H_kv, S, D) of the attention itself, to which no gradient flows. mask (B or
    1, h or 1, T, S) bool: the visible keys (DSA's warm-up) or the chosen ones (its sparse stage), one at least per query.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    with torch.no_grad():
        a = q.unflatten(1, (k.size(1), -1)) @ k.unsqueeze(2).transpose(-1, -2) * (scale or q.size(-1) ** -0.5)
        a = a.flatten(1, 2).unflatten(1, (scores.size(1), -1)).to(scores.dtype)        # (B, h, H / h, T, S)
        p = a.masked_fill(~mask.unsqueeze(2), -math.inf).softmax(dim=-1).mean(dim=2)
    log_q = scores.masked_fill(~mask, -math.inf).log_softmax(dim=-1).masked_fill(~mask, 0)      # never 0 times -inf
    return (p * (p.clamp(min=1e-30).log() - log_q)).sum(dim=-1)


def add_indexer_kl(aux, kl, valid):
    """Add a layer's mean KL per valid query, from a list of (B, h, t), to aux["indexer_kl"]: the layers' sum."""
    kl = torch.cat(kl, dim=-1)                                                         # (B, h, T)
    if valid is not None:
        kl = kl.masked_fill(~valid[:, None], 0) * (valid.numel() / valid.sum().clamp(min=1))
    aux["indexer_kl"] = aux.get("indexer_kl", 0) + kl.mean()


def new_slots(x, cache, valid):
    """(1 or B, T): the slots that x will take. They order the tokens; the keyword pos only says how to rotate them."""
    if cache is None:
        return torch.arange(x.size(1), device=x.device)[None]
    slots = cache.positions(x.size(1), valid=valid)
    return slots if valid is None else slots.clamp(max=cache.max_len - 1)              # beyond: padding of a row that is full


def see(new, slots, causal, cache, commit, valid, block=1):
    """Put `new` {name: (B, h, T, D)} into the cache, if any -> (what can be read, limit (1 or B, T), plain).

    plain: the new tokens are all there is, so attention to everything needs no mask beyond `causal`. A cache is read up
    to a multiple of `block` slots; those from limit on hold garbage.
    """
    T, read, plain = slots.size(1), list(new.values()), causal or valid is None
    end = T if valid is None else valid.sum(dim=1, keepdim=True)
    if cache is not None:
        _, k_slots, k_valid = extend(cache, new, slots, valid, commit)
        end = k_valid.sum(dim=1, keepdim=True)
        if len(k_slots) > T:
            S, plain = -(-len(k_slots) // block) * block, False
            read = [getattr(cache, name)[:, :, :S].to(a.dtype) for name, a in new.items()]
    limit = slots + 1 if causal else torch.zeros_like(slots) + end
    return read, limit.clamp(min=1), plain


def read_all(q, k, v, causal, limit, plain, scale=None):
    """Dense attention to all slots below limit."""
    mask = None if plain else (torch.arange(k.size(2), device=q.device) < limit[..., None]).unsqueeze(1)
    return softmax_attention(q, k, v, causal, mask=mask, scale=scale)


def window_attention(q, k, v, slots, limit, window, causal):
    """Sliding window over slots, a stretch of queries at a time against the keys around it: never (T, S)."""
    y, window = [], min(window, k.size(2))
    for rows in row_slices(q.size(2), max(window, 128)):
        at = slots[:, rows].expand(q.size(0), -1)
        size = at.size(1) + (window - 1) * (1 if causal else 2)
        s = at[:, :1] - (window - 1) + torch.arange(size, device=q.device)             # (B, size)
        mask = visible(at, s, causal, window, (s >= 0) & (s < limit[:, rows].amax(dim=1, keepdim=True)))
        kr, vr = (windows(a, s[:, :1], size, 1).squeeze(2) for a in (k, v))
        y.append(softmax_attention(q[:, :, rows], kr, vr, mask=mask.unsqueeze(1)))
    return torch.cat(y, dim=2)


def total(reads, T, causal):
    """Sum of reads(t) over the queries of T tokens; reads(t) is what the last query of t tokens reads."""
    return sum(reads(t) for t in range(1, T + 1)) if causal else T * reads(T)


class BlockSparse(Full):
    """What nsa, infllm and msa share: the projections of `full`, the choice of blocks, caches cut at blocks."""
    family = "sparse"
    settings = tuple(f for f in Full.settings if f not in ("window", "sink")) + (
        "sel_block", "sel_topk", "sel_init", "sel_local", "sel_tile")

    def configure(self, config, block, topk, init, local, compress=True):
        """Read the sel_ and cmp_ fields; the numbers given are the published ones, for fields that are None."""
        for key, value in dict(block=block, topk=topk, init=init, local=local, tile=None).items():
            given = getattr(config, f"sel_{key}")
            setattr(self, key, value if given is None else given)
        self.tile = self.block if self.tile is None else self.tile
        for key, low in dict(block=1, init=0, local=1, tile=1).items():
            at_least(f"sel_{key}", getattr(self, key), low)
        if self.topk < self.init + self.local:
            raise ValueError(f"sel_topk {self.topk} must be at least sel_init + sel_local = {self.init} + {self.local}: "
                             "the first and the local blocks are always read and count among the sel_topk")
        self.most = max(self.topk, self.init + 2 * self.local + self.tile // self.block)       # picks of a row
        self.dense_len = 0
        self.size, self.stride = (config.cmp_block, config.cmp_stride) if compress else (1, 1)
        at_least("cmp_block", self.size)
        at_least("cmp_stride", self.stride)
        if self.size % self.stride or self.block % self.stride:
            raise ValueError(f"cmp_stride {self.stride} must divide both cmp_block {self.size} and sel_block {self.block}")

    def select(self, score, slots, limit, S, causal):
        """-> (sel, tile)"""
        tile = 1 if causal else self.tile
        return select_blocks(score, slots, limit, -(-S // self.block), self.block, self.topk, self.init, self.local, tile,
                             self.dense_len), tile

    def compress(self, f, name, k, slots, cache):
        """f(window) for every complete window of k (B, h, S, D) -> (B, h, NC, D), one at least, perhaps not visible.

        With a cache only the windows that the new tokens complete are computed, from k, which is its own running tail.
        Windows that are not complete are garbage, computed again later; the buffer's last slot takes what is left over.
        """
        (B, _, S, _), (size, stride) = k.shape, (self.size, self.stride)
        n = max(self.windows_at(S), 1)
        if cache is None:
            return f(windows(k, torch.arange(n, device=k.device).expand(B, n), size, stride))
        buffer = getattr(cache, name)
        i = ((slots[:, :1] - size) // stride + 1).clamp(min=0) + torch.arange(-(-slots.size(1) // stride), device=k.device)
        write_slots(buffer, f(windows(k, i, size, stride)), i.clamp(max=buffer.size(2) - 1))
        return buffer[:, :, :n].to(k.dtype)

    def windows_at(self, T):
        """Complete compression windows in T tokens."""
        return max((T - self.size) // self.stride + 1, 0)

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        shapes = self.state(-(-max_len // self.block) * self.block)
        return cache_for(batch_size, max_len, device, dtype,
                         {name: (h, n + name.startswith("c"), width) for name, (h, n, width) in shapes.items()})

    def cache_bytes(self, T, dtype):
        return sum(math.prod(shape) for shape in self.state(T).values()) * itemsize(dtype)

    def block_reads(self, T, causal):
        """Keys in the chosen blocks of the last of T queries, its own, perhaps partial, block among them; bidirectional: of
        the query that reads most, in a long text. The blocks that a tile touches are forced: a wide tile exceeds the topk."""
        own = (T - 1) // self.block
        if causal:
            return min(own, self.topk - 1) * self.block + T - own * self.block
        touched = (self.block - math.gcd(self.block, self.tile) + self.tile - 1) // self.block + 1
        return min(T, max(self.topk, self.init + 2 * (self.local - 1) + touched) * self.block)


class NSA(BlockSparse):
    """Native sparse attention (DeepSeek, arXiv 2502.11089): three branches over one K/V, mixed by sigmoid gates.

    Compressed: every cmp_stride tokens an MLP turns cmp_block keys (values) and their places in the window into one.
    Selected: the sel_topk blocks with most compressed attention, the first and two local ones forced.
    Window: the last `window` tokens. Only the compressed branch trains the compression: the choice has no gradient.
    Published: sel_block 64, sel_topk 16, sel_init 1, sel_local 2, cmp 32/16, window 512. The paper has a K/V for each
    branch; like all public code we share one, and compress keys after their rotation (as fla does).
    """
    settings = BlockSparse.settings + ("window", "cmp_block", "cmp_stride")

    def __init__(self, config):
        super().__init__(config)
        self.configure(config, block=64, topk=16, init=1, local=2)
        self.window = 512 if config.window is None else config.window
        self.window_pos = nn.Parameter(torch.zeros(2, self.size, self.D))              # place in the window: keys, values
        self.k_compress, self.v_compress = (nn.Sequential(nn.Linear(self.size * self.D, self.D, bias=False), nn.GELU(),
                                                          nn.Linear(self.D, self.D, bias=False)) for _ in "kv")
        self.branch_proj = nn.Linear(config.n_embd, 3 * self.H, bias=config.bias)

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        no_mask("nsa", mask)
        slots = new_slots(x, cache, valid)
        q, k, v = self.project(x, slots if pos is None else pos)
        (k, v), limit, plain = see({"k": k, "v": v}, slots, causal, cache, commit, valid, self.block)
        place = self.window_pos.to(k.dtype)
        ck = self.compress(lambda w: self.k_compress((w + place[0]).flatten(-2)), "ck", k, slots, cache)
        cv = self.compress(lambda w: self.v_compress((w + place[1]).flatten(-2)), "cv", v, slots, cache)
        complete = torch.arange(ck.size(2), device=x.device) * self.stride + self.size <= limit[..., None]
        compressed = softmax_attention(q, ck, cv, mask=complete.unsqueeze(1))          # 0 before the first complete window
        sel, tile = self.select(lambda r: compressed_scores(q[:, :, r], ck, limit[:, r], k.size(2), self.block, self.size,
                                                            self.stride, "sum"), slots, limit, k.size(2), causal)
        selected = block_sparse_attention(q, k, v, sel, self.block, causal, tile, limit, self.most)
        near = softmax_attention(q, k, v, causal, self.window) if plain and x.is_cuda else \
            window_attention(q, k, v, slots, limit, self.window, causal)
        gate = torch.sigmoid(self.branch_proj(x)).unflatten(-1, (3, self.H, 1)).permute(2, 0, 3, 1, 4)     # (3, B, H, T, 1)
        return self.output(gate[0] * compressed + gate[1] * selected + gate[2] * near, x)

    def state(self, T):
        kv, ckv = (self.Hkv, T, self.D), (self.Hkv, self.windows_at(T), self.D)
        return dict(k=kv, v=kv, ck=ckv, cv=ckv)

    def reads(self, T, causal=True):
        return self.windows_at(T) + self.block_reads(T, causal) + min(T, self.window if causal else 2 * self.window - 1)

    def flops(self, T, causal=True):                       # 1.5: the scores of compressed keys are computed twice
        pairs = total(lambda t: 1.5 * self.windows_at(t) + self.block_reads(t, causal), T, causal)
        return int(4 * self.H * self.D * (pairs + count_visible(T, causal, self.window)))


class InfLLM(BlockSparse):
    """InfLLM-V2 (MiniCPM4, arXiv 2509.24663): block selection without parameters, so that a checkpoint of `full` loads.

    Blocks are chosen by attention to mean-pooled keys; a query that sees at most dense_len tokens reads them all.
    Published (MiniCPM4.1): sel_block 64, sel_topk 64, sel_init 1, window 2048 = sel_local 33, cmp 32/16, dense_len 8192.
    MoBA (arXiv 2502.13189) is the setting cmp_block = cmp_stride = sel_block, sel_init=0, sel_local=1, dense_len=0 and
    sel_per_head=True: each head chooses for itself (the paper: blocks of 512, sel_topk=3).
    """
    settings = BlockSparse.settings + ("cmp_block", "cmp_stride", "dense_len", "sel_per_head")

    def __init__(self, config):
        super().__init__(config)
        self.configure(config, block=64, topk=64, init=1, local=33)
        at_least("dense_len", config.dense_len, 0)
        self.dense_len, self.per_head = config.dense_len, config.sel_per_head
        self.most = max(self.most, -(-self.dense_len // self.block))

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        no_mask("infllm", mask)
        slots = new_slots(x, cache, valid)
        q, k, v = self.project(x, slots if pos is None else pos)
        (k, v), limit, plain = see({"k": k, "v": v}, slots, causal, cache, commit, valid, self.block)
        with torch.no_grad():
            ck = self.compress(lambda w: w.mean(dim=3), "ck", k, slots, cache)
        if k.size(2) <= max(self.dense_len, self.topk * self.block):                   # all would be chosen
            return self.output(read_all(q, k, v, causal, limit, plain), x)
        if self.per_head:
            k, v, ck = (a.repeat_interleave(self.H // self.Hkv, dim=1) for a in (k, v, ck))
        sel, tile = self.select(lambda r: compressed_scores(q[:, :, r], ck, limit[:, r], k.size(2), self.block, self.size,
                                                            self.stride, "max"), slots, limit, k.size(2), causal)
        return self.output(block_sparse_attention(q, k, v, sel, self.block, causal, tile, limit, self.most), x)

    def state(self, T):
        kv = self.Hkv, T, self.D
        return dict(k=kv, v=kv, ck=(self.Hkv, self.windows_at(T), self.D))

    def reads(self, T, causal=True):                       # of k and v; the pooled keys are scanned besides
        return T if T <= self.dense_len else self.block_reads(T, causal)

    def flops(self, T, causal=True):
        if T <= max(self.dense_len, self.topk * self.block):
            return super().flops(T, causal)
        scan = lambda t: self.windows_at(t) / 2                                        # scores without values
        return int(4 * self.H * self.D * total(lambda t: self.reads(t, causal) + scan(t), T, causal))


class MSA(BlockSparse):
    """MiniMax sparse attention (MiniMax-M3, arXiv 2606.13392): an index head per group picks blocks of 128 keys.

    A block's score is the best raw product of the group's index query with its index keys, one key for all groups. The
    index learns from aux["indexer_kl"] alone, from the group's mean attention to what it chose; layer.stage as in DSA.
    Published: sel_block 128, sel_topk 16, sel_local 1, index_head_dim 128 (None: the head width), qk_norm=True.
    """
    settings = BlockSparse.settings + ("index_head_dim",)

    def __init__(self, config):
        super().__init__(config)
        self.configure(config, block=128, topk=16, init=0, local=1, compress=False)
        self.Di = self.D if config.index_head_dim is None else config.index_head_dim
        at_least("index_head_dim", self.Di, max(self.rope_dim, 1))
        self.index_q_proj = nn.Linear(config.n_embd, self.Hkv * self.Di, bias=False)
        self.index_k_proj = nn.Linear(config.n_embd, self.Di, bias=False)
        self.index_q_norm = nn.RMSNorm(self.Di, eps=config.norm_eps)
        self.index_k_norm = nn.RMSNorm(self.Di, eps=config.norm_eps)
        self.stage = "sparse"

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        no_mask("msa", mask)
        slots = new_slots(x, cache, valid)
        pos = slots if pos is None else pos
        q, k, v = self.project(x, pos)
        qi = self.index_q_proj(x.detach()).unflatten(-1, (self.Hkv, -1)).transpose(1, 2)       # (B, Hkv, T, Di)
        ki = self.index_k_proj(x.detach()).unsqueeze(1)                                        # (B, 1, T, Di)
        qi, ki = self.index_q_norm(qi).to(q.dtype), self.index_k_norm(ki).to(q.dtype)
        if self.rope_dim:
            qi, ki = (rotary(a, pos, self.rope_dim, self.rope_base) for a in (qi, ki))
        (k, v, ki), limit, plain = see({"k": k, "v": v, "ki": ki}, slots, causal, cache, commit, valid, self.block)
        s = torch.arange(k.size(2), device=x.device)
        dense = self.stage != "sparse" or len(s) <= self.topk * self.block
        if not dense:
            score = lambda r: index_block_scores(qi[:, :, r], ki, limit[:, r], self.block)
            sel, tile = self.select(score, slots, limit, len(s), causal)
        if aux is not None and self.stage != "dense":
            kl, t = [], torch.arange(x.size(1), device=x.device)
            for r in row_slices(len(t), cuda=x.is_cuda):
                mask = (s < limit[:, r, None]).unsqueeze(1)                            # (b, 1, t, S)
                if not dense:
                    mask = mask & sel[:, :, t[r] // tile][..., s // self.block]        # (B, Hkv, t, S)
                kl.append(indexer_kl(qi[:, :, r] @ ki.transpose(-1, -2), q[:, :, r], k, mask))
            add_indexer_kl(aux, kl, valid)
        if dense:
            return self.output(read_all(q, k, v, causal, limit, plain), x)
        return self.output(block_sparse_attention(q, k, v, sel, self.block, causal, tile, limit, self.most), x)

    def state(self, T):
        kv = self.Hkv, T, self.D
        return dict(k=kv, v=kv, ki=(1, T, self.Di))

    def reads(self, T, causal=True):                       # of k and v; all index keys are scanned besides
        return self.block_reads(T, causal)

    def flops(self, T, causal=True):
        main = 4 * self.H * self.D * total(lambda t: self.reads(t, causal), T, causal)
        return main + 2 * self.Hkv * self.Di * count_visible(T, causal)


class DSA(MLA):
    """DeepSeek sparse attention (DeepSeek-V3.2): on MLA, a lightning indexer picks sel_topk single tokens for each query.

    The indexer's heads share one key. It reads detached inputs and learns from aux["indexer_kl"] alone. layer.stage:
        "dense"   plain MLA, no indexer loss
        "warmup"  still dense, the loss over all visible keys: train the indexer only (V3.2: 1000 steps, lr 1e-3)
        "sparse"  attention to the chosen tokens, the loss over these: train everything on LM loss + aux["indexer_kl"]
    Published: sel_topk 2048, index_n_head 64 (None: n_head / 2), index_head_dim 128 (None: v_head_dim). The rotated
    channels come first and are half-split here, while MLA's are interleaved. Only decoding is faster than MLA: no two
    queries pick the same tokens, so training masks, as DeepSeek's own short prefill does.
    """
    family = "sparse"
    settings = MLA.settings + ("sel_topk", "index_n_head", "index_head_dim")

    def __init__(self, config):
        super().__init__(config)
        self.topk = 2048 if config.sel_topk is None else config.sel_topk
        self.Hi = max(1, self.H // 2) if config.index_n_head is None else config.index_n_head
        self.Di = max(self.Dv, self.rope) if config.index_head_dim is None else config.index_head_dim
        at_least("sel_topk", self.topk)
        at_least("index_n_head", self.Hi)
        at_least("index_head_dim", self.Di, max(self.rope, 1))
        self.index_q_proj = nn.Linear(self.q_b_proj.in_features, self.Hi * self.Di, bias=False)
        self.index_k_proj = nn.Linear(config.n_embd, self.Di, bias=False)
        self.index_k_norm = nn.LayerNorm(self.Di, eps=1e-6)
        self.index_w_proj = nn.Linear(config.n_embd, self.Hi, bias=False)
        self.stage = "sparse"

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        no_mask("dsa", mask)
        slots = new_slots(x, cache, valid)
        pos = slots if pos is None else pos
        q, latent, source = self.project(x, pos)
        qi = self.index_q_proj(source.detach()).unflatten(-1, (self.Hi, -1)).transpose(1, 2)   # (B, Hi, T, Di)
        ki = self.index_k_norm(self.index_k_proj(x.detach())).to(q.dtype).unsqueeze(1)         # (B, 1, T, Di)
        if self.rope_base:
            qi, ki = (rotary(a, pos, self.rope, self.rope_base) for a in (qi, ki))
        w = self.index_w_proj(x.detach()).float() * self.Hi ** -0.5                            # (B, T, Hi)
        (latent, ki), limit, plain = see({"latent": latent, "ki": ki}, slots, causal, cache, commit, valid)
        s = torch.arange(latent.size(2), device=x.device)
        dense, learn = self.stage != "sparse" or len(s) <= self.topk, aux is not None and self.stage != "dense"

        def attention(q, k, v, scale):                             # naive: k has all heads; absorbed: one, the latent
            y, kl = [], []
            for r in row_slices(x.size(1), cuda=x.is_cuda) if learn or not dense else ():
                score = lightning_scores(qi[:, :, r], ki, w[:, r])                             # (B, 1, t, S)
                mask = (s < limit[:, r, None]).unsqueeze(1)
                if not dense:                                      # bidirectional: the own token is always read
                    mask = select_blocks(lambda _: score, slots[:, r], limit[:, r], len(s), 1, self.topk,
                                         local=0 if causal else 1)
                    y.append(softmax_attention(q[:, :, r], k, v, mask=mask, scale=scale) if k.size(1) > 1 else
                             block_sparse_attention(q[:, :, r], k, v, mask, 1, causal, 1, limit[:, r], self.topk, scale))
                if learn:
                    kl.append(indexer_kl(score, q[:, :, r], k, mask, scale))
            if learn:
                add_indexer_kl(aux, kl, valid)
            return read_all(q, k, v, causal, limit, plain, scale) if dense else torch.cat(y, dim=2)

        y = self.attend(q, latent, attention, absorbed=False if cache is None else None)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def state(self, T):
        return dict(latent=(1, T, self.R + self.rope), ki=(1, T, self.Di))

    def reads(self, T, causal=True):                       # of latents; all index keys are scanned besides
        return min(T, self.topk)

    def flops(self, T, causal=True):
        main = 2 * self.H * (self.nope + self.rope + self.Dv) * total(lambda t: self.reads(t, causal), T, causal)
        return main + 2 * self.Hi * (self.Di + 1) * count_visible(T, causal)

# ---------------------------------------------------------------------------------------------------------------------
# Linear attention and the delta rule

def stack_lower(A, B, low):
    """[[A, 0], [low, B]] for square A, B and low of the same size."""
    return torch.cat([F.pad(A, (0, A.size(-1))), torch.cat([low, B], dim=-1)], dim=-2)


def inverse_of_one_minus(N):
    """(I - N)^-1 for strictly lower triangular N (P, C, C), C a power of two, by block doubling.

    The inverse of [[A, 0], [-L, B]] is [[A', 0], [B' L A', B']], from 1 x 1 tiles upwards: only true inverses are ever
    multiplied, so it is as accurate as substitution. The power series I + N + N^2 + ... is not: with correlated keys
    its terms reach 1e7 before they cancel, even when it is summed by doubling.
    """
    n, s = N.detach(), 1
    X = torch.ones_like(n[:, :, :1]).unsqueeze(-1)                                     # (P, C, 1, 1): the tiles
    while X.size(1) > 1:
        pairs = X.size(1) // 2
        low = n.view(-1, pairs, 2, s, pairs, 2, s)[:, :, 1, :, :, 0]                   # below the diagonal of a pair
        low = low.diagonal(dim1=1, dim2=3).movedim(-1, 1)                              # (P, pairs, s, s)
        A, B = X.unflatten(1, (pairs, 2)).unbind(2)
        X, s = stack_lower(A, B, B @ low @ A), 2 * s
    X = X.squeeze(1)
    # dX = X dN X needs nothing but the inverse: a term of value 0 carries it, and autograd skips the levels.
    return torch.baddbmm(X, X, (N - n) @ X) if N.requires_grad else X


def head_scores(rows, k, G, last):
    """Scores with one decay a head: rows is [q] or [q, erase], all (P, N, C, K); G (P, N, C, 1). See chunked."""
    f = k.dtype
    D = (G - G.mT).to(f).exp_().tril_()                                                # above the diagonal: maybe inf
    into, out = G.exp().to(f), (G[:, :, -1:] - G).exp().to(f) * last
    scores = [(a @ k.mT) * d for a, d in zip(rows, (D, D.tril(-1)))]
    return scores, [a * into for a in rows], k * out


def channel_scores(rows, k, G, last, g_min):
    """Scores with a decay per channel: rows is [q] or [q, erase], all and G (P, N, C, K). See chunked.

    sum_d q_id k_jd exp(G_id - G_jd) is a matmul once the exponent is split at a reference between j and i. Below the
    diagonal that is G at the first row of the lower tile: both factors are at most 1 whatever g is, and no row looks at
    a later one (a reference in the middle leaks the future through rounding). Tiles double in size from c rows. With
    c = 1 this is exact for every g; with g >= -5 the factors of c = 16 rows also fit in float32, exp(5 * 15) = 4e32.
    """
    C, f = G.size(-2), k.dtype
    c = 1 if g_min is None else 16
    k, G, *rows = (a.unflatten(2, (-1, c)) for a in (k, G, *rows))                     # (P, N, C/c, c, K)
    R = G[..., :1, :]
    if c > 1:
        down = (G - R).to(f)
        k, rows = k * (-down).exp(), [a * down.exp() for a in rows]
    into, out = R.exp().to(f), (G[:, :, -1:, -1:] - R).exp().to(f) * last.unsqueeze(2)
    ins, k_out = [(a * into).flatten(2, 3) for a in rows], (k * out).flatten(2, 3)
    scores = [(a @ k.mT).tril(-i) for i, a in enumerate(rows)]                         # (P, N, n, c, c), n tiles
    while scores[0].size(2) > 1:
        n, s = scores[0].size(2) // 2, C // scores[0].size(2) // c                     # merge n pairs of s * c rows

        def half(a, i):
            return a.unflatten(2, (n, 2, s)).unbind(3)[i]                              # (P, N, n, s, c, K)
        R0, R1 = half(R, 0), half(R, 1)
        down, up = (R1 - R1[:, :, :, :1]).exp().to(f), (R1[:, :, :, :1] - R0).exp().to(f)
        k_up = (half(k, 0) * up).flatten(3, 4)
        for i, (a, A) in enumerate(zip(rows, scores)):
            scores[i] = stack_lower(*A.unflatten(2, (n, 2)).unbind(3), (half(a, 1) * down).flatten(3, 4) @ k_up.mT)
    return [A.squeeze(2) for A in scores], ins, k_out


def scan_chunks(through, k_out, U, W, S):
    """u = U + W S, S' = through S + k_out^T u -> S before each chunk (P, N, K, V), u of each chunk, the last S."""
    states, us = [], []
    W = [None] * U.size(1) if W is None else W.unbind(1)                               # None: linear attention, u = v
    for d, kT, u, w in zip(through.unbind(1), k_out.mT.unbind(1), U.unbind(1), W):
        u = u if w is None else torch.baddbmm(u, w, S.to(u.dtype))
        states.append(S)
        us.append(u)
        S = torch.baddbmm(d * S, kT, u.to(S.dtype))
    return torch.stack(states, 1), torch.stack(us, 1), S


def scan_groups(through, k_out, U, W, S, size):
    """scan_chunks in about 2 sqrt(N) steps instead of N, for torch.compile, whose graph holds every step.

    A chunk is the affine map S -> M S + A. Compose the maps along each group of `size` chunks, all groups at once; walk
    over the groups; apply the partial compositions to the state at the start of each group.
    """
    (P, K, V), n = S.shape, U.size(1) // size
    A, M = k_out.mT @ U.to(S.dtype), through.expand(-1, -1, K, 1)
    step = lambda m, s, a: a + m * s
    if W is not None:
        M = k_out.mT @ W.to(S.dtype) + through * torch.eye(K, dtype=S.dtype, device=S.device)
        step = lambda m, s, a: torch.baddbmm(a, m, s)                                  # one kernel, a + m @ s is two

    def split(a):                                                                      # -> size x (P n, K, .)
        return a.unflatten(1, (n, size)).movedim(2, 0).flatten(1, 2).unbind(0)
    M, A = split(M), split(A)
    maps = [(M[0], A[0])]
    for m, a in zip(M[1:], A[1:]):
        m0, a0 = maps[-1]
        maps.append((m * m0 if W is None else m @ m0, step(m, a0, a)))
    starts = []
    for m, a in zip(*(x.view(P, n, K, -1).movedim(1, 0).contiguous().unbind(0) for x in maps[-1])):
        starts.append(S)
        S = step(m, S, a)
    starts = torch.stack(starts, 1).flatten(0, 1)                                      # (P n, K, V)
    states = torch.stack([starts] + [step(m, starts, a) for m, a in maps[:-1]], 1).view(P, -1, K, V)
    return states, U if W is None else U + W @ states.to(U.dtype), S


def chunked(q, k, v, beta, g, S, own, reset, scale, g_min, chunk_size):
    """The chunk-parallel core; beta None is linear attention, u = v. For the arguments see two_way.

    Inside a chunk of C tokens with G = cumsum(g) and D_ij = exp(G_i - G_j), u solves a triangular system:
        u_i = beta_i (v_i - e^G_i S^T k_i - sum_{j<i} D_ij (k_i . k_j) u_j)
        o_i = e^G_i S^T q_i + sum_{j<=i} D_ij (q_i . k_j) u_j
        S'  = e^G_C S + sum_j e^(G_C - G_j) k_j u_j^T
    (DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, Kimi Delta Attention 2510.26692). Decays, scores, inverse and
    state are float32, the rest has the dtype of q.
    """
    (B, H, T, K), low, f = q.shape, q.dtype, S.dtype
    C = min(chunk_size, max(16, 1 << (T - 1).bit_length()))
    N = -(-T // C)
    size = 1 << N.bit_length() // 2 if torch.compiler.is_compiling() else 1            # chunks in a group, ~ sqrt(N)
    pad = -T % (C * size)                                                              # zeros do not change S

    def chunks(a):                                                                     # -> (P, N, C, .), P = B H
        a = F.pad(a, (0, 0, 0, pad)) if pad else a
        return a.reshape(B * H, -1, C, a.size(-1))
    q, k, v, S = chunks(q).to(f), chunks(k).to(f), chunks(v), S.flatten(0, 1)
    # After a strong decay G_i - G_j is a small difference of large numbers: float64 where the device has it.
    G = chunks(q.new_zeros(B, H, T, 1) if g is None else g.detach())
    G = G.cumsum(-2, dtype=f if G.device.type == "mps" else torch.float64)
    r = c = last = 1.0
    row_k = k
    if g is not None:
        # The gradient of G is what decayed from its row minus what decayed to it: dG = q dq - k dk (GLA, arXiv
        # 2312.06635). r and c have the value 1 and carry it, so that no exponential needs a gradient.
        z = (chunks(g) - chunks(g).detach()).cumsum(-2)
        r, c, last = 1 + z, 1 - z, 1 + z[:, :, -1:]
        k, row_k = k * c, k
    q = q * (r * scale)
    through = (G[:, :, -1:].exp().to(f) * last).mT                                     # (P, N, 1 or K, 1)
    if beta is None:
        rows = [q]
    else:
        beta = chunks(beta.unsqueeze(-1)).to(f)
        rows = [q, row_k * (r * -beta)]
    args = rows, k, G, last
    scores, ins, k_out = head_scores(*args) if G.size(-1) == 1 else channel_scores(*args, g_min)
    if own is not None:                                                                # (B,) False: read, then write
        hide = torch.eye(C, dtype=torch.bool, device=q.device) & ~own.repeat_interleave(H)[:, None, None, None]
        scores[0] = scores[0].masked_fill(hide, 0)
    if reset is not None:
        doc = chunks(reset[:, None, :, None].expand(B, H, T, 1)).cumsum(-2)
        scores = [A * (doc == doc.mT) for A in scores]
        ins, k_out = [a * (doc == 0) for a in ins], k_out * (doc == doc[:, :, -1:])
        through = through * (doc[:, :, -1:] == 0)
    U, W = v, None
    if beta is not None:
        X = inverse_of_one_minus(scores[1].flatten(0, 1)).view_as(scores[1]).to(low)
        U, W = X @ (beta * v).to(low), X @ ins[1].to(low)
    if size == 1:
        states, u, S = scan_chunks(through, k_out, U, W, S)
    else:
        states, u, S = scan_groups(through, k_out, U, W, S, size)
    o = ins[0].to(low) @ states.to(low) + scores[0].to(low) @ u
    return o.reshape(B, H, -1, o.size(-1))[:, :, :T], S.unflatten(0, (B, H))


def token_by_token(q, k, v, beta, g, S, own, reset, scale):
    """The recurrence itself: decay the state, correct what it holds for k towards v, read it with q."""
    q, k, v = q.to(S.dtype) * scale, k.to(S.dtype), v.to(S.dtype)
    out = []
    for t in range(q.size(2)):
        kt, u = k[:, :, t].unsqueeze(-1), v[:, :, t].unsqueeze(-2)                     # (B, H, K, 1), (B, H, 1, V)
        if reset is not None:
            S = S.masked_fill(reset[:, t, None, None, None], 0)
        if g is not None:
            S = S * g[:, :, t].exp().unsqueeze(-1)
        if beta is not None:
            u = beta[:, :, t, None, None].to(S.dtype) * (u - kt.mT @ S)
        before, S = S, S + kt * u
        out.append(q[:, :, t].unsqueeze(-2) @ (S if own is None else torch.where(own[:, None, None, None], S, before)))
    return torch.cat(out, dim=2), S


def two_way(core, q, k, v, beta, g, state, causal, reset, scale, **settings):
    """Run a core; when not causal, on [x ; flip(x)] along the batch, the flipped half reading before it writes."""
    (B, H, T, K), own = q.shape, None
    for name, a, *shapes in (("k", k, (B, H, T, K)), ("v", v, (B, H, T, v.size(-1))), ("beta", beta, (B, H, T)),
                             ("g", g, (B, H, T), (B, H, T, K)), ("state", state, (B, H, K, v.size(-1))),
                             ("reset", reset, (B, T))):
        if a is not None and tuple(a.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(a.shape)}, expected {' or '.join(map(str, shapes))} beside q "
                             f"{tuple(q.shape)}: (B, H, T, K)")
    f = torch.promote_types(q.dtype, torch.float32)
    S = q.new_zeros(B, H, K, v.size(-1), dtype=f) if state is None else state.to(f)
    scale = K ** -0.5 if scale is None else scale
    if v.numel() == 0:
        return v.to(q.dtype), S
    if g is not None:
        g = g.to(f)
        g = g.unsqueeze(-1) if g.dim() == 3 else g
        if settings.get("g_min") is None:
            g = g.clamp(min=-1e3)                                                      # still exp = 0; sums stay exact
    if not causal:
        q, k, v, beta, g = (None if a is None else torch.cat([a, a.flip(2)]) for a in (q, k, v, beta, g))
        if reset is not None:                                                          # backwards it starts at its end
            reset = torch.cat([reset, F.pad(reset[:, 1:], (0, 1)).flip(1)])
        S = torch.cat([S, torch.zeros_like(S)])
        own = torch.arange(2 * B, device=q.device) < B
    with no_autocast(q):                                                               # the inverse in bf16 is wrong
        o, S = core(q, k, v, beta, g, S, own, reset, scale, **settings)
    if not causal:
        o, S = o[:B] + o[B:].flip(2), S[:B]
    return o.to(q.dtype), S


def pick_chunk(chunk_size, q, g_min=None):
    """Checks, and the default: 64, but 32 on the CPU, where the caches are small (measured, 10 to 30% faster)."""
    if g_min is not None and not -5 <= g_min <= 0:
        raise ValueError(f"g_min {g_min} must lie in [-5, 0]: more decay overflows float32 within 16 tokens; leave "
                         "it out, and the exact form is used")
    if chunk_size is None:
        return 32 if q.device.type == "cpu" and not torch.compiler.is_compiling() else 64
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size {chunk_size} must be a power of two, at least 16")
    return chunk_size


def linear_attention(q, k, v, g=None, state=None, causal=True, chunk_size=None, scale=None):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, in O(T). q, k (B, H, T, K), v (B, H, T, V).

    g: log decay <= 0. None: none (arXiv 2006.16236). (B, H, T): one a head (RetNet 2307.08621, Mamba-2 2405.21060,
    Lightning 2401.04658). (B, H, T, K): per channel (GLA 2312.06635). state (B, H, K, V): float32, where to start.
    Returns (o (B, H, T, V), state after the last token). scale defaults to K ** -0.5. No feature map, no normaliser.
    causal=False adds a second scan from the right that reads before it writes, so that the own token counts once; state
    seeds and returns the scan from the left. Without decay that is one matrix for all tokens.
    """
    chunk_size = pick_chunk(chunk_size, q)
    if g is None and not causal:
        with no_autocast(q):
            S = widen(k).mT @ widen(v) + (0 if state is None else state)
            return (q @ S.to(q.dtype)) * (q.size(-1) ** -0.5 if scale is None else scale), S
    return two_way(chunked, q, k, v, None, g, state, causal, None, scale, g_min=None, chunk_size=chunk_size)


def linear_attention_recurrent(q, k, v, g=None, state=None, causal=True, chunk_size=None, scale=None):
    """linear_attention token by token: the definition, and the decode step."""
    return two_way(token_by_token, q, k, v, None, g, state, causal, None, scale)


def delta_rule(q, k, v, beta, g=None, state=None, causal=True, g_min=None, reset=None, chunk_size=None, scale=None):
    """S = exp(g_t) S; S = S + beta_t k_t (v_t - S^T k_t)^T; o_t = scale S^T q_t. Shapes as in linear_attention.

    beta (B, H, T) in [0, 2]; k is used as given: the layers L2-normalise it. g None: DeltaNet (arXiv 2406.06484).
    (B, H, T): Gated DeltaNet (2412.06464). (B, H, T, K): Kimi Delta Attention (2510.26692).
    g_min: a bound g >= g_min >= -5 that the caller guarantees for per-channel g: about twice as fast.
    reset (B, T) bool: a document starts here and nothing crosses its border. causal=False and state: as above. Only
    first derivatives are right: see r and c in chunked.
    """
    chunk_size = pick_chunk(chunk_size, q, g_min)
    return two_way(chunked, q, k, v, beta, g, state, causal, reset, scale, g_min=g_min, chunk_size=chunk_size)


def delta_rule_recurrent(q, k, v, beta, g=None, state=None, causal=True, g_min=None, reset=None, chunk_size=None,
                         scale=None):
    """delta_rule token by token: the definition, and the decode step."""
    return two_way(token_by_token, q, k, v, beta, g, state, causal, reset, scale)


def widen(x):
    """float32 for what bf16 would spoil (gates, norms, states: it has no number between 0.996 and 1); float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def l2_norm(x):
    """x / sqrt(sum x^2 + 1e-6) in float32: the eps of fla and of every model since, added and not a maximum."""
    w = widen(x)
    return (w * torch.rsqrt(w.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Taps(torch.autograd.Function):
    """Depthwise convolution for CPUs: 256 tokens at a time, which stay in the cache, and tokens outermost in the result, as
    all that follows wants them. conv1d turns x around; with it a layer takes 1.1 to 1.6 times as long.
    """
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        T, taps = x.size(1) - weight.size(1) + 1, weight.mT.contiguous()               # (W, D)
        y = x.new_empty(x.size(0), T, x.size(2))
        for t in range(0, T, 256):
            out = torch.mul(x[:, t:min(t + 256, T)], taps[0], out=y[:, t:t + 256])
            for i, tap in enumerate(taps[1:], 1):
                out.addcmul_(x[:, t + i:t + i + out.size(1)], tap)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        T, taps = grad.size(1), weight.mT.contiguous()
        dx, dtaps = torch.zeros_like(x), torch.zeros_like(taps)
        for t in range(0, T, 256):
            out = grad[:, t:t + 256]
            for i, tap in enumerate(taps):
                at = slice(t + i, t + i + out.size(1))
                dx[:, at].addcmul_(out, tap)
                dtaps[i] += (x[:, at] * out).sum((0, 1))
        return dx, dtaps.mT


def short_conv(x, weight, symmetric=False):
    """Depthwise convolution over time. x (B, W-1+T, D) with the W-1 tokens before, weight (D, W) -> (B, T, D).

    The last tap is the token itself, as in nn.Conv1d of the published models. symmetric: tap W-1-d also reads d tokens
    ahead, so that one weight serves both directions, as one decay does; beyond the end are zeros.
    """
    if symmetric:
        weight = torch.cat([weight, weight[:, :-1].flip(1)], dim=1)                    # (D, 2W-1)
        x = F.pad(x, (0, 0, 0, weight.size(1) // 2))
    if torch.compiler.is_compiling():                      # one kernel with what surrounds it, and x is not turned around
        T, weight = x.size(1) - weight.size(1) + 1, weight.to(x.dtype)
        return sum(x[:, i:i + T] * w for i, w in enumerate(weight.unbind(1)))
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        return Taps.apply(x, weight)
    return F.conv1d(x.mT, weight.unsqueeze(1), groups=weight.size(0)).mT


def low_rank(n_in, n_out, rank):
    """A bias-free linear map, in two steps through `rank` channels unless rank is 0."""
    if not rank:
        return nn.Linear(n_in, n_out, bias=False)
    return nn.Sequential(nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out, bias=False))


class FixedState(nn.Module):
    """What the four layers share: convolution, gates, output norm, and a cache whose size does not depend on T.

        q, k, v = silu(conv(W x)), q and k L2-normalised; beta = sigmoid(W x) for the delta rule
        log decay: softplus  g = -exp(A_log) softplus(W x + dt_bias)         (Mamba-2, Gated DeltaNet)
                   lower     g = g_min sigmoid(exp(A_log) (W x + dt_bias))   (GLM-5, Kimi K3: a bound makes KDA fast)
        y = W (norm(o) * act(W x)), the norm per head

    neg_eigval doubles beta, so that a write can flip the sign of what was stored (arXiv 2411.12537, OLMo-Hybrid).
    linear_n_v_head > linear_n_head: heads of values share queries and keys (Qwen3-Next: 32 and 16). linear_key_dim,
    linear_value_dim: width of a head. conv_size 4 as everywhere, 1 is none. out_gate_rank: low-rank gate, 0 full.
    bidir, for causal=False: sum = scans from both ends added before the norm; forward, backward = one of them: the
    pattern "kda(bidir=forward) kda(bidir=backward)" alternates at half the cost.

    Initialised here for good: A_log, dt_bias, conv_weight, o_norm (no weight decay on them); the nn.Linear are the
    model's business. Cached calls are for inference. The state is float32 whatever the dtype of the cache.
    """
    family = "linear"
    settings = ("n_embd", "n_head", "norm_eps", "linear_n_head", "linear_n_v_head", "linear_key_dim", "linear_value_dim",
                "conv_size", "out_gate", "out_gate_rank", "bidir")
    name = delta = decay = gate = out_gate = None                                      # set by each layer below
    low_rank_gate = False

    def __init__(self, config):
        super().__init__()
        check_choices({field: getattr(config, field) for field in self.settings})
        for field, low in (("linear_n_head", 1), ("linear_n_v_head", 1), ("linear_key_dim", 1), ("linear_value_dim", 1),
                           ("conv_size", 1), ("out_gate_rank", 0)):
            if getattr(config, field) is not None:
                at_least(field, getattr(config, field), low)
        C, self.H = config.n_embd, config.linear_n_head or config.n_head
        self.Hv = config.linear_n_v_head or self.H
        if self.Hv % self.H:
            raise ValueError(f"linear_n_v_head {self.Hv} must be a multiple of the {self.H} heads of queries and keys")
        if config.linear_key_dim is None and C % self.H:
            raise ValueError(f"n_embd {C} must be a multiple of {self.H} heads, or give linear_key_dim")
        self.K = config.linear_key_dim or C // self.H
        self.V = config.linear_value_dim or self.K
        read = lambda field, default: getattr(config, field) if field in self.settings else default
        self.decay = read("linear_decay", self.decay)
        self.gate = self.gate if read("decay_gate", "auto") == "auto" else config.decay_gate
        self.out_gate = self.out_gate if config.out_gate == "auto" else config.out_gate
        self.bidir, self.g_min, self.beta_max = config.bidir, read("g_min", None), 2.0 if read("neg_eigval", False) else 1.0
        if self.gate == "lower" and not -5 <= self.g_min <= 0:
            raise ValueError(f"g_min {self.g_min} must lie in [-5, 0]; decay_gate=softplus has no bound")
        self.sizes = [self.H * self.K, self.H * self.K, self.Hv * self.V]              # q, k, v
        self.qkv_proj = nn.Linear(C, sum(self.sizes), bias=False)
        bound = config.conv_size ** -0.5                                               # nn.Conv1d's own
        self.conv_weight = nn.Parameter(torch.empty(sum(self.sizes), config.conv_size).uniform_(-bound, bound))
        if self.delta:
            self.beta_proj = nn.Linear(C, self.Hv, bias=False)
        if self.decay in ("head", "channel"):
            per_head = 1 if self.decay == "head" else self.K
            self.decay_proj = low_rank(C, self.Hv * per_head, 0 if self.decay == "head" else self.K)
            # Mamba's start: dt log-uniform in [0.001, 0.1], A in [1, 16], a memory of 1 to 1000 tokens. With
            # dt_bias = 1 (transformers' Qwen3-Next) it would be a tenth of a token.
            dt = torch.empty(self.Hv * per_head).uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))             # softplus(dt_bias) = dt
            A = torch.ones(self.Hv) if self.gate == "lower" else torch.empty(self.Hv).uniform_(1, 16)
            self.A_log = nn.Parameter(A.log())
        if self.out_gate:
            rank = config.out_gate_rank if config.out_gate_rank is not None else self.low_rank_gate * self.V
            self.gate_proj = low_rank(C, self.Hv * self.V, rank)
        self.o_norm = nn.RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = nn.Linear(self.Hv * self.V, C, bias=False)

    def log_decay(self, x):
        """(B, T, C) -> None, (B, Hv, T) or (B, Hv, T, K), at least float32."""
        B, T, _ = x.shape
        if self.decay == "fixed":                                                      # RetNet: 1 - 2^(-5 - head)
            h = torch.arange(self.Hv, device=x.device, dtype=torch.float32)
            return torch.log1p(-2.0 ** (-5 - h)).view(1, -1, 1).expand(B, -1, T)
        if self.decay is None:
            return None
        f = (self.decay_proj(x) + widen(self.dt_bias)).view(B, T, self.Hv, -1).transpose(1, 2)   # (B, Hv, T, 1 or K)
        A = widen(self.A_log).exp().view(-1, 1, 1)
        g = self.g_min * torch.sigmoid(A * f) if self.gate == "lower" else -A * F.softplus(f)
        return g if self.decay == "channel" else g.squeeze(-1)

    def forward(self, x, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        no_mask(self.name, mask)
        if x.numel() == 0:
            return x
        B, T, _ = x.shape
        if not causal and self.bidir == "backward":
            if cache is not None:
                raise ValueError(f"layer '{self.name}' with bidir=backward starts at the end of the text and has no "
                                 "cache: use bidir=sum or causal=True")
            return self.forward(x.flip(1), valid=None if valid is None else valid.flip(1)).flip(1)
        both = not causal and self.bidir == "sum"
        qkv = self.qkv_proj(x)
        if valid is not None:
            qkv = qkv.masked_fill(~valid[:, :, None], 0)
        W = self.conv_weight.size(1)
        before = qkv.new_zeros(B, W - 1, qkv.size(2)) if cache is None else cache.conv.to(qkv.dtype)
        qkv = torch.cat([before, qkv], dim=1)
        q, k, v = F.silu(short_conv(qkv, self.conv_weight, both)).split(self.sizes, dim=-1)
        q = q.unflatten(2, (self.H, self.K)).transpose(1, 2)                           # (B, H, T, K)
        k = k.unflatten(2, (self.H, self.K)).transpose(1, 2)
        v = v.unflatten(2, (self.Hv, self.V)).transpose(1, 2)                          # (B, Hv, T, V)
        q, k = l2_norm(q), l2_norm(k)
        if self.Hv > self.H:
            q, k = (a.repeat_interleave(self.Hv // self.H, dim=1) for a in (q, k))     # (B, Hv, T, K)
        g = self.log_decay(x)
        if not self.delta and self.decay == "head" and self.gate == "softplus":
            v = v * (-g / self.A_log.exp()[:, None]).unsqueeze(-1).to(v.dtype)         # Mamba-2 writes dt v, g = -A dt
        write = self.beta_max * torch.sigmoid(widen(self.beta_proj(x))).transpose(1, 2) if self.delta else v
        if valid is not None:                                                          # padding: no write and no decay
            pad = ~valid[:, None, :, None]
            write, g = (a if a is None else a.masked_fill(pad.view(pad.shape[:a.dim()]), 0) for a in (write, g))
        state = None if cache is None else cache.state
        if self.delta:
            rule = delta_rule_recurrent if T == 1 else delta_rule
            o, S = rule(q, k, v, write, g, state, not both, self.g_min if self.gate == "lower" else None)
        else:
            rule = linear_attention_recurrent if T == 1 else linear_attention
            # The norm below undoes any scale; 1 keeps small first outputs (Mamba-2's dt v) out of its eps.
            o, S = rule(q, k, write, g, state, not both, scale=1.0)
        if cache is not None and commit:
            end = T if valid is None else valid.sum(1)
            tail = torch.arange(W - 1, device=x.device) + (end if valid is None else end[:, None])
            cache.conv.copy_(qkv.gather(1, tail.expand(B, -1)[:, :, None].expand(-1, -1, qkv.size(2))))
            cache.state.copy_(S)
            cache.advance(cache.pos[:, None] + torch.arange(T, device=x.device), valid)
        y = self.o_norm(o.transpose(1, 2).to(self.o_norm.weight.dtype))                # (B, T, Hv, V)
        if self.out_gate:
            z = self.gate_proj(x).view_as(y)
            y = y * (F.silu(z) if self.out_gate == "silu" else torch.sigmoid(z))
        return self.o_proj(y.flatten(2).to(x.dtype))

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return Cache(batch_size, max_len, device,
                     conv=torch.zeros(batch_size, self.conv_weight.size(1) - 1, sum(self.sizes), device=device,
                                      dtype=dtype),
                     state=torch.zeros(batch_size, self.Hv, self.K, self.V, device=device, dtype=wide))

    def cache_bytes(self, T, dtype):
        state = self.Hv * self.K * self.V * itemsize(torch.promote_types(dtype, torch.float32))
        return state + (self.conv_weight.size(1) - 1) * sum(self.sizes) * itemsize(dtype)

    def reads(self, T, causal=True):
        """Rows of the state, each as large as one key and value: K, whatever T; both scans have one."""
        return self.K * (1 if causal or self.bidir != "sum" else 2)

    def flops(self, T, causal=True):
        """The chunk-parallel form as computed, C = 64 tokens a chunk, and the convolution; both scans count."""
        C, K, V, ways = min(64, T), self.K, self.V, 1 if causal or self.bidir != "sum" else 2
        head = 2 * C * (K + V) + 4 * K * V                                             # scores, their use; S' and S q
        if self.delta:
            head += 2 * C * (2 * K + V) + 2 * C * C // 3 + 2 * K * V                   # system, inverse, U, W; W S
        elif self.decay is None and not causal and ways == 2:
            head, ways = 4 * K * V, 1                                                  # one matrix for all tokens
        return T * (ways * self.Hv * head + 2 * (self.conv_weight.size(1) * ways) * sum(self.sizes))


class Linear(FixedState):
    """Linear attention, S += k v^T, with linear_decay None; fixed (RetNet, Lightning); head (Mamba-2: it writes dt v);
    channel (GLA: its g = logsigmoid(-f) / 16 is the softplus form with A = 1/16)."""
    name, delta, gate, out_gate = "linear", False, "softplus", "silu"
    settings = FixedState.settings + ("linear_decay", "decay_gate", "g_min")


class DeltaNet(FixedState):
    """DeltaNet (arXiv 2406.06484): a write replaces what the state held for its key. No decay, no output gate."""
    name, delta = "deltanet", True
    settings = FixedState.settings + ("neg_eigval",)


class GatedDeltaNet(FixedState):
    """Gated DeltaNet (arXiv 2412.06464): one decay a head. Qwen3-Next, Qwen3.5, OLMo-Hybrid."""
    name, delta, decay, gate, out_gate = "gated_deltanet", True, "head", "softplus", "silu"
    settings = FixedState.settings + ("decay_gate", "g_min", "neg_eigval")


class KDA(FixedState):
    """Kimi Delta Attention (arXiv 2510.26692): a decay per channel, low-rank gates. GLM-5.3-Flash; Kimi Linear has
    decay_gate=softplus, without a bound on the decay."""
    name, delta, decay, gate, out_gate, low_rank_gate = "kda", True, "channel", "lower", "sigmoid", True
    settings = FixedState.settings + ("decay_gate", "g_min", "neg_eigval")

# ---------------------------------------------------------------------------------------------------------------------
# Registry

ATTENTION = {"full": Full, "mla": MLA, "nsa": NSA, "infllm": InfLLM, "dsa": DSA, "msa": MSA,
             "linear": Linear, "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet, "kda": KDA}
