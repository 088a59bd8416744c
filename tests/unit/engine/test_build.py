"""Setup before deepspeed.initialize, and AdamW's groups; no process group."""

import json
import socket
from datetime import timedelta

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from dschat.engine import build
from dschat.engine import device as device_module
from dschat.engine.build import override
from dschat.engine.device import resolve_dtype
from dschat.engine.optim import BETAS, adamw


def write(path, value) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


class Cards:
    """An accelerator of two devices."""

    device_name = staticmethod(lambda: "cuda")
    device_count = staticmethod(lambda: 2)


PLACE = dict(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(build, "get_accelerator", Cards)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"LOCAL_RANK 2: .* 2 cuda device\(s\).*CUDA_VISIBLE_DEVICES"
    ):
        build.start_processes()


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            **PLACE,
            "RANK": "0",
            "LOCAL_RANK": "0",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ValueError,
            match=f"MASTER_ADDR:MASTER_PORT 127.0.0.1:{port}: .*in use.*Give a free port",
        ):
            build.start_processes()


@pytest.mark.parametrize(
    "minutes, timeout", [(None, {"timeout": timedelta(minutes=30)}), ("45", {})]
)
def test_others_wait_while_the_first_process_writes_a_large_model(minutes, timeout, monkeypatch):
    given = []

    def group(**options):
        given.append(options)
        raise torch.distributed.DistNetworkError("far enough")

    monkeypatch.setattr(build.deepspeed, "init_distributed", group)
    monkeypatch.setattr(build, "load_ops_of_every_run", lambda: None)
    for name, value in {**PLACE, "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if minutes:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    with pytest.raises(ValueError, match="far enough"):
        build.start_processes()
    assert given == [timeout]


def test_override_merges_key_by_key_and_changes_neither(tmp_path):
    ours = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    kept = json.loads(json.dumps(ours))
    theirs = {
        "zero_optimization": {
            "stage": 1,
            "offload_optimizer": {"pin_memory": True},
            "overlap_comm": False,
        },
        "bf16": False,
        "seed": 1,
    }
    assert override(ours, write(tmp_path / "ds.json", theirs)) == {
        "bf16": False,
        "zero_optimization": {
            "stage": 1,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "overlap_comm": False,
        },
        "seed": 1,
    }
    assert ours == kept


def test_override_without_a_file_is_the_same_dictionary():
    ours = {"bf16": {"enabled": True}}
    assert override(ours, None) is ours


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        ("{'stage': 2}", "Expecting property name"),
        ([1, 2], "expected a JSON object, found list"),
        ({"zero_optimization": 7}, "zero_optimization is 7, not an object"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization: stage Input should be 0, 1, 2"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
    ],
)
def test_override_names_the_flag_the_file_and_the_fault(tmp_path, content, words):
    path = str(tmp_path / "ds.json") if content is None else write(tmp_path / "ds.json", content)
    with pytest.raises(ValueError) as error:
        override({}, path)
    assert f"--deepspeed_config {path}: " in str(error.value) and words in str(error.value)


@pytest.fixture
def device(monkeypatch):
    """Sets which precisions the device has."""

    def set_to(*, bf16: bool, fp16: bool) -> None:
        monkeypatch.setattr(get_accelerator(), "is_bf16_supported", lambda: bf16)
        # The CPU's says None for no.
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True if fp16 else None)

    return set_to


@pytest.mark.parametrize(
    "bf16, fp16, found", [(True, True, "bf16"), (False, True, "fp16"), (True, False, "bf16")]
)
def test_auto_is_what_the_device_does_best(device, bf16, fp16, found, monkeypatch):
    device(bf16=bf16, fp16=fp16)
    monkeypatch.setattr(device_module, "on_cpu", lambda: False)
    assert resolve_dtype("auto") == found


@pytest.mark.parametrize(
    "unit, least, found, reason",
    [
        ("amx_bf16", 1, "bf16", "this CPU has instructions for it (amx_bf16)"),
        ("", 0, "fp32", "this CPU has no instructions for bf16"),
        ("amx_bf16", 0, "fp32", "the CPU of another rank has no instructions for bf16"),
    ],
)
def test_auto_on_a_cpu_is_bf16_only_with_instructions_for_it(
    unit, least, found, reason, shown, monkeypatch
):
    monkeypatch.setattr(device_module, "bf16_unit", lambda: unit)
    monkeypatch.setattr(device_module.dist, "all_reduce", lambda value, op: torch.tensor(least))
    assert resolve_dtype("auto") == found
    assert len(shown) == 1 and shown[0].startswith(f"--dtype auto is {found} here: {reason}")
    assert resolve_dtype("fp32") == "fp32" and len(shown) == 1
    # A run that continues keeps its precision: its optimizer's states would not fit another.
    for saved in ("bf16", "fp32"):
        assert resolve_dtype("auto", saved=saved) == saved


def test_a_precision_that_the_device_lacks_is_an_error_with_the_ones_it_has(device):
    device(bf16=True, fp16=False)
    assert [resolve_dtype(name) for name in ("bf16", "fp32")] == ["bf16", "fp32"]
    with pytest.raises(ValueError, match=r"--dtype fp16: this \w+ has none. Give bf16 or fp32."):
        resolve_dtype("fp16")
    device(bf16=False, fp16=False)
    with pytest.raises(ValueError, match=r"--dtype bf16: this \w+ has none. Give fp32."):
        resolve_dtype("bf16")


@pytest.mark.parametrize("stage, expected", [(0, False), (2, False), (3, True)])
def test_only_stage_3_loads_into_partitions(stage, expected):
    from transformers.integrations import is_deepspeed_zero3_enabled

    config = {"zero_optimization": {"stage": stage}, "train_batch_size": 1}
    with build.partitioned_loading(config):
        assert is_deepspeed_zero3_enabled() == expected
    assert not is_deepspeed_zero3_enabled()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(4, 3),
            nn.LayerNorm(3),
            nn.Linear(3, 2, bias=False),
        )


def groups(model, **more) -> dict[tuple[float, float], set[str]]:
    """(rate, decay) -> names."""
    options = dict(
        learning_rate=1e-3,
        weight_decay=0.1,
        lora_names=set(),
        lora_learning_rate=5e-2,
        cpu_offload=False,
    )
    optimizer = adamw(model, **{**options, **more})
    assert isinstance(optimizer, torch.optim.AdamW) and all(
        g["betas"] == BETAS for g in optimizer.param_groups
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        (g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]}
        for g in optimizer.param_groups
    }


def test_matrices_decay_vectors_do_not_and_lora_has_its_own_rate():
    model = Small()
    model.norm.weight.requires_grad_(False)
    assert groups(model, lora_names={"last.weight"}) == {
        (1e-3, 0.1): {"first.weight"},
        (1e-3, 0.0): {"first.bias", "norm.bias"},
        (5e-2, 0.1): {"last.weight"},
    }


def test_a_partitioned_matrix_is_told_by_its_real_shape():
    model = Small()
    model.first.weight = nn.Parameter(torch.zeros(6))
    model.first.weight.ds_shape = torch.Size((4, 3))
    assert groups(model)[1e-3, 0.1] == {"first.weight", "last.weight"}


def test_nothing_to_train_is_an_error():
    with pytest.raises(
        ValueError, match="No parameter is trainable.*--freeze_layers.*--only_optimize_lora"
    ):
        groups(Small().requires_grad_(False))
