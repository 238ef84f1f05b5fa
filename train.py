"""Train a language model, autoregressive or masked diffusion, on as few or as many unique tokens as you like.

    python train.py                                                  # three minutes on a laptop
    python train.py --objective mdm --unique_tokens 30000 --epochs 100
    python train.py --resume auto --out out/NAME                     # go on with a run
    python train.py --init_from out/NAME --objective mdm             # its weights alone, everything else new
    torchrun --standalone --nproc_per_node=8 train.py --preset gpt2 --dataset fineweb10B --batch_tokens 524288

Flags: python train.py --help. A run is a folder: config.json, metrics.jsonl, samples.txt, ckpt_last.pt,
ckpt_prev.pt (the save before it), ckpt_best.pt. In this file, in this order:

    settings        the flags: their defaults, then the checkpoint's, then what was given
    data            Windows, the repeating loader; what is evaluated, and when
    optimizers      Muon, AdamW, the learning rate
    evaluation      the loss of fixed windows, the probe
    checkpoints     written whole or not at all, read only if every number is as it was written
    the run folder  one lock, one log, the last two checkpoints and the best
    a step          the global batch, this process's share of it, the gradient
    train           the story
"""
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import types
import zlib
from pathlib import Path

# before torch: spinning threads on a busy machine cost 20x
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch

import diffusion
import prepare
from model import LM, PRESETS, ModelConfig, from_preset, from_pretrained, nearest, override, parse_value
from prepare import need

# What --recipe takes: {key: (default, largest, objectives)}
RECIPE = {
    "mask": (0.0, 1, "ar mixed"),     # share of the input tokens replaced by the mask token (2511.03276)
    "random": (0.0, 1, "ar mixed mdm block"),   # share of the tokens read that are random (2606.16246)
    "reverse": (0.0, 1, "ar mixed"),  # share of the windows read from right to left (2606.16246)
    "offset": (1, 16, "ar mixed"),    # a window learns to predict 1 to so many places on (2606.16246)
    "mir": (0.0, 10, "ar mixed"),     # weight of a loss on inputs masked at a rate from U(0, .5) (2606.06888)
    "rate": (0.0, 1, "mdm"),          # always this share of masks; what is trained is no bound then
    "orders": (0, 2 ** 31, "block"),  # AR in so many fixed orders of reading, the first left to right
}
# name: (default, help). Words with | between them are all that it may be, the first the default. Where a type
# stands for the default, that is None: "chooses itself" or "from the preset", as the help says.
FLAGS = {
    "data": {
        "dataset": ("docs", "name under data/ or folder of train.bin and val.bin; `docs` is made if missing"),
        "unique_tokens": (int, "train on the first U tokens only, again and again (default: all)"),
        "epochs": (float, "passes over the unique tokens"),
        "max_steps": (int, "optimizer steps; with --epochs the smaller of both (without either: 1000)"),
        "block_size": (int, "tokens in a window (default: from the preset)"),
        "seed": (1337, "of the initialisation, the order of windows, the noise and dropout"),
    },
    "objective": {
        "objective": ("ar | mdm | mixed | block",
                      "mdm: masked diffusion; mixed: both losses; block: block diffusion"),
        "diffusion_block": (16, "block: tokens in a block, AR over blocks and diffusion inside"),
        "ar_frac": (0.5, "mixed: share of each batch that is trained as AR"),
        "recipe": ([], f"key=value ..., regularisers and ablations: {', '.join(RECIPE)}"),
        "dense_steps": (0, "layers with an indexer (dsa, msa): steps of dense attention first"),
        "indexer_warmup": (0, "steps after those in which the indexer alone learns; then sparse attention"),
    },
    "model": {
        "preset": (" | ".join(PRESETS), "what kind of model; its fields are changed below and by --set"),
        "layers": (str, "layer pattern, such as 'full(window=64)*3 full'"),
        "n_layer": (int, "blocks"),
        "n_head": (int, "attention heads"),
        "n_embd": (int, "width"),
        "dropout": (float,
                    "on the embedding and what each block adds; ties a run to its processes, --micro_batch"),
        "set": ([], "key=value ...: any other field of ModelConfig, such as n_kv_head=2 mlp=gelu"),
        "init_from": (str, "run folder or checkpoint: start from its weights, with everything else new"),
    },
    "optimizer": {
        "optimizer": ("adamw | muon", "muon is for hidden matrices, AdamW for the rest"),
        "lr": (2e-3, "peak learning rate; the schedules that fall end at about 0"),
        "schedule": ("wsd | cosine | constant", "after the warm-up; wsd: constant, linear at the end"),
        "warmup": (100, "steps of linear warm-up"),
        "weight_decay": (0.1, "decoupled, on matrices only"),
        "beta2": (0.95, "Adam's second-moment decay"),
        "grad_clip": (1.0, "largest gradient norm, 0 = off"),
        "batch_tokens": (1024, "tokens in a step, over all micro-batches and processes"),
    },
    "system": {
        "micro_batch": (int, "windows in one forward pass (default: chooses itself)"),
        "device": ("auto", "auto (cuda > mps > cpu) | cuda | mps | cpu"),
        "dtype": ("auto | bfloat16 | float32", "auto: bfloat16 where native, on a GPU"),
        "compile": ("auto | on | off", "auto: on cuda"),
        "fsdp": ("off | on", "on: torchrun's processes share parameters, gradients and optimizer state out"),
        "threads": (0, "CPU threads; 0: 1 for models below 5M parameters, else all cores"),
    },
    "output": {
        "out": (str, "run folder (default: out/<something telling>)"),
        "eval_every": (250, "steps between evaluations, 0 = only at the end"),
        "eval_epochs": (str, "evaluate at these epochs: 1,2,4 or geometric (12 of them) or geometric:N"),
        "eval_windows": (256, "fixed validation windows to evaluate on, 0 = all"),
        "probe_every": (0,
                        "N: at every N-th evaluation and the last: is the true end found among four? 0: off"),
        "save_every": (1000, "steps between checkpoints, besides those at evaluations and at the end"),
        "log_every": (20, "steps between log lines"),
        "resume": ("off | auto", "auto: go on with the run in --out, if there is one"),
    },
}
DEFAULTS = {name: None if isinstance(default, type) else default
            for group in FLAGS.values() for name, (default, _) in group.items()}
CHOICES = {name: default.split(" | ") for name, default in DEFAULTS.items() if " | " in str(default)}
DEFAULTS |= {name: choices[0] for name, choices in CHOICES.items()}
# These may differ between a checkpoint and the run that resumes it; all other flags shape the trajectory.
FREE = {*FLAGS["system"], *FLAGS["output"], "epochs", "max_steps"}
POSITIVE = ("epochs max_steps unique_tokens lr micro_batch log_every save_every batch_tokens "
            "diffusion_block").split()                      # the other numbers may be 0; none is negative

# Dense bf16 peak by device name, from the makers' data sheets, for MFU. Unknown devices get none: no guess.
PEAK_FLOPS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device):
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


# ------------------------------------------------------------------------------------------------------------
# Settings

def parse_flags(argv=None):
    """Only what was given on the command line: {name: value}."""
    import argparse
    parser = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                            argument_default=argparse.SUPPRESS)
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title)
        for name, (default, text) in flags.items():
            kind = default if isinstance(default, type) else type(default)
            how = dict(type=kind)                           # prepare.Parser reads numbers: 1e6, 30M
            if kind is list:
                how = dict(nargs="+", action="extend", metavar="KEY=VALUE")
            if name == "fsdp":
                how = dict(nargs="?", const="on")
            if name in CHOICES:
                text = f"{default} ({text})"
            if DEFAULTS[name] not in (None, []):
                text += f" (default: {DEFAULTS[name]})"
            group.add_argument(f"--{name}", help=text, **how)
    return vars(parser.parse_args(argv))


def settings(given, log):
    """(flags, state): a run's flags, and the checkpoint that it goes on from, or None.

    Defaults < the checkpoint's < given. A flag that shapes the trajectory may not differ from the
    checkpoint's.
    """
    flags, state = {**DEFAULTS, **given}, None
    need(not {"preset", "init_from"} <= given.keys(), "--preset is a new model, --init_from brings its own")
    if flags["resume"] == "auto":
        need(flags["out"], "--resume auto goes on with the run in --out: name that folder")
        state = newest_checkpoint(Path(flags["out"]), log)
    if state:
        source = state["source"]
        lost = [k for k, value in state["flags"].items() if value and k not in DEFAULTS]
        need(not lost, f"{source} was trained with --{' --'.join(lost)}, which train.py no longer has: a new "
                       f"run from its weights is --init_from {source}")
        wrong = other_settings(state, given)
        need(not wrong, f"cannot resume {source} with other settings: {', '.join(wrong)}. "
                        f"A new run from its weights: --init_from {source}")
        flags = {**DEFAULTS, **state["flags"], **given}
    check(flags)
    return flags, state


def other_settings(state, given):
    """The flags that make another run of a checkpoint's: ["--lr 0.1 (checkpoint: 0.2)", ...]."""
    known = {**DEFAULTS, **state["flags"]}
    return [f"--{k} {v} (checkpoint: {known[k]})" for k, v in given.items()
            if k not in FREE and v != known[k]]


def check(flags):
    """ValueError for a value that no run can have. (nan is not 0 <= nan.)"""
    for name, choices in CHOICES.items():
        value = flags[name]
        need(value in choices,
             f"--{name} {value} is unknown{nearest(value, choices)}: one of {', '.join(choices)}")
    for name, value in flags.items():
        if isinstance(value, (int, float)):
            least = "above 0" if name in POSITIVE else "of 0 or more"
            need(0 <= value < 1e99 and (value or name not in POSITIVE),
                 f"--{name} {value}: expected a number {least}, below 1e99")
    need(flags["seed"] < 2 ** 31, f"--seed {flags['seed']} must lie between 0 and {2 ** 31 - 1}")
    recipe(flags)


def recipe(flags):
    """{key: value} of RECIPE, from --recipe."""
    values = {key: default for key, (default, *_) in RECIPE.items()}
    for pair in flags["recipe"]:
        key, _, value = pair.partition("=")
        need(key in RECIPE, f"--recipe {pair}: expected key=value, the key one of {', '.join(RECIPE)}")
        default, most, objectives = RECIPE[key]
        values[key] = prepare.number(value, type(default))
        need(default <= values[key] <= most, f"--recipe {pair} must lie between {default} and {most}")
        need(flags["objective"] in objectives.split(),
             f"--recipe {key} is for --objective {objectives}, not {flags['objective']}")
    need(not values["orders"] or flags["diffusion_block"] == 1, "--recipe orders=K needs --diffusion_block 1")
    return values


def model_config(flags, vocab_size, trained):
    """ModelConfig from --preset, then the model flags, then --set.

    vocab_size: the tokenizer's. trained: the config of a checkpoint, in place of the preset's, or None.
    """
    values = {name: flags[name] for name in "block_size layers n_layer n_head n_embd dropout".split()
              if flags[name] is not None}
    for pair in flags["set"]:
        key, eq, value = pair.partition("=")
        need(eq, f"--set {pair} is not of the form key=value")
        values[key] = parse_value(value)
    asked = values.setdefault("vocab_size", vocab_size)
    need(asked == vocab_size,
         f"--set vocab_size={asked}: it is the tokenizer's, {vocab_size}; leave it out or prepare other data")
    if trained:
        return override(override(ModelConfig(), trained), values)
    return from_preset(flags["preset"], **values)

# ------------------------------------------------------------------------------------------------------------
# Data

class Windows:
    """The repeating loader: windows of T tokens over the first U, a pure function of (seed, window number).

    Each epoch is a fresh permutation of the U // T windows with a fresh offset on the ring of U tokens, so
    every unique token is seen exactly once per epoch, in ever other windows. Batches run across epoch
    boundaries. The number of processes changes nothing, and an AR run and a diffusion run of one seed read
    the same windows in the same order. The tokens stay where they are, memory-mapped: each batch reads its
    own windows.
    """
    def __init__(self, data, unique_tokens, block_size, seed):
        self.data, self.T, self.seed = data, block_size, seed
        self.n = unique_tokens // block_size                # windows per epoch
        self.U = self.n * block_size
        self.epoch = None

    def read(self, first, count):
        """(count, T) int64: the windows first, first + 1, ... since the start of training."""
        starts = []
        for k in range(first, first + count):
            epoch, i = divmod(k, self.n)
            if epoch != self.epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.offset, self.order = epoch, rng.integers(self.U), rng.permutation(self.n)
            starts.append(self.offset + self.order[i] * self.T)
        index = (np.array(starts)[:, None] + np.arange(self.T)) % self.U    # over the end of the ring, too
        return torch.from_numpy(self.data[index].astype(np.int64))


def fixed_windows(data, T, count):
    """(N, T): up to `count` (0: all) whole windows spread evenly over data, the same for every run.

    In the type of the file: call .long() on what you read of it. All of them are no copy.
    """
    n = len(data) // T
    whole = data[:n * T].reshape(n, T)
    if count and count < n:
        whole = whole[np.linspace(0, n - 1, count).round().astype(np.int64)]
    return torch.from_numpy(whole)


def eval_steps(flags, total, steps_per_epoch):
    """The steps after which the model is evaluated."""
    spec, every = flags["eval_epochs"], flags["eval_every"]
    if spec is None:
        return {*range(every, total, every), total} if every else {total}
    kind, _, points = spec.partition(":")
    try:
        if kind == "geometric":
            last = total / steps_per_epoch
            points = min(total, prepare.number(points or "12", int))
            epochs = np.geomspace(min(1.0, last), last, points)
        else:
            epochs = [prepare.number(e, float) for e in spec.split(",")]
    except ValueError:
        raise ValueError(f"--eval_epochs {spec} is neither a list such as 1,2,4 nor geometric nor geometric:N"
                         ) from None
    return {max(1, round(min(total, e * steps_per_epoch))) for e in epochs} | {total}


def open_data(flags, rank, log):
    """What train.py knows of its data set: folder, train, val (memory-mapped ids), meta, tokenizer."""
    folder = prepare.dataset_folder(flags["dataset"])
    if flags["dataset"] == "docs" and not (folder / "meta.json").exists() and rank == 0:
        log("preparing the default data (once)")
        prepare.prepare("docs")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    tokens, val, meta = prepare.load_dataset(folder)
    return types.SimpleNamespace(folder=folder, train=tokens, val=val, meta=meta,
                                 tokenizer=prepare.load_tokenizer(folder))


def windows_of(flags, data, T, world):
    """(the loader of a run, what it is evaluated on); ValueError where their sizes do not fit the data.

    The latter are windows of validation text (val) and of training text (seen: the gap, by the same measure),
    and the passages of the probe (ends).
    """
    U, batch = flags["unique_tokens"] or len(data.train), flags["batch_tokens"]
    need(U <= len(data.train),
         f"--unique_tokens {U:,} is more than the {len(data.train):,} training tokens of {data.folder}")
    for what, there in (("unique tokens", U), ("validation set", len(data.val))):
        need(T <= there, f"block_size {T} is above the {what} ({there:,} tokens): use a smaller --block_size")
    need(batch % (T * world) == 0,
         f"--batch_tokens {batch} must be a multiple of block_size x processes = {T * world}: change one")
    windows, val = Windows(data.train, U, T, flags["seed"]), fixed_windows(data.val, T, flags["eval_windows"])
    return windows, types.SimpleNamespace(
        val=val, seen=fixed_windows(data.train[:windows.U], T, max(1, len(val) // 4)),
        ends=probe_items(data.val, T) if flags["probe_every"] else None,
        bytes_per_token=data.tokenizer.token_bytes[val[::len(val) // 4096 + 1].long()].mean())

# ------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

def orthogonalise(G):
    """Newton-Schulz iteration of Muon (Keller Jordan, 2024):
    pushes all singular values of G (..., m, n) towards 1.

    The quintic's coefficients trade exactness (values end in about [0.7, 1.2]) for slope at zero. bf16 is
    enough, and faster on a GPU; on a CPU float32 is.
    """
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32).reshape(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, A, X, beta=3.4445)             # 3.4445 X - 4.775 A X + 2.0315 A A X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices (..., m, n);
    all matrices of one shape in one batched call.

    Updates are scaled by 0.2 sqrt(max(m, n)) to the size of AdamW's (arXiv 2502.16982), so AdamW's --lr fits.
    """
    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                nesterov = []
                for p in params:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    nesterov.append(whole(p.grad.lerp(momentum, group["momentum"])))
                update = orthogonalise(torch.stack(nesterov)) * (0.2 * max(shape[-2:]) ** 0.5)
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(share_of(u.to(p.dtype), p), alpha=-group["lr"])


def make_optimizers(lm, flags):
    """Every parameter in exactly one group:
    matrices decay, vectors (norms, biases, gates) and short convolutions do not.

    The experts' biases (E, width) are vectors, too, though their shape is a matrix's; so are nsa's positions
    in a window.
    """
    muon, matrices, vectors = {}, [], []
    for name, p in lm.named_parameters():
        if p.ndim < 2 or name.endswith(("bias", "conv_weight", "window_pos")):
            vectors.append(p)
        elif flags["optimizer"] == "muon" and name.startswith("blocks."):
            muon[name] = p
        else:
            matrices.append(p)
    lr, decay = flags["lr"], flags["weight_decay"]
    groups = [dict(params=matrices, weight_decay=decay), dict(params=vectors, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, flags["beta2"]), fused=True)]
    if muon:
        optimizers.append(Muon([muon[name] for name in sorted(muon)], lr, decay))
    return optimizers


def learning_rate(step, total, flags):
    """Of step 0, 1, ...: a pure function,
    so that a resumed run with another --max_steps follows the new schedule."""
    peak, warmup = flags["lr"], flags["warmup"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if flags["schedule"] == "cosine":
        return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if flags["schedule"] == "wsd":
        return peak * min(1.0, (total - step) / max(1, 0.2 * total))
    return peak

# ------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(lm, windows, objective, rows=64, diffusion_block=None, orders=0):
    """Loss of fixed windows (N, T), nats per token: {"loss", "se", ...};
    AR exact, diffusion a bound with its s.e.

    A mixed model is scored both ways (ar_loss, mdm_loss); `loss` is the smaller: both are code lengths of the
    same text, under two distributions. It has its own generator, so that training is the same with and
    without it. lm is in eval mode. se is the Monte Carlo error of the masks alone, not that of the choice of
    windows. orders (see RECIPE): each window is read in one of them.
    """
    losses, se, more = {}, 0.0, {}
    if objective in ("ar", "mixed"):
        losses["ar_loss"] = ar_nats(lm, windows, rows).double().mean().item()
    if objective != "ar":
        if orders:
            more["pos"] = diffusion.reading_order(torch.arange(len(windows)) % orders, windows.size(1))
            windows = windows.long().gather(1, more["pos"])
        losses["mdm_loss"], se = mdm_nats(lm, windows, objective, rows, 4, diffusion_block, **more)
    best = min(losses, key=losses.get)
    se *= best == "mdm_loss"                                # the AR loss is exact
    return {"loss": losses[best], "se": se, **(losses if objective == "mixed" else {})}


def ar_nats(lm, windows, rows):
    """(N, T) -> the same, nats of each token."""
    parts = (x.long().to(lm.embed.weight.device) for x in windows.split(rows))
    return torch.cat([diffusion.ar_loss(lm, x, lm.mask_id, reduction="none").cpu() for x in parts])


def mdm_nats(lm, windows, objective, rows, n_mc, diffusion_block, **how):
    """diffusion.mdm_nll, by default on the same masks each time."""
    return diffusion.mdm_nll(lm, windows, lm.mask_id, n_mc, batch_size=rows, device=lm.embed.weight.device,
                             noise_block=diffusion_block if objective == "block" else None, **how)


def probe_items(val_data, T, count=128):
    """(N, 4, T) int64, at most `count` passages of the validation tokens
    with four ends each, the true one first.

    An end is a quarter of the window, at most 16 tokens. The wrong ones are the true ends of passages far
    away, so every end is right once and wrong three times: what is more probable on its own gains nothing,
    and chance is 25%.
    """
    x = fixed_windows(val_data, T, count).long()
    K = max(1, min(16, T // 4))
    need(len(x) >= 4 and T >= 2,
         f"the probe needs 4 validation windows of 2 tokens, there are {len(x)} of {T}: use more text")
    items = x[:, None].repeat(1, 4, 1)                      # (N, 4, T)
    for j in range(1, 4):
        items[:, j, -K:] = x.roll(-(j * len(x) // 4), 0)[:, -K:]
    return items


@torch.no_grad()
def probe(lm, items, objective, rows=64, diffusion_block=None):
    """{"probe_accuracy", "probe_gap"} of `probe_items`.

    The share of passages in which the true end is the most probable of the four, and the mean of wrong minus
    true -log p, in nats per end. AR and mixed: exact; else the bound, the four ends under the same masks.
    Like `evaluate` it is deterministic and leaves training as it was.
    """
    N, _, T = items.shape
    K = max(1, min(16, T // 4))
    x = items.flatten(0, 1)                                 # (4 N, T)
    if objective in ("ar", "mixed"):
        nats = ar_nats(lm, x, rows)[:, -K:].sum(1)
    else:
        nats, _ = mdm_nats(lm, x, objective, rows, 8, diffusion_block, per_row=True,
                           scored=(torch.arange(T) >= T - K).expand(len(x), -1),
                           group=torch.arange(N).repeat_interleave(4))
        nats = nats * K
    true, wrong = nats.view(N, 4).split([1, 3], dim=1)
    return {"probe_accuracy": (true < wrong).all(1).double().mean().item(),
            "probe_gap": (wrong.mean(1) - true[:, 0]).mean().item()}


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: plain types and tensors, written whole or not at all, read only if all is as it was written.

VERSION = 2


def digest(value, crc=0):
    """A checksum of everything in a checkpoint.
    torch.load looks at none, and a flipped bit is another weight."""
    if isinstance(value, torch.Tensor):
        crc = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), crc)
        return zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    if isinstance(value, (dict, list, tuple)):
        crc = zlib.crc32(f"{type(value).__name__} {len(value)}".encode(), crc)
        for item in itertools.chain(*value.items()) if isinstance(value, dict) else value:
            crc = digest(item, crc)
        return crc
    return zlib.crc32(repr(value).encode(), crc)


def save_atomic(state, path, keep=None):
    """keep: the name that the file of before gets."""
    state = {"version": VERSION, **state}
    with prepare.whole_file(path, keep=keep) as f:
        torch.save({**state, "digest": digest(state)}, f)


def kept(folder, *which):
    """Those of a run folder's checkpoints that are there, in this order."""
    return [path for name in which if (path := folder / f"ckpt_{name}.pt").exists()]


def load_checkpoint(path):
    """The dictionary that save_atomic wrote. ValueError, with the name of the file, for anything else."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt_last.pt"
    need(path.exists(), f"there is no checkpoint {path}: name a run folder that train.py wrote")
    damaged = f"{path} is truncated, damaged or not a checkpoint of train.py"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version, written = int(state["version"]), int(state.pop("digest", 0))
    except Exception as e:                                  # whatever a foreign file may hold
        raise ValueError(f"{damaged} ({e!s:.60})") from None
    need(version == VERSION,
         f"{path} was written by another version of train.py ({version}; this one reads {VERSION})")
    need(written == digest(state), damaged)
    return state


def load_weights(lm, weights, source):
    """All of them, but that the module of --set mtp may come or go."""
    try:
        missing, unexpected = lm.load_state_dict(weights, strict=False)
        other = [name for name in missing + unexpected if not name.startswith("mtp.")]
        need(not other, f"missing or unexpected: {', '.join(other)}")
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"the weights of {source} do not fit the model that the flags and data make: "
                         f"{' '.join(str(e).split())[:200]}") from None


def load_model(path, which="best", device="cpu", dtype=torch.float32):
    """(lm in eval mode, checkpoint) from a run folder (ckpt_best.pt or ckpt_last.pt), a checkpoint file or a
    published folder, whose weights become dtype."""
    path = Path(path)
    if any(path.glob("model*.safetensors")):
        lm, objective = from_pretrained(path, dtype, device)
        return lm, {"model": lm.state_dict(), "config": dataclasses.asdict(lm.config), "step": 0,
                    "flags": {"objective": objective}}
    path = next(iter(kept(path, which, "last", "prev")), path)
    state = load_checkpoint(path)
    lm = LM(override(ModelConfig(), state["config"]))
    load_weights(lm, state["model"], path)
    set_stage(lm, state["flags"], max(state["step"] - 1, 0))        # as in its last step
    return lm.to(device).eval(), state


def newest_checkpoint(folder, log):
    """The newest readable one in a run folder, with its file as `source`; None where there is none."""
    paths = kept(folder, "last", "prev", "best")
    for path in paths:
        try:
            return {**load_checkpoint(path), "source": path}
        except ValueError as e:
            if path == paths[-1]:
                raise
            log(f"{e}: going on from the one before")


# ------------------------------------------------------------------------------------------------------------
# The run folder

def read_log(path, tell=lambda line: print(line, file=sys.stderr)):
    """Rows of a run folder's metrics.jsonl in the order of steps, each (kind, step) once;
    none where there is no file."""
    path, rows, bad = Path(path) / "metrics.jsonl", {}, []              # rows: {(kind, step): row}
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        try:
            row = json.loads(line)
            need(math.isfinite(row["epoch"]) and math.isfinite(row["loss"]), "no number")
            rows[row["kind"], row["step"]] = row
        except (ValueError, TypeError, KeyError):
            bad.append(str(number))
    if bad:
        tell(f"{path}: line {', '.join(bad)} damaged and left out")
    return sorted(rows.values(), key=lambda row: row["step"])


def lock(folder):
    """A file that holds the folder until it is closed or the process ends.
    ValueError where another process does."""
    import fcntl                                            # not on Windows
    f = open(folder / "lock", "a")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        f.close()
        raise ValueError(f"another process is training in {folder}: wait, or choose another --out") from None
    return f


def new_folder(flags, config):
    """out/docs-ar-4x128, or the same with a number."""
    name = (f"out/{prepare.dataset_folder(flags['dataset']).name}-{flags['objective']}-"
            f"{config.n_layer}x{config.n_embd}")
    for i in itertools.count(1):
        folder = Path(name + f"-{i}" * (i > 1))
        with contextlib.suppress(FileExistsError):          # make, do not look: two may start at one moment
            folder.mkdir(parents=True)
            return str(folder)


def json_lines(rows):
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


class Run:
    """The folder of a run: a lock, the log, the last two checkpoints and the best. Only rank 0 writes.

    The log is part of every checkpoint. So the metrics.jsonl of a resumed run is again what it would be
    without the interruption, whatever has happened to the file.
    """
    def __init__(self, folder, state, rank):
        self.rows = [json.loads(line) for line in state["log"].splitlines()] if state else []
        self.best = state["best"] if state else math.inf    # the loss of what ckpt_best.pt holds
        # Step of a ckpt_last.pt that is known to be good.
        self.saved = state["step"] if state and state["source"].name == "ckpt_last.pt" else None
        self.writes = rank == 0
        self.folder = Path(folder)

    def open(self, state, data, **about):
        """Locks and tidies the folder, and writes what is known by now: `about` as config.json, what a reader
        of the run needs of its data set, the log. Returns the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        locked = lock(self.folder)
        need(state or not {".pt", ".bin", ".safetensors"} & {path.suffix for path in self.folder.iterdir()},
             f"{self.folder} already holds a run or other data: take --resume auto or another --out")
        for part in self.folder.glob("*.part"):             # what a kill has left
            part.unlink()
        same = (state or about)["flags"]["eval_windows"] == about["flags"]["eval_windows"]
        if not (same and (self.folder / "ckpt_best.pt").exists()):
            self.best = math.inf                            # whatever comes is better
        for path in prepare.run_files(data.folder):
            shutil.copyfile(path, self.folder / path.name)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        for name, text in (("config.json", json.dumps({**about, "versions": versions}, indent=1)),
                           ("metrics.jsonl", json_lines(self.rows))):
            with prepare.whole_file(self.folder / name, "w") as f:
                f.write(text)
        return locked

    def evals(self):
        return [r for r in self.rows if r["kind"] == "eval"]

    def record(self, row):
        self.rows.append(row)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json_lines([row]))

    def save(self, state):
        """The best first: killed before the last is written, a run comes to it once more. What was the last
        becomes the one before at the next step that is saved."""
        last, step = self.folder / "ckpt_last.pt", state["step"]
        better = [r["loss"] for r in self.evals() if r["step"] == step and r["loss"] < self.best]
        self.best = min([self.best, *better])
        state = {**state, "best": self.best, "log": json_lines(self.rows)}
        if self.writes:
            if better:
                save_atomic(state, last.with_name("ckpt_best.pt"))
            before = None if self.saved in (None, step) else last.with_name("ckpt_prev.pt")
            save_atomic(state, last, before)
        self.saved = step


# ------------------------------------------------------------------------------------------------------------
# Processes and devices

@contextlib.contextmanager
def processes(flags):
    """What this process is: rank, world, device, cuda, bf16, compiled.
    Joins the group of torchrun and leaves it."""
    rank, local, world = (int(os.environ.get(name, name == "WORLD_SIZE"))       # of torchrun, or 0, 0, 1
                          for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(flags["device"])
    cuda = device.startswith("cuda")
    compiled, bf16 = flags["compile"] == "on", flags["dtype"] == "bfloat16"
    if cuda:
        compiled |= flags["compile"] == "auto"
        bf16 |= flags["dtype"] == "auto" and torch.cuda.is_bf16_supported()
        device = f"cuda:{local}" if device == "cuda" else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    need(world > 1 or flags["fsdp"] == "off", "--fsdp shares a model out among torchrun's processes")
    own_group = world > 1 and not torch.distributed.is_initialized()
    if own_group:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield types.SimpleNamespace(rank=rank, world=world, device=device, cuda=cuda, bf16=bf16,
                                    compiled=compiled)
    except RuntimeError as e:
        if re.search("out of memory|(to|can't) allocate", str(e)):
            raise ValueError("out of memory in a pass: use a smaller --micro_batch") from None
        raise
    finally:
        if own_group:
            torch.distributed.destroy_process_group()


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()                  # of meta there is none
    except (RuntimeError, AssertionError, ImportError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}; expected auto, cuda, cuda:0, mps or "
                         "cpu, and that torch sees it") from None
    return name


def set_threads(asked, lm):
    """The number of CPU threads. asked 0: 1 below 5M parameters, where more slow a step down, else all."""
    most = 4 * os.cpu_count()                               # torch starts as many as it is told
    need(0 <= asked <= most, f"--threads {asked}: expected 0 to {most}, four per core")
    torch.set_num_threads(asked or (1 if lm.num_params() < 5_000_000 else os.cpu_count()))


def shard(lm, compiled):
    """Fully sharded data parallelism (FSDP2), block by block:
    gathered for a pass, gradients averaged over processes."""
    from torch.distributed.fsdp import fully_shard
    for block in lm.blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block)
    fully_shard(lm)


def whole(tree):
    """The same tree with every shared-out tensor gathered, on all processes:
    a checkpoint that loads anywhere."""
    if isinstance(tree, dict):
        return {k: whole(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [whole(v) for v in tree]
    return tree.full_tensor() if hasattr(tree, "full_tensor") else tree


def share_of(tensor, p):
    """A tensor of parameter p's whole shape, shared out as p is; every process has the same one."""
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def load_optimizers(optimizers, states):
    for optimizer, state in zip(optimizers, states):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {i: {k: share_of(v, params[i]) for k, v in s.items()} for i, s in state["state"].items()}
        optimizer.load_state_dict({**state, "state": moments})

# ------------------------------------------------------------------------------------------------------------
# A step

def set_stage(lm, flags, step):
    """DeepSeek-V3.2's stages of training, for layers with an indexer:
    sets and returns "dense", "warmup" or "sparse"."""
    dense = flags["dense_steps"]
    stage = ("dense", "warmup", "sparse")[(step >= dense) + (step >= dense + flags["indexer_warmup"])]
    for module in lm.modules():
        if hasattr(module, "stage"):
            module.stage = stage
    return stage


class Batch:
    """The global batch of each step, this process's share of it, and the gradient of its mean loss.

    The AR rows come first, then the diffusion rows. A process has B / world rows side by side, and takes them
    in parts of one objective and at most `micro` rows.
    """
    def __init__(self, flags, windows, process, lm):
        self.flags, self.recipe, self.windows = flags, recipe(flags), windows
        self.process, self.lm = process, lm
        T = windows.T
        self.B = B = flags["batch_tokens"] // T
        # Tokens that share one noise level.
        self.block = flags["diffusion_block"] if flags["objective"] == "block" else T
        need(T % self.block == 0, f"--diffusion_block {self.block} must divide block_size {T}")
        self.ar_rows = {"ar": B, "mixed": round(flags["ar_frac"] * B)}.get(flags["objective"], 0)
        need(flags["objective"] != "mixed" or 0 < self.ar_rows < B,
             f"--ar_frac {flags['ar_frac']} makes {self.ar_rows} of the {B} windows in a step AR: a mixed "
             "run needs one of each kind at least, take a larger --batch_tokens or another --ar_frac")
        most = (65536 if process.cuda else 8192) // T
        self.micro = flags["micro_batch"] or max(1, min(B // process.world, most))
        mine = torch.arange(B).chunk(process.world)[process.rank]
        rows = {"ar": mine[mine < self.ar_rows], "mdm": mine[mine >= self.ar_rows]}
        self.parts = [(kind, part) for kind in rows for part in rows[kind].split(self.micro) if len(part)]
        need(flags["fsdp"] == "off" or flags["objective"] != "mixed",
             "--fsdp needs as many forward passes on each process, and --objective mixed may have others")
        self.cut = [process.world, self.micro]
        self.used = {}                                      # the parameters that get a gradient, by stage
        self.passes = {"ar": self.ar_pass, "mdm": self.mdm_pass}
        if process.compiled and flags["fsdp"] == "off":
            self.passes = {k: torch.compile(f, dynamic=False, fullgraph=True) for k, f in self.passes.items()}

    def ar_pass(self, x, inputs, masked=None):
        aux = {}                                            # losses that layers add: balance, indexer_kl
        f = functools.partial(self.lm, aux=aux)
        loss = diffusion.ar_loss(f, x, self.lm.mask_id, inputs)
        if masked is not None:
            aux["mir"] = self.recipe["mir"] * diffusion.ar_loss(f, x, self.lm.mask_id, masked)
        return loss, aux

    def mdm_pass(self, x, n, u, inputs, order=None):
        aux = {}
        f = functools.partial(self.lm, aux=aux)
        how = dict(noise_block=self.block if self.block < x.size(1) else None, pos=order, inputs=inputs)
        return diffusion.mdm_loss(f, x, self.lm.mask_id, (n, u), **how), aux

    def ar_inputs(self, x, generator):
        """(targets, what is read for them, the same with masks for mir or None), each (B, T), on the CPU."""
        values, bos, B = self.recipe, self.lm.mask_id, len(x)
        rate = lambda: torch.rand(B, 1, generator=generator)
        if values["reverse"]:
            x = torch.where(rate() < values["reverse"], x.flip(1), x)
        inputs = x
        if values["offset"] > 1:                            # k places on: k - 1 more BOS stand before
            late = torch.randint(values["offset"], (B, 1), generator=generator)
            from_ = torch.arange(x.size(1)) - late
            inputs = torch.where(from_ < 0, bos, x.gather(1, from_.clamp(min=0)))
        inputs = diffusion.corrupt(inputs, bos, values["mask"], values["random"], generator)
        masked = diffusion.corrupt(x, bos, rate() / 2, 0.0, generator) if values["mir"] else None
        return x, inputs, masked

    def to_device(self, x):
        if self.process.cuda:
            x = x.pin_memory()                              # from pageable memory the copy waits for the GPU
        return x.to(self.process.device, non_blocking=True)

    def gradient(self, step, stage):
        """Adds up the gradient of the whole batch. Returns its losses by name, device tensors: ar and mdm as
        shares of the mean over all tokens of the batch, nats per token, and the KL of the indexers, summed
        over layers."""
        flags, process, B = self.flags, self.process, self.B
        # Noise belongs to the global batch, dropout to a process; both are functions of the step and resume.
        gen = torch.Generator().manual_seed((flags["seed"] << 32) + step)
        torch.manual_seed(-1 - (flags["seed"] << 32) - step * process.world - process.rank)
        x = self.windows.read(step * B, B)                      # (B, T)
        noise = diffusion.mdm_noise(x.numel() // self.block, self.block, generator=gen)
        if self.recipe["rate"]:
            noise[0].fill_(max(1, round(self.recipe["rate"] * self.block)))
        order = None
        if self.recipe["orders"]:
            numbers = torch.randint(self.recipe["orders"], (B,), generator=gen)
            order = diffusion.reading_order(numbers, x.size(1))
            x = x.gather(1, order)
        read = {"ar": self.ar_inputs(x, gen)}
        inputs = diffusion.corrupt(x, self.lm.mask_id, 0.0, self.recipe["random"], gen)
        read["mdm"] = x, *noise, inputs, order
        losses = {name: torch.zeros((), device=process.device)
                  for name in ("ar", "mdm", "indexer_kl", *["mtp"] * len(self.lm.mtp))}
        for kind, rows in self.parts:
            # A row has one level of noise, or one for each of its blocks.
            given = [a.unflatten(0, (B, -1))[rows].flatten(0, 1) for a in read[kind] if a is not None]
            with autocast(process):
                loss, aux = self.passes[kind](*map(self.to_device, given))
            learn = loss + sum(aux.values())
            if stage == "warmup" and "indexer_kl" in aux:
                learn = aux["indexer_kl"]
            if flags["fsdp"] == "on":                       # it averages over processes, and this is a sum
                learn = learn * process.world
            share = len(rows) / B
            (learn * share).backward()
            for name, value in {**aux, kind: loss}.items():
                if name in losses:
                    losses[name] += value.detach() * share
        if process.world > 1:
            self.add_up(losses, stage)
        return losses

    def add_up(self, losses, stage):
        """Sums over processes: losses, expert counts, and the gradients where FSDP has not done it.
        In one bucket: one by one took up to three times as long."""
        if stage not in self.used:                          # by any process; what none uses has no gradient
            params = [] if self.flags["fsdp"] == "on" else list(self.lm.parameters())
            used = torch.tensor([float(p.grad is not None) for p in params], device=self.process.device)
            torch.distributed.all_reduce(used)
            self.used[stage] = [p for p, n in zip(params, used.tolist()) if n]
        for p in self.used[stage]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        tensors = [p.grad for p in self.used[stage]] + [m.count for m in self.lm.moes()] + [*losses.values()]
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, f in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(f.view_as(t))

    def flops_per_token(self):
        """Training FLOPs per token, over the kinds of rows."""
        T, share = self.windows.T, self.ar_rows / self.B
        ar, mdm = (self.lm.flops_per_token(T, causal=c) for c in (True, False))
        if self.block < T:
            return 2 * ar                                   # two streams
        ar *= 1 + bool(self.recipe["mir"])                  # a second pass
        return share * ar + (1 - share) * mdm


def autocast(process):
    return torch.autocast(torch.device(process.device).type, torch.bfloat16, enabled=process.bf16)


class Progress:
    """Where a run stands, and what adds up between two lines of its log: the losses and gradient norm of each
    step, the loads of the experts. That is part of every checkpoint, so that the line after a resume is the
    mean of the same steps.
    """
    def __init__(self, batch, state):
        flags, self.batch, self.moes = batch.flags, batch, batch.lm.moes()
        self.per_epoch = batch.windows.U / flags["batch_tokens"]        # steps, a fraction
        steps = math.ceil((flags["epochs"] or 0) * self.per_epoch * 0.999999999999)  # 7.000000000000001: 7
        self.total = min(filter(None, (flags["max_steps"], steps)), default=1000)       # of the whole run
        self.flops = batch.flops_per_token()
        self.step, self.seconds = 0, 0.0                    # of training, compilation and evaluation left out
        self.pending = []                                   # of steps since the last wait for the device
        self.rows = []                                      # [*losses, norm] of each step
        self.loads = [torch.zeros_like(m.count) for m in self.moes]
        if state:
            self.step, self.seconds, self.rows = state["step"], state["seconds"], state["meter"]["rows"]
            self.loads = [a.to(batch.process.device) for a in state["meter"]["loads"]]
        self.line_began = self.step, self.seconds

    def add(self, losses, norm, stage):
        self.pending.append(torch.stack([*losses.values(), whole(norm)]))
        self.loads = [a + m.balance(stage != "warmup") for a, m in zip(self.loads, self.moes)]

    def check(self, run):
        """Between evaluations, all that waits for the device.
        ValueError where a loss, a gradient or now a weight is not finite."""
        recent = torch.stack(self.pending)
        self.pending = []
        self.rows += recent.tolist()
        *losses, norm = recent.sum(0).tolist()
        weights = whole(torch.nn.utils.get_total_norm(self.batch.lm.parameters())).item()
        need_finite({"the loss": sum(losses), "the gradient": norm, "the norm of the weights": weights},
                    self.step, run)

    def row(self, kind, **values):
        tokens = self.step * self.batch.flags["batch_tokens"]
        return {"kind": kind, "step": self.step, "epoch": self.step / self.per_epoch, "tokens": tokens,
                "flops": tokens * self.flops, "seconds": round(self.seconds, 3), **values}

    def means(self):
        """The values of a line: means over the steps since the last one."""
        ar, mdm, kl, *mtp, _ = np.mean(self.rows, axis=0).tolist()
        out = {"loss": ar + mdm, "grad_norm": self.rows[-1][-1]}
        share = self.batch.ar_rows / self.batch.B
        if 0 < share < 1:                                   # mixed: each in nats per token of its own rows
            out |= {"ar_loss": ar / share, "mdm_loss": mdm / (1 - share)}
        if kl:
            out["indexer_kl"] = kl
        if mtp:
            out["mtp_loss"] = mtp[0] / share / self.batch.lm.config.mtp
        if self.moes:                                       # per MoE layer
            out["load_ratio"] = [round((a.max() / a.mean()).item(), 4) for a in self.loads]
            out["dead_experts"] = [int((a < 0.1 * a.mean()).sum()) for a in self.loads]
            out["bias_range"] = [round((m.bias.max() - m.bias.min()).item(), 4) for m in self.moes]
        self.rows = []
        self.loads = [torch.zeros_like(a) for a in self.loads]
        return out


def need_finite(values, step, run):
    saved = f"the last good checkpoint is {run.folder / 'ckpt_last.pt'} (step {run.saved})"
    for name, value in values.items():
        need(math.isfinite(value), f"{name} became {value} by step {step}: lower --lr or raise --warmup; "
                                   f"{saved if run.saved is not None else 'there is no checkpoint yet'}")

# ------------------------------------------------------------------------------------------------------------
# The story

def clock(seconds):
    """90 -> '1m30s'."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def build(flags, config, process, state, trained):
    """(model, optimizers). trained: the checkpoint whose weights are taken; state: the one to go on from."""
    torch.manual_seed(flags["seed"])
    lm = LM(config)
    indexed = any(hasattr(b.mixer, "stage") for b in lm.blocks)
    need(indexed or not (flags["dense_steps"] or flags["indexer_warmup"]),
         f"--dense_steps and --indexer_warmup need layers with an indexer (dsa, msa), not {config.layers}")
    right = flags["objective"] in ("ar", "mixed") and not flags["recipe"] and config.block_size > 2
    need(right or not lm.mtp,
         "--set mtp is for --objective ar or mixed, without --recipe, in windows of at least 3 tokens")
    set_threads(flags["threads"], lm)
    if trained:
        load_weights(lm, trained["model"], trained["source"])
    lm.to(process.device).train()
    if flags["fsdp"] == "on":
        shard(lm, process.compiled)
    optimizers = make_optimizers(lm, flags)
    if state:
        load_optimizers(optimizers, state["optimizers"])
        torch.set_rng_state(state["rng"])
    return lm, optimizers


def initial(flags, data, log):
    """The checkpoint of --init_from, which must speak the tokens of the data."""
    path = Path(flags["init_from"])
    state = load_model(path)[1] | {"source": path}
    theirs = prepare.load_tokenizer(path)
    need(theirs.vocab == data.tokenizer.vocab, f"{path} was trained on tokens of {theirs.name}, and "
         f"{data.folder} holds tokens of {data.tokenizer.name}: prepare the text with its tokenizer")
    log(f"weights of {path} (step {state['step']}, {state['flags']['objective']})")
    state["config"]["mtp"] = 0.0                            # a part of the loss, not of the model: see build
    return state


def check_resume(state, data, progress, log):
    """What must be as it was for the run to go on as if it had never stopped."""
    config, source, cut = state["config"], state["source"], progress.batch.cut
    known = {data.meta["train_sha256"], data.meta["val_sha256"], None}      # None: an older checkpoint's
    need({state["data"], state.get("val")} <= known and config["vocab_size"] == data.tokenizer.n_vocab,
         f"{data.folder} holds other tokens than the ones this run began with: prepare the same text, or "
         f"begin a new run from these weights by --init_from {source}")
    need(state["cut"] == cut
         or not (config["dropout"] or config["mlp_dropout"] or "dropout" in config["layers"]),
         "with dropout a run goes on with its number of processes and its --micro_batch, which were "
         f"{state['cut']} and not {cut}")
    step, total = progress.step, progress.total
    need(step <= total,
         f"the checkpoint is at step {step}, beyond the {total} steps asked: raise --max_steps or --epochs")
    log(f"resumed at step {step} from {source}" + ": the last one, nothing to do" * (step == total))


@contextlib.contextmanager
def signals():
    """A list that gets the signals to stop: Ctrl-C, the end of a job, a closed terminal."""
    came = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number))
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
              if signal.getsignal(number) != signal.SIG_IGN}        # by nohup, or a script's `&`
    try:
        yield came
    finally:
        for item in before.items():
            signal.signal(*item)


def stopped(came, step, flags, process):
    """Processes decide together, at log steps, or one would wait for ever."""
    if process.world == 1:
        return bool(came)
    if step % flags["log_every"]:
        return False
    flag = torch.tensor(len(came), device=process.device)
    torch.distributed.all_reduce(flag)
    return bool(flag)


def announce(progress, data, held, evals, log):
    batch = progress.batch
    lm, process, windows, flags = batch.lm, batch.process, batch.windows, batch.flags
    log(f"{flags['objective']} | {lm.num_params() / 1e6:.2f}M parameters "
        f"({lm.num_params(False) / 1e6:.2f}M without embeddings) | {progress.flops / 1e6:.2f} MFLOP/token | "
        f"{process.device}, {'bfloat16' if process.bf16 else 'float32'}, "
        f"{'compiled' if process.compiled else 'eager'}, threads: {torch.get_num_threads()}, "
        f"processes: {process.world}")
    log(f"{data.folder} | {windows.U:,} unique tokens in {windows.n:,} windows of {windows.T} | "
        f"{progress.total:,} steps of {flags['batch_tokens']:,} tokens = "
        f"{progress.total / progress.per_epoch:.4g} epochs | "
        f"{len(held.val):,} validation windows, {len(evals)} evaluations | -> {flags['out']}")


def measure(progress, held, run, log):
    """Evaluates and records: the loss of validation and of training windows,
    and the probe where it is due."""
    batch, step, total = progress.batch, progress.step, progress.total
    lm, flags = batch.lm, batch.flags
    set_stage(lm, flags, max(step - 1, 0))                  # as trained so far
    how = dict(objective=flags["objective"], rows=flags["micro_batch"] or max(1, 16384 // batch.windows.T),
               diffusion_block=flags["diffusion_block"])
    lm.eval()
    with autocast(batch.process):
        result, seen = (evaluate(lm, x, orders=batch.recipe["orders"], **how) for x in (held.val, held.seen))
        result["train_loss"] = seen["loss"]
        if flags["probe_every"] and ((len(run.evals()) + 1) % flags["probe_every"] == 0 or step >= total):
            result |= probe(lm, held.ends, **how)
    lm.train()
    need_finite({f"{name} of the evaluation": value for name, value in result.items()}, step, run)
    result["bpb"] = result["loss"] / math.log(2) / held.bytes_per_token
    run.record(progress.row("eval", **result))
    error = f" +- {result['se']:.4f}" if result["se"] else ""
    more = "".join(f" | {name} {result[name]:.4f}" for name in
                   "bpb ar_loss mdm_loss probe_accuracy probe_gap".split() if name in result)
    log(f"eval {step}/{total} | epoch {step / progress.per_epoch:.2f} | "
        f"val {result['loss']:.4f}{error} | train {result['train_loss']:.4f}{more}")


def report(progress, rate, run, log):
    """One line of the log, on the screen and in metrics.jsonl."""
    process, (step, seconds) = progress.batch.process, progress.line_began
    progress.line_began = progress.step, progress.seconds
    dt = (progress.seconds - seconds) / max(1, progress.step - step)
    speed = dt and progress.batch.flags["batch_tokens"] / dt
    row = progress.row("train", **progress.means(), lr=rate, tok_per_s=round(speed))
    run.record(row)
    peak = peak_flops(process.device)
    more = f" | load {max(row['load_ratio']):.2f}" if row.get("load_ratio") else ""
    more += "".join(f" | {name} {row[name]:.4f}" for name in ("indexer_kl", "mtp_loss") if name in row)
    mfu = f" | mfu {progress.flops * speed / peak / process.world:.1%}" if peak else ""
    log(f"step {progress.step}/{progress.total} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | "
        f"lr {rate:.2e} | norm {row['grad_norm']:.2f}{more} | {dt * 1e3:.1f} ms | "
        f"{row['tok_per_s']:,} tok/s{mfu} | eta {clock((progress.total - progress.step) * dt)}")


def snapshot(progress, optimizers, data):
    """What a checkpoint holds besides the log. rng: for what a layer of yours may draw between two steps."""
    batch = progress.batch
    return whole({"model": batch.lm.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                  "config": dataclasses.asdict(batch.lm.config), "flags": batch.flags, "step": progress.step,
                  "seconds": progress.seconds, "cut": batch.cut, "rng": torch.get_rng_state(),
                  "data": data.meta["train_sha256"], "val": data.meta["val_sha256"],
                  "meter": {"rows": progress.rows, "loads": progress.loads}})


def train(given, log=print):
    """One training run. given: {flag: value} as on the command line.
    Returns {"out", "step", "finished", "evals", ...}."""
    if os.environ.get("RANK", "0") != "0":
        log = lambda line: None
    flags, state = settings(given, log)
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(processes(flags))
        data = open_data(flags, process.rank, log)
        trained = initial(flags, data, log) if flags["init_from"] and not state else state
        config = model_config(flags, data.tokenizer.n_vocab, trained and trained["config"])
        windows, held = windows_of(flags, data, config.block_size, process.world)
        lm, optimizers = build(flags, config, process, state, trained)
        progress = Progress(Batch(flags, windows, process, lm), state)
        total = progress.total
        evals = eval_steps(flags, total, progress.per_epoch)
        if state:
            check_resume(state, data, progress, log)
        if process.rank == 0 and not flags["out"]:
            flags["out"] = new_folder(flags, config)
        run = Run(flags["out"] or "", state, process.rank)
        if run.writes:
            stack.enter_context(run.open(state, data, flags=flags, model=dataclasses.asdict(config),
                                         device=process.device))
        announce(progress, data, held, evals, log)
        evals -= {r["step"] for r in run.evals()}
        came = stack.enter_context(signals())
        keep = lambda: run.save(snapshot(progress, optimizers, data))
        first, stop = progress.step, False
        while True:
            if progress.step in evals:
                try:
                    measure(progress, held, run, log)
                except RuntimeError:                        # out of memory: the training is not lost
                    keep()
                    raise
                keep()
            if stop or progress.step == total:
                break
            tic = time.perf_counter()
            stage = set_stage(lm, flags, progress.step)
            losses = progress.batch.gradient(progress.step, stage)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), flags["grad_clip"] or math.inf)
            progress.add(losses, norm, stage)
            rate = learning_rate(progress.step, total, flags)
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = rate
                o.step()
                o.zero_grad()
            step = progress.step = progress.step + 1
            line = step % flags["log_every"] == 0 or step in (1, total)
            due = step % flags["save_every"] == 0 and step not in evals
            stop = stopped(came, step, flags, process)
            if line or due or stop or step in evals:
                progress.check(run)                         # waits for the device
            if process.compiled and step == first + 1:      # to compile is no training
                progress.line_began = step, progress.seconds
            else:
                progress.seconds += time.perf_counter() - tic
            if line:
                report(progress, rate, run, log)
            if due:
                keep()
        if run.saved != progress.step:
            keep()
    if progress.step < total:
        log(f"interrupted at step {progress.step} of {total}: saved. "
            f"Go on with: python train.py --resume auto --out {shlex.quote(str(run.folder))}")
    return {"out": flags["out"], "step": progress.step, "seconds": progress.seconds, "best": run.best,
            "finished": progress.step == total, "stopped": stop, "evals": run.evals(), "lm": lm}


def show_sample(folder, device):
    """A short sample of the run's last model, as text; also written to samples.txt."""
    lm, state = load_model(folder, "last", device)
    flags, size = state["flags"], min(200, lm.config.block_size)
    x = torch.full((1, size), lm.mask_id, device=device)    # a canvas with every place to fill
    torch.manual_seed(0)
    if flags["objective"] == "block":
        ids = diffusion.sample_block(lm, x, lm.mask_id, flags["diffusion_block"], order="random")
    elif flags["objective"] == "mdm":
        ids = diffusion.sample_mdm(lm, x, lm.mask_id, order="random")
    else:
        ids = diffusion.sample_ar(lm, x, lm.mask_id)
    text = prepare.load_tokenizer(folder).decode(ids[0].tolist())
    with prepare.whole_file(Path(folder) / "samples.txt", "w") as f:
        f.write(text + "\n")
    return text


def say(line):
    """Prints; where a terminal or pipe was closed, training goes on in silence."""
    try:
        print(line)
    except OSError:
        sys.stdout = None


def main(argv=None):
    prepare.console()
    first = os.environ.get("RANK", "0") == "0"              # the others have the same to say
    try:
        result = train(parse_flags(argv), say)
        if first and not result["stopped"]:
            say(f"---\nbest validation loss {result['best']:.4f} nats/token, "
                f"{clock(result['seconds'])} of training. A sample:\n")
            say(show_sample(result["out"], result["lm"].embed.weight.device))
            say(f"\nmore: python sample.py {shlex.quote(result['out'])}")
    except (ValueError, OSError, MemoryError, ImportError) as e:
        if first:
            prepare.complain("train.py", e)
        return 2
    except KeyboardInterrupt:                               # before the first step, or in the sample
        print("train.py: interrupted outside of training; nothing that was saved is lost", file=sys.stderr)
        return 130
    return 130 if result["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())
