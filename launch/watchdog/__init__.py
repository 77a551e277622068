"""What keeps a run alive and reports how it ends: watchdog, heartbeats, failure reports, preemption, fault
injection.

Threads of each rank (`watchdog.py`), and the keys of the store through which the ranks see each other:

    main thread          trains; an exception (`supervise`) -> Watchdog.fail
    "watchdog"           each interval:    heartbeat/RANK       writes: count, ticks, step, phase
                                           failure_report       reads -> shut_down
                                           stacks_wanted        reads -> writes stack/RANK
                         rank zero also:   heartbeat/*          reads -> detect: lost ranks, a hang
    "store guard"        the store has not answered for LOST intervals (a cable was cut, which ends no
                         connection) -> shut_down without a store

Who ends whom: one report ends all ranks, the first that was published.

    1. detect     Watchdog.fail: an exception of this rank, or the cause of a lost connection
                  Watchdog.detect: on rank zero, lost ranks and hangs
    2. publish    compare_set(failure_report): the first report stands, who is later obeys it
    3. shut_down  prints, writes failure.json and ends the process, in any thread, once:

        rank zero                                       another rank N
        prints, writes failure.json                     who published waits for `reported`, and prints
        sets `reported`                                     itself if rank zero does not
        waits until the others have read it             exits 1 at once
        exits 1

        a report that restarts the ranks (micro_batch_size=auto):
        writes the new size into config.yaml            sets restarting/N
        sets `reported`                                 waits until rank zero's store is gone
        waits for restarting/*                          re-executes itself
        re-executes itself

        no store (rank zero's host or the launcher is gone): each prints, unless failure.json is there

Nothing here leaves the process group or waits in a collective: under NCCL both wait for ranks that will never
come. A run that succeeds closes the watchdog last, with the heartbeat FINISHED.
"""
