"""Make the environments of the peers that `loading.py` measures.

    python benchmarks/loading_environments.py FOLDER

Each environment sees the packages of the interpreter that runs this script, torch above all, and has its own versions
of others in front of them: mosaicml-streaming needs an older numpy and transformers. What does not install is printed,
and the benchmark runs without it. `constraints-peers.txt` has the versions.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
CONSTRAINTS: Final = HERE / "constraints-peers.txt"
# By environment and peer: what pip installs. Without their dependencies where the list is complete: litdata asks for
# torchvision, which would bring another torch.
PEERS: Final[dict[str, dict[str, list[str]]]] = {
    "libraries": {
        "litdata": ["--no-deps", "litdata", "boto3", "botocore", "s3transfer", "jmespath", "python-dateutil", "six"],
        "array_record, grain": [
            "--no-deps",
            "grain",
            "array_record",
            "absl-py",
            "etils",
            "protobuf",
            "cloudpickle",
            "portpicker",
        ],
    },
    "mosaicml": {"mosaicml-streaming": [str(HERE / "torchvision_stub"), "mosaicml-streaming"]},
}


def main() -> None:
    """Make all environments, and say which peers are missing."""
    [folder] = map(Path, sys.argv[1:])
    missing = []
    for name, peers in PEERS.items():
        python = make(folder / name)
        for peer, requirements in peers.items():
            command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            print(f"{peer} into {folder / name}", flush=True)
            if subprocess.run([*command, "--constraint", CONSTRAINTS, *requirements], check=False).returncode:
                missing.append(peer)
    print(f"missing: {', '.join(missing) or 'none'}")


def make(folder: Path) -> Path:
    """A new environment that also sees the packages of this one; its interpreter."""
    venv.create(folder, with_pip=True, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


if __name__ == "__main__":
    main()
