"""What ranks write, and what is written about them.

logs       where each rank writes                           failure    which rank failed first, and why
recorded   the error that a rank has recorded              words      why it has failed, by its own words
tee        shows what all ranks write while they run        follow     one log file as it grows, and where it is shown
report     times, bindings, exits and use, as data          usage      what a rank uses now
form       the types of a report                            timeline   a report as a picture
write      reports written to files and pipes               trace      a report as a trace for Perfetto
console    what the launcher says on stderr                 lines      what all ranks write, for a program
noted      the CPUs that ranks should have, for `ps`

This room starts and ends no process: it imports Popen only as a type, and only `processes` from _end.
"""
