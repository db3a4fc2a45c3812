"""How a process is born bound: Popen's arguments, encoded for the C engine in csrc/.

arguments  what Popen's arguments say, encoded             engine     which mechanisms this machine has; masks
popen      one process, as subprocess.Popen starts it      crew       many processes in one call of the engine
ending     its signals, and waiting for its end            without    what works without the engine
outcome    what was refused of a binding, or took effect  variables  the environments of many processes
aio        one process in an asyncio loop
unexecuted  why an existing program is not executed

It knows no machine and no group, so it imports no other folder of this package.
"""
