"""README and docs/: every block is a command that parses and plans, a recipe that loads, or the map of the folders.

What is printed runs here on a data set made for it, dry where it would take minutes (tests/integration/test_readme.py
runs the first commands of all). A block of a kind that nobody knows fails.
"""

import argparse
import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, REPO, blocks, lines, make_images
from ray.scripts.scripts import cli as ray_cli

from softlabel.cli import _STORE_VERBS, _VERBS, _parser, main
from softlabel.config import Recipe
from softlabel.recipe_file import load_recipe

MINIMAL = {"name": "x", "classes": ["car", "plane", "ship"], "tiles": {"scenes": "images"}}


def all_blocks():
    return [pytest.param(block, id=f"{page.stem}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder in which the commands of README and docs find what they name."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path)
    (tmp_path / "mine.yaml").write_text(next(block for block in blocks(PAGES[0]) if block.startswith("name: mine")))
    (tmp_path / "recipe.yaml").write_text("name: look\nclasses: [any]\ntiles: {scenes: images}\n")
    (tmp_path / "words.txt").write_text("car\nplane\n")
    return tmp_path


@pytest.mark.parametrize("block", all_blocks())
def test_every_block_runs_or_loads(block, world, capsys):
    if block.startswith("softlabel/  "):
        is_the_map(block)
    elif re.match(r"\w+:", block):
        is_a_recipe(block)
    else:
        for words in lines(block):
            COMMANDS[words[0]](words[1:])


def is_the_map(block):
    named = set(re.findall(r"(?<![\w.])(\w+/|\w+\.py)", block))
    assert {"imagery/", "labelling/", "recipes/", "cli.py", "docs/"} <= named
    assert all((REPO / name).exists() or (REPO / "softlabel" / name).exists() for name in named)


def is_a_recipe(block):
    data = yaml.safe_load(block)
    named = data.get("label", {}).get("owlvit", {})
    classes = [*named.get("prompts", {}), *named.get("examples", {})] or MINIMAL["classes"]
    assert Recipe.model_validate({**MINIMAL, "classes": classes, **data})


def softlabel(words):
    arguments = _parser().parse_args(words)
    if words[0] in _VERBS:
        # The one recipe that is named there without its data.
        here = ["--set", "tiles.scenes=images"] if arguments.config == "owlvit" else []
        assert main([*words, *here, "--dry-run"]) == 0
    else:
        assert words[0] in {*_STORE_VERBS, "import-weights"} and isinstance(arguments, argparse.Namespace)


def python(words):
    script, *flags = words
    assert (REPO / script).is_file() and script.startswith("jobs/")
    arguments = _parser().parse_args([Path(script).stem, *flags])
    assert load_recipe(arguments.config, arguments.set).name


def ray(words):
    command, *rest = words
    known = ray_cli.commands[command]
    if command == "job":
        known, rest = known.commands[rest[0]], rest[1:]
    if "--" in rest:
        rest, (name, *words) = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
        COMMANDS[name](words)
    flags = {option for parameter in known.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= flags
    assert all((REPO / word).is_file() for word in rest if word.endswith(".yaml"))


def files(words):
    named = [word for word in words if "/" in word and word.startswith("k8s/")]
    assert named == [] or all((REPO / word).is_file() for word in named)
    assert words[0] in ("apply", "build", "logs", "replace")


def make(words):
    assert all(re.search(rf"^{word}:", (REPO / "Makefile").read_text(), re.MULTILINE) for word in words) and words


def pip(words):
    assert words[0] == "install" and len(words) > 1


def export(words):
    assert words == ["RAY_AUTH_MODE=token"]


COMMANDS = {
    "softlabel": softlabel,
    "python": python,
    "ray": ray,
    "kubectl": files,
    "docker": files,
    "make": make,
    "pip": pip,
    "export": export,
    "RAY_AUTH_MODE=token": lambda words: COMMANDS[words[0]](words[1:]),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_exist(page):
    verbs = {*_VERBS, *_STORE_VERBS, "import-weights"}
    assert set(re.findall(r"`softlabel ([\w-]+)", page.read_text())) <= verbs
    for name in re.findall(r"`((?:jobs|docs|k8s|benchmarks|softlabel)/[\w./-]+)`", page.read_text()):
        assert (REPO / name).exists(), name


def test_blocks_are_found():
    assert len(blocks(PAGES[0])) >= 8 and sum(len(blocks(page)) for page in PAGES) >= 14
