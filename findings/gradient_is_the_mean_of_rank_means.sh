#!/usr/bin/env bash
# ai2-olmo-core 3.0.0, torch 2.13.0: TransformerTrainModule over two data-parallel ranks, with masked labels.
#
# A good guess: a step goes down the mean loss over all labelled tokens of the global batch, however its rows are dealt out.
# Over the micro-batches of one rank that is so. Over ranks it is not: each divides its loss by the number of labelled
# tokens of its OWN rows, a number that is never added up over ranks, and the gradients are then averaged over ranks. With
# masked labels a token's weight therefore depends on which other rows its rank was given. Below the same four rows are
# dealt in two ways; in the second each of 4 labels on one rank counts seven times as much as each of 28 on the other.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "torch==2.13.0" "ai2-olmo-core==3.0.0"
cat > "$place/ranks.py" <<'PY'
import torch
import torch.distributed as dist
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.optim import AdamWConfig
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig

dist.init_process_group("gloo")
rank, length = dist.get_rank(), 16


def tiny():
    model = TransformerConfig.llama_like(d_model=32, vocab_size=64, n_layers=2, n_heads=2).build(init_device="cpu")
    model.init_weights(max_seq_len=length, device=torch.device("cpu"))
    return model


module = TransformerTrainModuleConfig(
    rank_microbatch_size=length, max_sequence_length=length, optim=AdamWConfig(),
    dp_config=TransformerDataParallelConfig(name="ddp"),
).build(tiny(), device=torch.device("cpu"))
module.record_metric = module.record_ce_loss = lambda *args, **kwargs: None  # a trainer would collect these
alone = tiny()
alone.load_state_dict({name: value.clone() for name, value in module.model.state_dict().items()})
labels = torch.tensor([14, 2, 14, 2])  # of each row, at its end
rows = torch.randint(3, 64, (4, length), generator=torch.Generator().manual_seed(0))
mask = torch.arange(length) >= length - labels[:, None]


def gradient(loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(alone.parameters()), retain_graph=True)])


for dealt in torch.tensor([[[0, 1], [2, 3]], [[0, 2], [1, 3]]]):  # the rows of each rank, one a micro-batch
    module.zero_grads()
    module.train_batch({"input_ids": rows[dealt[rank]], "label_mask": mask[dealt[rank]]})
    found = torch.cat([parameter.grad.flatten() for parameter in module.model.parameters()])
    losses = torch.nn.functional.cross_entropy(alone(rows)[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    sums, kept = (losses * mask[:, 1:]).sum(1)[dealt].sum(1), labels[dealt].sum(1)
    over_tokens, over_ranks = gradient(sums.sum() / kept.sum()), gradient((sums / kept).mean())
    far, near = (float((found - other).norm() / other.norm()) for other in (over_tokens, over_ranks))
    if rank == 0:
        print(f"labels on the ranks {kept.tolist()}: gradient off that of the mean over tokens by {far:.1e}, "
              f"of the mean of the ranks' means by {near:.1e}")
    assert near < 1e-3 and (far > 0.1) == (kept[0] != kept[1]).item(), "the behaviour has changed"
dist.destroy_process_group()
PY
OMP_NUM_THREADS=1 "$place/venv/bin/torchrun" --standalone --nproc-per-node 2 "$place/ranks.py"
