"""Let one engine's model serve another role too, and let an engine be replaced.

LoRA's frozen weights are the model from which training began, so they can be the reference model.
"""

import gc

from deepspeed.accelerator import get_accelerator

from dschat.models.lora import adapters_disabled


class AdaptersOff:
    """An engine's model without LoRA, called like the engine: the reference model.

    It needs only_optimize_lora, which trains nothing but the adapters.

    A RewardModel with a reward head (``RewardModel.keep_reward_head``) returns that head's scores.
    """

    def __init__(self, engine):
        self.engine = engine

    @property
    def module(self):
        """The model with its adapters. Read its configuration, but call this object."""
        return self.engine.module

    def __call__(self, **inputs):
        """Return the engine's output without adapters. Under ZeRO-3 every rank must call it."""
        module = self.engine.module
        had_reward_head = getattr(module, "use_reward_head", False)
        with adapters_disabled(module):
            module.use_reward_head = getattr(module, "reward_head", None) is not None
            try:
                return self.engine(**inputs)
            finally:
                module.use_reward_head = had_reward_head

    def eval(self) -> None:
        """Switch the engine to evaluation."""
        self.engine.eval()


class Replaceable:
    """A stand-in for an engine, which can be replaced without a change in its callers."""

    def __init__(self, engine):
        self.engine = engine

    @property
    def module(self):
        """The engine's model."""
        return self.engine.module

    def __call__(self, **inputs):
        """Return the output of the current engine."""
        return self.engine(**inputs)

    def eval(self) -> None:
        """Switch the engine to evaluation."""
        self.engine.eval()

    def discard(self) -> None:
        """Free the engine and its model's memory. Set another engine before the next call."""
        module, engine, self.engine = self.engine.module, self.engine, None
        engine.destroy()
        # DeepSpeed (0.19.8) keeps a destroyed ZeRO-3 model in its hooks: free large tensors here.
        for parameter in module.parameters():
            for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
                if tensor is not None:
                    tensor.data = tensor.new_empty(0)
        del engine, module
        gc.collect()
        get_accelerator().empty_cache()
