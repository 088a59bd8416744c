"""A port on which the first process of a run listens."""

import random
import socket

# Below the ports that a system hands to outgoing connections, which may take one between its choice and its use.
FIRST, LAST = 10000, 32767
TRIES = 50


def free_port(wanted: int = 0) -> int:
    """`wanted`, or a port drawn at random, so that runs that start at the same time do not choose the same.

    Raises:
        OSError: it is in use; or of TRIES ports none is free.
        OverflowError: there is no such port.
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
