"""The house's rules: who imports whom, what stays light, and the shape of a training script."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("utils", "my_dataset")
PROGRAMS = ("scripts", "recipes", "bench", "tests")
HEAVY = {"diffusers", "transformers", "peft", "accelerate"}
# Their tests run in seconds, and degradations run in every loader process.
LIGHT = ("utils/flow_matching.py", "my_dataset/degradations.py", "my_dataset/damage.py", "utils/metrics.py")


def is_ours(path):
    parts = path.relative_to(ROOT).parts
    return not any(part.startswith(".") or part in ("outputs", "dog") for part in parts)


def sources(pattern="**/*.py"):
    return sorted(path for path in ROOT.glob(pattern) if is_ours(path))


def imports(path, module_level=False):
    """Full names of the modules that a file imports; with module_level those that importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(tree.body) if module_level else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module lives"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(names):
    return {name.partition(".")[0] for name in names}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def root_scripts():
    return {path.stem for path in sources("*.py")}


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_import_neither_each_other_nor_programs(library):
    files = sources(f"{library}/**/*.py")
    assert files
    forbidden = (set(LIBRARIES) - {library}) | set(PROGRAMS) | root_scripts()
    for path in files:
        assert not tops(imports(path)) & forbidden, name_of(path)


def test_programs_do_not_import_root_scripts_except_to_test_or_measure_them():
    for path in sources("scripts/**/*.py"):
        assert not tops(imports(path)) & (root_scripts() | {"tests", "bench"}), name_of(path)


def test_root_scripts_import_libraries_only():
    for path in sources("*.py"):
        assert not tops(imports(path)) & (set(PROGRAMS) | (root_scripts() - {path.stem})), name_of(path)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_module_level(name):
    assert not tops(imports(ROOT / name, module_level=True)) & HEAVY


def test_importing_the_light_modules_loads_nothing_heavy():
    """Also not by way of another module."""
    modules = ", ".join(name.removesuffix(".py").replace("/", ".") for name in LIGHT)
    script = f"import sys, {modules}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def training_scripts():
    """Without the recipes' programs that are but another name of one, a dozen lines."""
    named = [path for path in sources("recipes/*/train*.py") if len(path.read_text().splitlines()) > 12]
    return sources("train_*.py") + named


@pytest.mark.parametrize("path", training_scripts(), ids=name_of)
def test_a_training_script_is_parse_args_training_step_main_in_this_order(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert functions == ["parse_args", "training_step", "main"]
    assert ast.get_docstring(tree), "its docstring states idea, equation and command"


def test_there_is_a_training_script():
    assert "train_deg_lora_flux_kontext.py" in {name_of(path) for path in training_scripts()}


def test_every_module_states_what_it_is_for():
    for path in sources("utils/*.py") + sources("my_dataset/*.py") + sources("scripts/*.py") + sources("*.py"):
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name_of(path)


def test_no_pickle_is_loaded_without_weights_only():
    for path in sources():
        if name_of(path).startswith("tests/"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
            assert called not in ("pickle.load", "pickle.loads"), name_of(path)
            if called == "torch.load":
                options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert options.get("weights_only") is True, name_of(path)


def test_no_exception_is_swallowed():
    for path in sources():
        if name_of(path).startswith("tests/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or getattr(node.type, "id", "") in ("Exception", "BaseException")
                kept = any(isinstance(inner, (ast.Raise, ast.Call)) for child in node.body for inner in ast.walk(child))
                assert kept or not broad, f"{name_of(path)}:{node.lineno}"


def test_pytest_does_not_collect_the_test_script_of_the_root():
    import tomllib

    with open(ROOT / "pyproject.toml", "rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md", "README_DEGRADATION_LORA.md",
                                    "README_DREAMBOOTH.md", "FLOW_MATCHING_TRAINING_GUIDE.md"])
def test_every_file_that_a_document_names_exists(readme):
    path = ROOT / readme
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text)
    files = re.findall(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.(?:py|sh|toml|yaml))(?![\w-])", text)
    modules = re.findall(r"-m ((?:scripts|bench|recipes)[\w.]*)", text)
    wanted = set(links) | set(files) | {module.replace(".", "/") + ".py" for module in modules}
    shorthand = {file.name for file in sources()}  # a text may say flow_matching.py once it has named utils/
    missing = [name for name in sorted(wanted)
               if not (ROOT / name).exists() and not ("/" not in name and name in shorthand)]
    assert not missing


def test_no_machine_path_is_in_the_repository():
    for path in sources() + sources("*.md") + sources("*.sh") + sources("scripts/*.sh"):
        if path != Path(__file__).resolve():
            assert not re.search(r"(?<![\w.])/(work|root|home)/\w", path.read_text(encoding="utf-8")), name_of(path)
