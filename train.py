"""Train a language model, autoregressive or masked diffusion, on as few or as many unique tokens as you like.

    python train.py                                                  # three minutes on a laptop
    python train.py --objective mdm --unique_tokens 30000 --epochs 100
    python train.py --resume auto --out out/NAME --max_steps 5000    # go on with a run
    python train.py --init_from out/NAME --objective mdm             # its weights alone, everything else new
    torchrun --standalone --nproc_per_node=8 train.py --preset gpt2 --dataset fineweb10B

Flags: python train.py --help. A run is a folder: config.json, metrics.jsonl, loss.png, samples.txt,
ckpt_last.pt, ckpt_prev.pt (the save before it), ckpt_best.pt. In this file, in this order:

    settings        the flags: their defaults, then the checkpoint's, then what was given
    data            Windows, the repeating loader; what is evaluated, and when
    optimizers      Muon, AdamW, the learning rate
    evaluation      the loss of fixed windows, the probe
    checkpoints     written whole or not at all, read only if every number is as it was written
    the run folder  one lock, one log, the last two checkpoints and the best
    a step          the global batch, this process's share of it, the gradient
    train           the story
"""
if __name__ == "__main__":                      # Ctrl-C while the imports run: the end, and no traceback
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import datetime
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
import warnings
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

# What --recipe takes: {key: (default, largest, what it does)}. The first five are for AR rows.
RECIPE = {
    "mask": (0.0, 1, "share of the input tokens replaced by the mask token (2511.03276)"),
    "random": (0.0, 1, "share of the input tokens replaced by random ones (2606.16246)"),
    "reverse": (0.0, 1, "share of the windows that are read from right to left (2606.16246)"),
    "offset": (1, 16, "a window learns to predict 1 to so many places on (2606.16246)"),
    "mir": (0.0, 10, "weight of a second loss, on inputs masked at a rate from U(0, .5) (2606.06888)"),
    "rate": (0.0, 1, "mdm: always this share of masks; what is trained is no bound then"),
    "orders": (0, 2 ** 31, "block of 1: AR in so many fixed orders of reading, the first left to right"),
}
# name: (default, help). A default of None means "chooses itself" or "from the preset", as the help says.
FLAGS = {
    "data": {
        "dataset": ("docs", "name under data/ or folder of train.bin and val.bin; `docs` is made if missing"),
        "unique_tokens": (None, "train on the first U tokens only, again and again (default: all)"),
        "epochs": (None, "passes over the unique tokens"),
        "max_steps": (None, "optimizer steps; with --epochs the smaller of both (without either: 1000)"),
        "block_size": (None, "tokens in a window (default: from the preset)"),
        "seed": (1337, "of the initialisation, the order of windows, the noise and dropout"),
    },
    "objective": {
        "objective": ("ar", "ar | mdm (masked diffusion) | mixed (both losses) | block (block diffusion)"),
        "diffusion_block": (16, "block: tokens in a block, AR over blocks and diffusion inside"),
        "ar_frac": (0.5, "mixed: share of each batch that is trained as AR"),
        "recipe": ([], f"key=value ..., regularisers and ablations: {', '.join(RECIPE)}"),
        "dense_steps": (0, "layers with an indexer (dsa, msa): steps of dense attention first"),
        "indexer_warmup": (0, "steps after those in which the indexer alone learns; then sparse attention"),
    },
    "model": {
        "preset": ("small", f"what kind of model; sizes are free, below and by --set: {', '.join(PRESETS)}"),
        "layers": (None, "layer pattern, such as 'full(window=64)*3 full'"),
        "n_layer": (None, "blocks"),
        "n_head": (None, "attention heads"),
        "n_embd": (None, "width"),
        "dropout": (None, "on the embedding and on what each block adds. Its masks are drawn in each forward "
                          "pass, so it ties a run to its number of processes and its --micro_batch"),
        "set": ([], "key=value ...: any other field of ModelConfig, such as n_kv_head=2 mlp=gelu"),
        "init_from": (None, "run folder or checkpoint: start from its weights, with everything else new"),
    },
    "optimizer": {
        "optimizer": ("adamw", "adamw | muon (hidden matrices; AdamW for the rest)"),
        "lr": (2e-3, "peak learning rate; the schedules that fall end at about 0"),
        "schedule": ("wsd", "after the warm-up: wsd (constant, linear at the end) | cosine | constant"),
        "warmup": (100, "steps of linear warm-up"),
        "weight_decay": (0.1, "decoupled, on matrices only"),
        "beta2": (0.95, "Adam's second-moment decay"),
        "grad_clip": (1.0, "largest gradient norm, 0 = off"),
    },
    "system": {
        "batch_tokens": (1024, "tokens in a step, over all micro-batches and processes"),
        "micro_batch": (None, "windows in one forward pass (default: chooses itself)"),
        "device": ("auto", "auto (cuda > mps > cpu) | cuda | mps | cpu"),
        "dtype": ("auto", "auto (bfloat16 where native, on a GPU) | bfloat16 | float32"),
        "compile": ("auto", "auto (on cuda) | on | off"),
        "fsdp": ("off", "on: torchrun's processes share parameters, gradients and optimizer state out | off"),
        "timeout": (10.0, "minutes after which a process that does not answer ends the run"),
        "max_minutes": (None, "stop and save after so many minutes of training in this call"),
        "threads": (0, "CPU threads; 0: 1 for models below 5M parameters, else all cores"),
    },
    "output": {
        "out": (None, "run folder (default: out/<something telling>)"),
        "eval_every": (250, "steps between evaluations, 0 = only at the end"),
        "eval_epochs": (None, "evaluate at these epochs: 1,2,4 or geometric (12 of them) or geometric:N"),
        "eval_windows": (256, "fixed validation windows to evaluate on, 0 = all"),
        "probe_every": (0, "N: at every N-th evaluation and the last, how often the true end of a passage is "
                           "found among four; 0 = never"),
        "save_every": (1000, "steps between checkpoints, besides those at evaluations and at the end"),
        "log_every": (20, "steps between log lines"),
        "resume": (None, "auto: the last checkpoint of --out if there is one, without --out the newest run "
                         "of this kind; or PATH of a checkpoint or run folder"),
    },
}
DEFAULTS = {name: default for group in FLAGS.values() for name, (default, _) in group.items()}
KIND = {**dict.fromkeys(("epochs", "dropout", "max_minutes"), float), **dict.fromkeys(
    ("unique_tokens", "max_steps", "block_size", "n_layer", "n_head", "n_embd", "micro_batch"), int)}
# These may differ between a checkpoint and the run that resumes it; all other flags shape the trajectory.
FREE = {"epochs", "max_steps", "max_minutes", "micro_batch", "device", "dtype", "compile", "fsdp", "timeout",
        "threads", "out", "resume", "eval_every", "eval_epochs", "eval_windows", "probe_every", "save_every",
        "log_every"}
CHOICES = {
    "objective": ("ar", "mdm", "mixed", "block"), "schedule": ("wsd", "cosine", "constant"),
    "optimizer": ("adamw", "muon"), "dtype": ("auto", "bfloat16", "float32"),
    "compile": ("auto", "on", "off"), "fsdp": ("on", "off"), "preset": tuple(PRESETS)}
POSITIVE = ("epochs", "max_steps", "unique_tokens", "block_size", "n_layer", "n_head", "n_embd", "lr",
            "micro_batch", "max_minutes", "log_every", "save_every", "batch_tokens",
            "diffusion_block", "timeout")
NOT_NEGATIVE = ("eval_every", "eval_windows", "probe_every", "dense_steps", "indexer_warmup", "warmup",
                "weight_decay", "grad_clip")
SHARES = ("ar_frac", "dropout", "beta2")

# Dense bf16 peak by device name, from the makers' data sheets, for MFU. Unknown devices get none: no guess.
PEAK_FLOPS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
              "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "RTX 4090": 165e12,
              "RTX 3090": 71e12}


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
            if default is not None and default != []:
                text += f" (default: {default})"
            more = dict(metavar=name.upper(), help=text.replace("%", "%%"))
            kind = KIND.get(name, type(default))
            if kind in (int, float):
                more |= dict(type=kind)                     # prepare.Parser reads them: 1e6, 30M
            if name in ("set", "recipe"):
                more |= dict(nargs="+", action="extend", metavar="KEY=VALUE")
            if name == "fsdp":
                more |= dict(nargs="?", const="on")
            group.add_argument(f"--{name}", **more)
    return vars(parser.parse_args(argv))


def settings(given, log):
    """(flags, state, source): a run's flags, and the checkpoint that it goes on from with its path, or None.

    Defaults < the checkpoint's < given. A flag that shapes the trajectory may not differ from the
    checkpoint's.
    """
    for name in given:
        need(name in DEFAULTS, f"unknown flag --{name}{nearest(name, DEFAULTS)}")
    flags = {**DEFAULTS, **given}
    check(flags)
    target, state = flags["resume"], None
    if target == "auto":
        target = Path(flags["out"]) if flags["out"] else newest_run(flags)
        state, source = newest_checkpoint(target, log)
        if not state:                                       # what cannot be read is put aside
            for path in target.glob("ckpt_*.pt"):
                with contextlib.suppress(FileNotFoundError):    # another process was first
                    os.replace(path, f"{path}.damaged")
                log(f"{path} is put aside, and the run begins again")
    elif target:
        state, source = newest_checkpoint(Path(target), log)
        need(state, f"there is no checkpoint to read in {target}: name a run folder of train.py")
    if not state:
        return flags, None, None
    lost = [k for k, value in state["flags"].items() if value and k not in DEFAULTS]
    need(not lost, f"{source} was trained with --{' --'.join(lost)}, which train.py no longer has: a new run "
                   f"from its weights is --init_from {source}")
    wrong = other_settings(state, given)
    need(not wrong, f"cannot resume {target} with other settings: {', '.join(wrong)}. "
                    f"A new run from its weights: --init_from {target}")
    flags = {**DEFAULTS, **{k: v for k, v in state["flags"].items() if k in DEFAULTS}, **given}
    if not given.get("out"):
        flags["out"] = str(source.parent)
    check(flags)
    return flags, state, source


def other_settings(state, given):
    """The flags that make another run of a checkpoint's: ["--lr 0.1 (checkpoint: 0.2)", ...]."""
    known = {**DEFAULTS, **state["flags"]}
    return [f"--{k} {v} (checkpoint: {known[k]})" for k, v in given.items()
            if k not in FREE and v != known[k]]


def check(flags):
    """ValueError for a value that no run can have. (`not 0 < x` also refuses nan.)"""
    for name, choices in CHOICES.items():
        value = flags[name]
        near = nearest(value, choices)
        need(value in choices, f"--{name} {value} is unknown{near}: one of {', '.join(choices)}")
    for names, ok, expected in ((POSITIVE, lambda x: 0 < x < math.inf, "be above 0 and finite"),
                                (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "not be negative, and be finite"),
                                (SHARES, lambda x: 0 <= x <= 1, "lie between 0 and 1")):
        for name in names:
            value = flags[name]
            need(value is None or ok(value), f"--{name} {value} must {expected}")
    need(0 <= flags["seed"] < 2 ** 31, f"--seed {flags['seed']} must lie between 0 and {2 ** 31 - 1}")
    need(flags["beta2"] < 1, "--beta2 1.0 never forgets: it must be below 1, such as 0.95")
    recipe(flags)


def recipe(flags):
    """{key: value} of RECIPE, from --recipe."""
    values = {key: default for key, (default, *_) in RECIPE.items()}
    objective = flags["objective"]
    for pair in flags["recipe"]:
        key, eq, value = pair.partition("=")
        need(eq and key in RECIPE, f"--recipe {pair}: expected key=value{nearest(key, RECIPE)}, the key one "
                                   f"of {', '.join(RECIPE)}")
        default, most, _ = RECIPE[key]
        values[key] = prepare.number(value, type(default))
        need(default <= values[key] <= most, f"--recipe {pair} must lie between {default} and {most}")
        kinds = {"rate": ("mdm",), "orders": ("block",)}.get(key, ("ar", "mixed"))
        need(objective in kinds, f"--recipe {pair} is for --objective {' and '.join(kinds)}, not {objective}")
    need(not values["orders"] or flags["diffusion_block"] == 1, "--recipe orders=K needs --diffusion_block 1")
    return values


def model_config(flags, vocab_size=None, trained=None):
    """ModelConfig from --preset, then the model flags, then --set.

    vocab_size: the tokenizer's, None keeps the preset's. trained: the config of the checkpoint of
    --init_from, in place of the preset's.
    """
    values = {}
    for name in ("block_size", "layers", "n_layer", "n_head", "n_embd", "dropout"):
        if flags[name] is not None:
            values[name] = flags[name]
    for pair in flags["set"]:
        key, eq, value = pair.partition("=")
        need(eq, f"--set {pair} is not of the form key=value")
        values[key] = parse_value(value)
    if vocab_size is not None:
        asked = values.setdefault("vocab_size", vocab_size)
        need(asked == vocab_size, f"--set vocab_size={asked}: it is the tokenizer's, {vocab_size}; leave "
                                  "it out, or prepare the text with another --tokenizer")
    if trained:
        return override(override(ModelConfig(), trained), values)
    for key, value in PRESETS[flags["preset"]].items():     # sizes are free, names and switches are not
        if value is None or isinstance(value, (str, bool)):
            need(values.get(key, value) == value, f"--preset {flags['preset']} fixes {key}={value}: leave "
                                                  f"{key}={values.get(key)} out, or take another preset")
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

    def starts(self, first, count):
        """First token of the windows first, first + 1, ... since the start of training."""
        out = np.empty(count, dtype=np.int64)
        for i, k in enumerate(range(first, first + count)):
            if k // self.n != self.epoch:
                self.epoch = k // self.n
                rng = np.random.default_rng([self.seed, self.epoch])
                self.offset = rng.integers(self.U)
                self.order = rng.permutation(self.n)
            out[i] = (self.offset + self.order[k % self.n] * self.T) % self.U
        return out

    def read(self, starts):
        """(B,) -> (B, T) int64; a window may run over the end of the ring."""
        index = (starts[:, None] + np.arange(self.T)) % self.U
        return torch.from_numpy(self.data[index].astype(np.int64))


def fixed_windows(data, T, count):
    """(N, T): up to `count` (0: all) whole windows spread evenly over data, the same for every run.

    In the type of the file: call .long() on what you read of it. All of them are no copy.
    """
    n = len(data) // T
    whole = data[:n * T].reshape(n, T)
    if count and count < n:
        whole = whole[np.linspace(0, n - 1, count).round().astype(np.int64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that must not be written to
        return torch.from_numpy(whole)


def eval_steps(flags, total, steps_per_epoch):
    """The steps after which the model is evaluated."""
    spec, every = flags["eval_epochs"], flags["eval_every"]
    if spec is None:
        return {*range(every, total, every), total} if every else {total}
    try:
        if spec.startswith("geometric"):
            points = prepare.number(spec[10:] or "12", int)
            last = total / steps_per_epoch
            epochs = np.geomspace(min(1.0, last), last, points if points <= total else 0)
        else:
            epochs = [prepare.number(e, float) for e in spec.split(",")]
        need(len(epochs) and min(epochs) > 0, "")
    except ValueError:
        raise ValueError(f"--eval_epochs {spec} is neither a list of epochs such as 1,2,4 nor geometric nor "
                         f"geometric:N (N at most the {total} steps)") from None
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


def train_windows(flags, data, T, world):
    """The loader of a run, after looking whether its sizes fit the data."""
    U, batch = flags["unique_tokens"] or len(data.train), flags["batch_tokens"]
    need(U <= len(data.train), f"--unique_tokens {U:,} is more than the {len(data.train):,} training tokens "
                               f"of {data.folder}")
    for what, there in (("unique tokens", U), ("validation set", len(data.val))):
        need(T <= there, f"block_size {T} is above the {what} ({there:,} tokens): use a smaller --block_size")
    need(batch % (T * world) == 0, f"--batch_tokens {batch} must be a multiple of block_size x processes = "
                                   f"{T * world}: change it or --block_size")
    return Windows(data.train, U, T, flags["seed"])

# ------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

def orthogonalise(G, steps=5):
    """Newton-Schulz iteration of Muon (Keller Jordan, 2024): pushes all singular values of G (..., m, n)
    towards 1.

    The quintic's coefficients trade exactness (values end in about [0.7, 1.2]) for slope at zero. bf16 is
    enough, and faster on a GPU; on a CPU float32 is.
    """
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32).reshape(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, A, X, beta=3.4445)             # 3.4445 X - 4.775 A X + 2.0315 A A X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices (..., m, n); all matrices of one shape in one batched
    call.

    Updates are scaled by 0.2 sqrt(max(m, n)) to the size of AdamW's (arXiv 2502.16982), so AdamW's --lr fits.
    """
    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
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


def make_optimizers(lm, flags, device):
    """Every parameter in exactly one group: matrices decay, vectors (norms, biases, gates) and short
    convolutions do not.

    The experts' biases (E, width) are vectors, too, though their shape is a matrix's; so are nsa's positions
    in a window.
    """
    params = dict(lm.named_parameters())
    vectors = ("bias", "conv_weight", "window_pos")
    decays = {n for n, p in params.items() if p.ndim >= 2 and not n.endswith(vectors)}
    muon = {n for n in decays if n.startswith("blocks.") and flags["optimizer"] == "muon"}
    groups = [[p for n, p in params.items() if n not in muon and n in decays],
              [p for n, p in params.items() if n not in muon and n not in decays]]
    fused = torch.device(device).type in ("cuda", "cpu")
    optimizers = [torch.optim.AdamW([dict(params=groups[0], weight_decay=flags["weight_decay"]),
                                     dict(params=groups[1], weight_decay=0.0)],
                                    lr=flags["lr"], betas=(0.9, flags["beta2"]), eps=1e-8, fused=fused)]
    if muon:
        hidden = [params[n] for n in sorted(muon)]
        optimizers.append(Muon(hidden, lr=flags["lr"], weight_decay=flags["weight_decay"]))
    grouped = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(grouped) == len(params) and set(grouped) == set(params.values()), "not in exactly one group"
    return optimizers


def learning_rate(step, total, flags):
    """Of step 0, 1, ...: a pure function, so that a resumed run with another --max_steps follows the new
    schedule."""
    peak, warmup = flags["lr"], flags["warmup"]
    if step < warmup:
        return peak * (step + 1) / warmup
    if flags["schedule"] == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * peak * (1 + math.cos(math.pi * min(1.0, done)))
    if flags["schedule"] == "wsd":
        return peak * min(1.0, (total - step) / max(1, 0.2 * total))
    return peak

# ------------------------------------------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(lm, windows, objective, rows=64, seed=0, n_mc=4, diffusion_block=None, orders=0):
    """Loss of fixed windows (N, T), nats per token: {"loss", "se", ...}; AR exact, diffusion a bound with its
    s.e.

    A mixed model is scored both ways (ar_loss, mdm_loss); `loss` is the smaller: both are code lengths of the
    same text, under two distributions. It has its own generator and leaves the model in the mode that it
    found, so that training is the same with and without it. se is the Monte Carlo error of the masks alone,
    not that of the choice of windows. orders (see RECIPE): each window is read in one of them.
    """
    was_training = lm.training
    device = lm.embed.weight.device
    lm.eval()
    out = {}
    if objective in ("ar", "mixed"):
        nats = 0.0
        for x in windows.split(rows):
            nats += diffusion.ar_loss(lm, x.long().to(device), lm.mask_id).item() * len(x)
        out["ar_loss"] = nats / len(windows)
        out["se"] = 0.0
    if objective != "ar":
        gen = torch.Generator().manual_seed(seed)
        block, more = diffusion_block if objective == "block" else None, {}
        if orders:
            more["pos"] = diffusion.reading_order(torch.arange(len(windows)) % orders, windows.size(1))
            windows = windows.long().gather(1, more["pos"])
        out["mdm_loss"], out["se"] = diffusion.mdm_nll(lm, windows, lm.mask_id, n_mc, gen, batch_size=rows,
                                                       noise_block=block, device=device, **more)
    out["loss"] = min(out[k] for k in ("ar_loss", "mdm_loss") if k in out)
    if objective != "mixed":
        out = {"loss": out["loss"], "se": out["se"]}
    lm.train(was_training)
    return out


def probe_items(val_data, T, count=128):
    """(N, 4, T) int64, at most `count` passages of the validation tokens with four ends each, the true one
    first.

    An end is a quarter of the window, at most 16 tokens. The wrong ones are the true ends of passages far
    away, so every end is right once and wrong three times: what is more probable on its own gains nothing,
    and chance is 25%.
    """
    x = fixed_windows(val_data, T, count).long()
    K = max(1, min(16, T // 4))
    need(len(x) >= 4 and T >= 2, f"the probe needs 4 validation windows of at least 2 tokens, and there are "
                                 f"{len(x)} of {T}: use more text")
    items = x[:, None].repeat(1, 4, 1)                      # (N, 4, T)
    for j in range(1, 4):
        items[:, j, -K:] = x.roll(-(j * len(x) // 4), 0)[:, -K:]
    return items


@torch.no_grad()
def probe(lm, items, objective, rows=64, n_mc=8, seed=0, diffusion_block=None):
    """{"probe_accuracy", "probe_gap"} of `probe_items`.

    The share of passages in which the true end is the most probable of the four, and the mean of wrong minus
    true -log p, in nats per end. AR and mixed: exact; else the bound, the four ends under the same masks.
    Like `evaluate` it is deterministic and leaves training as it was.
    """
    was_training = lm.training
    N, _, T = items.shape
    K = max(1, min(16, T // 4))
    x = items.flatten(0, 1).to(lm.embed.weight.device)      # (4 N, T)
    lm.eval()
    if objective in ("ar", "mixed"):
        nats = torch.cat([diffusion.ar_loss(lm, w, lm.mask_id, reduction="none")[:, -K:].sum(1).cpu()
                          for w in x.split(rows)])
    else:
        block = diffusion_block if objective == "block" else None
        gen = torch.Generator().manual_seed(seed)
        nats, _ = diffusion.mdm_nll(lm, x, lm.mask_id, n_mc, gen, batch_size=rows, per_row=True,
                                    scored=(torch.arange(T) >= T - K).expand(len(x), -1),
                                    group=torch.arange(N).repeat_interleave(4), noise_block=block)
        nats = nats * K
    lm.train(was_training)
    true, wrong = nats.view(N, 4).split([1, 3], dim=1)
    return {"probe_accuracy": (true < wrong).all(1).double().mean().item(),
            "probe_gap": (wrong.mean(1) - true[:, 0]).mean().item()}


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: plain types and tensors, written whole or not at all, read only if all is as it was written.

VERSION = 2


def digest(value, crc=0):
    """A checksum of everything in a checkpoint. torch.load looks at none, and a flipped bit is another
    weight."""
    if isinstance(value, torch.Tensor):
        crc = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), crc)
        return zlib.crc32(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    if isinstance(value, (dict, list, tuple)):
        crc = zlib.crc32(f"{type(value).__name__} {len(value)}".encode(), crc)
        for item in (x for pair in value.items() for x in pair) if isinstance(value, dict) else value:
            crc = digest(item, crc)
        return crc
    return zlib.crc32(repr(value).encode(), crc)


def save_atomic(state, path, keep=None):
    """keep: the name that the file of before gets."""
    state = {"version": VERSION, **{k: v for k, v in state.items() if k not in ("version", "digest")}}
    with prepare.whole_file(path, keep=keep) as f:
        torch.save({**state, "digest": digest(state)}, f)


def load_checkpoint(path):
    """The dictionary that save_atomic wrote. ValueError, with the name of the file, for anything else."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt_last.pt"
    need(path.exists(), f"there is no checkpoint {path}: name a run folder that train.py wrote")
    damaged = f"{path} is truncated, damaged or not a checkpoint of train.py"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as e:
        raise ValueError(f"cannot read {path}: {e.strerror}") from None
    except Exception:
        raise ValueError(damaged) from None
    need(isinstance(state, dict) and isinstance(state.get("version"), int), damaged)
    need(state["version"] == VERSION, f"{path} was written by another version of train.py "
                                      f"({state['version']}; this one reads {VERSION})")
    found = state.pop("digest", None)
    need(isinstance(found, int) and found == digest(state), damaged)
    return state


def load_weights(lm, state, source):
    try:
        lm.load_state_dict(state["model"])
    except RuntimeError as e:
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
    if path.is_dir():
        names = (f"ckpt_{which}.pt", "ckpt_last.pt", "ckpt_prev.pt")
        path = next((path / name for name in names if (path / name).exists()), path)
    state = load_checkpoint(path)
    lm = LM(override(ModelConfig(), state["config"]))
    load_weights(lm, state, path)
    set_stage(lm, state["flags"], max(state["step"] - 1, 0))        # as in its last step
    return lm.to(device).eval(), state


def newest_checkpoint(target, log):
    """(state, its file) of a file, or of the newest readable one in a run folder, (None, None) where there is
    none."""
    if not target.is_dir():
        return (load_checkpoint(target), target) if target.exists() else (None, None)
    found = []
    for path in [target / f"ckpt_{which}.pt" for which in KEPT]:
        if path.exists():
            try:
                found.append((load_checkpoint(path), path))
            except ValueError as e:
                log(str(e))
        if found and path.name == "ckpt_last.pt":
            return found[0]
    state, path = max(found, key=lambda pair: pair[0]["step"], default=(None, None))
    if state:
        log(f"going on from {path.name} (step {state['step']})")
    return state, path


# ------------------------------------------------------------------------------------------------------------
# The run folder

KEPT = ("last", "prev", "best")


def read_rows(path):
    """(rows of a metrics.jsonl, numbers of the lines that are none)."""
    rows, bad = [], []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            known = row["kind"] in ("train", "eval") and type(row["step"]) is int
            need(known and math.isfinite(row["epoch"]) and math.isfinite(row["loss"]), "no row")
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            bad.append(number)
    return rows, bad


def read_log(path, tell=lambda line: print(line, file=sys.stderr)):
    """Rows of a run folder's metrics.jsonl in the order of steps, each (kind, step) once; none where there is
    no file."""
    path = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
    if not path.exists():
        return []
    rows, bad = read_rows(path)
    if bad:
        tell(f"{path}: line {', '.join(map(str, bad))} damaged and left out")
    return sorted({(r["kind"], r["step"]): r for r in rows}.values(), key=lambda r: r["step"])


def lock(folder):
    """A file that holds the folder until it is closed or the process ends. ValueError where another process
    does."""
    f = open(folder / "lock", "a")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        f.close()
        raise ValueError(f"another process is training in {folder}: wait, or choose another --out") from None
    return f


def run_name(flags):
    """docs-ar-4x128: what a run is called that was given no --out."""
    config = model_config(flags)
    data = prepare.dataset_folder(flags["dataset"]).name
    return f"{data}-{flags['objective']}-{config.n_layer}x{config.n_embd}"


def newest_run(flags):
    """The folder of the run of this name that was written last."""
    name = run_name(flags)
    runs = [p.parent for p in Path("out").glob(f"{name}*/ckpt_last.pt")]
    runs = [p for p in runs if re.fullmatch(r"(-\d+)?", p.name[len(name):])]
    need(runs, f"--resume auto finds no run out/{name}: leave it out to begin one, or name a run by --out")
    return max(runs, key=lambda p: (p / "ckpt_last.pt").stat().st_mtime)


class Run:
    """The folder of a run: a lock, the log, the last two checkpoints and the best. Only rank 0 writes.

    The log is part of every checkpoint. So the metrics.jsonl of a resumed run is again what it would be
    without the interruption, whatever has happened to the file, and the best evaluation is the least in the
    log. """
    def __init__(self, flags, state, source, rank, log):
        self.rows = [json.loads(line) for line in state["log"].splitlines()] if state else []
        self.folder = Path(flags["out"] or f"out/{run_name(flags)}")
        self.writes, self.log = rank == 0, log
        self.held = None                                    # the lock
        self.saved = None                                   # step of a ckpt_last.pt that is known to be good
        self.best = math.inf                                # the loss of what ckpt_best.pt holds
        self.best_is_new = self.changed = False
        if self.writes:
            try:
                self.open(flags["out"], state, source)
            except OSError as e:
                raise ValueError(f"cannot write the run folder {self.folder}: {e.strerror}") from None

    def open(self, given, state, source):
        name, number = self.folder.name, 1
        while not given:  # make, do not look: two runs may start at one moment
            try:
                self.folder.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                self.folder = self.folder.with_name(f"{name}-{number}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held = lock(self.folder)
        for part in self.folder.glob("*.part"):             # what a kill has left
            part.unlink()
        here = state is not None and source.parent.resolve() == self.folder.resolve()
        holds = any((self.folder / f"ckpt_{which}.pt").exists() for which in KEPT)
        holds |= state is not None and bool(read_log(self.folder))
        need(here or not holds, f"{self.folder} already holds a run: go on with it by --resume auto, or "
                                "choose another --out")
        metrics = self.folder / "metrics.jsonl"
        if here and metrics.exists():
            rows, bad = read_rows(metrics)
            if bad or [r for r in rows if r["step"] <= state["step"]] != self.rows:
                where = f", damaged in line {', '.join(map(str, bad))}," if bad else ""
                self.log(f"{metrics}{where} was not what the checkpoint says: written anew from it")
        with prepare.whole_file(metrics) as f:
            f.write(self.text().encode())
        if here and source.name == "ckpt_last.pt":
            self.saved = state["step"]
        if state:
            self.find_best(state, source)

    def find_best(self, state, source):
        """ckpt_best.pt is of the best evaluation in the log, or made again, or what it is of counts."""
        path = self.folder / "ckpt_best.pt"
        losses = {r["step"]: r["loss"] for r in self.evals()}
        best = min(losses, key=losses.get, default=None)
        try:
            kept = load_checkpoint(source.with_name(path.name))
        except ValueError:
            kept = None
        if state["step"] == best and (not kept or kept["step"] != best):
            kept = state
        if kept and kept["step"] in losses:
            self.best = losses[kept["step"]]
            if kept is state or source.parent != self.folder:
                save_atomic(kept, path)
        if best is not None and self.best > losses[best]:
            self.log(f"{path} is not of step {best}, the best so far: those weights are gone: a better one "
                     "takes its place")

    def text(self):
        return "".join(json.dumps(r, allow_nan=False) + "\n" for r in self.rows)

    def evaluated(self, step):
        return any(r["step"] == step for r in self.evals())

    def evals(self):
        return [r for r in self.rows if r["kind"] == "eval"]

    def record(self, row):
        self.rows.append(row)
        self.changed = True
        if row["kind"] == "eval" and row["loss"] < self.best:
            self.best = row["loss"]
            self.best_is_new = True
        if self.writes:
            try:
                with open(self.folder / "metrics.jsonl", "a") as f:
                    f.write(json.dumps(row, allow_nan=False) + "\n")
            except OSError as e:
                raise ValueError(f"cannot write {self.folder / 'metrics.jsonl'}: {e.strerror}") from None

    def save(self, state):
        """The last checkpoint, which becomes the one before the last at the next step that is saved; and the
        best."""
        state = {**state, "best": self.best, "log": self.text()}
        if self.writes:
            last = self.folder / "ckpt_last.pt"
            another = self.saved not in (None, state["step"])
            save_atomic(state, last, last.with_name("ckpt_prev.pt") if another else None)
            if self.best_is_new:
                save_atomic(state, last.with_name("ckpt_best.pt"))
        self.saved = state["step"]
        self.best_is_new = self.changed = False

    def describe(self, flags, config, device, data, val):
        """config.json, and what a reader of the run needs of its data set."""
        flags["out"] = str(self.folder)
        ids = val[:4096].long().numpy()
        self.bytes_per_token = data.tokenizer.token_bytes[ids].sum() / ids.size
        if not self.writes:
            return
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
        about = {"flags": flags, "model": dataclasses.asdict(config), "device": device, "versions": versions}
        try:
            for path in prepare.run_files(data.folder):
                shutil.copyfile(path, self.folder / path.name)
            with prepare.whole_file(self.folder / "config.json") as f:
                f.write(json.dumps(about, indent=1).encode())
        except OSError as e:
            raise ValueError(f"cannot write the run folder {self.folder}: {e.strerror}") from None

    def close(self):
        if self.held:
            self.held.close()


def draw(rows, path):
    """loss.png: training and validation loss, the learning rate below. Nothing where matplotlib is
    missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (top, below) = plt.subplots(2, sharex=True, figsize=(7, 5), height_ratios=(3, 1))
    for axes, kind, key, style, label in (
            (top, "train", "loss", "-", "training batches"), (below, "train", "lr", "-", None),
            (top, "eval", "train_loss", "o--", "training text"),
            (top, "eval", "loss", "o-", "validation text")):
        mine = [r for r in rows if r["kind"] == kind]
        axes.plot([r["step"] for r in mine], [r[key] for r in mine], style, ms=3, lw=1, label=label)
    top.set_ylabel("nats per token")
    below.set(xlabel="step", ylabel="learning rate")
    top.legend(frameon=False)
    with prepare.whole_file(path) as f:
        fig.savefig(f, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------------
# Processes and devices

@contextlib.contextmanager
def processes(flags):
    """What this process is: rank, world, device, cuda, bf16, compiled. Joins the group of torchrun and leaves
    it."""
    rank, local = (int(os.environ.get(k, 0)) for k in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(flags["device"])
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{local}" if device == "cuda" else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    compiled = flags["compile"] == "on" or flags["compile"] == "auto" and cuda
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    need(device != "cpu" or not compiled or shutil.which(compiler),
         "--compile on needs a C++ compiler for the CPU, such as g++: install one, or use --compile off")
    need(world > 1 or flags["fsdp"] == "off", "--fsdp shares a model out among torchrun's processes")
    native = cuda and torch.cuda.is_bf16_supported()
    bf16 = flags["dtype"] == "bfloat16" or flags["dtype"] == "auto" and native
    own_group = world > 1 and not torch.distributed.is_initialized()
    if own_group:
        timeout = datetime.timedelta(minutes=flags["timeout"])
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    try:
        yield types.SimpleNamespace(rank=rank, world=world, device=device, cuda=cuda, bf16=bf16,
                                    compiled=compiled)
    except RuntimeError as e:
        lost = isinstance(e, torch.distributed.DistError) or re.search("(?i)gloo|timed out|peer|nccl", str(e))
        if isinstance(e, torch.OutOfMemoryError) or re.search("out of memory|can't allocate", str(e)):
            raise ValueError("out of memory in a pass: use a smaller --micro_batch") from None
        if world == 1 or not lost:
            raise
        raise ValueError(f"one of {world} processes does not answer (--timeout {flags['timeout']:g} minutes) "
                         f"or has ended: {str(e).splitlines()[0][:150]}") from None
    finally:
        if own_group:
            with contextlib.suppress(RuntimeError):
                torch.distributed.destroy_process_group()


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    need(kind in ("cuda", "mps", "cpu") and (not index or index.isdecimal()) and not name.endswith(":"),
         f"--device {name} is unknown: auto, cuda, cuda:0, mps or cpu")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    need(kind != "cuda" or int(index or 0) < there,
         f"--device {name}: torch sees {there or 'no'} CUDA devices here, use --device cpu")
    need(kind != "mps" or torch.backends.mps.is_available(),
         f"--device {name}: torch sees no Apple GPU here, use --device cpu")
    return name


def set_threads(asked, lm):
    """Sets and returns the number of CPU threads; asked 0: 1 below 5M parameters, where more slow a step
    down, else all."""
    most = 4 * os.cpu_count()                               # torch starts as many as it is told
    need(0 <= asked <= most, f"--threads {asked}: expected 0 to {most}, four per core")
    threads = asked or (1 if lm.num_params() < 5_000_000 else os.cpu_count())
    torch.set_num_threads(threads)
    return threads


def shard(lm, compiled):
    """Fully sharded data parallelism (FSDP2), block by block: gathered for a pass, gradients averaged over
    processes."""
    from torch.distributed.fsdp import fully_shard
    for block in lm.blocks:
        if compiled:
            block.compile(dynamic=False)
        fully_shard(block)
    fully_shard(lm)


def whole(tree):
    """The same tree with every shared-out tensor gathered, on all processes: a checkpoint that loads
    anywhere."""
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
    need(len(states) == len(optimizers), "the checkpoint has the state of other optimizers")
    for optimizer, state in zip(optimizers, states):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {i: {k: share_of(v, params[i]) for k, v in s.items()} for i, s in state["state"].items()}
        optimizer.load_state_dict({**state, "state": moments})

# ------------------------------------------------------------------------------------------------------------
# A step

LOSSES = ("ar", "mdm", "indexer_kl")  # what a step measures, beside the norm of its gradient


def set_stage(lm, flags, step):
    """DeepSeek-V3.2's stages of training, for layers with an indexer: sets and returns "dense", "warmup" or
    "sparse"."""
    ends = {"dense": flags["dense_steps"], "warmup": flags["dense_steps"] + flags["indexer_warmup"]}
    stage = next((name for name, end in ends.items() if step < end), "sparse")
    for block in lm.blocks:
        if hasattr(block.mixer, "stage"):
            block.mixer.stage = stage
    return stage


class Batch:
    """The global batch of each step, this process's share of it, and the gradient of its mean loss.

    The AR rows come first, then the diffusion rows. A process has B / world rows side by side, and takes them
    in parts of one objective and at most `micro` rows.
    """
    def __init__(self, flags, windows, here):
        self.flags, self.windows, self.here, self.recipe = flags, windows, here, recipe(flags)
        T = windows.T
        self.B = B = flags["batch_tokens"] // T
        # Tokens that share one noise level.
        self.block = flags["diffusion_block"] if flags["objective"] == "block" else T
        need(T % self.block == 0, f"--diffusion_block {self.block} must divide block_size {T}")
        self.ar_rows = {"ar": B, "mixed": round(flags["ar_frac"] * B)}.get(flags["objective"], 0)
        need(flags["objective"] != "mixed" or 0 < self.ar_rows < B,
             f"--ar_frac {flags['ar_frac']} makes {self.ar_rows} of the {B} windows in a step AR: a mixed "
             "run needs one of each kind at least, take a larger --batch_tokens or another --ar_frac")
        self.micro = flags["micro_batch"] or max(1, min(B // here.world, (65536 if here.cuda else 8192) // T))
        self.parts = self.parts_of(here.rank)
        equal = len({len(self.parts_of(r)) for r in range(here.world)}) == 1
        need(flags["fsdp"] == "off" or equal,
             "--fsdp needs as many forward passes on each process: choose an --ar_frac that ends where a "
             "process's rows do, or a --micro_batch that divides them")
        self.cut = [here.world, self.micro]

    def attach(self, lm):
        self.lm = lm
        self.used = {}                                      # the parameters that get a gradient, by stage
        self.passes = {"ar": self.ar_pass, "mdm": self.mdm_pass}
        if self.here.compiled and self.flags["fsdp"] == "off":
            self.passes = {k: torch.compile(f, dynamic=False, fullgraph=True) for k, f in self.passes.items()}

    def parts_of(self, rank):
        """[(objective, rows)] of a process."""
        mine = range(self.B * rank // self.here.world, self.B * (rank + 1) // self.here.world)
        ar = min(max(self.ar_rows - mine.start, 0), len(mine))
        return [(kind, rows[i:i + self.micro]) for kind, rows in (("ar", mine[:ar]), ("mdm", mine[ar:]))
                for i in range(0, len(rows), self.micro)]

    def ar_pass(self, x, inputs, masked=None):
        aux = {}                                            # losses that layers add: balance, indexer_kl
        f = lambda idx, **k: self.lm(idx, aux=aux, **k)
        loss = diffusion.ar_loss(f, x, self.lm.mask_id, inputs)
        if masked is not None:
            aux["mir"] = self.recipe["mir"] * diffusion.ar_loss(f, x, self.lm.mask_id, masked)
        return loss, aux

    def mdm_pass(self, x, n, u, order=None):
        aux = {}
        f = lambda idx, **k: self.lm(idx, aux=aux, **k)
        block = self.block if self.block < x.size(1) else None
        return diffusion.mdm_loss(f, x, self.lm.mask_id, (n, u), noise_block=block, pos=order), aux

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
        if values["mask"] or values["random"]:
            inputs = diffusion.corrupt(inputs, bos, values["mask"], values["random"], generator)
        masked = diffusion.corrupt(x, bos, rate() / 2, 0.0, generator) if values["mir"] else None
        return x, inputs, masked

    def to_device(self, x):
        if self.here.cuda:
            x = x.pin_memory()                              # from pageable memory the copy waits for the GPU
        return x.to(self.here.device, non_blocking=True)

    def gradient(self, step, stage):
        """Adds up the gradient of the whole batch. Returns its losses by name, device tensors: ar and mdm as
        shares of the mean over all tokens of the batch, nats per token, and the KL of the indexers, summed
        over layers."""
        flags, here, B = self.flags, self.here, self.B
        per_row = self.windows.T // self.block              # noise levels
        # Noise belongs to the global batch, dropout to a process; both are functions of the step and resume.
        gen = torch.Generator().manual_seed((flags["seed"] << 32) + step)
        torch.manual_seed(-1 - (flags["seed"] << 32) - step * here.world - here.rank)
        x = self.windows.read(self.windows.starts(step * B, B))                 # (B, T)
        noise = diffusion.mdm_noise(B * per_row, self.block, generator=gen)
        if self.recipe["rate"]:
            noise[0].fill_(max(1, round(self.recipe["rate"] * self.block)))
        order = None
        if self.recipe["orders"]:
            numbers = torch.randint(self.recipe["orders"], (B,), generator=gen)
            order = diffusion.reading_order(numbers, x.size(1))
            x = x.gather(1, order)
        targets, inputs, masked = self.ar_inputs(x, gen)
        losses = {name: torch.zeros((), device=here.device) for name in LOSSES}
        for kind, rows in self.parts:
            r = slice(rows.start, rows.stop)
            n = slice(r.start * per_row, r.stop * per_row)
            given = [targets[r], inputs[r]] if kind == "ar" else [x[r], *(a[n] for a in noise)]
            more = masked if kind == "ar" else order
            given += [] if more is None else [more[r]]
            with autocast(here):
                loss, aux = self.passes[kind](*map(self.to_device, given))
            share = len(rows) / B
            learn = loss + sum(aux.values())
            if stage == "warmup" and "indexer_kl" in aux:
                learn = aux["indexer_kl"]
            if flags["fsdp"] == "on":                       # it averages over processes, and this is a sum
                learn = learn * here.world
            (learn * share).backward()
            losses[kind] += loss.detach() * share
            if "indexer_kl" in aux:
                losses["indexer_kl"] += aux["indexer_kl"].detach() * share
        if here.world > 1:
            self.add_up(losses, stage)
        return losses

    def add_up(self, losses, stage):
        """Sums over processes, in one bucket: losses, expert counts, and the gradients where FSDP has not
        done it."""
        if stage not in self.used:                          # by any process; what none uses has no gradient
            params = [] if self.flags["fsdp"] == "on" else list(self.lm.parameters())
            used = torch.tensor([float(p.grad is not None) for p in params], device=self.here.device)
            torch.distributed.all_reduce(used)
            self.used[stage] = [p for p, n in zip(params, used.tolist()) if n]
        for p in self.used[stage]:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        tensors = [p.grad for p in self.used[stage]] + [m.count for m in self.lm.moes()] + [*losses.values()]
        flat = torch.cat([t.reshape(-1) for t in tensors])
        torch.distributed.all_reduce(flat)
        for t, f in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(f.view_as(t))

    def flops_per_token(self):
        """Training FLOPs per token, over the kinds of rows."""
        T, B = self.windows.T, self.B
        ar, mdm = (self.lm.flops_per_token(T, causal=c) for c in (True, False))
        if self.block < T:
            return 2 * ar                                   # two streams
        return (self.ar_rows * ar + (B - self.ar_rows) * mdm) / B


def autocast(here):
    return torch.autocast(torch.device(here.device).type, torch.bfloat16, enabled=here.bf16)


class Meter:
    """What adds up between two lines of the log: the losses and gradient norm of each step, the loads of the
    experts.

    It is part of every checkpoint, so that the line after a resume is the mean of the same steps.
    """
    def __init__(self, lm, state, device):
        self.pending = []                                   # of steps since the last wait for the device
        # (losses..., norm) of each step since the last line
        self.rows = state["meter"]["rows"] if state else []
        self.loads = [torch.zeros_like(m.count) for m in lm.moes()]
        if state:
            self.loads = [a.to(device) for a in state["meter"]["loads"]]

    def add(self, losses, norm, loads):
        self.pending.append(torch.stack([*losses.values(), whole(norm)]))
        self.loads = [a + b for a, b in zip(self.loads, loads)]

    def check(self, lm, step, run):
        """Between evaluations, all that waits for the device. ValueError where a loss, a gradient or now a
        weight is not finite."""
        recent = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        self.rows += recent
        for i, row in enumerate(recent):
            if not math.isfinite(sum(row)):
                what = "gradient" if math.isfinite(sum(row[:-1])) else "loss"
                value = row[-1] if what == "gradient" else sum(row[:-1])
                diverged(f"the {what} became {value}", step - len(recent) + i + 1, run)
        weights = whole(torch.nn.utils.get_total_norm(lm.parameters())).item()
        if not math.isfinite(weights):
            diverged(f"the norm of the weights became {weights}", step, run)

    def line(self, lm, batch):
        """The values of a line: means over the steps since the last one."""
        ar, mdm, kl, _ = (sum(column) / len(self.rows) for column in zip(*self.rows))
        out = {"loss": ar + mdm, "grad_norm": self.rows[-1][-1]}
        if 0 < batch.ar_rows < batch.B:                     # mixed: each in nats per token of its own rows
            out["ar_loss"] = ar * batch.B / batch.ar_rows
            out["mdm_loss"] = mdm * batch.B / (batch.B - batch.ar_rows)
        if kl:
            out["indexer_kl"] = kl
        if self.loads:                                      # per MoE layer
            out["load_ratio"] = [round((a.max() / a.mean()).item(), 4) for a in self.loads]
            out["dead_experts"] = [int((a < 0.1 * a.mean()).sum()) for a in self.loads]
            out["bias_range"] = [round((m.bias.max() - m.bias.min()).item(), 4) for m in lm.moes()]
        self.rows = []
        self.loads = [torch.zeros_like(a) for a in self.loads]
        return out

    def state(self):
        return {"rows": self.rows, "loads": self.loads}


def diverged(what, step, run):
    good = "there is no checkpoint yet"
    if run.saved is not None:
        good = f"the last good checkpoint is {run.folder / 'ckpt_last.pt'} (step {run.saved})"
    raise ValueError(f"{what} at step {step}: lower --lr or raise --warmup; {good}")

# ------------------------------------------------------------------------------------------------------------
# The story

def clock(seconds):
    """90 -> '1m30s'."""
    s = int(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"


def length(flags, windows):
    """(steps of the whole run, steps per epoch, which is a fraction)."""
    per_epoch = windows.U / flags["batch_tokens"]
    epochs = math.ceil(flags["epochs"] * per_epoch) if flags["epochs"] else math.inf
    total = min(epochs, flags["max_steps"] or math.inf)
    return (1000 if total == math.inf else total), per_epoch


def build(flags, config, here, state, trained, source):
    """(model, optimizers). state: the checkpoint to go on from; trained: the one whose weights are taken."""
    torch.manual_seed(flags["seed"])
    lm = LM(config)
    indexed = any(hasattr(b.mixer, "stage") for b in lm.blocks)
    need(indexed or not (flags["dense_steps"] or flags["indexer_warmup"]),
         f"--dense_steps and --indexer_warmup need layers with an indexer (dsa, msa), not {config.layers}")
    set_threads(flags["threads"], lm)
    if trained:
        load_weights(lm, trained, source)
    lm.to(here.device).train()
    if flags["fsdp"] == "on":
        shard(lm, here.compiled)
    optimizers = make_optimizers(lm, flags, here.device)
    if state:
        load_optimizers(optimizers, state["optimizers"])
        torch.set_rng_state(state["rng"])
    return lm, optimizers


def initial(flags, data, log):
    """The checkpoint of --init_from, which must speak the tokens of the data."""
    path = Path(flags["init_from"])
    if path.is_dir() and (path / "ckpt_best.pt").exists():
        path = path / "ckpt_best.pt"
    published = any(path.glob("model*.safetensors"))
    state = load_model(path)[1] if published else load_checkpoint(path)
    theirs = prepare.load_tokenizer(path if path.is_dir() else path.parent)
    need(theirs.vocab == data.tokenizer.vocab, f"{path} was trained on tokens of {theirs.name}, and "
         f"{data.folder} holds tokens of {data.tokenizer.name}: prepare the text with its tokenizer")
    log(f"weights of {path} (step {state['step']}, {state['flags']['objective']})")
    return state, path


def check_resume(flags, state, source, config, data, batch, total, log):
    """What must be as it was for the run to go on as if it had never stopped; and how it goes on."""
    now = dataclasses.asdict(config)
    differ = [f"{k}: {v} != {now.get(k)}" for k, v in state["config"].items() if now.get(k) != v]
    need(not differ, f"the checkpoint's model is another than the flags and data make: {', '.join(differ)}")
    need(state["data"] == data.meta["train_sha256"],
         f"{data.folder} holds other tokens than the ones this run began with: prepare the same text, or "
         f"begin a new run from these weights by --init_from {source}")
    need(not (config.dropout or config.mlp_dropout) or state["cut"] == batch.cut,
         "with dropout a run goes on with its number of processes and its --micro_batch, which were "
         f"{state['cut']} and not {batch.cut}")
    step, planned = state["step"], state["total"]
    need(step <= total, f"the checkpoint is at step {step}, beyond the {total} steps asked for: raise "
                        "--max_steps or --epochs")
    before, after = (learning_rate(step, n, flags) for n in (planned, total))
    log(f"resumed at step {step} from {source}")
    if step == total:
        log("nothing to do: that is the last step; raise --max_steps or --epochs to go on")
    elif after > before:
        log(f"the run was planned for {planned} steps and goes on to {total}: the learning rate rises again, "
            f"from {before:.2e} to {after:.2e}")


class Progress:
    """Where a run stands: its step and its seconds of training, compilation and evaluation left out."""
    def __init__(self, state, total, per_epoch, batch):
        self.step, self.seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        self.total, self.per_epoch = total, per_epoch
        self.tokens = batch.B * batch.windows.T             # per step
        self.flops = batch.flops_per_token()
        # where this call, and where the current line of the log began
        self.first = self.line = (self.step, self.seconds)

    def row(self, kind, **values):
        tokens = self.step * self.tokens
        return {"kind": kind, "step": self.step, "epoch": self.step / self.per_epoch, "tokens": tokens,
                "flops": tokens * self.flops, "seconds": round(self.seconds, 3), **values}

    def seconds_per_step(self):
        return max(1e-9, self.seconds - self.line[1]) / max(1, self.step - self.line[0])

    def eta(self):
        return clock((self.total - self.step) * self.seconds_per_step())

    def leaving(self, flags, here, came):
        """None, "time is up" or "interrupted". Processes decide together, at log steps, or one would wait for
        ever."""
        late = flags["max_minutes"] is not None and self.seconds - self.first[1] >= 60 * flags["max_minutes"]
        why = 2 if came else int(late)                      # on the host: a tensor would wait for every step
        if here.world > 1:
            if self.step % flags["log_every"]:
                return None
            flag = torch.tensor(why, device=here.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            why = int(flag)
        return (None, "time is up", "interrupted")[why]


@contextlib.contextmanager
def signals():
    """A list that gets the signals to stop: Ctrl-C, the end of a job, a closed terminal."""
    came, handlers = [], {}
    with contextlib.suppress(ValueError):                   # not in the main thread: leave them
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                handlers[number] = signal.signal(number, lambda n, _: came.append(n))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def announce(flags, data, windows, lm, batch, here, at, val, evals, run, log):
    many = prepare.count
    log(f"{flags['objective']} | {lm.num_params() / 1e6:.2f}M parameters ({lm.num_params(False) / 1e6:.2f}M "
        f"without embeddings) | {at.flops / 1e6:.2f} MFLOP/token | "
        f"{here.device}, {'bfloat16' if here.bf16 else 'float32'}, "
        f"{'compiled' if here.compiled else 'eager'}, {many(torch.get_num_threads(), 'thread')}, "
        f"{many(here.world, 'process')}")
    log(f"{data.folder} | {windows.U:,} unique tokens ({many(windows.n, 'window')} of {windows.T}) | "
        f"{many(at.total, 'step')} of {at.tokens:,} tokens = {at.total / at.per_epoch:.4g} epochs | "
        f"{many(len(val), 'validation window')}, {many(len(evals), 'evaluation')} | -> {run.folder}")


def measure(lm, flags, here, at, run, val, seen, ends, log):
    """Evaluates and records: the loss of validation and of training windows, and the probe where it is
    due."""
    tic = time.perf_counter()
    set_stage(lm, flags, max(at.step - 1, 0))               # as trained so far
    how = dict(objective=flags["objective"], rows=flags["micro_batch"] or max(1, 16384 // val.size(1)),
               diffusion_block=flags["diffusion_block"])
    orders = recipe(flags)["orders"]
    every, number = flags["probe_every"], len(run.evals()) + 1
    with autocast(here):
        result = evaluate(lm, val, orders=orders, **how)
        result["train_loss"] = evaluate(lm, seen, orders=orders, **how)["loss"]
        if every and (number % every == 0 or at.step >= at.total):
            result |= probe(lm, ends, **how)
    for name, value in result.items():
        if not math.isfinite(value):
            diverged(f"{name} of the evaluation became {value}", at.step, run)
    bpb = result["loss"] / math.log(2) / run.bytes_per_token
    run.record(at.row("eval", **result, bpb=bpb, eval_seconds=round(time.perf_counter() - tic, 3)))
    error = f" +- {result['se']:.4f}" if result["se"] else ""
    known = ("ar_loss", "mdm_loss", "probe_accuracy", "probe_gap")
    more = "".join(f" | {k} {result[k]:.4f}" for k in known if k in result)
    log(f"eval {at.step}/{at.total} | epoch {at.step / at.per_epoch:.2f} | val {result['loss']:.4f}{error} | "
        f"train {result['train_loss']:.4f} | bpb {bpb:.4f}{more}")


def report(meter, lm, batch, here, at, rate, run, log):
    """One line of the log, on the screen and in metrics.jsonl."""
    dt = at.seconds_per_step()
    row = at.row("train", **meter.line(lm, batch), lr=rate, tok_per_s=round(at.tokens / dt))
    run.record(row)
    peak = peak_flops(here.device)
    more = f" | load {max(row['load_ratio']):.2f}" if row.get("load_ratio") else ""
    more += f" | indexer kl {row['indexer_kl']:.4f}" if "indexer_kl" in row else ""
    mfu = f" | mfu {at.flops * at.tokens / dt / peak / here.world:.1%}" if peak else ""
    log(f"step {at.step}/{at.total} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | lr {rate:.2e} | "
        f"norm {row['grad_norm']:.2f}{more} | {dt * 1e3:.1f} ms | {row['tok_per_s']:,} tok/s{mfu} | "
        f"eta {at.eta()}")
    at.line = (at.step, at.seconds)


def snapshot(lm, optimizers, flags, config, data, batch, meter, at):
    """What a checkpoint holds besides the log. rng: for what a layer of yours may draw between two steps."""
    return {"model": whole(lm.state_dict()), "optimizers": [whole(o.state_dict()) for o in optimizers],
            "config": dataclasses.asdict(config), "flags": flags, "step": at.step, "total": at.total,
            "seconds": at.seconds, "data": data.meta["train_sha256"], "cut": batch.cut,
            "meter": meter.state(), "rng": torch.get_rng_state()}


def train(given, log=print):
    """One training run. given: {flag: value} as on the command line. Returns {"out", "step", "finished",
    "evals", ...}."""
    if int(os.environ.get("RANK", 0)) > 0:
        log = lambda line: None
    flags, state, source = settings(given, log)
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(processes(flags))
        data = open_data(flags, here.rank, log)
        trained = state
        if flags["init_from"] and not state:
            trained, source = initial(flags, data, log)
        config = model_config(flags, data.tokenizer.n_vocab, trained and trained["config"])
        T = config.block_size
        windows = train_windows(flags, data, T, here.world)
        val = fixed_windows(data.val, T, flags["eval_windows"])
        # for the gap: the same measure
        seen = fixed_windows(data.train[:windows.U], T, max(1, len(val) // 4))
        ends = probe_items(data.val, T) if flags["probe_every"] else None
        total, per_epoch = length(flags, windows)
        evals = eval_steps(flags, total, per_epoch)
        batch = Batch(flags, windows, here)
        if state:
            check_resume(flags, state, source, config, data, batch, total, log)
        lm, optimizers = build(flags, config, here, state, trained, source)
        batch.attach(lm)
        at = Progress(state, total, per_epoch, batch)
        meter = Meter(lm, state, here.device)
        run = stack.enter_context(contextlib.closing(Run(flags, state, source, here.rank, log)))
        run.describe(flags, config, here.device, data, val)
        announce(flags, data, windows, lm, batch, here, at, val, evals, run, log)
        came = stack.enter_context(signals())
        keep = lambda: run.save(snapshot(lm, optimizers, flags, config, data, batch, meter, at))
        leave = None
        while True:
            if (at.step in evals or leave == "time is up") and not run.evaluated(at.step):
                try:
                    measure(lm, flags, here, at, run, val, seen, ends, log)
                except RuntimeError:                        # out of memory: the training is not lost
                    keep()
                    raise
                keep()
            if leave or at.step == total:
                break
            tic = time.perf_counter()
            stage = set_stage(lm, flags, at.step)
            losses = batch.gradient(at.step, stage)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), flags["grad_clip"] or math.inf)
            meter.add(losses, norm, [m.balance(stage != "warmup") for m in lm.moes()])
            rate = learning_rate(at.step, total, flags)
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = rate
                o.step()
                o.zero_grad(set_to_none=True)
            at.step += 1
            told = at.step == at.first[0] + 2  # after the first step, which compiles and warms up
            line = at.step % flags["log_every"] == 0 or at.step in (1, total)
            due = at.step % flags["save_every"] == 0 and at.step not in evals
            leave = at.leaving(flags, here, came)
            if line or due or told or leave or at.step in evals:
                meter.check(lm, at.step, run)               # waits for the device
            if not (here.compiled and at.step == at.first[0] + 1):
                at.seconds += time.perf_counter() - tic
            if line:
                report(meter, lm, batch, here, at, rate, run, log)
            elif told:
                log(f"{at.seconds_per_step() * 1e3:.0f} ms per step, about {at.eta()} to go")
            if due:
                keep()
        if run.changed or run.saved != at.step:
            keep()
        if here.rank == 0:
            draw(run.rows, run.folder / "loss.png")
        if flags["fsdp"] == "on" and here.rank == 0:
            # one process alone cannot run a model that is shared out, and the others do not wait for the file
            lm = load_model(run.folder, "last")[0]
    if at.step < total:
        log(f"{leave} at step {at.step} of {total}: saved. Go on with: python train.py --resume auto --out "
            f"{shlex.quote(str(run.folder))}")
    return {"out": str(run.folder), "flags": flags, "step": at.step, "seconds": at.seconds,
            "finished": at.step == total, "stopped": leave == "interrupted", "evals": run.evals(),
            "best": run.best, "params": lm.num_params(), "lm": lm, "tokenizer": data.tokenizer}


def show_sample(result, n=200):
    """A short sample of the run's last model, as text; also written to samples.txt."""
    lm, objective = result["lm"], result["flags"]["objective"]
    device = lm.embed.weight.device
    # a canvas with every place to fill
    x = torch.full((1, min(n, lm.config.block_size)), lm.mask_id, device=device)
    gen = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)
    lm.eval()
    if objective == "block":
        size = result["flags"]["diffusion_block"]
        ids = diffusion.sample_block(lm, x, lm.mask_id, size, order="random", generator=gen)
    elif objective == "mdm":
        ids = diffusion.sample_mdm(lm, x, lm.mask_id, order="random", generator=gen)
    else:
        ids = diffusion.sample_ar(lm, x, lm.mask_id, generator=gen)
    text = result["tokenizer"].decode(ids[0].tolist())
    with prepare.whole_file(Path(result["out"]) / "samples.txt", "w") as f:
        f.write(text + "\n")
    return text


def main(argv=None):
    prepare.console()
    rank = int(os.environ.get("RANK", 0))
    try:
        result = train(parse_flags(argv))
        if rank == 0 and not result["stopped"]:
            print(f"---\nbest validation loss {result['best']:.4f} nats/token, "
                  f"{clock(result['seconds'])} of training. A sample:\n")
            print(show_sample(result))
            print(f"\nmore: python sample.py {shlex.quote(result['out'])}")
    except (ValueError, OSError, MemoryError) as e:
        if rank == 0:                                       # the others have the same to say
            prepare.complain("train.py", e)
        return 2
    except KeyboardInterrupt:                               # before the first step, or in the sample
        print("train.py: interrupted outside of training; nothing that was saved is lost", file=sys.stderr)
        return 130
    return 130 if result["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())
