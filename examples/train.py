"""Fine-tune on a mask with TRL, once the first batch is seen to train on what the mask keeps.

    python examples/train.py RUN --mask default --model MODEL --out OUT [--steps 50]

RUN: a run directory. MODEL: the model that the run was made with, or another with the same tokenizer. Needs trl>=1.16.
"""

import argparse
import json
import sys
from pathlib import Path

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from alphatoken.pipeline.trainers.batch_check import check
from alphatoken.pipeline.trainers.batch_file import batch_of
from alphatoken.pipeline.trainers.batch_report import report
from alphatoken.pipeline.trainers.source import open_mask


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune on a mask with TRL.")
    parser.add_argument("run")
    parser.add_argument("--mask", default="default")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=-1, help="default: one epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()

    rows = load_dataset(str(Path(given.run) / "masks" / given.mask), split="train")
    settings = SFTConfig(
        given.out,
        max_length=None,  # the default cuts rows at 1,024 tokens and says nothing
        max_steps=given.steps,
        num_train_epochs=1,
        per_device_train_batch_size=given.batch,
        learning_rate=given.learning_rate,
        use_cpu=given.cpu,
        bf16=not given.cpu,
        logging_steps=1,
        report_to="none",
    )
    trainer = SFTTrainer(given.model, args=settings, train_dataset=rows)

    batch = next(iter(trainer.get_train_dataloader()))
    verdict = check(batch_of({name: tensor.cpu() for name, tensor in batch.items()}), open_mask(given.run, given.mask))
    print("\n".join(report(verdict, given.mask)))
    if not verdict.agrees:
        return 1

    trainer.train()
    trainer.save_model(given.out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
