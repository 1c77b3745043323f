"""Users' scripts pass mypy strict and pyright: the types are right, and editors show no error under right code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "tests" / "typing").glob("*.py"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_users_scripts_pass_mypy_strict() -> None:
    done = run("mypy", "--strict", *SCRIPTS)
    assert done.stdout.startswith("Success: no issues found"), done.stdout


def test_users_scripts_pass_pyright(tmp_path: Path) -> None:
    # Red: "LengthIndex is incompatible with protocol IndexedLengths" under `LengthBucketBatchSampler(data.index)`.
    # It looks for scripts in the folder of its settings alone.
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", tmp_path)
    found = [
        f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']}"
        for each in json.loads(done.stdout)["generalDiagnostics"]
        if each["severity"] == "error"
    ]
    assert found == []
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == len(SCRIPTS)
