"""All tests: python -m pytest test_all.py. CPU only, no network, under four minutes on two cores.

By equivalence and by definition: enumeration, float64 oracles, cached against recomputed, peers against ours.
"""
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attention
import bench
import diffusion
import prepare
import sample
import train
from attention import ATTENTION, Cache, softmax_attention, top_k, visible
from model import LM, PRESETS, ModelConfig, override, parse_layers

torch.set_num_threads(1)

# ---------------------------------------------------------------------------------------------------------------------
# attention.py: helpers and the contract of every layer

def tiny(**values):
    """A small model's config; block_size covers every length used here."""
    return override(ModelConfig(vocab_size=11, block_size=256, n_layer=2, n_head=4, n_embd=32), values)


def test_softmax_attention_is_its_definition():
    torch.manual_seed(0)
    B, H, Hkv, T, D = 2, 4, 2, 13, 8
    q, k, v = (torch.randn(B, h, T, D, dtype=torch.float64) for h in (H, Hkv, Hkv))
    sink = torch.randn(H, dtype=torch.float64)
    for causal, window, s in itertools.product((True, False), (None, 1, 5), (None, sink)):
        y = softmax_attention(q, k, v, causal, window, s)
        for b, h, t in itertools.product(range(B), range(H), range(T)):
            keys = [j for j in range(T) if (not causal or j <= t) and (window is None or abs(t - j) < window)]
            w = torch.stack([q[b, h, t] @ k[b, h // 2, j] / D ** 0.5 for j in keys] + ([s[h]] if s is not None else [])).exp()
            expected = sum(w[i] * v[b, h // 2, j] for i, j in enumerate(keys)) / w.sum()
            torch.testing.assert_close(y[b, h, t], expected, rtol=0, atol=1e-6 if s is not None else 1e-12)


def test_fewer_queries_than_keys_are_the_last_ones():
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    torch.testing.assert_close(softmax_attention(q[:, :, 5:], k, v), softmax_attention(q, k, v)[:, :, 5:])


def test_count_visible():
    for T, causal, window in itertools.product((1, 2, 7), (True, False), (None, 1, 3, 7, 9)):
        t = torch.arange(T)
        assert attention.count_visible(T, causal, window) == int(visible(t, t, causal, window).sum())


def test_rotary_depends_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    for interleaved in (False, True):
        dot = lambda i, j: (attention.rotary(q, torch.tensor([i]), 8, interleaved=interleaved) *
                            attention.rotary(k, torch.tensor([j]), 8, interleaved=interleaved)).sum()
        torch.testing.assert_close(dot(3, 1), dot(103, 101), rtol=1e-5, atol=1e-5)
        assert abs(dot(3, 1) - dot(3, 2)) > 1e-3


def test_top_k_ties_and_visibility():
    inf = math.inf
    scores = torch.tensor([[1.0, -0.0, 1.0, 0.0, -inf, -2.0], [-inf, -inf, 3.0, -inf, -inf, -inf]])
    index, picked = top_k(scores, 4)
    assert index[0].tolist() == [0, 2, 1, 3] and picked[0].all()
    assert index[1, 0] == 2 and picked[1].tolist() == [True, False, False, False]
    random = torch.randn(50, 40).mul(2).round() / 2                                    # many ties
    index, _ = top_k(random, 10)
    assert torch.equal(index, random.sort(dim=-1, descending=True, stable=True).indices[:, :10])
    assert torch.equal(top_k(random[:, :30], 5)[0], top_k(torch.cat([random[:, :30], torch.full((50, 9), -inf)], 1), 5)[0])


# name of a case -> (layer, settings). A new layer or option is tested by being listed here.
CASES = {
    "full": ("full", {}),
    "full gqa": ("full", dict(n_kv_head=2)),
    "full window": ("full", dict(window=5)),
    "full sink": ("full", dict(sink=True)),
    "full gate": ("full", dict(attn_gate=True)),
    "full qk_norm": ("full", dict(qk_norm=True)),
    "full partial rotary": ("full", dict(rotary_fraction=0.25, head_dim=16)),
    "full all": ("full", dict(n_kv_head=1, window=7, sink=True, attn_gate=True, qk_norm=True, rotary_fraction=0.5)),
}


def make_layer(case, seed=0, **more):
    """The layer with every parameter random, so that nothing is hidden by a zero."""
    name, values = CASES[case]
    torch.manual_seed(seed)
    layer = ATTENTION[name](tiny(**{**values, **more}))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.eval()


def decode(layer, x, chunks, cache, **keywords):
    out, i = [], 0
    for n in chunks:
        out.append(layer(x[:, i:i + n], cache=cache, **keywords))
        i += n
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("T", (1, 2, 31, 65))
def test_layer_cached_equals_parallel(case, T):
    """Prefill and token-by-token decoding, in any cut, with drafts (commit=False) in between."""
    layer, x = make_layer(case), torch.randn(2, T, 32)
    with torch.no_grad():
        y = layer(x)
        for first in sorted({0, 1, T // 2, T}):
            cache = layer.init_cache(2, T)
            layer(torch.randn(2, min(3, T), 32), cache=cache, commit=False)
            chunks = [first] * (first > 0) + [1] * (T - first)
            torch.testing.assert_close(decode(layer, x, chunks, cache), y, rtol=0, atol=1e-5)
            assert cache.pos.tolist() == [T, T]


@pytest.mark.parametrize("case", CASES)
def test_layer_sees_the_past_or_everything(case):
    layer, x = make_layer(case), torch.randn(1, 20, 32)
    changed = x.clone()
    changed[:, 12] += 1
    with torch.no_grad():
        assert torch.equal(layer(x)[:, :12], layer(changed)[:, :12]), "a position saw its future"
        assert not torch.equal(layer(x)[:, 12:], layer(changed)[:, 12:])
        near = layer(x, causal=False)[:, 9] - layer(changed, causal=False)[:, 9]
        assert near.abs().max() > 1e-6, "bidirectional, yet blind to the right"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", (True, False))
def test_layer_padding_changes_nothing(case, causal):
    """Rows of different lengths in one batch: alone and padded, parallel and through the cache, the same."""
    layer, x = make_layer(case), torch.randn(2, 18, 32)
    length = (11, 18)
    valid = torch.arange(18) < torch.tensor(length)[:, None]
    with torch.no_grad():
        y, cache = layer(x, causal=causal, valid=valid), layer.init_cache(2, 30)
        y_cached = layer(x, causal=causal, valid=valid, cache=cache)
        more = torch.randn(2, 3, 32)
        for b, n in enumerate(length):
            alone = layer(x[b:b + 1, :n], causal=causal)
            torch.testing.assert_close(y[b:b + 1, :n], alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(y_cached[b:b + 1, :n], alone, rtol=0, atol=1e-5)
        after = layer(more, cache=cache)                                               # decoding goes on from each row's own end
        for b, n in enumerate(length):
            one = layer.init_cache(1, 30)
            layer(x[b:b + 1, :n], causal=causal, cache=one)
            torch.testing.assert_close(after[b:b + 1], layer(more[b:b + 1], cache=one), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_layer_block_reads_clean_prefix(case):
    """A noisy block (bidirectional, commit=False) after a causal prefix: as often as wanted, the same answer each time."""
    layer, x = make_layer(case), torch.randn(2, 24, 32)
    with torch.no_grad():
        cache = layer.init_cache(2, 24)
        layer(x[:, :16], cache=cache)
        state = {k: v.clone() for k, v in vars(cache).items() if torch.is_tensor(v)}
        first = layer(x[:, 16:], cache=cache, causal=False, commit=False)
        layer(torch.randn(2, 8, 32), cache=cache, causal=False, commit=False)
        assert torch.equal(layer(x[:, 16:], cache=cache, causal=False, commit=False), first)
        assert cache.pos.tolist() == [16, 16] and torch.equal(state["pos"], cache.pos)


@pytest.mark.parametrize("case", CASES)
def test_layer_costs_and_errors(case):
    layer = make_layer(case)
    cache = layer.init_cache(3, 64, dtype=torch.bfloat16)
    assert layer.cache_bytes(64, torch.bfloat16) > 0 and layer.flops(64, True) <= layer.flops(64, False)
    assert 0 < layer.reads(64, True) <= layer.reads(64, False)
    layer(torch.randn(3, 60, 32), cache=cache)
    with pytest.raises(ValueError, match="max_len"):
        layer(torch.randn(3, 5, 32), cache=cache)
    if CASES[case][0] not in ("full", "mla"):
        with pytest.raises(ValueError, match=CASES[case][0]):
            layer(torch.randn(1, 4, 32), mask=torch.ones(4, 4, dtype=torch.bool))


def test_full_cache_bytes_are_the_buffers():
    for case in ("full", "full gqa"):
        layer = make_layer(case)
        cache = layer.init_cache(1, 64, dtype=torch.bfloat16)
        assert layer.cache_bytes(64, torch.bfloat16) == 2 * (cache.k.numel() + cache.v.numel())


def test_full_rewrites_a_block_in_the_middle():
    """pos names the slots: recomputing positions 8..12 of a cached canvas equals computing the new canvas whole."""
    layer, x = make_layer("full"), torch.randn(1, 20, 32)
    with torch.no_grad():
        cache = layer.init_cache(1, 20)
        layer(x, causal=False, cache=cache)
        x[:, 8:12] = torch.randn(1, 4, 32)
        part = layer(x[:, 8:12], causal=False, cache=cache, pos=torch.arange(8, 12))
        torch.testing.assert_close(part, layer(x, causal=False)[:, 8:12], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad, message", [(dict(n_kv_head=3), "n_kv_head"), (dict(n_head=5), "n_head"), (dict(window=0), "window"),
                                          (dict(rotary_fraction=0.4), "rotary")])
def test_full_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        ATTENTION["full"](tiny(**bad))


@pytest.mark.parametrize("case", CASES)
def test_layer_compiles_to_one_graph(case):
    layer, x = make_layer(case), torch.randn(1, 33, 32)
    for causal in (True, False):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        y = torch.compile(lambda a: layer(a, causal=causal), backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(y, layer(x, causal=causal), rtol=0, atol=1e-5)
        y.square().sum().backward()
    torch._dynamo.reset()

# ---------------------------------------------------------------------------------------------------------------------
# model.py

def test_layer_patterns():
    names = lambda pattern, n: [name for name, _ in parse_layers(pattern, n)]
    assert parse_layers("full(window=4, sink=true)*2 full", 4) == [("full", dict(window=4, sink=True))] * 2 + \
        [("full", {})] + [("full", dict(window=4, sink=True))]
    assert names("(full*3 full)*6 full*2", 3) == ["full"] * 3
    for bad, message in (("ful", "did you mean 'full'"), ("(full", "unbalanced"), ("full)", "unbalanced"), ("full*", "count"), ("", "no layer")):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_layers(bad, 2)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        LM(tiny(layers="full(windw=3)"))


def on_meta(**values):
    with torch.device("meta"):
        return LM(ModelConfig(**values))


def test_published_sizes():
    """Our embedding has the mask row and is padded to a multiple of 64: that is the only difference."""
    gpt2, llama = on_meta(**PRESETS["gpt2"]), on_meta(**PRESETS["llama"])
    biases = 12 * (2 * 768 + (3 + 1 + 4 + 1) * 768) + 768                              # GPT-2 has them, nanoGPT's training recipe not
    assert gpt2.num_params() + biases - (50304 - 50257) * 768 == 124_439_808
    assert llama.num_params() - 2 * (128320 - 128256) * 4096 == 8_030_261_248
    assert gpt2.flops_per_token() == 6 * (gpt2.num_params(False) + 50257 * 768) + 3 * 12 * 4 * 768 * (1024 * 1025 // 2) / 1024
    assert gpt2.flops_per_token(causal=False) > gpt2.flops_per_token()
    assert llama.cache_bytes(1, torch.bfloat16) == 32 * 2 * 8 * 128 * 2


def test_logits_have_no_mask_column_and_weights_are_tied():
    lm = LM(tiny())
    assert lm(torch.tensor([[11, 0]])).shape == (1, 2, 11) and lm.head.weight is lm.embed.weight
    untied = LM(tiny(tied=False))
    assert untied.num_params() == lm.num_params() + lm.embed.weight.numel()
    assert untied.num_params(False) == lm.num_params(False)


@pytest.mark.parametrize("values", [{}, dict(position="learned", norm="layer", mlp="gelu", bias=True), dict(mlp="relu2", logit_softcap=5.0),
                                    dict(layers="full(window=4) full(sink=true)", n_kv_head=2)])
def test_model_cached_equals_parallel(values):
    torch.manual_seed(0)
    lm, x = LM(tiny(**values)).eval(), torch.randint(11, (2, 40))
    with torch.no_grad():
        y, cache = lm(x), lm.init_cache(2, 40)
        torch.testing.assert_close(decode(lm, x, [7, 20] + [1] * 13, cache), y, rtol=0, atol=1e-5)


def test_beyond_block_size():
    x = torch.zeros(1, 20, dtype=torch.int64)
    with pytest.warns(UserWarning, match="block_size 16"):
        LM(tiny(block_size=16))(x)
    with pytest.raises(ValueError, match="learned positions"):
        LM(tiny(block_size=16, position="learned"))(x)


def test_init_knows_every_parameter(monkeypatch):
    """The documented standard deviations, and an error for a parameter that no rule covers."""
    torch.manual_seed(0)
    lm = LM(tiny(n_embd=128, vocab_size=255))
    assert abs(lm.embed.weight.std() - 0.02) < 1e-3 and abs(lm.blocks[0].mlp.down_proj.weight.std() - 0.01) < 5e-4

    class Odd(attention.Full):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Parameter(torch.empty(3))
    monkeypatch.setitem(ATTENTION, "odd", Odd)
    with pytest.raises(ValueError, match="extra"):
        LM(tiny(layers="odd"))

# ---------------------------------------------------------------------------------------------------------------------
# model.py: mixture of experts

def make_moe(seed=0, **values):
    from model import MoE
    torch.manual_seed(seed)
    moe = MoE(tiny(**{**dict(n_expert=8, n_expert_active=2, expert_inner=16), **values}))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.3)
    return moe


MOES = {"sigmoid": dict(router="sigmoid", router_scale=2.5, shared_inner=16), "softmax": dict(router="softmax", shared_inner=16),
        "groups": dict(n_expert_group=4, n_expert_group_active=2), "relu2": dict(mlp="relu2", n_expert_active=3)}


@pytest.mark.parametrize("case", MOES)
def test_moe_paths_are_equal(case):
    """grouped_mm == every expert with zero weights == a loop over tokens; outputs and all gradients; one expert stays empty."""
    moe, results = make_moe(**MOES[case]), []
    moe.bias[3] = -100.0                                                               # never chosen
    x = torch.randn(2, 9, 32, requires_grad=True)
    for path in (moe.grouped, moe.every):
        moe.grouped = path                                                             # on the CPU in float32 forward calls this one
        moe.zero_grad()
        x.grad, aux = None, {}
        y = moe(x, aux)
        (y.square().sum() + sum(aux.values())).backward()
        results.append([y.detach(), x.grad.clone()] + [p.grad.clone() for p in moe.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    weights, experts, _ = moe.route(x.detach().view(-1, 32))
    assert not (experts == 3).any()
    for n, token in enumerate(x.detach().view(-1, 32)):
        out = sum(w * one_expert(moe, token, e) for w, e in zip(weights[n], experts[n]))
        if moe.shared is not None:
            out = out + (1 if moe.shared_gate is None else moe.shared_gate(token).sigmoid()) * moe.shared(token)
        torch.testing.assert_close(results[0][0].view(-1, 32)[n], out, rtol=0, atol=1e-4)


def one_expert(moe, token, e):
    from model import activate
    return activate(token @ moe.expert_up[e], moe.kind) @ moe.expert_down[e]


def test_moe_router_is_its_definition():
    """Selection by s + bias inside the best groups, weights from s alone; by brute force, token by token."""
    moe, x = make_moe(**MOES["groups"], router_scale=2.5), torch.randn(20, 32)
    moe.bias.normal_()
    weights, experts, _ = moe.route(x)
    for n in range(20):
        s = torch.sigmoid(moe.router.weight @ x[n])
        groups = [(sum(sorted((s + moe.bias)[g * 2:g * 2 + 2].tolist())[-2:]), g) for g in range(4)]
        allowed = [e for _, g in sorted(groups)[-2:] for e in (2 * g, 2 * g + 1)]
        chosen = sorted(allowed, key=lambda e: -(s + moe.bias)[e].item())[:2]
        assert experts[n].tolist() == chosen
        torch.testing.assert_close(weights[n], 2.5 * s[chosen] / s[chosen].sum())


def test_moe_bias_balances_without_a_gradient():
    moe, x = make_moe(router_bias_step=0.02), 1 + torch.randn(1, 512, 32)
    with torch.no_grad():
        moe.router.weight.mul_(0.3)[0] += 0.1                                          # a skewed start: expert 0 is everyone's first choice
    loads = []
    for _ in range(60):
        moe(x)
        count = moe.balance()
        assert count.sum() == 2 * 512, "no token is dropped"
        loads.append((count.max() / count.mean()).item())
    assert loads[0] > 1.5 and loads[-1] < 1.3 and not moe.bias.requires_grad and moe.count.sum() == 0
    assert abs(moe.bias.mean()) < 1e-5
    moe.eval()
    moe(x)
    assert moe.count.sum() == 0, "evaluation must not move the bias"


def test_moe_compiles_once():
    """The readable path under compile in float32: changing routing, no recompile."""
    moe = make_moe()
    torch._dynamo.reset()
    f = torch.compile(moe, backend="aot_eager", fullgraph=True)
    f(torch.randn(1, 16, 32)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        x = torch.randn(1, 16, 32) * 10
        y = f(x)
    torch.testing.assert_close(y, moe(x), rtol=0, atol=1e-4)
    torch._dynamo.reset()


def test_moe_active_parameters():
    lm = LM(tiny(n_expert=8, n_expert_active=2, expert_inner=16, shared_inner=16))
    expert = 3 * 32 * 16
    assert lm.num_params() - lm.active_params() == 2 * 6 * expert and lm.active_params(False) == lm.num_params(False) - 2 * 6 * expert
    assert lm.flops_per_token() < LM(tiny(n_expert=8, n_expert_active=4, expert_inner=16)).flops_per_token()


@pytest.mark.parametrize("bad", [dict(n_expert_active=9), dict(n_expert_group=3), dict(n_expert_group=4, n_expert_group_active=5),
                                 dict(router="top")])
def test_moe_refuses(bad):
    with pytest.raises(ValueError, match="n_expert|router"):
        make_moe(**bad)


@pytest.mark.parametrize("peer", ("deepseek", "qwen"))
def test_moe_parity_with_transformers(peer):
    """The same weights in transformers' layer: the same output."""
    tf = pytest.importorskip("transformers")
    base = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_experts_per_tok=2, moe_intermediate_size=16)
    if peer == "deepseek":
        theirs = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**base, intermediate_size=64, num_key_value_heads=4, n_routed_experts=8, n_group=4, topk_group=2, q_lora_rank=16,
                                                              kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=0)).model.layers[0].mlp
        ours = make_moe(**MOES["groups"], router_scale=theirs.gate.config.routed_scaling_factor if hasattr(theirs.gate, "config") else 2.5, shared_inner=16)
        shared, gate = theirs.shared_experts, None
        theirs.gate.e_score_correction_bias.copy_(ours.bias.normal_())
    else:
        theirs = tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**base, intermediate_size=64, num_key_value_heads=2, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
                                                            linear_num_key_heads=2, linear_num_value_heads=4, num_experts=8, shared_expert_intermediate_size=16)).model.layers[0].mlp
        ours = make_moe(**MOES["softmax"])
        shared, gate = theirs.shared_expert, theirs.shared_expert_gate
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.expert_up.transpose(1, 2))
        theirs.experts.down_proj.copy_(ours.expert_down.transpose(1, 2))
        shared.gate_proj.weight.copy_(ours.shared.up_proj.weight[:16])
        shared.up_proj.weight.copy_(ours.shared.up_proj.weight[16:])
        shared.down_proj.weight.copy_(ours.shared.down_proj.weight)
        if gate is not None:
            gate.weight.copy_(ours.shared_gate.weight)
        x = torch.randn(2, 7, 32)
        y = theirs(x)
        torch.testing.assert_close(ours(x), y[0] if isinstance(y, tuple) else y, rtol=0, atol=1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# diffusion.py

class DiffTable:
    """A frozen random network on tiny canvases: one table entry per canvas of V letters and the mask (id V), no structure.
    causal=True: the logits at i depend on idx[:, :i+1] only."""
    def __init__(self, V, T, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.V, self.T = V, T
        self.table = torch.randn((V + 1) ** T, T, V, generator=g, dtype=torch.float64) * 1.5

    def __call__(self, idx, causal):
        V, T = self.V, idx.size(1)
        power = (V + 1) ** torch.arange(T)
        if not causal:
            return self.table[(idx * power).sum(1)][:, :T]
        return torch.stack([self.table[(idx[:, :i + 1] * power[:i + 1]).sum(1), i] for i in range(T)], dim=1)


def diff_ce(f, x, masked):
    """(T,) CE of each token of x (T,) with `masked` hidden."""
    noisy = torch.where(masked, f.V, x)[None]
    return torch.nn.functional.cross_entropy(f(noisy, causal=False)[0], x, reduction="none")


def diff_masks(T):
    return [torch.tensor(m) for m in itertools.product([False, True], repeat=T)]


def diff_bound(f, x):
    """The bound from its definition: the mean over all T! orders of the chain rule. Nats per token."""
    T, total = len(x), 0.0
    for order in itertools.permutations(range(T)):
        masked = torch.ones(T, dtype=torch.bool)
        for i in order:
            total += diff_ce(f, x, masked)[i].item()
            masked[i] = False
    return total / math.factorial(T) / T


def diff_uniforms(masked):
    """Uniforms that hide exactly these tokens: below 0.5 where masked."""
    return torch.where(masked, 0.25, 0.75)[None]


@pytest.mark.parametrize("T", [4, 5])
def test_mdm_forms_have_the_bound_as_mean(T):
    """All masks enumerated, t integrated in closed form: no sampling anywhere."""
    f, x = DiffTable(3, T), torch.randint(3, (1, T), generator=torch.Generator().manual_seed(T))
    bound = diff_bound(f, x[0])
    exact = realised = bernoulli = 0.0
    for masked in diff_masks(T):
        n = int(masked.sum())
        u = diff_uniforms(masked)
        if n:
            loss = diffusion.mdm_loss(f, x, f.V, "exact", (torch.tensor([n]), u)).item()
            exact += loss / T / math.comb(T, n)                     # P(mask) = 1/T 1/C(T,n)
            p = math.gamma(n + 1) * math.gamma(T - n + 1) / math.gamma(T + 2)       # int t^n (1-t)^(T-n) dt
            realised += p * diffusion.mdm_loss(f, x, f.V, "realised", (torch.tensor([0.5]), u)).item()
            at = [diffusion.mdm_loss(f, x, f.V, "bernoulli", (torch.tensor([t]), u)).item() * t for t in (0.3, 0.6)]
            assert at[0] == pytest.approx(at[1], rel=1e-6)          # the loss is c/t, so its mean over t is
            bernoulli += at[0] * math.gamma(n) * math.gamma(T - n + 1) / math.gamma(T + 1)   # c int t^(n-1) (1-t)^(T-n) dt
    # realised, n = 0: t has density (T+1)(1-t)^T there; each n must come from an interval of t of probability 1/T
    for n, subset in itertools.product(range(1, T + 1), itertools.permutations(range(T))):
        t = 1 - (1 - (n - 0.5) / T) ** (1 / (T + 1))
        u = 0.999 + 1e-4 * torch.tensor([subset])
        loss = diffusion.mdm_loss(f, x, f.V, "realised", (torch.tensor([t]), u)).item()
        realised += loss / (T + 1) / T / math.factorial(T)
    for n in range(T):                                              # the intervals' ends
        for eps, expect in ((1e-3, n + 1), (-1e-3, n)):
            t = torch.tensor([1 - (1 - n / T - eps) ** (1 / (T + 1))])
            if 0 < t.item():
                assert int(diffusion.mdm_mask("realised", (t, torch.full((1, T), 0.999)))[0].sum()) == expect
    assert bernoulli == pytest.approx(bound, rel=1e-5)
    assert exact == pytest.approx(bound, rel=1e-6)
    assert realised == pytest.approx(bound, rel=1e-6)


def test_mdm_noise_is_uniform_and_stratified():
    g = torch.Generator().manual_seed(1)
    T, B = 8, 16
    n = torch.stack([diffusion.mdm_noise(B, T, "exact", g)[0] for _ in range(2000)])
    assert (n.sort(1).values == torch.arange(1, T + 1).repeat_interleave(B // T)).all()     # each n equally often in a batch
    first = torch.bincount(n[:, 0], minlength=T + 1)[1:].double()                           # and uniform in a given row
    assert ((first - 250) ** 2 / 250).sum() < 24.3                                          # chi-square, 7 dof, p = 0.001
    t = diffusion.mdm_noise(10_000, 1, "realised", g)[0]
    assert t.min() > 0 and t.max() <= 1 and abs(t.mean() - 0.5) < 1e-3
    masked = diffusion.smallest(torch.rand(50, 9, generator=g).round(decimals=1), torch.full((50,), 4))
    assert (masked.sum(1) == 4).all()                                                       # ties included


@pytest.mark.parametrize("form", ["exact", "realised", "bernoulli"])
def test_losses_split_into_micro_batches(form):
    """sum over micro-batches / tokens == the mean over the batch, for any cut; and the "none" form has the same mean."""
    f, g = DiffTable(3, 5), torch.Generator().manual_seed(0)
    x = torch.randint(3, (12, 5), generator=g)
    noise = diffusion.mdm_noise(12, 5, form, g)
    whole = diffusion.mdm_loss(f, x, 3, form, noise)
    parts = [diffusion.mdm_loss(f, x[a:b], 3, form, [z[a:b] for z in noise], reduction="sum")
             for a, b in ((0, 1), (1, 7), (7, 12))]
    assert torch.allclose(sum(parts) / x.numel(), whole)
    assert torch.allclose(diffusion.mdm_loss(f, x, 3, form, noise, reduction="none").mean(), whole)
    loss, ar, mdm = diffusion.mixed_loss(f, x, 3, 3, 0.25, form, noise)
    assert torch.allclose(ar, diffusion.ar_loss(f, x[:3], 3))
    assert torch.allclose(mdm, diffusion.mdm_loss(f, x[3:], 3, form, [z[3:] for z in noise]))
    assert torch.allclose(loss, (3 * ar + 9 * mdm) / 12)
    sums = diffusion.mixed_loss(f, x, 3, 3, 0.25, form, noise, reduction="sum")
    assert torch.allclose(sums[0] / 60, loss) and torch.allclose(sums[2] / 45, mdm)


def test_ar_sees_no_future():
    """-log p(x_i) moves only with x_0..x_i, and the corrupted inputs are read in the same places."""
    f, g = DiffTable(3, 5), torch.Generator().manual_seed(3)
    x = torch.randint(3, (1, 5), generator=g)
    before = diffusion.ar_loss(f, x, 3, reduction="none")[0]
    for j in range(5):
        y = x.clone()
        y[0, j] = (y[0, j] + 1) % 3
        moved = diffusion.ar_loss(f, y, 3, reduction="none")[0] != before
        assert not moved[:j].any() and moved[j:].all()
        moved = diffusion.ar_loss(f, x, 3, inputs=y, reduction="none")[0] != before     # targets stay: only what follows j moves
        assert not moved[:j + 1].any() and moved[j + 1:].all()
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))
    p = torch.exp(-diffusion.ar_loss(f, every, 3, reduction="none").sum(1))
    assert p.sum().item() == pytest.approx(1, abs=1e-12)


def test_corrupt_rates():
    x = torch.randint(50, (200, 500), generator=torch.Generator().manual_seed(0))
    y = diffusion.corrupt(x, 50, 0.1, 0.05, torch.Generator().manual_seed(1))
    assert abs((y == 50).float().mean() - 0.1) < 0.005
    assert abs(((y != x) & (y != 50)).float().mean() - 0.05 * 49 / 50) < 0.004
    assert torch.equal(diffusion.corrupt(x, 50), x)


@pytest.mark.parametrize("order", ["left", "confidence"])
def test_chain_nll_is_a_distribution(order):
    f = DiffTable(3, 4)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    nll = diffusion.chain_nll(f, every, 3, order)                           # nats per token
    assert torch.exp(-nll * 4).sum().item() == pytest.approx(1, abs=1e-12)
    given = torch.tensor([False, True, True, False]).expand(81, 4)  # p(scored | context) sums to 1 in every context
    nll = diffusion.chain_nll(f, every, 3, order, scored=given)
    p = torch.exp(-nll * 2).view(3, 9, 3).sum(1)
    assert torch.allclose(p, torch.ones_like(p), atol=1e-12)
    if order == "left":                                             # by definition
        x = every[35]
        nats = sum(diff_ce(f, x, torch.arange(4) >= i)[i] for i in range(4))
        assert diffusion.chain_nll(f, x[None], 3)[0].item() == pytest.approx(nats.item() / 4)


def test_mdm_nll_estimates_the_bound():
    f, g = DiffTable(3, 5), torch.Generator().manual_seed(5)
    x = torch.randint(3, (6, 5), generator=g)
    rows = torch.tensor([diff_bound(f, row) for row in x]).double()
    a = diffusion.mdm_nll(f, x, 3, 64, batch_size=7)
    assert a == pytest.approx(diffusion.mdm_nll(f, x, 3, 64, batch_size=384), rel=1e-12)        # seed fixed, batch size irrelevant
    assert abs(a[0] - rows.mean()) < 5 * a[1]
    # the s.e. is honest: over many seeds the error has mean 0 and its size is the s.e.
    runs = torch.tensor([diffusion.mdm_nll(f, x, 3, 8, torch.Generator().manual_seed(s)) for s in range(300)]).double()
    error, se = runs[:, 0] - rows.mean(), runs[:, 1]
    assert abs(error.mean()) < 4 * error.std() / 300 ** 0.5
    assert 0.85 < (se ** 2).mean().sqrt() / error.std() < 1.18
    nll, se = diffusion.mdm_nll(f, x, 3, 4096, batch_size=4096, per_row=True)
    assert (abs(nll - rows) < 5 * se + 1e-9).all() and se.max() < 0.02
    # context: only scored tokens are masked, i.e. the bound of the smaller problem
    scored = torch.tensor([[False, True, True, False, True]]).expand(6, 5)
    nll, se = diffusion.mdm_nll(f, x, 3, 4096, batch_size=4096, scored=scored, per_row=True)
    orders = [torch.tensor(o) for o in itertools.permutations([1, 2, 4])]
    for row, got, err in zip(x, nll, se):
        want = sum(diff_ce(f, row, torch.isin(torch.arange(5), o[i:]))[o[i]] for o in orders for i in range(3)) / 18
        assert abs(want - got) < 5 * err + 1e-9


def test_losses_compile_to_one_graph():
    """Forward and backward, static shapes, with the noise given."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Linear(16, 7))
    f = lambda idx, causal: net(idx)
    x = torch.randint(7, (4, 6))
    forms = ("exact", "realised", "bernoulli")

    def loss(x, noises):
        mdm = sum(diffusion.mdm_loss(f, x, 7, form, noise) for form, noise in zip(forms, noises))
        return mdm + diffusion.ar_loss(f, x, 7) + diffusion.mixed_loss(f, x, 7, 7, 0.5, noise=noises[0])[0]
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            noises = [diffusion.mdm_noise(4, 6, form, torch.Generator().manual_seed(seed)) for form in forms]
            assert torch.allclose(fast(x, noises), loss(x, noises))
    fast(x, noises).backward()


# ---- samplers

class DiffOracle:
    """The exact denoiser of a random language over V letters and T places: conditional marginals of its joint law p."""
    def __init__(self, V, T, seed=0, spread=1.5):
        g = torch.Generator().manual_seed(seed)
        self.V, self.T = V, T
        self.x = torch.tensor(list(itertools.product(range(V), repeat=T)))              # (V^T, T), x[c] has code c
        self.p = (torch.randn(V ** T, generator=g, dtype=torch.float64) * spread).softmax(0)
        self.code = V ** torch.arange(T - 1, -1, -1)

    def __call__(self, idx, causal, mask=None):
        """causal: position i predicts token i from those before it, idx being shifted right; otherwise from what is no mask."""
        extra, idx = max(0, idx.size(1) - self.T), idx[:, :self.T]                      # a last block may reach beyond T
        L = idx.size(1)
        one_hot = torch.nn.functional.one_hot(self.x[:, :L], self.V).double()           # (V^T, L, V)
        agree = (torch.cat([idx[:, 1:], idx[:, :1]], 1) if causal else idx)[:, None] == self.x[:, :L]
        if causal:
            w = torch.cat([torch.ones_like(agree[..., :1]), agree[..., :-1]], 2).long().cumprod(2) * self.p[:, None]
            logits = torch.einsum("bcl,clv->blv", w, one_hot).log()
        else:
            logits = torch.einsum("bc,clv->blv", (agree | (idx == self.V)[:, None]).all(2) * self.p, one_hot).log()
        return torch.nn.functional.pad(logits, (0, 0, 0, extra))

    def counts(self, x):
        return torch.bincount((x * self.code).sum(1), minlength=len(self.p)).double()


def diff_law(f, order, monkeypatch, scores=None):
    """The exact law of sample_mdm's output: every sequence of tokens that it can draw, with its probability."""
    if scores is not None:
        monkeypatch.setattr(diffusion.torch, "rand", lambda shape, **_: torch.tensor(scores).expand(shape))
    draws = 3 if order != "confidence_sampled" else 6               # that one draws at all 3, then 2, then 1 places
    script = torch.tensor(list(itertools.product(range(3), repeat=draws)))              # one row of the batch each
    prob, used = torch.ones(len(script), dtype=torch.float64), [0]

    def scripted(logits, **_):                                      # rows come batch-major, the same number for each
        k = len(logits) // len(script)
        tokens = script[:, used[0]:used[0] + k]
        prob.mul_(logits.softmax(-1).view(len(script), k, -1).gather(2, tokens[..., None])[..., 0].prod(1))
        used[0] += k
        return tokens.flatten()
    monkeypatch.setattr(diffusion, "draw", scripted)
    x = diffusion.sample_mdm(f, torch.full((len(script), 3), 3), 3, order=order)
    assert prob.sum().item() == pytest.approx(1) and used[0] == draws
    return torch.zeros_like(f.p).index_add_(0, (x * f.code).sum(1), prob)


def test_oracle_sampler_has_the_exact_law(monkeypatch):
    """One token a step at temperature 1: every order that does not look at the drawn token gives the law itself."""
    f = DiffOracle(3, 3)
    for order in ("max_prob", "margin", "entropy", "left", "random"):
        for scores in itertools.permutations([0.1, 0.2, 0.3]) if order == "random" else [None]:     # exact for each order
            with monkeypatch.context() as m:
                assert torch.allclose(diff_law(f, order, m, scores), f.p, atol=1e-12), order
    assert (diff_law(f, "confidence_sampled", monkeypatch) - f.p).abs().sum() / 2 > 0.3 # the negative control fails


@pytest.mark.parametrize("order", [*diffusion.ORDERS, "blocks", "block", "ar"])
def test_oracle_sampler_chi_square(order):
    """The real draws at T = 5: 243 cells, 242 degrees of freedom: mean 242, s.d. 22."""
    f, N, g = DiffOracle(3, 5, spread=1.0), 10_000, torch.Generator().manual_seed(0)
    x = torch.full((N, 5), 3)
    if order == "ar":
        y = diffusion.sample_ar(f, x, 3, generator=g)
    elif order == "block":
        y = diffusion.sample_block(f, x, 3, 2, generator=g, cache=False)
    elif order == "blocks":
        y = diffusion.sample_mdm(f, x, 3, block_size=2, generator=g)
    else:
        y = diffusion.sample_mdm(f, x, 3, order=order, generator=g)
    chi2 = ((f.counts(y) - N * f.p) ** 2 / (N * f.p)).sum().item()
    assert chi2 > 1000 if order == "confidence_sampled" else chi2 < 330, chi2


def test_draws_reach_the_tail(monkeypatch):
    """A token of probability 5.6e-8 (a Gumbel above 16.7) comes about 11 times in 2e8 draws; from float32 uniforms, which
    are multiples of 2^-24 = 6.0e-8, it never does."""
    rare, g = math.exp(-16.7), torch.Generator().manual_seed(0)
    hits = sum(int((torch.rand(10_000_000, generator=g, dtype=torch.float64) > 1 - rare).sum()) for _ in range(20))
    assert 2 <= hits <= 25                                          # 11 expected, such noise reaches the tail
    logits = torch.tensor([[math.log1p(-rare), -16.7]])             # and draw asks for it and inverts it rightly
    for u, token in ((1 - 2.0 ** -53, 1), (1 - 0.99 * rare, 1), (1 - 1.01 * rare, 0), (1 - 2.0 ** -24, 0), (0.0, 0)):
        monkeypatch.setattr(diffusion.torch, "rand", lambda *shape, dtype, **_: torch.full(shape, u, dtype=dtype))
        assert diffusion.draw(logits).item() == token, u


def test_draw_follows_temperature_top_k_top_p():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5]).repeat(200_000, 1)
    p = logits[0].double().softmax(0)                               # sorted: tokens 0, 4, 2, 1, 3
    at_best = float(p[0])
    for how, keep in (({}, [0, 1, 2, 3, 4]), ({"temperature": 0.5}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [0, 4]),
                      ({"top_p": at_best - 1e-6}, [0]), ({"top_p": at_best + 1e-6}, [0, 4]),
                      ({"top_k": 3, "top_p": 0.999}, [0, 2, 4])):
        want = torch.zeros(5, dtype=torch.float64)
        want[keep] = p[keep] ** (1 / how.get("temperature", 1.0))
        want /= want.sum()
        got = torch.bincount(diffusion.draw(logits, generator=g, **how), minlength=5) / 200_000
        assert (got - want).abs().max() < 0.005 and (got[want == 0] == 0).all(), how
    assert diffusion.draw(logits[:3], temperature=0).tolist() == [0, 0, 0]


def diff_lm(layers="full", **fields):
    from model import ATTENTION, LM, ModelConfig
    if layers not in ATTENTION and "(" not in layers:
        pytest.skip(f"no layer {layers} yet")
    torch.manual_seed(0)
    lm = LM(ModelConfig(vocab_size=13, block_size=64, layers=layers, n_layer=2, n_head=2, n_embd=32, **fields)).double().eval()
    for p in lm.parameters():                                       # as initialised it predicts nearly the same everywhere
        p.data.mul_(4 if p.dim() > 1 else 1)
    return lm


def diff_count(f):
    """f with the sizes of its passes recorded."""
    class Counted:
        def __init__(self): self.passes = []
        def __call__(self, idx, **keywords):
            self.passes.append(idx.size(1))
            return f(idx, **keywords)
        def init_cache(self, *a): return f.init_cache(*a)
        def parameters(self): return f.parameters()
    return Counted()


def test_sampler_steps_threshold_and_given_tokens():
    f = diff_count(diff_lm())
    x, _ = diffusion.canvas([[1, 2, 3], [4, 13, 13, 5]], 12, 13)            # a prompt, and one with places to infill
    given = x != 13
    for kind, expect in (({}, 14), ({"steps": 5}, 5), ({"steps": 100}, 14), ({"threshold": 1.0}, 14), ({"threshold": 1e-9}, 1),
                         ({"steps": 4, "block_size": 6}, 5)):       # 2 and 3 blocks: 2 steps each
        seen, f.passes = [], []
        y = diffusion.sample_mdm(f, x, 13, generator=torch.Generator().manual_seed(0),
                         callback=lambda step, x: seen.append((x == 13).sum().item()), **kind)
        assert torch.equal(y[given], x[given]) and (y < 13).all()
        assert len(f.passes) == len(seen) and seen[-1] == 0 and all(a > b for a, b in zip(seen, seen[1:]))
        assert len(seen) == expect or "block_size" in kind and len(seen) <= 6, (kind, len(seen))
    assert torch.equal(x != 13, given)                              # the caller's canvas is not touched
    block = (torch.arange(16) - torch.tensor([[3], [1]])) // 4      # counted from each row's first hole

    def in_order(step, y):                                          # semi-autoregressive: no later block is begun early
        for row in range(2):
            open_ = block[row][y[row] == 13]
            for k in open_.unique()[1:]:
                assert ((y == 13) | given)[row][block[row] == k].all()
    diffusion.sample_mdm(f, x, 13, block_size=4, order="random", callback=in_order, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sampler", ["ar", "mdm", "mdm blocks", "block"])
def test_nothing_is_generated_after_end_of_text(sampler):
    lm = diff_lm()
    x, valid = diffusion.canvas([[12, 2, 3], [4]] * 20, 20, 13)             # id 12 ends a text; one in the prompt ends nothing
    kw = dict(generator=torch.Generator().manual_seed(0), valid=valid)
    run = {"ar": lambda **e: diffusion.sample_ar(lm, x, 13, **kw, **e), "mdm": lambda **e: diffusion.sample_mdm(lm, x, 13, **kw, **e),
           "mdm blocks": lambda **e: diffusion.sample_mdm(lm, x, 13, block_size=4, steps=10, **kw, **e),
           "block": lambda **e: diffusion.sample_block(lm, x, 13, 4, **kw, **e)}[sampler]
    y = run(eot_id=12)
    new = (x == 13) & valid
    after = ((y == 12) & new).cumsum(1) > 0
    assert after.any() and (y[after & new] == 12).all() and (y[:, 1] != 12).any()
    assert (y[~valid] == 0).all() and torch.equal(y[~new], x[~new])
    steps = []
    diffusion.sample_ar(lambda idx, causal: torch.nn.functional.one_hot(torch.full(idx.shape, 12), 13) * 1e3, x, 13, eot_id=12,
                valid=valid, callback=lambda step, x: steps.append(step))
    assert len(steps) == 1                                          # every row ended: it stops early


@pytest.mark.parametrize("layers", ["full", "full(window=6) full", "mla"])
def test_block_diffusion_equals_its_definition(layers):
    """Two streams == each noisy block alone against the cache of the clean blocks before it; size 1 == the AR chain."""
    lm, B, T = diff_lm(layers), 3, 12
    x = torch.randint(13, (B, T), generator=torch.Generator().manual_seed(0))
    for S in (1, 3, 12):
        noise = diffusion.mdm_noise(B * T // S, S, "exact", torch.Generator().manual_seed(S))
        masked = diffusion.mdm_mask("exact", noise)[0].view(B, T)
        two = diffusion.masked_nll(lm, x, 13, masked, S)
        cache, alone = lm.init_cache(B, T, dtype=torch.float64), []
        for s in range(0, T, S):
            noisy = torch.where(masked, 13, x)[:, s:s + S]
            alone.append(diffusion.token_nll(lm(noisy, causal=False, cache=cache, commit=False), x[:, s:s + S]))
            lm(x[:, s:s + S], causal=False, cache=cache)
        assert torch.allclose(two, torch.cat(alone, dim=1), atol=1e-9), S
        loss = diffusion.block_diffusion_loss(lm, x, 13, S, noise=noise)
        if S == T:
            assert torch.allclose(loss, diffusion.mdm_loss(lm, x, 13, noise=noise), atol=1e-6)
        if S == 1:                                                  # no variance: it is the chain itself
            other = diffusion.block_diffusion_loss(lm, x, 13, 1, noise=diffusion.mdm_noise(B * T, 1))
            assert loss.item() == pytest.approx(torch.cat(alone, dim=1).mean().item(), rel=1e-6) and torch.equal(loss, other)
            nll, se = diffusion.mdm_nll(lm, x, 13, 4, block_size=1)
            assert nll == pytest.approx(loss.item(), rel=1e-6) and se < 1e-9


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_sampling_equals_recomputed(temperature):
    lm = diff_lm()
    for prompts in ([[1, 2, 3], [4, 5, 6]], [[1], [2, 3, 4, 5, 6, 7, 8], [9, 13, 10]]):
        x, valid = diffusion.canvas(prompts, 9, 13)
        go = lambda f, **kw: f(generator=torch.Generator().manual_seed(7), temperature=temperature, valid=valid, **kw)
        a, b = (go(lambda **kw: diffusion.sample_ar(lm, x, 13, **kw), cache=c) for c in (True, False))
        assert torch.equal(a, b) and torch.equal(a[x != 13], x[x != 13])
        a, b = (go(lambda **kw: diffusion.sample_block(lm, x, 13, 4, steps=3, **kw), cache=c) for c in (True, False))
        assert torch.equal(a, b) and torch.equal(a[x != 13], x[x != 13])
        # dual cache: refreshed at every step it is no approximation
        a, b = (go(lambda **kw: diffusion.sample_mdm(lm, x, 13, block_size=4, steps=7, **kw), cache=c, refresh=1) for c in (True, False))
        assert torch.equal(a, b)
    f = diff_count(lm)
    diffusion.sample_mdm(f, x, 13, block_size=4, cache=True, valid=valid)
    assert set(f.passes) == {4, x.size(1)} and f.passes.count(4) > 4            # one full pass a block, then 4 tokens


def test_dual_cache_window_equals_the_full_pass():
    """Nothing changed since the full pass: the window computed against the cache gives the canvas's own logits."""
    lm = diff_lm()
    x, valid = torch.randint(14, (2, 16), generator=torch.Generator().manual_seed(0)), torch.ones(2, 16, dtype=torch.bool)
    valid[1, 13:] = False
    cache = lm.init_cache(2, 16, dtype=torch.float64)
    full = lm(x, causal=False, cache=cache, valid=valid)
    pos = torch.tensor([[5], [10]]) + torch.arange(4)
    part = lm(x.gather(1, pos), causal=False, cache=cache, commit=False, pos=pos, valid=valid.gather(1, pos))
    want = full.gather(1, pos[..., None].expand(-1, -1, 13))
    assert torch.allclose(part[0], want[0], atol=1e-9) and torch.allclose(part[1, :3], want[1, :3], atol=1e-9)
    assert torch.allclose(lm(x[1:, :13], causal=False), full[1:, :13], atol=1e-9)


@pytest.mark.parametrize("sampler", ["ar", "mdm", "mdm blocks", "dual", "block"])
def test_batch_invariance(sampler, monkeypatch):
    """Alone and beside longer and shorter rows: the same tokens at temperature 0, from the same logits, in float32."""
    lm, draw, seen = diff_lm().float(), diffusion.draw, []
    monkeypatch.setattr(diffusion, "draw", lambda logits, *a, **kw: seen.append(logits) or draw(logits, *a, **kw))
    run = {"ar": lambda x, v: diffusion.sample_ar(lm, x, 13, 0, valid=v),
           "mdm": lambda x, v: diffusion.sample_mdm(lm, x, 13, steps=6, temperature=0, valid=v),
           "mdm blocks": lambda x, v: diffusion.sample_mdm(lm, x, 13, steps=6, block_size=4, temperature=0, valid=v),
           "dual": lambda x, v: diffusion.sample_mdm(lm, x, 13, steps=6, block_size=4, temperature=0, valid=v, cache=True),
           "block": lambda x, v: diffusion.sample_block(lm, x, 13, 4, steps=2, temperature=0, valid=v)}[sampler]
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 1, 2], [3, 13, 5, 13]]
    together = run(*diffusion.canvas(prompts, 10, 13))
    logits = torch.cat(seen)
    for row, prompt in zip(together, prompts):
        seen.clear()
        assert torch.equal(run(*diffusion.canvas([prompt], 10, 13))[0], row[:len(prompt) + 10])
        assert torch.cdist(torch.cat(seen), logits, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-5


def test_block_hook_pauses():
    """What a tool call needs: an empty result changes nothing; a result becomes given text and the rest is filled again."""
    lm = diff_lm()
    x, _ = diffusion.canvas([[1, 2, 3]], 13, 13)
    plain = diffusion.sample_block(lm, x, 13, 4, temperature=0)
    assert torch.equal(plain, diffusion.sample_block(lm, x, 13, 4, temperature=0, on_block=lambda *a: None))
    called = []

    def tool(x, given, start, stop):
        if start == 4 and not called:
            called.append(x.clone())
            x[0, 6:10], given[0, 6:10] = torch.tensor([7, 7, 7, 7]), True              # the result reaches into the next block
        elif start == 8 and len(called) == 1:
            called.append(1)
            x[0, 11:12] = 13                                        # and a place to be filled again
    y = diffusion.sample_block(lm, x, 13, 4, temperature=0, on_block=tool)
    assert torch.equal(y[0, :6], plain[0, :6]) and (y[0, 6:10] == 7).all() and (y < 13).all()
    again = diffusion.canvas([y[0, :10].tolist()], 6, 13)[0]                # the same from scratch, the result in the prompt
    assert torch.equal(diffusion.sample_block(lm, again, 13, 4, temperature=0), y)


def test_diffusion_bad_input():
    f, x = DiffTable(3, 4), torch.full((2, 4), 3)
    for call, word in (
            (lambda: diffusion.sample_mdm(f, x, 3, steps=0), "steps"),
            (lambda: diffusion.sample_mdm(f, x, 3, threshold=0.0), "threshold"),
            (lambda: diffusion.sample_mdm(f, x, 3, threshold=1.5), "threshold"),
            (lambda: diffusion.sample_mdm(f, x, 3, threshold=0.9, order="left"), "threshold"),
            (lambda: diffusion.sample_mdm(f, x, 3, steps=4, threshold=0.9), "exclude"),
            (lambda: diffusion.sample_mdm(f, x, 3, order="best"), "order"),
            (lambda: diffusion.sample_mdm(f, x, 3, temperature=-1), "temperature"),
            (lambda: diffusion.sample_mdm(f, x, 3, cache=True), "block_size"),
            (lambda: diffusion.sample_mdm(f, x, 3, cache=True, block_size=2), "init_cache"),
            (lambda: diffusion.sample_ar(f, x, 3, top_p=0), "top_p"),
            (lambda: diffusion.sample_ar(f, x, 3, top_k=0), "top_k"),
            (lambda: diffusion.sample_block(f, x, 3, 0), "block_size"),
            (lambda: diffusion.mdm_loss(f, x, 3, "uniform"), "form"),
            (lambda: diffusion.chain_nll(f, x, 3, "right"), "order"),
            (lambda: diffusion.block_diffusion_loss(f, x, 3, 3), "block_size"),
            (lambda: diffusion.mdm_nll(f, x, 3, 2), "n_mc"),
            (lambda: diffusion.mixed_loss(f, x, 3, 3, 0.1), "ar_frac")):
        with pytest.raises(ValueError, match=word):
            call()

# ---------------------------------------------------------------------------------------------------------------------
# train.py

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small byte-level dataset made by prepare.py from made-up English."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = "the cat dog sat on a mat and saw one red bird then it ran far away from here to there".split()
    text = "\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(300))
    (folder / "text.txt").write_text(text)
    return str(prepare.prepare(text=[str(folder / "text.txt")], name="toy", tokenizer="byte", out_dir=str(folder / "data")))


def quiet(*_, **__):
    pass


def go(dataset, out, log=quiet, **flags):
    """A run of a very small model, five steps an epoch; the keywords are train.py's flags."""
    flags = {**dict(dataset=dataset, out=str(out), n_layer=1, n_head=2, n_embd=16, block_size=16, batch_tokens=64, unique_tokens=320, max_steps=12,
                    eval_every=6, eval_windows=8, save_every=100, log_every=1, warmup=2, lr=3e-3), **flags}
    return train.train(flags, log=log)


def go_until(step, dataset, out, **flags):
    """The same, stopped by SIGTERM during the given step: the run saves at its end and names the command to go on."""
    lines = []

    def log(line):
        lines.append(line)
        if line.startswith(f"step {step - 1}/"):
            os.kill(os.getpid(), signal.SIGTERM)
    result = go(dataset, out, log, **flags)
    assert result["stopped"] and result["step"] == step - 1 and f"--resume auto --out {out}" in lines[-1]


def history(out, kind="train", keys=("step", "loss")):
    return [tuple(r[k] for k in keys) for r in map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["lm"].state_dict().values(), b["lm"].state_dict().values()))


@pytest.mark.parametrize("U, T, per_step", [(320, 16, 4), (333, 16, 7), (64, 64, 2)])
def test_loader_sees_every_token_once_an_epoch(U, T, per_step):
    data = np.arange(1000, dtype=np.uint16) + 64000                                    # above 2^15: a signed reading would show
    loader = train.Windows(data, U, T, seed=3)
    windows = [loader.read(loader.starts(i, per_step)) for i in range(0, 6 * loader.n, per_step)]
    windows = torch.cat(windows)[:6 * loader.n].reshape(6, -1)
    for epoch in windows:
        assert sorted(epoch.tolist()) == list(range(64000, 64000 + U // T * T))
    assert not torch.equal(windows[0], windows[1]), "each epoch has its own order"
    again = train.Windows(data, U, T, seed=3)
    assert torch.equal(again.read(again.starts(5 * loader.n, loader.n)).flatten(), windows[5]), "a pure function of (seed, epoch)"


@pytest.mark.parametrize("kind", [dict(objective="ar"), dict(objective="mdm", optimizer="muon"), dict(objective="mixed"),
                                  dict(objective="block", diffusion_block=4, set=["n_expert=4"])], ids=str)
def test_resume_is_bit_exact(dataset, tmp_path, kind):
    """Stopped mid-epoch (7) and at an epoch boundary (10), with dropout: every later loss is the same number."""
    kind = dict(dropout=0.1, **kind)
    whole = go(dataset, tmp_path / "whole", **kind)
    for cut in (8, 11):
        go_until(cut, dataset, tmp_path / f"cut{cut}", **kind)
        resumed = go(dataset, tmp_path / f"cut{cut}", resume="auto", **kind)
        for what in ("train", "eval"):
            assert history(tmp_path / f"cut{cut}", what) == history(tmp_path / "whole", what)
        assert same_weights(whole, resumed)


@pytest.mark.parametrize("lost", ("rng", "optimizers"))
def test_resume_without_a_part_of_the_state_differs(dataset, tmp_path, lost):
    """The negative control of the test above."""
    go(dataset, tmp_path / "whole", dropout=0.1)
    go_until(8, dataset, tmp_path / "cut", dropout=0.1)
    state = train.load_checkpoint(tmp_path / "cut")
    state["rng" if lost == "rng" else "optimizers"] = torch.Generator().manual_seed(5).get_state() if lost == "rng" else []
    torch.save(state, tmp_path / "cut" / "ckpt_last.pt")
    go(dataset, tmp_path / "cut", resume="auto", dropout=0.1)
    assert history(tmp_path / "cut") != history(tmp_path / "whole")


def test_evaluation_and_logging_do_not_disturb_training(dataset, tmp_path):
    runs = [go(dataset, tmp_path / str(i), objective="mdm", dropout=0.1, **kind)
            for i, kind in enumerate((dict(eval_every=1), dict(eval_every=0, log_every=5, save_every=2)))]
    assert same_weights(*runs)


@pytest.mark.parametrize("kind", [dict(objective="ar", input_mask=0.1, token_noise=0.05), dict(objective="mdm"), dict(objective="mixed", ar_frac=0.25),
                                  dict(objective="block", diffusion_block=8, set=["n_expert=4"])], ids=str)
def test_accumulation_changes_nothing(dataset, tmp_path, kind):
    """4 windows at once == 4 x 1: the noise belongs to the global batch, and the loss is normalised by its tokens."""
    whole, parts = (go(dataset, tmp_path / str(m), micro_batch=m, max_steps=4, **kind) for m in (4, 1))
    np.testing.assert_allclose(history(tmp_path / "4"), history(tmp_path / "1"), rtol=1e-5)
    for a, b in zip(whole["lm"].parameters(), parts["lm"].parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def two_processes(rank, dataset, out, init):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=2)
    go(dataset, out, objective="mixed", max_steps=3, threads=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork")
def test_two_processes_equal_one(dataset, tmp_path):
    one = go(dataset, tmp_path / "one", objective="mixed", max_steps=3)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=two_processes, args=(r, dataset, tmp_path / "two", tmp_path / "init")) for r in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(60)
        assert p.exitcode == 0
    two, _ = train.load_model(tmp_path / "two", "last")
    for a, b in zip(one["lm"].parameters(), two.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    np.testing.assert_allclose(history(tmp_path / "one"), history(tmp_path / "two"), rtol=1e-5)


def test_muon_is_torchs():
    """Our batched Muon against torch.optim.Muon, matrices of two shapes, three steps."""
    torch.manual_seed(0)
    ours = [torch.randn(s) for s in ((8, 24), (8, 24), (24, 8))]
    start, theirs = [p.clone() for p in ours], [p.clone() for p in ours]
    a = train.Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (q - s).norm()                                  # bf16 matmuls, batched or not


def test_orthogonalise():
    G = torch.randn(3, 20, 12)
    s = torch.linalg.svdvals(train.orthogonalise(G).float())
    assert s.min() > 0.5 and s.max() < 1.35


def test_schedules():
    flags = {**train.DEFAULTS, "lr": 1.0, "warmup": 10, "min_lr": 0.1}
    at = lambda kind, step: train.learning_rate(step, 100, {**flags, "schedule": kind})
    assert at("wsd", 0) == 0.1 and at("wsd", 50) == 1.0 and at("wsd", 90) == pytest.approx(0.55) and at("wsd", 100) == pytest.approx(0.1)
    assert at("cosine", 10) == 1.0 and at("cosine", 100) == pytest.approx(0.1) and at("constant", 99) == 1.0


def test_eval_steps():
    steps = lambda **f: sorted(train.eval_steps({**train.DEFAULTS, **f}, 100, 5.0))
    assert steps(eval_every=40) == [40, 80, 100] and steps(eval_every=0) == [100] and steps(eval_epochs="1,2.4,4") == [5, 12, 20, 100]
    assert steps(eval_epochs="geometric")[0] == 5 and len(steps(eval_epochs="geometric")) == 12 and len(steps(eval_epochs="geometric:3")) == 3


@pytest.mark.parametrize("objective", ("ar", "mdm"))
def test_evaluate_is_deterministic_and_independent_of_batch(objective):
    torch.manual_seed(0)
    lm, windows = LM(tiny(dropout=0.5)), torch.randint(11, (12, 20))
    a, b = (train.evaluate(lm, windows, objective, rows=r) for r in (12, 5))
    assert lm.training and a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["loss"] == pytest.approx(math.log(11), abs=0.1)


def test_log_lines_and_metrics_say_the_same(dataset, tmp_path):
    lines = []
    go(dataset, tmp_path / "run", lines.append, objective="mdm")
    seen = [(int(m[1]), float(m[2])) for m in (re.match(r"step (\d+)/\d+ \| epoch [\d.]+ \| loss ([\d.]+) \|", line) for line in lines) if m]
    np.testing.assert_allclose(seen, history(tmp_path / "run"), atol=1e-4)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["kind"] == "eval" and row["tokens"] == 12 * 64 and row["epoch"] == pytest.approx(12 * 64 / 320) and row["se"] > 0
    assert row["bpb"] == pytest.approx(row["loss"] / math.log(2), rel=0.01)            # bytes: one per token, but for end-of-text
    assert {f.name for f in (tmp_path / "run").iterdir()} >= {"config.json", "meta.json", "metrics.jsonl", "ckpt_last.pt", "ckpt_best.pt"}


def test_nan_stops_the_run_and_keeps_the_checkpoint(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"at step \d+.*last good checkpoint is .*ckpt_last.pt \(step 6\)"):
        poisoned(dataset, tmp_path / "run")
    lm, state = train.load_model(tmp_path / "run", "last")
    assert state["step"] == 6 and all(p.isfinite().all() for p in lm.parameters())


def poisoned(dataset, out):
    """A run whose loss turns NaN in step 9."""
    loss, calls = diffusion.ar_loss, []

    def ar_loss(f, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return loss(f, *args, **kwargs) * (math.nan if sum(calls) == 9 else 1)
    diffusion.ar_loss = ar_loss
    try:
        go(dataset, out)
    finally:
        diffusion.ar_loss = loss


def test_half_written_checkpoint_never_gets_the_final_name(dataset, tmp_path, monkeypatch):
    go(dataset, tmp_path / "run")
    before = (tmp_path / "run" / "ckpt_last.pt").read_bytes()

    def full_disk(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ValueError, match="No space left"):
        go(dataset, tmp_path / "run", resume="auto", max_steps=20)
    assert (tmp_path / "run" / "ckpt_last.pt").read_bytes() == before


BAD = {
    "--max_step 3": "--max_steps", "--objective arr": "did you mean 'ar'", "--dataset {tmp}/nothing": "nothing", "--unique_tokens 99999999": "more than",
    "--block_size 4096": "smaller --block_size", "--block_size 512": "smaller --block_size", "--n_head 3": "multiple of n_head", "--n_kv_head 4 --n_head 6 --n_embd 24": "n_kv_head",
    "--epochs -1": "above 0", "--batch_tokens 70": "multiple of block_size", "--set windw=3": "did you mean 'window'", "--set window": "key=value",
    "--layers ful": "did you mean 'full'", "--resume {tmp}/no.pt": "no checkpoint", "--eval_epochs often": "neither a list", "--out {out}": "already holds a run",
    "--out {out} --resume auto --n_embd 32": "checkpoint: 16", "--resume {cut}": "truncated", "--device cuda:9": "CUDA", "--out {file}/x": "cannot write",
    "--dropout 2": "between 0 and 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_status_2(dataset, tmp_path, capsys, line):
    if "{out}" in line:
        go(dataset, tmp_path / "out", max_steps=1)
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not the whole file")
    (tmp_path / "file").write_text("")
    line = line.format(tmp=tmp_path, out=tmp_path / "out", cut=tmp_path / "cut.pt", file=tmp_path / "file")
    base = f"--dataset {dataset} --out {tmp_path / 'new'} --unique_tokens 320 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_tokens 64 --max_steps 1"
    if "--resume" in line:
        base = f"--dataset {dataset}"
    try:
        status = train.main((base + " " + line).split())
    except SystemExit as e:                                                            # argparse's own way out
        status = e.code
    error = capsys.readouterr().err
    expected = next(v for k, v in BAD.items() if k.format(tmp=tmp_path, out=tmp_path / "out", cut=tmp_path / "cut.pt", file=tmp_path / "file") == line)
    assert status == 2 and expected in error and len(error.strip().splitlines()) == 1 and "Traceback" not in error


def test_help_lists_at_most_45_flags(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert len(train.DEFAULTS) <= 45 and all(f"--{name}" in text for name in train.DEFAULTS)

# ---------------------------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for objective in ("ar", "mdm", "mixed", "block"):
        go(dataset, folder / objective, objective=objective, diffusion_block=4)
    return folder


def test_sample_goes_on_fills_in_and_scores(runs, capsys, tmp_path):
    say = lambda *argv: (sample.main([str(a) for a in argv]), capsys.readouterr().out)
    for objective in ("ar", "mdm", "mixed"):
        status, out = say(runs / objective, "--prompt", "the cat", "--max_new_tokens", 6, "--num_samples", 2)
        assert status == 0 and out.count("the cat") == 2
    for objective in ("mdm", "mixed"):
        status, out = say(runs / objective, "--prompt", "the [MASK:3] sat", "--watch", "--pause", 0)
        assert status == 0 and "step 1" in out and "step 3" in out and re.search(r"\nthe [^░]* sat\s*$", out)
    (tmp_path / "text").write_text("the cat sat on a mat. " * 10)
    for objective, measures in (("ar", 1), ("mdm", 3), ("mixed", 4), ("block", 3)):
        status, out = say("score", runs / objective, "--text", tmp_path / "text", "--n_mc", 8, "--windows", 2)
        assert status == 0 and out.count("nats/token") == measures


@pytest.mark.parametrize("run, flags, steps", [
    ("ar", "--top_k 5", 6), ("mixed", "", 6), ("mixed", "--steps 2", 2), ("mdm", "--steps 3 --order margin", 3), ("mdm", "--threshold 1e-9", 1),
    ("mdm", "--block_size 3 --steps 4", 4), ("mdm", "--block_size 3 --cache --top_p 0.9", 6), ("mdm", "--block_size 3 --cache --refresh 2", 6),
    ("block", "", None), ("block", "--steps 1", None), ("block", "--threshold 0.9 --order max_prob", None)])
def test_sample_reaches_every_sampler(runs, capsys, run, flags, steps):
    """Prompts of two lengths go through one batch, and each comes out as it does alone."""
    def say(*prompts):
        argv = [str(runs / run), *flags.split(), "--max_new_tokens", "6", "--temperature", "0"] + [a for p in prompts for a in ("--prompt", p)]
        assert sample.main(argv) == 0
        out, err = capsys.readouterr()
        return out, int(re.search(r"tokens in (\d+) steps", err)[1])
    prompts = ["the", "the cat s"]
    together, n = say(*prompts)
    alone = [say(p)[0] for p in prompts]
    assert together == "".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(alone)) and steps in (None, n)
    assert all(text.startswith(p) for text, p in zip(alone, prompts))


def test_sample_prints_nothing_after_end_of_text(runs, capsys, monkeypatch):
    monkeypatch.setattr(diffusion, "sample_mdm", lambda f, x, mask, **how: torch.where(x == mask, how["eot_id"], x))
    assert sample.main([str(runs / "mdm"), "--prompt", "a [MASK:2]b", "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out == "--- sample 1\na b\n--- sample 2\nthe cat\n"


def test_block_chain_is_a_distribution():
    """exp(-nll) sums to 1 over all texts; size 1 is the bound without variance, size T the chain of the whole window."""
    torch.manual_seed(0)
    lm = LM(tiny(vocab_size=2, n_layer=2)).double().eval()
    x = torch.tensor(list(itertools.product((0, 1), repeat=6)))
    with torch.no_grad():
        for order in ("left", "confidence"):
            for S in (1, 2, 3, 6):
                nll = sample.block_chain(lm, x, S, order)
                assert torch.exp(-6 * nll).sum().item() == pytest.approx(1, abs=1e-9)
            assert torch.allclose(nll, diffusion.chain_nll(lm, x, 2, order))
        assert sample.block_chain(lm, x, 1, "left").mean().item() == pytest.approx(diffusion.mdm_nll(lm, x, 2, 4, block_size=1)[0], abs=1e-9)


def test_dual_cache_needs_layers_that_rewrite():
    sample.check_dual_cache(tiny(layers="full*3"))
    for bad in (tiny(layers="full(window=4) full"), tiny(window=8)):
        with pytest.raises(ValueError, match="leave --cache out"):
            sample.check_dual_cache(bad)


def test_sample_refuses(runs, capsys):
    for argv, message in (("ar --prompt a_[MASK:2]", "needs a diffusion model"), ("ar --steps 4", "autoregressive"), ("none", "no checkpoint"),
                          (f"ar --prompt {'a' * 30}", "window of 16"), (f"mdm --prompt {'a' * 30}", "window of 16"),
                          ("mdm --prompt a --max_new_tokens 0", "put [MASK]"), ("mdm --steps 0", "at least 1"), ("mdm --order best", "max_prob"),
                          ("mdm --threshold 1.5", "(0, 1]"), ("mdm --threshold 0", "(0, 1]"), ("mdm --threshold 0.9 --steps 3", "exclude"),
                          ("mdm --threshold 0.9 --order left", "max_prob"), ("mdm --cache", "block_size"), ("mdm --block_size 0", "at least 1"),
                          ("mdm --refresh 2", "needs --cache"), ("mdm --block_size 4 --cache --refresh 0", "at least 1"),
                          ("block --block_size 8", "blocks of 4"), ("block --cache", "blocks of 4"), ("mdm --temperature -1", "temperature")):
        run, *rest = argv.split()
        assert sample.main([str(runs / run), *rest]) == 2, argv
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, (argv, error)

# ---------------------------------------------------------------------------------------------------------------------
# bench.py

def curve(*losses, se=0.01):
    return [dict(epoch=2.0 ** i, step=2 ** i, tokens=10 * 2 ** i, flops=100 * 2 ** i, loss=l, se=se) for i, l in enumerate(losses)]


def test_crossing():
    ar, mdm = curve(3.0, 2.0, 2.5, 3.5, 4.0, se=0.0), curve(4.0, 3.5, 3.0, 2.5, 2.2)
    c = bench.crossing(ar, mdm)
    assert c["epoch"] == pytest.approx(2 ** (2 + 0.5 / 1.5)) and c["step"] == round(c["epoch"]) and c["flops"] == round(100 * c["epoch"])
    assert bench.crossing(None, mdm, level=2.0) is None, "the honest crossing never came"
    assert bench.crossing(ar, curve(4.0, 3.5, 3.0, 2.5, 3.99)) is None, "two successive evaluations are needed"
    assert bench.crossing(ar, curve(4.0, 3.5, 3.0, 2.5, 2.2, se=0.6)) is None, "within two standard errors it does not count"
    assert bench.crossing(None, mdm, level=3.2)["epoch"] == pytest.approx(2 ** (1 + 0.3 / 0.5))


def test_crossover_end_to_end(dataset, tmp_path, capsys):
    """The main job in small: both arms, table, picture, numbers; run again it finds everything done."""
    argv = f"""crossover --scale cpu --dataset {dataset} --unique_tokens 320 --epochs 4 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16
               --batch_tokens 64 --evals 3 --out {tmp_path / 'runs'} --results {tmp_path / 'results'}""".split()
    assert bench.main(argv) == 0
    out = capsys.readouterr().out
    assert "curve crossing" in out and "honest crossing" in out and "a sample of mdm" in out
    rows = json.loads((tmp_path / "results" / "crossover_cpu.json").read_text())["rows"]
    assert [r["arm"] for r in rows] == ["ar", "mdm", "crossing"] and len(rows[0]["evals"]) == 3
    assert (tmp_path / "results" / "crossover_cpu.png").stat().st_size > 10_000


def test_judged_is_its_definition():
    torch.manual_seed(0)
    lm, x = LM(tiny(vocab_size=7)).eval(), torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 6, 6, 6]])
    loss, se, entropy = bench.judged(lm, x, 2)
    with torch.no_grad():
        want = diffusion.token_nll(lm(diffusion.shift_right(x, 7)), x)[:, 2:]
    assert loss == pytest.approx(want.mean().item()) and se == pytest.approx(want.mean(1).std().item() / 2 ** 0.5)
    assert entropy == pytest.approx(math.log(4) / 2), "four different tokens, and four equal ones"
    assert re.fullmatch(r"(\d\+\d=\d\d;){9}", bench.sums(9, 0))


def test_decode_and_panel_end_to_end(runs, tmp_path, capsys, monkeypatch):
    """Every sampler on runs of the tests: rows, picture, the arithmetic set, the likelihoods."""
    monkeypatch.setattr(bench, "overhead", lambda *_: [])
    common = f"--run_ar {runs / 'ar'} --run_mdm {runs / 'mdm'} --run_block {runs / 'block'} --results {tmp_path} --out {tmp_path / 'out'}".split()
    assert bench.main(["decode", *common, "--judge", str(runs / "ar"), "--run_sums", str(runs / "mdm"), "--batches", "1,2"]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    timed = [r for r in rows if "tok_per_s" in r]
    assert {r["sampler"] for r in timed} == set(bench.decoders(14)) and {r["batch"] for r in timed} == {1, 2}
    assert all(r["passes"] == r.get("steps", 14) for r in timed if "order" in r) and all(0 < r["overhead"] < 1 for r in timed)
    assert all(r["agreement"] <= 1 for r in rows if "agreement" in r) and any("exact_match" in r for r in rows)
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    assert bench.main(["panel", *common, "--windows", "2", "--n_mc", "4"]) == 0
    rows = json.loads((tmp_path / "panel.json").read_text())["rows"]
    assert [r["run"] for r in rows] == ["ar"] + ["mdm"] * 3 + ["block"] * 3 and all(r["bits_per_byte"] > 0 for r in rows)
    assert bench.main(["decode", *common, "--objective", "block"]) == 2 and "ar, mdm" in capsys.readouterr().err
