"""Many ranks, one job: launched at once, watched at once, ended together.

launch     what a job is told, and its start                group      the ranks of one job, until the last has ended

It knows no command and no torch: it imports neither _cli nor _torch nor _multiprocessing.
"""
