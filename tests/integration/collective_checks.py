"""Runs with one process whose collectives still go through torch.distributed."""

from unittest import mock

from worker import run_main

from dschat.runtime import dist


def run_as_with_peers(*, step: int | str, argv: str, out: str) -> int:
    """Count the collectives that the run has called, in a group of one."""
    asked = mock.Mock(return_value=True)
    with mock.patch.object(dist, "has_peers", asked):
        run_main(step, argv=argv, out=out)
    return asked.call_count
