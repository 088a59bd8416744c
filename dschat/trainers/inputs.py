"""Faults of a run's models and data, told together: who fixes one should not meet the next."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from dschat.models.causal_lm import load_config
from dschat.models.tokenizer import load_tokenizer

Check = Callable[[], object]  # raises ValueError if an input cannot be used


def with_other_faults(error: ValueError, checks: Iterable[Check]) -> ValueError:
    """Return an error that tells `error`, and each other fault that `checks` find."""
    messages = [str(error)]
    for check in checks:
        try:
            check()
        except ValueError as other:
            messages.append(str(other))
    return ValueError("\n".join(dict.fromkeys(messages)))


def model_checks(options: Any) -> list[Check]:
    """Return checks of all models of a run, which load their tokenizers and configurations.

    Args:
        options: the group of the run's options that names its models (``config.model``).
    """
    checks: list[Check] = []
    for flag, names in options.by_flag.items():
        for name in filter(None, names):
            model = dict(flag=flag, trust_remote_code=options.trust_remote_code)
            tokens = dict(add_eot_token=options.add_eot_token, eot_token=options.eot_token)
            checks.append(partial(load_tokenizer, name, **tokens, **model))
            checks.append(partial(load_config, name, **model))
    return checks
