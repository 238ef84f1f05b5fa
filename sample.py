"""Write text with a trained model, fill gaps in a text, or score one: from a run folder that train.py made.

    python sample.py out/RUN --prompt "The function returns" --num_samples 3
    python sample.py out/RUN --prompt "One" --prompt "Another, longer"       # different lengths, one batch
    python sample.py out/RUN --prompt "The [MASK:12] sat on" --watch         # diffusion fills gaps; --watch shows how
    python sample.py out/RUN --threshold 0.9 --block_size 32 --cache         # diffusion, several tokens a pass
    python sample.py out/RUN --prompt "(17+4)*25?" --tool calculator         # a run on prepare.py --dataset arithmetic
    python sample.py out/RUN --gif canvas.gif --beside out/RUN2              # a picture that moves: two runs, one prompt
    python sample.py score out/RUN --text FILE                               # nats per token and bits per byte
"""
import ast
import math
import operator
import os
import re
import shutil
import sys
import threading
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

import diffusion
import prepare
import train
from model import parse_layers

DIFFUSION = ("steps", "threshold", "order", "block_size", "cache", "refresh")          # flags that AR has no use for


def parse_prompt(text, tokenizer, mask_id):
    """Token ids of a prompt; [MASK] or [MASK:n] stands for 1 or n tokens to fill in."""
    ids = []
    for i, part in enumerate(re.split(r"\[MASK(?::([0-9]{1,6}))?\]", text)):
        if i % 2 and int(part or 1):
            ids += [mask_id] * int(part or 1)
        elif i % 2 or "[MASK" in part:
            raise ValueError("--prompt: places to fill are written [MASK], or [MASK:n] for n of 1 to 999999, and it has "
                             + ("[MASK:0]" if i % 2 else f"'{part[part.index('[MASK'):][:20]}'"))
        else:
            ids += tokenizer.encode(part)
    return ids


def canvas_text(ids, tokenizer, mask_id):
    """Token ids as text, places that are still open as blocks."""
    return "".join("░" * len(run) if open_ else tokenizer.decode(run) for open_, run in groups(ids, mask_id))


def wrap(text, width, height):
    """The first `height` lines of a text, each of at most `width` characters."""
    return [row[i:i + width] for row in text.split("\n") for i in range(0, len(row) or 1, width)][:height]


def watcher(pause):
    """Returns show(step, text), which redraws the text in the terminal."""
    lines = 0

    def show(step, text):
        nonlocal lines
        size = shutil.get_terminal_size()
        rows = wrap(text, size.columns, size.lines - 2)
        sys.stdout.write(f"\x1b[{lines}F\x1b[J" * bool(lines) + f"step {step}\n" + "\n".join(rows) + "\n")
        sys.stdout.flush()
        lines = len(rows) + 1
        time.sleep(pause)
    return show


def groups(ids, mask_id):
    """Runs of equal kind: [(is_mask, ids), ...]. Decoding run by run keeps a character's bytes together."""
    out = []
    for t in ids:
        if out and out[-1][0] == (t == mask_id):
            out[-1][1].append(t)
        else:
            out.append((t == mask_id, [t]))
    return out


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.USub: operator.neg}


def calculator(text):
    """'(17+4)*25' -> '525': numbers, + - * / and parentheses. It walks the parsed expression and never evaluates the text as
    Python. ValueError for anything else, ZeroDivisionError and OverflowError as in Python."""
    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, (ast.BinOp, ast.UnaryOp)) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](*(value(n) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)))
        raise SyntaxError
    try:
        result = value(ast.parse(text.strip() if len(text) <= 200 else "", mode="eval").body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"'{text[:40]}' is no arithmetic: expected numbers, + - * / and parentheses, at most 200 characters") from None
    return str(result) if isinstance(result, int) else f"{result:.10g}"


class ToolCalls:
    """The hook by which a model uses a tool while it writes: on_token of sample_ar, on_block of sample_block.

    Where the clean text of a row ends a call <tool>...</tool>, tool(the text between) -> str is run, its result is put
    behind the call as given tokens, and what was generated behind it is masked again; an empty result (or None) changes
    nothing. tool is any callable of the user's. If it raises, needs more than `seconds` (it is then left behind in its
    thread), or its result does not fit behind the call, the result is the text of `failed` where that fits.
    end (B,): length of each row. calls: [(row, call, result, None or why it failed)].
    """
    def __init__(self, tool, tokenizer, mask_id, end, seconds=5.0, failed="error"):
        self.tool, self.tokenizer, self.mask_id, self.seconds, self.failed = tool, tokenizer, mask_id, seconds, failed
        self.end, self.calls, self.done = [int(e) for e in end], [], [0] * len(end)    # done: tokens of a row that need no look

    def __call__(self, x, given, *_):
        for b, row in enumerate(x.tolist()):
            clean = (row + [self.mask_id]).index(self.mask_id)
            while (stop := self.next_call(row[:min(clean, self.end[b])], b)) is not None:
                self.done[b] = stop
                _, opened, call = self.tokenizer.decode(row[:stop]).rpartition("</tool>")[0].rpartition("<tool>")
                if given[b, stop - 1] or not opened or "</tool>" in call:              # of the prompt, or never opened
                    continue
                room = int((given[b, stop:self.end[b]].cumsum(0) == 0).sum())
                result, why = self.run(call)
                ids = self.tokenizer.encode(result)
                if len(ids) > room:
                    why = why or f"its result has {len(ids)} tokens, and there is room for {room}"
                    ids = self.tokenizer.encode(self.failed)
                    ids = ids if len(ids) <= room else []
                self.calls.append((b, call, self.tokenizer.decode(ids), why))
                if ids:
                    self.done[b] = stop + len(ids)
                    x[b, stop:self.done[b]], given[b, stop:self.done[b]] = torch.tensor(ids, device=x.device), True
                    x[b].masked_fill_(~given[b] & (torch.arange(x.size(1), device=x.device) >= stop), self.mask_id)
                    break                                                              # what followed is written anew

    def next_call(self, ids, b):
        """The first place behind done[b] at which a </tool> is complete, or None."""
        text = lambda stop: self.tokenizer.decode(ids[self.done[b]:stop])
        if "</tool>" in text(None):
            return next(i for i in range(self.done[b] + 1, len(ids) + 1) if "</tool>" in text(i))

    def run(self, call):
        """(result as text, None or why it failed)"""
        out = []

        def work():
            try:
                result = self.tool(call)
                out.append(("" if result is None else str(result).encode("utf-8", "replace").decode(), None))
            except BaseException as e:                                                 # whatever a user's tool does
                out.append((self.failed, f"it raised {type(e).__name__}: {e}"))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.seconds)
        return out[0] if out else (self.failed, f"it took longer than {self.seconds:g} seconds")


TOOLS = {"calculator": calculator}


def check_dual_cache(config):
    """The dual cache writes keys into the middle of a canvas: ValueError unless every layer can."""
    for name, values in parse_layers(config.layers, config.n_layer):
        if name != "mla" and (name != "full" or values.get("window", config.window) is not None):
            raise ValueError(f"--cache computes a block inside the text anew, which only the layers 'full' without window and 'mla' can do, "
                             f"and this run's are '{config.layers}', window {config.window}: choose another run, or leave --cache out")


def sampler(args, lm, flags, infill):
    """The run's sampler with the flags that fit it: a function of (x, **common keywords). ValueError names a wrong flag."""
    objective = flags["objective"]
    asked = [k for k in DIFFUSION if getattr(args, k) is not None and getattr(args, k) is not False]      # 0 is asked, and wrong
    if objective == "ar" or objective == "mixed" and not (infill or asked):            # a mixed model does both
        if infill:
            raise ValueError("[MASK] in a prompt needs a diffusion model, and this run is autoregressive: train with --objective mdm")
        if asked:
            raise ValueError(f"--{asked[0]} is for diffusion, and this run is autoregressive: leave it out, or train with --objective mdm")
        return "ar", lambda x, **how: diffusion.sample_ar(lm, x, lm.mask_id, **how)
    order = args.order or ("random" if args.threshold is None else "max_prob")
    how_many = dict(steps=args.steps, threshold=args.threshold, order=order)
    if objective == "block":
        wrong = next((k for k in ("block_size", "cache", "refresh") if k in asked), None)
        if wrong:
            raise ValueError(f"--{wrong} is for --objective mdm: this run was trained in blocks of {flags['diffusion_block']}, and their "
                             "cache is always on and exact; leave it out")
        return "block", lambda x, **how: diffusion.sample_block(lm, x, lm.mask_id, flags["diffusion_block"], **how_many, **how)
    if args.refresh is not None and not args.cache:
        raise ValueError(f"--refresh {args.refresh} needs --cache")
    if args.cache:
        if args.block_size is None:
            raise ValueError("--cache works by blocks: give --block_size, for example 32")
        check_dual_cache(lm.config)
    return "mdm", lambda x, **how: diffusion.sample_mdm(lm, x, lm.mask_id, **how_many, fill_block=args.block_size, cache=args.cache,
                                                        refresh=args.refresh, **how)


def generate(args, lm, tokenizer, flags):
    mask, window, eot, rows = lm.mask_id, lm.config.block_size, tokenizer.eot, []
    prompts = [parse_prompt(p, tokenizer, mask) for p in args.prompt or [""]]
    kind, run = sampler(args, lm, flags, any(mask in p for p in prompts))
    for p in prompts:
        new = args.max_new_tokens if args.max_new_tokens is not None else 0 if mask in p else max(1, min(200, window - len(p)))
        if len(p) + new > window and (kind != "ar" or len(p) >= window):               # AR may go on behind its window
            raise ValueError(f"prompt ({len(p)} tokens) and new tokens ({new}) exceed the model's window of {window}: "
                             "shorten one, or use --max_new_tokens")
        if new < 0 or new == 0 and mask not in p:
            raise ValueError(f"--max_new_tokens {new}: nothing to generate, use at least 1 or put [MASK] into the prompt")
        rows += [p + [mask] * new] * args.num_samples
    device, steps, tic = lm.embed.weight.device, 0, time.perf_counter()
    show, frames = watcher(args.pause) if args.watch else None, []

    def seen(step, x):
        nonlocal steps
        steps = step
        if show or args.gif:
            frames.append(canvas_text(x[0, :len(rows[0])].tolist(), tokenizer, mask))
        if show:
            show(step, frames[-1])
    x, valid = (a.to(device) for a in diffusion.canvas(rows, 0, mask))
    hook = {}
    if args.tool:
        if args.tool not in TOOLS or kind == "mdm":
            raise ValueError(f"--tool {args.tool}: expected {' or '.join(TOOLS)}, and a run of objective ar or block, which writes in order")
        hook = {"on_token" if kind == "ar" else "on_block": ToolCalls(TOOLS[args.tool], tokenizer, mask, [len(r) for r in rows])}
    gen = torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed)
    out = run(x, valid=valid, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, eot_id=eot, generator=gen, callback=seen, **hook)
    for i, (row, given) in enumerate(zip(out.tolist(), rows)):
        text = tokenizer.decode([t for t, g in zip(row, given) if g != mask or t != eot])      # what was drawn ends at EOT
        print((f"--- sample {i + 1}\n" if len(rows) > 1 else "") + text)
        if args.tool and text.rpartition("<tool>")[2].count("</tool>") < ("<tool>" in text):
            print(f"sample {i + 1}: its last <tool> is never closed, so nothing was called", file=sys.stderr)
    for b, call, result, why in (c for h in hook.values() for c in h.calls):
        print(f"sample {b + 1}: {args.tool}('{call}') -> '{result}'" + (f", failed: {why}" if why else ""), file=sys.stderr)
    tokens, passes = prepare.count(sum(r.count(mask) for r in rows), "token"), prepare.count(steps, "step")
    print(f"{tokens} in {passes}, {time.perf_counter() - tic:.2f} s", file=sys.stderr)
    return kind, [canvas_text(rows[0], tokenizer, mask), *frames]


def moving_picture(path, panels, frames=60, width=40, height=16):
    """A GIF of canvases that fill, side by side. panels: [(kind, the text after each step)], the first row of each run."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from PIL import Image
    except ImportError:
        raise ValueError("--gif needs matplotlib: pip install matplotlib") from None
    names, images = {"ar": "autoregressive", "mdm": "masked diffusion", "block": "block diffusion"}, []
    frames = min(frames, max(len(texts) for _, texts in panels))
    rows = max(len(wrap(text, width, height)) for _, texts in panels for text in texts)
    figure = Figure(figsize=(4.2 * len(panels), 0.24 * rows + 0.6), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for i in range(frames):
        figure.clear()
        for j, (kind, texts) in enumerate(panels):
            step = round(i * (len(texts) - 1) / max(1, frames - 1))
            how = dict(x=(j + 0.04) / len(panels), va="top", family="monospace", parse_math=False)
            figure.text(y=0.97, s=f"{names[kind]}, step {step}", weight="bold", size=11, **how)
            figure.text(y=1 - 0.45 / figure.get_figheight(), s="\n".join(wrap(texts[step], width, height)), size=11, **how)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
        images.append(image.convert("L").quantize(16))
    with prepare.whole_file(path) as f:
        images[0].save(f, "GIF", save_all=True, append_images=images[1:], loop=0,
                       duration=[100] * (frames - 1) + [3000])


def block_chain(lm, x, S, order, scored=None):
    """Exact -log p of a block-diffusion model as a sampler with one token a pass: block after block, inside one in `order`.

    x (N, T), T a multiple of S. (N,) nats per token. A block sees itself and the clean text before it.
    scored (N, T) bool: the tokens that count, the others are given; default all. Unscored places may hold the mask token."""
    T = x.size(1)
    of = torch.arange(T, device=x.device).div(S, rounding_mode="floor")
    f = lambda idx, causal: lm(idx, causal=False, mask=of[:idx.size(1), None] >= of[:idx.size(1)])
    scored = torch.ones_like(x, dtype=torch.bool) if scored is None else scored
    nats = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for s in range(S, T + 1, S):
        now = scored[:, :s] & (of[:s] == of[s - 1])
        rows = now.any(1)
        if rows.any():
            nats[rows] += diffusion.chain_nll(f, x[rows, :s], lm.mask_id, order, scored=now[rows]) * now[rows].sum(1)
    return nats / scored.sum(1)


@torch.no_grad()
def panel(lm, flags, x, n_mc=64):
    """All likelihoods of the windows x (N, T) that the run's objective defines: [(name, nats per token, s.e. over masks)].

    A block run needs T to be a multiple of its blocks. Chains take T passes each."""
    mean = lambda f: torch.cat([f(w) for w in x.split(32)]).mean().item()
    objective, mask, S, rows = flags["objective"], lm.mask_id, flags["diffusion_block"], []
    if objective in ("ar", "mixed"):
        rows.append(("AR, exact", mean(lambda w: diffusion.ar_loss(lm, w, mask, reduction="none").double()), 0.0))
    if objective in ("mdm", "mixed"):
        rows.append(("diffusion, bound", *diffusion.mdm_nll(lm, x, mask, n_mc)))
        rows += [(f"diffusion, exact chain ({order})", mean(lambda w: diffusion.chain_nll(lm, w, mask, order)), 0.0)
                 for order in ("left", "confidence")]
    if objective == "block":
        rows.append((f"block diffusion ({S}), bound", *diffusion.mdm_nll(lm, x, mask, n_mc, noise_block=S)))
        rows += [(f"block diffusion ({S}), exact chain ({order})", mean(lambda w: block_chain(lm, w, S, order)), 0.0)
                 for order in ("left", "confidence")]
    return rows


def score(args, lm, tokenizer, flags):
    """Likelihood of a text, cut into windows of the model's block size: exact for AR, a bound and exact chains for diffusion."""
    if args.windows < 0:
        raise ValueError(f"--windows {args.windows}: expected a number of windows, 0 for all")
    S = flags["diffusion_block"] if flags["objective"] == "block" else 1
    T = lm.config.block_size - lm.config.block_size % S
    size, ids, need = 0, [], (args.windows or 10 ** 12) * T

    def counted():                              # the size of the whole text, of which the first windows are scored
        nonlocal size
        for text, last, done in prepare.read_text(prepare.find_texts(args.text)):
            size += len(text.encode())
            yield text, last, done
    for part, _ in tokenizer.encode_stream(stream := counted()):
        ids += part.tolist()
        if len(ids) >= need:
            break
    for _ in stream:
        pass
    T = min(T, len(ids) - len(ids) % S)
    if size == 0 or T < 1:
        why = "is empty: there is nothing to score" if size == 0 else "is shorter than one block of the run"
        raise ValueError(f"--text {' '.join(args.text)} {why}")
    n = min(need // T, len(ids) // T)
    x = torch.tensor(ids[:n * T]).view(n, T)
    bytes_per_token = tokenizer.token_bytes[x.numpy()].sum() / x.numel()
    part = tokenizer.token_bytes[x.numpy()].sum() / size
    print(f"{prepare.count(n, 'window')} of {prepare.count(T, 'token')}, {part:.1%} of the {prepare.count(size, 'byte')} of "
          f"text; {bytes_per_token:.3f} bytes per token")
    for name, nats, se in panel(lm, flags, x.to(lm.embed.weight.device), args.n_mc):
        print(f"{name:<45} {nats:.4f}{f' +- {se:.4f}' if se else ''} nats/token, {nats / math.log(2) / bytes_per_token:.4f} bits/byte")


def main(argv=None):
    import argparse
    argv = list(sys.argv[1:] if argv is None else argv)
    scoring = argv[:1] == ["score"]
    argv = argv[scoring:]
    parser = prepare.Parser(prog="sample.py" + " score" * scoring, description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of train.py, or a checkpoint in one")
    parser.add_argument("--which", default="best", choices=("best", "last"), help="checkpoint of the folder (default: best)")
    parser.add_argument("--device", default="auto", help="auto | cuda | mps | cpu (default: auto)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: 1 for models below 5M parameters, else all cores)")
    parser.set_defaults(gif=None, beside=None)
    if scoring:
        parser.add_argument("--text", required=True, nargs="+", help="text, as prepare.py reads it: .txt .jsonl .gz, folders")
        parser.add_argument("--windows", type=int, default=16, help="score only the first ones, 0 = all (default: 16)")
        parser.add_argument("--n_mc", type=int, default=64, help="masks per window of the bound, a multiple of 4 (default: 64)")
    else:
        parser.add_argument("--prompt", action="append",
                            help="text to go on with; [MASK:n] marks n tokens to fill in; may be given several times (default: none)")
        parser.add_argument("--num_samples", type=int, default=1, help="of each prompt (default: 1)")
        parser.add_argument("--max_new_tokens", type=int, help="tokens after the prompt (default: up to 200, 0 when infilling)")
        parser.add_argument("--temperature", type=float, default=1.0, help="0 = the most probable token (default: 1)")
        parser.add_argument("--top_k", type=int, help="draw from the k most probable tokens")
        parser.add_argument("--top_p", type=float, help="draw from the smallest set of tokens with this probability")
        parser.add_argument("--steps", type=int, help="diffusion: forward passes, of each block in a block run (default: one per token)")
        parser.add_argument("--threshold", type=float, help="diffusion: a pass takes every token that is at least so probable, instead of --steps")
        parser.add_argument("--order", help=f"diffusion: {', '.join(diffusion.ORDERS)} (default: random; max_prob with --threshold)")
        parser.add_argument("--block_size", type=int, help="diffusion: fill blocks of so many tokens, one after the other (default: no blocks)")
        parser.add_argument("--cache", action="store_true", help="diffusion in blocks: the dual cache, faster, an approximation")
        parser.add_argument("--refresh", type=int, help="renew it also after so many steps inside a block (default: only when one starts)")
        parser.add_argument("--tool", help=f"run the calls <tool>...</tool> that the model writes: {', '.join(TOOLS)}")
        parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
        parser.add_argument("--watch", action="store_true", help="show every step in the terminal")
        parser.add_argument("--gif", metavar="FILE", help="also draw how the canvas of the first prompt fills")
        parser.add_argument("--beside", metavar="RUN", help="in the --gif: a second run, which writes the same prompt")
        parser.add_argument("--pause", type=float, default=0.03, help="seconds between the steps shown (default: 0.03)")
    prepare.console()
    try:
        args = parser.parse_args(argv)
        if not scoring and args.num_samples < 1:
            raise ValueError(f"--num_samples {args.num_samples} must be at least 1")
        if args.beside and not args.gif:
            raise ValueError("--beside is a second run for the picture: give --gif FILE too")
        panels = []
        for run in filter(None, [args.run, args.beside]):
            lm, state = train.load_model(run, args.which, train.pick_device(args.device))
            train.set_threads(args.threads, lm)
            folder = run if os.path.isdir(run) else os.path.dirname(run)
            flags = {**train.DEFAULTS, **state["flags"]}
            if run == args.beside and flags["objective"] == "ar":
                vars(args).update(dict.fromkeys(DIFFUSION))
            panels.append((score if scoring else generate)(args, lm, prepare.load_tokenizer(folder or "."), flags))
        if args.gif:
            moving_picture(args.gif, panels)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
