"""README and docs/: every block is a command that parses and plans, a recipe that loads, or the map of the folders.

What is printed runs here on a data set made for it, dry where it would take minutes (tests/integration/test_readme.py
runs the first commands of all). A block of a kind that nobody knows fails.
"""

import re
from pathlib import Path

import pytest
import yaml
from pages import PAGES, REPO, blocks, lines, make_images
from ray.scripts.scripts import cli as ray_cli

from softlabel.cli import _JOBLESS_VERBS, _STORE_VERBS, _VERBS, main
from softlabel.config import Recipe
from softlabel.errors import SoftlabelError
from softlabel.flags import parser
from softlabel.recipe_file import load_recipe

MINIMAL = {"name": "x", "classes": ["car", "plane", "ship"], "tiles": {"scenes": "images"}}


def all_blocks():
    return [pytest.param(block, id=f"{page.stem}-{i}") for page in PAGES for i, block in enumerate(blocks(page))]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder in which the commands of README and docs find what they name."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path)
    for name in ("mine", "archive"):
        text = next(block for block in blocks(PAGES[0]) if block.startswith(f"name: {name}"))
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "recipe.yaml").write_text("name: look\nclasses: [any]\ntiles: {scenes: images}\n")
    (tmp_path / "words.txt").write_text("car\nplane\n")
    return tmp_path


@pytest.mark.parametrize("block", all_blocks())
def test_every_block_runs_or_loads(block, world, capsys):
    if block.startswith("softlabel/  "):
        assert is_the_map(block)
    elif re.match(r"\w+:", block):
        assert is_a_recipe(block)
    else:
        assert lines(block) and all(runs(words) for words in lines(block))


def runs(words):
    """Whether a command would do what it says; one that nobody knows here is a KeyError."""
    return COMMANDS[words[0]](words[1:])


def is_the_map(block):
    named = set(re.findall(r"(?<![\w.])(\w+/|\w+\.py)", block))
    assert {"imagery/", "labelling/", "recipes/", "cli.py", "docs/"} <= named
    return all((REPO / name).exists() or (REPO / "softlabel" / name).exists() for name in named)


def is_a_recipe(block):
    data = yaml.safe_load(block)
    named = data.get("label", {}).get("open_vocabulary", {})
    classes = [*named.get("prompts", {}), *named.get("examples", {})] or MINIMAL["classes"]
    return Recipe.model_validate({**MINIMAL, "classes": classes, **data})


def softlabel(words):
    arguments = parser().parse_args(words)
    if words[0] in {*_STORE_VERBS, *_JOBLESS_VERBS}:
        return True  # they parse; a store and a checkpoint have tests of their own
    # The one recipe that is named there without its data.
    here = ["--set", "tiles.scenes=images"] if arguments.config == "owlvit" else []
    return words[0] in _VERBS and main([*words, *here, "--dry-run"]) == 0


def python(words):
    script, *flags = words
    arguments = parser().parse_args([Path(script).stem, *flags])
    return (REPO / script).is_file() and script.startswith("jobs/") and load_recipe(arguments.config, arguments.set)


def ray(words):
    command, *rest = words
    known = ray_cli.commands[command]
    if command == "job":
        known, rest = known.commands[rest[0]], rest[1:]
    if "--" in rest:
        at = rest.index("--")
        rest, submitted = rest[:at], rest[at + 1 :]
        assert runs(submitted)
    flags = {option for parameter in known.params for option in parameter.opts}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= flags
    return all((REPO / word).is_file() for word in rest if word.endswith(".yaml"))


def kubectl(words):
    """Folders that kustomize builds, and names of the jobs there and of what KubeRay makes of them."""
    words = [word for word in words if word not in ("-n", "softlabel")]
    jobs = {f"softlabel-{path.parent.name}" for path in (REPO / "k8s" / "jobs").glob("*/entrypoint.yaml")}
    match words:
        case ["apply", "-k", folder]:
            return (REPO / folder / "kustomization.yaml").is_file()
        case ["logs", "-f", job]:
            return job.removeprefix("job/") in jobs
        case ["delete", "rayjob", job]:
            return job in jobs
        case ["create", "secret", "generic", "softlabel-object-store", *literals]:
            return all(word.startswith("--from-literal=") for word in literals)
        case ["create", "namespace"]:
            return True
        case ["port-forward", service, ports]:
            return service == "service/softlabel-head-svc" and ports == "8265"
    return False


def docker(words):
    return words[0] == "build" and (REPO / words[words.index("-f") + 1]).is_file() and words[-1] == "."


def make(words):
    return words and all(re.search(rf"^{word}:", (REPO / "Makefile").read_text(), re.MULTILINE) for word in words)


def pip(words):
    return words == ["install", "boto3"]  # for `ray up` on AWS, and nothing of ours


def export(words):
    return words == ["RAY_AUTH_MODE=token"]


COMMANDS = {
    "softlabel": softlabel,
    "python": python,
    "ray": ray,
    "kubectl": kubectl,
    "docker": docker,
    "make": make,
    "pip": pip,
    "export": export,
    "RAY_AUTH_MODE=token": runs,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_the_text_exist(page):
    verbs = {*_VERBS, *_STORE_VERBS, *_JOBLESS_VERBS}
    assert set(re.findall(r"`softlabel ([\w-]+)", page.read_text())) <= verbs
    for name in re.findall(r"`((?:jobs|docs|k8s|benchmarks|softlabel)/[\w./-]+)`", page.read_text()):
        assert (REPO / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_overlooked(page):
    text = page.read_text()
    assert text.endswith("\n") and not re.search(r"^[ \t]+```", text, re.MULTILINE)
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = [line.strip() for line in outside.splitlines() if line.startswith("    ") and line.strip()]
    fences = len(re.findall(r"^```", text, re.MULTILINE)) // 2
    found = blocks(page)
    assert [line.strip() for block in found[fences:] for line in block.splitlines() if line.strip()] == indented


@pytest.mark.parametrize(
    "command",
    [
        "python jobs/experiment.py --config paper --set tiles.truht.path=/y",
        "python jobs/nosuch.py --config paper",
        "kubectl apply -k nosuch/x",
        "kubectl logs -f job/nosuch",
        "docker build -f Dockerfile.nosuch .",
        "pip install nosuch",
        "make nosuch",
        "softlabel label --config mine.yaml --set label.engin=x",
        "ray job submit --no-such-flag -- python jobs/tile.py --config demo",
        "nosuch",
    ],
)
def test_a_command_that_does_not_work_is_found(command, world, capsys):
    try:
        worked = runs(command.split())
    except (AssertionError, KeyError, SoftlabelError, SystemExit):
        worked = False
    assert not worked
