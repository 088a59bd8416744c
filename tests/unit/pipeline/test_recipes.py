"""e2e_rlhf.py: model names, folders and the flags of each step, which the mains must accept."""

import sys
from pathlib import Path

import pytest

from dschat.config.parse import parse_config
from dschat.config.ppo import PPOConfig
from dschat.config.reward import RewardConfig
from dschat.config.sft import SFTConfig
from dschat.demo.tiny_models import byte_tokenizer, make_tiny_model
from dschat.pipeline.arguments import check_arguments, resolve_model, size_name
from dschat.pipeline.recipes import step_flags
from dschat.pipeline.records import differences

CONFIGS = {1: SFTConfig, 2: RewardConfig, 3: PPOConfig}


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


def test_a_folder_without_a_slash_is_found_and_an_unknown_name_is_refused(tmp_path, monkeypatch):
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
    flags = step_flags(
        step, kind=kind, on_gpu=on_gpu, single_gpu=single_gpu, actor_stage="", reward_stage="2"
    )
    models = ["--actor_model_name_or_path", "a", "--critic_model_name_or_path", "b"]
    config = parse_config(
        CONFIGS[step], flags + (models if step == 3 else ["--model_name_or_path", "a"])
    )
    system = config.critic_system if step == 3 else config.system
    stage = 2
    if step == 1:
        stage = 3 if kind == "real" and not single_gpu else 0
    assert system.zero_stage == stage


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_loggers_go_to_every_step(step, e2e):
    args = e2e.parse_args("--report-to csv tensorboard".split())
    outputs = {number: Path(f"out{number}") for number in e2e.MAINS}
    plan = e2e.Plan("demo", "a", "b", {number: [] for number in e2e.MAINS}, outputs)
    words = e2e.step_command(step, plan, args, on_gpu=False)
    assert parse_config(CONFIGS[step], words[1:]).run.loggers == ["csv", "tensorboard"]
    # They change no result, so they may change when a run continues.
    assert differences(words, e2e.step_command(step, plan, e2e.parse_args([]), on_gpu=False)) == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_step_fits_itself_to_the_gpu_unless_told_otherwise(step, e2e):
    outputs = {number: Path(f"out{number}") for number in e2e.MAINS}
    plan = e2e.Plan("demo", "a", "b", {number: [] for number in e2e.MAINS}, outputs)

    def command(*words, on_gpu=True):
        return e2e.step_command(step, plan, e2e.parse_args(list(words)), on_gpu=on_gpu)

    def fit(words):
        return parse_config(CONFIGS[step], words[1:]).run.fit

    assert [fit(command()), fit(command("--fit", "none"))] == ["auto", "none"]
    assert fit(command(on_gpu=False)) == "none"
    assert differences(command(), command("--fit", "none")) == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_precision_goes_to_every_step(step, e2e):
    def dtype(*words):
        args = e2e.parse_args(list(words))
        plan = e2e.Plan(kind, "a", "b", {number: [] for number in e2e.MAINS}, outputs)
        return parse_config(
            CONFIGS[step], e2e.step_command(step, plan, args, on_gpu=False)[1:]
        ).model.dtype

    outputs = {number: Path(f"out{number}") for number in e2e.MAINS}
    for kind, default in (("demo", "auto"), ("tiny", "fp32"), ("real", "auto")):
        assert [dtype(), dtype("--dtype", "bf16")] == [default, "bf16"]


def test_commands_of_real_sizes(e2e):
    args = e2e.parse_args(
        "--actor-model facebook/opt-1.3b --reward-model facebook/opt-350m "
        "--deployment-type multi_node --hostfile hosts --output-dir out --actor-zero-stage 2 "
        "--data-path rows.jsonl".split()
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
    assert launch[1:3] == ["-m", "dschat.engine.deepspeed_runner"] and launch[-2:] == [
        "--hostfile",
        "hosts",
    ]


def test_the_launcher_counts_processes_by_deployment(e2e, monkeypatch):
    def words(text, on_gpu):
        return e2e.launcher(e2e.parse_args(text.split()), on_gpu=on_gpu, port=29500)[5:]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here = ["--hostfile", ""]  # not DeepSpeed's default hostfile
    assert words("", True) == [*here, "--num_gpus", "1"]
    assert words("--deployment-type single_node", True) == here
    assert words("--deployment-type single_node --num-processes 4", True) == [
        *here,
        "--num_gpus",
        "4",
    ]
    assert words("", False) == [*here, "--num_accelerators", "1"]
    assert words("--num-processes 2", False) == [*here, "--num_accelerators", "2"]
    assert words("--deployment-type multi_node", True) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert words("", True) == [*here, "--include", "localhost:3"]
    assert words("--deployment-type single_node --num-processes 2", True) == [
        *here,
        "--include",
        "localhost:3,5",
    ]
    assert words("--deployment-type single_node", True) == here
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-8932f937: .*numbers"):
        words("", True)


def test_models_that_do_not_fit_together_are_refused(e2e):
    with pytest.raises(ValueError, match="--actor-model 1.3b and --reward-model tiny-opt"):
        e2e.make_plan(e2e.parse_args("--actor-model 1.3b --reward-model tiny-opt".split()))


@pytest.mark.parametrize(
    "actor, expected",
    [
        ("1.3b", "facebook/opt-350m"),
        ("AdamG012/chat-opt-1.3b-sft-deepspeed", "facebook/opt-350m"),
        ("an opt folder", "facebook/opt-350m"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("owner/adopt-1b", "owner/adopt-1b"),
        ("an opt-125m that is a llama", "an opt-125m that is a llama"),
        ("no model", "no model"),
    ],
)
def test_the_default_reward_model_follows_the_actor(actor, expected, e2e, tmp_path, monkeypatch):
    for name, kind in (
        ("an opt folder", "opt"),
        ("an opt-125m that is a llama", "llama"),
        ("no model", ""),
    ):
        (tmp_path / name).mkdir()
        if kind:
            (tmp_path / name / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    monkeypatch.chdir(tmp_path)
    plan = e2e.make_plan(e2e.parse_args(["--actor-model", actor]))
    assert plan.reward == expected and plan.outputs[2].name == size_name(expected)
    assert (
        e2e.make_plan(e2e.parse_args(["--actor-model", actor, "--reward-model", "125m"])).reward
        == "facebook/opt-125m"
    )


def test_a_critic_that_cannot_read_the_actors_tokens_is_refused_before_step_1(
    e2e, tmp_path, monkeypatch, capsys
):
    actor = make_tiny_model(tmp_path / "actor", family="opt")
    other = make_tiny_model(tmp_path / "other", family="opt", pad_is_eos=True)
    ran = []
    monkeypatch.setattr(e2e, "build_ops", lambda **_: 0.0)
    monkeypatch.setattr(e2e, "set_up_logging", lambda: None)
    monkeypatch.setattr(e2e, "run_steps", lambda args, plan, **_: ran.append(plan.reward) or {})

    def main(*words):
        monkeypatch.setattr(
            sys, "argv", ["e2e_rlhf.py", "--output-dir", str(tmp_path / "out"), *words]
        )
        e2e.main()

    pair = ("--actor-model", str(actor), "--reward-model", str(other))
    with pytest.raises(
        ValueError,
        match=r"--reward-model .*/other: .*\(260 tokens\) .* --actor-model .*/actor \(259 tokens\)",
    ):
        main(*pair)
    assert ran == []
    main(*pair, "--step", "1", "2")  # without step 3 the models need not fit
    assert ran == [str(other)] and f"--reward-model {other}" in capsys.readouterr().out
    # Without a tokenizer: step 2 reports it.
    main("--actor-model", str(actor), "--reward-model", str(tmp_path))
    # A padding token that step 2 adds does not count as a difference.
    tokenizer = byte_tokenizer(pad_is_eos=True)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(actor)
    main(*pair)
    assert ran == [str(other), str(tmp_path), str(other)] and capsys.readouterr().out == ""


def test_all_bad_arguments_are_named_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as refused:
        check_arguments(
            str(tmp_path / "file"), num_processes=-2, num_gpus=0, save_interval=-1, hostfile="none"
        )
    processes, interval, hosts, output = str(refused.value).splitlines()
    assert (processes, interval) == (
        "--num-processes -2: must be at least 0.",
        "--save-interval -1: must be at least 0.",
    )
    assert hosts.startswith("--hostfile none: no such file") and "slots=8" in hosts
    assert (
        output
        == f"--output-dir {tmp_path}/file: not a writable folder (File exists). Give another."
    )
    with pytest.raises(ValueError, match=r"--num-processes 3: this machine has 2 GPU\(s\)"):
        check_arguments(
            str(tmp_path / "out"), num_processes=3, num_gpus=2, save_interval=0, hostfile=None
        )
    check_arguments(
        str(tmp_path / "out"), num_processes=3, num_gpus=0, save_interval=0, hostfile=None
    )
    with pytest.raises(ValueError, match="--max-restarts 2 needs --save-interval"):
        check_arguments(
            str(tmp_path / "out"),
            num_processes=1,
            num_gpus=0,
            save_interval=0,
            hostfile=None,
            max_restarts=2,
        )
    hosts = tmp_path / "hosts"
    hosts.touch()
    options = dict(num_gpus=None, save_interval=0, hostfile=str(hosts))
    check_arguments(str(tmp_path / "out"), num_processes=0, several_hosts=True, **options)
    for several, number, message in (
        (False, 0, "--deployment-type multi_node"),
        (True, 2, "--num-processes 2: with multi_node"),
    ):
        with pytest.raises(ValueError, match=message):
            check_arguments(
                str(tmp_path / "out"), num_processes=number, several_hosts=several, **options
            )
    assert (tmp_path / "out").is_dir()


def test_the_command_reports_bad_arguments(e2e, tmp_path, monkeypatch):
    command = [
        "e2e_rlhf.py",
        "--actor-model",
        "tiny-llama",
        "--num-processes",
        "-2",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(e2e, "set_up_logging", lambda: None)
    with pytest.raises(ValueError, match="--num-processes -2: must be at least 0"):
        e2e.main()
    assert not list((tmp_path / "out").iterdir())
