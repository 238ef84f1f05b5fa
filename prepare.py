"""
Text to tokens. Makes data/NAME/{train.bin, val.bin, meta.json, tokenizer.tiktoken}, which train.py reads.

python prepare.py                                        # `docs`: English that comes with torch; no network
python prepare.py --tokenizer byte                       # the same as bytes: what a laptop trains on
python prepare.py --text a.txt b.jsonl.gz --name mine  # your own text: files or folders of .txt, .md, .jsonl
python prepare.py --dataset shakespeare --tokenizer gpt2                                     # a download

    tokenizers   Tokenizer, train_bpe (byte-level BPE, by definition), find_tokenizer, load_tokenizer
    text         find_texts, read_text, cut_bytes, corrupt_stream: what prepare.py and sample.py read
    sources      docs, pysrc, arithmetic: made on this machine; download, shard_stream: fetched
    datasets     prepare, write_bin; load_dataset, load_bin, dataset_folder, run_files
    all scripts  Parser, number, console, whole_file, Progress

Inside, text is a stream of pieces (text, last, done): a document comes in one or more pieces, `last` marks
its final one, `done` in [0, 1] is the part of the source read so far. So no file has to fit in memory. On
disk, token ids are raw uint16 (uint32 for vocabularies above 65,536) and each document ends in <|endoftext|>,
as in nanoGPT. In every tokenizer the id of <|endoftext|> is the last one, n_vocab - 1.
"""
import argparse, base64, bz2, collections, concurrent.futures, contextlib, difflib, fractions, functools, gzip
import hashlib, heapq, http.client, importlib.metadata, importlib.util, inspect, io, itertools, json, os, re
import shlex, shutil, sys, sysconfig, time, types, unicodedata, urllib.request, warnings, zipfile
from pathlib import Path

import numpy as np

EOT = "<|endoftext|>"
HELD_OUT = 0.1              # for validation, where no text is given for that
PIECE = 1 << 18             # characters; about the longest piece of a stream
BPE_BYTES = 64 << 20        # bpe:N learns from the first 64 MB of the training text
BPE_LONG = 1 << 10          # ... from the first characters of a longer word: DNA, base64
BPE_WORDS = 1 << 18         # ... and from the most frequent words in it; the rare ones change nothing
# GPT-2's split pattern as tiktoken writes it: possessive quantifiers, the same matches, faster.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

HF, MAHONEY = "https://huggingface.co/datasets/", "http://mattmahoney.net/dc/"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
URLS = {    # training and validation text; without the latter, the end of the former
    "shakespeare": [SHAKESPEARE],
    "tinystories": [HF + f"roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{split}.txt"
                    for split in ("train", "valid")],
    "enwik8": [MAHONEY + "enwik8.zip"],
    "text8": [MAHONEY + "text8.zip"],
}
SHARDS = {  # ready-made gpt2 tokens, 100M per shard, and how many shards there are
    "fineweb10B": (HF + "kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin", 103),
}
SHA256 = {"shakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
          "enwik8": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
          "text8": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"}
DATASETS = ["docs", "pysrc", "arithmetic", *URLS, *SHARDS]
USUAL = {"fineweb10B": "gpt2", "arithmetic": "byte"}                     # tokenizers, where not bpe:4096
HEADERS = {20240520: "uint16", 20240801: "uint32"}  # llm.c, modded-nanogpt: 256 int32; [0] this, [2] tokens


# ------------------------------------------------------------------------------------------------------------
# Tokenizers

class Tokenizer:
    """name; n_vocab; eot, the id of <|endoftext|>; vocab, the bytes of each token; token_bytes (n_vocab,) of
    int, the bytes of text in each. ranks: {token bytes: id}; None for plain bytes, which need no tiktoken.

    Our own have one special token, <|endoftext|>, as the last id. A published one has `more` (see
    `read_tokenizer`): special {text: id}, eot, n_vocab, cuts (patterns that cut a text before `pattern`
    does), nfc (are texts normalised?)."""
    def __init__(self, name, ranks=None, pattern=None, **more):
        self.name, self.ranks, self.pattern, self.more, self.bpe = name, ranks, pattern, more, None
        words = ranks or {bytes([b]): b for b in range(256)}
        self.special = more.get("special", {EOT: len(words)})
        self.eot, self.n_vocab = more.get("eot", len(words)), more.get("n_vocab", len(words) + 1)
        self.vocab = [b""] * self.n_vocab
        for token, i in words.items():
            self.vocab[i] = token
        # From the raw bytes: through str, a token that is half a UTF-8 character would count as the 3 of
        # U+FFFD.
        self.token_bytes = np.array([*map(len, self.vocab)])
        for text, i in self.special.items():
            self.vocab[i] = text.encode()
        self.dtype = "uint16" if self.n_vocab <= 1 << 16 else "uint32"

    def encode_array(self, text):
        """str -> 1-D array of ids. <|endoftext|> inside a text is ordinary text."""
        if not self.ranks:
            return np.frombuffer(text.encode(), np.uint8)
        if self.bpe is None:
            import tiktoken
            none = {bytes([b]): self.n_vocab + b for b in range(256)}   # for bytes that have no token
            self.bpe = tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=none | self.ranks,
                                         special_tokens=self.special)
        pieces = [unicodedata.normalize("NFC", text) if self.more.get("nfc") else text]
        for cut in self.more.get("cuts", ()):
            import regex
            pieces = [part for piece in pieces for part in regex.split(f"({cut})", piece)]
        ids = np.concatenate([self.bpe.encode_to_numpy(part, disallowed_special=()) for part in pieces])
        return ids[ids < self.n_vocab]

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_stream(self, stream):
        """Yields (ids, done) of the pieces of a stream, <|endoftext|> behind each document:
        what a .bin file holds."""
        encode = lambda piece: self.encode_array(piece[0]) if isinstance(piece[0], str) else piece[0]
        self.encode("")                         # make the encoder before the threads do, each its own
        with concurrent.futures.ThreadPoolExecutor() as pool:           # tiktoken releases the GIL
            while batch := list(itertools.islice(stream, 64)):
                for ids, (_, last, done) in zip(pool.map(encode, batch), batch):
                    yield (np.append(ids, self.eot) if last else ids).astype(self.dtype), done

    def decode(self, ids):
        """ids -> str; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", "replace")


def train_bpe(words, n_vocab):
    """Byte-level BPE. words: {bytes: count}. Returns {token bytes: id}:
    n_vocab - 1, or fewer where the text runs out.

    Merge the most frequent pair of neighbours, again and again (Sennrich et al. 2016, arXiv:1508.07909), ties
    to the smaller bytes. A pair is named by its joined bytes, because tiktoken too merges any two neighbours
    that join to a known token. `where` tells which words hold a pair, so that a merge recounts only those."""
    ranks = {bytes([b]): b for b in range(256)}
    parts, times = [[bytes([b]) for b in word] for word in words], list(words.values())
    count, where, changed, heap = collections.Counter(), collections.defaultdict(set), set(), []

    def recount(i, sign):
        for a, b in zip(parts[i], parts[i][1:]):
            pair = a + b
            count[pair] += sign * times[i]
            where[pair].add(i)
            changed.add(pair)

    for i in range(len(parts)):
        recount(i, 1)
    while len(ranks) < n_vocab - 1:
        for pair in changed:
            heapq.heappush(heap, (-count[pair], pair))
        changed.clear()
        while heap and -heap[0][0] != count[heap[0][1]]:  # outdated: pushed again when its count changed
            heapq.heappop(heap)
        if not heap or heap[0][0] > -2:                         # what is left was seen once
            break
        best = heapq.heappop(heap)[1]
        ranks.setdefault(best, len(ranks))
        for i in where.pop(best):
            recount(i, -1)
            word, j = parts[i], 0
            while j < len(word) - 1:
                if word[j] + word[j + 1] == best:
                    word[j:j + 2] = [best]
                j += 1
            recount(i, 1)
    return ranks


def learn_bpe(stream, n_vocab):
    import regex                                # comes with tiktoken; `re` knows no \p{L}
    words, size = collections.Counter(), 0
    for text, _, _ in stream:
        words.update(word[:BPE_LONG] for word in regex.findall(PATTERN, text))
        size += len(text.encode())
        if size >= BPE_BYTES:
            break
    ranks = train_bpe({word.encode(): times for word, times in words.most_common(BPE_WORDS)}, n_vocab)
    return Tokenizer(f"bpe:{n_vocab}", ranks, PATTERN)


def find_tokenizer(spec):
    """spec: byte, a tiktoken name or a prepared folder -> its Tokenizer;
    bpe:N, which has yet to be learnt -> N."""
    if spec.startswith("bpe:"):
        n = number(spec[4:], int)
        need(256 < n < 1 << 24, f"--tokenizer {spec}: expected bpe:N with N above 256")
        return n
    if spec == "byte":
        return Tokenizer("byte")
    if any(Path(spec).glob("*.json")):
        return load_tokenizer(spec)
    import tiktoken
    need(spec in tiktoken.list_encoding_names(),
         f"--tokenizer {spec}: expected byte, bpe:N (N > 256), gpt2, cl100k_base, o200k_base, or a prepared "
         "folder such as data/docs, or a published model's")
    try:
        enc = tiktoken.get_encoding(spec)
    except OSError as e:                        # the network errors of `requests` are OSErrors
        raise ValueError(f"tokenizer {spec} must be downloaded once, and that failed ({type(e).__name__}); "
                         "without a network use --tokenizer bpe:4096 or byte, or point TIKTOKEN_CACHE_DIR to "
                         "a copy") from e
    # <|endoftext|> follows the last rank: 50256 as in gpt2 itself; in cl100k_base that is 100256, not 100257.
    return Tokenizer(spec, enc._mergeable_ranks, enc._pat_str)


def load_tokenizer(path):
    """The Tokenizer of a dataset or run folder (it needs meta.json and tokenizer.tiktoken), or of its
    meta.json, or of a published checkpoint's folder."""
    folder = Path(path).parent if Path(path).is_file() else Path(path)
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer(folder)
    meta, file = read_meta(folder), folder / "tokenizer.tiktoken"
    if meta["tokenizer"] == "byte":
        return Tokenizer("byte")
    need(file.is_file() and file_sha256(file) == meta["tokenizer_sha256"],
         f"{file} is missing, or it or meta.json is damaged; copy it from the dataset folder")
    ranks = {base64.b64decode(token): int(i) for token, i in map(bytes.split, file.read_bytes().splitlines())}
    return Tokenizer(meta["tokenizer"], ranks, meta["pattern"], **meta.get("more", {}))


def read_tokenizer(folder):
    """The Tokenizer of a published checkpoint: tokenizer.json, as the package `tokenizers` writes it, and
    config.json. ValueError for all but byte-level BPE."""
    file = folder / "tokenizer.json"
    try:
        t, c = (json.loads((folder / name).read_text("utf-8")) for name in ("tokenizer.json", "config.json"))
        bpe, before, normal = t["model"], t["pre_tokenizer"], t["normalizer"]
        steps = before.get("pretokenizers", [before])
        need(bpe["type"] == "BPE" and steps[-1]["type"] == "ByteLevel", "it is no byte-level BPE")
        need(normal in (None, {"type": "NFC"}), f"its normalizer {normal!s:.60} is not known")
        *cuts, pattern = filter(None, map(split_pattern, steps))
        # GPT-2's alphabet: printable bytes are themselves, the others stand behind U+0100.
        shown = [b for b in range(256) if chr(b).isprintable() and b != 32]
        others = [b for b in range(256) if b not in shown]
        byte = dict(zip(map(chr, [*shown, *range(256, 324)]), shown + others))
        made = ["".join(pair).replace(" ", "") for pair in bpe["merges"]]
        ids = [*map(bpe["vocab"].get, made)]
        need(ids == sorted(ids), "its ids are not in the order of its merges")
        ranks = {bytes(map(byte.get, t)): bpe["vocab"][t] for t in (*(byte.keys() & bpe["vocab"]), *made)}
        return Tokenizer(folder.name, ranks, pattern, cuts=cuts, nfc=bool(normal),
                         n_vocab=c["vocab_size"], eot=int(np.ravel(c["eos_token_id"])[0]),
                         special={token["content"]: token["id"] for token in t["added_tokens"]})
    except Exception as e:                      # whatever a foreign file may hold
        raise ValueError(f"cannot read {file}: {e!s:.200}") from None


def split_pattern(step):
    """The regular expression that a step of `pre_tokenizer` cuts out, or None."""
    kind = step["type"]
    if kind == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return PATTERN if step.get("use_regex", True) else None
    need(kind == "Split" and step["behavior"] == "Isolated" and not step["invert"],
         f"its pre_tokenizer {kind} is none of Split, Digits and ByteLevel without a space in front")
    return step["pattern"]["Regex"]


# ------------------------------------------------------------------------------------------------------------
# Text: files, and streams of (text, last, done)

def unzipped(raw):
    """The one file in a .zip."""
    names = zipfile.ZipFile(raw).namelist()
    need(len(names) == 1, f"it holds {len(names)} files, expected one: unpack it")
    return zipfile.ZipFile(raw).open(*names)


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".zip": unzipped}


def text_kind(file):
    """".jsonl" of a.jsonl and of a.jsonl.gz."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def find_texts(paths):
    """The text files that `paths` name.
    A folder stands for all .txt, .md and .jsonl files in it, also packed ones."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if text_kind(p) in (".txt", ".md", ".jsonl"))
        need(found and found[0].is_file(), f"{path}: no such file, or a folder without .txt, .md and .jsonl")
        files += found
    return files


def text_lines(file, longest=-1):
    """Yields (line, bytes of the file read so far); a line of more than `longest` characters comes in parts.
    UTF-8, with or without BOM, plain or packed; anything else is a ValueError that names the file."""
    try:
        with open(file, "rb") as raw:
            lines = io.TextIOWrapper(PACKED.get(file.suffix.lower(), lambda raw: raw)(raw), "utf-8-sig")
            while line := lines.readline(longest):
                yield line, raw.tell()
    except Exception as e:                      # every way of packing has its own errors
        raise ValueError(f"cannot read {file} as UTF-8 text: {e or type(e).__name__}") from e


def read_text(files):
    """Streams files. A document ends at a line of only <|endoftext|>,
    or is the "text" of a JSON object on one line."""
    total, before = sum(map(os.path.getsize, files)) or 1, 0
    for file in files:
        split = json_documents if text_kind(file) in (".json", ".jsonl") else marked_documents
        for text, last, at in split(file):
            yield text, last, (before + at) / total
        before += os.path.getsize(file)


def json_documents(file):
    for n, (line, at) in enumerate(text_lines(file), 1):
        try:                                    # "replace": JSON can name half a surrogate pair, UTF-8 cannot
            if line.strip():
                yield json.loads(line)["text"].encode("utf-8", "replace").decode(), True, at
        except Exception:                       # whatever JSON may hold
            raise ValueError(f'cannot read {file}: line {n} is no JSON object with a string under the key '
                             '"text"') from None


def marked_documents(file):
    held, begun = "", False                     # begun: a piece of this document has already gone out
    for line, at in itertools.chain(text_lines(file, PIECE), [(EOT, os.path.getsize(file))]):
        if line.strip() == EOT:
            if begun or held.strip():
                yield held, True, at
            held, begun = "", False
            continue
        held += line
        if len(held) > PIECE:
            # Cut between a word and a space: every split pattern does so too, so the cut changes no token.
            cut = re.match(r".*\S(?= )|.*", held, re.S).end()
            yield held[:cut], False, at
            held, begun = held[cut:], True


def cut_bytes(stream, start, stop):
    """The part of a stream from byte `start` to byte `stop`; a document on the border is divided."""
    at = 0
    for text, last, done in stream:
        raw = text.encode()
        if at + len(raw) > start:
            left, right = (raw[:max(0, border - at)].decode("utf-8", "ignore") for border in (start, stop))
            yield text[len(left):len(right)], last or at + len(raw) >= stop, done
        at += len(raw)
        if at >= stop:
            return


def corrupt_stream(stream, rate, seed=0):
    """Replaces each word with probability `rate` by another of its piece. The draws do not depend on the
    rate: a higher rate damages the same words and others."""
    rng = np.random.default_rng(seed)
    for text, last, done in stream:
        words = text.split(" ")
        hits, others = rng.random(len(words)), rng.integers(len(words), size=len(words))
        words = [words[other] if hit < rate else word for word, hit, other in zip(words, hits, others)]
        yield " ".join(words), last, done


# ------------------------------------------------------------------------------------------------------------
# Text that is already on the disk: docs and pysrc

def python_roots():
    """{name: path} of the standard library, numpy, torch and whatever torch requires,
    found but not imported."""
    roots, todo = {"python": Path(sysconfig.get_path("stdlib"))}, ["numpy", "torch"]
    for name in todo:                           # grows while we walk it
        spec = importlib.util.find_spec(name.lower().replace("-", "_"))
        if spec and spec.origin and spec.origin.endswith(".py"):
            path = Path(spec.origin)
            roots[name] = path.parent if path.name == "__init__.py" else path
            needs = [re.match(r"[\w.-]+", need)[0] for need in importlib.metadata.requires(name) or []
                     if "extra ==" not in need]
            todo += [need for need in needs if need not in todo]
    return roots


def python_files():
    """Yields (module such as "torch/nn/functional.py", source text) in a fixed order, tests left out."""
    files, progress = [], Progress("reading Python files")
    for name, root in python_roots().items():
        for path in sorted(root.rglob("*.py"), key=Path.as_posix) if root.is_dir() else [root]:
            module = Path(name) / path.relative_to(root)
            if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(module.parts):
                files.append((module.as_posix(), path))
    for i, (module, path) in enumerate(files, 1):
        progress(i / len(files))
        with contextlib.suppress(UnicodeDecodeError, OSError):
            yield module, path.read_text(encoding="utf-8")


def string_constants(constants):
    """All strings among the constants of compiled code:
    docstrings, add_docstr(f, "..."), pydoc_data.topics, ..."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, types.CodeType)):
            yield from string_constants(getattr(constant, "co_consts", constant))


COMMON = set("a an and any are as at be been but by can do does each for from has have how if in into is it "
             "its may more must no not of on one only or other same should so such than that the their then "
             "there these they this to use used using was we when where which will with would you "
             "your".split())
MARKUP = [(r"\n\s*(\W)\1{2,}\s*$", ":"),         # a heading and the ---- under it
          (r":[\w:]+:`~?([^`<]*)(?: <[^`]*>)?`", r"\1"), (r"^\s*\.\. [\w-]+::|`|\*\*", ""), (r"::\s*$", ":")]


def english(text):
    """Yields the paragraphs of a docstring that are English prose, each as one line. Examples, code, tables,
    formulas and lists of names go: they have too few of the commonest English words, or too few letters."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text.encode("utf-8", "replace").decode())):
        for old, new in MARKUP:
            paragraph = re.sub(old, new, paragraph, flags=re.M)
        paragraph, words = " ".join(paragraph.split()), re.findall(r"[a-z']+", paragraph.lower())
        common, letters = sum(word in COMMON for word in words), len(re.findall(r"[A-Za-z ]", paragraph))
        prose = len(words) > 5 and common > len(words) / 4 and letters > 0.9 * len(paragraph)
        if prose and ">>>" not in paragraph:
            yield paragraph


def chunks(text, sep, size):
    """Cuts at separators into pieces of 200 to `size` characters (more where no separator comes in time);
    what is shorter is left out."""
    parts = [""]
    for p in text.split(sep):
        if parts[-1] and len(parts[-1]) + len(p) > size:
            parts.append("")
        parts[-1] += sep + p if parts[-1] else p
    return [part for part in parts if len(part) >= 200]


def documentation(source, seen):
    """The English in a Python source, as texts of 200 to about 2,000 characters;
    no paragraph that is in `seen`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # SyntaxWarnings of other people's code
            code = compile(source, "source", "exec", dont_inherit=True, optimize=0)     # parsed, never run
    except (SyntaxError, ValueError):
        return
    for string in string_constants([code]):
        if len(string) >= 200:
            fresh = [paragraph for paragraph in english(string) if paragraph not in seen]
            seen.update(fresh)
            yield from chunks("\n".join(fresh), "\n", 2000)


def program_text(source):
    """A Python source, cut at empty lines into texts of 200 to about 8,000 characters,
    without those mostly of data."""
    return [text for text in chunks(source, "\n\n", 8000)
            if len(re.findall("[A-Za-z]", text)) > 0.4 * len(text)]


def split_modules(documents, fraction):
    """documents: (module, text) pairs -> [train, val], lists of texts without exact duplicates. A module is
    validation as a whole, by its hash. The texts are ordered by their hashes: any first part is a fair sample
    of all modules."""
    parts, sha1 = ({}, {}), lambda s: hashlib.sha1(s.encode()).digest()
    for module, text in documents:
        if not any(text in part for part in parts):
            parts[int.from_bytes(sha1(module)[:4], "big") < fraction * 2**32][text] = None
    return [sorted(part, key=sha1) for part in parts]


def drop_overlap(train, val):
    """val without the texts that share a run of 13 words with a training text
    (GPT-3, arXiv:2005.14165, appendix C)."""
    def runs(text):
        words = re.findall(r"\w+", text.lower())
        return zip(*(words[i:] for i in range(13)))
    held, common = set().union(*map(runs, val)), set()
    for text in train:
        common.update(held.intersection(runs(text)))
    return [text for text in val if common.isdisjoint(runs(text))]


def arithmetic(n, seed=0):
    """n different texts: a problem, the calls of tools with their results, the answer. In about every other
    one a number has a name, which a table in front of the problem explains and a second tool looks up.

        (17+4)*25? <tool>(17+4)*25</tool>525, so 525
        k=17 a=31 q=58; (k+4)*25? <tool>k</tool>17 <tool>(17+4)*25</tool>525, so 525
    """
    rng, known = np.random.default_rng(seed), {}
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    while len(known) < n:
        numbers, (f, g) = rng.integers(1, 100, 5).tolist(), rng.choice(list("+-*"), 2)
        form = "({}{f}{}){g}{}" if rng.random() < 0.5 else "{}{f}({}{g}{})"
        text = form.format(*numbers[:3], f=f, g=g)
        value = eval(text)                                  # it is made of numbers and + - * right above
        known[text] = f"{text}? <tool>{text}</tool>{value}, so {value}"
        if rng.random() < 0.5:
            names, named = rng.choice(letters, 3, replace=False), rng.integers(3)
            table = [f"{name}={number}" for name, number in zip(names, [numbers[named], *numbers[3:]])]
            asked = form.format(*numbers[:named], names[0], *numbers[named + 1:3], f=f, g=g)
            look = f"{' '.join(rng.permutation(table))}; {asked}? <tool>{names[0]}</tool>{numbers[named]} "
            known[text] = look + known[text].partition("? ")[2]
    return list(known.values())


# ------------------------------------------------------------------------------------------------------------
# Downloads

def download(url, folder, sha256=None):
    """Fetches url into folder: what has its final name is whole, and is not fetched again."""
    path, digest, size = folder / url.split("/")[-1], hashlib.sha256(), 0
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(path.name)
    try:
        with urllib.request.urlopen(url, timeout=30) as response, whole_file(path) as f:
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(1 << 20):
                f.write(block)
                digest.update(block)
                size += len(block)
                progress(size / max(total, size + 1))
            need(sha256 or size == total, f"{size:,} of {total:,} bytes came")
            found = digest.hexdigest()
            need(sha256 in (None, found), f"its sha256 is {found}, expected {sha256}")
        progress(1)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise ValueError(f"cannot download {url} ({e}); without internet use `python prepare.py`, whose text "
                         "is already on this machine, or your own: `python prepare.py --text FILE --name "
                         "NAME`") from e
    return path


def shard_stream(source, folder, split, limit):
    """Streams `limit` ready-made tokens, ids in place of text. Shard 0 is validation.
    Fetches only what it needs."""
    (url, n), left = SHARDS[source], limit
    for i in [0] if split == "val" else range(1, n + 1):
        ids = load_bin(download(url.format(split, i), folder))[:left]
        for j in range(0, len(ids), PIECE):
            yield ids[j:j + PIECE], False, 1 - (left - j) / limit
        left -= len(ids)
        if left == 0:
            return


# ------------------------------------------------------------------------------------------------------------
# Datasets: writing

def prepare(source="docs", name=None, tokenizer=None, out_dir="data", text=(), val=(), corrupt=0.0,
            max_tokens=None):
    """Makes the dataset out_dir/name and returns that folder;
    at once where it is there with the same settings.

    source: one of DATASETS, unless `text`, a list of files and folders, is given. tokenizer: None takes the
    source's in USUAL, else bpe:4096. val: files; without them a tenth of the modules (docs, pysrc), or the
    last tenth of the text. corrupt: share of the training words to damage; the vocabulary is learnt from
    clean text. max_tokens: length of the training part. Raises ValueError, which says what to type, and
    OSError where out_dir cannot be made."""
    need(text or not val, "--val needs --text: a dataset brings its own validation text")
    source = "text" if text else source
    usual = USUAL.get(source, "bpe:4096")
    tokenizer = tokenizer or usual
    if not name:
        name = Path(text[0]).resolve().name.split(".")[0] if text else source
        name += f"-corrupt{corrupt:g}" if corrupt else ""
        name += "-" + Path(tokenizer).name.replace(":", "") if tokenizer != usual else ""
    text, val = find_texts(text), find_texts(val)
    need(re.fullmatch(r"[^/\\]*[^/\\.][^/\\]*", name),
         f"--name {name}: expected a plain name; folders go into --out_dir")
    need(source in ["text", *DATASETS], f"no dataset {source}; expected --text FILE or {', '.join(DATASETS)}")
    need(0 <= corrupt <= 1, f"--corrupt {corrupt}: expected a share of the words from 0 to 1, such as 0.3")
    need(max_tokens is None or max_tokens > 0, f"--max_tokens {max_tokens}: expected at least 1")
    need(source not in SHARDS or tokenizer == "gpt2" and not corrupt,
         f"{source} is gpt2 tokens already: it takes no --corrupt and no other --tokenizer")
    content = b"".join(bytes.fromhex(file_sha256(file)) for file in text + val)
    settings = dict(source=source, corrupt=corrupt, tokenizer=tokenizer, max_tokens=max_tokens,
                    content=hashlib.sha256(content).hexdigest(), val=len(val))
    folder = Path(out_dir) / name
    if folder.exists():
        made = read_meta(folder).get("settings", {})
        need(all(made.get(key, value) == value for key, value in settings.items()),
             f"{folder} exists and was made from another text or with other settings (see its meta.json): "
             "give another --name, or delete that folder")
        return folder

    temp = Path(out_dir) / f".{name}-{os.getpid()}"                      # renamed when complete
    temp.mkdir(parents=True)
    try:
        tok = find_tokenizer(tokenizer)
        raw = Path(out_dir) / "raw" / source
        open_train, open_val = open_source(source, text, val, max_tokens, raw)
        if isinstance(tok, int):
            tok = learn_bpe(open_train(), tok)
        train = corrupt_stream(open_train(), corrupt) if corrupt else open_train()
        versions = {package: importlib.metadata.version(package) for package in [*python_roots()][1:]}
        meta = dict(tokenizer=tok.name, pattern=tok.pattern, more=tok.more, vocab_size=tok.n_vocab,
                    dtype=tok.dtype, settings=settings,
                    versions={"python": sys.version.split()[0], **versions})
        for split, stream, limit in [("train", train, max_tokens), ("val", open_val(), None)]:
            counts = write_bin(temp / f"{split}.bin", stream, tok, limit)
            need(counts["tokens"], f"the {split} part of {name} is empty: give more text, or --val FILE")
            meta |= {f"{split}_{key}": value for key, value in counts.items()}
        if tok.ranks:  # in tiktoken's own format; a dataset or a run needs no network later
            lines = (b"%s %d\n" % (base64.b64encode(token), i) for token, i in tok.ranks.items())
            (temp / "tokenizer.tiktoken").write_bytes(b"".join(lines))
            meta["tokenizer_sha256"] = file_sha256(temp / "tokenizer.tiktoken")
        meta["checksum"] = checksum(meta)
        (temp / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")
        if not folder.exists():                 # another process may have made it meanwhile
            temp.rename(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def open_source(source, text, val, max_tokens, raw):
    """Two functions that open the training and the validation stream."""
    listed = lambda texts: lambda: ((t, True, i / len(texts)) for i, t in enumerate(texts))
    if source in SHARDS:
        return (lambda: shard_stream(source, raw, "train", max_tokens or 10**8),
                lambda: shard_stream(source, raw, "val", 10_485_760))           # as modded-nanogpt does
    if source == "arithmetic":
        problems = arithmetic(50_000)
        cut = len(problems) * 9 // 10
        return listed(problems[:cut]), listed(problems[cut:])
    if source in ("docs", "pysrc"):
        texts = functools.partial(documentation, seen=set()) if source == "docs" else program_text
        pairs = ((module, t) for module, code in python_files() for t in texts(code))
        train, held = split_modules(pairs, HELD_OUT)
        if source == "docs":  # not pysrc: code repeats its licences and boilerplate everywhere
            held = drop_overlap(train, held)
        return listed(train), listed(held)
    if source in URLS:
        text, *more = [download(url, raw, SHA256.get(source)) for url in URLS[source]]
        text, val = [text], more
    if val:
        return lambda: read_text(text), lambda: read_text(val)
    end = sum(len(t.encode()) for t, _, _ in read_text(text))
    cut = int((1 - HELD_OUT) * end)
    if source in ("enwik8", "text8"):           # by convention; the last 5 of the 100 MB are their test part
        cut, end = 90_000_000, 95_000_000
    return lambda: cut_bytes(read_text(text), 0, cut), lambda: cut_bytes(read_text(text), cut, end)


def write_bin(path, stream, tok, limit):
    """Encodes a stream into a file of at most `limit` ids. Returns how many tokens and bytes of text
    these are, and the file's sha256."""
    tokens, size, progress = 0, 0, Progress(f"writing {path.name}")
    with open(path, "wb") as f:
        for ids, done in tok.encode_stream(stream):
            ids = ids if limit is None else ids[:limit - tokens]
            f.write(ids.tobytes())
            tokens += len(ids)
            size += int(tok.token_bytes[ids].sum())
            progress(min(0.99, done))
            if tokens == limit:
                break
    progress(1)
    return dict(tokens=tokens, bytes=size, sha256=file_sha256(path))


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Datasets: reading

def dataset_folder(name):
    """The folder of a dataset: data/NAME, or `name` itself where it is a path."""
    path = re.search(r"[/\\]", str(name)) or (Path(name) / "meta.json").is_file()
    return Path(name) if path else Path("data") / name


def load_dataset(folder):
    """(train, val, meta) of a dataset folder: two memmaps of ids, and the contents of meta.json."""
    folder = Path(folder)
    need(folder.is_dir(), f"no dataset at {folder}; to make it: python prepare.py --text FILE --name "
                          f"{folder.name}, or --dataset with one of {', '.join(DATASETS)}")
    meta, ids = read_meta(folder), []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        need(file_sha256(path) == meta[f"{split}_sha256"],          # a second for each gigabyte
             f"{path} does not hold the tokens that meta.json tells of: delete that folder and run "
             "prepare.py again")
        ids.append(np.memmap(path, meta["dtype"], "c"))                # torch warns of what is read-only
    return *ids, meta


def load_bin(path):
    """The ids in a .bin file of somebody else as a read-only memmap: raw uint16, or with the header of llm.c
    and modded-nanogpt. ValueError for a file that was cut off."""
    header = np.fromfile(path, np.int32, 256)
    dtype, tokens, offset = "uint16", None, 0
    if len(header) == 256 and header[0] in HEADERS:
        dtype, tokens, offset = HEADERS[header[0]], int(header[2]), 1024
    n, rest = divmod(path.stat().st_size - offset, np.dtype(dtype).itemsize)
    need(n and not rest and tokens in (None, n),
         f"{path} is damaged: {n} tokens of {dtype} and {rest} bytes, expected {tokens or 'some'} tokens and "
         "0 bytes; delete its folder and run prepare.py again")
    return np.memmap(path, dtype, "r", offset)


def checksum(meta):
    """Of all that meta.json says but this."""
    text = json.dumps({key: value for key, value in meta.items() if key != "checksum"})
    return hashlib.sha256(text.encode()).hexdigest()


def read_meta(folder):
    """The contents of a folder's meta.json."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_text("utf-8"))
        need(meta.get("checksum", checksum(meta)) == checksum(meta), "it is damaged")
        need({"tokenizer", "dtype", "train_sha256"} <= meta.keys(), "it is of something else")
    except Exception as e:                      # whatever a foreign file may hold
        raise ValueError(f"{folder} has no readable meta.json ({e}); `python prepare.py` makes dataset "
                         "folders") from e
    return meta


def run_files(folder):
    """What a run keeps of its dataset:
    the paths of meta.json and, unless it is plain bytes, of the tokenizer; also a published model's."""
    return [*Path(folder).glob("meta.json"), *Path(folder).glob("tokenizer*")]


# ------------------------------------------------------------------------------------------------------------
# The command line, for all scripts

UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}

class NoNumber(ValueError, argparse.ArgumentTypeError):
    """argparse puts the name of the flag before the text of the latter, and shows nothing of the former."""


def number(text, kind):
    """A number as a person types it, "0.5", "1e6", "30M" or "1_000_000", as `kind`: int or float.
    ValueError for all else: nan, inf, digits that are not ASCII, what does not fit into 64 bits, a fraction
    where an int is expected."""
    form = re.fullmatch(r"([-+]?[\d_]{0,30}\.?\d{0,30}(?:[eE][-+]?\d{1,3})?)([kMB]?)", text, re.A)
    try:
        exact = fractions.Fraction(form[1].replace("_", "")) * UNITS[form[2]]
        value = kind(exact)
        need(kind is float or value == exact and abs(value) < 1 << 63, "")
    except (ValueError, TypeError, OverflowError):
        such = {int: "a whole number such as 1000, 30M or 1e6", float: "a finite number such as 0.5 or 1e-3"}
        raise NoNumber(f"{text[:40]!r}: expected {such[kind]}") from None
    return value


def need(ok, message):
    if not ok:
        raise ValueError(message)


def console():
    """First line of every main(): what is printed appears at once, in a file too, and a character that the
    terminal does not know is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def complain(program, error):
    """One line about an error on stderr, whatever is in it. Returns 2, the exit status."""
    line = " ".join((str(error) or "out of memory").splitlines())         # a MemoryError has no text
    print(f"{program}: {line[:500]}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def whole_file(path, mode="wb", keep=None):
    """Opens a file that gets its name when it is complete: with whole_file(path) as f: f.write(...). If
    anything fails, the half is removed and what had the name before stays. keep: what had the name before
    gets this one. ValueError names the file where it cannot be written."""
    part = Path(f"{path}.part")
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep:
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:        # torch's writer raises the latter
        why = getattr(e, "strerror", "the disk or a limit is full") or e
        raise ValueError(f"cannot write {path}: {why}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class Progress:
    """A line on stderr with the time left, at most once a second:
    call it with done in [0, 1], at the end with 1."""
    def __init__(self, label):
        self.label = label
        self.start = self.shown = time.time()

    def __call__(self, done):
        now = time.time()
        if now - self.shown > 1 and done > 0.01 or done == 1 and self.shown > self.start:
            line = f"\r{self.label}: {done:4.0%}, {(now - self.start) * (1 / done - 1):.0f} s left   "
            print(line, end="\n" if done == 1 else "", file=sys.stderr)
            self.shown = now


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, reads numbers by `number`,
    and answers an unknown flag with the one that was probably meant."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        for kind in (int, float):
            self.register("type", kind, functools.partial(number, kind=kind))

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            self.error(f"unknown argument {unknown[0]}; {hint}")
        return namespace, unknown

    def error(self, message):
        self.exit(complain(self.prog, message))


def main(argv=None):
    console()
    parser = Parser(prog="prepare.py", description="Text to tokens: makes data/NAME/{train.bin, val.bin, "
                    "meta.json}.")
    add = parser.add_argument
    add("--dataset",
        help=f"built-in, one of: {', '.join(DATASETS)}; the first three need no network (default: docs)")
    add("--text", nargs="+", default=(), metavar="FILE",
        help="your own instead: files .txt .md .jsonl, also .gz, or folders of them")
    add("--val", nargs="+", default=(), metavar="FILE",
        help="validation text to go with --text (default: its last tenth)")
    add("--name", help="folder under --out_dir (default: after the source and the tokenizer)")
    add("--tokenizer", help="byte, bpe:N, gpt2, cl100k_base, o200k_base or a prepared folder (default: "
        "bpe:4096; arithmetic: byte; fineweb10B: gpt2)")
    add("--corrupt", type=float, default=0.0, help="share of the training words to damage (default: 0)")
    add("--max_tokens", type=int, help="length of the training part (default: all; fineweb10B: 100M)")
    add("--out_dir", default="data", help="where datasets live (default: data)")
    args = vars(parser.parse_args(argv))
    try:
        need(not args["text"] or not args["dataset"], "--dataset and --text exclude each other")
        folder = prepare(args.pop("dataset") or "docs", **args)
        meta = read_meta(folder)
    except (ValueError, OSError, ImportError) as e:
        return complain("prepare.py", e)
    except KeyboardInterrupt:
        print("prepare.py: interrupted, and nothing half made is left", file=sys.stderr)
        return 130
    for split in ("train", "val"):
        tokens, size = meta[f"{split}_tokens"], meta[f"{split}_bytes"]
        print(f"{folder}/{split}.bin: {tokens:,} tokens, {size / 1e6:.2f} MB of text")
    print(f"vocabulary of {meta['vocab_size']} ({meta['tokenizer']}); now type: "
          f"python train.py --dataset {shlex.quote(str(folder))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
