"""``python -m rankspawn`` is the ``rankspawn`` command."""

import sys

from ._cli import main

sys.exit(main())
