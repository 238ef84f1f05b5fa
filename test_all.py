"""All tests: python -m pytest test_all.py. CPU only, no network, under four minutes on two cores.

By equivalence and by definition: enumeration, float64 oracles, cached against recomputed, peers against ours.
"""
import bz2
import collections
import contextlib
import copy
import doctest
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import tokenize
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import permutations, product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytest import approx
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

import attention
import bench
import diffusion
import model
import prepare
import sample
import train
from attention import (ATTENTION, LayerConfig, block_sparse_attention, compressed_scores, delta_rule,
                       delta_rule_recurrent, flex_window_attention, linear_attention,
                       linear_attention_recurrent, select_blocks, softmax_attention, visible,
                       window_attention)
from diffusion import (any_order_nll, ar_loss, block_diffusion_loss, canvas, chain_nll, confidence, corrupt,
                       mdm_loss, mdm_mask, mdm_nll, mdm_noise, mixed_loss, sample_ar, sample_block,
                       sample_mdm, smallest, token_nll)
from model import LM, PRESETS, ModelConfig, MoE, activate, from_preset, override, parse_layers, parse_value

torch.set_num_threads(1)
each = pytest.mark.parametrize
on_gpu = pytest.mark.gpu
no_grad = torch.no_grad()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # for the bit-exact resume on a GPU


@pytest.fixture(autouse=True)
def alike(request, monkeypatch, tmp_path):
    """Every test begins in an empty folder with the same random numbers, and compiles anew. Where there is a
    GPU, `auto` would choose it: only the tests marked gpu may see it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    if "gpu" not in request.keywords:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    elif not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture
def float64():
    """What is no question of float32 is computed in float64: equal means 1e-10, no near tie is rounded."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


exactly = pytest.mark.usefixtures("float64")


def close(a, b, tol=None):
    """Equal to tol of the largest value of b: rounding differs between processors and grows with values."""
    if not torch.is_tensor(b):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            close(x, y, tol)
        return
    tol = tol or (1e-10 if b.dtype == torch.float64 else 1e-5)
    size = b.detach().nan_to_num(posinf=0, neginf=0).abs().max().item()
    torch.testing.assert_close(a, b, rtol=0, atol=tol * size)


def off(a, b, norm=None):
    """The norm of a - b, relative to that of b, which is the truth in float64, or to another."""
    assert torch.isfinite(a).all()
    return ((a.double() - b).norm() / (b.norm() if norm is None else norm).clamp(min=1e-30)).item()


def same_gradients(a, b, inputs, tol=None):
    """Outputs of two functions of the inputs, and gradients of a random scalar, to tol of the largest."""
    results = []
    for f in (a, b):
        y = f(*inputs)
        w = torch.randn(y.shape, generator=seeded(1)).to(y)
        results.append([y, *torch.autograd.grad((y * w).sum(), inputs)])
    close(*results, tol)


def refused(words):
    """With this around it, code must raise a ValueError that says so."""
    return pytest.raises(ValueError, match=words)


# ------------------------------------------------------------------------------------------------------------
# Size

BUDGET = {
    "attention.py": 19_070,
    "model.py": 8_125,
    "diffusion.py": 6_010,
    "train.py": 10_515,
    "sample.py": 4_730,
    "prepare.py": 6_800,
    "bench.py": 27_990,
    "test_all.py": 46_000,
}


@each("name", BUDGET)
def test_size(name):
    """Tokens without comments and layout, a docstring or an f-string one token; lines of 110 columns."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    count = 0
    inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        count += not inside and kind not in ("NL", "NEWLINE", "COMMENT", "INDENT", "DEDENT", "ENDMARKER")
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")   # from Python 3.12 on they are cut up
    assert count <= BUDGET[name], "say less, or raise the budget"
    assert max(map(len, text.splitlines())) <= 110


# ------------------------------------------------------------------------------------------------------------
# attention.py: the contract of every layer

def tiny(**values):
    """A small model's config; block_size covers every length used here."""
    return override(ModelConfig(vocab_size=11, block_size=256, n_layer=2, n_head=4, n_embd=32), values)


def named(text):
    """{name: settings} of lines "name: key=value ..."."""
    rows = (line.partition(":") for line in text.split("\n") if line)
    return {name: model.settings(given) for name, _, given in rows}


def pairs(text):
    """[(left, right)] of lines "left => right"."""
    return [tuple(map(str.strip, line.rsplit("=>", 1))) for line in text.split("\n") if line]


def sizes(text):
    """[(1, 2), (3, 4)] of "1 2 | 3 4"."""
    return [tuple(map(int, row.split())) for row in text.split("|")]


def write(path, content):
    """A file, and its folder, of bytes, of text, or of an object as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def up_to(*lengths):
    """(B, T), T the largest length: True at the first tokens of each row."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


BLOCKS = "sel_block=8 sel_topk=4 cmp_block=8 cmp_stride=4"

# case: its settings. The first word names the layer. A new layer or option is tested by being listed here.
CASES = named(f"""
full:
full gqa: n_kv_head=2
full window: window=5
full sink: sink=true
full stretched: rope_factor=4.0 rope_original=20
full partial rotary: rotary_fraction=0.25 head_dim=16
full all: n_kv_head=1 window=7 sink=true attn_gate=true qk_norm=true rotary_fraction=0.5
mla:
mla unrotated: qk_rope_head_dim=0
mla normed: qk_norm=true
mla low-rank q: q_lora_rank=12 kv_lora_rank=4 qk_rope_head_dim=2 v_head_dim=6
nsa: n_kv_head=2 window=6 {BLOCKS}
nsa 6/2/4: sel_block=4 sel_topk=5 sel_local=1 sel_tile=1 cmp_block=6 cmp_stride=2 window=3 attn_gate=true
infllm default:
infllm: n_kv_head=2 sel_local=2 dense_len=20 {BLOCKS}
infllm moba: n_kv_head=2 sel_block=8 sel_topk=2 sel_init=0 sel_local=1 cmp_block=8 cmp_stride=8 dense_len=0 \
sel_per_head=true
msa: n_kv_head=2 sel_block=8 sel_topk=2 qk_norm=true rotary_fraction=0.5 index_head_dim=6
dsa: sel_topk=9 q_lora_rank=12
dsa direct q: sel_topk=15 index_n_head=3 index_head_dim=10
linear fixed: linear_decay=fixed
linear head: linear_decay=head linear_n_v_head=8 linear_key_dim=6 linear_value_dim=10
linear lower: linear_decay=channel decay_gate=lower conv_size=1
linear channel: linear_decay=channel out_gate_rank=0
linear:
deltanet: neg_eigval=true
gated_deltanet lower: decay_gate=lower out_gate=sigmoid conv_size=1 neg_eigval=true
gated_deltanet: linear_n_head=2 linear_n_v_head=4 linear_key_dim=8 linear_value_dim=12
kda softplus: decay_gate=softplus neg_eigval=true out_gate_rank=0 linear_n_v_head=8
kda:
kda product: writes=3 neg_eigval=true
kda channel_beta: channel_beta=true decay_gate=softplus neg_eigval=true linear_value_dim=12
kda channel_beta product: channel_beta=true writes=2
deltanet product: writes=2 linear_n_head=2 linear_n_v_head=4
""")


def cases(*families):
    return [case for case in CASES if ATTENTION[case.split()[0]].family in families]


each_case = each("case", CASES)


def make_layer(case, **more):
    """With every parameter random, so that nothing is hidden by a zero; a case not listed has no settings."""
    torch.manual_seed(0)
    layer = ATTENTION[case.split()[0]](tiny(**CASES.get(case, {}) | more))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.eval()


def decode(layer, x, chunks, cache):
    return torch.cat([layer(part, cache=cache) for part in x.split(chunks, dim=1)], dim=1)


@exactly
@each_case
@no_grad
def test_cached_equals_parallel(case):
    """Prefill and token-by-token decoding, in any cut, with drafts (commit=False) in between."""
    layer, ones = make_layer(case), [1] * 40
    for chunks in ([1], [2], [31], ones[:31], [15] + ones[:16], [100], [25, 1, 1, 2, 31] + ones):
        x = torch.randn(2, sum(chunks), 32)
        cache = layer.init_cache(2, sum(chunks))
        out = []
        for part in x.split(chunks, dim=1):
            layer(torch.randn_like(part), cache=cache, commit=False)
            out.append(layer(part, cache=cache))
        close(torch.cat(out, dim=1), layer(x))
        assert cache.pos.tolist() == [sum(chunks)] * 2


@each_case
@no_grad
def test_layers_see_the_past_or_everything(case, monkeypatch):
    """Causal, no bit of the past depends on the future, computed one way or the other."""
    layer, (x, other) = make_layer(case), torch.randn(2, 1, 300, 32)
    for compiled in (False, True) if layer.family == "linear" else (False,):        # True: the grouped scan
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiled)
        y, both = layer(x), layer(x, causal=False)
        for t in (1, 7, 16, 17, 33, 64, 100, 257):
            mixed = torch.cat([x[:, :t], other[:, t:]], dim=1)
            z = layer(mixed)
            assert torch.equal(y[:, :t], z[:, :t])                  # no position saw its future
            assert not torch.equal(y[:, t], z[:, t])
            near = layer(mixed, causal=False)[:, :t] - both[:, :t]
            assert near.abs().max() > 1e-6                          # bidirectional sees the right


@exactly
@each_case
@each("causal", (True, False))
@no_grad
def test_padding_changes_nothing(case, causal):
    """Rows of different lengths: each as it is alone, parallel, cached, and going on behind its end."""
    layer, lengths = make_layer(case), (30, 17, 2)
    valid = up_to(*lengths)
    junk = math.nan if layer.family == "linear" else 1e3    # what a state took in would stay there
    x = torch.randn(3, 30, 32).masked_fill(~valid[..., None], junk)
    more = torch.randn(3, 3, 32)
    cache = layer.init_cache(3, 33)
    aux = {}
    total = 0
    y = layer(x, causal=causal, valid=valid, aux=aux)
    cached = layer(x, causal=causal, valid=valid, cache=cache)
    after = decode(layer, more, [1, 2], cache)
    last = layer(more[:, :1], cache=cache, valid=torch.tensor([[False], [True], [True]]))   # row 0 is full
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        one = layer.init_cache(1, 40)
        own = {}
        alone = layer(x[row, :n], causal=causal, cache=one, aux=own)
        close(y[row, :n], alone)
        close(cached[row, :n], alone)
        close(after[row], layer(more[row], cache=one))
        if b > 0:
            close(last[row], layer(more[row, :1], cache=one))
        total += n * own.get("indexer_kl", 0)
    if aux:                                                 # a mean over valid tokens
        close(aux["indexer_kl"], total / sum(lengths))


@exactly
@each_case
@no_grad
def test_noisy_blocks_read_a_clean_prefix(case):
    """Bidirectional, without commit, behind a causal prefix: the same each time, all of both in sight."""
    layer, x = make_layer(case), torch.randn(2, 24, 32)
    block, cache = x[:, 16:], layer.init_cache(2, 24)
    layer(x[:, :16], cache=cache)
    noisy = partial(layer, cache=cache, causal=False, commit=False)
    first = noisy(block)
    other = block.clone()
    other[:, -1] += 1
    assert not torch.equal(noisy(other)[:, :-1], first[:, :-1])
    assert torch.equal(noisy(block), first) and cache.pos.tolist() == [16, 16]
    if "dsa" not in case:
        # The last token has nothing behind it, so causal says the same, where no neighbour has a say.
        layer = make_layer(case, conv_size=1, sel_tile=1)
        cache = layer.init_cache(2, 24)
        layer(x[:, :16], cache=cache)
        close(layer(block, cache=cache, causal=False, commit=False)[:, -1], layer(x)[:, -1])


@each_case
def test_costs_are_those_of_the_cache(case):
    layer, bf16 = make_layer(case), torch.bfloat16
    cache = vars(layer.init_cache(1, 64, dtype=bf16))
    held = sum(a.nbytes for name, a in cache.items() if torch.is_tensor(a) and name != "pos")
    assert layer.cache_bytes(64, bf16) == held
    assert 0 < layer.reads(64, True) <= layer.reads(64, False)
    if layer.family == "linear":
        assert layer.cache_bytes(10 ** 6, bf16) == held and layer.reads(4096) == layer.K
        assert 0 < layer.flops(4096) <= 2 * layer.flops(2048)
    else:
        assert 0 < layer.flops(64, True) <= layer.flops(64, False)


# keywords of a call on 2 x 4 tokens, behind 6 in a cache of 12 => what the refusal says
CALLS = pairs("""
pos=torch.arange(9, 13)                  => outside the cache
pos=torch.arange(-1, 3)                  => outside the cache
pos=torch.tensor([6, 7, 9, 10])          => without a gap
pos=torch.tensor([7, 6, 8, 9])           => must rise
pos=torch.arange(3)                      => pos has shape
valid=torch.ones(2, 3) > 0               => valid has shape
valid=torch.arange(8).view(2, 4) > 0     => right only
mask=torch.ones(4, 4) > 0                => not both
pos=torch.arange(4)                      => reads its cache in order
pos=torch.arange(4), commit=False        => reads its cache in order
cache=None, mask=torch.ones(4, 4) > 0    => NAME takes no mask
x=x[:, :7]                               => 7 more do not fit, make it with init_cache
x=x[:1, :1]                              => the cache has 2 rows, and the batch 1
""")


@each_case
@no_grad
def test_layers_refuse_calls(case):
    layer, x = make_layer(case), torch.randn(2, 10, 32)
    cache = layer.init_cache(2, 12)
    layer(x[:, :6], cache=cache)
    taken = {"reads its cache in order": layer.rewrites, "NAME takes no mask": layer.takes_mask}
    for keywords, words in CALLS:
        if not taken.get(words):
            with refused(words.replace("NAME", type(layer).__name__)):
                layer(**dict(x=x[:, 6:], cache=cache) | eval(f"dict({keywords})"))
    assert cache.pos.tolist() == [6, 6]                             # a refused call counts nothing


@each_case
def test_layers_of_nothing(case):
    """No tokens or no rows: nothing comes back, nothing is remembered. On the meta device, shapes alone."""
    layer = make_layer(case)
    for (B, T), causal in product(sizes("2 0 | 0 5"), (True, False)):
        x, cache = torch.randn(B, T, 32), layer.init_cache(B, 9)
        assert layer(x, causal=causal).shape == x.shape
        assert layer(x, causal=causal, cache=cache, valid=torch.ones(B, T) > 0).shape == x.shape
        assert not cache.pos.any() and cache.used == 0
    layer, x = layer.to("meta"), torch.randn(2, 70, 32, device="meta")
    assert layer(x).shape == layer(x, causal=False).shape == x.shape
    if layer.family == "linear":
        assert layer(x[:, :3], cache=layer.init_cache(2, 9, "meta")).shape == (2, 3, 32)


@exactly
@each("case", [case for case in cases("softmax") if "window" not in CASES[case]])
@each("causal, max_len", [(True, 12), (False, 12), (False, 16)])
@no_grad
def test_slots_in_use_are_computed_anew(case, causal, max_len):
    """pos into a cache answers as the changed canvas does; a draft (commit=False) leaves every bit."""
    layer = make_layer(case)
    x = torch.randn(2, 12, 32)
    new = torch.randn(2, 4, 32)
    cache = layer.init_cache(2, max_len)
    layer(x, cache=cache)
    tensors = lambda: [a.clone() for a in vars(cache).values() if torch.is_tensor(a)]
    before = tensors()
    canvas = torch.cat([x[:, :3], new, x[:, 7:]], dim=1)
    want = layer(canvas, causal=causal)
    anew = partial(layer, new, cache=cache, causal=causal, pos=torch.arange(3, 7))
    close(anew(commit=False), want[:, 3:7])
    padded = anew(commit=False, valid=up_to(4, 3))
    assert all(map(torch.equal, before, tensors()))
    close(anew(), want[:, 3:7])
    close(layer(canvas[:, 8:9], cache=cache, causal=causal, pos=torch.tensor([8])), want[:, 8:9])
    canvas[1, 6] = x[1, 6]                          # padding hides itself, not what is there
    close(padded[:, :3], layer(canvas, causal=causal)[:, 3:6])


@each_case
def test_layers_in_bfloat16(case):
    """Under autocast, as train.py does it, and all in bf16: near float32, with gradients, cached."""
    layer = make_layer(case)
    x = torch.randn(2, 100, 32)
    aux = {}
    near = slice(0, 5 if layer.family == "sparse" else None)    # further on it may choose otherwise
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, aux=aux)
        (y.float().square().mean() + aux.get("indexer_kl", 0)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        want = layer(x)[:, near]
        cache = partial(layer.init_cache, 2, 100, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            cached = decode(layer, x, [90] + [1] * 10, cache())
        whole = decode(layer.bfloat16(), x.bfloat16(), [90] + [1] * 10, cache())
    assert whole.dtype == torch.bfloat16
    assert layer.family != "linear" or cache().state.dtype == torch.float32
    for y in (y, cached, whole):
        assert y.isfinite().all()
        assert off(y[:, near], want.double()) < 0.03


@exactly
@each("case", {case.split()[0]: case for case in CASES}.values())
def test_layers_compile_to_one_graph(case):
    """With gradients, in both directions; then decode steps, the last not compiled. Other values, the same
    graph, and what fits the cache is taken: compiled steps know its size alone."""
    layer = make_layer(case)
    linear = layer.family == "linear"
    T = 128 if linear else 33
    for causal in (True, False):
        torch._dynamo.reset()
        # linear layers take their time, and both directions are one code
        counter = CompileCounterWithBackend("aot_eager" if causal or not linear else "eager")
        f = torch.compile(partial(layer, causal=causal), backend=counter, fullgraph=True)
        f(torch.randn(1, T, 32, requires_grad=True))
        x = torch.randn(1, T, 32, requires_grad=True)
        same_gradients(f, partial(layer, causal=causal), [x])
        assert counter.frame_count == 1
    counter, cache = CompileCounterWithBackend("eager"), layer.init_cache(1, 20)
    step = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        layer(x[:, :15], cache=cache)
        out = [f(part, cache=cache) for f, part in zip([step] * 4 + [layer], x[:, 15:20].split(1, dim=1))]
        close(torch.cat(out, dim=1), layer(x[:, :20])[:, 15:])
        with refused("holds 20 tokens and 20 are taken"):
            layer(x[:, :1], cache=cache)
    assert counter.frame_count == 1 and cache.pos.item() == 20


# Settings in which a layer must differ from its cases, each for itself
OTHERS = model.settings("""
    n_embd=64 n_head=2 bias=true norm_eps=0.1 position=learned rope_base=10.0 rope_factor=3.0 rope_original=9
    rotary_fraction=0.5 n_kv_head=1 head_dim=12 qk_norm=true attn_gate=true window=2 sink=true linear_n_head=1
    linear_n_v_head=8 linear_key_dim=4 linear_value_dim=4 linear_decay=channel decay_gate=softplus g_min=-1.0
    neg_eigval=true channel_beta=true writes=2 conv_size=2 out_gate=none out_gate_rank=3 bidir=forward
    q_lora_rank=8 kv_lora_rank=12 qk_nope_head_dim=4 qk_rope_head_dim=6 v_head_dim=4 sel_block=16 sel_topk=6
    sel_init=2 sel_local=3 sel_tile=2 cmp_block=16 cmp_stride=2 dense_len=30 sel_per_head=true index_n_head=1
    index_head_dim=12""")
ON = model.settings("""
    rope_factor=4.0 qk_norm=true cmp_stride=8 cmp_block=8 linear_decay=head decay_gate=lower out_gate=silu
    sel_block=8 sel_topk=5 sel_local=1""")


@each("name", ATTENTION)
@no_grad
def test_settings_are_what_a_layer_reads(name):
    """A config with these fields alone is enough for a layer, and each of them changes its outputs."""
    def outputs(values):
        torch.manual_seed(0)
        layer = ATTENTION[name](types.SimpleNamespace(**values))
        for p in layer.parameters():
            p.normal_()
        x = torch.randn(1, 60, values["n_embd"])
        return [layer(x, causal=causal).tolist() for causal in (True, False)]
    effective = set()
    for given in ({}, ON, *(CASES[case] for case in CASES if case.split()[0] == name)):
        base = {field: getattr(tiny(**given), field) for field in ATTENTION[name].settings}
        as_it_is = outputs(base)
        for field in base.keys() - effective:
            with contextlib.suppress(ValueError):           # two settings that exclude each other
                if outputs(base | {field: OTHERS[field]}) != as_it_is:
                    effective.add(field)
    assert effective == set(ATTENTION[name].settings)


def test_settings_belong_to_layers():
    """No field of LayerConfig that nobody reads; in a pattern one that its layer does not read is refused."""
    read = {field for layer in ATTENTION.values() for field in layer.settings}
    assert read == set(LayerConfig.__dataclass_fields__)
    assert {layer.family for layer in ATTENTION.values()} == {"softmax", "linear", "sparse"}
    for name, layer in ATTENTION.items():
        for field in OTHERS.keys() - set(layer.settings) - {"bias", "norm_eps"}:
            with refused(f"layer '{name}' does not read {field}"):
                parse_layers(f"{name}({field}={OTHERS[field]})", 2)
    with pytest.warns(UserWarning, match=r"4 layers, the model 2: the last 2 are left out \(mla, kda\)"):
        assert parse_layers("full*2 mla kda", 2) == [("full", {})] * 2
    with pytest.warns(UserWarning, match="no layer of 'kda' reads window: window=5 changes nothing"):
        from_preset("small", layers="kda", window=5)
    with warnings.catch_warnings(action="error"):
        from_preset("small", layers="kda*3 full", window=5, position="none", bias=True)
    tiny(dropout=0, rope_base=10, window=None, g_min=-1)


@exactly
@each("case", cases("softmax"))
@no_grad
def test_softmax_layers_are_their_definition(case):
    """Attention to all that direction or mask, window and padding leave, by positions with gaps."""
    layer = make_layer(case)
    x, slots = torch.randn(4, 12, 32), torch.arange(12)     # 4 rows, 4 heads: neither may pass for the other
    pos = slots + torch.randint(3, (4, 12)).cumsum(1)
    valid = up_to(7, 12, 9, 12)
    near = (pos[:, :, None] - pos[:, None]).abs() < CASES[case].get("window", math.inf)
    every = torch.ones(12, 12) > 0
    given = (torch.rand(12, 12) < 0.7) | (slots[:, None] == slots)
    for causal, mask, seen in ((True, None, every.tril()), (False, None, every), (True, given, given)):
        seen = (seen & near & valid[:, None]).unsqueeze(1)
        q, *kv = layer.project(x, attention.step_of(x, pos=pos))
        if "mla" in case:
            y = layer.attend(q, kv[0], partial(softmax_attention, mask=seen), absorbed=False)
            want = layer.o_proj(y.transpose(1, 2).flatten(2))
        else:
            want = layer.output(softmax_attention(q, *kv, sink=layer.sink, mask=seen), x)
        y = layer(x, causal=causal, mask=mask, valid=valid, pos=pos)
        close(y[valid], want[valid])


@no_grad
def test_mla_normed_knows_no_size():
    layer, x = make_layer("mla normed"), torch.randn(2, 9, 32)
    y = layer(x)
    layer.q_b_proj.weight *= 3
    layer.kv_a_proj.weight[layer.R:] *= 3
    assert off(layer(x), y.double()) < 1e-4
    layer.kv_a_proj.weight[layer.R:] += 1
    assert off(layer(x), y.double()) > 1e-2


# slots taken (None: no cache), new tokens, keywords of a call that hides nothing but what is causal
UNMASKED = """
None 4 valid=up_to(4, 2)
0 4 valid=up_to(4, 2)
0 4 causal=False
4 2 causal=False
4 1 causal=True
8 1 causal=False, pos=torch.tensor([5])
"""


@each("case", ("full", "full gqa", "mla"))
@no_grad
def test_no_mask_where_nothing_is_hidden(case, monkeypatch):
    """Then SDPA takes its fast kernels."""
    layer = make_layer(case)
    for line in UNMASKED.strip().split("\n"):
        taken, T, how = line.split(" ", 2)
        cache = None if taken == "None" else layer.init_cache(2, 8)
        layer(torch.randn(2, int(taken) if cache else 0, 32), cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr("attention.Step.below", None)             # which makes it
            layer(torch.randn(2, int(T), 32), cache=cache, commit=False, **eval(f"dict({how})"))


# ------------------------------------------------------------------------------------------------------------
# attention.py: softmax attention

@exactly
def test_softmax_attention_is_its_definition():
    """Grouped heads, windows, sinks, fewer queries than keys (the last ones); gradients too."""
    inputs = [torch.randn(2, h, 13, 8, requires_grad=True) for h in (4, 2, 2)]
    null = torch.randn(4, requires_grad=True)
    distance = torch.arange(13)[:, None] - torch.arange(13)
    for causal, window, given, first in product((True, False), (None, 2, 5, 20), ([], [null]), (0, 9)):
        seen = (distance >= 0) if causal else torch.ones(13, 13) > 0
        if window:
            seen = seen & (distance.abs() < window)
        assert attention.count_visible(13, causal, window) == seen.sum()

        def definition(q, k, v, *sink):
            k, v = (a.repeat_interleave(2, 1) for a in (k, v))
            weights = (q @ k.mT / 8 ** 0.5).exp() * seen
            total = weights.sum(-1, keepdim=True) + sum(a.exp().view(-1, 1, 1) for a in sink)
            return (weights @ v / total)[:, :, first:]

        def fast(q, k, v, *sink):
            return softmax_attention(q[:, :, first:], k, v, causal, window, *sink)
        same_gradients(fast, definition, inputs + given)


def flex_tiles(run):
    """run() -> its result; the tiles (B, h, rows, columns) that its BlockMask visits; those that it needs.

    Uncompiled, flex_attention reads mask_mod alone: a forgotten tile would be wrong on a GPU only.
    """
    seen, plain = [], flex_attention.flex_attention

    def spy(*args, block_mask, **keywords):
        seen.append(block_mask)
        return plain(*args, block_mask=block_mask, **keywords)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention.flex_attention", spy)
        y = run()
    m, = seen
    visits = m.to_dense().bool()
    exact = flex_attention.create_mask(m.mask_mod, *visits.shape[:2], *m.seq_lengths, device="cpu")
    rows, columns = m.BLOCK_SIZE
    exact = F.pad(exact, (0, -exact.size(-1) % columns, 0, -exact.size(-2) % rows))
    return y, visits, exact.unflatten(3, (-1, columns)).any(4).unflatten(2, (-1, rows)).any(3)


@exactly
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@each("window", (1, 3, 64, 128, 129, 200, 300))
def test_windows_are_the_masked_ones(window):
    """Three fast forms against the dense mask: stretches, keys by slots, and which tiles flex visits."""
    q, k, v = (torch.randn(1, h, 700, 16) for h in (4, 2, 2))
    t = torch.arange(700)
    for causal in (True, False):
        mask = visible(t, t, causal, window)
        for sink, first in product((None, torch.randn(4)), (0, 367)):
            want = softmax_attention(q[:, :, first:], k, v, sink=sink, mask=mask[first:])
            close(softmax_attention(q[:, :, first:], k, v, causal, window, sink), want)
        want = softmax_attention(q, k, v, mask=mask)
        limit = t + 1 if causal else torch.full_like(t, 700)
        close(window_attention(q, k, v, t[None], limit[None], window, causal), want)
        y, visits, needed = flex_tiles(lambda: flex_window_attention(q, k, v, causal, window, None))
        close(y, want)
        assert torch.equal(visits, needed)


@exactly
def test_rotary_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16)
    for interleaved in (False, True):
        def dot(i, j):
            turn = lambda a, pos: attention.rotary(
                a, *attention.rotation(torch.tensor([pos]), 8, interleaved=interleaved), interleaved)
            return (turn(q, i) * turn(k, j)).sum()
        close(dot(3, 1), dot(103, 101), 1e-5)       # the angles are float32
        assert abs(dot(3, 1) - dot(3, 2)) > 1e-3


# ------------------------------------------------------------------------------------------------------------
# attention.py: sparse attention

def best(score, n):
    """Which are the n largest of the last dim, bool; ties to the earliest."""
    index = score.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, True)


def keys_of(sel, block, S, group=1):
    """Blocks to keys: sel (B, h, T, n) -> (B, h group, T, S)."""
    return sel.repeat_interleave(block, -1)[..., :S].repeat_interleave(group, 1)


@exactly
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@each("G, block, tile", sizes("1 8 1 | 2 1 1 | 2 8 8 | 4 64 64 | 2 128 128 | 2 16 64 | 4 128 16 | 1 5 3"))
def test_block_sparse_paths_are_their_definition(G, block, tile):
    """Outputs and gradients; T no multiple of anything, rows that read nothing, flex's tiles."""
    for T, S, causal in ((1, 40, True), (131, 131, True), (131, 131, False), (261, 300, True)):
        q, k, v = (torch.randn(2, n, t, 16, requires_grad=True) for n, t in ((2 * G, T), (2, S), (2, S)))
        scores = torch.rand(2, 2, -(-T // tile), -(-S // block))
        sel = best(scores, 4)
        sel[0] &= torch.rand_like(scores[0]) < 0.7
        sel[0, 0, -1] = False
        sel = sel.repeat_interleave(tile, 2)[:, :, :T]
        mask = keys_of(sel, block, S, G)
        if causal:
            mask = mask.tril(S - T)

        def definition(q, k, v):
            k, v = (a.repeat_interleave(G, 1) for a in (k, v))
            return ((q @ k.mT / 4).masked_fill(~mask, -1e9).softmax(-1) * mask) @ v

        by = partial(block_sparse_attention, sel=sel, key_block=block, causal=causal)
        for path in ("dense", "gather", "blocks", None):
            same_gradients(partial(by, path=path), definition, [q, k, v])
        if T > 1 and 0 in (block % 128, 128 % block):
            inputs = [a.detach() for a in (q, k, v)]                # forward only, on a CPU
            y, visits, needed = flex_tiles(lambda: by(*inputs, path="flex"))
            close(y, definition(*inputs))
            assert visits.shape == needed.shape and (visits | ~needed).all(), "a tile that flex would skip"


@exactly
@each("name", ("nsa", "infllm", "msa"))
def test_layers_take_the_blocks_path(name, monkeypatch):
    """Where it pays, on a CPU; in several slices; equal to the mask with padding, in both directions."""
    layer = make_layer(name, n_kv_head=2, sel_block=32, sel_topk=3, sel_init=0, sel_local=2, dense_len=0)
    x = torch.randn(2, 1101, 32, requires_grad=True)
    valid = up_to(1101, 900)
    taken = []
    pick_path = attention.pick_path

    def run(path):
        def spy(*args):
            taken.append(pick_path(*args)[0])
            return path or taken[-1], None

        def f(x, _):
            monkeypatch.setattr("attention.pick_path", spy)
            return layer(x, causal=causal, valid=valid)[valid]
        return f
    for causal in (True, False):
        same_gradients(run(None), run("dense"), [x, layer.qkv_proj.weight])
    assert set(taken) == {"blocks"}


@exactly
@each("tile", (1, 16))
def test_select_blocks_is_its_definition(tile):
    """By enumeration: forced blocks, exactly min(topk, visible) picks, ties to the earliest, tiles add up."""
    T = 45
    block = 8
    n = 6
    slots = torch.arange(T).expand(2, T)
    scores = torch.randint(-1, 2, (2, 1, T, n)) * torch.tensor([1.0, -1.0, 1.0]).repeat(2)     # 0 and -0 tie
    scores[1, 0, 37:, 1:3] += 9                     # what the second row's padding would choose
    choices = product((True, False), (0, 1), (1, 2), (4, 6, 9), (0, 17))
    for causal, init, local, topk, dense_len in choices:
        limit = slots + 1 if causal else torch.tensor([[45], [37]]).expand(2, T)
        sel = select_blocks(lambda r, end: scores[:, :, r], slots, limit, n, block, topk,
                            init, local, tile, dense_len)
        for b, i in product(range(2), range(0, T, tile)):
            queries = [t for t in range(T)[i:i + tile] if t < limit[b, t]]
            if queries:
                end = limit[b, queries[-1]]
                seen = [j for j in range(n) if j * block < end]
                forced = [j for j in seen if j < init or any(abs(t // block - j) < local for t in queries)]
                total = scores[b, 0, queries].sum(0)
                rest = sorted((j for j in seen if j not in forced), key=lambda j: (-total[j], j))
                want = seen if end <= dense_len else forced + rest[:max(topk - len(forced), 0)]
                for picked in sel[b, 0, i:i + tile]:
                    assert picked.nonzero().flatten().tolist() == sorted(want)


@exactly
@each("size, stride, block", sizes("32 16 64 | 8 4 8 | 16 4 8 | 4 4 12 | 8 8 8"))
def test_compressed_scores_are_the_papers(size, stride, block):
    """NSA's double sum (eq. 9) over strides of windows; InfLLM-V2: the best window that touches the block."""
    T = 3 * block + 5
    N = max((T - size) // stride + 1, 1)
    q = torch.randn(1, 4, T, 4)
    ck = torch.randn(1, 2, N, 4)
    t = torch.arange(T)
    seen = torch.arange(N) * stride + size <= t[:, None] + 1
    p = (q @ ck.repeat_interleave(2, 1).mT / 2).masked_fill(~seen, -1e9).softmax(-1) * seen
    p = p.unflatten(1, (2, 2)).sum(2).unsqueeze(-1)                 # (1, 2, T, N, 1)
    strides = torch.arange(N)[:, None] + torch.arange(size // stride)
    inside = (strides.unsqueeze(1) // (block // stride) == torch.arange(4)[:, None]).sum(-1)        # (N, 4)
    for pool, want in (("sum", (p * inside).sum(-2)), ("max", (p * (inside > 0)).amax(-2))):
        y = compressed_scores(q, ck, t[None] + 1, T, block, size, stride, pool)
        close(y.double(), want, 1e-6)               # the scores are float32


# sel_topk, sel_init, sel_local of the cases
BUDGETS = dict(zip("nsa,infllm,infllm moba,msa,dsa".split(","),
                   sizes("4 1 2 | 4 1 2 | 2 0 1 | 2 0 1 | 9 0 0")))


def index_scores(case, layer, x, source):
    """(1, h, T, T): what msa and dsa rank keys by, and learn."""
    qi = attention.heads(layer.index_q_proj(source), 2)
    ki = layer.index_k_norm(layer.index_k_proj(x)).unsqueeze(1)
    if case == "msa":
        return layer.index_q_norm(qi) @ ki.mT
    weight = layer.index_w_proj(x).mT.unsqueeze(-1) * 2 ** -0.5
    return (F.relu(qi @ ki.mT * 8 ** -0.5) * weight).sum(1, keepdim=True)


def block_scores(case, q, k, ck, end, index):
    """(1, h, T, n): what a layer ranks blocks of 8 keys by, in dsa the keys themselves."""
    T = k.size(2)
    if case == "dsa":
        return index
    if case == "msa":
        return F.pad(index, (0, -T % 8), value=-math.inf).unflatten(-1, (-1, 8)).amax(-1)
    if case == "infllm moba" and end[0] == 1:       # causal; else a tile adds up probabilities
        return q @ torch.stack([part.mean(2) for part in k.split(8, dim=2)], dim=3)
    stride = 8 if "moba" in case else 4
    return compressed_scores(q, ck, end[None], T, 8, 8, stride, "sum" if case == "nsa" else "max")


def index_loss(index, q, k, read, scale):
    """KL of the index from the mean attention of its heads to what is read."""
    heads = q.size(1) // read.size(1)
    scores = q @ k.repeat_interleave(q.size(1) // k.size(1), dim=1).mT * scale
    p = scores.masked_fill(~read.repeat_interleave(heads, dim=1), -math.inf).softmax(-1)
    p = p.unflatten(1, (-1, heads)).mean(2)
    log_index = index.masked_fill(~read, -math.inf).log_softmax(-1).masked_fill(~read, 0)
    return (torch.special.xlogy(p, p) - p * log_index).sum(-1).mean()


@exactly
@each("case", BUDGETS)
@each("causal, tile", [(True, None), (False, None), (False, 1)])
@each("T", (9, 100))
@no_grad
def test_sparse_layers_are_their_definition(case, causal, tile, T):
    """The blocks with the best scores are read and no others; the index learns from these."""
    dense_len = 56 * (case == "infllm")
    layer = make_layer(case, position="none", sel_tile=tile, dense_len=dense_len)
    x = torch.randn(1, T, 32)
    t = torch.arange(T)
    ck = None
    index = None
    end = t + 1 if causal else torch.full_like(t, T)
    seen = t < end[:, None]
    q, k, v = layer.project(x, attention.step_of(x))   # of dsa: queries, latents, what queries are made of
    if "infllm" in case:                            # it has no parameters of its own
        ATTENTION["full"](tiny(n_kv_head=2)).load_state_dict(layer.state_dict())
    if case == "infllm moba":
        k, v = (a.repeat_interleave(2, dim=1) for a in (k, v))
    if case in ("msa", "dsa"):
        index = index_scores(case, layer, x, v if case == "dsa" else x)
    elif case == "nsa":
        windows = [a.unfold(2, 8, 4).mT + place for a, place in zip((k, v), layer.window_pos)]
        ck = layer.k_compress(windows[0].flatten(-2))
        cv = layer.v_compress(windows[1].flatten(-2))
    else:
        ck = k.unfold(2, 8, layer.cmp_stride).mean(-1)

    topk, init, local = BUDGETS[case]
    local += case == "dsa" and not causal           # the own token is forced
    block, tile = (1, 1) if case == "dsa" else (8, 1 if causal else tile or 8)
    score = block_scores(case, q, k, ck, end, index)
    sel = select_blocks(lambda rows, _: score[:, :, rows], t[None], end[None], score.size(-1), block, topk,
                        init, local, tile, dense_len)
    read = keys_of(sel, block, T) & seen
    assert torch.equal(read, seen.expand_as(read)) == (T == 9)      # a budget of everything is dense
    assert sel.sum(-1).max() <= getattr(layer, "most", topk)        # the bound that graphs count on
    reads = layer.block_reads if case == "nsa" else layer.reads
    if causal:
        assert read.sum(-1)[0, 0].tolist() == [reads(n, True) for n in range(1, T + 1)]
    else:
        assert read.sum(-1).max() <= reads(T, False)

    losses, aux = [], {}

    def attend(q, k, v, scale=8 ** -0.5):
        if index is not None:
            losses.append(index_loss(index, q, k, read, scale))
        mask = read.repeat_interleave(4 // read.size(1), dim=1)
        return softmax_attention(q, k, v, scale=scale, mask=mask)
    if case == "dsa":
        want = layer.o_proj(layer.attend(q, k, attend, absorbed=False).transpose(1, 2).flatten(2))
    else:
        y = attend(q, k, v)
        if case == "nsa":
            compressed = softmax_attention(q, ck, cv, mask=torch.arange(7, T, 4) < end[:, None])
            near = softmax_attention(q, k, v, mask=visible(t, t, causal, window=6))
            gates = layer.branch_proj(x).sigmoid().view(T, 3, 4, 1).permute(1, 2, 0, 3)
            y = gates[0] * compressed + gates[1] * y + gates[2] * near
        want = layer.output(y, x)
    close(layer(x, causal=causal, aux=aux), want, 1e-6)     # the scores are float32
    assert len(aux) == len(losses)
    for loss in losses:
        close(aux["indexer_kl"], loss, 1e-6)


@each("case", ("msa", "dsa"))
def test_indexer_trains_alone(case):
    """Gradients stay on their side, in all three stages."""
    layer = make_layer(case)
    x = torch.randn(2, 96, 32, requires_grad=True)
    weights = dict(layer.named_parameters())
    index = {name for name in weights if name.startswith("index_")}

    def without_gradient():
        return {name for name, p in weights.items() if p.grad is None}
    for layer.stage in ("dense", "warmup", "sparse"):
        layer.zero_grad()
        aux = {}
        layer(x, aux=aux).sum().backward()
        assert without_gradient() == index
        assert ("indexer_kl" in aux) == (layer.stage != "dense")
        if aux:
            layer.zero_grad()
            through = x.grad.clone()
            aux["indexer_kl"].backward()
            assert without_gradient() == weights.keys() - index
            assert torch.equal(x.grad, through)                     # the index trains nothing that lies below


def test_reads_of_shared_picks():
    """Bidirectional: the most that a query reads; a wide tile forces all blocks that it touches."""
    slots = torch.arange(160)[None]
    for tile, topk in product((1, 4, 8, 13, 16, 20), (2, 4)):
        layer = make_layer("msa", sel_topk=topk, sel_tile=tile)
        sel = select_blocks(lambda rows, _: torch.rand(1, 1, 160, 20)[:, :, rows], slots,
                            torch.full_like(slots, 160), 20, 8, topk, tile=tile)
        assert layer.reads(160, False) == 8 * int(sel.sum(-1).max()) <= 8 * layer.most


# ------------------------------------------------------------------------------------------------------------
# attention.py: linear attention and the delta rule

def without_beta(f):
    return lambda q, k, v, beta, *rest, **how: f(q, k, v, *rest, **how)


def channel_beta(f):
    """Erasing and writing by channel (Gated DeltaNet-2), the shares made of k and v."""
    return lambda q, k, v, beta, *rest, **how: f(q, k, v, beta[..., None] * k.sigmoid(), *rest, **how,
                                                 write=v.sigmoid())


DELTA = delta_rule, delta_rule_recurrent
LINEAR = without_beta(linear_attention), without_beta(linear_attention_recurrent)
# rule: its fast form, its definition, and the decay that it takes
RULES = {
    "delta": (*DELTA, None),
    "delta head": (*DELTA, "head"),
    "delta channel": (*DELTA, "channel"),
    "delta channel beta": (*map(channel_beta, DELTA), "channel"),
    "delta bounded": (partial(delta_rule, g_min=-5.0), delta_rule_recurrent, "channel"),
    "linear": (*LINEAR, None),
    "linear head": (*LINEAR, "head"),
    "linear channel": (*LINEAR, "channel"),
}
each_rule = each("rule", RULES)


def rule_inputs(T, decay=None, keys="random", beta=1.9, gmax=5.0, B=2, H=2, K=32, V=24):
    """q, k, v, beta, g, state of one regime: half of the decays are a thousand times weaker than gmax."""
    k = torch.randn(B, H, T, K)
    if keys == "silu":
        k = F.silu(k + 1)
    elif keys == "correlated":
        k = 0.95 * torch.randn(K) + 0.3 * k
    elif keys == "same":
        k = torch.randn(K).expand_as(k)
    b = torch.full((B, H, T), beta)
    if keys == "random":
        b = b * torch.rand(B, H, T)
    g = None
    if decay:
        g = -gmax * torch.rand((B, H, T) if decay == "head" else (B, H, T, K))
        g = torch.where(torch.rand_like(g) < 0.5, 1e-3 * g, g)
    q, k = (F.normalize(a, dim=-1) for a in (torch.randn(B, H, T, K), k))
    return q, k, torch.randn(B, H, T, V), b, g, torch.randn(B, H, K, V)


def to(dtype, inputs):
    return [None if a is None else a.detach().to(dtype) for a in inputs]


def rule_run(f, inputs, dtype=torch.float64, **how):
    """f's outputs, last state and all gradients, in one dtype."""
    x = [a if a is None else a.requires_grad_() for a in to(dtype, inputs)]
    o, S = f(*x, **how)
    seed = seeded(1)
    w, u = (torch.randn(a.shape, generator=seed, dtype=torch.float32).to(dtype) for a in (o, S))
    given = [a for a in x if a is not None]
    return [o, S, *torch.autograd.grad((o * w).sum() + (S * u).sum(), given, materialize_grads=True)]


def same_as_recurrence(rule, inputs, tol, **how):
    """The fast form in float32, the definition in float64; gradients relative to that of v at least."""
    fast, definition, _ = RULES[rule]
    want = rule_run(definition, inputs, **how)
    least = want[4].norm()
    norms = [None, None] + [torch.maximum(b.norm(), least) for b in want[2:]]
    for compiled in (False, True):                  # True: the grouped scan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda: compiled)
            got = rule_run(fast, inputs, torch.float32, **how)
        assert max(map(off, got, want, norms)) < tol


@each_rule
@each("causal", (True, False))
def test_rules_are_their_recurrences(rule, causal):
    """At any length, of nothing too; with documents that begin inside."""
    decay = RULES[rule][2]
    same_as_recurrence(rule, rule_inputs(5, decay, B=0), 5e-6, causal=causal)
    for T in (0, 1, 2, 15, 63, 64, 65, 200) if causal else (0, 65, 200):
        same_as_recurrence(rule, rule_inputs(T, decay), 5e-6, causal=causal)
    if causal:
        same_as_recurrence(rule, rule_inputs(1000, decay, B=1, H=1), 5e-6)
    if "delta" in rule:
        reset = torch.zeros(1, 150, dtype=torch.bool)
        reset[0, [1, 30, 64, 65, 120]] = True
        same_as_recurrence(rule, rule_inputs(150, decay, B=1), 5e-6, causal=causal, reset=reset)


@exactly
def test_recurrences_are_their_definition():
    """A reset is a fresh start; from both ends, by the sum over distances, or two scans, the second of which
    reads before it writes."""
    *x, S = rule_inputs(40, "head", B=1)
    reset = torch.isin(torch.arange(40), torch.tensor([1, 13, 14]))[None]
    parts = list(zip(*(a.split([1, 12, 1, 26], dim=2) for a in x)))
    for causal in (True, False):
        alone = [delta_rule_recurrent(*part, S, causal) for part, S in zip(parts, (S, None, None, None))]
        want = torch.cat([y for y, _ in alone], dim=2), alone[-1][1]
        close(delta_rule_recurrent(*x, S, causal, reset=reset), want)

    T, gamma = 12, torch.tensor([0.9, 0.99])
    q, k, v, beta, _, S = rule_inputs(T)
    g = gamma.log()[None, :, None].expand(2, 2, T)
    D = gamma[:, None, None] ** (torch.arange(T)[:, None] - torch.arange(T)).abs()          # (H, T, T)
    close(linear_attention_recurrent(q, k, v, g, causal=False)[0], (q @ k.mT) * D * 32 ** -0.5 @ v)
    both, last = delta_rule_recurrent(q, k, v, beta, g, S, causal=False)
    o, S = delta_rule_recurrent(q, k, v, beta, g, S)
    close(last, S)
    for t in range(T):
        _, behind = delta_rule_recurrent(*(a[:, :, t + 1:].flip(2) for a in (q, k, v, beta, g)))
        read = q[:, :, t:t + 1] * 32 ** -0.5 @ (gamma[:, None, None] * behind)
        close(both[:, :, t:t + 1] - o[:, :, t:t + 1], read)


@each("rule", [rule for rule in RULES if "delta" in rule])
@each("regime, tol", pairs("""
gmax=0.01 keys=silu beta=1.99       => 1e-5
gmax=0.01 keys=correlated beta=1.99 => 1e-5
gmax=0.01 keys=same beta=1.0        => 5e-6
gmax=0.01 keys=same beta=1.99       => 2e-4
gmax=100.0                          => 1e-5"""))
def test_delta_rule_is_exact(rule, regime, tol):
    """Where nothing is forgotten, with hostile keys, and where everything is."""
    x = rule_inputs(200, RULES[rule][2], B=1, **model.settings(regime))
    if regime == "gmax=100.0" and x[4] is not None:
        if rule == "delta bounded":
            x[4].clamp_(min=-5)
        else:
            x[4][:, :, ::7] = -torch.inf            # the softplus gate can come close
    same_as_recurrence(rule, x, float(tol))


@each_rule
@each("causal", (True, False))
def test_rules_in_bfloat16(rule, causal):
    """The state is float32, and autocast must not reach into the inverse."""
    fast, definition, decay = RULES[rule]
    wide = rule_inputs(500, decay, gmax=0.05)
    narrow = [*to(torch.bfloat16, wide[:3]), *wide[3:]]
    o, S = fast(*narrow, causal=causal)
    want, last = definition(*to(torch.float64, narrow), causal=causal)
    assert o.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert off(o, want) < 1e-2 and off(S, last) < 1e-2
    for x in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            under = fast(*x, causal=causal)
        assert all(map(torch.equal, under, fast(*x, causal=causal)))


def linear_formula(case, layer, x, causal):
    """Convolution, L2 norm, decay, strength of a write, norm and gate, as FixedState's docstring has them."""
    H = layer.H
    Hv = layer.Hv
    n = layer.writes
    taps = layer.conv_weight
    before = taps.size(1) - 1
    if not causal:                                  # the same taps ahead
        taps = torch.cat([taps, taps[:, :-1].flip(1)], dim=1)
    qkv = F.pad(layer.qkv_proj(x).mT, (before, before * (not causal)))
    qkv = F.silu(F.conv1d(qkv, taps.unsqueeze(1), groups=len(taps))).mT
    q, k, v = (attention.heads(a, m) for a, m in zip(qkv.split(layer.sizes, dim=-1), (H, n * H, n * Hv)))
    q, k = (a / (a.square().sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
    q, k = (a.unflatten(1, (H, -1)).repeat_interleave(Hv // H, dim=1).flatten(1, 2) for a in (q, k))
    g = None
    if layer.linear_decay == "fixed":
        g = torch.log(1 - 2.0 ** (-5 - torch.arange(Hv))).view(1, -1, 1).expand(2, -1, 20)
    elif layer.linear_decay:
        f = attention.heads(layer.decay_proj(x) + layer.dt_bias, Hv)
        A = layer.A_log.exp().view(-1, 1, 1)
        g = -5 * torch.sigmoid(A * f) if layer.decay_gate == "lower" else -A * F.softplus(f)
        if layer.linear_decay == "head":
            g = g.squeeze(-1)
        if case == "linear head":
            v = v * F.softplus(f)                   # Mamba-2 writes dt v
    gate = lambda proj: attention.heads(torch.sigmoid(proj(x)), n * Hv)        # (B, n Hv, T, 1, K or V)
    if layer.delta:
        beta = write = (1 + ("neg_eigval" in CASES[case])) * gate(layer.beta_proj)
        if layer.channel_beta:
            write = gate(layer.write_proj)
    if layer.delta and causal:
        o, S = [], torch.zeros(2, Hv, layer.K, layer.V)
        for t in range(20):
            S = S if g is None else S * g[:, :, t].exp().view(2, Hv, -1, 1)
            for j in range(n):                      # head h writes its keys h n to h n + n - 1 in turn
                kt, vt, bt, wt = (a[:, j::n, t] for a in (k, v, beta, write))
                S = S - kt[..., None] @ (bt * kt)[:, :, None] @ S + kt[..., None] @ (wt * vt)[:, :, None]
            o.append(q[:, :, t, None] @ S * layer.K ** -0.5)
        o = torch.cat(o, dim=2)
    elif layer.delta:
        o, _ = delta_rule_recurrent(q, k, write * v, beta.expand_as(k), g, causal=False,
                                   write=torch.ones_like(v))
    else:
        o, _ = linear_attention_recurrent(q, k, v, g, causal=causal, scale=1.0)
    y = layer.o_norm(o.transpose(1, 2)).flatten(2)
    if layer.out_gate:
        y = y * dict(silu=F.silu, sigmoid=torch.sigmoid)[layer.out_gate](layer.gate_proj(x))
    return layer.o_proj(y)


@exactly
@each("case", cases("linear"))
@no_grad
def test_linear_layers_are_their_formulas(case):
    """Causal, from both ends, and one way in a bidirectional model, where no cache can begin at the end."""
    layer, x = make_layer(case), torch.randn(2, 20, 32)
    formula = partial(linear_formula, case, layer)
    close(layer(x), formula(x, True), 1e-6)         # the fixed decay is float32
    if layer.writes == 1:                           # of one key, what is read before its write is clear
        close(layer(x, causal=False), formula(x, False), 1e-6)
    layer.bidir = "forward"
    close(layer(x, causal=False), formula(x, True), 1e-6)
    layer.bidir = "backward"
    close(layer(x, causal=False), formula(x.flip(1), True).flip(1), 1e-6)
    with refused("backward"):
        layer(x, causal=False, cache=layer.init_cache(2, 64))


@exactly
@each("compiled", (False, True))
@each("T", (1, 2, 255, 256, 257, 600))
@each("symmetric", (False, True))
def test_short_convolution_is_conv1d(T, symmetric, compiled, monkeypatch):
    """The CPU's own form, in stretches of 256 tokens, and the compiled one; gradients too."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: compiled)
    inputs = torch.randn(2, T + 3, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)

    def conv1d(x, w):
        ahead = 0
        if symmetric:
            w = torch.cat([w, w[:, :-1].flip(1)], dim=1)
            ahead = 3
        return F.conv1d(F.pad(x.mT, (0, ahead)), w.unsqueeze(1), groups=5).mT
    same_gradients(partial(attention.short_conv, symmetric=symmetric), conv1d, inputs)


# ------------------------------------------------------------------------------------------------------------
# model.py

def test_parameters_and_flops_are_counted():
    """GPT-2's published number; a tied head once; of experts those that a token passes."""
    with torch.device("meta"):
        lm = LM(from_preset("gpt2"))
    biases = 12 * (2 * 768 + (3 + 1 + 4 + 1) * 768) + 768           # GPT-2 has them, nanoGPT's recipe not
    assert lm.num_params() + biases - (50304 - 50257) * 768 == 124_439_808
    attended = 12 * 4 * 768 * (1024 * 1025 // 2) / 1024
    assert lm.flops_per_token() == 6 * (lm.num_params(False) + 50257 * 768) + 3 * attended
    assert lm.flops_per_token(causal=False) > lm.flops_per_token()
    moe, untied = (LM(tiny(n_expert=8, expert_inner=16, tied=tied)) for tied in (True, False))
    assert untied.num_params() == moe.num_params() + moe.embed.weight.numel()
    assert untied.num_params(False) == moe.num_params(False)
    idle = 2 * 6 * 3 * 32 * 16                      # layers x experts x matrices
    assert moe.num_params(False) - moe.active_params(False) == idle
    assert moe.flops_per_token() == 6 * (moe.active_params(False) + 11 * 32) + 3 * 2 * 4 * 32 * 257 / 2


def test_logits():
    """Of any number of tokens; the mask is read and never predicted; a soft cap."""
    lm = LM(tiny(n_expert=2))
    for idx in (torch.tensor([[11, 0]]), torch.zeros(2, 0).long(), torch.zeros(0, 5).long()):
        assert lm(idx).shape == lm(idx, causal=False).shape == (*idx.shape, 11)
    assert lm(idx, cache=lm.init_cache(0, 9)).shape == (0, 5, 11)
    lm(idx).sum().backward()
    idx = torch.arange(11)[None]
    y = lm(idx)
    lm.config.logit_softcap = 0.05
    close(lm(idx), 0.05 * torch.tanh(y / 0.05))


def test_beyond_block_size():
    x = torch.zeros(1, 20).long()
    lm = LM(tiny(block_size=16, position="learned"))
    with pytest.warns(UserWarning, match="block_size 16"):
        LM(tiny(block_size=16))(x)
    y, cache = lm(x[:, :16]), lm.init_cache(1, 20)
    assert (y[:, 0] - y[:, 1]).abs().max() > 1e-3                   # the same token, at two positions
    lm(x[:, :16], cache=cache)
    for idx, how in ((x, {}), (x[:, :1], dict(cache=cache))):
        with refused("learned positions end there"):
            lm(idx, **how)
    for pos in ([-1, 0], [15, 16]):
        with refused("pos must lie between 0 and 15"):
            lm(x[:, :2], pos=torch.tensor(pos))


def test_init_knows_every_parameter():
    """The documented standard deviations, in a MoE copied alone too; no rule for a parameter is an error."""
    lm = LM(tiny(n_embd=128, vocab_size=255))
    assert abs(lm.embed.weight.std() - 0.02) < 1e-3
    assert abs(lm.blocks[0].mlp.down_proj.weight.std() - 0.01) < 5e-4
    for router in ("sigmoid", "softmax"):
        for name, p in MoE(tiny(n_embd=128, n_expert=8, router=router, shared_inner=16)).named_parameters():
            assert 0.01 < p.std() < 0.2, name
    lm.blocks[1].mixer.extra = nn.Parameter(torch.empty(3))
    with refused("blocks.1.mixer.extra"):
        model.init_weights(lm)


@each("objective", ["ar", "mdm"])
@each("without", ["", "flops state"])
def test_readme_layer_works(monkeypatch, dataset, objective, without):
    """The layer that the README tells readers to write: in a model, and by the real commands, to the end."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    monkeypatch.setitem(ATTENTION, "mean", None)    # taken out again behind the test
    scope = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.S)[1], scope)
    for method in without.split():
        delattr(scope["Mean"], method)
    lm, x = LM(tiny(layers="mean full")), torch.randint(11, (2, 9))
    y = lm(x)
    close(lm(x[:, :5]), y[:, :5])
    assert not torch.equal(y, lm(x, causal=False))
    if without:
        with refused("sample without a cache"):
            sample_ar(lm, x, 11, cache=True)
    else:
        close(decode(lm, x, [5, 1, 3], lm.init_cache(2, 9)), y)
    works(train, f"""--dataset {dataset} --out run --objective {objective} --layers 'mean full' --device cpu
        --n_layer 2 --n_embd 16 --n_head 2 --block_size 16 --batch_tokens 32 --max_steps 2
        --eval_windows 4""")
    assert Path("run/samples.txt").read_text()
    works(sample, "run --prompt 'the cat' --max_new_tokens 5")
    text = Path(dataset).parents[1] / "text.txt"
    assert "nats/token" in works(sample, f"score run --text {text} --n_mc 4 --windows 2")[0]


# ------------------------------------------------------------------------------------------------------------
# model.py: mixture of experts

MOES = named("""
sigmoid: router=sigmoid router_scale=2.5 shared_inner=16
softmax: router=softmax router_scale=2.0 shared_inner=16
groups: n_expert_group=4 n_expert_group_active=2
groups of one: n_expert_group=8 n_expert_group_active=3
relu2: mlp=relu2 n_expert_active=3
gpt-oss: router=softmax bias=true mlp=swiglu_clamped
""")


def make_moe(**values):
    torch.manual_seed(0)
    moe = MoE(tiny(**dict(n_expert=8, n_expert_active=2, expert_inner=16) | values))
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=0.3)
    return moe


def by_hand(moe, x):
    """The experts of each token of (N, C), one by one: the best by s + bias in the best groups, by weights s.
    """
    out = []
    for token in x:
        logits = moe.router(token)
        s = logits.sigmoid() if moe.sigmoid else logits.softmax(0)
        choice = (s + moe.bias).view(moe.G, -1)
        best_two = choice.sort(descending=True).values[:, :2].sum(1)
        choice[best_two.argsort(descending=True)[moe.groups:]] = -math.inf
        chosen = choice.flatten().argsort(descending=True)[:moe.k]
        weights = s[chosen] / s[chosen].sum() * (moe.scale if moe.sigmoid else 1)
        y = torch.zeros_like(token)
        for w, e in zip(weights, chosen):
            h, bias = token @ moe.expert_up[e], moe.expert_up_bias is not None
            h = activate(h + moe.expert_up_bias[e] if bias else h, moe.kind) @ moe.expert_down[e]
            y = y + w * (h + moe.expert_down_bias[e] if bias else h)
        if moe.shared is not None:
            y = y + moe.shared(token) * (1 if moe.sigmoid else moe.shared_gate(token).sigmoid())
        out.append(y)
    return torch.stack(out)


@each("case", MOES)
def test_moe_is_its_definition(case):
    """grouped_mm == every expert with zero weights, gradients too; == a loop in float64; bfloat16 is near."""
    moe, results = make_moe(**MOES[case]), []
    moe.bias.normal_(std=0.1)[3] = -100.0           # never chosen
    moe = moe.bfloat16().float()
    x = torch.randn(2, 40, 32).bfloat16().float().requires_grad_()
    for path in (moe.grouped, moe.every):
        moe.grouped, aux = path, {}                 # on the CPU in float32 forward calls this one
        y = moe(x, aux)
        loss = y.square().sum() + sum(aux.values())
        results.append([y, *torch.autograd.grad(loss, [x, *moe.parameters()])])
    close(*results)
    del moe.grouped
    x = x.detach()
    near = copy.deepcopy(moe).bfloat16()(x.bfloat16())
    moe, x = moe.double(), x.double()               # buffers too, which a count in float32 does not forgive
    want = by_hand(moe, x.view(-1, 32)).view_as(x)
    close(moe(x), want)
    close(y, want.float())
    assert off(near, want) < 0.02


@exactly
def test_moe_balance_loss_is_its_definition():
    """E sum_e f_e P_e, summed over layers: f_e choices of e per token in the last batch, P_e its probability.

    A mean over tokens: padding counts nowhere.
    """
    moe = make_moe(**MOES["softmax"], router_aux=0.5)
    x = torch.randn(2, 10, 32)

    def loss(x, valid=None, before=0.0):
        aux = {"balance": before}
        moe(x, aux, valid)
        return aux["balance"]
    loss(x[:1])                                     # two micro-batches of one step
    loss(x[1:])
    moe.balance()
    p = (x.view(-1, 32) @ moe.router.weight.T).softmax(1)
    f = best(p, 2).sum(0) / 20
    close(loss(x, before=1.0), 1.0 + 0.5 * 8 * (f * p.mean(0)).sum())
    moe.balance()
    plain, counts = loss(x), moe.balance()
    padded = torch.cat([x, torch.randn(2, 5, 32)], dim=1), torch.arange(15).expand(2, 15) < 10
    close(loss(*padded), plain)
    close(moe.balance(), counts)


def test_moe_bias_moves_towards_equal_load():
    """One step for each expert, centred; counted are the choices of training, and no token is dropped."""
    moe, x = make_moe(router_bias_step=0.02), torch.randn(1, 512, 32)
    moe.bias[0] = 0.1
    count = best(torch.sigmoid(x[0] @ moe.router.weight.T) + moe.bias, 2).sum(0)
    before = moe.bias.clone()
    assert count.max() > 1.2 * 128
    moe(x)
    assert (moe.balance() == count).all()
    step = 0.02 * torch.sign(128.0 - count)
    close(moe.bias, before + step - step.mean())
    moe.eval()(x)
    assert moe.count.sum() == 0                                     # evaluation must not move the bias


@each("dtype, path, tol", [(torch.float32, "every", 1e-5),
                                              (torch.bfloat16, "grouped", 1e-2)])
def test_moe_compiles_once(dtype, path, tol, monkeypatch):
    """float32: the readable path, bfloat16: grouped_mm. Other routes and an empty expert: the same graph."""
    moe = make_moe().to(dtype)
    monkeypatch.setattr(moe, "grouped" if path == "every" else "every", None)           # must not be taken
    f = torch.compile(moe, backend="aot_eager", fullgraph=True)
    f(torch.randn(1, 16, 32, dtype=dtype, requires_grad=True)).sum().backward()
    moe.bias[3] = -100.0
    x = (torch.randn(1, 16, 32) * 10).to(dtype).requires_grad_()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = torch.autograd.grad(f(x).sum(), [x, *moe.parameters()])
    monkeypatch.undo()
    eager = torch.autograd.grad(moe(x).sum(), [x, *moe.parameters()])
    close(compiled, eager, tol)                     # compiled, products are rounded before the sum


# ------------------------------------------------------------------------------------------------------------
# model.py: presets

@exactly
@each("name", [n for n in PRESETS if n != "small"])
def test_preset_twins_train_and_decode(name):
    """Four layers in the preset's ratios: a laptop holds width 256; at 64 cached equals parallel, and every
    parameter gets a gradient."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):        # the pattern is cut
        laptop = LM(from_preset(name, n_layer=4, n_embd=256, vocab_size=257))
    assert laptop.num_params() < 13e6 and 1024 % laptop.config.block_size == 0
    lm = LM(from_preset(name, n_layer=4, n_embd=64, vocab_size=11))
    x = torch.randint(11, (2, 24))
    aux = {}
    loss = ar_loss(partial(lm, aux=aux), x, 11)
    (loss + sum(aux.values())).backward()
    assert all(p.grad is not None for p in lm.parameters())
    lm.eval()
    with torch.no_grad():
        close(decode(lm, x, [9] + [1] * 15, lm.init_cache(2, 24)), lm(x))


# ------------------------------------------------------------------------------------------------------------
# diffusion.py

def seeded(seed):
    return torch.Generator().manual_seed(seed)


def flipped(raw, count):
    """raw with one bit changed, count times."""
    rng = random.Random(0)
    for i in rng.choices(range(len(raw)), k=count):
        yield raw[:i] + bytes([raw[i] ^ 1 << rng.randrange(8)]) + raw[i + 1:]


def refusals(path, contents, damaged):
    """How many of the damaged forms of a file are refused, by a line that names it; others say the same."""
    good, count = contents(), 0
    for raw in damaged:
        path.write_bytes(raw)
        try:
            assert contents() == good
        except ValueError as e:
            assert path.name in str(e)
            count += 1
    return count


def all_texts(V, T):
    return torch.tensor(list(product(range(V), repeat=T)))


class DiffTable:
    """A frozen random network: a table with the logits of each canvas of V letters and the mask V."""
    def __init__(self, V, T):
        self.V = V
        self.power = (V + 1) ** torch.arange(T)
        self.table = 1.5 * torch.randn((V + 1) ** T, T, V, generator=seeded(0), dtype=torch.float64)

    def __call__(self, idx, causal):
        T = idx.size(1)
        code = idx * self.power[:T]
        if causal:
            return torch.stack([self.table[code[:, :i + 1].sum(1), i] for i in range(T)], dim=1)
        return self.table[code.sum(1)]


@no_grad
def chains(f, x, places):
    """(orders, B): -log p of x (B, T) at `places` by the chain rule, in each order; left to right first."""
    nats = []
    for order in permutations(places):
        masked = torch.isin(torch.arange(x.size(1)), torch.tensor(order))
        total = 0
        for i in order:
            logits = f(torch.where(masked, f.V, x), causal=False)[:, i]
            total = total + F.cross_entropy(logits, x[:, i], reduction="none")
            masked[i] = False
        nats.append(total)
    return torch.stack(nats)


def bound(f, x, places):
    """(B,) nats per token: the mean over all orders."""
    return chains(f, x, places).mean(0) / len(places)


class OrderTable(DiffTable):
    """The same network read in two streams: what a noisy place may see of the clean ones is its canvas."""
    def __call__(self, idx, causal, mask=None, pos=None):
        if mask is None:
            return super().__call__(idx, causal)
        B, T = idx.size(0), idx.size(1) // 2
        out = torch.empty(B, T, self.V, dtype=torch.float64)
        for b, i in product(range(B), range(T)):
            canvas = torch.full((T,), self.V)
            seen = mask[i, T:]
            canvas[pos[b, T:][seen]] = idx[b, T:][seen]
            out[b, i] = super().__call__(canvas[None], False)[0, pos[b, i]]
        return out.repeat(1, 2, 1)


def test_orders_by_enumeration():
    """AR in one order is the chain rule left to right; the mean over all T! orders is the diffusion bound,
    and so is the mean over every mask, where n is uniform, and the choice of n places."""
    T = 4
    f, x = OrderTable(3, T), torch.randint(3, (1, T))
    nats = []
    mean = 0.0
    want = bound(f, x, range(T)).item()
    for order in permutations(range(T)):
        order = torch.tensor([order])
        nats.append(block_diffusion_loss(f, x.gather(1, order), 3, 1, pos=order).item())
    assert nats[0] == approx(chains(f, x, range(T))[0].item() / T)
    assert statistics.mean(nats) == approx(want)
    for masked in product([False, True], repeat=T):
        if n := sum(masked):
            uniforms = torch.where(torch.tensor([masked]), 0.25, 0.75)              # they hide exactly these
            mean += mdm_loss(f, x, 3, (torch.tensor([n]), uniforms)).item() / T / math.comb(T, n)
    assert mean == approx(want, rel=1e-6)


def test_corrupted_inputs_are_read_and_never_the_target():
    """By mdm_loss, where they are not hidden, and by the clean stream of block diffusion."""
    def f(idx, **_):
        noisy, clean = idx[:, :8], idx[:, 8:]
        assert noisy.unique().tolist() == [1, 2] and (clean == 1).all()
        return torch.tensor([0.0, -torch.inf]).expand(*idx.shape, 2)            # sure of the target, 0
    x, y = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 2, 8)
    for noise_block in (None, 4):
        assert mdm_loss(f, x, 2, noise_block=noise_block, inputs=y) == 0


def test_mdm_noise_is_uniform_and_stratified():
    """And what replaces tokens comes at its rates."""
    T, B = 8, 16
    n = torch.stack([mdm_noise(B, T)[0] for _ in range(2000)])
    assert (n.sort(1).values
            == torch.arange(1, T + 1).repeat_interleave(B // T)).all(), "each n equally often"
    first = torch.bincount(n[:, 0], minlength=T + 1)[1:]
    assert ((first - 250) ** 2 / 250).sum() < 24.3, "uniform in one row: chi-square, 7 degrees, p = 0.001"
    x = torch.randint(50, (200, 500))
    y = corrupt(x, 50, 0.1, 0.05)
    assert abs((y == 50).float().mean() - 0.1) < 0.005
    assert abs(((y != x) & (y != 50)).float().mean() - 0.05 * 49 / 50) < 0.004
    assert torch.equal(corrupt(x, 50), x)


def test_losses_are_means_and_sums():
    """Of the tokens of the batch, or of each objective's."""
    f = DiffTable(3, 5)
    x = torch.randint(3, (12, 5))
    noise = mdm_noise(12, 5)
    ar = ar_loss(f, x[:3], 3, reduction="none")
    mdm = mdm_loss(f, x[3:], 3, [a[3:] for a in noise], reduction="none")
    for reduction in ("mean", "sum"):
        want = [getattr(nats, reduction)() for nats in (torch.cat([ar, mdm]), ar, mdm)]
        close(mixed_loss(f, x, 3, 3, 0.25, noise, reduction=reduction), want)


@no_grad
def test_ar_loss_is_its_definition():
    """-log p of each token behind BOS and the tokens before it, in whose place `inputs` may be read."""
    f, (x, other) = DiffTable(3, 5), torch.randint(3, (2, 6, 5))
    for inputs in (None, other):
        context = F.pad(x if inputs is None else inputs, (1, 0), value=3)
        want = [F.cross_entropy(f(context[:, :i + 1], causal=True)[:, i], x[:, i], reduction="none")
                for i in range(5)]
        close(ar_loss(f, x, 3, inputs, reduction="none"), torch.stack(want, dim=1))


@each("order", ["left", "confidence"])
@no_grad
def test_chain_nll_is_a_distribution(order):
    """p sums to 1 over the scored tokens in every context, known in part or whole; over all texts, block by
    block too, and a block of all tokens is the whole chain."""
    f, every = DiffTable(3, 4), all_texts(3, 4)
    scored = torch.tensor([False, True, True, False]).expand(81, 4)
    p = torch.exp(-2 * chain_nll(f, every, 3, order, scored=scored)).view(3, 9, 3).sum(1)
    close(p, torch.ones_like(p), 1e-12)
    hidden = torch.tensor([[3, 1, 2, 0]] * 2)                       # rows end at different times
    scored = torch.tensor([[False, True, True, True], [False, False, True, False]])
    nll = chain_nll(f, hidden, 3, order, scored=scored)
    close(nll[1:], chains(f, hidden[1:], [2])[0])
    lm = LM(tiny(vocab_size=2)).double().eval()
    texts = all_texts(2, 6)
    for S in (1, 2, 3, 6):
        nll = chain_nll(lm, texts, 2, order, noise_block=S)
        assert torch.exp(-6 * nll).sum().item() == approx(1, abs=1e-9)
    close(nll, chain_nll(lm, texts, 2, order))


def test_any_order_nll_is_the_mean_over_orders():
    """Of probabilities, not of their logs, block after block; so it sums to 1."""
    f, every = DiffTable(3, 4), all_texts(3, 4)
    mean = -chains(f, every, range(4)).neg().exp().mean(0).log() / 4
    close(any_order_nll(f, every, 3, 4), mean)
    lm, x = LM(tiny(vocab_size=2)).double().eval(), all_texts(2, 6)
    for S, noise_block in ((1, 3), (3, 3), (2, 6), (4, None)):      # the last in blocks of 4 and of 2
        nll = any_order_nll(lm, x, 2, S, noise_block)
        close(nll.mul(-6).exp().sum(), torch.ones(()).double())
        if S == 1:
            close(nll, chain_nll(lm, x, 2, noise_block=3))


@each("drawn", (diffusion.DRAWN, 30))
def test_mdm_nll_estimates_the_bound(drawn, monkeypatch):
    """With an honest error; with context, the bound of the smaller problem. Also with few uniforms at a time:
    then its memory does not grow with the windows."""
    f = DiffTable(3, 5)
    x = torch.randint(3, (6, 5))
    sizes = []
    rand = torch.rand
    count = lambda *shape, **how: sizes.append(math.prod(shape)) or rand(*shape, **how)
    monkeypatch.setattr("torch.rand", count)
    monkeypatch.setattr("diffusion.DRAWN", drawn)
    runs = torch.tensor([mdm_nll(f, x, 3, 8, seeded(s)) for s in range(300)]).double()
    error = runs[:, 0] - bound(f, x, range(5)).mean()
    assert abs(error.mean()) < 4 * error.std() / 300 ** 0.5
    assert 0.85 < runs[:, 1].square().mean().sqrt() / error.std() < 1.18
    for places in (range(5), (1, 2, 4)):
        scored = torch.isin(torch.arange(5), torch.tensor(places)).expand(6, 5)
        nll, se = mdm_nll(f, x, 3, 4096, batch_size=4096, scored=scored, per_row=True)
        assert ((nll - bound(f, x, places)).abs() < 5 * se + 1e-9).all() and se.max() < 0.04
    assert max(sizes) <= max(drawn, 1024 * 5)                       # a window's own


@each("kind, V", [("uint16", 50_000), ("int16", 50_000), ("int32", 200), ("uint8", 200)])
def test_mdm_nll_reads_token_files(kind, V):
    """Any integer dtype, memory-mapped and in pieces: as if it were int64 and whole; groups stay together."""
    lm = lambda idx, causal, **_: F.one_hot(idx % V, V).float().cumsum(1)
    x = torch.randint(V, (9, 4))
    x.numpy().astype("uint16" if V > 200 else kind).tofile("tokens")
    mapped = torch.from_numpy(np.memmap("tokens", dtype=kind, mode="c").reshape(9, 4))
    group = torch.tensor([0, 0, 0, 1, 1, 2, 4, 4, 4])
    scored = torch.ones(9, 4, dtype=torch.bool).tril(2)
    for more in (dict(noise_block=2), dict(scored=scored, group=group)):
        a, b = (mdm_nll(lm, ids, V, 8, batch_size=n, per_row=True, **more)[0]
                for ids, n in ((x, 99), (mapped, 2)))
        close(a, b, 1e-6)


def test_groups_share_masks():
    """The same places hidden in a whole group, the same fraction of a shorter end, nested; else others."""
    seen = []

    def f(idx, causal):
        seen.append(idx == 13)
        return torch.zeros(*idx.shape, 13)
    scored = (torch.arange(12) >= 4).repeat(4, 1)
    scored[1, 8:] = False
    x, group = torch.zeros(4, 12, dtype=torch.int64), torch.tensor([0, 0, 0, 1])
    mdm_nll(f, x, 13, 64, scored=scored, group=group, batch_size=10 ** 6)
    whole, short, again, other = torch.cat([s.view(-1, 4, 12) for s in seen]).unbind(1)     # (64, 12) each
    assert torch.equal(whole, again) and not torch.equal(whole, other)
    n = whole.sum(1)
    assert sorted(n.tolist()) == sorted([*range(1, 9)] * 8), "n ~ U{1..8}, stratified"
    assert torch.equal(short.sum(1), (n + 1) // 2)                  # of an end half as long
    more = whole[:, 4:8].long() - short[:, 4:8].long()
    assert ((more >= 0).all(1) | (more <= 0).all(1)).all()          # the same uniforms decide


def test_losses_compile_to_one_graph():
    """Forward and backward, static shapes, with the noise given."""
    net = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 7))
    x = torch.randint(7, (4, 6))
    f = lambda idx, causal: net(idx)

    def loss(x, noise):
        return mdm_loss(f, x, 7, noise) + ar_loss(f, x, 7) + mixed_loss(f, x, 7, 7, 0.5, noise=noise)[0]
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            noise = mdm_noise(4, 6, seeded(seed))
            close(fast(x, noise), loss(x, noise))
    fast(x, noise).backward()


# Samplers

LAWS = {    # sampler, and -log p of each text
    "ar": (sample_ar, lambda f, x: ar_loss(f, x, 3, reduction="none").sum(1)),
    "left": (partial(sample_mdm, order="left", fill_block=2), lambda f, x: 4 * chain_nll(f, x, 3)),
    "max_prob": (sample_mdm, lambda f, x: 4 * chain_nll(f, x, 3, "confidence")),
    "random": (partial(sample_mdm, order="random"),
               lambda f, x: -chains(f, x, range(4)).neg().exp().mean(0).log()),
    "random in blocks": (partial(sample_mdm, order="random", fill_block=2),
                         lambda f, x: 4 * any_order_nll(f, x, 3, fill_block=2)),
}


def chi_square(y, p):
    """Of the texts y (N, 4) of 3 letters against the law p of all 81; very large where one that cannot be was
    written. 80 degrees of freedom: 145 has p = 1e-5."""
    expected = len(y) * p
    count = torch.bincount((y * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    return ((count - expected) ** 2 / expected).nan_to_num(0).sum()


@each("name", LAWS)
def test_samples_follow_the_likelihood(name):
    """A token a step at temperature 1."""
    f, every = DiffTable(3, 4), all_texts(3, 4)
    f.table *= 0.3                                                  # so that no text is rare
    sampler, nats = LAWS[name]
    y = sampler(f, torch.full((20_000, 4), 3), 3)
    assert chi_square(y, torch.exp(-nats(f, every))) < 145


@each("how", ["", "temperature=0.7", "top_k=2", "top_p=0.8"])
def test_drafts_keep_the_law(how):
    """Also with the third token given. The drafts, from another table, are far from right."""
    f, every = DiffTable(3, 4), all_texts(3, 4)
    f.table *= 0.5
    how = model.settings(how)
    logits = f(diffusion.shift_right(every, 3), causal=True)
    free = diffusion.probabilities(logits, **how).gather(2, every[..., None])[..., 0]
    given = free.clone()
    given[:, 2] = every[:, 2] == 1
    for draft, (x, law) in product((1, 2, 9), (([3, 3, 3, 3], free), ([3, 3, 1, 3], given))):
        y = sample_ar(f, torch.tensor([x] * 20_000), 3, draft=draft, **how)
        assert chi_square(y, law.prod(1)) < 145


@each("fields", ["", "layers='mla full' mtp=0.3"])
@each("prompts", ("even", "uneven"))
def test_drafts_change_no_greedy_text(fields, prompts):
    """With a cache and without: what is left in it of the drafts that were refused is never read."""
    lm, passes = count_passes(diff_lm(**model.settings(fields)))
    x, valid = canvas(PROMPTS[prompts], 19, 13)
    go = lambda **how: sample_ar(lm, x, 13, temperature=0, valid=valid, **how)
    sample.check_rewrites(lm.config, "--draft")
    plain, n = go(), len(passes)
    for draft, cache in product((1, 3, 40), (True, False)):
        passes.clear()
        assert torch.equal(go(draft=draft, cache=cache), plain)
        assert len(passes) < 2 * n and max(passes[1:]) <= draft + 1 or not cache


def blocks_of(lm, idx):
    """What the blocks say of idx, before the last norm."""
    seen = []
    with lm.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        lm(idx)
    return seen[0]


def test_mtp_loss_is_its_definition():
    """Place i of the blocks and the token i + 1 predict the token i + 2; without the module the model is the
    same."""
    lm = diff_lm("full mla", mtp=0.3)
    idx = torch.randint(13, (3, 9))
    aux = {}
    logits = lm(idx, aux=aux)
    x, mtp = blocks_of(lm, idx), lm.mtp[0]
    both = torch.cat([mtp.x_norm(x[:, :-1]), mtp.token_norm(lm.embed(idx[:, 1:]))], -1) @ mtp.in_proj.weight.T
    both = both + mtp.mixer(mtp.norm1(both))
    both = both + mtp.mlp(mtp.norm2(both))
    p = lm.logits(lm.norm(both)).log_softmax(-1)
    nats = [-p[b, i, idx[b, i + 2]] for b in range(3) for i in range(7)]
    close(aux["mtp"], 0.3 * sum(nats) / 21)
    plain = LM(override(lm.config, {"mtp": 0.0})).double().eval()
    lost = plain.load_state_dict(lm.state_dict(), strict=False)
    assert not lost.missing_keys and all(name.startswith("mtp.0.") for name in lost.unexpected_keys)
    assert torch.equal(plain(idx), logits)
    assert lm.flops_per_token(9) - plain.flops_per_token(9) > 6 * (lm.num_params() - plain.num_params())


@each("prompts", ("even", "uneven"))
def test_mtp_draft_is_its_definition(prompts):
    """From a cache in which drafts were refused == computed anew from the text."""
    lm, (x, valid) = diff_lm("full mla", mtp=0.3), canvas(PROMPTS[prompts], 15, 13)
    draft, calls = lm.draft, []

    def spy(canvas, at, cache, pick):
        context = diffusion.shift_right(canvas, 13)
        z = lm.mtp[0](blocks_of(lm, context), lm.embed(canvas), attention.step_of(context))
        want = lm.logits(lm.norm(z))[torch.arange(len(at)), at - 1]
        live = at < valid.sum(1)

        def look(logits):
            close(logits[live, 0], want[live])
            calls.append(live.sum().item())
            return pick(logits)
        return draft(canvas, at, cache, look)
    lm.draft = spy
    sample_ar(lm, x, 13, valid=valid, draft=1)
    assert len(calls) > 5


def test_draw_follows_temperature_top_k_top_p():
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5]).repeat(200_000, 1)
    p = logits[0].double().softmax(0)                                                  # sorted: 0, 4, 2, 1, 3
    best = p[0].item()
    for how, keep in pairs(f"""
                         => 0 1 2 3 4
temperature=0.5          => 0 1 2 3 4
top_k=2                  => 0 4
top_p={best - 1e-6}      => 0
top_p={best + 1e-6}      => 0 4
top_k=3 top_p=0.999      => 0 2 4
"""):
        how = model.settings(how)
        keep = [*map(int, keep.split())]
        want = torch.zeros(5, dtype=torch.float64)
        want[keep] = p[keep] ** (1 / how.get("temperature", 1.0))
        got = torch.bincount(diffusion.draw(logits, **how), minlength=5) / 200_000
        assert (got - want / want.sum()).abs().max() < 0.005 and (got[want == 0] == 0).all(), how


def test_confidence_is_its_definition():
    low = -math.inf
    logits = torch.tensor([[0.0, 1, 3, -2], [2, 2, low, low], [low, 0, low, low], [1e4, 0, 0, 0]])
    for z in (logits, logits.double(), logits.bfloat16()):
        p = z.double().softmax(-1)
        best, second = p.topk(2).values.unbind(-1)
        for order, want in (("max_prob", best), ("margin", best - second),
                            ("entropy", torch.special.xlogy(p, p).sum(-1))):
            close(confidence(z, order).double(), want, 1e-5)


def diff_lm(layers="full", **fields):
    torch.manual_seed(0)
    fields = dict(vocab_size=13, block_size=64, layers=layers, n_layer=2, n_head=2, n_embd=32) | fields
    lm = LM(ModelConfig(**fields)).double().eval()
    for p in lm.parameters():                       # as initialised it predicts nearly the same everywhere
        p.data.mul_(4 if p.dim() > 1 else 1)
    return lm


def count_passes(lm):
    """lm, and a list of the tokens in each of its passes from now on."""
    passes = []
    lm.register_forward_pre_hook(lambda _, args: passes.append(args[0].size(1)))
    return lm, passes


@each("how, steps", pairs("""
                             => 14
steps=5                      => 5
steps=100                    => 14
threshold=1.0                => 14
threshold=1e-9               => 1
steps=4 fill_block=6         => 6
order=random fill_block=4    => 15"""))
def test_sampler_steps_threshold_and_given_tokens(how, steps):
    """Each step is one pass and fills something; given tokens stay; blocks are filled one by one."""
    (lm, passes), how, left = count_passes(diff_lm()), model.settings(how), []
    x, _ = canvas([[1, 2, 3], [4, 13, 13, 5]], 12, 13)              # a prompt, and one with places to infill
    before, given = x.clone(), x != 13
    block = (torch.arange(16) - torch.tensor([[3], [1]])) // how.get("fill_block", 16)  # from the first hole

    def look(step, y):
        left.append((y == 13).sum().item())
        current = block.where(y == 13, 99).amin(1, keepdim=True)
        assert ((y == 13) | given)[block > current].all()
    y = sample_mdm(lm, x, 13, callback=look, **how)
    assert torch.equal(y[given], x[given]) and (y < 13).all() and torch.equal(x, before)
    assert len(passes) == len(left) == int(steps)
    assert left[-1] == 0 and left == sorted(set(left), reverse=True)


SAMPLERS = {
    "ar": sample_ar, "ar drafts": partial(sample_ar, draft=3),
    "mdm": sample_mdm, "mdm blocks": partial(sample_mdm, fill_block=4, steps=10),
    "dual": partial(sample_mdm, fill_block=4, steps=10, cache=True),
    "block": partial(sample_block, fill_block=4, steps=2)}


@each("name", SAMPLERS)
def test_nothing_is_generated_after_end_of_text(name):
    x, valid = canvas([[12, 2, 3], [4, 13, 5]] * 20, 20, 13)    # id 12 ends a text, in the prompt nothing
    y = SAMPLERS[name](diff_lm(), x, 13, valid=valid, eot_id=12)
    new = (x == 13) & valid
    after = ((y == 12) & new).cumsum(1) > 0
    assert after.any() and (y[after & new] == 12).all() and (y[::2, 3:] != 12).any()
    assert (y[~valid] == 0).all() and torch.equal(y[~new], x[~new])
    steps = []
    ends = lambda idx, causal: 1e3 * F.one_hot(torch.full(idx.shape, 12), 13)
    sample_ar(ends, x, 13, eot_id=12, valid=valid, callback=lambda step, x: steps.append(step))
    assert len(steps) == 1                                          # every row has ended


def drawn_from(patch, more=0):
    """The logits of all draws from now on, to which more is added."""
    draw, seen = diffusion.draw, []
    spy = lambda logits, *a, **kw: seen.append(logits) or draw(logits + more, *a, **kw)
    patch.setattr("diffusion.draw", spy)
    return seen


@each("name", SAMPLERS)
def test_batch_invariance(name, monkeypatch):
    """Alone and beside longer and shorter rows: the same tokens at temperature 0, from the same logits."""
    lm, seen = diff_lm(), drawn_from(monkeypatch)

    def run(*prompts):
        seen.clear()
        x, valid = canvas(prompts, 10, 13)
        return SAMPLERS[name](lm, x, 13, temperature=0, valid=valid), torch.cat(seen)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 1, 2], [3, 13, 5, 13]]
    together, logits = run(*prompts)
    for row, prompt in zip(together, prompts):
        alone, own = run(prompt)
        assert torch.equal(alone[0], row[:len(prompt) + 10])
        assert torch.cdist(own, logits, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-10
    assert SAMPLERS[name](lm, together[:0], 13).shape == (0, 19)    # nothing to fill


PROMPTS = {"even": [[1, 2, 3], [4, 5, 6]], "uneven": [[1], [2, 3, 4, 5, 6, 7, 8], [9, 13, 10]],
           "full": [[1], [2] * 22, [9] * 3]}


@each("temperature", [0, 1.0])
@each("prompts", PROMPTS)
def test_cached_sampling_equals_recomputed(temperature, prompts):
    """Also where padding would change a state, and where rows that are full wait for others; and the dual
    cache, where it is exact: in one layer no key depends on another place."""
    x, valid = canvas(PROMPTS[prompts], 9, 13)
    if prompts == "full":
        x, valid = x.masked_fill(~valid, 13)[:, :26], None
    sparse = model.settings(f"dense_len=20 sel_local=2 {BLOCKS}")
    for layers, sampler in (("full full", sample_ar), ("full gated_deltanet", sample_ar),
                            ("nsa(window=6) infllm msa dsa", sample_ar),
                            ("full full", partial(sample_block, fill_block=4, steps=3)),
                            ("full", partial(sample_mdm, fill_block=4, steps=7)),
                            ("full full", partial(sample_mdm, fill_block=4, refresh=1))):
        lm, passes = count_passes(diff_lm(layers, n_layer=len(layers.split()), **sparse))
        go = lambda cache: sampler(lm, x, 13, temperature=temperature, generator=seeded(7), valid=valid,
                                   cache=cache)
        slow = go(False)
        passes.clear()
        assert torch.equal(go(True), slow)
        if layers == "full":
            blocks = -(-(x == 13).sum(1).max() // 4)
            assert set(passes) == {4, x.size(1)} and passes.count(x.size(1)) == blocks, "one full pass each"


@each("layers", ["full", "full(window=6) full", "mla"])
def test_block_diffusion_equals_its_definition(layers):
    """Two streams == each noisy block alone against the cache of the clean ones; size 1 has no variance."""
    lm = diff_lm(layers)
    B = 3
    T = 12
    x = torch.randint(13, (B, T))
    for S in (1, 3, 12):
        noise = mdm_noise(B * T // S, S, seeded(S))
        masked, weight = mdm_mask(noise)
        cache = lm.init_cache(B, T, dtype=torch.float64)
        alone = []
        for part, hidden in zip(x.split(S, 1), masked.view(B, T).split(S, 1)):
            logits = lm(torch.where(hidden, 13, part), causal=False, cache=cache, commit=False)
            alone.append(token_nll(logits, part))
            lm(part, causal=False, cache=cache)
        alone = torch.cat(alone, dim=1)
        weighted = (alone.view(-1, S) * masked * weight[:, None]).view(B, T)
        close(block_diffusion_loss(lm, x, 13, S, noise, reduction="none"), weighted, 1e-6)
    nll, se = mdm_nll(lm, x, 13, 4, noise_block=1)
    loss = block_diffusion_loss(lm, x, 13, 1).item()
    assert nll == approx(loss, rel=1e-6) and se < 1e-9
    empty = torch.full((4, 12), 13)
    blocks, whole = (f(lm, empty, 13, fill_block=12, generator=seeded(0)) for f in (sample_block, sample_mdm))
    assert torch.equal(blocks, whole), "a single block is a whole canvas"


# ------------------------------------------------------------------------------------------------------------
# Calls that have one value, and calls that are refused. Commands stand in REFUSALS.

def nodes(layer, T):
    """Of the graph of T tokens: 16 times the chunks must not be as many more."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    torch.compile(make_layer(layer), backend=counter, fullgraph=True)(torch.randn(1, T, 32))
    return len(counter.graphs[0].graph.nodes)


def topics():
    """Lengths of the documents in Python's longest docstring."""
    path = prepare.python_roots()["python"] / "pydoc_data" / "topics.py"
    return [len(text) for text in prepare.documentation(path.read_text(), set())]


def data_of(name):
    """The folder of a dataset, beside one that is none and one that is."""
    for file in ("docs/x", "made/meta.json"):
        write(file, "")
    return str(prepare.dataset_folder(name))


def complaint(script, *given):
    """(exit status, lines, are they short?) of words that mean nothing."""
    status, _, error = typed(script, "", *given)
    return status, len(error.splitlines()), len(error) < 600


def words(*ids):
    """Bytes, and what they say of a text as sample.py shows it."""
    return sample.canvas_text(ids, prepare.Tokenizer("byte"), 300)


def steps(line):
    """Of 100 steps, five to an epoch, those that are evaluated."""
    return sorted(train.eval_steps(train.DEFAULTS | train.parse_flags(line.split()), 100, 5.0))


def rates(schedule, *steps):
    flags = train.DEFAULTS | dict(lr=1.0, warmup=10, schedule=schedule)
    return [train.learning_rate(step, 100, flags) for step in steps]


WINDOW = "full", dict(window=4, sink=True)
NO_ROOM = "its result has {} tokens, and there is room for {}"
# a layer's times at lengths 1, 2, 3
TIMES = [*map(model.settings, """layer=full T=1 ms=2
layer=full T=2 ms=9
layer=kda T=1 ms=1
layer=kda T=2 ms=3
layer=kda T=3 ms=1""".split("\n"))]

def published_size(name):
    """(parameters as transformers' classes count them, without the mask row and the padding to 64 of both
    embeddings; bytes of the cache per token at 64k)."""
    with torch.device("meta"):
        lm = LM(from_preset(name))
    padding = 2 * (lm.embed.weight.size(0) - lm.V) * lm.config.n_embd
    return lm.num_params() - padding, lm.cache_bytes(65536, torch.bfloat16) / 65536


def token_at(u, *logits):
    """The token drawn where the random number is u."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.rand", lambda *shape, dtype, **_: torch.full(shape, u, dtype=dtype))
        return diffusion.draw(torch.tensor([logits])).item()


RARE = math.exp(-16.7)      # 5.6e-8: from float32 uniforms, multiples of 6.0e-8, it would never be drawn
TAIL = math.log1p(-RARE), -16.7
ORDERS = diffusion.reading_order(torch.tensor([0, 5, 5, 9]), 8)
POWER = [3 * 2 ** (-i / 10) for i in range(6)]
TOKENS = np.arange(4000, dtype=np.uint16)
DATA = types.SimpleNamespace(folder="", train=TOKENS, val=np.tile(TOKENS, 2),
                             tokenizer=types.SimpleNamespace(token_bytes=TOKENS))


def reaches(level, *losses):
    return bench.crossing(None, curve(*losses), level=level)


def items(*rows, limit=None):
    """(context, ends, index of the right one, bytes of the ends) of each row of a .jsonl file."""
    tok = prepare.Tokenizer("byte")
    write_jsonl("a.jsonl", *rows, "")
    return [(tok.decode(i["context"]), [*map(tok.decode, i["ends"])], i["gold"], i["bytes"])
            for i in bench.read_items(Path("a.jsonl"), tok, limit)]


def kept(f):
    """Bytes kept for the gradient of a function of two tensors of 40 bytes."""
    return bench.kept_bytes(partial(f, *(torch.ones(10, requires_grad=True) for _ in "ab")))


# a call => its value
VALUES = """
doctest.testmod(attention).failed            => 0
doctest.testmod(attention).attempted >= 5    => True
[a.tolist() for a in attention.top_k(torch.tensor([-math.inf, -0.0, 0.0]), 9)] => [[1, 2, 0], [1, 1, 0]]
repr(parse_value("8"))                       => "8"
repr(parse_value("1e-3"))                    => "0.001"
repr(parse_value("1e6"))                     => "1000000"
repr(parse_value("1_000"))                   => "1000"
repr(parse_value("30M"))                     => "30000000"
repr(parse_value(".5"))                      => "0.5"
repr(parse_value("true"))                    => "True"
repr(parse_value("None"))                    => "None"
parse_value("nan")                           => "nan"
parse_value("\u0663")                        => "\u0663"
parse_value("sigmoid")                       => "sigmoid"
parse_value("9" * 5000)                      => "9" * 5000
nodes("linear", 4096) < 1.6 * nodes("linear", 256)                       => True
nodes("deltanet", 4096) < 1.6 * nodes("deltanet", 256)                   => True
[name for name, _ in parse_layers("(full mla*2)*2")]   => "full mla mla full mla mla".split()
parse_layers("full(window=4, sink=true)*2 full", 4) => [WINDOW, WINDOW, ("full", {}), WINDOW]
" ".join(name for name, _ in parse_layers("(full mla*2)*2", 7))          => "full mla mla full mla mla full"
LM(tiny(layers="full full(position=none)")).blocks[1].mixer.rope_dim     => 0
activate(torch.tensor([3.0, -1.0]), "relu2").tolist()                    => [9, 0]
activate(torch.tensor([1.0]), "gelu").item() => approx(0.841345)
activate(torch.tensor([1.0, 2.0]), "swiglu").item()                      => approx(1.462117)
activate(torch.tensor([9.0, -8.0]), "swiglu_clamped").item()             => approx(-41.999719)
published_size("llama")                      => (8030261248, 131072)
published_size("deepseek-v3")                => (671026404352, 70272)
published_size("llada")                      => (8015581184, 524288)
published_size("qwen3-next")[0]              => 79674391296
published_size("gpt-oss")[0]                 => 20914757184
published_size("kimi-linear")[0]             => 49122675072
diffusion.draw(torch.tensor([[1.0, 2.0, 0.0]]), temperature=0).tolist()  => [1]
diffuse(sample_mdm, x=torch.tensor([[1, 0, 2, 1], [3, 3, 1, 3]]))[0].tolist() => [1, 0, 2, 1]
diffuse(sample_mdm, x=torch.tensor([[1, 0, 2, 1], [3, 3, 1, 3]]), steps=2)[0].tolist() => [1, 0, 2, 1]
diffuse(sample_mdm, x=torch.tensor([[1, 0, 2, 1], [3, 3, 1, 3]]), threshold=0.9)[0].tolist() => [1, 0, 2, 1]
diffusion.probabilities(torch.tensor([1.0, 2.0, 0.0]), 1e-310).tolist() => [0, 1, 0]
ORDERS.sort(1).values.unique(dim=0).tolist() => [[*range(8)]]
ORDERS[0].tolist()                           => [*range(8)]
torch.equal(ORDERS[1], ORDERS[2])            => True
torch.equal(ORDERS[1], ORDERS[3])            => False
smallest(torch.rand(50, 9).round(decimals=1), torch.full((50,), 4)).sum(1).unique().tolist() => [4]
token_at(1 - 2.0 ** -53, *TAIL)              => 1
token_at(1 - 0.99 * RARE, *TAIL)             => 1
token_at(1 - 1.01 * RARE, *TAIL)             => 0
token_at(1 - 2.0 ** -24, *TAIL)              => 0
token_at(0.0, *TAIL)                         => 0
token_at(0.0, -math.inf, 0.0)                => 1
steps("--eval_every 40")                     => [40, 80, 100]
steps("--eval_every 0")                      => [100]
steps("--eval_epochs 1,2.4,4")               => [5, 12, 20, 100]
steps("--eval_epochs 0.01")                  => [1, 100]
steps("--eval_epochs 1e308")                 => [100]
steps("--eval_epochs geometric")[0]          => 5
len(steps("--eval_epochs geometric"))        => 12
len(steps("--eval_epochs geometric:3"))      => 3
train.parse_flags(re.search("--preset.*", train.__doc__)[0].split())["batch_tokens"] % (8 * 1024)    => 0
train.windows_of(train.DEFAULTS | dict(eval_windows=0), DATA, 1, 1)[1].bytes_per_token => approx(2000, abs=2)
rates("wsd", 0, 50, 90, 100)                 => approx([0.1, 1, 0.5, 0])
rates("cosine", 10, 55, 100)                 => approx([1, 0.5, 0])
rates("constant", 99)                        => [1]
train.fixed_windows(TOKENS, 16, 5)[:, 0].tolist()                        => [0, 992, 1984, 2992, 3984]
np.shares_memory(train.fixed_windows(TOKENS, 16, 0).numpy(), TOKENS)     => True
repr(prepare.number("1e6", int))             => "1000000"
repr(prepare.number("30M", int))             => "30000000"
repr(prepare.number("2.5k", int))            => "2500"
repr(prepare.number("1_000_000", int))       => "1000000"
repr(prepare.number("-3", int))              => "-3"
repr(prepare.number("007", int))             => "7"
repr(prepare.number(str(2**63 - 1), int))    => "9223372036854775807"
repr(prepare.number("0.1", float))           => "0.1"
repr(prepare.number("1e-3", float))          => "0.001"
repr(prepare.number(".5", float))            => "0.5"
repr(prepare.number("1B", float))            => "1000000000.0"
prepare.Tokenizer("byte", n_vocab=1 << 16).dtype                         => "uint16"
prepare.Tokenizer("byte", n_vocab=(1 << 16) + 1).dtype                   => "uint32"
list(prepare.python_roots())[:3]             => ["python", "numpy", "torch"]
{"sympy", "networkx", "mpmath"} <= set(prepare.python_roots())           => True
all(path.exists() for path in prepare.python_roots().values())           => True
sum(topics()) > 200_000                      => True
max(topics()) < 10_000                       => True
prep_make("--tokenizer byte --corrupt 0.5")[1].split("/")[1]             => "a-corrupt0.5-byte"
data_of("docs")                              => "data/docs"
data_of("made")                              => "made"
data_of("data/s")                            => "data/s"
data_of("../s")                              => "../s"
data_of("x\\\\s")                            => "x\\\\s"
words(*"é".encode(), 300, 300, 97, 256, 256) => "é░░a"
sample.calculator("3/2")                     => "1.5"
sample.calculator("6/3")                     => "2"
sample.calculator(" -(2-5)*4 ")              => "12"
sample.calculator("1/3")                     => "0.3333333333"
sample.calculator("2*(3+4)*5")               => "70"
sample.wrap("ab\\rc\\n\\nd", 1, 9)             => ["a", "b", "c", "", "d"]
sample.encode("ab", prepare.Tokenizer("byte", special={}))               => [97, 98]
answer("ab(cd)efij", lambda call: "gh")      => ("ab(cd)gh________", [(0, "cd", "gh", None)])
answer("(c)", lambda call: "g" * 7)          => ("(c)k_____", [(0, "c", "k", NO_ROOM.format(7, 6))])
answer("(c)", lambda call: "gg", room=0)     => ("(c)", [(0, "c", "", NO_ROOM.format(2, 0))])
answer("(cd", None)                          => ("(cd______", [])
answer("cd)", None)                          => ("cd)______", [])
answer("(c)d", None, given=3)                => ("(c)d______", [])
[call[1] for call in answer("(c)(d)e", lambda call: None)[1]]            => ["c", "d"]
[call[1] for call in answer("(c)d)e", lambda call: None)[1]]             => ["c"]
bench.law(1e6, 3e6, 1)["critical_flops"]     => approx(2.12e15, rel=0.01)
bench.law(1e7, 4e8, 1)["overfit_epoch"]      => approx(70, rel=0.08)
bench.law(1e8, 4e8, 1)["overfit_epoch"]      => approx(175, rel=0.08)
bench.law(1e9, 4e8, 1)["overfit_epoch"]      => approx(430, rel=0.08)
bench.law(1e8, 1e9, 1)["overfit_epoch"]      => approx(105, rel=0.08)
[r["ours"] for r in bench.published_costs()] => [70_272, 327_680, 516_096, 4.0, 6.4, 9.1, 11.6]
[r["published"] for r in bench.published_costs()] => [70_272, 327_680, 516_096, 4.0, 6.4, 9.1, 11.6]
reaches(2.5, *POWER)["first"]["epoch"]       => approx((3 / 2.5) ** 10, rel=0.02)
reaches(1.5, *POWER)["first"]                => None
reaches(1.5, *POWER)["extrapolated"]         => approx(2 ** 10)
reaches(1.5, 2.0, 2.1, 2.2, 2.3, 2.4)["extrapolated"]                    => None
reaches(1.5)["gap"]                          => None
items(dict(ctx="A man ", endings=["sat", "ran"], label="1", i=7)) => [("A man", [" sat", " ran"], 1, [4, 4])]
items(dict(query="Question: a?\\n", choices=["b", "c"], gold=[1]))[0][0] => "Question: a?\\nAnswer:"
items(dict(query="Question: a?\\n", choices=["b", "c"], gold=[1]))[0][1:] => ([" b", " c"], 1, [2, 2])
items(dict(context="It was", continuation="so"))                         => [("It was", [" so"], 0, [3])]
items(dict(ctx="", endings=["x", "y"], label=0))                         => [("", ["x", "y"], 0, [1, 1])]
len(items(GOOD, GOOD, GOOD, GOOD, limit=2))  => 2
kept(lambda a, b: a * b)                     => 80
kept(lambda a, b: a * a)                     => 40
kept(lambda a, b: a + b)                     => 0
bench.copied(torch.tensor([[3, 4, 5, 6], [3, 4, 6, 7]]), TOKENS, 2)      => approx(5 / 6)
bench.copied(torch.tensor([[3, 4, 5, 6], [3, 4, 6, 7]]), TOKENS, 4)      => approx(1 / 2)
bytes(bench.glyph_ids(torch.tensor([[*b"Ab~{\\n\\xff"]]))[0] + 32)       => b"AB^[  "
len(bench.GLYPHS.flatten(1).unique(dim=0))   => 64
(bench.drawn(torch.tensor([[33, 34]]))[0, 0, :, 8:16] - bench.GLYPHS[34] * 2).unique().item() => approx(-0.6)
[r["vs_full"] for r in bench.beside_full("ms")(TIMES)]  => [1, 1, 2, 3, None]
bench.merged(TIMES, ["layer"], lambda r: {r["T"]: r["ms"]})[1] => {"layer": "kda", 1: 1.0, 2: 3.0, 3: 1.0}
"of memory" in typed(types.SimpleNamespace(main=lambda _: prepare.complain("", MemoryError())), "")[2] => True
complaint(train, "--n\\nope=a")              => (2, 1, True)
complaint(train, "a\\nb" * 999, "--device=cpu\\n")                       => (2, 1, True)
complaint(train, "--seed=" + "9" * 5000)     => (2, 1, True)
complaint(sample, "--n\\nope=a")             => (2, 1, True)
complaint(sample, "a\\nb" * 999, "--device=cpu\\n")                      => (2, 1, True)
complaint(sample, "--seed=" + "9" * 5000)    => (2, 1, True)
complaint(prepare, "--n\\nope=a")            => (2, 1, True)
complaint(prepare, "a\\nb" * 999, "--device=cpu\\n")                     => (2, 1, True)
complaint(prepare, "--seed=" + "9" * 5000)   => (2, 1, True)
complaint(bench, "choices", "--n\\nope=a")   => (2, 1, True)
complaint(bench, "choices", "a\\nb" * 999, "--device=cpu\\n")            => (2, 1, True)
complaint(bench, "choices", "--seed=" + "9" * 5000)                      => (2, 1, True)
"""


@each("call, value", pairs(VALUES))
def test_calls_have_these_values(call, value):
    """By hand or published: of Quokka's table 3, its printed formula gives what is here to 7%."""
    assert eval(call) == eval(value)


def delta(rule=delta_rule, **given):
    zeros = partial(torch.zeros, 2, 3, 20)
    return rule(**dict(q=zeros(8), k=zeros(8), v=zeros(6), beta=zeros(), g=zeros(8)) | given)


def sparse(key_block=4, path=None, H=4):
    q, k = torch.zeros(1, H, 6, 4), torch.zeros(1, 2, 11, 4)
    return block_sparse_attention(q, k, k, torch.ones(1, 2, 6, 3) > 0, key_block, path=path)


def diffuse(f, *more, x=None, mask_id=3, **how):
    x = torch.full((2, 4), mask_id) if x is None else x
    return f(DiffTable(3, 4), x, mask_id, *more, **how)


def pattern(text):
    LM(tiny(layers=text))


def alone(text):
    """The layer itself, which may have been copied alone."""
    name, given, _ = re.split(r"[()]", text)
    ATTENTION[name](LayerConfig(n_embd=32, **model.settings(given.replace(",", ""))))


def export(setting):
    lm = LM(tiny(**model.settings(setting)))
    sample.export(types.SimpleNamespace(export="out", run="."), lm, prepare.Tokenizer("byte"), train.DEFAULTS)


WRONG_CALLS = """
prepare.number(str(2**63), int)                             => a whole number
prepare.number("1.5", int)                                  => a whole number
prepare.number("1e-3", int)                                 => a whole number
sample.calculator("(" * 150)                                => no arithmetic
sample.calculator("1" * 201)                                => no arithmetic
pattern("")                                                 => no layer
pattern("(" * 3000 + "full" + ")" * 3001)                   => unbalanced
pattern("full*" + "9" * 5000)                               => more than 10,000
export("causal=true")                                       => computes something else
export("shift=true")                                        => computes something else
export("logit_softcap=1")                                   => computes something else
export("layers=kda")                                        => computes something else
export("n_expert=4")                                        => computes something else
export("position=none")                                     => computes something else
export("window=9")                                          => computes something else
export("mlp=gelu")                                          => computes something else
delta(chunk_size=48)                                        => power of two
delta(g_min=-8.0)                                           => g_min -8.0 must lie in
delta(k=torch.zeros(2, 3, 9, 6))                            => k has shape
delta(v=torch.zeros(2, 3, 9, 6))                            => v has shape
delta(beta=torch.zeros(2, 3, 9, 6))                         => beta has shape
delta(beta=torch.zeros(2, 3, 20, 8))                        => beta has shape
delta(write=torch.zeros(2, 3, 20))                          => write has shape
delta(g=torch.zeros(2, 3, 9, 6))                            => g has shape
delta(state=torch.zeros(2, 3, 9, 6))                        => state has shape
delta(reset=torch.zeros(2, 3, 9, 6))                        => reset has shape
delta(delta_rule_recurrent, k=torch.zeros(2, 3, 9, 6))      => k has shape
sparse(key_block=3)                                         => sel has shape
sparse(path="flat")                                         => path 'flat' is unknown
sparse(path="flex", H=6)                                    => H / H_kv = 3 to divide 128
sparse(path="flex", key_block=5)                            => key_block 5 to divide 128
LM(tiny(n_layer=100, n_embd=2 ** 16, n_inner=2 ** 18))      => n_embd 65536, n_layer 100
MoE(tiny(n_expert=8, n_expert_group=3))                     => groups must be equal
MoE(tiny(n_expert=8, n_expert_group=4, n_expert_group_active=5)) => groups must be equal
diffuse(sample_mdm, temperature=math.nan)                   => temperature
diffuse(sample_mdm, cache=True)                             => fill_block
diffuse(sample_mdm, cache=True, fill_block=2)               => init_cache
diffuse(mdm_nll, 4, group=torch.tensor([1, 0]))             => ascend
diffuse(mdm_nll, 2)                                         => n_mc
diffuse(chain_nll, "right")                                 => order
diffuse(block_diffusion_loss, 3)                            => noise_block
diffuse(mixed_loss, 3, 0.1)                                 => ar_frac
diffuse(ar_loss, mask_id=2)                                 => the mask token 2 is one of the 3 tokens
diffuse(mdm_loss, mask_id=2)                                => the mask token 2 is one of the 3 tokens
diffuse(sample_mdm, mask_id=2)                              => the mask token 2 is one of the 3 tokens
diffuse(ar_loss, x=torch.zeros(2, 0).long())                => of no token
diffuse(mdm_loss, x=torch.zeros(2, 0).long())               => 0 tokens
diffuse(mdm_nll, 4, x=torch.zeros(2, 0).long())             => 0 tokens
diffuse(chain_nll, x=torch.zeros(2, 0).long())              => of no token
sample.check_rewrites(tiny(layers="full(window=4) full"), "--cache") => leave --cache out
sample.check_rewrites(tiny(window=8), "--cache")            => leave --cache out
sample.check_rewrites(tiny(layers="kda full"), "--cache")   => leave --cache out
bench.match_experts(dict(n_layer=8, n_head=2, n_embd=16, vocab_size=60), "active") => larger --n_embd
bench.match_experts(dict(n_layer=8, n_head=2, n_embd=16, vocab_size=60), "total") => larger --n_embd
train.probe_items(np.zeros(50, np.uint16), 16)              => 4 validation windows
prepare.load_dataset("none")                                => prepare.py --text FILE --name none
"""


# Layers with settings that cannot be
REFUSED = """
full(n_kv_head=3)                           => n_head 4 must be a multiple of n_kv_head 3
full(n_head=5)                              => n_embd 32 must be a multiple of n_head 5
full(window=0)                              => window 0
full(rotary_fraction=0.4)                   => must be an even number
full(rotary_fraction=1.5)                   => rotary_fraction 1.5
full(n_kv_head=0)                           => n_kv_head 0
full(head_dim=0)                            => head_dim 0
full(position=rotery)                       => one of rotary, learned, none
mla(kv_lora_rank=0)                         => kv_lora_rank 0
mla(qk_rope_head_dim=3)                     => qk_rope_head_dim 3 must be even
mla(n_head=5)                               => n_head 5
nsa(cmp_stride=5)                           => cmp_stride 5 must divide
nsa(sel_topk=2)                             => sel_topk 2 must be at least sel_init
infllm(sel_topk=0)                          => sel_topk 0
msa(sel_block=0)                            => sel_block 0
msa(index_head_dim=2)                       => index_head_dim 2
msa(sel_tile=0)                             => sel_tile 0
dsa(sel_topk=0)                             => sel_topk 0
dsa(index_n_head=0)                         => index_n_head 0
dsa(index_head_dim=2)                       => index_head_dim 2
linear(linear_n_head=2, linear_n_v_head=3)  => must be a multiple of the 2 heads
linear(n_head=5)                            => must be a multiple of 5 heads
linear(bidir=both)                          => bidir=both is no choice: one of sum
linear(decay_gate=hard)                     => decay_gate=hard
linear(linear_decay=x)                      => linear_decay=x
linear(out_gate=tanh)                       => out_gate=tanh
linear(linear_decay=head, decay_gate=none)  => decay_gate=None
linear(linear_decay=head, g_min=3.0)        => g_min 3
linear(conv_size=0)                         => conv_size 0
linear(linear_key_dim=-2)                   => linear_key_dim -2
linear(linear_n_head=0)                     => linear_n_head 0
"""
BAD_PATTERNS = """
ful                            => did you mean 'full'
(full                          => unbalanced
full)                          => unbalanced
)full(                         => unbalanced
full(window=8                  => unbalanced
()                             => no layer
full*                          => count
*3                             => count
full*3*2                       => count
full*0                         => count
full*٣                         => count
full*999999999                 => more than 10,000
(full*5000)*3                  => more than 10,000
full(window)                   => 'window' is not a setting
full(n_embd=64)                => not a setting
full(causal=true)              => not a setting
full(shift=true)               => not a setting
full(window=8, window=9)       => not a setting
full(windw=3)                  => did you mean 'window'
full(window=٣)                 => window ٣: expected a whole number
"""
# a field of the configuration, and values that it cannot have
BAD_SETTINGS = """
n_expert "abc" 8.5 True None -1
qk_norm "maybe" 1
dropout "x" -0.1 1.0 math.nan
mlp 3 "swigloo"
n_inner -8 0 math.inf
logit_softcap 0 -1.0
norm_eps 0 -1e-6 math.nan
router_scale 0
router_aux -1
rope_base 0 math.inf 10**400
rotary_fraction -0.1 1.1
dense_len -1
n_layer 0 10000000
n_embd 0 1000000
n_head 1000000000000
n_expert_active 0
n_expert_group 0
norm "rm"
router None "top"
position "rotery"
"""
NO_NUMBERS = ["", "9" * 5000, *"nan|-nan|inf|1e400|1e999|１２|٣|½|-|.|e5|10**3|0x10|1,2| 5|None|−1".split("|")]
NO_ARITHMETIC = "2**9|exit()|a|1+||1,2|'a'*3|True|\0|lambda: 1|1j|[1][0]".split("|")


def calls(form, text):
    """The rows of a table, which begin with what stands for X in a call."""
    return [(form.replace("X", repr(what)), words) for what, words in pairs(text)]


@each("call, words", [
    *pairs(WRONG_CALLS), *calls("pattern(X)", BAD_PATTERNS + REFUSED), *calls("alone(X)", REFUSED),
    *((f"tiny({field}={value})", f"model setting {field} .*expected")
      for field, *values in map(str.split, BAD_SETTINGS.strip().split("\n")) for value in values),
    *((f"prepare.number({text!r}, {kind})", words) for text in NO_NUMBERS
      for kind, words in (("int", "a whole number"), ("float", "finite"))),
    *((f"sample.calculator({text!r})", "no arithmetic") for text in NO_ARITHMETIC)])
def test_calls_are_refused(call, words):
    """By a sentence, short however long the input is; nothing is written."""
    with refused(words) as error:
        eval(call)
    assert len(str(error.value)) < 400 and not os.listdir()


# ------------------------------------------------------------------------------------------------------------
# train.py

@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A small byte-level dataset made by prepare.py from made-up English."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    words = "the cat dog sat on a mat and saw one red bird then it ran far away from here to there".split()
    text = "\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(300))
    write(folder / "text.txt", text)
    return str(prepare.prepare(text=[str(folder / "text.txt")], name="toy", tokenizer="byte",
                               out_dir=str(folder / "data")))


def quiet(*_, **__):
    pass


TOY_RUN = model.settings("""
    n_layer=1 n_head=2 n_embd=16 block_size=16 batch_tokens=64 unique_tokens=320 lr=3e-3 max_steps=12
    eval_every=6 eval_windows=8 save_every=100 log_every=1 warmup=2""")


def trained(dataset, out, log=quiet, **flags):
    """A run of a very small model, five steps per epoch; the keywords are train.py's flags."""
    return train.train({**TOY_RUN, **dict(dataset=dataset, out=str(out)), **flags}, log=log)


@pytest.fixture
def go(dataset):
    """The same on the small dataset."""
    return partial(trained, dataset)


def at_step(patch, step, act):
    """Calls act(batch, losses) when the gradient of that step is there."""
    gradient = train.Batch.gradient

    def acting(batch, at, stage):
        losses = gradient(batch, at, stage)
        if at == step - 1:
            act(batch, losses)
        return losses
    patch.setattr("train.Batch.gradient", acting)


def go_until(step, go, out, number=signal.SIGTERM, **flags):
    """The same, stopped by a signal during the given step: the run saves at its end and names the command to
    go on."""
    lines = []
    signal.signal(number, signal.SIG_DFL)                       # ignored where the tests run behind a nohup
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda *_: os.kill(os.getpid(), number))
        result = go(out, lines.append, **flags)
    assert result["stopped"] and result["step"] == step == train.load_checkpoint(out)["step"]
    assert f"--resume auto --out {out}" in lines[-1]


def test_a_closed_terminal_stops_no_training(runs, dataset, monkeypatch):
    """Nor does a signal that nohup ignores."""
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=raising(BrokenPipeError)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 1, lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    assert train.main(spelt("TRAIN", dataset, runs).split()) == 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def history(out, loss="loss"):
    return [(r["step"], r.get(loss, 0)) for r in train.read_log(out) if r["kind"] == "train"]


def rows_of(out):
    """The whole log but for its clocks."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tok_per_s")} for r in rows]


def same_run(a, b):
    """Two finished run folders hold the same log, weights, optimizer states and best, bit for bit."""
    assert rows_of(a) == rows_of(b)
    for which, key in product(("last", "best"), "model optimizers step best".split()):
        x, y = (train.load_checkpoint(Path(f) / f"ckpt_{which}.pt")[key] for f in (a, b))
        assert train.digest(x) == train.digest(y), (which, key)


# Data, optimizers, schedule, evaluation

@each("U, T, per_step", sizes("320 16 4 | 333 16 7 | 64 64 2"))
def test_loader_sees_every_token_once_an_epoch(U, T, per_step):
    """In an order of its own, a pure function of seed and epoch; ids above 2^15 are not read as signed."""
    data = np.arange(64000, 65000, dtype=np.uint16)
    loader, again = (train.Windows(data, U, T, seed=3) for _ in "ab")
    windows = [loader.read(i, per_step) for i in range(0, 6 * loader.n, per_step)]
    epochs = torch.cat(windows)[:6 * loader.n].reshape(6, -1)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(64000, 64000 + U // T * T))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(again.read(5 * loader.n, loader.n).flatten(), epochs[5])
    assert loader.data is data, "memory-mapped, it stays so"


def test_muon_is_torchs():
    """Our batched Muon against torch.optim.Muon, matrices of two shapes, three steps."""
    start = [torch.randn(s) for s in sizes("8 24 | 8 24 | 24 8")]
    ours, theirs = ([p.clone() for p in start] for _ in "ab")
    optimizers = (train.Muon(ours, lr=0.01, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.03 * (q - s).norm(), "torch multiplies in bf16"


def test_biases_of_experts_are_vectors():
    """Their shape (E, width) is a matrix's: they neither decay nor go to Muon; nor do short convolutions."""
    lm = LM(tiny(n_expert=4, bias=True, n_layer=3, layers="full nsa linear"))
    adam, muon = train.make_optimizers(lm, {**train.DEFAULTS, "optimizer": "muon"})
    _, plain = adam.param_groups
    names = {n for n, p in lm.named_parameters() if any(p is q for q in plain["params"])}
    assert plain["weight_decay"] == 0 and {n.split(".")[-1] for n in names if "norm" not in n} == {
        *"bias expert_up_bias expert_down_bias window_pos conv_weight".split()}
    assert any("norm" in n for n in names)


@each("objective", "ar mdm mixed".split())
def test_evaluation(objective):
    """Deterministic, whatever the batch."""
    lm, windows = LM(tiny()), torch.randint(3, (5, 16))
    a, b = (train.evaluate(lm, windows, objective, rows=r) for r in (5, 2))
    assert a == approx(b, rel=1e-5) and a["loss"] == approx(math.log(11), abs=0.1)
    assert a["loss"] == min(value for name, value in a.items() if "loss" in name)
    assert (a["se"] > 0) == (objective == "mdm"), "AR is exact, and expects repetition"


def test_recipes_are_what_they_say():
    """Of windows read from the right, of later words, of masked ones at rates from U(0, .5)."""
    x = torch.arange(64).repeat(400, 1)

    def inputs(**values):
        values = {key: default for key, (default, *_) in train.RECIPE.items()} | values
        batch = types.SimpleNamespace(recipe=values, lm=types.SimpleNamespace(mask_id=99))
        return train.Batch.ar_inputs(batch, x, seeded(0))
    y, same, _ = inputs(reverse=0.25)
    turned = (y == x.flip(1)).all(1)
    assert torch.equal(y, same) and ((y == x).all(1) | turned).all() and 0.2 < turned.double().mean() < 0.3
    y, late, _ = inputs(offset=3)
    more = (late == 99).sum(1, keepdim=True)
    assert torch.equal(y, x) and torch.equal(late, torch.where(x < more, 99, x - more))
    assert more.flatten().bincount().min() > 100, "0, 1 and 2 places"
    rates = (inputs(mir=1.0)[2] == 99).double().mean(1)
    assert abs(rates.mean() - 0.25) < 0.03 and rates.max() < 0.75


def test_each_step_has_noise_of_its_own(go, monkeypatch):
    """And dropout. A rate of the masks is kept, and so is the largest norm of a gradient."""
    seen, mdm_pass = [], train.Batch.mdm_pass

    def spy(batch, x, n, u, inputs):
        seen.append((torch.initial_seed(), u.tolist(), n.tolist()))
        assert torch.equal(x, inputs)
        return mdm_pass(batch, x, n, u, inputs)
    monkeypatch.setattr("train.Batch.mdm_pass", spy)
    lm = go("run", objective="mdm", recipe=["rate=0.5"], max_steps=2, grad_clip=1e-12, weight_decay=0.0)["lm"]
    (seed, u, n), (other_seed, other_u, other_n) = seen
    assert seed != other_seed and u != other_u and n == other_n == [8] * 4
    torch.manual_seed(1337)
    close(lm.head.weight, LM(lm.config).head.weight, 1e-4)


# Training: whatever the pieces, the same run

@each("kind", [
    "--objective ar --log_every 5 --save_every 4", "--objective mdm --optimizer muon",
    "--objective mixed --log_every 3 --set mtp=0.3", "--objective mdm --init_from RUNS/mixed",
    "--objective block --diffusion_block 4 --set n_expert=4 --log_every 5",
    "--dropout 0 --layers gated_deltanet(dropout=0.2) --set n_expert=4 router=softmax --log_every 4",
    pytest.param("--objective mdm --device cuda --compile off", marks=on_gpu)])
def test_resume_is_bit_exact(go, runs, kind):
    """Stopped mid-epoch (7) and at an epoch boundary (10), with dropout: every later row, weight and moment
    is the same; on a GPU with torch's deterministic algorithms."""
    torch.use_deterministic_algorithms("cuda" in kind, warn_only=True)
    kind = train.parse_flags(f"--dropout 0.1 {kind}".replace("RUNS", str(runs)).split())
    go("whole", **kind)
    for cut, number in ((7, signal.SIGINT), (10, signal.SIGHUP)):
        go_until(cut, go, f"cut{cut}", number, **kind)
        go(f"cut{cut}", resume="auto", **kind)
        same_run(f"cut{cut}", "whole")
    with refused("--micro_batch"):          # with dropout that would be another run
        go("cut7", resume="auto", micro_batch=2, **kind)


@each("objective", "ar mdm mixed block".split())
def test_looking_does_not_disturb_training(go, monkeypatch, objective):
    """Evaluations, also where they draw, probes, lines of the log, checkpoints."""
    kind = dict(objective=objective, dropout=0.1, diffusion_block=4, recipe=["mir=1"] * (objective == "ar"))
    evaluate = train.evaluate
    drawing = lambda *a, **k: evaluate(*a, **k) | {"drawn": torch.rand(()).item()}
    monkeypatch.setattr("train.evaluate", drawing)
    a = go("a", eval_every=0, log_every=5, save_every=2, **kind)
    b = go("b", eval_every=3, probe_every=2, **kind)
    assert train.digest(a["lm"].state_dict()) == train.digest(b["lm"].state_dict())
    if objective == "mixed":
        loss, ar, mdm = (np.array(history("b", name)) for name in ("loss", "ar_loss", "mdm_loss"))
        np.testing.assert_allclose(loss, (ar + mdm) / 2, rtol=1e-6)
    ar, mdm = (64 * b["lm"].flops_per_token(16, causal=causal) for causal in (True, False))
    cost = dict(ar=2 * ar, mdm=mdm, mixed=(ar + mdm) / 2, block=2 * ar)[objective]
    assert b["evals"][-1]["flops"] == approx(12 * cost)
    assert ["probe_accuracy" in r and "probe_gap" in r for r in b["evals"]] == [False, True] * 2


def one_of_two(rank, go, out, flags):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{os.getcwd()}/init", rank=rank, world_size=2)
    if rank:
        train.load_model = None         # what rank 0 writes, the other does not wait for
    go(out, threads=1, **flags)


def divided(go, out, flags):
    """A run whose batches two processes share, or, where there is no fork, one process in parts."""
    if not sys.platform.startswith("linux"):
        return go(out, **{**flags, "fsdp": "off", "micro_batch": 1})
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=one_of_two, args=(rank, go, out, flags)) for rank in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(60)
        assert p.exitcode == 0


@exactly
@each("kind", """\
--micro_batch 1 --recipe mask=0.1 random=0.05 reverse=0.5 offset=3 mir=0.4
--micro_batch 1 --set n_expert=4 router=softmax router_aux=0.5
--objective mixed --micro_batch 1 --ar_frac 0.25
--objective mixed --set n_expert=4
--objective mixed --batch_tokens 32 --set mtp=0.3
--objective mdm --micro_batch 1 --recipe rate=0.5 random=0.1
--objective mdm --optimizer muon
--objective block --diffusion_block 4
--objective block --micro_batch 1 --diffusion_block 1 --recipe orders=4 random=0.1
--objective block --micro_batch 1 --diffusion_block 8 --set n_expert=4
--fsdp
--fsdp --objective mdm --set n_expert=4
--fsdp --optimizer muon""".split("\n"))
def test_a_divided_batch_is_the_same(go, kind):
    """Two processes, in parts of one window, where one has rows of one objective only, and sharded: the same
    losses, weights and experts' biases after 20 steps; and the checkpoint goes on as one process."""
    kind, whole = train.parse_flags(kind.split()), dict(fsdp="off", micro_batch=None)
    kind |= dict(max_steps=20, lr=1e-3)
    one = go("one", **kind | whole)
    divided(go, "two", kind)
    lm, _ = train.load_model("two", "last")
    for name, a in one["lm"].state_dict().items():
        close(a, lm.state_dict()[name], 1e-6)
    for loss in ("loss", "mtp_loss"):
        both = [history(run, loss) for run in ("one", "two")]
        np.testing.assert_allclose(*both, rtol=1e-5)
    assert all(n < 4 for row in train.read_log("two") for n in row.get("dead_experts", ()))
    more = kind | whole | dict(max_steps=22, resume="auto")
    a, b = (go(out, **more)["evals"][-1]["loss"] for out in ("one", "two"))
    assert a == approx(b, rel=1e-5)


def test_the_mtp_module_comes_and_goes(go):
    """--init_from takes the model; a module for the loss of --set mtp is the run's own affair."""
    go("a", max_steps=2, set=["mtp=0.3"])
    go("b", max_steps=2, init_from="a", objective="mdm")
    go("c", max_steps=2, init_from="b", set=["mtp=0.1"])
    kept = [train.load_model(out)[0].config.mtp for out in "abc"]
    assert kept == [0.3, 0.0, 0.1]


@each("router", ("sigmoid", "softmax"))
def test_indexer_stages(go, router):
    """Dense steps leave the indexer alone, the warm-up leaves everything else alone, routers too, and sparse
    steps train both. A checkpoint is read in the stage that it was trained in."""
    weights, stages = [], []
    kind = train.parse_flags(f"""--layers dsa --dense_steps 2 --indexer_warmup 2 --schedule constant
                                 --set sel_topk=4 n_expert=4 router={router}""".split())
    for n in (1, 2, 4, 6):
        weights.append(go("run", resume="auto", max_steps=n, **kind)["lm"].state_dict())
        stages.append(train.load_model("run", "last")[0].blocks[0].mixer.stage)
    assert stages == "dense dense warmup sparse".split()
    assert [r["step"] for r in train.read_log("run") if "indexer_kl" in r] == [3, 4, 5, 6]
    for before, after, moved in zip(weights, weights[1:], ({False}, {True}, {False, True})):
        assert {"index" in k for k in after if not torch.equal(before[k], after[k])} == moved


# The run folder, and what can befall it

RUN_FILES = {*"config.json meta.json metrics.jsonl lock ckpt_last.pt ckpt_prev.pt ckpt_best.pt".split()}


def test_log_lines_and_metrics_say_the_same(go, dataset, monkeypatch):
    """A line is the mean since the last one; the first step has a line of its own."""
    lines, tok = [], prepare.load_tokenizer(dataset)
    tok.token_bytes *= 3
    monkeypatch.setattr("prepare.load_tokenizer", lambda path: tok)
    monkeypatch.setattr("torch.compile", lambda f, **_: f)
    monkeypatch.setattr("time.perf_counter", iter(range(999)).__next__)
    go("run", lines.append, objective="mdm", log_every=5, compile="on")
    go("each", objective="mdm")
    seen = re.findall(r"^step (\d+)/\d+ \| epoch [\d.]+ \| loss ([\d.]+) \|", "\n".join(lines), re.M)
    np.testing.assert_allclose(np.array(seen, float), history("run"), rtol=0, atol=1e-4)        # four digits
    each = [loss for _, loss in history("each")]
    means = [(j, approx(np.mean(each[i:j]), rel=1e-9)) for i, j in sizes("0 1 | 1 5 | 5 10 | 10 12")]
    assert history("run") == means and lines[-2].endswith("eta 0s")
    row = train.read_log("run")[-1]
    assert (row["kind"], row["tokens"], row["epoch"]) == ("eval", 12 * 64, approx(12 * 64 / 320))
    assert row["se"] > 0
    go("run", resume="auto", log_every=5, max_steps=15)
    assert [speed for _, speed in history("run", "tok_per_s")] == [0, 64, 64, 64, 64], "a step a second"
    assert row["bpb"] == approx(row["loss"] / math.log(2) / 3), "nats per token to bits per byte"


def raising(error):
    def call(*_, **__):
        raise error
    return call


def full_disk(error):
    def save(state, file):
        file.write(b"half")
        raise error
    torch.save = save


STEP_9 = "by step 9.*last good checkpoint is .*ckpt_last.pt \\(step 6\\)"
# what happens in the 9th step, after which the model is evaluated and saved => what is told
TROUBLE = f"""
losses["ar"].fill_(math.nan)                                => the loss became nan {STEP_9}
lm.embed.weight.grad[0].fill_(math.nan)                     => the gradient became nan {STEP_9}
lm.embed.weight.data[0].fill_(1e30)                         => the norm of the weights became inf {STEP_9}
setattr(train, "evaluate", lambda *_, **__: dict(loss=math.nan)) => loss of the evaluation became nan {STEP_9}
setattr(train, "evaluate", raising(torch.OutOfMemoryError("CUDA out of memory"))) => smaller --micro_batch
full_disk(OSError(28, "No space left on device"))           => cannot write .*ckpt_best.pt: No space left
full_disk(TimeoutError("timed out"))                        => cannot write .*ckpt_best.pt: timed out
full_disk(RuntimeError("PytorchStreamWriter"))             => cannot write .*ckpt_best.pt: the disk or a limit
"""


@each("trouble, told", pairs(TROUBLE))
def test_nothing_bad_is_saved_and_nothing_good_is_lost(go, monkeypatch, trouble, told):
    """Neither a half file nor a bad number gets a checkpoint's name; what is too large for an evaluation has
    been trained."""
    monkeypatch.setattr("train.evaluate", train.evaluate)           # both are put back afterwards
    monkeypatch.setattr("torch.save", torch.save)
    at_step(monkeypatch, 9, lambda batch, losses: eval(trouble, globals(), dict(lm=batch.lm, losses=losses)))
    with refused(told):
        go("run", eval_every=3, save_every=9, log_every=5)
    state = train.load_checkpoint("run")
    assert state["step"] == (9 if "smaller" in told else 6)
    assert all(p.isfinite().all() for p in state["model"].values())
    assert set(os.listdir("run")) == RUN_FILES
    if STEP_9 in told:
        assert max(r["step"] for r in train.read_log("run")) < 9 + ("evaluation" in told)


def test_every_flipped_bit_of_a_checkpoint_is_seen(go):
    go("run", max_steps=2)
    path = Path("run/ckpt_last.pt")
    state = train.load_checkpoint(path)
    contents = lambda: train.digest(train.load_checkpoint(path))
    assert refusals(path, contents, flipped(path.read_bytes(), 150)) > 75           # the rest: names, padding
    for change, message in pairs("""
dict(version=1)                 => another version
dict(version=torch.zeros(2))    => damaged
dict(digest=torch.zeros(2))     => damaged
dict(digest=None)               => damaged
"""):
        torch.save(state | {"digest": train.digest(state)} | eval(change), path)
        with refused(message):
            train.load_checkpoint(path)


# what befell a run that was stopped: a file, and what it holds then or None => what is told
DAMAGE = """
ckpt_last.pt raw[:-500]     => ckpt_last.pt is truncated
ckpt_last.pt None           => step 8 from
metrics.jsonl raw[:-30]     => step 10 from
metrics.jsonl raw * 2       => step 10 from
metrics.jsonl None          => step 10 from
"""


@each("damage, told", pairs(DAMAGE))
def test_a_damaged_run_goes_on_as_if_nothing_had_been(go, monkeypatch, damage, told):
    """From the checkpoint before, where the last is lost. Where none is left, a run does not begin by itself.
    """
    out, lines, (file, change) = Path("run"), [], damage.split(" ", 1)
    scripted_losses(monkeypatch, {4: 1.0, 8: 2.0, 10: 3.0, 12: 3.0})  # the best is older than the one before
    go("whole", eval_every=4)
    go_until(10, go, out, eval_every=4)
    raw = (out / file).read_bytes()
    (out / file).unlink()
    if (left := eval(change)) is not None:
        write(out / file, left)
    (out / "ckpt_best.pt.part").touch()                              # what a kill has left
    go(out, lines.append, resume="auto", eval_every=4)
    same_run(out, "whole")
    assert not any(out.glob("*.part"))
    assert told in "\n".join(lines)
    for path in out.glob("ckpt_*.pt"):
        path.write_bytes(path.read_bytes()[:-500])
    with refused("ckpt_best.pt is truncated"):
        go(out, resume="auto", eval_every=4)


def scripted_losses(patch, losses):
    """Evaluations measure what is written here, {step: loss}."""
    record = train.Run.record
    loss = lambda row: losses[row["step"]] if row["kind"] == "eval" else row["loss"]
    patch.setattr("train.Run.record", lambda run, row: record(run, row | {"loss": loss(row)}))


@each("which", ("best", "last", "gone"))
def test_best_is_the_least_of_the_log(go, monkeypatch, which):
    """Killed before the one or the other checkpoint of a step: no worse model takes the best's place. Where
    its file is gone, the loss of a model that is no more does not count, at the next resume either; nor does
    one of other windows."""
    best, save = Path("run/ckpt_best.pt"), train.save_atomic
    scripted_losses(monkeypatch, {3: 4.0, 6: 3.0, 9: 5.0 if which == "gone" else 3.0, 12: 4.5, 15: 6.0})

    def killed(state, path, keep=None):
        if (path.name, state["step"]) == (f"ckpt_{which}.pt", 6):
            raise KeyboardInterrupt
        save(state, path, keep)

    def bests(**flags):
        result = go("run", resume="auto", eval_every=3, **flags)
        state = train.load_checkpoint(best)
        assert [r["step"] for r in result["evals"]] == [*range(3, result["step"] + 1, 3)]
        return state["step"], state["best"], result["best"]
    if which == "gone":
        assert bests(max_steps=6) == (6, 3.0, 3.0)
        best.unlink()
        assert bests(max_steps=9) == (9, 5.0, 5.0)
        assert bests(max_steps=12) == (12, 4.5, 4.5)
        assert bests(max_steps=15, eval_windows=4) == (15, 6.0, 6.0)
        return
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.save_atomic", killed)
        bests()
    steps = [train.load_checkpoint(path)["step"] for path in (best, "run")]
    assert steps == [3 if which == "best" else 6, 3]
    assert bests() == (6, 3.0, 3.0)


def test_runs_without_a_name(go, dataset):
    """Each has a folder of its own, of one kind of name, begun at the same moment too; a finished one has
    nothing to do, one that trains lets no other in, and of its log readers name the damaged lines."""
    lines, flags = [], {**TOY_RUN, "dataset": dataset, "epochs": 0.3}                   # 1.5 steps
    assert [train.train(flags, quiet)["out"] for _ in range(2)] == ["out/toy-ar-1x16", "out/toy-ar-1x16-2"]
    out = Path("out/toy-ar-1x16-2")
    again = go(out, lines.append, epochs=0.3, resume="auto")
    assert again["finished"] and (again["out"], again["step"]) == (str(out), 2)
    assert "nothing to do" in "\n".join(lines)
    assert go("a", epochs=2.1, batch_tokens=96)["step"] == 7, "2.1 * (320 / 96) is 7.000000000000001"
    with train.lock(out), refused("another process is training in out/toy-ar-1x16-2"):
        go(out, resume="auto", max_steps=4)
    with ThreadPoolExecutor(4) as pool:
        flags = {**train.DEFAULTS, "dataset": dataset}
        assert len(set(pool.map(lambda _: train.new_folder(flags, ModelConfig()), range(4)))) == 4

    write(out / "metrics.jsonl", """{"kind": "train", "step": 2, "epoch": 0.5, "loss": 1.0}
nonsense
{"kind": "train", "step": 9, "epoch": 0.5, "loss": NaN}
{"kind": "train", "step": 9, "epoch": 0.5, "loss": "1"}
{"kind": "train", "step": 9, "epoch": 0.5, "loss": null}
{"kind": "train", "step": 9}
{"kind": "train", "step": 1, "epoch": 0.5, "loss": 1.0}
{"kind": "train", "step": 2, "epoch": 0.5, "loss": 1.0}
{""")
    assert [r["step"] for r in train.read_log(out, lines.append)] == [1, 2]
    assert "metrics.jsonl: line 2, 3, 4, 5, 6, 9 damaged" in lines[-1] and train.read_log("none") == []


# ------------------------------------------------------------------------------------------------------------
# prepare.py

PREP_TEXT = """The cat sat on the mat, and the dog didn't; it's 1984 now.

  Indented  text,\ttabs,   runs of spaces
Zoë's naïve café cost 5€ — 日本語 and 🙂 too. <|endoftext|> inside a line is text.
""" * 6


def prep_bpe():
    return prepare.learn_bpe([(PREP_TEXT, True, 1)], 300)


def prep_make(line, text=PREP_TEXT):
    """(status, stdout, stderr) of prepare.py with a text, into the folder data."""
    write("a.txt", text)
    return typed(prepare, f"--text a.txt {line}")


# Tokenizers

def naive_bpe(words, n_vocab):
    """By definition: count all pairs afresh before each merge. words: {bytes: how often}."""
    parts = {word: [bytes([b]) for b in word] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < n_vocab - 1:
        count = collections.Counter()
        for word, part in parts.items():
            for a, b in zip(part, part[1:]):
                count[a + b] += words[word]
        best = min(count, key=lambda pair: (-count[pair], pair), default=None)
        if count[best] < 2:
            break
        ranks.setdefault(best, len(ranks))
        for part in parts.values():
            for j in range(len(part)):
                if b"".join(part[j:j + 2]) == best and j + 1 < len(part):
                    part[j:j + 2] = [best]
    return ranks


@each("n_vocab", [258, 300, 5000])
def test_bpe_is_the_definition(n_vocab):
    rng = random.Random(1)
    words = collections.Counter("".join(rng.choices("aabc", k=rng.randint(1, 9))).encode()
                                for _ in range(400))
    assert prepare.train_bpe(words, n_vocab) == naive_bpe(words, n_vocab)


def test_bpe_encodes_by_rank(monkeypatch):
    """GPT-2's words, in each the neighbours of lowest rank joined first, the leftmost of them. One long word
    teaches little."""
    import regex
    # as OpenAI wrote it
    gpt2s = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tok, ids = prep_bpe(), []
    for word in regex.findall(gpt2s, PREP_TEXT):
        parts = [bytes([b]) for b in word.encode()]
        while known := [(tok.ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                        if a + b in tok.ranks]:
            i = min(known)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [tok.ranks[part] for part in parts]
    assert tok.encode(PREP_TEXT) == ids and len(ids) < 0.7 * len(PREP_TEXT.encode())
    assert tok.n_vocab == len(tok.vocab) == len(tok.ranks) + 1 == 300
    dna = "".join(random.Random(0).choices("ACGT", k=200_000))
    learnt = []
    learn = prepare.train_bpe
    monkeypatch.setattr("prepare.train_bpe", lambda words, n: learnt.extend(words) or learn(words, n))
    tok = prepare.learn_bpe([("a few words " * 9 + dna, True, 1)], 300)
    assert sum(map(len, learnt)) < 20_000 and max(map(len, learnt)) <= prepare.BPE_LONG
    assert len(tok.encode(dna)) < 100_000
    monkeypatch.setattr("prepare.BPE_BYTES", 9)
    monkeypatch.setattr("prepare.BPE_WORDS", 1)
    first = prepare.learn_bpe([("cde cde ab ab ab", False, 0.1), ("xy " * 9, True, 1)], 300).ranks
    assert b" ab" in first and not {b"cd", b"xy"} & first.keys(), "the first bytes, the most frequent words"


# Streams

def documents_of(path):
    """What read_text makes of the file or folder, whole documents."""
    out, held = [], ""
    for text, last, done in prepare.read_text(prepare.find_texts([path])):
        assert 0 <= done <= 1
        held += text
        if last:
            out, held = out + [held], ""
    assert not held
    return out


def test_one_reader_of_text(runs):
    """However a text is stored, prepare.py and sample.py score read the same documents."""
    documents = ["the cat sat. " * 9 + "\n", "one\ntwo <|endoftext|> not alone\n", "Zoë\n\n\n"]
    marked = "".join(d + "<|endoftext|>\n" for d in documents).encode()
    lines = "".join(json.dumps({"text": d, "id": 1}) + "\n" for d in documents).encode()
    forms = {"a.txt": marked, "A.TXT.GZ": gzip.compress(marked),
             "bom.txt": b"\xef\xbb\xbf" + marked + b"\n<|endoftext|>\n\n",
             "a.json.gz": gzip.compress(lines), "b.jsonl.bz2": bz2.compress(lines),
             "many/x.png": b"\xff\xd8"}
    for name, raw in [*forms.items(), *((f"many/{i}.txt", d) for i, d in enumerate(documents))]:
        write(name, raw)
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a", marked)
    scores = set()
    for path in sorted(Path().iterdir()):
        assert documents_of(path) == documents, path
        scores.add(typed(sample, f"score {runs}/ar --text {path} --windows 0"))
    assert scores.pop()[0] == 0 and not scores
    with zipfile.ZipFile("a.zip", "a") as z, refused("cannot read a.zip .*: it holds 2 files"):
        z.writestr("b", "")
        z.close()
        documents_of("a.zip")
    write("half.jsonl", {"text": "half \ud83d a pair"})
    assert documents_of("half.jsonl") == ["half ? a pair"]


@each("text", [
    PREP_TEXT * 3, "and the cat sat on the mat " * 40, "x" * 500 + " \n \n" * 50 + "y" * 500, " a" * 400],
    ids=len)
def test_pieces_change_no_token(monkeypatch, text):
    write("a.txt", text)
    monkeypatch.setattr("prepare.PIECE", 64)
    pieces = list(prepare.read_text([Path("a.txt")]))
    tok = prep_bpe()
    assert len(pieces) > 5 and [last for _, last, _ in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [i for piece, _, _ in pieces for i in tok.encode(piece)] == tok.encode(text)


@each("cut", [0, 1, 10, 121, 122, 123, 5000])
def test_cut_bytes_divides_the_text(cut):
    """At a whole character; both parts end at the end of a document."""
    stream = [("Zoë and 日本語", False, 0.1), (" go on.\n" * 12, True, 0.5), ("Next 🙂", True, 1.0)]
    parts = [list(prepare.cut_bytes(stream, *border)) for border in ((0, cut), (cut, 1 << 40))]
    left, right = ("".join(text for text, _, _ in part) for part in parts)
    assert left + right == "".join(text for text, _, _ in stream)
    assert cut - 3 <= len(left.encode()) <= cut or cut == 5000
    assert all(not part or part[-1][1] for part in parts)


def test_corruption():
    """Each word may be replaced by another one; a higher rate damages the same words and more."""
    words = [chr(0x4e00 + i) + "ab" for i in range(4000)]
    hit = {}
    damage = lambda rate, seed=3: list(prepare.corrupt_stream([(" ".join(words), True, 1)], rate, seed))
    for rate in (0.0, 0.1, 0.5, 1.0):
        [(text, _, _)] = damage(rate)
        new = text.split(" ")
        hit[rate] = {i for i in range(4000) if new[i] != words[i]}
        assert len(new) == 4000 and set(new) <= set(words) and damage(rate) == damage(rate)
        assert abs(len(hit[rate]) / 4000 - rate) < 0.03
    assert damage(0.1, 4) != damage(0.1, 5) and hit[0.1] < hit[0.5] < hit[1.0]


# Python documentation

def prep_roots(monkeypatch):
    """Twenty small modules, each with its own English docstring, code and junk; some things come twice."""
    root, rng = Path("lib"), random.Random(0)
    nouns = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(3000)]
    form = "the %s of a %s is in the %s and it can be used for that %s."
    prose = lambda n: " ".join(form % tuple(rng.choices(nouns, k=4)) for _ in range(n))
    common = "In some modules it is as it was, and it can be used for the one that is of it. "
    shared = "Copied into every module, this is the one paragraph that is in all of them. " + prose(3)
    for i in range(20):
        write(root / f"m{i}.py", f'''r"""{prose(5)}

{shared}

    >>> a of the in is it to be or not

    so it is as x = 1 and y = 2 ** 3 + foo(bar), or it is in 7 * 8 = 56 - (9)

{"Wordlist " * 30}
"""
def f():
    """Short."""

def g():
    """{prose(4)} A :func:`~torch.add` and ``code``.

    Notes
    -----
    {prose(2)}
    """

x = """{common * (i % 2)} {prose(4)}"""

add_newdoc("m", ("g", """This is of the new documentation. {prose(40)}

{prose(40)}"""))
''' + "x = 1\n" * 60)
    write(root / "copy.py", (root / "m0.py").read_text())
    write(root / "tests/test_m.py", f'"""A wordlist of the tests. {prose(9)}"""')
    write(root / "broken.py", "def (:\n")
    write(root / "latin.py", b'"""caf\xe9"""')
    monkeypatch.setattr("prepare.python_roots", lambda: {"python": Path("none"), "numpy": root})


def test_docs(monkeypatch):
    prep_roots(monkeypatch)
    monkeypatch.setattr("prepare.HELD_OUT", 0.3)
    make = lambda out, source="docs": prepare.prepare(source, tokenizer="byte", out_dir=out)
    folder = make("one")
    train, val, meta = prepare.load_dataset(folder)
    assert folder.name == "docs-byte" and meta == prepare.load_dataset(make("two"))[2], "the same every time"
    tok = prepare.load_tokenizer(folder)
    train, val = (tok.decode(ids).split(prepare.EOT)[:-1] for ids in (train, val))
    assert len(val) > 1 and prepare.drop_overlap(train, val) == val
    every, joined = train + val, "\n".join(train + val)
    assert all(200 <= len(text) < 8500 for text in every) and len(set(every)) == len(every)
    assert joined.count("Copied into") == 1 and "This is of the" in joined
    assert "A torch.add and code." in joined and "\nNotes: the " in joined
    assert not re.search(r">>>|foo\(bar\)|---|\n\n|ordlist|Short\.", joined)
    order = [hashlib.sha1(text.encode()).digest() for text in train]
    assert order == sorted(order)
    code = make("one", "pysrc")
    assert "add_newdoc(" in prepare.load_tokenizer(code).decode(prepare.load_dataset(code)[0])


def test_overlap_is_dropped():
    """Of validation with training: no module in both, no text twice, no 13 words in a row."""
    documents = [(f"m{i}", text) for j in range(3) for i in range(200) for text in (f"text {i} {j}", "copy")]
    train, val = prepare.split_modules(documents, 0.2)
    modules = [{text.split()[1] for text in part if text != "copy"} for part in (train, val)]
    assert not modules[0] & modules[1] and 20 < len(modules[1]) < 60 and len(train + val) == 601
    again = [(f"m{min(modules[1])}", "copy"), *documents]
    assert len(sum(prepare.split_modules(again, 0.2), [])) == 601, "the first is validation"
    words = [f"w{i}" for i in range(60)]
    text = lambda a, b, sep=" ": sep.join(["x", *words[a:b], "y"])
    val = [text(10, 22), text(10, 23), "Short one.", text(5, 18, "; ").upper(), text(25, 45)]
    kept = prepare.drop_overlap([text(0, 30), text(40, 60)], val)
    assert kept == [val[0], val[2], val[4]], "12 common words pass, 13 do not"


# Datasets

@each("tokenizer, kept", [("byte", []), ("bpe:300", ["tokenizer.tiktoken"])])
def test_prepare_own_text(tokenizer, kept):
    """The last document is divided. The same again is there at once; nothing else is passed off as it, or
    overwrites it."""
    other = PREP_TEXT.upper()
    text = PREP_TEXT + prepare.EOT + "\n" + other
    line, folder = f"--name mine --tokenizer {tokenizer}", Path("data/mine")
    assert prep_make(line, text)[0] == 0
    train, val, meta = prepare.load_dataset(folder)
    tok = prepare.load_tokenizer(folder / "meta.json")
    assert (meta["vocab_size"], meta["tokenizer"], train.dtype) == (tok.n_vocab, tokenizer, np.uint16)
    assert tok.eot == tok.n_vocab - 1 and tok.decode([97, tok.eot, 98, 0xc3]) == "a<|endoftext|>b\ufffd"
    assert {"python", "numpy", "torch"} <= set(meta["versions"])
    joined = tok.decode(train).rsplit(prepare.EOT, 1)[0] + tok.decode(val)
    assert joined == PREP_TEXT + prepare.EOT + other + prepare.EOT
    size = len((PREP_TEXT + other).encode())
    assert meta["train_bytes"] + meta["val_bytes"] == size
    assert meta["val_bytes"] == approx(size / 10, abs=4)
    for split, ids in (("train", train), ("val", val)):
        digest = hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest()
        told = [meta[f"{split}_{key}"] for key in "tokens bytes sha256".split()]
        assert told == [len(ids), tok.token_bytes[ids].sum(), digest]
        assert type(ids) is np.memmap and ids[-1] == tok.eot
    times = lambda: [(f.name, f.stat().st_mtime_ns) for f in sorted(folder.iterdir())]
    before = times()
    assert prep_make(line, text)[0] == 0
    for more, words in (("--tokenizer bpe:280", text), ("", text.replace("cat", "dog"))):
        code, _, error = prep_make(f"{line} {more}", words)
        assert code == 2 and "--name" in error
    assert before == times()
    write(folder / ".env", "secret")
    assert [f.name for f in prepare.run_files(folder)] == ["meta.json", *kept]


def test_prepare_options(monkeypatch):
    """Another dataset's tokenizer, given validation text, a length, damage to the training text."""
    monkeypatch.setattr("prepare.PIECE", 16)
    write("v.txt", "validation text\n")

    def make(name, tokenizer, line=""):
        assert prep_make(f"--val v.txt --name {name} --tokenizer {tokenizer} {line}")[0] == 0
        return prepare.load_tokenizer(f"data/{name}"), *prepare.load_dataset(f"data/{name}")
    learnt, *_ = make("a", "bpe:260")
    assert prep_make("v.txt --name a --tokenizer bpe:260")[0] == 2, "the same files, none for validation"
    tok, train, val, meta = make("c", "data/a", "--max_tokens 50")
    assert len(train) == 50 == meta["train_tokens"] and tok.ranks == learnt.ranks
    assert tok.decode(val) == "validation text\n" + prepare.EOT
    tok, clean, v1, _ = make("clean", "bpe:300")
    tok2, dirty, v2, meta = make("dirty", "bpe:300", "--corrupt 0.5")
    assert np.array_equal(v1, v2) and not np.array_equal(clean[:99], dirty[:99])
    assert meta["settings"]["corrupt"] == 0.5
    assert tok.ranks == tok2.ranks                              # learnt from clean text


def test_byte_needs_no_tiktoken():
    write("a.txt", PREP_TEXT)
    code = """import sys; sys.modules['tiktoken'] = None; import prepare
f = prepare.prepare(text=['a.txt'], tokenizer='byte', out_dir='d')
t, v, m = prepare.load_dataset(f); assert len(t) + len(v) > 100 and 'torch' not in sys.modules
assert prepare.load_tokenizer(f).decode(t[:3]) == 'The'
assert prepare.main(['--text', 'a.txt']) == 2"""
    subprocess.run([sys.executable, "-c", code], check=True,
                   env=os.environ | {"PYTHONPATH": os.path.dirname(prepare.__file__)})


def test_load_bin_forms():
    ids, path = np.arange(3000), Path("h.bin")
    for magic, dtype in [*prepare.HEADERS.items(), (None, "uint16")]:
        header = np.zeros(256 if magic else 0, np.int32)
        header[:3] = (magic, 1, len(ids)) if magic else ()
        raw = header.tobytes() + ids.astype(dtype).tobytes()
        path.write_bytes(raw)
        loaded = prepare.load_bin(path)
        assert loaded.dtype == dtype and np.array_equal(loaded, ids)
        for cut in (raw[:-200] if magic else b"", raw[:-1]):
            path.write_bytes(cut)
            with refused("h.bin is damaged.*expected " + ("3000" if magic else "some")):
                prepare.load_bin(path)


def test_damage_is_one_line_that_names_the_file():
    """Every byte of every file of a dataset changed in turn (a sample of them): refused, or the same tokens
    and tokenizer."""
    assert prep_make("--tokenizer bpe:280 --name d")[0] == 0
    folder = Path("data/d")

    def contents():
        tok, (train, val, _) = prepare.load_tokenizer(folder), prepare.load_dataset(folder)
        return train.tolist(), val.tolist(), tok.vocab, tok.pattern
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        damaged = [b"", b"{", b"[" * 9999, raw[:-1], raw[:-2], raw[1:], raw * 2, *flipped(raw, 40)]
        count = refusals(path, contents, damaged)
        assert count == len(damaged) or path.name == "meta.json" and count > 9, path
        path.write_bytes(raw)
    good, file = contents(), folder / "meta.json"
    meta = json.loads(file.read_bytes())
    for key in meta:
        write(file, meta | {key: "other"})
        with refused("it is damaged"):
            prepare.load_tokenizer(folder)
    del meta["checksum"]                                            # an older prepare.py wrote none
    write(file, meta)
    assert contents() == good


# Downloads

class Answers(http.server.BaseHTTPRequestHandler):
    """GET /FILE: (bytes, the length that is claimed, or None)."""
    body = b"a few words of text\n" * 99
    answers = {"whole.txt": (body, len(body)), "half.txt": (body[:99], len(body)),
               "no_length.txt": (body, None)}

    def do_GET(self):
        body, size = self.answers[self.path[1:]]
        self.send_response(200)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(body)


def test_downloads_are_whole_and_checked(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sha = hashlib.sha256(Answers.body).hexdigest()
    there = f"http://127.0.0.1:{server.server_port}/"
    here, raw = Path.cwd().as_uri() + "/", Path("raw")
    for asked, message in pairs(f"""
{there}half.txt         => 99 of 1,980 bytes
{there}half.txt {sha}   => sha256
{there}no_length.txt    => of 0 bytes
{there}whole.txt 000    => {sha}
x                       => unknown
{here}none              => urlopen error .*No such file.*prepare.py --text FILE
"""):
        url, *digest = asked.split()
        with refused(f"cannot download {re.escape(url)}.*{message}"):
            prepare.download(url, raw, *digest)
        assert not list(raw.iterdir())
    for name in ("whole.txt", "no_length.txt"):
        assert prepare.download(there + name, raw, sha).read_bytes() == Answers.body
    monkeypatch.setitem(prepare.URLS, "shakespeare", [there + "whole.txt"])
    monkeypatch.setitem(prepare.SHA256, "shakespeare", sha)
    meta = prepare.load_dataset(prepare.prepare("shakespeare", tokenizer="byte", out_dir="."))[2]
    assert meta["train_bytes"] + meta["val_bytes"] == len(Answers.body)
    server.shutdown()
    server.server_close()
    assert prepare.download(there + "whole.txt", raw).exists(), "what is there is not fetched again"
    monkeypatch.setattr("prepare.download", lambda *_: raw / "whole.txt")
    monkeypatch.setattr("prepare.cut_bytes", lambda stream, *borders: borders)
    parts = [part() for part in prepare.open_source("text8", (), (), None, raw)]
    assert parts == sizes("0 90000000 | 90000000 95000000"), "by convention"


def test_shards(monkeypatch):
    """As many tokens as asked for, from no more shards than they need."""
    ids = np.r_[256, np.arange(999) % 256].astype(np.uint16)
    for name in ("val_000000", "train_000001", "train_000002"):
        header = np.r_[20240520, 1, 1000, [0] * 253].astype(np.int32)
        write(f"{name}.bin", header.tobytes() + ids.tobytes())
    monkeypatch.setitem(prepare.SHARDS, "fineweb10B", (Path.cwd().as_uri() + "/{}_{:06d}.bin", 2))
    # gpt2 is a download
    monkeypatch.setattr("prepare.find_tokenizer", lambda spec: prepare.Tokenizer("byte"))
    for n in (900, 1500):
        folder = prepare.prepare("fineweb10B", str(n), max_tokens=n)
        train, val, meta = prepare.load_dataset(folder)
        assert (len(train), len(val)) == (n, 1000)
        assert Path("data/raw/fineweb10B/train_000002.bin").exists() == (n > 1000)


# ------------------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for objective in "ar mdm mixed block".split():
        trained(dataset, folder / objective, objective=objective, diffusion_block=4)
    return folder


def test_sample_fills_in_and_scores(runs):
    say = lambda line: works(sample, line)[0]
    for objective in ("mdm", "mixed"):
        out = say(f"{runs}/{objective} --prompt 'the [MASK:3] sat' --watch --pause 0")
        assert "step 1" in out and "step 3" in out and re.search(r"\nthe [^░]* sat\s*$", out)
    out = say(f"{runs}/mdm --prompt a --prompt 'the cat' --max_new_tokens 2 --watch --pause 0")
    assert len(out.split("step 1\n")[1].split("\x1b")[0]) <= 4, "the first row, without the padding"
    drawn = lambda how, run=runs / "mdm": works(
        sample, f"{run} --prompt 'a[MASK]b[MASK:9]' --order left {how}")
    assert drawn("--seed 1")[0] == drawn("--seed 1")[0] != drawn("--seed 2")[0]
    greedy, told = drawn("--temperature 0")
    assert drawn("--top_k 1")[0] == drawn("--top_p 1e-9")[0] == greedy and told.startswith("10 tokens in")
    shutil.copytree(runs / "mdm", "run")
    write("run/ckpt_best.pt", b"")
    assert drawn("--temperature 0 --which last", "run")[0] == greedy, "the best is the last"
    write("text", "the cat sat on a mat. " * 10)
    for objective, measures in (("ar", 1), ("mdm", 4), ("mixed", 5), ("block", 4)):
        out = say(f"score {runs}/{objective} --text text --n_mc 8 --windows 2")
        assert out.count("nats/token") == measures
        nats, bits = re.search(r" ([\d.]+)(?: \+- [\d.]+)? nats/token, ([\d.]+) bits/byte", out).groups()
        assert float(bits) == approx(float(nats) / math.log(2), rel=1e-3)
        assert out.startswith("2 windows of 16 tokens, 14.5% of the 220 bytes of text; 1.000 bytes per token")


def table(text):
    """The rows of a table of commands, each named by its command."""
    return [pytest.param(row, id=row.split("=>")[0].strip()) for row in text.split("\n") if row]


SAMPLE_LINES = """
ar --top_k 5                                        => 6 steps,
mixed                                               => 6 steps,
mixed --steps 2                                     => 2 steps,
mdm --steps 3 --order margin                        => 3 steps,
mdm --threshold 1e-9                                => 1 step
mdm --fill_block 3 --steps 4                        => 4 steps,
mdm --fill_block 3 --cache --top_p 0.9              => 6 steps,
mdm --fill_block 3 --cache --refresh 2              => 6 steps,
block                                               =>
block --steps 1                                     =>
block --threshold 0.9 --order max_prob              =>
"""


@exactly
@each("line, steps", pairs(SAMPLE_LINES))
def test_sample_reaches_every_sampler(runs, line, steps):
    """Prompts of two lengths go through one batch, and each comes out as it does alone."""
    def say(*prompts):
        given = [a for p in prompts for a in ("--prompt", p)]
        return works(sample, f"{runs}/{line} --max_new_tokens 6 --temperature 0", *given)
    prompts = ["the", "the cat s"]
    together, told = say(*prompts)
    alone = [say(p)[0] for p in prompts]
    assert together == "".join(f"--- sample {i + 1}\n{text}" for i, text in enumerate(alone))
    assert f" in {steps}" in told


def test_sample_prints_nothing_after_end_of_text(runs, monkeypatch):
    ended = lambda f, x, mask, **how: torch.where(x == mask, how["eot_id"], x)
    monkeypatch.setattr("diffusion.sample_mdm", ended)
    out = typed(sample, f"{runs}/mdm --prompt 'a [MASK:2]b' --prompt 'the cat' --num_samples 2")[1]
    assert out == "--- sample 1\na b\n--- sample 2\na b\n--- sample 3\nthe cat\n--- sample 4\nthe cat\n"


def test_gif_shows_both_runs(runs):
    Image, path = pytest.importorskip("PIL.Image"), Path("a.gif")

    def size(line):
        works(sample, f"{runs}/{line} --gif {path}")
        assert path.stat().st_size < 1 << 20
        with Image.open(path) as image:
            return image.n_frames, image.size[0]
    frames, wide = size(f"mdm --beside {runs}/ar --prompt the --max_new_tokens 9 --steps 3")
    assert frames == 10 and size("ar --max_new_tokens 4")[1] < 0.6 * wide


# ------------------------------------------------------------------------------------------------------------
# bench.py

def curve(*losses, se=0.01):
    return [dict(epoch=2.0 ** i, step=2 ** i, tokens=10 * 2 ** i, flops=100 * 2 ** i, loss=loss, se=se)
            for i, loss in enumerate(losses)]


# Diffusion's losses, where AR's are 3.0 2.0 2.5 3.5 4.0 => where it passes AR for good, in doublings
CROSSINGS = """
4.0 3.5 3.0 2.5 2.2   => 2 1/3
4.0 3.5 3.0 3.6 3.99  =>              touching
4.0 3.5 2.4 3.9 4.5   =>              back again
4.0 3.5 2.6 3.9 3.6   => 3 1/2        back, and down for good
2.0 2.5 2.8 3.6 3.0   => 3 1/11       below in the warm-up does not count
2.0 1.9 3.0 3.6 4.2   =>              only there
4.0 3.5 3.0 3.7 3.5   => 3 2/7        the last point alone
4.0 3.5 nan 2.5 2.2   => 2 1/5
4.0 3.5 2.49 3.0 2.2  => 1 150/151    a little above does not break it
2.9 1.8 2.2 2.5 2.2   => 0            from the first evaluation on
"""


@each("losses, expected", pairs(CROSSINGS))
def test_crossing(losses, expected):
    losses, ar = [*map(float, losses.split())], (3.0, 2.0, 2.5, 3.5, 4.0)
    doublings = [Fraction(word) for word in expected.split() if word[0].isdigit()]
    c = bench.crossing(curve(*ar, se=0.0), curve(*losses))
    if doublings:
        epoch = 2 ** float(sum(doublings))
        assert c["first"]["epoch"] == approx(epoch)
        assert c["first"].get("before", False) == (epoch == 1)
        assert c["first"]["flops"] == approx(100 * epoch, abs=1)
    else:
        assert c["first"] is None
    assert c["gap"] == approx(4.0 - losses[-1]) and c["se"] == 0.01
    unsure = bench.crossing(curve(*ar), curve(*losses, se=2.0))
    assert unsure["first"] is None                  # within the error of the masks nothing is crossed


def test_map_joins_what_was_measured(lab):
    """The best arm of each side in each cell, seed by seed, and how much text AR would need. An arm with a
    width of its own has its own cell; a mixture is on neither side."""
    def study(tokens, seeds, **losses):
        measures = dict(ar="exact", mixed="smaller")
        rows = [dict(arm=arm, seed=s, measure=measures.get(arm, "bound"), best=99.0, se=9.0, best_flops=9e9,
                     annealed=s * loss, annealed_se=0.5, annealed_flops=1e9, annealed_epoch=7.0)
                for arm, loss in losses.items() for s in seeds]
        flags = dict(arm=["own: --dropout .1", "wide: --n_embd 32"], dataset="data/docs",
                     unique_tokens=tokens, n_layer=1, n_embd=16)
        write(f"out/{tokens}.json", dict(experiment="study", flags=flags, rows=rows))
    study(100, (1, 2), ar=3.0, mdm=4.0, own=3.5, wide=1.0, mixed=1.0)
    study(10000, [1], ar=2.0, mdm=1.5)
    name = "mdm-s1-lr1/annealed-2"
    losses = {"any order in blocks of 2": 2.25, "any order in blocks of 1": 3.25, "diffusion, bound": 3.75}
    rows = [dict(run=name, measure=m, over_se=0.1, nats=loss) for m, loss in losses.items()]
    rows.append(dict(run=name, measure="any order in blocks of 4", nats=0.0))       # beside no AR run
    flags = dict(n_mc=64, runs=[f"x/docs-U100-1x16/{run}" for run in (name, "ar-s1-lr1")])
    write("out/panel.json", dict(experiment="panel", flags=flags, rows=rows))
    assert lab("map --results out")[0] == 0
    few, many = found("map")["rows"]
    assert few == approx(dict(
        text="docs", tokens=100, width=16, seeds=2, ar=4.5, ar_arm="ar", mdm=5.25, mdm_arm="own",
        mdm_gap=-0.75, mdm_gap_se=0.3125 ** 0.5, exact=2.25, exact_arm="mdm", exact_gap=0.75,
        exact_gap_se=0.1, worth=100 ** 0.9, block=2, over_law=1e9 / (191.6 * 100 ** 2.174)))
    assert many["mdm_gap_se"] == 0.5 and "worth" not in many
    assert lab("arms --results out")[0] == 0
    rows = found("arms")["rows"]
    assert [r["arm"] for r in rows] == "ar own mdm wide ar mdm".split()
    assert rows[2]["loss"] == (3.75 + 8) / 2 and rows[2]["any_order"] == 2.25 and rows[0]["epoch"] == 7


def test_what_is_measured_of_models():
    """Confidence against hits; what a judge says; how evenly experts are loaded; the mean of two models."""
    logits = torch.tensor([2.0, 0, 0, 0, 0, 0, 0])

    def sure(idx, causal=True):
        return logits.expand(*idx.shape, 7)
    sure.mask_id, p = 7, logits.softmax(0)[0].item()
    for share in (None, 0.5):
        row = bench.calibration(sure, torch.zeros(4, 8, dtype=torch.long), share)
        assert row == approx(dict(ece=1 - p, nats=-math.log(p)), rel=1e-5)
    lm = LM(tiny(vocab_size=7)).eval()
    x = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 6, 6, 6]])
    loss, se, entropy = bench.judged(lm, x, 2).values()
    want = ar_loss(lm, x, 7, reduction="none")[:, 2:]
    assert loss == approx(want.mean().item())
    assert se == approx(want.mean(1).std().item() / 2 ** 0.5)
    assert entropy == approx(math.log(4) / 2)       # four different tokens, and four equal ones
    lm = LM(tiny(n_expert=8, n_expert_active=2))
    for layer in lm.moes():
        layer.bias[:2] += 10
    assert bench.load_of(lm, x) == (4.0, 0.75)      # all to two experts: four times the mean, six are unused
    pair = lm, LM(tiny())
    both = bench.averaged(pair)(x).softmax(-1)
    torch.testing.assert_close(both, sum(f(x).softmax(-1) for f in pair) / 2)


# what stands for flags in a line of the tables of commands
SHORT = {
    "PART": "--ar_epochs 3 --rates 1e-3 FEW --evals 2 --block_size 64 --batch_tokens 128",
    "FEW": """--scale cpu --dataset DATASET --unique_tokens 320 --epochs 4 --n_layer 1 --n_head 2 --n_embd 32
              --block_size 16 --batch_tokens 64 --evals 3""",
    "TRAIN": """--dataset DATASET --out new --unique_tokens 320 --n_layer 1 --n_head 2 --n_embd 16
                --block_size 16 --batch_tokens 64 --max_steps 1""",
    "ITEMS": "choices RUNS/ar --files items.jsonl",
    "TRIO": "--run_ar RUNS/ar --run_mdm RUNS/mdm --run_block RUNS/block",
    "SMALL": "--dataset DATASET --n_layer 1 --n_embd 16 --block_size 128 --batch_tokens 128 --device cpu",
    "SIZES": "--n_head 2 --head_dim 16 --repeat 1 --device cpu",
}
# An experiment at toy size => rows of its JSON file, is there a picture? A new one is tested by being listed.
TOYS = """
crossover FEW --seeds 2 --anneal all                                                     => 6 rows, picture
study --part ar PART                                                                     => 4 rows, picture
study --part diffusion PART                                                              => 4 rows, picture
study --part causes PART                                                                 => 4 rows, picture
study --part own PART --arm ar: 'block: --objective block --diffusion_block 2'           => 2 rows, picture
study --part curve PART                                                                  => 6 rows
study --part capacity PART                                                               => 4 rows
study --part ensembles PART                                                              => 6 rows
adapt --dataset DATASET --ar_steps 2 --steps 4 --n_layer 1 --n_embd 16 --batch_tokens 128  => 8 rows, picture
sparsity FEW --match total                                                               => 4 rows, picture
presets                                                                                  => 7 rows
switch --steps 2 --adapt 2 --length 256 --batch_tokens 512 --device cpu                   => 8 rows
switch --steps 2 --adapt 2 --length 64 --batch_tokens 512 --device cpu                    => 8 rows
optical --dataset DATASET --per 10,64 --page 32 --steps 2 --pages 2 --n_embd 16          => 10 rows, picture
recall --layers full,dsa --steps 2 --lengths 64,512 --batch_tokens 512                   => 14 rows
track --layers full,deltanet --groups parity,s3 --steps 2 --length 8 --times 1,2         => 8 rows
moe --scenes DATASET,DATASET --steps 2 --repeat 1                                        => 5 rows
decode TRIO --run_judge RUNS/ar --batches 1,2                                            => 25 rows, picture
drafts SMALL --block_size 64 --lengths 2 --max_steps 2                                   => 4 rows
panel TRIO --windows 2 --n_mc 4                                                          => 9 rows
panel --runs RUNS/ar RUNS/mdm+RUNS/mdm --windows 2 --n_mc 4 --fill_blocks 2,4             => 6 rows
choices RUNS/ar RUNS/mdm --files probe --limit 4 --n_mc 4                                => 3 rows
compare RUNS/ar RUNS/mdm                                                                 => 2 rows, picture
theory --steps 4 --sequences 2 --lengths 3,6                                             => 48 rows, picture
tools --steps 2 --problems 3 --seeds 2                                                   => 12 rows
context SIZES --lengths 64,300 --batches 1,2 --layers full,infllm,kda                    => 12 rows, picture
attention SIZES --lengths 64,96 --layers full,msa,linear                                 => 6 rows, picture
quality SMALL --mixers 'full,msa full,msa' --n_layer 2 --steps 2 --seeds 2               => 6 rows, picture
quality SMALL --mixers full --steps 2 --seeds 2 --objectives ar --dtype bfloat16         => 1 rows
"""


def spelt(line, dataset, runs):
    for name, flags in SHORT.items():
        line = line.replace(name, flags)
    return line.replace("DATASET", dataset).replace("RUNS", str(runs))


@pytest.fixture
def lab(dataset, runs, monkeypatch):
    """bench.py in an empty folder: lab(line) -> (status, stdout, stderr). Training takes place in this
    process: lab.trained lists the run folders; where it is ["stop"], the next training is interrupted before
    it begins."""
    problems = prepare.arithmetic
    monkeypatch.setattr("prepare.arithmetic", lambda n, seed=0: problems(300, seed))
    monkeypatch.setattr("bench.ARITHMETIC",
                        {**bench.ARITHMETIC, "n_layer": 1, "n_embd": 16, "eval_windows": 8})

    def run_arms(jobs, workers):
        for job in jobs.values():
            if lab.trained == ["stop"]:
                lab.trained.clear()
                return False
            lab.trained.append(job["out"])
            given = {k: v for k, v in job.items() if v is not None}
            train.train({**given, "eval_windows": 4, "resume": "auto"}, log=quiet)
        return True
    validation = bench.validation
    items = train.probe_items
    monkeypatch.setattr("bench.run_arms", run_arms)
    monkeypatch.setattr("train.probe_items", lambda val, T, count=8: items(val, T, count))
    monkeypatch.setattr("bench.validation", lambda name, T, count: validation(name, T, min(count, 8)))

    def lab(line):
        return typed(bench, spelt(line, dataset, runs))
    lab.trained = []
    return lab


def found(name):
    """The experiment's file in the present folder."""
    return json.loads(Path(f"out/{name}.json").read_text())


@each("row", table(TOYS))
def test_every_experiment_runs_stops_and_goes_on(row, lab, monkeypatch):
    """Interrupted at its second point, or before its runs; the same command measures the rest, once; JSON and
    PNG are whole, and runs and tables of another number format stand apart."""
    line, expected = row.split("=>")
    monkeypatch.setattr("bench.PAIRS", (4, 8))
    for table in (bench.REGULARISED, bench.DIFFUSION, bench.CAUSES):
        for arm in list(table)[1:-1]:                                   # the first and the last are enough
            monkeypatch.delitem(table, arm)
    monkeypatch.setattr("bench.moe_speed", lambda *_: {"ratio": 1.0})
    attempt, measured = bench.attempt, []

    def stops(measure, label):
        measured.append(label)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return attempt(measure, label)
    monkeypatch.setattr("bench.attempt", stops)
    lab.trained.append("stop")
    status = tries = 0
    while status or not tries:
        status, out, error = lab(line)
        tries += 1
        assert status == 0 or status == 130 and "goes on from here" in out and tries < 3, error
    file, = Path("out").glob("*.json")
    result = json.loads(file.read_text())
    whole = f"{len(result['rows'])} rows" + ", picture" * file.with_suffix(".png").exists()
    assert whole == expected.strip() and "\n|--" in out and not list(Path("out").glob("*.points.jsonl"))
    assert len(measured) == len(set(measured)) + (len(measured) > 1), "the interrupted point comes twice"
    assert {*"command date device versions seed seeds flags".split()} <= set(result)
    assert all(("bfloat16" in str(name)) == ("bfloat16" in line) for name in (file, *lab.trained))
    SAID.get(result["experiment"], quiet)(result, lab.trained)


def quality_says(result, trained):
    """Means over seeds."""
    rows = {(r["mixer"], r["objective"]): r for r in result["rows"]}
    losses = [bench.evaluations(out)[-1]["loss"] for out in sorted(set(trained)) if "/full-ar" in out]
    assert rows["full", "ar"]["losses"] == losses and all(r["seeds"] == 2 for r in result["rows"])
    assert rows["full", "ar"]["loss"] == approx(sum(losses) / 2)


def switch_says(result, trained):
    """Where a layer reads all keys it is the dense one under another name, but for nsa, which mixes what it
    reads by gates of its own; where it does not, it is not."""
    T, keys = (result["flags"][name] for name in ("length", "keys"))
    for r in result["rows"]:
        same = "dense" in r["arm"] or T <= keys and r["arm"] != "nsa"
        assert (abs(r["gap_before"]) < 1e-5) == same
        assert r["reads"] == T if same else r["reads"] < 256


def tools_say(result, trained):
    """With sample.py, which goes on from there."""
    rows = [(r["model"], r["problem"], r["tool"]) for r in result["rows"]]
    points = product(("plain", "look-up"), ("none", "tools"))
    assert rows == [(m, *point) for m, point in product("ar block block".split(), points)]
    folder = prepare.prepare("arithmetic")
    *parts, meta = prepare.load_dataset(folder)
    texts = [prepare.load_tokenizer(folder).decode(ids).split(prepare.EOT)[:-1] for ids in parts]
    train, val = ({text.split("?")[0] for text in part} for part in texts)
    assert folder.name == "arithmetic" and meta["tokenizer"] == "byte"
    assert (len(train), len(val)) == (270, 30) and not train & val
    for run in ("ar-2-s1338", "block-6-s1337"):
        line = f"out/tools/{run} --prompt '2+(3*4)? <tool>2+' --tool calculator --max_new_tokens 20"
        assert "never closed" in works(sample, line)[1]


SAID = {"quality": quality_says, "switch": switch_says, "tools": tools_say}


def test_crossover_is_what_its_runs_say(lab, monkeypatch):
    """Own arms with any flags of train.py, rates, annealed runs, which are the best here; compare reads the
    same logs."""
    evals = bench.evaluations
    better = lambda out: [e | {"loss": e["loss"] - ("annealed" in str(out))} for e in evals(out)]
    monkeypatch.setattr("bench.evaluations", better)
    line = "crossover FEW --rates 1e-3,2e-3,4e-3 --x tokens --arm 'own: --layers linear --dropout 0.1'"
    status, out, _ = lab(line + " 'fast: --lr 0.01 --epochs 2'")
    assert status == 0 and "curve crossing" in out and "honest crossing" in out
    rows = {r["arm"]: r for r in found("crossover_cpu")["rows"]}
    assert list(rows) == "ar mdm own fast crossing".split() and "honest_tuned" in rows["crossing"]
    assert (rows["fast"]["lr"], rows["fast"]["epochs"]) == (0.01, 2)
    fast = {"fast": dict(objective="ar", epochs=2.0)}
    again = bench.few_runs("again", found("crossover_cpu")["flags"], fast)
    assert again("fast", 1, 0.01, 3.0)["epochs"] == 3, "where it is annealed, the length of that"
    losses = lambda pattern: [e["loss"] for out in Path().rglob(pattern) for e in bench.evaluations(out)]
    sweep = {lr: min(losses(f"own-s1337-lr{lr:g}")) for lr in (1e-3, 2e-3, 4e-3)}
    assert rows["own"]["lr"] == min(sweep, key=sweep.get)
    run, = Path().rglob(f"own-s1337-lr{rows['own']['lr']:g}")
    assert train.load_model(run, "last")[0].config.layers == "linear"
    annealed = losses(f"ar-s1337-lr{rows['ar']['lr']:g}/annealed-*")
    ar = rows["ar"]
    assert ar["annealed"] == min(annealed) and ar["best"] == min(e["loss"] for e in ar["evals"])
    gap = min(*annealed, ar["best"]) - rows["mdm"]["last"]          # to the least that AR ever was
    assert rows["crossing"]["honest"]["gap"] == approx(gap)
    assert lab(f"compare {run} --x seconds")[0] == 0
    assert found("compare")["rows"][0]["evals"] == rows["own"]["evals"]


def test_decode_is_what_was_timed(lab, runs, monkeypatch):
    """Every sampler with each of its settings, at every batch size; the judge reads the largest batch. A run
    that other settings have left is not taken: train.py --resume auto compares them. FLOPs are of the passes,
    here one."""
    called = []
    read = []
    judged = bench.judged
    jobs = {}
    for name in ("ar", "mdm", "block"):
        def sampler(f, x, mask_id, name=name, **how):
            called.append((name, len(x), how))
            f(x, causal=False)
            return x.masked_fill(x == mask_id, 0)
        monkeypatch.setattr(diffusion, f"sample_{name}", sampler)
    monkeypatch.setattr("bench.judged", lambda *given: read.append(called[-1:]) or judged(*given))
    assert lab("decode TRIO --run_judge RUNS/ar --batches 1,2")[0] == 0
    timed = [r for r in found("decode_cpu")["rows"] if "tokens/s, batch 2" in r]
    lm, _ = train.load_model(runs / "mdm")
    one_pass = lm.flops_per_token(16, causal=False) / 3 * 16 / 14 / 1e6
    assert all(r["MFLOP/token"] == approx(one_pass, rel=0.02) for r in timed)
    kinds = [(family, *kind) for family, (role, settings) in bench.decoders(14).items()
             for kind in product([role], settings)]
    assert [r["sampler"] for r in timed] == [family for family, *_ in kinds]
    for B, (_, role, setting) in product((1, 2), kinds):
        assert any((name, n) == (role, B) and setting.items() <= how.items() for name, n, how in called)
    assert read[0] == [] and len(read) > 9 and all(n == 2 for ((_, n, _),) in read[1:])
    monkeypatch.setattr("bench.run_arms", lambda asked, workers: jobs.update(asked) and False)
    write("here/ar/metrics.jsonl", dict(kind="eval", step=5, epoch=1.0, loss=1.0))
    given = "--run_mdm RUNS/mdm --run_block RUNS/block --dataset DATASET --max_steps 5 --n_embd 16"
    assert lab(f"panel {given} --out here")[0] == 130 and list(jobs) == ["ar"] and jobs["ar"]["n_embd"] == 16


def test_finished_arms_start_no_process(dataset, monkeypatch):
    job = TOY_RUN | dict(dataset=dataset, out="run", max_steps=2)
    started = []

    class Process:
        returncode, stdout = -signal.SIGINT, ["Traceback\n"]        # Ctrl-C while it still imported torch
        wait = terminate = lambda self: self.returncode

        def __init__(self, command, **_):
            started.append(command)
    monkeypatch.setattr("bench.subprocess.Popen", Process)
    assert not bench.run_arms({"a": job}, 1) and len(started) == 1
    train.train(job, log=quiet)
    with open("run/metrics.jsonl", "a") as f:
        f.write('{"kind": "ev')                                     # killed while it wrote
    assert bench.run_arms({"a": {**job, "lr": None}}, 1) and len(started) == 1
    for other in (dict(max_steps=3), dict(lr=0.5)):                 # more to do; train.py will refuse
        bench.run_arms({"a": {**job, **other}}, 1)
    assert len(started) == 3
    Process.returncode = 2
    with refused("arm '[ab]' failed: Traceback"):
        bench.run_arms(dict.fromkeys("ab", {**job, "lr": 0.5}), 1)
    assert len(started) == 4                                        # no other arm begins


def test_quality_compares_equals():
    """Parameters within 3%, a sparse layer's query reads at most a quarter."""
    base = model.settings("n_layer=4 n_head=4 n_embd=128 block_size=512 vocab_size=257 qk_norm=true")
    full = LM(ModelConfig(**base)).num_params()
    for name in bench.parameters(bench.EXPERIMENTS["quality"].run)["mixers"][0]:
        pattern = bench.pattern_of(name)
        lm = LM(ModelConfig(**base, layers=pattern, n_inner=bench.same_size(pattern, base)))
        assert lm.num_params() == approx(full, rel=0.03), name
        for mixer in (block.mixer for block in lm.blocks):
            if mixer.family == "sparse":
                assert all(mixer.reads(512, causal) <= 128 for causal in (True, False)), name


def test_tables_join_what_was_measured():
    """A mixture's time and cache are the mean over its layers; prose stays, a table changes with its file."""
    page, line = Path("README.md"), "tables --results ."
    layers = {"full": 8.0, "gated_deltanet": 2.0}
    files = dict(
        quality_cpu=[model.settings("""mixer='gated_deltanet*3 full' objective=ar loss=1.5 std=none seeds=1
                                       reads=4""")],
        recall=[model.settings(f"layers=full objective=mdm {row}") for row in (
            "task=pairs T=512 pairs=64 accuracy=0.64", "task=needle T=1024 pairs=4 accuracy=0.04")],
        attention_cpu=[dict(layer=n, T=T, both_ms=10 * T * ms) for n, ms in layers.items() for T in (1, 2)],
        context_cpu=[dict(layer=n, T=T, batch=B, ms=B * T * ms, cache_mib=T * ms)
                     for n, ms in layers.items() for T in (1, 4) for B in (1, 64)])
    about = dict(versions={"torch": "2"}, seeds=[1], flags={},
                 **model.settings("command=python device=d date=now"))
    for name, rows in files.items():
        write(f"{name}.json", dict(about, experiment=name.split("_")[0], rows=rows))
    assert [list(r.values()) for r in bench.mixtures(bench.stored("."))] == [
        "`full`|- / -|- / 64|- / 4|1.0x|100.0%|1.00x".split("|"),
        ["`gated_deltanet*3 full`", "1.500 / -", "- / -", "- / -", f"{8 / 3.5:.1f}x", f"{3.5 / 8:.1%}",
         f"{8 / 3.5:.2f}x"]]
    page.write_text("hand <!-- recall -->old<!-- end --> made\n")

    def filled():
        works(bench, line)
        return page.read_text()
    text = filled()
    assert filled() == text
    assert text.startswith("hand <!-- recall -->\n`python`")
    assert "<!-- end --> made" in text and "old" not in text
    page.write_text("<!-- recall -->")
    status, _, error = typed(bench, line)
    assert status == 2 and "has no <!-- end -->" in error


# ------------------------------------------------------------------------------------------------------------
# bench.py choices, and the probe of train.py

def write_jsonl(path, *rows):
    write(path, "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def random_item(context, *ends):
    """(context, ends) of random tokens of diff_lm, of these lengths."""
    rng = random.Random(0)
    context, *ends = ([rng.randrange(13) for _ in range(n)] for n in (context, *ends))
    return context, ends


@each("layers", ["full", "full(window=4) gated_deltanet", "mla", "nsa"])
def test_exact_choices_are_the_models_own_sum(layers):
    """All ends of a context at once == a pass for each."""
    lm = diff_lm(layers)
    for context, ends in (random_item(9, 3, 7, 1, 2), random_item(9, 1), random_item(0, 4, 1)):
        for end, value in zip(ends, bench.exact_nats(lm, context, ends)[0]):
            nats = ar_loss(lm, torch.tensor([context + end]), 13, reduction="none")
            assert value == approx(nats[:, len(context):].sum().item(), abs=1e-6)
    assert sum(bench.exact_nats(lm, [1, 2], [[a] for a in range(13)])[1]) == 1


def test_diffusion_choices_are_their_definition():
    """The bound == the mean over all orders of the end, within its error; the chain == the end revealed from
    the left."""
    lm, (context, ends) = diff_lm(), random_item(4, 3, 2, 3)
    ends.append(list(ends[0]))
    nats = bench.diffusion_nats(lm, context, ends, "bound", 400)
    assert nats[0] == nats[3], "equal ends under the same masks: no difference at all"
    chain = bench.diffusion_nats(lm, context, ends, "chain")
    for end, bound, left in zip(ends, nats, chain):
        values = chains(lm, torch.tensor([context + end]), range(len(context), len(context + end)))
        assert abs(bound - values.mean()) < 0.05 * values.std(correction=0) + 0.05
        assert abs(left - values[0]) < 1e-8


@no_grad
def test_block_choices_are_their_definition():
    """Block diffusion: a chain of blocks, the places behind an end hidden for good; blocks of 1 have no masks
    to draw."""
    lm, (context, ends) = diff_lm(), random_item(5, 4, 2, 6)
    for S in (1, 4):
        chain = bench.diffusion_nats(lm, context, ends, "chain", block=S)
        bound = bench.diffusion_nats(lm, context, ends, "bound", 8, 0, block=S)
        for end, left, value in zip(ends, chain, bound):
            tokens, want = context + end, 0.0
            # token i given all before it, its block hidden from i on
            for i in range(len(context), len(tokens)):
                x = torch.tensor([tokens[:i] + [13] * (S - i % S)])
                block = torch.arange(x.size(1)) // S
                logits = lm(x, causal=False, mask=block[:, None] >= block)
                want += F.cross_entropy(logits[0, i], torch.tensor(tokens[i])).item()
            assert left == approx(want, abs=1e-8) and (S > 1 or value == approx(want, abs=1e-8))
    a, b = (bench.diffusion_nats(lm, context, [[3, 4, 5]], "bound", 200, seed, block=4)[0]
            for seed in range(2))
    assert a != b and a == approx(b, rel=0.05)


@each("objective, measure, sampler", [
    ("ar", "exact", sample_ar), ("mdm", "chain", partial(sample_mdm, order="left")),
    ("block", "chain", partial(sample_block, order="left", fill_block=4))])
def test_an_item_is_judged(objective, measure, sampler):
    """An end that the model itself writes is told; what does not fit is cut on the left, or failed."""
    lm, flags = diff_lm(), {"objective": objective, "diffusion_block": 4}   # its window: 64 tokens
    judge = lambda context, ends: bench.judge_item(
        lm, flags, {"context": context, "ends": ends}, measure, 4, 0)
    x, _ = canvas([[1, 2, 3]], 4, 13)
    end = sampler(lm, x, 13, temperature=0)[0, 3:]
    for other in (end, *((end + change) % 13 for change in torch.eye(4).long())):
        assert judge([1, 2, 3], [other.tolist()])["greedy"] == torch.equal(other, end)
    context, ends = random_item(100, 4, 9)
    nats = judge(context, ends)["nats"]
    assert nats == judge(context[-55:], ends)["nats"] and len(nats) == 2
    failed = judge(*random_item(5, 65, 3))["failed"]
    assert "65 tokens" in failed and "window of 64" in failed
    context, ends = random_item(70, 64, 2)
    assert judge(context, ends) == judge([], ends), "an end that fills the window leaves no context"


def test_summary_is_its_definition():
    items = [{"gold": g, "ends": [[0] * n for n in (1, 2, 4)], "bytes": [2, 4, 8]} for g in (0, 2, 1, 0)]
    nats = ([1.0, 5.0, 6.0], [3.0, 5.0, 4.0], [7.0, 7.0, 9.0])
    gaps = [4.5, 0.0, 1.0]
    results = [*({"nats": values} for values in nats), {"failed": "why"}]
    assert bench.summary(items, results) == approx(dict(
        items=3, failed=1, accuracy=1 / 3, se=(1 / 3 / 3) ** 0.5, accuracy_norm=2 / 3,     # a tie is no hit
        loss=(1 + 4 + 7) / (1 + 4 + 2), gap=statistics.mean(gaps), gap_se=statistics.stdev(gaps) / 3 ** 0.5))
    one = [{"gold": 0, "ends": [[1, 2]]}, {"gold": 0, "ends": [[3]]}]
    s = bench.summary(one, [{"nats": [2.0], "greedy": True}, {"nats": [4.0], "greedy": False}])
    assert s["accuracy"] == 0.5 and s["loss"] == 2 and "gap" not in s
    assert "accuracy" not in bench.summary(one[:1], [{"failed": ""}])


def test_choices_stop_and_go_on(lab, dataset, runs, monkeypatch):
    """All kinds of runs and of files. Interrupted in a file, with damaged results, with a larger --limit:
    only what is missing is judged, and all is as in one run. The probe is that of train.py."""
    kinds = "ar mdm mixed block".split()
    judged = []
    judge = bench.judge_item
    measures = [m for kind in kinds for m in bench.MEASURES[kind]]
    rows = [{**GOOD, "ctx": "the cat " * n, "endings": ["sat on", "ran"], "label": n % 2} for n in range(6)]
    write_jsonl("many.jsonl", *rows, {**GOOD, "endings": ["b", "c" * 99]})
    write("last.jsonl", {"context": "the red", "continuation": "bird"})

    def judging(*given):
        judged.append(given[3])
        if stop == len(judged):
            raise KeyboardInterrupt
        return judge(*given)
    monkeypatch.setattr("bench.judge_item", judging)

    def choices(out, limit):
        runs = " ".join(f"RUNS/{kind}" for kind in kinds)
        line = f"choices {runs} --files many.jsonl last.jsonl probe --n_mc 4"
        return lab(f"{line} --out {out} --limit {limit}")[:2]
    stop = 3
    status, said = choices("a", 4)
    assert status == 130 and "goes on from here" in said
    part, = Path("a").iterdir()
    with part.open("a") as f:
        f.write('\n7\n[1]\n[12, {"na')                                # killed while it wrote
    stop = None
    status, said = choices("a", 4)
    assert status == 0 and "failed" in said and len(judged) == 1 + 9 * len(measures)
    judged.clear()
    assert choices("a", 9)[0] == 0
    assert sorted(judged) == sorted(measures * 12)
    at_last = found("choices")["rows"]
    assert choices("b", 9)[0] == 0 and at_last == found("choices")["rows"]
    assert len(at_last) == 3 * len(measures)
    assert [(r["items"], r["failed"]) for r in at_last if r["file"] == "many"] == [(6, 1)] * len(measures)
    lm, _ = train.load_model(runs / "ar")
    val = prepare.load_dataset(dataset)[1]
    want = train.probe(lm, train.probe_items(val, 16, 9), "ar")
    row, *_ = [r for r in at_last if r["file"] == "probe"]
    assert [row["accuracy"], row["gap"]] == approx([want["probe_accuracy"], want["probe_gap"]], abs=1e-4)


class Cyclic(nn.Module):
    """Knows that in a window every token is the one before it plus one and the same number, or nothing."""
    def __init__(self, V, knows):
        super().__init__()
        self.embed, self.mask_id, self.knows = nn.Embedding(1, 1), V, knows

    def forward(self, idx, causal=True, mask=None, pos=None):
        first = idx[:, 1:3] if causal else idx[:, :2]               # AR reads BOS first
        step = first[:, 1:] - first[:, :1]
        t = torch.arange(idx.size(1)) if pos is None else pos
        return 5.0 * self.knows * F.one_hot((first[:, :1] + step * t) % self.mask_id, self.mask_id)


@each("objective", ["ar", "mdm", "block"])
def test_probe_picks_the_truth(objective):
    """An oracle finds every true end, a model that knows nothing none: ties are no hits. An end is right
    once, wrong three times."""
    V, T = 12, 16
    # a stride and a start for each window
    val = np.concatenate([(np.arange(T) * (1 + i % 3) + i) % V for i in range(40)])
    items = train.probe_items(val, T, 40)
    assert items.shape == (40, 4, T) and torch.equal(items[:, 0].flatten(), torch.from_numpy(val))
    every, true = (collections.Counter(map(tuple, ends.reshape(-1, 4).tolist()))
                   for ends in (items[..., -4:], items[:, 0, -4:]))
    assert every == {end: 4 * n for end, n in true.items()}
    clear = torch.stack([(item[1:, -4:] != item[0, -4:]).any(1).all() for item in items])
    for knows in (True, False):
        lm = Cyclic(V, knows).train()
        got = train.probe(lm, items[clear], objective, diffusion_block=4)
        assert got["probe_accuracy"] == knows and (got["probe_gap"] > 1) == knows and lm.training
        assert got == train.probe(lm, items[clear], objective, rows=3, diffusion_block=4)


# ------------------------------------------------------------------------------------------------------------
# bench.py theory

@each("L, N", sizes("24 1 | 24 4 | 96 16 | 96 64 | 384 1024"))
def test_parity_closed_forms(L, N):
    """TER follows from the chance that both others of a triple are open when n of L are, each of the other
    L - 1 with probability t = j / N; the sampler's rates are the closed forms."""
    language = bench.Parity()
    n = torch.arange(1, L + 1, dtype=torch.float64)
    table = math.log(2) * (1 - (L - n) * (L - n - 1) / ((L - 1) * (L - 2)))
    t = torch.arange(1, N + 1, dtype=torch.float64)[:, None] / N
    weights = torch.distributions.Binomial(L - 1, t).log_prob(n - 1).exp().mean(0)
    closed = language.theory(N, L)
    assert (table @ weights).exp().item() == approx(closed["theory_ter"], rel=1e-9)
    if L < 100:
        gen = seeded(N)
        y, nats = bench.in_steps(language, language.draw(1500, L, gen), N, 2, gen)
        ter, ser = nats.mean(1), closed["theory_ser"]
        error = ter.std() / 1500 ** 0.5
        assert abs(ter.mean() - math.log(closed["theory_ter"])) < 4 * error + 1e-6        # float32
        wrong = 1 - language.valid(y).double().mean().item()
        assert abs(wrong - ser) < 4 * (ser * (1 - ser) / 1500) ** 0.5 + 1e-9


@each("V, L", sizes("4 5 | 3 6"))
def test_bigram_oracle_is_enumeration(V, L):
    """Probabilities of all V^L sequences -> legality and conditionals."""
    language = bench.Bigram(V)
    x = torch.cartesian_prod(*[torch.arange(V)] * L)
    p = language.start[x[:, 0]] * language.p[x[:, :-1], x[:, 1:]].prod(dim=1)
    assert p.sum().item() == approx(1) and torch.equal(language.valid(x), p > 0)
    assert language.valid(language.draw(50, L, seeded(0))).all()
    for row in language.draw(6, L, seeded(1)):
        canvas = torch.where(torch.rand(L, generator=seeded(int(row[0]))) < 0.6, V, row)
        fits = ((x == canvas) | (canvas == V)).all(1)
        for i in (canvas == V).nonzero()[:, 0]:
            want = torch.stack([p[fits & (x[:, i] == v)].sum() for v in range(V)]) / p[fits].sum()
            close(language(canvas[None])[0, i].exp().double(), want, 1e-6)


# ------------------------------------------------------------------------------------------------------------
# sparsity

@each("match", ["active", "total"])
@each("base", ["n_layer=3 n_head=4 n_embd=96", "n_layer=6 n_head=6 n_embd=384 vocab_size=4096"])
def test_matched_models_have_equal_parameters(base, match):
    """Counted on real models: the same active or total within 3%, and 8 times as many in all as active."""
    base = model.settings(base)
    with torch.device("meta"):
        dense, mixture = (LM(ModelConfig(**base, **values)) for values in bench.match_experts(base, match))
        same = LM(ModelConfig(**base))
    count = LM.active_params if match == "active" else LM.num_params
    assert count(mixture) / count(dense) == approx(1, abs=0.03)
    assert mixture.num_params() / mixture.active_params() == approx(8, rel=0.06)
    assert mixture.active_params() == approx(same.num_params(), rel=0.03), "one mixture for both matches"


# ------------------------------------------------------------------------------------------------------------
# recall

@each("text", [None, bench.Bigram(bench.TEXT)])
@each("T, n", sizes("32 8 | 64 1 | 512 128"))
def test_recall_tasks_have_one_answer_each(text, T, n):
    """Read token by token: keys are distinct, every key asked for came before, and its answer is the value
    that stood behind it."""
    (x, answer), (again, _) = (bench.draw_recall(3, T, n, seeded(T), text) for _ in "ab")
    assert x.shape == answer.shape == (3, T) and torch.equal(x, again)
    letters, asked = bench.KEYS + bench.VALUES, T // 8 if text else T // 2 - n
    for row, hidden in zip(x.tolist(), answer.tolist()):
        value = {}
        for t, token in enumerate(row):
            if hidden[t]:
                assert bench.KEYS <= token < letters and token == value[row[t - 1]]
            elif token < bench.KEYS and not hidden[t + 1]:
                assert token not in value, "a key has one value"
                value[token] = row[t + 1]
        assert len(value) == n and sum(hidden) == asked and max(row) < letters + bench.TEXT
        assert sum(token >= letters for token in row) == (T - 2 * n - 2 * asked if text else 0)


@each("causal", [True, False])
def test_recall_accuracy_of_the_oracle_is_one_and_of_guessing_chance(causal):
    mask_id = bench.KEYS + bench.VALUES + bench.TEXT

    def oracle(idx, causal, aux=None):                      # looks the key up; reads nothing but its input
        assert not (idx[:, -1] != mask_id).any(), "answers are hidden"
        z = torch.zeros(*idx.shape, mask_id)
        for b, row in enumerate(idx.tolist()):
            value = {k: v for k, v in zip(row, row[1:]) if k < bench.KEYS and v != mask_id}
            for t, token in enumerate(row[:-1]):
                if row[t + 1] == mask_id:
                    z[b, t if causal else t + 1, value[token]] = 1
        return z

    def guess(idx, causal, aux=None):
        z = torch.full((*idx.shape, mask_id), -1.0)
        z[..., bench.KEYS:bench.KEYS + bench.VALUES] = torch.rand(*idx.shape, bench.VALUES)
        return z

    for text in (None, bench.Bigram(bench.TEXT)):
        assert bench.recall_accuracy(oracle, 64, 4, mask_id, causal, text)[:2] == (1.0, 0.0)
        share, se, _ = bench.recall_accuracy(guess, 512, 8, mask_id, causal, text)
        assert abs(share - 1 / bench.VALUES) < 5 * se < 0.05


@each("things", (2, 3, 5))
def test_words_are_products(things):
    """Each y is what the permutations up to there do to things in a row."""
    order = list(permutations(range(things)))
    for row, products in zip(*bench.draw_words(3, 20, things, seeded(0))):
        state = tuple(range(things))
        for x, y in zip(row, products):
            state = tuple(state[i] for i in order[x])
            assert order[y] == state


# ------------------------------------------------------------------------------------------------------------
# Tool calls

class Letters:
    """A tokenizer of 13 tokens, two of which open and close a call: a random model then calls often."""
    vocab = ["<tool>", "</tool>", *"abcdefghijk"]

    def encode(self, text): return [self.vocab.index(c) for c in re.findall("</?tool>|.", text)]
    def decode(self, ids): return "".join(self.vocab[i] for i in ids)


def test_calculator():
    kinds = set()
    for problem in prepare.arithmetic(500, 3):
        text, answer = problem.split("? ", 1)
        table, _, asked = text.rpartition("; ")
        names = dict(pair.split("=") for pair in table.split())
        call = "".join(names.get(c, c) for c in asked)
        looked = "".join(f"<tool>{c}</tool>{names[c]} " for c in asked if c in names)
        value = sample.calculator(call)
        assert answer == f"{looked}<tool>{call}</tool>{value}, so {value}"
        assert [bench.solve(text, c) for c in re.findall("<tool>(.*?)<", answer)][-1] == value
        kinds.add((len(names), looked.count("<tool>")))
    assert kinds == {(0, 0), (3, 1)}


@each("sampler, hooked", [
    (sample_ar, "on_token"), (partial(sample_block, fill_block=4), "on_block")])
def test_tool_calls_pause_and_resume(sampler, hooked, monkeypatch):
    """An empty result is no pause, bit for bit; after a result all is as in a start from scratch."""
    lm, tok = diff_lm(), Letters()
    seen = drawn_from(monkeypatch, 4 * torch.eye(13)[1])            # it likes to close calls

    def run(prompts, new, tool=None, **how):
        x = canvas(prompts, new, 13)[0][:, :40]
        hook = sample.ToolCalls(tool, tok, 13, [x.size(1)] * len(x))
        seen.clear()
        return sampler(lm, x, 13, **{hooked: hook if tool else None}, **how), hook.calls
    prompts = [[0, 5], [0, 3, 0, 4], [0, 7, 0], [2, 0, 0]]
    plain, _ = run(prompts, 40, generator=seeded(0))
    paused, calls = run(prompts, 40, lambda call: "", generator=seeded(0))
    assert torch.equal(plain, paused) and len(calls) > 1
    resumed = 0
    for start in product(range(2, 10), (2, 3)):
        y, calls = run([[0, *start]], 19, lambda call: "fgh"[:1 + len(call) % 3], temperature=0)
        logits = torch.cat(seen)
        row = y[0].tolist()
        written = None
        for _, call, result, why in calls:
            written = f"<tool>{call}</tool>{result}"
            assert result and why is None and written in tok.decode(row)
        ends = [i for i in range(21) if calls and tok.decode(row[:i]).endswith(written)]
        if ends:
            stop = ends[-1]
            assert torch.equal(run([row[:stop]], 22 - stop, temperature=0)[0], y)
            close(torch.cat(seen)[stop - 22:], logits[stop - 22:])
            resumed += 1
    assert resumed > 2


BAD_TOOLS = """
raising(ZeroDivisionError)                  => raised ZeroDivisionError
raising(SystemExit)                         => raised SystemExit
lambda call: threading.Event().wait()       => longer than 0.05 seconds
lambda call: "9" * 99                       => 99 tokens, and there is room for
lambda call: type("Odd", (), {"__str__": raising(ZeroDivisionError)})()     => raised ZeroDivisionError
lambda call: "\\ud800"                      =>
lambda call: 42                             =>
lambda call: None                           =>
"""


@each("objective", ["ar", "block"])
def test_bad_tools_leave_a_sentence(go, objective, monkeypatch):
    """sample.py with a tool that misbehaves: the text goes on, one line says what failed, the status is 0."""
    hook = sample.ToolCalls
    monkeypatch.setattr("sample.ToolCalls", lambda *a: hook(*a, seconds=0.05))
    go("run", objective=objective, diffusion_block=4, block_size=64, max_steps=2)
    line = "run --prompt '2+1? <tool>2+' --tool calculator --max_new_tokens 24"
    for tool, reason in pairs(BAD_TOOLS):
        text = iter(b"1</tool>")                                    # a model that closes its call
        draw = lambda rows, *_, **how: torch.tensor([next(text, 46)] * len(rows))
        monkeypatch.setattr("diffusion.draw", draw)
        monkeypatch.setitem(sample.TOOLS, "calculator", eval(tool))
        status, out, err = typed(sample, line + " --order left" * (objective == "block"))
        assert status == 0 and "<tool>2+1</tool>" in out and "calculator('2+1')" in err
        assert "Traceback" not in err
        if reason:
            assert "</tool>error" in out and ", failed: it" in err and reason in err
        else:
            assert "failed" not in err


def answer(text, tool, room=6, given=0):
    """What stands behind a text in which brackets open and close a call, and what the calls were."""
    tok = Letters()
    ids = tok.encode(text.replace("(", "<tool>").replace(")", "</tool>"))
    x = torch.tensor([ids + [13] * room])
    hook = sample.ToolCalls(tool, tok, 13, [x.size(1)], failed="k")
    hook(x, torch.arange(x.size(1))[None] < given)
    return "".join("()abcdefghijk_"[t] for t in x[0].tolist()), hook.calls


# ------------------------------------------------------------------------------------------------------------
# bench.py on a GPU, and its clocks

def test_gpu_queue(monkeypatch, capsys):
    """Without a GPU: every command of the queue is one that bench.py understands, and leaves the file that
    the queue looks for."""
    def leave(command, typed):
        about = bench.EXPERIMENTS[command]
        write(f"{bench.file_name(command, about, bench.settle(about, typed))}.json", {})

    def run(command, **_):
        assert bench.main(command[command.index("bench.py") + 1:]) == 0
    monkeypatch.setattr("bench.perform", leave)
    monkeypatch.setattr("bench.subprocess.run", run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    bench.gpu(results=".")
    assert capsys.readouterr().out.rstrip().endswith("not measured yet: nothing")


def test_a_kernel_that_refuses_costs_no_other_row(lab, monkeypatch):
    """On a GPU: it is told and recorded, and the measurements behind it go on. A broken GPU, and any error on
    a CPU, ends the run."""
    def make_layer(name, *sizes):
        if name == "full":
            raise RuntimeError(f"{message}\nwarnings")
        return make(name, *sizes)
    make = bench.make_layer
    monkeypatch.setattr(bench, "make_layer", make_layer)
    line = "attention SIZES --layers linear,deltanet --lengths 64"
    message = "No available kernel."
    with pytest.raises(RuntimeError, match=message):
        lab(line)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    status, out, _ = lab(line)
    assert status == 0 and out.startswith(f"full 64: {message}\n")
    result = found("attention_cpu")
    assert [r["layer"] for r in result["failed"]] == ["full"]
    assert [r["layer"] for r in result["rows"]] == ["linear", "deltanet"]
    assert all(r["both_ms"] > 0 and r["both_vs_full"] is None for r in result["rows"])
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match=message):
        lab(line)


PEER = """
import torch, types
GPTConfig = types.SimpleNamespace
class GPT(torch.nn.Linear):
    def __init__(self, c):
        super().__init__(c.vocab_size, c.vocab_size)
    def configure_optimizers(self, decay, lr, betas, device):
        return torch.optim.AdamW(self.parameters())
    def forward(self, x, y):
        z = self.weight[x]
        return z, torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten())
"""


def test_train_speed_beside_a_peer(lab, monkeypatch):
    """bench.py train --vs: the same shapes, ratios of the medians of alternating runs; the children run in
    this process here."""
    write("model.py", PEER)

    monkeypatch.setattr("bench.ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    monkeypatch.setattr("torch.compiler.set_stance", lambda *_: None)
    monkeypatch.setitem(sys.modules, "model", sys.modules["model"])     # put back afterwards, as is the path
    monkeypatch.setattr(sys, "path", list(sys.path))
    # AR, diffusion, peer; three rounds
    clock = (t for ms in (1, 2, 8, 2, 2, 4, 1, 2, 8) for t in (0.0, ms / 1e3))
    monkeypatch.setattr("bench.time.process_time", lambda: next(clock))
    flags = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 8"
    sizes = train.parse_flags(flags.split())
    line = f"train --preset small {flags} --batch 2 --iters 1 --warmup 0 --device cpu"
    assert lab(f"{line} --vs .")[0] == 0
    result = found("train_cpu")
    rows = {r["model"]: r for r in bench.speed_table(result["rows"], result)}
    speeds = [rows[k]["speed_vs_nanoGPT"] for k in ("ar", "mdm", "nanoGPT")]
    assert speeds == approx([8, 4, 1])
    assert len(result["rows"]) == 9 and rows["ar"]["tok_per_s"] == approx(2 * 8 / 1e-3)
    assert rows["ar"]["mfu"] is None
    assert rows["ar"]["params"] == LM(override(ModelConfig(), sizes)).num_params()
    assert rows["nanoGPT"]["params"] == 257 * 258


# ------------------------------------------------------------------------------------------------------------
# Commands: what is refused, help, Ctrl-C

def typed(script, line, *more):
    """(exit status, stdout, stderr) of a command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([*shlex.split(line), *map(str, more)])
        except SystemExit as end:                                   # argparse's own way out
            status = end.code
    return status, out.getvalue(), err.getvalue()


def works(script, line, *more):
    """(stdout, stderr) of a command line that ends well."""
    status, out, error = typed(script, line, *more)
    assert status == 0, error
    return out, error


def contents(*folders):
    return {path: path.read_bytes() for folder in folders
            for path in Path(folder).rglob("*") if path.is_file()}


GOOD = {"ctx": "a", "endings": ["b", "c"], "label": 0}
FILES = {   # in the folder in which the commands below are typed
    "file": b"", "empty.jsonl": b"", "cut.pt": b"PK\x03\x04 not the whole file",
    "folder/model.safetensors": b"",
    "latin.txt": "na\xefve".encode("latin-1"), "utf 16.txt": "x".encode("utf-16"), "no.zip": b"PK",
    "ff.txt.gz": gzip.compress(b"\xff"), "cut.jsonl.gz": gzip.compress(b"x" * 9999)[:-9],
    "list.json": b'[{"text": "x"}]', "deep.jsonl": b"[" * 100_000, "number.jsonl": b'{"text": 3}',
    "second.jsonl": b'{"text": "x"}\n{"body": "y"}\n',
}
# A command line => what its complaint must say <= the second line of items.jsonl, where that is wrong. A new
# refusal is tested by being listed here.
REFUSALS = """
train TRAIN --max_step 3                                    => --max_steps
train TRAIN --objective arr                                 => did you mean 'ar'
train TRAIN --dataset nothing                               => prepare.py --text FILE --name nothing
train TRAIN --unique_tokens 99999999                        => more than
train TRAIN --block_size 4096                               => smaller --block_size
train TRAIN --block_size 512                                => smaller --block_size
train TRAIN --n_head 3                                      => multiple of n_head
train TRAIN --set n_kv_head=4 --n_head 6 --n_embd 24        => n_kv_head
train TRAIN --epochs -1                                     => above 0
train TRAIN --epochs 1e308                                  => above 0, below 1e99
train TRAIN --epochs inf                                    => finite
train TRAIN --batch_tokens 70                               => multiple of block_size
train TRAIN --set windw=3                                   => did you mean 'window'
train TRAIN --set window                                    => key=value
train TRAIN --set n_expert=abc --set window=8               => n_expert abc
train TRAIN --set vocab_size=500                            => tokenizer's, 257
train TRAIN --set n_expert=4 n_expert_active=5              => must not exceed
train TRAIN --layers ful                                    => did you mean 'full'
train TRAIN --layers full(window=3                          => unbalanced
train TRAIN --eval_epochs often                             => neither a list
train TRAIN --eval_epochs geometric:many                    => neither a list
train TRAIN --objective mixed --ar_frac 0                   => one of each kind
train TRAIN --objective mdm --recipe mask=0.1                 => not mdm
train TRAIN --objective mdm --set mtp=0.3                   => --set mtp is for
train TRAIN --recipe mask=0.1 --set mtp=0.3                 => without --recipe
train TRAIN --objective block --diffusion_block 5           => must divide
train TRAIN --objective block --set causal=true             => causal=true reads no mask
train TRAIN --objective block --set shift=true              => shift=true reads no cache or mask
train TRAIN --indexer_warmup 3                              => indexer
train TRAIN --lr nan                                        => --lr
train TRAIN --lr 1e30 --warmup 0                            => the norm of the weights became
train TRAIN --max_steps 1e400                               => --max_steps
train TRAIN --beta2 1                                       => beta
train TRAIN --dropout 2                                     => dropout 2
train TRAIN --seed -1                                       => --seed -1
train TRAIN --threads 100000                                => --threads
train TRAIN --wandb_log 1                                   => see --help
train TRAIN --fsdp                                          => torchrun
train TRAIN --device cuda:9                                 => torch sees it
train TRAIN --device gpu                                    => cuda:0, mps or cpu
train TRAIN --device meta                                   => cuda:0, mps or cpu
train TRAIN --device hpu                                    => cuda:0, mps or cpu
train TRAIN --out file/x                                    => file/x
train TRAIN --out RUNS/ar                                   => already holds a run
train TRAIN --out DATASET                                   => already holds a run or other data
train TRAIN --out folder                                    => already holds a run or other data
train TRAIN --init_from no                                  => no checkpoint
train TRAIN --init_from RUNS/ar --preset gpt2               => brings its own
train TRAIN --init_from cut.pt                              => truncated
train --dataset DATASET --resume auto                       => --out
train TRAIN --init_from RUNS/ar --n_embd 32                 => do not fit
train --dataset DATASET --out RUNS/ar --resume auto --n_embd 32  => checkpoint: 16
train --dataset DATASET --out RUNS/ar --resume auto --lr 1  => --init_from
train --dataset DATASET --out RUNS/mdm --resume auto --recipe rate=1  => --recipe ['rate=1'] (checkpoint: [])
train --dataset DATASET --out RUNS/ar --resume best         => off, auto
train --dataset DATASET --out RUNS/ar --resume auto --max_steps 3  => beyond the 3 steps

prepare --toknizer byte                                     => mean --tokenizer
prepare --tok=byte                                          => mean --tokenizer
prepare --learning_rate=1                                   => see --help
prepare --dataset dox                                       => no dataset dox; expected --text FILE or docs
prepare --tokenizer gpt5                                    => gpt2
prepare --tokenizer bpe:12                                  => bpe:N
prepare --corrupt 1.5                                       => 1.5
prepare --corrupt x                                         => --corrupt: 'x': expected a finite number
prepare --val file                                          => --text
prepare --text /dev/null                                    => /dev/null
prepare --text no.txt                                       => no.txt: no such file
prepare --text file                                         => part of file is empty
prepare --text latin.txt                                    => latin.txt as UTF-8 text
prepare --text 'utf 16.txt'                                 => utf 16.txt as UTF-8 text
prepare --text ff.txt.gz                                    => ff.txt.gz as UTF-8 text
prepare --text cut.jsonl.gz                                 => cannot read cut.jsonl.gz
prepare --text no.zip                                       => cannot read no.zip
prepare --text list.json                                    => list.json: line 1
prepare --text deep.jsonl                                   => deep.jsonl: line 1
prepare --text second.jsonl                                 => second.jsonl: line 2
prepare --text number.jsonl                                 => number.jsonl: line 1
prepare --text folder                                       => a folder without .txt
prepare --max_tokens 0                                      => max_tokens
prepare --name a/b                                          => out_dir
prepare --dataset fineweb10B --tokenizer byte               => gpt2
prepare --dataset shakespeare --text file                   => exclude each other
prepare --text items.jsonl --out_dir file --tokenizer byte  => file

sample RUNS/none                                            => no checkpoint
sample RUNS/ar --draft 2                                    => --objective mixed or --set mtp
sample RUNS/mdm --draft 2                                   => autoregressive
sample RUNS/mixed --draft -1                                => number of tokens
sample RUNS/ar --prompt a_[MASK:2]                          => needs a diffusion model
sample RUNS/ar --steps 4                                    => autoregressive
sample RUNS/ar --steps 0                                    => autoregressive
sample RUNS/ar --prompt aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa      => window of 16
sample RUNS/mdm --prompt aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa     => window of 16
sample RUNS/mdm --prompt a --max_new_tokens 0               => put [MASK]
sample RUNS/mdm --prompt a[MASK:-2]                         => [MASK:n]
sample RUNS/mdm --prompt a[MASK:0]b                         => [MASK:0]
sample RUNS/mdm --steps 0                                   => at least 1
sample RUNS/mixed --steps 0                                 => at least 1
sample RUNS/mdm --order best                                => max_prob
sample RUNS/mdm --order=                                    => max_prob
sample RUNS/mdm --threshold 1.5                             => (0, 1]
sample RUNS/mdm --threshold 0                               => (0, 1]
sample RUNS/mdm --threshold 0.9 --steps 3                   => exclude
sample RUNS/mdm --threshold 0.9 --order left                => max_prob
sample RUNS/mdm --temperature -1                            => temperature
sample RUNS/mdm --top_p 0                                   => (0, 1]
sample RUNS/mdm --top_k 0                                   => at least 1
sample RUNS/mdm --cache                                     => fill_block
sample RUNS/mdm --fill_block 0                              => at least 1
sample RUNS/mdm --refresh 2                                 => needs --cache
sample RUNS/mdm --fill_block 4 --cache --refresh 0          => at least 1
sample RUNS/block --fill_block 0                            => blocks of 4
sample RUNS/block --fill_block 8                            => blocks of 4
sample RUNS/block --cache                                   => blocks of 4
sample RUNS/mdm --device cudaa                              => auto, cuda
sample RUNS/ar --num_samples nan                            => --num_samples
sample RUNS/ar --num_samples 1e12                           => --num_samples
sample RUNS/ar --max_new_tokens 1e12                        => --max_new_tokens
sample RUNS/ar --beside x                                   => --gif
sample RUNS/ar --gif no/a.gif                               => cannot write
sample RUNS/ar --gif a.gif --beside x                       => no checkpoint
sample RUNS/ar --tool abacus                                => calculator
sample RUNS/mdm --tool calculator                           => ar or block
sample RUNS/block                                           => out of memory: use a smaller --num_samples
sample RUNS/block --export out                              => this is a block run
sample RUNS/ar --export out                                 => pip install safetensors
sample score RUNS/ar --text file                            => file is empty
sample score RUNS/ar --text latin.txt                       => latin.txt as UTF-8 text
sample score RUNS/ar --text list.json                       => list.json: line 1
sample score RUNS/ar --text file --windows -1               => --windows -1
sample score RUNS/ar --text none                            => none: no such file

bench crossover FEW --seeds 0                               => --seeds
bench crossover FEW --x days                                => --x
bench crossover FEW --arm own                               => --arm
bench crossover FEW --arms ar                               => --arms
bench crossover FEW --arms arr                              => --arms
bench crossover FEW --scale tpu                             => --scale
bench sparsity FEW --ratio 1                                => --ratio
bench sparsity FEW --workers 0                              => --workers
bench sparsity FEW --match both                             => --match
bench tools --problems 0                                    => --problems
bench theory --sequences 0                                  => --sequences
bench theory --lengths 4                                    => --lengths
bench recall --objectives block                             => --objectives
bench recall --lengths 100                                  => --lengths
bench moe --repeat 0                                        => --repeat
bench moe --threads 0                                       => --threads
bench moe --device gpu                                      => --device
bench train --preset gpt3                                   => --preset
bench train --vs no                                         => No such file
bench compare .                                             => no evaluation
bench decode --run_mdm RUNS/ar --dataset DATASET            => --run_mdm
bench decode --run_mtp RUNS/ar --dataset DATASET            => --run_mtp
bench decode --run_judge none                               => no checkpoint none
bench decode --batches 0,8                                  => --batches 0
bench panel --run_block RUNS/mixed --dataset DATASET        => --run_block
bench panel --n_mc 3                                        => multiple of 4
bench panel --windows 0                                     => --windows 0
bench panel --threads 0                                     => --threads 0
bench panel --run_ar RUNS/ar --run_mdm RUNS/mdm --run_block RUNS/block --workers 0  => --workers 0
bench choices none --threads -1                             => --threads -1
bench choices RUNS/none                                     => no checkpoint
bench choices RUNS/ar --files empty.jsonl                   => empty.jsonl holds no items
bench choices RUNS/ar --files cut.jsonl.gz                  => cannot read cut.jsonl.gz
bench choices RUNS/ar --files 'utf 16.txt'                  => as UTF-8 text
bench choices RUNS/ar --files deep.jsonl                    => deep.jsonl line 1 is no JSON
bench choices RUNS/ar --files none.jsonl                    => No such file
bench choices RUNS/ar --files items.jsonl --measures bound  => whose likelihoods are exact
bench choices RUNS/mdm --files items.jsonl --measures left  => exact, bound, chain
bench choices RUNS/mdm --files items.jsonl --n_mc 6         => multiple of the 4
bench choices RUNS/ar --files items.jsonl --limit 0         => at least 1
bench ITEMS => line 2 is no JSON                      <= {"ctx":
bench ITEMS => line 2 is no JSON                      <= {"ctx": "\\ud800", "endings": ["b", "c"], "label": 0}
bench ITEMS => line 2 is no object of the keys ctx    <= []
bench ITEMS => line 2 is no object of the keys ctx    <= 7
bench ITEMS => line 2 is no object of the keys ctx    <= {"ctx": "a", "label": 1}
bench ITEMS => line 2 must have a text under 'ctx'    <= {"ctx": 5, "endings": ["b", "c"], "label": 0}
bench ITEMS => texts under 'endings'                <= {"ctx": "a", "endings": "bc", "label": 0}
bench ITEMS => texts under 'endings'                <= {"ctx": "a", "endings": [1, 2], "label": 0}
bench ITEMS => texts under 'continuation'            <= {"context": "a", "continuation": ["b"]}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": 2}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": -1}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": null}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": ""}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": [0, 1]}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": []}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "c"], "label": true}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b", "b "], "label": 0}
bench ITEMS => one right answer                       <= {"ctx": "a", "endings": ["b"], "label": 0}
bench ITEMS => items.jsonl line 2 must have one right     <= {"context": "a", "continuation": " "}
"""


@each("row", table(REFUSALS))
def test_refusals(row, dataset, runs, monkeypatch):
    """One line that names what is wrong and the exit status 2; nothing is trained, lost or overwritten."""
    monkeypatch.setattr("bench.run_arms", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setattr("diffusion.sample_block", raising(RuntimeError("can't allocate memory")))
    for name, raw in FILES.items():
        write(name, raw)
    line, word, *bad = re.split("=>|<=", row)
    write_jsonl("items.jsonl", GOOD, *bad, GOOD)
    script, line = spelt(line, dataset, runs).split(maxsplit=1)
    before = contents(".", runs, dataset)
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    status, _, error = typed(globals()[script], line)
    *others, error = error.splitlines()
    assert status == 2 and error.startswith(f"{script}.py: ") and word.strip() in error, error
    assert len(others) == ("--gif" in line), "of what was sampled"
    assert before.items() <= contents(".", runs, dataset).items() and not list(Path().glob("data/*"))


def test_no_run_goes_on_as_another(go):
    """With a flag that train.py no longer has, or in the same folder on other tokens of the same length."""
    go("run", max_steps=1)
    state = train.load_checkpoint("run")
    for value, end in ((0.1, refused("--input_mask")), (0.0, contextlib.nullcontext())):
        state["flags"]["input_mask"] = value                # what was off changes nothing
        train.save_atomic(state, Path("run/ckpt_last.pt"))
        with end:
            go("run", resume="auto", max_steps=2)
    write("a.txt", "the cat sat. " * 200)
    make = lambda name="d", tokenizer="byte": str(prepare.prepare(
        text=["a.txt"], name=name, tokenizer=tokenizer, out_dir="."))
    trained(make(), "other", max_steps=1)
    with refused("was trained on tokens of byte, and .* holds tokens of bpe:260"):
        trained(make("e", "bpe:260"), "new", init_from="run", unique_tokens=None)
    for n in (0, 185):                                      # other training text, other validation text
        Path("d").rename(f"before{n}")
        write("a.txt", "the cat sat. " * n + "the dog ran. " * (200 - n))
        with refused("holds other tokens"):
            trained(make(), "other", resume="auto", max_steps=2)


def test_every_command_has_help():
    for script, line in [*product((train, prepare, sample, bench), [""]), (sample, "score"),
                         *product([bench], bench.EXPERIMENTS)]:
        status, text, _ = typed(script, f"{line} --help")
        assert status == 0 and "--help" in text and not re.search(r"%%|default: (None|\[\]|\(\))", text)
    text = typed(train, "--help")[1]
    assert len(train.DEFAULTS) <= 45 and all(f"--{name}" in text for name in train.DEFAULTS)


# what raises what, the command => its exit status
ENDS = """
train.train KeyboardInterrupt train                     => 130
train.train ImportError train                           => 2
prepare.prepare KeyboardInterrupt prepare               => 130
prepare.prepare ImportError prepare                     => 2
diffusion.sample_mdm KeyboardInterrupt sample RUNS/mdm  => 130
"""


@each("how, status", pairs(ENDS))
def test_an_end_is_one_line(how, status, runs, monkeypatch):
    name, error, script, *line = how.replace("RUNS", str(runs)).split()
    monkeypatch.setattr(name, raising(eval(error)))
    code, _, told = typed(globals()[script], *line or [""])
    assert code == int(status) and len(told.splitlines()) <= 1


# ------------------------------------------------------------------------------------------------------------
# published checkpoints

LLAMA = model.settings("""
    model_type=llama vocab_size=300 hidden_size=32 intermediate_size=48 num_hidden_layers=2
    num_attention_heads=4 num_key_value_heads=2 max_position_embeddings=64 rms_norm_eps=1e-5 rope_theta=1e4
    eos_token_id=299 tie_word_embeddings=true""")
LLADA = model.settings("""
    model_type=llada vocab_size=300 d_model=32 mlp_hidden_size=48 n_layers=2 n_heads=4 n_kv_heads=2
    max_sequence_length=64 rms_norm_eps=1e-5 rope_theta=1e4 mask_token_id=298 weight_tying=true""")


MERGES = "t h|th e|Ġ the|Ġthe n|h e|n d|e nd|Ã ©|Ã© t|Ġ c|a t|Ġc at|Ġ s|Ġs at|Ġ Ġ"


def safetensors(path, tensors, edit=lambda header: None):
    """By definition, with nothing of ours."""
    header, data = {}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype={torch.float32: "F32", torch.bfloat16: "BF16"}[t.dtype], shape=[*t.shape],
                            data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    edit(header)
    head = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def random_weights(config, seed=0):
    torch.manual_seed(seed)
    lm = LM(model.read_config(config))
    return {name: torch.randn(w.shape) * 0.2 + (w.dim() == 1)
            for name, ([w], _) in model.their_tensors(lm, config["model_type"], config["vocab_size"]).items()}


def published(folder, config, weights={}, edit=lambda header: None):
    """A folder as it is published, in two shards, with a byte-level tokenizer of 300 tokens. weights: other
    tensors, None: missing; edit: what is done to the header of a shard."""
    folder = Path(folder)
    write(folder / "config.json", config)
    weights = {name: w for name, w in (random_weights(config) | weights).items() if w is not None}
    for i, edit in enumerate((lambda header: None, edit)):
        part = {name: weights[name] for name in [*weights][i::2]}
        safetensors(folder / f"model-0000{i + 1}-of-00002.safetensors", part, edit)
    shown = [b for b in range(256) if 32 < b < 127 or 160 < b != 173]
    char = {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    merges = [pair.split() for pair in MERGES.split("|")]
    words = [*(char.get(b, chr(b)) for b in range(256)), *map("".join, merges)]
    special = [dict(id=299, content="<|endoftext|>"), dict(id=0, content="<|im_start|>")]
    steps = [dict(type="Digits", individual_digits=True), dict(type="ByteLevel", add_prefix_space=False)]
    write(folder / "tokenizer.json", dict(
        added_tokens=special, normalizer=None, pre_tokenizer=dict(type="Sequence", pretokenizers=steps),
        model=dict(type="BPE", vocab={word: i for i, word in enumerate(words, 1)}, merges=merges)))
    return folder


def test_published_folder_works_in_every_command(monkeypatch):
    """prepare --tokenizer, sample, score, choices and train --init_from take it; its weights are where they
    belong."""
    weights, x = random_weights(LLAMA), torch.arange(9)[None]
    published("llama", LLAMA)
    lm, objective = model.from_pretrained("llama")
    assert objective == "ar" and lm.head.weight is lm.embed.weight
    assert torch.equal(lm.embed.weight[300], weights["model.embed_tokens.weight"][299])
    assert torch.equal(lm.blocks[1].mlp.up_proj.weight[48:], weights["model.layers.1.mlp.up_proj.weight"])
    assert not lm.embed.weight[301:].any()
    with monkeypatch.context() as patch:
        patch.setattr("os.sysconf", lambda name: 250)               # squared, the bytes of the machine
        close(model.from_pretrained("llama", torch.bfloat16)[0](x).float(), lm(x), 0.1)
        with refused("GiB"):
            model.from_pretrained("llama")
    tok = prepare.load_tokenizer("llama")
    single = prepare.Tokenizer("", tok.ranks, prepare.PATTERN.replace(r" ?\p{N}++", r"\p{N}"))
    assert tok.encode("the  été 12") == single.encode("the  été 12")
    assert tok.eot == 299
    assert sample.encode("a<|im_start|>b<|endoftext|>", tok) == [ord("a") + 1, 0, ord("b") + 1, 299]
    assert tok.token_bytes[[0, 299]].sum() == 0
    write("a.txt", "the cat sat then the end 1 été\n" * 300)
    write("q.jsonl", dict(query="the cat", choices=[" sat", " end"], gold=0))
    works(prepare, "--text a.txt --name toy --tokenizer llama")
    works(train, "--init_from llama --dataset toy --out out/r --max_steps 2 --lr 1e-9 --eval_windows 8 "
                 "--batch_tokens 128 --block_size 32 --device cpu --compile off")
    works(sample, "llama --prompt '<|im_start|>the cat' --max_new_tokens 9 --device cpu")
    works(sample, "score llama --text a.txt --windows 2 --device cpu --dtype bfloat16")
    assert "exact" in works(bench, "choices llama --files q.jsonl --device cpu --results res")[0]
    assert prepare.load_tokenizer("data/toy").encode(" the<|im_start|>7") == tok.encode(" the<|im_start|>7")
    close(train.load_model("out/r", "last")[0].blocks[1].mixer.qkv_proj.weight,
          lm.blocks[1].mixer.qkv_proj.weight, 1e-4)


def test_published_diffusion_models():
    """LLaDA is Llama under other names; Dream is Qwen2 whose logits are of the next token. Row V is that of
    the mask token."""
    x, logits = torch.randint(298, (2, 20)), {}
    qwen2, dream = (LLAMA | dict(model_type=kind, mask_token_id=298) for kind in ("qwen2", "Dream"))
    for c in (LLAMA, LLADA, qwen2, dream):
        kind = c["model_type"]
        lm, objective = model.from_pretrained(published(kind, c))
        assert objective == ("mdm" if kind in ("llada", "Dream") else "ar")
        assert kind == "llama" or torch.equal(lm.embed.weight[300], lm.embed.weight[298])
        logits[kind] = lm(x, causal=False)
    close(logits["llada"], logits["llama"])
    close(logits["Dream"][:, 1:], logits["qwen2"][:, :-1])
    line = "Dream --prompt 'the [MASK:4]' --device cpu"
    assert typed(sample, line)[0] == 0 and typed(sample, f"{line} --cache --fill_block 2")[0] == 2


# where: other entries there; of weights the shapes; END is the end of the last tensor => what is said
WRONG_ENTRIES = """
weights: {"model.norm.weight": null} => model.norm.weight is missing
weights: {"model.norm.bias": [3]} => model.norm.bias is unknown
weights: {"model.embed_tokens.weight": [299, 32]} => tokens.weight has shape .299, 32., expected .300, 32.
header: {"model.norm.weight": {"data_offsets": [8, 136]}} => norm.weight does not begin where another ends
header: {"model.norm.weight": {"shape": [3, 3]}} => norm.weight has 128 bytes
header: {"model.norm.weight": {"dtype": "F8"}} => damaged: 'F8'
header: {"a": {}} => or damaged: 'data_offsets'
header: {"a": {"dtype": "F32", "shape": [9], "data_offsets": [END, END+36]}} => tensor a is truncated
header: {"a": {"dtype": "F32", "shape": [0], "data_offsets": [END, END]}} => tensor a has 0 bytes
header: {} => has bytes that belong to no tensor
config.json: {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}} => yarn.*default or linear or llama3
config.json: {"rope_scaling": {"type": "llama3", "high_freq_factor": 8}} => high_freq_factor 8.*expected 4
config.json: {"attention_multiplier": 2.0} => attention_multiplier 2.0 is not known
config.json: {"attention_bias": true} => attention_bias True
config.json: {"hidden_act": "gelu"} => hidden_act gelu.*expected silu
config.json: {"quantization_config": {"bits": 4}} => quantization_config
config.json: {"model_type": "mamba"} => model_type mamba is none of
config.json: {"rms_norm_eps": null} => nothing says norm_eps
config.json: {"num_attention_heads": "4"} => n_head
tokenizer.json: {"model": {"type": "Unigram"}} => cannot read .*tokenizer.json: it is no byte-level BPE
tokenizer.json: {"pre_tokenizer": {"type": "Metaspace"}} => it is no byte-level BPE
tokenizer.json: {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": true}} => without a space in front
tokenizer.json: {"normalizer": {"type": "Lowercase"}} => its normalizer
tokenizer.json: {"added_tokens": [{"id": 999, "content": "x"}]} => cannot read .*tokenizer.json
"""


@each("wrong, message", pairs(WRONG_ENTRIES))
def test_published_folder_refused(wrong, message):
    """One line, exit status 2."""
    (where, change), weights = wrong.split(": ", 1), {}

    def edit(header):
        end = [*header.values()][-1]["data_offsets"][1]
        new = change.replace("END+36", str(end + 36)).replace("END", str(end))
        for name, entry in json.loads(new).items():
            header.setdefault(name, {}).update(entry)
        if change == "{}":
            header.popitem()
    if where == "weights":
        weights = {name: shape and torch.ones(shape) for name, shape in json.loads(change).items()}
    folder = published("m", LLAMA, weights, edit if where == "header" else lambda header: None)
    if (file := folder / where).exists():
        write(file, json.loads(file.read_text()) | json.loads(change))
    status, _, error = typed(sample, f"{folder} --device cpu")
    assert status == 2 and re.search(message, error) and error.count("\n") == 1, error


@each("steps", ["Digits", "Split"])
def test_tokenizer_json_equals_tokenizers(steps):
    """The package `tokenizers` on text with everything in it, for GPT-2's split behind single digits, and
    Qwen's with NFC."""
    peer = pytest.importorskip("tokenizers")
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    theirs, pre = peer.Tokenizer(peer.models.BPE()), peer.pre_tokenizers
    first = pre.Digits(individual_digits=True)
    if steps == "Split":
        first = pre.Split(peer.Regex(split), "isolated")
        theirs.normalizer = peer.normalizers.NFC()
    byte = pre.ByteLevel(add_prefix_space=False, use_regex=steps == "Digits")
    theirs.pre_tokenizer = pre.Sequence([first, byte])
    theirs.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], peer.trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"],
        initial_alphabet=peer.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    theirs.save("tokenizer.json")
    write("config.json", dict(vocab_size=900, eos_token_id=[0, 1]))
    ours, rng = prepare.load_tokenizer(Path()), random.Random(0)
    parts = ("a|the | |  |\n|\r\n|\t|7|1984|'s|'LL|é|e\u0301|日本|😀|👩\u200d👧|²|Ⅷ|\xa0|\u3000|-|...|_|\x00|"
             "\U000f0000|٣|ﬁ|def ").split("|")
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randint(1, 20)))
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


# preset or other name, class in transformers => its settings; what is no size stays as published
THEIRS = """
gpt2 GPT2LMHeadModel => n_embd=32 n_head=4 n_layer=2 n_positions=64
llama LlamaForCausalLM => rope_parameters='{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, \
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}'
qwen2 Qwen2ForCausalLM => rope_parameters='{"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}'
qwen3 Qwen3ForCausalLM => head_dim=16 tie_word_embeddings=true
gpt-oss GptOssForCausalLM => head_dim=16 sliding_window=8 num_local_experts=8 num_experts_per_tok=3 \
intermediate_size=24 rope_parameters='{"rope_type": "default", "rope_theta": 150000.0}'
deepseek-v3 DeepseekV3ForCausalLM => MLA q_lora_rank=24 n_routed_experts=16 num_experts_per_tok=3
no-rank DeepseekV3ForCausalLM => MLA q_lora_rank=none n_routed_experts=16 num_experts_per_tok=3 \
first_k_dense_replace=1
qwen3-next Qwen3NextForCausalLM => head_dim=16 linear_num_key_heads=2 linear_num_value_heads=4 \
linear_key_head_dim=8 linear_value_head_dim=12 num_experts=8 num_experts_per_tok=3 moe_intermediate_size=24 \
shared_expert_intermediate_size=40
kimi-linear KimiLinearForCausalLM => MLA linear_head_dim=8 linear_num_heads=4 num_experts=8 \
num_experts_per_token=3 model_max_length=64 \
layer_types='["linear_attention", "linear_attention", "linear_attention", "full_attention"]'
""".replace("MLA", "num_key_value_heads=4 kv_lora_rank=16 qk_nope_head_dim=8 qk_rope_head_dim=4 "
            "v_head_dim=12 moe_intermediate_size=24")


def as_published(text):
    """Settings, among which what begins with a bracket is JSON."""
    return {key: json.loads(value) if str(value)[0] in "[{" else value
            for key, value in model.settings(text).items()}


def fill(module, mean=lambda name: 0.0):
    """Random weights, vectors around their mean."""
    for name, p in module.state_dict().items():
        vector = p.ndim == 1 or "A_log" in name
        p.copy_(torch.randn(p.shape) * (0.3 if vector else max(p.size(-1), 4) ** -0.5) + mean(name) * vector)


@each("kind, given", pairs(THEIRS))
def test_published_models_equal_transformers(kind, given):
    """What transformers saves, read by us: the same logits, and the preset is the same kind of model."""
    tf = pytest.importorskip("transformers")
    kind, name = kind.split()
    sizes = "" if kind == "gpt2" else """hidden_size=32 num_attention_heads=4 num_hidden_layers=4
        num_key_value_heads=2 intermediate_size=48 max_position_embeddings=64"""
    words = "vocab_size=100 pad_token_id=0 bos_token_id=1 eos_token_id=2"
    theirs = getattr(tf, name)
    config = theirs.config_class(**as_published(f"{sizes} {words} {given}"))
    config._attn_implementation = "eager"                                   # gpt-oss's sink has no other here
    theirs = theirs(config).eval()
    around = lambda name: kind != "qwen3-next" or "linear_attn" in name     # elsewhere it is x (1 + w)
    fill(theirs, lambda name: 1.0 * ("norm" in name and around(name)) - 3.0 * ("A_log" in name))
    theirs.save_pretrained(".", max_shard_size="20KB")
    lm, x = model.from_pretrained(".")[0], torch.randint(100, (2, 60))
    with torch.no_grad():
        close(lm(x), theirs(x, use_cache=False).logits, 1e-4)
    assert not any(isinstance(v, (str, bool)) and k not in ("layers", "tied") and getattr(lm.config, k) != v
                   for k, v in PRESETS.get(kind, {}).items() if k != "mlp" or kind != "gpt2")


HUB = """
qwen3-next => model_type=qwen3_next decoder_sparse_step=1 full_attention_interval=4 head_dim=256 \
hidden_act=silu hidden_size=2048 intermediate_size=5120 linear_conv_kernel_dim=4 linear_key_head_dim=128 \
linear_num_key_heads=16 linear_num_value_heads=32 linear_value_head_dim=128 max_position_embeddings=262144 \
moe_intermediate_size=512 norm_topk_prob=true num_attention_heads=16 num_experts=512 num_experts_per_tok=10 \
num_hidden_layers=48 num_key_value_heads=2 partial_rotary_factor=0.25 rms_norm_eps=1e-6 rope_scaling=none \
rope_theta=10000000 shared_expert_intermediate_size=512 vocab_size=151936 mlp_only_layers='[]'
kimi-linear => model_type=kimi_linear first_k_dense_replace=1 head_dim=72 hidden_size=2304 \
intermediate_size=9216 kv_lora_rank=512 mla_use_nope=true model_max_length=1048576 \
moe_intermediate_size=1024 moe_layer_freq=1 moe_renormalize=true moe_router_activation_func=sigmoid \
num_attention_heads=32 num_expert_group=1 num_experts=256 num_experts_per_token=8 num_hidden_layers=27 \
num_shared_experts=1 qk_nope_head_dim=128 qk_rope_head_dim=64 rms_norm_eps=1e-5 rope_theta=10000.0 \
routed_scaling_factor=2.446 topk_group=1 use_grouped_topk=true v_head_dim=128 vocab_size=163840 \
linear_attn_config='{"full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, \
11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26], "head_dim": 128, "num_heads": 32, \
"short_conv_kernel_size": 4}'
"""


@each("preset, published", pairs(HUB))
def test_config_json_is_the_preset(preset, published):
    config = model.read_config(as_published(published))
    values = dict(PRESETS[preset], block_size=None)
    same = lambda c: [(name, override(ModelConfig(), given))
                      for name, given in parse_layers(c.layers, c.n_layer)]
    assert same(config) == same(from_preset(preset))
    assert not [k for k, v in values.items() if k not in ("layers", "block_size", "position")
                and getattr(config, k) != v]
    assert config.position == (values.get("position", "rotary") or "none")


@each("flags",
                         ["--preset gpt2 --n_layer 2 --n_embd 32 --n_head 2",
                          "--set qk_norm=true n_kv_head=2 head_dim=8 tied=false", "--set norm_eps=1e-5"])
def test_export_is_read_by_transformers_and_us(dataset, flags):
    """The same logits, and the tokenizer beside them."""
    pytest.importorskip("safetensors")
    run = f"--dataset {dataset} --out run --max_steps 2 --eval_windows 8 --batch_tokens 64"
    sizes = "--block_size 32 --n_embd 32 --n_layer 2 --device cpu"
    works(train, f"{run} {sizes} {flags}")
    assert [typed(sample, "run --export out --gif a.gif --device cpu")[0] for _ in "ab"] == [0, 2]
    lm, x = train.load_model("run")[0], torch.randint(257, (2, 32))
    x[:, 0] = lm.mask_id
    back, state = train.load_model("out")
    assert back.V == lm.V and torch.equal(back(x), lm(x)) and state["flags"]["objective"] == "ar"
    published("llama", LLAMA)
    for line in "run/ckpt_last.pt --export a", "out --dtype bfloat16 --export b", "llama --export c":
        works(sample, line)
        works(sample, f"{line[-1]} --prompt a --max_new_tokens 3")
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained("out")
    close(theirs(x).logits[..., :257], lm(x), 1e-5)


@each("objective", ["ar", "mdm"])
def test_harness_says_what_choices_says(runs, objective):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    ask = lambda kind, *args: [Instance(kind, {}, args, 0, metadata=("task", 3, 1))]
    run = runs / objective
    peer = sample.harness(run, n_mc=8)
    tok = prepare.load_tokenizer(run)
    lm, state = train.load_model(run)
    item = bench.item_of(tok.encode("the cat"), [tok.encode(" sat on")], 0, tok)
    expected = bench.judge_item(lm, state["flags"], item, bench.MEASURES[objective][0], 8, 3)
    (nats, greedy), = peer.loglikelihood(ask("loglikelihood", "the cat", " sat on"))
    assert -nats == expected["nats"][0] and greedy == expected["greedy"]
    assert peer.loglikelihood_rolling(ask("loglikelihood_rolling", "the cat sat " * 20))[0] < nats
    assert peer.loglikelihood_rolling(ask("loglikelihood_rolling", "")) == [0]
    with refused("longer than the window"):
        peer.loglikelihood(ask("loglikelihood", "the cat", " sat on" * 9))
    for until in (["a"], "a", None):
        text, = peer.generate_until(ask("generate_until", "the cat", {"until": until}))
        assert len(text) <= 8 and not (until and "a" in text)


# ------------------------------------------------------------------------------------------------------------
# Peers, where they are installed:
# pip install transformers einops; pip install --no-deps flash-linear-attention fla-core
# The presets are compared as whole models. Here are the layers that no preset has.

# our layer, its model, config and class in transformers; settings there; settings here; names there -> here.
# (Of dsa fewer heads would have ties at 0.)
PEERS = """
dsa deepseek_v32 DeepseekV32Config DeepseekV32Attention
RANKS index_topk=8 index_head_dim=16 index_n_heads=16 n_routed_experts=8 n_group=2 topk_group=1 \
num_experts_per_tok=2 num_key_value_heads=4
RANKS sel_topk=8 index_head_dim=16 index_n_head=16
a_layernorm=a_norm kv_a_proj_with_mqa=kv_a_proj indexer.wq_b=index_q_proj indexer.wk=index_k_proj \
weights_proj=w_proj indexer.=index_

msa minimax_m3_vl MiniMaxM3VLTextConfig MiniMaxM3VLAttention
num_key_value_heads=2 head_dim=16 index_n_heads=2 index_head_dim=16 index_block_size=4 index_topk_blocks=3 \
index_local_blocks=1 layer_types='["minimax_m3_sparse", "minimax_m3_sparse"]' \
rope_parameters='{"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}'
n_kv_head=2 head_dim=16 rotary_fraction=0.5 rope_base=5e6 qk_norm=true index_head_dim=16 sel_block=4 \
sel_topk=3
indexer.=index_

gated_deltanet olmo_hybrid OlmoHybridConfig OlmoHybridGatedDeltaNet
linear_num_key_heads=4 linear_num_value_heads=4 linear_key_head_dim=16 linear_value_head_dim=24 \
linear_allow_neg_eigval=true
linear_key_dim=16 linear_value_dim=24 neg_eigval=true norm_eps=1e-5
a_proj=decay_proj b_proj=beta_proj g_proj=gate_proj conv1d.=conv_

kda glm5_next Glm5NextTextConfig Glm5NextTextLinearAttention
linear_head_dim=16 linear_num_heads=4 linear_lower_bound=-4.5 num_key_value_heads=4
linear_key_dim=16 g_min=-4.5
forget_gate.= f_a_proj=decay_proj.0 f_b_proj=decay_proj.1 g_a_proj=gate_proj.0 g_b_proj=gate_proj.1 \
b_proj=beta_proj conv1d.=conv_
""".replace("RANKS", "q_lora_rank=24 kv_lora_rank=16 qk_rope_head_dim=8 qk_nope_head_dim=16 v_head_dim=16")


@each("peer", PEERS.strip().split("\n\n"))
def test_layers_equal_transformers(peer):
    """The same random weights, the same outputs and gradients."""
    about, there, here, names = peer.split("\n")
    name, kind, config, layer = about.split()
    module = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}")
    sizes = "vocab_size=64 hidden_size=64 num_hidden_layers=2 rms_norm_eps=1e-6 num_attention_heads=4"
    config = getattr(module, config)(**as_published(f"{sizes} {there}"))
    config._attn_implementation = "eager"
    theirs = getattr(module, layer)(config, 0).eval()
    weights = {}
    fill(theirs)
    for key, p in theirs.state_dict().items():
        for pair in names.split():
            key = key.replace(*pair.split("="))
        if name == "msa" and "norm" in key:
            p = 1 + p                               # theirs is x (1 + w)
        weights[key] = p.squeeze(1) if "conv" in key else p
    if "k_proj.weight" in weights:
        weights["qkv_proj.weight"] = torch.cat([weights.pop(f"{n}_proj.weight") for n in "qkv"])
    ours = ATTENTION[name](tiny(**model.settings(f"n_embd=64 {here}")))
    ours.load_state_dict(weights)
    x = torch.randn(2, 100, 64, requires_grad=True)
    how = {}
    if ours.family == "sparse":
        pos = torch.arange(100).expand(2, -1)
        rotary = getattr(module, layer.replace("Attention", "RotaryEmbedding"))(config)
        how = dict(position_embeddings=rotary(x, pos), position_ids=pos,
                   attention_mask=torch.full((2, 1, 100, 100), -math.inf).triu(1))

    def run(x):
        y = theirs(x, **how)
        return y[0] if isinstance(y, tuple) else y
    same_gradients(ours, run, [x], 1e-5)


def fla_naive(name):
    """fla's plain-torch reference of one operator: a file that loads without Triton, unlike its package."""
    fla = pytest.importorskip("fla")
    pytest.importorskip("einops")
    path = Path(fla.__file__).parent / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location("naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rules_equal_fla():
    q, k, v, beta, g, _ = rule_inputs(128, "head", beta=1.0, H=3)
    channel = rule_inputs(128, "channel", H=3)[4]
    fixed = torch.log1p(-2.0 ** (-5 - torch.arange(3.0))).view(1, 3, 1).expand(2, 3, 128)
    erase, write = torch.rand_like(k), torch.rand_like(v)

    def fla(name, *x):
        f = getattr(fla_naive(name), f"naive_recurrent_{name}")
        o, S = f(*(a.transpose(1, 2) for a in x), output_final_state=True)      # their order is (B, T, H, .)
        return o.transpose(1, 2), S
    for ours, theirs in pairs("""
delta_rule(q, k, v, beta) => fla_naive("delta_rule").delta_rule_recurrence(q, k, v, beta)
delta_rule(q, k, v, beta, g)                        => fla("gated_delta_rule", q, k, v, beta, g)
delta_rule(q, k, v, beta, channel, g_min=-5.0)      => fla("kda", q, k, v, channel, beta)
delta_rule(q, k, v, erase, channel, write=write)    => fla("gdn2", q, k, v, channel, erase, write)
linear_attention(q, k, v)                           => fla("linear_attn", q, k, v)
linear_attention(q, k, v, g)                        => fla("simple_gla", q, k, v, g)
linear_attention(q, k, v, channel)                  => fla("gla", q, k, v, channel)
linear_attention(q, k, v, fixed)[0]                 => fla_naive("retention").naive_retention(q, k, v)
"""):
        close(eval(ours), eval(theirs))


# ------------------------------------------------------------------------------------------------------------
# On a GPU: python -m pytest test_all.py -m gpu

def on_cuda(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(1, *shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


@on_gpu
@each("dtype, tol", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@each("block", (64, 128))
def test_flex_on_cuda(block, dtype, tol):
    """Against the dense mask; sel made by a scatter in the same compiled graph, the CPU's silent bug."""
    inputs = on_cuda((8, 1000, 64), (2, 1000, 64), (2, 1000, 64), dtype=dtype)
    n = -(-1000 // block)
    slots = torch.arange(1000, device="cuda")[None]
    scores = torch.randn(1, 2, 1000, n, device="cuda")

    def run(q, k, v, path="flex"):
        sel = select_blocks(lambda r, end: scores[:, :, r], slots, slots + 1, n, block, 4)
        return block_sparse_attention(q, k, v, sel, block, path=path)
    for f in (run, torch.compile(run, dynamic=False)):
        same_gradients(f, partial(run, path="dense"), inputs, tol)


@on_gpu
def test_windows_on_cuda():
    """The flex path of a sliding window, forward and backward, against the mask."""
    inputs = on_cuda((4, 1100, 64), (2, 1100, 64), (2, 1100, 64))
    t = torch.arange(1100, device="cuda")
    for causal, window in product((True, False), (100, 200)):
        flex = partial(softmax_attention, causal=causal, window=window)
        masked = partial(softmax_attention, mask=visible(t, t, causal, window))
        same_gradients(flex, masked, inputs, 2e-3)


def gpu_layer(name, window):
    """Wide enough for the flex paths."""
    block = None if name == "dsa" else 16
    return make_layer(f"{name} on a GPU", n_embd=64, sel_block=block, sel_topk=4, sel_init=1, sel_local=1,
                      dense_len=0, window=window)


@on_gpu
@each("name", ATTENTION)
def test_layers_on_cuda_equal_the_cpu(name):
    """The same layer on both, float32. 1,100 tokens take the flex paths."""
    layer, x = gpu_layer(name, None), torch.randn(2, 1100, 64)
    expected = [layer(x, causal=causal) for causal in (True, False)]
    layer, x = layer.cuda(), x.cuda()
    for causal, y in zip((True, False), expected):
        close(layer(x, causal=causal).cpu(), y, 1e-3)
    with torch.no_grad():
        y = decode(layer, x, [1090, 1, 1, 8], layer.init_cache(2, 1100, "cuda"))
    close(y.cpu(), expected[0], 1e-3)


@on_gpu
@each("name, window", [("nsa", 100), ("msa", None)])
def test_compiled_layers_on_cuda(name, window):
    """In one graph, with gradients and without, where 700 tokens take the flex paths."""
    layer, (x,) = gpu_layer(name, window).cuda(), on_cuda((700, 64))
    compiled = torch.compile(layer, dynamic=False, fullgraph=True)
    same_gradients(compiled, layer, [x], 2e-3)
    with torch.no_grad():
        close(compiled(x), layer(x), 1e-3)


@on_gpu
def test_grouped_experts_on_cuda():
    """bf16, its own kernel, an expert without tokens, against every expert for every token."""
    moe = make_moe(n_expert=16, n_expert_active=4, expert_inner=32, router_bias_step=0.0).cuda().bfloat16()
    moe.bias[3] = -10
    moe.bias[5] = 10
    x, = on_cuda((200, 32), dtype=torch.bfloat16)

    def run(path):
        def f(x):
            weights, experts, _ = moe.route(x[0])
            return path(x[0], moe.expert_up, moe.expert_down, weights, experts)
        return f
    same_gradients(run(moe.grouped), run(moe.every), [x], 3e-2)
    same_gradients(torch.compile(moe, dynamic=False, fullgraph=True), moe, [x], 3e-2)


@on_gpu
@each("preset, objective, settings", [
    ("gpt2", "ar", {}), ("gpt2", "mdm", {}), ("qwen3-next", "ar", dict(set=["n_expert=16"]))])
def test_compiled_training_on_cuda(preset, objective, settings, go):
    """bf16: the compiled run's losses are the eager one's, and its speed is below the GPU's peak."""
    lines, losses = [], []
    for compiled in ("off", "on"):
        torch._dynamo.reset()
        run = go(compiled, lines.append, preset=preset, objective=objective,
                 compile=compiled, device="cuda", n_layer=4, n_embd=64, block_size=64, batch_tokens=256,
                 **settings)
        losses.append([line["loss"] for line in run["evals"]])
    np.testing.assert_allclose(*losses, rtol=0.006)
    assert all(0 <= float(m) < 100 for m in re.findall(r"mfu ([\d.]+)%", "\n".join(map(str, lines))))
