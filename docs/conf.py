"""Sphinx's configuration, for `make docs`. Pages are Markdown (MyST) but for the reference, which autodoc fills."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version as version_of

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

project = "rankspawn"
author = "The rankspawn developers"
project_copyright = author
release = version = version_of("rankspawn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
highlight_language = "text"
default_role = "code"

html_theme = "furo"
html_title = f"rankspawn {version}"
html_static_path = ["_static"]
html_css_files = ["rankspawn.css"]
html_copy_source = False

autodoc_member_order = "bysource"
napoleon_use_ivar = True  # an attribute that a class's docstring describes needs no entry of its own
add_module_names = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

# The standard library's types in signatures are not described here; each of ours has to be.
# pathlib.Path, in RankFiles, and asyncio.subprocess.Process
nitpick_ignore = [("py:class", "Path"), ("py:class", "Process")]
nitpick_ignore_regex = [("py:.*", r"(os|signal|collections\.abc|contextlib|subprocess)\..*")]


class CommandHelp(SphinxDirective):
    """What a command says of itself: ``{command-help} run``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "rankspawn", self.arguments[0], "--help"]
        environ = {**os.environ, "COLUMNS": "88", "NO_COLOR": "1"}
        told = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
        return [nodes.literal_block(told, told, language="text")]


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
