"""The language model: a stack of (token mixer, MLP) blocks, one dataclass of settings, presets, counts.

    lm = LM(ModelConfig(vocab_size=257, n_layer=6, n_head=6, n_embd=384))
    logits = lm(idx)                        # (B, T) -> (B, T, V), causal; lm(idx, causal=False) for diffusion

    ModelConfig         all settings; attention.LayerConfig has those of the mixers
    LM, Block           embedding, blocks, norm, head; a block is a mixer (attention.ATTENTION) and an MLP
    MLP, MoE            the MLP, and a mixture of experts in its place
    MTP                 a module that predicts a token further
    init_weights        how every parameter begins
    parse_layers        "gated_deltanet*3 full" -> the layers of a model
    override            a config with some fields changed; check_setting knows what each may hold
    PRESETS             published models; from_preset makes them, or a small twin
    from_pretrained     a published checkpoint, weights and all

The embedding has one row more than the vocabulary, padded to a multiple of 64: row V is the mask token of
diffusion and also the BOS of AR. The logits are cut to V, so neither is ever predicted. Copy this file
together with attention.py.
"""
import dataclasses
import difflib
import json
import math
import mmap
import os
import re
import shlex
import types
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import (ATTENTION, CHOICES, RANGES, Cache, LayerConfig, check_values, compiling, count_to,
                       need, no_autocast, on_host, step_of, top_k, widen)


@dataclass
class ModelConfig(LayerConfig):
    """Settings of the whole model, and those of its layers, which attention.LayerConfig lists:
    n_head, window, sel_topk ..."""
    # shape
    vocab_size: int = 257           # V, with <|endoftext|> as its last id
    block_size: int = 128           # window of training, T
    layers: str = "full"  # pattern: "gated_deltanet*3 full", "full(window=128) full", see parse_layers
    n_layer: int = 4
    # MLP and norm
    mlp: str = "swiglu"  # swiglu | swiglu_clamped (gpt-oss) | relu2 | gelu | gelu_new (GPT-2's tanh form)
    n_inner: int | None = None  # width inside; None: 8/3 C for swiglu (rounded up to 32), 4 C otherwise
    norm: str = "rms"               # rms | layer
    dropout: float = 0.0            # on the embedding and on what each block adds
    mlp_dropout: float = 0.0        # inside a dense MLP
    causal: bool = False            # true: stays causal when trained as diffusion (an ablation)
    tied: bool = True               # the head shares the embedding's weights
    logit_softcap: float | None = None  # logits = cap * tanh(logits / cap) (Gemma 2)
    shift: bool = False             # not causal: logits at i are of token i + 1, as in AR (Dream)
    mtp: float = 0.0                # weight of the loss of a module that predicts a token further, 0: none
    # mixture of experts in place of the MLP
    n_expert: int = 0               # E, 0: a dense MLP
    n_expert_active: int = 2        # experts a token is sent to
    expert_inner: int | None = None  # of one expert; None: the active ones together are n_inner wide
    shared_inner: int = 0           # hidden width of the shared expert that every token passes, 0: none
    router: str = "sigmoid"  # sigmoid (DeepSeek-V3: bias rule) | softmax (Qwen3-Next: balance loss)
    router_scale: float = 1.0       # sigmoid: the renormalised weights are multiplied by this
    router_bias_step: float = 1e-3  # sigmoid: how far each step moves the selection bias, 0: no balancing
    router_aux: float = 1e-3        # softmax: coefficient of the balance loss
    n_expert_group: int = 1         # sigmoid: experts come in groups, and a token may choose only from the
    n_expert_group_active: int = 1  # best few of them (DeepSeek-V3: 8 and 4)

    def __post_init__(self):
        self.position = self.position or "none"                     # parse_value makes None of none
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))


class LM(nn.Module):
    """idx (B, T) int64 -> logits (B, T, V). The keywords are those of the layers, see attention.py: what they
    say of this call is worked out once, as a `Step` (causal or not, positions, padding, slots of the cache);
    aux is a dictionary to which layers add losses. Row V of the embedding is AR's BOS and diffusion's mask.
    """
    def __init__(self, config):
        super().__init__()
        layers = parse_layers(config.layers, config.n_layer)
        need_memory(config)
        self.config, self.V, self.mask_id = config, config.vocab_size, config.vocab_size
        rows, C = -(-(self.V + 1) // 64) * 64, config.n_embd
        self.embed = nn.Embedding(rows, C)
        self.embed_pos = nn.Embedding(config.block_size, C) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(name, override(config, values)) for name, values in layers)
        self.norm = make_norm(config)
        self.head = nn.Linear(C, rows, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        name, values = layers[-1]
        self.mtp = nn.ModuleList(MTP(name, override(config, values)) for _ in range(config.mtp > 0))
        init_weights(self)

    def forward(self, idx, causal=True, cache=None, commit=True, pos=None, valid=None, mask=None, aux=None):
        need(mask is None or not self.config.causal, "causal=true reads no mask=: train it as mdm")
        step = step_of(idx, cache, causal or self.config.causal, commit, pos, valid, mask, aux)
        if pos is None:
            self.check_length(idx.size(1) if compiling() else step.length)      # a graph cannot count
        elif self.embed_pos is not None and not compiling():
            need(pos.min() >= 0 and pos.max() < self.config.block_size,
                 f"pos must lie between 0 and {self.config.block_size - 1}, where learned positions end")
        x = self.embed(idx)                         # (B, T, C)
        if self.embed_pos is not None:
            x += self.embed_pos(step.pos)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, step, None if cache is None else cache.layers[i])
        if cache is not None and commit:
            cache.advance(step)
        if self.mtp and causal:
            if cache is not None:
                cache.last = x, step                # where `draft` begins
            elif aux is not None:
                aux["mtp"] = self.config.mtp * self.mtp_loss(idx, x, step)
        if self.config.shift and not causal:
            need(cache is None and mask is None,
                 "a model with shift=true reads no cache or mask= unless it is causal")
            x = torch.cat([x[:, :1], x[:, :-1]], 1)
        return self.logits(self.norm(x))

    def logits(self, x):
        """(B, T, C) after the last norm -> (B, T, V)."""
        w = self.head.weight
        # GPUs like the padded width (nanoGPT: 50257 -> 50304 gave +14%); on the CPU the extra rows are only
        # work.
        z = F.linear(x, w)[..., :self.V] if x.is_cuda else F.linear(x, w[:self.V])
        cap = self.config.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    def mtp_loss(self, idx, x, step):
        """Nats per token: x, what the blocks say of place i, and the token at i + 1 predict that at i + 2."""
        x = self.mtp[0](x, self.embed(idx.roll(-1, 1)), step)
        z = widen(self.logits(self.norm(x[:, :-2])))
        return F.cross_entropy(z.flatten(0, 1), idx[:, 2:].flatten())

    def draft(self, canvas, at, cache, pick):
        """For diffusion.sample_ar: what the module has for place at (B,) of each row, as pick gives it, after
        a pass whose valid tokens before it are true. Its keys lie in the cache behind the blocks'."""
        x, step = cache.last
        valid = step.valid & (step.pos < at[:, None])
        own = step_of(x, cache, pos=step.pos, valid=valid)
        x = self.mtp[0](x, self.embed(canvas.gather(1, step.pos)), own, cache.layers[-1])
        x = x[count_to(len(x), x), valid.sum(1).clamp(min=1) - 1]
        return pick(self.logits(self.norm(x)).unsqueeze(1))

    def check_length(self, T):
        size = self.config.block_size
        need(T <= size or self.embed_pos is None,
             f"{T} tokens are more than block_size {size}, and learned positions end there: "
             "use a shorter text or a model with position=rotary")
        if T > size and not compiling():        # Python shows one text once
            warnings.warn(f"a text beyond the block_size {size} of its training: there a model is worse")

    @property
    def has_cache(self):
        """Does every layer say its `state`? Without it, sampling computes the prefix anew for each token."""
        return all(hasattr(b.mixer, "state") for b in self.blocks)

    def init_cache(self, batch_size, max_len, device=None, dtype=None):
        """One cache for all layers, for max_len tokens per row: it counts, they have buffers alone."""
        sizes = batch_size, max_len, device or self.embed.weight.device
        mixers = [b.mixer for b in (*self.blocks, *self.mtp)]
        layers = [types.SimpleNamespace(**mixer.buffers_for(*sizes, dtype)) for mixer in mixers]
        return Cache(*sizes, layers=layers)

    def cache_bytes(self, T, dtype):
        """Bytes that one sequence of T tokens keeps between decode steps."""
        return sum(b.mixer.cache_bytes(T, dtype) for b in self.blocks)

    def num_params(self, embedding=True):
        """Parameters, a tied head counted once; embedding=False leaves out embeddings and an untied head."""
        outside = () if embedding else ("embed", "head")
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(outside))

    def active_params(self, embedding=True):
        """Parameters that one token passes through: of a mixture's E experts, k."""
        count = self.num_params(embedding)
        for moe in self.moes():
            experts = [p[0].numel() for name, p in moe.named_parameters() if name.startswith("expert_")]
            count -= sum(experts) * (moe.E - moe.k)
        return count

    def moes(self):
        return [m for m in self.modules() if isinstance(m, MoE)]

    def flops_per_token(self, T=None, causal=True):
        """Training FLOPs per token, forward and backward:
        6 (active non-embedding + head parameters) + 3 x the mixers'.

        Causal attention counts its visible half only, so diffusion costs more per token than AR.
        """
        T, causal = T or self.config.block_size, causal or self.config.causal
        mixers = sum(m.flops(T, causal) for m in self.modules() if hasattr(m, "flops")) / T
        heads = (1 + len(self.mtp)) * self.V * self.config.n_embd
        return 6 * (self.active_params(embedding=False) + heads) + 3 * mixers


class Block(nn.Module):
    """(B, T, C) -> (B, T, C): x + mixer(norm(x)), then + mlp(norm(x))."""
    def __init__(self, name, config):
        super().__init__()
        self.norm1, self.mixer = make_norm(config), ATTENTION[name](config)
        self.norm2, self.mlp = make_norm(config), (MoE if config.n_expert else MLP)(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, step, cache=None):
        x = x + self.dropout(self.mixer(self.norm1(x), causal=step.causal, cache=cache, step=step))
        return x + self.dropout(self.mlp(self.norm2(x), step.aux, step.valid))


class MTP(Block):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 section 2.2), one token further: what the blocks
    say of a place, x (B, T, C), and the embedding of the token that they predict -> (B, T, C), what says the
    one after. Embedding, last norm and head are the model's."""
    def __init__(self, name, config):
        super().__init__(name, config)
        self.x_norm, self.token_norm = make_norm(config), make_norm(config)
        self.in_proj = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x, token, step, cache=None):
        both = torch.cat([self.x_norm(x), self.token_norm(token)], dim=-1)
        return super().forward(self.in_proj(both), step, cache)


def make_norm(config):
    if config.norm == "layer":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


# ------------------------------------------------------------------------------------------------------------
# MLP and mixture of experts

GATED = ("swiglu", "swiglu_clamped")


class MLP(nn.Module):
    def __init__(self, config, inner=None):
        super().__init__()
        self.kind = config.mlp
        inner = inner or inner_width(config)
        self.dropout = nn.Dropout(config.mlp_dropout)
        self.up_proj = nn.Linear(config.n_embd, up_width(config, inner), bias=config.bias)
        self.down_proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x, aux=None, valid=None):
        return self.down_proj(self.dropout(activate(self.up_proj(x), self.kind)))


def inner_width(config):
    if config.n_inner:
        return config.n_inner
    return -(-8 * config.n_embd // 96) * 32 if config.mlp in GATED else 4 * config.n_embd


def up_width(config, inner):
    return 2 * inner if config.mlp in GATED else inner              # gate and up in one


def activate(h, kind):
    """swiglu: silu(gate) * up, both halves of h (arXiv 2002.05202); swiglu_clamped: gpt-oss's, gate *
    sigmoid(1.702 gate) * (up + 1) with both clamped at 7; relu2: relu(h)^2 (2109.08668); gelu_new: GPT-2's
    own gelu, by a tanh."""
    if kind == "relu2":
        return F.relu(h).square()
    if kind in ("gelu", "gelu_new"):
        return F.gelu(h, approximate="tanh" if kind == "gelu_new" else "none")
    gate, up = h.chunk(2, dim=-1)
    if kind == "swiglu":
        return F.silu(gate) * up
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)


class MoE(nn.Module):
    """Mixture of experts: each token passes k of E small MLPs, chosen by a router,
    and a shared one. (B, T, C) -> same.

    Two routers, in float32. sigmoid (DeepSeek-V3, arXiv 2412.19437 section 2.1.2): scores s = sigmoid(router
    x); the k largest of s + bias are chosen, weighted by s without the bias, renormalised and scaled. The
    bias has no gradient: `balance` moves it towards equal load. softmax (Qwen3-Next): p = softmax(router x),
    the k largest, renormalised; the shared expert behind a sigmoid gate; a balance loss E sum_e f_e P_e goes
    into aux (Switch, 2101.03961), f_e the choices of e per token (`share`) and P_e the mean of p_e.
    f is that of the last whole batch, over all its micro-batches and processes (2501.11873): so the loss is a
    mean over tokens, and does not depend on how a batch is cut. Both routers balance only where `balance` is
    called, once per optimizer step.

    Two ways to compute, equal by a test: every expert for every token, weighted by zero where not chosen (any
    device and dtype, E/k times the work), and grouped_mm on tokens sorted by expert. No token is dropped, no
    host sync.
    """
    def __init__(self, config):
        super().__init__()
        C, E, k = config.n_embd, config.n_expert, config.n_expert_active
        G, active = config.n_expert_group, config.n_expert_group_active
        need(not config.mlp_dropout, "mlp_dropout is for a dense MLP: with experts use dropout")
        need(E % G == 0 and active <= G and k <= E // G * active,
             f"n_expert {E} in n_expert_group {G} groups with n_expert_group_active {active}: groups must be "
             f"equal, and n_expert_active {k} must not exceed the experts of the active ones")
        self.E, self.k, self.G, self.groups = E, k, G, active
        self.kind = config.mlp
        self.sigmoid = config.router == "sigmoid"
        self.scale = config.router_scale
        self.bias_step = config.router_bias_step
        self.aux_weight = config.router_aux
        f = config.expert_inner or max(8, inner_width(config) // k // 8 * 8)
        up = up_width(config, f)
        self.router = nn.Linear(C, E, bias=config.bias)
        self.expert_up = nn.Parameter(torch.empty(E, C, up).normal_(std=0.02))
        self.expert_down = nn.Parameter(torch.empty(E, f, C).normal_(std=0.02))
        self.expert_up_bias = nn.Parameter(torch.zeros(E, up)) if config.bias else None
        self.expert_down_bias = nn.Parameter(torch.zeros(E, C)) if config.bias else None
        self.shared = MLP(config, config.shared_inner) if config.shared_inner else None
        self.shared_gate = nn.Linear(C, 1, bias=False) if config.shared_inner and not self.sigmoid else None
        self.register_buffer("bias", torch.zeros(E))
        self.register_buffer("count", torch.zeros(E), persistent=False)  # choices since the last balance()
        share = None if self.sigmoid else torch.full((E,), k / E)    # f of the last whole batch
        self.register_buffer("share", share)

    def route(self, x):
        """x (N, C) -> weights (N, k), experts (N, k) int64, probabilities (N, E):
        float32, or float64 where x is."""
        x = widen(x)
        with no_autocast(x):
            logits = F.linear(x, *(p.to(x.dtype) for p in self.router.parameters()))
        p = logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1)
        choice = p.detach() + self.bias
        if self.G > 1:                                              # a group is as good as its best two
            groups = choice.view(-1, self.G, self.E // self.G)
            best_two = groups.topk(min(2, groups.size(-1)), dim=-1).values.sum(dim=-1)
            best = top_k(best_two, self.groups)[0]
            barred = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, best, False)
            choice = groups.masked_fill(barred[..., None], -torch.inf).flatten(1)
        experts = top_k(choice, self.k)[0]
        weights = p.gather(1, experts)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scale if self.sigmoid else weights, experts, p

    def forward(self, x, aux=None, valid=None):
        """valid (B, T) bool: what is False is padding and counts neither as load nor in the balance loss."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])                                                # (N, C)
        weights, experts, p = self.route(x)
        real = torch.ones_like(p[:, 0]) if valid is None else valid.reshape(-1).to(p.dtype)
        if self.training:
            self.count += self.choices(experts, real)
        if aux is not None and not self.sigmoid:
            P = real @ p / real.sum().clamp(min=1)                  # (E,)
            aux["balance"] = aux.get("balance", 0.0) + self.aux_weight * self.E * (self.share * P).sum()
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        up, down = self.expert_up.to(dtype), self.expert_down.to(dtype)
        path = self.grouped if self.groupable(up, down) else self.every
        y = path(x.to(dtype), up, down, weights, experts)
        if self.shared is not None:
            gate = 1 if self.shared_gate is None else torch.sigmoid(self.shared_gate(x))
            y = y + gate * self.shared(x)
        return y.view(shape)

    def choices(self, experts, real):
        """How often each expert was chosen, (E,) int32: experts (N, k), real (N,), 0 for padding, else 1."""
        one = real.int().repeat_interleave(self.k)
        return one.new_zeros(self.E).scatter_add_(0, experts.flatten(), one)

    @torch.no_grad()
    def balance(self, move=True):
        """Once per optimizer step: one step of the bias towards equal load,
        or the share that the balance loss reads.

        Returns the counts (E,) of this step and clears them. With several processes sum `count` over them
        first.
        """
        count = self.count.clone()
        if move and self.sigmoid:
            delta = self.bias_step * torch.sign(count.mean() - count)
            self.bias += delta - delta.mean()
        elif move:
            self.share.copy_(self.k * count / count.sum().clamp(min=1))
        self.count.zero_()
        return count

    def every(self, x, up, down, weights, experts):
        """The definition: sum over all experts of weight x expert(x), weight 0 where not chosen."""
        w = weights.new_zeros(len(x), self.E).scatter(1, experts, weights)
        bias = lambda b, y: y if b is None else y + b[:, None].to(y.dtype)
        h = bias(self.expert_up_bias, torch.einsum("nc,ecf->enf", x, up))
        y = bias(self.expert_down_bias, torch.einsum("enf,efc->enc", activate(h, self.kind), down))
        return torch.einsum("enc,ne->nc", y, w.to(x.dtype))

    def grouped(self, x, up, down, weights, experts):
        """The same on tokens sorted by expert: one matrix product a group, however long the groups are."""
        order = experts.flatten().argsort(stable=True)              # (N k,)
        back = torch.empty_like(order)
        back = back.scatter_(0, order, count_to(len(order), x)).view_as(experts)
        ends = self.choices(experts, torch.ones_like(x[:, 0])).cumsum(0).int()     # cumsum makes int64 of it
        bias = lambda b, y: y if b is None else y + b.to(y.dtype)[experts.flatten()[order]]
        x = Spread.apply(x, order, back)                            # (N k, C)
        h = bias(self.expert_up_bias, F.grouped_mm(x, up, offs=ends))
        y = bias(self.expert_down_bias, F.grouped_mm(activate(h, self.kind), down, offs=ends))
        return Combine.apply(y, weights.to(y.dtype), order, back)

    def groupable(self, up, down):
        """grouped_mm takes bf16 on CUDA; on a CPU float32 too, but not compiled
        (torch 2.13); rows of 16 bytes."""
        dtype = up.dtype
        aligned = all(w.size(i) * dtype.itemsize % 16 == 0 for w in (up, down) for i in (1, 2))
        if dtype == torch.bfloat16:
            return aligned and up.device.type in ("cpu", "cuda")
        return aligned and dtype == torch.float32 and on_host(up)


def sum_rows(y, rows, weights=None):
    """sum_j weights[n, j] y[rows[n, j]]: y (M, C), rows (N, k) -> (N, C).
    In a fixed order, and on a CPU without a copy of the rows."""
    if on_host(y):
        return F.embedding_bag(rows, y, mode="sum", per_sample_weights=weights)
    y = y[rows]
    return (y if weights is None else y * weights[..., None]).sum(1)


class Spread(torch.autograd.Function):
    """x (N, C) -> (N k, C), each row k times, in the order of the experts;
    `back` (N, k) says where they went.

    The gradient is a sum of gathered rows. That of index_select adds row after row into zeros: on a CPU by a
    kernel call a row, on a GPU by atomics, in an order that changes from run to run.
    """
    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(back)
        return x.index_select(0, order // back.size(1))

    @staticmethod
    def backward(ctx, grad):
        return sum_rows(grad, ctx.saved_tensors[0]), None, None


class Combine(torch.autograd.Function):
    """The way back: y (N k, C), weights (N, k) -> (N, C), the weighted sum of each token's k rows."""
    @staticmethod
    def forward(ctx, y, weights, order, back):
        ctx.save_for_backward(y, weights, order, back)
        return sum_rows(y, back, weights)

    @staticmethod
    def backward(ctx, grad):
        y, weights, order, back = ctx.saved_tensors
        grad = grad.index_select(0, order // back.size(1))          # (N k, C)
        # one number a row: compiled for a GPU the second is one kernel, on a CPU it is a copy of all rows
        if y.device.type == "cpu":
            dw = torch.bmm(grad.unsqueeze(1), y.unsqueeze(2)).flatten()
        else:
            dw = (grad * y).sum(-1)
        return grad * weights.flatten()[order, None], dw[back], None, None


# ------------------------------------------------------------------------------------------------------------
# How parameters begin

OWN_INIT = ("sink", "window_pos", "A_log", "dt_bias", "conv_weight")


def init_weights(lm):
    """Every parameter by one rule;
    one that no rule knows is an error (a forgotten one would keep random memory).

    embed.weight, head.weight   N(0, 0.02)
    linear weights              N(0, 0.02); o_proj and down_proj, which write to the residual stream,
                                N(0, 0.02 / sqrt(2 L)) (GPT-2)
    biases, experts' biases     0
    norms                       1 (their constructor), LayerNorm's bias 0
    expert_up, expert_down      as linear weights and down_proj
    OWN_INIT                    by the constructor of the layer, whose docstring says how
    """
    residual = 0.02 / (2 * lm.config.n_layer) ** 0.5
    for name, p in lm.named_parameters():
        path, _, key = name.rpartition(".")
        module = lm.get_submodule(path)
        if p.is_meta or isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or key in OWN_INIT:
            continue
        need(isinstance(module, (nn.Linear, nn.Embedding)) or key.startswith("expert_"),
             f"no rule initialises the parameter {name}: add it to init_weights")
        if key.endswith("bias"):
            nn.init.zeros_(p)
        else:
            to_stream = path.endswith(("o_proj", "down_proj")) or key == "expert_down"
            nn.init.normal_(p, std=residual if to_stream else 0.02)


# ------------------------------------------------------------------------------------------------------------
# Settings: what each may hold, and layer patterns

# What a field may hold, ends included: numbers from the first to the second, or one of these words. A whole
# number that is not named here lies between 1 and 65,536.
LIMITS = {
    "vocab_size": (1, 2 ** 24), "block_size": (1, 2 ** 24), "n_layer": (1, 10_000), "n_inner": (1, 2 ** 18),
    "n_expert": (0, 2 ** 16), "shared_inner": (0, 2 ** 18), "dropout": (0, 0.99), "mlp_dropout": (0, 0.99),
    "logit_softcap": (1e-3, 10 ** 6), "mtp": (0, 10),
    "router_scale": (1e-3, 1000), "router_bias_step": (0, 1), "router_aux": (0, 1000),
    "mlp": (*GATED, "relu2", "gelu", "gelu_new"), "norm": ("rms", "layer"),
    "router": ("sigmoid", "softmax"), **RANGES, **CHOICES,
}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}


def check_setting(field, value):
    """ValueError where a field of ModelConfig holds another type than its own,
    or a value outside of its range."""
    kinds = typing.get_args(field.type) or (field.type,)
    limits = LIMITS.get(field.name, (1, 2 ** 16))
    if str in kinds and field.name in LIMITS:
        words = [str(word).lower() for word in limits]
        right, expected = value in limits, ", ".join(words) + nearest(str(value), words)
    else:
        taken = (*kinds, int) if float in kinds else kinds
        right = isinstance(value, taken) and isinstance(value, bool) == (bool in kinds)
        expected = " or ".join(KINDS[kind] for kind in kinds)
        if int in taken:
            right = right and (value is None or limits[0] <= value <= limits[1])    # nan is in no range
            expected = expected.replace("number", f"number from {limits[0]:,} to {limits[1]:,}", 1)
    need(right, f"model setting {field.name} {value!s:.60}: expected {expected}")


def need_memory(config, size=4):
    """ValueError before memory is allocated:
    where the parameters, of `size` bytes each, are more than the machine's memory."""
    if torch.get_default_device().type != "cpu" or not hasattr(os, "sysconf"):      # meta, or Windows
        return
    with torch.device("meta"):
        count = LM(config).num_params()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need(size * count < memory, f"the model has {count:,} parameters, {size * count / 2 ** 30:,.0f} GiB, the "
         f"machine {memory / 2 ** 30:,.0f} GiB: lower n_embd {config.n_embd}, n_layer {config.n_layer}, "
         f"vocab_size {config.vocab_size}, n_expert {config.n_expert}, or the widths of heads and MLP")


def nearest(word, known):
    """' (did you mean X?)' or nothing: the tail of an error about a name."""
    match = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{match[0]}'?)" if match else ""


NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?([kmb]?)", re.ASCII)


def parse_value(text):
    """'8' -> 8, '1e-3' -> 0.001, '1e6', '1M' and '1_000_000' -> 1000000, 'true' -> True,
    'none' -> None; all else stays text."""
    low = text.lower()
    words = {"none": None, "true": True, "false": False}
    if low in words:
        return words[low]
    match = NUMBER.fullmatch(low) if len(low) < 40 else None
    if not match:
        return text
    value = float(low.rstrip("kmb")) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[3]]
    return int(value) if value.is_integer() and abs(value) < 2 ** 53 else value


def settings(text):
    """"n_head=4 layers='kda*3 full' tied=false" -> {"n_head": 4, ...}."""
    return {key: parse_value(value) for key, _, value in (pair.partition("=") for pair in shlex.split(text))}


# Fields of the model, not of a layer.
WHOLE = ("vocab_size", "block_size", "layers", "n_layer", "n_embd", "tied", "logit_softcap", "mtp", "causal",
         "shift")
MIXER = LayerConfig.__dataclass_fields__.keys() - {"bias", "norm_eps"}  # norms and the MLP read those too
LONGEST = LIMITS["n_layer"][1]


def parse_layers(pattern, n_layer=None):
    """Expand a layer pattern to n_layer entries (name, {field: value}), by default those of one period.

    Grammar: item ::= name | name(key=value, ...) | (items), each with an optional *count; items are separated
    by blanks. A pattern shorter than the model is repeated: "gated_deltanet*3 full" at depth 48 is
    Qwen3-Next. A longer one is cut, and a warning says what is left out. ValueError: an unknown layer, a
    setting that it does not read, a field of the whole model, what is no pattern.
    """
    about = f"layer pattern '{pattern if len(pattern) < 100 else pattern[:97] + '...'}'"
    need(pattern.count("(") == pattern.count(")"), f"{about} has unbalanced parentheses")
    groups = [[]]                                                    # open parentheses
    last = None                                                      # the item that a *count would repeat
    for token in re.findall(r"\w+\([^()]*\)|\w+|\*\s*[0-9]*|[()]|\S", pattern):
        if token == "(":
            groups.append([])
            last = None
        elif token == ")":
            need(len(groups) > 1, f"{about} has unbalanced parentheses")
            last = groups.pop()
            groups[-1] += last
        elif token[0] == "*":
            count = token[1:].strip()
            need(last is not None and count.strip("0"),
                 f"{about}: * needs an item before it and a count after it, as in full*3")
            need(len(count) < 6 and len(last) * int(count) <= LONGEST,
                 f"{about} makes more than {LONGEST:,} layers")
            groups[-1] += last * (int(count) - 1)
            last = None
        else:
            last = [parse_layer(token, about)]
            groups[-1] += last
    out = groups[0]
    need(out, f"{about} names no layer: one of {', '.join(ATTENTION)}")
    n_layer = n_layer or len(out)
    if len(out) > n_layer:
        lost = ", ".join(dict.fromkeys(name for name, _ in out[n_layer:]))
        warnings.warn(f"{about} has {len(out)} layers, the model {n_layer}: "
                      f"the last {len(out) - n_layer} are left out ({lost})")
    return [out[i % len(out)] for i in range(n_layer)]


def parse_layer(text, about):
    """'full(window=128)' -> ("full", {"window": 128})."""
    name, _, args = text.partition("(")
    need(name in ATTENTION, f"unknown layer '{name:.40}' in the {about}{nearest(name, ATTENTION)}: known are "
         f"{', '.join(ATTENTION)}")
    reads = ATTENTION[name].settings or MIXER                       # a layer of your own may not say it
    values = {}
    for pair in filter(str.strip, args.rstrip(")").split(",")):
        key, eq, value = (part.strip() for part in pair.partition("="))
        need(eq and key not in WHOLE and key not in values,
             f"{about}: '{pair.strip()}' is not a setting of one layer, as in full(window=128)")
        need(key in reads or key not in MIXER,
             f"layer '{name}' does not read {key}: {key}={value} would change nothing. "
             f"It reads {', '.join(reads)}")
        values[key] = parse_value(value)
    check_values({key: value for key, value in values.items() if key in MIXER})
    return name, values


def override(config, values):
    """A copy of config with some fields set from values.
    ValueError: an unknown name, and what `check_setting` says."""
    known = [field.name for field in dataclasses.fields(config)]
    for key in values:
        need(key in known, f"unknown model setting '{key:.40}'{nearest(key, known)}")
    return dataclasses.replace(config, **values)


# ------------------------------------------------------------------------------------------------------------
# Published models as dictionaries over the same fields

PRESETS = {  # as --set takes them
    "small": "",  # ModelConfig's own defaults
    # 124M; bias=False as nanoGPT trains it
    "gpt2": """
        vocab_size=50257 block_size=1024 n_layer=12 n_head=12 n_embd=768 mlp=gelu norm=layer norm_eps=1e-5
        position=learned""",
    # Llama-3.1-8B
    "llama": """
        vocab_size=128256 block_size=8192 n_layer=32 n_head=32 n_kv_head=8 n_embd=4096 n_inner=14336
        norm_eps=1e-5 rope_base=500_000 tied=false""",
    # LLaDA-8B: train with --objective mdm
    "llada": """
        vocab_size=126464 block_size=4096 n_layer=32 n_head=32 n_embd=4096 n_inner=12288 norm_eps=1e-5
        rope_base=500_000 tied=false""",
    # 80B-A3B
    "qwen3-next": """
        vocab_size=151936 block_size=4096 layers='gated_deltanet*3 full' n_layer=48 n_embd=2048 tied=false
        n_head=16 n_kv_head=2 head_dim=256 rotary_fraction=0.25 rope_base=10_000_000 qk_norm=true
        attn_gate=true linear_n_head=16 linear_n_v_head=32 linear_key_dim=128 linear_value_dim=128
        n_expert=512 n_expert_active=10 expert_inner=512 shared_inner=512 router=softmax""",
    # 48B-A3B; MLA without positions
    "kimi-linear": """
        vocab_size=163840 block_size=4096 layers='kda(n_expert=0) kda*2 mla (kda*3 mla)*5 kda*2 mla'
        n_layer=27 n_embd=2304 n_head=32 n_inner=9216 norm_eps=1e-5 position=none tied=false linear_n_head=32
        linear_key_dim=128 decay_gate=softplus kv_lora_rank=512 qk_nope_head_dim=128 qk_rope_head_dim=64
        v_head_dim=128 n_expert=256 n_expert_active=8 expert_inner=1024 shared_inner=1024
        router_scale=2.446""",
    # 671B-A37B
    "deepseek-v3": """
        vocab_size=129280 block_size=4096 layers='mla(n_expert=0)*3 mla*58' n_layer=61 n_embd=7168 n_head=128
        n_inner=18432 tied=false q_lora_rank=1536 kv_lora_rank=512 qk_nope_head_dim=128 qk_rope_head_dim=64
        v_head_dim=128 n_expert=256 n_expert_active=8 expert_inner=2048 shared_inner=2048 router_scale=2.5
        n_expert_group=8 n_expert_group_active=4""",
    # 20b
    "gpt-oss": """
        vocab_size=201088 block_size=4096 layers='full(window=128) full' n_layer=24 n_embd=2880 n_head=64
        n_kv_head=8 head_dim=64 rope_base=150_000 norm_eps=1e-5 bias=true sink=true tied=false
        mlp=swiglu_clamped n_expert=32 n_expert_active=4 expert_inner=2880 router=softmax""",
}
PRESETS = {name: settings(text) for name, text in PRESETS.items()}
WIDTHS = ("n_inner", "expert_inner", "shared_inner")                 # of a layer: scale with n_embd
RANKS = ("head_dim", "linear_key_dim", "linear_value_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim",
         "qk_rope_head_dim", "v_head_dim")                           # of a head: scale with n_embd / n_head
HEADS = ("n_kv_head", "linear_n_head", "linear_n_v_head")            # scale with n_head


def from_preset(name, **given):
    """A preset as ModelConfig, with some fields given.
    Another n_embd makes a small twin, what is not given scaled:

    heads, head widths and inner widths keep the preset's ratios (widths in steps of 8). Experts become fewer
    by r^1.5, where r is the ratio of the widths, and the active ones in proportion, at least 2: kept,
    Qwen3-Next's 512 would be 100M parameters in 4 layers of width 256. block_size becomes a power of two. The
    layer pattern stays.
    """
    full = PRESETS[name]
    values = dict(full)
    if "n_embd" in given and "n_embd" in full:
        def scaled(field, factor, step):
            return max(1, round(full[field] * factor / step)) * step
        r = given["n_embd"] / full["n_embd"]
        group = full["n_head"] // full.get("n_kv_head", full["n_head"])
        values["n_head"] = given.get("n_head") or scaled("n_head", r, group)
        more = values["n_head"] / full["n_head"]
        for fields, factor, step in (WIDTHS, r, 8), (RANKS, r / more, 8), (HEADS, more, 1):
            values |= {field: scaled(field, factor, step) for field in fields if field in full}
        if "linear_n_v_head" in full:                                # value heads stay a multiple
            ratio = full["linear_n_v_head"] // full["linear_n_head"]
            values["linear_n_v_head"] = values["linear_n_head"] * ratio
        if r < 1:
            values["block_size"] = max(128, 2 ** int(math.log2(full["block_size"] * r)))
        if r < 1 and "n_expert" in full and "n_expert" not in given:
            step = max(8, 2 * full.get("n_expert_group", 1))         # groups of two at least
            values["n_expert"] = scaled("n_expert", r ** 1.5, step)
            active = full["n_expert_active"] * values["n_expert"] // full["n_expert"]
            values["n_expert_active"] = max(2, active)
    config = override(ModelConfig(), {**values, **given})
    tell_unread(config, given)
    return config


def tell_unread(config, given):
    """Warn of settings {field: value} that no layer of the pattern reads.
    No error: one may try several patterns."""
    used = [ATTENTION[name] for name, _ in parse_layers(config.layers, config.n_layer)]
    for field in given.keys() & MIXER - {"n_head", "n_embd", "position"}:
        if not any(field in layer.settings for layer in used):
            warnings.warn(f"no layer of '{config.layers}' reads {field}: "
                          f"{field}={given[field]} changes nothing")


# ------------------------------------------------------------------------------------------------------------
# Published checkpoints: folders of config.json and safetensors

# A field of config.json, and ours that means the same; or = and what it must say; or - where it changes
# nothing. A field that is not here is refused: it may change what the model computes.
FIELDS = """
hidden_size                      n_embd
n_embd                           n_embd
d_model                          n_embd
num_hidden_layers                n_layer
n_layer                          n_layer
n_layers                         n_layer
num_attention_heads              n_head
n_head                           n_head
n_heads                          n_head
num_key_value_heads              n_kv_head
n_kv_heads                       n_kv_head
head_dim                         head_dim
intermediate_size                n_inner
n_inner                          n_inner
mlp_hidden_size                  n_inner
activation_function              mlp
vocab_size                       vocab_size
max_position_embeddings          block_size
n_positions                      block_size
max_sequence_length              block_size
model_max_length                 block_size
rms_norm_eps                     norm_eps
layer_norm_epsilon               norm_eps
attention_bias                   bias
mlp_bias                         bias
include_bias                     bias
include_qkv_bias                 bias
tie_word_embeddings              tied
weight_tying                     tied
partial_rotary_factor            rotary_fraction
rope_theta                       rope_base
rope_scaling.rope_theta          rope_base
rope_scaling.factor              rope_factor
rope_scaling.original_max_position_embeddings rope_original
rope_scaling.partial_rotary_factor rotary_fraction
rope_scaling.low_freq_factor     = 1 1.0
rope_scaling.high_freq_factor    = 4 4.0
rope_scaling.rope_type           = default linear llama3
rope_scaling.type                = default linear llama3
linear_num_key_heads             linear_n_head
linear_num_heads                 linear_n_head
linear_attn_config.num_heads     linear_n_head
linear_num_value_heads           linear_n_v_head
linear_key_head_dim              linear_key_dim
linear_head_dim                  linear_key_dim
linear_attn_config.head_dim      linear_key_dim
linear_value_head_dim            linear_value_dim
linear_conv_kernel_dim           conv_size
linear_attn_config.short_conv_kernel_size  conv_size
q_lora_rank                      q_lora_rank
kv_lora_rank                     kv_lora_rank
qk_nope_head_dim                 qk_nope_head_dim
qk_rope_head_dim                 qk_rope_head_dim
v_head_dim                       v_head_dim
num_experts                      n_expert
n_routed_experts                 n_expert
num_local_experts                n_expert
num_experts_per_tok              n_expert_active
num_experts_per_token            n_expert_active
moe_intermediate_size            expert_inner
shared_expert_intermediate_size  shared_inner
n_shared_experts                 shared_inner
num_shared_experts               shared_inner
n_group                          n_expert_group
num_expert_group                 n_expert_group
topk_group                       n_expert_group_active
routed_scaling_factor            router_scale
router_aux_loss_coef             router_aux
rope_interleave                  = true
scoring_func                     = sigmoid
moe_router_activation_func       = sigmoid
topk_method                      = noaux_tc
norm_topk_prob                   = true
moe_renormalize                  = true
moe_layer_freq                   = 1
decoder_sparse_step              = 1
mlp_only_layers                  = []
mla_use_nope                     = true
swiglu_limit                     = 7.0
swiglu_alpha                     = 1.702
hidden_act                       = silu
activation_type                  = silu
use_sliding_window               = false
scale_attn_weights               = true
scale_attn_by_inverse_layer_idx  = false
add_cross_attention              = false
rope_interleaved                 = false
block_type                       = llama
block_group_size                 = 1
layer_norm_type                  = rms
layer_norm_with_affine           = true
bias_for_layer_norm              = false
attention_layer_norm             = false
input_emb_norm                   = false
scale_logits                     = false
alibi                            = false
rope                             = true
model_type                       -
mask_token_id                    -
bos_token_id                     -
eos_token_id                     -
pad_token_id                     -
objective                        -
architectures                    -
auto_map                         -
_name_or_path                    -
dtype                            -
torch_dtype                      -
transformers_version             -
transformers.js_config           -
is_llama_config                  -
use_cache                        -
initializer_range                -
init_fn                          -
init_std                         -
init_device                      -
attention_dropout                -
embedding_dropout                -
residual_dropout                 -
attn_pdrop                       -
embd_pdrop                       -
resid_pdrop                      -
pretraining_tp                   -
summary_first_dropout            -
summary_proj_to_labels           -
summary_type                     -
summary_use_proj                 -
task_specific_params             -
n_ctx                            -
reorder_and_upcast_attn          -
output_router_logits             -
embedding_size                   -
flash_attention                  -
precision                        -
mlp_ratio                        -
alibi_bias_max                   -
attention_layer_norm_with_affine -
rope_full_precision              -
max_window_layers                -
sliding_window                   -
layer_types                      -
rope_scaling                     -
rope_parameters                  -
linear_attn_config               -
linear_attn_config.kda_layers    -
linear_attn_config.full_attn_layers  -
full_attention_interval          -
first_k_dense_replace            -
mlp_layer_types                  -
use_grouped_topk                 -
experts_per_token                -
initial_context_length           -
num_nextn_predict_layers         -
aux_loss_alpha                   -
seq_aux                          -
ep_size                          -
qk_head_dim                      -
"""
LLAMA = r"""
^blocks            model.layers
^embed             model.embed_tokens
^norm\.            model.norm.
^head              lm_head
norm1              input_layernorm
norm2              post_attention_layernorm
mixer              self_attn
"""
ROUTED = LLAMA + r"""
mlp\.router        mlp.gate
mlp\.bias          mlp.gate.e_score_correction_bias
shared\.           shared_experts.
a_norm             a_layernorm
kv_a_proj          kv_a_proj_with_mqa
"""
# model_type: what is fixed in it, and what turns our names into its, one substitution after the other.
ARCHITECTURES = {
    "gpt2": ("position=learned norm=layer bias=true tied=true", r"""
^blocks            h
^embed_pos         wpe
^embed             wte
^norm              ln_f
norm               ln_
mixer\.qkv_proj    attn.c_attn
mixer\.o_proj      attn.c_proj
up_proj            c_fc
down_proj          c_proj
"""),
    "llama": ("bias=false", LLAMA),
    "qwen2": ("bias=true", LLAMA),
    "qwen3": ("bias=false qk_norm=true", LLAMA),
    "Dream": ("bias=true shift=true", LLAMA),
    "llada": ("bias=false", r"""
^blocks            model.transformer.blocks
^embed             model.transformer.wte
^norm\.            model.transformer.ln_f.
^head              model.transformer.ff_out
norm1              attn_norm
norm2              ff_norm
mixer\.o_proj      attn_out
mixer\.(.)_proj    \1_proj
mlp\.gate_proj     ff_proj
mlp\.up_proj       up_proj
mlp\.down_proj     ff_out
"""),
    "gpt_oss": ("bias=true sink=true mlp=swiglu_clamped router=softmax", LLAMA + """
sink$              sinks
expert_up          experts.gate_up_proj
expert_down        experts.down_proj
"""),
    "deepseek_v3": ("bias=false", ROUTED),
    "qwen3_next": ("bias=false qk_norm=true attn_gate=true router=softmax", r"""
mixer\.(?=in_proj|conv|A_log|dt_bias|o_norm|out_proj)  linear_attn.
conv_weight        conv1d.weight
o_norm             norm
shared_gate        shared_expert_gate
shared\.           shared_expert.
""" + ROUTED),
    "kimi_linear": ("bias=false position=none decay_gate=softplus", ROUTED + r"""
(experts\.\d.*)gate_proj  \1w1
(experts\.\d.*)up_proj    \1w3
(experts\.\d.*)down_proj  \1w2
decay_proj.0       f_a_proj
decay_proj.1       f_b_proj
gate_proj.0        g_a_proj
gate_proj.1        g_b_proj
beta_proj          b_proj
"""),
}


def columns(table):
    return [line.split() for line in table.splitlines() if line]


def read_config(c):
    """The contents of a config.json -> ModelConfig. ValueError names a field that we cannot follow."""
    kind = c["model_type"]
    need(kind in ARCHITECTURES, f"model_type {kind!s:.40} is none of {', '.join(ARCHITECTURES)}")
    fixed = settings(ARCHITECTURES[kind][0])
    given = dict(c)
    for name in ("rope_scaling", "rope_parameters", "linear_attn_config"):
        given |= {f"{name}.{key}": value for key, value in (c.get(name) or {}).items()}
    fields, values = {name: rest for name, *rest in columns(FIELDS)}, {"tied": False}
    for name, value in given.items():
        if value is None:
            continue
        known = name.replace("rope_parameters.", "rope_scaling.")       # its newer name
        need(known in fields, f"{name} {value!s:.60} is not known here: it may change what a model computes")
        field, *expected = fields[known]
        if field not in "=-":
            expected = [str(fixed.get(field, value)).lower()]
            values[field] = value
        need(field == "-" or str(value).lower() in expected,
             f"{name} {value!s:.60} in a {kind}: expected {' or '.join(expected)}")
    lacking = {"n_embd", "n_layer", "n_head", "vocab_size", "block_size", "norm_eps"} - values.keys()
    need(not lacking, f"nothing says {', '.join(sorted(lacking))}")
    values["vocab_size"] -= c.get("mask_token_id") == values["vocab_size"] - 1      # our own row V
    if values.get("n_expert"):
        values.setdefault("expert_inner", values["n_inner"])
    if kind in ("deepseek_v3", "kimi_linear"):                      # their shared experts are a number
        values["shared_inner"] *= values["expert_inner"]
    values["layers"] = read_layers(c, kind, values["n_layer"])
    return override(ModelConfig(), values | fixed)


def read_layers(c, kind, n):
    """The layer pattern. Layers are counted from 1."""
    names = {"full_attention": "mla" if "kv_lora_rank" in c else "full",
             "linear_attention": "kda" if kind == "kimi_linear" else "gated_deltanet",
             "sliding_attention": f"full(window={c.get('sliding_window')})"}
    every, kda = c.get("full_attention_interval", 1), c.get("linear_attn_config", {}).get("kda_layers", [])
    types = c.get("layer_types") or ["linear_attention" if i % every or i in kda else "full_attention"
                                     for i in range(1, n + 1)]
    need(len(types) == n and {*types} <= {*names}, f"layer_types {types!s:.60}: expected {n} of {[*names]}")
    dense = c.get("first_k_dense_replace") or (c.get("mlp_layer_types") or []).count("dense")
    layers = [names[name] + "(n_expert=0)" * (i < dense) for i, name in enumerate(types)]
    return " ".join(layers) if len({*layers}) > 1 else layers[0]


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path):
    """{name: tensor} of a file, memory-mapped: 8 bytes with the length of the header, the header in JSON,
    tensors side by side. ValueError names a tensor that is not as it should be."""
    try:
        with open(path, "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)    # torch warns of what is read-only
        end = start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        entries = sorted((*e["data_offsets"], name, DTYPES[e["dtype"]], e["shape"])
                         for name, e in header.items())
    except Exception as e:                                          # whatever a foreign file may hold
        raise ValueError(f"{path} is no safetensors of {', '.join(DTYPES)}, or damaged: {e!s:.80}") from None
    out = {}
    for begin, stop, name, dtype, shape in entries:
        count = math.prod(shape)
        need(start + begin == end, f"{path}: tensor {name} does not begin where another ends")
        need(stop - begin == count * dtype.itemsize > 0,
             f"{path}: tensor {name} has {stop - begin} bytes, not those of {dtype} {shape}")
        end = start + stop
        need(end <= len(data), f"{path}: tensor {name} is truncated")
        out[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin).view(shape)
    need(end == len(data), f"{path} has bytes that belong to no tensor")
    return out


def their_tensors(lm, kind, rows):
    """{name in a checkpoint: (views of our weights, the dimension in which they are joined there)}: to write
    to, or to read from. rows: of the embeddings."""
    ours = {name: w for name, w in lm.state_dict().items() if not name.startswith("blocks")}
    for name in ("embed.weight", "head.weight"):
        ours[name] = ours[name][:rows]
    if lm.config.tied:
        del ours["head.weight"]
    for i, block in enumerate(lm.blocks):
        ours |= {f"blocks.{i}.{name}": w for name, w in parts(block, kind).items()}
    out = {}
    for name, w in ours.items():
        for old, *new in columns(ARCHITECTURES[kind][1]):
            name = re.sub(old, *new, name)
        out[name] = w if isinstance(w, tuple) else ([w], 0)
    return out


def parts(block, kind):
    """The weights of a block under our names, what is one here and several there cut, and the reverse."""
    w, m = block.state_dict(), block.mixer
    sizes = getattr(m, "sizes", None)                               # of q, k and v
    qkv = "mixer.q_proj.", "mixer.k_proj.", "mixer.v_proj."

    def cut(name, sizes, *into):
        for tail in ("weight", "bias"):
            if name + tail in w:
                whole = w.pop(name + tail)
                w.update(zip((part + tail for part in into), whole.split(sizes or len(whole) // 2)))

    def join(name, *old):                                           # head by head
        views = [w.pop(f"mixer.{part}.weight").unflatten(0, (m.H, -1)) for part in old]
        w[f"mixer.{name}.weight"] = views, 1

    if kind == "gpt2":
        return {name: a.mT if a.dim() == 2 else a for name, a in w.items()}
    if hasattr(m, "qkv_proj"):
        cut("mixer.qkv_proj.", sizes or [m.H * m.D, m.Hkv * m.D, m.Hkv * m.D], *qkv)
    elif isinstance(m.q_a_proj, nn.Identity):
        w["mixer.q_proj.weight"] = w.pop("mixer.q_b_proj.weight")
    for at in ("mlp.", "mlp.shared."):
        cut(at + "up_proj.", None, at + "gate_proj.", at + "up_proj.")
    if kind in ONLY_QKV:
        w = {name: a for name, a in w.items() if name.endswith("weight") or name.startswith(qkv)}
    if kind in ("gpt_oss", "qwen3_next"):                           # what balances them is not kept there
        del w["mlp.bias"], w["mlp.share"]
    if kind == "gpt_oss":                                           # gate and up by turns
        for name in ("mlp.expert_up", "mlp.expert_up_bias"):
            w[name] = [half.unsqueeze(-1) for half in w[name].chunk(2, -1)], -1
    elif isinstance(block.mlp, MoE):
        for e, (up, down) in enumerate(zip(w.pop("mlp.expert_up"), w.pop("mlp.expert_down"))):
            three = zip(("gate", "up", "down"), (*up.mT.chunk(2), down.mT))
            w |= {f"mlp.experts.{e}.{part}_proj.weight": a for part, a in three}
    if kind == "kimi_linear":
        cut("mixer.conv_", sizes, "mixer.q_conv1d.", "mixer.k_conv1d.", "mixer.v_conv1d.")
    elif kind == "qwen3_next" and sizes:
        join("in_proj_qkvz", "q_proj", "k_proj", "v_proj", "gate_proj")
        join("in_proj_ba", "beta_proj", "decay_proj")
        w["mixer.out_proj.weight"] = w.pop("mixer.o_proj.weight")
    elif kind == "qwen3_next":
        join("q_proj", "q_proj", "gate_proj")
    return w


ONLY_QKV = ("qwen2", "Dream")           # have biases there alone: our others are zero
# Buffers; a head that is tied; Qwen3-Next's layers that predict further tokens.
UNUSED = r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$|^lm_head|^mtp\."


@torch.no_grad()
def from_pretrained(folder, dtype=torch.float32, device="cpu"):
    """(LM, its objective, ar or mdm) from a published folder:
    config.json, and model*.safetensors in pieces or not.

    Weights go from the mapped file into their place one by one: there is no second copy. Row V of the
    embedding, which stands before a text and hides a token, is that of the mask token, or else of
    <|endoftext|> (a chat model's BOS opens a turn), BOS or EOS. ValueError names the field or the tensor.
    """
    folder, tensors = Path(folder), {}
    try:
        c = json.loads((folder / "config.json").read_text("utf-8"))
        config, kind = read_config(c), c["model_type"]
    except Exception as e:
        raise ValueError(f"{folder / 'config.json'}: {e!s:.300}") from None
    for path in sorted(folder.glob("model*.safetensors")):
        for name, tensor in read_safetensors(path).items():
            name = name.removeprefix("transformer.").replace("block_sparse_moe", "mlp")
            need(name not in tensors, f"{path}: tensor {name} is in another file too")
            tensors[name] = tensor
    need_memory(config, dtype.itemsize)
    with torch.device("meta"):
        lm = LM(config).to(dtype)
    lm.to_empty(device=device)
    if config.tied:
        lm.head.weight = lm.embed.weight
    for moe in lm.moes():
        moe.bias = moe.bias.float()                                 # it chooses experts: bf16 is too coarse
    for a in (*lm.parameters(), *lm.buffers()):
        a.zero_()                                                   # rows behind V, biases that it has not
    for name, (views, dim) in their_tensors(lm, kind, c["vocab_size"]).items():
        need(name in tensors, f"{folder}: tensor {name} is missing")
        tensor, whole = tensors.pop(name), torch.cat([view.to("meta") for view in views], dim)
        flat = whole.flatten(dim - 1, dim) if len(views) > 1 else whole
        need(tensor.squeeze().shape == flat.squeeze().shape,
             f"{folder}: tensor {name} has shape {[*tensor.shape]}, expected {[*flat.shape]}")
        for view, part in zip(views, tensor.view(whole.shape).split([view.size(dim) for view in views], dim)):
            view.copy_(part)
        if kind == "qwen3_next" and "norm" in name and "linear" not in name:
            views[0].add_(1)                                        # its norms are x (1 + w)
    unknown = [name for name in tensors if not re.search(UNUSED, name)]
    need(not unknown, f"{folder}: tensor {unknown and unknown[0]} is unknown in a {kind}")
    if lm.V == c["vocab_size"]:                                     # else the checkpoint has our row V
        text = "".join(path.read_text("utf-8") for path in folder.glob("tokenizer.json"))
        end = re.search(r'"id":\s*(\d+),\s*"content":\s*"<\|endoftext\|>"', text)
        known = c.get("mask_token_id"), end and int(end[1]), c.get("bos_token_id"), c.get("eos_token_id")
        first = next((i for i in known if isinstance(i, int)), 0)
        need(first < lm.V, f"{folder}: token {first} is beyond the vocabulary of {lm.V}")
        lm.embed.weight[lm.V] = lm.embed.weight[first]
    return lm.eval(), c.get("objective", "mdm" if kind in ("llada", "Dream") else "ar")
