"""Write text with a trained model, fill gaps in a text, or score one: from a run folder that train.py made.

    python sample.py out/RUN --prompt "The function returns" --num_samples 3
    python sample.py out/RUN --prompt "The [MASK:12] sat on" --watch         # diffusion fills gaps; --watch shows how
    python sample.py score out/RUN --text FILE                               # nats per token and bits per byte
"""
import math
import os
import shutil
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import re

import torch

import diffusion
import prepare
import train


def parse_prompt(text, tokenizer, mask_id):
    """Token ids of a prompt; [MASK] or [MASK:n] stands for 1 or n tokens to fill in."""
    ids = []
    for i, part in enumerate(re.split(r"\[MASK(?::(\d+))?\]", text)):
        if i % 2:
            ids += [mask_id] * int(part or 1)
        else:
            ids += tokenizer.encode(part)
    return ids


def watcher(tokenizer, mask_id, pause):
    """A callback for the samplers that redraws the first row in the terminal, open places as blocks."""
    lines = 0

    def show(step, x):
        nonlocal lines
        parts = []
        for open_, run in groups(x[0].tolist(), mask_id):
            parts.append("░" * len(run) if open_ else tokenizer.decode(run))
        width = shutil.get_terminal_size().columns
        rows = [r[i:i + width] for r in "".join(parts).split("\n") for i in range(0, len(r) or 1, width)]
        rows = rows[:shutil.get_terminal_size().lines - 2]
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


def generate(args, lm, tokenizer, objective):
    prompt = args.prompt if args.prompt is not None else ""
    ids = parse_prompt(prompt, tokenizer, lm.mask_id)
    infill = lm.mask_id in ids
    as_ar = objective == "ar" or objective == "mixed" and not infill                   # a mixed model does both
    if infill and as_ar:
        raise ValueError("[MASK] in a prompt needs a diffusion model, and this run is autoregressive: train with --objective mdm")
    new = args.max_new_tokens if args.max_new_tokens is not None else 0 if infill else max(1, min(200, lm.config.block_size - len(ids)))
    if len(ids) + new > lm.config.block_size and not as_ar:
        raise ValueError(f"prompt ({len(ids)} tokens) and new tokens ({new}) exceed the model's window of {lm.config.block_size}: "
                         "shorten one, or use --max_new_tokens")
    if new < 1 and not infill:
        raise ValueError(f"--max_new_tokens {new}: nothing to generate, use at least 1 or put [MASK] into the prompt")
    device = lm.embed.weight.device
    x, _ = diffusion.canvas([ids] * args.num_samples, new, lm.mask_id)
    x, gen = x.to(device), torch.Generator("cpu" if device.type == "mps" else device).manual_seed(args.seed)
    how = dict(temperature=args.temperature, top_p=args.top_p, eot_id=tokenizer.eot, generator=gen,
               callback=watcher(tokenizer, lm.mask_id, args.pause) if args.watch else None)
    if as_ar:
        out = diffusion.sample_ar(lm, x, lm.mask_id, top_k=args.top_k, **how)
    else:
        if args.top_k is not None:
            raise ValueError("--top_k is for AR models: with diffusion use --top_p or --temperature")
        out = diffusion.sample_mdm(lm, x, lm.mask_id, steps=args.steps, order=args.order, **how)
    for i, row in enumerate(out.tolist()):
        text = tokenizer.decode(row[:row.index(tokenizer.eot, len(ids)) if tokenizer.eot in row[len(ids):] else None])
        print((f"--- sample {i + 1}\n" if args.num_samples > 1 else "") + text)


def score(args, lm, tokenizer, objective):
    """Likelihood of a text, cut into windows of the model's block size: exact for AR, a bound and exact chains for diffusion."""
    with open(args.text, encoding="utf-8") as f:
        ids = tokenizer.encode(f.read())
    T = min(lm.config.block_size, len(ids))
    if T < 1:
        raise ValueError(f"{args.text} is empty: there is nothing to score")
    n = min(args.windows or 10 ** 9, len(ids) // T)
    x = torch.tensor(ids[:n * T]).view(n, T)
    bytes_per_token = tokenizer.token_bytes[x.numpy()].sum() / x.numel()
    print(f"{n} windows of {T} tokens, {bytes_per_token:.3f} bytes per token")
    x = x.to(lm.embed.weight.device)
    rows = []
    if objective in ("ar", "mixed"):
        rows.append(("AR, exact", torch.stack([diffusion.ar_loss(lm, r, lm.mask_id) for r in x.split(1)]).mean().item(), 0.0))
    if objective in ("mdm", "mixed"):
        rows.append(("diffusion, bound", *diffusion.mdm_nll(lm, x, lm.mask_id, args.n_mc)))
        for order in ("left", "confidence"):
            rows.append((f"diffusion, exact chain ({order})", diffusion.chain_nll(lm, x, lm.mask_id, order).mean().item(), 0.0))
    for name, nats, se in rows:
        print(f"{name:<36} {nats:.4f}{f' +- {se:.4f}' if se else ''} nats/token, {nats / math.log(2) / bytes_per_token:.4f} bits/byte")


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
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    if scoring:
        parser.add_argument("--text", required=True, help="UTF-8 text file")
        parser.add_argument("--windows", type=int, default=16, help="score only the first ones, 0 = all (default: 16)")
        parser.add_argument("--n_mc", type=int, default=64, help="masks per window of the bound, a multiple of 4 (default: 64)")
    else:
        parser.add_argument("--prompt", help="text to go on with; [MASK:n] marks n tokens to fill in (default: none)")
        parser.add_argument("--num_samples", type=int, default=1, help="(default: 1)")
        parser.add_argument("--max_new_tokens", type=int, help="tokens after the prompt (default: up to 200, 0 when infilling)")
        parser.add_argument("--temperature", type=float, default=1.0, help="0 = the most probable token (default: 1)")
        parser.add_argument("--top_k", type=int, help="AR: draw from the k most probable tokens")
        parser.add_argument("--top_p", type=float, help="draw from the smallest set of tokens with this probability")
        parser.add_argument("--steps", type=int, help="diffusion: forward passes (default: one per token)")
        parser.add_argument("--order", default="random", help=f"diffusion: {', '.join(diffusion.ORDERS)} (default: random)")
        parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
        parser.add_argument("--watch", action="store_true", help="show every step in the terminal")
        parser.add_argument("--pause", type=float, default=0.03, help="seconds between the steps shown (default: 0.03)")
    try:
        args = parser.parse_args(argv)
        torch.set_num_threads(max(1, args.threads))
        if not scoring and args.num_samples < 1:
            raise ValueError(f"--num_samples {args.num_samples} must be at least 1")
        lm, state = train.load_model(args.run, args.which, train.pick_device(args.device))
        folder = args.run if os.path.isdir(args.run) else os.path.dirname(args.run)
        (score if scoring else generate)(args, lm, prepare.load_tokenizer(folder), state["flags"]["objective"])
    except (ValueError, OSError) as e:
        print(f"sample.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
