"""The default data of the demo: sentences of film reviews with people's ratings, and a judge.

Both come with vaderSentiment 3.3.2 (MIT; C.J. Hutto and E. Gilbert, ICWSM 2014), fetched from PyPI
on first use. The sentences are excerpts of reviews that Pang and Lee collected.
"""

import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dschat.demo.downloads import fetch_from_pypi
from dschat.runtime.paths import cache_dir

logger = logging.getLogger(__name__)

ARCHIVE = dict(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
RATINGS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "movieReviewSnippets_GroundTruth.txt",
)
PROMPT = "Movie review:"
MIN_WORDS = 6
MAX_WORDS = 22
LIKED = 1.0  # mean rating of a clear opinion, on a scale from -4 to 4
DISLIKED = -1.0
PROMPT_WORDS = (2, 3, 4)
RESERVED = 6  # one in so many sentences is in no split

# Sentences with these words are not used in a demo. The first list has the beginnings of words, the
# second the sha256 of coarse words.
RUDE_BEGINNINGS = re.compile(
    r"\b(bisexual|breast|damn|erotic|genital|homosexual|hooker|kinky|masturbat|molest|naked|nazi"
    r"|nude|oversexed|orgas|orgy|pimp|porn|prostitut|sex)",
    re.IGNORECASE,
)
RUDE_WORDS = frozenset(
    """
    0228f90e92 095080134d 0f28c4960d 13a465fc66 2062f80093 2189c0ed71 25e82cf602 262f86db0a
    30a989afc8 31506a8448 3e10139e1a 408567641e 566f532d48 5a9d9dcefb 6ac3c336e4 796e43a5a8
    7bc671151c 819837a1df 85fc17f706 8f5083e3e5 937d56e497 954bafccc8 986c990041 9915ba2d82
    99e367bcad 9ae315a94e a24efab8d9 ad505b0be8 affc875700 b690cdbe59 b81d6dc258 c2c3b68b48
    c765305438 d28eb5f7b4 d75a838dc7 db10a79061 dc2abe4ed2 e1ce254422 e30c2ea7a7 e512a05583
    f50c51ed23 f6952d6eef
    """.split()
)


@dataclass(frozen=True)
class Sentence:
    """A sentence of a film review and its rating."""

    text: str
    rating: float  # mean of 20 people, -4 to 4

    @property
    def num_words(self) -> int:
        """The number of words of the text."""
        return len(self.text.split())


def usable_sentences(lines: Iterable[str]) -> list[Sentence]:
    """Parse lines "id<tab>rating<tab>text" and return the usable sentences in their order.

    Usable are ASCII sentences of 6 to 22 words without rude words, each once. Reserved sentences
    (see ``is_reserved``) are left out, as are sentences that differ from one only in case.
    """
    sentences: dict[str, Sentence] = {}
    reserved = set()
    for line in lines:
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 3:
            continue
        text = fields[2].strip()
        if is_reserved(text):
            reserved.add(text.casefold())
        elif text.isascii() and MIN_WORDS <= len(text.split()) <= MAX_WORDS and not is_rude(text):
            sentences.setdefault(text.casefold(), Sentence(text, float(fields[1])))
    return [sentence for key, sentence in sentences.items() if key not in reserved]


def is_reserved(text: str) -> bool:
    """Return whether a sentence is reserved for independent checks, and so in no split.

    Reserved are sentences whose sha256 (UTF-8), read as a whole number, is divisible by 6.
    """
    return int(_sha256(text.strip()), 16) % RESERVED == 0


def is_rude(text: str) -> bool:
    """Return whether a word of `text` is on one of the lists above."""
    if RUDE_BEGINNINGS.search(text):
        return True
    words = re.findall(r"[a-z]+", text.lower())
    return any(_sha256(word)[:10] in RUDE_WORDS for word in words)


def divide(
    sentences: Sequence[Sentence],
    *,
    num_sft: int,
    num_pairs: int,
    num_prompts: int,
    num_sft_eval: int,
    num_pairs_eval: int,
    num_prompts_eval: int,
    seed: int,
) -> dict[str, list[dict]]:
    """Divide sentences into the rows of "sft/train", "sft/eval", "pairs/train" and so on.

    No sentence is in two rows. The evaluation rows are chosen first, so that they stay the same
    whatever is asked for training. The choice depends on the sentences and `seed` alone, not on
    the order of the sentences.

    Raises:
        ValueError: there are too few sentences; the message says how many there are.
    """
    pool = sorted(sentences, key=lambda sentence: _sha256(f"{seed} {sentence.text}"))
    # Pairs are drawn in a separate order. Drawn from the front of the pool, they would leave only
    # sentences without a clear opinion there for the other rows.
    pair_pool = sorted(sentences, key=lambda sentence: _sha256(f"{seed} pairs {sentence.text}"))
    rows = {}
    for part, pairs, sft, prompts in (
        ("eval", num_pairs_eval, num_sft_eval, num_prompts_eval),
        ("train", num_pairs, num_sft, num_prompts),
    ):
        matched = _match(pair_pool, pairs)
        used = {sentence.text for pair in matched for sentence in pair}
        pool = [sentence for sentence in pool if sentence.text not in used]
        if len(matched) < pairs or len(pool) < sft + prompts:
            liked = sum(sentence.rating >= LIKED for sentence in sentences)
            disliked = sum(sentence.rating <= DISLIKED for sentence in sentences)
            raise ValueError(
                f"too few sentences for {num_pairs_eval} + {num_pairs} pairs, "
                f"{num_sft_eval} + {num_sft} SFT rows and "
                f"{num_prompts_eval} + {num_prompts} prompts: "
                f"there are {len(sentences)}, {liked} liked and {disliked} disliked; "
                f"the {part} part found {len(matched)} of its {pairs} pairs and {len(pool)} "
                f"sentences for its other {sft + prompts} rows. Ask for fewer."
            )
        rows[f"pairs/{part}"] = [_pair_row(liked, disliked) for liked, disliked in matched]
        rows[f"sft/{part}"] = [
            {"prompt": PROMPT, "chosen": f" {sentence.text}"} for sentence in pool[:sft]
        ]
        rows[f"prompts/{part}"] = [
            _prompt_row(sentence, seed) for sentence in pool[sft : sft + prompts]
        ]
        pool = pool[sft + prompts :]
        left = {sentence.text for sentence in pool}
        pair_pool = [sentence for sentence in pair_pool if sentence.text in left]
    return rows


def build_reviews(
    *,
    num_sft: int = 320,
    num_pairs: int = 1000,
    num_prompts: int = 1600,
    num_sft_eval: int = 128,
    num_pairs_eval: int = 300,
    num_prompts_eval: int = 128,
    seed: int = 1234,
) -> Path:
    """Return the folder of the data; the first call builds it.

    It holds sft/, pairs/ and prompts/, each with train.jsonl and eval.jsonl:

    - An SFT row is "Movie review:" and a sentence.
    - A pair is the same prompt with a liked (mean rating of 1 or more) and a disliked (-1 or less)
      sentence. Both have the same number of words, so that length tells nothing.
    - A prompt is "Movie review:" and the first 2 to 4 words of a sentence. The rest is the answer,
      and the rating is a further column.

    Raises:
        ValueError: there are too few sentences, or PyPI cannot be reached.
    """
    sizes = dict(
        num_sft=num_sft,
        num_pairs=num_pairs,
        num_prompts=num_prompts,
        num_sft_eval=num_sft_eval,
        num_pairs_eval=num_pairs_eval,
        num_prompts_eval=num_prompts_eval,
    )
    # This file's text is the version of the rules: after an edit, rows made before are not used.
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    key = _sha256(json.dumps([sizes, seed, version, ARCHIVE["sha256"]], sort_keys=True))[:16]
    folder = cache_dir() / f"reviews-{key}"
    if folder.is_dir():
        return folder
    with tarfile.open(fetch_from_pypi(**ARCHIVE, source=True)) as outer:
        inner = io.BytesIO(outer.extractfile(RATINGS[0]).read())
    with tarfile.open(fileobj=inner) as archive:
        text = archive.extractfile(f"hutto_ICWSM_2014/{RATINGS[1]}").read().decode("utf-8")
    rows = divide(usable_sentences(text.split("\n")), **sizes, seed=seed)
    _write(folder, rows)
    counts = ", ".join(f"{len(part)} {name}" for name, part in sorted(rows.items()))
    logger.info("wrote %s: %s", folder, counts)
    return folder


def sentiment_judge() -> Callable[[str], float]:
    """Return a function that scores a text by vaderSentiment's lexicon, from -1 to 1.

    It is a judge that no model here was trained on. Its code is read from the checksummed archive
    each time, so that no unchecked copy is run.

    Raises:
        ValueError: PyPI cannot be reached and the archive is not in the cache.
    """
    archive = fetch_from_pypi(**ARCHIVE, source=True)
    with tempfile.TemporaryDirectory(prefix="dschat-judge-") as temporary:
        with tarfile.open(archive) as file:
            wanted = [member for member in file.getmembers() if "/vaderSentiment/" in member.name]
            file.extractall(temporary, members=wanted, filter="data")
        path = Path(temporary) / "vaderSentiment-3.3.2" / "vaderSentiment" / "vaderSentiment.py"
        spec = importlib.util.spec_from_file_location("dschat_vader_sentiment", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        # Reads the lexicon next to its file, which is deleted below.
        analyser = module.SentimentIntensityAnalyzer()
    return lambda text: analyser.polarity_scores(text)["compound"]


def _match(pool: Sequence[Sentence], num_pairs: int) -> list[tuple[Sentence, Sentence]]:
    """Return up to `num_pairs` pairs (liked, disliked) in the pool's order.

    Both sentences of a pair have the same number of words, and no sentence is in two pairs.
    """
    disliked: dict[int, list[Sentence]] = {}
    for sentence in reversed(pool):
        if sentence.rating <= DISLIKED:
            disliked.setdefault(sentence.num_words, []).append(sentence)
    pairs: list[tuple[Sentence, Sentence]] = []
    for sentence in pool:
        partners = disliked.get(sentence.num_words)
        if len(pairs) < num_pairs and sentence.rating >= LIKED and partners:
            pairs.append((sentence, partners.pop()))
    return pairs


def _pair_row(liked: Sentence, disliked: Sentence) -> dict:
    return {"prompt": PROMPT, "chosen": f" {liked.text}", "rejected": f" {disliked.text}"}


def _prompt_row(sentence: Sentence, seed: int) -> dict:
    num_words = PROMPT_WORDS[int(_sha256(f"{seed} words {sentence.text}"), 16) % len(PROMPT_WORDS)]
    begin = re.match(rf"\S+(\s+\S+){{{num_words - 1}}}", sentence.text).end()
    return {
        "prompt": f"{PROMPT} {sentence.text[:begin]}",
        "chosen": sentence.text[begin:],
        "rating": sentence.rating,
    }


def _write(folder: Path, rows: dict[str, list[dict]]) -> None:
    """Write all parts under `folder`, which takes its name by one rename.

    If another process was faster, its folder is kept: the content is the same.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        for name, part in rows.items():
            path = temporary / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)
                file.flush()
                os.fsync(file.fileno())
        (temporary / "SOURCE.txt").write_text(__doc__, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
