"""The import order of the tree, the documents' links and flags, the requirements, the package."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch.distributed.run

import utils
from simsiam.training.recipes import LinearConfig, PretrainConfig
from tests.helpers import ROOT

# A folder of simsiam/ imports only from itself and from the folders before it.
FOLDERS = "runtime models views data evaluation training interop plots".split()
# What each top-level module and each tool may import from the top level.
COMMANDS = {"main", "linear", "model", "utils", "hubconf"}

CODE = [*ROOT.glob("*.py"), *ROOT.glob("simsiam/**/*.py")]
CODE += [*ROOT.glob("tools/*.py"), *ROOT.glob("studies/*.py")]
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {f"{node.module}.{name.name}" for name in node.names}
    return modules


def test_folders_import_only_those_before_them():
    assert {path.parent.name for path in ROOT.glob("simsiam/*/*.py")} == set(FOLDERS)
    for i, folder in enumerate(FOLDERS):
        for path in ROOT.glob(f"simsiam/{folder}/*.py"):
            modules = imports(path)
            inner = {name.split(".")[1] for name in modules if name.startswith("simsiam.")}
            assert inner <= set(FOLDERS[: i + 1]), f"{path} imports {inner - set(FOLDERS[: i + 1])}"
            outer = {name.split(".")[0] for name in modules}
            assert not outer & {*COMMANDS, "tools", "studies"}, path


# ---- documents and requirements -----------------------------------------------------------------


def test_the_documents_flags_exist():
    text = " ".join(
        line
        for path in DOCUMENTS
        if path.name != "LOG.md"  # its flags exist at the commits that it names
        for line in path.read_text().splitlines()
        if not line.startswith("#SBATCH")
    )
    existing = set(torch.distributed.run.get_args_parser()._option_string_actions) | {"--help"}
    sources = [
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("studies/*.py"),
        ROOT / "model.py",
        *ROOT.glob("tests/*.py"),
    ]
    existing |= set(re.findall(r'"(--\w+)"', "".join(path.read_text() for path in sources)))
    for config in (PretrainConfig, LinearConfig):
        existing |= set(utils.ConfigParser("", "", config)._option_string_actions)
    words = {word.strip("`,.();:") for word in text.split() if word.startswith(("--", "`--"))}
    assert len(words) > 30
    unknown = {word.split("=")[0] for word in words} - existing
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


@pytest.mark.skipif(sys.platform != "linux", reason="stdlib differs")
def test_the_requirements_are_what_is_imported():

    def required(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        return {line.split(">=")[0].strip() for line in lines if line and line[0] not in "#-"}

    def imported(*paths: Path) -> set[str]:
        modules = {name.split(".")[0] for path in paths for name in imports(path)}
        third = modules - set(sys.stdlib_module_names) - {*COMMANDS, "tools", "studies"}
        names = {"PIL": "Pillow", "sklearn": "scikit-learn"}
        return {names.get(name, name) for name in third - {"simsiam"}}

    product, development = required("requirements.txt"), required("requirements-dev.txt")
    # These are optional: imported where they are used.
    optional = {"webdataset", "safetensors", "tifffile"}
    assert imported(*ROOT.glob("*.py"), *ROOT.glob("simsiam/**/*.py")) - optional == product
    assert imported(*ROOT.glob("tools/*.py"), *ROOT.glob("studies/*.py")) <= product | development


def test_the_wheel_has_the_package_alone(tmp_path):
    """From a copy, since setuptools writes beside its source."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "simsiam", source / "simsiam")
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    program = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == {str(path.relative_to(ROOT)) for path in ROOT.glob("simsiam/**/*.py")}
