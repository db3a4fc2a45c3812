"""Where each rank goes: reads a machine's tree, and decides the CPUs and the memory nodes of each rank.

sysfs      the files under /sys and /proc, from any root   topology   nodes, sockets, cores and caches
allowed    what the affinity and the cpuset leave          devices    which accelerators there are, and where
visible    what the variables of CUDA and others leave     usable     the cores that ranks may be given
modes      the CPUs of a rank: node, socket, ...           memory     the memory policy of a rank
plan       a Binding for each rank: place(), plan()        auto       the default: each rank to its node, or unbound
lists      ranks placed by hand                            glance     quickly: whether a machine has one node
openmp     the threads that fit in a mask                  quota      the CPU time that cgroups leave
drawing    the plan as a picture                           textmap    the plan as text, for a terminal
colours    the ranks' colours in pictures
surroundings   what only pictures show: cache sizes, network adapters

It starts no process and knows none, so it imports neither subprocess nor any other room.
"""
