"""Train a language model, autoregressive or masked diffusion, on as few or as many unique tokens as you like.

    python train.py                                                  # three minutes on a laptop, seconds on a GPU
    python train.py --objective mdm --unique_tokens 30000 --epochs 100
    python train.py --resume auto --out out/NAME --max_steps 5000    # go on with a run
    torchrun --standalone --nproc_per_node=8 train.py --preset gpt2 --dataset fineweb10B

Flags: python train.py --help. A run is a folder: config.json, metrics.jsonl, ckpt_last.pt, ckpt_best.pt, samples.txt.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch: spinning threads on a busy machine cost 20x
import numpy as np
import torch

import diffusion
import prepare
from model import LM, PRESETS, ModelConfig, from_preset, nearest, override, parse_value

# name: (default, help). A default of None means "chooses itself" or "from the preset", as the help says.
FLAGS = {
    "data": {
        "dataset": ("docs", "name under data/ or a folder with train.bin and val.bin; `docs` is made if missing"),
        "unique_tokens": (None, "train on the first U tokens only, again and again (default: all)"),
        "epochs": (None, "passes over the unique tokens"),
        "max_steps": (None, "optimizer steps; with --epochs the smaller of both (default: 1000 when neither is given)"),
        "block_size": (None, "tokens in a window (default: from the preset)"),
        "seed": (1337, "of the initialisation, the order of windows and the noise"),
    },
    "objective": {
        "objective": ("ar", "ar | mdm (masked diffusion) | mixed (one network, both losses) | block (block diffusion)"),
        "diffusion_block": (16, "block: tokens in a block, AR over blocks and diffusion inside"),
        "ar_frac": (0.5, "mixed: share of each batch that is trained as AR"),
        "input_mask": (0.0, "share of AR's input tokens replaced by the mask token, a regulariser"),
        "token_noise": (0.0, "share of AR's input tokens replaced by random tokens, a regulariser"),
        "dense_steps": (0, "layers with an indexer (dsa, msa): first so many steps with dense attention,"),
        "indexer_warmup": (0, "then so many in which the indexer alone learns, then sparse attention"),
    },
    "model": {
        "preset": ("small", f"what kind of model; sizes are free, below and by --set: {', '.join(PRESETS)}"),
        "layers": (None, "layer pattern, such as 'full(window=64)*3 full'"),
        "n_layer": (None, "blocks"),
        "n_head": (None, "attention heads"),
        "n_kv_head": (None, "key/value heads, fewer than n_head for grouped queries"),
        "n_embd": (None, "width"),
        "mlp": (None, "swiglu | relu2 | gelu"),
        "dropout": (None, "on the embedding and on what each block adds"),
        "set": ([], "key=value ...: any other field of ModelConfig"),
    },
    "optimizer": {
        "optimizer": ("adamw", "adamw | muon (hidden matrices; AdamW for the rest)"),
        "lr": (2e-3, "peak learning rate"),
        "min_lr": (0.0, "learning rate at the end of the schedule"),
        "schedule": ("wsd", "wsd (constant, linear decay over the last fifth) | cosine | constant, all after the warm-up"),
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
        "max_minutes": (None, "stop and save after so many minutes of training in this call"),
        "threads": (0, "CPU threads; 0: 1 for models below 5M parameters, else all cores"),
    },
    "output": {
        "out": (None, "run folder (default: out/<something telling>)"),
        "eval_every": (250, "steps between evaluations, 0 = only at the end"),
        "eval_epochs": (None, "evaluate at these epochs instead: 1,2,4 or geometric (12 points) or geometric:N"),
        "eval_windows": (256, "fixed validation windows to evaluate on, 0 = all"),
        "probe_every": (0, "also tell the true ends of passages from others, at every N-th evaluation and the last; 0 = never"),
        "save_every": (1000, "steps between checkpoints, besides those at evaluations and at the end"),
        "log_every": (20, "steps between log lines"),
        "resume": (None, "auto: from --out's last checkpoint if there is one; or PATH of a checkpoint or run folder"),
    },
}
DEFAULTS = {name: default for group in FLAGS.values() for name, (default, _) in group.items()}
KIND = {"unique_tokens": int, "epochs": float, "max_steps": int, "block_size": int, "n_layer": int, "n_head": int,
        "n_kv_head": int, "n_embd": int, "dropout": float, "micro_batch": int, "max_minutes": float}
# These may differ between a checkpoint and the run that resumes it; all other flags shape the trajectory.
FREE = {"epochs", "max_steps", "max_minutes", "micro_batch", "device", "dtype", "compile", "threads", "out", "eval_every",
        "eval_epochs", "eval_windows", "probe_every", "save_every", "log_every", "resume"}
CHOICES = {"objective": ("ar", "mdm", "mixed", "block"), "schedule": ("wsd", "cosine", "constant"), "optimizer": ("adamw", "muon"),
           "dtype": ("auto", "bfloat16", "float32"), "compile": ("auto", "on", "off"), "preset": tuple(PRESETS)}

# Dense bf16 peak by device name, from the makers' data sheets, for MFU. Unknown devices get none, never a guess.
PEAK_FLOPS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12,
              "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_flops(device):
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


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
            if name == "set":
                group.add_argument("--set", nargs="+", action="extend", metavar="KEY=VALUE", help=text)
            else:
                group.add_argument(f"--{name}", type=KIND.get(name, str if default is None else type(default)),
                                   metavar=name.upper(), help=text.replace("%", "%%"))
    return vars(parser.parse_args(argv))


def check(flags):
    for name, choices in CHOICES.items():
        if flags[name] not in choices:
            raise ValueError(f"--{name} {flags[name]} is unknown{nearest(flags[name], choices)}: one of {', '.join(choices)}")
    for name in ("epochs", "max_steps", "unique_tokens", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd",
                 "micro_batch", "max_minutes", "lr", "log_every", "save_every", "batch_tokens", "diffusion_block"):
        if flags[name] is not None and not 0 < flags[name] < math.inf:
            raise ValueError(f"--{name} {flags[name]} must be above 0" + " and finite" * (flags[name] == math.inf))
    for name in ("ar_frac", "input_mask", "token_noise", "dropout", "beta2"):
        if flags[name] is not None and not 0 <= flags[name] <= 1:
            raise ValueError(f"--{name} {flags[name]} must lie between 0 and 1")
    for name in ("eval_every", "eval_windows", "probe_every", "dense_steps", "indexer_warmup", "warmup", "weight_decay", "min_lr",
                 "grad_clip", "threads"):
        if flags[name] < 0:
            raise ValueError(f"--{name} {flags[name]} must not be negative")
    if not 0 <= flags["seed"] < 2 ** 31:
        raise ValueError(f"--seed {flags['seed']} must lie between 0 and {2 ** 31 - 1}")
    if (flags["input_mask"] or flags["token_noise"]) and flags["objective"] in ("mdm", "block"):
        raise ValueError(f"--input_mask and --token_noise damage what AR reads, and --objective {flags['objective']} has no AR rows: leave them out")


def model_config(flags, vocab_size=None):
    """ModelConfig from --preset, then the model flags, then --set. vocab_size: the tokenizer's, None keeps the preset's."""
    values = {}
    for name in ("block_size", "layers", "n_layer", "n_head", "n_kv_head", "n_embd", "mlp", "dropout"):
        if flags[name] is not None:
            values[name] = flags[name]
    for pair in flags["set"]:
        key, eq, value = pair.partition("=")
        if not eq:
            raise ValueError(f"--set {pair} is not of the form key=value")
        values[key] = parse_value(value)
    if vocab_size is not None:
        if values.setdefault("vocab_size", vocab_size) != vocab_size:
            raise ValueError(f"--set vocab_size={values['vocab_size']}: it is the tokenizer's, {vocab_size}; leave it out, or prepare the "
                             "text with another --tokenizer")
    for key, value in PRESETS[flags["preset"]].items():                                # sizes are free, names and switches are not
        if isinstance(value, (str, bool)) and values.get(key, value) != value:
            raise ValueError(f"--preset {flags['preset']} fixes {key}={value}: leave {key}={values[key]} out, or take another preset")
    return from_preset(flags["preset"], **values)

# ---------------------------------------------------------------------------------------------------------------------
# Data

class Windows:
    """The repeating loader: windows of T tokens over the first U, a pure function of (seed, window number).

    Each epoch is a fresh permutation of the U // T windows with a fresh offset on the ring of U tokens, so every unique
    token is seen exactly once an epoch, in ever other windows. Batches run across epoch boundaries. The number of
    processes changes nothing, and an AR run and a diffusion run of one seed read the same windows in the same order.
    """
    def __init__(self, data, unique_tokens, block_size, seed, device="cpu"):
        self.T, self.n = block_size, unique_tokens // block_size                       # n windows an epoch
        self.U, self.seed, self.epoch = self.n * block_size, seed, None
        # torch knows little of uint16, so the bits travel as signed numbers and are cut when read
        self.bits = 8 * data.dtype.itemsize
        self.tokens = torch.from_numpy(np.array(data[:self.U]).view(f"int{self.bits}")).to(device)

    def starts(self, first, count):
        """First token of the windows first, first + 1, ... since the start of training."""
        out = np.empty(count, dtype=np.int64)
        for i, k in enumerate(range(first, first + count)):
            if k // self.n != self.epoch:
                self.epoch = k // self.n
                rng = np.random.default_rng([self.seed, self.epoch])
                self.offset, self.order = rng.integers(self.U), rng.permutation(self.n)
            out[i] = (self.offset + self.order[k % self.n] * self.T) % self.U
        return torch.from_numpy(out)

    def read(self, starts):
        """(B,) -> (B, T) int64 on the loader's device."""
        index = starts.to(self.tokens.device, non_blocking=True)[:, None] + torch.arange(self.T, device=self.tokens.device)
        return self.tokens[index % self.U].long() & (2 ** self.bits - 1)


def fixed_windows(data, T, count):
    """(N, T) int64: up to `count` (0: all) whole windows spread evenly over data; the same for every run."""
    n = len(data) // T
    pick = np.linspace(0, n - 1, min(count or n, n)).round().astype(np.int64)
    return torch.from_numpy(np.stack([data[i * T:(i + 1) * T] for i in pick]).astype(np.int64))


def eval_steps(flags, total, steps_per_epoch):
    """The steps before which the model is evaluated."""
    spec = flags["eval_epochs"]
    if spec is None:
        return {*range(0, total, flags["eval_every"])} - {0} | {total} if flags["eval_every"] else {total}
    try:
        if spec.startswith("geometric"):
            points, last = int(spec[10:] or 12), total / steps_per_epoch
            epochs = np.geomspace(min(1.0, last), last, points)
        else:
            epochs = [float(e) for e in spec.split(",")]
        if not all(0 < e < math.inf for e in epochs):
            raise ValueError
    except ValueError:
        raise ValueError(f"--eval_epochs {spec} is neither a list of epochs such as 1,2,4 nor geometric nor geometric:N") from None
    return {min(total, max(1, round(e * steps_per_epoch))) for e in epochs} | {total}

# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

def orthogonalise(G, steps=5):
    """Newton-Schulz iteration of Muon (Keller Jordan, 2024): pushes all singular values of G (..., m, n) towards 1.

    The quintic's coefficients trade exactness (values end in about [0.7, 1.2]) for slope at zero. bf16 is enough, and faster
    on a GPU; on a CPU float32 is.
    """
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32).reshape(-1, *G.shape[-2:])
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        A = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, A, X, beta=3.4445)                                        # 3.4445 X - 4.775 A X + 2.0315 A A X
    return (X.mT if tall else X).reshape(G.shape)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for hidden matrices (..., m, n); all matrices of one shape in one batched call.

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
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                nesterov = torch.stack([p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params])
                update = orthogonalise(nesterov) * (0.2 * max(shape[-2:]) ** 0.5)
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.to(p.dtype), alpha=-group["lr"])


def make_optimizers(lm, flags, device):
    """Every parameter in exactly one group: matrices decay, vectors (norms, biases, gates) and short convolutions do not.

    The experts' biases (E, width) are vectors, too, though their shape is a matrix's; so are nsa's positions in a window.
    """
    params = dict(lm.named_parameters())
    decays = {n for n, p in params.items() if p.ndim >= 2 and not n.endswith(("bias", "conv_weight", "window_pos"))}
    muon = {n for n in decays if n.startswith("blocks.") and flags["optimizer"] == "muon"}
    groups = [[p for n, p in params.items() if n not in muon and n in decays],
              [p for n, p in params.items() if n not in muon and n not in decays]]
    fused = torch.device(device).type in ("cuda", "cpu")
    optimizers = [torch.optim.AdamW([dict(params=groups[0], weight_decay=flags["weight_decay"]),
                                     dict(params=groups[1], weight_decay=0.0)],
                                    lr=flags["lr"], betas=(0.9, flags["beta2"]), eps=1e-8, fused=fused)]
    if muon:
        optimizers.append(Muon([params[n] for n in sorted(muon)], lr=flags["lr"], weight_decay=flags["weight_decay"]))
    grouped = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(grouped) == len(params) and set(grouped) == set(params.values()), "a parameter is in no group or in two"
    return optimizers


def learning_rate(step, total, flags):
    """Of step 0, 1, ...: a pure function, so a resumed run with another --max_steps follows the new schedule."""
    peak, low = flags["lr"], flags["min_lr"]
    if step < flags["warmup"]:
        return peak * (step + 1) / flags["warmup"]
    if flags["schedule"] == "cosine":
        done = (step - flags["warmup"]) / max(1, total - flags["warmup"])
        return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * min(1.0, done)))
    if flags["schedule"] == "wsd":
        return low + (peak - low) * min(1.0, (total - step) / max(1, 0.2 * total))
    return peak

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and checkpoints

@torch.no_grad()
def evaluate(lm, windows, objective, rows=64, seed=0, n_mc=4, diffusion_block=None):
    """Loss of fixed windows (N, T), nats per token: {"loss", "se", ...}; AR exact, diffusion a bound with its s.e.

    A mixed model is scored both ways (ar_loss, mdm_loss); `loss` is the smaller, since each bounds the same likelihood.
    Its own generator and eval mode: training does not notice. se is the Monte Carlo error of the masks alone.
    """
    was_training, device = lm.training, lm.embed.weight.device
    lm.eval()
    out = {}
    if objective in ("ar", "mixed"):
        nats = sum(diffusion.ar_loss(lm, x.to(device), lm.mask_id).item() * len(x) for x in windows.split(rows))
        out["ar_loss"], out["se"] = nats / len(windows), 0.0
    if objective != "ar":
        gen = torch.Generator().manual_seed(seed)
        out["mdm_loss"], out["se"] = diffusion.mdm_nll(lm, windows.to(device), lm.mask_id, n_mc, gen, batch_size=rows,
                                                       noise_block=diffusion_block if objective == "block" else None)
    out["loss"] = min(out[k] for k in ("ar_loss", "mdm_loss") if k in out)
    if objective != "mixed":
        out = {"loss": out["loss"], "se": out["se"]}
    lm.train(was_training)
    return out


def probe_items(val_data, T, count=128):
    """(N, 4, T) int64, at most `count` passages of the validation tokens with four ends each, the true one first.

    An end is a quarter of the window, at most 16 tokens. The wrong ones are the true ends of passages far away, so every
    end is right once and wrong three times: what is more probable on its own gains nothing, and chance is 25%.
    """
    x, K = fixed_windows(val_data, T, count), max(1, min(16, T // 4))
    if len(x) < 4 or T < 2:
        raise ValueError(f"the probe needs 4 validation windows of at least 2 tokens, and there are {len(x)} of {T}: use more text")
    items = x[:, None].repeat(1, 4, 1)                                                 # (N, 4, T)
    for j in range(1, 4):
        items[:, j, -K:] = x.roll(-(j * len(x) // 4), 0)[:, -K:]
    return items


@torch.no_grad()
def probe(lm, items, objective, rows=64, n_mc=8, seed=0, diffusion_block=None):
    """{"probe_accuracy", "probe_gap"} of `probe_items`: the share in which the true end is the most probable of the four, and
    the mean of wrong minus true -log p, in nats of an end. AR and mixed: exact; else the bound, the four ends under the
    same masks. Like `evaluate` it is deterministic and training does not notice."""
    was_training, (N, _, T), x = lm.training, items.shape, items.flatten(0, 1).to(lm.embed.weight.device)
    K = max(1, min(16, T // 4))
    lm.eval()
    if objective in ("ar", "mixed"):
        nats = torch.cat([diffusion.ar_loss(lm, w, lm.mask_id, reduction="none")[:, -K:].sum(1).cpu() for w in x.split(rows)])
    else:
        nats, _ = diffusion.mdm_nll(lm, x, lm.mask_id, n_mc, torch.Generator().manual_seed(seed), batch_size=rows, per_row=True,
                                    scored=(torch.arange(T) >= T - K).expand(len(x), -1), group=torch.arange(N).repeat_interleave(4),
                                    noise_block=diffusion_block if objective == "block" else None)
        nats = nats * K
    lm.train(was_training)
    true, wrong = nats.view(N, 4).split([1, 3], dim=1)
    return {"probe_accuracy": (true < wrong).all(1).double().mean().item(), "probe_gap": (wrong.mean(1) - true[:, 0]).mean().item()}


def save_atomic(state, path):
    """Write beside the final name, then rename: a cut-off or a full disk leaves the previous checkpoint whole."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        raise ValueError(f"cannot write {path}: {e.strerror}") from None


def load_checkpoint(path):
    """The dictionary that train.py saved: plain types and tensors only."""
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt_last.pt"
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}: name a run folder that train.py wrote")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ValueError(f"{path} is truncated or not a checkpoint of train.py: use ckpt_best.pt or an older copy") from None


def other_settings(state, given):
    """The flags that make another run of a checkpoint's: ["--lr 0.1 (checkpoint: 0.2)", ...]."""
    known = {**DEFAULTS, **state["flags"]}
    return [f"--{k} {v} (checkpoint: {known[k]})" for k, v in given.items() if k not in FREE and v != known[k]]


def set_stage(lm, flags, step):
    """DeepSeek-V3.2's stages of training, for layers with an indexer: returns that of the step, "dense", "warmup" or "sparse"."""
    dense = flags.get("dense_steps", 0)
    stage = "dense" if step < dense else "warmup" if step < dense + flags.get("indexer_warmup", 0) else "sparse"
    for block in lm.blocks:
        if hasattr(block.mixer, "stage"):
            block.mixer.stage = stage
    return stage


def load_model(path, which="best", device="cpu"):
    """(lm in eval mode, checkpoint dictionary) from a run folder (ckpt_best.pt or ckpt_last.pt) or a checkpoint file."""
    path = Path(path)
    if path.is_dir():
        path = path / (f"ckpt_{which}.pt" if (path / f"ckpt_{which}.pt").exists() else "ckpt_last.pt")
    state = load_checkpoint(path)
    lm = LM(override(ModelConfig(), state["config"]))
    lm.load_state_dict(state["model"])
    set_stage(lm, state["flags"], max(state["step"] - 1, 0))                           # as in its last step
    return lm.to(device).eval(), state


def set_threads(asked, lm):
    """Sets and returns the number of CPU threads; asked 0: 1 below 5M parameters, where more of them slow a step down, else all."""
    if not 0 <= asked <= 1024:                  # torch starts as many as it is told, and dies of it
        raise ValueError(f"--threads {asked}: expected 0 to 1024")
    threads = asked or (1 if lm.num_params() < 5_000_000 else os.cpu_count())
    torch.set_num_threads(threads)
    return threads


def pick_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "mps", "cpu") or index and not index.isdecimal():
        raise ValueError(f"--device {name} is unknown: auto, cuda, cuda:0, mps or cpu")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count() or 'no'} CUDA devices here, use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: torch sees no Apple GPU here, use --device cpu")
    return name


def clock(seconds):
    """90 -> '1m30s'."""
    s = int(seconds)
    return f"{s // 3600}h{s % 3600 // 60:02d}m" if s >= 3600 else f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"

# ---------------------------------------------------------------------------------------------------------------------
# The run

def train(given, log=print):
    """One training run. given: {flag: value} as on the command line. Returns {"out", "step", "finished", "evals", ...}."""
    for name in given:
        if name not in DEFAULTS:
            raise ValueError(f"unknown flag --{name}{nearest(name, DEFAULTS)}")
    flags = {**DEFAULTS, **given}

    # ---- resume: the flags of the checkpoint are the defaults, and those that shape the trajectory are fixed
    state, target = None, flags["resume"]
    if target == "auto":
        target = flags["out"] if flags["out"] and (Path(flags["out"]) / "ckpt_last.pt").exists() else None
    if target:
        state = load_checkpoint(target)
        known = {k: v for k, v in state["flags"].items() if k in DEFAULTS}
        if wrong := other_settings(state, given):
            raise ValueError(f"cannot resume {target} with other settings: {', '.join(wrong)}")
        flags = {**flags, **known, **given}
        if not given.get("out"):
            flags["out"] = str(Path(target) if Path(target).is_dir() else Path(target).parent)
    check(flags)

    # ---- processes, device, number format
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(flags["device"])
    if device.startswith("cuda"):
        device = f"cuda:{local}" if device == "cuda" else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    own_group = world > 1 and not torch.distributed.is_initialized()
    if own_group:
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank > 0:
        log = lambda *_, **__: None
    cuda = device.startswith("cuda")
    bf16 = flags["dtype"] == "bfloat16" or flags["dtype"] == "auto" and cuda and torch.cuda.is_bf16_supported()
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    compiled = flags["compile"] == "on" or flags["compile"] == "auto" and cuda
    if compiled and device == "cpu" and not shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        raise ValueError("--compile on needs a C++ compiler for the CPU, such as g++: install one, or use --compile off")

    # ---- data
    folder = prepare.dataset_folder(flags["dataset"])
    if flags["dataset"] == "docs" and not (folder / "meta.json").exists() and rank == 0:
        log("preparing the default data (once)")
        prepare.prepare("docs")
    if world > 1:
        torch.distributed.barrier()
    train_data, val_data, meta = prepare.load_dataset(folder)
    tokenizer = prepare.load_tokenizer(folder)
    config = model_config(flags, tokenizer.n_vocab)
    T, U = config.block_size, flags["unique_tokens"] or len(train_data)
    if U > len(train_data):
        raise ValueError(f"--unique_tokens {U:,} is more than the {len(train_data):,} training tokens of {folder}")
    if T > U or T > len(val_data):
        raise ValueError(f"block_size {T} is larger than the {'unique tokens' if T > U else 'validation set'} "
                         f"({min(U, len(val_data)):,} tokens): use a smaller --block_size")
    if flags["batch_tokens"] % (T * world):
        raise ValueError(f"--batch_tokens {flags['batch_tokens']} must be a multiple of block_size x processes = {T * world}: "
                         "change it or --block_size")
    windows = Windows(train_data, U, T, flags["seed"], device)
    B = flags["batch_tokens"] // T                                                     # windows in a step, all processes
    val = fixed_windows(val_data, T, flags["eval_windows"])
    seen = fixed_windows(train_data[:windows.U], T, max(1, len(val) // 4))             # for the gap: the same measure
    bytes_per_token = tokenizer.token_bytes[val.numpy()].sum() / val.numel()
    ends = probe_items(val_data, T) if flags["probe_every"] else None

    block = flags["diffusion_block"] if flags["objective"] == "block" else T           # tokens that share one noise level
    if T % block:
        raise ValueError(f"--diffusion_block {block} must divide block_size {T}")
    ar_rows = {"ar": B, "mixed": round(flags["ar_frac"] * B)}.get(flags["objective"], 0)
    if flags["objective"] == "mixed" and not 0 < ar_rows < B:
        raise ValueError(f"--ar_frac {flags['ar_frac']} makes {ar_rows} of the {B} windows in a step AR: a mixed run needs one of each kind "
                         "at least, take a larger --batch_tokens or another --ar_frac")

    # ---- length
    per_epoch = windows.U / flags["batch_tokens"]                                      # steps, a fraction
    total = min(math.ceil(flags["epochs"] * per_epoch) if flags["epochs"] else 10 ** 12, flags["max_steps"] or 10 ** 12)
    total = 1000 if total == 10 ** 12 else total
    evals = eval_steps(flags, total, per_epoch)

    # ---- model
    torch.manual_seed(flags["seed"])
    lm = LM(config)
    indexed = any(hasattr(b.mixer, "stage") for b in lm.blocks)
    if (flags["dense_steps"] or flags["indexer_warmup"]) and not indexed:
        raise ValueError(f"--dense_steps and --indexer_warmup need layers with an indexer (dsa, msa), and --layers is {config.layers}")
    threads = set_threads(flags["threads"], lm)
    lm.to(device).train()
    optimizers = make_optimizers(lm, flags, device)
    step, seconds, best = 0, 0.0, math.inf
    if state:
        differ = [f"{k}: {v} != {getattr(config, k, None)}" for k, v in state["config"].items() if getattr(config, k, None) != v]
        if differ:
            raise ValueError(f"the checkpoint's model is another one than the flags and data make: {', '.join(differ)}")
        lm.load_state_dict(state["model"])
        for o, s in zip(optimizers, state["optimizers"]):
            o.load_state_dict(s)
        torch.set_rng_state(state["rng"])
        if cuda and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        step, seconds, best = state["step"], state["seconds"], state["best"]
        if state["data"] != meta["train_sha256"]:
            raise ValueError(f"{folder} holds other tokens than the ones this run began with: prepare the same text, or start a new run")
        if step > total:
            raise ValueError(f"the checkpoint is at step {step}, beyond the {total} steps asked for: raise --max_steps or --epochs")

    # ---- run folder
    name = f"{folder.name}-{flags['objective']}-{config.n_layer}x{config.n_embd}"
    out = Path(flags["out"] or f"out/{name}")
    if not flags["out"]:
        out = next(p for i in range(1, 10 ** 6) for p in [Path(f"out/{name}" + (f"-{i}" if i > 1 else ""))] if not p.exists())
    elif not state and (out / "ckpt_last.pt").exists():
        raise ValueError(f"{out} already holds a run: go on with it by --resume auto, or choose another --out")
    flags["out"], metrics = str(out), out / "metrics.jsonl"
    logged = []
    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if metrics.exists():                                                       # drop what came after the checkpoint
                whole = [line for line in metrics.read_text().splitlines() if line.endswith("}")]  # a killed run may leave half a line
                logged = [r for r in map(json.loads, whole) if state and r["step"] <= step]
            metrics.write_text("".join(json.dumps(r) + "\n" for r in logged))
            versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
            (out / "config.json").write_text(json.dumps({"flags": flags, "model": dataclasses.asdict(config),
                                                         "device": device, "versions": versions}, indent=1))
            for f in folder.iterdir():
                if f.suffix != ".bin" and f.is_file():                                 # meta.json and the tokenizer
                    shutil.copy(f, out / f.name)
        except OSError as e:
            raise ValueError(f"cannot write the run folder {out}: {e.strerror}") from None
    eval_log = [r for r in logged if r["kind"] == "eval"]
    logged = None

    # ---- batches: the AR rows of a global batch come first, then the diffusion rows
    micro = flags["micro_batch"] or max(1, min(B // world, (65536 if cuda else 8192) // T))
    bos = mask = lm.mask_id
    parts = []                                                                         # (objective, rows) of this process
    for kind, lo, hi in (("ar", 0, ar_rows), ("mdm", ar_rows, B)):
        mine = range(lo + (hi - lo) * rank // world, lo + (hi - lo) * (rank + 1) // world)
        parts += [(kind, mine[i:i + micro]) for i in range(0, len(mine), micro)]

    def ar_part(x, inputs):
        aux = {}                                                                       # losses that layers add: balance, ...
        return diffusion.ar_loss(lambda idx, **k: lm(idx, aux=aux, **k), x, bos, inputs=inputs), aux

    def mdm_part(x, n, u):
        aux = {}
        return diffusion.mdm_loss(lambda idx, **k: lm(idx, aux=aux, **k), x, mask, noise=(n, u),
                                  noise_block=block if block < T else None), aux

    if compiled:
        ar_part, mdm_part = (torch.compile(f, dynamic=False, fullgraph=True) for f in (ar_part, mdm_part))

    def gradients(step, stage):
        """Adds up the gradient of the whole batch; returns a device tensor: its mean loss by objective, nats per token, and
        the KL of the indexers (the layers' sum)."""
        gen = torch.Generator().manual_seed((flags["seed"] << 32) + step)              # the noise of the whole global batch
        starts, noise = windows.starts(step * B, B), diffusion.mdm_noise(B * T // block, block, generator=gen)
        if cuda:                                                                       # from pageable memory the copy waits for the GPU
            starts, noise = starts.pin_memory(), [a.pin_memory() for a in noise]
        losses = torch.zeros(3, device=device)                                         # AR, diffusion, and the indexers'
        x = inputs = windows.read(starts)                                              # (B, T)
        if flags["input_mask"] or flags["token_noise"]:
            inputs = diffusion.corrupt(x, mask, flags["input_mask"], flags["token_noise"], gen)
        for kind, rows in parts:
            r = slice(rows.start, rows.stop)
            with autocast:
                if kind == "ar":
                    loss, aux = ar_part(x[r], inputs[r])
                else:
                    n = slice(r.start * T // block, r.stop * T // block)               # noise: a row for each block
                    loss, aux = mdm_part(x[r], *(a[n].to(device, non_blocking=True) for a in noise))
            learn = aux["indexer_kl"] if indexed and stage == "warmup" else loss + sum(aux.values())
            (learn * (len(rows) / B)).backward()
            losses[int(kind == "mdm")] += loss.detach() * (len(rows) / B)
            if "indexer_kl" in aux:
                losses[2] += aux["indexer_kl"].detach() * (len(rows) / B)
        if world > 1:
            grads = [p.grad for p in lm.parameters() if p.grad is not None] + [losses] + [m.count for m in lm.moes()]
            flat = torch.cat([g.reshape(-1) for g in grads])                           # one bucket, one all_reduce
            torch.distributed.all_reduce(flat)
            for g, f in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(f.view_as(g))
        return losses

    # ---- what will happen
    flops = [lm.flops_per_token(T, causal=c) for c in (True, False)]
    flops_per_token = (ar_rows * flops[0] + (B - ar_rows) * flops[1]) / B if block == T else 2 * flops[0]  # two streams
    peak = peak_flops(device)
    log(f"{flags['objective']} | {lm.num_params() / 1e6:.2f}M parameters ({lm.num_params(False) / 1e6:.2f}M without embeddings) | "
        f"{flops_per_token / 1e6:.2f} MFLOP/token | {device}, {'bfloat16' if bf16 else 'float32'}, "
        f"{'compiled' if compiled else 'eager'}, {threads} thread{'s' * (threads > 1)}, {world} process{'es' * (world > 1)}")
    log(f"{folder} | {windows.U:,} unique tokens ({windows.n} windows of {T}) | {total} steps of {flags['batch_tokens']:,} tokens = "
        f"{total / per_epoch:.4g} epochs | {len(val)} validation windows, {len(evals)} evaluations | -> {out}")
    if state:
        log(f"resumed at step {step} from {target}")

    def save(which="last"):
        if rank == 0:
            save_atomic({"version": 1, "model": lm.state_dict(), "config": dataclasses.asdict(config), "flags": flags,
                         "optimizers": [o.state_dict() for o in optimizers], "step": step, "seconds": seconds, "best": best, "data": meta["train_sha256"],
                         "rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state() if cuda else None},
                        out / f"ckpt_{which}.pt")

    def record(kind, **values):
        row = {"kind": kind, "step": step, "epoch": step / per_epoch, "tokens": step * flags["batch_tokens"],
               "flops": step * flags["batch_tokens"] * flops_per_token, "seconds": round(seconds, 3), **values}
        if rank == 0:
            with metrics.open("a") as f:
                f.write(json.dumps(row) + "\n")
        return row

    stop, handlers, spent = [], {}, seconds

    def leaving():
        """0: go on, 1: time is up, 2: a signal came. Processes decide together, at log steps, or one would wait for ever."""
        late = flags["max_minutes"] is not None and seconds - spent >= 60 * flags["max_minutes"]
        flag = 2 if stop else int(late)                                                # on the host: a tensor would wait for every step
        if world > 1:
            if step % flags["log_every"]:
                return 0
            flag = torch.tensor(flag, device=device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    with contextlib.suppress(ValueError):                                              # not in the main thread: leave them
        handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    saved, pending, leave, first = step if state else None, [], 0, step
    line_step, line_seconds, loads = step, seconds, [torch.zeros_like(m.count) for m in lm.moes()]
    try:
        while True:
            if (step in evals or leave == 1) and step not in [r["step"] for r in eval_log]:
                save()                                                                 # first: evaluation may run out of memory
                t0, saved = time.perf_counter(), step
                set_stage(lm, flags, max(step - 1, 0))                                 # as trained so far
                with autocast:
                    how = dict(objective=flags["objective"], rows=max(1, 16384 // T), diffusion_block=flags["diffusion_block"])
                    result, gap = (evaluate(lm, w, **how) for w in (val, seen))
                    if flags["probe_every"] and ((len(eval_log) + 1) % flags["probe_every"] == 0 or step >= total):
                        result |= probe(lm, ends, **how)
                row = record("eval", **result, train_loss=gap["loss"], bpb=result["loss"] / math.log(2) / bytes_per_token,
                             eval_seconds=round(time.perf_counter() - t0, 3))
                eval_log.append(row)
                error = f" +- {row['se']:.4f}" if row["se"] else ""
                log(f"eval {step}/{total} | epoch {row['epoch']:.2f} | val {row['loss']:.4f}{error} | train {row['train_loss']:.4f} | "
                    f"bpb {row['bpb']:.4f}" + "".join(f" | {k} {row[k]:.4f}" for k in ("ar_loss", "mdm_loss", "probe_accuracy", "probe_gap")
                                                       if k in row))
                if row["loss"] < best:
                    best = row["loss"]
                    save("best")
            if leave or step >= total:
                break
            tic = time.perf_counter()
            stage = set_stage(lm, flags, step)
            losses = gradients(step, stage)
            norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), flags["grad_clip"] or math.inf)
            rate = learning_rate(step, total, flags)
            others = not indexed or stage != "warmup"                                  # whether all but the indexers moves
            loads = [a + m.balance(others) for a, m in zip(loads, lm.moes())]          # choices per expert since the last line
            for o in optimizers:
                for group in o.param_groups:
                    group["lr"] = rate
                o.step()
                o.zero_grad(set_to_none=True)
            step += 1
            pending.append(losses)
            if not (compiled and step == first + 1):                                   # the clock leaves out compilation
                seconds += time.perf_counter() - tic
            leave = leaving()
            if step % flags["log_every"] == 0 or step in evals or step == total or step % flags["save_every"] == 0 or leave:
                tic = time.perf_counter()
                recent = torch.stack(pending).tolist()                                 # (steps, 3): the only wait for the device
                seconds += time.perf_counter() - tic
                bad = next((i for i, row in enumerate(recent) if not math.isfinite(sum(row))), None)
                if bad is not None:
                    good = f"the last good checkpoint is {out / 'ckpt_last.pt'} (step {saved})" if saved is not None else "there is no checkpoint yet"
                    raise ValueError(f"the loss became {sum(recent[bad])} at step {step - len(recent) + bad + 1}: lower --lr or raise --warmup; {good}")
                if step % flags["log_every"] == 0 or step == total:
                    mean = [sum(column) / len(recent) for column in zip(*recent)]
                    dt = max(1e-9, seconds - line_seconds) / (step - line_step)
                    more = {}
                    if flags["objective"] == "mixed":                                  # each in nats per token of its own rows
                        more = {"ar_loss": mean[0] * B / max(1, ar_rows), "mdm_loss": mean[1] * B / max(1, B - ar_rows)}
                    if indexed and mean[2]:
                        more["indexer_kl"] = mean[2]
                    if loads:                                                          # per MoE layer
                        more |= {"load_ratio": [round((a.max() / a.mean()).item(), 4) for a in loads],
                                 "dead_experts": [int((a < 0.1 * a.mean()).sum()) for a in loads],
                                 "bias_range": [round((m.bias.max() - m.bias.min()).item(), 4) for m in lm.moes()]}
                        loads = [torch.zeros_like(a) for a in loads]
                    row = record("train", loss=mean[0] + mean[1], lr=rate, grad_norm=norm.item(), tok_per_s=round(flags["batch_tokens"] / dt), **more)
                    mfu = f" | mfu {flops_per_token * flags['batch_tokens'] / dt / peak / world:.1%}" if peak else ""
                    load = f" | load {max(more['load_ratio']):.2f}" if more.get("load_ratio") else ""
                    load += f" | indexer kl {more['indexer_kl']:.4f}" if "indexer_kl" in more else ""
                    log(f"step {step}/{total} | epoch {row['epoch']:.2f} | loss {row['loss']:.4f} | lr {rate:.2e} | norm {row['grad_norm']:.2f}{load} | "
                        f"{dt * 1e3:.1f} ms | {row['tok_per_s']:,} tok/s{mfu} | eta {clock((total - step) * dt)}")
                    line_step, line_seconds = step, seconds
                pending = []
                if step % flags["save_every"] == 0:
                    save()
                    saved = step
        save()
    except torch.OutOfMemoryError:
        raise ValueError(f"out of memory with {micro} windows of {T} tokens in a forward pass: use a smaller --micro_batch") from None
    finally:
        for s, h in handlers.items():
            signal.signal(s, h)
        if own_group:
            torch.distributed.destroy_process_group()
    finished = step >= total
    if not finished:
        why = "interrupted" if leave == 2 else "time is up"
        log(f"{why} at step {step} of {total}: saved. Go on with: python train.py --resume auto --out {out}")
    return {"out": str(out), "step": step, "finished": finished, "stopped": leave == 2, "evals": eval_log, "best": best,
            "seconds": seconds, "params": lm.num_params(), "flags": flags, "lm": lm, "tokenizer": tokenizer}


def show_sample(result, n=200):
    """A short sample of the run's last model, as text; also written to samples.txt."""
    lm, tokenizer, flags, objective = result["lm"], result["tokenizer"], result["flags"], result["flags"]["objective"]
    device = lm.embed.weight.device
    x = torch.full((1, min(n, lm.config.block_size)), lm.mask_id, device=device)       # a canvas with every place to fill
    gen = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(0)
    lm.eval()
    if objective == "block":
        ids = diffusion.sample_block(lm, x, lm.mask_id, flags["diffusion_block"], order="random", generator=gen)
    elif objective == "mdm":
        ids = diffusion.sample_mdm(lm, x, lm.mask_id, order="random", generator=gen)
    else:
        ids = diffusion.sample_ar(lm, x, lm.mask_id, generator=gen)
    text = tokenizer.decode(ids[0].tolist())
    (Path(result["out"]) / "samples.txt").write_text(text + "\n", encoding="utf-8")
    return text


def main(argv=None):
    try:
        flags = parse_flags(argv)
        result = train(flags)
        if int(os.environ.get("RANK", 0)) == 0 and not result["stopped"]:
            print(f"---\nbest validation loss {result['best']:.4f} nats/token, {clock(result['seconds'])} of training. A sample:\n")
            print(show_sample(result))
            print(f"\nmore: python sample.py {result['out']}")
    except (ValueError, OSError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                                                          # before the first step, or in the sample
        print("train.py: interrupted outside of training; nothing that was saved is lost", file=sys.stderr)
        return 130
    return 130 if result["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main())
