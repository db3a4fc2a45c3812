"""How ranks are ended so that no process is left.

watch      sees that a rank has ended, without reaping it   reap       how ranks ended; they are collected
ranks      all of them: signalled, killed; who is stuck     deadline   moments until which something is waited for
sessions   everybody in a session, looked for and killed    cgroup     everybody in a cgroup, in one write
processes  who started whom, by psutil                      guard      when the launcher itself is killed
delegated  a cgroup that this user may divide               deferral   what signal handlers do not interrupt
way        C or Python for the work on many                 without    that work in Python
reaped     what ranks have left that other code has reaped
deaths     why a rank has died, by the kernel's facts

It imports only _start, and the engine for its folder, where the guard's program (csrc/guard) lies.
"""
