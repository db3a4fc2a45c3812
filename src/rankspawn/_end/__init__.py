"""How ranks are ended so that no process is left.

watch      sees that a rank has ended, without reaping it   reap       reaps ranks, and says how they ended
ranks      all of them: signalled, killed; who is stuck     deadline   moments at which a wait gives up
sessions   finds and kills every process of a session       cgroup     kills every process of a cgroup, by one write
processes  who started whom, by psutil                      guard      when the launcher itself is killed
delegated  a cgroup that this user may divide               deferral   what signal handlers do not interrupt
way        C or Python for the work on many                 without    that work in Python
reaped     processes left by ranks that other code has reaped
deaths     why a rank has died, by the kernel's facts       orphans    adopted by the first process of a container

It imports only _start, and the engine for its folder, where the guard's program (csrc/guard) lies.
"""
