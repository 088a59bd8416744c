"""RLHF on DeepSpeed: ``dschat.SFTTrainer`` and its kin; docs/library.md describes them.

Importing this package loads nothing else. A name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dschat.config.flat import DPOConfig, PPOConfig, RewardConfig, SFTConfig
    from dschat.runtime.log import Stopped
    from dschat.steps.result import TrainResult
    from dschat.steps.trainers import DPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
    from dschat.tracking.callbacks import Callback

__all__ = [
    "Callback",
    "DPOConfig",
    "DPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "Stopped",
    "TrainResult",
]
_MODULES = {
    "Callback": "dschat.tracking.callbacks",
    "Stopped": "dschat.runtime.log",
    "TrainResult": "dschat.steps.result",
}


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__``."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    is_config = name.endswith("Config")
    module = _MODULES.get(name, "dschat.config.flat" if is_config else "dschat.steps.trainers")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    """Return the names for completion."""
    return sorted([*globals(), *__all__])
