"""
Text to tokens. Makes data/NAME/{train.bin, val.bin, meta.json, tokenizer.tiktoken}, which train.py reads.

python prepare.py                                      # `docs`: English that is on every disk with torch; no network
python prepare.py --tokenizer byte                     # the same as bytes: what a laptop trains on
python prepare.py --text a.txt b.jsonl.gz --name mine  # your own text (.txt .jsonl, also .gz .bz2 .xz)
python prepare.py --dataset shakespeare --tokenizer gpt2                    # downloads

Inside, a text is a stream of pieces (text, last, done): a document may come in several pieces, `last` marks its final
one, `done` in [0, 1] says how much of the source has been read. So no file has to fit in memory.
On disk: token ids as raw uint16 (uint32 for vocabularies above 65,536), every document followed by <|endoftext|>, as
in nanoGPT. Every tokenizer ends in <|endoftext|>: its id is n_vocab - 1.
"""
import argparse
import ast
import base64
import bz2
import collections
import concurrent.futures
import difflib
import gc
import gzip
import hashlib
import heapq
import http.client
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
PIECE = 1 << 18                 # characters; the longest piece of a text stream
BPE_BYTES = 64 << 20            # BPE learns from the first 64 MB of the training text
BPE_WORDS = 1 << 18             # ... and from its most frequent distinct words; the tail would only cost memory
# GPT-2's split pattern, as tiktoken writes it: possessive quantifiers, same matches, faster.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

HF = "https://huggingface.co/datasets/"
URLS = {    # name: (training text, validation text or None: the end of the training text)
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", None),
    "tinystories": (HF + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
                    HF + "roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-valid.txt"),
    "enwik8": ("http://mattmahoney.net/dc/enwik8.zip", None),
    "text8": ("http://mattmahoney.net/dc/text8.zip", None),
    "owt-sample": (HF + "stanford-cs336/owt-sample/resolve/main/owt_train.txt.gz",
                   HF + "stanford-cs336/owt-sample/resolve/main/owt_valid.txt.gz"),
    "c4": (HF + "allenai/c4/resolve/main/en/c4-train.00000-of-01024.json.gz",
           HF + "allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz"),
}
SHARDS = {  # ready-made gpt2 tokens, 100M a shard: shard 0 is validation, the rest training
    "fineweb10B": (HF + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin", 103),
    "finewebedu10B": (HF + "kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}_{:06d}.bin", 99),
}
SHA256 = {
    "shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
}
DATASETS = ["docs", "pysrc", *URLS, *SHARDS]
HEADER_DTYPE = {20240520: np.uint16, 20240801: np.uint32}       # llm.c and modded-nanogpt: 256 int32, [2] = tokens


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, takes no abbreviations, and answers an unknown flag with the nearest known one."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1, 0.5)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Progress:
    """One line on stderr, at most once a second: progress(done) with done in [0, 1]."""

    def __init__(self, label):
        self.label, self.start, self.shown = label, time.time(), time.time()

    def __call__(self, done):
        now = time.time()
        if now - self.shown > 1 and done > 0:
            left = (now - self.start) * (1 - done) / done
            print(f"\r{self.label}: {done:4.0%}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
            self.shown = now


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """name; n_vocab; eot = n_vocab - 1, the id of <|endoftext|>; token_bytes (n_vocab,): bytes of text per token, 0 for
    <|endoftext|>. ranks maps token bytes to ids 0, 1, ...; None: the 256 bytes. Only encoding with ranks needs tiktoken."""

    def __init__(self, name, ranks=None, pattern=PATTERN):
        self.name, self.ranks, self.pattern = name, ranks, pattern
        self.vocab = sorted(ranks, key=ranks.get) if ranks else [bytes([b]) for b in range(256)]
        self.eot = len(self.vocab)
        self.n_vocab = self.eot + 1
        # From the raw bytes: through str, a token that is half a UTF-8 character would count as the 3 bytes of U+FFFD.
        self.token_bytes = np.array([len(b) for b in self.vocab] + [0])
        self.bpe = None

    def encode_array(self, text):
        """str -> 1-D array of ids. <|endoftext|> inside a text is ordinary text."""
        if not self.ranks:
            return np.frombuffer(text.encode(), np.uint8)
        if self.bpe is None:
            import tiktoken
            self.bpe = tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=self.ranks,
                                         special_tokens={EOT: self.eot})
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.vocab[i] if i < self.eot else EOT.encode() for i in ids).decode("utf-8", "replace")


def train_bpe(words, n_vocab):
    """Byte-level BPE. words: {bytes: count}. Returns {token bytes: id}; fewer than n_vocab - 1 when the text runs out.

    Merge the most frequent pair of neighbours, again and again (Sennrich et al. 2016, arXiv:1508.07909); ties go to the
    smaller bytes. A pair is known by its joined bytes, because tiktoken too merges any two neighbours that join to a
    known token. `where` says which words hold a pair, so that a merge recounts only those."""
    ranks = {bytes([b]): b for b in range(256)}
    words, freqs = [[bytes([b]) for b in word] for word in words], list(words.values())
    count, where = collections.Counter(), collections.defaultdict(set)
    for i, word in enumerate(words):
        for pair in map(bytes.__add__, word, word[1:]):
            count[pair] += freqs[i]
            where[pair].add(i)
    heap = [(-c, pair) for pair, c in count.items()]
    heapq.heapify(heap)
    progress = Progress("learning the vocabulary")
    while heap and len(ranks) < n_vocab - 1:
        c, best = heapq.heappop(heap)
        if count[best] != -c:
            continue                                    # outdated: pushed again when its count changed
        if c > -2:
            break                                       # a pair seen once is no pattern
        ranks.setdefault(best, len(ranks))
        progress(len(ranks) / n_vocab)
        changed = set()
        for i in where.pop(best):
            old, new, j = words[i], [], 0
            while j < len(old):
                step = 2 if j + 1 < len(old) and old[j] + old[j + 1] == best else 1
                new.append(best if step == 2 else old[j])
                j += step
            words[i] = new
            for word, sign in ((old, -1), (new, 1)):
                for pair in map(bytes.__add__, word, word[1:]):
                    count[pair] += sign * freqs[i]
                    changed.add(pair)
                    if sign > 0:
                        where[pair].add(i)
        for pair in changed:
            heapq.heappush(heap, (-count[pair], pair))
    return ranks


def make_tokenizer(spec, stream):
    """spec: byte, bpe:N, a name that tiktoken knows, or a prepared folder. bpe:N learns from the text stream."""
    if spec == "byte":
        return Tokenizer("byte")
    if (Path(spec) / "meta.json").exists():
        return load_tokenizer(spec)
    if spec.startswith("bpe:"):
        n = int(spec[4:]) if spec[4:].isdigit() else 0
        if n < 257:
            raise ValueError(f"tokenizer {spec}: expected bpe:N with N of at least 257 (256 bytes and {EOT}), such as bpe:4096")
        import regex                                    # comes with tiktoken; `re` knows no \p{L}
        words, size = collections.Counter(), 0
        for text, _, _ in stream:
            words.update(regex.findall(PATTERN, text))
            size += len(text.encode())
            if size >= BPE_BYTES:
                break
        ranks = train_bpe({w.encode(): c for w, c in words.most_common(BPE_WORDS)}, n)
        if len(ranks) < n - 1:
            print(f"the text is too small for {spec}: its vocabulary ends at {len(ranks) + 1}")
        return Tokenizer(spec, ranks)
    import tiktoken
    if spec not in tiktoken.list_encoding_names():
        raise ValueError(f"tokenizer {spec}: expected byte, bpe:N, gpt2, cl100k_base, o200k_base or a prepared folder")
    try:
        enc = tiktoken.get_encoding(spec)
    except OSError as e:                                # the network errors of `requests` are OSErrors
        raise ValueError(f"tokenizer {spec} must be downloaded once and that failed ({type(e).__name__}); without a "
                         "network use --tokenizer bpe:4096 or byte, or set TIKTOKEN_CACHE_DIR") from e
    # Our <|endoftext|> follows the last rank: gpt2's own 50256; in cl100k_base it moves from 100257 to 100256.
    return Tokenizer(spec, enc._mergeable_ranks, enc._pat_str)


def load_tokenizer(path):
    """path: a folder (dataset or run) with meta.json, or that file. Returns its Tokenizer. No network."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    meta = read_meta(folder)
    if meta["tokenizer"] == "byte":
        return Tokenizer("byte")
    try:
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} has no readable tokenizer.tiktoken ({e}): copy it from the dataset folder") from e
    return Tokenizer(meta["tokenizer"], ranks, meta["pattern"])


# ---------------------------------------------------------------------------------------------------------------------
# Text streams: (text, last, done)

def read_text(files):
    """Streams text files. Documents end at a line that holds only <|endoftext|>, or are the "text" of a .jsonl line."""
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    total, before = sum(os.path.getsize(f) for f in files) or 1, 0
    for file in map(Path, files):
        with open(file, "rb") as raw:                   # its position says how far we are, compressed or not
            lines = openers.get(file.suffix, lambda raw, _, encoding: io.TextIOWrapper(raw, encoding))(
                raw, "rt", encoding="utf-8-sig")
            json_lines = {".json", ".jsonl"} & set(file.suffixes)
            try:
                for text, last in read_jsonl(lines, file) if json_lines else read_documents(lines):
                    yield text, last, (before + raw.tell()) / total
            except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as e:
                raise ValueError(f"{file} cannot be read as UTF-8 text: {e}") from e
        before += os.path.getsize(file)


def read_documents(f):
    held, size, begun = [], 0, False                    # begun: a piece of this document was already given away
    for line in itertools.chain(iter(lambda: f.readline(PIECE), ""), [EOT]):
        if line.strip() == EOT:
            text = "".join(held)
            if begun or text.strip():
                yield text, True
            held, size, begun = [], 0, False
            continue
        held.append(line)
        size += len(line)
        if size > PIECE:
            # Cut before a space behind a word: there every split pattern splits too, so the cut changes no token.
            text = "".join(held)
            cut = re.match(r".*\S(?= )", text, re.S)
            cut = cut.end() if cut else len(text)
            yield text[:cut], False
            held, size, begun = [text[cut:]], len(text) - cut, True


def read_jsonl(f, file):
    for n, line in enumerate(f, 1):
        if line.strip():
            try:
                yield json.loads(line)["text"], True
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f'{file}, line {n}: expected a JSON object with the key "text"') from e


def cut_bytes(stream, start, stop):
    """The part of a stream from byte `start` to byte `stop`; a document on the border is divided."""
    at = 0
    for text, last, done in stream:
        raw = text.encode()
        if at < stop and at + len(raw) > start:
            left, right = (len(raw[:max(0, x - at)].decode("utf-8", "ignore")) for x in (start, stop))
            yield text[left:right], last or at + len(raw) >= stop, done
        at += len(raw)


def corrupt_stream(stream, rate, seed):
    """Damages each word with probability `rate`: it is dropped, swapped with the next word, or two neighbouring letters
    swap. The draws of a word do not depend on the rate, so a higher rate damages the same words and more."""
    rng = np.random.default_rng(seed)
    for text, last, done in stream:
        parts = re.split(r"(\s+)", text)                # word, space, word, ..., word
        draws = rng.random((len(parts[::2]), 3))
        for i, (_, kind, place) in zip(np.flatnonzero(draws[:, 0] < rate) * 2, draws[draws[:, 0] < rate]):
            word = parts[i]
            if kind < 1 / 3:
                parts[i] = ""
                if parts[i + 1:i + 2] == [" "]:
                    parts[i + 1] = ""
            elif kind < 2 / 3:
                parts[i:i + 3:2] = parts[i:i + 3:2][::-1]
            elif len(word) > 1:
                j = int(place * (len(word) - 1))
                parts[i] = word[:j] + word[j + 1] + word[j] + word[j + 2:]
        yield "".join(parts), last, done


# ---------------------------------------------------------------------------------------------------------------------
# Sources that are already on the disk: docs and pysrc

def python_roots():
    """{name: path}: the standard library, numpy, torch and whatever torch requires, found but not imported."""
    roots, todo = {"python": Path(sysconfig.get_path("stdlib"))}, ["numpy", "torch"]
    for name in todo:                                   # grows while we walk it
        try:
            needs = importlib.metadata.requires(name) or []
            spec = importlib.util.find_spec(name.lower().replace("-", "_"))
        except importlib.metadata.PackageNotFoundError:
            continue
        needs = [re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need]
        todo += [need for need in needs if need not in todo]
        if spec and spec.origin and spec.origin.endswith(".py"):
            origin = Path(spec.origin)
            roots[name] = origin.parent if origin.name == "__init__.py" else origin
    return roots


def python_files():
    """Yields (module such as "torch/nn/functional.py", source, done), in a fixed order, without tests."""
    files = []
    for root in python_roots().values():
        inside = [root] if root.is_file() else sorted(root.rglob("*.py"), key=Path.as_posix)
        files += [(path.relative_to(root.parent), path) for path in inside]
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = [(module.as_posix(), path) for module, path in files if not skip & set(module.parts)]
    for i, (module, path) in enumerate(files, 1):
        try:
            yield module, path.read_text(encoding="utf-8"), i / len(files)
        except (UnicodeDecodeError, OSError):
            continue


def doc_strings(body):
    """The docstrings in a list of statements, string arguments of calls such as add_docstr(f, "..."), and the values of
    dictionaries (pydoc_data.topics)."""
    for node in body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr):
            leaves = value.args if isinstance(value, ast.Call) else [value]
            leaves = itertools.chain(*(leaf.elts if isinstance(leaf, ast.Tuple) else [leaf] for leaf in leaves))
        else:
            leaves = value.values if isinstance(value, ast.Dict) else []
        yield from (leaf.value for leaf in leaves if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str))
        yield from doc_strings(getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else [])


COMMON = set("a an and any are as at be been but by can do does each for from has have how if in into is it its may more "
             "must no not of on one only or other same should so such than that the their then there these they this to "
             "use used using was we when where which will with would you your".split())


def english(text):
    """Yields the paragraphs of a docstring that are English prose, each as one line. Dropped: examples, code, tables,
    formulas, lists of names: whatever has few of the commonest words of English or few letters."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if ">>>" in paragraph:
            continue
        paragraph = re.sub(r"^\s*(\W)\1{2,}\s*$", "", paragraph, flags=re.M)                    # ---- under a heading
        paragraph = re.sub(r":[\w:]+:`~?([^`<]*)(?: <[^`]*>)?`", r"\1", paragraph)              # :func:`name`
        paragraph = " ".join(re.sub(r"`+|\*\*", "", paragraph).split())
        words = re.findall(r"[a-z']+", paragraph.lower())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if len(words) > 5 and sum(w in COMMON for w in words) > 0.25 * len(words) and letters > 0.9 * len(paragraph):
            yield paragraph


def chunks(text, sep, size):
    """Cuts at separators into pieces of at most `size` characters (longer only where no separator comes in time)."""
    part = ""
    for p in text.split(sep):
        if part and len(part) + len(p) > size:
            yield part
            part = ""
        part = part + sep + p if part else p
    yield part


def docs_documents():
    """Yields (module, text): English documentation; no paragraph comes twice."""
    progress, seen = Progress("reading docstrings"), set()
    gc.disable()                                        # a syntax tree has no cycles; the collector would double the time
    try:
        for module, source, done in python_files():
            progress(done)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    strings = list(doc_strings(ast.parse(source).body))
            except (SyntaxError, ValueError):
                continue
            for string in strings:
                fresh = [p for p in english(string) if p not in seen] if len(string) >= 200 else []
                seen.update(fresh)
                yield from ((module, chunk) for chunk in chunks("\n".join(fresh), "\n", 4000) if len(chunk) >= 200)
    finally:
        gc.enable()


def pysrc_documents():
    """Yields (module, text): Python source, cut at empty lines; without pieces that are mostly data."""
    progress = Progress("reading source")
    for module, source, done in python_files():
        progress(done)
        for chunk in chunks(source, "\n\n", 8000):
            if len(chunk) >= 200 and sum(map(str.isalpha, chunk)) > 0.4 * len(chunk):
                yield module, chunk


def split_modules(documents, fraction):
    """(train, val): lists of texts, exact duplicates removed. A module is validation as a whole, by its hash. Texts are
    ordered by their hash, so any first part is a fair sample of all modules."""
    parts, sha1 = ({}, {}), lambda s: hashlib.sha1(s.encode("utf-8", "replace")).digest()
    for module, text in documents:
        if text not in parts[0] and text not in parts[1]:
            parts[int.from_bytes(sha1(module)[:4], "big") < fraction * 2**32][text] = None
    return [sorted(part, key=sha1) for part in parts]


def drop_overlap(train, val, n=13):
    """val without the texts that share a run of n words with any training text (GPT-3's rule, arXiv:2005.14165 app. C)."""
    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return zip(*(words[i:] for i in range(n)))
    held, common = set().union(*map(runs, val)), set()
    for text in train:
        common.update(held.intersection(runs(text)))
    return [text for text in val if common.isdisjoint(runs(text))]


# ---------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, path, sha256=None):
    """Fetches url into path through path.part, so that a file under its final name is whole. Kept for the next time."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, digest, progress, size = path.with_name(path.name + ".part"), hashlib.sha256(), Progress(path.name), 0
    with open(part, "wb") as f:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                total = int(response.headers.get("Content-Length") or 0)
                while block := response.read(1 << 20):
                    f.write(block)
                    digest.update(block)
                    size += len(block)
                    progress(size / total if total else 0)
            problem = f"{size} of {total} bytes came" if total and size != total else ""
        except (OSError, http.client.HTTPException) as e:
            problem = str(e)
    if not problem and sha256 and digest.hexdigest() != sha256:
        problem = f"its sha256 is {digest.hexdigest()}, expected {sha256}"
    if problem:
        part.unlink()
        raise ValueError(f"cannot download {url} ({problem}); without internet use the default `python prepare.py`, "
                         "or your own text: `python prepare.py --text FILE --name NAME`")
    os.replace(part, path)
    return path


def downloaded_text(source, folder):
    """Files of a text in URLS: (training files, validation files)."""
    train, val = ([download(url, folder / url.split("/")[-1], SHA256.get(source))] if url else [] for url in URLS[source])
    if train[0].suffix == ".zip":
        text = train[0].with_suffix(".txt")
        if not text.exists():
            with zipfile.ZipFile(train[0]) as z:        # the last of the 100 MB are the test part of enwik8 and text8
                raw = z.read(source)[:95_000_000].decode("utf-8", "ignore").encode()
            text.with_suffix(".part").write_bytes(raw)
            os.replace(text.with_suffix(".part"), text)
        train = [text]
    return train, val


def shard_stream(source, split, folder):
    """Streams ready-made tokens (ids instead of text); a shard is fetched when the reader gets there."""
    url, n = SHARDS[source]
    for i in [0] if split == "val" else range(1, n + 1):
        link = url.format(split, i)
        ids = load_bin(download(link, folder / link.split("/")[-1]))
        for j in range(0, len(ids), 1 << 20):
            yield ids[j:j + (1 << 20)], False, 0


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading datasets

def write_bin(path, stream, tok, limit=None):
    """Encodes a stream into a file of raw ids; stops at `limit` tokens. Returns tokens, documents, bytes of text, sha256."""
    dtype = np.uint16 if tok.n_vocab <= 1 << 16 else np.uint32
    progress, digest, tokens, documents, size = Progress(f"writing {path.name}"), hashlib.sha256(), 0, 0, 0
    encode = lambda piece: tok.encode_array(piece[0]) if isinstance(piece[0], str) else piece[0]
    with open(path, "wb") as f, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        while (limit is None or tokens < limit) and (batch := list(itertools.islice(stream, 64))):
            for (_, last, done), ids in zip(batch, pool.map(encode, batch)):        # tiktoken releases the GIL
                ids = np.append(ids, tok.eot).astype(dtype) if last else ids.astype(dtype)
                ids = ids[:None if limit is None else max(0, limit - tokens)]
                f.write(ids.tobytes())
                digest.update(ids.tobytes())
                tokens, size = tokens + len(ids), size + int(tok.token_bytes[ids].sum())
                documents += int((ids == tok.eot).sum())
            progress(tokens / limit if limit else done)
    return dict(tokens=tokens, documents=documents, bytes=size, sha256=digest.hexdigest())


def prepare(source="docs", name=None, tokenizer="bpe:4096", out_dir="data", text=(), val=(), val_fraction=None,
            bpe_text=(), corrupt=0.0, seed=0, max_tokens=None):
    """Makes the dataset out_dir/name and returns that folder; returns at once when it is there with the same settings.

    source: one of DATASETS; ignored when `text`, a list of files, is given. val: files, else the last val_fraction of the
    text (0.1) or of the modules (0.05 of docs and pysrc). bpe_text: files that bpe:N learns from instead of the training
    text. corrupt: share of training words to damage; the vocabulary is learned before that. max_tokens: training cap.
    Raises ValueError, with what to type instead; OSError where out_dir cannot be written."""
    text, val, bpe_text = ([Path(f) for f in files] for files in (text, val, bpe_text))
    source = "text" if text else source
    fraction = val_fraction if val_fraction is not None else 0.05 if source in ("docs", "pysrc") else 0.1
    for file in (*text, *val, *bpe_text):
        if not file.is_file():
            raise ValueError(f"no such file: {file}")
    if not text and source not in DATASETS:
        raise ValueError(f"no dataset is called {source}; expected one of {', '.join(DATASETS)}, or --text FILE")
    if val and not text:
        raise ValueError("--val needs --text: a dataset brings its own validation text")
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction}; expected a number between 0 and 1, such as 0.1")
    if not 0 <= corrupt <= 1:
        raise ValueError(f"corrupt is {corrupt}; expected a share of the words between 0 and 1, such as 0.3")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
    if source in SHARDS:
        if corrupt or tokenizer not in ("bpe:4096", "gpt2"):
            raise ValueError(f"{source} is ready-made gpt2 tokens: it takes neither --corrupt nor another --tokenizer")
        tokenizer, max_tokens = "gpt2", max_tokens or 100_000_000
    if not name:
        name = text[0].name.split(".")[0] if text else source
        name += ("" if tokenizer == "bpe:4096" or source in SHARDS else "-" + Path(tokenizer).name.replace(":", "")) \
            + (f"-corrupt{corrupt:g}" if corrupt else "")
    if name != Path(name).name:
        raise ValueError(f"--name {name} holds a path; give a plain name, and the folder with --out_dir")

    identify = lambda files: [[f.name, f.stat().st_size] for f in files]
    settings = dict(source=source, text=identify(text), val=identify(val), val_fraction=fraction, tokenizer=tokenizer,
                    bpe_text=identify(bpe_text), corrupt=corrupt, seed=seed, max_tokens=max_tokens)
    folder, raw = Path(out_dir) / name, Path(out_dir) / "raw" / source

    def ready():
        if not folder.exists():
            return False
        old = read_meta(folder).get("settings", {})
        other = [f"{key} {old.get(key)}, not {value}" for key, value in settings.items() if old.get(key) != value]
        if other:
            raise ValueError(f"{folder} was made with {'; '.join(other)}: give another --name, or delete that folder")
        return True
    if ready():
        return folder

    dropped, versions = 0, {"prepare": 1, "python": platform.python_version()}
    versions |= {p: importlib.metadata.version(p) for p in ("numpy", "torch")}
    if source in ("docs", "pysrc"):
        parts = split_modules(docs_documents() if source == "docs" else pysrc_documents(), fraction)
        if source == "docs":
            kept = drop_overlap(*parts)
            dropped, parts[1] = len(parts[1]) - len(kept), kept
            print(f"{len(kept)} validation documents; {dropped} more shared a 13-word run with the training part, dropped")
        versions |= {p: importlib.metadata.version(p) for p in python_roots() if p != "python"}
        open_train, open_val = (lambda part=part: ((t, True, i / len(part)) for i, t in enumerate(part)) for part in parts)
    elif source in SHARDS:
        open_train, open_val = (lambda split=split: shard_stream(source, split, raw) for split in ("train", "val"))
    else:
        if source in URLS:
            text, val = downloaded_text(source, raw)
            fraction = 1 / 19 if source in ("enwik8", "text8") and val_fraction is None else fraction   # 90 + 5 MB
        if val:
            open_train, open_val = lambda: read_text(text), lambda: read_text(val)
        else:
            cut = int((1 - fraction) * sum(len(t.encode()) for t, _, _ in read_text(text)))
            open_train, open_val = lambda: cut_bytes(read_text(text), 0, cut), lambda: cut_bytes(read_text(text), cut, 1 << 62)
    tok = make_tokenizer(tokenizer, read_text(bpe_text) if bpe_text else open_train())

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out_dir))      # renamed when complete: never half a dataset
    try:
        train = corrupt_stream(open_train(), corrupt, seed) if corrupt else open_train()
        counts = {"train": write_bin(temp / "train.bin", train, tok, max_tokens),
                  # modded-nanogpt evaluates on the first 10,485,760 tokens of the validation shard
                  "val": write_bin(temp / "val.bin", open_val(), tok, 10_485_760 if source in SHARDS else None)}
        for split, c in counts.items():
            if not c["tokens"]:
                raise ValueError(f"the {split} part of {name} is empty; give more text, --val FILE or another --val_fraction")
        meta = dict(name=name, source=source, tokenizer=tok.name, pattern=tok.pattern if tok.ranks else None,
                    vocab_size=tok.n_vocab, dtype="uint16" if tok.n_vocab <= 1 << 16 else "uint32",
                    **{f"{split}_{key}": value for split, c in counts.items() for key, value in c.items()},
                    dropped_overlap=dropped, corrupt=corrupt, seed=seed, versions=versions, settings=settings)
        if tok.ranks:       # tiktoken's own file format, so a dataset or a run needs no network later
            (temp / "tokenizer.tiktoken").write_bytes(b"".join(
                b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tok.vocab)))
        (temp / "meta.json").write_text(json.dumps(meta, indent=1))
        temp.chmod(0o755)
        try:
            temp.rename(folder)
        except OSError:
            if not ready():                             # another process may have made the same dataset meanwhile
                raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def read_meta(folder):
    path = Path(folder) / "meta.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path} is missing or damaged ({e}); a dataset folder comes from `python prepare.py`") from e


def load_bin(path):
    """Token ids of a .bin file, as a read-only memmap: raw ids (uint16, or what meta.json beside it says), or llm.c's and
    modded-nanogpt's form with a header of 1,024 bytes. Raises ValueError for a file that was cut off."""
    path = Path(path)
    try:
        meta = read_meta(path.parent) if (path.parent / "meta.json").exists() else {}
        dtype, expected, offset = np.dtype(meta.get("dtype", "uint16")), meta.get(f"{path.stem}_tokens"), 0
        with open(path, "rb") as f:
            header = np.frombuffer(f.read(1024), np.int32) if path.stat().st_size >= 1024 else [0]
    except OSError as e:
        raise ValueError(f"cannot read {path}: {e}") from e
    if header[0] in HEADER_DTYPE and "dtype" not in meta:
        dtype, expected, offset = np.dtype(HEADER_DTYPE[header[0]]), int(header[2]), 1024
    n, rest = divmod(path.stat().st_size - offset, dtype.itemsize)
    if rest or n == 0 or expected not in (None, n):
        raise ValueError(f"{path} is damaged: {n} tokens and {rest} bytes, expected {expected or 'whole'} tokens of "
                         f"{dtype.itemsize} bytes; make it again with prepare.py")
    return np.memmap(path, dtype, "r", offset)


def load_dataset(folder):
    """(train, val, meta) of a dataset folder: two memmaps of ids and the contents of meta.json."""
    folder = Path(folder)
    if not folder.is_dir():
        there = sorted(p.parent.name for p in folder.parent.glob("*/meta.json"))
        how = f"--dataset {folder.name}" if folder.name in DATASETS else f"--text FILE --name {folder.name}"
        raise ValueError(f"no dataset at {folder}: type `python prepare.py {how}`" + (f", or use one of {', '.join(there)}" if there else ""))
    meta = read_meta(folder)
    train, val = load_bin(folder / "train.bin"), load_bin(folder / "val.bin")
    for split, ids in (("train", train), ("val", val)):
        top = max(int(ids[i:i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
        if top >= meta["vocab_size"]:
            raise ValueError(f"{folder}/{split}.bin holds token id {top}, but meta.json says vocab_size {meta['vocab_size']}: "
                             "file and tokenizer do not belong together; make the dataset again with prepare.py")
    return train, val, meta


def main(argv=None):
    p = Parser(prog="prepare.py", description="Text to tokens: makes data/NAME/{train.bin, val.bin, meta.json}.")
    p.add_argument("--dataset", default="docs", choices=DATASETS, help="built-in source; docs and pysrc need no network")
    p.add_argument("--text", nargs="+", default=[], metavar="FILE", help="your own text instead: .txt .jsonl, also .gz .bz2 .xz")
    p.add_argument("--val", nargs="+", default=[], metavar="FILE", help="validation text for --text; else the end of it is used")
    p.add_argument("--val_fraction", type=float, help="share held out where no validation text is given (0.1; docs, pysrc 0.05)")
    p.add_argument("--name", help="folder under --out_dir; by default from the source and the tokenizer")
    p.add_argument("--tokenizer", default="bpe:4096", help="byte, bpe:N, gpt2, cl100k_base, o200k_base or a prepared folder")
    p.add_argument("--bpe_text", nargs="+", default=[], metavar="FILE", help="learn bpe:N from these files, not the training text")
    p.add_argument("--corrupt", type=float, default=0.0, metavar="RATE", help="share of training words to damage, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="seed of --corrupt")
    p.add_argument("--max_tokens", type=int, help="stop the training part here (default: all; 100M for token shards)")
    p.add_argument("--out_dir", default="data", help="where datasets live")
    args = vars(p.parse_args(argv))
    start = time.time()
    try:
        folder = prepare(args.pop("dataset"), **args)
    except (ValueError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    meta = read_meta(folder)
    for split in ("train", "val"):
        tokens, documents, size = (meta[f"{split}_{key}"] for key in ("tokens", "documents", "bytes"))
        print(f"{folder}/{split}.bin: {tokens:,} tokens, {documents:,} documents, {size / 1e6:.2f} MB of text, "
              f"{size / tokens:.2f} bytes per token")
    print(f"vocabulary {meta['vocab_size']} ({meta['tokenizer']}), {time.time() - start:.1f} s; now: python train.py --dataset {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
