"""Write adapters: extract them from full checkpoints, convert them, and put them into files that load elsewhere.

In: checkpoints or adapters, and a choice of ranks. Out: adapter files, and records of what was kept.
"""
