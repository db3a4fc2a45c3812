"""Many ranks, one job: launched at once, watched at once, ended together.

launch       a job placed, started and held              group        its ranks, until the last has ended
asked        checks launch's arguments before all else   reporting    what a group knows about its ranks
order        what one launch ordered, ready to start     ending       which ranks are asked to end, and killed
job          what the ranks of a job know of it          restarts     all ranks started again after a failure
start        all its ranks started, or none              handlers     signals that end the ranks before the launcher
descriptors  whether there can be one for each rank      port         the port of rank 0, held for it
lines        what the ranks write, for a program         record       the files of a report and a drawing
unclosed     groups that nobody has closed               hangs        a whole job that stands still, noticed

It imports neither _cli nor _torch nor _multiprocessing.
"""
