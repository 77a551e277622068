"""Prove on your own recipe that the strategies agree.

    python launch/commands/parity.py recipe=gpt
    python launch/commands/parity.py recipe=./mine.py precision=bf16 ranks=4 strategies=ddp,fsdp compare=20

Makes the first steps of the run (compare=5) as a single process, then under each strategy on ranks=2
processes that it starts itself, with accumulation 1 and 4, with clipping and with activation checkpointing,
on the same global batches; prints how far losses, gradient norms and final weights lie apart. Works without a
GPU. All keys of a run work here too. Exit codes: 0 they agree; 1 a row failed; 2 a mistake in the command.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import help
from launch.cli.config import exit_with_mistake, read_line
from launch.cli.resolve import Settings, resolve
from launch.equivalence.common import (
    TOLERANCE,
    choose_strategies,
    command,
    environment,
    for_strategy,
    growth,
    whole_number,
    without,
)
from launch.runtime.world import World
from strategies import STRATEGIES

if TYPE_CHECKING:
    from torch import Tensor

    Trace = dict[str, Tensor]

SMALL = 0.01
"""weights deviate relative to the largest value of their tensor, or to this where all are smaller (a bias
that starts at zero)
"""
OWN_KEYS = ("ranks", "strategies", "compare")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run to compare."""

    strategy: str
    accumulation_steps: int
    extra: str = ""
    """what is switched on beside, as it stands in the table"""
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.strategy}-{self.accumulation_steps}-{self.extra or 'plain'}".replace(" ", "_")

    @property
    def reference(self) -> str:
        """The single process that this case must equal: activation checkpointing must not change it."""
        extra = "clip" if self.extra == "clip" else "plain"
        return f"single-{self.accumulation_steps}-{extra}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far one case lies from its reference: largest relative deviations."""

    case: Case
    loss: float
    norm: float
    weights: float
    peers: float
    news: str
    """in words, what is wrong; empty if nothing is"""


def main(words: list[str]) -> int:
    """Compare; returns the exit code."""
    try:
        if "--help" in words or "-h" in words:
            print(help.page(__doc__ or "", [word for word in words if word not in ("--help", "-h")]))
            return 0
        own, words = own_keys(words)
        settings = resolve([*words, "strategy=single"], World())
    except (ValueError, FileNotFoundError) as error:
        exit_with_mistake(error, 0)
    cases = plan(settings, words, own)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        traces = run(cases, own, Path(folder))
    rows = [compare(case, traces, settings.config.precision) for case in cases if case.strategy != "single"]
    show(rows, traces, settings, own)
    return int(any(row.news for row in rows))


@dataclass(frozen=True)
class Own:
    """What can be said to this command alone."""

    ranks: int
    steps: int
    """how many of the run's first steps are compared"""
    strategies: list[str]


def own_keys(words: list[str]) -> tuple[Own, list[str]]:
    """This command's own keys, and the other words. Raises ValueError for what they cannot be."""
    line = read_line(words)
    ranks = whole_number("ranks", line.get("ranks", "2"), "processes", 2)
    steps = whole_number("compare", line.get("compare", "5"), "steps", 1)
    everywhere = [name for name in STRATEGIES if name != "single"]
    chosen = choose_strategies(line, everywhere, everywhere)
    return Own(ranks, steps, chosen), without(words, (*OWN_KEYS, "strategy"))


def plan(settings: Settings, words: list[str], own: Own) -> list[Case]:
    """The cases: plain with accumulation 1 and 4, then with clipping, then (if the recipe has blocks)
    recomputing them.
    """
    micro = settings.config.given_micro_batch_size or 4
    from launch.state.build import has_blocks

    with_blocks = has_blocks(settings.recipe)
    cases = []
    for strategy in ["single", *own.strategies]:
        mine = for_strategy(words, strategy)

        def case(
            accumulation_steps: int,
            extra: str = "",
            *more: str,
            strategy: str = strategy,
            mine: list[str] = mine,
        ) -> Case:
            sizes = (f"batch_size={micro * own.ranks * accumulation_steps}", f"micro_batch_size={micro}")
            return Case(
                strategy=strategy,
                accumulation_steps=accumulation_steps,
                extra=extra,
                words=(*mine, f"strategy={strategy}", *sizes, *more),
            )

        cases += [case(1), case(4)]
        if settings.config.clip_norm is None and settings.config.clip_value is None:
            cases.append(case(4, "clip", "clip_norm=0.1"))
        if strategy != "single" and with_blocks and settings.config.activation_checkpointing == "none":
            cases.append(case(4, "recompute", "activation_checkpointing=true"))
    return cases


def run(cases: list[Case], own: Own, folder: Path) -> dict[str, Trace]:
    """The traces by case name. A case whose processes died has none."""
    from safetensors.torch import load_file

    found = environment(own.ranks)
    python, torchrun = (
        command("equivalence/trajectory.py", 1),
        command("equivalence/trajectory.py", own.ranks),
    )
    traces: dict[str, Trace] = {}
    for start, mine in (
        (python, [case for case in cases if case.strategy == "single"]),
        (torchrun, [case for case in cases if case.strategy != "single"]),
    ):
        print(
            f"running {len(mine)} cases {'as a single process' if start is python else f'on {own.ranks} ranks'} ...",
            flush=True,
        )
        (folder / "cases.json").write_text(
            json.dumps({"steps": own.steps, "cases": {case.name: case.words for case in mine}})
        )
        subprocess.run([*start, str(folder)], env=found, check=False)
        traces |= {
            case.name: load_file(path)
            for case in mine
            if (path := folder / f"{case.name}.safetensors").exists()
        }
    return traces


def compare(case: Case, traces: dict[str, Trace], precision: str) -> Row:
    """The row of one case."""
    if case.name not in traces or case.reference not in traces:
        return Row(
            case=case, loss=1, norm=1, weights=1, peers=1, news="did not finish: its error stands above"
        )
    import torch

    mine, reference = traces[case.name], traces[case.reference]
    peer = traces.get(case.name.replace(case.strategy, "ddp", 1), mine)
    loss, norm, peers = (
        max(float(deviation(mine[key], other[key]).max()) for key in mine if key.startswith(prefixes))
        for prefixes, other in (("loss/", reference), ("norm/", reference), (("loss/", "norm/"), peer))
    )
    noise, none = without_gradient(reference), torch.tensor(False)
    apart = {
        name: float(
            ((mine[key] - reference[key]).abs() * ~noise.get(name, none)).max()
            / reference[key].abs().max().clamp(min=SMALL)
        )
        for key in mine
        if key.startswith("weights/") and (name := key.removeprefix("weights/"))
    }
    found = (loss, norm, max(apart.values()), peers)
    bad = [
        what
        for what, value, most in zip(
            ("loss", "gradient norm", "weights", "spread"), found, TOLERANCE[precision], strict=True
        )
        if not value <= most
    ]
    news = f"{' and '.join(bad)} too far off, {where(mine, reference, noise, precision)}" if bad else ""
    return Row(case=case, loss=loss, norm=norm, weights=found[2], peers=peers, news=news)


def without_gradient(reference: Trace) -> dict[str, Tensor]:
    """Elements to leave out, as masks by name: their true gradient is zero, such as that of a bias before
    BatchNorm.

    Adam turns their rounding noise into steps; the running means then contain the bias, so they go with it.
    """
    import torch

    noise = {key.removeprefix("noise/"): mask for key, mask in reference.items() if key.startswith("noise/")}
    if any(mask.all() for mask in noise.values()):
        means = [
            key.removeprefix("weights/")
            for key in reference
            if key.startswith("weights/") and key.endswith(".running_mean")
        ]
        noise |= {name: torch.ones_like(reference[f"weights/{name}"], dtype=torch.bool) for name in means}
    return noise


def deviation(mine: Tensor, other: Tensor) -> Tensor:
    """Relative deviation, element by element; NaN is infinitely far."""
    return ((mine - other).abs() / other.abs().clamp(min=1e-30)).nan_to_num(nan=float("inf"))


def where(mine: Trace, reference: Trace, noise: Iterable[str], precision: str) -> str:
    """From which step on, and in which parameter first."""
    import torch

    most = TOLERANCE[precision][0]
    curve = torch.stack(
        [deviation(mine[key], reference[key]) for key in mine if key.startswith(("loss/", "norm/"))]
    ).amax(0)
    steps = torch.nonzero(curve > most).flatten().tolist()
    prints = {
        key.removeprefix("print/"): deviation(mine[key], reference[key])
        for key in mine
        if key.startswith("print/") and key.removeprefix("print/") not in noise
    }
    first = min(
        (int(torch.nonzero(far > most)[0]) for far in prints.values() if (far > most).any()), default=None
    )
    since = (
        f"from step {steps[0] + 1} on{growth(curve.tolist(), steps[0], compare=steps[0])}"
        if steps
        else "only in the weights"
    )
    if first is None:
        return since
    worst = max(prints, key=lambda name: float(prints[name][first]))
    return f"{since}; the first parameter apart is {worst}, after step {first + 1}"


def part(mask: Tensor) -> str:
    """How much of a parameter is left out, if not all of it."""
    return "" if mask.all() else f" ({int(mask.sum())} of {mask.numel()} elements)"


def show(rows: list[Row], traces: dict[str, Trace], settings: Settings, own: Own) -> None:
    """The table, the bad news, and what was promised."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from strategies.precision import contract

    config = settings.config
    loss, norm, weights, spread = TOLERANCE[config.precision]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"recipe={config.recipe}: {own.ranks} ranks against a single process, {own.steps} steps",
        title_justify="left",
    )
    for name in ("strategy", "acc.", "with"):
        table.add_column(name, no_wrap=True)
    for name, most in (("loss", loss), ("grad norm", norm), ("weights", weights), ("vs ddp", spread)):
        table.add_column(f"{name}\n< {most:g}", justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        numbers = [f"{value:.1e}" for value in (row.loss, row.norm, row.weights, row.peers)]
        verdict = "[red]FAIL" if row.news else "[green]pass"
        table.add_row(row.case.strategy, str(row.case.accumulation_steps), row.case.extra, *numbers, verdict)
    console = Console()
    console.print(table)
    for row in rows:
        if row.news:
            console.print(
                f"{row.case.strategy}, accumulation {row.case.accumulation_steps} {row.case.extra}: {row.news}",
                style="red",
            )
    for words in sorted(
        {f"{name}{part(mask)}" for trace in traces.values() for name, mask in without_gradient(trace).items()}
    ):
        console.print(f"left out, its true gradient being zero: {words}", highlight=False)
    console.print(f"{config.precision}: {contract(config.precision)}", highlight=False)
