"""
Text to tokens. Makes data/NAME/{train.bin, val.bin, meta.json, tokenizer.tiktoken}, which train.py reads.

python prepare.py                                        # `docs`: English that is on every disk with torch; no network
python prepare.py --tokenizer byte                       # the same as bytes: what a laptop trains on
python prepare.py --text a.txt b.jsonl.gz --name mine    # your own text: .txt .jsonl, also .gz .bz2 .xz
python prepare.py --dataset shakespeare --tokenizer gpt2                                        # downloads

Inside, text is a stream of pieces (text, last, done): a document comes in one or more pieces, `last` marks its final one,
`done` in [0, 1] is the part of the source read so far. So no file has to fit in memory.
On disk, token ids are raw uint16 (uint32 for vocabularies above 65,536) and each document ends in <|endoftext|>, as in
nanoGPT. In every tokenizer the id of <|endoftext|> is the last one, n_vocab - 1.
"""
import argparse, ast, difflib, gc, importlib.metadata, importlib.util, inspect, itertools, json, re, sys, sysconfig, time, warnings
import base64, bz2, collections, concurrent.futures, gzip, hashlib, heapq, io, lzma, os, shutil, tempfile, urllib.request, zipfile
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
PIECE = 1 << 18                 # characters; about the longest piece of a stream
BPE_BYTES = 64 << 20            # bpe:N learns from the first 64 MB of the training text
BPE_WORDS = 1 << 18             # ... and from the most frequent words in it: the rare ones cost memory and change nothing
# GPT-2's split pattern as tiktoken writes it: possessive quantifiers, the same matches, faster.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
HF, MAHONEY = "https://huggingface.co/datasets/", "http://mattmahoney.net/dc/"
URLS = {    # training text and validation text; where there is none, the end of the training text
    "shakespeare": ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"],
    "tinystories": [HF + f"roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{s}.txt" for s in ("train", "valid")],
    "enwik8": [MAHONEY + "enwik8.zip"],
    "text8": [MAHONEY + "text8.zip"],
    "owt-sample": [HF + f"stanford-cs336/owt-sample/resolve/main/owt_{s}.txt.gz" for s in ("train", "valid")],
    "c4": [HF + f"allenai/c4/resolve/main/en/c4-{s}.json.gz" for s in ("train.00000-of-01024", "validation.00000-of-00008")],
}
SHARDS = {  # ready-made gpt2 tokens, 100M a shard, and how many shards there are
    "fineweb10B": (HF + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin", 103),
    "finewebedu10B": (HF + "kjj0/finewebedu10B-gpt2/resolve/main/finewebedu_{}_{:06d}.bin", 99),
}
SHA256 = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
          "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"}
DATASETS = ["docs", "pysrc", *URLS, *SHARDS]
HEADERS = {20240520: "uint16", 20240801: "uint32"}     # llm.c, modded-nanogpt: 256 int32; [0] this number, [2] tokens


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults, takes no abbreviations, and answers an unknown flag with the nearest known one."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **{"formatter_class": argparse.ArgumentDefaultsHelpFormatter} | kwargs)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1, 0.5)
            self.error(f"unknown argument {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


class Progress:
    """A line on stderr with the time left, at most once a second: call it with done in [0, 1], at the end with 1."""
    def __init__(self, label):
        self.label, self.start, self.shown = label, time.time(), time.time()

    def __call__(self, done):
        now = time.time()
        if now - self.start > 1 and (done >= 1 or done > 0.01 and now - self.shown > 1):
            left = f"{(now - self.start) * (1 / done - 1):.0f} s left" if done < 1 else f"{now - self.start:.0f} s    \n"
            print(f"\r{self.label}: {done:4.0%}, {left} ", end="", file=sys.stderr, flush=True)
            self.shown = now


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """name; n_vocab; eot = n_vocab - 1, the id of <|endoftext|>; token_bytes (n_vocab,): bytes of text in each token, 0 for
    <|endoftext|>. ranks: {token bytes: id}, None for plain bytes. tiktoken is imported only to encode with ranks."""
    def __init__(self, name, ranks=None, pattern=None):
        self.name, self.ranks, self.pattern, self.bpe = name, ranks, pattern, None
        self.vocab = sorted(ranks, key=ranks.get) if ranks else [bytes([b]) for b in range(256)]
        self.eot = len(self.vocab)
        self.n_vocab = self.eot + 1
        self.dtype = "uint16" if self.n_vocab <= 1 << 16 else "uint32"
        # From the raw bytes: through str, a token that is half a UTF-8 character would count as the 3 bytes of U+FFFD.
        self.token_bytes = np.array([len(token) for token in self.vocab] + [0])

    def encode_array(self, text):
        """str -> 1-D array of ids. <|endoftext|> inside a text is ordinary text."""
        if not self.ranks:
            return np.frombuffer(text.encode(), np.uint8)
        if self.bpe is None:
            import tiktoken
            self.bpe = tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens={EOT: self.eot})
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def encode(self, text):
        return self.encode_array(text).tolist()

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.vocab[i] if i < self.eot else EOT.encode() for i in ids).decode("utf-8", "replace")


def train_bpe(words, n_vocab):
    """Byte-level BPE. words: {bytes: count}. Returns {token bytes: id}, n_vocab - 1 of them or fewer if the text runs out.

    Merge the most frequent pair of neighbours, again and again (Sennrich et al. 2016, arXiv:1508.07909), ties to the
    smaller bytes. A pair is named by its joined bytes, because tiktoken too merges any two neighbours that join to a known
    token. `where` tells which words hold a pair, so that a merge recounts only those."""
    ranks = {bytes([b]): b for b in range(256)}
    words, freqs = [[bytes([b]) for b in word] for word in words], list(words.values())
    count, where = collections.Counter(), collections.defaultdict(set)
    def add(i, sign):
        pairs = [a + b for a, b in zip(words[i], words[i][1:])]
        for pair in pairs:
            count[pair] += sign * freqs[i]
            where[pair].add(i)
        return pairs
    for i in range(len(words)):
        add(i, 1)
    heap, progress = [(-c, pair) for pair, c in count.items()], Progress("learning the vocabulary")
    heapq.heapify(heap)
    while heap and len(ranks) < n_vocab - 1:
        c, best = heapq.heappop(heap)
        if count[best] != -c or c > -2:             # outdated (it was pushed again when its count changed), or seen once
            continue
        ranks.setdefault(best, len(ranks))
        changed = set()
        for i in where.pop(best):
            changed.update(add(i, -1))
            word, j = words[i], 0
            while j < len(word) - 1:
                if word[j] + word[j + 1] == best:
                    word[j:j + 2] = [best]
                j += 1
            changed.update(add(i, 1))
        for pair in changed:
            heapq.heappush(heap, (-count[pair], pair))
        progress(len(ranks) / n_vocab)
    progress(1)
    return ranks


def learn_bpe(stream, n_vocab):
    import regex                                    # comes with tiktoken; `re` knows no \p{L}
    words, size = collections.Counter(), 0
    for text, _, _ in stream:
        words.update(regex.findall(PATTERN, text))
        size += len(text.encode())
        if size >= BPE_BYTES:
            break
    ranks = train_bpe({word.encode(): c for word, c in words.most_common(BPE_WORDS)}, n_vocab)
    if len(ranks) < n_vocab - 1:
        print(f"bpe:{n_vocab}: this little text gives a vocabulary of {len(ranks) + 1}", file=sys.stderr)
    return Tokenizer(f"bpe:{n_vocab}", ranks, PATTERN)


def make_tokenizer(spec, open_text):
    """spec: byte, bpe:N (learnt from the stream open_text()), gpt2 or another name tiktoken knows, or a prepared folder."""
    if spec == "byte":
        return Tokenizer("byte")
    if re.fullmatch(r"bpe:\d+", spec) and int(spec[4:]) > 256:
        return learn_bpe(open_text(), int(spec[4:]))
    if (Path(spec) / "meta.json").exists():
        return load_tokenizer(spec)
    import tiktoken
    if spec not in tiktoken.list_encoding_names():
        raise ValueError(f"tokenizer {spec}: expected byte, bpe:N (N > 256), gpt2, cl100k_base, o200k_base or a prepared folder")
    try:
        enc = tiktoken.get_encoding(spec)
    except OSError as e:                            # the network errors of `requests` are OSErrors
        raise ValueError(f"tokenizer {spec} must be downloaded once, and that failed ({type(e).__name__}); without a network "
                         "use --tokenizer bpe:4096 or byte, or set TIKTOKEN_CACHE_DIR to a folder that has it") from e
    # <|endoftext|> follows the last rank: 50256, as in gpt2 itself; for cl100k_base that is 100256 instead of 100257.
    return Tokenizer(spec, enc._mergeable_ranks, enc._pat_str)


def load_tokenizer(path):
    """The Tokenizer of a dataset or run folder, or of the meta.json in it. No network."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    meta = read_meta(folder)
    if meta["tokenizer"] == "byte":
        return Tokenizer("byte")
    try:
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        return Tokenizer(meta["tokenizer"], {base64.b64decode(token): int(i) for token, i in map(bytes.split, lines)}, meta["pattern"])
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder}/tokenizer.tiktoken is missing or damaged ({e}): copy it from the dataset folder") from e


# ----------------------------------------------------------------------------------------------------------------------
# Streams of text: (text, last, done)

def read_text(files):
    """Streams text files. A document ends at a line that holds only <|endoftext|>, or is the "text" of a line of .jsonl."""
    total, before = sum(os.path.getsize(file) for file in files) or 1, 0
    for file in files:
        with open(file, "rb") as raw:               # its position says how far we are, compressed or not
            unpack = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix)
            lines = io.TextIOWrapper(unpack(raw) if unpack else raw, "utf-8-sig")
            try:
                for text, last in (json_documents if {".json", ".jsonl"} & set(file.suffixes) else marked_documents)(lines):
                    yield text, last, (before + raw.tell()) / total
            except (OSError, EOFError, lzma.LZMAError, ValueError, KeyError, TypeError) as e:
                raise ValueError(f"cannot read {file} ({type(e).__name__}: {e}); expected UTF-8 text, or for .jsonl "
                                 'in each line a JSON object with the key "text"') from e
        before += os.path.getsize(file)


def json_documents(lines):
    yield from ((json.loads(line)["text"], True) for line in lines if line.strip())


def marked_documents(lines):
    held, size, begun = [], 0, False                # begun: a piece of this document has already gone out
    for line in itertools.chain(iter(lambda: lines.readline(PIECE), ""), [EOT]):
        if line.strip() == EOT:
            if begun or any(map(str.strip, held)):
                yield "".join(held), True
            held, size, begun = [], 0, False
            continue
        held.append(line)
        size += len(line)
        if size > PIECE:
            # Cut between a word and a space: every split pattern does so too, so the cut changes no token.
            text = "".join(held)
            cut = re.match(r".*\S(?= )|.*", text, re.S).end()
            yield text[:cut], False
            held, size, begun = [text[cut:]], len(text) - cut, True


def cut_bytes(stream, start, stop):
    """The part of a stream from byte `start` to byte `stop`; a document on the border is divided."""
    at = 0
    for text, last, done in stream:
        raw = text.encode()
        if at < stop and at + len(raw) > start:
            left, right = (len(raw[:max(0, border - at)].decode("utf-8", "ignore")) for border in (start, stop))
            yield text[left:right], last or at + len(raw) >= stop, done
        at += len(raw)


def corrupt_stream(stream, rate, seed):
    """Damages each word with probability `rate`: it is dropped, swapped with the next word, or two of its neighbouring
    letters swap. The draws do not depend on the rate: a higher rate damages the same words and others."""
    rng = np.random.default_rng(seed)
    for text, last, done in stream:
        parts = re.split(r"(\s+)", text)            # word, space, word, ..., word
        for i, (hit, kind, place) in zip(range(0, len(parts), 2), rng.random((len(parts), 3)).tolist()):
            word = parts[i]
            if hit >= rate:
                continue
            if kind < 1 / 3:
                parts[i:i + 2] = "", *("" if space == " " else space for space in parts[i + 1:i + 2])
            elif kind < 2 / 3:
                parts[i:i + 3:2] = parts[i:i + 3:2][::-1]
            elif len(word) > 1:
                j = int(place * (len(word) - 1))
                parts[i] = word[:j] + word[j + 1] + word[j] + word[j + 2:]
        yield "".join(parts), last, done


# ----------------------------------------------------------------------------------------------------------------------
# Text that is already on the disk: docs and pysrc

def python_roots():
    """{name: path} of the standard library, numpy, torch and whatever torch requires, found but not imported."""
    roots, todo = {"python": Path(sysconfig.get_path("stdlib"))}, ["numpy", "torch"]
    for name in todo:                               # grows while we walk it
        spec = importlib.util.find_spec(name.lower().replace("-", "_"))
        if spec and spec.origin and spec.origin.endswith(".py"):
            roots[name] = Path(spec.origin).parent if spec.origin.endswith("__init__.py") else Path(spec.origin)
            needs = [re.match(r"[\w.-]+", need)[0] for need in importlib.metadata.requires(name) or [] if "extra ==" not in need]
            todo += [need for need in needs if need not in todo]
    return roots


def python_files(label):
    """Yields (module such as "torch/nn/functional.py", source text) in a fixed order, tests left out."""
    files = [(path.relative_to(root.parent), path) for root in python_roots().values()
             for path in ([root] if root.is_file() else sorted(root.rglob("*.py"), key=Path.as_posix))]
    skip, progress = {"site-packages", "dist-packages", "test", "tests", "idle_test"}, Progress(label)
    files = [(module.as_posix(), path) for module, path in files if not skip & set(module.parts)]
    for i, (module, path) in enumerate(files, 1):
        progress(i / len(files))
        try:
            yield module, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def string_values(tree):
    """The strings in a syntax tree that can be documentation: docstrings and other lone or assigned strings, arguments of
    calls such as add_docstr(f, "..."), values of dictionaries (pydoc_data.topics)."""
    nodes = [tree]
    for node in nodes:                              # grows while we walk it
        nodes += getattr(node, "body", [])
        value = getattr(node, "value", None)
        leaves = value.args if isinstance(value, ast.Call) else value.values if isinstance(value, ast.Dict) else [value]
        for leaf in itertools.chain(*(leaf.elts if isinstance(leaf, ast.Tuple) else [leaf] for leaf in leaves)):
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                yield leaf.value


COMMON = set("a an and any are as at be been but by can do does each for from has have how if in into is it its may more must no "
             "not of on one only or other same should so such than that the their then there these they this to use used using "
             "was we when where which will with would you your".split())
MARKUP = [(r"^\s*(\W)\1{2,}\s*$", ""),              # the ---- under a heading
          (r":[\w:]+:`~?([^`<]*)(?: <[^`]*>)?`", r"\1"), (r"^\.\. [\w-]+::|`|\*\*", ""), (r"::\s*$", ":")]


def english(text):
    """Yields the paragraphs of a docstring that are English prose, each as one line. Examples, code, tables, formulas and
    lists of names go: they have too few of the commonest English words, or too few letters."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        for old, new in MARKUP:
            paragraph = re.sub(old, new, paragraph, flags=re.M)
        paragraph, words = " ".join(paragraph.split()), re.findall(r"[a-z']+", paragraph.lower())
        letters = len(re.findall(r"[A-Za-z ]", paragraph))
        if len(words) > 5 and sum(w in COMMON for w in words) > len(words) / 4 and letters > 0.9 * len(paragraph) \
                and ">>>" not in paragraph:
            yield paragraph


def chunks(text, sep, size):
    """Cuts at separators into pieces of at most `size` characters (more where no separator comes in time)."""
    part = ""
    for p in text.split(sep):
        if part and len(part) + len(p) > size:
            yield part
            part = ""
        part += sep + p if part else p
    yield part


def docs_documents():
    """Yields (module, text): English documentation, at least 200 characters each; no paragraph comes twice."""
    seen = set()
    gc.disable()                                    # a syntax tree has no cycles; the collector would double the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module, source in python_files("reading docstrings"):
            try:
                strings = [s for s in string_values(ast.parse(source)) if len(s) >= 200]
            except (SyntaxError, ValueError):
                continue
            for string in strings:
                fresh = [p for p in english(string) if p not in seen]
                seen.update(fresh)
                yield from ((module, text) for text in chunks("\n".join(fresh), "\n", 4000) if len(text) >= 200)
    gc.enable()


def pysrc_documents():
    """Yields (module, text): Python source, cut at empty lines, without the pieces that are mostly data."""
    for module, source in python_files("reading source"):
        for text in chunks(source, "\n\n", 8000):
            if len(text) >= 200 and len(re.findall("[A-Za-z]", text)) > 0.4 * len(text):
                yield module, text


def split_modules(documents, fraction):
    """[train, val]: lists of texts without exact duplicates. A module is validation as a whole, by its hash. The order is
    that of the texts' hashes, so any first part is a fair sample of all modules."""
    parts, sha1 = ({}, {}), lambda s: hashlib.sha1(s.encode("utf-8", "replace")).digest()
    for module, text in documents:
        if text not in parts[0] and text not in parts[1]:
            parts[int.from_bytes(sha1(module)[:4], "big") < fraction * 2**32][text] = None
    return [sorted(part, key=sha1) for part in parts]


def drop_overlap(train, val, n=13):
    """val without the texts that share a run of n words with a training text (as GPT-3 did, arXiv:2005.14165, app. C)."""
    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return zip(*(words[i:] for i in range(n)))
    held, common = set().union(*map(runs, val)), set()
    for text in train:
        common.update(held.intersection(runs(text)))
    return [text for text in val if common.isdisjoint(runs(text))]


# ----------------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, folder, sha256=None):
    """Fetches url into folder, through a .part file: what has its final name is whole, and is not fetched again."""
    path, digest, size = folder / url.split("/")[-1], hashlib.sha256(), 0
    part, progress = path.with_name(path.name + ".part"), Progress(path.name)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as f:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(1 << 20):
                f.write(block)
                digest.update(block)
                size += len(block)
                progress(size / max(total, size + 1))
        progress(1)
        problem = f"{size} of {total} bytes came" if total and size != total else \
            f"its sha256 is {digest.hexdigest()}, not {sha256}" if sha256 and digest.hexdigest() != sha256 else None
    except OSError as e:
        problem = e
    if problem:
        part.unlink(missing_ok=True)
        raise ValueError(f"cannot download {url} ({problem}); without internet use `python prepare.py`, whose text is on this "
                         "machine already, or your own: `python prepare.py --text FILE --name NAME`")
    os.replace(part, path)
    return path


def unzip(path, member):
    """enwik8 and text8: the first 95 of the 100 MB; the last 5 are their test part by convention."""
    text = path.with_suffix(".txt")
    if not text.exists():
        with zipfile.ZipFile(path) as z:
            path.with_suffix(".part").write_bytes(z.read(member)[:95_000_000].decode("utf-8", "ignore").encode())
        os.replace(path.with_suffix(".part"), text)
    return text


def shard_stream(source, split, folder):
    """Streams ready-made tokens (ids in place of text); shard 0 is validation; a shard is fetched when it is reached."""
    url, n = SHARDS[source]
    for i in [0] if split == "val" else range(1, n + 1):
        ids = load_bin(download(url.format(split, i), folder))
        yield from ((ids[j:j + PIECE], False, 0) for j in range(0, len(ids), PIECE))


# ----------------------------------------------------------------------------------------------------------------------
# Writing and reading datasets

def write_bin(path, stream, tok, limit=None):
    """Encodes a stream into a file of raw ids, at most `limit` of them. Returns tokens, documents, bytes of text, sha256."""
    digest, tokens, documents, size, progress = hashlib.sha256(), 0, 0, 0, Progress(f"writing {path.name}")
    encode = lambda piece: tok.encode_array(piece[0]) if isinstance(piece[0], str) else piece[0]
    with open(path, "wb") as f, concurrent.futures.ThreadPoolExecutor() as pool:
        while (limit is None or tokens < limit) and (batch := list(itertools.islice(stream, 64))):
            for (_, last, done), ids in zip(batch, pool.map(encode, batch)):        # tiktoken releases the GIL
                ids = (np.append(ids, tok.eot) if last else ids).astype(tok.dtype)[:None if limit is None else limit - tokens]
                f.write(ids.tobytes())
                digest.update(ids.tobytes())
                tokens, documents = tokens + len(ids), documents + int((ids == tok.eot).sum())
                size += int(tok.token_bytes[ids].sum())
                if tokens == limit:
                    break
            progress(min(tokens / limit if limit else done, 0.99))
    progress(1)
    return dict(tokens=tokens, documents=documents, bytes=size, sha256=digest.hexdigest())


def prepare(source="docs", name=None, tokenizer="bpe:4096", out_dir="data", text=(), val=(), val_fraction=0.1, bpe_text=(),
            corrupt=0.0, seed=0, max_tokens=None):
    """Makes the dataset out_dir/name and returns that folder; at once when it is there already with the same settings.

    source: one of DATASETS, unless `text`, a list of files, is given. val: files; without them val_fraction of the modules
    (docs, pysrc) or of the end of the text. bpe_text: files for bpe:N to learn from, not the training text. corrupt: the
    share of training words to damage (the vocabulary is learnt from clean text). max_tokens: where the training part stops.
    Raises ValueError saying what to type; OSError where out_dir cannot be written."""
    text, val, bpe_text = ([Path(file) for file in files] for files in (text, val, bpe_text))
    source, shards = "text" if text else source, not text and source in SHARDS
    tokenizer, max_tokens = ("gpt2", max_tokens or 10**8) if shards and tokenizer == "bpe:4096" else (tokenizer, max_tokens)
    if not name:
        name = (text[0].name.split(".")[0] if text else source) + (f"-corrupt{corrupt:g}" if corrupt else "") \
            + ("" if tokenizer == "bpe:4096" or shards else "-" + Path(tokenizer).name.replace(":", ""))
    for wrong, message in [
            (not text and source not in DATASETS, f"no dataset is called {source}; expected {', '.join(DATASETS)}, or --text FILE"),
            (val and not text, "--val needs --text: a dataset brings its own validation text"),
            (not 0 < val_fraction < 1, f"--val_fraction {val_fraction}: expected a number between 0 and 1, such as 0.1"),
            (not 0 <= corrupt <= 1, f"--corrupt {corrupt}: expected a share of the words from 0 to 1, such as 0.3"),
            (max_tokens is not None and max_tokens < 1, f"--max_tokens {max_tokens}: expected at least 1"),
            (shards and (corrupt or tokenizer != "gpt2"), f"{source} is gpt2 tokens: no --corrupt, no other --tokenizer"),
            (name != Path(name).name, f"--name {name}: expected a plain name; the folder is --out_dir"),
            *((not file.is_file(), f"no such file: {file}") for file in text + val + bpe_text)]:
        if wrong:
            raise ValueError(message)
    identify = lambda files: [[file.name, file.stat().st_size] for file in files]
    settings = dict(source=source, text=identify(text), val=identify(val), val_fraction=val_fraction, tokenizer=tokenizer,
                    bpe_text=identify(bpe_text), corrupt=corrupt, seed=seed, max_tokens=max_tokens)
    folder, raw = Path(out_dir) / name, Path(out_dir) / "raw" / source
    def ready():
        old = read_meta(folder).get("settings", {}) if folder.exists() else settings
        other = [f"{key} {old.get(key)}, not {value}" for key, value in settings.items() if old.get(key) != value]
        if other:
            raise ValueError(f"{folder} exists, made with {'; '.join(other)}: give another --name, or delete that folder")
        return folder.exists()
    if ready():
        return folder

    tok = None if tokenizer.startswith("bpe:") else make_tokenizer(tokenizer, None)         # a wrong name fails at once
    dropped, packages = 0, ["numpy", "torch"]
    if source in ("docs", "pysrc"):
        packages = list(python_roots())[1:]
        parts = split_modules(docs_documents() if source == "docs" else pysrc_documents(), val_fraction)
        if source == "docs":        # not for pysrc: code repeats its licence headers and boilerplate everywhere
            dropped, parts[1] = len(parts[1]), drop_overlap(*parts)
            dropped -= len(parts[1])
            print(f"{len(parts[1])} validation documents; {dropped} more share a 13-word run with the training part: dropped")
        opens = [lambda part=part: ((t, True, i / len(part)) for i, t in enumerate(part)) for part in parts]
    elif shards:
        opens = [lambda: shard_stream(source, "train", raw), lambda: shard_stream(source, "val", raw)]
    else:
        if source in URLS:
            text, *val = [[download(url, raw, SHA256.get(source))] for url in URLS[source]]
            text, val = [unzip(text[0], source)] if text[0].suffix == ".zip" else text, sum(val, [])
        opens = [lambda: read_text(text), lambda: read_text(val)]
        if not val:
            cut = int((1 - val_fraction) * sum(len(t.encode()) for t, _, _ in read_text(text)))
            cut = 90_000_000 if source in ("enwik8", "text8") else cut
            opens = [lambda: cut_bytes(read_text(text), 0, cut), lambda: cut_bytes(read_text(text), cut, 1 << 62)]
    tok = tok or make_tokenizer(tokenizer, (lambda: read_text(bpe_text)) if bpe_text else opens[0])

    Path(out_dir).mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out_dir))      # renamed when complete: never half a dataset
    try:
        meta = dict(name=name, source=source, tokenizer=tok.name, pattern=tok.pattern, vocab_size=tok.n_vocab, dtype=tok.dtype)
        for split, stream, limit in [
                ("train", corrupt_stream(opens[0](), corrupt, seed) if corrupt else opens[0](), max_tokens),
                ("val", opens[1](), 10_485_760 if shards else None)]:   # modded-nanogpt's validation tokens
            counts = write_bin(temp / f"{split}.bin", stream, tok, limit)
            if not counts["tokens"]:
                raise ValueError(f"the {split} part of {name} is empty: give more text, --val FILE or another --val_fraction")
            meta |= {f"{split}_{key}": value for key, value in counts.items()}
        versions = {"prepare": 1, "python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages}
        meta |= dict(dropped_overlap=dropped, corrupt=corrupt, seed=seed, versions=versions, settings=settings)
        if tok.ranks:               # tiktoken's own file format: a dataset or a run needs no network later
            (temp / "tokenizer.tiktoken").write_bytes(b"".join(
                b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tok.vocab)))
        (temp / "meta.json").write_text(json.dumps(meta, indent=1))
        temp.chmod(0o755)
        if not ready():             # another process may have made the same dataset meanwhile
            temp.rename(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def read_meta(folder):
    try:
        return json.loads((Path(folder) / "meta.json").read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{folder} has no readable meta.json ({e}); a dataset folder comes from `python prepare.py`") from e


def load_bin(path):
    """The ids in a .bin file as a read-only memmap: raw (uint16, or what the meta.json beside it says) or with the header of
    llm.c and modded-nanogpt. ValueError for a file that was cut off."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; make the dataset with `python prepare.py`")
    meta = read_meta(path.parent) if (path.parent / "meta.json").exists() else {}
    dtype, expected, offset = meta.get("dtype", "uint16"), meta.get(f"{path.stem}_tokens"), 0
    header = np.fromfile(path, np.int32, 256)
    if len(header) == 256 and header[0] in HEADERS and "dtype" not in meta:
        dtype, expected, offset = HEADERS[header[0]], int(header[2]), 1024
    n, rest = divmod(path.stat().st_size - offset, np.dtype(dtype).itemsize)
    if rest or n == 0 or expected not in (None, n):
        raise ValueError(f"{path} is damaged: {n} {dtype} tokens and {rest} bytes, expected {expected or 'whole'} tokens; "
                         "delete its folder and run prepare.py again")
    return np.memmap(path, dtype, "r", offset)


def load_dataset(folder):
    """(train, val, meta) of a dataset folder: two memmaps of ids, and the contents of meta.json."""
    folder = Path(folder)
    if not folder.is_dir():
        there = ", ".join(sorted(p.parent.name for p in folder.parent.glob("*/meta.json")))
        how = f"--dataset {folder.name}" if folder.name in DATASETS else f"--text FILE --name {folder.name}"
        raise ValueError(f"no dataset at {folder}: type `python prepare.py {how}`" + (f" or use one of: {there}" if there else ""))
    meta = read_meta(folder)
    train, val = load_bin(folder / "train.bin"), load_bin(folder / "val.bin")
    for split, ids in (("train", train), ("val", val)):
        top = max(int(ids[i:i + (1 << 24)].max()) for i in range(0, len(ids), 1 << 24))
        if top >= meta["vocab_size"]:
            raise ValueError(f"{folder}/{split}.bin holds token id {top}, but meta.json says vocab_size {meta['vocab_size']}: "
                             "they do not belong together; delete that folder and run prepare.py again")
    return train, val, meta


def main(argv=None):
    p = Parser(prog="prepare.py", description="Text to tokens: makes data/NAME/{train.bin, val.bin, meta.json}.")
    p.add_argument("--dataset", default="docs", choices=DATASETS, help="built-in source; docs and pysrc need no network")
    p.add_argument("--text", nargs="+", default=[], metavar="FILE", help="your own text: .txt .jsonl, also .gz .bz2 .xz")
    p.add_argument("--val", nargs="+", default=[], metavar="FILE", help="validation text for --text; else its end is held out")
    p.add_argument("--val_fraction", type=float, default=0.1, help="how much is held out where no validation text is given")
    p.add_argument("--name", help="folder under --out_dir; else named after the source and the tokenizer")
    p.add_argument("--tokenizer", default="bpe:4096", help="byte, bpe:N, gpt2, cl100k_base, o200k_base or a prepared folder")
    p.add_argument("--bpe_text", nargs="+", default=[], metavar="FILE", help="learn bpe:N from these, not the training text")
    p.add_argument("--corrupt", type=float, default=0.0, metavar="RATE", help="share of training words to damage, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="seed of --corrupt")
    p.add_argument("--max_tokens", type=int, help="stop the training part here; token shards: 100M unless given")
    p.add_argument("--out_dir", default="data", help="where datasets live")
    args, start = vars(p.parse_args(argv)), time.time()
    try:
        folder = prepare(args.pop("dataset"), **args)
        meta = read_meta(folder)
    except (ValueError, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    for split in ("train", "val"):
        tokens, documents, size = (meta[f"{split}_{key}"] for key in ("tokens", "documents", "bytes"))
        print(f"{folder}/{split}.bin: {tokens:,} tokens, {documents:,} documents, {size / 1e6:.2f} MB of text")
    print(f"{meta['vocab_size']} tokens in the vocabulary ({meta['tokenizer']}), {time.time() - start:.1f} s; now type: "
          f"python train.py --dataset {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
