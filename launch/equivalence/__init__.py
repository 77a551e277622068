"""How a run is shown to be equivalent to another: under another strategy (`rankzero parity`), or killed and
resumed (`rankzero resume_check`).

    compare_strategies.py the command: runs the cases, and prints how far they lie apart
      parity_cases.py     which runs
      trajectory.py       losses, gradient norms and weights of the first steps of a run
      whole_model.py      models put together from the shards of all ranks
      parity_result.py    the comparison
      parity_table.py     the table
    check_resume.py       the command: checks the arguments, and prints what was found
      kill_plan.py        which runs are killed, and who resumes
      kill_and_resume.py  the kills
      resume_result.py    the comparison, by compare_metrics.py
      resume_table.py     the table
    subprocesses.py       the real command in processes of its own, and observed_run.py what it writes
    run_arguments.py tolerances.py
"""
