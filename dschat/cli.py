"""The command `dschat`: every program by a short name, from any folder.

    dschat sft --model_name_or_path facebook/opt-125m --data_path rows.jsonl --output_dir output/sft
    dschat ppo --num_gpus 4 -- --actor_model_name_or_path output/sft ...

The training steps start under DeepSpeed's launcher; words before ``--`` are the launcher's.
"""

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Program:
    """A program of the project."""

    target: str  # a module, or a file below `programs_folder`
    summary: str
    launched: bool = False  # under DeepSpeed's launcher


PROGRAMS = {
    "sft": Program(
        "training/step1_supervised_finetuning/main.py", "step 1: supervised fine-tuning", True
    ),
    "reward": Program(
        "training/step2_reward_model_finetuning/main.py", "step 2: reward model", True
    ),
    "dpo": Program("training/step2_dpo_finetuning/main.py", "step 2: DPO", True),
    "ppo": Program("training/step3_rlhf_finetuning/main.py", "step 3: PPO and its kin", True),
    "e2e": Program("e2e_rlhf.py", "the three steps in a row"),
    "chat": Program("inference/chat.py", "chat in the terminal or on a page"),
    "plan": Program("dschat.plan", "the memory that a step needs"),
    "merge": Program("dschat.merge", "an adapter and its base as one model"),
    "doctor": Program("dschat.doctor", "what this machine lacks"),
    "inspect": Program("dschat.data.inspect", "what a data set looks like to the steps"),
    "report": Program("dschat.report", "pictures and tables of finished runs"),
    "rollouts": Program("dschat.rollouts", "answers that a PPO run has learned from"),
}


def programs_folder() -> Path:
    """Return the folder of the programs: the repository, or their copy in an installed package."""
    repository = PACKAGE.parent
    if (repository / "e2e_rlhf.py").is_file() and (repository / "training").is_dir():
        return repository
    return PACKAGE / "programs"


def command_of(name: str, words: list[str]) -> list[str]:
    """Return the command line of a program.

    Args:
        name: a key of PROGRAMS.
        words: the flags; for a training step, the launcher's words may come first, before "--".
    """
    program = PROGRAMS[name]
    if not program.target.endswith(".py"):
        return [sys.executable, "-m", program.target, *words]
    file = str(programs_folder() / program.target)
    if not program.launched or "--help" in words or "-h" in words:
        return [sys.executable, file, *words]
    launcher_words: list[str] = []
    if "--" in words:
        place = words.index("--")
        launcher_words, words = words[:place], words[place + 1 :]
    return [sys.executable, "-m", "dschat.engine.deepspeed_runner", *launcher_words, file, *words]


def usage() -> str:
    """Return the help text."""
    lines = ["usage: dschat PROGRAM [flags]", ""]
    lines += [f"  {name:<8} {program.summary}" for name, program in PROGRAMS.items()]
    lines += ["", "dschat PROGRAM --help lists the flags of a program."]
    return "\n".join(lines)


def version() -> str:
    """Return the version of the installed package."""
    try:
        return metadata.version("dschat")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """Run the program that the first word names, in place of this process."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        print(f"dschat {version()}")
        return
    if words[0] not in PROGRAMS:
        sys.exit(f"dschat: no program {words[0]!r}.\n\n{usage()}")
    command = command_of(words[0], words[1:])
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
