"""What ranks write, and what is written of them.

logs       where each rank writes                           failure    which rank failed first, and why
tee        what all ranks write, shown while they run       follow     one log file as it grows, and where it is shown
report     times, bindings, exits and use, as data          usage      what a rank uses now
timeline   a report as a picture

It starts and ends nothing: it imports Popen as a type alone, and of _end no more than processes.
"""
