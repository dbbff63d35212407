"""Many killed drivers:  python -m tests.faults.soak KILLS [SEED]

Runs of 40 kills each, every one compared with a calm run; with as many kills of whole `alphatoken` processes and their
Ray as one in ten. Exits with an error at the first difference.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import chat_row, save_model, write_rows
from tests.faults.interrupted_run import MANY_PIECES, contents, family, python, without_ray

PER_RUN = 40


def main(kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        train = write_rows(place / "train.jsonl", [chat_row(i) for i in range(60)])
        inputs = [f"model.policy={save_model(place / 'policy', seed=1)}", f"data.train={train}", *MANY_PIECES]
        without_ray(0, 0, "run", f"run.dir={place}/calm", *inputs)
        calm, done, draw = contents(place / "calm"), 0, random.Random(seed)
        run = place / "ray"
        for turn in range(kills // 10):
            process = python("jobs", "run", f"run.dir={run}", *inputs)
            time.sleep(draw.uniform(3.0, 20.0))
            for member in family(process)[: 1 if turn % 2 else None]:
                member.kill()
            process.communicate(timeout=60)
            done += process.returncode != 0
        process = python("jobs", "run", f"run.dir={run}", *inputs)
        _, err = process.communicate(timeout=600)
        if process.returncode != 0 or contents(run) != calm:
            raise SystemExit(f"after {done} killed processes with Ray the run is another one: {err[-2000:]}")
        print(f"{done} kills: the same bytes", flush=True)
        while done < kills:
            seed += 1
            told = without_ray(min(PER_RUN, kills - done), seed, "run", f"run.dir={place}/{seed}", *inputs)
            done += told["kills"]
            if contents(place / str(seed)) != calm:
                raise SystemExit(f"after {told['kills']} kills with seed {seed} the run is another one")
            print(f"{done} kills: the same bytes", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
