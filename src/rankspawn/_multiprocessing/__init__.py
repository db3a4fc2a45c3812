"""In multiprocessing's place: a context whose processes are born bound.

context    get_context()                                    methods    the start methods spawn and forkserver, ours
forked     what a process of the fork server does first

It imports only _start; forked.py imports only the engine, because each forked process loads it.
"""
