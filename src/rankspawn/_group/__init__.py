"""Many ranks, one job: launched at once, watched at once, ended together.

job        what the ranks of a job are told                 launch     a job placed, started and held
start      all its ranks started, or none                   group      its ranks, until the last has ended
ending     whom a group tells to end, waits for and kills   handlers   signals that end the ranks before the launcher
reporting  what a group can say of its ranks
port       the port of rank 0, held for it

It imports neither _cli nor _torch nor _multiprocessing.
"""
