"""The port on which rank 0 of a run listens."""

import random
import socket

# Below the ports of outgoing connections, one of which could take the port before it is used.
FIRST = 10000
LAST = 32767
TRIES = 50


def free_port(wanted: int = 0) -> int:
    """Return `wanted` if it is free, or a free random port.

    The port is random so that runs that start at the same time choose different ones.

    Args:
        wanted: a port; 0: any.

    Raises:
        OSError: `wanted` is in use, or none of TRIES random ports is free.
        OverflowError: `wanted` is no port number.
    """
    draw = random.SystemRandom()
    for port in [wanted] if wanted else [draw.randint(FIRST, LAST) for _ in range(TRIES)]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError as error:
                refusal = error
    raise refusal
