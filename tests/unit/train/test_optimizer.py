from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from chulengo.train.job import Optimisation
from chulengo.train.optimizer import SCHEDULES, learning_rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_transformers(schedule: str, warmup: int) -> None:
    settings = Optimisation(
        total_steps=40, learning_rate=3e-4, schedule=schedule, warmup_steps=warmup, weight_decay=0.0,
        optimizer="adamw", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, seed=0,
    )
    rate = learning_rates(settings)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for done in range(40):
        assert rate(done) == optimizer.param_groups[0]["lr"], done
        optimizer.step()
        scheduler.step()
