"""A warm start: ranks are forked from a template, which has imported what they need, instead of executed.

template   the processes of a Template, kept over launches   importer   the program that imports, and forks on request
ranks      the ranks of a launch, and which template fits    imports    imports modules; says if ranks can be forked
stem       one template: adopted, asked for ranks, ended     variables  environment variables that imports read and set
adoption   a child's child becomes the launcher's child      rank       a forked rank becomes the program that it runs
wire       messages and descriptors between the two          command    splits the interpreter's options from a command
inherited  what a process has from its parent                find       what a script imports at its top

A warm rank is a child of the launcher, born by the steps of csrc/child.c, as any other. It imports neither _group nor a
face.

Each node that has ranks gets a template that imports for itself. The alternative is one import, and for each further
node a fork that is bound there and copies its memory by MADV_POPULATE_WRITE: the present pages, or whole mappings. It
was tried outside the package, with torch 2.13 without CUDA:

                                                   import        copy of pages  copy of mappings
    CPU time: torch and torch._dynamo, two cores   3.2 to 4.2 s  0.25 s         0.2 s
    CPU time: torch, five nodes by emulation       35 to 41 s    3.2 s          2.0 s
    there: private pages that are on the node      all           99.3 %         97.9 %
    there: private memory                          143 MiB       146 MiB        222 MiB

A copy saves CPU time, and little of the time until ranks run: nodes import at the same time, each on its own CPUs, and
a copy begins when the import has ended. Two imports at once took 0.9 and, in a second turn, 1.6 times as long as one
alone, on two cores with a load of 2 to 3 from other work; eight took 1.3 times as long as one on 16 CPUs. What a copy
would cost: the present pages are found by pagemap, because whole mappings hold much that was never touched (numpy
alone: 13 MiB became 89), and relocated data has to be writable for a moment. What imports derive from CPUs would be
the first node's: torch and OpenBLAS, imported on one CPU and forked, use one thread on two. All ranks of the machine,
and not only those of a node, would have the same hash seed and addresses. Reconsider it for many nodes and slow file
systems.
"""
