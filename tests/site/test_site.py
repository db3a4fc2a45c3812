"""The site that ``make docs`` has built: its search knows the words of its readers, and each option has an anchor."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from sphinx.search.en import SearchEnglish

from rankspawn._cli.main import _parser

SITE = Path(__file__).parent.parent.parent / "build" / "docs"


@pytest.fixture(scope="module")
def index() -> Any:
    """What the page of the search loads."""
    text = (SITE / "searchindex.js").read_text(encoding="utf-8")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])


def found(index: Any, query: str) -> set[str]:
    """The pages that have all words of a query in their text or titles, as the search's script finds them: without
    numbers, and without the words that are in every English text."""
    english = SearchEnglish({})
    stem = english.stem
    pages = set(range(len(index["docnames"])))
    words = [word for word in re.findall(r"\w+", query.lower()) if not word.isdecimal()]
    for word in (word for word in words if word not in english.stopwords):
        here: set[int] = set()
        for terms in (index["terms"], index["titleterms"]):
            listed = terms.get(stem(word), terms.get(word, []))
            here.update([listed] if isinstance(listed, int) else listed)
        pages &= here
    return {index["docnames"][page] for page in pages}


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("oom", "symptoms"),
        ("out memory", "guide/failures"),
        ("orphan", "guide/cleanup"),
        ("zombie", "guide/cleanup"),
        ("crash", "guide/failures"),
        ("core dump", "symptoms"),
        ("preemption", "guide/cleanup"),
        ("tqdm", "guide/logs"),
        ("progress bar", "guide/logs"),
        ("hang", "guide/failures"),
        ("deadlock", "symptoms"),
        ("NCCL", "tutorial"),
        ("NCCL timeout", "symptoms"),
        ("NCCL timeout", "guide/hangs"),
        ("segfault", "guide/failures"),
        ("segmentation fault", "symptoms"),
        ("address already in use", "symptoms"),
        ("port 29500", "guide/run"),
        ("CUDA_VISIBLE_DEVICES", "guide/placement"),
        ("exit code 137", "symptoms"),
        ("checkpoint", "guide/cleanup"),
        ("traceback", "guide/failures"),
        ("Ctrl-C", "guide/cleanup"),
        ("kill -9", "symptoms"),
        ("slow", "symptoms"),
        ("docker", "guide/containers"),
        ("sbatch", "tutorial"),
        ("ddp", "tutorial"),
        ("master_addr", "tutorial"),
        ("elastic", "moving"),
        ("--max-restarts", "commands"),
    ],
)
def test_search_finds(index: Any, query: str, page: str) -> None:
    assert page in found(index, query)


def test_search_does_not_find_everything(index: Any) -> None:
    assert found(index, "xylophone") == set()
    assert len(found(index, "zombie")) < len(index["docnames"]) / 2


def test_moving_from_torchrun_is_second_in_the_menu() -> None:
    page = (SITE / "index.html").read_text(encoding="utf-8")
    menu = re.findall(r'toctree-l1"><a class="reference internal" href="([^"]*)">', page)
    assert menu[:2] == ["tutorial.html", "moving.html"]


def test_each_option_has_an_anchor() -> None:
    page = (SITE / "commands.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'id="cmdoption-([^"]*)"', page))
    (commands,) = (one for one in _parser()._actions if isinstance(one, argparse._SubParsersAction))
    seen = 0
    for name, command in commands.choices.items():
        if name == "torchrun" or not command._add_options:
            continue
        command._add_options(command)
        for action in command._actions:
            for option in action.option_strings:
                if action.help != argparse.SUPPRESS and "_" not in option:
                    seen += 1
                    assert f"rankspawn-{name}-{option.lstrip('-')}" in anchors
    assert seen > 60


def test_pictures_are_there() -> None:
    page = (SITE / "index.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img[^>]* src="([^"]+\.svg)"', page)
    assert len(pictures) >= 2
    assert all((SITE / picture).is_file() for picture in pictures)
