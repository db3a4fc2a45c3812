"""In torch's place: what torch's elastic agent calls, with torch's names and signatures.

handler       SubprocessHandler                             elastic       the agent's own classes, over ours
numa_options  NumaOptions                                   seams         what ours rest on in torch, checked

It never imports torch, but in elastic, which torch itself has loaded by then; and nothing of _cli.
"""
