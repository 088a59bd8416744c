"""The miniature models and the toy data that the launched cases share."""

import json
import shutil
from pathlib import Path

import torch
from experience import write_experience
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from dschat.data.collate import collate_text
from dschat.data.datasets import SFTDataset
from dschat.data.prompt_files import read_rows
from dschat.demo.tiny_models import make_tiny_model
from dschat.demo.toy import write_toy_data
from dschat.models.causal_lm import load_causal_lm
from dschat.models.export import save_pretrained_folder
from dschat.models.families import FAMILIES
from dschat.models.forward import forward_logits
from dschat.models.reward_model import load_reward_model
from dschat.models.tokenizer import load_tokenizer

MAX_LEN = 48  # tokens; the longest toy text has 27
PAD_IS_EOS = ("gpt2", "gpt_neox")  # as their published tokenizers, which have no padding token
SFT_STEPS = 30
TOKENIZER_AND_CONFIG = ("tokenizer.json", "tokenizer_config.json", "config.json")
REWARDS = """
def number(prompts, answers, *, number, **columns):
    # The function raises if a prompt comes with another row's number.
    assert [f"item {n}" for n in number] == prompts
    return [100 * n + 0.25 * len(answer) for n, answer in zip(number, answers)]

def vowels(prompts, answers, **columns):
    return [0.5 * sum(letter in "aeiou" for letter in answer) - 1 for answer in answers]

def quarter(prompts, answers, **columns):
    return [0.25] * len(answers)
"""


def write_stock(folder: Path, *, matrix_model: str | None = None) -> Path:
    """Write models and data, and return `folder`.

    toy/ holds rows, items/ prompts with a column, rewards.py functions of answers, texts.jsonl
    texts for PTX; fp16.json, sgd.json and pieces.json are each a --deepspeed_config. steep/FAMILY
    has weights of deviation 0.5, whose greedy answers are of many different tokens. base/FAMILY,
    sft/FAMILY (which mostly ends its answers) and reward/FAMILY are models; sft-eot/ and
    reward-eot/ are those of --add_eot_token. matrix/ has actor and critic of test_step3_matrix.py.
    faulty/ holds mistakes of users. without/pad-KIND and without/bos-KIND are base and sft models
    whose tokenizers have no such token. experience.py writes the rest.
    """
    write_toy_data(folder / "toy", num_train=64, num_eval=16)
    _write_items(folder / "items")
    (folder / "rewards.py").write_text(REWARDS)
    # At the usual threshold ZeRO-3 would keep every parameter of a miniature model whole.
    (folder / "pieces.json").write_text(
        json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    )
    # The usual first loss scale of 2^16 overflows for longer than these runs last.
    (folder / "fp16.json").write_text(json.dumps({"fp16": {"initial_scale_power": 8}}))
    (folder / "sgd.json").write_text(
        json.dumps({"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0})
    )
    texts = [f"{word} " * 40 for word in ("one", "two", "three", "four")]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    for family in FAMILIES:
        base = make_tiny_model(
            folder / "base" / family, family=family, pad_is_eos=family in PAD_IS_EOS
        )
        make_tiny_model(folder / "steep" / family, family=family, std=0.5)
        for kind in ("", "-eot"):
            sft, reward = (folder / f"{name}{kind}" / family for name in ("sft", "reward"))
            _write_sft(str(base), folder / "toy" / "train.jsonl", sft, add_eot_token=bool(kind))
            _write_reward(str(sft), reward)
    _write_reward(str(folder / "base" / "llama"), folder / "reward-base" / "llama")
    _write_matrix(folder / "matrix", matrix_model)
    write_experience(folder)
    for kind in ("base", "sft"):
        _write_without(("pad", "bos"), folder / kind / "llama", folder / "without")
    _write_faulty(folder)
    return folder


def _write_items(folder: Path) -> None:
    """Write prompts that contain their column `number`."""
    folder.mkdir()
    for name, numbers in (("train", range(64)), ("eval", range(64, 80))):
        rows = [{"prompt": f"item {number}", "number": number} for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_sft(base: str, rows: Path, path: Path, *, add_eot_token: bool) -> None:
    tokenizer = load_tokenizer(base, add_eot_token=add_eot_token)
    model = load_causal_lm(base, dtype=torch.float32)
    data = SFTDataset(
        read_rows(str(rows), flag="rows"),
        tokenizer,
        max_seq_len=MAX_LEN,
        prompt_format="plain",
        end_token_id=tokenizer.eos_token_id,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(SFT_STEPS):
        items = [data[(16 * step + i) % len(data)] for i in range(16)]
        batch = collate_text(items, pad_id=tokenizer.pad_token_id)
        logits = forward_logits(
            model, model, input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_pretrained_folder(model, dict(model.state_dict()), tokenizer, path)


def _write_reward(sft: str, path: Path) -> None:
    tokenizer = load_tokenizer(sft)
    torch.manual_seed(1)
    model = load_reward_model(sft, dtype=torch.float32, tokenizer=tokenizer)
    save_pretrained_folder(model, dict(model.state_dict()), tokenizer, path)


def _write_matrix(folder: Path, model: str | None) -> None:
    """Write actor/, the given model or an OPT with varied answers, and critic/, with a head."""
    folder.mkdir()
    if model is None:
        make_tiny_model(folder / "actor", family="opt", std=0.5)
    else:
        (folder / "actor").symlink_to(Path(model).resolve(), target_is_directory=True)
    _write_reward(str(folder / "actor"), folder / "critic")


def _write_without(roles: tuple[str, ...], model: Path, folder: Path) -> None:
    for role in roles:
        path = shutil.copytree(model, folder / f"{role}-{model.parent.name}")
        core, settings, config = (
            json.loads((path / name).read_text()) for name in TOKENIZER_AND_CONFIG
        )
        token = settings.pop(f"{role}_token")
        # Remove unused tokens of that name too.
        core["model"]["vocab"]["<unused>"] = core["model"]["vocab"].pop(token)
        core["added_tokens"] = [
            added for added in core["added_tokens"] if added["content"] != token
        ]
        if role == "bos":
            core["post_processor"] = None
        config[f"{role}_token_id"] = None
        for name, content in zip(TOKENIZER_AND_CONFIG, (core, settings, config)):
            (path / name).write_text(json.dumps(content))


def _write_faulty(folder: Path) -> None:
    faulty = folder / "faulty"
    faulty.mkdir()
    lines = (folder / "toy" / "train.jsonl").read_text().splitlines()
    (faulty / "broken.jsonl").write_text(
        "\n".join([*lines[:2], '{"prompt": "the film', *lines[3:]]) + "\n"
    )
    (faulty / "no-pairs.jsonl").write_text(
        '{"prompt": "a", "chosen": " b"}\n{"prompt": "c", "chosen": " d"}\n'
    )
    shutil.copytree(
        folder / "base" / "llama",
        faulty / "no-weights",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    shutil.copytree(
        folder / "base" / "llama",
        faulty / "no-tokenizer",
        ignore=shutil.ignore_patterns("tokenizer*"),
    )
    (faulty / "file").write_text("")
    (faulty / "empty.jsonl").write_text("\n\n")
    good = '{"prompt": "a", "chosen": " b", "rejected": " c"}'
    many = [
        good,
        '{"remark": "a"}',
        '{"prompt": {"a": 7}, "chosen": " b"}',
        '{"prompt": "a", "chosen": " \\u200b\\n"}',
    ]
    many += [
        '{"prompt": "a", "chosen": " b", "rejected": "b "}',
        "[1]",
        '{"prompt": "a", "rejected": " b"}',
    ]
    many += ['{"prompt": "\\ud800", "chosen": " b"}', "{"]
    (faulty / "many.jsonl").write_text("\n".join(many) + "\n")
    (faulty / "latin.jsonl").write_bytes(
        good.encode() + b"\n" + '{"prompt": "café", "chosen": " b"}'.encode("latin-1")
    )
    for name, prompt in (("unseen", " \u200b\ufeff\u2060"), ("huge", "word " * 2**19)):
        # Four prompts, so that one can be held out.
        rows = [json.loads(good) | {"prompt": text} for text in ("a", prompt, "c", "d")]
        rows = [json.dumps(row) for row in rows]
        (faulty / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    (faulty / "rewards.py").write_text(
        "def constant(prompts, answers, **columns):\n    return [0.0] * len(answers)\n"
    )
    (faulty / "ending.py").write_text("raise SystemExit(0)\n")
    (faulty / "halves.json").write_text('{"fp16": {"enabled": true}, "bf16": {"enabled": true}}')
    (faulty / "broken.py").write_text("f = 1 / 0\n")
    _write_faulty_models(folder)


def _write_faulty_models(folder: Path) -> None:
    base, faulty = folder / "base" / "llama", folder / "faulty"
    for name in ("no-eos", "no-config", "pickled", "cut"):
        shutil.copytree(base, faulty / name)
    (faulty / "no-config" / "config.json").unlink()
    weights = base / "model.safetensors"
    (faulty / "cut" / "model.safetensors").write_bytes(
        weights.read_bytes()[: weights.stat().st_size // 2]
    )
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (faulty / "no-eos" / "tokenizer_config.json").write_text(json.dumps(config))
    _write_wide_tokenizers(folder)
    for kind, name in (("sft", "model.norm.weight"), ("reward", "score.weight")):
        path = shutil.copytree(folder / kind / "llama", faulty / f"nan-{kind}")
        tensors = load_file(path / "model.safetensors")
        tensors[name][..., 0] = float("nan")
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (faulty / "pickled" / "model.safetensors").unlink()
    torch.save(
        {"model.embed_tokens.weight": Malicious(folder / "was-run")},
        faulty / "pickled" / "pytorch_model.bin",
    )
    shutil.copytree(faulty / "pickled", faulty / "pickled-reward")
    torch.save(
        {"v_head.weight": Malicious(folder / "was-run")},
        faulty / "pickled-reward" / "pytorch_model.bin",
    )
    LoraConfig(base_model_name_or_path=str(base), task_type="CAUSAL_LM").save_pretrained(
        faulty / "pickled-adapter"
    )
    torch.save(
        {"weight": Malicious(folder / "was-run")}, faulty / "pickled-adapter" / "adapter_model.bin"
    )


def _write_wide_tokenizers(folder: Path) -> None:
    """Write models whose tokenizers have 40 tokens more than the embeddings have rows."""
    for kind in ("sft", "reward"):
        path = shutil.copytree(folder / kind / "llama", folder / "faulty" / f"wide-{kind}")
        tokenizer = json.loads((path / "tokenizer.json").read_text())
        rows = json.loads((path / "config.json").read_text())["vocab_size"]
        tokenizer["model"]["vocab"] |= {f"word{number}": rows + number for number in range(40)}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))


class Malicious:
    """A pickle that runs code when it is read: it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
