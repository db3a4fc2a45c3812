"""The command ``rankspawn``.

main       commands and their dispatch                      options    what several commands take
run        the ranks of a script                            settings   the options of run, checked, as frozen data
attempts   all ranks started, watched, and started again    reports    the files of --report and --timeline
progress   lines on stderr while ranks start and end        signals    the launcher's own signals, as bytes
refusals   what the system refused of the bindings          bind       this process, bound, becomes a program
step       what launchers' variables say: srun, ...         show       topology and plan
launchers  the names of these variables
vocabulary  torchrun's options, values and variables        streams    what becomes of the ranks' stdout and stderr
meeting    which machine this is, and where ranks meet     program    whether the program of the ranks exists
doctor     what this machine and this installation have    dump       what the ranks of a running job do
warm       --warm: its template, and what it preloads        ps         what the ranks of all jobs do and use
help       the examples and exit statuses of each command   completion  for a shell
colours    of ranks and of failures, on a terminal          line       the command line of run, as plan takes it
stragglers  ranks that still run long after another ended with status 0

Only __main__ imports it. It does not import _end, because a group ends its ranks.
"""
