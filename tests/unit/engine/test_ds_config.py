"""The DeepSpeed configurations, against dictionaries written by hand."""

import pytest
from deepspeed.utils.config import get_timers_config

from dschat.config.options import SystemOptions
from dschat.engine.ds_config import inference_config, training_config

QUIET = {
    "steps_per_print": 10**9,
    "wall_clock_breakdown": False,
    "timers": {"throughput": {"enabled": False}},
}
BATCH = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "train_batch_size": 24,
    "gradient_clipping": 1.0,
}
BUCKETS = {"reduce_bucket_size": 100_000_000, "allgather_bucket_size": 100_000_000}
STAGE_3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 300_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 200_000_000,
    "memory_efficient_linear": False,
}
HOST = {"device": "cpu", "pin_memory": True}


def training(zero_stage: int, *, offload: bool = False, dtype: str = "fp32", **more) -> dict:
    options = dict(
        dtype=dtype, micro_batch_size=4, gradient_accumulation_steps=3, world_size=2, on_cpu=False
    )
    return training_config(
        SystemOptions(zero_stage=zero_stage, offload=offload), **{**options, **more}
    )


def test_deepspeed_reads_that_no_timer_waits_for_the_device():
    assert not get_timers_config(training(2)).enabled
    assert not get_timers_config(inference(3)).enabled


def inference(zero_stage: int, *, offload: bool = False, dtype: str = "fp32") -> dict:
    system = SystemOptions(zero_stage=zero_stage, offload=offload)
    return inference_config(system, dtype=dtype, micro_batch_size=4, world_size=2)


@pytest.mark.parametrize(
    "stage, offload, zero",
    [
        (0, False, {"stage": 0}),
        (0, True, {"stage": 1, **BUCKETS, "offload_optimizer": HOST}),
        (1, False, {"stage": 1, **BUCKETS}),
        (1, True, {"stage": 1, **BUCKETS, "offload_optimizer": HOST}),
        (2, False, {"stage": 2, **BUCKETS}),
        (2, True, {"stage": 2, **BUCKETS, "offload_optimizer": HOST}),
        (3, False, STAGE_3),
        (3, True, {**STAGE_3, "offload_optimizer": HOST, "offload_param": HOST}),
    ],
)
def test_training_by_stage_and_offload(stage, offload, zero):
    assert training(stage, offload=offload) == {**QUIET, **BATCH, "zero_optimization": zero}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_by_precision(stage):
    plain = training(stage)
    assert training(stage, dtype="bf16") == {**plain, "bf16": {"enabled": True}}
    assert training(stage, dtype="fp16") == {
        **plain,
        "fp16": {"enabled": True, "loss_scale_window": 100},
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_never_runs_without_zero(dtype):
    assert training(0, dtype=dtype) == training(1, dtype=dtype)


def test_the_given_options_stay_as_they_are():
    system = SystemOptions(zero_stage=0, offload=True)
    training_config(
        system,
        dtype="bf16",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=1,
        on_cpu=True,
    )
    assert system == SystemOptions(zero_stage=0, offload=True)


def test_a_cpu_may_offload_with_any_optimizer():
    assert training(2, offload=True, on_cpu=True) == {
        **training(2, offload=True),
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize(
    "ranks_per_node, stage, mixed, found",
    [(2, 3, True, 2), (4, 3, True, None), (2, 2, True, None), (2, 3, False, None)],
)
def test_only_int8_weights_on_several_nodes_have_partitions_of_a_node(
    ranks_per_node, stage, mixed, found
):
    system = SystemOptions(zero_stage=stage, enable_mixed_precision_lora=mixed)
    config = training_config(
        system,
        dtype="bf16",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=4,
        on_cpu=False,
        ranks_per_node=ranks_per_node,
    )
    assert config["zero_optimization"].get("zero_hpz_partition_size") == found


def test_tensorboard_and_clipping():
    found = training(
        1, tensorboard_path="/logs/run 1", tensorboard_name="step3_actor", gradient_clipping=0.5
    )
    events = {
        "enabled": True,
        "output_path": "/logs/run 1/ds_tensorboard_logs/",
        "job_name": "step3_actor_tensorboard",
    }
    assert found == {**training(1), "tensorboard": events, "gradient_clipping": 0.5}
    assert "tensorboard" not in training(1, tensorboard_path=None, tensorboard_name="step3_actor")


def test_host_memory_is_page_locked_unless_that_is_off():
    system = SystemOptions(zero_stage=3, offload=True, pin_memory=False)
    options = dict(dtype="bf16", micro_batch_size=1, world_size=1)
    trained = training_config(system, gradient_accumulation_steps=1, on_cpu=False, **options)[
        "zero_optimization"
    ]
    held = inference_config(system, **options)["zero_optimization"]
    assert (
        trained["offload_optimizer"]
        == trained["offload_param"]
        == {"device": "cpu", "pin_memory": False}
    )
    assert held["offload_param"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_inference_is_partitioned_at_stage_3_and_where_weights_are_offloaded(stage, offload):
    zero = {"stage": 0}
    if stage == 3 or offload:
        zero = {**STAGE_3, **({"offload_param": HOST} if offload else {})}
    batch = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "train_batch_size": 8,
    }
    assert inference(stage, offload=offload) == {**QUIET, **batch, "zero_optimization": zero}


def test_inference_by_precision():
    assert inference(3, dtype="bf16") == {**inference(3), "bf16": {"enabled": True}}
    assert inference(0, dtype="fp16") == {
        **inference(0),
        "fp16": {"enabled": True, "loss_scale_window": 100},
    }
