"""Autoregressive, masked-diffusion and block-diffusion language modelling: losses, likelihoods, samplers.

A model is any callable  f(idx (B, T) int64, causal=..., **keywords) -> logits (B, T, V).  Its vocabulary has
V tokens, and id V is one more row of the embedding: the mask token of the diffusion model and the BOS of the
autoregressive one. Logits have no column for it, so it is never predicted. Nothing here knows what is inside
f, and this file can be copied alone.

    ar_loss                 exact -log p, left to right
    mdm_loss                masked diffusion: a bound (Ou et al. 2406.03736; LLaDA 2502.09992)
    block_diffusion_loss    AR over blocks, diffusion inside them: a bound (BD3-LM 2503.09573)
    mixed_loss              one network, both objectives (2512.14549)
    mdm_noise, masked_nll   what the losses are made of: which places are hidden, and how they are predicted
    mdm_nll, chain_nll      likelihoods: the bound with its standard error; the exact chain in T passes
    any_order_nll           the exact likelihood of a sampler that fills in random order
    sample_ar, sample_mdm, sample_block     each fills the places of a canvas that hold the mask token

All losses are natural logs per token over the same T tokens of the same windows, so AR and diffusion can be
compared.
"""
import torch
import torch.nn.functional as F

ORDERS = ("max_prob", "margin", "entropy", "random", "left")


def need(ok, message):
    if not ok:
        raise ValueError(message)


# ------------------------------------------------------------------------------------------------------------
# Losses. `reduction` is "mean" (nats per token), "sum" (nats) or "none" ((B, T); its mean over all tokens is
# the loss). To accumulate micro-batches or ranks exactly: sum the "sum"s and divide by all tokens of the
# whole batch. A mean of means is only right when all parts have the same size.

def ar_loss(f, x, bos_id, inputs=None, reduction="mean"):
    """Exact -log p(x) of an autoregressive model, nats per token, the first token (after BOS) included.

    x (B, T) int64. inputs (B, T): a corrupted copy of x (see `corrupt`) that is read in its place; the
    targets stay clean.
    """
    context = shift_right(x if inputs is None else inputs, bos_id)
    logits = predict(f, context, bos_id, causal=True)
    return reduce_loss(token_nll(logits, x), reduction)


def mdm_loss(f, x, mask_id, noise=None, generator=None, noise_block=None, reduction="mean", pos=None,
             inputs=None):
    """Masked diffusion: an upper bound on -log p(x), nats per token, unbiased over `noise`. x (B, T) int64.

    The bound is the mean over all T! orders of the chain rule, E_n E_{mask of size n} [mean CE over the n
    masked tokens] with n ~ U{1..T}, CE the cross entropy. Its estimate: draw n, hide exactly n tokens, weigh
    their CE by T/n (LLaDA, eq. 14). Two others are common. Hiding each token with probability t ~ U(0,1) and
    the weight 1/t (MDLM) is unbiased too, but its second moment contains the integral of t / t^2 dt: the
    variance is infinite, and clipping the weight makes it no bound. One mean over all masked tokens of a
    batch weights by t: it is not a likelihood.

    noise: from `mdm_noise`, the rows of this batch, on x's device; with it the loss is a pure function and
    compiles to one graph of static shapes (cross entropy runs on all T tokens: selecting the masked ones
    would make shapes dynamic). noise_block: see `block_diffusion_loss`. pos (B, T): where the tokens stand in
    the text, if not in this order (see `reading_order`). inputs: as in `ar_loss`; with it no bound.
    """
    B, T = x.shape
    S = noise_length(x, noise_block)
    if noise is None:
        noise = [a.to(x.device) for a in mdm_noise(B * T // S, S, generator)]
    masked, weight = mdm_mask(noise)
    where = {} if pos is None else {"pos": pos}
    nats = masked_nll(f, x, mask_id, masked.view(B, T), noise_block, inputs, **where)
    return reduce_loss(nats * (masked * weight[:, None]).view(B, T), reduction)


def block_diffusion_loss(f, x, mask_id, noise_block, noise=None, generator=None, reduction="mean", pos=None):
    """Block diffusion (BD3-LM, 2503.09573): AR over blocks, masked diffusion inside each;
    a bound, nats per token.

    Every block has its own n, stratified over all blocks of the batch: noise is mdm_noise(B * T //
    noise_block, noise_block), blocks of a row side by side. All blocks are trained in one pass over 2T
    tokens, so f must take the keywords `mask` (2T, 2T) and `pos` (2T,): layers `full` and `mla`. noise_block
    1 is the exact left-to-right chain (no variance over masks), noise_block T is mdm_loss. ValueError where
    noise_block does not divide T.
    """
    return mdm_loss(f, x, mask_id, noise, generator, noise_block, reduction, pos)


def mixed_loss(f, x, bos_id, mask_id, ar_frac, noise=None, generator=None, inputs=None, reduction="mean"):
    """One network, both objectives (2512.14549):
    the first round(ar_frac * B) rows AR, the others masked diffusion.

    Returns (loss, ar, mdm): the loss to minimise over all B*T tokens, and each part over its own tokens,
    detached, in nats per token (with reduction "sum" all three are sums). noise and inputs are those of all B
    rows.
    """
    B, T = x.shape
    n = round(ar_frac * B)
    need(0 < n < B, f"ar_frac {ar_frac} of {B} rows gives {n} AR rows: each objective needs one; use "
         "a larger batch, or objective ar or mdm")
    ar = ar_loss(f, x[:n], bos_id, (x if inputs is None else inputs)[:n], "sum")
    noise = noise and [a[n:] for a in noise]
    mdm = mdm_loss(f, x[n:], mask_id, noise, generator, reduction="sum")
    tokens = (1, 1, 1) if reduction == "sum" else (B * T, n * T, (B - n) * T)
    return tuple(a / size for a, size in zip((ar + mdm, ar.detach(), mdm.detach()), tokens))


def token_nll(logits, targets):
    """-log p(target) for logits (B, T, V) and targets (B, T):
    (B, T) nats, float32 also where the logits are bf16."""
    nats = F.cross_entropy(widen(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view(targets.shape)


def widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def count_to(n, x):
    """0, 1, ..., n - 1 on the device of x."""
    return torch.arange(n, device=x.device)


def reduce_loss(nats, reduction):
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda a: a}[reduction](nats)


def shift_right(x, bos_id):
    """The input of an AR model: position i holds x[i-1], position 0 holds BOS,
    so that all T tokens are predicted."""
    bos = torch.full_like(x[:, :1], bos_id)
    return torch.cat([bos, x[:, :-1]], dim=1)


def predict(f, idx, mask_id, **keywords):
    """f's logits (B, T, V). ValueError where they have a column for the mask token:
    its share would be lost."""
    need(idx.numel() > 0, f"{tuple(idx.shape)} tokens: of no token there is no loss")
    logits = f(idx, **keywords)
    V = logits.size(-1)
    need(V <= mask_id, f"the mask token {mask_id} is one of the {V} tokens that the model predicts: "
         f"take another, or cut the model's logits to [..., :{mask_id}]")
    return logits


def noise_length(x, noise_block):
    """Tokens that share one noise level: noise_block, or all T of a window."""
    T = x.size(1)
    S = T if noise_block is None else noise_block
    need(S > 0 and T % S == 0, f"noise_block {S} does not divide the {T} tokens of a window")
    return S


def corrupt(x, mask_id, input_mask=0.0, token_noise=0.0, generator=None):
    """Regularisation of what is read (Ni et al. 2511.03276; 2606.16246): each token becomes the mask token
    with probability `input_mask`, or a uniformly random one with probability `token_noise`.

    x (B, T), on any device -> a corrupted copy. Call it on the whole global batch with a CPU generator seeded
    by (seed, step): ranks and micro-batches then agree.
    """
    u = torch.rand(x.shape, generator=generator).to(x.device)
    random = torch.randint(mask_id, x.shape, generator=generator).to(x.device)
    noisy = torch.where(u < input_mask + token_noise, random, x)
    return torch.where(u < input_mask, mask_id, noisy)


def reading_order(number, T):
    """(B,) numbers of orders -> (B, T): the places of a window in that order; 0 is left to right, and every
    other number a permutation of its own.

    AR in an order is block diffusion with blocks of 1 on x.gather(1, order) with pos=order: each place is
    predicted from those before it in the order, and knows where it stands (XLNet's two streams, 1906.08237).
    """
    order = {n: torch.randperm(T, generator=torch.Generator().manual_seed(n)) for n in set(number.tolist())}
    order[0] = torch.arange(T)
    return torch.stack([order[n] for n in number.tolist()])


def mdm_noise(B, T, generator=None):
    """The randomness of `mdm_loss`: (n of each row (B,), uniforms (B, T)), on the CPU.

    The B rows take one stratum of 1..T each, in random order: every row alone is still uniform, so the loss
    stays unbiased, and a batch never has all its rows nearly empty or full (the low-discrepancy t of MDLM,
    2406.07524). Draw once for the whole global batch, from a generator seeded by (seed, step), then slice
    rows for ranks and micro-batches: the loss does not depend on how the batch is cut.
    """
    strata = torch.randperm(B, generator=generator)
    u = (strata + torch.rand(B, generator=generator, dtype=torch.float64)) / B
    n = (1 + (u * T).long()).clamp(max=T)                       # the clamp: u rounds to 1.0 once in 2^53
    return n, torch.rand(B, T, generator=generator)


def mdm_mask(noise):
    """noise -> (masked (B, T) bool, weight (B,)):
    weight * sum of CE over masked tokens is the loss in nats per row."""
    n, uniforms = noise
    return smallest(uniforms, n), uniforms.size(1) / n


def smallest(uniforms, n):
    """(B, T) bool: exactly n[b] True in row b, at its smallest uniforms
    (ties to the left): a uniform n-subset."""
    rank = uniforms.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < n[:, None]


def masked_nll(f, x, mask_id, masked, noise_block=None, inputs=None, **keywords):
    """(B, T) nats of every token of x, predicted from x (or `inputs`) with `masked` (B, T) hidden; only
    masked places mean something. A place that holds mask_id itself is hidden from all, and its own value
    means nothing."""
    T = x.size(1)
    clean = x if inputs is None else inputs
    read = torch.where(masked, mask_id, clean)
    if noise_block is not None:                                 # a second half, which only serves as keys
        keywords["mask"] = two_stream_mask(T, noise_block, x.device)
        pos = keywords.get("pos", count_to(T, x))
        keywords["pos"] = torch.cat([pos, pos], dim=-1)
        read = torch.cat([read, clean], dim=1)
    logits = predict(f, read, mask_id, causal=False, **keywords)
    return token_nll(logits[:, :T], x.clamp(max=mask_id - 1))


def two_stream_mask(T, noise_block, device=None):
    """(2T, 2T) bool, True = visible, for the input [noisy; clean] of BD3-LM (Arriola et al. 2503.09573,
    section 3.2): a noisy block sees itself and the clean blocks before it; a clean block sees clean blocks up
    to itself."""
    block = (torch.arange(T, device=device) // noise_block).repeat(2)
    clean = torch.arange(2 * T, device=device) >= T
    q = block[:, None]
    to_clean = block < q + clean[:, None].long()
    to_noisy = (block == q) & ~clean[:, None]
    return torch.where(clean, to_clean, to_noisy)


# ------------------------------------------------------------------------------------------------------------
# Likelihoods: no gradient; put the model into eval mode first.

DRAWN = 2 ** 20                                                 # uniforms in memory at once


@torch.no_grad()
def mdm_nll(f, x, mask_id, n_mc, generator=None, replicates=4, batch_size=32, noise_block=None, scored=None,
            per_row=False, group=None, device=None, **keywords):
    """The diffusion bound of the windows x (W, T):
    (nats per token, its standard error over masks), two floats.

    n_mc masks per window, in `replicates` R >= 4 independent replicates of n_mc/R masks per window each.
    Within one the numbers of masked tokens form a lattice over [0, 1) with a random shift: a window's own
    masks are evenly spread, windows interleave at random, and all W * n_mc/R values together are
    equidistributed. So 4 masks per window on 256 windows are as even as 256 on one. Replicates are
    independent and each is unbiased for the same W windows, hence s.e. = std over replicates / sqrt(R): the
    error due to masks, not that due to the choice of windows (use the same windows and seed for all models:
    both then mostly cancel). The masks come from `generator` (CPU; None: seed 0) in an order that does not
    depend on batch_size.

    x: any integer dtype, on any device, memory-mapped too: windows are copied to `device` (where f is;
    default: x's) batch by batch, and beside x the memory grows by some numbers per window, not per token.
    scored (W, T) bool: only these tokens are ever masked and scored, the others are context; default all.
    Places that are not scored may hold mask_id: they stay hidden.
    group (W,) int64, ascending: windows of one number share their masks as far as they are scored at the same
    places: the uniforms of each place, and the fraction that is masked. Then the difference of two endings of
    one context has little variance, and equal endings have equal values. Default: every window has its own.
    noise_block: the bound of a block-diffusion model. per_row=True: two (W,) float64 tensors instead.
    keywords: (W, T) tensors passed on to f, e.g. valid.
    """
    W, T = x.shape
    S = noise_length(x, noise_block)
    m = n_mc // replicates
    need(replicates >= 4 and n_mc > 0 and n_mc == m * replicates,
         f"n_mc {n_mc} must be a multiple of the {replicates} replicates, and those at least 4")
    generator = generator or torch.Generator().manual_seed(0)
    group = torch.arange(W) if group is None else group.cpu()
    need(bool((group.diff() >= 0).all()), "group must ascend: windows of one number are neighbours")
    N = int(group[-1]) + 1
    per_window = T // S                                         # blocks; an ordinary window is one block
    G = N * per_window
    tokens = torch.zeros(W, dtype=torch.float64)                # that can be masked
    nats = torch.zeros(replicates, W, dtype=torch.float64)
    for r in range(replicates):
        shift = torch.rand(1, generator=generator, dtype=torch.float64)
        lattice = torch.randperm(G, generator=generator) + G * torch.arange(m)[:, None]          # (m, G)
        for start in range(0, N, step := max(1, DRAWN // (m * T))):
            ends = torch.tensor([start, start + step])
            lo, hi = torch.searchsorted(group, ends).tolist()   # windows
            blocks = (group[lo:hi, None] * per_window + torch.arange(per_window)).flatten()      # whose masks
            can = torch.ones(hi - lo, T, dtype=torch.bool) if scored is None else scored[lo:hi].cpu()
            tokens[lo:hi] = can.sum(1)
            can = can.reshape(-1, S)
            size = can.sum(1)                                   # of each block
            share = (lattice[:, blocks].double() / (G * m) + shift) % 1
            n = torch.minimum(1 + (share * size).long(), size)  # (m, blocks); 0 where nothing can be masked
            uniforms = torch.rand(m, min(step, N - start) * per_window, S, generator=generator)
            uniforms = uniforms[:, blocks - start * per_window].masked_fill(~can, 2.0)
            masked = smallest(uniforms.flatten(0, 1), n.flatten()).view(-1, T)
            weight = (size / n.clamp(min=1)).view(-1, per_window).repeat_interleave(S, 1) / m
            window = torch.arange(lo, hi).repeat(m)
            for i in range(0, len(window), batch_size):
                now = slice(i, i + batch_size)
                part = {key: value[window[now].to(value.device)] for key, value in keywords.items()}
                idx = token_ids(x, window[now]).to(device or x.device)
                hidden = masked[now].to(idx.device)
                loss = masked_nll(f, idx, mask_id, hidden, noise_block, **part).double().cpu()
                loss = loss * masked[now] * weight[now]
                nats[r].index_add_(0, window[now], loss.sum(1))
    values = nats / tokens if per_row else nats.sum(1) / tokens.sum()
    mean = values.mean(0)
    error = values.std(0) / replicates ** 0.5
    return (mean, error) if per_row else (mean.item(), error.item())


def token_ids(x, rows):
    """x[rows] as int64. Token files hold uint16:
    torch indexes its bits as int16 only, where large ids look negative."""
    if x.dtype == torch.uint16:
        x = x.view(torch.int16)
    picked = x[rows.to(x.device)].long()
    return picked & 0xFFFF if x.dtype == torch.int16 else picked


@torch.no_grad()
def chain_nll(f, x, mask_id, order="left", scored=None, noise_block=None, **keywords):
    """Exact -log p(x) under the diffusion model used as a chain:
    one token revealed per pass, T passes over the batch.

    order "left": left to right. "confidence": always the masked place with the highest max probability, i.e.
    the distribution of a greedy-confidence sampler (DUEL, 2603.01367). The order depends on revealed tokens
    only, never on the token that is about to be scored, so p sums to 1 over all sequences. Returns (B,)
    float64 nats per scored token. scored (B, T) bool: the tokens to reveal and score, the others are context
    from the start (mask_id there stays hidden); default all. noise_block: of a block-diffusion model, block
    after block, where a token sees its own block and those before it.
    """
    need(order in ("left", "confidence"), f"order is {order!r}: expected 'left' or 'confidence'")
    need(x.numel() > 0, f"{tuple(x.shape)} tokens: of no token there is no likelihood")
    B, T = x.shape
    live = torch.ones_like(x, dtype=torch.bool) if scored is None else scored.clone()
    tokens = live.sum(1)
    row = count_to(B, x)[:, None]
    nats = torch.zeros(B, 1, dtype=torch.float64, device=x.device)
    block = count_to(T, x) // (noise_block or T)
    if noise_block:
        keywords["mask"] = block[:, None] >= block
    for _ in range(int(tokens.max())):
        logits = predict(f, torch.where(live, mask_id, x), mask_id, causal=False, **keywords)
        score = torch.zeros_like(x, dtype=torch.float)
        if order == "confidence":
            score = confidence(logits, "max_prob") - 2 * block
        i = score.masked_fill(~live, -torch.inf).argmax(1, keepdim=True)        # ties to the left
        target = x[row, i].clamp(max=mask_id - 1)               # of a row that is done: any, mask_id too
        nll = token_nll(logits[row, i], target).double()
        nats += torch.where(live.any(1, keepdim=True), nll, 0)
        live[row, i] = False
    return nats[:, 0] / tokens


@torch.no_grad()
def any_order_nll(f, x, mask_id, fill_block=8, noise_block=None):
    """Exact -log p(x) of `sample_mdm(..., order="random", fill_block=S)`: blocks of S tokens from left to
    right, inside a block one token per pass in an order drawn at random. (B,) float64 nats per token.

    p of a block is the mean over all S! orders. They share their steps, so a sum over the 2 ** S sets of
    known places does, in 2 ** S - 1 passes per block. With p(set) the probability that exactly these places
    have been filled so far, and with these tokens,
        p(set) = sum over i in set of p(set - i) * p(x_i | set - i) / (places that were open then)
    The bound of `mdm_nll` is the mean of log p over the orders of a whole window. With S = T this is the log
    of the mean over the same ones, which is never less (Jensen); with S = 1 it is `chain_nll`. An ensemble of
    orders in one network: EoNADE (1310.1757).
    noise_block: of a block-diffusion model, a multiple of S.
    """
    need(1 <= fill_block <= 12, f"fill_block is {fill_block}: 2 ** fill_block passes allow 1 to 12")
    need(x.numel() > 0, f"{tuple(x.shape)} tokens: of no token there is no likelihood")
    B, T = x.shape
    need(not noise_block or noise_block % fill_block == 0,
         f"fill_block {fill_block} does not divide the blocks of {noise_block}")
    block = count_to(T, x) // (noise_block or T)
    keywords = {"mask": block[:, None] >= block} if noise_block else {}
    nats = torch.zeros(B, dtype=torch.float64, device=x.device)
    for start in range(0, T, fill_block):
        here = x[:, start:start + fill_block]                   # (B, S)
        S = here.size(1)
        places = count_to(S, x)
        reached = nats.new_full((2 ** S, B), -torch.inf)        # log p(set); bit i: place start + i is known
        reached[0] = 0
        for known in range(2 ** S - 1):
            hidden = (known >> places) % 2 == 0
            z = x.clone()
            z[:, start:] = mask_id
            z[:, start:start + S] = torch.where(hidden, mask_id, here)
            logits = predict(f, z, mask_id, causal=False, **keywords)[:, start:start + S]
            step = reached[known, :, None] - token_nll(logits, here) - hidden.sum().double().log()   # (B, S)
            for i in hidden.nonzero()[:, 0].tolist():
                bigger = known | 1 << i
                reached[bigger] = torch.logaddexp(reached[bigger], step[:, i])
        nats -= reached[-1]
    return nats / T


# ------------------------------------------------------------------------------------------------------------
# Samplers. A canvas (B, T) holds given tokens and mask_id at the places to fill: prompts, infilling and free
# generation are the same thing. Given tokens never change. A generator lives on x's device (on the CPU for
# mps).

def canvas(prompts, max_new_tokens, mask_id):
    """Lists of token ids, of any lengths -> (x (B, T), valid (B, T) bool): each prompt, then max_new_tokens
    places to fill, then padding (valid False) up to the longest row. A prompt may itself contain mask_id:
    places to infill."""
    length = torch.tensor([len(p) + max_new_tokens for p in prompts])
    valid = torch.arange(int(length.max())) < length[:, None]
    x = torch.full(valid.shape, mask_id)
    for row, p in zip(x, prompts):
        row[:len(p)] = torch.tensor(p, dtype=torch.long)
    return x.masked_fill(~valid, 0), valid                      # padding is any real token: it is never read


@torch.no_grad()
def sample_ar(f, x, bos_id,
              temperature=1.0, top_k=None, top_p=None,
              eot_id=None, valid=None, generator=None,
              callback=None, on_token=None, cache=None, draft=0):
    """Fill a canvas x (B, T) left to right;
    places to fill hold bos_id (= the mask token). Returns a new (B, T).

    Rows may have prompts of different lengths (`canvas`): each goes on from the end of its own. cache: use
    f.init_cache (default: when f has it); without it every token costs a pass over its whole prefix.
    callback(step, x) is called after each step. on_token(x, given) is called after each token, before
    anything is computed from the new ones; it may edit x and given (B, T) bool in place behind them, as a
    tool does that writes its result (see `on_block` of `sample_block`).

    draft: f itself proposes so many tokens, and one pass judges them all (`accept`): the same distribution of
    texts in fewer passes. They come from f as a diffusion model, which sees the places as masks, all at once,
    if it was trained as both; from an LM with mtp, one. With a cache f must rewrite the slots named by pos:
    layer `full` without window, `mla`. callback sees the drafts, too.
    """
    law = sampling_law(temperature, top_k, top_p)
    need(draft == 0 or draft > 0 and on_token is None,
         f"draft is {draft}: it must be a number of tokens, and 0 beside on_token")
    x = x.clone()
    if x.numel() == 0:
        return x
    B, T = x.shape
    given = x != bos_id
    row = count_to(B, x)[:, None]
    place = count_to(T, x)
    end = torch.full_like(x[:, 0], T) if valid is None else valid.sum(1)
    at = torch.where(given, T, place).amin(1)                   # (B,) the place that each row fills next
    longest = int(at.max())                                     # prompt
    even = not draft and int(at.min()) == longest               # then the cache needs no positions
    cached = getattr(f, "has_cache", hasattr(f, "init_cache")) if cache is None else cache
    kv = new_cache(f, x) if cached else None

    def look(x, k, causal=True):
        """Logits (B, k + 1, V) at the places at, at + 1, ... of the context."""
        whole = kv is None or step == 1                         # the prompts; then, with a cache, what is new
        P = min(T, longest + step * (draft + 1) if whole else k + 1)
        start = at.clamp(max=T - P) * (not whole)
        pos = start[:, None] + place[:P]
        how = {} if kv is None else {"cache": kv}
        if kv is not None and not even:
            known = (pos <= at[:, None] + k) & (at < end)[:, None]
            how |= {"pos": pos, "valid": known}
        logits = predict(f, shift_right(x, bos_id).gather(1, pos), bos_id, causal=causal, **how)
        slots = (at - start)[:, None] + place[:k + 1]
        return logits[row, slots.clamp(max=P - 1)]

    def pick(logits):
        """(tokens, the probabilities that they were drawn from)"""
        p = probabilities(logits, **law)
        return choose(p, generator), p

    for step in range(1, 1 + int((end - at).max())):
        ahead = place - at[:, None]                             # (B, T)
        write = (ahead >= 0) & (place < end[:, None]) & ~given  # a given token is read, not written
        put = lambda y, n: torch.where(write & (ahead <= n), y.gather(1, ahead.clamp(0, y.size(1) - 1)), x)
        if not draft or step == 1:                              # the first pass reads the prompts
            y = draw(look(x, 0)[:, 0], **law, generator=generator)[:, None]
            n = torch.zeros_like(y)
        else:
            if hasattr(kv, "last"):
                drafts, q = f.draft(x, at, kv, pick)
            else:                                               # the context is one behind: masks begin at 1
                drafts, q = pick(look(x, draft, causal=False)[:, 1:])
            k = drafts.size(1)
            hoped = put(drafts.to(x.device), k - 1)
            if callback is not None:
                callback(step, hoped)
            p = probabilities(look(hoped, k), **law)
            y, n = (a.to(x.device) for a in accept(p, drafts, q, generator))
        x = put(y, n)
        stop_at_eot(x, given, eot_id)
        if on_token is not None:
            on_token(x, given)
        more = ((x == bos_id) & (place < end[:, None])).any(1)
        at = torch.where(more, at + n[:, 0] + 1, end)
        if callback is not None:
            callback(step, x)
        if (draft or eot_id is not None) and not bool(more.any()):
            break
    return x


@torch.no_grad()
def sample_mdm(f, x, mask_id,
               steps=None, threshold=None, order="max_prob", fill_block=None,
               temperature=1.0, top_k=None, top_p=None,
               eot_id=None, valid=None, generator=None,
               callback=None, cache=False, refresh=None):
    """Fill the places of a canvas x (B, T) that hold mask_id
    with a masked-diffusion model. Returns a new (B, T).

    steps       passes in all; None: one token a step, which (at temperature 1) draws from the model exactly
    threshold   instead of steps: each pass reveals every place whose max probability reaches it, at least one
                per row
    order       which places first: max_prob, margin (best minus second), entropy; random, left do not look
    fill_block  semi-autoregressive (LLaDA): a row's blocks of so many places, counted from its first hole,
                are filled one after the other, in ceil(steps / its number of blocks) passes each
    eot_id      a generated end of text ends its row: generated places behind it become eot_id
    valid       (B, T) bool, False = padding behind shorter rows (`canvas`)
    callback    callback(step, x) after every step
    cache       Fast-dLLM's dual cache (2505.22618): a pass over the canvas when a block starts (and after
                every `refresh` steps in it, if given) stores all keys and values; the others compute the
                block alone against those of prefix and suffix. An approximation: they are as old as the last
                full pass. f must rewrite the slots named by pos: layer `full` without window, `mla`.
    """
    law = sampling_law(temperature, top_k, top_p)
    check_diffusion(order, steps, threshold, fill_block)
    need(not cache or fill_block, "the dual cache works by blocks: give fill_block, for example 32")
    need(refresh is None or refresh >= 1, f"refresh is {refresh}: it must be at least 1 step of a block")
    x = x.clone()
    if x.numel() == 0:
        return x
    B, T = x.shape
    S = min(fill_block or T, T)
    valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
    hole = (x == mask_id) & valid
    padded = not bool(valid.all())
    place = count_to(T, x)
    first = torch.where(hole, place, T).amin(1)                 # (B,) hole
    block = torch.where(hole, (place - first[:, None]) // S, -1)        # (B, T)
    blocks = block.amax(1) + 1                                  # (B,)
    share = ((steps or blocks * S) / blocks).ceil()             # (B,) for one block; without holes unused
    step = 0
    for k in range(int(blocks.max())):
        start = torch.minimum(first + k * S, valid.sum(1) - S).clamp(min=0)
        window = start[:, None] + place[:S]                     # (B, S) its places
        age = 0
        while bool((live := (block == k) & (x == mask_id)).any()):
            left = (share - age).clamp(min=1)
            whole = not cache or age % (refresh or T) == 0
            take = (lambda a: a) if whole else (lambda a: a.gather(1, window))      # what is computed
            how = {"valid": take(valid)} if padded else {}
            if not whole:
                how |= dict(cache=kv, commit=False, pos=window)
            elif cache:
                how["cache"] = kv = new_cache(f, x)
            part = take(x)
            logits = predict(f, part, mask_id, causal=False, **how)
            reveal(part, take(live), logits, left, order, threshold, law, generator)
            if not whole:
                x.scatter_(1, window, part)
            stop_at_eot(x, ~hole, eot_id)
            age += 1
            step += 1
            if callback is not None:
                callback(step, x)
    return x


@torch.no_grad()
def sample_block(f, x, mask_id, fill_block,
                 steps=None, threshold=None, order="max_prob",
                 temperature=1.0, top_k=None, top_p=None,
                 eot_id=None, valid=None, generator=None,
                 callback=None, on_block=None, cache=True):
    """Fill a canvas x (B, T) block by block with a block-diffusion model. Returns a new (B, T).

    Blocks are [0, fill_block), [fill_block, 2 fill_block), ... as in training, for all rows alike: a row
    whose prompt is longer has its tokens of the block given, so rows with prompts of any lengths (`canvas`)
    go in step. The cache is exact: a noisy block reads it with commit=False as often as needed, one pass
    commits it when it is clean. cache=False recomputes the prefix under a block-causal mask (f takes `mask`):
    slow, for the tests. Every layer with a cache can generate (a recurrent one starts each block from the
    state after the clean prefix), but the training loss needs `mask`, which only `full` and `mla` take.

    steps: passes per block; None: one token a step. Other arguments as in `sample_mdm`. on_block(x, given,
    start, stop) is called when x[:, start:stop] is clean and before it is committed, and may edit x and given
    (B, T) bool in place: a tool writes its result behind the call as given tokens and puts mask_id into the
    rest of the block, which is then filled again. The cache holds complete blocks only, so nothing has to be
    undone.
    """
    law = sampling_law(temperature, top_k, top_p)
    check_diffusion(order, steps, threshold, fill_block)
    if x.numel() == 0:
        return x.clone()
    B, T = x.shape
    S = fill_block
    end = x.new_full((B, 1), T) if valid is None else valid.sum(1, keepdim=True)
    x = F.pad(x, (0, -T % S))                                   # (B, T') whole blocks
    place = count_to(x.size(1), x)
    behind = (place >= end) & (place < end + -end % S)          # the block a row ends in is filled whole
    x = torch.where(behind, mask_id, torch.where(place < end, x, 0))
    given = x != mask_id
    kv = new_cache(f, x) if cache else None
    step = 0
    for start in range(0, x.size(1), S):
        stop = start + S
        part = x[:, start:stop]                                 # a view: filled in place
        while True:
            left = steps or S
            while bool((live := part == mask_id).any()):
                if cache:
                    logits = predict(f, part, mask_id, causal=False, cache=kv, commit=False)
                else:
                    of = place[:stop] // S
                    mask = of[:, None] >= of
                    logits = predict(f, x[:, :stop], mask_id, causal=False, mask=mask)
                    logits = logits[:, start:]
                reveal(part, live, logits, left, order, threshold, law, generator)
                stop_at_eot(x, given, eot_id)
                left = max(left - 1, 1)
                step += 1
                if callback is not None:
                    callback(step, x)
            if on_block is not None:
                on_block(x, given, start, stop)
            if not bool((part == mask_id).any()):
                break
        if not bool((x == mask_id).any()):                      # also when every row has ended
            break
        if cache:
            f(part, causal=False, cache=kv)
    return torch.where(place < end, x, 0)[:, :T]


def reveal(x, live, logits, left, order, threshold, law, generator):
    """One step of a diffusion sampler, in place:
    choose places among `live` (B, T) bool, then draw tokens there only.

    Each row reveals an equal share of its live places over the steps that remain, `left` (a number or (B,));
    with a threshold, those whose confidence reaches it; at least one either way. logits (B, T, V); law: from
    `sampling_law`.

    The choice must not depend on the tokens drawn. Drawing everywhere and keeping the draws that came out
    probable (LLaDA, Fast-dLLM) rejects an improbable token until a common one comes: its samples do not
    follow the model even with one token a step.
    """
    if order == "left":
        score = torch.zeros_like(x, dtype=torch.float)          # ties go to the left
    elif order == "random":
        device = generator.device if generator else x.device
        score = torch.rand(x.shape, generator=generator, device=device).to(x.device)
    else:
        values = confidence(logits[live], order)                # (M,): only where needed
        score = values.new_zeros(x.shape).masked_scatter(live, values)
    score = score.masked_fill(~live, -torch.inf)
    share = (live.sum(1) / left).ceil()
    if threshold is None:
        pick = live & smallest(-score, share)
    else:
        pick = live & (smallest(-score, share.clamp(max=1)) | (score >= threshold))
    x[pick] = draw(logits[pick], **law, generator=generator)


def confidence(logits, order):
    """logits (..., V) -> (...): how sure the prediction is, whatever token is then drawn from it."""
    logits = widen(logits)
    p = logits.softmax(-1)
    if order == "max_prob":
        return p.amax(-1)
    if order == "margin":
        best, at = p.max(-1, keepdim=True)                      # topk(2) takes 10 to 20% longer on a CPU
        second = p.scatter_(-1, at, 0).amax(-1, keepdim=True)
        return (best - second)[..., 0]
    log_total = logits.amax(-1) - p.amax(-1).log()
    mean = p.mul_(logits).sum(-1)                               # of the logits: entropy without V logarithms
    if mean.isnan().any():                                      # logits of -inf: there 0 * -inf = 0
        mean = p.nan_to_num_(0).sum(-1)
    return mean - log_total


def accept(p, drafts, q, generator=None):
    """Speculative sampling (2211.17192, 2302.01318): drafts (B, k), drawn from q (B, k, V), where p (B,
    k + 1, V) is right -> tokens (B, k + 1), and how many drafts stand before the last that counts (B, 1).

    A draft is kept with probability min(1, p / q). The first that is not is drawn again from max(0, p - q),
    what p has more than q: so a token comes with min(p, q) + max(0, p - q) = p, whatever q is. Behind the
    last draft one more comes from p itself. A draft for the place of a given token is judged for nothing:
    that decides only how far a step goes.
    """
    of = lambda a: a.gather(-1, drafts[..., None])[..., 0]
    u = torch.rand(drafts.shape, generator=generator, device=p.device, dtype=p.dtype)
    kept = u * of(q) < of(p[:, :-1])
    n = kept.long().cumprod(1).sum(1, keepdim=True)
    more = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)
    last = choose(more, generator).gather(1, n)
    return F.pad(drafts, (0, 1)).scatter(1, n, last), n


def draw(logits, temperature=1.0, generator=None, **law):
    """One token from each row of logits (M, V) -> (M,), with their `probabilities`."""
    if temperature == 0:
        return logits.argmax(-1)
    return choose(probabilities(logits, temperature, **law), generator).to(logits.device)


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """(..., V) -> (..., V), float64. temperature 0 is argmax. top_k, then top_p, act after it."""
    V = logits.size(-1)
    if logits.device.type == "mps":                             # it has no float64
        logits = logits.cpu()
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), V).double()
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature     # else a tiny one makes inf - inf
    if top_k is None and top_p is None:
        return logits.softmax(-1)
    best, token = logits.topk(min(top_k or V, V))               # sorted
    p = best.softmax(-1)
    if top_p is not None:                                       # the smallest set that reaches top_p
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return torch.zeros_like(logits).scatter_(-1, token, p / p.sum(-1, keepdim=True))


def choose(p, generator=None):
    """One token for each row of probabilities (..., V), not normalised, float64 -> (...).

    By inversion of the cumulative distribution. In float32 the tail is cut: uniforms are multiples of 2^-24,
    so Gumbel noise made of them never exceeds 16.7, rare tokens never come and the temperature is quietly
    lower (Zheng et al. 2409.02908). One uniform a row is also 6 times cheaper than Gumbel noise, which needs
    V.
    """
    below = p.cumsum(-1)
    u = torch.rand(*p.shape[:-1], 1, generator=generator, device=p.device, dtype=p.dtype)
    u = u * below[..., -1:]
    choice = torch.searchsorted(below, u, right=True)           # right: never a token of probability 0
    return choice.clamp(max=p.size(-1) - 1)[..., 0]


def stop_at_eot(x, given, eot_id):
    """After the first generated EOT of a row, all that was not given becomes EOT too:
    nothing is generated there."""
    if eot_id is not None:
        ended = ((x == eot_id) & ~given).cumsum(1) > 0
        x.masked_fill_(ended & ~given, eot_id)


def new_cache(f, x):
    """f's own cache with room for the canvas x, in the dtype that its keys and values will have."""
    need(getattr(f, "has_cache", hasattr(f, "init_cache")),
         "a layer of this model has no init_cache: sample without a cache")
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(f.parameters()).dtype
    return f.init_cache(x.size(0), x.size(1), x.device, dtype)


def sampling_law(temperature, top_k, top_p):
    """The keywords of `probabilities`."""
    need(temperature >= 0, f"temperature is {temperature}: it must be 0 (greedy) or positive")
    need(top_k is None or top_k >= 1, f"top_k is {top_k}: it must be at least 1")
    need(top_p is None or 0 < top_p <= 1, f"top_p is {top_p}: it must lie in (0, 1]")
    return dict(temperature=temperature, top_k=top_k, top_p=top_p)


def check_diffusion(order, steps, threshold, fill_block):
    need(order in ORDERS, f"order is {order!r}: expected one of {', '.join(ORDERS)}")
    need(steps is None or steps >= 1, f"steps is {steps}: it must be at least 1 (None: a token per step)")
    need(fill_block is None or fill_block >= 1, f"fill_block is {fill_block}: it must be at least 1")
    if threshold is not None:
        need(steps is None, "steps and threshold exclude each other: a threshold takes as many as it needs")
        need(0 < threshold <= 1, f"threshold is {threshold}: it is a probability in (0, 1]")
        need(order == "max_prob", f"a threshold is a probability and needs order 'max_prob', not {order!r}")
