"""Free ports, below those of outgoing connections."""

import socket

import pytest

from dschat.runtime.ports import FIRST, LAST, free_port


def test_ports_are_drawn_apart_and_can_be_bound():
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) >= 17  # two of 20 out of 22,768 are equal once in a hundred times
    assert all(FIRST <= port <= LAST for port in ports)
    with socket.socket() as server:
        server.bind(("", ports[0]))


def test_a_port_in_use_is_skipped_and_refused_if_it_is_wanted(monkeypatch):
    with socket.socket() as server:
        taken, free = free_port(), free_port()
        server.bind(("", taken))
        # From now on, all but one of the ports drawn are in use.
        draws = iter([taken, taken, free])
        monkeypatch.setattr("random.SystemRandom.randint", lambda *_: next(draws, taken))
        assert free_port() == free
        with pytest.raises(OSError):
            free_port()
        with pytest.raises(OSError):
            free_port(taken)
        with pytest.raises(OverflowError):
            free_port(70000)
