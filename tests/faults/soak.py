"""Many killed drivers:  python -m tests.faults.soak KILLS [SEED]

Runs of 40 kills each, every one compared with a calm run; with as many kills of whole `alphatoken` processes and their
Ray as one in ten. Exits with an error at the first difference.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.interrupted_run import calm_run, contents, family, inputs_in, python, without_ray

PER_RUN = 40


def main(kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        inputs = inputs_in(place)
        calm, done, draw = calm_run(place / "calm", inputs), 0, random.Random(seed)
        turn = 0
        while done < kills // 10:  # a run that ended is compared, and the next begins
            run = place / f"ray-{turn}/run"  # all of one name, which the report shows
            process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
            time.sleep(draw.uniform(3.0, 15.0))
            for member in family(process)[: 1 if done % 2 else None]:
                member.kill()
            process.communicate(timeout=60)
            if process.returncode == 0:
                compare(contents(run), calm, f"{done} killed processes with Ray")
                turn += 1
            done += process.returncode != 0
        process = python("alphatoken.jobs", "run", f"run.dir={run}", *inputs)
        _, err = process.communicate(timeout=600)
        if process.returncode != 0:
            raise SystemExit(f"after {done} killed processes with Ray the run fails: {err[-2000:]}")
        compare(contents(run), calm, f"{done} killed processes with Ray")
        print(f"{done} kills: the same bytes", flush=True)
        while done < kills:
            seed += 1
            run = place / f"{seed}/run"
            told = without_ray(min(PER_RUN, kills - done), seed, "run", f"run.dir={run}", *inputs)
            done += told["kills"]
            compare(contents(run), calm, f"{told['kills']} kills with seed {seed}")
            print(f"{done} kills: the same bytes", flush=True)


def compare(found: dict[str, object], calm: dict[str, object], after: str) -> None:
    """Exit with the names of the files that differ."""
    if wrong := sorted(name for name in found.keys() | calm.keys() if found.get(name) != calm.get(name)):
        raise SystemExit(f"after {after} other files or bytes: {', '.join(wrong)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
