"""What GitHub and contributors read: the workflow, the issue forms, the links of the top-level pages.

A workflow runs where nobody looks, so what its commands name is compared with what there is.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from csrc import build_config
from csrc.kernels import kernel_list

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
FORMS = ("bug.yml", "feature.yml")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / ".github" / name).read_text())


@pytest.fixture(scope="module")
def jobs() -> dict[str, dict]:
    return read_yaml("workflows/ci.yml")["jobs"]


def commands(job: dict) -> list[list[str]]:
    """The words of each command of a job's steps."""
    lines = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    return [shlex.split(command) for line in lines for command in line.split("&&")]


def make_targets() -> set[str]:
    found = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(found[1].split())


def after(words: list[str], option: str) -> list[str]:
    """The values of an option among a command's words."""
    values = words[words.index(option) + 1 :]
    end = next((i for i, word in enumerate(values) if word.startswith("--")), len(values))
    return values[:end]


def test_commands_are_make_targets_scripts_of_the_repository_or_the_image_s_packages(
    jobs: dict[str, dict],
) -> None:
    for name, job in jobs.items():
        for words in commands(job):
            if words[0] == "make":
                assert words[1] in make_targets(), (name, words)
            elif words[0] == "python3":
                assert (ROOT / words[1]).is_file(), (name, words)
            else:
                assert words[0] == "apt-get", (name, words)


def test_there_are_lint_tests_and_compilation(jobs: dict[str, dict]) -> None:
    assert commands(jobs["lint"]) == [["make", "lint"]]
    assert commands(jobs["tests"]) == [["make", "test"]]
    assert commands(jobs["compile"])[-1][:2] == ["python3", "benchmarks/bench_build.py"]
    assert all(job["timeout-minutes"] <= 60 for job in jobs.values())


def test_lint_checks_what_the_workflow_says() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for tool in ("ruff check", "ruff format --check", "mypy", "clang-format"):
        assert tool in recipe[1]


def test_oldest_python_of_the_tests_is_the_oldest_that_is_supported(jobs: dict[str, dict]) -> None:
    versions = jobs["tests"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert versions == [oldest[1], "3.13"]
    assert all(isinstance(version, str) for version in versions)  # as a number 3.10 is 3.1


def test_one_unit_of_each_family_is_compiled(jobs: dict[str, dict]) -> None:
    command = commands(jobs["compile"])[-1]
    archs = build_config.parse_archs(*after(command, "--archs"))
    units = {unit.name: unit for unit in kernel_list.units(archs)}
    named = after(command, "--units")
    assert set(named) <= set(units)
    families = [(units[name].isa, units[name].pass_name) for name in named]
    everything = [(isa, name) for isa, passes in kernel_list.PASSES.items() for name in passes]
    assert sorted(families) == sorted(everything)


def test_compiler_is_that_of_the_committed_report(jobs: dict[str, dict]) -> None:
    version = re.match(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-", jobs["compile"]["container"])[1]
    report = json.loads((ROOT / "benchmarks" / "results" / "build.json").read_text())
    assert report["nvcc"] == version


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_ask_for_the_report(name: str) -> None:
    form = read_yaml(f"ISSUE_TEMPLATE/{name}")
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"]}
    assert len(fields) == len(form["body"])
    report = fields["report"]
    assert report["validations"]["required"]
    assert report["attributes"]["label"] == "python -m flash_attn"
    assert (ROOT / "flash_attn" / "__main__.py").is_file()


def test_every_issue_is_one_of_the_forms() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    assert {path.name for path in folder.iterdir()} == {*FORMS, "config.yml"}
    assert read_yaml("ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}


@pytest.mark.parametrize("name", PAGES)
def test_links_of_top_level_pages_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / name).read_text())
    here = [link for link in links if "://" not in link]
    assert not [link for link in here if not (ROOT / link).exists()]


@pytest.mark.parametrize("name", PAGES[1:])
def test_readme_leads_to_the_other_pages(name: str) -> None:
    assert f"]({name})" in (ROOT / "README.md").read_text()
