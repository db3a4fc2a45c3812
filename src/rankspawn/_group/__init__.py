"""Many ranks, one job: launched at once, watched at once, ended together.

launch       a job placed, started and held              group        its ranks, until the last has ended
asked        checks launch's arguments before all else   reporting    what a group knows about its ranks
order        what one launch ordered, ready to start     ending       which ranks are asked to end, and killed
job          what the ranks know about their job         restarts     starts all ranks again after a failure
start        all its ranks started, or none              handlers     signals that end the ranks before the launcher
descriptors  whether there can be one for each rank      port         holds the port of rank 0 for it
lines        what the ranks write, for a program         record       the files of a report and a drawing
unclosed     groups that were not closed                 hangs        notices that a whole job stands still

It imports neither _cli nor _torch nor _multiprocessing.
"""
