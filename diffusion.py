"""Autoregressive, masked-diffusion and block-diffusion language modelling: losses, likelihoods, samplers.

A model is any callable  f(idx (B, T) int64, causal=..., **keywords) -> logits (B, T, V).  Its vocabulary has V tokens, and
id V is one more row of the embedding: the mask token of the diffusion model and the BOS of the autoregressive one. Logits
have no column for it, so it is never predicted. Nothing here knows what is inside f, and this file can be copied alone.

    losses        ar_loss (exact), mdm_loss (a bound), block_diffusion_loss (a bound), mixed_loss
    likelihoods   mdm_nll (the bound with its standard error), chain_nll (exact, T passes)
    samplers      sample_ar, sample_mdm, sample_block: each fills the places of a canvas that hold the mask token

All losses are natural logs per token over the same T tokens of the same windows, so AR and diffusion can be compared.
"""
import math

import torch
import torch.nn.functional as F

ORDERS = ("max_prob", "margin", "entropy", "random", "left", "confidence_sampled")


# ----------------------------------------------------------------------------------------------------------------------
# Losses. `reduction` is "mean" (nats per token), "sum" (nats) or "none" ((B, T); its mean over all tokens is the loss).
# To accumulate micro-batches or ranks exactly: sum the "sum"s and divide by all tokens of the whole batch. A mean of means
# is only right when all parts have the same size.

def token_nll(logits, targets):
    """-log p(target) for logits (B, T, V) and targets (B, T): (B, T) nats, float32 also where the logits are bf16."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def reduce_loss(nats, reduction):
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda a: a}[reduction](nats)


def shift_right(x, bos_id):
    """The input of an AR model: position i holds x[i-1], position 0 holds BOS, so that all T tokens are predicted."""
    return torch.cat([torch.full_like(x[:, :1], bos_id), x[:, :-1]], dim=1)


def ar_loss(f, x, bos_id, inputs=None, reduction="mean"):
    """Exact -log p(x) of an autoregressive model, nats per token, the first token (after BOS) included. x (B, T) int64.

    inputs (B, T): a corrupted copy of x (see `corrupt`) that is read in its place; the targets stay clean.
    """
    return reduce_loss(token_nll(f(shift_right(x if inputs is None else inputs, bos_id), causal=True), x), reduction)


def corrupt(x, mask_id, input_mask=0.0, token_noise=0.0, generator=None):
    """Regularisation of AR inputs (Ni et al. 2511.03276; 2606.16246): each token becomes the mask token with probability
    `input_mask`, or a uniformly random one with probability `token_noise`. x (B, T), on any device -> a corrupted copy.
    Call it on the whole global batch with a CPU generator seeded by (seed, step): ranks and micro-batches then agree."""
    u = torch.rand(x.shape, generator=generator).to(x.device)
    random = torch.randint(mask_id, x.shape, generator=generator).to(x.device)
    return torch.where(u < input_mask, mask_id, torch.where(u < input_mask + token_noise, random, x))


def mdm_noise(B, T, form="exact", generator=None):
    """The randomness of `mdm_loss`: (n or t of each row (B,), uniforms (B, T)), on the CPU.

    The B rows take one stratum of [0, 1) each, in random order: every row alone is still uniform, so the loss stays
    unbiased, and a batch never has all its rows nearly empty or full (the low-discrepancy t of MDLM, 2406.07524).
    Draw once for the whole global batch, from a generator seeded by (seed, step), then slice rows for ranks and
    micro-batches: the loss does not depend on how the batch is cut.
    """
    u = (torch.randperm(B, generator=generator) + torch.rand(B, generator=generator, dtype=torch.float64)) / B
    if form == "exact":
        row = (1 + (u * T).long()).clamp(max=T)                     # the clamp: u rounds to 1.0 once in 2^53
    else:
        row = (1 - u).float()                                       # t in (0, 1]: never a division by 0
    return row, torch.rand(B, T, generator=generator)


def smallest(uniforms, n):
    """(B, T) bool: exactly n[b] True in row b, at its smallest uniforms (ties to the left), i.e. a uniform n-subset."""
    return uniforms.argsort(dim=1, stable=True).argsort(dim=1) < n[:, None]


def mdm_mask(form, noise):
    """noise -> (masked (B, T) bool, weight (B,)): the loss in nats per row is weight * sum of CE over masked tokens."""
    row, uniforms = noise
    T = uniforms.size(1)
    if form == "exact":
        masked, weight = smallest(uniforms, row), T / row
    elif form == "realised":
        masked = uniforms < row[:, None]
        # The realised n is uniform on 0..T. A row with n = 0 needs a fresh n ~ U{1..T}: given that all T uniforms exceed t,
        # t has density ~ (1-t)^T, so 1 - (1-t)^(T+1) is again uniform, and ranks of the uniforms know nothing of t.
        fresh = -torch.expm1((T + 1) * torch.log1p(-row))
        redrawn = smallest(uniforms, 1 + (fresh * T).long().clamp(max=T - 1))
        masked = torch.where(masked.any(1, keepdim=True), masked, redrawn)
        weight = T / masked.sum(1)
    elif form == "bernoulli":
        masked, weight = uniforms < row[:, None], 1 / row
    else:
        raise ValueError(f"form is {form!r}: expected 'exact', 'realised' or 'bernoulli'")
    return masked, weight


def mdm_loss(f, x, mask_id, form="exact", noise=None, generator=None, noise_block=None, reduction="mean"):
    """Masked diffusion: an upper bound on -log p(x), nats per token, unbiased over `noise`. x (B, T) int64 without mask_id.

    The bound is the mean over all T! orders of the chain rule, E_n E_{mask of size n} [mean CE over the n masked tokens]
    with n ~ U{1..T} (Ou et al. 2406.03736; LLaDA 2502.09992, eq. 14). Three estimates of it:
        exact      n ~ U{1..T}, exactly n tokens masked, weight T/n: the one to train with
        realised   t ~ U(0,1), every token masked with probability t, weight T/n with the n that came out (MegaDLMs);
                   a row with n = 0 is redrawn as `exact`, which makes n exactly uniform on 1..T
        bernoulli  the same masks with weight 1/t (MDLM, LLaDA): for comparison only. Its second moment contains
                   the integral of t / t^2 dt: the variance is infinite. Clipping the weight would make it no bound.
    One mean over all masked tokens of a batch, though common, weights by t: it is not a likelihood.

    noise: from `mdm_noise`, this batch's rows, on x's device; with it the loss is a pure function and compiles to one
    graph of static shapes (cross entropy runs on all T tokens: selecting the masked ones would make shapes dynamic).
    noise_block: see `block_diffusion_loss`.
    """
    B, T = x.shape
    S = T if noise_block is None else noise_block
    if T % S:
        raise ValueError(f"noise_block {S} does not divide the {T} tokens of a window: use a divisor of {T}")
    if noise is None:
        noise = [a.to(x.device) for a in mdm_noise(B * T // S, S, form, generator)]
    masked, weight = mdm_mask(form, noise)
    nats = masked_nll(f, x, mask_id, masked.view(B, T), noise_block) * (masked * weight[:, None]).view(B, T)
    return reduce_loss(nats, reduction)


def masked_nll(f, x, mask_id, masked, noise_block=None, **keywords):
    """(B, T) nats of every token of x, predicted from x with `masked` (B, T) hidden; only masked places mean something.
    A place that holds mask_id itself is hidden from all, and its own value means nothing."""
    noisy, target = torch.where(masked, mask_id, x), x.clamp(max=mask_id - 1)
    if noise_block is None:
        return token_nll(f(noisy, causal=False, **keywords), target)
    T = x.size(1)
    logits = f(torch.cat([noisy, x], dim=1), causal=False, mask=two_stream_mask(T, noise_block, x.device),
               pos=torch.arange(T, device=x.device).repeat(2), **keywords)
    return token_nll(logits[:, :T], target)                         # the second half only serves as keys


def two_stream_mask(T, noise_block, device=None):
    """(2T, 2T) bool, True = visible, for the input [noisy; clean] of BD3-LM (Arriola et al. 2503.09573, section 3.2):
    a noisy block sees itself and the clean blocks before it; a clean block sees clean blocks up to itself."""
    block = torch.arange(T, device=device).div(noise_block, rounding_mode="floor").repeat(2)
    clean = torch.arange(2 * T, device=device) >= T
    q, k = block[:, None], block[None, :]
    return torch.where(clean[None, :], k < q + clean[:, None].long(), (k == q) & ~clean[:, None])


def block_diffusion_loss(f, x, mask_id, noise_block, form="exact", noise=None, generator=None, reduction="mean"):
    """Block diffusion (BD3-LM, 2503.09573): AR over blocks, masked diffusion inside each; a bound, nats per token.

    Every block has its own n (or t), stratified over all blocks of the batch: noise is mdm_noise(B*T//noise_block,
    noise_block, form), blocks of a row side by side. All blocks are trained in one pass over 2T tokens, so f must take
    the keywords `mask` (2T, 2T) and `pos` (2T,): layers `full` and `mla`. noise_block 1 is the exact left-to-right chain
    (no variance over masks), noise_block T is mdm_loss. ValueError where noise_block does not divide T."""
    return mdm_loss(f, x, mask_id, form, noise, generator, noise_block, reduction)


def mixed_loss(f, x, bos_id, mask_id, ar_frac, form="exact", noise=None, generator=None, inputs=None, reduction="mean"):
    """One network, both objectives (2512.14549): the first round(ar_frac * B) rows AR, the others masked diffusion.

    Returns (loss, ar, mdm): the loss to minimise over all B*T tokens, and each part over its own tokens, detached, in
    nats per token (with reduction "sum" all three are sums). noise and inputs are those of all B rows."""
    B, T = x.shape
    n = round(ar_frac * B)
    if not 0 < n < B:
        raise ValueError(f"ar_frac {ar_frac} of {B} rows gives {n} AR rows: one row at least must go to each objective;"
                         " use a larger batch, or objective ar or mdm")
    noise = noise and [a[n:] for a in noise]
    ar = ar_loss(f, x[:n], bos_id, None if inputs is None else inputs[:n], "sum")
    mdm = mdm_loss(f, x[n:], mask_id, form, noise, generator, reduction="sum")
    if reduction == "sum":
        return ar + mdm, ar.detach(), mdm.detach()
    return (ar + mdm) / (B * T), ar.detach() / (n * T), mdm.detach() / ((B - n) * T)


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods: no gradient; put the model into eval mode first.

@torch.no_grad()
def mdm_nll(f, x, mask_id, n_mc, generator=None, replicates=4, batch_size=32, noise_block=None, scored=None,
            per_row=False, group=None, **keywords):
    """The diffusion bound of the windows x (W, T): (nats per token, its standard error over masks), two floats.

    n_mc masks per window, in `replicates` R >= 4 independent replicates of n_mc/R masks per window each. Within one the
    numbers of masked tokens form a lattice over [0, 1) with a random shift: a window's own masks are evenly spread,
    windows interleave at random, and all W * n_mc/R values together are equidistributed. So 4 masks per window
    on 256 windows are as even as 256 on one. Replicates are independent and each is unbiased for the same W windows,
    hence s.e. = std over replicates / sqrt(R): the error due to masks, not that due to the choice of windows (use the
    same windows and seed for all models: both then mostly cancel). All masks are drawn before the first pass, from
    `generator` (CPU; None: seed 0): the result does not depend on batch_size.

    scored (W, T) bool: only these tokens are ever masked and scored, the others are context; default all. Places that are
    not scored may hold mask_id: they stay hidden.
    group (W,) int64: windows of one number, 0, 1, ..., share their masks as far as they are scored at the same places: the
    uniforms of each place, and the fraction that is masked. Then the difference of two endings of one context has little
    variance, and equal endings have equal values. Default: every window has its own.
    noise_block: the bound of a block-diffusion model. per_row=True: two (W,) float64 tensors instead.
    keywords: (W, T) tensors passed on to f, e.g. valid.
    """
    W, T = x.shape
    S, m = T if noise_block is None else noise_block, n_mc // replicates
    if T % S:
        raise ValueError(f"noise_block {S} does not divide the {T} tokens of a window: use a divisor of {T}")
    if replicates < 4 or m * replicates != n_mc or n_mc < 1:
        raise ValueError(f"n_mc {n_mc} must be a multiple of the {replicates} replicates, and those at least 4")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    N = W * T // S                                                  # blocks; an ordinary window is one block
    group = torch.arange(W) if group is None else group
    source = (group[:, None] * (T // S) + torch.arange(T // S)).flatten()           # (N,) whose masks a block takes
    G = int(source.max()) + 1
    can = torch.ones(N, S, dtype=torch.bool) if scored is None else scored.cpu().reshape(N, S)
    size = can.sum(1).repeat(m)                                     # (m*N,) tokens that can be masked
    rows = torch.zeros(replicates, W, dtype=torch.float64)          # nats of each window
    for r in range(replicates):
        shift = torch.rand(1, generator=generator, dtype=torch.float64)
        lattice = (torch.randperm(G, generator=generator) + G * torch.arange(m)[:, None]).double() / (G * m)     # (m, G)
        n = 1 + (((lattice[:, source].flatten() + shift) % 1) * size).long()
        n = torch.minimum(n, size)                                  # also: n = 0 where nothing can be masked
        uniforms = torch.rand(m, G, S, generator=generator)[:, source].flatten(0, 1)
        uniforms = uniforms.masked_fill(~can.repeat(m, 1), 2.0)
        masked = smallest(uniforms, n)
        weight = (masked * (size / n.clamp(min=1))[:, None]).view(m * W, T)
        masked, window = masked.view(m * W, T), torch.arange(W).repeat(m)
        for i in range(0, m * W, batch_size):
            w = window[i:i + batch_size]
            nats = masked_nll(f, x[w.to(x.device)].long(), mask_id, masked[i:i + batch_size].to(x.device), noise_block,
                              **{k: v[w.to(v.device)] for k, v in keywords.items()})
            rows[r].index_add_(0, w, (nats.double().cpu() * weight[i:i + batch_size]).sum(1) / m)
    tokens = can.view(W, T).sum(1)
    values = rows / tokens if per_row else rows.sum(1) / tokens.sum()
    nll, se = values.mean(0), values.std(0) / math.sqrt(replicates)
    return (nll, se) if per_row else (nll.item(), se.item())


@torch.no_grad()
def chain_nll(f, x, mask_id, order="left", scored=None, **keywords):
    """Exact -log p(x) under the diffusion model used as a chain: one token revealed per pass, T passes over the batch.

    order "left": left to right. "confidence": always the masked place with the highest max probability, i.e. the
    distribution of a greedy-confidence sampler (DUEL, 2603.01367). The order depends on revealed tokens only, never on
    the token that is about to be scored, so p sums to 1 over all sequences. Returns (B,) float64 nats per scored token.
    scored (B, T) bool: the tokens to reveal and score, the others are context from the start (mask_id there stays hidden);
    default all.
    """
    if order not in ("left", "confidence"):
        raise ValueError(f"order is {order!r}: expected 'left' or 'confidence'")
    live = torch.ones_like(x, dtype=torch.bool) if scored is None else scored.clone()
    tokens, b = live.sum(1), torch.arange(len(x), device=x.device)
    nats = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(int(tokens.max())):
        logits = f(torch.where(live, mask_id, x), causal=False, **keywords)
        score = -torch.arange(x.size(1), device=x.device).float() if order == "left" else confidence(logits, "max_prob")
        i = score.expand(x.shape).masked_fill(~live, -torch.inf).argmax(1)          # ties to the left
        target = x[b, i].clamp(max=mask_id - 1)                     # of a row that is done: any, mask_id too
        nll = token_nll(logits[b, i][:, None], target[:, None])[:, 0].double()
        nats += torch.where(live.any(1), nll, 0)
        live[b, i] = False
    return nats / tokens


# ----------------------------------------------------------------------------------------------------------------------
# Samplers. A canvas (B, T) holds given tokens and mask_id at the places to fill: prompts, infilling and free generation
# are the same thing. Given tokens never change. A generator lives on x's device (on the CPU for mps).

def canvas(prompts, max_new_tokens, mask_id):
    """Lists of token ids, of any lengths -> (x (B, T), valid (B, T) bool): each prompt, then max_new_tokens places to fill,
    then padding (valid False) up to the longest row. A prompt may itself contain mask_id: places to infill."""
    length = torch.tensor([len(p) + max_new_tokens for p in prompts])
    valid = torch.arange(int(length.max())) < length[:, None]
    x = torch.full(valid.shape, mask_id)
    for row, p in zip(x, prompts):
        row[:len(p)] = torch.tensor(p, dtype=torch.long)
    return x.masked_fill(~valid, 0), valid                          # padding is any real token: it is never read


def draw(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """One token from each row of logits (M, V) -> (M,). temperature 0 is argmax. top_k, then top_p, act after temperature.

    By inversion of the cumulative distribution in float64. In float32 the tail is cut: uniforms are multiples of 2^-24, so
    Gumbel noise made of them never exceeds 16.7, rare tokens never come and the temperature is quietly lower (Zheng et
    al. 2409.02908). One uniform a row is also 6 times cheaper than Gumbel noise, which needs V of them."""
    if temperature == 0:
        return logits.argmax(-1)
    device = logits.device
    logits, token = logits.cpu() if device.type == "mps" else logits, None      # MPS has no float64
    if top_k is not None or top_p is not None:
        logits, token = logits.topk(min(top_k or logits.size(1), logits.size(1)))       # sorted
    p = (logits.double() / temperature).softmax(-1)
    if top_p is not None:                                           # the smallest set of tokens that reaches top_p
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    below = p.cumsum(-1)                                            # (M, V)
    u = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.float64) * below[:, -1:]
    choice = torch.searchsorted(below, u, right=True).clamp(max=p.size(1) - 1)  # right: never a token of probability 0
    return (choice if token is None else token.gather(-1, choice))[:, 0].to(device)


def check_sampling(temperature, top_k, top_p):
    if not temperature >= 0:                                        # nan too
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must lie in (0, 1]")


def stop_at_eot(x, given, eot_id):
    """After the first generated EOT of a row, everything that was not given becomes EOT too: nothing is generated there."""
    if eot_id is not None:
        ended = ((x == eot_id) & ~given).cumsum(1) > 0
        x.masked_fill_(ended & ~given, eot_id)


def new_cache(f, x):
    """f's own cache with room for the canvas x, in the dtype that its keys and values will have."""
    if not hasattr(f, "init_cache"):
        raise ValueError("this model has no init_cache: sample with cache=False")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(f.parameters()).dtype
    return f.init_cache(x.size(0), x.size(1), x.device, dtype)


@torch.no_grad()
def sample_ar(f, x, bos_id, temperature=1.0, top_k=None, top_p=None, eot_id=None, valid=None, generator=None,
              callback=None, on_token=None, cache=None):
    """Fill a canvas x (B, T) left to right; places to fill hold bos_id (= the mask token). Returns a new (B, T).

    Rows may have prompts of different lengths (`canvas`): each goes on from the end of its own. cache: use f.init_cache
    (default: when f has it); without it every token costs a pass over its whole prefix. callback(step, x) sees each step.
    on_token(x, given) is called after each, before anything is computed from the new tokens; it may edit x and given
    (B, T) bool in place behind them, as a tool does that writes its result (see `on_block` of `sample_block`).
    """
    check_sampling(temperature, top_k, top_p)
    x, given = x.clone(), x != bos_id
    B, T = x.shape
    b, t = torch.arange(B, device=x.device), torch.arange(T, device=x.device)
    end = torch.full_like(b, T) if valid is None else valid.sum(1)
    at = torch.where(given, T, t).amin(1)                           # (B,) the place that each row fills next
    kv = new_cache(f, x) if (hasattr(f, "init_cache") if cache is None else cache) else None
    even = bool((at == at[0]).all())                                # then the cache needs no positions: fast paths
    first, read = int(at.max()), torch.zeros_like(at)               # read (B,): tokens that the cache holds
    for step in range(1, 1 + int((end - at).max())):
        i, tokens = at.clamp(max=T - 1), shift_right(x, bos_id)
        if kv is None:
            logits = f(tokens[:, :first + step], causal=True)[b, i.clamp(max=first + step - 1)]       # (B, V)
        else:
            pos = read[:, None] + t[:first + 1 if step == 1 else 1]                      # (B, P): the prompts, then P = 1
            ok = (pos <= at[:, None]) & (at < end)[:, None]
            pos = pos.clamp(max=T - 1)
            logits = f(tokens.gather(1, pos), causal=True, cache=kv, **({} if even else {"pos": pos, "valid": ok}))
            logits = logits[b, (at - read).clamp(max=pos.size(1) - 1)]
        write = (at < end) & ~given[b, i]                           # a given token further on is read, not written
        x[b, i] = torch.where(write, draw(logits[:, :bos_id], temperature, top_k, top_p, generator), x[b, i])
        stop_at_eot(x, given, eot_id)
        if on_token is not None:
            on_token(x, given)
        more = ((x == bos_id) & (t < end[:, None])).any(1)
        at = torch.where(more, at + 1, end)
        read = torch.where(more, at, end)
        if callback is not None:
            callback(step, x)
        if eot_id is not None and not bool(more.any()):
            break
    return x


def confidence(logits, order):
    """logits (..., V) -> (...): how sure the prediction is, whatever token is then drawn from it."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    p = logits.softmax(-1)
    if order == "max_prob":
        return p.amax(-1)
    if order == "margin":
        best, at = p.max(-1, keepdim=True)                          # topk(2) takes 10 to 20% longer on a CPU
        return (best - p.scatter_(-1, at, 0).amax(-1, keepdim=True))[..., 0]
    log_total = logits.amax(-1) - p.amax(-1).log()
    mean = p.mul_(logits).sum(-1)                                   # of the logits: -entropy needs no V logarithms
    if mean.isnan().any():                                          # logits of -inf: there 0 * -inf = 0
        mean = p.nan_to_num_(0).sum(-1)
    return mean - log_total


def reveal(x, live, logits, left, order, threshold, how):
    """One step of a diffusion sampler, in place: choose places among `live` (B, T) bool, then draw tokens there only.

    Each row reveals an equal share of its live places over the `left` (B,) steps that remain, at least one; with a
    threshold, those whose confidence reaches it, at least one. logits (B, T, V); how: the keywords of `draw`.

    The choice must not depend on the tokens drawn. "confidence_sampled" (LLaDA, Fast-dLLM: draw everywhere, keep the
    draws that came out probable) rejects an improbable token until a common one comes: its samples do not follow the
    model even with one token a step. It is here for comparison."""
    if order == "left":
        score = -torch.arange(x.size(1), device=x.device).expand(x.shape).float()
    elif order == "random":
        g = how["generator"]
        score = torch.rand(x.shape, generator=g, device=g.device if g else x.device).to(x.device)
    else:
        rows = logits[live]                                         # (M, V): statistics and noise only where needed
        if order == "confidence_sampled":
            tokens = draw(rows, **how)
            values = rows.float().softmax(-1).gather(-1, tokens[:, None])[:, 0]
        else:
            values = confidence(rows, order)
        score = torch.zeros(x.shape, dtype=values.dtype, device=x.device).masked_scatter(live, values)
    score = score.masked_fill(~live, -torch.inf)
    quota = 1 if threshold is not None else (live.sum(1) / left).ceil()[:, None]
    pick = live & (score.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < quota)   # ties to the left
    if threshold is not None:
        pick |= live & (score >= threshold)
    x[pick] = tokens[pick[live]] if order == "confidence_sampled" else draw(logits[pick], **how)


def check_diffusion(order, steps, threshold, fill_block):
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}: expected one of {', '.join(ORDERS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}: it must be at least 1, or None for one token a step")
    if steps is not None and threshold is not None:
        raise ValueError("steps and threshold exclude each other: a threshold decides itself how many steps it takes")
    if fill_block is not None and fill_block < 1:
        raise ValueError(f"fill_block is {fill_block}: it must be at least 1")
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}: it is a probability in (0, 1]")
    if threshold is not None and order not in ("max_prob", "confidence_sampled"):
        raise ValueError(f"a threshold needs order 'max_prob': it is compared with probabilities, not with {order!r}")


@torch.no_grad()
def sample_mdm(f, x, mask_id, steps=None, threshold=None, order="max_prob", fill_block=None, temperature=1.0, top_k=None,
               top_p=None, eot_id=None, valid=None, generator=None, callback=None, cache=False, refresh=None):
    """Fill the places of a canvas x (B, T) that hold mask_id with a masked-diffusion model. Returns a new (B, T).

    steps       passes in all; None: one token a step, which (at temperature 1) draws from the model exactly
    threshold   instead of steps: each pass reveals every place whose max probability reaches it, at least one a row
    order       which places first: max_prob, margin (best minus second), entropy; random, left do not look;
                confidence_sampled: see `reveal`
    fill_block  semi-autoregressive (LLaDA): a row's blocks of so many places, counted from its first hole, are filled
                one after the other, in ceil(steps / its number of blocks) passes each
    eot_id      a generated end of text ends its row: generated places behind it become eot_id
    valid       (B, T) bool, False = padding behind shorter rows (`canvas`)
    callback    callback(step, x) after every step
    cache       Fast-dLLM's dual cache (2505.22618): a pass over the canvas when a block starts (and after every `refresh`
                steps in it, if given) stores all keys and values; the other passes compute the block alone against
                those of prefix and suffix. An approximation: they are as old as the last full pass. f must rewrite the
                slots named by pos: layer `full` without window, `mla`.
    """
    check_sampling(temperature, top_k, top_p)
    check_diffusion(order, steps, threshold, fill_block)
    if cache and fill_block is None:
        raise ValueError("the dual cache works by blocks: give fill_block, for example 32")
    if refresh is not None and refresh < 1:
        raise ValueError(f"refresh is {refresh}: it is a number of steps in a block, at least 1")
    x, hole = x.clone(), x == mask_id if valid is None else (x == mask_id) & valid
    B, T = x.shape
    t, S = torch.arange(T, device=x.device), min(fill_block or T, T)
    extra = {} if valid is None or bool(valid.all()) else {"valid": valid}
    first = torch.where(hole, t, T).amin(1)                         # (B,)
    last = (T if valid is None else valid.sum(1)) - torch.full_like(first, S)       # (B,) the last window of a row
    block = torch.where(hole, (t - first[:, None]).div(S, rounding_mode="floor"), -1)       # (B, T)
    blocks = block.amax(1) + 1                                      # (B,)
    share = torch.full_like(blocks, S) if steps is None else (steps / blocks.clamp(min=1)).ceil()
    how, step = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator), 0
    for k in range(int(blocks.max())):
        window = torch.minimum(first + k * S, last).clamp(min=0)[:, None] + t[:S]   # (B, S) places, the block's among them
        age = 0
        while bool((live := (block == k) & (x == mask_id)).any()):
            left = (share - age).clamp(min=1)
            if cache and age % (refresh or T):
                fill = x.gather(1, window)
                part = {"valid": valid.gather(1, window)} if "valid" in extra else {}
                logits = f(fill, causal=False, cache=kv, commit=False, pos=window, **part)
                reveal(fill, live.gather(1, window), logits[..., :mask_id], left, order, threshold, how)
                x.scatter_(1, window, fill)
            else:
                if cache:
                    extra["cache"] = kv = new_cache(f, x)
                reveal(x, live, f(x, causal=False, **extra)[..., :mask_id], left, order, threshold, how)
            stop_at_eot(x, ~hole, eot_id)
            step, age = step + 1, age + 1
            if callback is not None:
                callback(step, x)
    return x


@torch.no_grad()
def sample_block(f, x, mask_id, fill_block, steps=None, threshold=None, order="max_prob", temperature=1.0, top_k=None,
                 top_p=None, eot_id=None, valid=None, generator=None, callback=None, on_block=None, cache=True):
    """Fill a canvas x (B, T) block by block with a block-diffusion model. Returns a new (B, T).

    Blocks are [0, fill_block), [fill_block, 2 fill_block), ... as in training, for all rows alike: a row whose prompt
    is longer has its tokens of the block given, so rows with prompts of any lengths (`canvas`) go in step. The cache is
    exact: a noisy block reads it with commit=False as often as needed, one pass commits it when it is clean.
    cache=False recomputes the prefix under a block-causal mask (f takes `mask`): slow, for the tests. Every layer with a
    cache can generate (a recurrent one starts each block from the state after the clean prefix), but the training loss
    needs `mask`, which only `full` and `mla` take.

    steps: passes per block; None: one token a step. Other arguments as in `sample_mdm`.
    on_block(x, given, start, stop) is called when x[:, start:stop] is clean and before it is committed, and may edit x and
    given (B, T) bool in place: a tool writes its result behind the call as given tokens and puts mask_id into the rest
    of the block, which is then filled again. The cache holds complete blocks only, so nothing has to be undone.
    """
    check_sampling(temperature, top_k, top_p)
    check_diffusion(order, steps, threshold, fill_block)
    B, T = x.shape
    S, end = fill_block, torch.full((B, 1), T, device=x.device) if valid is None else valid.sum(1, keepdim=True)
    x = F.pad(x, (0, -T % S))                                       # (B, T') whole blocks
    t = torch.arange(x.size(1), device=x.device)
    behind = (t >= end) & (t < end + -end % S)                      # a block that a row ends in is filled whole, then cut
    x = torch.where(behind, mask_id, torch.where(t < end, x, 0))
    given, step = x != mask_id, 0
    kv = new_cache(f, x) if cache else None
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    for start in range(0, x.size(1), S):
        stop = start + S
        part = x[:, start:stop]                                     # a view: filled in place
        while True:
            left = torch.full((B,), S if steps is None else steps, device=x.device)
            while bool((live := part == mask_id).any()):
                if cache:
                    logits = f(part, causal=False, cache=kv, commit=False)
                else:
                    of = t[:stop].div(S, rounding_mode="floor")
                    logits = f(x[:, :stop], causal=False, mask=of[:, None] >= of)[:, start:]
                reveal(part, live, logits[..., :mask_id], left, order, threshold, how)
                stop_at_eot(x, given, eot_id)
                left, step = (left - 1).clamp(min=1), step + 1
                if callback is not None:
                    callback(step, x)
            if on_block is not None:
                on_block(x, given, start, stop)
            if not bool((part == mask_id).any()):
                break
        if not bool((x == mask_id).any()):                          # also when every row has ended
            break
        if cache:
            f(part, causal=False, cache=kv)
    return torch.where(t < end, x, 0)[:, :T]
