"""The shape of the tree: what imports what, how long things are, where a newcomer finds them."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch.distributed.run

import linear
import main
from simsiam import checkpoint, metrics
from simsiam.views import Augmentation
from tests.helpers import ROOT

# Each room imports only rooms before it.
ROOMS = (
    "batchnorm ranks files lock backbones network optimizer planes images folders textures "
    "operations views recipes loader shards datasets metrics scores fitting probe monitor survey "
    "progress devices serialization checkpoint layouts exports weights run lettering figures "
    "sheets pictures"
).split()
COMMANDS = {"main", "linear"}
# What is longer than the others may be, and why. This list may only shrink.
LONG_FILES = {
    "linear.py": "fitting and fine-tuning are one command's",
    "tools/bench.py": "nine benchmarks, each a function",
}
LONG_FUNCTIONS: dict[str, str] = {}

CODE = [*ROOT.glob("*.py"), *ROOT.glob("simsiam/*.py"), *ROOT.glob("tools/*.py")]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]


def imports(path: Path) -> set[str]:
    """The modules that a file imports: `simsiam.x`, or a top-level name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = node.module in ("simsiam", "tools")
            found |= {f"{node.module}.{n.name}" for n in node.names} if inner else {node.module}
    return found


def test_the_arrows_of_the_design_hold():
    rooms = {path.stem for path in ROOT.glob("simsiam/*.py")} - {"__init__"}
    assert rooms == set(ROOMS)
    for i, room in enumerate(ROOMS):
        found = imports(ROOT / "simsiam" / f"{room}.py")
        ours = {name.split(".")[1] for name in found if name.startswith("simsiam.")}
        assert ours <= set(ROOMS[:i]), f"{room} imports {ours - set(ROOMS[:i])}"
        assert not found & {"main", "linear", "model", "utils", "hubconf", "tools"}, room
    for path in CODE:
        outside = imports(path) & {*COMMANDS, "model", "utils", "hubconf", "evaluation"}
        allowed = {
            "hubconf.py": set(),
            "utils.py": set(),
            "linear.py": {"utils", "evaluation"},
            "bench.py": {*COMMANDS, "utils"},  # it times them
            "profiler.py": {"main"},
            "gpu.py": {"main", "utils"},
            "speedrun.py": {"main", "utils"},  # it makes what they make
        }.get(path.name, {"utils"})
        if path.parent.name != "simsiam":
            assert outside <= allowed, f"{path.name} imports {outside - allowed}"


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_the_network_s_door_defines_its_command_alone():
    assert [node.name for node in functions(ROOT / "model.py")] == ["command"]


def lines_of_code(node: ast.FunctionDef, lines: list[str]) -> int:
    """Without docstring, blank lines, comments and declarations of flags."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    skipped = set(range(first.lineno, first.end_lineno + 1)) if documented else set()
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id == "add":
            skipped |= set(range(part.lineno, part.end_lineno + 1))
    own = (i for i in range(node.lineno, node.end_lineno + 1) if i not in skipped)
    return sum(bool(lines[i - 1].strip()) and lines[i - 1].strip()[0] != "#" for i in own)


def test_functions_and_files_are_short():
    long_files, long_functions = set(), set()
    for path in CODE:
        name, lines = str(path.relative_to(ROOT)), path.read_text().splitlines()
        if len(lines) > 420:
            long_files.add(name)
        for node in functions(path):
            if lines_of_code(node, lines) > 60:
                long_functions.add(f"{name}: {node.name}")
    assert long_files == set(LONG_FILES)
    assert long_functions == set(LONG_FUNCTIONS)


@pytest.mark.parametrize("command", ["main", "linear"])
def test_commands_have_no_closures(command):
    for node in functions(ROOT / f"{command}.py"):
        inner = [part for part in ast.walk(node) if isinstance(part, ast.FunctionDef)]
        assert inner == [node], f"{node.name} has a function within"


# ---- a newcomer's three questions ---------------------------------------------------------------


def assigned(pattern: str) -> list[str]:
    """Where a line of the code matches."""
    return [
        f"{path.relative_to(ROOT)}"
        for path in CODE
        for line in path.read_text().splitlines()
        if re.search(pattern, line)
    ]


def test_the_crop_scale_is_in_one_place():
    assert assigned(r"^\s+crop_scale: .* = ") == ["simsiam/views.py"]
    assert Augmentation().crop_scale == (0.2, 1.0)
    # Besides its default only linear.py's own protocol sets one.
    assert assigned(r"crop_scale=\(") == ["linear.py"]


def test_the_knn_s_temperature_is_in_one_place():
    assert assigned(r"TEMPERATURE = ") == ["simsiam/metrics.py"]
    assert main.make_flags().defaults["temperature"] == metrics.TEMPERATURE == 0.1
    assert assigned(r"temperature.*0\.1\b") == []


def test_the_checkpoint_s_format_is_in_one_place():
    assert assigned(r"^FORMAT = ") == ["simsiam/checkpoint.py"]
    table = (ROOT / "docs" / "checkpoints.md").read_text()
    keys = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert [key for key in keys if key in checkpoint.FORMAT] == list(checkpoint.FORMAT)


def test_the_names_in_docstrings_and_comments_exist():
    told, known = set(), set()
    for path in [*CODE, *ROOT.glob("tests/*.py")]:
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                text = token.type == tokenize.COMMENT or token.string.startswith('"""')
                names = re.findall(r"`(\w+)`" if text else r"\w+", token.string)
                (told if text else known).update(names)
    assert len(told) > 300
    ends = {name for name in told if name[0] == "_"}  # of names: `_p`
    assert not told - known - {end for end in ends for name in known if name.endswith(end)}


# ---- documents and requirements -----------------------------------------------------------------


def test_the_documents_flags_exist():
    text = " ".join(
        line
        for path in DOCUMENTS
        for line in path.read_text().splitlines()
        if not line.startswith("#SBATCH")
    )
    known = set(torch.distributed.run.get_args_parser()._option_string_actions) | {"--help"}
    sources = [*ROOT.glob("tools/*.py"), ROOT / "model.py", *ROOT.glob("tests/*.py")]
    known |= set(re.findall(r'"(--\w+)"', "".join(path.read_text() for path in sources)))
    for command in (main, linear):
        known |= set(command.make_flags()._option_string_actions)
    words = {word.strip("`,.();:") for word in text.split() if word.startswith(("--", "`--"))}
    assert len(words) > 30
    unknown = {word.split("=")[0] for word in words} - known
    assert not {word for word in unknown if re.match(r"--\w", word)}


def test_the_documents_links_lead_somewhere():
    def anchors(path: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            place = (path.parent / file).resolve() if file else path
            assert place.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(place), f"{path.name}: {target}"


def test_a_document_s_contents_name_its_sections():
    found = 0
    for path in DOCUMENTS:
        text = path.read_text()
        contents = re.findall(r"^- \[(.+?)\]\(#", text.partition("\n## ")[0], re.M)
        assert contents in ([], re.findall(r"^## (.+)$", text, re.M)), path.name
        found += bool(contents)
    assert found == 4


def test_the_readme_is_short_and_ci_finds_its_test_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 230
    assert "python -m pytest" in text
    assert "python main.py --data_name textures" in text


def test_the_readme_names_each_room():
    tree = (ROOT / "README.md").read_text().partition("\nsimsiam/ ")[2].partition("\ntools/")[0]
    named = set(re.findall(r"(?:^  |; )(\w+)(?=  |[:;\n])", tree, re.M))
    assert named == {*ROOMS}


@pytest.mark.skipif(sys.platform != "linux", reason="stdlib differs")
def test_the_kept_requirements_are_the_ones_imported():
    """No dependency that nothing imports, none imported that is not required."""

    def required(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        return {line.split(">=")[0].strip() for line in lines if line and line[0] not in "#-"}

    def imported(*paths: Path) -> set[str]:
        found = {name.split(".")[0] for path in paths for name in imports(path)}
        third = (
            found
            - set(sys.stdlib_module_names)
            - {*COMMANDS, "model", "utils", "evaluation", "tools"}
        )
        names = {"PIL": "Pillow", "sklearn": "scikit-learn"}
        return {names.get(name, name) for name in third - {"simsiam"}}

    kept, others = required("requirements.txt"), required("requirements-dev.txt")
    # These are optional: imported where they are used.
    optional = {"webdataset", "safetensors", "tifffile"}
    assert imported(*ROOT.glob("*.py"), *ROOT.glob("simsiam/*.py")) - optional == kept
    assert imported(*ROOT.glob("tools/*.py")) <= kept | others


def test_pip_installs_the_package_alone(tmp_path):
    """Into an empty folder, from a copy, since setuptools writes beside its source."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "simsiam", source / "simsiam")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, source], check=True)
    assert {path.name.split("-")[0] for path in target.iterdir()} == {"simsiam"}
    program = "import simsiam.run, simsiam.weights as w; print(w.__file__)"
    command = [sys.executable, "-c", program]
    env = os.environ | {"PYTHONPATH": str(target)}
    out = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    assert out.stdout.strip() == str(target / "simsiam" / "weights.py")
