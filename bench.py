"""Every experiment and measurement of this repository, one subcommand each: python bench.py NAME --help

  few unique tokens
    crossover   the main one: AR against masked diffusion on the same few unique tokens, for many epochs
    compare     any training runs in one picture, against steps, epochs, tokens, FLOPs or seconds
    study       the crossover taken apart: regularised AR, tuned diffusion, causes, memory; hours
    map         what all of these say of unique tokens, width and text, in one table
    arms        every arm that they measured
    adapt       a diffusion model from the weights of an AR one, and from scratch
    sparsity    dense against mixture of experts, equal active or equal total parameters, AR and diffusion
  token mixers
    quality     the same small model with every mixer, AR and diffusion
    switch      a dense checkpoint run sparse, before and after some steps of adaptation (InfLLM-V2)
    recall      associative recall and needles in text: every layer, against pairs and length
    track       what a state can keep count of: parity and products of permutations, every update rule
    optical     a page of text as a picture, read back, against compression
  speed and memory
    train       training speed and memory, also beside a nanoGPT checkout
    attention   every layer: time and memory against length, keys read, cache
    context     time of one decoded token against the tokens in the cache
    moe         mixture of experts: speed against dense, load with and without balancing
    presets     sizes and caches of the published models
    gpu         all GPU measurements, in order of value, as many as fit into --minutes
    tables      writes results/README.md from the files of all experiments
  sampling and likelihood
    theory      what few sampling steps cost: token errors and wrong sequences, closed form and trained models
    decode      tokens/s against quality of every sampler, AR and diffusion
    drafts      what AR saves where the run itself proposes tokens: a pass judges several
    panel       all likelihoods of the same models: exact, bounds, chains, bits per byte
    choices     multiple choice by likelihood: HellaSwag, ARC, PIQA, LAMBADA files, and a probe without one
    tools       a calculator and a look-up inside an answer, AR and block diffusion

Numbers go to out/NAME.json with command, versions, device, seeds and date, pictures to out/NAME.png; with
--results results to the files that results/README.md shows. A command that was interrupted goes on where it
stopped when it is typed again.
"""
import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import cache, partial
from itertools import cycle, filterfalse, permutations, product
from math import ceil, exp, factorial, hypot, inf, isfinite, log, log2, nan
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import prepare
import sample
import train
from attention import ATTENTION
from model import LM, MLP, PRESETS, ModelConfig, MoE, from_preset, nearest, override, parse_layers, settings
from prepare import load_dataset, load_tokenizer, need
from train import load_model

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------------------
# The runner
#
# An experiment is a generator. It yields
#   key, measure   one point: key is a dictionary that names it, measure() returns a dictionary of numbers
#                  (or is that dictionary). The row key | measure() goes into the table and the JSON file;
#   {name: flags}  a grid of train.py runs: they are trained side by side, each from its checkpoint if any,
#                  and the yield returns {name: rows of its evaluations}.
# What it returns (a dictionary, or nothing) stands in the JSON file beside the rows.
# Its keyword arguments are the flags of the command, "    flag: text" in its docstring is their help. The
# annotation of a flag is its type, or the names that it may have.

@dataclasses.dataclass
class Experiment:
    run: callable
    named: str = ""  # flags whose values the name of the file carries, unless they are off: attention_cpu
    finish: callable = lambda rows: rows                # adds what follows from all rows
    show: callable = lambda rows, result: rows          # -> the rows of the table, or a text
    picture: callable = lambda figure, rows, result: None               # draws into a matplotlib figure
    gpu: dict = dataclasses.field(default_factory=dict)                 # defaults of --scale gpu


EXPERIMENTS = {}
COMMON = {"results": ("out", str), "name": (None, str)}     # flags of every experiment
SHARED = {}                     # {"few": {flag: default}} of the experiments that end in **few
HELP = """
    name: name of the files in --results
    results: folder for numbers and pictures
    out: folder of the runs
    device: auto | cuda | cpu
    threads: CPU threads
    repeat: timed calls
    seed: the first seed
    seeds: number of seeds
    workers: runs at a time
    scale: auto (gpu where there is one) | cpu | gpu
    dataset: a name under data/ or a folder
    objectives: ar, mdm or both
    n_layer: blocks
    n_head: heads
    n_kv_head: key/value heads
    n_embd: width
    head_dim: width of a head
    block_size: tokens in a window
    vocab_size: tokens that the model knows
    batch_tokens: tokens in a step
    lr: peak rate
    rates: learning rates to try with the first seed; each arm keeps its best
    unique_tokens: the first so many tokens of the text
    epochs: passes over them
    minutes: of training for each arm; 0: chooses itself
    evals: evaluations, geometric in epochs
    max_steps: training of AR; diffusion gets more
    run_ar: run folder of the AR model (default: trained)
    run_mdm: of the diffusion model
    run_block: of the block-diffusion model
    run_judge: of the AR model that judges texts
    run_mixed: of the model of both losses that drafts
    run_mtp: of the AR model with mtp that drafts
"""


def experiment(**about):
    """Makes a generator function a command of its name."""
    def register(function):
        EXPERIMENTS[function.__name__.rstrip("_")] = Experiment(function, **about)
        return function
    return register


def parameters(run):
    """{flag: (default, its type or the names that it may have)}; what has no default is positional."""
    out = {}
    for name, p in inspect.signature(run).parameters.items():
        for flag, default in SHARED.get(name, {name: p.default}).items():
            kind = str if default is None else type(default)
            out.setdefault(flag, (default, kind if p.annotation is p.empty else p.annotation))
    return out


def add_flags(parser, about):
    """The flags of an experiment; what was not typed stays out of the parser's answer."""
    told = dict(re.findall(r"^    (\w+): (.*)$", HELP + about.run.__doc__, re.M))
    for name, (default, kind) in (COMMON | parameters(about.run)).items():
        how = dict(help=told[name])
        if default is inspect.Parameter.empty:
            parser.add_argument(name, nargs="+", **how)
            continue
        if default is False:
            how["action"] = "store_true"
        elif kind is list:
            how |= dict(action="extend", nargs="+")
        else:
            how["type"] = kind if isinstance(kind, type) else str
            if isinstance(default, tuple):
                how["type"] = items_like(default)
                default = ",".join(map(str, default))
            how["help"] += f" (default: {default})" * (default not in (None, ""))
        parser.add_argument(f"--{name}", **how)


def items_like(default):
    """A type of flags: '64,256' -> (64, 256), of the type of the default's items."""
    kind = type(default[0])
    read = str if kind is str else partial(prepare.number, kind=kind)
    # No comma of layer(a=1,b=2).
    return lambda text: tuple(read(item) for item in re.split(r",(?! )(?![^(]*\))", text))


def settle(about, typed):
    """All flags: the typed ones, else the scale's, else the defaults, with auto made definite."""
    known = COMMON | parameters(about.run)
    flags = {name: default for name, (default, _) in known.items()} | typed
    if "scale" in flags:
        known["scale"] = "auto", ("auto", "cpu", "gpu")
        if flags["scale"] == "auto":
            flags["scale"] = "gpu" if torch.cuda.is_available() else "cpu"
        flags |= (about.gpu if flags["scale"] == "gpu" else {}) | typed | pick(flags, "scale")
    for name, (default, kind) in known.items():
        free = default == 0 or name in ("seed", "warmup")
        for value in flags[name] if isinstance(flags[name], tuple) else [flags[name]]:
            if not isinstance(kind, type):
                told = f"--{name} {value} is unknown{nearest(value, kind)}: expected {', '.join(kind)}"
                need(value in kind, told)
            need(free or type(value) is not int or value > 0, f"--{name} {value} must be at least 1")
    flags["device"] = train.pick_device(flags.get("device", "auto"))
    if flags.get("threads"):
        train.set_threads(flags["threads"], None)
    return flags


def file_name(command, about, flags):
    """attention_cpu_bidirectional: the command and what makes its file another one."""
    parts = [command]
    for name in about.named.split():
        value = flags[name]
        if value not in (False, "auto"):
            parts.append(name if value is True else Path(str(value)).name.split(":")[0])
    return flags["name"] or "_".join(parts)


class Journal:
    """Results by their keys, in a file of one JSON list [key, result] a line, written as they come. A line
    that cannot be read, of a process that was killed, counts as not written."""
    def __init__(self, path):
        self.path = path
        self.results = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, TypeError):
                key, result = json.loads(line)
                self.results[json.dumps(key)] = result

    def find(self, key):
        return self.results.get(json.dumps(key))

    def add(self, key, result):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + json.dumps([key, result]))       # behind half a line, too
        self.results[json.dumps(key)] = result


def stored(folder):
    """{name: result} of the files of a folder that experiments have written."""
    files = {file.stem: json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))}
    return {name: result for name, result in files.items() if result.get("experiment") in EXPERIMENTS}


def write(path, content):
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with prepare.whole_file(path, "w") as file:
        file.write(content)


def attempt(measure, label):
    """measure(), or what went wrong:
    on a GPU one kernel that refuses a shape must not cost the rows behind it."""
    try:
        return measure()
    except RuntimeError as e:                   # out of memory is one
        if not torch.cuda.is_available() or "CUDA error" in str(e):     # after that nothing runs any more
            raise
        why = "out of memory" if isinstance(e, torch.OutOfMemoryError) else str(e).strip().splitlines()[0]
        print(f"{label}: {why}", flush=True)
        return {"error": why}


def perform(command, typed):
    """Runs an experiment: measures what is missing, prints the table, writes FILE.json and FILE.png."""
    about = EXPERIMENTS[command]
    flags = settle(about, typed)
    given = {k: flags[k] for k in parameters(about.run)}
    if not inspect.isgeneratorfunction(about.run):
        return about.run(**given)
    path = Path(flags["results"]) / f"{file_name(command, about, flags)}.json"
    points = Journal(path.with_suffix(".points.jsonl"))
    seeds = [flags.get("seed", 1337) + i for i in range(flags.get("seeds", 1))]
    rows, more = walk(about, given, points, seeds[0])
    result = more | dict(
        experiment=command,
        command=shlex.join(["python", "bench.py", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d"),
        device=device_name(flags["device"]),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        seed=seeds[0],
        seeds=seeds,
        flags=given,
        failed=[r for r in rows if "error" in r],
        rows=about.finish([r for r in rows if "error" not in r])
    )
    result = json.loads(json.dumps(result))     # as it will be read
    write(path, json.dumps(result, indent=1) + "\n")
    print(f"\n{page(about, result)}\nwrote {path}")
    draw(about, result, path.with_suffix(".png"))
    points.path.unlink(missing_ok=True)         # the next call measures anew


def walk(about, given, points, seed):
    """Trains and measures what is missing: (rows, what the experiment returned)."""
    settings = {k: v for k, v in given.items() if not isinstance(v, tuple | list)
                and k not in ("out", "workers")}
    slow = {"workers", "runs"} & given.keys()
    total = 0 if slow else len(list(about.run(**given)))        # points, where counting them is cheap
    rows, fresh, tic = [], 0, time.time()
    generator = about.run(**given)
    answer = None
    while True:
        try:
            item = generator.send(answer)
        except StopIteration as end:
            return rows, end.value or {}
        if isinstance(item, dict):
            for flags in item.values():
                data_folder(flags["dataset"])
            if not run_arms(item, given["workers"]):
                raise KeyboardInterrupt
            answer = {name: evaluations(f["out"]) for name, f in item.items()}
            continue
        key, measure = item
        row = points.find([key, settings]) if callable(measure) else key | measure
        if row is None:
            label = " ".join(map(str, key.values()))
            torch.manual_seed(seed)
            row = key | attempt(measure, label)
            points.add([key, settings], row)
            fresh += 1
            numbers = {k: v for k, v in row.items() if k not in key and isinstance(v, int | float)}
            line = f"{label}: " + ", ".join(f"{k} {show(v)}" for k, v in numbers.items())
            left = (time.time() - tic) / fresh * (total - len(rows) - 1)
            print(line + f" | {train.clock(left)} left" * (left > 0), flush=True)
        rows.append(row)


def page(about, result):
    """The table of an experiment as Markdown."""
    shown = about.show(result["rows"], result)
    return shown if isinstance(shown, str) else markdown(shown)


def beside_full(*columns):
    """What adds to rows how many times faster each is than layer `full` at the same length and batch:
    columns of milliseconds."""
    def finish(rows):
        full = {(r["T"], r.get("batch")): r for r in rows if r["layer"] == "full"}
        for r, column in product(rows, columns):
            base = full.get((r["T"], r.get("batch")))
            r[column.removesuffix("ms") + "vs_full"] = base and base[column] / r[column]
        return rows
    return finish


def pick(row, names):
    """Those of its columns: "a b c" -> {name: value, None where there is none}."""
    return {name: row.get(name) for name in names.split()}


def without(columns):
    """A table of all but these columns."""
    return lambda rows, result: [{k: v for k, v in r.items() if k not in columns.split()} for r in rows]


def grouped(rows, *columns):
    """{values of these columns: the rows that have them}, in the order of the rows."""
    groups = defaultdict(list)
    for r in rows:
        groups[tuple(r[c] for c in columns)].append(r)
    return groups


def merged(rows, keys, cells):
    """Rows that are alike in the columns `keys` as one row, which has the cells(row) of each of them."""
    return [dict(zip(keys, values)) | {k: v for r in same for k, v in cells(r).items()}
            for values, same in grouped(rows, *keys).items()]


def pivot(keys, cells):
    """The table of `merged` rows."""
    return lambda rows, result: merged(rows, keys.split(), cells)


def show(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def markdown(rows):
    """A table readable by eye and as Markdown, of all columns that have a value and hold no list."""
    columns = dict.fromkeys(
        c for r in rows for c, v in r.items() if v is not None and not isinstance(v, list | dict)
    )
    cells = [list(columns)] + [[show(r.get(c)) for c in columns] for r in rows]
    width = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def evaluations(out):
    """The evaluations in the log of a run folder, in order."""
    return [r for r in train.read_log(out) if r["kind"] == "eval"]


def file_part(name):
    """The name of an arm or a mixer as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", name.replace("*", "x"))


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{name[1] if name else platform.processor() or 'CPU'}, {os.cpu_count()} cores"

# ------------------------------------------------------------------------------------------------------------
# Pictures: functions of (figure, rows, result), all drawn from the JSON file alone

def draw(about, result, path):
    """The picture of a result, where matplotlib is there and it shows anything."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture: matplotlib is missing (pip install matplotlib)")
    figure = Figure(figsize=(8, 5.5))
    about.picture(figure, result["rows"], result)
    if figure.axes:
        figure.tight_layout()
        with prepare.whole_file(path) as file:
            figure.savefig(file, format="png", dpi=110)
        print(f"wrote {path}")


def log_ticks(ax, values):
    """A logarithmic x axis with its ticks at the values that were measured."""
    values = sorted(set(values))
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{v:,g}" for v in values])
    ax.set_xticks([], minor=True)


def plain_log(axis):
    """1 10 100 on a logarithmic axis, where matplotlib writes powers of ten."""
    axis.set_major_formatter(lambda v, _: f"{v:,g}")
    axis.set_minor_formatter(lambda v, _: "")


def label_ends(ax, labels):
    """Names lines where they end, moved apart where they would overlap.
    labels: [(x, y, text, colour)], y logarithmic."""
    low, high = ax.get_ylim()
    step = log(high / low) / 22
    at = -inf
    for x, y, text, colour in sorted(labels, key=lambda label: label[1]):
        at = max(log(y), at + step)
        ax.annotate(text, (x * 1.06, exp(at)), color=colour, fontsize=9, va="center")
    ax.set_ylim(low, max(high, exp(at + step)))


def dress(ax, title, **labels):
    """Title, labels of the axes, grid, and a legend where lines have names."""
    ax.set(**labels)
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=9)


def points(rows, x, y, **where):
    """[(x, y), ...] of those rows whose columns are `where`, if they have a y."""
    return [(r[x], r[y]) for r in rows if None not in (r.get(x), r.get(y)) and where.items() <= r.items()]


def layer_lines(figure, rows, result, y, xlabel, ylabel, title):
    """Column y against length, a labelled line for each layer, both axes logarithmic."""
    from matplotlib import colormaps
    ax = figure.subplots()
    colours = cycle((*colormaps["tab10"].colors, *colormaps["Dark2"].colors))
    rows = [r for r in rows if r.get("batch") == rows[0].get("batch")]
    labels = []
    for (name,), mine in grouped(rows, "layer").items():
        mine = points(mine, "T", y)
        style = dict(color="black", lw=2.5) if name == "full" else dict(color=next(colours), lw=1.3)
        ax.loglog(*zip(*mine), marker="o", ms=3, **style)
        labels.append((*mine[-1], name, style["color"]))
    lengths = sorted({r["T"] for r in rows})
    log_ticks(ax, lengths)
    plain_log(ax.yaxis)
    label_ends(ax, labels)
    ax.set_xlim(right=lengths[-1] * (lengths[-1] / lengths[0]) ** 0.25)
    dress(ax, title.format(**result["flags"]) + result["device"], xlabel=xlabel, ylabel=ylabel)

# ------------------------------------------------------------------------------------------------------------
# Data and training runs

def data_folder(name):
    """The folder of a data set, from its name or path as in train.py.
    The texts that every machine has are made where missing."""
    folder, source = prepare.dataset_folder(name), name.removesuffix("-byte")
    if source in ("docs", "pysrc") and not (folder / "meta.json").exists():
        prepare.prepare(source, name=name, tokenizer="bpe:4096" if source == name else "byte")
    return folder


def training(name):
    """(N,) ids of a data set's training text."""
    return load_dataset(data_folder(name))[0]


def validation(name, T, count):
    """(N, T) ids: `count` windows of a data set's validation text."""
    return train.fixed_windows(load_dataset(data_folder(name))[1], T, count).long()


def random_windows(ids, T, count, generator):
    """(count, T) ids from anywhere in a text."""
    at = torch.randint(len(ids) - T, (count, 1), generator=generator).numpy()
    return torch.from_numpy(ids[at + np.arange(T)].astype(np.int64))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mean_se(values):
    """(mean, its standard error) of numbers: a list, or a tensor (N,)."""
    values = [*map(float, values)]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return mean(values), error


def accuracy(hits):
    """Two columns of a list of hits, or of shares of hits."""
    return dict(zip(("accuracy", "se"), mean_se(hits)))


def learn(config, loss_of, steps, path, device="cpu", model=LM, **flags):
    """A model after `steps` optimizer steps on loss_of(lm, step, generator); or the one in `path`, if it is
    there. model: what makes it of the config. flags: of train.py."""
    torch.manual_seed(1337)
    lm = model(config).to(device)
    if path.exists():
        lm.load_state_dict(train.load_checkpoint(path)["model"])
        return lm.eval()
    flags = train.DEFAULTS | dict(warmup=50, lr=4e-3, optimizer="muon") | flags
    optimizers = train.make_optimizers(lm, flags)
    progress = prepare.Progress(path.stem)
    for step in range(steps):
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = train.learning_rate(step, steps, flags)
        update(lm, optimizers, loss_of(lm, step, seeded((1337 << 32) + step)))
        progress((step + 1) / steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    train.save_atomic({"model": lm.state_dict()}, path)
    return lm.eval()


def averaged(models):
    """What a model is to a likelihood, of several: it gives the log of the mean of their probabilities,
    up to a constant."""
    if len(models) == 1:
        return models[0]
    f = lambda *x, **how: torch.stack([lm(*x, **how).log_softmax(-1) for lm in models]).logsumexp(0)
    f.mask_id = models[0].mask_id
    return f


def update(lm, optimizers, loss):
    """One optimizer step."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    for o in optimizers:
        o.step()
        o.zero_grad()


def is_trained(flags):
    """Has the run of these flags come to its end? A process of train.py would take seconds to say so."""
    evals = evaluations(flags["out"])
    if not evals or evals[-1]["step"] != flags["max_steps"]:
        return False
    state = train.load_checkpoint(flags["out"])
    return state["step"] == flags["max_steps"] and not train.other_settings(state, flags)


def run_arms(jobs, workers):
    """Run train.py once per job {name: flags}, `workers` at a time, each from its checkpoint if it has one.

    Own processes, so that two arms use two cores. Lines of their logs are shown behind the arm's name, a text
    or a tuple of its words. Returns False when a run was interrupted; raises ValueError when one failed."""
    jobs = {name: {k: v for k, v in flags.items() if v is not None} for name, flags in jobs.items()}
    jobs = {name: flags for name, flags in jobs.items() if not is_trained(flags)}
    running = []
    stop = threading.Event()
    tic = time.time()

    def follow(name, flags):
        """One run, in a thread of its own."""
        if stop.is_set():
            return
        name = " ".join(map(str, name)) if isinstance(name, tuple) else name
        command = [sys.executable, HERE / "train.py", "--resume", "auto"]
        for k, v in flags.items():
            command += [f"--{k}", *(v if isinstance(v, list) else [str(v)])]
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(p)
        line = "no output"
        for line in p.stdout:
            if line.startswith(("step", "eval", "resumed", "interrupted")):
                print(f"[{name}] {line.rstrip()}", flush=True)
        if p.wait():
            stop.set()
        # 130: it was interrupted; -SIGINT: while it was still importing.
        need(p.returncode in (0, 130, -signal.SIGINT), f"arm '{name}' failed: {line.rstrip()}")

    with ThreadPoolExecutor(workers) as pool:
        try:
            ends = [pool.submit(follow, *job) for job in jobs.items()]
            for n, end in enumerate(as_completed(ends), 1):
                end.result()
                if workers < len(jobs) > n and not stop.is_set():
                    left = train.clock((time.time() - tic) / n * (len(jobs) - n))
                    print(f"{n} of {len(jobs)} runs, about {left} left", flush=True)
        except KeyboardInterrupt:               # the arms got it too: they save
            stop.set()
        except ValueError:
            for p in running:
                p.terminate()
            raise
    return not stop.is_set()

# ------------------------------------------------------------------------------------------------------------
# Timing


def clock_of(device):
    """Seconds: of this process on a CPU (robust on a busy machine),
    of the wall behind a GPU that has finished."""
    if torch.device(device).type == "cuda":
        return lambda: (torch.cuda.synchronize(), time.perf_counter())[1]
    return time.process_time


def seconds_of(step, device, repeat):
    """Smallest time of `repeat` calls."""
    clock = clock_of(device)
    best = inf
    for _ in range(repeat):
        tic = clock()
        step()
        best = min(best, clock() - tic)
    return best


def time_passes(f, x, device, repeat, parameters):
    """Milliseconds of f(x), forward alone and forward + backward: the smallest of `repeat` calls behind one
    that warms up, and on a GPU compiles; and there the largest memory."""
    cuda = device.startswith("cuda")
    if cuda:
        f = torch.compile(f, dynamic=False)
    x = x.detach().requires_grad_()
    leaves = [x, *parameters]

    def forward():
        with torch.no_grad():
            f(x)

    def both():
        for a in leaves:
            a.grad = None
        (f(x) * 1.1).sum().backward()           # 1.1: else the gradient is an expanded 1
    both()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    row = {f"{step.__name__}_ms": 1e3 * seconds_of(step, device, repeat) for step in (forward, both)}
    if cuda:
        return row | dict(peak_mib=torch.cuda.max_memory_allocated() / 2 ** 20)
    return row | dict(kept_mib=kept_bytes(lambda: f(x)) / 2 ** 20)


def kept_bytes(run):
    """Bytes that one forward pass keeps for its backward pass: of distinct storages, exact on any device."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = run()  # alive, so that no address is used twice
    del held
    return sum(kept.values())

# ------------------------------------------------------------------------------------------------------------
# Layers: every list comes from ATTENTION; a sparse layer gets settings with which a query reads few keys

MIXTURES = ("gated_deltanet*3 full", "kda*3 mla", "gated_deltanet*3 msa", "kda*3 dsa", "linear*3 infllm")
OPTIONS = {"full gqa": "full(n_kv_head=1)", "full window": "full(window=HALF)", 
           "gated_deltanet alternate": "gated_deltanet(bidir=forward) gated_deltanet(bidir=backward)",
           "gated_deltanet forward": "gated_deltanet(bidir=forward)"}


def pattern_of(name, keys=128, block=16):
    """'gated_deltanet*3 msa' -> a layer pattern whose sparse layers read at most `keys` keys: blocks that are
    picked, the query's own, and what else they read. OPTIONS have names of their own."""
    picks = keys // block - 1
    few = {
        "linear": "linear_decay=head",
        "nsa": f"n_kv_head=1, window={block}, sel_block={block}, sel_topk={picks - 3}, "
               f"cmp_block={2 * block}, cmp_stride={block}",        # the window and the means count, too
        "infllm": f"n_kv_head=1, sel_block={block}, sel_topk={picks}, cmp_block={block}, "
                  f"cmp_stride={block // 2}, dense_len=0, sel_local=2",
        "msa": f"n_kv_head=1, sel_block={block}, sel_topk={picks}",
        "dsa": f"sel_topk={picks * block}"      # it picks single tokens
    }
    pattern = OPTIONS.get(name, name).replace("HALF", str(keys // 2))
    return re.sub(rf"\b({'|'.join(few)})\b(?!\()", lambda match: f"{match[0]}({few[match[0]]})", pattern)


def make_layer(name, T, n_head, head_dim, device):
    """A layer for windows of T tokens, in bfloat16 on a GPU."""
    config = ModelConfig(n_embd=n_head * head_dim, n_head=n_head, n_layer=1, block_size=T)
    torch._dynamo.reset()                       # else from the 9th shape on it runs eagerly
    (layer, values), = parse_layers(pattern_of(name, 1024, 64), 1)
    return ATTENTION[layer](override(config, values)).to(device, dtype_on(device))


def dtype_on(device):
    return torch.bfloat16 if device.startswith("cuda") else torch.float32

# ------------------------------------------------------------------------------------------------------------
# crossover: AR against masked diffusion on few unique tokens

# Byte tokens: a small vocabulary, so that the few parameters are in the trunk and not in the embedding.
SHARED["few"] = settings("""
    scale=auto dataset=docs-byte unique_tokens=30_000 evals=12
    n_layer=3 n_head=4 n_embd=96 block_size=64 batch_tokens=2048 workers=2 out=none
""") | dict(epochs=160.0, minutes=0.0, rates=(2e-3,))
FEW_GPU = settings("""
    dataset=docs unique_tokens=1_000_000
    n_layer=6 n_head=6 n_embd=384 block_size=512 batch_tokens=32_768 workers=1
""") | dict(epochs=300.0, rates=(1e-3,))


def own_arms(texts):
    """Lines 'name: flags of train.py' -> {name: its flags}; AR where they name no objective."""
    arms = {}
    for text in texts:
        name, colon, flags = text.partition(":")
        need(colon and name.strip(),
             f"--arm '{text}': expected 'name: flags of train.py', such as 'dropout: --dropout 0.3'")
        arms[name.strip()] = {"objective": "ar"} | train.parse_flags(shlex.split(flags))
    return arms


def arms_of(table):
    return own_arms(table.strip().splitlines())


OBJECTIVES = arms_of("""
    ar:
    mdm: --objective mdm
""")
REGULARISED = arms_of("""
    ar wd 0.4: --weight_decay 0.4
    ar wd 0.8: --weight_decay 0.8
    ar wd 1.6: --weight_decay 1.6
    ar dropout 0.1: --dropout 0.1
    ar dropout 0.2: --dropout 0.2
    ar dropout 0.3: --dropout 0.3
    ar mlp dropout 0.1: --set mlp_dropout=0.1
    ar input mask 0.1: --recipe mask=0.1
    ar input mask 0.3: --recipe mask=0.3
    ar random 0.15: --recipe random=0.15
    ar reverse 0.5: --recipe reverse=0.5
    ar offset 5: --recipe offset=5
    ar mir 0.4: --recipe mir=0.4
    mixed: --objective mixed
""")
DIFFUSION = arms_of("""
    mdm rate 0.3: --objective mdm --recipe rate=0.3
    mdm rate 0.7: --objective mdm --recipe rate=0.7
    mdm rate 0.5 random 0.05: --objective mdm --recipe rate=0.5 random=0.05
    mdm rate 0.5 dropout 0.1: --objective mdm --recipe rate=0.5 --dropout 0.1
    mdm rate 0.5 dropout 0.2: --objective mdm --recipe rate=0.5 --dropout 0.2
    mdm dropout 0.1: --objective mdm --dropout 0.1
    mdm dropout 0.2: --objective mdm --dropout 0.2
    mdm wd 0: --objective mdm --weight_decay 0.0
    mdm wd 0.4: --objective mdm --weight_decay 0.4
    block of 2: --objective block --diffusion_block 2
    block of 4: --objective block --diffusion_block 4
    block of 8: --objective block --diffusion_block 8
    block of 16: --objective block --diffusion_block 16
""")
CAUSES = arms_of("""
    ar in 1 orders: --objective block --diffusion_block 1 --recipe orders=1
    ar in 4 orders: --objective block --diffusion_block 1 --recipe orders=4
    ar in 16 orders: --objective block --diffusion_block 1 --recipe orders=16
    ar in all orders: --objective block --diffusion_block 1 --recipe orders=2147483648
    mdm causal: --objective mdm --set causal=true
    mdm rate 0.5: --objective mdm --recipe rate=0.5
""")
ARMS = OBJECTIVES | REGULARISED | DIFFUSION | CAUSES
MEASURED = settings("ar=exact mdm=bound block=bound mixed='smaller of exact and bound'")
AXES = settings("""
    epoch='epochs over the same tokens' step=steps tokens='tokens trained on' flops=FLOPs
    seconds='seconds of training'
""")
SURE = 3.18     # standard errors of a 95% interval whose error comes from 4 replicates (Student, 3 df)


def crossing(ar, mdm, level=None):
    """Where diffusion passes below AR for good, and how the two stand at the end.

    ar, mdm: evaluations; only steps that both have are compared. level: one number in place of ar's losses.
    The tail is what follows the last evaluation at which diffusion was surely above (by SURE standard errors
    of its masks). There is a crossing where diffusion is surely below at the end of the tail; its place is
    the last change of sign before the tail's first sure point, interpolated in log epochs. So what was
    crossed in the warm-up and went back does not count, and one last evaluation far below does.
    Returns {"first": {"epoch", "step", "tokens", "flops"} or None, "gap": AR minus diffusion at the end,
    "se", "extrapolated": epoch at which a power law through the second half of diffusion's curve reaches the
    level, None where it does not fall}.
    """
    at = {a["step"]: a["loss"] for a in ar or ()}
    goal = lambda d: at.get(d["step"], nan) if level is None else level
    mdm = [d for d in mdm if isfinite(d["loss"] + goal(d))]
    out = dict(first=None, gap=None, se=None, extrapolated=None)
    if not mdm:
        return out
    gap = np.array([goal(d) - d["loss"] for d in mdm])
    error = np.array([SURE * d["se"] for d in mdm])
    out |= dict(gap=gap[-1], se=mdm[-1]["se"])
    last = lambda which: max(np.flatnonzero(which), default=-1)
    if gap[-1] > error[-1]:
        tail = last(gap < -error) + 1
        sure = tail + np.argmax((gap > error)[tail:])
        out["first"] = crossed_at(mdm, gap, last(gap[:sure] <= 0) + 1)
    elif level is not None:
        out["extrapolated"] = extrapolate(mdm, level)
    return out


def crossed_at(mdm, gap, i):
    """Between the evaluations i - 1 and i, where the gap changes its sign."""
    units = ("epoch", "step", "tokens", "flops")
    if i == 0:
        return {"before": True, **{k: mdm[0][k] for k in units}}
    epoch = exp(np.interp(0, gap[i - 1:i + 1], np.log([d["epoch"] for d in mdm[i - 1:i + 1]])))
    return {"epoch": epoch, **{k: round(mdm[i][k] * epoch / mdm[i]["epoch"]) for k in units[1:]}}


def extrapolate(evals, level):
    """The epoch at which loss = a epoch^-c, fitted to the second half of the evaluations, reaches level: too
    early where the curve flattens. None where it does not fall."""
    tail = evals[len(evals) // 2:]
    if len(tail) < 3:
        return None
    c, a = np.polyfit(np.log([e["epoch"] for e in tail]), np.log([e["loss"] for e in tail]), 1)
    epoch = (log(level) - a) / c if c < 0 else inf
    return exp(epoch) if epoch < 20 else None


def tell(c, until):
    if c["gap"] is None:
        return "nothing to compare"
    side = "below" if c["gap"] > 0 else "above"
    sure = f"{abs(c['gap']) / c['se']:.0f} standard errors of the masks"
    end = f"diffusion is {abs(c['gap']):.3f} {side} at the end ({sure})"
    if c["first"] is None:
        if c["extrapolated"]:
            end += f"; a power law of its tail gets there at epoch {c['extrapolated']:.0f} or later"
        return f"none up to epoch {until:.0f}, {end}"
    first = c["first"]
    tokens = f"{first['tokens'] / 1e6:.2f}M tokens, {first['flops']:.2e} FLOPs"
    where = f"epoch {first['epoch']:.1f} (step {first['step']:,}, {tokens}), and {end}"
    return "at or before " * bool(first.get("before")) + where


def law(U, N, flops_per_epoch):
    """What is published: the critical compute 191.6 U^2.174 at which diffusion passes AR (2507.15857, fitted
    for U of 25M to 100M) as an epoch of this run, and the epochs after which diffusion itself overfits
    (Quokka, 2510.03280, eq. 15). U in tokens, N in parameters."""
    critical = 191.6 * U ** 2.174
    e = np.geomspace(1, 1e6, 10_000)
    k = 254.35 * U ** 0.39 / N ** 0.55
    horizon = e[np.argmax(1.49 * np.log(e) - ((e - 1) / k) ** 0.4)]
    return dict(critical_flops=critical, critical_epoch=critical / flops_per_epoch, overfit_epoch=horizon)


def few_runs(name, few, arms, probe=0):
    """flags(arm, seed, rate, epochs, **more): those of a run of an experiment with few unique tokens.
    probe: 1 for about `evals` probes on the way."""
    root = Path(few["out"] or f"out/{name}-{few['scale']}")
    root /= f"{Path(few['dataset']).name}-U{few['unique_tokens']}-{few['n_layer']}x{few['n_embd']}"
    common = settings("schedule=constant eval_windows=256 log_every=100 save_every=500")
    common |= pick(few, "dataset unique_tokens n_layer n_head n_embd block_size batch_tokens")

    def flags(arm, seed, rate, epochs, folder="", **more):
        unique = few["unique_tokens"] // few["block_size"] * few["block_size"]
        steps = ceil(epochs * unique / few["batch_tokens"])
        dense = {"ar": 4, "mixed": 2, "mdm": 2}.get(arms[arm]["objective"], 1)    # AR's least is a narrow one
        most = min(steps, max(2, steps // 8))               # evaluations: they are not to take the time
        grids = [n * (few["evals"] - 1) + 1 for n in (1, 2, 4) if n <= dense]   # each holds the one before
        evals = max((n for n in grids if n <= most), default=most)
        given = dict(max_steps=steps, eval_epochs=f"geometric:{evals}", warmup=min(100, steps // 10),
                     seed=seed, lr=rate, probe_every=dense * probe)
        out = root / f"{file_part(arm)}-s{seed}-lr{rate:g}" / folder
        return common | given | arms[arm] | more | dict(epochs=epochs, out=str(out))
    return flags


def planned(few, flags, arms):
    """A generator: the epochs that all arms reach in the time, by their speed side by side; told before they
    begin. Without --minutes about five, but 60 epochs at least: before that the curves do not cross."""
    if few["scale"] == "gpu" and not few["minutes"]:
        return few["epochs"]
    short = settings("max_steps=60 eval_epochs=none eval_every=0 eval_windows=8 log_every=20 folder=speed")
    jobs = {f"{a} speed": flags(a, 0, few["rates"][0], few["epochs"], **short) for a in arms}
    yield jobs
    slowest = min(max(r["tok_per_s"] for r in train.read_log(job["out"]) if r["kind"] == "train")
                  for job in jobs.values())
    reached = slowest * 60 * (few["minutes"] or 4.5) / few["unique_tokens"]
    least = 1 if few["minutes"] else 60
    epochs = min(few["epochs"], float(max(least, int(reached))))
    took = epochs * few["unique_tokens"] / slowest * ceil(len(arms) / few["workers"])
    print(f"{slowest:,} tokens/s in the slowest arm: {epochs:g} epochs each, about {train.clock(took)}")
    return epochs


def tuned(arms, rates, seeds, flags, epochs, anneal=()):
    """A generator: trains every arm at each rate with the first seed, at its best rate with all seeds, and
    the arms `anneal` once more with a rate that falls to 0: an arm that has overfitted over 0.7, 1 and 1.4
    times the epochs of its best evaluation, another over all epochs.
    Returns {(arm, seed): row}. epochs: {arm: epochs}, but for those that an arm sets itself."""
    epochs = epochs | {a: own["epochs"] for a, own in arms.items() if "epochs" in own}
    evals = yield {(a, "lr", r): flags(a, seeds[0], r, epochs[a]) for a, r in product(arms, rates)}
    best = {a: min(rates, key=lambda r: lowest(evals[a, "lr", r])["loss"]) for a in arms}
    runs = {(a, s): flags(a, s, best[a], epochs[a]) for a, s in product(arms, seeds)}
    evals = yield runs
    rows = {}
    for key, run in runs.items():
        # Blocks of 1 are AR in an order.
        measure = "exact" if run.get("diffusion_block") == 1 else MEASURED[run["objective"]]
        rows[key] = outcome(evals[key]) | dict(lr=run["lr"], run=run["out"], measure=measure)
    jobs = {}
    for (a, s), row in rows.items():
        overfitted = row["best"] < row["last"]
        lengths = {max(1, round(f * row["best_epoch"])) for f in (0.7, 1, 1.4)} if overfitted else {epochs[a]}
        for n in lengths if a in anneal else ():
            jobs[a, s, "annealed over", n] = flags(a, s, best[a], n, schedule="wsd", eval_epochs=None,
                                                   eval_every=0, folder=f"annealed-{n:g}")
    evals = yield jobs
    for key, job in jobs.items():
        row, end = rows[key[:2]], lowest(evals[key])
        if end["loss"] < row.get("annealed", inf):
            row |= dict(annealed=end["loss"], annealed_run=job["out"])
            row |= {f"annealed_{k}": end[k] for k in ("epoch", "flops", "se")}
    return rows


def floor(row):
    """The least loss of an arm, annealed or not."""
    return min(row["best"], row.get("annealed", inf))


def lowest(evals):
    return min(evals, key=lambda e: e["loss"])


def outcome(evals):
    """Columns of a run."""
    best, last = lowest(evals), evals[-1]
    return dict(best=best["loss"], best_epoch=best["epoch"], best_flops=best["flops"], se=best["se"],
                bpb=best["bpb"], last=last["loss"], train=last["train_loss"], epochs=last["epoch"],
                flops=last["flops"], evals=evals)


@torch.no_grad()
def paired_gap(ar, mdm, windows):
    """AR's best minus diffusion's end on the same windows, in nats per token, with two standard errors: over
    the choice of windows (paired: what is hard for both cancels) and over the masks. ar, mdm: run folders."""
    (ar, _), (mdm, _) = load_model(ar), load_model(mdm, "last")
    bound, se_masks = sample.panel(mdm, dict(objective="mdm"), windows, 16)[0][1]()
    gap = train.ar_nats(ar, windows, 256).double().mean(1) - bound
    return dict(gap=gap.mean().item(), se_windows=(gap.std() / len(gap) ** 0.5).item(), se_masks=se_masks)


def draw_curves(ax, rows, x, y, by=("arm",), **style):
    """The evaluations of all rows that are alike in the columns `by`: their mean at the steps that all of
    them have, in a band from the lowest to the highest seed. Stars: annealed runs, each a run of its own."""
    runs = grouped([r for r in rows if "evals" in r], *by)
    for i, (words, same) in enumerate(runs.items()):
        name = " ".join(words)
        seeds = [{e["step"]: e for e in r["evals"] if e.get(y) is not None} for r in same]
        steps = sorted(set.intersection(*map(set, seeds)))
        xs = [mean(evals[s][x] for evals in seeds) for s in steps]
        ys = np.array([[evals[s][y] for s in steps] for evals in seeds])
        colour = {"ar": "tab:red", "mdm": "tab:blue"}.get(name, f"C{'45678912'[i % 8]}")
        label = name + f", mean of {len(seeds)} seeds" * (len(seeds) > 1)
        ax.plot(xs, ys.mean(0), **dict(marker="o", ms=2, color=colour, label=label) | style)
        if len(seeds) > 1 and "label" not in style:
            ax.fill_between(xs, ys.min(0), ys.max(0), color=colour, alpha=0.2, lw=0)
    ax.grid(alpha=0.25)
    stars = points(rows, f"annealed_{x}", "annealed")
    if stars and y == "loss":
        ax.plot(*zip(*stars), "k*", ms=9, zorder=5, label="annealed")


def curve_picture(figure, rows, result, x="epoch", title="", by=("arm",)):
    """`draw_curves` as a picture, of x and y where these are flags; a line for what was not trained here."""
    ax = figure.subplots()
    flags = result["flags"]
    x, y = flags.get("x", x), flags.get("y", "loss")
    draw_curves(ax, rows, x, y, by)
    for r in rows:
        if "evals" not in r:
            ax.axhline(r["best"], color="0.45", lw=1, ls="--", label=f"the {r['arm']} model, {r['best']:.3f}")
    what = "nats per token (diffusion: a bound)" if y == "loss" else f"{y}, validation"
    dress(ax, title.format(**flags), xlabel=AXES[x], ylabel=what, xscale="log")
    plain_log(ax.xaxis)


def crossover_picture(figure, rows, result):
    """Losses of all arms and, below, whether they tell true ends of passages from others;
    x is the axis of --x. A star is an annealed run."""
    x = result["flags"]["x"]
    plain = [r for r in rows if r["arm"] in OBJECTIVES]
    figure.set_size_inches(8, 7)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    draw_curves(top, rows, x, "loss")
    draw_curves(top, plain, x, "train_loss", marker="", lw=0.8, alpha=0.7, label=None)
    best = min(floor(r) for r in rows if r["arm"] == "ar")
    top.axhline(best, color="0.45", lw=1, ls="--", label=f"AR's best, {best:.3f}")
    for kind, ls in (("curve", ":"), ("honest", "-.")):
        at = [r[kind]["first"].get(x) for r in rows if r.get(kind) and r[kind]["first"]]
        if any(at):                             # no axis of seconds
            told = ", ".join(f"{value:,.4g}" for value in at)
            top.vlines(at, 0, 1, "0.45", ls, lw=1, label=f"{kind} crossing, {x} {told}",
                       transform=top.get_xaxis_transform())
    draw_curves(below, rows, x, "probe_accuracy")
    below.axhline(0.25, color="0.45", lw=1, ls="--")
    below.set(xlabel=AXES[x], ylabel="true end found (chance: 0.25)")
    first = max(r["evals"][0]["loss"] for r in plain)
    title = "{unique_tokens:,} unique tokens of {dataset}, {n_layer} layers of {n_embd}; thin: training text"
    dress(top, title.format(**result["flags"]), xscale="log", ylabel="nats per token (mdm: a bound)",
          ylim=(None, first * 1.05))
    plain_log(below.xaxis)


def crossings(rows, result):
    """The table of the arms, and where the curves cross."""
    shown = "arm" + " seed" * (len(result["seeds"]) > 1) + """ measure lr best best_epoch best_flops annealed
        annealed_epoch last epochs se probe_accuracy probe_gap"""
    arms = [r for r in rows if r["arm"] != "crossing"]
    text = markdown([pick(r, shown) for r in arms]) + "\n"
    kinds = {"curve": "curve crossing (diffusion below AR at the same epoch)",
             "honest": "honest crossing (diffusion below the best that AR ever was, annealed too)",
             "honest_tuned": "honest crossing against the best regularised AR"}
    found = [r for r in rows if r["arm"] == "crossing"]
    until = next(r["epochs"] for r in arms if r["arm"] == "mdm")
    for kind, told in kinds.items():
        for r in found:
            if kind in r:
                text += f"\n{told}, seed {r['seed']}: {tell(r[kind], until)}  "
    for r in found:
        gap = "{gap:+.3f} +- {se_windows:.3f} (windows) +- {se_masks:.3f} (masks)".format(**r["paired"])
        text += f"\non the same windows, seed {r['seed']}: AR's best minus diffusion's end {gap}  "
    mine = found[0]["law"]
    text += (f"\nthe law of 2507.15857: {mine['critical_flops']:.2e} FLOPs, epoch "
             f"{mine['critical_epoch']:.0f}; measured over predicted {mine['ratio']}  "
             f"\nQuokka: diffusion overfits from epoch {mine['overfit_epoch']:.0f} on  ")
    if not 25e6 <= result["flags"]["unique_tokens"] <= 100e6:
        text += "\nBoth laws were fitted to 25M to 100M unique tokens: here they are stretched."
    return text


@experiment(named="scale", show=crossings, picture=crossover_picture, gpu=FEW_GPU)
def crossover(
    arms: ARMS = ("ar", "mdm"),
    arm: list = (),
    anneal: ("ar", "all", "none") = "ar",
    seeds=1,
    seed=1337,
    x: AXES = "epoch",
    **few
):
    """AR against masked diffusion on the same few unique tokens, for many epochs:
    where do the validation losses cross?

    The curve crossing is where diffusion passes below AR at the same epoch, the honest one where it passes
    below the best loss that AR ever reached.

    arms: ar,mdm and any other of ARMS in bench.py: 'ar wd 0.8', 'ar dropout 0.1', 'mixed', 'block of 4'
    arm: one of your own, any flags of train.py: "name: --layers 'kda*3 full' --dropout 0.3"; may be repeated
    anneal: which arms get runs whose rate falls to 0: ar, all or none
    minutes: of training for each arm: as many epochs as all reach; 0: about 4.5, but 60 epochs at least
    x: the picture's axis: epoch | step | tokens | flops | seconds
    """
    need({"ar", "mdm"} <= set(arms), f"--arms {','.join(arms)} must hold ar and mdm")
    arms = {name: ARMS[name] for name in arms} | own_arms(arm)
    seeds, pure = range(seed, seed + seeds), [a for a in arms if arms[a]["objective"] == "ar"]
    flags = few_runs("crossover", few, arms, probe=1)
    print("AR untuned, one seed, unless you ask for more: see results/README.md")
    epochs = yield from planned(few, flags, arms)
    rows = yield from tuned(arms, few["rates"], seeds, flags, dict.fromkeys(arms, epochs),
                            {"ar": pure, "all": list(arms), "none": []}[anneal])
    windows = validation(few["dataset"], few["block_size"], 256)
    for s in seeds:
        for a in arms:
            probe = pick(rows[a, s]["evals"][-1], "probe_accuracy probe_gap")
            yield dict(arm=a, seed=s), rows[a, s] | probe
        ar, mdm = rows["ar", s], rows["mdm", s]
        least = ar["annealed_run"] if floor(ar) < ar["best"] else ar["run"]
        found = dict(curve=crossing(ar["evals"], mdm["evals"]),
                     honest=crossing(None, mdm["evals"], floor(ar)))
        if len(pure) > 1:
            found["honest_tuned"] = crossing(None, mdm["evals"], min(floor(rows[a, s]) for a in pure))
        size = load_model(mdm["run"])[0].num_params(False)
        said = law(few["unique_tokens"], size, mdm["flops"] / mdm["epochs"])
        first = found["honest"]["first"]
        measured = first["epoch"] if first else mdm["epochs"]
        said["ratio"] = "above " * (not first) + f"{measured / said['critical_epoch']:.2g}"
        yield dict(arm="crossing", seed=s), dict(
            law=said, paired=paired_gap(least, mdm["run"], windows), **found)

# ------------------------------------------------------------------------------------------------------------
# compare: any training runs

@experiment(picture=partial(curve_picture, by=("run",)))
def compare(runs, x: AXES = "epoch", y="loss"):
    """Any training runs in one table and one picture, from their metrics.jsonl.

    runs: run folders of train.py
    x: epoch | step | tokens | flops | seconds
    y: any number of an evaluation: loss, train_loss, bpb, probe_accuracy
    """
    for run in runs:
        evals = evaluations(run)
        need(evals and evals[-1].get(y) is not None,
             f"{run} holds no evaluation with '{y}': expected the folder of a training run")
        yield dict(run=run), outcome(evals)

# ------------------------------------------------------------------------------------------------------------
# sparsity: total against active parameters as an axis of the crossover

def match_experts(base, match, ratio=8):
    """(dense, mixture): ModelConfigs on one trunk with the same active,
    or the same total, parameters (within 3%).

    The mixture is the same for both: as many active parameters as the dense model of `base` and `ratio` times
    as many in all, by the width and the number of its experts, 2 active (1B dense, 8B with 1B active). match
    active compares it with that dense model, match total with one whose MLP is wide enough to have all of
    them (8B dense)."""
    need(1 < ratio, f"--ratio {ratio:g} must be above 1: the mixture's parameters in all, to its active ones")
    with torch.device("meta"):
        model = lambda **given: LM(ModelConfig(**base, **given))
        goal = model().num_params()
        mixture = dict(n_expert=8, n_expert_active=2)
        for _ in range(3):  # the router grows with the experts
            active = lambda n: model(**mixture | dict(expert_inner=n)).active_params()
            mixture |= dict(expert_inner=fitting(goal, active, 8))
            total = lambda n: model(**mixture | dict(n_expert=n)).num_params()
            mixture |= dict(n_expert=fitting(ratio * goal, total, 2))
        lm = model(**mixture)
        dense = {}
        need(
            abs(lm.active_params() / goal - 1) < 0.03,  # grouped_mm wants widths in steps of 8
            f"experts of {mixture['expert_inner']} give {lm.active_params():,} active parameters, not "
            f"{goal:,} within 3%: take a larger --n_embd"
        )
        if match == "total":
            dense = dict(n_inner=fitting(lm.num_params(), lambda n: model(n_inner=n).num_params(), 8))
    return dense, mixture


def fitting(goal, size, step):
    """The multiple n of `step` for which size(n), linear in n, is nearest to goal."""
    low, high = size(4 * step), size(8 * step)
    return max(1, round((goal - low) / (high - low) * 4 + 4)) * step


def sparsity_table(rows, result):
    rows = without("minutes flops best_flops bpb train lr run")(rows, result)
    text = markdown(rows) + "\n"
    for ar, mdm in (rows[:2], rows[2:]):
        curve = tell(crossing(ar["evals"], mdm["evals"]), mdm["epochs"])
        honest = tell(crossing(None, mdm["evals"], ar["best"]), mdm["epochs"])
        text += f"\n{ar['model']}: curve crossing {curve}; honest {honest}  "
    return text


@experiment(
    named="scale match",
    show=sparsity_table,
    picture=partial(curve_picture, by=("objective", "model"), title="dense against experts, "
                    "equal {match} parameters, {unique_tokens:,} unique tokens"),
    gpu=FEW_GPU
)
def sparsity(match: ("active", "total") = "active", ratio=8.0, **few):
    """Dense against mixture of experts with the same active or total parameters,
    AR and diffusion, few unique tokens.

    match: what the dense model has as many of as the mixture: active | total parameters
    ratio: total to active parameters of the mixture
    """
    base = pick(few, "n_layer n_head n_embd block_size")
    base["vocab_size"] = load_tokenizer(data_folder(few["dataset"])).n_vocab
    dense, mixture = match_experts(base, match, ratio)
    arms = {f"{o} {kind} {values}": dict(objective=o, set=[f"{k}={v}" for k, v in values.items()])
            for kind, values in {"dense": dense, "mixture": mixture}.items() for o in OBJECTIVES}
    flags = few_runs("sparsity", few, arms)
    epochs = yield from planned(few, flags, arms)
    rows = yield from tuned(arms, few["rates"], [1337], flags, dict.fromkeys(arms, epochs))
    for (name, _), row in rows.items():
        objective, kind, *_ = name.split()
        lm, _ = load_model(row["run"], "last")
        yield dict(model=kind, objective=objective, total=lm.num_params(), active=lm.active_params()), row
    return dict(dense=dense, mixture=mixture)

# ------------------------------------------------------------------------------------------------------------
# study: the crossover taken apart; each part is a file of its own

def study_arms(table, few, rates, seeds):
    """Arms of a table beside plain AR and diffusion, or own ones, each at its best rate. Annealed: all AR
    arms, plain diffusion and the best three of the other arms."""
    arms = OBJECTIVES | table if table else {}
    arms |= own_arms(few["arm"])
    need(arms, "--part own: name the arms by --arm, 'ar:' and 'mdm: --objective mdm' among them")
    flags = few_runs("study", few, arms)
    short = [a for a in arms if arms[a]["objective"] == "ar"]
    epochs = {a: few["ar_epochs"] if a in short else few["epochs"] for a in arms}
    rows = yield from tuned(arms, rates, seeds, flags, epochs, short)
    long = sorted((a for a in arms if a not in short), key=lambda a: floor(rows[a, seeds[0]]))
    long = {a: arms[a] for a in arms if a == "mdm" or a in long[:3]}
    rows |= yield from tuned(long, rates, seeds, flags, epochs, long)
    for (a, s), row in sorted(rows.items(), key=lambda item: floor(item[1])):
        yield dict(arm=a, seed=s), row | dict(least=floor(row))


def study_curve(few, rates, seeds):
    """Along the epochs: how loose the bound is, what is memorised, how sure a model is of what is right."""
    T = few["block_size"]
    text = training(few["dataset"])[:few["unique_tokens"]]
    held = validation(few["dataset"], T, 128)
    seen = train.fixed_windows(text, T, 128).long()
    flags = few_runs("study", few, OBJECTIVES)
    for a, part in product(OBJECTIVES, (16, 4, 1)):
        epochs = few["epochs"] / part
        job = flags(a, seeds[0], rates[len(rates) // 2], epochs, f"until-{epochs:g}")
        evals = (yield {(a, epochs): job})[a, epochs]

        def measure():
            lm, _ = load_model(job["out"], "last")
            ends = {}
            for name, x in dict(train=seen, held_out=held).items():
                canvas = torch.where(torch.arange(T) < T // 4, x, lm.mask_id)
                ends[name] = getattr(diffusion, f"sample_{a}")(lm, canvas, lm.mask_id, generator=seeded(0))
            ends["text"] = held
            out = dict(loss=evals[-1]["loss"], se=evals[-1]["se"], train=evals[-1]["train_loss"])
            for (name, x), n in product(ends.items(), (8, 16, 32)):
                out[f"{name}_{n}"] = copied(x[:, T // 4:], text, n)
            return out | (calibration(lm, held) if a == "ar" else looseness(lm, held))
        yield dict(arm=a, until=epochs), measure


def copied(x, text, n):
    """Share of the n-grams of x (B, T) that stand in the text word for word."""
    grams = lambda row: map(bytes, np.lib.stride_tricks.sliding_window_view(row.astype(np.uint16), n))
    known = set(grams(text))
    return mean(gram in known for row in x.numpy() for gram in grams(row))


@torch.no_grad()
def calibration(lm, x, share=None):
    """{"ece"}: mean distance of confidence and hit rate over 10 bins, for all tokens of AR, or for those that
    a diffusion model predicts when this share is masked."""
    if share is None:
        logits, where = lm(diffusion.shift_right(x, lm.mask_id)), torch.ones_like(x, dtype=torch.bool)
    else:
        masks = torch.full((len(x),), int(share * x.size(1)))
        where = diffusion.smallest(torch.rand(x.shape, generator=seeded(0)), masks)
        logits = lm(torch.where(where, lm.mask_id, x), causal=False)
    sure, guess = logits.softmax(-1)[where].max(-1)
    bins = (sure * 10).long().clamp(max=9)
    excess = torch.zeros(10).index_add_(0, bins, sure - (guess == x[where]).float())
    nats = diffusion.token_nll(logits, x)[where].mean().item()
    return dict(ece=(excess.abs().sum() / len(sure)).item(), nats=nats)


def looseness(lm, x):
    """The bound beside exact likelihoods of the same model on the same windows, and the loss by mask rate."""
    likelihoods = [f() for _, f in sample.panel(lm, dict(objective="mdm"), x, 16)]
    bound, left, surest, any_order = (nats.mean().item() for nats, _ in likelihoods)
    rates = {rate: calibration(lm, x, rate) for rate in (0.1, 0.3, 0.5, 0.7, 0.9)}
    by_rate = {f"nats_at_{rate}": row["nats"] for rate, row in rates.items()}
    return dict(bound=bound, bound_se=likelihoods[0][1], chain_left=left, chain_confidence=surest,
                any_order=any_order, ece=rates[0.5]["ece"], **by_rate)


def study_capacity(few, rates, seeds):
    """Bits that a model holds of random letters, where nothing but memory helps: per parameter."""
    root = Path(few["out"] or "out/study-random")
    data, text = root / "data", root / "letters.txt"
    letters = 97 + np.random.default_rng(0).integers(26, size=max(40_000, few["unique_tokens"] * 2))
    write(text, "".join(map(chr, letters)))
    if not (data / "meta.json").exists():
        prepare.prepare(name="data", text=[str(text)], out_dir=str(root), tokenizer="byte")
    flags = few_runs("study", few | dict(dataset=str(data), out=str(root)), OBJECTIVES)
    rows = yield from tuned(OBJECTIVES, rates[-1:], seeds[:1], flags,
                            dict.fromkeys(OBJECTIVES, few["epochs"]))
    for (a, s), row in rows.items():
        N = load_model(row["run"])[0].num_params()
        for e in row["evals"]:
            bits = few["unique_tokens"] * (log2(26) - e["train_loss"] / log(2))
            yield dict(arm=a, epoch=e["epoch"]), dict(
                train=e["train_loss"], bits=bits, bits_per_parameter=bits / N)


def study_ensembles(few, rates, seeds):
    """K models of different seeds, each at its best checkpoint, their probabilities averaged. Diffusion at
    equal FLOPs in all, each for 1/K of the epochs; AR, which overfits, each for all of its own."""
    windows = validation(few["dataset"], few["block_size"], 256)
    flags = few_runs("study", few, OBJECTIVES)
    for a, K in product(OBJECTIVES, (1, 2, 4)):
        epochs = few["ar_epochs"] if a == "ar" else few["epochs"] / K
        jobs = {(a, i, "of", K): flags(a, seeds[0] + i, rates[len(rates) // 2], epochs, f"until-{epochs:g}")
                for i in range(K)}
        yield jobs

        @torch.no_grad()
        def measure():
            f = averaged([load_model(job["out"])[0] for job in jobs.values()])
            nats, se = sample.panel(f, OBJECTIVES[a], windows, 8)[0][1]()
            return dict(loss=nats.mean().item(), se=se)
        yield dict(arm=a, models=K, epochs=epochs), measure


PARTS = {
    "own": partial(study_arms, {}),
    "ar": partial(study_arms, REGULARISED),
    "diffusion": partial(study_arms, DIFFUSION),
    "causes": partial(study_arms, CAUSES),
    "curve": study_curve,
    "capacity": study_capacity,
    "ensembles": study_ensembles
}


def study_picture(figure, rows, result):
    """The best curves. curve, capacity, ensembles: nothing is drawn."""
    if "evals" in rows[0]:
        shown = [*dict.fromkeys(r["arm"] for r in rows)][:5] + [*OBJECTIVES]
        title = "the best five arms, AR and diffusion: {unique_tokens:,} unique tokens of {dataset}"
        curve_picture(figure, [r for r in rows if r["arm"] in shown], result, title=title)


@experiment(named="part dataset unique_tokens", picture=study_picture,
            show=without("run annealed_run flops minutes bpb annealed_flops annealed_se"))
def study(part: PARTS = "ar", arm: list = (), rates=(1e-3, 2e-3, 4e-3), seeds=1, seed=1337, ar_epochs=64.0,
          **few):
    """The crossover taken apart, for hours: what AR and diffusion are owed, where diffusion wins, and why.

    part: own (--arm) | ar (regularised) | diffusion (tuned too) | causes | curve | capacity | ensembles
    arm: as in crossover: "both: --weight_decay 0.8 --recipe random=.15"; own: these and no others
    rates: learning rates; each arm keeps its best, curve and ensembles take the middle one
    ar_epochs: epochs of AR arms, which overfit early; --epochs are diffusion's
    """
    yield from PARTS[part](few | dict(ar_epochs=ar_epochs, arm=arm), rates, range(seed, seed + seeds))

# ------------------------------------------------------------------------------------------------------------
# map: the honest gap, wherever it was measured

def measured_runs(folder):
    """The runs in the files of crossover and study, with their least loss as `ar` (exact) or `mdm` (a bound,
    by panel's 64 masks where it has them), and as `exact` that of panel, all orders in its largest blocks."""
    runs, sides = {}, {"exact": "ar", "bound": "mdm"}
    files = stored(folder).values()
    for result in files:
        if result["experiment"] in ("crossover", "study"):
            flags, own = result["flags"], own_arms(result["flags"]["arm"])
            text, tokens = Path(flags["dataset"]).name, flags["unique_tokens"]
            root = f"{text}-U{tokens}-{flags['n_layer']}x{flags['n_embd']}"
            for r in (r for r in result["rows"] if r.get("measure") in sides):
                side, name = sides[r["measure"]], f"{root}/{file_part(r['arm'])}-s{r['seed']}"
                width = own.get(r["arm"], flags).get("n_embd", flags["n_embd"])
                end = "annealed" if floor(r) < r["best"] else "best"
                if floor(r) < runs.get(name, {}).get(side, inf):
                    runs[name] = {"text": text, "tokens": tokens, "width": width, "arm": r["arm"],
                                  "seed": r["seed"], "epoch": r[f"{end}_epoch"], "flops": r[f"{end}_flops"],
                                  side: floor(r), f"{side}_se": r.get(f"{end}_se", r["se"])}
    for result in files:
        if result["experiment"] != "panel" or result["flags"].get("fresh"):
            continue
        for path, r in product(result["flags"].get("runs", ()), result["rows"]):
            name = re.search("([^/]+/[^/]+)-lr", path)
            run = runs.get(name and name[1])
            if run is None or "+" in path or not path.endswith(r["run"]) or "over_se" not in r:
                continue
            block = int(r["measure"].split()[-1]) if "any order" in r["measure"] else 0
            if block > run.get("block", 0):
                run |= dict(exact=r["nats"], exact_se=r["over_se"], block=block)
            if r["measure"] == "diffusion, bound" and result["flags"]["n_mc"] >= 64:
                run |= dict(mdm=r["nats"], mdm_se=r["over_se"])
    return list(runs.values())


def by_arm(runs, side):
    """[{seed: run}] of each arm, the best first: by the first seed, which all arms have."""
    arms = [{r["seed"]: r for r in arm} for arm in grouped([r for r in runs if side in r], "arm").values()]
    return sorted(arms, key=lambda arm: arm[min(arm)][side])


def with_worth(rows):
    """Adds how many times as many unique tokens AR needs for what diffusion reaches with these (the claim of
    2511.03276 is 3): interpolated in log tokens between AR's own points, none outside of them."""
    for same in grouped(rows, "text", "width").values():
        at = sorted((r["ar"], log(r["tokens"])) for r in same)
        for r in same:
            loss = r.get("exact", r["mdm"])
            if len(at) > 1 and at[0][0] <= loss <= at[-1][0]:
                r["worth"] = exp(np.interp(loss, *zip(*at))) / r["tokens"]
    return rows


def map_picture(figure, rows, result):
    figure.set_size_inches(10, 4.8)
    titles = dict(mdm="by the bound", exact="by the exact likelihood, all orders in a block")
    for (side, title), ax in zip(titles.items(), figure.subplots(1, 2, sharey=True)):
        ax.axhline(0, color="black", lw=1)
        for i, ((text, width), mine) in enumerate(grouped(rows, "text", "width").items()):
            gaps = [(r["tokens"], r[f"{side}_gap"], r[f"{side}_gap_se"]) for r in mine if side in r]
            if gaps:
                ax.errorbar(*zip(*gaps), marker="o", capsize=3, color=f"C{i}", label=f"{text}, {width} wide")
        dress(ax, title, xlabel="unique tokens", ylabel="AR minus diffusion, nats per token")
        log_ticks(ax, [r["tokens"] for r in rows])
        ax.tick_params(axis="x", rotation=30)


@experiment(finish=with_worth, picture=map_picture)
def map_(results="results"):
    """Where diffusion stands, over texts, unique tokens and width: the best arm of each side, annealed where
    that is better, from the files of crossover, study and panel in --results.

    mdm is a bound, exact the likelihood over all orders in blocks of `block`; gaps are AR minus these, in
    nats per token, errors over seeds and windows (where panel has not been: masks). over_law: diffusion's
    FLOPs over 191.6 U^2.174, at which it should have passed AR (2507.15857).
    """
    cells = grouped(measured_runs(results), "text", "tokens", "width")
    need(cells, f"{results} holds no file of crossover or study")
    for cell, runs in sorted(cells.items()):
        best = {side: next(iter(by_arm(runs, side)), {}) for side in ("ar", "mdm", "exact")}
        row = dict(seeds=len(best["ar"]))
        for side, arm in best.items():
            if arm:
                row |= {side: mean(r[side] for r in arm.values()), f"{side}_arm": arm[min(arm)]["arm"]}
            both = sorted(arm.keys() & best["ar"].keys())
            if both and side != "ar":
                gap, se = mean_se([best["ar"][s]["ar"] - arm[s][side] for s in both])
                row |= {f"{side}_gap": gap, f"{side}_gap_se": hypot(se or 0, arm[both[0]][f"{side}_se"])}
        if best["exact"]:
            row["block"] = min(r["block"] for r in best["exact"].values())
        if "mdm_gap" in row:
            row["over_law"] = best["mdm"][min(best["mdm"])]["flops"] / law(cell[1], 1, 1)["critical_flops"]
            yield dict(zip(("text", "tokens", "width"), cell)), row


@experiment()
def arms(results="results"):
    """Every arm of the files of crossover and study in --results: its least loss in nats per token, exact for
    AR, a bound for diffusion, the epoch of that, and the exact loss over all orders in blocks (panel).

    Arms of one text, number of tokens and width, the best first by the seed that all have; se: over seeds, of
    one seed over masks or windows.
    """
    cells = grouped(measured_runs(results), "text", "tokens", "width")
    for cell, side in product(sorted(cells), ("ar", "mdm")):
        for arm in by_arm(cells[cell], side):
            runs = [*arm.values()]
            loss, se = mean_se([r[side] for r in runs])
            exact = [r["exact"] for r in runs if "exact" in r]
            yield dict(zip(("text", "tokens", "width"), cell), arm=runs[0]["arm"]), dict(
                seeds=len(runs), epoch=mean(r["epoch"] for r in runs), loss=loss,
                se=se or runs[0][f"{side}_se"] or None, any_order=mean(exact) if exact else None)

# ------------------------------------------------------------------------------------------------------------
# adapt: a diffusion model from an AR one

ADAPTED = arms_of("""
    mdm: --objective mdm
    mdm from ar: --objective mdm
    mdm from ar, shifted: --objective mdm --set shift=true
    block of 4: --objective block --diffusion_block 4
    block of 4 from ar: --objective block --diffusion_block 4
    block of 16 from ar: --objective block --diffusion_block 16
""")


SHARED["adapted"] = settings("""
    dataset=docs-byte n_layer=3 n_head=4 n_embd=96 block_size=64 batch_tokens=2048 lr=2e-3
""")


@experiment(picture=partial(curve_picture, x="step"), show=without("bpb train minutes"))
def adapt(ar="", ar_steps=2000, steps=2000, windows=256, workers=2, out="out/adapt", **adapted):
    """A diffusion model from the weights of an AR one, and from scratch: the bound against steps.

    In a shifted one the state that has read token i predicts token i + 1, as in AR (Dream, 2508.15487). After
    30%: of one budget the first part as AR, the rest as block diffusion
    (Chang-Han-Chen/sample-efficient-dlm).

    ar: run of train.py or folder of published weights; none: one is trained for --ar_steps
    ar_steps: of its training
    steps: of training of each diffusion model
    windows: validation windows
    """
    common = adapted | dict(eval_windows=windows, warmup=min(100, steps // 10), log_every=100)
    begun = 0 if ar else 3 * steps // 10
    if not ar:
        ar = f"{out}/ar"
        yield {"ar": common | dict(max_steps=ar_steps, eval_every=0, out=ar),
               "ar, 30%": common | dict(max_steps=begun, eval_every=0, out=f"{out}/ar_30")}
    held = validation(adapted["dataset"], adapted["block_size"], windows)
    yield dict(arm="ar"), dict(best=train.evaluate(load_model(ar)[0], held, "ar")["loss"], measure="exact")
    common |= dict(max_steps=steps, eval_every=max(1, steps // 16))
    weights = dict(init_from=ar, n_layer=None, n_head=None, n_embd=None)        # whose size they have
    jobs = {a: common | flags | (weights if "from" in a else {}) | dict(out=f"{out}/{file_part(a)}")
            for a, flags in ADAPTED.items()}
    if begun:
        jobs["block of 4 after 30% ar"] = jobs["block of 4 from ar"] | dict(
            init_from=f"{out}/ar_30", max_steps=steps - begun, out=f"{out}/block_of_4_after_30")
    evals = yield jobs
    for a in jobs:
        if "after" in a:
            evals[a] = [e | dict(step=e["step"] + begun) for e in evals[a]]
        yield dict(arm=a), outcome(evals[a]) | dict(measure="bound")

# ------------------------------------------------------------------------------------------------------------
# presets: sizes of the published models

PUBLISHED = {
    "gpt2": "124M",
    "llama": "8.03B",
    "llada": "8B",
    "qwen3-next": "80B-A3B",
    "kimi-linear": "48B-A3B",
    "deepseek-v3": "671B-A37B",
    "gpt-oss": "20.9B-A3.6B"
}


def published_costs():
    """Published figures beside ours: bytes per token of a cache in bf16 (DeepSeek-AI, 2505.09343 table 1),
    and how many times fewer keys NSA reads than dense attention (2502.11089 table 4: compressed + selected +
    window)."""
    models = [
        ("DeepSeek-V3", "mla", 70_272, PRESETS["deepseek-v3"]),
        ("Qwen2.5-72B", "full", 327_680, settings("n_layer=80 n_embd=8192 n_head=64 n_kv_head=8")),
        ("Llama-3.1-405B", "full", 516_096, settings("n_layer=126 n_embd=16384 n_head=128 n_kv_head=8"))
    ]
    rows = []
    with torch.device("meta"):
        for name, layer, published, sizes in models:
            config = ModelConfig(**sizes)
            ours = config.n_layer * ATTENTION[layer](config).cache_bytes(1, torch.bfloat16)
            rows.append(dict(model=name, what="cache, bytes per token", published=published, ours=ours))
        nsa = ATTENTION["nsa"](ModelConfig(**settings("n_embd=2560 n_head=64 n_kv_head=4 head_dim=128")))
    for T, published in {8192: 4.0, 16384: 6.4, 32768: 9.1, 65536: 11.6}.items():
        rows.append(dict(model="NSA 27B", what=f"keys read, dense / sparse at {T // 1024}k",
                         published=published, ours=round(T / nsa.reads(T), 1)))
    return rows


def preset_table(rows, result):
    text = "\n\nFrom the papers, and from `cache_bytes` and `reads` at the published settings:\n\n"
    return markdown(rows) + text + markdown(result["published_costs"])


@experiment(show=preset_table)
def presets():
    """Sizes and caches of the published models as configured here, counted on the meta device."""
    billions = lambda n: f"{n / 1e9:.2f}B"
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            lm = LM(from_preset(name))
        cache = lm.cache_bytes(65536, torch.bfloat16) / 65536
        yield dict(preset=name), {
            "published": published,
            "total": billions(lm.num_params()),
            "active": billions(lm.active_params()),
            "cache bytes per token": round(cache)
        }
    return dict(published_costs=published_costs())

# ------------------------------------------------------------------------------------------------------------
# attention: time and memory of a layer against length

SWEEP = tuple(dict.fromkeys(["full", "full gqa", "full window", *ATTENTION]))


def longest(rows, result):
    """The table of the longest length alone."""
    return [r for r in rows if r["T"] == max(r["T"] for r in rows)]


@experiment(
    named="device bidirectional",
    finish=beside_full("forward_ms", "both_ms"),
    show=longest,
    picture=partial(layer_lines, y="both_ms", xlabel="tokens", ylabel="ms, forward + backward",
                    title="one layer, {n_head} heads of {head_dim}\n")
)
def attention(
    lengths=(512, 1024, 2048, 4096, 8192),
    layers: SWEEP = SWEEP,
    n_head=4,
    head_dim=64,
    repeat=3,
    bidirectional=False,
    device="auto",
    threads=1
):
    """Every layer: forward and forward + backward against length, ratio to `full`, keys read, cache.

    lengths: tokens
    layers: names, comma-separated
    bidirectional: as a diffusion model uses it
    """
    for T, name in product(lengths, dict.fromkeys(["full", *layers])):

        def measure():
            layer = make_layer(name, T, n_head, head_dim, device)
            x = torch.randn(1, T, n_head * head_dim, device=device, dtype=dtype_on(device))
            f = lambda x: layer(x, causal=not bidirectional)
            row = time_passes(f, x, device, repeat, layer.parameters())
            return row | dict(
                reads=layer.reads(T, not bidirectional),
                cache_bytes_per_token=layer.cache_bytes(T, torch.bfloat16) / T
            )

        yield dict(layer=name, T=T), measure

# ------------------------------------------------------------------------------------------------------------
# context: one decoded token against the length of the cache


@experiment(
    named="device",
    finish=beside_full("ms"),
    picture=partial(layer_lines, y="tok_per_s", xlabel="tokens in the cache", ylabel="tokens/s",
                    title="decoding by one layer, {n_head} heads of {head_dim}\n")
)
def context(
    lengths=(1024, 4096, 16384, 65536),
    batches=(1,),
    layers: SWEEP = SWEEP,
    n_head=4,
    head_dim=64,
    repeat=100,
    device="auto",
    threads=1
):
    """Decoding: time of one token against the tokens in the cache, each layer and batch.

    lengths: tokens in the cache
    layers: names, comma-separated
    batches: sequences, comma-separated; the picture shows the first
    """
    cuda = device.startswith("cuda")
    dtype = dtype_on(device)
    for T, name, B in product(lengths, layers, batches):

        def measure():
            layer = make_layer(name, T, n_head, head_dim, device).eval()
            x = torch.randn(B, 1, n_head * head_dim, device=device, dtype=dtype)
            cache = layer.init_cache(B, T, device, dtype)
            f = layer
            for a in filter(torch.is_tensor, vars(cache).values()):
                if a is not cache.pos:
                    a.normal_()  # as if tokens had been read
                if cuda:
                    torch._dynamo.mark_static_address(a)  # else a CUDA graph copies it
            if cuda:
                f = torch.compile(layer, dynamic=False, fullgraph=True, mode="reduce-overhead")

            def step():
                cache.used = T - 1  # the same step again, in the last slot
                cache.pos.fill_(T - 1)
                f(x, cache=cache)

            with torch.no_grad():
                ms = 1e3 * seconds_of(step, device, repeat)
            return dict(
                ms=ms,
                tok_per_s=B / ms * 1e3,
                reads=layer.reads(T),
                cache_mib=B * layer.cache_bytes(T, dtype) / 2 ** 20
            )

        yield dict(layer=name, T=T, batch=B), measure

# ------------------------------------------------------------------------------------------------------------
# train: speed and memory of training

SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
SHARED["sizes"] = dict.fromkeys(SIZES)


def to_train(kind, config, device, folder):
    """(model, its optimizers, its loss of tokens (B, T + 1) and noise) of "ar", "mdm" or,
    of the same shape, a nanoGPT checkout."""
    if kind == "nanoGPT":
        sys.path.insert(0, str(folder))
        sys.modules.pop("model")
        from model import GPT, GPTConfig  # nanoGPT's, not ours

        shape = {k: getattr(config, k) for k in SIZES}
        lm = GPT(GPTConfig(**shape, dropout=0.0, bias=False)).to(device)
        optimizer = lm.configure_optimizers(0.1, 1e-3, (0.9, 0.95), torch.device(device).type)
        return lm, [optimizer], lambda x, noise: lm(x[:, :-1].contiguous(), x[:, 1:].contiguous())[1]
    lm = LM(config).to(device)
    losses = {
        "ar": lambda x, noise: diffusion.ar_loss(lm, x[:, :-1], lm.mask_id),
        "mdm": lambda x, noise: diffusion.mdm_loss(lm, x[:, :-1], lm.mask_id, noise=noise)
    }
    return lm, train.make_optimizers(lm, train.DEFAULTS), losses[kind]


def throughput(kind, values, batch, iters, warmup, device, threads, peer):
    """Times optimizer steps of one model on random tokens; in a process of its own."""
    cuda = device.startswith("cuda")
    clock = clock_of(device)
    gen = seeded(0)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as train.py and nanoGPT do
    config = ModelConfig(**values)
    T = config.block_size
    lm, optimizers, loss_of = to_train(kind, config, device, peer)
    if cuda:
        loss_of = torch.compile(loss_of, dynamic=False, fullgraph=kind != "nanoGPT")
    pin = torch.Tensor.pin_memory if cuda else torch.Tensor.contiguous
    for i in range(warmup + iters):
        if i == warmup:
            if kind != "nanoGPT":
                torch.compiler.set_stance("fail_on_recompile")  # after the warm-up there is none, or stop
            tic = clock()  # of all steps together: on a GPU nothing waits between them, as in training
        x = torch.randint(config.vocab_size, (batch, T + 1), generator=gen)
        x, *noise = (pin(a).to(device, non_blocking=True) for a in (x, *diffusion.mdm_noise(batch, T, gen)))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cuda):
            loss = loss_of(x, noise)
        update(lm, optimizers, loss)
    seconds = (clock() - tic) / iters
    params = sum(p.numel() for p in lm.parameters())
    usage = resource.getrusage(resource.RUSAGE_SELF)
    memory = torch.cuda.max_memory_allocated() if cuda else 1024 * usage.ru_maxrss
    speed = batch * T / seconds
    peak = train.peak_flops(device)
    mfu = peak and speed * (6 * params + 12 * config.n_layer * config.n_embd * T) / peak
    return dict(params=params, ms=1e3 * seconds, tok_per_s=speed, peak_mib=memory / 2 ** 20, mfu=mfu)


def speed_table(rows, result):
    """The median of the rounds, and beside nanoGPT the ratios of these medians."""
    table, columns = [], "params tok_per_s ms peak_mib mfu".split()
    for (model,), rounds in grouped(rows, "model").items():
        middle = lambda key: rounds[0][key] and median(r[key] for r in rounds)   # mfu may be None
        table.append({"model": model} | {key: middle(key) for key in columns})
    peer = table[-1]
    for row in table if peer["model"] == "nanoGPT" else ():
        row["speed_vs_nanoGPT"] = peer["ms"] / row["ms"]
        row["memory_vs_nanoGPT"] = row["peak_mib"] / peer["peak_mib"]
    return table


@experiment(named="device", show=speed_table)
def train_(
    preset: PRESETS = "gpt2",
    objectives: OBJECTIVES = ("ar", "mdm"),
    batch=12,
    iters=40,
    warmup=5,
    rounds=3,
    vs=None,
    device="auto",
    threads=1,
    **sizes: int
):
    """Training speed, memory and MFU, with --vs beside nanoGPT: alternating runs in processes of their own.
    On a GPU all are compiled; MFU is nanoGPT's, 6 N + 12 L C T per token over the dense bf16 peak.

    preset: model; the sizes are its own where none is given
    batch: windows in a step
    iters: timed steps
    warmup: steps before them
    rounds: alternating runs of each model
    vs: folder of a nanoGPT checkout to run beside
    """
    values = PRESETS[preset] | {k: v for k, v in sizes.items() if v is not None}
    peer = Path(vs, "model.py").resolve(strict=True).parent if vs else None
    for i, kind in product(range(rounds), [*objectives, *["nanoGPT"] * bool(vs)]):

        def measure():
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                run = pool.submit(throughput, kind, values, batch, iters, warmup, device, threads, peer)
                return run.result()

        yield dict(model=kind, round=i + 1), measure

# ------------------------------------------------------------------------------------------------------------
# quality: the same small model with every mixer

# Muon, QK norm and small batches: with them a few minutes of training buy most.
QUICK = train.parse_flags(shlex.split("""
    --n_head 4 --optimizer muon --lr 4e-3 --set qk_norm=true --eval_every 0 --log_every 100 --save_every 200
"""))
SHARED["small"] = settings("""
    dataset=docs-byte n_layer=4 n_embd=128 block_size=512 batch_tokens=512 device=auto
""")


def same_size(pattern, base):
    """n_inner with which a model of this layer pattern has as many parameters as one
    of `full`, to steps of 8."""
    size = lambda **given: LM(ModelConfig(**base, **given)).num_params()
    with torch.device("meta"):
        return fitting(size(layers="full"), lambda n: size(layers=pattern, n_inner=n), 8)


def joined(rows, result):
    """A row for each mixer: keys read, loss +- standard deviation (seeds) as AR and as diffusion."""
    def cells(r):
        spread = f" +- {r['std']:.3f}" if r["std"] else ""
        column = {"ar": "AR", "mdm": "masked diffusion (a bound)"}[r["objective"]]
        return {"mixer": f"`{r['mixer']}`", f"{r['objective']} reads": r["reads"],
                column: f"{r['loss']:.3f}{spread} ({r['seeds']})"}
    return sorted(merged(rows, ["mixer"], cells), key=lambda row: row.get("AR", "9"))


def ratio_picture(figure, rows, result):
    """Loss against the share of `full` layers beside one other kind, AR and diffusion; dotted where the full
    layer is the first of its period. Nothing without such mixtures."""
    lines = defaultdict(list)
    for r in rows:
        if r["mixer"] in OPTIONS or "bidir" in r["mixer"]:
            continue
        names = [name for name, _ in parse_layers(r["mixer"], result["flags"]["n_layer"])]
        share = names.count("full") / len(names)
        places = ["first" if names[0] == "full" else "last"] if 0 < share < 1 else ["first", "last"]
        others = {*names} - {"full"}
        for kind, place in product(others or ATTENTION, places):     # full alone is an end of every line
            if len(others) < 2:
                lines[r["objective"], kind, place].append((share, r["loss"], r["std"] or 0))
    lines = {key: sorted(line) for key, line in lines.items() if len({share for share, *_ in line}) > 2}
    if not lines:
        return
    figure.set_size_inches(8, 4.5)
    ax = figure.subplots()
    for (objective, kind, place), line in lines.items():
        dots = "-" if place == "last" else ":"
        ax.errorbar(*zip(*line), marker="o", ls=dots, label=f"{objective}, {kind}, full {place}")
    dress(ax, "", xlabel="share of full layers", ylabel="nats per token (mdm: a bound)")


@experiment(named="device dtype", show=joined, picture=ratio_picture)
def quality(
    mixers=(*ATTENTION, "full window", "gated_deltanet alternate", "gated_deltanet forward", *MIXTURES),
    objectives: OBJECTIVES = ("ar", "mdm"),
    seeds=3,
    seed=1337,
    steps=1200,
    workers=1,
    out="out/quality",
    dtype="auto",
    **small
):
    """The same small model with every mixer, AR and diffusion: validation loss, keys read, equal parameters.

    mixers: layers, the names in the default, or any layer patterns, comma-separated
    steps: of training: of each AR run, three times as many for diffusion
    dtype: auto (bfloat16 on a GPU) | bfloat16 | float32
    """
    T = small["block_size"]
    V = load_tokenizer(data_folder(small["dataset"])).n_vocab
    base = pick(small, "n_layer n_embd block_size") | dict(n_head=4, vocab_size=V, qk_norm=True)
    patterns = {name: pattern_of(name, T // 4, 16) for name in mixers}
    inner = {name: same_size(pattern, base) for name, pattern in patterns.items()}
    steps_of = {"ar": steps, "mdm": 3 * steps}  # diffusion learns slowly
    kinds = [(o, name) for o, name in product(objectives, patterns)
             if o == "mdm" or "bidir" not in patterns[name]]            # causal they are all the same
    jobs = {}
    runs = range(seed, seed + seeds)
    for s, (o, name) in product(runs, kinds):
        jobs[name, o, s] = QUICK | small | dict(
            objective=o,
            layers=patterns[name],
            set=[*QUICK["set"], f"n_inner={inner[name]}"],
            seed=s,
            max_steps=steps_of[o],
            eval_windows=64,
            dtype=dtype,
            out=f"{out}/{file_part(name)}-{o}-{steps_of[o]}-s{s}-{dtype}"
        )
    evals = yield jobs
    for o, name in kinds:
        losses = [evals[name, o, s][-1]["loss"] for s in runs]
        lm, _ = load_model(jobs[name, o, seed]["out"], "last")
        yield dict(mixer=name, objective=o), dict(
            loss=mean(losses),
            std=stdev(losses) if seeds > 1 else None,
            seeds=seeds,
            losses=losses,
            reads=max(b.mixer.reads(T, o == "ar") for b in lm.blocks)
        )
    ids = training(small["dataset"])
    x = validation(small["dataset"], T, 64).numpy()
    pairs = np.ones((V, V))  # counts of a bigram model, add-one smoothing
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    bigram = -np.log(pairs / pairs.sum(1, keepdims=True))[x[:, :-1], x[:, 1:]].mean()
    return dict(bigram=bigram)

# ------------------------------------------------------------------------------------------------------------
# recall: keys and values seen once, asked for later

KEYS, VALUES, TEXT = 128, 32, 8  # ids: keys, values, letters of the text
NEEDLES, PAIRS = 4, (4, 8, 16, 32, 64, 128)
# Every model starts with a layer that sees one neighbour (linear layers have that in their short
# convolution), so that the key stands in its value's vector, and has one layer of the kind behind it, a 3:1
# hybrid four: one state, one cache are measured. Sparse layers read at most a quarter of 512 tokens, so they
# are not asked at 256. A linear layer's state: 2 heads of 32 x 32.
RECALL = dict(n_head=2, n_embd=64, tied=False, position="none", vocab_size=KEYS + VALUES + TEXT)


def draw_recall(B, T, n, generator, text=None):
    """x (B, T) and which of its tokens are answers (B, T) bool:
    n pairs (key, value), keys distinct, then queries.

    text None: multi-query associative recall (Zoology, arXiv 2312.04927), pairs in front and queries (key,
    answer) to the end. Else a needle in generated text: pairs at random even places of T letters of this
    language, and T / 8 queries at the end. Where Zoology has a random token an answer is hidden, so a query
    helps no later one, and AR and diffusion read the same."""
    asks = T // 8 if text else T // 2 - n
    keys = torch.rand(B, KEYS, generator=generator).argsort(1)[:, :n]
    values = KEYS + torch.randint(VALUES, (B, n), generator=generator)
    pairs = torch.stack([keys, values], dim=-1)  # (B, n, 2)
    rows = torch.arange(B)[:, None]
    queries = pairs[rows, torch.randint(n, (B, asks), generator=generator)]
    if text:
        body = KEYS + VALUES + text.draw(B, T - 2 * asks, generator).view(B, -1, 2)
        body[rows, torch.rand(body.shape[:2], generator=generator).argsort(1)[:, :n]] = pairs
        pairs = body
    t = torch.arange(T).expand(B, T)
    return torch.cat([pairs, queries], dim=1).flatten(1), (t >= T - 2 * asks) & (t % 2 == 1)


def recall_logits(f, x, answer, mask_id, causal, aux=None):
    """(N, V) logits and (N,) ids of the answers, all hidden:
    AR says them at their query, diffusion at their own place."""
    z = f(torch.where(answer, mask_id, x), causal=causal, aux=aux)
    return (z[:, :-1][answer[:, 1:]] if causal else z[answer]), x[answer]


def recall_loss(lm, x, answer, causal, stage):
    """Nats per answer; in the stage "warmup" the indexer of a sparse layer learns beside dense attention."""
    for block in lm.blocks:
        block.mixer.stage = stage
    aux = {}
    z, y = recall_logits(lm, x, answer, lm.mask_id, causal, aux)
    return F.cross_entropy(z, y) + sum(aux.values())


@torch.no_grad()
def recall_accuracy(f, T, n, mask_id, causal, text=None, device="cpu"):
    """(share of right answers, its standard error over sequences, nats per answer). Guessing gives
    1 / VALUES, among values seen 1 / n."""
    right, nats = [], []
    gen = seeded(T * KEYS + n)
    for _ in range(4):
        x, answer = (a.to(device) for a in draw_recall(max(1, 4096 // T), T, n, gen, text))
        z, y = recall_logits(f, x, answer, mask_id, causal)
        # Each sequence asks equally often.
        right += (z.argmax(-1) == y).double().view(len(x), -1).mean(1).tolist()
        nats.append(F.cross_entropy(z, y).item())
    return *mean_se(right), mean(nats)


def learn_recall(config, causal, steps, tokens, lengths, path, device):
    """A model that has learned both tasks. Short sequences first: copying is found in seconds with 8 pairs in
    32 tokens and hardly ever in 512; later both in turn."""
    def loss_of(lm, step, gen):
        done = step / steps
        T = lengths[step // 2 % len(lengths)]
        if done < 0.6:
            T = min(32 << max(0, int(16 * done - 4)), max(lengths))
        pairs = [8] if T == 32 else [n for n in PAIRS if n <= T // 4]
        n = pairs[torch.randint(len(pairs), (), generator=gen)]
        text = Bigram(TEXT) if step % 2 and done > 0.5 else None
        x, answer = draw_recall(max(1, tokens // T), T, n, gen, text)
        stage = "warmup" if done < 0.6 else "sparse"
        return recall_loss(lm, x.to(device), answer.to(device), causal, stage)

    return learn(config, loss_of, steps, path, device)


def recall_cells(r):
    task = f"pairs {r['pairs']}" if r["task"] == "pairs" else f"needle {r['T']}"
    return {task: f"{100 * r['accuracy']:.0f}"}


@experiment(show=pivot("objective layers", recall_cells))
def recall(
    layers=(*ATTENTION, *MIXTURES),
    objectives: OBJECTIVES = ("ar", "mdm"),
    steps=600,
    lengths=(256, 512, 1024, 2048, 4096),
    batch_tokens=2048,
    device="auto",
    threads=1,
    out="out/recall"
):
    """Associative recall and a needle in generated text:
    accuracy of every layer against pairs and length, in %.

    layers: names or any layer patterns, comma-separated
    lengths: of the text with needles; also trained on
    steps: of training, each
    """
    asked = ",".join(map(str, lengths))
    need(all(T % 8 == 0 and T >= 16 for T in lengths),
         f"--lengths {asked}: expected multiples of 8, at least 16")
    folder = Path(out) / f"{asked}-steps{steps}-tokens{batch_tokens}"
    grid = [("pairs", 512, n) for n in PAIRS] + [("needle", T, NEEDLES) for T in lengths]
    for name, objective in product(layers, objectives):
        pattern = "linear(linear_decay=none)" if name == "linear" else pattern_of(name, 128)
        period = parse_layers(pattern)
        config = ModelConfig(
            **RECALL,
            block_size=max(512, *lengths),
            n_layer=1 + len(period),
            layers=f"full(window=2, position=rotary) {pattern}"
        )
        ar = objective == "ar"
        path = folder / f"{objective}-{file_part(name)}.pt"
        sparse = any(ATTENTION[layer].family == "sparse" for layer, _ in period)
        for task, T, n in grid:

            def measure():
                lm = learn_recall(config, ar, steps, batch_tokens, lengths, path, device)
                text = Bigram(TEXT) if task == "needle" else None
                right, se, _ = recall_accuracy(lm, T, n, lm.mask_id, ar, text, device)
                return dict(accuracy=right, se=se)

            if T >= 512 or not sparse:
                yield dict(layers=name, objective=objective, task=task, T=T, pairs=n), measure

# ------------------------------------------------------------------------------------------------------------
# switch: a dense checkpoint run sparse

def switch_arms(keys):
    """{arm: its layer}: dense ones, and those that read about `keys` keys. Only dsa goes on from mla."""
    return {
        "dense": "full(n_kv_head=1)",
        "window": f"full(n_kv_head=1, window={keys})",
        "infllm": pattern_of("infllm", keys),
        "infllm, blocks of 4": pattern_of("infllm", keys, 4),
        "msa": pattern_of("msa", keys),
        "nsa": pattern_of("nsa", keys),
        "dense mla": "mla",
        "dsa": pattern_of("dsa", keys)
    }


@experiment(named="device")
def switch(length=1024, keys=128, steps=600, adapt=100, batch_tokens=2048, device="auto", threads=1,
           out="out/switch"):
    """InfLLM-V2's claim (2509.24663) in small: a dense AR checkpoint run sparse at once, and after N steps of
    adaptation, where reach counts: needles in generated text.

    The checkpoint is loaded into another layer; what that has in addition begins anew. All arms take the same
    N batches; an indexer learns beside dense attention in the first half of them, as DSA's. gap: of the nats
    per answer, to the dense arm of the same checkpoint at the same step.

    length: of the texts
    keys: that a query reads, about
    steps: of dense training
    adapt: steps of adaptation, N
    """
    folder = Path(out) / f"{length}-steps{steps}-tokens{batch_tokens}"
    text = Bigram(TEXT)
    config_of = lambda layer: ModelConfig(
        **RECALL, block_size=length, n_layer=2, layers=f"full(window=2, position=rotary) {layer}")

    def loss_of(lm, step, gen):
        x, answer = draw_recall(max(1, batch_tokens // length), length, NEEDLES, gen, text)
        stage = "warmup" if 2 * step < adapt else "sparse"
        return recall_loss(lm, x.to(device), answer.to(device), True, stage)

    @cache
    def asked(dense, layer, N):
        """The dense checkpoint with this layer after N steps: (model, right answers, their error, nats)."""
        def begun(config):
            path, lengths = folder / f"{file_part(dense)}.pt", (length // 4, length)
            trained = learn_recall(config_of(dense), True, steps, batch_tokens, lengths, path, device)
            lm = LM(config)
            lm.load_state_dict(trained.state_dict(), strict=False)
            return lm

        path = folder / f"{file_part(layer)}-{N}.pt"
        lm = learn(config_of(layer), loss_of, N, path, device, begun, lr=1e-3, warmup=adapt // 10)
        return lm, *recall_accuracy(lm, length, NEEDLES, lm.mask_id, True, text, device)

    for arm, layer in switch_arms(keys).items():
        dense = "mla" if arm in ("dense mla", "dsa") else "full(n_kv_head=1)"

        def measure():
            row = {}
            for when, N in dict(before=0, after=adapt).items():
                lm, right, se, nats = asked(dense, layer, N)
                row |= {"reads": lm.blocks[1].mixer.reads(length), f"recall_{when}": right, f"se_{when}": se,
                        f"nats_{when}": nats, f"gap_{when}": nats - asked(dense, dense, N)[3]}
            return row

        yield dict(arm=arm), measure

# ------------------------------------------------------------------------------------------------------------
# track: what a state can keep count of (arXiv 2411.12537, 2502.10297)

GROUPS = settings("parity=2 s3=3 s5=5")     # all permutations of so many things: 2, 6 and 120 tokens
RULES = tuple("""
    full linear linear(linear_decay=channel)
    deltanet deltanet(neg_eigval=true) deltanet(neg_eigval=true,writes=2) deltanet(neg_eigval=true,writes=4)
    gated_deltanet gated_deltanet(neg_eigval=true) gated_deltanet(neg_eigval=true,writes=2)
    gated_deltanet(neg_eigval=true,writes=4) kda(neg_eigval=true) kda(neg_eigval=true,channel_beta=true)
""".split())


def draw_words(B, T, things, generator):
    """x (B, T): random permutations, by number; y (B, T): the number of the product of all up to there."""
    all_of = torch.tensor(list(permutations(range(things))))
    x = torch.randint(len(all_of), (B, T), generator=generator)
    y, order = [], torch.arange(things).expand(B, things)
    for t in range(T):
        order = order.gather(1, all_of[x[:, t]])
        y.append((order[:, None] == all_of).all(-1).int().argmax(1))
    return x, torch.stack(y, dim=1)


def track_cells(r):
    return {"layer": f"`{r['layer']}`", f"{r['group']} {r['T']}": f"{100 * r['accuracy']:.0f}"}


@experiment(show=pivot("layer", track_cells))
def track(layers=RULES, groups: GROUPS = tuple(GROUPS), steps=1000, length=32, times=(1, 4, 16),
          out="out/track"):
    """State tracking: one layer reads permutations and names their product after each, right answers in %.

    The product cannot be told from a few of them: the state itself must turn. Linear attention adds and fails
    at parity; eigenvalues down to -1 (neg_eigval) give parity, several writes per token the groups that do
    not commute.

    layers: names or any layer patterns, comma-separated
    groups: parity, s3, s5: permutations of two, three, five things
    steps: of training, each
    length: of the texts at the end of training; they begin with 4 tokens
    times: tested at so many times that length
    """
    for name, group in product(layers, groups):
        things = GROUPS[group]
        path = Path(out) / f"{group}-{file_part(name)}-{length}-steps{steps}.pt"
        config = ModelConfig(**RECALL | dict(layers=name, n_layer=1, vocab_size=factorial(things),
                                             block_size=length * max(times)))

        def loss_of(lm, step, generator):
            T = min(4 << int(8 * step / steps), length)
            x, y = draw_words(2048 // T, T, things, generator)
            return F.cross_entropy(lm(x).flatten(0, 1), y.flatten())

        for n in times:
            T = n * length

            def measure():
                lm = learn(config, loss_of, steps, path)
                x, y = draw_words(max(4, 8192 // T), T, things, seeded(T))
                with torch.no_grad():
                    right = lm(x).argmax(-1) == y
                return accuracy(right.double().mean(1))

            yield dict(layer=name, group=group, T=T), measure

# ------------------------------------------------------------------------------------------------------------
# optical: a page of text as a picture (DeepSeek-OCR, 2510.18234), and without one (2512.03643)

# Dot matrix, five columns a character, from blank to _ in ASCII's order: small letters become capitals.
FONT = """
    0000000000 00005f0000 0007000700 147f147f14 242a7f2a12 2313086462 3649552250 0005030000
    001c224100 0041221c00 082a1c2a08 08083e0808 0050300000 0808080808 0060600000 2010080402
    3e5149453e 00427f4000 4261514946 2141454b31 1814127f10 2745454539 3c4a494930 0171090503
    3649494936 064949291e 0036360000 0056360000 0008142241 1414141414 4122140800 0201510906
    324979413e 7e1111117e 7f49494936 3e41414122 7f4141221c 7f49494941 7f09090101 3e41415132
    7f0808087f 00417f4100 2040413f01 7f08142241 7f40404040 7f0204027f 7f0408107f 3e4141413e
    7f09090906 3e4151215e 7f09192946 4649494931 01017f0101 3f4040403f 1f2040201f 7f2018207f
    6314081463 0304780403 6151494543 00007f4141 0204081020 41417f0000 0402010204 4040404040"""
GLYPHS = torch.zeros(64, 8, 8)          # (character, row, column)
GLYPHS[:, :, 1:6] = torch.from_numpy(np.unpackbits(
    np.frombuffer(bytes.fromhex(FONT), np.uint8).reshape(64, 5, 1), axis=2, bitorder="little")).mT.float()
SEEN = len(GLYPHS) + 1  # the id where a token of the page stands: beyond the mask, so never predicted
READERS = "picture ar", "picture mdm", "convolution ar", "mean ar"


def glyph_ids(ids):
    """Byte tokens -> characters: small letters as capitals, blank what has no glyph."""
    ids = torch.where((ids > 95) & (ids < 127), ids - 32, ids)
    return torch.where((ids > 31) & (ids < 96), ids - 32, 0)


def drawn(x):
    """Characters (B, T) -> pictures (B, 1, 8, 8 T), dark and bright about 0. A page is one long line:
    patches do not reach over lines."""
    return GLYPHS[x].transpose(1, 2).reshape(len(x), 1, 8, -1) * 2 - 0.6


class Reader(LM):
    """An LM before whose text stand the tokens of a page, one for `per` characters: from the picture, by a
    convolution over a character's pixels and one over the patch; from the embedded characters by the latter
    alone; or their mean. Behind all of them are two blocks of attention."""
    def __init__(self, config, kind, per, page):
        super().__init__(config)
        C = config.n_embd
        self.per, self.n, self.picture = per, -(-page // per), kind == "picture"
        self.look = torch.nn.Conv2d(1, C, 8, 8) if self.picture else torch.nn.Embedding(64, C)
        self.pool = torch.nn.AvgPool1d(per) if kind == "mean" else torch.nn.Conv1d(C, C, per, per)
        layer = torch.nn.TransformerEncoderLayer(C, config.n_head, 2 * C, 0.0, "gelu", batch_first=True,
                                                 norm_first=True)
        self.think = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed.register_forward_hook(self.show)
        # Tokens of the page and letters begin with the sines of their places on it: what has to be learned is
        # to read, not where.
        at = torch.cat([per * (torch.arange(self.n) + 0.5), torch.arange(page)])
        angle = at[:, None] / 1000 ** torch.linspace(0, 1, C // 2)
        self.embed_pos.weight.data.copy_(torch.cat([angle.sin(), angle.cos()], dim=1) / 2)

    def see(self, x):
        """Looks at pages x (B, T): ids (B, n) that stand for what was seen."""
        x = F.pad(x, (0, -x.size(1) % self.per))
        z = F.gelu(self.look(drawn(x))).squeeze(2) if self.picture else self.look(x).mT     # (B, C, T)
        z = self.pool(z).mT                                             # (B, n, C)
        self.seen = self.think(F.rms_norm(z, z.shape[-1:]) + self.embed_pos.weight[:z.size(1)])
        return torch.full(z.shape[:2], SEEN)

    def show(self, embed, args, out):
        here = (args[0] == SEEN).unsqueeze(-1)
        return out.masked_scatter(here, self.seen) if here.any() else out


def learn_reading(config, kind, per, page, ids, objective, steps, tokens, path):
    """A Reader of pages of text and of random characters in equal parts. Short ones first, as for recall."""
    def loss_of(lm, step, gen):
        T = min(page, 8 << max(0, int(10 * step / steps) - 2))
        B = tokens // T // 2
        text = glyph_ids(random_windows(ids, T, B, gen))
        x = torch.cat([text, torch.randint(64, (B, T), generator=gen)])
        seen = lm.see(x)
        n = seen.size(1)
        pos = torch.cat([torch.arange(n), lm.n + torch.arange(T)])
        if objective == "ar":
            z = lm(diffusion.shift_right(torch.cat([seen, x], dim=1), lm.mask_id), pos=pos)
            return diffusion.token_nll(z[:, n:], x).mean()
        f = lambda y, causal: lm(torch.cat([seen, y], dim=1), causal=causal, pos=pos)[:, n:]
        return diffusion.mdm_loss(f, x, lm.mask_id, generator=gen)

    make = partial(Reader, kind=kind, per=per, page=page)
    return learn(config, loss_of, steps, path, model=make)


def optical_cells(r):
    return {f"{r['per']}": f"{100 * r['text']:.0f} / {100 * r['random']:.0f}"}


def optical_picture(figure, rows, result):
    """A page, its reading where a token stands for 20 characters,
    and right characters against compression, dotted those of random pages."""
    sample_of = next((r for r in rows if r["per"] == 20), rows[0])
    figure.set_size_inches(8, 8)
    axes = figure.subplots(3, 1, height_ratios=(2, 2, 9))
    for ax, what in zip(axes, ("page", "reading")):
        ax.imshow(drawn(torch.tensor(sample_of[what]).view(4, -1)).flatten(0, 2).numpy(), cmap="binary")
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"{what}, {sample_of['reader']}, {sample_of['per']} characters a token", fontsize=10)
    for i, ((reader, passes), mine) in enumerate(grouped(rows, "reader", "passes").items()):
        label = reader + f", {passes} passes" * bool(passes)
        for what, style in dict(text=dict(label=label), random=dict(ls=":")).items():
            axes[2].plot(*zip(*points(mine, "per", what)), marker="o", color=f"C{i}", **style)
    axes[2].plot([10, 20], [0.97, 0.6], "k*", ms=10, label="DeepSeek-OCR")
    dress(axes[2], "", xlabel="characters per token of the page", ylabel="right characters")
    log_ticks(axes[2], [r["per"] for r in rows])


@experiment(show=pivot("reader passes", optical_cells), picture=optical_picture)
def optical(per=(4, 10, 16, 20, 64), readers: READERS = READERS, page=128, steps=500, pages=64,
            n_layer=2, n_embd=96, batch_tokens=1280, dataset="docs-byte", threads=1, out="out/optical"):
    """A page of text as a picture, read back by AR and by masked diffusion: right characters, in %, of text /
    of random characters, against characters per token of the page; and without a picture.

    per: characters that a token of the page stands for
    readers: what is read, and how: names, comma-separated
    page: characters of a page
    steps: of training, for each reader
    pages: to read, of held-out text and of random characters each
    """
    ids = training(dataset)
    held = dict(random=torch.randint(64, (pages, page), generator=seeded(0)),
                text=glyph_ids(validation(dataset, page, pages)))
    for n, reader in product(per, readers):
        kind, objective = reader.split()
        config = ModelConfig(vocab_size=len(GLYPHS), n_layer=n_layer, n_head=4, n_embd=n_embd, qk_norm=True,
                             position="learned", block_size=page - (-page // n))
        path = Path(out) / f"{kind}-{objective}-{n}-{page}-{n_layer}x{n_embd}-{steps}.pt"
        for passes in (1, 16) if objective == "mdm" else (None,):

            def measure():
                lm = learn_reading(config, kind, n, page, ids, objective, steps, batch_tokens, path)
                draw = getattr(diffusion, f"sample_{objective}")
                how = dict(steps=passes) if passes else {}
                row = {}
                for name, x in held.items():            # the text last: it is shown
                    with torch.no_grad():
                        canvas = torch.cat([lm.see(x), torch.full_like(x, lm.mask_id)], dim=1)
                        found = draw(lm, canvas, lm.mask_id, temperature=0, **how)[:, lm.n:]
                    row[name], row[f"{name}_se"] = mean_se((found == x).double().mean(1))
                return row | dict(page=x[0].tolist(), reading=found[0].tolist())

            yield dict(per=n, reader=reader, passes=passes), measure

# ------------------------------------------------------------------------------------------------------------
# theory: token error and sequence error (Feng et al. 2502.09622)


class Parity:
    """Sequences of bits in triples, x3 = x1 xor x2. Called like a model it answers exactly: the oracle."""

    name, V, layers, period = "parity", 2, "full(window=4)", 3

    def draw(self, B, L, generator):
        x = torch.randint(2, (B, L // 3, 3), generator=generator)
        x[..., 2] = x[..., 0] ^ x[..., 1]
        return x.flatten(1)

    def valid(self, x):
        return (x.view(len(x), -1, 3).sum(-1) % 2 == 0).all(1)

    def __call__(self, x, causal=False):
        x = x.view(len(x), -1, 3)
        hidden = x == 2
        bits = x.masked_fill(hidden, 0)
        parity = (bits.sum(-1, keepdim=True) - bits) % 2            # of the two others of a triple
        known = hidden.sum(-1, keepdim=True) == hidden              # both are there
        one = torch.where(known, parity, 0.5).flatten(1)
        return torch.stack([1 - one, one], dim=-1).log()

    def theory(self, N, L):
        """Closed forms. tie: the last step of a triple reveals two or three of its bits; half of these come
        out invalid. log p is averaged over schedules, as an ELBO does."""
        tie = (3 * N - 1) / (2 * N * N)
        return {"theory_ter": 2 ** ((2 + tie) / 3), "theory_ser": 1 - (1 - tie / 2) ** (L / 3)}


class Bigram:
    """A random language: after each letter half of the V letters may come, with random probabilities."""

    name, layers, period = "2-gram", "full(window=8)", 1

    def __init__(self, V=8):
        self.V = V
        gen = seeded(0)
        p = -torch.rand(V, V, generator=gen, dtype=torch.float64).log()
        p[torch.rand(V, V, generator=gen).argsort(1) >= V // 2] = 0
        self.p = p / p.sum(1, keepdim=True)  # (V, V): letter to next letter
        self.start = self.p.matrix_power(1 << 16).mean(0)
        self.start[self.start < 1e-12] = 0

    def draw(self, B, L, generator):
        x = [self.start.multinomial(B, replacement=True, generator=generator)]
        for _ in range(L - 1):
            x.append(self.p[x[-1]].multinomial(1, generator=generator)[:, 0])
        return torch.stack(x, dim=1)

    def valid(self, x):
        return (self.start[x[:, 0]] > 0) & (self.p[x[:, :-1], x[:, 1:]] > 0).all(1)

    def heard(self, x, first, p):
        """(B, T, V): what the letters before each place say about it. p: letter to the next letter."""
        now = first.expand(len(x), -1)
        out = []
        for letter in x.mT:
            out.append(now)
            now = torch.where(letter[:, None] < self.V, p[letter % self.V], now @ p)
        return torch.stack(out, dim=1)

    def __call__(self, x, causal=False):
        """From the letters on both sides; where they exclude each other, uniform."""
        behind = self.heard(x.flip(1), torch.ones_like(self.start), self.p.mT).flip(1)
        p = self.heard(x, self.start, self.p) * behind
        total = p.sum(-1, keepdim=True)
        return torch.where(total > 0, p / total, 1 / self.V).log().float()

    def theory(self, N, L):
        return {}


@torch.no_grad()
def in_steps(f, x, N, mask_id, generator):
    """The sampler of the theory on as many rows as x (B, L): each token has its step of 1..N at random; those
    of one step are drawn independently. (what it writes (B, L), -log p of x with the same steps (B, L))."""
    step = torch.randint(N, x.shape, generator=generator)
    y = torch.full_like(x, mask_id)
    nats = torch.zeros(x.shape, dtype=torch.float64)
    for k in step.unique():
        rows = (step == k).any(1)  # f knows no time: the others need no step
        now = step[rows] == k
        part = y[rows]
        part[now] = diffusion.draw(f(part, causal=False)[now], generator=generator)
        y[rows] = part
        nats[rows] += diffusion.masked_nll(f, x[rows], mask_id, step[rows] >= k) * now
    return y, nats


def learn_language(language, objective, lengths, steps, path):
    """A small model of the language, trained on fresh sequences of alternating lengths, as AR for a quarter
    of the steps. It reads letters of their own for each place of a period, so that it need not count."""
    places = 3 * (torch.arange(max(lengths)) % language.period)
    read = lambda lm, x, **how: lm(x + places[:x.size(1)], **how)

    def loss_of(lm, step, gen):
        L = lengths[step % len(lengths)]
        f = partial(read, lm)
        x = language.draw(1536 // L, L, gen)
        if objective == "ar":
            return diffusion.ar_loss(f, x, lm.mask_id)
        return diffusion.mdm_loss(f, x, lm.mask_id, generator=gen)

    config = ModelConfig(vocab_size=language.V, block_size=max(lengths), n_layer=2, n_head=4, n_embd=64,
                         layers=language.layers)
    steps = max(1, steps // 4) if objective == "ar" else steps
    return partial(read, learn(config, loss_of, steps, path, lr=3e-3, optimizer="adamw"))


def theory_picture(figure, rows, result):
    """Above token errors, which do not grow with length, below wrong sequences, which do;
    a column for each language."""
    figure.set_size_inches(9, 8)
    axes = figure.subplots(2, 2)
    kinds = [
        ("closed form", "oracle", "theory_", dict(lw=1)),
        ("oracle", "oracle", "", dict(marker="o", ls="", ms=5)),
        ("trained mdm", "mdm", "", dict(marker="x", ls="--", lw=1)),
        ("trained ar", "ar", "", dict(marker="*", ls="", ms=10))
    ]
    labels = {"ter": "token error rate (a perplexity)", "ser": "share of wrong sequences"}
    for (what, language), ax in zip(product(labels, (Parity.name, Bigram.name)), axes.flat):
        for (n, L), (kind, model, prefix, style) in product(enumerate(result["flags"]["lengths"]), kinds):
            mine = points(rows, "N", prefix + what, language=language, model=model, L=L)
            ax.plot(*zip(*mine), color=f"C{n}", label=f"length {L}, {kind}", **style)
        dress(ax, language, xlabel="sampling steps", ylabel=labels[what])
        log_ticks(ax, [r["N"] for r in rows if r["model"] == "oracle"])
        if ax is not axes[0, 0]:
            ax.get_legend().remove()


def theory_table(rows, result):
    rows = [r for r in rows if r["N"] in (1, 16, 256) or r["model"] == "ar"]
    return [pick(r, "language model L N ter theory_ter ser theory_ser") for r in rows]


@experiment(show=theory_table, picture=theory_picture)
def theory(lengths=(24, 96), steps=1000, sequences=128, threads=1, out="out/theory"):
    """Token and sequence error rates against sampling steps and length: closed form, oracle, trained models.

    TER, the perplexity of true sequences under the sampler, hardly depends on the length; SER, the share of
    impossible sequences that it writes, is a matter of steps per token. TER is exact for AR, averaged over
    schedules (a bound) for the others.

    lengths: of sequences, multiples of 3
    steps: of training for a diffusion model, a quarter of them for AR
    sequences: sampled from a trained model for each point, 8 times as many from an oracle
    """
    asked = ",".join(map(str, lengths))
    need(all(L % 3 == 0 for L in lengths), f"--lengths {asked}: expected multiples of 3, such as 24,96")
    grid = [4**i for i in range(6)]
    kinds = {"oracle": grid, "mdm": grid[:-1], "ar": [None]}
    for language, kind in product((Parity(), Bigram()), kinds):
        path = Path(out) / f"{asked}-steps{steps}" / f"{language.name}-{kind}.pt"
        for L, N in product(lengths, kinds[kind]):

            def measure():
                f = language if kind == "oracle" else learn_language(language, kind, lengths, steps, path)
                gen = seeded(L)
                V = language.V
                x = language.draw(8 * sequences if kind == "oracle" else sequences, L, gen)
                if kind == "ar":
                    y = diffusion.sample_ar(f, torch.full_like(x, V), V, generator=gen, cache=False)
                    nats = diffusion.ar_loss(f, x, V, reduction="none").detach()
                else:
                    y, nats = in_steps(f, x, N, V, gen)
                nats, error = mean_se(nats.double().mean(1))
                ser, ser_se = mean_se(~language.valid(y))
                closed = language.theory(N, L) if N else {}
                return closed | dict(ter=exp(nats), ter_se=exp(nats) * error, ser=ser, ser_se=ser_se)

            yield dict(language=language.name, model=kind, L=L, N=N or L), measure

# ------------------------------------------------------------------------------------------------------------
# tools: a calculator and a look-up inside an answer

# With AdamW the step from guessing to copying, which all this needs, comes several times later.
ARITHMETIC = QUICK | settings("""
    dataset=arithmetic n_layer=2 n_embd=96 block_size=128 batch_tokens=2048 eval_every=400
    diffusion_block=4
""")


def solve(prompt, call):
    """Both tools: the number of a name in the prompt's table, or what an expression makes."""
    table = dict(re.findall(r"(\w)=(\d+)", prompt))
    return table.get(call) or sample.calculator(call)


@experiment()
def tools(steps=1000, problems=200, seeds=3, seed=1337, workers=1, device="auto", threads=1, out="out/tools"):
    """Held-out arithmetic with and without tools, as AR and as block diffusion: share of right answers where
    the problem says all its numbers, and where one has to be looked up first.

    steps: of training for AR, three times as many for block diffusion
    problems: held-out ones of each kind to solve
    """
    folder = prepare.prepare("arithmetic")
    tokenizer = load_tokenizer(folder)
    texts = tokenizer.decode(load_dataset(folder)[1].tolist()).split(prepare.EOT)[:-1]
    kinds = {"plain": [t for t in texts if "=" not in t], "look-up": [t for t in texts if "=" in t]}
    runs = range(seed, seed + seeds)
    jobs = {}
    for (o, n), s in product([("ar", steps), ("block", 3 * steps)], runs):
        jobs[o, s] = ARITHMETIC | dict(objective=o, max_steps=n, seed=s, out=f"{out}/{o}-{n}-s{s}")
    yield jobs
    answer = lambda text: text.split(prepare.EOT)[0].rpartition(" ")[2]
    cases = [("ar", "left"), ("block", "left"), ("block", "max_prob")]
    for (objective, order), kind, tool in product(cases, kinds, ("none", "tools")):

        def measure():
            texts = kinds[kind][:problems]
            prompts = [t[:t.index("?") + 1] for t in texts]
            calls = [partial(solve, p) for p in prompts] if tool == "tools" else lambda call: ""
            draw = getattr(diffusion, f"sample_{objective}")
            right, right_calls = [], []
            for s in runs:
                lm, _ = load_model(jobs[objective, s]["out"], "last", device)
                canvas = diffusion.canvas([*map(tokenizer.encode, prompts)], 80, lm.mask_id)
                x, valid = (a.to(device) for a in canvas)
                hook = sample.ToolCalls(calls, tokenizer, lm.mask_id, valid.sum(1))
                how = dict(fill_block=4, order=order, on_block=hook)
                if objective == "ar":
                    how = dict(on_token=hook)
                y = draw(lm, x, lm.mask_id, temperature=0, eot_id=tokenizer.eot, valid=valid, **how)
                written = map(tokenizer.decode, y.tolist())
                right.append(mean(answer(w) == answer(text) for w, text in zip(written, texts)))
                for i, text in enumerate(texts):
                    made = [call for row, call, *_ in hook.calls if row == i]
                    right_calls.append(made == re.findall("<tool>(.*?)</tool>", text))
            return accuracy(right) | dict(right_calls=mean(right_calls))

        yield dict(model=objective, order=order, problem=kind, tool=tool), measure

# ------------------------------------------------------------------------------------------------------------
# moe: speed against dense, load with and without the bias rule


def moe_speed(E, k, device, repeat):
    """Tokens/s of the MoE layer against a dense MLP with the same active parameters, forward and backward."""
    C, inner, tokens = (2048, 8192, 32768) if device.startswith("cuda") else (384, 1024, 4096)
    config = ModelConfig(n_embd=C, n_inner=inner, n_expert=E, n_expert_active=k, expert_inner=inner // k)
    dense, moe = (layer(config).to(device, dtype_on(device)) for layer in (MLP, MoE))
    parameters = [torch.nn.init.normal_(p, std=0.02) for p in (*dense.parameters(), *moe.parameters())]
    x = torch.randn(1, tokens, C, device=device, dtype=dtype_on(device))
    calls = (dense, moe, lambda x: moe.route(x.view(-1, C))[0])
    plain, sparse, route = (time_passes(f, x, device, repeat, parameters)["both_ms"] for f in calls)
    return dict(
        dense_tok_per_s=1e3 * tokens / plain,
        moe_tok_per_s=1e3 * tokens / sparse,
        ratio=plain / sparse,
        routing_share=route / sparse
    )


@torch.no_grad()
def load_of(lm, x):
    """(largest load of an expert to the mean one, share of experts with less than a tenth of that):
    of all layers, on windows x."""
    lm.train()(x)
    loads = torch.stack([moe.balance(move=False) for moe in lm.moes()])
    loads /= loads.mean(1, keepdim=True)
    return loads.max().item(), (loads < 0.1).double().mean().item()


def moe_tables(rows, result):
    return "\n\n".join(markdown([r for r in rows if key in r]) for key in ("experts", "router"))


@experiment(named="device", show=moe_tables)
def moe(scenes=("docs-byte", "pysrc-byte"), steps=600, repeat=12, device="auto", threads=1, out="out/moe"):
    """Mixture of experts: speed against a dense MLP of the same active parameters; with and without the bias
    rule, how even the load is, and how many experts a scene alone leaves unused.

    scenes: data sets, read in equal parts in training, then each alone and all together
    steps: of training
    """
    for E, k in ((64, 8), (128, 8)) if device.startswith("cuda") else ((8, 2), (32, 4), (128, 8)):
        yield dict(experts=E, active=k), lambda: moe_speed(E, k, device, repeat)
    texts = [training(name) for name in scenes]
    held = {Path(name).name: validation(name, 64, 128).to(device) for name in scenes}
    held["all"] = torch.cat(list(held.values()))
    size = settings("n_layer=2 n_embd=64 block_size=64 n_expert=32 n_expert_active=4 expert_inner=64")
    size["vocab_size"] = load_tokenizer(data_folder(scenes[0])).n_vocab

    def loss_of(lm, step, gen):
        for layer in lm.moes():
            layer.balance()
        x = torch.cat([random_windows(ids, 64, 16 // len(texts), gen) for ids in texts]).to(device)
        return diffusion.ar_loss(lm, x, lm.mask_id)

    for router, bias_step in {"bias rule": 1e-3, "no balancing": 0.0}.items():

        def measure():
            config = ModelConfig(**size, router_bias_step=bias_step)
            path = Path(out) / f"{file_part(router)}-{'-'.join(held)}-{steps}.pt"
            lm = learn(config, loss_of, steps, path, device, lr=2e-3, optimizer="adamw")
            row = dict(loss=diffusion.ar_loss(lm, held["all"], lm.mask_id).item())
            for name, x in held.items():
                row[f"load {name}"], row[f"unused {name}"] = load_of(lm, x)
            return row

        yield dict(router=router), measure

# ------------------------------------------------------------------------------------------------------------
# decode, panel: what sampling costs and what it gives; the likelihoods of the same models

# Bytes again; of 256 the first 32 are a prompt and 7 blocks of 32 are filled. Small batches and qk_norm:
# masked diffusion leaves the plateau of single-byte frequencies three times sooner than with 1,024 tokens and
# without.
SHARED["models"] = settings("""
    scale=auto dataset=docs-byte n_layer=4 n_head=4 n_embd=128 block_size=256 batch_tokens=512 lr=2e-3
    max_steps=2000 workers=2 device=auto threads=1 out=none
    run_ar=none run_mdm=none run_block=none run_judge=none run_mixed=none run_mtp=none
""")
MODELS_GPU = settings("n_layer=6 n_head=6 n_embd=384 batch_tokens=16_384 max_steps=1500 lr=1e-3")
ROLES = arms_of("""
    ar:
    judge: --seed 1
    mdm: --objective mdm
    mixed: --objective mixed
    mtp: --set mtp=0.3
    block: --objective block --diffusion_block 16
""")
LONGER = settings("mdm=3 mixed=3 block=1.5")  # times max_steps: diffusion learns slowly


def decode_runs(roles, models):
    """{role: run folder}: those given by a flag, the others trained, from where they were left. ValueError
    for a given run of another objective, before anything is trained. A part of a generator."""
    root = Path(models["out"] or f"out/decode-{models['scale']}")
    common = settings("eval_every=1000 eval_windows=64 log_every=500")
    common |= pick(models, "dataset n_layer n_head n_embd block_size batch_tokens lr")
    folders, jobs = {}, {}
    for role in ROLES:
        need(role in roles or not models[f"run_{role}"], f"--run_{role}: expected runs of {', '.join(roles)}")
    for role in roles:
        want, given = ROLES[role]["objective"], models[f"run_{role}"]
        folders[role] = given or str(root / role)
        if given:
            objective = load_model(given, "last")[1]["flags"]["objective"]
            need(
                objective == want or objective == "mixed" and want != "block",
                f"{given} is a run of --objective {objective}, and one of {want} is needed as --run_{role}"
            )
        else:
            jobs[role] = common | ROLES[role] | dict(
                max_steps=int(models["max_steps"] * LONGER.get(role, 1)),
                set=["qk_norm=true", *ROLES[role].get("set", [])],
                out=folders[role]
            )
    yield jobs
    return folders


def decoders(n):
    """The samplers that are compared, for n places to fill: {family: (whose, settings)}."""
    steps = lambda *shares, **more: [dict(more, steps=max(1, n // s)) for s in shares]
    cached = dict(fill_block=32, cache=True)
    return {
        "AR, cache": ("ar", [{}]),
        "diffusion, random order": ("mdm", steps(1, 2, 4, 8, 16, order="random")),
        "diffusion, surest first": ("mdm", steps(4, 8, 16)),
        "diffusion, threshold": ("mdm", [dict(threshold=p) for p in (0.9, 0.7, 0.5)]),
        "diffusion in blocks": ("mdm", steps(1, 4, fill_block=32)),
        "diffusion in blocks, dual cache": (
            "mdm", [*steps(1, 2, 4, 8, **cached), dict(cached, threshold=0.7)]),
        "block diffusion, exact cache": (
            "block", [*(dict(steps=k) for k in (16, 8, 4, 2)), dict(threshold=0.7)])
    }


@torch.no_grad()
def judged(judge, x, start):
    """{loss, its standard error, unigram entropy} of the tokens from `start` on, under an AR judge. x (N, T).

    Entropy (nats, of the counts of one row, mean over rows) stands beside the loss because a sampler that
    repeats itself gets a low loss."""
    loss, se = mean_se(train.ar_nats(judge, x, 32)[:, start:].mean(1))
    p = F.one_hot(x[:, start:], judge.V).float().mean(1)  # (N, V)
    return dict(loss=loss, se=se, entropy=-torch.xlogy(p, p).sum(-1).mean().item())


def decode_picture(figure, rows, result):
    """Quality against speed. Along a line the steps change:
    the further right, the fewer, or the lower the threshold."""
    figure.set_size_inches(8, 6)
    ax = figure.subplots()
    real, *rows = rows
    few = min(result["flags"]["batches"])
    many = max(result["flags"]["batches"])
    for i, ((family,), mine) in enumerate(grouped(rows, "sampler").items()):
        for B, style in ((many, dict(ls="-", label=family)), (few, dict(ls=":", mfc="white"))):
            line = zip(*sorted(points(mine, f"tokens/s, batch {B}", "loss")))
            ax.semilogx(*line, marker="*osD^vP"[i], ms=6, lw=0.8, color=f"C{i}", **style)
    ax.axhline(real["loss"], color="0.45", lw=1, ls="--", label="real text")
    plain_log(ax.xaxis)
    dress(
        ax,
        f"along a line: fewer steps, or a lower threshold, to the right\n{result['new']} new tokens; "
        f"filled: batch {many}, hollow: batch {few}",
        xlabel="tokens/s",
        ylabel="loss under an AR judge, nats per token"
    )


@experiment(named="scale", show=without("cache"), picture=decode_picture, gpu=MODELS_GPU)
def decode(batches=(1, 8, 64), **models):
    """Tokens/s and FLOPs per token against quality of every sampler on trained models, by batch size.

    batches: sizes; quality is that of the largest
    """
    roles = ("ar", "judge", "mdm", "block")
    folders = yield from decode_runs(roles, models)
    device = models["device"]
    most = max(batches)
    clock = clock_of(device)
    trained = {role: load_model(folder, "last", device) for role, folder in folders.items()}
    judge, state = trained["judge"]
    T = judge.config.block_size
    P = T // 8                              # the first P tokens are the prompt
    for role, (lm, _) in trained.items():
        need(
            lm.V == judge.V and lm.config.block_size >= T,
            f"{folders[role]} has {lm.V} tokens, a window of {lm.config.block_size}, the judge {judge.V} "
            f"and {T}: all must be trained on the same data set and window"
        )
    sample.check_rewrites(trained["mdm"][0].config, "--cache")
    data = validation(state["flags"]["dataset"], T, most).to(device)
    canvas = data.clone()
    canvas[:, P:] = judge.mask_id

    def measure(role, setting):
        lm, state = trained[role]
        more = dict(fill_block=state["flags"]["diffusion_block"]) if role == "block" else {}

        def draw(x):
            gen = torch.Generator("cpu" if device.startswith("mps") else device).manual_seed(0)
            return getattr(diffusion, f"sample_{role}")(lm, x, lm.mask_id, generator=gen, **setting, **more)
        row = {}
        for B in sorted(batches, reverse=True):
            # Fewer than 4 rows say little about a threshold: then other prompts follow.
            prompts = canvas[:max(B, min(4, most))].split(B)
            tic = clock()
            texts = torch.cat([draw(x) for x in prompts])
            seconds = clock() - tic
            row = row or judged(judge, texts, P)
            row[f"tokens/s, batch {B}"] = round(len(texts) * (T - P) / seconds)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:     # no fused one counts
            draw(canvas[:1])
        return row | {"MFLOP/token": count.get_total_flops() / (T - P) / 1e6}

    yield dict(sampler="real text"), lambda: judged(judge, data, P)
    for family, (role, settings) in decoders(T - P).items():
        for setting in settings:
            yield dict(sampler=family, **setting), partial(measure, role, setting)
    return dict(new=T - P)


@experiment(named="scale", gpu=MODELS_GPU)
def drafts(batches=(1, 8), lengths=(1, 2, 4, 8), **models):
    """AR with its cache where the run proposes tokens itself, by turns with the same run that does not.

    batches: sequences, comma-separated
    lengths: tokens that a mixed run proposes; an AR run with mtp proposes one
    """
    folders = yield from decode_runs(("mixed", "mtp"), models)
    device, clock = models["device"], clock_of(models["device"])
    for role, folder in folders.items():
        lm, state = load_model(folder, "last", device)
        canvas = validation(state["flags"]["dataset"], lm.config.block_size, 8).to(device)
        canvas[:, lm.config.block_size // 8:] = lm.mask_id
        new = (canvas == lm.mask_id).sum().item()
        for draft, B in product(lengths if role == "mixed" else (1,), batches):

            def measure():
                torch.manual_seed(0)
                seconds, passes, steps = [0.0, 0.0], 0, []
                for x, own in product(canvas.split(B), (False, True)):
                    tic = clock()
                    diffusion.sample_ar(lm, x, lm.mask_id, draft=own * draft,
                                        callback=lambda step, _: steps.append(step))
                    seconds[own] += clock() - tic
                    passes += own * steps[-1] * len(x)
                return {
                    "tokens/pass": new / passes,
                    "tokens/s": round(new / seconds[1]),
                    "without": round(new / seconds[0]),
                    "ratio": seconds[0] / seconds[1]
                }

            yield dict(run=role, draft=draft, batch=B), measure


def panel_cells(r):
    """Of a row of panel: the last three are those of the last likelihood."""
    loss = f"{r['nats']:.3f}" + (f" +- {r['se']:.3f}" if r["se"] else "")
    return {r["measure"].split(", ")[-1]: loss} | pick(r, "bits_per_byte over_ar over_se")


@experiment(named="scale", show=pivot("run", panel_cells), gpu=MODELS_GPU)
def panel(runs: list = (), windows=16, n_mc=64, fill_blocks=(4,), fresh=False, **models):
    """All likelihoods of the decode runs, or of others, on the same validation windows:
    exact, bounds, chains; bits per byte.

    Beside a loss, over_ar: nats above the last AR row before, over_se: its standard error over windows.

    runs: run folders in place of the decode runs; a+b: their probabilities averaged
    windows: validation windows
    n_mc: masks per window of a bound, a multiple of 4
    fill_blocks: tokens in a block that is filled in any order
    fresh: random windows, not those that chose the checkpoints
    """
    need(n_mc % 4 == 0, f"--n_mc {n_mc} must be a multiple of 4")
    need(all(1 <= S <= 12 for S in fill_blocks), f"--fill_blocks {fill_blocks}: from 1 to 12")
    folders = {run: run for run in runs} or (yield from decode_runs(("ar", "mdm", "block"), models))
    ar = None
    for role, folder in folders.items():
        parts, which = (folder.split("+"), "best") if runs else ([folder], "last")
        loaded, states = zip(*(load_model(part, which, models["device"]) for part in parts))
        lm, flags, T = averaged(loaded), states[0]["flags"], loaded[0].config.block_size
        kinds = {(one.config.vocab_size, one.config.block_size, state["flags"]["objective"])
                 for one, state in zip(loaded, states)}
        need(len(kinds) == 1, f"--runs {role}: not of one objective, window and vocabulary")
        x = (random_windows(load_dataset(data_folder(flags["dataset"]))[1], T, windows, seeded(1)) if fresh
             else validation(flags["dataset"], T, windows))
        size = load_tokenizer(parts[0]).token_bytes[x.numpy()].mean()  # bytes per token
        for name, likelihood in sample.panel(lm, flags, x.to(models["device"]), n_mc, fill_blocks):
            likelihood = cache(likelihood)
            ar = likelihood if name.startswith("AR") else ar

            def measure():
                nats, se = likelihood()
                loss = nats.mean().item()
                out = dict(nats=loss, bits_per_byte=loss / log(2) / size)
                if ar and ar is not likelihood:
                    out["over_ar"], out["over_se"] = mean_se(nats - ar()[0])
                return out | dict(se=se or None)
            label = "+".join("/".join(Path(part).parts[-2:]) for part in role.split("+"))
            yield dict(run=label, measure=name), measure

# ------------------------------------------------------------------------------------------------------------
# tables: results/README.md from the JSON files

def mixtures(results):
    """Rows of full, linear and sparse layers and their mixtures, from the files of quality,
    recall, attention, context.

    Losses in nats per token and right answers in %, AR / diffusion; decoding of one token with the longest
    cache and training at the longest length, how many times faster than full. A mixture's are the mean over
    its layers."""
    def rows_of(file, key):
        rows = results[file]["rows"] if file in results else []
        return {tuple(r[k] for k in key.split()): r for r in rows}
    quality = rows_of("quality_cpu", "mixer objective")
    recalls = rows_of("recall", "layers objective task pairs T")
    training = rows_of("attention_cpu", "layer T")
    decoding = rows_of("context_cpu", "layer batch T")
    if not all((quality, recalls, training, decoding)):
        return []
    far, length, cached = (max(key[-1] for key in found) for found in (recalls, training, decoding))
    rows = []
    for name in dict.fromkeys(["full", *(mixer for mixer, _ in quality)]):
        if name not in ATTENTION and "*" not in name:       # a setting of another row's layer
            continue
        layers = [n for n, _ in parse_layers(name)]
        if not all((n, length) in training and (n, 1, cached) in decoding for n in layers):
            continue

        def both(cell, found, *at):
            keys = [(name, o, *at) for o in OBJECTIVES]
            return " / ".join(cell(found[key]) if key in found else "-" for key in keys)

        def times(found, column, *at):
            return found["full", *at][column] / mean(found[n, *at][column] for n in layers)
        percent = lambda r: f"{100 * r['accuracy']:.0f}"
        rows.append({
            "mixer": f"`{name}`",
            "loss": both(lambda r: f"{r['loss']:.3f}", quality),
            "64 pairs": both(percent, recalls, "pairs", 64, 512),
            f"needles in {far:,}": both(percent, recalls, "needle", NEEDLES, far),
            f"decoding at {cached:,}": f"{times(decoding, 'ms', 1, cached):.1f}x",
            "cache": f"{1 / times(decoding, 'cache_mib', 1, cached):.1%}",
            f"training at {length:,}": f"{times(training, 'both_ms', length):.2f}x"})
    return rows


def told(result):
    """How a file was made, in a line."""
    seeds = ", ".join(map(str, result["seeds"]))
    return (f"`{result['command']}`: {result['device']}, torch {result['versions']['torch']}, "
            f"{result['date']}, seed{'s' * (',' in seeds)} {seeds}")


@experiment()
def tables(results="results", pictures=False):
    """The tables of results/README.md from the JSON files beside it; what is written around them stays.

    A table stands between <!-- NAME --> and <!-- end -->; one that has no place yet is put at the end.

    pictures: draw them again too
    """
    folder, found, blocks = Path(results), stored(results), {}
    if rows := mixtures(found):
        blocks["mixtures"] = markdown(rows)
    for name, result in found.items():
        about, file = EXPERIMENTS[result["experiment"]], folder / f"{name}.png"
        if pictures:
            draw(about, result, file)
        image = f"![{name}]({name}.png)\n\n" * file.exists()
        blocks[name] = f"{told(result)}\n\n{image}{page(about, result)}"
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    for name, block in blocks.items():
        mark = f"<!-- {name} -->"
        end = "<!-- end -->"
        if mark not in text:
            text += f"\n## {name}\n\n{mark}\n{end}\n"
        before, _, rest = text.partition(mark)
        old, found, after = rest.partition(end)
        need(found and "<!--" not in old, f"{path}: {mark} has no {end} behind its table")
        text = f"{before}{mark}\n{block}\n{end}{after}"
    write(path, text)
    print(f"wrote {path}")

# ------------------------------------------------------------------------------------------------------------
# choices: multiple choice by likelihood

MEASURES = {
    "ar": ("exact",),
    "mdm": ("bound", "chain"),
    "block": ("bound", "chain"),
    "mixed": ("exact", "bound", "chain")
}
# The text, its continuations and the index of the right one: HellaSwag; PIQA and ARC; LAMBADA, whose one is
# right.
FORMS = ("ctx", "endings", "label"), ("query", "choices", "gold"), ("context", "continuation")


def parse_item(r):
    """An object of one of the FORMS ->
    (context, its possible continuations, index of the right one). ValueError: what is wrong.

    Continuations begin with a space and are tokenized on their own, as GPT-2's tokenizer would cut there.
    "Question: ..." is followed by "Answer:", as in MosaicML's evaluation, where the files of that form come
    from."""
    keys = next((keys for keys in FORMS if isinstance(r, dict) and set(keys) <= set(r)), None)
    need(keys, f"is no object of the keys {' or '.join(map(', '.join, FORMS))}")
    context, answers, *label = (r[key] for key in keys)
    answers = answers if label else [answers]
    need(
        isinstance(context, str) and isinstance(answers, list) and all(isinstance(a, str) for a in answers),
        f"must have a text under '{keys[0]}' and texts under '{keys[1]}'"
    )
    context = context.rstrip()
    answers = [a.strip() for a in answers]
    gold = str(label[0] if label else 0).strip("[]")  # 1, "1" or [1]
    right = answers[int(gold) :][:1] if gold.isdecimal() else []
    need(
        right and all(answers) and answers.count(right[0]) == 1 and len(answers) > len(label),
        "must have one right answer, all answers being different from it and none empty"
    )
    if "query" in keys and context.startswith("Question:"):
        context += "\nAnswer:"
    return context, [" " * bool(context) + a for a in answers], int(gold)


def item_of(context, ends, gold, tokenizer):
    """An item: token ids, the index of the right end, the bytes of each."""
    sizes = [int(tokenizer.token_bytes[end].sum()) for end in ends]
    return {"context": context, "ends": ends, "gold": gold, "bytes": sizes}


def read_items(path, tokenizer, limit=None):
    """The first `limit` items of a .jsonl file, read as prepare.py does. All is read before anything is
    computed: a bad line, named with its number, stops no evaluation."""
    items = []
    for n, (line, _) in enumerate(prepare.text_lines(Path(path)), 1):
        if len(items) == limit:
            break
        try:
            if line.strip():
                context, ends, gold = parse_item(json.loads(line))
                ids, *ends = (tokenizer.encode(text) for text in (context, *ends))
                items.append(item_of(ids, ends, gold, tokenizer))
        except (ValueError, RecursionError) as e:
            why = e if type(e) is ValueError else "is no JSON object of UTF-8 text"
            raise ValueError(f"{path} line {n} {why}") from None
    need(items, f"{path} holds no items")
    return items


def probe_as_items(flags, tokenizer, T, limit):
    """train.py's probe as items: true ends of passages
    of the run's own validation text among three others."""
    val = load_dataset(data_folder(flags["dataset"]))[1]
    passages = train.probe_items(val, T, limit or 512)
    K = max(1, min(16, T // 4))  # tokens of an end
    return [item_of(p[0, :-K].tolist(), p[:, -K:].tolist(), 0, tokenizer) for p in passages]


def laid_out(lm, context, ends):
    """(x, which of it is text, which is an end), each (ends, T): an end behind the context in each row."""
    x, real = diffusion.canvas([context + end for end in ends], 0, lm.mask_id)
    scored = real & (torch.arange(x.size(1)) >= len(context))
    return [a.to(lm.embed.weight.device) for a in (x, real, scored)]


@torch.no_grad()
def exact_nats(lm, context, ends):
    """(-log p of each end behind the context, is each what the model writes?) of an AR model, two lists."""
    x, _, scored = laid_out(lm, context, ends)
    logits = lm(diffusion.shift_right(x, lm.mask_id))
    nats = (diffusion.token_nll(logits, x).double() * scored).sum(1)
    return nats.tolist(), ((logits.argmax(-1) == x) | ~scored).all(1).tolist()


@torch.no_grad()
def diffusion_nats(lm, context, ends, measure, n_mc=32, seed=0, block=None):
    """-log p of each end behind the context under a diffusion model, a list: the bound, all ends under the
    same n_mc masks (as far as they have places in common), or the exact chain from left to right. block: of a
    block-diffusion model; the last block's places behind an end stay hidden."""
    x, real, scored = laid_out(lm, context, ends)
    how = dict(scored=scored, noise_block=block)
    if block:
        places = 0, -x.size(1) % block
        x = F.pad(x.where(real, lm.mask_id), places, value=lm.mask_id)
        how["scored"] = F.pad(scored, places)
    elif not real.all():
        how["valid"] = real
    if measure == "bound":
        rows = max(1, (65536 if x.is_cuda else 4096) // x.size(1))
        nats, _ = diffusion.mdm_nll(lm, x, lm.mask_id, n_mc, seeded(seed), batch_size=rows, per_row=True,
                                    group=torch.zeros(len(x), dtype=torch.int64), **how)
    else:
        nats = diffusion.chain_nll(lm, x, lm.mask_id, **how)
    return (nats.cpu() * scored.sum(1).cpu()).tolist()


def greedy_end(lm, context, end, block=None):
    """Does a diffusion model write just these tokens, left to right, always the most probable one?"""
    x = torch.tensor([context + [lm.mask_id] * len(end)], device=lm.embed.weight.device)
    draw = diffusion.sample_block if block else diffusion.sample_mdm
    y = draw(lm, x, lm.mask_id, order="left", temperature=0, fill_block=block)
    return y[0, len(context):].tolist() == end


def judge_item(lm, flags, item, measure, n_mc, seed):
    """{"nats": of each end, "greedy": if there is but one, is it what the model writes?} or {"failed": why}.
    A context that does not fit into the window loses its left."""
    ends = item["ends"]
    T = lm.config.block_size
    longest = max(map(len, ends))
    if longest > T:
        return {"failed": f"an answer of {longest} tokens is longer than the window of {T}"}
    context = item["context"][max(0, len(item["context"]) + longest - T) :]
    if measure == "exact":
        nats, greedy = exact_nats(lm, context, ends)
        return {"nats": nats, "greedy": greedy[0]}
    block = flags["diffusion_block"] if flags["objective"] == "block" else None
    nats = diffusion_nats(lm, context, ends, measure, n_mc, seed, block)
    return {"nats": nats, "greedy": len(ends) == 1 and greedy_end(lm, context, ends[0], block)}


def summary(items, results):
    """Rates over the items that did not fail. With one answer (LAMBADA) accuracy is:
    does the model write it, greedily?

    accuracy: the right answer has the smallest -log p; accuracy_norm: the smallest per byte. gap: the mean
    -log p of the wrong answers minus that of the right one, nats. loss: the right answer's, per token."""
    hits, norm, gaps, right, tokens = [], [], [], [], 0
    for item, r in zip(items, results):
        if "failed" in r:
            continue
        g, nats = item["gold"], np.array(r["nats"])
        least = lambda values: values[g] < np.delete(values, g).min()
        right.append(nats[g])
        tokens += len(item["ends"][g])
        if len(nats) == 1:
            hits.append(r["greedy"])
        else:
            hits.append(least(nats))
            norm.append(least(nats / item["bytes"]))
            gaps.append(np.delete(nats, g).mean() - nats[g])
    out = dict(items=len(hits), failed=len(items) - len(hits))
    if hits:
        out |= accuracy(hits) | dict(loss=sum(right) / tokens)
    if gaps:
        out["accuracy_norm"], _ = mean_se(norm)
        out["gap"], out["gap_se"] = mean_se(gaps)
    return out


def choice_table(rows, result):
    """With how many items were left out, and why."""
    shown = "run step file measure items accuracy se accuracy_norm gap gap_se loss"
    left_out = lambda r: f"{r['failed']:,}: {r['why']}" if r["failed"] else "0"
    return [pick(r, shown) | {"left out": left_out(r)} for r in rows]


def judge_file(lm, flags, threads, items, measure, n_mc, path):
    """The rates of one run on one file. Each item is written down in `path` when it is done."""
    train.set_threads(threads, lm)
    done = Journal(path)
    progress = prepare.Progress(path.stem)
    results = []
    for n, item in enumerate(items, 1):
        key = zlib.crc32(json.dumps(item).encode())
        if done.find(key) is None:
            done.add(key, judge_item(lm, flags, item, measure, n_mc, key))
        results.append(done.find(key))
        progress(n / len(items))
    why = next((r["failed"] for r in results if "failed" in r), None)
    return summary(items, results) | dict(why=why)


@experiment(show=choice_table)
def choices(
    runs,
    files: list = ("probe",),
    measures: MEASURES["mixed"] = MEASURES["mixed"],
    n_mc=32,
    limit: int = None,
    device="auto",
    threads=0,
    out="out/choices"
):
    """Multiple choice by likelihood, AR and diffusion: accuracy, and the gap between wrong and right answers.

    Accuracy counts where the right answer is the most probable (the only one: where the model writes it),
    the gap is wrong minus right -log p, nats; exact and chain are exact, bound is an upper bound. Files hold
    objects of {ctx, endings, label}, {query, choices, gold} or {context, continuation}.

    runs: run folder of train.py, or a checkpoint in one
    files: .jsonl (.gz, .bz2), or probe: true ends of passages of the validation data among three others
    measures: likelihoods, where a run has them
    n_mc: masks per item of the bound, a multiple of 4
    limit: first items of each file (default: all; probe: 512)
    threads: CPU threads; 0: 1 for models below 5M parameters, else all cores
    out: folder of the items done so far
    """
    work = []
    for run in runs:  # all input is read before the work begins
        lm, state = load_model(run, device=device)
        flags = train.DEFAULTS | state["flags"]
        folder = Path(run) if Path(run).is_dir() else Path(run).parent
        tokenizer, objective = load_tokenizer(folder), flags["objective"]
        weights = train.digest(state["model"])
        known = [m for m in MEASURES[objective] if m in measures]
        need(
            known,
            f"{run} is of objective {objective}, whose likelihoods are {','.join(MEASURES[objective])}: "
            f"--measures {','.join(measures)} leaves none"
        )
        for file in files:
            label = Path(file).name.split(".")[0]
            if file == "probe":
                items = probe_as_items(flags, tokenizer, lm.config.block_size, limit)
            else:
                items = read_items(file, tokenizer, limit)
            for m in known:
                key = dict(run=folder.name, objective=objective, step=state["step"], file=label, measure=m)
                path = Path(out) / f"{folder.name}-{label}-{m}-{n_mc}-{weights:08x}.jsonl"
                work.append((key, partial(judge_file, lm, flags, threads, items, m, n_mc, path)))
    yield from work

# ------------------------------------------------------------------------------------------------------------
# gpu: the queue

# A file of results/, and the command that makes it.
QUEUE = """
train_cuda          train --rounds 1 --batch 64 --preset gpt2 --iters 20
train_cuda_width128 train --rounds 1 --batch 64 --preset gpt2 --iters 20 --n_head 6
train_cuda_10M      train --rounds 1 --batch 64 --preset small --block_size 512 --vocab_size 4096 --iters 40 \
                    --n_layer 6 --n_head 6 --n_embd 384
train_cuda_40M      train --rounds 1 --batch 64 --preset small --block_size 512 --vocab_size 4096 --iters 40 \
                    --n_layer 12 --n_head 8 --n_embd 512
crossover_U1M       crossover --scale gpu --arms ar,mdm,'ar wd 0.8','ar random 0.15',\
'mdm rate 0.5 random 0.05' --arm 'ar random 0.25 wd 1.6: --recipe random=.25 --weight_decay 1.6'
crossover_U1M_seeds crossover --scale gpu --seeds 3 --arms ar,mdm,'ar wd 0.8','ar random 0.15',\
'mdm rate 0.5 random 0.05' --arm 'ar random 0.25 wd 1.6: --recipe random=.25 --weight_decay 1.6'
decode_gpu          decode
context_cuda        context --batches 1,64 --n_head 16 --head_dim 128
attention_cuda      attention --lengths 2048,4096,8192,16384,32768,65536 --n_head 16 --head_dim 128
crossover_U2M       crossover --scale gpu --unique_tokens 2000000
moe_cuda            moe
crossover_U5M       crossover --scale gpu --unique_tokens 5000000 --n_layer 10 --n_embd 512 --n_head 8
"""


@experiment()
def gpu(minutes=9.0, results="results"):
    """A queue of GPU measurements in order of value:
    skips what results/ holds, stops in time, goes on at the next call.

    First of all: python -m pytest test_all.py -m gpu. With a checkout of nanoGPT in data/nanoGPT training is
    timed beside it.

    minutes: for all of it
    """
    need(torch.cuda.is_available(), "torch sees no CUDA device here: this is for a machine with one")
    queue = dict(line.split(maxsplit=1) for line in QUEUE.strip().splitlines())
    there = lambda name: (Path(results) / f"{name}.json").exists()
    end = time.time() + 60 * minutes
    for name, command in queue.items():
        left = end - time.time()
        if there(name) or left < 60:            # compiling alone takes that
            continue
        if name == "train_cuda" and (HERE / "data/nanoGPT/model.py").exists():
            command += " --vs data/nanoGPT"
        words = shlex.split(f"bench.py {command} --name {name} --results {results}")
        print(f"\n=== {shlex.join(words)}   ({train.clock(left)} left)", flush=True)
        limit = ["timeout", "--signal=INT", "--kill-after=30", str(left - 40)]  # runs save, to go on later
        subprocess.run([*limit, sys.executable, *words], cwd=HERE)
    print("\nnot measured yet: " + (", ".join(filterfalse(there, queue)) or "nothing"))

# ------------------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    prepare.console()
    parser = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=prepare.Parser)
    for name, about in EXPERIMENTS.items():
        text = re.sub(r"^    \w+: .*\n", "", about.run.__doc__, flags=re.M)
        summary = " ".join(text.partition("\n\n")[0].split()).replace("%", "%%")  # argparse formats it
        one = commands.add_parser(name, help=summary, description=text, argument_default=argparse.SUPPRESS)
        add_flags(one, about)
    try:
        typed = vars(parser.parse_args(argv))
        return perform(typed.pop("command"), typed) or 0
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
        return 130
    except (ValueError, OSError, MemoryError) as e:
        return prepare.complain("bench.py", e)


if __name__ == "__main__":
    sys.exit(main())
