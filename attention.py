"""Token mixers of today's language models: one flat file, plain torch, no hand-written kernels.

    layer = ATTENTION["full"](LayerConfig(n_embd=64))   # or any object with the attributes of layer.settings
    y = layer(x)                                        # (B, T, C) -> (B, T, C), causal
    y = layer(x, causal=False)                          # bidirectional, for diffusion models
    cache = layer.init_cache(batch_size=2, max_len=512)
    y = layer(x, cache=cache)                           # prefill or decode any number of tokens

layer           class           paper                           definition              fast form
full            Full            1706.03762, grouped 2305.13245  softmax_attention       sdpa, long windows
mla             MLA             DeepSeek-V2 2405.04434          MLA.attend, naive       MLA.attend, absorbed
linear          Linear          2006.16236, RetNet, SSD, GLA    linear_attention_...    linear_attention
deltanet        DeltaNet        2406.06484                      delta_rule_...          delta_rule
gated_deltanet  GatedDeltaNet   2412.06464                      delta_rule_...          delta_rule
kda             KDA             Kimi Delta Attention 2510.26692 delta_rule_...          delta_rule
nsa             NSA             2502.11089                      NSA.mix                 Blocks, Flex, gather
infllm          InfLLM          InfLLM-V2 2509.24663, MoBA      InfLLM.mix              Blocks, Flex, gather
msa             MSA             MiniMax 2606.13392              MSA.mix                 Blocks, Flex, gather
dsa             DSA             DeepSeek-V3.2                   DSA.mix                 gather (decoding)

... is recurrent: token by token, the definition. Linear, DeltaNet, GatedDeltaNet and KDA share FixedState;
NSA, InfLLM and MSA share BlockSparse (select_blocks, block_sparse_attention); DSA is MLA with an index.
B batch, T tokens, C = n_embd, H heads, G = n_head // n_kv_head, D head width. It imports nothing of ours.
"""
import contextlib
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
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
    rope_factor: float = 1.0        # positions are divided by it, for longer texts (2306.15595)
    rope_original: int | None = None    # Llama 3.1: only where rotations are slow, see `angles`
    rotary_fraction: float = 1.0    # share of each head's channels that is rotated
    # layer `full`
    n_kv_head: int | None = None    # None: n_head
    head_dim: int | None = None     # None: n_embd // n_head
    qk_norm: bool = False
    attn_gate: bool = False
    window: int | None = None       # sliding window, the token itself counted
    sink: bool = False
    # layers `linear`, `deltanet`, `gated_deltanet`, `kda`
    linear_n_head: int | None = None    # query and key heads; None: n_head
    linear_n_v_head: int | None = None  # value heads, a multiple: q and k heads serve several; None: as many
    linear_key_dim: int | None = None   # None: n_embd / heads
    linear_value_dim: int | None = None     # None: the key width
    linear_decay: str | None = None     # linear: None | fixed (RetNet) | head (Mamba-2) | channel (GLA)
    decay_gate: str = "auto"            # softplus | lower (a lower bound g_min); auto: the published one
    g_min: float = -5.0
    neg_eigval: bool = False            # beta in (0, 2): a write may flip what the state held (OLMo-Hybrid)
    writes: int = 1                     # delta rule: writes per token, one after another (DeltaProduct)
    channel_beta: bool = False          # kda: a beta per channel to erase and one to write (Gated DeltaNet-2)
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
    sel_tile: int | None = None     # queries that share their picks when not causal; None: sel_block
    cmp_block: int = 32             # nsa, infllm: tokens in a compression window
    cmp_stride: int = 16            # and between two windows
    dense_len: int = 8192           # infllm: a query that sees no more tokens reads all of them
    sel_per_head: bool = False      # infllm: each head picks for itself (MoBA)
    index_n_head: int | None = None     # dsa: None: n_head / 2
    index_head_dim: int | None = None   # None: msa the head width, dsa v_head_dim


CHOICES = dict(
    position=("rotary", "learned", "none"),
    linear_decay=(None, "fixed", "head", "channel"),
    decay_gate=("auto", "softplus", "lower"),
    out_gate=("auto", None, "silu", "sigmoid"),
    bidir=("sum", "forward", "backward"))
RANGES = dict(                      # ends included; any other number lies between 1 and 65,536
    norm_eps=(1e-12, 0.1),
    rope_base=(1, 10 ** 12),
    rope_factor=(1, 10 ** 6),
    rotary_fraction=(0, 1),
    window=(1, 2 ** 31),
    g_min=(-5, -1e-3),
    out_gate_rank=(0, 2 ** 16),
    qk_rope_head_dim=(0, 2 ** 16),
    sel_topk=(1, 2 ** 24),
    sel_init=(0, 2 ** 16),
    dense_len=(0, 2 ** 31))


def need(ok, message):
    if not ok:
        raise ValueError(message)


def check_values(values):
    """Refuse settings {field: value} whose value is no choice or out of range."""
    for field, value in values.items():
        if field in CHOICES:
            choices = CHOICES[field]
            # a pattern's position=none is None here
            need(value in choices or value is None and "none" in choices,
                 f"{field}={value} is no choice: one of {', '.join(map(str, choices)).lower()}")
        elif type(value) in (int, float):
            low, high = RANGES.get(field, (1, 2 ** 16))
            need(low <= value <= high, f"{field} {value} must lie in [{low}, {high}]")


# ------------------------------------------------------------------------------------------------------------
# What all layers share: a call (Step), a cache, the base class

@dataclass
class Step:
    """What one call is about, worked out once for all layers of a model by `step_of`.

    Tokens sit in slots 0, 1, 2, ... of their sequence. Query t may read a prefix of them, slots < limit[t].
    """
    causal: bool
    commit: bool                    # False: leave the cache as it was (a noisy block, a draft)
    pos: torch.Tensor               # (1 or B, T) positions, for rotations and windows
    slots: torch.Tensor             # (1 or B, T) where the tokens sit; with a cache the same as pos
    limit: torch.Tensor             # (1 or B, T)
    length: int                     # slots that are read: T where there is nothing but the new tokens
    plain: bool                     # no key below `length` is hidden from a query but by `causal`
    dense: bool                     # the host knows that all rows of the cache then hold as many tokens
    rewrites: bool                  # pos names slots that are in use
    valid: torch.Tensor | None      # (B, T) bool, False = padding on the right
    mask: torch.Tensor | None       # (T, T) bool, or (B, 1, T, T): given by the caller instead of causal
    aux: dict | None                # where a layer adds named scalars, such as a loss of its own
    turns: dict                     # cos and sin of each kind of rotation
    seen: torch.Tensor | None = None

    def rotate(self, q, k, dim, rope, interleaved=False):
        """`rotary` at the positions of this call: layers of one kind and dtype share the angles."""
        if dim == 0:
            return q, k
        kind = dim, rope, interleaved, q.dtype
        if kind not in self.turns:
            self.turns[kind] = rotation(self.pos, *kind)
        return [rotary(a, *self.turns[kind], interleaved) for a in (q, k)]

    def below(self):
        """(1 or B, 1, T, length) bool: which slots a query may read."""
        if self.seen is None:
            slots = count_to(self.length, self.limit)
            self.seen = (slots < self.limit[..., None]).unsqueeze(1)
            if self.mask is not None:
                self.seen = self.seen & self.mask
        return self.seen

    def hidden(self):
        """The same, or None where `causal` says it all."""
        return None if self.plain else self.below()


def step_of(x, cache=None, causal=True, commit=True, pos=None, valid=None, mask=None, aux=None):
    """The Step of a call on x (B, T, ...), for the counters of `cache`.

    The keywords are those of every layer:

    cache   from init_cache; None computes the whole sequence at once
    commit  False: read cache + x, but leave the cache as it was (a noisy block, a draft)
    pos     (T,) or (B, T) positions, by default counted on. With a cache they name slots, rising and without
            a gap behind what is there; `mla` and `full` without a window may also compute slots in use anew
    valid   (B, T) bool, False = padding on the right: hidden from every other token
    mask    (T, T) bool, True = visible, instead of causal: `full` and `mla` only, without a cache
    aux     dict to which a layer adds named scalars
    """
    B, T = x.shape[:2]
    eager = not compiling()
    if pos is not None:
        need(pos.shape in ((T,), (1, T), (B, T)),
             f"pos has shape {tuple(pos.shape)}, expected ({T},) or ({B}, {T})")
        pos = pos.view(-1, T)
    if valid is not None:
        need(valid.shape == (B, T), f"valid has shape {tuple(valid.shape)}, expected ({B}, {T})")
        risen = valid[:, 1:] & ~valid[:, :-1]
        need(not eager or not bool(risen.any()), "valid: padding stands on the right only")
    if mask is not None:
        need(cache is None, "a layer takes a mask= or a cache=, not both")
        need(mask.shape[-2:] == (T, T), f"mask has shape {tuple(mask.shape)}, expected ({T}, {T})")
    if cache is None:
        slots = count_to(T, x)[None]
        end = slots.new_full((1, 1), T) if valid is None else valid.sum(1, keepdim=True)
        length = T
        dense = rewrites = False
    else:
        slots, length, rewrites = cache.place(B, T, pos, valid)
        end = cache.end(slots, valid)[:, None]
        dense = eager and cache.dense and valid is None and (pos is None or cache.used == cache.max_len)
    if length == T:                                                 # the new tokens are all there is
        plain = mask is None and (causal or valid is None)
    else:
        plain = dense and (not causal or T == 1 and pos is None)
    if pos is None or cache is not None:
        pos = slots
    limit = slots + 1 if causal and mask is None else end.expand(-1, T)
    limit = limit.clamp(min=1)
    return Step(causal, commit, pos, slots, limit, length, plain, dense, rewrites, valid, mask, aux, {})


class Cache:
    """What a layer or a whole model remembers: tensors of fixed shape, so that no compiled step recompiles.

    pos (B,) int64 counts the valid tokens of each row. used is an upper bound of pos.max() that the host
    knows: asking the device would stall every step. dense: the host also knows that every row holds `used`
    tokens; it is False for good after a call with valid, or with pos into a cache that is not full. A
    compiled step cannot count on the host: it leaves the bound max_len and dense False. A model's cache
    counts for all its layers, whose own are buffers alone.
    """
    def __init__(self, batch_size, max_len, device=None, **buffers):
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_len = max_len
        self.used = 0
        self.dense = True
        self.__dict__.update(buffers)

    def place(self, B, T, pos=None, valid=None):
        """(B, T) slots of T tokens, those that pos names or the next ones; up to which slot there is then
        something to read; do they lie among those in use?

        A graph cannot count: it reads all slots, and hides what is not in use. With valid, a step of one
        token may hold rows that are full, as padding.
        """
        eager = not compiling()
        need(B == len(self.pos), f"the cache has {len(self.pos)} rows, and the batch {B}")
        if pos is None:
            if eager and self.used + T > self.max_len:
                self.used = max(self.pos.tolist(), default=0)       # the bound had padding in it
                taken = self.used
                if valid is not None and T == 1:
                    taken = int(self.pos.masked_fill(~valid[:, 0], 0).max())
                need(taken + T <= self.max_len,
                     f"the cache holds {self.max_len} tokens and {taken} are taken: {T} more do not fit, "
                     f"make it with init_cache(max_len >= {taken + T})")
            slots = self.pos[:, None] + count_to(T, self.pos)
            if valid is not None:
                slots = slots.clamp(max=self.max_len - 1)
            return slots, min(self.max_len, self.used + T) if eager else self.max_len, False
        pos = pos.expand(B, T)
        if not eager or not pos.numel():
            return pos, self.max_len, False
        low, high = map(int, pos.aminmax())
        need(low >= 0 and high < self.max_len,
             f"pos {low if low < 0 else high} lies outside the cache of max_len {self.max_len}: "
             f"the last position is {self.max_len - 1}")
        real = pos >= 0 if valid is None else valid
        new = real & (pos >= self.pos[:, None])
        gap = self.pos + new.sum(1) != self.end(pos, valid)
        falls = (pos.diff(dim=1) <= 0).any(1)
        need(not bool((gap | falls).any()), "pos must rise without a gap behind what the cache holds")
        return pos, max(self.used, high + 1), not torch.equal(new, real)

    def end(self, slots, valid=None):
        """(B,) tokens of each row once those in slots (B, T) are there; the invalid ones do not count."""
        end = slots + 1 if valid is None else torch.where(valid, slots + 1, 0)
        end = F.pad(end, (0, 1))                # a pad: amax of no tokens is an error
        return torch.maximum(self.pos, end.amax(dim=1))

    def advance(self, step):
        """Count the tokens of a step as seen."""
        self.pos.copy_(self.end(step.slots, step.valid))
        self.dense = step.dense
        self.used = step.length


def put(cache, new, step):
    """Put new {name: (B, h, T, D)} into the cache, if there is one -> what is read, (B, h, S, D) each.

    S is step.length: slots from step.limit on hold garbage. Padding is not written. Without commit the new
    entries lie behind cache.pos, where nothing reads them later and the next call overwrites them; where they
    replace entries in use, a copy is read.
    """
    if cache is None:
        return list(new.values())
    read = []
    for name, a in new.items():
        buffer = getattr(cache, name)
        at = step.slots[:, None, :, None].expand_as(a)
        entry = a.to(buffer.dtype)
        if step.valid is not None:
            entry = torch.where(step.valid[:, None, :, None], entry, buffer.gather(2, at))
        if step.rewrites and not step.commit:
            buffer = buffer.clone()
        buffer.scatter_(2, at, entry)
        if step.length != a.size(2):
            a = buffer[:, :, :step.length].to(a.dtype)
        read.append(a)
    return read


def put_window(cache, k, v, step, window):
    """As put, for a sliding window: the cache holds the last W tokens, zeros where there are none yet.

    Returns k, v and the mask.
    """
    if cache is not None:
        W = cache.k.size(2)
        T = k.size(2)
        read = []
        for buffer, a in (cache.k, k), (cache.v, v):
            read.append(torch.cat([buffer.to(a.dtype), a], dim=2))
            if step.commit:
                buffer.copy_(last_tokens(read[-1], W, step.valid))
        if step.length > T:
            slots = step.slots[:, :1] - W + count_to(W + T, k)
            return *read, visible_slots(step.slots, slots, step.limit, window, step.causal)
    if step.plain and step.pos is step.slots:
        return k, v, None
    return k, v, step.below() & visible(step.pos, step.pos, False, window).unsqueeze(1)


def last_tokens(x, n, valid):
    """x (B, h, n + T, D) -> (B, h, n, D): the last n tokens, of each row the valid ones."""
    if valid is None:
        return x[:, :, x.size(2) - n:]
    return key_windows(x, valid.sum(1, keepdim=True), n, 1).squeeze(2)


def key_windows(k, i, size, stride):
    """Windows i (B, m) of k (B, h, S, D) -> (B, h, m, size, D): slots [i stride, i stride + size)."""
    at = i[:, :, None] * stride + count_to(size, k)
    at = at.clamp(0, k.size(2) - 1).flatten(1)
    at = at[:, None, :, None]
    at = at.expand(-1, k.size(1), -1, k.size(3))
    return k.gather(2, at).unflatten(2, (i.size(1), size))


class Mixer(nn.Module):
    """What every layer has.

    A layer says its settings, mix(x, step, cache) and state(T), reads(T, causal), flops(T, causal). state:
    {buffer: shape per sequence of T tokens}; reads: keys that the last query reads; flops: of one forward
    pass of one sequence, without projections.
    """
    family = "softmax"              # or "linear", "sparse"
    settings = ()                   # fields of the config that the layer reads, and has under their names
    published = {}                  # of those that the config leaves open
    takes_mask = False
    rewrites = False                # can it compute slots in use anew?
    wide = ()                       # buffers that are float32 at least

    def __init__(self, config):
        super().__init__()
        values = {field: getattr(config, field) for field in self.settings}
        check_values(values)
        for field, value in values.items():
            if value == LayerConfig.__dataclass_fields__[field].default:
                value = self.published.get(field, value)
            setattr(self, field, value)

    def forward(self, x, causal=True, cache=None, step=None, **keywords):
        """(B, T, C) -> (B, T, C). The keywords are those of `step_of`; a model passes its own step."""
        own = step is None
        if own:
            step = step_of(x, cache, causal, **keywords)
        name = type(self).__name__
        need(self.takes_mask or step.mask is None,
             f"{name} takes no mask=: only 'full' and 'mla' can read one (block diffusion's two streams)")
        need(self.rewrites or not step.rewrites,
             f"{name} reads its cache in order: pos must go on behind it, and only 'mla' and 'full' without "
             "a window compute a slot in use anew")
        if x.numel() == 0:
            return x
        y = self.mix(x, step, cache)
        if own and cache is not None and step.commit:
            cache.advance(step)
        return y

    def buffers_for(self, batch_size, max_len, device=None, dtype=None):
        """{name: zeros (batch_size, ...)}: what the layer keeps of max_len tokens."""
        dtype = dtype or torch.get_default_dtype()
        out = {}
        for name, shape in self.state(max_len).items():
            kept = at_least_float32(dtype) if name in self.wide else dtype
            out[name] = torch.zeros(batch_size, *shape, device=device, dtype=kept)
        return out

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        return Cache(batch_size, max_len, device, **self.buffers_for(batch_size, max_len, device, dtype))

    def cache_bytes(self, T, dtype):
        """Of one sequence of T tokens."""
        return sum(a.nbytes for a in self.buffers_for(1, T, "meta", dtype).values())


def compiling():
    return torch.compiler.is_compiling()


def on_host(x):
    """May a number be asked for? On another device that is to wait for it, and a graph cannot."""
    return x.device.type == "cpu" and not compiling()


def count_to(n, x):
    """0, 1, ..., n - 1 on the device of x."""
    return torch.arange(n, device=x.device)


def at_least_float32(dtype):
    """float32 for what bf16 would spoil (it has no number between 0.996 and 1); float64 stays."""
    return torch.promote_types(dtype, torch.float32)


def widen(x):
    return x.to(at_least_float32(x.dtype))


def no_autocast(x):
    """Inside, autocast is off on x's device: what must be float32 stays float32."""
    if x.device.type == "meta":     # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def visible(q_pos, k_pos, causal=True, window=None, k_valid=None):
    """Which keys a query may read: positions (..., T) and (..., S) -> bool (..., T, S).

    window counts the token itself: 0 <= t - s < window (causal), |t - s| < window (bidirectional).
    k_valid (..., S) hides keys; a query always sees its own position, so that no softmax row is empty (NaN).
    """
    d = q_pos[..., :, None] - k_pos[..., None, :]
    ok = (d >= 0) | (not causal)
    if window is not None:
        ok = ok & (d < window) & (-d < window)
    if k_valid is not None:
        ok = (ok & k_valid[..., None, :]) | (d == 0)
    return ok


def visible_slots(slots, s, limit, window, causal):
    """The same for keys in slots s (B, S), some of them before the first or behind the last: (B, 1, T, S)."""
    used = (s >= 0) & (s < limit.amax(dim=1, keepdim=True))
    return visible(slots, s, causal, window, used).unsqueeze(1)


def count_visible(T, causal=True, window=None):
    """Number of visible (query, key) pairs in a sequence of T tokens."""
    w = T if window is None else min(window, T)
    one_side = w * (w + 1) // 2 + (T - w) * w               # queries before the window is full, and after
    return one_side if causal else 2 * one_side - T


def angles(dim, base=10_000.0, factor=1.0, original=None, device=None):
    """(dim/2,) float32: how far each pair of channels turns from one position to the next.

    factor > 1 stretches the positions. original: Llama 3.1's rule for a model first trained on so many
    tokens. Pairs that turn four times in them stay, those that turn less than once are stretched, what is
    between is mixed.
    """
    freq = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if original is None:
        return freq / factor
    turns = original * freq / (2 * math.pi)
    stays = ((turns - 1) / 3).clamp(0, 1)
    return freq * (stays + (1 - stays) / factor)


def rotation(pos, dim, rope=(), interleaved=False, dtype=torch.float32):
    """pos (T,) or (B, T) -> cos, sin (1 or B, 1, T, dim) for `rotary`, those of the first of a pair negative.

    rope: what `angles` takes behind dim. Angles in float32: bf16 has no integer above 256 next to each other.
    """
    angle = pos[..., None].float() * angles(dim, *rope, device=pos.device)
    angle = torch.stack([-angle, angle], dim=-1 if interleaved else -2)
    angle = angle.flatten(-2).unsqueeze(-3)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(x, cos, sin, interleaved=False):
    """Rotary position embedding of the first channels of x (B, H, T, D), as many as cos has
    (RoFormer, arXiv 2104.09864).

    Pairs are channels (i, i + dim/2), the layout of Llama and transformers, or (2i, 2i + 1) when interleaved
    (DeepSeek). A pair (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    dim = cos.size(-1)
    r = x[..., :dim]
    if interleaved:
        other = r.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        other = r.roll(dim // 2, -1)
    turned = r * cos + other * sin
    if dim == x.size(-1):
        return turned
    return torch.cat([turned, x[..., dim:]], dim=-1)


def rope_of(config):
    return config.rope_base, config.rope_factor, config.rope_original


class Norm(nn.RMSNorm):
    """RMSNorm whose output has the dtype of its input, under autocast too."""
    def forward(self, x):
        return super().forward(x).to(x.dtype)


def head_norm(config, width):
    """The norm of a head's queries or keys, where qk_norm asks for it."""
    return Norm(width, config.norm_eps) if config.qk_norm else nn.Identity()


def linear_map(n_in, n_out, rank=0):
    """Without a bias; in two steps through `rank` channels unless rank is 0."""
    if not rank:
        return nn.Linear(n_in, n_out, bias=False)
    return nn.Sequential(linear_map(n_in, rank), linear_map(rank, n_out))


def heads(x, n):
    """(B, T, n D) -> (B, n, T, D)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def head_width(config):
    if config.head_dim is not None:
        return config.head_dim
    need(config.n_embd % config.n_head == 0,
         f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}, or give head_dim")
    return config.n_embd // config.n_head

# ------------------------------------------------------------------------------------------------------------
# Softmax attention

def softmax_attention(q, k, v, causal=True, window=None, sink=None, scale=None, mask=None):
    """softmax(scale q k^T) v: q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, Dv).

    Queries are grouped when H_kv < H. With S > T the queries are the last T of the S positions. mask: bool,
    broadcastable to (B, H, T, S), True = visible, in place of causal and window. sink (H,): a learned logit
    per head that takes part in the softmax and reads nothing, so that a head can attend to no token
    (gpt-oss). scale defaults to D ** -0.5.
    """
    T = q.size(-2)
    S = k.size(-2)
    if mask is None:
        need(T <= S or not causal,
             f"{T} queries are more than {S} keys: causal queries are the last of the positions")
        if window is not None and S > 2 * max(window, 128):
            return long_window_attention(q, k, v, causal, window, sink, scale)
        if window is not None and window < S or sink is not None or causal and 1 < T < S:
            t = count_to(S, q)
            mask = visible(t[S - T:], t, causal, window)
    if sink is None:
        return sdpa(q, k, v, causal, scale, mask)
    # A sink is the logit of one key more, whose value is 0.
    logits = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    logits = logits.expand(*q.shape[:3], S)
    null = sink.to(q.dtype).view(-1, 1, 1).expand_as(logits[..., :1])
    k, v = (F.pad(a, (0, 0, 0, 1)) for a in (k, v))
    return sdpa(q, k, v, False, scale, torch.cat([logits, null], dim=-1))


ROTATED = ("n_embd", "n_head", "head_dim", "bias", "norm_eps", "qk_norm", "position", "rope_base",
           "rope_factor", "rope_original")                  # settings that all layers with a softmax read


def read_all(q, k, v, step, scale=None):
    """Attention to all that a step may read."""
    return softmax_attention(q, k, v, step.causal, scale=scale, mask=step.hidden())


class Full(Mixer):
    """Multi-head attention with the options of current models: each is off by default.

    n_kv_head < n_head: grouped queries (arXiv 2305.13245), 1 = multi-query. qk_norm: RMSNorm of queries and
    keys per head (Qwen3). attn_gate: the output times sigmoid(W x), per channel (arXiv 2505.06708,
    Qwen3-Next). window: sliding window, with a cache of that size. sink: a learned null logit per head
    (gpt-oss). rotary_fraction: share of the head's channels that are rotated (Qwen3-Next: 0.25).
    """
    settings = ROTATED + ("n_kv_head", "rotary_fraction", "attn_gate", "window", "sink")
    takes_mask = True

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        H = config.n_head
        self.H = H
        self.Hkv = config.n_kv_head or H
        need(H % self.Hkv == 0, f"n_head {H} must be a multiple of n_kv_head {self.Hkv}")
        self.D = head_width(config)
        self.angles = rope_of(config)
        self.rope_dim = int(self.D * config.rotary_fraction) if config.position == "rotary" else 0
        need(self.rope_dim % 2 == 0,
             f"head width {self.D} x rotary_fraction {config.rotary_fraction} rotates "
             f"{self.rope_dim} channels: it must be an even number")
        self.rewrites = self.window is None
        self.qkv_proj = nn.Linear(C, (H + 2 * self.Hkv) * self.D, bias=config.bias)
        self.o_proj = nn.Linear(H * self.D, C, bias=config.bias)
        self.gate_proj = linear_map(C, H * self.D) if config.attn_gate else None
        self.q_norm = head_norm(config, self.D)
        self.k_norm = head_norm(config, self.D)
        self.sink = nn.Parameter(torch.zeros(H)) if self.sink else None

    def mix(self, x, step, cache):
        q, k, v = self.project(x, step)
        if self.window is None:
            k, v = put(cache, {"k": k, "v": v}, step)
            mask = step.hidden()
        else:
            k, v, mask = put_window(cache, k, v, step, self.window)
        y = softmax_attention(q, k, v, step.causal, self.window, self.sink, mask=mask)
        return self.output(y, x)

    def project(self, x, step):
        """(B, T, C) -> q (B, H, T, D), k and v (B, Hkv, T, D), normalised and rotated."""
        qkv = heads(self.qkv_proj(x), self.H + 2 * self.Hkv)
        q, k, v = qkv.split([self.H, self.Hkv, self.Hkv], dim=1)
        q, k = step.rotate(self.q_norm(q), self.k_norm(k), self.rope_dim, self.angles)
        return q, k, v

    def output(self, y, x):
        """What the heads read, (B, H, T, D) -> (B, T, C); the gate looks at x, the layer's input."""
        y = y.transpose(1, 2).flatten(2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y)

    def state(self, T):
        kv = self.Hkv, min(T, self.window or T), self.D
        return dict(k=kv, v=kv)

    def reads(self, T, causal=True):
        return T if self.window is None else min(T, self.window if causal else 2 * self.window - 1)

    def flops(self, T, causal=True):
        return 4 * self.H * self.D * count_visible(T, causal, self.window)      # scores and values, 2 each


class MLA(Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The cache holds one latent and one rotated key per token. c = RMSNorm(W_kv_a x) is kv_lora_rank wide; keys
    and values of all heads are linear in c. A rotation between W_k_b and the query would break that, so
    positions live in qk_rope_head_dim channels more, their key shared by all heads. Two forms, equal up to
    rounding: naive expands c to keys and values (training); absorbed moves W_k_b into the query and W_v_b
    behind the softmax and attends to c itself, one K/V head (decoding). Widths left None take DeepSeek-V3's
    ratios to the head width D: kv_lora_rank 4 D, qk_nope_head_dim D, qk_rope_head_dim D / 2, v_head_dim D.
    q_lora_rank None: full-rank queries (V2-Lite; V3 has 12 D).

    qk_norm (not DeepSeek's): RMSNorm of each head's query and of the rotated key, which both forms allow. A
    small bidirectional model needs it, and more pairs that turn fast, such as rope_base=100, to find its
    neighbours: as masked diffusion it stays at the frequencies of single tokens without.
    """
    settings = ROTATED + (
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    takes_mask = rewrites = True

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.H = config.n_head
        self.R = config.kv_lora_rank or 4 * head_width(config)
        self.nope = config.qk_nope_head_dim or head_width(config)
        self.Dv = config.v_head_dim or head_width(config)
        self.rope = config.qk_rope_head_dim
        if self.rope is None:
            self.rope = head_width(config) // 4 * 2
        need(self.rope % 2 == 0, f"qk_rope_head_dim {self.rope} must be even: channels are rotated in pairs")
        self.angles = rope_of(config)
        self.rotated = self.rope if config.position == "rotary" else 0
        self.scale = (self.nope + self.rope) ** -0.5
        rank = config.q_lora_rank
        self.q_a_proj = nn.Linear(C, rank, bias=config.bias) if rank else nn.Identity()
        self.q_a_norm = Norm(rank, config.norm_eps) if rank else nn.Identity()
        self.q_b_proj = linear_map(rank or C, self.H * (self.nope + self.rope))
        self.kv_a_proj = nn.Linear(C, self.R + self.rope, bias=config.bias)
        self.kv_a_norm = Norm(self.R, config.norm_eps)
        self.q_norm = head_norm(config, self.nope + self.rope)
        self.k_norm = head_norm(config, self.rope)
        self.kv_b_proj = linear_map(self.R, self.H * (self.nope + self.Dv))
        self.o_proj = nn.Linear(self.H * self.Dv, C, bias=config.bias)

    def mix(self, x, step, cache):
        q, latent, _ = self.project(x, step)
        latent, = put(cache, {"latent": latent}, step)
        return self.output(q, latent, functools.partial(read_all, step=step), cache)

    def project(self, x, step):
        """(B, T, C) -> q (B, H, T, nope + rope), latent (B, 1, T, R + rope), what q is made of (B, T, .)."""
        source = self.q_a_norm(self.q_a_proj(x))
        q = self.q_norm(heads(self.q_b_proj(source), self.H))
        q, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent = self.kv_a_proj(x).unsqueeze(1)
        c, k_rope = latent.split([self.R, self.rope], dim=-1)
        q_rope, k_rope = step.rotate(q_rope, self.k_norm(k_rope), self.rotated, self.angles, True)
        latent = torch.cat([self.kv_a_norm(c), k_rope], dim=-1)
        return torch.cat([q, q_rope], dim=-1), latent, source

    def output(self, q, latent, attention, cache):
        """`attend`, with a cache in the cheaper form -> (B, T, C)."""
        y = self.attend(q, latent, attention, absorbed=False if cache is None else None)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def attend(self, q, latent, attention, absorbed=None):
        """attention(q, k, v, scale=) in either form, over latents (B, 1, S, R + rope) -> (B, H, T, Dv).

        absorbed None: the cheaper one. Naive pays R (nope + Dv) once per key, absorbed wider scores and
        values per pair.
        """
        R = self.R
        nope = self.nope
        Dv = self.Dv
        if absorbed is None:
            absorbed = q.size(2) * (2 * R - nope - Dv) < R * (nope + Dv)
        w = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (self.H, -1))
        w_k, w_v = w.split([nope, Dv], dim=1)                       # (H, nope, R), (H, Dv, R)
        if absorbed:
            q, q_rope = q.split([nope, self.rope], dim=-1)
            q = torch.cat([q @ w_k, q_rope], dim=-1)
            # The values are the whole latents, cut afterwards: SDPA is fast where keys and values have one
            # width.
            y = attention(q, latent, latent, scale=self.scale)      # (B, H, T, R + rope)
            return y[..., :R] @ w_v.mT
        c, k_rope = latent.split([R, self.rope], dim=-1)
        k_rope = k_rope.expand(-1, self.H, -1, -1)
        k = torch.cat([c @ w_k.mT, k_rope], dim=-1)
        return attention(q, k, c @ w_v.mT, scale=self.scale)

    def state(self, T):
        return dict(latent=(1, T, self.R + self.rope))

    def reads(self, T, causal=True):
        return T

    def flops(self, T, causal=True):
        return 2 * self.H * (self.nope + self.rope + self.Dv) * total(self.reads, T, causal)    # naive form

# ------------------------------------------------------------------------------------------------------------
# Linear attention and the delta rule: the definition

def delta_rule_recurrent(q, k, v, beta, g=None, state=None, causal=True, g_min=None, reset=None,
                         chunk_size=None, scale=None, write=None):
    """The delta rule token by token: the definition, and the decode step.

        S = exp(g_t) S                          decay; g None: DeltaNet, no decay
        u = beta_t (v_t - S^T k_t)              correct what S holds for the key k_t towards v_t
        S = S + k_t u^T                         write
        o_t = scale S^T q_t                     read

    q, k (B, H, T, K), v (B, H, T, V), beta (B, H, T) in [0, 2]; k is used as given: the layers L2-normalise
    it. g: log decay <= 0, (B, H, T) for Gated DeltaNet, (B, H, T, K) for Kimi Delta Attention. beta (B, H, T,
    K) and write (B, H, T, V): Gated DeltaNet-2 (arXiv 2605.22791) erases and writes each channel by another
    share, u = write_t v_t - S^T (beta_t k_t). state (B, H, K, V): float32, where to start. reset (B, T) bool:
    a document starts here and nothing crosses its border. scale: K ** -0.5. causal=False adds a second scan
    from the right that reads before it writes, so that the own token counts once; state seeds and returns the
    scan from the left. Returns (o (B, H, T, V), state after the last token).
    """
    return two_way(token_by_token, q, k, v, beta, g, state, causal, scale, reset, write)


def linear_attention_recurrent(q, k, v, g=None, state=None, causal=True, chunk_size=None, scale=None):
    """The same without the correction, u = v_t. Shapes and g as there."""
    return two_way(token_by_token, q, k, v, None, g, state, causal, scale)


def token_by_token(q, k, v, beta, g, S, twice, scale):
    q, k, v = (a.to(S.dtype) for a in (q, k, v))
    out = []
    for t in range(q.size(2)):
        qt = q[:, :, t, None]                                                   # (B, H, 1, K)
        kt = k[:, :, t, :, None]                                                # (B, H, K, 1)
        u = v[:, :, t, None]                                                    # (B, H, 1, V)
        S = S * g[:, :, t].exp().unsqueeze(-1)                                  # g (B, H, T, 1 or K)
        if beta is not None:
            u = u - (beta[:, :, t, :, None] * kt).mT @ S                        # beta v - S^T (beta k)
        before = S
        S = S + kt * u
        read = S
        if twice:
            read = torch.cat([S.chunk(2)[0], before.chunk(2)[1]])
        out.append(scale * qt @ read)
    return torch.cat(out, dim=2), S


def check_shapes(q, k, v, beta, g, state, reset, write):
    B, H, T, K = q.shape
    V = v.size(-1)
    per_token, like_k, like_v = (B, H, T), (B, H, T, K), (B, H, T, V)
    legal = dict(
        k=(k, like_k),
        v=(v, like_v),
        beta=(beta, per_token, *[like_k] * (write is not None)),
        write=(write, like_v),
        g=(g, per_token, like_k),
        state=(state, (B, H, K, V)),
        reset=(reset, (B, T)))
    for name, (a, *shapes) in legal.items():
        need(a is None or tuple(a.shape) in shapes,
             f"{name} has shape {tuple(getattr(a, 'shape', ()))}, expected {' or '.join(map(str, shapes))} "
             f"beside q {tuple(q.shape)}: (B, H, T, K). Tensors in fla's order, (B, T, H, .), need "
             "transpose(1, 2)")


def two_way(core, q, k, v, beta, g, state, causal, scale, reset=None, write=None, **settings):
    """Run core(q, k, v, beta, g, S, twice, scale) after checks and defaults.

    beta None is linear attention, else v comes to the core as beta v. When not causal it runs on [x ;
    flip(x)] along the batch: twice, and the second half reads before it writes.
    """
    check_shapes(q, k, v, beta, g, state, reset, write)
    B, H, T, K = q.shape
    f = at_least_float32(q.dtype)
    S = q.new_zeros(B, H, K, v.size(-1), dtype=f) if state is None else state.to(f)
    scale = K ** -0.5 if scale is None else scale
    if v.numel() == 0:
        return v.to(q.dtype), S
    wide = lambda a: (a.unsqueeze(-1) if a.dim() == 3 else a).to(f)             # (B, H, T, 1, K or V)
    g = wide(q.new_zeros(B, H, T) if g is None else g)
    if beta is not None:
        beta = wide(beta)
        v = (beta if write is None else wide(write)) * v
    if not causal:
        both = lambda a: None if a is None else torch.cat([a, a.flip(2)])
        q, k, v, beta, g = (both(a) for a in (q, k, v, beta, g))
        S = torch.cat([S, torch.zeros_like(S)])
        if reset is not None:                                           # backwards it starts at its end
            ends = F.pad(reset[:, 1:], (0, 1))
            reset = torch.cat([reset, ends.flip(1)])
    if reset is not None:
        g = g.masked_fill(reset[:, None, :, None], -math.inf)
    if settings.get("g_min") is None:
        g = g.clamp(min=-1e3)                                           # still exp = 0; sums stay exact
    with no_autocast(q):                                                        # the inverse in bf16 is wrong
        o, S = core(q, k, v, beta, g, S, not causal, scale, **settings)
    if not causal:
        o = o[:B] + o[B:].flip(2)
        S = S[:B]
    return o.to(q.dtype), S

# ------------------------------------------------------------------------------------------------------------
# Linear attention and the delta rule: the layers

class FixedState(Mixer):
    """What the four layers share: convolution, gates, output norm, and a cache of one size for any T.

        q, k, v = silu(conv(W x)), q and k L2-normalised; beta = sigmoid(W x) for the delta rule
        log decay: softplus  g = -exp(A_log) softplus(W x + dt_bias)         (Mamba-2, Gated DeltaNet)
                   lower     g = g_min sigmoid(exp(A_log) (W x + dt_bias))   (GLM-5, Kimi K3: makes KDA fast)
        y = W (norm(o) * act(W x)), the norm per head

    neg_eigval doubles beta, so that a write can flip the sign of what was stored (arXiv 2411.12537,
    OLMo-Hybrid). writes > 1: each token has so many keys, values and betas, written in turn after one decay,
    and one query (DeltaProduct, arXiv 2502.10297): a product of reflections can turn the state, where one
    can only mirror it. linear_n_v_head > linear_n_head: heads of values share queries and keys (Qwen3-Next:
    32 and 16). linear_key_dim, linear_value_dim: width of a head. conv_size 4 as everywhere, 1 is none.
    out_gate_rank: low-rank gate, 0 full. bidir, for causal=False: sum = scans from both ends added before the
    norm (with writes > 1 the one from the right reads before the token's own decay); forward, backward = one
    of them: the pattern "kda(bidir=forward) kda(bidir=backward)" alternates at half the cost.

    Initialised here for good: A_log, dt_bias, conv_weight, o_norm (no weight decay on them); the model
    initialises the nn.Linear. Cached calls are for inference. The state is float32 whatever the dtype of the
    cache.
    """
    family = "linear"
    settings = ("n_embd", "n_head", "norm_eps", "linear_n_head", "linear_n_v_head", "linear_key_dim",
                "linear_value_dim", "conv_size", "out_gate", "out_gate_rank", "bidir")
    wide = ("state",)
    delta = True                    # the delta rule, or linear attention
    linear_decay = decay_gate = None
    neg_eigval = channel_beta = low_rank_gate = False
    writes = 1

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.H = config.linear_n_head or config.n_head
        self.Hv = config.linear_n_v_head or self.H
        need(self.Hv % self.H == 0,
             f"linear_n_v_head {self.Hv} must be a multiple of the {self.H} heads of queries and keys")
        need(config.linear_key_dim or C % self.H == 0,
             f"n_embd {C} must be a multiple of {self.H} heads, or give linear_key_dim")
        self.K = config.linear_key_dim or C // self.H
        self.V = config.linear_value_dim or self.K
        self.sizes = [self.H * self.K, self.writes * self.H * self.K, self.writes * self.Hv * self.V]
        self.qkv_proj = linear_map(C, sum(self.sizes))
        bound = self.conv_size ** -0.5                                          # nn.Conv1d's own
        taps = torch.empty(sum(self.sizes), self.conv_size)
        self.conv_weight = nn.Parameter(taps.uniform_(-bound, bound))
        if self.delta:
            n = self.Hv * self.writes
            self.beta_proj = linear_map(C, n * self.K if self.channel_beta else n)
        if self.channel_beta:
            self.write_proj = linear_map(C, n * self.V)
        if self.linear_decay in ("head", "channel"):
            per_head, rank = (1, 0) if self.linear_decay == "head" else (self.K, self.K)
            self.decay_proj = linear_map(C, self.Hv * per_head, rank)
            # Mamba's start: dt log-uniform in [0.001, 0.1], A in [1, 16], a memory of 1 to 1000 tokens. With
            # dt_bias = 1 (transformers' Qwen3-Next) it would be a tenth of a token.
            dt = torch.empty(self.Hv * per_head)
            dt = dt.uniform_(math.log(1e-3), math.log(0.1)).exp()
            self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))      # softplus(dt_bias) = dt
            A = torch.ones(self.Hv)
            if self.decay_gate != "lower":
                A.uniform_(1, 16)
            self.A_log = nn.Parameter(A.log())
        if self.out_gate:
            rank = self.out_gate_rank
            if rank is None:
                rank = self.low_rank_gate * self.V
            self.gate_proj = linear_map(C, self.Hv * self.V, rank)
        self.o_norm = nn.RMSNorm(self.V, eps=config.norm_eps)
        self.o_proj = linear_map(self.Hv * self.V, C)

    def mix(self, x, step, cache):
        if step.causal or self.bidir != "backward":
            return self.scan(x, step.valid, self.two_scans(step.causal), cache, step.commit)
        need(cache is None,
             "bidir=backward starts at the end of the text and has no cache: use bidir=sum or causal=True")
        valid = None if step.valid is None else step.valid.flip(1)
        return self.scan(x.flip(1), valid, False).flip(1)

    def two_scans(self, causal):
        return not causal and self.bidir == "sum"

    def scan(self, x, valid, both, cache=None, commit=True):
        """The layer, from the left or from both ends. Tokens that are not valid write and decay nothing."""
        if valid is not None:
            x = x.masked_fill(~valid[:, :, None], 0)
        qkv = self.qkv_proj(x)
        before = self.conv_size - 1
        if cache is None:
            qkv = F.pad(qkv, (0, 0, before, 0))
        else:
            qkv = torch.cat([cache.conv.to(qkv.dtype), qkv], dim=1)
        mixed = F.silu(short_conv(qkv, self.conv_weight, both))
        if valid is not None:
            mixed = mixed.masked_fill(~valid[:, :, None], 0)                    # k v^T = 0
        q, k, v = mixed.split(self.sizes, dim=-1)
        q = l2_norm(heads(q, self.H))                                           # (B, H, T, K)
        k = l2_norm(self.in_turn(heads(k, self.H * self.writes)))               # (B, H, T writes, K)
        v = self.in_turn(heads(v, self.Hv * self.writes))                       # (B, Hv, T writes, V)
        if self.Hv > self.H:
            q, k = (a.repeat_interleave(self.Hv // self.H, dim=1) for a in (q, k))
        state = None if cache is None else cache.state
        o, S = self.rule(x, q, k, v, self.log_decay(x, valid), state, not both)
        if cache is not None and commit:
            cache.conv.copy_(last_tokens(qkv.unsqueeze(1), before, valid).squeeze(1))
            cache.state.copy_(S)
        y = self.o_norm(o.transpose(1, 2).to(self.o_norm.weight.dtype))         # (B, T, Hv, V)
        if self.out_gate:
            z = self.gate_proj(x).view_as(y)
            gate = F.silu if self.out_gate == "silu" else torch.sigmoid
            y = y * gate(z)
        return self.o_proj(y.flatten(2).to(x.dtype))

    def log_decay(self, x, valid):
        """(B, T, C) -> None, (B, Hv, T) or (B, Hv, T, K), at least float32."""
        if self.linear_decay is None:
            return None
        if self.linear_decay == "fixed":                                        # RetNet: 1 - 2^(-5 - head)
            g = torch.log1p(-2.0 ** (-5 - count_to(self.Hv, x).float()))
            g = g.view(-1, 1, 1).expand(x.size(0), -1, x.size(1), 1)
        else:
            f = heads(self.decay_proj(x) + widen(self.dt_bias), self.Hv)
            A = widen(self.A_log).exp().view(-1, 1, 1)
            if self.decay_gate == "lower":
                g = self.g_min * torch.sigmoid(A * f)
            else:
                g = -A * F.softplus(f)
        if valid is not None:
            g = g.masked_fill(~valid[:, None, :, None], 0)
        return g if self.linear_decay == "channel" else g.squeeze(-1)

    def in_turn(self, a):
        """(B, H writes, T, D) -> (B, H, T writes, D): the writes of a token behind each other."""
        return a.unflatten(1, (-1, self.writes)).transpose(2, 3).flatten(2, 3)

    def rule(self, x, q, k, v, g, state, causal):
        one, n = q.size(2) == 1, self.writes
        if self.delta:
            gate = lambda a: self.in_turn(heads(torch.sigmoid(widen(a)), self.Hv * n))
            beta = (1 + self.neg_eigval) * gate(self.beta_proj(x))              # (B, Hv, T writes, 1 or K)
            beta = beta if self.channel_beta else beta.squeeze(-1)
            write = gate(self.write_proj(x)) if self.channel_beta else None     # (B, Hv, T writes, V)
            if n > 1:
                q = q.repeat_interleave(n, dim=2)                               # the last one is read
            if n > 1 and g is not None:
                still = [0 * g] * (n - 1)
                g = torch.stack([g, *still], dim=3).flatten(2, 3)
            rule = delta_rule_recurrent if one else delta_rule
            g_min = self.g_min if self.decay_gate == "lower" else None
            o, S = rule(q, k, v, beta, g, state, causal, g_min, write=write)
            return o[:, :, n - 1::n], S
        if self.linear_decay == "head" and self.decay_gate == "softplus":
            # Mamba-2 writes dt v, g = -A dt
            dt = -g / self.A_log.exp()[:, None]
            v = v * dt.unsqueeze(-1).to(v.dtype)
        rule = linear_attention_recurrent if one else linear_attention
        # The norm that follows undoes any scale; 1 keeps small first outputs (Mamba-2's dt v) out of its eps.
        return rule(q, k, v, g, state, causal, scale=1.0)

    def state(self, T):
        conv = self.conv_size - 1, sum(self.sizes)
        return dict(conv=conv, state=(self.Hv, self.K, self.V))

    def reads(self, T, causal=True):
        """Rows of the state, each as large as one key and value: K, whatever T; both scans have one."""
        return self.K * (1 + self.two_scans(causal))

    def flops(self, T, causal=True):
        """The chunk-parallel form in chunks of C = 64 tokens, and the convolution; both scans count."""
        C = min(64, T)
        K = self.K
        V = self.V
        scans = 1 + self.two_scans(causal)
        head = 2 * C * (K + V) + 4 * K * V                              # scores, their use; S' and S q
        if self.delta:
            head += 2 * C * (2 * K + V) + 2 * C * C // 3 + 2 * K * V            # system, inverse, U, W; W S
            head *= self.writes
        elif self.linear_decay is None and scans == 2:
            head = 4 * K * V
            scans = 1                                                           # one matrix for all tokens
        conv = 2 * self.conv_size * sum(self.sizes)
        return T * scans * (self.Hv * head + conv)


class Linear(FixedState):
    """Linear attention, S += k v^T, without a decay or with one.

    linear_decay: fixed (RetNet, Lightning); head (Mamba-2: it writes dt v); channel (GLA: its
    g = logsigmoid(-f) / 16 is the softplus form with A = 1/16).
    """
    settings = FixedState.settings + ("linear_decay", "decay_gate", "g_min")
    published = dict(decay_gate="softplus", out_gate="silu")
    delta = False


class DeltaNet(FixedState):
    """DeltaNet (arXiv 2406.06484): a write replaces what the state held for its key. No decay, no gate."""
    settings = FixedState.settings + ("neg_eigval", "writes")
    published = dict(out_gate=None)


class GatedDeltaNet(FixedState):
    """Gated DeltaNet (arXiv 2412.06464): one decay per head. Qwen3-Next, Qwen3.5, OLMo-Hybrid."""
    settings = FixedState.settings + ("decay_gate", "g_min", "neg_eigval", "writes")
    published = dict(decay_gate="softplus", out_gate="silu")
    linear_decay = "head"


class KDA(FixedState):
    """Kimi Delta Attention (arXiv 2510.26692): a decay per channel, low-rank gates. GLM-5.3-Flash.

    Kimi Linear has decay_gate=softplus, without a bound on the decay; with channel_beta as well it is Gated
    DeltaNet-2 (2605.22791).
    """
    settings = FixedState.settings + ("decay_gate", "g_min", "neg_eigval", "writes", "channel_beta")
    published = dict(decay_gate="lower", out_gate="sigmoid")
    linear_decay = "channel"
    low_rank_gate = True


def l2_norm(x):
    """x / sqrt(sum x^2 + 1e-6) in float32: the eps of fla and of every model since, added, not a maximum."""
    w = widen(x)
    square = w.square().sum(-1, keepdim=True)
    return (w * torch.rsqrt(square + 1e-6)).to(x.dtype)


def short_conv(x, weight, symmetric=False):
    """Depthwise convolution over time: x (B, W-1+T, D), weight (D, W) -> (B, T, D).

    x begins with the W-1 tokens before. The last tap is the token itself, as in nn.Conv1d of the published
    models. symmetric: tap W-1-d also reads d tokens ahead, so that one weight serves both directions, as one
    decay does; beyond the end are zeros.
    """
    if symmetric:
        weight = torch.cat([weight, weight[:, :-1].flip(1)], dim=1)             # (D, 2W-1)
        x = F.pad(x, (0, 0, 0, weight.size(1) // 2))
    if compiling():       # one kernel with what surrounds it, and x is not turned around
        T = x.size(1) - weight.size(1) + 1
        weight = weight.to(x.dtype)
        return sum(x[:, i:i + T] * w for i, w in enumerate(weight.unbind(1)))
    if x.device.type == "cpu" and x.dtype == weight.dtype:
        return Taps.apply(x, weight)
    return F.conv1d(x.mT, weight.unsqueeze(1), groups=weight.size(0)).mT

# ------------------------------------------------------------------------------------------------------------
# Linear attention and the delta rule: how they are made fast

def delta_rule(q, k, v, beta, g=None, state=None, causal=True, g_min=None, reset=None, chunk_size=None,
               scale=None, write=None):
    """delta_rule_recurrent, whose arguments it has, in chunks of tokens side by side.

    g_min: a bound g >= g_min >= -5 that the caller guarantees for per-channel g: about twice as fast. Only
    first derivatives are right: see r and c in `decayed`.
    """
    check_chunk(chunk_size, g_min)
    if reset is not None:
        g_min = None                                                    # a reset is a decay without bound
    return two_way(chunked, q, k, v, beta, g, state, causal, scale, reset, write, g_min=g_min,
                   chunk_size=chunk_size)


def linear_attention(q, k, v, g=None, state=None, causal=True, chunk_size=None, scale=None):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, in O(T). No feature map, no normaliser.

    Shapes as in delta_rule_recurrent. g: log decay <= 0. None: none (arXiv 2006.16236). (B, H, T): one per
    head (RetNet 2307.08621, Mamba-2 2405.21060, Lightning 2401.04658). (B, H, T, K): one per channel (GLA
    2312.06635). causal=False without decay is one matrix for all tokens.
    """
    check_chunk(chunk_size)
    if g is None and not causal:
        return two_way(one_matrix, q, k, v, None, None, state, True, scale)
    return two_way(chunked, q, k, v, None, g, state, causal, scale, g_min=None, chunk_size=chunk_size)


def one_matrix(q, k, v, beta, g, S, twice, scale):
    S = S + widen(k).mT @ widen(v)
    return (q @ S.to(q.dtype)) * scale, S


def check_chunk(chunk_size, g_min=None):
    need(g_min is None or -5 <= g_min <= 0,
         f"g_min {g_min} must lie in [-5, 0]: more decay overflows float32 within 16 tokens; "
         "leave it out, and the exact form is used")
    need(chunk_size is None or chunk_size >= 16 and not chunk_size & (chunk_size - 1),
         f"chunk_size {chunk_size} must be a power of two, at least 16")


def chunked(q, k, v, beta, g, S, twice, scale, g_min, chunk_size):
    """The chunk-parallel core; beta None is linear attention, u = v. For the arguments see two_way.

    Inside a chunk of C tokens with G = cumsum(g) and D_ij = exp(G_i - G_j), u solves a triangular system:
        u_i = beta_i v_i - e^G_i S^T (beta_i k_i) - sum_{j<i} D_ij (beta_i k_i . k_j) u_j
        o_i = e^G_i S^T q_i + sum_{j<=i} D_ij (q_i . k_j) u_j
        S'  = e^G_C S + sum_j e^(G_C - G_j) k_j u_j^T
    (DeltaNet arXiv 2406.06484, Gated DeltaNet 2412.06464, Kimi Delta Attention 2510.26692). Decays, scores,
    inverse and state are float32, the rest has the dtype of q.
    """
    B, H, T, _ = q.shape
    low = q.dtype
    f = S.dtype
    if chunk_size is None:              # the CPU's caches are small: 32 is 10 to 30% faster there
        chunk_size = 32 if on_host(q) else 64
    C = min(chunk_size, max(16, 1 << (T - 1).bit_length()))
    N = -(-T // C)
    size = 1 << N.bit_length() // 2 if compiling() else 1     # chunks in a group, ~ sqrt(N)
    pad = -T % (C * size)                                                       # zeros do not change S

    def chunks(a):                                                              # -> (P, N, C, .), P = B H
        a = F.pad(a, (0, 0, 0, pad)) if pad else a
        return a.reshape(B * H, -1, C, a.size(-1))
    if beta is not None:
        beta = chunks(beta)
    q = chunks(q).to(f)
    k = chunks(k).to(f)
    through, scores, ins, k_out = decayed(q, k, beta, chunks(g), scale, g_min)
    if twice:                                                                   # read first: no diagonal
        first, second = scores[0].chunk(2)
        scores[0] = torch.cat([first, second.tril(-1)])
    U = chunks(v)
    W = None
    if beta is not None:
        X = inverse_of_one_minus(scores[1].flatten(0, 1))
        X = X.view_as(scores[1]).to(low)
        U = X @ U.to(low)
        W = X @ ins[1].to(low)
    scan = scan_chunks if size == 1 else functools.partial(scan_groups, size=size)
    states, u, S = scan(through, k_out, U, W, S.flatten(0, 1))
    o = ins[0].to(low) @ states.to(low) + scores[0].to(low) @ u
    o = o.reshape(B, H, -1, o.size(-1))
    return o[:, :, :T], S.unflatten(0, (B, H))


def decayed(q, k, beta, g, scale, g_min):
    """What chunked needs of each chunk before the scan; all (P, N, C, .), k in the dtype of the state.

    -> through, how much of S is left behind the chunk (P, N, 1 or K, 1); scores [D q.k, -beta D k.k]; what
    multiplies S, [e^G q, -beta e^G k]; and e^(G_C - G_j) k_j.
    """
    # After a strong decay G_i - G_j is a small difference of large numbers: float64 where the device has it.
    exact = k.dtype if k.device.type == "mps" else torch.float64
    G = g.detach().cumsum(-2, dtype=exact)
    r = c = last = k.new_ones(1, 1, 1, 1)
    if g.requires_grad:
        # The gradient of G is what decayed from its row minus what decayed to it: dG = q dq - k dk (GLA,
        # arXiv 2312.06635). r and c have the value 1 and carry it, so that no exponential needs a gradient.
        z = (g - g.detach()).cumsum(-2)
        r = 1 + z
        c = 1 - z
        last = 1 + z[:, :, -1:]
    rows = [q * (r * scale)]
    if beta is not None:
        rows.append(k * (r * -beta))
    through = G[:, :, -1:].exp().to(k.dtype) * last
    args = rows, k * c, G, last
    scored = head_scores(*args) if G.size(-1) == 1 else channel_scores(*args, g_min)
    return through.mT, *scored


def scan_chunks(through, k_out, U, W, S):
    """u = U + W S, S' = through S + k_out^T u -> S before each chunk (P, N, K, V), each u, the last S."""
    states = []
    us = []
    W = [None] * U.size(1) if W is None else W.unbind(1)                # None: linear attention, u = v
    for d, kT, u, w in zip(through.unbind(1), k_out.mT.unbind(1), U.unbind(1), W):
        u = u if w is None else torch.baddbmm(u, w, S.to(u.dtype))
        states.append(S)
        us.append(u)
        S = torch.baddbmm(d * S, kT, u.to(S.dtype))
    return torch.stack(states, 1), torch.stack(us, 1), S


def head_scores(rows, k, G, last):
    """One decay per head: rows is [q] or [q, erase], all (P, N, C, K); G (P, N, C, 1). See chunked."""
    f = k.dtype
    D = (G - G.mT).to(f).exp_().tril_()                                 # above the diagonal: maybe inf
    into = G.exp().to(f)
    out = (G[:, :, -1:] - G).exp().to(f) * last
    scores = [(a @ k.mT) * d for a, d in zip(rows, (D, D.tril(-1)))]
    return scores, [a * into for a in rows], k * out


def channel_scores(rows, k, G, last, g_min):
    """A decay per channel: rows is [q] or [q, erase], all and G (P, N, C, K). See chunked.

    sum_d q_id k_jd exp(G_id - G_jd) is a matmul once the exponent is split at a reference between j and i.
    Below the diagonal that is G at the first row of the lower tile: both factors are at most 1 whatever g is,
    and no row looks at a later one (a reference in the middle leaks the future through rounding). Tiles
    double in size from c rows. With c = 1 this is exact for every g; with g >= -5 the factors of c = 16 rows
    also fit in float32, exp(5 * 15) = 4e32.
    """
    C = G.size(-2)
    f = k.dtype
    c = 1 if g_min is None else 16
    k, G, *rows = (a.unflatten(2, (-1, c)) for a in (k, G, *rows))              # (P, N, C/c, c, K)
    R = G[..., :1, :]
    if c > 1:
        down = (G - R).to(f)
        k = k * (-down).exp()
        rows = [a * down.exp() for a in rows]
    into = R.exp().to(f)
    out = (G[:, :, -1:, -1:] - R).exp().to(f)
    out = out * last.unsqueeze(2)
    ins = [(a * into).flatten(2, 3) for a in rows]
    k_out = (k * out).flatten(2, 3)
    scores = [(a @ k.mT).tril(-i) for i, a in enumerate(rows)]                  # (P, N, n, c, c), n tiles
    while scores[0].size(2) > 1:
        n = scores[0].size(2) // 2                                              # merge n pairs of s * c rows
        s = C // (2 * n * c)

        def halves(a):
            return a.unflatten(2, (n, 2, s)).unbind(3)                          # (P, N, n, s, c, K) each
        R0, R1 = halves(R)
        border = R1[:, :, :, :1]
        down = (R1 - border).exp().to(f)
        up = (border - R0).exp().to(f)
        k_up = (halves(k)[0] * up).flatten(3, 4)
        for i, (a, A) in enumerate(zip(rows, scores)):
            upper, lower = A.unflatten(2, (n, 2)).unbind(3)
            across = (halves(a)[1] * down).flatten(3, 4) @ k_up.mT
            top = F.pad(upper, (0, across.size(-1)))
            bottom = torch.cat([across, lower], dim=-1)
            scores[i] = torch.cat([top, bottom], dim=-2)
    return [A.squeeze(2) for A in scores], ins, k_out


def inverse_of_one_minus(N):
    """(I - N)^-1 for strictly lower triangular N (P, C, C), by substitution.

    The power series I + N + N^2 + ... is not as accurate: with correlated keys its terms reach 1e7 before
    they cancel, even when it is summed by doubling.
    """
    eye = torch.eye(N.size(-1), dtype=N.dtype, device=N.device).expand_as(N)
    X = torch.linalg.solve_triangular(-N.detach(), eye, upper=False, unitriangular=True)
    # dX = X dN X needs nothing but the inverse: a term of value 0 carries it.
    return torch.baddbmm(X, X, (N - N.detach()) @ X) if N.requires_grad else X

# ------------------------------------------------------------------------------------------------------------
# Sparse softmax attention: a cheap score chooses the blocks of keys that a query reads
#
# `sel` (B, H_kv, T, NB) bool says which blocks a query reads; all heads of a group choose together (NSA: each
# key is then loaded once per group). With tile > 1 so do neighbouring queries: such a pick has looked at all
# queries of the tile, so the layers share picks only where nothing is causal. Slots and limits as in Step.

def block_sparse_attention(q, k, v, sel, key_block, causal=True, limit=None, most=None, scale=None,
                           path=None):
    """Softmax attention over chosen blocks of keys. q (B, H, T, D); k, v (B, H_kv, S, D) -> (B, H, T, Dv).

    sel (B, H_kv or 1, T, ceil(S / key_block)) bool; a query with nothing to read gives 0. limit (1 or B, T):
    query t reads slots < limit[t]; default from causal, the queries being the last T of S. most: a bound on
    the picks of a query, which torch.compile cannot count. path, all exact and equal up to rounding:
        "dense"   a (T, S) mask: the definition, any device
        "gather"  brings its blocks to each query: decoding
        "blocks"  brings its queries to each block: long texts on a CPU
        "flex"    FlexAttention, CUDA: skips the blocks that no query of a tile picked
    None: the first of flex, gather and blocks that pays (see pick_path), or dense.

    >>> q, k, v = torch.randn(3, 1, 2, 100, 16)                        # B 1, H 2, T 100, D 16
    >>> means = F.pad(k, (0, 0, 0, 4)).unflatten(2, (13, 8)).mean(3)   # one key for each of 13 blocks of 8
    >>> slots = torch.arange(100)[None]
    >>> score = lambda rows, end: q[:, :, rows] @ means.mT
    >>> sel = select_blocks(score, slots, limit=slots + 1, n_blocks=13, key_block=8, topk=4)
    >>> sel.shape, block_sparse_attention(q, k, v, sel, key_block=8).shape
    (torch.Size([1, 2, 100, 13]), torch.Size([1, 2, 100, 16]))
    """
    B, H, T, _ = q.shape
    Hkv, S = k.shape[1:3]
    h = sel.size(1)
    NB = -(-S // key_block)
    need(sel.shape == (B, h, T, NB) and h in (1, Hkv),
         f"sel has shape {tuple(sel.shape)}, expected (B, H_kv, T, ceil(S / key_block)), "
         f"which is {(B, Hkv, T, NB)}")
    if limit is None:
        t = count_to(T, q)[None]
        limit = t + 1 + S - T if causal else torch.full_like(t, S)
    limit = limit.expand(B, T)
    path, most = pick_path(path, q, k, v, sel, key_block, limit, most)
    if path != "dense":
        forms = dict(gather=gather_attention, blocks=block_by_block, flex=flex_block_attention)
        q = q.unflatten(1, (Hkv, -1)).transpose(2, 3)                           # (B, Hkv, T, G, D)
        y = forms[path](q, k, v, sel.expand(-1, Hkv, -1, -1), key_block, limit, scale, most)
        return y.transpose(2, 3).flatten(1, 2)
    q, k, v = (a.unflatten(1, (h, -1)).flatten(0, 1) for a in (q, k, v))  # groups as rows: one mask each

    def masked(rows, end):
        mask = keys_read(sel, rows, limit, end, key_block)
        mask = mask.flatten(0, 1).unsqueeze(1)
        known = k[:, :, :end], v[:, :, :end]
        return softmax_attention(q[:, :, rows], *known, mask=mask, scale=scale)
    return in_slices(masked, limit, S).unflatten(0, (B, h)).flatten(1, 2)


def keys_read(sel, rows, limit, S, key_block):
    """(B, h, t, S) bool: which keys a slice of the queries reads; sel None: all below the limit."""
    mask = count_to(S, limit) < limit[:, None, rows, None]
    if sel is None:
        return mask
    picked = sel[:, :, rows, :-(-S // key_block)]
    return mask & picked.repeat_interleave(key_block, dim=3)[..., :S]


def in_slices(f, limit, S, step=1024):
    """f(rows, end), (., ., t, ...) each, for all slices of the queries, side by side; they read slots < end.

    What takes (T, S) memory runs in these. What a slice keeps for its backward pass is made again there, if
    there are several. On a GPU they are longer, because a compiled graph holds every slice.
    """
    T = limit.size(1)
    step = 4 * step if limit.is_cuda else step
    parts = []
    for i in range(0, max(T, 1), step):
        rows = slice(i, min(i + step, T))
        parts.append((rows, min(S, int(limit[:, rows].amax())) if on_host(limit) and T else S))
    if len(parts) > 1 and torch.is_grad_enabled() and not compiling():
        f = functools.partial(checkpoint, f, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([f(*part) for part in parts], dim=2)


def top_k(scores, k):
    """The k largest along the last dim, -inf meaning invisible -> index and picked (bool), (..., min(k, S)).

    Descending, ties to the earliest index, exactly min(k, visible) picked. Ties are common (ReLU scores,
    bf16) and torch.topk breaks them by memory layout, so parallel and cached selection would differ. Each
    float32 score is mapped to an integer of the same order, with the index in the low bits: no two are equal.
    """
    S = scores.size(-1)
    bits = (scores.detach().float() + 0.0).view(torch.int32)        # + 0.0: -0.0 and 0.0 are a tie
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = order.long().mul_(2 ** 32).add_(S - 1 - count_to(S, scores))
    index = key.topk(min(k, S), dim=-1).indices
    return index, scores.gather(-1, index) > -math.inf


@torch.no_grad()
def select_blocks(score, slots, limit, n_blocks, key_block, topk, init=0, local=1, tile=1, dense_len=0):
    """Which blocks each query reads -> sel (b, h, T, n_blocks) bool.

    score(rows, end) -> (b, h, t, n) for a slice of the queries, some at a time: the scores of 64k tokens fit
    in memory. They read no slot from `end` on, so that n may stop there. slots, limit (b, T): where a query
    sits and how many slots it may read. Forced are the first `init` blocks, the `local` ones up to the
    query's own (and as many behind it, if it sees them), and all when limit <= dense_len; they count among
    the topk. The queries of a tile add up their scores, and force what any of them forces.
    """
    T = slots.size(1)
    own = torch.minimum(slots, limit - 1) // key_block

    def choose(rows, stop):
        at = count_to(T, slots)[rows][::tile]               # slots rise, and limits do not fall
        to = (at + tile - 1).clamp(max=T - 1)
        first, last, end = (a[:, None, :, None] for a in (own[:, at], own[:, to], limit[:, to]))
        s = score(rows, stop)
        j = count_to(s.size(-1), s)
        visible = j * key_block < end
        near = (j > first - local) & (j < last + local)
        forced = (j < init) | near | (end <= dense_len)
        if tile > 1:
            hidden = (slots >= limit)[:, None, rows, None]
            s = s.masked_fill(hidden, 0)                                        # padding adds nothing
            s = F.pad(s, (0, 0, 0, -s.size(2) % tile))
            s = s.unflatten(2, (-1, tile)).sum(dim=3)
        ranked = s.masked_fill(forced, math.inf).masked_fill(~visible, -math.inf)
        index, picked = top_k(ranked, topk)
        best = torch.zeros_like(s, dtype=torch.bool).scatter(-1, index, picked)
        picked = F.pad((best | forced) & visible, (0, n_blocks - len(j)))
        return picked.repeat_interleave(tile, dim=2)
    step = max(1024 // tile, 1) * tile
    return in_slices(choose, limit, n_blocks * key_block, step)[:, :, :T]


class BlockSparse(Full):
    """What nsa, infllm and msa share: the projections of `full`, the choice of blocks, the caches."""
    family = "sparse"
    settings = ROTATED + ("n_kv_head", "rotary_fraction", "attn_gate", "sel_block", "sel_topk", "sel_init",
                          "sel_local", "sel_tile")
    takes_mask = False
    window = sink = None
    pooled = ()                     # buffers of compressed keys and values
    dense_len = 0
    cmp_block = cmp_stride = 1

    def __init__(self, config):
        super().__init__(config)
        self.rewrites = False
        self.sel_tile = self.sel_tile or self.sel_block
        forced = self.sel_init + self.sel_local
        need(self.sel_topk >= forced,
             f"sel_topk {self.sel_topk} must be at least sel_init + sel_local = {forced}: "
             "the first and the local blocks are always read and count among the sel_topk")
        near = forced + self.sel_local + self.sel_tile // self.sel_block
        self.most = max(self.sel_topk, near, -(-self.dense_len // self.sel_block))      # picks of a query
        need(self.cmp_block % self.cmp_stride == self.sel_block % self.cmp_stride == 0,
             f"cmp_stride {self.cmp_stride} must divide both cmp_block {self.cmp_block} "
             f"and sel_block {self.sel_block}")

    def read(self, x, step, cache, **more):
        """Project x and put it into the cache with `more` buffers -> q (B, H, T, D), all that can be read."""
        q, k, v = self.project(x, step)
        return q, *put(cache, {"k": k, "v": v, **more}, step)

    def selected(self, score, q, k, v, step):
        """Attention of q to the blocks with the best score(rows, end) -> (B, H, T, D), sel or None: all."""
        block = self.sel_block
        S = k.size(2)
        if S <= max(self.dense_len, self.sel_topk * block):
            return read_all(q, k, v, step), None
        tile = 1 if step.causal else self.sel_tile
        sel = select_blocks(score, step.slots, step.limit, -(-S // block), block, self.sel_topk,
                            self.sel_init, self.sel_local, tile, self.dense_len)
        y = block_sparse_attention(q, k, v, sel, block, step.causal, step.limit, self.most)
        return y, sel

    def compressed(self, q, ck, step, pool):
        """The score function of compressed keys, for `selected`."""
        sizes = self.sel_block, self.cmp_block, self.cmp_stride

        def score(rows, end):
            known = self.complete(ck, end)
            return compressed_scores(q[:, :, rows], known, step.limit[:, rows], end, *sizes, pool)
        return score

    def compress(self, f, name, k, step, cache):
        """f(window) for every complete window of k (B, h, S, D) -> (B, h, NC, D), one at least.

        Computed are the windows that the new tokens complete, from k, which is its own running tail; the
        cache has the others. Windows that are not complete are garbage, computed again later.
        """
        first = (step.slots[:, :1] - self.cmp_block) // self.cmp_stride + 1
        i = first.clamp(min=0) + count_to(-(-step.slots.size(1) // self.cmp_stride), k)
        i = i.expand(k.size(0), -1)
        ck = f(key_windows(k, i, self.cmp_block, self.cmp_stride))
        if cache is not None:
            buffer = getattr(cache, name)
            at = i.clamp(max=buffer.size(2) - 1)            # the last window is never complete
            at = at[:, None, :, None].expand_as(ck)
            buffer.scatter_(2, at, ck.to(buffer.dtype))
            ck = buffer
        return self.complete(ck, k.size(2)).to(k.dtype)

    def state(self, T):
        """One window more than can be complete: it takes what is left over."""
        pooled = self.Hkv, T // self.cmp_stride + 1, self.D
        return super().state(T) | dict.fromkeys(self.pooled, pooled)

    def complete(self, ck, S):
        """The windows that are complete in S slots, one at least."""
        return ck[:, :, :max(self.windows_at(S), 1)]

    def windows_at(self, T):
        """Complete compression windows in T tokens."""
        return max((T - self.cmp_block) // self.cmp_stride + 1, 0)

    def reads(self, T, causal=True):                        # of k and v; what the choice scans comes on top
        return T if T <= self.dense_len else self.block_reads(T, causal)

    def block_reads(self, T, causal):
        """Keys in the chosen blocks of the last of T queries, its own, perhaps partial, block among them.

        Bidirectional: of the query that reads most, in a long text. The blocks that a tile touches are
        forced: a wide tile exceeds the topk.
        """
        block = self.sel_block
        own = (T - 1) // block
        if causal:
            return min(own, self.sel_topk - 1) * block + T - own * block
        across = self.sel_tile - math.gcd(block, self.sel_tile)
        touched = (across + block - 1) // block + 1
        return min(T, max(self.sel_topk, self.sel_init + 2 * (self.sel_local - 1) + touched) * block)


class NSA(BlockSparse):
    """Native sparse attention (DeepSeek, arXiv 2502.11089): three branches, mixed by sigmoid gates.

    Compressed: every cmp_stride tokens an MLP turns cmp_block keys (values) and their places in the window
    into one. Selected: the sel_topk blocks with most compressed attention, the first and two local ones
    forced. Window: the last `window` tokens. Only the compressed branch trains the compression: the choice
    has no gradient. Published: sel_block 64, sel_topk 16, sel_init 1, sel_local 2, cmp 32/16, window 512. The
    paper has a K/V for each branch; like all public code we share one, and compress keys after their rotation
    (as fla does).
    """
    settings = BlockSparse.settings + ("window", "cmp_block", "cmp_stride")
    published = dict(sel_block=64, sel_topk=16, sel_init=1, sel_local=2, window=512)
    pooled = "ck", "cv"

    def __init__(self, config):
        super().__init__(config)
        self.near = self.window
        self.window = None                                                      # the cache keeps all tokens
        # One vector for each place in the window, for keys and for values.
        self.window_pos = nn.Parameter(torch.zeros(2, self.cmp_block, self.D))
        self.k_compress = self.compressor()
        self.v_compress = self.compressor()
        self.branch_proj = nn.Linear(config.n_embd, 3 * self.H, bias=config.bias)

    def compressor(self):
        return nn.Sequential(
            linear_map(self.cmp_block * self.D, self.D),
            nn.GELU(),
            linear_map(self.D, self.D))

    def mix(self, x, step, cache):
        q, k, v = self.read(x, step, cache)
        places = self.window_pos.to(k.dtype)
        ck = self.compress(lambda w: self.k_compress((w + places[0]).flatten(-2)), "ck", k, step, cache)
        cv = self.compress(lambda w: self.v_compress((w + places[1]).flatten(-2)), "cv", v, step, cache)
        ends = count_to(ck.size(2), x) * self.cmp_stride + self.cmp_block

        def compressed(rows, end):                          # 0 before the first window
            read = [self.complete(a, end) for a in (ck, cv)]
            mask = ends[:read[0].size(2)] <= step.limit[:, None, rows, None]
            return softmax_attention(q[:, :, rows], *read, mask=mask)
        old = in_slices(compressed, step.limit, k.size(2))
        score = self.compressed(q, ck, step, "sum")
        selected, _ = self.selected(score, q, k, v, step)
        if step.plain and step.length == x.size(1):
            near = softmax_attention(q, k, v, step.causal, self.near)
        else:
            near = window_attention(q, k, v, step.slots, step.limit, self.near, step.causal)
        gates = heads(torch.sigmoid(self.branch_proj(x)), 3 * self.H)           # (B, 3 H, T, 1)
        a, b, c = gates.chunk(3, dim=1)
        return self.output(a * old + b * selected + c * near, x)

    def reads(self, T, causal=True):
        near = self.near if causal else 2 * self.near - 1
        return self.windows_at(T) + self.block_reads(T, causal) + min(T, near)

    def flops(self, T, causal=True):
        # 1.5: the scores of compressed keys are computed twice.
        pairs = total(lambda t, causal: 1.5 * self.windows_at(t) + self.block_reads(t, causal), T, causal)
        return int(4 * self.H * self.D * (pairs + count_visible(T, causal, self.near)))


class InfLLM(BlockSparse):
    """InfLLM-V2 (MiniCPM4, arXiv 2509.24663): no parameters of its own, so checkpoints of `full` load.

    Blocks are chosen by attention to mean-pooled keys; a query that sees at most dense_len tokens reads them
    all. Published (MiniCPM4.1): sel_block 64, sel_topk 64, sel_init 1, window 2048 = sel_local 33, cmp 32/16,
    dense_len 8192. MoBA (arXiv 2502.13189) is the setting cmp_block = cmp_stride = sel_block, sel_init=0,
    sel_local=1, dense_len=0 and sel_per_head=True: each head chooses for itself (the paper: blocks of 512,
    sel_topk=3).
    """
    settings = BlockSparse.settings + ("cmp_block", "cmp_stride", "dense_len", "sel_per_head")
    published = dict(sel_block=64, sel_topk=64, sel_init=1, sel_local=33)
    pooled = "ck",

    def mix(self, x, step, cache):
        q, k, v = self.read(x, step, cache)
        with torch.no_grad():
            ck = self.compress(lambda w: w.mean(dim=3), "ck", k, step, cache)
        if self.sel_per_head:
            G = self.H // self.Hkv
            k, v, ck = (a.repeat_interleave(G, dim=1) for a in (k, v, ck))
        score = self.compressed(q, ck, step, "max")
        y, _ = self.selected(score, q, k, v, step)
        return self.output(y, x)


    def flops(self, T, causal=True):
        if T <= max(self.dense_len, self.sel_topk * self.sel_block):
            return super().flops(T, causal)
        # Half, as compressed keys have scores but no values.
        pairs = total(lambda t, causal: self.reads(t, causal) + self.windows_at(t) / 2, T, causal)
        return int(4 * self.H * self.D * pairs)


class Indexed:
    """What msa and dsa share: an index with queries and one key per token, which picks what is read.

    It reads detached inputs and learns from aux["indexer_kl"] alone. layer.stage:
        "dense"   attention to all, no loss of the index
        "warmup"  still dense, its loss over all visible keys: train the index only (V3.2: 1000 steps)
        "sparse"  attention to what it chose, its loss over that: train all, LM loss + aux["indexer_kl"]
    """
    stage = "sparse"

    def state(self, T):
        return dict(super().state(T), ki=(1, T, self.Di))

    def learn(self, step, score, q, k, sel, key_block=1, scale=None):
        """Add the mean KL of valid queries, over the keys that they read, to step.aux["indexer_kl"]."""
        if step.aux is None or self.stage == "dense":
            return

        def divergence(rows, end):
            mask = keys_read(sel, rows, step.limit, end, key_block)
            return indexer_kl(score(rows, end), q[:, :, rows], k[:, :, :end], mask, scale)
        kl = in_slices(divergence, step.limit, k.size(2))                       # (B, h, T)
        if step.valid is not None:
            share = step.valid.numel() / step.valid.sum().clamp(min=1)
            kl = kl.masked_fill(~step.valid[:, None], 0) * share
        step.aux["indexer_kl"] = step.aux.get("indexer_kl", 0) + kl.mean()


class MSA(Indexed, BlockSparse):
    """MiniMax sparse attention (MiniMax-M3, arXiv 2606.13392): an index head per group picks blocks.

    A block's score is the best raw product of the group's index query with its index keys, one key for all
    groups. The index learns the group's mean attention. Published: sel_block 128, sel_topk 16, sel_local 1,
    index_head_dim 128 (None: the head width), qk_norm=True.
    """
    settings = BlockSparse.settings + ("index_head_dim",)
    published = dict(sel_block=128, sel_topk=16, sel_init=0, sel_local=1)

    def __init__(self, config):
        super().__init__(config)
        self.Di = config.index_head_dim or self.D
        need(self.Di >= self.rope_dim,
             f"index_head_dim {self.Di} must be at least {self.rope_dim}, the rotated channels")
        self.index_q_proj = linear_map(config.n_embd, self.Hkv * self.Di)
        self.index_k_proj = linear_map(config.n_embd, self.Di)
        self.index_q_norm = Norm(self.Di, config.norm_eps)
        self.index_k_norm = Norm(self.Di, config.norm_eps)

    def mix(self, x, step, cache):
        qi = self.index_q_norm(heads(self.index_q_proj(x.detach()), self.Hkv))  # (B, Hkv, T, Di)
        ki = self.index_k_norm(heads(self.index_k_proj(x.detach()), 1))         # (B, 1, T, Di)
        qi, ki = step.rotate(qi, ki, self.rope_dim, self.angles)
        q, k, v, ki = self.read(x, step, cache, ki=ki)

        def best(rows, end):
            return index_block_scores(qi[:, :, rows], ki[:, :, :end], step.limit[:, rows], self.sel_block)
        sel = None
        if self.stage == "sparse":
            y, sel = self.selected(best, q, k, v, step)
        else:
            y = read_all(q, k, v, step)
        score = lambda rows, end: qi[:, :, rows] @ ki[:, :, :end].mT
        self.learn(step, score, q, k, sel, self.sel_block)
        return self.output(y, x)

    def flops(self, T, causal=True):
        main = 4 * self.H * self.D * total(self.reads, T, causal)
        return main + 2 * self.Hkv * self.Di * count_visible(T, causal)


class DSA(Indexed, MLA):
    """DeepSeek sparse attention (DeepSeek-V3.2): MLA whose indexer picks sel_topk single tokens per query.

    Published: sel_topk 2048, index_n_head 64 (None: n_head / 2), index_head_dim 128 (None: v_head_dim). The
    rotated channels come first and are half-split here, while MLA's are interleaved. Only decoding is faster
    than MLA: no two queries pick the same tokens, so there is no tile of keys to skip, and training computes
    every score and masks it, as DeepSeek's own short prefill does, and those of the index besides.
    """
    family = "sparse"
    settings = MLA.settings + ("sel_topk", "index_n_head", "index_head_dim")
    published = dict(sel_topk=2048)
    takes_mask = rewrites = False

    def __init__(self, config):
        super().__init__(config)
        self.Hi = config.index_n_head or max(1, self.H // 2)
        self.Di = config.index_head_dim or max(self.Dv, self.rope)
        need(self.Di >= self.rope,
             f"index_head_dim {self.Di} must be at least {self.rope}, the rotated channels")
        self.index_q_proj = linear_map(self.q_b_proj.in_features, self.Hi * self.Di)
        self.index_k_proj = linear_map(config.n_embd, self.Di)
        self.index_k_norm = nn.LayerNorm(self.Di, eps=1e-6)
        self.index_w_proj = linear_map(config.n_embd, self.Hi)

    def mix(self, x, step, cache):
        q, latent, source = self.project(x, step)
        qi = heads(self.index_q_proj(source.detach()), self.Hi)                 # (B, Hi, T, Di)
        ki = self.index_k_norm(self.index_k_proj(x.detach()))
        ki = ki.to(q.dtype).unsqueeze(1)                                        # (B, 1, T, Di)
        qi, ki = step.rotate(qi, ki, self.rotated, self.angles)
        w = self.index_w_proj(x.detach()).float() * self.Hi ** -0.5             # (B, T, Hi)
        latent, ki = put(cache, {"latent": latent, "ki": ki}, step)
        S = latent.size(2)
        score = lambda rows, end: lightning_scores(qi[:, :, rows], ki[:, :, :end], w[:, rows])
        sel = None
        if self.stage == "sparse" and S > self.sel_topk:
            own = 0 if step.causal else 1                   # bidirectional: the own token is always read
            sel = select_blocks(score, step.slots, step.limit, S, 1, self.sel_topk, local=own)

        def attention(q, k, v, scale):  # naive: k has all heads; absorbed: one, the latent
            self.learn(step, score, q, k, sel, scale=scale)
            if sel is None:
                return read_all(q, k, v, step, scale)
            path = None if k.size(1) == 1 else "dense"
            return block_sparse_attention(q, k, v, sel, 1, limit=step.limit, most=self.sel_topk, scale=scale,
                                          path=path)
        return self.output(q, latent, attention, cache)

    def reads(self, T, causal=True):                        # of latents; all index keys are scanned besides
        return min(T, self.sel_topk)

    def flops(self, T, causal=True):
        return super().flops(T, causal) + 2 * self.Hi * (self.Di + 1) * count_visible(T, causal)


def compressed_scores(q, ck, limit, S, key_block, size, stride, pool):
    """Block scores by compressed keys: q (B, H, T, D), ck (B, h, NC, D) -> (B, h, T, ceil(S / key_block)).

    Softmax over the complete windows, added up over the heads of a group, then pooled to blocks. pool "sum"
    (NSA, arXiv 2502.11089 eq. 9-10): a window counts by how many strides of it lie in the block, 1 2 2 2 1
    for 32/16/64. pool "max" (InfLLM-V2, arXiv 2509.24663): the best of the windows that touch the block.
    """
    s = q.unflatten(1, (ck.size(1), -1)) @ ck.unsqueeze(2).mT                   # (B, h, G, T, NC)
    s = s.float() * q.size(-1) ** -0.5
    ends = count_to(ck.size(2), q) * stride + size
    hidden = (ends > limit[..., None])[:, None, None]
    p = s.masked_fill(hidden, -math.inf).softmax(dim=-1)
    p = p.masked_fill(hidden, 0).sum(dim=2)                                     # (B, h, T, NC); no key: 0
    a = size // stride
    b = key_block // stride
    n = -(-S // key_block)
    # Windows j b - a + 1 ... j b + b - 1 touch block j.
    p = F.pad(p, (a - 1, max(n * b - p.size(-1), 0)))
    p = p.unfold(-1, a + b - 1, b)[..., :n, :]                                  # (B, h, T, n, a + b - 1)
    if pool == "max":
        return p.amax(dim=-1)
    o = torch.arange(1 - a, b, device=q.device)
    overlap = (o + a).clamp(max=b) - o.clamp(min=0)                             # of [o, o + a) and [0, b)
    return p @ overlap.to(p.dtype)


def index_block_scores(q, k, limit, key_block):
    """MSA's best raw score per block: q (B, h, T, D), k (B, 1, S, D) -> (B, h, T, ceil(S / key_block)).

    On a CPU a few blocks at a time: their scores stay in its cache, and few of them need a mask.
    """
    S = k.size(2)
    size = -(-256 // key_block) * key_block if on_host(q) else S
    best = []
    for slots, part in zip(count_to(S, q).split(size), k.split(size, dim=2)):
        s = q @ part.mT
        hidden = slots >= limit[:, None, :, None]
        if not on_host(q) or bool(hidden.any()):
            s = s.masked_fill(hidden, -math.inf)
        s = F.pad(s, (0, -len(slots) % key_block), value=-math.inf)
        best.append(s.unflatten(-1, (-1, key_block)).amax(dim=-1))
    return torch.cat(best, dim=-1)


def lightning_scores(q, k, w):
    """DSA's indexer, sum_h w_h relu(q_h . k / sqrt(D)), (B, 1, T, S).

    q (B, h, T, D), k (B, 1, S, D), w (B, T, h). Scores of exactly 0 are common (all heads at 0): only top_k's
    rule for ties makes the choice well defined.
    """
    s = 0
    for head, weight in zip(q.unbind(1), w.unbind(2)):      # one at a time: (B, T, S) is large
        hit = F.relu(head * q.size(-1) ** -0.5 @ k[:, 0].mT)
        s = s + hit * weight.unsqueeze(-1)
    return s.unsqueeze(1)


def indexer_kl(scores, q, k, mask, scale=None):
    """KL(p || softmax(scores)) of each query, (B, h, T); p: mean attention of the heads of an index head.

    scores (B, h, T, S); q (B, H, T, D), k (B, H_kv, S, D) of the attention itself, to which no gradient
    flows. mask (B or 1, h or 1, T, S) bool: the visible keys (DSA's warm-up) or the chosen ones (its sparse
    stage), one at least per query.
    """
    scores = widen(scores)
    with torch.no_grad():
        a = q.unflatten(1, (k.size(1), -1)) @ k.unsqueeze(2).mT
        a = a * (scale or q.size(-1) ** -0.5)
        a = a.flatten(1, 2).unflatten(1, (scores.size(1), -1))                  # (B, h, H / h, T, S)
        a = a.to(scores.dtype).masked_fill(~mask.unsqueeze(2), -math.inf)
        p = a.softmax(dim=-1).mean(dim=2)
    log_q = scores.masked_fill(~mask, -math.inf).log_softmax(dim=-1)
    log_q = log_q.masked_fill(~mask, 0)                                         # never 0 times -inf
    return F.kl_div(log_q, p, reduction="none").sum(dim=-1)



def window_attention(q, k, v, slots, limit, window, causal):
    """A sliding window over slots, of cached keys or with padding: only keys around the queries are read."""
    size = q.size(2) + (window - 1) * (2 - causal)
    slots = slots.expand(q.size(0), -1)
    s = slots[:, :1] - (window - 1) + count_to(size, q)       # (B, size)
    mask = visible_slots(slots, s, limit, window, causal)
    k, v = (key_windows(a, s[:, :1], size, 1).squeeze(2) for a in (k, v))
    return softmax_attention(q, k, v, mask=mask)


def total(reads, T, causal):
    """Sum over the queries of T tokens of reads(t, causal), what the last query of t tokens reads."""
    return sum(reads(t, True) for t in range(1, T + 1)) if causal else T * reads(T, False)

# ------------------------------------------------------------------------------------------------------------
# The registry: a layer is chosen by its name, and a new one is known once it stands here

ATTENTION = {"full": Full, "mla": MLA, "nsa": NSA, "infllm": InfLLM, "dsa": DSA, "msa": MSA,
             "linear": Linear, "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet, "kda": KDA}

# ------------------------------------------------------------------------------------------------------------
# Fast forms for one device or the compiler: SDPA, FlexAttention, gathered blocks, a convolution, groups

SAFE_UNDER_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa(q, k, v, causal, scale, mask):
    """torch's fused kernel, asked in the shapes in which it is fast; S = T when causal."""
    B, H, T, D = q.shape
    Dv = v.size(-1)
    h = k.size(1)
    if Dv < D and T > 16:
        v = F.pad(v, (0, D - Dv))                           # MLA: the fast kernels want one width
    if H != h and (T == 1 or T < D and (mask is not None or not causal)):
        # A few queries: for enable_gqa SDPA may copy all keys once per query head. As rows of one head they
        # share them.
        if mask is not None:
            mask = mask.expand(B, H, T, k.size(2)).unflatten(1, (h, -1)).flatten(2, 3)
        q = q.unflatten(1, (h, -1)).flatten(2, 3)
        y = sdpa(q, k, v, False, scale, mask)
        return y[..., :Dv].unflatten(2, (H // h, T)).flatten(1, 2)          # from (B, h, G T, Dv)
    # cuDNN's kernel in torch 2.13 can return NaN gradients under a mask (huggingface/trl #7181)
    causal = causal and mask is None and T > 1
    with sdpa_kernel(SAFE_UNDER_MASK) if mask is not None and q.is_cuda else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=H != h)
    return y[..., :Dv]


def long_window_attention(q, k, v, causal, window, sink, scale):
    """A stretch of queries at a time against the keys around it: O(T window), and never a (T, S) mask."""
    T = q.size(2)
    S = k.size(2)
    if sink is None and flex_pays(q, v) and T == S:
        return flex_window_attention(q, k, v, causal, window, scale)
    t = count_to(S, q)
    i = S - T
    y = []
    for part in q.split(max(window, 128), dim=2):
        j = i + part.size(2)
        keys = slice(max(0, i - window + 1), j if causal else j + window - 1)
        mask = visible(t[i:j], t[keys], causal, window)
        near = k[:, :, keys], v[:, :, keys]
        y.append(softmax_attention(part, *near, sink=sink, scale=scale, mask=mask))
        i = j
    return torch.cat(y, dim=2)


def flex_pays(q, v):
    """Is FlexAttention worth it? On CUDA, for the head widths that its kernel takes.

    It is compiled anew for every shape, some seconds each, and beyond eight shapes torch gives up and runs it
    with all scores in memory: outside of a compiled graph for long inputs only.
    """
    least = 128 if compiling() else 1024
    return q.is_cuda and q.size(-2) >= least and min(q.size(-1), v.size(-1)) >= 16


@functools.lru_cache
def compiled_flex():
    # torch 2.13 generates broken code for symbolic shapes
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def flex(q, k, v, count, index, columns, mask_mod, scale):
    """flex_attention over the first `count` tiles of each row of `index`, 128 queries by `columns` keys.

    Compiled: not on the CPU, which has its forward pass only, and not twice in a graph.
    """
    lengths = q.size(2), k.size(2)
    mask = flex_attention.BlockMask.from_kv_blocks(count.int(), index.int(), BLOCK_SIZE=(128, columns),
                                                   mask_mod=mask_mod, seq_lengths=lengths)
    run = flex_attention.flex_attention
    if q.is_cuda and not compiling():
        run = compiled_flex()
    return run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))


def in_memory(a):
    """a, put into memory by as_strided where a graph is compiled.

    Inductor fails for CUDA on a FlexAttention mask that it would have to compute on the fly: results of
    pointwise operations in mask_mod (torch 2.11), numbers of tiles by arange (2.13). For the CPU it is the
    other way round: there it fails on such a view.
    """
    a = a.contiguous()
    return a.as_strided(a.shape, a.stride()) if a.is_cuda else a


def flex_window_attention(q, k, v, causal, window, scale):
    """A sliding window by FlexAttention, T = S: tiles of 128 x 128 that the band touches, then mask_mod."""
    T = q.size(2)
    tile = in_memory(count_to(-(-T // 128), q))
    first = (tile * 128 - window + 1).clamp(min=0) // 128
    last = tile if causal else ((tile * 128 + 126 + window) // 128).clamp(max=len(tile) - 1)
    index = (first[:, None] + tile) % len(tile)             # all columns: flex transposes it

    def mask_mod(b, h, t, s):
        return (t - s < window) & ((t >= s) if causal else (s - t < window))
    count = last - first + 1
    return flex(q, k, v, count[None, None], index[None, None], 128, mask_mod, scale)


def pick_path(path, q, k, v, sel, key_block, limit, most):
    """The path of block_sparse_attention, by default one that pays, and a bound on the picks of a query."""
    need(path in (None, "dense", "gather", "blocks", "flex"),
         f"path '{path}' is unknown: dense, gather, blocks, flex or None")
    S = k.size(2)
    G = q.size(1) // k.size(1)
    # Do tokens and blocks fill tiles of 128 x 128?
    whole = 128 % G == 0 and 0 in (key_block % 128, 128 % key_block)
    need(path != "flex" or whole,
         f"path 'flex' needs H / H_kv = {G} to divide 128, and key_block {key_block} to divide 128 "
         "or be a multiple of it: use dense or gather")
    most = most or sel.size(-1)
    if path is not None:
        return path, most
    if flex_pays(q, v) and whole and q.size(-1) <= 256:     # wider heads (absorbed MLA) do not fit
        return "flex", most
    host = on_host(q)
    if host and sel.numel():
        most = max(int(sel.sum(-1).amax()), 1)
    if 2 * q.size(2) * most * key_block <= S:
        return "gather", most
    if host and key_block >= 32:                            # small blocks: the time goes into their number
        if 2 * S * sel.mean(dtype=torch.float32) <= limit.mean(dtype=torch.float32):
            return "blocks", most
    return "dense", most


def flex_block_attention(q, k, v, sel, key_block, limit, scale, most):
    """The flex path. The G heads of a group are folded into the rows, row = t G + g.

    A tile of 128 rows is 128 / G tokens, neighbours whose picks overlap, and loads each key once per group,
    as NSA's own kernel does. Tiles are 128 x 128 at least: without max_autotune the backward kernel takes no
    smaller ones. mask_mod keeps the choice exact per token. Never create_block_mask here: on a mask that
    depends on data it evaluates all T x S.
    """
    T, G = q.shape[2:4]
    columns = max(key_block, 128)
    per_tile = columns // key_block
    sel = in_memory(sel)
    limit = in_memory(limit)
    tiles = F.pad(sel, (0, -sel.size(3) % per_tile, 0, -T % (128 // G)))
    tiles = tiles.unflatten(3, (-1, per_tile)).any(4)
    tiles = tiles.unflatten(2, (-1, 128 // G)).any(3)                           # (B, Hkv, rows, columns)
    index = tiles.int().sort(dim=-1, descending=True, stable=True).indices  # all columns: flex transposes it

    # CPU inductor 2.13 gives wrong results, silently, when mask_mod reads the direct output of a scatter in
    # the same graph: select_blocks ends in pointwise operations.
    def mask_mod(b, h, r, s):
        return sel[b, h, r // G, s // key_block] & (s < limit[b, r // G])
    y = flex(q.flatten(2, 3), k, v, tiles.sum(-1), index, columns, mask_mod, scale)
    return y.unflatten(2, (T, G))


def gather_attention(q, k, v, sel, key_block, limit, scale, most):
    """The gather path; no query picks more than `most` blocks."""
    S = k.size(2)
    index, picked = top_k(sel.float().log(), most)                              # of 0 and -inf: ascending
    slots = index[..., None] * key_block + count_to(key_block, q)
    slots = slots.masked_fill(~picked[..., None], S).flatten(3)                 # (B, Hkv, T, keys)
    at = slots.clamp(max=S - 1).flatten(0, 1)
    group = count_to(len(at), q)[:, None, None]
    k, v = (a.flatten(0, 1)[group, at].flatten(0, 1) for a in (k, v))           # (B Hkv T, keys, D)
    mask = (slots < limit[:, None, :, None]).flatten(0, 2)
    rows = q.flatten(0, 2).unsqueeze(2)
    y = softmax_attention(rows, k.unsqueeze(1), v.unsqueeze(1), mask=mask[:, None, None], scale=scale)
    return y.squeeze(2).unflatten(0, slots.shape[:3])


def block_by_block(q, k, v, sel, key_block, limit, scale, most):
    """The blocks path: every block meets the queries that picked it, whatever their neighbours picked."""
    limit = limit[:, None].expand(sel.shape[:3]).flatten()
    rows = q.flatten(0, 2) * (scale or q.size(-1) ** -0.5)
    rows, k, v = (widen(a) for a in (rows, k.flatten(0, 1), v.flatten(0, 1)))
    y = Blocks.apply(rows, k, v, sel.flatten(0, 1), limit, key_block)
    return y.to(q.dtype).unflatten(0, sel.shape[:3])


class Blocks(torch.autograd.Function):
    """softmax(q k^T) v over chosen blocks, one after the other, as in FlashAttention (arXiv 2205.14135).

    A row is a token of one of P = B H_kv groups: q (P T, G, D), k, v (P, S, D), sel (P, T, NB), limit (P T,).
    Nothing is kept per pair but sel: the log-sum-exp of a row gives its weights back.
    """
    @staticmethod
    def forward(ctx, q, k, v, sel, limit, key_block):
        y = q.new_zeros(*q.shape[:2], v.size(-1))
        lse = q.new_full((*q.shape[:2], 1), -1e30)          # nothing read yet; -inf minus itself is NaN
        with no_autocast(q):
            for r, at in visits(sel, key_block):
                s = block_scores(q.index_select(0, r), k[at], at[1].start, limit[r])
                old = lse.index_select(0, r)
                new = torch.logaddexp(old, s.logsumexp(dim=-1, keepdim=True))
                lse.index_copy_(0, r, new)
                add_product(y, r, s.sub_(new).exp_(), v[at], (old - new).exp_())
        ctx.save_for_backward(q, k, v, sel, limit, y, lse)
        ctx.key_block = key_block
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, sel, limit, y, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(a) for a in (q, k, v))
        mean = (dy * y).sum(dim=-1, keepdim=True)
        with no_autocast(q):
            for r, at in visits(sel, ctx.key_block):
                qr, dr = (a.index_select(0, r) for a in (q, dy))
                p = block_scores(qr, k[at], at[1].start, limit[r])
                p = p.sub_(lse.index_select(0, r)).exp_()
                ds = (dr @ v[at].mT).sub_(mean.index_select(0, r)).mul_(p)
                dv[at].addmm_(p.flatten(0, 1).mT, dr.flatten(0, 1))
                dk[at].addmm_(ds.flatten(0, 1).mT, qr.flatten(0, 1))
                add_product(dq, r, ds, k[at])
        return dq, dk, dv, None, None, None


def visits(sel, key_block):
    """(rows, (group, slots)): every block with the rows that picked it, some at a time."""
    P, T, NB = sel.shape
    p, _, t = sel.mT.nonzero(as_tuple=True)
    rows = (p * T + t).split(sel.sum(dim=1).flatten().tolist())
    for i, block in enumerate(rows):
        first = i % NB * key_block
        for r in block.split(2048):
            yield r, (i // NB, slice(first, first + key_block))


def block_scores(q, k, first, limit):
    """q (n, G, D) and k (m, D) of slots first, first + 1, ... -> (n, G, m), -inf from the row's limit on."""
    s = q @ k.mT
    cut = limit < first + len(k)
    if bool(cut.any()):
        hidden = first + count_to(len(k), k) >= limit[cut, None, None]
        s[cut] = s[cut].masked_fill(hidden, -math.inf)
    return s


def add_product(out, r, a, b, fade=1):
    """out[r] = fade out[r] + a @ b for rows r, each once: index_add_ takes several times as long."""
    rows = out.index_select(0, r).mul_(fade)
    rows.view(-1, out.size(-1)).addmm_(a.flatten(0, 1), b)
    out.index_copy_(0, r, rows)


def depthwise(x, weight):
    """short_conv as a picture of one row, channels last: conv1d would turn x around, and y back."""
    y = F.conv2d(x.mT.unsqueeze(2), weight[:, None, None], groups=len(weight))
    return y.squeeze(2).mT


class Taps(torch.autograd.Function):
    """depthwise for CPUs, where the library's gradient of the weights is slow for few long texts."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return depthwise(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        W = weight.size(1)
        dx = depthwise(F.pad(grad, (0, 0, W - 1, W - 1)), weight.flip(1))
        dweight = torch.zeros_like(weight)
        for t, part in enumerate(grad.split(256, dim=1)):   # what stays in the cache
            for i in range(W):
                read = x[:, 256 * t + i:][:, :part.size(1)]
                dweight[:, i] += (read * part).sum((0, 1))
        return dx, dweight


def scan_groups(through, k_out, U, W, S, size):
    """scan_chunks in about 2 sqrt(N) steps instead of N, for torch.compile, whose graph holds every step.

    A chunk is an affine map of S. Scan each group of `size` chunks, all groups at once, from the identity and
    nothing beside it: what each state would be is then a map, side by side with what it adds. Walk over the
    groups; apply the maps to the state at the start of each.
    """
    K = S.size(1)
    if W is None:                                           # the map of a decay is diagonal
        one = S.new_ones(K, 1)
        apply = lambda m, s: m[..., :1] * s + m[..., 1:]
    else:
        one = torch.eye(K, dtype=S.dtype, device=S.device)
        apply = lambda m, s: m[..., :K] @ s + m[..., K:]
    w = one.size(1)
    grouped = lambda a: a if a is None else a.unflatten(1, (-1, size)).flatten(0, 1)
    args = [grouped(a) for a in (through, k_out, F.pad(U, (w, 0)), W)]
    start = F.pad(one, (0, S.size(2))).expand(len(args[0]), -1, -1)
    maps, _, last = scan_chunks(*args, start)               # (P n, size, K, w + V), (P n, K, w + V)
    starts = []
    for m in last.unflatten(0, (len(S), -1)).unbind(1):
        starts.append(S)
        S = apply(m, S)
    starts = torch.stack(starts, 1).flatten(0, 1)
    states = apply(maps, starts.unsqueeze(1)).view(len(S), -1, K, S.size(2))
    u = U if W is None else U + W @ states.to(U.dtype)
    return states, u, S
