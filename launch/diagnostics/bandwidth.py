"""How fast neighboring ranks exchange data, pair by pair: which pairs, and the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from launch.diagnostics.exchange import Exchange
from launch.diagnostics.rank_report import RankReport, group_by_node, node_leaders
from launch.runtime.store import open_store, within
from launch.runtime.torch_private import all_gather_single

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it, its stubs do not

Pair = tuple[int, int]
Collective = Callable[[], object]
PAIR_TIMEOUT_S = {"gloo": 6.0, "nccl": 12.0}
"""for a pair; NCCL takes some seconds to look at the topology"""
MEASURE_S = 0.6
"""of measuring, for each of the two collectives"""
MIN_BYTES, MAX_BYTES = 2**20, {"gloo": 2**24, "nccl": 2**28}
MAX_CALLS = 50


@dataclass(frozen=True, kw_only=True)
class PairBandwidth:
    """What a pair of ranks measured, in bytes a second in one direction of the link; 0 where there is an
    error.
    """

    pair: Pair
    all_reduce: float = 0.0
    all_gather: float = 0.0
    error: str = ""

    @property
    def best(self) -> float:
        """A slow link slows both; gloo's all-gather is slow by itself, a third of its all-reduce where memory
        is the limit.
        """
        return max(self.all_reduce, self.all_gather)


# which pairs ------------------------------------------------------------------------------------------------


def neighbor_rounds(reports: list[RankReport]) -> list[list[Pair]]:
    """Pairs of ranks in rounds: the ring of the nodes first, then the rings within them. No rank is twice in
    a round.

    A ring needs two or three rounds, however long it is: a thousand nodes take no longer than three. Not all
    pairs are measured.
    """
    between = ring([leader.rank for leader in node_leaders(reports).values()])
    within_nodes = [
        pair for members in group_by_node(reports).values() for pair in ring([m.rank for m in members])
    ]
    return split_into_rounds(between) + split_into_rounds(within_nodes)


def ring(ranks: Sequence[int]) -> list[Pair]:
    """Each rank with the next, the last with the first."""
    if len(ranks) <= 2:
        return [(ranks[0], ranks[1])] if len(ranks) == 2 else []
    return list(zip(ranks, [*ranks[1:], ranks[0]], strict=True))


def split_into_rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in rounds, so that those of one round have no rank in common."""
    rounds: list[list[Pair]] = []
    busy: list[set[int]] = []
    """the ranks of each round"""
    for pair in pairs:
        index = next((n for n, ranks in enumerate(busy) if not ranks & set(pair)), len(rounds))
        if index == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[index].append(pair)
        busy[index].update(pair)
    return rounds


# measuring --------------------------------------------------------------------------------------------------


def measure_pairs(
    exchange: Exchange, endpoint: tuple[str, int], token: str, rounds: Sequence[Sequence[Pair]], device: str
) -> list[PairBandwidth]:
    """What this rank measured as the first of a pair. All ranks call it.

    A pair that fails reports its error within PAIR_TIMEOUT_S, and stops no other.
    """
    backend = "nccl" if device.startswith("cuda") else "gloo"
    results = []
    for number, pairs in enumerate(rounds):
        for pair in pairs:
            if exchange.rank in pair:
                prefix = f"{token}/{number}/{pair[0]}-{pair[1]}"
                result = measure_pair(exchange, endpoint, prefix, pair, device, backend)
                results += [result] if exchange.rank == pair[0] else []
        exchange.barrier(f"round/{number}", exchange.ranks, PAIR_TIMEOUT_S[backend] + 2)
    return results


def measure_pair(
    exchange: Exchange, endpoint: tuple[str, int], prefix: str, pair: Pair, device: str, backend: str
) -> PairBandwidth:
    """The bandwidth between the two ranks of `pair`, or an error; both call it."""
    if any(exchange.store.check([f"hung/{rank}"]) for rank in pair):
        return PairBandwidth(pair=pair, error="not measured: one of the two hangs since the pair before")
    errors: list[str] = []
    try:
        all_reduce, all_gather = within(
            PAIR_TIMEOUT_S[backend] + 1,
            lambda: measure_collectives(
                open_store(endpoint, prefix), pair.index(exchange.rank), device, backend, errors
            ),
        )
    except TimeoutError as error:
        # its process group still belongs to the thread that hangs: no other can be made in this process
        exchange.put(f"hung/{exchange.rank}", True)
        return PairBandwidth(pair=pair, error=errors[0] if errors else str(error))
    except Exception as error:
        return PairBandwidth(pair=pair, error=one_line(error))
    return PairBandwidth(pair=pair, all_reduce=all_reduce, all_gather=all_gather)


def measure_collectives(
    store: Store, rank: int, device: str, backend: str, errors: list[str]
) -> tuple[float, float]:
    """Bytes a second, in one direction of the link, of all-reduce and all-gather between two ranks.

    Each rank sends as many bytes as it has: S (n - 1) / n twice for all-reduce and S (n - 1) for all-gather
    with n = 2. So both figures compare with the speed of the link.
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md

    An exception is added to `errors` at once: with NCCL, destroying the process group may then wait for the
    other rank.
    """
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(device)
    backends = "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo"  # as in a run
    timeout = timedelta(seconds=PAIR_TIMEOUT_S[backend] - 2)
    dist.init_process_group(backends, store=store, rank=rank, world_size=2, timeout=timeout)
    try:

        def all_reduce(size: int) -> Collective:
            tensor = torch.zeros(size // 4, device=device)
            return lambda: dist.all_reduce(tensor)

        def all_gather(size: int) -> Collective:
            tensor = torch.zeros(size // 4, device=device)
            output = torch.zeros(size // 4 * 2, device=device)
            gather = all_gather_single()
            return lambda: gather(output, tensor)

        return bytes_per_second(all_reduce, device, backend), bytes_per_second(all_gather, device, backend)
    except Exception as error:
        errors.append(one_line(error))
        raise
    finally:
        dist.destroy_process_group()


def one_line(error: Exception) -> str:
    """The message of an error for a row of the table."""
    return " ".join(str(error).split())[:160]


def bytes_per_second(prepare: Callable[[int], Collective], device: str, backend: str) -> float:
    """The speed of a collective, with as many bytes and calls as MEASURE_S allows; both ranks choose the
    same.

    `prepare(size)` returns the call for so many bytes.
    """
    import torch
    import torch.distributed as dist

    def seconds_per_call(size: int, calls: int) -> float:
        collective = prepare(size)
        collective()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            collective()
        synchronize(device)
        seconds = torch.tensor((time.perf_counter() - start) / calls, dtype=torch.float64, device=device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds)

    small = seconds_per_call(MIN_BYTES, 2)
    size = min(max(int(MIN_BYTES * MEASURE_S / 6 / small) // MIN_BYTES, 1) * MIN_BYTES, MAX_BYTES[backend])
    calls = min(max(int(MEASURE_S * MIN_BYTES / small / size), 1), MAX_CALLS)
    return size / seconds_per_call(size, calls)


def synchronize(device: str) -> None:
    """Wait for the GPU; collectives of the CPU have ended when they return."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
