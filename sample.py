"""Write text with a trained model, fill gaps in a text, or score one: from a run folder that train.py made.

    python sample.py out/RUN --prompt "The function returns" --num_samples 3
    python sample.py out/RUN --prompt "One" --prompt "Another, longer"   # different lengths, one batch
    python sample.py out/RUN --prompt "The [MASK:12] sat on" --watch     # diffusion fills gaps, step by step
    python sample.py out/RUN --threshold 0.9 --fill_block 32 --cache     # diffusion, several tokens a pass
    python sample.py out/RUN --draft 4                         # AR, the same in fewer passes: a run of mixed
    python sample.py out/RUN --prompt "(17+4)*25?" --tool calculator  # after prepare.py --dataset arithmetic
    python sample.py out/RUN --gif a.gif --beside out/RUN2  # a picture that moves: two runs, one prompt
    python sample.py FOLDER --prompt "Once upon a time"    # a published model: config.json, model.safetensors
    python sample.py out/RUN --export FOLDER                             # and back, for transformers
    python sample.py score out/RUN --text FILE                           # nats per token and bits per byte

What is in this file, in this order:
    generate        prompts to text: parse_prompt, sampler (the run's own sampler and the flags that fit it)
    score           panel (all likelihoods that an objective defines)
    export          to safetensors
    to look at      show (--watch), moving_picture (--gif)
    tools           ToolCalls, calculator
"""
import argparse
import ast
import itertools
import json
import math
import operator
import os
import re
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

import diffusion
import model
import prepare
import train
from prepare import need

DIFFUSION = ("steps", "threshold", "order", "fill_block", "cache", "refresh")  # flags that AR has no use for


# ------------------------------------------------------------------------------------------------------------
# Generate

def parse_prompt(text, tokenizer, mask_id):
    """Token ids of a prompt; [MASK] or [MASK:n] stands for 1 or n tokens to fill in."""
    ids = []
    for i, part in enumerate(re.split(r"(\[MASK[^]]*\]?)", text)):
        if not i % 2:
            ids += encode(part, tokenizer)
            continue
        form = re.fullmatch(r"\[MASK(?::([0-9]{1,6}))?\]", part)
        count = form and int(form[1] or 1)
        need(count, f"--prompt: places to fill are [MASK], or [MASK:n] for n to 999999, not {part[:20]!r}")
        ids += [mask_id] * count
    return ids


def encode(text, tokenizer):
    """Token ids. In the prompt of a published model <|im_start|> and the like are tokens, not text."""
    names = "|".join(map(re.escape, tokenizer.special))
    parts = re.split(f"({names})", text) if tokenizer.more and names else [text]
    return sum(([tokenizer.special[part]] if i % 2 else tokenizer.encode(part)
                for i, part in enumerate(parts)), [])


def sampler(args, lm, flags, infill):
    """(which of diffusion.sample_ar, sample_mdm and sample_block is the run's, the flags that fit it).
    ValueError for a flag that does not."""
    objective = flags["objective"]
    size = flags["diffusion_block"]
    asked = [k for k in DIFFUSION if getattr(args, k) is not None]
    if objective == "ar" or objective == "mixed" and not (infill or asked):  # a mixed model does both
        need(not infill, "[MASK] in a prompt needs a diffusion model: train with --objective mdm")
        need(not asked,
             f"--{asked and asked[0]} is for diffusion, and this run is autoregressive: leave it out")
        if args.draft:
            need(objective == "mixed" or lm.mtp, "--draft needs a run of --objective mixed or --set mtp=0.3")
            check_rewrites(lm.config, "--draft")
        return "ar", dict(draft=args.draft)
    need(not args.draft, "--draft is for autoregressive sampling, and this is diffusion: leave it out")
    order = args.order
    if order is None:
        order = "random" if args.threshold is None else "max_prob"
    passes = dict(steps=args.steps, threshold=args.threshold, order=order)
    if objective == "block":
        for name in {"fill_block", "cache", "refresh"}.intersection(asked):
            raise ValueError(f"--{name} is for --objective mdm: this run was trained in blocks of {size}, "
                             "and their cache is always on and exact; leave it out")
        return "block", dict(fill_block=size, **passes)
    need(args.refresh is None or args.cache, f"--refresh {args.refresh} needs --cache")
    if args.cache:
        check_rewrites(lm.config, "--cache")
    return "mdm", dict(fill_block=args.fill_block, cache=args.cache, refresh=args.refresh, **passes)


def check_rewrites(config, flag):
    """The dual cache and drafts write keys over others: ValueError unless every layer can."""
    for name, values in model.parse_layers(config.layers, config.n_layer):
        need(name == "mla" or name == "full" and values.get("window", config.window) is None,
             f"{flag} computes tokens inside the text anew, as only layers 'full' without window and 'mla' "
             f"can, and this run's are '{config.layers}', window {config.window}: leave {flag} out")


def generate(args, lm, tokenizer, flags):
    """Prints the samples. Returns (kind of sampler, the text of the first one's canvas after each step)."""
    mask = lm.mask_id
    window = lm.config.block_size
    rows = []
    prompts = [parse_prompt(text, tokenizer, mask) for text in args.prompt or [""]]
    kind, fitting = sampler(args, lm, flags, any(mask in ids for ids in prompts))
    for ids in prompts:
        new = args.max_new_tokens
        if new is None:
            new = 0 if mask in ids else max(1, min(200, window - len(ids)))
        fits = len(ids) + new <= window or kind == "ar" and len(ids) < window  # AR may go on behind it
        need(fits, f"prompt ({len(ids)} tokens) and --max_new_tokens ({new}) exceed the window of {window}")
        need(new >= (mask not in ids),                          # 0 where the prompt has places to fill
             f"--max_new_tokens {new}: nothing to generate, use at least 1 or put [MASK] into the prompt")
        size = len(prompts) * args.num_samples * (len(ids) + new)
        need(size <= 1 << 24,
             f"--num_samples {args.num_samples}, --max_new_tokens {new}: {size:,} tokens, over {1 << 24:,}")
        rows += [ids + [mask] * new] * args.num_samples
    device = lm.embed.weight.device
    tic = time.perf_counter()
    x, valid = (a.to(device) for a in diffusion.canvas(rows, 0, mask))
    first = [canvas_text(rows[0], tokenizer, mask)]
    steps = 0

    def seen(step, x):
        nonlocal steps
        steps = step
        if args.watch or args.gif:
            first.append(canvas_text(x[0, :len(rows[0])].tolist(), tokenizer, mask))
        if args.watch:
            show(step, first[-1], args.pause)

    hook = {}
    tool = None
    if args.tool:
        need(args.tool in TOOLS and kind != "mdm",
             f"--tool {args.tool}: expected {' or '.join(TOOLS)}, and a run of objective ar or block")
        tool = ToolCalls(TOOLS[args.tool], tokenizer, mask, map(len, rows))
        hook = {"on_token" if kind == "ar" else "on_block": tool}
    generator = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed)
    write = getattr(diffusion, f"sample_{kind}")
    out = write(lm, x, mask, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, valid=valid,
                eot_id=tokenizer.eot, generator=generator, callback=seen, **fitting, **hook)
    for i, (row, given) in enumerate(zip(out.tolist(), rows), 1):
        # what is drawn ends at EOT
        text = tokenizer.decode([t for t, g in zip(row, given) if g != mask or t != tokenizer.eot])
        print(f"--- sample {i}\n" * (len(rows) > 1) + text)
        if tool and text.rpartition("<tool>")[2].count("</tool>") < ("<tool>" in text):
            print(f"sample {i}: its last <tool> is never closed, so nothing was called", file=sys.stderr)
    for b, call, result, why in tool.calls if tool else ():
        failed = f", failed: {why}" if why else ""
        print(f"sample {b + 1}: {args.tool}('{call}') -> '{result}'{failed}", file=sys.stderr)
    new = sum(row.count(mask) for row in rows)
    print(f"{new:,} tokens in {steps:,} steps, {time.perf_counter() - tic:.2f} s", file=sys.stderr)
    return kind, first


# ------------------------------------------------------------------------------------------------------------
# Score

def score(args, lm, tokenizer, flags):
    """Likelihood of a text in windows of the model's block size:
    exact for AR, a bound and exact chains for diffusion."""
    need(args.windows >= 0, f"--windows {args.windows}: expected a number of windows, 0 for all")
    S = flags["diffusion_block"] if flags["objective"] == "block" else 1
    files = prepare.find_texts(args.text)
    T = lm.config.block_size // S * S
    size = sum(len(text.encode()) for text, _, _ in prepare.read_text(files))
    parts = (part.tolist() for part, _ in tokenizer.encode_stream(prepare.read_text(files)))
    ids = list(itertools.islice(itertools.chain.from_iterable(parts), args.windows * T or None))
    T = min(T, len(ids) // S * S)
    need(size and T, f"{args.text[0]} is empty or shorter than one block of the run: nothing to score")
    x = torch.tensor(ids[:len(ids) // T * T]).view(-1, T)
    scored = int(tokenizer.token_bytes[x.numpy()].sum())
    print(f"{len(x):,} windows of {T} tokens, {scored / size:.1%} of the "
          f"{size:,} bytes of text; {scored / x.numel():.3f} bytes per token")
    for name, likelihood in panel(lm, flags, x.to(lm.embed.weight.device), args.n_mc):
        nats, error = likelihood()
        nats = nats.mean().item()
        spread = f" +- {error:.4f}" if error else ""
        bits = nats * x.numel() / max(1, scored) / math.log(2)
        print(f"{name:<45} {nats:.4f}{spread} nats/token, {bits:.4f} bits/byte")


def panel(lm, flags, x, n_mc=64, fill_blocks=(4,)):
    """All likelihoods of the windows x (N, T) that the run's objective defines: [(name, function)], which
    gives nats per token of each window (N,) and the standard error of their mean over masks.

    A block run needs T to be a multiple of its blocks. Chains take T passes each, any order in blocks of S
    (2 ** S - 1) / S times as many."""
    objective = flags["objective"]
    mask = lm.mask_id
    block = flags["diffusion_block"] if objective == "block" else None
    name = f"block diffusion ({block})" if block else "diffusion"
    sizes = dict.fromkeys(math.gcd(S, block or S) for S in fill_blocks)

    @torch.no_grad()
    def exact(f, **how):
        return torch.cat([f(lm, w, **how).double().view(len(w), -1).mean(1) for w in x.split(32)]), 0.0

    def bound():
        nats, error = diffusion.mdm_nll(lm, x, mask, n_mc, noise_block=block, per_row=True)
        return nats, error.norm().item() / len(x)
    ar = [("AR, exact", partial(exact, diffusion.ar_loss, bos_id=mask, reduction="none"))]
    chain = partial(exact, diffusion.chain_nll, mask_id=mask, noise_block=block)
    any_order = partial(exact, diffusion.any_order_nll, mask_id=mask, noise_block=block)
    mdm = [
        (f"{name}, bound", bound),
        (f"{name}, exact chain (left)", partial(chain, order="left")),
        (f"{name}, exact chain (confidence)", partial(chain, order="confidence")),
        *((f"{name}, exact, any order in blocks of {S}", partial(any_order, fill_block=S)) for S in sizes)
    ]
    return {"ar": ar, "mixed": ar + mdm}.get(objective, mdm)


# ------------------------------------------------------------------------------------------------------------
# Export

GPT2 = """
n_embd=n_embd n_layer=n_layer n_head=n_head n_positions=block_size n_inner=n_inner layer_norm_epsilon=norm_eps
activation_function=mlp"""
LLAMA = """
hidden_size=n_embd num_hidden_layers=n_layer num_attention_heads=n_head num_key_value_heads=n_kv_head
head_dim=head_dim intermediate_size=n_inner max_position_embeddings=block_size rms_norm_eps=norm_eps
rope_theta=rope_base tie_word_embeddings=tied"""


@torch.no_grad()
def export(args, lm, tokenizer, flags):
    """Writes a new folder that transformers reads, and our scripts: config.json, model.safetensors, and the
    run's tokenizer. Our row V is a token more there. ValueError where the nearest kind of model, gpt2, llama
    or qwen3, computes something else."""
    need(flags["objective"] != "block", "--export: a config.json knows no blocks, and this is a block run")
    V = lm.V
    folder = Path(args.export)
    c = model.override(lm.config, {"n_inner": model.inner_width(lm.config)})
    kind = "gpt2" if c.mlp in ("gelu", "gelu_new") else "qwen3" if c.qk_norm else "llama"
    config = dict(model_type=kind, vocab_size=V + 1, mask_token_id=V, bos_token_id=V,
                  eos_token_id=tokenizer.eot, objective=flags["objective"])
    for theirs, ours in model.settings(GPT2 if kind == "gpt2" else LLAMA).items():
        config[theirs] = getattr(c, ours)
    lm.cpu().float()
    twin = model.LM(model.read_config(config)).eval()
    try:
        twin.load_state_dict(lm.state_dict(), strict=False)     # biases that ours has not stay 0
    except RuntimeError:                                        # other shapes, so other outputs
        pass
    x = torch.arange(c.block_size)[None] % V
    same = all(torch.allclose(twin(x, causal), lm(x, causal), atol=1e-4) for causal in (True, False))
    need(same, f"--export: a {kind} is the nearest that there is, and it computes something else")
    from safetensors.torch import save
    weights = {name: w.contiguous() for name, ([w], _) in model.their_tensors(twin, kind, V + 1).items()}
    folder.mkdir(parents=True)
    with prepare.whole_file(folder / "model.safetensors") as f:
        f.write(save(weights, {"format": "pt"}))
    with prepare.whole_file(folder / "config.json", "w") as f:
        json.dump(config, f, indent=1)
    for path in prepare.run_files(args.run) or prepare.run_files(Path(args.run).parent):    # of a checkpoint
        shutil.copy(path, folder)


def harness(run, device="cpu", measure=None, n_mc=32):
    """A model for lm-evaluation-harness: lm_eval.simple_evaluate(sample.harness("out/RUN"), tasks=["piqa"]).

    measure: one of bench.MEASURES, None takes the objective's first. exact and chain are what `bench.py
    choices` says; the bound comes from other masks, drawn from the document's number: the same for its ends.
    At most half a window is written."""
    from lm_eval.api.model import LM
    import bench
    lm, state = train.load_model(run, device=device)
    flags = train.DEFAULTS | state["flags"]
    tokenizer = prepare.load_tokenizer(run)
    measure = measure or bench.MEASURES[flags["objective"]][0]
    T = lm.config.block_size

    def judge(context, end, seed):
        need(len(end) <= T, f"an end of {len(end)} tokens is longer than the window of {T}")
        item = bench.item_of(context, [end], 0, tokenizer)
        found = bench.judge_item(lm, flags, item, measure, n_mc, seed)
        return -found["nats"][0], found["greedy"]

    class Harness(LM):
        def loglikelihood(self, requests):
            return [judge(*map(tokenizer.encode, r.args), r.doc_id or 0) for r in requests]

        def loglikelihood_rolling(self, requests):
            texts = (tokenizer.encode(*r.args) for r in requests)
            return [sum(judge([], text[i:i + T], i)[0] for i in range(0, len(text), T)) for text in texts]

        def generate_until(self, requests):
            return [self.greedy(*r.args) for r in requests]

        def greedy(self, context, how):
            new = min(how.get("max_gen_toks", 256), T // 2)     # the rest is for the context
            ids = tokenizer.encode(context)[new - T:]
            kind, fitting = sampler(argparse.Namespace(draft=0, **dict.fromkeys(DIFFUSION)), lm, flags, False)
            x = torch.tensor([ids + [lm.mask_id] * new], device=lm.embed.weight.device)
            write = getattr(diffusion, f"sample_{kind}")
            y = write(lm, x, lm.mask_id, temperature=0, eot_id=tokenizer.eot, **fitting)
            text = canvas_text(y[0, len(ids):].tolist(), tokenizer, lm.mask_id)     # without ends of text
            until = how.get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0]
            return text
    return Harness()


# ------------------------------------------------------------------------------------------------------------
# To look at

def canvas_text(ids, tokenizer, mask_id):
    """Token ids as text, places that are still open as blocks, without the ends of text. Decoding run by run
    keeps a character's bytes together."""
    runs = itertools.groupby(filter(tokenizer.eot.__ne__, ids), mask_id.__eq__)
    return "".join("░" * len([*run]) if is_open else tokenizer.decode(run) for is_open, run in runs)


def wrap(text, width, height):
    """The first `height` lines of a text, each of at most `width` characters."""
    return [row[i:i + width] for row in text.splitlines() for i in range(0, len(row) or 1, width)][:height]


def show(step, text, pause):
    """Clears the terminal and writes the text there."""
    width, height = shutil.get_terminal_size()
    rows = wrap(text, width, height - 2)
    print(f"\x1b[H\x1b[Jstep {step}", *rows, sep="\n")
    time.sleep(pause)


def moving_picture(path, panels):
    """A GIF of canvases that fill, side by side. panels: [(kind, the text after each step)] of each run."""
    import matplotlib                                           # for its fonts
    from PIL import Image, ImageDraw, ImageFont
    names = {"ar": "autoregressive", "mdm": "masked diffusion", "block": "block diffusion"}
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSansMono.ttf", 15)
    panels = [(names[kind], [wrap(text, 40, 16) for text in texts]) for kind, texts in panels]
    frames = min(60, max(len(pages) for _, pages in panels))
    rows = max(len(page) for _, pages in panels for page in pages)
    images = []
    for i in range(frames):
        image = Image.new("L", (420 * len(panels), 22 * rows + 60), 255)
        draw = ImageDraw.Draw(image)
        for j, (name, pages) in enumerate(panels):
            step = round(i * (len(pages) - 1) / max(1, frames - 1))
            text = "\n".join([f"{name}, step {step}", "", *pages[step]])
            draw.text((420 * j + 16, 12), text, 0, font)
        images.append(image.point(lambda grey: grey | 31))      # 8 greys: less than half the bytes
    with prepare.whole_file(path) as f:
        pauses = [100] * (frames - 1) + [3000]                  # milliseconds
        images[0].save(f, "GIF", save_all=True, append_images=images[1:], loop=0, duration=pauses)


# ------------------------------------------------------------------------------------------------------------
# Tools

class ToolCalls:
    """The hook by which a model uses a tool while it writes: on_token of sample_ar, on_block of sample_block.

    Where the clean text of a row ends a call <tool>...</tool>, tool(the text between) -> str is run, its
    result is put behind the call as given tokens, and what was generated behind it is masked again; an empty
    result (or None) changes nothing. tool is any callable of the user's, or a list of one for each row. If it
    raises, needs more than `seconds` (it is then left behind in its thread), or its result does not fit
    behind the call, the result is the text of `failed` where that fits.
    end (B,): length of each row. calls: [(row, call, result, None or why it failed)].
    """
    def __init__(self, tool, tokenizer, mask_id, end, seconds=5.0, failed="error"):
        self.tokenizer = tokenizer
        self.mask_id = mask_id
        self.seconds = seconds
        self.failed = failed
        self.end = [*map(int, end)]
        self.calls = []
        self.tools = tool if isinstance(tool, list) else [tool] * len(self.end)
        self.done = [0] * len(self.end)         # tokens of each row that need no look

    def __call__(self, x, given, *_):
        for b, row in enumerate(x.tolist()):
            clean = (row + [self.mask_id]).index(self.mask_id)
            while (stop := self.next_call(row[:min(clean, self.end[b])], b)) is not None:
                self.done[b] = stop
                before = self.tokenizer.decode(row[:stop]).rpartition("</tool>")[0]
                _, opened, call = before.rpartition("<tool>")
                if given[b, stop - 1] or not opened or "</tool>" in call:  # of the prompt, or never opened
                    continue
                room = int((given[b, stop:self.end[b]].cumsum(0) == 0).sum())
                result, why = self.run(self.tools[b], call)
                ids = self.tokenizer.encode(result)
                if len(ids) > room:
                    why = why or f"its result has {len(ids)} tokens, and there is room for {room}"
                    ids = self.tokenizer.encode(self.failed)
                    ids *= len(ids) <= room
                self.calls.append((b, call, self.tokenizer.decode(ids), why))
                if ids:
                    self.done[b] = end = stop + len(ids)
                    x[b, stop:end] = torch.tensor(ids, device=x.device)
                    given[b, stop:end] = True
                    x[b, end:].masked_fill_(~given[b, end:], self.mask_id)
                    break  # what followed is written anew

    def next_call(self, ids, b):
        """The first place behind done[b] at which a </tool> is complete, or None."""
        text = lambda stop: self.tokenizer.decode(ids[self.done[b]:stop])
        if "</tool>" in text(None):
            return next(i for i in range(self.done[b] + 1, len(ids) + 1) if "</tool>" in text(i))

    def run(self, tool, call):
        """(result as text, None or why it failed)"""
        out = []

        def work():
            try:
                result = tool(call)
                out.append(("" if result is None else str(result).encode("utf-8", "replace").decode(), None))
            except BaseException as e:  # whatever a user's tool does
                out.append((self.failed, f"it raised {type(e).__name__}: {e}"))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.seconds)
        return out[0] if out else (self.failed, f"it took longer than {self.seconds:g} seconds")


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.USub: operator.neg}


def calculator(text):
    """'(17+4)*25' -> '525': numbers, + - * / and parentheses. It walks the parsed expression and never
    evaluates the text as Python. ValueError for anything else, ZeroDivisionError and OverflowError as in
    Python."""
    def value(node):
        if type(getattr(node, "value", None)) in (int, float):
            return node.value
        if type(getattr(node, "op", None)) in OPERATIONS:
            parts = (value(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))
            return OPERATIONS[type(node.op)](*parts)
        raise SyntaxError
    try:
        result = value(ast.parse(text.strip() if len(text) <= 200 else "", mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"'{text[:40]}' is no arithmetic of at most 200 characters: numbers, + - * / and ()"
                         ) from None
    return str(result) if isinstance(result, int) else f"{result:.10g}"


TOOLS = {"calculator": calculator}


# ------------------------------------------------------------------------------------------------------------
# The command line

COMMON = {      # flag: (default, or its type where that is None, help); of a tuple one
    "which": (("best", "last"), "checkpoint of the folder (default: best)"),
    "device": ("auto", "auto | cuda | mps | cpu (default: auto)"),
    "dtype": (("float32", "bfloat16"), "of a published model's weights (default: float32)"),
    "threads": (0, "CPU threads (default: 1 for models below 5M parameters, else all cores)"),
}
SCORE = {
    "windows": (16, "score only the first ones, 0 = all (default: 16)"),
    "n_mc": (64, "masks per window of the bound, a multiple of 4 (default: 64)"),
}
GENERATE = {
    "prompt": (list, "text to go on with; [MASK:n] marks n tokens to fill in; may be given several times"),
    "num_samples": (1, "of each prompt (default: 1)"),
    "max_new_tokens": (int, "tokens after the prompt (default: up to 200, 0 when infilling)"),
    "temperature": (1.0, "0 = the most probable token (default: 1)"),
    "top_k": (int, "draw from the k most probable tokens"),
    "top_p": (float, "draw from the smallest set of tokens with this probability"),
    "steps": (int, "diffusion: forward passes, of each block in a block run (default: one per token)"),
    "threshold": (float, "diffusion: a pass takes every token at least so probable, instead of --steps"),
    "order": (str, f"diffusion: {', '.join(diffusion.ORDERS)} (default: random; max_prob with --threshold)"),
    "fill_block": (int, "diffusion: fill blocks of so many tokens, one after the other (default: no blocks)"),
    "cache": (bool, "diffusion in blocks: the dual cache, an approximation"),
    "refresh": (int, "renew the cache also after so many steps in a block (default: when one starts)"),
    "draft": (0, "AR: tokens that the run itself proposes for each pass; texts keep their distribution"),
    "tool": (str, f"run the calls <tool>...</tool> that the model writes: {', '.join(TOOLS)}"),
    "seed": (0, "(default: 0)"),
    "watch": (bool, "show every step in the terminal"),
    "pause": (0.03, "seconds between the steps shown by --watch (default: 0.03)"),
    "gif": (str, "a file: also draw how the canvas of the first prompt fills"),
    "beside": (str, "a second run, which writes the same prompt in the --gif"),
    "export": (str, "no text: a new folder, the model as transformers reads it"),
}


def parse_args(argv):
    scoring = argv[:1] == ["score"]
    parser = prepare.Parser(prog="sample.py" + " score" * scoring, description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train.py, or a checkpoint in one")
    if scoring:
        parser.add_argument("--text", required=True, nargs="+",
                            help="as prepare.py reads it: .txt .md .jsonl, packed, folders")
    for flag, (default, text) in {**COMMON, **(SCORE if scoring else GENERATE)}.items():
        kind = default if isinstance(default, type) else type(default)
        how = dict(type=kind, default=None if kind is default else default)
        if kind is tuple:
            how = dict(choices=default, default=default[0])
        if kind is bool:
            how = dict(action="store_const", const=True)
        if kind is list:
            how = dict(action="append")
        parser.add_argument(f"--{flag}", help=text, **how)
    args = parser.parse_args(argv[scoring:])
    args.do = score
    args.runs = [args.run]
    if not scoring:
        args.do = export if args.export else generate
        need(args.num_samples > 0, f"--num_samples {args.num_samples} must be at least 1")
        need(0 <= args.pause < 3600, f"--pause {args.pause}: expected seconds")
        need(args.gif or not args.beside, "--beside is a second run for the picture: give --gif FILE too")
        args.runs += [args.beside] * bool(args.beside)
    return args


def main(argv=None):
    prepare.console()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv)
        panels = []
        for run in args.runs:
            lm, state = train.load_model(run, args.which, train.pick_device(args.device),
                                         getattr(torch, args.dtype))
            train.set_threads(args.threads, lm)
            tokenizer = prepare.load_tokenizer(run)
            flags = train.DEFAULTS | state["flags"]
            if panels and flags["objective"] == "ar":           # --steps and its kind were for the first run
                vars(args).update(dict.fromkeys(DIFFUSION))
            panels.append(args.do(args, lm, tokenizer, flags))
        if panels[0] and args.gif:                              # an export has no panel, nor has a score
            moving_picture(args.gif, panels)
    except KeyboardInterrupt:
        print("sample.py: interrupted", file=sys.stderr)
        return 130
    except ImportError as e:
        why = f"{e}: pip install {e.name}"
    except (ValueError, OSError, MemoryError) as e:
        why = e
    except RuntimeError as e:
        if "allocate" not in str(e):
            raise
        why = "out of memory: use a smaller --num_samples, --max_new_tokens or --n_mc"
    else:
        return 0
    return prepare.complain("sample.py", why)


if __name__ == "__main__":
    sys.exit(main())
