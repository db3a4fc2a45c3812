"""The end of each command's help: examples and exit statuses."""

from __future__ import annotations

import argparse

ENDS = {
    "": """
`rankspawn help COMMAND` shows the options and examples of a command.

examples:
  rankspawn run --nproc-per-node 8 train.py   start 8 ranks, as torchrun does
  rankspawn plan                              show where the ranks would go
  rankspawn ps                                show the jobs that run here
""",
    "run": """
examples:
  rankspawn run --nproc-per-node gpu train.py --epochs 3
  rankspawn run --nproc-per-node 8 --log-dir logs --max-restarts 2 train.py
  rankspawn run --nproc-per-node 4 --tee -m package.train
  rankspawn run --nproc-per-node 2 --no-python ./program

exit status:
  0      all ranks ended with status 0
  N      the rank that failed first ended with status N
  128+S  that rank was killed by signal S, or signal S has ended the job
  1      the system refused something: files, memory, a binding
  2      wrong usage, or a SCRIPT that does not exist
  126    the program cannot be executed
  127    the program does not exist
""",
    "bind": """
examples:
  mpirun -n 8 rankspawn bind python train.py
  srun -n 8 rankspawn bind --numa-binding socket -- ./program --option

exit status:
  that of PROGRAM, which replaces this command; else
  1      the system refused the binding
  2      wrong usage, or no local rank is known
  126    the program cannot be executed
  127    the program does not exist
""",
    "topology": """
examples:
  rankspawn topology
  rankspawn topology --svg machine.svg
  rankspawn topology --capture machine.tar.gz

exit status:
  0      the machine was shown
  1      the machine cannot be read
  2      wrong usage
""",
    "plan": """
examples:
  rankspawn plan
  rankspawn plan --nproc-per-node 8 --numa-binding core-complex --map
  rankspawn plan --svg plan.svg
  rankspawn plan --warm train.py

exit status:
  0      every rank has a place
  1      the machine cannot be read
  2      wrong usage, or a rank cannot be placed
""",
    "ps": """
examples:
  rankspawn ps
  rankspawn ps --watch 5
  rankspawn ps --json

exit status:
  0      the jobs were shown, or no job runs
  2      wrong usage
""",
    "dump": """
examples:
  rankspawn dump 4711
  rankspawn dump --folded 4711

exit status:
  0      the stacks were printed
  1      the job does not run
  2      wrong usage
""",
    "doctor": """
examples:
  rankspawn doctor
  rankspawn doctor --json

exit status:
  0      processes can be bound to CPUs at birth
  1      they cannot: the report says why
  2      wrong usage
""",
    "completion": """
examples:
  rankspawn completion bash >> ~/.bash_completion
  rankspawn completion zsh > "${fpath[1]}/_rankspawn"

exit status:
  0      the script was printed
  1      shtab is not installed: pip install "rankspawn[completion]"
  2      wrong usage
""",
}
"""The text by command; "" is rankspawn itself."""


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter, except that it does not wrap the lines of ENDS."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text in ENDS.values():
            return text.strip("\n")
        return super()._fill_text(text, width, indent)
