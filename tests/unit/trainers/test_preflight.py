"""The memory plan before models load: logged, compared with the GPU, --dry_run and dschat.plan."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from dschat import plan
from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.sft import SFTConfig
from dschat.demo.tiny_models import make_tiny_model
from dschat.trainers import preflight

SFT = "--model_name_or_path llama-2-7b --zero_stage 2"


@pytest.fixture
def gpu_of_24_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=24 * 2**30)
    )


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(preflight.logger, "info", lines.append)
    return lines


def test_a_run_logs_its_plan_and_stops_if_it_does_not_fit(gpu_of_24_gib, said):
    with pytest.raises(ValueError, match="does not fit"):
        preflight.show_plan(parse_config(SFTConfig, SFT.split()), dtype="bf16")
    assert "memory plan" in said[0] and "of 24.0 GiB: does not fit" in said[0]
    preflight.show_plan(
        parse_config(SFTConfig, f"{SFT} --ignore_memory_plan".split()), dtype="bf16"
    )
    planned = preflight.show_plan(
        parse_config(SFTConfig, SFT.replace("llama-2-7b", "opt-125m").split()), dtype="bf16"
    )
    assert "of 24.0 GiB: fits" in said[2]
    assert f"it needs {planned['a GPU']:.1f} GiB on a GPU" in said[2] and planned["a host"] >= 0


def test_on_a_cpu_no_table_of_gpu_memory_is_shown(said):
    planned = preflight.show_plan(parse_config(SFTConfig, SFT.split()), dtype="bf16")
    assert planned == {} and len(said) == 1 and "none on a CPU" in said[0]


def test_a_dry_run_prints_the_deepspeed_configurations(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "ds.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    flags = (
        "--actor_model_name_or_path opt-1.3b --critic_model_name_or_path opt-350m "
        "--actor_zero_stage 3 --critic_zero_stage 2 --dtype fp16 "
        f"--per_device_training_batch_size 8 --deepspeed_config {tmp_path}/ds.json"
    )
    preflight.dry_run(parse_config(PPOConfig, flags.split()))
    printed = capsys.readouterr().out
    _, actor, critic = printed.split("DeepSpeed configuration of the ")
    actor, critic = (json.loads(text.partition(":\n")[2]) for text in (actor, critic))
    assert (actor["zero_optimization"]["stage"], critic["zero_optimization"]["stage"]) == (3, 2)
    assert (
        actor["train_batch_size"] == 32
        and actor["gradient_clipping"] == 0.5
        and actor["fp16"]["enabled"]
    )
    assert "for 4 GPU(s) in fp16; planned, not run" in printed


@pytest.mark.parametrize("value", ["abc", "0", "-1", ""])
def test_a_dry_run_needs_a_valid_world_size(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    config = parse_config(
        PPOConfig,
        ["--actor_model_name_or_path", "opt-1.3b", "--critic_model_name_or_path", "opt-350m"],
    )
    with pytest.raises(ValueError, match=f"WORLD_SIZE={value}: expected the number of GPUs"):
        preflight.dry_run(config)


def test_a_dry_run_does_not_access_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("the network was used")
    )
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda name, file: None)
    flags = "--actor_model_name_or_path some/actor --critic_model_name_or_path opt-9b"
    with pytest.raises(ValueError) as refused:
        preflight.dry_run(parse_config(PPOConfig, flags.split()))
    first, second = str(refused.value).splitlines()
    assert (
        first.startswith("--actor_model_name_or_path some/actor: --dry_run does not access the hub")
        and "facebook/opt-1.3b" in first
    )
    assert second.startswith("--critic_model_name_or_path opt-9b: ")
    with pytest.raises(ValueError, match="--model_name_or_path 'some/where/else' does not exist"):
        preflight.dry_run(parse_config(SFTConfig, ["--model_name_or_path", "some/where/else"]))
    model = str(make_tiny_model(tmp_path / "model", family="opt"))
    preflight.dry_run(parse_config(SFTConfig, ["--model_name_or_path", model]))


def test_a_dry_run_of_a_cached_model_does_not_access_the_hub(monkeypatch, tmp_path):
    asked = []
    # huggingface_hub retries after errors of the network, so a failing lookup would go unnoticed.
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *args, **kwargs: asked.append(host) or []
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    make_tiny_model(commit, family="opt")
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda name, file: str(commit / file))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base"})
    )
    with pytest.raises(ValueError, match="some/base"):
        preflight.dry_run(parse_config(SFTConfig, ["--model_name_or_path", str(adapter)]))
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    preflight.dry_run(parse_config(SFTConfig, ["--model_name_or_path", "some/model"]))
    assert asked == []


def test_dschat_plan(capsys):
    plan.main(
        "--step 3 --model llama-2-7b --gpus 8 --actor_zero_stage 3 --critic_zero_stage 3 "
        "--gpu_gib 80".split()
    )
    assert "of 80.0 GiB: fits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="does not fit.*of 24.0 GiB"):
        plan.main("--step 3 --model llama-2-7b --gpus 1 --gpu_gib 24".split())
    plan.main("--step dpo --model llama-2-7b --gpus 8 --zero_stage 3".split())
    assert "\nreference " in capsys.readouterr().out
    plan.main("--step 1 --sizes --gpus 16 --zero_stage 3".split())
    table = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in table[-9:]] == list(plan.SIZES) and all(
        "planned" in row for row in table[-9:]
    )


def test_a_card_has_less_usable_memory_than_its_name_says(capsys, monkeypatch):
    monkeypatch.setattr(plan, "SIZES", ("opt-1.3b",))
    for need, card in (
        (21.9, "24 GB"),
        (23.9, "32 GB"),
        (31.8, "40 GB"),
        (79.5, "141 GB"),
        (140.0, "none"),
    ):
        monkeypatch.setattr(plan, "needed_bytes", lambda found: need * 2**30)
        plan.main("--step 1 --sizes --gpus 1".split())
        assert capsys.readouterr().out.splitlines()[-1].split("  ")[-2].strip() == card


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--step 1 --model opt-9b", "no shape named 'opt-9b'; known: opt-125m"),
        ("--step 1", "--model is missing"),
        ("--step 1 --model opt-1.3b --gpus 0", "--gpus 0: must be at least 1"),
        ("--step 1 --model opt-1.3b --gpu_gib -5", "--gpu_gib -5.0: must be a number of GiB"),
        ("--step 1 --model opt-1.3b --host_gib nan", "--host_gib nan: must be a number of GiB"),
        ("--step 2 --model opt-1.3b --zero_stge 3", "--zero_stge: no flag of that name"),
        ("--step 1 --model ./nowhere", "'./nowhere' does not exist"),
    ],
)
def test_dschat_plan_names_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        plan.main(flags.split())


def test_the_guide_shows_what_the_planner_prints(capsys):
    guide = (Path(__file__).resolve().parents[3] / "docs" / "performance" / "memory.md").read_text()
    command = "--step 3 --model llama-2-7b --gpus 1 --gpu_gib 24"
    shown = guide.partition("```text\n")[2].partition("```")[0]
    assert f"python -m dschat.plan {command}\n" in guide
    with pytest.raises(ValueError) as refused:
        plan.main(command.split())
    printed = f"{capsys.readouterr().out}\nerror (rank 0): {refused.value}\n"
    assert shown == printed
    assert (
        "It fits with --actor_gradient_checkpointing --actor_zero_stage 3 --offload (21.5 GiB on "
        "each GPU" in shown
    )


@pytest.fixture
def host_of_400_gib(monkeypatch):
    host = SimpleNamespace(total=400 * 2**30)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: host)


def test_fit_auto_takes_the_mildest_flags_that_keep_what_is_learned(
    gpu_of_24_gib, host_of_400_gib, said
):
    flags = "--model_name_or_path llama-2-7b --per_device_train_batch_size 8 --fit auto "
    lora = "--lora_dim 8 --only_optimize_lora"
    config = preflight.fitted(parse_config(SFTConfig, (flags + lora).split()))
    assert "--fit auto: the run needs " in said[0] and " of 24.0 GiB" in said[0]
    assert "--gradient_checkpointing" in said[0] and len(said) == 1
    rows = config.batch.per_device_train_batch_size
    assert rows * config.schedule.gradient_accumulation_steps == 8
    assert config.system.gradient_checkpointing and not config.system.offload
    assert config.system.frozen_format == "none" and config.lora.lora_dim == 8
    preflight.show_plan(config, dtype="bf16")  # it fits
    again = preflight.fitted(config)
    assert again == config and "fits as it is" in said[-1]
    # Adapters or rounded weights would change what is learned, and nothing else is enough.
    words = f"{flags} --zero_stage 2".replace("llama-2-7b", "llama-2-70b").split()
    whole = parse_config(SFTConfig, words)
    assert preflight.fitted(whole) is whole
    assert "no flags that keep the results" in said[-1]


def test_fit_auto_in_step_3_keeps_the_rows_of_a_rollout(gpu_of_24_gib, host_of_400_gib, said):
    flags = (
        "--actor_model_name_or_path opt-1.3b --critic_model_name_or_path opt-350m --fit auto "
        "--per_device_generation_batch_size 16 --per_device_training_batch_size 16"
    )
    before = parse_config(PPOConfig, flags.split())
    config = preflight.fitted(before)
    assert len(said) == 1 and "so it takes --" in said[0] and config != before
    assert (config.rollout_rows, config.rows_per_update) == (16, 16)
    assert config.lora == before.lora and config.system.quantize_frozen == "none"
    preflight.show_plan(config, dtype="bf16")


def test_fit_auto_does_nothing_on_a_cpu(said):
    config = parse_config(SFTConfig, f"{SFT} --fit auto".split())
    assert preflight.fitted(config) is config and said == ["--fit auto has no effect on a CPU"]
