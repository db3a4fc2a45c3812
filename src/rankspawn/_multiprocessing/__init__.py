"""In multiprocessing's place: a context whose processes are born bound.

context    get_context()                                    methods    the start methods: spawn, forkserver, warm
forked     what a process that was forked does first

It imports _start and _warm; forked.py imports only the engine, because each forked process loads it.
"""
