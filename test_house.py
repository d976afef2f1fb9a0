"""The house: who may import whom, what no file may do, and which files can be copied out alone."""
import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# from the top floor down: a file imports, even lazily, only from floors below its own
FLOORS = """
claims.__main__
claims.law claims.tuning claims.solids claims.edits claims.student
claims.pictures claims.exact
claims.runs
claims.measures
claims.work
editing text_to_3d
variants
asd nerf
phi
cli.run
cli.settings
cli.pictures
cli.files
prior nerf_kernels conftest
loading
tiny.make tiny.corrective
tiny.data
tiny.solids tiny.judge tiny.training tiny.exact cli.start
tiny claims cli
"""
FLOOR = {name: -i for i, names in enumerate(FLOORS.split("\n")) for name in names.split()}


def modules():
    """{name: path} of all that is no test."""
    paths = [*HERE.glob("*.py"), *HERE.glob("tiny/*.py"), *HERE.glob("claims/*.py"),
             *HERE.glob("cli/*.py")]
    named = {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in paths
             if not path.name.startswith("test_")}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


MODULES = modules()


def imported(path):
    """The modules of this repository that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found & MODULES.keys()


def test_every_arrow_points_down():
    assert MODULES.keys() == FLOOR.keys()
    upward = [f"{name} -> {other}" for name, path in MODULES.items() for other in imported(path)
              if FLOOR[other] >= FLOOR[name]]
    assert not upward


def test_no_circle():
    """Of the graph itself, whatever FLOORS says."""
    try:
        TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"{error.args[1]}")


TOP = {name for name in MODULES if "." not in name} - {"conftest", "tiny", "claims", "cli"}


def test_a_newcomer_sees_the_paper_first():
    """At most nine modules at the top level, each of them with comments enough to follow it."""
    assert len(TOP) <= 9
    for name in TOP:
        source = MODULES[name].read_text("utf-8")
        comments, code = comment_lines(source)
        assert comments >= 0.4 * code, f"{name}: {comments} lines of comment, {code} of code"


def comment_lines(source):
    """-> how many lines of a file have a comment or belong to a docstring, how many have code."""
    commented, coded = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            commented |= set(lines)
        elif token.type == tokenize.STRING and not token.line[:token.start[1]].strip():
            commented |= set(lines)               # a docstring: nothing stands before it
        elif token.string.strip() and token.type != tokenize.ENDMARKER:
            coded |= set(lines)
    return len(commented), len(coded)


def test_every_function_can_be_read():
    """None is longer than 60 lines, none is a coroutine."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"
            if isinstance(node, ast.Attribute):
                assert node.attr != "send", f"{name}: a coroutine"


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
             "torch.load", "torch.save", "torch.hub", "numpy.load", "np.load", "eval", "exec"}
ALLOWED_ONLY = {"weights_only": True, "allow_pickle": False, "trust_remote_code": False,
                "use_safetensors": True}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_ever_unpickled(name):
    """Neither the modules that do, nor torch.load, nor eval, nor a flag that asks a library to."""
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        used = set()
        if isinstance(node, ast.Import):
            used = {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            used = {node.module} | {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, (ast.Attribute, ast.Name)):
            used = {ast.unparse(node)}
        elif isinstance(node, ast.Call):
            for word in node.keywords:
                if word.arg in ALLOWED_ONLY:
                    value = ast.unparse(word.value)
                    assert value == repr(ALLOWED_ONLY[word.arg]), ast.unparse(node)
        assert not used & FORBIDDEN, ast.unparse(node)


COPIES = {                             # {files: what is then to work}
    "asd.py": "import asd; asd.generator_grad; asd.distill",
    "nerf.py": "import nerf; nerf.NeRF()",
    "phi.py prior.py loading.py": "import phi, prior; phi.LoRAPhi; prior.Prior",
    "asd.py editing.py": "import editing; editing.METHODS; editing.editing_grad",
    "nerf.py nerf_kernels.py": "import nerf"}
ALONE = """
import os, sys
heavy = ("diffusers", "transformers", "peft", "safetensors", "PIL", "triton")
sys.modules.update(dict.fromkeys(heavy))
import torch                                             # once: each folder has a fork of this
for folder, source in zip(sys.argv[1::2], sys.argv[2::2]):
    process = os.fork()
    if process == 0:
        os.chdir(folder)
        exec(source)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        sys.exit(f"{os.listdir(folder)} cannot do without the rest: {source}")
"""


def test_copied_into_an_empty_folder(tmp_path):
    """… a file imports without the rest of the house, with torch alone."""
    arguments = []
    for i, (files, source) in enumerate(COPIES.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        for file in files.split():
            shutil.copy(HERE / file, folder)
        arguments += [folder, source]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", ALONE, *arguments], cwd=tmp_path, env=clean,
                          text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
