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


@pytest.mark.parametrize("kind", [dict(objective="ar"), dict(objective="mdm", optimizer="muon"), dict(objective="mixed")], ids=str)
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


@pytest.mark.parametrize("kind", [dict(objective="ar", input_mask=0.1, token_noise=0.05), dict(objective="mdm"), dict(objective="mixed", ar_frac=0.25)], ids=str)
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
        calls.append(f.training)
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
    for objective in ("ar", "mdm", "mixed"):
        go(dataset, folder / objective, objective=objective)
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
    for objective, measures in (("ar", 1), ("mdm", 3), ("mixed", 4)):
        status, out = say("score", runs / objective, "--text", tmp_path / "text", "--n_mc", 8, "--windows", 2)
        assert status == 0 and out.count("nats/token") == measures


def test_sample_refuses(runs, capsys):
    for argv, message in (([runs / "ar", "--prompt", "a [MASK:2]"], "diffusion"), ([runs / "mdm", "--prompt", "a" * 30], "window"),
                          ([runs / "none"], "no checkpoint"), ([runs / "mdm", "--steps", "0"], "steps"), ([runs / "mdm", "--order", "best"], "order")):
        assert sample.main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1

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
