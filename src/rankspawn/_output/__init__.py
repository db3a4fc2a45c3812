"""What ranks write, and what is written of them.

logs       where each rank writes                           tee        log files followed, shown line by line
failure    which rank failed first, and why                 report     times, bindings, exits and use, as data
timeline   a report as a picture

It starts and ends nothing: it imports Popen as a type alone, and of _end no more than processes.
"""
