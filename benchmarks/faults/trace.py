"""Nothing is sent, nothing is written elsewhere: every verb under strace, in a network namespace with nothing in it.

    python benchmarks/faults/trace.py --json trace.json
    python benchmarks/faults/trace.py --quick

One process opens no inet socket; several open some, and use addresses of this machine only (127.0.0.0/8, ::1). Files
are made, changed, renamed and removed below the run or output folder, TMP and the cache folder only, and for `index`
where its key lies. Python's own bytecode (`__pycache__`), devices, shared memory and /proc are looked at apart.

Needs Linux, strace and a network namespace (`unshare -n`, also without being root).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from harness import Rows, run_warmed
from trainings import SIDE, SMALL, write_images

from ssl_kit.core.process import cache_folder
from ssl_kit.encoders.encoder import Encoder

# runs the rest of its command line once the namespace has its loopback device up: IFF_UP by SIOCSIFFLAGS
LOOPBACK = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(socket.AF_INET), 0x8914, struct.pack("16sh14x", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""
CHANGING = "((creat|mkdir|mknod|rename|unlink|rmdir|link|symlink|truncate|chmod|l?chown|utimes?|utimens|futimes)(at2?)?"
CHANGING += "|fch(mod|own)at)"  # calls, also as strace understands it
FOR_WRITING = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND)")
CALL = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)")
PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"(\.\.\.)?')
ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
LOCAL = re.compile(r"127\.|::1$|::ffff:127\.")
APART = re.compile(r"^/dev/|^/proc/|/__pycache__(/|$)")
TINY = ["--batch-size", "16", "--trainer.max-steps", "2", "--image-size", str(SIDE)]
SMALL_CNN = ["--method.encoder.args", json.dumps(SMALL["args"])]
SMALL_VIT = ["--method.encoder.name", "vit_tiny_patch16_224"]
SMALL_VIT += ["--method.encoder.args", "{patch_size: 4, embed_dim: 24, depth: 2, num_heads: 2}"]


class Seen(NamedTuple):
    """What a traced command did.

    `families`: address families of its sockets, counted. `addresses`: that they were bound or connected to. `changed`:
    paths of files that it made, changed or removed.
    """

    families: Counter[str]
    addresses: set[str]
    changed: set[Path]


def commands(place: Path, encoder: str) -> dict[str, list[str]]:
    """Name -> words of `ssl-kit`, each on what the ones before it made; `encoder` is a run or encoder folder."""
    images, small = str(place / "images"), [*SMALL_CNN, *TINY]
    mae, vae = (["--method", f"ssl_kit.methods.{name.lower()}.{name}"] for name in ("MAE", "VAE"))
    tuning = ["--epochs", "1", "--batch-size", "16", "--scratch", "false"]
    return {
        "pretrain": ["pretrain", images, "--run", "run", *small],
        "pretrain MAE": ["pretrain", images, "--run", "mae", *mae, *SMALL_VIT, *TINY],
        "pretrain VAE": ["pretrain", images, "--run", "vae", *vae, *small],
        "pretrain in 2 processes": ["pretrain", images, "--run", "two", *small, "--trainer.devices", "2"],
        "evaluate": ["evaluate", encoder, images, "--out", "scores"],
        "finetune": ["finetune", encoder, images, "--out", "tuned", *tuning],
        "embed": ["embed", encoder, images, "--out", "emb"],
        "index": ["index", "emb"],
        "search": ["search", "emb", f"{images}/class0/00.png", "--html", "found.html"],
        "duplicates": ["duplicates", "emb", "--csv", "twice.csv", "--html", "twice.html"],
        "report": ["report", "run", "--out", "report.html"],
        "export timm": ["export", encoder, "--out", "timm", "--images", images],
        "export onnx": ["export", encoder, "--out", "onnx", "--format", "onnx", "--images", images],
        "views": ["views", images, "--out", "views.png", "--count", "2"],
        "doctor": ["doctor", "--seconds", "0.2"],
    }


QUICK = ("embed", "export onnx", "views")


def namespace() -> list[str] | None:
    """The command before a command that runs in an empty network namespace; None where there can be none."""
    if shutil.which("strace") is None:
        return None
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
        ):
            return command
    return None


def traced(words: list[str], place: Path, *, loopback: bool) -> tuple[Seen, subprocess.CompletedProcess[str]]:
    """Runs `ssl-kit WORDS` in `place`; what it did, all its processes together."""
    logs = place / "strace"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    before = namespace()
    assert before is not None, "main has looked"
    ready = [sys.executable, "-c", LOOPBACK] if loopback else []
    strace = [
        "strace",
        "-ff",
        "--seccomp-bpf",
        "-y",
        "-s",
        "200",
        "-e",
        f"trace=%network,chdir,/^(open(at2?)?|{CHANGING})$",
    ]
    command = [*before, *ready, *strace, "-o", str(logs / "of"), sys.executable, "-m", "ssl_kit", *words]
    done = subprocess.run(command, cwd=place, env=surroundings(place), capture_output=True, text=True, check=False)
    seen = Seen(Counter(), set(), set())
    for log in sorted(logs.iterdir()):
        _read(log, place, seen)
    return seen, done


def surroundings(place: Path) -> dict[str, str]:
    """The environment of a user whose every folder is new."""
    names = {name: os.environ[name] for name in ("PATH", "LANG", "PYTHONPATH") if name in os.environ}
    names |= {f"XDG_{name.upper()}_HOME": str(place / "home" / name) for name in ("cache", "config", "data", "state")}
    return names | {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "OMP_NUM_THREADS": "1"}


def _read(log: Path, place: Path, seen: Seen) -> None:
    """Adds what one thread of the command did."""
    folder = str(place)
    for line in log.read_text(errors="replace").splitlines():
        call = CALL.match(line)
        if call is None:
            continue
        name, arguments, result = call.groups()
        if name == "socket":
            seen.families[arguments.partition(",")[0]] += 1
        if name in ("bind", "connect") or name.startswith("send"):
            seen.addresses.update(one or other for one, other in ADDRESS.findall(arguments))
        if int(result) < 0:
            continue
        paths = [os.path.join(folder, at, name) for at, name, _ in PATH.findall(arguments)]
        if name == "chdir":
            folder = paths[0]
        elif re.fullmatch(CHANGING, name) or (name.startswith("open") and FOR_WRITING.search(arguments)):
            seen.changed.update(Path(os.path.normpath(path)) for path in paths)


def judged(seen: Seen, place: Path, words: list[str], several: bool) -> tuple[dict[str, int], list[str]]:
    """How many files were changed in each place, and all that should not have been done, in words."""
    given = [words[at + 1] for at, word in enumerate(words) if word in ("--run", "--out", "--html", "--csv")]
    places = {"cache": place / "home" / "cache" / "ssl_kit", "TMP": place / "tmp"}
    if words[0] == "index":
        given.append(words[1])
        places["key"] = place / "home" / "data" / "ssl_kit"
    files: Counter[str] = Counter()
    wrong = []
    for path in sorted(seen.changed):
        # beside an output lies for a moment the same under a temporary name: .NAME.xxxxxxxx.tmp
        top = path.relative_to(place).parts[0] if place in path.parents else ""
        found = "output" if any(top == name or top.startswith(f".{name}.") for name in given) else None
        found = found or next(
            (name for name, folder in places.items() if path == folder or folder in path.parents), None
        )
        if found is None and any(path in folder.parents for folder in places.values()):
            found = "folder above"  # of the cache, the first time
        if found is None and APART.search(str(path)):
            found = "apart"
        files[found or "elsewhere"] += 1
        if found is None:
            wrong.append(f"changed {path}")
    inet = seen.families["AF_INET"] + seen.families["AF_INET6"]
    if inet and not several:
        wrong.append(f"{inet} inet sockets ({', '.join(sorted(seen.addresses)) or 'no address'})")
    wrong += [f"address {one}" for one in sorted(seen.addresses) if several and not LOCAL.match(one)]
    return dict(files), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of the commands, by name")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only")
    parser.add_argument("--json", type=Path, help="write the rows to this file, and go on with those it holds")
    arguments = parser.parse_args()
    if namespace() is None:
        print("skipped: needs strace and a network namespace (unshare -n)")
        return
    rows = Rows(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        for name in ("home", "tmp"):
            (place / name).mkdir()
        write_images(place / "images")
        encoder = lambda: Encoder(SMALL["name"], SMALL["args"], (SIDE, SIDE)).save(place / "encoder")
        run_warmed(encoder, place / "log.txt")
        warm = cache_folder()
        if warm is not None and (warm / "numba").exists():  # compiling under strace takes minutes
            shutil.copytree(warm / "numba", place / "home" / "cache" / "ssl_kit" / "numba")
        todo = commands(place, "encoder")
        for name in QUICK if arguments.quick else arguments.only.split(",") if arguments.only else todo:
            if any(row["id"] == f"trace/{name}" for row in rows.rows):
                continue
            rows.add(row := _row(name, todo[name], place))
            print(_line(row), flush=True)
            for wrong in row.get("wrong", ()):
                print(f"    {wrong}", flush=True)


def _row(name: str, words: list[str], place: Path) -> dict[str, Any]:
    several = "--trainer.devices" in words
    seen, done = traced(words, place, loopback=several)
    files, wrong = judged(seen, place, words, several)
    if done.returncode:
        wrong.insert(0, f"ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    row = {"id": f"trace/{name}", "what": "ssl-kit " + " ".join(words[:1]), "tried": 1, "survived": int(not wrong)}
    row |= {"sockets": dict(seen.families), "addresses": sorted(seen.addresses), "files": files}
    return row | ({"wrong": wrong} if wrong else {})


def _line(row: dict[str, Any]) -> str:
    sockets = " ".join(f"{family} {count}" for family, count in sorted(row["sockets"].items())) or "no socket"
    files = " ".join(f"{where} {count}" for where, count in sorted(row["files"].items()))
    told = "as it should be" if row["survived"] else "NOT as it should be"
    return f"{row['id']:<28}{told:<22}{sockets}; {', '.join(row['addresses']) or 'no address'}; files changed: {files}"


if __name__ == "__main__":
    main()
