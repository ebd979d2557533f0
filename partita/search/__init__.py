"""Searching the network's configuration: its connections, widths, depth and hyperparameters.

`partita.search` is the function `partita.search.api.search`; the files beside the folders are what it consists of:

    api -> session          checks, and one call: study, search, result
    course, coordinator     what is to happen next; the processes that do it
    deadline, allocation    time, and who gets it          curves          what a score will be
    trial_process           one trial: training_run (a candidate), pricing (what the planner says of it), trials
    study, candidates       what is kept                   result, report, what_if     what was learnt
"""
