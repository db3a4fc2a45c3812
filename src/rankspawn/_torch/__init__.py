"""Replaces parts of torch: what torch's elastic agent calls, with torch's names and signatures.

handler       SubprocessHandler                             elastic       the agent's own classes, over ours
numa_options  NumaOptions                                   seams         the torch functions that ours rely on
early         torchrun --warm, before torch is imported     extras        what torchrun cannot do for workers
deaths        what the agent knows of a death by signal     handed_out    the port that torch finds for the ranks
ending        what comes before torch ends the ranks

Only elastic and deaths import torch, which is loaded by then. Nothing here imports _cli.
"""
