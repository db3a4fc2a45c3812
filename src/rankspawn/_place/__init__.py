"""Where each rank goes: reads a machine's tree, and decides the CPUs and the memory nodes of each rank.

sysfs      the files under /sys and /proc, from any root   topology   nodes, sockets, cores and caches
devices    which accelerators there are, and where         visible    what the variables of CUDA and others leave
usable     the CPUs and nodes that ranks may be given       openmp     the threads that fit in a mask
plan       a Binding for each rank: place(), plan()        drawing    the plan as a picture

It starts nothing and knows no process: it imports neither subprocess nor any other room.
"""
