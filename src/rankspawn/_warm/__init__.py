"""Ranks that are forked from a template, which has imported what they need, instead of executed: a warm start.

imports    imports modules, and finds out whether ranks can be forked then
variables  environment variables that imports read and set
rank       a forked rank becomes the program that it runs

It imports neither _group nor a face.
"""
