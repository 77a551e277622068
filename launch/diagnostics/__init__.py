"""The checks of `rankzero doctor`: what each rank looks at by itself, what the ranks measure together, and
what rank zero concludes.

    run_all.py         the order of the checks
    system_info.py     what a rank reports about its machine, as dataclasses
    findings.py        what a check concludes: pass, warn or fail, and the fix
    exchange.py        how the ranks exchange both, through a torch store and without collectives
    machine.py gpus.py network.py software.py           one node by itself, and compared with the others
    cross_node.py bandwidth.py bandwidth_findings.py    several nodes
    findings_table.py  the table that rank zero prints
    check_ranks.py     the command: joins the ranks, runs the checks, prints the table
"""
