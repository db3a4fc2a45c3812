"""What processes do now: takes their stacks from outside, and sends them no signal.

facts      a process, its threads and their frames         kernel     what /proc says of processes and threads
unwinder   Python frames, by the standard library          spy        Python frames, by py-spy
take       all of it at once, within a limited time        fold       a look as one line, and as text
ranks      which processes are ranks                       now        what they use, and where they are bound
still      what stands still, and who waits for a person

It starts py-spy and nothing else, and it knows no group: it imports only _start.
"""
