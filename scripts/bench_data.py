"""Time the preparation of data, cold and from the cache, and measure the memory that it takes.

    python scripts/bench_data.py --rows 100000 --output docs/results/data/hh_100k.json
    python scripts/bench_data.py --rows 1000000 --form messages
    python scripts/bench_data.py --rows 100000 --beside trl     # after: pip install --no-deps trl

Rows of random words are written to a temporary folder with a separate cache. A start is a fresh
process that opens, splits, checks and tokenizes the rows for the step that the form is for, as the
main of that step does. Seconds begin after the imports. CPU seconds tell more on a machine with
other work. Both, and the anonymous memory, are of the process and its forks together: memory is
what they hold besides the files that they map, and a page that they share counts once.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dschat.runtime.files import write_json  # noqa: E402
from dschat.runtime.hardware import hardware, versions  # noqa: E402

FORMS = ("hh", "messages", "prompt")
NUM_WORDS = 20_000
VOCABULARY = 32_000
MAX_TOKENS = 512
MIB = 2**20
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def main() -> None:
    """Run all starts and print, or write, their measurements."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the data set")
    parser.add_argument("--form", choices=FORMS, default="hh", help="form of the rows")
    parser.add_argument("--beside", choices=("trl",), help="also time this library's preparation")
    parser.add_argument("--output", help="JSON file of the results")
    parser.add_argument("--start", choices=("dschat", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.beside and args.form != "hh":
        parser.error("--beside trl compares preference pairs: --form hh.")
    if args.start:
        start = start_dschat if args.start == "dschat" else start_trl
        print(json.dumps(start(Path(args.folder), args.form)))
        return
    results = {"rows": args.rows, "form": args.form, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "rows.jsonl"), args.rows, args.form)
        train_tokenizer(Path(folder))
        results["data_mib"] = round(Path(folder, "rows.jsonl").stat().st_size / MIB)
        for library in ("dschat", *([args.beside] if args.beside else [])):
            for order in ("first", "second"):
                results[f"{library}_{order}"] = found = run_start(args, folder, library)
                print(f"{library}, {order} start: {json.dumps(found)}", flush=True)
            cache = Path(folder, f"cache_{library}").rglob("*")
            size = sum(file.stat().st_size for file in cache if file.is_file())
            results[f"{library}_cache_mib"] = round(size / MIB)
    results |= {"hardware": hardware(), "versions": versions()}
    print(json.dumps(results, indent=1))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.output), results)


def run_start(args: argparse.Namespace, folder: str, library: str) -> dict:
    """Prepare the rows in a fresh process and return its measurements."""
    cache = str(Path(folder, f"cache_{library}"))
    environment = {**os.environ, "DSCHAT_CACHE": cache, "HF_DATASETS_CACHE": cache}
    command = [sys.executable, __file__, "--start", library, "--folder", folder]
    done = subprocess.run(
        [*command, "--form", args.form], env=environment, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def start_dschat(folder: Path, form: str) -> dict:
    """Prepare the rows as a step's main does, and return the measurements."""
    from dschat.config.sft import SFTData
    from dschat.data.loaders import build_pair_data, build_prompt_data, build_sft_data

    tokenizer = load_tokenizer(folder)
    split = {"messages": "1,0,0", "hh": "0,1,0", "prompt": "0,0,1"}[form]
    path = str(folder / "rows.jsonl")
    data = SFTData(data_path=[path], data_split=split, max_seq_len=MAX_TOKENS)
    end = tokenizer.eos_token_id
    with Meter() as meter:
        if form == "messages":
            train, _ = build_sft_data(data, tokenizer, end_token_id=end)
        elif form == "hh":
            train, _ = build_pair_data(data, tokenizer, end_token_id=end)
        else:
            train, _ = build_prompt_data(data, tokenizer, max_prompt_len=MAX_TOKENS)
    return {**meter.found, **time_batches(train, form, tokenizer.pad_token_id)}


def time_batches(train, form: str, pad_id: int) -> dict:
    """Time a batch of 16 random rows on the training thread."""
    from dschat.data import collate

    name = {"messages": "text", "hh": "pairs", "prompt": "prompts"}[form]
    make_batch = getattr(collate, f"collate_{name}")
    rows = random.Random(0).sample(range(len(train)), min(len(train), 1600))
    begun = time.thread_time()
    for begin in range(0, len(rows), 16):
        make_batch([train[row] for row in rows[begin : begin + 16]], pad_id)
    batches = -(-len(rows) // 16)
    return {"ms_per_batch_of_16": round((time.thread_time() - begun) * 1000 / batches, 2)}


def start_trl(folder: Path, form: str) -> dict:
    """Prepare the rows as TRL's RewardTrainer does, in as many processes as there are cores."""
    import datasets
    from trl import RewardConfig, RewardTrainer

    tokenizer = load_tokenizer(folder)
    cores = len(os.sched_getaffinity(0))
    config = RewardConfig(
        output_dir=str(folder / "out"), max_length=MAX_TOKENS, dataset_num_proc=cores, use_cpu=True
    )
    with Meter() as meter:
        rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
        RewardTrainer._prepare_dataset(None, rows, tokenizer, config, "train")
    return meter.found


class Meter:
    """Measures seconds, and the growth of memory, while it is open."""

    def __enter__(self) -> "Meter":
        """Start."""
        self._base = self._peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._begun, self._cpu = time.monotonic(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        seconds, cpu = time.monotonic() - self._begun, cpu_seconds() - self._cpu
        self._done.set()
        self._thread.join()
        self.found = {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "anonymous_growth_mib": round((self._peak - self._base) / MIB),
            "left_growth_mib": round((anonymous_bytes() - self._base) / MIB),
        }

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self._peak = max(self._peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process and its children; shared pages count once."""
    process = psutil.Process()
    total = 0
    for pid in (process.pid, *(child.pid for child in process.children(recursive=True))):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
    return total * 1024


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def load_tokenizer(folder: Path):
    """Load the tokenizer that `train_tokenizer` wrote."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on the first rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(folder / "rows.jsonl", encoding="utf-8") as file:
        texts = [line for line, _ in zip(file, range(5000))]  # noqa: B905
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_rows(path: Path, num_rows: int, form: str) -> None:
    """Write rows of random words: a question of about 30 words and answers of about 50."""
    draw = random.Random(0)
    letters = "aaabcdeeeefghiiijklmnnooopqrsttuuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(NUM_WORDS)]
    weights = [1 / (rank + 5) for rank in range(NUM_WORDS)]
    pool = draw.choices(words, weights, k=1_000_000)

    def text(middle: int) -> str:
        size = max(3, int(draw.lognormvariate(0, 0.6) * middle))
        begin = draw.randrange(len(pool) - 2000)
        return " ".join(pool[begin : begin + min(size, 2000)])

    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            turns = [(text(20), text(40)) for _ in range(draw.randint(0, 2))]
            file.write(json.dumps(make_row(form, turns, f"{text(20)} {number}?", text)) + "\n")


def make_row(form: str, turns: list[tuple[str, str]], question: str, text) -> dict:
    """Return a row of `form` with the earlier `turns` and the last `question`."""
    if form == "prompt":
        return {"prompt": question}
    if form == "messages":
        messages = []
        for asked, said in [*turns, (question, text(50))]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said})
        return {"messages": messages}
    prompt = "".join(f"\n\nHuman: {asked}\n\nAssistant: {said}" for asked, said in turns)
    prompt += f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": prompt + text(50), "rejected": prompt + text(40)}


if __name__ == "__main__":
    main()
