"""No file that is read can run code: nothing here unpickles, evaluates or trusts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("hamner", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")
]

UNPICKLING_MODULES = {"_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
#: All of `pickle` that may be named: what `torch.load` raises when it refuses a file.
PICKLE_NAMES = {"pickle.UnpicklingError"}
#: A call of this name is allowed only with this keyword at this value.
REQUIRED_KEYWORDS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "os.system", "yaml.load", "pd.read_pickle"}
FORBIDDEN_KEYWORDS = {("allow_pickle", True), ("trust_remote_code", True), ("shell", True)}


def violations(source: str) -> list[str]:
    """What in a module could run code out of a file, as line and text."""
    found = []
    nodes = list(ast.walk(ast.parse(source)))
    harmless = {
        id(node.value)
        for node in nodes
        if isinstance(node, ast.Attribute) and ast.unparse(node) in PICKLE_NAMES
    }
    for node in nodes:
        names, banned = [], UNPICKLING_MODULES
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(alias.asname for alias in node.names):
                banned = banned | {"pickle"}
        elif isinstance(node, ast.ImportFrom):
            names, banned = [node.module or ""], banned | {"pickle"}
        bad = any(name.partition(".")[0] in banned for name in names)
        bad |= isinstance(node, ast.Name) and node.id == "pickle" and id(node) not in harmless
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).replace("numpy.", "np.").replace("pandas.", "pd.")
            keywords = {
                keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
                for keyword in node.keywords
            }
            bad = called in FORBIDDEN_CALLS or any(
                keywords.get(name, not value) in (value, ...) for name, value in FORBIDDEN_KEYWORDS
            )
            if called in REQUIRED_KEYWORDS:
                name, value = REQUIRED_KEYWORDS[called]
                bad |= keywords.get(name) is not value
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_there_is_something_to_look_at():
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_runs_no_code_of_files(path):
    assert violations(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(file)",
        "import pickle\ngetattr(pickle, name)(file)",
        "import pickle as p",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "numpy.load(path)",
        "np.load(path, allow_pickle=True)",
        "load_dataset(name, trust_remote_code=True)",
        "load_dataset(name, trust_remote_code=flag)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_would_run_code_is_found(source):
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "model.eval()",
        "import pickle\nrefused = pickle.UnpicklingError",
        "subprocess.run(command)",
    ],
)
def test_what_would_not_is_left_alone(source):
    assert not violations(source)
