"""Kill conversions to memory-mapped copies, and check that the copies are complete or absent.

python tests/kill_conversion.py                     20 kills of a conversion of a million rows, about two minutes
python tests/kill_conversion.py --kills 3 --rows 20000

Each conversion runs in a process of its own and is killed (SIGKILL), in turn while it checks the file and while it
writes, at a moment drawn from a slice of the time that this phase takes when undisturbed. Exits with 1 if a rerun
differs from the undisturbed conversion in any byte.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from torchrl_bcq import DatasetError, load_hdf5, load_memmap
from torchrl_bcq.data.sources import layouts, source
from torchrl_bcq.data.sources.conversion import write_memmap
from torchrl_bcq.files import UNFINISHED

PHASES = ("checking", "writing", "done")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many conversions to kill")
    parser.add_argument("--rows", type=int, default=1_000_000, help="steps in the file that is converted")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill_conversion."))
    try:
        return run(folder, args.kills, args.rows, random.Random(args.seed))
    finally:
        shutil.rmtree(folder)


def run(folder: Path, kills: int, rows: int, rng: random.Random) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrl_bcq"])  # imported once
    file = make_file(folder / "steps.hdf5", rows)
    convert_and_kill(context, file, folder / "warm-up")
    spans = convert_and_kill(context, file, folder / "undisturbed")
    size, expected = sum(path.stat().st_size for path in files(folder / "undisturbed")), digest(folder / "undisturbed")
    took = " and ".join(f"{span:.2f} s of {phase}" for phase, span in zip(PHASES, spans, strict=False))
    print(f"{rows} rows, {size / 1e6:.0f} MB: an undisturbed conversion takes {took}", flush=True)
    hit: Counter[str] = Counter()
    bad = 0
    for kill in range(kills):
        root = folder / f"kill-{kill}"
        aim = kill % 2
        moment = (kill // 2 + rng.random()) / ((kills + 1) // 2) * spans[aim]
        convert_and_kill(context, file, root, PHASES[aim], moment)
        phase = "done" if copies(root) else "writing" if any(root.glob(f"{UNFINISHED}*")) else "checking"
        defects = what_is_left(root, expected)
        load_hdf5(file, root=root)
        if digest(root) != expected:
            defects.append("the rerun differs from the undisturbed conversion")
        if any(root.glob(f"{UNFINISHED}*")):
            defects.append("the rerun left something unfinished")
        hit[phase] += 1
        bad += bool(defects)
        line = f"kill {kill + 1:3}, {moment:.3f} s into {PHASES[aim]}, found {phase}"
        print(f"{line}: {'; '.join(defects) or 'the rerun is the same'}", flush=True)
        shutil.rmtree(root)
    moments = ", ".join(f"{hit[phase]} when {phase}" for phase in PHASES)
    print(f"{kills} kills ({moments}): {kills - bad} reruns byte for byte the same, {bad} not")
    return bad > 0


def make_file(path: Path, rows: int) -> Path:
    """Steps of episodes of 200, every other one terminated."""
    rng = np.random.default_rng(0)
    end = np.arange(rows) % 200 == 199
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(rows, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        file["rewards"] = rng.normal(size=rows)
        file["terminals"] = end & (np.arange(rows) // 200 % 2 == 0)
        file["timeouts"] = end & (np.arange(rows) // 200 % 2 == 1)
    return path


def convert(file: Path, root: Path, pipe) -> None:
    """Report the beginning of each phase."""

    def tell_and_write(*args):
        pipe.send("writing")
        write_memmap(*args)

    layouts.CHUNK_BYTES = 1 << 18  # many small parts
    source.write_memmap = tell_and_write
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a killed process would leak
    pipe.send("checking")
    load_hdf5(file, root=root)
    pipe.send("done")


def convert_and_kill(context, file: Path, root: Path, phase: str = "done", moment: float = 0) -> list[float]:
    """Kill it some seconds after a phase begins; returns the seconds of the phases before."""
    here, there = context.Pipe()
    process = context.Process(target=convert, args=(file, root, there))
    process.start()
    there.close()
    times = []
    for expected in PHASES[: PHASES.index(phase) + 1]:
        if here.recv() != expected:
            raise RuntimeError(f"the conversion did not report the phase {expected}")
        times.append(time.perf_counter())
    here.poll(moment)
    process.kill()
    process.join()
    return [after - before for before, after in pairwise(times)]


def copies(root: Path) -> list[Path]:
    return [path for path in root.glob("*") if path.is_dir() and not path.name.startswith(".")]


def what_is_left(root: Path, expected: str) -> list[str]:
    """Defects of the folders that are left: all that can be loaded must be complete."""
    defects = []
    for folder in root.glob("*") if root.is_dir() else ():
        if not folder.is_dir():
            continue
        try:
            load_memmap(folder)
        except DatasetError:
            if not folder.name.startswith("."):
                defects.append(f"{folder.name} is there and cannot be loaded")
            continue
        if digest(root) != expected:
            defects.append(f"{folder.name} can be loaded and is not complete")
    return defects


def files(root: Path) -> list[Path]:
    return sorted(path for folder in copies(root) for path in folder.rglob("*") if path.is_file())


def digest(root: Path) -> str:
    """Digest of the names and bytes of all finished copies."""
    content = hashlib.sha256()
    for path in files(root):
        content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
