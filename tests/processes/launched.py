"""A training script as a user writes it, for `accelerate launch`; its argument is a folder."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from processes import small

from pairclip import AllPairsCosineLoss, Finetuner

tower = small.new_tower()
finetuner = Finetuner(tower, AllPairsCosineLoss(negatives="squared"), learning_rate=1e-3)
history = finetuner.fit(
    (small.pictures(), small.LABELS),
    batch_size=16,
    epochs=2,
    eval_dataset=(small.pictures(), small.LABELS),
)
state = PartialState()
print(f"process {state.process_index} of {state.num_processes} on {state.device}")
torch.save(
    {"weights": small.weights(tower), "history": history.to_dict(), "world": state.num_processes},
    Path(sys.argv[1]) / f"{state.process_index}.pt",
)
