"""In place of launch/__main__.py: `train` with nproc= starts the real agent, whose ranks are stub_run.py."""

from __future__ import annotations

import sys

from launch.run import main  # type: ignore[attr-defined]  # launch/run.py may be a stub beside this file
from launch.runtime.agent import run_agent

AGENT_KEYS = ("nproc", "nnodes", "node_rank", "rendezvous")


def train(argv: list[str]) -> int:
    """As `rankzero train`, but no key is checked; returns the exit code."""
    agent = {name: value for name, _, value in (word.partition("=") for word in argv) if name in AGENT_KEYS}
    rest = [word for word in argv if word.partition("=")[0] not in AGENT_KEYS]
    if not agent:
        return int(main(rest))
    return run_agent(
        rest,
        nproc=int(agent["nproc"]),
        nnodes=int(agent["nnodes"]),
        node_rank=int(agent["node_rank"]),
        rendezvous=agent["rendezvous"],
    )


if __name__ == "__main__":
    assert sys.argv[1] == "train"
    sys.exit(train(sys.argv[2:]))
