"""How a process is born bound: what Popen's arguments ask for, put the way csrc/ takes it.

arguments  what Popen's arguments say, encoded             engine     which mechanisms this machine has; masks
popen      one process, as subprocess.Popen starts it      crew       many processes in one call of the engine
ending     its signals, and waiting for its end            without    what can be had without the engine
outcome    what of a binding was refused, or took effect

It knows no machine and no group: it imports no other room.
"""
