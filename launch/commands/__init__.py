"""`rankzero NAME`: the commands, one file each, imported when asked for. No torch."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cli.exits import exit_with_mistake
from launch.runtime.exit_codes import ExitCode


@dataclass(frozen=True)
class Command:
    """A command: the heading it stands under, the module whose `main(argv)` it is, its line in the list."""

    heading: str
    module: str
    summary: str


COMMANDS = {
    "train": Command("Train", "launch.commands.train", "train a recipe, on one process or on nproc=N"),
    "parity": Command("Prove", "launch.commands.parity", "every strategy trains your recipe alike"),
    "resume_check": Command(
        "Prove", "launch.commands.resume_check", "a killed run of your recipe goes on as if nothing happened"
    ),
    "ckpt": Command(
        "Look into", "launch.commands.ckpt", "list, inspect, verify, compare, export and prune checkpoints"
    ),
    "profile": Command("Look into", "launch.commands.profile", "where the time of a training step goes"),
    "doctor": Command(
        "Cluster", "launch.commands.doctor", "check GPUs, network, disks and versions of all nodes"
    ),
    "submit": Command("Cluster", "slurm.submit", "queue a run or a sweep on SLURM, follow and cancel it"),
}
"""what `rankzero` lists, in this order; names may be written with - for _"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or argv[0] in ("--help", "-h", "help"):
            print(overview())
            return ExitCode.DONE
        name = argv[0].replace("-", "_")
        if name not in COMMANDS:
            exit_with_mistake(ValueError(not_a_command(argv[0])))
        code = importlib.import_module(COMMANDS[name].module).main(list(argv[1:]))
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:  # `| head` has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # once for all ranks
            print("rankzero: interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED


def overview() -> str:
    """The commands by what one wants to do."""
    left = max(map(len, COMMANDS))
    lines = ["Train any PyTorch recipe on one GPU, on eight or on a cluster.", ""]
    lines += ["usage: rankzero COMMAND key=value ..."]
    heading = ""
    for name, command in COMMANDS.items():
        if command.heading != heading:
            heading = command.heading
            lines += ["", heading]
        lines.append(f"  {name:{left}}  {command.summary}")
    lines += ["", "`rankzero COMMAND --help` is its manual. Begin with: rankzero train recipe=mnist"]
    return "\n".join(lines)


def not_a_command(argument: str) -> str:
    """What to type instead of something that is no command."""
    if "=" in argument:
        return f"{argument!r} is not a command; to train: rankzero train {argument}"
    near = difflib.get_close_matches(argument.replace("-", "_"), COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"{argument!r} is not a command; {hint}"
