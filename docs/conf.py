"""Sphinx's configuration, for `make docs`. Pages are Markdown (MyST) but for the reference, which autodoc fills."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from importlib.metadata import version as version_of

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rankspawn._cli.main import _parser

project = "rankspawn"
author = "The rankspawn developers"
project_copyright = author
release = version = version_of("rankspawn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
highlight_language = "text"
default_role = "code"
smartquotes_action = "q"  # two dashes begin an option, and stay two

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


class CommandOptions(SphinxDirective):
    """A command's usage, and an entry with an anchor for each of its options: ``{command-options} run``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = _parser_of(self.arguments[0])
        return self.parse_text_to_nodes("\n".join(_entries(parser)))


def _parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, with the options that it adds when it is about to parse."""
    (commands,) = (one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction))
    command = commands.choices[name]
    command._add_options(command)
    return command


def _entries(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What the parser knows, as MyST: its usage and description, its groups, and an ``option`` for each option."""
    usage = parser.format_usage().removeprefix("usage: ").strip()
    yield from ("```text", usage, "```", "", _text(parser.description or ""), "")
    yield from (f"```{{program}} {parser.prog}", "```", "")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if actions or group.description:
            yield from (f"```{{rubric}} {group.title}", "```", "", _text(group.description or ""), "")
        for action in actions:
            # torchrun's spellings with underscores mean the same.
            names = [name for name in action.option_strings if "_" not in name] or [str(action.metavar or action.dest)]
            kind = "option" if action.option_strings else "describe"
            if action.option_strings and action.nargs != 0:
                value = action.metavar or action.dest.upper()
                names = [f"{name} {f'[{value}]' if action.nargs == '?' else value}" for name in names]
            words = parser._get_formatter()._expand_help(action)
            yield from (f"```{{{kind}}} {', '.join(names)}", _text(words), "```", "")
    if parser.epilog:
        yield from ("```text", parser.epilog, "```", "")


def _text(line: str) -> str:
    """The words as text of MyST: what would be markup is not."""
    return re.sub(r"([\\`*_\[\]<>$])", r"\\\1", line)


def setup(app: Sphinx) -> None:
    app.add_directive("command-options", CommandOptions)
