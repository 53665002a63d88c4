"""Makes the vectors in this folder again, with the restic that is installed (they came from 0.14.0).

    python tests/vectors/restic/make.py        writes v1/, v2/ and what restic says of them, told-v1.json, told-v2.json

The password is "vector". Both hold the same few files, in two snapshots, and a lock that was held.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PASSWORD = "vector"


def restic(repository: Path, *words: str) -> bytes:
    """What restic prints."""
    argv = ["restic", "--quiet", "--no-cache", "--no-lock", "-r", str(repository), *words]
    return subprocess.run(
        argv, check=True, capture_output=True, env={**os.environ, "RESTIC_PASSWORD": PASSWORD}, timeout=60
    ).stdout


def fill(source: Path) -> None:
    """Some files: empty, small, compressible, not compressible, with odd names."""
    (source / "below").mkdir(parents=True)
    (source / "empty").touch()
    (source / "below" / "zeroes").write_bytes(bytes(20_000))
    (source / "below" / "text").write_bytes(b"All work and no play makes Jack a dull boy.\n" * 40)
    (source / "below" / "counted").write_bytes(bytes(number * number % 251 for number in range(2000)))
    for name in (b"<&>", b'quo"ted\\', "größer".encode(), b"tab\there", b"latin-\xe9"):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(name)
    (source / "link").symlink_to("below/text")


def backup_holding_lock(repository: Path) -> None:
    """A second backup, from standard input; its lock is copied while it is held."""
    argv = [
        "restic",
        "--quiet",
        "--no-cache",
        "-r",
        str(repository),
        "backup",
        "--stdin",
        "--tag",
        "a,b",
        "--host",
        "h",
    ]
    env = {**os.environ, "RESTIC_PASSWORD": PASSWORD}
    with subprocess.Popen(argv, stdin=subprocess.PIPE, env=env) as process:
        assert process.stdin is not None
        while not (locks := [path for path in (repository / "locks").iterdir() if len(path.name) == 64]):
            pass
        [held] = [(path.name, path.read_bytes()) for path in locks]
        process.stdin.write(b"from standard input\n")
        process.stdin.close()
    (repository / "locks" / held[0]).write_bytes(held[1])


def told(repository: Path) -> dict[str, Any]:
    """What restic says of the repository."""
    found: dict[str, Any] = {name: json.loads(restic(repository, "cat", name)) for name in ("masterkey", "config")}
    found |= {"trees": {}, "data": {}}
    for kind, folder in (("snapshot", "snapshots"), ("index", "index"), ("lock", "locks")):
        names = [path.name for path in (repository / folder).iterdir()]
        found[kind] = {name: json.loads(restic(repository, "cat", kind, name)) for name in sorted(names)}
    for file in found["index"].values():
        for blob in (blob for pack in file["packs"] for blob in pack["blobs"]):
            content = restic(repository, "cat", "blob", blob["id"])
            if blob["type"] == "tree":
                found["trees"][blob["id"]] = content.decode()
            else:
                found["data"][blob["id"]] = len(content)
    return found


def main() -> None:
    """Make them."""
    for version in ("1", "2"):
        repository = HERE / f"v{version}"
        shutil.rmtree(repository, ignore_errors=True)
        restic(repository, "init", "--repository-version", version)
        with tempfile.TemporaryDirectory() as scratch:
            fill(Path(scratch) / "source")
            restic(repository, "backup", str(Path(scratch) / "source"), "--tag", "first")
        backup_holding_lock(repository)
        text = json.dumps(told(repository), indent=1, sort_keys=True, ensure_ascii=False)
        (HERE / f"told-v{version}.json").write_text(text + "\n", encoding="utf-8")
        for path in sorted(repository.rglob("*"), reverse=True):
            path.chmod(0o755 if path.is_dir() else 0o644)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


if __name__ == "__main__":
    main()
