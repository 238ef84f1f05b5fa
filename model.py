"""The language model: a stack of (token mixer, MLP) blocks, one dataclass of settings, presets, counts.

    lm = LM(ModelConfig(vocab_size=257, n_layer=6, n_head=6, n_embd=384))
    logits = lm(idx)                        # (B, T) -> (B, T, V), causal; lm(idx, causal=False) for diffusion

The embedding has one row more than the vocabulary, padded to a multiple of 64: row V is the mask token of diffusion and
also the BOS of AR. The logits are cut to V, so neither is ever predicted. Copy this file together with attention.py.
"""
import dataclasses
import difflib
import re
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import ATTENTION, Cache


@dataclass
class ModelConfig:
    # shape
    vocab_size: int = 257           # V, with <|endoftext|> as its last id
    block_size: int = 128           # window of training, T
    layers: str = "full"            # pattern: "gated_deltanet*3 full", "full(window=128) full", see parse_layers
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128               # C
    # MLP and norm
    mlp: str = "swiglu"             # swiglu | relu2 | gelu
    n_inner: int | None = None      # hidden width of the MLP; None: 8/3 C for swiglu (rounded up to 32), 4 C otherwise
    norm: str = "rms"               # rms | layer
    norm_eps: float = 1e-6
    bias: bool = False              # in the linear layers (and LayerNorm)
    dropout: float = 0.0            # on the embedding and on what each block adds
    tied: bool = True               # the head shares the embedding's weights
    logit_softcap: float | None = None  # logits = cap * tanh(logits / cap) (Gemma 2)
    # positions
    position: str = "rotary"        # rotary | learned | none
    rope_base: float = 10_000.0
    rotary_fraction: float = 1.0    # share of each head's channels that is rotated
    # layer `full`
    n_kv_head: int | None = None    # None: n_head
    head_dim: int | None = None     # None: n_embd // n_head
    qk_norm: bool = False
    attn_gate: bool = False
    window: int | None = None       # sliding window, the token itself counted
    sink: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Layer patterns

def nearest(word, known):
    """' (did you mean X?)' or nothing: the tail of an error about a name."""
    match = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


def parse_value(text):
    """'8' -> 8, '1e-3' -> 0.001, 'true' -> True, 'none' -> None, anything else stays text."""
    low = text.strip().lower()
    if low in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[low]
    for kind in (int, float):
        try:
            return kind(low)
        except ValueError:
            pass
    return text.strip()


def parse_layers(pattern, n_layer):
    """Expand a layer pattern to n_layer entries (name, {field: value}).

    Grammar: item ::= name | name(key=value, ...) | (items), each with an optional *count; items are separated by blanks.
    A pattern shorter than the model is repeated, a longer one is cut: "gated_deltanet*3 full" at depth 48 is Qwen3-Next.
    """
    tokens = re.findall(r"\w+\([^()]*=[^()]*\)|\w+|\*\s*\d+|[()]|\S", pattern)

    def items(i, depth):
        out = []
        while i < len(tokens) and tokens[i] != ")":
            if tokens[i] == "(":
                group, i = items(i + 1, depth + 1)
            else:
                name, _, args = tokens[i].partition("(")
                if name not in ATTENTION:
                    raise ValueError(f"unknown layer '{name}' in the pattern '{pattern}'{nearest(name, ATTENTION)}: "
                                     f"known are {', '.join(ATTENTION)}")
                pairs = [a.partition("=") for a in args.rstrip(")").split(",") if a.strip()]
                group, i = [(name, {k.strip(): parse_value(v) for k, _, v in pairs})], i + 1
            if i < len(tokens) and tokens[i][0] == "*":
                if not tokens[i][1:].strip():
                    raise ValueError(f"layer pattern '{pattern}': * needs a count after it, as in full*3")
                group, i = group * int(tokens[i][1:]), i + 1
            out += group
        if (i < len(tokens)) != (depth > 0):
            raise ValueError(f"layer pattern '{pattern}' has unbalanced parentheses")
        return out, i + 1

    out, _ = items(0, 0)
    if not out:
        raise ValueError(f"layer pattern '{pattern}' names no layer: one of {', '.join(ATTENTION)}")
    return [out[i % len(out)] for i in range(n_layer)]


def override(config, values):
    """A copy of config with some fields set from values; unknown names are refused with the nearest one."""
    known = [f.name for f in dataclasses.fields(config)]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown model setting '{key}'{nearest(key, known)}")
    return dataclasses.replace(config, **values)

# ---------------------------------------------------------------------------------------------------------------------
# The model

def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    raise ValueError(f"norm '{config.norm}' is unknown: rms or layer")


class MLP(nn.Module):
    """swiglu: down(silu(gate x) * up x) (arXiv 2002.05202); relu2: down(relu(up x)^2) (2109.08668); gelu: GPT-2's."""
    def __init__(self, config):
        super().__init__()
        C, self.kind = config.n_embd, config.mlp
        if self.kind not in ("swiglu", "relu2", "gelu"):
            raise ValueError(f"mlp '{self.kind}' is unknown: swiglu, relu2 or gelu")
        inner = config.n_inner or (-(-8 * C // 96) * 32 if self.kind == "swiglu" else 4 * C)
        self.up_proj = nn.Linear(C, inner * (2 if self.kind == "swiglu" else 1), bias=config.bias)  # gate and up in one
        self.down_proj = nn.Linear(inner, C, bias=config.bias)

    def forward(self, x):
        h = self.up_proj(x)
        if self.kind == "swiglu":
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        else:
            h = F.relu(h).square() if self.kind == "relu2" else F.gelu(h)
        return self.down_proj(h)


class Block(nn.Module):
    def __init__(self, name, config):
        super().__init__()
        self.norm1, self.mixer = make_norm(config), ATTENTION[name](config)
        self.norm2, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, **layer_keywords):
        x = x + self.dropout(self.mixer(self.norm1(x), **layer_keywords))
        return x + self.dropout(self.mlp(self.norm2(x)))


class LM(nn.Module):
    """idx (B, T) int64 -> logits (B, T, V). The keywords are those of the layers: see attention.py."""
    def __init__(self, config):
        super().__init__()
        for field in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field} {getattr(config, field)} must be at least 1")
        if config.position not in ("rotary", "learned", "none"):
            raise ValueError(f"position '{config.position}' is unknown: rotary, learned or none")
        self.config, self.V, self.mask_id = config, config.vocab_size, config.vocab_size
        rows, C = -(-(self.V + 1) // 64) * 64, config.n_embd
        self.embed = nn.Embedding(rows, C)
        self.embed_pos = nn.Embedding(config.block_size, C) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(name, override(config, values))
                                    for name, values in parse_layers(config.layers, config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(C, rows, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.warned = False
        init_weights(self)

    def forward(self, idx, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        B, T = idx.shape
        start = cache.used if cache is not None else 0
        if start + T > self.config.block_size:
            self.beyond_block_size(start + T)
        own_pos = pos                       # None lets the layers take their fast path; the values are the same
        if cache is not None:
            pos = cache.positions(T, pos)
        elif pos is None:
            pos = torch.arange(T, device=idx.device)
        x = self.embed(idx)                                                            # (B, T, C)
        if self.embed_pos is not None:
            x = x + self.embed_pos(pos)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, causal=causal, cache=cache.layers[i] if cache is not None else None, commit=commit, pos=own_pos,
                      valid=valid, mask=mask, aux=aux)
        if cache is not None and commit:
            cache.advance(pos, valid)
        return self.logits(self.norm(x))

    def logits(self, x):
        """(B, T, C) after the last norm -> (B, T, V)."""
        w = self.head.weight
        # GPUs like the padded width (nanoGPT: 50257 -> 50304 gave +14%); on the CPU the extra rows are only work.
        z = F.linear(x, w)[..., :self.V] if x.is_cuda else F.linear(x, w[:self.V])
        cap = self.config.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def beyond_block_size(self, T):
        size = self.config.block_size
        if self.embed_pos is not None:
            raise ValueError(f"{T} tokens are more than block_size {size}, and learned positions end there: use a shorter "
                             "text or a model with position=rotary")
        if not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(f"{T} tokens: beyond the block_size {size} that the model was trained with, quality will fall")

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        """One cache for all layers, for max_len tokens a row."""
        device = device or self.embed.weight.device
        return Cache(batch_size, max_len, device,
                     layers=[b.mixer.init_cache(batch_size, max_len, device, dtype) for b in self.blocks])

    def cache_bytes(self, T, dtype):
        """Bytes that one sequence of T tokens keeps between decode steps."""
        return sum(b.mixer.cache_bytes(T, dtype) for b in self.blocks)

    def num_params(self, embedding=True):
        """Parameters, a tied head counted once; embedding=False leaves out embeddings and an untied head."""
        outside = {id(p) for m in (self.embed, self.embed_pos, self.head) if m is not None for p in m.parameters()}
        return sum(p.numel() for p in self.parameters() if embedding or id(p) not in outside)

    def active_params(self, embedding=True):
        """Parameters that one token passes through: all of them in a dense model."""
        return self.num_params(embedding)

    def flops_per_token(self, T=None, causal=True):
        """Training FLOPs per token, forward and backward: 6 (active non-embedding + head parameters) + 3 x the mixers'.

        Causal attention counts its visible half only, so diffusion costs more per token than AR.
        """
        T = T or self.config.block_size
        mixers = sum(b.mixer.flops(T, causal) for b in self.blocks) / T
        return 6 * (self.active_params(embedding=False) + self.V * self.config.n_embd) + 3 * mixers


def init_weights(lm):
    """Every parameter by one rule; one that no rule knows is an error (a forgotten one would keep random memory).

    embed.weight, head.weight   N(0, 0.02)
    linear weights              N(0, 0.02); o_proj and down_proj, which write to the residual stream, N(0, 0.02 / sqrt(2 L)) (GPT-2)
    biases                      0
    norms                       1 (their constructor), LayerNorm's bias 0
    sink                        0 (its constructor)
    """
    std, residual = 0.02, 0.02 / (2 * lm.config.n_layer) ** 0.5
    known = {}
    for name, module in lm.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if p.is_meta:
                continue
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or key == "sink":
                pass
            elif isinstance(module, nn.Linear) and key == "bias":
                nn.init.zeros_(p)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                if p not in known:
                    nn.init.normal_(p, std=residual if name.endswith(("o_proj", "down_proj")) else std)
            else:
                raise ValueError(f"no rule initialises the parameter {name}.{key}: add it to init_weights")
            known[p] = name


# Published models as dictionaries over the same fields; `--n_layer --n_embd ...` make small twins of them.
PRESETS = {
    "small": dict(),                                                                   # ModelConfig's own defaults
    "gpt2": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, mlp="gelu", norm="layer",
                 norm_eps=1e-5, position="learned"),                                   # 124M; bias=False as nanoGPT trains it
    "llama": dict(vocab_size=128256, block_size=8192, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, n_inner=14336,
                  norm_eps=1e-5, rope_base=500_000.0, tied=False),                     # Llama-3.1-8B
}
