"""Replaces multiprocessing's contexts: the processes of ours are born bound.

context    get_context()                                    methods    the start methods: spawn, forkserver, warm
forked     what a forked process does first

It imports _start and _warm; forked.py imports only the engine, because each forked process loads it.
"""
