"""The command ``rankspawn``.

main       commands and their dispatch                      options    what several commands take
run        the ranks of a script                            attempts   one start of all ranks, watched to its end
bind       this process, bound, becomes a program           show       topology and plan
doctor     what this machine and this installation have     step       what srun, mpirun and torchrun say of us
progress   lines on stderr while ranks start and end        signals    the launcher's own signals, as bytes

Nothing imports it but __main__. It imports no _end: a group ends its ranks.
"""
