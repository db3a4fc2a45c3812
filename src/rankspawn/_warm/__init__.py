"""Ranks that are forked from a template, which has imported what they need, instead of executed: a warm start.

template   the processes of a Template, kept over launches   importer   the program that imports, and forks on request
ranks      the ranks of a launch, and which template fits    imports    imports modules; can ranks be forked then?
stem       one template: adopted, asked for ranks, ended     variables  environment variables that imports read and set
adoption   a child's child becomes the launcher's child      rank       a forked rank becomes the program that it runs
wire       messages and descriptors between the two          command    what of a command is the interpreter's own
inherited  what a process has from its parent                find       what a script imports at its top

A warm rank is a child of the launcher, born by the steps of csrc/child.c, as any other. It imports neither _group nor a
face.
"""
