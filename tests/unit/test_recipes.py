"""What e2e_rlhf.py makes of names: models, folders and the flags of each step, which the mains must accept."""

import importlib.util
import sys
from pathlib import Path

import pytest

from dschat.config.parse import parse_config
from dschat.config.recipes import check_arguments, resolve_model, size_name, step_flags
from dschat.config.steps import PPOConfig, RewardConfig, SFTConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {1: SFTConfig, 2: RewardConfig, 3: PPOConfig}


@pytest.fixture(scope="module")
def e2e():
    spec = importlib.util.spec_from_file_location("e2e_rlhf", ROOT / "e2e_rlhf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name,expected",
    [
        ("", ("demo", "smollm2-135m")),
        ("tiny-llama", ("tiny", "llama")),
        ("1.3b", ("real", "facebook/opt-1.3b")),
        ("opt-1.3b", ("real", "facebook/opt-1.3b")),
        ("facebook/opt-66b", ("real", "facebook/opt-66b")),
        ("llama-2-7b", ("real", "meta-llama/Llama-2-7b-hf")),
        ("owner/model", ("real", "owner/model")),
        ("./model", ("real", "./model")),
    ],
)
def test_names_of_models(name, expected):
    assert resolve_model(name) == expected


def test_a_folder_without_a_slash_is_found_and_a_name_of_nothing_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("mine") == ("real", "mine")
    with pytest.raises(ValueError, match="'1.4b' is no known model.*1.3b"):
        resolve_model("1.4b")


def test_folder_names_are_plain():
    assert size_name("facebook/opt-1.3b") == "1.3b"
    assert size_name("/a b/my model/") == "my_model"
    assert size_name("../..") == "model"


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("kind", ["demo", "tiny", "real"])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("single_gpu", [False, True])
def test_the_mains_accept_every_recipe(step, kind, on_gpu, single_gpu):
    flags = step_flags(step, kind=kind, on_gpu=on_gpu, single_gpu=single_gpu, actor_stage="", reward_stage="2")
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "b"]
    config = parse_config(CONFIGS[step], flags + (models if step == 3 else ["--model_name_or_path", "a"]))
    system = config.critic_system if step == 3 else config.system
    assert system.zero_stage == (2 if step > 1 else 0 if single_gpu or kind != "real" else 3)


def test_commands_of_real_sizes(e2e):
    args = e2e.parse_args(
        "--actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type multi_node "
        "--hostfile hosts --output-dir out --actor-zero-stage 2 --data-path rows.jsonl".split()
    )
    plan = e2e.make_plan(args)
    output = Path(args.output_dir)
    assert plan.outputs == {
        1: output / "actor-models" / "1.3b",
        2: output / "reward-models" / "350m",
        3: output / "step3-models" / "1.3b",
    }
    words = e2e.step_command(3, plan, args, on_gpu=True)
    assert words[0].endswith("step3_rlhf_finetuning/main.py")
    config = parse_config(PPOConfig, words[1:])
    assert config.model.actor_model_name_or_path == str(plan.outputs[1])
    assert config.model.critic_model_name_or_path == str(plan.outputs[2])
    assert (config.system.actor_zero_stage, config.system.critic_zero_stage) == (2, 3)
    assert config.data.data_path == ["rows.jsonl"]
    launch = e2e.launcher(args, on_gpu=True, port=29500)
    assert launch[1:3] == ["-m", "deepspeed.launcher.runner"] and launch[-2:] == ["--hostfile", "hosts"]


def test_the_launcher_counts_processes_by_deployment(e2e):
    def words(text, on_gpu):
        return e2e.launcher(e2e.parse_args(text.split()), on_gpu=on_gpu, port=29500)[5:]

    assert words("", True) == ["--num_gpus", "1"]
    assert words("--deployment-type single_node", True) == []
    assert words("--deployment-type single_node --num-processes 4", True) == ["--num_gpus", "4"]
    assert words("", False) == ["--num_accelerators", "1"]
    assert words("--num-processes 2", False) == ["--num_accelerators", "2"]


def test_models_that_do_not_go_together_are_refused(e2e):
    with pytest.raises(ValueError, match="--actor-model 1.3b and --reward-model tiny-opt"):
        e2e.make_plan(e2e.parse_args("--actor-model 1.3b --reward-model tiny-opt".split()))


def test_what_is_in_the_way_of_a_run_is_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as refused:
        check_arguments(str(tmp_path / "file"), num_processes=-2, num_gpus=0, save_interval=-1, hostfile="none")
    processes, interval, hosts, output = str(refused.value).splitlines()
    assert (processes, interval) == ("--num-processes -2: must be at least 0.", "--save-interval -1: must be at least 0.")
    assert hosts.startswith("--hostfile none: no such file") and "slots=8" in hosts
    assert output == f"--output-dir {tmp_path}/file: no folder that can be written (File exists). Give another."
    with pytest.raises(ValueError, match=r"--num-processes 3: this machine shows 2 GPU\(s\)"):
        check_arguments(str(tmp_path / "out"), num_processes=3, num_gpus=2, save_interval=0, hostfile=None)
    check_arguments(str(tmp_path / "out"), num_processes=3, num_gpus=0, save_interval=0, hostfile=None)
    assert (tmp_path / "out").is_dir()


def test_the_command_ends_with_these_words(e2e, tmp_path, monkeypatch):
    command = ["e2e_rlhf.py", "--actor-model", "tiny-llama", "--num-processes", "-2", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(e2e, "set_up_logging", lambda: None)
    with pytest.raises(ValueError, match="--num-processes -2: must be at least 0"):
        e2e.main()
    assert not list((tmp_path / "out").iterdir())
