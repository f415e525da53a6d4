"""The pages: their links lead somewhere, their commands parse, their Python compiles and finds what it imports."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import bench_module  # noqa: F401
import pytest

import dlm_fast

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("docs/*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")))
)
PAGES.append("bench/README.md")
# The program of a command line, and the module whose `main` reads its arguments.
PROGRAMS = {
    "dlm-fast": "dlm_fast.cli",
    "python -m dlm_fast.training": "dlm_fast.training.__main__",
    "python -m bench": "bench.__main__",
    "python -m dlm_kernels.static": "dlm_kernels.static",
    "python -m dlm_kernels.propose": "dlm_kernels.propose",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(text: str) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ {4}.*$", "", FENCE.sub("", text), flags=re.MULTILINE)


def anchors_of(text: str) -> set[str]:
    """What a link may name after #, as the hosts of Markdown make it of a heading."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str, text: str) -> list[str]:
    """Relative links of a page that lead to no file, or to a heading that the linked page does not have."""
    broken = []
    for link in LINK.findall(prose_of(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def command_lines(text: str) -> Iterator[str]:
    """Every command line of a page: of its blocks of code, and those in the running text."""
    blocks = [block for language, block in FENCE.findall(text) if language == "sh"]
    blocks += re.findall(r"^ {4}(\S.*\n(?: {4}.*\n)*)", FENCE.sub("", text), re.MULTILINE)
    blocks += re.findall(r"`((?:dlm-fast|python -m [\w.]+) [^`]+)`", prose_of(text))
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            # What joins programs, and what follows a pipe or a redirection, belongs to the shell.
            for part in re.split(r"&&|;|\||>", line.partition(" #")[0]):
                yield part.strip()


def arguments_of(line: str) -> tuple[str, list[str]] | None:
    """The program of PROGRAMS that a command line starts, and its arguments; None for another program."""
    found = re.search(rf"(?:^|\s)({'|'.join(map(re.escape, PROGRAMS))})(?=\s|$)", line.replace("python3 ", "python "))
    if found is None:
        return None
    arguments = line.replace("python3 ", "python ")[found.end() :]
    return found[1], shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", arguments))


class Parsed(Exception):
    """The arguments were accepted, so nothing needs to run."""


def accepts(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the program's own parser takes the arguments."""
    real = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            importlib.import_module(PROGRAMS[program]).main(arguments)
        except Parsed:
            return True
        except SystemExit:
            return False
    raise AssertionError(f"{program} does not call parse_args")


def python_blocks(text: str) -> list[str]:
    return [block for language, block in FENCE.findall(text) if language == "python"]


def missing_names(tree: ast.AST) -> list[str]:
    """What a block of code imports, or takes from dlm_fast, that does not exist; and presets that do not exist."""
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dlm_fast":
            wanted = [("dlm_fast", node.attr)]
        elif isinstance(node, ast.keyword) and node.arg == "preset" and isinstance(node.value, ast.Constant):
            missing += [] if node.value.value in dlm_fast.PRESETS else [node.value.value]
            continue
        else:
            continue
        for module, name in wanted:
            if name is not None and not hasattr(importlib.import_module(module), name):
                missing.append(f"{module}.{name}")
            elif name is None:
                importlib.import_module(module)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    assert broken_links(page, text_of(page)) == []


def test_a_link_to_nowhere_is_found():
    text = "# One heading\n[a](README.md) [b](#one-heading) [c](absent.md) [d](README.md#absent) [e](https://x.org)\n"
    assert broken_links("CONTRIBUTING.md", text) == ["#one-heading", "absent.md", "README.md#absent"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_one_that_its_program_takes(page, monkeypatch, capsys):
    pytest.importorskip("triton")
    found = [(line, arguments_of(line)) for line in command_lines(text_of(page))]
    refused = [line for line, given in found if given is not None and not accepts(*given, monkeypatch)]
    assert refused == [], capsys.readouterr().err


def test_command_lines_are_found_and_a_wrong_one_is_refused(monkeypatch, capsys):
    pytest.importorskip("triton")
    text = (
        "Use `dlm-fast presets`.\n\n```sh\nX=1 python -m bench quality --no-such   # why\ndlm-fast demo && cd x\n```\n"
    )
    given = [found for line in command_lines(text) if (found := arguments_of(line)) is not None]
    assert given == [("python -m bench", ["quality", "--no-such"]), ("dlm-fast", ["demo"]), ("dlm-fast", ["presets"])]
    assert [accepts(*found, monkeypatch) for found in given] == [False, True, True]


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles_and_finds_what_it_imports(page):
    for number, block in enumerate(python_blocks(text_of(page))):
        tree = ast.parse(block, filename=f"{page}, block {number}")
        assert missing_names(tree) == []


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(text_of(page))])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "dlm_fast" / "tiny" / "checkpoints" / "tiny-block", tmp_path / "my-checkpoint")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in python_blocks(text_of(page)):
        exec(compile(block, page, "exec"), names)
    assert capsys.readouterr().out


def test_the_pages_have_commands_and_python_at_all():
    lines = [line for page in PAGES for line in command_lines(text_of(page))]
    assert {found[0] for line in lines if (found := arguments_of(line)) is not None} == set(PROGRAMS)
    assert sum(len(python_blocks(text_of(page))) for page in PAGES) >= 8


def test_the_readme_is_read_in_five_minutes():
    assert len(text_of("README.md").split()) <= 1200


def test_the_readme_counts_the_presets_and_shows_measured_numbers():
    readme = text_of("README.md")
    assert f"[{len(dlm_fast.PRESETS)} presets]" in readme
    assert f"Eight of the {len(dlm_fast.PRESETS)};" in readme
    measured = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))["settings"]
    rows = re.findall(r"^\| `([\w.-]+)` \| (full|block) \| [^|]+ \| ([\d.]+)% \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) == 8
    for name, visibility, exact_match, nfe in rows:
        (row,) = [r for r in measured if r["label"] == name and r["model"] == f"tiny-{visibility}"]
        assert (f"{100 * row['exact_match']:.1f}", f"{row['nfe']:.1f}") == (exact_match, nfe)
        assert dlm_fast.PRESETS[name].visibility == visibility


def test_the_page_of_launches_is_the_one_that_is_counted():
    from bench import launches

    assert launches.markdown() == text_of("docs/launches.md"), "python -m bench launches > docs/launches.md"


def test_a_step_takes_few_launches():
    from bench import launches

    rows = re.findall(r"^\| `([\w.-]+)` \| \w+ \| (\d+) \| (\d*) \|", text_of("docs/launches.md"), re.MULTILINE)
    assert {name for name, *_ in rows} == {n for n, p in dlm_fast.PRESETS.items() if launches.on_the_device(p)}
    beyond = {name for name, greedy, sampled in rows if max(int(greedy), int(sampled or 0)) > launches.LIMIT}
    assert beyond == set(launches.BEYOND)


def test_the_citation_is_of_this_version_and_license():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (dlm_fast.__version__, "Apache-2.0")
    assert citation["authors"] == [{"name": "The dlm-fast authors"}]


def test_the_changelog_has_one_section_that_is_not_released():
    sections = re.findall(r"^## (.+)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert sections == ["[Unreleased]"]
